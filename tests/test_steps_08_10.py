"""Steps 8, 9 and 10: regression, transfer, multitask. Each test fails on the bug it names."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import COUNTS, assert_clean_error, emotion_predictions, labels_of, read_metrics, run_script, submission, write_data_set
from scipy.stats import spearmanr

import common
import step09_transfer
import step10_multitask
from common import EMOTIONS, GENRE_RUNS

STEPS = ("step08_regression", "step09_transfer", "step10_multitask")
FLAGS = {"step08_regression": ["--batch-size", 8], "step09_transfer": ["--compare-depths"], "step10_multitask": ["--learned-weights"]}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """As many clips as in the shared set, of little more than one window, as two epochs are to be quick."""
    options = {"n_emotion": (64, 12), "n_frames": (270, 320), "n_beats": (14, 40), "dtype": np.float32}
    return write_data_set(tmp_path_factory.mktemp("data"), per_class=COUNTS, **options)


@pytest.fixture(scope="module")
def outputs(data_dir, tmp_path_factory):
    """One --smoke run of each step through its command line, one after another."""
    out = tmp_path_factory.mktemp("outputs")
    for name in STEPS:
        run_script(f"{name}.py", "--smoke", "--data-dir", data_dir, "--out-dir", out, *FLAGS[name], cwd=out)
    return out


@pytest.fixture
def step(data_dir, tmp_path):
    return make_step(data_dir, tmp_path)


def make_step(data, out, *flags, name="test"):
    return common.Step(name, common.parse_args(common.make_parser("x", training=True), ["--data-dir", str(data), "--out-dir", str(out), *flags]))


def metrics_of(outputs, name):
    return read_metrics(outputs / name)


# --- what the command lines leave behind


@pytest.mark.parametrize("name", STEPS)
def test_outputs_keep_the_contract(outputs, name):
    metrics = metrics_of(outputs, name)
    assert metrics["step"] == name and metrics["seconds"] > 0 and metrics["environment"]["torch"]
    folder = outputs / name
    assert json.loads((folder / "args.json").read_text())["smoke"] is True
    summary = (folder / "summary.md").read_text()
    assert "nan" not in summary.lower().replace("finance", "")
    figures = sorted(path.stem for path in folder.glob("*.png"))
    assert figures and all(f"]({figure}.png)" in summary for figure in figures)
    trained = [path.parent.name for path in folder.glob("*/best.pt") if path.parent.name not in GENRE_RUNS]
    assert trained and set(trained) <= set(metrics["runs"])
    for run in trained:
        record = metrics["runs"][run]
        history = pd.read_csv(folder / run / "history.csv")
        assert record["epochs"] == len(history) and record["train_seconds"] > 0 and record["val"]
        for axis in EMOTIONS:
            if axis in record["test"]:
                low, high = record["test"][f"{axis}_ci95"]
                assert low <= record["test"][axis] <= high


def test_run_names(outputs):
    runs = {name: set(metrics_of(outputs, name)["runs"]) for name in STEPS}
    assert {f"{network}_{axis}" for network in ("lstm", "cnn") for axis in EMOTIONS} | {"lstm", "cnn", "constant", "ridge", "svr"} == runs[STEPS[0]]
    assert {"transfer_valence", "scratch_valence"} | {f"transfer_valence_frozen{depth}" for depth in range(1, 5)} == runs[STEPS[1]]
    assert {"multitask", "multitask_scratch", "multitask_lstm", "multitask_learned", "multitask_average", "svr"} == runs[STEPS[2]]


def test_single_axis_run_is_scored_on_its_axis_only(outputs):
    test = metrics_of(outputs, STEPS[0])["runs"]["cnn_energy"]["test"]
    assert set(test) == {"energy", "energy_ci95", "n_clips"}
    assert metrics_of(outputs, STEPS[0])["runs"]["constant"]["test"]["mean_spearman"] == 0


@pytest.mark.parametrize("name", [STEPS[0], STEPS[2]])
def test_submission_has_the_competitions_format(outputs, data_dir, name):
    lines = (outputs / name / "submission.csv").read_text().splitlines()
    assert lines[0] == "Id.fused.full.npy.gz,valence,energy,danceability"
    ids = sorted(path.name.split(".")[0] for path in (data_dir / "multitask_dataset" / "test").glob("*.npy"))
    table = submission(outputs / name)
    assert sorted(table.index) == ids and table.shape == (len(ids), 3)
    assert ((0 <= table) & (table <= 1)).all(axis=None)


def test_scores_are_scipys_over_the_whole_held_out_set(outputs, data_dir):
    """With the truth of the label file, and over more clips than a batch holds: a mean over batches would differ."""
    table, labels = emotion_predictions(outputs / STEPS[0]), labels_of(data_dir, "emotion")
    assert table["clip"].nunique() > FLAGS[STEPS[0]][1]
    for row in ("lstm", "cnn", "ridge", "svr"):
        test = metrics_of(outputs, STEPS[0])["runs"][row]["test"]
        expected = []
        for i, axis in enumerate(EMOTIONS):
            rows = table[(table["model"] == row) & (table["target"] == axis)]
            expected.append(spearmanr([labels[clip][i] for clip in rows["clip"]], rows["prediction"]).statistic)
        assert [test[axis] for axis in EMOTIONS] == pytest.approx(expected)
        assert test["mean_spearman"] == pytest.approx(np.mean(expected))


def test_steps_8_to_10_hold_out_the_same_clips(outputs, data_dir):
    tables = [pd.read_csv(outputs / name / "predictions.csv", dtype={"Id": str}) for name in STEPS]
    labels = dict(common.read_labels(data_dir / "multitask_dataset" / "train_labels.txt"))
    for table in tables:
        assert table["Id"].tolist() == tables[0]["Id"].tolist()
        # Truth under its own name: valence is valence, whatever column it stood in.
        assert np.allclose(table[list(EMOTIONS)], [labels[clip_id] for clip_id in table["Id"]])


def test_step_9_gives_both_starts_the_same_budget_and_names_step_8(outputs):
    runs = metrics_of(outputs, STEPS[1])["runs"]
    assert runs["transfer_valence"]["epochs"] == runs["scratch_valence"]["epochs"]
    summary = (outputs / STEPS[1] / "summary.md").read_text()
    assert "cnn (step 8)" in summary and "has not been run" not in summary


def test_step_10_measures_its_weights_and_compares_with_both_steps(outputs):
    losses = metrics_of(outputs, STEPS[2])["losses"]
    for axis in EMOTIONS:
        assert losses["raw"][axis] * losses["weight"][axis] == pytest.approx(1, rel=1e-3)
        assert losses["learned_factor"][axis] != 1  # the learned weights did learn
    summary = (outputs / STEPS[2] / "summary.md").read_text()
    assert "cnn (step 8)" in summary and "transfer (step 9)" in summary


def test_earlier_scores_are_taken_from_the_same_clips_only(outputs, data_dir):
    ids = pd.read_csv(outputs / STEPS[0] / "predictions.csv", dtype={"Id": str})["Id"].tolist()
    same = make_step(data_dir, outputs, "--smoke")
    assert set(common.earlier_emotion(same, STEPS[0], ids)[0]) >= {"lstm", "cnn", "svr"}
    assert common.earlier_emotion(same, STEPS[0], ids[::-1]) == ({}, {})
    assert common.earlier_emotion(same, "step11_latent", ids) == ({}, {})
    for flags in ([], ["--smoke", "--seed", "7"]):  # a check is no result; another seed holds out other clips
        assert common.earlier_emotion(make_step(data_dir, outputs, *flags), STEPS[0], ids) == ({}, {})


def test_cross_validation_predicts_every_clip_once(data_dir, tmp_path):
    metrics = step10_multitask.main(["--smoke", "--epochs", "1", "--folds", "2", "--data-dir", str(data_dir), "--out-dir", str(tmp_path)])
    table, labels = emotion_predictions(tmp_path / STEPS[2]), labels_of(data_dir, "emotion")
    for _, rows in table.groupby(["model", "target"]):
        assert sorted(rows["clip"]) == sorted(labels)
    assert metrics["runs"]["multitask"]["test"]["n_clips"] == len(labels)


# --- losses and heads


def test_column_outputs_are_refused():
    """(B, 1) against (B,) broadcasts to (B, B) and pulls every prediction to the mean."""
    with pytest.raises(ValueError, match="broadcast"):
        common.RegressionLoss(0.25)(torch.rand(8, 1), torch.rand(8))
    for n_clips in (1, 5):  # a batch of one keeps its dimension
        x, lengths = torch.randn(n_clips, 64, 128), torch.full((n_clips,), 64)
        assert common.Regressor(common.CNNBackbone()).eval()(x, lengths).shape == (n_clips,)
        assert common.MultitaskRegressor(common.CNNBackbone()).eval()(x, lengths).shape == (n_clips, 3)


def test_multitask_gradient_reaches_every_head_and_the_backbone():
    torch.manual_seed(0)
    model, targets = common.MultitaskRegressor(common.CNNBackbone()), torch.rand(6, 3)
    loss = common.MultitaskLoss([0.25, 0.25, 0.17])(model(torch.randn(6, 64, 128), torch.full((6,), 64)), targets)
    loss.backward()
    for name, weights in model.named_parameters():
        assert weights.grad is not None and weights.grad.abs().sum() > 0, name


def test_each_head_answers_for_its_own_axis():
    class Vector(torch.nn.Module):
        """A clip's vector is its first frame."""

        feature_size = 20

        def forward(self, x, lengths):
            return x[:, 0]

    torch.manual_seed(0)
    model = common.MultitaskRegressor(Vector()).eval()
    x, lengths = torch.randn(6, 3, 20), torch.full((6,), 3)
    with torch.no_grad():  # the heads begin as good as silent
        for weights in model.heads.parameters():
            weights.add_(torch.randn_like(weights))
    for column, axis in enumerate(EMOTIONS):  # right on two axes: only the third one's head is corrected
        outputs = model(x, lengths)
        targets = outputs.detach().clone()
        targets[:, column] += torch.rand(6)
        model.zero_grad()
        common.MultitaskLoss([0.25, 0.25, 0.17])(outputs, targets).backward()
        largest = {name: max(weights.grad.abs().max().item() for weights in head.parameters()) for name, head in model.heads.items()}
        assert largest[axis] > 0.1 and all(value < 1e-3 for name, value in largest.items() if name != axis), largest


