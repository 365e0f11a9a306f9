"""Splits: which clips train, which validate, which are held out."""

import itertools
import math

import numpy as np

from patrec.errors import InputError
from patrec.files import part_folder
from patrec.labels import label_file, read_entries

VAL_FRACTION = 0.1  # of the training clips; few, because every training clip counts
N_FOLDS = 5  # a fifth of the emotion clips is held out: the lab gives no labels for its test clips


def encode_labels(entries, classes) -> np.ndarray:
    """Genre names -> class numbers; `classes` comes from the training part, sorted."""
    number = {name: index for index, name in enumerate(classes)}
    if unknown := sorted({entry.label for entry in entries} - set(number)):
        fault = f"class {unknown[0]!r} does not occur in the training part {list(classes)}"
        raise InputError(f"{label_file(entries)}: {fault}; mend the label or remove the clip")
    return np.array([number[entry.label] for entry in entries])


def split_indices(n_clips, fraction, seed, classes=None) -> tuple[np.ndarray, np.ndarray]:
    """Split range(n_clips) at random, seeded, into a larger and a smaller part.

    fraction : float, share of the smaller (validation or test) part
    classes : np.ndarray [shape=(n_clips,)], optional, whose shares both parts keep
    """
    from sklearn.model_selection import train_test_split  # here: it takes a second to import

    names, counts = np.unique([] if classes is None else classes, return_counts=True)
    if (counts == 1).any():
        fault = f"class {names[counts == 1][0]} has a single clip"
        reason = "which cannot be in both the training and the validation part"
        raise InputError(f"{fault}, {reason}; add clips of it or drop it")
    n_held_out = max(math.ceil(fraction * n_clips), len(names), 1)
    if n_clips < 2 * n_held_out:
        fault = f"{n_clips} clips are too few to split into training and validation part"
        raise InputError(f"{fault}; add clips")
    rows = np.arange(n_clips)
    return train_test_split(rows, test_size=n_held_out, random_state=seed, stratify=classes)


def split_ids(source, part, labels, fold=0, n_folds=1) -> tuple[list[str], list[str], list[str]]:
    """Ids of the training, validation and held-out clips of a part.

    labels : {id: label} of the clips in the network's kind of input
    """
    from sklearn.model_selection import KFold  # here: it takes a second to import

    folder, full = part_folder(source.root, part), {}
    if folder.is_dir():  # a data set may hold beats alone
        entries = read_entries(source.root, part, "train", merge=source.merge)
        full = {entry.clip_id: entry.label for entry in entries}
        odd = sorted(full.keys() ^ labels.keys())
        if odd and part == "emotion":
            raise InputError(
                f"{part_folder(source.root, part, True)}: clip {odd[0]} can be used in only one of "
                "the full and the beat-synchronised emotion data; take it out of both label files"
            )
    # In the order of the full clips' label file; clips that only the beats have come last.
    order = full | {i: label for i, label in labels.items() if i not in full}
    ids = np.array(list(order))
    try:
        if part == "genre":
            classes = np.array(list(order.values()))
            train, val = split_indices(len(ids), VAL_FRACTION, source.seed, classes)
            return ids[train].tolist(), ids[val].tolist(), []
        n_splits = n_folds if n_folds > 1 else N_FOLDS
        if len(ids) < 4 * n_splits:
            fault = f"{len(ids)} clips are too few for {n_splits} folds"
            raise InputError(f"{fault}; add clips, at least {4 * n_splits} are needed")
        cut = KFold(n_splits, shuffle=True, random_state=source.seed).split(ids)
        known, held_out = next(itertools.islice(cut, fold, None))
        train, val = split_indices(len(known), VAL_FRACTION, source.seed)
    except InputError as error:
        raise InputError(f"{folder / 'train_labels.txt'}: {error}") from None
    return ids[known[train]].tolist(), ids[known[val]].tolist(), ids[held_out].tolist()


def take_subset(rows, targets, n) -> list[int]:
    """The first n of the training rows, but at least one clip of every class."""
    if not n or n >= len(rows):
        return rows
    first = list({targets[row]: row for row in reversed(rows)}.values())  # of each class
    first.sort(key=lambda row: targets[row])
    rest = [row for row in rows if row not in set(first)]
    return (first + rest)[: max(n, len(first))]
