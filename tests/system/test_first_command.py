"""The first command of somebody without data: the demo set is made, and all that comes says so."""

import shutil

import pytest
from conftest import ROOT, assert_clean_error, patch_everywhere, read_metrics, run_forked

import patrec.files

pytestmark = pytest.mark.slow
STEP = "step04_dataset"  # the quickest one
# A small set, which is written in no time, takes the place of the demo set in the copy.
MAKER = """import shutil
from pathlib import Path

FOLDERS = {"genre": "fma_genre_spectrograms", "emotion": "multitask_dataset"}


def write_demo(root, parts):
    here = Path(__file__).resolve().parents[1]
    with open(here / "calls.txt", "a") as file:
        print(*parts, root, file=file)
    if (here / "broken").exists():
        raise OSError(28, "No space left on device")
    return shutil.copytree(here / "made", root)
"""


@pytest.fixture
def project(tmp_path, tiny_data, monkeypatch):
    """A copy of the project, without data; nothing tells where data are."""
    for name in ("PATREC_DATA", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "patrec", folder / "patrec")
    for name in ("common.py", f"{STEP}.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "patrec" / "demo.py").write_text(MAKER)
    shutil.copytree(tiny_data, folder / "made")
    (folder / "made" / "DEMO.txt").write_text("Made up.\n")
    # A machine on which the tests run may be one of Kaggle's: its data are not for this test.
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(tmp_path / "no kaggle here"))
    return folder


def first_command(project, check=True, **env):
    """`python stepNN.py`, in another folder than the scripts'."""
    return run_forked(project / f"{STEP}.py", cwd=project.parent, check=check, **env)


def calls(project):
    path = project / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_without_data_the_demo_set_is_made_once_and_named_in_all_that_comes_of_it(project):
    result = first_command(project)
    demo = project / "data" / "demo"
    assert calls(project) == [f"genre emotion {demo}"]  # step 4 looks at both
    assert "demo" in result.stderr and "nothing about real music" in result.stderr
    folder = project.parent / "outputs" / STEP
    metrics = read_metrics(folder)
    assert metrics["data"]["demo"] is True and metrics["data"]["root"] == str(demo)
    head = (folder / "summary.md").read_text().split("\n## ")[0]
    assert "demo" in head.lower(), "the banner stands before all results"
    again = first_command(project)  # it is there now
    assert len(calls(project)) == 1 and "No data" not in again.stderr
    assert read_metrics(folder)["data"] == metrics["data"]


@pytest.mark.parametrize("part, other", [("genre", "emotion"), ("emotion", "genre")])
def test_only_the_part_that_a_step_needs_is_made(tmp_path, monkeypatch, part, other):
    """A demo set of one part is not taken for both: a step that needs both would find a half."""
    asked = []

    def write_demo(root, parts):
        asked.append((root, tuple(parts)))
        for name in parts:
            patrec.files.part_folder(root, name).mkdir(parents=True, exist_ok=True)
        return root

    monkeypatch.delenv("PATREC_DATA", raising=False)
    monkeypatch.setenv("PATREC_KAGGLE_ROOT", str(tmp_path / "no kaggle here"))
    patch_everywhere(monkeypatch, "PROJECT", tmp_path)
    patch_everywhere(monkeypatch, "write_demo", write_demo)
    demo = tmp_path / "data" / "demo"
    for parts in ((part,), (part,), (part, other), (other,)):
        assert patrec.files.find_data(parts=parts) == demo
    assert asked == [(demo, (part,)), (demo, (part, other))]


def test_data_of_ones_own_are_no_demo_and_come_before_it(project, tiny_data):
    shutil.copytree(project / "made", project / "data" / "demo")
    shutil.copytree(tiny_data, project / "data", dirs_exist_ok=True)
    first_command(project)
    folder = project.parent / "outputs" / STEP
    data = read_metrics(folder)["data"]
    assert data["root"] == str(project / "data") and data["demo"] is False
    assert "demo" not in (folder / "summary.md").read_text().lower()
    assert not calls(project)


def test_a_wrong_folder_is_never_replaced_by_the_demo_set(project):
    wrong = project.parent / "songs"
    wrong.mkdir()
    result = first_command(project, check=False, PATREC_DATA=str(wrong))
    assert_clean_error(result, str(wrong), "--data-dir")
    assert not calls(project) and not (project / "data").exists()


def test_on_kaggle_no_demo_set_is_made(project, tmp_path):
    """There the data set is to be attached: hours of GPU time would go into toys."""
    (tmp_path / "kaggle" / "working").mkdir(parents=True)
    result = first_command(project, check=False, PATREC_KAGGLE_ROOT=str(tmp_path / "kaggle"))
    assert_clean_error(result, "not attached", "geoparslp/patreco3-multitask-affective-music")
    assert not calls(project) and not (project / "data").exists()
    assert not any((tmp_path / "kaggle" / "working").iterdir())


def test_where_no_demo_set_can_be_written_it_says_what_to_do(project):
    (project / "broken").touch()
    result = first_command(project, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "--data-dir" in last and str(project / "data" / "demo") in last
    assert not (project.parent / "outputs").exists()
