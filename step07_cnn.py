"""Step 7: a 2D convolutional network that reads the spectrogram as an image.

The lab asks: a) train a CNN on handwritten digits and look at the activations of every
layer; b) a CNN of four layers, each convolution, batch normalisation, ReLU, max pooling,
trained with the training and validation sets and scored on the test set; c) what these
operations do; d) the overfit check of step 5b; e) genre recognition with this network,
compared with the LSTM of step 5a.

    python step07_cnn.py --overfit-batch  # only 7d: learn four batches by heart, in seconds
    python step07_cnn.py                  # all of it
    python step07_cnn.py --ensemble       # also the average of three such networks and an LSTM
    python step07_cnn.py --mnist FILE     # 7a on MNIST: Kaggle's train.csv of digits or mnist.npz

Input: the genre data set; the LSTMs of step 5 (the one on mel is trained here if it is
missing); for a), MNIST if it is attached on Kaggle, else scikit-learn's digits. Output, in
outputs/step07_cnn/: a checkpoint and a history, figures and test scores (summary.md,
metrics.json), each test clip's true and predicted class (predictions.csv). What decides a
prediction: python -m tools.explain.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--ensemble").
import copy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn

import common
from patrec import plots, tables
from patrec.errors import InputError
from patrec.features import HOP, SR
from patrec.files import part_folder
from patrec.machine import kaggle_root, seed_everything
from patrec.recipes import GENRE_NETWORKS, LSTM_NAMES, OVERFIT_PASSES, Recipe, window_size
from patrec.scores import average_predictions, genre_scores, paired_difference
from patrec.splits import split_indices
from patrec.step import Step


def add_flags(parser):
    averaged = "train with three seeds; score their average too, alone and with an LSTM"
    parser.add_argument("--ensemble", action="store_true", help=averaged)
    parser.flag("--mnist", "digits for 7a: mnist.npz or Kaggle's train.csv", type=Path)


def learn_by_heart(step, data):
    """7d: a new network of this step on four fixed batches; returns what metrics.json keeps."""
    step.heading("7d. Overfitting a few batches")
    seed_everything(step.args.seed)
    model = common.make_classifier(network, data).to(step.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=step.args.lr)
    recipe = Recipe(OVERFIT_PASSES, step.args.lr, step.args.batch_size)
    loss_fn = nn.CrossEntropyLoss()
    options = {"device": step.device, "overfit_batch": True}
    check = common.train(model, data, loss_fn, optimizer, recipe, **options)
    facts = check.facts
    step.text(f"""
    As in step 5b, {facts["clips"]} clips in {facts["batches"]} fixed batches are learned without
    dropout and without the shift of the bands. After {facts["passes"]} passes the loss is
    {facts["loss"]:.4f} (the goal: under .01), the accuracy {facts["accuracy"]:.3f}.
    """)
    if check.learned:
        step.text("So the gradients reach the weights, and the network can be trained.")
    caption = f"Training loss on the {facts['batches']} fixed batches, without regularisation"
    step.figure(plots.plot_overfit({"cnn_mel": check}), "overfit", caption)
    step.require(check.learned, f"four batches were not learned by heart: {facts}")
    return {"cnn_mel": facts}


step = Step("step07_cnn", __doc__, parts=("genre",), training=True, add_flags=add_flags)
network = GENRE_NETWORKS["cnn_mel"]
data = common.load_data(step.source, network.features, crop=window_size(network))
# The cells keep the lab's order, in which the check (d) follows the training (b). With
# --overfit-batch only the check runs; do that after every change of the network.
if step.args.overfit_batch:
    step.finish(overfit=learn_by_heart(step, data))

# %% 7a. A CNN on handwritten digits, layer by layer
# The lab: train one in ConvNetJS and put screenshots of its activations into the report.
# A script cannot take them. So it says how to do it, and repeats the experiment with the four
# operations of 7b, on MNIST where a file of it is given or found, else on scikit-learn's digits.
step.heading("7a. A CNN on handwritten digits, layer by layer")
step.text("""
> **✎ Screenshots of ConvNetJS go here.** Open
> <https://cs.stanford.edu/people/karpathy/convnetjs/demo/mnist.html>. The training starts by itself
> as soon as the digits are loaded.
>
> 1. The network is in the text field *Instantiate a Network and Trainer*: convolution of 8 filters
>    5 x 5, ReLU, pooling 2 x 2, convolution of 16 filters, ReLU, pooling 3 x 3, softmax (ConvNetJS
>    has no batch normalisation). *change network* restarts the training with that network.
> 2. Press *pause* in the first seconds. Take a screenshot of *Network Visualization* and one of
>    *Training Stats* (examples seen, validation accuracy).
> 3. Press *resume*, wait for about 20,000 examples, press *pause*, and take both again.
> 4. Describe what you see, layer by layer. Do the *Weights* of the first convolution show strokes
>    and edges, or noise? Where are its *Activations* bright? What does relu turn black? How small
>    does pool make the maps? Which digits get a high probability in softmax? The bottom of the page
>    shows test digits with their most probable classes. Which digits are confused?
""")

# %% 7a. The same experiment here: a small network on small digits
# Two blocks of the very operations of 7b. The test digits are never trained on.
OPERATIONS = ("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d")  # of one block, in the lab's order


def digit_cnn(without=None):
    """Two blocks, one of OPERATIONS left out (a convolution becomes 1 x 1), and an output layer."""
    kernel = 1 if without == "Conv2d" else 3

    def block(c_in):
        first = nn.Conv2d(c_in, 8, kernel, padding=kernel // 2)
        rest = (nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(first, *(part for part in rest if type(part).__name__ != without))

    return nn.Sequential(block(1), block(8), nn.Flatten(), nn.LazyLinear(10))


def train_digits(parts, seed, n_epochs, without=None):
    """Train a digit_cnn on parts = (x_train, y_train, x_test, y_test), x of shape (N, 1, h, w).

    Returns {epoch: model} of epochs 0, 1 and the last, and the test accuracy after every epoch.
    """
    x_train, y_train, x_test, y_test = parts
    seed_everything(seed)
    model, models, accuracy = digit_cnn(without), {}, []
    model.eval()(x_train[:1])  # the output layer takes its size from the first images it sees
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


def read_digits(path):
    """Images (N, 1, h, w) in [0, 1] and their digits (N,); without a file those of scikit-learn."""
    if path is None:
        images, labels = load_digits(return_X_y=True)
        return torch.tensor(images / 16).float().view(-1, 1, 8, 8), labels
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                images, labels = file["x_train"], file["y_train"]
        else:
            images = pd.read_csv(path)
            labels = images.pop("label").to_numpy()
        images = torch.tensor(np.asarray(images) / 255).float().view(-1, 1, 28, 28)
    except Exception as error:  # of numpy, zipfile or pandas, each with errors of its own
        fault = f"not MNIST as mnist.npz or as train.csv of digit-recognizer ({error})"
        raise InputError(f"--mnist {path}: {fault}") from error
    some = np.random.default_rng(0).permutation(len(images))[:2000]  # about as many as scikit-learn
    return images[some], labels[some]


inputs = kaggle_root() / "input"
found = [*inputs.glob("**/mnist.npz"), *inputs.glob("**/digit*/train.csv")]
digit_file = step.args.mnist or next(iter(found), None)
x, labels = read_digits(digit_file)
known, tested = split_indices(len(x), 0.2, step.args.seed, labels)
digits = (x[known], torch.tensor(labels)[known], x[tested], torch.tensor(labels)[tested])
n_epochs, n_seeds = (3, 2) if step.args.smoke else (15, 3)
digit_models, accuracy = train_digits(digits, step.args.seed, n_epochs)
size = " x ".join(map(str, x.shape[2:]))
step.text(f"""
The same experiment here: two blocks of the four operations of 7b and an output layer
({common.count_weights(digit_models[0]):,} weights), trained on {len(known):,} images of {size}
pixels from {digit_file or "scikit-learn's digits"}. Accuracy on {len(tested)} others:
{accuracy[0]:.3f} untrained, {accuracy[1]:.3f} after one epoch, {accuracy[-1]:.3f} after {n_epochs}.
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
    "One test digit through the network. Rows: the layers. Columns: before training, after one "
    "epoch, at the end. Red: positive, blue: negative, ±: the value of the darkest colour"
)
true_digit = int(digits[3][0])
step.figure(plots.plot_activations(columns, true_digit), "digit_activations", caption)
before, early, after = (float(chances[true_digit]) for _, chances in columns.values())
step.text(f"""
Place a filter of the first convolution on the image. Its map is reddest where the red weights lie
on the stroke and the blue weights on empty pixels. This can be at one edge of a stroke (compare
*filters 1* and *Conv2d 1*). The filter's bias is added everywhere, also where the image is empty.
Batch normalisation shifts and scales each map, ReLU removes what is negative, and max pooling keeps
the strongest response in each 2 x 2 square. The second block does the same with the maps of the
first. The output layer gives one number per digit, and softmax turns these into probabilities. The
true digit, {true_digit}, has a probability of {before:.2f} before training, {early:.2f} after one
epoch, {after:.2f} at the end. Before training, batch normalisation changes nothing in evaluation
mode, because its stored mean is still 0 and its variance 1.

*Patterns*: compare the row *filters 1* before and after training. A filter with a red row or column
beside a blue one responds to an edge. A filter of one colour responds to every part of the stroke,
not only to edges. In 3 x 3 weights only simple patterns are possible; the 5 x 5 filters of
ConvNetJS show more.
""")

