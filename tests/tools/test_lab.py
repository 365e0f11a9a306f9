"""tools.lab with stand-ins for the steps: what is run, with which flags, what a failure does."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script, write_data_set

from patrec.errors import InputError, StepFailed
from patrec.files import to_json
from patrec.flags import make_parser
from patrec.labels import fingerprints
from tools import lab
from tools.steps import STEPS, LabStep

FEW = {
    1: LabStep("step01_one", "One"),
    3: LabStep("step03_three", "Three"),
    5: LabStep("step05_five", "Five", trains=True),
    6: LabStep("step06_six", "Six", builds_on=(5,)),
    11: LabStep("step11_eleven", "Eleven", builds_on=(5,)),
}
NAMES = [step.script for step in FEW.values()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write_data_set(root, per_class=(2, 1), n_emotion=(4, 2), n_frames=20).resolve()


class Processes:
    """In place of subprocess.run: stand-ins for the steps and for the draft of the report."""

    def __init__(self):
        self.calls, self.failing = [], set()

    def __call__(self, command):
        command = list(map(str, command))
        draft = "tools.handin" in command
        name, words = "draft" if draft else Path(command[1]).stem, command[2:]
        self.calls.append((name, words))
        if not draft and name not in self.failing:
            self.leave_outputs(name, words)
        return SimpleNamespace(returncode=int(name in self.failing))

    @staticmethod
    def leave_outputs(name, words):
        """What a step leaves and the lab looks at."""
        args = make_parser("", training=name == "step05_five").parse_args(words)
        folder, root = (args.out_dir or Path("outputs")) / name, args.data_dir
        (folder / "args.json").write_text(to_json(vars(args)))
        facts = {"data": {"root": str(root), "fingerprint": fingerprints(root)}}
        (folder / "metrics.json").write_text(json.dumps(facts))


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """A lab of few steps in a folder of its own."""
    processes = Processes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "PROJECT", tmp_path)
    monkeypatch.setattr(lab, "STEPS", FEW)
    monkeypatch.setattr(lab.subprocess, "run", processes)
    return processes


def run_lab(processes, data, *flags):
    """Run the lab; return the names of the steps that it ran before the draft."""
    processes.calls.clear()
    lab.main(["--data-dir", str(data), *map(str, flags)])
    *steps, draft = (name for name, _ in processes.calls)
    assert draft == "draft"
    return steps


def test_all_steps_run_once_in_order_and_the_report_is_drafted(
    processes, data, capsys, monkeypatch
):
    clock = SimpleNamespace(monotonic=itertools.count(3, 7).__next__)  # 7 s later at each look
    monkeypatch.setattr(lab, "time", clock)
    flags = ("--epochs", "3", "--no-merge", "--seed", "7")
    assert run_lab(processes, data, *flags) == NAMES
    for name, words in processes.calls[:-1]:  # --epochs is for those that train
        epochs = ["--epochs", "3"] if name == "step05_five" else []
        given = ["--data-dir", str(data), "--seed", "7", "--no-merge", *epochs]
        assert sorted(words) == sorted(given)
    assert processes.calls[-1][1] == ["tools.handin", "draft", "--out-dir", "outputs"]
    table = capsys.readouterr().out.partition("seconds")[2]
    assert all(f"{name:22}7\n" in table for name in NAMES)
    assert f"{'all, with the draft':22}{7 * (2 * len(NAMES) + 1)}\n" in table

    no_effect = ("--workers", 2, "--resume", "--max-minutes", 9, "--device", "cpu")
    assert run_lab(processes, data, *flags, *no_effect) == []
    assert capsys.readouterr().out.count(": done already") == len(NAMES)
    # Those that score what step 5 trains are run too; for the others nothing has changed.
    again = ["step05_five", "step06_six", "step11_eleven"]
    flags = ("--epochs", 4, *flags[2:])
    assert run_lab(processes, data, *flags) == again
    assert run_lab(processes, data, *flags, "--batch-size", 8) == again
    assert run_lab(processes, data, *flags, "--again") == NAMES
    assert run_lab(processes, data, *flags, "--smoke") == NAMES  # a trial run is not the real one
    assert run_lab(processes, data, *flags) == NAMES


def test_another_data_set_is_not_done_yet(processes, data, tmp_path):
    where = ("--out-dir", tmp_path / "elsewhere")
    assert run_lab(processes, data, *where) == NAMES
    other = shutil.copytree(data, tmp_path / "other")
    assert run_lab(processes, other, *where) == NAMES
    assert processes.calls[-1][1][-1] == str(where[1])
    labels = other / "fma_genre_spectrograms" / "train_labels.txt"
    labels.write_text(labels.read_text().replace("\tBlues", "\tJazz", 1))  # mended in place
    assert run_lab(processes, other, *where) == NAMES
    assert run_lab(processes, other, *where) == []


@pytest.mark.parametrize("name", ["step01_one", "step05_five"])
def test_a_step_that_fails_is_named_and_the_others_go_on(processes, data, capsys, name):
    processes.failing = {name}
    with pytest.raises(StepFailed, match=f"^{name}; the same command"):
        run_lab(processes, data)
    assert [called for called, _ in processes.calls] == [*NAMES, "draft"]
    assert f"{name:22}failed" in capsys.readouterr().out
    processes.failing = set()
    build_on_it = ["step06_six", "step11_eleven"] if name == "step05_five" else []
    assert run_lab(processes, data) == [name, *build_on_it]
    assert run_lab(processes, data) == []


def test_a_step_that_failed_when_run_again_is_not_done(processes, data):
    run_lab(processes, data)
    processes.failing = {"step03_three", "draft"}
    with pytest.raises(StepFailed, match="^step03_three, the draft of the report;"):
        run_lab(processes, data, "--again")
    processes.failing = set()
    assert run_lab(processes, data) == ["step03_three"]


@pytest.mark.parametrize("flags", [("--epochs", "none"), ("--data-dir", "none")])
def test_bad_input_ends_the_lab_before_any_step(processes, data, tmp_path, flags):
    with pytest.raises((InputError, SystemExit)) as stopped:
        run_lab(processes, data, *flags)
    assert getattr(stopped.value, "code", 2) == 2
    assert not processes.calls and not (tmp_path / "outputs").exists()


STEP = """import json, sys
from pathlib import Path

