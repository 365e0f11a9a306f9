"""Data sets in the lab's layout, quirks of file names included, whose clips tell their answer."""

import ast
import atexit
import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# Two test processes share the cores, so each computes with one thread. And each has a numba
# cache of its own: processes that compile into one empty cache at once corrupt it, after
# which librosa dies of a segmentation fault. Both are read when numpy, torch and numba are
# imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # joblib's: no worker processes unless a test asks for them
warm = os.environ.get("NUMBA_CACHE_DIR", "")  # may hold what was compiled before
os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="patrec-numba-")
if os.path.isdir(warm):
    shutil.copytree(warm, os.environ["NUMBA_CACHE_DIR"], dirs_exist_ok=True)
atexit.register(shutil.rmtree, os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)

import numpy as np
import pandas as pd
import pytest
import torch
from joblib.externals.loky import reusable_executor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# The lab's merge, once more on purpose: the tests do not ask the code what is right.
MERGED = {
    "Blues": "Blues", "Chiptune": "Electronic", "Classical": "Classical",
    "Electronic": "Electronic", "Folk": "Folk", "Hip-Hop": "Hip-Hop", "Jazz": "Jazz",
    "Metal": "Metal", "Pop": "Pop", "Post-Rock": "Rock", "Psych-Folk": "Folk",
    "Psych-Rock": "Rock", "Punk": "Metal", "Rock": "Rock", "Trip-Hop": "Trip-Hop",
}  # fmt: skip
CLASSES = sorted(set(MERGED.values()))
FOLDERS = {"genre": "fma_genre_spectrograms", "emotion": "multitask_dataset"}
EMOTIONS = ("valence", "energy", "danceability")
# Clips of the training and of the test split: unequal classes, and the rare ones rare.
COUNTS = {
    "Blues": (4, 2), "Chiptune": (6, 2), "Classical": (10, 4), "Electronic": (12, 3),
    "Folk": (8, 3), "Hip-Hop": (8, 3), "Indie-Rock": (4, 1), "International": (5, 1),
    "Jazz": (6, 3), "Metal": (7, 2), "Old-Time": (2, 1), "Pop": (5, 2), "Post-Punk": (3, 1),
    "Post-Rock": (3, 1), "Psych-Folk": (8, 2), "Psych-Rock": (6, 2), "Punk": (6, 2),
    "Rock": (24, 6), "Soundtrack": (2, 1), "Trip-Hop": (3, 1),
}  # fmt: skip
GENRES = tuple(COUNTS)
DROPPED = sorted(set(GENRES) - set(MERGED))
INTRO = 650  # frames that open a long test clip and tell nothing: more than any window


def pytest_collection_modifyitems(items):
    """Begin with a file of each run that several files share: no process waits for the other's."""
    items.sort(key=lambda item: item.path.name not in ("test_step05.py", "test_step08.py"))


def genre_level(genre):
    """Where on the frequency axis (0 to 1) a genre is loudest: merged genres lie side by side."""
    if genre in DROPPED:
        return 0.05 + 0.1 * DROPPED.index(genre)  # between two classes
    siblings = sorted(name for name in MERGED if MERGED[name] == MERGED[genre])
    side = -1 if genre == "Trip-Hop" else 1
    return CLASSES.index(MERGED[genre]) / 9 + 0.012 * siblings.index(genre) * side


def fake_clip(rng, level, n_frames, intro=0):
    """(140, T) array whose loud bands and strong note sit at `level` (0 to 1) of their axes."""
    bands = np.arange(128)[:, None] / 127
    mel = np.broadcast_to(-15 - 50 * np.abs(bands - min(level, 1.0)), (128, n_frames)).copy()
    chroma = 0.3 + 0.1 * rng.standard_normal((12, n_frames), dtype=np.float32)
    chroma[int(min(level, 1.0) * 11)] = 1.0
    mel[:, :intro], chroma[:, :intro] = -32.0, 0.36
    mel += 4 * rng.standard_normal((128, n_frames), dtype=np.float32)
    return np.vstack([np.clip(mel, -80, 0), np.clip(chroma, 0, 1)])


