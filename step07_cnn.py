"""Step 7: a 2D convolutional network that reads the spectrogram as an image.

The lab asks: a) train a CNN on handwritten digits and look at the activations of every
layer; b) a CNN of four layers, each convolution, batch normalisation, ReLU, max pooling,
trained with the training and validation sets and scored on the test set; c) what these
operations do; d) the overfit check of step 5b; e) genre recognition with this network,
compared with the LSTM of step 5a.

    python step07_cnn.py --overfit-batch  # only 7d: four batches by heart, in seconds
    python step07_cnn.py                  # all of it
    python step07_cnn.py --ensemble       # besides: three such networks averaged, and with an LSTM

Input: the genre data set; the LSTMs of step 5 (the one on mel is trained here where
there is none); for a), scikit-learn's bundled digits. Output, in outputs/step07_cnn/: a
checkpoint and a history, pictures of the network at work, test scores (summary.md,
metrics.json), each test clip's true and predicted class (predictions.csv).

Measured on a small set of real music (see README), seed 42, bf16, one thread, as in lab.py on
two cores, a Xeon with AMX, torch 2.13.0: test accuracy .669 [.599, .733], macro-F1 .638
[.550, .701] on 157 clips (over three seeds: README).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--ensemble").
import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn

from common import (
    Classifier,
    CNNBackbone,
    Experiment,
    adjust_logits,
    average_frames,
    build_model,
    clip_ids,
    count_weights,
    genre_models,
    genre_val_scores,
    layer_table,
    load_data,
    load_test,
    model_spec,
    predict_clips,
    train,
    train_all,
    true_labels,
)
from patrec.batches import cut_windows
from patrec.clips import sample_clips
from patrec.explain import (
    calibration_error,
    cell_ranks,
    clip_attributions,
    fit_temperature,
    integrated_gradients,
    patches,
    probability_curve,
)
from patrec.features import BANDS, DB_FLOOR, HOP, N_MELS, SR, mel_to_waveform
from patrec.machine import seed_everything
from patrec.plots import COLORS, plot_confusion, plot_histories, plot_overfit, plot_spectrogram
from patrec.recipes import (
    GENRE_NETWORKS,
    LSTM_NAMES,
    OVERFIT_PASSES,
    Recipe,
    make_augment,
    window_size,
)
from patrec.scores import (
    average_predictions,
    bootstrap,
    class_numbers,
    genre_scores,
    paired_difference,
    spearman,
)
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
    loss_fn = nn.CrossEntropyLoss()  # no label smoothing, with which it could not come near 0
    check = train(model, data, loss_fn, optimizer, recipe, device=step.device, overfit_batch=True)
    facts = check.facts
    step.table(pd.DataFrame([facts], index=["cnn_mel"]).rename_axis("CNN"))
    step.text(f"""
    {facts["clips"]} clips in {facts["batches"]} fixed batches, Adam at a constant rate, no dropout,
    augmentation or label smoothing, which are there to prevent this. Goal: a loss under .01 and
    every clip right; after {facts["passes"]} passes the loss is {facts["loss"]:.4f}.
    """)
    caption = "Training loss on fixed batches of training crops, regularisation off"
    step.figure(plot_overfit({"cnn_mel": check}), "overfit", caption)
    step.require(check.learned, f"four batches were not learned by heart: {check.facts}")
    return {"cnn_mel": check.facts}


step = Step("step07_cnn", __doc__, parts=("genre",), training=True, add_flags=add_flags)
network = GENRE_NETWORKS["cnn_mel"]
data = load_data(step.source, network.features, crop=window_size(network))
# The cells keep the lab's order, in which the check (d) follows the training (b). Asked for
# alone, it comes before everything else, as it should when the network was changed.
if step.args.overfit_batch:
    step.finish(overfit=learn_by_heart(step, data))

# %% 7a. A CNN on handwritten digits, layer by layer
# The lab: train one in ConvNetJS and put screenshots of its activations into the report.
# A script cannot take them, so it says how, and repeats the experiment on scikit-learn's
# 8 x 8 digits with the four operations of 7b: there every activation can be measured, before,
# early in and after training.
step.heading("7a. A CNN on handwritten digits, layer by layer")
step.text("""
> **✎ Screenshots of ConvNetJS go here.** Open
> <https://cs.stanford.edu/people/karpathy/convnetjs/demo/mnist.html>; it trains by itself as soon
> as the digits are loaded.
>
> 1. Paste the screenshots of 2. and 3. under this box. The network is in the text field under the
>    loss curve (ConvNetJS has no batch normalisation): convolution of 8 filters 5 x 5, ReLU,
>    pooling 2 x 2, convolution of 16 filters, ReLU, pooling 3 x 3, softmax. *change network*
>    begins again with what it says.
> 2. Press *pause* in the first seconds: screenshot of *Network Visualization*, and of *Training
>    Stats* (examples seen, validation accuracy).
> 3. Press *resume*, wait for some 20,000 examples, *pause*: the same screenshots again.
> 4. Look, layer by layer, at: the *Weights* of the first convolution (strokes and edges, or
>    noise?); its *Activations* beside the input; what relu turns black; how small pool makes the
>    maps, and what can still be recognised; how sure softmax is; at the bottom of the page, which
>    digits are taken for which.
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
    """Train a digit_cnn.

    Parameters
    ----------
    parts : (x_train, y_train, x_test, y_test), x of shape (N, 1, 8, 8)

    Returns
    -------
    {epoch: model} of epochs 0 (untrained), 1 and the last; test accuracy after every epoch
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
learnt, tested = split_indices(len(images), 0.2, step.args.seed, labels)
digits = (x[learnt], torch.tensor(labels)[learnt], x[tested], torch.tensor(labels)[tested])
n_epochs, n_seeds = (3, 1) if step.args.smoke else (15, 3)
digit_models, accuracy = train_digits(digits, step.args.seed, n_epochs)
step.text(f"""
The same experiment here: two blocks of convolution, batch normalisation, ReLU and max pooling and
an output layer ({count_weights(digit_models[0])} weights), trained on {len(learnt)} of
scikit-learn's digits. Accuracy on the other {len(tested)}, for one seed: {accuracy[0]:.3f}
untrained, {accuracy[1]:.3f} after one epoch, {accuracy[-1]:.3f} after {n_epochs}.
""")


# %% 7a. One digit through every layer
# What to see: which strokes a filter answers to; what ReLU takes away; how pooling coarsens the
# maps, and how sure the answer becomes from column to column.
def in_a_row(maps):
    """Maps (C, h, w) side by side, with gaps: (h, C * (w + 1))."""
    gap = ((0, 0), (0, 0), (0, 1))
    return np.hstack(list(np.pad(maps.numpy(), gap, constant_values=np.nan)))


digit = digits[2][:1]
shown = {epoch: activations(model[:2], digit) for epoch, model in digit_models.items()}
rows = {"input": [digit[0]] * len(shown)}
rows["filters 1"] = [model[0][0].weight[:, 0].detach() for model in digit_models.values()]
rows |= {f"{key[1]} {key[0]}": [maps[key][0] for maps in shown.values()] for key in shown[0]}
spacing = {"hspace": 0.35, "wspace": 0.25}
fig, axes = plt.subplots(len(rows) + 1, len(shown), figsize=(13, 9), gridspec_kw=spacing)
for row, (name, maps) in zip(axes, rows.items(), strict=False):
    for ax, values in zip(row, maps, strict=True):
        limit = float(values.abs().max())
        ax.imshow(in_a_row(values), cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set(xticks=[], yticks=[], frame_on=False)
        ax.text(1.01, 0.5, f"±{limit:.2g}", transform=ax.transAxes, va="center", fontsize="small")
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
for top, ax, (epoch, model) in zip(axes[0], axes[-1], digit_models.items(), strict=True):
    top.set_title(f"epoch {epoch}: test accuracy {accuracy[epoch]:.3f}")
    ax.bar(range(10), model(digit)[0].softmax(0).detach(), color=COLORS[5])
    ax.patches[int(digits[3][0])].set_color(COLORS[1])
    ax.set(ylim=(0, 1), xticks=range(10), xlabel="digit (orange: the right one)")
axes[-1, 0].set_ylabel("probability")
caption = (
    "One test digit through the network, top to bottom, before, early in and after training. "
    "Red is positive, blue negative, white zero; at the right, the value of the darkest colour"
)
step.figure(fig, "digit_activations", caption)

# %% 7b. The network and its training
# The lab: four layers of convolution, batch normalisation, ReLU and max pooling on the
# spectrogram as an image of one channel, trained with the training and validation sets, scored
# on the test set. Kernel and channels are usual values, as the lab advises.
step.heading("7b. The network, its training, its test score")
step.text("""
The image is a random crop of 6 s; two frames are averaged into one of its columns. After the fourth
block its channels are pooled over time, by mean and maximum, and not over frequency: pooled over
both, it scored lower (docs/experiments.md). One dense layer gives an output (logit) per class.

