"""What the eleven steps of the lab share: data, models, training, scores, figures.

Read it from top to bottom; a clip travels the same way:

    label file -> entries -> arrays -> one resident tensor -> Subset -> batch
    -> backbone -> head -> loss or scores -> metrics -> files

Sections: 1 Run, 2 Features, 3 Dataset, 4 Batches, 5 Models, 6 Losses, 7 Train and
evaluate, 8 Metrics, 9 Plots, 10 Records.

Shapes are written with B clips in a batch, T frames, F feature bands, S steps,
C channels, H hidden units, K classes, N clips.
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
import io
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import median_filter
from scipy.stats import rankdata, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import confusion_matrix, make_scorer, precision_recall_fscore_support
from sklearn.model_selection import GridSearchCV, KFold, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

# ======================================================================================
# 1. Run: command line, data folder, device, seeds
# ======================================================================================


class InputError(ValueError):
    """A mistake in what the user handed in: one line on stderr, exit code 2."""


class StepFailed(RuntimeError):
    """A step that ran as asked and did not reach its goal: one line, exit code 1."""


def in_notebook() -> bool:
    """True in a Jupyter cell, where sys.argv belongs to the kernel and not to us."""
    return "ipykernel" in sys.modules and not hasattr(sys.modules["__main__"], "__file__")


def kaggle_root() -> Path:
    """/kaggle, or the folder in $PATREC_KAGGLE_ROOT that stands in for it in tests."""
    return Path(os.environ.get("PATREC_KAGGLE_ROOT", "/kaggle"))


def on_kaggle() -> bool:
    return (kaggle_root() / "working").is_dir()


def _number(kind, low, high=math.inf):
    """Return an argparse type that accepts `kind` values in [low, high] only."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text} is not {name} of at least {low:g}" + (f" and at most {high:g}" if high < math.inf else ""))
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """A mistyped flag is bad input too: one line, without the usage of twenty flags before it."""

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists all flags\n")


def make_parser(description, training=False, **defaults) -> argparse.ArgumentParser:
    """Build the command line that every step shares.

    Parameters
    ----------
    description : str
        The step's docstring, shown by --help.
    training : bool
        Add the flags of steps that train a network.
    **defaults
        Defaults of a step that differ from the shared ones, e.g. ``batch_size=64``.
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a mistyped flag must fail, not be guessed
    )
    add = functools.partial(_add_with_default, parser)
    add("--data-dir", type=Path, help="folder with fma_genre_spectrograms and the other three")
    add("--out-dir", type=Path, help="where outputs go; else /kaggle/working/outputs or outputs")
    add("--seed", type=_number(int, 0, 2**31), default=42, help="seed of splits, weights and batches")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--smoke", action="store_true", help="do everything, tiny: checks that the step runs")
    add("--skip-bad", action="store_true", help="leave out unreadable clips instead of stopping")
    add("--allow-leak", action="store_true", help="go on although test clips are in the training split")
    add("--no-merge", action="store_true", help="keep the classes as they are instead of merging the lab's 20 into 10")
    if training:
        add("--epochs", type=_number(int, 1), help="passes over the training clips; else scaled to their number")
        add("--batch-size", type=_number(int, 2), default=32, help="clips in a batch")
        add("--lr", type=_number(float, 1e-8, 10), default=1e-3, help="highest learning rate")
        add("--subset", type=_number(int, 8), metavar="N", help="train on N clips only (torch Subset)")
        add("--overfit-batch", action="store_true", help="check that the network can learn 4 batches by heart")
        add("--resume", action="store_true", help="go on from the last finished epoch in the output folder")
        add("--max-minutes", type=_number(float, 0.01), help="stop training cleanly after this long")
    parser.set_defaults(**defaults)
    return parser


def _add_with_default(parser, name, help, **options):
    """Add a flag whose help ends with its default ('%(default)s' follows set_defaults)."""
    if options.get("default") is not None:
        help += " (default: %(default)s)"
    parser.add_argument(name, help=help, **options)


def parse_args(parser, argv=None) -> argparse.Namespace:
    """Parse the command line; in a notebook cell there is none, so only defaults."""
    if argv is None and in_notebook():
        argv = []
    args = parser.parse_args(argv)
    if args.smoke and hasattr(args, "epochs"):
        args.epochs, args.subset = args.epochs or 2, args.subset or 64
    args.started = time.monotonic()
    return args


def seconds_left(args, runs_left=1) -> float:
    """Share of --max-minutes that the next of `runs_left` trainings may take, in s."""
    if getattr(args, "max_minutes", None) is None:
        return math.inf
    return max(0.0, args.started + 60 * args.max_minutes - time.monotonic()) / runs_left


def run_main(main):
    """Call a step's main; turn a user's mistake into one line, keep a bug's traceback.

    Exit codes: 2 bad input, 1 the step did not reach its goal, 130 stopped by hand.
    """
    try:
        return main()
    except InputError as error:
        message, code = f"error: {error}", 2
    except StepFailed as error:
        message, code = f"failed: {error}", 1
    except KeyboardInterrupt:
        message, code = "stopped; finished epochs are kept, --resume goes on from them", 130
    print(message, file=sys.stderr)
    raise SystemExit(code)


FOLDERS = {"genre": "fma_genre_spectrograms", "emotion": "multitask_dataset"}
KAGGLE_MOUNTS = (  # the classic layout and the one of newer kernels
    "input/patreco3-multitask-affective-music/data",
    "input/datasets/geoparslp/patreco3-multitask-affective-music/data",
)


def part_folder(data_dir, part, beat=False) -> Path:
    """Folder of one part of the data: part is 'genre' or 'emotion'."""
    return Path(data_dir) / (FOLDERS[part] + ("_beat" if beat else ""))


def find_data(data_dir=None) -> Path:
    """Find the folder that holds fma_genre_spectrograms and its three siblings.

    Looks at `data_dir`, else $PATREC_DATA, else the Kaggle mounts, else data/ beside the
    scripts; as a last resort, and never on Kaggle, makes the synthesised demo set.

    Raises
    ------
    InputError
        Nothing found; the message names the places tried.
    """
    given = data_dir or os.environ.get("PATREC_DATA")
    here = Path(globals().get("__file__", "common.py")).resolve().parent
    if given:
        places = [Path(given)]
    elif on_kaggle():
        inputs = kaggle_root() / "input"  # after the two known mounts, anybody's copy of the data set
        places = [kaggle_root() / mount for mount in KAGGLE_MOUNTS] + sorted(inputs.glob("*")) + sorted(inputs.glob("datasets/*/*"))
    else:
        places = [here / "data", here / "data" / "demo"]
    parts = {part_folder(".", part, beat).name for part in FOLDERS for beat in (False, True)}
    for place in places:
        # One level too high or too low is what people hand in most often: take it. Too low
        # only from one of the four folders: a mistyped data/song must not become data.
        inside = place.is_dir() and place.resolve().name in parts
        for root in (place, place / "data", *([place.resolve().parent] if inside else [])):
            if any(part_folder(root, part).is_dir() for part in FOLDERS):
                return root.resolve()
    tried = ", ".join(map(str, places[:2]))
    if given:
        raise InputError(f"no {FOLDERS['genre']} or {FOLDERS['emotion']} folder in {tried}; name the folder that holds them in --data-dir")
    if on_kaggle():
        raise InputError(f"data set not attached (looked in {tried}); add geoparslp/patreco3-multitask-affective-music under Input")
    maker = here / "make_dataset.py"
    if not maker.exists():
        raise InputError(f"no data in {tried} and no make_dataset.py to make a demo set; give --data-dir")
    print("No data set found: synthesising a demo set. Scores on it say nothing about real music.", file=sys.stderr)
    # A separate process, so that this file imports no other of the project.
    if subprocess.run([sys.executable, str(maker), "--demo", "--out", str(places[-1])]).returncode:
        raise InputError(f"make_dataset.py could not write the demo set to {places[-1]}; give --data-dir")
    return places[-1]


def pick_device(name="auto") -> torch.device:
    """Return a device that was seen to compute.

    A card that torch has no code for says is_available() and fails at the first
    operation (P100 on Kaggle), so one small operation is run before believing it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    for kind in ["cuda", "mps", "cpu"] if name == "auto" else [name]:
        if not available[kind]:
            if name == kind:
                raise InputError(f"--device {name}: torch {torch.__version__} finds no such device; use --device cpu")
            continue
        try:
            x = torch.ones(8, 8, device=kind)
            (x @ x).sum().item()
            return torch.device(kind)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if name == kind:
                raise InputError(f"--device {name} cannot compute ({reason}); use --device cpu") from error
            print(f"{kind} cannot compute ({reason}); going on without it", file=sys.stderr)
    raise AssertionError("the CPU always computes")


def seed_everything(seed) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of giving them back to the system.

    A network's activations are allocated and freed at every step; mapping them anew each
    time costs page faults, measured at two fifths of a CNN's training time on a CPU.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # no glibc: slower, not wrong


