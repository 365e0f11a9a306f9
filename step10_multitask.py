"""Step 10: multitask learning, one model for valence, energy and danceability.

The lab asks: a) the conclusions of Kaiser et al. (2017); b) a loss function that takes the
outputs and the targets of the three emotions and returns the sum of their losses, weighted
into one order of magnitude; c) a model trained with it; d) a comparison with step 8.

    python step10_multitask.py                  # the CNN, two more networks and an average
    python step10_multitask.py --folds 5        # cross-validation, as in step 8
    python step10_multitask.py --overfit-batch  # only check that the networks can learn

Input: the genre and emotion data sets; the CNN of step 7; the scores of steps 8 and 9, if they
were run. Output, in outputs/step10_multitask/: a checkpoint and a history per run, learning
curves, scores (summary.md, metrics.json), predictions.csv for the held-out clips and
submission.csv for the clips without labels.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--folds 5 --epochs 20").
import pandas as pd
import torch
from torch.utils.data import DataLoader

import common
from patrec import tables
from patrec.baselines import BASELINES
from patrec.clips import find_emotion_leak
from patrec.flags import bounded
from patrec.labels import EMOTIONS, read_entries
from patrec.machine import seed_everything
from patrec.plots import plot_emotion_scores, plot_histories
from patrec.recipes import GENRE_NETWORKS, window_size
from patrec.scores import average_predictions, emotion_scores, paired_difference
from patrec.step import Step


def add_flags(parser):
    folds = "1: a fifth of the clips is held out; 2 to 10: cross-validation"
    parser.flag("--folds", folds, type=bounded(int, 1, 10), default=1, metavar="K")


step = Step("step10_multitask", __doc__, training=True, add_flags=add_flags)
cnn, lstm = GENRE_NETWORKS["cnn_mel"], GENRE_NETWORKS["fused"]

# %% 10a. Kaiser et al. (2017), One Model To Learn Them All
# The lab: describe the basic conclusions of the paper in short.
step.heading("10a. Kaiser et al. (2017), One Model To Learn Them All")
step.text("""
The authors trained one network on eight tasks at the same time, among them image recognition,
captioning, speech recognition, parsing and translation. The network combines building blocks of
several fields: convolutions, attention and a mixture of experts. The authors conclude:

1. One architecture can learn all eight tasks reasonably well. The best specialised systems are
   still better.
2. A task with little data gains much from joint training. They show it for parsing, which improved
   even together with ImageNet, an unrelated task. A task with much data loses little or nothing.
3. A building block that seems unnecessary for a task does not harm it. In most cases it helps.

The second conclusion is about data that other tasks bring. In this step the three tasks have the
same clips, so joint training adds labels, but no music. It can help if the backbone learns features
that are useful for all three labels.
""")


# %% 10b. A loss for three emotions
# The lab: a loss function that takes the outputs and the targets of the three emotions and
# returns the sum of the three losses, weighted into one order of magnitude. Each squared error
# is divided by the variance of the emotion's labels. The loss is shown here on one batch.
step.heading("10b. A loss for three emotions")
step.show_source(common.RegressionLoss, common.regression_loss)
cut = {"crop": window_size(cnn), "n_folds": step.args.folds}
data = common.load_data(step.source, cnn.features, target="emotion", **cut)
seed_everything(step.args.seed)
model, loss_fn = common.make_regressor(cnn, data).to(step.device), common.RegressionLoss(data.std)
x, targets, lengths = next(iter(DataLoader(data.train, step.args.batch_size, shuffle=True)))
with torch.no_grad():
    outputs = model.train()(x.to(step.device), lengths).float().cpu()  # (B, 3)
    squared = (outputs - targets).square().mean(0).numpy()
    terms, total = loss_fn.terms(outputs, targets).numpy(), loss_fn(outputs, targets).item()
losses = pd.DataFrame({"sd": loss_fn.std, "raw": squared}, list(EMOTIONS), dtype=float)
losses["weight"] = 1 / losses["sd"] ** 2
losses["weighted"] = losses["raw"] * losses["weight"]
losses["order"] = terms - losses["weighted"]  # half of 1 - Pearson's r
losses["term"] = terms
ratio = losses.max() / losses.min()
titles = ("standard deviation of the labels", "squared error", "weight: 1 / variance of the labels")
titles += ("weighted squared error", "half of 1 - Pearson's r", "loss: sum of the two")
step.table(
    losses.set_axis(titles, axis=1).rename_axis("emotion"),
    f"The loss of an untrained network on {len(x)} training clips. The loss function returns the "
    f"sum of the three: {total:.3f}",
)
step.text(f"""
    The lab's *arousal* is the label *energy*. Without weights, an emotion whose labels vary more
    would count more. The largest squared error divided by the smallest is {ratio["raw"]:.2f}
    without weights and {ratio["weighted"]:.2f} with them. The mean of the three squared errors is
    {losses["raw"].mean():.3f} without weights and {losses["weighted"].mean():.3f} with them. The
    correlation term lies between 0 and 1. So with the weights all terms have the same order of
    magnitude. A network that always predicts the mean label has a weighted squared error of 1 over
    all training clips.
