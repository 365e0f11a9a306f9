"""Step 2: time steps, what an LSTM's pass costs, how far its gradient reaches, beats."""

import numpy as np
import pandas as pd
import pytest
from conftest import read_table, run_smoke

from patrec.clips import sample_clips
from patrec.measures import measure_table, mel_measures

STEP = "step02_beat_sync"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    return run_smoke(STEP, small_data, tmp_path_factory)


def test_the_report_is_whole_and_looks_at_the_two_clips_of_the_seed(run, small_data):
    folder, metrics = run
    figures = {"lstm_cost", "lstm_gradient", "two_clips"}
    assert {path.stem for path in folder.glob("*.png")} == figures
    summary = (folder / "summary.md").read_text()
    assert all(f"]({name}.png)" in summary for name in figures)
    assert " nan" not in summary.lower() and "inf " not in summary and "{" not in summary
    pair = [f"{c.genre} ({c.clip_id})" for c in sample_clips(small_data, 2, 42)[:2]]
    assert list(metrics["differences"]["pair"]) == pair
    table = read_table(folder, "The arrays of the two clips")  # 1b's, in both forms
    assert list(table.index) == [f"{t}, {f}" for t in pair for f in ("full", "beat-synchronised")]
    clips = sample_clips(small_data, 2, 42)
    measures = [mel_measures(a[:128], beat=True) for c in clips[:2] for a in (c.full, c.beat)]
    expected = measure_table(pd.DataFrame(measures, table.index), "clip")
    pd.testing.assert_frame_equal(read_table(folder, "The two clips, measured"), expected)
    hertz = expected.iloc[[1, 3, 0, 2], 0]
    assert "{} and {} (full: {} and {})".format(*hertz) in " ".join(summary.split())
    found, rows = metrics["differences"], read_table(folder, "What the synchronisation changes")
    gains = [c.beat[:128].mean(dtype=float) - c.full[:128].mean(dtype=float) for c in clips]
    ratios = [clip.full.shape[1] / clip.beat.shape[1] for clip in clips]
    for key, x in (("frames per step", ratios), ("level change (dB)", gains)):
        assert [found["pair"][name][key] for name in pair] == pytest.approx(x[:2])
        spread = (*x[:2], min(x), np.median(x), np.mean(x), max(x))
        assert rows[key].tolist() == [f"{value:.1f}" for value in spread]


def test_the_time_steps_of_every_drawn_clip_are_counted(run, small_data):
    folder, metrics = run
    table = read_table(folder, "Time steps of 10 drawn clips").astype(int)
    clips = sample_clips(small_data, 2, 42)
    for form, kind in (("full", "full"), ("beat-synced", "beat")):
        lengths = [getattr(clip, kind).shape[1] for clip in clips]
        expected = {"min": min(lengths), "median": np.median(lengths), "max": max(lengths)}
        assert metrics["steps"][form] == expected
        quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
        title = {"beat-synced": "beat-synchronised"}.get(form, form)
        assert table.loc[title].tolist() == quantiles.tolist()
    for clip in clips[:2]:  # between n columns there are n - 1 beats; a frame is 512 samples
        minutes, n_beats = clip.full.shape[1] * 512 / 22_050 / 60, clip.beat.shape[1] - 1
        change = metrics["differences"]["pair"][f"{clip.genre} ({clip.clip_id})"]
        assert change["beats per minute"] == pytest.approx(n_beats / minutes)


def test_cost_and_reach_are_measured(run, small_data):
    _, metrics = run
    # How long a pass takes is the machine's affair; that both median lengths were measured is not.
    seconds, reach = metrics["lstm_cost"]["seconds"], metrics["gradient_reach"]
    full, beat = (seconds[str(reach[form]["of_steps"])] for form in ("full", "beat-synced"))
    assert min(full, beat) > 0
    assert metrics["lstm_cost"]["full_over_beat"] == pytest.approx(full / beat)
    slope = np.polyfit(np.log([int(n) for n in seconds]), np.log(list(seconds.values())), 1)[0]
    assert metrics["lstm_cost"]["exponent"] == pytest.approx(slope)
    ratio = np.median([c.full.shape[1] / c.beat.shape[1] for c in sample_clips(small_data, 2, 42)])
    for form, frames in (("full", 1), ("beat-synced", ratio)):
        far, steps, s, share = list(reach[form].values())[:4]
        assert (s, share) == pytest.approx((far * frames * 512 / 22_050, far / steps))
    full, beat = metrics["gradient_reach"]["full"], metrics["gradient_reach"]["beat-synced"]
    assert 0 < full["at_first_step"] < 1e-4 and full["share"] < beat["share"]
    assert full["steps"] < full["of_steps"]
