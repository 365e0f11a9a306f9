"""Step 2: synchronisation of the spectrograms to the music beat.

The lab asks: a) print the dimensions of step 1's spectrograms; how many time steps do they
have, is training an LSTM on them efficient, and why? b) repeat step 1 on the beat-synchronised
spectrograms (the median between two beats) and say what differs.

    python step02_beat_sync.py
    python step02_beat_sync.py --seed 7   # two other clips

Input: the genre training split, full and beat-synchronised. Output, in
outputs/step02_beat_sync/: figures and tables (summary.md), their numbers (metrics.json).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--seed 7").
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from patrec.clips import sample_clips
from patrec.features import BANDS, HOP, SR
from patrec.machine import seed_everything
from patrec.measures import (
    array_facts,
    gradient_reach,
    lstm_batch,
    lstm_gradient,
    lstm_seconds,
    measure_table,
    mel_measures,
)
from patrec.plots import COLORS, plot_panels
from patrec.step import Step

step = Step("step02_beat_sync", __doc__, parts=("genre",))
smoke = step.args.smoke
FRAME_S = HOP / SR  # seconds from one frame to the next
FORMS = {"full": "full", "beat-synced": "beat-synchronised"}  # name in metrics.json: in the texts

# %% 2a. Dimensions and time steps
# The lab: print the dimensions of the spectrograms of step 1 (same seed, same clips) and say how
# many time steps they have. More clips of every genre are drawn, as in step 1.
step.heading("2a. Dimensions and time steps")
clips = sample_clips(step.source.root, 2 if smoke else 20, step.args.seed, step.args.skip_bad)
titles = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
arrays = {"full": [clip.full for clip in clips], "beat-synced": [clip.beat for clip in clips]}
cells = [(i, form) for i in (0, 1) for form in arrays]  # the two clips, in both forms
names = [f"{titles[i]}, {FORMS[form]}" for i, form in cells]
facts = [array_facts(arrays[form][i]) for i, form in cells]
step.table(pd.DataFrame(facts, names).rename_axis("clip"), "The arrays of the two clips")
n_steps = pd.DataFrame({f: [array.shape[1] for array in arrays[f]] for f in arrays}, titles)
spread = n_steps.quantile([0, 0.1, 0.5, 0.9, 1]).astype(int).T.rename(FORMS)
spread.columns = ["shortest", "10%", "median", "90%", "longest"]
step.table(spread.rename_axis("spectrograms"), f"Time steps of {len(clips)} drawn clips")

# %% 2a. Is training an LSTM on these steps efficient? What a pass costs
# One layer of 128 units, forward and backward, is timed on the clips cut to several lengths.
step.heading("2a. Is training an LSTM on these steps efficient?")
n_batch = min(4 if smoke else 16, len(clips))
batches = {  # (B, T, F) and lengths (B,), standardised over all drawn clips
    form: [part[:n_batch] for part in lstm_batch(some)] for form, some in arrays.items()
}
batch = batches["full"][0].to(step.device)
n_full, n_beat = (int(lengths.median()) for _, lengths in batches.values())
counts = sorted({n_full, n_beat, *np.geomspace(n_beat / 2, n_full, 5).astype(int).tolist()})
seconds = {n: lstm_seconds(batch[:, :n]) for n in counts}
exponent = float(np.polyfit(np.log(counts), np.log(list(seconds.values())), 1)[0])
ratio = seconds[n_full] / seconds[n_beat]

fig, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
ax.loglog(counts, [1e3 * s for s in seconds.values()], color=COLORS[0], marker="o")
ax.set(xlabel="Time steps", ylabel=f"Time of a training pass (ms, {n_batch} clips)")
ax.set_xticks([n for n in (20, 50, 100, 200, 500, 1000) if counts[0] <= n <= counts[-1]])
round_ms = [digit * 10.0**power for power in range(-1, 5) for digit in (1, 2, 5)]
ax.set_yticks([t for t in round_ms if seconds[counts[0]] <= t / 1e3 <= seconds[counts[-1]]])
ax.grid(alpha=0.3)
threads = f" (threads: {torch.get_num_threads()})" if step.device.type == "cpu" else ""
caption = (
    f"Forward and backward pass of an LSTM of 128 units over {n_batch} clips, on {step.device}"
    f"{threads}: wall-clock time, the fastest of 8 passes. Both axes are logarithmic"
)
step.figure(fig, "lstm_cost", caption)
step.text(f"""
An LSTM's step needs the state of the step before, so the steps of a clip cannot be computed in
parallel on any device. The {n_batch} timed clips have {n_full} frames or {n_beat} beats (medians).
To measure the time for fewer steps, we cut the full clips. A training pass takes
{1e3 * seconds[n_full]:.1f} ms at {n_full} steps, {ratio:.0f} times the {1e3 * seconds[n_beat]:.1f}
ms at {n_beat}. The slope of a straight line through the points of the figure is {exponent:.2f}.
With a slope of 1, the time doubles when the number of steps doubles.
""")

# %% 2a. And why? How far back the gradient of the last output reaches
# An LSTM can only learn from a time step if the gradient reaches it. Measured on an untrained LSTM,
# from which every training starts.
beat_s = FRAME_S * float((n_steps["full"] / n_steps["beat-synced"]).median())
reach, table = {}, {}
fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
for form, step_s, color in zip(arrays, (FRAME_S, beat_s), COLORS, strict=False):
    seed_everything(step.args.seed)
    norms = lstm_gradient(*batches[form])
    label = f"{FORMS[form]} ({len(norms)} steps of {step_s:.3f} s)"
    ax.semilogy(np.arange(len(norms)) * step_s, norms, color=color, label=label)
    far = gradient_reach(norms)
    reach[form] = {"steps": far, "of_steps": len(norms), "seconds": far * step_s}
    reach[form] |= {"share": far / len(norms), "at_first_step": float(norms[-1])}
    table[FORMS[form]] = {
        "steps above 1%": f"{far} of {len(norms)}",
        "seconds of music": f"{far * step_s:.2f}",
        "share of the clip": f"{far / len(norms):.1%}",
        "relative gradient at the earliest step": f"{norms[-1]:.1e}",
    }
ax.axhline(0.01, color="grey", linestyle=":", label="1% of the gradient at the last step")
ax.set(xlabel="Time before the end of the clip (s)", ylabel="Gradient norm, last step = 1")
ax.set(xlim=(0, None), ylim=(max(ax.get_ylim()[0], 1e-30), 10))
ax.legend(fontsize="small")
caption = (
    "Gradient of the last output with respect to the input of each time step, before training. "
    f"Mean over {n_batch} clips (over fewer where some are shorter). Below 1e-30 nothing is shown"
)
step.figure(fig, "lstm_gradient", caption)
caption = (
    "How many steps at the end of the clip have a gradient above 1% of the last step's gradient"
)
step.table(pd.DataFrame(table).T.rename_axis("spectrograms"), caption)
step.text(f"""
So training is not efficient on full clips: a pass takes {ratio:.0f} times as long as on beats. The
gradient is below 1% of its value at the last step for everything that is more than
{reach["full"]["seconds"]:.1f} s (full clips) or {reach["beat-synced"]["seconds"]:.1f} s (beats)
before the end of a clip. What lies earlier hardly changes the weights when the training begins.

