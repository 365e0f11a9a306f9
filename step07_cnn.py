"""Step 7: a 2D convolutional network that reads the spectrogram as an image.

The lab asks: a) train a CNN on handwritten digits and look at the activations of every
layer; b) a CNN of four layers, each convolution, batch normalisation, ReLU, max pooling,
trained with the training and validation sets and scored on the test set; c) what these
operations do; d) the overfit check of step 5b; e) genre recognition with this network,
compared with the LSTM of step 5a.

    python step07_cnn.py
    python step07_cnn.py --ensemble       # besides: three such networks averaged, and with an LSTM
    python step07_cnn.py --overfit-batch  # d): four batches by heart

Input: the genre data set; the LSTMs of step 5 (the one on mel is trained here where
there is none); for a), scikit-learn's bundled digits. Output, in outputs/step07_cnn/: a
checkpoint and a history, pictures of the network at work, test scores (summary.md,
metrics.json), each test clip's true and predicted class (predictions.csv).

Measured on a small set of real music (see README), seed 42, one CPU thread, torch
2.13.0: test accuracy .694 [.624, .758], macro-F1 .671 [.581, .734] on 157 clips, after
training on the validation clips too .732 [.656, .796] and .703 [.611, .770]; mean of
three seeds .696 and .669, then .720 and .688; about 9 and 2 minutes.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from torch import nn

from common import (
    COLORS,
    GENRE_RUNS,
    HOP,
    N_MELS,
    SR,
    TRAINING_DEFAULTS,
    Step,
    average_frames,
    bootstrap,
    classification_scores,
    count_weights,
    genre_model,
    genre_predictions,
    load_checkpoint,
    load_genre,
    macro_f1,
    make_parser,
    parse_args,
    plot_confusion,
    plot_history,
    plot_spectrogram,
    run_main,
    score_genre,
    seconds_left,
    seed_everything,
    split_indices,
    train_genre,
    write_text,
)  # fmt: skip

OPERATIONS = ("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d")  # of one block, in the lab's order


def paired_bootstrap(targets, predictions, others, n_classes) -> dict:
    """How much better one model is than another on the same clips, with 95% intervals.

    Both models are scored on the same resampled clips, so that what makes a clip hard
    for both cancels out: narrower than comparing the two models' own intervals.

    Parameters
    ----------
    targets, predictions, others : np.ndarray of int [shape=(N,)]

    Returns
    -------
    dict
        accuracy, macro_f1 (differences, positive where `predictions` are better), each
        with `_ci95`; only_first, only_second: clips that one model alone has right.
    """
    right, right_other = predictions == targets, others == targets
    differences = {
        "accuracy": lambda i: right[i].mean() - right_other[i].mean(),
        "macro_f1": lambda i: macro_f1(targets[i], predictions[i], n_classes) - macro_f1(targets[i], others[i], n_classes),
    }
    result = {"n_clips": len(targets), "only_first": int((right & ~right_other).sum()), "only_second": int((right_other & ~right).sum())}
    for name, difference in differences.items():
        result[name] = float(difference(np.arange(len(targets))))
        result[f"{name}_ci95"] = bootstrap(difference, len(targets))
    return result


def main(argv=None):
    parser = make_parser(__doc__, training=True, **TRAINING_DEFAULTS)
    parser.add_argument("--ensemble", action="store_true", help="train with three seeds and score their averaged answers, alone and with an LSTM's")
    args = parse_args(parser, argv)
    step = Step("step07_cnn", args)
    flags = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "subset": args.subset}

    # d) Before any long training: can this network learn four batches by heart? If not,
    # something is broken, and train() says so with exit code 1.
    if args.overfit_batch:
        check = train_genre(step, "cnn_mel", **flags, overfit_batch=True)[2]
        report_overfit(step)
        return step.finish(overfit={"cnn_mel": {key: value for key, value in check.items() if key != "history"}})

    # b) The network is CNNBackbone in common.py. It trains on random crops in time, more
    # examples from the same clips; of the last fifth of the epochs the best by validation
    # macro-F1 is kept. The choice made, the validation clips may teach too: the network is
    # trained a quarter as long again, on training and validation clips together. Nothing can
    # validate that part, so its last epoch is kept, and both are scored.
    # --max-minutes is shared out accordingly: of what is left, the first part gets four fifths.
    seeds = [None, args.seed + 1, args.seed + 2] if args.ensemble else [None]
    trained = {}
    for left, seed in zip(range(len(seeds), 0, -1), seeds, strict=True):
        name = "cnn_mel" if seed is None else f"cnn_mel_seed{seed}"
        trained[name] = train_genre(step, "cnn_mel", **flags, seed=seed, resume=args.resume, max_seconds=seconds_left(args, 1.25 * left))
        trained[f"{name}_all_clips"] = train_genre(step, "cnn_mel", **flags, seed=seed, all_clips=True, max_seconds=seconds_left(args, 5 * left - 4))
    model, settings, result = trained["cnn_mel"]

    # e) Its rivals: the LSTM on the same input, and the best by validation score among
    # those that step 5 has left. The test split is opened only after this, by score_genre.
    lstms = [name for name, run in GENRE_RUNS.items() if run.network == "lstm" and not run.plain]
    rivals = {name: genre_model(step, name) for name in lstms if name == "mel" or (step.out / "step05_lstm" / name / "best.pt").exists()}
    val = {name: load_checkpoint(path)["val_score"] for name, (_, _, path) in rivals.items()}
    best = max(val, key=val.get)
    rivals = {name: rivals[name] for name in {"mel": 0, best: 0}}

    tested = {name: test_answers(step, *network[:2]) for name, network in (trained | rivals).items()}
    compared = {name: {"weights": count_weights(rival[0]), "val": {"macro_f1": val[name]}, "test": tested[name][0]} for name, rival in rivals.items()}
    runs = {name: {key: value for key, value in facts.items() if key not in ("history", "val_score")} | {"test": tested[name][0]} for name, (_, _, facts) in trained.items()}
    for name, (_, _, facts) in trained.items():
        if facts["n_val"]:
            runs[name]["val"] = {"macro_f1": facts["val_score"]}
    if args.ensemble:
        runs |= score_ensembles(tested, [name for name in trained if name.endswith("all_clips")], best)
    beats = {name for name in rivals if rivals[name][1]["beat"]}
    write_text(step.folder / "predictions.csv", pd.concat(
        genre_predictions(name, name in beats, list(mean.columns), mean.index, targets, mean.to_numpy().argmax(1))
        for name, (_, targets, mean) in tested.items()).to_csv(index=False))  # fmt: skip

    digits = report_digits(step)
    step.heading("7b. The network and its training")
    step.text(f"Four blocks of convolution, batch normalisation, ReLU and max pooling, {result['weights']:,} weights with the output layer, trained "
              f"on {result['n_train']} clips; of the last fifth of the epochs, the one with the best macro-F1 on {result['n_val']} validation clips was kept (dot).")  # fmt: skip
    fig, ax = plt.subplots(figsize=(7, 4))
    plot_history(ax, result["history"], "CNN on mel spectrograms", "macro-F1")
    step.figure(fig, "learning_curve", "Loss and validation macro-F1 against the epoch; training clips are mixed and masked, so their loss may stay the higher one")
    further = runs["cnn_mel_all_clips"]
    step.text(f"Trained for {further['epochs']} more epochs at half the rate on all {further['n_train']} clips of the training and validation sets, it becomes `cnn_mel_all_clips`. "
              + " ".join(f"On the test set `{name}` has " + ", ".join(f"{label[5:]} {cell}" for label, cell in test_cells(runs[name]["test"]).items()) + "."
                         for name in ("cnn_mel", "cnn_mel_all_clips")))  # fmt: skip
    operations = report_operations(step, model, settings, digits)
    if (step.folder / "cnn_mel" / "overfit.csv").exists():
        report_overfit(step)
    paired = report_comparison(step, runs, compared, tested)
    return step.finish(runs, compared_with=compared, paired_difference=paired, digits=digits, operations=operations)


def test_answers(step, model, settings):
    """Scores on the test split, true classes and log-probabilities by clip id."""
    scores, targets, logits, ids = score_genre(step, model, settings)
    return scores, pd.Series(targets, ids), pd.DataFrame(log_softmax(logits, axis=1), ids, settings["classes"])


def score_ensembles(tested, members, lstm):
    """Average log-probabilities: CNNs of three seeds, and these half and half with an LSTM.

    tested : {run: see `test_answers`}; the averages are added to it
    members, lstm : names of runs in it
    """
    cnn = sum(tested[name][2] for name in members) / len(members)
    both = (cnn + tested[lstm][2]).dropna()  # pandas adds by clip id
    runs = {}
    for name, mean, names in (("cnn_ensemble", cnn, members), ("cnn_lstm_ensemble", both, [*members, lstm])):
        targets = tested[members[0]][1][mean.index]
        scores = classification_scores(targets, mean.to_numpy().argmax(1), list(mean.columns))
        tested[name], runs[name] = (scores, targets, mean), {"members": names, "test": scores}
    return runs


def report_overfit(step):
    """d) The curve of the last --overfit-batch run."""
    curve = pd.read_csv(step.folder / "cnn_mel" / "overfit.csv")
    last = curve.iloc[-1]
    fig, ax = plt.subplots(figsize=(7, 4))
    ax.semilogy(curve["epoch"], curve["train_loss"], color=COLORS[0])
    ax.axhline(0.01, color="grey", linestyle=":", label="goal")
    ax.set(xlabel="Pass over the batches", ylabel="Cross-entropy (log scale)", title="CNN: fixed batches learned by heart")
    ax.legend()
    step.heading("7d. Overfitting a few batches")
    step.text(f"With regularisation off, {last['epoch']:.0f} passes over the same few batches of training clips bring the loss to {last['train_loss']:.4f} "
              f"with {last['accuracy']:.1%} of the clips right. " + ("Gradients, loss and labels are wired correctly." if last["train_loss"] < 0.01
              else "That is not the goal: something between data and loss is broken."))  # fmt: skip
    step.figure(fig, "overfit_batch", "Training loss on a few fixed batches, regularisation off")


# a) Digits instead of the browser demo: the same operations, on images that fit on a page.


def digit_cnn(without=None):
    """Two blocks for 8 x 8 pixels, one of the operations left out; a convolution left out still mixes channels."""
    kernel = 1 if without == "Conv2d" else 3
    side = 8 if without == "MaxPool2d" else 2

    def block(c_in):
        operations = [nn.Conv2d(c_in, 8, kernel, padding=kernel // 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(operations[0], *[operation for operation in operations[1:] if type(operation).__name__ != without])

    return nn.Sequential(block(1), block(8), nn.Flatten(), nn.Linear(8 * side**2, 10))


def train_digits(data, seed, epochs, without=None):
    """Train on (x_train, y_train, x_test, y_test); returns the model after epochs 0, 1 and the last, and every test accuracy."""
    x_train, y_train, x_test, y_test = data
    seed_everything(seed)
    model, models, accuracy = digit_cnn(without), {}, []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs + 1):
        for rows in torch.randperm(len(x_train)).split(64) if epoch else ():  # epoch 0 is the untrained network
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x_train[rows]), y_train[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append(float((model.eval()(x_test).argmax(1) == y_test).float().mean()))
        if epoch in (0, 1, epochs):
            models[epoch] = copy.deepcopy(model)
    return models, accuracy


@torch.no_grad()
def activations(blocks, x):
    """Output of every operation of every block: image (B, 1, T, F) -> {(block, operation): (B, C, t, f)}."""
    outputs = {}
    for number, block in enumerate(blocks, start=1):
        for operation in block:
            x = operation(x)
            outputs[number, type(operation).__name__] = x
    return outputs


def report_digits(step) -> dict:
    """a) Activations of every layer for one digit, before, early in and after training."""
    images, labels = load_digits(return_X_y=True)
    train_idx, test_idx = split_indices(len(labels), 0.2, step.args.seed, labels)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    data = x[train_idx], y[train_idx], x[test_idx], y[test_idx]
    epochs, n_seeds = (3, 1) if step.args.smoke else (15, 3)
    models, accuracy = train_digits(data, step.args.seed, epochs)
    step.heading("7a. A small CNN on handwritten digits")
    step.text(f"Two blocks of the same four operations and an output layer ({count_weights(models[0])} weights), trained on {len(train_idx)} of "
              f"scikit-learn's 8 x 8 digits. Accuracy on the other {len(test_idx)}: {accuracy[0]:.3f} untrained, {accuracy[1]:.3f} after one epoch, "
              f"{accuracy[-1]:.3f} after {epochs}.")  # fmt: skip
    step.figure(plot_digit(models, data[2][:1], int(data[3][0]), accuracy), "digit_activations",
                "One test digit through the network, top to bottom, before, early in and after training (left to right). Red: positive, blue: negative, white: zero; beside each row of maps, the value of the darkest colour")  # fmt: skip

    # What a layer has learned, in a number: how often the nearest class mean is the right one.
    nearest = {}
    for epoch, model in models.items():
        seen, new = (activations(model[:2], part) for part in (data[0], data[2]))
        means = {key: torch.stack([maps[data[1] == digit].mean(0).flatten() for digit in range(10)]) for key, maps in seen.items()}  # (10, C * h * w)
        hits = {key: torch.cdist(maps.flatten(1), means[key]).argmin(1) == data[3] for key, maps in new.items()}
        nearest[f"epoch {epoch}"] = {f"block {block}, {name}": float(hit.float().mean()) for (block, name), hit in hits.items()}
    step.table(pd.DataFrame(nearest).rename_axis("after"), "Share of test digits whose activations lie nearest to the mean of their own class")
    first, last = (nearest[f"epoch {epoch}"]["block 2, MaxPool2d"] for epoch in (0, epochs))
    step.text(f"In the last row this share goes from {first:.3f} to {last:.3f}: with training, what the last maps hold tells the digits apart "
              f"{'better' if last > first else 'no better'} than with random filters.")  # fmt: skip

    # c) The role of an operation shows where it is missing: same seeds, one left out.
    variants = {"all four operations": None, "1 x 1 convolutions": "Conv2d"} | {f"without {name}": name for name in OPERATIONS[1:]}
    left_out = {}
    for label, without in variants.items():
        curves = np.array([train_digits(data, step.args.seed + i, epochs, without)[1] for i in range(n_seeds)])
        left_out[label] = {"after 1 epoch": curves[:, 1].mean(), f"after {epochs} epochs": curves[:, -1].mean(), "weights": f"{count_weights(digit_cnn(without))}"}
    return {"accuracy": accuracy, "nearest_class_mean": nearest, "left_out": left_out, "n_seeds": n_seeds}


def in_a_row(maps):
    """Maps (C, h, w) side by side, with gaps: (h, C * (w + 1))."""
    return np.hstack(list(np.pad(maps.numpy(), ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)))


def plot_digit(models, digit, label, accuracy):
    """Rows: digit, filters, every operation, answer; columns: epochs."""
    shown = {epoch: activations(model[:2], digit) for epoch, model in models.items()}
    rows = {"input": {epoch: digit[0] for epoch in models}, "block 1: filters": {epoch: model[0][0].weight[:, 0].detach() for epoch, model in models.items()}}
    rows |= {f"block {key[0]}: {key[1]}": {epoch: maps[key][0] for epoch, maps in shown.items()} for key in shown[0]}
    fig, axes = plt.subplots(len(rows) + 1, len(models), figsize=(13, 8.5), gridspec_kw={"hspace": 0.3, "wspace": 0.25})
    for row, (name, maps) in zip(axes, rows.items(), strict=False):
        for ax, values in zip(row, maps.values(), strict=True):
            limit = float(values.abs().max())
            ax.imshow(in_a_row(values), cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[], frame_on=False)
            ax.text(1.01, 0.5, f"±{limit:.2g}", transform=ax.transAxes, va="center", fontsize="small")
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, top, (epoch, model) in zip(axes[-1], axes[0], models.items(), strict=True):
        top.set_title(f"epoch {epoch}: test accuracy {accuracy[epoch]:.3f}")
        with torch.no_grad():
            ax.bar(range(10), model(digit)[0].softmax(0), color=[COLORS[1] if k == label else COLORS[5] for k in range(10)])
        ax.set(ylim=(0, 1), xticks=range(10), xlabel="digit (orange: the right one)", ylabel="probability" if epoch == 0 else "")
    return fig


# c) The same view of the genre network, and what each operation does to its numbers.


def report_operations(step, model, settings, digits) -> dict:
    """Pictures and measures of the trained genre CNN at work, on validation clips."""
    backbone = copy.deepcopy(model.backbone).cpu().eval()
    frames_per_step = backbone.frames_per_step
    data = load_genre(step.data, seed=step.args.seed, merge=settings["merge"], skip_bad=step.args.skip_bad)
    clip, target, length = data.val[step.args.seed % len(data.val)]
    with torch.no_grad():
        answer = int(model.eval()(clip[None].to(step.device), torch.tensor([length])).argmax())
    maps = activations(backbone.blocks, average_frames(clip[None], torch.tensor([length]), frames_per_step)[0].unsqueeze(1))  # of (1, 1, T, F)
    mean, std = settings["stats"]
    title = f"a validation clip of class {settings['classes'][int(target)]}, recognised as {settings['classes'][answer]}"
    by = ", ".join(str(block[-1].kernel_size[0]) for block in backbone.blocks)
    step.figure(plot_blocks(maps, (clip * std + mean).T, title), "genre_activations",
                f"What the four blocks make of {title}: four channels of each. Every block halves the resolution in frequency; that in time they divide by {by}")  # fmt: skip
    step.heading("7c. What the four operations do")
    step.figure(plot_operations(maps, len(clip) * HOP / SR), "block_operations",
                "The four operations of block 1, left to right, on the same clip: three channels, and the distribution of all values. One colour scale per column")  # fmt: skip
    filters = backbone.blocks[0][0].weight[:, 0].detach().mT.flip(1)  # (C, frequency upwards, time)
    fig, ax = plt.subplots(figsize=(12, 1.8))
    limit = float(filters.abs().max())
    fig.colorbar(ax.imshow(in_a_row(filters), cmap="RdBu_r", vmin=-limit, vmax=limit), ax=ax, label="weight", shrink=0.7)
    size = filters.shape[1]
    ax.set(facecolor="0.8", yticks=[], ylabel="Mel band", xlabel=f"Time ({1000 * frames_per_step * HOP / SR:.0f} ms per column), channel by channel")
    ax.set_xticks(np.arange(len(filters)) * (size + 1) + size // 2, range(len(filters)))
    along_time = ((filters.diff(dim=2).abs().mean((1, 2)) > filters.diff(dim=1).abs().mean((1, 2))).sum()).item()
    step.figure(fig, "filters", f"The {len(filters)} filters of block 1 as learned. {along_time} of them change more along time (they answer to onsets and endings), "
                f"{len(filters) - along_time} more along frequency (harmonics, edges of bands)")  # fmt: skip

    parts = data.val.dataset.variant(crop=settings["window"]).__getitems__(data.val.indices[:32])
    shortest = min(n for _, _, n in parts)  # no padding in the measures
    x = average_frames(torch.stack([clip for clip, _, _ in parts])[:, :shortest], torch.full((len(parts),), shortest), frames_per_step)[0].unsqueeze(1)
    measured, before, rows = activations(backbone.blocks, x), x, {}
    sees, stride = np.array([1, 1]), np.array([1, 1])  # in columns and bands: what a cell is made of, and how far its neighbour is
    for block, operations in enumerate(backbone.blocks, start=1):
        conv, norm, relu, pool = (measured[block, name] for name in OPERATIONS)
        kernel, pooled_by = (np.array(operations[place].kernel_size) for place in (0, 3))  # (columns, bands)
        sees, stride = sees + (kernel - 1 + pooled_by - 1) * stride, stride * pooled_by
        rows[block] = {"bands x columns, in": f"{before.shape[3]} x {before.shape[2]}", "pooled by": f"{pooled_by[1]} x {pooled_by[0]}",
                       "out": f"{pool.shape[3]} x {pool.shape[2]}", "channels": pool.shape[1], "weights": count_weights(operations), "sees": f"{sees[1]} bands, {sees[0] * frames_per_step * HOP / SR:.1f} s"}  # fmt: skip
        for name, values in (("before BN", conv), ("after BN", norm)):
            low, high = values.mean((0, 2, 3)).aminmax()
            sd = values.std((0, 2, 3))
            rows[block] |= {f"channel means {name}": f"{low:.2f} to {high:.2f}", f"channel sds {name}": f"{sd.min():.2f} to {sd.max():.2f}"}
        rows[block] |= {"zeros after ReLU": f"{(relu == 0).float().mean():.0%}", "zeros after pooling": f"{(pool == 0).float().mean():.0%}"}
        before = pool
    step.table(pd.DataFrame(rows).rename_axis("block"), f"The four blocks, measured on {len(x)} stretches of {shortest * HOP / SR:.1f} s of validation clips")
    step.table(pd.DataFrame(digits["left_out"]).T.rename_axis("digit CNN"), f"Test accuracy on digits with one operation left out, seeds averaged: {digits['n_seeds']}")
    explain(step, rows, digits["left_out"])
    return rows


def explain(step, rows, left_out):
    """c) Function and role of each operation, with what was measured above."""
    first, *_, last = rows.values()
    early, late = list(left_out["all four operations"])[:2]

    def digits(variant):
        scores = left_out[variant], left_out["all four operations"]
        return f"{scores[0][early]:.3f} {early} and {scores[0][late]:.3f} {late}, against {scores[1][early]:.3f} and {scores[1][late]:.3f} with all four"

    step.text(f"""
