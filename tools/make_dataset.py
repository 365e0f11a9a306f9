"""Make a data set in the lab's layout from your own audio files.

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
          folder, values in [0, 1]. Genre and emotion share one split by file. As in the lab,
          the emotion test clips get no label file.

The label files are written last, so no step takes an unfinished set. After an interruption, the
same command continues where it stopped. Run again later, it adds new files, makes changed ones
again and removes deleted ones; all others keep their id and their split.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import sys
import time
import unicodedata
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from patrec.audio import SUFFIXES, read_clip, require_decoder
from patrec.errors import InputError, StepFailed, end_in_one_line
from patrec.features import N_FFT, SR, compile_librosa, extract_features
from patrec.files import FOLDERS, lock_folder, make_folder, part_folder, write_bytes, write_text
from patrec.flags import Parser, bounded
from patrec.labels import EMOTIONS, MERGE
from patrec.machine import show_bars
from patrec.parallel import WorkerDied, parallel_map

MARKER = "AUDIO.txt"  # by it a set of this program is known; it holds the arguments
SOURCES = ["id", "file", "split", "size", "modified"]  # columns of sources.csv


class Song(NamedTuple):
    """An audio file and its facts in the set; the first five are columns of sources.csv."""

    clip_id: int
    name: str  # <genre>/<file>
    split: str  # train or test
    size: int  # in bytes
    modified: int  # in ns
    emotions: tuple[float, float, float] | None

    @property
    def genre(self):
        return genre_of(self.name)

    @property
    def parts(self):
        return ["genre", "emotion"] if self.emotions else ["genre"]


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
        fault = f"FMA's numbered folders ({genres[0]}, ...) are no genres"
        cure = "sort the files into folders named after their genre_top in FMA's tracks.csv"
        raise InputError(f"{folder}: {fault}; {cure}")
    paths = [path for genre in genres for path in sorted((folder / genre).rglob("*"))]
    names = [path.relative_to(folder).as_posix() for path in [*paths, *top] if path.is_file()]
    names = [name for name in names if "/." not in name]
    files = [name for name in names if "/" in name and Path(name).suffix.lower() in SUFFIXES]
    if not files:
        kinds = " ".join(SUFFIXES)
        raise InputError(f"{folder}: no audio files ({kinds}) in its {len(genres)} folders")
    for name in files:
        if any(mark < " " or "\ud800" <= mark <= "\udfff" for mark in name):
            fault = "holds a tab, a line break or no UTF-8, which label files cannot"
            raise InputError(f"{folder}: the name {name!r} {fault}; rename it")
    return files, sorted(set(names) - set(files))


def compose(text) -> str:
    """Join accents with their letters; macOS writes them as characters of their own."""
    return unicodedata.normalize("NFC", text)


def genre_of(name) -> str:
    """The class of a file."""
    return compose(name.split("/")[0])


def read_emotions(path, files) -> dict[str, tuple[float, float, float]]:
    """Read the CSV of emotion values: file -> (valence, energy, danceability)."""
    header = ["file", *EMOTIONS]
    expected = f"--emotions takes a CSV file in UTF-8 with the header {','.join(header)}"
    as_text = {"dtype": str, "header": None, "na_filter": False, "skip_blank_lines": False}
    try:
        rows = pd.read_csv(path, encoding="utf-8-sig", **as_text).map(str.strip)
    except (OSError, ValueError) as error:  # no file, no UTF-8, a line with too many columns
        reason = getattr(error, "strerror", None) or str(error).strip()
        raise InputError(f"{path}: {reason}; {expected}") from None
    rows = rows.set_axis(rows.loc[0], axis=1)[1:]
    if sorted(rows) != sorted(header):
        raise InputError(f"{path}: header {','.join(rows)!r}; {expected}")
    rows = rows[(rows != "").any(axis=1)]
    if rows.empty:
        raise InputError(f"{path}: a header and no files")
    known = {compose(name): name for name in files}
    given = rows["file"].str.replace("\\", "/").str.removeprefix("./")
    found = given.map(compose).map(known)
    values = rows[list(EMOTIONS)].apply(pd.to_numeric, errors="coerce").astype(float)
    is_missing, is_outside = values.isna(), ~values.clip(0, 1).eq(values)
    faults = {
        "no number in each of the three columns; mend or remove the line": is_missing.any(axis=1),
        "the file is not among the audio files; paths are relative to --audio-dir": found.isna(),
        "the file stands in a line above too; keep one": found.duplicated(),
        "a value outside [0, 1]; scale the column": is_outside.any(axis=1),
    }
    for fault, is_bad in faults.items():
        if is_bad.any():
            row = is_bad.idxmax()  # the first such line
            raise InputError(f"{path}, line {row + 1}, {given[row]!r}: {fault}")
    return dict(zip(found, values.itertuples(index=False, name=None), strict=True))


def read_sources(folder) -> dict[str, tuple]:
    """Read sources.csv: file -> its row; empty where there is none."""
    path = folder / "sources.csv"
    if not path.exists():
        return {}
    table = pd.read_csv(path, keep_default_na=False).reindex(columns=SOURCES)
    return {row.file: tuple(row) for row in table.itertuples(index=False)}


def plan_split(files, known, fraction, seed) -> dict[str, tuple[int, str]]:
    """Number the files and split them by genre: file -> (id, split).

    A file that is `known` from an earlier run, file -> (id, split), keeps both; of the files
    added since, as many go into the test part as its share then lacks.
    """
    plan = {name: known[name] for name in files if name in known}
    added = [name for name in files if name not in known]
    first = 1 + max((clip_id for clip_id, _ in known.values()), default=0)
    ids = {name: clip_id for clip_id, name in enumerate(added, start=first)}
    rng = np.random.default_rng([seed, len(known)])
    for genre in sorted({genre_of(name) for name in added}):
        new = [name for name in added if genre_of(name) == genre]
        old = [split for name, (_, split) in plan.items() if genre_of(name) == genre]
        n_clips = len(old) + len(new)
        wanted = min(max(round(fraction * n_clips), 1), n_clips - 1)  # at least one, never all
        test = set(rng.permutation(new)[: max(wanted - old.count("test"), 0)].tolist())
        plan |= {name: (ids[name], "test" if name in test else "train") for name in new}
    return plan


def array_paths(root, clip_id, split, parts, beat) -> list[Path]:
    name = f"{clip_id}.fused.full.npy"
    return [part_folder(root, part, beat) / split / name for part in parts]


def make_arrays(root, audio_dir, song) -> tuple[int, str, str]:
    """Compute and write the arrays of one song.

    Returns its id, whether it has them, and what is wrong with the file (else "").
    """
    paths = [array_paths(root, song.clip_id, song.split, song.parts, beat) for beat in (0, 1)]
    if all(path.exists() for path in paths[0] + paths[1]):
        return song.clip_id, True, ""
    mark = begun(root, song)
    mark.touch()
    try:
        compile_librosa()
        waveform, damage = read_clip(audio_dir / song.name)
        if len(waveform) < N_FFT:
            fault = f"{len(waveform) / SR:.3f} s of sound; at least {N_FFT / SR:.3f} s are needed"
            raise InputError(fault)
        if np.ptp(waveform) < 1e-5:  # under a third of a 16-bit step: no array that steps accept
            raise InputError("silence")
        with threadpool_limits(1):  # there is a process per core
            arrays = extract_features(waveform)
        for array, targets in zip(arrays, paths, strict=True):
            for path in targets:
                write_bytes(path, functools.partial(np.save, arr=array))
    except InputError as error:
        return song.clip_id, False, str(error).removeprefix(f"{audio_dir / song.name}: ")
    finally:
        mark.unlink(missing_ok=True)
    return song.clip_id, True, damage


def begun(root, song) -> Path:
    """The mark file of a song that is being made; it remains if the worker process dies."""
    return root / ".begun" / str(song.clip_id)


def make_all(root, audio_dir, songs, workers=None, dask=None) -> dict[Song, str]:
    """Make the arrays of all songs; returns the songs without, and why.

    A song that was being made when a worker process died, or this one in an earlier run, is made
    again, alone: if the process dies again, it is left out like a file that cannot be read.
    """
    print("preparing librosa (after an installation it compiles for half a minute)", flush=True)
    (root / ".begun").mkdir(exist_ok=True)
    workers = workers or joblib.cpu_count()
    failed, left = {}, {song.clip_id: song for song in songs}
    suspects = [song for song in songs if begun(root, song).exists()]
    bar = tqdm(total=len(songs), desc="clips", disable=not show_bars())
    start = time.monotonic()

    def make(some, workers):
        tasks = [(root, audio_dir, song) for song in some]
        results = parallel_map(make_arrays, tasks, workers, dask, "generator_unordered")
        for clip_id, is_made, fault in results:
            song = left.pop(clip_id)
            if not is_made:
                failed[song] = fault
            elif fault:
                print(f"used as far as it goes: {song.name}: {fault}", file=sys.stderr)
            bar.update()
            n_done = len(songs) - len(left)
            if not show_bars() and n_done % math.ceil(len(songs) / 10) == 0:
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
                    raise StepFailed("a worker process died; the same command continues") from None
                suspects += new
        for song in suspects:
            try:
                make([song], 2)
            except WorkerDied:
                failed[song] = "its worker process died twice (out of memory, or a broken file)"
    shutil.rmtree(root / ".begun", ignore_errors=True)
    return failed


def write_labels(root, songs, seed) -> None:
    """Write the label files with the lab's headers and its forms of names."""
    for beat, split in itertools.product((False, True), ("train", "test")):
        form = "beatsync.fused" if beat else {"train": "fused.full", "test": "full.fused"}[split]
        for part in FOLDERS if split == "train" else ["genre"]:
            some = [song for song in songs if part in song.parts]
            # In an order that says nothing of the classes.
            order = np.random.default_rng(seed).permutation(len(some))
            some = [some[i] for i in order if some[i].split == split]
            lines = ["Id\tGenre", *(f"{song[0]}.{form}.npy.gz\t{song.genre}" for song in some)]
            if part == "emotion":
                values = (",".join(map(str, (song[0], *song.emotions))) for song in some)
                lines = [f"Id,{','.join(EMOTIONS)}", *values]
            if some:
                path = part_folder(root, part, beat) / f"{split}_labels.txt"
                write_text(path, "\n".join(lines) + "\n")


