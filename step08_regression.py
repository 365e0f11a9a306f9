"""Step 8: valence, energy and danceability by regression.

The lab asks: a) the best model of step 5 and the one of step 7 as regressors, by changing the
loss; b) their training for valence, c) for energy, d) for danceability; e) Spearman's
correlation between true and predicted values, averaged over the three axes, on a part of the
labelled clips, because the test clips have no public labels.

    python step08_regression.py                  # six regressors, a fifth of the clips held out
    python step08_regression.py --folds 5        # cross-validation: every clip is held out once
    python step08_regression.py --overfit-batch  # only check that both networks can learn

Input: the emotion data set; the validation scores of step 5. Output, in
outputs/step08_regression/: a checkpoint and a history per run, learning curves, scores
(summary.md, metrics.json), predictions.csv for the held-out clips and submission.csv for the
clips without labels.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--folds 5 --epochs 20").
import itertools
import math

import pandas as pd
import torch

import common
from patrec import tables
from patrec.baselines import BASELINES
from patrec.flags import bounded
from patrec.labels import EMOTIONS, read_entries
from patrec.plots import plot_emotion_scores, plot_histories, run_title
from patrec.recipes import GENRE_NETWORKS
from patrec.scores import combine_emotions, emotion_scores
from patrec.step import Step


def add_flags(parser):
    folds = "1: a fifth of the clips is held out; 2 to 10: cross-validation"
    parser.flag("--folds", folds, type=bounded(int, 1, 10), default=1, metavar="K")


step = Step("step08_regression", __doc__, parts=("emotion",), training=True, add_flags=add_flags)

# %% 8a. From classifier to regressor, by another loss
# The lab: adjust the best model of step 5 and the one of step 7 for regression by changing
# the loss. The best LSTM is chosen by its validation score, so that no test score has a say.
step.heading("8a. From classifier to regressor")
genre_val = common.genre_val_scores(step.training)
lstms = genre_val.loc[[name for name in genre_val.index if GENRE_NETWORKS[name].kind == "lstm"]]
networks = {"lstm": lstms.index[0] if len(lstms) else "mel", "cnn": "cnn_mel"}
if len(lstms):
    step.table(lstms, "The LSTMs of step 5, with their scores for genre")
why = "the LSTM with the highest validation macro-F1" if len(lstms) else "as step 5 has saved none"
chroma = GENRE_NETWORKS[networks["lstm"]].features != "mel"
also = "in the length of a crop and in the input: this LSTM also reads the chroma"
also = also if chroma else "and in the length of a crop"
step.text(f"""
    We use `{networks["lstm"]}` ({run_title(networks["lstm"])}), {why}, and the CNN of step 7. Both
    start from random weights. The layers up to the head stay the same, see steps 5 and 7. The head
    gives one number per clip, on the scale of the labels (0 to 1), instead of one number per class.
    It can lie a little outside this scale; in `submission.csv` it is cut to 0 to 1.

    Cross-entropy treats every wrong class as equally wrong. Here the labels are real numbers, so
    the loss must grow with the distance between prediction and label. We replace cross-entropy by
    the sum of two terms:

    - *The squared error*, divided by the variance of the labels. It makes the predicted values
      fit the labels.
    - *Half of 1 - r*, where r is Pearson's correlation between predictions and labels in the
      batch. The lab's metric, Spearman's correlation, is Pearson's correlation of the ranks. A
      small change of a prediction mostly leaves its rank as it is, so Spearman's correlation has
      no useful gradient and cannot be the loss. Pearson's correlation of the values has a useful
      gradient, and it too is high if the predictions rise with the labels.

    The loss first checks that outputs and labels have the same shape. Without this check, PyTorch
    would subtract labels (B,) from outputs (B, 1) as a B x B table, without an error.

    The optimiser, the learning rate and the parts of the training are those of steps 5 and 7. The
    number of examples is smaller. As in step 5 we keep the best epoch among {step.searched}, here
    by the validation Spearman. The validation clips are few, so this score is noisy, and as the
    highest of several it is optimistic. The clips of 8e play no part in this choice. CNN and LSTM
    differ in architecture, in the number of examples, {also}.
