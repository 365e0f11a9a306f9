"""Step 4: the classes before and after the merge, and what the audit finds."""

import shutil

import numpy as np
import pytest
from conftest import (
    CLASSES,
    COUNTS,
    GENRES,
    MERGED,
    assert_clean_error,
    read_metrics,
    read_table,
    run_forked,
    write_data_set,
)

STEP = "step04_dataset"
BY_ARRAY, BY_ID = {"same id": 0, "same array": 1}, {"same id": 1, "same array": 0}


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run_forked(f"{STEP}.py", "--smoke", "--data-dir", data_dir, "--out-dir", out, cwd=out)
    return out / STEP, read_metrics(out / STEP)


def test_both_forms_of_a_clip_are_followed_from_line_to_batch(run, data_dir):
    folder, _ = run
    table = read_table(folder, "One training clip (mel rows)")
    for form, part in (
        ("full", "fma_genre_spectrograms"),
        ("beat-synced", "fma_genre_spectrograms_beat"),
    ):
        clip = table.loc["id, file", form].split("`")[1]
        array = np.load(data_dir / part / "train" / f"{clip}.fused.full.npy")
        assert table.loc["array", form].startswith(f"140 x {array.shape[1]} float32")
        assert table.loc["stored", form].startswith(f"{array.shape[1]} x 140 float16")
        lines = (data_dir / part / "train_labels.txt").read_text().splitlines()
        assert table.loc["label line", form].strip("`").replace("<TAB>", "\t") in lines


def test_counts_before_and_after_the_merge(run):
    _, metrics = run
    before, after = metrics["classes"]["before"], metrics["classes"]["after"]
    for number, split in enumerate(("train", "test")):
        assert before[split] == {genre: COUNTS[genre][number] for genre in GENRES}
        assert after[split] == {
            name: sum(COUNTS[genre][number] for genre in MERGED if MERGED[genre] == name)
            for name in CLASSES
        }


def test_sound_data_have_no_problem(run):
    folder, metrics = run
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
    run_forked(f"{STEP}.py", "--data-dir", root, "--out-dir", root / "out")
    return (
        planted,
        read_metrics(root / "out" / STEP),
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
    found = {sets: counts for sets, counts in leaks.items() if any(counts.values())}
    assert len(leaks) == 10 and found == {
        "fma_genre_spectrograms/train, fma_genre_spectrograms/test": BY_ARRAY,
        "multitask_dataset/train, fma_genre_spectrograms/test": BY_ARRAY,
        "multitask_dataset_beat/train, fma_genre_spectrograms_beat/test": BY_ID,
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


def test_keeps_classes_of_ones_own(tmp_path):
    root = write_data_set(tmp_path / "data", per_class=(4, 1), n_emotion=(4, 2), n_frames=30)
    for folder in ("fma_genre_spectrograms", "fma_genre_spectrograms_beat"):
        for split in ("train", "test"):
            path = root / folder / f"{split}_labels.txt"
            path.write_text(path.read_text().replace("\tBlues", "\tRebetiko"))
    flags = ["--smoke", "--data-dir", root, "--out-dir", tmp_path / "out"]
    assert_clean_error(run_forked(f"{STEP}.py", *flags, check=False), "Rebetiko", "--no-merge")
    run_forked(f"{STEP}.py", *flags, "--no-merge")
    classes = read_metrics(tmp_path / "out" / STEP)["classes"]
    assert classes["before"] == classes["after"] and classes["after"]["train"]["Rebetiko"] == 4
