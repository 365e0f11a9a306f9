"""Label files: all forms are read, and every fault is one line that names file and line."""

import itertools
import shutil

import pytest
from conftest import GENRES, MERGED, write_data_set
from hypothesis import given, settings
from hypothesis import strategies as st

from patrec.errors import InputError
from patrec.files import FOLDERS, find_data, part_folder
from patrec.labels import MERGE, fingerprint, label_line, read_entries, read_labels

GENRE, EMOTION = "Id\tGenre\n", "Id,valence,energy,danceability\n"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (GENRE + "104085.fused.full.npy.gz\tPsych-Folk\n", [("104085", "Psych-Folk")]),
        ("Genre\tId\nRock\t1.x\n", [("1", "Rock")]),
        (EMOTION + "123212738,0.153,0.961,0.013\n", [("123212738", (0.153, 0.961, 0.013))]),
        (EMOTION + "1,0,1,0.0\n", [("1", (0.0, 1.0, 0.0))]),  # the ends of the scale
        # Bug 2: fixed column numbers loaded valence as energy, or ids as labels.
        ("Id,danceability,valence,energy\n7,0.3,0.1,0.2\n", [("7", (0.1, 0.2, 0.3))]),
        # What pandas would take for a missing value, a number or the begin of a quotation.
        (GENRE + "1\tNA\n2\tNone\n3\t1\n", [("1", "NA"), ("2", "None"), ("3", "1")]),
        (GENRE + '1\t"Rock\n2\tRock"n"Roll\n"3"\tnan',
         [("1", '"Rock'), ("2", 'Rock"n"Roll'), ('"3"', "nan")]),
        (GENRE + "1\tRock # live\n2\tA\u0085B\n", [("1", "Rock # live"), ("2", "A\u0085B")]),
        (b"\xef\xbb\xbfId\tGenre\r\n1.a\tRock\r\n\r\n  \r\n1.b\tRock\r\n2\tHip-Hop\r\n\r\n",
         [("1", "Rock"), ("2", "Hip-Hop")]),
        (EMOTION + "1,0.5,0.5,0.5\n,,,\n1,0.50,.5,5e-1\n", [("1", (0.5, 0.5, 0.5))]),
    ],
)  # fmt: skip
def test_every_form_is_read(tmp_path, text, labels):
    assert read_labels(write(tmp_path / "l.txt", text)) == labels


