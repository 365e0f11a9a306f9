"""What the eleven steps of the lab share: data, networks, training, scores, figures.

Read it from top to bottom; a clip travels the same way:

    label file -> entries -> arrays -> one resident tensor -> Subset -> batch
    -> backbone -> head -> loss -> answers (clip x target) -> scores -> files

Genre, one emotion and three emotions take the same way: one `load_data`, one `train`, one
`predict_clips`. Sections: 1 Run, 2 Features, 3 Dataset, 4 Batches, 5 Models, 6 Losses, 7 Train
and evaluate, 8 Metrics, 9 Plots, 10 Records.

Shapes are written with B clips in a batch, T frames, F feature bands, S steps,
C channels, H hidden units, K classes or emotions, N clips.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import median_filter
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.model_selection import KFold, train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

# ======================================================================================
# 1. Run: command line, data folder, device, seeds
# ======================================================================================


class StepEnd(Exception):
    """What ends a script with one line instead of a traceback, in a notebook too."""

    exit_code, label = 0, ""

    def _render_traceback_(self):
        """IPython prints these lines in place of a traceback."""
        return [f"{self.label}{self}"]


class InputError(StepEnd, ValueError):
    """A mistake in what the user handed in: one line on stderr, exit code 2."""

    exit_code, label = 2, "error: "


class StepFailed(StepEnd, RuntimeError):
    """A step that ran as asked and did not reach its goal: one line, exit code 1."""

    exit_code, label = 1, "failed: "


class Finished(StepEnd):
    """A step that was asked for a part only (--overfit-batch) and is done: exit code 0."""


def end_in_one_line(kind, error, traceback):
    """sys.excepthook: one line for what a user can mend, a traceback for a bug."""
    if issubclass(kind, StepEnd):
        if error.exit_code:
            print(f"{error.label}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; finished epochs are kept, --resume goes on from them", file=sys.stderr)
        sys.exit(130)
    sys.__excepthook__(kind, error, traceback)


def in_notebook() -> bool:
    """True in a Jupyter cell, where sys.argv belongs to the kernel and not to us."""
    ipython = sys.modules.get("IPython")
    in_kernel = "ipykernel" in sys.modules and ipython and ipython.get_ipython() is not None
    return bool(in_kernel) and not hasattr(sys.modules["__main__"], "__file__")


def kaggle_root() -> Path:
    """/kaggle, or the folder in $PATREC_KAGGLE_ROOT that stands in for it in tests."""
    return Path(os.environ.get("PATREC_KAGGLE_ROOT", "/kaggle"))


def on_kaggle() -> bool:
    return (kaggle_root() / "working").is_dir()


def bounded(kind, low, high=math.inf):
    """Return an argparse type that accepts `kind` values in [low, high] only."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = {int: "a whole number", float: "a number"}[kind]
            limit = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {name} of at least {low:g}{limit}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """A mistyped flag is bad input too: one line, without the usage of twenty flags before it."""

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists all flags\n")

    def flag(self, name, help, **options):
        """Add a flag whose help ends with its default."""
        if options.get("default") is not None:
            help += " (default: %(default)s)"
        self.add_argument(name, help=help, **options)


