"""Step 5: music genre recognition with LSTMs.

The lab asks: a) an LSTM that takes the spectrograms of step 4's Dataset; b) a boolean
`overfit_batch`, with which a few batches are learned by heart to prove that the network
can be trained; c) an LSTM on mel spectrograms, d) on beat-synchronised ones, e) on
chromagrams, f) on both together.

    python step05_lstm.py                          # all six LSTMs, default settings
    python step05_lstm.py --features mel beat_mel  # two of them
    python step05_lstm.py --overfit-batch          # only 5b: four batches by heart
    python step05_lstm.py --plain                  # the textbook LSTM, for comparison

Input: the genre data set. Output, in outputs/step05_lstm/: a checkpoint and a history per
run, learning curves, test scores (summary.md, metrics.json), each test clip's true and
predicted class (predictions.csv).

Measured on a small set of real music: README, over three seeds, number format and processor
with it. One run (seed 42, bf16, one thread per training, a Xeon with AMX, torch 2.13.0): LSTM on
mel, test accuracy .599 [.529, .669], macro-F1 .567 [.477, .639], 157 clips.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--features mel --epochs 20").
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

from common import (
    Classifier,
    Experiment,
    LSTMBackbone,
    frame_statistics,
    layer_table,
    load_data,
    load_test,
    make_backbone,
    masked_mean_max,
    overfit,
    predict_clips,
    train,
    train_all,
    train_epoch,
    true_labels,
)
from patrec.machine import seed_everything
from patrec.plots import plot_histories, plot_overfit, plot_scores
from patrec.recipes import GENRE_NETWORKS, LSTM_NAMES, OVERFIT_PASSES, Recipe, window_size
from patrec.scores import genre_scores
from patrec.step import Step
from patrec.tables import prediction_rows, with_interval, write_predictions


def add_flags(parser):
    inputs = "which LSTMs to train (default: all six)"
    parser.add_argument(
        "--features", nargs="+", choices=LSTM_NAMES, default=LSTM_NAMES, help=inputs
    )
    textbook = (
        "train the textbook LSTM instead: every frame, two layers, one direction, last step; "
        "Adam, plain cross-entropy, nothing averaged or adjusted"
    )
    parser.add_argument("--plain", action="store_true", help=textbook)


step = Step("step05_lstm", __doc__, parts=("genre",), training=True, add_flags=add_flags)
names = ["plain_mel"] if step.args.plain else step.args.features

# %% 5a. An LSTM that reads the spectrograms of step 4's Dataset
# The lab: adapt the LSTM of the second lab, so that it takes the spectrograms of step 4's
# Dataset. What changed in it, and why, is the table's caption; step 2 has measured the
# price of 1,293 steps.
step.heading("5a. An LSTM that reads the spectrograms of step 4's Dataset")
step.text("""
A clip is a sequence of frames, a frame the values of its bands. Eight frames make one step of the
LSTM: mean, standard deviation and mean absolute change of every band (1,293 steps cost time, and a
step of 23 ms holds little). A dense layer with layer normalisation, a bidirectional LSTM, then mean
and maximum over the clip's own steps (not the last step, which is padding in a shorter clip), and
one output (logit) per class. Of beats, a step is one beat; `--plain` is the textbook LSTM on every
frame, one direction, read at the last step.
""")


def classifier(network, data):
    """LSTM for one kind of input, with an output per class."""
    return Classifier(make_backbone(network), n_classes=len(data.names))


network = GENRE_NETWORKS[names[0]]
data = load_data(step.source, network.features, network.beat, crop=window_size(network))
seed_everything(step.args.seed)
model = classifier(network, data).to(step.device)
step.show_source(make_backbone, LSTMBackbone.forward, frame_statistics, masked_mean_max)
step.table(*layer_table(model, data))

# %% 5b. Overfitting a few batches
# The lab: a boolean overfit_batch, with which training learns a few batches by heart until
# the loss is close to 0; a network that cannot do that most likely has a fault between data,
# loss and gradient. The boolean is --overfit-batch; the loop, `train_epoch`, is that of every
# training here.
step.heading("5b. Overfitting a few batches")
step.show_source(train, train_epoch, overfit)
loss_fn = nn.CrossEntropyLoss()  # no label smoothing, with which it could not come near 0
optimizer = torch.optim.Adam(model.parameters(), lr=step.args.lr)
recipe = Recipe(OVERFIT_PASSES, step.args.lr, step.args.batch_size)
check = train(model, data, loss_fn, optimizer, recipe, device=step.device, overfit_batch=True)
step.table(pd.DataFrame([check.facts], index=[names[0]]).rename_axis("LSTM"))
facts = check.facts
step.text(f"""
{facts["clips"]} clips in {facts["batches"]} fixed batches, Adam at a constant rate, no dropout,
masking or label smoothing, which are there to prevent this. Goal: a loss under .01 and every clip
right; after {facts["passes"]} passes the loss is {facts["loss"]:.4f}.
""")
caption = "Training loss on fixed batches of training crops, regularisation off"
step.figure(plot_overfit({names[0]: check}), "overfit", caption)
step.require(check.learned, f"four batches were not learned by heart: {check.facts}")
if step.args.overfit_batch:
    step.finish(overfit={names[0]: check.facts})

# %% 5c-f. One LSTM per kind of input, the same recipe
# The lab: c) mel spectrograms, d) beat-synchronised ones, e) chromagrams, f) both; Adam;
# the validation set to train by. One Run per input; what they share is the recipe.
step.heading("5c-f. One LSTM per kind of input")
smoothing = 0.0 if step.args.plain else 0.1
recipe = {
    "make_model": classifier,
    "make_loss": lambda data: nn.CrossEntropyLoss(label_smoothing=smoothing),
    "optimizer": torch.optim.Adam if step.args.plain else torch.optim.AdamW,
}
runs = train_all(
    step.training, [Experiment(name, GENRE_NETWORKS[name], **recipe) for name in names]
)

step.text("""
- *Optimiser* (lab: Adam): AdamW, which is Adam whose weight decay, .01 here, does not pass through
  the moving averages (Loshchilov & Hutter, 2019). The rate rises over the first tenth of the steps
  and then falls to nearly 0 (one-cycle); gradients are clipped to norm 1.
