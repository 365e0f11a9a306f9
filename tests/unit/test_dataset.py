"""The Dataset and load_data: every item is its clip's, and no part learns from another."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import COUNTS, labels_of, write_data_set
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import SpectrogramDataset, load_data, load_test
from patrec.clips import ClipStore, load_clips
from patrec.errors import InputError
from patrec.files import part_folder
from patrec.flags import Source
from patrec.labels import EMOTIONS, Entry, read_entries
from patrec.splits import encode_labels, split_ids, split_indices


@pytest.fixture
def beat_set(data_dir):
    """Beat-synchronised clips, whose lengths differ, with statistics of all of them."""
    entries = read_entries(data_dir, "genre", "train", beat=True)
    store = load_clips(entries)
    stats = common.band_statistics(store, range(len(entries)), "fused")
    return SpectrogramDataset(store, np.arange(len(entries)), "fused", stats)


def clip_store(arrays):
    """A ClipStore of (140, T) arrays."""
    lengths = torch.tensor([array.shape[1] for array in arrays])
    frames = torch.from_numpy(np.concatenate(arrays, axis=1).T.astype(np.float16).copy())
    ids = [str(i) for i in range(len(arrays))]
    entries = [Entry(i, None, "Rock") for i in ids]
    return ClipStore(entries, frames, lengths.cumsum(0) - lengths, lengths, ids)


def test_a_batch_is_its_items_padded_with_the_mean_and_not_the_loudest_value(beat_set):
    """Bug 12: dB padded with zeros is padded with maximum loudness."""
    indices = [5, 0, 90, 5]
    lengths = {int(beat_set[i][2]) for i in indices}
    assert len(lengths) > 1, "the test wants clips of several lengths"
    for (x, target, length), index in zip(beat_set.__getitems__(indices), indices, strict=True):
        alone, its_target, its_length = beat_set[index]
        assert x.shape == (max(lengths), 140) and target == its_target and length == its_length
        assert torch.equal(x[:length], alone) and (x[length:] == 0).all()
    mean, std = beat_set.stats
    assert ((0 - mean[:128]) / std[:128]).min() > 1, "0 dB lies far above the mean"


def test_crops_are_random_and_stay_within_their_clip():
    """Every clip is filled with its own number, every frame's chroma with its place."""
    lengths = [50, 7, 30, 31]
    arrays = [np.full((140, n), float(i)) for i, n in enumerate(lengths)]
    for array in arrays:
        array[139] = np.arange(array.shape[1]) / 64
    dataset = SpectrogramDataset(clip_store(arrays), range(4), "fused", crop=30)
    torch.manual_seed(0)
    starts = [set() for _ in range(4)]
    for _ in range(200):
        for i, (x, target, length) in enumerate(dataset.__getitems__([0, 1, 2, 3])):
            assert int(target) == i and int(length) == min(30, lengths[i])
            assert (x[:length, 0] == i).all(), "frames of another clip"
            place = (x[:length, 139] * 64).round()
            assert (place.diff() == 1).all() and place[-1] < lengths[i]
            starts[i].add(int(place[0]))
    assert starts == [set(range(21)), {0}, {0}, {0, 1}]


def test_statistics_of_long_clips_are_of_all_their_parts():
    """Of a sample of their frames."""
    ramp = np.tile(np.linspace(-80, 0, 1293), (140, 1))
    mean, std = common.band_statistics(clip_store([ramp]), [0])
    assert mean == pytest.approx(-40, abs=0.5) and std == pytest.approx(ramp.std(), abs=0.5)


def test_statistics_of_a_silent_band_stay_finite():
    store = clip_store([np.full((140, 20), -80.0)])
    mean, std = common.band_statistics(store, [0])
    assert (mean == -80).all() and (std > 0).all()
    assert SpectrogramDataset(store, [0], "mel", (mean, std))[0][0].abs().max() == 0