@functools.cache
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
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


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
    beat : np.ndarray [shape=(140, n_beats + 1)], float64
        The same, one column per beat interval.

    Source: the course's lab3/feature_extractor.py (slp-ntua/patrec-labs); Müller, 2015,
    Fundamentals of Music Processing, ch. 6.3 (beat-synchronous features).
    """
    import librosa

    if waveform.ndim != 1 or len(waveform) < N_FFT:
        raise InputError(f"waveform of shape {waveform.shape}: one channel of at least {N_FFT} samples is needed")
    mel_power = librosa.feature.melspectrogram(y=waveform, sr=SR, n_fft=N_FFT, hop_length=HOP, n_mels=N_MELS)
    chroma = librosa.feature.chroma_cqt(y=waveform, sr=SR, hop_length=HOP)
    # mel and CQT may differ by a frame in odd cases; the common length keeps them aligned.
    n_frames = min(mel_power.shape[1], chroma.shape[1])
    mel_power, chroma = mel_power[:, :n_frames], chroma[:, :n_frames]

    _, beat_frames = librosa.beat.beat_track(y=percussive_part(waveform), sr=SR, hop_length=HOP)
    if not len(beat_frames):  # silence, a held tone: the whole clip is one interval
        beat_frames = np.array([0])

    def stack(power, pitch):
        db = librosa.power_to_db(power, ref=np.max) if power.max() > 1e-10 else np.full_like(power, DB_FLOOR)  # its own lower limit
        return np.vstack([db, np.clip(pitch, 0, 1)]).astype(np.float64)

    sync = functools.partial(librosa.util.sync, idx=beat_frames, aggregate=np.median)
    return stack(mel_power, chroma), stack(sync(mel_power), sync(chroma))


def percussive_part(waveform, size=31) -> np.ndarray:
    """Compute librosa.effects.percussive(waveform), bit for bit, six times as fast.

    Energy that stands out of the running median over time but not over frequency is a
    stroke (Fitzgerald, 2010, Harmonic/percussive separation using median filtering).
    """
    import librosa

    def median_along_rows(rows):
        # scipy's fast median is for one dimension only, so the mirrored rows are laid end to end.
        padded = np.pad(rows, ((0, 0), (size // 2, size // 2)), mode="symmetric")
        return median_filter(padded.ravel(), size).reshape(padded.shape)[:, size // 2 : -(size // 2)]

    magnitude, phase = librosa.magphase(librosa.stft(waveform))
    over_time, over_frequency = median_along_rows(magnitude), median_along_rows(magnitude.T).T
    mask = librosa.util.softmask(over_frequency, over_time, power=2, split_zeros=True)
    return librosa.istft(magnitude * mask * phase, dtype=waveform.dtype, length=len(waveform))


# ======================================================================================
# 3. Dataset: label files -> entries -> one resident tensor -> torch Dataset
# ======================================================================================

MERGE = {  # the lab's step 4b: similar classes merged, ill-defined or tiny ones dropped (None)
    "Rock": "Rock", "Psych-Rock": "Rock", "Post-Rock": "Rock", "Indie-Rock": None,
    "Folk": "Folk", "Psych-Folk": "Folk", "Metal": "Metal", "Punk": "Metal", "Post-Punk": None,
    "Electronic": "Electronic", "Chiptune": "Electronic", "Trip-Hop": "Trip-Hop", "Hip-Hop": "Hip-Hop",
    "Pop": "Pop", "Classical": "Classical", "Blues": "Blues", "Jazz": "Jazz",
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
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # -sig: a BOM is no part of the header
    except FileNotFoundError:
        raise InputError(f"{path}: label file missing; is the data set complete?") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    except OSError as error:  # a folder in its place, no permission
        raise InputError(f"{path}: cannot be read ({error.strerror}); is the data set complete?") from None
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: empty; its first line must be 'Id<TAB>Genre' or 'Id,{','.join(EMOTIONS)}'")
    header = rows[0][1].strip()
    separator = "\t" if "\t" in header else ","
    columns = [name.strip() for name in header.split(separator)]
    is_genre = columns == ["Id", "Genre"]
    # Columns are found by name: a fixed number is how valence once was read as energy.
    if not is_genre and not (separator == "," and columns[0] == "Id" and set(columns[1:]) == set(EMOTIONS) and len(columns) == 4):
        raise InputError(f"{path}: header {header!r}; expected 'Id<TAB>Genre' or 'Id,{','.join(EMOTIONS)}'")
    if is_genre and separator != "\t":
        raise InputError(f"{path}: columns separated by {separator!r}; expected a tab")

    labels, seen = [], {}
    for number, line in rows[1:]:
        where = f"{path}, line {number}"
        cells = [cell.strip() for cell in line.split(separator)]
        if len(cells) != len(columns) or not all(cells):
            raise InputError(f"{where}: {line!r} has not {len(columns)} filled columns; mend or remove the line")
        clip_id = cells[0].split(".")[0]
        if not clip_id or any(mark in cells[0] for mark in "/\\:\0"):
            raise InputError(f"{where}: {cells[0]!r} is no clip id; expected e.g. 104085.fused.full.npy.gz")
        if is_genre:
            label = cells[1]
        else:
            try:
                values = dict(zip(columns[1:], map(float, cells[1:]), strict=True))
            except ValueError:
                raise InputError(f"{where}: {line!r} holds a value that is no number; mend or remove the line") from None
            label = tuple(values[name] for name in EMOTIONS)
            if not all(0 <= value <= 1 for value in label):
                raise InputError(f"{where}: {line!r} holds a value outside [0, 1]; mend or remove the line")
        if seen.setdefault(clip_id, label) != label:
            raise InputError(f"{where}: clip {clip_id} was labelled {seen[clip_id]!r} before, now {label!r}; keep one")
        labels.append((clip_id, label))
    if not labels:
        raise InputError(f"{path}: a header and no clips; is the data set complete?")
    return list(dict(labels).items())  # a row given twice is one clip


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
        labels = read_labels(folder / f"{split}_labels.txt")
        if isinstance(labels[0][1], str) != (part == "genre"):
            raise InputError(f"{folder / f'{split}_labels.txt'}: holds the labels of the other part; expected {part} labels")
    entries = [Entry(clip_id, arrays / f"{clip_id}.fused.full.npy", label) for clip_id, label in labels]
    return merge_classes(entries) if merge and part == "genre" else entries


def merge_classes(entries) -> list[Entry]:
    """Apply MERGE: rename merged classes, leave out dropped ones (lab, step 4b)."""
    unknown = sorted({entry.label for entry in entries} - set(MERGE))
    if unknown:
        raise InputError(f"{_label_file(entries)}: class {unknown[0]!r} is not one of the lab's 20; --no-merge keeps classes as they are")
    merged = [entry._replace(label=MERGE[entry.label]) for entry in entries if MERGE[entry.label]]
    if not merged:
        raise InputError(f"{_label_file(entries)}: the lab's merge drops every class in it; --no-merge keeps classes as they are")
    return merged


def _label_file(entries) -> Path:
    """The file that named these clips, for messages."""
    folder = entries[0].path.parent
    return folder.with_name(f"{folder.name}_labels.txt")


def read_array(path) -> np.ndarray:
    """Read one array and check it.

    Returns
    -------
    np.ndarray [shape=(140, T)], float32

    Raises
    ------
    InputError
        Missing, unreadable, of a wrong shape or kind, not finite, or out of range.
    """
    try:
        array = _load_npy(path)
        fault = _shape_fault(array)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            array = None if fault else np.array(array, dtype=np.float32)  # a copy, which may be written to
    except FileNotFoundError:
        fault = "missing, though the label file names it"
    except Exception as error:  # whatever a broken header makes numpy raise, MemoryError and BadZipFile among it
        fault = f"not a readable .npy array ({str(error).splitlines()[0] if str(error) else 'empty file'})"
    if not fault:
        fault = _value_fault(array)
    if fault:
        raise InputError(f"{path}: {fault}; replace the file, or leave such clips out with --skip-bad")
    return array


_header_lock = threading.Lock()


def _load_npy(path) -> np.ndarray:
    """np.load for one array of numbers, fast from several threads at once.

    One read a file, and a header that came before is not parsed again: the more often
    threads ask for the interpreter, the longer they wait for each other.
    """
    data = Path(path).read_bytes()
    if len(data) < 12:
        raise ValueError("cut short")
    digits = 2 if data[6] == 1 else 4  # version 1 writes the header's length in two bytes, later ones in four
    start = 8 + digits + int.from_bytes(data[8 : 8 + digits], "little")
    # NumPy parses with `ast`, which up to CPython 3.11.7 fails now and then while another
    # thread is in it too (python/cpython#106905): a sound clip would be called broken.
    with _header_lock:
        shape, fortran_order, dtype = _npy_header(data[:start])
    array = np.frombuffer(data, dtype, math.prod(shape), start)  # refuses objects: to unpickle can run code
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)


@functools.lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[tuple, bool, np.dtype]:
    """Shape, Fortran order and type that the head of a .npy file states."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version not in [(1, 0), (2, 0), (3, 0)]:
        raise ValueError(f"of format version {version[0]}.{version[1]}")
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def _shape_fault(array) -> str | None:
    if array.dtype.kind != "f":
        return f"numbers of type {array.dtype}, expected floating point"
    if array.ndim != 2 or array.shape[0] != N_ROWS:
        turned = "; it looks transposed" if array.ndim == 2 and array.shape[1] == N_ROWS else ""
        return f"shape {array.shape}, expected ({N_ROWS}, T){turned}"
    return None if array.shape[1] else f"shape {array.shape}: no frames"


