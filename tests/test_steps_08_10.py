"""Steps 8, 9 and 10: regression, transfer, multitask. Each test fails on the bug it names."""

import ast
import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ROOT,
    assert_clean_error,
    emotion_predictions,
    labels_of,
    read_metrics,
    read_table,
    run_forked,
    run_script,
    submission,
    write_data_set,
)
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

import common
import patrec.errors
import patrec.files
import patrec.flags
import patrec.labels
import patrec.machine
import patrec.recipes
import patrec.scores
import patrec.step
import patrec.tables
from common import RegressionLoss, Regressor
from patrec.flags import Source
from patrec.labels import EMOTIONS
from patrec.recipes import GENRE_NETWORKS

STEPS = ("step08_regression", "step09_transfer", "step10_multitask")
FLAGS = {
    "step08_regression": ["--batch-size", 8],
    "step09_transfer": ["--compare-depths", "--batch-size", 8],
    "step10_multitask": ["--learned-weights", "--batch-size", 8],
}


@pytest.fixture(scope="module")
def outputs(data_dir, tmp_path_factory):
    """One --smoke run of each step through its command line, one after another."""
    out = tmp_path_factory.mktemp("outputs")
    for name in STEPS:
        where = ("--smoke", "--data-dir", data_dir, "--out-dir", out)
        run_script(f"{name}.py", *where, *FLAGS[name], cwd=out, timeout=900)
    return out


@pytest.fixture
def source(data_dir):
    return Source(data_dir)


@pytest.fixture
def make_step(monkeypatch):
    """Function: a Step of its own, as a script makes it."""

    def make(data, out, *flags, name="test"):
        argv = [name, "--data-dir", str(data), "--out-dir", str(out), *flags]
        monkeypatch.setattr("sys.argv", argv)
        return patrec.step.Step(name, "x", training=True)

    return make


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
    assert "nan" not in summary.lower().replace("np.nan", "").replace("finance", "")
    figures = sorted(path.stem for path in folder.glob("*.png"))
    assert figures and all(f"]({figure}.png)" in summary for figure in figures)
    trained = {path.parent.name for path in folder.glob("*/best.pt")} - set(GENRE_NETWORKS)
    assert trained and trained <= set(metrics["runs"])
    for run in trained:
        record = metrics["runs"][run]
        history = pd.read_csv(folder / run / "history.csv")
        assert record["epochs"] == len(history) and record["train_seconds"] > 0 and record["val"]
        for axis in EMOTIONS:
            if axis in record["test"]:
                low, high = record["test"][f"{axis}_ci95"]
                assert low <= record["test"][axis] <= high


@pytest.mark.parametrize("name", STEPS)
def test_every_lettered_item_has_a_heading_in_the_labs_order(outputs, name):
    number, letters = {8: "abcde", 9: "abcde", 10: "abcd"}, ""
    step = int(name[4:6])
    for line in (outputs / name / "summary.md").read_text().splitlines():
        if line.startswith(f"## {step}") and line[4 + len(str(step)) - 1] not in letters:
            letters += line[len(f"## {step}")]
    assert letters == number[step]


def test_8b_to_d_are_valence_energy_and_danceability(outputs):
    """In the lab's order, under which handin.py puts them, each with its own runs."""
    summary = (outputs / STEPS[0] / "summary.md").read_text()
    for letter, axis in zip("bcd", EMOTIONS, strict=True):
        part = summary.split(f"\n## 8{letter}. {axis.capitalize()}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| (\w+_\w+) \|", part, re.MULTILINE) == [
            f"lstm_{axis}",
            f"cnn_{axis}",
        ]
        assert f"learning_curves_{axis}.png" in part


def test_step_9_says_what_was_frozen_and_how_much_was_trained(outputs):
    folder, runs = outputs / STEPS[1], metrics_of(outputs, STEPS[1])["runs"]
    table = read_table(folder, f"{runs['head_valence']['n_train']} training clips;")
    assert set(table.index) == set(runs)
    for name, row in table.iterrows():
        n_frozen = 4 if name == "head_valence" else int(name.partition("frozen")[2] or 0)
        assert int(row["frozen blocks"]) == n_frozen
        assert int(row["trained weights"]) == runs[name]["trained_weights"]
        start = {
            "head": "genre weights, new",
            "scratch": "random",
            "transfer": "genre weights, head",
        }
        assert row["starts from"].startswith(start[name.split("_")[0]])


