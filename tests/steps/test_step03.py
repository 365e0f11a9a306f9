"""Step 3: the chromagrams of step 1's clips, and whether an LSTM can be trained on them."""

import numpy as np
import pytest
from conftest import FEW_GENRES, genre_level, run_smoke

from patrec.clips import sample_clips
from patrec.features import NOTES

STEP = "step03_chroma"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    return run_smoke(STEP, small_data, tmp_path_factory)


def test_the_strongest_note_is_named(run, small_data):
    """Each genre's clips have one strong note, by where it lies on the axis; all else is at .3."""
    folder, metrics = run
    assert {path.stem for path in folder.glob("*.png")} == {"two_clips", "genre_chroma"}
    assert set(metrics["genres"]) == set(FEW_GENRES)
    pair = [f"{c.genre} ({c.clip_id})" for c in sample_clips(small_data, 2, 42)[:2]]
    assert [row["clip"] for row in metrics["pair"]] == pair
    for row in metrics["pair"]:
        note = NOTES[int(min(genre_level(row["clip"].split(" (")[0]), 1) * 11)]
        for form in ("full", "beat-synced"):
            assert row[form]["strongest"] == note
            assert row[form]["strong"] == pytest.approx(1.3, abs=0.3)  # noise lifts a few to .5
    assert metrics["sync"]["same_strongest"] == 1
    clips, changes = sample_clips(small_data, 2, 42), []
    for clip in clips:
        notes = [array[128:].astype(float) for array in (clip.full, clip.beat)]
        changes.append([np.abs(x[:, 1:] - x[:, :-1]).mean() for x in notes])
    assert list(metrics["sync"]["change"].values()) == pytest.approx(np.mean(changes, axis=0))
    own = [values for clip, values in zip(clips, changes, strict=True) if clip.genre == "Rock"]
    assert list(metrics["genres"]["Rock"].values())[1:] == pytest.approx(np.mean(own, axis=0))


def test_the_strongest_note_of_each_genre_is_row_0(run):
    folder, _ = run
    shares = np.load(folder.parent / "image.npy")  # (genres, 12)
    assert shares.shape == (len(FEW_GENRES), 12) and shares.sum(1) == pytest.approx(1, abs=1e-3)
    assert (shares[:, 0] > 2 * shares[:, 1:].max(1)).all()


def test_whether_an_lstm_is_efficient_is_answered_with_what_was_measured(run, small_data):
    folder, metrics = run
    lstm, summary = metrics["lstm"], " ".join((folder / "summary.md").read_text().split())
    assert set(lstm) == {f"{k}, {f}" for k in ("chroma", "mel") for f in ("full", "beat-synced")}
    full, beat = lstm["chroma, full"], lstm["chroma, beat-synced"]
    assert full["rows"] == 12 and full["steps"] > 10 * beat["steps"]
    assert f"They have 12 rows instead of {lstm['mel, full']['rows']}" in summary
    passes = [row["pass (ms)"] for row in (full, lstm["mel, full"], beat)]
    said = "a pass takes {:.1f} ms, compared with {:.1f} ms on mel and {:.1f} ms on"
    assert said.format(*passes) in summary
    ratios = [c.full.shape[1] / c.beat.shape[1] for c in sample_clips(small_data, 2, 42)]
    for row, frames, unit in ((full, 1, "frames"), (beat, np.median(ratios), "beats")):
        seconds = row["steps above 1%"] * frames * 512 / 22_050
        said = f"{row['steps above 1%']} of {row['steps']} {unit} ({seconds:.1f} s)"
        assert f"for the last {said}" in summary
    assert " nan" not in summary.lower() and "{" not in summary
