"""Steps 5, 6, 8, 9 and 10 on a tiny data set: the files that each leaves, and their flags."""

import pytest
from conftest import EMOTIONS, write_data_set

LSTMS = ["mel", "beat_mel", "chroma", "beat_chroma", "fused", "beat_fused"]
SINGLE = [f"{kind}_{axis}" for axis in EMOTIONS for kind in ("lstm", "cnn")]
BASELINES = ["constant", "ridge", "svr"]
# Step, flags, items of the lab, runs that are trained, other rows of metrics.json.
RUNS = {
    "5": ("step05_lstm", ("--features", "beat_mel"), "abc", ["beat_mel"], []),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return write_data_set(root, per_class=(3, 1), n_emotion=(30, 4), n_frames=40, n_beats=14)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")
