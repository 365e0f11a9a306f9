"""Figures that several steps share: every number stands under its own name."""

from types import SimpleNamespace

import librosa
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from patrec.features import HOP, N_MELS, SR
from patrec.labels import EMOTIONS
from patrec.plots import (
    COLORS,
    mel_ticks,
    plot_activations,
    plot_confusion,
    plot_confusions,
    plot_emotion_scores,
    plot_histories,
    plot_operations,
    plot_overfit,
    plot_panels,
    plot_per_class,
    plot_scores,
    plot_spectrogram,
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]


def names_at(ax):
    """{place on the y axis: name that stands there}"""
    name_of = ax.yaxis.get_major_formatter()
    return {y: name_of(y, place) for place, y in enumerate(ax.get_yticks().tolist())}


def bars_of(ax):
    """{name: (length of its bar, its interval, the number written beside it)}"""
    (intervals,) = ax.collections
    spans = {y.mean(): tuple(x) for x, y in (part.T for part in intervals.get_segments())}
    written = {text.get_position()[1]: text.get_text() for text in ax.texts}  # at the right
    middles = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in ax.patches]
    return {names_at(ax)[y]: (width, spans[y], written[y]) for y, width in middles}


def test_scores_stand_beside_their_names_the_first_on_top(ax):
    values, intervals = [0.2, 0.5, 0.9], [[0.1, 0.35], [0.4, 0.6], [0.85, 0.92]]
    plot_scores(ax, ["one", "two", "three"], values, intervals, "score")
    found = bars_of(ax)
    for name, value, interval in zip(("one", "two", "three"), values, intervals, strict=True):
        width, span, text = found[name]
        assert width == value and span == pytest.approx(interval) and text == f"{value:.3f}"
    assert names_at(ax)[max(names_at(ax))] == "one" and ax.get_xlim() == (0, 1)


def test_each_emotion_has_its_own_panel():
    keys = (*EMOTIONS, "mean_spearman")
    scores = {}
    for shift, name in enumerate(("cnn", "lstm")):
        values = {key: 0.1 * place - 0.05 + 0.03 * shift for place, key in enumerate(keys)}
        scores[name] = values | {f"{key}_ci95": [v - 0.02, v + 0.01] for key, v in values.items()}
    fig = plot_emotion_scores(scores)
    titles = {key: key.replace("_spearman", " of the three") for key in keys}
    panels = {ax.get_title(): ax for ax in fig.axes}
    assert set(panels) == set(titles.values())
    for ax in fig.axes:  # one range, in which the lowest interval of all fits
        assert ax.get_xlim() == pytest.approx((-0.09, 1))
    for key, title in titles.items():
        widths = {name: width for name, (width, _, _) in bars_of(panels[title]).items()}
        assert widths == {name.upper(): scores[name][key] for name in scores}, key


def test_confusions_are_written_where_they_belong(ax):
    """Rows are true classes, from above; columns what they were called."""
    confusion = [[5, 2, 0], [0, 7, 1], [3, 0, 4]]
    plot_confusion(ax, confusion, list("abc"))
    for text in ax.texts:
        x, y = text.get_position()
        assert text.get_text() == (str(confusion[y][x]) if confusion[y][x] else "")
    shares = ax.images[0].get_array()
    np.testing.assert_allclose(shares, np.array(confusion) / [[7], [8], [7]])
    assert ax.get_xlabel() == "Predicted class" and ax.get_ylabel() == "True class"


def texts_of(artists):
    return [artist.get_text() for artist in artists]


def test_each_model_has_its_own_confusion_and_bars():
    """{run: scores}: a panel and a colour each, in the order given, named as figures name runs."""
    per_class = {"a": {"f1": 0.2, "support": 3}, "b": {"f1": 0.7, "support": 5}}
    other = {"a": {"f1": 0.9, "support": 3}, "b": {"f1": 0.1, "support": 5}}
    first = {"accuracy": 0.75, "confusion": [[3, 0], [2, 3]], "per_class": per_class}
    second = {"accuracy": 0.5, "confusion": [[1, 2], [2, 3]], "per_class": other}
    scores = {"cnn_mel": first, "beat_mel": second}
    first_ax, second_ax = plot_confusions(scores, ["a", "b"]).axes
    assert first_ax.get_title() == "CNN, mel (accuracy 0.750)"
    assert texts_of(first_ax.texts) == ["3", "", "2", "3"]
    assert second_ax.get_title() == "LSTM, mel, beats (accuracy 0.500)"
    assert texts_of(second_ax.texts) == ["1", "2", "2", "3"]
    (ax,) = plot_per_class(scores).axes
    assert texts_of(ax.get_xticklabels()) == ["a (3)", "b (5)"]
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights == [[0.2, 0.7], [0.9, 0.1]]
    assert texts_of(ax.get_legend().get_texts()) == ["CNN, mel", "LSTM, mel, beats"]