def check_folder(out, arguments) -> None:
    """InputError if `out` holds something else, or a set made with other arguments."""
    cure = "name another folder in --out"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; {cure}")
    made = None
    with contextlib.suppress(OSError, ValueError):  # no such file, or changed by hand
        text = (out / MARKER).read_text(encoding="utf-8")
        made = json.loads(text[text.index("{") :])
    # Hidden files mean nothing, and data/demo is where the steps put their demo set.
    if made is None and any(path.name != "demo" for path in out.glob("[!.]*")):
        raise InputError(f"{out}: holds something that make_dataset did not make; {cure}")
    if made and made != arguments:
        changed = (f"{k} {made.get(k)}, now {v}" for k, v in arguments.items() if made.get(k) != v)
        fault = f"made with other arguments ({'; '.join(changed)})"
        raise InputError(f"{out}: {fault}; {cure}, or delete it")


def begin(out, arguments, songs, known) -> None:
    """Remove what is out of date; note what the set is made of."""
    text = "Made by tools.make_dataset of the files that sources.csv names."
    write_text(out / MARKER, f"{text}\n\n{json.dumps(arguments, indent=2)}\n")
    for labels in out.glob("*/*_labels.txt"):
        labels.unlink()
    for part, beat, split in itertools.product(FOLDERS, (False, True), ("train", "test")):
        if part == "genre" or any(song.emotions for song in songs):
            (part_folder(out, part, beat) / split).mkdir(parents=True, exist_ok=True)
    rows = {song.name: song[:5] for song in songs}
    old = [name for name in known if rows.get(name) != known[name]]
    for name, beat in itertools.product(old, (False, True)):
        for path in array_paths(out, known[name][0], known[name][2], FOLDERS, beat):
            path.unlink(missing_ok=True)
    for what, there in (("changed, made again", True), ("gone, left out of the set", False)):
        if some := [name for name in old if (name in rows) is there]:
            print(f"{len(some)} files {what}: {names(some)}")
    write_table(out / "sources.csv", rows.values(), SOURCES)


