"""Training on a device that is not the CPU, without having one.

A stand-in for an accelerator: its tensors say that they lie elsewhere, compute on the CPU all
the same, and refuse to meet tensors of the CPU, as those of a GPU do. A tensor that was left
behind on the CPU, which no CPU run notices, fails here. Speed and half precision it cannot show.
Half precision and the scaling of the loss are shown on the CPU, by pretending that it computes
in them. What only a card can show is marked `cuda` and runs where there is one.
"""

import contextlib
import dataclasses
import math

import pytest
import torch
from conftest import assert_clean_error, patch_everywhere, run_forked, run_script, write_data_set
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, Subset, TensorDataset

import common
import patrec.batches
import patrec.errors
import patrec.flags
import patrec.labels
import patrec.machine
import patrec.recipes
import patrec.step

FAST_DTYPE = patrec.machine.fast_dtype  # before a test replaces it

pytestmark = pytest.mark.filterwarnings(
    "ignore:for .*copying from a non-meta parameter"
)  # the stand-in does copy
CARD = torch.device("meta")  # any device that is not the CPU and that every build of torch knows


class OnCard(torch.Tensor):
    """A tensor that says it is on CARD; its numbers are in `.inner`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=CARD
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """Within it, a tensor made on or sent to CARD is an OnCard."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """One operation, on the CPU; its result is where the operation would have put it."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    on_card = [isinstance(x, OnCard) for x in tensors]
    # As on a GPU: copies cross, indices may lie on the CPU, and so may single numbers.
    strays = [x for x in tensors if not isinstance(x, OnCard) and x.dim()]
    if any(on_card) and strays and name not in ("copy_", "index", "index_put_", "_index_put_impl_"):
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} with"
            f" {[tuple(x.shape) for x in strays]} left on the CPU"
        )
    plain_args, plain = tree_map(lambda x: x.inner if isinstance(x, OnCard) else x, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        plain["device"] = torch.device("cpu")
    result = func(*plain_args, **plain)
    if func._schema.is_mutable and name.endswith("_") and not name.startswith("_"):
        return args[0]  # in place
    there = (
        torch.device(device) == CARD
        if device is not None
        else any(on_card) and name != "_local_scalar_dense"
    )
    return tree_map(
        lambda x: (
            OnCard(x) if there and isinstance(x, torch.Tensor) and not isinstance(x, OnCard) else x
        ),
        result,
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Clips twice as long as a crop here, but not as long as the lab's: the stand-in is slow."""
    return write_data_set(
        tmp_path_factory.mktemp("data"), per_class=(4, 1), n_emotion=(2, 1), n_frames=(120, 150)
    )


@pytest.fixture(autouse=True)
def single_precision(request, monkeypatch):
    """The device is compared, not the format: a processor with bf16 would compute in it."""
    if request.node.get_closest_marker("cuda"):
        return
    patch_everywhere(monkeypatch, "fast_dtype", lambda device_type: torch.float32)


@pytest.fixture
def card(monkeypatch):
    # Inference mode hands operations on before they are taken apart into those that
    # `compute` knows.
    patch_everywhere(monkeypatch, "predict", torch.no_grad()(common.predict.__wrapped__))
    # Torch has no half precision for the stand-in, as for an Apple GPU.
    patch_everywhere(monkeypatch, "half_precision", lambda device: contextlib.nullcontext())
    with Card():
        yield CARD


def test_the_stand_in_refuses_a_tensor_left_on_the_cpu(card):
    x = torch.ones(3, device=card)
    assert (
        x.device == card
        and (x + x).sum().item() == 6
        and (x + torch.ones(3).to(card)).cpu().tolist() == [2, 2, 2]
    )
    for left_behind in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3) * x,
        lambda: torch.cat([x, torch.ones(1)]),
        lambda: x.add_(torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            left_behind()


def prepare(device, data_dir, name, head, quiet=False):
    """Network, data and loss, all as the steps make them; and the changes of batches.

    quiet : without dropout and changes of the input, whose random numbers devices draw
        differently
    """
    network = patrec.recipes.GENRE_NETWORKS[name]
    window = None if network.beat or network.plain else 64
    patrec.machine.seed_everything(0)
    n_clips = 12 if network.plain else 24  # the stand-in is slow where every frame is a step
    source = patrec.flags.Source(data_dir, seed=0, device=device, subset=n_clips)
    data = common.load_data(source, network.features, network.beat, crop=window)
    names = {"genre": data.names, "valence": ["valence"], "multitask": patrec.labels.EMOTIONS}[head]
    augment = patrec.recipes.make_augment(network, len(names) if head == "genre" else 0)
    if head != "genre":
        emotions = torch.rand(len(data.val.dataset), 3)
        for dataset in (data.val.dataset, data.train.dataset):
            dataset.targets = emotions[:, : len(names)]
        settings = data.settings | {"part": "emotion", "names": list(names)}
        mean, std = [0.5, 0.4, 0.5][: len(names)], [0.3, 0.2, 0.3][: len(names)]
        data = dataclasses.replace(data, names=names, mean=mean, std=std, settings=settings)
    backbone = common.make_backbone(network)
    if head == "genre":
        model = common.Classifier(backbone, len(names))
        loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    else:
        model = common.Regressor(backbone, names, data.mean, data.std)
        loss_fn = common.RegressionLoss(data.std, learned=head == "multitask")
    if quiet:
        augment = None
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, common.StripeMask):
                module.widest = 0
    return model, data, loss_fn, augment, window


def train_on(device, data_dir, folder, name, head, quiet=False, **options):
    """Two epochs and a prediction, all as the steps do it; the losses and what is predicted."""
    model, data, loss_fn, augment, window = prepare(device, data_dir, name, head, quiet)
    model, loss_fn = model.to(device), loss_fn.to(device)
    weights = [w for w in [*model.parameters(), *loss_fn.parameters()] if w.requires_grad]
    fused = device.type != CARD.type  # torch has no fused optimiser for the stand-in
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01, fused=fused)
    recipe = patrec.recipes.Recipe(epochs=2, lr=2e-3, batch_size=12, augment=augment, window=window)
    result = common.train(model, data, loss_fn, optimizer, recipe, folder, device=device, **options)
    loaded, _ = common.load_model(folder / "best.pt", device)  # what the next step finds
    assert all(value.device.type == device.type for value in loaded.state_dict().values())
    outputs, _ = common.predict(loaded, DataLoader(data.val, 12), device, window)
    return result.history["train_loss"].tolist(), outputs


