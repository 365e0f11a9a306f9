"""Scores against numbers worked out by hand, and against scipy."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from patrec.labels import EMOTIONS
from patrec.scores import (
    average_predictions,
    bootstrap,
    classification_scores,
    combine_emotions,
    emotion_scores,
    genre_scores,
    paired_difference,
    resampled_spearman,
    spearman,
)


def test_scores_of_a_hand_made_example():
    """Six clips: two of A (one called B), three of B (one called C), one of C (called B)."""
    scores = classification_scores([0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 1], ["A", "B", "C"])
    assert scores["confusion"] == [[1, 1, 0], [0, 2, 1], [0, 1, 0]]  # rows true, columns called
    assert scores["accuracy"] == pytest.approx(1 / 2) and scores["n_clips"] == 6
    for name in ("precision", "recall", "f1"):
        assert scores[f"micro_{name}"] == pytest.approx(1 / 2)
    expected = {"A": (1, 1 / 2, 2 / 3, 2), "B": (2 / 4, 2 / 3, 4 / 7, 3), "C": (0, 0, 0, 1)}
    for name, values in expected.items():
        found = [scores["per_class"][name][key] for key in ("precision", "recall", "f1", "support")]
        assert found == pytest.approx(values)
    assert scores["macro_precision"] == pytest.approx((1 + 1 / 2) / 3)
    assert scores["macro_recall"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 7) / 3)


def test_a_score_its_interval_and_the_validation_score_are_one_statistic():
    """Over all classes: three of four occur, all right, so 3/4 and not 1."""
    targets = np.repeat([0, 1, 2], 20)
    scores = classification_scores(targets, targets, list("abcd"))
    assert scores["macro_f1"] == 0.75 and scores["macro_f1_ci95"] == [0.75, 0.75]
    frame = pd.DataFrame(np.eye(4)[targets], columns=list("abcd"))
    true = pd.Series(np.array(list("abcd"))[targets])
    other = pd.DataFrame(np.eye(4)[np.zeros(60, int)], columns=list("abcd"))
    gain = paired_difference(true, frame, other)["macro_f1"]
    assert gain == pytest.approx(0.75 - 2 * 20 / 80 / 4)


def test_bootstrap_interval_of_coin_tosses():
    """A share of 30% of 400: its standard error is sqrt(.3 x .7 / 400) = .0229.

    A resample is as large as the set, and drawn with replacement.
    """
    hits = np.arange(400) < 120
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    interval = bootstrap(lambda rows: hits[rows].mean(), 400)
    assert interval == pytest.approx([0.3 - half, 0.3 + half], abs=0.006)
    assert bootstrap(lambda rows: float(len(rows)), 7) == [7, 7]
    assert bootstrap(lambda rows: float(len(set(rows))), 50)[1] < 40


def test_spearman_with_ties_and_constants():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5."""
    targets, predictions = np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3, 0.4])
    by_hand = 4.5 / math.sqrt(4.5 * 5)
    assert spearman(targets, predictions) == pytest.approx(by_hand)
    assert spearman(targets, -(predictions**3)) == pytest.approx(-by_hand)
    assert spearman(targets, np.full(4, 0.3)) == spearman(np.full(4, 0.3), predictions) == 0


def test_spearman_is_over_the_whole_set():
    """Bug 10: averaged over batches, or scipy called on an (N, 3) matrix."""
    rng = np.random.default_rng(0)
    targets, predictions = rng.random((60, 3)), rng.random((60, 3))
    ids = [str(i) for i in range(60)]
    true, predicted = (pd.DataFrame(x, ids, EMOTIONS) for x in (targets, predictions))
    scores = emotion_scores(true, predicted.iloc[::-1])  # rows are found by clip id
    for i, axis in enumerate(EMOTIONS):
        assert scores[axis] == pytest.approx(spearmanr(targets[:, i], predictions[:, i]).statistic)
        assert scores[f"{axis}_ci95"][0] < scores[axis] < scores[f"{axis}_ci95"][1]
        resampled = resampled_spearman(targets[::-1, i], predictions[::-1, i])
        interval = np.percentile(resampled, [2.5, 97.5]).tolist()
        assert scores[f"{axis}_ci95"] == pytest.approx(interval)
    drawn = np.random.default_rng(0).integers(0, 60, (500, 60))  # the resamples, scored one by one
    by_scipy = [spearmanr(targets[rows, 0], predictions[rows, 0]).statistic for rows in drawn]
    np.testing.assert_allclose(resampled_spearman(targets[:, 0], predictions[:, 0]), by_scipy)
    mean = np.mean([scores[axis] for axis in EMOTIONS])
    assert scores["mean_spearman"] == pytest.approx(mean)
    # The mean of three independent correlations is surer than each of them.
    low, high = scores["mean_spearman_ci95"]
    widths = [np.ptp(scores[f"{axis}_ci95"]) for axis in EMOTIONS]
    assert low < mean < high and high - low < 0.8 * min(widths)
    # The mean of three equal ones is as sure as one.
    true, predicted = (pd.DataFrame(x[:, [0, 0, 0]], ids, EMOTIONS) for x in (targets, predictions))
    scores = emotion_scores(true, predicted)
    assert scores["mean_spearman_ci95"] == pytest.approx(scores["valence_ci95"])


