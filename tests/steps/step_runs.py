"""Runs of whole steps that several test files look at: each is made once, whoever asks first."""

import os
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
from filelock import FileLock


def once(factory, name, make):
    """The folder that `make(folder)` fills, for all test files and processes; without pictures."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # which the test processes have in common
    folder, done, failed = (base / f"{name}{end}" for end in ("", ".done", ".failed"))
    with FileLock(base / f"{name}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt.Figure, "savefig", lambda figure, file, **options: None)
        if failed.exists():  # once is enough
            pytest.fail(f"the run {name} failed before: {failed.read_text()}")
        if not done.exists():
            folder.mkdir()
            try:
                make(folder)
            except BaseException as error:
                failed.write_text(str(error))
                raise
            done.touch()
    return folder


def copy_data(source, target):
    """A copy that shares its arrays with the original: replace files, never write into them."""
    return shutil.copytree(source, target, copy_function=os.link)


def replace_file(path, array):
    path.unlink()  # a hard link: the original keeps its own
    np.save(path, array)
