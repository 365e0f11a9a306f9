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
from patrec.labels import label_line
from patrec.measures import MEASURES, array_facts, genre_share, measure_table, mel_measures
from patrec.plots import mel_ticks, plot_panels, plot_spectrogram
from patrec.step import Step


def add_flags(parser):
    text = "a sound file of your own to show as well, e.g. mp3 or wav"
    parser.add_argument("--audio", type=Path, metavar="FILE", help=text)


def read_audio(path) -> np.ndarray:
    """Read a sound file, at most its middle 30 s as in the lab's clips -> array (140, T)."""
    waveform, damage = read_clip(path)
    if len(waveform) < SR:
        fault = f"{len(waveform) / SR:.2f} s of sound is too short; at least 1 s is needed"
        raise InputError(f"{path}: {fault}")
    if damage:
        print(f"{path}: {damage}")
    return extract_features(waveform)[0]


def matmul_seconds(device, n) -> float:
    """Median time of an (n, n) @ (n, n) product in single precision, in s."""
    a, b = torch.rand(2, n, n, device=device)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a value waits for the GPU
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))  # the first one loads libraries


step = Step("step01_spectrograms", __doc__, parts=("genre",), add_flags=add_flags)
smoke, own_file = step.args.smoke, step.args.audio
own = read_audio(own_file) if own_file else None  # first: a wrong name ends the run at once

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
    row = {"folder": f"{folder.name}/{split}", "arrays": len(sizes)}
    row["labelled clips"] = "no file" if lines is None else sum(map(bool, lines)) - 1
    parts.append(row | {"MB": round(sum(sizes) / 1e6, 1)})
step.table(pd.DataFrame(parts).set_index("folder").astype(str), "What the data folder holds")
n = 256 if smoke else 2048
seconds = {device: matmul_seconds(device, n) for device in dict.fromkeys(["cpu", step.device.type])}
caption = f"Time of a product of two {n} x {n} matrices (CPU threads: {torch.get_num_threads()})"
times = pd.DataFrame({"time (ms)": pd.Series(seconds) * 1e3}).rename_axis("device")
step.table(times, f"{caption}, median of 5 runs")

# %% 1a. Two random lines with different labels
# The lab: choose them from train_labels.txt. Steps 2 and 3 draw the same two, by the same seed.
# More clips of every genre are drawn too: two clips alone cannot show what is due to the genre.
step.heading("1a. Two random lines with different labels")
per_genre = 2 if smoke else 20
clips = sample_clips(root, per_genre, step.args.seed, step.args.skip_bad, beat=False)
titles = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
step.text(f"""
Drawn with seed {step.args.seed} from `train_labels.txt`:

- `{label_line(root, clips[0].clip_id)}`
- `{label_line(root, clips[1].clip_id)}`
""")

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
arrays = [array_facts(clip.full) for clip in clips[:2]]
step.table(pd.DataFrame(arrays, titles[:2]).rename_axis("clip"), "The two arrays")
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
step.figure(plot_panels(panels, 2, size=(4.8, 3.4)), "two_clips", caption)
measures = pd.DataFrame([mel_measures(mel) for mel in mels], index=titles)
step.table(measure_table(measures[:2], "clip"), "The two clips, measured")
first, second = measures[:2].to_dict("records")
step.text(f"""
A spectrogram shows which frequencies sound, when, and how loud. A held note is a horizontal line
with its overtones above it, a drum hit is a vertical line over many bands, and the spacing of these
vertical lines shows the rhythm. These spectrograms do not show the phase, the absolute level,
detail finer than a band or a frame, frequencies above 11 kHz, or levels more than 80 dB below the
maximum.

- **Spectral centroid**: the power-weighted mean frequency, median over the frames; a high one
  sounds bright. That of {titles[0]} is {first["centroid_hz"]:.0f} Hz,
  that of {titles[1]} is {second["centroid_hz"]:.0f} Hz.
- **Share of energy below 200 Hz**: where the bass and the bass drum are. It is
  {first["share_below_200_hz"]:.1%} in the first clip and {second["share_below_200_hz"]:.1%} in
  the second.
- **Dynamic range**: the level of a loud frame (the 95th percentile) minus that of a quiet one (the
  10th percentile). It is {first["dynamic_range_db"]:.1f} dB in the first clip and
  {second["dynamic_range_db"]:.1f} dB in the second.
- **Onset rate**: how often the bands suddenly get louder, as notes and drum hits start. The first
  clip has {first["onsets_per_s"]:.2f} onsets per second, the second {second["onsets_per_s"]:.2f}.
""")

