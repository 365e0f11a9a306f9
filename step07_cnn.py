"""Step 7: a 2D convolutional network that reads the spectrogram as an image.

The lab asks: a) train a CNN on handwritten digits and look at the activations of every
layer; b) a CNN of four layers, each convolution, batch normalisation, ReLU, max pooling,
trained with the training and validation sets and scored on the test set; c) what these
operations do; d) the overfit check of step 5b; e) genre recognition with this network,
compared with the LSTM of step 5a.

    python step07_cnn.py --overfit-batch  # only 7d: learn four batches by heart, in seconds
    python step07_cnn.py                  # all of it
    python step07_cnn.py --ensemble       # also the average of three such networks and an LSTM

Input: the genre data set; the LSTMs of step 5 (the one on mel is trained here if it is
missing); for a), scikit-learn's digits. Output, in outputs/step07_cnn/: a checkpoint and a
history, figures and test scores (summary.md, metrics.json), each test clip's true and
predicted class (predictions.csv). What decides a prediction: python -m tools.explain.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--ensemble").
import copy

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn

from common import (
    Classifier,
    CNNBackbone,
    Experiment,
    average_frames,
    count_weights,
    genre_models,
    genre_val_scores,
    layer_table,
    load_data,
    load_test,
    predict_clips,
    train,
    train_all,
    true_labels,
)
from patrec.features import HOP, SR
from patrec.files import part_folder
from patrec.machine import seed_everything
from patrec.plots import (
    plot_activations,
    plot_confusions,
    plot_histories,
    plot_operations,
    plot_overfit,
    plot_per_class,
)
from patrec.recipes import GENRE_NETWORKS, LSTM_NAMES, OVERFIT_PASSES, Recipe, window_size
from patrec.scores import average_predictions, genre_scores, paired_difference
from patrec.splits import split_indices
from patrec.step import Step
from patrec.tables import difference_line, prediction_rows, with_interval, write_predictions


def add_flags(parser):
    averaged = "train with three seeds; score their average too, alone and with an LSTM"
    parser.add_argument("--ensemble", action="store_true", help=averaged)


def learn_by_heart(step, data):
    """7d: a new network of this step on four fixed batches; returns what metrics.json keeps."""
    step.heading("7d. Overfitting a few batches")
    seed_everything(step.args.seed)
    model = Classifier(CNNBackbone(), n_classes=len(data.names)).to(step.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=step.args.lr)
    recipe = Recipe(OVERFIT_PASSES, step.args.lr, step.args.batch_size)
    loss_fn = nn.CrossEntropyLoss()  # with label smoothing the loss could not come near 0
    check = train(model, data, loss_fn, optimizer, recipe, device=step.device, overfit_batch=True)
    facts = check.facts
    step.table(pd.DataFrame([facts], index=["cnn_mel"]).rename_axis("CNN"))
    step.text(f"""
    {facts["clips"]} clips in {facts["batches"]} fixed batches, Adam at a constant rate, no dropout,
    augmentation or label smoothing, which are there to prevent this. The goal is a loss under .01
    with every clip right. After {facts["passes"]} passes the loss is {facts["loss"]:.4f}.
    """)
    caption = "Training loss on fixed batches of training crops, regularisation off"
    step.figure(plot_overfit({"cnn_mel": check}), "overfit", caption)
    step.require(check.learned, f"four batches were not learned by heart: {check.facts}")
    return {"cnn_mel": check.facts}


step = Step("step07_cnn", __doc__, parts=("genre",), training=True, add_flags=add_flags)
network = GENRE_NETWORKS["cnn_mel"]
data = load_data(step.source, network.features, crop=window_size(network))
# The cells keep the lab's order, in which the check (d) follows the training (b). With
# --overfit-batch only the check runs; do that after every change of the network.
if step.args.overfit_batch:
    step.finish(overfit=learn_by_heart(step, data))

# %% 7a. A CNN on handwritten digits, layer by layer
# The lab: train one in ConvNetJS and put screenshots of its activations into the report.
# A script cannot take them. So it says how to do it, and repeats the experiment on scikit-learn's
# 8 x 8 digits with the four operations of 7b.
step.heading("7a. A CNN on handwritten digits, layer by layer")
step.text("""
> **✎ Screenshots of ConvNetJS go here.** Open
> <https://cs.stanford.edu/people/karpathy/convnetjs/demo/mnist.html>. The training starts by itself
> as soon as the digits are loaded.
>
> 1. The network is in the text field under the loss curve (ConvNetJS has no batch normalisation):
>    convolution of 8 filters 5 x 5, ReLU, pooling 2 x 2, convolution of 16 filters, ReLU, pooling
>    3 x 3, softmax. *change network* restarts the training with the network in that field.
> 2. Press *pause* in the first seconds. Take a screenshot of *Network Visualization* and one of
>    *Training Stats* (examples seen, validation accuracy).
> 3. Press *resume*, wait for about 20,000 examples, press *pause*, and take both again.
> 4. Look, layer by layer, at the *Weights* of the first convolution (strokes and edges, or noise?),
>    at its *Activations* beside the input, at what relu turns black, at how small pool makes the
>    maps, at the probabilities of softmax, and, at the bottom of the page, at the digits that are
>    confused.
""")

# %% 7a. The same experiment here: a small network on small digits
# Two blocks of the very operations of 7b. The test digits are never trained on.
OPERATIONS = ("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d")  # of one block, in the lab's order


def digit_cnn(without=None):
    """Two blocks for 8 x 8 pixels, one of OPERATIONS left out (a convolution becomes 1 x 1)."""
    kernel = 1 if without == "Conv2d" else 3
    side = 8 if without == "MaxPool2d" else 2

    def block(c_in):
        first = nn.Conv2d(c_in, 8, kernel, padding=kernel // 2)
        rest = (nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(first, *(part for part in rest if type(part).__name__ != without))

    return nn.Sequential(block(1), block(8), nn.Flatten(), nn.Linear(8 * side**2, 10))


def train_digits(parts, seed, n_epochs, without=None):
    """Train a digit_cnn on parts = (x_train, y_train, x_test, y_test), x of shape (N, 1, 8, 8).

    Returns {epoch: model} of epochs 0, 1 and the last, and the test accuracy after every epoch.
    """
    x_train, y_train, x_test, y_test = parts
    seed_everything(seed)
    model, models, accuracy = digit_cnn(without), {}, []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    for epoch in range(n_epochs + 1):
        for rows in torch.randperm(len(x_train)).split(64) if epoch else ():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x_train[rows]), y_train[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append(float((model.eval()(x_test).argmax(1) == y_test).float().mean()))
        if epoch in (0, 1, n_epochs):
            models[epoch] = copy.deepcopy(model)
    return models, accuracy


@torch.no_grad()
def activations(blocks, x):
    """Every operation's output: image (B, 1, h, w) -> {(block, operation): (B, C, ., .)}."""
    outputs = {}
    for place, block in enumerate(blocks, start=1):
        for operation in block:
            x = operation(x)
            outputs[place, type(operation).__name__] = x
    return outputs


