"""Figures, every one labelled with units."""

import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.font_manager import get_font_names

from patrec.features import DB_FLOOR, HOP, N_CHROMA, N_MELS, NOTES, SR
from patrec.labels import EMOTIONS
from patrec.recipes import GENRE_NETWORKS

plt.rcParams["text.parse_math"] = False  # "Ca$h" is the name of a class, not a formula
# Letters that matplotlib's own font lacks come from the first of these that is installed.
ASIAN_FONTS = ("Noto Sans CJK JP", "IPAexGothic", "Yu Gothic", "Hiragino Sans", "Microsoft YaHei")
INSTALLED = set(get_font_names())
plt.rcParams["font.family"] = ["sans-serif", *(f for f in ASIAN_FONTS if f in INSTALLED)]

# Ten colours that colour-blind readers can tell apart (Wong, 2011, two added), and marks for print.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7",
          "#000000", "#56B4E9", "#F0E442", "#7F3C8D", "#999999")  # fmt: skip
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "p", "<", ">")


def plot_spectrogram(ax, array, kind="mel", beat=False):
    """Draw (F, T) rows of a clip over seconds or beats: mel in dB over Hz, or chroma over notes."""
    import librosa.display

    axes = {"x_axis": "frames" if beat else "time", "y_axis": kind, "sr": SR, "hop_length": HOP}
    low, high, colors = (DB_FLOOR, 0, "magma") if kind == "mel" else (0, 1, "viridis")
    array = np.asarray(array, dtype=float)
    image = librosa.display.specshow(array, ax=ax, vmin=low, vmax=high, cmap=colors, **axes)
    ax.set(xlabel="Time (beats)" if beat else "Time (s)", ylabel="Frequency (Hz)")
    if kind == "chroma":
        ax.set_yticks(range(N_CHROMA), NOTES, fontsize="small")
        ax.set_ylabel("Pitch class")
    return image


def mel_ticks(axis):
    """Label an axis of mel bands (a band is one unit long, the first begins at 0) in Hz."""
    import librosa

    centres = librosa.mel_frequencies(N_MELS + 2, fmax=SR / 2)[1:-1]
    hertz = [256, 512, 1024, 2048, 4096, 8192]
    axis.set_ticks(np.interp(hertz, centres, np.arange(N_MELS) + 0.5), hertz)


def run_title(name) -> str:
    """A run as figures name it: 'beat_mel' -> 'LSTM, mel, beats', 'cnn_energy' -> 'CNN energy'."""
    run, _, seed = name.partition("_seed")
    if not (network := GENRE_NETWORKS.get(run)):
        words = name.replace("_", " ")
        words = re.sub(r"^beat (.*)", r"\1, beats", words)
        return re.sub(r"\b(cnn|lstm|sv[mr])\b", lambda found: found[0].upper(), words)
    features = "mel and chroma" if network.features == "fused" else network.features
    marks = {"beats": network.beat, "textbook": network.plain, f"seed {seed}": seed}
    return ", ".join([network.kind.upper(), features, *(mark for mark in marks if marks[mark])])


def in_a_row(maps):
    """Maps (C, h, w) side by side, with gaps: (h, C * (w + 1))."""
    return np.hstack([np.pad(one, ((0, 0), (0, 1)), constant_values=np.nan) for one in maps])


def plot_activations(columns, label):
    """The output of every layer for a digit, and the probabilities of the ten digits.

    columns : {title: ({layer: maps (C, h, w)}, probabilities (10,))}
    label : int, the true digit
    """
    n_rows = len(next(iter(columns.values()))[0]) + 1
    fig, axes = plt.subplots(n_rows, len(columns), figsize=(13, 9), layout="constrained")
    for column, (title, (layers, chances)) in zip(axes.T, columns.items(), strict=True):
        for ax, (name, maps) in zip(column, layers.items(), strict=False):
            limit = float(abs(maps).max())
            ax.imshow(in_a_row(maps), cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[], frame_on=False)
            ax.set_ylabel(f"{name}\n±{limit:.2g}", rotation=0, ha="right", va="center")
        column[0].set_title(title)
        bars = column[-1].bar(range(10), chances, color=COLORS[6])
        bars[label].set_color(COLORS[1])
        column[-1].set(ylim=(0, 1), xticks=range(10), xlabel="Digit (orange: the true one)")
    axes[-1, 0].set_ylabel("Probability")
    return fig


