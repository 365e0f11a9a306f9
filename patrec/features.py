"""Sound to spectrogram, as the lab computes it, and back to sound."""

import functools
import io
import warnings
from pathlib import Path

import filelock
import librosa
import numpy as np
import soundfile

from patrec.errors import InputError
from patrec.files import cache_dir, write_bytes

SR = 22_050  # sampling rate, in Hz
N_FFT = 2048  # window of a frame, in samples (93 ms)
HOP = 512  # step from frame to frame, in samples (23 ms)
N_MELS = 128  # mel bands: rows 0-127, in dB relative to the clip's loudest cell, [-80, 0]
N_CHROMA = 12  # pitch classes C ... B: rows 128-139, in [0, 1]
N_ROWS = N_MELS + N_CHROMA
DB_FLOOR = -80.0  # power_to_db cuts off here
BANDS = {"mel": slice(0, N_MELS), "chroma": slice(N_MELS, N_ROWS), "fused": slice(0, N_ROWS)}
NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def extract_features(waveform) -> tuple[np.ndarray, np.ndarray]:
    """Compute the full and the beat-synchronised spectrogram of a clip.

    Beats are tracked on the percussive part (HPSS); between two beats the median of the
    frames is taken, for mel on power, before the step to dB.

    waveform : np.ndarray [shape=(n,)], mono audio at SR, at least N_FFT samples

    Returns
    -------
    full : np.ndarray [shape=(140, T)], float64: 128 mel bands in dB, then 12 chroma values
    beat : np.ndarray [shape=(140, at most n_beats + 1)], float64: a column per beat interval

    Source: the course's lab3/feature_extractor.py (slp-ntua/patrec-labs); Müller, 2015,
    Fundamentals of Music Processing, ch. 6.3 (beat-synchronous features).
    """
    mel_power, chroma = mel_and_chroma(waveform)
    _, beat_frames = librosa.beat.beat_track(y=percussive_part(waveform), sr=SR, hop_length=HOP)
    if not len(beat_frames):  # silence, a held tone: the whole clip is one interval
        beat_frames = np.array([0])
    synced = (librosa.util.sync(x, beat_frames, aggregate=np.median) for x in (mel_power, chroma))
    return stack_rows(mel_power, chroma), stack_rows(*synced)


@functools.cache
def compile_librosa() -> None:
    """Let librosa compile its numba functions, one process of a machine at a time.

    Processes that compile them at once into an empty cache ruin it for good: every later run
    dies of a segmentation fault (seen with numba 0.66 and 0.68).
    """
    # Of silent or very short clips, which are meant to work.
    warnings.filterwarnings("ignore", module="librosa")
    with filelock.FileLock(cache_dir() / "librosa.lock"):
        extract_features(np.random.default_rng(0).standard_normal(2 * SR).astype(np.float32))


def mel_and_chroma(waveform) -> tuple[np.ndarray, np.ndarray]:
    """Mel spectrogram, power (128, T), and chroma (12, T) of a mono waveform at SR."""
    if waveform.ndim != 1 or len(waveform) < N_FFT:
        shape = f"waveform of shape {waveform.shape}"
        raise InputError(f"{shape}: one channel of at least {N_FFT} samples is needed")
    sound = {"y": waveform, "sr": SR, "hop_length": HOP}
    mel_power = librosa.feature.melspectrogram(**sound, n_fft=N_FFT, n_mels=N_MELS)
    chroma = librosa.feature.chroma_cqt(**sound)
    # mel and CQT may differ by a frame in odd cases; the common length keeps them aligned.
    n_frames = min(mel_power.shape[1], chroma.shape[1])
    return mel_power[:, :n_frames], chroma[:, :n_frames]


def stack_rows(mel_power, chroma) -> np.ndarray:
    """The 140 rows of an array: mel in dB below the loudest cell, then chroma; float64."""
    silent = mel_power.max() <= 1e-10  # librosa's own lower limit
    db = np.full_like(mel_power, DB_FLOOR) if silent else librosa.power_to_db(mel_power, ref=np.max)
    return np.vstack([db, np.clip(chroma, 0, 1)]).astype(np.float64)


def percussive_part(waveform, size=31) -> np.ndarray:
    """Compute librosa.effects.percussive(waveform), bit for bit, six times as fast.

    Energy that stands out of the running median over time but not over frequency is a
    stroke (Fitzgerald, 2010, Harmonic/percussive separation using median filtering).
    """
    from scipy.ndimage import median_filter

    half = size // 2

    def median_along_rows(rows):
        # scipy's fast median is for one dimension only, so the mirrored rows are laid end to end.
        padded = np.pad(rows, ((0, 0), (half, half)), mode="symmetric")
        return median_filter(padded.ravel(), size).reshape(padded.shape)[:, half:-half]

    magnitude, phase = librosa.magphase(librosa.stft(waveform))
    over_time, over_frequency = median_along_rows(magnitude), median_along_rows(magnitude.T).T
    mask = librosa.util.softmask(over_frequency, over_time, power=2, split_zeros=True)
    return librosa.istft(magnitude * mask * phase, dtype=waveform.dtype, length=len(waveform))


def mel_to_waveform(mel_db, n_iter=16, seed=0) -> np.ndarray:
    """Make sound from a mel spectrogram; the absolute level is lost.

    The bands are spread over the FFT's frequencies by the pseudo-inverse of the mel filters
    (three times as fast as librosa's non-negative least squares, and as close). The phase,
    which no spectrogram holds, is found by Griffin & Lim (1984).

    mel_db : np.ndarray [shape=(128, T)], in dB
    seed : int, of the phase to begin with

    Returns the waveform, np.ndarray [shape=((T - 1) * HOP,)], float32, at SR, peak .9.
    """
    filters = librosa.filters.mel(sr=SR, n_fft=N_FFT, n_mels=N_MELS)
    power = np.linalg.pinv(filters) @ librosa.db_to_power(np.asarray(mel_db, dtype=np.float32))
    magnitude = np.sqrt(np.maximum(power, 0))
    phase = {"n_iter": n_iter, "random_state": seed}
    waveform = librosa.griffinlim(magnitude, hop_length=HOP, n_fft=N_FFT, **phase)
    return (0.9 * waveform / max(np.abs(waveform).max(), 1e-9)).astype(np.float32)


def write_sound(path, waveform) -> None:
    """Write a waveform at SR as a sound file; its format is the path's ending, e.g. .mp3."""
    kind = Path(path).suffix[1:].upper()
    buffer = io.BytesIO()  # libsndfile hides a full disk
    soundfile.write(buffer, waveform, SR, format=kind)
    write_bytes(path, lambda file: file.write(buffer.getbuffer()))
