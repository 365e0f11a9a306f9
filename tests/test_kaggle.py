"""kaggle_kernel.py: one file per step, its metadata, and runs in a made-up /kaggle.

$PATREC_KAGGLE_ROOT stands in for /kaggle, so that the mounts can be laid out here.
"""

import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT, assert_clean_error, run_forked, run_script, write_data_set

import kaggle_kernel
import patrec.machine

STEPS = sorted(ROOT.glob("step[0-9][0-9]_*.py"))
MOUNTS = {  # the classic layout and the one of newer kernels
    "classic": "input/patreco3-multitask-affective-music/data",
    "new": "input/datasets/geoparslp/patreco3-multitask-affective-music/data",
}
EARLIER_MOUNTS = (
    "input/patrec-lab3-step05-lstm",
    "input/notebooks/someone/patrec-lab3-step05-lstm",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    run_script("kaggle_kernel.py", "--all", "--user", "someone", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    flags = ("--notebook", "--user", "someone", "--out", folder)
    run_script("kaggle_kernel.py", "--all", *flags)
    return folder


def bundled(kernels, step):
    return next(kernels.glob(f"*/{step.name}"))


def listing(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """Small, for each step runs on a copy of it and only has to run."""
    return write_data_set(tmp_path_factory.mktemp("tiny"), n_emotion=(24, 6))


@pytest.fixture
def kaggle(tmp_path, tiny_data):
    """Function of the layout: makes an empty /kaggle/working and mounts the tiny data set."""

    def lay_out(layout):
        root = tmp_path / "kaggle"
        (root / "working").mkdir(parents=True)
        (root / "src").mkdir()
        shutil.copytree(tiny_data, root / MOUNTS[layout])
        return root

    return lay_out


def run_kernel(root, script, *args, run=run_forked, check=True):
    """Run a bundled file as Kaggle does: /kaggle/src/script.py, in /kaggle/working.

    No common.py is within reach. The inputs and the source must be as before: on Kaggle
    they are read-only (a listing tells, for these tests may run as root).
    """
    copy = root / "src" / "script.py"
    shutil.copy(script, copy)
    before = listing(root / "input") | listing(root / "src")
    result = run(
        copy, *args, cwd=root / "working", check=check, timeout=400, PATREC_KAGGLE_ROOT=str(root)
    )
    assert listing(root / "input") | listing(root / "src") == before
    return result


@pytest.fixture(autouse=True)
def _kaggle_only(monkeypatch):
    """Nothing here tells where data are; and UMAP, which compiles for half a minute, stays out."""
    for name in ("PATREC_DATA", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setitem(sys.modules, "umap", None)


# ------------------------------------------------------------------------- the one file


@pytest.mark.parametrize("step", STEPS, ids=lambda path: path.stem)
def test_every_step_runs_alone_as_one_file(kernels, kaggle, step):
    layout = sorted(MOUNTS)[int(step.name[4:6]) % 2]  # the steps take turns with the layouts
    root = kaggle(layout)
    run_kernel(root, bundled(kernels, step), "--smoke")
    written = root / "working" / "outputs" / step.stem
    metrics = json.loads((written / "metrics.json").read_text())
    assert metrics["data"]["root"] == str((root / MOUNTS[layout]).resolve())
    assert not metrics["data"]["demo"]
    assert (written / "summary.md").is_file()
    assert [path.name for path in (root / "working").iterdir()] == ["outputs"]


@pytest.mark.parametrize("layout", sorted(MOUNTS))
def test_without_arguments_as_on_kaggle(kernels, kaggle, layout):
    """Step 4 is the one whose full size is quick on tiny data; else the first step."""
    step = next((path for path in STEPS if path.name.startswith("step04")), STEPS[0])
    root = kaggle(layout)
    run_kernel(root, bundled(kernels, step), run=run_script)  # a fresh interpreter
    args = json.loads((root / "working" / "outputs" / step.stem / "args.json").read_text())
    assert args["smoke"] is False and args["data_dir"] is None


def test_step_6_uses_the_checkpoints_of_attached_kernels(kernels, kaggle):
    """Three models come from a kernel mounted the classic way, three from a new mount."""
    step5, step6 = (
        next(path for path in STEPS if path.name.startswith(f"step{n}")) for n in ("05", "06")
    )
    root = kaggle("new")
    run_kernel(root, bundled(kernels, step5), "--smoke", "--epochs", "1")
    trained = sorted((root / "working" / "outputs" / step5.stem).glob("*/best.pt"))
    assert len(trained) == 6
    for mount, checkpoints in zip(EARLIER_MOUNTS, (trained[:3], trained[3:]), strict=True):
        for path in checkpoints:
            target = root / mount / path.parent.relative_to(root / "working")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path.parent, target)
    shutil.rmtree(root / "working" / "outputs")
    result = run_kernel(root, bundled(kernels, step6), "--smoke")
    found = re.findall(r"^\w+: using (\S+),", result.stdout, re.MULTILINE)
    assert [sum(str(root / mount) in path for path in found) for mount in EARLIER_MOUNTS] == [
        3,
        3,
    ], result.stdout
    assert "training it here" not in result.stdout


def test_missing_data_set_is_named_and_nothing_is_written(kernels, tmp_path):
    root = tmp_path / "kaggle"
    for name in ("working", "src", "input"):
        (root / name).mkdir(parents=True)
    result = run_kernel(root, bundled(kernels, STEPS[0]), check=False)
    assert_clean_error(result, "geoparslp/patreco3-multitask-affective-music", "Input")
    assert not any((root / "working").iterdir())


def test_kaggle_is_where_kaggle_is(monkeypatch):
    """What the stand-in of these tests replaces."""
    monkeypatch.delenv("PATREC_KAGGLE_ROOT", raising=False)
    assert patrec.machine.kaggle_root() == Path("/kaggle")


@pytest.mark.parametrize("step", STEPS, ids=lambda path: path.stem)
def test_one_file_is_readable_and_complete(kernels, step):
    text = bundled(kernels, step).read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree) == ast.get_docstring(
        ast.parse(step.read_text())
    )  # what --help shows
    assert tree.body[1].module == "__future__"  # anywhere later Python would refuse it
    assert not [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "common"
    ]
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(defined) == len(set(defined))  # nothing of common is replaced by the step
    shared, own = (
        kaggle_kernel.top_level_names(ast.parse(path.read_text()))
        for path in (ROOT / "common.py", step)
    )
    twice = [name for name in own if name in shared]
    assert all(own[name] and own[name] == shared[name] for name in twice), "but the same imports"
    compile(text, step.name, "exec")
    comments = [
        line
        for line in (ROOT / "common.py").read_text().splitlines()
        if line.lstrip().startswith("# ")
    ]
    assert all(line in text for line in comments)  # the lab grades comments


def write_pair(folder, common, step):
    (folder / "common.py").write_text(common)
    (folder / "step06_y.py").write_text("")
    (folder / "step05_x.py").write_text(step)
    return folder / "step05_x.py", folder / "common.py"


COMMON = (
    '"""Shared."""\nfrom __future__ import annotations\n\nimport copy\nimport numpy as np\n\nRATE ='
    " 3\n\n\ndef train(x: Undefined = None):\n    return copy.copy([RATE])\n"
)


def test_bundle_keeps_what_surrounds_the_import(tmp_path):
    step = (
        '"""Step."""\nfrom __future__ import annotations\nimport numpy as np\nfrom common import'
        " (\n    RATE,  # why\n    train,\n)  # fmt: skip\n\nTWICE = 2 * RATE\nprint(__doc__,"
        " TWICE, train())\n"
    )
    text = kaggle_kernel.bundle(*write_pair(tmp_path, COMMON, step))
    (tmp_path / "one.py").write_text(text)
    (tmp_path / "common.py").unlink()
    result = subprocess.run([sys.executable, tmp_path / "one.py"], capture_output=True, text=True)
    assert result.stdout == "Step. 6 [3]\n", result.stderr


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("RATE = 5", "RATE"),  # common's functions would see the step's value
        ("def train(): pass", "train"),
        ("copy = 1", "copy"),
        ("import numpy.linalg as np", "np"),
        ("for RATE in range(3): pass", "RATE"),
        ("import common", "import common"),
        ("from common import RATE as r", "plain"),
        ("def f():\n    from common import RATE", "top level"),
        ("from common import nothing_of_the_kind", "nothing_of_the_kind"),
        ("from step06_y import helper", "step06_y"),  # a step that rests on another one
        ("def broken(:", "no valid Python"),
    ],
)
def test_steps_that_cannot_become_one_file_are_refused(tmp_path, capsys, line, word):
    with pytest.raises(SystemExit) as stopped:
        kaggle_kernel.bundle(
            *write_pair(tmp_path, COMMON, f'"""Step."""\nfrom common import train\n{line}\n')
        )
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert word in message and len(message.splitlines()) == 1