def plot_operations(outputs, channel, seconds):
    """What the operations of a block do: one channel of a clip, and all values of all clips.

    outputs : {operation: (B, C, time, mel bands)}; channel : int, the one to show
    """
    fig, axes = plt.subplots(2, len(outputs), figsize=(14, 6), layout="constrained")
    look = {"origin": "lower", "aspect": "auto", "extent": (0, seconds, 0, N_MELS)}
    for name, (upper, lower) in zip(outputs, axes.T, strict=True):
        values = np.asarray(outputs[name])
        shown = values[0, channel].T
        limit = abs(shown).max()
        image = upper.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, **look)
        fig.colorbar(image, ax=upper, location="bottom", aspect=30, label=f"Value after {name}")
        upper.set(xlabel="Time (s)", ylabel="Frequency (Hz)")
        size = "{} bands x {} columns".format(*shown.shape)
        upper.set_title(f"{name}, channel {channel}\n{size}")
        mel_ticks(upper.yaxis)
        lower.hist(values.ravel(), bins=60, color=COLORS[0], log=True)
        mean, zeros = values.mean().round(2) + 0, np.mean(values == 0)  # + 0: no -0.00
        facts = f"mean {mean:.2f}, sd {values.std():.2f}, zeros {zeros:.0%}"
        lower.set(xlabel=f"Value after {name}", ylabel="Cells (log scale)", title=facts)
    return fig


def panel_grid(n_panels, n_columns, width, height):
    """A figure with n panels of this size in inches, row by row, and their axes."""
    n_rows = math.ceil(n_panels / n_columns)
    size = (width * n_columns, height * n_rows)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[n_panels:]:
        ax.remove()
    return fig, axes.flat[:n_panels]


