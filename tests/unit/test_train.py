"""train, its checks and checkpoints, on toy clips: what public solutions got wrong is held here."""

import contextlib
import itertools
import math
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import patch_everywhere
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import common
from common import Classifier, LSTMBackbone
from patrec.errors import InputError, StepFailed
from patrec.machine import seed_everything
from patrec.recipes import GENRE_NETWORKS, Recipe


def clips(n=24, n_frames=12, n_bands=6, n_classes=3, seed=0):
    """(x, target, length) batches in which the loudest band tells the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % n_classes
    x = 0.3 * torch.randn(n, n_frames, n_bands, generator=generator)
    x[torch.arange(n), :, targets] += 2
    return TensorDataset(x, targets, torch.full((n,), n_frames))


def classifier(hidden_size=8):
    torch.manual_seed(0)
    return Classifier(LSTMBackbone(6, hidden_size=hidden_size, n_layers=1), 3)


def toy_data(tensors, train=None, val=None):
    """Training and validation part are all clips, unless rows are named."""
    rows, names = list(range(len(tensors))), list("abc")
    settings = {"part": "genre", "names": names, "seed": 42}
    parts = (Subset(tensors, rows if part is None else part) for part in (train, val, []))
    return common.Data(*parts, names, None, None, settings)


def train(folder, epochs=4, model=None, data=None, loss=None, recipe=None, optimizer=None, **more):
    """Train on the toy clips; returns (model, TrainedModel)."""
    seed_everything(3)
    model = model or classifier()
    recipe = Recipe(**{"lr": 0.02, "batch_size": 8, "epochs": epochs} | (recipe or {}))
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=recipe.lr)
    data = data if isinstance(data, common.Data) else toy_data(data or clips())
    loss = loss or nn.CrossEntropyLoss()
    return model, common.train(model, data, loss, optimizer, recipe, folder, **more)


def val_score(result):
    return result.facts["val"]["macro_f1"]


@pytest.fixture
def scored(monkeypatch):
    """Function: these are the validation scores of the epochs; an exception stops the training."""
    name = "validation_score"
    return lambda scores: patch_everywhere(monkeypatch, name, Mock(side_effect=scores))


def load_both(folder):
    """best.pt and last.pt of a run."""
    return [common.load_torch(folder / name) for name in ("best.pt", "last.pt")]


def test_learns_and_returns_the_best_epoch(tmp_path):
    model, result = train(tmp_path / "run", epochs=8)
    assert val_score(result) > 0.9 and result.model is model
    outputs, targets = common.predict(model, DataLoader(clips(), 8))
    again = common.validation_score(outputs, targets, result.settings)
    assert again == pytest.approx(val_score(result))


def test_an_early_peak_does_not_win_against_the_last_epochs(tmp_path, scored):
    """Bug 7: 'best' was an alias of the live model, or overwritten by the last one."""
    scored([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1])
    model, result = train(tmp_path / "run", epochs=10, recipe={"batch_size": 24})
    assert result.history.query("kept == 1")["epoch"].tolist() == [1, 9]
    best, last = load_both(tmp_path / "run")
    assert result.facts["best_epoch"] == best["epoch"] == 9 and val_score(result) == 0.15
    key = "head.1.weight"
    assert torch.equal(model.state_dict()[key], best["state"][key])
    assert not torch.equal(best["state"][key], last["average"][f"module.{key}"])
    scored([0.9, 0.1])  # of a few epochs a fifth is less than one: the last epoch is kept
    assert train(tmp_path / "short", epochs=2)[1].facts["best_epoch"] == 2


def test_of_equal_scores_the_smaller_loss_is_kept(tmp_path, scored):
    """On few validation clips many epochs have the same macro-F1."""
    scored([0.5] * 8)
    recipe = {"settled": 1.0, "lr": 0.5}
    history = train(tmp_path / "run", epochs=8, recipe=recipe)[1].history
    lowest_before = history["val_loss"].cummin().shift(fill_value=math.inf)
    assert (history["kept"] == (history["val_loss"] < lowest_before)).all()
    assert 1 < history["kept"].sum() < 8, "the loss is not always lower, else this tells nothing"


def test_when_time_is_up_an_epoch_is_kept_even_of_negative_score(tmp_path, scored, capsys):
    """Bug 13: best began at 0, so a score of 1 - loss was never saved while loss > 1."""
    scored([-5.0])
    _, result = train(tmp_path / "run", epochs=50, max_seconds=0)
    assert (tmp_path / "run" / "best.pt").exists() and val_score(result) == -5.0
    assert result.facts["epochs"] == 1 and result.facts["planned_epochs"] == 50
    assert "time is up" in capsys.readouterr().out


def test_no_epoch_begins_that_would_end_after_the_time_limit(tmp_path, monkeypatch):
    """Epochs of 10 s: of 25 s, two are used."""
    clock = SimpleNamespace(now=0, monotonic=lambda: clock.now)

    def score(*_):
        clock.now += 10
        return 0.5

    monkeypatch.setattr(common, "time", clock)
    patch_everywhere(monkeypatch, "validation_score", score)
    assert train(tmp_path / "run", max_seconds=25)[1].facts["epochs"] == 2


def test_best_checkpoint_rebuilds_the_model_with_the_averaged_weights(tmp_path):
    model = Classifier(LSTMBackbone(6, hidden_size=4, frames_per_step=2), 3)
    train(tmp_path / "run", epochs=1, model=model, recipe={"batch_size": 2})  # 12 steps
    best, last = load_both(tmp_path / "run")
    for key, value in best["state"].items():  # statistics of batches are averaged too
        assert torch.equal(value, last["average"][f"module.{key}"]), key
    for key in ("head.1.weight", "backbone.stem.0.running_mean"):
        assert not torch.equal(best["state"][key], last["model"][key])
    again, checkpoint = common.load_model(tmp_path / "run" / "best.pt")
    x, _, lengths = next(iter(DataLoader(clips(), 8)))
    assert torch.equal(model.eval()(x, lengths), again(x, lengths))
    assert checkpoint["settings"]["names"] == list("abc")
    best["spec"]["backbone_args"]["hidden_size"] = 9
    torch.save(best, tmp_path / "run" / "best.pt")
    with pytest.raises(InputError, match="best.pt: .* do not fit .* train again"):
        common.load_model(tmp_path / "run" / "best.pt")


@pytest.mark.parametrize("mode", [True, False])
def test_validation_runs_in_evaluation_mode_and_training_in_training_mode(tmp_path, mode):
    """Bug 4: train() called once: dropout and batch norm stayed on in validation, or off later."""
    model, seen = classifier().train(mode), []
    model.head[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    train(tmp_path / "run", epochs=2, model=model)
    assert seen == ([True] * 3 + [False] * 3) * 2  # the copy that is validated has the hook too


class Watched(TensorDataset):
    """Clips that note which of them are fetched."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.shown = []

    def __getitem__(self, index):
        self.shown.append(index)
        return super().__getitem__(index)


