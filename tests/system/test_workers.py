"""Trainings side by side: the same numbers, and what happens when a worker or its parent dies."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_forked, run_script, training_results, wait_for
from torch import nn

import common
from patrec.errors import StepFailed
from patrec.flags import Source, TrainingOptions
from patrec.parallel import parallel_map
from patrec.recipes import GENRE_NETWORKS

pytestmark = pytest.mark.slow
STEP = "step05_lstm"
RUNS = ("beat_mel", "beat_chroma")
FLAGS = ("--features", *RUNS, "--epochs", 12, "--subset", 16)


@pytest.fixture(scope="module")
def alone(tiny_data, tmp_path_factory):
    """The results of one training after another, with one thread."""
    out = tmp_path_factory.mktemp("alone")
    run_forked(f"{STEP}.py", *FLAGS, "--workers", 1, "--data-dir", tiny_data, "--out-dir", out)
    return training_results(out / STEP)


def test_side_by_side_gives_the_same_numbers(tiny_data, alone, tmp_path):
    where = ("--data-dir", tiny_data, "--out-dir", tmp_path)
    result = run_script(f"{STEP}.py", *FLAGS, "--workers", 2, *where)
    assert training_results(tmp_path / STEP) == alone and alone.keys() > set(RUNS)
    for name in RUNS:  # every run says how far it is
        assert f"{name} epoch  12/12" in result.stdout


def test_a_training_alone_gives_what_it_gives_among_others(tiny_data, alone, tmp_path):
    flags = ("--features", RUNS[1], *FLAGS[3:], "--data-dir", tiny_data, "--out-dir", tmp_path)
    run_forked(f"{STEP}.py", *flags)
    assert training_results(tmp_path / STEP)[RUNS[1]] == alone[RUNS[1]]


class NoNumber(nn.Module):
    def forward(self, outputs, targets):
        return outputs.sum() * math.nan


def test_a_training_that_fails_in_a_worker_ends_the_step_in_one_line(tiny_data, tmp_path):
    source, folder = Source(tiny_data, smoke=True), tmp_path / "step"
    training = TrainingOptions(source, tmp_path, folder, epochs=1, workers=2)
    make = common.make_classifier, lambda data: NoNumber(), torch.optim.Adam
    runs = [common.Experiment(n, GENRE_NETWORKS["beat_mel"], *make) for n in ("one", "two")]
    with pytest.raises(StepFailed, match="loss is nan at epoch 1, batch 1"):
        common.train_all(training, runs)


@pytest.mark.parametrize("event", ["worker killed", "step killed", "Ctrl-C"])
def test_nothing_goes_on_without_its_step_but_by_resume(tiny_data, alone, tmp_path, event):
    """Ctrl-C on a terminal every process of the group gets."""
    with start(tiny_data, tmp_path) as process:
        wait_for(lambda: any(tmp_path.glob(f"{STEP}/*/history.csv")))  # trainings have begun
        workers = wait_for(lambda: workers_of(process.pid))
        if event == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid if event == "step killed" else workers[0], signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
    wait_for(lambda: not any(map(alive, workers)), seconds=20)
    code = {"worker killed": 1, "step killed": -signal.SIGKILL, "Ctrl-C": 130}[event]
    assert process.returncode == code and "Traceback" not in stderr, stderr
    if event == "worker killed":
        (line,) = [line for line in stderr.splitlines() if line.startswith("failed: ")]
        assert "killed" in line and "--workers" in line and "--resume" in line
    elif event == "Ctrl-C":
        assert "--resume continues" in stderr
    assert not (tmp_path / STEP / "metrics.json").exists()
    if event == "worker killed":
        flags = (*FLAGS, "--workers", 1, "--resume", "--data-dir", tiny_data, "--out-dir", tmp_path)
        run_forked(f"{STEP}.py", *flags)
        assert training_results(tmp_path / STEP) == alone


def start(data, out):
    command = [sys.executable, ROOT / f"{STEP}.py", *FLAGS, "--workers", 2]
    command += ["--data-dir", data, "--out-dir", out]

    def heed_ctrl_c():  # a test session in the background of a script ignores it, and hands that on
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        [*map(str, command)], start_new_session=True, preexec_fn=heed_ctrl_c,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


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


def test_workers_share_the_cores(monkeypatch):
    """Each with all of them would be several times as slow."""
    monkeypatch.setattr(common.joblib, "cpu_count", lambda: 6)
    names = [("OMP_NUM_THREADS",)] * 2
    assert list(parallel_map(os.getenv, names, workers=2)) == ["3", "3"]