def plot_history(ax, history, title, score_name):
    """Loss and, on the right axis, which is returned, validation score; a dot: the kept epoch."""
    right, green = ax.twinx(), COLORS[2]
    ax.plot("epoch", "train_loss", data=history, color=COLORS[0], label="training loss")
    ax.plot("epoch", "val_loss", data=history, color=COLORS[3], label="validation loss")
    label = f"validation {score_name}"
    right.plot("epoch", "val_score", "--", data=history, color=green, label=label)
    ax.set(xlabel="Epoch", ylabel="Loss", title=title)
    right.set_ylabel(f"Validation {score_name}", color=green)
    right.tick_params(labelcolor=green)
    settled = history.query("settled == 1")["epoch"]
    if 0 < len(settled) < len(history):  # the best of them is kept; a run cut short may have none
        span, look = (settled.min() - 0.5, settled.max() + 0.5), {"color": "0.92", "zorder": 0}
        ax.axvspan(*span, **look, label="epochs of which the best is kept")
    best = history.query("kept == 1").iloc[-1]  # each one kept replaces the one before
    right.plot(best["epoch"], best["val_score"], "o", color=green, label="kept epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return right


def plot_histories(histories, score_name):
    """One panel of `plot_history` per run, {name: history}, with equal axes."""
    n_columns = 3 if len(histories) == 3 else min(2, len(histories))
    width = 4.6 if n_columns > 1 else 6  # the legend needs it
    fig, axes = panel_grid(len(histories), n_columns, width, 3.2)
    rights = [
        plot_history(ax, history, run_title(name), score_name)
        for ax, (name, history) in zip(axes, histories.items(), strict=True)
    ]
    lowest = min(0, *(min(history["val_score"]) for history in histories.values()))
    plt.setp(rights, ylim=(lowest, 1))
    losses = np.concatenate([ax.get_ylim() for ax in axes])
    plt.setp(axes, ylim=(losses.min(), losses.max()))
    drawn = [one for ax in (*axes, *rights) for one in ax.get_legend_handles_labels()[0]]
    by_label = {one.get_label(): one for one in drawn}
    columns = (2, 3, 5)[n_columns - 1]
    fig.legend(handles=list(by_label.values()), loc="outside lower center", ncols=columns)
    return fig


def plot_overfit(checks):
    """Training loss on fixed batches, {name: OverfitCheck}, on a logarithmic scale."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, check), color in zip(checks.items(), COLORS, strict=False):
        ax.semilogy("pass", "loss", data=check.history, color=color, label=run_title(name))
    ax.axhline(0.01, color="grey", linestyle=":", label="goal: 0.01")
    ax.set(xlabel="Pass over the batches", ylabel="Training loss (log scale)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize="small")
    return fig


def plot_confusion(ax, confusion, classes, title=""):
    """Confusion matrix: share of each true class, with the counts written in."""
    counts = np.asarray(confusion)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    centred = {"ha": "center", "va": "center", "fontsize": "small"}
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if share[row, column] > 0.5 else "black"
        ax.text(column, row, count or "", color=color, **centred)
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="Predicted class", ylabel="True class", title=title)
    return image


def plot_confusions(scores, classes):
    """One panel of `plot_confusion` per model: {run: `classification_scores`}."""
    fig, axes = panel_grid(len(scores), len(scores), 5.6, 5.4)
    for ax, (name, facts) in zip(axes, scores.items(), strict=True):
        title = f"{run_title(name)} (accuracy {facts['accuracy']:.3f})"
        plot_confusion(ax, facts["confusion"], classes, title)
    return fig


def plot_per_class(scores):
    """F1 per class, a colour per model: {run: `classification_scores`}."""
    tables = {run_title(name): pd.DataFrame(facts["per_class"]).T for name, facts in scores.items()}
    f1 = pd.DataFrame({title: table["f1"] for title, table in tables.items()})
    support = next(iter(tables.values()))["support"]
    f1.index = [f"{label} ({support[label]:.0f})" for label in f1.index]
    fig, ax = plt.subplots(figsize=(10, 4), layout="constrained")
    f1.plot.bar(ax=ax, color=list(COLORS[: len(tables)]), width=0.8, ylim=(0, 1))
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    ax.set(xlabel="Class (number of test clips)", ylabel="F1 on the test set")
    return fig


def plot_scores(ax, names, values, intervals, xlabel):
    """Horizontal bars with 95% intervals, the first name on top, the values at the right."""
    y = np.arange(len(names))[::-1]
    errors = np.abs(np.array(intervals, dtype=float).T - np.array(values))
    ax.barh(y, values, xerr=errors, color=COLORS[6], ecolor="black", capsize=3)
    ax.set_yticks(y, [run_title(name) for name in names])
    ax.set(xlabel=xlabel, xlim=(min(0, np.nanmin(np.array(intervals)) - 0.02), 1))
    for position, value in zip(y, values, strict=True):
        written = "none" if math.isnan(value) else f"{value:.3f}"  # none: a model without it
        ax.text(1.01, position, written, transform=ax.get_yaxis_transform(), va="center")


def plot_emotion_scores(scores):
    """One panel of `plot_scores` per emotion and for the mean: {model: `emotion_scores`}."""
    names, height, lows = list(scores), 0.3 * len(scores) + 0.9, []
    fig, axes = plt.subplots(2, 2, figsize=(10, 2 * height), layout="constrained", sharey=True)
    for ax, key in zip(axes.flat, (*EMOTIONS, "mean_spearman"), strict=True):
        none = {key: math.nan, f"{key}_ci95": [math.nan] * 2}  # a model of one emotion: no bar
        rows = [none | scores[name] for name in names]
        values, intervals = [row[key] for row in rows], [row[f"{key}_ci95"] for row in rows]
        plot_scores(ax, names, values, intervals, "Spearman (line: 95% interval)")
        ax.set_title(key.replace("_spearman", " of the three"))
        lows.append(ax.get_xlim()[0])
    plt.setp(axes, xlim=(min(lows), 1))
    return fig


def plot_panels(panels, n_columns, kind="mel", size=(4.8, 2.8)):
    """Spectrograms side by side under one colour scale.

    panels : list of (title, (F, T) array, whether its steps are beats), row by row
    size : width and height of a panel, in inches
    """
    fig, axes = panel_grid(len(panels), n_columns, *size)
    for index, (ax, (title, array, beat)) in enumerate(zip(axes, panels, strict=True)):
        image = plot_spectrogram(ax, array, kind, beat)
        ax.set_title(title, fontsize="medium")
        if index % n_columns:
            ax.set(ylabel="", yticklabels=[])
    mel, chroma = (
        "Power (dB, 0: the array's loudest cell)",
        "Strength (full: a frame's maximum is 1)",
    )
    shrink = min(1, 5 / fig.get_figheight())
    fig.colorbar(image, ax=fig.axes, label=mel if kind == "mel" else chroma, shrink=shrink)
    return fig