# -------------------------------------------------------------------------- the metadata


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The official client, which finds nobody's name or key here to sign in with."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "XDG_CONFIG_HOME"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("KAGGLE_CONFIG_DIR", str(home))
        from kaggle.api.kaggle_api_extended import KaggleApi
    return KaggleApi()


@pytest.fixture
def push(client, monkeypatch, capsys):
    """`kaggle kernels push -p FOLDER`, all of it but the sending; returns what it would send."""

    def call(folder):
        sent = []
        network = SimpleNamespace(
            kernels=SimpleNamespace(kernels_api_client=SimpleNamespace(save_kernel=sent.append))
        )
        monkeypatch.setattr(client, "build_kaggle_client", lambda: contextlib.nullcontext(network))
        capsys.readouterr()
        client.kernels_push(str(folder))
        printed = capsys.readouterr()
        assert printed.out + printed.err == "", "a warning: the title does not give the id"
        (request,) = sent
        # The server's rule, which the client leaves to it.
        assert len(request.new_title) <= 50 and len(request.slug.split("/")[1]) <= 50
        return request

    return call


@pytest.mark.parametrize("step", STEPS, ids=lambda path: path.stem)
def test_the_official_client_pushes_the_folder(kernels, push, step):
    folder = bundled(kernels, step).parent
    request = push(folder)
    assert (
        request.slug == f"someone/{folder.name}"
        and request.text == (folder / step.name).read_text()
    )
    assert request.language == "python" and request.kernel_type == "script"
    assert request.is_private and not request.enable_internet and not request.enable_tpu
    assert request.dataset_data_sources == ["geoparslp/patreco3-multitask-affective-music"]
    assert request.competition_data_sources == request.model_data_sources == []
    trains = "training=True" in step.read_text()
    assert request.enable_gpu == trains
    assert request.machine_shape == ("NvidiaTeslaT4" if trains else "")
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("step", STEPS, ids=lambda path: path.stem)
def test_the_official_client_pushes_notebooks(kernels, notebooks, push, step):
    folder = next(notebooks.glob(f"*/{step.stem}.ipynb")).parent
    request, script = push(folder), push(bundled(kernels, step).parent)
    assert request.kernel_type == "notebook" and request.language == "python"
    assert request.slug == script.slug and request.is_private and not request.enable_internet
    assert request.enable_gpu == script.enable_gpu
    assert request.dataset_data_sources == script.dataset_data_sources
    assert request.kernel_data_sources == script.kernel_data_sources
    sent = nbformat.reads(request.text, as_version=4)
    nbformat.validate(sent)
    assert sent.metadata.kernelspec.name == "python3"
    assert len(list(folder.iterdir())) == 2
    # All of the two files is there, the comments that open cells as Markdown.
    kinds = {"code": [], "markdown": []}
    for cell in sent.cells:
        kinds[cell.cell_type].append(cell.source)
    assert (ROOT / "common.py").read_text().strip() in map(str.strip, kinds["code"])
    words = "\n".join(kinds["markdown"])
    for line in step.read_text().splitlines():
        if line.startswith("# %% "):
            assert f"## {line[5:].strip()}" in words, line
    for source in kinds["code"]:
        compile(source, step.name, "exec")
        assert "from common import" not in source


