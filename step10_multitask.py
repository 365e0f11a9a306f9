"""Step 10: multitask learning, one model for valence, energy and danceability.

The lab asks: a) what Kaiser et al. (2017) found; b) a loss that takes the outputs and the
targets of the three emotions and returns the sum of their losses, weighted into one order
of magnitude; c) a model trained with it; d) a comparison with step 8.

    python step10_multitask.py                     # CNN (two starts), LSTM, average
    python step10_multitask.py --learned-weights   # besides, with weights that are learned
    python step10_multitask.py --folds 5           # cross-validation, as in step 8

Input: the genre and emotion data sets, the CNN checkpoint of step 7 where there is
one, the scores of steps 8 and 9 if they were run. Output, in outputs/step10_multitask/: a
checkpoint and a history per run, curves and scores (summary.md, metrics.json),
predictions.csv for the held-out clips and submission.csv for the unlabelled ones.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--folds 5 --learned-weights").
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from common import (
    Experiment,
    RegressionLoss,
    Regressor,
    emotion_baselines,
    genre_models,
    load_backbone,
    load_data,
    make_backbone,
    overfit_emotions,
    predict_unlabelled,
    regression_loss,
    train_all,
)
from patrec.baselines import BASELINES
from patrec.clips import find_emotion_leak
from patrec.files import load_torch
from patrec.labels import EMOTIONS, read_entries
from patrec.machine import seed_everything
from patrec.plots import plot_emotion_scores, plot_histories
from patrec.recipes import GENRE_NETWORKS, window_size
from patrec.scores import average_predictions, emotion_scores, paired_difference
from patrec.step import Step
from patrec.tables import (
    difference_line,
    earlier_predictions,
    emotion_table,
    epochs_kept,
    held_out_rows,
    write_predictions,
    write_submission,
)


def add_flags(parser):
    folds = "1: a fifth of the clips is held out; 2 to 10: cross-validation (default: 1)"
    parser.add_argument(
        "--folds", type=int, choices=range(1, 11), default=1, metavar="K", help=folds
    )
    learned = "train a CNN besides that learns the weights of the three losses"
    parser.add_argument("--learned-weights", action="store_true", help=learned)


step = Step("step10_multitask", __doc__, training=True, add_flags=add_flags)
cnn, lstm = GENRE_NETWORKS["cnn_mel"], GENRE_NETWORKS["fused"]


def untrained(network, data):
    """Regressor with random weights: one backbone, one head per emotion."""
    return Regressor(make_backbone(network), data.names, data.mean, data.std)


# %% 10a. Kaiser et al. (2017), One Model To Learn Them All
# The lab: the basic conclusions of the paper, in short. They are the paper's.
step.heading("10a. Kaiser et al. (2017), One Model To Learn Them All")
step.text("""
They trained one network at the same time on eight tasks from several domains (image recognition,
captioning, speech, parsing, translation), with building blocks from several domains: convolutions,
attention, a mixture of experts. In short:

1. One architecture learns all of them reasonably well, below the best specialised systems.
2. Tasks with little data gain much from being learned together with other, larger tasks (shown on
   parsing; even ImageNet, an unrelated task, helped it); tasks with much data lose little if
   anything.
3. A block that a task does not seem to need does not harm it and mostly helps.

