"""tools.lab with stand-ins for the steps: what is run, with which flags, what a failure does."""

import json
import shutil
import sys

import pytest
from conftest import ROOT, assert_clean_error, run_script, write_data_set

import patrec.flags
from patrec.errors import InputError, StepFailed
from patrec.files import to_json
from patrec.labels import fingerprints
from tools import lab
from tools.steps import STEPS, LabStep

STEP = '''"""A stand-in, training={training}, that leaves what the lab looks at."""
import json, sys; sys.path.insert(0, {root!r})
from patrec.labels import fingerprints
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
data = {{"root": args["data_dir"], "demo": False, "fingerprint": fingerprints(args["data_dir"])}}
facts = {{"data": data, "seconds": 1.0, "runs": {{}}}}
facts["environment"] = {{"device": "cpu", "torch": "0", "librosa": "0"}}
(folder / "metrics.json").write_text(json.dumps(facts))
(folder / "summary.md").write_text("# " + name + "\\n")
'''
HANDIN = """import sys
from pathlib import Path

if Path("no_draft").exists():
    sys.exit(2)
Path("drafted.txt").write_text(" ".join(sys.argv[1:]))
"""
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
    return write_data_set(
        tmp_path_factory.mktemp("data"), per_class=(2, 1), n_emotion=(4, 2), n_frames=20
    ).resolve()


def write_steps(folder, steps):
    parsers = [patrec.flags.make_parser("", training) for training in (False, True)]
    defaults = [vars(parser.parse_args([])) for parser in parsers]
    (folder / "defaults.json").write_text(json.dumps(defaults))
    for step in steps.values():
        text = STEP.format(root=str(ROOT), name=step.script, training=step.trains)
        (folder / f"{step.script}.py").write_text(text)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working folder: a project of few steps, and a stand-in for the draft's program."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").touch()
    (tmp_path / "tools" / "handin.py").write_text(HANDIN)
    write_steps(tmp_path, FEW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "PROJECT", tmp_path)
    monkeypatch.setattr(lab, "STEPS", FEW)
    return tmp_path


def calls_of(project):
    """Take away what the stand-ins have noted: [name, flags] of each, in the order of the runs."""
    calls = project / "calls.txt"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return list(map(json.loads, lines))


def run_lab(project, data, *flags):
    """Run the lab; return the names of the steps that it ran."""
    lab.main(["--data-dir", str(data), *map(str, flags)])
    return [name for name, _ in calls_of(project)]


def test_all_steps_run_once_in_order_and_the_report_is_drafted(project, data, capfd):
    flags = ("--epochs", "3", "--seed", "7")
    lab.main(["--data-dir", str(data), *flags])
    calls = calls_of(project)
    assert [name for name, _ in calls] == NAMES
    for name, words in calls:  # --epochs is for those that train
        epochs = ["--epochs", "3"] if name == "step05_five" else []
        assert words == ["--data-dir", str(data), "--seed", "7", *epochs]
    assert (project / "drafted.txt").read_text() == "draft --out-dir outputs"
    shown = capfd.readouterr().out
    places = [shown.index(f"here is {name}") for name in NAMES]  # shown as it comes
    assert places == sorted(places)
    table = shown[shown.index("seconds") :]
    assert all(f"{name:22}" in table for name in NAMES)

    assert run_lab(project, data, *flags, "--workers", 2) == []
    assert capfd.readouterr().out.count(": done already") == len(NAMES)
    # Those that score what step 5 trains are run too; for the others nothing has changed.
    again = ["step05_five", "step06_six", "step11_eleven"]
    assert run_lab(project, data, "--epochs", 4, "--seed", 7) == again
    assert run_lab(project, data, "--epochs", 4, "--seed", 7, "--again") == NAMES


