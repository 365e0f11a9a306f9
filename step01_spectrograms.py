"""Step 1: familiarisation with spectrograms at the mel scale (and step 0: what is there).

The lab asks: 0) browse the data folder, try CPU and GPU; 1a) choose two random lines of
train_labels.txt with different labels; b) read their mel spectrograms; c) show them with
librosa.display.specshow, say what they tell and what differs between the two classes.

    python step01_spectrograms.py
    python step01_spectrograms.py --seed 7          # two other clips
    python step01_spectrograms.py --audio song.mp3  # a file of one's own besides

Input: the data set (arrays of the genre training split). Output, in
outputs/step01_spectrograms/: figures, tables and what they show (summary.md, metrics.json).
"""

import itertools
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from common import (
    BANDS,
    FOLDERS,
    HOP,
    MEASURES,
    N_MELS,
    SR,
    InputError,
    Step,
    extract_features,
    genre_share,
    make_parser,
    mean_spectrogram,
    mel_measures,
    parse_args,
    part_folder,
    plot_panels,
    run_main,
    sample_clips,
    with_units,
)


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--audio", type=Path, metavar="FILE", help="an audio file of one's own to show besides (wav, mp3, flac, ogg)")
    args = parse_args(parser, argv)
    own = read_audio(args.audio) if args.audio else None  # first, so that a bad file stops the run before it writes
    step = Step("step01_spectrograms", args)

    # Step 0) Browse the data folder and try the device, before anything is built on them.
    step0 = report_data_and_device(step)

    # 1a) Two random lines with different labels; besides, some clips of every genre, since
    # two clips alone cannot show what belongs to the genre and what to the clip.
    clips = sample_clips(step.data, 2 if args.smoke else 20, args.seed, args.skip_bad, beat=False)
    names = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
    step.heading("1a. Two random lines with different labels")
    step.text(f"Drawn with seed {args.seed}: {names[0]} and {names[1]}.")

    # 1b) Read the arrays: rows 0 to 127 are the mel spectrogram, in dB.
    step.heading("1b. Their mel spectrograms")
    mels = [clip.full[BANDS["mel"]] for clip in clips]
    for clip, mel in zip(clips[:2], mels, strict=False):
        step.text(
            f"`{clip.clip_id}.fused.full.npy` is {clip.full.shape[0]} x {clip.full.shape[1]}. Its first {N_MELS} rows are the mel bands, "
            f"in {mel.shape[1]} frames of {1e3 * HOP / SR:.1f} ms ({mel.shape[1] * HOP / SR:.1f} s), from {mel.min():.1f} to "
            f"{mel.max():.1f} dB, {mel.mean(dtype=float):.1f} dB on average."
        )

    # 1c) specshow: frequency up, time to the right. Measured besides, so that the
    # comments rest on numbers and not on the eye alone.
    step.heading("1c. What they show")
    panels = [(name, mel, False) for name, mel in zip(names[:2], mels, strict=False)]
    step.figure(plot_panels(panels, 2, size=(6, 4)), "two_clips", f"Mel spectrograms of two clips: {names[0]} and {names[1]}")
    step.text(
        "A spectrogram shows which frequencies sound, when and how loud. A held note is a horizontal line with its overtones "
        "above it, a drum hit a vertical stripe over many bands; the rhythm is the spacing of the stripes, loudness the "
        "overall colour. The mel axis gives low frequencies more room, as hearing does. What is lost is the phase, and "
        "absolute loudness: 0 dB is the loudest cell of each clip."
    )
    measures = pd.DataFrame([mel_measures(mel) for mel in mels], index=names)
    step.table(with_units(measures[:2], "clip"), "The two clips, measured")
    lines = []
    for key, (label, unit, more) in MEASURES.items():
        high, low = measures[key][:2].idxmax(), measures[key][:2].idxmin()  # equal values name the same clip
        values = [unit.format(measures.loc[name, key]) for name in (high, low)]
        lines.append(f"- **{high}** {more}: {label} {values[0]} against {values[1]}." if high != low else f"- Same {label}: {values[0]}.")
    step.text("\n".join(lines))

    # The same for whole genres: what the two clips differ in may be the clips' own.
    genres = report_genres(step, clips, mels, measures)

    # A file of one's own, through the lab's own extractor, against the same measures.
    facts = {}
    if own is not None:
        mel, name = own[BANDS["mel"]], args.audio.name
        facts["audio"] = mel_measures(mel)
        step.heading(f"A file of one's own: {name}")
        step.figure(plot_panels([(name, mel, False)], 1, size=(9, 4)), "own_audio", f"Mel spectrogram of {name}")
        step.table(with_units(pd.DataFrame([facts["audio"]], index=[name]), "file"))

    pair = [{"id": clip.clip_id, "genre": clip.genre} | measures.loc[name].to_dict() for clip, name in zip(clips[:2], names, strict=False)]
    return step.finish(step0=step0, pair=pair, n_clips=len(clips), genres=genres, **facts)


