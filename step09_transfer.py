"""Step 9: transfer learning, from genres to emotions.

The lab asks: a) what Yosinski et al. (2014) found; b) a model of steps 5 and 7, and why;
c) its training on the genre data, keeping the best epoch: by which metric, on which set,
why; d) an emotion model that starts from these weights, trained for few epochs on one
axis; e) a comparison with step 8.

    python step09_transfer.py                    # valence, from the genre model
    python step09_transfer.py --axis all         # each of the three axes, one after another
    python step09_transfer.py --freeze 2         # the first two blocks stay as genre taught them
    python step09_transfer.py --compare-depths   # one fine-tuning per number of frozen blocks

Input: both data sets; checkpoints of steps 5 and 7 and scores of step 8 where there are
any. Output, in outputs/step09_transfer/: a checkpoint and a history per run, curves, scores
(summary.md, metrics.json) and predictions.csv for the held-out clips. --epochs are those of
a training from scratch; a fine-tuning gets its share of them.
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
    load_checkpoint,
    load_data,
    make_backbone,
    overfit_emotions,
    train_all,
    true_labels,
)
from patrec.baselines import BASELINES
from patrec.clips import find_emotion_leak
from patrec.errors import InputError
from patrec.labels import EMOTIONS
from patrec.plots import COLORS
from patrec.recipes import GENRE_NETWORKS, make_recipe, window_size
from patrec.scores import combine_emotions, emotion_scores, paired_difference
from patrec.step import Step
from patrec.tables import (
    difference_line,
    earlier_predictions,
    emotion_table,
    epochs_kept,
    held_out_rows,
    write_predictions,
)


def add_flags(parser):
    axis = "which emotion to learn (default: valence)"
    parser.add_argument("--axis", choices=[*EMOTIONS, "all"], default="valence", help=axis)
    freeze = "blocks that stay as genre training left them (default: 0)"
    parser.add_argument("--freeze", type=int, choices=range(5), default=0, metavar="N", help=freeze)
    depths = "fine-tune once per number of frozen blocks"
    parser.add_argument("--compare-depths", action="store_true", help=depths)


step = Step("step09_transfer", __doc__, training=True, add_flags=add_flags)
emotions = EMOTIONS if step.args.axis == "all" else (step.args.axis,)

# %% 9a. Yosinski et al. (2014), How transferable are features in deep neural networks?
# The lab: the basic conclusions of the paper, in short. They are the paper's; what is
# measured below is a much smaller experiment.
step.heading("9a. Yosinski et al. (2014), How transferable are features in deep neural networks?")
step.text("""
They trained networks on one half of ImageNet's classes, copied the first n layers into a network
for the other half, and froze or fine-tuned them. In short:

1. Features go from general in the first layers to specific in the last ones.
2. A copied and frozen layer does worse for two reasons: it is specific to the old task, or
   neighbouring layers that had adapted to each other are cut apart, mostly in the middle.
3. The more the two tasks differ, the less carries over; yet features of a distant task still
   serve better than random ones.
4. Copied layers that are then fine-tuned generalise better than training from scratch, even with
   much data in the new task.

Compared with the paper, this step measures: fine-tuning against training from scratch (4), and with
`--compare-depths` the score against the number of frozen blocks. The latter does not tell the two
reasons of (2) apart; the paper does so by networks copied onto their *own* task, which are not
trained here.
""")

# %% 9b. Which model is transferred
# The lab: a model of steps 5 and 7, and why this one. Candidates are the networks that hear
# fma_genre_spectrograms, which is what 9c names: none on beats. The choice is by validation
# macro-F1. Genre test clips and emotion clips have no say in it.
step.heading("9b. The model that is transferred")
val = genre_val_scores(step.training)
val = val.loc[[name for name in val.index if not GENRE_NETWORKS[name].beat]]
genre_name = val.index[0] if len(val) else "cnn_mel"
network = GENRE_NETWORKS[genre_name]
n_blocks = len(make_backbone(network).blocks)
if len(val):
    caption = "Genre networks on full spectrograms that earlier runs have left for these clips"
    step.table(val, f"{caption}; on so few clips a few hundredths may be chance")
step.text(f"""
    Transferred: `{genre_name}`. Of the networks whose input is the full spectrogram and that
    earlier runs have left, the one with the highest validation macro-F1 is taken; where there is
    none, the CNN. Features that tell genres apart on clips that were not trained on are the
    likelier to carry over: a guess, since the transfer itself is measured for one network only.
    Test clips play no part in the choice.
