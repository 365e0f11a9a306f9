"""Step 9: transfer learning, from genres to emotions.

The lab asks: a) the conclusions of Yosinski et al. (2014); b) a model of steps 5 and 7, and the
reason for it; c) its training on the genre data and the weights of its best epoch: by which
metric, on which set, why; d) an emotion model that starts from these weights and is trained
for few epochs on one axis; e) a comparison with step 8.

    python step09_transfer.py                    # valence, from the genre model
    python step09_transfer.py --axis all         # each of the three axes, one after another
    python step09_transfer.py --freeze 2         # the first two blocks keep the genre weights
    python step09_transfer.py --compare-depths   # one fine-tuning per number of frozen blocks

Input: both data sets; the networks of steps 5 and 7 and the scores of step 8, if they were run.
Output, in outputs/step09_transfer/: a checkpoint and a history per run, learning curves, scores
(summary.md, metrics.json) and predictions.csv for the held-out clips. --epochs is the number of
epochs of a training from scratch; a fine-tuning gets a share of it.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--axis all --freeze 2").
import functools
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from common import (
    Experiment,
    RegressionLoss,
    Regressor,
    clip_ids,
    genre_models,
    genre_val_scores,
    load_backbone,
    load_data,
    make_backbone,
    overfit_emotions,
    train_all,
    true_labels,
)
from patrec import tables
from patrec.baselines import BASELINES
from patrec.clips import find_emotion_leak
from patrec.errors import InputError
from patrec.flags import bounded
from patrec.labels import EMOTIONS
from patrec.plots import COLORS, plot_histories
from patrec.recipes import GENRE_NETWORKS, make_recipe, window_size
from patrec.scores import combine_emotions, emotion_scores, paired_difference
from patrec.step import Step


def add_flags(parser):
    parser.flag("--axis", "emotion to learn", choices=[*EMOTIONS, "all"], default="valence")
    frozen = "blocks that keep the weights of genre training"
    parser.flag("--freeze", frozen, type=bounded(int, 0, 4), default=0, metavar="N")
    depths = "fine-tune once per number of frozen blocks"
    parser.flag("--compare-depths", depths, action="store_true")


step = Step("step09_transfer", __doc__, training=True, add_flags=add_flags)
emotions = EMOTIONS if step.args.axis == "all" else (step.args.axis,)

# %% 9a. Yosinski et al. (2014), How transferable are features in deep neural networks?
# The lab: describe the basic conclusions of the paper in short.
step.heading("9a. Yosinski et al. (2014), How transferable are features in deep neural networks?")
step.text("""
The authors trained networks on one half of the classes of ImageNet. They copied the first n layers
into a network for the other half, and then froze or fine-tuned them. They conclude:

1. The first layers learn general features, the last layers learn features of their task.
2. Copied and frozen layers lower the score for two reasons. Their features can be too specific to
   the old task. Or layers that had adapted to each other are separated, mostly in the middle of the
   network.
3. The more the two tasks differ, the less the copied features help. But features of a distant task
   are still better than random ones.
4. Copied and then fine-tuned layers generalise better than training from scratch, even if the new
   task has much data.

This step measures the fourth conclusion: fine-tuning against training from scratch. With
`--compare-depths` it also measures the score against the number of frozen blocks. This cannot tell
the two reasons of the second conclusion apart. The paper does so with networks copied to their
*own* task.
""")

# %% 9b. The model that is transferred
# The lab: choose a model of steps 5 and 7 and explain why. 9c trains it on
# fma_genre_spectrograms, so the networks on beats are not candidates.
step.heading("9b. The model that is transferred")
val = genre_val_scores(step.training)
val = val.loc[[name for name in val.index if not GENRE_NETWORKS[name].beat]]
genre_name = val.index[0] if len(val) else "cnn_mel"
network = GENRE_NETWORKS[genre_name]
n_blocks = len(make_backbone(network).blocks)
if len(val):
    step.table(val, "The networks on full spectrograms that steps 5 and 7 have saved")
step.text(f"""
    We transfer `{genre_name}`: the network on full spectrograms with the highest validation
    macro-F1 (`cnn_mel`, if steps 5 and 7 have saved none). We expect that features that recognise
    the genre of new clips also help with emotions. The score of so few validation clips is noisy,
    so a difference of a few hundredths can be due to chance. Test clips play no part in the choice.
