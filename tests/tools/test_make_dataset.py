"""make_dataset.py by its command line: the lab's layout, odd files, interruption, wrong input."""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time

import make_dataset
import numpy as np
import pytest
import soundfile
from conftest import GENRES, ROOT, assert_clean_error, run_forked, run_script

from patrec.clips import read_array
from patrec.errors import InputError, StepFailed, end_in_one_line
from patrec.features import SR
from patrec.labels import MERGE, read_entries

FOLDERS = (
    "fma_genre_spectrograms",
    "fma_genre_spectrograms_beat",
    "multitask_dataset",
    "multitask_dataset_beat",
)
SMALL = ("--demo", "--clips", 40, "--emotion-clips", 8, "--seconds", 3, "--seed", 7)
make = functools.partial(run_script, "make_dataset.py")


def make_here(*arguments):
    """The same without a new process, which saves its imports."""
    return make_dataset.main([str(argument) for argument in arguments])


def arrays(root):
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.npy"))}


def ids(root, part, split, beat=False):
    return {entry.clip_id for entry in read_entries(root, part, split, beat)}


def labels(path):
    header, *rows = path.read_text().splitlines()
    return header, rows


# ---------------------------------------------------------------------------- demo set


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small demo set whose making is killed halfway and then taken up again."""
    out = tmp_path_factory.mktemp("demo") / "set"
    partial = out.with_name("set.unfinished")
    command = [sys.executable, str(ROOT / "make_dataset.py"), *map(str, SMALL), "--out", str(out)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while len(arrays(partial)) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = {name: path.stat().st_mtime_ns for name, path in arrays(partial).items()}
    assert 20 <= len(made) < 2 * 48, "was to be stopped halfway"
    assert not out.exists(), "an unfinished set must not be taken for a finished one"
    make_here(*SMALL, "--out", out)
    return out, partial, made


def test_an_interrupted_demo_goes_on_where_it_stopped(demo):
    out, partial, made = demo
    now = arrays(out)
    assert len(now) == 2 * 48 and not partial.exists()
    # The last pair may have been half done: its clip is computed again, all others are kept.
    rewritten = [name for name, mtime in made.items() if now[name].stat().st_mtime_ns != mtime]
    assert len({name.split("/")[-1] for name in rewritten}) <= os.cpu_count()
    assert not list(out.rglob(".*.tmp")), "half-written files of the killed run"


def test_the_same_arguments_again_do_nothing(demo, capsys):
    out = demo[0]
    before = {name: path.stat().st_mtime_ns for name, path in arrays(out).items()}
    assert make_here(*SMALL, "--out", out)["clips"]["genre train"] == 20
    assert "made already" in capsys.readouterr().out
    assert before == {name: path.stat().st_mtime_ns for name, path in arrays(out).items()}
    line = error_of(*SMALL[:-1], 8, "--out", out, capsys=capsys)
    assert str(out) in line and "seed 7, now 8" in line


def test_demo_layout_is_the_labs(demo):
    out = demo[0]
    assert {path.name for path in out.iterdir()} == {*FOLDERS, "DEMO.txt"}
    text = (out / "DEMO.txt").read_text()
    assert "ynthesised" in text
    assert json.loads(text[text.index("{") :]) == {
        "source": "demo",
        "clips": 40,
        "emotion_clips": 8,
        "seconds": 3,
        "seed": 7,
    }
    forms = {
        "fma_genre_spectrograms/train": "fused.full", "fma_genre_spectrograms/test": "full.fused",
        "fma_genre_spectrograms_beat/train": "beatsync.fused",
        "fma_genre_spectrograms_beat/test": "beatsync.fused",
    }  # fmt: skip
    for place, form in forms.items():
        header, rows = labels(out / f"{place}_labels.txt")
        assert header == "Id\tGenre" and len(rows) == 20
        for row in rows:
            name, genre = row.split("\t")
            clip_id, rest = name.split(".", 1)
            assert clip_id.isdigit() and rest == f"{form}.npy.gz" and genre in GENRES
            assert (out / place / f"{clip_id}.fused.full.npy").exists()
        assert sorted(row.split("\t")[1] for row in rows) == sorted(GENRES)  # stratified
    for folder in FOLDERS[2:]:
        header, rows = labels(out / folder / "train_labels.txt")
        assert header == "Id,valence,energy,danceability" and len(rows) == 6
        assert all(row.split(",")[0].isdigit() for row in rows)
        assert not (out / folder / "test_labels.txt").exists()
        assert len(list((out / folder / "test").glob("*.fused.full.npy"))) == 2


def test_demo_arrays_are_the_labs(demo):
    out = demo[0]
    for part in ("genre", "emotion"):
        for split in ("train", "test"):
            full, beat = (read_entries(out, part, split, beat) for beat in (False, True))
            assert {e.clip_id: e.label for e in full} == {e.clip_id: e.label for e in beat}
            beat_path = {entry.clip_id: entry.path for entry in beat}
            for entry in full:
                raw = np.load(entry.path)
                assert raw.dtype == np.float64 and raw.shape == (140, 1 + 3 * SR // 512)
                assert (
                    read_array(beat_path[entry.clip_id]).shape[1] < raw.shape[1]
                )  # read_array checks values too
    parts = [ids(out, part, split) for part in ("genre", "emotion") for split in ("train", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 48  # no id twice


def test_the_same_seed_gives_the_same_bytes(demo):
    """Computed here, in another process, clip by clip: neither order nor process matters."""
    out = demo[0]
    for part, split in (("genre", "train"), ("emotion", "test")):
        entry = read_entries(out, part, split)[0]
        genre = entry.label if part == "genre" else None
        for seed, same in ((7, True), (8, False)):
            waveform = make_dataset.demo_waveform(seed, int(entry.clip_id), genre, 3)
            full, _ = make_dataset.extract_features(waveform)
            assert np.array_equal(full, np.load(entry.path)) is same, (part, seed)


def test_the_parts_of_a_demo_set_are_made_one_after_the_other(demo, tmp_path):
    """And hold the very bytes of a set that was made at once; what is there is kept."""
    out, both = tmp_path / "set", demo[0]
    assert make_here(*SMALL, "--parts", "emotion", "--out", out)["clips"]["genre train"] == 0
    assert {path.name for path in out.iterdir()} == {*FOLDERS[2:], "DEMO.txt"}
    before = {name: path.stat().st_mtime_ns for name, path in arrays(out).items()}
    make_here(*SMALL, "--parts", "genre", "emotion", "--out", out)
    assert {path.name for path in out.iterdir()} == {*FOLDERS, "DEMO.txt"}
    assert not out.with_name("set.unfinished").exists()
    now = arrays(out)
    assert before.items() <= {name: path.stat().st_mtime_ns for name, path in now.items()}.items()
    texts = [path.relative_to(both) for path in both.rglob("*.txt")]
    for name in [*map(str, texts), *now]:
        assert (out / name).read_bytes() == (both / name).read_bytes(), name


DEADLY = """import os, soundfile

