"""Step 4: data loading and analysis.

The lab asks: a) study the Dataset of the helper code and the values that it returns,
comment on its operations; b) similar classes are merged, tiny ones removed; c) two
histograms of the number of samples per class, before and after b. Besides, an audit of
every array, which the published data set never had.

    python step04_dataset.py
    python step04_dataset.py --no-merge   # a data set with classes of its own

Input: all four folders, both splits. Output, in outputs/step04_dataset/: figures, tables
and what they show (summary.md, metrics.json). The audit lists faults; it does not stop at them.
"""

import hashlib
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from common import (
    COLORS,
    FOLDERS,
    MERGE,
    N_MELS,
    N_READERS,
    InputError,
    Step,
    load_genre,
    make_loader,
    make_parser,
    parse_args,
    part_folder,
    read_array,
    read_entries,
    run_main,
    show_bars,
    time_mask,
)

# How a complaint of read_array begins -> column of the audit's table.
FAULTS = {
    "missing": "missing", "not a readable": "unreadable", "numbers of type": "wrong shape or type", "shape": "wrong shape or type",
    "holds NaN": "not finite", "mel rows span": "out of range", "chroma rows": "out of range", "mel rows are": "constant",
}  # fmt: skip


def main(argv=None):
    args = parse_args(make_parser(__doc__), argv)
    step = Step("step04_dataset", args)

    # The audit reads every array first, before anything below relies on them.
    files = check_files(step)

    # 4a) What the Dataset does to a clip, operation by operation, on real values.
    step.heading("4a. What the Dataset does and returns")
    report_walk(step, {form: walk(step, beat) for form, beat in (("full", False), ("beat-synced", True))})

    # 4b, 4c) Samples per class, before and after merging similar classes and removing
    # those represented by very few samples.
    step.heading("4b, 4c. Samples per class before and after the merge")
    counts = report_classes(step)

    # The audit: a network trains on broken or leaked clips without a word.
    step.heading("Audit of the arrays")
    return step.finish(classes=counts, **report_audit(step, files))


def check(entry) -> dict:
    """Read one array and look for faults; equal digests are identical arrays."""
    try:
        array = read_array(entry.path)
    except InputError as error:
        detail = str(error).removeprefix(f"{entry.path}: ").split("; replace the file")[0]
        fault = next(fault for start, fault in FAULTS.items() if detail.startswith(start))
        return {"id": entry.clip_id, "fault": fault, "detail": detail, "steps": 0, "digest": ""}
    constant = array.shape[1] > 1 and (array == array[:, :1]).all()
    return {"id": entry.clip_id, "fault": "constant" if constant else "", "detail": "every frame is the same",
            "steps": array.shape[1], "digest": hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()}  # fmt: skip


def check_files(step) -> pd.DataFrame:
    """Check every clip that the labels name; a broken label file is a fault, not the end."""
    rows = []
    for part, beat, split in itertools.product(FOLDERS, (False, True), ("train", "test")):
        folder = part_folder(step.data, part, beat)
        where = {"where": f"{folder.name}/{split}"}
        try:
            entries = read_entries(step.data, part, split, beat)
        except InputError as error:
            rows.append(where | {"id": "label file", "fault": "bad labels", "detail": str(error)})
            continue
        named = {entry.path for entry in entries}
        rows += [where | {"id": path.name, "fault": "no label", "detail": "in the folder, not in the label file"}
                 for path in sorted((folder / split).glob("*.npy")) if path not in named]  # fmt: skip
        entries = entries[:20] if step.args.smoke else entries
        with ThreadPoolExecutor(N_READERS) as pool:
            rows += [where | row for row in tqdm(pool.map(check, entries), where["where"], len(entries), disable=not show_bars(), leave=False)]
    return pd.DataFrame(rows, columns=["where", "id", "fault", "detail", "steps", "digest"]).fillna({"steps": 0, "digest": ""})