- *Loss*: cross-entropy with label smoothing .1, which keeps the network from growing certain about
  clips that it has right already.
- *Augmentation*: mel bands shifted up or down by up to 2, stripes of bands and steps set to the
  mean (SpecAugment), dropout.
- *Weights*: those that are validated and kept are a running average over the last hundred or so
  updates (in a short training fewer).
- *Epoch*: of the last fifth of the epochs the best by validation macro-F1. An earlier peak, the
  best of many while the rate is still high, is partly chance. The maximum of several is optimistic.

With `--plain` none of these but the rate's schedule, clipping, dropout and the choice of the epoch:
Adam, plain cross-entropy, the weights as they are.

The rows are not the same network on six inputs: what one step holds and what a training example is
differ as the columns say.
""")
ITEMS = {"mel": "5c", "beat_mel": "5d", "chroma": "5e", "beat_chroma": "5e", "plain_mel": "5c"}
hears = {}
for name, run in runs.items():
    network, crop = GENRE_NETWORKS[name], window_size(GENRE_NETWORKS[name])
    step_of = "1 beat: median" if network.beat else "8 frames: mean, sd, mean change"
    hears[name] = {
        "item": ITEMS.get(name, "5f"),
        "input": network.features,
        "one step is": "1 frame" if network.plain else step_of,
        "trains on": f"crops of {crop} frames" if crop else "whole clips",
        "validates on": "windows of the clip" if crop else "whole clips",
        "weights": run.facts["weights"],
        "examples per epoch": run.facts["examples_per_epoch"],
        "epochs (kept)": f"{run.facts['epochs']} ({run.facts['best_epoch']})",
        "seconds": round(run.facts["train_seconds"]),
        "val macro-F1": run.facts["val"]["macro_f1"],
    }
first = runs[names[0]].facts
caption = (
    f"What each LSTM gets and how it trained, on {first['n_train']} clips; {first['n_val']} "
    "validate. Seconds are the clock's, other trainings beside it"
)
step.table(pd.DataFrame(hears).T.rename_axis("run"), caption)
step.figure(
    plot_histories({name: run.history for name, run in runs.items()}, "macro-F1"),
    "learning_curves",
    "Loss and validation macro-F1 against the epoch; the dot marks the epoch that was kept, among "
    "the shaded last fifth. Training loss is measured while the weights change, with dropout and "
    "augmentation, validation loss without them (both include label smoothing, if there is any)",
)

# %% Test scores. The test split is opened only now, when no choice is left to make.
# Answers are averaged over windows of the clip where crops were trained on.
step.heading("Scores on the test set")
step.text("""
The scores, here and on the validation clips, are those after logit adjustment: half the log of each
class's share of the training clips is subtracted from its logit. This raises rare classes most
(after Menon et al., 2021, who subtract all of it). With `--plain` there is no adjustment. An LSTM
that was trained on crops predicts from the mean of its outputs over windows of the clip, which
overlap on the test set. LSTMs of beats are scored on the beat-synchronised test set. Step 6
compares the LSTMs on the same clips.
""")
rows, scores = [], {}
for name, run in runs.items():
    test = load_test(step.source, run.settings)
    predictions = predict_clips(run.model, test, run.settings, step.device)
    true = true_labels(test, run.settings)
    scores[name] = genre_scores(true, predictions)
    test_set = test.store.entries[0].path.parts[-3]
    rows.append(prediction_rows(name, true, predictions, test_set=test_set, seed=step.args.seed))
write_predictions(step.folder, rows)
table = {
    name: {
        "test set": "beats" if GENRE_NETWORKS[name].beat else "frames",
        "clips": test["n_clips"],
        "val macro-F1": runs[name].facts["val"]["macro_f1"],
        "test accuracy": with_interval(test, "accuracy"),
        "test macro-F1": with_interval(test, "macro_f1"),
    }
    for name, test in scores.items()
}
caption = "Test scores; 95% intervals over test clips, for one training seed"
step.table(pd.DataFrame(table).T.rename_axis("run"), caption)
fig, ax = plt.subplots(figsize=(7, 0.6 * len(runs) + 1.2))
values = [test["macro_f1"] for test in scores.values()]
intervals = [test["macro_f1_ci95"] for test in scores.values()]
plot_scores(ax, names, values, intervals, "Test macro-F1 (line: 95% interval)")
step.figure(fig, "test_scores", "Macro-F1 on the test set")
step.finish(
    {name: run.facts | {"test": scores[name]} for name, run in runs.items()},
    overfit={names[0]: check.facts},
)
