"""Steps 7 and 11: the CNN, its comparison with the LSTM, and the latent vectors."""

import ast
import base64
import io
import itertools
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import (
    COUNTS,
    MERGED,
    ROOT,
    Page,
    assert_clean_error,
    genre_predictions,
    labels_of,
    read_metrics,
    read_table,
    run_script,
    write_data_set,
)
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader

from common import (
    Classifier,
    CNNBackbone,
    clip_ids,
    load_checkpoint,
    load_model,
    load_test,
    predict,
    true_labels,
)
from patrec.features import SR, mel_and_chroma, stack_rows
from patrec.flags import Source
from patrec.recipes import LSTM_NAMES
from patrec.scores import average_predictions, genre_scores, paired_difference
from patrec.tables import with_interval

N_TEST = sum(COUNTS[genre][1] for genre in MERGED)
CNNS = ["cnn_mel", "cnn_mel_seed43", "cnn_mel_seed44"]


def functions_of(script):
    """A step's imports, constants and functions, without running its cells."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    body = ast.parse((ROOT / script).read_text()).body
    constants = [node for node in body if isinstance(node, ast.Assign)]
    constants = [node for node in constants if getattr(node.targets[0], "id", "").isupper()]
    kept = [node for node in body if isinstance(node, kinds) or node in constants]
    namespace = {}
    exec(compile(ast.Module(kept, []), script, "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Classes as unequal as in the shared set; clips of little more than one window, as two
    epochs are to be quick."""
    root = tmp_path_factory.mktemp("data")
    options = {"n_emotion": (2, 1), "n_frames": (270, 320), "n_beats": (14, 40)}
    return write_data_set(root, per_class=COUNTS, dtype=np.float32, **options)


@pytest.fixture(scope="module")
def outputs(data_dir, tmp_path_factory):
    """Both steps with --smoke through the command line, and a checkpoint of step 5 between them."""
    out = tmp_path_factory.mktemp("out")
    run_script("step11_latent.py", "--smoke", "--data-dir", data_dir, "--out-dir", out)
    shutil.copytree(out / "step11_latent" / "chroma", out / "step05_lstm" / "chroma")
    path = out / "step05_lstm" / "chroma" / "best.pt"
    torch.save(load_checkpoint(path) | {"val_score": 0.99}, path)
    run_script("step07_cnn.py", "--ensemble", "--smoke", "--data-dir", data_dir, "--out-dir", out)
    return out


@pytest.mark.parametrize(
    "step, items, figures",
    [
        (
            "step07_cnn",
            ["7a", "7b", "7c", "7d", "7e"],
            {"digit_activations", "genre_activations", "block_operations", "filters"}
            | {"learning_curve", "overfit", "per_class", "confusion", "what_decides"},
        ),
        (
            "step11_latent",
            ["11a", "11b", "11c", "11d"],
            {"pca", "pca_worst", "knn_accuracy"},
        ),
    ],
)
def test_report_is_whole_and_in_the_labs_order(outputs, step, items, figures):
    summary = (outputs / step / "summary.md").read_text()
    written = {path.stem for path in (outputs / step).glob("*.png")}
    if step == "step11_latent":  # a picture of all methods per model
        figures |= {f"maps_{name}" for name in read_metrics(outputs / step)["roles"]}
    assert written == figures
    for name in figures:
        assert (outputs / step / f"{name}.png").stat().st_size > 5000
        assert f"]({name}.png)" in summary
    assert re.findall(r"^## (\d+[a-e])\.", summary, flags=re.MULTILINE) == items
    words = re.sub(r"```.*?```", "", summary, flags=re.DOTALL)  # source code may hold a brace
    for word in ("nan", "None", "{", "tensor("):
        assert word not in words, word


def test_the_network_and_what_lies_behind_its_scores_are_shown(outputs):
    summary = (outputs / "step07_cnn" / "summary.md").read_text()
    assert "class CNNBackbone" in summary and "| backbone.blocks.3.3 | MaxPool2d |" in summary
    order = [
        f"blocks.0.{place} | {name}"
        for place, name in enumerate(("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"))
    ]
    assert sorted(order, key=summary.index) == order  # the lab's, whatever is faster in training
    assert "convnetjs/demo/mnist.html" in summary
    words = " ".join(summary.split())  # wherever a line ends
    for word in ("AdamW", "label smoothing", "running average", "logit adjustment", "mixup"):
        assert word in words, word
    assert "UMAP" in (outputs / "step11_latent" / "summary.md").read_text()