images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
known, tested = split_indices(len(images), 0.2, step.args.seed, labels)
digits = (x[known], torch.tensor(labels)[known], x[tested], torch.tensor(labels)[tested])
n_epochs, n_seeds = (3, 1) if step.args.smoke else (15, 3)
digit_models, accuracy = train_digits(digits, step.args.seed, n_epochs)
step.text(f"""
The same experiment here: two blocks of the four operations of 7b and an output layer
({count_weights(digit_models[0])} weights), trained on {len(known)} of scikit-learn's digits.
Accuracy on the other {len(tested)}: {accuracy[0]:.3f} untrained, {accuracy[1]:.3f} after one epoch,
{accuracy[-1]:.3f} after {n_epochs}.
""")

# %% 7a. One digit through every layer
# What to see: which strokes a filter responds to, what ReLU removes, how pooling makes the maps
# coarser, and how the probabilities change from column to column.
digit = digits[2][:1]
columns = {}
for epoch, model in digit_models.items():
    maps = {"input": digit[0], "filters 1": model[0][0].weight[:, 0].detach()}
    found = activations(model[:2], digit)
    maps |= {f"{name} {block}": values[0] for (block, name), values in found.items()}
    chances = model(digit)[0].softmax(0).detach()
    columns[f"epoch {epoch}: test accuracy {accuracy[epoch]:.3f}"] = maps, chances
caption = (
    "One test digit through the network, top to bottom: before, early in and after training. "
    "Red is positive, blue negative, white zero; the number at the right is the darkest colour"
)
step.figure(plot_activations(columns, int(digits[3][0])), "digit_activations", caption)

# %% 7b. The network
# The lab: four layers of convolution, batch normalisation, ReLU and max pooling on the
# spectrogram as an image of one channel, trained with the training and validation sets, scored
# on the test set. Kernel and channels are usual values, as the lab advises.
step.heading("7b. The network, its training, its test score")
step.text("""
The input is a random crop of 6 s; two frames are averaged into one column of the image. Each block
is convolution, batch normalisation, ReLU and max pooling, in this order, in one `nn.Sequential`.
After the fourth block the channels are pooled over time (mean and maximum), but not over
frequency. One dense layer gives one output (logit) per class.
""")
model = Classifier(CNNBackbone(), n_classes=len(data.names)).to(step.device)
step.show_source(CNNBackbone, Classifier)
step.table(*layer_table(model, data))

