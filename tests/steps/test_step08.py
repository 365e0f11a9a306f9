"""Step 8: regressors of three emotions, from the files that the step leaves."""

import numpy as np
import pandas as pd
import pytest
from conftest import EMOTIONS, labels_of, read_table, submission
from emotion_runs import (
    LEARNED,
    RECIPE,
    STEP8,
    EmotionRuns,
    assert_follows_its_axis,
    assert_learns_what_there_is,
    assert_only_changed,
    assert_same_checkpoints,
    assert_scores,
    assert_statistics,
    assert_submission,
    assert_truth,
    checkpoints,
    clip_path,
    fitted_labels,
    poison,
    run_step,
    settings_of,
    single_axis_runs,
    training_clips,
)
from step_runs import copy_data

from patrec.tables import with_interval

pytestmark = pytest.mark.slow
MODELS = ("lstm", "cnn", "constant", "ridge", "svr")
NETWORKS = [f"{kind}_{axis}" for kind in ("lstm", "cnn") for axis in EMOTIONS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return EmotionRuns(tmp_path_factory)


@pytest.mark.parametrize("name", ["regression", "noisy_regression"])
def test_each_axis_is_predicted_and_scored_by_its_own_labels(runs, name):
    run = getattr(runs, name)
    assert_truth(run, MODELS)
    assert set(run.runs) == {*NETWORKS, *MODELS}
    assert len(single_axis_runs(run)) == 6
    assert_scores(run)


def test_a_fifth_is_held_out_or_every_clip_once(runs):
    table = runs.regression.table
    assert table["clip"].nunique() == 13 and set(table["fold"]) == {1}
    table = runs.noisy_regression.table
    folds = table.groupby("clip")["fold"].agg(["first", "nunique"])
    assert sorted(folds.index) == sorted(labels_of(runs.noisy_regression.data, "emotion"))
    assert (folds["nunique"] == 1).all() and sorted(folds["first"]) == [1] * 32 + [2] * 32


@pytest.mark.parametrize("model", ["lstm", "cnn", "ridge", "svr"])
def test_what_can_be_learned_of_an_axis_is_learned_from_its_own_labels(runs, model):
    """The LSTM hears beats here, whose label file has another order than that of whole clips."""
    assert_follows_its_axis(runs.regression, model)
    assert_learns_what_there_is(runs.noisy_regression, model)


def test_the_table_gives_rank_correlation_and_error(runs):
    table, rows = read_table(runs.regression.folder, "Spearman's corr"), runs.regression.table
    for name, own in rows.groupby("model"):
        squares = (own["truth"] - own["prediction"]) ** 2
        rmse = (squares.groupby(own["target"]).mean() ** 0.5).mean()
        (column,) = (column for column in table.columns if column.startswith("RMSE"))
        assert float(table.loc[name, column]) == pytest.approx(rmse, abs=6e-4), name
        for axis in EMOTIONS:
            written = with_interval(runs.regression.runs[name]["test"], axis)
            assert table.loc[name, axis] == written


def test_the_lstm_is_the_one_that_validates_best(runs):
    """Not the one with the better test score; and the CNN of step 7 beside it."""
    facts = runs.regression.runs
    assert {kind: facts[kind]["network"] for kind in ("lstm", "cnn")} == {
        "lstm": "beat_fused",
        "cnn": "cnn_mel",
    }
    # And it does hear mel and chroma.
    assert len(settings_of(runs.regression, "lstm_valence")["stats"][0]) == 140


@pytest.mark.parametrize("name", ["regression", "noisy_regression"])
def test_submission(runs, name):
    assert_submission(getattr(runs, name), LEARNED if name.startswith("noisy") else EMOTIONS)


def test_statistics_are_those_of_the_training_clips(runs):
    """The beats' label file has another order: by position, other clips would be trained on."""
    run = runs.regression
    assert_statistics(run, "cnn_valence", [f"cnn_{axis}" for axis in EMOTIONS])
    heard, _ = training_clips(run, "cnn_valence")
    frames = np.hstack([np.load(clip_path(run.data, clip, beat=True)) for clip in heard])
    for axis in EMOTIONS:
        mean, std = settings_of(run, f"lstm_{axis}")["stats"]
        assert np.allclose(mean, frames.mean(1), atol=1e-2)
        assert np.allclose(std, frames.std(1), atol=2e-2)


def again(runs, data, out):
    """The run on other data, with the same LSTMs of step 5 to choose from."""
    copy_data(runs.genre, out / "step05_lstm")
    return run_step(STEP8, data, out, *RECIPE)


def test_held_out_clips_change_nothing_but_their_own_predictions(runs, tmp_path):
    """Not weights, statistics, the epoch kept, ridge or SVR, nor what is handed in.

    The network that is chosen by validation score, to answer for the unlabelled clips, is made
    to seem the worse one on the held-out clips.
    """
    run = runs.regression
    changed = sorted(set(run.table["clip"]))[::2]
    val = {name: run.runs[name]["val"]["mean_spearman"] for name in ("lstm", "cnn")}
    chosen, other = sorted(val, key=val.get, reverse=True)
    data = poison(run.data, tmp_path / "data", changed, liar=chosen == "lstm")
    second = again(runs, data, tmp_path / "out")
    test = {name: second.runs[name]["test"]["mean_spearman"] for name in val}
    assert test[chosen] < test[other] - 0.1
    assert_same_checkpoints(run.folder, second.folder)
    assert_only_changed(run, second, changed)
    pd.testing.assert_frame_equal(submission(run.folder), submission(second.folder))


def test_validation_and_unlabelled_clips_are_not_trained_on(runs, tmp_path):
    """They change neither statistics nor the loss on training clips; validation follows them."""
    run = runs.regression
    _, validation = training_clips(run, "cnn_valence")
    data = poison(run.data, tmp_path / "data", validation, unlabelled=True)
    second = again(runs, data, tmp_path / "out")
    for name in checkpoints(run.folder):
        pairs = zip(*(settings_of(each, name)["stats"] for each in (run, second)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), name
        assert np.array_equal(fitted_labels(run, name)[0], fitted_labels(second, name)[0])
        first, other = (pd.read_csv(r.folder / name / "history.csv") for r in (run, second))
        assert first["train_loss"].tolist() == other["train_loss"].tolist(), name
        assert first["val_loss"].tolist() != other["val_loss"].tolist(), name
