"""Killed processes, two processes at once, broken caches: nothing half-written, same numbers."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, read_metrics, run_inside, write_data_set
from test_train import train

import common
import patrec.clips
import patrec.files
import patrec.labels

RUN = (
    "--smoke",
    "--epochs",
    "8",
    "--subset",
    "16",
    "--features",
    "beat_mel",
    "--device",
    "cpu",
    "--resume",
)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("tiny"), n_emotion=(2, 1), n_frames=(60, 120))


# --- kill -9 ----------------------------------------------------------------------------


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
        ".png": (
            lambda path: (
                path.read_bytes().endswith(b"IEND\xaeB`\x82") or pytest.fail(f"{path}: cut short")
            )
        ),
        ".md": (
            lambda path: (
                path.read_text().startswith("# step05") or pytest.fail(f"{path}: cut short")
            )
        ),
    }
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in read and not path.name.startswith(".")
    ]
    for path in paths:
        read[path.suffix](path)
    return len(paths)


def results(out):
    """What must not depend on kills: scores, learning curves without times, the kept weights."""
    folder = out / "step05_lstm"
    runs = read_metrics(folder)["runs"]
    for name, run in runs.items():
        run.pop("train_seconds")
        run["history"] = (
            pd.read_csv(folder / name / "history.csv").drop(columns="seconds").to_dict("list")
        )
        run["weights"] = (folder / name / "best.pt").read_bytes()
    return runs


def start(data, out) -> int:
    """Run step 5 in a child process, which shares this one's imports; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with (
        contextlib.suppress(BaseException),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        code = run_inside("step05_lstm.py", *RUN, "--data-dir", data, "--out-dir", out)
    os._exit(code)


def kill_series(scratch, n_kills=20):
    """Kill step 5 at random moments; a run that gets through is compared, the next starts anew."""
    rng = random.Random(0)
    data = scratch / "data"
    os.environ["PATREC_CACHE"] = str(scratch / "whole cache")
    # What is slow at first use, fonts and torch's compiler, is loaded here and not in every child.
    common.plt.figure().savefig(os.devnull, format="png")
    torch.optim.AdamW([torch.zeros(1)])
    began = time.monotonic()
    assert os.waitpid(start(data, scratch / "whole"), 0)[1] == 0
    seconds = time.monotonic() - began
    expected = results(scratch / "whole")
    kills, files, finished, resumed = 0, 0, 0, 0
    while kills < n_kills or not finished:
        out = scratch / f"run {finished}"
        os.environ["PATREC_CACHE"] = str(
            scratch / f"cache {finished}"
        )  # empty at first, so that kills strike there too
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
    result = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts["kills"] == 20 and counts["finished"] >= 1
    assert counts["files"] > 40 and counts["resumed"] > 5, (
        "kills struck before anything was written"
    )


def test_a_finished_run_stays_as_it_was_when_resumed(tmp_path):
    _, whole = train(tmp_path / "run", epochs=3)
    state = (tmp_path / "run" / "last.pt").read_bytes()
    _, again = train(tmp_path / "run", epochs=3, resume=True)
    assert whole.facts["epochs"] == again.facts["epochs"] == 3
    assert whole.history.equals(again.history)
    assert (tmp_path / "run" / "last.pt").read_bytes() == state


def test_a_run_begun_anew_and_killed_at_once_is_not_resumed_as_the_old_one(tmp_path):
    train(tmp_path / "run", epochs=2)

    class Stopped(torch.nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", epochs=2, loss=Stopped())
    best = common.load_checkpoint(
        tmp_path / "run" / "best.pt"
    )  # the old run's, until the new one has one
    assert best["epoch"] and not (tmp_path / "run" / "last.pt").exists()


def test_overfit_batch_after_a_full_run_leaves_that_run_untouched(tmp_path):
    """And ends with exit code 0; what it measured lies beside, in a folder of its own."""
    counts = {"per_class": (3, 1), "n_emotion": (2, 1), "n_frames": 20}
    data = write_data_set(tmp_path / "data", **counts)
    flags = ["--smoke", "--epochs", 1, "--features", "beat_mel", "--device", "cpu"]
    flags += ["--data-dir", data, "--out-dir", tmp_path / "out"]
    folder = tmp_path / "out" / "step05_lstm"
    assert run_inside("step05_lstm.py", *flags) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"summary.md", "metrics.json"} < {path.name for path in before}
    assert run_inside("step05_lstm.py", *flags, "--overfit-batch") == 0
    assert {path: path.read_bytes() for path in before} == before
    check = read_metrics(folder / "overfit_batch")
    assert check["overfit"]["beat_mel"]["accuracy"] == 1 and not check["runs"]
    assert check["overfit"]["beat_mel"]["loss"] < 0.01