def _value_fault(array) -> str | None:
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
        dB and chroma as on disk. Half precision is .06 dB at worst and a quarter of the
        memory of float64.
    starts, lengths : torch.Tensor [shape=(N,)], int64, in frames
    digests : list of str
        A checksum of every 16th frame of a clip: equal digests are identical arrays.
    """

    entries: list[Entry]
    frames: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    digests: list[str]


def load_clips(entries, skip_bad=False, threads=None) -> ClipStore:
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
    with ThreadPoolExecutor(threads or N_READERS) as pool:
        facts = list(_map_blocks(pool, _file_facts, entries, 64))
        key = hashlib.sha256(repr((CACHE_VERSION, facts)).encode()).hexdigest()[:24]
        cache = cache_dir() / f"{key}.clips"
        try:
            footer, frames = _open_cache(cache)
            left_out = set(range(len(entries))) - set(footer["kept"])
            if any(_convert(entries[index])[0] is not None for index in left_out):
                raise ValueError("a clip that could not be read then can be read now")  # a disk or a share that failed for a moment
        except (OSError, ValueError, KeyError, TypeError, OverflowError):  # not there yet, or cut short when the machine went down
            _fill_cache(cache, entries, pool)
            footer, frames = _open_cache(cache)
    faults = footer["faults"]
    if faults and not skip_bad:
        raise InputError(faults[0] + (f" (and {len(faults) - 1} more bad files)" if len(faults) > 1 else ""))
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    if not footer["kept"]:
        raise InputError(f"{entries[0].path.parent}: none of {len(entries)} clips can be read")
    lengths = torch.tensor(footer["lengths"])
    kept = [entries[index] for index in footer["kept"]]
    return ClipStore(kept, frames, lengths.cumsum(0) - lengths, lengths, footer["digests"])


CACHE_VERSION = 1
N_READERS = (os.cpu_count() or 1) + 1  # threads that read files: one waits for the disk while the others compute


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
        raise InputError(f"{folder}: no cache folder can be made there ({error.strerror}); set $PATREC_CACHE") from error
    return folder


def _map_blocks(pool, function, items, size):
    """pool.map with `size` items a task: what a task costs can be more than asking for a file."""
    blocks = [items[first : first + size] for first in range(0, len(items), size)]
    return itertools.chain.from_iterable(pool.map(lambda block: [function(item) for item in block], blocks))


def _file_facts(entry) -> tuple:
    """Name, size and time of change of a file; two None for one that is missing."""
    path = str(entry.path)
    try:
        stat = os.stat(path)
        return path, stat.st_size, stat.st_mtime_ns
    except OSError:
        return path, None, None


def _convert(entry) -> tuple[np.ndarray | None, str | None]:
    """Read one clip as (T, 140) float16, or say what is wrong with it."""
    try:
        array = torch.from_numpy(read_array(entry.path))
    except InputError as error:
        return None, str(error)
    return np.ascontiguousarray(array.half().numpy().T), None  # (T, 140): a crop in time is one block; NumPy turns twice as fast


def _fill_cache(cache, entries, pool) -> None:
    """Write the cache file: all frames, then a JSON footer, then the footer's length."""
    footer = {"kept": [], "lengths": [], "digests": [], "faults": []}
    for leftover in cache.parent.glob("*.clips.*.tmp"):
        with contextlib.suppress(OSError):
            # Of a killed run: one that is being filled is never an hour old.
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    partial = cache.with_suffix(f".clips.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(partial, "wb") as file, tqdm(total=len(entries), desc="reading clips", disable=not show_bars(), leave=False) as bar:
            for first in range(0, len(entries), 512):  # so many at a time, so that few arrays wait in memory
                for index, (frames, fault) in enumerate(_map_blocks(pool, _convert, entries[first : first + 512], 16), start=first):
                    bar.update()
                    if fault:
                        footer["faults"].append(fault)
                        continue
                    file.write(frames)
                    footer["kept"].append(index)
                    footer["lengths"].append(len(frames))
                    footer["digests"].append(hashlib.blake2b(frames[::16].tobytes(), digest_size=8).hexdigest())
            text = json.dumps(footer).encode()
            file.write(text + len(text).to_bytes(8, "little"))
        os.replace(partial, cache)
    except OSError as error:
        raise InputError(f"{partial}: cannot be written ({error.strerror}); point $PATREC_CACHE to a folder with more room") from error
    finally:
        partial.unlink(missing_ok=True)


def _open_cache(cache) -> tuple[dict, torch.Tensor]:
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
        frames = self.store.frames[:, BANDS[self.features]]
        t = torch.arange(int(lengths.max()))
        rows = starts[:, None] + torch.minimum(t, lengths[:, None] - 1)  # (B, T), past the end: the last frame
        x = frames[rows.to(frames.device)].float()  # (B, T, F)
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
    std = (squares / n_frames - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)  # a silent band stays finite
    return mean.float().cpu(), std.float().cpu()


def encode_labels(entries, classes) -> np.ndarray:
    """Genre names -> class numbers; `classes` comes from the training part, sorted."""
    number = {name: index for index, name in enumerate(classes)}
    unknown = sorted({entry.label for entry in entries} - set(number))
    if unknown:
        raise InputError(f"{_label_file(entries)}: class {unknown[0]!r} does not occur in the training part {list(classes)}; mend the label or remove the clip")
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
    names, counts = np.unique(classes, return_counts=True) if classes is not None else ([], np.zeros(0))
    if (counts == 1).any():
        raise InputError(f"class {names[counts == 1][0]} has a single clip, which cannot be in both the training and the validation part; add clips of it or drop it")
    n_held_out = max(math.ceil(fraction * n_clips), len(names), 1)
    if n_clips < 2 * n_held_out:
        raise InputError(f"{n_clips} clips are too few to split into training and validation part; add clips")
    return tuple(train_test_split(np.arange(n_clips), test_size=n_held_out, random_state=seed, stratify=classes))


@dataclasses.dataclass
class GenreData:
    """The genre training split, ready to train on; the test split stays unread."""

    train: Subset
    val: Subset
    classes: list[str]
    settings: dict  # what a checkpoint needs to judge new clips: features, beat, merge, classes, shares, stats


def load_genre(data_dir, features="mel", beat=False, *, seed, merge=True, crop=None, subset=None, device="cpu", skip_bad=False) -> GenreData:
    """Load the genre training split and cut it into training and validation part.

    Parameters
    ----------
    crop : int or None
        Random crops of this many frames for training; validation sees whole clips.
    subset : int or None
        Keep only this many training clips (in proportion to the classes).
    """
    store = load_clips(read_entries(data_dir, "genre", "train", beat, merge), skip_bad)
    classes = sorted({entry.label for entry in store.entries})
    targets = encode_labels(store.entries, classes)
    try:
        train_idx, val_idx = split_indices(len(targets), VAL_FRACTION, seed, np.array(classes)[targets])
    except InputError as error:
        raise InputError(f"{_label_file(store.entries)}: {error}") from None
    if subset and subset < len(train_idx):
        # Rows are shuffled by the split already; a clip per class first, then as they come.
        first = [train_idx[targets[train_idx] == k][0] for k in range(len(classes))]
        rest = [index for index in train_idx if index not in set(first)]
        train_idx = np.array((first + rest)[: max(subset, len(classes))])
    stats = band_statistics(store, train_idx, features)
    store.frames = to_resident(store.frames, device)
    whole = SpectrogramDataset(store, targets, features, stats)
    shares = np.bincount(targets[train_idx], minlength=len(classes)) / len(train_idx)
    settings = {"part": "genre", "features": features, "beat": beat, "merge": merge, "classes": classes, "shares": shares.tolist(), "stats": stats}
    return GenreData(Subset(whole.variant(crop=crop), train_idx.tolist()), Subset(whole, val_idx.tolist()), classes, settings)


VAL_FRACTION = 0.1  # of the training clips; a tenth shows the curve, and each clip trained on counts


def load_genre_test(data_dir, settings, *, beat=None, device="cpu", skip_bad=False, allow_leak=False) -> SpectrogramDataset:
    """Load the genre test split the way a trained model wants it; only after training.

    Raises
    ------
    InputError
        A test clip is in the training split too (same id or same array).
    """
    beat = settings["beat"] if beat is None else beat
    # Sorted by id: models of frames and of beats then answer for the same clips row by row.
    store = load_clips(sorted(read_entries(data_dir, "genre", "test", beat, settings["merge"])), skip_bad)
    train = load_clips(read_entries(data_dir, "genre", "train", beat, settings["merge"]), skip_bad)
    leaked = find_leak(train, store)
    if leaked and not allow_leak:
        raise InputError(f"{store.entries[0].path.parent}: {len(leaked)} test clips are in the training split too, e.g. {leaked[0]}; remove them from one, or pass --allow-leak")
    store.frames = to_resident(store.frames, device)
    return SpectrogramDataset(store, encode_labels(store.entries, settings["classes"]), settings["features"], settings["stats"])


def find_leak(train, test) -> list[str]:
    """Ids of test clips that the training clips hold too, by id or by content."""
    ids, digests = {entry.clip_id for entry in train.entries}, set(train.digests)
    return [e.clip_id for e, digest in zip(test.entries, test.digests, strict=True) if e.clip_id in ids or digest in digests]


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


def make_loader(dataset, batch_size, shuffle=False) -> DataLoader:
    """Plain DataLoader. No workers: the data are resident and a batch is one index away."""
    return DataLoader(dataset, batch_size, shuffle=shuffle)


@dataclasses.dataclass
class Augment:
    """Random changes of a training batch, drawn on the device; off where 0.

    mixup : float
        Alpha of the Beta distribution of the mixing weight (Zhang et al., 2018, mixup).
    shift_bands : int
        Move the mel bands up or down by up to this many: a change of pitch and tuning.
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
            shift = torch.randint(-self.shift_bands, self.shift_bands + 1, (len(x), 1), device=x.device)
            bands = (torch.arange(N_MELS, device=x.device) + shift).clamp(0, N_MELS - 1)  # (B, 128)
            mel = x[..., :N_MELS].gather(2, bands[:, None].expand(-1, x.shape[1], -1))
            x = torch.cat([mel, x[..., N_MELS:]], dim=2)
        for dim, widest in ((1, self.mask_frames), (2, self.mask_bands)):
            if widest:
                x = mask_stripe(x, dim, min(widest, x.shape[dim] // 4))
        if self.mixup:
            weight = torch.distributions.Beta(self.mixup, self.mixup).sample((len(x),)).to(x.device)
            weight = torch.maximum(weight, 1 - weight)  # the clip itself keeps the larger share
            other = torch.randperm(len(x), device=x.device)
            x = torch.lerp(x[other], x, weight[:, None, None])
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
        Frames summed up in one step, see `describe_steps`. 1,293 steps are slow and the
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

    def __init__(self, n_bands, hidden_size=128, n_layers=1, bidirectional=True, dropout=0.3, frames_per_step=1, projection=0, mask_bands=0, readout="pool"):
        super().__init__()
        self.config = {
            "n_bands": n_bands, "hidden_size": hidden_size, "n_layers": n_layers, "bidirectional": bidirectional, "dropout": dropout,
            "frames_per_step": frames_per_step, "projection": projection, "mask_bands": mask_bands, "readout": readout,
        }  # fmt: skip
        self.frames_per_step, self.readout = frames_per_step, readout
        n_inputs = n_bands if frames_per_step == 1 else 3 * n_bands
        stem = []
        if frames_per_step > 1:
            stem.append(StepNorm(n_inputs, affine=False))  # a spread or a change is no standardised number yet
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
            nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for _ in range(n_directions)) for size in sizes
        )
        self.dropout = nn.Dropout(dropout)
        self.feature_size = hidden_size * n_directions * (2 if readout == "pool" else 1)

    def forward(self, x, lengths):
        """x (B, T, F), lengths (B,) on the CPU -> (B, feature_size)."""
        describe = describe_steps if self.config["frames_per_step"] > 1 else average_frames
        x, lengths = describe(x, lengths, self.frames_per_step)  # (B, S, 3 F) or (B, S, F)
        x = self.stem(x)
        order = reverse_order(lengths, x.shape[1]).to(x.device)
        for index, layer in enumerate(self.blocks):
            x = self.dropout(x) if index else x
            outputs = [layer[0](x)[0]]
            if len(layer) == 2:
                outputs.append(flip_clips(layer[1](flip_clips(x, order))[0], order))
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
        self.n_bands, self.widest, self.share_of_steps = n_bands, min(widest, n_bands // 4), share_of_steps

    def forward(self, x):
        """(B, S, n_bands) or, as `describe_steps` gives them, (B, S, 3 n_bands)."""
        if not (self.training and self.widest):
            return x
        bands = mask_stripe(x.reshape(len(x), -1, self.n_bands), 2, self.widest)  # the same stripe in means, spreads and changes
        return mask_stripe(bands.view_as(x), 1, self.share_of_steps * x.shape[1])


def average_frames(x, lengths, n) -> tuple[torch.Tensor, torch.Tensor]:
    """Average every n frames: (B, T, F) -> (B, ceil(T / n), F); padding does not count."""
    if n == 1:
        return x, lengths
    n_steps = math.ceil(x.shape[1] / n)
    x = nn.functional.pad(x, (0, 0, 0, n_steps * n - x.shape[1])).unflatten(1, (n_steps, n))  # zeros, as all padding here
    counts = (lengths[:, None] - n * torch.arange(n_steps)).clamp(1, n).unsqueeze(2).to(x)  # (B, S, 1) real frames in a step
    return x.sum(2) / counts, torch.div(lengths + n - 1, n, rounding_mode="floor")


def describe_steps(x, lengths, n) -> tuple[torch.Tensor, torch.Tensor]:
    """Describe every n frames: (B, T, F) -> (B, ceil(T / n), 3 F).

    Mean, standard deviation and mean absolute change from frame to frame of each band,
    which are also what the classical floor hears of a whole clip (`band_features`).
    """
    mean, n_steps = average_frames(x, lengths, n)
    square, _ = average_frames(x.square(), lengths, n)
    change = nn.functional.pad(x.diff(dim=1).abs(), (0, 0, 1, 0)) * time_mask(lengths, x.shape[1], x.device)  # none into the padding
    change, _ = average_frames(change, lengths, n)
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt(), change], dim=2), n_steps


def reverse_order(lengths, n_steps) -> torch.Tensor:
    """(B, S) indices that turn each clip around within its own length; its own inverse."""
    t = torch.arange(n_steps).expand(len(lengths), n_steps)
    return torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)


def flip_clips(x, order):
    """Reorder the steps of (B, S, F) by (B, S) indices."""
    return x.gather(1, order.unsqueeze(2).expand_as(x))


def masked_mean_max(x, mask):
    """Mean and maximum over the clip's own steps: (B, S, D), (B, S, 1) -> (B, 2 D)."""
    mean = (x * mask).sum(1) / mask.sum(1)
    highest = x.masked_fill(mask == 0, -torch.inf).amax(1)
    return torch.cat([mean, highest], dim=1)


class CNNBackbone(Backbone):
    """Four blocks of convolution, batch normalisation, ReLU, max pooling (lab, step 7b).

    The spectrogram is an image of one channel. What the blocks leave is pooled over time
    only: where in frequency something happens is what tells genres apart, so the
    frequency axis is kept and goes with the channels into the vector. No size depends on
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
        by 2. Its filters see onsets and flutter of single columns, the dearer blocks above
        only how strong they were: a sixth more time than columns of 4 frames pooled by 2.
    """

    def __init__(self, n_bands=N_MELS, channels=(16, 32, 64, 128), kernel_size=3, frames_per_step=2, first_pool=4):
        super().__init__()
        self.config = {
            "n_bands": n_bands, "channels": list(channels), "kernel_size": kernel_size,
            "frames_per_step": frames_per_step, "first_pool": first_pool,
        }  # fmt: skip
        self.frames_per_step, self.stem = frames_per_step, nn.Identity()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2, bias=False),  # the norm has a bias
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
                nn.MaxPool2d((pool, 2)),  # time, bands
            )
            for c_in, c_out, pool in zip([1, *channels[:-1]], channels, [first_pool, 2, 2, 2], strict=True)
        )
        self.feature_size = 2 * channels[-1] * (n_bands // 2 ** len(channels))
        self.to(memory_format=torch.channels_last)  # the layout that convolutions compute fastest in

    def forward(self, x, lengths):
        """x (B, T, F), lengths (B,) on the CPU -> (B, feature_size)."""
        x, lengths = average_frames(x, lengths, self.frames_per_step)
        pools = [block[-1].kernel_size[0] for block in self.blocks]
        shortest = math.prod(pools)
        if x.shape[1] < shortest:
            x = nn.functional.pad(x, (0, 0, 0, shortest - x.shape[1]))
        x = x.unsqueeze(1)  # (B, 1, T, F)
        for block, pool in zip(self.blocks, pools, strict=True):
            x = block(x)  # (B, C, T / pool, F / 2)
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
    """Backbone -> one emotion value per clip, in the labels' own units.

    mean, std : float
        Of the training labels: the network works on standardised values, its output does not.
    """

    def __init__(self, backbone, mean=0.5, std=0.25, dropout=0.4):
        super().__init__()
        self.backbone, self.config = backbone, {"mean": mean, "std": std, "dropout": dropout}
        self.head = nn.Sequential(nn.Dropout(dropout), small_linear(backbone.feature_size))

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B,). Not (B, 1): against (B,) that broadcasts to (B, B)."""
        z = self.head(self.backbone(x, lengths)).squeeze(1)  # only dim 1: a batch of one stays a batch
        return self.config["mean"] + self.config["std"] * z


class MultitaskRegressor(nn.Module):
    """One backbone, one head per emotion: -> (B, 3), columns in the order of EMOTIONS.

    mean, std : sequences of 3 floats, of the training labels
    """

    def __init__(self, backbone, mean=(0.5,) * 3, std=(0.25,) * 3, dropout=0.4):
        super().__init__()
        self.backbone, self.config = backbone, {"mean": list(mean), "std": list(std), "dropout": dropout}
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict({name: small_linear(backbone.feature_size) for name in EMOTIONS})
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)  # goes along to the device
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, 3)."""
        vector = self.dropout(self.backbone(x, lengths))
        z = torch.cat([self.heads[name](vector) for name in EMOTIONS], dim=1)  # (B, 3)
        return self.mean + self.std * z


MODELS = {model.__name__: model for model in (LSTMBackbone, CNNBackbone, Classifier, Regressor, MultitaskRegressor)}


def model_spec(model) -> dict:
    """What is needed to build the model again, in plain values."""
    return {
        "head": type(model).__name__, "head_args": model.config,
        "backbone": type(model.backbone).__name__, "backbone_args": model.backbone.config,
    }  # fmt: skip


def build_model(spec) -> nn.Module:
    """Build an untrained model from `model_spec`."""
    return MODELS[spec["head"]](MODELS[spec["backbone"]](**spec["backbone_args"]), **spec["head_args"])


def count_weights(model) -> int:
    return sum(weights.numel() for weights in model.parameters())


# ======================================================================================
# 6. Losses
# ======================================================================================