def emotion_clip(rng, values, n_frames, intro=0):
    """(140, T) array: valence is how loud low bands are, energy middle, danceability high ones.

    In chroma they are how strong notes 0 to 3, 4 to 7 and 8 to 11 are.
    """
    which = np.minimum(np.arange(128) // 43, 2)
    mel = np.repeat(-55 + 40 * np.asarray(values)[which][:, None], n_frames, axis=1)
    chroma = np.repeat(0.1 + 0.7 * np.repeat(values, 4)[:, None], n_frames, axis=1)
    mel[:, :intro], chroma[:, :intro] = -35.0, 0.45
    mel += 4 * rng.standard_normal(mel.shape, dtype=np.float32)
    chroma += 0.05 * rng.standard_normal(chroma.shape, dtype=np.float32)
    return np.vstack([np.clip(mel, -80, 0), np.clip(chroma, 0, 1)])


def emotion_values(n, seed=0):
    """(n, 3) values in [0, 1], every axis in an order of its own, uncorrelated; three decimals."""
    rng = np.random.default_rng(100 + seed)
    ranks = np.argsort(rng.standard_normal((n, 3)), axis=0).argsort(0)
    spread = [1.0, 1.5, 0.6]  # unlike on each axis
    return np.round(0.02 + 0.96 * (ranks / max(n - 1, 1)) ** spread, 3)


def make_ids(n, seed):
    """n different ids of two to six digits; as text they sort otherwise than as numbers."""
    rng = np.random.default_rng(seed)
    ids = set()
    while len(ids) < n:
        ids.add(int(10 ** rng.uniform(1.3, 6)))
    return [str(i) for i in rng.permutation(sorted(ids))]


def write_data_set(
    root, per_class=(6, 2), n_emotion=(40, 6), n_frames=120, n_beats=(14, 20), seed=0,
    dtype=np.float64, intro=0, test_frames=None,
):  # fmt: skip
    """Write all four folders with their label files as data-format.md gives them.

    per_class : clips of each genre in both splits, or {genre: clips in both splits}
    n_frames, n_beats, test_frames : how long clips are: a number (and up to two frames more),
        or a range
    intro : frames at the start of each clip of the test splits, full ones only, that tell nothing
    """
    rng, values = np.random.default_rng(seed), emotion_values(sum(n_emotion), seed)
    counts = per_class if isinstance(per_class, dict) else dict.fromkeys(GENRES, per_class)
    labels = [[genre for genre in GENRES for _ in range(counts[genre][i])] for i in (0, 1)]
    labels += [values[: n_emotion[0]], values[n_emotion[0] :]]
    ids = np.split(make_ids(sum(map(len, labels)), seed), np.cumsum(list(map(len, labels)))[:-1])
    for beat, k in itertools.product((False, True), range(4)):
        genre, test = k < 2, k % 2 == 1
        split = "test" if test else "train"
        folder = root / (FOLDERS["genre" if genre else "emotion"] + "_beat" * beat)
        (folder / split).mkdir(parents=True)
        frames = n_beats if beat else test_frames or n_frames if test else n_frames
        low, high = frames if isinstance(frames, tuple) else (frames, frames + 3)
        form = "beatsync.fused" if beat else "full.fused" if test else "fused.full"
        rows = []
        for clip_id, label in zip(ids[k], labels[k], strict=True):
            length, quiet = int(rng.integers(low, high)), intro * (test and not beat)
            if genre:
                clip = fake_clip(rng, genre_level(label), length, quiet)
                rows.append(f"{clip_id}.{form}.npy.gz\t{label}")
            else:
                clip = emotion_clip(rng, label, length, quiet)
                rows.append(",".join([clip_id, *(f"{value:.3f}" for value in label)]))
            np.save(folder / split / f"{clip_id}.fused.full.npy", clip.astype(dtype))
        if genre or not test:
            header = "Id\tGenre" if genre else f"Id,{','.join(EMOTIONS)}"
            write_labels(folder / f"{split}_labels.txt", header, rows, seed + 10 * k + beat)
    return root


def write_labels(path, header, rows, seed):
    """Write a label file with its rows in an order of its own."""
    order = np.random.default_rng(seed).permutation(len(rows))
    path.write_text("\n".join([header, *(rows[i] for i in order)]) + "\n")


@pytest.fixture
def own_data(tmp_path):
    """A small data set that a test may spoil."""
    return write_data_set(tmp_path / "own", per_class=(3, 1), n_emotion=(8, 2), n_frames=40)


def hard_data_set(root, **changes):
    """As hard as the lab's: long clips of unlike lengths, unequal classes, intros in test clips."""
    options = {"per_class": COUNTS, "n_emotion": (64, 12), "n_beats": (14, 40), "intro": INTRO}
    options |= {"n_frames": (700, 760), "test_frames": (1150, 1250), "dtype": np.float32}
    return write_data_set(root, **(options | changes))


def labels_of(data_dir, part="genre", split="train", beat=False):
    """{id: class after the merge} without dropped classes, or {id: the three emotions}."""
    path = data_dir / (FOLDERS[part] + "_beat" * beat) / f"{split}_labels.txt"
    rows = path.read_text().splitlines()[1:]
    if part == "genre":
        pairs = [row.split("\t") for row in rows]
        return {name.split(".")[0]: MERGED[genre] for name, genre in pairs if genre in MERGED}
    return {row.split(",")[0]: tuple(map(float, row.split(",")[1:])) for row in rows}


def functions_of(script):
    """A step's imports, constants and functions, without running its cells."""
    kept = []
    for node in ast.parse((ROOT / script).read_text()).body:
        constant = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper()
        if constant or isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
            kept.append(node)
    namespace = {}
    exec(compile(ast.Module(kept, []), script, "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def small_numbers():
    """A step rounds numbers below 1e-38 to 0 in its process, which is that of other tests too."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    os.environ["PATREC_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The shared data set; not to be changed: hard_data_set and write_data_set make another."""
    return hard_data_set(tmp_path_factory.mktemp("data"))


class Payload:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


FEW_GENRES = ("Blues", "Classical", "Metal", "Rock", "Trip-Hop")  # after the merge five classes


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A quick data set of FEW_GENRES for whole steps; not to be changed."""
    counts = dict.fromkeys(GENRES, (0, 0)) | dict.fromkeys(FEW_GENRES, (6, 4))
    options = {"n_emotion": (8, 2), "n_frames": (270, 320), "dtype": np.float32}
    return write_data_set(tmp_path_factory.mktemp("small"), per_class=counts, **options)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Small, for tests in which steps only have to run; not to be changed either."""
    return write_data_set(tmp_path_factory.mktemp("tiny"), n_emotion=(24, 6))


@pytest.fixture
def make_step(monkeypatch):
    """Function: a Step of its own, as a script makes it."""
    from patrec.step import Step

    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # put back after the test

    def make(data, out, *flags, name="step06_eval"):
        args = [name, "--data-dir", str(data), "--out-dir", str(out), *flags]
        monkeypatch.setattr("sys.argv", args)
        return Step(name, "x", training=True)

    return make


def finished(result, check):
    """The CompletedProcess of a script, which must have succeeded if `check`."""
    said = f"{result.args}: {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    assert result.returncode == 0 or not check, said
    return result


def run_script(name, *args, cwd=None, check=True, timeout=240, **env):
    """Run a script through its real command line; returns the CompletedProcess."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    options = {"capture_output": True, "text": True, "timeout": timeout}
    return finished(subprocess.run(command, cwd=cwd, env=os.environ | env, **options), check)


def run_inside(script, *args):
    """Run a script's command line in this process, which saves imports; returns the exit code."""
    path = ROOT / script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, args)])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        try:
            try:
                runpy.run_path(str(path), run_name="__main__")
            except (Exception, KeyboardInterrupt):
                sys.excepthook(*sys.exc_info())  # the script's own, which says one line
                raise  # a bug
        except SystemExit as stop:
            if isinstance(stop.code, str):  # as Python does
                print(stop.code, file=sys.stderr)
                return 1
            return stop.code or 0
    return 0


