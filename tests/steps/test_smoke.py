"""Steps 5, 6, 8, 9 and 10 on a tiny data set: the files that each leaves, leaks that it refuses."""

import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import EMOTIONS, error_line, read_metrics, run_inside, write_data_set

import common
from patrec.flags import Source

LSTMS = ["mel", "beat_mel", "chroma", "beat_chroma", "fused", "beat_fused"]
SINGLE = [f"{kind}_{axis}" for axis in EMOTIONS for kind in ("lstm", "cnn")]
FLAGS = ("--smoke", "--epochs", 1, "--batch-size", 8, "--lr", 0.003)
# Step: flags, the lab's items, runs that are trained in its folder, other rows of metrics.json.
STEPS = {
    "step05_lstm": (("--features", "beat_mel"), "abc", ["beat_mel"], []),
    "step06_eval": ((), "abcd", [], [*LSTMS, "majority", "svm", "beat_svm"]),
    "step08_regression": ((), "abcde", SINGLE, ["lstm", "cnn", "constant", "ridge", "svr"]),
    "step09_transfer": (("--axis", "energy"), "abcde",
                        ["head_energy", "transfer_energy", "scratch_energy"], []),
    "step10_multitask": ((), "abcd", ["multitask", "multitask_from_genre", "multitask_lstm"],
                         ["multitask_average", "constant", "ridge", "svr"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return write_data_set(root, per_class=(3, 1), n_emotion=(30, 4), n_frames=40, n_beats=14)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder: what a step finds there it need not train."""
    return tmp_path_factory.mktemp("out")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_leaves_its_files(name, data_dir, out, monkeypatch):
    """Pictures, which take half of the time, are drawn in test_notebook."""
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, file, **options: None)
    own, items, trained, others = STEPS[name]
    flags = FLAGS[:1] if name == "step06_eval" else FLAGS
    assert run_inside(f"{name}.py", *flags, *own, "--data-dir", data_dir, "--out-dir", out) == 0
    folder, summary = out / name, (out / name / "summary.md").read_text()
    args, metrics = json.loads((folder / "args.json").read_text()), read_metrics(folder)
    assert args["smoke"] is True and args["seed"] == 42
    assert metrics["step"] == name and metrics["seconds"] > 0 and metrics["environment"]["torch"]
    figures = {path.name for path in folder.glob("*.png")}
    assert figures == set(re.findall(r"\]\(([^)]+\.png)\)", summary)) != set()
    results = re.sub(r"```python.*?```", "", summary, flags=re.DOTALL)
    assert "nan" not in re.findall(r"\w+", results.lower())
    letters = re.findall(rf"^## {int(name[4:6])}([a-e])", summary, re.MULTILINE)
    assert "".join(dict.fromkeys(letters)) == items, "a heading per item, in the lab's order"
    rows = set(metrics["runs"]) - {"scratch_full_energy"}  # where step 8 has not left it
    assert rows == {*trained, *others}
    columns = set(pd.read_csv(folder / "predictions.csv", nrows=1))
    assert {"clip", "model", "target", "truth", "prediction"} <= columns
    for run in trained:
        facts, history = metrics["runs"][run], pd.read_csv(folder / run / "history.csv")
        assert (folder / run / "best.pt").exists()
        assert facts["epochs"] == facts["planned_epochs"] == len(history) == 1
        assert facts["batch_size"] == 8 and facts["train_seconds"] > 0
        assert facts["lr"] == 0.003 and facts["val"] and facts["test"]


def leaky_data(root, same_id, **cut):
    """The tiny data set, with a held-out emotion clip put into the genre training split."""
    data = write_data_set(root / "data", per_class=(4, 1), n_frames=40)
    held_out = common.load_data(Source(data), target="emotion", **cut).held_out
    entry = held_out.dataset.store.entries[held_out.indices[0]]
    clip_id, genre = entry.clip_id if same_id else "999999", data / "fma_genre_spectrograms"
    array = np.load(entry.path)
    path = genre / "train" / f"{clip_id}.fused.full.npy"
    np.save(path, array[:, ::-1] if same_id else array)
    with open(genre / "train_labels.txt", "a") as file:
        file.write(f"{clip_id}.fused.full.npy.gz\tRock\n")
    return data, entry.clip_id


@pytest.mark.parametrize("name, same_id, flags, cut", [
    ("step09_transfer", True, (), {}),
    # By content, under another id, and held out in the second fold.
    ("step10_multitask", False, ("--folds", 2), {"fold": 1, "n_folds": 2}),
])  # fmt: skip
def test_held_out_clips_in_training_are_refused(tmp_path, capsys, name, same_id, flags, cut):
    data, clip_id = leaky_data(tmp_path, same_id, **cut)
    where = ("--data-dir", data, "--out-dir", tmp_path / "out")
    line = error_line(capsys, f"{name}.py", *FLAGS, *flags, *where)
    assert clip_id in line and "genre training split" in line and "--allow-leak" in line
    assert not (tmp_path / "out" / name / "metrics.json").exists()


@pytest.mark.slow
def test_a_leak_is_allowed_by_flag_and_said(tmp_path, capsys):
    data, clip_id = leaky_data(tmp_path, True)
    where = ("--data-dir", data, "--out-dir", tmp_path / "out")
    assert run_inside("step09_transfer.py", *FLAGS, "--allow-leak", *where) == 0
    assert clip_id in capsys.readouterr().err
    assert clip_id in (tmp_path / "out" / "step09_transfer" / "summary.md").read_text()
