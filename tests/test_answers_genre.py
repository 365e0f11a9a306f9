"""Steps 5, 6, 7 and 11 judged by the files they leave.

Is every answer the right clip's, and every score true? There are three data sets:
`data_dir`, which can be learned; the same with its test split spoiled and the trained
networks as they are; and a short one whose labels are drawn by lot, where nothing can be
learned, as it is, with a spoiled test split and with spoiled validation clips.
"""

import functools
import os
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    CLASSES,
    COUNTS,
    DROPPED,
    GENRES,
    MERGED,
    genre_predictions,
    hard_data_set,
    labels_of,
    read_metrics,
    read_table,
    run_forked,
    write_labels,
)
from scipy.special import log_softmax
from scipy.stats import binom
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from common import clip_ids, load_checkpoint, load_data, load_model, predict
from patrec.batches import Augment
from patrec.explain import calibration_error, fit_temperature
from patrec.flags import Source
from patrec.scores import classification_scores
from patrec.tables import with_interval

LSTMS = ["mel", "beat_mel", "chroma", "beat_chroma", "fused", "beat_fused"]
CNNS = ["cnn_mel", "cnn_mel_seed43", "cnn_mel_seed44"]
FULL, BEAT = "fma_genre_spectrograms", "fma_genre_spectrograms_beat"
ROWS = {"mel": slice(0, 128), "chroma": slice(128, 140), "fused": slice(0, 140)}
# --smoke saves time on digits; the subset is larger than the set: all clips are trained on.
QUICK = ("--smoke", "--subset", 1000)


# ---- the data sets and the runs -----------------------------------------------------------


def is_beat(model):
    return model.startswith("beat_")


def set_of(model):
    return BEAT if is_beat(model) else FULL


def copy_data(data_dir, root):
    """A copy that shares its arrays with the original: replace files, never write into them."""
    return shutil.copytree(data_dir, root, copy_function=os.link, dirs_exist_ok=True)


def array_path(data_dir, clip, split, beat):
    return data_dir / (BEAT if beat else FULL) / split / f"{clip}.fused.full.npy"


def read_clip(data_dir, clip, split, beat):
    """(T, 140) as the networks get it: float16, read back as float32."""
    return np.load(array_path(data_dir, clip, split, beat)).T.astype(np.float16).astype(np.float32)


def put(path, array):
    path.unlink()
    np.save(path, array)


def rewrite_labels(data_dir, split, change):
    """Give every clip of a split the genre change(clip, genre), in both label files."""
    for seed, folder in enumerate((FULL, BEAT)):
        path = data_dir / folder / f"{split}_labels.txt"
        header, *lines = path.read_text().splitlines()
        path.unlink()
        pairs = [line.split("\t") for line in lines]
        rows = [f"{name}\t{change(name.split('.')[0], genre)}" for name, genre in pairs]
        write_labels(path, header, rows, seed)


def draw_labels(data_dir):
    """Deal the genres of both splits out to their clips anew; those dropped stay dropped."""
    for seed, split in enumerate(("train", "test")):
        path = data_dir / FULL / f"{split}_labels.txt"
        lines = path.read_text().splitlines()[1:]
        genre = dict(sorted((line.split(".")[0], line.split("\t")[1]) for line in lines))
        clips = [clip for clip in genre if genre[clip] in MERGED]
        dealt = np.random.default_rng(seed).permutation([genre[clip] for clip in clips])
        genre |= dict(zip(clips, dealt, strict=True))
        rewrite_labels(data_dir, split, lambda clip, _, genre=genre: genre[clip])


def spoil_test_split(data_dir):
    """Give test clips other clips' arrays, and other labels.

    Half of the arrays stay. Frames and beats are spoiled each in its own way. What was the
    commonest class is no longer so.

    Returns
    -------
    dict
        {test set: {clip: the clip whose array it has now}}
    """
    clips = sorted(labels_of(data_dir, split="test"))
    donors = {}
    for seed, test_set in enumerate((FULL, BEAT)):
        rng = np.random.default_rng(seed)
        spoiled = rng.permutation(clips)[: len(clips) // 2]
        others = {clip: str(rng.choice(clips)) for clip in spoiled}
        donors[test_set] = {clip: clip for clip in clips} | others
        paths = {clip: array_path(data_dir, clip, "test", test_set == BEAT) for clip in clips}
        arrays = {clip: np.load(path) for clip, path in paths.items()}
        for clip in spoiled:
            put(paths[clip], arrays[others[clip]])
    rng = np.random.default_rng(2)
    genre = {clip: "Jazz" if rng.random() < 0.5 else rng.choice(sorted(MERGED)) for clip in clips}
    rewrite_labels(data_dir, "test", lambda clip, old: genre.get(clip, old))
    return donors


# The validation scores that checkpoints are given, in an order that no test score has: what is
# chosen among the LSTMs must go by them.
VAL_SCORES = {
    "mel": 0.4, "beat_mel": 0.5, "chroma": 0.3, "beat_chroma": 0.7, "fused": 0.9, "beat_fused": 0.6
}  # fmt: skip
RIVAL = "beat_mel"  # of the CNN, in `learned`


def set_val_scores(out, scores):
    for name, score in scores.items():
        path = out / "step05_lstm" / name / "best.pt"
        torch.save(load_checkpoint(path) | {"val_score": score}, path)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They are looked at in other tests; the forked runs inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt.Figure, "savefig", lambda figure, file, **options: None)
        yield


