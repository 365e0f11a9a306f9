"""Step 2: synchronisation of the spectrograms to the music beat.

The lab asks: a) print the dimensions of step 1's spectrograms; how many time steps do they
have, is training an LSTM on them efficient, and why? b) repeat step 1 on the beat-synced
spectrograms (the median between two beats) and say what differs.

    python step02_beat_sync.py
    python step02_beat_sync.py --seed 7   # two other clips

Input: the genre training split, full and beat-synced. Output, in outputs/step02_beat_sync/:
figures and tables (summary.md), their numbers (metrics.json).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--seed 7").
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

from patrec.clips import sample_clips
from patrec.errors import InputError
from patrec.features import BANDS, HOP, N_MELS, SR
from patrec.labels import read_entries
from patrec.machine import seed_everything
from patrec.measures import (
    MEASURES,
    array_facts,
    compare_clips,
    gradient_reach,
    lstm_batch,
    lstm_gradient,
    lstm_seconds,
    mean_spectrogram,
    mel_measures,
    share_within_beats,
    track_beats,
)
from patrec.plots import COLORS, plot_panels
from patrec.step import Step

step = Step("step02_beat_sync", __doc__, parts=("genre",))
smoke = step.args.smoke
FORMS = ("full", "beat-synced")
FRAME_S = HOP / SR  # seconds from one frame to the next


def count_steps(source, beat) -> list[int]:
    """Time steps of every clip of the genre training split, from the files' headers alone."""
    counts = []
    for entry in read_entries(source.root, "genre", "train", beat):
        try:
            counts.append(np.load(entry.path, mmap_mode="r", allow_pickle=False).shape[1])
        except Exception as error:  # whatever a broken header makes numpy raise
            if source.skip_bad:
                continue
            reason = (str(error).splitlines() or ["empty file"])[0]
            advice = "step 4 lists such files, --skip-bad leaves them out"
            fault = f"{entry.path}: not a readable array ({reason}); {advice}"
            raise InputError(fault) from error
    return counts