def test_answers_carry_the_ids_of_their_clips(outputs, data_dir):
    labels = labels_of(data_dir, split="test")
    assert list(labels) != sorted(labels)  # or the order could not show
    for model, rows in genre_predictions(outputs / "step07_cnn").groupby("model"):
        assert dict(zip(rows["clip"], rows["truth"], strict=True)) == labels, model


def test_metrics_of_the_cnn(outputs):
    metrics = read_metrics(outputs / "step07_cnn")
    assert set(metrics["runs"]) == {*CNNS, "cnn_ensemble", "cnn_lstm_ensemble"}
    assert {name for name, run in metrics["runs"].items() if "val" in run} == set(CNNS)
    assert metrics["runs"]["cnn_ensemble"]["members"] == CNNS
    run = metrics["runs"]["cnn_mel"]
    assert {"epochs", "train_seconds", "val", "test", "weights"} <= set(run)
    for other in metrics["runs"].values():
        test = other["test"]
        assert len(test["accuracy_ci95"]) == len(test["macro_f1_ci95"]) == 2
        assert test["n_clips"] == N_TEST
    difference = metrics["paired_difference"]["mel"]
    lstm = metrics["compared_with"]["mel"]["test"]["accuracy"]
    assert difference["accuracy"] == pytest.approx(run["test"]["accuracy"] - lstm)
    # Clips that one model alone has right account for the whole difference.
    only = difference["only_first"] - difference["only_second"]
    assert only == round(N_TEST * difference["accuracy"])
    table = genre_predictions(outputs / "step07_cnn")
    assert len(table.pivot(index="clip", columns="model", values="prediction")) == N_TEST
    assert metrics["digits"]["accuracy"][-1] > 0.5 > metrics["digits"]["accuracy"][0]
    assert metrics["overfit"]["cnn_mel"]["accuracy"] == 1
    accuracies = [metrics["runs"][name]["test"]["accuracy"] for name in CNNS]
    spread = metrics["seed_spread"]["accuracy"]
    expected = (np.mean(accuracies), np.std(accuracies, ddof=1))
    assert (spread["mean"], spread["sd"]) == pytest.approx(expected)


def test_ensemble_is_of_different_networks(outputs):
    paths = [outputs / "step07_cnn" / name / "best.pt" for name in CNNS]
    first = [load_checkpoint(path)["state"]["backbone.blocks.0.0.weight"] for path in paths]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_ensemble_averages_by_clip_id():
    """Frames and beats may list the clips in another order; by position, clips would be mixed."""
    ids = [str(i) for i in range(6)]
    true = pd.Series(["a", "b"] * 3, ids)
    is_class = true.to_numpy()[:, None] == np.array(["a", "b"])
    sure = pd.DataFrame(np.where(is_class, -0.01, -5.0), ids, ["a", "b"])
    mean = average_predictions([sure * 0 - 0.7, sure.iloc[::-1]])
    assert genre_scores(true, mean)["accuracy"] == 1


def test_rivals_are_the_lstm_on_mel_and_the_best_by_validation(outputs):
    """A checkpoint of step 5 with a better validation score must come into the comparison."""
    metrics = read_metrics(outputs / "step07_cnn")
    assert set(metrics["compared_with"]) == set(metrics["paired_difference"]) == {"mel", "chroma"}
    assert metrics["runs"]["cnn_lstm_ensemble"]["members"][-1] == "chroma"


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 200)
    poor = np.where(rng.random(200) < 0.4, targets, (targets + 1) % 3)
    better = np.where(rng.random(200) < 0.3, targets, poor)
    ids, classes = [str(i) for i in range(200)], ["a", "b", "c"]
    true = pd.Series(np.array(classes)[targets], ids)
    poor_answers, better_answers = (
        pd.DataFrame(np.eye(3)[k], ids, classes) for k in (poor, better)
    )
    same = paired_difference(true, poor_answers, poor_answers)
    assert same["accuracy"] == 0 and same["accuracy_ci95"] == [0, 0] and same["only_first"] == 0
    shuffled = better_answers.sample(frac=1, random_state=0)  # pairs are made by clip id
    result = paired_difference(true, shuffled, poor_answers)
    assert result["only_second"] == 0
    assert result["only_first"] == ((better == targets) & (poor != targets)).sum()
    assert 0 < result["accuracy_ci95"][0] < result["accuracy"] < result["accuracy_ci95"][1]
    # Pairing is the point: a model that adds to another's hits is shown to be better even
    # where the two models' own intervals overlap.
    ordered = paired_difference(true, better_answers, poor_answers)
    back = paired_difference(true, poor_answers, better_answers)
    assert back["macro_f1"] == -ordered["macro_f1"] == -result["macro_f1"]
    assert back["macro_f1_ci95"] == [-value for value in ordered["macro_f1_ci95"][::-1]]