def test_statistics_come_from_the_training_part_only(tmp_path):
    """On clips so short that each of their frames counts."""
    root = write_data_set(tmp_path / "short", COUNTS, n_emotion=(2, 1), n_frames=60)
    data = load_data(Source(root, seed=3))
    arrays = [np.load(entry.path)[:128] for entry in data.train.dataset.store.entries]
    mean, std = (value.numpy() for value in data.settings["stats"])
    frames = np.concatenate([arrays[i] for i in data.train.indices], axis=1)
    np.testing.assert_allclose(mean, frames.mean(1), atol=2e-3)
    np.testing.assert_allclose(std, frames.std(1), atol=2e-3)
    everything = np.concatenate(arrays, axis=1)
    assert np.abs(everything.mean(1) - frames.mean(1)).max() > 0.02, (
        "the two must differ for this test to tell anything"
    )


def test_statistics_that_are_given_are_used(own_data):
    """Of the network that is continued: its filters expect them. And test clips get them too."""
    given = torch.full((128,), -40.0), torch.full((128,), 5.0)
    for target in ("genre", "energy"):
        data = load_data(Source(own_data), target=target, stats=given, n_folds=2)
        assert data.settings["stats"] is given
        for part in (data.train.dataset, load_test(Source(own_data), data.settings)):
            array = np.load(part.store.entries[1].path)[:128]
            np.testing.assert_allclose(part[1][0].T.numpy(), (array + 40) / 5, atol=0.01)


def write_marked(root, labels, draw):
    """Both parts in both forms, label files in any order, each array full of its clip's number."""
    header = {"genre": "Id\tGenre", "emotion": ",".join(["Id", *EMOTIONS])}
    for part, beat in itertools.product(labels, (False, True)):
        folder = part_folder(root, part, beat)
        (folder / "train").mkdir(parents=True)
        for number, clip_id in enumerate(labels[part], start=1):
            array = np.full((140, 1 + number % 3), -number - beat / 2, dtype=np.float32)
            array[1], array[128:] = -77, number / 64
            np.save(folder / "train" / f"{clip_id}.fused.full.npy", array)
        rows = [
            f"{clip_id}\t{label}" if part == "genre" else ",".join([clip_id, *map(str, label)])
            for clip_id, label in draw(st.permutations(list(labels[part].items())))
        ]
        (folder / "train_labels.txt").write_text("\n".join([header[part], *rows]) + "\n")


IDS = st.lists(st.from_regex("[0-9A-Z_-]{1,4}", fullmatch=True), unique=True, min_size=8)


@settings(derandomize=True, max_examples=8, deadline=None, database=None)
@given(ids=IDS, seed=st.integers(0, 9), subset=st.integers(3, 20), draw=st.data())
def test_every_item_is_its_clips_own_whatever_the_order_of_the_label_files(
    tmp_path_factory, ids, seed, subset, draw
):
    """Through cache, split, subset and Dataset: the frames, the label and the id of one clip."""
    labels = {
        "genre": {clip_id: ["Rock", "NA"][n % 2] for n, clip_id in enumerate(ids)},
        "emotion": {clip_id: (n / 64, 1 - n / 64, 0.5) for n, clip_id in enumerate(ids)},
    }
    root, cuts = tmp_path_factory.mktemp("marked"), {part: [] for part in labels}
    write_marked(root, labels, draw.draw)
    source = Source(root, seed=seed, merge=False, subset=subset)
    for part, beat, features in itertools.product(labels, (False, True), ("mel", "chroma")):
        data = load_data(source, features, beat, part, n_folds=2)
        parts = [data.train, data.val, data.held_out]
        cuts[part].append([common.clip_ids(one) for one in parts])
        mean, std = data.settings["stats"]
        for one, clip_ids in zip(parts, cuts[part][-1], strict=True):
            for clip_id, (x, target, length) in zip(clip_ids, one, strict=True):
                number = ids.index(clip_id) + 1
                frames = number / 64 if features == "chroma" else -number - beat / 2
                assert (x * std + mean)[0, 0].item() == pytest.approx(frames, abs=1e-3)
                assert int(length) == 1 + number % 3
                label = data.names[int(target)] if part == "genre" else target.tolist()
                own = labels[part][clip_id]
                assert label == (own if part == "genre" else pytest.approx(own))
            if len(clip_ids):
                true = common.true_labels(one, data.settings)
                assert true.index.tolist() == clip_ids
    for part in labels:  # what one network trains on, none is validated with
        assert all(cut == cuts[part][0] for cut in cuts[part])
        ids_of_parts = sum(cuts[part][0], [])
        assert len(ids_of_parts) == len(set(ids_of_parts)) and set(ids_of_parts) <= set(ids)


