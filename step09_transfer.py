"""Step 9: transfer learning, from genres to emotions.

The lab asks: a) the conclusions of Yosinski et al. (2014); b) a model of steps 5 and 7, and the
reason for it; c) its training on the genre data and the weights of its best epoch: by which
metric, on which set, why; d) an emotion model that starts from these weights and is trained
for few epochs on one axis; e) a comparison with step 8.

    python step09_transfer.py                   # valence
    python step09_transfer.py --axis all        # each of the three axes
    python step09_transfer.py --freeze 2        # the first two blocks keep the genre weights
    python step09_transfer.py --compare-depths  # one fine-tuning per number of frozen blocks

Input: both data sets; the networks of steps 5 and 7 and the scores of step 8, if they were run.
Output, in outputs/step09_transfer/: a checkpoint and a history per run, learning curves, scores
(summary.md, metrics.json) and predictions.csv for the held-out clips. --epochs is that of a
training from scratch; a fine-tuning has at most ten epochs.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--axis all --freeze 2").
import functools
import itertools

import pandas as pd
import torch

import common
from patrec import tables
from patrec.baselines import BASELINES
from patrec.clips import find_emotion_leak
from patrec.errors import InputError
from patrec.flags import bounded
from patrec.labels import EMOTIONS
from patrec.plots import plot_histories
from patrec.recipes import GENRE_NETWORKS, make_recipe, window_size
from patrec.scores import combine_emotions, emotion_scores
from patrec.step import Step


def add_flags(parser):
    parser.flag("--axis", "emotion to learn", choices=[*EMOTIONS, "all"], default="valence")
    frozen = "blocks that keep the weights of genre training"
    parser.flag("--freeze", frozen, type=bounded(int, 0, 4), default=0, metavar="N")
    parser.flag("--compare-depths", "fine-tune with every number of blocks", action="store_true")


step = Step("step09_transfer", __doc__, training=True, add_flags=add_flags)
emotions = EMOTIONS if step.args.axis == "all" else (step.args.axis,)

# %% 9a. Yosinski et al. (2014), How transferable are features in deep neural networks?
# The lab: describe the basic conclusions of the paper in short.
step.heading("9a. Yosinski et al. (2014), How transferable are features in deep neural networks?")
step.text("""
The authors trained networks on half of the classes of ImageNet. They copied the first n layers into
a network for the other half, and then froze or fine-tuned them. They conclude:

1. The first layers learn general features, the last layers learn features of their task.
2. Copied and frozen layers lower the score for two reasons. Their features may be too specific to
   the old task (the last layers). Or layers that had learned to work together are separated,
   because one is copied and the next is trained anew (the middle layers).
3. The more the two tasks differ, the less the copied features help. They can still be better than
   random ones.
4. Copied and then fine-tuned layers generalise better than training from scratch, even if the new
   task has much data.

This step compares fine-tuning with training from scratch (4). With `--compare-depths` it also
compares numbers of frozen blocks, but it cannot tell the two reasons of (2) apart. The paper tells
them apart by copying layers into a network for the *same* task. There the copied features fit the
task, so only the separation of the layers can lower the score.
""")

# %% 9b. The model that is transferred
# The lab: choose a model of steps 5 and 7 and explain why. 9c trains it on
# fma_genre_spectrograms, so the networks on beats are not candidates.
step.heading("9b. The model that is transferred")
val = common.genre_val_scores(step.training)
val = val.loc[[name for name in val.index if not GENRE_NETWORKS[name].beat]]
genre_name = val.index[0] if len(val) else "cnn_mel"
network = GENRE_NETWORKS[genre_name]
n_blocks = len(common.make_backbone(network).blocks)
why, noise = "as none is saved yet", ""
if len(val):
    step.table(val, "The networks on fma_genre_spectrograms that steps 5 and 7 have saved")
    why, n_val = "the network with the highest validation macro-F1", val["val clips"].iloc[0]
    noise = (
        f" The scores are noisy: on {n_val} validation clips an accuracy near 0.5 has a 95% "
        f"interval of ±{0.98 / n_val**0.5:.2f}. So another seed may put another network first."
    )
step.text(f"""
    We transfer `{genre_name}`, {why}. We expect that features that recognise the genre of new clips
    also help with emotions. The lab asks for a network trained on fma_genre_spectrograms, so we
    leave out the networks trained on beats.{noise} Test clips play no part in the choice.
