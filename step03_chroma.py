"""Step 3: familiarisation with chromagrams.

The lab asks: repeat steps 1 and 2 with the chromagrams of the same pieces, i.e. show those
of two clips of different classes, full and beat-synced, print their dimensions, say whether
an LSTM can be trained on them efficiently, and comment on what they tell and what differs.

    python step03_chroma.py
    python step03_chroma.py --seed 7   # two other clips

Input: the genre training split, full and beat-synced. Output, in outputs/step03_chroma/:
figures, tables and what they show (summary.md, metrics.json).
"""

import math
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from common import (
    BANDS,
    HOP,
    N_CHROMA,
    NOTES,
    SR,
    Step,
    genre_share,
    lstm_batch,
    lstm_gradient,
    lstm_seconds,
    make_parser,
    parse_args,
    plot_panels,
    run_main,
    sample_clips,
)

FORMS = ("full", "beat-synced")
INTERVALS = ("unison", "minor second", "major second", "minor third", "major third", "fourth", "tritone",
             "fifth", "minor sixth", "major sixth", "minor seventh", "major seventh")  # fmt: skip


def main(argv=None):
    args = parse_args(make_parser(__doc__), argv)
    step = Step("step03_chroma", args)

    # Step 1 on chromagrams: the same two random lines with different labels, rows 128 to
    # 139 of their arrays. Step 2 besides, full and beat-synced side by side.
    clips = sample_clips(step.data, 2 if args.smoke else 20, args.seed, args.skip_bad)
    names = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
    chroma = {"full": [clip.full[BANDS["chroma"]] for clip in clips], "beat-synced": [clip.beat[BANDS["chroma"]] for clip in clips]}
    step.heading("3, step 1. Chromagrams of the two clips")
    panels = [(f"{names[i]}, {form}", chroma[form][i], form != "full") for i in range(2) for form in FORMS]
    step.figure(plot_panels(panels, 2, kind="chroma"), "two_clips", f"Full and beat-synced chromagrams: {names[0]} and {names[1]}")
    step.text(
        "A chromagram adds up the energy of each note over all octaves: harmony and melody stay, octave, timbre and most "
        "of the drums are gone. A horizontal line is a held note, a column with three strong rows a triad; every frame is scaled "
        "so that its strongest pitch class is 1, so loudness is gone as well."
    )
    measures = {form: pd.DataFrame([chroma_measures(c) for c in chroma[form]], index=names) for form in FORMS}
    report_pair(step, measures, names)

    # The genres, for what the two clips show may be their own.
    step.heading("3, step 1. The genres")
    genres = np.array([clip.genre for clip in clips])
    by_genre = report_genres(step, chroma, measures, genres)

    # Step 2a on chromagrams: dimensions, and whether 12 rows in place of 128 make the LSTM efficient.
    step.heading("3, step 2a. Dimensions, and is training an LSTM efficient?")
    shapes = [[f"{N_CHROMA} x {chroma[form][i].shape[1]}" for form in FORMS] for i in range(2)]
    step.table(pd.DataFrame(shapes, names[:2], FORMS).rename_axis("clip"), "Pitch classes x time steps of the two clips")
    lstm = report_lstm(step, clips[: 4 if args.smoke else 16])

    # Step 2b: what the median between two beats takes from a chromagram.
    step.heading("3, step 2b. What beat synchronisation changes")
    sync = report_sync(step, chroma, measures)
    pair = [{"clip": name} | {form: measures[form].loc[name].to_dict() for form in FORMS} for name in names[:2]]
    return step.finish(pair=pair, n_clips=len(clips), genres=by_genre, lstm=lstm, sync=sync)


def chroma_measures(chroma) -> dict:
    """What a chromagram (12, T) says of a clip's harmony.

    strongest : name of the pitch class with the highest mean
    entropy_bits : of the mean over time, as shares: 0 for a single note, 3.58 for all alike
    change : mean absolute change of a pitch class from one step to the next
    """
    profile = chroma.mean(1, dtype=float) + 1e-12
    share = profile / profile.sum()
    change = np.abs(np.diff(chroma.astype(float), axis=1)).mean() if chroma.shape[1] > 1 else 0.0
    return {"strongest": NOTES[int(profile.argmax())], "entropy_bits": float(-(share * np.log2(share)).sum()), "change": float(change)}


