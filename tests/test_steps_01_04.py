"""Steps 1 to 4 through their command lines: what they write, and what the audit finds."""

import json
import re
import shutil
import struct
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import (
    CLASSES,
    COUNTS,
    GENRES,
    MERGED,
    assert_clean_error,
    genre_level,
    read_metrics,
    run_script,
    write_data_set,
)
from scipy.io import wavfile

import patrec.machine

STEPS = ("step01_spectrograms", "step02_beat_sync", "step03_chroma", "step04_dataset")
FIGURES = {
    "step01_spectrograms": {"two_clips", "genre_means", "genre_spectra", "own_audio"},
    "step02_beat_sync": {"time_steps", "lstm_cost", "lstm_gradient", "two_clips", "genre_means"},
    "step03_chroma": {"two_clips", "genre_chroma"},
    "step04_dataset": {"item", "classes"},
}


@pytest.fixture(scope="module")
def wav(tmp_path_factory):
    """Three seconds of stereo at 44,100 Hz: a 1,000 Hz tone, struck four times a second."""
    t = np.arange(3 * 44_100) / 44_100
    tone = np.sin(2 * np.pi * 1000 * t) * np.exp(-12 * (t % 0.25))
    path = tmp_path_factory.mktemp("audio") / "my song.wav"
    wavfile.write(path, 44_100, (2e4 * np.stack([tone, tone], axis=1)).astype(np.int16))
    return path


@pytest.fixture(scope="module")
def runs(data_dir, wav, tmp_path_factory):
    """Each step once, --smoke, from another working folder; name -> (output folder, metrics)."""
    out = tmp_path_factory.mktemp("out")
    results = {}
    for name in STEPS:
        extra = ["--audio", wav] if name == "step01_spectrograms" else []
        run_script(
            f"{name}.py",
            "--smoke",
            "--data-dir",
            data_dir,
            "--out-dir",
            out,
            *extra,
            cwd=out,
            timeout=600,
            OMP_NUM_THREADS="1",
        )
        results[name] = (out / name, json.loads((out / name / "metrics.json").read_text()))
    return results


@pytest.mark.parametrize("name", STEPS)
def test_outputs_keep_the_contract(runs, data_dir, name):
    folder, metrics = runs[name]
    assert metrics["step"] == name and metrics["seconds"] > 0 and metrics["runs"] == {}
    assert metrics["data"]["root"] == str(data_dir.resolve()) and metrics["data"]["demo"] is False
    assert set(metrics["data"]["fingerprint"]) == {"genre", "emotion"}
    assert {"python", "torch", "numpy", "librosa", "device", "threads"} <= set(
        metrics["environment"]
    )
    assert json.loads((folder / "args.json").read_text())["smoke"] is True
    written = {path.name for path in folder.iterdir() if path.name[0] != "."}
    sounds = {"clip_1.mp3", "clip_2.mp3"} if name == "step01_spectrograms" else set()
    figures = {f"{figure}.png" for figure in FIGURES[name]}
    assert written == figures | sounds | {"args.json", "metrics.json", "summary.md"}


@pytest.mark.parametrize("name", STEPS)
def test_summary_shows_every_figure_and_no_broken_number(runs, name):
    folder, _ = runs[name]
    text = (folder / "summary.md").read_text()
    assert text.startswith(f"# {name}")
    for figure in FIGURES[name]:
        assert f"]({figure}.png)" in text
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)  # source code has braces by right
    assert " nan" not in text.lower() and "inf " not in text.lower() and "{" not in text


@pytest.mark.parametrize("name", STEPS)
def test_figures_show_something(runs, name):
    folder, _ = runs[name]
    for figure in FIGURES[name]:
        path = folder / f"{figure}.png"
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width > 500 and height > 200
        assert plt.imread(path)[..., :3].std() > 0.05, f"{path.name} is nearly blank"


# --- step 1 ---------------------------------------------------------------------------


def test_step01_draws_two_clips_of_different_classes(runs):
    _, metrics = runs["step01_spectrograms"]
    first, second = metrics["pair"]
    assert first["genre"] != second["genre"] and first["id"] != second["id"]
    assert len(metrics["genres"]) == 20, "every genre of the label file, before the merge"