class SoundFile(soundfile.SoundFile):
    def __init__(self, file, *args, **options):
        if "bomb" in str(file):
            os.kill(os.getpid(), 9)
        super().__init__(file, *args, **options)

soundfile.SoundFile = SoundFile
"""


@pytest.mark.parametrize("names, workers", [(["a bomb", "song 1", "z bomb"], 2), (["bomb"], 1)])
def test_a_file_that_kills_its_worker_costs_itself_only(tmp_path, names, workers):
    """Twice: first beside others, then alone. One worker is the program itself: then it goes on
    when it is called again."""
    songs, out = tmp_path / "songs", tmp_path / "set"
    (songs / "Rock").mkdir(parents=True)
    for name in ("a song", *names):
        soundfile.write(songs / "Rock" / f"{name}.wav", song(2, 200), SR)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)  # what every Python runs first
    arguments = ("--audio-dir", songs, "--out", out, "--workers", workers)
    site = {"PYTHONPATH": str(tmp_path / "site")}
    if workers == 1:
        killed = run_script("make_dataset.py", *arguments, check=False, **site)
        assert killed.returncode == -signal.SIGKILL
    result = run_script("make_dataset.py", *arguments, **site)
    listed = {row["file"]: row["reason"] for row in read_csv(out / "unreadable.csv")}
    bombs = {name for name in names if "bomb" in name}
    assert set(listed) == {f"Rock/{name}.wav" for name in bombs}, listed
    assert all("died twice" in reason for reason in listed.values())
    assert len(arrays(out)) == 2 * (1 + len(names) - len(bombs)) and not (out / ".begun").exists()
    assert "Traceback" not in result.stderr


def test_every_genre_has_its_style():
    assert set(make_dataset.STYLES) == set(MERGE) == set(GENRES)
    assert {style.pattern for style in make_dataset.STYLES.values()} == set(make_dataset.PATTERNS)
    assert all(len(strokes) == 16 for kit in make_dataset.PATTERNS.values() for strokes in kit)


def test_emotions_follow_what_is_played():
    drawn = [make_dataset.demo_emotion(make_dataset.clip_rng(0, i)) for i in range(300)]
    values = np.array([emotions for _, emotions in drawn])
    assert values.min() >= 0 and values.max() <= 1 and (values.std(0) > 0.1).all()
    minor, drums, tilt = (
        np.array([getattr(style, name) for style, _ in drawn])
        for name in ("minor", "drums", "tilt")
    )
    assert np.corrcoef(values[:, 0], minor)[0, 1] < -0.4  # valence
    assert np.corrcoef(values[:, 1], tilt)[0, 1] > 0.4  # energy
    assert np.corrcoef(values[:, 2], drums)[0, 1] > 0.4  # danceability


def test_a_tone_has_its_pitch_and_nothing_folded_back():
    y = make_dataset.play_tone(3000.0, SR, 1.0, 1.0, 10.0, np.random.default_rng(0))
    spectrum = np.abs(np.fft.rfft(y * np.hanning(len(y))))  # bins of 1 Hz
    assert abs(spectrum.argmax() - 3000) <= 1
    harmonics = np.abs(np.arange(len(spectrum))[:, None] - 3000 * np.arange(1, 4)).min(1) < 20
    assert spectrum[~harmonics].max() < 0.01 * spectrum.max()


# ---------------------------------------------------------------------------- own audio


def song(seconds, f_hz=440.0, rate=SR, channels=1):
    t = np.arange(round(seconds * rate)) / rate
    y = 0.4 * np.sin(2 * np.pi * f_hz * t) * (1 + np.sin(2 * np.pi * 2 * t)) / 2
    return np.repeat(y[:, None], channels, axis=1) if channels > 1 else y


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Two genres of ordinary songs, one not of the lab's, and files of every odd kind."""
    root = tmp_path_factory.mktemp("songs")
    for genre in ("Rock", "Sea Shanty"):
        (root / genre).mkdir()
        for i in range(5):
            soundfile.write(root / genre / f"song {i}.wav", song(2, 200 + 50 * i), SR)
    odd = root / "Rock"
    soundfile.write(odd / "quadraphonic twice.wav", song(1.5, channels=8), 44_100)
    soundfile.write(odd / "telephone.flac", song(2, rate=8000), 8000)
    soundfile.write(odd / "pop.OGG", song(2), SR, format="OGG")
    soundfile.write(odd / "compressed.mp3", song(2), SR)
    soundfile.write(odd / "silent.wav", np.zeros(SR), SR)
    soundfile.write(odd / "blip.wav", song(0.1), SR)
    soundfile.write(odd / "too short.wav", song(0.05), SR)
    soundfile.write(odd / "empty of sound.wav", np.zeros(0), SR)
    soundfile.write(odd / "not a number.wav", np.full(SR, np.nan), SR, subtype="FLOAT")
    (odd / "text.wav").write_text("this is no sound\n" * 100)
    (odd / "empty.mp3").write_bytes(b"")
    (odd / "corrupt.mp3").write_bytes(b"\xff\xfb\x90" + bytes(range(256)) * 20)
    (odd / "cover.jpg").write_bytes(b"no audio, not looked at")
    (odd / "._song 0.wav").write_bytes(b"what a Mac leaves on a stick")
    (root / "notes.txt").write_text("beside the genres")
    rows = ["file,danceability,valence,energy"]  # columns go by name, not by place
    rows += [
        f"{genre}/song {i}.wav,0.{i}5,0.{i},0.{9 - i}"
        for genre in ("Rock", "Sea Shanty")
        for i in range(5)
    ]
    (root / "emotions.csv").write_text("\n".join(rows) + "\n")
    return root


