"""Step 6: every LSTM on both test sets, and the baselines."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import genre_predictions, labels_of, read_metrics, read_table, run_inside
from genre_runs import (
    BEAT,
    FULL,
    LSTMS,
    VAL_SCORES,
    GenreRuns,
    assert_learned,
    assert_predictions,
    assert_scores,
    is_beat,
    read_clip,
    set_of,
)
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from step_runs import copy_data

import common
from common import band_statistics
from patrec.clips import load_clips
from patrec.labels import read_entries
from patrec.tables import with_interval

pytestmark = pytest.mark.slow
STEP = "step06_eval"
KEYS = ["model", "test_set", "clip"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return GenreRuns(tmp_path_factory)


def own_rows(table, name):
    return table[(table["model"] == name) & (table["test_set"] == set_of(name))]


def test_every_lstm_predicts_every_clip_of_both_test_sets_once(runs):
    """On its own test set as step 5 said."""
    table = genre_predictions(runs.learned.out / STEP)
    assert_predictions(table, labels_of(runs.learned.data, split="test"))
    sets = {name: set(rows["test_set"]) for name, rows in table.groupby("model")}
    both, only = {FULL, BEAT}, {"svm": {FULL}, "beat_svm": {BEAT}}
    assert sets == dict.fromkeys([*LSTMS, "majority"], both) | only
    for name in LSTMS:
        assert_learned(own_rows(table, name), name)
    step5 = genre_predictions(runs.learned.out / "step05_lstm").set_index(KEYS)
    pd.testing.assert_frame_equal(step5, table.set_index(KEYS).loc[step5.index])


def test_a_prediction_follows_its_array_and_a_truth_its_label(runs):
    """Arrays of both test sets are exchanged, each in a way of its own.

    Who mixed up ids, files or sets would answer otherwise.
    """
    spoiled = runs.spoiled
    before, after = (genre_predictions(run.out / STEP) for run in (runs.learned, spoiled))
    assert_predictions(after, labels_of(spoiled.data, split="test"))
    old = before.set_index(KEYS)["prediction"]
    for (model, test_set), rows in after.groupby(["model", "test_set"]):
        said = rows["prediction"].to_numpy()
        expected, other = (
            old[[(model, test_set, spoiled.donors[which][clip]) for clip in rows["clip"]]]
            for which in (test_set, FULL if test_set == BEAT else BEAT)
        )
        # One near tie may fall otherwise: a batch of other clips is padded, and so summed up,
        # otherwise.
        assert (said != expected.to_numpy()).sum() <= 1, (model, test_set)
        told_apart = (said != other.to_numpy()).sum() >= 5
        # The baselines may answer one class throughout.
        assert told_apart or model not in LSTMS, "the test cannot tell the two sets apart"


def test_an_lstm_gets_whole_clips_of_the_other_form_in_steps_of_a_beat(runs, tmp_path, monkeypatch):
    """Not in windows; standardised by the training clips of that form."""
    entries = [
        read_entries(runs.learned.data, "genre", "train", form, merge=True) for form in (0, 1)
    ]
    stores, seen = [load_clips(some) for some in entries], set()
    frames, beats = (store.lengths.float().median() for store in stores)

    def look(model, test, settings, device):
        """What is asked of a network: of the other form here, of its own in step 5's tests."""
        name, beat = settings["run"], test.store.entries[0].path.parts[-3] == BEAT
        seen.add((name, beat))
        if is_beat(name) != beat:
            clips, n = stores[beat], 1 if beat else round(float(frames / beats))
            expected = band_statistics(clips, range(len(clips.entries)), settings["features"])
            assert all(map(torch.equal, test.stats, expected)), name
            assert settings["window"] is None and model.backbone.frames_per_step == n
        if len(seen) == 2 * len(LSTMS):
            raise KeyboardInterrupt  # all is seen
        return pd.DataFrame()

    monkeypatch.setattr(common, "predict_clips", look)
    copy_data(runs.learned.out / "step05_lstm", tmp_path / "step05_lstm")
    assert run_inside(f"{STEP}.py", "--data-dir", runs.learned.data, "--out-dir", tmp_path) == 130