def test_average_is_taken_clip_by_clip():
    """By position, a table in another order would predict for another clip."""
    first = pd.DataFrame({"a": [0.0, 2.0, 4.0], "b": [1.0, 1.0, 1.0]}, ["7", "10", "9"])
    second = pd.DataFrame({"b": [3.0, 5.0, 1.0], "a": [8.0, 0.0, 2.0]}, ["9", "7", "10"])
    mean = average_predictions(table for table in (first, second, first * 0))
    by_hand = pd.DataFrame({"a": [0.0, 4 / 3, 4.0], "b": [2.0, 2 / 3, 4 / 3]}, ["7", "10", "9"])
    pd.testing.assert_frame_equal(mean.loc[by_hand.index, ["a", "b"]], by_hand)
    pd.testing.assert_frame_equal(average_predictions([first]), first)


def genre_table(classes, rows):
    """{clip: class that is predicted} as a table of log-probabilities."""
    table = [[0.8 if name == predicted else 0.1 for name in classes] for predicted in rows.values()]
    return pd.DataFrame(np.log(table), list(rows), classes)


def test_genres_are_scored_by_id():
    true = pd.Series({"4": "a", "30": "b", "2": "b"})
    scores = genre_scores(true, genre_table(["a", "b"], {"2": "b", "30": "b", "4": "a"}))
    assert scores["accuracy"] == 1 and scores["confusion"] == [[1, 0], [0, 2]]


def test_paired_difference_of_genres_by_hand():
    """Four clips: one model has three right, the other two, of which one the first has not."""
    true = pd.Series({"4": "a", "30": "a", "2": "b", "1": "b"})
    first = genre_table(["a", "b"], {"4": "a", "30": "a", "2": "b", "1": "a"})
    # Rows and columns in another order, and a clip for which the first predicts nothing.
    second = genre_table(["b", "a"], {"1": "b", "2": "a", "77": "b", "30": "b", "4": "a"})
    found, back = paired_difference(true, first, second), paired_difference(true, second, first)
    assert found["n_clips"] == 4 and found["accuracy"] == pytest.approx(3 / 4 - 2 / 4)
    # F1 of a and b: 4/5 and 2/3 against 1/2 and 1/2.
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2 - 1 / 2)
    assert (found["only_first"], found["only_second"]) == (2, 1)
    for key in ("accuracy", "macro_f1"):
        assert back[key] == pytest.approx(-found[key])
        assert found[f"{key}_ci95"][0] <= found[key] <= found[f"{key}_ci95"][1]
    assert (back["only_first"], back["only_second"]) == (1, 2)


def test_paired_difference_of_emotions_by_hand():
    """Positive where the first is better; clips are matched by id, in whatever order."""
    ids = ["12", "3", "401", "5", "60"]
    true = pd.DataFrame({"energy": [0.1, 0.3, 0.5, 0.7, 0.9], "valence": 0.5}, ids)
    first = pd.DataFrame({"energy": [1.0, 2.0, 3.0, 4.0, 5.0]}, ids)
    # The last two exchanged: 1 - 6 (1 + 1) / (5 x 24) = .9.
    second = pd.DataFrame({"energy": [1.0, 2.0, 3.0, 5.0, 4.0]}, ids).iloc[[3, 0, 4, 2, 1]]
    for one, other, sign in ((first, second, 1), (second, first, -1)):
        found = paired_difference(true, one, other)
        assert found["n_clips"] == 5 and found["spearman"] == pytest.approx(sign * 0.1)
        low, high = found["spearman_ci95"]
        assert low <= found["spearman"] <= high
    # Both on the same resamples: a model does not differ from itself on any.
    assert paired_difference(true, second, second)["spearman_ci95"] == [0, 0]


def test_three_models_of_one_emotion_each_in_one_record():
    parts = {
        name: {"val": {name: 0.1 * n}, "epochs": n, "train_seconds": 10.0 * n, "weights": 100 * n}
        for n, name in enumerate(EMOTIONS, start=1)
    }
    record = combine_emotions(parts, {"mean_spearman": 0.5})
    val = {"valence": 0.1, "energy": 0.2, "danceability": 0.3, "mean_spearman": 0.2}
    assert record["val"] == pytest.approx(val)
    assert [record[key] for key in ("epochs", "train_seconds", "weights")] == [6, 60.0, 600]
    assert record["test"] == {"mean_spearman": 0.5}