Each block is convolution, batch normalisation, ReLU and max pooling, in this order, in one
`nn.Sequential`. Training and scoring run these layers as they stand here.
""")
model = Classifier(CNNBackbone(), n_classes=len(data.names)).to(step.device)
step.show_source(CNNBackbone, Classifier)
step.table(*layer_table(model, data))

# %% 7b. The training
# As in step 5, with the same words there: AdamW, one-cycle rate, label smoothing, averaged
# weights, and of the last fifth of the epochs the best by validation macro-F1.
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
Result on {cnn.facts["n_train"]} clips for {cnn.facts["epochs"]} of
{cnn.facts["planned_epochs"]} planned epochs of {cnn.facts["examples_per_epoch"]:,} crops each,
with AdamW (Adam with decoupled weight decay, .01; Loshchilov & Hutter, 2019), one-cycle rate of at
most {cnn.facts["lr"]:g}, batches of {cnn.facts["batch_size"]}, cross-entropy with label smoothing
.1 (Szegedy et al., 2016: the target is .9 plus a share of the rest, so certainty is not rewarded
without end). Kept is the running average of the weights after epoch {cnn.facts["best_epoch"]}, of
the last fifth of the epochs the one with the highest macro-F1 on the {cnn.facts["n_val"]}
validation clips: {cnn.facts["val"]["macro_f1"]:.3f}, which as the best of several is optimistic.
""")
caption = (
    "Loss and validation macro-F1 against the epoch; the dot marks the epoch that was kept, among "
    "the shaded last fifth. Training loss is measured on mixed and masked crops with dropout, "
    "validation loss without"
)
histories = {name: run.history for name, run in runs.items()}
step.figure(plot_histories(histories, "macro-F1"), "learning_curve", caption)