def error_line(capsys, script, *args):
    """The one line on stderr of a script run in this process, which must end with exit code 2."""
    capsys.readouterr()
    code, error = run_inside(script, *args), capsys.readouterr().err
    assert (code, len(error.splitlines())) == (2, 1) and "Traceback" not in error, error
    return error


def wait_for(condition, seconds=300):
    late = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < late, "waited in vain"
        time.sleep(0.02)
    return found


def run_forked(script, *args, cwd=None, check=True, timeout=600, prepare=lambda: None, **env):
    """As `run_script`, in a copy of this process: a process of its own without seconds of imports.

    The project's modules are imported anew, from the script's folder.

    prepare : callable, called in the copy before the script is run
    """
    import common  # noqa: F401, the libraries that are imported here no copy has to import

    torch.optim.Adam([torch.zeros(1)])  # imports torch's compiler
    script = ROOT / script
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115, until the process ends
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                os.environ.update(env)
                os.chdir(cwd or ".")
                reusable_executor._executor = None  # its processes are the parent's
                for name, module in list(sys.modules.items()):
                    if ROOT in Path(getattr(module, "__file__", None) or "/").parents:
                        del sys.modules[name]
                # A tool runs as `python -m tools.name`, from the project's folder.
                folder = ROOT if script.parent == ROOT / "tools" else script.parent
                sys.path[:] = [str(folder)] + [path for path in sys.path if path != str(ROOT)]
                prepare()
                code = run_inside(script, *args)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        late = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
        late.start()
        _, status = os.waitpid(pid, 0)
        late.cancel()
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    code = os.waitstatus_to_exitcode(status)
    return finished(subprocess.CompletedProcess([script, *args], code, *texts), check)


