"""patrec.demo: the made-up data set has the lab's layout, its ranges and something to learn."""

import itertools
import subprocess
import sys
import time

import librosa
import numpy as np
import pytest

from patrec import demo
from patrec.demo import write_demo

FULL, BEAT = "fma_genre_spectrograms", "fma_genre_spectrograms_beat"
SIBLINGS = (  # genres that the lab merges into one class
    ("Rock", "Psych-Rock"),
    ("Rock", "Post-Rock"),
    ("Psych-Rock", "Post-Rock"),
    ("Folk", "Psych-Folk"),
    ("Metal", "Punk"),
    ("Electronic", "Chiptune"),
)


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


@pytest.mark.parametrize(
    ("folder", "split", "form"),
    [
        (FULL, "train", "fused.full"),
        (FULL, "test", "full.fused"),
        (BEAT, "train", "beatsync.fused"),
        (BEAT, "test", "beatsync.fused"),
    ],
)
def test_genre_labels_have_the_forms_of_the_lab(root, folder, split, form):
    header, *rows = rows_of(root, folder, split)
    assert header == "Id\tGenre"
    ids, genres = zip(*(row.split(f".{form}.npy.gz\t") for row in rows), strict=True)
    files = {path.name for path in (root / folder / split).iterdir()}
    assert files == {f"{i}.fused.full.npy" for i in ids} and len(files) == len(rows)
    assert len(set(genres)) == 20 and min(map(genres.count, genres)) >= 2
    assert list(genres) != sorted(genres)  # the order gives nothing away


@pytest.mark.parametrize("folder", ["multitask_dataset", "multitask_dataset_beat"])
def test_emotion_labels_have_the_form_of_the_lab(root, folder):
    header, *rows = rows_of(root, folder, "train")
    assert header == "Id,valence,energy,danceability"
    ids, *values = zip(*(row.split(",") for row in rows), strict=True)
    files = {path.name for path in (root / folder / "train").iterdir()}
    assert files == {f"{i}.fused.full.npy" for i in ids} and len(files) == len(rows)
    assert all(len(value) == 5 for value in sum(values, ()))  # three decimals
    numbers = np.array(values, float)
    assert numbers.min() >= 0 and numbers.max() <= 1 and numbers.std(1).min() > 0.2
    assert not (root / folder / "test_labels.txt").exists()
    assert len(list((root / folder / "test").iterdir())) >= 4


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


def test_a_tone_is_where_librosa_has_it():
    """The bands and the pitch classes of a drawn tone are those of a synthesised one."""
    centres, bands, chroma = demo.shapes()
    np.testing.assert_allclose(centres, librosa.mel_frequencies(130, fmax=11_025)[1:-1], rtol=1e-5)
    filters, t_s = librosa.filters.mel(sr=22_050, n_fft=2048), np.arange(2048) / 22_050
    for midi in (33, 57, 69, 88):
        waveform = np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t_s)
        mel = filters @ np.abs(np.fft.rfft(waveform * np.hanning(2048))) ** 2
        row = midi - demo.LOWEST
        assert abs(int(mel.argmax()) - int(bands[0][:, row].argmax())) <= 1
        assert chroma[0][:, row].argmax() == midi % 12


def test_chroma_and_mel_show_the_same_tones():
    """Without drums and noise, the strongest pitch class is that of a loud mel band."""
    style = demo.STYLES["Classical"]._replace(rolloff=3, noise=-90, tilt=0)
    full, _ = demo.draw_clip(style, np.random.default_rng(0))
    centres, bands, _ = demo.shapes()
    tones = bands[0].T @ 10 ** (full[:128] / 10)  # (72, T): how loud the mel rows are at each tone
    classes = np.array([tones[i::12].max(0) for i in range(12)])  # the first tone is a C
    ranks = (-classes).argsort(0).argsort(0)
    strongest = full[128:].argmax(0)
    assert (ranks[strongest, np.arange(len(strongest))] <= 2).mean() > 0.8


def test_the_bytes_are_always_the_same(root, tmp_path):
    began = time.process_time()  # of this process alone: others may keep the machine busy
    again = write_demo(tmp_path / "again")
    assert time.process_time() - began < 10
    assert contents(again) == contents(root)


def test_parts_are_added_one_by_one(root, tmp_path):
    write_demo(tmp_path / "demo", ("emotion",))
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"DEMO.txt", "multitask_dataset", "multitask_dataset_beat"}
    before = (tmp_path / "demo" / "multitask_dataset").stat().st_mtime_ns
    write_demo(tmp_path / "demo", ("genre", "emotion"))
    assert (tmp_path / "demo" / "multitask_dataset").stat().st_mtime_ns == before
    assert contents(tmp_path / "demo") == contents(root)
    assert "made up" in (tmp_path / "demo" / "DEMO.txt").read_text()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "vary", interrupt)  # the emotion clips are there by then
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", ("emotion", "genre"))
    assert list(tmp_path.iterdir()) == []


def test_genres_can_be_told_apart_and_merged_ones_are_alike(root):
    """A clip's mean and spread per row tell its genre; those of merged genres are near."""
    arrays = arrays_of(root, FULL, "train")
    clips = {}
    for row in rows_of(root, FULL, "train")[1:]:
        name, genre = row.split("\t")
        array = arrays[f"{name.split('.')[0]}.fused.full.npy"]
        clips.setdefault(genre, []).append(np.concatenate([array.mean(1), array.std(1)]))
    x = np.array([clip for genre in clips.values() for clip in genre])
    x = (x - x.mean(0)) / x.std(0)
    names = np.repeat(list(clips), [len(group) for group in clips.values()])
    centres = {name: x[names == name].mean(0) for name in clips}

    def distance(a, b):
        return np.linalg.norm(centres[a] - centres[b])

    for a, b in SIBLINGS:
        family = {name for pair in SIBLINGS if {a, b} & set(pair) for name in pair}
        others = [distance(name, other) for name in (a, b) for other in clips.keys() - family]
        assert distance(a, b) < np.median(others), (a, b)
    within = np.mean([np.linalg.norm(x[i] - centres[names[i]]) for i in range(len(x))])
    between = np.mean([distance(a, b) for a, b in itertools.combinations(clips, 2)])
    assert between > within


def test_clips_of_a_genre_differ(root):
    rock = [row.split(".")[0] for row in rows_of(root, FULL, "train") if row.endswith("\tRock")]
    chroma = [np.load(root / FULL / "train" / f"{i}.fused.full.npy")[128:] for i in rock]
    assert len({array.shape for array in chroma}) > 2
    assert len({int(array.mean(1).argmax()) for array in chroma}) > 2  # keys
    beats = [np.load(root / BEAT / "train" / f"{i}.fused.full.npy").shape[1] for i in rock]
    beat_s = {round(full.shape[1] / n, 1) for full, n in zip(chroma, beats, strict=True)}
    assert len(beat_s) > 2  # tempo


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


def test_nothing_but_numpy_is_imported():
    code = "import sys, patrec.demo; print({'torch', 'librosa', 'numba', 'scipy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
