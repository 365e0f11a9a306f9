"""Step 2: synchronisation of the spectrograms to the music beat.

The lab asks: a) print the dimensions of step 1's spectrograms; how many time steps do they
have, is training an LSTM on them efficient, and why? b) repeat step 1 on the beat-synced
spectrograms (the median between two beats) and say what differs.

    python step02_beat_sync.py
    python step02_beat_sync.py --seed 7   # two other clips

Input: the genre training split, full and beat-synced. Output, in outputs/step02_beat_sync/:
figures, tables and what they show (summary.md, metrics.json).
"""

import math
import random
import time
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

from common import (
    BANDS,
    COLORS,
    HOP,
    N_MELS,
    SR,
    InputError,
    Step,
    load_clips,
    make_parser,
    parse_args,
    part_folder,
    plot_spectrogram,
    read_entries,
    run_main,
)

# >>> -> common
class Clip(NamedTuple):
    """One clip as steps 1 to 3 look at it; full and beat are (140, T) float16 arrays."""

    clip_id: str
    genre: str
    full: np.ndarray
    beat: np.ndarray | None


def sample_clips(data_dir, per_genre, seed, skip_bad=False, beat=True) -> list[Clip]:
    """Draw random lines of the genre training labels, at most `per_genre` of a genre.

    Genres are those of the label file, before any merge. The first two clips are the
    lab's two random lines with different labels (steps 1 to 3 draw the same ones).
    """
    lines = read_entries(data_dir, "genre", "train")
    random.Random(seed).shuffle(lines)
    drawn = {}
    for entry in lines:
        drawn.setdefault(entry.label, []).append(entry)
    chosen = [group[i] for i in range(per_genre) for group in drawn.values() if i < len(group)]

    def arrays(entries):
        store = load_clips(entries, skip_bad)
        spans = zip(store.entries, store.starts.tolist(), store.lengths.tolist(), strict=True)
        return {entry.clip_id: store.frames[start : start + n].T.numpy() for entry, start, n in spans}

    full = arrays(chosen)
    folder = part_folder(data_dir, "genre", beat=True) / "train"
    synced = arrays([entry._replace(path=folder / entry.path.name) for entry in chosen]) if beat else dict.fromkeys(full)
    clips = [Clip(e.clip_id, e.label, full[e.clip_id], synced[e.clip_id]) for e in chosen if e.clip_id in full and e.clip_id in synced]
    second = next((i for i, clip in enumerate(clips) if clip.genre != clips[0].genre), None)
    if second is None:
        raise InputError(f"{chosen[0].path.parent}: no two readable clips of different genres; the lab compares two")
    clips.insert(1, clips.pop(second))
    return clips


# Each measure of a mel spectrogram: name, unit, and what is said of the clip that has more of it.
MEASURES = {
    "centroid_hz": ("spectral centroid", "{:.0f} Hz", "is brighter"),
    "share_below_200_hz": ("share of energy below 200 Hz", "{:.1%}", "has the heavier bass"),
    "dynamic_range_db": ("dynamic range", "{:.1f} dB", "varies more in loudness"),
    "onsets_per_s": ("onset rate", "{:.2f} per s", "has more note and drum onsets"),
}


def mel_measures(mel_db, beat=False) -> dict:
    """Brightness, bass, dynamics and onsets of a mel spectrogram (128, T) in dB.

    centroid_hz : median over the steps of the power-weighted mean frequency
    share_below_200_hz : share of the energy, by the bands' centre frequencies
    dynamic_range_db : from the 10th to the 95th percentile of the steps' loudness
    onsets_per_s : peaks of the spectral flux; only of frames, not of beats
    """
    import librosa

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
    if not beat:
        flux = librosa.onset.onset_strength(S=mel_db, sr=SR, hop_length=HOP)  # how much the bands rise from frame to frame
        onsets = librosa.onset.onset_detect(onset_envelope=flux, sr=SR, hop_length=HOP)
        values["onsets_per_s"] = len(onsets) / (mel_db.shape[1] * HOP / SR)
    return values