""")
if step.args.freeze > n_blocks:
    fault = f"the chosen model, {genre_name}, has {n_blocks} blocks; freeze at most that many"
    raise InputError(f"--freeze {step.args.freeze}: {fault}")

# The held-out clips are those of step 8. A genre network that was trained on some of them would
# know them, so we check this before training.
data = load_data(step.source, network.features, target="emotion", crop=window_size(network))
true = true_labels(data.held_out, data.settings)
if step.args.overfit_batch:  # as in step 5b, with the regression loss; the step ends here
    overfit_emotions(step, {f"scratch_{emotions[0]}": (network, emotions[0])})
if leak := find_emotion_leak(step.source, data.held_out):
    step.text(f"**Warning:** {leak}.")

# %% 9c. Genre training, and the epoch whose weights are kept
# The lab: train the model on fma_genre_spectrograms and save the weights of its best epoch;
# explain the metric and the set. The network of steps 5 and 7 is used if it is there. If not,
# it is trained here in the same way.
step.heading("9c. Genre training, and the epoch that is kept")
genre = genre_models(step.training, [genre_name])[genre_name]
step.text(f"""
We transfer the weights of epoch {genre.facts["best_epoch"]}. The training had
{genre.facts["epochs"]} of {genre.facts["planned_epochs"]} planned epochs. In this epoch the
macro-F1 on the {genre.facts["n_val"]} validation clips was {genre.facts["val"]["macro_f1"]:.3f}.

- *The metric is macro-F1.* Some genres are rarer than others. Macro-F1 counts every genre equally,
  while a network that ignores the rare genres can have a high accuracy. The loss also depends on
  how confident the network is, which the lab's scores do not measure.
- *The set is the validation set.* On training clips, later epochs look better even if the network
  overfits. On test clips, the choice of the epoch would make the test score optimistic.
- *The epoch is one of the last 20%* (of a training that was cut short: any epoch). Earlier peaks
  can be due to chance, because the learning rate is still high. The kept score is the highest of
  several noisy ones, so it is optimistic.
""")
if "val_score" in genre.history:
    caption = "Loss and validation macro-F1 of the genre network. The dot marks the epoch that is "
    caption += "transferred, the shaded area the epochs among which it is chosen."
    step.figure(plot_histories({genre_name: genre.history}, "macro-F1"), "genre_training", caption)

# %% 9d. A short fine-tuning
# The lab: start from these weights and train for few epochs on one axis. The input is
# standardised as in genre training, because the copied filters expect it so.
HEAD = {"share": 0.05, "lr_factor": 1.0}  # of the budget and the rate of a training from scratch
TUNE = {"share": 0.25, "lr_factor": 0.3}
step.heading("9d. A short fine-tuning")
step.show_source(load_backbone)
step.text(f"""
The fine-tuning has two phases:

1. The backbone is frozen and only the new head is trained, for {HEAD["share"]:.0%} of the epochs of
   a training from scratch. A new head is random at first. Its gradients would distort the copied
   features (Kumar et al., 2022, Fine-Tuning can Distort Pretrained Features and Underperform
   Out-of-Distribution).
2. Head and backbone are trained, except for the blocks that `--freeze` names. This phase has
   {TUNE["share"]:.0%} of the epochs, at {TUNE["lr_factor"]:g} times the learning rate.

Both phases use AdamW and a one-cycle learning rate. The length and the rate of the second phase
were chosen by cross-validation (docs/experiments.md). Those of the first phase and of `scratch`
below were not, which can favour the fine-tuning.
""")


def copied(network, data, frozen, head=None):
    """The genre network's backbone with the head of the first phase, or else a new one."""
    backbone = load_backbone(genre_path, frozen=frozen)
    regressor = Regressor(backbone, data.names, data.mean, data.std)
    if head is not None:
        regressor.heads.load_state_dict(head.state_dict())
    return regressor


def untrained(network, data):
    """A regressor with random weights, as in step 8."""
    return Regressor(make_backbone(network), data.names, data.mean, data.std)


