"""Step 10: one network for three emotions, from the files that the step leaves."""

import numpy as np
import pytest
from conftest import EMOTIONS, labels_of, read_metrics, read_table, submission
from emotion_runs import (
    LEARNED,
    RECIPE,
    STEP10,
    EmotionRuns,
    assert_follows_its_axis,
    assert_learns_what_there_is,
    assert_only_changed,
    assert_same_checkpoints,
    assert_scores,
    assert_statistics,
    assert_submission,
    assert_truth,
    poison,
    run_step,
)
from step_runs import copy_data

import common
from patrec.flags import Source
from patrec.scores import average_predictions

pytestmark = pytest.mark.slow
NETWORKS = ("multitask_from_genre", "multitask", "multitask_lstm")
MODELS = (*NETWORKS, "multitask_average", "ridge", "svr")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return EmotionRuns(tmp_path_factory)


@pytest.mark.parametrize("name", ["multitask", "noisy_multitask"])
def test_each_head_is_scored_by_the_labels_of_its_axis(runs, name):
    run = getattr(runs, name)
    assert_truth(run, (*MODELS, "constant"))
    assert set(run.runs) == {*MODELS, "constant"}
    assert assert_scores(run) == 0


@pytest.mark.parametrize("model", MODELS)
def test_each_head_predicts_its_own_axis(runs, model):
    assert_follows_its_axis(runs.multitask, model)


@pytest.mark.parametrize("model", MODELS)
def test_cross_validated_networks_beat_chance_only_where_there_is_something_to_learn(runs, model):
    assert_learns_what_there_is(runs.noisy_multitask, model)


def test_the_same_clips_are_held_out_as_in_step_8(runs):
    """One cut for all steps, models and axes."""
    pairs = (runs.regression, runs.multitask), (runs.noisy_regression, runs.noisy_multitask)
    for pair in pairs:
        tables = [run.table.groupby("clip")["fold"] for run in pair]
        assert all((table.nunique() == 1).all() for table in tables)
        assert tables[0].first().to_dict() == tables[1].first().to_dict()
    assert set(runs.noisy_multitask.table["clip"]) == set(labels_of(runs.data["noisy"], "emotion"))


def test_the_loss_before_training_is_that_of_a_batch(runs):
    losses = read_metrics(runs.multitask.folder)["losses"]
    for axis in EMOTIONS:
        raw, weight, weighted, order, term, sd = (
            losses[key][axis] for key in ("raw", "weight", "weighted", "order", "term", "sd")
        )
        assert weight == pytest.approx(1 / sd**2) and weighted == pytest.approx(raw * weight)
        assert term == pytest.approx(weighted + order) and 0 <= order <= 1
        assert 0.2 < weighted < 5 and weighted != 1  # near the mean label, measured on a batch


def test_it_is_compared_with_step_8_only_where_the_recipe_is_the_same(runs):
    """The fair comparison stands first: alone and together, both from scratch."""
    run, facts = runs.multitask, runs.multitask.runs["multitask"]
    summary = (run.folder / "summary.md").read_text()
    minus = "`multitask` minus `cnn (step 8)`"
    assert summary.count(minus) == 4 and summary.index(minus) < summary.index("`svr`")
    for weights in (facts["weights"], runs.regression.runs["cnn"]["weights"]):
        assert f"{weights:,}" in summary
    table = read_table(run.folder, "Spearman's correlation on 13 held-out clips")
    assert {"multitask", "cnn (step 8)", "lstm (step 8)", "transfer (step 9)"} <= set(table.index)
    mean = runs.regression.runs["cnn"]["test"]["mean_spearman"]
    cell = table.loc["cnn (step 8)"].iloc[-1]
    assert float(cell.split()[0]) == pytest.approx(mean, abs=6e-4)
    # One epoch more than its step 8: what differs is not the shared backbone alone.
    summary = (runs.noisy_multitask.folder / "summary.md").read_text()
    assert minus not in summary and "cnn (step 8)" in summary


def test_the_average_is_of_both_networks_in_predictions_and_in_what_is_handed_in(runs):
    for run in (runs.multitask, runs.noisy_multitask):
        members = run.runs["multitask_average"]["members"]
        assert members == ["multitask_from_genre", "multitask_lstm"]
        mean = np.mean([run.predictions(member)[0] for member in members], axis=0)
        assert np.allclose(run.predictions("multitask_average")[0], mean, atol=1e-6)
    run, source = runs.multitask, Source(runs.data["marked"])
    predictions = []
    for name in members:
        model, checkpoint = common.load_model(run.folder / name / "best.pt")
        clips = common.load_test(source, checkpoint["settings"])
        predictions.append(common.predict_clips(model, clips, checkpoint["settings"]))
    expected = average_predictions(predictions)[list(EMOTIONS)].clip(0, 1)
    found = submission(run.folder).loc[expected.index]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(predictions[0] - predictions[1]).to_numpy().max() > 1e-3  # or one would do


@pytest.mark.parametrize("name", ["multitask", "noisy_multitask"])
def test_submission(runs, name):
    assert_submission(getattr(runs, name), LEARNED if name.startswith("noisy") else EMOTIONS)


def test_statistics_are_those_of_the_training_clips(runs):
    on_frames = ["multitask", "multitask_lstm"]
    assert_statistics(runs.multitask, "multitask", on_frames)


def test_it_goes_on_from_the_genre_network(runs):
    """A copied backbone gets input standardised as in genre training, a new one as in its own."""
    folders = runs.transfer.folder / "cnn_mel", *(runs.multitask.folder / n for n in NETWORKS[:2])
    genre, copied, scratch = (common.load_checkpoint(path / "best.pt") for path in folders)
    # Batch normalisation counts the batches it has seen: those of genre training too.
    key = "backbone.blocks.0.1.num_batches_tracked"
    before, after, alone = (int(each["state"][key]) for each in (genre, copied, scratch))
    assert before > 0 and alone > 0 and after == before + alone
    means = [each["settings"]["stats"][0] for each in (genre, copied, scratch)]
    assert np.array_equal(means[0], means[1]) and not np.array_equal(means[0], means[2])


def test_held_out_and_unlabelled_clips_change_nothing_of_the_networks(runs, tmp_path):
    run = runs.multitask
    changed = sorted(set(run.table["clip"]))[::2]
    data = poison(run.data, tmp_path / "data", changed, unlabelled=True)
    copy_data(runs.transfer.folder / "cnn_mel", tmp_path / "step09_transfer" / "cnn_mel")
    second = run_step(STEP10, data, tmp_path, *RECIPE)
    assert_same_checkpoints(run.folder, second.folder)
    assert_only_changed(run, second, changed)
    # The weights of the three losses too are measured on training clips.
    assert read_metrics(run.folder)["losses"] == read_metrics(second.folder)["losses"]
    assert not submission(run.folder).equals(submission(second.folder))