def test_scores_are_those_of_the_predictions_on_each_test_set(runs):
    """Most is wrong here: a transposed table or a swapped precision and recall shows."""
    metrics, table = (read(runs.spoiled.out / STEP) for read in (read_metrics, genre_predictions))
    for name, facts in metrics["runs"].items():
        assert_scores(facts["test"], own_rows(table, name))
    assert set(metrics["other_test_set"]) == set(LSTMS)
    for name, scores in metrics["other_test_set"].items():
        assert_scores(scores, table.query("model == @name").drop(own_rows(table, name).index))
    shown = read_table(runs.spoiled.out / STEP, "F1 of each class on the test set of the other")
    f1 = {
        name: {label: f"{row['f1']:.3f}" for label, row in scores["per_class"].items()}
        for name, scores in metrics["other_test_set"].items()
    }
    assert shown.to_dict() == f1
    assert {n: metrics["runs"][n]["val"]["macro_f1"] for n in LSTMS} == VAL_SCORES
    test = {name: metrics["runs"][name]["test"]["macro_f1"] for name in LSTMS}
    assert metrics["best_by_validation"] == "chroma"
    assert max(test, key=test.get) != "chroma", "the test score would choose the same"


def test_the_tables_say_what_metrics_json_says(runs):
    """Each score in the row of its model and the column of its test set."""
    folder = runs.learned.out / STEP
    metrics = read_metrics(folder)
    captions = {"accuracy": "Accuracy on the test sets", "macro": "Macro av", "micro": "Micro av"}
    tables = {name: read_table(folder, caption) for name, caption in captions.items()}
    reports = (folder / "summary.md").read_text()
    for name in LSTMS:
        own, other = ("beat", "full") if is_beat(name) else ("full", "beat")
        pairs = (own, metrics["runs"][name]["test"]), (other, metrics["other_test_set"][name])
        for where, scores in pairs:
            written = tables["accuracy"].loc[name, f"{where}: accuracy"]
            assert written == with_interval(scores, "accuracy"), (name, where)
            for average in ("macro", "micro"):
                for metric in ("precision", "recall", "f1"):
                    written = tables[average].loc[name, f"{where}: {metric}"]
                    assert float(written) == pytest.approx(scores[f"{average}_{metric}"], abs=6e-4)
            title, file = f"`{name}` on the {where} test set:", f"report_{name}_{where}.txt"
            assert (title in reports) == (where == own) == (not (folder / file).exists())
            if where == own:
                report = reports.split(title)[1].split("```")[1]
            else:
                report = (folder / file).read_text()
            line = next(line.split() for line in report.splitlines() if "macro avg" in line)
            wanted = [scores[f"macro_{metric}"] for metric in ("precision", "recall", "f1")]
            assert [float(cell) for cell in line[2:5]] == pytest.approx(wanted, abs=6e-4)
    assert tables["accuracy"].loc["svm", "beat: accuracy"] == ""


def test_differences_in_the_report_have_the_sign_that_their_names_say(runs):
    folder = runs.spoiled.out / STEP
    runs = read_metrics(folder)["runs"]
    pattern = r"`(\w+)` minus `(\w+)`, \d+ clips: accuracy ([-+.\d]+) \["
    lines = re.findall(pattern, (folder / "summary.md").read_text())
    # By validation, see VAL_SCORES: the best, and with the SVM the best of the same kind of input.
    expected = [("chroma", name) for name in LSTMS if name != "chroma"]
    expected += [("mel", "beat_mel"), ("fused", "beat_fused")]  # frames against beats
    expected += [("chroma", "svm"), ("beat_fused", "beat_svm")]
    assert [tuple(pair) for *pair, _ in lines] == expected
    for *pair, gain in lines:
        first, second = (runs[name]["test"]["accuracy"] for name in pair)
        assert float(gain) == pytest.approx(first - second, abs=6e-4), pair
    assert any(float(gain) for *_, gain in lines), "the test cannot tell"


