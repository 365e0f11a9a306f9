"""Interrupted and resumed trainings, and --max-minutes, through the command line.

The runs are forked from one process that has torch loaded already, which saves seconds each.
In them time is counted and not measured: a step of a training's optimiser (AdamW) takes one
second, and nothing else takes any. So a run can be stopped at an exact step, and a limit of
minutes is an exact number of epochs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
EPOCHS, BATCHES = 10, 2  # passes over 16 clips in batches of 8: an epoch takes 2 s
TINY = ("--smoke", "--subset", 16, "--batch-size", 8, "--device", "cpu")


# --- the process that runs scripts ------------------------------------------------------


def serve():
    """Read jobs as lines of JSON, run each in a fork, answer with its exit code and steps."""
    import matplotlib.pyplot as plt
    import pandas  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.datasets
    import sklearn.model_selection
    import sklearn.svm  # noqa: F401
    import torch
    import tqdm.auto  # noqa: F401

    # Pictures are looked at in other tests.
    plt.Figure.savefig = lambda figure, file, **options: None
    torch.optim.AdamW([torch.zeros(1)])  # loads torch's compiler, which takes a second
    sys.path.insert(0, str(ROOT))
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            work(job)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code}), flush=True)


def work(job):
    """Run one script in this process under the counted clock, and end."""
    import torch
    from conftest import run_inside
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{job['log']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    steps = {"taken": 0, "since": 0, "check": 0}
    time.time = time.monotonic = time.perf_counter = lambda: 1000.0 + steps["taken"]

    def count(optimizer):
        return sum(p.numel() for group in optimizer.param_groups for p in group["params"])

    def before_step(optimizer, *_):
        if type(optimizer) is not torch.optim.AdamW:  # the overfit check, or step 7's digits
            steps["check"] += count(optimizer) > 20_000
            return
        if job["stop"]:
            path, epochs, more = job["stop"]
            if Path(path).exists() and len(Path(path).read_text().splitlines()) > epochs:
                if steps["since"] == more:
                    raise KeyboardInterrupt
                steps["since"] += 1
        steps["taken"] += 1

    register_optimizer_step_pre_hook(before_step)
    try:
        code = run_inside(f"{job['script']}.py", *job["args"])
    except BaseException:
        traceback.print_exc()
        code = 99
    Path(f"{job['log']}.steps").write_text(json.dumps(steps))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Machine:
    """Runs steps of the lab under the counted clock."""

    def __init__(self, folder, data):
        self.folder, self.data, self.n_jobs = folder, data, 0
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script, out, *args, stop=None, code=0):
        """Run a step, and interrupt it.

        stop : (run, epochs, steps), so many steps after so many epochs of a run
        """
        self.n_jobs += 1
        log = self.folder / f"job{self.n_jobs}"
        folder = out / script
        job = {
            "script": script, "log": str(log),
            "args": [str(arg) for arg in ("--data-dir", self.data, "--out-dir", out, *TINY, *args)],
            "stop": stop and [str(folder / stop[0] / "history.csv"), *stop[1:]],
        }  # fmt: skip
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        stdout, stderr, steps = (
            Path(f"{log}.{name}").read_text() for name in ("stdout", "stderr", "steps")
        )
        assert answer["code"] == code, (script, answer, stdout[-1500:], stderr[-3000:])
        steps = json.loads(steps)
        return SimpleNamespace(
            folder=folder, stdout=stdout, stderr=stderr, steps=steps["taken"], check=steps["check"]
        )


if __name__ == "__main__":
    serve()
    raise SystemExit

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from conftest import read_metrics, write_data_set  # noqa: E402

import common  # noqa: E402

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="processes are forked, which Windows cannot"
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Clips longer than every crop, so that a resumed run must also draw the same crops."""
    data = write_data_set(
        tmp_path_factory.mktemp("resume_data"), per_class=(5, 1), n_emotion=(40, 5),
        n_frames=(660, 700), n_beats=(14, 40), test_frames=(300, 330), dtype="float32",
    )  # fmt: skip
    machine = Machine(tmp_path_factory.mktemp("jobs"), data)
    yield machine
    machine.process.stdin.close()
    machine.process.wait()


@pytest.fixture(scope="module")
def whole(machine, tmp_path_factory):
    """Function: the uninterrupted run of a step, made once."""
    made = {}

    def run(script, *args):
        if (script, args) not in made:
            made[script, args] = machine.run(script, start(script, args), "--epochs", EPOCHS, *args)
        return made[script, args]

    def start(script, args):
        """A new output folder, with the genre models that the step would otherwise train first."""
        out = tmp_path_factory.mktemp("out")
        if script in ("step09_transfer", "step10_multitask"):
            shutil.copytree(run("step07_cnn").folder, out / "step07_cnn")
        return out

    run.start = start
    return run


# --- interrupted and resumed equals uninterrupted ---------------------------------------


def histories(folder):
    """{run: its history.csv without the times}."""
    return {
        path.parent.name: pd.read_csv(path).drop(columns="seconds")
        for path in sorted(folder.glob("*/history.csv"))
    }


