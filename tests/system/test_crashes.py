"""Killed processes, two processes at once: nothing half-written, and the same numbers."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a process of its own, see below

from conftest import ROOT, read_metrics, run_inside, write_data_set  # noqa: E402

import patrec.files  # noqa: E402

pytestmark = pytest.mark.slow
BEATS = ("--smoke", "--features", "beat_mel", "--device", "cpu")


def check_table(path):
    table = pd.read_csv(path)
    if path.name == "history.csv":
        assert table["epoch"].tolist() == list(range(1, len(table) + 1)), f"{path}: epochs missing"
    table = table.drop(columns="fold", errors="ignore")  # of emotion clips only
    assert len(table) and not table.isna().any(axis=None), f"{path}: cut short"


def check_end(path):
    content = path.read_bytes()
    whole = content.startswith(b"# step05") if path.suffix == ".md" else b"IEND" in content[-12:]
    assert whole, f"{path}: cut short"


def check_whole(folder) -> int:
    """Read every finished file below a folder; returns their number. A half-written one raises."""
    read = {
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": check_table, ".png": check_end, ".md": check_end,
    }  # fmt: skip
    paths = [p for p in folder.rglob("*") if p.suffix in read and not p.name.startswith(".")]
    for path in paths:
        read[path.suffix](path)
    return len(paths)


def results(out):
    """What must not depend on kills: scores, learning curves without times, the kept weights."""
    folder = out / "step05_lstm"
    runs = read_metrics(folder)["runs"]
    for name, run in runs.items():
        run.pop("train_seconds")
        curve = pd.read_csv(folder / name / "history.csv").drop(columns="seconds")
        run["history"] = curve.to_dict("list")
        run["weights"] = (folder / name / "best.pt").read_bytes()
    return runs


def start(data, out) -> int:
    """Run step 5 in a child process, which shares this one's imports; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    flags = (*BEATS, "--epochs", 8, "--subset", 16, "--resume")
    nowhere = contextlib.redirect_stdout(open(os.devnull, "w"))  # noqa: SIM115, until it ends
    with contextlib.suppress(BaseException), nowhere:
        code = run_inside("step05_lstm.py", *flags, "--data-dir", data, "--out-dir", out)
    os._exit(code)


def kill_series(scratch, n_kills=20):
    """Kill step 5 at random moments; a run that gets through is compared, the next starts anew."""
    rng, data = random.Random(0), scratch / "data"
    os.environ["PATREC_CACHE"] = str(scratch / "whole cache")
    # What is slow at first use, fonts and torch's compiler, is loaded here and not in every child.
    plt.figure().savefig(os.devnull, format="png")
    torch.optim.AdamW([torch.zeros(1)])
    began = time.monotonic()
    assert os.waitpid(start(data, scratch / "whole"), 0)[1] == 0
    seconds = time.monotonic() - began
    expected = results(scratch / "whole")
    kills, files, finished, resumed = 0, 0, 0, 0
    while kills < n_kills or not finished:
        out = scratch / f"run {finished}"
        # Empty at first, so that kills strike there too.
        os.environ["PATREC_CACHE"] = str(scratch / f"cache {finished}")
        pid = start(data, out)
        if kills < n_kills:
            time.sleep(rng.uniform(0.1, 1.0) * seconds)  # the run begins with the overfit check
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        files += check_whole(out)
        if os.WIFSIGNALED(status):
            kills += 1
            resumed += len(list(out.rglob("last.pt")))
            continue
        assert status == 0, "a resumed run failed"
        assert results(out) == expected, "other numbers after kills"
        assert not list(out.rglob("*.tmp")), "half-written files of killed runs are left"
        finished += 1
    print(json.dumps({"kills": kills, "files": files, "finished": finished, "resumed": resumed}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which Windows cannot")
def test_kill_9_at_random_moments(tmp_path):
    """20 kills: all files whole, --resume gets through, to the numbers of a run not killed.

    The killed process held the folder's lock: each new start also shows that it is free again.
    """
    write_data_set(tmp_path / "data", per_class=(3, 1), n_emotion=(2, 1), n_frames=20)
    command = [sys.executable, __file__, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["kills"] == 20 and counts["finished"] >= 1
    too_early = "kills struck before anything was written"
    assert counts["files"] > 40 and counts["resumed"] > 5, too_early


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.skipif(sys.platform == "win32", reason="no folder locks on Windows")
def test_two_processes_do_not_write_into_one_folder(tiny_data, tmp_path, capsys):
    arguments = [*BEATS, "--data-dir", str(tiny_data), "--out-dir", str(tmp_path)]
    folder = tmp_path / "step05_lstm"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, str(ROOT / "step05_lstm.py"), *arguments], **pipes)
    try:
        assert first.stdout.readline().startswith("step05_lstm: data")  # it has the folder now
        os.kill(first.pid, signal.SIGSTOP)
        # As if the first were writing it.
        (folder / ".best.pt.0123abcd.tmp").write_text("half a file")
        before = files_of(folder)
        capsys.readouterr()
        code = run_inside("step05_lstm.py", *arguments)
        (error,) = capsys.readouterr().err.splitlines()
        assert code == 2 and str(folder) in error
        assert "another process" in error and "--out-dir" in error
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


if __name__ == "__main__":
    kill_series(Path(sys.argv[1]))
