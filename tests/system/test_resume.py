"""Interrupted and resumed trainings, and --max-minutes, through the command line.

Time is counted and not measured: a step of a training's optimiser (AdamW) takes one second, and
nothing else takes any. So a run can be stopped at an exact step, and a limit of minutes is an
exact number of epochs.
"""

import json
import os
import shutil
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import read_metrics, run_forked, write_data_set
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork processes"),
]
EPOCHS, BATCHES = 10, 2  # passes over 16 clips in batches of 8: an epoch takes 2 s
TINY = ("--smoke", "--subset", 16, "--batch-size", 8, "--device", "cpu")
TWO_LSTMS = ("--features", "beat_mel", "mel", "--lr", 0.02)


def count_time(log, stop):
    """In the process of a step: replace the clock, stop where asked, write down the steps taken."""
    # Pictures are looked at in other tests.
    plt.Figure.savefig = lambda figure, file, **options: None
    steps = {"taken": 0, "since": 0, "check": 0}
    time.time = time.monotonic = time.perf_counter = lambda: 1000.0 + steps["taken"]

    def before_step(optimizer, *_):
        if type(optimizer) is not torch.optim.AdamW:  # the overfit check, or step 7's digits
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            steps["check"] += sum(map(torch.numel, weights)) > 20_000
        elif stop and stop[0].exists() and len(stop[0].read_text().splitlines()) > stop[1]:
            if steps["since"] == stop[2]:
                raise KeyboardInterrupt
            steps["since"] += 1
        steps["taken"] += type(optimizer) is torch.optim.AdamW
        log.write_text(json.dumps(steps))

    log.write_text(json.dumps(steps))
    register_optimizer_step_pre_hook(before_step)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Function: run a step under the counted clock; stop : (run, epochs, steps after them).

    Clips are longer than every crop, so that a resumed run must also draw the same crops.
    """
    data = write_data_set(
        tmp_path_factory.mktemp("resume_data"), per_class=(5, 1), n_emotion=(40, 5),
        n_frames=(660, 700), n_beats=(14, 40), test_frames=(300, 330), dtype="float32",
    )  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "steps.json"
    torch.optim.AdamW([torch.zeros(1)])  # loads torch's compiler, here and not in every process

    def run(script, out, *args, stop=None, code=0):
        folder = out / script
        stop = stop and (folder / stop[0] / "history.csv", *stop[1:])
        where = ("--data-dir", data, "--out-dir", out)
        result = run_forked(
            f"{script}.py", *where, *TINY, *args, check=False, prepare=lambda: count_time(log, stop)
        )
        assert result.returncode == code, (script, result.stdout[-1500:], result.stderr[-3000:])
        steps = json.loads(log.read_text())
        return SimpleNamespace(
            folder=folder, stderr=result.stderr, steps=steps["taken"], check=steps["check"]
        )

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Function: the uninterrupted run of a step, made once.

    whole.start : function: a new output folder, with the genre model that a step would train first
    """
    made = {}

    def start(script):
        out = tmp_path_factory.mktemp("out")
        if script in ("step09_transfer", "step10_multitask"):
            shutil.copytree(whole("step07_cnn").folder, out / "step07_cnn")
        return out

    def whole(script, *args):
        if (script, args) not in made:
            made[script, args] = run(script, start(script), "--epochs", EPOCHS, *args)
        return made[script, args]

    whole.start = start
    return whole


# --- interrupted and resumed equals uninterrupted ---------------------------------------


def histories(folder):
    """{run: its history.csv without the times}."""
    return {
        path.parent.name: pd.read_csv(path).drop(columns="seconds")
        for path in sorted(folder.glob("*/history.csv"))
    }


def n_epochs(folder):
    """{run: epochs trained}; every run has a checkpoint that loads and holds one of its epochs."""
    epochs = {name: len(curve) for name, curve in histories(folder).items()}
    for name, n in epochs.items():
        assert 1 <= common.load_model(folder / name / "best.pt")[1]["epoch"] <= n
    return epochs


