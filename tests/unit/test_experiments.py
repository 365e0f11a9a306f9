"""The trainings of a step: how they share time and workers, and the checkpoints that they find."""

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import patch_everywhere, write_data_set

import common
from patrec.errors import StepFailed
from patrec.flags import Source, TrainingOptions
from patrec.parallel import in_worker, multiprocessing
from patrec.recipes import GENRE_NETWORKS, window_size


def options(root, out=None, **changes):
    """TrainingOptions of a step with the folder `out`/own."""
    names = {field.name for field in dataclasses.fields(Source)}
    source = Source(root, **{key: changes.pop(key) for key in names & changes.keys()})
    out = out or root
    return TrainingOptions(source, out, out / "own", **changes)


def test_a_process_per_core_or_card_unless_told_otherwise(tmp_path, monkeypatch):
    def count(n_jobs, **changes):
        return common.count_workers(options(tmp_path, **changes), n_jobs)

    monkeypatch.setattr(common.joblib, "cpu_count", lambda: 4)
    assert [count(n) for n in (1, 3, 9)] == [1, 3, 4]
    assert [count(n, workers=6) for n in (3, 9)] == [3, 6]
    assert count(9, smoke=True) == 1  # a process takes longer to begin
    for n_cards, workers in ((2, 2), (1, 1), (0, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=n_cards: n)
        assert count(9, device="cuda") == workers


def test_each_worker_takes_a_card_of_its_own(monkeypatch):
    """Workers are named LokyProcess-1, -2, ...; a card of Kaggle's two was idle before."""
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    patch_everywhere(monkeypatch, "keep_freed_memory", lambda: None)
    for number in (1, 2, 3):
        named = SimpleNamespace(name=f"LokyProcess-{number}")
        monkeypatch.setattr(multiprocessing, "current_process", lambda process=named: process)
        assert in_worker(os.getpid(), max, number, 0) == number
    assert sorted(taken[:2]) == [0, 1] and taken[2] == taken[0]


def test_trainings_share_the_time_that_is_left(tmp_path, monkeypatch):
    """By how many rounds are still to come, those of a later phase included."""
    asked = []

    def parallel_map(function, tasks, workers):
        asked.extend(task[-1] for task in tasks)
        raise StepFailed("enough seen")

    patch_everywhere(monkeypatch, "parallel_map", parallel_map)
    patch_everywhere(monkeypatch, "load_data", lambda *args, **options: None)
    empty = [GENRE_NETWORKS["mel"], None, None, None]
    runs = [common.Experiment(name, *empty, n_folds=n) for name, n in (("a", 2), ("b", 3))]
    with pytest.raises(StepFailed, match="enough"):
        common.train_all(options(tmp_path, workers=2), runs, to_come=1)
    assert asked == [3, 3, 2, 2, 1]


def test_each_fold_is_predicted_by_the_network_that_did_not_hear_it(tmp_path):
    """For the shorter time and with the statistics that are asked for."""
    root = write_data_set(tmp_path / "data", per_class=(1, 1), n_frames=20)
    training = options(root, tmp_path, epochs=2)
    stats = torch.full((128,), -40.0), torch.full((128,), 9.0)

    run = common.Experiment(
        "run", GENRE_NETWORKS["beat_mel"], common.make_regressor,
        lambda data: common.RegressionLoss(data.std), torch.optim.Adam,
        target="emotion", n_folds=2, epochs=1, stats=stats,
    )  # fmt: skip
    result = common.train_all(training, [run])["run"]
    for fold, member in enumerate(result.members):
        folds = {"fold": fold, "n_folds": 2, "stats": stats}
        data = common.load_data(training.source, "mel", True, "emotion", **folds)
        predictions = common.predict_clips(member.model, data.held_out, member.settings)
        pd.testing.assert_frame_equal(result.predictions.loc[predictions.index], predictions)
        assert set(result.folds[result.folds == fold + 1].index) == set(predictions.index)
        assert member.facts["epochs"] == 1
        assert (member.settings["stats"][0] == -40).all()
        for name in ("mean", "std"):  # in the labels' units, by its own training clips
            assert member.model.config[name] == pytest.approx(getattr(data, name))
    val = np.mean([member.facts["val"]["mean_spearman"] for member in result.members])
    assert result.facts["val"]["mean_spearman"] == pytest.approx(val)  # step 8 chooses by it
    assert result.facts["epochs"] == 2  # one of each fold
    seconds = sum(member.facts["train_seconds"] for member in result.members)
    assert result.facts["train_seconds"] == pytest.approx(seconds)
    longer = dataclasses.replace(run, name="longer", epochs=9)  # --epochs says 2
    assert common.train_all(training, [longer])["longer"].facts["epochs"] == 2 * 2
    # Unlabelled clips are predicted by all folds.
    tests = [common.load_test(training.source, member.settings) for member in result.members]
    both = [
        common.predict_clips(member.model, test, member.settings)
        for member, test in zip(result.members, tests, strict=True)
    ]
    unlabelled = common.predict_unlabelled(training.source, result)
    np.testing.assert_allclose(unlabelled, (both[0] + both[1]) / 2, atol=1e-6)


def save_network(training, name, folder, val_score=0.5, hidden_size=None, **odd):
    """A checkpoint as step 5 or 7 leaves one in `folder`/name, its weights unlike fresh ones."""
    torch.manual_seed(1)
    network = GENRE_NETWORKS[name]
    data = common.load_data(training.source, network.features, network.beat)
    backbone = common.make_backbone(network)
    if hidden_size:
        backbone = common.LSTMBackbone(**backbone.config | {"hidden_size": hidden_size})
    model = common.Classifier(backbone, len(data.names))
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value))
    settings = data.settings | {"recipe": "full", "run": name, "window": window_size(network)} | odd
    path, facts = training.out / folder / name / "best.pt", {"planned_epochs": 1, "n_val": 9}
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(path, model, settings, epoch=1, val_score=val_score, facts=facts)
    return path, model


