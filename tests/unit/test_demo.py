"""patrec.demo: the made-up data set has the lab's layout, its ranges and something to learn."""

import itertools

import numpy as np
import pytest
from conftest import GENRES, MERGED

from patrec import demo
from patrec.demo import write_demo

FULL, BEAT = "fma_genre_spectrograms", "fma_genre_spectrograms_beat"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "data" / "demo")


def arrays_of(root, folder, split):
    paths = (root / folder / split).iterdir()
    return {path.name: np.load(path, allow_pickle=False) for path in paths}


def rows_of(root, folder, split):
    return (root / folder / f"{split}_labels.txt").read_text().splitlines()


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("folder, split, form", [
    (FULL, "train", "fused.full"), (FULL, "test", "full.fused"),
    (BEAT, "train", "beatsync.fused"), (BEAT, "test", "beatsync.fused"),
])  # fmt: skip
def test_genre_labels_have_the_forms_of_the_lab(root, folder, split, form):
    header, *rows = rows_of(root, folder, split)
    assert header == "Id\tGenre"
    ids, genres = zip(*(row.split(f".{form}.npy.gz\t") for row in rows), strict=True)
    assert sorted(arrays_of(root, folder, split)) == sorted(f"{i}.fused.full.npy" for i in ids)
    assert set(genres) == set(GENRES) and min(map(genres.count, genres)) >= 2
    assert list(genres) != sorted(genres)  # the order gives nothing away


@pytest.mark.parametrize("folder", ["multitask_dataset", "multitask_dataset_beat"])
def test_emotion_labels_have_the_form_of_the_lab(root, folder):
    header, *rows = rows_of(root, folder, "train")
    assert header == "Id,valence,energy,danceability"
    ids, *values = zip(*(row.split(",") for row in rows), strict=True)
    assert sorted(arrays_of(root, folder, "train")) == sorted(f"{i}.fused.full.npy" for i in ids)
    assert all(len(value) == 5 for value in sum(values, ()))  # three decimals
    numbers = np.array(values, float)
    assert numbers.min() >= 0 and numbers.max() <= 1 and numbers.std(1).min() > 0.2
    assert not (root / folder / "test_labels.txt").exists()
    assert len(arrays_of(root, folder, "test")) >= 4


def test_full_and_beat_clips_belong_together_and_no_id_is_in_two_parts(root):
    seen = []
    for folder, split in itertools.product((FULL, "multitask_dataset"), ("train", "test")):
        full, beat = arrays_of(root, folder, split), arrays_of(root, f"{folder}_beat", split)
        assert full.keys() == beat.keys()
        assert all(14 <= beat[name].shape[1] <= 129 for name in beat)
        # A median lies among its frames, so the two have much the same spectrum.
        for name in list(full)[:20]:
            assert np.corrcoef(full[name].mean(1), beat[name].mean(1))[0, 1] > 0.7
        seen += full
    assert len(seen) == len(set(seen))


def test_values_are_in_the_ranges_of_the_lab(root):
    lengths = set()
    for path in root.rglob("*.npy"):
        array = np.load(path, allow_pickle=False)
        mel, chroma = array[:128], array[128:]
        assert array.dtype == np.float32 and array.shape[0] == 140
        assert mel.min() >= -80 and mel.max() == 0
        assert chroma.min() >= 0 and chroma.max() <= 1
        if not path.parts[-3].endswith("_beat"):
            assert (chroma.max(0) == 1).all()
            lengths.add(array.shape[1])
    assert len(lengths) > 20 and min(lengths) > 256  # more than a window of the CNN


def test_parts_are_added_one_by_one_and_the_bytes_are_the_same_each_time(root, tmp_path):
    demo_dir, emotion = tmp_path / "demo", tmp_path / "demo" / "multitask_dataset"
    write_demo(demo_dir, ("emotion",))
    names = {"DEMO.txt", "multitask_dataset", "multitask_dataset_beat"}
    assert {path.name for path in demo_dir.iterdir()} == names
    before = emotion.stat().st_mtime_ns
    write_demo(demo_dir, ("genre", "emotion"))
    assert emotion.stat().st_mtime_ns == before
    assert contents(demo_dir) == contents(root)
    assert "made up" in (demo_dir / "DEMO.txt").read_text()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "vary", interrupt)  # the emotion clips are there by then
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", ("emotion", "genre"))
    assert list(tmp_path.iterdir()) == []


def test_genres_can_be_told_apart_and_merged_ones_are_alike(root):
    """By a clip's mean and spread per row."""
    arrays, clips = arrays_of(root, FULL, "train"), {}
    for row in rows_of(root, FULL, "train")[1:]:
        name, genre = row.split("\t")
        array = arrays[f"{name.split('.')[0]}.fused.full.npy"]
        clips.setdefault(genre, []).append(np.concatenate([array.mean(1), array.std(1)]))
    spread = np.concatenate(list(clips.values())).std(0)
    centres = {genre: np.mean(group, axis=0) for genre, group in clips.items()}

    def distance(x, y):
        return np.linalg.norm((x - y) / spread)

    within = np.mean([distance(x, centres[genre]) for genre in clips for x in clips[genre]])
    pairs = list(itertools.combinations(GENRES, 2))
    between = {(a, b): distance(centres[a], centres[b]) for a, b in pairs}
    merged = [between[a, b] for a, b in pairs if MERGED.get(a, a) == MERGED.get(b, b)]
    assert len(merged) == 6 and np.mean(list(between.values())) > within
    assert max(merged) < np.median(list(between.values()))


def test_emotions_follow_from_what_is_drawn(root):
    arrays = arrays_of(root, "multitask_dataset", "train")
    rows = [row.split(",") for row in rows_of(root, "multitask_dataset", "train")[1:]]
    mels = [arrays[f"{row[0]}.fused.full.npy"][:128] for row in rows]
    valence, energy, danceability = np.array([row[1:] for row in rows], float).T
    bright = [mel[64:].mean() - mel[:64].mean() for mel in mels]
    quiet = [np.percentile(mel.mean(0), 10) for mel in mels]
    strokes = [np.maximum(np.diff(mel[90:], axis=1), 0).mean() for mel in mels]
    for values, seen in ((valence, bright), (energy, quiet), (danceability, strokes)):
        assert np.corrcoef(values, seen)[0, 1] > 0.4