""")
step.show_source(common.make_regressor, common.Regressor.forward, common.regression_loss)

if step.args.overfit_batch:  # as in step 5b, with the regression loss; the step ends here
    pair = {f"{kind}_valence": (GENRE_NETWORKS[n], "valence") for kind, n in networks.items()}
    common.overfit_emotions(step, pair)


# %% 8b-d. One model of each network per emotion
# The lab: train for valence, for energy and for danceability. A fifth of the labelled clips is
# held out, with --folds K each clip once. Steps 8, 9 and 10 hold out the same clips and make
# every choice on the validation clips.
recipe = {
    "make_model": common.make_regressor,
    "make_loss": lambda data: common.RegressionLoss(data.std),
    "optimizer": torch.optim.Adam,
    "n_folds": step.args.folds,
}
trainings = []
for emotion, (kind, name) in itertools.product(EMOTIONS, networks.items()):
    run, network = f"{kind}_{emotion}", GENRE_NETWORKS[name]
    trainings.append(common.Experiment(run, network, target=emotion, **recipe))
runs = common.train_all(step.training, trainings)
n_val = runs["cnn_valence"].facts["n_val"]
fold = " in the first fold" if step.args.folds > 1 else ""
chance = f"about 95% of random predictions have a Spearman within ±{2 / math.sqrt(n_val - 1):.1f}"
for letter, emotion in zip("bcd", EMOTIONS, strict=True):
    step.heading(f"8{letter}. {emotion.capitalize()}")
    pair = {f"{kind}_{emotion}": runs[f"{kind}_{emotion}"] for kind in networks}
    step.table(tables.training_table(pair), tables.SECONDS)
    step.figure(
        plot_histories({name: run.history for name, run in pair.items()}, "Spearman"),
        f"learning_curves_{emotion}",
        f"{emotion.capitalize()}: loss and score by epoch{fold}. On {n_val} validation clips "
        f"{chance}. {step.curves}",
    )
step.text("""
How to read these curves: if the validation score falls and the validation loss rises while the
training loss still falls, this is a sign of overfitting. On so few clips it can also be chance.
Because the clips are few, these scores can also differ much from those of 8e, which are on other
clips.
""")
if step.args.recipe != "lab":
    step.text(f"Only {step.searched} are searched, so an earlier one can have a higher score.")

# %% 8e. Spearman's correlation on the held-out clips
# The lab's metric, averaged over the three axes. It is computed over all held-out clips at
# once: a mean over batches would be another number.
step.heading("8e. Scores on the held-out clips")
predictions = {
    kind: pd.concat([runs[f"{kind}_{emotion}"].predictions for emotion in EMOTIONS], axis=1)
    for kind in networks
}
true = pd.concat([runs[f"cnn_{emotion}"].truth for emotion in EMOTIONS], axis=1)
facts = runs["cnn_valence"].facts
step.text(f"""
    The lab's test clips have no public labels. So {len(true)} labelled clips are held out: the
    network that predicts them was not trained on them, and its epoch was not chosen by them. Of the
    others, {facts["n_train"]} clips are for training and {facts["n_val"]} for the choice of the
    epoch. With `--folds K`, every labelled clip is held out once.
""")
predictions |= common.emotion_baselines(step.source, step.args.folds)
scores = {name: emotion_scores(true, table) for name, table in predictions.items()}
rmse = {name: ((table - true) ** 2).mean() ** 0.5 for name, table in predictions.items()}
step.table(
    tables.emotion_table(scores).assign(**{"RMSE, mean of the three": pd.DataFrame(rmse).mean()}),
    f"Spearman's correlation on {len(true)} held-out clips, with 95% intervals over these clips",
)
step.text(BASELINES)
step.text("""
    Spearman's correlation compares ranks. It is 1 if the predictions put the clips into the right
    order, -1 if the order is reversed, and about 0 if it has nothing to do with the labels. A
    constant has no order and counts as 0 here. The root of the mean squared error (RMSE) compares
    the values. A model can rank the clips well and still predict values too close to the mean. If
    clips of one artist are among the training and the held-out clips, the scores may be higher than
    they would be for new artists.
""")
if step.args.folds > 1:
    step.text("""
        The predictions of all folds are ranked together. This tends to lower the score, because
        each fold's network has its own mean.
    """)
step.text(f"Below, the means over the three axes are compared. {tables.INTERVALS}")
pairs = (("cnn", "lstm"), ("cnn", "svr"), ("lstm", "svr"))
step.text(tables.difference_lines(true, predictions, pairs))
caption = "Spearman's correlation on the held-out clips, with 95% intervals"
step.figure(plot_emotion_scores(scores), "scores", caption)

# %% Predictions for the clips without labels, in the competition's format
# By the network with the higher validation score; of several folds, the average.
facts = {
    name: run.facts | {"test": emotion_scores(run.truth, run.predictions)}
    for name, run in runs.items()
}
for kind, name in networks.items():
    parts = {emotion: facts[f"{kind}_{emotion}"] for emotion in EMOTIONS}
    facts[kind] = combine_emotions(parts, scores[kind]) | {"network": name}
facts |= {name: {"val": {}, "test": scores[name]} for name in scores if name not in networks}
val = {kind: facts[kind]["val"]["mean_spearman"] for kind in networks}
best = max(val, key=val.get)
both = ", ".join(f"{kind} {value:.3f}" for kind, value in val.items())
held_out = ", ".join(f"{kind} {scores[kind]['mean_spearman']:.3f}" for kind in networks)
step.heading("Predictions for the clips without labels")
unlabelled = read_entries(step.source.root, "emotion", "test")
step.text(f"""
    `submission.csv` has the predictions of `{best}` for {len(unlabelled)} clips. `{best}` has the
    higher mean of the three validation scores ({both}). On the held-out clips of 8e the means are
    {held_out}. We do not choose by them. If we did, the score of the chosen network would be too
    high.
""")
if unlabelled:
    chosen = [runs[f"{best}_{emotion}"] for emotion in EMOTIONS]
    columns = [common.predict_unlabelled(step.source, run) for run in chosen]
    tables.write_submission(step.folder / "submission.csv", pd.concat(columns, axis=1))
rows = tables.held_out_rows(true, predictions, step.args.seed, runs["cnn_valence"].folds)
tables.write_predictions(step.folder, rows)
step.finish(facts, folds=step.args.folds, networks=networks)
