"""Killed processes, two processes at once: nothing half-written, and the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import ROOT, error_line, read_metrics, run_forked, training_results, write_data_set

import patrec.files

pytestmark = pytest.mark.slow
STEP = "step05_lstm"
BEATS = ("--smoke", "--features", "beat_mel", "--device", "cpu")


def check_table(path):
    table = pd.read_csv(path)
    if path.name == "history.csv":
        assert table["epoch"].tolist() == list(range(1, len(table) + 1)), f"{path}: epochs missing"
    table = table.drop(columns="fold", errors="ignore")  # of emotion clips only
    assert len(table) and not table.isna().any(axis=None), f"{path}: cut short"


def check_whole(folder) -> int:
    """Read every finished file below a folder; returns their number. A half-written one raises."""
    read = {
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": check_table,
    }
    paths = [p for p in folder.rglob("*") if p.suffix in read and not p.name.startswith(".")]
    for path in paths:
        read[path.suffix](path)
    return len(paths)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which Windows cannot")
def test_kill_9_at_random_moments(tmp_path, monkeypatch):
    """All files are whole, --resume gets through, to the numbers of a run that was not killed.

    The killed process held the folder's lock: each new start also shows that it is free again. A
    run that gets through before it is killed is compared, and the next one starts anew.
    """
    data = write_data_set(tmp_path / "data", per_class=(3, 1), n_emotion=(2, 1), n_frames=20)
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, file, **options: None)

    def run(out, **options):
        flags = (*BEATS, "--epochs", 16, "--subset", 16, "--resume", "--data-dir", data)
        cache = str(tmp_path / f"cache of {out.name}")  # empty at first: kills strike there too
        options |= {"check": False, "PATREC_CACHE": cache}
        return run_forked(f"{STEP}.py", *flags, "--out-dir", out, **options)

    began, rng = time.monotonic(), random.Random(0)
    assert run(tmp_path / "whole").returncode == 0
    seconds = time.monotonic() - began
    expected = training_results(tmp_path / "whole" / STEP)
    moments = [rng.uniform(0.1, 0.9) * seconds for _ in range(8)] + [600]
    killed, finished, files, resumed = 0, 0, 0, 0
    for moment in moments:
        out = tmp_path / f"run {finished}"
        result = run(out, timeout=moment)  # after which it is killed
        files += check_whole(out)
        if result.returncode == -signal.SIGKILL:
            killed += 1
            resumed += len(list(out.rglob("last.pt")))
            continue
        assert result.returncode == 0, result.stderr
        assert training_results(out / STEP) == expected, "other numbers after kills"
        assert not list(out.rglob("*.tmp")), "half-written files of killed runs are left"
        finished += 1
    assert killed > 3 and files > 10 and resumed > 1, "too few kills, or too early, to tell"


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.skipif(sys.platform == "win32", reason="no folder locks on Windows")
def test_two_processes_do_not_write_into_one_folder(tiny_data, tmp_path, capsys):
    arguments = [*BEATS, "--data-dir", str(tiny_data), "--out-dir", str(tmp_path)]
    folder = tmp_path / STEP
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, str(ROOT / f"{STEP}.py"), *arguments], **pipes)
    try:
        assert first.stdout.readline().startswith(f"{STEP}: data")  # it has the folder now
        os.kill(first.pid, signal.SIGSTOP)
        (folder / ".best.pt.0123abcd.tmp").write_text("half a file")  # as if the first wrote it
        before = files_of(folder)
        error = error_line(capsys, f"{STEP}.py", *arguments)
        assert f"{folder}: another process" in error and "another output folder" in error
        assert files_of(folder) == before
        os.kill(first.pid, signal.SIGCONT)
        _, errors = first.communicate(timeout=120)
        assert first.returncode == 0, errors
        assert set(read_metrics(folder)["runs"]) == {"beat_mel"}
    finally:
        first.kill()
        first.wait()
    patrec.files.lock_folder(folder)  # free again; and now that nobody else is there, cleared
    assert not list(folder.rglob("*.tmp"))
