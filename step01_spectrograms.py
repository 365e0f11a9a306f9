"""Step 1: familiarisation with spectrograms at the mel scale (and step 0: what is there).

The lab asks: 0) browse the data folder, try CPU and GPU; 1a) choose two random lines of
train_labels.txt with different labels; b) read their mel spectrograms; c) show them with
librosa.display.specshow, say what they tell and what differs between the two classes.

    python step01_spectrograms.py
    python step01_spectrograms.py --seed 7          # two other clips
    python step01_spectrograms.py --audio song.mp3  # also a sound file of your own

Input: the genre training split. Output, in outputs/step01_spectrograms/: figures, tables and
two sounds (summary.md), the numbers (metrics.json).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--seed 7").
import argparse
import functools
import itertools
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from patrec.audio import read_clip
from patrec.clips import sample_clips
from patrec.errors import InputError
from patrec.features import BANDS, HOP, N_FFT, N_MELS, SR, extract_features, mel_to_waveform
from patrec.files import FOLDERS, part_folder
from patrec.measures import (
    MEASURES,
    array_facts,
    compare_clips,
    genre_share,
    mean_spectrogram,
    mel_measures,
    spectrogram_similarity,
)
from patrec.plots import mel_ticks, plot_panels, plot_spectrogram
from patrec.step import Step


@functools.cache
def read_audio(path) -> np.ndarray:
    """Read a sound file, at most its middle 30 s as in the lab's clips -> array (140, T)."""
    waveform, damage = read_clip(path)
    if len(waveform) < SR:
        fault = f"{len(waveform) / SR:.2f} s of sound is too short; at least 1 s is needed"
        raise InputError(f"{path}: {fault}")
    if damage:
        print(f"{path}: {damage}")
    return extract_features(waveform)[0]


def audio_file(text) -> Path:
    """Type of --audio: what cannot be read stops the run before it writes anything."""
    try:
        read_audio(Path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(error) from None
    return Path(text)


def add_flags(parser):
    own = "a sound file of your own to show as well, e.g. mp3 or wav"
    parser.add_argument("--audio", type=audio_file, metavar="FILE", help=own)


step = Step("step01_spectrograms", __doc__, parts=("genre",), add_flags=add_flags)
smoke = step.args.smoke


def matmul_seconds(device, n) -> float:
    """Median time of an (n, n) @ (n, n) product in single precision, in s."""
    a, b = torch.rand(2, n, n, device=device)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a value waits for the GPU
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))  # the first one loads libraries


def measure_table(measures, index_name) -> pd.DataFrame:
    """Mel measures, a row per clip or genre, as summary.md shows them: names and units."""
    columns = {label: measures[key].map(unit.format) for key, (label, unit) in MEASURES.items()}
    return pd.DataFrame(columns).rename_axis(index_name)


# %% 0. Browse the data folder, try CPU and GPU
# The lab: os.listdir over the data folder, the GPU switched on and off. Networks mostly multiply
# matrices, so the time of one product gives a first idea of what a GPU can gain.
step.heading("0. Data folder and device")
root = step.source.root
step.text(f"`os.listdir`: {', '.join(sorted(path.name for path in root.iterdir()))}")
parts = []
for part, beat, split in itertools.product(FOLDERS, (False, True), ("train", "test")):
    folder = part_folder(root, part, beat)
    labels = folder / f"{split}_labels.txt"
    lines = labels.read_bytes().splitlines() if labels.exists() else None
    sizes = [path.stat().st_size for path in (folder / split).glob("[!.]*.npy")]
    parts.append(
        {
            "folder": f"{folder.name}/{split}",
            "arrays": len(sizes),
            "labelled clips": "no file" if lines is None else sum(map(bool, lines)) - 1,
            "MB": round(sum(sizes) / 1e6, 1),
            "kB per array": round(np.mean(sizes) / 1e3) if sizes else "-",
        }
    )
step.table(pd.DataFrame(parts).set_index("folder").astype(str), "What the data folder holds")
n = 256 if smoke else 2048
seconds = {device: matmul_seconds(device, n) for device in dict.fromkeys(["cpu", step.device.type])}
times = {
    device: {"time (ms)": f"{1e3 * s:.1f}", "GFLOP/s": f"{2 * n**3 / s / 1e9:.0f}"}
    for device, s in seconds.items()
}
threads = f"CPU threads: {torch.get_num_threads()}"
caption = f"Product of two {n} x {n} matrices, median wall-clock time of 5 runs ({threads})"
step.table(pd.DataFrame(times).T.rename_axis("device"), caption)