@pytest.mark.parametrize(
    "name, head",
    [
        ("cnn_mel", "genre"),
        ("mel", "genre"),
        ("beat_fused", "genre"),
        ("plain_mel", "genre"),
        ("cnn_mel", "valence"),
        ("cnn_mel", "multitask"),
        ("fused", "multitask"),
    ],
)
def test_training_elsewhere_gives_what_the_cpu_gives(
    data_dir, tmp_path, monkeypatch, request, name, head
):
    losses, outputs = train_on(torch.device("cpu"), data_dir, tmp_path / "cpu", name, head)
    card = request.getfixturevalue("card")
    resident = []
    patch_everywhere(
        monkeypatch,
        "to_resident",
        lambda frames, device: resident.append(frames.to(device)) or resident[-1],
    )  # as where it fits
    losses_there, outputs_there = train_on(card, data_dir, tmp_path / "card", name, head)
    assert isinstance(resident[0], OnCard) and not isinstance(outputs_there, OnCard)
    assert losses_there == pytest.approx(losses, rel=1e-3) and all(map(math.isfinite, losses))
    assert torch.allclose(outputs_there, outputs, rtol=1e-2, atol=1e-3), (
        (outputs_there - outputs).abs().max()
    )


def test_batches_are_cut_on_the_cpu_where_the_clips_stay_there(data_dir, tmp_path, request):
    """Clips too many for the device: each batch is copied, and the numbers are the same."""
    losses, outputs = train_on(torch.device("cpu"), data_dir, tmp_path / "cpu", "cnn_mel", "genre")
    card = request.getfixturevalue("card")
    losses_there, outputs_there = train_on(card, data_dir, tmp_path / "card", "cnn_mel", "genre")
    assert losses_there == pytest.approx(losses, rel=1e-3)
    assert torch.allclose(outputs_there, outputs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "name, head", [("cnn_mel", "genre"), ("mel", "valence"), ("cnn_mel", "multitask")]
)
def test_four_batches_are_learned_elsewhere(card, data_dir, name, head):
    """Whether it runs is asked, not how well: two passes are enough."""
    model, data, loss_fn, *_ = prepare(card, data_dir, name, head)
    check = common.overfit(model, data, loss_fn, batch_size=12, device=card, limit=2)
    assert check.facts["passes"] == 2 and math.isfinite(check.facts["loss"])