def test_step01_counts_the_data_folder(runs):
    _, metrics = runs["step01_spectrograms"]
    counts = {
        row["folder"]: (row["arrays"], row["labelled clips"]) for row in metrics["step0"]["parts"]
    }
    n_train, n_test = (sum(count[i] for count in COUNTS.values()) for i in (0, 1))
    for form in ("", "_beat"):
        assert counts[f"fma_genre_spectrograms{form}/train"] == (n_train, n_train)
        assert counts[f"fma_genre_spectrograms{form}/test"] == (n_test, n_test)
        assert (
            counts[f"multitask_dataset{form}/train"] == (64, 64)
            and counts[f"multitask_dataset{form}/test"][0] == 12
        )
    assert metrics["step0"]["matmul_seconds"]["cpu"] > 0


def test_step01_measures_rise_with_the_genres_frequency(runs):
    """Clips of Blues are loudest at the low end of the mel axis, of Trip-Hop near the high one."""
    assert genre_level("Blues") == 0 < 0.9 < genre_level("Trip-Hop")
    _, metrics = runs["step01_spectrograms"]
    low, high = metrics["genres"]["Blues"], metrics["genres"]["Trip-Hop"]
    assert high["centroid_hz"] > 3 * low["centroid_hz"]
    assert low["share_below_200_hz"] > 0.3 > 0.05 > high["share_below_200_hz"]


def test_step01_measures_a_file_of_ones_own(runs):
    folder, metrics = runs["step01_spectrograms"]
    assert metrics["audio"]["centroid_hz"] == pytest.approx(1000, rel=0.1)
    assert metrics["audio"]["share_below_200_hz"] < 0.05
    assert metrics["audio"]["onsets_per_s"] == pytest.approx(4, abs=1)
    assert "my song.wav" in (folder / "summary.md").read_text()


def test_mel_measures_of_known_sounds():
    from patrec.features import DB_FLOOR, N_MELS, SR
    from patrec.measures import mel_measures

    # White noise has the same power per Hz, which is what a mel band holds: flat rows.
    noise = mel_measures(np.full((N_MELS, 100), -30.0))
    assert noise["centroid_hz"] == pytest.approx(SR / 4, rel=0.02)
    assert noise["share_below_200_hz"] == pytest.approx(200 / (SR / 2), rel=0.2)
    assert noise["dynamic_range_db"] == pytest.approx(0, abs=1e-6) and noise["onsets_per_s"] == 0
    # Half of the frames 40 dB lower.
    steps = np.full((N_MELS, 100), -10.0)
    steps[:, 50:] = -50
    assert mel_measures(steps)["dynamic_range_db"] == pytest.approx(40, abs=0.1)
    # Silence and a single step give numbers too.
    for silent in (np.full((N_MELS, 50), DB_FLOOR), np.full((N_MELS, 1), DB_FLOOR)):
        assert all(
            np.isfinite(value) for value in mel_measures(silent, beat=silent.shape[1] == 1).values()
        )


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such audio file"), ("short", "too short")]
)
def test_step01_bad_audio_stops_before_anything_is_written(data_dir, tmp_path, content, words):
    path = tmp_path / "song.wav"
    if content:
        wavfile.write(path, 22_050, np.zeros(3000, np.int16))
    result = run_script(
        "step01_spectrograms.py",
        "--smoke",
        "--data-dir",
        data_dir,
        "--out-dir",
        tmp_path / "out",
        "--audio",
        path,
        check=False,
    )
    assert_clean_error(result, "song.wav", words)
    assert not (tmp_path / "out").exists()


def test_step01_a_file_that_is_no_audio_is_one_line(data_dir, tmp_path):
    path = tmp_path / "song.wav"
    path.write_bytes(b"no sound at all")
    result = run_script(
        "step01_spectrograms.py",
        "--data-dir",
        data_dir,
        "--out-dir",
        tmp_path / "out",
        "--audio",
        path,
        check=False,
    )
    assert_clean_error(result, "song.wav", "not readable as audio (NoBackendError)")


# --- steps 2 and 3 --------------------------------------------------------------------