There are two reasons. The steps are computed one after the other, so the time grows with their
number. And the gradient vanishes: on its way back from the last step it is multiplied by one
Jacobian per step, and if the norms of these matrices are below 1, the product becomes small
exponentially (Hochreiter, 1991; Bengio et al., 1994). The forget gate of an LSTM can preserve the
gradient, if training has brought the gate close to 1. The numbers are from one random start.

Step 5 therefore changes the LSTM (5a): eight frames of a full clip make one time step, it reads the
clip in both directions, and the class is predicted from its outputs at all steps. So every step
gets a gradient directly, not only through the later steps. The LSTM is trained on crops of clips.
""")

# %% 2b. Step 1 on beat-synchronised spectrograms
# The lab: repeat step 1 with the files in which the frames between two beats have become one,
# their median band by band, and comment on the differences.
step.heading("2b. Step 1 on beat-synchronised spectrograms")
mels = {form: [array[BANDS["mel"]] for array in some] for form, some in arrays.items()}
panels = [(f"{titles[i]}, {FORMS[form]}", mels[form][i], form != "full") for i, form in cells]
caption = f"Full and beat-synchronised mel spectrograms: {titles[0]} and {titles[1]}"
step.figure(plot_panels(panels, 2), "two_clips", caption)
measures = pd.DataFrame([mel_measures(mels[form][i], beat=True) for i, form in cells], names)
caption = (
    "The two clips, measured in both forms. The onset rate is missing, because it needs frames"
)
step.table(measure_table(measures, "clip"), caption)
full, on_beats = measures[::2].to_dict("records"), measures[1::2].to_dict("records")
step.text(f"""
In a beat-synchronised spectrogram one column is the median of the frames between two beats. What
lasts for more than half of a beat, such as a held note, remains; a drum hit is shorter and mostly
disappears, so there are fewer vertical lines. The time axis counts beats, not seconds: clips of
different tempo become comparable, but clips of 30 s now have different numbers of columns.