""")
if step.args.freeze > n_blocks:
    raise InputError(
        f"--freeze {step.args.freeze}: the chosen model, {genre_name}, has {n_blocks} blocks; "
        "freeze at most that many"
    )

# The clips held out are step 8's. Had the genre network heard them, its features would know
# them: that is looked into before anything is trained.
data = load_data(step.source, network.features, target="emotion", crop=window_size(network))
true = true_labels(data.held_out, data.settings)
if step.args.overfit_batch:  # as in step 5b, with the regression loss; ends here
    overfit_emotions(step, {f"scratch_{emotions[0]}": (network, emotions[0])})
if leak := find_emotion_leak(step.source, data.held_out):
    step.text(f"**Warning:** {leak}.")

# %% 9c. Genre training, and the epoch whose weights are kept
# The lab: train it on fma_genre_spectrograms and keep the weights of its best epoch; by
# which metric, on which set, and why. Found where steps 5 and 7 have left it, else trained
# here in the same way.
step.heading("9c. Genre training, and the epoch that is kept")
genre = genre_models(step.training, [genre_name])[genre_name]
checkpoint = load_checkpoint(genre.path)
step.text(f"""
Kept: epoch {checkpoint["epoch"]}; {genre.facts["epochs"]} of {genre.facts["planned_epochs"]}
planned epochs were trained. Its macro-F1 on the {genre.facts["n_val"]} validation clips is
{checkpoint["val_score"]:.3f}, the best of the planned last fifth of the epochs (of a run cut short
before it: the best so far).

- *Which metric*: macro-F1, because genres are unequally common and accuracy would forgive a
  network that neglects the rare ones; the loss judges how sure the network is, which the lab's
  scores do not ask.
- *Which set*: the validation set. On training clips a later epoch tends to look better, overfitting
  included; chosen on test clips, the test score would be a score of the choice.
- *Why only of the last fifth*: in a full training the rate has come down to about a tenth by then,
  while an earlier peak, the best of many, is partly chance. So is the maximum of the last fifth,
  which makes it optimistic.
""")
if genre.path.with_name("history.csv").exists():
    history = pd.read_csv(genre.path.with_name("history.csv"))
    fig, ax = plt.subplots(figsize=(7, 3.8))
    ax.plot(history["epoch"], history["val_score"], color=COLORS[0])
    ax.plot(checkpoint["epoch"], checkpoint["val_score"], "o", color=COLORS[3], label="kept")
    ax.set(xlabel="Epoch of genre training", ylabel="Validation macro-F1", title=genre_name)
    ax.locator_params(axis="x", integer=True)
    ax.legend()
    caption = "Validation macro-F1 of the genre network; the dot is the epoch that is transferred"
    step.figure(fig, "genre_training", caption)

# %% 9d. A short fine-tuning
# The lab: start from these weights, train for few epochs on one axis. Two phases, the new
# head and then everything; the input is standardised as in genre training, since that is
# what the copied filters expect.
HEAD = {"share": 0.05, "lr_factor": 1.0}  # of the budget and the rate of a training from scratch
TUNE = {"share": 0.25, "lr_factor": 0.3}
step.heading("9d. A short fine-tuning")
step.show_source(load_backbone)
step.text(f"""
First the new head alone, the whole backbone frozen ({HEAD["share"]:.0%} of the budget of a training
from scratch): gradients of a new head carry little of the task yet and can distort the copied
features (Kumar et al., 2022, Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution, who gain by it most on data unlike the training data). Then everything that is
not frozen, {TUNE["share"]:.0%} of the budget at {TUNE["lr_factor"]:g} times the rate; AdamW and
one-cycle in both. Length and rate of the second phase were compared in cross-validation on the
README's small set of music, without the clips held out under seed 42 (docs/experiments.md); the
first phase and the short training from scratch, to which it is compared, were not tuned.
""")


def copied(network, data, frozen, head=None):
    """Regressor on the genre network's backbone; its head new or, of an earlier phase, given."""
    backbone = load_backbone(genre_path, frozen=frozen)
    regressor = Regressor(backbone, data.names, data.mean, data.std)
    if head is not None:
        regressor.heads.load_state_dict(head.state_dict())
    return regressor