def test_steps_1_to_3_look_at_the_same_two_clips(runs):
    pair = [f"{clip['genre']} ({clip['id']})" for clip in runs["step01_spectrograms"][1]["pair"]]
    assert list(runs["step02_beat_sync"][1]["differences"]["pair"]) == pair
    assert [row["clip"] for row in runs["step03_chroma"][1]["pair"]] == pair


def test_step02_counts_the_time_steps_of_every_clip(runs, data_dir):
    _, metrics = runs["step02_beat_sync"]
    for form, folder in (
        ("full", "fma_genre_spectrograms"),
        ("beat-synced", "fma_genre_spectrograms_beat"),
    ):
        lengths = [np.load(path).shape[1] for path in (data_dir / folder / "train").glob("*.npy")]
        assert metrics["steps"][form] == {
            "min": min(lengths),
            "median": np.median(lengths),
            "max": max(lengths),
            "clips": sum(train for train, _ in COUNTS.values()),
        }


def test_step02_measures_cost_and_reach(runs):
    _, metrics = runs["step02_beat_sync"]
    # How long a pass takes is the machine's affair; that both median lengths were measured is not.
    seconds = metrics["lstm_cost"]["seconds"]
    full, beat = (
        seconds[str(int(metrics["steps"][form]["median"]))] for form in ("full", "beat-synced")
    )
    assert min(full, beat) > 0 and metrics["lstm_cost"]["full_over_beat"] == pytest.approx(
        full / beat
    )
    full, beat = metrics["gradient_reach"]["full"], metrics["gradient_reach"]["beat-synced"]
    assert 0 < full["at_first_step"] < 1e-4 and full["share"] < beat["share"]
    assert full["steps"] < full["of_steps"]


def test_step02_measures_the_gradient_after_training_too(runs):
    folder, metrics = runs["step02_beat_sync"]
    trained = metrics["gradient_reach_trained"]
    assert trained["updates"] > 0
    for form in ("full", "beat-synced"):
        before = metrics["gradient_reach"][form]
        assert trained[form]["of_steps"] == before["of_steps"]
        assert trained[form]["at_first_step"] != before["at_first_step"] > 0


def test_variance_within_beats_is_what_one_value_per_beat_cannot_hold():
    """A click every half second: rows that are constant from click to click have no variance
    within a beat, rows that alternate from frame to frame have nearly nothing else."""
    from patrec.measures import share_within_beats, track_beats

    beats = np.arange(20, 1280, 20)  # in frames; 129 a minute
    mel = np.full((128, 1280), -60.0)
    mel[:, beats] = mel[:, beats + 1] = -5.0
    levels = np.random.default_rng(0).random((12, 65))
    held = np.repeat(levels, 20, axis=1)[:, :1280]
    restless = np.tile([0.0, 1.0], (12, 640))
    tracked = track_beats(mel)
    assert share_within_beats(restless, tracked) > 0.95
    assert share_within_beats(held, tracked) < 0.35, "a tracked beat may be a frame or two off"
    # Cut half a beat off, a span holds halves of two beats.
    assert share_within_beats(held, tracked) + 0.1 < share_within_beats(held, tracked, 0.5)
    # No onset at all: the clip is one beat, and all variance lies within it.
    none = track_beats(np.full((128, 1280), -60.0))
    assert share_within_beats(held, none) == pytest.approx(1)


def test_lstm_gradient_follows_each_clips_own_end():
    """The clip's last step, not the padding's, is step 0; an early change reaches it less."""
    import torch

    from patrec.measures import lstm_gradient

    torch.manual_seed(0)
    x = torch.randn(3, 60, 5)
    lengths = torch.tensor([60, 40, 40])
    norms = lstm_gradient(x, lengths)
    assert norms.shape == (40,) and norms[0] == pytest.approx(1) and norms[30] < 0.01
    x[1:, 40:] = 1e3  # what lies behind a clip's end plays no part
    torch.manual_seed(0)
    torch.randn(3, 60, 5)
    np.testing.assert_allclose(lstm_gradient(x, lengths), norms)


