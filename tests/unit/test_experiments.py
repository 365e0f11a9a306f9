"""The trainings of a step: how they share time and workers, and the checkpoints that they find."""

import dataclasses
import math
import types

import pandas as pd
import pytest
import torch
from conftest import patch_everywhere, write_data_set

import common
from patrec.errors import InputError, StepFailed
from patrec.flags import Source, TrainingOptions
from patrec.recipes import GENRE_NETWORKS, window_size

# --- how many at once, and for how long -------------------------------------------------


def options(folder, **changes):
    source = {key: changes.pop(key) for key in ("device", "smoke") if key in changes}
    return TrainingOptions(Source(folder, **source), folder, folder, **changes)


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


@pytest.mark.parametrize(
    "workers, later, shares", [(1, 0, [5, 4, 3, 2, 1]), (2, 1, [3, 3, 2, 2, 1])]
)
def test_trainings_share_the_time_that_is_left(tmp_path, monkeypatch, workers, later, shares):
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
        common.train_all(options(tmp_path, workers=workers), runs, to_come=later)
    assert asked == shares


def test_what_vanishes_is_zero_before_a_worker_begins_to_compute(tmp_path, monkeypatch):
    """The setting is a thread's; those of a product have it from the thread that begins them."""
    torch.set_flush_denormal(False)

    def load_data(*_, **__):
        raise InputError(f"{torch.tensor(1e-30) * 1e-10:g}")

    patch_everywhere(monkeypatch, "load_data", load_data)
    run = common.Experiment("one", GENRE_NETWORKS["beat_mel"], None, None, None)
    with pytest.raises(InputError, match="^0$"):
        common.train_fold(options(tmp_path), run, 0, 1)


def test_a_fine_tuning_has_the_budget_the_rate_and_the_statistics_asked_for(tiny_data, monkeypatch):
    def train(model, data, loss_fn, optimizer, recipe, folder, **options):
        rate = optimizer.param_groups[0]["lr"]
        same = data.settings["stats"] is stats
        raise StepFailed(f"{recipe.epochs} epochs at {recipe.lr:g} and {rate:g}, {same}")

    patch_everywhere(monkeypatch, "train", train)
    stats = torch.full((128,), -40.0), torch.full((128,), 9.0)
    changes = {"share": 0.3, "lr_factor": 0.5, "stats": stats}
    run = dataclasses.replace(common.genre_experiment("mel"), **changes)
    with pytest.raises(StepFailed, match="^3 epochs at 0.002 and 0.002, True$"):
        common.train_fold(options(tiny_data, epochs=10, lr=0.004), run, 0, 1)


# --- folds ------------------------------------------------------------------------------


def test_folds_are_summed_up_as_one_run(monkeypatch):
    """Step 8 chooses a network by the mean validation score."""
    facts = [
        {"epochs": e, "train_seconds": s, "n_train": 40, "val": {"energy": v}}
        for e, s, v in ((4, 10.0, 0.2), (6, 14.5, 0.7))
    ]
    load = lambda i, device: types.SimpleNamespace(facts=facts[i])  # noqa: E731
    patch_everywhere(monkeypatch, "load_trained", load)
    tables = [pd.DataFrame({"energy": [0.1 * n]}, [str(n)]) for n in (1, 2)]
    run = common.join_folds([(i, table, 2 * table) for i, table in enumerate(tables)], "cpu")
    assert run.facts["val"] == {"energy": pytest.approx(0.45)}
    assert (run.facts["epochs"], run.facts["train_seconds"]) == (10, 24.5)
    assert run.folds.to_dict() == {"1": 1, "2": 2}
    assert run.predictions["energy"].tolist() == pytest.approx([0.1, 0.2])
    assert run.truth["energy"].tolist() == pytest.approx([0.2, 0.4])


def test_unlabelled_clips_are_predicted_by_all_folds(monkeypatch):
    def predict_clips(model, *_):
        return pd.DataFrame({"energy": [model, 2 * model]}, ["7", "10"])

    patch_everywhere(monkeypatch, "load_test", lambda source, settings: settings)
    patch_everywhere(monkeypatch, "predict_clips", predict_clips)
    folds = [types.SimpleNamespace(model=model, settings={}) for model in (0.1, 0.2, 0.6)]
    run, source = types.SimpleNamespace(members=folds), types.SimpleNamespace(device="cpu")
    mean = common.predict_unlabelled(source, run)
    assert mean["energy"].tolist() == pytest.approx([0.3, 0.6])


# --- checkpoints of earlier steps -------------------------------------------------------


def save_mel(step, folder, odd, **network):
    """A checkpoint as step 5 leaves one for `mel`, odd in one way; returns its path."""
    backbone = common.make_backbone(GENRE_NETWORKS["mel"])
    if network:
        backbone = common.LSTMBackbone(**backbone.config | network)
    data = common.load_data(step.source, "mel")
    settings = data.settings | {"run": "mel", "window": window_size(GENRE_NETWORKS["mel"])} | odd
    folder.mkdir(parents=True, exist_ok=True)
    model, path = common.Classifier(backbone, len(data.names)), folder / "best.pt"
    common.save_checkpoint(path, model, settings, epoch=1, val_score=0.5, facts={})
    return path


