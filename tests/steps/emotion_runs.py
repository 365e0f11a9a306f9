"""One run of steps 8, 9 and 10 in the lab's order, and the means to judge them from the outside."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    EMOTIONS,
    GENRES,
    INTRO,
    emotion_values,
    labels_of,
    make_ids,
    read_metrics,
    run_forked,
    submission,
    write_data_set,
)
from scipy.stats import spearmanr
from step_runs import once

from common import Classifier, load_checkpoint, make_backbone, save_checkpoint
from patrec.recipes import GENRE_NETWORKS, window_size

STEP8, STEP9, STEP10 = "step08_regression", "step09_transfer", "step10_multitask"
PER_GENRE, N_EMOTION = (4, 1), (64, 12)  # clips in training and test split
# Among those of this seed that are held out, and among the unlabelled ones, no emotion goes
# along with another.
DATA_SEED = 9
# One recipe, so that steps 9 and 10 find the twins of their networks in step 8.
RECIPE = ("--epochs", 12, "--batch-size", 8, "--lr", 0.004)
# Step 5's LSTMs: {name: (validation score, test score)} that they are given. Of those on frames
# `fused` validates best.
GENRE_SCORES = {"beat_fused": (0.62, 0.1), "fused": (0.53, 0.2), "mel": (0.31, 0.9)}


class EmotionRun(NamedTuple):
    data: Path
    folder: Path  # of the step

    runs = property(lambda self: read_metrics(self.folder)["runs"])
    table = property(lambda self: pd.read_csv(self.folder / "predictions.csv", dtype={"clip": str}))

    def predictions(self, model):
        """Predictions of a model (clips, axes), and these clips' labels by the label file."""
        rows, labels = self.table.query("model == @model"), labels_of(self.data, "emotion")
        rows = rows.pivot(index="clip", columns="target", values="prediction")
        return rows[list(EMOTIONS)].to_numpy(), np.array([labels[clip] for clip in rows.index])

    def checkpoint(self, name):
        return load_checkpoint(self.folder / name / "best.pt")


def run_step(name, data, out, *flags):
    run_forked(f"{name}.py", "--smoke", "--data-dir", data, "--out-dir", out, *flags)
    return EmotionRun(data, out / name)


class EmotionRuns:
    """The runs of steps 8, 9 and 10; `genre`: the folder of step 5's LSTMs, for step 8 alone."""

    def __init__(self, factory):
        root = once(factory, "emotion", make_runs)
        self.data, self.genre = root / "data", root / "genre"
        steps = (EmotionRun(self.data, root / "out" / step) for step in (STEP8, STEP9, STEP10))
        self.regression, self.transfer, self.multitask = steps


def make_runs(root):
    """In the test splits, frames begin with an intro longer than a window."""
    lengths = {"n_frames": (300, 340), "n_beats": (14, 40), "test_frames": (1150, 1250)}
    options = lengths | {"seed": DATA_SEED, "dtype": np.float32, "intro": INTRO}
    data = write_data_set(root / "data", PER_GENRE, N_EMOTION, **options)
    out = root / "out"
    run_step("step05_lstm", data, out, "--epochs", 1, "--features", *GENRE_SCORES)
    facts = read_metrics(out / "step05_lstm")
    for name, (val, test) in GENRE_SCORES.items():
        path = out / "step05_lstm" / name / "best.pt"
        torch.save(load_checkpoint(path) | {"val_score": val}, path)
        facts["runs"][name]["test"] |= {"macro_f1": test, "accuracy": test}
    (out / "step05_lstm" / "metrics.json").write_text(json.dumps(facts))
    leave_cnn(out, like=out / "step05_lstm" / "mel" / "best.pt", val_score=0.8)
    run_step(STEP8, data, out, *RECIPE)
    shutil.move(out / "step05_lstm", root / "genre")
    shutil.rmtree(out / "step07_cnn")  # so that step 9 trains the CNN
    run_step(STEP9, data, out, *RECIPE, "--axis", "all", "--compare-depths", "--freeze", 4)
    run_step(STEP10, data, out, *RECIPE)


