"""Runs of steps 5, 6, 7 and 11, and the means to judge them from the outside.

`learned`: steps 5, 6 and 7 on a data set that can be learned. `spoiled`: steps 6 and 11 with the
same networks, before a test split of other arrays and labels.
"""

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    CLASSES,
    MERGED,
    genre_predictions,
    hard_data_set,
    labels_of,
    run_forked,
    write_labels,
)
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from step_runs import copy_data, once, replace_file

from common import load_checkpoint, load_model, predict

LSTMS = ["mel", "beat_mel", "chroma", "beat_chroma", "fused", "beat_fused"]
CNNS = ["cnn_mel", "cnn_mel_seed43", "cnn_mel_seed44"]
FULL, BEAT = "fma_genre_spectrograms", "fma_genre_spectrograms_beat"
ROWS = {"mel": slice(0, 128), "chroma": slice(128, 140), "fused": slice(0, 140)}
# The validation scores that checkpoints are given, in an order that no test score has: what is
# chosen among the LSTMs must go by them.
VAL_SCORES = dict(zip(LSTMS, (0.4, 0.5, 0.9, 0.3, 0.7, 0.6), strict=True))
RIVAL = "fused"  # of the CNN, in `learned`


class GenreRun(NamedTuple):
    data: Path
    out: Path
    donors: dict | None = None  # {test set: {clip: the clip whose array it has now}}

    def predictions(self, name):
        """The rows of predictions.csv for a network, in the step that trains it."""
        return genre_predictions(folder_of(self.out, name).parent).query("model == @name")


class GenreRuns:
    """The runs, each made when it is first asked for."""

    def __init__(self, factory):
        self.factory = factory

    @functools.cached_property
    def learned(self):
        """All LSTMs validate equally well; for step 7 alone they seem not to."""

        def make(root):
            data = hard_data_set(root / "data", n_frames=(270, 320))
            where = ("--data-dir", data, "--out-dir", root / "out")
            run_forked("step05_lstm.py", "--epochs", 30, "--lr", 0.002, *where)
            run_forked("step06_eval.py", *where)
            paths = {name: folder_of(root / "out", name) / "best.pt" for name in LSTMS}
            found = {name: load_checkpoint(path)["val_score"] for name, path in paths.items()}
            set_val_scores(root / "out", VAL_SCORES | {RIVAL: 0.95})
            # --smoke saves time on digits; a subset larger than the set is all clips.
            flags = ("--ensemble", "--epochs", 6, "--smoke", "--subset", 1000)
            keep = functools.partial(keep_averages, root / "out")
            run_forked("step07_cnn.py", *flags, *where, prepare=keep)
            set_val_scores(root / "out", found)

        root = once(self.factory, "genre_learned", make)
        return GenreRun(root / "data", root / "out")

    @functools.cached_property
    def spoiled(self):
        """The networks' validation scores are those of VAL_SCORES."""
        learned = self.learned

        def make(root):
            data, out = copy_data(learned.data, root / "data"), root / "out"
            (root / "donors.json").write_text(json.dumps(spoil_test_split(data)))
            for step in ("step05_lstm", "step07_cnn"):
                shutil.copytree(learned.out / step, out / step)
            set_val_scores(out, VAL_SCORES)
            run_forked("step06_eval.py", "--data-dir", data, "--out-dir", out)
            run_forked("step11_latent.py", "--smoke", "--data-dir", data, "--out-dir", out)

        root = once(self.factory, "genre_spoiled", make)
        donors = json.loads((root / "donors.json").read_text())
        return GenreRun(root / "data", root / "out", donors)


def keep_averages(out):
    """Let a step write each average of predictions that it takes: average_0.csv, ..."""
    from patrec import scores  # the step's, see run_forked

    average, places = scores.average_predictions, itertools.count()

    def average_and_keep(frames):
        table = average(frames)
        table.to_csv(out / f"average_{next(places)}.csv")
        return table

    scores.average_predictions = average_and_keep


def is_beat(model):
    return model.startswith("beat_")


def set_of(model):
    return BEAT if is_beat(model) else FULL


def folder_of(out, name):
    return out / ("step07_cnn" if name.startswith("cnn") else "step05_lstm") / name


def array_path(data_dir, clip, split, beat):
    return data_dir / (BEAT if beat else FULL) / split / f"{clip}.fused.full.npy"


def read_clip(data_dir, clip, split, beat):
    """(T, 140) as the networks get it: float16, read back as float32."""
    return np.load(array_path(data_dir, clip, split, beat)).T.astype(np.float16).astype(np.float32)


def set_val_scores(out, scores):
    for name, score in scores.items():
        path = out / "step05_lstm" / name / "best.pt"
        torch.save(load_checkpoint(path) | {"val_score": score}, path)


