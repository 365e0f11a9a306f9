"""The data layer, from label file to batch, and what the backbones make of padding."""

import ast
import os
import shutil
import threading
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import COUNTS, GENRES, MERGED, fake_clip, labels_of, patch_everywhere, write_data_set
from torch import nn
from torch.utils.data import DataLoader, Subset

import common
import patrec.clips
import patrec.files
import patrec.flags
import patrec.labels
import patrec.splits
import patrec.step
from common import CNNBackbone, LSTMBackbone, SpectrogramDataset, load_data
from patrec.clips import load_clips, read_array
from patrec.errors import InputError
from patrec.flags import Source
from patrec.labels import read_entries, read_labels


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def own_data(tmp_path):
    """A data set that a test may spoil."""
    return write_data_set(tmp_path / "own", per_class=(3, 1), n_emotion=(8, 2), n_frames=40)


# --- label files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["104085.fused.full.npy.gz", "104085.beatsync.fused.npy.gz", "104085.full.fused.npy.gz"]
)
def test_genre_labels_of_every_form(tmp_path, name):
    assert read_labels(write(tmp_path / "l.txt", f"Id\tGenre\n{name}\tPsych-Folk\n")) == [
        ("104085", "Psych-Folk")
    ]


def test_emotion_labels_have_a_bare_id(tmp_path):
    path = write(
        tmp_path / "l.txt", "Id,valence,energy,danceability\n123212738,0.153,0.961,0.013\n"
    )
    assert read_labels(path) == [("123212738", (0.153, 0.961, 0.013))]


def test_emotion_columns_are_found_by_name(tmp_path):
    """Bug 2: fixed column numbers loaded valence as energy, or ids as labels."""
    path = write(tmp_path / "l.txt", "Id,danceability,valence,energy\n7,0.3,0.1,0.2\n")
    assert read_labels(path) == [("7", (0.1, 0.2, 0.3))]


def test_labels_survive_bom_crlf_blank_lines_and_repeats(tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes(
        b"\xef\xbb\xbfId\tGenre\r\n1.fused.full.npy.gz\tRock\r\n\r\n1.fused.full.npy.gz\tRock\r\n2.fused.full.npy.gz\tHip-Hop\r\n"
    )
    assert read_labels(path) == [("1", "Rock"), ("2", "Hip-Hop")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("Id\tGenre\n", "no clips"),
        ("Id,Genre\n1,Rock\n", "tab"),
        ("Id,valence,energy\n1,0.1,0.2\n", "header"),
        ("Id\tGenre\n1.fused.full.npy.gz\n", "line 2"),
        ("Id\tGenre\n../1.npy\tRock\n", "line 2"),
        ("Id\tGenre\n1.a\tRock\n1.b\tJazz\n", "labelled"),
        ("Id,valence,energy,danceability\n1,0.1,0.2,x\n", "no number"),
        ("Id,valence,energy,danceability\n1,0.1,0.2,1.5\n", "outside"),
        ("Id,valence,energy,danceability\n1,0.1,0.2,nan\n", "outside"),
    ],
)
def test_bad_labels_are_named(tmp_path, text, words):
    path = write(tmp_path / "l.txt", text)
    with pytest.raises(InputError, match=words) as error:
        read_labels(path)
    assert str(path) in str(error.value)