def is_twin(kind):
    """Whether step 8's model is this network, trained from scratch on the whole budget."""
    recipe = make_recipe(network, data, step.training)
    wanted = [recipe.epochs, recipe.epochs, recipe.lr, recipe.batch_size, len(data.train)]
    keys = ("planned_epochs", "epochs", "lr", "batch_size", "n_train")
    parts = [step8.runs.get(f"{kind}_{emotion}", {}) for emotion in emotions]
    same_recipe = all([part.get(key) for key in keys] == wanted for part in parts)
    return same_recipe and step8.runs[kind].get("network") == genre_name


# Two trainings from scratch to compare with. `scratch` has the epochs of both phases together.
# `scratch_full` has all of them: it is the model of step 8 (same network, clips, seed and
# recipe), whose predictions are used if step 8 was run so. If not, it is trained here.
step8 = tables.earlier_predictions(step.training, "step08_regression", clip_ids(data.held_out))
step.text(step8.note)
twin = next(filter(is_twin, step8.predictions), None)
depths = range(n_blocks + 1) if step.args.compare_depths else [step.args.freeze]
tunings = {d: "transfer" if d == step.args.freeze else f"transfer_frozen{d}" for d in depths}
genre_path, genre_stats = genre.path, genre.settings["stats"]
recipe = {"make_loss": lambda data: RegressionLoss(data.std), "optimizer": torch.optim.AdamW}
from_genre = recipe | {"stats": genre_stats}
both = {"share": HEAD["share"] + TUNE["share"]}
new_head = functools.partial(copied, frozen=n_blocks)

# First phase, and the trainings from scratch.
first = {}  # (model, emotion) -> Experiment
for emotion in emotions:
    kinds = {"head": (new_head, from_genre | HEAD), "scratch": (untrained, recipe | both)}
    if twin is None:
        kinds["scratch_full"] = untrained, recipe
    for kind, (make, options) in kinds.items():
        name = f"{kind}_{emotion}"
        first[kind, emotion] = Experiment(name, network, make, target=emotion, **options)
done = train_all(step.training, first.values(), to_come=len(emotions) * len(tunings))

# Second phase, with the head of the first one.
second = {}
for emotion, (depth, kind) in itertools.product(emotions, tunings.items()):
    name = kind.replace("transfer", f"transfer_{emotion}")
    head = done[f"head_{emotion}"].model.heads
    tuned = functools.partial(copied, frozen=depth, head=head)
    second[kind, emotion] = Experiment(name, network, tuned, target=emotion, **from_genre, **TUNE)
done |= train_all(step.training, second.values())
names = {key: run.name for key, run in (first | second).items()}
runs = {key: done[name] for key, name in names.items()}

frozen = {"head": n_blocks} | {kind: depth for depth, kind in tunings.items()}
table = {
    names[kind, emotion]: {
        "frozen blocks": frozen.get(kind, 0),
        "trained weights": run.facts["trained_weights"],
        "examples": run.facts["epochs"] * run.facts["examples_per_epoch"],
        "epochs (kept)": tables.epochs_kept(run),
        "highest learning rate": f"{run.facts['lr']:.1e}",
        "seconds": round(run.facts["train_seconds"]),
        "validation Spearman": run.facts["val"][emotion],
    }
    for (kind, emotion), run in runs.items()
}
caption = f"{len(data.train)} training clips. Seconds are wall-clock time, with other trainings "
step.table(pd.DataFrame(table).T.rename_axis("run"), caption + "running in parallel.")
step.text("""
    - `head` is the first phase, `transfer` the second one, which continues from it.
    - `scratch` starts from random weights. It has the epochs of both phases together, up to
      rounding, at the full learning rate.
    - `scratch_full` starts from random weights and has all epochs, like the models of step 8. If
      step 8 has trained this network by this recipe, its predictions are used.

    The input is standardised by the genre training clips for the copied network, and by the emotion
    training clips for the networks from scratch.
""")


def examples_shown(run):
    """Training examples shown by the end of each epoch."""
    return run.facts["examples_per_epoch"] * run.history["epoch"].to_numpy()


size = (5 * len(emotions) + 2, 4)
fig, panels = plt.subplots(1, len(emotions), figsize=size, squeeze=False, layout="constrained")
for ax, emotion in zip(panels.flat, emotions, strict=True):
    head, tuned, scratch = (runs[kind, emotion] for kind in ("head", "transfer", "scratch"))
    end = examples_shown(head)[-1]
    x = np.concatenate([examples_shown(head), end + examples_shown(tuned)])
    y = np.concatenate([run.history["val_score"] for run in (head, tuned)])
    ax.plot(x, y, ".-", color=COLORS[0], label="from the genre model")
    y = scratch.history["val_score"]
    ax.plot(examples_shown(scratch), y, ".--", color=COLORS[3], label="from scratch")
    ax.axvline(end, color="grey", linestyle=":", label="end of the first phase")
    ax.set(xlabel="Training examples shown", ylabel="Validation Spearman", title=emotion)