def assert_same_results(folder, other):
    """Same curves, same kept weights, same predictions, same scores, same time spent."""
    curves, other_curves = histories(folder), histories(other)
    assert curves.keys() == other_curves.keys()
    for name in curves:
        pd.testing.assert_frame_equal(curves[name], other_curves[name], check_exact=True, obj=name)
        first, second = ((place / name / "best.pt").read_bytes() for place in (folder, other))
        assert first == second, name
    for name in ("predictions.csv", "submission.csv"):
        assert (folder / name).exists() == (other / name).exists()
        if (folder / name).exists():
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    # train_seconds too: those before count.
    assert read_metrics(folder)["runs"] == read_metrics(other)["runs"]


# Each is stopped in the middle of an epoch, most of a later network than the first: script, flags,
# the run that is stopped, its finished epochs, those of the networks before it, which are not
# trained again. A fine-tuning of step 9 goes on from a head that is finished.
STOPS = [
    ("step05_lstm", TWO_LSTMS, "mel", 5, EPOCHS),
    ("step07_cnn", (), "cnn_mel", 5, 0),
    ("step08_regression", (), "cnn_energy", 4, 3 * EPOCHS),
    ("step09_transfer", (), "transfer_valence", 1, 1 + round(0.3 * EPOCHS) + EPOCHS),
    ("step10_multitask", (), "multitask_lstm", 4, 2 * EPOCHS),
]


@pytest.mark.parametrize("script, flags, name, epochs, earlier", STOPS)
def test_interrupted_and_resumed_is_uninterrupted(run, whole, script, flags, name, epochs, earlier):
    expected, out = whole(script, *flags), whole.start(script)
    arguments = (script, out, "--epochs", EPOCHS, *flags, "--resume")
    stopped = run(*arguments, stop=(name, epochs, 1), code=130)
    # One line on stderr, no results yet, all finished epochs there to be used.
    assert len(stopped.stderr.splitlines()) == 1 and "--resume" in stopped.stderr, stopped.stderr
    assert n_epochs(stopped.folder)[name] == epochs
    assert not list(stopped.folder.glob("metrics.json"))
    assert not list(stopped.folder.glob("predictions.csv"))
    resumed = run(*arguments)
    assert_same_results(resumed.folder, expected.folder)
    trained_again = "finished epochs were trained again, or others left out"
    assert expected.steps - resumed.steps == BATCHES * (earlier + epochs), trained_again
    # Learning four batches by heart is part of steps 5 and 7, and costs little.
    checked = script in ("step05_lstm", "step07_cnn")
    assert 0 < expected.check <= 120 if checked else expected.check == 0


@pytest.mark.parametrize("script, name", [("step07_cnn", "mel"), ("step09_transfer", "cnn_mel")])
def test_a_genre_model_trained_on_the_way_and_interrupted_is_not_taken_for_finished(
    run, whole, tmp_path, script, name
):
    """A step trains the genre model that it does not find; stopped in there, it goes on there."""
    arguments = (script, tmp_path / "parts", "--epochs", EPOCHS, "--resume")
    if script == "step07_cnn":
        expected = whole(script).folder
        # The CNN is done, the LSTM to compare with is not.
        shutil.copytree(expected, tmp_path / "parts" / script)
        shutil.rmtree(tmp_path / "parts" / script / name)
    else:
        expected = run(script, tmp_path / "whole", "--epochs", EPOCHS).folder
    stopped = run(*arguments, stop=(name, 1, 1), code=130)
    assert len(histories(stopped.folder)[name]) == 1
    assert_same_results(run(*arguments).folder, expected)