def leave_cnn(out, like, val_score):
    """An untrained CNN where step 7 leaves its own, made for the clips of another checkpoint."""
    network, other = GENRE_NETWORKS["cnn_mel"], load_checkpoint(like)
    settings = other["settings"] | {"run": "cnn_mel", "window": window_size(network)}
    cnn = Classifier(make_backbone(network), len(settings["names"]))
    path = out / "step07_cnn" / "cnn_mel" / "best.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, cnn, settings, epoch=1, val_score=val_score, facts=other["facts"])


def spearman(first, second):
    return float(spearmanr(first, second).statistic)


def assert_truth(run, models):
    """Every model predicts every held-out clip once, and its truth is that axis's own label."""
    labels, table = labels_of(run.data, "emotion"), run.table
    expected = [labels[row.clip][EMOTIONS.index(row.target)] for row in table.itertuples()]
    assert np.allclose(table["truth"], expected, atol=1e-6)
    assert set(table["model"]) == set(models) and table["prediction"].notna().all()
    counts = table.groupby(["model", "target"])["clip"].agg(["nunique", "size"])
    assert len(counts) == 3 * len(models) and (counts == 13).all(axis=None)  # a fifth of 64
    assert set(table["seed"]) == {42} and set(table["fold"]) == {1}


def assert_follows_its_axis(run, model):
    predictions, labels = run.predictions(model)
    for i, axis in enumerate(EMOTIONS):
        assert spearman(predictions[:, i], labels[:, i]) > 0.7, (model, axis)
        for j in {0, 1, 2} - {i}:  # with another axis only what its labels have in common with it
            usual = spearman(labels[:, i], labels[:, j])
            assert abs(spearman(predictions[:, i], labels[:, j]) - usual) < 0.4, (model, axis, j)


def assert_scores(run):
    """Scores are scipy's over all held-out clips at once; a constant, which ranks nothing, is 0.

    A run of one axis is scored on it and on no other. Returns the number of such runs.
    """
    facts, n_single = run.runs, 0
    for model in set(run.table["model"]):
        predictions, labels = run.predictions(model)
        pairs = zip(predictions.T, labels.T, strict=True)
        values = [0.0 if model == "constant" else spearman(*pair) for pair in pairs]
        test, own = facts[model]["test"], dict(zip(EMOTIONS, values, strict=True))
        expected = own | {"mean_spearman": np.mean(values), "n_clips": len(labels)}
        assert {key: test[key] for key in expected} == pytest.approx(expected, abs=1e-6), model
        for axis in EMOTIONS:
            kind, _, end = model.partition("_")
            if single := facts.get("_".join(filter(None, (kind, axis, end)))):
                assert set(single["test"]) == {axis, f"{axis}_ci95", "n_clips"}
                assert single["test"][axis] == pytest.approx(own[axis], abs=1e-6)
                n_single += 1
    return n_single


def assert_submission(run):
    """Each unlabelled clip has its own values in the competition's form.

    They begin with an intro longer than a window of any network; no file holds their values.
    """
    text = (run.folder / "submission.csv").read_text()
    assert text.splitlines()[0] == "Id.fused.full.npy.gz,valence,energy,danceability"
    ids = make_ids(len(GENRES) * sum(PER_GENRE) + sum(N_EMOTION), DATA_SEED)[-N_EMOTION[1] :]
    hidden = dict(zip(ids, emotion_values(sum(N_EMOTION), DATA_SEED)[-N_EMOTION[1] :], strict=True))
    table = submission(run.folder)
    assert sorted(table.index) == sorted(hidden)
    assert ((table >= 0) & (table <= 1)).all(axis=None)
    for i, axis in enumerate(EMOTIONS):
        own = spearman(table[axis], [hidden[clip][i] for clip in table.index])
        assert own > 0.7, axis  # of 12 clips; unrelated values reach it once in 180 times