def test_seconds_are_those_of_the_step_alone(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(0.4)"]
    assert 0.4 <= lab.run(sleep, tmp_path / "step") < 10


def test_another_data_set_is_not_done_yet(project, data, tmp_path):
    where = ("--out-dir", tmp_path / "elsewhere")
    assert run_lab(project, data, *where) == NAMES
    other = shutil.copytree(data, tmp_path / "other")
    assert run_lab(project, other, *where) == NAMES
    assert (project / "drafted.txt").read_text() == f"draft --out-dir {where[1]}"
    labels = other / "fma_genre_spectrograms" / "train_labels.txt"
    labels.write_text(labels.read_text().replace("\tBlues", "\tJazz", 1))  # mended in place
    assert run_lab(project, other, *where) == NAMES
    assert run_lab(project, other, *where) == []


@pytest.mark.parametrize("name", ["step01_one", "step05_five"])
def test_a_step_that_fails_is_named_and_the_others_go_on(project, data, capfd, name):
    (project / f"{name}.fails").touch()
    with pytest.raises(StepFailed, match=f"^{name}; the same command"):
        run_lab(project, data)
    assert [called for called, _ in calls_of(project)] == NAMES
    assert (project / "drafted.txt").exists()
    shown = capfd.readouterr()
    assert "no, it fails" in shown.err and f"{name:22}failed" in shown.out
    (project / f"{name}.fails").unlink()
    build_on_it = ["step06_six", "step11_eleven"] if name == "step05_five" else []
    assert run_lab(project, data) == [name, *build_on_it]
    assert run_lab(project, data) == []


def test_a_step_that_failed_when_run_again_is_not_done(project, data):
    run_lab(project, data)
    (project / "step03_three.fails").touch()
    with pytest.raises(StepFailed):
        run_lab(project, data, "--again")
    (project / "step03_three.fails").unlink()
    calls_of(project)
    assert run_lab(project, data) == ["step03_three"]


def test_a_draft_that_fails_is_named(project, data):
    (project / "no_draft").touch()
    with pytest.raises(StepFailed, match="^the draft of the report;"):
        run_lab(project, data)


@pytest.mark.parametrize("flags", [("--epochs", "none"), ("--mistyped",), ("--data-dir", "none")])
def test_bad_input_ends_the_lab_before_any_step(project, data, flags):
    with pytest.raises((InputError, SystemExit)) as stopped:
        run_lab(project, data, *flags)
    assert getattr(stopped.value, "code", 2) == 2
    assert not calls_of(project) and not (project / "outputs").exists()


@pytest.mark.parametrize(
    "flags, same",
    [
        ((), True),
        (("--resume", "--workers", "2", "--max-minutes", "9", "--device", "cpu"), True),
        (("--smoke",), False),
        (("--no-merge",), False),
        (("--allow-leak",), False),
        (("--subset", "9"), False),
        (("--seed", "7"), False),
        (("--epochs", "3"), False),
    ],
)
def test_only_what_was_made_with_the_same_flags_is_done(data, tmp_path, flags, same):
    """A trial run with --smoke would else stand for the real one, and nobody be told."""
    parser = patrec.flags.make_parser("", training=True)
    asked, made = (parser.parse_args(["--data-dir", str(data), *more]) for more in ((), flags))
    (tmp_path / "args.json").write_text(to_json(vars(made)))
    facts = {"data": {"root": str(data), "fingerprint": fingerprints(data)}}
    (tmp_path / "metrics.json").write_text(json.dumps(facts))
    assert lab.is_done(tmp_path, asked, set(vars(asked))) is same


def test_flags_are_handed_on_word_by_word():
    """Those without a value too: no step knows what to do with `--smoke True`."""
    parser = patrec.flags.make_parser("", training=True)
    words = ["--smoke", "--no-merge", "--subset", "9", "--resume"]
    args = parser.parse_args(words)
    assert lab.flags_of(args, parser, set(vars(args))) == words
    shared = set(vars(patrec.flags.make_parser("").parse_args([])))
    assert lab.flags_of(args, parser, shared) == ["--smoke", "--no-merge"]


@pytest.mark.slow
def test_the_real_command_runs_all_eleven_and_drafts_the_report(data, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(ROOT / "patrec", project / "patrec")
    shutil.copytree(ROOT / "tools", project / "tools")
    shutil.copy(ROOT / "common.py", project)
    write_steps(project, STEPS)
    (project / f"{STEPS[2].script}.fails").touch()

    def run(*flags):
        here = {"cwd": project, "check": False, "PYTHONPATH": str(project)}
        return run_script(project / "tools" / "lab.py", "--data-dir", data, *flags, **here)

    result = run()
    assert [name for name, _ in calls_of(project)] == [step.script for step in STEPS.values()]
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"failed: {STEPS[2].script};")
    assert STEPS[5].script in (project / "report_draft.md").read_text()
    assert_clean_error(run("--mistyped"), "--mistyped")
