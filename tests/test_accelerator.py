"""Training on a device that is not the CPU, without having one.

A stand-in for an accelerator: its tensors say that they lie elsewhere, compute on the CPU all
the same, and refuse to meet tensors of the CPU, as those of a GPU do. A tensor that was left
behind on the CPU, which no CPU run notices, fails here. Speed and half precision it cannot show.
"""

import functools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import common

pytestmark = pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")  # the stand-in does copy
CARD = torch.device("meta")  # any device that is not the CPU and that every build of torch knows


class OnCard(torch.Tensor):
    """A tensor that says it is on CARD; its numbers are in `.inner`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=CARD)
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
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} with {[tuple(x.shape) for x in strays]} left on the CPU")
    plain_args, plain = tree_map(lambda x: x.inner if isinstance(x, OnCard) else x, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        plain["device"] = torch.device("cpu")
    result = func(*plain_args, **plain)
    if func._schema.is_mutable and name.endswith("_") and not name.startswith("_"):
        return args[0]  # in place
    there = torch.device(device) == CARD if device is not None else any(on_card) and name != "_local_scalar_dense"
    return tree_map(lambda x: OnCard(x) if there and isinstance(x, torch.Tensor) and not isinstance(x, OnCard) else x, result)


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """A processor with bf16 would compute in it and the stand-in would not: the device is compared here, not the format."""
    monkeypatch.setattr(common, "fast_dtype", lambda device_type: torch.float32)


@pytest.fixture
def card(monkeypatch):
    # Inference mode hands operations on before they are taken apart into those that `compute` knows.
    monkeypatch.setattr(common, "predict", torch.no_grad()(common.predict.__wrapped__))
    # Torch has neither a fused optimiser nor half precision for the stand-in, as for an Apple GPU.
    monkeypatch.setattr(common, "device_type", lambda device: "cpu" if torch.device(device).type == "cpu" else "mps")
    with Card():
        yield CARD


def test_the_stand_in_refuses_a_tensor_left_on_the_cpu(card):
    x = torch.ones(3, device=card)
    assert x.device == card and (x + x).sum().item() == 6 and (x + torch.ones(3).to(card)).cpu().tolist() == [2, 2, 2]
    for left_behind in (lambda: x + torch.ones(3), lambda: torch.ones(3) * x, lambda: torch.cat([x, torch.ones(1)]), lambda: x.add_(torch.ones(3))):
        with pytest.raises(RuntimeError, match="same device"):
            left_behind()


def train_on(device, data_dir, folder, name, head, **options):
    """Two epochs and a prediction, all as the steps do it; the history and what is predicted."""
    run = common.GENRE_RUNS[name]
    window = None if run.beat or run.plain else 64
    common.seed_everything(0)
    data = common.load_genre(data_dir, run.features, run.beat, seed=0, crop=window, subset=24, device=device)
    augment = None if run.plain else common.make_augment(run, len(data.classes) if head == "genre" else 0)
    whole = data.val.dataset
    if head != "genre":
        emotions = torch.rand(len(whole), 3)
        for dataset in (whole, data.train.dataset):
            dataset.targets = emotions if head == "multitask" else emotions[:, 0]
    model, loss_fn = {
        "genre": lambda network: (common.Classifier(network, len(data.classes)), nn.CrossEntropyLoss(label_smoothing=0.1)),
        "valence": lambda network: (common.Regressor(network), common.RegressionLoss(0.3)),
        "multitask": lambda network: (common.MultitaskRegressor(network), common.MultitaskLoss([0.3, 0.2, 0.3], learned=True)),
    }[head](common.make_backbone(run))
    score = common.genre_score(data.settings["shares"]) if head == "genre" else common.emotion_score
    recipe = common.Recipe(epochs=2, lr=2e-3, augment=augment, window=window)
    loaders = common.make_loader(data.train, 12, shuffle=True), common.make_loader(data.val, 12)
    result = common.train(model, *loaders, loss_fn, score, recipe, folder, data.settings, device=device, **options)
    if options.get("overfit_batch"):
        return result
    loaded, _ = common.load_model(folder / "best.pt", device)  # what the next step finds
    assert all(value.device == device for value in loaded.state_dict().values())
    return [row["train_loss"] for row in result["history"]], common.predict(loaded, loaders[1], device, window)[0]


@pytest.mark.parametrize(
    "name, head",
    [("cnn_mel", "genre"), ("mel", "genre"), ("beat_fused", "genre"), ("plain_mel", "genre"), ("cnn_mel", "valence"), ("cnn_mel", "multitask"), ("fused", "multitask")],
)
def test_training_elsewhere_gives_what_the_cpu_gives(data_dir, tmp_path, monkeypatch, request, name, head):
    losses, outputs = train_on(torch.device("cpu"), data_dir, tmp_path / "cpu", name, head)
    card = request.getfixturevalue("card")
    resident = []
    monkeypatch.setattr(common, "to_resident", lambda frames, device: resident.append(frames.to(device)) or resident[-1])  # as where it fits
    losses_there, outputs_there = train_on(card, data_dir, tmp_path / "card", name, head)
    assert isinstance(resident[0], OnCard) and not isinstance(outputs_there, OnCard)
    assert losses_there == pytest.approx(losses, rel=1e-3) and all(map(math.isfinite, losses))
    assert torch.allclose(outputs_there, outputs, rtol=1e-2, atol=1e-3), (outputs_there - outputs).abs().max()


@pytest.mark.parametrize("name, head", [("cnn_mel", "genre"), ("mel", "valence"), ("cnn_mel", "multitask")])
def test_four_batches_are_learned_elsewhere(card, data_dir, tmp_path, monkeypatch, name, head):
    monkeypatch.setattr(common, "overfit", functools.partial(common.overfit, goal=math.inf))  # stops early: whether it runs is asked, not how well
    assert math.isfinite(train_on(card, data_dir, tmp_path, name, head, overfit_batch=True)["loss"])