# %% 7b. The training
# With the recipe of step 5: AdamW, one-cycle rate, label smoothing, averaged weights, and the best
# of the last fifth of the epochs by validation macro-F1. The CNN's augmentation has mixup too.
seeds = [step.args.seed + i for i in range(3 if step.args.ensemble else 1)]
recipe = {
    "make_model": lambda network, data: Classifier(CNNBackbone(), n_classes=len(data.names)),
    "make_loss": lambda data: nn.CrossEntropyLoss(label_smoothing=0.1),
    "optimizer": torch.optim.AdamW,
}
trainings = [Experiment("cnn_mel", network, **recipe)]
for seed in seeds[1:]:  # --ensemble: other weights, batches and validation clips
    trainings.append(Experiment(f"cnn_mel_seed{seed}", network, **recipe, seed=seed))
runs = train_all(step.training, trainings)
cnn = runs["cnn_mel"]
step.text(f"""
Trained on {cnn.facts["n_train"]} clips for {cnn.facts["epochs"]} of {cnn.facts["planned_epochs"]}
planned epochs of {cnn.facts["examples_per_epoch"]:,} crops each, with AdamW (Loshchilov & Hutter,
2019), a one-cycle learning rate of at most {cnn.facts["lr"]:g}, batches of
{cnn.facts["batch_size"]}, and cross-entropy with label smoothing .1, so the loss does not reward
extreme confidence. We keep the running average of the weights after epoch
{cnn.facts["best_epoch"]}: among the last 20% of the epochs it has the highest macro-F1 on the
{cnn.facts["n_val"]} validation clips, {cnn.facts["val"]["macro_f1"]:.3f}, an optimistic estimate.
""")
caption = (
    "Loss and validation macro-F1 by epoch. The dot marks the epoch that was kept, from the shaded "
    "last ones. Only the training loss is measured with augmentation and dropout"
)
histories = {name: run.history for name, run in runs.items()}
step.figure(plot_histories(histories, "macro-F1"), "learning_curve", caption)

# %% 7b. Its performance on the test set
# The test set is read only now, when the network is finished; the LSTMs that 7e may have to train
# do not depend on it. Predictions are log-probabilities, a row per test clip.
predicted, true = {}, {}


def predict_test(runs):
    """Predict the test clips with some trained genre networks."""
    for name, run in runs.items():
        test = load_test(step.source, run.settings)
        predicted[name] = predict_clips(run.model, test, run.settings, step.device)
        true[name] = true_labels(test, run.settings)


predict_test(runs)
cnn_scores = genre_scores(true["cnn_mel"], predicted["cnn_mel"])
step.text(f"""
On the {cnn_scores["n_clips"]} test clips: accuracy {with_interval(cnn_scores, "accuracy")},
macro-F1 {with_interval(cnn_scores, "macro_f1")} (95% intervals over test clips, for one training
seed).
""")

# %% 7c. What the four operations do
# The lab: function and role of convolution, batch normalisation, ReLU and max pooling. Each is
# seen at work twice: in the small network of 7a, trained again without that operation
# (the convolution reduced to 1 x 1), and in the trained genre network.
step.heading("7c. What the four operations do")
left_out = {}
variants = {"all four operations": None, "1 x 1 convolutions": "Conv2d"}
variants |= {f"without {name}": name for name in OPERATIONS[1:]}
for label, without in variants.items():
    twins = [train_digits(digits, step.args.seed + i, n_epochs, without) for i in range(n_seeds)]
    last = np.array([scores[-1] for _, scores in twins])  # (seeds,)
    left_out[label] = {
        "test accuracy": f"{last.mean():.3f} ± {last.std(ddof=min(1, n_seeds - 1)):.3f}",
        "weights": str(count_weights(twins[0][0][0])),
    }
caption = f"Digits, {n_epochs} epochs: one operation left out, mean ± sd of {n_seeds} seeds"
step.table(pd.DataFrame(left_out).T.rename_axis("digit CNN"), caption)