def names(some, n=5) -> str:
    """The first names of a list."""
    return ", ".join(sorted(some)[:n]) + (", ..." if len(some) > n else "")


def write_table(path, rows, columns) -> None:
    write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))


def make_set(args) -> None:
    """Make a set from a folder of audio files."""
    out, audio_dir = args.out, args.audio_dir.resolve()
    files, others = find_audio(audio_dir)
    require_decoder(files)
    emotions = {}
    if args.emotions:
        emotions = read_emotions(args.emotions, files)
        others = [name for name in others if not args.emotions.samefile(audio_dir / name)]
    arguments = {
        "audio_dir": str(audio_dir),
        "test_fraction": args.test_fraction,
        "seed": args.seed,
        "emotions": hashlib.sha256(json.dumps(emotions, sort_keys=True).encode()).hexdigest()[:12],
    }
    check_folder(out, arguments)
    make_folder(out)
    lock = lock_folder(out)
    known = read_sources(out)
    earlier = {name: (row[0], row[2]) for name, row in known.items()}
    songs = []
    for name, (i, part) in plan_split(files, earlier, args.test_fraction, args.seed).items():
        stat = (audio_dir / name).stat()
        songs.append(Song(i, name, part, stat.st_size, stat.st_mtime_ns, emotions.get(name)))
    if others:
        print(f"left out: {len(others)} files that are no audio of a genre: {names(others)}")
    finished = (part_folder(out, "genre") / "train_labels.txt").exists()
    same = known == {song.name: song[:5] for song in songs}
    if finished and same and not (out / "unreadable.csv").exists():
        print(f"{out}: made already")
    else:
        if emotions and not any(song.emotions and song.split == "train" for song in songs):
            fault = "none of its files is in the training part; label more files"
            raise InputError(f"{args.emotions}: {fault}")
        begin(out, arguments, songs, known)
        n_genres = len({song.genre for song in songs})
        print(f"extracting {len(songs)} files of {n_genres} genres", flush=True)
        finish(args, songs, make_all(out, audio_dir, songs, args.workers, args.dask))
    lock.release()