(2) is about *other tasks' data*: a small task borrows from large ones. Here the three tasks have
the very same clips, so no task brings music that the others lack. What learning together can
bring here is a backbone that has to serve three labels of each clip instead of one.
""")

# %% 10b. A loss for three emotions
# The lab: a function of the outputs and the targets of the three emotions that returns the
# sum of the three losses, with weights that bring them into one order of magnitude. Each
# squared error is divided by the variance of that emotion's training labels. The loss is
# called here on a batch of training clips and an untrained network, term by term.
step.heading("10b. A loss for three emotions")
step.show_source(RegressionLoss, regression_loss)
data = load_data(
    step.source,
    cnn.features,
    target="emotion",
    crop=window_size(cnn),
    n_folds=step.args.folds,
)
seed_everything(step.args.seed)
model, loss_fn = untrained(cnn, data).to(step.device), RegressionLoss(data.std)
x, targets, lengths = next(iter(DataLoader(data.train, step.args.batch_size, shuffle=True)))
with torch.no_grad():
    outputs = model.train()(x.to(step.device), lengths).float().cpu()  # (B, 3)
    squared, terms = (outputs - targets).square().mean(0).numpy(), loss_fn.terms(outputs, targets)
    total = loss_fn(outputs, targets).item()
weights = 1 / np.square(loss_fn.std)
losses = pd.DataFrame(
    {
        "sd": loss_fn.std,
        "raw": squared,
        "weight": weights,
        "weighted": squared * weights,
        "order": terms.numpy() - squared * weights,
        "term": terms.numpy(),
    },
    index=list(EMOTIONS),
).astype(float)
titles = [
    "label sd",
    "squared error",
    "weight: 1 / label variance",
    "weighted squared error",
    "half of 1 - Pearson's r",
    "term of the loss",
]
step.table(
    losses.set_axis(titles, axis=1).rename_axis("emotion"),
    f"The loss before training, on a batch of {len(x)} training clips; sum of the terms, as the "
    f"loss function returns it: {total:.3f}",
)
step.text(f"""
    Largest over smallest squared error: {squared.max() / squared.min():.2f} raw,
    {losses["weighted"].max() / losses["weighted"].min():.2f} weighted. Unweighted, emotions whose
    labels are spread wider would count for more. With the weight, a network that
    knows no more than the mean label has a squared error of about 1 for each; on a single
    batch it varies by which clips are in it.
""")
if step.args.overfit_batch:  # as in step 5b, with the loss of three emotions; ends here
    pair = {"multitask_scratch": (cnn, "emotion"), "multitask_lstm": (lstm, "emotion")}
    overfit_emotions(step, pair)

# %% 10c. One backbone, three heads
# The lab: train a model with this loss. Held-out clips are cut as in step 8; the genre network
# must not have been trained on them, which is looked into before anything is trained.
step.heading("10c. One backbone, three heads")
step.text("""
- `multitask_scratch`: the CNN of step 7 from random weights, which is what step 8's CNNs of one
  emotion can be compared with.
- `multitask`: the same from the genre network's weights, its input standardised as in genre
  training. Unlike step 9 no short fine-tuning: all weights learn from the first batch, at the full
  rate for the whole budget, so that only start and standardisation differ.
- `multitask_lstm`: the LSTM on mel and chroma, another kind of network to average with.

All with AdamW, one-cycle rate, averaged weights and augmentation as in step 8; of the last fifth of
the epochs the one with the highest mean Spearman on the validation clips is kept.
""")
for fold in range(step.args.folds):
    held_out = load_data(step.source, target="emotion", fold=fold, n_folds=step.args.folds).held_out
    if leak := find_emotion_leak(step.source, held_out):
        step.text(f"**Warning:** {leak}.")
genre = genre_models(step.training, ["cnn_mel"])["cnn_mel"]
genre_path, genre_stats = genre.path, genre.settings["stats"]
step.text(f"""
    The genre network is `cnn_mel`, {genre.facts["epochs"]} of {genre.facts["planned_epochs"]}
    planned epochs.
""")


def from_genre(network, data):
    """Regressor on the genre network's backbone, with new heads; nothing is frozen."""
    return Regressor(load_backbone(genre_path), data.names, data.mean, data.std)


