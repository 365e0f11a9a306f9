"""Step 6: evaluation of the LSTMs.

The lab asks, for every model of step 5, on the test sets of fma_genre_spectrograms and
fma_genre_spectrograms_beat: a) accuracy; b) precision, recall and F1 per class; c) their
macro averages; d) their micro averages; and what these metrics mean.

    python step06_eval.py              # every LSTM; trains those that step 5 has not
    python step06_eval.py --ensemble   # besides, the average of all their predictions

Input: the checkpoints of step 5, the genre test sets. Output, in outputs/step06_eval/:
tables, reports per class, confusion matrices and the lab's questions (summary.md), all
scores (metrics.json), each test clip's true and predicted class (predictions.csv).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--ensemble").
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.metrics import classification_report
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from common import band_statistics, genre_models, load_test, predict_clips, true_labels
from patrec.baselines import band_features
from patrec.clips import load_clips
from patrec.files import part_folder
from patrec.labels import read_entries
from patrec.plots import plot_confusion, plot_scores
from patrec.recipes import LSTM_NAMES
from patrec.scores import average_predictions, genre_scores, paired_difference
from patrec.splits import encode_labels
from patrec.step import Step
from patrec.tables import difference_line, prediction_rows, with_interval, write_predictions

SETS = {"full": False, "beat": True}  # the two test sets; True: beat-synchronised
METRICS = ("precision", "recall", "f1")


def add_flags(parser):
    also = "score the average of all LSTMs' predictions too"
    parser.add_argument("--ensemble", action="store_true", help=also)


step = Step("step06_eval", __doc__, parts=("genre",), add_flags=add_flags)

# %% The models of step 5 and the baselines
# All that is trained or fitted is made before a test clip is read. Which LSTM is called the
# best is settled here too, by its validation score: a name given after the test scores
# would make the best of them look better than it is.
step.heading("The models, and what they have to beat")
models = genre_models(step.training, LSTM_NAMES)
classes = models["mel"].settings["names"]
val = {name: model.facts["val"]["macro_f1"] for name, model in models.items()}
epochs = {
    name: f"{model.facts['epochs']} of {model.facts['planned_epochs']}"
    for name, model in models.items()
}
best = max(val, key=val.get)
facts = models[best].facts

# Two baselines. `majority` always predicts the commonest training class. `svm` and `beat_svm`
# are support vector machines on each mel band's mean, spread, percentiles and change over
# the clip, fitted on frames and on beats; C and the class weights (equal or balanced) are
# chosen by cross-validation on training clips.
svms, grid = {}, {"svc__C": [1, 3, 10], "svc__class_weight": [None, "balanced"]}
for name, beat in (("svm", False), ("beat_svm", True)):
    entries = read_entries(step.source.root, "genre", "train", beat, step.source.merge)
    known = load_clips(entries, step.source.skip_bad)
    targets = encode_labels(known.entries, classes)
    folds = StratifiedKFold(
        min(5, np.bincount(targets).min()), shuffle=True, random_state=step.args.seed
    )
    pipeline = make_pipeline(StandardScaler(), SVC())
    search = GridSearchCV(pipeline, grid, cv=folds, scoring="f1_macro")
    svms[name] = search.fit(band_features(known), targets)
    val[name] = svms[name].best_score_
    if not beat:
        commonest = classes[np.bincount(targets).argmax()]
step.table(
    pd.DataFrame({"val macro-F1": val, "epochs": epochs}).fillna("").rename_axis("model"),
    f"Validation scores before testing. For the LSTMs, trained on {facts['n_train']} clips, it is "
    f"the best late epoch on {facts['n_val']} clips, so it is optimistic. The SVMs are fitted on "
    "all of these clips. Their score is that of the best of six settings in cross-validation. The "
    "two kinds of score cannot be compared with each other",
)
step.text(f"Best LSTM by validation macro-F1: `{best}`. Commonest training class: {commonest}.")

# %% Answers to both test sets
# The lab names two test sets, so every LSTM is scored on both: the one of its own kind of input
# and the other kind, on which it was not trained. That one is standardised by the training
# clips of its own form (beats are some dB louder, see step 2), and one step stands for as
# much time as in training, as nearly as can be: a network of beats gets means of as many
# frames as there are to a beat (by the median lengths), a network of frames gets beats one by one.
tests, true, predictions = {}, {}, {}
forms = {}  # per form: training clips, for their statistics and lengths
for set_name, beat in SETS.items():
    entries = read_entries(step.source.root, "genre", "train", beat, step.source.merge)
    forms[set_name] = load_clips(entries, step.source.skip_bad)
frames_of = {set_name: store.lengths.float().median() for set_name, store in forms.items()}
frames_per_beat = round(float(frames_of["full"] / frames_of["beat"]))
for name, model in models.items():
    for set_name, beat in SETS.items():
        tests[set_name] = load_test(step.source, model.settings, beat=beat)
        true[set_name] = true_labels(tests[set_name], model.settings)
        settings, backbone = model.settings, model.model.backbone
        usual = backbone.frames_per_step
        test = tests[set_name]
        if beat != settings["beat"]:
            backbone.frames_per_step = 1 if beat else frames_per_beat
            settings = settings | {"window": None}
            store = forms[set_name]
            stats = band_statistics(store, range(len(store.entries)), settings["features"])
            test = test.variant(stats=stats)
        predictions[name, set_name] = predict_clips(model.model, test, settings, step.device)
        backbone.frames_per_step = usual

for (
    set_name
) in SETS:  # a baseline's prediction in a network's form: a score per class, 1 for the one named
    store, ids = tests[set_name].store, true[set_name].index
    baseline = "beat_svm" if SETS[set_name] else "svm"
    called = {
        "majority": np.full(len(ids), classes.index(commonest)),
        baseline: svms[baseline].predict(band_features(store)),
    }
    for name, numbers in called.items():
        predictions[name, set_name] = pd.DataFrame(np.eye(len(classes))[numbers], ids, classes)

# The mean of the log-probabilities, matched by clip id, each LSTM on its own kind of input.
own_set = {name: "beat" if model.settings["beat"] else "full" for name, model in models.items()}
own_set |= {"majority": "full", "svm": "full", "beat_svm": "beat"}
if step.args.ensemble:
    predictions["lstm_ensemble", "full"] = average_predictions(
        predictions[name, own_set[name]] for name in models
    )
    own_set["lstm_ensemble"] = "full"

scores = {key: genre_scores(true[key[1]], table) for key, table in predictions.items()}
write_predictions(
    step.folder,
    [
        prediction_rows(
            name,
            true[set_name],
            table,
            seed=step.args.seed,
            test_set=part_folder(".", "genre", SETS[set_name]).name,
        )
        for (name, set_name), table in predictions.items()
    ],
)


def both_sets(cell):
    """Table of all models: cell(scores) -> {column: value}, once per test set."""
    rows = {
        name: {
            f"{set_name}: {column}": value
            for set_name in SETS
            if (name, set_name) in scores
            for column, value in cell(scores[name, set_name]).items()
        }
        for name in own_set
    }
    return pd.DataFrame(rows).T.astype(object).fillna("").rename_axis("model")


def plot_both_sets(key, label):
    """One panel per test set: a score of every model with its interval."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 0.4 * len(own_set) + 1.3), layout="constrained")
    for ax, set_name in zip(axes, SETS, strict=True):
        found = {name: scores[name, set_name] for name in own_set if (name, set_name) in scores}
        values, intervals = zip(*((s[key], s[f"{key}_ci95"]) for s in found.values()), strict=True)
        plot_scores(ax, list(found), values, intervals, f"{label} (line: 95% interval)")
        for name, bar in zip(found, ax.patches, strict=True):
            bar.set_alpha(0.35 if name in models and own_set[name] != set_name else 1)
        ax.set_title(f"{set_name} test set")
    return fig