def test_overfit_batch_alone_leaves_the_full_run_as_it_is(data_dir, outputs):
    """The check, and nothing but the check, in a folder of its own."""
    folder = outputs / "step07_cnn"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = ("--overfit-batch", "--smoke", "--data-dir", data_dir, "--out-dir", outputs)
    result = run_script("step07_cnn.py", *flags)
    check = read_metrics(folder / "overfit_batch")["overfit"]["cnn_mel"]
    assert check["loss"] < 0.01 and check["accuracy"] == 1
    assert "1.000" in result.stdout
    assert re.findall(r"--- (\S+)", result.stdout) == ["7d."]
    assert not list((folder / "overfit_batch").rglob("best.pt"))  # a check leaves no model behind
    assert {path: path.read_bytes() for path in before} == before


def test_overfit_batch_fails_on_equal_clips_of_different_classes(tmp_path):
    """Nothing can tell these clips apart: passing would mean that the check checks nothing."""
    data = write_data_set(tmp_path / "data", per_class=(4, 1), n_emotion=(4, 1), n_frames=64)
    clips = sorted((data / "fma_genre_spectrograms" / "train").glob("*.npy"))
    for path in clips[1:]:
        shutil.copy(clips[0], path)
    flags = ("--overfit-batch", "--subset", 10, "--batch-size", 10)
    where = ("--data-dir", data, "--out-dir", tmp_path / "out")
    result = run_script("step07_cnn.py", *flags, *where, check=False)
    assert_clean_error(result, "not learned by heart", "loss", "accuracy", code=1)
    assert not list((tmp_path / "out").rglob("metrics.json"))


def test_four_blocks_of_four_operations_in_the_labs_order():
    backbone = CNNBackbone()
    assert len(backbone.blocks) == 4
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    for block in backbone.blocks:
        assert [type(operation) for operation in block] == kinds
    assert backbone.blocks[0][0].in_channels == 1  # the spectrogram is an image of one channel