# --- what a card decides, on a processor ------------------------------------------------


class Frames:
    """Frames of a given size that say where they were moved to."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def to(self, device):
        return torch.device(device).type


@pytest.mark.parametrize(
    "device, nbytes, moved",
    [("cuda", 499, True), ("cuda", 501, False), ("cpu", 1, False), ("mps", 1, False)],
)
def test_clips_move_to_the_card_where_they_fit_in_half_of_its_free_memory(
    monkeypatch, device, nbytes, moved
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 8000))
    frames = Frames(nbytes)
    assert patrec.batches.to_resident(frames, device) == (device if moved else frames)


class BrokenCard(TorchFunctionMode):
    """What is made on a card fails, as on one that torch has no code for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.device((kwargs or {}).get("device") or "cpu").type == "cuda":
            raise RuntimeError(
                "CUDA error: no kernel image is available for execution on the device\nmore lines"
            )
        return func(*args, **(kwargs or {}))


def test_a_card_that_is_there_and_cannot_compute_is_not_believed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with BrokenCard():
        assert patrec.machine.pick_device("auto") == torch.device("cpu")
        assert "no kernel image" in capsys.readouterr().err
        with pytest.raises(
            patrec.errors.InputError, match="no kernel image.*--device cpu"
        ) as error:
            patrec.machine.pick_device("cuda")
    assert "\n" not in str(error.value)


def test_a_card_that_is_not_there_is_an_input_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(patrec.errors.InputError, match="--device cuda.*finds none.*--device cpu"):
        patrec.machine.pick_device("cuda")