def test_the_answers_name_the_classes_and_scores_of_the_best_lstm(runs):
    folder = runs.spoiled.out / STEP
    scores = read_metrics(folder)["runs"]["chroma"]["test"]  # the best by validation
    text = " ".join((folder / "summary.md").read_text().split())
    classes = pd.DataFrame(scores["per_class"]).T
    name, lowest = re.search(r"(\S+) has the lowest F1: ([\d.]+)\.", text).groups()
    assert classes.loc[name, "f1"] == classes["f1"].min() < classes["f1"].max()
    assert float(lowest) == pytest.approx(classes["f1"].min(), abs=6e-4)
    pattern = r"differ most for (\S+): precision ([\d.]+), recall ([\d.]+), F1 ([\d.]+)\."
    name, *written = re.search(pattern, text).groups()
    gaps = (classes["precision"] - classes["recall"]).abs()
    assert gaps[name] == gaps.max() > gaps.min()
    row = classes.loc[name, ["precision", "recall", "f1"]]
    assert [float(number) for number in written] == pytest.approx(list(row), abs=6e-4)
    gap = scores["micro_f1"] - scores["macro_f1"]
    assert f"Micro minus macro F1 is {gap:+.3f}; the smallest" in text
    small = classes.loc[classes["support"].idxmin()]
    assert f"has an F1 of {small['f1']:.3f}." in text
    assert f"from {small['support']:.0f} to {classes['support'].max():.0f} test clips" in text
    always = read_metrics(folder)["runs"]["majority"]["test"]
    assert f"accuracy {always['accuracy']:.3f} and macro-F1 {always['macro_f1']:.3f}" in text
    for key in (
        "classified correctly: {accuracy:",
        "precision {macro_precision:.3f}, recall {macro_recall:.3f}, F1 {macro_f1:",
        "micro-F1 is {micro_f1:",
    ):
        assert (key + ".3f}").format(**scores) in text


def svm_features(data_dir, split, beat):
    """(features, classes) of a split, in the order of its label file: statistics of each band."""
    rows, truth = [], labels_of(data_dir, split=split, beat=beat)
    for clip in truth:
        mel = read_clip(data_dir, clip, split, beat)[:, :128]
        low, high = np.percentile(mel, [10, 90], axis=0)
        change = np.abs(np.diff(mel, axis=0)).mean(0)
        rows.append(np.concatenate([mel.mean(0), mel.std(0), low, high, change]))
    return np.array(rows), np.array(list(truth.values()))


@pytest.mark.parametrize("name", ["svm", "beat_svm"])
def test_baselines_are_fitted_on_training_clips_alone(runs, name):
    """The SVM is fitted here once more. In `spoiled` another class is common in the test split."""
    run = runs.spoiled
    x, y = svm_features(run.data, "train", is_beat(name))
    x_test, y_test = svm_features(run.data, "test", is_beat(name))
    n_folds = min(5, min(np.unique(y, return_counts=True)[1]))
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=42)
    grid = {"svc__C": [1, 3, 10], "svc__class_weight": [None, "balanced"]}
    pipeline = make_pipeline(StandardScaler(), SVC())
    svm = GridSearchCV(pipeline, grid, cv=folds, scoring="f1_macro").fit(x, y)
    facts = read_metrics(run.out / STEP)["runs"]
    assert svm.best_score_ > 0.6
    assert facts[name]["val"]["macro_f1"] == pytest.approx(svm.best_score_)
    commonest, other = (pd.Series(classes).mode()[0] for classes in (y, y_test))
    assert commonest != other, "the test cannot tell"
    for row, said in ((name, svm.predict(x_test)), ("majority", commonest)):
        assert_scores(facts[row]["test"], pd.DataFrame({"truth": y_test, "prediction": said}))
