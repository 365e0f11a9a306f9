"""lab.py with stand-ins for the steps: what is run, with which flags, what happens on failure."""

import json
import os
import shutil
import sys
import threading
import time

import lab as lab_script
import pytest
from conftest import ROOT, assert_clean_error, run_script, write_data_set
from kaggle_kernel import EARLIER

import patrec.files
import patrec.step

STEP = '''"""A stand-in, training={training}, that leaves what lab.py looks at."""
import json, sys
from pathlib import Path

here, words, name = Path(__file__).parent, sys.argv[1:], {name!r}
with open(here / "calls.txt", "a") as file:
    file.write(json.dumps([name, words]) + "\\n")
print("here is", name)
if (here / (name + ".fails")).exists():
    sys.exit("no, it fails")
args = json.loads((here / "defaults.json").read_text())[{training}]
for flag, value in zip(words[::2], words[1::2]):
    args[flag[2:].replace("-", "_")] = int(value) if value.isdigit() else value
folder = Path(args["out_dir"] or "outputs", name)
folder.mkdir(parents=True, exist_ok=True)
(folder / "args.json").write_text(json.dumps(args))
facts = {{"data": {{"root": args["data_dir"], "demo": False}}, "seconds": 1.0, "runs": {{}}}}
facts["environment"] = {{"device": "cpu", "torch": "0", "librosa": "0"}}
(folder / "metrics.json").write_text(json.dumps(facts))
(folder / "summary.md").write_text("# " + name + "\\n")
'''
NAMES = ("step01_one", "step03_three", "step05_five", "step06_six", "step11_eleven")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data_set(
        tmp_path_factory.mktemp("data"), per_class=(2, 1), n_emotion=(4, 2), n_frames=20
    )


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("common.py", "lab.py", "handin.py", "kaggle_kernel.py"):
        shutil.copy(ROOT / name, folder)
    parsers = [patrec.flags.make_parser("", training) for training in (False, True)]
    defaults = [vars(parser.parse_args([])) for parser in parsers]
    (folder / "defaults.json").write_text(json.dumps(defaults))
    for name in NAMES:
        training = name == "step05_five"
        (folder / f"{name}.py").write_text(STEP.format(name=name, training=training))
    return folder


def lab(project, data, *flags, check=True):
    """Run it in an empty folder beside the project; returns the result and what was called."""
    (project / "calls.txt").unlink(missing_ok=True)
    cwd = project.parent / "work"
    cwd.mkdir(exist_ok=True)
    result = run_script(project / "lab.py", "--data-dir", data, *flags, cwd=cwd, check=check)
    calls = project / "calls.txt"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return result, dict(map(json.loads, lines))


def test_all_steps_run_once_and_the_report_is_drafted(project, data):
    result, calls = lab(project, data, "--epochs", 3, "--seed", 7)
    assert set(calls) == set(NAMES)
    order = [name for name in calls if name not in ("step01_one", "step03_three")]
    assert order[0] == "step05_five"  # before those that build on it
    for name, words in calls.items():  # --epochs is for those that train
        epochs = ["--epochs", "3"] if name == "step05_five" else []
        assert words == ["--data-dir", str(data), "--seed", "7", *epochs]
    out = project.parent / "work" / "outputs"
    assert all((out / name / "metrics.json").exists() for name in NAMES)
    assert (project.parent / "work" / "report_draft.md").exists()
    assert "here is step05_five" in result.stdout and "here is step01_one" not in result.stdout
    assert "here is step01_one" in (out / "step01_one.log").read_text()

    result, calls = lab(project, data, "--epochs", 3, "--seed", 7, "--workers", 2)
    assert not calls and all(name in result.stdout for name in NAMES)  # done already
    _, calls = lab(project, data, "--epochs", 4, "--seed", 7)
    # Those that score what step 5 trains are run too; for the others nothing has changed.
    assert set(calls) == {"step05_five", "step06_six", "step11_eleven"}
    _, calls = lab(project, data, "--epochs", 4, "--seed", 7, "--again")
    assert set(calls) == set(NAMES)


def test_steps_wait_for_what_they_build_on_and_share_the_cores(monkeypatch, tmp_path):
    """Two at once, where nothing forbids it; 5 and 10, which use all cores, without another.

    Beside them two on which nothing builds.
    """
    spans, at_once, most, eight = {}, set(), [], threading.Event()

    def run(command, folder, log, fill):
        number, began = folder.name[4:6], time.monotonic()
        at_once.add(number)
        most.append([len(at_once & lab_script.FILL), len(at_once - lab_script.FILL)])
        if number == "08":
            eight.set()
        if number in ("01", "02", "07"):
            assert eight.wait(20)  # 8 begins while 7 runs, and two on which nothing builds
        time.sleep(0.4 if number == "08" else 0.05)
        at_once.remove(number)
        spans[number] = began, time.monotonic(), log, fill
        return 1.0

    monkeypatch.setattr(lab_script, "run", run)
    numbers = [f"{n:02}" for n in range(1, 12)]
    jobs = {f"step{number}_x": [] for number in numbers}
    assert lab_script.run_all(jobs, tmp_path) == dict.fromkeys(jobs, 1.0)
    assert [max(counts) for counts in zip(*most, strict=True)] == [2, 2]
    for number, (began, ended, log, fill) in spans.items():
        assert fill == (number != "10" and not any(number in of for of in EARLIER.values()))
        for earlier in EARLIER.get(number, ()):
            assert spans[earlier][1] <= began
        others = [span for other, span in spans.items() if other != number and not span[3]]
        beside = [1 for start, end, *_ in others if start < ended and end > began]
        assert not (beside and number in ("05", "10"))
        assert (log is None) == (number in ("05", "10"))


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="no priorities here")
@pytest.mark.parametrize("fill", [True, False])
def test_what_fills_gaps_has_the_lowest_priority(tmp_path, fill):
    """And so have the processes that it begins."""
    told = "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"
    inner = "import subprocess, sys, time; time.sleep(1); "  # time to be told
    inner += f"subprocess.run([sys.executable, '-c', {told!r}])"
    log, mine = tmp_path / "x.log", os.getpriority(os.PRIO_PROCESS, 0)
    assert lab_script.run([sys.executable, "-c", inner], tmp_path / "x", log, fill) > 0
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine  # the lab's own stays
    assert int(log.read_text()) == (19 if fill else mine)


