"""The training loop, its checkpoints and scores: what public solutions got wrong, held here."""

import dataclasses
import json
import math
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    assert_clean_error,
    patch_everywhere,
    read_metrics,
    run_forked,
    run_inside,
    run_script,
    write_data_set,
)
from scipy.stats import spearmanr
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import common
import patrec.batches
import patrec.clips
import patrec.labels
import patrec.machine
import patrec.recipes
import patrec.scores
import patrec.step
import patrec.tables
from common import Classifier, LSTMBackbone, RegressionLoss, Regressor
from patrec.batches import Augment
from patrec.errors import InputError, StepFailed
from patrec.recipes import GENRE_NETWORKS, Network, Recipe

LSTMS = {"mel", "beat_mel", "chroma", "beat_chroma", "fused", "beat_fused"}


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """Small, for tests in which the steps only have to run."""
    return write_data_set(tmp_path_factory.mktemp("tiny"), n_emotion=(2, 1))


def clips(n=24, n_frames=12, n_bands=6, n_classes=3, seed=0):
    """(x, target, length) batches in which the loudest band tells the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % n_classes
    x = 0.3 * torch.randn(n, n_frames, n_bands, generator=generator)
    x[torch.arange(n), :, targets] += 2
    return TensorDataset(x, targets, torch.full((n,), n_frames))


def classifier(n_classes=3):
    torch.manual_seed(0)
    return Classifier(LSTMBackbone(6, hidden_size=8, n_layers=1), n_classes)


def toy_data(tensors):
    """Training and validation part are the same clips, which a toy network may learn."""
    part, names = Subset(tensors, list(range(len(tensors)))), list("abc")
    settings = {"part": "genre", "names": names, "priors": [1 / 3] * 3}
    return common.Data(part, part, Subset(tensors, []), names, None, None, settings)


def train(folder, epochs=4, model=None, data=None, loss=None, recipe=None, **options):
    """Train on the toy clips; returns (model, Fit)."""
    patrec.machine.seed_everything(3)
    model = model or classifier()
    augment = Augment(n_classes=3, shift_bands=0, mask_bands=1, mask_frames=2)
    plan = Recipe(epochs=epochs, lr=0.02, batch_size=8, augment=augment)
    plan = dataclasses.replace(plan, **(recipe or {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.01)
    toy, loss = toy_data(data or clips()), loss or nn.CrossEntropyLoss()
    return model, common.train(model, toy, loss, optimizer, plan, folder, **options)


def val_score(result):
    return result.facts["val"]["macro_f1"]


@pytest.fixture
def scored(monkeypatch):
    """Function: validation scores the epochs by this function instead."""

    def patch(score):
        patch_everywhere(monkeypatch, "validation_score", score)

    return patch


def test_learns_and_returns_the_best_epoch(tmp_path):
    model, result = train(tmp_path / "run", epochs=8)
    assert val_score(result) > 0.9 and result.model is model
    outputs, targets = common.predict(model, DataLoader(clips(), 8))
    again = common.validation_score(outputs, targets, result.settings)
    assert again == pytest.approx(val_score(result))


def test_best_checkpoint_is_not_the_last_model(tmp_path, scored):
    """Bug 7: 'best' was an alias of the live model, or overwritten by the last one."""
    scores = iter([0.1, 0.9, 0.2, 0.3])
    scored(lambda *_: next(scores))
    model, result = train(tmp_path / "run", recipe={"settled": 0.75})
    best, last = (
        torch.load(tmp_path / "run" / name, weights_only=True) for name in ("best.pt", "last.pt")
    )
    assert result.facts["best_epoch"] == best["epoch"] == 2
    key = "head.1.weight"
    assert torch.equal(model.state_dict()[key], best["state"][key])
    assert not torch.equal(best["state"][key], last["average"][f"module.{key}"])


def test_an_early_peak_does_not_win_against_the_last_epochs(tmp_path, scored):
    scores = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1])
    scored(lambda *_: next(scores))
    _, result = train(tmp_path / "run", epochs=10)
    assert result.facts["best_epoch"] == 9 and val_score(result) == 0.15
    assert result.history.query("kept == 1")["epoch"].tolist() == [1, 9]


def test_of_a_run_cut_short_the_best_so_far_is_kept(tmp_path, scored):
    scores = iter([0.2, 0.9, 0.3, 0.1])

    def stop_in_fourth_epoch(*_):
        score = next(scores)
        if score == 0.1:
            raise KeyboardInterrupt
        return score

    scored(stop_in_fourth_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", epochs=20)
    assert common.load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 2
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 1 + 3


def test_something_is_kept_although_every_score_is_negative(tmp_path, scored):
    """Bug 13: best began at 0, so a score of 1 - loss was never saved while loss > 1."""
    scored(lambda *_: -5.0)
    _, result = train(tmp_path / "run", epochs=2)
    assert (tmp_path / "run" / "best.pt").exists() and val_score(result) == -5.0


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_validation_runs_in_evaluation_mode_and_training_in_training_mode(tmp_path, mode):
    """Bug 4: train() called once: dropout and batch norm stayed on in validation, or off later.

    In whichever mode the network comes: that of a checkpoint in evaluation mode, a new one in
    training mode.
    """
    model, seen = classifier().train(mode == "training"), []
    model.head[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    train(
        tmp_path / "run", epochs=2, model=model
    )  # the averaged copy that is validated carries the hook too
    assert seen == ([True] * 3 + [False] * 3) * 2


def test_resume_gives_exactly_what_an_uninterrupted_run_gives(tmp_path, monkeypatch):
    whole, result = train(tmp_path / "whole", epochs=5)
    calls, score = iter(range(100)), common.validation_score

    def stop_in_third_epoch(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return score(*args)

    with monkeypatch.context() as patch:
        patch_everywhere(patch, "validation_score", stop_in_third_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", epochs=5)
    resumed, again = train(tmp_path / "parts", epochs=5, resume=True)
    assert again.history["epoch"].tolist() == [1, 2, 3, 4, 5]
    for key in ("train_loss", "val_loss", "val_score"):
        assert again.history[key].tolist() == result.history[key].tolist()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resume_of_another_run_is_refused(tmp_path):
    train(tmp_path / "run", epochs=2)
    with pytest.raises(InputError, match="begun with --epochs 2"):
        train(tmp_path / "run", epochs=3, resume=True)
    with pytest.raises(InputError, match="another model"):
        torch.manual_seed(0)
        other = Classifier(LSTMBackbone(6, hidden_size=4, n_layers=1), 3)
        train(tmp_path / "run", epochs=2, model=other, resume=True)


def test_time_limit_ends_training_with_a_scored_epoch(tmp_path, capsys):
    _, result = train(tmp_path / "run", epochs=50, max_seconds=0)
    assert result.facts["epochs"] == 1 and result.facts["planned_epochs"] == 50
    assert "time is up" in capsys.readouterr().out


def test_nan_loss_names_epoch_batch_and_rate_and_keeps_the_best(tmp_path):
    steps = iter(range(1000))

    class Bad(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            loss = super().forward(outputs, targets)
            return (
                loss * math.nan if next(steps) == 5 else loss
            )  # 3 batches + 1 validation per epoch

    with pytest.raises(StepFailed, match=r"epoch 2, batch 2, learning rate"):
        train(tmp_path / "run", loss=Bad())
    assert common.load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 1


def overfit(tensors, **options):
    patrec.machine.seed_everything(0)
    model = classifier()
    options = {"lr": 0.01, "batch_size": 8} | options
    return model, common.overfit(model, toy_data(tensors), nn.CrossEntropyLoss(), **options)


def test_overfit_reaches_zero_loss_with_regularisation_off():
    model, check = overfit(clips(64))
    assert check.learned and check.facts["loss"] < 0.01 and check.facts["accuracy"] == 1
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    assert check.history["loss"].tolist()[-1] == check.facts["loss"]
    assert check.facts["passes"] == len(check.history)


def test_overfit_fails_where_nothing_can_be_learned(tiny_data, tmp_path, monkeypatch):
    """Bug 9: the check stopped at a loss of .3 and passed. Equal inputs, unequal labels: fails.

    The step ends, and leaves what it has shown and no result.
    """
    same = TensorDataset(torch.ones(16, 12, 6), torch.arange(16) % 3, torch.full((16,), 12))
    _, check = overfit(same, limit=15)
    assert not check.learned and check.facts["passes"] == 15 and check.facts["loss"] > 0.3
    flags = ["--overfit-batch", "--data-dir", str(tiny_data), "--out-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["step", *flags])
    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # put back after the test
    step = patrec.step.Step("step", "x", training=True)
    step.text("shown before")
    with pytest.raises(StepFailed, match="not learned by heart") as error:
        step.require(check.learned, "four batches were not learned by heart")
    assert error.value.exit_code == 1
    assert "shown before" in (tmp_path / "step" / "overfit_batch" / "summary.md").read_text()
    assert not list(tmp_path.rglob("metrics.json"))


def test_overfit_uses_four_batches_of_the_training_clips_only():
    """Bug 9: the check was run on the whole set."""
    fetched = []

    class Watched(TensorDataset):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

    overfit(Watched(*clips(80).tensors))
    assert 32 <= len(set(fetched)) <= 40  # 4 batches, and one that the loader had begun


def test_regression_output_and_target_shapes_cannot_broadcast():
    """Bug 1: (B, 1) against (B,) makes a (B, B) error that pulls every answer to the mean."""
    model = Regressor(LSTMBackbone(6, hidden_size=4, n_layers=1), ["energy"], [0.5], [0.2])
    for n in (1, 5):  # bug 11: squeeze() made a batch of one a scalar
        assert model(torch.randn(n, 12, 6), torch.full((n,), 12)).shape == (n, 1)
    with pytest.raises(ValueError, match="broadcast"):
        common.regression_loss(torch.zeros(5, 1), torch.zeros(5), 1.0)
    for outputs, targets in (((5, 1), (5,)), ((5,), (5, 1)), ((5, 1), (5, 3)), ((1, 3), (5, 3))):
        with pytest.raises(ValueError, match="broadcast"):
            RegressionLoss([1.0] * outputs[-1])(torch.zeros(outputs), torch.zeros(targets))


def test_multitask_loss_is_the_sum_of_the_three_scaled_losses():
    torch.manual_seed(0)
    outputs, targets, std = torch.rand(9, 3), torch.rand(9, 3), [0.25, 0.5, 0.1]
    alone = [common.regression_loss(outputs[:, i], targets[:, i], std[i]) for i in range(3)]
    assert RegressionLoss(std)(outputs, targets).item() == pytest.approx(sum(alone).item())


def test_windows_cover_the_clip_and_stay_inside():
    x = torch.arange(50.0).view(1, 50, 1).repeat(2, 1, 1)
    cut, lengths = patrec.batches.cut_windows(x, torch.tensor([50, 20]), 16)
    cut = cut.view(2, -1, 16)
    assert set(cut[0].flatten().tolist()) == set(range(50)) and cut[1].max() == 19
    assert lengths.tolist() == [16] * len(lengths)


@pytest.mark.parametrize(
    "n_clips, epochs, crops",
    [(8, 55, 3), (365, 55, 3), (1000, 60, 1), (1844, 33, 1), (20_000, 20, 1)],
)
def test_small_sets_get_more_passes_and_several_crops_per_epoch(
    monkeypatch, n_clips, epochs, crops
):
    budget = patrec.recipes.Budget(crop=256, genre=60_000, emotion=30_000, most_passes=165)
    patch_everywhere(monkeypatch, "BUDGETS", {"cnn": budget})
    args = types.SimpleNamespace(epochs=None, smoke=False, lr=0.003, batch_size=7)
    genre = types.SimpleNamespace(
        train=range(n_clips), settings={"part": "genre"}, names=list("abc")
    )
    recipe = patrec.recipes.make_recipe(Network("cnn", "mel"), genre, args)
    assert (recipe.epochs, recipe.crops) == (epochs, crops)
    assert (recipe.lr, recipe.batch_size, recipe.window) == (0.003, 7, 256)
    # Half as many emotion clips and half the budget: as many passes.
    emotion = types.SimpleNamespace(
        train=range(n_clips // 2), settings={"part": "emotion"}, names=["energy"]
    )
    recipe = patrec.recipes.make_recipe(Network("cnn", "mel"), emotion, args)
    assert (recipe.epochs, recipe.crops) == (epochs, crops)
    args.epochs = 7  # what was asked for is done, a fine-tuning's share of it
    for share, expected in ((1, 7), (0.3, 2), (0.01, 1)):
        recipe = patrec.recipes.make_recipe(Network("cnn", "mel"), genre, args, share)
        assert (recipe.epochs, recipe.crops) == (expected, 1)


def test_a_rare_class_is_believed_a_little_earlier():
    logits = torch.tensor([[1.0, 0.9], [1.0, -2.0]])
    assert common.adjust_logits(logits, [0.9, 0.1]).argmax(1).tolist() == [1, 0]
    equal = common.adjust_logits(logits, [0.5, 0.5])
    torch.testing.assert_close(equal.log_softmax(1), logits.log_softmax(1))


def test_spearman_is_over_the_whole_set():
    """Bug 10: averaged over batches, or scipy called on an (N, 3) matrix."""
    rng = np.random.default_rng(0)
    targets, predictions = rng.random((60, 3)), rng.random((60, 3))
    ids = [str(i) for i in range(60)]
    true, said = (pd.DataFrame(x, ids, patrec.labels.EMOTIONS) for x in (targets, predictions))
    scores = patrec.scores.emotion_scores(true, said.iloc[::-1])  # rows are found by clip id
    for i, axis in enumerate(patrec.labels.EMOTIONS):
        assert scores[axis] == pytest.approx(spearmanr(targets[:, i], predictions[:, i]).statistic)
        assert scores[f"{axis}_ci95"][0] < scores[axis] < scores[f"{axis}_ci95"][1]
    mean = np.mean([scores[axis] for axis in patrec.labels.EMOTIONS])
    assert scores["mean_spearman"] == pytest.approx(mean)
    assert patrec.scores.spearman(targets[:, 0], np.zeros(60)) == 0


def test_classification_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    scores = patrec.scores.classification_scores(targets, predictions, list("abcd"))
    assert scores["macro_f1"] == pytest.approx(f1_score(targets, predictions, average="macro"))
    assert scores["macro_f1"] == pytest.approx(common.macro_f1(targets, predictions, 4))
    assert scores["micro_f1"] == pytest.approx(scores["accuracy"])
    low, high = scores["accuracy_ci95"]
    half = 1.96 * math.sqrt(
        scores["accuracy"] * (1 - scores["accuracy"]) / 200
    )  # normal approximation
    assert high - low == pytest.approx(2 * half, rel=0.15)


def test_checkpoint_rebuilds_the_model(tmp_path):
    model, _ = train(tmp_path / "run", epochs=1)
    again, checkpoint = common.load_model(tmp_path / "run" / "best.pt")
    x, _, lengths = next(iter(DataLoader(clips(), 8)))
    assert torch.equal(model.eval()(x, lengths), again(x, lengths))
    assert checkpoint["settings"]["names"] == list("abc")


@pytest.mark.parametrize("fault", ["truncated", "pickle", "empty", "other weights"])
def test_bad_checkpoint_is_one_clear_error(tmp_path, fault):
    train(tmp_path / "run", epochs=1)
    path = tmp_path / "run" / "best.pt"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "pickle":
        torch.save({"spec": Evil()}, path)
    else:
        content = torch.load(path, weights_only=True)
        content["spec"]["backbone_args"]["hidden_size"] = 9
        torch.save(content, path)
    with pytest.raises(InputError, match="best.pt"):
        common.load_model(path)


class Evil:
    """A pickle that would run code when read."""

    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was run",))


@pytest.fixture(scope="module")
def outputs(tiny_data, tmp_path_factory):
    """Steps 5 and 6, run once."""
    out = tmp_path_factory.mktemp("outputs")
    where = ("--smoke", "--data-dir", tiny_data, "--out-dir", out)
    for script, flags in (("step05_lstm.py", []), ("step06_eval.py", ["--ensemble"])):
        run_forked(script, *flags, *where)
    return out


def test_test_split_is_read_only_after_training(tiny_data, tmp_path, monkeypatch):
    """Bug 3: test clips in training, or validation scores shown as test scores."""
    order, read_array, train = [], patrec.clips.read_array, common.train

    def read(path, *lock):
        order.append(path.parent.name)
        return read_array(path, *lock)

    def train_noted(*args, **options):
        result = train(*args, **options)
        order.append("trained")
        return result

    patch_everywhere(monkeypatch, "read_array", read)
    patch_everywhere(monkeypatch, "train", train_noted)
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "cache"))
    flags = ("--smoke", "--features", "beat_mel", "beat_chroma", "--data-dir", tiny_data)
    assert run_inside("step05_lstm.py", *flags, "--out-dir", tmp_path / "out") == 0
    assert "test" in order and order.count("trained") == 2
    assert "test" not in order[: len(order) - 1 - order[::-1].index("trained")]


def test_same_seed_same_numbers_in_another_process(outputs, tiny_data, tmp_path):
    """And alone the same as among five others."""
    flags = ("--smoke", "--features", "beat_fused", "--data-dir", tiny_data)
    run_script("step05_lstm.py", *flags, "--out-dir", tmp_path)
    results = []
    for out in (outputs, tmp_path):
        run = read_metrics(out / "step05_lstm")["runs"]["beat_fused"]
        run.pop("train_seconds")
        table = pd.read_csv(out / "step05_lstm" / "predictions.csv", dtype=str)
        answers = table[table["model"] == "beat_fused"].to_csv(index=False)
        checkpoint = (out / "step05_lstm" / "beat_fused" / "best.pt").read_bytes()
        results.append((run, answers, checkpoint))
    assert results[0] == results[1]


def test_step05_and_06_write_what_the_contract_says(outputs):
    more = {"majority", "svm", "beat_svm", "lstm_ensemble"}
    wanted = {"accuracy", "macro_f1", "macro_precision", "macro_recall", "micro_f1"}
    for step, names in (("step05_lstm", LSTMS), ("step06_eval", LSTMS | more)):
        folder = outputs / step
        metrics = read_metrics(folder)
        assert metrics["step"] == step and set(metrics["runs"]) == names
        for run in metrics["runs"].values():
            test = run["test"]
            assert wanted | {"accuracy_ci95", "macro_f1_ci95"} <= set(test)
            assert len(test["per_class"]) == 10
        summary = (folder / "summary.md").read_text()
        for picture in folder.glob("*.png"):
            assert picture.name in summary and picture.stat().st_size > 5000
        assert (folder / "args.json").exists() and not list(folder.rglob("*.tmp"))
        table = pd.read_csv(folder / "predictions.csv", dtype=str)
        columns = ["clip", "model", "test_set", "target", "fold", "seed", "truth", "prediction"]
        assert list(table.columns) == columns and set(table["model"]) <= names
    history = (outputs / "step05_lstm" / "mel" / "history.csv").read_text()
    assert history.startswith("epoch,lr,train_loss,val_loss,val_score")


def test_step05_overfit_batch(tiny_data, tmp_path):
    flags = ("--overfit-batch", "--features", "beat_mel", "--batch-size", "16")
    result = run_forked("step05_lstm.py", *flags, "--data-dir", tiny_data, "--out-dir", tmp_path)
    assert "overfit pass" in result.stdout
    check = read_metrics(tmp_path / "step05_lstm" / "overfit_batch")["overfit"]["beat_mel"]
    assert check["loss"] < 0.01 and check["accuracy"] == 1
    # Beside a full run's results, not in their place.
    assert not (tmp_path / "step05_lstm" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--subset", "1"], "--subset"),
        (["--lr", "-1"], "--lr"),
        (["--epoch", "3"], "--epoch"),
    ],
)
def test_flags_out_of_range_exit_with_2(flags, word, tiny_data, tmp_path):
    out = tmp_path / "out"
    where = ("--data-dir", tiny_data, "--out-dir", out)
    result = run_forked("step05_lstm.py", *flags, *where, check=False)
    assert_clean_error(result, word)
    assert not out.exists()


def test_wrong_data_folder_is_one_line(tmp_path):
    flags = ("--data-dir", tmp_path / "nowhere", "--out-dir", tmp_path / "out")
    result = run_forked("step05_lstm.py", *flags, check=False)
    assert_clean_error(result, "nowhere", "--data-dir")


# --- what an earlier step has left ------------------------------------------------------


@pytest.fixture
def make_step(monkeypatch):
    """Function: a Step of its own, as a script makes it."""
    monkeypatch.setattr("sys.excepthook", sys.excepthook)

    def make(data, out, *flags, name="step06_eval"):
        monkeypatch.setattr("sys.argv", [name, "--data-dir", str(data), "--out-dir", str(out)])
        sys.argv += flags
        return patrec.step.Step(name, "x", training=True)

    return make


ODD_CHECKPOINTS = {
    "labels": ({"fingerprint": "of other labels"}, "fingerprint"),
    "merge": ({"merge": False}, "merge"),
    "seed": ({"seed": 43}, "seed"),
    "subset": ({"subset": 30}, "subset"),
    "smoke": ({"smoke": True, "subset": 64}, "smoke"),
    "window": ({"window": 999}, "window"),
    "network": ({}, "network"),
}


def test_what_vanishes_is_zero_in_a_step(tiny_data, tmp_path, make_step):
    """Numbers below 1e-38 made an LSTM's backward pass four times as long on a Xeon."""
    torch.set_flush_denormal(False)
    assert torch.tensor(1e-30) * 1e-10 > 0
    make_step(tiny_data, tmp_path)
    assert torch.tensor(1e-30) * 1e-10 == 0