def test_without_resume_a_run_begins_anew(run, whole, tmp_path):
    expected = whole("step05_lstm", *TWO_LSTMS)
    arguments = ("step05_lstm", tmp_path, "--epochs", EPOCHS, *TWO_LSTMS)
    run(*arguments, stop=("beat_mel", 3, 0), code=130)
    again = run(*arguments)
    assert again.steps == expected.steps
    assert_same_results(again.folder, expected.folder)


# --- --max-minutes ----------------------------------------------------------------------


def test_six_lstms_share_the_time_evenly(run, tmp_path):
    """Of 66 s each gets 11, which are 5 epochs of 2 s; what is left over goes to the later ones."""
    result = run("step05_lstm", tmp_path, "--epochs", 20, "--max-minutes", 1.1)
    epochs = n_epochs(result.folder)
    assert len(epochs) == 6 and set(epochs.values()) == {5, 6}, epochs
    assert 66 - BATCHES < result.steps <= 66 + BATCHES
    runs = read_metrics(result.folder)["runs"]
    assert {name: facts["epochs"] for name, facts in runs.items()} == epochs
    assert all(facts["test"]["n_clips"] > 0 for facts in runs.values())


def test_a_run_cut_short_goes_on_later_and_others_get_what_it_leaves(run, whole, tmp_path):
    arguments = ("step05_lstm", tmp_path, "--epochs", EPOCHS)
    short = run(*arguments, *TWO_LSTMS, "--max-minutes", 0.2)
    assert n_epochs(short.folder) == {"beat_mel": 3, "mel": 3}
    # One is finished alone; then the other one has the whole time, not half of it.
    run(*arguments, "--features", "beat_mel", *TWO_LSTMS[3:], "--resume")
    rest = run(*arguments, *TWO_LSTMS, "--resume", "--max-minutes", 0.25)
    assert rest.steps == 7 * BATCHES
    assert_same_results(rest.folder, whole("step05_lstm", *TWO_LSTMS).folder)


@pytest.mark.parametrize("flags, names", [
    (("--max-minutes", 0.5), ("cnn_mel",)),  # 15 epochs of 2 s
    (("--ensemble", "--max-minutes", 1), ("cnn_mel", "cnn_mel_seed43", "cnn_mel_seed44")),
])  # fmt: skip
def test_the_cnns_get_the_time_and_an_lstm_that_is_missing_one_epoch(run, tmp_path, flags, names):
    result = run("step07_cnn", tmp_path, "--epochs", 40, *flags)
    each = 30 * flags[-1] // len(names)
    assert n_epochs(result.folder) == dict.fromkeys(names, each) | {"mel": 1}
    assert read_metrics(result.folder)["runs"]["cnn_mel"]["epochs"] == each


@pytest.mark.parametrize(
    "script, flags, n_runs, least",
    [("step08_regression", ("--folds", 2, "--max-minutes", 1), 12, 2),
     ("step09_transfer", ("--max-minutes", 0.5), 4, 3),
     ("step10_multitask", ("--folds", 2, "--max-minutes", 0.5), 6, 2)],
)  # fmt: skip
def test_emotion_runs_and_folds_share_the_time_evenly(run, whole, script, flags, n_runs, least):
    """Planned are 80 epochs, of which step 9's shortest training gets 4."""
    result = run(script, whole.start(script), "--epochs", 80, *flags)
    epochs = n_epochs(result.folder)
    assert len(epochs) == n_runs, epochs
    assert least <= min(epochs.values()) and max(epochs.values()) <= least + 1, epochs
    limit_s = 60 * flags[-1]
    left_or_twice = "time was left over, or used twice"
    assert limit_s - 2 * BATCHES < result.steps <= limit_s + BATCHES, left_or_twice
    assert (result.folder / "predictions.csv").exists()


def test_every_run_gets_one_epoch_however_short_the_time(run, tmp_path):
    result = run("step08_regression", tmp_path, "--epochs", 6, "--max-minutes", 0.01)
    assert list(n_epochs(result.folder).values()) == [1] * 6