# %% 7c. The trained genre network at work
# Validation clips, the middle of each, are taken through the four blocks operation by operation.
backbone = copy.deepcopy(cnn.model.backbone).cpu().eval()
clips = [data.val[i] for i in range(min(32, len(data.val)))]
n_frames = min(cnn.settings["window"], *(int(length) for _, _, length in clips))  # no padding
x = torch.stack([x[(n - n_frames) // 2 :][:n_frames].cpu() for x, _, n in clips])  # (B, T, F)
lengths = torch.full((len(x),), n_frames)
image = average_frames(x, lengths, backbone.frames_per_step)[0].unsqueeze(1)  # (B, 1, T', F)
maps = activations(backbone.blocks, image)
seconds, column_s = n_frames * HOP / SR, backbone.frames_per_step * HOP / SR

first = {name: maps[1, name] for name in OPERATIONS}  # {operation: (B, C, t, f)}
fig = plot_operations(first, int(first["ReLU"][0].flatten(1).std(1).argmax()), seconds)
caption = (
    "The operations of block 1, left to right. Above: one channel of the same clip (bands x "
    f"columns; red positive, blue negative). Below: all values of all channels and {len(x)} clips"
)
step.figure(fig, "block_operations", caption)

# %% 7c. The four operations in numbers and in words
# The receptive field: a kernel of k cells adds k - 1 cells of its own layer to it, a pooling by p
# adds p - 1 of them, and after that pooling neighbouring cells lie p times as far apart.
operations = {}
field, stride = np.array([1, 1]), np.array([1, 1])  # of a cell and to the next: columns, bands
for place, block in enumerate(backbone.blocks, start=1):
    conv, norm, relu, pool = (maps[place, name] for name in OPERATIONS)  # (B, C, t, f)
    kernel, pooled = (np.array(block[i].kernel_size) for i in (0, 3))
    field, stride = field + (kernel + pooled - 2) * stride, stride * pooled
    sds = [values.std((0, 2, 3)).sort().values for values in (conv, norm)]
    operations[place] = {
        "bands x columns after pooling": f"{pool.shape[3]} x {pool.shape[2]}",
        "receptive field of a cell": f"{field[1]} bands, {field[0] * column_s:.1f} s",
        "channel sds before BN": f"{sds[0][0]:.2f} to {sds[0][-1]:.2f}",
        "channel sds after BN": f"{sds[1][0]:.2f} to {sds[1][-1]:.2f}",
        "zeros after ReLU": f"{(relu == 0).float().mean():.0%}",
        "zeros after pooling": f"{(pool == 0).float().mean():.0%}",
    }
caption = f"Genre network, in scoring mode, on {seconds:.1f} s of each of {len(x)} validation clips"
step.table(pd.DataFrame(operations).rename_axis("block"), caption)
step.text("""
**Convolution** takes a weighted sum over a small neighbourhood in time and frequency and over all
input channels, with the same weights at every place. So a pattern is found wherever it occurs, and
few weights are enough. A 1 x 1 convolution mixes channels but sees no neighbours.

**Batch normalisation** brings each channel to mean 0 and standard deviation 1 over the batch and
all places, then scales and shifts it by two learned numbers; scoring uses averages from training,
so the table's "after BN" may differ from 1. The activations keep a steady size, which allows higher
learning rates (Ioffe & Szegedy, 2015); why it works is still debated (Santurkar et al., 2018).

**ReLU** sets negative values to zero: a channel shows where its pattern is and is zero elsewhere.
It makes the network non-linear. Convolutions in a row without it are only one linear map.

**Max pooling** keeps the largest of neighbouring values. The next block has fewer cells to compute,
and each of them sees more of the clip (row "receptive field"). Where exactly a pattern was is lost.

On the digits, leaving out pooling or ReLU may cost nothing. The images have only 8 x 8 cells, so
pooling has little to summarise, and without it the output layer has more weights. Without ReLU, max
pooling still makes the network non-linear.
""")

# %% 7d. Overfitting a few batches
# The lab: the check of step 5b for this network, to make sure that it can be trained.
check_facts = learn_by_heart(step, data)

# %% 7e. Genre recognition, compared with the LSTM of step 5a
# The lab: compare with the LSTM on the same input. The best LSTM of step 5, by validation
# macro-F1, is shown too.
step.heading("7e. Genre recognition, compared with the LSTM of step 5a")
lstms = genre_models(step.training, ["mel"])
best_lstm = next(name for name in genre_val_scores(step.training).index if name in LSTM_NAMES)
lstms |= genre_models(step.training, {best_lstm} - {"mel"})
predict_test(lstms)
members = {}
if step.args.ensemble:  # log-probabilities are averaged, clip by clip
    members = {"cnn_ensemble": list(runs), "cnn_lstm_ensemble": [*runs, best_lstm]}
    predicted["cnn_ensemble"] = average_predictions(predicted[name] for name in runs)
    both = [predicted["cnn_ensemble"], predicted[best_lstm]]
    predicted["cnn_lstm_ensemble"] = average_predictions(both)
    true |= dict.fromkeys(members, true["cnn_mel"])
scores = {name: genre_scores(true[name], table) for name, table in predicted.items()}
settings = {name: run.settings for name, run in (runs | lstms).items()}
rows, test_sets = [], {}
for name, table in predicted.items():
    made = settings.get(name, {"beat": False, "seed": ""})  # an average has no seed of its own
    test_sets[name] = part_folder(".", "genre", made["beat"]).name
    where = {"test_set": test_sets[name], "seed": made["seed"]}
    rows.append(prediction_rows(name, true[name], table, **where))
write_predictions(step.folder, rows)

# %% 7e. The scores, and what else is different between the models
table = {}
for name, run in (runs | lstms).items():
    crop = window_size(GENRE_NETWORKS.get(name, network))  # further seeds: the same network
    facts, length = run.facts, f"{crop * HOP / SR:.0f} s" if crop else "whole clips"
    table[name] = {
        "test set": test_sets[name],
        "training examples": f"{facts['epochs'] * facts['examples_per_epoch']:,} ({length})",
        "epochs (planned)": f"{facts['epochs']} ({facts['planned_epochs']})",
        "weights": f"{facts['weights']:,}",
        "val macro-F1": facts["val"]["macro_f1"],
    }
for name in scores:
    table.setdefault(name, {"test set": test_sets[name]})
    table[name]["test accuracy"] = with_interval(scores[name], "accuracy")
    table[name]["test macro-F1"] = with_interval(scores[name], "macro_f1")
caption = f"{cnn_scores['n_clips']} test clips, with 95% intervals over the clips"
step.table(pd.DataFrame(table).T.fillna("-").rename_axis("model"), caption)
step.text("""
More than the network differs: the CNN is trained on shorter and usually more examples (see the
table), with mixup of two clips (Zhang et al., 2018). Both are scored with the mean over overlapping
windows of a clip (an LSTM of beats reads the whole clip) and with logit adjustment: half the log of
each class's share of the training clips is subtracted from its logit (after Menon et al., 2021).
""")
seed_spread = {}
if step.args.ensemble:
    for key in ("accuracy", "macro_f1"):
        values = [scores[name][key] for name in runs]
        seed_spread[key] = {"mean": np.mean(values), "sd": np.std(values, ddof=1)}
    caption = (
        "Test scores of the CNN over three training seeds. `cnn_ensemble` averages their "
        f"log-probabilities, `cnn_lstm_ensemble` is the mean of that average and `{best_lstm}`"
    )
    step.table(pd.DataFrame(seed_spread).T.rename_axis("score"), caption)

# %% 7e. Differences on the same clips, and class by class
step.text("Paired differences on the same clips; 95% intervals over test clips, for one training.")
paired = {}
for name in lstms:
    paired[name] = paired_difference(true["cnn_mel"], predicted["cnn_mel"], predicted[name])
    step.text(f"""
    {difference_line("cnn_mel", name, paired[name])}. Right only in `cnn_mel`:
    {paired[name]["only_first"]} clips, only in `{name}`: {paired[name]["only_second"]}.
    """)

shown = {name: scores[name] for name in ("cnn_mel", *lstms)}
tables = {name: pd.DataFrame(facts["per_class"]).T for name, facts in shown.items()}
per_class = pd.concat(tables, axis=1)
table = per_class.drop(columns="support", level=1)
table.columns = [" ".join(column) for column in table.columns]
table["clips"] = per_class["cnn_mel", "support"].astype(int)
step.table(table.rename_axis("class"), "Per class, on the test set")
caption = "F1 per class, CNN and LSTM; in a class of few test clips, one clip moves the bar a lot"
step.figure(plot_per_class(shown), "per_class", caption)
caption = "Confusion matrices on the test set: colour is the share of the true class, numbers clips"
step.figure(plot_confusions(shown, data.names), "confusion", caption)

# %% What later steps and the report read
results = {name: run.facts | {"test": scores[name]} for name, run in (runs | lstms).items()}
averages = {name: {"members": of, "test": scores[name]} for name, of in members.items()}
step.finish(
    {name: results[name] for name in runs} | averages,
    compared_with={name: results[name] for name in lstms},
    paired_difference=paired,
    seed_spread=seed_spread,
    overfit=check_facts,
    digits={"accuracy": accuracy, "left_out": left_out, "n_seeds": n_seeds},
    operations=operations,
)