def assert_same(value, other, where=""):
    """Equality to the last bit of nested plain values and tensors."""
    if isinstance(value, dict):
        assert value.keys() == other.keys(), where
        for key in value:
            assert_same(value[key], other[key], f"{where}/{key}")
    elif isinstance(value, list | tuple):
        assert len(value) == len(other), where
        for index, pair in enumerate(zip(value, other, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(value, torch.Tensor):
        assert torch.equal(value, other), where
    else:
        assert value == other, (where, value, other)


def assert_same_results(folder, other):
    """Same curves, same kept weights, same answers, same scores, same time spent."""
    curves, other_curves = histories(folder), histories(other)
    assert curves.keys() == other_curves.keys()
    for name in curves:
        pd.testing.assert_frame_equal(curves[name], other_curves[name], check_exact=True, obj=name)
        assert_same(
            *(common.load_checkpoint(place / name / "best.pt") for place in (folder, other)), name
        )
    for name in ("predictions.csv", "submission.csv"):
        assert (folder / name).exists() == (other / name).exists()
        if (folder / name).exists():
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert_same(
        read_metrics(folder)["runs"], read_metrics(other)["runs"]
    )  # train_seconds too: those before count


def assert_stopped(result, run, epochs):
    """Stopped by hand: one line on stderr, no results yet, all finished epochs there to be used."""
    assert len(result.stderr.splitlines()) == 1 and "--resume" in result.stderr, result.stderr
    assert len(pd.read_csv(result.folder / run / "history.csv")) == epochs
    assert (
        not (result.folder / "metrics.json").exists()
        and not (result.folder / "predictions.csv").exists()
    )
    assert 1 <= common.load_model(result.folder / run / "best.pt")[1]["epoch"] <= epochs


# Each is stopped in the middle of an epoch, most of a later network than the first: script, flags,
# the run that is stopped, its finished epochs, those of the networks before it, which are not
# trained again. A fine-tuning of step 9 goes on from a head that is finished.
STOPS = [
    ("step05_lstm", ("--features", "beat_mel", "mel", "--lr", 0.02), "mel", 5, EPOCHS),
    ("step07_cnn", (), "cnn_mel", 5, 0),
    ("step08_regression", (), "cnn_energy", 4, 3 * EPOCHS),
    ("step09_transfer", (), "transfer_valence", 1, 1 + round(0.3 * EPOCHS) + EPOCHS),
    ("step10_multitask", ("--learned-weights",), "multitask_learned", 4, 3 * EPOCHS),
]


@pytest.mark.parametrize("script, flags, run, epochs, earlier", STOPS)
def test_interrupted_and_resumed_is_uninterrupted(
    machine, whole, script, flags, run, epochs, earlier
):
    expected = whole(script, *flags)
    out = whole.start(script, flags)
    arguments = ("--epochs", EPOCHS, *flags, "--resume")
    stopped = machine.run(script, out, *arguments, stop=(run, epochs, 1), code=130)
    assert_stopped(stopped, run, epochs)
    resumed = machine.run(script, out, *arguments)
    assert_same_results(resumed.folder, expected.folder)
    done = BATCHES * (earlier + epochs)
    trained_again = "finished epochs were trained again, or others left out"
    assert expected.steps - resumed.steps == done, trained_again
    # Learning four batches by heart is part of steps 5 and 7, and costs little.
    checked = script in ("step05_lstm", "step07_cnn")
    assert 0 < expected.check <= 120 if checked else expected.check == 0


@pytest.mark.parametrize("script, run", [("step07_cnn", "mel"), ("step09_transfer", "cnn_mel")])
def test_a_genre_model_trained_on_the_way_and_interrupted_is_not_taken_for_finished(
    machine, whole, tmp_path, script, run
):
    """A step trains the genre model that it does not find; stopped in there, it goes on there."""
    if script == "step07_cnn":
        shutil.copytree(whole(script).folder, tmp_path / "whole" / script)
        shutil.copytree(whole(script).folder, tmp_path / "parts" / script)
        # The CNN is done, the LSTM to compare with is not.
        shutil.rmtree(tmp_path / "parts" / script / run)
    else:
        machine.run(script, tmp_path / "whole", "--epochs", EPOCHS)
    arguments = (script, tmp_path / "parts", "--epochs", EPOCHS, "--resume")
    stopped = machine.run(*arguments, stop=(run, 1, 1), code=130)
    assert len(histories(stopped.folder)[run]) == 1
    resumed = machine.run(*arguments)
    assert_same_results(resumed.folder, tmp_path / "whole" / script)


def test_a_training_of_ten_steps_works(machine, tmp_path):
    machine.run(
        "step05_lstm",
        tmp_path,
        "--features",
        "beat_mel",
        "--batch-size",
        4,
        "--epochs",
        2,
        "--subset",
        20,
    )


def test_without_resume_a_run_begins_anew(machine, whole):
    flags = ("--features", "beat_mel", "mel", "--lr", 0.02)
    expected = whole("step05_lstm", *flags)
    out = whole.start("step05_lstm", flags)
    machine.run("step05_lstm", out, "--epochs", EPOCHS, *flags, stop=("beat_mel", 3, 0), code=130)
    again = machine.run("step05_lstm", out, "--epochs", EPOCHS, *flags)
    assert again.steps == expected.steps
    assert_same_results(again.folder, expected.folder)


# --- --max-minutes ----------------------------------------------------------------------


def n_epochs(folder):
    """{run: epochs trained}, from the learning curves."""
    return {path.parent.name: len(pd.read_csv(path)) for path in folder.glob("*/history.csv")}


def assert_usable(folder):
    """Every run that was cut short has a checkpoint that loads and holds one of its epochs."""
    for name, epochs in n_epochs(folder).items():
        assert 1 <= common.load_model(folder / name / "best.pt")[1]["epoch"] <= epochs


def test_six_lstms_share_the_time_evenly(machine, tmp_path):
    """Of 66 s each gets 11, which are 5 epochs of 2 s; what is left over goes to the later ones."""
    result = machine.run("step05_lstm", tmp_path, "--epochs", 20, "--max-minutes", 1.1)
    epochs = n_epochs(result.folder)
    assert len(epochs) == 6 and set(epochs.values()) == {5, 6}, epochs
    assert 66 - BATCHES < result.steps <= 66 + BATCHES
    runs = read_metrics(result.folder)["runs"]
    assert {name: run["epochs"] for name, run in runs.items()} == epochs
    assert all(run["test"]["n_clips"] > 0 for run in runs.values())
    assert_usable(result.folder)


def test_a_run_cut_short_goes_on_later_and_others_get_what_it_leaves(machine, whole, tmp_path):
    flags = ("--features", "beat_mel", "mel", "--lr", 0.02)
    out = tmp_path / "out"
    short = machine.run("step05_lstm", out, "--epochs", EPOCHS, *flags, "--max-minutes", 0.2)
    assert n_epochs(short.folder) == {"beat_mel": 3, "mel": 3}
    runs = read_metrics(short.folder)["runs"]
    assert {name: run["epochs"] for name, run in runs.items()} == n_epochs(short.folder)
    # One is finished alone; then the other one has the whole time, not half of it.
    machine.run(
        "step05_lstm", out, "--epochs", EPOCHS, "--features", "beat_mel", *flags[3:], "--resume"
    )
    rest = machine.run(
        "step05_lstm", out, "--epochs", EPOCHS, *flags, "--resume", "--max-minutes", 0.25
    )
    assert rest.steps == 7 * BATCHES and n_epochs(rest.folder) == {
        "beat_mel": EPOCHS,
        "mel": EPOCHS,
    }
    assert_same_results(rest.folder, whole("step05_lstm", *flags).folder)


def test_the_cnn_gets_the_time_and_an_lstm_that_is_missing_one_epoch(machine, tmp_path):
    """30 s are 15 epochs of 2 s."""
    result = machine.run("step07_cnn", tmp_path, "--epochs", 30, "--max-minutes", 0.5)
    assert n_epochs(result.folder) == {"cnn_mel": 15, "mel": 1}
    assert_usable(result.folder)
    assert read_metrics(result.folder)["runs"]["cnn_mel"]["epochs"] == 15


def test_three_seeds_share_the_time_evenly(machine, tmp_path):
    """Of 60 s each of three CNNs gets 20, which are 10 epochs of 2 s."""
    flags = ("--ensemble", "--epochs", 40, "--max-minutes", 1)
    epochs = n_epochs(machine.run("step07_cnn", tmp_path, *flags).folder)
    assert epochs == {"cnn_mel": 10, "cnn_mel_seed43": 10, "cnn_mel_seed44": 10, "mel": 1}


@pytest.mark.parametrize(
    "script, flags, n_runs, least",
    [("step08_regression", ("--folds", 2, "--max-minutes", 1), 12, 2),
     ("step09_transfer", ("--max-minutes", 0.5), 4, 3),
     ("step10_multitask", ("--folds", 2, "--max-minutes", 0.5), 6, 2)],
)  # fmt: skip
def test_emotion_runs_and_folds_share_the_time_evenly(machine, whole, script, flags, n_runs, least):
    """Planned are 80 epochs, of which step 9's shortest training gets 4."""
    result = machine.run(script, whole.start(script, flags), "--epochs", 80, *flags)
    epochs = n_epochs(result.folder)
    assert len(epochs) == n_runs, epochs
    assert least <= min(epochs.values()) and max(epochs.values()) <= least + 1, epochs
    limit_s = 60 * flags[-1]
    left_or_twice = "time was left over, or used twice"
    assert limit_s - 2 * BATCHES < result.steps <= limit_s + BATCHES, left_or_twice
    assert_usable(result.folder)
    assert (result.folder / "predictions.csv").exists()


def test_every_run_gets_one_epoch_however_short_the_time(machine, tmp_path):
    result = machine.run("step08_regression", tmp_path, "--epochs", 6, "--max-minutes", 0.01)
    assert list(n_epochs(result.folder).values()) == [1] * 6
    assert_usable(result.folder)