@pytest.fixture(scope="module")
def learned(data_dir, tmp_path_factory):
    """Output folder of steps 5, 6 and 7 on the set that can be learned.

    All LSTMs validate equally well on it; for step 7 alone they seem not to.
    """
    out = tmp_path_factory.mktemp("learned")
    where = ("--data-dir", data_dir, "--out-dir", out)
    run_forked("step05_lstm.py", "--epochs", 10, *where)
    run_forked("step06_eval.py", "--ensemble", *where)
    found = {name: load_checkpoint(folder_of(out, name) / "best.pt")["val_score"] for name in LSTMS}
    set_val_scores(out, VAL_SCORES | {RIVAL: 0.95})
    run_forked("step07_cnn.py", "--ensemble", "--epochs", 6, *QUICK, *where)
    set_val_scores(out, found)
    return out


@pytest.fixture(scope="module")
def spoiled(data_dir, learned, tmp_path_factory):
    """(data set with a spoiled test split, donors, output folder of steps 6 and 11).

    The networks are the same; the LSTMs' validation scores are set to VAL_SCORES.
    """
    data = copy_data(data_dir, tmp_path_factory.mktemp("spoiled_data"))
    donors = spoil_test_split(data)
    out = tmp_path_factory.mktemp("spoiled")
    for step in ("step05_lstm", "step07_cnn"):
        shutil.copytree(learned / step, out / step)
    set_val_scores(out, VAL_SCORES)
    run_forked("step06_eval.py", "--data-dir", data, "--out-dir", out)
    run_forked("step11_latent.py", "--smoke", "--data-dir", data, "--out-dir", out)
    return data, donors, out


def train_briefly(data, out, cnn=True):
    """Of 16 epochs three are settled, so that the one that is kept need not be the last."""
    where = (*QUICK, "--data-dir", data, "--out-dir", out)
    run_forked("step05_lstm.py", "--features", "mel", "beat_fused", "--epochs", 16, *where)
    if cnn:
        run_forked("step07_cnn.py", "--epochs", 8, *where)


@pytest.fixture(scope="module")
def lots(tmp_path_factory):
    """(data set of short clips whose labels are drawn by lot, output folder of steps 5 and 7)."""
    short = {"intro": 0, "n_frames": (100, 120), "test_frames": (150, 170)}
    data = hard_data_set(tmp_path_factory.mktemp("lots_data"), **short)
    draw_labels(data)
    out = tmp_path_factory.mktemp("lots")
    train_briefly(data, out)
    return data, out


@pytest.fixture(scope="module")
def lots_test_spoiled(lots, tmp_path_factory):
    data = copy_data(lots[0], tmp_path_factory.mktemp("lots_test_data"))
    donors = spoil_test_split(data)
    out = tmp_path_factory.mktemp("lots_test")
    train_briefly(data, out)
    return data, donors, out


@pytest.fixture(scope="module")
def lots_val_spoiled(lots, tmp_path_factory):
    """As `lots`, but in the arrays of the validation clips all mel bands are 60 too high."""
    data = copy_data(lots[0], tmp_path_factory.mktemp("lots_val_data"))
    out = tmp_path_factory.mktemp("lots_val")
    for name in ("mel", "beat_fused"):
        for clip in validation_clips(*lots, name):
            path = array_path(data, clip, "train", is_beat(name))
            put(path, np.vstack([np.roll(np.load(path)[:128], 60, axis=0), np.load(path)[128:]]))
    train_briefly(data, out, cnn=False)
    return data, out


def folder_of(out, name):
    return out / ("step07_cnn" if name.startswith("cnn") else "step05_lstm") / name


# ---- what was fitted on which clips: found from the outside -------------------------------


def averaged_clips(data_dir, folder, name):
    """The clips whose frames the band statistics in best.pt are the mean and standard deviation of.

    Let z be 1 for those clips and 0 for all others, training and test. Then for each band the
    sum over clips of z (sum of the clip's values - mean * its frames) is 0, and likewise for
    squares: some 250 equations, which leave one z up to its size.
    """
    settings = load_checkpoint(folder / "best.pt")["settings"]
    mean, std = (value.double().numpy() for value in settings["stats"])
    beat, rows, clips, columns = is_beat(name), ROWS[settings["features"]], [], []
    for split in ("train", "test"):
        for clip in labels_of(data_dir, split=split, beat=beat):
            x = read_clip(data_dir, clip, split, beat)[:, rows].astype(float)
            clips.append(clip)
            squares = ((x - mean) ** 2 - std**2).sum(0) / std**2
            columns.append(np.concatenate([(x - mean).sum(0) / std, squares]))
    _, sizes, basis = np.linalg.svd(np.array(columns).T)
    assert sizes[-1] < 1e-2 * sizes[-2], "the statistics are not those of any whole clips"
    z = basis[-1] / basis[-1][np.abs(basis[-1]).argmax()]
    assert np.abs(z - z.round()).max() < 0.1, "some clips count more than others"
    return {clip for clip, weight in zip(clips, z.round(), strict=True) if weight}


def validation_clips(data_dir, out, name):
    fitted = averaged_clips(data_dir, folder_of(out, name), name)
    return set(labels_of(data_dir, beat=is_beat(name))) - fitted


def log_probabilities(data_dir, path, clips, split, beat):
    """(N, K) answers of the network in best.pt to arrays read and prepared here, adjusted."""
    return ask_network(data_dir, path, tuple(clips), split, beat)