# %% 6a. Accuracy
# The share of clips whose class is answered right, on both test sets.
step.heading("6a. Accuracy")
sizes = " and ".join(f"{len(true[set_name])} clips ({set_name})" for set_name in SETS)
intervals_say = f"{sizes}; 95% intervals over test clips, for one training seed"
step.table(
    both_sets(lambda s: {"accuracy": with_interval(s, "accuracy")}),
    f"Accuracy on the test sets: {intervals_say}",
)
step.figure(
    plot_both_sets("accuracy", "Accuracy"),
    "accuracy",
    "Accuracy of every model on both test sets; pale: input of the kind it was not trained on",
)
# On the other kind of input a network may answer one class to every clip.
foreign = {
    name: predictions[name, "full" if own_set[name] == "beat" else "beat"] for name in models
}
stuck = [f"`{name}`" for name, table in foreign.items() if table.idxmax(axis=1).nunique() == 1]
one_answer = f"One and the same class for every clip: {', '.join(stuck)}." if stuck else ""
step.text(f"""
    `full` is fma_genre_spectrograms, `beat` is fma_genre_spectrograms_beat. Models named `beat_...`
    were trained on beats, the other LSTMs on frames; on the other set each gets input that it was
    not trained on, standardised by the training clips of that form. {one_answer}
    What such a row shows is how the two forms are fed: an LSTM of frames receives, for each step,
    the mean, the spread and the change within 8 frames; on beats a step is a single column, whose
    spread is 0, a value that training steps seldom have, and the change is from beat to beat; an
    LSTM of beats receives means of {frames_per_beat} frames (median length of a clip in frames,
    divided by that in beats). `majority` predicts the commonest training class; `svm` and
    `beat_svm` are support vector machines on statistics of the bands, each tested on its own kind
    of input and fitted on the LSTMs' training and validation clips together. The LSTMs' scores
    include label smoothing .1 in training, a running average of the weights, predictions averaged
    over overlapping windows (of frames), and logit adjustment: half the log of each class's share
    is subtracted from its logit (after Menon et al., 2021). The support vector machines have none
    of these.
""")
if step.args.ensemble:
    step.text("""
        `lstm_ensemble` is the mean of all LSTMs' log-probabilities. Each of them heard the
        clip in its own kind of input; the row stands under `full`.
    """)

