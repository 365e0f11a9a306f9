"""Figures that several steps share: every number stands under its own name."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import patrec.labels
import patrec.plots


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def names_at(ax):
    """{place on the y axis: name that stands there}"""
    name_of = ax.yaxis.get_major_formatter()
    return {y: name_of(y, place) for place, y in enumerate(ax.get_yticks().tolist())}


def bars_of(ax):
    """{name: (length of its bar, its interval, the number written beside it)}"""
    (intervals,) = ax.collections
    spans = {y.mean(): tuple(x) for x, y in (part.T for part in intervals.get_segments())}
    written = {text.get_position()[1]: text.get_text() for text in ax.texts}
    middles = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in ax.patches]
    return {names_at(ax)[y]: (width, spans[y], written[y]) for y, width in middles}


def test_scores_stand_beside_their_names_the_first_on_top(ax):
    values, intervals = [0.2, 0.5, 0.9], [[0.1, 0.35], [0.4, 0.6], [0.85, 0.92]]
    patrec.plots.plot_scores(ax, ["one", "two", "three"], values, intervals, "score")
    found = bars_of(ax)
    for name, value, interval in zip(("one", "two", "three"), values, intervals, strict=True):
        width, span, text = found[name]
        assert width == value and span == pytest.approx(interval) and text == f"{value:.3f}"
    assert names_at(ax)[max(names_at(ax))] == "one"


def test_each_emotion_has_its_own_panel():
    keys = (*patrec.labels.EMOTIONS, "mean_spearman")
    scores = {}
    for shift, name in enumerate(("cnn", "lstm")):
        values = {key: 0.1 * (place + 1) + 0.03 * shift for place, key in enumerate(keys)}
        scores[name] = values | {f"{key}_ci95": [v - 0.02, v + 0.01] for key, v in values.items()}
    fig = patrec.plots.plot_emotion_scores(scores)
    titles = {key: key.replace("_spearman", " of the three") for key in keys}
    panels = {ax.get_title(): ax for ax in fig.axes}
    assert set(panels) == set(titles.values())
    for key, title in titles.items():
        for name, (width, _, _) in bars_of(panels[title]).items():
            assert width == scores[name][key], (key, name)
    plt.close(fig)


def test_confusions_are_written_where_they_belong(ax):
    """Rows are true classes, from above; columns what they were called."""
    confusion = [[5, 2, 0], [0, 7, 1], [3, 0, 4]]
    patrec.plots.plot_confusion(ax, confusion, list("abc"))
    for text in ax.texts:
        x, y = text.get_position()
        assert text.get_text() == (str(confusion[y][x]) if confusion[y][x] else "")
    shares = ax.images[0].get_array()
    np.testing.assert_allclose(shares, np.array(confusion) / [[7], [8], [7]])
    assert ax.get_xlabel() == "Predicted class" and ax.get_ylabel() == "True class"


def test_the_dot_marks_the_epoch_that_was_kept(ax):
    """The last one marked as kept, which replaced those before; the last fifth is shaded."""
    history = pd.DataFrame({"epoch": range(1, 11), "train_loss": 1.0, "val_loss": 2.0})
    history["val_score"] = [0.1, 0.3, 0.2, 0.9, 0.4, 0.3, 0.5, 0.5, 0.6, 0.4]
    history["settled"] = [0] * 8 + [1, 1]
    history["kept"] = [1, 1, 0, 1, 0, 0, 0, 0, 1, 0]
    patrec.plots.plot_history(ax, history)
    (right,) = (other for other in ax.figure.axes if other is not ax)
    (dot,) = (line for line in right.get_lines() if line.get_marker() == "o")
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (9, 0.6)
    (shade,) = ax.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (8.5, 10.5)
