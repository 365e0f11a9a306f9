"""Make a data set in the lab's layout of your own audio files.

    python -m tools.make_dataset --audio-dir songs --out data      # songs/<genre>/<file>.mp3
    python -m tools.make_dataset --audio-dir songs --out data --emotions emotions.csv

Every file becomes one mono clip at 22,050 Hz: its middle 30 s, or all of it where it is shorter.
Every clip goes through the lab's own extraction (patrec.features.extract_features): 128 mel
bands in dB and 12 chroma values, per frame and per beat. The four folders and their label files
are the lab's, odd file names included, so that every step reads them unchanged.

--audio-dir
          Folder names are the class names; files may lie in subfolders. The steps merge the
          lab's 20 classes into 10; with other classes, give the steps --no-merge. sources.csv
          lists the id and the split of every file, unreadable.csv the files that give no clip.
--emotions
          CSV with the header file,valence,energy,danceability; paths relative to the audio
          folder, values in [0, 1]. Genre and emotion share one split by file, so that no test
          clip of one is a training clip of the other. As in the lab, the emotion test clips
          get no label file.

The set is made in <out>.unfinished and moved into <out> when it is complete. After an
interruption, the same command goes on where it stopped. Run again later, it adds new files,
makes changed ones again and removes deleted ones; all others keep their id and their split.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import filelock
import joblib
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from patrec.audio import SUFFIXES, read_clip, require_decoder
from patrec.errors import InputError, StepEnd, StepFailed, end_in_one_line
from patrec.features import N_FFT, SR, extract_features
from patrec.files import cache_dir, part_folder, write_bytes, write_text
from patrec.flags import Parser, bounded
from patrec.labels import EMOTIONS, MERGE
from patrec.machine import show_bars
from patrec.parallel import WorkerDied, parallel_map

MARKER = "AUDIO.txt"  # by it a set of this program is known; it holds the arguments
PART_FOLDERS = [part_folder("", part, beat) for part in ("genre", "emotion") for beat in (0, 1)]
SET_FILES = [*map(str, PART_FOLDERS), "sources.csv", "unreadable.csv"]


class Stopped(StepEnd):
    """The user pressed Ctrl-C."""

    exit_code, label = 130, "stopped; "


class Source(NamedTuple):
    """A line of sources.csv: the number of a file, its split, and how the file looked."""

    id: int
    split: str  # train or test
    size: int  # in bytes
    modified: int  # in ns


class Song(NamedTuple):
    """An audio file and what the set says of it."""

    clip_id: int
    name: str  # <genre>/<file>
    path: Path
    genre: str
    emotions: tuple[float, float, float] | None
    split: str

    @property
    def parts(self):
        return ["genre", "emotion"] if self.emotions else ["genre"]


# ======================================================================================
# Which files there are
# ======================================================================================


def find_audio(folder) -> tuple[list[str], list[str]]:
    """Names of the audio files, <genre>/<file>, and of all other files; hidden ones are neither."""
    expected = "--audio-dir must hold <genre>/<file>.mp3 (or .wav, .flac, ...)"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {expected}")
    top = sorted(folder.glob("[!.]*"))
    genres = [path.name for path in top if path.is_dir()]
    if not genres:
        raise InputError(f"{folder}: no genre folders in it; {expected}")
    if all(re.fullmatch(r"\d{3}", genre) for genre in genres):
        cure = "move each file into a folder named after its genre (genre_top in FMA's tracks.csv)"
        raise InputError(
            f"{folder}: FMA's numbered folders ({genres[0]}, ...) are no genres; {cure}"
        )
    files, others = [], [path.name for path in top if path.is_file()]
    for genre in genres:
        paths = sorted(path for path in (folder / genre).rglob("*") if path.is_file())
        for name in (path.relative_to(folder).as_posix() for path in paths):
            if "/." not in name:
                (files if Path(name).suffix.lower() in SUFFIXES else others).append(name)
    if not files:
        kinds = " ".join(SUFFIXES)
        raise InputError(f"{folder}: no audio files ({kinds}) in its {len(genres)} folders")
    for name in files:
        if any(mark < " " or "\ud800" <= mark <= "\udfff" for mark in name):
            fault = "holds a tab, a line break or no UTF-8, which label files cannot"
            raise InputError(f"{folder}: the name {name!r} {fault}; rename it")
    return files, others


def genre_of(name) -> str:
    """The class of a file; macOS writes accents as characters of their own, others do not."""
    return unicodedata.normalize("NFC", name.split("/")[0])


def read_emotions(path, files) -> dict[str, tuple[float, float, float]]:
    """Read the CSV of emotion values: file -> (valence, energy, danceability)."""
    known = {unicodedata.normalize("NFC", name): name for name in files}
    emotions = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            if sorted(header) != sorted(("file", *EMOTIONS)):
                expected = f"expected 'file,{','.join(EMOTIONS)}'"
                raise InputError(f"{path}: header {','.join(header)!r}; {expected}")
            reader.fieldnames = header
            for row in reader:
                name, values = emotion_row(f"{path}, line {reader.line_num}", row, known, emotions)
                emotions[name] = values
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --emotions takes a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no CSV in UTF-8 ({error}); save it as such") from None
    if not emotions:
        raise InputError(f"{path}: a header and no files")
    return emotions


def emotion_row(where, row, known, earlier) -> tuple[str, tuple[float, float, float]]:
    """One line of the CSV: the name of a file, as it is on disk, and its three values."""
    if None in row or None in row.values():
        fault = f"not {1 + len(EMOTIONS)} columns"
        raise InputError(f"{where}: {fault}; mend or remove the line")
    given = row["file"].strip().replace("\\", "/").removeprefix("./")
    name = known.get(unicodedata.normalize("NFC", given))
    if name is None:
        example = next(iter(known.values()))
        fault = f"{given!r} is not among the audio files"
        raise InputError(f"{where}: {fault}; paths are relative to --audio-dir, e.g. {example}")
    if name in earlier:
        raise InputError(f"{where}: {name!r} stands in a line above too; keep one")
    try:
        values = tuple(float(row[axis]) for axis in EMOTIONS)
    except ValueError:
        fault = "a value that is no number"
        raise InputError(f"{where}: {fault}; mend or remove the line") from None
    if not all(0 <= value <= 1 for value in values):
        raise InputError(f"{where}: a value outside [0, 1]; scale the column")
    return name, values


def read_sources(folder) -> dict[str, Source]:
    """Read sources.csv; empty where there is none. One without file times makes all files anew."""
    path = folder / "sources.csv"
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {
            row["file"]: Source(
                int(row["id"]), row["split"], int(row.get("size", 0)), int(row.get("modified", 0))
            )
            for row in csv.DictReader(file)
        }


def plan_split(files, known, fraction, seed) -> dict[str, tuple[int, str]]:
    """Number the files and split them by genre: file -> (id, split).

    A file that is `known` from an earlier run, file -> (id, split), keeps both; of the files
    added since, as many go into the test part as its share then lacks.
    """
    plan = {name: known[name] for name in files if name in known}
    added = [name for name in files if name not in known]
    ids = dict(zip(added, range(1 + max((i for i, _ in known.values()), default=0), 10**9)))
    rng = np.random.default_rng([seed, len(known)])
    for genre in sorted({genre_of(name) for name in added}):
        new = [name for name in added if genre_of(name) == genre]
        old = [split for name, (_, split) in plan.items() if genre_of(name) == genre]
        n_test = max(n_held_out(len(old) + len(new), fraction) - old.count("test"), 0)
        test = set(rng.permutation(new)[:n_test].tolist())
        plan |= {name: (ids[name], "test" if name in test else "train") for name in new}
    return plan


def n_held_out(n_clips, fraction) -> int:
    """Test clips of a class: at least one of two or more, never all."""
    return min(max(round(fraction * n_clips), 1), n_clips - 1)


# ======================================================================================
# The arrays of all songs, in parallel
# ======================================================================================


def array_paths(root, clip_id, split, parts, beat) -> list[Path]:
    name = f"{clip_id}.fused.full.npy"
    return [part_folder(root, part, beat) / split / name for part in parts]


def make_arrays(root, song) -> tuple[int, str, str]:
    """Compute and write the arrays of one song.

    Returns its id, why there are none (else ""), and what is wrong with the file (else "").
    """
    paths = [array_paths(root, song.clip_id, song.split, song.parts, beat) for beat in (0, 1)]
    if all(path.exists() for path in paths[0] + paths[1]):
        return song.clip_id, "", ""
    mark = begun(root, song)
    mark.touch()
    try:
        compile_librosa()
        waveform, damage = read_clip(song.path)
        if len(waveform) < N_FFT:
            fault = f"{len(waveform) / SR:.3f} s of sound; at least {N_FFT / SR:.3f} s are needed"
            return song.clip_id, fault, ""
        if np.ptp(waveform) < 1e-5:  # under a third of a 16-bit step: no array that steps accept
            return song.clip_id, "silence", ""
        with threadpool_limits(1):  # there is a process per core
            arrays = extract_features(waveform)
        for array, targets in zip(arrays, paths, strict=True):
            for path in targets:
                write_bytes(path, functools.partial(np.save, arr=array))
    except InputError as error:
        return song.clip_id, str(error).removeprefix(f"{song.path}: "), ""
    finally:
        mark.unlink(missing_ok=True)
    return song.clip_id, "", damage


def begun(root, song) -> Path:
    """The mark of a song that is being made: it outlives a worker process that dies of it."""
    return root / ".begun" / str(song.clip_id)


def compile_librosa() -> None:
    """Let librosa compile its numba functions, one process of a machine at a time.

    Processes that compile them at once into an empty cache ruin it for good: every later run
    dies of a segmentation fault (seen with numba 0.66 and 0.68).
    """
    if os.environ.get("PATREC_LIBROSA") == str(os.getpid()):  # this process has them
        return
    # Of silent or very short clips, which are meant to work.
    warnings.filterwarnings("ignore", module="librosa")
    with filelock.FileLock(cache_dir() / "librosa.lock"):
        extract_features(np.random.default_rng(0).standard_normal(2 * SR).astype(np.float32))
    os.environ["PATREC_LIBROSA"] = str(os.getpid())


def make_all(root, songs, workers=None, dask=None) -> tuple[dict[Song, str], dict[Song, str]]:
    """Make the arrays of all songs; returns the songs without, and why, and the damaged ones.

    A song that was being made when a worker process died, or this one in an earlier run, is made
    again, alone: if the process dies again, it is left out like a file that cannot be read.

    workers : int, optional; else a process per core
    dask : str, optional, address of a Dask scheduler whose workers do it
    """
    print("preparing librosa (after an installation it compiles for half a minute)", flush=True)
    (root / ".begun").mkdir(exist_ok=True)
    workers = workers or joblib.cpu_count()
    failed, damaged, left = {}, {}, {song.clip_id: song for song in songs}
    suspects = [song for song in songs if begun(root, song).exists()]
    bar = tqdm(total=len(songs), desc="clips", disable=not show_bars())
    shown, start = 0, time.monotonic()

    def make(some, workers):
        nonlocal shown
        tasks = [(root, song) for song in some]
        results = parallel_map(make_arrays, tasks, workers, dask, "generator_unordered")
        for clip_id, reason, damage in results:
            bar.update()
            song = left.pop(clip_id)
            failed.update({song: reason} if reason else {})
            damaged.update({song: damage} if damage else {})
            n_done = len(songs) - len(left)
            if not show_bars() and n_done * 10 // len(songs) > shown:
                shown = n_done * 10 // len(songs)
                seconds = time.monotonic() - start
                print(f"{n_done} of {len(songs)} clips, {seconds:.0f} s", flush=True)

    with bar:
        while some := [song for song in left.values() if song not in suspects]:
            try:
                # One worker is this very process, which a suspect may end.
                make(some, min(workers, max(len(some), 2)))
            except WorkerDied:
                new = [song for song in some if song.clip_id in left and begun(root, song).exists()]
                if not new:  # it died before its first clip, or between two
                    raise StepFailed("a worker process died; the same command goes on") from None
                suspects += new
        for song in suspects:
            try:
                make([song], 2)
            except WorkerDied:
                failed[song] = "its worker process died twice (out of memory, or a broken file)"
                left.pop(song.clip_id)
    shutil.rmtree(root / ".begun", ignore_errors=True)
    return failed, damaged


# ======================================================================================
# The data set
# ======================================================================================


def write_labels(root, songs, seed) -> None:
    """Write the label files, each with the header and the form of names that the lab's has."""

    def write(path, header, part, row):
        """Lines in an order that says nothing of the classes; no file without lines."""
        some = [song for song in songs if part in song.parts]
        order = np.random.default_rng(seed).permutation(len(some))
        split = path.name.partition("_")[0]
        lines = [row(some[i]) for i in order if some[i].split == split]
        if lines:
            write_text(path, "\n".join([header, *lines]) + "\n")
        else:
            path.unlink(missing_ok=True)

    for beat in (False, True):
        folder = part_folder(root, "genre", beat)
        for split, form in (("train", "fused.full"), ("test", "full.fused")):
            ending = f"{'beatsync.fused' if beat else form}.npy.gz"
            row = f"{{0.clip_id}}.{ending}\t{{0.genre}}".format
            write(folder / f"{split}_labels.txt", "Id\tGenre", "genre", row)
        path = part_folder(root, "emotion", beat) / "train_labels.txt"
        header = f"Id,{','.join(EMOTIONS)}"
        write(path, header, "emotion", lambda song: ",".join(map(str, (song[0], *song.emotions))))


