"""Interrupted and resumed trainings, and --max-minutes, through the command line.

Time is counted and not measured: a step of a training's optimiser takes one second, and
nothing else takes any. So a run can be stopped at an exact step, and a limit of minutes is an
exact number of epochs.
"""

import json
import os
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import read_metrics, run_forked, training_results, write_data_set
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork processes")
pytestmark = [pytest.mark.slow, needs_fork]
EPOCHS, BATCHES = 10, 2  # passes over 16 clips in batches of 8: an epoch takes 2 s
TINY = ("--smoke", "--subset", 16, "--batch-size", 8, "--device", "cpu", "--epochs", EPOCHS)
TWO_LSTMS = ("--features", "beat_mel", "mel", "--lr", 0.02)


def count_time(log, stop):
    """In the process of a step: replace the clock, stop where asked, write down the steps taken."""
    plt.Figure.savefig = lambda figure, file, **options: None  # other tests look at pictures
    steps = {"taken": 0, "since": 0, "check": 0}
    time.time = time.monotonic = time.perf_counter = lambda: 1000.0 + steps["taken"]

    def before_step(optimizer, *_):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        if sum(map(torch.numel, weights)) < 20_000:  # step 7's digits
            return
        trains = optimizer.defaults["fused"]  # and is not the overfit check
        steps["taken" if trains else "check"] += 1
        if trains and stop and stop[0].exists() and len(stop[0].read_text().splitlines()) > stop[1]:
            if steps["since"] == stop[2]:
                raise KeyboardInterrupt
            steps["since"] += 1
        log.write_text(json.dumps(steps))

    log.write_text(json.dumps(steps))
    register_optimizer_step_pre_hook(before_step)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Function: run a step under the counted clock; stop : (run, epochs, steps after them)."""
    # Clips are longer than every crop, so that a resumed run must also draw the same crops.
    data = write_data_set(
        tmp_path_factory.mktemp("resume_data"), per_class=(5, 1), n_emotion=(40, 5),
        n_frames=(660, 700), n_beats=(14, 40), test_frames=(300, 330), dtype="float32",
    )  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "steps.json"

    def run(script, out, *args, stop=None, code=0):
        folder = out / script
        stop = stop and (folder / stop[0] / "history.csv", *stop[1:])
        args = ("--data-dir", data, "--out-dir", out, *TINY, *args)  # of --epochs the last counts
        options = {"check": False, "prepare": lambda: count_time(log, stop)}
        result = run_forked(f"{script}.py", *args, **options)
        assert result.returncode == code, (script, result.stdout[-1500:], result.stderr[-3000:])
        steps, found = json.loads(log.read_text()), {"folder": folder, "stderr": result.stderr}
        return SimpleNamespace(steps=steps["taken"], check=steps["check"], **found)

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """An uninterrupted run of two LSTMs."""
    return run("step05_lstm", tmp_path_factory.mktemp("whole"), *TWO_LSTMS)


def n_epochs(folder):
    """{run: epochs trained}; every run has a checkpoint that loads and holds one of its epochs."""
    epochs = {path.parent.name: len(pd.read_csv(path)) for path in folder.glob("*/history.csv")}
    for name, n in epochs.items():
        assert 1 <= common.load_model(folder / name / "best.pt")[1]["epoch"] <= n
    return epochs


def assert_same_results(folder, other):
    assert training_results(folder) == training_results(other)
    assert read_metrics(folder)["runs"] == read_metrics(other)["runs"]  # train_seconds too


def assert_stopped(result, name, epochs):
    """One line on stderr, no results yet, all finished epochs there to be used."""
    assert len(result.stderr.splitlines()) == 1 and "--resume" in result.stderr, result.stderr
    assert n_epochs(result.folder)[name] == epochs
    assert not list(result.folder.glob("metrics.json"))
    assert not list(result.folder.glob("predictions.csv"))


def test_interrupted_and_resumed_is_uninterrupted(run, whole, tmp_path):
    """In the middle of an epoch of the second network; nothing finished is trained again."""
    arguments = ("step05_lstm", tmp_path, *TWO_LSTMS, "--resume")
    assert_stopped(run(*arguments, stop=("mel", 5, 1), code=130), "mel", 5)
    resumed = run(*arguments)
    assert_same_results(resumed.folder, whole.folder)
    assert whole.steps - resumed.steps == BATCHES * (EPOCHS + 5)
    # Learning four batches by heart is part of the step, and costs little.
    assert 0 < whole.check <= 120


def test_every_training_of_a_step_is_resumed(run, tmp_path):
    """The genre model trained on the way, not to be taken for finished; then a fine-tuning."""
    expected = run("step09_transfer", tmp_path / "whole")
    arguments = ("step09_transfer", tmp_path / "parts", "--resume")
    assert_stopped(run(*arguments, stop=("cnn_mel", 1, 1), code=130), "cnn_mel", 1)
    assert_stopped(run(*arguments, stop=("transfer_valence", 1, 1), code=130), "cnn_mel", EPOCHS)
    resumed = run(*arguments)
    assert_same_results(resumed.folder, expected.folder)
    assert resumed.steps == BATCHES * (8 - 1), "finished epochs were trained again"
    # A network of three emotions, with step 9's model.
    expected = run("step10_multitask", tmp_path / "whole")
    arguments = ("step10_multitask", tmp_path / "parts", "--resume")
    stopped = run(*arguments, stop=("multitask_lstm", 4, 1), code=130)
    assert_stopped(stopped, "multitask_lstm", 4)
    assert_same_results(run(*arguments).folder, expected.folder)


def test_without_resume_a_run_begins_anew(run, whole, tmp_path):
    arguments = ("step05_lstm", tmp_path, *TWO_LSTMS)
    run(*arguments, stop=("beat_mel", 3, 0), code=130)
    again = run(*arguments)
    assert again.steps == whole.steps
    assert_same_results(again.folder, whole.folder)


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
    arguments = ("step05_lstm", tmp_path)
    short = run(*arguments, *TWO_LSTMS, "--max-minutes", 0.2)
    assert n_epochs(short.folder) == {"beat_mel": 3, "mel": 3}
    # One is finished alone; then the other one has the whole time, not half of it.
    run(*arguments, "--features", "beat_mel", *TWO_LSTMS[3:], "--resume")
    rest = run(*arguments, *TWO_LSTMS, "--resume", "--max-minutes", 0.25)
    assert rest.steps == 7 * BATCHES
    assert_same_results(rest.folder, whole.folder)


def test_the_cnns_get_the_time_and_an_lstm_that_is_missing_one_epoch(run, tmp_path):
    flags = ("--epochs", 40, "--ensemble", "--max-minutes", 1)  # 30 epochs of 2 s
    result = run("step07_cnn", tmp_path, *flags)
    cnns = ("cnn_mel", "cnn_mel_seed43", "cnn_mel_seed44")
    assert n_epochs(result.folder) == dict.fromkeys(cnns, 10) | {"mel": 1}


def test_emotions_and_folds_share_the_time_and_each_gets_an_epoch(run, tmp_path):
    """Of 30 s the twelve trainings get one epoch each, and three of them another."""
    flags = ("--epochs", 80, "--folds", 2, "--max-minutes", 0.5)
    result = run("step08_regression", tmp_path, *flags)
    epochs = n_epochs(result.folder)
    assert len(epochs) == 12 and set(epochs.values()) == {1, 2}, epochs
    assert 30 - 2 * BATCHES < result.steps <= 30 + BATCHES
    # Each of the five models, baselines too, predicts every clip in the fold that holds it out.
    clips = pd.read_csv(result.folder / "predictions.csv").groupby(["model", "target"])["clip"]
    assert len(clips) == 5 * 3 and set(clips.size()) == set(clips.nunique()) == {40}
