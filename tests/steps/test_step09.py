"""Step 9: what is transferred, frozen, fine-tuned and compared, from the files the step leaves."""

import ast
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import EMOTIONS, ROOT, assert_clean_error, read_metrics, read_table, run_forked
from emotion_runs import (
    GENRE_SCORES,
    RECIPE,
    STEP9,
    EmotionRuns,
    assert_follows_its_axis,
    assert_scores,
    assert_statistics,
    assert_truth,
    run_step,
)
from step_runs import copy_data

import common
import patrec.machine
from patrec.recipes import Recipe
from patrec.tables import EarlierPredictions

pytestmark = pytest.mark.slow
DEPTHS = {0: "frozen0", 1: "frozen1", 2: "frozen2", 3: "frozen3", 4: ""}  # --freeze 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return EmotionRuns(tmp_path_factory)


def checkpoint_of(run, name):
    return common.load_checkpoint(run.folder / name / "best.pt")


def run_name(axis, depth):
    return f"transfer_{axis}" + (f"_{DEPTHS[depth]}" if DEPTHS[depth] else "")


def test_predictions_and_scores(runs):
    """From scratch at the full budget is step 8's CNN, which is not trained again."""
    run = runs.transfer
    depths = {f"transfer_{name}" for name in DEPTHS.values() if name}
    assert_truth(run, {"head", "transfer", "scratch", *depths})
    tuned = {run_name(axis, depth) for axis in EMOTIONS for depth in DEPTHS}
    phases = {f"{kind}_{axis}" for axis in EMOTIONS for kind in ("head", "scratch")}
    assert phases | tuned <= set(run.runs)
    assert assert_scores(run) == 3 * (2 + len(DEPTHS))
    assert set(run.table["clip"]) == set(runs.regression.table["clip"])
    assert not list(run.folder.glob("scratch_full*"))


@pytest.mark.parametrize("model", ["transfer", "transfer_frozen0"])
def test_each_axis_is_learned_from_its_own_labels(runs, model):
    assert_follows_its_axis(runs.transfer, model)


def test_labels_are_scaled_by_the_training_clips(runs):
    assert_statistics(runs.transfer, "scratch_valence", [f"scratch_{axis}" for axis in EMOTIONS])


def test_frozen_blocks_are_the_genre_models_bit_for_bit(runs):
    """Batch statistics included; so are the statistics of the input. From scratch, neither is."""
    run = runs.transfer
    genre = common.load_checkpoint(run.folder / "cnn_mel" / "best.pt")
    blocks = [key for key in genre["state"] if key.startswith("backbone.blocks.")]
    kernels = [key for key in blocks if genre["state"][key].ndim > 1]
    for axis in EMOTIONS:
        for depth in DEPTHS:
            tuned = checkpoint_of(run, run_name(axis, depth))
            assert all(map(torch.equal, tuned["settings"]["stats"], genre["settings"]["stats"]))
            for key in blocks:
                same = torch.equal(tuned["state"][key], genre["state"][key])
                assert same == (int(key.split(".")[2]) < depth) or key not in kernels, key
                assert same or int(key.split(".")[2]) >= depth, key
        scratch = checkpoint_of(run, f"scratch_{axis}")
        assert not any(torch.equal(scratch["state"][key], genre["state"][key]) for key in kernels)
        assert not any(map(torch.equal, scratch["settings"]["stats"], genre["settings"]["stats"]))


def test_the_second_phase_goes_on_from_the_head_that_was_learned_first(runs):
    """Nearer to the head that was learned than to a new one drawn by the same seed."""
    run, key = runs.transfer, "heads.valence.weight"
    head, frozen = (checkpoint_of(run, f"{kind}_valence") for kind in ("head", "transfer"))
    first, second = (checkpoint["state"][key] for checkpoint in (head, frozen))
    patrec.machine.seed_everything(42)
    backbone = common.load_backbone(run.folder / "cnn_mel" / "best.pt", 4)
    new = common.Regressor(backbone, **head["spec"]["head_args"]).heads["valence"].weight
    assert not torch.equal(first, second)
    assert torch.nn.functional.cosine_similarity(first, second).item() > 0.5
    assert (second - first).norm() < (second - new).norm()