@functools.cache  # several tests ask the same
def ask_network(data_dir, path, clips, split, beat):
    model, checkpoint = load_model(path)
    settings = checkpoint["settings"]
    mean, std = settings["stats"]
    rows = ROWS[settings["features"]]
    arrays = [torch.tensor(read_clip(data_dir, clip, split, beat)[:, rows]) for clip in clips]
    scaled = [(array - mean) / std for array in arrays]
    x = torch.nn.utils.rnn.pad_sequence(scaled, batch_first=True)
    batch = x, torch.zeros(len(x)), torch.tensor([len(array) for array in arrays])
    logits = predict(model, [batch], window=settings["window"])[0].numpy()
    return log_softmax(logits - 0.5 * np.log(settings["priors"]), axis=1)


def classes_of(log_probabilities):
    return np.array(CLASSES)[log_probabilities.argmax(1)]


# ---- predictions.csv ------------------------------------------------------------------------


def models_of(step):
    return {
        "step05_lstm": LSTMS,
        "step06_eval": [*LSTMS, "lstm_ensemble"],
        "step07_cnn": [*CNNS, "cnn_ensemble", "cnn_lstm_ensemble", "mel", RIVAL],
    }[step]


STEPS = ("step05_lstm", "step06_eval", "step07_cnn")


@pytest.mark.parametrize("step", STEPS)
def test_every_test_clip_is_answered_once_and_carries_its_own_truth(step, data_dir, learned):
    table = genre_predictions(learned / step)
    assert set(models_of(step)) <= set(table["model"])
    truth = labels_of(data_dir, split="test")
    for (model, _), rows in table.groupby(["model", "test_set"]):
        assert sorted(rows["clip"]) == sorted(truth), model
        assert dict(zip(rows["clip"], rows["truth"], strict=True)) == truth, model
        assert set(rows["prediction"]) <= set(CLASSES)


@pytest.mark.parametrize("step", STEPS)
def test_each_model_is_tested_on_its_own_kind_of_clips_and_in_step_6_on_the_other_too(
    step, learned
):
    table = genre_predictions(learned / step)
    for model, rows in table.groupby("model"):
        if step == "step06_eval" and model in [*LSTMS, "majority"]:
            assert set(rows["test_set"]) == {FULL, BEAT}
        elif "ensemble" not in model:
            assert set(rows["test_set"]) == {set_of(model)}


def accuracy(rows):
    return accuracy_score(rows["truth"], rows["prediction"])


# What each network reaches here is 0.55 (mel), 0.79 (cnn_mel), 0.9 or more (all others); the
# commonest class, 0.24.
@pytest.mark.parametrize("step", STEPS)
def test_what_can_be_learned_is_learned(step, learned):
    """Half of a test clip on frames is an intro of a window or more: it takes all windows."""
    table = genre_predictions(learned / step)
    for name in models_of(step):
        own = (table["test_set"] == set_of(name)) | (step != "step06_eval")
        rows = table[(table["model"] == name) & own]
        macro_f1 = f1_score(rows["truth"], rows["prediction"], average="macro")
        assert accuracy(rows) > (0.45 if name == "mel" else 0.65), name
        assert macro_f1 > (0.3 if name == "mel" else 0.55), name


def chance_of(rows, n=4000):
    """How likely as many hits are if the labels are dealt out by lot."""
    truth, prediction = rows["truth"].to_numpy(), rows["prediction"].to_numpy()
    rng = np.random.default_rng(0)
    hits = np.array([(rng.permutation(truth) == prediction).sum() for _ in range(n)])
    return (1 + (hits >= (truth == prediction).sum()).sum()) / (1 + n)


@pytest.mark.parametrize("name", ["mel", "beat_fused", "cnn_mel"])
def test_where_labels_are_drawn_by_lot_nothing_is_learned(name, lots, learned):
    """Of sound networks one in 500 would have so many hits by luck; seeds are fixed."""
    table = genre_predictions(folder_of(lots[1], name).parent)
    assert chance_of(table[table["model"] == name]) > 0.002
    table = genre_predictions(folder_of(learned, name).parent)
    assert chance_of(table[table["model"] == name]) < 0.001, "the measure sees nothing"


def test_step_6_and_step_5_answer_alike(learned):
    keys = ["model", "test_set", "clip"]
    first, second = (genre_predictions(learned / step).set_index(keys) for step in STEPS[:2])
    pd.testing.assert_frame_equal(first, second.loc[first.index])


def test_step_6_says_how_many_frames_a_beat_was_made_of(data_dir, learned):
    clips = labels_of(data_dir, split="train")
    frames, beats = (
        np.median([np.load(array_path(data_dir, clip, "train", beat)).shape[1] for clip in clips])
        for beat in (False, True)
    )
    text = " ".join((learned / "step06_eval" / "summary.md").read_text().split())
    assert f"receives means of {round(frames / beats)} frames (median" in text