**Convolution** takes a weighted sum over a small neighbourhood in time and frequency and over all channels below, with the same weights
at every place: a pattern is found wherever it occurs, and few weights do ({first['weights']} in block 1, those of the batch
normalisation included). Digits with 1 x 1 convolutions, which see no neighbours: {digits('1 x 1 convolutions')}.

**Batch normalisation** brings each channel to mean 0 and standard deviation 1 over the batch and all places, then scales and shifts it by
two learned numbers; when scoring it uses the averages kept from training. The channels' standard deviations are {first['channel sds before BN']} before
and {first['channel sds after BN']} after it in block 1, {last['channel sds before BN']} and {last['channel sds after BN']} in block {len(rows)}. It keeps the size of activations and
gradients in hand whatever the layers below do, so a higher learning rate can be used. Digits without it: {digits('without BatchNorm2d')}.

**ReLU** sets negative values to zero, {first['zeros after ReLU']} of all in block 1 and {last['zeros after ReLU']} in block {len(rows)}: a channel says where its pattern is and is
silent elsewhere. It makes the network non-linear: stacked convolutions alone would be one linear map, and only max pooling would be
left to bend it. Digits without it: {digits('without ReLU')}.

**Max pooling** keeps the largest of {first['pooled by']} neighbours (bands x columns) in block 1, from {first['bands x columns, in']} cells to {first['out']}, and of {last['pooled by']}
in block {len(rows)}. The next block has fewer cells to work on and sees as many times further: after block {len(rows)} a cell sees {last['sees']}. That a pattern was there is kept, exactly where is forgotten. Digits
without it: {digits('without MaxPool2d')}, the output layer being larger ({left_out['without MaxPool2d']['weights']} weights in all instead of {left_out['all four operations']['weights']}).
""")


def telling_channels(maps, n):
    """n channels of (C, t, f): the one that varies most, then each time the one least like those chosen."""
    spread = maps.flatten(1).std(1)
    likeness = torch.corrcoef(maps.flatten(1)).abs().nan_to_num(1.0)  # a silent channel is like all others
    likeness[:, spread < spread.median()] = 1.0
    chosen = [int(spread.argmax())]
    while len(chosen) < n:
        chosen.append(int(likeness[chosen].amax(0).argmin()))
    return chosen


def draw_map(ax, values, seconds, title, left, bottom, **scale):
    """One channel (t, f) as an image over time and mel bands; axes named only left and at the bottom."""
    image = ax.imshow(values.T, origin="lower", aspect="auto", extent=(0, seconds, 0, N_MELS), **scale)
    ax.set(**{"ylabel": "Mel band"} if left else {"yticks": []}, **{"xlabel": "Time (s)"} if bottom else {"xticks": []})
    ax.set_title(f"{title} ({values.shape[1]} x {values.shape[0]})", fontsize="small")
    return image


def plot_blocks(maps, mel_db, title):
    """Spectrogram on top, then four channels of the output of each block."""
    seconds, n_blocks = mel_db.shape[1] * HOP / SR, max(block for block, _ in maps)
    fig = plt.figure(figsize=(13, 12), layout="constrained")
    grid = fig.add_gridspec(n_blocks + 1, 4)
    top = fig.add_subplot(grid[0, :], title=title[0].upper() + title[1:])
    fig.colorbar(plot_spectrogram(top, mel_db), ax=top, format="%+.0f dB")
    for block in range(1, n_blocks + 1):
        output = maps[block, "MaxPool2d"][0]  # (C, t, f)
        for column, channel in enumerate(telling_channels(output, 4)):
            draw_map(fig.add_subplot(grid[block, column]), output[channel], seconds, f"block {block}, channel {channel}",
                     left=column == 0, bottom=block == n_blocks, cmap="magma", vmin=0)  # fmt: skip
    return fig


def plot_operations(maps, seconds):
    """Columns: the four operations of block 1; rows: three channels, then all values as a histogram."""
    channels = telling_channels(maps[1, "ReLU"][0], 3)
    fig, axes = plt.subplots(len(channels) + 1, len(OPERATIONS), figsize=(14, 10), layout="constrained")
    for column, (ax, name) in enumerate(zip(axes[-1], OPERATIONS, strict=True)):
        values = maps[1, name][0]  # (C, t, f)
        limit = float(values[channels].abs().quantile(0.998))  # a few extremes would pale the rest
        for row, channel in zip(axes, channels, strict=False):
            image = draw_map(row[column], values[channel], seconds, f"{name}, channel {channel}", left=column == 0, bottom=channel == channels[-1],
                             cmap="RdBu_r", vmin=-limit, vmax=limit)  # fmt: skip
        fig.colorbar(image, ax=list(axes[:-1, column]), location="bottom", aspect=30)
        ax.hist(values.flatten().numpy(), bins=60, color=COLORS[0], log=True)
        ax.set(xlabel=f"Value after {name}", ylabel="" if column else "Cells (log scale)",
               title=f"mean {values.mean():.2f}, sd {values.std():.2f}, zeros {(values == 0).float().mean():.0%}")  # fmt: skip
    return fig


# e) The CNN against the LSTM.


def test_cells(test) -> dict:
    """Test scores with their intervals, as cells of a table."""
    labels = (("accuracy", "test accuracy"), ("macro_f1", "test macro-F1"))
    return {label: "{:.3f} [{:.3f}, {:.3f}]".format(test[key], *test[f"{key}_ci95"]) for key, label in labels}


def report_comparison(step, runs, compared, tested):
    """Table, per-class scores, paired differences, confusion matrices."""
    classes, scores = list(tested["cnn_mel"][2].columns), {name: run["test"] for name, run in (runs | compared).items()}
    step.heading("7e. Genre recognition, against the LSTM")
    table = {}
    for name, run in (runs | compared).items():
        table[name] = {"val macro-F1": run["val"]["macro_f1"] if "val" in run else "-", "weights": run.get("weights", "-")} | test_cells(run["test"])
    step.table(pd.DataFrame(table).T.rename_axis("model"),
               f"{scores['cnn_mel']['n_clips']} test clips, 95% bootstrap intervals; `cnn_mel` is the CNN, `mel` the LSTM of step 5a")  # fmt: skip
    step.text("The differences below are of `cnn_mel`, which has learned from the same clips as the LSTMs; steps 8 to 11 go on from it too.")
    if "cnn_ensemble" in runs:
        seeds = [runs[name]["test"] for name in runs["cnn_ensemble"]["members"]]
        step.text("Mean and standard deviation over three seeds, with all clips: " + ", ".join(
            f"{label} {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" for label, values in
            (("accuracy", [test["accuracy"] for test in seeds]), ("macro-F1", [test["macro_f1"] for test in seeds]))) + ".")  # fmt: skip
        step.text("`cnn_ensemble` averages the log-probabilities of these three, "
                  f"`cnn_lstm_ensemble` these and those of LSTM `{runs['cnn_lstm_ensemble']['members'][-1]}`, half and half. Nothing in them was chosen on the test set.")  # fmt: skip

    paired = {}
    for other in compared:
        ids = tested["cnn_mel"][1].index.intersection(tested[other][1].index)
        guesses = [tested[name][2].loc[ids].to_numpy().argmax(1) for name in ("cnn_mel", other)]
        paired[other] = difference = paired_bootstrap(tested["cnn_mel"][1][ids].to_numpy(), *guesses, len(classes))
        for key, label in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1")):
            low, high = difference[f"{key}_ci95"]
            step.text(f"{label} of the CNN minus that of LSTM `{other}`, on the same clips: {difference[key]:+.3f}, 95% interval [{low:+.3f}, {high:+.3f}]: "
                      + ("the CNN is better." if low > 0 else "the LSTM is better." if high < 0 else "no difference is shown."))  # fmt: skip
        step.text(f"The CNN alone is right on {difference['only_first']} clips, LSTM `{other}` alone on {difference['only_second']}.")

    f1 = pd.DataFrame({name: {k: scores[name]["per_class"][k]["f1"] for k in classes} for name in ("cnn_mel", *compared)})
    columns = {f"{name} {label}": {k: scores[name]["per_class"][k][label.lower()] for k in classes}
               for name in ("cnn_mel", *compared) for label in ("precision", "recall", "F1")}  # fmt: skip
    columns["clips"] = {k: scores["cnn_mel"]["per_class"][k]["support"] for k in classes}
    step.table(pd.DataFrame(columns).rename_axis("class"), "Per class")
    gain = (f1["cnn_mel"] - f1["mel"]).sort_values()
    step.text(f"Against the LSTM on mel, F1 is higher for {(gain > 0).sum()} of {len(classes)} classes; the difference is largest for {gain.index[-1]} "
              f"({gain.iloc[-1]:+.3f}) and smallest for {gain.index[0]} ({gain.iloc[0]:+.3f}).")  # fmt: skip
    fig, ax = plt.subplots(figsize=(10, 4))
    f1.plot.bar(ax=ax, color=[COLORS[0], COLORS[1], COLORS[2]][: len(f1.columns)], width=0.8, rot=45)
    ax.set(xlabel="Class (test clips)", ylabel="F1 on the test set", ylim=(0, 1))
    ax.set_xticklabels([f"{k} ({scores['cnn_mel']['per_class'][k]['support']})" for k in classes], ha="right")
    step.figure(fig, "per_class", "F1 per class, CNN and LSTM")
    fig, axes = plt.subplots(1, len(f1.columns), figsize=(5.6 * len(f1.columns), 5.4), layout="constrained")
    for ax, name in zip(axes, f1.columns, strict=True):
        plot_confusion(ax, scores[name]["confusion"], classes, f"{name} (accuracy {scores[name]['accuracy']:.3f})")
    step.figure(fig, "confusion", "Confusion matrices on the test set: colour is the share of the true class, numbers are clips")
    return paired


if __name__ == "__main__":
    metrics = run_main(main)