def spoil_test_split(data_dir):
    """Give half of the test clips other clips' arrays, and all of them other labels.

    Frames and beats are spoiled each in its own way. What was the commonest class is no longer
    so. Returns the donors, see GenreRun.
    """
    clips = sorted(labels_of(data_dir, split="test"))
    rng = np.random.default_rng(2)
    genres = {clip: "Jazz" if rng.random() < 0.5 else rng.choice(sorted(MERGED)) for clip in clips}
    donors = {}
    for seed, test_set in enumerate((FULL, BEAT)):
        rng = np.random.default_rng(seed)
        spoiled = rng.permutation(clips)[: len(clips) // 2]
        others = {str(clip): str(rng.choice(clips)) for clip in spoiled}
        donors[test_set] = {clip: clip for clip in clips} | others
        paths = {clip: array_path(data_dir, clip, "test", test_set == BEAT) for clip in clips}
        arrays = {clip: np.load(path) for clip, path in paths.items()}
        for clip, donor in others.items():
            replace_file(paths[clip], arrays[donor])
        path = data_dir / test_set / "test_labels.txt"
        header, *lines = path.read_text().splitlines()
        path.unlink()  # a hard link, see copy_data
        pairs = [line.split("\t") for line in lines]
        rows = [f"{name}\t{genres.get(name.split('.')[0], genre)}" for name, genre in pairs]
        write_labels(path, header, rows, seed)
    return donors


def log_probabilities(run, name, clips):
    """(N, K) predictions of the network in best.pt to arrays read and prepared here."""
    return ask_network(run.data, folder_of(run.out, name) / "best.pt", tuple(clips), is_beat(name))


@functools.cache  # several tests ask the same
def ask_network(data_dir, path, clips, beat):
    model, checkpoint = load_model(path)
    settings = checkpoint["settings"]
    mean, std = settings["stats"]
    rows = ROWS[settings["features"]]
    arrays = [torch.tensor(read_clip(data_dir, clip, "test", beat)[:, rows]) for clip in clips]
    x = torch.nn.utils.rnn.pad_sequence([(a - mean) / std for a in arrays], batch_first=True)
    batch = x, torch.zeros(len(x)), torch.tensor([len(array) for array in arrays])
    logits = predict(model, [batch], window=settings["window"])[0].numpy()
    return log_softmax(logits, axis=1)


def classes_of(log_probabilities):
    return np.array(CLASSES)[log_probabilities.argmax(1)]


def assert_predictions(table, truth):
    """Every test clip is predicted once by each model on each test set, and has its own truth."""
    assert len(table)
    for (model, _), rows in table.groupby(["model", "test_set"]):
        assert sorted(rows["clip"]) == sorted(truth), model
        assert dict(zip(rows["clip"], rows["truth"], strict=True)) == truth, model
        assert set(rows["prediction"]) <= set(CLASSES)


def assert_learned(rows, name):
    """Of `learned`; always the commonest class would have an accuracy of 0.24."""
    accuracy = (rows["truth"] == rows["prediction"]).mean()
    assert accuracy > (0.45 if name == "mel" else 0.65), (name, accuracy)


def assert_own_predictions(run, name):
    """A prediction is the network's own to the array of that clip."""
    rows = run.predictions(name)
    expected = classes_of(log_probabilities(run, name, rows["clip"]))
    # One near tie may fall otherwise: in another batch a clip is padded, and so summed up,
    # otherwise.
    assert (rows["prediction"].to_numpy() != expected).sum() <= 1, name
    assert len(set(expected)) > 5, "the test cannot tell"


def assert_scores(scores, rows):
    """Every score of metrics.json against scikit-learn's, from the rows of predictions.csv."""
    truth, prediction = rows["truth"], rows["prediction"]
    assert scores["n_clips"] == len(rows)
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, prediction))
    options = {"labels": CLASSES, "zero_division": 0}
    for average in ("macro", "micro"):
        values = precision_recall_fscore_support(truth, prediction, average=average, **options)
        for metric, value in zip(("precision", "recall", "f1"), values, strict=False):
            assert scores[f"{average}_{metric}"] == pytest.approx(value), (average, metric)
    table = precision_recall_fscore_support(truth, prediction, **options)
    expected = pd.DataFrame(np.transpose(table), CLASSES, ["precision", "recall", "f1", "support"])
    found = pd.DataFrame(scores["per_class"]).T
    pd.testing.assert_frame_equal(found.loc[CLASSES, expected.columns].astype(float), expected)
    # Rows: the true class.
    assert scores["confusion"] == confusion_matrix(truth, prediction, labels=CLASSES).tolist()
