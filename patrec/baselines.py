"""Baselines: what a network has to beat."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import KFold

from patrec.features import BANDS, N_MELS
from patrec.scores import spearman


def band_features(store, indices=None) -> np.ndarray:
    """Describe each clip by statistics of its bands over time: the input of the SVM baselines.

    Mean, standard deviation, 10th and 90th percentile and mean absolute difference from
    frame to frame, of each of the 128 mel bands.

    Returns
    -------
    np.ndarray [shape=(N, 640)]
    """
    rows = []
    for index in range(len(store.entries)) if indices is None else indices:
        start, length = int(store.starts[index]), int(store.lengths[index])
        mel = store.frames[start : start + length, BANDS["mel"]].float().cpu().numpy()  # (T, 128)
        change = np.abs(np.diff(mel, axis=0)).mean(0) if length > 1 else np.zeros(N_MELS)
        low, high = np.percentile(mel, [10, 90], axis=0)
        rows.append(np.concatenate([mel.mean(0), mel.std(0), low, high, change]))
    return np.array(rows)


BASELINES = """
`constant`, `ridge` and `svr` are what a network has to beat. `constant` is the mean training label
(of several folds the first one's, for all). `ridge`, a linear regression, and `svr`, support vector
regression, get the mean, spread, percentiles and mean change from frame to frame of each mel band
over the clip: nothing of the order in time but that change. They are fitted on training and
validation clips together, of which the networks use the latter only to choose the epoch: they have
the larger training set.
"""


def regression_baselines(features, targets, folds, seed) -> dict[str, list[np.ndarray]]:
    """Predictions for held-out clips by the methods that BASELINES describes.

    The parameters of `ridge` and `svr` are chosen by cross-validation within the known clips.

    Parameters
    ----------
    features : np.ndarray [shape=(N, D)], see `band_features`
    targets : np.ndarray [shape=(N, K)]
    folds : list of (rows of the known clips, rows of the held-out clips)

    Returns
    -------
    {baseline: one array (held-out clips, K) per fold}
    """
    from sklearn.linear_model import Ridge
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    inner = KFold(5, shuffle=True, random_state=seed)
    svr_grid = {"model__C": [0.03, 0.1, 0.3, 1.0], "model__epsilon": [0.03, 0.1]}
    grids = {"ridge": (Ridge(), {"model__alpha": np.logspace(1, 5, 9)}), "svr": (SVR(), svr_grid)}
    # One constant for all folds: the mean of a fold's known clips is low where its held-out
    # labels are high, which would rank backwards.
    constant = targets[folds[0][0]].mean(0)
    predictions = {"constant": [], "ridge": [], "svr": []}
    for known, held_out in folds:
        predictions["constant"].append(np.tile(constant, (len(held_out), 1)))
        for name, (model, grid) in grids.items():
            pipeline = Pipeline([("scale", StandardScaler()), ("model", model)])
            search = GridSearchCV(pipeline, grid, cv=inner, scoring=make_scorer(spearman))
            columns = [
                search.fit(features[known], y).predict(features[held_out]) for y in targets[known].T
            ]
            predictions[name].append(np.stack(columns, axis=1))
    return predictions