@pytest.mark.parametrize(
    "fault",
    [
        {"title": "Other"},
        {"code_file": "x.py"},
        {"language": "Python"},
        {"kernel_type": "py"},
        {"dataset_sources": ["slug"]},
        {"kernel_sources": ["slug"]},
    ],
)
def test_a_folder_that_the_client_would_refuse_is_noticed(kernels, push, tmp_path, fault):
    """So that the test above tells something, whatever the next version of the client checks."""
    folder = shutil.copytree(bundled(kernels, STEPS[0]).parent, tmp_path / "kernel")
    path = folder / "kernel-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fault))
    with pytest.raises((ValueError, AssertionError)):
        push(folder)


@pytest.mark.parametrize("step", STEPS, ids=lambda path: path.stem)
def test_steps_that_look_for_earlier_outputs_get_them_attached(kernels, step):
    sources = json.loads((bundled(kernels, step).parent / "kernel-metadata.json").read_text())[
        "kernel_sources"
    ]
    assert all(int(re.search(r"step(\d\d)", source)[1]) < int(step.name[4:6]) for source in sources)
    if "genre_model" in step.read_text():
        assert (
            "someone/patrec-lab3-step05-lstm" in sources
            or "someone/patrec-lab3-step07-cnn" in sources
        )


@pytest.mark.parametrize(
    "form", ["5", "05", "step05", "step05_lstm", "step05_lstm.py", str(ROOT / "step05_lstm.py")]
)
def test_every_form_of_a_steps_name(tmp_path, form):
    run_script("kaggle_kernel.py", form, "--user", "someone", cwd=tmp_path)
    assert (tmp_path / "kernels" / "patrec-lab3-step05-lstm" / "step05_lstm.py").is_file()