# %% 7b. The network
# The lab: four layers of convolution, batch normalisation, ReLU and max pooling on the
# spectrogram as an image of one channel, trained with the training and validation sets, scored
# on the test set. Kernel and channels are usual values, as the lab advises.
step.heading("7b. The network, its training, its test score")
model = common.make_classifier(network, data).to(step.device)
config = model.backbone.config
step.text(f"""
In training, the input is a random crop of 6 s. A validation or test clip is cut into windows of 6 s
that cover it, and their logits are averaged. Two frames are averaged into one column of the image.
Each block is convolution, batch normalisation, ReLU and max pooling, in this order, in one
`nn.Sequential`. The kernels are {config["kernel_size"]} x {config["kernel_size"]}, and the blocks
have {", ".join(map(str, config["channels"]))} channels. After the fourth block the channels are
pooled over time (mean and maximum), but not over frequency. One dense layer gives one output
(logit) per class. In the table, the output of a block is clips x channels x time x bands.
""")
step.show_source(common.CNNBackbone, common.Classifier)
step.table(*common.layer_table(model, data))

# %% 7b. The training
# With the recipe of step 5.
recipe = {
    "make_model": common.make_classifier,
    "make_loss": lambda data: nn.CrossEntropyLoss(),
    "optimizer": torch.optim.Adam,
}
trainings = [common.Experiment("cnn_mel", network, **recipe)]
if step.args.ensemble:  # two more, with other weights, batches and validation clips
    for seed in (step.args.seed + 1, step.args.seed + 2):
        trainings.append(common.Experiment(f"cnn_mel_seed{seed}", network, **recipe, seed=seed))