def report_pair(step, measures, names):
    """The two clips: measures in both forms and one sentence on each difference."""
    rows = [measures[form][i : i + 1].set_axis([f"{names[i]}, {form}"]) for i in range(2) for form in FORMS]
    columns = {"strongest": "strongest pitch class", "entropy_bits": "entropy (bits)", "change": "change per step"}
    step.table(pd.concat(rows).rename(columns=columns).rename_axis("clip"), "The two clips, measured")
    first, second = measures["full"]["strongest"][:2]
    spread = measures["full"]["entropy_bits"][:2]
    changing = measures["beat-synced"]["change"][:2]
    step.text(
        f"- The strongest pitch class is {first} in {names[0]} and {second} in {names[1]}.\n"
        f"- Energy is spread over more notes in **{spread.idxmax()}** (entropy {spread.max():.2f} bits against {spread.min():.2f}; "
        f"{math.log2(N_CHROMA):.2f} would be all twelve alike).\n"
        f"- From beat to beat, notes change more in **{changing.idxmax()}** ({changing.max():.3f} against {changing.min():.3f} per pitch class)."
    )


def report_genres(step, chroma, measures, genres) -> dict:
    """Mean chroma of every genre, by note name and relative to each clip's strongest note."""
    profiles = np.array([c.mean(1, dtype=float) for c in chroma["full"]])  # (clips, 12)
    # Songs come in all keys, so a plain mean blurs them; turned to its strongest note, each
    # clip shows the intervals that it is made of.
    turned = np.array([np.roll(profile, -profile.argmax()) for profile in profiles])
    classes = sorted(set(genres))
    fig, axes = plt.subplots(1, 2, figsize=(12, 0.32 * len(classes) + 1.6), layout="constrained", sharey=True)
    labels = ((NOTES, "Pitch class"), (range(N_CHROMA), "Semitones above the clip's strongest pitch class"))
    for ax, rows, (ticks, label) in zip(axes, (profiles, turned), labels, strict=True):
        means = np.array([rows[genres == genre].mean(0) for genre in classes])  # (genres, 12)
        image = ax.imshow(means, aspect="auto", cmap="viridis", interpolation="nearest")
        ax.set_xticks(range(N_CHROMA), ticks)
        ax.set(xlabel=label)
        fig.colorbar(image, ax=ax, label="Mean chroma")
    axes[0].set_yticks(range(len(classes)), classes)
    axes[0].set_ylabel("Genre")
    step.figure(fig, "genre_chroma", "Mean chroma of every genre: by note (left), relative to each clip's strongest note (right)")

    frame = pd.DataFrame({"entropy (bits)": measures["full"]["entropy_bits"].to_numpy(), "change per frame": measures["full"]["change"].to_numpy(),
                          "change per beat": measures["beat-synced"]["change"].to_numpy()})  # fmt: skip
    mean = frame.groupby(genres).mean().rename_axis("genre")
    step.table(mean.assign(clips=[int((genres == genre).sum()) for genre in classes]), "Mean over each genre's clips")
    lines = [f"- {column[0].upper()}{column[1:]}: highest for **{mean[column].idxmax()}** ({mean[column].max():.3f}), lowest for **{mean[column].idxmin()}** "
             f"({mean[column].min():.3f}); genre explains {genre_share(frame[column], genres):.0%} of its variance over {len(genres)} clips." for column in frame]  # fmt: skip
    second = Counter(INTERVALS[1 + int(turned[genres == genre].mean(0)[1:].argmax())] for genre in classes)
    interval, count = second.most_common(1)[0]
    lines.append(f"- Next to its strongest note, a clip's energy lies most often a {interval} above it: so in the mean of {count} of {len(classes)} genres.")
    by_note, by_interval = (np.mean([genre_share(column, genres) for column in rows.T]) for rows in (profiles, turned[:, 1:]))
    lines.append(f"- Genre explains {by_note:.0%} of the variance of a pitch class's mean, {by_interval:.0%} once clips are turned to their strongest note.")
    step.text("\n".join(lines))
    return mean.to_dict("index")


