"""The training loop, its checkpoints and scores: what public solutions got wrong, held here."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import assert_clean_error, read_metrics, run_script, write_data_set
from scipy.stats import spearmanr
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import common
from common import Augment, Classifier, InputError, LSTMBackbone, MultitaskLoss, Recipe, Regressor, StepFailed


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


def fit(folder, epochs=4, model=None, data=None, score=None, loss=None, validate=True, **options):
    """Train on the toy clips; returns (model, result)."""
    common.seed_everything(3)
    model = model or classifier()
    data = data or clips()
    recipe = Recipe(epochs=epochs, lr=0.02, augment=Augment(n_classes=3, shift_bands=0, mask_bands=1, mask_frames=2))
    recipe = dataclasses.replace(recipe, **options.pop("recipe", {}))
    result = common.train(model, DataLoader(data, 8, shuffle=True), DataLoader(data, 8) if validate else None, loss or nn.CrossEntropyLoss(),
                          score or common.genre_score([1 / 3] * 3), recipe, folder, {"classes": list("abc")}, **options)  # fmt: skip
    return model, result


def test_learns_and_returns_the_best_epoch(tmp_path):
    model, result = fit(tmp_path / "run", epochs=8)
    assert result["val_score"] > 0.9
    outputs, targets = common.predict(model, DataLoader(clips(), 8))
    assert common.genre_score([1 / 3] * 3)(outputs, targets) == pytest.approx(result["val_score"])


def test_best_checkpoint_is_not_the_last_model(tmp_path):
    """Bug 7: 'best' was an alias of the live model, or overwritten by the last one."""
    scores = iter([0.1, 0.9, 0.2, 0.3])
    model, result = fit(tmp_path / "run", score=lambda outputs, targets: next(scores), recipe={"settled": 0.75})
    best, last = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert result["best_epoch"] == best["epoch"] == 2
    key = "head.1.weight"
    assert torch.equal(model.state_dict()[key], best["state"][key])
    assert not torch.equal(best["state"][key], last["average"][f"module.{key}"])


def test_an_early_peak_does_not_win_against_the_last_epochs(tmp_path):
    scores = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1])
    _, result = fit(tmp_path / "run", epochs=10, score=lambda outputs, targets: next(scores))
    assert result["best_epoch"] == 9 and result["val_score"] == 0.15
    assert [row["epoch"] for row in result["history"] if row["kept"]] == [1, 9]


def test_without_validation_the_last_epoch_is_kept(tmp_path, capsys):
    model, result = fit(tmp_path / "run", epochs=4, validate=False)
    best, last = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert result["best_epoch"] == best["epoch"] == 4 and result["val_score"] is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, last["average"][f"module.{name}"]), name
    assert "val" not in capsys.readouterr().out
    # And its state is one to go on from.
    _, again = fit(tmp_path / "run", epochs=4, validate=False, resume=True)
    assert [row["train_loss"] for row in again["history"]] == [row["train_loss"] for row in result["history"]]


def test_of_a_run_cut_short_the_best_so_far_is_kept(tmp_path):
    scores = iter([0.2, 0.9, 0.3, 0.1])

    class Stopped(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            if len(outputs) == 24 and (tmp_path / "run" / "history.csv").exists() and len((tmp_path / "run" / "history.csv").read_text().splitlines()) > 3:
                raise KeyboardInterrupt
            return super().forward(outputs, targets)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", epochs=20, score=lambda outputs, targets: next(scores), loss=Stopped())
    assert common.load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 2


def test_something_is_kept_although_every_score_is_negative(tmp_path):
    """Bug 13: best began at 0, so a score of 1 - loss was never saved while loss > 1."""
    _, result = fit(tmp_path / "run", epochs=2, score=lambda outputs, targets: -5.0)
    assert (tmp_path / "run" / "best.pt").exists() and result["val_score"] == -5.0


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_validation_runs_in_evaluation_mode_and_training_in_training_mode(tmp_path, mode):
    """Bug 4: train() called once, so dropout and batch norm stayed on in validation, or off later.

    In whichever mode the network comes: a checkpoint's network comes in evaluation mode, a new one in training mode.
    """
    model, seen = classifier().train(mode == "training"), []
    model.head[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    fit(tmp_path / "run", epochs=2, model=model)  # the averaged copy that is validated carries the hook too
    assert seen == ([True] * 3 + [False] * 3) * 2


def test_resume_gives_exactly_what_an_uninterrupted_run_gives(tmp_path):
    whole, result = fit(tmp_path / "whole", epochs=5)
    calls = iter(range(100))

    def stop_in_third_epoch(outputs, targets):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return common.genre_score([1 / 3] * 3)(outputs, targets)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", epochs=5, score=stop_in_third_epoch)
    resumed, again = fit(tmp_path / "parts", epochs=5, resume=True)
    assert [row["epoch"] for row in again["history"]] == [1, 2, 3, 4, 5]
    for key in ("train_loss", "val_loss", "val_score"):
        assert [row[key] for row in again["history"]] == [row[key] for row in result["history"]]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resume_of_another_run_is_refused(tmp_path):
    fit(tmp_path / "run", epochs=2)
    with pytest.raises(InputError, match="begun with --epochs 2"):
        fit(tmp_path / "run", epochs=3, resume=True)
    with pytest.raises(InputError, match="another model"):
        torch.manual_seed(0)
        other = Classifier(LSTMBackbone(6, hidden_size=4, n_layers=1), 3)
        fit(tmp_path / "run", epochs=2, model=other, resume=True)


def test_time_limit_ends_training_with_a_scored_epoch(tmp_path, capsys):
    _, result = fit(tmp_path / "run", epochs=50, max_seconds=0)
    assert result["epochs"] == 1 and result["out_of_time"] and "time is up" in capsys.readouterr().out


def test_nan_loss_names_epoch_batch_and_rate_and_keeps_the_best(tmp_path):
    steps = iter(range(1000))

    class Bad(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            loss = super().forward(outputs, targets)
            return loss * math.nan if next(steps) == 5 else loss  # 3 batches + 1 validation per epoch

    with pytest.raises(StepFailed, match=r"epoch 2, batch 2, learning rate"):
        fit(tmp_path / "run", loss=Bad())
    assert common.load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 1


def test_overfit_reaches_zero_loss_with_regularisation_off(tmp_path):
    common.seed_everything(0)
    model = classifier()
    result = common.train(model, DataLoader(clips(64), 8, shuffle=True), None, nn.CrossEntropyLoss(), None,
                          Recipe(epochs=1, lr=0.01), tmp_path / "run", {}, overfit_batch=True)  # fmt: skip
    assert result["loss"] < 0.01 and result["accuracy"] == 1
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))


def test_overfit_fails_where_nothing_can_be_learned(tmp_path):
    """Bug 9: the check stopped at a loss of .3 and passed. Equal inputs, unequal labels: must fail."""
    same = TensorDataset(torch.ones(16, 12, 6), torch.arange(16) % 3, torch.full((16,), 12))
    with pytest.raises(StepFailed, match="not learned by heart"):
        common.overfit(classifier(), DataLoader(same, 8), nn.CrossEntropyLoss(), Recipe(epochs=1, lr=0.01), tmp_path / "run", "cpu", limit=15)


def test_overfit_uses_four_batches_of_the_training_loader_only(tmp_path):
    """Bug 9: the check was run on the whole set."""
    fetched = []

    class Watched(TensorDataset):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

    data = clips(80)
    common.overfit(classifier(), DataLoader(Watched(*data.tensors), 8), nn.CrossEntropyLoss(), Recipe(epochs=1, lr=0.01), tmp_path / "run", "cpu")
    assert len(set(fetched)) <= 40  # 4 batches, and one that the loader had begun


def test_regression_output_and_target_shapes_cannot_broadcast():
    """Bug 1: (B, 1) against (B,) makes a (B, B) error that pulls every answer to the mean."""
    model = Regressor(LSTMBackbone(6, hidden_size=4, n_layers=1))
    for n in (1, 5):  # bug 11: squeeze() made a batch of one a scalar
        assert model(torch.randn(n, 12, 6), torch.full((n,), 12)).shape == (n,)
    with pytest.raises(ValueError, match="broadcast"):
        common.regression_loss(torch.zeros(5, 1), torch.zeros(5), 1.0)


def test_multitask_loss_is_the_sum_of_the_three_scaled_losses():
    torch.manual_seed(0)
    outputs, targets, std = torch.rand(9, 3), torch.rand(9, 3), [0.25, 0.5, 0.1]
    alone = [common.regression_loss(outputs[:, i], targets[:, i], std[i]) for i in range(3)]
    assert MultitaskLoss(std)(outputs, targets).item() == pytest.approx(sum(alone).item())


def test_windows_cover_the_clip_and_stay_inside():
    x = torch.arange(50.0).view(1, 50, 1).repeat(2, 1, 1)
    cut, lengths = common.cut_windows(x, torch.tensor([50, 20]), 16)
    cut = cut.view(2, -1, 16)
    assert set(cut[0].flatten().tolist()) == set(range(50)) and cut[1].max() == 19
    assert lengths.tolist() == [16] * len(lengths)


@pytest.mark.parametrize("n_clips, epochs, crops", [(8, 55, 3), (365, 55, 3), (1000, 60, 1), (1844, 33, 1), (20_000, 20, 1)])
def test_small_sets_get_more_passes_and_several_crops_per_epoch(n_clips, epochs, crops):
    assert common.plan_epochs(n_clips, 60_000, high=165) == (epochs, crops)
    assert common.plan_epochs(n_clips, 60_000, high=165, given=7) == (7, 1)


def test_a_rare_class_is_believed_a_little_earlier():
    logits = torch.tensor([[1.0, 0.9], [1.0, -2.0]])
    assert common.even_out(logits, [0.9, 0.1]).argmax(1).tolist() == [1, 0]
    equal = common.even_out(logits, [0.5, 0.5])
    torch.testing.assert_close(equal.log_softmax(1), logits.log_softmax(1))


def test_spearman_is_over_the_whole_set():
    """Bug 10: averaged over batches, or scipy called on an (N, 3) matrix."""
    rng = np.random.default_rng(0)
    targets, predictions = rng.random((60, 3)), rng.random((60, 3))
    scores = common.emotion_scores(targets, predictions)
    for i, axis in enumerate(common.EMOTIONS):
        assert scores[axis] == pytest.approx(spearmanr(targets[:, i], predictions[:, i]).statistic)
        assert scores[f"{axis}_ci95"][0] < scores[axis] < scores[f"{axis}_ci95"][1]
    assert scores["mean_spearman"] == pytest.approx(np.mean([scores[axis] for axis in common.EMOTIONS]))
    assert common.spearman(targets[:, 0], np.zeros(60)) == 0


def test_classification_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    scores = common.classification_scores(targets, predictions, list("abcd"))
    assert scores["macro_f1"] == pytest.approx(f1_score(targets, predictions, average="macro"))
    assert scores["macro_f1"] == pytest.approx(common.macro_f1(targets, predictions, 4))
    assert scores["micro_f1"] == pytest.approx(scores["accuracy"])
    low, high = scores["accuracy_ci95"]
    half = 1.96 * math.sqrt(scores["accuracy"] * (1 - scores["accuracy"]) / 200)  # normal approximation
    assert high - low == pytest.approx(2 * half, rel=0.15)


def test_checkpoint_rebuilds_the_model(tmp_path):
    model, _ = fit(tmp_path / "run", epochs=1)
    again, checkpoint = common.load_model(tmp_path / "run" / "best.pt")
    x, _, lengths = next(iter(DataLoader(clips(), 8)))
    assert torch.equal(model.eval()(x, lengths), again(x, lengths))
    assert checkpoint["settings"]["classes"] == list("abc")


@pytest.mark.parametrize("fault", ["truncated", "pickle", "empty", "other weights"])
def test_bad_checkpoint_is_one_clear_error(tmp_path, fault):
    fit(tmp_path / "run", epochs=1)
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


def test_test_split_is_read_only_after_training(tiny_data, tmp_path, monkeypatch):
    """Bug 3: test clips in training, or validation scores shown as test scores."""
    import step05_lstm

    order, read_array, train = [], common.read_array, common.train
    monkeypatch.setattr(common, "read_array", lambda path: order.append(path.parent.name) or read_array(path))
    monkeypatch.setattr(common, "train", lambda *args, **kw: (train(*args, **kw), order.append("trained"))[0])
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "cache"))
    arguments = ["--smoke", "--features", "beat_mel", "beat_chroma", "--data-dir", str(tiny_data), "--out-dir", str(tmp_path / "out")]
    step05_lstm.main(arguments)
    assert "test" in order and order.count("trained") == 2
    assert "test" not in order[: len(order) - 1 - order[::-1].index("trained")]


def test_same_seed_same_numbers_in_another_process(data_dir, tmp_path):
    results = []
    for attempt in ("a", "b"):
        run_script("step05_lstm.py", "--smoke", "--features", "beat_fused", "--data-dir", data_dir, "--out-dir", tmp_path / attempt)
        metrics = read_metrics(tmp_path / attempt / "step05_lstm")
        run = metrics["runs"]["beat_fused"]
        run.pop("train_seconds")
        results.append((run, (tmp_path / attempt / "step05_lstm" / "beat_fused" / "best.pt").read_bytes()))
    assert results[0] == results[1]


def test_step05_and_06_write_what_the_contract_says(tiny_data, tmp_path):
    run_script("step05_lstm.py", "--smoke", "--data-dir", tiny_data, "--out-dir", tmp_path)
    run_script("step06_eval.py", "--smoke", "--ensemble", "--data-dir", tiny_data, "--out-dir", tmp_path)
    lstms = {"mel", "beat_mel", "chroma", "beat_chroma", "fused", "beat_fused"}
    for step, names in (("step05_lstm", lstms), ("step06_eval", lstms | {"majority", "svm", "lstm_ensemble"})):
        folder = tmp_path / step
        metrics = read_metrics(folder)
        assert metrics["step"] == step and set(metrics["runs"]) == names
        for run in metrics["runs"].values():
            test = run["test"]
            assert {"accuracy", "macro_f1", "macro_precision", "macro_recall", "micro_f1", "accuracy_ci95", "macro_f1_ci95"} <= set(test)
            assert len(test["per_class"]) == 10
        summary = (folder / "summary.md").read_text()
        for picture in folder.glob("*.png"):
            assert picture.name in summary and picture.stat().st_size > 5000
        assert (folder / "args.json").exists() and not list(folder.rglob("*.tmp"))
    assert (tmp_path / "step05_lstm" / "mel" / "history.csv").read_text().startswith("epoch,lr,train_loss,val_loss,val_score")


def test_step05_overfit_batch(data_dir, tmp_path):
    result = run_script("step05_lstm.py", "--overfit-batch", "--features", "beat_mel", "--batch-size", "16", "--data-dir", data_dir, "--out-dir", tmp_path)
    assert "overfit 4 batches" in result.stdout
    check = read_metrics(tmp_path / "step05_lstm")["overfit"]["beat_mel"]
    assert check["loss"] < 0.01 and check["accuracy"] == 1


@pytest.mark.parametrize(("flags", "word"), [(["--epochs", "0"], "--epochs"), (["--subset", "1"], "--subset"),
                                             (["--lr", "-1"], "--lr"), (["--epoch", "3"], "--epoch")])  # fmt: skip
def test_flags_out_of_range_exit_with_2(flags, word, data_dir, tmp_path):
    result = run_script("step05_lstm.py", *flags, "--data-dir", data_dir, "--out-dir", tmp_path / "out", check=False)
    assert result.returncode == 2 and word in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_data_folder_is_one_line(tmp_path):
    result = run_script("step05_lstm.py", "--data-dir", tmp_path / "nowhere", "--out-dir", tmp_path / "out", check=False)
    assert_clean_error(result, "nowhere", "--data-dir")