# --- two processes ----------------------------------------------------------------------


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.skipif(sys.platform == "win32", reason="no folder locks on Windows")
def test_two_processes_do_not_write_into_one_folder(tiny_data, tmp_path, capsys):
    arguments = [
        "--smoke",
        "--features",
        "beat_mel",
        "--data-dir",
        str(tiny_data),
        "--out-dir",
        str(tmp_path),
    ]
    folder = tmp_path / "step05_lstm"
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "step05_lstm.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline().startswith("step05_lstm: data")  # it has the folder now
        os.kill(first.pid, signal.SIGSTOP)
        (folder / ".best.pt.0123abcd.tmp").write_text(
            "half a file"
        )  # as if the first were writing it
        before = files_of(folder)
        capsys.readouterr()
        code = run_inside("step05_lstm.py", *arguments)
        error = capsys.readouterr().err.splitlines()
        assert code == 2 and len(error) == 1, error
        assert str(folder) in error[0] and "another process" in error[0] and "--out-dir" in error[0]
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


# --- the cache --------------------------------------------------------------------------


@pytest.fixture
def entries(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATREC_CACHE", str(tmp_path / "cache"))
    return patrec.labels.read_entries(tiny_data, "genre", "train")


def test_clips_are_the_same_however_many_threads_read_them(entries, tmp_path):
    stores = []
    for threads in (1, 4, 16):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        stores.append(patrec.clips.load_clips(entries, threads=threads))
    for store in stores[1:]:
        assert torch.equal(store.frames, stores[0].frames) and torch.equal(
            store.starts, stores[0].starts
        )
        assert store.digests == stores[0].digests and store.entries == stores[0].entries


SPOILT = [
    lambda content: b"",
    lambda content: content[:7],
    lambda content: content[:-1000],
    lambda content: bytes(len(content)),
    lambda content: content[-3000:],
    lambda content: content[:-8] + bytes([255] * 8),
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_broken_cache_is_made_anew(entries, tmp_path, spoil):
    frames = patrec.clips.load_clips(entries).frames.clone()
    (cache,) = (tmp_path / "cache").iterdir()
    content = cache.read_bytes()
    cache.unlink()
    cache.write_bytes(spoil(content))
    assert torch.equal(patrec.clips.load_clips(entries).frames, frames)
    assert cache.read_bytes() == content


def test_what_killed_runs_left_in_the_cache_goes_after_an_hour(entries, tmp_path):
    (tmp_path / "cache").mkdir()
    names = ["0123.clips.89ab.tmp", "4567.clips.89ab.tmp", "mine.tmp"]
    for name in names:
        (tmp_path / "cache" / name).write_bytes(b"half")
    os.utime(tmp_path / "cache" / names[0], (time.time() - 4000,) * 2)
    patrec.clips.load_clips(entries)
    left = {path.name for path in (tmp_path / "cache").glob("*.tmp")}
    assert left == set(
        names[1:]
    )  # a fresh one may be another process's, and a stranger's is not ours to remove


def test_a_set_larger_than_memory_is_mapped_read_only(entries, monkeypatch):
    """Linux refuses a copy-on-write mapping larger than its memory."""
    usual = patrec.clips.load_clips(entries)
    memmap = np.memmap

    def refuse(path, dtype, mode, **options):
        if mode == "c":
            raise OSError(12, "Cannot allocate memory")
        return memmap(path, dtype, mode, **options)

    monkeypatch.setattr(np, "memmap", refuse)
    store = patrec.clips.load_clips(entries)
    assert torch.equal(store.frames, usual.frames)
    first, second = (
        common.SpectrogramDataset(
            s, range(len(entries)), "mel", common.band_statistics(s, range(9))
        )[3][0]
        for s in (store, usual)
    )
    assert torch.equal(first, second)


if __name__ == "__main__":
    kill_series(Path(sys.argv[1]))