def unfinished(out) -> Path:
    return out.with_name(out.name + ".unfinished")


def move_set(source, target, marker) -> None:
    """Move a set from folder to folder; whatever else lies there stays.

    `marker` lies in a folder from before the set's first entry is there until after its last one
    has gone: after a kill, the entries in either folder belong to one set.
    """
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / MARKER, marker)
    for name in SET_FILES:
        if (source / name).exists():
            os.replace(source / name, target / name)
    (source / MARKER).unlink()


def read_marker(folder) -> str | None:
    """The marker's text; None where this program has made no set."""
    with contextlib.suppress(OSError, ValueError):
        text = (folder / MARKER).read_text(encoding="utf-8")
        json.loads(text[text.index("{") :])  # else another program's file, or changed by hand
        return text
    return None


def check_folder(out, arguments) -> None:
    """InputError if something else stands in `out`, or a set made with other arguments."""
    cure = "name another folder in --out"
    for folder in (out, unfinished(out)):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; {cure}")
        # Hidden files mean nothing, and data/demo is where the first command puts its set.
        others = [path for path in folder.glob("[!.]*") if path.name != "demo"]
        text = read_marker(folder)
        if text is None and others:
            raise InputError(f"{folder}: holds something that make_dataset did not make; {cure}")
        made = json.loads(text[text.index("{") :]) if text else arguments
        changed = [
            f"{key} {made.get(key)}, now {arguments.get(key)}"
            for key in arguments | made
            if made.get(key) != arguments.get(key)
        ]
        if changed:
            fault = f"made with other arguments ({'; '.join(changed)})"
            raise InputError(f"{folder}: {fault}; {cure}, or delete it")