runs = common.train_all(step.training, trainings)
cnn = runs["cnn_mel"]
step.text(f"""
The network is trained as the LSTMs of step 5 are: Adam with a constant learning rate of
{step.args.lr:g}, batches of {step.args.batch_size} crops, cross-entropy, dropout before the output
layer, and the epoch with the highest validation macro-F1 among {step.searched}. The score of this
epoch is an optimistic estimate. The default recipe adds the parts in the table. `--recipe lab`
trains without them and keeps the best of all epochs. For the CNN the shift of the bands had no
measurable effect. We keep it because it lowers the log loss of the LSTM, and both networks are to
be trained in the same way.
""")
step.table(*tables.parts_table("cnn"))
step.table(tables.training_table(runs, "macro-F1"), tables.SECONDS)
caption = f"Loss and validation macro-F1 by epoch. {step.curves}"
histories = {name: run.history for name, run in runs.items()}
step.figure(plots.plot_histories(histories, "macro-F1"), "learning_curve", caption)

# %% 7b. Its performance on the test set
# The test set is read only now, when the network is finished; the LSTMs that 7e may have to train
# do not depend on it. Predictions are log-probabilities, a row per test clip.
predicted, true, scores, rows = {}, {}, {}, {}


def score_test(runs):
    """Predict the test clips with some trained genre networks, and score the predictions."""
    for name, run in runs.items():
        test = common.load_test(step.source, run.settings)
        predicted[name] = common.predict_clips(run.model, test, run.settings, step.device)
        true[name] = common.true_labels(test, run.settings)
        scores[name] = genre_scores(true[name], predicted[name])
        test_set = part_folder(".", "genre", run.settings["beat"]).name
        made = {"test_set": test_set, "seed": run.settings["seed"]}
        rows[name] = tables.prediction_rows(name, true[name], predicted[name], **made)


