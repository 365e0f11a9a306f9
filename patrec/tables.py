"""Tables: Markdown, scores with intervals, predictions.csv, submission.csv."""

import json
import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from patrec.errors import InputError
from patrec.files import earlier_folders, write_text
from patrec.labels import EMOTIONS, fingerprint
from patrec.recipes import PARTS
from patrec.scores import paired_difference


def epochs_kept(run) -> str:
    """The number of epochs of each fold, with the kept epoch in brackets."""
    return ", ".join("{epochs} ({best_epoch})".format(**member.facts) for member in run.members)


# Below tables of trainings, and above paired differences.
SECONDS = (
    "The trainings. Wall-clock seconds can only be compared roughly, because trainings may run at "
    "the same time"
)
INTERVALS = (
    "The intervals show how much a difference depends on the choice of the clips. They do not show "
    "how much it depends on the seed of the training. Even if two models are equally good, about "
    "one in twenty such intervals does not contain 0, just by chance."
)


def parts_table(kind) -> tuple[pd.DataFrame, str]:
    """The parts of a training and what each is worth to an 'lstm' or a 'cnn', with a caption."""
    rows = {part: (what, *effects[kind]) for part, (what, effects) in PARTS.items()}
    columns = ["what is done, and why", "log loss without it", "macro-F1 without it"]
    caption = (
        f"Parts of the training. Last columns: the change of the {kind.upper()}'s scores on mel if "
        "the part is left out, in cross-validation on the small data set of docs/experiments.md. "
        "If the log loss rises (+) or macro-F1 falls (-), the network is worse without the part. "
        "Only changes clearly larger than the standard error (after ±) count"
    )
    return pd.DataFrame(rows, columns).T.rename_axis("part"), caption


class EarlierPredictions(NamedTuple):
    """What an earlier emotion step has saved for these clips."""

    predictions: dict  # {model: pd.DataFrame (clip x emotion)}; empty if there are none
    runs: dict  # from its metrics.json
    note: str  # where the predictions are from, or why there are none


def earlier_predictions(training, owner, clips, folds=None) -> EarlierPredictions:
    """Read what an earlier emotion step has predicted for the same held-out clips, if anything.

    folds : pd.Series, optional, the fold of every clip, which must be the same
    """
    source, note = training.source, f"`{owner}` has saved no predictions for these clips."
    for folder in earlier_folders(training, owner):
        try:
            metrics = json.loads((folder / "metrics.json").read_text())
            table = pd.read_csv(folder / "predictions.csv", dtype={"clip": str})
            found = (metrics["data"]["fingerprint"]["emotion"], metrics["seed"], metrics["smoke"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError):
            fault = f"its metrics.json or predictions.csv cannot be read; run {owner} again"
            raise InputError(f"{folder}: {fault}, or delete them") from None
        wanted = (fingerprint(source.root, "emotion"), source.seed, source.smoke)
        fold_of = table.dropna(subset="fold").drop_duplicates("clip").set_index("clip")["fold"]
        others = set(table["clip"]) != set(clips)
        if found != wanted or others or (folds is not None and (fold_of[clips] != folds).any()):
            reason = "was run with other labels, held-out clips, folds, seed or --smoke"
            note = f"`{folder.parent.name}/{owner}` {reason}, so it is not compared here."
            continue
        predictions = {}
        for model, rows in table.groupby("model"):
            frame = rows.pivot(index="clip", columns="target", values="prediction").loc[clips]
            predictions[model] = frame[[name for name in EMOTIONS if name in frame]]
        note = f"The predictions of `{owner}` are read from `{folder.parent.name}/{owner}`."
        return EarlierPredictions(predictions, metrics["runs"], note)
    return EarlierPredictions({}, {}, note)


def emotion_table(scores) -> pd.DataFrame:
    """{model: emotion_scores} -> table of Spearman's correlations with their intervals."""
    keys, rows = (*EMOTIONS, "mean_spearman"), {}
    for name, row in scores.items():
        rows[name] = {key: with_interval(row, key) for key in keys if key in row}
    frame = pd.DataFrame(rows, keys).dropna(how="all").fillna("none").T.rename_axis("model")
    return frame.rename(columns={"mean_spearman": "mean of the three"})


def difference_line(first, second, difference) -> str:
    """One line about the `paired_difference` of two named models and what it shows."""
    titles, values = {"accuracy": "accuracy", "macro_f1": "macro-F1", "spearman": "Spearman"}, []
    for key in [key for key in titles if key in difference]:
        low, high = difference[f"{key}_ci95"]
        better = first if low > 0 else second if high < 0 else None
        unclear = "no difference is shown: the interval contains 0"
        shown = f"`{better}` is better" if better else unclear
        found = f"{difference[key]:+z.3f} [{low:+z.3f}, {high:+z.3f}]"  # z: no "-0.000"
        values.append(f"{titles[key]} {found} ({shown})")
    return f"`{first}` minus `{second}`, {difference['n_clips']} clips: {', '.join(values)}"


def with_interval(scores, key) -> str:
    """A score and its 95% interval, as text for a table."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(scores[key], *scores[f"{key}_ci95"])


def prediction_rows(model, true, predictions, *, test_set, seed, fold="") -> pd.DataFrame:
    """A table of predictions as rows of predictions.csv, one per clip and target.

    The targets are the emotions or 'genre', whose truth and prediction are class names.

    fold : '' or pd.Series, the fold of each clip (`Result.folds`)
    """
    true = true.loc[predictions.index]
    fold = fold.loc[predictions.index] if isinstance(fold, pd.Series) else fold
    if isinstance(true, pd.Series):
        true, predictions = true.to_frame("genre"), predictions.idxmax(axis=1).to_frame("genre")
    head = {"clip": predictions.index, "model": model, "test_set": test_set}
    parts = []
    for name in predictions.columns:
        values = {"truth": true[name], "prediction": predictions[name]}
        parts.append(pd.DataFrame(head | {"target": name, "fold": fold, "seed": seed} | values))
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
            return "" if math.isnan(value) else f"{value:z.3f}"
        if isinstance(value, int | np.integer) and not isinstance(value, bool):
            return f"{value:,}"
        return str(value).replace("|", "\\|")

    frame = frame.rename(index=str).reset_index(names=frame.index.name or "").map(cell)
    lines = [map(cell, frame.columns), ["---"] * len(frame.columns), *frame.to_numpy()]
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
    """{run: Result} -> table of the training clips, the time and the best score of each.

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