def test_run_names(outputs):
    runs = {name: set(metrics_of(outputs, name)["runs"]) for name in STEPS}
    single = {f"{kind}_{axis}" for kind in ("lstm", "cnn") for axis in EMOTIONS}
    assert single | {"lstm", "cnn", "constant", "ridge", "svr"} == runs[STEPS[0]]
    depths = {f"transfer_valence_frozen{depth}" for depth in range(1, 5)}
    assert {"head_valence", "transfer_valence", "scratch_valence"} | depths == runs[STEPS[1]]
    multitask = {f"multitask{end}" for end in ("", "_scratch", "_lstm", "_learned", "_average")}
    assert multitask | {"constant", "ridge", "svr"} == runs[STEPS[2]]


def test_single_axis_run_is_scored_on_its_axis_only(outputs):
    runs = metrics_of(outputs, STEPS[0])["runs"]
    assert set(runs["cnn_energy"]["test"]) == {"energy", "energy_ci95", "n_clips"}
    assert runs["constant"]["test"]["mean_spearman"] == 0


@pytest.mark.parametrize("name", [STEPS[0], STEPS[2]])
def test_submission_has_the_competitions_format(outputs, data_dir, name):
    lines = (outputs / name / "submission.csv").read_text().splitlines()
    assert lines[0] == "Id.fused.full.npy.gz,valence,energy,danceability"
    clips = (data_dir / "multitask_dataset" / "test").glob("*.npy")
    ids = sorted(path.name.split(".")[0] for path in clips)
    table = submission(outputs / name)
    assert sorted(table.index) == ids and table.shape == (len(ids), 3)
    assert ((table >= 0) & (table <= 1)).all(axis=None)


def test_scores_are_scipys_over_the_whole_held_out_set(outputs, data_dir):
    """With the label file's truth, over more clips than a batch holds: no mean over batches."""
    table, labels = emotion_predictions(outputs / STEPS[0]), labels_of(data_dir, "emotion")
    assert table["clip"].nunique() > FLAGS[STEPS[0]][1]
    for row in ("lstm", "cnn", "ridge", "svr"):
        test = metrics_of(outputs, STEPS[0])["runs"][row]["test"]
        expected = []
        for i, axis in enumerate(EMOTIONS):
            rows = table[(table["model"] == row) & (table["target"] == axis)]
            true = [labels[clip][i] for clip in rows["clip"]]
            expected.append(spearmanr(true, rows["prediction"]).statistic)
        assert [test[axis] for axis in EMOTIONS] == pytest.approx(expected)
        assert test["mean_spearman"] == pytest.approx(np.mean(expected))


def test_the_table_of_step_8_gives_rank_correlation_and_error(outputs):
    folder = outputs / STEPS[0]
    table, rows = read_table(folder, "Spearman's correlation on"), emotion_predictions(folder)
    runs = metrics_of(outputs, STEPS[0])["runs"]
    for name, own in rows.groupby("model"):
        squares = (own["truth"] - own["prediction"]) ** 2
        rmse = (squares.groupby(own["target"]).mean() ** 0.5).mean()
        written = float(table.loc[name, "RMSE, mean of the three"])
        assert written == pytest.approx(rmse, abs=6e-4), name
        for axis in EMOTIONS:
            assert table.loc[name, axis] == patrec.tables.with_interval(runs[name]["test"], axis)


def test_steps_8_to_10_hold_out_the_same_clips(outputs, data_dir):
    tables = [emotion_predictions(outputs / name) for name in STEPS]
    labels = dict(patrec.labels.read_labels(data_dir / "multitask_dataset" / "train_labels.txt"))
    for table in tables:
        assert set(table["clip"]) == set(tables[0]["clip"])
        assert set(table["fold"]) == {1} and set(table["seed"]) == {42}
        # Truth under its own name: valence is valence, whatever column it stood in.
        pairs = zip(table["clip"], table["target"], strict=True)
        expected = [labels[clip][EMOTIONS.index(axis)] for clip, axis in pairs]
        assert np.allclose(table["truth"], expected)


def test_step_9_names_step_8_and_does_not_train_its_regressor_again(outputs):
    """From scratch at the full budget is step 8's CNN: same network, clips, seed and recipe."""
    folder = outputs / STEPS[1]
    summary = (folder / "summary.md").read_text()
    assert "cnn (step 8)" in summary and "missing here" not in summary
    assert not list(folder.glob("scratch_full*"))


