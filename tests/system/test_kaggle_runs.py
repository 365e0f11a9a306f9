"""The one file of a step, run in a made-up /kaggle and alone in an empty folder.

$PATREC_KAGGLE_ROOT stands in for /kaggle, so that the mounts can be laid out here.
"""

import re
import shutil
import sys
import tempfile

import pytest
from conftest import ROOT, read_metrics, run_forked, run_script, training_results

from patrec.machine import kaggle_root
from tools import kaggle
from tools.steps import STEPS

pytestmark = pytest.mark.slow
NAME = "patreco3-multitask-affective-music"
MOUNTS = f"input/{NAME}/data", f"input/datasets/geoparslp/{NAME}/data"  # classic, newer kernels
EARLIER_MOUNTS = [f"input/{place}patrec-lab3-step05-lstm" for place in ("", "notebooks/someone/")]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Nothing here tells where data are; what the files write for themselves goes into a folder."""
    for name in ("PATREC_DATA", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setitem(sys.modules, "umap", None)  # it compiles for half a minute
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def write_one_file(number, path):
    script = f"{STEPS[number].script}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(kaggle.one_file(STEPS[number].script, (ROOT / script).read_text("utf-8")))
    return path


def listing(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def layout(tmp_path, tiny_data):
    """Function of a mount: makes an empty /kaggle/working and mounts the tiny data set."""

    def lay_out(mount):
        root = tmp_path / "kaggle"
        (root / "working").mkdir(parents=True)
        shutil.copytree(tiny_data, root / mount)
        return root

    return lay_out


def run_kernel(root, number, *args, run=run_forked):
    """Run a step's file as Kaggle does: /kaggle/src/script.py, in /kaggle/working.

    The inputs and the source, read-only on Kaggle, must be as before (tests may run as root).
    """
    script = write_one_file(number, root / "src" / "script.py")
    before = listing(root / "input") | listing(root / "src")
    places = {"cwd": root / "working", "PATREC_KAGGLE_ROOT": str(root)}
    result = run(script, *args, timeout=400, **places)
    assert listing(root / "input") | listing(root / "src") == before
    return result


@pytest.mark.parametrize("number, mount", [(1, MOUNTS[0]), (8, MOUNTS[1]), (11, MOUNTS[0])])
def test_a_step_runs_alone_as_one_file(layout, number, mount):
    """One of each kind: it only reads, it trains, it trains what it builds on."""
    root = layout(mount)
    run_kernel(root, number, "--smoke")
    written = root / "working" / "outputs" / STEPS[number].script
    metrics = read_metrics(written)
    assert metrics["data"]["root"] == str((root / mount).resolve())
    assert not metrics["data"]["demo"]
    assert (written / "summary.md").is_file()
    assert [path.name for path in (root / "working").iterdir()] == ["outputs"]


def test_without_arguments_as_on_kaggle(layout, temporary):
    """In a fresh interpreter. Step 4 is quick in its full size, on tiny data."""
    root = layout(MOUNTS[0])
    run_kernel(root, 4, run=run_script)
    assert not read_metrics(root / "working" / "outputs" / STEPS[4].script)["smoke"]
    assert not list(temporary.glob("patrec-*"))  # the modules were removed


def test_step_6_uses_the_checkpoints_of_attached_kernels(layout):
    """Three models come from a kernel mounted the classic way, three from a new mount."""
    root = layout(MOUNTS[1])
    run_kernel(root, 5, "--smoke", "--epochs", "1")
    trained = sorted((root / "working" / "outputs" / STEPS[5].script).glob("*/best.pt"))
    assert len(trained) == 6
    for mount, checkpoints in zip(EARLIER_MOUNTS, (trained[:3], trained[3:]), strict=True):
        for path in checkpoints:
            target = root / mount / path.parent.relative_to(root / "working")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path.parent, target)
    shutil.rmtree(root / "working" / "outputs")
    result = run_kernel(root, 6, "--smoke")
    found = re.findall(r"^\w+: using (\S+),", result.stdout, re.MULTILINE)
    counts = [sum(str(root / mount) in path for path in found) for mount in EARLIER_MOUNTS]
    assert counts == [3, 3], result.stdout
    assert "training it here" not in result.stdout


def test_kaggle_is_where_kaggle_is(monkeypatch):
    """What the stand-in of these tests replaces."""
    monkeypatch.delenv("PATREC_KAGGLE_ROOT", raising=False)
    assert str(kaggle_root()) == "/kaggle"


def test_one_file_alone_gives_what_the_project_gives_with_workers(tiny_data, tmp_path, temporary):
    """In an empty folder, from another working folder: workers and `getsource` find all of it."""
    name = STEPS[5].script
    script = write_one_file(5, tmp_path / "empty" / "one.py")
    (tmp_path / "elsewhere").mkdir()
    flags = ("--features", "beat_mel", "beat_chroma", "--epochs", 3, "--subset", 16)
    made = {}
    for out, which, workers in (("project", f"{name}.py", 1), ("workers", script, 2)):
        where = ("--data-dir", tiny_data, "--out-dir", tmp_path / out, "--workers", workers)
        run_script(which, *flags, *where, cwd=tmp_path / "elsewhere")
        summary = (tmp_path / out / name / "summary.md").read_text()
        source = re.findall(r"```python\n.*?```", summary, re.DOTALL)
        made[out] = source, training_results(tmp_path / out / name)
        assert not list(temporary.glob("patrec-*")), "the modules were not removed"
    assert all(made["project"]) and made["workers"] == made["project"]
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["one.py"]