def test_multitask_loss_is_the_sum_of_the_three():
    outputs, targets, std = torch.rand(8, 3), torch.rand(8, 3), [0.3, 0.2, 0.1]
    single = [common.RegressionLoss(std[i])(outputs[:, i], targets[:, i]) for i in range(3)]
    assert common.MultitaskLoss(std)(outputs, targets).item() == pytest.approx(float(sum(single)))


@pytest.mark.parametrize("axis", EMOTIONS)
def test_axis_is_learned_from_its_own_column(step, monkeypatch, axis):
    """Valence once was loaded as energy, with the id column still in place: what the loss is shown is looked at."""
    shown, ids = {}, [entry.clip_id for entry in common.load_emotion(step, beat=True)[0].entries]
    train = common.train

    def spy(model, train_loader, val_loader, *rest, **options):
        for part in (train_loader.dataset, val_loader.dataset):
            shown.update({ids[index]: float(part.dataset[index][1]) for index in part.indices})
        return train(model, train_loader, val_loader, *rest, **options)

    monkeypatch.setattr(common, "train", spy)
    _, _, splits = common.emotion_folds(step, [GENRE_RUNS["beat_mel"]])
    split = splits[True][0]
    model, _, _ = common.train_emotion(step, f"run_{axis}", GENRE_RUNS["beat_mel"], split, axis, epochs=1)
    files = labels_of(step.data, "emotion", beat=True)
    expected = {clip_id: files[clip_id][EMOTIONS.index(axis)] for clip_id in (ids[index] for index in [*split.train, *split.val])}
    assert shown == pytest.approx(expected)
    trained = [ids[index] for index in split.train]
    assert model.config["mean"] == pytest.approx(np.mean([expected[clip_id] for clip_id in trained]), abs=1e-5)