def test_missing_label_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.txt: label file missing"):
        read_labels(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("parent", ["test", "train", "beat", "multitask_dataset"])
def test_nothing_is_decided_by_a_parent_folder(tmp_path, parent):
    """A data root under a folder called `test` once turned training clips into test clips."""
    root = write_data_set(
        tmp_path / parent / "data", per_class=(2, 1), n_emotion=(4, 2), n_frames=30
    )
    for part, split, n in (
        ("genre", "train", 40),
        ("genre", "test", 20),
        ("emotion", "train", 4),
        ("emotion", "test", 2),
    ):
        for beat in (False, True):
            entries = read_entries(root, part, split, beat)
            assert len(entries) == n
            assert all(
                entry.path.parent == patrec.files.part_folder(root, part, beat) / split
                and entry.path.exists()
                for entry in entries
            )
            kinds = {type(entry.label) for entry in entries}
            assert kinds == {str if part == "genre" else tuple if split == "train" else type(None)}
    assert patrec.files.find_data(root) == root.resolve()


def test_file_name_is_the_same_whatever_the_label_file_calls_it(data_dir):
    for beat in (False, True):
        for split in ("train", "test"):
            entry = read_entries(data_dir, "genre", split, beat)[0]
            assert entry.path.name == f"{entry.clip_id}.fused.full.npy"


def test_labels_of_the_other_part_are_refused(own_data):
    shutil.copy(
        own_data / "multitask_dataset/train_labels.txt",
        own_data / "fma_genre_spectrograms/train_labels.txt",
    )
    with pytest.raises(InputError, match="expected genre labels"):
        read_entries(own_data, "genre", "train")


# --- classes --------------------------------------------------------------------------


def test_merge_gives_the_labs_ten_classes(data_dir):
    """The counts follow from the lab's table.

    Each clip's class is looked at too: a swap of two classes would keep some counts.
    """
    for number, split in enumerate(("train", "test")):
        before = {entry.clip_id: entry.label for entry in read_entries(data_dir, "genre", split)}
        after = {
            entry.clip_id: entry.label
            for entry in read_entries(data_dir, "genre", split, merge=True)
        }
        assert Counter(before.values()) == {
            genre: counts[number] for genre, counts in COUNTS.items()
        }
        assert after == {
            clip_id: MERGED[genre] for clip_id, genre in before.items() if genre in MERGED
        }
    assert set(patrec.labels.MERGE) == set(GENRES)


def test_unknown_class_is_refused_by_the_merge_only(own_data):
    path = own_data / "fma_genre_spectrograms/train_labels.txt"
    write(path, path.read_text().replace("\tBlues", "\tRebetiko"))
    with pytest.raises(InputError, match="Rebetiko.*--no-merge"):
        read_entries(own_data, "genre", "train", merge=True)
    assert "Rebetiko" in {entry.label for entry in read_entries(own_data, "genre", "train")}


def test_class_numbers_are_sorted_and_come_from_training(data_dir):
    """Bug 8: names in set() order, or an encoder fitted on the test set by itself."""
    data = load_data(Source(data_dir, seed=1), beat=True)
    assert data.names == sorted(data.names) and len(data.names) == 10
    names = {
        entry.clip_id: entry.label
        for entry in read_entries(data_dir, "genre", "train", True, merge=True)
    }
    whole = data.train.dataset
    for entry, target in zip(whole.store.entries, whole.targets.tolist(), strict=True):
        assert data.names[target] == names[entry.clip_id]
    # Taken away the first class from a test set, the others keep their numbers.
    some = [
        entry
        for entry in read_entries(data_dir, "genre", "test", True, merge=True)
        if entry.label != "Blues"
    ]
    assert [data.names[k] for k in patrec.splits.encode_labels(some, data.names)] == [
        entry.label for entry in some
    ]
    with pytest.raises(InputError, match="Rebetiko"):
        patrec.splits.encode_labels([some[0]._replace(label="Rebetiko")], data.names)


# --- arrays and their cache -----------------------------------------------------------


def spoil(array, how):
    if how == "nan":
        array[3, 4] = np.nan
    elif how == "inf":
        array[130, 4] = np.inf
    elif how == "positive dB":
        array[0, 0] = 12.0
    elif how == "below the floor":
        array[0, 0] = -95.0
    elif how == "silence":
        array[:128] = -80.0
    elif how == "chroma":
        array[139, 0] = 1.7
    elif how == "transposed":
        return array.T
    elif how == "rows":
        return array[:128]
    elif how == "integers":
        return array.astype(int)
    elif how == "no frames":
        return array[:, :0]
    elif how == "objects":
        return array.astype(object)
    return array


BAD_ARRAYS = {
    "nan": "NaN",
    "inf": "NaN or infinite",
    "positive dB": "mel rows span",
    "below the floor": "mel rows span",
    "chroma": "chroma rows span",
    "silence": "silence",
    "transposed": "transposed",
    "rows": r"shape \(128",
    "integers": "type int",
    "no frames": "no frames",
    "objects": "not a readable",
}


@pytest.mark.parametrize(("how", "words"), BAD_ARRAYS.items())
def test_bad_arrays_are_named(tmp_path, how, words):
    path = tmp_path / "1.fused.full.npy"
    np.save(path, spoil(fake_clip(np.random.default_rng(0), 0.5, 20), how), allow_pickle=True)
    with pytest.raises(InputError, match=words) as error:
        read_array(path)
    assert str(path) in str(error.value) and "--skip-bad" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not an array", None])
def test_unreadable_arrays_are_named(tmp_path, content):
    path = tmp_path / "1.fused.full.npy"
    np.save(path, fake_clip(np.random.default_rng(0), 0.5, 20))
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)  # None: truncated
    with pytest.raises(InputError, match="not a readable"):
        read_array(path)
    with pytest.raises(InputError, match="missing"):
        read_array(tmp_path / "2.fused.full.npy")


def test_store_holds_every_frame_of_every_clip_in_order(data_dir):
    """Bug 12: a limit of 150 frames silently kept 3.5 s of 30 s. Nothing is cut here."""
    entries = read_entries(data_dir, "genre", "train")
    store = load_clips(entries)
    assert [entry.clip_id for entry in store.entries] == [entry.clip_id for entry in entries]
    assert len(store.frames) == int(store.lengths.sum())
    for index in (0, 7, len(entries) - 1):
        array = np.load(entries[index].path)
        start = int(store.starts[index])
        kept = store.frames[start : start + int(store.lengths[index])].T.float().numpy()
        assert kept.shape == array.shape
        np.testing.assert_allclose(kept, array, atol=0.04)


