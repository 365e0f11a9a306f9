"""Step 6: evaluation of the LSTMs.

The lab asks, for every model of step 5, on the test sets of fma_genre_spectrograms and
fma_genre_spectrograms_beat: a) accuracy; b) precision, recall and F1 per class; c) their
macro averages; d) their micro averages; and what these metrics mean.

    python step06_eval.py              # every LSTM; trains those that step 5 has not
    python step06_eval.py --ensemble   # besides, the average of all their answers

Input: the checkpoints of step 5, the genre test sets. Output, in outputs/step06_eval/:
tables, confusion matrices and the answers to the lab's questions (summary.md), all
scores (metrics.json), each test clip's true and predicted class (predictions.csv).

Measured on a small set of real music (see README), seed 42, one CPU thread, torch
2.13.0: majority class .236 accuracy / .048 macro-F1, SVM .541/.521, LSTM on mel
.637/.599, six LSTMs averaged .637/.595.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.special import log_softmax
from sklearn.metrics import classification_report
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from common import (
    GENRE_RUNS,
    Step,
    band_features,
    classification_scores,
    encode_labels,
    genre_model,
    genre_predictions,
    load_clips,
    make_parser,
    parse_args,
    plot_confusion,
    plot_scores,
    read_entries,
    run_main,
    score_genre,
    write_text,
)

RUNS = [name for name, run in GENRE_RUNS.items() if run.network == "lstm" and not run.plain]
AVERAGES = [f"{average}_{metric}" for average in ("macro", "micro") for metric in ("precision", "recall", "f1")]


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--ensemble", action="store_true", help="score the averaged answers of all LSTMs too")
    args = parse_args(parser, argv)
    step = Step("step06_eval", args)

    # All models first, then the test sets: nothing is trained after the first test score.
    models = {name: genre_model(step, name)[:2] for name in RUNS}
    classes = models["mel"][1]["classes"]

    # Each model on the test set of its own kind (frames or beats), and, because the lab
    # names both sets, on the other kind as well, which it has never heard.
    runs, other, logits, predictions = {}, {}, {}, []
    for name, (model, settings) in models.items():
        beat = settings["beat"]
        scores, targets, logits[name], ids = score_genre(step, model, settings)
        runs[name] = {"val": {}, "test": scores}
        predictions.append(genre_predictions(name, beat, classes, ids, targets, logits[name].argmax(1)))
        other[name], other_targets, other_logits, other_ids = score_genre(step, model, settings, beat=not beat)
        predictions.append(genre_predictions(name, not beat, classes, other_ids, other_targets, other_logits.argmax(1)))

    # Floors: what a guess of the commonest class scores, and a classical method on
    # statistics of the bands. A network that does not beat both has learned too little.
    runs["majority"], runs["svm"] = floors(step, classes)
    if args.ensemble:
        mean = np.mean([log_softmax(values, axis=1) for values in logits.values()], axis=0)
        runs["lstm_ensemble"] = {"test": classification_scores(targets, mean.argmax(1), classes)}
        predictions.append(genre_predictions("lstm_ensemble", False, classes, ids, targets, mean.argmax(1)))
    write_text(step.folder / "predictions.csv", pd.concat(predictions).to_csv(index=False))

    report_overview(step, runs, other)
    report_classes(step, {name: runs[name] for name in runs if name != "majority"}, classes, targets, logits)
    answer_questions(step, runs, [name for name in runs if name in RUNS])
    return step.finish(runs, other_test_set=other)


def floors(step, classes):
    """Test scores of the majority class and of an RBF-SVM on per-band statistics."""
    parts = [load_clips(read_entries(step.data, "genre", split, merge=not step.args.no_merge), step.args.skip_bad) for split in ("train", "test")]
    (x_train, x_test), (y_train, y_test) = ([f(part) for part in parts] for f in (band_features, lambda part: encode_labels(part.entries, classes)))
    majority = np.full_like(y_test, np.bincount(y_train).argmax())
    # C is chosen by cross-validation on the training split alone.
    folds = StratifiedKFold(min(5, np.bincount(y_train).min()), shuffle=True, random_state=step.args.seed)
    grid = {"svc__C": [1, 3, 10], "svc__class_weight": [None, "balanced"]}
    svm = GridSearchCV(make_pipeline(StandardScaler(), SVC()), grid, cv=folds, scoring="f1_macro").fit(x_train, y_train)
    return (
        {"test": classification_scores(y_test, majority, classes)},
        {"val": {"macro_f1": svm.best_score_}, "test": classification_scores(y_test, svm.predict(x_test), classes)},
    )


def interval(scores, key):
    return "{:.3f} [{:.3f}, {:.3f}]".format(scores[key], *scores[f"{key}_ci95"])


def report_overview(step, runs, other):
    """a), c), d): one row per model, one figure over all."""
    step.heading("6a, c, d. All models on the test set of their own kind")
    rows = {}
    for name, run in runs.items():
        rows[name] = {key: interval(run["test"], key) for key in ("accuracy", "macro_f1")}
        rows[name] |= {key: run["test"][key] for key in AVERAGES if key != "macro_f1"}
    step.table(pd.DataFrame(rows).T.rename_axis("model"), f"{runs['svm']['test']['n_clips']} test clips; 95% intervals from 1,000 bootstrap samples")
    step.text(
        "Models named `beat_...` are tested on fma_genre_spectrograms_beat, the others on fma_genre_spectrograms. "
        "`majority` always answers the commonest training class; `svm` is an RBF support vector machine on mean, "
        "standard deviation, percentiles and mean absolute difference of each mel band."
    )
    order = sorted(runs, key=lambda name: -runs[name]["test"]["macro_f1"])
    fig, axes = plt.subplots(1, 2, figsize=(11, 0.45 * len(runs) + 1.2), layout="constrained")
    for ax, key, label in zip(axes, ("accuracy", "macro_f1"), ("Accuracy", "Macro-F1"), strict=True):
        plot_scores(ax, order, [runs[n]["test"][key] for n in order], [runs[n]["test"][f"{key}_ci95"] for n in order], f"{label} on the test set")
    step.figure(fig, "comparison", "Test scores of all models with 95% intervals")

    step.heading("Both test sets")
    table = {
        name: {"full: accuracy": pair[0]["accuracy"], "full: macro-F1": pair[0]["macro_f1"],
               "beat: accuracy": pair[1]["accuracy"], "beat: macro-F1": pair[1]["macro_f1"]}
        for name, scores in other.items()
        for pair in [(scores, runs[name]["test"]) if GENRE_RUNS[name].beat else (runs[name]["test"], scores)]
    }  # fmt: skip
    step.table(pd.DataFrame(table).T.rename_axis("model"), "Every LSTM on the full and on the beat-synchronised test set")
    drops = [runs[name]["test"]["macro_f1"] - other[name]["macro_f1"] for name in other]
    step.text(
        f"On the kind of input it was not trained on, a model's macro-F1 changes by {-np.mean(drops):+.3f} on average "
        "(a beat is a median over about twenty frames: quieter peaks, other time scale)."
    )


def report_classes(step, runs, classes, targets, logits):
    """b): precision, recall and F1 per class, as text report and as confusion matrices."""
    step.heading("6b. Per class")
    for name, run in runs.items():
        per_class = pd.DataFrame(run["test"]["per_class"]).T.astype({"support": int})
        for average in ("macro", "micro"):  # scikit-learn's report hides micro where every clip has one label
            per_class.loc[f"{average} average"] = [run["test"][f"{average}_{m}"] for m in ("precision", "recall", "f1")] + [len(targets)]
        step.table(per_class.astype({"support": int}).rename_axis(name))
    best = max(logits, key=lambda name: runs[name]["test"]["macro_f1"])
    print(classification_report(targets, logits[best].argmax(1), labels=range(len(classes)), target_names=classes, zero_division=0))
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 5 * rows), squeeze=False, layout="constrained")
    for ax, (name, run) in zip(axes.flat, runs.items(), strict=False):
        plot_confusion(ax, run["test"]["confusion"], classes, f"{name} (accuracy {run['test']['accuracy']:.3f})")
    for ax in axes.flat[len(runs) :]:
        ax.remove()
    step.figure(fig, "confusion", "Confusion matrices: colour is the share of the true class, numbers are clips")


def answer_questions(step, runs, lstms):
    """The lab's five questions, answered with these models' numbers."""
    tests = {name: runs[name]["test"] for name in [*lstms, "majority", "svm"]}
    best = max(lstms, key=lambda name: tests[name]["macro_f1"])
    gaps = {name: tests[name]["accuracy"] - tests[name]["macro_f1"] for name in lstms}
    widest = max(gaps, key=gaps.get)
    per_class = pd.DataFrame(tests[best]["per_class"]).T
    lopsided = (per_class["precision"] - per_class["recall"]).abs().idxmax()
    weak, row, wide = per_class["f1"].idxmin(), per_class.loc[lopsided], pd.DataFrame(tests[widest]["per_class"]).T
    missed = wide.index[wide["recall"] == 0].tolist()
    one = tests[best]
    step.heading("6. What the metrics mean")
    step.text(f"""