# --- transfer


@pytest.fixture(params=["cnn_mel", "mel"])
def genre_checkpoint(request, step):
    """A genre model as step 5 or 7 saves it, its weights and batch statistics told apart from fresh ones."""
    torch.manual_seed(1)
    run = GENRE_RUNS[request.param]
    model = common.Classifier(common.make_backbone(run), 10)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value))
    path = step.folder / "genre.pt"
    common.save_checkpoint(path, model, {"stats": (torch.full((128,), -40.0), torch.full((128,), 15.0))}, epoch=1, val_score=0.5)
    return path, run, model


def test_transfer_takes_the_backbone_and_nothing_else(genre_checkpoint):
    path, _, model = genre_checkpoint
    backbone, _ = common.load_backbone_from_checkpoint(path)
    assert backbone.state_dict().keys() == model.backbone.state_dict().keys()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    head = common.Regressor(backbone).head[-1].weight
    assert head.shape == (1, backbone.feature_size) and not torch.isclose(head, model.head[-1].weight).any(0).all()


def test_frozen_blocks_stay_as_they_were(step, genre_checkpoint):
    """Batch normalisation included: frozen weights over moving statistics are not frozen."""
    path, run, model = genre_checkpoint
    _, _, splits = common.emotion_folds(step, [run])
    n_blocks = len(model.backbone.blocks)
    before = model.backbone.state_dict()
    for frozen in {1, n_blocks}:
        trained, _, _ = common.train_emotion(step, f"frozen{frozen}", run, splits[run.beat][0], "valence", init=path, frozen_blocks=frozen, epochs=2, batch_size=4)
        after = trained.backbone.state_dict()
        changed = {name for name in before if not torch.allclose(before[name].float(), after[name].float(), atol=1e-7)}
        free = {name for name in before if name.startswith("blocks.") and int(name.split(".")[1]) >= frozen}
        # What lies below the first block (a projection) feeds it and must be frozen with it.
        assert changed <= free, sorted(changed - free)
        assert bool(changed) == bool(free)


