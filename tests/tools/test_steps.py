"""The table of the lab's steps says what the scripts say."""

import pytest
from conftest import ROOT

from patrec.errors import InputError
from tools.steps import STEPS, find_step


def test_every_script_of_the_lab_is_in_the_table():
    scripts = sorted(path.stem for path in ROOT.glob("step[0-9][0-9]_*.py"))
    assert [step.script for step in STEPS.values()] == scripts
    assert list(STEPS) == [int(name[4:6]) for name in scripts]


def test_a_step_trains_if_its_script_takes_the_flags_of_a_training():
    for number, step in STEPS.items():
        text = (ROOT / f"{step.script}.py").read_text()
        assert step.trains == ("training=True" in text), number
        assert all(other < number for other in step.builds_on), number


@pytest.mark.parametrize("text", ["5", "05", "step05_lstm", "step05_lstm.py"])
def test_a_step_is_found_by_number_and_by_name(text):
    assert find_step(text) == 5


@pytest.mark.parametrize("text", ["0", "step05_cnn", ""])
def test_what_is_no_step_is_named(text):
    with pytest.raises(InputError, match="no such step"):
        find_step(text)
