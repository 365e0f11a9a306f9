"""Label files: which clips there are, their classes before and after the merge, their emotions."""

import csv
import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from patrec.errors import InputError
from patrec.files import FOLDERS, part_folder

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
    """Read a label file: ``Id<TAB>Genre``, or ``Id,valence,energy,danceability``.

    Returns (clip_id, label) of every clip, in the file's order; the label is the genre name
    or the tuple (valence, energy, danceability), each in [0, 1].

    Raises InputError, which names the file, the line and the fault.
    """
    rows = read_rows(path)
    ids = rows["Id"].str.partition(".")[0]  # what stands before the first dot
    bad_id = (ids == "") | rows["Id"].str.contains(r"[/\\:]")  # none leaves its folder
    faults = {
        f"does not have {rows.shape[1]} filled columns": (rows == "").any(axis=1),
        "has no clip id such as 104085.fused.full.npy.gz": bad_id,
    }
    if "Genre" in rows:
        labels = rows["Genre"]
    else:
        values = rows[list(EMOTIONS)].apply(pd.to_numeric, errors="coerce")
        bad_value = ~((values >= 0) & (values <= 1)).all(axis=1)
        faults["holds a value that is no number in [0, 1]"] = bad_value
        labels = values.apply(tuple, axis=1)
    clips = pd.DataFrame({"id": ids, "label": labels}).drop_duplicates()  # given twice: one clip
    faults["is labelled otherwise in an earlier line"] = clips["id"].duplicated()
    for fault, is_bad in faults.items():
        if is_bad.any():
            cells = rows.loc[is_bad.idxmax()].tolist()  # of the first such line
            where = f"{path}, line {is_bad.idxmax()}"
            raise InputError(f"{where}: {cells} {fault}; mend or remove the line")
    return list(clips.itertuples(index=False, name=None))


def read_rows(path) -> pd.DataFrame:
    """Read the cells of a label file as text, indexed by line number, columns by name."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # -sig: with a byte order mark or not
        if "\0" in text:  # UTF-16 without its mark; pandas would end a cell there
            raise ValueError("holds NUL characters")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise InputError(f"{path}: {reason}; expected a label file in UTF-8") from None
    header = text.partition("\n")[0]
    separator = "\t" if "\t" in header else ","
    columns = [name.strip() for name in header.split(separator)]
    # Columns are found by name: a fixed number is how valence once was read as energy.
    if sorted(columns) != sorted(["Id", "Genre"] if separator == "\t" else ["Id", *EMOTIONS]):
        expected = f"'Id,{','.join(EMOTIONS)}' or, with a tab between them, 'Id' and 'Genre'"
        raise InputError(f"{path}: header {header!r}; expected {expected}")
    options = {"header": None, "skip_blank_lines": False}  # line numbers stay the file's
    options |= {"dtype": str, "na_filter": False, "quoting": csv.QUOTE_NONE}  # "NA" is a name
    try:
        rows = pd.read_csv(io.StringIO(text), sep=separator, **options)
    except pd.errors.ParserError as error:  # "Expected 2 fields in line 6, saw 3"
        fault = str(error).rpartition("C error: ")[2].strip()
        raise InputError(f"{path}: {fault}; mend or remove the line") from None
    rows = rows.apply(lambda column: column.str.strip()).set_axis(columns, axis=1)
    rows = rows.set_axis(rows.index + 1)[1:]
    rows = rows[(rows != "").any(axis=1)]
    if rows.empty:
        raise InputError(f"{path}: a header and no clips; is the data set complete?")
    return rows


def read_entries(data_dir, part, split, beat=False, merge=False) -> list[Entry]:
    """List the clips of one split ('train' or 'test') of one part ('genre' or 'emotion').

    beat : beat-synchronised arrays instead of full ones
    merge : apply the lab's merge of classes (genre only)
    """
    folder = part_folder(data_dir, part, beat)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data-dir must hold {folder.name}")
    arrays = folder / split
    if part == "emotion" and split == "test":  # the lab publishes no labels for these
        files = [*arrays.glob("*.npy"), *arrays.glob("*.npy.gz")]  # read_array names the latter
        ids = {path.name.split(".")[0] for path in files} - {""}  # "": hidden, as ._1.npy of macOS
        labels = [(clip_id, None) for clip_id in sorted(ids)]
    else:
        file = folder / f"{split}_labels.txt"
        labels = read_labels(file)
        if isinstance(labels[0][1], str) != (part == "genre"):
            raise InputError(f"{file}: holds the labels of the other part; expected {part} labels")
    entries = [Entry(i, arrays / f"{i}.fused.full.npy", label) for i, label in labels]
    return merge_classes(entries) if merge and part == "genre" else entries


def merge_classes(entries) -> list[Entry]:
    """Apply MERGE: rename merged classes, leave out dropped ones (lab, step 4b)."""
    fault = "the lab's merge drops every class in it"
    if unknown := sorted({entry.label for entry in entries} - set(MERGE)):
        fault = f"class {unknown[0]!r} is not one of the lab's 20"
    merged = [entry._replace(label=MERGE.get(entry.label)) for entry in entries]
    merged = [entry for entry in merged if entry.label]
    if unknown or not merged:
        raise InputError(f"{label_file(entries)}: {fault}; --no-merge keeps classes as they are")
    return merged


def label_line(root, clip_id, beat=False) -> str:
    """The line of a genre training clip in train_labels.txt, with its tab made visible."""
    text = (part_folder(root, "genre", beat) / "train_labels.txt").read_text("utf-8-sig")
    line = next(x for x in text.splitlines() if x.split(".")[0].strip() == clip_id)
    return line.replace("\t", "<TAB>")


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


def fingerprints(root) -> dict[str, str]:
    """`fingerprint` of every part that a data set has."""
    return {part: value for part in FOLDERS if (value := fingerprint(root, part))}