def read_audio(path) -> np.ndarray:
    """Read an audio file, at most its middle 30 s as in the lab's clips -> full (140, T)."""
    import librosa

    if not path.is_file():
        raise InputError(f"{path}: no such audio file; give an existing wav, mp3, flac or ogg in --audio")
    try:
        with warnings.catch_warnings(action="ignore"):  # of one reader giving way to the next: the error below says it
            waveform, _ = librosa.load(path, sr=SR, mono=True)
    except Exception as error:  # soundfile, audioread and codecs each raise their own
        raise InputError(f"{path}: not readable as audio ({str(error) or type(error).__name__}); convert it to wav, mp3, flac or ogg") from error
    if len(waveform) < SR:
        raise InputError(f"{path}: {len(waveform) / SR:.2f} s of sound is too short; at least 1 s is needed")
    start = max(0, len(waveform) - 30 * SR) // 2
    return extract_features(waveform[start : start + 30 * SR])[0]


def report_data_and_device(step) -> dict:
    """Step 0: the data folder part by part, and one matrix product on each device."""
    step.heading("0. Data folder and device")
    step.text(f"`os.listdir`: {', '.join(sorted(path.name for path in step.data.iterdir()))}")
    rows = []
    for part, beat, split in itertools.product(FOLDERS, (False, True), ("train", "test")):
        folder = part_folder(step.data, part, beat)
        labels = folder / f"{split}_labels.txt"
        sizes = [path.stat().st_size for path in (folder / split).glob("*.npy")]
        n_lines = sum(bool(line.strip()) for line in labels.open("rb")) - 1 if labels.exists() else "no file"
        rows.append({"folder": f"{folder.name}/{split}", "arrays": len(sizes), "labelled clips": n_lines,
                     "MB": round(sum(sizes) / 1e6, 1), "kB per array": round(np.mean(sizes) / 1e3) if sizes else "-"})  # fmt: skip
    step.table(pd.DataFrame(rows).set_index("folder").astype(str), "What the data folder holds")

    n = 256 if step.args.smoke else 2048
    seconds = {device: matmul_seconds(device, n) for device in dict.fromkeys(["cpu", step.device.type])}
    times = ", ".join(f"{1e3 * s:.1f} ms on {d} ({2 * n**3 / s / 1e9:.0f} GFLOP/s)" for d, s in seconds.items())
    gain = f"; {step.device.type} is {seconds['cpu'] / seconds[step.device.type]:.1f} times as fast as cpu." if len(seconds) > 1 else "; no GPU in use."
    step.text(f"Product of two {n} x {n} matrices, median of 5: {times}{gain}")
    return {"parts": rows, "matmul_n": n, "matmul_seconds": seconds}


def matmul_seconds(device, n) -> float:
    """Median time of an (n, n) @ (n, n) product in single precision, in s."""
    a, b = torch.rand(2, n, n, device=device)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a value waits for the GPU
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))  # the first one loads libraries


def report_genres(step, clips, mels, measures) -> dict:
    """Mean spectrogram of every genre, what sets each apart, and the measures per genre."""
    import librosa

    step.heading("The genres")
    genres = np.array([clip.genre for clip in clips])
    mean = measures.groupby(genres).mean().sort_values("centroid_hz", ascending=False)
    groups = {genre: [mels[i] for i in np.flatnonzero(genres == genre)] for genre in mean.index}
    panels = [(f"{genre} ({len(group)} clips)", mean_spectrogram(group), False) for genre, group in groups.items()]
    step.figure(plot_panels(panels, 4, size=(3.6, 2.2)), "genre_means", "Mean mel spectrogram of every genre, the brightest genre first")

    # Averaged over time and set against the mean of all genres, the differences stand out.
    spectra = np.array([np.mean([mel.mean(1, dtype=float) for mel in group], axis=0) for group in groups.values()])  # (genres, 128)
    apart = spectra - spectra.mean(0)
    centres = librosa.mel_frequencies(N_MELS + 2, fmax=SR / 2)[1:-1]
    fig, ax = plt.subplots(figsize=(9, 0.32 * len(mean) + 1.6), layout="constrained")
    limit = np.abs(apart).max()
    image = ax.imshow(apart, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ticks_hz = [64, 256, 512, 1024, 2048, 4096, 8192]
    ax.set_xticks(np.interp(ticks_hz, centres, np.arange(N_MELS)), ticks_hz)
    ax.set_yticks(range(len(mean)), mean.index)
    ax.set(xlabel="Frequency (Hz, mel scale)", ylabel="Genre")
    fig.colorbar(image, ax=ax, label="Level against the mean\nof all genres (dB)")
    step.figure(fig, "genre_spectra", "Time-averaged spectrum of every genre against the mean of all genres")

    step.table(with_units(mean, "genre").assign(clips=[len(group) for group in groups.values()]), "Mean over each genre's clips")
    lines = []
    for key, (label, unit, _) in MEASURES.items():
        high, low = mean[key].idxmax(), mean[key].idxmin()
        lines.append(f"- {label[0].upper()}{label[1:]}: highest for **{high}** ({unit.format(mean.loc[high, key])}), lowest for **{low}** "
                     f"({unit.format(mean.loc[low, key])}); genre explains {genre_share(measures[key], genres):.0%} of its variance over {len(clips)} clips.")  # fmt: skip
    spread = apart.std(0)
    lines.append(f"- The genres' mean levels lie furthest apart around {centres[spread.argmax()]:.0f} Hz (standard deviation over genres "
                 f"{spread.max():.1f} dB), closest around {centres[spread.argmin()]:.0f} Hz ({spread.min():.1f} dB).")  # fmt: skip
    step.text("\n".join(lines) + "\n\nThe rest of the variance lies between clips of one genre: two single clips say little about two genres.")
    return mean.to_dict("index")


if __name__ == "__main__":
    metrics = run_main(main)