**What information do accuracy, precision, recall and F1 give?** Accuracy is the share of clips whose genre is right:
{one['accuracy']:.3f} for `{best}`. For one class, precision is the share of right ones among the clips *called* by its name,
recall the share found among the clips that *are* of it, and F1 their harmonic mean, which is low as soon as one of them is.
`{best}` on {lopsided}: precision {row['precision']:.3f}, recall {row['recall']:.3f}, F1 {row['f1']:.3f}
({'it finds most of what is there and calls too much by that name' if row['recall'] > row['precision'] else 'what it calls so mostly is so, and it misses many'}).
Its hardest class is {weak} (F1 {per_class.loc[weak, 'f1']:.3f}).

**What do micro and macro averages give?** Macro takes the mean over classes, so each class counts the same however small
it is: {one['macro_f1']:.3f}. Micro pools all decisions before dividing, so each clip counts the same; with one label per
clip every false positive of one class is a false negative of another, so micro precision, recall and F1 are all equal to
accuracy: {one['micro_precision']:.3f}, {one['micro_recall']:.3f}, {one['micro_f1']:.3f}.

**When do accuracy and F1 differ much?** When the model serves large classes and neglects small ones. Extreme case here: always
answering the commonest class has accuracy {tests['majority']['accuracy']:.3f} and macro-F1 {tests['majority']['macro_f1']:.3f}. Among the LSTMs
the widest gap is `{widest}`'s: {tests[widest]['accuracy']:.3f} against {tests[widest]['macro_f1']:.3f}
({f"it never finds {', '.join(missed)}" if missed else "no class is missed altogether, some are much weaker than others"}).

**When do micro and macro F1 differ much?** In the same case, since micro-F1 is accuracy here: class sizes are unequal (from
{int(per_class['support'].min())} to {int(per_class['support'].max())} test clips) and the score depends on the class. For `{best}` the difference is
{one['micro_f1'] - one['macro_f1']:+.3f}; if small classes are the easy ones it turns negative.

**Are there tasks where precision matters more than recall, or the opposite? Is a good accuracy or F1 then enough?** Yes. A
playlist by genre wants precision: one metal song in the lullabies is worse than a lullaby left out. A search for copyright
claims or for an illness wants recall: what is missed is the harm. Then one number that mixes both does not choose the model:
`{best}` on {lopsided} would serve one of the two uses far better than the other, at one and the same F1. One fixes the error that
matters (say recall of at least .9) and compares the rest, or moves the decision threshold, and looks at the confusion matrix.

**Our choice for this task: macro-F1.** Genres matter equally and their sizes do not, and it exposes the collapse onto common
classes that accuracy hides. Differences smaller than the intervals above are not taken for real.
""")


if __name__ == "__main__":
    metrics = run_main(main)
