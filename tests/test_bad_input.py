"""Bad input through the command line: one line that names the file, the fault and the cure.

Most cases run a step in this process, as `python step...py` does but without five seconds of
imports each; a few at the end run the real command.
"""

import errno
import io
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    assert_clean_error,
    fake_clip,
    labels_of,
    patch_everywhere,
    read_metrics,
    run_inside,
    run_script,
    write_data_set,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import patrec.batches
import patrec.clips
import patrec.errors
import patrec.files
import patrec.labels
import patrec.recipes
import patrec.step

GENRE, BEAT, EMOTION, EMOTION_BEAT = (
    "fma_genre_spectrograms",
    "fma_genre_spectrograms_beat",
    "multitask_dataset",
    "multitask_dataset_beat",
)
FEW = ("--smoke", "--epochs", 1)
TINY = (*FEW, "--features", "beat_mel")  # one LSTM, one epoch, with all that a full run does


@pytest.fixture(scope="module")
def sound_data(tmp_path_factory):
    return write_data_set(
        tmp_path_factory.mktemp("sound") / "data", per_class=(3, 1), n_emotion=(24, 2), n_frames=40
    )


@pytest.fixture
def data(sound_data, tmp_path):
    """A data set that a test may spoil."""
    return shutil.copytree(sound_data, tmp_path / "data")


@pytest.fixture
def run(tmp_path, capsys):
    """Run a step in this process; returns its metrics, or for a refusal its one line on stderr."""

    def call(step, *flags, out=tmp_path / "out"):
        capsys.readouterr()
        if code := run_inside(f"{step}.py", *flags, "--device", "cpu", "--out-dir", out):
            raise SystemExit(code)
        return read_metrics(Path(out) / step)

    return call


@pytest.fixture
def refused(run, tmp_path, capsys):
    """Run what must be refused: exit code 2, one line with all `words`, nothing half-written."""

    def call(step, *flags, words, out=tmp_path / "out"):
        with pytest.raises(SystemExit) as stop:
            run(step, *flags, out=out)
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert len(error.splitlines()) == 1 and "Traceback" not in error, error
        for word in words:
            assert str(word) in error, (word, error)
        assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("metrics.json"))
        return error

    return call


def clip_file(data, split):
    """A file of the beat-synchronised clips that the merge keeps: the label file's fourth."""
    return (
        data / BEAT / split / f"{list(labels_of(data, split=split, beat=True))[3]}.fused.full.npy"
    )


def numbers(metrics):
    """The runs of metrics.json without what takes its own time."""
    return {
        name: {key: value for key, value in run.items() if key != "train_seconds"}
        for name, run in metrics["runs"].items()
    }


# --- the data folder --------------------------------------------------------------------


def test_data_folder_that_is_none(refused, data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    # data/song, mistyped for data/songs, must not fall back on what its parent folder holds.
    for place in (
        tmp_path / "nowhere",
        tmp_path / "empty",
        tmp_path / "file",
        data / "song",
        data / GENRE / "train",
    ):
        refused(
            "step05_lstm",
            *TINY,
            "--data-dir",
            place,
            words=[place, "no fma_genre_spectrograms", "--data-dir"],
        )
    (data / "songs").mkdir()
    refused("step05_lstm", *TINY, "--data-dir", data / "songs", words=[data / "songs"])
    assert not (tmp_path / "out").exists()


def test_data_folder_of_one_level_too_high_or_low_is_taken(data, monkeypatch):
    for place in (data, data.parent, data / GENRE, data / EMOTION_BEAT):
        assert patrec.files.find_data(place) == data.resolve()
    monkeypatch.chdir(data / GENRE)
    assert patrec.files.find_data(".") == data.resolve()


def test_data_folder_with_one_part_only(refused, data):
    shutil.rmtree(data / BEAT)
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        data,
        words=[data / BEAT, "no such folder", "--data-dir"],
    )


# --- label files ------------------------------------------------------------------------


def edit(path, change):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