""")
if step.args.overfit_batch:  # as in step 5b, with the loss of three emotions; the step ends here
    pair = {"multitask": (cnn, "emotion"), "multitask_lstm": (lstm, "emotion")}
    common.overfit_emotions(step, pair)

# %% 10c. One backbone, three heads
# The lab: train a model with this loss. The held-out clips are those of step 8. A genre network
# that was trained on some of them would know them, so we check this before training.
step.heading("10c. One backbone, three heads")
for fold in range(step.args.folds):
    part = common.load_data(step.source, target="emotion", fold=fold, n_folds=step.args.folds)
    if leak := find_emotion_leak(step.source, part.held_out):
        step.text(f"**Warning:** {leak}.")
genre = common.genre_models(step.training, ["cnn_mel"])["cnn_mel"]
genre_path, genre_stats = genre.path, genre.settings["stats"]


def from_genre(network, data):
    """The trained backbone of the genre network, with new heads; nothing is frozen."""
    return common.Regressor(common.load_backbone(genre_path), data.names, data.mean, data.std)


recipe = {
    "make_loss": lambda data: common.RegressionLoss(data.std),
    "optimizer": torch.optim.Adam,
    "target": "emotion",
    "n_folds": step.args.folds,
}
trainings = [
    common.Experiment("multitask", cnn, common.make_regressor, **recipe),
    common.Experiment("multitask_from_genre", cnn, from_genre, stats=genre_stats, **recipe),
    common.Experiment("multitask_lstm", lstm, common.make_regressor, **recipe),
]
runs = common.train_all(step.training, trainings)
facts = {name: run.facts for name, run in runs.items()}
step.text(f"""
    - `multitask` is the CNN of step 7 with random weights and three heads. It can be compared with
      step 8, where each emotion has such a CNN of its own.
    - `multitask_from_genre` starts from the weights of the genre network `cnn_mel`
      ({genre.facts["epochs"]} of {genre.facts["planned_epochs"]} planned epochs). Its input is
      standardised as in genre training. Otherwise it is trained like `multitask`.
    - `multitask_lstm` is the LSTM on mel and chroma, with random weights and three heads. The
      chroma is input that the CNN does not have.

    All three are trained as in step 8. We keep the epoch with the highest mean Spearman on the
    {facts["multitask"]["n_val"]} validation clips, among {step.searched}.
