"""Step 4: data loading and analysis.

The lab asks: a) study the Dataset of the helper code and the values that it returns,
comment on its operations; b) similar classes are merged, some are left out; c) two
histograms of the number of samples per class, before and after b. An audit of all arrays
is added.

    python step04_dataset.py
    python step04_dataset.py --no-merge   # a data set with classes of its own

Input: all four folders, both splits. Output, in outputs/step04_dataset/: figures and tables
(summary.md), their numbers (metrics.json). The audit lists faults; it does not stop at them.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--no-merge").
import dataclasses
import hashlib
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from common import SpectrogramDataset, load_data, time_mask
from patrec.clips import N_READERS, read_array
from patrec.errors import InputError
from patrec.features import N_MELS
from patrec.files import FOLDERS, part_folder
from patrec.labels import MERGE, label_line, read_entries
from patrec.machine import show_bars
from patrec.plots import COLORS
from patrec.recipes import GENRE_NETWORKS, window_size
from patrec.splits import VAL_FRACTION
from patrec.step import Step

step = Step("step04_dataset", __doc__)
root, merge = step.source.root, step.source.merge

# %% 4a. What the helper's Dataset does, and what ours does
# The lab: study the Dataset of the helper code and comment on its operations. Ours does the same
# work. The last column says why ours differs.
step.heading("4a. What the Dataset does: the helper's and ours")
OPERATIONS = {
    "label file": (
        "`train_labels.txt` or `test_labels.txt` without its header, split at tabs (emotion: "
        "commas); "
        "`regression_label_index` 1, 2, 3 is valence, energy, danceability",
        "columns are found by the names in the header, and every line is checked",
        "a column number is easily wrong; the error message names the file and the line",
    ),
    "classes": (
        "maps each class by the given table; clips whose class maps to None are left out",
        "the lab's table; a class that is not in it stops the run",
        "a new or misspelt class is named, instead of ending in a KeyError",
    ),
    "file name": (
        "drops `.gz`, replaces `beatsync.fused` and `full.fused` by `fused.full`; folder and split "
        "are found by splitting the path at `/`",
        "the id before the first dot, then `.fused.full.npy`",
        "one rule for all folders and operating systems",
    ),
    "reading": (
        "`np.load` of every array in float64; rows 0-127 (mel), 128-139 (chroma) or all (fused), "
        "turned to (T, F), in a list",
        "`load_clips`: all clips in one tensor, time first, float16, in a cache file; rows are "
        "chosen when a batch is fetched",
        "a quarter of the memory; the cache serves all kinds of input and all later runs; a broken "
        "file is named",
    ),
    "length": (
        "remembers each clip's length; `max_length` is the longest one or the given one",
        "the same lengths; in training a random crop of each clip is taken, otherwise a batch is "
        "as long as its longest clip",
        "no padding to the longest clip of all; a crop is a new example each time",
    ),
    "class numbers": (
        "scikit-learn's LabelEncoder, fitted separately for the training set and for the test set",
        "`encode_labels`: the sorted names of the training part, also for the test set",
        "if it is fitted twice, a class has the same number in both sets only if both sets contain "
        "the same classes",
    ),
    "item": (
        "pads with zeros to `max_length`, or cuts; returns (array, label, length)",
        "standardises every band by its mean and standard deviation over the training clips, then "
        "pads with zeros; returns (spectrogram, target, length)",
        "in dB a zero means the loudest sound, so padding looks loud; after standardising, a zero "
        "is the band's mean",
    ),
    "split": (
        "a random fifth for validation, not stratified, after `np.random.seed(420)`; two loaders "
        "with random samplers over one Dataset",
        f"`split_indices`: {VAL_FRACTION:.0%}, stratified, by --seed; two torch Subsets",
        "every class has its share in both parts, and NumPy's global random state is not reset",
    ),
}
table = pd.DataFrame(OPERATIONS, index=["the helper's", "ours", "why changed"]).T
step.table(table.rename_axis("operation"))
step.text("Our Dataset fetches a whole batch at once; DataLoader and Subset call this method:")
step.show_source(SpectrogramDataset.__getitems__)


# %% 4a. One clip, from its line in the label file to a batch
# The lab: comment on the values that the Dataset returns. One training clip's mel rows, in both
# forms, after each operation. Clips that cannot be read are left out; the audit below lists them.
def follow(beat) -> dict[str, str]:
    """Follow one clip: {operation: its result}."""
    source = dataclasses.replace(step.source, device="cpu", skip_bad=True)
    data = load_data(source, "mel", beat=beat)
    whole, index = data.train.dataset, data.train.indices[0]
    entry, store = whole.store.entries[index], whole.store
    array = np.load(entry.path)
    kept = store.frames[store.starts[index] :][: store.lengths[index]].numpy()
    worst = np.abs(kept.T.astype(float) - array).max()
    mean, std = (value.numpy() for value in whole.stats)
    x, target, length = whole[index]  # the item
    mel, chroma = array[:N_MELS], array[N_MELS:]
    band, t = np.unravel_index(mel.argmax(), mel.shape)
    xs, targets, lengths = next(iter(DataLoader(data.train, 8)))  # the batch
    mask = time_mask(lengths, xs.shape[1], xs.device)
    crop = window_size(GENRE_NETWORKS["beat_mel" if beat else "mel"])
    return {
        "label line": f"`{label_line(root, entry.clip_id, beat)}`",
        "id, file": f"`{entry.clip_id}`, `{entry.path.relative_to(root).as_posix()}`",
        "array": f"{array.shape[0]} x {array.shape[1]} {array.dtype}, mel {mel.min():.1f} to "
        f"{mel.max():.1f} dB, chroma {chroma.min():.2f} to {chroma.max():.2f}",
        "class number": f"{entry.label} -> {int(target)} (numbers 0 to {len(data.names) - 1})",
        "stored": f"{kept.shape[0]} x {kept.shape[1]} {kept.dtype}, "
        f"{kept.nbytes / array.nbytes:.0%} of the size, rounded by at most {worst:.3f}",
        "Subsets": f"{len(data.train)} training and {len(data.val)} validation clips",
        "standardised": f"loudest cell, band {band}: ({mel[band, t]:.2f} - ({mean[band]:.2f})) / "
        f"{std[band]:.2f} = {float(x[t, band]):.2f}",
        "item": f"({tuple(x.shape)} {x.dtype}, {int(target)}, {int(length)})",
        "batch of 8": f"x {tuple(xs.shape)}, targets {tuple(targets.shape)}, "
        f"lengths {tuple(lengths.shape)}",
        "padding": f"{1 - float(mask.mean()):.1%} of the batch",
        "in step 5": f"random crops of {crop} {'beats' if beat else 'frames'}",
    }


step.heading("4a. One clip, from its line in the label file to a batch")
followed = {"full": follow(beat=False), "beat-synchronised": follow(beat=True)}
caption = "One training clip (mel rows) after each of our operations"
step.table(pd.DataFrame(followed).rename_axis("operation"), caption)

# %% 4b. Similar classes are merged, small ones left out
# The lab: similar classes are merged and those with very few samples removed, by the table of the
# helper code. The counts are those of this data set.
step.heading("4b. Similar classes are merged, small ones left out")
counts = {
    when: {
        split: Counter(entry.label for entry in read_entries(root, "genre", split, merge=how))
        for split in ("train", "test")
    }
    for when, how in (("before", False), ("after", merge))
}
before, after = (
    pd.DataFrame(splits).fillna(0).astype(int).sort_index().rename_axis("class")
    for splits in counts.values()
)
becomes = {name: MERGE.get(name) or "left out" for name in before.index} if merge else {}
step.table(before.assign(becomes=pd.Series(becomes or dict.fromkeys(before.index, "itself"))))
train, kept = before["train"], after["train"].sum()
parts = Counter(becomes.values())
merged = [name for name, to in becomes.items() if to != "left out" and parts[to] > 1]
left_out = train[[becomes.get(name) == "left out" for name in before.index]]
table = {}  # the lab's: {merged class: the classes that become it}
for name, to in MERGE.items():
    if name != to:
        table.setdefault(to, []).append(name)
removed = ", ".join(table.pop(None))
become = ", ".join(f"{' and '.join(names)} into {to}" for to, names in table.items())
step.text(f"""
The lab's table merges {become}. It leaves out {removed}.