def save_mel(step, folder, odd, **network):
    """A checkpoint as step 5 leaves one for `mel`, odd in one way."""
    backbone = common.make_backbone(GENRE_NETWORKS["mel"])
    if network:
        backbone = LSTMBackbone(**backbone.config | network)
    data = common.load_data(step.source, "mel")
    settings = (
        data.settings
        | {"run": "mel", "window": patrec.recipes.window_size(GENRE_NETWORKS["mel"])}
        | odd
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = Classifier(backbone, len(data.names))
    common.save_checkpoint(folder / "best.pt", model, settings, epoch=1, val_score=0.5, facts={})


@pytest.mark.parametrize("odd", ODD_CHECKPOINTS)
def test_a_checkpoint_of_something_else_is_passed_over_and_said_so(
    tiny_data, tmp_path, make_step, capsys, odd
):
    """Weights of the demo set were used on real music, and those of seed 42 ranked seed 43."""
    step, folder = make_step(tiny_data, tmp_path), tmp_path / "step05_lstm" / "mel"
    changes, word = ODD_CHECKPOINTS[odd]
    save_mel(step, folder, changes, **({"hidden_size": 16} if odd == "network" else {}))
    capsys.readouterr()
    assert common.find_genre_checkpoint(step.training, "mel") is None
    said = capsys.readouterr().out
    assert str(folder / "best.pt") in said and f"another {word}" in said, said
    # The one beside it fits and is found, wherever it lies.
    save_mel(step, step.folder / "mel", {})
    assert common.find_genre_checkpoint(step.training, "mel") == step.folder / "mel" / "best.pt"
    save_mel(step, folder, {})
    path = common.find_genre_checkpoint(step.training, "mel")
    assert path == folder / "best.pt" and common.load_checkpoint(path)["val_score"] == 0.5
    for flags in (["--seed", "43"], ["--subset", "30"], ["--no-merge"]):  # and the other way round
        other = make_step(tiny_data, tmp_path, *flags, name="other")
        assert common.find_genre_checkpoint(other.training, "mel") is None


def test_on_kaggle_ones_own_checkpoint_comes_before_that_of_an_attached_kernel(
    tiny_data, tmp_path, make_step, monkeypatch
):
    """What this session has trained anew is not to be replaced by what an older one has left."""
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    step = make_step(tiny_data, tmp_path / "out")
    attached, own = (
        root / "step05_lstm" / "mel"
        for root in (tmp_path / "kaggle" / "input" / "a-kernel" / "outputs", tmp_path / "out")
    )
    save_mel(step, attached, {})
    assert common.find_genre_checkpoint(step.training, "mel") == attached / "best.pt"
    save_mel(step, own, {})
    assert common.find_genre_checkpoint(step.training, "mel") == own / "best.pt"


def test_a_check_of_a_later_step_may_go_on_from_any_checkpoint_of_these_clips(
    tiny_data, tmp_path, make_step
):
    """With --smoke it is asked whether the step runs; from other labels it does not go on."""
    full, smoke = make_step(tiny_data, tmp_path), make_step(tiny_data, tmp_path, "--smoke")
    folder = tmp_path / "step05_lstm" / "mel"
    for odd, found in (({}, True), ({"smoke": True, "subset": 64}, True), ({"seed": 1}, False)):
        save_mel(full, folder, odd)
        assert bool(common.find_genre_checkpoint(smoke.training, "mel")) == found


def test_changed_labels_make_an_old_checkpoint_no_longer_fit(tmp_path, make_step, capsys):
    data = write_data_set(tmp_path / "data", n_emotion=(2, 1), n_frames=40)
    step = make_step(data, tmp_path / "out")
    save_mel(step, tmp_path / "out" / "step05_lstm" / "mel", {})
    assert common.find_genre_checkpoint(step.training, "mel")
    path = data / "fma_genre_spectrograms" / "train_labels.txt"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[::-1]]) + "\n")
    assert common.find_genre_checkpoint(step.training, "mel")  # the same labels in another order
    path.write_text(path.read_text().replace("\tPunk", "\tMetal", 1))
    assert common.find_genre_checkpoint(step.training, "mel") is None
    assert "fingerprint" in capsys.readouterr().out
    path.unlink()  # step 8 needs no genres
    assert common.find_genre_checkpoint(step.training, "mel") is None