def regression_loss(outputs, targets, std) -> torch.Tensor:
    """Squared error in units of the labels' spread, plus half of 1 - Pearson's r.

    The first term fits the values, the second the order, which Spearman's score judges
    (Atmaja & Akagi, 2020, found such losses above plain squared error for emotion).

    outputs, targets : torch.Tensor [shape=(B,)]
    std : float, of the training labels of this axis
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs {tuple(outputs.shape)} against targets {tuple(targets.shape)} would broadcast")
    error = ((outputs - targets) / std).square().mean()
    if len(outputs) < 3:  # a correlation of two points says nothing
        return error
    a, b = outputs - outputs.mean(), targets - targets.mean()
    pearson = (a * b).sum() / (a.square().sum() * b.square().sum()).clamp(min=1e-12).sqrt()
    return error + 0.5 * (1 - pearson)


class RegressionLoss(nn.Module):
    """`regression_loss` of one axis, its spread measured on the training labels."""

    def __init__(self, std):
        super().__init__()
        self.std = float(std)

    def forward(self, outputs, targets):
        return regression_loss(outputs, targets, self.std)


class MultitaskLoss(nn.Module):
    """Sum of the losses of valence, energy and danceability (lab, step 10b).

    Each squared error is divided by its axis's variance, measured on the training
    labels, which brings the three into one order of magnitude. With `learned`, each task
    has a weight exp(-s) besides and pays s / 2 for it (Kendall et al., 2018).
    """

    def __init__(self, std, learned=False):
        super().__init__()
        self.std = [float(value) for value in std]
        self.log_var = nn.Parameter(torch.zeros(3), requires_grad=learned)

    def forward(self, outputs, targets):
        """outputs, targets (B, 3) -> scalar."""
        losses = torch.stack([regression_loss(outputs[:, i], targets[:, i], self.std[i]) for i in range(3)])
        return (torch.exp(-self.log_var) * losses + self.log_var / 2).sum()


# ======================================================================================
# 7. Train and evaluate
# ======================================================================================


def show_bars() -> bool:
    """Progress bars belong on terminals and in notebooks; logs get a line per epoch."""
    return in_notebook() or sys.stderr.isatty()


def plan_epochs(n_clips, presentations, high, low=20, longest=60, given=None) -> tuple[int, int]:
    """Plan a training that shows about `presentations` examples in all: small sets get more passes.

    Where that takes more than `longest` passes, an epoch shows several random crops of
    each clip, or validation would take as long as training. A number of epochs that is
    `given` is taken as it is.

    Returns
    -------
    epochs, crops of a clip per epoch
    """
    if given:
        return given, 1
    passes = min(max(presentations / n_clips, low), high)
    crops = math.ceil(passes / longest)
    return round(passes / crops), crops


@dataclasses.dataclass
class Recipe:
    """How to train: the numbers of one training run."""

    epochs: int
    lr: float  # highest rate of the one-cycle schedule
    weight_decay: float = 0.01
    ema: float = 0.99  # decay per step of the averaged weights; 0: none
    augment: Augment | None = None
    window: int | None = None  # frames of a window when scoring; None: the whole clip
    warm_up: float = 0.1  # share of the steps in which the rate rises
    settled: float = 0.2  # the last share of the epochs, of which the best by validation score is kept


UNFINISHED = "unfinished"  # marks the folder of a run while it trains, so that no step takes its model for the finished one


def train(model, train_loader, val_loader, loss_fn, score_fn, recipe, folder, settings, *,
          device="cpu", overfit_batch=False, resume=False, max_seconds=math.inf) -> dict:  # fmt: skip
    """Train a model, keep the best of its last epochs.

    Adam with decoupled weight decay (AdamW), one-cycle learning rate, gradients clipped
    to norm 1, running average of the weights. After each epoch the averaged weights are
    scored on the validation set; the best of the last fifth of the epochs are kept in
    ``folder/best.pt`` (of a run cut short: the best so far), the state to go on from in
    ``folder/last.pt``, the curve in ``folder/history.csv``.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(x, lengths)``. Holds the best weights on return.
    val_loader : DataLoader or None
        None: nothing is validated, and the last epoch's weights are kept.
    loss_fn : callable
        (outputs, targets) -> scalar tensor.
    score_fn : callable
        (outputs, targets) -> float, higher is better, over the whole validation set.
    settings : dict
        What to prepare new clips with; goes into the checkpoint.
    overfit_batch : bool
        Learn 4 fixed batches by heart instead (lab, step 5b).
    resume : bool
        Go on from ``last.pt`` if it is there.
    max_seconds : float
        No epoch is begun that would end later than this; one epoch always runs.

    Returns
    -------
    dict
        epochs, best_epoch, val_score, train_seconds, out_of_time, history.

    Raises
    ------
    StepFailed
        The loss became NaN or infinite (epoch, batch and rate are named), or the four
        batches were not learned.
    """
    model.to(device)
    loss_fn.to(device)
    if overfit_batch:
        return overfit(model, train_loader, loss_fn, recipe, folder, device)
    make_folder(folder)
    trained = [p for p in [*model.parameters(), *loss_fn.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=device_type(device) != "mps")
    n_steps = recipe.epochs * len(train_loader)
    warm_up = recipe.warm_up if abs(recipe.warm_up * n_steps - 1) > 1e-6 else 1.5 * recipe.warm_up  # at exactly one step OneCycleLR divides by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=n_steps, pct_start=warm_up)
    decay = max(0.0, min(recipe.ema, 1 - 10 / n_steps))  # in a short run the average must forget its start too
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True)
    scaler = torch.amp.GradScaler(device_type(device), enabled=fast_dtype(device_type(device)) == torch.float16)
    parts = {"model": model, "average": average, "loss": loss_fn, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}

    first_settled = recipe.epochs - max(1, round(recipe.settled * recipe.epochs)) + 1
    history, best, spent = [], (-math.inf, -math.inf), 0.0
    if resume and (folder / "last.pt").exists():
        history, best, spent = _restore(folder / "last.pt", parts, recipe, settings)
        print(f"{folder.name}: going on after epoch {len(history)} of {recipe.epochs}")
    elif not resume:
        (folder / "last.pt").unlink(missing_ok=True)  # stopped in its first epoch, a new run must not go on as the old one
    write_text(folder / UNFINISHED, "")
    began = time.monotonic()
    out_of_time = False
    for epoch in range(len(history) + 1, recipe.epochs + 1):
        epoch_began = time.monotonic()
        try:
            train_loss = _train_epoch(model, average, train_loader, loss_fn, recipe, optimizer, schedule, scaler, device, epoch)
            score, val_loss, rank = None, None, (epoch, 0.0)  # without validation a later epoch is the better one
            if val_loader:
                outputs, targets = predict(average, val_loader, device, recipe.window, overlap=False)  # half the time of a test
                score, val_loss = score_fn(outputs, targets), loss_fn(outputs.to(device), targets.to(device)).item()
                rank = (score, -val_loss)
        except torch.OutOfMemoryError:
            size = train_loader.batch_size
            raise StepFailed(f"{device} ran out of memory with batches of {size} clips; try --batch-size {max(size // 2, 2)}") from None
        seconds = time.monotonic() - epoch_began
        # Compared from minus infinity, the loss only breaking ties, so something is always kept.
        # Once the rate is low and the weights hardly move, the choice begins anew: an earlier
        # epoch that did better on some hundred clips did so by chance (docs/experiments.md).
        kept = epoch == first_settled or rank > best
        history.append({"epoch": epoch, "lr": schedule.get_last_lr()[0], "train_loss": train_loss,
                        "val_loss": val_loss, "val_score": score, "kept": int(kept), "seconds": seconds})  # fmt: skip
        if kept:
            best = rank
            save_checkpoint(folder / "best.pt", average.module, settings, epoch=epoch, val_score=score)
        write_text(folder / "history.csv", pd.DataFrame(history).to_csv(index=False))
        elapsed = spent + time.monotonic() - began
        # Last of the three: what it says is done is never missing from the others, whenever the process is killed.
        _save_torch(folder / "last.pt", _state(parts, recipe, settings, history, best, elapsed))
        validated = f"val loss {val_loss:.4f}  val score {score:.4f}  " if val_loader else ""
        print(f"{folder.name} epoch {epoch:3d}/{recipe.epochs}  train loss {train_loss:.4f}  {validated}{seconds:.1f} s", flush=True)
        if epoch < recipe.epochs and time.monotonic() - began + seconds > max_seconds:
            print(f"{folder.name}: time is up after {epoch} of {recipe.epochs} epochs; scoring the best of them")
            out_of_time = True
            break
    (folder / UNFINISHED).unlink()
    checkpoint = load_checkpoint(folder / "best.pt")
    model.load_state_dict(checkpoint["state"])
    return {"epochs": len(history), "best_epoch": checkpoint["epoch"], "val_score": checkpoint["val_score"],
            "train_seconds": spent + time.monotonic() - began, "out_of_time": out_of_time, "history": history}  # fmt: skip


def device_type(device) -> str:
    return torch.device(device).type


def half_precision(device):
    """Context in which matrix work runs in the device's fast format."""
    dtype = fast_dtype(device_type(device))
    return torch.autocast(device_type(device), dtype=dtype, enabled=dtype != torch.float32)


def _train_epoch(model, average, loader, loss_fn, recipe, optimizer, schedule, scaler, device, epoch) -> float:
    """One pass over the training clips; returns the mean loss."""
    model.train()  # every epoch: validation has switched batch norm and dropout over
    losses, rates = [], []
    for x, targets, lengths in tqdm(loader, desc=f"epoch {epoch}", disable=not show_bars(), leave=False):
        x, targets = x.to(device), targets.to(device)
        if recipe.augment:
            x, targets = recipe.augment(x, targets)
        with half_precision(device):
            outputs = model(x, lengths)
        loss = loss_fn(outputs.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.detach())
    losses = torch.stack(losses).cpu()  # one wait for the GPU per epoch, not one per batch
    if not losses.isfinite().all():
        batch = int((~losses.isfinite()).nonzero()[0])
        raise StepFailed(f"loss is {losses[batch]:.3g} at epoch {epoch}, batch {batch + 1}, learning rate {rates[batch]:.2g}; the best epoch so far is kept, try a smaller --lr")
    return float(losses.mean())


@torch.inference_mode()
def predict(model, loader, device="cpu", window=None, overlap=True) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a model over a loader's clips in evaluation mode.

    Parameters
    ----------
    window : int or None
        Cut each clip into windows of this many frames and average their outputs; None:
        the whole clip at once.
    overlap : bool
        Windows overlap by half, which is a little better and takes twice as long.

    Returns
    -------
    outputs : torch.Tensor [shape=(N, ...)], float32, on the CPU
    targets : torch.Tensor [shape=(N,) or (N, 3)], on the CPU
    """
    model.eval()
    outputs, targets = [], []
    for x, y, lengths in loader:
        x = x.to(device)
        n_clips = len(x)
        if window and x.shape[1] > window:
            x, lengths = cut_windows(x, lengths, window, overlap)
        with half_precision(device):  # 128 at once: the activations of 700 windows are gigabytes, on a CPU four times slower
            out = torch.cat([model(part, n).float() for part, n in zip(x.split(128), lengths.split(128), strict=True)])
        outputs.append(out.unflatten(0, (n_clips, -1)).mean(1).cpu())
        targets.append(y.cpu())
    return torch.cat(outputs), torch.cat(targets)


def cut_windows(x, lengths, window, overlap=True) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, F) -> (B * W, window, F): W windows spread evenly over each clip."""
    n_windows = math.ceil(int(lengths.max()) / window)
    n_windows = 2 * n_windows - 1 if overlap else n_windows
    last = (lengths - window).clamp(min=0)  # (B,)
    starts = (last[:, None] * torch.linspace(0, 1, n_windows)).long()  # (B, W)
    rows = starts[:, :, None] + torch.arange(window)  # (B, W, window)
    clips = torch.arange(len(x))[:, None, None]
    cut = x[clips.to(x.device), rows.to(x.device)].flatten(0, 1)
    return cut, lengths.clamp(max=window).repeat_interleave(n_windows)