# %% 7b. Its performance on the test set
# The lab: report it. The test set is opened now, when the network is finished; the LSTMs that
# 7e may have to train do not depend on it. Answers: log-probabilities, a row per test clip.
answers, truths, test_sets = {}, {}, {}


def score_on_test(runs):
    """Answers to the test set, and the truth, of some trained genre networks."""
    for name, run in runs.items():
        test = load_test(step.source, run.settings)
        answers[name] = predict_clips(run.model, test, run.settings, step.device)
        truths[name] = true_labels(test, run.settings)
        test_sets[name] = test.store.entries[0].path.parts[-3]


score_on_test(runs)
cnn_scores = genre_scores(truths["cnn_mel"], answers["cnn_mel"])
step.text(f"""
On the {cnn_scores["n_clips"]} test clips: accuracy {with_interval(cnn_scores, "accuracy")},
macro-F1 {with_interval(cnn_scores, "macro_f1")} (95% intervals over test clips, for one training
seed). What else stands behind these scores is listed under 7e, beside the LSTM's.
""")

# %% 7c. What the four operations do
# The lab: function and role of convolution, batch normalisation, ReLU and max pooling. Each is
# seen at work twice: in the small network of 7a, trained again with that operation left out
# (the convolution reduced to 1 x 1), and in the trained genre network, whose blocks are
# followed from operation to operation.
step.heading("7c. What the four operations do")
left_out = {}
variants = {"all four operations": None, "1 x 1 convolutions": "Conv2d"}
variants |= {f"without {name}": name for name in OPERATIONS[1:]}
for label, without in variants.items():
    twins = [train_digits(digits, step.args.seed + i, n_epochs, without) for i in range(n_seeds)]
    curves = np.array([scores for _, scores in twins])  # (seeds, epochs + 1)
    mean, sd = curves.mean(0), curves.std(0, ddof=min(1, n_seeds - 1))
    left_out[label] = {
        f"after {epoch} epoch{'s' * (epoch > 1)}": f"{mean[epoch]:.3f} ± {sd[epoch]:.3f}"
        for epoch in (1, n_epochs)
    }
    left_out[label]["weights"] = str(count_weights(twins[0][0][0]))
caption = f"Digits: test accuracy with one operation left out, mean ± sd of {n_seeds} seeds"
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


def draw_map(ax, values, title, **scale):
    """One channel (t, f) over time and mel bands; the title ends with its size."""
    extent = (0, seconds, 0, N_MELS)
    drawn = ax.imshow(values.T, origin="lower", aspect="auto", extent=extent, **scale)
    ax.set_title(f"{title}: {values.shape[1]} x {values.shape[0]}", fontsize="small")
    ax.set(xlabel="Time (s)", ylabel="Mel band")
    return drawn


