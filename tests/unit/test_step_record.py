"""What a step writes down: summary.md, metrics.json, args.json."""

import json
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import ROOT

import patrec.plots  # noqa: F401, every step draws with it
from patrec.errors import Finished, StepFailed


def test_what_is_shown_is_in_the_summary_in_this_order(tiny_data, tmp_path, make_step):
    step = make_step(tiny_data, tmp_path, "--smoke")
    step.heading("A heading")
    # In Markdown four spaces after an empty line make code of a paragraph.
    step.text("""
        A paragraph

        and another.
    """)
    step.table(pd.DataFrame({"score": [0.5]}, ["mel"]), "A table")
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    step.figure(fig, "curve", "A figure")
    step.show_source(test_what_is_shown_is_in_the_summary_in_this_order)
    step.finish({"mel": {"epochs": 2}}, more="facts")
    summary = (step.folder / "summary.md").read_text()
    shown = ["# step06_eval", "## A heading", "\nA paragraph\n\nand another.\n", "**A table**"]
    shown += ["| mel | 0.500 |", "![A figure](curve.png)", "```python\ndef test_what_is_shown"]
    places = [summary.index(text) for text in shown]
    assert places == sorted(places)
    assert (step.folder / "curve.png").stat().st_size > 5000
    metrics = json.loads((step.folder / "metrics.json").read_text())
    assert metrics["step"] == "step06_eval" and metrics["runs"] == {"mel": {"epochs": 2}}
    assert metrics["smoke"] and metrics["seed"] == 42 and metrics["more"] == "facts"
    assert set(metrics["data"]["fingerprint"]) == {"genre", "emotion"}
    assert json.loads((step.folder / "args.json").read_text())["smoke"] is True
    written = {path.name for path in step.folder.iterdir()} - {".lock"}
    assert written == {"summary.md", "metrics.json", "args.json", "curve.png"}


def test_a_goal_not_reached_ends_the_step_and_leaves_what_was_shown(tiny_data, tmp_path, make_step):
    """And no result. --overfit-batch has a folder of its own, and ends where it is done."""
    step = make_step(tiny_data, tmp_path, "--overfit-batch")
    step.text("shown before")
    step.require(True, "no fault")
    with pytest.raises(StepFailed, match="not learned by heart") as error:
        step.require(False, "four batches were not learned by heart")
    assert error.value.exit_code == 1
    folder = tmp_path / "step06_eval" / "overfit_batch"
    assert "shown before" in (folder / "summary.md").read_text()
    assert not list(tmp_path.rglob("metrics.json"))
    with pytest.raises(Finished):
        step.finish()
    assert (folder / "metrics.json").exists()


def test_the_labs_recipe_replaces_no_network_and_no_result(tiny_data, tmp_path, make_step):
    step = make_step(tiny_data, tmp_path, "--recipe", "lab")
    assert step.out == tmp_path / "recipe_lab" == step.training.out
    assert step.folder == tmp_path / "recipe_lab" / "step06_eval" == step.training.folder
    assert step.searched == "all epochs"
    assert make_step(tiny_data, tmp_path).searched == "the last 20% of the epochs"


@pytest.mark.parametrize(
    "script, following", [("step06_eval.py", "step07_cnn.py"), ("step11_latent.py", None)]
)
def test_the_last_line_names_the_next_step(
    tiny_data, tmp_path, make_step, monkeypatch, capsys, script, following
):
    step = make_step(tiny_data, tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script)])
    step.finish()
    said = capsys.readouterr().out
    assert said.endswith(f"next: python {following}\n") if following else "next:" not in said


def test_dollars_are_no_formulas_and_log_axes_have_plain_numbers(tiny_data, tmp_path, make_step):
    step = make_step(tiny_data, tmp_path / "out")
    fig, ax = plt.subplots()
    ax.semilogy([1, 2, 3], [0.01, 0.1, 10])
    ax.set_title("Ca$h_^$oul")
    step.figure(fig, "names", "Ba$$in.wav")
    assert {"0.01", "10"} <= {label.get_text() for label in ax.get_yticklabels()}
    fig, ax = plt.subplots()
    ax.semilogy([1, 2, 3], [1e-9, 1e-4, 1])
    step.figure(fig, "wide", "One notation on an axis")
    assert all("e" in label.get_text() for label in ax.get_yticklabels())
    assert (step.folder / "names.png").exists()