# %% 6b. Precision, recall and F1 of each class
# The lab: sklearn's classification_report, for each model on each test set. It leaves out
# the micro average where every clip has one label and prints accuracy, its equal (6d).
step.heading("6b. Precision, recall and F1 of each class")
step.text("""
A precision without any answer of that class, 0/0, counts as 0. `weighted avg` weighs the classes by
their number of test clips (`support`). Where a class has few of them, one clip moves its recall
much.
""")
for (name, set_name), table in predictions.items():
    report = classification_report(
        true[set_name][table.index],
        table.columns[table.to_numpy().argmax(1)],
        labels=classes,
        digits=3,
        zero_division=0,
    )
    step.show(f"`{name}` on the {set_name} test set:\n\n```text\n{report.rstrip()}\n```")
shown = [name for name in own_set if name != "majority"]
n_rows = -(-len(shown) // 3)
fig, axes = plt.subplots(n_rows, 3, figsize=(15.6, 5 * n_rows), layout="constrained")
for ax, name in zip(axes.flat, shown, strict=False):
    own = scores[name, own_set[name]]
    plot_confusion(ax, own["confusion"], classes, f"{name}, {own_set[name]} test set")
for ax in axes.flat[len(shown) :]:
    ax.remove()
step.figure(
    fig,
    "confusion",
    "Confusion matrices, each model on its own kind of input: colour is the share of the true "
    "class, numbers are clips",
)

# %% 6c. Macro averages
# The mean over the classes: each class counts the same, however few clips it has.
step.heading("6c. Macro-averaged precision, recall and F1")
step.text("""
The mean over the classes: each class counts the same, however few clips it has. Macro-F1 is the
mean of the classes' F1.
""")
step.table(both_sets(lambda s: {name: s[f"macro_{name}"] for name in METRICS}), "Macro averages")
step.figure(
    plot_both_sets("macro_f1", "Macro-F1"),
    "macro_f1",
    f"Macro-F1 on the test sets; pale: input of the kind it was not trained on; {intervals_say}",
)

# The same on the same clips: do two models differ by more than the choice of test clips?
pairs = [(best, name) for name in models if name != best]
pairs += [(best, "beat_svm" if own_set[best] == "beat" else "svm")]
lines = []
for pair in pairs:
    first, second = (predictions[name, own_set[name]] for name in pair)
    lines.append(
        f"- {difference_line(*pair, paired_difference(true[own_set[best]], first, second))}"
    )
step.text("Paired differences on the same clips, each model on its own kind of input:")
step.text("\n".join(lines))
step.text("""
The intervals cover the choice of test clips only, for one training seed; of so many intervals of
95% some leave out 0 by chance.
""")

# %% 6d. Micro averages
# All decisions are pooled before dividing: each clip counts the same.
step.heading("6d. Micro-averaged precision, recall and F1")
step.text("""
All decisions are pooled before dividing: each clip counts the same. A clip has one label and gets
one answer, so every false positive of one class is a false negative of another, and micro
precision, recall and F1 are one number, the accuracy.
""")
step.table(both_sets(lambda s: {name: s[f"micro_{name}"] for name in METRICS}), "Micro averages")

# %% 6. What the metrics mean
# The lab's five questions. What a metric is and tells holds for every run; the numbers in
# between are this run's, to be looked at while answering in own words.
one = scores[best, own_set[best]]
lowest = scores["majority", "full"]
per_class = pd.DataFrame(one["per_class"]).T
lopsided = (per_class["precision"] - per_class["recall"]).abs().idxmax()
row, weakest = per_class.loc[lopsided], per_class["f1"].idxmin()
gaps = {
    name: scores[name, own_set[name]]["accuracy"] - scores[name, own_set[name]]["macro_f1"]
    for name in models
}
widest = max(gaps, key=lambda name: abs(gaps[name]))
step.heading("6. What the metrics mean")
step.text(f"Numbers of `{best}`, the best LSTM on validation clips, on its own test set.")
step.text(f"""
**What information do accuracy, precision, recall and F1 give?** Accuracy is the share of clips
whose genre is right: {one["accuracy"]:.3f}. For one class, precision is the share of right ones
among the clips *called* by its name, recall the share found among the clips that *are* of it, and
F1 their harmonic mean, which is low as soon as one of them is. They lie furthest apart for
{lopsided}: precision {row["precision"]:.3f}, recall {row["recall"]:.3f}, F1 {row["f1"]:.3f}.
The class with the lowest F1 is {weakest}: {per_class.loc[weakest, "f1"]:.3f}.

**What information do micro and macro averages give?** Macro takes the mean over classes, so each
class counts the same however small it is: F1 {one["macro_f1"]:.3f}. Micro pools all decisions
before dividing, so each clip counts the same; with one label per clip micro precision, recall and
F1 all equal the accuracy: {one["micro_precision"]:.3f}, {one["micro_recall"]:.3f},
{one["micro_f1"]:.3f}.

**When do accuracy and F1 differ much?** Above all when a model serves large classes and neglects
small ones: accuracy hardly notices, macro-F1 does. The extreme case, always answering {commonest},
has accuracy {lowest["accuracy"]:.3f} and macro-F1 {lowest["macro_f1"]:.3f}. Among the LSTMs the two
numbers lie furthest apart for `{widest}`: accuracy minus macro-F1 is {gaps[widest]:+.3f}. Macro-F1
above accuracy often means that small classes are recognised better. In a task with one rare class,
its F1 may be near 0 while accuracy, full of true negatives, is near 1.

**When do micro and macro F1 differ much?** Micro-F1 is accuracy here, so above all in the same
case: class sizes are unequal (from {per_class["support"].min():.0f} to
{per_class["support"].max():.0f} test clips) and F1 depends on the class. In the micro average large
classes count most, in the macro average all count alike: micro minus macro is {
    one["micro_f1"] - one["macro_f1"]:+.3f}.

**Are there tasks where precision matters more than recall, or the opposite? Is a good accuracy or
F1 then enough?** Yes, there are, and no, it is not enough. A playlist by genre wants precision: one
metal song among the lullabies is worse than a lullaby left out. A search for copyright
infringements or for an illness wants recall: what is missed is the harm. One number that weighs
both alike cannot choose the model then. One fixes the error that matters (say recall of at least
.9) and compares the rest, or moves the decision threshold, and looks at the confusion matrix.

**Which one for this task?** These scripts choose by macro-F1: the genres matter equally and their
sizes differ, and it exposes the collapse onto common classes that accuracy hides.
""")
runs = {
    name: {"val": {"macro_f1": val[name]} if name in val else {}, "test": scores[name, own]}
    for name, own in own_set.items()
}
other = {name: scores[name, s] for name, s in scores if name in models and s != own_set[name]}
step.finish(runs, other_test_set=other, best_by_validation=best)