def train_lstm(x, lengths, targets, n_updates, batch_size=16):
    """Train a textbook LSTM, read at each clip's last step, on genre labels.

    x, lengths, targets : clips (N, T, F), their lengths (N,) and class numbers (N,)

    Returns the nn.LSTM and the loss of every update.
    """
    lstm = nn.LSTM(x.shape[2], 128, batch_first=True).to(step.device)
    head = nn.Linear(128, int(targets.max()) + 1).to(step.device)
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(n_updates):
        rows = torch.randperm(len(x))[:batch_size]
        hidden = lstm(x[rows].to(step.device))[0]  # (B, T, 128)
        last = hidden[torch.arange(len(rows)), lengths[rows] - 1]  # (B, 128)
        loss = nn.functional.cross_entropy(head(last), targets[rows].to(step.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lstm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return lstm, losses


# %% 2a. Dimensions and time steps
# The lab: print the dimensions of the spectrograms of step 1 (same seed, same clips) and say how
# many time steps they have. The steps are counted over the whole training split too.
step.heading("2a. Dimensions and time steps")
clips = sample_clips(step.source.root, 2 if smoke else 20, step.args.seed, step.args.skip_bad)
titles = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
shapes = [[f"{N_MELS} x {form.shape[1]}" for form in (clip.full, clip.beat)] for clip in clips[:2]]
caption = "Mel bands x time steps of the two clips"
step.table(pd.DataFrame(shapes, titles[:2], FORMS).rename_axis("clip"), caption)

n_steps = {form: count_steps(step.source, beat=form != "full") for form in FORMS}
quantiles = {"shortest": 0, "10%": 10, "median": 50, "90%": 90, "longest": 100}
spread = {
    form: {"clips": len(n)} | {name: int(np.percentile(n, q)) for name, q in quantiles.items()}
    for form, n in n_steps.items()
}
caption = "Time steps over the genre training split"
step.table(pd.DataFrame(spread).T.rename_axis("spectrograms"), caption)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for ax, (form, n), color in zip(axes, n_steps.items(), COLORS, strict=False):
    width = max(1, -(-(max(n) - min(n)) // 30))  # at most 30 bars, of whole steps
    ax.hist(n, bins=np.arange(min(n) - 0.5, max(n) + width + 0.5, width), color=color)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.ticklabel_format(axis="x", useOffset=False)
    ax.set(xlabel="Time steps of a clip", ylabel="Number of clips")
    ax.set_title(f"{form} (median {np.median(n):.0f})")
step.figure(fig, "time_steps", "Number of time steps per clip, full and beat-synced")

# %% 2a. Is training an LSTM on these steps efficient? What a pass costs
# An LSTM's step needs the state of the step before, so the steps of a clip cannot be computed in
# parallel on any device: time grows with their number. Measured with one layer of 128 units,
# forward and backward, on the clips cut to several lengths.
step.heading("2a. Is training an LSTM on these steps efficient?")
x, lengths = {}, {}
x["full"], lengths["full"] = lstm_batch([clip.full for clip in clips])  # (N, T, 128), (N,)
x["beat-synced"], lengths["beat-synced"] = lstm_batch([clip.beat for clip in clips])
n_batch = min(4 if smoke else 16, len(clips))
batch = x["full"][:n_batch].to(step.device)
n_full, n_beat = (int(np.median(n_steps[form])) for form in FORMS)
n_full = min(n_full, batch.shape[1])
counts = sorted({n_full, n_beat, *np.geomspace(n_beat / 2, n_full, 5).astype(int).tolist()})
seconds = {n: lstm_seconds(batch[:, :n]) for n in counts}
slope = float(np.polyfit(np.log(counts), np.log(list(seconds.values())), 1)[0])

fig, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
ax.loglog(counts, list(seconds.values()), color="grey", marker=".")
for n, form, color in zip((n_full, n_beat), FORMS, COLORS, strict=False):
    label = f"{form}: {n} steps, {seconds[n]:.3f} s"
    ax.plot(n, seconds[n], "o", color=color, markersize=9, label=label)
ax.set(xlabel="Time steps", ylabel=f"Time of a training pass (s, {n_batch} clips)")
ax.set_xticks(counts, counts)
ax.set_xticks([], minor=True)
ax.grid(alpha=0.3)
ax.legend()
device = f"cpu (threads: {torch.get_num_threads()})" if step.device.type == "cpu" else step.device
caption = (
    f"Forward and backward pass of an LSTM of 128 units over {n_batch} clips, on {device}: "
    "wall-clock time, the fastest of 8 passes. Both axes are logarithmic"
)
step.figure(fig, "lstm_cost", caption)
epoch = {n: seconds[n] * len(n_steps["full"]) / n_batch for n in (n_full, n_beat)}
step.text(f"""
An LSTM's step needs the state of the step before, so the steps of a clip cannot be computed in
parallel on any device. A training pass over {n_batch} clips takes {seconds[n_full]:.3f} s at
{n_full} steps, {seconds[n_full] / seconds[n_beat]:.0f} times the {seconds[n_beat]:.3f} s at
{n_beat}. Fitted to all lengths, time grows like the number of steps to the power {slope:.2f}. For
an epoch over {len(n_steps["full"])} clips that is {epoch[n_full]:.1f} s or {epoch[n_beat]:.1f} s.
""")

# %% 2a. And why? How far back the gradient of the last output reaches
# An LSTM can only learn from a time step if the gradient reaches it. So the gradient is measured
# before and after a short training on the genre labels of the drawn clips, with the same number
# of updates for both forms.
genres = sorted({clip.genre for clip in clips})
targets = torch.tensor([genres.index(clip.genre) for clip in clips])
beat_s = FRAME_S * float(np.median([clip.full.shape[1] / clip.beat.shape[1] for clip in clips]))
step_s = {"full": FRAME_S, "beat-synced": beat_s}
n_updates = 3 if smoke else 50  # some ten seconds on full clips
reach, table = {"untrained": {}, "trained": {}}, {}
fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
for form, color in zip(FORMS, COLORS, strict=False):
    seed_everything(step.args.seed)
    learned, losses = train_lstm(x[form], lengths[form], targets, n_updates)
    for state, lstm, line in (("untrained", None, "-"), ("trained", learned, "--")):
        seed_everything(step.args.seed)
        norms = lstm_gradient(x[form][:n_batch], lengths[form][:n_batch], lstm)
        label = f"{form}, {state} ({len(norms)} steps of {step_s[form]:.2f} s)"
        ax.semilogy(np.arange(len(norms)) * step_s[form], norms, line, color=color, label=label)
        far = gradient_reach(norms)
        reach[state][form] = {
            "steps": far,
            "of_steps": len(norms),
            "seconds": far * step_s[form],
            "share": far / len(norms),
            "at_first_step": float(norms[-1]),
        }
        table[f"{form}, {state}"] = {
            "steps above 1%": f"{far} of {len(norms)}",
            "seconds of music": f"{far * step_s[form]:.2f}",
            "share of the clip": f"{far / len(norms):.1%}",
            "relative gradient at the earliest step": f"{norms[-1]:.1e}",
            "training loss": "-" if lstm is None else f"{np.mean(losses[-10:]):.2f}",
        }
ax.axhline(0.01, color="grey", linestyle=":", label="1% of the last step's")
ax.set(xlabel="Time before the end of the clip (s)", ylabel="Gradient norm, last step = 1")
ax.set(xlim=(0, None), ylim=(max(ax.get_ylim()[0], 1e-30), 10))
ax.legend(fontsize="small")
caption = (
    "Gradient of the last output with respect to the input of each time step, before and after "
    f"{n_updates} updates, averaged over those of {n_batch} clips that have this many steps; "
    "cut off at 1e-30"
)
step.figure(fig, "lstm_gradient", caption)
caption = "How far back the gradient of the last output stays above 1% of the last step's"
step.table(pd.DataFrame(table).T.rename_axis("LSTM"), caption)
losses = [table[f"{form}, trained"]["training loss"] for form in FORMS]
step.text(f"""
So training is not efficient on full clips: a pass takes {seconds[n_full] / seconds[n_beat]:.0f}
times as long as on beats. Going back from the end of a clip, the gradient of the last output stays
above 1% for {reach["untrained"]["full"]["seconds"]:.1f} s before training and for
{reach["trained"]["full"]["seconds"]:.1f} s after {n_updates} updates (on beats for
{reach["untrained"]["beat-synced"]["seconds"]:.1f} and
{reach["trained"]["beat-synced"]["seconds"]:.1f} s). After the same number of updates the training
loss (mean of the last 10 at most) is {losses[0]} on full clips and {losses[1]} on beats; equal
probabilities for all {len(genres)} genres would give {np.log(len(genres)):.2f}.

Why: on its way back from the last step the gradient is multiplied by one Jacobian per step. If the
factors are below 1, the product vanishes exponentially (Hochreiter, 1991; Bengio et al., 1994). The
forget gate of an LSTM can preserve the gradient, if training has brought the gate close to 1. The
numbers are from one random start; Adam, batches of {min(16, len(clips))} of the {len(clips)} clips.

Step 5 deals with the length of full clips in three ways: it trains on crops of 15 s, eight frames
are joined into one step, and the class is predicted from the outputs at all steps, in both
directions, so the gradient enters at every step and not only at the last one.
""")

# %% 2b. Step 1 on beat-synced spectrograms
# The lab: repeat step 1 with the files in which the frames between two beats have become one,
# their median band by band, and comment on the differences.
step.heading("2b. Step 1 on beat-synced spectrograms")
mels = {
    "full": [clip.full[BANDS["mel"]] for clip in clips],
    "beat-synced": [clip.beat[BANDS["mel"]] for clip in clips],
}
cells = [(i, form) for i in (0, 1) for form in FORMS]
arrays = {f"{titles[i]}, {f}": clips[i].full if f == "full" else clips[i].beat for i, f in cells}
facts = {title: array_facts(array) for title, array in arrays.items()}
step.table(pd.DataFrame(facts).T.rename_axis("clip"), "The arrays of the two clips")
panels = [(f"{titles[i]}, {form}", mels[form][i], form != "full") for i, form in cells]
caption = f"Full and beat-synced mel spectrograms: {titles[0]} and {titles[1]}"
step.figure(plot_panels(panels, 2), "two_clips", caption)
groups = {genre: [] for genre in genres}
for clip, mel in zip(clips, mels["beat-synced"], strict=True):
    groups[clip.genre].append(mel)
panels = [(genre, mean_spectrogram(group), True) for genre, group in groups.items()]
caption = "Mean beat-synced mel spectrogram of the drawn clips of each genre (full ones: step 1)"
step.figure(plot_panels(panels, 4, size=(3.6, 2.2)), "genre_means", caption)
step.text("""
In a beat-synced spectrogram one column is the median of the frames between two beats. What lasts
for more than half of a beat, such as a held note, remains; a drum hit is shorter and mostly
disappears, so there are fewer vertical lines. The time axis counts beats, not seconds: clips of
different tempo become comparable, and their lengths differ.
""")

# %% 2b. What the synchronisation changes, in numbers
# A median per beat loses what happens within a beat. The share of the variance that is lost is
# measured on full clips. Step 1's measures are taken in both forms, except for the onset rate.
frames = pd.DataFrame({f: [mel.shape[1] for mel in mels[f]] for f in FORMS}, index=titles)
sd = {f: [float(np.sqrt(mel.var(1, dtype=float).mean())) for mel in mels[f]] for f in FORMS}
level = {f: np.array([mel.mean(dtype=float) for mel in mels[f]]) for f in FORMS}
on_beat = [(mel, track_beats(mel)) for mel in mels["full"]]
changes = pd.DataFrame(
    {
        "steps, full": frames["full"],
        "steps, beat-synced": frames["beat-synced"],
        "frames per beat": frames["full"] / frames["beat-synced"],
        "beats per minute": 60 * (frames["beat-synced"] - 1) / (frames["full"] * FRAME_S),
        "variance within beats (%)": [100 * share_within_beats(*pair) for pair in on_beat],
        "shifted grid (%)": [100 * share_within_beats(*pair, offset=0.5) for pair in on_beat],
        "sd over time, full (dB)": sd["full"],
        "sd over time, beat-synced (dB)": sd["beat-synced"],
        "level change (dB)": level["beat-synced"] - level["full"],
    },
    index=titles,
)
by_genre = changes.groupby([clip.genre for clip in clips]).mean()
for rows, index_name, what in (
    (changes[:2], "clip", "the two clips"),
    (by_genre, "genre", "mean over each genre's drawn clips"),
):
    caption = f"What the synchronisation changes: {what}"
    step.table(rows.map("{:.1f}".format).rename_axis(index_name), caption)
measures = {form: pd.DataFrame([mel_measures(m, beat=True) for m in mels[form]]) for form in FORMS}
both = {
    MEASURES[key][0]: {form: MEASURES[key][1].format(measures[form][key].mean()) for form in FORMS}
    | {"rank correlation": f"{measures['full'][key].corr(after, method='spearman'):.2f}"}
    for key, after in measures["beat-synced"].items()
}
caption = f"Step 1's measures in both forms: mean and agreement over {len(clips)} clips"
step.table(pd.DataFrame(both).T.rename_axis("measure"), caption)
step.text(compare_clips(measures["beat-synced"][:2].set_axis(titles[:2])) + " (beat-synced)")
middle = changes.median()
step.text(f"""
- One beat-synced step stands for {middle["frames per beat"]:.0f} frames (median),
  {middle["frames per beat"] * FRAME_S:.2f} s. The clips have {middle["beats per minute"]:.0f} beats
  per minute in the median, from {changes["beats per minute"].min():.0f} to
  {changes["beats per minute"].max():.0f} (librosa's tracker drops weak beats at both ends).
- "Variance within beats" is the share of the bands' variance over time that one value per beat
  cannot hold: {changes["variance within beats (%)"].mean():.0f}% on average. If the cuts lay half a
  beat later, it would be {changes["shifted grid (%)"].mean():.0f}%. The data set does not store its
  beat times, so beats are tracked on each clip's own mel spectrogram.
- The level changes by {changes["level change (dB)"].mean():+.1f} dB on average. The lab's extractor
  sets 0 dB at the loudest cell of each array, here the loudest median and not the loudest frame.
""")

# %% The numbers for metrics.json
spans = {
    form: {"min": min(n), "median": float(np.median(n)), "max": max(n), "clips": len(n)}
    for form, n in n_steps.items()
}
cost = {
    "batch": n_batch,
    "seconds": seconds,
    "exponent": slope,
    "full_over_beat": seconds[n_full] / seconds[n_beat],
}
step.finish(
    steps=spans,
    lstm_cost=cost,
    gradient_reach=reach["untrained"],
    gradient_reach_trained=reach["trained"] | {"updates": n_updates},
    differences={
        "pair": changes[:2].to_dict("index"),
        "genres": by_genre.to_dict("index"),
        "mean": changes.mean().to_dict(),
    },
)