recipe = {"optimizer": torch.optim.AdamW, "target": "emotion", "n_folds": step.args.folds}
summed = {"make_loss": lambda data: RegressionLoss(data.std)} | recipe
weighted = {"make_loss": lambda data: RegressionLoss(data.std, learned=True)} | recipe
trainings = [
    Experiment("multitask", cnn, from_genre, stats=genre_stats, **summed),
    Experiment("multitask_scratch", cnn, untrained, **summed),
    Experiment("multitask_lstm", lstm, untrained, **summed),
]
if step.args.learned_weights:
    trainings.append(
        Experiment("multitask_learned", cnn, from_genre, stats=genre_stats, **weighted)
    )
runs = train_all(step.training, trainings)
plans = {run.name: run for run in trainings}
table = {
    name: {
        "network": f"{plans[name].network.kind}, {plans[name].network.features}",
        "starts from": f"{'random' if plans[name].make_model is untrained else 'genre'} weights",
        "training clips": run.facts["n_train"],
        "weights": run.facts["weights"],
        "examples": run.facts["epochs"] * run.facts["examples_per_epoch"],
        "epochs (kept)": epochs_kept(run),
        "seconds": round(run.facts["train_seconds"]),
        "val mean Spearman": run.facts["val"]["mean_spearman"],
    }
    for name, run in runs.items()
}
step.table(
    pd.DataFrame(table).T.rename_axis("run"),
    "Wall-clock seconds, with other trainings running in parallel. CNN and LSTM differ in the "
    "number of training examples and in augmentation too",
)
step.figure(
    plot_histories({name: run.history for name, run in runs.items()}, "mean Spearman"),
    "learning_curves",
    "Loss and mean validation Spearman against the epoch; the dot marks the epoch that was kept, "
    "among the shaded last fifth (of several folds: the first one's curves). Training loss is of "
    "augmented crops with dropout, validation loss of whole clips with averaged weights",
)
if step.args.learned_weights:
    state = load_torch(runs["multitask_learned"].path.with_name("last.pt"))["loss_fn"]
    losses["learned_factor"] = np.exp(-state["log_var"].numpy()) / 2
    factors = ", ".join(
        f"{emotion} {losses['learned_factor'][emotion]:.3f}" for emotion in EMOTIONS
    )
    step.text(f"""
        `multitask_learned` minimises L exp(-s) / 2 + s / 2 for each loss L, over s too. The
        factor exp(-s) / 2 began at .5 and ended (with several folds: in the first) at
        {factors}. Weight decay apart, exp(s) = L at the minimum: an emotion that is predicted
        worse gets a smaller factor (after Kendall et al., 2018, who derive it for squared
        errors). The rate and the number of steps limit how far s can move.
    """)

# %% 10d. Against step 8: together and alone
# The lab: compare with step 8. The fair comparison first: `multitask_scratch` and step 8's
# CNN, the same network, clips, epochs, rate and seed, both from random weights (else there is
# no comparison here). What differs is the shared backbone and what follows from it.
step.heading("10d. Together and alone")
predictions = {name: run.predictions for name, run in runs.items()}
true, folds = runs["multitask"].truth, runs["multitask"].folds
single, single_runs, note = earlier_predictions(
    step.training, "step08_regression", true.index, folds
)
step.text(note)
rows = {"multitask_scratch": predictions["multitask_scratch"]}
keys = ("planned_epochs", "epochs", "lr", "batch_size", "n_train")
alike = [
    single_runs.get(f"cnn_{emotion}", {}).get(key) == runs["multitask_scratch"].facts[key]
    for emotion in EMOTIONS
    for key in keys
]
if "cnn" in single and not all(alike):
    step.text("Step 8's CNN was trained with another recipe, so it is no twin: see below.")