name, failing = Path(__file__).stem, {failing!r}
print("here is", name)
if name == failing:
    sys.exit("no, it fails")
facts = dict(data=dict(root="here", demo=False, fingerprint=dict()), seconds=1, runs=dict())
facts["environment"] = dict(device="cpu", torch="0", librosa="0")
Path("outputs", name, "metrics.json").write_text(json.dumps(facts))
Path("outputs", name, "args.json").write_text(json.dumps(dict()))
Path("outputs", name, "summary.md").write_text("# " + name)
"""


@pytest.mark.slow
def test_the_real_command_runs_all_eleven_and_drafts_the_report(data, tmp_path):
    project, failing = tmp_path / "project", STEPS[2].script
    for folder in ("patrec", "tools"):
        shutil.copytree(ROOT / folder, project / folder)
    shutil.copy(ROOT / "common.py", project)
    for step in STEPS.values():
        (project / f"{step.script}.py").write_text(STEP.format(failing=failing))
    here = {"cwd": project, "check": False, "PYTHONPATH": str(project)}
    result = run_script(project / "tools" / "lab.py", "--data-dir", data, **here)
    places = [result.stdout.index(f"here is {step.script}") for step in STEPS.values()]
    assert places == sorted(places)
    assert result.returncode == 1 and "no, it fails" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"failed: {failing};")
    assert STEPS[5].script in (project / "report_draft.md").read_text()