GENRE_FAULTS = {
    "empty": (lambda rows: [], "empty"),
    "header only": (lambda rows: rows[:1], "no clips"),
    "no header": (lambda rows: rows[1:], "header"),
    "commas": (lambda rows: [row.replace("\t", ",") for row in rows], "tab"),
    "semicolons": (lambda rows: [row.replace("\t", ";") for row in rows], "header"),
    "missing column": (lambda rows: [*rows[:5], rows[5].split("\t")[0], *rows[6:]], "line 6"),
    "extra column": (lambda rows: [*rows[:5], rows[5] + "\tmore", *rows[6:]], "line 6"),
    "empty cell": (lambda rows: [*rows[:5], "\t" + rows[5].split("\t")[1], *rows[6:]], "line 6"),
    "two labels under two names": (
        lambda rows: [*rows, rows[5].split(".")[0] + ".full.fused.npy.gz\tPolka"],
        "was labelled",
    ),
    "two labels": (lambda rows: [*rows, rows[5].split("\t")[0] + "\tPolka"], "labelled"),
    "foreign class": (
        lambda rows: [row.replace("Blues", "Polka") for row in rows],
        "'Polka' is not one of the lab's 20; --no-merge",
    ),
    "id with ..": (lambda rows: [*rows, "../../secret.npy\tRock"], "no clip id"),
    "id of dots": (lambda rows: [*rows, "..\tRock"], "no clip id"),
    "id with a Windows path": (lambda rows: [*rows, "..\\secret\tRock"], "no clip id"),
    "absolute id": (lambda rows: [*rows, "/etc/secret.npy\tRock"], "no clip id"),
    "id with a drive": (lambda rows: [*rows, "C:secret\tRock"], "no clip id"),
    "id with NUL": (lambda rows: [*rows, "1\0.npy\tRock"], "no clip id"),
    "very long id": (lambda rows: [*rows, "9" * 5000 + "\tRock"], "not a readable"),
    "a class of one clip": (
        lambda rows: [
            *(row for row in rows if "Jazz" not in row),
            next(row for row in rows if "Jazz" in row),
        ],
        "class Jazz has a single clip",
    ),
    "two clips in all": (
        lambda rows: rows[:1] + [row for row in rows if "Jazz" in row][:1],
        "Jazz",
    ),
    "dropped classes only": (
        lambda rows: rows[:1] + [row for row in rows if "Old-Time" in row],
        "--no-merge",
    ),
    "other part": (
        lambda rows: ["Id,valence,energy,danceability", "1001,0.1,0.2,0.3"],
        "expected genre labels",
    ),
}


@pytest.mark.parametrize("fault", GENRE_FAULTS)
def test_genre_label_file(refused, data, fault):
    change, words = GENRE_FAULTS[fault]
    path = data / BEAT / "train_labels.txt"
    edit(path, change)
    error = refused("step05_lstm", *TINY, "--data-dir", data, words=[words])
    assert str(path) in error or (fault == "very long id" and str(data / BEAT / "train") in error)


def test_label_file_that_cannot_be_read(refused, data):
    path = data / BEAT / "train_labels.txt"
    path.write_bytes("Id\tGenre\n1001.x\tTraditionnel français\n".encode("latin-1"))
    refused("step05_lstm", *TINY, "--data-dir", data, words=[path, "UTF-8 text at byte"])
    path.write_bytes("Id\tGenre\n".encode("utf-16"))
    refused("step05_lstm", *TINY, "--data-dir", data, words=[path, "UTF-8"])
    path.unlink()
    refused("step05_lstm", *TINY, "--data-dir", data, words=[path, "missing", "complete"])
    path.mkdir()
    refused("step05_lstm", *TINY, "--data-dir", data, words=[path, "cannot be read", "complete"])


EMOTION_FAULTS = {
    "not a number": (lambda rows: [*rows[:3], "7,0.1,high,0.3"], "line 4"),
    "above 1": (lambda rows: [*rows[:3], "7,0.1,55,0.3"], "outside [0, 1]"),
    "below 0": (lambda rows: [*rows[:3], "7,0.1,-0.5,0.3"], "outside [0, 1]"),
    "nan": (lambda rows: [*rows[:3], "7,0.1,nan,0.3"], "outside [0, 1]"),
    "infinite": (lambda rows: [*rows[:3], "7,0.1,inf,0.3"], "outside [0, 1]"),
    "tabs": (lambda rows: [row.replace(",", "\t") for row in rows], "header"),
    "column missing": (lambda rows: [row.rsplit(",", 1)[0] for row in rows], "header"),
    "decimal commas": (lambda rows: [*rows[:3], "7,0,1,0,2,0,3"], "line 4"),
    "two labels": (lambda rows: [*rows, rows[1].split(",")[0] + ",0.9,0.9,0.9"], "labelled"),
    "id with ..": (lambda rows: [*rows, "../7,0.1,0.2,0.3"], "no clip id"),
    "too few clips": (lambda rows: rows[:6], "at least 20"),
}


