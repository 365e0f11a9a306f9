"""What steps 1 to 3 measure of spectrograms, against known sounds; sound made from spectrograms."""

import numpy as np
import pandas as pd
import pytest
import torch

from patrec.features import DB_FLOOR, HOP, N_MELS, SR, extract_features, mel_to_waveform
from patrec.measures import (
    array_facts,
    genre_share,
    gradient_reach,
    lstm_batch,
    lstm_gradient,
    measure_table,
    mel_measures,
)


def test_mel_measures_of_known_sounds():
    # White noise has the same power per Hz, which is what a mel band holds: flat rows.
    noise = mel_measures(np.full((N_MELS, 100), -30.0))
    assert noise["centroid_hz"] == pytest.approx(SR / 4, rel=0.02)
    assert noise["share_below_200_hz"] == pytest.approx(200 / (SR / 2), rel=0.2)
    assert noise["dynamic_range_db"] == pytest.approx(0, abs=1e-6) and noise["onsets_per_s"] == 0
    # Half of the frames 40 dB lower.
    steps = np.full((N_MELS, 100), -10.0)
    steps[:, 50:] = -50
    assert mel_measures(steps)["dynamic_range_db"] == pytest.approx(40, abs=0.1)
    # From the 10th to the 95th percentile: the extremes of a ramp over 60 dB do not count.
    ramp = np.tile(np.linspace(-60, 0, 101), (N_MELS, 1))
    assert mel_measures(ramp)["dynamic_range_db"] == pytest.approx(0.85 * 60, abs=0.1)
    ramp[20, :50] = 40  # in less than half of the steps: the median is of the others
    assert mel_measures(ramp)["centroid_hz"] == pytest.approx(SR / 4, rel=0.02)
    table = measure_table(pd.DataFrame([noise]), "clip")
    assert table.iloc[0].tolist() == ["5446 Hz", "1.7%", "0.0 dB", "0.00 per s"]
    facts = array_facts(np.vstack([ramp, np.full((12, 101), 90)]))
    assert list(facts.values()) == ["140 x 101", "128 x 101", "-60.0", f"{ramp.mean():.1f}", "40.0"]
    # Silence and a single step give numbers too.
    for silent in (np.full((N_MELS, 50), DB_FLOOR), np.full((N_MELS, 1), DB_FLOOR)):
        values = mel_measures(silent, beat=silent.shape[1] == 1).values()
        assert all(np.isfinite(value) for value in values)


def test_genre_share_is_1_within_equal_clips_and_0_on_average_by_chance():
    genres = np.repeat(list("abcd"), 10)
    assert genre_share(np.repeat([1.0, 2.0, 3.0, 4.0], 10), genres) == pytest.approx(1)
    rng = np.random.default_rng(0)
    drawn = [genre_share(rng.standard_normal(40), genres) for _ in range(300)]
    assert abs(np.mean(drawn)) < 0.02


def test_a_batch_is_standardised_band_by_band_and_then_padded():
    rng, spread = np.random.default_rng(0), np.arange(1, 141)[:, None]
    x, lengths = lstm_batch([rng.normal(-spread, spread, (140, n)) for n in (30, 50)])
    assert lengths.tolist() == [30, 50] and (x[0, 30:] == 0).all()
    frames = torch.cat([x[0, :30], x[1]])
    assert frames.mean(0).abs().max() < 1e-3 and (frames.std(0) - 1).abs().max() < 1e-3


def test_lstm_gradient_follows_each_clips_own_end():
    """The clip's last step, not the padding's, is step 0; an early change reaches it less."""
    torch.manual_seed(0)
    x = torch.randn(3, 60, 5)
    lengths = torch.tensor([60, 40, 40])
    norms = lstm_gradient(x, lengths)
    assert norms.shape == (40,) and norms[0] == pytest.approx(1) and norms[30] < 0.01
    x[1:, 40:] = 1e3  # what lies behind a clip's end plays no part
    torch.manual_seed(0)
    torch.randn(3, 60, 5)
    np.testing.assert_allclose(lstm_gradient(x, lengths), norms)
    lengths = torch.tensor([60, 40, 20])  # the shortest says nothing of steps before its beginning
    found = []
    for n in (2, 3):
        torch.manual_seed(0)
        found.append(lstm_gradient(x[:n], lengths[:n]))
    np.testing.assert_allclose(found[0][20:], found[1][20:])
    assert not np.allclose(found[0][:20], found[1][:20])
    # It reaches back to the first step below 1%, or to the clip's beginning.
    assert gradient_reach(np.array([1, 0.5, 0.02, 0.009, 0.3])) == 3
    assert gradient_reach(np.array([1, 0.5, 0.02])) == 3


def test_sound_comes_back_like_the_spectrogram_it_was_made_of():
    """Three seconds of a rising chord that is struck four times a second, over soft noise."""
    t, rng = np.arange(3 * SR) / SR, np.random.default_rng(0)
    chord = sum(np.sin(2 * np.pi * hertz * t * (1 + t / 3)) for hertz in (220, 277, 330, 660, 1320))
    sound = 0.1 * chord * np.exp(-6 * (t % 0.25)) + 0.003 * rng.standard_normal(len(t))
    sound = sound.astype(np.float32)
    mel = extract_features(sound)[0][:N_MELS]
    waveform = mel_to_waveform(mel)
    assert waveform.dtype == np.float32 and np.abs(waveform).max() == pytest.approx(0.9)
    assert len(waveform) == (mel.shape[1] - 1) * HOP
    again = extract_features(waveform)[0][:N_MELS]
    mel = mel[:, : again.shape[1]]
    correlation = np.corrcoef(again.ravel(), mel.ravel())[0, 1]
    assert correlation > 0.8 and np.abs(again - mel).mean() < 6
    assert np.corrcoef(again.ravel(), mel[:, ::-1].ravel())[0, 1] < correlation - 0.05  # backwards
