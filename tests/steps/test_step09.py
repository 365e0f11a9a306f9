"""Step 9: what is transferred, frozen, fine-tuned and compared, from the files the step leaves."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import EMOTIONS, assert_clean_error, read_metrics, read_table, run_forked, run_inside
from emotion_runs import (
    STEP8,
    STEP9,
    EmotionRuns,
    assert_follows_its_axis,
    assert_scores,
    assert_truth,
    run_step,
)
from step_runs import copy_data

import common

pytestmark = pytest.mark.slow
DEPTHS = {0: "_frozen0", 1: "_frozen1", 2: "_frozen2", 3: "_frozen3", 4: ""}  # --freeze 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return EmotionRuns(tmp_path_factory)


def test_each_axis_is_predicted_learned_and_scored_by_its_own_labels(runs):
    """From scratch at the full budget is step 8's CNN, which is not trained again."""
    run = runs.transfer
    assert_truth(run, {"head", "scratch", *(f"transfer{end}" for end in DEPTHS.values())})
    assert assert_scores(run) == 3 * (2 + len(DEPTHS))
    assert set(run.table["clip"]) == set(runs.regression.table["clip"])
    assert not list(run.folder.glob("scratch_full*"))
    twin = runs.regression.runs["cnn_valence"]
    said = f"scratch on {twin['epochs'] * twin['examples_per_epoch']:,} examples?"
    assert said in (run.folder / "summary.md").read_text()
    for model in ("transfer", "transfer_frozen0"):
        assert_follows_its_axis(run, model)


def test_frozen_blocks_are_the_genre_models_bit_for_bit(runs):
    """Batch statistics included; so are the statistics of the input. From scratch, neither is."""
    run = runs.transfer
    genre = run.checkpoint("cnn_mel")
    blocks = [key for key in genre["state"] if key.startswith("backbone.blocks.")]
    kernels = [key for key in blocks if genre["state"][key].ndim > 1]
    for axis in EMOTIONS:
        for depth, end in DEPTHS.items():
            tuned = run.checkpoint(f"transfer_{axis}{end}")
            assert all(map(torch.equal, tuned["settings"]["stats"], genre["settings"]["stats"]))
            for key in blocks:
                same = torch.equal(tuned["state"][key], genre["state"][key])
                frozen = int(key.split(".")[2]) < depth
                assert same == frozen or (same and key not in kernels), key
        scratch = run.checkpoint(f"scratch_{axis}")
        assert not any(torch.equal(scratch["state"][key], genre["state"][key]) for key in kernels)
        assert not any(map(torch.equal, scratch["settings"]["stats"], genre["settings"]["stats"]))


def test_the_second_phase_goes_on_from_the_head_that_was_learned_first(runs, tmp_path, monkeypatch):
    """What the step would train, without the training: a head of sevens stands for the learned."""
    copy_data(runs.transfer.folder / "cnn_mel", tmp_path / STEP9 / "cnn_mel")
    data, begun = SimpleNamespace(names=["valence"], mean=[0.5], std=[0.2]), {}

    def train_all(training, experiments, to_come=0):
        models = {run.name: run.make_model(run.network, data) for run in experiments}
        heads = {name: model.heads["valence"].weight for name, model in models.items()}
        begun.update({name: weight.clone() for name, weight in heads.items()})
        if "transfer_valence" in models:
            raise KeyboardInterrupt  # all is seen
        for weight in heads.values():
            torch.nn.init.constant_(weight, 7.0)
        return {name: SimpleNamespace(model=model) for name, model in models.items()}

    monkeypatch.setattr(common, "train_all", train_all)
    where = ("--data-dir", runs.data, "--out-dir", tmp_path)
    assert run_inside(f"{STEP9}.py", "--smoke", *where) == 130
    assert (begun["transfer_valence"] == 7).all() and (begun["head_valence"].abs() < 1).all()


def test_what_was_frozen_and_how_much_was_trained(runs):
    run = runs.transfer
    table = read_table(run.folder, "The trainings")
    assert set(table.index) == set(run.runs) - set(run.table["model"])
    for axis in EMOTIONS:
        names = {depth: f"transfer_{axis}{end}" for depth, end in DEPTHS.items()}
        frozen = {name: depth for depth, name in names.items()}
        for name, depth in (frozen | {f"head_{axis}": 4, f"scratch_{axis}": 0}).items():
            assert int(table.loc[name, "frozen blocks"]) == depth
            weights = run.runs[name]["trained_weights"]
            assert table.loc[name, "trained weights"] == f"{weights:,}"
        trained = [run.runs[name]["trained_weights"] for name in names.values()]
        assert sorted(set(trained), reverse=True) == trained, "each block has weights"
        # Both phases together, and the training from scratch beside them, have one budget.
        rows = [run.runs[name] for name in (f"head_{axis}", names[4], f"scratch_{axis}")]
        shown = [row["epochs"] * row["examples_per_epoch"] for row in rows]
        assert abs(sum(shown[:2]) - shown[2]) <= run.runs[f"head_{axis}"]["n_train"]


def test_the_genre_model_is_the_best_on_validation_clips_of_those_on_frames(runs, tmp_path):
    """With next to no learning rate, all weights are still its own; from scratch they are not."""
    copy_data(runs.genre, tmp_path / "step05_lstm")
    copy_data(runs.regression.folder, tmp_path / STEP8)
    path, facts = tmp_path / STEP8 / "metrics.json", read_metrics(tmp_path / STEP8)
    alike = {"planned_epochs": 1, "epochs": 1, "lr": 1e-7, "batch_size": 32}
    facts["runs"]["cnn_valence"] |= alike  # another network, which does not stand in for it
    path.unlink()  # a hard link, see copy_data
    path.write_text(json.dumps(facts))
    run = run_step(STEP9, runs.data, tmp_path, "--epochs", 1, "--lr", 1e-7)
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
    where = ("--smoke", "--data-dir", runs.data, "--out-dir", tmp_path)
    result = run_forked(f"{STEP9}.py", *where, "--freeze", 2, check=False)
    assert_clean_error(result, "--freeze 2", "fused", "1 block")