def test_a_checkpoint_under_another_runs_name_is_an_error(tiny_data, tmp_path, make_step):
    step = make_step(tiny_data, tmp_path)
    save_mel(step, tmp_path / "step05_lstm" / "beat_mel", {})
    with pytest.raises(InputError, match="model of run mel, not of beat_mel"):
        common.find_genre_checkpoint(step.training, "beat_mel")


def write_earlier(folder, step, table, **changes):
    """metrics.json and predictions.csv as an emotion step leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    prints = {"emotion": patrec.labels.fingerprint(step.source.root, "emotion")}
    facts = {"data": {"fingerprint": prints}, "seed": 42, "smoke": False, "runs": {"cnn": 1}}
    (folder / "metrics.json").write_text(json.dumps(facts | changes))
    patrec.tables.write_predictions(folder, table)


def test_earlier_answers_are_those_for_the_same_clips_by_id(tiny_data, tmp_path, make_step):
    step, folder = make_step(tiny_data, tmp_path), tmp_path / "step08_regression"
    answers, runs, note = patrec.tables.earlier_predictions(step.training, folder.name, ["7"])
    assert (answers, runs) == ({}, {}) and "missing here" in note
    ids = ["7", "010", "9"]  # as text: 010 is not 10, and 9 comes last
    numbers = np.random.default_rng(0).random((3, 3)).round(3)
    full = pd.DataFrame(numbers, ids, patrec.labels.EMOTIONS)
    tables = {"cnn": full, "svr": full.iloc[[2, 0, 1]] / 2, "lstm": full[["energy"]] / 4}
    rows = [
        patrec.tables.prediction_rows(name, full, frame, test_set="emotion", seed=42)
        for name, frame in tables.items()
    ]
    write_earlier(folder, step, rows)
    asked = ["9", "7", "010"]
    answers, runs, note = patrec.tables.earlier_predictions(step.training, folder.name, asked)
    assert folder.name in note and "missing" not in note
    assert set(answers) == set(tables) and runs == {"cnn": 1}
    for name, frame in answers.items():
        assert list(frame.index) == asked
        assert list(frame.columns) == list(tables[name].columns)
        wanted = tables[name].loc[asked].to_numpy()
        np.testing.assert_allclose(frame.to_numpy(), wanted, atol=1e-9)
    for clips in (asked[:2], [*asked, "11"], ["9", "7", "10"]):
        answers, runs, note = patrec.tables.earlier_predictions(step.training, folder.name, clips)
        assert (answers, runs) == ({}, {}) and "other labels, held-out clips" in note
    odd = {"fingerprint": {"emotion": "of other labels"}}
    for changes in ({"seed": 43}, {"smoke": True}, {"data": odd}):
        write_earlier(folder, step, rows, **changes)
        assert patrec.tables.earlier_predictions(step.training, folder.name, asked)[:2] == ({}, {})
    for text in ("{", "{}"):
        (folder / "metrics.json").write_text(text)
        with pytest.raises(InputError, match="step08_regression.*cannot be read"):
            patrec.tables.earlier_predictions(step.training, folder.name, asked)


def test_answers_of_other_folds_are_not_compared(tiny_data, tmp_path, make_step):
    """The same clips, held out otherwise: other clips were trained on."""
    step, folder = make_step(tiny_data, tmp_path), tmp_path / "step08_regression"
    ids = ["7", "010", "9"]
    full = pd.DataFrame(np.eye(3), ids, patrec.labels.EMOTIONS)
    folds = pd.Series([1, 2, 1], ids)
    write_earlier(folder, step, patrec.tables.held_out_rows(full, {"cnn": full}, 42, folds))
    answers, _, _ = patrec.tables.earlier_predictions(step.training, folder.name, ids, folds)
    assert list(answers) == ["cnn"]
    answers, _, note = patrec.tables.earlier_predictions(step.training, folder.name, ids, 3 - folds)
    assert not answers and "folds" in note


def test_folds_are_summed_up_as_one_run(monkeypatch):
    """Step 8 chooses the network that answers by the mean validation score."""
    facts = [
        {"epochs": e, "train_seconds": s, "n_train": 40, "val": {"energy": v}}
        for e, s, v in ((4, 10.0, 0.2), (6, 14.5, 0.7))
    ]
    patch_everywhere(
        monkeypatch, "load_trained", lambda i, device: types.SimpleNamespace(facts=facts[i])
    )
    tables = [pd.DataFrame({"energy": [0.1 * n]}, [str(n)]) for n in (1, 2)]
    run = common.join_folds([(i, table, 2 * table) for i, table in enumerate(tables)], "cpu")
    assert run.facts["val"] == {"energy": pytest.approx(0.45)}
    assert (run.facts["epochs"], run.facts["train_seconds"]) == (10, 24.5)
    assert run.folds.to_dict() == {"1": 1, "2": 2}
    assert run.predictions["energy"].tolist() == pytest.approx([0.1, 0.2])
    assert run.truth["energy"].tolist() == pytest.approx([0.2, 0.4])


def test_the_textbook_lstm_is_no_candidate_and_adjusts_no_logits(
    tiny_data, tmp_path, make_step, monkeypatch
):
    """It stands beside the lab's networks for comparison: later steps do not go on from it."""
    step, seen = make_step(tiny_data, tmp_path), {}

    def train(model, data, loss_fn, optimizer, recipe, folder, **options):
        seen[folder.name] = data.settings["priors"]
        folder.mkdir(parents=True)
        settings = data.settings | {"run": folder.name, "window": recipe.window}
        facts = {"n_val": len(data.val), "planned_epochs": 1}
        score = 0.9 if folder.name == "plain_mel" else 0.5
        path = folder / "best.pt"
        common.save_checkpoint(path, model, settings, epoch=1, val_score=score, facts=facts)
        return common.load_trained(path)

    patch_everywhere(monkeypatch, "train", train)
    folder = tmp_path / "step05_lstm"
    training = dataclasses.replace(step.training, folder=folder, workers=1)
    common.train_all(training, [common.genre_experiment(name) for name in ("plain_mel", "mel")])
    assert len(set(seen["plain_mel"])) == 1 < len(set(seen["mel"]))
    assert common.find_genre_checkpoint(step.training, "plain_mel")
    assert list(common.genre_val_scores(step.training).index) == ["mel"]