# From block to block: the maps become coarser and answer to more of the clip.
fig = plt.figure(figsize=(13, 12), layout="constrained")
grid = fig.add_gridspec(len(backbone.blocks) + 1, 4)
class_name = data.names[int(clips[0][1])]
top = fig.add_subplot(grid[0, :], title=f"A validation clip of class {class_name}")
mean, std = (value.cpu() for value in cnn.settings["stats"])
fig.colorbar(plot_spectrogram(top, (x[0] * std + mean).T), ax=top, format="%+.0f dB")
for block in range(1, len(backbone.blocks) + 1):
    output = maps[block, "MaxPool2d"][0]  # (C, t, f)
    lively = output.flatten(1).std(1).argsort(descending=True)[: len(output) // 2]
    for column, channel in enumerate(lively[:: len(lively) // 4].tolist()):
        ax = fig.add_subplot(grid[block, column])
        draw_map(ax, output[channel], f"block {block}, channel {channel}", cmap="magma", vmin=0)
        ax.label_outer()
caption = (
    "A clip after each of the four blocks: four of its livelier channels (bands x columns); black "
    "is 0, the lightest colour the panel's largest value"
)
step.figure(fig, "genre_activations", caption)

# Within block 1, from operation to operation.
fig, axes = plt.subplots(2, 4, figsize=(14, 6), layout="constrained")
channel = int(maps[1, "ReLU"][0].flatten(1).std(1).argmax())
for name, (upper, lower) in zip(OPERATIONS, axes.T, strict=True):
    values = maps[1, name]  # (B, C, t, f)
    limit = float(values[0, channel].abs().max())
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    drawn = draw_map(upper, values[0, channel], f"{name}, channel {channel}", **scale)
    fig.colorbar(drawn, ax=upper, location="bottom", aspect=30)
    lower.hist(values.flatten().numpy(), bins=60, color=COLORS[0], log=True)
    zeros = (values == 0).float().mean()
    title = f"mean {values.mean():.2f}, sd {values.std():.2f}, zeros {zeros:.0%}"
    lower.set(xlabel=f"Value after {name}", ylabel="Cells (log scale)", title=title)
caption = (
    "The operations of block 1, left to right: above, one channel of the same clip (bands x "
    f"columns; red positive, blue negative); below, all values of all channels and {len(x)} clips"
)
step.figure(fig, "block_operations", caption)

# The weights that the first convolution has learned.
filters = backbone.blocks[0][0].weight[:, 0].detach().mT.flip(1)  # (C, frequency upwards, time)
limit, size = float(filters.abs().max()), filters.shape[1]
fig, ax = plt.subplots(figsize=(12, 1.8))
drawn = ax.imshow(in_a_row(filters), cmap="RdBu_r", vmin=-limit, vmax=limit)
fig.colorbar(drawn, ax=ax, label="weight", shrink=0.7)
ax.set(facecolor="0.8", yticks=[], ylabel="Mel band (up)")
ax.set_xticks(np.arange(len(filters)) * (size + 1) + size // 2, range(len(filters)))
ax.set_xlabel(f"Channel; within each, {size} columns of {1000 * column_s:.0f} ms")
caption = (
    f"The {len(filters)} filters of block 1 as learned. One that changes along time (left to "
    "right) answers to changes in time, one that changes along frequency to edges of harmonics"
)
step.figure(fig, "filters", caption)

# %% 7c. The four operations in numbers and in words
# How far a cell sees: a kernel of k reaches k - 1 cells further, a pooling by p p - 1, counted in
# cells of the layer they work on; after a pooling by p those lie p times as far apart.
operations, before = {}, image
sees, stride = np.array([1, 1]), np.array([1, 1])  # of a cell and to the next: columns, bands
for place, block in enumerate(backbone.blocks, start=1):
    conv, norm, relu, pool = (maps[place, name] for name in OPERATIONS)  # (B, C, t, f)
    kernel, pooled = (np.array(block[i].kernel_size) for i in (0, 3))
    sees, stride = sees + (kernel + pooled - 2) * stride, stride * pooled
    sds = [values.std((0, 2, 3)).sort().values for values in (conv, norm)]
    operations[place] = {
        "bands x columns, in": f"{before.shape[3]} x {before.shape[2]}",
        "pooled by": f"{pooled[1]} x {pooled[0]}",
        "out": f"{pool.shape[3]} x {pool.shape[2]}",
        "channels": pool.shape[1],
        "weights": count_weights(block),
        "a cell sees": f"{sees[1]} bands, {sees[0] * column_s:.1f} s",
        "channel sds before BN": f"{sds[0][0]:.2f} to {sds[0][-1]:.2f}",
        "channel sds after BN": f"{sds[1][0]:.2f} to {sds[1][-1]:.2f}",
        "zeros after ReLU": f"{(relu == 0).float().mean():.0%}",
        "zeros after pooling": f"{(pool == 0).float().mean():.0%}",
    }
    before = pool
caption = f"Genre network: its blocks, measured on {seconds:.1f} s of {len(x)} validation clips"
step.table(pd.DataFrame(operations).rename_axis("block"), caption)
step.text("""
**Convolution** takes a weighted sum over a small neighbourhood in time and frequency and over all
channels below, with the same weights at every place: a pattern is found wherever it occurs, and
few weights do. A 1 x 1 convolution, in the table of digits, mixes channels but sees no neighbours.

**Batch normalisation** brings each channel to mean 0 and standard deviation 1 over the batch and
all places, then scales and shifts it by two learned numbers, so that the spread after it is one
that training chose; when scoring it uses averages kept from training. It keeps the size of the
activations steady, and networks then stand a higher learning rate (Ioffe & Szegedy, 2015); why is
still debated (Santurkar et al., 2018).

**ReLU** sets negative values to zero: a channel says where its pattern is and is silent elsewhere.
It makes the network non-linear; convolutions stacked without it are one linear map (with biases,
affine), which only max pooling would be left to bend.

**Max pooling** keeps the largest of neighbouring values. The next block has fewer cells to work on,
and each of them sees more of the clip (row "a cell sees"). That a pattern was there is kept,
exactly where is forgotten. Without it the digits' output layer is larger (column "weights").
""")

# %% 7d. Overfitting a few batches
# The lab: the check of step 5b for this network, to make sure that it can be trained. A new
# network, four fixed batches, no dropout, no augmentation and no label smoothing, until the
# loss is close to 0: where it is not, something between data, loss and gradient is broken.
check_facts = learn_by_heart(step, data)

# %% 7e. Genre recognition, compared with the LSTM of step 5a
# The lab: scores on the test set, against the LSTM on the same input; the best by validation
# macro-F1 of those that step 5 has left is shown too. Differences are taken on the same clips:
# what makes a clip hard for both models cancels, so they tell more than two intervals side by side.
step.heading("7e. Genre recognition, compared with the LSTM of step 5a")
lstms = genre_models(step.training, ["mel"])
best_lstm = next(name for name in genre_val_scores(step.training).index if name in LSTM_NAMES)
lstms |= genre_models(step.training, {best_lstm} - {"mel"})
score_on_test(lstms)
members = {}
if step.args.ensemble:  # log-probabilities are averaged, clip by clip
    members = {"cnn_ensemble": list(runs), "cnn_lstm_ensemble": [*runs, best_lstm]}
    answers["cnn_ensemble"] = average_predictions(answers[name] for name in runs)
    half_and_half = average_predictions([answers["cnn_ensemble"], answers[best_lstm]])
    answers["cnn_lstm_ensemble"] = half_and_half.dropna()  # of clips that both answered
    truths |= dict.fromkeys(members, truths["cnn_mel"])
    test_sets |= dict.fromkeys(members, test_sets["cnn_mel"])
scores = {name: genre_scores(truths[name], given) for name, given in answers.items()}
run_seeds = {name: run.settings["seed"] for name, run in (runs | lstms).items()}
predictions = [
    prediction_rows(
        name, truths[name], given, test_set=test_sets[name], seed=run_seeds.get(name, "")
    )
    for name, given in answers.items()
]
write_predictions(step.folder, predictions)

# %% 7e. The scores, and what else is different between the models
# The lab asks for a comparison of two networks; their training differs too, so that stands beside.
table = {}
for name, run in (runs | lstms).items():
    net = GENRE_NETWORKS.get(name, network)  # the further seeds are of the same network
    kinds = {"mixup": make_augment(net).mixup, "pitch": net.features != "chroma", "masks": True}
    kinds |= {"crops": window_size(net)}
    length = f"{window_size(net) * HOP / SR:.0f} s" if window_size(net) else "whole clips"
    table[name] = {
        "network": net.kind.upper(),
        "test set": test_sets[name],
        "examples": f"{run.facts['epochs'] * run.facts['examples_per_epoch']:,} ({length})",
        "augmentation": ", ".join(kind for kind, used in kinds.items() if used),
        "epochs (planned)": f"{run.facts['epochs']} ({run.facts['planned_epochs']})",
        "weights": f"{run.facts['weights']:,}",
        "val macro-F1": run.facts["val"]["macro_f1"],
    }
for name in scores:
    table.setdefault(name, {"network": "average", "test set": test_sets[name]})
    for key in ("accuracy", "macro_f1"):
        title = {"accuracy": "test accuracy", "macro_f1": "test macro-F1"}[key]
        table[name][title] = with_interval(scores[name], key)
step.table(
    pd.DataFrame(table).T.fillna("-").rename_axis("model"),
    f"{scores['cnn_mel']['n_clips']} test clips; 95% intervals over test clips, for the trainings "
    "at hand. Not like for like: CNN and LSTM differ in training examples and augmentation too",
)
step.text("""
Behind these scores, CNN and LSTMs alike, stand things that are not the network, above all: training
with label smoothing .1; a running average of the weights, which is what is scored; answers averaged
over overlapping windows of a clip (a network of beats answers from the whole clip at once); and
logit adjustment, half the log of each class's share of the training clips subtracted from its
logit, which raises rare classes most (after Menon et al., 2021, who subtract all of it). Validation
macro-F1 is adjusted too, the validation loss is not. *Examples*: those trained on in all, and how
long each is. How many follows from a budget that was set with cross-validation on the README's
small set of music (docs/experiments.md). *Augmentation*: mixup of two clips (Zhang et al., 2018),
mel bands shifted up or down (pitch), stripes masked (SpecAugment; Park et al., 2019), random crops.
""")
seed_spread = {}
if step.args.ensemble:
    for key in ("accuracy", "macro_f1"):
        values = [scores[name][key] for name in runs]
        seed_spread[key] = {"mean": np.mean(values), "sd": np.std(values, ddof=1)}
    caption = "Test scores of the CNN over three training seeds (other weights, batches, splits)"
    step.table(pd.DataFrame(seed_spread).T.rename_axis("score"), caption)
    step.text(f"""
    `cnn_ensemble` averages the log-probabilities of the three CNNs, `cnn_lstm_ensemble` that
    average and LSTM `{best_lstm}`, half and half. Nothing in them was chosen on the test set.
    """)

# %% 7e. Differences on the same clips, and class by class
step.text("""
Paired differences on the same clips. The 95% intervals cover the choice of test clips only, for
one training seed; another seed gives another difference.
""")
paired = {}
for name in lstms:
    paired[name] = paired_difference(truths["cnn_mel"], answers["cnn_mel"], answers[name])
    only = (paired[name]["only_first"], paired[name]["only_second"])
    step.text(f"""
    {difference_line("cnn_mel", name, paired[name])}; right only in `cnn_mel`: {only[0]} clips, only
    in `{name}`: {only[1]}.
    """)

shown = ["cnn_mel", *lstms]
per_class = pd.concat({name: pd.DataFrame(scores[name]["per_class"]).T for name in shown}, axis=1)
table = per_class.drop(columns="support", level=1)
table.columns = [" ".join(column) for column in table.columns]
table["clips"] = per_class["cnn_mel", "support"].astype(int)
step.table(table.rename_axis("class"), "Per class, on the test set")
fig, ax = plt.subplots(figsize=(10, 4))
f1 = per_class.xs("f1", axis=1, level=1)
f1.index = [f"{label} ({n})" for label, n in table["clips"].items()]
f1.plot.bar(ax=ax, color=list(COLORS[: len(shown)]), width=0.8)
ax.set(xlabel="Class (test clips)", ylabel="F1 on the test set", ylim=(0, 1))
plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
caption = (
    "F1 per class, CNN and LSTM; where a class has few test clips, one clip moves its bar much"
)
step.figure(fig, "per_class", caption)
fig, axes = plt.subplots(1, len(shown), figsize=(5.6 * len(shown), 5.4), layout="constrained")
for ax, name in zip(axes, shown, strict=True):
    title = f"{name} (accuracy {scores[name]['accuracy']:.3f})"
    plot_confusion(ax, scores[name]["confusion"], data.names, title)
caption = "Confusion matrices on the test set: colour is the share of the true class, numbers clips"
step.figure(fig, "confusion", caption)

# %% 7e, besides: how sure the network is
# A probability of .9 should be right nine times out of ten. Whether it is, is measured by the
# expected calibration error; temperature scaling (Guo et al., 2017), one number fitted on the
# validation clips, may mend what is off on average: the test row tells. listen.py uses it.
step.heading("7e, besides. How sure the network is")
on_val = (
    predict_clips(cnn.model, data.val, cnn.settings, step.device),
    true_labels(data.val, cnn.settings),
)
judged = {"validation": on_val, "test": (answers["cnn_mel"], truths["cnn_mel"])}
logits = {
    split: (
        torch.tensor(table.to_numpy()),
        torch.tensor(class_numbers(true[table.index], data.names)),
    )
    for split, (table, true) in judged.items()
}
temperature = fit_temperature(*logits["validation"])
sureness = {
    f"{split} ({len(targets)} clips)": {
        "accuracy": float((z.argmax(1) == targets).float().mean()),
        "mean confidence": float(z.softmax(1).amax(1).mean()),
        "confidence, scaled": float((z / temperature).softmax(1).amax(1).mean()),
        "calibration error": calibration_error(z, targets),
        "calibration error, scaled": calibration_error(z / temperature, targets),
    }
    for split, (z, targets) in logits.items()
}
caption = f"Confidence (the likeliest class's probability); temperature {temperature:.2f}"
step.table(pd.DataFrame(sureness).T.rename_axis("clips"), caption)
step.text("""
The calibration error (expected calibration error, 10 bins) is the distance between confidence and
accuracy, averaged over bins, each weighed by its clips; on few clips it is above 0 by chance alone.
Logits are adjusted (see above); the temperature divides them, so the likeliest class stays. It is
fitted on the validation clips, which also chose the epoch: only the test row tells whether it
helps.
""")

# %% 7e, besides: which cells of the spectrogram decide
# Integrated gradients (Sundararajan et al., 2017) share out the logit of a class among the
# cells of the input. Whether the cells so named do decide is tested before they are shown:
# put back or taken away in that order, they should change the answer faster than in a
# random order (insertion and deletion; Petsiuk et al., 2018), and a network with random
# weights should not name the same ones (Adebayo et al., 2018).
step.heading("7e, besides. Which cells decide, and do they")
window, test = cnn.settings["window"], load_test(step.source, cnn.settings)
n_judged, n_steps = (4, 4) if step.args.smoke else (min(60, len(test)), 16)
rng = np.random.default_rng(step.args.seed)
chosen = rng.permutation(len(test))[:n_judged]
model = copy.deepcopy(cnn.model).cpu().eval()
seed_everything(step.args.seed + 1000)  # not where the trained network began
random_twin = build_model(model_spec(cnn.model)).eval()


def middle(x):
    """The window in the middle of a clip (T, F)."""
    size = min(window, len(x))
    return x[(len(x) - size) // 2 :][:size]


areas, agreement = [], []
for index in chosen:
    x = middle(test[int(index)][0].cpu())
    lengths, one = torch.tensor([len(x)]), x[None]
    with torch.no_grad():
        label = int(model(one, lengths).argmax(1))
    named, random_named = (
        patches(integrated_gradients(network, one, lengths, torch.tensor([label]), n_steps)[0])
        for network in (model, random_twin)
    )
    noise = patches(torch.rand(x.shape, generator=torch.Generator().manual_seed(int(index))))
    row = {}
    for way in ("insertion", "deletion"):
        for order, values in (("attribution", named), ("random", noise)):
            curve = probability_curve(model, x, cell_ranks(values), label, way == "insertion")
            row[way, order] = float(curve.mean())
    areas.append(row)
    cells = slice(None, None, 8), slice(None, None, 4)  # one of each patch
    agreement.append(spearman(named.abs()[cells].flatten(), random_named.abs()[cells].flatten()))
areas = pd.DataFrame(areas)
faithful = {}
for way, sign in (("insertion", 1), ("deletion", -1)):
    gain = sign * (areas[way, "attribution"] - areas[way, "random"]).to_numpy()
    low, high = bootstrap(lambda i, gain=gain: gain[i].mean(), len(gain))
    faithful[way] = {
        "by attribution": areas[way, "attribution"].mean(),
        "in random order": areas[way, "random"].mean(),
        "better by": f"{gain.mean():.3f} [{low:.3f}, {high:.3f}]",
    }
caption = (
    "Area under the likeliest class's probability (logits not adjusted) while patches of 8 frames "
    "and 4 bands are put back (insertion, higher is better) or taken away (deletion, lower); "
    f"{n_judged} test clips, at most 6 s in their middle"
)
step.table(pd.DataFrame(faithful).T.rename_axis("way"), caption)
low, high = bootstrap(lambda i: np.array(agreement)[i].mean(), len(agreement))
step.text(f"""
Attributions are integrated gradients (Sundararajan et al., 2017) from the clip that is the mean in
every band; insertion and deletion are those of Petsiuk et al. (2018), random weights as a check
those of Adebayo et al. (2018). Intervals (95%) are over clips, for one random order of each and one
draw of weights. Rank correlation between the patches' attributions (without sign) by the trained
network and by the same network with random weights: {np.mean(agreement):.2f} [{low:.2f},
{high:.2f}], mean over the clips. It would be 1 if the weights played no part, and need not be 0 for
unrelated weights: both attributions are multiplied by the same clip. Taking away a patch means
setting it to each band's mean, which music seldom is: part of a fall may come from that.
""")

# %% 7e, besides: to look at and to hear
# The two clips of step 1, and the test clips that were most surely wrong: which patches spoke
# for the answer, drawn beside the spectrogram, and heard: the sound of the fifth of them that
# spoke most, all else up to 30 dB lower.
mean, std = (value.cpu() for value in cnn.settings["stats"])
QUIETER = "the same, all but the fifth that spoke most for the answer up to 30 dB lower"
looked_at = []  # title, mel spectrogram in dB (T, 128)
for clip in sample_clips(step.source.root, 1, step.args.seed, step.args.skip_bad, beat=False)[:2]:
    mel = torch.from_numpy(clip.full[BANDS["mel"]]).float().T
    looked_at.append((f"{clip.clip_id}, {clip.genre}, training split", mel))
z, targets = logits["test"]
sure, called = (z / temperature).softmax(1).max(1)
for row in [int(i) for i in sure.argsort(descending=True) if called[i] != targets[i]][:2]:
    title = f"{clip_ids(test)[row]}, {data.names[targets[row]]}, test set"
    looked_at.append((title, test[row][0].cpu() * std + mean))
if step.args.smoke:
    looked_at = [(title, mel[:300]) for title, mel in looked_at]
fig, axes = plt.subplots(len(looked_at), 2, figsize=(12, 2.6 * len(looked_at)), squeeze=False)
fig.subplots_adjust(hspace=0.55, wspace=0.17)
for place, ((title, mel), row) in enumerate(zip(looked_at, axes, strict=True), start=1):
    x = (mel - mean) / std
    windows, lengths = cut_windows(x[None], torch.tensor([len(x)]), min(window, len(x)))
    with torch.no_grad():
        answered = adjust_logits(model(windows, lengths).mean(0), cnn.settings["priors"])
    chance, label = (answered / temperature).softmax(0).max(0)
    said = f"called {data.names[int(label)]} ({chance:.2f} at the temperature {temperature:.2f})"
    named = patches(clip_attributions(model, x, window, int(label)))
    plot_spectrogram(row[0], mel.T)
    limit = float(named.abs().quantile(0.995)) or 1.0
    draw_map(row[1], named, "", cmap="RdBu_r", vmin=-limit, vmax=limit)
    row[1].images[0].set_extent((0, len(x) * HOP / SR, 0, N_MELS))
    row[0].set_title(title, fontsize="medium")
    row[1].set_title(said, fontsize="medium")
    quieter = (mel - 30.0 * (cell_ranks(named) >= 0.2)).clamp(min=DB_FLOOR)
    for name, sound in (("all", mel), ("deciding", quieter)):
        waveform = mel_to_waveform(sound.T.numpy())
        heard = {"all": "made of its mel spectrogram", "deciding": QUIETER}[name]
        step.sound(waveform, f"clip_{place}_{name}", f"{title}, {said}: {heard}")
caption = (
    "Left: mel spectrograms of the two clips of step 1 and of the test clips that were most surely "
    "wrong. Right: what every patch did to the logit of the class that was called, summed over the "
    "windows that hold it (the ends of a clip lie in fewer and look paler); red for it, blue "
    "against it, each panel's darkest its own. Probabilities are after logit adjustment and "
    "temperature"
)
step.figure(fig, "what_decides", caption)

# %% What later steps and the report read
results = {name: run.facts | {"test": scores[name]} for name, run in runs.items()}
results |= {name: {"members": of, "test": scores[name]} for name, of in members.items()}
compared = {
    name: {key: run.facts[key] for key in ("weights", "val")} for name, run in lstms.items()
}
step.finish(
    results,
    compared_with={name: facts | {"test": scores[name]} for name, facts in compared.items()},
    paired_difference=paired,
    seed_spread=seed_spread,
    overfit=check_facts,
    digits={"accuracy": accuracy, "left_out": left_out, "n_seeds": n_seeds},
    operations=operations,
    calibration=sureness | {"temperature": temperature},
    faithfulness=faithful
    | {"randomised_weights": {"mean": np.mean(agreement), "ci95": [low, high]}},
)
