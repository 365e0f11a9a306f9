"""Step 7: the CNN, the digits, its test scores and its comparison with the LSTM."""

import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    COUNTS,
    MERGED,
    functions_of,
    genre_predictions,
    read_metrics,
    run_forked,
    write_data_set,
)
from torch import nn

from common import CNNBackbone, load_checkpoint

STEP = "step07_cnn"
N_TEST = sum(COUNTS[genre][1] for genre in MERGED)
CNNS = ["cnn_mel", "cnn_mel_seed43", "cnn_mel_seed44"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Classes as unequal as in the shared set; clips of little more than one window, as two
    epochs are to be quick."""
    root = tmp_path_factory.mktemp("data")
    options = {"n_emotion": (2, 1), "n_frames": (270, 320), "n_beats": (14, 40)}
    return write_data_set(root, per_class=COUNTS, dtype=np.float32, **options)


@pytest.fixture(scope="module")
def outputs(data_dir, tmp_path_factory):
    """The step after a step 5 that has left a good LSTM on chroma, as --smoke trains it."""
    out = tmp_path_factory.mktemp("out")
    where = ("--smoke", "--data-dir", data_dir, "--out-dir", out)
    run_forked("step05_lstm.py", *where)
    path = out / "step05_lstm" / "chroma" / "best.pt"
    torch.save(load_checkpoint(path) | {"val_score": 0.99}, path)
    shutil.rmtree(out / "step05_lstm" / "mel")  # is trained here
    run_forked(f"{STEP}.py", "--ensemble", *where)
    return out


@pytest.mark.slow
def test_report_is_whole_and_in_the_labs_order(outputs):
    summary = (outputs / STEP / "summary.md").read_text()
    figures = {"digit_activations", "block_operations", "learning_curve", "overfit"}
    figures |= {"per_class", "confusion"}
    assert {path.stem for path in (outputs / STEP).glob("*.png")} == figures
    for name in figures:
        assert (outputs / STEP / f"{name}.png").stat().st_size > 5000
        assert f"]({name}.png)" in summary
    items = re.findall(r"^## (\d+[a-e])\.", summary, flags=re.MULTILINE)
    assert items == ["7a", "7b", "7c", "7d", "7e"]
    words = re.sub(r"```.*?```", "", summary, flags=re.DOTALL)  # source code may hold a brace
    for word in ("nan", "None", "{", "tensor("):
        assert word not in words, word
    assert "class CNNBackbone" in summary and "| backbone.blocks.3.3 | MaxPool2d |" in summary
    assert "convnetjs/demo/mnist.html" in summary


@pytest.mark.slow
def test_what_later_steps_read(outputs):
    """Scores and differences are recomputed from predictions.csv in test_answers_genre."""
    metrics = read_metrics(outputs / STEP)
    assert set(metrics["runs"]) == {*CNNS, "cnn_ensemble", "cnn_lstm_ensemble"}
    assert metrics["runs"]["cnn_ensemble"]["members"] == CNNS
    assert {"epochs", "train_seconds", "val", "test", "weights"} <= set(metrics["runs"]["cnn_mel"])
    # Clips that one model alone has right account for the whole difference.
    difference = metrics["paired_difference"]["mel"]
    only = difference["only_first"] - difference["only_second"]
    assert only == round(N_TEST * difference["accuracy"])
    assert metrics["digits"]["accuracy"][-1] > 0.5 > metrics["digits"]["accuracy"][0]
    assert metrics["overfit"]["cnn_mel"]["accuracy"] == 1
    accuracies = [metrics["runs"][name]["test"]["accuracy"] for name in CNNS]
    spread = metrics["seed_spread"]["accuracy"]
    expected = (np.mean(accuracies), np.std(accuracies, ddof=1))
    assert (spread["mean"], spread["sd"]) == pytest.approx(expected)
    seeds = genre_predictions(outputs / STEP).groupby("model")["seed"].unique().map(list)
    assert [seeds[name] for name in CNNS] == [["42"], ["43"], ["44"]]


@pytest.mark.slow
def test_ensemble_is_of_different_networks(outputs):
    paths = [outputs / STEP / name / "best.pt" for name in CNNS]
    first = [load_checkpoint(path)["state"]["backbone.blocks.0.0.weight"] for path in paths]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


@pytest.mark.slow
def test_rivals_are_the_lstm_on_mel_and_the_best_by_validation(outputs):
    """A checkpoint of step 5 with a better validation score must come into the comparison."""
    metrics = read_metrics(outputs / STEP)
    assert set(metrics["compared_with"]) == set(metrics["paired_difference"]) == {"mel", "chroma"}
    assert metrics["runs"]["cnn_lstm_ensemble"]["members"][-1] == "chroma"


@pytest.mark.slow
def test_overfit_batch_alone_leaves_the_full_run_as_it_is(data_dir, outputs):
    """The check, and nothing but the check, in a folder of its own."""
    folder = outputs / STEP
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = ("--overfit-batch", "--smoke", "--data-dir", data_dir, "--out-dir", outputs)
    result = run_forked(f"{STEP}.py", *flags)
    check = read_metrics(folder / "overfit_batch")["overfit"]["cnn_mel"]
    assert check["loss"] < 0.01 and check["accuracy"] == 1
    assert "1.000" in result.stdout
    assert re.findall(r"--- (\S+)", result.stdout) == ["7d."]
    assert not list((folder / "overfit_batch").rglob("best.pt"))  # a check leaves no model behind
    assert {path: path.read_bytes() for path in before} == before


def test_four_blocks_of_four_operations_in_the_labs_order():
    backbone = CNNBackbone()
    assert len(backbone.blocks) == 4
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    for block in backbone.blocks:
        assert [type(operation) for operation in block] == kinds
    assert backbone.blocks[0][0].in_channels == 1  # the spectrogram is an image of one channel


@pytest.fixture(scope="module")
def step07():
    return functions_of(f"{STEP}.py")


def test_digit_cnn_leaves_out_what_it_says(step07):
    digit_cnn, operations = step07["digit_cnn"], step07["OPERATIONS"]

    def names(without):
        return [type(module).__name__ for module in digit_cnn(without).modules()]

    for name in operations[1:]:
        assert names(None).count(name) == 2 and name not in names(name)
    assert digit_cnn("Conv2d")[0][0].kernel_size == (1, 1)
    for without in (None, *operations):
        assert digit_cnn(without)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_digits_are_scored_on_those_not_learned(step07):
    """With labels drawn by lot, what was learned by heart must not help on other digits."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 1, 8, 8, generator=generator), torch.arange(40) % 10
    train_digits = step07["train_digits"]
    _, learned = train_digits((x, y, x, y), 0, 60)
    other = torch.rand(400, 1, 8, 8, generator=generator)
    _, unseen = train_digits((x, y, other, torch.arange(400) % 10), 0, 60)
    assert learned[-1] > 0.9 and unseen[-1] < 0.3


def test_activations_are_what_the_network_computes(step07):
    model = step07["digit_cnn"]().eval()
    x = torch.rand(3, 1, 8, 8)
    maps = step07["activations"](model[:2], x)
    assert list(maps) == [(block, name) for block in (1, 2) for name in step07["OPERATIONS"]]
    torch.testing.assert_close(model[2:](maps[2, "MaxPool2d"]), model(x))