def overfit(model, loader, loss_fn, recipe, folder, device, n_batches=4, limit=300, goal=0.01) -> dict:
    """Learn a few fixed batches by heart, without regularisation (lab, step 5b).

    A network that cannot bring the loss to 0 on four batches cannot be trained at all:
    gradients, loss or labels are broken (Karpathy, 2019, A Recipe for Training Neural
    Networks).

    Returns
    -------
    dict
        steps, loss, accuracy (None for regression).

    Raises
    ------
    StepFailed
        The loss is not under `goal`, with every clip right, after `limit` passes.
    """
    batches = [batch for batch, _ in zip(loader, range(n_batches), strict=False)]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, StripeMask):
            module.widest = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    model.train()
    history = []
    for sweep in range(1, limit + 1):
        losses, hits = [], []
        for x, targets, lengths in batches:
            targets = targets.to(device)
            outputs = model(x.to(device), lengths)
            loss = loss_fn(outputs, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if outputs.dim() == 2 and not targets.is_floating_point():
                hits.append((outputs.argmax(1) == targets).float().mean().item())
        history.append({"epoch": sweep, "train_loss": np.mean(losses), "accuracy": np.mean(hits) if hits else None})
        done = history[-1]["train_loss"] < goal and (not hits or history[-1]["accuracy"] == 1)
        if sweep % 10 == 1 or done:
            print(f"overfit {len(batches)} batches, pass {sweep:3d}: loss {history[-1]['train_loss']:.4f}" + (f"  accuracy {np.mean(hits):.3f}" if hits else ""), flush=True)
        if done:
            break
    make_folder(folder)
    write_text(folder / "overfit.csv", pd.DataFrame(history).to_csv(index=False))
    if not done:
        raise StepFailed(f"four batches were not learned by heart in {limit} passes: loss {history[-1]['train_loss']:.4f} (goal {goal}), accuracy {history[-1]['accuracy']}")
    return {"passes": sweep, "loss": history[-1]["train_loss"], "accuracy": history[-1]["accuracy"], "history": history}


def _state(parts, recipe, settings, history, best, elapsed) -> dict:
    """All that an uninterrupted run would hold after this epoch."""
    states = {name: part.state_dict() for name, part in parts.items()}
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    plan = _plan(recipe, parts["schedule"])
    return states | {"rng": rng, "plan": plan, "settings": settings, "history": history, "best": list(best), "elapsed": elapsed}


def _plan(recipe, schedule) -> str:
    return f"--epochs {recipe.epochs} --lr {recipe.lr:g}, {schedule.total_steps} batches"


def _restore(path, parts, recipe, settings):
    state = _load_torch(path)
    if not isinstance(state, dict) or not {*parts, "rng", "plan", "settings", "history", "best", "elapsed"} <= set(state):
        raise InputError(f"{path}: not the state of a training; leave out --resume, which begins anew")
    plan = _plan(recipe, parts["schedule"])
    if state["plan"] != plan:
        raise InputError(f"{path}: begun with {state['plan']}, now {plan}; use the same, or leave out --resume")
    # Other clips, or the same ones split by another seed: what was validated would now be trained on.
    odd = [name for name, value in settings.items() if not _same(value, state["settings"].get(name))]
    if odd:
        raise InputError(f"{path}: begun with other clips or another --seed ({' and '.join(odd)} differ); use the same, or leave out --resume")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: belongs to another model; leave out --resume, or name another --out-dir") from error
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    return state["history"], tuple(state["best"]), state["elapsed"]


def _same(value, other) -> bool:
    """Equality of two settings, which are plain values or, the band statistics, tuples of tensors."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        return len(value) == len(other) and all(map(torch.equal, value, other))
    return value == other

# --------------------------------------------------------------------------------------
# The genre runs of steps 5 and 7, which steps 6, 8, 9 and 11 go on from
# --------------------------------------------------------------------------------------


class GenreRun(NamedTuple):
    """One genre model of the lab: its network and what it hears."""

    network: str  # 'lstm' or 'cnn'
    features: str
    beat: bool
    plain: bool = False  # the textbook form: every frame, one direction, last step


GENRE_RUNS = {
    "mel": GenreRun("lstm", "mel", False), "beat_mel": GenreRun("lstm", "mel", True),
    "chroma": GenreRun("lstm", "chroma", False), "beat_chroma": GenreRun("lstm", "chroma", True),
    "fused": GenreRun("lstm", "fused", False), "beat_fused": GenreRun("lstm", "fused", True),
    "cnn_mel": GenreRun("cnn", "mel", False), "plain_mel": GenreRun("lstm", "mel", False, plain=True),
}  # fmt: skip
TRAINING_DEFAULTS = {"lr": 2e-3, "batch_size": 32}  # of genre and emotion, LSTM and CNN


class Budget(NamedTuple):
    """How much a kind of network is shown; chosen in cross-validation (docs/experiments.md)."""

    crop: int  # frames of a training example, and of a window when scoring
    genre: int  # training examples in all, which fixes the number of epochs for any size of data set
    emotion: int
    most_passes: int  # over a very small set


BUDGETS = {
    "lstm": Budget(crop=640, genre=30_000, emotion=10_000, most_passes=80),  # 15 s
    "cnn": Budget(crop=256, genre=100_000, emotion=20_000, most_passes=275),  # 6 s
}


def make_backbone(run) -> nn.Module:
    """The untrained backbone of a GenreRun."""
    n_bands = BANDS[run.features].stop - BANDS[run.features].start
    if run.network == "cnn":
        return CNNBackbone(n_bands)
    if run.plain:
        return LSTMBackbone(n_bands, bidirectional=False, n_layers=2, readout="last")
    return LSTMBackbone(n_bands, frames_per_step=1 if run.beat else 8, projection=128, mask_bands=16)


def make_augment(run, n_classes=0) -> Augment:
    """Random changes of a run's batches. An LSTM masks by itself; mixup, which helps the CNN, harms it."""
    if run.network == "cnn":
        return Augment(n_classes=n_classes)
    return Augment(mixup=0.0, mask_bands=0, mask_frames=0, n_classes=n_classes)


def even_out(logits, shares, strength=0.5):
    """Give rare classes a fairer chance: lower each logit by the log of its class's share.

    A network answers a common class more readily because it was common in training, which
    macro-F1 does not reward (Menon et al., 2021, Long-tail learning via logit adjustment).
    Half strength costs no accuracy in cross-validation (docs/experiments.md).

    logits (N, K); shares : sequence of K floats, of the training part
    """
    return logits - strength * torch.tensor(shares).log()


def genre_score(shares):
    """Validation score of a classifier: macro-F1, in which small classes count fully."""
    return lambda logits, targets: macro_f1(targets.numpy(), even_out(logits, shares).argmax(1).numpy(), len(shares))


def train_genre(step, name, *, epochs=None, batch_size=None, lr=None, subset=None, overfit_batch=False, resume=False, max_seconds=math.inf,
                seed=None, all_clips=False):  # fmt: skip
    """Train one of GENRE_RUNS into the step's folder.

    Parameters
    ----------
    seed : int, optional
        Another seed than the step's: other weights and batches, another validation part,
        a folder of its own.
    all_clips : bool
        Train the network that this run has kept further, on the validation clips too: what
        they were kept for is known by now. A quarter as many epochs at half the rate, the
        last one kept, a folder of its own.

    Returns
    -------
    model : Classifier, holding the epoch that was kept
    settings : dict, what `load_genre_test` needs
    result : dict, see `train`, and n_train, n_val, weights
    """
    run = GENRE_RUNS[name]
    smoke = step.args.smoke
    folder = step.folder / (name if seed is None else f"{name}_seed{seed}")
    seed = step.args.seed if seed is None else seed
    seed_everything(seed)  # each run alone gives what it gives among others
    budget = BUDGETS[run.network]
    window = None if run.beat or run.plain else budget.crop
    data = load_genre(step.data, run.features, run.beat, seed=seed, merge=not step.args.no_merge,
                      crop=None if overfit_batch else window, subset=subset or (64 if smoke else None), device=step.device, skip_bad=step.args.skip_bad)  # fmt: skip
    settings = data.settings | {"run": name, "seed": seed, "smoke": smoke, "window": window}
    n_classes = len(data.classes)
    planned, crops = plan_epochs(len(data.train), budget.genre, budget.most_passes, given=epochs or (2 if smoke or overfit_batch else None))
    planned_lr = lr or TRAINING_DEFAULTS["lr"]
    model, train_idx = Classifier(make_backbone(run), n_classes), data.train.indices
    if all_clips:
        model.load_state_dict(load_checkpoint(folder / "best.pt")["state"])
        folder = folder.with_name(f"{folder.name}_all_clips")
        train_idx, planned, planned_lr = train_idx + data.val.indices, max(round(planned / 4), 1), planned_lr / 2
    shown = Subset(data.train.dataset, train_idx * crops)
    recipe = Recipe(
        epochs=planned,
        lr=planned_lr,
        augment=None if run.plain else make_augment(run, n_classes),
        window=window,
    )
    batch_size = batch_size or TRAINING_DEFAULTS["batch_size"]
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.0 if overfit_batch else 0.1)
    val_loader = None if all_clips else make_loader(data.val, batch_size)
    result = train(model, make_loader(shown, batch_size, shuffle=True), val_loader, loss_fn, genre_score(settings["shares"]), recipe, folder, settings,
                   device=step.device, overfit_batch=overfit_batch, resume=resume, max_seconds=max_seconds)  # fmt: skip
    return model, settings, result | {"n_train": len(train_idx), "n_val": 0 if all_clips else len(data.val), "weights": count_weights(model)}


def earlier_folders(step, owner) -> list[Path]:
    """Folders that may hold an earlier step's outputs; on Kaggle, attached kernels' too."""
    folders = [step.out / owner]
    if on_kaggle():
        for kernel in ("*", "*/outputs", "notebooks/*/*", "notebooks/*/*/outputs"):
            folders += sorted((kaggle_root() / "input").glob(f"{kernel}/{owner}"))
    return folders


def find_genre_checkpoint(step, name) -> tuple[Path, dict] | None:
    """Find what the step that trains a genre run has left for this data.

    A checkpoint of a smoke run, or of other classes, is passed over, saying so.
    """
    run = GENRE_RUNS[name]
    owner = "step07_cnn" if run.network == "cnn" else "step05_lstm"
    classes = sorted({entry.label for entry in read_entries(step.data, "genre", "train", run.beat, merge=not step.args.no_merge)})
    for folder in [*earlier_folders(step, owner), step.folder, step.out / "step09_transfer"]:
        path = folder / name / "best.pt"
        if not path.exists() or (path.parent / UNFINISHED).exists():
            continue
        checkpoint = load_checkpoint(path)
        settings = checkpoint["settings"]
        if settings.get("run") != name:
            raise InputError(f"{path}: holds the model of run {settings.get('run')}, not of {name}; delete it and train again")
        if settings["classes"] == classes and settings["smoke"] <= step.args.smoke:
            return path, checkpoint
        print(f"{name}: passing over {path}: " + ("made by --smoke" if settings["smoke"] else "trained on other classes"))
    return None


def genre_model(step, name) -> tuple[nn.Module, dict, Path]:
    """Find the trained model of a genre run, or train it, saying so.

    Returns
    -------
    model, settings, path of the checkpoint
    """
    if found := find_genre_checkpoint(step, name):
        path, _ = found
        print(f"{name}: using {path}")
        model, checkpoint = load_model(path, step.device)
        return model, checkpoint["settings"], path
    print(f"{name}: no checkpoint yet, training it here")
    model, settings, _ = train_genre(step, name, resume=getattr(step.args, "resume", False), max_seconds=seconds_left(step.args))
    return model.eval(), settings, step.folder / name / "best.pt"


def score_genre(step, model, settings, beat=None) -> tuple[dict, np.ndarray, np.ndarray, list[str]]:
    """Score a trained genre model on the test split; only after all training.

    Returns
    -------
    scores : dict, see `classification_scores`
    targets : np.ndarray [shape=(N,)]
    logits : np.ndarray [shape=(N, K)], see `even_out`
    ids : list of N str, sorted; what the rows of two models are matched by
    """
    beat = settings["beat"] if beat is None else beat
    test = load_genre_test(step.data, settings, beat=beat, device=step.device, skip_bad=step.args.skip_bad, allow_leak=step.args.allow_leak)
    usual, window = model.backbone.frames_per_step, settings["window"]
    if beat != settings["beat"]:
        # The other kind of input: one column of it stands for as much time as one step of
        # the training input did, as nearly as can be (a beat is about 21 frames).
        model.backbone.frames_per_step, window = (1 if beat else 21), None
    logits, targets = predict(model, make_loader(test, 64), step.device, window)
    logits = even_out(logits, settings["shares"])
    model.backbone.frames_per_step = usual
    ids = [entry.clip_id for entry in test.store.entries]
    return classification_scores(targets, logits.argmax(1), settings["classes"]), targets.numpy(), logits.numpy(), ids


def genre_predictions(model, beat, classes, ids, targets, answers) -> pd.DataFrame:
    """One row per test clip: which clip, which model, which test set, the true and the predicted class.

    beat : whether the test set is the beat-synchronised one
    targets, answers : class numbers [shape=(N,)]
    """
    names = np.array(classes)
    test_set = part_folder(".", "genre", beat).name
    return pd.DataFrame({"clip": ids, "model": model, "test_set": test_set, "truth": names[targets], "prediction": names[answers]})


