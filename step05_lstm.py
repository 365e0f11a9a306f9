"""Step 5: music genre recognition with LSTMs.

The lab asks: a) adjust the LSTM of the second lab, so that it takes the spectrograms of step 4's
Dataset; b) a boolean parameter `overfit_batch` of train(), to check on a few batches that the
network can learn; an LSTM c) on mel spectrograms, d) on beat-synchronised mel spectrograms, e) on
chromagrams, f) on both together.

    python step05_lstm.py                          # all six LSTMs, default settings
    python step05_lstm.py --features mel beat_mel  # two of them
    python step05_lstm.py --overfit-batch          # only 5b
    python step05_lstm.py --plain                  # the textbook LSTM, for comparison

Input: the genre data set. Output, in outputs/step05_lstm/: a checkpoint and a history per LSTM,
learning curves and test scores (summary.md, metrics.json), each test clip's true and predicted
class (predictions.csv).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--features mel --epochs 20").
import torch
from torch import nn

import common
from patrec.files import part_folder
from patrec.machine import seed_everything
from patrec.plots import plot_histories, plot_overfit, run_title
from patrec.recipes import GENRE_NETWORKS, LSTM_NAMES, OVERFIT_PASSES, Recipe, window_size
from patrec.scores import genre_scores
from patrec.step import Step
from patrec.tables import (
    SECONDS,
    genre_table,
    parts_table,
    prediction_rows,
    training_table,
    write_predictions,
)


def add_flags(parser):
    lstms = {"nargs": "+", "choices": LSTM_NAMES, "default": LSTM_NAMES}
    parser.add_argument("--features", help="which LSTMs to train (default: all six)", **lstms)
    textbook = "every frame, two layers, one direction, last step"
    parser.add_argument("--plain", action="store_true", help=f"the textbook LSTM: {textbook}")


step = Step("step05_lstm", __doc__, parts=("genre",), training=True, add_flags=add_flags)
names = ["plain_mel"] if step.args.plain else step.args.features

# %% 5a. An LSTM for the spectrograms of step 4's Dataset
# The lab: adjust the LSTM of the second lab. Step 2 measures what it costs to read every frame.
step.heading("5a. An LSTM for the spectrograms of step 4's Dataset")
step.text("""
A textbook LSTM, as you may have it from the second lab, reads one frame per time step, with two
layers in one direction, and predicts the class from its output at the last time step. `--plain`
trains such an LSTM. Its input is what the Dataset returns: a batch of spectrograms of shape (clips,
time steps, bands), and their lengths. It needs the lengths to leave out the padding. It has as many
inputs as a spectrogram has bands (128 mel, 12 chroma, 140 both) and as many outputs as there are
classes. Here four things are changed:

1. Eight frames make one time step. It holds the mean, the standard deviation and the mean absolute
   change of every band (`frame_statistics`). A sequence of all frames takes long to train on, and
   one frame (93 ms, every 23 ms) says little. In beat-synchronised input, one beat is one time
   step.
2. Means, deviations and changes have different ranges of values, so each of these features is
   standardised (`StepNorm`). Beats do not need this: their only features are the bands, which the
   Dataset has standardised already. Then a dense layer with layer normalisation comes before the
   LSTM (`stem`).
3. One layer reads the clip in both directions (`blocks`), instead of two layers in one direction.
4. The class is predicted from the mean and the maximum of the LSTM's outputs over all time steps of
   the clip (`masked_mean_max`), because every part of a clip tells something about its genre.
   Padding after a shorter clip is not counted. This has no weights and no row in the table below.
""")

network = GENRE_NETWORKS[names[0]]
data = common.load_data(step.source, network.features, network.beat, crop=window_size(network))
seed_everything(step.args.seed)
model = common.make_classifier(network, data).to(step.device)
step.show_source(
    common.make_backbone, common.LSTMBackbone, common.frame_statistics, common.masked_mean_max
)
step.table(*common.layer_table(model, data))

# %% 5b. Overfitting a few batches
# The lab: a boolean parameter overfit_batch of train(). If it is True, a few batches are learned
# until the loss is close to 0. A network that cannot do that most likely has a fault.
step.heading("5b. Overfitting a few batches")
step.show_source(common.train, common.train_epoch, common.overfit)
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=step.args.lr)
recipe = Recipe(OVERFIT_PASSES, step.args.lr, step.args.batch_size)
options = {"device": step.device, "overfit_batch": True}
check = common.train(model, data, loss_fn, optimizer, recipe, **options)
facts = check.facts
step.text(f"""
    With `overfit_batch=True`, `train` learns {facts["clips"]} clips in {facts["batches"]} fixed
    batches. Dropout and the shift of the bands are off, because they prevent overfitting. The goal
    is a loss under .01 with every clip classified correctly. After {facts["passes"]} passes the
    loss is {facts["loss"]:.5f}, the accuracy {facts["accuracy"]:.3f}. A loss close to 0 means that
    the gradients reach the weights and the network can be trained. Wrong labels would not be
    noticed, because they can be learned by heart too.
