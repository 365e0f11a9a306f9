"""Step 6: evaluation of the LSTMs.

The lab asks, for every model of step 5, on the test sets of fma_genre_spectrograms and
fma_genre_spectrograms_beat: a) accuracy; b) precision, recall and F1 per class; c) their macro
averages; d) their micro averages; and what these metrics mean.

    python step06_eval.py   # every LSTM; trains those that step 5 has not trained

Input: the checkpoints of step 5, the genre data set. Output, in outputs/step06_eval/: tables,
a confusion matrix, classification reports and the lab's questions (summary.md, report_*.txt), all
scores (metrics.json), each test clip's true and predicted class (predictions.csv).
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--smoke").
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.metrics import classification_report
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from common import band_statistics, genre_models, load_test, predict_clips, true_labels
from patrec import tables
from patrec.baselines import band_features
from patrec.clips import load_clips
from patrec.files import part_folder, write_text
from patrec.labels import read_entries
from patrec.plots import plot_confusions, plot_scores, run_title
from patrec.recipes import LSTM_NAMES
from patrec.scores import genre_scores
from patrec.splits import encode_labels
from patrec.step import Step

SETS = {"full": False, "beat": True}  # the two test sets; True: beat-synchronised
SVMS = {"full": "svm", "beat": "beat_svm"}  # the baseline of each
METRICS = ("precision", "recall", "f1")

step = Step("step06_eval", __doc__, parts=("genre",))

# %% The models of step 5 and the baselines
# Everything is trained before a test clip is read. The best LSTM is chosen here too, by its
# validation score: a choice by the test score would make that score optimistic.
step.heading("The models and the baselines")
models = genre_models(step.training, LSTM_NAMES)
classes = models["mel"].settings["names"]
own_set = {name: "beat" if model.settings["beat"] else "full" for name, model in models.items()}
val = {name: model.facts["val"]["macro_f1"] for name, model in models.items()}
best = max(val, key=val.get)
n_val = models[best].facts["n_val"]
trained, svms = {}, {}
grid = {"svc__C": [1, 3, 10], "svc__class_weight": [None, "balanced"]}
for set_name, beat in SETS.items():
    entries = read_entries(step.source.root, "genre", "train", beat, step.source.merge)
    trained[set_name] = load_clips(entries, step.source.skip_bad)
    targets = encode_labels(trained[set_name].entries, classes)
    n_folds = min(5, np.bincount(targets).min())
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=step.args.seed)
    pipeline = make_pipeline(StandardScaler(), SVC())
    search = GridSearchCV(pipeline, grid, cv=folds, scoring="f1_macro")
    svms[SVMS[set_name]] = search.fit(band_features(trained[set_name]), targets)
    val[SVMS[set_name]] = search.best_score_
commonest = pd.Series([entry.label for entry in trained["full"].entries]).mode()[0]
step.text(f"""
    The LSTMs are those of step 5: the ones named `beat_...` were trained on beats, the others on
    frames. In figures, `beat_fused` is called *{run_title("beat_fused")}*, and so on. There are
    three baselines. `majority` always predicts the most frequent training class, {commonest}. `svm`
    (for frames) and `beat_svm` (for beats) are support vector machines. Their input is the mean,
    standard deviation, percentiles and mean change of each mel band over the clip. Their C and
    class weights are chosen by cross-validation.
""")
step.table(pd.DataFrame({"val macro-F1": val}).rename_axis("model"), "Validation scores")
step.text(f"""
    The best LSTM by validation macro-F1 is `{best}` ({run_title(best)}). This choice is uncertain,
    because there are only {n_val} validation clips. Do not compare LSTMs and SVMs in this table.
    The LSTMs' scores are those of the kept epoch, the highest of several. The SVMs' scores are from
    cross-validation on training and validation clips, the highest of several settings.