def test_an_answer_follows_its_array_and_a_truth_its_label(data_dir, learned, spoiled):
    """Arrays of both test sets are exchanged, each in a way of its own.

    Who mixed up ids, files or sets would answer otherwise.
    """
    data, donors, out = spoiled
    before, after = (genre_predictions(folder / "step06_eval") for folder in (learned, out))
    truth = labels_of(data, split="test")
    for (model, test_set), rows in after.groupby(["model", "test_set"]):
        old = before[(before["model"] == model) & (before["test_set"] == test_set)]
        old = old.set_index("clip")["prediction"]
        expected = old[[donors[test_set][clip] for clip in rows["clip"]]].to_numpy()
        # One near tie may fall otherwise: a batch of other clips is padded, and so summed up,
        # otherwise.
        assert (rows["prediction"].to_numpy() != expected).sum() <= 1, (model, test_set)
        assert dict(zip(rows["clip"], rows["truth"], strict=True)) == truth
        donor = donors[FULL if test_set == BEAT else BEAT]
        other = old[[donor[clip] for clip in rows["clip"]]].to_numpy()
        told_apart = (rows["prediction"].to_numpy() != other).sum() >= 5
        # The floors may answer one class throughout.
        assert told_apart or model not in LSTMS, "the test cannot tell the two sets apart"


@pytest.mark.parametrize("which", ["learned", "lots", "lots_test_spoiled"])
def test_an_answer_is_the_networks_own_to_that_array(which, request, data_dir, learned):
    data, *_, out = (data_dir, learned) if which == "learned" else request.getfixturevalue(which)
    for name in ("mel", "beat_fused", "cnn_mel"):
        rows = genre_predictions(folder_of(out, name).parent).query("model == @name")
        path = folder_of(out, name) / "best.pt"
        expected = classes_of(log_probabilities(data, path, rows["clip"], "test", is_beat(name)))
        assert (rows["prediction"].to_numpy() != expected).sum() <= 1, name
        assert len(set(expected)) > (1 if "lots" in which else 5)


# ---- metrics.json ---------------------------------------------------------------------------


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
    assert_interval(scores)


def assert_interval(scores):
    for metric in ("accuracy", "macro_f1"):
        low, high = scores[f"{metric}_ci95"]
        assert low <= scores[metric] <= high and high - low < 0.6
    # To resample clips is to draw their hits from a binomial distribution.
    expected = binom.ppf([0.025, 0.975], scores["n_clips"], scores["accuracy"]) / scores["n_clips"]
    assert scores["accuracy_ci95"] == pytest.approx(expected, abs=1.5 / scores["n_clips"])


@pytest.mark.parametrize("step", STEPS)
def test_scores_are_those_of_the_predictions(step, learned):
    metrics, table = read_metrics(learned / step), genre_predictions(learned / step)
    for name in models_of(step):
        rows = table[table["model"] == name]
        if step == "step06_eval":
            rows = rows[rows["test_set"] == set_of(name)]
        assert_scores((metrics["runs"] | metrics.get("compared_with", {}))[name]["test"], rows)


@pytest.mark.parametrize("which", ["learned", "spoiled"])
def test_scores_on_the_other_test_set_are_of_the_other_test_set(which, request, learned):
    out = learned if which == "learned" else request.getfixturevalue("spoiled")[-1]
    metrics, table = read_metrics(out / "step06_eval"), genre_predictions(out / "step06_eval")
    for name in LSTMS:
        own, other = (table[(table["model"] == name) & (table["test_set"] == where)]
                      for where in ((BEAT, FULL) if is_beat(name) else (FULL, BEAT)))  # fmt: skip
        assert_scores(metrics["runs"][name]["test"], own)
        assert_scores(metrics["other_test_set"][name], other)


def test_the_tables_of_step_6_say_what_metrics_json_says(learned):
    """Each score in the row of its model and the column of its test set."""
    folder = learned / "step06_eval"
    metrics = read_metrics(folder)
    tables = {
        "accuracy": read_table(folder, "Accuracy on the test sets"),
        "macro": read_table(folder, "Macro averages"),
        "micro": read_table(folder, "Micro averages"),
    }
    reports = (folder / "summary.md").read_text()
    for name in LSTMS:
        own, other = ("beat", "full") if is_beat(name) else ("full", "beat")
        for where, scores in (
            (own, metrics["runs"][name]["test"]),
            (other, metrics["other_test_set"][name]),
        ):
            written = tables["accuracy"].loc[name, f"{where}: accuracy"]
            assert written == with_interval(scores, "accuracy"), (name, where)
            for average in ("macro", "micro"):
                for metric in ("precision", "recall", "f1"):
                    written = tables[average].loc[name, f"{where}: {metric}"]
                    assert float(written) == pytest.approx(scores[f"{average}_{metric}"], abs=6e-4)
            report = reports.split(f"`{name}` on the {where} test set:")[1].split("```")[1]
            line = next(line.split() for line in report.splitlines() if "macro avg" in line)
            wanted = [scores[f"macro_{metric}"] for metric in ("precision", "recall", "f1")]
            assert [float(cell) for cell in line[2:5]] == pytest.approx(wanted, abs=6e-4)
    assert tables["accuracy"].loc["svm", "beat: accuracy"] == ""


DIFFERENCE = r"`(\w+)` minus `(\w+)`: accuracy ([-+.\d]+) \["


def test_differences_in_the_report_have_the_sign_that_their_names_say(learned):
    for step in ("step06_eval", "step07_cnn"):
        metrics = read_metrics(learned / step)
        runs = metrics["runs"] | metrics.get("compared_with", {})
        lines = re.findall(DIFFERENCE, (learned / step / "summary.md").read_text())
        assert len(lines) == {"step06_eval": len(LSTMS), "step07_cnn": 2}[step]
        for first, second, gain in lines:
            one, other = (runs[name]["test"]["accuracy"] for name in (first, second))
            assert float(gain) == pytest.approx(one - other, abs=6e-4), (first, second)
        assert any(float(gain) for _, _, gain in lines), "the test cannot tell"


