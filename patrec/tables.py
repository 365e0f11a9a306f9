"""Tables: Markdown, scores with intervals, predictions.csv, submission.csv."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from patrec.errors import InputError
from patrec.files import earlier_folders, write_text
from patrec.labels import EMOTIONS, fingerprint
from patrec.scores import paired_difference


def epochs_kept(run) -> str:
    """The number of epochs of each fold, with the kept epoch in brackets."""
    facts = [member.facts for member in run.members]
    return ", ".join(f"{fact['epochs']} ({fact['best_epoch']})" for fact in facts)


class EarlierPredictions(NamedTuple):
    """What an earlier emotion step has saved for these clips.

    predictions : {model: pd.DataFrame (clip x emotion)}; empty if there are none
    runs : dict, from its metrics.json
    note : str, where the predictions are from, or why there are none
    """

    predictions: dict
    runs: dict
    note: str


def earlier_predictions(training, owner, clips, folds=None) -> EarlierPredictions:
    """Read what an earlier emotion step has predicted for the same held-out clips.

    There are no predictions if it was not run, or with other labels, another seed, other clips or
    --smoke. Raises InputError if its metrics.json or predictions.csv cannot be read.

    folds : pd.Series, optional, the fold of every clip, which must be the same
    """
    source, note = training.source, f"`{owner}` has saved no predictions for these clips."
    for folder in earlier_folders(training, owner):
        if not ((folder / "metrics.json").exists() and (folder / "predictions.csv").exists()):
            continue
        try:
            metrics = json.loads((folder / "metrics.json").read_text())
            table = pd.read_csv(folder / "predictions.csv", dtype={"clip": str})
            found = (metrics["data"]["fingerprint"]["emotion"], metrics["seed"], metrics["smoke"])
        except (ValueError, KeyError):
            fault = f"its metrics.json or predictions.csv cannot be read; run {owner} again"
            raise InputError(f"{folder}: {fault}, or delete them") from None
        wanted = (fingerprint(source.root, "emotion"), source.seed, source.smoke)
        fold_of = table.dropna(subset="fold").drop_duplicates("clip").set_index("clip")["fold"]
        others = set(table["clip"]) != set(clips)
        if found != wanted or others or (folds is not None and (fold_of[clips] != folds).any()):
            reason = "was run with other labels, held-out clips, folds, seed or --smoke"
            note = f"`{owner}` in {folder.parent.name} {reason}, so it is not compared here."
            continue
        predictions = {}
        for model, rows in table.groupby("model"):
            frame = rows.pivot(index="clip", columns="target", values="prediction").loc[clips]
            predictions[model] = frame[[name for name in EMOTIONS if name in frame]]
        return EarlierPredictions(
            predictions,
            metrics["runs"],
            f"The predictions of `{owner}` are read from {folder.parent.name}.",
        )
    return EarlierPredictions({}, {}, note)


def emotion_table(scores) -> pd.DataFrame:
    """{model: emotion_scores} -> table of Spearman's correlations with their intervals."""
    keys = (*EMOTIONS, "mean_spearman")
    keys = [key for key in keys if any(key in row for row in scores.values())]
    rows = {
        name: {key: with_interval(row, key) if key in row else "" for key in keys}
        for name, row in scores.items()
    }
    frame = pd.DataFrame(rows).T.rename_axis("model")
    return frame.rename(columns={"mean_spearman": "mean of the three"})


def difference_line(first, second, difference) -> str:
    """One line: what `paired_difference` measured between two named models, and what it shows."""
    titles = {"accuracy": "accuracy", "macro_f1": "macro-F1", "spearman": "Spearman"}
    values, places = [], {}
    for key in [key for key in titles if key in difference]:
        low, high = difference[f"{key}_ci95"]
        values.append(f"{titles[key]} {difference[key]:+.3f} [{low:+.3f}, {high:+.3f}]")
        place = "lies above 0" if low > 0 else "lies below 0" if high < 0 else "contains 0"
        places[f"the {titles[key]} interval"] = place
    if len(set(places.values())) > 1:
        shown = ", ".join(f"{interval} {place}" for interval, place in places.items())
    else:
        shown = f"{'each' if len(places) > 1 else 'the'} interval {place}"
        shown += ": no difference is shown on these clips" if place == "contains 0" else ""
    measured = f"{', '.join(values)} on {difference['n_clips']} clips"
    return f"`{first}` minus `{second}`: {measured}; {shown}"


