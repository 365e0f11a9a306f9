"""Label files: which clips there are, their classes before and after the merge, their emotions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from patrec.errors import InputError
from patrec.files import part_folder

MERGE = {  # the lab's step 4b: similar classes merged, five left out (None)
    "Rock": "Rock", "Psych-Rock": "Rock", "Post-Rock": "Rock", "Indie-Rock": None,
    "Folk": "Folk", "Psych-Folk": "Folk", "Metal": "Metal", "Punk": "Metal", "Post-Punk": None,
    "Electronic": "Electronic", "Chiptune": "Electronic", "Trip-Hop": "Trip-Hop",
    "Hip-Hop": "Hip-Hop", "Pop": "Pop", "Classical": "Classical", "Blues": "Blues", "Jazz": "Jazz",
    "Soundtrack": None, "International": None, "Old-Time": None,
}  # fmt: skip

EMOTIONS = ("valence", "energy", "danceability")


class Entry(NamedTuple):
    """One clip: its id, its array on disk, its genre name or its three emotion values."""

    clip_id: str
    path: Path
    label: str | tuple[float, float, float] | None


def read_labels(path) -> list[tuple[str, str | tuple[float, float, float]]]:
    """Read a label file of any of the three forms that the data set has.

    ``Id<TAB>Genre`` for genre, ``Id,valence,energy,danceability`` for emotion. The clip's
    id is what stands before the first dot of the first column.

    Returns
    -------
    list of (clip_id, label), in the file's order; label is the genre name or the tuple
    (valence, energy, danceability), each in [0, 1].

    Raises
    ------
    InputError
        Names the file, the line and the fault.
    """
    expected = f"'Id<TAB>Genre' or 'Id,{','.join(EMOTIONS)}'"
    rows = [(n, line) for n, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: empty; its first line must be {expected}")
    header = rows[0][1].strip()
    separator = "\t" if "\t" in header else ","
    columns = [name.strip() for name in header.split(separator)]
    # Columns are found by name: a fixed number is how valence once was read as energy.
    is_genre = columns == ["Id", "Genre"]
    if is_genre and separator != "\t":
        raise InputError(f"{path}: columns separated by {separator!r}; expected a tab")
    is_emotion = columns[0] == "Id" and sorted(columns[1:]) == sorted(EMOTIONS)
    if not is_genre and not (is_emotion and separator == ","):
        raise InputError(f"{path}: header {header!r}; expected {expected}")

    labels = {}  # a row given twice is one clip
    for n, line in rows[1:]:
        where = f"{path}, line {n}"
        cells = [cell.strip() for cell in line.split(separator)]
        if len(cells) != len(columns) or not all(cells):
            fault = f"{line!r} has not {len(columns)} filled columns"
            raise InputError(f"{where}: {fault}; mend or remove the line")
        clip_id = cells[0].split(".")[0]
        if not clip_id or any(mark in cells[0] for mark in "/\\:\0"):
            fault = f"{cells[0]!r} is no clip id"
            raise InputError(f"{where}: {fault}; expected e.g. 104085.fused.full.npy.gz")
        label = cells[1] if is_genre else emotion_values(where, line, columns[1:], cells[1:])
        if labels.setdefault(clip_id, label) != label:
            fault = f"clip {clip_id} was labelled {labels[clip_id]!r} before, now {label!r}"
            raise InputError(f"{where}: {fault}; keep one")
    if not labels:
        raise InputError(f"{path}: a header and no clips; is the data set complete?")
    return list(labels.items())


def read_lines(path) -> list[str]:
    """Lines of a label file; InputError where it cannot be read."""
    try:  # -sig: a byte order mark is no part of the header
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        fault = "label file missing; is the data set complete?"
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 text at byte {error.start}; save it as UTF-8"
    except OSError as error:  # a folder in its place, no permission
        fault = f"cannot be read ({error.strerror}); is the data set complete?"
    raise InputError(f"{path}: {fault}")


def emotion_values(where, line, columns, cells) -> tuple[float, float, float]:
    """Cells of an emotion label file -> (valence, energy, danceability), each in [0, 1]."""
    try:
        values = dict(zip(columns, map(float, cells), strict=True))
    except ValueError:
        fault = f"{line!r} holds a value that is no number"
        raise InputError(f"{where}: {fault}; mend or remove the line") from None
    if not all(0 <= value <= 1 for value in values.values()):
        fault = f"{line!r} holds a value outside [0, 1]"
        raise InputError(f"{where}: {fault}; mend or remove the line")
    return tuple(values[name] for name in EMOTIONS)


def read_entries(data_dir, part, split, beat=False, merge=False) -> list[Entry]:
    """List the clips of one split of one part.

    Parameters
    ----------
    part : 'genre' or 'emotion'
    split : 'train' or 'test'
    beat : bool
        Beat-synchronised arrays instead of full ones.
    merge : bool
        Apply the lab's merge of classes (genre only).
    """
    folder = part_folder(data_dir, part, beat)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data-dir must hold {folder.name}")
    arrays = folder / split
    if part == "emotion" and split == "test":  # the lab publishes no labels for these
        labels = [(path.name.split(".")[0], None) for path in sorted(arrays.glob("*.npy"))]
    else:
        file = folder / f"{split}_labels.txt"
        labels = read_labels(file)
        if isinstance(labels[0][1], str) != (part == "genre"):
            raise InputError(f"{file}: holds the labels of the other part; expected {part} labels")
    entries = [Entry(i, arrays / f"{i}.fused.full.npy", label) for i, label in labels]
    return merge_classes(entries) if merge and part == "genre" else entries


def merge_classes(entries) -> list[Entry]:
    """Apply MERGE: rename merged classes, leave out dropped ones (lab, step 4b)."""
    unknown = sorted({entry.label for entry in entries} - set(MERGE))
    merged = [entry._replace(label=MERGE.get(entry.label)) for entry in entries]
    merged = [entry for entry in merged if entry.label]
    if unknown or not merged:
        class_fault = f"class {unknown[0]!r} is not one of the lab's 20" if unknown else ""
        fault = class_fault or "the lab's merge drops every class in it"
        raise InputError(f"{label_file(entries)}: {fault}; --no-merge keeps classes as they are")
    return merged


def label_file(entries) -> Path:
    """The file that named these clips, for messages."""
    folder = entries[0].path.parent
    return folder.with_name(f"{folder.name}_labels.txt")


def fingerprint(root, part, beat=False) -> str | None:
    """What tells one data set from another: a hash of its training ids and labels, if any."""
    labels = part_folder(root, part, beat) / "train_labels.txt"
    if not labels.is_file():
        return None
    lines = labels.read_bytes().splitlines()
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()[:16]