def untrained(network, data):
    """Regressor with random weights, as in step 8."""
    return Regressor(make_backbone(network), data.names, data.mean, data.std)


def is_twin(kind):
    """Whether step 8's model is this network, trained from scratch on the whole budget."""
    recipe = make_recipe(network, data, step.training)
    wanted = [recipe.epochs, recipe.epochs, recipe.lr, recipe.batch_size, len(data.train)]
    keys = ("planned_epochs", "epochs", "lr", "batch_size", "n_train")
    parts = [step8.runs.get(f"{kind}_{emotion}", {}) for emotion in emotions]
    same_recipe = all([part.get(key) for key in keys] == wanted for part in parts)
    return same_recipe and step8.runs[kind].get("network") == genre_name


# The twins. `scratch` has the budget of both phases together, at the full rate;
# `scratch_full` the whole budget. The latter is what step 8 trains (same network, clips, seed
# and recipe): its predictions are taken from there if it was run so, else it is trained here.
step8 = earlier_predictions(step.training, "step08_regression", clip_ids(data.held_out))
step.text(step8.note)
twin = next(filter(is_twin, step8.predictions), None)
depths = range(n_blocks + 1) if step.args.compare_depths else [step.args.freeze]
tunings = {d: "transfer" if d == step.args.freeze else f"transfer_frozen{d}" for d in depths}
genre_path, genre_stats = genre.path, genre.settings["stats"]
recipe = {"make_loss": lambda data: RegressionLoss(data.std), "optimizer": torch.optim.AdamW}
from_genre = recipe | {"stats": genre_stats}

# First phase, the new heads; beside it, the twins.
first = {}  # (model, emotion) -> Experiment
for emotion in emotions:
    make = functools.partial(Experiment, network=network, target=emotion)
    new_head = functools.partial(copied, frozen=n_blocks)
    first["head", emotion] = make(f"head_{emotion}", make_model=new_head, **from_genre, **HEAD)
    budget = {"share": HEAD["share"] + TUNE["share"]}
    scratch = make(f"scratch_{emotion}", make_model=untrained, **recipe, **budget)
    first["scratch", emotion] = scratch
    if twin is None:
        full = make(f"scratch_full_{emotion}", make_model=untrained, **recipe)
        first["scratch_full", emotion] = full
done = train_all(step.training, first.values(), to_come=len(emotions) * len(tunings))

# Second phase: everything that is not frozen, with the head that the first one has left.
second = {}
for emotion, (depth, kind) in itertools.product(emotions, tunings.items()):
    name = kind.replace("transfer", f"transfer_{emotion}")
    head = done[f"head_{emotion}"].model.heads
    tuned = functools.partial(copied, frozen=depth, head=head)
    second[kind, emotion] = Experiment(name, network, tuned, target=emotion, **from_genre, **TUNE)
done |= train_all(step.training, second.values())
runs = {key: done[run.name] for key, run in (first | second).items()}
names = {key: run.name for key, run in (first | second).items()}

