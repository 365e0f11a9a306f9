"""Arrays of clips: reading, checks, cache, and comparison between splits."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from patrec.errors import InputError
from patrec.features import DB_FLOOR, N_MELS, N_ROWS
from patrec.files import cache_dir, part_folder, write_bytes, write_text
from patrec.labels import Entry, read_entries
from patrec.machine import show_bars

# NumPy parses headers with `ast`, which up to CPython 3.11.7 fails now and then while another
# thread is in it too (python/cpython#106905).
HEADER_LOCK = threading.Lock()


def read_array(path) -> np.ndarray:
    """Read one array, (140, T) float32, and check it.

    Raises InputError: missing, unreadable, of a wrong shape or kind, not finite, or out of range.
    """
    cure = "replace the file, or leave such clips out with --skip-bad"
    try:
        with HEADER_LOCK:  # the numbers are read when they are converted
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
        if os.path.exists(f"{path}.gz"):
            fault, cure = "missing, only its compressed form .npy.gz is there", "unpack it (gunzip)"
    except Exception as error:  # whatever a broken header makes numpy raise, MemoryError too
        reason = str(error).splitlines()[0] if str(error) else "empty file"
        fault = f"not a readable .npy array ({reason})"
    if fault:
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


N_READERS = (os.cpu_count() or 1) + 1  # threads: one waits for the disk while others compute


def load_clips(entries, skip_bad=False, threads=N_READERS) -> ClipStore:
    """Load the arrays of `entries`, in their order, into a ClipStore.

    The first time, threads read, check and convert the files into a cache: the frames of all
    clips in a .npy file, which later starts map, and the clips' lengths, digests and faults in
    a .json file. The cache's name is a hash of every file's name, size and time, so a changed
    data set is read anew.

    Raises InputError for the first bad array, unless `skip_bad`: then bad clips are named on
    stderr and left out.
    """
    if not entries:
        raise InputError("no clips to load; is the data set complete?")
    with ThreadPoolExecutor(threads) as pool:
        facts = list(pool.map(file_facts, entries))
        key = hashlib.sha256(repr(("version 2", facts)).encode()).hexdigest()[:24]
        cache = cache_dir() / f"{key}.json"
        try:
            clips, frames = open_cache(cache)
            left_out = [e for e, clip in zip(entries, clips, strict=True) if "fault" in clip]
            if any("fault" not in convert(entry)[1] for entry in left_out):
                raise ValueError("a disk or a share that had failed for a moment")
        except (OSError, ValueError):  # not there yet, or cut short when the machine went down
            fill_cache(cache, entries, pool)
            clips, frames = open_cache(cache)
    faults = [clip["fault"] for clip in clips if "fault" in clip]
    if faults and not skip_bad:
        more = f" (and {len(faults) - 1} more bad files)" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    kept = [(e, clip) for e, clip in zip(entries, clips, strict=True) if "fault" not in clip]
    if not kept:
        raise InputError(f"{entries[0].path.parent}: none of {len(entries)} clips can be read")
    lengths = torch.tensor([clip["length"] for _, clip in kept])
    starts, digests = lengths.cumsum(0) - lengths, [clip["digest"] for _, clip in kept]
    return ClipStore([entry for entry, _ in kept], frames, starts, lengths, digests)


def file_facts(entry) -> tuple:
    """Name, size and time of change of a file; two None for one that is missing."""
    path = str(entry.path)
    try:
        stat = os.stat(path)
        return path, stat.st_size, stat.st_mtime_ns
    except OSError:
        return path, None, None


def convert(entry) -> tuple[np.ndarray, dict]:
    """Read one clip as (T, 140) float16, time first: a crop is one block. And its row of .json."""
    try:  # torch converts to half precision several times as fast as NumPy
        array = torch.from_numpy(read_array(entry.path)).half().numpy()
    except InputError as error:
        return np.empty((0, N_ROWS), "<f2"), {"length": 0, "fault": str(error)}
    frames = np.ascontiguousarray(array.T)
    digest = hashlib.blake2b(frames[::16].tobytes(), digest_size=8).hexdigest()
    return frames, {"length": len(frames), "digest": digest}


def fill_cache(cache, entries, pool) -> None:
    """Write the frames of all clips into a .npy file, and a row for each clip into `cache`."""
    for leftover in cache.parent.glob(".*.tmp"):  # of killed runs; none is filled for a day
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 24 * 3600:
                leftover.unlink()
    blocks = (entries[n : n + 512] for n in range(0, len(entries), 512))  # few wait in memory
    converted = itertools.chain.from_iterable(pool.map(convert, block) for block in blocks)
    bar = {"desc": "reading clips", "total": len(entries), "disable": not show_bars()}
    clips = []

    def write_header(file):
        file.seek(0)  # NumPy leaves room in the header for any number of frames
        shape = (sum(clip["length"] for clip in clips), N_ROWS)
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

    def write_frames(file):
        write_header(file)
        for frames, clip in tqdm(converted, leave=False, **bar):
            clips.append(clip)
            file.write(frames)
        write_header(file)

    write_bytes(cache.with_suffix(".npy"), write_frames)
    write_text(cache, json.dumps(clips))  # last: it says that the cache is whole


def open_cache(cache) -> tuple[list[dict], torch.Tensor]:
    """Map a cache; returns the rows of the clips and the frames, (total frames, 140) float16."""
    clips = json.loads(cache.read_text())
    path = cache.with_suffix(".npy")
    try:
        # Mode "c" (copy on write): a change made by mistake never reaches the file.
        frames = np.lib.format.open_memmap(path, mode="c")
    except OSError:  # Linux refuses what would not fit into its memory if all of it were changed
        frames = np.lib.format.open_memmap(path, mode="r")
    if frames.shape != (sum(clip["length"] for clip in clips), N_ROWS):
        raise ValueError("the two files are of different caches")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that cannot be written
        return clips, torch.from_numpy(frames)


def find_leak(train, test, rows=None) -> list[str]:
    """Ids of test clips (of some rows, or all) that the training clips hold too, by id or array."""
    ids, digests = {entry.clip_id for entry in train.entries}, set(train.digests)
    rows = range(len(test.entries)) if rows is None else rows
    clips = ((test.entries[i].clip_id, test.digests[i]) for i in rows)
    return [clip_id for clip_id, digest in clips if clip_id in ids or digest in digests]


def find_emotion_leak(source, held_out) -> str | None:
    """Say which held-out emotion clips are in the genre training split too, if any.

    held_out : Subset of emotion clips
    Raises InputError if there are any, unless --allow-leak.
    """
    genre = read_entries(source.root, "genre", "train", merge=source.merge)
    train = load_clips(genre, source.skip_bad)
    leaked = find_leak(train, held_out.dataset.store, held_out.indices)
    if not leaked:
        return None
    count = f"{len(leaked)} of {len(held_out)} held-out emotion clips"
    fault = f"{count} are in the genre training split too, e.g. {leaked[0]}"
    if not source.allow_leak:
        folder = part_folder(source.root, "emotion")
        raise InputError(f"{folder}: {fault}; remove them from one, or pass --allow-leak")
    print(f"warning: {fault}", file=sys.stderr)
    return fault


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
    arrays = []  # {clip id: (140, T)}, of both forms
    for form in (False, True) if beat else (False,):
        folder = part_folder(data_dir, "genre", form) / "train"
        entries = [entry._replace(path=folder / entry.path.name) for entry in chosen]
        store = load_clips(entries, skip_bad)
        spans = store.frames.split(store.lengths.tolist())
        ids = [entry.clip_id for entry in store.entries]
        arrays.append(dict(zip(ids, (span.T.numpy() for span in spans), strict=True)))
    full, synced = arrays if beat else (arrays[0], dict.fromkeys(arrays[0]))
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