def lstm_batch(arrays, kind="mel") -> tuple[torch.Tensor, torch.Tensor]:
    """(140, T) arrays -> rows of one kind as a batch (B, T, F), standardised, then padded; lengths (B,)."""
    clips = [torch.from_numpy(array[BANDS[kind]]).float().T for array in arrays]
    frames = torch.cat(clips)
    mean, std = frames.mean(0), frames.std(0).clamp(min=1e-3)
    x = nn.utils.rnn.pad_sequence([(clip - mean) / std for clip in clips], batch_first=True)
    return x, torch.tensor([len(clip) for clip in clips])


def lstm_seconds(x) -> float:
    """Time of a training pass (forward, backward) of a textbook LSTM over x (B, T, F), in s."""
    lstm = nn.LSTM(x.shape[2], 128, batch_first=True).to(x.device)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        lstm(x)[0][:, -1].sum().backward()
        lstm.weight_hh_l0.grad[0, 0].item()  # reading a value waits for the GPU
        times.append(time.perf_counter() - began)
    return min(times[1:])  # the first pass allocates memory, and other programs only ever slow one down


def lstm_gradient(x, lengths) -> np.ndarray:
    """How strongly each step moves the last output of an untrained textbook LSTM.

    Returns
    -------
    np.ndarray [shape=(median length,)]
        Norm of d(last output)/d(input) by steps before the clip's last one, relative to
        the last one, averaged over the clips that are so long.
    """
    # In double precision: in single, what is below 1e-45 would read as 0.
    lstm = nn.LSTM(x.shape[2], 128, batch_first=True).double()
    x = x.double().requires_grad_()
    last = lstm(x)[0][torch.arange(len(x)), lengths - 1]  # (B, 128)
    # The squared norm of a product with random signs is on average that of the Jacobian (Hutchinson, 1990).
    (last * torch.randn_like(last).sign()).sum().backward()
    norms = x.grad.norm(dim=2)  # (B, T)
    back = lengths[:, None] - 1 - torch.arange(int(lengths.median()))  # (B, median length): the step so far back
    relative = norms.gather(1, back.clamp(min=0)) / norms.gather(1, lengths[:, None] - 1)
    return relative.masked_fill(back < 0, torch.nan).nanmean(0).numpy()


def mean_spectrogram(arrays) -> np.ndarray:
    """Mean of (F, T) arrays step by step, as far as at least half of them reach."""
    n_steps = int(np.median([array.shape[1] for array in arrays]))
    total, count = np.zeros((len(arrays[0]), n_steps)), np.zeros(n_steps)
    for array in arrays:
        part = array[:, :n_steps]
        total[:, : part.shape[1]] += part
        count[: part.shape[1]] += 1
    return total / count


def plot_panels(panels, n_columns, kind="mel", size=(6.0, 3.0)):
    """Spectrograms side by side under one colour scale.

    panels : list of (title, (F, T) array, whether its steps are beats), row by row
    size : width and height of a panel, in inches
    """
    n_rows = math.ceil(len(panels) / n_columns)
    spacing = {"hspace": 0.9 / size[1], "wspace": 0.06}  # given, not found by a layout engine: 40 panels would take it seconds
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(size[0] * n_columns, size[1] * n_rows), squeeze=False, gridspec_kw=spacing)
    for index, (ax, (title, array, beat)) in enumerate(zip(axes.flat, panels, strict=False)):
        image = plot_spectrogram(ax, array, kind, beat)
        ax.set_title(title, fontsize="medium")
        if index % n_columns:
            ax.set(ylabel="", yticklabels=[])
        if index + n_columns < len(panels):
            ax.set_xlabel("")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    label = "Power (dB, 0: the clip's loudest cell)" if kind == "mel" else "Chroma (1: a frame's strongest pitch class)"
    fig.colorbar(image, ax=fig.axes, label=label, shrink=min(1, 5 / (size[1] * n_rows)), fraction=0.02, pad=0.02)
    return fig