def test_step_9_without_step_8_trains_that_very_regressor(outputs, data_dir, tmp_path):
    """Bit for bit; and of another recipe nothing is taken over."""
    for folder in ("step09_transfer/cnn_mel",):
        (tmp_path / folder).mkdir(parents=True)
        for path in (outputs / folder).iterdir():
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    where = ("--data-dir", data_dir, "--out-dir", tmp_path, "--smoke", "--batch-size", 8)
    run_script("step09_transfer.py", *where, timeout=600)
    first = common.load_checkpoint(outputs / STEPS[0] / "cnn_valence" / "best.pt")
    second = common.load_checkpoint(tmp_path / STEPS[1] / "scratch_full_valence" / "best.pt")
    assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"])


@pytest.mark.parametrize(
    "genre_name, changes, twin",
    [
        ("cnn_mel", {}, True),
        ("mel", {}, False),  # another network, though trained by the same recipe
        ("cnn_mel", {"lr": 1e-3}, False),
        ("cnn_mel", {"n_train": 9}, False),
        ("cnn_mel", {"epochs": 1}, False),  # cut short
    ],
)
def test_a_twin_is_the_same_network_trained_alike(genre_name, changes, twin):
    """Its answers stand under `scratch_full`, the name of step 9's own network."""
    (function,) = (
        node
        for node in ast.parse((ROOT / "step09_transfer.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "is_twin"
    )
    facts = {"planned_epochs": 4, "epochs": 4, "lr": 2e-3, "batch_size": 8, "n_train": 46}
    runs = {"cnn": {"network": "cnn_mel"}, "cnn_valence": facts | changes}
    recipe = patrec.recipes.Recipe(4, 2e-3, 8)
    known = {
        "plan": lambda network, data, training: recipe,
        "data": SimpleNamespace(train=range(46)),
        "step": SimpleNamespace(training=None),
        "step8": patrec.tables.EarlierPredictions({}, runs, ""),
        "network": None,
        "emotions": ("valence",),
        "genre_name": genre_name,
    }
    exec(compile(ast.Module([function], []), "step09_transfer.py", "exec"), known)
    assert known["is_twin"]("cnn") is twin


def test_the_short_twins_have_the_same_budget(source):
    """Both phases of the fine-tuning together and the short training from scratch."""
    data = common.load_data(source, target="emotion", crop=256)
    args = patrec.flags.make_parser("x", training=True).parse_args([])
    plans = [
        patrec.recipes.make_recipe(GENRE_NETWORKS["cnn_mel"], data, args, share)
        for share in (0.05, 0.25, 0.3, 1.0)
    ]
    head, tune, scratch, full = (recipe.epochs * recipe.crops for recipe in plans)
    assert abs(head + tune - scratch) <= 2 and scratch == pytest.approx(0.3 * full, rel=0.1)
    args = patrec.flags.make_parser("x", training=True).parse_args(["--epochs", "40"])
    assert patrec.recipes.make_recipe(GENRE_NETWORKS["cnn_mel"], data, args, 0.25).epochs == 10


def test_step_10_measures_its_loss_and_compares_with_both_steps(outputs):
    losses = metrics_of(outputs, STEPS[2])["losses"]
    for axis in EMOTIONS:
        raw, weight, weighted, order, term, factor = (
            losses[key][axis]
            for key in ("raw", "weight", "weighted", "order", "term", "learned_factor")
        )
        assert weighted == pytest.approx(raw * weight) and term == pytest.approx(weighted + order)
        assert 0 <= order <= 1 and 0.2 < weighted < 5  # before training: near the mean label
        assert weighted != 1  # measured on a batch, not divided by itself
        assert factor != 0.5  # the learned weights did learn
    summary = (outputs / STEPS[2] / "summary.md").read_text()
    assert "cnn (step 8)" in summary and "transfer (step 9)" in summary
    runs = metrics_of(outputs, STEPS[0])["runs"] | metrics_of(outputs, STEPS[2])["runs"]
    shared, alone = (f"{runs[name]['weights']:,}" for name in ("multitask_scratch", "cnn"))
    words = " ".join(summary.split())
    assert f"network has {shared} weights, step 8's three have {alone}." in words
    # The fair comparison stands first: alone and together, both from scratch.
    assert summary.index("`multitask_scratch` minus `cnn (step 8)`") < summary.index("`svr`")


def test_earlier_scores_are_taken_from_the_same_clips_only(outputs, data_dir, make_step, tmp_path):
    table = emotion_predictions(outputs / STEPS[0])
    ids = table["clip"].unique().tolist()
    copy = tmp_path / STEPS[0]
    copy.mkdir()
    for name in ("metrics.json", "predictions.csv"):
        (copy / name).write_bytes((outputs / STEPS[0] / name).read_bytes())
    same = make_step(data_dir, tmp_path, "--smoke")
    answers, _, _ = patrec.tables.earlier_predictions(same.training, STEPS[0], ids)
    assert set(answers) >= {"lstm", "cnn", "svr"} and list(answers["cnn"].index) == ids
    assert patrec.tables.earlier_predictions(same.training, STEPS[0], ids[:-1])[:2] == ({}, {})
    assert patrec.tables.earlier_predictions(same.training, "step11_latent", ids)[:2] == ({}, {})
    # A check is no result; another seed holds out other clips.
    for number, flags in enumerate(([], ["--smoke", "--seed", "7"])):
        other = make_step(data_dir, tmp_path, *flags, name=f"other{number}")
        assert patrec.tables.earlier_predictions(other.training, STEPS[0], ids)[:2] == ({}, {})


def test_cross_validation_predicts_every_clip_once(data_dir, tmp_path):
    flags = ("--smoke", "--epochs", 1, "--folds", 2, "--data-dir", data_dir, "--out-dir", tmp_path)
    run_script("step10_multitask.py", *flags, timeout=600)
    table, labels = emotion_predictions(tmp_path / STEPS[2]), labels_of(data_dir, "emotion")
    for _, rows in table.groupby(["model", "target"]):
        assert sorted(rows["clip"]) == sorted(labels)
    assert (table.groupby("fold")["clip"].nunique() == len(labels) / 2).all()
    assert set(table["fold"]) == {1, 2} and table.groupby("clip")["fold"].nunique().max() == 1
    test = metrics_of(tmp_path, STEPS[2])["runs"]["multitask"]["test"]
    assert test["n_clips"] == len(labels)


# --- losses and heads


def small_regressor(names=EMOTIONS):
    return Regressor(common.CNNBackbone(), names, [0.5] * len(names), [0.25] * len(names))


def test_column_outputs_are_refused():
    """(B, 1) against (B,) broadcasts to (B, B) and pulls every prediction to the mean."""
    with pytest.raises(ValueError, match="broadcast"):
        common.regression_loss(torch.rand(8, 1), torch.rand(8), 0.25)
    with pytest.raises(ValueError, match="broadcast"):
        RegressionLoss([0.25])(torch.rand(8, 1), torch.rand(8))
    for n_clips in (1, 5):  # a batch of one keeps its dimension
        x, lengths = torch.randn(n_clips, 64, 128), torch.full((n_clips,), 64)
        for names in (EMOTIONS, EMOTIONS[:1]):
            assert small_regressor(names).eval()(x, lengths).shape == (n_clips, len(names))


def test_multitask_gradient_reaches_every_head_and_the_backbone():
    torch.manual_seed(0)
    model, targets = small_regressor(), torch.rand(6, 3)
    outputs = model(torch.randn(6, 64, 128), torch.full((6,), 64))
    RegressionLoss([0.25, 0.25, 0.17])(outputs, targets).backward()
    for name, weights in model.named_parameters():
        assert weights.grad is not None and weights.grad.abs().sum() > 0, name


def test_each_head_answers_for_its_own_axis():
    torch.manual_seed(0)
    model = small_regressor().eval()
    for head in model.heads.values():  # untrained heads answer all clips alike
        torch.nn.init.normal_(head.weight)
    x, lengths = torch.randn(6, 64, 128), torch.full((6,), 64)
    # Right on two axes: only the third one's head is corrected.
    for column, axis in enumerate(EMOTIONS):
        outputs = model(x, lengths)
        targets = outputs.detach().clone()
        targets[:, column] += torch.rand(6)
        model.zero_grad()
        RegressionLoss([0.25, 0.25, 0.17])(outputs, targets).backward()
        largest = {
            name: max(weights.grad.abs().max().item() for weights in head.parameters())
            for name, head in model.heads.items()
        }
        others = [value for name, value in largest.items() if name != axis]
        assert largest[axis] > 0.1 and max(others) < 1e-3, largest


def test_multitask_loss_is_the_sum_of_the_three():
    outputs, targets, std = torch.rand(8, 3), torch.rand(8, 3), [0.3, 0.2, 0.1]
    single = [RegressionLoss([std[i]])(outputs[:, [i]], targets[:, [i]]) for i in range(3)]
    whole = RegressionLoss(std)
    assert whole(outputs, targets).item() == pytest.approx(float(sum(single)))
    assert whole.terms(outputs, targets).tolist() == pytest.approx([float(s) for s in single])


def test_a_loss_is_squared_error_over_variance_and_half_of_one_minus_pearson():
    rng = np.random.default_rng(0)
    outputs, targets = rng.random(20), rng.random(20)
    expected = np.mean((outputs - targets) ** 2) / 0.3**2
    expected += 0.5 * (1 - np.corrcoef(outputs, targets)[0, 1])
    found = common.regression_loss(torch.tensor(outputs), torch.tensor(targets), 0.3)
    assert found.item() == pytest.approx(expected)


def test_learned_weights_reach_the_minimum_known_in_closed_form():
    """L exp(-s) / 2 + s / 2 is least where exp(s) = L, and is (1 + log L) / 2 there."""
    torch.manual_seed(0)
    outputs, targets, std = torch.rand(16, 3), torch.rand(16, 3), [0.3, 0.2, 0.1]
    loss_fn = RegressionLoss(std, learned=True)
    terms = RegressionLoss(std).terms(outputs, targets).double()
    s = loss_fn.log_var
    assert loss_fn(outputs, targets).item() == pytest.approx(terms.sum().item() / 2)  # s = 0
    optimizer = torch.optim.LBFGS([s], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(outputs, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert s.detach().exp().tolist() == pytest.approx(terms.tolist(), rel=1e-2)
    least = sum((1 + math.log(term)) / 2 for term in terms.tolist())
    assert loss_fn(outputs, targets).item() == pytest.approx(least, rel=1e-4)
    assert not RegressionLoss(std).log_var.requires_grad


@pytest.mark.parametrize("axis", EMOTIONS)
def test_axis_is_learned_from_its_own_column(data_dir, source, axis):
    """Valence once was loaded as energy, the id column still in place: what the loss is shown."""
    data = common.load_data(source, "mel", True, axis)
    labels = labels_of(data_dir, "emotion", beat=True)
    for part in (data.train, data.val, data.held_out):
        ids, batches = common.clip_ids(part), DataLoader(part, 8)
        shown = torch.cat([targets for _, targets, _ in batches])
        assert shown.shape == (len(ids), 1)
        expected = [labels[clip_id][EMOTIONS.index(axis)] for clip_id in ids]
        assert shown[:, 0].tolist() == pytest.approx(expected)
    known = [labels[clip_id][EMOTIONS.index(axis)] for clip_id in common.clip_ids(data.train)]
    assert data.mean == pytest.approx([np.mean(known)], abs=1e-5)
    assert data.std == pytest.approx([np.std(known)], abs=1e-5)


# --- transfer


@pytest.fixture(params=["cnn_mel", "mel"])
def genre_checkpoint(request, tmp_path):
    """A genre model as step 5 or 7 saves it, its weights and statistics unlike fresh ones."""
    torch.manual_seed(1)
    network = GENRE_NETWORKS[request.param]
    model = common.Classifier(common.make_backbone(network), 10)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value))
    path = tmp_path / "genre.pt"
    stats = torch.full((128,), -40.0), torch.full((128,), 15.0)
    common.save_checkpoint(path, model, {"stats": stats}, epoch=1, val_score=0.5)
    return path, network, model


def test_transfer_takes_the_backbone_and_nothing_else(genre_checkpoint):
    path, _, model = genre_checkpoint
    backbone = common.load_backbone(path)
    assert backbone.state_dict().keys() == model.backbone.state_dict().keys()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    head = Regressor(backbone, ["valence"], [0.5], [0.2]).heads["valence"].weight
    assert head.shape == (1, backbone.feature_size)
    assert not torch.isclose(head, model.head[-1].weight).any(0).all()


def test_frozen_blocks_stay_as_they_were(data_dir, tmp_path, make_step, genre_checkpoint):
    """Batch normalisation included: frozen weights over moving statistics are not frozen."""
    path, network, model = genre_checkpoint
    step = make_step(data_dir, tmp_path, "--epochs", "2", "--batch-size", "8")
    n_blocks, before = len(model.backbone.blocks), model.backbone.state_dict()
    for frozen in {1, n_blocks}:
        run = common.Experiment(
            f"frozen{frozen}", network,
            lambda _, data, frozen=frozen: Regressor(
                common.load_backbone(path, frozen), data.names, data.mean, data.std),
            lambda data: RegressionLoss(data.std), torch.optim.AdamW, target="valence",
        )  # fmt: skip
        trained = common.train_all(step.training, [run])[run.name]
        unfrozen = [w for block in model.backbone.blocks[frozen:] for w in block.parameters()]
        stem = [] if frozen else [*model.backbone.stem.parameters()]
        n_trained = sum(w.numel() for w in [*unfrozen, *stem, *trained.model.heads.parameters()])
        assert trained.facts["trained_weights"] == n_trained
        after = trained.model.backbone.state_dict()
        changed = {
            name
            for name in before
            if not torch.allclose(before[name].float(), after[name].float(), atol=1e-7)
        }
        free = {
            name
            for name in before
            if name.startswith("blocks.") and int(name.split(".")[1]) >= frozen
        }
        # What lies below the first block (a projection) feeds it and must be frozen with it.
        assert changed <= free, sorted(changed - free)
        assert bool(changed) == bool(free)


def test_fine_tuning_goes_on_from_the_head_that_was_learned_first(outputs):
    """The second phase frees the backbone and keeps the head: frozen, it changes the head alone."""
    states = {
        name: common.load_checkpoint(outputs / STEPS[1] / name / "best.pt")["state"]
        for name in ("head_valence", "transfer_valence", "transfer_valence_frozen4")
    }
    head, tuned, frozen = states.values()
    blocks = [key for key in head if key.startswith("backbone.blocks.")]
    assert all(torch.equal(head[key], frozen[key]) for key in blocks)
    assert not all(torch.equal(head[key], tuned[key]) for key in blocks)
    key = "heads.valence.weight"
    cosine = torch.nn.functional.cosine_similarity(head[key], frozen[key]).item()
    assert not torch.equal(head[key], frozen[key]) and cosine > 0.5
    # Nearer to the head that was learned than to a new one drawn by the same seed.
    (path,) = outputs.glob("*/cnn_mel/best.pt")
    folder = outputs / STEPS[1]
    args = common.load_checkpoint(folder / "head_valence" / "best.pt")["spec"]["head_args"]
    patrec.machine.seed_everything(42)
    new = Regressor(common.load_backbone(path, 4), **args).heads["valence"].weight
    assert (frozen[key] - head[key]).norm() < (frozen[key] - new).norm()


def test_best_genre_model_is_chosen_by_validation_score(data_dir, tmp_path, make_step):
    step = make_step(data_dir, tmp_path)
    assert common.genre_val_scores(step.training).empty
    cases = {
        "mel": (0.3, {}),
        "beat_mel": (0.6, {}),
        "cnn_mel": (0.5, {}),
        "chroma": (0.9, {"smoke": True}),
        "fused": (0.8, {"fingerprint": "of other clips"}),
        "beat_chroma": (0.7, {"seed": 43}),
    }
    for name, (score, odd) in cases.items():
        network = GENRE_NETWORKS[name]
        folder = "step07_cnn" if name == "cnn_mel" else "step05_lstm"
        (tmp_path / folder / name).mkdir(parents=True)
        data = common.load_data(step.source, network.features, network.beat)
        settings = (
            data.settings | {"run": name, "window": patrec.recipes.window_size(network)} | odd
        )
        model = common.Classifier(common.make_backbone(network), len(data.names))
        path = tmp_path / folder / name / "best.pt"
        facts = {"planned_epochs": 1, "n_val": 9}
        common.save_checkpoint(path, model, settings, epoch=1, val_score=score, facts=facts)
    # Neither a smoke run's checkpoint nor one of other clips or another seed, whatever its score.
    assert list(common.genre_val_scores(step.training).index) == ["beat_mel", "cnn_mel", "mel"]


def test_networks_on_beats_are_no_candidates_of_step_9(outputs, data_dir, tmp_path):
    """9c names fma_genre_spectrograms; the best of the others is taken."""
    step = ("--smoke", "--data-dir", data_dir, "--out-dir", tmp_path)
    run_script("step05_lstm.py", *step, "--epochs", 1, "--features", "mel", "beat_mel", timeout=400)
    for name, score in (("mel", 0.2), ("beat_mel", 0.9)):
        path = tmp_path / "step05_lstm" / name / "best.pt"
        torch.save(common.load_checkpoint(path) | {"val_score": score}, path)
    run_script("step09_transfer.py", *step, "--epochs", 1, timeout=400)
    assert metrics_of(tmp_path, STEPS[1])["genre_model"] == "mel"
    result = run_script("step09_transfer.py", *step, "--freeze", 2, check=False)
    assert_clean_error(result, "--freeze 2", "mel", "1 block")


# --- splits, leaks, metrics


@pytest.mark.parametrize("folds", [1, 3])
def test_splits_are_disjoint_and_cover(source, data_dir, folds):
    ids, held_out = sorted(labels_of(data_dir, "emotion")), []
    for fold in range(folds):
        data = common.load_data(source, target="emotion", fold=fold, n_folds=folds)
        parts = [common.clip_ids(part) for part in (data.train, data.val, data.held_out)]
        assert sorted(sum(parts, [])) == ids
        held_out += parts[2]
    assert len(set(held_out)) == len(held_out) and (folds == 1 or len(held_out) == len(ids))


def test_beat_and_full_clips_are_split_alike_in_whatever_order_they_are_listed(tmp_path):
    data = write_data_set(tmp_path / "data", per_class=(2, 1))
    labels = data / "multitask_dataset_beat" / "train_labels.txt"
    header, *rows = labels.read_text().splitlines()
    labels.write_text("\n".join([header, *rows[::-1]]) + "\n")
    full, beat = (common.load_data(Source(data), "mel", b, "emotion") for b in (False, True))
    for part in ("train", "val", "held_out"):
        ids = [common.clip_ids(getattr(each, part)) for each in (full, beat)]
        assert ids[0] == ids[1]
    labels.write_text("\n".join([header, *rows[1:]]) + "\n")
    with pytest.raises(patrec.errors.InputError, match=rows[0].split(",")[0]):
        common.load_data(Source(data), "mel", True, "emotion")


def leaky_data(root, same_id, **cut):
    """The tiny data set, with a held-out emotion clip put into the genre training split."""
    data = write_data_set(root / "data", per_class=(4, 1))
    held_out = common.load_data(Source(data), target="emotion", **cut).held_out
    entry = held_out.dataset.store.entries[held_out.indices[0]]
    clip_id = entry.clip_id if same_id else "999999"
    genre = data / "fma_genre_spectrograms"
    array = np.load(entry.path)
    path = genre / "train" / f"{clip_id}.fused.full.npy"
    np.save(path, array[:, ::-1] if same_id else array)
    with open(genre / "train_labels.txt", "a") as file:
        file.write(f"{clip_id}.fused.full.npy.gz\tRock\n")
    return data, entry.clip_id


@pytest.mark.parametrize(("name", "same_id"), [(STEPS[1], True), (STEPS[2], False)])
def test_leak_is_refused(tmp_path, name, same_id):
    """By id, or by content under another id."""
    data, clip_id = leaky_data(tmp_path, same_id)
    flags = ("--smoke", "--data-dir", data, "--out-dir", tmp_path / "out")
    result = run_script(f"{name}.py", *flags, check=False)
    assert_clean_error(result, clip_id, "genre training split", "--allow-leak")
    assert not (tmp_path / "out" / name / "metrics.json").exists()


def test_a_leak_into_any_fold_is_refused(tmp_path):
    data, clip_id = leaky_data(tmp_path, True, fold=1, n_folds=2)
    flags = ("--smoke", "--folds", 2, "--data-dir", data, "--out-dir", tmp_path / "out")
    result = run_forked("step10_multitask.py", *flags, check=False)
    assert_clean_error(result, clip_id, "genre training split", "--allow-leak")


def test_leak_is_allowed_by_flag_and_said(tmp_path):
    data, clip_id = leaky_data(tmp_path, True)
    flags = ("--smoke", "--epochs", 1, "--allow-leak", "--data-dir", data)
    result = run_script("step09_transfer.py", *flags, "--out-dir", tmp_path / "out")
    assert clip_id in result.stderr
    assert clip_id in (tmp_path / "out" / STEPS[1] / "summary.md").read_text()


def test_spearman_is_not_a_mean_over_batches():
    # Perfect in each batch of 8, nearly nothing over all.
    targets, predictions = np.arange(64.0), np.arange(64.0) % 8
    expected = spearmanr(targets, predictions).statistic
    assert patrec.scores.spearman(targets, predictions) == pytest.approx(expected)
    assert patrec.scores.spearman(targets, predictions) < 0.2
    columns = np.stack([targets, targets[::-1], predictions], axis=1)
    true, said = (pd.DataFrame(c, columns=EMOTIONS) for c in (columns, columns[:, [0, 0, 0]]))
    scores = patrec.scores.emotion_scores(true, said)
    expected = [spearmanr(columns[:, i], columns[:, 0]).statistic for i in range(3)]
    assert [scores[axis] for axis in EMOTIONS] == pytest.approx(expected)


def test_resampled_spearman_equals_scipys():
    rng = np.random.default_rng(3)
    targets, predictions = rng.random(20).round(1), rng.random(20)
    rows = np.random.default_rng(0).integers(0, 20, (30, 20))
    expected = [spearmanr(targets[sample], predictions[sample]).statistic for sample in rows]
    assert patrec.scores.resampled_spearman(targets, predictions, 30) == pytest.approx(expected)
    assert not patrec.scores.resampled_spearman(targets, np.ones(20), 30).any()


def test_difference_is_paired():
    """Two nearly equal models on few clips: wide intervals each, a narrow one of the difference."""
    rng = np.random.default_rng(0)
    true = pd.DataFrame(rng.random((50, 3)), columns=EMOTIONS)
    first = true + 0.4 * rng.standard_normal((50, 3))
    second = first + 0.01 * rng.standard_normal((50, 3))
    difference = patrec.scores.paired_difference(true, first, second.iloc[::-1])  # matched by clip
    low, high = difference["spearman_ci95"]
    alone_low, alone_high = patrec.scores.emotion_scores(true, first)["mean_spearman_ci95"]
    assert low <= difference["spearman"] <= high and high - low < (alone_high - alone_low) / 3
    line = patrec.tables.difference_line("a", "b", difference)
    assert "better" not in line and f"{difference['spearman']:+.3f}" in line and "50 clips" in line


def test_a_difference_is_of_the_emotions_that_both_models_have():
    rng = np.random.default_rng(0)
    true = pd.DataFrame(rng.random((30, 3)), columns=EMOTIONS)
    noise = pd.DataFrame(rng.random((30, 3)), columns=EMOTIONS)
    found = patrec.scores.paired_difference(true, true[["energy"]], noise)["spearman"]
    expected = 1 - spearmanr(true["energy"], noise["energy"]).statistic
    assert found == pytest.approx(expected)


def train_beat_mel(step, learned=False, **options):
    """A regressor of beats, trained by `train_all`."""

    def regressor(network, data):
        return Regressor(common.make_backbone(network), data.names, data.mean, data.std)

    def make_loss(data):
        return RegressionLoss(data.std, learned=learned)

    network = GENRE_NETWORKS["beat_mel"]
    run = common.Experiment("run", network, regressor, make_loss, torch.optim.AdamW, **options)
    return common.train_all(step.training, [run])["run"]


def test_a_run_of_several_folds_knows_which_fold_answered(data_dir, tmp_path, make_step):
    step = make_step(data_dir, tmp_path, "--epochs", "1", "--smoke")
    run = train_beat_mel(step, target="energy", n_folds=2)
    source = dataclasses.replace(step.source)
    for fold in range(2):
        data = common.load_data(source, "mel", True, "energy", fold=fold, n_folds=2)
        assert set(run.folds[run.folds == fold + 1].index) == set(common.clip_ids(data.held_out))


def test_each_fold_is_answered_by_the_network_that_did_not_hear_it(data_dir, tmp_path, make_step):
    """And the weights of the losses are learned on the way, at the lower rate that is asked for."""
    step = make_step(data_dir, tmp_path, "--epochs", "1", "--smoke")
    run = train_beat_mel(step, learned=True, target="emotion", n_folds=2, lr_factor=0.5)
    for fold, member in enumerate(run.members):
        data = common.load_data(step.source, "mel", True, "emotion", fold=fold, n_folds=2)
        answers = common.predict_clips(member.model, data.held_out, member.settings)
        pd.testing.assert_frame_equal(run.answers.loc[answers.index], answers)
        learned = patrec.files.load_torch(member.path.with_name("last.pt"))["loss"]["log_var"]
        assert (learned != 0).all(), "the weights of the losses are not learned"
        assert member.facts["lr"] == 0.5 * step.args.lr


def test_step_10_hands_in_the_average_of_both_networks(outputs, source):
    answers = []
    for name in ("multitask", "multitask_lstm"):
        model, checkpoint = common.load_model(outputs / STEPS[2] / name / "best.pt")
        test = common.load_test(source, checkpoint["settings"])
        answers.append(common.predict_clips(model, test, checkpoint["settings"]))
    expected = patrec.scores.average_predictions(answers)[list(EMOTIONS)].clip(0, 1)
    found = submission(outputs / STEPS[2]).loc[expected.index]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(answers[0] - answers[1]).to_numpy().max() > 1e-3  # or one would do


def test_step_10_goes_on_from_the_genre_network(outputs):
    """Batch normalisation counts the batches it has seen: those of genre training too."""
    (genre,) = outputs.glob("*/cnn_mel/best.pt")
    folder = outputs / STEPS[2]
    paths = [genre, *(folder / name / "best.pt" for name in ("multitask", "multitask_scratch"))]
    key = "backbone.blocks.0.1.num_batches_tracked"
    before, after, scratch = (int(common.load_checkpoint(path)["state"][key]) for path in paths)
    assert before > 0 and scratch > 0 and after == before + scratch
