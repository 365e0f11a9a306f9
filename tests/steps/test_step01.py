"""Step 1: the data folder, two clips, their measures, and a sound file of one's own."""

import re

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import FEW_GENRES, assert_clean_error, genre_level, read_table, run_forked, run_smoke
from scipy.io import wavfile

from patrec.clips import sample_clips
from patrec.measures import genre_share, mel_measures

STEP = "step01_spectrograms"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wav(tmp_path_factory):
    """Three seconds of stereo at 44,100 Hz: a 1,000 Hz tone, struck four times a second."""
    t = np.arange(3 * 44_100) / 44_100
    tone = np.sin(2 * np.pi * 1000 * t) * np.exp(-12 * (t % 0.25))
    path = tmp_path_factory.mktemp("audio") / "my song.wav"
    wavfile.write(path, 44_100, (2e4 * np.stack([tone, tone], axis=1)).astype(np.int16))
    return path


@pytest.fixture(scope="module")
def run(small_data, wav, tmp_path_factory):
    return run_smoke(STEP, small_data, tmp_path_factory, "--audio", wav)


def test_the_report_is_whole_and_the_data_folder_is_counted(run, small_data):
    folder, metrics = run
    assert metrics["step"] == STEP and metrics["seconds"] > 0 and metrics["runs"] == {}
    assert metrics["data"]["root"] == str(small_data.resolve()) and not metrics["data"]["demo"]
    assert {"python", "torch", "librosa", "device", "threads"} <= set(metrics["environment"])
    shown = {"two_clips.png", "genre_spectra.png", "own_audio.png"}
    shown |= {"clip_1.mp3", "clip_2.mp3"}
    written = {path.name for path in folder.iterdir() if path.name[0] != "."}
    assert written == shown | {"args.json", "metrics.json", "summary.md"}
    summary = (folder / "summary.md").read_text()
    assert all(f"]({name})" in summary for name in shown)
    assert re.findall(r"^## (0|1[abc])\. ", summary, re.MULTILINE) == ["0", "1a", "1b", "1c", "1c"]
    parts = metrics["step0"]["parts"]
    counts = {row["folder"]: (row["arrays"], row["labelled clips"]) for row in parts}
    for form in ("", "_beat"):
        assert counts[f"fma_genre_spectrograms{form}/train"] == (30, 30)
        assert counts[f"fma_genre_spectrograms{form}/test"] == (20, 20)
        assert counts[f"multitask_dataset{form}/train"] == (8, 8)
        assert counts[f"multitask_dataset{form}/test"] == (2, "no file")
    assert metrics["step0"]["matmul_seconds"]["cpu"] > 0


def test_two_clips_of_different_classes_are_read_and_measured(run, small_data):
    """1b reads the first 128 rows of the very files; 1c says the numbers in sentences."""
    folder, metrics = run
    first, second = metrics["pair"]
    assert first["genre"] != second["genre"] and first["id"] != second["id"]
    summary, table = (folder / "summary.md").read_text(), read_table(folder, "The two arrays")
    assert "np.load(path)" in summary and "spectrogram[:128]" in summary
    labels = (small_data / "fma_genre_spectrograms" / "train_labels.txt").read_text().splitlines()
    for clip in (first, second):
        (line,) = re.findall(rf"- `({clip['id']}\..*)`", summary)
        assert line.replace("<TAB>", "\t") in labels and line.endswith(clip["genre"])
        path = small_data / "fma_genre_spectrograms" / "train" / f"{clip['id']}.fused.full.npy"
        array, row = np.load(path), table.loc[f"{clip['genre']} ({clip['id']})"]
        assert row["array"] == f"140 x {array.shape[1]}"
        assert float(row["mean (dB)"]) == pytest.approx(array[:128].mean(), abs=0.06)
        assert f"of {clip['genre']} ({clip['id']}) is {clip['centroid_hz']:.0f} Hz" in summary
    assert soundfile.info(folder / "clip_1.mp3").samplerate == 22_050
    said = (
        "{:.1%} in .* clip and {:.1%} in",
        "{:.1f} dB in .* and {:.1f} dB",
        "{:.2f} on.* {:.2f}\\.",
    )
    for form, key in zip(said, list(first)[1:4], strict=True):
        assert re.search(form.format(first[key], second[key]), " ".join(summary.split())), key


def test_measures_rise_with_the_genres_frequency(run, small_data):
    """Clips of Blues are loudest at the low end of the mel axis, of Trip-Hop near the high one."""
    assert genre_level("Blues") == 0 < 0.9 < genre_level("Trip-Hop")
    folder, metrics = run
    assert set(metrics["genres"]) == set(FEW_GENRES)
    low, high = metrics["genres"]["Blues"], metrics["genres"]["Trip-Hop"]
    assert high["centroid_hz"] > 3 * low["centroid_hz"]
    assert low["share_below_200_hz"] > 0.3 > 0.05 > high["share_below_200_hz"]
    clips = sample_clips(small_data, 2, 42)
    found, genres = (
        pd.DataFrame([mel_measures(c.full[:128]) for c in clips]),
        [c.genre for c in clips],
    )
    means = found.groupby(genres).mean().sort_values("centroid_hz", ascending=False)
    pd.testing.assert_frame_equal(pd.DataFrame(metrics["genres"]).T, means)  # the highest on top
    spectra = np.load(folder.parent / "image.npy")  # (genres, 128), in the same order
    loudest = [127 * min(genre_level(genre), 1) for genre in metrics["genres"]]
    assert spectra.argmax(1).tolist() == pytest.approx(loudest, abs=6)
    assert spectra.mean(0) == pytest.approx(0, abs=1e-4)  # compared with the mean of the genres
    shares = [round(100 * genre_share(found[key], genres)) for key in found]
    row = read_table(folder, "Mean over at most").loc["explained by genre"]
    assert row.tolist() == [f"{share}%" for share in shares]
    most = rf"largest for the .* {max(shares)}%, and .* {min(shares)}%\."
    assert re.search(most, " ".join((folder / "summary.md").read_text().split()))


def test_a_file_of_ones_own_is_measured(run):
    folder, metrics = run
    assert metrics["audio"]["centroid_hz"] == pytest.approx(1000, rel=0.1)
    assert metrics["audio"]["share_below_200_hz"] < 0.05
    assert metrics["audio"]["onsets_per_s"] == pytest.approx(4, abs=1)
    assert "my song.wav" in (folder / "summary.md").read_text()


def test_bad_audio_is_one_line_before_any_result_is_written(small_data, tmp_path):
    path, out = tmp_path / "song.wav", tmp_path / "out"
    flags = ("--smoke", "--data-dir", small_data, "--out-dir", out, "--audio", path)
    for content, words in ((b"no sound at all", "not readable as"), (None, "0.50 s of sound is")):
        wavfile.write(path, 8000, np.ones(4000, np.int16))
        if content:
            path.write_bytes(content)
        result = run_forked(f"{STEP}.py", *flags, check=False)
        assert_clean_error(result, "song.wav", words)
    assert [path.name for path in out.rglob("*") if path.is_file()] in ([], [".lock"])
