"""The first command of somebody without data: the demo set is made, and all that comes says so.

In a copy of the scripts beside which there is no data, with a make_dataset.py that makes its
set in no time.
"""

import shutil

import pytest
from conftest import (
    ROOT,
    assert_clean_error,
    patch_everywhere,
    read_metrics,
    run_script,
    write_data_set,
)

import common
import patrec.files

STEP = "step04_dataset"  # the quickest one
# Stands in for make_dataset.py: notes how it was called, copies the set that lies beside it.
MAKER = """import shutil, sys
from pathlib import Path

here = Path(__file__).resolve().parent
with open(here / "calls.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if (here / "broken").exists():
    sys.exit("no room")
shutil.copytree(here / "made", sys.argv[sys.argv.index("--out") + 1])
"""


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    root = write_data_set(
        tmp_path_factory.mktemp("made"), per_class=(3, 1), n_emotion=(4, 2), n_frames=30
    )
    (root / "DEMO.txt").write_text("Synthesised.\n")
    return root


@pytest.fixture
def project(tmp_path, demo_set):
    """A folder with the scripts, without data."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("common.py", f"{STEP}.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "make_dataset.py").write_text(MAKER)
    shutil.copytree(demo_set, folder / "made")
    return folder


def first_command(project, check=True, **env):
    """`python stepNN.py`, in another folder than the scripts'; nothing tells where data are."""
    # A machine on which the tests run may be one of Kaggle's: its data are not for this test.
    known = {"PATREC_KAGGLE_ROOT": str(project / "no kaggle here")} | env
    return run_script(project / f"{STEP}.py", cwd=project.parent, check=check, **known)


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    for name in ("PATREC_DATA", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


def test_without_data_the_demo_set_is_made_once_and_named_in_all_that_comes_of_it(project):
    result = first_command(project)
    demo = project / "data" / "demo"
    (call,) = (project / "calls.txt").read_text().splitlines()
    assert call == f"--demo --parts genre emotion --out {demo}"  # step 4 looks at both
    assert "demo" in result.stderr and "nothing about real music" in result.stderr

    folder = project.parent / "outputs" / STEP
    metrics = read_metrics(folder)
    assert metrics["data"]["demo"] is True and metrics["data"]["root"] == str(demo)
    head = (folder / "summary.md").read_text().split("\n## ")[0]
    assert "Synthesised demo data" in head and "nothing about music" in head, (
        "the banner stands before all results"
    )

    again = first_command(project)  # it is there now
    assert (
        len((project / "calls.txt").read_text().splitlines()) == 1
        and "synthesising" not in again.stderr
    )
    assert read_metrics(folder)["data"] == metrics["data"]


def test_only_the_part_that_a_step_needs_is_made_and_the_other_when_one_asks(project, monkeypatch):
    patch_everywhere(monkeypatch, "__file__", str(project / "common.py"))
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(project / "no kaggle here"))
    for part, other in (("genre", "emotion"), ("emotion", "genre")):
        shutil.rmtree(project / "data", ignore_errors=True)
        (project / "calls.txt").unlink(missing_ok=True)
        demo = patrec.files.find_data(parts=(part,))
        for folder in (patrec.files.part_folder(demo, other, beat) for beat in (False, True)):
            shutil.rmtree(folder)  # which the real one would not have made
        assert patrec.files.find_data(parts=(part,)) == demo
        shutil.move(demo, project / "data" / "away")  # the stand-in makes whole sets only
        assert patrec.files.find_data(parts=(part, other)) == demo
        calls = (project / "calls.txt").read_text().splitlines()
        assert calls == [f"--demo --parts {p} --out {demo}" for p in (part, f"{part} {other}")]


def test_a_demo_set_of_one_part_is_not_taken_for_both(project, monkeypatch):
    """A step that needs both would find no folder of the other."""
    patch_everywhere(monkeypatch, "__file__", str(project / "common.py"))
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(project / "no kaggle here"))
    asked = []

    def run(command):
        asked.append(command[command.index("--parts") + 1 : command.index("--out")])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(common.subprocess, "run", run)
    demo = project / "data" / "demo"
    patrec.files.part_folder(demo, "genre").mkdir(parents=True)
    assert patrec.files.find_data(parts=("genre",)) == demo and not asked
    assert patrec.files.find_data(parts=("genre", "emotion")) == demo
    assert asked == [["genre", "emotion"]]


def test_data_of_ones_own_are_no_demo_and_come_before_it(project, demo_set):
    shutil.copytree(demo_set, project / "data" / "demo")
    shutil.copytree(
        demo_set, project / "data", dirs_exist_ok=True, ignore=shutil.ignore_patterns("DEMO.txt")
    )
    first_command(project)
    folder = project.parent / "outputs" / STEP
    data = read_metrics(folder)["data"]
    assert data["root"] == str(project / "data") and data["demo"] is False
    assert "demo" not in (folder / "summary.md").read_text().lower()
    assert not (project / "calls.txt").exists()


def test_a_wrong_folder_is_never_replaced_by_the_demo_set(project):
    wrong = project.parent / "songs"
    wrong.mkdir()
    result = first_command(project, check=False, PATREC_DATA=str(wrong))
    assert_clean_error(result, str(wrong), "--data-dir")
    assert not (project / "calls.txt").exists() and not (project / "data").exists()


def test_on_kaggle_no_demo_set_is_made(project, tmp_path):
    """There the data set is to be attached: hours of GPU time would go into toys."""
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    result = first_command(project, check=False, PATREC_KAGGLE_ROOT=str(tmp_path / "kaggle"))
    assert_clean_error(result, "not attached", "geoparslp/patreco3-multitask-affective-music")
    assert not (project / "calls.txt").exists() and not (project / "data").exists()
    assert not any((tmp_path / "kaggle" / "working").iterdir())


@pytest.mark.parametrize("fault", ["fails", "missing"])
def test_where_no_demo_set_can_be_made_it_says_what_to_do(project, fault):
    if fault == "fails":
        (project / "broken").touch()
    else:
        (project / "make_dataset.py").unlink()
    result = first_command(project, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        "--data-dir" in result.stderr.splitlines()[-1]
        and "make_dataset.py" in result.stderr.splitlines()[-1]
    )
    assert not (project.parent / "outputs").exists()
