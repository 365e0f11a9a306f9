"""Step 5: every answer is the right clip's, every score is true, and nothing leaks."""

import pandas as pd
import pytest
import torch
from conftest import genre_predictions, labels_of, read_metrics
from genre_runs import (
    LSTMS,
    GenreRuns,
    assert_kept_epoch,
    assert_learned,
    assert_own_predictions,
    assert_predictions,
    assert_same_training,
    assert_scores,
    assert_statistics,
    classes_of,
    folder_of,
    log_probabilities,
    set_of,
    validation_clips,
)
from sklearn.metrics import f1_score

from common import load_checkpoint

pytestmark = pytest.mark.slow
BRIEF = ["mel", "beat_fused"]  # the LSTMs of the brief runs: frames cut into windows, whole beats


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    return GenreRuns(data_dir, tmp_path_factory)


def test_every_test_clip_is_predicted_once_by_each_lstm_on_its_own_kind_of_clips(runs):
    """Half of a test clip on frames is an intro of a window or more: it takes all windows."""
    table = genre_predictions(runs.learned.out / "step05_lstm")
    assert_predictions(table, labels_of(runs.learned.data, split="test"))
    assert set(table["model"]) == set(LSTMS)
    for name, rows in table.groupby("model"):
        assert set(rows["test_set"]) == {set_of(name)}
        assert_learned(rows, name)


@pytest.mark.parametrize("name", LSTMS)
def test_a_prediction_is_the_networks_own_to_that_array(runs, name):
    assert_own_predictions(runs.learned, name)


@pytest.mark.parametrize("which, names", [("learned", LSTMS), ("lots", BRIEF)])
def test_scores_are_those_of_the_predictions(runs, which, names):
    """Where most is wrong a transposed table or a swapped precision and recall shows."""
    run = getattr(runs, which)
    metrics = read_metrics(run.out / "step05_lstm")
    assert set(metrics["runs"]) == set(names)
    for name in names:
        scores = metrics["runs"][name]["test"]
        assert_scores(scores, run.predictions(name))
        transposed = list(map(list, zip(*scores["confusion"], strict=True)))
        assert which == "learned" or scores["confusion"] != transposed, "the test cannot tell"


@pytest.mark.parametrize("name", BRIEF)
def test_nothing_trained_or_chosen_changes_with_the_test_clips(runs, name):
    assert_same_training(runs, name)


@pytest.mark.parametrize("name", BRIEF)
def test_statistics_and_class_shares_are_of_the_training_part_alone(runs, name):
    assert_statistics(runs.lots, name)


@pytest.mark.parametrize("name", BRIEF)
def test_training_does_not_change_with_the_validation_clips(runs, name):
    folders = [folder_of(run.out, name) for run in (runs.lots, runs.lots_val)]
    first, second = (load_checkpoint(folder / "best.pt")["settings"] for folder in folders)
    assert all(map(torch.equal, first["stats"], second["stats"]))
    assert first["priors"] == second["priors"]
    first, second = (pd.read_csv(folder / "history.csv") for folder in folders)
    assert first["train_loss"].tolist() == second["train_loss"].tolist()
    # What was spoiled are the clips that validate.
    assert (first["val_loss"] != second["val_loss"]).all()


def test_the_validation_score_is_that_of_the_kept_weights_on_the_validation_clips(runs):
    run, name = runs.lots, "beat_fused"
    clips, labels = sorted(validation_clips(run, name)), labels_of(run.data, beat=True)
    predictions = classes_of(log_probabilities(run, name, clips, "train"))
    options = {"labels": sorted(set(labels.values())), "average": "macro", "zero_division": 0}
    score = f1_score([labels[clip] for clip in clips], predictions, **options)
    assert load_checkpoint(folder_of(run.out, name) / "best.pt")["val_score"] == pytest.approx(
        score
    )
    facts = read_metrics(run.out / "step05_lstm")["runs"][name]
    assert facts["val"]["macro_f1"] == pytest.approx(score)


def test_the_epoch_kept_is_the_best_by_validation_of_the_last_fifth(runs):
    pairs = [(runs.learned, name) for name in LSTMS] + [(runs.lots, name) for name in BRIEF]
    early, last = zip(*(assert_kept_epoch(run, name) for run, name in pairs), strict=True)
    assert any(early), "nowhere was an earlier epoch better by luck: the test cannot tell"
    assert not all(last), "everywhere the last epoch was the best: the test cannot tell"