def test_indented_paragraphs_are_no_code(tiny_data, tmp_path, make_step):
    """In Markdown four spaces after an empty line make code of a paragraph."""
    step = make_step(tiny_data, tmp_path)
    step.text("""
        A paragraph

        and another.
    """)
    step.write()
    summary = (step.folder / "summary.md").read_text()
    assert "\nA paragraph\n\nand another.\n" in summary


class Watched(TensorDataset):
    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.shown = []

    def __getitem__(self, index):
        self.shown.append(index)
        return super().__getitem__(index)


def test_every_clip_is_shown_as_often_as_planned_each_time_in_another_order(tmp_path):
    watched = Watched(*clips(21).tensors)
    train(tmp_path / "run", epochs=2, data=watched, recipe={"crops": 2})
    per_epoch = 2 * 21 + 21  # two crops of each clip, then the validation part
    epochs = [watched.shown[start:][: 2 * 21] for start in (0, per_epoch)]
    assert all(sorted(epoch) == sorted([*range(21)] * 2) for epoch in epochs)
    assert epochs[0] != epochs[1] and len(watched.shown) == 2 * per_epoch
    assert watched.shown[2 * 21 : per_epoch] == list(range(21))


def test_validation_clips_choose_the_epoch(tmp_path, monkeypatch):
    seen = []
    patch_everywhere(
        monkeypatch,
        "validation_score",
        lambda outputs, targets, _: seen.append(targets.tolist()) or 0.0,
    )
    whole = clips(24)
    train, val = Subset(whole, list(range(15))), Subset(whole, [16, 20, 23])
    settings = {"part": "genre", "names": list("abc"), "priors": [1 / 3] * 3}
    data = common.Data(train, val, Subset(whole, []), list("abc"), None, None, settings)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recipe = patrec.recipes.Recipe(epochs=2, lr=0.01, batch_size=8)
    result = common.train(model, data, nn.CrossEntropyLoss(), optimizer, recipe, tmp_path)
    assert seen == [[1, 2, 2]] * 2
    assert (result.facts["n_train"], result.facts["n_val"]) == (15, 3)