def assert_clean_error(result, *words, code=2):
    """One line on stderr that holds all `words`; the given exit code; no traceback."""
    assert result.returncode == code, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def read_metrics(folder):
    """What a step wrote into its metrics.json; folder is that of the step."""
    return json.loads((Path(folder) / "metrics.json").read_text())


def read_table(folder, caption):
    """A table of a step's summary.md, by how its caption begins: all cells as text."""
    _, _, rest = (Path(folder) / "summary.md").read_text().partition(f"**{caption}")
    assert rest, f"no table {caption!r} in {folder}"
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), rest.splitlines())
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split(" | ")] for line in lines)
    return pd.DataFrame(rows, columns=header).set_index(header[0])


def genre_predictions(folder):
    """predictions.csv of a genre step: clip, model, test_set, truth, prediction (class names)."""
    return pd.read_csv(Path(folder) / "predictions.csv", dtype=str)


def submission(folder):
    """submission.csv as a frame of the three emotions, indexed by clip id."""
    return pd.read_csv(Path(folder) / "submission.csv", dtype={0: str}, index_col=0)


def run_smoke(step, data, factory, *flags):
    """Run a step with --smoke in a new folder; returns that of the step, and its metrics.

    What `imshow` draws last (specshow draws a mesh instead) is saved in image.npy beside it.
    """
    out = factory.mktemp("out")

    def keep_image():
        from matplotlib.axes import Axes

        imshow = Axes.imshow

        def imshow_and_save(ax, image, **options):
            np.save(out / "image.npy", image)
            return imshow(ax, image, **options)

        Axes.imshow = imshow_and_save

    where = ("--data-dir", data, "--out-dir", out)
    run_forked(f"{step}.py", "--smoke", *where, *flags, prepare=keep_image)
    return out / step, read_metrics(out / step)


def training_results(folder):
    """What equal trainings leave: predictions, and of each run its curve (no times) and weights."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    for path in folder.glob("*/history.csv"):
        curve = pd.read_csv(path).drop(columns="seconds")
        found[path.parent.name] = curve.to_csv(), path.with_name("best.pt").read_bytes()
    return found


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; without it, or playwright, tests of pages are skipped, saying so."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no chromium on this machine")
    # None of its own calls home: a page that loads something from outside must be noticed.
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    sound = ["--autoplay-policy=no-user-gesture-required"]
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", *quiet, *sound])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Function (path, width): a page that must not complain or ask for anything from outside."""
    faults, inside = [], ("file:", "data:", "blob:")

    def open_it(path, width=800):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(20_000)
        page.on("console", lambda said: said.type == "error" and faults.append(said.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: r.url.startswith(inside) or faults.append(r.url[:80]))
        page.goto(path.as_uri())
        return page

    yield open_it
    assert not faults


def patch_everywhere(patch, name, value):
    """Replace a function of the project in every module that has its name."""
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "/")
        if ROOT in file.parents and ROOT / "tests" not in file.parents and hasattr(module, name):
            patch.setattr(module, name, value)