score_test(runs)
step.table(tables.genre_table(scores), "Scores on the test set, with 95% intervals over its clips")

# %% 7c. What the four operations do
# The lab: function and role of convolution, batch normalisation, ReLU and max pooling. Each is
# seen at work twice: in the small network of 7a, trained again without that operation
# (the convolution reduced to 1 x 1), and in the trained genre network.
step.heading("7c. What the four operations do")
step.text("""
What does each operation do? The digit network of 7a is trained again, each time with one operation
left out, or with convolutions of 1 x 1. Then the figure shows the four operations in the trained
genre network.
""")
left_out, means, spreads = {}, {}, {}
variants = {"all four operations": None, "1 x 1 convolutions": "Conv2d"}
variants |= {f"without {name}": name for name in OPERATIONS[1:]}
for label, without in variants.items():
    twins = [train_digits(digits, step.args.seed + i, n_epochs, without) for i in range(n_seeds)]
    last = [curve[-1] for _, curve in twins]
    means[label], spreads[label] = np.mean(last), np.std(last, ddof=1)
    left_out[label] = {
        "test accuracy": f"{means[label]:.3f} ± {spreads[label]:.3f}",
        "weights": f"{common.count_weights(twins[0][0][0]):,}",
    }
caption = f"Digits, {n_epochs} epochs: one operation changed, mean ± sd of {n_seeds} seeds"
step.table(pd.DataFrame(left_out).T.rename_axis("digit CNN"), caption)
effects = {"Clearly lower": [], "Clearly higher": [], "No clear difference": []}
whole, *changed = means
for label in changed:
    difference, clear = means[label] - means[whole], spreads[label] + spreads[whole]
    unlike = "Clearly lower" if difference < 0 else "Clearly higher"
    effects[unlike if abs(difference) > clear else "No clear difference"].append(label)
step.text("""
The accuracy, compared with all four operations (a difference that is smaller than the sum of the
two standard deviations is not clear):
""")
step.text("\n".join(f"- {effect}: {', '.join(of)}." for effect, of in effects.items() if of))
step.text("""
Without pooling the accuracy may even rise: small images have little to summarise (scikit-learn's
have 8 x 8 pixels), and the output layer gets more weights. Without ReLU it may stay the same,
because max pooling is not linear either.
""")

