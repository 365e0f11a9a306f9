"""Tables and files of predictions, worked out by hand; what an earlier step has predicted."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from patrec.errors import InputError
from patrec.labels import EMOTIONS, fingerprint
from patrec.recipes import PARTS
from patrec.tables import (
    difference_line,
    earlier_predictions,
    genre_table,
    held_out_rows,
    markdown_table,
    parts_table,
    prediction_rows,
    training_table,
    write_predictions,
    write_submission,
)


@pytest.mark.parametrize("low, high, shown", [
    (-0.05, 0.25, "no difference is shown: the interval contains 0"), (0.01, 0.25, "`a` is better"),
    (-0.25, -0.01, "`b` is better"),
])  # fmt: skip
def test_a_difference_in_one_line_and_what_it_shows(low, high, shown):
    found = {"spearman": 0.1, "spearman_ci95": [low, high], "n_clips": 5}
    line = f"`a` minus `b`, 5 clips: Spearman +0.100 [{low:+.3f}, {high:+.3f}] ({shown})"
    assert difference_line("a", "b", found) == line
    found = {"accuracy": 0.2, "accuracy_ci95": [0.1, 0.3], "n_clips": 5}
    found |= {"macro_f1": 0.2, "macro_f1_ci95": [-0.1, 0.4]}
    line = difference_line("a", "b", found)
    assert "accuracy +0.200 [+0.100, +0.300] (`a` is better), macro" in line
    assert "macro-F1 +0.200 [-0.100, +0.400] (no difference is shown: the interval" in line


def test_rows_of_predictions_by_hand():
    true = pd.DataFrame({"valence": [0.1, 0.2], "energy": [0.3, 0.4]}, ["7", "10"])
    answers = pd.DataFrame({"energy": [0.8, 0.9], "valence": [0.6, 0.5]}, ["10", "7"])
    folds = pd.Series({"7": 2, "10": 1})
    rows = prediction_rows("cnn", true, answers, test_set="held out", seed=3, fold=folds)
    found = {(r.clip, r.target): (r.truth, r.prediction, r.fold) for r in rows.itertuples()}
    assert found == {
        ("10", "energy"): (0.4, 0.8, 1), ("7", "energy"): (0.3, 0.9, 2),
        ("10", "valence"): (0.2, 0.6, 1), ("7", "valence"): (0.1, 0.5, 2),
    }  # fmt: skip
    true = pd.Series({"7": "b", "10": "a"})
    answers = pd.DataFrame({"b": [-1.0, -3.0], "a": [-2.0, -0.1]}, ["10", "7"])
    rows = prediction_rows("cnn", true, answers, test_set="test", seed=3)
    columns = ["clip", "model", "test_set", "target", "fold", "seed", "truth", "prediction"]
    assert list(rows.columns) == columns
    assert rows[["clip", "truth", "prediction"]].to_numpy().tolist() == [
        ["10", "a", "b"], ["7", "b", "a"]
    ]  # fmt: skip


def test_submission_by_hand(tmp_path):
    answers = {"energy": [0.5, -0.2], "danceability": [1.3, 0.25], "valence": [0.1, 0.2]}
    write_submission(tmp_path / "submission.csv", pd.DataFrame(answers, ["9", "10"]))
    assert (tmp_path / "submission.csv").read_text().splitlines() == [
        "Id.fused.full.npy.gz,valence,energy,danceability",
        "9,0.100000,0.500000,1.000000",
        "10,0.200000,0.000000,0.250000",
    ]


def test_a_bar_in_a_name_does_not_begin_another_cell():
    """Class and file names are the user's."""
    table = markdown_table(pd.DataFrame({"a|b": ["Rock|Pop"]}, ["x|y"]))
    rows = ["|  | a\\|b |", "| --- | --- |", "| x\\|y | Rock\\|Pop |"]
    assert table.splitlines() == rows


def test_numbers_in_a_table():
    """Thousands have a comma, and a rounded -0.0004 is no negative zero."""
    frame = pd.DataFrame({"n": [1234567], "x": [-0.0004], "y": [float("nan")], "z": [0.1235]})
    assert markdown_table(frame).splitlines()[-1] == "| 0 | 1,234,567 | 0.000 |  | 0.123 |"


def test_a_training_in_a_row():
    facts = {"n_train": 20, "trained_weights": 7, "weights": 90, "epochs": 3, "best_epoch": 2}
    facts |= {"examples_per_epoch": 40, "train_seconds": 5.4, "val": {"energy": 0.25}}
    run = SimpleNamespace(facts=facts, members=[SimpleNamespace(facts=facts)])
    assert training_table({"cnn": run}).loc["cnn"].to_dict() == {
        "training clips": 20, "trained weights": 7, "examples": 120, "epochs (kept)": "3 (2)",
        "seconds": 5, "validation Spearman": 0.25,
    }  # fmt: skip


