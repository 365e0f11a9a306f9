"""Step 2: synchronisation of the spectrograms to the music beat.

The lab asks: a) print the dimensions of step 1's spectrograms; how many time steps do they
have, is training an LSTM on them efficient, and why? b) repeat step 1 on the beat-synced
spectrograms (the median between two beats) and say what differs.

    python step02_beat_sync.py
    python step02_beat_sync.py --seed 7   # two other clips

Input: the genre training split, full and beat-synced. Output, in outputs/step02_beat_sync/:
figures, tables and what they show (summary.md, metrics.json).

Measured on a small set of real music (see README), seed 42, two CPU cores, torch
2.13.0: 1,292 steps cost 24 times the time of 57 beats, and all but the last third of a
second has lost 99% of the gradient.
"""


import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from common import (
    BANDS,
    COLORS,
    HOP,
    MEASURES,
    N_MELS,
    SR,
    InputError,
    Step,
    lstm_batch,
    lstm_gradient,
    lstm_seconds,
    make_parser,
    mean_spectrogram,
    mel_measures,
    parse_args,
    plot_panels,
    read_entries,
    run_main,
    sample_clips,
)

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
        except Exception as error:  # whatever a broken header makes numpy raise
            if not step.args.skip_bad:
                reason = (str(error).splitlines() or ["empty file"])[0]
                raise InputError(f"{entry.path}: not a readable array ({reason}); step 4 lists such files, --skip-bad leaves them out") from error
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
