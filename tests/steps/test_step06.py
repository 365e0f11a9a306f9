"""Step 6: every LSTM on both test sets, what lies under them, and their average."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import genre_predictions, labels_of, read_metrics, read_table, run_forked
from genre_runs import (
    BEAT,
    FULL,
    LSTMS,
    GenreRuns,
    array_path,
    assert_average,
    assert_learned,
    assert_predictions,
    assert_scores,
    copy_data,
    is_beat,
    read_clip,
    set_of,
)
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from patrec.tables import with_interval

pytestmark = pytest.mark.slow
STEP = "step06_eval"
KEYS = ["model", "test_set", "clip"]


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    return GenreRuns(data_dir, tmp_path_factory)


def own_rows(table, name):
    return table[(table["model"] == name) & (table["test_set"] == set_of(name))]


def test_every_lstm_predicts_every_clip_of_both_test_sets_once(runs):
    table = genre_predictions(runs.learned.out / STEP)
    assert_predictions(table, labels_of(runs.learned.data, split="test"))
    sets = {name: set(rows["test_set"]) for name, rows in table.groupby("model")}
    both, only = {FULL, BEAT}, {"lstm_ensemble": {FULL}, "svm": {FULL}, "beat_svm": {BEAT}}
    assert sets == dict.fromkeys([*LSTMS, "majority"], both) | only
    for name in [*LSTMS, "lstm_ensemble"]:
        assert_learned(own_rows(table, name), name)


def test_steps_5_and_6_predict_alike(runs):
    tables = [genre_predictions(runs.learned.out / step) for step in ("step05_lstm", STEP)]
    first, second = (table.set_index(KEYS) for table in tables)
    pd.testing.assert_frame_equal(first, second.loc[first.index])


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


@pytest.mark.parametrize("which", ["learned", "spoiled"])
def test_scores_are_those_of_the_predictions_on_each_test_set(runs, which):
    """In `spoiled` most is wrong: a transposed table or a swapped precision and recall shows."""
    out = getattr(runs, which).out
    metrics, table = read_metrics(out / STEP), genre_predictions(out / STEP)
    for name in metrics["runs"]:
        rows = own_rows(table, name)
        assert_scores(metrics["runs"][name]["test"], rows)
    assert set(metrics["other_test_set"]) == set(LSTMS)
    for name in LSTMS:
        other = (table["model"] == name) & (table["test_set"] != set_of(name))
        assert_scores(metrics["other_test_set"][name], table[other])


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
    folder = runs.learned.out / STEP
    metrics = read_metrics(folder)
    test = {name: facts["test"]["accuracy"] for name, facts in metrics["runs"].items()}
    pattern = r"`(\w+)` minus `(\w+)`: accuracy ([-+.\d]+) \["
    lines = re.findall(pattern, (folder / "summary.md").read_text())
    best = metrics["best_by_validation"]
    val = {name: metrics["runs"][name]["val"]["macro_f1"] for name in LSTMS}
    expected = [(best, name) for name in LSTMS if name != best]
    for svm in ("svm", "beat_svm"):  # against the best LSTM of the same kind of input
        kin = [name for name in LSTMS if is_beat(name) == is_beat(svm)]
        expected.append((max(kin, key=val.get), svm))
    assert [tuple(pair) for *pair, _ in lines] == expected
    for first, second, gain in lines:
        assert float(gain) == pytest.approx(test[first] - test[second], abs=6e-4), (first, second)
    assert any(float(gain) for *_, gain in lines), "the test cannot tell"


def test_the_best_lstm_is_named_by_its_validation_score(runs):
    metrics = read_metrics(runs.spoiled.out / STEP)
    test = {name: metrics["runs"][name]["test"]["macro_f1"] for name in LSTMS}
    assert metrics["best_by_validation"] == "fused"
    assert max(test, key=test.get) != "fused", "the test score would choose the same"


def test_a_beat_is_made_of_as_many_frames_as_the_median_lengths_say(runs):
    clips = labels_of(runs.learned.data, split="train")
    frames, beats = (
        np.median([len(read_clip(runs.learned.data, clip, "train", beat)) for clip in clips])
        for beat in (False, True)
    )
    text = (runs.learned.out / STEP / "summary.md").read_text()
    assert f"{round(frames / beats)} frames" in " ".join(text.split())


def test_the_average_is_of_the_log_probabilities_of_all_lstms(runs):
    assert_average(runs.learned, STEP, "lstm_ensemble", LSTMS)


def test_clips_that_only_one_of_the_test_sets_has(runs, tmp_path):
    """Left out for an array that cannot be read; all else is predicted as before, clip by clip."""
    data = copy_data(runs.learned.data, tmp_path / "data")
    full, beat = sorted(labels_of(data, split="test"))[3:5]
    for clip, is_of_beats in ((full, False), (beat, True)):
        array_path(data, clip, "test", is_of_beats).unlink()
    shutil.copytree(runs.learned.out / "step05_lstm", tmp_path / "step05_lstm")
    where = ("--data-dir", data, "--out-dir", tmp_path)
    run_forked("step06_eval.py", "--ensemble", "--skip-bad", *where)
    before, after = (
        genre_predictions(out / STEP).set_index(KEYS).sort_index()
        for out in (runs.learned.out, tmp_path)
    )
    without = {FULL: {full}, BEAT: {beat}}
    for model, test_set in set(after.index.droplevel("clip")):
        old, new = before.loc[model, test_set], after.loc[model, test_set]
        missing = without[test_set] | ({beat} if model == "lstm_ensemble" else set())
        assert set(new.index) == set(old.index) - missing
        changed = new["prediction"] != old.loc[new.index, "prediction"]
        assert changed.sum() <= 1 and (new["truth"] == old.loc[new.index, "truth"]).all()
    metrics, n_clips = read_metrics(tmp_path / STEP), len(labels_of(data, split="test"))
    assert metrics["runs"]["lstm_ensemble"]["test"]["n_clips"] == n_clips - 2
    assert metrics["other_test_set"]["mel"]["n_clips"] == n_clips - 1
    rows = after.loc["lstm_ensemble", FULL]
    assert_scores(metrics["runs"]["lstm_ensemble"]["test"], rows)


# --- baselines


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
    beat = is_beat(name)
    x, y = svm_features(runs.learned.data, "train", beat)
    folds = StratifiedKFold(min(5, min(np.unique(y, return_counts=True)[1])),
                            shuffle=True, random_state=42)  # fmt: skip
    grid = {"svc__C": [1, 3, 10], "svc__class_weight": [None, "balanced"]}
    pipeline = make_pipeline(StandardScaler(), SVC())
    svm = GridSearchCV(pipeline, grid, cv=folds, scoring="f1_macro").fit(x, y)
    commonest, common = pd.Series(y).value_counts().index[0], []
    for run in (runs.learned, runs.spoiled):
        facts = read_metrics(run.out / STEP)["runs"]
        x_test, y_test = svm_features(run.data, "test", beat)
        common.append(pd.Series(y_test).value_counts().index[0])
        assert facts[name]["val"]["macro_f1"] == pytest.approx(svm.best_score_) and (
            svm.best_score_ > 0.6
        )
        for row, said in ((name, svm.predict(x_test)), ("majority", commonest)):
            predictions = pd.DataFrame({"truth": y_test, "prediction": said})
            assert_scores(facts[row]["test"], predictions)
    assert common[1] != commonest, "the test cannot tell"