def walk(step, beat) -> dict:
    """4a: one clip from its label line to a batch; operation -> what came out of it."""
    data = load_genre(step.data, beat=beat, seed=step.args.seed, merge=not step.args.no_merge, skip_bad=True)
    whole = data.val.dataset  # the Dataset of which train and val are Subsets
    index = data.train.indices[0]
    entry, store = whole.store.entries[index], whole.store
    array = np.load(entry.path)
    labels = (part_folder(step.data, "genre", beat) / "train_labels.txt").read_text(encoding="utf-8-sig").splitlines()
    line = next(line for line in labels if line.split(".")[0].strip() == entry.clip_id)
    kept = store.frames[store.starts[index] :][: store.lengths[index]].numpy()
    mean, std = (value.numpy() for value in whole.stats)
    x, target, length = whole[index]
    step_t, band = int(array[:N_MELS].max(0).argmax()), int(array[:N_MELS].max(1).argmax())  # a loud cell of the clip
    xs, targets, lengths = next(iter(make_loader(data.train, 8)))
    mask = time_mask(lengths, xs.shape[1], xs.device)
    rows = {
        "label line": f"`{line.replace(chr(9), '<TAB>')}`",
        "id and file": f"`{entry.clip_id}`, `{entry.path.parent.name}/{entry.path.name}`",
        "read and check": f"{array.shape[0]} x {array.shape[1]} {array.dtype}, mel {array[:N_MELS].min():.1f} to {array[:N_MELS].max():.1f} dB, "
                          f"chroma {array[N_MELS:].min():.2f} to {array[N_MELS:].max():.2f}",
        "class number": f"{entry.label} -> {int(target)} of {len(data.classes)}",
        "store": f"{kept.shape[0]} x {kept.shape[1]} {kept.dtype}, {kept.nbytes / array.nbytes:.0%} of the size, at most "
                 f"{np.abs(kept.T.astype(float) - array).max():.3f} off",
        "Subset": f"{len(data.train)} training and {len(data.val)} validation clips",
        "standardise": f"band {band}: ({array[band, step_t]:.1f} - {mean[band]:.1f}) / {std[band]:.1f} = {float(x[step_t, band]):.2f}",
        "item": f"({tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}, {int(target)}, {int(length)})",
        "batch": f"x {tuple(xs.shape)}, targets {tuple(targets.shape)}, lengths {tuple(lengths.shape)}",
        "padding and mask": f"{1 - float(mask.mean()):.1%} of the batch is padding; its values: {float((xs * (1 - mask)).abs().max()):.0f}",
    }  # fmt: skip
    shortest = int(lengths.argmin())
    return {"rows": rows, "shortest": xs[shortest].T.numpy(), "length": int(lengths[shortest])}


WHY = {
    "label line": "one line per clip; the columns are found by the header's names",
    "id and file": "the id is what stands before the first dot; the file is always `<id>.fused.full.npy`",
    "read and check": "shape, type, finite values and range are checked; rows 0-127 are mel, 128-139 chroma",
    "class number": "merged name -> number by the sorted names of the training part, the same for the test set",
    "store": "all clips lie in one tensor, time first, in half precision: no file is read while training",
    "Subset": "stratified and seeded: both parts hold every class in the same share",
    "standardise": "per band, with mean and standard deviation of the training Subset only, so nothing of validation leaks in",
    "item": "`dataset[i]` returns (spectrogram, target, length); the LSTM reads it row by row, one row per step",
    "batch": "DataLoader and Subset fetch a whole batch by one index operation (`__getitems__`), padded to its longest clip",
    "padding and mask": "padding comes after standardising, so it is the band's mean; padding dB with 0 would be the loudest value. The mask is made of the lengths",
}


