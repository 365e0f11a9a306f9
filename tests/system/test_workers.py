"""Trainings side by side: the same numbers, and what happens when a worker or its parent dies.

By the real command line, in processes of their own: what is tested is processes.
"""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, patch_everywhere, run_forked, run_script, write_data_set
from torch import nn

import common
import patrec.errors
import patrec.flags
import patrec.parallel
import patrec.recipes
import patrec.step

STEP = "step05_lstm"
RUNS = ("beat_mel", "beat_chroma")
FLAGS = ("--features", *RUNS, "--epochs", 12, "--subset", 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write_data_set(root, per_class=(3, 1), n_emotion=(4, 2), n_frames=(90, 120))


def run(data, out, *args, by=run_script, **options):
    return by(f"{STEP}.py", *FLAGS, "--data-dir", data, "--out-dir", out, *args, **options)


def results(out):
    """Curves without times, weights and answers of a step, by file; no times in it."""
    folder = out / STEP
    found = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    for path in sorted(folder.glob("*/history.csv")):
        curve = pd.read_csv(path).drop(columns="seconds")
        found[path.parent.name] = curve.to_csv(), path.with_name("best.pt").read_bytes()
    return found


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The results of one training after another, with one thread."""
    out = tmp_path_factory.mktemp("alone")
    run(data, out, "--workers", 1, by=run_forked)
    return results(out)


def test_side_by_side_gives_the_same_numbers(data, alone, tmp_path):
    result = run(data, tmp_path, "--workers", 2)
    assert results(tmp_path) == alone
    for name in RUNS:  # every run says how far it is
        assert f"{name} epoch  12/12" in result.stdout


def test_so_does_one_file_for_kaggle(data, alone, tmp_path):
    """There what the workers compute is no module that they could import."""
    run_script("kaggle_kernel.py", 5, "--user", "me", "--out", tmp_path)
    (script,) = tmp_path.glob(f"*/{STEP}.py")
    where = ("--data-dir", data, "--out-dir", tmp_path / "out")
    run_script(script, *FLAGS, *where, "--workers", 2, cwd=tmp_path)
    assert results(tmp_path / "out") == alone


# --- what ends a training ---------------------------------------------------------------


class Loss(nn.Module):
    """What a test wants to happen in the middle of a training."""

    def __init__(self, event):
        super().__init__()
        self.event = event

    def forward(self, outputs, targets):
        if self.event == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.event == "vanishing":
            raise patrec.errors.InputError(f"1e-30 times 1e-10 is {torch.tensor(1e-30) * 1e-10:g}")
        if self.event == "bad input":
            raise patrec.errors.InputError("a fault that names its cure")
        return outputs.sum() * math.nan


def small(network, data):
    return common.Classifier(common.make_backbone(network), len(data.names))


def make_training(data, folder, **changes):
    source = patrec.flags.Source(data, smoke=True)
    return patrec.flags.TrainingOptions(
        source, folder, folder / "step", epochs=1, workers=2, **changes
    )


@pytest.mark.parametrize(
    "event, error, words",
    [
        ("not a number", patrec.errors.StepFailed, "loss is nan at epoch 1, batch 1"),
        ("killed", patrec.errors.StepFailed, "killed.*--workers.*--resume"),
        ("bad input", patrec.errors.InputError, "^a fault that names its cure$"),
        (
            "vanishing",
            patrec.errors.InputError,
            "is 0$",
        ),  # slow to compute with, otherwise (see Step)
    ],
)
def test_a_training_that_fails_is_one_line_and_ends_the_step(data, tmp_path, event, error, words):
    runs = [
        common.Experiment(
            name,
            patrec.recipes.GENRE_NETWORKS["beat_mel"],
            small,
            lambda data: Loss(event),
            torch.optim.AdamW,
        )
        for name in ("one", "two")
    ]
    with pytest.raises(error, match=words):
        common.train_all(make_training(data, tmp_path), runs)


def test_what_vanishes_is_zero_before_a_worker_begins_to_compute(tmp_path, monkeypatch):
    """The setting is a thread's; those of a product have it from the thread that begins them."""
    torch.set_flush_denormal(False)

    def load_data(*_, **__):
        raise patrec.errors.InputError(f"{torch.tensor(1e-30) * 1e-10:g}")

    patch_everywhere(monkeypatch, "load_data", load_data)
    run = common.Experiment("one", patrec.recipes.GENRE_NETWORKS["beat_mel"], None, None, None)
    training = patrec.flags.TrainingOptions(patrec.flags.Source(tmp_path), tmp_path, tmp_path)
    with pytest.raises(patrec.errors.InputError, match="^0$"):
        common.train_fold(training, run, 0, 1)


def test_a_step_whose_worker_was_killed_goes_on_later(data, alone, tmp_path):
    with start(data, tmp_path) as process:
        worker = wait_for(lambda: workers_of(process.pid) if begun(tmp_path) else [])[0]
        os.kill(worker, signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
    line = [line for line in stderr.splitlines() if line.startswith("failed: ")]
    assert process.returncode == 1 and len(line) == 1 and "--resume" in line[0], stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / STEP / "metrics.json").exists()
    run(data, tmp_path, "--workers", 1, "--resume", by=run_forked)
    assert results(tmp_path) == alone


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_goes_on_without_its_step(data, alone, tmp_path, number):
    """Killed, or Ctrl-C on a terminal, which every process of the group gets."""
    with start(data, tmp_path) as process:
        workers = wait_for(lambda: workers_of(process.pid) if begun(tmp_path) else [])
        (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
        _, stderr = process.communicate(timeout=120)
    wait_for(lambda: not any(map(alive, workers)), seconds=20)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "--resume goes on" in stderr
        assert "Traceback" not in stderr, stderr
    run(data, tmp_path, "--workers", 1, "--resume", by=run_forked)
    assert results(tmp_path) == alone


def start(data, out):
    command = [sys.executable, str(ROOT / f"{STEP}.py"), *FLAGS, "--workers", 2]
    command += ["--data-dir", data, "--out-dir", out]
    text = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heed_ctrl_c():  # a test session in the background of a script ignores it, and hands that on
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        [*map(str, command)], start_new_session=True, preexec_fn=heed_ctrl_c, **text
    )


def begun(out):
    return any(out.glob(f"{STEP}/*/history.csv"))


def workers_of(pid) -> list[int]:
    """Processes that a process has started to compute in."""
    listed = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return [int(p) for p, parent, args in rows if int(parent) == pid and "LokyProcess" in args]


def alive(pid) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return status != "Z"


def wait_for(condition, seconds=100):
    late = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < late, "waited in vain"
        time.sleep(0.02)
    return found


# --- how many at once, and for how long -------------------------------------------------


def test_a_process_per_core_or_card_unless_told_otherwise(data, tmp_path, monkeypatch):
    training = patrec.flags.TrainingOptions(patrec.flags.Source(data), tmp_path, tmp_path)
    monkeypatch.setattr(common.joblib, "cpu_count", lambda: 4)
    assert [common.count_workers(training, n) for n in (1, 3, 9)] == [1, 3, 4]
    told = dataclasses.replace(training, workers=6)
    assert [common.count_workers(told, n) for n in (3, 9)] == [3, 6]
    smoke = dataclasses.replace(training, source=patrec.flags.Source(data, smoke=True))
    assert common.count_workers(smoke, 9) == 1  # a process takes longer to begin
    cards = dataclasses.replace(training, source=patrec.flags.Source(data, device="cuda"))
    for n_cards, workers in ((2, 2), (1, 1), (0, 1)):
        monkeypatch.setattr(common.torch.cuda, "device_count", lambda n=n_cards: n)
        assert common.count_workers(cards, 9) == workers


def test_each_worker_takes_a_card_of_its_own(monkeypatch):
    """Workers are named LokyProcess-1, -2, ...; a card of Kaggle's two was idle before."""
    taken = []
    monkeypatch.setattr(common.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(common.torch.cuda, "set_device", taken.append)
    patch_everywhere(monkeypatch, "keep_freed_memory", lambda: None)
    for number in (1, 2, 3):
        named = type("Process", (), {"name": f"LokyProcess-{number}"})
        monkeypatch.setattr(common.multiprocessing, "current_process", lambda p=named: p)
        assert patrec.parallel.in_worker(os.getpid(), max, number, 0) == number
    assert sorted(taken[:2]) == [0, 1] and taken[2] == taken[0]


@pytest.mark.parametrize(
    "workers, later, shares", [(1, 0, [5, 4, 3, 2, 1]), (2, 1, [3, 3, 2, 2, 1])]
)
def test_trainings_share_the_time_that_is_left(tmp_path, monkeypatch, workers, later, shares):
    """By how many rounds are still to come, those of a later phase included."""
    asked = []

    def parallel_map(function, tasks, workers):
        asked.extend(task[-1] for task in tasks)
        raise patrec.errors.StepFailed("enough seen")

    patch_everywhere(monkeypatch, "parallel_map", parallel_map)
    patch_everywhere(monkeypatch, "load_data", lambda *args, **options: None)
    source = patrec.flags.Source(tmp_path)
    training = patrec.flags.TrainingOptions(source, tmp_path, tmp_path, workers=workers)
    network = patrec.recipes.GENRE_NETWORKS["mel"]
    runs = [
        common.Experiment(name, network, None, None, None, n_folds=n)
        for name, n in (("a", 2), ("b", 3))
    ]
    with pytest.raises(patrec.errors.StepFailed, match="enough"):
        common.train_all(training, runs, to_come=later)
    assert asked == shares


def test_workers_share_the_cores(monkeypatch):
    """Each with all of them would be several times as slow."""
    monkeypatch.setattr(common.joblib, "cpu_count", lambda: 6)
    names = [("OMP_NUM_THREADS",)] * 2
    assert list(patrec.parallel.parallel_map(os.getenv, names, workers=2)) == ["3", "3"]


# --- Dask -------------------------------------------------------------------------------