def report_lstm(step, clips) -> dict:
    """Cost of a training pass and reach of the gradient, against mel spectrograms."""
    rows = {}
    for form in FORMS:
        arrays = [clip.full if form == "full" else clip.beat for clip in clips]
        step_s = HOP / SR * float(np.median([clip.full.shape[1] / array.shape[1] for clip, array in zip(clips, arrays, strict=True)]))
        for kind in ("chroma", "mel"):
            x, lengths = lstm_batch(arrays, kind)
            norms = lstm_gradient(x, lengths)
            n = int(np.argmax(norms < 0.01)) or len(norms)  # the first value is 1
            rows[f"{kind}, {form}"] = {"rows": x.shape[2], "steps": x.shape[1], "pass (s)": lstm_seconds(x.to(step.device)),
                                       "steps above 1%": n, "seconds of music": n * step_s}  # fmt: skip
    table = pd.DataFrame(rows).T.rename_axis("input")
    step.table(table.astype({"rows": int, "steps": int, "steps above 1%": int}), f"One training pass of an LSTM over {len(clips)} clips, and how far back its last output's gradient stays above 1%")
    full, mel, beat = (rows[name] for name in ("chroma, full", "mel, full", "chroma, beat-synced"))
    step.text(
        f"A full chromagram has as many time steps as the spectrogram, and with {full['rows']} rows in place of "
        f"{mel['rows']} a pass takes {full['pass (s)'] / mel['pass (s)']:.0%} of the time, with beats in place of frames "
        f"{beat['pass (s)'] / full['pass (s)']:.0%}. The gradient of the last output stays above 1% over {full['seconds of music']:.1f} s of music on "
        f"frames and {beat['seconds of music']:.1f} s on beats. Of the two, the "
        f"number of {'steps' if beat['pass (s)'] / full['pass (s)'] < full['pass (s)'] / mel['pass (s)'] else 'rows'} matters more: chromagrams need beats as much as spectrograms do."
    )
    return rows


def report_sync(step, chroma, measures) -> dict:
    """What the median between two beats removes from the chromagrams."""
    var_full, var_beat = (np.array([c.var(1, dtype=float).sum() for c in chroma[form]]) for form in FORMS)
    lost = 100 * (1 - var_beat / np.maximum(var_full, 1e-9))
    full, beat = (measures[form] for form in FORMS)
    same = float((full["strongest"] == beat["strongest"]).mean())
    frames = np.median([f.shape[1] / b.shape[1] for f, b in zip(*chroma.values(), strict=True)])
    step.text(
        f"- The median removes {lost.mean():.0f}% of the variance over time: what passes within a beat, such as ornaments and drum hits.\n"
        f"- The strongest pitch class stays the same in {same:.0%} of {len(full)} clips; the entropy of the mean goes from "
        f"{full['entropy_bits'].mean():.2f} to {beat['entropy_bits'].mean():.2f} bits on average.\n"
        f"- From one beat to the next a pitch class changes by {beat['change'].mean():.3f}, from one frame to the next by {full['change'].mean():.3f}: "
        f"{beat['change'].mean() / max(full['change'].mean(), 1e-12):.1f} times as much in {frames:.0f} times the time. Neighbouring "
        f"{'frames repeat each other; beats say something new' if beat['change'].mean() > full['change'].mean() else 'beats differ less than neighbouring frames'}."
    )
    return {"variance_lost_percent": float(lost.mean()), "same_strongest": same, "change": {"full": full["change"].mean(), "beat-synced": beat["change"].mean()}}


if __name__ == "__main__":
    metrics = run_main(main)