@torch.no_grad()
def test_cnn_gives_the_same_vector_however_far_a_clip_is_padded():
    torch.manual_seed(0)
    backbone = CNNBackbone()
    # Statistics as after training, so that silence (the padding) does not map to zero.
    backbone.train()(torch.randn(4, 400, 128) + 1, torch.full((4,), 400))
    backbone.eval()
    for length in (300, 301, 64, 10):
        clip = torch.randn(1, length, 128)
        alone = backbone(clip, torch.tensor([length]))
        for extra in (1, 7, 64, 500):
            padded = backbone(nn.functional.pad(clip, (0, 0, 0, extra)), torch.tensor([length]))
            torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    # Beside a longer clip in a batch, too.
    both = torch.cat([nn.functional.pad(clip, (0, 0, 0, 390)), torch.randn(1, 400, 128)])
    vectors = backbone(both, torch.tensor([10, 400]))
    torch.testing.assert_close(vectors[:1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batch_of_one():
    model = Classifier(CNNBackbone(), 7).eval()
    x, lengths = torch.randn(3, 100, 128), torch.tensor([100, 80, 90])
    assert model(x[:1], lengths[:1]).shape == (1, 7)
    loader = [(x[:2], torch.tensor([0, 1]), lengths[:2]), (x[2:], torch.tensor([2]), lengths[2:])]
    logits, targets = predict(model, loader, window=64)
    assert logits.shape == (3, 7) and targets.tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def step07():
    return functions_of("step07_cnn.py")


def test_digit_cnn_leaves_out_what_it_says(step07):
    digit_cnn, operations = step07["digit_cnn"], step07["OPERATIONS"]

    def names(without):
        return [type(module).__name__ for module in digit_cnn(without).modules()]

    for name in operations[1:]:
        assert names(None).count(name) == 2 and name not in names(name)
    assert digit_cnn("Conv2d")[0][0].kernel_size == (1, 1)
    for without in (None, *operations):
        assert digit_cnn(without)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_digits_are_scored_on_those_not_learned(step07):
    """With labels drawn by lot, what was learned by heart must not help on other digits."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 1, 8, 8, generator=generator), torch.arange(40) % 10
    train_digits = step07["train_digits"]
    _, learned = train_digits((x, y, x, y), 0, 60)
    other = torch.rand(400, 1, 8, 8, generator=generator)
    _, unseen = train_digits((x, y, other, torch.arange(400) % 10), 0, 60)
    assert learned[-1] > 0.9 and unseen[-1] < 0.3


def test_activations_are_what_the_network_computes(step07):
    model = step07["digit_cnn"]().eval()
    x = torch.rand(3, 1, 8, 8)
    maps = step07["activations"](model[:2], x)
    assert list(maps) == [(block, name) for block in (1, 2) for name in step07["OPERATIONS"]]
    torch.testing.assert_close(model[2:](maps[2, "MaxPool2d"]), model(x))


def test_latent_files(outputs, data_dir):
    metrics = read_metrics(outputs / "step11_latent")
    assert len(metrics["roles"]) == 3 and metrics["roles"]["cnn_mel"] == "CNN"
    for name in metrics["roles"]:
        model, checkpoint = load_model(outputs / "step11_latent" / name / "best.pt")
        settings = checkpoint["settings"]
        clips = np.load(outputs / "step11_latent" / f"latent_{name}.npz", allow_pickle=False)
        test = load_test(Source(data_dir), settings)
        assert clips["vectors"].shape == (len(test), model.backbone.feature_size)
        assert clips["ids"].tolist() == clip_ids(test)
        assert [clips["classes"][k] for k in clips["labels"]] == true_labels(
            test, settings
        ).tolist()
        # These are the very vectors that the output layer answers to.
        logits, _ = predict(model, DataLoader(test, 8), window=settings["window"])
        with torch.no_grad():
            answers = model.head(torch.from_numpy(clips["vectors"]))
        torch.testing.assert_close(answers, logits, rtol=0.05, atol=0.02)
        assert metrics["runs"][name]["test"]["n_clips"] == len(test)


def test_methods_are_judged_by_one_criterion(outputs):
    metrics = read_metrics(outputs / "step11_latent")
    assert metrics["criterion"] == "trustworthiness"
    for measures in metrics["separation"].values():
        assert {"full space", "full space, untrained", "PCA", "Isomap", "t-SNE"} <= set(measures)
        # Random weights: a twin with the trained ones would measure the very same.
        full, untrained = measures["full space"], measures["full space, untrained"]
        assert full["silhouette"] != untrained["silhouette"]
        for method in ("PCA", "Isomap", "t-SNE"):
            assert 0 < measures[method]["trustworthiness"] <= 1
            assert -1 <= measures[method]["distances"] <= 1
            # Two starts with --smoke; PCA and Isomap know no chance.
            n_starts = len(measures[method]["trustworthiness of all seeds"])
            assert n_starts == (2 if method == "t-SNE" else 1)
            low, high = measures[method]["knn_accuracy_ci95"]
            assert low <= measures[method]["knn_accuracy"] <= high


def test_best_and_worst_lstm_by_validation(outputs):
    metrics = read_metrics(outputs / "step11_latent")
    folder = outputs / "step11_latent"
    # The lab names the test set of full spectrograms: no network of beats is a candidate.
    names = [name for name in LSTM_NAMES if not name.startswith("beat")]
    val = {name: load_checkpoint(folder / name / "best.pt")["val_score"] for name in names}
    roles = {role: name for name, role in metrics["roles"].items()}
    assert val[roles["best LSTM"]] == max(val.values())
    assert val[roles["worst LSTM"]] == min(val.values())
    assert roles["best LSTM"] != roles["worst LSTM"]


def test_what_decides_is_tested_before_it_is_shown(outputs):
    facts = read_metrics(outputs / "step07_cnn")
    for way in ("insertion", "deletion"):
        row = facts["faithfulness"][way]
        assert 0 < row["by attribution"] < 1 and 0 < row["in random order"] < 1
    agreement = facts["faithfulness"]["randomised_weights"]
    mean, (low, high) = agreement["mean"], agreement["ci95"]
    assert -1 <= low <= mean <= high < 0.95  # other weights name other cells
    assert facts["calibration"]["temperature"] > 0
    summary = (outputs / "step07_cnn" / "summary.md").read_text()
    sounds = re.findall(r"\]\((clip_\d_\w+\.mp3)\)", summary)
    kinds = {sound.split("_", 2)[2] for sound in sounds}
    assert len(sounds) >= 4 and kinds == {"all.mp3", "deciding.mp3"}
    for sound in sounds:
        assert soundfile.info(outputs / "step07_cnn" / sound).samplerate == SR


def test_what_is_named_first_decides_more_than_what_is_drawn_by_lot(outputs):
    """Put back, it brings the answer sooner; taken away, it takes it sooner."""
    gains = []
    for way, sign in (("insertion", 1), ("deletion", -1)):
        row = read_metrics(outputs / "step07_cnn")["faithfulness"][way]
        gain = sign * (row["by attribution"] - row["in random order"])
        gains.append(gain)
        assert float(row["better by"].split()[0]) == pytest.approx(gain, abs=6e-4)
    assert sum(gains) > 0  # small: two epochs of training


def test_the_clips_to_hear_are_step_1s_and_the_surest_mistakes(outputs):
    folder = outputs / "step07_cnn"
    links = re.findall(r"\[(\w+), (\S+), (training split|test set), called (\S+) .*?\]"
                       r"\((clip_\d_\w+\.mp3)\)", (folder / "summary.md").read_text())  # fmt: skip
    rows = genre_predictions(folder).query("model == 'cnn_mel'").set_index("clip")
    asked = [(clip, genre) for clip, genre, split, *_ in links if split == "test set"]
    assert len(asked) == 2 * 2  # each as it is, and what decided
    for clip, genre in asked:
        assert rows.loc[clip, "truth"] == genre != rows.loc[clip, "prediction"]
    quieter = []
    for *_, name in links:
        if name.endswith("_deciding.mp3"):  # most of the cells are 30 dB lower there
            pair = name.replace("deciding", "all"), name
            whole, rest = (mel_db(soundfile.read(folder / file)[0]) for file in pair)
            quieter.append(np.median(whole - rest))
    assert np.median(quieter) > 8


def mel_db(waveform):
    """Mel spectrogram in dB below its loudest cell."""
    return stack_rows(*mel_and_chroma(waveform.astype("f4")))[:128]


def test_each_network_of_the_ensemble_stands_under_its_own_seed(outputs):
    table = genre_predictions(outputs / "step07_cnn")
    seeds = table.groupby("model")["seed"].unique().map(list).to_dict()
    wanted = {"cnn_mel": ["42"], "cnn_mel_seed43": ["43"], "cnn_mel_seed44": ["44"]}
    assert {name: seeds[name] for name in wanted} == wanted
    assert table.loc[table["model"].str.contains("ensemble"), "seed"].isna().all()


def test_the_tables_of_step_11_say_what_metrics_json_says(outputs):
    """Measured in the full space, in that of the untrained twin, on the plane: each by its name."""
    folder = outputs / "step11_latent"
    metrics = read_metrics(folder)
    roles = {role: name for name, role in metrics["roles"].items()}
    for caption, shown in (
        ("Separation of the genres, and", ("best LSTM", "CNN")),
        ("Separation of the genres, best", ("best LSTM", "worst LSTM")),
    ):
        table = read_table(folder, caption)
        assert list(table) == [f"{role}, {roles[role]}" for role in shown]
        for role in shown:
            column, facts = table[f"{role}, {roles[role]}"], metrics["separation"][roles[role]]
            for space in ("full space", "full space, untrained", "PCA"):
                written = column[f"5-NN accuracy, {space}"]
                assert written == with_interval(facts[space], "knn_accuracy")
                written = float(column[f"silhouette, {space}"])
                assert written == pytest.approx(facts[space]["silhouette"], abs=6e-4)
    kept = metrics["separation"]
    lines = re.findall(r"`(\w+)` minus `(\w+)`: accuracy ([-+.\d]+) \[",
                       (folder / "summary.md").read_text())  # fmt: skip
    pairs = [("CNN", "best LSTM"), ("best LSTM", "worst LSTM")]
    assert [pair[:2] for pair in lines] == [tuple(roles[role] for role in pair) for pair in pairs]
    for *names, gain in lines:
        one, other = (kept[name]["full space"]["knn_accuracy"] for name in names)
        assert float(gain) == pytest.approx(one - other, abs=6e-4)


def test_the_planes_share_of_the_variance_is_numpys(outputs):
    metrics = read_metrics(outputs / "step11_latent")
    for name in metrics["roles"]:
        vectors = np.load(outputs / "step11_latent" / f"latent_{name}.npz")["vectors"]
        spread = vectors.std(0)
        scaled = (vectors - vectors.mean(0)) / np.where(spread > 1e-6, spread, 1)
        shares = np.linalg.svd(scaled, compute_uv=False) ** 2
        shares = np.cumsum(shares / shares.sum())
        found = metrics["separation"][name]
        assert found["pca_variance_2d"] == pytest.approx(shares[1], abs=2e-3)
        n_axes = found["pca_axes_for_90"]
        assert shares[n_axes - 1] > 0.9 - 1e-3 and shares[n_axes - 2] < 0.9 + 1e-3


def maps_data(outputs):
    text = (outputs / "step11_latent" / "maps.html").read_text()
    return json.loads(re.search(r"^const data = (.*), \$ = id", text, re.MULTILINE)[1])


def test_the_maps_hold_every_clip_model_and_method(outputs):
    data, metrics = maps_data(outputs), read_metrics(outputs / "step11_latent")
    assert set(data["runs"]) == set(metrics["roles"]) and set(data["methods"]) >= {"PCA", "t-SNE"}
    clips = np.load(outputs / "step11_latent" / "latent_cnn_mel.npz")
    assert data["ids"] == clips["ids"].tolist() and data["labels"] == clips["labels"].tolist()
    for name, run in data["runs"].items():
        for method in data["methods"]:
            points = np.array(run["points"][method])
            assert points.shape == (len(data["ids"]), 2) and points.std(0).min() > 0
        right = np.mean(np.array(run["called"]) == data["labels"])
        assert right == pytest.approx(metrics["runs"][name]["test"]["accuracy"])
    sound = soundfile.info(io.BytesIO(base64.b64decode(data["sounds"][0])))
    assert sound.duration == pytest.approx(1, abs=0.2)  # five seconds without --smoke
    assert len(set(data["sounds"])) > 0.9 * len(data["ids"])


def test_the_maps_say_how_sure_and_let_hear_the_middle_of_the_clip(outputs, data_dir):
    data, folder = maps_data(outputs), outputs / "step11_latent"
    for name, run in data["runs"].items():
        model, checkpoint = load_model(folder / name / "best.pt")
        clips = np.load(folder / f"latent_{name}.npz")
        with torch.no_grad():
            logits = model.head(torch.from_numpy(clips["vectors"]))
        logits -= 0.5 * torch.tensor(checkpoint["settings"]["priors"]).log()
        sure, called = logits.softmax(1).max(1)
        assert run["called"] == called.tolist()
        assert run["probability"] == pytest.approx(sure.tolist(), abs=1e-3)
    sound_of, n_frames = functions_of("step11_latent.py")["sound_of"], round(SR / 512)
    for i in (0, 7):
        path = data_dir / "fma_genre_spectrograms" / "test" / f"{data['ids'][i]}.fused.full.npy"
        mel = np.load(path)[:128].astype(np.float16).astype(np.float32)
        first = (mel.shape[1] - n_frames) // 2
        assert data["sounds"][i] == sound_of(mel[:, first : first + n_frames])


@pytest.mark.parametrize("width", [400, 1400])
def test_the_maps_can_be_walked_in(browser, outputs, width):
    page, data = Page(browser, outputs / "step11_latent" / "maps.html", width), maps_data(outputs)
    page.wait("document.querySelectorAll('#map .points path').length > 5")
    assert page("shown.length") == len(data["ids"])
    page.page.check("[value=wrong]")
    run = data["runs"][next(iter(data["models"]))]
    wrong = sum(a != b for a, b in zip(run["called"], data["labels"], strict=True))
    assert page("shown.length") == wrong
    page.page.check("[value=all]")
    page.page.uncheck("#classes input >> nth=0")
    there = [i for i, label in enumerate(data["labels"]) if label != 0]
    assert page("shown") == there
    page.page.select_option("#model", "cnn_mel")
    page.page.select_option("#method", "t-SNE")
    page.page.focus("#map")
    page.page.keyboard.press("ArrowRight")
    points = np.array(data["runs"]["cnn_mel"]["points"]["t-SNE"])
    first = page("chosen")
    assert first == min(there, key=lambda i: points[i][0])
    page.page.keyboard.press("Enter")
    page.wait("audio.currentTime > 0.2")
    said = page.page.inner_text("#said")
    assert f"clip {data['ids'][first]}, {data['classes'][data['labels'][first]]}" in said
    assert "probability" in said
    # Hovering says the same of another clip; clicking plays it.
    # Of the one furthest to the right: the one chosen is furthest to the left.
    spots = [path.bounding_box() for path in page.page.locator("#map .points path").all()]
    spot = max(spots, key=lambda box: box["x"])
    at = spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2
    page.page.mouse.move(*at)
    page.wait("document.querySelector('#map .hovertext')")
    assert "clip " in page.page.text_content("#map .hoverlayer")
    page.page.mouse.click(*at)
    page.wait(f"chosen !== {first} && audio.currentTime > 0.2")
    assert page.fits() and not page.faults


@pytest.fixture(scope="module")
def separation():
    return functions_of("step11_latent.py")["separation"]


def test_separation_is_leave_one_out(separation):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 60)
    points = rng.standard_normal((60, 6)) + 0.8 * labels[:, None]
    hits, facts = separation(points, labels)
    knn, rows = KNeighborsClassifier(5), np.arange(len(labels))
    votes = cross_val_predict(knn, points, labels, cv=LeaveOneOut(), method="predict_proba")
    winners = votes == votes.max(1, keepdims=True)  # several, where as many neighbours are of each
    assert np.allclose(hits, winners[rows, labels] / winners.sum(1))
    assert facts["knn_accuracy"] == hits.mean() and ((hits > 0) & (hits < 1)).any()
    turned, _ = separation(points, 3 - labels)  # the classes' numbers decide nothing
    assert np.array_equal(hits, turned)
    # With the clip itself among its neighbours, random labels would look separable.
    hits, _ = separation(rng.standard_normal((400, 50)), rng.integers(0, 4, 400))
    assert hits.mean() < 0.35


def test_separation_sees_apart_and_mixed(separation):
    labels = np.repeat([0, 1], 30)
    noise = np.random.default_rng(2).standard_normal((60, 3))
    hits, apart = separation(noise + 20 * labels[:, None], labels)
    _, mixed = separation(noise, labels)
    assert hits.all() and apart["silhouette"] > 0.8 > 0.1 > mixed["silhouette"]


def test_too_few_test_clips_are_named(tmp_path, outputs):
    data = write_data_set(tmp_path / "data", per_class=(6, 1), n_emotion=(4, 1), n_frames=64)
    for beat in ("", "_beat"):
        labels = data / f"fma_genre_spectrograms{beat}" / "test_labels.txt"
        header, *lines = labels.read_text().splitlines()
        few = [line for line in lines if "Blues" in line or "Jazz" in line]
        labels.write_text("\n".join([header, *few]) + "\n")
    out = tmp_path / "out"
    shutil.copytree(outputs / "step07_cnn" / "cnn_mel", out / "step07_cnn" / "cnn_mel")
    flags = ("--smoke", "--data-dir", data, "--out-dir", out)
    result = run_script("step11_latent.py", *flags, check=False)
    assert_clean_error(result, "2 genre test clips of 2 classes", "too few")
    assert "passing over" in result.stdout  # a network of other clips, though of the same classes
