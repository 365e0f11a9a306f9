"""What steps 1 to 3 measure of spectrograms."""

import time

import librosa
import numpy as np
import pandas as pd
import torch
from torch import nn

from patrec.features import BANDS, HOP, N_MELS, SR

# Each measure of a mel spectrogram: its name and how it is written.
MEASURES = {
    "centroid_hz": ("spectral centroid", "{:.0f} Hz"),
    "share_below_200_hz": ("share of energy below 200 Hz", "{:.1%}"),
    "dynamic_range_db": ("dynamic range", "{:.1f} dB"),
    "onsets_per_s": ("onset rate", "{:.2f} per s"),
}


def mel_measures(mel_db, beat=False) -> dict:
    """Brightness, bass, dynamics and onsets of a mel spectrogram (128, T) in dB.

    centroid_hz : median over the steps of the power-weighted mean frequency
    share_below_200_hz : share of the energy, by the bands' centre frequencies
    dynamic_range_db : from the 10th to the 95th percentile of the steps' loudness
    onsets_per_s : peaks of the spectral flux; only of frames, not of beats
    """
    mel_db = np.asarray(mel_db, dtype=float)
    edges = librosa.mel_frequencies(N_MELS + 2, fmax=SR / 2)
    centres, widths = edges[1:-1], (edges[2:] - edges[:-2]) / 2
    # librosa's mel filters have equal area, so a band holds power per Hz: times its width, power.
    power = 10 ** (mel_db / 10) * widths[:, None]  # (128, T)
    quiet, loud = np.percentile(10 * np.log10(power.sum(0)), [10, 95])
    values = {
        "centroid_hz": float(np.median(centres @ power / power.sum(0))),
        "share_below_200_hz": float(power[centres < 200].sum() / power.sum()),
        "dynamic_range_db": float(loud - quiet),
    }
    if not beat:  # the flux is how much the bands rise from frame to frame
        flux = librosa.onset.onset_strength(S=mel_db, sr=SR, hop_length=HOP)
        onsets = librosa.onset.onset_detect(onset_envelope=flux, sr=SR, hop_length=HOP)
        values["onsets_per_s"] = len(onsets) / (mel_db.shape[1] * HOP / SR)
    return values


def array_facts(array) -> dict:
    """Shape and range of a clip's array (140, T), as steps 1 and 2 show them."""
    mel = array[BANDS["mel"]]
    return {
        "array": " x ".join(map(str, array.shape)),
        "mel part": " x ".join(map(str, mel.shape)),
        "lowest (dB)": f"{mel.min():.1f}",
        "mean (dB)": f"{mel.mean(dtype=float):.1f}",
        "highest (dB)": f"{mel.max():.1f}",
    }


def measure_table(measures, index_name) -> pd.DataFrame:
    """`mel_measures` of clips or genres, a row each, as the steps show them: names and units."""
    columns = {MEASURES[key][0]: measures[key].map(MEASURES[key][1].format) for key in measures}
    return pd.DataFrame(columns).rename_axis(index_name)


def genre_share(values, genres) -> float:
    """Share of the variance over clips that the genre explains (epsilon squared).

    1 minus the variance within the genres over the variance of all clips, each divided by its
    degrees of freedom. So by chance it is 0 on average, and below 0 about half of the time.
    """
    values = pd.Series(np.asarray(values, dtype=float))
    within = values - values.groupby(np.asarray(genres)).transform("mean")
    degrees = max(len(values) - len(set(genres)), 1)
    return 1 - (within**2).sum() / degrees / max(values.var(), 1e-12)


def lstm_batch(arrays, kind="mel") -> tuple[torch.Tensor, torch.Tensor]:
    """(140, T) arrays -> a batch (B, T, F), standardised and then padded, and lengths (B,)."""
    clips = [torch.from_numpy(array[BANDS[kind]]).float().T for array in arrays]
    frames = torch.cat(clips)
    mean, std = frames.mean(0), frames.std(0).clamp(min=1e-3)
    x = nn.utils.rnn.pad_sequence([(clip - mean) / std for clip in clips], batch_first=True)
    return x, torch.tensor([len(clip) for clip in clips])


def lstm_seconds(x) -> float:
    """Time of a training pass (forward, backward) of a textbook LSTM over x (B, T, F), in s."""
    lstm = nn.LSTM(x.shape[2], 128, batch_first=True).to(x.device)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        lstm(x)[0][:, -1].sum().backward()
        lstm.weight_hh_l0.grad[0, 0].item()  # reading a value waits for the GPU
        times.append(time.perf_counter() - began)
    # The first pass allocates memory, and other programs only ever slow one down.
    return min(times[1:])


def lstm_gradient(x, lengths) -> np.ndarray:
    """How strongly each step moves the last output of an untrained textbook LSTM.

    x, lengths : a batch (B, T, F) and its clips' lengths (B,)

    Returns the norm of d(last output)/d(input), (median length,), by steps before the clip's last
    one, relative to the last one, averaged over the clips that are long enough. The 128 outputs
    are added with random signs, so that one backward pass serves all: the squared norm of the
    sum's gradient is on average that of the Jacobian (Hutchinson, 1990).
    """
    # In double precision: in single, what is below 1e-45 would read as 0.
    lstm = nn.LSTM(x.shape[2], 128, batch_first=True).double()
    x = x.double().requires_grad_()
    last = lstm(x)[0][torch.arange(len(x)), lengths - 1]  # (B, 128)
    (last * torch.randn_like(last).sign()).sum().backward()
    norms = x.grad.norm(dim=2)  # (B, T)
    back = lengths[:, None] - 1 - torch.arange(int(lengths.median()))  # the step this far back
    relative = norms.gather(1, back.clamp(min=0)) / norms.gather(1, lengths[:, None] - 1)
    return relative.masked_fill(back < 0, torch.nan).nanmean(0).numpy()


def gradient_reach(norms, share=0.01) -> int:
    """Steps back from the last one until `lstm_gradient` first falls below a share of it."""
    return int(np.argmax(norms < share)) or len(norms)  # the first value is 1