def with_interval(scores, key) -> str:
    """A score and its 95% interval, as text for a table."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(scores[key], *scores[f"{key}_ci95"])


def prediction_rows(model, true, predictions, *, test_set, seed, fold="") -> pd.DataFrame:
    """A table of predictions as rows of predictions.csv: one per clip and target.

    For genre the target is 'genre', and truth and prediction are class names. For emotion the
    targets are the emotions.

    fold : '' or pd.Series, the fold of each clip (`Result.folds`)
    """
    true = true.loc[predictions.index]
    fold = fold.loc[predictions.index] if isinstance(fold, pd.Series) else fold
    if isinstance(true, pd.Series):
        columns = {"genre": (true, predictions.columns[predictions.to_numpy().argmax(1)])}
    else:
        columns = {name: (true[name], predictions[name].to_numpy()) for name in predictions.columns}
    head = {"clip": predictions.index, "model": model, "test_set": test_set}
    parts = []
    for name, (t, p) in columns.items():
        part = pd.DataFrame(head | {"target": name, "fold": fold, "seed": seed})
        parts.append(part.assign(truth=t.to_numpy(), prediction=p))
    return pd.concat(parts)


def held_out_rows(true, predictions, seed, folds) -> list[pd.DataFrame]:
    """`prediction_rows` of held-out emotion clips: {model: predictions} -> one frame per model."""
    where = {"test_set": "multitask_dataset held out", "seed": seed, "fold": folds}
    return [prediction_rows(name, true, table, **where) for name, table in predictions.items()]


def write_predictions(folder, rows) -> None:
    """Write predictions.csv from a list of `prediction_rows`."""
    write_text(folder / "predictions.csv", pd.concat(rows).to_csv(index=False))


def write_submission(path, predictions) -> None:
    """Write predictions for unlabelled clips (clip x emotion) in the competition's format."""
    frame = predictions[list(EMOTIONS)].clip(0, 1).rename_axis("Id.fused.full.npy.gz")
    write_text(path, frame.to_csv(float_format="%.6f"))


def markdown_table(frame) -> str:
    """A pandas table as Markdown; floats with three decimals."""

    def cell(value):
        if isinstance(value, float | np.floating):
            return "" if math.isnan(value) else f"{value:.3f}"
        return str(value).replace("|", "\\|")

    header = [cell(name) for name in (frame.index.name or "", *frame.columns)]
    pairs = zip(frame.index, frame.itertuples(index=False), strict=True)
    rows = [[cell(str(index)), *map(cell, row)] for index, row in pairs]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def genre_table(scores) -> pd.DataFrame:
    """{model: genre_scores} -> table of accuracy and macro-F1 with their intervals."""
    rows = {
        name: [row["n_clips"], with_interval(row, "accuracy"), with_interval(row, "macro_f1")]
        for name, row in scores.items()
    }
    columns = ["test clips", "test accuracy", "test macro-F1"]
    return pd.DataFrame(rows, columns).T.rename_axis("model")


def training_table(runs, score="Spearman") -> pd.DataFrame:
    """{run: Result} -> table of what each was trained on, for how long, and its best score.

    score : str, what the column of the validation score is called
    """
    rows = {}
    for name, run in runs.items():
        facts = run.facts
        rows[name] = {
            "training clips": facts["n_train"],
            "trained weights": facts["trained_weights"],
            "examples": facts["epochs"] * facts["examples_per_epoch"],
            "epochs (kept)": epochs_kept(run),
            "seconds": round(facts["train_seconds"]),
            f"validation {score}": next(iter(facts["val"].values())),
        }
    return pd.DataFrame(rows).T.rename_axis("run")


def difference_lines(true, predictions, pairs) -> str:
    """{model: predictions}, compared pair by pair on the same clips: a `difference_line` each."""
    lines = []
    for pair in pairs:
        difference = paired_difference(true, *(predictions[name] for name in pair))
        lines.append(f"- {difference_line(*pair, difference)}")
    return "\n".join(lines)