@pytest.mark.parametrize("place", ["beside", "alone"])
def test_a_step_beside_another_gets_half_of_the_cores(monkeypatch, tmp_path, capfd, place):
    told = "import os; print('mel epoch  1/2', os.getenv('OMP_NUM_THREADS'))"
    monkeypatch.setattr(lab_script.joblib, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log = tmp_path / "x.log" if place == "beside" else None
    command = [sys.executable, "-c", f"{told}; print('else')"]
    assert lab_script.run(command, tmp_path / "x", log) > 0
    shown = capfd.readouterr().out
    if place == "alone":
        assert "else" in shown and "None" in shown
    else:
        assert shown.startswith("mel epoch  1/2 3\n") and "else" not in shown
        assert log.read_text().splitlines()[1] == "else"


def test_another_data_set_is_not_done_yet(project, data, tmp_path):
    where = ("--out-dir", tmp_path / "elsewhere")
    lab(project, data, *where)
    other = shutil.copytree(data, tmp_path / "other")
    result, calls = lab(project, other, *where)
    assert set(calls) == set(NAMES)
    assert "5 of 11 steps" in result.stdout  # the draft is of what lies there


@pytest.mark.parametrize("name", ["step01_one", "step05_five"])
def test_a_step_that_fails_is_named_and_the_others_go_on(project, data, name):
    (project / f"{name}.fails").touch()
    result, calls = lab(project, data, check=False)
    assert set(calls) == set(NAMES) and result.returncode == 1
    assert f"failed: {name};" in result.stderr.splitlines()[-1]
    assert "no, it fails" in result.stderr  # why
    assert "Traceback" not in result.stderr
    (project / f"{name}.fails").unlink()
    result, calls = lab(project, data)
    build_on_it = {"step06_six", "step11_eleven"} if name == "step05_five" else set()
    assert set(calls) == {name} | build_on_it and result.returncode == 0
    assert not lab(project, data)[1]


def test_a_step_that_failed_when_run_again_is_not_done(project, data):
    lab(project, data)
    (project / "step03_three.fails").touch()
    lab(project, data, "--again", check=False)
    (project / "step03_three.fails").unlink()
    assert set(lab(project, data)[1]) == {"step03_three"}


def test_bad_input_is_one_line_and_nothing_is_run(project, data, tmp_path):
    for flags in (("--epochs", "none"), ("--data-dir", tmp_path / "nowhere"), ("--mistyped",)):
        result, calls = lab(project, data, *flags, check=False)
        assert_clean_error(result)
        assert not calls


@pytest.mark.parametrize(
    "flags, same",
    [
        ((), True),
        (("--resume", "--workers", "2", "--max-minutes", "9", "--device", "cpu"), True),
        (("--smoke",), False),
        (("--no-merge",), False),
        (("--allow-leak",), False),
        (("--subset", "9"), False),
    ],
)
def test_only_what_was_made_with_the_same_flags_is_done(data, tmp_path, flags, same):
    """A trial run with --smoke would else stand for the real one, and nobody be told."""
    parser = patrec.flags.make_parser("", training=True)
    asked, made = (parser.parse_args(["--data-dir", str(data), *more]) for more in ((), flags))
    (tmp_path / "args.json").write_text(patrec.files.to_json(vars(made)))
    (tmp_path / "metrics.json").write_text(json.dumps({"data": {"root": str(data.resolve())}}))
    assert lab_script.is_done(tmp_path, asked, set(vars(asked))) is same


def test_flags_are_handed_on_word_by_word():
    """Those without a value too: no step knows what to do with `--smoke True`."""
    parser = patrec.flags.make_parser("", training=True)
    words = ["--smoke", "--no-merge", "--subset", "9", "--resume"]
    args = parser.parse_args(words)
    assert lab_script.flags_of(args, parser, set(vars(args))) == words
    shared = set(vars(patrec.flags.make_parser("").parse_args([])))
    assert lab_script.flags_of(args, parser, shared) == ["--smoke", "--no-merge"]


@pytest.mark.parametrize("slow, after", [("08", "09"), ("05", "11"), ("07", "11")])
def test_a_step_waits_for_one_that_runs(monkeypatch, tmp_path, slow, after):
    """Not only for those that are still to begin."""
    spans = {}

    def run(command, folder, log, fill):
        began = time.monotonic()
        time.sleep(0.4 if folder.name[4:6] == slow else 0.02)
        spans[folder.name[4:6]] = began, time.monotonic()
        return 1.0

    monkeypatch.setattr(lab_script, "run", run)
    lab_script.run_all({f"step{n:02}_x": [] for n in range(1, 12)}, tmp_path)
    assert spans[slow][1] <= spans[after][0]
