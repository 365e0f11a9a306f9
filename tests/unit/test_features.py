"""Feature extraction against sounds whose answer is known, and against librosa call by call."""

import librosa
import numpy as np
import pytest

from patrec.errors import InputError
from patrec.features import DB_FLOOR, HOP, N_FFT, N_MELS, NOTES, SR, extract_features


def tone(f_hz, seconds):
    return (0.5 * np.sin(2 * np.pi * f_hz * np.arange(round(seconds * SR)) / SR)).astype(np.float32)


def drum_track(tempo, seconds):
    """A decaying burst of noise on every beat, the same each time."""
    t = np.arange(SR // 5) / SR
    stroke = np.random.default_rng(0).standard_normal(len(t)) * np.exp(-30 * t)
    track = 1e-3 * np.random.default_rng(1).standard_normal(round(seconds * SR) + len(t))
    for start_s in np.arange(0.2, seconds, 60 / tempo):
        track[round(start_s * SR) :][: len(t)] += stroke
    return (0.2 * track[: round(seconds * SR)]).astype(np.float32)


def check_form(array):
    assert array.dtype == np.float64 and array.shape[0] == 140 and array.shape[1] >= 1
    assert np.isfinite(array).all()
    assert array[:N_MELS].min() >= DB_FLOOR and array[:N_MELS].max() <= 0
    assert array[N_MELS:].min() >= 0 and array[N_MELS:].max() <= 1


@pytest.mark.slow
def test_same_as_the_labs_extractor():
    """The lab's calls, one by one (feature_extractor.py): any other parameter or order shows."""
    rng = np.random.default_rng(3)
    y = drum_track(110, 6) + 0.3 * tone(330, 6) * np.linspace(0.2, 1, 6 * SR, dtype=np.float32)
    y += (0.01 * rng.standard_normal(len(y))).astype(np.float32)

    _, percussive = librosa.effects.hpss(y)
    _, beats = librosa.beat.beat_track(y=percussive, sr=22050)
    mel = librosa.feature.melspectrogram(
        y=y, sr=22050, n_fft=2048, hop_length=512, power=2.0, n_mels=128
    )
    chroma = librosa.feature.chroma_cqt(y=y, sr=22050, hop_length=512)
    beat_mel = librosa.util.sync(mel, beats, aggregate=np.median)  # on power: dB comes after
    beat_chroma = librosa.util.sync(chroma, beats, aggregate=np.median)
    full_wanted = np.vstack([librosa.power_to_db(mel, ref=np.max), chroma])
    beat_wanted = np.vstack([librosa.power_to_db(beat_mel, ref=np.max), beat_chroma])

    full, beat = extract_features(y)
    assert len(beats) > 5
    np.testing.assert_allclose(full, full_wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(beat, beat_wanted, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Trying to estimate tuning")
@pytest.mark.parametrize(("f_hz", "name"), [(261.63, "C"), (92.5, "F#")])
def test_a_pitch_lights_its_chroma_row_and_mel_band(f_hz, name):
    full, beat = extract_features(tone(f_hz, 3))
    for array in (full, beat):
        check_form(array)
        assert NOTES[np.median(array[N_MELS:], axis=1).argmax()] == name
    bands_hz = librosa.mel_frequencies(N_MELS + 2, fmax=SR / 2)[1:-1]
    loudest = np.median(full[:N_MELS], axis=1).argmax()
    assert abs(loudest - np.abs(bands_hz - f_hz).argmin()) <= 1


@pytest.mark.filterwarnings("ignore:n_fft=.* is too large", "ignore:Trying to estimate tuning")
@pytest.mark.parametrize("n", [N_FFT, 3 * SR])
def test_short_clips(n):
    full, beat = extract_features(0.5 * tone(440, 4)[:n] + drum_track(120, 4)[:n])
    check_form(full)
    check_form(beat)
    assert full.shape[1] == 1 + n // HOP and beat.shape[1] <= full.shape[1]


@pytest.mark.parametrize("shape", [N_FFT - 1, (2, SR)])
def test_what_is_no_mono_clip_is_said_so(shape):
    with pytest.raises(InputError, match=str(N_FFT)):
        extract_features(np.zeros(shape, np.float32))
