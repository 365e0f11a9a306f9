"""Steps 7 and 11: the CNN, its comparison with the LSTM, and the latent vectors."""

import copy
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COUNTS, MERGED, assert_clean_error, genre_predictions, run_script, write_data_set
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import common
import step07_cnn
import step11_latent
from common import Classifier, CNNBackbone, load_checkpoint, load_genre_test, load_model, make_loader, predict, read_entries


N_TEST = sum(COUNTS[genre][1] for genre in MERGED)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Classes as unequal as in the shared set; clips of little more than one window, as two epochs are to be quick."""
    return write_data_set(tmp_path_factory.mktemp("data"), per_class=COUNTS, n_emotion=(2, 1), n_frames=(270, 320), n_beats=(14, 40), dtype=np.float32)


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


VALIDATED = ["cnn_mel", "cnn_mel_seed43", "cnn_mel_seed44"]
ALL_CLIPS = ["cnn_mel_all_clips", "cnn_mel_seed43_all_clips", "cnn_mel_seed44_all_clips"]


def read_metrics(outputs, step):
    return json.loads((outputs / step / "metrics.json").read_text())


@pytest.mark.parametrize(
    "step, figures",
    [
        ("step07_cnn", {"digit_activations", "genre_activations", "block_operations", "filters", "learning_curve", "per_class", "confusion"}),
        ("step11_latent", {"maps", "knn_accuracy"}),
    ],
)
def test_report_is_whole(outputs, step, figures):
    summary = (outputs / step / "summary.md").read_text()
    for name in figures:
        assert (outputs / step / f"{name}.png").stat().st_size > 5000
        assert f"]({name}.png)" in summary
    assert {path.stem for path in (outputs / step).glob("*.png")} == figures
    for word in ("nan", "None", "{", "tensor("):
        assert word not in summary, word


def test_answers_carry_the_ids_of_their_clips(outputs, data_dir):
    model, checkpoint = load_model(outputs / "step07_cnn" / "cnn_mel" / "best.pt")
    args = SimpleNamespace(skip_bad=False, allow_leak=False)
    step = SimpleNamespace(data=data_dir, device="cpu", args=args)
    _, targets, _ = step07_cnn.test_answers(step, model, checkpoint["settings"])
    labels = {entry.clip_id: entry.label for entry in read_entries(data_dir, "genre", "test", merge=True)}
    assert list(labels) != sorted(labels)  # or the order could not show
    assert {clip_id: checkpoint["settings"]["classes"][k] for clip_id, k in targets.items()} == labels


def test_metrics_of_the_cnn(outputs):
    metrics = read_metrics(outputs, "step07_cnn")
    assert set(metrics["runs"]) == {*VALIDATED, *ALL_CLIPS, "cnn_ensemble", "cnn_lstm_ensemble"}
    assert {name for name, run in metrics["runs"].items() if "val" in run} == set(VALIDATED)
    assert metrics["runs"]["cnn_ensemble"]["members"] == ALL_CLIPS
    run = metrics["runs"]["cnn_mel"]
    assert {"epochs", "train_seconds", "val", "test", "weights"} <= set(run)
    for other in metrics["runs"].values():
        test = other["test"]
        assert len(test["accuracy_ci95"]) == len(test["macro_f1_ci95"]) == 2 and test["n_clips"] == N_TEST
    difference = metrics["paired_difference"]["mel"]
    assert difference["accuracy"] == pytest.approx(run["test"]["accuracy"] - metrics["compared_with"]["mel"]["test"]["accuracy"])
    # Clips that one model alone has right account for the whole difference.
    assert difference["only_first"] - difference["only_second"] == round(N_TEST * difference["accuracy"])
    table = genre_predictions(outputs / "step07_cnn").pivot(index="clip", columns="model", values="prediction")
    assert len(table) == N_TEST
    assert metrics["digits"]["accuracy"][-1] > 0.5 > metrics["digits"]["accuracy"][0]


def test_ensemble_is_of_different_networks(outputs):
    states = [load_checkpoint(outputs / "step07_cnn" / name / "best.pt")["state"] for name in (*VALIDATED, *ALL_CLIPS)]
    first = [state["backbone.blocks.0.0.weight"] for state in states]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_all_clips_means_training_and_validation_clips_and_no_other(data_dir, tmp_path, monkeypatch):
    loaders, starts = [], []

    def spy(model, train_loader, val_loader, *rest, **options):
        loaders.append((set(train_loader.dataset.indices), val_loader and set(val_loader.dataset.indices)))
        starts.append(copy.deepcopy(model.state_dict()))
        return train(model, train_loader, val_loader, *rest, **options)

    train = common.train
    monkeypatch.setattr(common, "train", spy)
    args = common.parse_args(common.make_parser("", training=True), ["--data-dir", str(data_dir), "--out-dir", str(tmp_path), "--device", "cpu"])
    step = common.Step("step07_cnn", args)
    for all_clips in (False, True):
        _, _, result = common.train_genre(step, "cnn_mel", epochs=3, all_clips=all_clips)
    (some, val), (every, none) = loaders
    n_clips = len(read_entries(data_dir, "genre", "train", merge=True))
    assert not some & val and some | val == every == set(range(n_clips)) and none is None
    assert result["n_train"] == n_clips and result["n_val"] == 0 and result["val_score"] is None
    # It goes on from the network that was kept, for a quarter as long, and leaves it as it is.
    kept, further = (load_checkpoint(tmp_path / "step07_cnn" / name / "best.pt")["state"] for name in ("cnn_mel", "cnn_mel_all_clips"))
    assert result["epochs"] == 1 and all(torch.equal(starts[1][key], kept[key]) for key in kept)
    assert not all(torch.equal(further[key], kept[key]) for key in kept)


def test_ensemble_averages_by_clip_id():
    """Frames and beats may list the clips in another order; averaging by position would mix clips."""
    classes, ids = ["a", "b"], [str(i) for i in range(6)]
    truth = np.array([0, 1, 0, 1, 0, 1])
    sure = step07_cnn.pd.DataFrame(np.where(truth[:, None] == [0, 1], -0.01, -5.0), ids, classes)
    backwards = sure.iloc[::-1]
    targets = step07_cnn.pd.Series(truth, ids)
    tested = {"cnn_mel": ({}, targets, sure * 0 - 0.7), "beat_mel": ({}, targets.iloc[::-1], backwards)}
    runs = step07_cnn.score_ensembles(tested, ["cnn_mel"], "beat_mel")
    assert runs["cnn_lstm_ensemble"]["test"]["accuracy"] == 1


def test_rivals_are_the_lstm_on_mel_and_the_best_by_validation(outputs):
    """A checkpoint of step 5 with a better validation score must come into the comparison."""
    metrics = read_metrics(outputs, "step07_cnn")
    assert set(metrics["compared_with"]) == set(metrics["paired_difference"]) == {"mel", "chroma"}
    assert metrics["runs"]["cnn_lstm_ensemble"]["members"][-1] == "chroma"


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 200)
    poor = np.where(rng.random(200) < 0.4, targets, (targets + 1) % 3)
    better = np.where(rng.random(200) < 0.3, targets, poor)
    same = step07_cnn.paired_bootstrap(targets, poor, poor, 3)
    assert same["accuracy"] == 0 and same["accuracy_ci95"] == [0, 0] and same["only_first"] == 0
    result = step07_cnn.paired_bootstrap(targets, better, poor, 3)
    assert result["only_second"] == 0 and result["only_first"] == ((better == targets) & (poor != targets)).sum()
    assert 0 < result["accuracy_ci95"][0] < result["accuracy"] < result["accuracy_ci95"][1]
    # Pairing is the point: a model that adds to another's hits is shown to be better even
    # where the two models' own intervals overlap.
    back = step07_cnn.paired_bootstrap(targets, poor, better, 3)
    assert back["macro_f1"] == -result["macro_f1"] and back["macro_f1_ci95"] == [-v for v in result["macro_f1_ci95"][::-1]]


def test_overfit_batch_passes_where_labels_can_be_learned(data_dir, tmp_path):
    result = run_script("step07_cnn.py", "--overfit-batch", "--smoke", "--data-dir", data_dir, "--out-dir", tmp_path)
    check = read_metrics(tmp_path, "step07_cnn")["overfit"]["cnn_mel"]
    assert check["loss"] < 0.01 and check["accuracy"] == 1
    assert "accuracy 1.000" in result.stdout
    assert not (tmp_path / "step07_cnn" / "cnn_mel" / "best.pt").exists()  # a check leaves no model behind


def test_overfit_batch_fails_on_equal_clips_of_different_classes(tmp_path):
    """Nothing can tell these clips apart: passing would mean that the check checks nothing."""
    data = write_data_set(tmp_path / "data", per_class=(4, 1), n_emotion=(4, 1), n_frames=64)
    clips = sorted((data / "fma_genre_spectrograms" / "train").glob("*.npy"))
    for path in clips[1:]:
        shutil.copy(clips[0], path)
    result = run_script("step07_cnn.py", "--overfit-batch", "--subset", 10, "--batch-size", 10, "--data-dir", data, "--out-dir", tmp_path / "out", check=False)
    assert_clean_error(result, "not learned by heart", "loss", "accuracy", code=1)
    assert not (tmp_path / "out" / "step07_cnn" / "metrics.json").exists()


def test_four_blocks_of_four_operations_in_the_labs_order():
    backbone = CNNBackbone()
    assert len(backbone.blocks) == 4
    for block in backbone.blocks:
        assert [type(operation) for operation in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
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
    torch.testing.assert_close(backbone(both, torch.tensor([10, 400]))[:1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batch_of_one():
    model = Classifier(CNNBackbone(), 7).eval()
    x, lengths = torch.randn(3, 100, 128), torch.tensor([100, 80, 90])
    assert model(x[:1], lengths[:1]).shape == (1, 7)
    loader = [(x[:2], torch.tensor([0, 1]), lengths[:2]), (x[2:], torch.tensor([2]), lengths[2:])]
    logits, targets = predict(model, loader, window=64)
    assert logits.shape == (3, 7) and targets.tolist() == [0, 1, 2]


def test_digit_cnn_leaves_out_what_it_says():
    def operations(without):
        return [type(module).__name__ for module in step07_cnn.digit_cnn(without).modules()]

    for name in step07_cnn.OPERATIONS[1:]:
        assert operations(None).count(name) == 2 and name not in operations(name)
    assert step07_cnn.digit_cnn("Conv2d")[0][0].kernel_size == (1, 1)
    for without in (None, *step07_cnn.OPERATIONS):
        assert step07_cnn.digit_cnn(without)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_activations_are_what_the_network_computes():
    model = step07_cnn.digit_cnn().eval()
    x = torch.rand(3, 1, 8, 8)
    maps = step07_cnn.activations(model[:2], x)
    assert list(maps) == [(block, name) for block in (1, 2) for name in step07_cnn.OPERATIONS]
    torch.testing.assert_close(model[2:](maps[2, "MaxPool2d"]), model(x))


def test_latent_files(outputs, data_dir):
    metrics = read_metrics(outputs, "step11_latent")
    assert len(metrics["roles"]) == 3 and metrics["roles"]["cnn_mel"] == "CNN"
    for name in metrics["roles"]:
        model, checkpoint = load_model(outputs / "step11_latent" / name / "best.pt")
        clips = np.load(outputs / "step11_latent" / f"latent_{name}.npz", allow_pickle=False)
        test = load_genre_test(data_dir, checkpoint["settings"])
        assert clips["vectors"].shape == (len(test), model.backbone.feature_size)
        assert clips["ids"].tolist() == [entry.clip_id for entry in test.store.entries]
        assert [clips["classes"][k] for k in clips["labels"]] == [entry.label for entry in test.store.entries]
        # These are the very vectors that the output layer answers to.
        logits, _ = predict(model, make_loader(test, 8), window=checkpoint["settings"]["window"])
        with torch.no_grad():
            torch.testing.assert_close(model.head(torch.from_numpy(clips["vectors"])), logits, rtol=0.05, atol=0.02)
        assert metrics["runs"][name]["test"]["n_clips"] == len(test)


def test_best_and_worst_lstm_by_validation(outputs):
    metrics = read_metrics(outputs, "step11_latent")
    val = {name: load_checkpoint(outputs / "step11_latent" / name / "best.pt")["val_score"] for name in step11_latent.LSTMS}
    roles = {role: name for name, role in metrics["roles"].items()}
    assert val[roles["best LSTM"]] == max(val.values()) and val[roles["worst LSTM"]] == min(val.values())
    assert roles["best LSTM"] != roles["worst LSTM"]


def test_separation_is_leave_one_out():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 60)
    points = rng.standard_normal((60, 6)) + 0.8 * labels[:, None]
    measured = step11_latent.separation(points, labels)
    expected = cross_val_predict(KNeighborsClassifier(5), points, labels, cv=LeaveOneOut())
    assert np.array_equal(measured["guesses"], expected)
    # With the clip itself among its neighbours, random labels would look separable.
    chance = step11_latent.separation(rng.standard_normal((400, 50)), rng.integers(0, 4, 400))
    assert chance["hits"].mean() < 0.35


def test_separation_sees_apart_and_mixed():
    labels = np.repeat([0, 1], 30)
    noise = np.random.default_rng(2).standard_normal((60, 3))
    apart = step11_latent.separation(noise + 20 * labels[:, None], labels)
    mixed = step11_latent.separation(noise, labels)
    assert apart["hits"].all() and apart["silhouette"] > 0.8 > 0.1 > mixed["silhouette"]


def test_too_few_test_clips_are_named(tmp_path, outputs):
    data = write_data_set(tmp_path / "data", per_class=(6, 1), n_emotion=(4, 1), n_frames=64)
    for beat in ("", "_beat"):
        labels = data / f"fma_genre_spectrograms{beat}" / "test_labels.txt"
        labels.write_text("\n".join(labels.read_text().splitlines()[:1] + [line for line in labels.read_text().splitlines() if "Blues" in line or "Jazz" in line]) + "\n")
    for name in step11_latent.LSTMS:
        shutil.copytree(outputs / "step11_latent" / name, tmp_path / "out" / "step05_lstm" / name)
    shutil.copytree(outputs / "step07_cnn" / "cnn_mel", tmp_path / "out" / "step07_cnn" / "cnn_mel")
    result = run_script("step11_latent.py", "--smoke", "--data-dir", data, "--out-dir", tmp_path / "out", check=False)
    assert_clean_error(result, "2 genre test clips of 2 classes", "too few")
