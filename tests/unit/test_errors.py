"""A user's mistake is one line and an exit code; a bug keeps its traceback."""

import pytest

from patrec.errors import Finished, InputError, StepFailed, end_in_one_line


@pytest.mark.parametrize("error, code, line", [
    (InputError("a.txt: empty"), 2, "error: a.txt: empty"),
    (StepFailed("loss is nan"), 1, "failed: loss is nan"),
    (Finished("done"), 0, ""),
    (KeyboardInterrupt(), 130, "stopped; finished epochs are kept, --resume continues after them"),
])  # fmt: skip
def test_ends_are_one_line_and_a_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as stop:
        end_in_one_line(type(error), error, None)
    assert (stop.value.code, capsys.readouterr().err.removesuffix("\n")) == (code, line)


def test_a_notebook_shows_the_same_line():
    assert InputError("a.txt: empty")._render_traceback_() == ["error: a.txt: empty"]


def test_a_bug_keeps_its_traceback(capsys):
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        end_in_one_line(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and "test_errors.py" in printed and "a bug" in printed