@contextlib.contextmanager
def one_process(out):
    """Keep other processes from making the same set."""
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
    except filelock.Timeout:
        fault = "another process is making this set"
        raise InputError(f"{out}: {fault}; wait for it, or name another folder in --out") from None
    except OSError as error:
        fault = f"cannot be made ({error.strerror})"
        raise InputError(f"{out}: {fault}; name another folder in --out") from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def begin(out, marker, songs, sources, known) -> Path:
    """Take a finished set back, remove what is out of date, note what the set is made of.

    Returns the folder in which the set is made.
    """
    root = unfinished(out)
    if read_marker(out):
        move_set(out, root, marker)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / MARKER, marker)
    for part in {part for song in songs for part in song.parts}:
        for beat in (False, True):
            for split in ("train", "test"):
                (part_folder(root, part, beat) / split).mkdir(parents=True, exist_ok=True)
    old = [name for name in known if sources.get(name) != known[name]]
    for name in old:
        for beat in (False, True):
            parts = ("genre", "emotion")
            for path in array_paths(root, known[name].id, known[name].split, parts, beat):
                path.unlink(missing_ok=True)
    gone = [name for name in old if name not in sources]
    for what, some in (("changed and made again", set(old) - set(gone)), ("gone", gone)):
        if some:
            print(f"{len(some)} files {what}: {names(some)}")
    rows = [(source.id, name, *source[1:]) for name, source in sources.items()]
    write_table(root / "sources.csv", rows, ["id", "file", "split", "size", "modified"])
    return root