def test_what_was_frozen_and_how_much_was_trained(runs):
    run = runs.transfer
    table = read_table(run.folder, f"{run.runs['head_valence']['n_train']} training clips")
    assert set(table.index) == set(run.runs) - set(run.table["model"])
    for axis in EMOTIONS:
        shown, trained = {}, []
        frozen = {f"head_{axis}": 4, f"scratch_{axis}": 0}
        frozen |= {run_name(axis, depth): depth for depth in DEPTHS}
        for name, depth in frozen.items():
            facts, row = run.runs[name], table.loc[name]
            assert int(row["frozen blocks"]) == depth
            assert int(row["trained weights"]) == facts["trained_weights"]
            shown[name] = facts["epochs"] * facts["examples_per_epoch"]
            if name.startswith("transfer"):
                trained.append(facts["trained_weights"])
        assert sorted(set(trained), reverse=True) == trained, "each block has weights"
        # Both phases together, and the training from scratch beside them, have one budget.
        both = shown[f"head_{axis}"] + shown[f"transfer_{axis}"]
        assert abs(both - shown[f"scratch_{axis}"]) <= run.runs[f"head_{axis}"]["n_train"]


def test_without_step_8_that_very_regressor_is_trained(runs, tmp_path):
    """Bit for bit."""
    copy_data(runs.transfer.folder / "cnn_mel", tmp_path / STEP9 / "cnn_mel")
    run = run_step(STEP9, runs.data["marked"], tmp_path, *RECIPE)
    first = common.load_checkpoint(runs.regression.folder / "cnn_valence" / "best.pt")["state"]
    second = checkpoint_of(run, "scratch_full_valence")["state"]
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert set(run.table["target"]) == {"valence"}


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
    """Its predictions stand under `scratch_full`, the name of step 9's own network."""
    tree = ast.parse((ROOT / f"{STEP9}.py").read_text())
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "is_twin")
    facts = {"planned_epochs": 4, "epochs": 4, "lr": 2e-3, "batch_size": 8, "n_train": 46}
    runs = {"cnn": {"network": "cnn_mel"}, "cnn_valence": facts | changes}
    known = {
        "make_recipe": lambda network, data, training: Recipe(4, 2e-3, 8),
        "data": SimpleNamespace(train=range(46)),
        "step": SimpleNamespace(training=None),
        "step8": EarlierPredictions({}, runs, ""),
        "network": None,
        "emotions": ("valence",),
        "genre_name": genre_name,
    }
    exec(compile(ast.Module([function], []), STEP9, "exec"), known)
    assert known["is_twin"]("cnn") is twin


def test_the_genre_model_is_the_best_on_validation_clips_of_those_on_frames(runs, tmp_path):
    """With next to no learning rate, all weights are still its own; from scratch they are not."""
    copy_data(runs.genre, tmp_path / "step05_lstm")
    data = runs.data["marked"]
    run = run_step(STEP9, data, tmp_path, "--epochs", 1, "--lr", 1e-7)
    assert max(GENRE_SCORES, key=GENRE_SCORES.get) == "beat_fused"
    assert read_metrics(run.folder)["genre_model"] == "fused"

    def weights(path):  # what is learned; statistics of batches go on changing
        return dict(common.load_model(path)[0].backbone.named_parameters())

    genre = weights(tmp_path / "step05_lstm" / "fused" / "best.pt")
    matrices = [key for key in genre if genre[key].ndim > 1]
    for kind in ("head", "transfer", "scratch", "scratch_full"):
        own = weights(run.folder / f"{kind}_valence" / "best.pt")
        assert genre.keys() == own.keys() and matrices
        if kind in ("head", "transfer"):
            assert all(torch.allclose(own[k], genre[k], atol=1e-5, rtol=0) for k in genre)
        else:
            assert not any(torch.allclose(own[k], genre[k], atol=1e-3) for k in matrices)
    shutil.rmtree(run.folder)
    where = ("--smoke", "--data-dir", data, "--out-dir", tmp_path)
    result = run_forked(f"{STEP9}.py", *where, "--freeze", 2, check=False)
    assert_clean_error(result, "--freeze 2", "fused", "1 block")