def find(training, name="mel"):
    return common.find_genre_checkpoint(training, name)


@pytest.mark.parametrize("odd, changes", [
    ("fingerprint", {"fingerprint": "of other labels"}),
    ("merge", {"merge": False}),
    ("seed", {"seed": 43}),
    ("subset", {"subset": 30}),
    ("smoke", {"smoke": True, "subset": 64}),
    ("window", {"window": 999}),
    ("recipe", {"recipe": "lab"}),
    ("network", {"hidden_size": 16}),
    ("run", {"run": "beat_mel"}),
])  # fmt: skip
def test_a_checkpoint_of_something_else_is_passed_over_and_said_so(
    tiny_data, tmp_path, capsys, odd, changes
):
    """Weights of the demo set were used on real music, and those of seed 42 ranked seed 43."""
    training = options(tiny_data, tmp_path)
    path, _ = save_network(training, "mel", "step05_lstm", **changes)
    capsys.readouterr()
    assert find(training) is None
    said = capsys.readouterr().out
    assert str(path) in said and f"another {odd}" in said, said
    # The one beside it fits and is found, wherever it lies.
    own, _ = save_network(training, "mel", "own")
    assert find(training) == own
    save_network(training, "mel", "step05_lstm")
    assert find(training) == path
    path.with_name(common.UNFINISHED).touch()  # a training that was stopped
    assert find(training) == own


def test_with_smoke_any_checkpoint_of_this_seed_will_do(tiny_data, tmp_path):
    """It is asked only whether the step runs."""
    smoke = options(tiny_data, tmp_path, smoke=True, subset=64)
    for odd, found in (({}, True), ({"smoke": True}, True), ({"seed": 1}, False)):
        save_network(smoke, "mel", "step05_lstm", **{"smoke": False, "subset": None} | odd)
        assert bool(find(smoke)) == found


def test_what_step_9_had_to_train_itself_is_found_by_step_10(tiny_data, tmp_path):
    training = options(tiny_data, tmp_path)
    path, _ = save_network(training, "mel", "step09_transfer")
    assert find(training) == path


def test_ones_own_checkpoint_comes_before_an_attached_one(tiny_data, tmp_path, monkeypatch):
    """On Kaggle: what is trained anew is not to be replaced by what an older session has left."""
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    training = options(tiny_data, tmp_path / "out")
    attached = options(tiny_data, tmp_path / "kaggle" / "input" / "a-kernel" / "outputs")
    for left_by in (attached, training):
        path, _ = save_network(left_by, "mel", "step05_lstm")
        assert find(training) == path


def test_genre_networks_are_ranked_by_validation_score(tiny_data, tmp_path):
    """Those that do not fit are left out, whatever their score; what is missing is trained."""
    training = options(tiny_data, tmp_path, epochs=1)
    assert common.genre_val_scores(training).empty
    save_network(training, "mel", "step05_lstm", 0.3)
    save_network(training, "beat_mel", "step05_lstm", 0.6)
    path, model = save_network(training, "cnn_mel", "step07_cnn", 0.5)
    save_network(training, "beat_chroma", "step05_lstm", 0.7, seed=43)
    assert list(common.genre_val_scores(training).index) == ["beat_mel", "cnn_mel", "mel"]
    found = common.genre_models(training, ["cnn_mel", "beat_chroma", "plain_mel"])
    assert list(found) == ["cnn_mel", "beat_chroma", "plain_mel"] and found["cnn_mel"].path == path
    for key, value in found["cnn_mel"].model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert found["beat_chroma"].path == training.folder / "beat_chroma" / "best.pt"
    assert found["beat_chroma"].settings["seed"] == 42
    assert "plain_mel" not in common.genre_val_scores(training).index


@pytest.mark.parametrize("name", ["cnn_mel", "mel"])
def test_transfer_takes_the_backbone_and_nothing_else(tiny_data, tmp_path, name):
    path, model = save_network(options(tiny_data, tmp_path), name, "any")
    backbone = common.load_backbone(path)
    assert backbone.state_dict().keys() == model.backbone.state_dict().keys()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key
    head = common.Regressor(backbone, ["valence"], [0.5], [0.2]).heads["valence"].weight
    assert head.shape == (1, backbone.feature_size)
    assert not torch.isclose(head, model.head[-1].weight).any(0).all()