""")
caption = f"Training loss on the {facts['batches']} fixed batches, without regularisation"
step.figure(plot_overfit({names[0]: check}), "overfit", caption)
step.require(check.learned, f"the network did not overfit {facts['batches']} batches: {facts}")
if step.args.overfit_batch:
    step.finish(overfit={names[0]: facts})

# %% 5c-f. One LSTM per kind of input
# The lab: c) mel spectrograms, d) beat-synchronised ones, e) chromagrams, f) both together. There
# is one Experiment per kind of input, all with the same recipe.
step.heading("5c-f. One LSTM per kind of input")
recipe = {
    "make_model": common.make_classifier,
    "make_loss": lambda data: nn.CrossEntropyLoss(),
    "optimizer": torch.optim.Adam,
}
trainings = [common.Experiment(name, GENRE_NETWORKS[name], **recipe) for name in names]
runs = common.train_all(step.training, trainings)
facts = runs[names[0]].facts
step.text(f"""
    The labelled clips are split at random, class by class (in `load_data`): {facts["n_train"]} for
    training, {facts["n_val"]} for validation. Each part is a `torch.utils.data.Subset`. For quick
    trials, `--subset N` trains on a Subset of N clips.

    - *Optimiser*: Adam with a constant learning rate of {facts["lr"]:g}.
    - *Loss*: cross-entropy. Dropout is applied before the output layer.
    - *Epoch*: we keep the epoch with the highest validation macro-F1 among {step.searched}. The
      best of all epochs can be an early one by chance, because the validation clips are few. We
      compared both rules in cross-validation of the LSTM on mel. On new clips, the best of *all*
      epochs had a macro-F1 .08 lower than the best of the last 20% (docs/experiments.md). The
      validation score of the kept epoch is optimistic, because it is the highest of several.

    The default recipe is Adam, cross-entropy, dropout, random crops and the parts in the table.
    `--recipe lab` leaves out the parts in the table and keeps the best of all epochs, so you can
    measure the difference on your clips. `--plain` leaves them out too. The parts lower the log
    loss of the LSTM; no effect on its macro-F1 was shown.
""")
step.table(*parts_table("lstm"))
step.table(training_table(runs, "macro-F1"), SECONDS)
step.text(f"""
    The networks of the lab's items:

    - 5c, mel spectrograms: `mel`
    - 5d, beat-synchronised mel spectrograms: `beat_mel`
    - 5e, chromagrams: `chroma`, and with beats `beat_chroma`
    - 5f, mel spectrograms and chromagrams together: `fused`, and with beats `beat_fused`

    In figures, `beat_fused` is called *{run_title("beat_fused")}*, and so on. The networks are
    trained on random crops of {window_size(GENRE_NETWORKS["mel"])} frames (15 s) or
    {window_size(GENRE_NETWORKS["beat_mel"])} beats. An epoch takes
    {facts["examples_per_epoch"] // facts["n_train"]} crops of each clip. (`--plain` trains
    `plain_mel` on whole clips, with one frame per time step.)
""")
step.figure(
    plot_histories({name: run.history for name, run in runs.items()}, "macro-F1"),
    "learning_curves",
    f"Loss and validation macro-F1 by epoch. {step.curves}",
)

lowest = {name: run.history.loc[run.history["val_loss"].idxmin()] for name, run in runs.items()}
lines = [
    f"{row['epoch']:.0f} of {len(runs[name].history)} for `{name}`" for name, row in lowest.items()
]
step.text(f"The validation loss is lowest at epoch {', '.join(lines)}.")
late = [name for name, row in lowest.items() if row["epoch"] > 0.8 * len(runs[name].history)]
last = {name: run.history.iloc[-1] for name, run in runs.items()}
overfits = [n for n in names if n not in late and last[n]["train_loss"] < lowest[n]["train_loss"]]
if overfits:
    step.text(f"""
        After its lowest point the validation loss rises while the training loss still falls, for
        {", ".join(f"`{name}`" for name in overfits)}. This is overfitting: the network becomes too
        confident on clips that it has not seen. The predicted classes can still become better, so
        the epoch is chosen by macro-F1.
    """)
if late:
    step.text(f"""
        The lowest validation loss of {", ".join(f"`{name}`" for name in late)} is among the last
        20% of the epochs, so more epochs may help.
    """)

# %% Test scores
# The test clips are read only now, when no choice is left to make.
step.heading("Scores on the test set")
step.text("""
LSTMs of beats are scored on the beat-synchronised test set, the others on the full one. A test clip
is cut into windows as long as the training crops. Together the windows cover the whole clip, and
their outputs are averaged. Step 6 compares the LSTMs on the same clips.
""")
rows, scores = [], {}
for name, run in runs.items():
    test = common.load_test(step.source, run.settings)
    predictions = common.predict_clips(run.model, test, run.settings, step.device)
    true = common.true_labels(test, run.settings)
    test_set = part_folder(".", "genre", run.settings["beat"]).name
    rows.append(prediction_rows(name, true, predictions, test_set=test_set, seed=step.args.seed))
    scores[name] = genre_scores(true, predictions)
write_predictions(step.folder, rows)
caption = "Test scores with 95% intervals, which show how much a score depends on the test clips"
step.table(genre_table(scores), caption)
step.finish(
    {name: run.facts | {"test": scores[name]} for name, run in runs.items()},
    overfit={names[0]: check.facts},
)
