"""tools.make_dataset: the lab's layout, odd files, interruption, changes, Dask, wrong input."""

import functools
import json
import os
import signal
import subprocess
import sys

import conftest
import filelock
import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ROOT, error_line, wait_for

from patrec.clips import read_array
from patrec.features import SR, extract_features
from patrec.labels import read_entries
from tools import make_dataset

extracts = pytest.mark.slow  # librosa computes in these, and compiles for half a minute first

TOOL = "tools/make_dataset.py"
FOLDERS = tuple(name + beat for name in conftest.FOLDERS.values() for beat in ("", "_beat"))


def make_here(*arguments):
    """Run the tool in this process, which saves its imports."""
    return make_dataset.main([str(argument) for argument in arguments])


def run_tool(*arguments, check=True, **env):
    command = [sys.executable, "-m", "tools.make_dataset", *map(str, arguments)]
    options = {"env": os.environ | env, "capture_output": True, "text": True, "timeout": 300}
    result = subprocess.run(command, cwd=ROOT, **options)
    assert result.returncode == 0 or not check, result.stderr
    return result


def mtimes(root):
    """{path in the set: when it was written} of all arrays."""
    paths = sorted(root.rglob("*.npy"))
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in paths}


def ids(root, part, *splits):
    return {entry.clip_id for split in splits for entry in read_entries(root, part, split)}


def song(seconds, f_hz=440.0):
    t = np.arange(round(seconds * SR)) / SR
    return 0.2 * np.sin(2 * np.pi * f_hz * t) * (1 + np.sin(2 * np.pi * 2 * t))


def write_songs(root, *names, seconds=1):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, song(seconds, 200 + 50 * i), SR)
    return root


def rows_of(out, name="sources.csv"):
    """The rows of a CSV in the set, by the column `file`."""
    table = pd.read_csv(out / name, dtype=str, keep_default_na=False)
    return table.set_index("file", drop=False).to_dict("index")


# --- interruption and processes --------------------------------------------------------------