def report_walk(step, walks):
    """The table of operations, and a figure of a padded clip."""
    table = pd.DataFrame({"why": WHY} | {form: result["rows"] for form, result in walks.items()}).reindex(list(WHY)).rename_axis("operation")
    step.table(table, "One training clip (mel rows), operation by operation")
    result = walks["beat-synced"]
    fig, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
    image = ax.imshow(result["shortest"], origin="lower", aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest")
    ax.axvline(result["length"] - 0.5, color="black", linestyle="--", label="end of the clip, padding right of it")
    ax.set(xlabel="Time (beats)", ylabel="Mel band")
    ax.legend(loc="upper right")
    fig.colorbar(image, ax=ax, label="Standard deviations\nfrom the band's mean")
    step.figure(fig, "item", "The shortest clip of a beat-synced batch as the network gets it")


def report_classes(step) -> dict:
    """4b, 4c: counts per class and split, before and after the merge, as figure and table."""
    counts = {
        when: {split: dict(sorted(Counter(entry.label for entry in read_entries(step.data, "genre", split, merge=merge)).items())) for split in ("train", "test")}
        for when, merge in (("before", False), ("after", not step.args.no_merge))
    }
    fig, axes = plt.subplots(1, 2, figsize=(12, 0.3 * len(counts["before"]["train"]) + 1.5), layout="constrained")
    for ax, (when, splits) in zip(axes, counts.items(), strict=True):
        frame = pd.DataFrame(splits).fillna(0).astype(int).sort_values("train")
        ax.barh(frame.index, frame["train"], color=COLORS[0], label="train")
        ax.barh(frame.index, frame["test"], left=frame["train"], color=COLORS[1], label="test")
        for y, (train, test) in enumerate(zip(frame["train"], frame["test"], strict=True)):
            ax.text(train + test, y, f" {train} + {test}", va="center", fontsize="small")
        ax.set(xlabel="Number of samples", ylabel="Class", title=f"{when.capitalize()} the merge: {len(frame)} classes, {int(frame.to_numpy().sum())} samples")
        ax.margins(x=0.15)
        ax.legend(loc="lower right")
    step.figure(fig, "classes", "Number of samples per class, before and after the merge")
    before = pd.DataFrame(counts["before"]).fillna(0).astype(int).sort_index().rename_axis("class")
    if not step.args.no_merge:
        before["becomes"] = [MERGE[name] or "dropped" for name in before.index]
    step.table(before, "Before the merge")
    after = pd.DataFrame(counts["after"]).fillna(0).astype(int).sort_index().rename_axis("class")
    step.table(after.assign(**{"share of train": (after["train"] / after["train"].sum()).map("{:.1%}".format)}), "After the merge")
    largest, smallest = after["train"].idxmax(), after["train"].idxmin()
    step.text(
        f"{before['train'].sum() - after['train'].sum()} of {before['train'].sum()} training clips are dropped. Afterwards the largest class, {largest}, has "
        f"{after['train'].max()} training clips, {after['train'].max() / after['train'].min():.1f} times those of {smallest}. A model that always answers "
        f"{largest} has an accuracy of {after.loc[largest, 'test'] / max(after['test'].sum(), 1):.3f} on the test set: the floor that every model must clear."
    )
    return counts


def report_audit(step, files) -> dict:
    """Faults per folder, clips in two sets, and the list of all problems."""
    clips = files[~files["fault"].isin(["bad labels", "no label"])]
    sound = clips[clips["digest"] != ""]
    twin = sound.groupby(["where", "digest"])["id"].transform("first")
    twins = sound[twin != sound["id"]].assign(fault="duplicate", detail="the same array as " + twin)
    faults = pd.concat([files[files["fault"] != ""], twins])

    # A clip in training and test set makes the test score a lie; one that is in the genre
    # test set and among the multitask training clips would do so in steps 9 and 10.
    names = {(part, beat): part_folder(step.data, part, beat).name for part in FOLDERS for beat in (False, True)}
    pairs = [(f"{name}/train", f"{name}/test") for name in names.values()]
    pairs += [(f"{names['emotion', beat]}/train", f"{names['genre', beat]}/test") for beat in (False, True)]
    leaks = {}
    for first, second in pairs:
        train, test = clips[clips["where"] == first], clips[clips["where"] == second]
        same = {"same id": test["id"].isin(train["id"]), "same array": test["digest"].isin(train["digest"]) & (test["digest"] != "")}
        leaks[f"{first}, {second}"] = {kind: int(rows.sum()) for kind, rows in same.items()}
        faults = pd.concat([faults, *(test[rows].assign(where=f"{first}, {second}", fault=kind, detail=kind) for kind, rows in same.items())])

    columns = list(dict.fromkeys(FAULTS.values())) + ["duplicate"]
    table = {}
    for where, rows in clips.groupby("where", sort=False):
        found = faults[faults["where"] == where]["fault"].value_counts()
        n = rows["steps"][rows["steps"] > 0]
        table[where] = {"clips": len(rows)} | {kind: int(found.get(kind, 0)) for kind in columns}
        table[where]["steps"] = f"{n.min():.0f} / {n.median():.0f} / {n.max():.0f}" if len(n) else "-"
    step.table(pd.DataFrame(table).T.rename_axis("folder"), "Clips, faults, and time steps (shortest / median / longest)")
    step.table(pd.DataFrame(leaks).T.rename_axis("sets"), "Clips in two sets that must not share any")
    problems = [{"where": where, "problem": kind, "count": len(rows), "examples": "; ".join(f"{i}: {d}" for i, d in zip(rows["id"][:3], rows["detail"][:3], strict=True))}
                for (where, kind), rows in faults.groupby(["where", "fault"], sort=False)]  # fmt: skip
    if problems:
        step.table(pd.DataFrame(problems).set_index("where"), f"{len(faults)} problems in {len(clips)} arrays")
    else:
        step.text(f"No problem in {len(clips)} arrays: none missing, unreadable, misshapen, not finite, out of range, constant or duplicate, and no clip in two sets.")
    return {"audit": {"arrays": len(clips), "folders": table, "leaks": leaks}, "problems": problems}


if __name__ == "__main__":
    metrics = run_main(main)
