"""Trainings side by side: the same numbers, and what happens when a worker or its parent dies.

By the real command line, in processes of their own: what is tested is processes.
"""

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
from conftest import (
    ROOT,
    patch_everywhere,
    run_forked,
    run_inside,
    run_script,
    write_data_set,
)
from torch import nn

import common
from patrec.clips import read_array
from patrec.errors import InputError, StepFailed
from patrec.flags import Source, TrainingOptions
from patrec.parallel import parallel_map
from patrec.recipes import GENRE_NETWORKS

pytestmark = pytest.mark.slow
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
    """{run: its curve without times, weights, predictions}."""
    folder, found = out / STEP, {}
    table = pd.read_csv(folder / "predictions.csv", dtype=str)
    for path in folder.glob("*/history.csv"):
        name, curve = path.parent.name, pd.read_csv(path).drop(columns="seconds")
        rows = table[table["model"] == name].to_csv(index=False)
        found[name] = curve.to_csv(), path.with_name("best.pt").read_bytes(), rows
    return found


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The results of one training after another, with one thread."""
    out = tmp_path_factory.mktemp("alone")
    run(data, out, "--workers", 1, by=run_forked)
    return results(out)


def test_side_by_side_gives_the_same_numbers(data, alone, tmp_path):
    result = run(data, tmp_path, "--workers", 2)
    assert results(tmp_path) == alone and set(alone) == set(RUNS)
    for name in RUNS:  # every run says how far it is
        assert f"{name} epoch  12/12" in result.stdout


def test_a_training_alone_gives_what_it_gives_among_others(data, alone, tmp_path):
    """In another process, too, with the same seed."""
    flags = ("--features", RUNS[1], *FLAGS[3:], "--data-dir", data, "--out-dir", tmp_path)
    run_script(f"{STEP}.py", *flags)
    assert results(tmp_path) == {RUNS[1]: alone[RUNS[1]]}


def test_test_split_is_read_only_after_training(data, tmp_path, monkeypatch):
    """Bug 3: test clips in training, or validation scores shown as test scores."""
    order, train = [], common.train

    def read(path, *more):
        order.append(path.parent.name)
        return read_array(path, *more)

    def train_noted(*args, **options):
        result = train(*args, **options)
        order.append("checked" if options.get("overfit_batch") else "trained")
        return result

    patch_everywhere(monkeypatch, "read_array", read)
    patch_everywhere(monkeypatch, "train", train_noted)
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "cache"))
    flags = ("--smoke", "--features", *RUNS, "--data-dir", data, "--out-dir", tmp_path)
    assert run_inside(f"{STEP}.py", *flags) == 0
    assert "test" in order and order.count("trained") == 2
    assert "test" not in order[: len(order) - 1 - order[::-1].index("trained")]


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
            raise InputError(f"1e-30 times 1e-10 is {torch.tensor(1e-30) * 1e-10:g}")
        if self.event == "bad input":
            raise InputError("a fault that names its cure")
        return outputs.sum() * math.nan


def small(network, data):
    return common.Classifier(common.make_backbone(network), len(data.names))


@pytest.mark.parametrize("event, error, words", [
    ("not a number", StepFailed, "loss is nan at epoch 1, batch 1"),
    ("killed", StepFailed, "killed.*--workers.*--resume"),
    ("bad input", InputError, "^a fault that names its cure$"),
    ("vanishing", InputError, "is 0$"),  # slow to compute with, otherwise (see Step)
])  # fmt: skip
def test_a_training_that_fails_is_one_line_and_ends_the_step(data, tmp_path, event, error, words):
    source = Source(data, smoke=True)
    training = TrainingOptions(source, tmp_path, tmp_path / "step", epochs=1, workers=2)
    parts = [GENRE_NETWORKS["beat_mel"], small, lambda data: Loss(event), torch.optim.AdamW]
    runs = [common.Experiment(name, *parts) for name in ("one", "two")]
    with pytest.raises(error, match=words):
        common.train_all(training, runs)


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
    command = [sys.executable, ROOT / f"{STEP}.py", *FLAGS, "--workers", 2]
    command += ["--data-dir", data, "--out-dir", out]

    def heed_ctrl_c():  # a test session in the background of a script ignores it, and hands that on
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        [*map(str, command)], start_new_session=True, preexec_fn=heed_ctrl_c,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


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


def test_workers_share_the_cores(monkeypatch):
    """Each with all of them would be several times as slow."""
    monkeypatch.setattr(common.joblib, "cpu_count", lambda: 6)
    names = [("OMP_NUM_THREADS",)] * 2
    assert list(parallel_map(os.getenv, names, workers=2)) == ["3", "3"]
