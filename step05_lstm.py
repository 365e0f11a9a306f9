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

Measured on a small set of real music (see README), seed 42, one CPU thread, torch 2.13.0:
best on validation mel, test accuracy .637, macro-F1 .599 (157 clips); six LSTMs in about
12 minutes.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--features mel --epochs 20").
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

from common import (
    GENRE_RUNS,
    LSTM_RUNS,
    Classifier,
    LSTMBackbone,
    Run,
    Step,
    answer,
    fit_all,
    genre_scores,
    load_data,
    load_test,
    make_backbone,
    overfit,
    plot_histories,
    plot_overfit,
    plot_scores,
    prediction_rows,
    seed_everything,
    truth,
    window_of,
    with_interval,
    write_predictions,
)


def add_flags(parser):
    inputs = "which LSTMs to train (default: all six)"
    parser.add_argument("--features", nargs="+", choices=LSTM_RUNS, default=LSTM_RUNS, help=inputs)
    textbook = (
        "train the textbook LSTM instead: every frame, two layers, one direction, last step; "
        "Adam, plain cross-entropy, nothing averaged or adjusted"
    )
    parser.add_argument("--plain", action="store_true", help=textbook)


step = Step("step05_lstm", __doc__, parts=("genre",), training=True, add_flags=add_flags)
names = ["plain_mel"] if step.args.plain else step.args.features

# %% 5a. An LSTM that reads the spectrograms of step 4's Dataset
# The lab: adapt the LSTM of the second lab. A clip is a sequence of frames, a frame the
# values of its bands. 1,293 frames are more than a gradient survives (step 2 measures
# that), so eight frames make one step: their mean, spread and change per band. A dense
# layer, a bidirectional LSTM, then mean and maximum over the clip's own steps (not the
# last step, which is padding in a shorter clip), and one logit per class.
step.heading("5a. An LSTM that reads the spectrograms of step 4's Dataset")


def classifier(network, data):
    """LSTM for one kind of input, with an output per class."""
    return Classifier(make_backbone(network), n_classes=len(data.names))


network = GENRE_RUNS[names[0]]
data = load_data(step.source, network.features, network.beat, crop=window_of(network))
seed_everything(step.args.seed)
model = classifier(network, data).to(step.device)
step.show_source(make_backbone, LSTMBackbone.forward, Classifier.forward)
step.show_layers(model, data)

# %% 5b. Overfitting a few batches
# The lab: a boolean overfit_batch, with which training learns a few batches by heart until
# the loss is close to 0; a network that cannot do that most likely has a fault between data,
# loss and gradient. The boolean is --overfit-batch, the loop `overfit`: plain Adam on four
# fixed batches, dropout, masking and label smoothing off, since they are there to prevent it.
step.heading("5b. Overfitting a few batches")
loss_fn = nn.CrossEntropyLoss()
check = overfit(
    model, data, loss_fn, lr=step.args.lr, batch_size=step.args.batch_size, device=step.device
)
step.table(pd.DataFrame([check.facts], index=[names[0]]).rename_axis("LSTM"))
caption = "Training loss on up to four fixed batches of training crops, regularisation off"
step.figure(plot_overfit({names[0]: check}), "overfit", caption)
step.require(check.learned, f"four batches were not learned by heart: {check.facts}")
if step.args.overfit_batch:
    step.finish(overfit={names[0]: check.facts})

# %% 5c-f. One LSTM per kind of input, the same recipe
# The lab: c) mel spectrograms, d) beat-synchronised ones, e) chromagrams, f) both; Adam;
# the validation set to train by. AdamW is Adam whose weight decay does not pass through
# the moving averages (Loshchilov & Hutter, 2019). Label smoothing .1 keeps the network
# from growing certain about clips it has right already. Of the last fifth of the epochs
# the best by validation macro-F1 is kept: an earlier peak, the best of many while the rate
# is still high, is partly chance.
step.heading("5c-f. One LSTM per kind of input")
smoothing = 0.0 if step.args.plain else 0.1
recipe = {
    "make_model": classifier,
    "make_loss": lambda data: nn.CrossEntropyLoss(label_smoothing=smoothing),
    "optimizer": torch.optim.Adam if step.args.plain else torch.optim.AdamW,
}
runs = fit_all(step.training, [Run(name, GENRE_RUNS[name], **recipe) for name in names])

step.text("""
Training: AdamW (weight decay .01), one-cycle rate, gradients clipped to norm 1, cross-entropy with
label smoothing .1, mel bands shifted at random, masks, dropout; kept is the running average of the
weights. With `--plain` none of these but the rate schedule, clipping and dropout: Adam, plain
cross-entropy, the weights as they are.

The rows are not the same network on six inputs: what one step holds and what a training example is
differ as the columns say.
""")
ITEMS = {"mel": "5c", "beat_mel": "5d", "chroma": "5e", "beat_chroma": "5e", "plain_mel": "5c"}
hears = {}
for name, run in runs.items():
    network, crop = GENRE_RUNS[name], window_of(GENRE_RUNS[name])
    step_of = "1 beat: median" if network.beat else "8 frames: mean, sd, mean change"
    hears[name] = {
        "item": ITEMS.get(name, "5f"),
        "rows": network.features,
        "one step is": "1 frame" if network.plain else step_of,
        "trains on": f"crops of {crop} frames" if crop else "whole clips",
        "validates on": "windows of the clip" if crop else "whole clips",
        "weights": run.facts["weights"],
        "epochs (kept)": f"{run.facts['epochs']} ({run.facts['best_epoch']})",
        "seconds": round(run.facts["train_seconds"]),
        "val macro-F1": run.facts["val"]["macro_f1"],
    }
step.table(pd.DataFrame(hears).T.rename_axis("run"), "What each LSTM hears and how it trained")
step.figure(
    plot_histories({name: run.history for name, run in runs.items()}, "macro-F1"),
    "learning_curves",
    "Loss and validation macro-F1 against the epoch; the dot marks the epoch that was kept. "
    "Training loss is measured while the weights change, with the network's own regularisation; "
    "validation loss on their running average, without",
)

# %% Test scores. The test split is opened only now, when no choice is left to make.
# Answers are averaged over windows of the clip where crops were trained on.
step.heading("Scores on the test set")
step.text("""
Scored after logit adjustment: half the log of each class's share of the training clips is
subtracted from its logit, which raises rare classes most (Menon et al., 2021); not with `--plain`.
Models of beats are scored on the beat-synchronised test set.
""")
rows, scores = [], {}
for name, run in runs.items():
    test = load_test(step.source, run.settings)
    answers = answer(run.model, test, run.settings, step.device)
    true = truth(test, run.settings)
    scores[name] = genre_scores(true, answers)
    test_set = test.store.entries[0].path.parts[-3]
    rows.append(prediction_rows(name, true, answers, test_set=test_set, seed=step.args.seed))
write_predictions(step.folder, rows)
table = {
    name: {
        "test set": "beats" if GENRE_RUNS[name].beat else "frames",
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
