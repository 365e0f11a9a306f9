"""Step 7: the CNNs' predictions, what they are compared and averaged with, and the digits."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, functions_of, genre_predictions, labels_of, read_metrics, run_forked
from genre_runs import (
    CNNS,
    FULL,
    LSTMS,
    RIVAL,
    VAL_SCORES,
    GenreRuns,
    assert_learned,
    assert_own_predictions,
    assert_predictions,
    assert_scores,
    classes_of,
    log_probabilities,
)
from torch import nn

from common import CNNBackbone, load_checkpoint
from patrec.errors import InputError

STEP = "step07_cnn"
AVERAGES = {"cnn_ensemble": CNNS, "cnn_lstm_ensemble": [*CNNS, RIVAL]}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return GenreRuns(tmp_path_factory).learned


@pytest.mark.slow
def test_report_is_whole_and_in_the_labs_order(learned):
    folder = learned.out / STEP
    summary = (folder / "summary.md").read_text()
    figures = {"digit_activations", "block_operations", "learning_curve", "overfit"}
    figures |= {"per_class", "confusion"}
    assert {path.stem for path in folder.glob("*.png")} == figures
    assert all(f"]({name}.png)" in summary for name in figures)
    items = re.findall(r"^## (\d+[a-e])\.", summary, flags=re.MULTILINE)
    assert items == ["7a", "7b", "7c", "7d", "7e"]
    words = re.sub(r"```.*?```", "", summary, flags=re.DOTALL)  # source code may hold a brace
    for word in ("nan", "None", "{", "tensor("):
        assert word not in words, word
    assert "class CNNBackbone" in summary and "| backbone.blocks.3.3 | MaxPool2d |" in summary
    assert "convnetjs/demo/mnist.html" in summary


@pytest.mark.slow
def test_every_test_clip_is_predicted_once_and_scores_are_those_of_the_predictions(learned):
    metrics, table = (read(learned.out / STEP) for read in (read_metrics, genre_predictions))
    assert_predictions(table, labels_of(learned.data, split="test"))
    assert set(metrics["runs"]) == {*CNNS, *AVERAGES}
    assert set(table["model"]) == {*CNNS, *AVERAGES, "mel", RIVAL}
    for name, rows in table.groupby("model"):
        assert name == RIVAL or set(rows["test_set"]) == {FULL}
        assert_learned(rows, name)
        assert_scores((metrics["runs"] | metrics["compared_with"])[name]["test"], rows)
    assert_own_predictions(learned, "cnn_mel")
    accuracy, facts = metrics["digits"]["accuracy"], metrics["runs"] | metrics["compared_with"]
    assert accuracy[-1] > 0.5 > accuracy[0]
    said = "on 1,437 images .* on 360 others: {0:.3f} .*, {1:.3f} after one .*, {3:.3f} after 3"
    summary = " ".join((learned.out / STEP / "summary.md").read_text().split())
    assert re.search(said.format(*accuracy), summary)
    mean, sd = metrics["digits"]["left_out"]["all four operations"]["test accuracy"].split(" ± ")
    # Of this run and one more.
    assert abs(accuracy[-1] - float(mean)) == pytest.approx(float(sd) / 2**0.5, abs=2e-3)
    for run in (facts["cnn_mel"], facts["mel"]):
        n_examples = run["epochs"] * run["examples_per_epoch"]
        assert f" | {n_examples:,} | {run['weights']:,} |" in summary.partition("## 7e")[2]
    assert metrics["overfit"]["cnn_mel"]["accuracy"] == 1


@pytest.mark.slow
def test_ensemble_is_of_different_networks(learned):
    paths = [learned.out / STEP / name / "best.pt" for name in CNNS]
    first = [load_checkpoint(path)["state"]["backbone.blocks.0.0.weight"] for path in paths]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))
    metrics, table = (read(learned.out / STEP) for read in (read_metrics, genre_predictions))
    seeds = table.groupby("model")["seed"].unique().map(list)
    assert [seeds[name] for name in CNNS] == [["42"], ["43"], ["44"]]
    accuracies = [metrics["runs"][name]["test"]["accuracy"] for name in CNNS]
    spread = metrics["seed_spread"]["accuracy"]
    expected = (np.mean(accuracies), np.std(accuracies, ddof=1))
    assert (spread["mean"], spread["sd"]) == pytest.approx(expected)


@pytest.mark.slow
def test_the_average_takes_in_the_lstm_that_validated_best(learned):
    metrics, rows = (read(learned.out / STEP) for read in (read_metrics, genre_predictions))
    for place, (average, members) in enumerate(AVERAGES.items()):
        assert metrics["runs"][average]["members"] == members
        # A class alone hardly depends on how much each member counts.
        table = pd.read_csv(learned.out / f"average_{place}.csv", dtype={0: str}, index_col=0)
        each = [log_probabilities(learned, name, table.index) for name in members]
        weights = [1 / 3] * 3 if place == 0 else [1 / 6] * 3 + [1 / 2]
        expected = np.tensordot(weights, each, 1)
        np.testing.assert_allclose(table[CLASSES], expected, atol=0.02, err_msg=average)
        found = rows[rows["model"] == average].set_index("clip")["prediction"]
        assert (found[table.index] != classes_of(expected)).sum() <= 1  # a near tie
    val = {name: run["val"]["macro_f1"] for name, run in metrics["compared_with"].items()}
    assert val == {"mel": VAL_SCORES["mel"], RIVAL: 0.95}
    step5 = read_metrics(learned.out / "step05_lstm")["runs"]
    test = {name: step5[name]["test"]["macro_f1"] for name in LSTMS}
    assert test[RIVAL] < max(test.values()), "the test score would choose the same"


@pytest.mark.slow
def test_the_difference_of_cnn_and_lstm_is_that_of_their_predictions(learned):
    folder = learned.out / STEP
    metrics, table = read_metrics(folder), genre_predictions(folder)
    right = (table["truth"] == table["prediction"]).groupby([table["model"], table["clip"]])
    right = right.first().unstack("model").astype(bool)
    assert set(metrics["paired_difference"]) == {"mel", RIVAL}
    for name, found in metrics["paired_difference"].items():
        cnn, lstm = right["cnn_mel"], right[name]
        assert found["accuracy"] == pytest.approx(cnn.mean() - lstm.mean())
        only = (found["only_first"], found["only_second"])
        assert only == ((cnn & ~lstm).sum(), (lstm & ~cnn).sum())
        said = rf"\s{only[0]} clips are .* by `cnn_mel` alone,\s+{only[1]} by `{name}` alone\."
        assert re.search(said, (folder / "summary.md").read_text())
        line = rf"`cnn_mel` minus `{name}`, \d+ clips: accuracy ([-+.\d]+) \["
        (written,) = re.findall(line, (folder / "summary.md").read_text())
        assert float(written) == pytest.approx(found["accuracy"], abs=6e-4)


@pytest.mark.slow
def test_overfit_batch_alone_leaves_the_full_run_as_it_is(learned):
    """The check, and nothing but the check, in a folder of its own."""
    folder = learned.out / STEP
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = ("--overfit-batch", "--smoke", "--data-dir", learned.data, "--out-dir", learned.out)
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


def test_mnist_is_read_from_either_file_and_another_file_is_refused(step07, tmp_path):
    images, labels = np.random.default_rng(1).integers(0, 256, (30, 784)), np.arange(30) % 10
    np.savez(tmp_path / "mnist.npz", x_train=images.reshape(-1, 28, 28), y_train=labels)
    table = pd.DataFrame(images)
    table.insert(0, "label", labels)
    table.to_csv(tmp_path / "train.csv", index=False)
    order = np.random.default_rng(0).permutation(30)
    for name in ("mnist.npz", "train.csv"):
        x, digits = step07["read_digits"](tmp_path / name)
        assert digits.tolist() == labels[order].tolist()
        np.testing.assert_allclose(x.view(30, 784), images[order] / 255, atol=1e-6)
    x, digits = step07["read_digits"](None)
    assert x.shape == (1797, 1, 8, 8) and (x.min(), x.max()) == (0, 1)
    assert digits[:10].tolist() == list(range(10))
    (tmp_path / "train.csv").write_text("id,genre\n1,Rock\n")
    with pytest.raises(InputError, match="--mnist .*train.csv: not MNIST"):
        step07["read_digits"](tmp_path / "train.csv")


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