FAULTS = {
    "empty": ("", "header ''"),
    "header only": (GENRE + "\n\n", "a header and no clips"),
    "no header": ("1.x\tRock\n", "header '1.x"),
    "genre by commas": ("Id,Genre\n1,Rock\n", "with a tab between them"),
    "a column twice": ("Id,valence,energy,energy\n1,0.1,0.2,0.3\n", "header"),
    "cell missing": (GENRE + "1\tRock\n\n2\n3\tJazz\n", r"line 4: \['2', ''\] does not have 2"),
    "cell empty": (GENRE + "\tRock\n", "line 2: .* does not have 2 filled"),
    "a cell too many": (GENRE + "1\tRock\n\n2\tRock\tmore\n", "line 4, saw 3"),
    "all rows a cell too long": (GENRE + "1\tRock\tx\n2\tRock\tx\n", "line 2, saw 3"),
    "decimal commas": (EMOTION + "7,0,1,0,2,0,3\n", "line 2, saw 7"),
    "id with ..": (GENRE + "../1.npy\tRock\n", "line 2: .* no clip id such as"),
    "hidden file": (GENRE + "._1.npy\tRock\n", "line 2: .* no clip id"),
    "path of Windows": (GENRE + "x\\1\tRock\n", "no clip id"),
    "NUL": (GENRE + "1\0.npy\tRock\n", "holds NUL characters; expected a label file in UTF-8"),
    "no number": (EMOTION + "1,0.1,0.2,0.3\n2,0.1,high,0.3\n", "line 3: .*no number in"),
    "above 1": (EMOTION + "1,0.1,55,0.3\n", r"line 2: .*'55'.* no number in \[0, 1\]"),
    "below 0": (EMOTION + "1,0.1,-0.2,0.3\n", r"line 2: .* no number in \[0, 1\]"),
    "nan": (EMOTION + "1,0.1,0.2,nan\n", "no number in"),
    "two genres": (GENRE + "1.a\tRock\n2\tRock\n1.b\tJazz\n", "line 4: .* labelled otherwise"),
    "not UTF-8": ("Id\tGenre\n1\tfrançais\n".encode("latin-1"), "expected a label file in UTF-8"),
    "UTF-16": ("Id\tGenre\n1\tRock\n".encode("utf-16"), "expected a label file in UTF-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path, fault):
    text, words = FAULTS[fault]
    path = write(tmp_path / "l.txt", text)
    with pytest.raises(InputError, match=words) as error:
        read_labels(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value).splitlines()) == 1


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(InputError, match=f"^{path}: .*expected a label file"):
            read_labels(path)


TEXT = st.text(st.characters(codec="utf-8"), max_size=200)
PIECES = ["Id\tGenre", EMOTION.strip(), "1.a\tRock", "1\tJazz", "../1\tRock", "2,0.1,0.2,0.3",
          "2,.1,.2,.4", "", "\x0b", "a\x85b\tc", "3\t\"", "\0", "\t", ","]  # fmt: skip
LINES = st.lists(st.sampled_from(PIECES) | TEXT)


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(text=LINES.map("\n".join) | TEXT.map((GENRE + "{}").format) | st.binary(max_size=200))
def test_any_label_file_is_read_or_refused_in_one_line(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp().resolve()
    path = write(folder / "any.txt", text)
    try:
        labels = read_labels(path)
    except InputError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        return
    assert labels and len({clip_id for clip_id, _ in labels}) == len(labels)
    for clip_id, _ in labels:
        array = (folder / "train" / f"{clip_id}.fused.full.npy").resolve()
        assert array.parent == folder / "train", "an id leaves the folder of its split"


@pytest.mark.parametrize("parent", ["test", "multitask_dataset"])
def test_nothing_is_decided_by_a_parent_folder(tmp_path, parent):
    """A data root under a folder called `test` once turned training clips into test clips."""
    root = write_data_set(tmp_path / parent / "data", (2, 1), n_emotion=(4, 2), n_frames=30)
    sizes = {("genre", "train"): 40, ("genre", "test"): 20}
    sizes |= {("emotion", "train"): 4, ("emotion", "test"): 2}
    for (part, split), beat in itertools.product(sizes, (False, True)):
        entries = read_entries(root, part, split, beat)
        assert len(entries) == sizes[part, split]
        for entry in entries:
            assert entry.path.parent == part_folder(root, part, beat) / split
            # Whatever the label file calls it: the array's name is made of the id.
            assert entry.path.name == f"{entry.clip_id}.fused.full.npy"
            assert entry.path.exists()
        kind = str if part == "genre" else tuple if split == "train" else type(None)
        assert {type(entry.label) for entry in entries} == {kind}
    assert find_data(root) == root.resolve()


def test_of_clips_without_labels_all_files_are_entries_but_hidden_ones(own_data):
    """macOS leaves ._1.npy beside 1.npy, and such files ended step 8 after all training."""
    before = read_entries(own_data, "emotion", "test")
    assert len(before) == 2
    for entry in before:
        entry.path.with_name(f"._{entry.path.name}").write_bytes(b"\0\5\26\7")
        entry.path.rename(f"{entry.path}.gz")  # of what is still compressed read_array says it
    assert read_entries(own_data, "emotion", "test") == before


def test_the_line_of_a_clip_is_its_own_and_not_that_of_a_longer_id(tmp_path):
    folder = part_folder(tmp_path, "genre")
    folder.mkdir()
    write(folder / "train_labels.txt", GENRE + "10408.x\tJazz\n 104.x \tRock\n104085.x\tPop\n")
    assert label_line(tmp_path, "104") == " 104.x <TAB>Rock"


def test_labels_of_the_other_part_are_refused(own_data):
    labels = own_data / "fma_genre_spectrograms/train_labels.txt"
    shutil.copy(own_data / "multitask_dataset/train_labels.txt", labels)
    with pytest.raises(InputError, match="expected genre labels"):
        read_entries(own_data, "genre", "train")
    shutil.rmtree(labels.parent)
    with pytest.raises(InputError, match="no such folder; --data-dir"):
        read_entries(own_data, "genre", "train")


def test_merge_gives_the_labs_ten_classes(data_dir):
    """Each clip's class is looked at: a swap of two classes would keep some counts."""
    for split in ("train", "test"):
        before = {e.clip_id: e.label for e in read_entries(data_dir, "genre", split)}
        after = {e.clip_id: e.label for e in read_entries(data_dir, "genre", split, merge=True)}
        assert after == {i: MERGED[genre] for i, genre in before.items() if genre in MERGED}
    assert set(before.values()) == set(MERGE) == set(GENRES)


@pytest.mark.parametrize(("genre", "words"), [("Rebetiko", "'Rebetiko'"), ("Old-Time", "drops")])
def test_classes_that_the_merge_cannot_take(own_data, genre, words):
    path = own_data / "fma_genre_spectrograms/train_labels.txt"
    rows = [row.partition("\t")[0] for row in path.read_text().splitlines()[1:]]
    write(path, GENRE + "".join(f"{row}\t{genre}\n" for row in rows))
    with pytest.raises(InputError, match=f"{path}.*{words}.*--no-merge"):
        read_entries(own_data, "genre", "train", merge=True)
    assert {entry.label for entry in read_entries(own_data, "genre", "train")} == {genre}


def test_fingerprint_is_of_labels_and_not_of_their_order(own_data):
    kinds = [(part, beat) for part in FOLDERS for beat in (False, True)]
    before = {kind: fingerprint(own_data, *kind) for kind in kinds}
    assert before[kinds[0]] != before[kinds[2]]
    for part, beat in kinds:
        path = part_folder(own_data, part, beat) / "train_labels.txt"
        header, *rows = path.read_text().splitlines()
        for end, order in (("\n", rows[::-1]), ("\r\n", rows)):
            write(path, end.join([header, *order]) + end)
            assert fingerprint(own_data, part, beat) == before[part, beat]
        changed = rows[0].replace(*(("\t", "\tX") if part == "genre" else (",0.", ",0.0")), 1)
        for other in ([changed, *rows[1:]], rows[1:], ["1" + rows[0], *rows[1:]]):
            assert other != rows
            write(path, "\n".join([header, *other]) + "\n")
            assert fingerprint(own_data, part, beat) != before[part, beat]
        path.unlink()
        assert fingerprint(own_data, part, beat) is None