def test_scores_of_wrong_answers_are_recomputed_too(spoiled, lots):
    """Where most is wrong a transposed table or a swapped precision and recall shows."""
    cases = [
        (spoiled[-1] / "step06_eval", ["mel", "fused"]),
        (lots[1] / "step05_lstm", ["mel", "beat_fused"]),
        (lots[1] / "step07_cnn", ["cnn_mel"]),
    ]
    for folder, names in cases:
        metrics, table = read_metrics(folder), genre_predictions(folder)
        for name in names:
            own = (table["model"] == name) & (table["test_set"] == set_of(name))
            rows = table[own]
            assert_scores(metrics["runs"][name]["test"], rows)
            confusion = np.array(metrics["runs"][name]["test"]["confusion"])
            assert (confusion != confusion.T).any()


def test_the_difference_of_cnn_and_lstm_is_that_of_their_answers(learned):
    metrics, table = read_metrics(learned / "step07_cnn"), genre_predictions(learned / "step07_cnn")
    right = (table["truth"] == table["prediction"]).groupby([table["model"], table["clip"]])
    right = right.first().unstack("model")
    assert set(metrics["paired_difference"]) == {"mel", RIVAL}
    for name, found in metrics["paired_difference"].items():
        cnn, lstm = right["cnn_mel"].astype(bool), right[name].astype(bool)
        assert found["accuracy"] == pytest.approx(cnn.mean() - lstm.mean())
        only = (found["only_first"], found["only_second"])
        assert only == ((cnn & ~lstm).sum(), (lstm & ~cnn).sum())
        low, high = found["accuracy_ci95"]
        assert low <= found["accuracy"] <= high


# Six clips: two of A (one called B), three of B (one called C), one of C (called B).
HAND_MADE = [0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 1]


def test_scores_of_a_hand_made_example():
    scores = classification_scores(*HAND_MADE, ["A", "B", "C"])
    assert scores["confusion"] == [[1, 1, 0], [0, 2, 1], [0, 1, 0]]  # rows true, columns called
    assert (
        scores["accuracy"]
        == scores["micro_precision"]
        == scores["micro_recall"]
        == scores["micro_f1"]
        == pytest.approx(1 / 2)
    )
    expected = {"A": (1, 1 / 2, 2 / 3, 2), "B": (2 / 4, 2 / 3, 4 / 7, 3), "C": (0, 0, 0, 1)}
    for name, values in expected.items():
        found = [scores["per_class"][name][key] for key in ("precision", "recall", "f1", "support")]
        assert found == pytest.approx(values)
    assert scores["macro_precision"] == pytest.approx((1 + 1 / 2) / 3)
    assert scores["macro_recall"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 7) / 3)
    assert scores["n_clips"] == 6


def test_intervals_become_half_as_wide_with_four_times_the_clips():
    small, large = (
        classification_scores(*(np.tile(row, n) for row in HAND_MADE), ["A", "B", "C"])
        for n in (10, 40)
    )
    for metric in ("accuracy", "macro_f1"):
        widths = [np.ptp(scores[f"{metric}_ci95"]) for scores in (small, large)]
        assert 0.4 < widths[1] / widths[0] < 0.6
    assert_interval(small)
    assert_interval(large)


def test_the_temperature_is_fitted_on_the_validation_clips(data_dir, learned):
    """On the test clips it would be another one, and the test row would show how well it fits."""
    found = read_metrics(learned / "step07_cnn")["calibration"]
    path, answers = folder_of(learned, "cnn_mel") / "best.pt", {}
    for name, split in (("validation", "train"), ("test", "test")):
        labels = labels_of(data_dir, split=split)
        if name == "validation":
            labels = {clip: labels[clip] for clip in clip_ids(load_data(Source(data_dir)).val)}
        z = log_probabilities(data_dir, path, sorted(labels), split, False)
        targets = [CLASSES.index(labels[clip]) for clip in sorted(labels)]
        answers[name] = torch.tensor(z, dtype=torch.float32), torch.tensor(targets)
    fitted = {name: fit_temperature(*pair) for name, pair in answers.items()}
    assert abs(np.log(fitted["validation"] / fitted["test"])) > 0.2, "the test cannot tell"
    assert found["temperature"] == pytest.approx(fitted["validation"], rel=0.05)
    for name, (z, targets) in answers.items():
        row, scaled = found[f"{name} ({len(targets)} clips)"], z / found["temperature"]
        assert row["calibration error"] == pytest.approx(calibration_error(z, targets), abs=0.02)
        assert row["calibration error, scaled"] == pytest.approx(
            calibration_error(scaled, targets), abs=0.02
        )
        sure = float(scaled.softmax(1).amax(1).mean())
        assert row["confidence, scaled"] == pytest.approx(sure, abs=0.01)


# ---- averages -------------------------------------------------------------------------------


AVERAGES = [("lstm_ensemble", LSTMS), ("cnn_ensemble", CNNS), ("cnn_lstm_ensemble", None)]