# %% 7c. The trained genre network at work
# Validation clips, the middle of each, are taken through the first block operation by operation.
backbone = copy.deepcopy(cnn.model.backbone).cpu().eval()
clips = [data.val[i] for i in range(min(32, len(data.val)))]
n_frames = min(cnn.settings["window"], *(int(length) for _, _, length in clips))  # no padding
x = torch.stack([x[(n - n_frames) // 2 :][:n_frames].cpu() for x, _, n in clips])  # (B, T, F)
lengths = torch.full((len(x),), n_frames)
image = common.average_frames(x, lengths, backbone.frames_per_step)[0].unsqueeze(1)  # (B, 1, T', F)
maps = {name: output for (_, name), output in activations(backbone.blocks[:1], image).items()}
channel = int(maps["ReLU"][0].flatten(1).std(1).argmax())  # the one that varies most in a clip
caption = (
    "The operations of block 1, from left to right. Above: one channel of a clip (red positive, "
    "blue negative, none after ReLU; a column is 46 ms, after pooling 186 ms). Below: all "
    f"values of all channels and {len(x)} clips"
)
step.figure(plots.plot_operations(maps, channel, n_frames * HOP / SR), "block_operations", caption)

# %% 7c. The four operations in words
step.text("""
**Convolution** takes a weighted sum over a small neighbourhood in time and frequency and over all
input channels, with the same weights at every place. So a pattern is found wherever it occurs, and
few weights are enough. A 1 x 1 convolution mixes channels but sees no neighbours.

**Batch normalisation** brings each channel to mean 0 and standard deviation 1 over the batch and
all places, then scales and shifts it by two learned numbers. In the figure the standard deviation
is not exactly 1: in validation and test the network uses the running averages of mean and deviation
that it has stored in training, and then scales the result. The activations keep a steady size,
which allows higher learning rates (Ioffe & Szegedy, 2015). Why it works is still debated (Santurkar
et al., 2018).

**ReLU** sets negative values to zero. So a channel is above zero where its pattern occurs.
It makes the network non-linear. Convolutions in a row without it are only one linear map. For
positive values its slope is 1, so it does not make the gradient smaller.

**Max pooling** keeps the largest of neighbouring values. If a pattern moves by one cell, the output
changes little. The next block has fewer cells to compute, and each of them sees more of the clip.
The exact place of a pattern is lost.
""")

# %% 7d. Overfitting a few batches
# The lab: the check of step 5b for this network, to make sure that it can be trained.
check_facts = learn_by_heart(step, data)

# %% 7e. Genre recognition, compared with the LSTM of step 5a
# The lab: compare with the LSTM on the same input. The best LSTM of step 5 is shown too.
step.heading("7e. Genre recognition, compared with the LSTM of step 5a")
lstms = common.genre_models(step.training, ["mel"])
ranking = common.genre_val_scores(step.training).index  # the best network first
best_lstm = next(name for name in ranking if name in LSTM_NAMES)
lstms |= common.genre_models(step.training, {best_lstm} - {"mel"})
score_test(lstms)
members = {}
if step.args.ensemble:  # log-probabilities are averaged, clip by clip
    members = {"cnn_ensemble": list(runs), "cnn_lstm_ensemble": [*runs, best_lstm]}
    predicted["cnn_ensemble"] = average_predictions(predicted[name] for name in runs)
    both = [predicted["cnn_ensemble"], predicted[best_lstm]]
    predicted["cnn_lstm_ensemble"] = average_predictions(both)
for name in members:
    scores[name] = genre_scores(true["cnn_mel"], predicted[name])
    made = {"test_set": part_folder(".", "genre").name, "seed": ""}  # it has no seed of its own
    rows[name] = tables.prediction_rows(name, true["cnn_mel"], predicted[name], **made)
tables.write_predictions(step.folder, rows.values())

# %% 7e. The scores, and what else is different between the models
facts = pd.DataFrame({name: run.facts for name, run in (runs | lstms).items()}).T
facts["examples"] = facts["epochs"] * facts["examples_per_epoch"]
caption = "Scores on the test set, with 95% intervals over its clips"
step.table(tables.genre_table(scores).join(facts[["examples", "weights"]]), caption)
step.text(f"""
`mel` is the LSTM of step 5a and has the same input as the CNN. `{best_lstm}`
({plots.run_title(best_lstm)}) is the LSTM of step 5 with the highest validation macro-F1. The
models differ in more than the network: the CNN is trained on crops of 6 s, the LSTMs on crops of
15 s.
""")
if GENRE_NETWORKS[best_lstm].beat:
    step.text(f"`{best_lstm}` is tested on the beat-synchronised arrays of the same clips.")
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
step.text(f"""
Each line compares two models on the same test clips. The two scores can disagree, because macro-F1
counts every genre equally and accuracy every clip. {tables.INTERVALS}
""")
paired = {}
for name in lstms:
    paired[name] = paired_difference(true["cnn_mel"], predicted["cnn_mel"], predicted[name])
    step.text(f"""
    {tables.difference_line("cnn_mel", name, paired[name])}.
    {paired[name]["only_first"]} clips are classified correctly by `cnn_mel` alone,
    {paired[name]["only_second"]} by `{name}` alone.
    """)

shown = {name: scores[name] for name in ("cnn_mel", *lstms)}
caption = "F1 per class, CNN and LSTM; in a class of few test clips, one clip moves the bar a lot"
step.figure(plots.plot_per_class(shown), "per_class", caption)
caption = "Confusion matrices of the test set. Number: clips. Colour: share of the true class"
step.figure(plots.plot_confusions(shown, data.names), "confusion", caption)

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
)
