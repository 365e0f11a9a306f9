"""Where a step computes, and in which format."""

import random

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from patrec.errors import InputError
from patrec.machine import fast_dtype, pick_device, seed_everything


class BrokenCard(TorchFunctionMode):
    """What is made on a card fails, as on one that torch has no code for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.device((kwargs or {}).get("device") or "cpu").type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution\nmore lines")
        return func(*args, **(kwargs or {}))


def test_a_card_that_is_there_and_cannot_compute_is_not_believed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with BrokenCard():
        assert pick_device("auto") == torch.device("cpu")
        assert "no kernel image" in capsys.readouterr().err
        with pytest.raises(InputError, match="no kernel image.*--device cpu") as error:
            pick_device("cuda")
    assert "\n" not in str(error.value)


def test_a_card_that_is_not_there_is_an_input_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda.*finds none.*--device cpu"):
        pick_device("cuda")


@pytest.mark.parametrize("capability", [(6, 0), (7, 5), (8, 0)])
def test_bfloat16_only_on_cards_that_compute_in_it(monkeypatch, capability):
    """A T4 (7.5) says that it supports bfloat16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert fast_dtype("cuda") == (torch.bfloat16 if capability == (8, 0) else torch.float16)


def test_a_seed_fixes_all_random_numbers():
    drawn = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        # The global state, from which libraries draw.
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    first, again, other = drawn
    assert first == again and not set(first) & set(other)