""")
if step.args.freeze > n_blocks:
    fault = f"the chosen model, {genre_name}, has {n_blocks} blocks; freeze at most that many"
    raise InputError(f"--freeze {step.args.freeze}: {fault}")

# The held-out clips are those of step 8. The genre network must not have been trained on them.
data = common.load_data(step.source, network.features, target="emotion", crop=window_size(network))
true = common.true_labels(data.held_out, data.settings)
if step.args.overfit_batch:  # as in step 5b, with the regression loss; the step ends here
    common.overfit_emotions(step, {f"scratch_{emotions[0]}": (network, emotions[0])})
if leak := find_emotion_leak(step.source, data.held_out):
    step.text(f"**Warning:** {leak}.")

# %% 9c. Genre training, and the epoch whose weights are kept
# The lab: train the model on fma_genre_spectrograms and save the weights of its best epoch;
# explain the metric and the set. If steps 5 and 7 have not trained it, it is trained here.
step.heading("9c. Genre training, and the epoch that is kept")
genre = common.genre_models(step.training, [genre_name])[genre_name]
saved = "those of that epoch" if step.args.recipe == "lab" else "the running average of step 5"
step.text(f"""
{genre.facts["epochs"]} of {genre.facts["planned_epochs"]} planned epochs were trained. We transfer
the weights of epoch {genre.facts["best_epoch"]}, with a macro-F1 of
{genre.facts["val"]["macro_f1"]:.3f} on {genre.facts["n_val"]} validation clips.

- *The metric is macro-F1.* It counts every genre equally. A network that ignores the rare genres
  can still have a high accuracy. We do not use the validation loss: it also depends on how
  confident the network is, and the lab's scores do not.
- *The epoch is the best among {step.searched}.* The score on few clips is noisy, so the best of all
  can be an early epoch by chance. The default recipe therefore searches the last 20% only. The
  saved weights are {saved}.
- *The set is the validation set.* On training clips, later epochs look better even if the network
  overfits. On test clips, the choice would make the test score optimistic.
""")
if "val_score" in genre.history:
    caption = f"Genre training. {step.curves}"
    step.figure(plot_histories({genre_name: genre.history}, "macro-F1"), "genre_training", caption)

# %% 9d. A short fine-tuning
# The lab: start from these weights and train for few epochs on one axis. The input is
# standardised as in genre training, because the copied filters expect it so.
HEAD_EPOCHS, TUNE_EPOCHS = 2, 8
step.heading("9d. A short fine-tuning")
step.show_source(common.load_backbone)
step.text(f"""
The fine-tuning has two phases:

1. Only the new head is trained, for at most {HEAD_EPOCHS} epochs. The gradients of a random head
   can distort the copied features (Kumar et al., 2022, Fine-Tuning can Distort Pretrained
   Features and Underperform Out-of-Distribution).
2. Everything that is not frozen is trained, for at most {TUNE_EPOCHS} epochs.

In each epoch, as many crops of each clip are used as in step 8. Both phases use the recipe and the
learning rate of step 8. We did not tune them for the fine-tuning. `scratch` is the same network
trained from random weights. So `transfer` (the second phase) and `scratch` differ in three things:
the weights that they start from, the standardisation of the input, and that only `transfer` trains
its head first. In the second phase the backbone changes too, so its first epochs may score lower
than the first phase.
""")


def copied(network, data, frozen, head=None):
    """The genre network's backbone with the head of the first phase, or else a new one."""
    backbone = common.load_backbone(genre_path, frozen=frozen)
    regressor = common.Regressor(backbone, data.names, data.mean, data.std)
    if head is not None:
        regressor.heads.load_state_dict(head.state_dict())
    return regressor


def is_twin(kind):
    """Whether step 8's model is this network, trained from scratch on the whole budget."""
    wanted = [planned.epochs, planned.epochs, planned.lr, planned.batch_size, len(data.train)]
    keys = ("planned_epochs", "epochs", "lr", "batch_size", "n_train")
    parts = [step8.runs.get(f"{kind}_{emotion}", {}) for emotion in emotions]
    same_recipe = all([part.get(key) for key in keys] == wanted for part in parts)
    return same_recipe and step8.runs[kind].get("network") == genre_name


# Two trainings from scratch to compare with: `scratch` has at most as many epochs as both phases,
# `scratch_full` those of step 8. If step 8 has trained this network, it is not trained again.
planned = make_recipe(network, data, step.training)
step8 = tables.earlier_predictions(step.training, "step08_regression", true.index)
twin = next(filter(is_twin, step8.predictions), None)
depths = range(n_blocks + 1) if step.args.compare_depths else [step.args.freeze]
tunings = {d: "transfer" if d == step.args.freeze else f"transfer_frozen{d}" for d in depths}
genre_path, genre_stats = genre.path, genre.settings["stats"]
recipe = {"make_loss": lambda data: common.RegressionLoss(data.std), "optimizer": torch.optim.Adam}
from_genre = recipe | {"stats": genre_stats}
both = {"epochs": HEAD_EPOCHS + TUNE_EPOCHS}
new_head = functools.partial(copied, frozen=n_blocks)

# First phase, and the trainings from scratch.
head_only = from_genre | {"epochs": HEAD_EPOCHS}
kinds = {"head": (new_head, head_only), "scratch": (common.make_regressor, recipe | both)}
if twin is None:
    kinds["scratch_full"] = common.make_regressor, recipe