phases = {"head": "genre weights, new head", "scratch": "random weights"}
frozen = {"head": n_blocks} | {kind: depth for depth, kind in tunings.items()}
table = {
    names[kind, emotion]: {
        "starts from": phases.get(
            kind.split("_")[0], f"genre weights, head from `{names['head', emotion]}`"
        ),
        "frozen blocks": frozen.get(kind, 0),
        "trained weights": run.facts["trained_weights"],
        "examples": run.facts["epochs"] * run.facts["examples_per_epoch"],
        "epochs (kept)": epochs_kept(run),
        "highest rate": f"{run.facts['lr']:.1e}",
        "seconds": round(run.facts["train_seconds"]),
        "val Spearman": run.facts["val"][emotion],
    }
    for (kind, emotion), run in runs.items()
}
caption = f"{len(data.train)} training clips; wall-clock seconds, with other trainings in parallel"
step.table(pd.DataFrame(table).T.rename_axis("run"), caption)
step.text("""
    `head`: the first phase. `transfer`: the second, which goes on from it. `scratch`: random
    weights, the budget of both phases together, up to rounding to whole epochs, at the full rate.
    `scratch_full`: random weights, the whole budget, which is how step 8 trains: where it trained
    this very network with this recipe its predictions are taken, else it is trained here.
    Standardisation differs too: by genre training clips for the copied network, by emotion training
    clips for the untrained one.
""")
size = (5 * len(emotions) + 2, 4)
fig, panels = plt.subplots(1, len(emotions), figsize=size, squeeze=False, layout="constrained")
for ax, emotion in zip(panels.flat, emotions, strict=True):
    shown_after = {}  # training examples after each epoch
    for kind in ("head", "transfer", "scratch"):
        facts = runs[kind, emotion].facts
        shown_after[kind] = facts["examples_per_epoch"] * np.arange(1, facts["epochs"] + 1)
    end = shown_after["head"][-1]
    shown_after["transfer"] = shown_after["transfer"] + end
    for kinds, line, color, label in (
        (("head", "transfer"), ".-", COLORS[0], "from the genre model"),
        (("scratch",), ".--", COLORS[3], "from scratch"),
    ):
        scores = np.concatenate([runs[kind, emotion].history["val_score"] for kind in kinds])
        ax.plot(np.concatenate([shown_after[kind] for kind in kinds]), scores, line, color=color)
        ax.lines[-1].set_label(label)
    ax.axvline(end, color="grey", linestyle=":", label="left: new head alone; right: second phase")
    ax.set(xlabel="Training examples shown", ylabel="Validation Spearman", title=emotion)
panels[0, 0].legend(fontsize="small", loc="lower right")
step.figure(
    fig,
    "epochs",
    "Spearman's correlation on validation clips against the training examples shown so far; "
    f"{len(data.val)} validation clips",
)

# %% 9e. Against step 8
# The lab: compare with step 8. Two questions are kept apart: what the genre weights bring
# when both starts are given as little (`scratch`), and whether the short fine-tuning gets
# as far as the whole training that step 8 spends (`scratch_full`).
step.heading("9e. The results, and step 8's")
predictions = {
    kind: pd.concat([runs[kind, emotion].predictions for emotion in emotions], axis=1)
    for kind in dict.fromkeys(kind for kind, _ in runs)
}
shown = {kind: predictions[kind] for kind in ("transfer", "head", "scratch")}
full = "scratch_full" if twin is None else f"scratch_full = {twin} (step 8)"
shown[full] = (
    predictions["scratch_full"] if twin is None else step8.predictions[twin][list(emotions)]
)
for kind, table in step8.predictions.items():
    if kind != twin:
        shown[f"{kind} (step 8)"] = table[list(emotions)]
scores = {name: emotion_scores(true, table) for name, table in shown.items()}
step.table(
    emotion_table(scores),
    f"Spearman's correlation on {len(true)} held-out clips; 95% intervals over these clips, for "
    "one training seed",
)
if step8.predictions:
    step.text(BASELINES)
differences = {
    name: paired_difference(true, shown["transfer"], table)
    for name, table in shown.items()
    if name != "transfer" and not name.startswith("constant")  # less 0 it is the score itself
}
step.text("\n".join(f"- {difference_line('transfer', name, d)}" for name, d in differences.items()))
step.text("""
    Each interval reflects the choice of held-out clips only; of several intervals of 95% one may
    leave out 0 by chance. Another training seed moves the scores too, by an amount that one run
    does not show.
""")

# %% 9e. How many blocks to freeze (--compare-depths)
# One fine-tuning per number of frozen blocks, the head of the first phase in common.
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
    caption = "Spearman's correlation against the number of blocks left as genre training made them"
    step.figure(fig, "depths", f"{caption}; dotted: from scratch, held-out clips")

write_predictions(step.folder, held_out_rows(true, predictions, step.args.seed, folds=1))
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
