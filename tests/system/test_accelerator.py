"""Training on a device that is not the CPU, without having one.

A stand-in for an accelerator: its tensors say that they lie elsewhere, compute on the CPU all
the same, and refuse to meet tensors of the CPU, as those of a GPU do. A tensor that was left
behind on the CPU, which no CPU run notices, fails here. Speed and half precision it cannot show.
Half precision is shown on the CPU, by pretending that it computes in it. What only a card can
show is marked `cuda` and runs where there is one.
"""

import contextlib
import math

import pytest
import torch
from conftest import patch_everywhere, run_script, write_data_set
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader

import common
from patrec.flags import Source
from patrec.machine import seed_everything
from patrec.recipes import GENRE_NETWORKS, Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter"),  # it does copy
]
CARD = torch.device("meta")  # any device that is not the CPU and that every build of torch knows


class OnCard(torch.Tensor):
    """A tensor that says it is on CARD; its numbers are in `.inner`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        options = {"strides": inner.stride(), "dtype": inner.dtype, "device": CARD}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
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
        shapes = [tuple(x.shape) for x in strays]
        raise RuntimeError(f"Expected all on the same device: {func} with {shapes} on the CPU")
    plain_args, plain = tree_map(lambda x: x.inner if isinstance(x, OnCard) else x, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        plain["device"] = torch.device("cpu")
    result = func(*plain_args, **plain)
    if func._schema.is_mutable and name.endswith("_") and not name.startswith("_"):
        return args[0]  # in place
    there = any(on_card) and name != "_local_scalar_dense"
    if device is not None:
        there = torch.device(device) == CARD

    def place(x):
        is_plain = isinstance(x, torch.Tensor) and not isinstance(x, OnCard)
        return OnCard(x) if there and is_plain else x

    return tree_map(place, result)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Clips twice as long as a crop here, but not as long as the lab's: the stand-in is slow."""
    sizes = {"per_class": (4, 1), "n_emotion": (40, 1), "n_frames": (120, 150)}
    return write_data_set(tmp_path_factory.mktemp("data"), **sizes)


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
    x, here = torch.ones(3, device=card), torch.ones(3)
    assert x.device == card and (x + x).sum().item() == 6
    assert (x + here.to(card)).cpu().tolist() == [2, 2, 2]
    for function, args in ((torch.mul, (here, x)), (torch.cat, ([x, here],)), (x.add_, (here,))):
        with pytest.raises(RuntimeError, match="same device"):
            function(*args)


def train_on(device, data_dir, folder, name, target, quiet=False, **options):
    """Two epochs and a prediction, all as the steps do it; the losses and what is predicted.

    quiet : without dropout and changes of the input, whose random numbers differ between devices
    """
    network = GENRE_NETWORKS[name]
    window = None if network.plain else 16 if network.beat else 64
    seed_everything(0)
    n_clips = 12 if network.plain else 24  # the stand-in is slow where every frame is a step
    source = Source(data_dir, seed=0, device=device, subset=n_clips)
    data = common.load_data(source, network.features, network.beat, target, crop=window)
    if target == "genre":
        model, loss_fn = common.make_classifier(network, data), nn.CrossEntropyLoss()
    else:
        model, loss_fn = common.make_regressor(network, data), common.RegressionLoss(data.std)
    if quiet:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    shift = 0 if quiet or network.plain else 2
    recipe = Recipe(epochs=2, lr=2e-3, batch_size=12, shift=shift, window=window)
    model = model.to(device)
    fused = device.type != CARD.type  # torch has no fused optimiser for the stand-in
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=fused)
    result = common.train(model, data, loss_fn, optimizer, recipe, folder, device=device, **options)
    if options.get("overfit_batch"):
        return result
    loaded, _ = common.load_model(folder / "best.pt", device)  # what the next step finds
    assert all(value.device.type == device.type for value in loaded.state_dict().values())
    outputs, _ = common.predict(loaded, DataLoader(data.val, 12), device, window)
    return result.history["train_loss"].tolist(), outputs


def assert_close(there, here, losses, outputs):
    """(losses, outputs) of a device and of the CPU; outputs as share of their largest."""
    assert there[0] == pytest.approx(here[0], rel=losses) and all(map(math.isfinite, here[0]))
    largest = max(1.0, here[1].abs().max().item())
    assert (there[1] - here[1]).abs().max() < outputs * largest