def test_step03_names_the_strongest_note(runs, data_dir):
    """Each genre's clips have one strong note, by where the genre lies on the axis."""
    from patrec.features import NOTES

    _, metrics = runs["step03_chroma"]
    for row in metrics["pair"]:
        note = NOTES[int(min(genre_level(row["clip"].split(" (")[0]), 1) * 11)]
        assert row["full"]["strongest"] == row["beat-synced"]["strongest"] == note
        assert 0 < row["full"]["entropy_bits"] < np.log2(12)


@pytest.mark.parametrize("step", STEPS[:3])
def test_unreadable_clips_are_an_input_error(tmp_path, step):
    root = write_data_set(tmp_path / "data", per_class=(2, 1), n_emotion=(4, 2), n_frames=30)
    for path in (root / "fma_genre_spectrograms" / "train").glob("*.npy"):
        path.write_bytes(b"broken")
    result = run_script(
        f"{step}.py", "--smoke", "--data-dir", root, "--out-dir", tmp_path / "out", check=False
    )
    assert_clean_error(result, "not a readable", "--skip-bad")


# --- step 4 ---------------------------------------------------------------------------


def test_step04_counts_before_and_after_the_merge(runs):
    _, metrics = runs["step04_dataset"]
    before, after = metrics["classes"]["before"], metrics["classes"]["after"]
    for number, split in enumerate(("train", "test")):
        assert before[split] == {genre: COUNTS[genre][number] for genre in GENRES}
        assert after[split] == {
            name: sum(COUNTS[genre][number] for genre in MERGED if MERGED[genre] == name)
            for name in CLASSES
        }


def test_step04_sound_data_have_no_problem(runs):
    folder, metrics = runs["step04_dataset"]
    assert metrics["problems"] == [] and "\n0 problems in" in (folder / "summary.md").read_text()
    for counts in metrics["audit"]["folders"].values():
        assert not any(value for key, value in counts.items() if key not in ("clips", "steps"))


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """A data set with one fault of every kind, and what step 4 says of it."""
    root = write_data_set(
        tmp_path_factory.mktemp("faulty"), per_class=(5, 2), n_emotion=(8, 3), n_frames=40
    )
    genre, beat, emotion = (
        root / "fma_genre_spectrograms",
        root / "fma_genre_spectrograms_beat",
        root / "multitask_dataset",
    )
    train, test = sorted((genre / "train").glob("*.npy")), sorted((genre / "test").glob("*.npy"))
    planted = {}

    def plant(kind, path, array=None):
        planted[kind] = (f"{path.parents[1].name}/{path.parent.name}", path.name.split(".")[0])
        if array is not None:
            np.save(path, array)

    array = np.load(train[0])
    plant("not finite", train[1], np.where(np.arange(array.shape[1]) == 3, np.nan, array))
    plant("wrong shape or type", train[11], array.T)
    plant(
        "out of range", train[21], array - np.vstack([np.full((128, 1), 60.0), np.zeros((12, 1))])
    )
    plant("constant", train[31], np.tile(array[:, :1], array.shape[1]))
    np.save(
        train[33], np.vstack([np.full((128, 40), -80.0), array[128:, :40]])
    )  # silence, the other constant
    plant("unreadable", train[41])
    train[41].write_bytes(train[41].read_bytes()[:-500])
    plant("missing", train[51])
    train[51].unlink()
    plant("duplicate", train[61])
    shutil.copy(train[62], train[61])
    plant("no label", genre / "test" / "999999.fused.full.npy", array)
    # A test clip under another id among the training clips, and a genre test clip, by
    # array and by id, among the multitask training clips.
    plant("same array", test[0])
    shutil.copy(test[0], train[71])
    shutil.copy(test[5], min((emotion / "train").glob("*.npy")))
    labels = beat.parent / "multitask_dataset_beat" / "train_labels.txt"
    labels.write_text(labels.read_text() + f"{test[9].name.split('.')[0]},0.5,0.5,0.5\n")
    np.save(labels.parent / "train" / test[9].name, np.load(beat / "test" / test[9].name) * 0.9)
    run_script("step04_dataset.py", "--data-dir", root, "--out-dir", root / "out")
    return (
        planted,
        read_metrics(root / "out" / "step04_dataset"),
        {"array": test[5].name.split(".")[0], "id": test[9].name.split(".")[0]},
    )