@contextlib.contextmanager
def formats_seen():
    """Formats that convolutions, LSTMs and linear layers answer in: {training or not: formats}."""
    seen = {True: set(), False: set()}

    def look(module, _, output):
        if isinstance(module, nn.Conv2d | nn.LSTM | nn.Linear):
            seen[module.training].add((output[0] if isinstance(output, tuple) else output).dtype)

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "name, head", [("cnn_mel", "genre"), ("mel", "genre"), ("cnn_mel", "multitask")]
)
def test_half_precision_is_used_where_it_is_fast_and_nowhere_else(
    data_dir, tmp_path, monkeypatch, name, head
):
    """In training and scoring; losses, weights and answers stay single, and about the same."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        patch_everywhere(monkeypatch, "fast_dtype", lambda device_type, dtype=dtype: dtype)
        with formats_seen() as seen:
            losses, outputs = train_on(
                torch.device("cpu"), data_dir, tmp_path / str(dtype), name, head
            )
        assert seen == {True: {dtype}, False: {dtype}}
        assert outputs.dtype == torch.float32
        state = common.load_checkpoint(tmp_path / str(dtype) / "best.pt")["state"]
        assert all(
            value.dtype == torch.float32 for value in state.values() if value.is_floating_point()
        )
        results[dtype] = losses, outputs
    (losses, outputs), (half_losses, half_outputs) = results.values()
    assert half_losses == pytest.approx(losses, rel=0.05) and half_losses != losses
    assert (half_outputs - outputs).abs().max() < 0.1 * max(1.0, outputs.abs().max().item())


class Scaler:
    """A GradScaler that writes down what is asked of it."""

    made = []

    def __init__(self, device="cuda", enabled=True, **_):
        self.enabled, self.events, self.factor, self.restored = enabled, [], 1024.0, None
        Scaler.made.append(self)

    def scale(self, loss):
        self.events.append("scale")
        return loss * self.factor

    def unscale_(self, optimizer):
        self.events.append("unscale")
        for group in optimizer.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    weights.grad /= self.factor

    def step(self, optimizer):
        self.events.append("step")
        optimizer.step()

    def update(self):
        self.events.append("update")

    def state_dict(self):
        return {"scale": self.factor, "steps": len(self.events)}

    def load_state_dict(self, state):
        self.restored = state


class TinyBackbone(nn.Module):
    """Mean over time and a linear layer."""

    def __init__(self):
        super().__init__()
        self.config, self.feature_size, self.layer = {}, 4, nn.Linear(5, 4)

    def forward(self, x, lengths):
        return self.layer(x.float().mean(1)).float()


def tiny_training(folder, epochs=3, **options):
    """Train a tiny classifier in 4 steps an epoch; its loss curve and weights."""
    patrec.machine.seed_everything(1)
    model = common.Classifier(TinyBackbone(), 3)
    x, lengths = torch.randn(16, 6, 5), torch.full((16,), 6)
    part = Subset(TensorDataset(x, torch.arange(16) % 3, lengths), list(range(16)))
    settings = {"part": "genre", "names": list("abc"), "priors": [1 / 3] * 3}
    data = common.Data(part, part, part, list("abc"), None, None, settings)
    recipe = patrec.recipes.Recipe(epochs=epochs, lr=0.05, batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.01, fused=True)
    result = common.train(model, data, nn.CrossEntropyLoss(), optimizer, recipe, folder, **options)
    return result.history["train_loss"].tolist(), model.state_dict()


def test_the_loss_is_scaled_for_float16_and_gradients_clipped_after_unscaling(
    tmp_path, monkeypatch
):
    """In this order, else scaled gradients are clipped to nothing or tiny ones are lost.

    And a resumed training goes on with the scale where it was.
    """
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    patch_everywhere(
        monkeypatch, "half_precision", lambda device: contextlib.nullcontext()
    )  # a processor is slow in float16
    losses, weights = tiny_training(tmp_path / "float32")
    assert Scaler.made and not Scaler.made[-1].enabled
    patch_everywhere(monkeypatch, "fast_dtype", lambda device_type: torch.float16)
    clip = nn.utils.clip_grad_norm_

    def clip_noted(parameters, limit, *args, **options):
        Scaler.made[-1].events.append("clip")
        return clip(parameters, limit, *args, **options)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip_noted)
    scaled_losses, scaled_weights = tiny_training(tmp_path / "float16")
    scaler = Scaler.made[-1]
    assert scaler.enabled and scaler.events == ["scale", "unscale", "clip", "step", "update"] * 12
    # A factor of 2^10 is taken off again without a trace.
    assert scaled_losses == losses and all(
        torch.equal(scaled_weights[key], weights[key]) for key in weights
    )
    tiny_training(tmp_path / "float16", resume=True)
    assert Scaler.made[-1].restored == {"scale": 1024.0, "steps": 60}


def test_random_numbers_of_the_card_go_on_where_they_were(tmp_path, monkeypatch):
    """The state after an epoch is kept, and set again when going on."""
    epoch, restored = [0], []

    def state(*_):
        epoch[0] += 1
        return torch.full((16,), epoch[0], dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", state)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state()])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, *_: restored.append(value))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda values: restored.extend(values))
    tiny_training(tmp_path / "run", max_seconds=0)
    assert epoch[0] == 1 and not restored
    tiny_training(tmp_path / "run", resume=True)
    assert len(restored) == 1 and (restored[0] == 1).all() and epoch[0] == 3


def full(module, x, *_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_out_of_memory_is_one_line_with_advice(data_dir, tmp_path, monkeypatch):
    usual = nn.LSTM.forward
    monkeypatch.setattr(
        nn.LSTM, "forward", lambda self, x: (full if len(x) > 4 else usual)(self, x)
    )
    flags = ["--smoke", "--features", "beat_mel", "--batch-size", 8, "--data-dir", data_dir]
    result = run_forked("step05_lstm.py", *flags, "--out-dir", tmp_path, check=False)
    assert_clean_error(result, "out of memory", "8 clips", "--batch-size 4", code=1)
    assert not (tmp_path / "step05_lstm" / "metrics.json").exists()


@pytest.mark.parametrize("kept", [0, 1])
def test_out_of_memory_while_training_is_said_and_what_was_trained_is_kept(
    tmp_path, monkeypatch, kept
):
    """Other programs may take the card's memory at any time."""
    usual, calls = TinyBackbone.forward, iter(range(100))
    per_epoch = 4 + 4  # batches of training and of validation
    monkeypatch.setattr(
        TinyBackbone,
        "forward",
        lambda *args: (full if next(calls) > kept * per_epoch else usual)(*args),
    )
    with pytest.raises(patrec.errors.StepFailed, match="batches of 4 clips; try --batch-size 2"):
        tiny_training(tmp_path / "run")
    assert (tmp_path / "run" / "best.pt").exists() == bool(kept)