def test_long_clips_come_out_whole(tmp_path):
    few = dict.fromkeys(GENRES, (0, 0)) | {"Rock": (3, 1)}
    root = write_data_set(tmp_path / "long", per_class=few, n_emotion=(2, 1), n_frames=2000)
    store = load_clips(read_entries(root, "genre", "train")[:3])
    dataset = SpectrogramDataset(store, [0, 1, 2])
    assert all(
        length >= 2000 and len(x) == length for x, _, length in (dataset[i] for i in range(3))
    )


def test_second_start_reads_the_cache_and_not_the_files(own_data, monkeypatch):
    entries = read_entries(own_data, "genre", "train")
    first = load_clips(entries)
    patch_everywhere(
        monkeypatch, "read_array", lambda path, lock: pytest.fail(f"{path} was read again")
    )
    again = load_clips(entries)
    assert (
        torch.equal(first.frames, again.frames)
        and again.entries == first.entries
        and again.digests == first.digests
    )


def test_a_changed_file_is_read_anew(own_data):
    entries = read_entries(own_data, "genre", "train")
    before = load_clips(entries)
    path, stat = entries[2].path, entries[2].path.stat()
    array = np.load(path)
    array[:128] = -33.0
    array[0] = -44.0
    np.save(path, array)  # same name, same size: only the time tells
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    after = load_clips(entries)
    start, length = int(after.starts[2]), int(after.lengths[2])
    assert (after.frames[start : start + length, 1:128] == -33).all()
    assert not torch.equal(before.frames, after.frames)


def test_a_file_that_vanished_is_noticed_in_spite_of_the_cache(own_data):
    entries = read_entries(own_data, "genre", "train")
    load_clips(entries)
    entries[1].path.unlink()
    with pytest.raises(InputError, match=f"{entries[1].clip_id}.*missing"):
        load_clips(entries)


def test_bad_files_stop_or_are_left_out_also_from_the_cache(own_data, capsys):
    entries = read_entries(own_data, "genre", "train")
    np.save(entries[4].path, np.full((140, 9), np.nan))
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError, match=entries[4].clip_id):
            load_clips(entries)
        store = load_clips(entries, skip_bad=True)
        assert len(store.entries) == len(store.lengths) == len(entries) - 1
        assert f"left out: {entries[4].path}" in capsys.readouterr().err
        assert entries[4] not in store.entries
        # The clips after the bad one keep their own frames.
        start, length = int(store.starts[4]), int(store.lengths[4])
        np.testing.assert_allclose(
            store.frames[start : start + length].T.float().numpy(),
            np.load(entries[5].path),
            atol=0.04,
        )


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_clip_that_failed_for_a_moment_is_read_again(own_data, monkeypatch, skip_bad):
    """A share that hangs once must not brand a clip as bad for as long as the cache lives."""
    entries = read_entries(own_data, "genre", "train")

    def fails(path, *lock):
        if path == entries[4].path:
            raise InputError(f"{path}: not a readable .npy array (Input/output error)")
        return read_array(path, *lock)

    with monkeypatch.context() as patch:
        patch_everywhere(patch, "read_array", fails)
        if skip_bad:
            assert len(load_clips(entries, skip_bad=True).entries) == len(entries) - 1
        else:
            with pytest.raises(InputError, match="Input/output error"):
                load_clips(entries)
    assert load_clips(entries, skip_bad).entries == entries


def test_headers_are_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """Up to CPython 3.11.7 `ast`, which NumPy reads headers with, is not safe in threads.

    Sound clips would be called broken.

    Clips of unlike lengths, or a header read once would serve for all of them.
    """
    clip = fake_clip(np.random.default_rng(0), 0.5, 64)
    entries = [patrec.labels.Entry(str(n), tmp_path / f"{n}.npy", "x") for n in range(20, 60)]
    for n, entry in enumerate(entries, start=20):
        np.save(entry.path, clip[:, :n])
    parse, turn, at_once = ast.literal_eval, threading.Lock(), []

    def slow(*args):
        at_once.append(turn.acquire(blocking=False))
        time.sleep(0.002)  # long enough for another thread to come in
        if at_once[-1]:
            turn.release()
        return parse(*args)

    monkeypatch.setattr(ast, "literal_eval", slow)
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "cache"))
    assert len(load_clips(entries, threads=8).entries) == 40
    assert len(at_once) >= 40 and all(at_once), "two threads were in the parser at once"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<f2"])