""")

# %% Predictions for both test sets
# The lab names two test sets, so every LSTM is scored on both. The set of the other kind of input
# is standardised by the training clips of that form, and a time step is about as long as usual.
frames, beats = (trained[set_name].lengths.float().median() for set_name in SETS)
frames_per_beat = round(float(frames / beats))
tests, true, predictions = {}, {}, {}
for name, model in models.items():
    backbone, usual = model.model.backbone, model.model.backbone.frames_per_step
    for set_name, beat in SETS.items():
        test = tests[set_name] = load_test(step.source, model.settings, beat=beat)
        true[set_name], settings = true_labels(test, model.settings), model.settings
        backbone.frames_per_step = usual
        if set_name != own_set[name]:
            backbone.frames_per_step = 1 if beat else frames_per_beat
            settings = settings | {"window": None}
            store = trained[set_name]
            stats = band_statistics(store, range(len(store.entries)), settings["features"])
            test = test.variant(stats=stats)
        predictions[name, set_name] = predict_clips(model.model, test, settings, step.device)
for set_name, svm in SVMS.items():  # as a network's: a score per class, 1 for the predicted one
    ids, predicted = true[set_name].index, svms[svm].predict(band_features(tests[set_name].store))
    always = np.full(len(ids), classes.index(commonest))
    for name, numbers in (("majority", always), (svm, predicted)):
        predictions[name, set_name] = pd.DataFrame(np.eye(len(classes))[numbers], ids, classes)
own_set |= {"majority": "full", "svm": "full", "beat_svm": "beat"}
scores = {key: genre_scores(true[key[1]], table) for key, table in predictions.items()}
rows = []
for (name, set_name), table in predictions.items():
    where = {"test_set": part_folder(".", "genre", SETS[set_name]).name, "seed": step.args.seed}
    rows.append(tables.prediction_rows(name, true[set_name], table, **where))
tables.write_predictions(step.folder, rows)


def both_sets(cell):
    """Table of all models: cell(scores) -> {column: value}, once per test set."""
    rows = {name: {} for name in own_set}
    for (name, set_name), found in scores.items():
        rows[name] |= {f"{set_name}: {column}": value for column, value in cell(found).items()}
    table = pd.DataFrame(rows).T.astype(object).fillna("").rename_axis("model")
    return table[sorted(table, key=lambda column: column.startswith("beat"))]


# %% 6a. Accuracy
# The share of clips whose class is predicted correctly, on both test sets.
step.heading("6a. Accuracy")
step.text(f"""
    `full` is the test set of fma_genre_spectrograms and `beat` that of fma_genre_spectrograms_beat.
    On the test set of the other form, an LSTM gets a kind of input that it was not trained on.
    LSTMs of beats get means of {frames_per_beat} frames, which is about the length of a beat. LSTMs
    of frames get one beat per time step. A beat has no deviation and no change within the step, so
    both are set to their training means.
""")
table = both_sets(lambda s: {"accuracy": tables.with_interval(s, "accuracy")})
step.table(table, "Accuracy on the test sets, with 95% intervals over test clips, for one seed")

# %% 6b. Precision, recall and F1 of each class
# The lab: sklearn's classification_report. It prints the accuracy in place of the micro average,
# because they are equal where every clip has one label (6d).
step.heading("6b. Precision, recall and F1 of each class")
step.text("""
One report per model, on the test set of its own kind of input. For the other test set there is a
table of F1 below; the reports are in the files `report_<model>_<test set>.txt`. The precision of a
class that is never predicted is 0/0 and counts as 0. `support` is the number of test clips of a
class. `weighted avg` is the mean over the classes, weighted by support.
""")
for (name, set_name), table in predictions.items():
    options = {"labels": classes, "digits": 3, "zero_division": 0}
    predicted = table.idxmax(axis=1)
    report = classification_report(true[set_name][table.index], predicted, **options).rstrip()
    if set_name == own_set[name]:
        step.show(f"`{name}` on the {set_name} test set:\n\n```text\n{report}\n```")
    else:
        write_text(step.folder / f"report_{name}_{set_name}.txt", report + "\n")
other = {name: scores[name, s] for name, s in scores if name in models and s != own_set[name]}
by_class = {name: pd.DataFrame(found["per_class"]).T["f1"] for name, found in other.items()}
caption = "F1 of each class on the test set of the other form"
step.table(pd.DataFrame(by_class).rename_axis("class"), caption)
caption = (
    f"Confusion matrix of `{best}`, the best LSTM by validation, on the {own_set[best]} test set. "
    "Number: clips (empty: none). Colour: share of the true class, darker is more"
)
step.figure(plot_confusions({best: scores[best, own_set[best]]}, classes), "confusion", caption)

# %% 6c. Macro averages
# The mean over the classes. Paired differences compare two models on the same clips.
step.heading("6c. Macro-averaged precision, recall and F1")
step.text("A macro average is the mean over the classes. Each class counts the same.")
step.table(both_sets(lambda s: {name: s[f"macro_{name}"] for name in METRICS}), "Macro averages")
fig, axes = plt.subplots(1, 2, figsize=(11, 0.4 * len(own_set) + 1.3), layout="constrained")
for ax, set_name in zip(axes, SETS, strict=True):
    found = {name: scores[name, set_name] for name in own_set if (name, set_name) in scores}
    values, intervals = ([s[key] for s in found.values()] for key in ("macro_f1", "macro_f1_ci95"))
    plot_scores(ax, list(found), values, intervals, "Macro-F1 (line: 95% interval)")
    for name, bar in zip(found, ax.patches, strict=True):
        bar.set_alpha(0.35 if name in models and own_set[name] != set_name else 1)
    ax.set_title(f"{set_name} test set ({len(true[set_name])} clips)")
caption = "Macro-F1. Pale bars: LSTMs on the kind of input that they were not trained on"
step.figure(fig, "macro_f1", caption)
pairs = [(best, name) for name in models if name != best]
twins = [(name, f"beat_{name}") for name in models if f"beat_{name}" in models]
pairs += [pair for pair in twins if best not in pair]  # frames against beats
for set_name, svm in SVMS.items():
    lstms = [name for name in models if own_set[name] == set_name]
    pairs.append((max(lstms, key=val.get), svm))
step.text(f"""
Each line compares two models on the same test clips, each on its own kind of input. An SVM is
compared with the best LSTM (by validation) of its kind of input. {tables.INTERVALS}
""")
own = {name: predictions[name, set_name] for name, set_name in own_set.items()}
labels = true["full"].combine_first(true["beat"])  # an unreadable clip may be missing in one
step.text(tables.difference_lines(labels, own, pairs))

# %% 6d. Micro averages
# The lab: the same three, averaged over clips.
step.heading("6d. Micro-averaged precision, recall and F1")
step.text("""
A micro average adds up the true positives, false positives and false negatives of all classes and
computes the score from these sums. Each clip counts the same. A clip has one true and one predicted
class, so every false positive of one class is a false negative of another. Therefore micro
precision, recall and F1 are all equal to the accuracy.
""")
step.table(both_sets(lambda s: {name: s[f"micro_{name}"] for name in METRICS}), "Micro averages")

# %% 6. What the metrics mean
# The lab's five questions. The definitions hold for every run, the numbers are those of this run.
one, lowest = scores[best, own_set[best]], scores["majority", "full"]
per_class = pd.DataFrame(one["per_class"]).T
unequal = (per_class["precision"] - per_class["recall"]).abs().idxmax()
row, hardest, support = per_class.loc[unequal], per_class["f1"].idxmin(), per_class["support"]
step.heading("6. What the metrics mean")
step.text(f"""
The numbers are those of `{best}`, the best LSTM by validation, on its own test set.