# <<< -> common

FORMS = ("full", "beat-synced")
FRAME_S = HOP / SR  # seconds from one frame to the next


def main(argv=None):
    args = parse_args(make_parser(__doc__), argv)
    step = Step("step02_beat_sync", args)

    # 2a) The dimensions of step 1's two clips (same seed, same clips), in both forms.
    clips = sample_clips(step.data, 2 if args.smoke else 20, args.seed, args.skip_bad)
    names = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
    step.heading("2a. Dimensions and time steps")
    shapes = [[f"{N_MELS} x {form.shape[1]}" for form in (clip.full, clip.beat)] for clip in clips[:2]]
    step.table(pd.DataFrame(shapes, names[:2], FORMS).rename_axis("clip"), "Mel bands x time steps of the two clips")

    # Two clips may be odd ones: the number of steps over the whole training split.
    steps = {form: count_steps(step, beat) for form, beat in zip(FORMS, (False, True), strict=True)}
    report_steps(step, steps)

    # Is an LSTM efficient on so many steps, and why (not)? Measured, not believed: what a
    # training pass costs, and how far the error at the last step reaches back.
    step.heading("2a. Is training an LSTM on these steps efficient?")
    batch = clips[: 4 if args.smoke else 16]
    x_full, full_lengths = lstm_batch([clip.full for clip in batch])
    x_beat, beat_lengths = lstm_batch([clip.beat for clip in batch])
    cost = report_cost(step, x_full.to(step.device), *(int(np.median(n)) for n in steps.values()), len(steps["full"]))
    beat_s = FRAME_S * float(np.median([clip.full.shape[1] / clip.beat.shape[1] for clip in clips]))
    reach = report_reach(step, {"full": (x_full, full_lengths, FRAME_S), "beat-synced": (x_beat, beat_lengths, beat_s)})
    step.text(verdict(cost, *reach.values()))

    # 2b) Step 1 again on the beat-synced arrays, side by side with the full ones.
    step.heading("2b. Step 1 on beat-synced spectrograms")
    differences = compare_forms(step, clips, names)
    spans = {form: {"min": min(n), "median": float(np.median(n)), "max": max(n), "clips": len(n)} for form, n in steps.items()}
    return step.finish(steps=spans, lstm_cost=cost, gradient_reach=reach, differences=differences)


def count_steps(step, beat) -> list[int]:
    """Time steps of every clip of the genre training split, from the files' headers alone."""
    lengths = []
    for entry in read_entries(step.data, "genre", "train", beat):
        try:
            lengths.append(np.load(entry.path, mmap_mode="r", allow_pickle=False).shape[1])
        except (ValueError, OSError, EOFError, IndexError) as error:
            if not step.args.skip_bad:
                raise InputError(f"{entry.path}: not a readable array ({error}); step 4 lists such files, --skip-bad leaves them out") from error
    return lengths