# %% 1a. Two random lines with different labels
# The lab: choose them from train_labels.txt. Steps 2 and 3 draw the same two, by the same seed.
# More clips of every genre are drawn too: two clips alone cannot show what is due to the genre.
step.heading("1a. Two random lines with different labels")
per_genre = 2 if smoke else 20
clips = sample_clips(root, per_genre, step.args.seed, step.args.skip_bad, beat=False)
titles = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
step.text(f"Drawn with seed {step.args.seed}: {titles[0]} and {titles[1]}.")

# %% 1b. Their mel spectrograms
# The lab: read the files and take the mel part, as its tutorial does. An array has 140 rows:
# 128 mel bands in dB, then 12 chroma values (step 3); its columns are frames.
step.heading("1b. Their mel spectrograms")


def read_mel(path) -> np.ndarray:
    """Read a clip as the lab's tutorial does: the first 128 rows are the mel spectrogram."""
    spectrogram = np.load(path)  # (140, T)
    return spectrogram[:128]  # (128, T)


step.show_source(read_mel)
folder = part_folder(root, "genre") / "train"
pair = [read_mel(folder / f"{clip.clip_id}.fused.full.npy") for clip in clips[:2]]
# All clips, these two included, from the cache of the arrays, which the networks read too.
mels = [clip.full[BANDS["mel"]] for clip in clips]  # each (128, T)
facts = [array_facts(clip.full) for clip in clips[:2]]
step.table(pd.DataFrame(facts, titles[:2]).rename_axis("clip"), "The two arrays")
step.text(f"""
One column is one frame: the spectrum of {N_FFT} samples ({1e3 * N_FFT / SR:.0f} ms at {SR} Hz),
taken every {HOP} samples ({1e3 * HOP / SR:.1f} ms). Its power is averaged, with triangular weights,
in {N_MELS} bands, which are equally wide up to 1 kHz and wider above. The values are in dB relative
to the loudest cell of the clip (0 dB); everything below -80 dB is set to -80 dB.
""")

# %% 1c. What they show
# The lab: specshow, frequency up, time to the right; comment on what the pictures tell and
# on how the two differ. Some measures are added, so that comments can rest on numbers.
step.heading("1c. What they show")
panels = [(title, mel, False) for title, mel in zip(titles[:2], pair, strict=True)]
caption = f"Mel spectrograms of two clips: {titles[0]} and {titles[1]}"
step.show_source(plot_spectrogram)
step.figure(plot_panels(panels, 2, size=(6, 4)), "two_clips", caption)
step.text("""
A spectrogram shows which frequencies sound, when, and how loud. A held note is a horizontal line
with its overtones above it, a drum hit is a vertical line over many bands, and the spacing of these
vertical lines shows the rhythm. A spectrogram does not show the phase, the absolute level, detail
finer than a band or a frame, frequencies above 11 kHz, or levels more than 80 dB below the maximum.

- **Spectral centroid**: the power-weighted mean frequency, median over the frames; a high one
  sounds bright.
- **Share of energy below 200 Hz**: bass and bass drum.
- **Dynamic range**: from the 10th to the 95th percentile of the frames' loudness.
- **Onset rate**: how often per second the bands suddenly get louder, as notes and drum hits start.
""")
measures = pd.DataFrame([mel_measures(mel) for mel in mels], index=titles)
step.table(measure_table(measures[:2], "clip"), "The two clips, measured")
step.text(compare_clips(measures[:2]))

# %% 1c. The two clips, to hear
# The data set holds no sound, but a mel spectrogram can be turned into some: the filters are
# inverted and the phase is estimated (Griffin & Lim, 1984). How close the sound comes is measured.
close = {}
for place, title in enumerate(titles[:2], start=1):
    waveform = mel_to_waveform(mels[place - 1])
    step.sound(waveform, f"clip_{place}", f"{title}, sound made from its mel spectrogram")
    facts = spectrogram_similarity(waveform, mels[place - 1])
    close[title] = {
        "file": f"`clip_{place}.mp3`",
        "correlation": f"{facts['correlation']:.3f}",
        "mean distance": f"{facts['mean_distance_db']:.1f} dB",
    }