# --------------------------------------------------------------------------------------
# The emotion runs of steps 8, 9 and 10: same clips, same folds, same recipe
# --------------------------------------------------------------------------------------

N_FOLDS = 5  # a fifth is held out: the lab gives no labels for its test clips


class EmotionSplit(NamedTuple):
    """Indices of the labelled emotion clips; `test` is held out from all choices."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def emotion_splits(n_clips, seed, n_folds=N_FOLDS) -> list[EmotionSplit]:
    """Cut the labelled clips into folds; the first one's `test` is the held-out part.

    Steps 8, 9 and 10 use the same seed and so are scored on the same clips. All folds
    together predict every clip once, by a model that has not seen it.
    """
    if n_clips < 4 * n_folds:
        raise InputError(f"{FOLDERS['emotion']}: {n_clips} labelled clips are too few for {n_folds} folds; at least {4 * n_folds} are needed")
    splits = []
    for rest, test in KFold(n_folds, shuffle=True, random_state=seed).split(np.arange(n_clips)):
        train, val = split_indices(len(rest), VAL_FRACTION, seed)
        splits.append(EmotionSplit(rest[train], rest[val], test))
    return splits


def load_emotion(step, split="train", beat=False) -> tuple[ClipStore, np.ndarray]:
    """Load emotion clips; returns them and their labels (N, 3), NaN where there are none."""
    store = load_clips(read_entries(step.data, "emotion", split, beat), step.args.skip_bad)
    targets = np.array([entry.label or (math.nan,) * 3 for entry in store.entries], dtype=np.float32)
    store.frames = to_resident(store.frames, step.device)
    return store, targets


def train_emotion(step, name, run, split, axis=None, *, init=None, frozen_blocks=0, learned_weights=False,
                  epochs=None, batch_size=None, lr=None, subset=None, overfit_batch=False, resume=False, max_seconds=math.inf):  # fmt: skip
    """Train a regressor of one axis, or of all three, into the step's folder.

    Parameters
    ----------
    name : str
        Of the run's folder.
    run : GenreRun
        The network and what it hears.
    split : EmotionSplit
    axis : 'valence', 'energy', 'danceability', or None for all three by one model
    init : path of a genre checkpoint, optional
        Start from its backbone (step 9). Input is then standardised as it was there.
    frozen_blocks : int
        Leave the first blocks (or LSTM layers) of that backbone as they are.
    learned_weights : bool
        Multitask only: learn the three losses' weights.

    Returns
    -------
    model, settings, result (see `train`, and `predictions` for split.test)
    """
    smoke = step.args.smoke
    seed_everything(step.args.seed)
    store, targets = load_emotion(step, beat=run.beat)
    columns = EMOTIONS.index(axis) if axis else slice(None)
    train_idx = split.train[: subset or (64 if smoke else None)]
    if init:
        backbone, checkpoint = load_backbone_from_checkpoint(init)
        stats = checkpoint["settings"]["stats"]
    else:
        backbone, stats = make_backbone(run), band_statistics(store, train_idx, run.features)
    backbone.freeze(frozen_blocks)
    mean, std = targets[train_idx].mean(0), targets[train_idx].std(0).clip(min=1e-3)
    if axis:
        model = Regressor(backbone, float(mean[columns]), float(std[columns]))
        loss_fn = RegressionLoss(std[columns])
    else:
        model, loss_fn = MultitaskRegressor(backbone, mean.tolist(), std.tolist()), MultitaskLoss(std, learned_weights)

    budget = BUDGETS[run.network]
    window = None if run.beat else budget.crop
    whole = SpectrogramDataset(store, targets[:, columns], run.features, stats)
    batch_size = batch_size or TRAINING_DEFAULTS["batch_size"]
    planned, crops = plan_epochs(len(train_idx), budget.emotion, budget.most_passes, given=epochs or (2 if smoke or overfit_batch else None))
    train_loader = make_loader(Subset(whole.variant(crop=None if overfit_batch else window), train_idx.tolist() * crops), batch_size, shuffle=True)
    val_loader, test_loader = (make_loader(Subset(whole, part.tolist()), batch_size) for part in (split.val, split.test))
    recipe = Recipe(
        epochs=planned,
        lr=lr or TRAINING_DEFAULTS["lr"],
        augment=make_augment(run),
        window=window,
    )
    settings = {"part": "emotion", "run": name, "features": run.features, "beat": run.beat, "axis": axis, "stats": stats,
                "seed": step.args.seed, "smoke": smoke, "window": window}  # fmt: skip
    result = train(model, train_loader, val_loader, loss_fn, emotion_score, recipe, step.folder / name, settings,
                   device=step.device, overfit_batch=overfit_batch, resume=resume, max_seconds=max_seconds)  # fmt: skip
    if not overfit_batch:
        result["predictions"] = predict(model, test_loader, step.device, window)[0].numpy()
    return model, settings, result | {"n_train": len(train_idx), "weights": count_weights(model)}


def emotion_score(outputs, targets) -> float:
    """Validation score: Spearman's correlation, the mean over the axes where there are three."""
    pairs = zip(targets.reshape(len(targets), -1).T, outputs.reshape(len(outputs), -1).T, strict=True)
    return float(np.mean([spearman(target, output) for target, output in pairs]))


def write_submission(path, clip_ids, predictions) -> None:
    """Write predictions (N, 3) for unlabelled clips in the competition's format."""
    frame = pd.DataFrame(np.clip(predictions, 0, 1), columns=EMOTIONS)
    frame.insert(0, "Id.fused.full.npy.gz", list(clip_ids))
    write_text(path, frame.to_csv(index=False, float_format="%.6f"))


def predict_unlabelled(step, model, settings) -> tuple[list[str], np.ndarray]:
    """Predict the emotion test clips, which have no labels: ids and (N,) or (N, 3)."""
    store, targets = load_emotion(step, "test", settings["beat"])
    data = SpectrogramDataset(store, targets, settings["features"], settings["stats"])
    outputs, _ = predict(model, make_loader(data, 64), step.device, settings["window"])
    return [entry.clip_id for entry in store.entries], outputs.numpy()


def genre_val_scores(step) -> dict[str, float]:
    """Validation macro-F1 of the genre models that steps 5 and 7 have left, best first."""
    names = [name for name, run in GENRE_RUNS.items() if not run.plain]
    scores = {name: found[1]["val_score"] for name in names if (found := find_genre_checkpoint(step, name))}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def emotion_folds(step, runs, folds=1):
    """Load the labelled emotion clips and cut them as every emotion step cuts them.

    Parameters
    ----------
    runs : iterable of GenreRun
        What the networks hear: whole clips, beat-synchronised ones, or both.
    folds : int
        1: one part is held out; more: cross-validation, each clip held out once.

    Returns
    -------
    store : ClipStore, of the whole clips
    targets : np.ndarray [shape=(N, 3)]
    splits : {False: list of EmotionSplit} for whole clips, and {True: ...} for beats if used.
        The parts hold the same clips in the same order, by id, even if the two label
        files list them in different orders.
    """
    store, targets = load_emotion(step)
    splits = {False: emotion_splits(len(targets), step.args.seed, folds) if folds > 1 else emotion_splits(len(targets), step.args.seed)[:1]}
    if any(run.beat for run in runs):
        ids = [entry.clip_id for entry in store.entries]
        position = {entry.clip_id: index for index, entry in enumerate(load_emotion(step, beat=True)[0].entries)}
        odd = sorted(position.keys() ^ set(ids))
        if odd:
            raise InputError(f"{part_folder(step.data, 'emotion', True)}: clip {odd[0]} can be used in only one of the full and the beat-synchronised emotion data; take it out of both label files")
        splits[True] = [EmotionSplit(*(np.array([position[ids[index]] for index in part]) for part in split)) for split in splits[False]]
    return store, targets, splits


def emotion_flags(args) -> dict:
    """The flags of the command line that `train_emotion` takes."""
    return {key: getattr(args, key) for key in ("epochs", "batch_size", "lr", "subset", "resume")}


def held_out_clips(store, targets, splits) -> tuple[np.ndarray, list[str]]:
    """Targets and ids of the held-out clips of all folds, in the order of pooled predictions."""
    held_out = np.concatenate([split.test for split in splits[False]])
    return targets[held_out], [store.entries[index].clip_id for index in held_out]


def stop_at_emotion_leak(step, store, splits) -> None:
    """Raise InputError where a genre model would have heard clips that are held out here."""
    held_out = np.concatenate([split.test for split in splits[False]])
    genre = load_clips(read_entries(step.data, "genre", "train", merge=not step.args.no_merge), step.args.skip_bad)
    test = dataclasses.replace(store, entries=[store.entries[i] for i in held_out], digests=[store.digests[i] for i in held_out])
    leaked = find_leak(genre, test)
    if not leaked:
        return
    fault = f"{len(leaked)} of {len(held_out)} held-out emotion clips are in the genre training split too, e.g. {leaked[0]}"
    if not step.args.allow_leak:
        raise InputError(f"{part_folder(step.data, 'emotion')}: {fault}; remove them from one, or pass --allow-leak")
    print(f"warning: {fault}", file=sys.stderr)
    step.text(f"> **Leak allowed by --allow-leak.** {fault}: scores of models that start from the genre model may be too high.")


def train_emotion_folds(step, name, job, splits, flags, runs_left=1):
    """Train one emotion run on every fold.

    Parameters
    ----------
    job : dict
        Arguments of `train_emotion`: run, and what else is not its default.
    flags : dict
        Of the command line: epochs, batch_size, lr, subset, resume.
    runs_left : int
        Trainings that share what is left of --max-minutes, this one's folds included.

    Returns
    -------
    record : dict for metrics.json, still without test scores
    predictions : np.ndarray [shape=(N,) or (N, 3)], for `held_out_clips`
    members : list of (model, settings), one per fold
    history : list of dict, of the first fold
    """
    results, members = [], []
    folds = splits[job["run"].beat]
    for index, split in enumerate(folds):
        folder = name if len(folds) == 1 else f"{name}_fold{index + 1}of{len(folds)}"
        model, settings, result = train_emotion(step, folder, split=split, **job, **flags, max_seconds=seconds_left(step.args, runs_left - index))
        results.append(result)
        members.append((model, settings))
    record = {
        "epochs": max(result["epochs"] for result in results),
        "best_epoch": int(np.median([result["best_epoch"] for result in results])),
        "train_seconds": sum(result["train_seconds"] for result in results),
        "weights": results[0]["weights"],
        "n_train": results[0]["n_train"],
        "val": {job.get("axis", "mean_spearman"): float(np.mean([result["val_score"] for result in results]))},
    }
    return record, np.concatenate([result["predictions"] for result in results]), members, results[0]["history"]


def train_emotion_jobs(step, jobs, splits, targets, flags):
    """Train {name: job} one after another, then score them all on the held-out clips.

    Parameters
    ----------
    targets : np.ndarray [shape=(N, 3)], of `held_out_clips`

    Returns
    -------
    runs : {name: record for metrics.json}
    predictions : {name: {axis: (N,)}}
    members, histories : {name: see `train_emotion_folds`}
    """
    runs, predictions, members, histories = {}, {}, {}, {}
    for position, (name, job) in enumerate(jobs.items()):
        left = (len(jobs) - position) * len(splits[False])
        runs[name], outputs, members[name], histories[name] = train_emotion_folds(step, name, job, splits, flags, left)
        predictions[name] = {job["axis"]: outputs} if "axis" in job else by_axis(outputs)
    for name in jobs:
        runs[name]["test"] = score_by_axis(targets, predictions[name])
    return runs, predictions, members, histories


def overfit_emotion(step, jobs, splits, flags) -> dict:
    """Learn four batches by heart with each job's network and loss (--overfit-batch)."""
    checks = {}
    for name, job in jobs.items():
        _, _, result = train_emotion(step, name, split=splits[job["run"].beat][0], **job, **flags, overfit_batch=True)
        checks[name] = {"passes": result["passes"], "loss": result["loss"]}
    step.heading("Overfitting four batches")
    step.text("With regularisation off, each network brings its regression loss on four fixed batches close to 0: gradients, loss and labels are wired correctly.")
    step.table(pd.DataFrame(checks).T.astype({"passes": int}).rename_axis("run"))
    return step.finish(overfit=checks)