def test_training_clips_are_shown_as_often_as_planned_and_validation_clips_validate(tmp_path):
    watched, val = Watched(*clips(24).tensors), [16, 20, 23]
    data = toy_data(watched, train=list(range(15)), val=val)
    facts = train(tmp_path / "run", epochs=2, data=data, recipe={"crops": 2})[1].facts
    assert (facts["n_train"], facts["n_val"], facts["examples_per_epoch"]) == (15, 3, 30)
    epochs = watched.shown[:33], watched.shown[33:]
    for epoch in epochs:  # two crops of each clip, then the validation part
        assert sorted(epoch[:30]) == sorted([*range(15)] * 2) and epoch[30:] == val
    assert epochs[0] != epochs[1]  # each time in another order


class MeanOutput(nn.Module):
    """A loss of gradient `scale` at every step: Adam moves a weight by about the learning rate."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, outputs, targets):
        assert outputs.dtype == torch.float32, "sums over a batch of half numbers would be off"
        return self.scale * (outputs if outputs.dim() == 1 else outputs[:, 0]).mean()


def test_gradients_of_a_step_are_its_own_and_the_loss_gets_single_precision(tmp_path):
    """Never set to zero, they would add up from step to step."""
    model, seen = classifier(), []
    model.head.register_forward_hook(lambda module, x, output: output.bfloat16())
    optimizer, bias = torch.optim.Adam(model.parameters(), lr=0.02), model.head[1].bias
    optimizer.register_step_pre_hook(lambda *_: seen.append(bias.grad[0].item()))
    loss = MeanOutput(1e-3)
    train(tmp_path / "run", epochs=2, model=model, loss=loss, optimizer=optimizer)
    assert seen == pytest.approx([1e-3] * 6, rel=0.02)


class OneWeight(nn.Module):
    """A network that predicts its one weight, so that every step of it can be followed."""

    def __init__(self):
        super().__init__()
        self.backbone, self.config = nn.Identity(), {}
        self.backbone.config = {}
        self.weight = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, lengths):
        return self.weight * x[:, 0, 0]


@pytest.mark.parametrize("n_steps, decay", [(4, 1 - 10 / 40), (120, 0.99)])  # in an epoch
def test_the_rate_is_constant_and_the_average_is_validated(tmp_path, monkeypatch, n_steps, decay):
    """In a short run the average must forget its start too: decay at most 1 - 10 / steps."""
    weights, validated = [], []
    ones = torch.ones(n_steps)
    data = toy_data(TensorDataset(ones[:, None, None], torch.zeros(n_steps), ones.long()))

    def score(outputs, *_):
        validated.append(outputs[0].item())
        return 0.0

    def note(optimizer, *_):
        weights.append((model.weight.item(), optimizer.param_groups[0]["lr"]))

    patch_everywhere(monkeypatch, "validation_score", score)
    model, recipe = OneWeight(), {"lr": 0.1, "batch_size": 1}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(note)
    train(tmp_path / "run", 10, model, data, MeanOutput(), recipe, optimizer)
    weights, rates = zip(*weights, strict=True)
    assert rates == (0.1,) * 10 * n_steps
    average = itertools.accumulate(weights, lambda mean, w: decay * mean + (1 - decay) * w)
    np.testing.assert_allclose(validated, list(average)[n_steps - 1 :: n_steps], rtol=1e-3)


def test_nan_loss_names_epoch_and_batch_and_keeps_the_best(tmp_path):
    calls = iter(range(1000))

    class Bad(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            factor = math.nan if next(calls) == 5 else 1  # 3 batches + 1 validation per epoch
            return super().forward(outputs, targets) * factor

    with pytest.raises(StepFailed, match="epoch 2, batch 2; .* try a smaller --lr"):
        train(tmp_path / "run", loss=Bad())
    assert common.load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 1


def test_resume_gives_exactly_what_an_uninterrupted_run_gives(tmp_path, scored):
    scored([1, 2, 3, 4, 5])
    whole, result = train(tmp_path / "whole", epochs=5)
    scored([1, 2, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", epochs=5)
    scored([3, 4, 5])
    resumed, again = train(tmp_path / "parts", epochs=5, resume=True)
    columns = ["epoch", "train_loss", "val_loss", "val_score", "settled", "kept"]
    assert again.history[columns].equals(result.history[columns])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    state = (tmp_path / "parts" / "last.pt").read_bytes()  # it is finished, and stays as it is
    assert train(tmp_path / "parts", epochs=5, resume=True)[1].history.equals(again.history)
    assert (tmp_path / "parts" / "last.pt").read_bytes() == state


def test_of_an_interrupted_run_the_best_epoch_is_kept_also_when_resumed(tmp_path, scored):
    scored([0.5, 0.9, 0.6, KeyboardInterrupt])
    folder, recipe = tmp_path / "run", {"settled": 1.0}
    with pytest.raises(KeyboardInterrupt):
        train(folder, recipe=recipe)
    assert common.load_checkpoint(folder / "best.pt")["epoch"] == 2
    assert len((folder / "history.csv").read_text().splitlines()) == 1 + 3
    scored([0.7])
    _, result = train(folder, recipe=recipe, resume=True)
    assert result.history["kept"].tolist() == [1, 1, 0, 0]
    assert result.facts["best_epoch"] == 2 and val_score(result) == 0.9


def test_resume_of_another_run_is_refused(tmp_path):
    train(tmp_path / "run", epochs=2)
    with pytest.raises(InputError, match="begun with --epochs 2"):
        train(tmp_path / "run", epochs=3, resume=True)
    with pytest.raises(InputError, match="begun with --epochs 2 --lr 0.02.* now .* --lr 0.01"):
        train(tmp_path / "run", epochs=2, recipe={"lr": 0.01}, resume=True)
    with pytest.raises(InputError, match="not the state of this model's training"):
        train(tmp_path / "run", epochs=2, model=classifier(hidden_size=4), resume=True)
    with pytest.raises(InputError, match=r"other clips or another --seed \(seed differ\)"):
        other = toy_data(clips())
        other.settings["seed"] = 43
        train(tmp_path / "run", epochs=2, data=other, resume=True)
    torch.save({"model": {}}, tmp_path / "run" / "last.pt")
    with pytest.raises(InputError, match="last.pt: not the state of this model's training"):
        train(tmp_path / "run", epochs=2, resume=True)


def test_a_run_begun_anew_and_killed_at_once_is_not_resumed_as_the_old_one(tmp_path, scored):
    """The old run's checkpoint stays until the new one has one, and is not taken for finished."""
    folder = tmp_path / "run"
    train(folder, epochs=2)
    assert not (folder / common.UNFINISHED).exists()
    scored([KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        train(folder, epochs=2)
    assert common.load_checkpoint(folder / "best.pt")["epoch"]
    assert not (folder / "last.pt").exists() and (folder / common.UNFINISHED).exists()


def test_overfit_learns_four_batches_by_heart_without_regularisation(tmp_path, monkeypatch):
    """Of training clips. Bug 9: the check was run on the whole set."""
    watched, shifts, rates = Watched(*clips(80).tensors), [], []
    patch_everywhere(monkeypatch, "shift_bands", lambda x, furthest: shifts.append(furthest) or x)
    model = Classifier(LSTMBackbone(6, hidden_size=8), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    data = toy_data(watched, train=list(range(60)))
    _, check = train(None, 300, model, data, optimizer=optimizer, overfit_batch=True)
    assert 32 <= len(set(watched.shown)) <= 40  # 4 batches, and one that the loader had begun
    assert max(watched.shown) < 60  # the other clips validate or are held out
    assert check.learned and check.facts["loss"] < 0.01 and check.facts["accuracy"] == 1
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    assert not shifts
    train(tmp_path / "run", epochs=1)
    assert shifts == [2] * 3  # in a training all batches are shifted
    assert check.history["loss"].tolist()[-1] == check.facts["loss"]
    assert check.facts["passes"] == len(check.history)
    assert (check.facts["batches"], check.facts["clips"]) == (4, 32)
    assert rates == [0.01] * 4 * len(check.history)  # a constant rate


def test_overfit_fails_where_nothing_can_be_learned():
    """Bug 9: the check stopped at a loss of .3 and passed. Equal inputs, unequal labels: fails."""
    same = TensorDataset(torch.ones(16, 12, 6), torch.arange(16) % 3, torch.full((16,), 12))
    _, check = train(None, 15, data=same, overfit_batch=True)
    assert not check.learned and check.facts["passes"] == 15 and check.facts["loss"] > 0.3


def test_all_regressors_must_learn_by_heart(tiny_data, tmp_path, make_step, monkeypatch):
    """In steps 8 and 10 there are two, of which the first may fail."""
    facts, history = {"passes": 1, "loss": 0.5}, pd.DataFrame({"pass": [1], "loss": [0.5]})
    checks = (common.OverfitCheck(learned, facts, history) for learned in (False, True))
    data = SimpleNamespace(names=["valence"], mean=[0.5], std=[0.2])
    patch_everywhere(monkeypatch, "load_data", lambda *args, **options: data)
    patch_everywhere(monkeypatch, "train", lambda *args, **options: next(checks))
    step = make_step(tiny_data, tmp_path, "--overfit-batch")
    runs = {name: (GENRE_NETWORKS[name], "valence") for name in ("mel", "cnn_mel")}
    with pytest.raises(StepFailed, match="not learned by heart"):
        common.overfit_emotions(step, runs)


class Scaler(torch.amp.GradScaler):
    """Torch's own, on the CPU, that writes down what is asked of it."""

    made = []

    def __init__(self, device, enabled):
        super().__init__("cpu", init_scale=1024.0, enabled=enabled)
        self.events, self.enabled = [], enabled
        Scaler.made.append(self)


def test_the_loss_is_scaled_for_float16(tmp_path, monkeypatch):
    """In this order, else tiny gradients are lost. A resumed training goes on with its scale."""

    def note(name, function):
        def noted(scaler, *args, **options):
            scaler.events.append(name)
            return function(scaler, *args, **options)

        monkeypatch.setattr(Scaler, name, noted)

    order = ["scale", "step", "update"]
    for name in order:
        note(name, getattr(Scaler, name))
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    # A processor is slow in float16.
    patch_everywhere(monkeypatch, "half_precision", lambda device: contextlib.nullcontext())
    results = []
    for dtype in (torch.float32, torch.float16):
        patch_everywhere(monkeypatch, "fast_dtype", lambda device_type, dtype=dtype: dtype)
        results.append(train(tmp_path / str(dtype))[1])
        assert Scaler.made[-1].enabled == (dtype == torch.float16)
        assert Scaler.made[-1].events == order * 12
    # A factor of 2^10 is taken off again without a trace.
    assert results[0].history["train_loss"].equals(results[1].history["train_loss"])
    path = tmp_path / "torch.float16" / "last.pt"
    state = common.load_torch(path)
    state["scaler"]["scale"] = 512.0
    torch.save(state, path)
    train(path.parent, resume=True)
    assert Scaler.made[-1].get_scale() == 512.0


def test_out_of_memory_is_one_line_and_what_was_trained_is_kept(tmp_path, monkeypatch):
    """Other programs may take the card's memory at any time."""
    usual, calls = Classifier.forward, iter(range(100))

    def forward(*args):
        if next(calls) >= 7:  # in the second epoch: one is 3 batches, and 3 to validate
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return usual(*args)

    monkeypatch.setattr(Classifier, "forward", forward)
    for options in ({}, {"overfit_batch": True}):
        with pytest.raises(StepFailed, match="batches of 8 clips; try --batch-size 4"):
            train(tmp_path / "run", **options)
        assert (tmp_path / "run" / "best.pt").exists()


GENRE = {"part": "genre", "names": ["a", "b"], "window": None}


class FirstBands(nn.Module):
    """Predicts the first two values of a clip, averaged over its frames."""

    def forward(self, x, lengths):
        return x[:, :, :2].mean(1)


def test_windows_of_a_clip_are_averaged():
    """Windows of 4 in clips of 10, side by side: 0-3, 3-6, 6-9. The model is in evaluation mode."""
    x = torch.stack([torch.arange(10.0), 100 + torch.arange(10.0) ** 2])[:, :, None].repeat(1, 1, 2)
    loader, model = [(x, torch.tensor([0, 1]), torch.tensor([10, 10]))], FirstBands()
    outputs, _ = common.predict(model, loader, window=4)
    first = np.mean([1.5, 4.5, 7.5])
    second = 100 + np.mean([14 / 4, (9 + 16 + 25 + 36) / 4, (36 + 49 + 64 + 81) / 4])
    np.testing.assert_allclose(outputs[:, 0], [first, second], rtol=1e-6)
    assert not model.training


def test_each_clip_gets_its_own_answer():
    n = 150  # more than two batches
    x = torch.stack([-torch.arange(n) / 10, -torch.arange(n).flip(0) / 10], dim=1)[:, None]
    names = [str(1000 - i) for i in range(n)]
    data = TensorDataset(x, torch.zeros(n).long(), torch.ones(n).long())
    data.store = SimpleNamespace(entries=[SimpleNamespace(clip_id=name) for name in names])
    answers = common.predict_clips(FirstBands(), data, GENRE)
    assert list(answers.index) == names and list(answers.columns) == ["a", "b"]
    np.testing.assert_allclose(answers, x[:, 0].log_softmax(1), atol=1e-4)


def test_the_validation_score_is_macro_f1():
    logits = torch.tensor([[1.0, 0.9], [3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    score = common.validation_score(logits, torch.tensor([0, 0, 0, 1]), GENRE)
    assert score == pytest.approx((6 / 7 + 0) / 2)


def test_the_validation_score_of_emotions_is_the_mean_of_their_own_correlations():
    """One in the right order, one reversed and far higher: taken together both would look right."""
    targets = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    outputs = torch.tensor([[0.1, 0.7], [0.2, 0.8], [0.3, 0.9]])
    settings = {"part": "emotion", "names": ["valence", "energy"]}
    assert common.validation_score(outputs, targets, settings) == pytest.approx(0)