caption = "The mel spectrogram of the sound, compared with the one it was made from"
step.table(pd.DataFrame(close).T.rename_axis("clip"), caption)

# %% 1c. Two clips or two genres?
# Two clips of one genre differ too. So the pictures and measures are repeated for the drawn clips
# of every genre, with the share of each measure's variance that the genre explains.
step.heading("1c. Two clips or two genres?")
genres = np.array([clip.genre for clip in clips])
mean = measures.groupby(genres).mean().sort_values("centroid_hz", ascending=False)
groups = {genre: [mels[i] for i in np.flatnonzero(genres == genre)] for genre in mean.index}
panels = [
    (f"{genre} ({len(group)} clips)", mean_spectrogram(group), False)
    for genre, group in groups.items()
]
caption = "Mean mel spectrogram of the drawn clips of each genre, highest spectral centroid first"
step.figure(plot_panels(panels, 4, size=(3.6, 2.2)), "genre_means", caption)

# Averaged over time and compared with the mean of all genres, the differences stand out. Each
# clip's own mean level is subtracted first, which leaves the shape of its spectrum.
shapes = [
    [mel.mean(1, dtype=float) - mel.mean(dtype=float) for mel in group] for group in groups.values()
]
spectra = np.array([np.mean(group, axis=0) for group in shapes])  # (genres, 128)
apart = spectra - spectra.mean(0)
fig, ax = plt.subplots(figsize=(9, 0.32 * len(mean) + 1.6), layout="constrained")
limit = np.abs(apart).max()
look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
extent = (0, N_MELS, len(mean) - 0.5, -0.5)
image = ax.imshow(apart, aspect="auto", extent=extent, **look)
mel_ticks(ax.xaxis)
ax.set_yticks(range(len(mean)), mean.index)
ax.set(xlabel="Frequency (Hz, mel scale)", ylabel="Genre")
fig.colorbar(image, ax=ax, label="Level minus the mean\nof all genres (dB)")
caption = (
    "Time-averaged spectrum of each genre (without each clip's mean level) minus the mean of all "
    "genres. A sharp edge at high frequencies may be the bandwidth of the recordings"
)
step.figure(fig, "genre_spectra", caption)

n_clips = [len(group) for group in groups.values()]
step.table(measure_table(mean, "genre").assign(clips=n_clips), "Mean over each genre's clips")
shares = {
    label: {
        "lowest genre mean": unit.format(mean[key].min()),
        "highest genre mean": unit.format(mean[key].max()),
        "within a genre (sd)": unit.format(measures[key].groupby(genres).std(ddof=0).mean()),
        "explained by genre": f"{genre_share(measures[key], genres):.0%}",
    }
    for key, (label, unit) in MEASURES.items()
}
caption = f"Between genres and within them, over {len(clips)} clips"
step.table(pd.DataFrame(shares).T.rename_axis("measure"), caption)
share = {label: genre_share(measures[key], genres) for key, (label, _) in MEASURES.items()}
most, least = max(share, key=share.get), min(share, key=share.get)
step.text(f"""
"Explained by genre" is the share of a measure's variance over clips that lies between the genres
(epsilon squared; if a measure does not depend on genre, it is 0 on average and may be negative).
It is largest for the {most}, {share[most]:.0%}, and smallest for the {least}, {share[least]:.0%}.
The rest of the variance lies between clips of the same genre.
""")

# %% A sound file of your own, through the lab's extractor
facts = {}
if step.args.audio:
    title = step.args.audio.name
    own = read_audio(step.args.audio)[BANDS["mel"]]
    facts["audio"] = mel_measures(own)
    step.heading(f"Your own file: {title}")
    fig = plot_panels([(title, own, False)], 1, size=(9, 4))
    step.figure(fig, "own_audio", f"Mel spectrogram of {title}")
    step.table(measure_table(pd.DataFrame([facts["audio"]], index=[title]), "file"))

pair = [
    {"id": clip.clip_id, "genre": clip.genre} | measures.loc[title].to_dict()
    for clip, title in zip(clips[:2], titles, strict=False)
]
step0 = {"parts": parts, "matmul_n": n, "matmul_seconds": seconds}
step.finish(step0=step0, pair=pair, n_clips=len(clips), genres=mean.to_dict("index"), **facts)