def test_the_dot_marks_the_epoch_that_was_kept():
    """The last one marked as kept, which replaced those before; the last fifth is shaded."""
    history = pd.DataFrame({"epoch": range(1, 11), "train_loss": 1.0, "val_loss": 2.0})
    history["val_score"] = [0.1, 0.3, 0.2, 0.9, 0.4, 0.3, 0.5, 0.5, 0.6, 0.4]
    history["kept"], history["settled"] = [1, 1, 0, 1, 0, 0, 0, 0, 1, 0], [0] * 8 + [1, 1]
    ax, right = plot_histories({"mel": history}, "macro-F1").axes
    (dot,) = (line for line in right.get_lines() if line.get_marker() == "o")
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (9, 0.6)
    assert right.get_ylim() == (0, 1)
    drawn = {line.get_label(): line.get_ydata()[0] for line in (*ax.lines, right.lines[0])}
    assert drawn == {"training loss": 1, "validation loss": 2, "validation macro-F1": 0.1}
    (shade,) = ax.patches
    explained = {shade.get_label(), dot.get_label(), *drawn}
    assert set(texts_of(ax.figure.legends[0].get_texts())) == explained
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (8.5, 10.5)
    history["val_score"] -= 0.5  # Spearman's correlation may be below 0
    # Its time was up: the other panel explains the grey. Both have one scale.
    cut_short = history[:5].assign(settled=0, val_loss=5.0)
    fig = plot_histories({"mel": cut_short, "cnn_valence": history}, "Spearman")
    ax, other, _, right = fig.axes
    assert right.get_ylim() == (-0.4, 1)
    assert ax.get_ylim() == other.get_ylim() and other.get_ylim()[1] > 5
    assert (ax.get_title(), other.get_title()) == ("LSTM, mel", "CNN valence")
    assert shade.get_label() in texts_of(right.figure.legends[0].get_texts())


def test_bands_are_labelled_with_their_frequencies(ax):
    """The tick of 1,024 Hz lies in the band whose centre is nearest."""
    ax.set_xlim(0, N_MELS)
    mel_ticks(ax.xaxis)
    ticks = dict(zip([t.get_text() for t in ax.get_xticklabels()], ax.get_xticks(), strict=True))
    centres = librosa.mel_frequencies(N_MELS + 2, fmax=SR / 2)[1:-1]
    for hertz in ("256", "1024", "8192"):
        assert int(ticks[hertz]) == np.abs(centres - float(hertz)).argmin()


def test_panels_show_their_own_arrays_over_seconds_or_beats():
    arrays = [np.full((128, 5), -10.0), np.full((128, 9), -50.0)]
    fig = plot_panels([("one", arrays[0], False), ("two", arrays[1], True)], 2)
    labels = {}
    for ax, array in zip(fig.axes, arrays, strict=False):
        assert (ax.collections[0].get_array() == array.flat[0]).all()
        assert ax.collections[0].get_clim() == (-80, 0)
        unit = 1 if ax.get_xlabel() == "Time (beats)" else HOP / SR
        assert np.ptp(ax.collections[0].get_coordinates()[0, :, 0]) == array.shape[1] * unit
        labels[ax.get_title()] = ax.get_xlabel()
    assert labels == {"one": "Time (s)", "two": "Time (beats)"}
    assert fig.axes[-1].get_ylabel().startswith("Power (dB")
    chroma = plot_panels([("one", np.ones((12, 5)), False)], 1, kind="chroma")
    assert chroma.axes[-1].get_ylabel().startswith("Strength")
    assert plot_spectrogram(fig.axes[0], np.ones((12, 5)), "chroma").get_clim() == (0, 1)


def test_the_curve_of_the_check_and_its_goal():
    history = pd.DataFrame({"pass": [1, 11], "loss": [0.7, 0.002]})
    curve, goal = plot_overfit({"mel": SimpleNamespace(history=history)}).axes[0].lines
    assert curve.get_xydata().tolist() == [[1, 0.7], [11, 0.002]] and goal.get_ydata()[0] == 0.01


def test_what_a_digit_becomes_layer_by_layer():
    maps, chances = {"first": np.ones((2, 3, 3)), "last": -np.ones((4, 2, 2))}, np.eye(10)[7] / 2
    fig = plot_activations({"untrained": (maps, chances), "trained": (maps, 2 * chances)}, 4)
    for column, height in ((fig.axes[::2], 0.5), (fig.axes[1::2], 1)):
        shown = [np.nansum(ax.images[0].get_array()) for ax in column[:2]]
        assert shown == [18, -16]  # positive is red, on a scale symmetric about 0
        heights = [bar.get_height() for bar in column[2].patches]
        assert heights == [height * (k == 7) for k in range(10)]
        orange = [bar.get_facecolor() == to_rgba(COLORS[1]) for bar in column[2].patches]
        assert orange == [k == 4 for k in range(10)]


def test_operations_show_one_channel_of_one_clip_and_count_all_values():
    values = np.random.default_rng(0).standard_normal((3, 2, 5, 8)).clip(0)
    _, upper, _, lower, *_ = plot_operations({"conv": -values, "relu": values}, 1, 2.5).axes
    (image,) = upper.images
    assert (image.get_array() == values[0, 1].T).all() and image.origin == "lower"
    facts = f"mean {values.mean():.2f}, sd {values.std():.2f}, zeros {(values == 0).mean():.0%}"
    assert lower.get_title() == facts and image.get_extent() == [0, 2.5, 0, N_MELS]