# %% 1c. The two clips, to hear
# The data set holds no sound, but a mel spectrogram can be turned into some.
step.text("""
The two clips as sound, made from their mel spectrograms: the mel filters are inverted and the phase
is estimated (Griffin & Lim, 1984).
""")
for i in (0, 1):
    waveform = mel_to_waveform(mels[i])
    step.sound(waveform, f"clip_{i + 1}", f"{titles[i]}, sound made from its mel spectrogram")

# %% 1c. Two clips or two genres?
# Two clips of one genre differ too. So the spectra and measures are compared over the drawn clips
# of every genre, with the share of each measure's variance that the genre explains. Each clip's
# own mean level is subtracted from its spectrum first, which leaves the shape.
step.heading("1c. Two clips or two genres?")
genres = np.array([clip.genre for clip in clips])
mean = measures.groupby(genres).mean().sort_values("centroid_hz", ascending=False)
shapes = np.array([mel.mean(1, dtype=float) - mel.mean(dtype=float) for mel in mels])
spectra = pd.DataFrame(shapes).groupby(genres).mean().loc[mean.index]  # (genres, 128)
apart = spectra - spectra.mean()
fig, ax = plt.subplots(figsize=(9, 0.32 * len(mean) + 1.6), layout="constrained")
limit = np.abs(apart.to_numpy()).max()
look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
extent = (0, N_MELS, len(mean) - 0.5, -0.5)
image = ax.imshow(apart, aspect="auto", extent=extent, **look)
mel_ticks(ax.xaxis)
ax.set_yticks(range(len(mean)), mean.index)
ax.set(xlabel="Frequency (Hz, mel scale)", ylabel="Genre")
fig.colorbar(image, ax=ax, label="Level minus the mean\nof all genres (dB)")
caption = (
    f"Mean spectrum of each genre (at most {per_genre} clips), compared with the mean of all "
    "genres. Each clip's mean level is subtracted first. The genre with the highest spectral "
    "centroid is on top. A sharp edge at high frequencies may come from how the clips were "
    "recorded or compressed, not from the genre"
)
step.figure(fig, "genre_spectra", caption)
share = {MEASURES[key][0]: genre_share(measures[key], genres) for key in measures}
table = measure_table(mean, "genre")
table.loc["explained by genre"] = [f"{value:.0%}" for value in share.values()]
caption = (
    f"Mean over at most {per_genre} randomly chosen clips of each genre. Last row: the share of "
    "the variance that the genre explains"
)
step.table(table, caption)
most, least = max(share, key=share.get), min(share, key=share.get)
step.text(f"""
A measure varies from clip to clip. "Explained by genre" is the share of this variance that comes
from differences between the genres (epsilon squared). For a measure that has nothing to do with
genre, this share is near 0 and may be negative. Here it is largest for the {most},
{share[most]:.0%}, and smallest for the {least}, {share[least]:.0%}. The rest of the variance lies
between clips of the same genre.
""")

# %% A sound file of your own, through the lab's extractor
facts = {}
if own_file:
    step.heading(f"Your own file: {own_file.name}")
    own_mel = own[BANDS["mel"]]
    facts["audio"] = mel_measures(own_mel)
    fig = plot_panels([(own_file.name, own_mel, False)], 1, size=(9, 4))
    step.figure(fig, "own_audio", f"Mel spectrogram of {own_file.name}")
    step.table(measure_table(pd.DataFrame([facts["audio"]], index=[own_file.name]), "file"))

two = measures[:2].assign(id=[clip.clip_id for clip in clips[:2]], genre=genres[:2])
step0 = {"parts": parts, "matmul_n": n, "matmul_seconds": seconds}
facts |= {"pair": two.to_dict("records"), "n_clips": len(clips), "genres": mean.to_dict("index")}
step.finish(step0=step0, **facts)
