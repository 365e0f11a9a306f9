"""Step 10: one network for three emotions, from the files that the step leaves."""

import re

import numpy as np
import pytest
from conftest import EMOTIONS, read_metrics, read_table, submission
from emotion_runs import (
    STEP8,
    STEP9,
    STEP10,
    EmotionRuns,
    assert_follows_its_axis,
    assert_scores,
    assert_submission,
    assert_truth,
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


def test_each_head_predicts_its_axis_and_is_scored_by_its_labels(runs):
    """On the clips that step 8 held out."""
    run = runs.multitask
    assert_truth(run, (*MODELS, "constant"))
    assert set(run.runs) == {*MODELS, "constant"}
    assert assert_scores(run) == 0
    for model in MODELS:
        assert_follows_its_axis(run, model)
    assert set(run.table["clip"]) == set(runs.regression.table["clip"])
    assert_submission(run)


def test_the_loss_before_training_is_that_of_a_batch(runs):
    losses = read_metrics(runs.multitask.folder)["losses"]
    for axis in EMOTIONS:
        keys = ("raw", "weight", "weighted", "order", "term", "sd")
        raw, weight, weighted, order, term, sd = (losses[key][axis] for key in keys)
        assert weight == pytest.approx(1 / sd**2) and weighted == pytest.approx(raw * weight)
        assert term == pytest.approx(weighted + order) and 0 <= order <= 1
        assert 0.2 < weighted < 5 and weighted != 1  # near the mean label, measured on a batch
    raw, weighted, terms = (list(losses[key].values()) for key in ("raw", "weighted", "term"))
    numbers = (max(raw) / min(raw), max(weighted) / min(weighted), np.mean(raw), np.mean(weighted))
    said = "is {:.2f} without weights and {:.2f} with .* is {:.3f} without weights and {:.3f} with"
    summary = (runs.multitask.folder / "summary.md").read_text()
    assert re.search(said.format(*numbers), " ".join(summary.split()))
    assert f"sum of the three: {sum(terms):.3f}**" in summary


def test_it_is_compared_with_step_8_only_where_the_recipe_is_the_same(runs, tmp_path):
    """The fair comparison stands first: alone and together, both from scratch."""
    run, facts = runs.multitask, runs.multitask.runs["multitask"]
    summary = (run.folder / "summary.md").read_text()
    minus = "`multitask` minus `cnn (step 8)`"
    assert summary.count(minus) == 4 and summary.index(minus) < summary.index("`svr`")
    assert "`multitask_lstm` minus `lstm (step 8)`" not in summary  # that one reads beats
    gains = re.findall(rf"(\w+): {re.escape(minus)}.* Spearman (\S+) \[", summary)
    for axis, gain in gains[1:]:
        scores = (run["test"][axis] for run in (facts, runs.regression.runs["cnn"]))
        assert float(gain) == pytest.approx(next(scores) - next(scores), abs=6e-4)
    for weights in (facts["weights"], runs.regression.runs["cnn"]["weights"]):
        assert f"{weights:,}" in summary
    table = read_table(run.folder, "Spearman's correlation on 13 held-out clips")
    assert {"multitask", "cnn (step 8)", "lstm (step 8)", "transfer (step 9)"} <= set(table.index)
    mean = runs.regression.runs["cnn"]["test"]["mean_spearman"]
    cell = table.loc["cnn (step 8)"].iloc[-1]
    assert float(cell.split()[0]) == pytest.approx(mean, abs=6e-4)
    # Trained for less long: what differs is not the shared backbone alone.
    copy_data(runs.regression.folder, tmp_path / STEP8)
    copy_data(runs.transfer.folder / "cnn_mel", tmp_path / STEP9 / "cnn_mel")
    other = run_step(STEP10, runs.data, tmp_path, "--epochs", 1)
    summary = (other.folder / "summary.md").read_text()
    assert minus not in summary and "cnn (step 8)" in summary


def test_the_average_is_of_both_networks_in_predictions_and_in_what_is_handed_in(runs):
    run = runs.multitask
    members = run.runs["multitask_average"]["members"]
    assert members == ["multitask_from_genre", "multitask_lstm"]
    mean = np.mean([run.predictions(member)[0] for member in members], axis=0)
    assert np.allclose(run.predictions("multitask_average")[0], mean, atol=1e-6)
    predictions = []
    for name in members:
        model, checkpoint = common.load_model(run.folder / name / "best.pt")
        clips = common.load_test(Source(run.data), checkpoint["settings"])
        predictions.append(common.predict_clips(model, clips, checkpoint["settings"]))
    expected = average_predictions(predictions)[list(EMOTIONS)].clip(0, 1)
    found = submission(run.folder).loc[expected.index]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(predictions[0] - predictions[1]).to_numpy().max() > 1e-3  # or one would do


def test_it_goes_on_from_the_genre_network(runs):
    """A copied backbone gets input standardised as in genre training, a new one as in its own."""
    checkpoints = [runs.transfer.checkpoint("cnn_mel")]
    checkpoints += [runs.multitask.checkpoint(name) for name in NETWORKS[:2]]
    # Batch normalisation counts the batches it has seen: those of genre training too.
    key = "backbone.blocks.0.1.num_batches_tracked"
    before, after, alone = (int(each["state"][key]) for each in checkpoints)
    assert before > 0 and alone > 0 and after == before + alone
    genre, copied, scratch = (each["settings"]["stats"][0] for each in checkpoints)
    assert np.array_equal(genre, copied) and not np.array_equal(genre, scratch)
