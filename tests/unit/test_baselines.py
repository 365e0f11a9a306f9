"""What a network has to beat."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EMOTIONS, labels_of, patch_everywhere
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import common
from patrec.baselines import band_features, regression_baselines
from patrec.flags import Source


def test_band_features_are_numpys():
    rng = np.random.default_rng(0)
    lengths = torch.tensor([700, 301, 2, 1])
    frames = torch.from_numpy(rng.uniform(-80, 0, (int(lengths.sum()), 140))).half()
    starts = lengths.cumsum(0) - lengths
    store = SimpleNamespace(frames=frames, starts=starts, lengths=lengths, entries=range(4))
    features = band_features(store)
    assert features.shape == (4, 640)
    for row, start, n in zip(features, store.starts, lengths, strict=True):
        mel = frames[start : start + n, :128].double().numpy()
        change = np.abs(np.diff(mel, axis=0)).mean(0) if n > 1 else np.zeros(128)
        low, high = np.percentile(mel, 10, axis=0), np.percentile(mel, 90, axis=0)
        expected = np.concatenate([mel.mean(0), mel.std(0), low, high, change])
        np.testing.assert_allclose(row, expected, atol=1e-3)
    assert np.array_equal(band_features(store, [2, 0]), features[[2, 0]])


def test_baselines_predict_held_out_clips_from_the_known_ones():
    """A column that features tell is predicted; the constant is the first fold's mean for all."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 6))
    targets = np.stack([features[:, 0], 2 - features[:, 1]], axis=1)
    rows = np.arange(40)
    folds = [(rows[10:], rows[:10]), (np.delete(rows, rows[10:20]), rows[10:20])]
    found = regression_baselines(features, targets, folds, seed=0)
    assert set(found) == {"constant", "ridge", "svr"}
    for name, parts in found.items():
        for part, (_, held_out) in zip(parts, folds, strict=True):
            assert part.shape == (10, 2)
            if name == "constant":
                np.testing.assert_allclose(part, [targets[10:].mean(0)] * 10)
            else:
                for column, truth in zip(part.T, targets[held_out].T, strict=True):
                    assert np.corrcoef(column, truth)[0, 1] > 0.8


def test_settings_of_a_baseline_are_those_that_rank_best():
    """By the lab's metric: here the squared error would choose a weaker penalty."""
    rng = np.random.default_rng(1)
    features = rng.standard_normal((40, 6))
    targets = features[:, :1] + rng.standard_normal((40, 1))
    known, held_out = np.arange(30), np.arange(30, 40)

    def predict(alpha, rows, new):
        model = make_pipeline(StandardScaler(), Ridge(alpha=alpha))
        return model.fit(features[rows], targets[rows, 0]).predict(features[new])

    def quality(alpha):
        parts = KFold(5, shuffle=True, random_state=0).split(known)
        ranks = [spearmanr(predict(alpha, rows, new), targets[new, 0]) for rows, new in parts]
        return np.mean([rank.statistic for rank in ranks])

    best = max(np.logspace(1, 5, 9), key=quality)
    (found,) = regression_baselines(features, targets, [(known, held_out)], seed=0)["ridge"]
    np.testing.assert_allclose(found[:, 0], predict(best, known, held_out))


def test_emotion_baselines_know_all_clips_but_those_held_out(own_data, monkeypatch):
    """BASELINES says so: training and validation clips together. Each clip under its own id."""
    cuts, labels = [], labels_of(own_data, "emotion")

    def baselines(features, targets, folds, seed):
        cuts.extend(folds)
        return {"svr": [targets[held_out] for _, held_out in folds]}

    patch_everywhere(monkeypatch, "regression_baselines", baselines)
    table = common.emotion_baselines(Source(own_data), n_folds=2)["svr"]
    assert table.columns.tolist() == list(EMOTIONS) and sorted(table.index) == sorted(labels)
    for clip_id, row in table.iterrows():
        assert row.tolist() == pytest.approx(labels[clip_id])
    for known, held_out in cuts:
        assert sorted([*known, *held_out]) == list(range(len(labels)))
