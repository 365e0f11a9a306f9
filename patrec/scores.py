"""Scores on a test set, with 95% intervals."""

import functools

import numpy as np
import pandas as pd

from patrec.labels import EMOTIONS


def average_predictions(frames) -> pd.DataFrame:
    """Mean of several tables of predictions, for the clips that are in all of them."""
    frames = list(frames)
    return (sum(frames[1:], frames[0]) / len(frames)).dropna()  # pandas adds by clip id


def bootstrap(score, n_clips, seed=0, n_resamples=1000) -> list[float]:
    """95% interval of a score by resampling clips (Efron & Tibshirani, 1993, ch. 13).

    It shows how much the score depends on the choice of test clips. It does not show how much
    it depends on the seed of the training. `score` turns an index array (n_clips,) into a float.
    """
    rng = np.random.default_rng(seed)
    values = [score(rng.integers(0, n_clips, n_clips)) for _ in range(n_resamples)]
    return np.nanpercentile(values, [2.5, 97.5]).tolist()


def macro_f1(targets, predictions, n_classes) -> float:
    """Mean F1 of int arrays (N,), as scikit-learn's f1_score with zero_division=0, but faster."""
    counts = np.bincount(targets * n_classes + predictions, minlength=n_classes**2)
    counts = counts.reshape(n_classes, n_classes)
    seen = counts.sum(0) + counts.sum(1)  # per class: 2 TP + FP + FN
    return float((2 * counts.diagonal() / np.maximum(seen, 1)).mean())


def classification_scores(targets, predictions, classes) -> dict:
    """The scores of step 6, with intervals for accuracy and macro-F1.

    targets, predictions : array-like of int [shape=(N,)]
    classes : list of str, class names, whose order gives the class numbers

    Returns a dict of accuracy, macro_* and micro_* (precision, recall, f1), per_class, confusion
    (rows: true class), n_clips; accuracy_ci95 and macro_f1_ci95.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    targets, predictions = np.asarray(targets), np.asarray(predictions)
    labels, n_clips, right = np.arange(len(classes)), len(targets), targets == predictions
    report = functools.partial(
        precision_recall_fscore_support, targets, predictions, labels=labels, zero_division=0
    )
    scores = {"accuracy": float(right.mean()), "n_clips": n_clips}
    metrics = ("precision", "recall", "f1")
    for average in ("macro", "micro"):
        values = map(float, report(average=average)[:3])
        scores |= {f"{average}_{name}": value for name, value in zip(metrics, values, strict=True)}
    columns = zip((*metrics, "support"), report(average=None), strict=True)
    scores["per_class"] = pd.DataFrame(dict(columns), classes).to_dict("index")
    scores["confusion"] = confusion_matrix(targets, predictions, labels=labels).tolist()
    scores["accuracy_ci95"] = bootstrap(lambda i: right[i].mean(), n_clips)
    f1 = functools.partial(macro_f1, n_classes=len(classes))
    scores["macro_f1_ci95"] = bootstrap(lambda i: f1(targets[i], predictions[i]), n_clips)
    return scores


def class_numbers(names, classes) -> np.ndarray:
    """Class names -> their positions in `classes`."""
    return pd.Categorical(names, categories=classes).codes.astype(int)


def genre_scores(true, predictions) -> dict:
    """`classification_scores` of true class names and a table of predictions (clip x class)."""
    classes = list(predictions.columns)
    targets = class_numbers(true.reindex(predictions.index), classes)
    return classification_scores(targets, predictions.to_numpy().argmax(1), classes)


def spearman(targets, predictions) -> float:
    """Spearman's rank correlation; 0 if all values are equal, because they give no ranking."""
    from scipy.stats import spearmanr

    targets, predictions = np.asarray(targets), np.asarray(predictions)
    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(spearmanr(targets, predictions).statistic)