@pytest.mark.parametrize("name, target, fits", [
    ("cnn_mel", "genre", True), ("beat_fused", "genre", True), ("plain_mel", "genre", True),
    ("fused", "emotion", True),
    ("cnn_mel", "genre", False),  # clips too many for the device: each batch is copied
])  # fmt: skip
def test_training_elsewhere_gives_what_the_cpu_gives(
    data_dir, tmp_path, monkeypatch, request, name, target, fits
):
    here = train_on(torch.device("cpu"), data_dir, tmp_path / "cpu", name, target)
    card = request.getfixturevalue("card")
    resident = []

    def to_resident(frames, device):
        resident.append(frames.to(device))
        return resident[-1]

    if fits:
        patch_everywhere(monkeypatch, "to_resident", to_resident)
    there = train_on(card, data_dir, tmp_path / "card", name, target)
    assert bool(resident) == fits and all(isinstance(frames, OnCard) for frames in resident)
    assert not isinstance(there[1], OnCard)
    assert_close(there, here, losses=1e-3, outputs=1e-3)


def test_four_batches_are_learned_elsewhere(card, data_dir):
    """Whether it runs is asked, not how well: two passes are enough."""
    check = train_on(card, data_dir, None, "cnn_mel", "emotion", overfit_batch=True)
    assert check.facts["passes"] == 2 and math.isfinite(check.facts["loss"])


@contextlib.contextmanager
def formats_seen():
    """Formats of what convolutions, LSTMs, linear layers give: {training or not: formats}."""
    seen = {True: set(), False: set()}

    def look(module, _, output):
        if isinstance(module, nn.Conv2d | nn.LSTM | nn.Linear):
            seen[module.training].add((output[0] if isinstance(output, tuple) else output).dtype)

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def train_in(dtype, monkeypatch, device, data_dir, folder, *args, **options):
    """`train_on` where `dtype` is the device's fast format; it alone is seen in the layers."""
    patch_everywhere(monkeypatch, "fast_dtype", lambda device_type: dtype)
    with formats_seen() as seen:
        losses, outputs = train_on(device, data_dir, folder / str(dtype), *args, **options)
    assert seen == {True: {dtype}, False: {dtype}}
    assert outputs.dtype == torch.float32 and outputs.isfinite().all()
    state = common.load_checkpoint(folder / str(dtype) / "best.pt")["state"].values()
    assert {value.dtype for value in state if value.is_floating_point()} == {torch.float32}
    return losses, outputs


@pytest.mark.parametrize("name, target", [("cnn_mel", "genre"), ("beat_fused", "emotion")])
def test_half_precision_only_where_it_is_fast(data_dir, tmp_path, monkeypatch, name, target):
    """In training and scoring; losses, weights and predictions stay single, and about the same."""
    where = (monkeypatch, torch.device("cpu"), data_dir, tmp_path, name, target)
    single, half = (train_in(dtype, *where) for dtype in (torch.float32, torch.bfloat16))
    assert_close(half, single, losses=0.05, outputs=0.1)
    assert half[0] != single[0]


# --- on a card --------------------------------------------------------------------------


def on_card(test):
    needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card here")
    return pytest.mark.cuda(needs(test))


@pytest.fixture
def cuda(monkeypatch):
    """The card, computing the same numbers each time."""
    for name in ("deterministic", "benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, name == "deterministic")
    return torch.device("cuda")


NETWORKS = [("cnn_mel", "genre"), ("mel", "genre"), ("beat_mel", "emotion")]


@on_card
@pytest.mark.parametrize("name, target", NETWORKS)
def test_a_card_trains_as_the_cpu_does(cuda, data_dir, tmp_path, monkeypatch, name, target):
    patch_everywhere(monkeypatch, "fast_dtype", lambda device_type: torch.float32)
    run = (name, target, True)  # quiet
    here = train_on(torch.device("cpu"), data_dir, tmp_path / "cpu", *run)
    there = train_on(cuda, data_dir, tmp_path / "cuda", *run)
    assert_close(there, here, losses=0.01, outputs=0.05)


@on_card
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_card_learns_as_single(cuda, data_dir, tmp_path, monkeypatch, dtype):
    where = (monkeypatch, cuda, data_dir, tmp_path, "cnn_mel", "genre")
    single, half = (train_in(kind, *where, quiet=True) for kind in (torch.float32, dtype))
    assert half[0] == pytest.approx(single[0], rel=0.05)


@on_card
def test_resumed_on_a_card_is_uninterrupted_to_the_last_bit(cuda, data_dir, tmp_path):
    network = ("cnn_mel", "genre")
    whole = train_on(cuda, data_dir, tmp_path / "whole", *network)
    train_on(cuda, data_dir, tmp_path / "parts", *network, max_seconds=0)  # one epoch
    resumed = train_on(cuda, data_dir, tmp_path / "parts", *network, resume=True)
    assert resumed[0] == whole[0] and torch.equal(resumed[1], whole[1])


@on_card
def test_four_batches_are_learned_by_heart_on_a_card(tmp_path):
    data = write_data_set(tmp_path / "data", per_class=(6, 2), n_emotion=(2, 1))
    where = ("--data-dir", data, "--out-dir", tmp_path)
    run_script("step07_cnn.py", "--overfit-batch", "--device", "cuda", *where)
