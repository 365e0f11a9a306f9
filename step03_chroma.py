"""Step 3: familiarisation with chromagrams.

The lab asks: repeat steps 1 and 2 with the chromagrams of the same pieces, i.e. show those
of two clips of different classes, full and beat-synchronised, print their dimensions, say if
an LSTM can be trained on them efficiently, and comment on what they tell and what differs.

    python step03_chroma.py
    python step03_chroma.py --seed 7   # two other clips

Input: the genre training split, full and beat-synchronised. Output, in outputs/step03_chroma/:
figures and tables (summary.md), their numbers (metrics.json).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--seed 7").
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from patrec.clips import sample_clips
from patrec.features import BANDS, HOP, N_CHROMA, NOTES, SR
from patrec.machine import seed_everything
from patrec.measures import genre_share, gradient_reach, lstm_batch, lstm_gradient, lstm_seconds
from patrec.plots import plot_panels
from patrec.step import Step

step = Step("step03_chroma", __doc__, parts=("genre",))
smoke = step.args.smoke
FORMS = {"full": "full", "beat-synced": "beat-synchronised"}  # name in metrics.json: in the texts
COLUMNS = {
    "strongest": "strongest pitch class",
    "strong": "strong pitch classes",
    "change": "change per step",
}


def chroma_measures(chroma) -> dict:
    """What a chromagram (12, T) tells about a clip's harmony.

    strongest : name of the pitch class with the highest mean
    strong : pitch classes above .5 in a step, mean over the steps
    change : mean absolute change of a pitch class from one step to the next
    """
    jumps = np.abs(np.diff(chroma.astype(float), axis=1))
    return {
        "strongest": NOTES[int(chroma.mean(1, dtype=float).argmax())],
        "strong": float((chroma > 0.5).sum(0).mean()),
        "change": float(jumps.mean()) if jumps.size else 0.0,
    }


# %% 3, as 1a-b. The same two clips, their chromagrams
# The seed of steps 1 and 2 draws the same clips; a chromagram is rows 128 to 139 of their arrays.
step.heading("3, step 1a-b repeated: The same two clips")
per_genre = 2 if smoke else 20
clips = sample_clips(step.source.root, per_genre, step.args.seed, step.args.skip_bad)
titles = [f"{clip.genre} ({clip.clip_id})" for clip in clips]
arrays = {"full": [clip.full for clip in clips], "beat-synced": [clip.beat for clip in clips]}
chroma = {form: [array[BANDS["chroma"]] for array in some] for form, some in arrays.items()}
cells = [(i, form) for i in (0, 1) for form in chroma]  # the two clips, in both forms
names = [f"{titles[i]}, {FORMS[form]}" for i, form in cells]
step.text(f"""
Drawn with seed {step.args.seed}: {titles[0]} and {titles[1]}. A chromagram is rows 128 to 139 of a
clip's array, one row per pitch class.
""")

# %% 3, as 1c. What they show
# The lab: show them with specshow and comment on what they tell and how the two differ. Full and
# beat-synchronised lie side by side, since step 2 asks the same of both.
step.heading("3, step 1c repeated: What they show")
panels = [(f"{titles[i]}, {FORMS[form]}", chroma[form][i], form != "full") for i, form in cells]
caption = f"Full and beat-synchronised chromagrams: {titles[0]} and {titles[1]}"
step.figure(plot_panels(panels, 2, kind="chroma"), "two_clips", caption)
step.text("""
A chromagram adds up how strong each note is over all octaves. It keeps the harmony and loses the
octave and most of the timbre. Some overtones appear in other rows (the third harmonic of C is a G).
A horizontal line is a held note, and a column with three strong rows is often a triad; in noise or
a drum hit most rows are strong. In a full chromagram each frame that is not silent is scaled so
that its strongest pitch class is 1. So quiet and loud frames count alike.