# --- on a card --------------------------------------------------------------------------

ON_CARD = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card here"),
]


def on_card(test):
    for mark in ON_CARD:
        test = mark(test)
    return test


@pytest.fixture
def cuda(monkeypatch):
    """The card, computing the same numbers each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


NETWORKS = [("cnn_mel", "genre"), ("mel", "genre"), ("beat_mel", "genre"), ("cnn_mel", "multitask")]


@on_card
@pytest.mark.parametrize("name, head", NETWORKS)
def test_a_card_trains_as_the_cpu_does(cuda, data_dir, tmp_path, monkeypatch, name, head):
    patch_everywhere(monkeypatch, "fast_dtype", lambda device_type: torch.float32)
    losses, outputs = train_on(
        torch.device("cpu"), data_dir, tmp_path / "cpu", name, head, quiet=True
    )
    losses_there, outputs_there = train_on(
        cuda, data_dir, tmp_path / "card", name, head, quiet=True
    )
    assert losses_there == pytest.approx(losses, rel=0.01)
    assert (outputs_there - outputs).abs().max() < 0.05 * max(1.0, outputs.abs().max().item())


@on_card
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, head", NETWORKS)
def test_half_precision_on_a_card_learns_as_single_precision_does(
    cuda, data_dir, tmp_path, monkeypatch, name, head, dtype
):
    losses = {}
    for kind in (torch.float32, dtype):
        patch_everywhere(monkeypatch, "fast_dtype", lambda device_type, kind=kind: kind)
        with formats_seen() as seen:
            losses[kind], outputs = train_on(
                cuda, data_dir, tmp_path / str(kind), name, head, quiet=True
            )
        assert seen == {True: {kind}, False: {kind}} and outputs.isfinite().all()
    assert losses[dtype] == pytest.approx(losses[torch.float32], rel=0.05)


@on_card
def test_batches_are_cut_on_the_card(cuda, data_dir):
    data = common.load_data(patrec.flags.Source(data_dir, seed=0, device=cuda), crop=64)
    x, _, _ = next(iter(DataLoader(data.train, 8, shuffle=True)))
    assert data.train.dataset.store.frames.is_cuda and x.is_cuda


@on_card
@pytest.mark.parametrize("name, head", NETWORKS)
def test_resumed_on_a_card_is_uninterrupted_to_the_last_bit(cuda, data_dir, tmp_path, name, head):
    whole = train_on(cuda, data_dir, tmp_path / "whole", name, head)
    train_on(cuda, data_dir, tmp_path / "parts", name, head, max_seconds=0)  # one epoch
    resumed = train_on(cuda, data_dir, tmp_path / "parts", name, head, resume=True)
    assert resumed[0] == whole[0] and torch.equal(resumed[1], whole[1])


@on_card
@pytest.mark.parametrize("script", ["step05_lstm.py", "step07_cnn.py", "step10_multitask.py"])
def test_four_batches_are_learned_by_heart_on_a_card(data_dir, tmp_path, script):
    data = write_data_set(tmp_path / "data", per_class=(6, 2), n_emotion=(40, 6))
    run_script(
        script, "--overfit-batch", "--device", "cuda", "--data-dir", data, "--out-dir", tmp_path
    )


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_bfloat16_only_on_cards_that_compute_in_it(monkeypatch, capability, dtype):
    """A T4 (7.5) says that it supports bfloat16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert FAST_DTYPE("cuda") == dtype


def test_the_loss_gets_single_precision(tmp_path, monkeypatch):
    """Logarithms and sums over a batch of half numbers would be off."""
    patch_everywhere(monkeypatch, "fast_dtype", lambda device_type: torch.bfloat16)
    seen = set()

    class Noting(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            seen.add(outputs.dtype)
            return super().forward(outputs, targets)

    monkeypatch.setattr(nn, "CrossEntropyLoss", Noting)
    tiny_training(tmp_path / "run", epochs=1)
    assert seen == {torch.float32}
