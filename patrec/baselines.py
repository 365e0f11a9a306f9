"""Baselines that the networks are compared with."""

import numpy as np

from patrec.features import BANDS, N_MELS
from patrec.scores import spearman


def band_features(store, indices=None) -> np.ndarray:
    """Statistics of each clip's 128 mel bands over time: the input of the baselines.

    Mean, standard deviation, 10th and 90th percentile, and mean absolute change from frame to
    frame: np.ndarray [shape=(N, 640)].
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
`constant`, `ridge` and `svr` are baselines. `constant` predicts the mean label for every clip.
`ridge` is a linear regression and `svr` is support vector regression. Their input is the mean,
standard deviation, percentiles and mean change from frame to frame of each mel band over the clip,
so they know little about the order in time. They are fitted on the training and validation clips
together, so their training set is larger than that of the networks.
"""


def regression_baselines(features, targets, folds, seed) -> dict[str, list[np.ndarray]]:
    """Predictions of the baselines (see BASELINES) for held-out clips.

    The hyperparameters of `ridge` and `svr` are chosen by cross-validation on the known clips.

    features : np.ndarray [shape=(N, D)], see `band_features`
    targets : np.ndarray [shape=(N, K)]
    folds : list of (rows of the known clips, rows of the held-out clips)

    Returns {baseline: one array (held-out clips, K) per fold}.
    """
    from sklearn.linear_model import Ridge
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    inner = KFold(5, shuffle=True, random_state=seed)
    svr_grid = {"svr__C": [0.03, 0.1, 0.3, 1.0], "svr__epsilon": [0.03, 0.1]}
    grids = {"ridge": (Ridge(), {"ridge__alpha": np.logspace(1, 5, 9)}), "svr": (SVR(), svr_grid)}
    # One constant for all folds. The mean of each fold's known clips would be low if its held-out
    # labels are high, and so give a negative correlation.
    constant = targets[folds[0][0]].mean(0)
    predictions = {"constant": [np.tile(constant, (len(held_out), 1)) for _, held_out in folds]}
    for name, (model, grid) in grids.items():
        pipeline = make_pipeline(StandardScaler(), model)
        search = GridSearchCV(pipeline, grid, cv=inner, scoring=make_scorer(spearman))
        predictions[name] = []
        for known, held_out in folds:
            x, new = features[known], features[held_out]
            columns = [search.fit(x, y).predict(new) for y in targets[known].T]
            predictions[name].append(np.stack(columns, axis=1))
    return predictions