def find(step):
    return common.find_genre_checkpoint(step.training, "mel")


@pytest.mark.parametrize("odd, changes", [
    ("fingerprint", {"fingerprint": "of other labels"}),
    ("merge", {"merge": False}),
    ("seed", {"seed": 43}),
    ("subset", {"subset": 30}),
    ("smoke", {"smoke": True, "subset": 64}),
    ("window", {"window": 999}),
    ("network", {}),
    ("run", {"run": "beat_mel"}),
])  # fmt: skip
def test_a_checkpoint_of_something_else_is_passed_over_and_said_so(
    tiny_data, tmp_path, make_step, capsys, odd, changes
):
    """Weights of the demo set were used on real music, and those of seed 42 ranked seed 43."""
    step, folder = make_step(tiny_data, tmp_path), tmp_path / "step05_lstm" / "mel"
    save_mel(step, folder, changes, **({"hidden_size": 16} if odd == "network" else {}))
    capsys.readouterr()
    assert find(step) is None
    said = capsys.readouterr().out
    assert str(folder / "best.pt") in said and f"another {odd}" in said, said
    # The one beside it fits and is found, wherever it lies.
    path = save_mel(step, step.folder / "mel", {})
    assert find(step) == path
    path = save_mel(step, folder, {})
    assert find(step) == path and common.load_checkpoint(path)["val_score"] == 0.5
    (folder / common.UNFINISHED).touch()  # a training that was stopped
    assert find(step) == step.folder / "mel" / "best.pt"


def test_a_checkpoint_does_not_fit_a_step_with_other_flags(tiny_data, tmp_path, make_step):
    """But with --smoke it is asked whether the step runs: any checkpoint of this seed will do."""
    full, smoke = make_step(tiny_data, tmp_path), make_step(tiny_data, tmp_path, "--smoke")
    folder = tmp_path / "step05_lstm" / "mel"
    save_mel(full, folder, {})
    for flags in (["--seed", "43"], ["--subset", "30"], ["--no-merge"]):
        assert find(make_step(tiny_data, tmp_path, *flags, name="other")) is None
    for odd, found in (({}, True), ({"smoke": True, "subset": 64}, True), ({"seed": 1}, False)):
        save_mel(full, folder, odd)
        assert bool(find(smoke)) == found


def test_on_kaggle_ones_own_checkpoint_comes_before_that_of_an_attached_kernel(
    tiny_data, tmp_path, make_step, monkeypatch
):
    """What this session has trained anew is not to be replaced by what an older one has left."""
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    step = make_step(tiny_data, tmp_path / "out")
    for root in (tmp_path / "kaggle" / "input" / "a-kernel" / "outputs", tmp_path / "out"):
        path = save_mel(step, root / "step05_lstm" / "mel", {})
        assert find(step) == path


def test_changed_labels_make_an_old_checkpoint_no_longer_fit(tmp_path, make_step, capsys):
    data = write_data_set(tmp_path / "data", n_emotion=(2, 1), n_frames=40)
    step = make_step(data, tmp_path / "out")
    save_mel(step, tmp_path / "out" / "step05_lstm" / "mel", {})
    assert find(step)
    path = data / "fma_genre_spectrograms" / "train_labels.txt"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[::-1]]) + "\n")
    assert find(step)  # the same labels in another order
    path.write_text(path.read_text().replace("\tPunk", "\tMetal", 1))
    assert find(step) is None and "fingerprint" in capsys.readouterr().out
    path.unlink()  # step 8 needs no genres
    assert find(step) is None


def test_the_textbook_lstm_is_no_candidate_and_adjusts_no_logits(
    tiny_data, tmp_path, make_step, monkeypatch
):
    """It stands beside the lab's networks for comparison: later steps do not go on from it."""
    step, seen = make_step(tiny_data, tmp_path), {}

    def train(model, data, loss_fn, optimizer, recipe, folder, **options):
        seen[folder.name] = data.settings["priors"], options["max_seconds"]
        folder.mkdir(parents=True)
        settings = data.settings | {"run": folder.name, "window": recipe.window}
        facts = {"n_val": len(data.val), "planned_epochs": 1}
        score = 0.9 if folder.name == "plain_mel" else 0.5
        path = folder / "best.pt"
        common.save_checkpoint(path, model, settings, epoch=1, val_score=score, facts=facts)
        return common.load_trained(path)

    patch_everywhere(monkeypatch, "train", train)
    folder = tmp_path / "step05_lstm"
    training = dataclasses.replace(step.training, folder=folder, workers=1)
    common.train_all(training, [common.genre_experiment(name) for name in ("plain_mel", "mel")])
    assert len(set(seen["plain_mel"][0])) == 1 < len(set(seen["mel"][0]))
    assert seen["mel"][1] == math.inf  # without --max-minutes
    assert common.find_genre_checkpoint(step.training, "plain_mel")
    assert list(common.genre_val_scores(step.training).index) == ["mel"]