def names(some, n=5) -> str:
    """The first names of a list."""
    return ", ".join(sorted(some)[:n]) + (", ..." if len(some) > n else "")


def write_table(path, rows, columns) -> None:
    write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))


def make_set(args) -> None:
    """Make a set of a folder of audio files."""
    out, audio_dir = args.out, args.audio_dir.resolve()
    files, others = find_audio(audio_dir)
    require_decoder(files)
    emotions = read_emotions(args.emotions, files) if args.emotions else {}
    others = [name for name in others if audio_dir / name != (args.emotions or out).resolve()]
    arguments = {
        "audio_dir": str(audio_dir),
        "test_fraction": args.test_fraction,
        "seed": args.seed,
        "emotions": hashlib.sha256(json.dumps(emotions, sort_keys=True).encode()).hexdigest()[:12],
    }
    text = "Made by tools.make_dataset of the files that sources.csv names."
    marker = f"{text}\n\n{json.dumps(arguments, indent=2)}\n"
    check_folder(out, arguments)
    finished = not unfinished(out).is_dir()
    known = read_sources(out) | read_sources(unfinished(out))
    split = plan_split(files, {n: s[:2] for n, s in known.items()}, args.test_fraction, args.seed)
    sources, songs = {}, []
    for name, (clip_id, part) in split.items():
        path = audio_dir / name
        sources[name] = Source(clip_id, part, path.stat().st_size, path.stat().st_mtime_ns)
        songs.append(Song(clip_id, name, path, genre_of(name), emotions.get(name), part))
    if others:
        print(f"left out: {len(others)} files that are no audio of a genre: {names(others)}")
    if finished and known == sources and not (out / "unreadable.csv").exists():
        print(f"{out}: made already")
        return
    require_emotions(args.emotions, songs)
    root = begin(out, marker, songs, sources, known)
    n_genres = len({song.genre for song in songs})
    print(f"extracting {len(songs)} files of {n_genres} genres", flush=True)
    failed, damaged = make_all(root, songs, args.workers, args.dask)
    report(out, songs, failed, damaged, args)