def emotion_floors(store, targets, splits, seed) -> dict[str, np.ndarray]:
    """Predictions (N, 3) for the held-out clips by methods that hear band statistics only.

    `constant` is the mean training label, `ridge` linear and `svr` support vector
    regression. They are fitted on training and validation part together, which is what
    the networks have seen too, and their parameters chosen by cross-validation in there.
    """
    features = band_features(store)  # (N, 640)
    folds = KFold(5, shuffle=True, random_state=seed)
    grids = {
        "ridge": (Ridge(), {"model__alpha": np.logspace(1, 5, 9)}),
        "svr": (SVR(), {"model__C": [0.03, 0.1, 0.3, 1.0], "model__epsilon": [0.03, 0.1]}),
    }
    known = [np.concatenate([split.train, split.val]) for split in splits[False]]
    n_test = sum(len(split.test) for split in splits[False])
    # One constant for all folds: a fold's own mean is low where its held-out labels are high, which would rank backwards.
    predictions = {"constant": np.tile(targets[known[0]].mean(0), (n_test, 1))}
    for name, (model, grid) in grids.items():
        search = GridSearchCV(Pipeline([("scale", StandardScaler()), ("model", model)]), grid, cv=folds, scoring=make_scorer(spearman))
        columns = [
            [search.fit(features[rows], targets[rows, i]).predict(features[split.test]) for rows, split in zip(known, splits[False], strict=True)]
            for i in range(len(EMOTIONS))
        ]
        predictions[name] = np.stack([np.concatenate(parts) for parts in columns], axis=1)
    return predictions


def by_axis(predictions) -> dict[str, np.ndarray]:
    """(N, 3) -> {axis: (N,)}, the form in which the emotion steps keep predictions."""
    return dict(zip(EMOTIONS, np.asarray(predictions).T, strict=True))


def score_by_axis(targets, predictions) -> dict:
    """`emotion_scores` of {axis: (N,)}, which may lack axes, against targets (N, 3)."""
    axes = [axis for axis in EMOTIONS if axis in predictions]
    return emotion_scores(targets[:, [EMOTIONS.index(axis) for axis in axes]], np.stack([predictions[axis] for axis in axes], axis=1), axes)


def join_axes(parts, scores) -> dict:
    """One record for {axis: record}: single-axis models that answer together."""
    val = {axis: part["val"][axis] for axis, part in parts.items()}
    totals = {key: sum(part[key] for part in parts.values()) for key in ("epochs", "train_seconds", "weights")}
    return totals | {"val": val | {"mean_spearman": float(np.mean(list(val.values())))}, "test": scores}


def emotion_difference(targets, first, second) -> tuple[float, list[float]]:
    """Spearman of `first` minus that of `second`, mean over their common axes, and its 95% interval.

    Both are scored on the same resamples of the clips: what makes a clip hard is common
    to both and cancels, so this tells more than two intervals side by side.

    targets (N, 3); first, second : {axis: (N,)}
    """
    axes = [axis for axis in EMOTIONS if axis in first and axis in second]
    columns = [(targets[:, EMOTIONS.index(axis)], first[axis], second[axis]) for axis in axes]
    value = np.mean([spearman(target, a) - spearman(target, b) for target, a, b in columns])
    resampled = np.mean([resampled_spearman(target, a) - resampled_spearman(target, b) for target, a, b in columns], axis=0)
    return float(value), np.percentile(resampled, [2.5, 97.5]).tolist()


def difference_text(first, second, difference) -> str:
    """Say what `emotion_difference` found between two named models."""
    value, (low, high) = difference
    verdict = f"`{first}` is better" if low > 0 else f"`{second}` is better" if high < 0 else "the interval holds 0: these clips do not tell the two apart"
    return f"`{first}` minus `{second}`: {value:+.3f} [{low:+.3f}, {high:+.3f}]; {verdict}."


def report_emotion_rows(step, scores, caption, facts=None) -> None:
    """Table and figure of {row: scores}; rows may lack axes. `facts`: {row: further columns}."""
    keys = [key for key in (*EMOTIONS, "mean_spearman") if any(key in row for row in scores.values())]
    n_clips = next(iter(scores.values()))["n_clips"]
    titles = {key: "mean of the three" if key == "mean_spearman" else key for key in keys}
    table = {
        row: (facts or {}).get(row, {}) | {titles[key]: "{:.3f} [{:.3f}, {:.3f}]".format(values[key], *values[f"{key}_ci95"]) for key in keys if key in values}
        for row, values in scores.items()
    }
    columns = dict.fromkeys(column for row in table.values() for column in row)  # a row may lack some
    table = {row: dict.fromkeys(columns, "") | values for row, values in table.items()}
    step.table(pd.DataFrame(table).T.rename_axis("model"), f"{caption}: Spearman's correlation on {n_clips} held-out clips, 95% bootstrap intervals")
    fig, axes = plt.subplots(1, len(keys), figsize=(4.2 * len(keys) + 1, 0.42 * len(scores) + 1.3), squeeze=False, layout="constrained")
    for ax, key in zip(axes.flat, keys, strict=True):
        rows = [row for row in scores if key in scores[row]]
        plot_scores(ax, rows, [scores[row][key] for row in rows], [scores[row][f"{key}_ci95"] for row in rows], "Spearman (bar: 95% interval)")
        ax.locator_params(axis="x", nbins=5)
        ax.set_title(titles[key])
    step.figure(fig, "scores", f"{caption}: Spearman's correlation on the held-out clips")


def submit_emotion(step, groups) -> None:
    """Predict the unlabelled clips into submission.csv.

    groups : list of lists of (model, settings)
        A group's members, one per fold, are averaged; the groups' columns stand side by
        side: one group of three-axis models, or one group per axis.
    """
    if not read_entries(step.data, "emotion", "test"):
        step.text("The emotion data has no unlabelled clips, so there is no submission.csv.")
        return
    columns = []
    for members in groups:
        outputs = [predict_unlabelled(step, *member) for member in members]
        ids = outputs[0][0]
        columns.append(np.mean([values for _, values in outputs], axis=0).reshape(len(ids), -1))
    write_submission(step.folder / "submission.csv", ids, np.hstack(columns))
    step.text(f"`submission.csv` holds predictions for the {len(ids)} unlabelled clips in the competition's format.")


def write_predictions(step, ids, targets, predictions) -> None:
    """Write truth and {row: {axis: (N,)}} of the held-out clips to predictions.csv."""
    columns = {"Id": ids} | by_axis(targets)
    columns |= {f"{row}_{axis}": values for row, axes in predictions.items() for axis, values in axes.items()}
    write_text(step.folder / "predictions.csv", pd.DataFrame(columns).to_csv(index=False))


def earlier_emotion(step, owner, ids) -> tuple[dict, dict]:
    """Read what an earlier emotion step predicted for these very clips.

    Returns
    -------
    predictions : {row: {axis: (N,)}}; empty where the step was not run, or not on these clips
    runs : dict, of its metrics.json
    """
    folder = next((folder for folder in earlier_folders(step, owner) if (folder / "metrics.json").exists() and (folder / "predictions.csv").exists()), None)
    if not folder:
        step.text(f"`{owner}` has not been run in this output folder, so its scores are missing here.")
        return {}, {}
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        table = pd.read_csv(folder / "predictions.csv", dtype={"Id": str})
    except ValueError:
        raise InputError(f"{folder}: its metrics.json or predictions.csv cannot be read; run {owner} again, or delete them") from None
    same = metrics["data"]["root"] == str(step.data) and [metrics.get(key) for key in ("seed", "smoke")] == [step.args.seed, step.args.smoke]
    if not same or table["Id"].tolist() != ids:
        step.text(f"`{owner}` was run on other data, another seed or other held-out clips, so its scores are not compared here.")
        return {}, {}
    predictions = {}
    for column in table.columns[1 + len(EMOTIONS) :]:
        row, axis = column.rsplit("_", 1)
        predictions.setdefault(row, {})[axis] = table[column].to_numpy()
    return predictions, metrics["runs"]


# ======================================================================================
# 8. Metrics: scores of whole test sets, with intervals
# ======================================================================================


def bootstrap(score, n_clips, seed=0, n_resamples=1000) -> list[float]:
    """95% interval of a score by resampling clips (Efron & Tibshirani, 1993, ch. 13).

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
    """Mean F1 over the classes that occur in targets or predictions (arrays of ints)."""
    counts = np.bincount(targets * n_classes + predictions, minlength=n_classes**2).reshape(n_classes, n_classes)
    seen = counts.sum(0) + counts.sum(1)  # of class k: true + predicted = 2 TP + FP + FN
    return float((2 * counts.diagonal()[seen > 0] / seen[seen > 0]).mean())


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
    labels = np.arange(len(classes))
    report = functools.partial(precision_recall_fscore_support, targets, predictions, labels=labels, zero_division=0)
    scores = {"accuracy": float((targets == predictions).mean()), "n_clips": len(targets)}
    for average in ("macro", "micro"):
        for name, value in zip(("precision", "recall", "f1"), report(average=average), strict=False):
            scores[f"{average}_{name}"] = float(value)
    columns = zip(classes, *(column.tolist() for column in report(average=None)), strict=True)
    scores["per_class"] = {name: {"precision": p, "recall": r, "f1": f, "support": n} for name, p, r, f, n in columns}
    scores["confusion"] = confusion_matrix(targets, predictions, labels=labels).tolist()
    scores["accuracy_ci95"] = bootstrap(lambda i: (targets[i] == predictions[i]).mean(), len(targets))
    scores["macro_f1_ci95"] = bootstrap(lambda i: macro_f1(targets[i], predictions[i], len(classes)), len(targets))
    return scores


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
    a, b = (rankdata(np.asarray(values, dtype=float)[rows], axis=1) - (n_clips + 1) / 2 for values in (targets, predictions))
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.where(norm > 0, norm, 1)  # a constant ranks nothing: 0


def emotion_scores(targets, predictions, axes=EMOTIONS) -> dict:
    """Spearman per axis and, with all three axes, their mean (lab, step 8e).

    targets, predictions : array-like [shape=(N, len(axes))]
    """
    targets, predictions = np.asarray(targets), np.asarray(predictions)
    scores, resampled = {"n_clips": len(targets)}, []
    for i, axis in enumerate(axes):
        scores[axis] = spearman(targets[:, i], predictions[:, i])
        resampled.append(resampled_spearman(targets[:, i], predictions[:, i]))
        scores[f"{axis}_ci95"] = np.percentile(resampled[-1], [2.5, 97.5]).tolist()
    if len(axes) == len(EMOTIONS):
        scores["mean_spearman"] = float(np.mean([scores[axis] for axis in axes]))
        scores["mean_spearman_ci95"] = np.percentile(np.mean(resampled, axis=0), [2.5, 97.5]).tolist()
    return scores


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
        step = np.abs(np.diff(mel, axis=0)).mean(0) if length > 1 else np.zeros(N_MELS)
        rows.append(np.concatenate([mel.mean(0), mel.std(0), *np.percentile(mel, [10, 90], axis=0), step]))
    return np.array(rows)


# ======================================================================================
# 9. Plots: every figure labelled, with units
# ======================================================================================

# Ten colours that colour-blind readers can tell apart (Wong, 2011, two added), and marks for print.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442", "#7F3C8D", "#999999")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")


def plot_spectrogram(ax, array, kind="mel", beat=False):
    """Draw (F, T) rows of a clip: mel in dB over Hz, or chroma over note names.

    Time runs in seconds, or in beats for beat-synchronised arrays.
    """
    import librosa.display

    limits = {"vmin": DB_FLOOR, "vmax": 0, "cmap": "magma"} if kind == "mel" else {"vmin": 0, "vmax": 1, "cmap": "viridis"}
    image = librosa.display.specshow(
        np.asarray(array, dtype=float), sr=SR, hop_length=HOP, ax=ax, y_axis=kind, x_axis=None if beat else "time", **limits
    )
    ax.set_xlabel("Time (beats)" if beat else "Time (s)")
    ax.set_ylabel("Frequency (Hz)" if kind == "mel" else "Pitch class")
    if kind == "chroma":
        ax.set_yticks(range(N_CHROMA), NOTES, fontsize="small")
    if beat:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if array.shape[1] / step <= 8)
        ax.set_xticks(range(0, array.shape[1], step))
    return image


def plot_history(ax, history, title="", score_name="score"):
    """Loss (left axis) and validation score (right axis) against the epoch."""
    history = pd.DataFrame(history)
    ax.plot(history["epoch"], history["train_loss"], color=COLORS[0], label="train loss")
    ax.plot(history["epoch"], history["val_loss"], color=COLORS[3], label="validation loss")
    ax.set(xlabel="Epoch", ylabel="Loss", title=title)
    right = ax.twinx()
    right.plot(history["epoch"], history["val_score"], color=COLORS[2], linestyle="--", label=f"validation {score_name}")
    right.set_ylabel(f"Validation {score_name}")
    best = history[history["kept"] == 1].iloc[-1]  # each one kept replaces the one before
    right.plot(best["epoch"], best["val_score"], "o", color=COLORS[2])
    lines = ax.get_lines() + right.get_lines()[:1]
    ax.legend(lines, [line.get_label() for line in lines], loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=3, fontsize="small", frameon=False)
    ax.xaxis.get_major_locator().set_params(integer=True)


def plot_confusion(ax, confusion, classes, title=""):
    """Confusion matrix: share of each true class, with the counts written in."""
    counts = np.asarray(confusion)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ax.text(column, row, count, ha="center", va="center", fontsize="small", color="white" if share[row, column] > 0.5 else "black")
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
    ax.set(xlabel=xlabel, xlim=(min(0, np.min(np.array(intervals)) - 0.02), 1))
    for position, value, (_, high) in zip(y, values, intervals, strict=True):
        ax.text(max(value, high) + 0.01, position, f"{value:.3f}", va="center", fontsize="small")


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
    lab's two random lines with different labels (steps 1 to 3 draw the same ones).
    """
    lines = read_entries(data_dir, "genre", "train")
    random.Random(seed).shuffle(lines)
    drawn = {}
    for entry in lines:
        drawn.setdefault(entry.label, []).append(entry)
    chosen = [group[i] for i in range(per_genre) for group in drawn.values() if i < len(group)]

    def arrays(entries):
        store = load_clips(entries, skip_bad)
        spans = zip(store.entries, store.starts.tolist(), store.lengths.tolist(), strict=True)
        return {entry.clip_id: store.frames[start : start + n].T.numpy() for entry, start, n in spans}

    full = arrays(chosen)
    folder = part_folder(data_dir, "genre", beat=True) / "train"
    synced = arrays([entry._replace(path=folder / entry.path.name) for entry in chosen]) if beat else dict.fromkeys(full)
    clips = [Clip(e.clip_id, e.label, full[e.clip_id], synced[e.clip_id]) for e in chosen if e.clip_id in full and e.clip_id in synced]
    second = next((i for i, clip in enumerate(clips) if clip.genre != clips[0].genre), None)
    if second is None:
        raise InputError(f"{chosen[0].path.parent}: no two readable clips of different genres; the lab compares two")
    clips.insert(1, clips.pop(second))
    return clips