UNREADABLE = {
    "silent.wav",
    "too short.wav",
    "empty of sound.wav",
    "not a number.wav",
    "text.wav",
    "empty.mp3",
    "corrupt.mp3",
}


@pytest.fixture(scope="module")
def own(songs, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "set"
    result = run_forked(
        "make_dataset.py",
        "--audio-dir",
        songs,
        "--out",
        out,
        "--emotions",
        songs / "emotions.csv",
        "--test-fraction",
        0.3,
    )
    return out, result


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_odd_files_are_listed_and_the_rest_is_made(own, songs):
    out, result = own
    listed = {row["file"]: row["reason"] for row in read_csv(out / "unreadable.csv")}
    assert {name.split("/")[1] for name in listed} == UNREADABLE
    assert (
        all(listed.values())
        and "0.05" in listed["Rock/too short.wav"]
        and "not finite" in listed["Rock/not a number.wav"]
    )
    assert (
        "Traceback" not in result.stderr
        and "7 of 22 files left out" in result.stderr
        and "Warning" not in result.stderr
    )
    assert "--no-merge" in result.stdout  # Sea Shanty is not one of the lab's classes
    sources = {row["file"]: row for row in read_csv(out / "sources.csv")}
    assert [row["id"] for row in sources.values()] == [str(i) for i in range(1, 23)] and list(
        sources
    ) == sorted(sources)
    genre = {e.clip_id: e for split in ("train", "test") for e in read_entries(out, "genre", split)}
    assert {sources[name]["id"] for name in sources if name not in listed} == set(genre)
    for name, row in sources.items():
        if name not in listed:
            entry = genre[row["id"]]
            assert entry.label == name.split("/")[0] and entry.path.parent.name == row["split"]
            for array in (
                read_array(entry.path),
                read_array(out / FOLDERS[1] / row["split"] / entry.path.name),
            ):
                assert array.shape[0] == 140
    assert len(arrays(out)) == 2 * (15 + 10)


def test_both_parts_share_one_stratified_split(own):
    out = own[0]
    train, test = ids(out, "genre", "train"), ids(out, "genre", "test")
    emotion_train, emotion_test = ids(out, "emotion", "train"), ids(out, "emotion", "test")
    assert (
        not train & test
        and emotion_train <= train
        and emotion_test <= test
        and len(emotion_train | emotion_test) == 10
    )
    sources = read_csv(out / "sources.csv")
    for genre, n_test in (("Rock", 5), ("Sea Shanty", 2)):  # .3 of 17 and of 5
        assert (
            sum(row["split"] == "test" for row in sources if row["file"].startswith(genre))
            == n_test
        )
    name = {row["id"]: row["file"] for row in sources}
    for entry in read_entries(out, "emotion", "train"):
        i = int(name[entry.clip_id].split()[-1][0])
        assert entry.label == pytest.approx((i / 10, (9 - i) / 10, i / 10 + 0.05))
    assert not (out / FOLDERS[2] / "test_labels.txt").exists()


def test_files_added_or_mended_later_join_the_set(tmp_path):
    songs, out = tmp_path / "songs", tmp_path / "set"
    for genre in ("Rock", "Sea Shanty"):
        (songs / genre).mkdir(parents=True)
        for i in range(3):
            soundfile.write(songs / genre / f"song {i}.wav", song(1, 200 + 50 * i), SR)
    for name in ("text.wav", "empty.mp3"):
        (songs / "Rock" / name).write_text("")
    make_here("--audio-dir", songs, "--out", out, "--test-fraction", 0.3)
    before = {row["file"]: row for row in read_csv(out / "sources.csv")}
    made = {name: path.stat().st_mtime_ns for name, path in arrays(out).items()}
    soundfile.write(songs / "Rock" / "text.wav", song(1), SR)
    soundfile.write(songs / "Rock" / "a new one.wav", song(1), SR)
    make_here("--audio-dir", songs, "--out", out, "--test-fraction", 0.3)
    after = {row["file"]: row for row in read_csv(out / "sources.csv")}
    assert {name: after[name] for name in before} == before
    assert (
        set(after) - set(before) == {"Rock/a new one.wav"}
        and after["Rock/a new one.wav"]["id"] == "9"
    )
    now = arrays(out)
    assert (
        all(now[name].stat().st_mtime_ns == mtime for name, mtime in made.items())
        and len(now) == len(made) + 4
    )
    assert [row["file"] for row in read_csv(out / "unreadable.csv")] == ["Rock/empty.mp3"]
    assert {"9", after["Rock/text.wav"]["id"]} <= ids(out, "genre", "train") | ids(
        out, "genre", "test"
    )
    soundfile.write(songs / "Rock" / "empty.mp3", song(1), SR)  # the last one is mended
    make_here("--audio-dir", songs, "--out", out, "--test-fraction", 0.3)
    assert not (out / "unreadable.csv").exists()


def test_a_class_without_training_clips_is_not_asked_for(tmp_path, capsys):
    """Or step 5 would refuse the set: a test clip of a class that was not trained."""
    songs, out = tmp_path / "songs", tmp_path / "set"
    names = [f"{genre}/{i}.wav" for genre in ("Jazz", "Rock") for i in range(2)]
    for name, (_, split) in make_dataset.plan_audio(names, {}, 0.2, 42).items():
        (songs / name).parent.mkdir(parents=True, exist_ok=True)
        broken = name.startswith("Jazz") and split == "train"
        soundfile.write(songs / name, np.zeros(SR) if broken else song(1), SR)
    make_here("--audio-dir", songs, "--out", out)
    for split in ("train", "test"):
        assert {entry.label for entry in read_entries(out, "genre", split)} == {"Rock"}
    assert "class Jazz left out" in capsys.readouterr().err


def test_workers_and_dask_are_those_asked_for(tmp_path, monkeypatch):
    asked = []

    def make_all(root, clips, workers=None, dask=None):
        asked.append((workers, dask))
        raise StepFailed("enough seen")

    monkeypatch.setattr(make_dataset, "make_all", make_all)
    (tmp_path / "songs" / "Rock").mkdir(parents=True)
    soundfile.write(tmp_path / "songs" / "Rock" / "a.wav", song(1), SR)
    for source in (("--demo",), ("--audio-dir", tmp_path / "songs")):
        where = ("--out", tmp_path / f"set{len(asked)}")
        with pytest.raises(StepFailed):
            make_here(*source, *where, "--workers", 3, "--dask", "tcp://there:8786")
    assert asked == [(3, "tcp://there:8786")] * 2


def test_read_audio_takes_the_middle_30_s_of_all_channels_at_the_labs_rate(tmp_path):
    rate = 16_000
    left = np.zeros(40 * rate)
    left[5 * rate : 35 * rate] = 0.5  # the middle 30 of 40 s
    soundfile.write(tmp_path / "long.wav", np.stack([left, 0 * left], axis=1), rate)
    y = make_dataset.read_audio(tmp_path / "long.wav")
    assert y.shape == (30 * SR,) and y.dtype == np.float32
    assert (
        np.abs(y[SR:-SR] - 0.25).max() < 0.01
    )  # mean of both channels, nothing of the silence outside
    soundfile.write(tmp_path / "short.wav", song(1, rate=8000), 8000)
    y = make_dataset.read_audio(tmp_path / "short.wav")
    assert abs(len(y) - SR) <= 1
    assert abs(np.abs(np.fft.rfft(y)).argmax() * SR / len(y) - 440) < 3  # the pitch stays


# ---------------------------------------------------------------------------- wrong input


def error_of(*arguments, capsys):
    """Run main in this process; returns its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        try:
            make_here(*arguments)
        except InputError:
            end_in_one_line(*sys.exc_info())
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_wrong_folders_are_one_line(tmp_path, capsys):
    assert_clean_error(
        make("--audio-dir", tmp_path / "nowhere", "--out", tmp_path / "out", check=False),
        "nowhere",
        "no such folder",
    )
    error = functools.partial(error_of, capsys=capsys)
    (tmp_path / "empty" / "music").mkdir(parents=True)
    assert "no genre folders" in error(
        "--audio-dir", tmp_path / "empty" / "music", "--out", tmp_path / "out"
    )
    assert "no .wav .mp3 .flac .ogg files" in error(
        "--audio-dir", tmp_path / "empty", "--out", tmp_path / "out"
    )
    assert "--out" in error("--audio-dir", tmp_path / "empty")
    (tmp_path / "tab" / "Rock").mkdir(parents=True)
    (tmp_path / "tab" / "Rock" / "a\tb.wav").touch()
    assert "rename" in error("--audio-dir", tmp_path / "tab", "--out", tmp_path / "out")
    assert "--demo or --audio-dir" in error("--out", tmp_path / "out")
    assert "--clips 3" in error("--demo", "--clips", 3, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_are_left_alone(tmp_path, data_dir, songs, capsys):
    error = functools.partial(error_of, capsys=capsys)
    before = {name: path.stat().st_mtime_ns for name, path in arrays(data_dir).items()}
    assert "did not make" in error("--demo", "--out", data_dir)
    assert "did not make" in error("--audio-dir", songs, "--out", data_dir)
    assert before == {name: path.stat().st_mtime_ns for name, path in arrays(data_dir).items()}
    (tmp_path / "file").write_text("")
    assert "is a file" in error("--demo", "--out", tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "header"),
        ("file,valence,energy\nRock/song 0.wav,0.1,0.2\n", "header"),
        ("file,valence,energy,danceability\n", "no files"),
        ("file,valence,energy,danceability\nRock/song 0.wav,0.1,0.2\n", "line 2"),
        ("file,valence,energy,danceability\nRock/song 0.wav,0.1,high,0.3\n", "no number"),
        ("file,valence,energy,danceability\nRock/song 0.wav,0.1,55,0.3\n", "outside [0, 1]"),
        ("file,valence,energy,danceability\nRock/song 0.wav,nan,0.5,0.3\n", "outside [0, 1]"),
        ("file,valence,energy,danceability\nsong 0.wav,0.1,0.5,0.3\n", "relative to --audio-dir"),
        (
            "file,valence,energy,danceability\nRock/song 0.wav,0,0,0\nRock\\song 0.wav,0,0,0\n",
            "line 3",
        ),
    ],
)
def test_a_bad_csv_is_one_line(text, complaint, songs, tmp_path, capsys):
    path = tmp_path / "emotions.csv"
    path.write_text(text)
    line = error_of(
        "--audio-dir", songs, "--out", tmp_path / "out", "--emotions", path, capsys=capsys
    )
    assert complaint in line and str(path) in line
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_csv_is_one_line(songs, tmp_path, capsys):
    assert "No such file" in error_of(
        "--audio-dir",
        songs,
        "--out",
        tmp_path / "out",
        "--emotions",
        tmp_path / "none.csv",
        capsys=capsys,
    )


def test_nothing_but_broken_files(tmp_path, capsys):
    (tmp_path / "music" / "Rock").mkdir(parents=True)
    (tmp_path / "music" / "Rock" / "a.wav").write_text("no sound")
    line = error_of("--audio-dir", tmp_path / "music", "--out", tmp_path / "out", capsys=capsys)
    assert "not one file" in line and "unreadable.csv" in line
    assert not (tmp_path / "out").exists()


def test_files_added_later_bring_the_test_part_to_its_share():
    known = {f"Rock/{i}": (i, "test" if i < 4 else "train") for i in range(1, 11)}  # 3 of 10
    files = [*known, *(f"Rock/{i}" for i in range(11, 21))]
    plan = make_dataset.plan_audio(files, known, 0.3, 0)
    assert [split for _, split in plan.values()].count("test") == 6
    assert {name: plan[name] for name in known} == known