def resampled_spearman(targets, predictions, n_resamples=500, seed=0) -> np.ndarray:
    """Spearman's correlation (n_resamples,) of float arrays (N,) on bootstrap resamples.

    The same seed draws the same clips, so the results of two models can be subtracted.
    """
    from scipy.stats import rankdata

    n_clips = len(targets)
    rows = np.random.default_rng(seed).integers(0, n_clips, (n_resamples, n_clips))
    ranks = (rankdata(values[rows], axis=1) for values in (targets, predictions))
    a, b = (one - (n_clips + 1) / 2 for one in ranks)
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.where(norm > 0, norm, 1)  # 0 for a constant


def emotion_scores(true, predictions) -> dict:
    """Spearman per emotion and, if there are all three, their mean (step 8e), with intervals.

    true, predictions : pd.DataFrame (clip x emotion); `predictions` may have fewer columns
    """
    true = true.loc[predictions.index]
    scores, resampled = {"n_clips": len(predictions)}, []
    for name in predictions.columns:
        pair = true[name].to_numpy(), predictions[name].to_numpy()
        scores[name] = spearman(*pair)
        resampled.append(resampled_spearman(*pair))
        scores[f"{name}_ci95"] = np.percentile(resampled[-1], [2.5, 97.5]).tolist()
    if set(predictions.columns) == set(EMOTIONS):
        scores["mean_spearman"] = float(np.mean([scores[name] for name in EMOTIONS]))
        mean = np.mean(resampled, axis=0)
        scores["mean_spearman_ci95"] = np.percentile(mean, [2.5, 97.5]).tolist()
    return scores


def combine_emotions(parts, scores) -> dict:
    """One record of three single-emotion models: {emotion: facts} -> facts."""
    val = {name: part["val"][name] for name, part in parts.items()}
    val["mean_spearman"] = float(np.mean(list(val.values())))
    keys = ("epochs", "train_seconds", "weights")
    totals = {key: sum(part[key] for part in parts.values()) for key in keys}
    return totals | {"val": val, "test": scores}


def paired_difference(true, first, second) -> dict:
    """Scores of one model minus those of another on the same clips, with 95% intervals.

    Both are scored on the same resamples of the clips. Clips that are hard for both models do
    not widen the interval, so it says more than the two intervals of the scores.

    true : pd.Series of class names, or pd.DataFrame of emotion values
    first, second : pd.DataFrame, see `predict_clips`; what both have is compared

    Returns a dict of n_clips and, positive if `first` is better and each with `_ci95`, for genre
    accuracy and macro_f1, for emotion spearman (the mean over the common emotions). For genre
    also only_first, only_second: how many clips only one of the two predicts correctly.
    """
    ids = first.index.intersection(second.index)
    result = {"n_clips": len(ids)}
    if isinstance(true, pd.DataFrame):
        tables = (true, first, second)
        names = [name for name in first.columns if name in second.columns]
        triples = [[table.loc[ids, name].to_numpy() for table in tables] for name in names]
        gains = [spearman(t, a) - spearman(t, b) for t, a, b in triples]
        resampled = [resampled_spearman(t, a) - resampled_spearman(t, b) for t, a, b in triples]
        interval = np.percentile(np.mean(resampled, axis=0), [2.5, 97.5]).tolist()
        return result | {"spearman": float(np.mean(gains)), "spearman_ci95": interval}
    classes = list(first.columns)
    t = class_numbers(true.loc[ids], classes)
    a, b = (table.loc[ids, classes].to_numpy().argmax(1) for table in (first, second))
    f1 = functools.partial(macro_f1, n_classes=len(classes))
    differences = {
        "accuracy": lambda i: (a[i] == t[i]).mean() - (b[i] == t[i]).mean(),
        "macro_f1": lambda i: f1(t[i], a[i]) - f1(t[i], b[i]),
    }
    for name, difference in differences.items():
        result[name] = float(difference(np.arange(len(ids))))
        result[f"{name}_ci95"] = bootstrap(difference, len(ids))
    only_first, only_second = int(((a == t) & (b != t)).sum()), int(((b == t) & (a != t)).sum())
    return result | {"only_first": only_first, "only_second": only_second}