def finish(args, songs, failed) -> None:
    """Write unreadable.csv and the label files; print what is left out."""
    unreadable = args.out / "unreadable.csv"
    unreadable.unlink(missing_ok=True)
    if failed:
        rows = sorted((song.name, reason) for song, reason in failed.items())
        write_table(unreadable, rows, ["file", "reason"])
    made = [song for song in songs if song not in failed]
    # A class that lost all its training files cannot be learned, so it cannot be asked for either.
    trained = {song.genre for song in made if song.split == "train"}
    kept = [song for song in made if song.genre in trained]
    if not kept:
        fault = f"not one file gives a training clip; {len(failed)} of {len(songs)} are listed"
        raise InputError(f"{args.audio_dir}: {fault}, with reasons, in {unreadable}")
    write_labels(args.out, kept, args.seed)
    for song in sorted(failed)[:10]:
        print(f"left out: {song.name}: {failed[song]}", file=sys.stderr)
    if failed:
        counted = f"{len(failed)} of {len(songs)} files left out"
        print(f"{counted}; all are listed in {unreadable}", file=sys.stderr)
    for genre in sorted({song.genre for song in made} - trained):
        fault = "none of its training files can be read"
        print(f"class {genre} left out of the label files: {fault}", file=sys.stderr)
    foreign = sorted(trained - set(MERGE))
    if foreign:
        print(f"class {foreign[0]} is none of the lab's 20: give the steps --no-merge")


def make_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.flag
    need = {"required": True, "type": Path, "metavar": "DIR"}
    add("--audio-dir", "folder with a folder of audio files per genre", **need)
    add("--out", "folder of the new set", **need)
    add("--emotions", "emotion values of the files", type=Path, metavar="CSV")
    share = "the test part's share of each genre"
    add("--test-fraction", share, type=bounded(float, 0.05, 0.5), default=0.2)
    add("--seed", "seed of the split", type=bounded(int, 0, 2**31), default=42, metavar="N")
    workers = "processes that extract side by side; else one per core"
    add("--workers", workers, type=bounded(int, 1, 1024), metavar="N")
    scheduler = "extract on the Dask cluster of this scheduler, e.g. tcp://HOST:8786"
    add("--dask", scheduler, metavar="ADDRESS")
    return parser


def main(argv=None) -> dict:
    """Read the command line, make the set, print what is in it."""
    args = make_parser().parse_args(argv)
    args.out = args.out.absolute()  # a Dask worker has another working directory
    began = time.monotonic()
    try:
        make_set(args)
    except KeyboardInterrupt:
        print("stopped; finished clips are kept, the same command continues", file=sys.stderr)
        sys.exit(130)
    counts = {
        f"{part} {split}": len(list((part_folder(args.out, part) / split).glob("[!.]*.npy")))
        for part, split in itertools.product(FOLDERS, ("train", "test"))
    }
    found = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(f"{args.out}: {found} clips; {time.monotonic() - began:.0f} s")
    return {"out": str(args.out), "clips": counts}


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
