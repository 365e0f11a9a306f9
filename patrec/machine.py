"""The machine: notebook or terminal, Kaggle, device, seeds and number formats."""

import contextlib
import ctypes
import importlib.metadata
import multiprocessing
import os
import platform
import random
import sys
from pathlib import Path

import numpy as np
import torch

from patrec.errors import InputError


def in_notebook() -> bool:
    """True in a Jupyter cell, where sys.argv belongs to the kernel and not to us."""
    ipython = sys.modules.get("IPython")
    in_kernel = "ipykernel" in sys.modules and ipython and ipython.get_ipython() is not None
    return bool(in_kernel) and not hasattr(sys.modules["__main__"], "__file__")


def show_in_notebook(*things) -> None:
    """Display Markdown (str), sounds (waveform, sampling rate) and figures under a cell."""
    if in_notebook():
        from IPython.display import Audio, Markdown, display

        for thing in things:
            if isinstance(thing, tuple):
                thing = Audio(thing[0], rate=thing[1])
            display(Markdown(thing) if isinstance(thing, str) else thing)


def kaggle_root() -> Path:
    """/kaggle, or the folder in $PATREC_KAGGLE_ROOT that stands in for it in tests."""
    return Path(os.environ.get("PATREC_KAGGLE_ROOT", "/kaggle"))


def on_kaggle() -> bool:
    return (kaggle_root() / "working").is_dir()


def pick_device(name="auto") -> torch.device:
    """Return a device that passed a small computation.

    A card that torch has no code for says is_available() and fails at the first
    operation (P100 on Kaggle), so one small operation is tried first.
    """
    found = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    kinds = [kind for kind in found if found[kind]()] + ["cpu"]
    if name not in ("auto", *kinds):
        raise InputError(f"--device {name}: torch finds none; use --device cpu")
    for kind in kinds if name == "auto" else [name]:
        try:
            torch.ones(8, 8, device=kind).matrix_power(2).sum().item()
            return torch.device(kind)
        except RuntimeError as error:
            fault = f"{kind} cannot compute ({str(error).splitlines()[0]})"
            if name == kind:
                raise InputError(f"--device {fault}; use --device cpu") from error
            print(f"{fault}; going on without it", file=sys.stderr)


def seed_everything(seed) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, for libraries that draw from the global state
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of giving them back to the system.

    A network's activations are allocated and freed at every step. Mapping them anew each time
    took two fifths of a CNN's training time on a CPU.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):  # no glibc: slower, not wrong
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def fast_dtype(device_type) -> torch.dtype:
    """Number format for matrix work: half precision only where the chip computes in it.

    A T4 only emulates bf16 (but is_bf16_supported); a CPU needs avx512_bf16 or AMX to gain.
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    if device_type == "cpu" and Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text()
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16
    return torch.float32


def environment(device) -> dict:
    """Versions, processor and threads, which a reader needs to compare numbers."""
    packages = ("torch", "numpy", "librosa", "scikit-learn", "matplotlib", "pandas", "scipy")
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: importlib.metadata.version(name) for name in packages}
    facts |= {"device": str(device), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["matrix products"] = str(fast_dtype(device.type)).removeprefix("torch.")
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def show_bars() -> bool:
    """Progress bars belong on terminals and in notebooks; logs get a line per epoch."""
    is_worker = multiprocessing.current_process().name != "MainProcess"  # lines, then
    return in_notebook() or (sys.stderr.isatty() and not is_worker)


def half_precision(device):
    """Context in which matrix work runs in the device's fast format."""
    kind = torch.device(device).type
    dtype = fast_dtype(kind)
    return torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32)