def test_gradients_of_a_step_are_its_own(tmp_path, monkeypatch):
    """Never set to zero, they would add up from step to step."""
    patch_everywhere(monkeypatch, "fast_dtype", lambda kind: torch.float32)
    model, seen = classifier(), []

    class Small(nn.Module):
        def forward(self, outputs, targets):
            return 1e-3 * outputs[:, 0].mean()

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    bias = model.head[1].bias
    optimizer.register_step_pre_hook(lambda *_: seen.append(bias.grad[0].item()))
    data = clips(24)
    part = Subset(data, list(range(24)))
    settings = {"part": "genre", "names": list("abc"), "priors": [1 / 3] * 3}
    toy = common.Data(part, part, Subset(data, []), list("abc"), None, None, settings)
    recipe = patrec.recipes.Recipe(epochs=2, lr=0.02, batch_size=8)
    common.train(model, toy, Small(), optimizer, recipe, tmp_path)
    assert seen == pytest.approx([1e-3] * 6)


def test_a_negative_first_score_of_a_run_cut_short_is_kept(tmp_path, monkeypatch):
    """Bug 13, where no epoch is settled yet: began at 0, nothing would be kept."""
    patch_everywhere(monkeypatch, "validation_score", lambda *_: -0.2)
    _, result = train(tmp_path / "run", epochs=20, max_seconds=0)
    assert result.facts["epochs"] == result.facts["best_epoch"] == 1


def test_best_checkpoint_holds_the_averaged_weights(tmp_path):
    train(tmp_path / "run", epochs=1, recipe={"ema": 0.99, "batch_size": 2})  # 12 steps
    best, last = (
        torch.load(tmp_path / "run" / name, weights_only=True) for name in ("best.pt", "last.pt")
    )
    for key, value in best["state"].items():
        assert torch.equal(value, last["average"][f"module.{key}"]), key
    assert not torch.equal(best["state"]["head.1.weight"], last["model"]["head.1.weight"])
