"""Step 3: familiarisation with chromagrams.

The lab asks: repeat steps 1 and 2 with the chromagrams of the same pieces, i.e. show those
of two clips of different classes, full and beat-synced, print their dimensions, say whether
an LSTM can be trained on them efficiently, and comment on what they tell and what differs.

    python step03_chroma.py
    python step03_chroma.py --seed 7   # two other clips

Input: the genre training split, full and beat-synced. Output, in outputs/step03_chroma/:
figures and tables (summary.md), their numbers (metrics.json).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--seed 7").
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from patrec.clips import sample_clips
from patrec.features import BANDS, HOP, N_CHROMA, NOTES, SR
from patrec.machine import seed_everything
from patrec.measures import (
    genre_share,
    lstm_batch,
    lstm_gradient,
    lstm_seconds,
    share_within_beats,
    track_beats,
)
from patrec.plots import plot_panels
from patrec.step import Step

step = Step("step03_chroma", __doc__, parts=("genre",))
smoke = step.args.smoke
FORMS = ("full", "beat-synced")


def chroma_measures(chroma) -> dict:
    """What a chromagram (12, T) says of a clip's harmony.

    strongest : name of the pitch class with the highest mean
    entropy_bits : of the mean over time, as shares: 0 for a single note, 3.58 for all alike
    change : mean absolute change of a pitch class from one step to the next
    """
    profile = chroma.mean(1, dtype=float) + 1e-12
    share = profile / profile.sum()
    jumps = np.abs(np.diff(chroma.astype(float), axis=1))
    return {
        "strongest": NOTES[int(profile.argmax())],
        "entropy_bits": float(-(share * np.log2(share)).sum()),
        "change": float(jumps.mean()) if jumps.size else 0.0,
    }


# %% 3, as 1a-b. The same two clips, their chromagrams
# The lab: choose two random lines with different labels and read their files. The seed of
# steps 1 and 2 draws the same clips; a chromagram is rows 128 to 139 of their arrays.
step.heading("3, as 1a-b. The same two clips")
clips = sample_clips(step.source.root, 2 if smoke else 20, step.args.seed, step.args.skip_bad)
titles = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
chroma = {  # each (12, T)
    "full": [clip.full[BANDS["chroma"]] for clip in clips],
    "beat-synced": [clip.beat[BANDS["chroma"]] for clip in clips],
}
step.text(f"Drawn with seed {step.args.seed}: {titles[0]} and {titles[1]}.")

# %% 3, as 1c. What they show
# The lab: show them with specshow and comment on what they tell and how the two differ.
# Full and beat-synced lie side by side, since step 2 asks the same of both. Measured
# besides: the strongest pitch class, how many share the energy, how fast they change.
step.heading("3, as 1c. What they show")
cells = [(i, form) for i in (0, 1) for form in FORMS]
panels = [(f"{titles[i]}, {form}", chroma[form][i], form != "full") for i, form in cells]
caption = f"Full and beat-synced chromagrams: {titles[0]} and {titles[1]}"
step.figure(plot_panels(panels, 2, kind="chroma"), "two_clips", caption)
step.text(
    f"""
    A chromagram adds up how strong each note is over all octaves: harmony stays, and melody up
    to its octave; the octave and most of the timbre are gone (overtones still reach other
    rows: the third harmonic lies an octave and a fifth higher). A horizontal line is a held note,
    a column with three strong rows a triad, a column in which most rows are strong noise or a
    drum. Every frame of a full chromagram that is not silent is scaled so that its strongest pitch
    class is 1: quiet and loud frames count alike.

    - **Strongest pitch class**: the highest mean over time.
    - **Entropy** of the mean over time: 0 bits for a single note, {math.log2(N_CHROMA):.2f}
      bits where all twelve sound alike.
    - **Change per step**: mean absolute change of a pitch class from one step to the next.
    """
)
measures = {
    form: pd.DataFrame([chroma_measures(c) for c in chroma[form]], index=titles) for form in FORMS
}
columns = {
    "strongest": "strongest pitch class",
    "entropy_bits": "entropy (bits)",
    "change": "change per step",
}
rows = [measures[form][i : i + 1].set_axis([f"{titles[i]}, {form}"]) for i, form in cells]
table = pd.concat(rows).rename(columns=columns).rename_axis("clip")
step.table(table, "The two clips, measured")

# %% 3, as 1c. Two clips or two genres?
# Songs come in all keys, so a plain mean over a genre's clips blurs them. Turned so that
# its strongest note is row 0, each clip shows the intervals that it is made of instead. As
# shares of the clip's sum: without that, how flat a chromagram is would be compared too.
step.heading("3, as 1c. Two clips or two genres?")
genres = np.array([clip.genre for clip in clips])
classes = sorted(set(genres))
levels = np.array([c.mean(dtype=float) for c in chroma["full"]])
profiles = np.array([c.mean(1, dtype=float) for c in chroma["full"]])  # (clips, 12)
profiles /= profiles.sum(1, keepdims=True)
turned = np.array([np.roll(profile, -profile.argmax()) for profile in profiles])
fig, axes = plt.subplots(
    1, 2, figsize=(12, 0.32 * len(classes) + 1.6), layout="constrained", sharey=True
)
for ax, rows, ticks, label in (
    (axes[0], profiles, NOTES, "Pitch class"),
    (axes[1], turned, range(N_CHROMA), "Semitones above the clip's strongest pitch class"),
):
    means = np.array([rows[genres == genre].mean(0) for genre in classes])  # (genres, 12)
    image = ax.imshow(means, aspect="auto", cmap="viridis", interpolation="nearest")
    ax.set_xticks(range(N_CHROMA), ticks)
    ax.set(xlabel=label)
    fig.colorbar(image, ax=ax, label="Share of the clip's chroma", location="top", aspect=40)
axes[0].set_yticks(range(len(classes)), classes)
axes[0].set_ylabel("Genre")
caption = (
    "Mean profile of every genre: by note (left), relative to each clip's strongest note (right); "
    "two colour scales"
)
step.figure(fig, "genre_chroma", caption)

values = pd.DataFrame(
    {
        "entropy (bits)": measures["full"]["entropy_bits"].to_numpy(),
        "change per frame": measures["full"]["change"].to_numpy(),
        "change per beat": measures["beat-synced"]["change"].to_numpy(),
    }
)
by_genre = values.groupby(genres).mean().rename_axis("genre")
n_clips = [int((genres == genre).sum()) for genre in classes]
step.table(by_genre.assign(clips=n_clips), "Mean over each genre's drawn clips")
explained = {column: genre_share(values[column], genres) for column in values}
explained["mean of all chroma values"] = genre_share(levels, genres)
explained["share of a pitch class, by note"] = np.mean([genre_share(c, genres) for c in profiles.T])
intervals = np.mean([genre_share(c, genres) for c in turned[:, 1:].T])
explained["share of a pitch class, from the strongest note"] = intervals
shares = {name: {"explained by genre": f"{share:.0%}"} for name, share in explained.items()}
caption = f"Share of the variance over {len(clips)} clips that lies between the genres"
step.table(pd.DataFrame(shares).T.rename_axis("measure"), caption)

# %% 3, as 2a. Dimensions, and is training an LSTM efficient?
# The lab's questions of step 2 for chromagrams: 12 rows in place of 128, as many steps.
# Two of its measurements again: what a training pass costs, and how far back the gradient of
# an untrained LSTM's last output reaches; the mel rows stand below for comparison.
step.heading("3, as 2a. Dimensions, and is training an LSTM efficient?")
shapes = [[f"{N_CHROMA} x {chroma[form][i].shape[1]}" for form in FORMS] for i in (0, 1)]
caption = "Pitch classes x time steps of the two clips"
step.table(pd.DataFrame(shapes, titles[:2], FORMS).rename_axis("clip"), caption)
batch = clips[: 4 if smoke else 16]
frames_per_beat = float(np.median([clip.full.shape[1] / clip.beat.shape[1] for clip in clips]))
lstm = {}
for kind in ("chroma", "mel"):
    for form, frames in (("full", 1), ("beat-synced", frames_per_beat)):
        arrays = [clip.full if form == "full" else clip.beat for clip in batch]
        x, lengths = lstm_batch(arrays, kind)  # (B, T, F), (B,)
        seed_everything(step.args.seed)  # the same start for every row
        norms = lstm_gradient(x, lengths)
        far = int(np.argmax(norms < 0.01)) or len(norms)  # the first value is 1
        lstm[f"{kind}, {form}"] = {
            "rows": x.shape[2],
            "steps": int(lengths.median()),
            "pass (s)": lstm_seconds(x[:, : int(lengths.median())].to(step.device)),
            "steps above 1%": far,
            "seconds of music": far * frames * HOP / SR,
        }
table = pd.DataFrame(lstm).T.rename_axis("input")
table = table.astype({"rows": int, "steps": int, "steps above 1%": int})
caption = (
    f"One training pass of an LSTM of 128 units over {len(batch)} clips, and how far back the "
    "gradient of its last output stays above 1% of the last step's, before training. Standardised "
    "by these clips alone, where step 2 takes all that were drawn; other programs beside it slow a "
    "pass down"
)
step.table(table, caption)
step.text(
    """
    The rows of a step are multiplied at once, the steps one after the other: fewer rows save
    work inside a step, fewer steps shorten the chain of computations that must wait for each
    other, and with it the chain of factors that a gradient passes.
    """
)

# %% 3, as 2b. What beat synchronisation changes
# The lab: what differs once the frames between two beats have become one, their median.
# Measured as in step 2: how much of the variance over time lies within a beat, where a
# median cannot hold it, and what becomes of step 1's measures.
step.heading("3, as 2b. What beat synchronisation changes")
full, beat = (measures[form] for form in FORMS)
beats = [track_beats(clip.full[BANDS["mel"]]) for clip in clips]
on_beat = list(zip(chroma["full"], beats, strict=True))
within, shifted = (
    100 * np.mean([share_within_beats(*pair, offset) for pair in on_beat]) for offset in (0.0, 0.5)
)
same_strongest = float((full["strongest"] == beat["strongest"]).mean())
means = {
    form: {
        "time steps (median)": f"{np.median([c.shape[1] for c in chroma[form]]):.0f}",
        "entropy (bits)": f"{measures[form]['entropy_bits'].mean():.2f}",
        "change per step": f"{measures[form]['change'].mean():.3f}",
    }
    for form in FORMS
}
caption = f"Chromagrams, full and beat-synced: mean over {len(clips)} clips"
step.table(pd.DataFrame(means).T.rename_axis("chromagrams"), caption)
step.text(
    f"""
    - {within:.0f}% of the variance over time lies within a beat (beats tracked as in step 2);
      with all cuts moved by half a beat it would be {shifted:.0f}%.
    - The strongest pitch class is the same in both forms in {same_strongest:.0%} of
      {len(clips)} clips.
    - A beat-synced step stands for {frames_per_beat:.0f} frames (median); from one to the
      next a pitch class changes by {beat["change"].mean():.3f}, from one frame to the next
      by {full["change"].mean():.3f}.
    """
)

# %% The numbers for metrics.json
pair = [
    {"clip": title} | {form: measures[form].loc[title].to_dict() for form in FORMS}
    for title in titles[:2]
]
sync = {
    "variance_within_beats_percent": float(within),
    "shifted_grid_percent": float(shifted),
    "same_strongest": same_strongest,
    "change": {form: measures[form]["change"].mean() for form in FORMS},
}
step.finish(pair=pair, n_clips=len(clips), genres=by_genre.to_dict("index"), lstm=lstm, sync=sync)