panels[0, 0].legend(fontsize="small")
caption = (
    "Spearman's correlation on the validation clips against the training examples shown so far"
)
step.figure(fig, "epochs", f"{caption} ({len(data.val)} validation clips)")

# %% 9e. Against step 8
# The lab: compare with step 8. There are two questions. Do the genre weights help if both
# starts are trained equally long (`scratch`)? Is the short fine-tuning as good as the whole
# training of step 8 (`scratch_full`)?
step.heading("9e. Comparison with step 8")
predictions = {
    kind: pd.concat([runs[kind, emotion].predictions for emotion in emotions], axis=1)
    for kind in dict.fromkeys(kind for kind, _ in runs)
}
kinds = ("transfer", "head", "scratch", "scratch_full")
shown = {kind: predictions[kind] for kind in kinds if kind in predictions}
titles = {twin: f"scratch_full = {twin} (step 8)"}
for kind, table in step8.predictions.items():
    shown[titles.get(kind, f"{kind} (step 8)")] = table[list(emotions)]
scores = {name: emotion_scores(true, table) for name, table in shown.items()}
step.table(
    tables.emotion_table(scores),
    f"Spearman's correlation on {len(true)} held-out clips, with 95% intervals over these clips",
)
if step8.predictions:
    step.text(BASELINES)
differences = {
    name: paired_difference(true, shown["transfer"], table)
    for name, table in shown.items()
    if name != "transfer" and not name.startswith("constant")  # less 0 it is the score itself
}
lines = [tables.difference_line("transfer", name, d) for name, d in differences.items()]
step.text("\n".join(f"- {line}" for line in lines))
step.text("""
    The intervals show how much depends on the choice of the held-out clips. They do not show how
    much depends on the seed of the training. Of several 95% intervals, one may exclude 0 by chance.
""")

# %% 9e. How many blocks to freeze (--compare-depths)
# One fine-tuning per number of frozen blocks. All of them start with the head of phase one.
if step.args.compare_depths:
    step.heading("9e. Frozen blocks")
    fig, panels = plt.subplots(1, len(emotions), figsize=size, squeeze=False, layout="constrained")
    for ax, emotion in zip(panels.flat, emotions, strict=True):
        tried = [runs[kind, emotion] for kind in tunings.values()]
        test = [emotion_scores(run.truth, run.predictions) for run in tried]
        ax.plot([t[emotion] for t in test], "o-", color=COLORS[0], label="held-out clips")
        low, high = np.array([t[f"{emotion}_ci95"] for t in test]).T
        ax.fill_between(depths, low, high, color=COLORS[0], alpha=0.15, label="95% interval")
        on_val = [run.facts["val"][emotion] for run in tried]
        ax.plot(on_val, "s--", color=COLORS[2], label="validation clips")
        ax.axhline(scores["scratch"][emotion], color=COLORS[3], linestyle=":", label="scratch")
        ax.set(xlabel="Frozen blocks", ylabel="Spearman", title=emotion, xticks=list(depths))
    panels[0, 0].legend(fontsize="small")
    caption = "Spearman's correlation against the number of frozen blocks. The dotted line is "
    step.figure(fig, "depths", caption + "`scratch` on the held-out clips.")

rows = tables.held_out_rows(true, predictions, step.args.seed, folds=1)
tables.write_predictions(step.folder, rows)
facts = {
    names[key]: run.facts | {"test": emotion_scores(run.truth, run.predictions)}
    for key, run in runs.items()
}
if len(emotions) == len(EMOTIONS):
    for kind, table in predictions.items():
        parts = {emotion: facts[names[kind, emotion]] for emotion in emotions}
        facts[kind] = combine_emotions(parts, emotion_scores(true, table))
step.finish(
    facts,
    genre_model=genre_name,
    frozen_blocks=step.args.freeze,
    fine_tuning={"head": HEAD, "tune": TUNE},
    differences=differences,
)
