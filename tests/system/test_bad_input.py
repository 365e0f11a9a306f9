"""Bad input through the command line: one line that names the file, the fault and the cure.

What each fault is called is told by the tests of the modules; here it ends a whole step.
"""

import shutil

import numpy as np
import pytest
import torch
from conftest import (
    assert_clean_error,
    error_line,
    labels_of,
    read_metrics,
    run_inside,
    run_script,
    write_data_set,
)

import common
from patrec.flags import Source, TrainingOptions

pytestmark = pytest.mark.slow

BEAT, EMOTION = "fma_genre_spectrograms_beat", "multitask_dataset"
FEW = ("--smoke", "--epochs", 1)
TINY = ("step05_lstm", *FEW, "--features", "beat_mel")  # one LSTM with all that a full run does


@pytest.fixture(scope="module")
def sound_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound") / "data"
    return write_data_set(root, per_class=(3, 1), n_emotion=(24, 2), n_frames=40)


@pytest.fixture
def data(sound_data, tmp_path):
    """A data set that a test may spoil."""
    return shutil.copytree(sound_data, tmp_path / "data")


@pytest.fixture
def refused(tmp_path, capsys):
    """Run what must be refused: exit code 2, one line with all `words`, nothing half-written."""

    def call(step, *flags, words):
        where = ("--device", "cpu", "--out-dir", tmp_path / "out")
        error = error_line(capsys, f"{step}.py", *flags, *where)
        for word in words:
            assert str(word) in error, (word, error)
        assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("metrics.json"))

    return call


def clip_file(data, split):
    """A file of the beat-synchronised clips that the merge keeps: the label file's fourth."""
    clip_id = list(labels_of(data, split=split, beat=True))[3]
    return data / BEAT / split / f"{clip_id}.fused.full.npy"


def append(path, row):
    path.write_text(path.read_text() + row + "\n")