elif "cnn" in single:
    rows["cnn (step 8)"] = single["cnn"]
    alone, shared = single_runs["cnn"], runs["multitask_scratch"].facts
    pairs = {"mean of three": list(EMOTIONS)} | {name: [name] for name in EMOTIONS}
    step.table(
        emotion_table({name: emotion_scores(true, table) for name, table in rows.items()}),
        f"Spearman's correlation on {len(true)} held-out clips",
    )
    lines = []
    for title, names in pairs.items():
        difference = paired_difference(true, *(table[names] for table in rows.values()))
        lines.append(f"- {title}: {difference_line(*rows, difference)}")
    step.text("\n".join(lines))
    step.text(f"""
        The intervals reflect the choice of held-out clips only, for one training seed. The shared
        network has {shared["weights"]:,} weights, the three networks of step 8 have
        {alone["weights"]:,} together. The three tasks also share one checkpoint, one gradient
        clipping and one set of examples. In step 8 each network was trained on that many examples
        by itself.
    """)

# %% 10d. All models on the same clips
# Then what else changes: the genre weights, the other network, the average, with step 8's
# and step 9's models and the baselines of step 8 beside them.
step.heading("10d. All models on the held-out clips")
averaged = ("multitask", "multitask_lstm")
predictions["multitask_average"] = average_predictions(predictions[name] for name in averaged)
fitted_on = single_runs.get("cnn_valence", {}).get("n_train")
if fitted_on == runs["multitask"].facts["n_train"]:  # step 8 has fitted them on these very clips
    baselines = {name: single[name] for name in ("constant", "ridge", "svr")}
else:
    baselines = emotion_baselines(step.source, step.args.folds)
predictions |= baselines
transfer, _, note = earlier_predictions(step.training, "step09_transfer", true.index, folds)
step.text(note)
shown = dict(predictions)
shown |= {f"{name} (step 8)": single[name] for name in ("lstm", "cnn") if name in single}
shown |= {f"{name} (step 9)": transfer[name] for name in ("transfer",) if name in transfer}
scores = {name: emotion_scores(true, table) for name, table in shown.items()}
step.table(
    emotion_table(scores),
    f"Spearman's correlation on {len(true)} held-out clips; 95% intervals over these clips, for "
    "one training seed",
)
step.text(BASELINES)
step.text("""
    `multitask_average` is the mean of the predictions of `multitask` and `multitask_lstm`. That
    these two are averaged, and the CNN's budget, were settled in cross-validation on all labelled
    clips of the small set of real music that the README measures on (docs/experiments.md), the
    LSTM's budget by judgement. On that set the networks' scores are therefore optimistic; on other
    data these choices were made beforehand. `lstm (step 8)` may have another input than
    `multitask_lstm`: their difference is not that of learning together alone.
""")
pairs = [("multitask", name) for name in ("multitask_scratch", "multitask_lstm", "svr")]
pairs += [("multitask_average", name) for name in (*averaged, "svr")]
differences = {pair: paired_difference(true, *(shown[name] for name in pair)) for pair in pairs}
step.text("\n".join(f"- {difference_line(*pair, found)}" for pair, found in differences.items()))
caption = "Spearman's correlation on the held-out clips; lines: 95% intervals over these clips"
step.figure(plot_emotion_scores(scores), "scores", caption)

# %% Predictions for the unlabelled clips, in the competition's format
# By the average, over all folds of both its members.
step.heading("Predictions for the unlabelled clips")
unlabelled = read_entries(step.source.root, "emotion", "test")
step.text(f"""
    `submission.csv`: {len(unlabelled)} clips, answered by `multitask_average`, which was settled
    beforehand (see above): no choice is made by the scores of this run.
""")
if unlabelled:
    members = (predict_unlabelled(step.source, runs[name]) for name in averaged)
    write_submission(step.folder / "submission.csv", average_predictions(members))
write_predictions(step.folder, held_out_rows(true, predictions, step.args.seed, folds))
facts = {name: run.facts | {"test": scores[name]} for name, run in runs.items()}
facts["multitask_average"] = {"members": averaged, "val": {}, "test": scores["multitask_average"]}
facts |= {name: {"val": {}, "test": scores[name]} for name in baselines}
step.finish(facts, folds=step.args.folds, genre_model="cnn_mel", losses=losses.to_dict())
