"""Step 5: every answer is the right clip's, every score is true, and nothing leaks."""

import numpy as np
import pandas as pd
import pytest
from conftest import (
    genre_predictions,
    labels_of,
    patch_everywhere,
    read_metrics,
    run_forked,
    run_inside,
)
from genre_runs import (
    LSTMS,
    GenreRuns,
    array_path,
    assert_learned,
    assert_own_predictions,
    assert_predictions,
    assert_scores,
    copy_data,
    is_beat,
    replace_file,
    set_of,
)

import common
from patrec.clips import read_array
from patrec.flags import Source

pytestmark = pytest.mark.slow
STEP = "step05_lstm"
TWO = ("--features", "mel", "beat_fused", "--epochs", 2)  # frames cut into windows, whole beats


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return GenreRuns(tmp_path_factory).learned


def test_every_test_clip_is_predicted_once_by_each_lstm_on_its_own_kind_of_clips(learned):
    """Half of a test clip on frames is an intro of a window or more: it takes all windows."""
    table, metrics = genre_predictions(learned.out / STEP), read_metrics(learned.out / STEP)
    assert_predictions(table, labels_of(learned.data, split="test"))
    assert set(table["model"]) == set(LSTMS) == set(metrics["runs"])
    for name, rows in table.groupby("model"):
        assert set(rows["test_set"]) == {set_of(name)}
        assert_learned(rows, name)
        assert_scores(metrics["runs"][name]["test"], rows)
        losses = pd.read_csv(learned.out / STEP / name / "history.csv")["val_loss"]
        said = f"{losses.argmin() + 1} of {len(losses)} for `{name}`"  # the lowest loss
        assert said in (learned.out / STEP / "summary.md").read_text()


@pytest.mark.parametrize("name", LSTMS)
def test_a_prediction_is_the_networks_own_to_that_array(learned, name):
    assert_own_predictions(learned, name)


def test_training_does_not_change_with_validation_and_test_clips(small_data, tmp_path):
    """Their mel bands are moved; the validation loss alone follows."""
    data, out = copy_data(small_data, tmp_path / "data"), {}
    for name in ("mel", "beat_fused"):
        parts = {"test": labels_of(data, split="test")}
        parts["train"] = common.clip_ids(common.load_data(Source(data), beat=is_beat(name)).val)
        for split, clips in parts.items():
            for clip in clips:
                path = array_path(data, clip, split, is_beat(name))
                array = np.load(path)
                replace_file(path, np.vstack([np.roll(array[:128], 60, 0), array[128:]]))
    for key, root in (("before", small_data), ("after", data)):
        out[key] = tmp_path / key / STEP
        run_forked(f"{STEP}.py", *TWO, "--data-dir", root, "--out-dir", out[key].parent)
    for name in ("mel", "beat_fused"):
        folders = [folder / name for folder in out.values()]
        states = [common.load_checkpoint(folder / "best.pt") for folder in folders]
        assert all(map(np.array_equal, *(state["settings"]["stats"] for state in states)))
        first, second = (pd.read_csv(folder / "history.csv") for folder in folders)
        assert first["train_loss"].tolist() == second["train_loss"].tolist()
        assert (first["val_loss"] != second["val_loss"]).all()


def test_the_test_split_is_read_only_after_training(small_data, tmp_path, monkeypatch):
    """Bug 3: test clips in training, or validation scores shown as test scores."""
    order, train = [], common.train

    def read(path, *more):
        order.append(path.parent.name)
        return read_array(path, *more)

    def train_noted(*args, **options):
        result = train(*args, **options)
        order.append("checked" if options.get("overfit_batch") else "trained")
        return result

    patch_everywhere(monkeypatch, "read_array", read)
    patch_everywhere(monkeypatch, "train", train_noted)
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "cache"))
    where = ("--data-dir", small_data, "--out-dir", tmp_path)
    assert run_inside(f"{STEP}.py", "--smoke", *TWO, *where) == 0
    assert "test" in order and order.count("trained") == 2
    assert "test" not in order[: len(order) - 1 - order[::-1].index("trained")]


def test_plain_is_the_textbook_lstm(tiny_data, tmp_path):
    flags = ("--smoke", "--plain", "--epochs", 1, "--data-dir", tiny_data, "--out-dir", tmp_path)
    assert run_inside(f"{STEP}.py", *flags) == 0
    assert list(read_metrics(tmp_path / STEP)["runs"]) == ["plain_mel"]
    lstm = common.load_model(tmp_path / STEP / "plain_mel" / "best.pt")[0].backbone
    assert lstm.frames_per_step == 1
    layers = [module for module in lstm.modules() if hasattr(module, "bidirectional")]
    assert [layer.bidirectional for layer in layers] == [False, False]