@pytest.mark.parametrize("fault", EMOTION_FAULTS)
def test_emotion_label_file(refused, data, fault):
    change, words = EMOTION_FAULTS[fault]
    path = data / EMOTION / "train_labels.txt"
    edit(path, change)
    refused(
        "step08_regression",
        *FEW,
        "--data-dir",
        data,
        words=[words, EMOTION if fault == "too few clips" else path],
    )


def test_test_labels_of_a_class_that_was_not_trained(refused, data):
    path = data / BEAT / "test_labels.txt"
    edit(path, lambda rows: [row.replace("Jazz", "Polka") for row in rows])
    refused(
        "step05_lstm",
        *TINY,
        "--no-merge",
        "--data-dir",
        data,
        words=[path, "'Polka' does not occur in the training part", "remove"],
    )


def test_bom_crlf_and_blank_lines_change_nothing(run, data, sound_data, tmp_path):
    for split in ("train", "test"):
        path = data / BEAT / f"{split}_labels.txt"
        path.write_bytes(
            b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n  \r\n\n"
        )
    odd, plain = (
        run("step05_lstm", *TINY, "--data-dir", root, out=tmp_path / name)
        for name, root in (("odd", data), ("plain", sound_data))
    )
    assert numbers(odd) == numbers(plain)


TEXT = st.text(st.characters(codec="utf-8"), max_size=200)
PIECES = [
    "Id\tGenre",
    "Id,valence,energy,danceability",
    "1.a\tRock",
    "1\tJazz",
    "../1\tRock",
    "2,0.1,0.2,0.3",
    "2,.1,.2,.4",
    "",
    "\x0b",
    "a\x85b\tc",
]
LINES = st.lists(st.sampled_from(PIECES) | TEXT)


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(text=LINES.map("\n".join) | TEXT.map("Id\tGenre\n{}".format) | st.binary(max_size=200))
def test_any_label_file_is_read_or_refused_in_one_line(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    path = folder / "train_labels.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        labels = patrec.labels.read_labels(path)
    except patrec.errors.InputError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        return
    assert labels and len({clip_id for clip_id, _ in labels}) == len(labels)
    for clip_id, _ in labels:
        array = (folder / "train" / f"{clip_id}.fused.full.npy").resolve()
        assert array.parent == folder.resolve() / "train", "an id leaves the folder of its split"


IDS = st.lists(
    st.text("0123456789abcXYZ_- ", min_size=1, max_size=12).filter(str.strip).map(str.strip),
    unique=True,
    min_size=1,
    max_size=8,
)


@settings(derandomize=True, max_examples=50, deadline=None, database=None)
@given(
    ids=IDS,
    columns=st.permutations(patrec.labels.EMOTIONS),
    genre=st.booleans(),
    bom=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    draw=st.data(),
)
def test_valid_labels_come_back_whatever_their_form(
    tmp_path_factory, ids, columns, genre, bom, end, draw
):
    path = tmp_path_factory.getbasetemp() / "valid_labels.txt"
    if genre:
        labels = [(i, draw.draw(st.sampled_from(list(patrec.labels.MERGE)))) for i in ids]
        rows = ["Id\tGenre"] + [f"{i}.fused.full.npy.gz\t{label}" for i, label in labels]
    else:
        labels = [(i, tuple(draw.draw(st.floats(0, 1)) for _ in columns)) for i in ids]
        rows = [",".join(["Id", *columns])] + [
            ",".join([i, *(repr(label[patrec.labels.EMOTIONS.index(c)]) for c in columns)])
            for i, label in labels
        ]
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + (end.join(rows) + end).encode())
    assert patrec.labels.read_labels(path) == labels


# --- arrays -----------------------------------------------------------------------------