@pytest.mark.parametrize("average, members", AVERAGES)
def test_an_average_is_the_mean_of_its_members_log_probabilities(
    average, members, data_dir, learned
):
    """The CNNs and the LSTM half and half; all else alike."""
    step = learned / ("step06_eval" if average == "lstm_ensemble" else "step07_cnn")
    rows = genre_predictions(step).query("model == @average")
    members = members or read_metrics(step)["runs"][average]["members"]
    each = [
        log_probabilities(data_dir, path, rows["clip"], "test", is_beat(name))
        for name in members
        for path in [folder_of(learned, name) / "best.pt"]
    ]
    half = average == "cnn_lstm_ensemble"
    mean = np.mean(each[:-1], axis=0) + each[-1] if half else np.mean(each, axis=0)
    assert (rows["prediction"].to_numpy() != classes_of(mean)).sum() <= 1


@pytest.mark.parametrize("average, members", AVERAGES)
def test_an_average_says_what_all_its_members_say(average, members, learned):
    """By clip id: frames and beats list their clips in different orders."""
    step = "step06_eval" if average == "lstm_ensemble" else "step07_cnn"
    members = members or read_metrics(learned / step)["runs"][average]["members"]
    tables = [genre_predictions(learned / name) for name in STEPS]
    table = pd.concat(tables)
    own = table[table["test_set"] == table["model"].map(set_of)]
    said = own[own["model"].isin(members)].groupby(["clip", "model"])["prediction"].first()
    said = said.unstack()[members]
    average = genre_predictions(learned / step).query("model == @average")
    average = average.set_index("clip")["prediction"]
    unanimous = said.nunique(axis=1) == 1
    assert unanimous.sum() >= 12
    assert (average[said.index[unanimous]] == said[unanimous].iloc[:, 0]).all()


def test_the_average_of_cnns_takes_in_the_lstm_that_validated_best(learned):
    metrics = read_metrics(learned / "step07_cnn")
    assert metrics["runs"]["cnn_ensemble"]["members"] == CNNS
    assert metrics["runs"]["cnn_lstm_ensemble"]["members"] == [*CNNS, RIVAL]
    val = {name: run["val"]["macro_f1"] for name, run in metrics["compared_with"].items()}
    assert val == {"mel": VAL_SCORES["mel"], RIVAL: 0.95}
    runs = read_metrics(learned / "step05_lstm")["runs"]
    test = {name: runs[name]["test"]["macro_f1"] for name in LSTMS}
    assert test[RIVAL] < max(test.values()), "the test score would choose the same"


def test_clips_that_only_one_of_the_test_sets_has(data_dir, learned, tmp_path):
    """Left out for an array that cannot be read; all else is answered as before, clip by clip."""
    data = copy_data(data_dir, tmp_path / "data")
    full, beat = sorted(labels_of(data, split="test"))[3:5]
    for clip, is_of_beats in ((full, False), (beat, True)):
        array_path(data, clip, "test", is_of_beats).unlink()
    for name in STEPS[::2]:
        shutil.copytree(learned / name, tmp_path / name)
    run_forked("step06_eval.py", "--ensemble", "--skip-bad", "--data-dir", data,
               "--out-dir", tmp_path)  # fmt: skip
    keys = ["model", "test_set", "clip"]
    before, after = (
        genre_predictions(out / "step06_eval").set_index(keys)[["truth", "prediction"]].sort_index()
        for out in (learned, tmp_path)
    )
    without = {FULL: {full}, BEAT: {beat}}
    for (model, test_set), rows in after.groupby(["model", "test_set"]):
        old = before.loc[model, test_set]
        missing = without[test_set] | ({beat} if model == "lstm_ensemble" else set())
        assert set(rows.index.get_level_values("clip")) == set(old.index) - missing
        found = rows.loc[model, test_set]
        changed = found["prediction"] != old.loc[found.index, "prediction"]
        assert changed.sum() <= 1 and (found["truth"] == old.loc[found.index, "truth"]).all()
    metrics = read_metrics(tmp_path / "step06_eval")
    n_clips = len(labels_of(data, split="test"))
    assert metrics["runs"]["lstm_ensemble"]["test"]["n_clips"] == n_clips - 2
    assert metrics["other_test_set"]["mel"]["n_clips"] == n_clips - 1
    assert_scores(metrics["runs"]["lstm_ensemble"]["test"], after.loc["lstm_ensemble"])


# ---- floors ---------------------------------------------------------------------------------


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
@pytest.mark.parametrize("which", ["learned", "spoiled"])
def test_floors_are_fitted_on_training_clips_alone(which, name, data_dir, request, learned):
    """The SVM is fitted here once more. In `spoiled` another class is common in the test split."""
    learnt = which == "learned"
    data, *_, out = (data_dir, learned) if learnt else request.getfixturevalue("spoiled")
    runs = read_metrics(out / "step06_eval")["runs"]
    x, y = svm_features(data, "train", is_beat(name))
    x_test, y_test = svm_features(data, "test", is_beat(name))
    commonest = pd.Series(y).value_counts().index[0]
    assert learnt or commonest != pd.Series(y_test).value_counts().index[0]
    always = pd.DataFrame({"truth": y_test, "prediction": commonest})
    assert_scores(runs["majority"]["test"], always)
    n_folds = min(5, min(np.unique(y, return_counts=True)[1]))
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=42)
    grid = {"svc__C": [1, 3, 10], "svc__class_weight": [None, "balanced"]}
    pipeline = make_pipeline(StandardScaler(), SVC())
    svm = GridSearchCV(pipeline, grid, cv=folds, scoring="f1_macro").fit(x, y)
    assert runs[name]["val"]["macro_f1"] == pytest.approx(svm.best_score_)
    answers = pd.DataFrame({"truth": y_test, "prediction": svm.predict(x_test)})
    assert_scores(runs[name]["test"], answers)