def test_every_npy_layout_is_read_as_numpy_reads_it(tmp_path, order, version, dtype):
    path = tmp_path / "1.fused.full.npy"
    array = np.asarray(fake_clip(np.random.default_rng(0), 0.5, 20), dtype, order)
    with open(path, "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that old NumPy cannot read versions 2 and 3
        np.lib.format.write_array(file, array, version)
    read = read_array(path)
    np.testing.assert_array_equal(read, np.load(path).astype(np.float32))
    assert read.flags.writeable  # torch warns of arrays that are not


def test_cache_is_not_shared_between_sets_of_clips(data_dir):
    entries = read_entries(data_dir, "genre", "train")
    some, others = load_clips(entries[:5]), load_clips(entries[5:9])
    assert [e.clip_id for e in some.entries] == [e.clip_id for e in entries[:5]]
    assert [e.clip_id for e in others.entries] == [e.clip_id for e in entries[5:9]]
    assert len(others.lengths) == 4


def test_leak_is_found_by_id_and_by_content(own_data):
    train, test = (read_entries(own_data, "genre", split) for split in ("train", "test"))
    assert patrec.clips.find_leak(load_clips(train), load_clips(test)) == []
    shutil.copy(train[0].path, test[0].path)  # the same array under another id
    same_id = test[1]._replace(clip_id=train[1].clip_id)
    found = patrec.clips.find_leak(load_clips(train), load_clips([test[0], same_id, *test[2:]]))
    assert found == [test[0].clip_id, train[1].clip_id]


def test_leak_is_looked_for_in_the_form_that_is_tested_too(own_data):
    """Step 6 asks networks of frames for beats, which must not be a training clip's."""
    source = patrec.flags.Source(own_data)
    settings = common.load_data(source).settings
    assert len(common.load_test(source, settings, beat=True))
    train, test = (read_entries(own_data, "genre", part, True, True) for part in ("train", "test"))
    shutil.copy(train[0].path, test[0].path)
    with pytest.raises(InputError, match=f"1 test clips.*{test[0].clip_id}"):
        common.load_test(source, settings, beat=True)


# --- the Dataset ----------------------------------------------------------------------


@pytest.fixture
def beat_set(data_dir):
    """Beat-synchronised clips, whose lengths differ, with statistics of all of them."""
    entries = read_entries(data_dir, "genre", "train", beat=True)
    store = load_clips(entries)
    stats = common.band_statistics(store, range(len(entries)), "fused")
    return SpectrogramDataset(store, np.arange(len(entries)), "fused", stats)


def test_item_is_the_standardised_clip(beat_set):
    x, target, length = beat_set[3]
    array = np.load(beat_set.store.entries[3].path)
    mean, std = (value.numpy()[:, None] for value in beat_set.stats)
    assert (
        x.dtype == torch.float32
        and int(target) == 3
        and x.shape == (int(length), 140) == array.T.shape
    )
    np.testing.assert_allclose(x.T.numpy(), (array - mean) / std, atol=0.02)


@pytest.mark.parametrize(
    ("features", "rows"),
    [("mel", slice(0, 128)), ("chroma", slice(128, 140)), ("fused", slice(0, 140))],
)
def test_features_are_the_right_rows(data_dir, features, rows):
    entries = read_entries(data_dir, "genre", "train")[:4]
    dataset = SpectrogramDataset(load_clips(entries), range(4), features)
    np.testing.assert_allclose(dataset[2][0].T.numpy(), np.load(entries[2].path)[rows], atol=0.04)


def test_a_batch_is_its_items_padded(beat_set):
    indices = [5, 0, 90, 5]
    batch = beat_set.__getitems__(indices)
    longest = max(int(beat_set[i][2]) for i in indices)
    assert len({int(beat_set[i][2]) for i in indices}) > 1, (
        "the test wants clips of several lengths"
    )
    for (x, target, length), index in zip(batch, indices, strict=True):
        alone, its_target, its_length = beat_set[index]
        assert x.shape == (longest, 140) and target == its_target and length == its_length
        assert torch.equal(x[:length], alone)


def test_padding_is_the_mean_and_not_the_loudest_value(beat_set):
    """Bug 12: dB padded with zeros is padded with maximum loudness."""
    x, _, lengths = next(iter(DataLoader(beat_set, 32)))
    padding = torch.arange(x.shape[1]) >= lengths[:, None]
    assert padding.any()
    assert (x[padding] == 0).all()
    mean, std = beat_set.stats
    assert ((0 - mean[:128]) / std[:128]).min() > 1, (
        "0 dB lies far above the mean, so the check above tells the two apart"
    )


@pytest.mark.parametrize("subset", [False, True])
def test_loader_fetches_a_batch_at_once(beat_set, monkeypatch, subset):
    calls = []
    whole = SpectrogramDataset.__getitems__
    monkeypatch.setattr(
        SpectrogramDataset,
        "__getitems__",
        lambda self, indices: calls.append(len(indices)) or whole(self, indices),
    )
    dataset = Subset(beat_set, list(range(10, 50))) if subset else beat_set
    targets = torch.cat([y for _, y, _ in DataLoader(dataset, 16)])
    assert sum(calls) == len(dataset) and max(calls) == 16 and len(calls) == -(-len(dataset) // 16)
    assert targets.tolist() == (list(range(10, 50)) if subset else list(range(len(beat_set))))


def test_crops_are_random_and_stay_within_their_clip():
    """Every clip is filled with its own number, every frame's chroma with its place."""
    lengths = [50, 7, 30, 31]
    frames = torch.cat([torch.full((n, 140), float(i)) for i, n in enumerate(lengths)])
    frames[:, 139] = torch.cat([torch.arange(n) / 64 for n in lengths])
    entries = [patrec.labels.Entry(str(i), None, "x") for i in range(4)]
    store = patrec.clips.ClipStore(
        entries,
        frames.half(),
        torch.tensor([0, 50, 57, 87]),
        torch.tensor(lengths),
        ["a", "b", "c", "d"],
    )
    dataset = SpectrogramDataset(store, range(4), "fused", crop=30)
    torch.manual_seed(0)
    starts = {i: set() for i in range(4)}
    for _ in range(200):
        for i, (x, target, length) in enumerate(dataset.__getitems__([0, 1, 2, 3])):
            assert int(target) == i and int(length) == min(30, lengths[i])
            assert (x[:length, 0] == i).all(), "frames of another clip"
            place = (x[:length, 139] * 64).round()
            assert (place.diff() == 1).all() and place[-1] < lengths[i]
            starts[i].add(int(place[0]))
    assert (
        starts[0] == set(range(21))
        and starts[1] == {0}
        and starts[2] == {0}
        and starts[3] == {0, 1}
    )


def test_targets_must_match_the_clips(beat_set):
    with pytest.raises(ValueError, match="targets"):
        SpectrogramDataset(beat_set.store, [0, 1])


# --- statistics and split -------------------------------------------------------------


def test_statistics_come_from_the_training_part_only(tmp_path):
    """On clips so short that each of their frames counts."""
    root = write_data_set(tmp_path / "short", per_class=COUNTS, n_emotion=(2, 1), n_frames=60)
    data = load_data(Source(root, seed=3))
    store = load_clips(read_entries(root, "genre", "train", merge=True))
    arrays = [np.load(store.entries[i].path)[:128] for i in data.train.indices]
    frames = np.concatenate(arrays, axis=1)
    mean, std = (value.numpy() for value in data.settings["stats"])
    np.testing.assert_allclose(mean, frames.mean(1), atol=2e-3)
    np.testing.assert_allclose(std, frames.std(1), atol=2e-3)
    everything = np.concatenate([np.load(entry.path)[:128] for entry in store.entries], axis=1)
    assert np.abs(everything.mean(1) - frames.mean(1)).max() > 0.02, (
        "the two must differ for this test to tell anything"
    )


def test_statistics_of_a_silent_band_stay_finite():
    frames = torch.full((20, 140), -80.0).half()
    store = patrec.clips.ClipStore(
        [patrec.labels.Entry("1", None, "x")], frames, torch.tensor([0]), torch.tensor([20]), ["a"]
    )
    mean, std = common.band_statistics(store, [0])
    assert (mean == -80).all() and (std > 0).all()
    assert SpectrogramDataset(store, [0], "mel", (mean, std))[0][0].abs().max() == 0


def test_split_is_stratified_seeded_disjoint_and_covers_all():
    classes = np.repeat([0, 1, 2], [50, 30, 10])
    train, val = patrec.splits.split_indices(90, 0.2, 7, classes)
    assert sorted([*train, *val]) == list(range(90))
    assert np.bincount(classes[val]).tolist() == [10, 6, 2]
    for other_seed, same in ((7, True), (8, False)):
        again = patrec.splits.split_indices(90, 0.2, other_seed, classes)[1]
        assert (again.tolist() == val.tolist()) == same


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(InputError, match="single clip"):
        patrec.splits.split_indices(9, 0.2, 0, np.array([0] * 8 + [1]))
    with pytest.raises(InputError, match="too few"):
        patrec.splits.split_indices(1, 0.2, 0)


def test_validation_and_training_clips_of_a_data_set_do_not_overlap(data_dir):
    data = load_data(Source(data_dir, seed=1, subset=30), beat=True)
    assert not set(data.train.indices) & set(data.val.indices)
    assert len(data.train) == 30
    assert {int(data.train.dataset.targets[i]) for i in data.train.indices} == set(range(10))


def parts_of(data):
    """Ids of the three parts, row by row."""
    return [common.clip_ids(part) for part in (data.train, data.val, data.held_out)]


@pytest.mark.parametrize("target", ["genre", "emotion"])
def test_every_network_hears_the_same_parts_whatever_the_order_of_the_label_files(own_data, target):
    """Frames and beats, mel and chroma: what one network trains on, none is validated with."""
    part = "genre" if target == "genre" else "emotion"
    path = patrec.files.part_folder(own_data, part, beat=True) / "train_labels.txt"
    header, *rows = path.read_text().splitlines()
    orders = (rows, rows[::-1], sorted(rows))
    n_folds = 1 if target == "genre" else 2
    n_clips = len(labels_of(own_data, part))
    for fold in range(n_folds):
        cut = {"fold": fold, "n_folds": n_folds}
        full = parts_of(load_data(Source(own_data), "mel", False, target, **cut))
        assert parts_of(load_data(Source(own_data), "chroma", False, target, **cut)) == full
        for order in orders:
            write(path, "\n".join([header, *order]) + "\n")
            assert parts_of(load_data(Source(own_data), "mel", True, target, **cut)) == full
        assert sorted(sum(full, [])) == sorted(labels_of(own_data, part))
        assert len(full[0]) > len(full[1]) > 0
        assert len(full[2]) == (0 if target == "genre" else n_clips / 2)
    # And the cut does depend on the seed.
    assert parts_of(load_data(Source(own_data, seed=7), "mel", False, target, **cut)) != full


def test_targets_go_with_their_clips_and_not_with_a_row_number(own_data):
    """The files list clips in different orders; each clip keeps its own label in both."""
    for target in ("genre", "emotion", "energy"):
        part = "genre" if target == "genre" else "emotion"
        labels = labels_of(own_data, part)
        for beat in (False, True):
            data = load_data(Source(own_data), "mel", beat, target, n_folds=2)
            for subset in (data.train, data.val, data.held_out):
                if not len(subset):
                    continue
                true = common.true_labels(subset, data.settings)
                if target == "genre":
                    assert true.to_dict() == {i: labels[i] for i in true.index}
                    continue
                columns = [patrec.labels.EMOTIONS.index(name) for name in true.columns]
                for clip_id, row in true.iterrows():
                    assert row.tolist() == pytest.approx([labels[clip_id][k] for k in columns])


@pytest.mark.parametrize("n_folds", [2, 3, 4])
def test_folds_hold_every_clip_out_once(own_data, n_folds):
    labels = dict.fromkeys(map(str, range(23)), (0.5, 0.5, 0.5))
    source = Source(own_data / "nowhere")  # then the order is that of the labels
    cuts = [
        patrec.splits.split_ids(source, "emotion", labels, fold, n_folds) for fold in range(n_folds)
    ]
    for parts in cuts:
        assert sorted(sum(parts, [])) == sorted(labels), "parts overlap, or miss a clip"
    held_out = [clip_id for _, _, part in cuts for clip_id in part]
    assert sorted(held_out) == sorted(labels)
    assert patrec.splits.split_ids(source, "emotion", labels, 1, n_folds) == cuts[1]
    with pytest.raises(InputError, match="too few for"):
        patrec.splits.split_ids(
            source, "emotion", dict(list(labels.items())[: 4 * n_folds - 1]), 0, n_folds
        )


def test_parts_without_a_readable_clip_are_one_error(own_data):
    data = load_data(Source(own_data), target="emotion", n_folds=2)
    (clip_id,) = common.clip_ids(data.val)
    (own_data / "multitask_dataset" / "train" / f"{clip_id}.fused.full.npy").write_bytes(b"")
    with pytest.raises(InputError, match="multitask_dataset.*no readable clip"):
        load_data(Source(own_data, skip_bad=True), target="emotion", n_folds=2)


def test_labels_of_training_clips_alone_scale_an_emotion(own_data):
    data = load_data(Source(own_data), target="energy", n_folds=2)
    labels = labels_of(own_data, "emotion")
    known = [labels[clip_id][1] for clip_id in common.clip_ids(data.train)]
    assert data.mean == pytest.approx([np.mean(known)], abs=1e-6)
    assert data.std == pytest.approx([np.std(known)], abs=1e-6)


def test_priors_are_shares_of_the_training_part_and_never_zero(own_data, capsys):
    """A class whose only training clips are bad must not become an infinite logit."""
    data = load_data(Source(own_data))
    named = Counter(common.true_labels(data.train, data.settings))
    shares = [named[name] / len(data.train) for name in data.names]
    assert data.settings["priors"] == pytest.approx(shares)
    for entry in read_entries(own_data, "genre", "train", merge=True):
        if entry.label == "Blues" and entry.clip_id in common.clip_ids(data.train):
            entry.path.write_bytes(b"")
    data = load_data(Source(own_data, skip_bad=True))
    logits = common.adjust_logits(torch.zeros(2, len(data.names)), data.settings["priors"])
    assert "left out" in capsys.readouterr().err and logits.isfinite().all()


def test_fingerprint_is_of_labels_and_not_of_their_order(own_data):
    kinds = [(part, beat) for part in patrec.files.FOLDERS for beat in (False, True)]
    before = {kind: patrec.labels.fingerprint(own_data, *kind) for kind in kinds}
    assert before[kinds[0]] != before[kinds[2]]
    for part, beat in kinds:
        path = patrec.files.part_folder(own_data, part, beat) / "train_labels.txt"
        header, *rows = path.read_text().splitlines()
        write(path, "\n".join([header, *rows[::-1]]) + "\n")
        assert patrec.labels.fingerprint(own_data, part, beat) == before[part, beat]
        path.write_bytes("\r\n".join([header, *rows]).encode() + b"\r\n")
        assert patrec.labels.fingerprint(own_data, part, beat) == before[part, beat]
        changed = rows[0].replace(*(("\t", "\tX") if part == "genre" else (",0.", ",0.0")), 1)
        for other in ([changed, *rows[1:]], rows[1:], ["1" + rows[0], *rows[1:]]):
            assert other != rows
            write(path, "\n".join([header, *other]) + "\n")
            assert patrec.labels.fingerprint(own_data, part, beat) != before[part, beat]


# --- padding and lengths through the networks -----------------------------------------


def backbones():
    torch.manual_seed(0)
    options = [
        {"readout": readout, "bidirectional": both, "frames_per_step": n}
        for readout in ("pool", "last")
        for both in (True, False)
        for n in (1, 4)
    ]
    networks = {
        f"lstm {' '.join(map(str, option.values()))}": LSTMBackbone(
            20, hidden_size=8, n_layers=2, **option
        )
        for option in options
    }
    networks["cnn"] = CNNBackbone(20, channels=(4, 4, 6, 8))
    return networks


def test_an_lstm_is_scored_without_dropout():
    torch.manual_seed(0)
    model = common.Classifier(LSTMBackbone(20, hidden_size=8, n_layers=2), 3).train()
    loader = DataLoader([(torch.randn(40, 20), torch.tensor(0), torch.tensor(40))])
    first, second = (common.predict(model, loader)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", list(backbones()))
def test_a_clip_gives_the_same_vector_however_far_it_is_padded(name):
    """Bug 5: the last step, or the backward direction, was taken in the padding."""
    network = backbones()[name].eval()
    x = torch.randn(3, 61, 20)
    lengths = torch.tensor([61, 40, 17])
    for i in range(3):
        x[i, lengths[i] :] = 0
    with torch.inference_mode():
        together = network(x, lengths)
        assert together.shape == (3, network.feature_size)
        for extra in (0, 1, 50):
            for i, n in enumerate(lengths.tolist()):
                padded = nn.functional.pad(x[i : i + 1, :n], (0, 0, 0, extra))
                torch.testing.assert_close(
                    network(padded, lengths[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("frames_per_step", [1, 4])
def test_bidirectional_lstm_reads_both_ends(frames_per_step):
    """Bug 5: at the last step the backward direction has read one step only.

    Each half of the vector must depend on the far end of the clip: forwards on the first
    frame, backwards on the last.
    """
    torch.manual_seed(0)
    network = LSTMBackbone(
        6,
        hidden_size=5,
        n_layers=1,
        bidirectional=True,
        readout="last",
        frames_per_step=frames_per_step,
    ).eval()
    x = torch.randn(1, 12, 6, requires_grad=True)
    lengths = torch.tensor([12])
    for half in (slice(0, 5), slice(5, 10)):
        (gradient,) = torch.autograd.grad(network(x, lengths)[0, half].square().sum(), x)
        reached = gradient[0].norm(dim=1) > 0
        assert reached.all(), (
            f"frames {torch.nonzero(~reached).flatten().tolist()} never reach this direction"
        )


def test_stripes_are_cut_in_training_only_and_alike_in_means_spreads_and_changes():
    mask, x = common.StripeMask(16, widest=4), torch.ones(50, 20, 48)
    torch.manual_seed(0)
    means, spreads, changes = mask(x).chunk(3, dim=2)
    assert torch.equal(means, spreads) and torch.equal(means, changes)
    bands = (means == 0).all(1).sum(1)  # (50,) bands blank throughout a clip
    steps = (means == 0).all(2).sum(1)
    assert 0 < bands.max() <= 4 and 0 < steps.max() <= 3  # 15% of 20 steps
    assert len({tuple(row) for row in (means == 0).all(1).tolist()}) > 10  # each clip its own
    assert torch.equal(mask.eval()(x), x)


def test_steps_are_described_by_mean_spread_and_change_of_their_own_frames():
    torch.manual_seed(0)
    lengths = torch.tensor([11, 6])
    x = torch.randn(2, 11, 5).masked_fill(
        torch.arange(11)[None, :, None] >= lengths[:, None, None], 0.0
    )
    steps, n_steps = common.frame_statistics(x, lengths, 4)
    assert steps.shape == (2, 3, 15) and n_steps.tolist() == [3, 2]
    for clip, length in enumerate(lengths.tolist()):
        frames = x[clip, :length].numpy()
        change = np.abs(np.diff(frames, axis=0, prepend=frames[:1]))
        for step in range(n_steps[clip]):
            part = slice(4 * step, 4 * step + 4)
            expected = [frames[part].mean(0), frames[part].std(0), change[part].mean(0)]
            np.testing.assert_allclose(steps[clip, step], np.concatenate(expected), atol=1e-5)


def test_every_feature_of_a_step_reaches_the_lstm_standardised():
    backbone = LSTMBackbone(6, frames_per_step=4, projection=5)
    x = 30 + 7 * torch.randn(64, 40, 6)
    steps, _ = common.frame_statistics(x, torch.full((64,), 40), 4)
    normed = backbone.stem[0](steps).flatten(0, 1)
    assert normed.mean(0).abs().max() < 1e-3 and (normed.std(0) - 1).abs().max() < 0.01


def test_backward_direction_is_the_forward_one_of_the_reversed_clip():
    torch.manual_seed(0)
    network = LSTMBackbone(6, hidden_size=5, n_layers=1, bidirectional=True, readout="last").eval()
    forward_lstm, backward_lstm = (
        module for module in network.modules() if isinstance(module, nn.LSTM)
    )
    backward_lstm.load_state_dict(forward_lstm.state_dict())
    x = torch.randn(1, 9, 6)
    with torch.inference_mode():
        out = network(torch.cat([x, torch.zeros(1, 4, 6)], 1), torch.tensor([9]))
        turned = network(torch.cat([x.flip(1), torch.zeros(1, 4, 6)], 1), torch.tensor([9]))
    torch.testing.assert_close(out[:, :5], turned[:, 5:])
    torch.testing.assert_close(out[:, 5:], turned[:, :5])


@pytest.mark.parametrize("name", list(backbones()))
def test_a_batch_of_one_clip_stays_a_batch(name):
    """Bug 11: .squeeze() made a last batch of one clip a scalar."""
    network = backbones()[name].eval()
    x, lengths = torch.randn(1, 33, 20), torch.tensor([33])
    for head, shape in (
        (common.Classifier(network, 4), (1, 4)),
        (common.Regressor(network, ["energy"], [0.5], [0.2]), (1, 1)),
        (common.Regressor(network, patrec.labels.EMOTIONS, [0.5] * 3, [0.2] * 3), (1, 3)),
    ):
        head.eval()
        assert head(x, lengths).shape == shape
        dataset = [(x[0], torch.tensor(0), lengths[0])]
        outputs, targets = common.predict(head, DataLoader(dataset, 4))
        assert outputs.shape == shape and targets.shape == (1,)


@pytest.mark.parametrize("name", list(backbones()))
def test_no_weight_depends_on_the_length_of_a_clip(name):
    """Bug 6: layers made inside forward, sizes taken from the longest test clip."""
    network = backbones()[name].train()
    before = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    for n_frames in (1, 5, 90, 700):
        assert network(
            torch.randn(2, n_frames, 20), torch.tensor([n_frames, max(1, n_frames - 3)])
        ).shape == (2, network.feature_size)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == before


def test_predict_computes_few_windows_at_once():
    """All windows of a batch in one go took gigabytes, and four times as long."""
    torch.manual_seed(0)
    model = common.Classifier(CNNBackbone(20, channels=(4, 4, 6, 8)), 3)
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    clips = [(torch.randn(640, 20), torch.tensor(0), torch.tensor(640)) for _ in range(9)]
    outputs = {n: common.predict(model, DataLoader(clips, n), window=64)[0] for n in (1, 9)}
    assert max(sizes) == 128 and sum(sizes) == 2 * 9 * 19
    torch.testing.assert_close(outputs[9], outputs[1])


def test_predict_scores_in_evaluation_mode():
    """Bug 4: dropout and batch norm stayed on, so the same clip scored differently each time."""
    torch.manual_seed(0)
    model = common.Classifier(CNNBackbone(20, channels=(4, 4, 6, 8)), 3).train()
    buffers = [value.clone() for value in model.buffers()]
    loader = DataLoader(
        [(torch.randn(40, 20), torch.tensor(0), torch.tensor(40)) for _ in range(6)], 3
    )
    first, _ = common.predict(model, loader)
    model.train()
    second, _ = common.predict(model, loader)
    assert torch.equal(first, second)
    assert all(torch.equal(old, new) for old, new in zip(buffers, model.buffers(), strict=True)), (
        "scoring moved the running statistics"
    )


@pytest.mark.parametrize("target", ["genre", "emotion"])
def test_only_training_clips_are_cropped(own_data, target):
    data = load_data(Source(own_data), target=target, crop=10, n_folds=2)
    for part, shortest in ((data.train, 10), (data.val, 40), (data.held_out, 40)):
        lengths = [int(length) for _, _, length in (part[i] for i in range(len(part)))]
        assert all(shortest <= n <= (10 if shortest == 10 else 42) for n in lengths), lengths


def test_statistics_that_are_given_are_used(own_data):
    """Of the network that is continued: its filters expect them. And test clips get them too."""
    given = torch.full((128,), -40.0), torch.full((128,), 5.0)
    for target in ("genre", "energy"):
        data = load_data(Source(own_data), target=target, stats=given, n_folds=2)
        assert data.settings["stats"] is given
        part = data.train.dataset
        array = np.load(part.store.entries[2].path)[:128]
        np.testing.assert_allclose(part[2][0].T.numpy(), (array + 40) / 5, atol=0.01)
        test = common.load_test(Source(own_data), data.settings)
        array = np.load(test.store.entries[1].path)[:128]
        np.testing.assert_allclose(test[1][0].T.numpy(), (array + 40) / 5, atol=0.01)


def test_regressor_answers_in_the_labels_units_and_in_the_order_of_its_names():
    names = ["energy", "danceability"]
    model = common.Regressor(LSTMBackbone(6, hidden_size=4), names, [0.4, 0.7], [0.2, 0.1]).eval()
    for name, z in (("energy", 1.0), ("danceability", -3.0)):
        nn.init.zeros_(model.heads[name].weight)
        nn.init.constant_(model.heads[name].bias, z)
    answers = model(torch.randn(2, 9, 6), torch.tensor([9, 7]))
    torch.testing.assert_close(answers, torch.tensor([[0.6, 0.4], [0.6, 0.4]]))
