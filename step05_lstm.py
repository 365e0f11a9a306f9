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
# Dataset. The text says what changed and why; step 2 measures what full-length sequences cost.
step.heading("5a. An LSTM that reads the spectrograms of step 4's Dataset")
step.text("""
A clip is a sequence of frames, and a frame holds the values of its bands. Compared with a textbook
LSTM, four things are different:

- Eight frames make one time step. The step holds the mean, the standard deviation and the mean
  absolute change of every band, because a sequence of all frames takes long to train on and one
  frame of 23 ms says little. In beat-synchronised input one beat is one time step.
- A dense layer with layer normalisation comes before the LSTM.
- The LSTM reads the sequence in both directions.
- The class is predicted from the mean and the maximum of its outputs over the time steps of the
  clip, not from the last step, which is padding in a shorter clip. There is one output (logit) per
  class.

`--plain` trains the textbook LSTM: every frame, one direction, read at the last step of the clip.
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
# The lab: a boolean parameter overfit_batch of train(). If it is True, a few batches are learned
# until the loss is close to 0. A network that cannot do that most likely has a fault in its data,
# loss or gradients. On the command line it is --overfit-batch.
step.heading("5b. Overfitting a few batches")
step.show_source(train, train_epoch, overfit)
loss_fn = nn.CrossEntropyLoss()  # no label smoothing, with which it could not come near 0
optimizer = torch.optim.Adam(model.parameters(), lr=step.args.lr)
recipe = Recipe(OVERFIT_PASSES, step.args.lr, step.args.batch_size)
check = train(model, data, loss_fn, optimizer, recipe, device=step.device, overfit_batch=True)
step.table(pd.DataFrame([check.facts], index=[names[0]]).rename_axis("LSTM"))
facts = check.facts
step.text(f"""
With `overfit_batch=True`, `train` learns {facts["clips"]} clips in {facts["batches"]} fixed batches
by heart, with Adam at a constant learning rate. Dropout, masking and label smoothing are off, since
they are there to prevent exactly this. The goal is a loss under .01 with every clip classified
correctly. After {facts["passes"]} passes the loss is {facts["loss"]:.4f}.
""")
caption = "Training loss on fixed batches of training crops, regularisation off"
step.figure(plot_overfit({names[0]: check}), "overfit", caption)
step.require(check.learned, f"four batches were not learned by heart: {check.facts}")
if step.args.overfit_batch:
    step.finish(overfit={names[0]: check.facts})

# %% 5c-f. One LSTM per kind of input, the same recipe
# The lab: c) mel spectrograms, d) beat-synchronised ones, e) chromagrams, f) both together;
# Adam; the validation set. There is one Experiment per kind of input, all with the same recipe.
# `load_data` splits the training clips with torch.utils.data.Subset; --subset N takes N of them.
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
- *Optimiser* (the lab asks for Adam): AdamW, which is Adam with a weight decay of .01 that does not
  pass through the moving averages (Loshchilov & Hutter, 2019). The learning rate rises over the
  first tenth of the updates and then falls to nearly 0 (one-cycle schedule). Gradients are clipped
  to norm 1.
- *Loss*: cross-entropy with label smoothing .1, so that the loss does not reward extreme
  confidence.
- *Augmentation*: mel bands are shifted up or down by up to 2, stripes of bands and time steps are
  set to the mean (SpecAugment), and dropout is used.
- *Weights*: a running average of the weights over about the last hundred updates is validated and
  saved.
- *Epoch*: we keep the epoch with the highest validation macro-F1 among the last 20% of the epochs.
  Earlier peaks can be due to chance, because the learning rate is still high. The best of several
  epochs is an optimistic estimate.

With `--plain` only the schedule, the clipping, dropout and the choice of the epoch are used: Adam,
plain cross-entropy, no average of the weights.

Where the validation loss rises while the training loss still falls, the network overfits. The six
rows differ in more than the kind of input: the columns say what a time step and a training example
are.
""")
ITEMS = {"mel": "5c", "beat_mel": "5d", "chroma": "5e", "beat_chroma": "5e", "plain_mel": "5c"}
rows = {}
for name, run in runs.items():
    network, crop = GENRE_NETWORKS[name], window_size(GENRE_NETWORKS[name])
    step_of = "1 beat: median" if network.beat else "8 frames: mean, sd, mean change"
    rows[name] = {
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
    f"Input and training of each LSTM: {first['n_train']} training clips, {first['n_val']} "
    "validation clips. Wall-clock seconds, with other trainings running in parallel"
)
step.table(pd.DataFrame(rows).T.rename_axis("run"), caption)
step.figure(
    plot_histories({name: run.history for name, run in runs.items()}, "macro-F1"),
    "learning_curves",
    "Loss and validation macro-F1 against the epoch. The dot marks the epoch that was kept among "
    "the shaded last fifth. The training loss is measured with dropout and augmentation, the "
    "validation loss without them",
)

# %% Test scores
# The test split is read only now, when no choice is left to make.
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