def test_scores_in_a_row_and_what_the_parts_are_worth_to_each_kind():
    row = {
        "accuracy": 0.4,
        "accuracy_ci95": [0.3, 0.7],
        "macro_f1": 0.3,
        "macro_f1_ci95": [0.2, 0.6],
    }
    shown = [5, "0.400 [0.300, 0.700]", "0.300 [0.200, 0.600]"]
    assert genre_table({"a": row | {"n_clips": 5}}).loc["a"].tolist() == shown
    for kind in ("lstm", "cnn"):
        shown = parts_table(kind)[0].iloc[:, 1:].to_numpy().tolist()
        assert shown == [list(effects[kind]) for _, effects in PARTS.values()]


IDS = ["7", "010", "9"]  # as text: 010 is not 10, and 9 comes last
FULL = pd.DataFrame(np.random.default_rng(0).random((3, 3)).round(3), IDS, EMOTIONS)


@pytest.fixture
def earlier(tiny_data, tmp_path, make_step):
    """Functions: leave predictions as step 8 leaves them; and look for them."""
    step, folder = make_step(tiny_data, tmp_path), tmp_path / "step08_regression"

    def write(rows, **changes):
        folder.mkdir(exist_ok=True)
        prints = {"emotion": fingerprint(step.source.root, "emotion")}
        facts = {"data": {"fingerprint": prints}, "seed": 42, "smoke": False, "runs": {"cnn": 1}}
        (folder / "metrics.json").write_text(json.dumps(facts | changes))
        write_predictions(folder, rows)
        return folder

    return write, lambda *asked: earlier_predictions(step.training, folder.name, *asked)


def test_earlier_predictions_are_those_for_the_same_clips_by_id(earlier):
    write, find = earlier
    answers, runs, note = find(["7"])
    assert (answers, runs) == ({}, {}) and "saved no predictions" in note
    tables = {"cnn": FULL, "svr": FULL.iloc[[2, 0, 1]] / 2, "lstm": FULL[["energy"]] / 4}
    pairs = {"test_set": "emotion", "seed": 42}
    rows = [prediction_rows(name, FULL, frame, **pairs) for name, frame in tables.items()]
    folder, asked = write(rows), ["9", "7", "010"]
    answers, runs, note = find(asked)
    assert folder.name in note and "no predictions" not in note
    assert set(answers) == set(tables) and runs == {"cnn": 1}
    for name, frame in answers.items():
        assert list(frame.index) == asked and list(frame.columns) == list(tables[name].columns)
        np.testing.assert_allclose(frame, tables[name].loc[asked], atol=1e-9)
    for clips in (asked[:2], [*asked, "11"], ["9", "7", "10"]):
        answers, runs, note = find(clips)
        assert (answers, runs) == ({}, {}) and "other labels, held-out clips" in note
    odd = {"fingerprint": {"emotion": "of other labels"}}
    for changes in ({"seed": 43}, {"smoke": True}, {"data": odd}):
        write(rows, **changes)
        assert find(asked)[:2] == ({}, {})
    for text in ("{", "{}"):
        (folder / "metrics.json").write_text(text)
        with pytest.raises(InputError, match="step08_regression.*cannot be read"):
            find(asked)


def test_predictions_that_do_not_fit_do_not_hide_others(earlier, tmp_path, monkeypatch):
    """On Kaggle an attached kernel may hold the step too; the working folder comes first."""
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    (kernel := tmp_path / "kaggle" / "input" / "kernel").mkdir(parents=True)
    write, find = earlier
    rows = [prediction_rows("cnn", FULL, FULL, test_set="emotion", seed=42)]
    attached = write(rows).rename(kernel / "step08_regression")
    write(rows, seed=43)
    found = find(IDS)
    assert list(found.predictions) == ["cnn"] and f"kernel/{attached.name}" in found.note


def test_predictions_of_other_folds_are_not_compared(earlier):
    """The same clips, held out otherwise: other clips were trained on."""
    write, find = earlier
    folds = pd.Series([1, 2, 1], IDS)
    write(held_out_rows(FULL, {"cnn": FULL}, 42, folds))
    assert list(find(IDS, folds).predictions) == ["cnn"]
    answers, _, note = find(IDS, 3 - folds)
    assert not answers and "folds" in note