@pytest.mark.parametrize("name", ["svm", "beat_svm"])
def test_the_validation_score_of_the_svm_does_not_depend_on_test_clips(name, learned, spoiled):
    first, second = (
        read_metrics(out / "step06_eval")["runs"][name] for out in (learned, spoiled[-1])
    )
    assert first["val"] == second["val"]
    assert first["test"] != second["test"]
    assert first["val"]["macro_f1"] > 0.6


# ---- step 11 --------------------------------------------------------------------------------


def latent(out, name):
    with np.load(out / "step11_latent" / f"latent_{name}.npz") as file:
        return {key: file[key] for key in file.files}


def test_best_and_worst_lstm_are_chosen_by_validation(spoiled):
    roles = read_metrics(spoiled[-1] / "step11_latent")["roles"]
    assert {role: name for name, role in roles.items()} == {
        "best LSTM": "fused",
        "worst LSTM": "chroma",
        "CNN": "cnn_mel",
    }


@pytest.mark.parametrize("name", ["fused", "chroma", "cnn_mel"])
def test_latent_vectors_belong_to_their_ids(name, data_dir, spoiled):
    """Labels are the label file's; the vectors are their arrays', whatever the labels say."""
    data, donors, out = spoiled
    clips, truth = latent(out, name), labels_of(data, split="test")
    assert sorted(clips["ids"]) == sorted(truth)
    assert clips["classes"].tolist() == CLASSES
    assert [CLASSES[label] for label in clips["labels"]] == [truth[clip] for clip in clips["ids"]]

    heard = [donors[FULL][clip] for clip in clips["ids"]]
    vectors = clips["vectors"] - clips["vectors"].mean(0)
    distance = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    same = np.equal.outer(heard, heard)
    assert distance[same].max() < 0.02 * distance.mean(), "one array, one vector"
    content = labels_of(data_dir, split="test")
    classes = [content[donor] for donor in heard]
    # Without the clip itself and those with the very same array, the next vector is one of the
    # same music.
    nearest = np.where(same, np.inf, distance).argmin(1)
    fair = [sum(content[donor] == content[other] for other in set(heard)) > 1 for donor in heard]
    hits = [classes[i] == classes[j] for i, j in enumerate(nearest) if fair[i]]
    assert np.mean(hits) > 0.7


@pytest.mark.parametrize("name", ["fused", "chroma"])
def test_latent_vectors_are_what_the_output_layer_gets(name, spoiled):
    out = spoiled[-1]
    clips = latent(out, name)
    model, checkpoint = load_model(out / "step05_lstm" / name / "best.pt")
    with torch.no_grad():
        logits = model.head(torch.tensor(clips["vectors"])).numpy()
    called = (logits - 0.5 * np.log(checkpoint["settings"]["priors"])).argmax(1)
    rows = genre_predictions(out / "step06_eval").query("model == @name and test_set == @FULL")
    rows = rows.set_index("clip")
    said = rows.loc[clips["ids"], "prediction"].to_numpy()
    assert (said != clips["classes"][called]).sum() <= 1
    assert_scores(read_metrics(out / "step11_latent")["runs"][name]["test"], rows)


@pytest.mark.parametrize("name", ["fused", "chroma", "cnn_mel"])
def test_knn_accuracy_is_that_of_the_latent_vectors(name, spoiled):
    """Each clip judged by its five nearest others, on standardised dimensions."""
    out = spoiled[-1]
    clips = latent(out, name)
    x = StandardScaler().fit_transform(clips["vectors"])
    labels, hits = clips["labels"], []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        nearest = KNeighborsClassifier(5).fit(x[others], labels[others])
        votes = nearest.predict_proba(x[i : i + 1])[0]
        commonest = nearest.classes_[votes == votes.max()]  # several, where there is a tie
        hits.append((labels[i] in commonest) / len(commonest))
    found = read_metrics(out / "step11_latent")["separation"][name]["full space"]["knn_accuracy"]
    # Equal distances may be ordered otherwise.
    assert found == pytest.approx(np.mean(hits), abs=2.5 / len(x))


# ---- leaks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mel", "beat_fused", "cnn_mel"])
def test_nothing_trained_or_chosen_changes_with_the_test_clips(name, lots, lots_test_spoiled):
    folders = [folder_of(out, name) for out in (lots[1], lots_test_spoiled[-1])]
    first, second = (load_checkpoint(folder / "best.pt") for folder in folders)
    assert first["state"].keys() == second["state"].keys()
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    assert all(map(torch.equal, first["settings"]["stats"], second["settings"]["stats"]))
    for key in ("names", "priors"):
        assert first["settings"][key] == second["settings"][key]
    assert (first["epoch"], first["val_score"]) == (second["epoch"], second["val_score"])
    curves = (pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in folders)
    pd.testing.assert_frame_equal(*curves, check_exact=True)


def test_the_cnns_rivals_do_not_change_with_the_test_clips(lots, lots_test_spoiled):
    first, second = (
        {name: run["val"] for name, run in read_metrics(step)["compared_with"].items()}
        for step in (lots[1] / "step07_cnn", lots_test_spoiled[-1] / "step07_cnn")
    )
    assert first == second


