"""Errors that end a script with one line instead of a traceback."""

import sys


class StepEnd(Exception):
    """What ends a script with one line instead of a traceback, in a notebook too."""

    exit_code, label = 0, ""

    def _render_traceback_(self):
        """IPython prints these lines in place of a traceback."""
        return [f"{self.label}{self}"]


class InputError(StepEnd, ValueError):
    """A mistake in what the user handed in: one line on stderr, exit code 2."""

    exit_code, label = 2, "error: "


class StepFailed(StepEnd, RuntimeError):
    """A step that ran as asked and did not reach its goal: one line, exit code 1."""

    exit_code, label = 1, "failed: "


class Finished(StepEnd):
    """A step that was asked for a part only (--overfit-batch) and is done: exit code 0."""


def end_in_one_line(kind, error, traceback):
    """sys.excepthook: one line for what a user can mend, a traceback for a bug."""
    if issubclass(kind, StepEnd):
        if error.exit_code:
            print(f"{error.label}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; finished epochs are kept, --resume continues after them", file=sys.stderr)
        sys.exit(130)
    sys.__excepthook__(kind, error, traceback)