@pytest.mark.parametrize(
    "kind",
    [
        "not finite",
        "wrong shape or type",
        "out of range",
        "constant",
        "unreadable",
        "missing",
        "duplicate",
        "no label",
    ],
)
def test_audit_finds_each_planted_fault_once(audit, kind):
    planted, metrics, _ = audit
    where, clip_id = planted[kind]
    found = [row for row in metrics["problems"] if row["problem"] == kind]
    n = 2 if kind == "constant" else 1
    assert len(found) == 1 and found[0]["where"] == where and found[0]["count"] == n
    assert clip_id in found[0]["examples"]
    if kind != "no label":
        assert metrics["audit"]["folders"][where][kind] == n


def test_audit_finds_leaks_between_sets(audit):
    planted, metrics, ids = audit
    leaks = metrics["audit"]["leaks"]
    none = {"same id": 0, "same array": 0}
    assert leaks == {
        "fma_genre_spectrograms/train, fma_genre_spectrograms/test": none | {"same array": 1},
        "fma_genre_spectrograms_beat/train, fma_genre_spectrograms_beat/test": none,
        "multitask_dataset/train, multitask_dataset/test": none,
        "multitask_dataset_beat/train, multitask_dataset_beat/test": none,
        "multitask_dataset/train, fma_genre_spectrograms/test": none | {"same array": 1},
        "multitask_dataset_beat/train, fma_genre_spectrograms_beat/test": none | {"same id": 1},
        "fma_genre_spectrograms/train, multitask_dataset/train": none,
        "fma_genre_spectrograms_beat/train, multitask_dataset_beat/train": none,
        "fma_genre_spectrograms/train, fma_genre_spectrograms_beat/test": none,
        "fma_genre_spectrograms_beat/train, fma_genre_spectrograms/test": none,
    }
    examples = {
        (row["where"].split("/")[0], row["problem"]): row["examples"] for row in metrics["problems"]
    }
    assert planted["same array"][1] in examples["fma_genre_spectrograms", "same array"]
    assert (
        ids["array"] in examples["multitask_dataset", "same array"]
        and ids["id"] in examples["multitask_dataset_beat", "same id"]
    )


def test_audit_goes_on_to_the_end_and_counts_every_array(audit):
    _, metrics, _ = audit
    folders = metrics["audit"]["folders"]
    assert {name: row["clips"] for name, row in folders.items()} == {
        "fma_genre_spectrograms/train": 100, "fma_genre_spectrograms/test": 40,
        "fma_genre_spectrograms_beat/train": 100, "fma_genre_spectrograms_beat/test": 40,
        "multitask_dataset/train": 8, "multitask_dataset/test": 3,
        "multitask_dataset_beat/train": 9, "multitask_dataset_beat/test": 3,
    }  # fmt: skip


def test_step04_keeps_classes_of_ones_own(tmp_path):
    root = write_data_set(tmp_path / "data", per_class=(4, 1), n_emotion=(4, 2), n_frames=30)
    for folder in ("fma_genre_spectrograms", "fma_genre_spectrograms_beat"):
        for split in ("train", "test"):
            path = root / folder / f"{split}_labels.txt"
            path.write_text(path.read_text().replace("\tBlues", "\tRebetiko"))
    flags = ["--smoke", "--data-dir", root, "--out-dir", tmp_path / "out"]
    assert_clean_error(
        run_script("step04_dataset.py", *flags, check=False), "Rebetiko", "--no-merge"
    )
    run_script("step04_dataset.py", *flags, "--no-merge")
    classes = read_metrics(tmp_path / "out" / "step04_dataset")["classes"]
    assert classes["before"] == classes["after"] and classes["after"]["train"]["Rebetiko"] == 4


def test_while_a_thread_has_no_core_no_time_is_measured():
    """Beside other programs, as in lab.py, the clock on the wall would measure those."""
    clock = patrec.machine.clock_of("cpu")
    began = clock()
    time.sleep(0.3)
    slept = clock() - began
    while clock() - began < 0.05:
        pass
    assert slept < 0.03
    assert patrec.machine.clock_of("cuda") is time.perf_counter