@extracts
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, capsys):
    songs = write_songs(tmp_path / "songs", *(f"Rock/{i}.wav" for i in range(12)), seconds=3)
    out = tmp_path / "set"
    arguments = ("--audio-dir", songs, "--out", out)
    command = [sys.executable, "-m", "tools.make_dataset", *map(str, arguments), "--workers", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)
    wait_for(lambda: len(mtimes(out)) >= 6 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = mtimes(out)
    assert 6 <= len(made) < 24, "was to be stopped halfway"
    assert not list(out.rglob("*_labels.txt")), "a step must not take an unfinished set"
    arguments += ("--workers", 1)
    make_here(*arguments)
    now = mtimes(out)
    # The last pairs may have been half done: their songs are computed again, all others are kept.
    rewritten = {name.split("/")[-1] for name, mtime in made.items() if now[name] != mtime}
    assert len(now) == 24 and len(rewritten) <= 2
    assert not list(out.rglob(".*.tmp")) and not (out / ".begun").exists()
    capsys.readouterr()
    assert make_here(*arguments)["clips"]["genre train"] == 10
    assert "made already" in capsys.readouterr().out and mtimes(out) == now
    line = error_line(capsys, TOOL, *arguments, "--seed", 8)
    assert str(out) in line and "seed 42, now 8" in line


DEADLY = """import builtins, os

def open(file, *args, kept=open, **options):
    if "bomb" in str(file) and str(file).endswith(".wav"):
        os.kill(os.getpid(), 9)
    return kept(file, *args, **options)

builtins.open = open
"""


@extracts
@pytest.mark.parametrize("workers", [2, 1])
def test_a_file_that_kills_its_worker_costs_itself_only(tmp_path, workers):
    """Twice: first beside others, then alone. One worker is the program itself: then it goes on
    when it is called again."""
    songs, out = tmp_path / "songs", tmp_path / "set"
    write_songs(songs, "Rock/a song.wav", "Rock/bomb.wav", "Rock/c song.wav")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)  # what every Python runs first
    arguments = ("--audio-dir", songs, "--out", out, "--workers", workers)
    site = {"PYTHONPATH": str(tmp_path / "site")}
    if workers == 1:
        assert run_tool(*arguments, check=False, **site).returncode == -signal.SIGKILL
    result = run_tool(*arguments, **site)
    ((name, row),) = rows_of(out, "unreadable.csv").items()
    assert name == "Rock/bomb.wav" and "died twice" in row["reason"]
    assert len(mtimes(out)) == 4 and not (out / ".begun").exists()
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Address of a scheduler whose worker runs in a folder without the project."""
    pytest.importorskip("distributed")
    folder = tmp_path_factory.mktemp("dask")
    processes, env = [], {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def begin(*words):
        command = [sys.executable, "-m", "dask", *words, "--no-dashboard"]
        with open(folder / "log", "a") as log:
            options = {"cwd": folder, "stdout": log, "stderr": log, "start_new_session": True}
            processes.append(subprocess.Popen(command, env=env, **options))

    file = folder / "scheduler.json"  # it is there before it is whole
    try:
        begin("scheduler", "--port", "0", "--scheduler-file", file.name)
        wait_for(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
        address = json.loads(file.read_text())["address"]
        begin("worker", address, "--nthreads", "1", "--nworkers", "1")
        yield address
    finally:
        for process in processes[::-1]:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@extracts
def test_dask_workers_need_no_copy_of_the_project(tmp_path, cluster):
    """The same bytes as here; what a worker raises comes back as what it is."""
    songs = write_songs(tmp_path / "songs", "Rock/a.wav", "Rock/b.wav")
    (songs / "Rock" / "c.wav").write_text("no sound")
    run_tool("--audio-dir", songs, "--out", tmp_path / "dask", "--dask", cluster)
    make_here("--audio-dir", songs, "--out", tmp_path / "here", "--workers", 1)
    names = [*mtimes(tmp_path / "here"), "unreadable.csv"]
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "dask" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense"])
def test_an_address_without_a_scheduler_is_bad_input(tmp_path, capsys, address):
    pytest.importorskip("distributed")
    songs = write_songs(tmp_path / "songs", "Rock/a.wav")
    arguments = ("--audio-dir", songs, "--out", tmp_path / "set", "--dask", address)
    assert f"--dask {address}: no scheduler" in error_line(capsys, TOOL, *arguments)


# --- audio files --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Two genres of ordinary songs, one not of the lab's, and files of every odd kind."""
    root = tmp_path_factory.mktemp("songs")
    write_songs(root, *(f"{g}/song {i}.wav" for g in ("Rock", "Sea Shanty") for i in range(5)))
    odd = root / "Rock"
    soundfile.write(odd / "pop.OGG", song(2), SR, format="OGG")
    soundfile.write(odd / "silent.wav", np.zeros(SR), SR)
    soundfile.write(odd / "blip.wav", song(0.1), SR)
    soundfile.write(odd / "too short.wav", song(0.05), SR)
    soundfile.write(odd / "not a number.wav", np.full(SR, np.nan), SR, subtype="FLOAT")
    (odd / "text.wav").write_text("this is no sound\n" * 100)
    (odd / "empty.mp3").write_bytes(b"")
    (odd / "cover.jpg").write_bytes(b"no audio, not looked at")
    soundfile.write(odd / "cut.flac", song(4), SR)
    whole = (odd / "cut.flac").read_bytes()
    (odd / "cut.flac").write_bytes(whole[: len(whole) // 2])
    write_songs(odd, "Album/deeper.wav")
    (odd / "._song 0.wav").write_bytes(b"what a Mac leaves on a stick")
    (root / "notes.txt").write_text("beside the genres")
    rows = ["file,danceability,valence,energy"]  # columns go by name, not by place
    some = [(genre, i) for genre in ("Rock", "Sea Shanty") for i in range(5)]
    rows += [f"{genre}/song {i}.wav,0.{i}5,0.{i},0.{9 - i}" for genre, i in some]
    (root / "emotions.csv").write_text("\n".join(rows) + "\n")
    return root


HEADER = "file,valence,energy,danceability\n"
UNREADABLE = {"silent.wav", "too short.wav", "not a number.wav", "text.wav", "empty.mp3"}


@pytest.fixture(scope="module")
def own(songs, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "set"
    arguments = ("--audio-dir", songs, "--out", out, "--emotions", songs / "emotions.csv")
    result = run_tool(*arguments, "--test-fraction", 0.3)
    return out, result


@extracts
def test_odd_files_are_listed_and_the_rest_is_made(own):
    out, result = own
    listed = {name: row["reason"] for name, row in rows_of(out, "unreadable.csv").items()}
    assert {name.split("/")[1] for name in listed} == UNREADABLE and all(listed.values())
    assert "0.05" in listed["Rock/too short.wav"]
    assert "not finite" in listed["Rock/not a number.wav"]
    lines = result.stderr.splitlines()
    assert f"{len(UNREADABLE)} of 19 files left out" in lines[-1] and len(lines) == 2 + len(listed)
    (cut,) = (line for line in lines if "cut.flac" in line)
    assert cut.startswith("used as far as it goes: ") and "of 4.0 s could be decoded" in cut
    assert "2 files that are no audio of a genre: Rock/cover.jpg, notes.txt" in result.stdout
    assert "--no-merge" in result.stdout  # Sea Shanty is not one of the lab's classes
    rows = rows_of(out)
    assert [row["id"] for row in rows.values()] == [str(i) for i in range(1, 20)]
    assert list(rows) == sorted(rows) and "Rock/Album/deeper.wav" in rows
    genre = {e.clip_id: e for split in ("train", "test") for e in read_entries(out, "genre", split)}
    made = {row["id"]: name for name, row in rows.items() if name not in listed}
    assert set(made) == set(genre) and len(mtimes(out)) == 2 * (14 + 10)
    for clip_id, name in made.items():
        assert genre[clip_id].label == name.split("/")[0]
        assert genre[clip_id].path.parent.name == rows[name]["split"]
        read_array(genre[clip_id].path)  # checks shape and values


@extracts
def test_the_layout_is_the_labs(own):
    out = own[0]
    shown = {path.name for path in out.glob("[!.]*")}
    assert shown == {*FOLDERS, "AUDIO.txt", "sources.csv", "unreadable.csv"}
    forms = {"/train": "fused.full", "/test": "full.fused"}
    forms |= {"_beat/train": "beatsync.fused", "_beat/test": "beatsync.fused"}
    for place, form in forms.items():
        header, *rows = (out / f"{FOLDERS[0]}{place}_labels.txt").read_text().splitlines()
        names, genres = zip(*(row.split("\t") for row in rows), strict=True)
        assert header == "Id\tGenre"
        assert {name.split(".", 1)[1] for name in names} == {f"{form}.npy.gz"}
        assert "test" in place or genres != tuple(sorted(genres)), "the order must tell no class"
    for folder in FOLDERS[2:]:
        header, *rows = (out / folder / "train_labels.txt").read_text().splitlines()
        assert header == "Id,valence,energy,danceability" and all(r[0].isdigit() for r in rows)
        assert not (out / folder / "test_labels.txt").exists()


@extracts
def test_the_arrays_are_those_of_the_labs_extractor(own, songs):
    out, names = own[0], {row["id"]: name for name, row in rows_of(own[0]).items()}
    entry = read_entries(out, "genre", "train")[0]
    arrays = extract_features(make_dataset.read_clip(songs / names[entry.clip_id])[0])
    for folder, expected in zip(FOLDERS[:2], arrays, strict=True):
        found = np.load(out / folder / "train" / entry.path.name)
        assert np.array_equal(found, expected) and found.dtype == np.float64


@extracts
def test_both_parts_share_one_stratified_split(own):
    out = own[0]
    train, test = ids(out, "genre", "train"), ids(out, "genre", "test")
    emotion_train, emotion_test = ids(out, "emotion", "train"), ids(out, "emotion", "test")
    assert not train & test and emotion_train <= train and emotion_test <= test
    assert len(emotion_train | emotion_test) == 10
    rows = rows_of(out)
    for genre, n_test in (("Rock", 4), ("Sea Shanty", 2)):  # .3 of 14 and of 5
        splits = [row["split"] for name, row in rows.items() if name.startswith(genre)]
        assert splits.count("test") == n_test
    name = {row["id"]: file for file, row in rows.items()}
    for entry in read_entries(out, "emotion", "train"):
        i = int(name[entry.clip_id].split()[-1][0])
        assert entry.label == pytest.approx((i / 10, (9 - i) / 10, i / 10 + 0.05))


@extracts
def test_files_added_mended_changed_or_deleted_later(tmp_path, capsys):
    """All others keep their id, their split and their arrays."""
    songs = write_songs(tmp_path / "songs", *(f"Rock/{i}.wav" for i in range(5)))
    (songs / "Rock" / "text.wav").write_text("no sound")
    out = tmp_path / "set"
    make = functools.partial(make_here, "--audio-dir", songs, "--out", out, "--workers", 1)
    make()
    before, made = rows_of(out), mtimes(out)
    write_songs(songs, "Rock/text.wav", "Rock/a new one.wav")
    soundfile.write(songs / "Rock" / "1.wav", song(2, 900), SR)
    (songs / "Rock" / "3.wav").unlink()
    (out / ".DS_Store").touch()  # the Finder looked in
    (out / FOLDERS[0] / "train" / "._1.fused.full.npy").write_bytes(b"what a Mac leaves")
    capsys.readouterr()
    counts = make()["clips"]
    said = capsys.readouterr().out
    assert "2 files changed, made again: Rock/1.wav, Rock/text.wav" in said
    assert "1 files gone, left out of the set: Rock/3.wav" in said
    after, now = rows_of(out), mtimes(out)
    assert set(after) == set(before) - {"Rock/3.wav"} | {"Rock/a new one.wav"}
    for name in set(before) & set(after):
        assert all(after[name][key] == before[name][key] for key in ("id", "split"))
    assert after["Rock/a new one.wav"]["id"] == "7"
    changed, gone = before["Rock/1.wav"]["id"], before["Rock/3.wav"]["id"]
    anew = {name.split("/")[-1].split(".")[0] for name in made if made[name] != now.get(name)}
    assert anew == {changed, gone} and not any(f"/{gone}." in name for name in now)
    assert ids(out, "genre", "train", "test") == {row["id"] for row in after.values()}
    assert sum(counts.values()) == 6 and not (out / "unreadable.csv").exists()
    make()
    assert "made already" in capsys.readouterr().out


@extracts
def test_a_class_without_training_clips_is_not_asked_for(tmp_path, monkeypatch, capsys):
    """Or step 5 would refuse the set: a test clip of a class that was not trained."""
    monkeypatch.setenv("HOME", str(tmp_path))
    songs, out = tmp_path / "songs", tmp_path / "data"
    (out / "demo").mkdir(parents=True)  # as in README: the first command makes data/demo
    names = [f"{genre}/{i}.wav" for genre in ("Jazz", "Rock") for i in range(2)]
    for name, (_, split) in make_dataset.plan_split(names, {}, 0.2, 42).items():
        write_songs(songs, name)
        if name.startswith("Jazz") and split == "train":
            soundfile.write(songs / name, np.zeros(SR), SR)
    make_here("--audio-dir=~/songs", "--out=~/data", "--workers", 1)
    for split in ("train", "test"):
        assert {entry.label for entry in read_entries(out, "genre", split)} == {"Rock"}
    assert "class Jazz left out" in capsys.readouterr().err and (out / "demo").exists()


def test_emotions_are_found_however_accents_are_written(tmp_path):
    """macOS takes a letter with an accent apart, an editor writes it as one character."""
    files = ["Ρεμπε\u0301τικο/a.wav"]
    (tmp_path / "emotions.csv").write_text(HEADER + "Ρεμπ\u03adτικο/a.wav,0,1,.5\n")
    found = make_dataset.read_emotions(tmp_path / "emotions.csv", files)
    assert found == {files[0]: (0, 1, 0.5)}
    assert make_dataset.genre_of(files[0]) == "Ρεμπ\u03adτικο"


@extracts
def test_a_set_with_other_emotion_values_is_not_made_already(own, songs, tmp_path, capsys):
    text, path = (songs / "emotions.csv").read_text(), tmp_path / "emotions.csv"
    path.write_text(text.replace("song 1.wav,0.15", "song 1.wav,0.16"))
    arguments = ("--audio-dir", songs, "--out", own[0], "--test-fraction", 0.3)
    line = error_line(capsys, TOOL, *arguments, "--emotions", path)
    assert "made with other arguments (emotions " in line


@extracts
def test_a_song_that_lacks_its_beats_is_made_again(tmp_path):
    """A run may be killed between its two arrays."""
    root, songs = tmp_path / "set", write_songs(tmp_path / "songs", "Rock/a.wav")
    song = make_dataset.Song(1, "Rock/a.wav", "train", 0, 0, None)
    full, beat = (make_dataset.array_paths(root, 1, "train", ["genre"], b)[0] for b in (0, 1))
    for folder in (full.parent, beat.parent, root / ".begun"):
        folder.mkdir(parents=True)
    full.touch()
    assert make_dataset.make_arrays(root, songs, song) == (1, True, "")
    assert read_array(full).shape[1] >= read_array(beat).shape[1]


# --- wrong input ------------------------------------------------------------------------


def test_wrong_folders_are_one_line(tmp_path, capsys):
    def error(folder, *more):
        return error_line(capsys, TOOL, "--audio-dir", tmp_path / folder, *more)

    out = ("--out", tmp_path / "out")
    assert "nowhere: no such folder" in error("nowhere", *out)
    (tmp_path / "empty" / "music").mkdir(parents=True)
    assert "no genre folders" in error("empty/music", *out)
    assert "no audio files (.wav .mp3" in error("empty", *out)
    assert "--out" in error("empty")
    write_songs(tmp_path / "fma", "000/000002.wav", "155/155066.wav")
    (tmp_path / "fma" / ".hidden").mkdir()
    line = error("fma", *out)
    assert "numbered folders (000, ...) are no genres" in line and "genre_top" in line
    (tmp_path / "tab" / "Rock").mkdir(parents=True)
    (tmp_path / "tab" / "Rock" / "a\tb.wav").touch()
    assert "rename" in error("tab", *out)
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_are_left_alone(data_dir, songs, tmp_path, capsys):
    before, file = mtimes(data_dir), songs / "notes.txt"
    cases = {data_dir: "did not make", file: "is a file", tmp_path: "another process is writing"}
    with filelock.FileLock(tmp_path / ".lock"):
        for out, fault in cases.items():
            assert fault in error_line(capsys, TOOL, "--audio-dir", songs, "--out", out)
    assert before == mtimes(data_dir) and not mtimes(tmp_path)


@pytest.mark.parametrize("text, complaint", [
    (None, "No such file"), ("file,valence,energy\n", "header"), (HEADER, "no files"),
    (HEADER + "Rock/song 0.wav,0.1,55,0.3\n", "outside [0, 1]"),
    (HEADER + "Rock/song 0.wav,nan,0.5,0.3\n", "no number"),
    (HEADER + "song 0.wav,0.1,0.5,0.3\n", "relative to --audio-dir"),
    (HEADER + "Rock/song 0.wav,0,0,0\nRock\\song 0.wav,0,0,0\n", "line 3"),
])  # fmt: skip
def test_a_bad_csv_is_one_line(text, complaint, songs, tmp_path, capsys):
    path, out = tmp_path / "emotions.csv", tmp_path / "out"
    if text is not None:
        path.write_text(text)
    line = error_line(capsys, TOOL, "--audio-dir", songs, "--out", out, "--emotions", path)
    assert complaint in line and str(path) in line and not out.exists()


@extracts
def test_nothing_but_broken_files(tmp_path, capsys):
    (tmp_path / "music" / "Rock").mkdir(parents=True)
    (tmp_path / "music" / "Rock" / "a.wav").write_text("no sound")
    arguments = ("--audio-dir", tmp_path / "music", "--out", tmp_path / "out", "--workers", 1)
    line = error_line(capsys, TOOL, *arguments)
    assert "not one file" in line and "unreadable.csv" in line
    assert not list((tmp_path / "out").rglob("*_labels.txt"))


def test_files_added_later_bring_the_test_part_to_its_share():
    known = {f"Rock/{i}": (i, "test" if i < 4 else "train") for i in range(1, 11)}  # 3 of 10
    files = [*known, *(f"Rock/{i}" for i in range(11, 21))]
    plan = make_dataset.plan_split(files, known, 0.3, 0)
    assert [split for _, split in plan.values()].count("test") == 6
    assert {name: plan[name] for name in known} == known
    del known["Rock/2"]  # as many ids as before are taken, the last one among them
    plan = make_dataset.plan_split(files, known, 0.3, 0)
    assert len({clip_id for clip_id, _ in plan.values()}) == len(plan)