- **Strongest pitch class**: the highest mean over time.
- **Strong pitch classes**: how many are above .5 in a step, on average.
- **Change per step**: mean absolute change of a pitch class from one step to the next.
""")
measures = {form: pd.DataFrame(map(chroma_measures, some), titles) for form, some in chroma.items()}
rows = pd.DataFrame([measures[form].iloc[i] for i, form in cells], names).rename_axis("clip")
step.table(rows.rename(columns=COLUMNS), "The two clips, measured")
first, second = (measures["full"].iloc[i] for i in (0, 1))
step.text(f"""
In the full chromagram of {titles[0]} the strongest pitch class is {first["strongest"]}, in that of
{titles[1]} it is {second["strongest"]}. On average {first["strong"]:.1f} pitch classes of a frame
are strong in the first clip and {second["strong"]:.1f} in the second. From frame to frame a pitch
class changes by {first["change"]:.3f} in the first clip and by {second["change"]:.3f} in the
second.
""")

# %% 3, as 1c. Two clips or two genres?
# Songs are in all keys, so a mean over a genre's clips blurs the notes. So each clip is rotated
# until its strongest note is row 0, and shows intervals. Values: shares of a clip's sum.
step.heading("3, step 1c repeated: Two clips or two genres?")
genres = np.array([clip.genre for clip in clips])
profiles = np.array([c.mean(1, dtype=float) for c in chroma["full"]])  # (clips, 12)
profiles = [np.roll(profile, -profile.argmax()) / profile.sum() for profile in profiles]
by_interval = pd.DataFrame(profiles).groupby(genres).mean()  # (genres, 12)
size = (7, 0.32 * len(by_interval) + 1.6)
fig, ax = plt.subplots(figsize=size, layout="constrained")
highest = by_interval.iloc[:, 1:].to_numpy().max()  # the strongest pitch class is above all others
colors = plt.get_cmap("viridis").with_extremes(over="lightgrey")
look = {"vmax": highest, "cmap": colors, "interpolation": "nearest", "aspect": "auto"}
image = ax.imshow(by_interval, **look)
ax.set_xticks(range(N_CHROMA))
ax.set_yticks(range(len(by_interval)), by_interval.index)
ax.set(xlabel="Semitones above the clip's strongest pitch class", ylabel="Genre")
fig.colorbar(image, ax=ax, label="Share of the clip's chroma", extend="max")
caption = (
    "Mean chroma of each genre. The rows of each clip are rotated, so that its strongest pitch "
    "class is 0. This column is grey, because its values are above the colour scale. A clip's 12 "
    "values are divided by their sum, so equal ones would be 1/12 = .083. 7 semitones are a "
    "fifth, 5 a fourth, 4 a major third"
)
step.figure(fig, "genre_chroma", caption)

full = measures["full"]
values = pd.DataFrame({"strong pitch classes": full["strong"], "change per frame": full["change"]})
values["change per beat"] = measures["beat-synced"]["change"]
by_genre = values.groupby(genres).mean()
share = {name: genre_share(values[name], genres) for name in values}
table = by_genre.map("{:.3f}".format).rename_axis("genre")
table.loc["explained by genre"] = [f"{value:.0%}" for value in share.values()]
caption = (
    f"Mean over at most {per_genre} randomly chosen clips of each genre. Last row: the share of "
    "the variance that the genre explains"
)
step.table(table, caption)
most = max(share, key=share.get)
step.text(f"""
Of these measures, *{most}* depends most on genre: {share[most]:.0%} of its variance lies between
the genres. For a measure that has nothing to do with genre, this share is near 0 and may be
negative.
""")

# %% 3, as 2a. Dimensions, and is training an LSTM efficient?
# The lab's questions of step 2 for chromagrams: 12 rows instead of 128, but as many steps. Two
# measurements of step 2 are repeated in the same way: what a training pass costs, and how far back
# the gradient of an untrained LSTM's last output reaches.
step.heading("3, step 2a repeated: Dimensions, and is training an LSTM efficient?")
shapes = [" x ".join(map(str, chroma[form][i].shape)) for i, form in cells]
caption = "Pitch classes x time steps of the two clips"
step.table(pd.DataFrame({"chromagram": shapes}, names).rename_axis("clip"), caption)
n_batch = min(4 if smoke else 16, len(clips))
frames_per_beat = float(np.median([clip.full.shape[1] / clip.beat.shape[1] for clip in clips]))
lstm = {}
for kind in ("chroma", "mel"):
    for form, frames in (("full", 1), ("beat-synced", frames_per_beat)):
        x, lengths = (part[:n_batch] for part in lstm_batch(arrays[form], kind))  # (B, T, F), (B,)
        seed_everything(step.args.seed)  # the same seed for every row, and as in step 2
        far, n = gradient_reach(lstm_gradient(x, lengths)), int(lengths.median())
        lstm[f"{kind}, {form}"] = {
            "rows": x.shape[2],
            "steps": n,
            "pass (ms)": 1e3 * lstm_seconds(x[:, :n].to(step.device)),
            "steps above 1%": far,
            "seconds of music": far * frames * HOP / SR,
        }
table = pd.DataFrame(lstm).T.rename(lambda name: name.replace("synced", "synchronised"))
table = table.astype({"rows": int, "steps": int, "steps above 1%": int}).rename_axis("input")
caption = (
    f"LSTM of 128 units, {n_batch} clips, before training. Pass: wall-clock time of forward and "
    "backward, the fastest of 8. Steps above 1%: how many steps at the end of the clip have a "
    "gradient above 1% of the last step's"
)
step.table(table, caption)
full, beat, mel = (lstm[name] for name in ("chroma, full", "chroma, beat-synced", "mel, full"))
step.text(f"""
So training an LSTM on full chromagrams is not efficient either. They have {full["rows"]} rows
instead of {mel["rows"]}, but as many steps as the mel spectrograms, and the steps are computed one
after the other: a pass takes {full["pass (ms)"]:.1f} ms, compared with {mel["pass (ms)"]:.1f} ms on
mel and {beat["pass (ms)"]:.1f} ms on chromagrams of beats. The gradient is above 1% of that of the
last step for the last {full["steps above 1%"]} of {full["steps"]} frames
({full["seconds of music"]:.1f} s) and for the last {beat["steps above 1%"]} of {beat["steps"]}
beats ({beat["seconds of music"]:.1f} s). The reasons are those of step 2. (The times on mel are
measured again here. They vary from run to run, so compare only those within one table.)
""")

# %% 3, as 2b. What beat synchronisation changes
# The measures above, in both forms.
step.heading("3, step 2b repeated: What beat synchronisation changes")
means = pd.DataFrame({form: measures[form][["strong", "change"]].mean() for form in measures}).T
caption = f"Chromagrams, full and beat-synchronised: mean over {len(clips)} clips"
step.table(means.rename(index=FORMS, columns=COLUMNS).rename_axis("chromagrams"), caption)
same = float((measures["full"]["strongest"] == measures["beat-synced"]["strongest"]).mean())
shown = []
for i in (0, 1):
    first, second = (measures[form]["strongest"].iloc[i] for form in FORMS)
    unlike = f"{first} in the full form and {second} in the beat-synchronised form"
    shown.append(f"in {titles[i]} it is {f'{first} in both' if first == second else unlike}")
full, beat = means.loc["full"], means.loc["beat-synced"]
step.text(f"""
- The strongest pitch class is the same in both forms in {same:.0%} of {len(clips)} clips:
  {shown[0]}, {shown[1]}.
- A pitch class changes by {full["change"]:.3f} from one frame to the next, by {beat["change"]:.3f}
  from one beat to the next. Beats are about {frames_per_beat:.0f} times as far apart as frames, so
  the harmony has more time to change between them.
- On average {full["strong"]:.1f} pitch classes are strong in a frame and {beat["strong"]:.1f} in a
  beat. The median over a beat removes what is shorter than half of the beat.
""")

# %% The numbers for metrics.json
pair = [{"clip": titles[i]} | {f: measures[f].iloc[i].to_dict() for f in FORMS} for i in (0, 1)]
sync = {"same_strongest": same, "change": means["change"].to_dict()}
step.finish(pair=pair, n_clips=len(clips), genres=by_genre.to_dict("index"), lstm=lstm, sync=sync)
