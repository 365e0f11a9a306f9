"""Folders and files: where the data lies, where outputs go, files written whole or not at all."""

import io
import json
import os
import sys
import tempfile
import uuid
import warnings
from pathlib import Path

import filelock
import torch

from patrec.demo import FOLDERS, write_demo
from patrec.errors import InputError
from patrec.machine import kaggle_root, on_kaggle

PROJECT = Path(__file__).resolve().parents[1]  # the folder of the steps
KAGGLE_NAME = "patreco3-multitask-affective-music"  # of the lab's data set, by geoparslp


def part_folder(root, part, beat=False) -> Path:
    """Folder of one part of the data: part is 'genre' or 'emotion'."""
    return Path(root) / (FOLDERS[part] + ("_beat" if beat else ""))


def find_data(data_dir=None, parts=tuple(FOLDERS), demo=True) -> Path:
    """Find the folder that holds fma_genre_spectrograms and its three siblings.

    Looks at `data_dir`, else $PATREC_DATA, else Kaggle's inputs, else data/ beside the
    scripts; as a last resort, and never on Kaggle, makes the demo set.

    parts : those that a step needs; of the demo set no others are made
    demo : False: make none

    Raises InputError if nothing is found; the message names the place tried.
    """
    given = data_dir or os.environ.get("PATREC_DATA")
    inputs, data = kaggle_root() / "input", PROJECT / "data"
    if given:
        places = [Path(given)]
    elif on_kaggle():  # the classic layout and the one of newer kernels, the lab's own data first
        mounts = [*sorted(inputs.glob("*")), *sorted(inputs.glob("datasets/*/*"))]
        places = sorted(mounts, key=lambda path: path.name != KAGGLE_NAME)
    else:
        places = [data, data / "demo"]
    names = {part_folder(".", part, beat).name for part in FOLDERS for beat in (False, True)}
    for place in places:
        # One level too high or too low is what people hand in most often: take it. Too low
        # only from one of the four folders: a mistyped data/song must not become data.
        inside = place.is_dir() and place.resolve().name in names
        for root in (place, place / "data", *([place.resolve().parent] if inside else [])):
            there = [part for part in FOLDERS if part_folder(root, part).is_dir()]
            if there and (place != data / "demo" or set(parts) <= set(there)):
                return root.resolve()
    if on_kaggle() and not given:
        cure = f"add geoparslp/{KAGGLE_NAME} under Input"
        raise InputError(f"data set not attached (looked in {inputs}); {cure}")
    if given or not demo:
        fault = f"no {FOLDERS['genre']} or {FOLDERS['emotion']} folder in {given or data}"
        raise InputError(f"{fault}; name the folder that holds them in --data-dir")
    notice = f"No data set found: a small made-up one is written to {places[-1]}."
    print(f"{notice} Scores on it say nothing about real music.", file=sys.stderr)
    try:
        return write_demo(places[-1], parts).resolve()
    except OSError as error:
        fault = f"the demo set cannot be written ({error.strerror or error})"
        raise InputError(f"{places[-1]}: {fault}; give --data-dir") from error


def cache_dir() -> Path:
    """Return a writable scratch folder for caches; inputs may be read-only.

    $PATREC_CACHE, else /tmp on Kaggle, else ~/.cache. It may be deleted at any time.
    """
    scratch = Path(tempfile.gettempdir()) if on_kaggle() else Path.home() / ".cache"
    folder = Path(os.environ.get("PATREC_CACHE", scratch / "patrec-music"))
    make_folder(folder, "cache", "set $PATREC_CACHE")
    return folder


def earlier_folders(training, owner) -> list[Path]:
    """Folders that may hold an earlier step's outputs; on Kaggle, attached kernels' too."""
    folders = [training.out / owner]
    if on_kaggle():
        for kernel in ("*", "*/outputs", "notebooks/*/*", "notebooks/*/*/outputs"):
            folders += sorted((kaggle_root() / "input").glob(f"{kernel}/{owner}"))
    return folders


def output_folder(given=None) -> Path:
    """Where the outputs of all steps go: --out-dir, else the working folder's outputs."""
    outputs = kaggle_root() / "working" / "outputs" if on_kaggle() else "outputs"
    return Path(given or outputs)


def make_folder(folder, kind="output", cure="choose another --out-dir") -> None:
    """Make a folder, parents included; one that is there already is fine."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file in its place, no permission, a read-only or full disk
        fault = f"no {kind} folder can be made there ({error.strerror})"
        raise InputError(f"{folder}: {fault}; {cure}") from None


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
        cure = "free some space, or choose another --out-dir or $PATREC_CACHE"
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


def lock_folder(folder) -> filelock.FileLock:
    """Keep other processes out of an output folder until this one ends, however it ends.

    The second run of a notebook's cell has the lock already. Half-written files of a killed
    process are removed, because no other process can be writing.
    """
    lock = filelock.FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        fault = "another process is writing there; wait for it, or choose another output folder"
        raise InputError(f"{folder}: {fault}") from None
    except (OSError, NotImplementedError) as error:  # no permission, read-only or full; no locks
        if not os.access(folder, os.W_OK):
            fault = f"cannot be written ({error}); choose another output folder"
            raise InputError(f"{folder}: {fault}") from None
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return lock


def to_json(facts) -> str:
    """JSON of facts that may hold NumPy's numbers and arrays, or paths."""

    def plain(value):
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return json.dumps(facts, indent=2, default=plain)
