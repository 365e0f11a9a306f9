"""Step 7 by its numbers: the CNNs' predictions, what they are compared and averaged with, leaks."""

import re

import pytest
from conftest import genre_predictions, labels_of, read_metrics
from genre_runs import (
    CNNS,
    FULL,
    LSTMS,
    RIVAL,
    VAL_SCORES,
    GenreRuns,
    assert_average,
    assert_kept_epoch,
    assert_learned,
    assert_own_predictions,
    assert_predictions,
    assert_same_training,
    assert_scores,
    assert_statistics,
)

pytestmark = pytest.mark.slow
STEP = "step07_cnn"
AVERAGES = {"cnn_ensemble": CNNS, "cnn_lstm_ensemble": [*CNNS, RIVAL]}


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    return GenreRuns(data_dir, tmp_path_factory)


def test_every_test_clip_is_predicted_once_and_scores_are_those_of_the_predictions(runs):
    folder = runs.learned.out / STEP
    metrics, table = read_metrics(folder), genre_predictions(folder)
    assert_predictions(table, labels_of(runs.learned.data, split="test"))
    assert set(table["model"]) == {*CNNS, *AVERAGES, "mel", RIVAL}
    for name, rows in table.groupby("model"):
        assert name == RIVAL or set(rows["test_set"]) == {FULL}
        assert_learned(rows, name)
        assert_scores((metrics["runs"] | metrics["compared_with"])[name]["test"], rows)


def test_a_prediction_is_the_networks_own_to_that_array(runs):
    assert_own_predictions(runs.learned, "cnn_mel")
    # Where most is wrong a transposed table or a swapped precision and recall shows.
    scores = read_metrics(runs.lots.out / STEP)["runs"]["cnn_mel"]["test"]
    assert_scores(scores, runs.lots.predictions("cnn_mel"))


def test_the_average_takes_in_the_lstm_that_validated_best(runs):
    metrics = read_metrics(runs.learned.out / STEP)
    for average, members in AVERAGES.items():
        assert metrics["runs"][average]["members"] == members
        assert_average(runs.learned, STEP, average, members)
    val = {name: run["val"]["macro_f1"] for name, run in metrics["compared_with"].items()}
    assert val == {"mel": VAL_SCORES["mel"], RIVAL: 0.95}
    step5 = read_metrics(runs.learned.out / "step05_lstm")["runs"]
    test = {name: step5[name]["test"]["macro_f1"] for name in LSTMS}
    assert test[RIVAL] < max(test.values()), "the test score would choose the same"


def test_the_difference_of_cnn_and_lstm_is_that_of_their_predictions(runs):
    folder = runs.learned.out / STEP
    metrics, table = read_metrics(folder), genre_predictions(folder)
    right = (table["truth"] == table["prediction"]).groupby([table["model"], table["clip"]])
    right = right.first().unstack("model")
    assert set(metrics["paired_difference"]) == {"mel", RIVAL}
    for name, found in metrics["paired_difference"].items():
        cnn, lstm = right["cnn_mel"].astype(bool), right[name].astype(bool)
        assert found["accuracy"] == pytest.approx(cnn.mean() - lstm.mean())
        only = (found["only_first"], found["only_second"])
        assert only == ((cnn & ~lstm).sum(), (lstm & ~cnn).sum())
        low, high = found["accuracy_ci95"]
        assert low <= found["accuracy"] <= high
        line = rf"`cnn_mel` minus `{name}`: accuracy ([-+.\d]+) \["
        (written,) = re.findall(line, (folder / "summary.md").read_text())
        assert float(written) == pytest.approx(found["accuracy"], abs=6e-4)


def test_nothing_trained_or_chosen_changes_with_the_test_clips(runs):
    """Neither the CNN nor what it is compared with."""
    assert_same_training(runs, "cnn_mel")
    first, second = (
        {
            name: facts["val"]
            for name, facts in read_metrics(run.out / STEP)["compared_with"].items()
        }
        for run in (runs.lots, runs.lots_test)
    )
    assert first == second


def test_statistics_and_class_shares_are_of_the_training_part_alone(runs):
    assert_statistics(runs.lots, "cnn_mel")


def test_the_epoch_kept_is_the_best_by_validation_of_the_last_fifth(runs):
    for run, names in ((runs.learned, CNNS), (runs.lots, CNNS[:1])):
        for name in names:
            assert_kept_epoch(run, name)