class Payload:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_header(shape):
    """A file that says it holds an array of this shape, and holds a few numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f8", "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + bytes(64)


def zipped(array):
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


CLIP = fake_clip(np.random.default_rng(0), 0.5, 20)


def spoiled(value, row=5):
    array = CLIP.copy()
    array[row, 3] = value
    return array


ARRAY_FAULTS = {
    "missing": (None, "missing"),
    "empty": (b"", "not a readable .npy"),
    "truncated": (npy(CLIP)[:-1000], "not a readable .npy"),
    "cut in the header": (npy(CLIP)[:50], "not a readable .npy"),
    "a version yet unknown": (npy(CLIP)[:6] + b"\7" + npy(CLIP)[7:], "not (7, 0)"),
    "text": (b"<html>404</html>\n" * 9, "not a readable .npy"),
    "an archive": (zipped(CLIP), "not a readable .npy"),
    "half an archive": (zipped(CLIP)[:500], "not a readable .npy"),
    "a header of 9 TB": (with_header((140, 2**33)), "not a readable .npy"),
    "a negative shape": (with_header((140, -5)), "not a readable .npy"),
    "wrong shape": (npy(CLIP[:128]), "shape (128, 20), expected (140, T)"),
    "three dimensions": (npy(CLIP[None]), "shape (1, 140, 20)"),
    "a number": (npy(np.float64(3)), "shape ()"),
    "transposed": (npy(CLIP.T.copy()), "transposed"),
    "integers": (npy(CLIP.astype(int)), "type int64"),
    "complex": (npy(CLIP.astype(complex)), "type complex128"),
    "words": (npy(CLIP.astype(str)), "numbers of type"),
    "NaN": (npy(spoiled(np.nan)), "NaN"),
    "NaN in the chroma": (npy(spoiled(np.nan, row=135)), "NaN"),
    "infinite": (npy(spoiled(-np.inf)), "infinite"),
    "too large for 32 bits": (npy(spoiled(1e300)), "infinite"),
    "power and not dB": (npy(spoiled(12.0)), "expected dB"),
    "chroma of 3": (npy(spoiled(3.0, row=130)), "chroma"),
    "constant": (npy(np.full((140, 20), -80.0)), "silence"),
    "no frames": (npy(CLIP[:, :0]), "no frames"),
}


@pytest.mark.parametrize("fault", ARRAY_FAULTS)
@pytest.mark.filterwarnings("error")
def test_array(refused, data, fault):
    content, words = ARRAY_FAULTS[fault]
    path = clip_file(data, "train")
    path.unlink() if content is None else path.write_bytes(content)
    refused("step05_lstm", *TINY, "--data-dir", data, words=[path, words, "--skip-bad"])
    if content is not None and fault not in ("missing", "truncated"):
        with pytest.raises(patrec.errors.InputError, match=str(path)):
            patrec.clips.read_array(path)


@pytest.mark.parametrize(
    "fault", ["an archive", "half an archive", "a header of 9 TB", "empty", "a number"]
)
def test_headers_read_alone_in_step_2(refused, data, fault):
    """Step 2 takes the lengths from the headers, of clips also that it has not drawn."""
    path = data / GENRE / "train" / clip_file(data, "train").name
    path.write_bytes(ARRAY_FAULTS[fault][0])
    refused("step02_beat_sync", "--smoke", "--data-dir", data, words=[path, "--skip-bad"])


def test_a_pickle_among_the_arrays_is_never_read(refused, data, tmp_path):
    path = clip_file(data, "train")
    proof = tmp_path / "the code was run"
    holder = np.empty((140, 20), dtype=object)
    holder[:] = Payload(proof)
    for content in (npy(holder, allow_pickle=True), pickle.dumps(Payload(proof))):
        path.write_bytes(content)
        refused("step05_lstm", *TINY, "--data-dir", data, words=[path, "not a readable .npy"])
        assert not proof.exists()
    np.load(path, allow_pickle=True)
    assert proof.exists(), "the payload works, so the test above tells something"


def test_bad_array_of_the_test_split(refused, data):
    """Found only when the test split is opened, after training: one line, no metrics.json."""
    path = clip_file(data, "test")
    np.save(path, np.full((140, 9), np.nan))
    refused("step05_lstm", *TINY, "--data-dir", data, words=[path, "NaN", "--skip-bad"])


def test_every_clip_bad(refused, data):
    for path in (data / BEAT / "train").glob("*.npy"):
        path.write_bytes(b"")
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        data,
        words=[data / BEAT / "train", "not a readable", "44 more bad files", "--skip-bad"],
    )


def test_clips_of_one_frame_are_legal(run, data, tmp_path):
    for folder in (BEAT, GENRE):
        for path in (
            sorted((data / folder / "train").glob("*.npy"))[::2]
            + sorted((data / folder / "test").glob("*.npy"))[::2]
        ):
            np.save(path, np.load(path)[:, :1])
    metrics = run("step05_lstm", *TINY, "fused", "--data-dir", data)
    assert len(metrics["runs"]) == 2
    for scores in metrics["runs"].values():
        assert scores["n_train"] + scores["n_val"] == 45 and scores["test"]["n_clips"] == 15


@pytest.fixture
def make_step(data, monkeypatch):
    """A Step of the spoilable data set, made with some flags."""

    def make(*flags):
        command = [
            "made.py",
            *flags,
            "--data-dir",
            data,
            "--out-dir",
            data / "out",
            "--device",
            "cpu",
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        return patrec.step.Step("made", "", training=True)

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back after the test
    return make


@pytest.mark.parametrize("name", ["beat_mel", "mel", "cnn_mel"])
def test_batches_of_every_size_are_trained_on(make_step, monkeypatch, name):
    """A last batch of one clip, and fewer clips than a batch."""
    sizes = []
    fetch = common.SpectrogramDataset.__getitems__

    def count(self, indices):
        sizes.append(len(indices))
        return fetch(self, indices)

    monkeypatch.setattr(common.SpectrogramDataset, "__getitems__", count)
    for batch_size in (10, 1000):
        sizes.clear()
        made = make_step("--epochs", 1, "--batch-size", batch_size, "--subset", 11)
        run = common.train_all(made.training, [common.genre_experiment(name)])[name]
        assert sizes[: 2 if batch_size == 10 else 1] == ([10, 1] if batch_size == 10 else [11])
        assert np.isfinite(run.history["train_loss"][0])


@pytest.mark.parametrize("target", ["emotion", "energy"])
def test_emotion_batch_of_one(make_step, target):
    step = make_step("--epochs", 1, "--batch-size", 8, "--subset", 9)
    run = common.Experiment(
        "cnn",
        patrec.recipes.GENRE_NETWORKS["cnn_mel"],
        lambda _, data: common.Regressor(common.CNNBackbone(), data.names, data.mean, data.std),
        lambda data: common.RegressionLoss(data.std, learned=target == "emotion"),
        torch.optim.AdamW,
        target=target,
    )
    run = common.train_all(step.training, [run])["cnn"]
    assert run.facts["n_train"] == 9 and run.answers.shape[1] == (3 if target == "emotion" else 1)
    assert np.isfinite(run.history["train_loss"][0]) and np.isfinite(run.answers).all(axis=None)


# --- output folder ----------------------------------------------------------------------


def test_output_folder_that_cannot_be_made(refused, sound_data, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused("step05_lstm", *TINY, "--data-dir", sound_data, out=out, words=[out, "--out-dir"])
    (tmp_path / "out" / "step05_lstm").mkdir(parents=True)
    (tmp_path / "out" / "step05_lstm" / "beat_mel").write_text("a file where the run's folder goes")
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        sound_data,
        words=[tmp_path / "out" / "step05_lstm" / "beat_mel", "--out-dir"],
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="no /proc, where nobody can make a folder"
)
def test_output_folder_where_nobody_may_write(refused, sound_data):
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        sound_data,
        out="/proc/outputs",
        words=["/proc/outputs", "--out-dir"],
    )


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_output_folder_without_permission(refused, sound_data, tmp_path):
    (tmp_path / "out" / "step05_lstm").mkdir(parents=True)
    (tmp_path / "out" / "step05_lstm").chmod(0o500)
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        sound_data,
        words=["step05_lstm", "Permission denied", "--out-dir"],
    )


@pytest.mark.parametrize(
    "name", ["best.pt", "last.pt", "history.csv", "learning_curves.png", "summary.md"]
)
def test_full_disk(refused, sound_data, monkeypatch, tmp_path, name):
    """The disk is full when this file is half written; what was written before it is whole."""

    class Full(io.FileIO):
        def write(self, content):
            super().write(bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    really = open

    def open_on_full_disk(path, mode="r", **options):
        return (
            Full(path, "w")
            if f".{name}." in str(path) and mode == "wb"
            else really(path, mode, **options)
        )

    patch_everywhere(monkeypatch, "open", open_on_full_disk, raising=False)
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        sound_data,
        words=[name, "No space left on device", "--out-dir"],
    )
    for path in (tmp_path / "out").rglob("*.pt"):
        torch.load(path, weights_only=True)
    assert not list((tmp_path / "out").rglob(name))


def test_full_cache_folder(refused, data, monkeypatch, tmp_path):
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        common.json,
        "dumps",
        lambda *args, **options: (_ for _ in ()).throw(
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ),
    )
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        data,
        words=[tmp_path / "cache", "No space left", "$PATREC_CACHE"],
    )
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "file" / "below"))
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        data,
        words=[tmp_path / "file" / "below", "$PATREC_CACHE"],
    )


# --- checkpoints ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(sound_data, tmp_path_factory):
    """Outputs of two LSTMs after one epoch."""
    out = tmp_path_factory.mktemp("trained")
    flags = ("--features", "mel", "beat_mel", "--device", "cpu")
    assert (
        run_inside("step05_lstm.py", *FEW, *flags, "--data-dir", sound_data, "--out-dir", out) == 0
    )
    for path in out.rglob("metrics.json"):
        path.unlink()
    return out


def other_weights(path):
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["state"] if "blocks" in name)
    content["state"][name] = content["state"][name][:9]
    torch.save(content, path)


def other_number_of_classes(path):
    content = torch.load(path, weights_only=True)
    content["spec"]["head_args"]["n_classes"] = 4
    torch.save(content, path)


CHECKPOINT_FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), "no readable checkpoint"),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        "no readable checkpoint",
    ),
    "text": (lambda path: path.write_text("hello"), "no readable checkpoint"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "no readable checkpoint"),
    "other weights": (other_weights, "do not fit"),
    "other number of classes": (other_number_of_classes, "do not fit"),
    "a list": (lambda path: torch.save([1, 2], path), "no checkpoint of this project"),
    "another run's": (
        lambda path: shutil.copy(path.parents[1] / "beat_mel" / "best.pt", path),
        "run beat_mel, not of mel",
    ),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_checkpoint(refused, trained, sound_data, tmp_path, fault):
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "step05_lstm" / "mel" / "best.pt"
    spoil, words = CHECKPOINT_FAULTS[fault]
    spoil(path)
    refused("step06_eval", "--smoke", "--data-dir", sound_data, words=[path, words, "train again"])


@pytest.mark.parametrize("form", ["inside", "bare"])
def test_code_in_a_checkpoint_is_never_run(refused, trained, sound_data, tmp_path, form):
    out = shutil.copytree(trained, tmp_path / "out")
    proof = tmp_path / "the code was run"
    runs = out / "step05_lstm"
    for path, step, flags in (
        (runs / "mel" / "best.pt", "step06_eval", ["--smoke"]),
        (runs / "beat_mel" / "last.pt", "step05_lstm", [*TINY, "--resume"]),
    ):
        (
            torch.save({"spec": Payload(proof)}, path)
            if form == "inside"
            else path.write_bytes(pickle.dumps(Payload(proof)))
        )
        refused(step, *flags, "--data-dir", sound_data, words=[path, "no readable checkpoint"])
        assert not proof.exists()
    torch.load(path, weights_only=False) if form == "inside" else pickle.loads(path.read_bytes())
    assert proof.exists(), "the payload works, so the test above tells something"


@pytest.mark.parametrize("other", ["seed", "clips", "state"])
def test_resume_of_another_run_is_refused(refused, trained, data, sound_data, tmp_path, other):
    """With another seed or other clips, what was trained on would now validate: a leak."""
    out = shutil.copytree(trained, tmp_path / "out")
    path = out / "step05_lstm" / "beat_mel" / "last.pt"
    flags = [*TINY, "--resume", "--data-dir", sound_data]
    if other == "seed":
        refused("step05_lstm", *flags, "--seed", 43, words=[path, "--seed", "leave out --resume"])
    elif other == "clips":
        for file in (data / BEAT / "train").glob("*.npy"):
            np.save(file, np.load(file) * 0.99)
        refused(
            "step05_lstm",
            *TINY,
            "--resume",
            "--data-dir",
            data,
            words=[path, "other clips", "leave out --resume"],
        )
    else:
        shutil.copy(path.with_name("best.pt"), path)
        refused("step05_lstm", *flags, words=[path, "not the state", "leave out --resume"])


# --- leaks and diverged losses ----------------------------------------------------------


@pytest.mark.parametrize("same", ["id", "array"])
def test_test_clips_in_the_training_split_are_refused(refused, run, data, tmp_path, same):
    train, test = clip_file(data, "train"), clip_file(data, "test")
    if same == "array":
        shutil.copy(train, test)
    else:
        shutil.copy(test, train.parent / test.name)
        edit(
            data / BEAT / "train_labels.txt",
            lambda rows: [*rows, f"{test.name.split('.')[0]}.x\tBlues"],
        )
        np.save(test, np.load(test)[:, ::-1])
    refused(
        "step05_lstm",
        *TINY,
        "--data-dir",
        data,
        words=[data / BEAT / "test", test.name.split(".")[0], "1 test clips", "--allow-leak"],
    )
    assert (
        run("step05_lstm", *TINY, "--allow-leak", "--data-dir", data)["runs"]["beat_mel"]["test"][
            "n_clips"
        ]
        == 15
    )


def test_a_loss_that_is_no_number_stops_with_exit_code_1(
    run, sound_data, tmp_path, monkeypatch, capsys
):
    """One line that names epoch, batch and rate; the best epoch before stays, no metrics.json."""
    calls = []
    augment = patrec.batches.Augment.__call__

    def spoil(self, x, targets):
        calls.append(len(x))
        return augment(self, x * np.nan if len(calls) == 5 else x, targets)

    monkeypatch.setattr(patrec.batches.Augment, "__call__", spoil)
    with pytest.raises(SystemExit) as stop:
        run(
            "step05_lstm",
            "--smoke",
            "--epochs",
            3,
            "--features",
            "beat_mel",
            "--batch-size",
            16,
            "--data-dir",
            sound_data,
        )
    error = capsys.readouterr().err
    assert (
        stop.value.code == 1
        and len(error.splitlines()) == 1
        and "epoch 2, batch 2, learning rate" in error
        and "--lr" in error
    ), (error, calls)
    folder = tmp_path / "out" / "step05_lstm"
    assert common.load_checkpoint(folder / "beat_mel" / "best.pt")["epoch"] == 1
    assert all(
        value.isfinite().all()
        for value in common.load_checkpoint(folder / "beat_mel" / "best.pt")["state"].values()
    )
    assert not (folder / "metrics.json").exists()


# --- flags ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [("--epochs", 0), ("--epochs", "many"), ("--epochs", 1.5), ("--subset", 1), ("--lr", -1),
     ("--lr", "nan"), ("--lr", 100), ("--batch-size", 1), ("--seed", -1), ("--max-minutes", 0),
     ("--device", "tpu"), ("--features", "smell"), ("--epoch", 3), ("--smoke=1",)],
)  # fmt: skip
def test_flags_out_of_range(refused, sound_data, tmp_path, flags):
    value = [flags[1]] if len(flags) > 1 else []
    refused(
        "step05_lstm",
        *flags,
        "--data-dir",
        sound_data,
        words=["error:", flags[0].split("=")[0], *value, "--help"],
    )
    assert not (tmp_path / "out").exists()


# --- from the shell ---------------------------------------------------------------------


def test_the_same_from_the_shell(data, tmp_path):
    """In processes of their own, stderr as a user sees it, warnings of libraries included."""
    path = clip_file(data, "train")
    path.write_bytes(npy(spoiled(1e300)))
    flags = (*TINY, "--data-dir", data, "--out-dir", tmp_path / "out")
    assert_clean_error(
        run_script("step05_lstm.py", *flags, check=False), str(path), "infinite", "--skip-bad"
    )
    edit(data / EMOTION / "train_labels.txt", EMOTION_FAULTS["above 1"][0])
    assert_clean_error(
        run_script("step10_multitask.py", *FEW, *flags[-4:], check=False),
        str(data / EMOTION / "train_labels.txt"),
        "outside",
    )
    assert not list((tmp_path / "out").rglob("*.tmp")) and not list(
        (tmp_path / "out").rglob("metrics.json")
    )


@pytest.mark.parametrize(
    "script, flags",
    [
        ("make_dataset.py", ["--adio-dir", "x"]),
        ("kaggle_kernel.py", ["--step", "5"]),
    ],
)
def test_mistyped_flags_are_named_in_one_line(script, flags):
    assert_clean_error(run_script(script, *flags, check=False), flags[-2], "--help")