Before, {len(before)} classes have from {train.min()} to {train.max()} training clips; the median is
{train.median():.0f}. Afterwards {len(after)} classes have {kept} of the {train.sum()}
training clips. The lab merges similar classes and removes those with very few samples: similar
genres have no clear border, and a few clips do not suffice to learn a class or to measure its
score. In these data {len(merged) or "no"} classes are merged with others, and {len(left_out)}
classes with {left_out.sum()} training clips are left out.
""")

# %% 4c. Number of samples per class, before and after
# The lab: two histograms. Unequal classes matter: training favours the large ones, and accuracy
# hardly shows errors in the small ones (step 6).
step.heading("4c. Number of samples per class, before and after")
fig, axes = plt.subplots(1, 2, figsize=(10, 0.3 * len(before) + 1.5), layout="constrained")
title = "After" if merge else "Not merged (--no-merge)"
for ax, when, frame in ((axes[0], "Before", before), (axes[1], title, after)):
    frame = frame.loc[frame.sum(axis=1).sort_values(kind="stable").index]
    ax.barh(frame.index, frame["train"], color=COLORS[0], label="train")
    ax.barh(frame.index, frame["test"], left=frame["train"], color=COLORS[1], label="test")
    for y, (n_train, n_test) in enumerate(frame[["train", "test"]].to_numpy()):
        ax.text(n_train + n_test, y, f" {n_train} + {n_test}", va="center", fontsize="small")
    ax.set(xlabel="Number of samples", ylabel="Class")
    ax.set_title(f"{when}: {len(frame)} classes, {frame.to_numpy().sum()} samples")
    ax.margins(x=0.25)
    ax.legend(loc="lower right")
step.figure(fig, "classes", "Number of samples per class (training + test), before and after 4b")
share = (after["train"] / kept).map("{:.1%}".format)
step.table(after.assign(**{"share of train": share}), f"{title}: samples per class")
largest, smallest = after["train"].idxmax(), after["train"].idxmin()
baseline = after.loc[largest, "test"] / max(after["test"].sum(), 1)
step.text(f"""
The largest class, {largest}, has {after["train"].max()} training clips,
{after["train"].max() / after["train"].min():.1f} times as many as {smallest}. A model that always
predicts {largest} has an accuracy of {baseline:.3f} on the test set. If a model's accuracy is near
that, its macro-F1 (step 6) shows whether it has learned anything else.
""")

# %% Audit of the arrays
# Broken clips and clips in two sets change the scores, and nobody notices. So every array of a
# label file is read and checked (with --smoke 20 per folder). Identical arrays have equal digests.
step.heading("Audit of the arrays")
FAULTS = {  # how a message of read_array begins -> column of the table
    "missing": "missing",
    "not a readable": "unreadable",
    "numbers of type": "wrong shape or type",
    "shape": "wrong shape or type",
    "holds NaN": "not finite",
    "mel rows span": "out of range",
    "chroma rows": "out of range",
    "mel rows are": "constant",
}


def check_array(entry) -> dict:
    """Read one array and look for faults: a row of the list of files."""
    row = {"id": entry.clip_id, "fault": "", "detail": ""}
    try:
        array = read_array(entry.path)
    except InputError as error:
        detail = str(error).removeprefix(f"{entry.path}: ").split("; replace the file")[0]
        fault = next(fault for start, fault in FAULTS.items() if detail.startswith(start))
        return row | {"fault": fault, "detail": detail}
    if array.shape[1] > 1 and (array == array[:, :1]).all():
        row |= {"fault": "constant", "detail": "every frame is the same"}
    digest = hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
    return row | {"steps": array.shape[1], "digest": digest}


rows = []
for part, beat, split in itertools.product(FOLDERS, (False, True), ("train", "test")):
    folder = part_folder(root, part, beat)
    where = {"where": f"{folder.name}/{split}"}
    try:
        entries = read_entries(root, part, split, beat)
    except InputError as error:
        rows.append(where | {"id": "label file", "fault": "bad labels", "detail": str(error)})
        continue
    named = {entry.path for entry in entries}
    for path in sorted((folder / split).glob("[!.]*.npy")):
        if path not in named:
            detail = "in the folder, not in the label file"
            rows.append(where | {"id": path.name, "fault": "no label", "detail": detail})
    entries = entries[:20] if step.args.smoke else entries  # the tables count these
    with ThreadPoolExecutor(N_READERS) as pool:
        checked = pool.map(check_array, entries)
        bar = tqdm(checked, where["where"], len(entries), disable=not show_bars(), leave=False)
        rows += [where | row for row in bar]
files = pd.DataFrame(rows, columns=["where", "id", "fault", "detail", "steps", "digest"])
clips = files[~files["fault"].isin(["bad labels", "no label"])]
twin = clips.groupby(["where", "digest"])["id"].transform("first")  # none without a digest
twins = clips.assign(fault="duplicate", detail="the same array as " + twin)
faults = [files[files["fault"] != ""], twins[twin.notna() & (twin != clips["id"])]]

# %% Clips in two sets
# A clip in both training and test set makes the test score too good. The same holds for an emotion
# clip that the genre network was trained on (steps 9 and 10 start from that network) and for a
# genre test clip in the training split of the other form (step 6 scores models of frames on beats).
sets = []
for beat in (False, True):
    genre, emotion = (part_folder(root, part, beat).name for part in ("genre", "emotion"))
    other_form = part_folder(root, "genre", not beat).name
    sets += [
        (f"{genre}/train", f"{genre}/test"),
        (f"{emotion}/train", f"{emotion}/test"),
        (f"{emotion}/train", f"{genre}/test"),
        (f"{genre}/train", f"{emotion}/train"),
        (f"{genre}/train", f"{other_form}/test"),
    ]
leaks = {}
for first, second in sets:
    train, test = clips[clips["where"] == first], clips[clips["where"] == second]
    shared = {
        "same id": test["id"].isin(train["id"]),
        "same array": test["digest"].isin(train["digest"]) & test["digest"].notna(),
    }
    where = f"{first}, {second}"
    leaks[where] = {kind: int(hit.sum()) for kind, hit in shared.items()}
    for kind, hit in shared.items():
        faults.append(test[hit].assign(where=where, fault=kind, detail=kind))
faults = pd.concat(faults)

kinds = [*dict.fromkeys(FAULTS.values()), "duplicate"]
folders = {}
for where, rows in clips.groupby("where", sort=False):
    found = faults[faults["where"] == where]["fault"].value_counts()
    folders[where] = {"clips": len(rows)} | {kind: int(found.get(kind, 0)) for kind in kinds}
    n = rows["steps"].dropna()
    folders[where]["steps"] = f"{n.min():.0f} / {n.median():.0f} / {n.max():.0f}" if len(n) else "-"
caption = "Clips, faults, and time steps (shortest / median / longest)"
step.table(pd.DataFrame(folders).T.rename_axis("folder"), caption)
caption = (
    "Clips that two sets share; there should be none (two clips of one track are not detected)"
)
step.table(pd.DataFrame(leaks).T.rename_axis("sets"), caption)
problems = []
for (where, kind), rows in faults.groupby(["where", "fault"], sort=False):
    examples = [f"{i}: {d}" for i, d in zip(rows["id"][:3], rows["detail"][:3], strict=True)]
    problem = {"where": where, "problem": kind, "count": len(rows)}
    problems.append(problem | {"examples": "; ".join(examples)})
step.text(f"{len(faults)} problems in {len(clips)} arrays.")
if problems:
    step.table(pd.DataFrame(problems).set_index("where"), "The problems, with up to three examples")

audit = {"arrays": len(clips), "folders": folders, "leaks": leaks}
step.finish(classes=counts, audit=audit, problems=problems)