def report_steps(step, steps):
    """Distribution of the number of time steps, full and beat-synced."""
    quantiles = {"shortest": 0, "10%": 10, "median": 50, "90%": 90, "longest": 100}
    rows = {form: {"clips": len(n)} | {name: int(np.percentile(n, q)) for name, q in quantiles.items()} for form, n in steps.items()}
    step.table(pd.DataFrame(rows).T.rename_axis("spectrograms"), "Time steps over the genre training split")
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for ax, (form, n), color in zip(axes, steps.items(), COLORS, strict=False):
        width = max(1, -(-(max(n) - min(n)) // 30))
        ax.hist(n, bins=np.arange(min(n) - 0.5, max(n) + width + 0.5, width), color=color)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="Time steps of a clip", ylabel="Number of clips", title=f"{form} (median {np.median(n):.0f})")
    step.figure(fig, "time_steps", "Number of time steps per clip, full and beat-synced")


def report_cost(step, x, n_full, n_beat, n_clips) -> dict:
    """Time of a training pass against the number of time steps; x (B, T, 128)."""
    n_full = min(n_full, x.shape[1])
    counts = sorted({n_full, n_beat} | {int(n) for n in np.geomspace(n_beat / 2, n_full, 5)})
    seconds = {n: lstm_seconds(x[:, :n]) for n in counts}
    slope = float(np.polyfit(np.log(counts), np.log(list(seconds.values())), 1)[0])
    fig, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    ax.loglog(counts, list(seconds.values()), color="grey", marker=".")
    for n, form, color in zip((n_full, n_beat), FORMS, COLORS, strict=False):
        ax.plot(n, seconds[n], "o", color=color, markersize=9, label=f"{form}: {n} steps, {seconds[n]:.3f} s")
    ax.set(xlabel="Time steps", ylabel=f"Time of a training pass (s, {len(x)} clips)")
    ax.grid(which="both", alpha=0.3)
    ax.legend()
    step.figure(fig, "lstm_cost", f"Forward and backward pass of an LSTM of 128 units over {len(x)} clips, on {step.device.type}")
    step.text(
        f"A training pass over {len(x)} clips takes {seconds[n_full]:.3f} s at {n_full} steps and {seconds[n_beat]:.3f} s at {n_beat}: time grows "
        f"like the number of steps to the power {slope:.2f}. An epoch over {n_clips} clips takes {seconds[n_full] * n_clips / len(x):.1f} s "
        f"or {seconds[n_beat] * n_clips / len(x):.1f} s. Each step of an LSTM waits for the one before, on any device."
    )
    return {"batch": len(x), "seconds": seconds, "exponent": slope, "full_over_beat": seconds[n_full] / seconds[n_beat]}


def report_reach(step, batches) -> dict:
    """How far back the gradient of the last output reaches; batches: form -> (x, lengths, seconds of a step)."""
    fig, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    reach = {}
    for color, (form, (x, lengths, step_s)) in zip(COLORS, batches.items(), strict=False):
        norms = lstm_gradient(x, lengths)
        ax.semilogy(np.arange(len(norms)) * step_s, norms, color=color, label=f"{form}: {len(norms)} steps of {step_s:.2f} s")
        n = int(np.argmax(norms < 0.01)) or len(norms)  # the first value is 1
        reach[form] = {"steps": n, "of_steps": len(norms), "seconds": n * step_s, "share": n / len(norms), "at_first_step": float(norms[-1])}
    ax.axhline(0.01, color="grey", linestyle=":", label="1% of the last step's")
    ax.set(xlabel="Time before the end of the clip (s)", ylabel="Gradient norm, last step = 1", xlim=(0, None), ylim=(1e-30, 10))
    ax.legend(fontsize="small")
    step.figure(fig, "lstm_gradient", "Gradient of the last output with respect to each time step's input, untrained LSTM, mean over a batch")
    rows = {form: {"steps above 1%": f"{r['steps']} of {r['of_steps']}", "seconds of music": f"{r['seconds']:.2f}",
                   "share of the clip": f"{r['share']:.1%}", "at the first step": f"{r['at_first_step']:.1e}"} for form, r in reach.items()}  # fmt: skip
    step.table(pd.DataFrame(rows).T.rename_axis("spectrograms"), "How far back the gradient of the last output reaches")
    return reach


def verdict(cost, full, beat) -> str:
    """The answer to 2a, as the measurements give it."""
    efficient = full["share"] > 0.5 and cost["full_over_beat"] < 2
    return (
        f"**{'Yes' if efficient else 'No'}: training an LSTM on {full['of_steps']} steps is {'' if efficient else 'not '}efficient.** A pass costs "
        f"{cost['full_over_beat']:.1f} times that on beats. And where the loss looks at the last step, the gradient falls under 1% within "
        f"{full['steps']} steps, so that at first only the last {full['seconds']:.1f} s of the clip ({full['share']:.1%}) teach the network anything. "
        f"On beats it falls within {beat['steps']} steps, but those are {beat['seconds']:.1f} s ({beat['share']:.0%} of the clip). The LSTMs of step 5 "
        "therefore average frames into longer steps, read in both directions, and pool over all steps instead of taking the last."
    )


def compare_forms(step, clips, names) -> dict:
    """2b: step 1's figures and measures on both forms, and what the median takes away."""
    genres = np.array([clip.genre for clip in clips])
    mels = {"full": [clip.full[BANDS["mel"]] for clip in clips], "beat-synced": [clip.beat[BANDS["mel"]] for clip in clips]}
    panels = [(f"{names[i]}, {form}", mels[form][i], form != "full") for i in range(2) for form in FORMS]
    step.figure(plot_panels(panels, 2), "two_clips", f"Full and beat-synced mel spectrograms: {names[0]} and {names[1]}")
    panels = [(f"{genre}, {form}", mean_spectrogram([mels[form][i] for i in np.flatnonzero(genres == genre)]), form != "full")
              for genre in sorted(set(genres)) for form in FORMS]  # fmt: skip
    step.figure(plot_panels(panels, 4, size=(3.4, 2.0)), "genre_means", "Mean mel spectrogram of every genre, full and beat-synced")

    measures = {form: pd.DataFrame([mel_measures(mel, beat=True) for mel in mels[form]]) for form in FORMS}

    # Variance over time = variance between beats + variance within them. A beat-synced
    # spectrogram holds the first part only; the rest is what happens inside a beat.
    n_full, n_beat = (np.array([mel.shape[1] for mel in mels[form]]) for form in FORMS)
    var_full, var_beat = (np.array([mel.var(1, dtype=float).sum() for mel in mels[form]]) for form in FORMS)
    level_full, level_beat = (np.array([mel.mean(dtype=float) for mel in mels[form]]) for form in FORMS)
    columns = {"steps, full": n_full, "steps, beat-synced": n_beat, "frames per beat": n_full / n_beat, "beats per minute": 60 * (n_beat - 1) / (n_full * FRAME_S),
               "variance lost (%)": 100 * (1 - var_beat / np.maximum(var_full, 1e-9)), "level change (dB)": level_beat - level_full}  # fmt: skip
    rows = pd.DataFrame(columns, index=names)
    by_genre = rows.groupby(genres).mean()
    step.table(rows[:2].map("{:.1f}".format).rename_axis("clip"), "What the synchronisation changes: the two clips")
    step.table(by_genre.map("{:.1f}".format).rename_axis("genre"), "What the synchronisation changes: mean over each genre's clips")
    frames, bpm, lost, level = (rows[column] for column in list(columns)[2:])
    lost_by_genre = by_genre["variance lost (%)"]
    lines = [
        f"- One beat-synced step stands for {frames.median():.0f} frames (median), {frames.median() * FRAME_S:.2f} s. The number of steps now "
        f"follows the tempo: {bpm.median():.0f} beats per minute in the median, from {bpm.min():.0f} to {bpm.max():.0f}.",
        f"- The median removes {lost.mean():.0f}% of the variance over time, the attacks and whatever else is shorter than a beat: most in "
        f"{lost_by_genre.idxmax()} ({lost_by_genre.max():.0f}%), least in {lost_by_genre.idxmin()} ({lost_by_genre.min():.0f}%).",
        f"- Levels {'rise' if level.mean() > 0 else 'fall'} by {abs(level.mean()):.1f} dB on average, since 0 dB is now the loudest median and not the loudest frame.",
    ]
    for key, (label, unit, _) in MEASURES.items():
        if key in measures["full"]:
            before, after = (measures[form][key] for form in FORMS)
            lines.append(f"- {label[0].upper()}{label[1:]}: {unit.format(before.mean())} full, {unit.format(after.mean())} beat-synced on average; "
                         f"rank correlation over the clips {before.corr(after, method='spearman'):.2f}.")  # fmt: skip
    step.text("\n".join(lines))
    return {"pair": rows[:2].to_dict("index"), "genres": by_genre.to_dict("index"), "mean": rows.mean().to_dict()}


if __name__ == "__main__":
    metrics = run_main(main)
