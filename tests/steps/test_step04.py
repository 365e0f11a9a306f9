"""Step 4: the classes before and after the merge, and what the audit finds."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    CLASSES,
    COUNTS,
    GENRES,
    MERGED,
    assert_clean_error,
    labels_of,
    read_metrics,
    read_table,
    run_forked,
    run_smoke,
    write_data_set,
)

STEP = "step04_dataset"


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    return run_smoke(STEP, data_dir, tmp_path_factory)


def test_both_forms_of_a_clip_are_followed_from_line_to_batch(run, data_dir):
    table = read_table(run[0], "One training clip (mel rows)")
    parts = {"full": "fma_genre_spectrograms", "beat-synchronised": "fma_genre_spectrograms_beat"}
    for form, part in parts.items():
        clip = table.loc["id, file", form].split("`")[1]
        array = np.load(data_dir / part / "train" / f"{clip}.fused.full.npy")
        assert table.loc["array", form].startswith(f"140 x {array.shape[1]} float32")
        assert table.loc["stored", form].startswith(f"{array.shape[1]} x 140 float16")
        lines = (data_dir / part / "train_labels.txt").read_text().splitlines()
        line = table.loc["label line", form].strip("`").replace("<TAB>", "\t")
        label = MERGED[line.split("\t")[1]]
        assert line in lines and line.split(".")[0] == clip
        assert table.loc["class number", form].startswith(f"{label} -> {CLASSES.index(label)} ")
        text = table.loc["standardised", form]
        band, x, mean, sd, z = map(float, re.findall(r"-?\d+\.?\d*", text))
        assert x == pytest.approx(array[:128].max(), abs=0.06) == array[int(band)].max()
        assert z == pytest.approx((x - mean) / sd, abs=0.02)


def test_sound_data_are_counted_before_and_after_the_merge_and_have_no_problem(run, data_dir):
    folder, metrics = run
    before, after = metrics["classes"]["before"], metrics["classes"]["after"]
    for number, split in enumerate(("train", "test")):
        assert before[split] == {genre: COUNTS[genre][number] for genre in GENRES}
        assert after[split] == {
            name: sum(COUNTS[genre][number] for genre in MERGED if MERGED[genre] == name)
            for name in CLASSES
        }
    test = list(labels_of(data_dir, split="test").values())
    share = test.count("Rock") / len(test)
    summary = " ".join((folder / "summary.md").read_text().split())
    assert f"predicts Rock has an accuracy of {share:.3f} on the test set" in summary
    sizes, kept = before["train"], after["train"]
    assert f" {kept['Rock'] / min(kept.values()):.1f} times as many as Trip-Hop" in summary
    table = read_table(folder, "After: samples per class")
    assert table.loc["Rock", "share of train"] == f"{kept['Rock'] / sum(kept.values()):.1%}"
    dropped = [n for genre, n in sizes.items() if genre not in MERGED]
    merged = [to for to in MERGED.values() if list(MERGED.values()).count(to) > 1]
    said = [len(sizes), min(sizes.values()), max(sizes.values()), np.median(list(sizes.values()))]
    said += [len(CLASSES), sum(kept.values()), sum(sizes.values())]
    said += [len(merged), len(dropped), sum(dropped)]
    text = re.search(r"Before, \d+ classes .*? left out\.", summary)[0]
    assert [int(number) for number in re.findall(r"\d+", text)] == said
    assert metrics["problems"] == [] and "\n0 problems in" in (folder / "summary.md").read_text()


KINDS = ("not finite", "wrong shape or type", "out of range", "constant", "unreadable", "missing",
         "duplicate")  # fmt: skip


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """What step 4 says of a data set with faults; which clips they are: {fault: id}."""
    tmp_path = tmp_path_factory.mktemp("faulty")
    root = write_data_set(tmp_path / "data", per_class=(5, 2), n_emotion=(8, 3), n_frames=40)
    genre, beat = (root / f"fma_genre_spectrograms{end}" for end in ("", "_beat"))
    train, test = (sorted((genre / split).glob("*.npy")) for split in ("train", "test"))
    paths = dict(zip(KINDS, train[10:80:10], strict=True))
    array, bands = np.load(train[0]), np.arange(140)[:, None] < 128
    np.save(paths["not finite"], np.where(np.arange(array.shape[1]) == 3, np.nan, array))
    np.save(paths["wrong shape or type"], array.T)
    np.save(paths["out of range"], array - 60 * bands)
    np.save(paths["constant"], np.tile(array[:, :1], array.shape[1]))
    np.save(train[1], np.where(bands, -80.0, array))  # silence, the other constant
    paths["unreadable"].write_bytes(paths["unreadable"].read_bytes()[:-500])
    paths["missing"].unlink()
    shutil.copy(train[2], paths["duplicate"])
    paths["no label"] = genre / "test" / "999999.fused.full.npy"
    np.save(paths["no label"], array)
    # A test clip under another id among the training clips, and a genre test clip, by
    # array and by id, among the multitask training clips.
    paths |= {"leak within": test[0], "leak by array": test[5], "leak by id": test[9]}
    shutil.copy(test[0], train[3])
    shutil.copy(test[5], min((root / "multitask_dataset" / "train").glob("*.npy")))
    labels = root / "multitask_dataset_beat" / "train_labels.txt"
    labels.write_text(labels.read_text() + f"{test[9].name.split('.')[0]},0.5,0.5,0.5\n")
    np.save(labels.parent / "train" / test[9].name, np.load(beat / "test" / test[9].name) * 0.9)
    run_forked(f"{STEP}.py", "--data-dir", root, "--out-dir", tmp_path)
    clips = {kind: path.name.split(".")[0] for kind, path in paths.items()}
    return read_metrics(tmp_path / STEP), clips


def test_audit_finds_each_planted_fault_once_and_counts_every_array(audit):
    metrics, clips = audit
    folders, where = metrics["audit"]["folders"], "fma_genre_spectrograms_beat/test"
    paths = (Path(metrics["data"]["root"]) / where).glob("*.npy")
    n = sorted(np.load(path).shape[1] for path in paths)
    assert folders[where]["steps"] == f"{n[0]} / {np.median(n):.0f} / {n[-1]}"
    for kind in (*KINDS, "no label"):
        where = f"fma_genre_spectrograms/{'test' if kind == 'no label' else 'train'}"
        (row,) = (row for row in metrics["problems"] if row["problem"] == kind)
        n = 2 if kind == "constant" else 1
        assert (row["where"], row["count"]) == (where, n) and clips[kind] in row["examples"]
        assert kind == "no label" or folders[where][kind] == n
    assert {name: row["clips"] for name, row in folders.items()} == {
        "fma_genre_spectrograms/train": 100, "fma_genre_spectrograms/test": 40,
        "fma_genre_spectrograms_beat/train": 100, "fma_genre_spectrograms_beat/test": 40,
        "multitask_dataset/train": 8, "multitask_dataset/test": 3,
        "multitask_dataset_beat/train": 9, "multitask_dataset_beat/test": 3,
    }  # fmt: skip


def test_audit_finds_leaks_between_sets(audit):
    metrics, clips = audit
    leaks = metrics["audit"]["leaks"]
    found = {sets: counts for sets, counts in leaks.items() if any(counts.values())}
    by_array, by_id = {"same id": 0, "same array": 1}, {"same id": 1, "same array": 0}
    assert len(leaks) == 10 and found == {
        "fma_genre_spectrograms/train, fma_genre_spectrograms/test": by_array,
        "multitask_dataset/train, fma_genre_spectrograms/test": by_array,
        "multitask_dataset_beat/train, fma_genre_spectrograms_beat/test": by_id,
    }
    examples = {
        (row["where"].split("/")[0], row["problem"]): row["examples"] for row in metrics["problems"]
    }
    assert clips["leak within"] in examples["fma_genre_spectrograms", "same array"]
    assert clips["leak by array"] in examples["multitask_dataset", "same array"]
    assert clips["leak by id"] in examples["multitask_dataset_beat", "same id"]


def test_keeps_classes_of_ones_own_and_names_a_label_file_with_a_fault(tmp_path):
    root = write_data_set(tmp_path / "data", per_class=(4, 1), n_emotion=(4, 2), n_frames=30)
    labels = root / "multitask_dataset_beat" / "train_labels.txt"
    labels.write_text(labels.read_text() + "1,loud,0.5,0.5\n")
    for folder in ("fma_genre_spectrograms", "fma_genre_spectrograms_beat"):
        for split in ("train", "test"):
            path = root / folder / f"{split}_labels.txt"
            path.write_text(path.read_text().replace("\tBlues", "\tRebetiko"))
    flags = ["--smoke", "--data-dir", root, "--out-dir", tmp_path / "out"]
    assert_clean_error(run_forked(f"{STEP}.py", *flags, check=False), "Rebetiko", "--no-merge")
    run_forked(f"{STEP}.py", *flags, "--no-merge")
    metrics = read_metrics(tmp_path / "out" / STEP)
    classes, (fault,) = metrics["classes"], metrics["problems"]
    assert classes["before"] == classes["after"] and classes["after"]["train"]["Rebetiko"] == 4
    assert (fault["where"], fault["problem"]) == ("multitask_dataset_beat/train", "bad labels")