first = {}  # (model, emotion) -> Experiment
for emotion, (kind, (make, options)) in itertools.product(emotions, kinds.items()):
    name = f"{kind}_{emotion}"
    first[kind, emotion] = common.Experiment(name, network, make, target=emotion, **options)
done = common.train_all(step.training, first.values(), to_come=len(emotions) * len(tunings))

# Second phase, with the head of the first one.
second = {}
for emotion, (depth, kind) in itertools.product(emotions, tunings.items()):
    name = kind.replace("transfer", f"transfer_{emotion}")
    head = done[f"head_{emotion}"].model.heads
    tuned = functools.partial(copied, frozen=depth, head=head)
    options = from_genre | {"epochs": TUNE_EPOCHS}
    second[kind, emotion] = common.Experiment(name, network, tuned, target=emotion, **options)
done |= common.train_all(step.training, second.values())
names = {key: run.name for key, run in (first | second).items()}
runs = {key: done[name] for key, name in names.items()}

frozen = {"head": n_blocks} | {kind: depth for depth, kind in tunings.items()}
table = tables.training_table(done)
table.insert(0, "frozen blocks", [frozen.get(kind, 0) for kind, _ in runs])
step.table(table, tables.SECONDS)
full = (
    f"It is `{twin}` of step 8, so it is not trained again and not in this table."
    if twin
    else "It is trained here too."
)
step.text(f"""
    `head` is the first phase, `transfer` the second one. `scratch` starts from random weights and
    has at most as many epochs as both phases together. `scratch_full` has as many epochs as the
    networks of step 8. {full} The input of
    the copied network is standardised as in genre training, that of the others by the emotion
    training clips.

    Do not rank the models by these scores: {len(data.val)} validation clips are few, and 9e
    compares them on the held-out clips. The kept epoch is the best among {step.searched} (at least
    one), so another epoch can have a higher score in the figure. If the validation loss rises after
    it, this may be overfitting. On so few clips it may also be chance.
""")
shown = itertools.product(("head", "scratch", "transfer"), emotions)
curves = {names[key]: runs[key].history for key in shown}
caption = f"Losses, and Spearman's correlation on {len(data.val)} validation clips. {step.curves}"
step.figure(plot_histories(curves, "Spearman"), "learning_curves", caption)

# %% 9e. Against step 8
# The lab: compare with step 8. All models predict the same held-out clips.
step.heading("9e. Comparison with step 8")
test = {key: emotion_scores(run.truth, run.predictions) for key, run in runs.items()}
predictions = {
    kind: pd.concat([runs[kind, emotion].predictions for emotion in emotions], axis=1)
    for kind in dict.fromkeys(kind for kind, _ in runs)
}
shown = dict(predictions)
for kind, table in step8.predictions.items():
    title = f"scratch_full = {kind} (step 8)" if kind == twin else f"{kind} (step 8)"
    shown[title] = table[list(emotions)]
scores = {name: emotion_scores(true, table) for name, table in shown.items()}
step.table(
    tables.emotion_table(scores),
    f"Spearman's correlation on {len(true)} held-out clips, with 95% intervals over these clips",
)
step.text(f"{step8.note} {BASELINES if step8.predictions else ''}")
full = next(name for name in shown if name.startswith("scratch_full"))
axis = emotions[0]  # all are trained on as many examples
facts = step8.runs[f"{twin}_{axis}"] if twin else runs["scratch_full", axis].facts
n_full = facts["epochs"] * facts["examples_per_epoch"]
questions = {
    "scratch": "Do the genre weights help, if both networks are trained for equally many epochs? "
    "(The epochs of `head` are included in those of `transfer`.)",
    full: "Is there a difference between the short fine-tuning and a training from scratch on "
    f"{n_full:,} examples?",
}
for name, question in questions.items():
    step.text(f"{question}\n\n{tables.difference_lines(true, shown, [('transfer', name)])}")
others = [name for name in shown if name not in ("transfer", "constant (step 8)", *questions)]
step.text("The other models, on the same clips:")
step.text(tables.difference_lines(true, shown, [("transfer", name) for name in others]))
step.text(tables.INTERVALS)
if step.args.compare_depths:
    step.text("In `transfer_frozenN` the first N blocks keep the weights of genre training.")

# %% What the report reads
rows = tables.held_out_rows(true, predictions, step.args.seed, folds=1)
tables.write_predictions(step.folder, rows)
facts = {names[key]: run.facts | {"test": test[key]} for key, run in runs.items()}
if len(emotions) == len(EMOTIONS):
    for kind in predictions:
        parts = {emotion: facts[names[kind, emotion]] for emotion in emotions}
        facts[kind] = combine_emotions(parts, scores[kind])
record = {"genre_model": genre_name, "frozen_blocks": step.args.freeze}
step.finish(facts, **record)