def test_best_genre_model_is_chosen_by_validation_score(data_dir, tmp_path):
    step = make_step(data_dir, tmp_path)
    classes = sorted({entry.label for entry in common.read_entries(data_dir, "genre", "train", merge=True)})
    assert common.genre_val_scores(step) == {}
    cases = {"mel": (0.3, False, classes), "beat_mel": (0.6, False, classes), "cnn_mel": (0.5, False, classes),
             "chroma": (0.9, True, classes), "fused": (0.8, False, classes[1:])}  # fmt: skip
    for name, (score, smoke, known) in cases.items():
        folder = tmp_path / ("step07_cnn" if name == "cnn_mel" else "step05_lstm") / name
        folder.mkdir(parents=True)
        model = common.Classifier(common.make_backbone(GENRE_RUNS[name]), len(known))
        common.save_checkpoint(folder / "best.pt", model, {"run": name, "classes": known, "smoke": smoke}, epoch=1, val_score=score)
    # Neither a smoke run's checkpoint nor one of other classes, however high its score.
    assert list(common.genre_val_scores(step)) == ["beat_mel", "cnn_mel", "mel"]


# --- splits, leaks, metrics


@pytest.mark.parametrize("folds", [1, 3])
def test_splits_are_disjoint_and_cover(step, folds):
    store, targets, splits = common.emotion_folds(step, [], folds)
    for split in splits[False]:
        assert sorted(np.concatenate(split)) == list(range(len(targets)))
    assert len(splits[False]) == folds
    _, held_out = common.held_out_clips(store, targets, splits)
    assert len(set(held_out)) == len(held_out) and (folds == 1 or len(held_out) == len(targets))


def test_beat_and_full_clips_are_split_alike_in_whatever_order_they_are_listed(tmp_path):
    data = write_data_set(tmp_path / "data", per_class=(2, 1))
    labels = data / "multitask_dataset_beat" / "train_labels.txt"
    header, *rows = labels.read_text().splitlines()
    labels.write_text("\n".join([header, *rows[::-1]]) + "\n")
    step = make_step(data, tmp_path)
    store, _, splits = common.emotion_folds(step, [GENRE_RUNS["beat_mel"]])
    beat_store, _ = common.load_emotion(step, beat=True)
    for part in ("train", "val", "test"):
        full, beat = (getattr(splits[kind][0], part) for kind in (False, True))
        assert [store.entries[i].clip_id for i in full] == [beat_store.entries[i].clip_id for i in beat]
    labels.write_text("\n".join([header, *rows[1:]]) + "\n")
    with pytest.raises(common.InputError, match=rows[0].split(",")[0]):
        common.emotion_folds(step, [GENRE_RUNS["beat_mel"]])