**What information do accuracy, precision, recall and F1 give?** Accuracy is the share of clips that
are classified correctly: {one["accuracy"]:.3f}. The precision of a class is the share of correct
clips among those *predicted* as this class. Its recall is the share of correct clips among those
that *belong* to this class. F1 is their harmonic mean, which is low if one of them is low.
Precision and recall differ most for {unequal}: precision {row["precision"]:.3f}, recall
{row["recall"]:.3f}, F1 {row["f1"]:.3f}. {hardest} has the lowest F1:
{per_class.loc[hardest, "f1"]:.3f}.

**What information do micro and macro averages give?** The macro average is the mean over the
classes, so a small class counts as much as a large one: precision {one["macro_precision"]:.3f},
recall {one["macro_recall"]:.3f}, F1 {one["macro_f1"]:.3f}. The micro average counts every clip the
same. With one label per clip all three equal the accuracy: micro-F1 is {one["micro_f1"]:.3f}.

**When do accuracy and F1 differ much?** Micro-F1 equals the accuracy here, so the question is about
macro-F1. It is far below the accuracy when a model recognises large classes and misses small ones.
Then the accuracy tells mainly how well the large classes are recognised. In this run the accuracy
is {one["accuracy"]:.3f} and macro-F1 {one["macro_f1"]:.3f}. An extreme case is a model that always
predicts {commonest}: accuracy {lowest["accuracy"]:.3f} and macro-F1 {lowest["macro_f1"]:.3f}. A
macro-F1 above the accuracy often means that small classes are recognised better than large ones. In
a task with one rare class, its F1 can be near 0 while the accuracy is near 1.

**When do micro and macro F1 differ much?** They can differ much if the classes have unequal sizes
(here from {support.min():.0f} to {support.max():.0f} test clips) and the small ones are recognised
much worse or much better than the large ones. With equal sizes they are mostly close, unless the
model hardly ever predicts some classes. A micro-F1 far above the macro-F1 means that some classes
are recognised badly, usually the small ones. A micro-F1 far below the macro-F1 means that the badly
recognised classes are usually the large ones. Micro minus macro F1 is
{one["micro_f1"] - one["macro_f1"]:+.3f}; the smallest class, {support.idxmin()}, has an F1 of
{per_class.loc[support.idxmin(), "f1"]:.3f}.

**Are there tasks where we care more about precision than recall, or the opposite? Is a good
accuracy or F1 enough then?** Yes, there are, and no, it is not enough. A playlist of one genre
needs precision: a metal song among lullabies is worse than a missing lullaby. A search for an
illness needs recall: a missed case is worse than a false alarm. Accuracy and F1 do not tell these
errors apart. For the illness we can keep only the models with a recall of at least .9. Of these we
choose the one with the highest precision.

**Which one for this task?** We choose by macro-F1. All genres matter equally, but their sizes
differ, and macro-F1 shows when a model recognises only the frequent classes.
""")
runs = {
    name: {"val": {"macro_f1": val[name]} if name in val else {}, "test": scores[name, own]}
    for name, own in own_set.items()
}
step.finish(runs, other_test_set=other, best_by_validation=best)
