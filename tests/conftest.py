"""A tiny data set in the lab's layout, quirks of the file names included, made in a second."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

# Two test processes share the cores, so each computes with one thread. And each has a numba
# cache of its own: processes that compile into one empty cache at once corrupt it, after
# which librosa dies of a segmentation fault. Both are read when torch and numba are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="patrec-numba-")
atexit.register(shutil.rmtree, os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GENRES = ("Blues", "Chiptune", "Classical", "Electronic", "Folk", "Hip-Hop", "Indie-Rock", "International", "Jazz", "Metal",
          "Old-Time", "Pop", "Post-Punk", "Post-Rock", "Psych-Folk", "Psych-Rock", "Punk", "Rock", "Soundtrack", "Trip-Hop")  # fmt: skip


def fake_clip(rng, level, n_frames):
    """(140, T) array whose loud bands sit at `level` (0 to 1) of the frequency axis."""
    bands = np.arange(128)[:, None] / 127
    mel = -15 - 50 * np.abs(bands - level) + 4 * rng.standard_normal((128, n_frames))
    chroma = np.clip(0.3 + 0.1 * rng.standard_normal((12, n_frames)), 0, 1)
    chroma[int(level * 11)] = 1.0
    return np.vstack([np.clip(mel, -80, 0), chroma])


def write_data_set(root, per_class=(6, 2), n_emotion=(40, 6), n_frames=120, n_beats=(14, 20), seed=0):
    """Write all four folders with their label files as data-format.md gives them."""
    rng = np.random.default_rng(seed)
    for beat in (False, True):
        clip_id = 1000
        for split, n in zip(("train", "test"), per_class, strict=True):
            folder = root / ("fma_genre_spectrograms_beat" if beat else "fma_genre_spectrograms")
            (folder / split).mkdir(parents=True)
            form = "beatsync.fused" if beat else ("fused.full" if split == "train" else "full.fused")
            rows = ["Id\tGenre"]
            for k, genre in enumerate(GENRES):
                for _ in range(n):
                    clip_id += 1
                    T = int(rng.integers(*n_beats)) if beat else n_frames + int(rng.integers(0, 3))
                    np.save(folder / split / f"{clip_id}.fused.full.npy", fake_clip(rng, k / 19, T))
                    rows.append(f"{clip_id}.{form}.npy.gz\t{genre}")
            order = np.random.default_rng(seed + n).permutation(np.arange(1, len(rows)))
            (folder / f"{split}_labels.txt").write_text("\n".join([rows[0]] + [rows[i] for i in order]) + "\n")
        clip_id = 500_000
        for split, n in zip(("train", "test"), n_emotion, strict=True):
            folder = root / ("multitask_dataset_beat" if beat else "multitask_dataset")
            (folder / split).mkdir(parents=True)
            rows = ["Id,valence,energy,danceability"]
            for i in range(n):
                clip_id += 1
                level = (i * 7 % n) / n
                T = int(rng.integers(*n_beats)) if beat else n_frames
                np.save(folder / split / f"{clip_id}.fused.full.npy", fake_clip(rng, level, T))
                rows.append(f"{clip_id},{level:.3f},{1 - level:.3f},{(level * 3) % 1:.3f}")
            if split == "train":
                (folder / "train_labels.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    os.environ["PATREC_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The tiny data set; do not change it in a test, write_data_set makes another."""
    return write_data_set(tmp_path_factory.mktemp("data"))


def run_script(name, *args, cwd=None, check=True, timeout=240, **env):
    """Run a script through its real command line; returns the CompletedProcess."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=timeout)
    if check:
        assert result.returncode == 0, f"{name}: {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result


def assert_clean_error(result, *words, code=2):
    """One line on stderr that holds all `words`; the given exit code; no traceback."""
    assert result.returncode == code, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