def leaky_data(root, same_id):
    """The tiny data set, with a held-out emotion clip put into the genre training split."""
    data = write_data_set(root / "data", per_class=(4, 1))
    store, _, splits = common.emotion_folds(make_step(data, root), [])
    entry = store.entries[splits[False][0].test[0]]
    clip_id = entry.clip_id if same_id else "999999"
    genre = data / "fma_genre_spectrograms"
    array = np.load(entry.path)
    np.save(genre / "train" / f"{clip_id}.fused.full.npy", array[:, ::-1] if same_id else array)
    with open(genre / "train_labels.txt", "a") as file:
        file.write(f"{clip_id}.fused.full.npy.gz\tRock\n")
    return data, entry.clip_id


@pytest.mark.parametrize(("name", "same_id"), [(STEPS[1], True), (STEPS[2], False)])
def test_leak_is_refused(tmp_path, name, same_id):
    """By id, or by content under another id."""
    data, clip_id = leaky_data(tmp_path, same_id)
    result = run_script(f"{name}.py", "--smoke", "--data-dir", data, "--out-dir", tmp_path / "out", check=False)
    assert_clean_error(result, clip_id, "genre training split", "--allow-leak")
    assert not (tmp_path / "out" / name / "metrics.json").exists()


def test_leak_is_allowed_by_flag_and_said(tmp_path, capsys):
    data, clip_id = leaky_data(tmp_path, True)
    step09_transfer.main(["--smoke", "--epochs", "1", "--allow-leak", "--data-dir", str(data), "--out-dir", str(tmp_path / "out")])
    assert clip_id in capsys.readouterr().err
    assert clip_id in (tmp_path / "out" / STEPS[1] / "summary.md").read_text()


def test_spearman_is_not_a_mean_over_batches():
    targets, predictions = np.arange(64.0), np.arange(64.0) % 8  # perfect in each batch of 8, nearly nothing over all
    assert common.spearman(targets, predictions) == pytest.approx(spearmanr(targets, predictions).statistic)
    assert common.spearman(targets, predictions) < 0.2
    columns = np.stack([targets, targets[::-1], predictions], axis=1)
    scores = common.emotion_scores(columns, columns[:, [0, 0, 0]])
    assert [scores[axis] for axis in EMOTIONS] == pytest.approx([spearmanr(columns[:, i], columns[:, 0]).statistic for i in range(3)])


def test_resampled_spearman_equals_scipys():
    rng = np.random.default_rng(3)
    targets, predictions = rng.random(20).round(1), rng.random(20)
    rows = np.random.default_rng(0).integers(0, 20, (30, 20))
    expected = [spearmanr(targets[sample], predictions[sample]).statistic for sample in rows]
    assert common.resampled_spearman(targets, predictions, 30) == pytest.approx(expected)
    assert not common.resampled_spearman(targets, np.ones(20), 30).any()


def test_difference_is_paired():
    """Two nearly equal models on few clips: wide intervals each, a narrow one of the difference."""
    rng = np.random.default_rng(0)
    targets = rng.random((50, 3))
    first = {axis: targets[:, i] + 0.4 * rng.standard_normal(50) for i, axis in enumerate(EMOTIONS)}
    second = {axis: values + 0.01 * rng.standard_normal(50) for axis, values in first.items()}
    value, (low, high) = common.emotion_difference(targets, first, second)
    alone_low, alone_high = common.emotion_scores(targets, np.stack(list(first.values()), 1))["mean_spearman_ci95"]
    assert low <= value <= high and high - low < (alone_high - alone_low) / 3
    assert "better" not in common.difference_text("a", "b", (0.1, [-0.1, 0.3]))
    assert "`b` is better" in common.difference_text("a", "b", (-0.2, [-0.3, -0.1]))