def test_class_numbers_are_sorted_and_come_from_training(data_dir):
    """Bug 8: names in set() order, or an encoder fitted on the test set by itself."""
    data = load_data(Source(data_dir, seed=1), beat=True)
    assert data.names == sorted(data.names) and len(data.names) == 10
    # Taken away the first class from a test set, the others keep their numbers.
    some = read_entries(data_dir, "genre", "test", True, merge=True)
    some = [entry for entry in some if entry.label != "Blues"]
    numbers = encode_labels(some, data.names)
    assert [data.names[k] for k in numbers] == [entry.label for entry in some]
    foreign = some[0]._replace(label="Rebetiko")
    with pytest.raises(InputError, match="test_labels.txt: class 'Rebetiko' does not occur.*mend"):
        encode_labels([foreign], data.names)


def test_split_is_stratified_seeded_disjoint_and_covers_all():
    classes = np.repeat([0, 1, 2], [50, 30, 10])
    train, val = split_indices(90, 0.2, 7, classes)
    assert sorted([*train, *val]) == list(range(90))
    assert np.bincount(classes[val]).tolist() == [10, 6, 2]
    for other_seed, same in ((7, True), (8, False)):
        again = split_indices(90, 0.2, other_seed, classes)[1]
        assert (again.tolist() == val.tolist()) == same


def test_what_cannot_be_split_is_refused(own_data):
    with pytest.raises(InputError, match="single clip"):
        split_indices(9, 0.2, 0, np.array([0] * 8 + [1]))
    with pytest.raises(InputError, match="too few"):
        split_indices(1, 0.2, 0)
    path = own_data / "fma_genre_spectrograms/train_labels.txt"
    rows = path.read_text().splitlines()
    jazz = [row for row in rows if row.endswith("Jazz")]
    path.write_text("\n".join(row for row in rows if row not in jazz[1:]) + "\n")
    with pytest.raises(InputError, match=f"{path}: class Jazz has a single clip"):
        load_data(Source(own_data))
    with pytest.raises(InputError, match="multitask_dataset.*8 clips are too few for 5 folds"):
        load_data(Source(own_data), target="emotion")


def test_a_subset_has_every_class_and_no_validation_clip(data_dir):
    data = load_data(Source(data_dir, seed=1, subset=30), beat=True)
    assert not set(data.train.indices) & set(data.val.indices)
    assert len(data.train) == 30
    assert {int(data.train.dataset.targets[i]) for i in data.train.indices} == set(range(10))
    fewest = load_data(Source(data_dir, seed=1, subset=3), beat=True).train  # one of each class
    assert sorted(int(target) for _, target, _ in fewest) == list(range(10))
    assert len(load_data(Source(data_dir, subset=9), target="emotion").train) == 9


def test_folds_hold_every_clip_out_once(tmp_path):
    labels, n_folds = dict.fromkeys(map(str, range(23)), (0.5, 0.5, 0.5)), 3
    source = Source(tmp_path / "nowhere")  # then the order is that of the labels
    cuts = [split_ids(source, "emotion", labels, fold, n_folds) for fold in range(n_folds)]
    for parts in cuts:
        assert sorted(sum(parts, [])) == sorted(labels), "parts overlap, or miss a clip"
    held_out = [clip_id for _, _, part in cuts for clip_id in part]
    assert sorted(held_out) == sorted(labels)
    others = split_ids(Source(tmp_path, seed=7), "emotion", labels, 0, n_folds)
    for part, other in zip(cuts[0], others, strict=True):
        assert set(part) != set(other), "another seed cuts otherwise"
    few = dict(list(labels.items())[: 4 * n_folds - 1])
    with pytest.raises(InputError, match="too few for"):
        split_ids(source, "emotion", few, 0, n_folds)