@pytest.mark.parametrize("name", ["mel", "beat_fused", "cnn_mel"])
def test_statistics_and_class_shares_are_of_the_training_part_alone(name, lots):
    data, out = lots
    settings = load_checkpoint(folder_of(out, name) / "best.pt")["settings"]
    clips = averaged_clips(data, folder_of(out, name), name)
    labels = labels_of(data, beat=is_beat(name))
    facts = read_metrics(folder_of(out, name).parent)["runs"][name]
    assert clips < set(labels)
    assert len(clips) == facts["n_train"] and len(labels) - len(clips) == facts["n_val"]
    counts = pd.Series([labels[clip] for clip in clips]).value_counts()
    assert settings["names"] == CLASSES
    assert settings["priors"] == pytest.approx((counts[CLASSES] / len(clips)).tolist())
    expected = pd.Series(labels.values()).value_counts() * len(clips) / len(labels)
    assert (counts - expected).abs().max() < 1.01  # and every class keeps its share
    # Whatever a network hears, the same clips train it.
    assert clips == averaged_clips(data, folder_of(out, "mel"), "mel")


def test_the_validation_score_is_that_of_the_kept_weights_on_the_validation_clips(lots):
    data, out = lots
    path = out / "step05_lstm" / "beat_fused" / "best.pt"
    clips, labels = sorted(validation_clips(data, out, "beat_fused")), labels_of(data, beat=True)
    truth = [labels[clip] for clip in clips]
    answers = classes_of(log_probabilities(data, path, clips, "train", True))
    score = f1_score(truth, answers, labels=CLASSES, average="macro", zero_division=0)
    assert load_checkpoint(path)["val_score"] == pytest.approx(score)
    run = read_metrics(out / "step05_lstm")["runs"]["beat_fused"]
    assert run["val"]["macro_f1"] == pytest.approx(score)


@pytest.mark.parametrize("name", ["mel", "beat_fused"])
def test_training_does_not_change_with_the_validation_clips(name, lots, lots_val_spoiled):
    folders = [folder_of(out, name) for _, out in (lots, lots_val_spoiled)]
    first, second = (load_checkpoint(folder / "best.pt")["settings"] for folder in folders)
    assert all(map(torch.equal, first["stats"], second["stats"]))
    assert first["priors"] == second["priors"]
    first, second = (pd.read_csv(folder / "history.csv") for folder in folders)
    assert first["train_loss"].tolist() == second["train_loss"].tolist()
    # What was spoiled are the clips that validate.
    assert (first["val_loss"] != second["val_loss"]).all()


# ---- which epoch is kept --------------------------------------------------------------------


def test_the_epoch_kept_is_the_best_by_validation_of_the_last_fifth(learned, lots):
    early = not_last = 0
    for out, names in ((learned, LSTMS + CNNS), (lots[1], ["mel", "beat_fused", "cnn_mel"])):
        for name in names:
            folder = folder_of(out, name)
            history = pd.read_csv(folder / "history.csv")
            checkpoint = load_checkpoint(folder / "best.pt")
            run = read_metrics(folder.parent)["runs"][name]
            assert history["epoch"].tolist() == list(range(1, len(history) + 1))
            settled = history.tail(max(1, round(len(history) / 5)))
            best = settled.sort_values(["val_score", "val_loss"], ascending=[False, True])
            best = best.iloc[0]
            assert checkpoint["epoch"] == run["best_epoch"] == best["epoch"]
            assert checkpoint["val_score"] == run["val"]["macro_f1"] == best["val_score"]
            early += history["val_score"].max() > best["val_score"]
            not_last += checkpoint["epoch"] < len(history)
    assert early, "nowhere was an earlier epoch better by luck: the test cannot tell"
    assert not_last, "everywhere the last epoch was the best: the test cannot tell"


# ---- the merge ------------------------------------------------------------------------------


def genre_counts(genres, split):
    return {genre: COUNTS[genre][split == "test"] for genre in genres}


def test_the_merge_is_the_labs(lots, tmp_path):
    """Step 4 counts before and after; what each clip becomes is seen in predictions.csv, above."""
    run_forked("step04_dataset.py", "--smoke", "--data-dir", lots[0], "--out-dir", tmp_path)
    found = read_metrics(tmp_path / "step04_dataset")["classes"]
    for split in ("train", "test"):
        before = genre_counts(GENRES, split)
        assert found["before"][split] == before
        merged = pd.Series(before).drop(DROPPED).groupby(MERGED).sum()
        assert found["after"][split] == merged.to_dict()


# ---- mixing ---------------------------------------------------------------------------------


def test_mixed_clips_have_mixed_targets():
    """Each clip is all ones in the band of its class: what is mixed in can be read from it."""
    torch.manual_seed(0)
    classes = torch.arange(10).repeat(4)
    x = torch.nn.functional.one_hot(classes, 20).float()[:, None].expand(-1, 7, -1)
    mix = Augment(mixup=0.3, shift_bands=0, mask_bands=0, mask_frames=0, n_classes=10)
    mixed, targets = mix(x, classes)
    torch.testing.assert_close(mixed[:, 3, :10], targets)
    assert ((targets.max(1).values < 0.95).sum() > 5) and (targets.argmax(1) == classes).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(40))


def test_the_average_of_log_probabilities_keeps_what_all_agree_on():
    """What the test of averages rests on."""
    logits = np.random.default_rng(0).standard_normal((3, 50, 4))
    logits[:, np.arange(50), np.arange(50) % 4] += 10
    assert (log_softmax(logits, axis=2).mean(0).argmax(1) == np.arange(50) % 4).all()