def report(out, songs, failed, damaged, args) -> None:
    """Write the label files and unreadable.csv, give the set its name, say what is left out."""
    root = unfinished(out)
    unreadable = root / "unreadable.csv"
    unreadable.unlink(missing_ok=True)
    if failed:
        rows = sorted((song.name, reason) for song, reason in failed.items())
        write_table(unreadable, rows, ["file", "reason"])
    made = [song for song in songs if song not in failed]
    # A class that lost all its training files cannot be learned, so it cannot be asked for either.
    trained = {song.genre for song in made if song.split == "train"}
    kept = [song for song in made if song.genre in trained]
    require_emotions(args.emotions, kept)
    if not kept:
        fault = f"not one file gives a training clip; {len(failed)} of {len(songs)} are listed"
        raise InputError(f"{args.audio_dir}: {fault}, with reasons, in {unreadable}")
    write_labels(root, kept, args.seed)
    for path in root.rglob(".*.tmp"):
        path.unlink()  # half-written when an earlier run was killed
    try:
        move_set(root, out, (root / MARKER).read_text(encoding="utf-8"))
        shutil.rmtree(root)
    except OSError as error:
        where = f"the set is complete in {root}, move it by hand"
        raise InputError(f"{out}: cannot be made ({error.strerror}); {where}") from None
    for what, some in (("left out", failed), ("used as far as it goes", damaged)):
        for song in sorted(some)[:10]:
            print(f"{what}: {song.name}: {some[song]}", file=sys.stderr)
    if failed:
        where = f"all are listed in {out / 'unreadable.csv'}"
        print(f"{len(failed)} of {len(songs)} files left out; {where}", file=sys.stderr)
    for genre in sorted({song.genre for song in made} - trained):
        fault = "none of its training files can be read"
        print(f"class {genre} left out of the label files: {fault}", file=sys.stderr)
    foreign = sorted(trained - set(MERGE))
    if foreign:
        print(f"class {foreign[0]} is none of the lab's 20: give the steps --no-merge")


def require_emotions(path, songs) -> None:
    if path and songs and not any(song.emotions and song.split == "train" for song in songs):
        fault = "none of its files gives a clip of the training part"
        raise InputError(f"{path}: {fault}; label more files")


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.flag

    def path(text):
        return Path(text).expanduser().absolute()

    need = {"required": True, "type": path, "metavar": "DIR"}
    add("--audio-dir", "folder with a folder of audio files per genre", **need)
    add("--out", "folder of the new set", **need)
    add("--emotions", "emotion values of the files", type=path, metavar="CSV")
    share = "the test part's share of each genre"
    add("--test-fraction", share, type=bounded(float, 0.05, 0.5), default=0.2, metavar="SHARE")
    add("--seed", "seed of the split", type=bounded(int, 0, 2**31), default=42, metavar="N")
    workers = "processes that extract side by side; else one per core"
    add("--workers", workers, type=bounded(int, 1, 1024), metavar="N")
    scheduler = "extract on the Dask cluster of this scheduler, e.g. tcp://HOST:8786"
    add("--dask", scheduler, metavar="ADDRESS")
    return parser


def main(argv=None) -> dict:
    """Read the command line, make the set, say what is in it."""
    args = make_parser().parse_args(argv)
    began = time.monotonic()
    try:
        with one_process(args.out):
            make_set(args)
    except KeyboardInterrupt:
        cure = "finished clips are kept, the same command goes on from here"
        raise Stopped(cure) from None
    counts = {
        f"{part} {split}": len(list((part_folder(args.out, part) / split).glob("[!.]*.npy")))
        for part in ("genre", "emotion")
        for split in ("train", "test")
    }
    found = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(f"{args.out}: {found} clips; {time.monotonic() - began:.0f} s")
    return {"out": str(args.out), "clips": counts}


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