""")
fold = " in the first fold" if step.args.folds > 1 else ""
step.table(tables.training_table(runs, "mean Spearman"), tables.SECONDS)
step.figure(
    plot_histories({name: run.history for name, run in runs.items()}, "mean Spearman"),
    "learning_curves",
    f"Loss and validation score by epoch{fold}. {step.curves}",
)

# %% 10d. All models on the same clips
# Besides the lab's model: genre weights, an average, the models of steps 8 and 9, the baselines.
step.heading("10d. Comparison with step 8")
averaged = ("multitask_from_genre", "multitask_lstm")
predictions = {name: run.predictions for name, run in runs.items()}
predictions["multitask_average"] = average_predictions(predictions[name] for name in averaged)
true, folds = runs["multitask"].truth, runs["multitask"].folds
step8, step9 = (
    tables.earlier_predictions(step.training, owner, true.index, folds)
    for owner in ("step08_regression", "step09_transfer")
)
single = step8.predictions  # of the models of step 8, one for each emotion
alone = [step8.runs.get(f"cnn_{emotion}", {}) for emotion in EMOTIONS]
if alone[0].get("n_train") == facts["multitask"]["n_train"]:
    baselines = {name: single[name] for name in ("constant", "ridge", "svr")}  # same clips
else:
    baselines = common.emotion_baselines(step.source, step.args.folds)
predictions |= baselines
earlier = {f"{name} (step 8)": single.get(name) for name in ("lstm", "cnn")}
earlier["transfer (step 9)"] = step9.predictions.get("transfer")
shown = predictions | {name: table for name, table in earlier.items() if table is not None}
scores = {name: emotion_scores(true, table) for name, table in shown.items()}
step.text(f"{step8.note} {step9.note}")
step.table(
    tables.emotion_table(scores),
    f"Spearman's correlation on {len(true)} held-out clips, with 95% intervals over these clips",
)

# %% 10d. The three emotions together and alone
# The lab: compare with step 8. `multitask` and step 8's CNN are compared only if clips, epochs,
# learning rate, batch size and seed agree. Both start from random weights.
keys = ("planned_epochs", "epochs", "lr", "batch_size", "n_train")
alike = all(facts["multitask"][key] == run.get(key) for run in alone for key in keys)
if "cnn" in single and not alike:
    step.text("The CNN of step 8 was trained with another recipe. It is in the table only.")
elif "cnn" in single:
    pair, lines = ("multitask", "cnn (step 8)"), []
    axes = {"mean of the three": list(EMOTIONS)} | {name: [name] for name in EMOTIONS}
    for title, names in axes.items():
        difference = paired_difference(true, *(shown[name][names] for name in pair))
        lines.append(f"- {title}: {tables.difference_line(*pair, difference)}")
    step.text("\n".join(lines))
    seconds = sum(run["train_seconds"] for run in alone)
    step.text(f"""
        {tables.INTERVALS} The multitask network has {facts["multitask"]["weights"]:,} weights and
        was trained in {facts["multitask"]["train_seconds"]:.0f} s. The three networks of step 8
        together have {step8.runs["cnn"]["weights"]:,} weights, and their trainings took
        {seconds:.0f} s in total. Each of them saw as many examples as the one network here. The
        multitask network keeps one epoch for all three emotions. In step 8 each emotion has its
        own.
    """)
step.text(BASELINES)
step.text("""
    `multitask_average` is the mean of the predictions of `multitask_from_genre` and
    `multitask_lstm`. We chose these two before this run, by cross-validation on the 278 labelled
    clips of docs/results.md. If this run uses other clips, the score of `multitask_average` is
    fair. If it uses those clips, its held-out clips took part in the choice, and the score is too
    high.
""")
pairs = [("multitask", "svr"), ("multitask_from_genre", "multitask")]
if alike and step8.runs["lstm"]["network"] == "fused":  # the same input
    pairs.append(("multitask_lstm", "lstm (step 8)"))
pairs += [("multitask_average", name) for name in (*averaged, "svr")]
step.text(tables.difference_lines(true, shown, pairs))
caption = (
    "Spearman's correlation on the held-out clips, with 95% intervals. `none`: a model that was "
    "not trained for this emotion"
)
step.figure(plot_emotion_scores(scores), "scores", caption)

# %% Predictions for the clips without labels, in the competition's format
# By the average, over all folds of both networks.
step.heading("Predictions for the clips without labels")
unlabelled = read_entries(step.source.root, "emotion", "test")
step.text(f"""
`submission.csv` has the predictions of `multitask_average` for {len(unlabelled)} clips. It was
chosen before this run (10d).
""")
if unlabelled:
    members = (common.predict_unlabelled(step.source, runs[name]) for name in averaged)
    tables.write_submission(step.folder / "submission.csv", average_predictions(members))
rows = tables.held_out_rows(true, predictions, step.args.seed, folds)
tables.write_predictions(step.folder, rows)
facts = {name: fact | {"test": scores[name]} for name, fact in facts.items()}
facts["multitask_average"] = {"members": averaged, "val": {}, "test": scores["multitask_average"]}
facts |= {name: {"val": {}, "test": scores[name]} for name in baselines}
step.finish(facts, folds=step.args.folds, genre_model="cnn_mel", losses=losses.to_dict())