FAULTS = {
    "genre labels": (TINY, lambda d: append(d / BEAT / "train_labels.txt", "1\tRock\tPop"),
                     [f"{BEAT}/train_labels.txt", "line 62, saw 3", "mend"]),
    "emotion labels": (("step08_regression", *FEW),
                       lambda d: append(d / EMOTION / "train_labels.txt", "7,0.1,55,0.3"),
                       [f"{EMOTION}/train_labels.txt, line 26", "no number in [0, 1]"]),
    "one form missing": (TINY, lambda d: shutil.rmtree(d / BEAT), [BEAT, "no such", "--data-dir"]),
    "a very long id": (TINY, lambda d: append(d / BEAT / "train_labels.txt", "9" * 5000 + "\tRock"),
                       [f"{BEAT}/train", "not a readable", "--skip-bad"]),
    "a test clip": (TINY, lambda d: np.save(clip_file(d, "test"), np.full((140, 9), np.nan)),
                    [f"{BEAT}/test", "NaN", "--skip-bad"]),  # found after training
    "a leak": (TINY, lambda d: shutil.copy(clip_file(d, "train"), clip_file(d, "test")),
               [f"{BEAT}/test", "1 test clips", "--allow-leak"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_data(refused, data, fault):
    command, spoil, words = FAULTS[fault]
    spoil(data)
    refused(*command, "--data-dir", data, words=words)


def test_the_same_from_the_shell(data, tmp_path):
    """In a process of its own, stderr as a user sees it, warnings of libraries included."""
    path = clip_file(data, "train")
    array = np.load(path)
    array[5, 3] = 1e300
    np.save(path, array)
    flags = (*TINY[1:], "--data-dir", data, "--out-dir", tmp_path / "out")
    result = run_script("step05_lstm.py", *flags, check=False)
    assert_clean_error(result, str(path), "infinite", "--skip-bad")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tmp", ".json")]


def test_flags_let_through_what_they_name(data, tmp_path, capsys):
    """--allow-leak a leaked clip, --skip-bad a broken one; and clips of one frame are legal."""
    for split in ("train", "test"):
        for path in sorted((data / BEAT / split).glob("*.npy"))[::2]:
            np.save(path, np.load(path)[:, :1])
    shutil.copy(clip_file(data, "train"), clip_file(data, "test"))
    broken = data / BEAT / "train" / f"{list(labels_of(data, beat=True))[5]}.fused.full.npy"
    broken.write_bytes(b"")
    command = ["--data-dir", data, "--out-dir", tmp_path / "out", "--allow-leak", "--skip-bad"]
    assert run_inside("step05_lstm.py", *TINY[1:], *command) == 0
    assert f"left out: {broken}" in capsys.readouterr().err
    scores = read_metrics(tmp_path / "out" / "step05_lstm")["runs"]["beat_mel"]
    assert scores["n_train"] + scores["n_val"] == 44 and scores["test"]["n_clips"] == 15


@pytest.mark.parametrize("name", ["beat_mel", "mel", "cnn_mel"])
def test_batches_of_every_size_are_trained_on(sound_data, tmp_path, monkeypatch, name):
    """A last batch of one clip, and fewer clips than a batch."""
    sizes, fetch = [], common.SpectrogramDataset.__getitems__

    def count(self, indices):
        sizes.append(len(indices))
        return fetch(self, indices)

    monkeypatch.setattr(common.SpectrogramDataset, "__getitems__", count)
    for batch_size, expected in ((10, [10, 1]), (1000, [11])):
        sizes.clear()
        source, out = Source(sound_data, subset=11), tmp_path / f"out{batch_size}"
        options = TrainingOptions(source, out, out / "made", epochs=1, batch_size=batch_size)
        runs = common.train_all(options, [common.genre_experiment(name)])
        assert sizes[: len(expected)] == expected
        assert np.isfinite(runs[name].history["train_loss"][0])


@pytest.fixture(scope="module")
def trained(sound_data, tmp_path_factory):
    """Outputs of an LSTM after one epoch."""
    out = tmp_path_factory.mktemp("trained")
    assert run_inside("step05_lstm.py", *TINY[1:], "--data-dir", sound_data, "--out-dir", out) == 0
    (out / "step05_lstm" / "metrics.json").unlink()
    return out


def test_checkpoint_with_another_number_of_classes(refused, trained, sound_data, tmp_path):
    path = shutil.copytree(trained, tmp_path / "out") / "step05_lstm" / "beat_mel" / "best.pt"
    content = torch.load(path, weights_only=True)
    content["spec"]["head_args"]["n_classes"] = 4
    torch.save(content, path)
    words = [path, "do not fit", "train again"]
    refused("step06_eval", "--smoke", "--data-dir", sound_data, words=words)


@pytest.mark.parametrize("other", ["seed", "clips"])
def test_resume_of_another_run(refused, trained, data, tmp_path, other):
    """With another seed or other clips, what was trained on would now validate: a leak."""
    path = shutil.copytree(trained, tmp_path / "out") / "step05_lstm" / "beat_mel" / "last.pt"
    words = {"seed": "--seed", "clips": "other clips"}[other]
    if other == "clips":
        for file in (data / BEAT / "train").glob("*.npy"):
            np.save(file, np.load(file) * 0.99)
    flags = ["--resume", "--data-dir", data, "--seed", 43 if other == "seed" else 42]
    refused(*TINY, *flags, words=[path, words, "leave out --resume"])


@pytest.mark.parametrize("flags", [
    ("--epochs", "many"), ("--lr", "nan"), ("--batch-size", 1), ("--seed", -1),
    ("--max-minutes", 0), ("--device", "tpu"), ("--features", "smell"), ("--smoke=1",),
])  # fmt: skip
def test_flags_out_of_range(refused, sound_data, tmp_path, flags):
    words = ["error:", flags[0].split("=")[0], *flags[1:], "--help"]
    refused("step05_lstm", *flags, "--data-dir", sound_data, words=words)
    assert not (tmp_path / "out").exists()


def test_mistyped_flags_of_tools(capsys):
    error = error_line(capsys, "tools/kaggle.py", "--stp", "5")
    assert "--stp" in error and "--help" in error