@pytest.mark.parametrize("lacking", ["multitask_dataset_beat", "multitask_dataset"])
def test_an_emotion_clip_in_one_form_only_is_refused(own_data, lacking):
    path = own_data / lacking / "train_labels.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match="multitask_dataset_beat: clip .* only one of"):
        load_data(Source(own_data), beat=True, target="emotion", n_folds=2)


def test_labels_of_training_clips_alone_scale_an_emotion(own_data):
    data = load_data(Source(own_data), target="energy", n_folds=2)
    labels = labels_of(own_data, "emotion")
    known = [labels[clip_id][1] for clip_id in common.clip_ids(data.train)]
    assert data.mean == pytest.approx([np.mean(known)], abs=1e-6)
    assert data.std == pytest.approx([np.std(known)], abs=1e-6)


def test_bad_clips_are_left_out_of_the_training_and_of_the_test_split(own_data, capsys):
    """Also where all training clips of a class are bad."""
    known = common.clip_ids(load_data(Source(own_data)).train)
    entries = read_entries(own_data, "genre", "train", merge=True)
    bad = [entry for entry in entries if entry.label == "Blues" and entry.clip_id in known]
    for entry in bad:
        entry.path.write_bytes(b"")
    data = load_data(Source(own_data, skip_bad=True))
    assert bad and "left out" in capsys.readouterr().err and "Blues" in data.names
    assert common.clip_ids(data.train) == [i for i in known if i not in {e.clip_id for e in bad}]
    read_entries(own_data, "genre", "test", merge=True)[0].path.write_bytes(b"")
    assert len(load_test(Source(own_data, skip_bad=True), data.settings)) == 14


@pytest.mark.parametrize("target", ["genre", "emotion"])
def test_only_training_clips_are_cropped(own_data, target):
    data = load_data(Source(own_data), target=target, crop=10, n_folds=2)
    assert {int(length) for _, _, length in data.train} == {10}
    for part in (data.val, data.held_out):
        assert all(40 <= int(length) <= 42 for _, _, length in part)


@pytest.mark.parametrize("same", ["id", "array"])
@pytest.mark.parametrize("beat", [False, True])
def test_test_clips_of_the_training_split_are_refused(own_data, same, beat):
    """In the form that is tested too: step 6 asks networks of frames for beats."""
    source = Source(own_data)
    data_settings = load_data(source).settings
    assert len(load_test(source, data_settings, beat=beat)) == 15
    train, test = (read_entries(own_data, "genre", part, beat, True) for part in ("train", "test"))
    if same == "array":
        shutil.copy(train[0].path, test[0].path)
    else:
        shutil.copy(test[0].path, train[0].path.with_name(test[0].path.name))
        with open(part_folder(own_data, "genre", beat) / "train_labels.txt", "a") as file:
            file.write(f"{test[0].clip_id}.x\tBlues\n")
        np.save(test[0].path, np.load(test[0].path)[:, ::-1])
    with pytest.raises(InputError, match=f"1 test clips.*{test[0].clip_id}.*--allow-leak"):
        load_test(source, data_settings, beat=beat)
    if same == "id":  # a network that was trained on it is asked for its other form
        with pytest.raises(InputError, match="1 test clips"):
            load_test(source, load_data(source, beat=beat).settings, beat=not beat)
    assert len(load_test(Source(own_data, allow_leak=True), data_settings, beat=beat)) == 15


def test_test_clips_are_sorted_by_id_and_emotions_unknown(own_data):
    for target, n in (("genre", 15), ("emotion", 2)):
        data = load_data(Source(own_data), target=target, n_folds=2)
        test = load_test(Source(own_data), data.settings)
        ids = common.clip_ids(test)
        assert ids == sorted(ids) and len(ids) == n
        assert test.targets.isnan().all() == (target == "emotion")