def test_earlier_kernels_by_number_or_name(tmp_path):
    run_script(
        "kaggle_kernel.py",
        "6",
        "--user",
        "someone",
        "--earlier",
        "5",
        "other/their-kernel",
        "my-kernel",
        "--dataset",
        "me/my-copy",
        "--out",
        tmp_path,
    )
    facts = json.loads((tmp_path / "patrec-lab3-step06-eval" / "kernel-metadata.json").read_text())
    assert facts["kernel_sources"] == [
        "someone/patrec-lab3-step05-lstm",
        "other/their-kernel",
        "someone/my-kernel",
    ]
    assert facts["dataset_sources"] == ["me/my-copy"]
    assert not facts["enable_gpu"]  # it only scores what step 5 trained
    run_script("kaggle_kernel.py", "6", "--user", "someone", "--out", tmp_path)
    assert json.loads((tmp_path / "patrec-lab3-step06-eval" / "kernel-metadata.json").read_text())[
        "enable_gpu"
    ]  # it has to train


def test_another_data_set_is_attached_in_place_of_the_labs(tmp_path):
    words = ("5", "--user", "someone", "--dataset", "other/songs-of-2024", "--out", str(tmp_path))
    (facts,) = kaggle_kernel.main(words)
    assert facts["dataset_sources"] == ["other/songs-of-2024"]


def test_without_a_user_it_says_what_to_fill_in(tmp_path, push):
    result = run_script("kaggle_kernel.py", "5", "--out", tmp_path)
    assert "--user" in result.stdout
    push(tmp_path / "patrec-lab3-step05-lstm")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["99"], "no such step"),
        (["lstm"], "step05_lstm"),
        ([], "--all"),
        (["5", "--all"], "--all"),
        (["5", "--user", "a/b"], "--user"),
        (["5", "--dataset", "slug-alone"], "owner/slug"),
        (["5", "--earlier", "a/b"], "--earlier"),
        (["--all", "--earlier", "5"], "--all"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, args, word):
    assert_clean_error(run_script("kaggle_kernel.py", *args, cwd=tmp_path, check=False), word)
    assert not any(tmp_path.iterdir())


def test_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "kernels").write_text("")
    assert_clean_error(
        run_script("kaggle_kernel.py", "5", cwd=tmp_path, check=False), "kernels", "--out"
    )


@pytest.mark.parametrize("step", STEPS, ids=lambda path: path.stem)
def test_steps_get_the_outputs_of_these_earlier_ones(kernels, step):
    earlier = {
        "06": "05",
        "07": "05",
        "08": "05",
        "09": "05 07 08",
        "10": "07 08 09",
        "11": "05 07",
    }
    facts = json.loads((bundled(kernels, step).parent / "kernel-metadata.json").read_text())
    numbers = [source.split("-step")[1][:2] for source in facts["kernel_sources"]]
    assert numbers == earlier.get(step.name[4:6], "").split()
    assert facts["is_private"] is True