On beats the spectral centroid of the two clips is {on_beats[0]["centroid_hz"]:.0f} Hz and
{on_beats[1]["centroid_hz"]:.0f} Hz (full: {full[0]["centroid_hz"]:.0f} Hz and
{full[1]["centroid_hz"]:.0f} Hz). Their dynamic range is {on_beats[0]["dynamic_range_db"]:.1f} dB
and {on_beats[1]["dynamic_range_db"]:.1f} dB (full: {full[0]["dynamic_range_db"]:.1f} dB and
{full[1]["dynamic_range_db"]:.1f} dB).
""")

# %% 2b. What the synchronisation changes, in numbers
# How many frames become one, and how the level changes: the extractor sets 0 dB in each form anew.
step.heading("2b. What the synchronisation changes, in numbers")
level = {form: np.array([mel.mean(dtype=float) for mel in mels[form]]) for form in mels}
changes = pd.DataFrame(
    {
        "frames per step": n_steps["full"] / n_steps["beat-synced"],
        "beats per minute": 60 * (n_steps["beat-synced"] - 1) / (n_steps["full"] * FRAME_S),
        "level change (dB)": level["beat-synced"] - level["full"],
    }
)
over_all = changes.agg(["min", "median", "mean", "max"]).rename("all: {}".format)
rows = pd.concat([changes[:2], over_all])
caption = f"What the synchronisation changes: the two clips, and all {len(clips)} drawn clips"
step.table(rows.map("{:.1f}".format).rename_axis("clip"), caption)
step.text(f"""
- One beat-synchronised step stands for {changes["frames per step"].median():.0f} frames (median),
  {beat_s:.2f} s. We count n - 1 beats in a clip of n steps. The beats per minute are this number,
  divided by the clip's length in minutes. librosa's beat tracker drops weak beats at both ends, so
  the first and the last column may cover more than one beat.
- The level changes by {changes["level change (dB)"].mean():+.1f} dB on average. The lab's extractor
  sets 0 dB at the loudest cell of each array. In the beat-synchronised array this cell is a median,
  so it is never louder than the loudest cell of the full array. So 0 dB now stands for a lower
  level, and the other values, which are relative to it, mostly rise.
  A median also removes short loud sounds, so the mean level of some clips falls.
""")

# %% The numbers for metrics.json
cost = {"batch": n_batch, "seconds": seconds, "exponent": exponent, "full_over_beat": ratio}
differences = {"pair": changes[:2].to_dict("index"), "mean": changes.mean().to_dict()}
steps = n_steps.agg(["min", "median", "max"]).to_dict()
step.finish(steps=steps, lstm_cost=cost, gradient_reach=reach, differences=differences)
