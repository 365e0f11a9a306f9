"""Figures, every one labelled with units."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from patrec.features import DB_FLOOR, HOP, N_CHROMA, NOTES, SR
from patrec.labels import EMOTIONS

# Ten colours that colour-blind readers can tell apart (Wong, 2011, two added), and marks for print.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7",
          "#56B4E9", "#000000", "#F0E442", "#7F3C8D", "#999999")  # fmt: skip

MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")


def plot_spectrogram(ax, array, kind="mel", beat=False):
    """Draw (F, T) rows of a clip: mel in dB over Hz, or chroma over note names.

    Time runs in seconds, or in beats for beat-synchronised arrays.
    """
    import librosa.display

    scale = {"vmin": DB_FLOOR, "vmax": 0, "cmap": "magma"}
    if kind == "chroma":
        scale = {"vmin": 0, "vmax": 1, "cmap": "viridis"}
    axes = {"x_axis": None if beat else "time", "y_axis": kind}
    array = np.asarray(array, dtype=float)
    image = librosa.display.specshow(array, sr=SR, hop_length=HOP, ax=ax, **axes, **scale)
    ax.set_xlabel("Time (beats)" if beat else "Time (s)")
    ax.set_ylabel("Frequency (Hz)" if kind == "mel" else "Pitch class")
    if kind == "chroma":
        ax.set_yticks(range(N_CHROMA), NOTES, fontsize="small")
    if beat:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if array.shape[1] / step <= 8)
        ax.set_xticks(range(0, array.shape[1], step))
    return image


def plot_history(ax, history, title="", score_name="score"):
    """Loss (left axis) and validation score (right axis) against the epoch.

    The epochs of which the best is kept are shaded, the kept one is marked.
    """
    history = pd.DataFrame(history)
    epoch, score = history["epoch"], f"validation {score_name}"
    ax.plot(epoch, history["train_loss"], color=COLORS[0], label="train loss")
    ax.plot(epoch, history["val_loss"], color=COLORS[3], label="validation loss")
    ax.set(xlabel="Epoch", ylabel="Loss", title=title)
    right = ax.twinx()
    right.plot(epoch, history["val_score"], color=COLORS[2], linestyle="--", label=score)
    right.set(ylabel=f"Validation {score_name}", ylim=(min(0, history["val_score"].min()), 1))
    if history["settled"].any():
        first = epoch[history["settled"] == 1].min()
        ax.axvspan(first - 0.5, epoch.max() + 0.5, color="0.92", zorder=0)
    best = history[history["kept"] == 1].iloc[-1]  # each one kept replaces the one before
    right.plot(best["epoch"], best["val_score"], "o", color=COLORS[2])
    lines = ax.get_lines() + right.get_lines()[:1]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncol": 3}
    ax.legend(lines, [x.get_label() for x in lines], fontsize="small", frameon=False, **below)
    ax.xaxis.get_major_locator().set_params(integer=True)


def plot_histories(histories, score):
    """One panel of `plot_history` per run: {name: history}, at most three in a row."""
    n_columns = min(3, len(histories))
    n_rows = math.ceil(len(histories) / n_columns)
    size = (5 * n_columns, 3.6 * n_rows)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax, (name, history) in zip(axes.flat, histories.items(), strict=False):
        plot_history(ax, history, name, score)
    for ax in axes.flat[len(histories) :]:
        ax.remove()
    return fig


def plot_overfit(checks):
    """Training loss on fixed batches, {name: Check}, on a logarithmic scale."""
    fig, ax = plt.subplots(figsize=(7, 4))
    for (name, check), color in zip(checks.items(), COLORS, strict=False):
        ax.semilogy(check.history["pass"], check.history["loss"], color=color, label=name)
    ax.axhline(0.01, color="grey", linestyle=":", label="goal")
    ax.set(xlabel="Pass over the batches", ylabel="Training loss (log scale)")
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


def plot_scores(ax, names, values, intervals, xlabel):
    """Horizontal bars with 95% intervals, the first name on top."""
    y = np.arange(len(names))[::-1]
    errors = np.abs(np.array(intervals, dtype=float).T - np.array(values))
    ax.barh(y, values, xerr=errors, color=COLORS[5], ecolor="black", capsize=3)
    ax.set_yticks(y, names)
    ax.set(xlabel=xlabel, xlim=(min(0, np.nanmin(np.array(intervals)) - 0.02), 1.12))
    ax.set_xticks(np.arange(0, 1.01, 0.2))
    for position, value, (_, high) in zip(y, values, intervals, strict=True):
        none = math.isnan(value)  # of a model that was not asked for this
        place = (0.01 if none else max(value, high) + 0.01, position)
        ax.text(*place, "none" if none else f"{value:.3f}", va="center", fontsize="small")


def plot_emotion_scores(scores):
    """One panel of `plot_scores` per emotion and for the mean: {model: `emotion_scores`}."""
    names, height = list(scores), 0.3 * len(scores) + 0.9
    fig, axes = plt.subplots(2, 2, figsize=(10, 2 * height), layout="constrained", sharey=True)
    for ax, key in zip(axes.flat, (*EMOTIONS, "mean_spearman"), strict=True):
        none = {key: math.nan, f"{key}_ci95": [math.nan] * 2}  # a model of one emotion: no bar
        rows = [none | scores[name] for name in names]
        values, intervals = [row[key] for row in rows], [row[f"{key}_ci95"] for row in rows]
        plot_scores(ax, names, values, intervals, "Spearman (line: 95% interval)")
        ax.set_title(key.replace("_spearman", " of the three"))
    return fig


def plot_panels(panels, n_columns, kind="mel", size=(6.0, 3.0)):
    """Spectrograms side by side under one colour scale.

    panels : list of (title, (F, T) array, whether its steps are beats), row by row
    size : width and height of a panel, in inches
    """
    n_rows = math.ceil(len(panels) / n_columns)
    whole = (size[0] * n_columns, size[1] * n_rows)
    # Given, not found by a layout engine: 40 panels would take it seconds.
    spacing = {"hspace": 0.9 / size[1], "wspace": 0.06}
    fig, axes = plt.subplots(n_rows, n_columns, figsize=whole, squeeze=False, gridspec_kw=spacing)
    for index, (ax, (title, array, beat)) in enumerate(zip(axes.flat, panels, strict=False)):
        image = plot_spectrogram(ax, array, kind, beat)
        ax.set_title(title, fontsize="medium")
        if index % n_columns:
            ax.set(ylabel="", yticklabels=[])
        if index + n_columns < len(panels):
            ax.set_xlabel("")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    label = {
        "mel": "Power (dB, 0: the clip's loudest cell)",
        "chroma": "Chroma (of frames, 1 is the strongest pitch class)",
    }[kind]
    bar = {"shrink": min(1, 5 / whole[1]), "fraction": 0.02, "pad": 0.02}
    fig.colorbar(image, ax=fig.axes, label=label, **bar)
    return fig