# Each measure of a mel spectrogram: name, unit, and what is said of the clip that has more of it.
MEASURES = {
    "centroid_hz": ("spectral centroid", "{:.0f} Hz", "is brighter"),
    "share_below_200_hz": ("share of energy below 200 Hz", "{:.1%}", "has the heavier bass"),
    "dynamic_range_db": ("dynamic range", "{:.1f} dB", "varies more in loudness"),
    "onsets_per_s": ("onset rate", "{:.2f} per s", "has more note and drum onsets"),
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
    if not beat:
        flux = librosa.onset.onset_strength(S=mel_db, sr=SR, hop_length=HOP)  # how much the bands rise from frame to frame
        onsets = librosa.onset.onset_detect(onset_envelope=flux, sr=SR, hop_length=HOP)
        values["onsets_per_s"] = len(onsets) / (mel_db.shape[1] * HOP / SR)
    return values


def with_units(measures, index_name) -> pd.DataFrame:
    """A table of mel measures as summary.md shows it."""
    columns = {label: measures[key].map(unit.format) for key, (label, unit, _) in MEASURES.items() if key in measures}
    return pd.DataFrame(columns).rename_axis(index_name)


def genre_share(values, genres) -> float:
    """Share of the variance over clips that the genre explains; chance gives 0 (epsilon squared)."""
    values = pd.Series(np.asarray(values, dtype=float))
    within = values - values.groupby(np.asarray(genres)).transform("mean")
    degrees = max(len(values) - len(set(genres)), 1)
    return max(0.0, 1 - (within**2).sum() / degrees / max(values.var(), 1e-12))


def lstm_batch(arrays, kind="mel") -> tuple[torch.Tensor, torch.Tensor]:
    """(140, T) arrays -> rows of one kind as a batch (B, T, F), standardised, then padded; lengths (B,)."""
    clips = [torch.from_numpy(array[BANDS[kind]]).float().T for array in arrays]
    frames = torch.cat(clips)
    mean, std = frames.mean(0), frames.std(0).clamp(min=1e-3)
    x = nn.utils.rnn.pad_sequence([(clip - mean) / std for clip in clips], batch_first=True)
    return x, torch.tensor([len(clip) for clip in clips])


def lstm_seconds(x) -> float:
    """Time of a training pass (forward, backward) of a textbook LSTM over x (B, T, F), in s."""
    lstm = nn.LSTM(x.shape[2], 128, batch_first=True).to(x.device)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        lstm(x)[0][:, -1].sum().backward()
        lstm.weight_hh_l0.grad[0, 0].item()  # reading a value waits for the GPU
        times.append(time.perf_counter() - began)
    return min(times[1:])  # the first pass allocates memory, and other programs only ever slow one down


def lstm_gradient(x, lengths) -> np.ndarray:
    """How strongly each step moves the last output of an untrained textbook LSTM.

    Returns
    -------
    np.ndarray [shape=(median length,)]
        Norm of d(last output)/d(input) by steps before the clip's last one, relative to
        the last one, averaged over the clips that are so long.
    """
    # In double precision: in single, what is below 1e-45 would read as 0.
    lstm = nn.LSTM(x.shape[2], 128, batch_first=True).double()
    x = x.double().requires_grad_()
    last = lstm(x)[0][torch.arange(len(x)), lengths - 1]  # (B, 128)
    # The squared norm of a product with random signs is on average that of the Jacobian (Hutchinson, 1990).
    (last * torch.randn_like(last).sign()).sum().backward()
    norms = x.grad.norm(dim=2)  # (B, T)
    back = lengths[:, None] - 1 - torch.arange(int(lengths.median()))  # (B, median length): the step so far back
    relative = norms.gather(1, back.clamp(min=0)) / norms.gather(1, lengths[:, None] - 1)
    return relative.masked_fill(back < 0, torch.nan).nanmean(0).numpy()


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
    spacing = {"hspace": 0.9 / size[1], "wspace": 0.06}  # given, not found by a layout engine: 40 panels would take it seconds
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(size[0] * n_columns, size[1] * n_rows), squeeze=False, gridspec_kw=spacing)
    for index, (ax, (title, array, beat)) in enumerate(zip(axes.flat, panels, strict=False)):
        image = plot_spectrogram(ax, array, kind, beat)
        ax.set_title(title, fontsize="medium")
        if index % n_columns:
            ax.set(ylabel="", yticklabels=[])
        if index + n_columns < len(panels):
            ax.set_xlabel("")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    label = "Power (dB, 0: the clip's loudest cell)" if kind == "mel" else "Chroma (1: a frame's strongest pitch class)"
    fig.colorbar(image, ax=fig.axes, label=label, shrink=min(1, 5 / (size[1] * n_rows)), fraction=0.02, pad=0.02)
    return fig


# ======================================================================================
# 10. Records: output folder, checkpoints, metrics.json, summary.md
# ======================================================================================


def make_folder(folder) -> None:
    """Make an output folder, parents included; one that is there already is fine."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file in its place, no permission, a read-only or full disk
        raise InputError(f"{folder}: no output folder can be made there ({error.strerror}); choose another --out-dir") from None


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
        raise InputError(f"{path}: cannot be written ({error.strerror}); free some space or choose another --out-dir") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text) -> None:
    write_bytes(path, lambda file: file.write(text.encode()))


def _save_torch(path, value) -> None:
    buffer = io.BytesIO()  # torch hides a full disk behind an error of its own
    torch.save(value, buffer)
    write_bytes(path, lambda file: file.write(buffer.getbuffer()))


def _load_torch(path) -> dict:
    """Load tensors and plain values only: a pickle may run code, so none is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it refuses anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; run the step that trains it first") from None
    except Exception as error:  # zip, pickle and torch errors: all mean the same to a user
        raise InputError(f"{path}: no readable checkpoint of this project; delete it and train again") from error


def save_checkpoint(path, model, settings, **facts) -> None:
    """Save weights with all that is needed to rebuild the model and prepare its input."""
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    _save_torch(path, {"spec": model_spec(model), "state": state, "settings": settings, **facts})


def load_checkpoint(path) -> dict:
    """Read a checkpoint: keys spec, state, settings, epoch, val_score."""
    checkpoint = _load_torch(path)
    if not isinstance(checkpoint, dict) or not {"spec", "state", "settings"} <= set(checkpoint):
        raise InputError(f"{path}: no checkpoint of this project; delete it and train again")
    return checkpoint


def load_model(path, device="cpu") -> tuple[nn.Module, dict]:
    """Rebuild a trained model; returns it, in evaluation mode, and its checkpoint."""
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(checkpoint["spec"])
        model.load_state_dict(checkpoint["state"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: its weights do not fit the model it describes; delete it and train again") from error
    return model.to(device).eval(), checkpoint


def load_backbone_from_checkpoint(path) -> tuple[nn.Module, dict]:
    """Return the trained backbone alone, without its head, and the checkpoint (step 9)."""
    model, checkpoint = load_model(path)
    return model.backbone.train(), checkpoint


@functools.cache
def lock_folder(folder):
    """Keep other processes out of an output folder until this one ends, however it ends.

    Cached: a notebook's second run of a cell holds the lock already. On systems without
    fcntl (Windows) there is no lock. Nobody else being there, what a killed process has
    left half-written is removed.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = None
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115, open as long as the process lives
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is writing there; wait for it, or choose another --out-dir") from None
    except OSError as error:
        if file is None:  # no permission, a read-only or full disk
            raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --out-dir") from None
        return file  # a file system without locks
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return file


class Step:
    """One run of a step: its device, data and output folder.

    Creating it seeds everything and finds the data. The figures and texts of the report
    are collected, and `finish` writes metrics.json and summary.md.
    """

    def __init__(self, name, args, needs_data=True):
        self.name, self.args = name, args
        seed_everything(args.seed)
        keep_freed_memory()
        self.device = pick_device(args.device)
        self.data = find_data(args.data_dir) if needs_data else None
        self.demo = bool(self.data and (self.data / "DEMO.txt").exists())
        self.out = Path(args.out_dir or (kaggle_root() / "working" / "outputs" if on_kaggle() else "outputs"))
        self.folder = self.out / name
        make_folder(self.folder)
        self.lock = lock_folder(self.folder)
        self.lines = []
        if self.demo:
            self.text("> **Synthesised demo data.** These numbers show that the pipeline runs; they say nothing about music.")
        print(f"{name}: data {self.data}, device {self.device}, output {self.folder}")

    def heading(self, text):
        self.lines.append(f"## {text}\n")

    def text(self, markdown):
        self.lines.append(markdown.strip() + "\n")

    def table(self, frame, caption=""):
        """Add a pandas table (index included) to summary.md and print it."""
        if caption:
            self.text(f"**{caption}**")
        self.lines.append(markdown_table(frame) + "\n")
        print(frame.to_string(float_format=lambda value: f"{value:.3f}"))

    def figure(self, fig, name, caption):
        """Save a figure as <name>.png, show it in a notebook, add it to summary.md."""
        write_bytes(self.folder / f"{name}.png", lambda file: fig.savefig(file, format="png", dpi=120, bbox_inches="tight"))
        if in_notebook():
            from IPython.display import display

            display(fig)
        plt.close(fig)
        self.lines.append(f"![{caption}]({name}.png)\n\n*{caption}*\n")

    def finish(self, runs=None, **facts) -> dict:
        """Write metrics.json and summary.md; returns what metrics.json holds."""
        metrics = {
            "step": self.name,
            "seconds": round(time.monotonic() - self.args.started, 2),
            "environment": environment(self.device),
            "data": {"root": str(self.data), "demo": self.demo},
            "runs": runs or {},
            **facts,
        }
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items() if key != "started"}
        write_text(self.folder / "args.json", json.dumps(plain, indent=2))
        write_text(self.folder / "summary.md", f"# {self.name}\n\n" + "\n".join(self.lines))
        write_text(self.folder / "metrics.json", json.dumps(metrics, indent=2, default=float))
        print(f"{self.name}: done in {metrics['seconds']:.0f} s; see {self.folder / 'summary.md'}")
        return metrics


def markdown_table(frame) -> str:
    """A pandas table as Markdown; floats with three decimals."""

    def cell(value):
        return f"{value:.3f}" if isinstance(value, float | np.floating) else str(value)

    header = [frame.index.name or "", *map(str, frame.columns)]
    rows = [[str(index), *map(cell, row)] for index, row in zip(frame.index, frame.itertuples(index=False), strict=True)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