def make_parser(description, training=False) -> Parser:
    """Build the command line that every step shares; `training` adds the flags of a training."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a mistyped flag must fail, not be guessed
    )
    add = parser.flag
    add("--data-dir", type=Path, help="folder with fma_genre_spectrograms and the other three")
    add("--out-dir", type=Path, help="where outputs go; else /kaggle/working/outputs or outputs")
    add("--seed", type=bounded(int, 0, 2**31), default=42, help="seed of splits, weights, batches")
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", choices=devices, default="auto", help="where to compute")
    add("--smoke", action="store_true", help="do everything, tiny: checks that the step runs")
    add("--skip-bad", action="store_true", help="leave out unreadable clips instead of stopping")
    add("--allow-leak", action="store_true", help="go on although test clips are trained on")
    add("--no-merge", action="store_true", help="keep the classes instead of merging 20 into 10")
    if training:
        scaled = "passes over the training clips; else scaled to their number"
        add("--epochs", type=bounded(int, 1), help=scaled)
        add("--batch-size", type=bounded(int, 2), default=32, help="clips in a batch")
        add("--lr", type=bounded(float, 1e-8, 10), default=2e-3, help="highest learning rate")
        add("--subset", type=bounded(int, 8), metavar="N", help="train on N clips (torch Subset)")
        check = "only check that the network can learn 4 batches by heart"
        add("--overfit-batch", action="store_true", help=check)
        add("--resume", action="store_true", help="go on from the last finished epoch")
        add(
            "--max-minutes", type=bounded(float, 0.01), help="stop training cleanly after this long"
        )
        workers = "processes that train side by side; else one per core or graphics card"
        add("--workers", type=bounded(int, 1, 1024), metavar="N", help=workers)
    return parser


FOLDERS = {"genre": "fma_genre_spectrograms", "emotion": "multitask_dataset"}
KAGGLE_MOUNTS = (  # the classic layout and the one of newer kernels
    "input/patreco3-multitask-affective-music/data",
    "input/datasets/geoparslp/patreco3-multitask-affective-music/data",
)


def part_folder(root, part, beat=False) -> Path:
    """Folder of one part of the data: part is 'genre' or 'emotion'."""
    return Path(root) / (FOLDERS[part] + ("_beat" if beat else ""))


def find_data(data_dir=None, parts=tuple(FOLDERS), demo=True) -> Path:
    """Find the folder that holds fma_genre_spectrograms and its three siblings.

    Looks at `data_dir`, else $PATREC_DATA, else the Kaggle mounts, else data/ beside the
    scripts; as a last resort, and never on Kaggle, synthesises the demo set.

    parts : those that a step needs; of the demo set no others are synthesised
    demo : False: synthesise none

    Raises
    ------
    InputError
        Nothing found; the message names the places tried.
    """
    given = data_dir or os.environ.get("PATREC_DATA")
    here = Path(globals().get("__file__", "common.py")).resolve().parent
    if given:
        places = [Path(given)]
    elif on_kaggle():  # after the two known mounts, anybody's copy of the data set
        inputs = kaggle_root() / "input"
        places = [kaggle_root() / mount for mount in KAGGLE_MOUNTS]
        places += [*sorted(inputs.glob("*")), *sorted(inputs.glob("datasets/*/*"))]
    else:
        places = [here / "data", here / "data" / "demo"]
    names = {part_folder(".", part, beat).name for part in FOLDERS for beat in (False, True)}
    for place in places:
        # One level too high or too low is what people hand in most often: take it. Too low
        # only from one of the four folders: a mistyped data/song must not become data.
        inside = place.is_dir() and place.resolve().name in names
        for root in (place, place / "data", *([place.resolve().parent] if inside else [])):
            there = [part for part in FOLDERS if part_folder(root, part).is_dir()]
            is_demo = place == here / "data" / "demo"  # found without being named
            if there and not (is_demo and set(parts) - set(there)):
                return root.resolve()
    tried = ", ".join(map(str, places[:2]))
    if given:
        fault = f"no {FOLDERS['genre']} or {FOLDERS['emotion']} folder in {tried}"
        raise InputError(f"{fault}; name the folder that holds them in --data-dir")
    if on_kaggle():
        cure = "add geoparslp/patreco3-multitask-affective-music under Input"
        raise InputError(f"data set not attached (looked in {tried}); {cure}")
    maker = here / "make_dataset.py"
    if not demo or not maker.exists():
        raise InputError(f"no data in {tried}, no make_dataset.py for a demo set; give --data-dir")
    scores = "Scores on it say nothing about real music."
    print(f"No data set found: synthesising a demo set. {scores}", file=sys.stderr)
    # A separate process, so that this file imports no other of the project.
    command = [sys.executable, str(maker), "--demo", "--parts", *parts, "--out", str(places[-1])]
    made = subprocess.run(command)
    if made.returncode:
        fault = f"make_dataset.py could not write the demo set to {places[-1]}"
        raise InputError(f"{fault}; give --data-dir")
    return places[-1]


def pick_device(name="auto") -> torch.device:
    """Return a device that was seen to compute.

    A card that torch has no code for says is_available() and fails at the first
    operation (P100 on Kaggle), so one small operation is run before believing it.
    """
    mps = torch.backends.mps.is_available()
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    for kind in ["cuda", "mps", "cpu"] if name == "auto" else [name]:
        if not available[kind]:
            if name == kind:
                version = torch.__version__
                raise InputError(f"--device {name}: torch {version} finds none; use --device cpu")
            continue
        try:
            x = torch.ones(8, 8, device=kind)
            (x @ x).sum().item()
            return torch.device(kind)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if name == kind:
                fault = f"--device {name} cannot compute ({reason}); use --device cpu"
                raise InputError(fault) from error
            print(f"{kind} cannot compute ({reason}); going on without it", file=sys.stderr)
    raise AssertionError("the CPU always computes")


def seed_everything(seed) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, for libraries that draw from the global state
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of giving them back to the system.

    A network's activations are allocated and freed at every step; mapping them anew each
    time costs page faults, measured at two fifths of a CNN's training time on a CPU.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):  # no glibc: slower, not wrong
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def fast_dtype(device_type) -> torch.dtype:
    """Number format for matrix work: half precision only where the chip computes in it.

    torch.cuda.is_bf16_supported() is True by emulation on a T4, hence the capability
    test; a CPU gains from bf16 only with avx512_bf16 or AMX.
    """
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    if device_type == "cpu" and Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text()
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16
    return torch.float32


def environment(device) -> dict:
    """Facts that a reader needs to place a number: versions, processor, threads."""
    packages = ("torch", "numpy", "librosa", "scikit-learn", "matplotlib", "pandas", "scipy")
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: importlib.metadata.version(name) for name in packages}
    facts |= {"device": str(device), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["matrix products"] = str(fast_dtype(device.type)).removeprefix("torch.")
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


# --------------------------------------------------------------------------------------
# Work side by side: trainings here, audio files in make_dataset.py
# --------------------------------------------------------------------------------------


class WorkerDied(StepFailed):
    """A worker process ended before its task did."""


def parallel_map(function, tasks, workers, dask=None, order="generator"):
    """Yield function(*task) for every task, from so many processes or from a Dask cluster.

    The order is that of the tasks or, with "generator_unordered", in which they are done.
    One worker without Dask is this very process.

    Raises
    ------
    WorkerDied
        One was killed; results that came before are good.
    """
    if workers == 1 and not dask:
        yield from itertools.starmap(function, tasks)
        return
    parent = None if dask else os.getpid()
    calls = [joblib.delayed(in_worker)(parent, function, *task) for task in tasks]
    threads = max(joblib.cpu_count() // workers, 1)
    local = {"backend": "loky", "n_jobs": workers, "inner_max_num_threads": threads}
    with dask_cluster(dask) if dask else contextlib.nullcontext(local) as backend:
        with joblib.parallel_config(**backend):
            pool = joblib.Parallel(batch_size=1, return_as=order)
        try:
            yield from pool(calls)
        except Exception as error:
            if type(error).__name__ in ("TerminatedWorkerError", "KilledWorker"):  # loky's, Dask's
                raise WorkerDied("a worker process was killed") from error
            raise


@contextlib.contextmanager
def dask_cluster(address):
    """What joblib.parallel_config needs to run tasks on the cluster of this Dask scheduler.

    Its workers need the packages of requirements.txt, not this file, which travels with the
    tasks, and see data, cache and output folder under the same paths.
    """
    try:
        import cloudpickle
        from distributed import Client
    except ImportError:
        fault = "--dask needs a package that is not installed"
        raise InputError(f'{fault}; pip install "dask[distributed]"') from None
    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(f"--dask {address}: no scheduler answers there ({error})") from None
    module = sys.modules[__name__]
    with client:
        if __name__ != "__main__":  # what is defined there travels by value anyway
            cloudpickle.register_pickle_by_value(module)
        try:
            yield {"backend": "dask", "client": client}
        finally:
            if __name__ != "__main__":
                cloudpickle.unregister_pickle_by_value(module)


def in_worker(parent, function, *task):
    """Call a function in a worker process that ends with its parent (None: with nobody).

    A killed step must not leave behind what goes on writing into its folder.
    """

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    name = "end with parent"
    if all(thread.name != name for thread in threading.enumerate()):  # the first task
        keep_freed_memory()
        if parent == os.getppid():
            threading.Thread(target=end_with_parent, daemon=True, name=name).start()
        if parent and torch.cuda.device_count() > 1:  # LokyProcess-1, LokyProcess-2, ...
            place = int(multiprocessing.current_process().name.rpartition("-")[2])
            torch.cuda.set_device(place % torch.cuda.device_count())
    return function(*task)


# ======================================================================================
# 2. Features: waveform -> (140, T) spectrogram, as the lab's own extractor computes it
# ======================================================================================

SR = 22_050  # sampling rate, in Hz
N_FFT = 2048  # window of a frame, in samples (93 ms)
HOP = 512  # step from frame to frame, in samples (23 ms)
N_MELS = 128  # mel bands: rows 0-127, in dB relative to the clip's loudest cell, [-80, 0]
N_CHROMA = 12  # pitch classes C ... B: rows 128-139, in [0, 1]
N_ROWS = N_MELS + N_CHROMA
DB_FLOOR = -80.0  # power_to_db cuts off here
BANDS = {"mel": slice(0, N_MELS), "chroma": slice(N_MELS, N_ROWS), "fused": slice(0, N_ROWS)}
NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def extract_features(waveform) -> tuple[np.ndarray, np.ndarray]:
    """Compute the full and the beat-synchronised spectrogram of a clip.

    Beats are tracked on the percussive part (HPSS); between two beats the median of the
    frames is taken, for mel on power, before the step to dB.

    Parameters
    ----------
    waveform : np.ndarray [shape=(n,)]
        Mono audio at SR, at least N_FFT samples.

    Returns
    -------
    full : np.ndarray [shape=(140, T)], float64
        128 mel bands in dB, then 12 chroma values.
    beat : np.ndarray [shape=(140, at most n_beats + 1)], float64
        The same, one column per beat interval.

    Source: the course's lab3/feature_extractor.py (slp-ntua/patrec-labs); Müller, 2015,
    Fundamentals of Music Processing, ch. 6.3 (beat-synchronous features).
    """
    import librosa

    mel_power, chroma = mel_and_chroma(waveform)
    _, beat_frames = librosa.beat.beat_track(y=percussive_part(waveform), sr=SR, hop_length=HOP)
    if not len(beat_frames):  # silence, a held tone: the whole clip is one interval
        beat_frames = np.array([0])

    sync = functools.partial(librosa.util.sync, idx=beat_frames, aggregate=np.median)
    return stack_rows(mel_power, chroma), stack_rows(sync(mel_power), sync(chroma))


def mel_and_chroma(waveform) -> tuple[np.ndarray, np.ndarray]:
    """Mel spectrogram, power (128, T), and chroma (12, T) of a mono waveform at SR."""
    import librosa

    if waveform.ndim != 1 or len(waveform) < N_FFT:
        shape = f"waveform of shape {waveform.shape}"
        raise InputError(f"{shape}: one channel of at least {N_FFT} samples is needed")
    mel_power = librosa.feature.melspectrogram(
        y=waveform, sr=SR, n_fft=N_FFT, hop_length=HOP, n_mels=N_MELS
    )
    chroma = librosa.feature.chroma_cqt(y=waveform, sr=SR, hop_length=HOP)
    # mel and CQT may differ by a frame in odd cases; the common length keeps them aligned.
    n_frames = min(mel_power.shape[1], chroma.shape[1])
    return mel_power[:, :n_frames], chroma[:, :n_frames]


def stack_rows(mel_power, chroma) -> np.ndarray:
    """The 140 rows of an array: mel in dB below the loudest cell, then chroma; float64."""
    import librosa

    silent = mel_power.max() <= 1e-10  # librosa's own lower limit
    db = np.full_like(mel_power, DB_FLOOR) if silent else librosa.power_to_db(mel_power, ref=np.max)
    return np.vstack([db, np.clip(chroma, 0, 1)]).astype(np.float64)


def percussive_part(waveform, size=31) -> np.ndarray:
    """Compute librosa.effects.percussive(waveform), bit for bit, six times as fast.

    Energy that stands out of the running median over time but not over frequency is a
    stroke (Fitzgerald, 2010, Harmonic/percussive separation using median filtering).
    """
    import librosa

    half = size // 2

    def median_along_rows(rows):
        # scipy's fast median is for one dimension only, so the mirrored rows are laid end to end.
        padded = np.pad(rows, ((0, 0), (half, half)), mode="symmetric")
        return median_filter(padded.ravel(), size).reshape(padded.shape)[:, half:-half]

    magnitude, phase = librosa.magphase(librosa.stft(waveform))
    over_time, over_frequency = median_along_rows(magnitude), median_along_rows(magnitude.T).T
    mask = librosa.util.softmask(over_frequency, over_time, power=2, split_zeros=True)
    return librosa.istft(magnitude * mask * phase, dtype=waveform.dtype, length=len(waveform))


def mel_to_waveform(mel_db, n_iter=16, seed=0) -> np.ndarray:
    """Make sound of a mel spectrogram again, at a level of its own.

    The bands are spread over the FFT's frequencies by the pseudo-inverse of the mel filters
    (three times as fast as librosa's non-negative least squares, and as close), the phase,
    which no spectrogram holds, is found by Griffin & Lim (1984). For a made-up clip 16 rounds
    left a relative error of .21 in the magnitudes, 32 rounds .19.

    Parameters
    ----------
    mel_db : np.ndarray [shape=(128, T)], in dB
    seed : int, of the phase to begin with

    Returns
    -------
    waveform : np.ndarray [shape=((T - 1) * HOP,)], float32, at SR, peak .9
    """
    import librosa

    filters = librosa.filters.mel(sr=SR, n_fft=N_FFT, n_mels=N_MELS)
    power = np.linalg.pinv(filters) @ librosa.db_to_power(np.asarray(mel_db, dtype=np.float32))
    magnitude = np.sqrt(np.maximum(power, 0))
    waveform = librosa.griffinlim(
        magnitude, n_iter=n_iter, hop_length=HOP, n_fft=N_FFT, random_state=seed
    )
    return (0.9 * waveform / max(np.abs(waveform).max(), 1e-9)).astype(np.float32)


def spectrogram_similarity(waveform, mel_db) -> dict:
    """How close a sound's mel spectrogram is to one in dB (128, T): correlation, mean distance."""
    import librosa

    power = librosa.feature.melspectrogram(y=waveform, sr=SR, n_fft=N_FFT, hop_length=HOP)
    again, mel_db = librosa.power_to_db(power, ref=np.max), np.asarray(mel_db, dtype=float)
    n = min(again.shape[1], mel_db.shape[1])
    again, mel_db = again[:, :n], mel_db[:, :n] - mel_db[:, :n].max()
    correlation = float(np.corrcoef(again.ravel(), mel_db.ravel())[0, 1])
    return {"correlation": correlation, "mean_distance_db": float(np.abs(again - mel_db).mean())}


# ======================================================================================
# 3. Dataset: label files -> entries -> one resident tensor -> torch Dataset
# ======================================================================================

MERGE = {  # the lab's step 4b: similar classes merged, five left out (None)
    "Rock": "Rock", "Psych-Rock": "Rock", "Post-Rock": "Rock", "Indie-Rock": None,
    "Folk": "Folk", "Psych-Folk": "Folk", "Metal": "Metal", "Punk": "Metal", "Post-Punk": None,
    "Electronic": "Electronic", "Chiptune": "Electronic", "Trip-Hop": "Trip-Hop",
    "Hip-Hop": "Hip-Hop", "Pop": "Pop", "Classical": "Classical", "Blues": "Blues", "Jazz": "Jazz",
    "Soundtrack": None, "International": None, "Old-Time": None,
}  # fmt: skip
EMOTIONS = ("valence", "energy", "danceability")


class Entry(NamedTuple):
    """One clip: its id, its array on disk, its genre name or its three emotion values."""

    clip_id: str
    path: Path
    label: str | tuple[float, float, float] | None


def read_labels(path) -> list[tuple[str, str | tuple[float, float, float]]]:
    """Read a label file of any of the three forms that the data set has.

    ``Id<TAB>Genre`` for genre, ``Id,valence,energy,danceability`` for emotion. The clip's
    id is what stands before the first dot of the first column.

    Returns
    -------
    list of (clip_id, label), in the file's order; label is the genre name or the tuple
    (valence, energy, danceability), each in [0, 1].

    Raises
    ------
    InputError
        Names the file, the line and the fault.
    """
    expected = f"'Id<TAB>Genre' or 'Id,{','.join(EMOTIONS)}'"
    rows = [(n, line) for n, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: empty; its first line must be {expected}")
    header = rows[0][1].strip()
    separator = "\t" if "\t" in header else ","
    columns = [name.strip() for name in header.split(separator)]
    # Columns are found by name: a fixed number is how valence once was read as energy.
    is_genre = columns == ["Id", "Genre"]
    if is_genre and separator != "\t":
        raise InputError(f"{path}: columns separated by {separator!r}; expected a tab")
    is_emotion = columns[0] == "Id" and sorted(columns[1:]) == sorted(EMOTIONS)
    if not is_genre and not (is_emotion and separator == ","):
        raise InputError(f"{path}: header {header!r}; expected {expected}")

    labels = {}  # a row given twice is one clip
    for n, line in rows[1:]:
        where = f"{path}, line {n}"
        cells = [cell.strip() for cell in line.split(separator)]
        if len(cells) != len(columns) or not all(cells):
            fault = f"{line!r} has not {len(columns)} filled columns"
            raise InputError(f"{where}: {fault}; mend or remove the line")
        clip_id = cells[0].split(".")[0]
        if not clip_id or any(mark in cells[0] for mark in "/\\:\0"):
            fault = f"{cells[0]!r} is no clip id"
            raise InputError(f"{where}: {fault}; expected e.g. 104085.fused.full.npy.gz")
        label = cells[1] if is_genre else emotion_values(where, line, columns[1:], cells[1:])
        if labels.setdefault(clip_id, label) != label:
            fault = f"clip {clip_id} was labelled {labels[clip_id]!r} before, now {label!r}"
            raise InputError(f"{where}: {fault}; keep one")
    if not labels:
        raise InputError(f"{path}: a header and no clips; is the data set complete?")
    return list(labels.items())


def read_lines(path) -> list[str]:
    """Lines of a label file; InputError where it cannot be read."""
    try:  # -sig: a byte order mark is no part of the header
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        fault = "label file missing; is the data set complete?"
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 text at byte {error.start}; save it as UTF-8"
    except OSError as error:  # a folder in its place, no permission
        fault = f"cannot be read ({error.strerror}); is the data set complete?"
    raise InputError(f"{path}: {fault}")


def emotion_values(where, line, columns, cells) -> tuple[float, float, float]:
    """Cells of an emotion label file -> (valence, energy, danceability), each in [0, 1]."""
    try:
        values = dict(zip(columns, map(float, cells), strict=True))
    except ValueError:
        fault = f"{line!r} holds a value that is no number"
        raise InputError(f"{where}: {fault}; mend or remove the line") from None
    if not all(0 <= value <= 1 for value in values.values()):
        fault = f"{line!r} holds a value outside [0, 1]"
        raise InputError(f"{where}: {fault}; mend or remove the line")
    return tuple(values[name] for name in EMOTIONS)


def read_entries(data_dir, part, split, beat=False, merge=False) -> list[Entry]:
    """List the clips of one split of one part.

    Parameters
    ----------
    part : 'genre' or 'emotion'
    split : 'train' or 'test'
    beat : bool
        Beat-synchronised arrays instead of full ones.
    merge : bool
        Apply the lab's merge of classes (genre only).
    """
    folder = part_folder(data_dir, part, beat)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data-dir must hold {folder.name}")
    arrays = folder / split
    if part == "emotion" and split == "test":  # the lab publishes no labels for these
        labels = [(path.name.split(".")[0], None) for path in sorted(arrays.glob("*.npy"))]
    else:
        file = folder / f"{split}_labels.txt"
        labels = read_labels(file)
        if isinstance(labels[0][1], str) != (part == "genre"):
            raise InputError(f"{file}: holds the labels of the other part; expected {part} labels")
    entries = [Entry(i, arrays / f"{i}.fused.full.npy", label) for i, label in labels]
    return merge_classes(entries) if merge and part == "genre" else entries


def merge_classes(entries) -> list[Entry]:
    """Apply MERGE: rename merged classes, leave out dropped ones (lab, step 4b)."""
    unknown = sorted({entry.label for entry in entries} - set(MERGE))
    merged = [entry._replace(label=MERGE.get(entry.label)) for entry in entries]
    merged = [entry for entry in merged if entry.label]
    if unknown or not merged:
        class_fault = f"class {unknown[0]!r} is not one of the lab's 20" if unknown else ""
        fault = class_fault or "the lab's merge drops every class in it"
        raise InputError(f"{label_file(entries)}: {fault}; --no-merge keeps classes as they are")
    return merged


def label_file(entries) -> Path:
    """The file that named these clips, for messages."""
    folder = entries[0].path.parent
    return folder.with_name(f"{folder.name}_labels.txt")


def read_array(path, lock=None) -> np.ndarray:
    """Read one array and check it.

    lock : threading.Lock, which threads that read at the same time share. NumPy parses a
        header with `ast`, which up to CPython 3.11.7 fails now and then while another
        thread is in it too (python/cpython#106905): a sound clip would be called broken.

    Returns
    -------
    np.ndarray [shape=(140, T)], float32

    Raises
    ------
    InputError
        Missing, unreadable, of a wrong shape or kind, not finite, or out of range.
    """
    try:
        with lock or contextlib.nullcontext():  # the numbers are read when they are converted
            # Takes .npy files only: no archive and no pickle, which may run code.
            array = np.lib.format.open_memmap(path, mode="r")
        fault = shape_fault(array)
        if not fault:
            # A copy. What float32 cannot hold becomes infinite and is refused.
            with np.errstate(over="ignore"):
                array = np.array(array, dtype=np.float32)
            fault = value_fault(array)
    except FileNotFoundError:
        fault = "missing, though the label file names it"
    except Exception as error:  # whatever a broken header makes numpy raise, MemoryError too
        reason = str(error).splitlines()[0] if str(error) else "empty file"
        fault = f"not a readable .npy array ({reason})"
    if fault:
        cure = "replace the file, or leave such clips out with --skip-bad"
        raise InputError(f"{path}: {fault}; {cure}")
    return array


def shape_fault(array) -> str | None:
    """What is wrong with the type or the shape of a clip's array, if anything."""
    if array.dtype.kind != "f":
        return f"numbers of type {array.dtype}, expected floating point"
    if array.ndim != 2 or array.shape[0] != N_ROWS:
        turned = "; it looks transposed" if array.ndim == 2 and array.shape[1] == N_ROWS else ""
        return f"shape {array.shape}, expected ({N_ROWS}, T){turned}"
    return None if array.shape[1] else f"shape {array.shape}: no frames"


def value_fault(array) -> str | None:
    """What is wrong with the values of a (140, T) array, if anything."""
    low, high = array[:N_MELS].min(), array[:N_MELS].max()  # NaN and inf survive min and max
    chroma_low, chroma_high = array[N_MELS:].min(), array[N_MELS:].max()
    if not np.isfinite([low, high, chroma_low, chroma_high]).all():
        return "holds NaN or infinite values"
    if low == high:
        return f"mel rows are {low:.1f} dB throughout: silence"
    if low < DB_FLOOR - 1e-3 or high > 1e-3:
        return f"mel rows span {low:.1f} to {high:.1f}, expected dB in [{DB_FLOOR:.0f}, 0]"
    if chroma_low < -1e-3 or chroma_high > 1 + 1e-3:
        return f"chroma rows span {chroma_low:.2f} to {chroma_high:.2f}, expected [0, 1]"
    return None


@dataclasses.dataclass
class ClipStore:
    """All clips of a split in one tensor, clip after clip, without padding.

    frames : torch.Tensor [shape=(total frames, 140)], float16
        dB and chroma as on disk. Half precision is .03 dB off at worst and a quarter of the
        memory of float64.
    starts, lengths : torch.Tensor [shape=(N,)], int64, in frames
    digests : list of str
        A checksum of every 16th frame of a clip: clips with equal ones count as identical.
    """

    entries: list[Entry]
    frames: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    digests: list[str]


CACHE_VERSION = 1
N_READERS = (os.cpu_count() or 1) + 1  # threads: one waits for the disk while others compute


def load_clips(entries, skip_bad=False, threads=N_READERS) -> ClipStore:
    """Load the arrays of `entries`, in their order, into a ClipStore.

    The first time, threads read, check and convert the files into one cache file; later
    starts map that file. The cache's name is a hash of every file's name, size and time,
    so a changed data set is read anew.

    Raises
    ------
    InputError
        For the first bad array, unless `skip_bad`: then bad clips are named on stderr and
        left out.
    """
    if not entries:
        raise InputError("no clips to load; is the data set complete?")
    lock = threading.Lock()
    with ThreadPoolExecutor(threads) as pool:
        facts = list(pool.map(file_facts, entries))
        key = hashlib.sha256(repr((CACHE_VERSION, facts)).encode()).hexdigest()[:24]
        cache = cache_dir() / f"{key}.clips"
        try:
            footer, frames = open_cache(cache)
            left_out = set(range(len(entries))) - set(footer["kept"])
            if any(convert(entries[index], lock)[0] is not None for index in left_out):
                raise ValueError("a disk or a share that had failed for a moment")
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            # Not there yet, or cut short when the machine went down.
            fill_cache(cache, entries, pool, lock)
            footer, frames = open_cache(cache)
    faults = footer["faults"]
    if faults and not skip_bad:
        more = f" (and {len(faults) - 1} more bad files)" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    if not footer["kept"]:
        raise InputError(f"{entries[0].path.parent}: none of {len(entries)} clips can be read")
    lengths = torch.tensor(footer["lengths"])
    kept = [entries[index] for index in footer["kept"]]
    return ClipStore(kept, frames, lengths.cumsum(0) - lengths, lengths, footer["digests"])


def cache_dir() -> Path:
    """Return a writable scratch folder for caches; inputs may be read-only.

    $PATREC_CACHE, else /tmp on Kaggle, else ~/.cache. It may be deleted at any time.
    """
    if "PATREC_CACHE" in os.environ:
        folder = Path(os.environ["PATREC_CACHE"])
    elif on_kaggle():
        folder = Path(tempfile.gettempdir()) / "patrec-music"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "patrec-music"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fault = f"no cache folder can be made there ({error.strerror})"
        raise InputError(f"{folder}: {fault}; set $PATREC_CACHE") from error
    return folder


def file_facts(entry) -> tuple:
    """Name, size and time of change of a file; two None for one that is missing."""
    path = str(entry.path)
    try:
        stat = os.stat(path)
        return path, stat.st_size, stat.st_mtime_ns
    except OSError:
        return path, None, None


def convert(entry, lock=None) -> tuple[np.ndarray | None, str | None]:
    """Read one clip as (T, 140) float16, time first: a crop is one block. Or say what is wrong."""
    try:  # torch converts to half precision several times as fast as NumPy
        array = torch.from_numpy(read_array(entry.path, lock)).half().numpy()
    except InputError as error:
        return None, str(error)
    return np.ascontiguousarray(array.T), None


def fill_cache(cache, entries, pool, lock) -> None:
    """Write the cache file: all frames, then a JSON footer, then the footer's length."""
    footer = {"kept": [], "lengths": [], "digests": [], "faults": []}
    for leftover in cache.parent.glob("*.clips.*.tmp"):  # of a killed run; none is filled for hours
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    partial = cache.with_suffix(f".clips.{uuid.uuid4().hex[:8]}.tmp")
    bar = tqdm(total=len(entries), desc="reading clips", disable=not show_bars(), leave=False)
    try:
        with bar, open(partial, "wb") as file:
            for first in range(0, len(entries), 512):  # so that few arrays wait in memory
                converted = pool.map(
                    functools.partial(convert, lock=lock), entries[first : first + 512]
                )
                for index, (frames, fault) in enumerate(converted, start=first):
                    bar.update()
                    if fault:
                        footer["faults"].append(fault)
                        continue
                    file.write(frames)
                    footer["kept"].append(index)
                    footer["lengths"].append(len(frames))
                    digest = hashlib.blake2b(frames[::16].tobytes(), digest_size=8)
                    footer["digests"].append(digest.hexdigest())
            text = json.dumps(footer).encode()
            file.write(text + len(text).to_bytes(8, "little"))
        os.replace(partial, cache)
    except OSError as error:
        cure = "point $PATREC_CACHE to a folder with more room"
        raise InputError(f"{partial}: cannot be written ({error.strerror}); {cure}") from error
    finally:
        partial.unlink(missing_ok=True)


def open_cache(cache) -> tuple[dict, torch.Tensor]:
    """Map a cache file; returns its footer and the frames, (total frames, 140) float16."""
    with open(cache, "rb") as file:
        file.seek(-8, os.SEEK_END)
        size = int.from_bytes(file.read(8), "little")
        file.seek(-8 - size, os.SEEK_END)
        footer = json.loads(file.read(size))
    shape = (sum(footer["lengths"]), N_ROWS)
    if not shape[0]:
        return footer, torch.empty(shape, dtype=torch.float16)
    try:
        # Mode "c" (copy on write): a change made by mistake never reaches the file.
        frames = np.memmap(cache, np.float16, "c", shape=shape)
    except OSError:  # Linux refuses what would not fit into its memory if all of it were changed
        frames = np.memmap(cache, np.float16, "r", shape=shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that cannot be written
        return footer, torch.from_numpy(frames)


class SpectrogramDataset(Dataset):
    """The lab's Dataset: item -> (spectrogram, target, length).

    Spectrograms are standardised per band and only then padded, so that padding is the
    band's mean. (Padding dB with zeros would pad with the loudest value there is.)

    Parameters
    ----------
    store : ClipStore
    targets : array-like [shape=(N,) or (N, 3)]
        Class numbers, or emotion values.
    features : 'mel', 'chroma' or 'fused'
    stats : (mean, std), each torch.Tensor [shape=(F,)]
        From `band_statistics` of the training part.
    crop : int or None
        Fetch a random stretch of this many frames instead of the whole clip.
    """

    def __init__(self, store, targets, features="mel", stats=None, crop=None):
        self.store, self.features, self.crop = store, features, crop
        targets = torch.as_tensor(np.asarray(targets))
        self.targets = targets.float() if targets.is_floating_point() else targets.long()
        self.stats = stats
        if len(self.targets) != len(store.entries):
            raise ValueError(f"{len(self.targets)} targets for {len(store.entries)} clips")

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        """Return (spectrogram (T, F) float32, target, length) of one clip."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Fetch a whole batch by one index operation; DataLoader calls this by itself.

        Returns a list of (spectrogram (T, F), target, length), all padded to the longest
        clip of the batch, as the standard collate function wants them.
        """
        indices = torch.as_tensor(indices)
        starts, lengths = self.store.starts[indices], self.store.lengths[indices]
        if self.crop:
            spare = (lengths - self.crop).clamp(min=0)
            starts = starts + (torch.rand(len(indices)) * (spare + 1)).long()
            lengths = lengths.clamp(max=self.crop)
        frames = self.store.frames  # fetched by rows, which lie in one piece, then cut to the bands
        t = torch.arange(int(lengths.max()))
        # (B, T) rows of the store; past its end a clip repeats its last frame.
        rows = starts[:, None] + torch.minimum(t, lengths[:, None] - 1)
        x = frames.index_select(0, rows.flatten().to(frames.device)).unflatten(0, rows.shape)
        x = x[..., BANDS[self.features]].float()  # (B, T, F)
        if self.stats:
            mean, std = (value.to(x.device) for value in self.stats)
            x = x.sub_(mean).div_(std)
        padding = t >= lengths[:, None]
        if padding.any():
            x.masked_fill_(padding[..., None].to(x.device), 0.0)
        return list(zip(x, self.targets[indices], lengths, strict=True))

    def variant(self, **changes):
        """Return the same data seen otherwise, e.g. ``variant(crop=None)``; no copy."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other


def band_statistics(store, indices, features="mel") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every band over the frames of some clips.

    Call it with the training part only: statistics of validation or test clips in the
    input would be a leak.

    Returns
    -------
    mean, std : torch.Tensor [shape=(F,)], in the units of the rows (dB; chroma 0 to 1)
    """
    total, squares, n_frames = 0.0, 0.0, 0
    for index in indices:
        start, length = int(store.starts[index]), int(store.lengths[index])
        # About 256 frames of a clip are enough: neighbours say nearly the same.
        x = store.frames[start : start + length : max(1, length // 256), BANDS[features]].float()
        total = total + x.sum(0, dtype=torch.float64)
        squares = squares + x.square().sum(0, dtype=torch.float64)
        n_frames += len(x)
    mean = total / n_frames
    std = (squares / n_frames - mean.square()).clamp(min=0).sqrt()
    return mean.float().cpu(), std.clamp(min=1e-3).float().cpu()  # a silent band stays finite


def encode_labels(entries, classes) -> np.ndarray:
    """Genre names -> class numbers; `classes` comes from the training part, sorted."""
    number = {name: index for index, name in enumerate(classes)}
    if unknown := sorted({entry.label for entry in entries} - set(number)):
        fault = f"class {unknown[0]!r} does not occur in the training part {list(classes)}"
        raise InputError(f"{label_file(entries)}: {fault}; mend the label or remove the clip")
    return np.array([number[entry.label] for entry in entries])


def split_indices(n_clips, fraction, seed, classes=None) -> tuple[np.ndarray, np.ndarray]:
    """Split range(n_clips) at random, seeded, into a larger and a smaller part.

    Parameters
    ----------
    fraction : float
        Share of the smaller (validation or test) part.
    classes : np.ndarray [shape=(n_clips,)], optional
        Class names or numbers, to keep every class's share in both parts.
    """
    n_classes = 0 if classes is None else refuse_lone_clips(classes)
    n_held_out = max(math.ceil(fraction * n_clips), n_classes, 1)
    if n_clips < 2 * n_held_out:
        fault = f"{n_clips} clips are too few to split into training and validation part"
        raise InputError(f"{fault}; add clips")
    larger, smaller = train_test_split(
        np.arange(n_clips), test_size=n_held_out, random_state=seed, stratify=classes
    )
    return larger, smaller


def refuse_lone_clips(classes, file="") -> int:
    """Raise InputError where a class has a single clip; returns the number of classes."""
    names, counts = np.unique(classes, return_counts=True)
    if (counts == 1).any():
        fault = f"class {names[counts == 1][0]} has a single clip"
        reason = "which cannot be in both the training and the validation part"
        where = f"{file}: " if file else ""
        raise InputError(f"{where}{fault}, {reason}; add clips of it or drop it")
    return len(names)


VAL_FRACTION = 0.1  # of the training clips; a tenth shows the curve, and each clip taught counts
N_FOLDS = 5  # a fifth of the emotion clips is held out: the lab gives no labels for its test clips


@dataclasses.dataclass(frozen=True)
class Source:
    """Which clips there are and how they are read: what the data flags of a step say."""

    root: Path  # folder of the four parts
    seed: int = 42  # of all splits
    device: str | torch.device = "cpu"
    merge: bool = True
    skip_bad: bool = False
    allow_leak: bool = False
    subset: int | None = None  # train on so many clips only
    smoke: bool = False


@dataclasses.dataclass
class Data:
    """What one network learns from: parts that no clip shares.

    train, val, held_out : Subset of one SpectrogramDataset; held_out is empty for genre,
        which has a test split of its own (`load_test`)
    names : list of K str, the classes or the emotions that the columns stand for
    mean, std : np.ndarray [shape=(K,)], of the training labels; emotion only
    settings : dict, what a checkpoint needs to judge new clips and to know its own origin
    """

    train: Subset
    val: Subset
    held_out: Subset
    names: list[str]
    mean: np.ndarray | None
    std: np.ndarray | None
    settings: dict


def load_data(
    source, features="mel", beat=False, target="genre", *, crop=None, fold=0, n_folds=1, stats=None
) -> Data:
    """Load the training split of genre or emotion and cut it into parts.

    Whatever a network hears (frames or beats, mel or chroma), the same clips train,
    validate and are held out: the cut is made on the ids, in the order of the full
    clips' label file.

    Parameters
    ----------
    target : 'genre', 'emotion' (three values per clip), 'valence', 'energy', 'danceability'
    crop : int or None
        Random crops of this many frames for training; the other parts see whole clips.
    fold, n_folds : int
        Emotion: which fold is held out, of how many; one fold is a fifth.
    stats : (mean, std), optional
        Standardise with these, of the network that is continued, not with those of the
        training part.
    """
    part = "genre" if target == "genre" else "emotion"
    entries = read_entries(source.root, part, "train", beat, source.merge)
    store = load_clips(entries, source.skip_bad)
    labels = {entry.clip_id: entry.label for entry in entries}
    if part == "genre":
        refuse_lone_clips(list(labels.values()), label_file(entries))
    parts = split_ids(source, part, labels, fold, n_folds)
    row = {entry.clip_id: index for index, entry in enumerate(store.entries)}
    train, val, held_out = ([row[i] for i in ids if i in row] for ids in parts)
    if not (train and val and (held_out or part == "genre")):
        fault = "no readable clip is left in one of the parts; replace the files left out"
        raise InputError(f"{entries[0].path.parent}: {fault}")
    mean = std = None
    if part == "genre":
        names = sorted(set(labels.values()))
        targets = encode_labels(store.entries, names)
        train = take_subset(train, targets, source.subset)
        # A class whose few training clips were all left out counts as one: log 0 is no number.
        counts = np.bincount(targets[train], minlength=len(names)).clip(min=1)
        extra = {"priors": (counts / len(train)).tolist()}
    else:
        names = list(EMOTIONS) if target == "emotion" else [target]
        columns = [EMOTIONS.index(name) for name in names]
        targets = np.array([entry.label for entry in store.entries], dtype=np.float32)[:, columns]
        train = train[: source.subset]
        mean, std = targets[train].mean(0), targets[train].std(0).clip(min=1e-3)
        extra = {"fold": fold, "n_folds": n_folds}
    stats = stats or band_statistics(store, train, features)
    store.frames = to_resident(store.frames, source.device)
    whole = SpectrogramDataset(store, targets, features, stats)
    settings = extra | {
        "part": part,
        "features": features,
        "beat": beat,
        "merge": source.merge,
        "names": names,
        "stats": stats,
        "seed": source.seed,
        "subset": source.subset,
        "smoke": source.smoke,
        "fingerprint": fingerprint(source.root, part, beat),
    }
    crops = Subset(whole.variant(crop=crop), train)
    return Data(crops, Subset(whole, val), Subset(whole, held_out), names, mean, std, settings)


def split_ids(source, part, labels, fold=0, n_folds=1) -> tuple[list[str], list[str], list[str]]:
    """Ids of the training, validation and held-out clips of a part.

    labels : {id: label} of the clips that the network hears
    """
    folder = part_folder(source.root, part)
    order = labels
    if folder.is_dir():  # a data set may hold beats alone
        full = read_entries(source.root, part, "train", merge=source.merge)
        order = {entry.clip_id: entry.label for entry in full}
        odd = sorted(order.keys() ^ labels.keys())
        if odd and part == "emotion":
            raise InputError(
                f"{part_folder(source.root, part, True)}: clip {odd[0]} can be used in only one of "
                "the full and the beat-synchronised emotion data; take it out of both label files"
            )
    ids = np.array([*order, *(clip_id for clip_id in labels if clip_id not in order)])
    try:
        if part == "genre":
            classes = np.array([order.get(clip_id) or labels[clip_id] for clip_id in ids])
            train, val = split_indices(len(ids), VAL_FRACTION, source.seed, classes)
            return ids[train].tolist(), ids[val].tolist(), []
        n_splits = n_folds if n_folds > 1 else N_FOLDS
        if len(ids) < 4 * n_splits:
            fault = f"{len(ids)} clips are too few for {n_splits} folds"
            raise InputError(f"{fault}; add clips, at least {4 * n_splits} are needed")
        cut = KFold(n_splits, shuffle=True, random_state=source.seed).split(ids)
        known, held_out = next(itertools.islice(cut, fold, None))
        train, val = split_indices(len(known), VAL_FRACTION, source.seed)
    except InputError as error:
        raise InputError(f"{folder / 'train_labels.txt'}: {error}") from None
    return ids[known[train]].tolist(), ids[known[val]].tolist(), ids[held_out].tolist()


def take_subset(rows, targets, n) -> list[int]:
    """The first n of the training rows, but at least one clip of every class."""
    if not n or n >= len(rows):
        return rows
    first = list({targets[row]: row for row in reversed(rows)}.values())  # of each class
    first.sort(key=lambda row: targets[row])
    rest = [row for row in rows if row not in set(first)]
    return (first + rest)[: max(n, len(first))]


def fingerprint(root, part, beat=False) -> str | None:
    """What tells one data set from another: a hash of its training ids and labels, if any."""
    labels = part_folder(root, part, beat) / "train_labels.txt"
    if not labels.is_file():
        return None
    lines = labels.read_bytes().splitlines()
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()[:16]


def load_test(source, settings, split="test", *, beat=None) -> SpectrogramDataset:
    """Load a test split the way a trained network wants it; only after training.

    Genre clips have classes; the lab publishes no labels for the emotion clips, whose
    targets are NaN. Rows are sorted by id.

    Raises
    ------
    InputError
        A genre test clip is in the training split too (same id or same array).
    """
    part, beat = settings["part"], settings["beat"] if beat is None else beat
    merge, names = settings["merge"], settings["names"]
    entries = sorted(read_entries(source.root, part, split, beat, merge), key=lambda e: e.clip_id)
    store = load_clips(entries, source.skip_bad)
    if part == "genre":
        leaked = []
        for form in {beat, settings["beat"]}:  # what the network was trained on, in either form
            known = read_entries(source.root, part, "train", form, merge)
            leaked += find_leak(load_clips(known, source.skip_bad), store)
        if leaked and not source.allow_leak:
            fault = f"{len(leaked)} test clips are in the training split too, e.g. {leaked[0]}"
            cure = "remove them from one, or pass --allow-leak"
            raise InputError(f"{store.entries[0].path.parent}: {fault}; {cure}")
        targets = encode_labels(store.entries, names)
    else:
        targets = np.full((len(store.entries), len(names)), math.nan, dtype=np.float32)
    store.frames = to_resident(store.frames, source.device)
    return SpectrogramDataset(store, targets, settings["features"], settings["stats"])


def find_leak(train, test) -> list[str]:
    """Ids of test clips that the training clips hold too, by id or by content."""
    ids, digests = {entry.clip_id for entry in train.entries}, set(train.digests)
    return [
        entry.clip_id
        for entry, digest in zip(test.entries, test.digests, strict=True)
        if entry.clip_id in ids or digest in digests
    ]


def clip_ids(dataset) -> list[str]:
    """Ids of a SpectrogramDataset's clips, or of a Subset of it, row by row."""
    if isinstance(dataset, Subset):
        ids = clip_ids(dataset.dataset)
        return [ids[index] for index in dataset.indices]
    return [entry.clip_id for entry in dataset.store.entries]


# ======================================================================================
# 4. Batches: loader, residence, augmentation on the device
# ======================================================================================


def to_resident(frames, device) -> torch.Tensor:
    """Move all frames onto the GPU where they fit in half of its free memory.

    The lab's 5,331 clips take 1.9 GB in half precision, so batches are then cut on the
    GPU and nothing is copied while training.
    """
    device = torch.device(device)
    if device.type == "cuda" and frames.nbytes < torch.cuda.mem_get_info()[0] / 2:
        return frames.to(device)
    return frames


@dataclasses.dataclass
class Augment:
    """Random changes of a training batch, drawn on the device; off where 0.

    mixup : float
        Alpha of the Beta distribution of the mixing weight (Zhang et al., 2018, mixup).
    shift_bands : int
        Move the mel bands up or down by up to this many: roughly a change of pitch. Chroma
        rows stay as they are.
    mask_bands, mask_frames : int
        Widest stripe that is set to the mean (Park et al., 2019, SpecAugment).
    """

    mixup: float = 0.3
    shift_bands: int = 2
    mask_bands: int = 16
    mask_frames: int = 38
    n_classes: int = 0  # > 0: targets are class numbers and become probabilities

    def __call__(self, x, targets):
        """x (B, T, F), targets (B,) or (B, 3) -> the same, changed; classes as (B, K)."""
        if self.n_classes:
            targets = nn.functional.one_hot(targets, self.n_classes).float()
        if self.shift_bands and x.shape[2] >= N_MELS:
            furthest = self.shift_bands
            shift = torch.randint(-furthest, furthest + 1, (len(x), 1), device=x.device)
            row = torch.arange(x.shape[2], device=x.device)
            moved = torch.where(row < N_MELS, (row + shift).clamp(0, N_MELS - 1), row)  # (B, F)
            x = x.gather(2, moved[:, None].expand_as(x))
        for dim, widest in ((1, self.mask_frames), (2, self.mask_bands)):
            if widest:
                x = mask_stripe(x, dim, min(widest, x.shape[dim] // 4))
        if self.mixup:
            weight = torch.distributions.Beta(self.mixup, self.mixup).sample((len(x),)).to(x.device)
            weight = torch.maximum(weight, 1 - weight)  # the clip itself keeps the larger share
            other = torch.randperm(len(x), device=x.device)
            x = x[other].lerp_(x, weight[:, None, None])
            weight = weight.view(-1, *[1] * (targets.dim() - 1))
            targets = torch.lerp(targets[other], targets, weight)
        return x, targets


def mask_stripe(x, dim, widest):
    """Set one random stripe per clip, up to `widest` wide along `dim` (1 or 2), to 0 (the mean)."""
    size = x.shape[dim]
    width = torch.rand(len(x), 1, device=x.device) * widest
    start = torch.rand(len(x), 1, device=x.device) * (size - width)
    position = torch.arange(size, device=x.device)
    stripe = (position >= start) & (position < start + width)  # (B, size)
    return x.masked_fill(stripe.unsqueeze(3 - dim), 0.0)


# ======================================================================================
# 5. Models: a backbone turns a clip into one vector, a head turns it into an answer
# ======================================================================================


def time_mask(lengths, n_steps, device) -> torch.Tensor:
    """(B, S, 1) float mask: 1 within each clip, 0 in its padding."""
    return (torch.arange(n_steps) < lengths[:, None]).unsqueeze(2).to(device, torch.float32)


class Backbone(nn.Module):
    """What both backbones share: `blocks`, of which the first ones can be frozen.

    `stem` is what comes before the first block and is frozen with it.
    """

    n_frozen = 0

    def freeze(self, n) -> None:
        """Keep the first n blocks as they are, batch normalisation included (step 9)."""
        self.n_frozen = n
        for module in self.frozen():
            module.requires_grad_(False)
        self.train()

    def frozen(self) -> list:
        return [self.stem, *self.blocks[: self.n_frozen]] if self.n_frozen else []

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen():
            module.eval()  # a frozen block must not follow the new batches' statistics
        return self


class LSTMBackbone(Backbone):
    """LSTM over a spectrogram -> one vector per clip.

    Parameters
    ----------
    n_bands : int
        F, bands of a frame.
    hidden_size : int
        H, units of one direction.
    frames_per_step : int
        Frames described by one step, see `frame_statistics`. 1,293 steps are slow and the
        gradient does not survive them (step 2 measures both); 8 frames are 0.19 s. 1: the
        frames as they are.
    projection : int
        Units of a dense layer with layer normalisation before the LSTM; 0: none.
    mask_bands : int
        While training, blank a stripe of up to so many bands, and of up to 15% of the
        steps; 0: none.
    readout : 'pool' or 'last'
        Mean and maximum over the clip's steps, or the last step of the clip: never the
        last step of the padding.
    """

    def __init__(
        self,
        n_bands,
        hidden_size=128,
        n_layers=1,
        bidirectional=True,
        dropout=0.3,
        frames_per_step=1,
        projection=0,
        mask_bands=0,
        readout="pool",
    ):
        super().__init__()
        self.config = {
            "n_bands": n_bands,
            "hidden_size": hidden_size,
            "n_layers": n_layers,
            "bidirectional": bidirectional,
            "dropout": dropout,
            "frames_per_step": frames_per_step,
            "projection": projection,
            "mask_bands": mask_bands,
            "readout": readout,
        }
        self.frames_per_step, self.readout = frames_per_step, readout
        n_inputs = n_bands if frames_per_step == 1 else 3 * n_bands
        stem = []
        if frames_per_step > 1:  # a spread or a change is no standardised number yet
            stem.append(StepNorm(n_inputs, affine=False))
        if mask_bands:
            stem.append(StripeMask(n_bands, mask_bands))
        if projection:
            stem += [nn.Linear(n_inputs, projection), nn.LayerNorm(projection), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        n_directions = 2 if bidirectional else 1
        # One nn.LSTM per layer and direction: the backward ones read the reversed clip, so
        # that they start at its end and not in the padding. (Packed sequences do the same
        # and are four times slower on a CPU.)
        sizes = [projection or n_inputs] + [hidden_size * n_directions] * (n_layers - 1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for _ in range(n_directions))
            for size in sizes
        )
        self.dropout = nn.Dropout(dropout)
        self.feature_size = hidden_size * n_directions * (2 if readout == "pool" else 1)

    def forward(self, x, lengths):
        """x (B, T, F), lengths (B,) on the CPU -> (B, feature_size)."""
        describe = frame_statistics if self.config["frames_per_step"] > 1 else average_frames
        x, lengths = describe(x, lengths, self.frames_per_step)  # (B, S, 3 F) or (B, S, F)
        x = self.stem(x)
        for index, layer in enumerate(self.blocks):
            x = self.dropout(x) if index else x
            outputs = [layer[0](x)[0]]
            if len(layer) == 2:
                outputs.append(reverse(layer[1](reverse(x, lengths))[0], lengths))
            x = torch.cat(outputs, dim=2)  # (B, S, H * directions)
        if self.readout == "last":
            # The last step of the clip forwards; backwards that direction ends at step 0.
            forward_h, *backward_h = x.chunk(len(self.blocks[0]), dim=2)
            last = forward_h[torch.arange(len(x), device=x.device), (lengths - 1).to(x.device)]
            return torch.cat([last] + [h[:, 0] for h in backward_h], dim=1)  # (B, H * directions)
        mask = time_mask(lengths, x.shape[1], x.device)
        return masked_mean_max(x, mask)  # (B, 2 * H * directions)


class StepNorm(nn.BatchNorm1d):
    """Batch normalisation of (B, S, F): every feature over all steps of the batch."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


class StripeMask(nn.Module):
    """SpecAugment (Park et al., 2019) on the steps of an LSTM; like dropout, only in training.

    On steps and not on frames: a stripe cut through the frames of a step would also be a
    spread and a change that no music has.
    """

    def __init__(self, n_bands, widest, share_of_steps=0.15):
        super().__init__()
        self.n_bands, self.share_of_steps = n_bands, share_of_steps
        self.widest = min(widest, n_bands // 4)

    def forward(self, x):
        """(B, S, n_bands) or, as `frame_statistics` gives them, (B, S, 3 n_bands)."""
        if not (self.training and self.widest):
            return x
        # The same stripe of bands in means, spreads and changes.
        bands = mask_stripe(x.reshape(len(x), -1, self.n_bands), 2, self.widest)
        return mask_stripe(bands.view_as(x), 1, self.share_of_steps * x.shape[1])


def average_frames(x, lengths, n) -> tuple[torch.Tensor, torch.Tensor]:
    """Average every n frames: (B, T, F) -> (B, ceil(T / n), F); padding does not count."""
    if n == 1:
        return x, lengths
    n_steps = math.ceil(x.shape[1] / n)
    if missing := n_steps * n - x.shape[1]:
        # Zeros after the end, as in all padding here, so sums are of a step's real frames.
        x = nn.functional.pad(x, (0, 0, 0, missing))
    x = x.unflatten(1, (n_steps, n))
    counts = (lengths[:, None] - n * torch.arange(n_steps)).clamp(1, n)  # (B, S) real frames
    n_steps = torch.div(lengths + n - 1, n, rounding_mode="floor")
    return x.sum(2) / counts.unsqueeze(2).to(x), n_steps


def frame_statistics(x, lengths, n) -> tuple[torch.Tensor, torch.Tensor]:
    """Describe every n frames: (B, T, F) -> (B, ceil(T / n), 3 F).

    Mean, standard deviation and mean absolute change from frame to frame of each band,
    which are also what the classical floor hears of a whole clip (`band_features`).
    """
    mean, n_steps = average_frames(x, lengths, n)
    square, _ = average_frames(x.square(), lengths, n)
    change = nn.functional.pad(x.diff(dim=1), (0, 0, 1, 0)).abs_()
    if (lengths < x.shape[1]).any():
        change = change * time_mask(lengths, x.shape[1], x.device)  # none into the padding
    change, _ = average_frames(change, lengths, n)
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt(), change], dim=2), n_steps


def reverse(x, lengths):
    """Turn each clip of (B, S, F) around within its own length; padding stays behind it."""
    t = torch.arange(x.shape[1])
    if (lengths == len(t)).all():  # crops, mostly; needs no index
        return x.flip(1)
    order = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t).to(x.device)  # (B, S)
    return x.gather(1, order.unsqueeze(2).expand_as(x))


def masked_mean_max(x, mask):
    """Mean and maximum over the clip's own steps: (B, S, D), (B, S, 1) -> (B, 2 D)."""
    mean = (x * mask).sum(1) / mask.sum(1)
    highest = x.masked_fill(mask == 0, -torch.inf).amax(1)
    return torch.cat([mean, highest], dim=1)


class CNNBackbone(Backbone):
    """Four blocks of convolution, batch normalisation, ReLU, max pooling (lab, step 7b).

    The spectrogram is an image of one channel. What the blocks leave is pooled over time
    only; the 8 rows left of the frequency axis go with the channels into the vector:
    pooled over both axes the network scored lower (docs/experiments.md). No size depends on
    the clip's length, and padding is cut off after every block, so that a clip gives the
    same vector however far it is padded.

    Parameters
    ----------
    n_bands : int
        F, at least 16 (four poolings by 2).
    channels : sequence of 4 ints
    kernel_size : int, odd
    frames_per_step : int
        Frames averaged into one column of the image: 2 are 46 ms, half of what the lab's
        FFT window spans anyway.
    first_pool : int
        Columns that the first block pools in time; bands, and all else later, are pooled
        by 2. So the first block sees events of 46 ms, and the later, costlier blocks work on
        a quarter of the columns.
    """

    def __init__(
        self,
        n_bands=N_MELS,
        channels=(16, 32, 64, 128),
        kernel_size=3,
        frames_per_step=2,
        first_pool=4,
    ):
        super().__init__()
        self.config = {
            "n_bands": n_bands,
            "channels": list(channels),
            "kernel_size": kernel_size,
            "frames_per_step": frames_per_step,
            "first_pool": first_pool,
        }
        self.frames_per_step, self.stem = frames_per_step, nn.Identity()

        def block(c_in, c_out, pool):
            padding = kernel_size // 2
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, kernel_size, padding=padding, bias=False),  # the norm's does
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
                nn.MaxPool2d((pool, 2)),  # time, bands
            )

        self.pools = [first_pool, 2, 2, 2]  # in time
        sizes = zip([1, *channels[:-1]], channels, self.pools, strict=True)
        self.blocks = nn.ModuleList(itertools.starmap(block, sizes))
        self.feature_size = 2 * channels[-1] * (n_bands // 2 ** len(channels))
        self.to(memory_format=torch.channels_last)  # what convolutions compute fastest in

    def forward(self, x, lengths):
        """x (B, T, F), lengths (B,) on the CPU -> (B, feature_size)."""
        x, lengths = average_frames(x, lengths, self.frames_per_step)
        shortest = math.prod(self.pools)
        if x.shape[1] < shortest:
            x = nn.functional.pad(x, (0, 0, 0, shortest - x.shape[1]))
        x = x.unsqueeze(1)  # (B, 1, T, F)
        for block, pool in zip(self.blocks, self.pools, strict=True):
            x = block(x)
            lengths = torch.div(lengths, pool, rounding_mode="floor").clamp(min=1)
            mask = time_mask(lengths, x.shape[2], x.device)  # (B, T, 1)
            if (lengths < x.shape[2]).any():
                x = x * mask.unsqueeze(1)
        x = x.transpose(1, 2).flatten(2).float()  # (B, T, C * F)
        return masked_mean_max(x, mask)


class Classifier(nn.Module):
    """Backbone -> logits, one per class."""

    def __init__(self, backbone, n_classes, dropout=0.4):
        super().__init__()
        self.backbone, self.config = backbone, {"n_classes": n_classes, "dropout": dropout}
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(backbone.feature_size, n_classes))

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> logits (B, K)."""
        return self.head(self.backbone(x, lengths))


def small_linear(n_inputs) -> nn.Linear:
    """One output that starts close to 0, that is, at the mean of the labels."""
    layer = nn.Linear(n_inputs, 1)
    nn.init.normal_(layer.weight, std=0.1 / math.sqrt(n_inputs))
    nn.init.zeros_(layer.bias)
    return layer


class Regressor(nn.Module):
    """Backbone -> one or several emotion values per clip, in the labels' own units.

    Parameters
    ----------
    names : sequence of K str
        The emotions, one output layer each.
    mean, std : sequences of K floats
        Of the training labels: the network works on standardised values, its output does not.
    """

    def __init__(self, backbone, names, mean, std, dropout=0.4):
        super().__init__()
        mean, std = (np.asarray(value, dtype=float).tolist() for value in (mean, std))
        self.backbone = backbone
        self.config = {"names": list(names), "mean": mean, "std": std, "dropout": dropout}
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict({name: small_linear(backbone.feature_size) for name in names})
        for name, value in (("mean", mean), ("std", std)):  # buffers go along to the device
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, K)."""
        vector = self.dropout(self.backbone(x, lengths))
        z = torch.cat([head(vector) for head in self.heads.values()], dim=1)  # (B, K)
        return self.mean + self.std * z


MODELS = {model.__name__: model for model in (LSTMBackbone, CNNBackbone, Classifier, Regressor)}


def model_spec(model) -> dict:
    """What is needed to build the model again, in plain values."""
    backbone = model.backbone
    head = {"head": type(model).__name__, "head_args": model.config}
    return head | {"backbone": type(backbone).__name__, "backbone_args": backbone.config}


def build_model(spec) -> nn.Module:
    """Build an untrained model from `model_spec`."""
    backbone = MODELS[spec["backbone"]](**spec["backbone_args"])
    return MODELS[spec["head"]](backbone, **spec["head_args"])


def count_weights(model) -> int:
    return sum(weights.numel() for weights in model.parameters())


# ======================================================================================
# 6. Losses
# ======================================================================================


def regression_loss(outputs, targets, std) -> torch.Tensor:
    """Squared error in units of the labels' spread, plus half of 1 - Pearson's r.

    The first term fits the values; the second rewards answers that rise linearly with the
    labels, a differentiable stand-in for the ranks that Spearman's score judges. (Atmaja &
    Akagi, 2020, found a correlation-based loss, CCC, above squared error for speech emotion,
    scored by CCC; this sum is not theirs.)

    outputs, targets : torch.Tensor [shape=(B,)]
    std : float, of the training labels of this emotion
    """
    refuse_unlike(outputs, targets)
    error = ((outputs - targets) / std).square().mean()
    if len(outputs) < 3:  # a correlation of two points says nothing
        return error
    a, b = outputs - outputs.mean(), targets - targets.mean()
    pearson = (a * b).sum() / (a.square().sum() * b.square().sum()).clamp(min=1e-12).sqrt()
    return error + 0.5 * (1 - pearson)


def refuse_unlike(outputs, targets) -> None:
    """(B, 1) against (B,) would give a B x B matrix of differences, without a word."""
    if outputs.shape != targets.shape:
        shapes = f"outputs {tuple(outputs.shape)} against targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes} would broadcast")


class RegressionLoss(nn.Module):
    """Sum of the regression losses of K emotions (lab, step 8a for one, step 10b for three).

    Each squared error is divided by the variance of that emotion's training labels, which
    brings the losses into one order of magnitude. With `learned`, each loss L has a weight
    besides, and L exp(-s) / 2 + s / 2 is minimised over s too: at the minimum exp(s) = L,
    so an emotion that is predicted worse counts for less (after Kendall et al., 2018, eq. 7,
    who derive it for squared errors).
    """

    def __init__(self, std, learned=False):
        super().__init__()
        self.std = [float(value) for value in std]
        self.log_var = nn.Parameter(torch.zeros(len(self.std)), requires_grad=learned)

    def terms(self, outputs, targets):
        """outputs, targets (B, K) -> (K,) losses, one per emotion, before they are summed."""
        refuse_unlike(outputs, targets)
        columns = zip(outputs.T, targets.T, self.std, strict=True)
        return torch.stack([regression_loss(*column) for column in columns])

    def forward(self, outputs, targets):
        """outputs, targets (B, K) -> scalar."""
        losses = self.terms(outputs, targets)
        if self.log_var.requires_grad:
            losses = (torch.exp(-self.log_var) * losses + self.log_var) / 2
        return losses.sum()


# ======================================================================================
# 7. Train and evaluate
# ======================================================================================


class Network(NamedTuple):
    """One kind of network of the lab and what it hears."""

    kind: str  # 'lstm' or 'cnn'
    features: str  # 'mel', 'chroma' or 'fused' (both)
    beat: bool = False
    plain: bool = False  # the textbook LSTM: every frame, one direction, last step

    @property
    def n_bands(self) -> int:
        return BANDS[self.features].stop - BANDS[self.features].start


GENRE_NETWORKS = {  # the runs of steps 5 and 7, which steps 6, 8, 9, 10 and 11 go on from
    "mel": Network("lstm", "mel"),
    "beat_mel": Network("lstm", "mel", beat=True),
    "chroma": Network("lstm", "chroma"),
    "beat_chroma": Network("lstm", "chroma", beat=True),
    "fused": Network("lstm", "fused"),
    "beat_fused": Network("lstm", "fused", beat=True),
    "cnn_mel": Network("cnn", "mel"),
    "plain_mel": Network("lstm", "mel", plain=True),
}
LSTM_NAMES = [name for name, net in GENRE_NETWORKS.items() if net.kind == "lstm" and not net.plain]


def make_backbone(network) -> nn.Module:
    """The untrained backbone of a network of the lab."""
    n_bands = network.n_bands
    if network.kind == "cnn":
        return CNNBackbone(n_bands)
    if network.plain:
        return LSTMBackbone(n_bands, bidirectional=False, n_layers=2, readout="last")
    frames_per_step = 1 if network.beat else 8
    return LSTMBackbone(n_bands, frames_per_step=frames_per_step, projection=128, mask_bands=16)


class Budget(NamedTuple):
    """How much a kind of network is shown.

    The CNN's numbers and the LSTM's for genre were set near what cross-validation tried
    (docs/experiments.md), the others by judgement.
    """

    crop: int  # frames of a training example, and of a window when scoring
    genre: int  # training examples in all: the epochs follow from the number of clips
    emotion: int
    most_passes: int  # over a very small set


BUDGETS = {
    "lstm": Budget(crop=640, genre=30_000, emotion=10_000, most_passes=80),  # 15 s
    "cnn": Budget(crop=256, genre=100_000, emotion=20_000, most_passes=275),  # 6 s
}


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How a step trains and where it looks for what others have trained: what its flags say."""

    source: Source
    out: Path  # folder of all steps' outputs
    folder: Path  # this step's
    epochs: int | None = None
    batch_size: int = 32
    lr: float = 2e-3
    resume: bool = False
    deadline: float = math.inf  # when --max-minutes are over, as time.time() tells it
    workers: int | None = None  # processes that train side by side; None: see `count_workers`

    smoke = property(lambda self: self.source.smoke)


@dataclasses.dataclass
class Recipe:
    """How to train: the numbers of one training run."""

    epochs: int
    lr: float = 2e-3  # highest rate of the one-cycle schedule
    batch_size: int = 32
    crops: int = 1  # of a clip per epoch
    window: int | None = None  # frames of a window when scoring; None: the whole clip
    augment: Augment | None = None
    ema: float = 0.99  # decay per step of the averaged weights; 0: none
    warm_up: float = 0.1  # share of the steps in which the rate rises
    settled: float = 0.2  # the last share of the epochs, of which the best one is kept


def make_recipe(network, data, training, share=1.0) -> Recipe:
    """Plan a training: --epochs, --batch-size and --lr where given, else the network's budget.

    A small data set gets more passes, up to the budget's limit, so that as many examples are
    shown in all; a large one at least 20. Where that takes more than 60, an epoch shows each
    clip several times (another random crop each, where the network hears crops): validation
    comes after each epoch, and takes about a twentieth of a CNN's training where an epoch shows
    each clip five times.

    share : of the budget, e.g. of a fine-tuning
    """
    budget, n_clips = BUDGETS[network.kind], len(data.train)
    genre = data.settings["part"] == "genre"
    epochs, crops = training.epochs or (2 if training.smoke else None), 1
    if epochs:
        epochs = max(round(epochs * share), 1)
    else:
        examples = (budget.genre if genre else budget.emotion) * share
        passes = min(max(examples / n_clips, 20 * share), budget.most_passes * share)
        crops = math.ceil(passes / 60)
        epochs = max(round(passes / crops), 1)
    return Recipe(
        epochs,
        training.lr,
        training.batch_size,
        crops,
        window=window_size(network),
        augment=make_augment(network, len(data.names) if genre else 0),
        ema=0.0 if network.plain else 0.99,
    )


def window_size(network) -> int | None:
    """Frames that a network hears at once; None: whole clips, of beats or for the textbook."""
    return None if network.beat or network.plain else BUDGETS[network.kind].crop


def make_augment(network, n_classes=0) -> Augment | None:
    """Random changes of batches. An LSTM masks by itself.

    Mixup was a tie for both in cross-validation; the CNN keeps it, the LSTM does without.
    """
    if network.plain:
        return None
    if network.kind == "cnn":
        return Augment(n_classes=n_classes)
    return Augment(mixup=0.0, mask_bands=0, mask_frames=0, n_classes=n_classes)


# --------------------------------------------------------------------------------------
# One training
# --------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainedModel:
    """A trained network and how it came about.

    model : nn.Module, holding the epoch that was kept
    settings : dict, what its checkpoint holds to judge new clips
    facts : dict for metrics.json: epochs, best_epoch, weights, n_train, val ...
    history : pd.DataFrame, a row per epoch
    path : Path of the checkpoint
    """

    model: nn.Module
    settings: dict
    facts: dict
    history: pd.DataFrame
    path: Path


UNFINISHED = "unfinished"  # a file in the folder of a run that is being trained


def train(
    model,
    data,
    loss_fn,
    optimizer,
    recipe,
    folder,
    *,
    device="cpu",
    resume=False,
    max_seconds=math.inf,
) -> TrainedModel:
    """Train a network, genre or emotion, and keep the best of its last epochs.

    One-cycle learning rate (with Adam's beta1 against it, .95 to .85, torch's default), gradients
    clipped to norm 1, running average of the weights. After each epoch the averaged weights are
    scored on the validation part; the best of the last fifth of the epochs are kept in
    ``folder/best.pt`` (of a run cut short: the best so far), the state to go on from in
    ``folder/last.pt``, the curve in ``folder/history.csv``.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(x, lengths)``; frozen weights need no gradient.
    loss_fn : nn.Module
        (outputs, targets) -> scalar tensor; may have weights of its own to learn.
    optimizer : torch.optim.Optimizer, of the model's and the loss's weights
    resume : bool
        Go on from ``last.pt`` if it is there.
    max_seconds : float
        No epoch is begun that would end later than this; one epoch always runs.

    Raises
    ------
    StepFailed
        The loss became NaN or infinite (epoch, batch and rate are named), or memory ran out.
    """
    make_folder(folder)
    shown = Subset(data.train.dataset, data.train.indices * recipe.crops)
    train_loader = DataLoader(shown, recipe.batch_size, shuffle=True)
    val_loader = DataLoader(data.val, recipe.batch_size)
    settings = data.settings | {"window": recipe.window, "run": folder.name}
    facts = {
        "planned_epochs": recipe.epochs,
        "lr": recipe.lr,
        "batch_size": recipe.batch_size,
        "examples_per_epoch": len(shown),
        "n_train": len(data.train),
        "n_val": len(data.val),
        "weights": count_weights(model),
        "trained_weights": sum(w.numel() for w in model.parameters() if w.requires_grad),
    }
    n_steps = recipe.epochs * len(train_loader)
    rates = [group["lr"] for group in optimizer.param_groups]
    # Where the warm-up is exactly one step, OneCycleLR divides by zero.
    warm_up = recipe.warm_up * (1.5 if abs(recipe.warm_up * n_steps - 1) < 1e-6 else 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=n_steps, pct_start=warm_up
    )
    decay = max(0.0, min(recipe.ema, 1 - 10 / n_steps))  # a short run must forget its start too
    parts = training_parts(model, loss_fn, optimizer, schedule, decay, device)
    average = parts["average"]
    first_settled = recipe.epochs - max(1, round(recipe.settled * recipe.epochs)) + 1
    history, best = [], (-math.inf, -math.inf)
    if resume and (folder / "last.pt").exists():
        history, best = restore_training(folder / "last.pt", parts, recipe, settings)
        print(f"{folder.name}: going on after epoch {len(history)} of {recipe.epochs}")
    elif not resume:  # stopped in its first epoch, a new run must not go on as the old one
        (folder / "last.pt").unlink(missing_ok=True)
    # While this mark is there, no step takes the network for a finished one.
    write_text(folder / UNFINISHED, "")
    began = time.monotonic()
    for epoch in range(len(history) + 1, recipe.epochs + 1):
        epoch_began = time.monotonic()
        lr = schedule.get_last_lr()[0]
        with advice_on_memory(device, recipe.batch_size):
            train_loss = train_epoch(train_loader, parts, recipe, device, epoch)
            # As few windows as cover the clip: half the time that the test's take.
            outputs, targets = predict(average, val_loader, device, recipe.window, overlap=False)
            val_loss = loss_fn(outputs.to(device), targets.to(device)).item()
        score = validation_score(outputs, targets, settings)
        # Compared from minus infinity, the loss only breaking ties, so something is always kept.
        # Once the rate is low, the choice begins anew: an earlier epoch that did better was the
        # best of many, partly by chance (docs/experiments.md).
        rank = (score, -val_loss)
        kept = epoch == first_settled or rank > best
        if kept:
            best = rank
            save_checkpoint(folder / "best.pt", average.module, settings,
                            epoch=epoch, val_score=score, facts=facts)  # fmt: skip
        seconds = time.monotonic() - epoch_began
        row = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "val_loss": val_loss}
        row |= {"val_score": score, "settled": int(epoch >= first_settled), "kept": int(kept)}
        history.append(row | {"seconds": seconds})
        write_text(folder / "history.csv", pd.DataFrame(history).to_csv(index=False))
        # Last of the three: what it says is done is never missing from the others, whenever
        # the process is killed.
        save_torch(folder / "last.pt", training_state(parts, recipe, settings, history, best))
        scores = f"train loss {train_loss:.4f}  val loss {val_loss:.4f}  val score {score:.4f}"
        line = f"{folder.name} epoch {epoch:3d}/{recipe.epochs}  {scores}  {seconds:.1f} s"
        print(line, flush=True)
        if epoch < recipe.epochs and time.monotonic() - began + seconds > max_seconds:
            done = f"{epoch} of {recipe.epochs} epochs"
            print(f"{folder.name}: time is up after {done}; scoring the best of them")
            break
    (folder / UNFINISHED).unlink()
    checkpoint = load_checkpoint(folder / "best.pt")
    model.load_state_dict(checkpoint["state"])
    return trained_model(model, checkpoint, folder / "best.pt")


def training_parts(model, loss_fn, optimizer, schedule, decay, device) -> dict:
    """All that changes while a network is trained; decay : of the averaged weights."""
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )
    kind = torch.device(device).type
    return {
        "model": model,
        "average": average,
        "loss": loss_fn,
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": torch.amp.GradScaler(kind, enabled=fast_dtype(kind) == torch.float16),
    }


def trained_model(model, checkpoint, path) -> TrainedModel:
    """The Fit of a network and its checkpoint, with the facts of its training."""
    settings, curve = checkpoint["settings"], path.with_name("history.csv")
    history = pd.read_csv(curve) if curve.exists() else pd.DataFrame({"seconds": []})
    facts = checkpoint["facts"] | {
        "epochs": len(history) or checkpoint["epoch"],
        "best_epoch": checkpoint["epoch"],
        "train_seconds": float(history["seconds"].sum()),
        "val": {score_name(settings): checkpoint["val_score"]},
    }
    return TrainedModel(model, settings, facts, history, path)


def load_trained(path, device="cpu") -> TrainedModel:
    """What `train` has left in a folder: the kept network and the facts of its training."""
    return trained_model(*load_model(path, device), path)


@contextlib.contextmanager
def advice_on_memory(device, batch_size):
    """Turn running out of memory into one line that says what to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        smaller = max(batch_size // 2, 2)
        fault = f"{device} ran out of memory with batches of {batch_size} clips"
        raise StepFailed(f"{fault}; try --batch-size {smaller}") from None


def train_epoch(loader, parts, recipe, device, epoch) -> float:
    """One pass over the training clips; returns the mean loss."""
    names = ("model", "loss", "optimizer", "schedule", "scaler")
    model, loss_fn, optimizer, schedule, scaler = (parts[name] for name in names)
    model.train()  # the caller may have left the network in evaluation mode
    losses, rates, fast = [], [], half_precision(device)
    bar = tqdm(loader, desc=f"epoch {epoch}", disable=not show_bars(), leave=False)
    for x, targets, lengths in bar:  # x (B, T, F)
        x, targets = x.to(device), targets.to(device)
        if recipe.augment:
            x, targets = recipe.augment(x, targets)
        with fast:
            outputs = model(x, lengths)
        loss = loss_fn(outputs.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # before clipping, which must see the true gradients
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
        parts["average"].update_parameters(model)
        losses.append(loss.detach())
    losses = torch.stack(losses).cpu()  # one wait for the GPU per epoch, not one per batch
    if not losses.isfinite().all():
        batch = int((~losses.isfinite()).nonzero()[0])
        where = f"epoch {epoch}, batch {batch + 1}, learning rate {rates[batch]:.2g}"
        fault = f"loss is {losses[batch]:.3g} at {where}"
        raise StepFailed(f"{fault}; the best epoch so far is kept, try a smaller --lr")
    return float(losses.mean())


def show_bars() -> bool:
    """Progress bars belong on terminals and in notebooks; logs get a line per epoch."""
    is_worker = multiprocessing.current_process().name != "MainProcess"  # lines, then
    return in_notebook() or (sys.stderr.isatty() and not is_worker)


def half_precision(device):
    """Context in which matrix work runs in the device's fast format."""
    kind = torch.device(device).type
    dtype = fast_dtype(kind)
    return torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32)


@torch.inference_mode()
def predict(model, loader, device="cpu", window=None, overlap=True):
    """Run a model over a loader's clips, in evaluation mode.

    Parameters
    ----------
    window : int or None
        Cut each clip into windows of this many frames and average their outputs; None:
        the whole clip at once.
    overlap : bool
        2 W - 1 windows that overlap by half or more instead of W; cross-validation showed no
        gain that can be measured.

    Returns
    -------
    outputs : torch.Tensor [shape=(N, ...)], float32, on the CPU
    targets : torch.Tensor [shape=(N,) or (N, K)], on the CPU
    """
    model.eval()
    outputs, targets, fast = [], [], half_precision(device)
    for x, y, lengths in loader:
        x = x.to(device)
        n_clips = len(x)
        if window and x.shape[1] > window:
            x, lengths = cut_windows(x, lengths, window, overlap)
        # 128 at once: the activations of 700 windows are gigabytes, on a CPU four times slower.
        batches = zip(x.split(128), lengths.split(128), strict=True)
        with fast:
            out = torch.cat([model(part, n).float() for part, n in batches])
        outputs.append(out.unflatten(0, (n_clips, -1)).mean(1).cpu())
        targets.append(y.cpu())
    return torch.cat(outputs), torch.cat(targets)


def window_starts(lengths, window, overlap=True) -> torch.Tensor:
    """(B,) -> (B, W): where W windows begin that are spread evenly over each clip."""
    n_windows = math.ceil(int(lengths.max()) / window)
    n_windows = 2 * n_windows - 1 if overlap else n_windows
    last = (lengths - window).clamp(min=0)  # (B,)
    return (last[:, None] * torch.linspace(0, 1, n_windows)).long()


def cut_windows(x, lengths, window, overlap=True) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, F) -> (B * W, window, F): the windows of `window_starts`, and their lengths."""
    starts = window_starts(lengths, window, overlap)  # (B, W)
    rows = starts[:, :, None] + torch.arange(window)  # (B, W, window)
    clips = torch.arange(len(x))[:, None, None]
    cut = x[clips.to(x.device), rows.to(x.device)].flatten(0, 1)
    return cut, lengths.clamp(max=window).repeat_interleave(starts.shape[1])


def adjust_logits(logits, priors, strength=0.5):
    """Logit adjustment: subtract half the log of each class's share of the training clips.

    That raises rare classes most: a network answers a common class more readily because it
    was common in training, which macro-F1 does not reward. Menon et al. (2021, Long-tail
    learning via logit adjustment) subtract all of it, for the balanced error; half of it was
    chosen in cross-validation, where it gained the CNNs .018 macro-F1 and the LSTMs nothing
    (docs/experiments.md).

    logits (N, K); priors : sequence of K floats, of the training part
    """
    return logits - strength * torch.tensor(priors).log()


def score_name(settings) -> str:
    """Name of the score that chooses among epochs, as metrics.json has it."""
    if settings["part"] == "genre":
        return "macro_f1"
    return settings["names"][0] if len(settings["names"]) == 1 else "mean_spearman"


def validation_score(outputs, targets, settings) -> float:
    """Macro-F1, in which small classes count fully, or Spearman's correlation (their mean)."""
    if settings["part"] == "genre":
        answers = adjust_logits(outputs, settings["priors"]).argmax(1)
        return macro_f1(targets.numpy(), answers.numpy(), outputs.shape[1])
    return float(np.mean([spearman(t, o) for t, o in zip(targets.T, outputs.T, strict=True)]))


def predict_clips(model, dataset, settings, device="cpu") -> pd.DataFrame:
    """What a network answers for every clip: a row per clip id, a column per class or emotion.

    For genre log-probabilities after logit adjustment, for emotion values.
    """
    outputs, _ = predict(model, DataLoader(dataset, 64), device, settings["window"])
    if settings["part"] == "genre":
        outputs = adjust_logits(outputs, settings["priors"]).log_softmax(1)
    return pd.DataFrame(outputs.numpy(), clip_ids(dataset), settings["names"])


def true_labels(dataset, settings) -> pd.Series | pd.DataFrame:
    """True class names, or true emotion values (a column each), by clip id."""
    rows = dataset.indices if isinstance(dataset, Subset) else slice(None)
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    targets = whole.targets[rows].numpy()
    if settings["part"] == "genre":
        return pd.Series(np.array(settings["names"])[targets], clip_ids(dataset))
    return pd.DataFrame(targets, clip_ids(dataset), settings["names"])


def average_predictions(frames) -> pd.DataFrame:
    """Mean of several tables of answers, clip by clip, of the clips that all of them have."""
    frames = list(frames)
    return (sum(frames[1:], frames[0]) / len(frames)).dropna()  # pandas adds by clip id


@dataclasses.dataclass
class Check:
    """What `overfit` found. facts: batches, clips, passes, loss, accuracy (None: regression)."""

    learned: bool
    facts: dict
    history: pd.DataFrame


def overfit(
    model, data, loss_fn, *, lr=2e-3, batch_size=32, device="cpu", n_batches=4, limit=300, goal=0.01
) -> Check:
    """Learn a few fixed batches by heart, without regularisation (lab, step 5b).

    Where a network cannot bring the loss to 0 on four batches, most likely gradients, loss
    or learning rate are at fault (Karpathy, 2019, A Recipe for Training Neural Networks).
    Wrong labels it does not find: they can be learned by heart too. The batches are crops, as
    in training, drawn once; each pass is `train_epoch`, the loop of every training, with
    plain Adam at a constant rate.
    """
    loader = DataLoader(data.train, batch_size, shuffle=True)
    batches = list(itertools.islice(loader, n_batches))
    model, loss_fn = model.to(device), loss_fn.to(device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, StripeMask):
            module.widest = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    parts = training_parts(model, loss_fn, optimizer, schedule, 0.0, device)
    recipe = Recipe(limit, lr, batch_size)
    history, learned = [], False
    while not learned and len(history) < limit:
        number = len(history) + 1
        with advice_on_memory(device, batch_size):
            loss = train_epoch(batches, parts, recipe, device, number)
            history.append({"pass": number, "loss": loss})
            if number % 10 == 1 or loss < goal or number == limit:  # a third of a pass's time
                right = batch_accuracy(model, batches, device)
                learned = loss < goal and right in (None, 1.0)
                accuracy = "" if right is None else f"  accuracy {right:.3f}"
                print(f"overfit pass {number:3d}  loss {loss:.4f}{accuracy}", flush=True)
    facts = {"batches": len(batches), "clips": sum(len(x) for x, *_ in batches)}
    facts |= {"passes": len(history), "loss": loss, "accuracy": right}
    return Check(learned, facts, pd.DataFrame(history))


@torch.no_grad()
def batch_accuracy(model, batches, device) -> float | None:
    """Share of right answers over some batches, in training mode; None for regression."""
    if batches[0][1].is_floating_point():
        return None
    fast = half_precision(device)
    with fast:
        right = [model(x.to(device), n).argmax(1).cpu() == y.cpu() for x, y, n in batches]
    return float(torch.cat(right).float().mean())


def training_state(parts, recipe, settings, history, best) -> dict:
    """All that an uninterrupted run would hold after this epoch."""
    states = {name: part.state_dict() for name, part in parts.items()}
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    facts = {"plan": recipe_text(recipe, parts["schedule"]), "settings": settings}
    return states | facts | {"rng": rng, "history": history, "best": list(best)}


def recipe_text(recipe, schedule) -> str:
    return f"--epochs {recipe.epochs} --lr {recipe.lr:g}, {schedule.total_steps} batches"


def restore_training(path, parts, recipe, settings):
    """Put a training back into the state that `training_state` kept; returns history and best."""
    state = load_torch(path)
    keys = {*parts, "rng", "plan", "settings", "history", "best"}
    if not isinstance(state, dict) or not keys <= set(state):
        raise InputError(f"{path}: not the state of a training; leave out --resume")
    planned = recipe_text(recipe, parts["schedule"])
    if state["plan"] != planned:
        fault = f"begun with {state['plan']}, now {planned}"
        raise InputError(f"{path}: {fault}; use the same, or leave out --resume")
    # Other clips, or the same ones split by another seed: what was validated would now be
    # trained on.
    known = state["settings"]
    odd = [name for name, value in settings.items() if not equal_settings(value, known.get(name))]
    if odd:
        fault = f"begun with other clips or another --seed ({' and '.join(odd)} differ)"
        raise InputError(f"{path}: {fault}; use the same, or leave out --resume")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, KeyError, ValueError) as error:
        fault = "belongs to another model; leave out --resume, or name another --out-dir"
        raise InputError(f"{path}: {fault}") from error
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    return state["history"], tuple(state["best"])


def equal_settings(value, other) -> bool:
    """Equality of two settings: plain values or, the band statistics, tuples of tensors."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        return len(value) == len(other) and all(map(torch.equal, value, other))
    return value == other


# --------------------------------------------------------------------------------------
# The trainings of a step
# --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Experiment:
    """One network to train, on every fold.

    name : str, of the run and its folder
    network : Network, what it hears and how much it is shown
    make_model : (network, data) -> nn.Module; called after seeding, so that a run gives
        alone what it gives among others
    make_loss : data -> nn.Module
    optimizer : class, e.g. torch.optim.AdamW
    target : 'genre', 'emotion' (all three) or the name of one emotion
    seed : int, another one than the step's: other weights, batches and validation clips
    n_folds : emotion: 1 holds out a fifth of the clips; more: cross-validation
    stats : (mean, std), of the network that is continued
    share, lr_factor : of the budget and of the learning rate, for a fine-tuning
    """

    name: str
    network: Network
    make_model: Callable
    make_loss: Callable
    optimizer: type
    target: str = "genre"
    seed: int | None = None
    n_folds: int = 1
    stats: tuple | None = None
    share: float = 1.0
    lr_factor: float = 1.0


@dataclasses.dataclass
class Result:
    """A run that is done: one Fit per fold.

    facts : dict for metrics.json; of several folds epochs and seconds are summed, val is
        averaged, all else is the first fold's
    answers, truth : pd.DataFrame or None
        What was answered for held-out emotion clips, each by the fold that did not hear it.
    folds : pd.Series or None, which fold that was, from 1 on
    """

    members: list[TrainedModel]
    facts: dict
    answers: pd.DataFrame | None = None
    truth: pd.DataFrame | None = None
    folds: pd.Series | None = None

    model = property(lambda self: self.members[0].model)
    settings = property(lambda self: self.members[0].settings)
    history = property(lambda self: self.members[0].history)
    path = property(lambda self: self.members[0].path)


def train_all(training, runs, to_come=0) -> dict[str, Result]:
    """Train the networks of a step, genre or emotion, side by side; returns them by name.

    Each training is a process with its share of the processor's cores, or with a graphics
    card of its own; one alone trains in this process, with all of them. What a training
    gives does not depend on what trains beside it.

    to_come : trainings still to come in this step, which share what is left of --max-minutes

    Raises
    ------
    InputError, StepFailed
        Of the first training that failed; the others are stopped, their finished epochs kept.
    """
    runs = list(runs)
    jobs = [(run, fold) for run in runs for fold in range(run.n_folds)]
    workers = count_workers(training, len(jobs))
    if workers > 1:
        # Here first: bad input is one line before anything is begun, and files are read once.
        for part, beat in {(run.target == "genre", run.network.beat) for run in runs}:
            name = "genre" if part else "emotion"
            load_data(training.source, beat=beat, target=name)
    rounds = [math.ceil((to_come + len(jobs) - place) / workers) for place in range(len(jobs))]
    tasks = [(training, run, fold, left) for (run, fold), left in zip(jobs, rounds, strict=True)]
    done = []
    try:
        done += parallel_map(train_fold, tasks, workers)
    except WorkerDied as error:
        cure = "fewer --workers need less memory; --resume goes on from the finished epochs"
        raise StepFailed(f"{error}; {cure}") from None
    results = iter(done)
    return {
        run.name: join_folds(list(itertools.islice(results, run.n_folds)), training.source.device)
        for run in runs
    }


def count_workers(training, n_jobs) -> int:
    """How many trainings run at once: --workers, else one per core or graphics card."""
    if training.workers:
        most = training.workers
    elif training.smoke:
        most = 1  # two epochs are over before a process has begun
    else:
        kind = torch.device(training.source.device).type
        most = {"cpu": joblib.cpu_count(), "cuda": torch.cuda.device_count()}.get(kind, 1)
    return max(min(most, n_jobs), 1)


def train_fold(training, run, fold, rounds_left):
    """Train a run on one fold.

    rounds_left : trainings one after another, this one included, that share what is left of
        --max-minutes

    Returns
    -------
    path : Path of the checkpoint
    answers, truth : pd.DataFrame, of the held-out clips; None for genre
    """
    # In a worker process, too (see Step), and before a large product: the threads of products
    # have this from the thread that begins them.
    torch.set_flush_denormal(True)
    network, source = run.network, training.source
    if run.seed is not None:
        source = dataclasses.replace(source, seed=run.seed)
    cut = {"crop": window_size(network), "fold": fold, "n_folds": run.n_folds, "stats": run.stats}
    data = load_data(source, network.features, network.beat, run.target, **cut)
    if network.plain:  # the textbook does not adjust its logits: as if all were as common
        data.settings["priors"] = [1 / len(data.names)] * len(data.names)
    recipe = make_recipe(network, data, training, run.share)
    recipe.lr *= run.lr_factor
    seed_everything(source.seed)
    device = source.device
    model, loss_fn = run.make_model(network, data).to(device), run.make_loss(data).to(device)
    learned = [w for w in [*model.parameters(), *loss_fn.parameters()] if w.requires_grad]
    decay = 0.0 if network.plain else 0.01
    optimizer = run.optimizer(learned, lr=recipe.lr, weight_decay=decay, fused=True)
    name = run.name if run.n_folds == 1 else f"{run.name}_fold{fold + 1}of{run.n_folds}"
    limits = {
        "resume": training.resume,
        "max_seconds": max(0.0, training.deadline - time.time()) / rounds_left,
    }
    folder = training.folder / name
    fitted = train(model, data, loss_fn, optimizer, recipe, folder, device=device, **limits)
    if run.target == "genre":
        return fitted.path, None, None
    answers = predict_clips(fitted.model, data.held_out, fitted.settings, device)
    return fitted.path, answers, true_labels(data.held_out, fitted.settings)


def join_folds(folds, device) -> Result:
    """One Result of what `train_fold` returned for every fold of a run."""
    paths, answers, truths = zip(*folds, strict=True)
    members = [load_trained(path, device) for path in paths]
    facts = dict(members[0].facts)
    for key in ("epochs", "train_seconds"):
        facts[key] = sum(member.facts[key] for member in members)
    vals = [member.facts["val"] for member in members]
    facts["val"] = {key: float(np.mean([val[key] for val in vals])) for key in vals[0]}
    if answers[0] is None:
        return Result(members, facts)
    numbers = np.repeat(np.arange(1, len(folds) + 1), [len(table) for table in answers])
    answers = pd.concat(answers)
    folds = pd.Series(numbers, answers.index)
    return Result(members, facts, answers, pd.concat(truths), folds)


def epochs_kept(run) -> str:
    """How many epochs each fold's training had, and in brackets which one was kept."""
    facts = [member.facts for member in run.members]
    return ", ".join(f"{fact['epochs']} ({fact['best_epoch']})" for fact in facts)


# --------------------------------------------------------------------------------------
# What other steps have trained
# --------------------------------------------------------------------------------------


def genre_experiment(name) -> Experiment:
    """One of GENRE_NETWORKS as steps 5 and 7 train it, for a step that finds none to go on from."""
    return Experiment(
        name,
        GENRE_NETWORKS[name],
        make_model=lambda network, data: Classifier(make_backbone(network), len(data.names)),
        make_loss=lambda data: nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=torch.optim.AdamW,
    )


def earlier_folders(training, owner) -> list[Path]:
    """Folders that may hold an earlier step's outputs; on Kaggle, attached kernels' too."""
    folders = [training.out / owner]
    if on_kaggle():
        for kernel in ("*", "*/outputs", "notebooks/*/*", "notebooks/*/*/outputs"):
            folders += sorted((kaggle_root() / "input").glob(f"{kernel}/{owner}"))
    return folders


def find_genre_checkpoint(training, name) -> Path | None:
    """Find what the step that trains a genre run has left for these clips.

    A checkpoint of other clips or labels, another seed, a part of the clips (--subset),
    another network or a smoke run is passed over, saying so; only a smoke run takes those of
    smoke runs, only a --subset run those of its own N.
    """
    network, source = GENRE_NETWORKS[name], training.source
    owner = "step07_cnn" if network.kind == "cnn" else "step05_lstm"
    wanted = {
        "fingerprint": fingerprint(source.root, "genre", network.beat),
        "merge": source.merge,
        "seed": source.seed,
        "window": window_size(network),
    }
    if wanted["fingerprint"] is None:
        return None  # emotion clips alone, which step 8 can do with
    if not source.smoke:
        wanted |= {"smoke": False, "subset": source.subset}
    own = [training.folder, training.out / "step09_transfer"]
    for folder in [*earlier_folders(training, owner), *own]:
        path = folder / name / "best.pt"
        if not path.exists() or path.with_name(UNFINISHED).exists():
            continue
        checkpoint = load_checkpoint(path)
        settings = checkpoint["settings"]
        if settings.get("run") != name:
            fault = f"holds the model of run {settings.get('run')}, not of {name}"
            raise InputError(f"{path}: {fault}; delete it and train again")
        odd = [key for key, value in wanted.items() if settings.get(key) != value]
        if checkpoint["spec"]["backbone_args"] != make_backbone(network).config:
            odd.append("network")
        if not odd:
            return path
        print(f"{name}: passing over {path}: made with another {' and '.join(odd)}")
    return None


def genre_models(training, names) -> dict[str, TrainedModel]:
    """Find the trained networks of genre runs; those that are missing are trained, saying so."""
    found, device = {}, training.source.device
    for name in names:
        if path := find_genre_checkpoint(training, name):
            found[name] = load_trained(path, device)
            facts = found[name].facts
            epochs = f"{facts['epochs']} of {facts['planned_epochs']} epochs"
            print(f"{name}: using {path}, {epochs}")
        else:
            print(f"{name}: no checkpoint of these clips in {training.out}; training it here")
    trained = train_all(training, [genre_experiment(name) for name in names if name not in found])
    return {name: found[name] if name in found else trained[name].members[0] for name in names}


def genre_val_scores(training) -> pd.DataFrame:
    """The genre networks that earlier runs have left, by validation macro-F1, best first.

    Columns: val macro-F1, val clips, epochs (of planned).
    """
    rows = {}
    for name, network in GENRE_NETWORKS.items():
        if not network.plain and (path := find_genre_checkpoint(training, name)):
            facts = load_trained(path).facts
            epochs = f"{facts['epochs']} of {facts['planned_epochs']}"
            rows[name] = [facts["val"]["macro_f1"], facts["n_val"], epochs]
    table = pd.DataFrame(rows, ["val macro-F1", "val clips", "epochs"]).T.infer_objects()
    return table.sort_values("val macro-F1", ascending=False).rename_axis("genre network")


def find_emotion_leak(source, held_out) -> str | None:
    """What must not be: held-out emotion clips in the genre training split. None: there are none.

    Found are equal ids and equal arrays, not other excerpts of a song.

    held_out : Subset of emotion clips
    Raises InputError, unless --allow-leak.
    """
    store, rows = held_out.dataset.store, held_out.indices
    genre = read_entries(source.root, "genre", "train", merge=source.merge)
    entries, digests = [store.entries[i] for i in rows], [store.digests[i] for i in rows]
    test = dataclasses.replace(store, entries=entries, digests=digests)
    leaked = find_leak(load_clips(genre, source.skip_bad), test)
    if not leaked:
        return None
    count = f"{len(leaked)} of {len(rows)} held-out emotion clips"
    fault = f"{count} are in the genre training split too, e.g. {leaked[0]}"
    if not source.allow_leak:
        folder = part_folder(source.root, "emotion")
        raise InputError(f"{folder}: {fault}; remove them from one, or pass --allow-leak")
    print(f"warning: {fault}", file=sys.stderr)
    return fault


class EarlierPredictions(NamedTuple):
    """What an earlier emotion step has left for these clips.

    answers : {model: pd.DataFrame (clip x emotion)}; empty where there are none
    runs : dict, of its metrics.json
    note : str, what was found, or why nothing was
    """

    answers: dict
    runs: dict
    note: str


def earlier_predictions(training, owner, clips, folds=None) -> EarlierPredictions:
    """What an earlier emotion step answered for these very clips.

    Nothing where it was not run, or with other labels, another seed, other held-out clips or
    --smoke.

    folds : pd.Series, optional, the fold of every clip, which must be the same
    """
    source, note = (
        training.source,
        f"No scores of `{owner}` for these clips: they are missing here.",
    )
    for folder in earlier_folders(training, owner):
        if not ((folder / "metrics.json").exists() and (folder / "predictions.csv").exists()):
            continue
        try:
            metrics = json.loads((folder / "metrics.json").read_text())
            table = pd.read_csv(folder / "predictions.csv", dtype={"clip": str})
            found = (metrics["data"]["fingerprint"]["emotion"], metrics["seed"], metrics["smoke"])
        except (ValueError, KeyError):
            fault = f"its metrics.json or predictions.csv cannot be read; run {owner} again"
            raise InputError(f"{folder}: {fault}, or delete them") from None
        wanted = (fingerprint(source.root, "emotion"), source.seed, source.smoke)
        fold_of = table.dropna(subset="fold").drop_duplicates("clip").set_index("clip")["fold"]
        others = set(table["clip"]) != set(clips)
        if found != wanted or others or (folds is not None and (fold_of[clips] != folds).any()):
            reason = "was run with other labels, held-out clips, folds, seed or --smoke"
            note = f"`{owner}` in {folder.parent.name} {reason}: not compared here."
            continue
        answers = {}
        for model, rows in table.groupby("model"):
            frame = rows.pivot(index="clip", columns="target", values="prediction").loc[clips]
            answers[model] = frame[[name for name in EMOTIONS if name in frame]]
        return EarlierPredictions(
            answers, metrics["runs"], f"Scores of `{owner}` are from {folder.parent.name}."
        )
    return EarlierPredictions({}, {}, note)


def predict_unlabelled(source, run) -> pd.DataFrame:
    """What a run answers for the emotion clips without labels, averaged over its folds."""
    return average_predictions(
        predict_clips(fit.model, load_test(source, fit.settings), fit.settings, source.device)
        for fit in run.members
    )


# ======================================================================================
# 8. Metrics: scores of whole test sets, with intervals
# ======================================================================================


def bootstrap(score, n_clips, seed=0, n_resamples=1000) -> list[float]:
    """95% interval of a score by resampling clips (Efron & Tibshirani, 1993, ch. 13).

    It tells how far the score depends on which clips happen to be in the test set, not how
    far on the seed of the training.

    Parameters
    ----------
    score : callable
        Index array (n_clips,) -> float.

    Returns
    -------
    [low, high]
        The 2.5 and 97.5 percentiles.
    """
    rng = np.random.default_rng(seed)
    values = [score(rng.integers(0, n_clips, n_clips)) for _ in range(n_resamples)]
    return np.nanpercentile(values, [2.5, 97.5]).tolist()


def macro_f1(targets, predictions, n_classes) -> float:
    """Mean of all classes' F1 (arrays of ints); 0 for one that neither occurs nor is predicted.

    What scikit-learn's f1_score gives for these labels with zero_division=0.
    """
    counts = np.bincount(targets * n_classes + predictions, minlength=n_classes**2)
    counts = counts.reshape(n_classes, n_classes)
    seen = counts.sum(0) + counts.sum(1)  # of class k: true + predicted = 2 TP + FP + FN
    return float((2 * counts.diagonal() / np.maximum(seen, 1)).mean())


def classification_scores(targets, predictions, classes) -> dict:
    """All scores of the lab's step 6, with intervals for accuracy and macro-F1.

    Parameters
    ----------
    targets, predictions : array-like of int [shape=(N,)]
    classes : list of str
        Names by class number.

    Returns
    -------
    dict
        accuracy, macro_* and micro_* (precision, recall, f1), per_class, confusion
        (rows: true class), n_clips; accuracy_ci95 and macro_f1_ci95.
    """
    targets, predictions = np.asarray(targets), np.asarray(predictions)
    labels, n_clips, right = np.arange(len(classes)), len(targets), targets == predictions
    report = functools.partial(
        precision_recall_fscore_support, targets, predictions, labels=labels, zero_division=0
    )
    scores = {"accuracy": float(right.mean()), "n_clips": n_clips}
    metrics = ("precision", "recall", "f1")
    for average in ("macro", "micro"):
        values = map(float, report(average=average)[:3])
        scores |= {f"{average}_{name}": value for name, value in zip(metrics, values, strict=True)}
    rows = zip(*(column.tolist() for column in report(average=None)), strict=True)
    keys = (*metrics, "support")
    scores["per_class"] = {
        name: dict(zip(keys, row, strict=True)) for name, row in zip(classes, rows, strict=True)
    }
    scores["confusion"] = confusion_matrix(targets, predictions, labels=labels).tolist()
    scores["accuracy_ci95"] = bootstrap(lambda i: right[i].mean(), n_clips)
    scores["macro_f1_ci95"] = bootstrap(
        lambda i: macro_f1(targets[i], predictions[i], len(classes)), n_clips
    )
    return scores


def class_numbers(names, classes) -> np.ndarray:
    """Class names -> their places in `classes`."""
    return pd.Categorical(names, categories=classes).codes.astype(int)


def genre_scores(true, answers) -> dict:
    """`classification_scores` of a table of answers (clip x class) against true class names."""
    classes = list(answers.columns)
    targets = class_numbers(true.reindex(answers.index), classes)
    return classification_scores(targets, answers.to_numpy().argmax(1), classes)


def spearman(targets, predictions) -> float:
    """Spearman's rank correlation over a whole set; 0 for a constant, which ranks nothing."""
    targets, predictions = np.asarray(targets), np.asarray(predictions)
    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(spearmanr(targets, predictions).statistic)


def resampled_spearman(targets, predictions, n_resamples=500, seed=0) -> np.ndarray:
    """Spearman's correlation on bootstrap resamples of the clips, all at once.

    The same seed draws the same clips, so results for two models may be subtracted.

    targets, predictions : np.ndarray [shape=(N,)] -> np.ndarray [shape=(n_resamples,)]
    """
    n_clips = len(targets)
    rows = np.random.default_rng(seed).integers(0, n_clips, (n_resamples, n_clips))
    a, b = (
        rankdata(np.asarray(values, dtype=float)[rows], axis=1) - (n_clips + 1) / 2
        for values in (targets, predictions)
    )
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.where(norm > 0, norm, 1)  # a constant ranks nothing: 0


def emotion_scores(true, answers) -> dict:
    """Spearman per emotion and, with all three, their mean (lab, step 8e), with intervals.

    true, answers : pd.DataFrame, a row per clip, a column per emotion; answers may lack some
    """
    true = true.loc[answers.index]
    scores, resampled = {"n_clips": len(answers)}, []
    for name in answers.columns:
        pair = true[name].to_numpy(), answers[name].to_numpy()
        scores[name] = spearman(*pair)
        resampled.append(resampled_spearman(*pair))
        scores[f"{name}_ci95"] = np.percentile(resampled[-1], [2.5, 97.5]).tolist()
    if set(answers.columns) == set(EMOTIONS):
        scores["mean_spearman"] = float(np.mean([scores[name] for name in EMOTIONS]))
        mean = np.mean(resampled, axis=0)
        scores["mean_spearman_ci95"] = np.percentile(mean, [2.5, 97.5]).tolist()
    return scores


def emotion_table(scores) -> pd.DataFrame:
    """{model: emotion_scores} as a table of Spearman's correlations with their intervals."""
    keys = (*EMOTIONS, "mean_spearman")
    keys = [key for key in keys if any(key in row for row in scores.values())]
    rows = {
        name: {key: with_interval(row, key) if key in row else "" for key in keys}
        for name, row in scores.items()
    }
    frame = pd.DataFrame(rows).T.rename_axis("model")
    return frame.rename(columns={"mean_spearman": "mean of the three"})


def combine_emotions(parts, scores) -> dict:
    """One record for {emotion: facts} of single-emotion models that answer together."""
    val = {name: part["val"][name] for name, part in parts.items()}
    val["mean_spearman"] = float(np.mean(list(val.values())))
    keys = ("epochs", "train_seconds", "weights")
    totals = {key: sum(part[key] for part in parts.values()) for key in keys}
    return totals | {"val": val, "test": scores}


def paired_difference(true, first, second) -> dict:
    """Scores of one model minus those of another on the same clips, with 95% intervals.

    Both are scored on the same resamples of the clips: what makes a clip hard is common
    to both and cancels, so this tells more than two intervals side by side.

    Parameters
    ----------
    true : pd.Series of class names, or pd.DataFrame of emotion values
    first, second : pd.DataFrame
        Answers, see `predict_clips`; clips and emotions that both have are compared.

    Returns
    -------
    dict
        n_clips; for genre accuracy and macro_f1, for emotion spearman (the mean over the
        common emotions), each with `_ci95`; positive where `first` is better. For genre
        also only_first, only_second: clips that one of the two alone has right.
    """
    ids = first.index.intersection(second.index)
    result = {"n_clips": len(ids)}
    if isinstance(true, pd.DataFrame):
        tables = (true, first, second)
        names = [name for name in first.columns if name in second.columns]
        triples = [[table.loc[ids, name].to_numpy() for table in tables] for name in names]
        gains = [spearman(t, a) - spearman(t, b) for t, a, b in triples]
        resampled = [resampled_spearman(t, a) - resampled_spearman(t, b) for t, a, b in triples]
        interval = np.percentile(np.mean(resampled, axis=0), [2.5, 97.5]).tolist()
        return result | {"spearman": float(np.mean(gains)), "spearman_ci95": interval}
    classes = list(first.columns)
    t = class_numbers(true.loc[ids], classes)
    a, b = (table.loc[ids, classes].to_numpy().argmax(1) for table in (first, second))

    def f1(answers, i):
        return macro_f1(t[i], answers[i], len(classes))

    differences = {
        "accuracy": lambda i: (a[i] == t[i]).mean() - (b[i] == t[i]).mean(),
        "macro_f1": lambda i: f1(a, i) - f1(b, i),
    }
    for name, difference in differences.items():
        result[name] = float(difference(np.arange(len(ids))))
        result[f"{name}_ci95"] = bootstrap(difference, len(ids))
    result["only_first"] = int(((a == t) & (b != t)).sum())
    result["only_second"] = int(((b == t) & (a != t)).sum())
    return result


def difference_line(first, second, difference) -> str:
    """One line: what `paired_difference` measured between two named models."""
    titles = {"accuracy": "accuracy", "macro_f1": "macro-F1", "spearman": "Spearman"}
    values = []
    for key in [key for key in titles if key in difference]:
        low, high = difference[f"{key}_ci95"]
        values.append(f"{titles[key]} {difference[key]:+.3f} [{low:+.3f}, {high:+.3f}]")
    return f"`{first}` minus `{second}`: {', '.join(values)}; {difference['n_clips']} clips"


def with_interval(scores, key) -> str:
    """A score and its 95% interval as a table's cell."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(scores[key], *scores[f"{key}_ci95"])


def band_features(store, indices=None) -> np.ndarray:
    """Describe each clip by statistics of its bands over time: the classical floor.

    Mean, standard deviation, 10th and 90th percentile and mean absolute difference from
    frame to frame, of each of the 128 mel bands.

    Returns
    -------
    np.ndarray [shape=(N, 640)]
    """
    rows = []
    for index in range(len(store.entries)) if indices is None else indices:
        start, length = int(store.starts[index]), int(store.lengths[index])
        mel = store.frames[start : start + length, BANDS["mel"]].float().cpu().numpy()  # (T, 128)
        change = np.abs(np.diff(mel, axis=0)).mean(0) if length > 1 else np.zeros(N_MELS)
        low, high = np.percentile(mel, [10, 90], axis=0)
        rows.append(np.concatenate([mel.mean(0), mel.std(0), low, high, change]))
    return np.array(rows)


BASELINES = """
`constant`, `ridge` and `svr` are what a network has to beat. `constant` is the mean training label
(of several folds the first one's, for all). `ridge`, a linear regression, and `svr`, support vector
regression, get the mean, spread, percentiles and mean change from frame to frame of each mel band
over the clip: nothing of the order in time but that change. They are fitted on training and
validation clips together, of which the networks use the latter only to choose the epoch: they have
the larger training set.
"""


def regression_baselines(features, targets, folds, seed) -> dict[str, list[np.ndarray]]:
    """Predictions for held-out clips by the methods that BASELINES describes.

    The parameters of `ridge` and `svr` are chosen by cross-validation within the known clips.

    Parameters
    ----------
    features : np.ndarray [shape=(N, D)], see `band_features`
    targets : np.ndarray [shape=(N, K)]
    folds : list of (rows of the known clips, rows of the held-out clips)

    Returns
    -------
    {baseline: one array (held-out clips, K) per fold}
    """
    from sklearn.linear_model import Ridge
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    inner = KFold(5, shuffle=True, random_state=seed)
    svr_grid = {"model__C": [0.03, 0.1, 0.3, 1.0], "model__epsilon": [0.03, 0.1]}
    grids = {"ridge": (Ridge(), {"model__alpha": np.logspace(1, 5, 9)}), "svr": (SVR(), svr_grid)}
    # One constant for all folds: the mean of a fold's known clips is low where its held-out
    # labels are high, which would rank backwards.
    constant = targets[folds[0][0]].mean(0)
    predictions = {"constant": [], "ridge": [], "svr": []}
    for known, held_out in folds:
        predictions["constant"].append(np.tile(constant, (len(held_out), 1)))
        for name, (model, grid) in grids.items():
            pipeline = Pipeline([("scale", StandardScaler()), ("model", model)])
            search = GridSearchCV(pipeline, grid, cv=inner, scoring=make_scorer(spearman))
            columns = [
                search.fit(features[known], y).predict(features[held_out]) for y in targets[known].T
            ]
            predictions[name].append(np.stack(columns, axis=1))
    return predictions


def emotion_baselines(source, n_folds=1) -> dict[str, pd.DataFrame]:
    """`regression_baselines` for the held-out emotion clips: {baseline: clip x emotion}."""
    parts = [
        load_data(source, target="emotion", fold=fold, n_folds=n_folds) for fold in range(n_folds)
    ]
    whole = parts[0].train.dataset
    folds = [(part.train.indices + part.val.indices, part.held_out.indices) for part in parts]
    found = regression_baselines(
        band_features(whole.store), whole.targets.numpy(), folds, source.seed
    )
    ids = [clip_id for part in parts for clip_id in clip_ids(part.held_out)]
    return {
        name: pd.DataFrame(np.concatenate(arrays), ids, EMOTIONS) for name, arrays in found.items()
    }


# --------------------------------------------------------------------------------------
# What decides, and how sure: for step 7 and listen.py
# --------------------------------------------------------------------------------------


def integrated_gradients(model, x, lengths, classes, n_steps=16) -> torch.Tensor:
    """How much every cell of a spectrogram added to a class's logit.

    The gradient is averaged along the straight line from a clip that is the mean in every
    band (0, after standardisation) to the clip, and multiplied by the clip: the sum over all
    cells is the logit there minus the logit of the mean clip.

    Parameters
    ----------
    model : nn.Module, (x, lengths) -> logits, in evaluation mode
    x : torch.Tensor [shape=(B, T, F)], standardised
    classes : torch.Tensor [shape=(B,)], class numbers

    Returns
    -------
    torch.Tensor [shape=(B, T, F)], on the CPU

    Raises
    ------
    ValueError
        In training mode, where clips of a batch and chance have a say.

    Source: Sundararajan et al., 2017, Axiomatic Attribution for Deep Networks.
    """
    if model.training:
        raise ValueError("attributions are of a network in evaluation mode")
    total = torch.zeros_like(x)
    for step in range(n_steps):
        point = (x * ((step + 0.5) / n_steps)).requires_grad_()
        logits = model(point, lengths).float()
        chosen = logits.gather(1, classes[:, None].to(logits.device)).sum()
        total += torch.autograd.grad(chosen, point)[0]  # of the clip alone, not of the weights
    return (x * total / n_steps).cpu()


def clip_attributions(model, x, window, number) -> torch.Tensor:
    """`integrated_gradients` of a whole clip (T, F) for a class number, window by window.

    The clip's logit is the mean over its W windows, so each cell gets its sum over the windows
    that hold it: W times its share of what the clip adds to the logit. Cells near both ends lie
    in fewer windows and count less.
    """
    lengths, size = torch.tensor([len(x)]), min(window, len(x))
    cut, sizes = cut_windows(x[None], lengths, size)
    classes = torch.full((len(cut),), int(number))
    device = next(model.parameters()).device
    parts = integrated_gradients(model.eval(), cut.to(device), sizes, classes)
    total = torch.zeros(x.shape)
    for start, part in zip(window_starts(lengths, size)[0].tolist(), parts, strict=True):
        total[start : start + size] += part
    return total


def patches(cells, frames=8, bands=4) -> torch.Tensor:
    """Sum of the cells (..., T, F) in every patch of so many frames and bands, put into each cell.

    Single cells of attributions are noise; what is seen and heard has an extent.
    """
    t, f = cells.shape[-2:]
    padded = nn.functional.pad(cells.reshape(-1, 1, t, f), (0, -f % bands, 0, -t % frames))
    sums = nn.functional.avg_pool2d(padded, (frames, bands)) * frames * bands
    spread = sums.repeat_interleave(frames, 2).repeat_interleave(bands, 3)
    return spread[..., :t, :f].reshape(cells.shape)


def cell_ranks(values) -> torch.Tensor:
    """Share of the cells that have a higher value: 0 for the highest; the shape of `values`."""
    order = values.flatten().argsort(descending=True, stable=True).argsort()
    return (order / order.numel()).view(values.shape)


@torch.no_grad()
def probability_curve(model, x, rank, number, insert, n_levels=20) -> torch.Tensor:
    """Probability of a class while the cells of a clip are put back, or taken away, by rank.

    What is away is the mean of its band (0). The mean of the curve is the area under it.

    x (T, F), rank (T, F) from `cell_ranks`, number of the class -> (n_levels + 1,)

    Source: insertion and deletion; Petsiuk et al., 2018, RISE.
    """
    levels = torch.linspace(0, 1, n_levels + 1)[:, None, None]
    there = (rank < levels) if insert else (rank >= levels)
    lengths = torch.full((len(levels),), len(x))
    return model(x * there, lengths).softmax(1)[:, number]


def fit_temperature(logits, targets) -> float:
    """The number to divide logits by for the least cross-entropy.

    It minimises the cross-entropy on clips that were not trained on (Guo et al., 2017, On
    Calibration of Modern Neural Networks); which class is the likeliest does not change.

    logits (N, K), targets (N,) -> float
    """
    temperatures = np.geomspace(0.1, 10, 401)
    losses = [float(nn.functional.cross_entropy(logits / t, targets)) for t in temperatures]
    return float(temperatures[int(np.argmin(losses))])


def calibration_error(logits, targets, n_bins=10) -> float:
    """Expected calibration error: how far confidence is from accuracy, averaged over the clips.

    Clips are put into bins by the probability of their likeliest class (Guo et al., 2017).
    """
    sure, called = logits.softmax(1).max(1)
    right, bins = (called == targets).float(), (sure * n_bins).long().clamp(max=n_bins - 1)
    gaps = [(right[bins == b] - sure[bins == b]).sum().abs() for b in range(n_bins)]
    return float(sum(gaps) / len(targets))


# ======================================================================================
# 9. Plots: every figure labelled, with units
# ======================================================================================

# Ten colours that colour-blind readers can tell apart (Wong, 2011, two added), and marks for print.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7",
          "#56B4E9", "#000000", "#F0E442", "#7F3C8D", "#999999")  # fmt: skip
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")


def plot_spectrogram(ax, array, kind="mel", beat=False):
    """Draw (F, T) rows of a clip: mel in dB over Hz, or chroma over note names.

    Time runs in seconds, or in beats for beat-synchronised arrays.
    """
    import librosa.display

    scale = {"vmin": DB_FLOOR, "vmax": 0, "cmap": "magma"}
    if kind == "chroma":
        scale = {"vmin": 0, "vmax": 1, "cmap": "viridis"}
    axes = {"x_axis": None if beat else "time", "y_axis": kind}
    array = np.asarray(array, dtype=float)
    image = librosa.display.specshow(array, sr=SR, hop_length=HOP, ax=ax, **axes, **scale)
    ax.set_xlabel("Time (beats)" if beat else "Time (s)")
    ax.set_ylabel("Frequency (Hz)" if kind == "mel" else "Pitch class")
    if kind == "chroma":
        ax.set_yticks(range(N_CHROMA), NOTES, fontsize="small")
    if beat:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if array.shape[1] / step <= 8)
        ax.set_xticks(range(0, array.shape[1], step))
    return image


def plot_history(ax, history, title="", score_name="score"):
    """Loss (left axis) and validation score (right axis) against the epoch.

    The epochs of which the best is kept are shaded, the kept one is marked.
    """
    history = pd.DataFrame(history)
    epoch, score = history["epoch"], f"validation {score_name}"
    ax.plot(epoch, history["train_loss"], color=COLORS[0], label="train loss")
    ax.plot(epoch, history["val_loss"], color=COLORS[3], label="validation loss")
    ax.set(xlabel="Epoch", ylabel="Loss", title=title)
    right = ax.twinx()
    right.plot(epoch, history["val_score"], color=COLORS[2], linestyle="--", label=score)
    right.set(ylabel=f"Validation {score_name}", ylim=(min(0, history["val_score"].min()), 1))
    if history["settled"].any():
        first = epoch[history["settled"] == 1].min()
        ax.axvspan(first - 0.5, epoch.max() + 0.5, color="0.92", zorder=0)
    best = history[history["kept"] == 1].iloc[-1]  # each one kept replaces the one before
    right.plot(best["epoch"], best["val_score"], "o", color=COLORS[2])
    lines = ax.get_lines() + right.get_lines()[:1]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncol": 3}
    ax.legend(lines, [x.get_label() for x in lines], fontsize="small", frameon=False, **below)
    ax.xaxis.get_major_locator().set_params(integer=True)


def plot_histories(histories, score):
    """One panel of `plot_history` per run: {name: history}, at most three in a row."""
    n_columns = min(3, len(histories))
    n_rows = math.ceil(len(histories) / n_columns)
    size = (5 * n_columns, 3.6 * n_rows)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax, (name, history) in zip(axes.flat, histories.items(), strict=False):
        plot_history(ax, history, name, score)
    for ax in axes.flat[len(histories) :]:
        ax.remove()
    return fig


def plot_overfit(checks):
    """Training loss on fixed batches, {name: Check}, on a logarithmic scale."""
    fig, ax = plt.subplots(figsize=(7, 4))
    for (name, check), color in zip(checks.items(), COLORS, strict=False):
        ax.semilogy(check.history["pass"], check.history["loss"], color=color, label=name)
    ax.axhline(0.01, color="grey", linestyle=":", label="goal")
    ax.set(xlabel="Pass over the batches", ylabel="Training loss (log scale)")
    ax.legend(fontsize="small")
    return fig


def plot_confusion(ax, confusion, classes, title=""):
    """Confusion matrix: share of each true class, with the counts written in."""
    counts = np.asarray(confusion)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    centred = {"ha": "center", "va": "center", "fontsize": "small"}
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if share[row, column] > 0.5 else "black"
        ax.text(column, row, count or "", color=color, **centred)
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="Predicted class", ylabel="True class", title=title)
    return image


def plot_scores(ax, names, values, intervals, xlabel):
    """Horizontal bars with 95% intervals, the first name on top."""
    y = np.arange(len(names))[::-1]
    errors = np.abs(np.array(intervals, dtype=float).T - np.array(values))
    ax.barh(y, values, xerr=errors, color=COLORS[5], ecolor="black", capsize=3)
    ax.set_yticks(y, names)
    ax.set(xlabel=xlabel, xlim=(min(0, np.nanmin(np.array(intervals)) - 0.02), 1.12))
    ax.set_xticks(np.arange(0, 1.01, 0.2))
    for position, value, (_, high) in zip(y, values, intervals, strict=True):
        none = math.isnan(value)  # of a model that was not asked for this
        place = (0.01 if none else max(value, high) + 0.01, position)
        ax.text(*place, "none" if none else f"{value:.3f}", va="center", fontsize="small")


def plot_emotion_scores(scores):
    """One panel of `plot_scores` per emotion and for the mean: {model: `emotion_scores`}."""
    names, height = list(scores), 0.3 * len(scores) + 0.9
    fig, axes = plt.subplots(2, 2, figsize=(10, 2 * height), layout="constrained", sharey=True)
    for ax, key in zip(axes.flat, (*EMOTIONS, "mean_spearman"), strict=True):
        none = {key: math.nan, f"{key}_ci95": [math.nan] * 2}  # a model of one emotion: no bar
        rows = [none | scores[name] for name in names]
        values, intervals = [row[key] for row in rows], [row[f"{key}_ci95"] for row in rows]
        plot_scores(ax, names, values, intervals, "Spearman (line: 95% interval)")
        ax.set_title(key.replace("_spearman", " of the three"))
    return fig


# --------------------------------------------------------------------------------------
# Looking at clips: what steps 1 to 3 share
# --------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """One clip as steps 1 to 3 look at it; full and beat are (140, T) float16 arrays."""

    clip_id: str
    genre: str
    full: np.ndarray
    beat: np.ndarray | None


def sample_clips(data_dir, per_genre, seed, skip_bad=False, beat=True) -> list[Clip]:
    """Draw random lines of the genre training labels, at most `per_genre` of a genre.

    Genres are those of the label file, before any merge. The first two clips are the
    lab's two random lines with different labels (steps 1 to 3 draw the same ones, unless
    --skip-bad leaves out one of them).
    """
    lines = read_entries(data_dir, "genre", "train")
    random.Random(seed).shuffle(lines)
    drawn = {}
    for entry in lines:
        drawn.setdefault(entry.label, []).append(entry)
    chosen = [group[i] for i in range(per_genre) for group in drawn.values() if i < len(group)]

    def arrays(entries):
        store = load_clips(entries, skip_bad)
        ids, ends = [entry.clip_id for entry in store.entries], store.starts + store.lengths
        spans = zip(ids, store.starts.tolist(), ends.tolist(), strict=True)
        return {clip_id: store.frames[start:end].T.numpy() for clip_id, start, end in spans}

    full = arrays(chosen)
    synced = dict.fromkeys(full)
    if beat:
        folder = part_folder(data_dir, "genre", beat=True) / "train"
        synced = arrays([entry._replace(path=folder / entry.path.name) for entry in chosen])
    clips = [
        Clip(clip_id, label, full[clip_id], synced[clip_id])
        for clip_id, _, label in chosen
        if clip_id in full and clip_id in synced
    ]
    second = next((i for i, clip in enumerate(clips) if clip.genre != clips[0].genre), None)
    if second is None:
        fault = "no two readable clips of different genres; the lab compares two"
        raise InputError(f"{chosen[0].path.parent}: {fault}")
    clips.insert(1, clips.pop(second))
    return clips


# Each measure of a mel spectrogram: its name and how it is written.
MEASURES = {
    "centroid_hz": ("spectral centroid", "{:.0f} Hz"),
    "share_below_200_hz": ("share of energy below 200 Hz", "{:.1%}"),
    "dynamic_range_db": ("dynamic range", "{:.1f} dB"),
    "onsets_per_s": ("onset rate", "{:.2f} per s"),
}


def mel_measures(mel_db, beat=False) -> dict:
    """Brightness, bass, dynamics and onsets of a mel spectrogram (128, T) in dB.

    centroid_hz : median over the steps of the power-weighted mean frequency
    share_below_200_hz : share of the energy, by the bands' centre frequencies
    dynamic_range_db : from the 10th to the 95th percentile of the steps' loudness
    onsets_per_s : peaks of the spectral flux; only of frames, not of beats
    """
    import librosa

    mel_db = np.asarray(mel_db, dtype=float)
    edges = librosa.mel_frequencies(N_MELS + 2, fmax=SR / 2)
    centres, widths = edges[1:-1], (edges[2:] - edges[:-2]) / 2
    # librosa's mel filters have equal area, so a band holds power per Hz: times its width, power.
    power = 10 ** (mel_db / 10) * widths[:, None]  # (128, T)
    quiet, loud = np.percentile(10 * np.log10(power.sum(0)), [10, 95])
    values = {
        "centroid_hz": float(np.median(centres @ power / power.sum(0))),
        "share_below_200_hz": float(power[centres < 200].sum() / power.sum()),
        "dynamic_range_db": float(loud - quiet),
    }
    if not beat:  # the flux is how much the bands rise from frame to frame
        flux = librosa.onset.onset_strength(S=mel_db, sr=SR, hop_length=HOP)
        onsets = librosa.onset.onset_detect(onset_envelope=flux, sr=SR, hop_length=HOP)
        values["onsets_per_s"] = len(onsets) / (mel_db.shape[1] * HOP / SR)
    return values


def genre_share(values, genres) -> float:
    """Share of the variance over clips that the genre explains (epsilon squared).

    By chance it is 0 on average, so below 0 about half of the time.
    """
    values = pd.Series(np.asarray(values, dtype=float))
    within = values - values.groupby(np.asarray(genres)).transform("mean")
    degrees = max(len(values) - len(set(genres)), 1)
    return 1 - (within**2).sum() / degrees / max(values.var(), 1e-12)


def lstm_batch(arrays, kind="mel") -> tuple[torch.Tensor, torch.Tensor]:
    """(140, T) arrays -> a batch (B, T, F), standardised and then padded, and lengths (B,)."""
    clips = [torch.from_numpy(array[BANDS[kind]]).float().T for array in arrays]
    frames = torch.cat(clips)
    mean, std = frames.mean(0), frames.std(0).clamp(min=1e-3)
    x = nn.utils.rnn.pad_sequence([(clip - mean) / std for clip in clips], batch_first=True)
    return x, torch.tensor([len(clip) for clip in clips])


def clock_of(device) -> Callable:
    """A clock, in s, for what a device computes; on a CPU the time that this thread had a core.

    So other programs, which take a core away for a while, are not measured.
    """
    return time.thread_time if torch.device(device).type == "cpu" else time.perf_counter


def lstm_seconds(x) -> float:
    """Time of a training pass (forward, backward) of a textbook LSTM over x (B, T, F), in s."""
    lstm = nn.LSTM(x.shape[2], 128, batch_first=True).to(x.device)
    clock, times = clock_of(x.device), []
    for _ in range(9):
        began = clock()
        lstm(x)[0][:, -1].sum().backward()
        lstm.weight_hh_l0.grad[0, 0].item()  # reading a value waits for the GPU
        times.append(clock() - began)
    # The first pass allocates memory, and other programs only ever slow one down.
    return min(times[1:])


def lstm_gradient(x, lengths, lstm=None) -> np.ndarray:
    """How strongly each step moves the last output of a textbook LSTM.

    Parameters
    ----------
    x, lengths : a batch (B, T, F) and its clips' lengths (B,)
    lstm : nn.LSTM, optional; else an untrained one

    Returns
    -------
    np.ndarray [shape=(median length,)]
        Norm of d(last output)/d(input) by steps before the clip's last one, relative to
        the last one, averaged over the clips that are so long.
    """
    # In double precision: in single, what is below 1e-45 would read as 0.
    lstm = copy.deepcopy(lstm or nn.LSTM(x.shape[2], 128, batch_first=True)).cpu().double()
    x = x.double().requires_grad_()
    last = lstm(x)[0][torch.arange(len(x)), lengths - 1]  # (B, 128)
    # The squared norm of a product with random signs is on average that of the Jacobian
    # (Hutchinson, 1990).
    (last * torch.randn_like(last).sign()).sum().backward()
    norms = x.grad.norm(dim=2)  # (B, T)
    steps_back = torch.arange(int(lengths.median()))
    back = lengths[:, None] - 1 - steps_back  # (B, median length): the step so far back
    relative = norms.gather(1, back.clamp(min=0)) / norms.gather(1, lengths[:, None] - 1)
    return relative.masked_fill(back < 0, torch.nan).nanmean(0).numpy()


def track_beats(mel_db) -> np.ndarray:
    """Frames of the beats of a mel spectrogram (128, T) in dB, tracked on its own onsets.

    The data set does not store the beat times of its beat-synchronised twin.

    Source: Ellis, 2007, Beat tracking by dynamic programming.
    """
    import librosa

    onsets = librosa.onset.onset_strength(S=np.asarray(mel_db, dtype=float), sr=SR, hop_length=HOP)
    return librosa.beat.beat_track(onset_envelope=onsets, sr=SR, hop_length=HOP)[1]


def share_within_beats(rows, beats, offset=0.0) -> float:
    """Share of the variance over time of (F, T) rows that lies within a beat.

    The variance of frames is that of the beats' means plus that of the frames about the
    mean of their beat (law of total variance): the second part is what one value per beat
    cannot hold. Without any beats, the clip is one.

    Parameters
    ----------
    beats : frames, see `track_beats`
    offset : move the beats by this share of their median distance; by .5 the cuts fall
        between beats, which tells what any grid of that width would give
    """
    rows = np.asarray(rows, dtype=float)
    width = np.median(np.diff(beats)) if len(beats) > 1 else 0
    cuts = np.unique((beats + offset * width).astype(int))
    cuts = cuts[(cuts > 0) & (cuts < rows.shape[1])]
    spans = np.split(rows, cuts, axis=1)  # each (F, frames of a beat)
    within = sum(span.var(1) * span.shape[1] for span in spans).sum() / rows.shape[1]
    return float(within / max(rows.var(1).sum(), 1e-12))


def mean_spectrogram(arrays) -> np.ndarray:
    """Mean of (F, T) arrays step by step, as far as at least half of them reach."""
    n_steps = int(np.median([array.shape[1] for array in arrays]))
    total, count = np.zeros((len(arrays[0]), n_steps)), np.zeros(n_steps)
    for array in arrays:
        part = array[:, :n_steps]
        total[:, : part.shape[1]] += part
        count[: part.shape[1]] += 1
    return total / count


def plot_panels(panels, n_columns, kind="mel", size=(6.0, 3.0)):
    """Spectrograms side by side under one colour scale.

    panels : list of (title, (F, T) array, whether its steps are beats), row by row
    size : width and height of a panel, in inches
    """
    n_rows = math.ceil(len(panels) / n_columns)
    whole = (size[0] * n_columns, size[1] * n_rows)
    # Given, not found by a layout engine: 40 panels would take it seconds.
    spacing = {"hspace": 0.9 / size[1], "wspace": 0.06}
    fig, axes = plt.subplots(n_rows, n_columns, figsize=whole, squeeze=False, gridspec_kw=spacing)
    for index, (ax, (title, array, beat)) in enumerate(zip(axes.flat, panels, strict=False)):
        image = plot_spectrogram(ax, array, kind, beat)
        ax.set_title(title, fontsize="medium")
        if index % n_columns:
            ax.set(ylabel="", yticklabels=[])
        if index + n_columns < len(panels):
            ax.set_xlabel("")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    label = {
        "mel": "Power (dB, 0: the clip's loudest cell)",
        "chroma": "Chroma (of frames, 1 is the strongest pitch class)",
    }[kind]
    bar = {"shrink": min(1, 5 / whole[1]), "fraction": 0.02, "pad": 0.02}
    fig.colorbar(image, ax=fig.axes, label=label, **bar)
    return fig


# ======================================================================================
# 10. Records: output folder, checkpoints, metrics.json, summary.md
# ======================================================================================


def output_folder(given=None) -> Path:
    """Where the outputs of all steps go: --out-dir, else the working folder's outputs."""
    outputs = kaggle_root() / "working" / "outputs" if on_kaggle() else "outputs"
    return Path(given or outputs)


def make_folder(folder) -> None:
    """Make an output folder, parents included; one that is there already is fine."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file in its place, no permission, a read-only or full disk
        fault = f"no output folder can be made there ({error.strerror})"
        raise InputError(f"{folder}: {fault}; choose another --out-dir") from None


def write_bytes(path, write) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        cure = "free some space or choose another --out-dir"
        raise InputError(f"{path}: cannot be written ({error.strerror}); {cure}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text) -> None:
    write_bytes(path, lambda file: file.write(text.encode()))


def save_torch(path, value) -> None:
    buffer = io.BytesIO()  # torch hides a full disk behind an error of its own
    torch.save(value, buffer)
    write_bytes(path, lambda file: file.write(buffer.getbuffer()))


def load_torch(path) -> dict:
    """Load tensors and plain values only: a pickle may run code, so none is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it refuses anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; run the step that trains it first") from None
    except Exception as error:  # zip, pickle and torch errors: all mean the same to a user
        fault = "no readable checkpoint of this project; delete it and train again"
        raise InputError(f"{path}: {fault}") from error


def save_checkpoint(path, model, settings, **facts) -> None:
    """Save weights with all that is needed to rebuild the model and prepare its input."""
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    save_torch(path, {"spec": model_spec(model), "state": state, "settings": settings, **facts})


def load_checkpoint(path) -> dict:
    """Read a checkpoint: keys spec, state, settings (checked), epoch, val_score, facts."""
    checkpoint = load_torch(path)
    if not isinstance(checkpoint, dict) or not {"spec", "state", "settings"} <= set(checkpoint):
        raise InputError(f"{path}: no checkpoint of this project; delete it and train again")
    return {"facts": {}} | checkpoint


def load_model(path, device="cpu") -> tuple[nn.Module, dict]:
    """Rebuild a trained model; returns it, in evaluation mode, and its checkpoint."""
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(checkpoint["spec"])
        model.load_state_dict(checkpoint["state"])
    except (KeyError, TypeError, RuntimeError) as error:
        fault = "its weights do not fit the model it describes; delete it and train again"
        raise InputError(f"{path}: {fault}") from error
    return model.to(device).eval(), checkpoint


def load_backbone(path, frozen=0) -> nn.Module:
    """The trained backbone alone, without its head, its first blocks frozen (step 9)."""
    model, _ = load_model(path)
    backbone = model.backbone.train()
    backbone.freeze(frozen)
    return backbone


def lock_folder(folder) -> filelock.FileLock:
    """Keep other processes out of an output folder until this one ends, however it ends.

    A notebook's second run of a cell has the lock already. Nobody else being there, what a
    killed process has left half-written is removed.
    """
    lock = filelock.FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        fault = "another process is writing there; wait for it, or choose another --out-dir"
        raise InputError(f"{folder}: {fault}") from None
    except (OSError, NotImplementedError) as error:  # no permission, read-only or full; no locks
        if not os.access(folder, os.W_OK):
            fault = f"cannot be written ({error}); choose another --out-dir"
            raise InputError(f"{folder}: {fault}") from None
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return lock


def write_sound(path, waveform, **options) -> None:
    """Write a waveform at SR as a sound file; its format is the path's ending, e.g. .mp3."""
    import soundfile

    kind = Path(path).suffix[1:].upper()
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, SR, format=kind, **options)
    write_bytes(path, lambda file: file.write(buffer.getbuffer()))


class Step:
    """One run of a step: its flags, device, clips and output folder.

    Creating it reads the command line, seeds everything and finds the data. What the
    report needs (headings, text, tables, figures) is shown as it comes, in a notebook too,
    and `finish` writes it into summary.md, the numbers into metrics.json.

    Parameters
    ----------
    name : str, of the output folder, e.g. 'step05_lstm'
    description : str, the step's docstring, shown by --help
    training : bool, add the flags of steps that train
    parts : of the data that the step needs; of the demo set no others are synthesised
    add_flags : callable, optional
        Gets the parser; adds flags of the step's own.
    flags : str
        In a notebook, where there is no command line: e.g. "--epochs 20 --resume".

    Attributes
    ----------
    args, device, out, folder
    source : Source, what the data flags say
    training : TrainingOptions, what the flags of a training say
    """

    def __init__(
        self,
        name,
        description,
        *,
        training=False,
        parts=tuple(FOLDERS),
        add_flags=None,
        flags="",
    ):
        sys.excepthook = end_in_one_line
        parser = make_parser(description, training)
        if add_flags:
            add_flags(parser)
        given = parser.parse_args(shlex.split(flags) if in_notebook() else None)
        # A step without the flags of a training may have to train a missing network: as by default.
        defaults = make_parser("", training=True).parse_args([])
        self.args = args = argparse.Namespace(**(vars(defaults) | vars(given)))
        self.name, self.began, self.lines = name, time.monotonic(), []
        seed_everything(args.seed)
        keep_freed_memory()
        self.device = pick_device(args.device)
        root = find_data(args.data_dir, parts)
        # Gradients that vanish on their way back through an LSTM become numbers below 1e-38, with
        # which some processors compute slowly (docs/experiments.md, Speed): they are 0 instead.
        torch.set_flush_denormal(True)
        self.source = Source(
            root,
            args.seed,
            self.device,
            not args.no_merge,
            args.skip_bad,
            args.allow_leak,
            args.subset or (64 if args.smoke else None),
            args.smoke,
        )
        self.out = output_folder(args.out_dir)
        self.folder = self.out / name
        if args.overfit_batch:  # a check must not replace the results of a full run
            self.folder = self.folder / "overfit_batch"
        make_folder(self.folder)
        self.lock = lock_folder(self.folder)
        minutes = math.inf if args.max_minutes is None else args.max_minutes
        self.training = TrainingOptions(
            self.source,
            self.out.absolute(),  # a worker may have another working directory
            self.folder.absolute(),
            args.epochs,
            args.batch_size,
            args.lr,
            args.resume,
            time.time() + 60 * minutes,
            args.workers,
        )
        self.demo = (root / "DEMO.txt").exists()
        if self.demo:
            self.text(
                "> **Synthesised demo data.** These numbers show that the pipeline runs; "
                "they say nothing about music."
            )
        print(f"{name}: data {root}, device {self.device}, output {self.folder}")

    def show(self, markdown):
        """Add Markdown to summary.md; in a notebook, display it."""
        self.lines.append(markdown + "\n")
        if in_notebook():
            from IPython.display import Markdown, display

            display(Markdown(markdown))

    def heading(self, text):
        if not in_notebook():
            print(f"\n--- {text}")
        self.show(f"## {text}")

    def text(self, markdown):
        """Add a paragraph; indentation that all of its lines share is removed."""
        self.show(textwrap.dedent(markdown).strip())

    def table(self, frame, caption=""):
        """Add a pandas table (index included) and print it."""
        self.show((f"**{caption}**\n\n" if caption else "") + markdown_table(frame))
        if not in_notebook():
            print(frame.to_string(float_format=lambda value: f"{value:.3f}"))

    def figure(self, fig, name, caption):
        """Save a figure as <name>.png, show it in a notebook, add it to summary.md."""
        png = {"format": "png", "dpi": 120, "bbox_inches": "tight"}
        write_bytes(self.folder / f"{name}.png", lambda file: fig.savefig(file, **png))
        self.lines.append(f"![{caption}]({name}.png)\n\n*{caption}*\n")
        if in_notebook():
            from IPython.display import Markdown, display

            display(fig, Markdown(f"*{caption}*"))
        plt.close(fig)

    def sound(self, waveform, name, caption):
        """Save a waveform (at SR) as <name>.mp3, with a player in a notebook, a link elsewhere."""
        write_sound(self.folder / f"{name}.mp3", waveform)
        self.lines.append(f"[{caption}]({name}.mp3)\n")
        if in_notebook():
            from IPython.display import Audio, Markdown, display

            display(Markdown(f"*{caption}*"), Audio(waveform, rate=SR))

    def show_source(self, *objects):
        """Add the source of functions or classes: what the page speaks of, word by word."""
        for thing in objects:
            # A notebook knows the source of functions only, not that of a class as a whole.
            methods = [part for part in vars(thing).values() if inspect.isfunction(part)]
            whole = not (inspect.isclass(thing) and in_notebook())
            with contextlib.suppress(OSError, TypeError):
                parts = [inspect.getsource(part) for part in ([thing] if whole else methods)]
                code = "\n".join(textwrap.dedent(part) for part in parts)
                self.show(f"```python\n{code.strip()}\n```")

    def show_layers(self, model, data, n_clips=2):
        """Add a table of a network's layers: output shape for a batch, and weights."""
        items = data.train.dataset.__getitems__(data.train.indices[:n_clips])
        x, lengths = (torch.stack(column) for column in (list(zip(*items, strict=True))[::2]))
        rows, hooks = [], []

        def weights_of(module):
            return sum(weights.numel() for weights in module.parameters())

        def note(module, _, output, name):
            output = output[0] if isinstance(output, tuple) else output
            shape = " x ".join(map(str, output.shape))
            rows.append([name, type(module).__name__, shape, weights_of(module)])

        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.append(module.register_forward_hook(functools.partial(note, name=name)))
        training = model.training
        with torch.no_grad():
            model.eval()(x.to(self.device), lengths)
        model.train(training)
        for hook in hooks:
            hook.remove()
        batch = f"Layer by layer, for a batch of {tuple(x.shape)} (clips, frames, bands)"
        table = pd.DataFrame(rows, columns=["layer", "operation", "output", "weights"])
        self.table(table.set_index("layer"), f"{batch}; {weights_of(model):,} weights")

    def require(self, reached, message):
        """End the step with exit code 1 where a goal was not reached; what is shown is kept."""
        if not reached:
            self.write()
            raise StepFailed(message)

    def write(self):
        write_text(self.folder / "summary.md", f"# {self.name}\n\n" + "\n".join(self.lines))

    def finish(self, runs=None, **facts):
        """Write metrics.json, args.json and summary.md; after --overfit-batch, end here."""
        root = self.source.root
        prints = {part: value for part in FOLDERS if (value := fingerprint(root, part))}
        metrics = {
            "step": self.name,
            "seconds": round(time.monotonic() - self.began, 2),
            "environment": environment(self.device),
            "data": {"root": str(root), "demo": self.demo, "fingerprint": prints},
            "seed": self.args.seed,
            "smoke": self.args.smoke,
            "runs": runs or {},
            **facts,
        }
        write_text(self.folder / "args.json", to_json(vars(self.args)))
        self.write()
        write_text(self.folder / "metrics.json", to_json(metrics))
        print(f"{self.name}: done in {metrics['seconds']:.0f} s; see {self.folder / 'summary.md'}")
        if self.args.overfit_batch:
            raise Finished("--overfit-batch: done")


def to_json(facts) -> str:
    """JSON of facts that may hold NumPy's numbers and arrays, or paths."""

    def plain(value):
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    return json.dumps(facts, indent=2, default=plain)


def prediction_rows(model, true, answers, *, test_set, seed, fold="") -> pd.DataFrame:
    """A table of answers as rows of predictions.csv: one per clip and target.

    For genre the target is 'genre', truth and prediction are class names; for emotion the
    targets are the emotions. fold : '' or, by clip id, `Result.folds`
    """
    true = true.loc[answers.index]
    fold = fold.loc[answers.index] if isinstance(fold, pd.Series) else fold
    if isinstance(true, pd.Series):
        columns = {"genre": (true, answers.columns[answers.to_numpy().argmax(1)])}
    else:
        columns = {name: (true[name], answers[name].to_numpy()) for name in answers.columns}
    head = {"clip": answers.index, "model": model, "test_set": test_set}
    parts = []
    for name, (t, p) in columns.items():
        part = pd.DataFrame(head | {"target": name, "fold": fold, "seed": seed})
        parts.append(part.assign(truth=t.to_numpy(), prediction=p))
    return pd.concat(parts)


def held_out_rows(true, answers, seed, folds) -> list[pd.DataFrame]:
    """`prediction_rows` of held-out emotion clips for {model: answers}."""
    where = {"test_set": "multitask_dataset held out", "seed": seed, "fold": folds}
    return [prediction_rows(name, true, table, **where) for name, table in answers.items()]


def write_predictions(folder, rows) -> None:
    """Write predictions.csv from a list of `prediction_rows`."""
    write_text(folder / "predictions.csv", pd.concat(rows).to_csv(index=False))


def write_submission(path, answers) -> None:
    """Write answers for the unlabelled clips (clip x three emotions) as the competition asks."""
    frame = answers[list(EMOTIONS)].clip(0, 1).rename_axis("Id.fused.full.npy.gz")
    write_text(path, frame.to_csv(float_format="%.6f"))


def overfit_emotions(step, runs) -> None:
    """The regressors' --overfit-batch: learn four batches by heart, show it, end the step.

    runs : {name: (Network, target)}, see `load_data` for the target
    """
    args, device, checks = step.args, step.device, {}
    for name, (network, target) in runs.items():
        crop = window_size(network)
        data = load_data(step.source, network.features, network.beat, target, crop=crop)
        seed_everything(args.seed)
        model = Regressor(make_backbone(network), data.names, data.mean, data.std)
        settings = {"lr": args.lr, "batch_size": args.batch_size, "device": device}
        checks[name] = overfit(model, data, RegressionLoss(data.std), **settings)
    keys = ("passes", "loss")
    facts = {name: {key: check.facts[key] for key in keys} for name, check in checks.items()}
    step.heading("Overfitting a few batches")
    step.table(pd.DataFrame(facts).T.astype({"passes": int}).rename_axis("run"))
    caption = "Regression loss on up to four fixed batches of training crops, regularisation off"
    step.figure(plot_overfit(checks), "overfit", caption)
    learned = all(check.learned for check in checks.values())
    step.require(learned, f"four batches were not learned by heart: {facts}")
    step.finish(overfit=facts)


def markdown_table(frame) -> str:
    """A pandas table as Markdown; floats with three decimals."""

    def cell(value):
        if isinstance(value, float | np.floating):
            return "" if math.isnan(value) else f"{value:.3f}"
        return str(value).replace("|", "\\|")

    header = [cell(name) for name in (frame.index.name or "", *frame.columns)]
    pairs = zip(frame.index, frame.itertuples(index=False), strict=True)
    rows = [[cell(str(index)), *map(cell, row)] for index, row in pairs]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
