"""Steps pasted into the cells of a notebook, in a real Jupyter kernel.

Cell 1 writes common.py with %%writefile; then every step's text is one cell. One kernel
runs them all, one after the other, as a user's session does.
"""

import os
import re

import kaggle_kernel
import nbformat
import pytest
from conftest import ROOT, read_metrics, write_data_set
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

STEPS = sorted(ROOT.glob("step[0-9][0-9]_*.py"))


class Session:
    """A running kernel, to which cells are sent."""

    def __init__(self, client):
        self.client, self.new_cell = client, nbformat.v4.new_code_cell

    def run(self, source):
        """Run a cell; returns (text of stdout, number of pictures, text of stderr)."""
        cell = self.new_cell(source)
        self.client.nb.cells.append(cell)
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        streams = {
            name: "".join(
                o["text"]
                for o in cell.outputs
                if o["output_type"] == "stream" and o["name"] == name
            )
            for name in ("stdout", "stderr")
        }
        pictures = sum("image/png" in o.get("data", {}) for o in cell.outputs)
        return streams["stdout"], pictures, streams["stderr"]

    def value(self, expression):
        return self.run(f"print(repr({expression}), end='')")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def session(folder, tmp_path_factory):
    client = NotebookClient(
        nbformat.v4.new_notebook(),
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    with client.setup_kernel():
        session = Session(client)
        data = write_data_set(
            tmp_path_factory.mktemp("data"), n_emotion=(24, 6)
        )  # small: the steps only have to run
        settings = {"PATREC_DATA": str(data), "PATREC_CACHE": os.environ["PATREC_CACHE"]}
        session.run(
            f"import os\nos.environ.update({settings!r})\nos.environ.pop('PATREC_KAGGLE_ROOT',"
            " None)"
        )
        # UMAP compiles for half a minute. Steps must do without both.
        session.run("import sys\nsys.modules['umap'] = sys.modules['plotly'] = None")
        assert (
            "common.py"
            in session.run("%%writefile common.py\n" + (ROOT / "common.py").read_text())[0]
        )
        yield session


def with_flags(text, flags="--smoke"):
    """The step's text as it is, but for its flags: a cell has no command line."""
    text, n = re.subn(r'(Step\("step\d\d_\w+", __doc__)', rf'\1, flags="{flags}"', text)
    assert n == 1
    return text


def results(folder, step):
    """metrics.json of a step; taken away, so that the next run is seen to write its own."""
    metrics = read_metrics(folder / "outputs" / step.stem)
    (folder / "outputs" / step.stem / "metrics.json").unlink()
    return metrics


def run_step_cell(session, folder, step):
    _, pictures, _ = session.run(with_flags(step.read_text()))
    metrics = results(folder, step)
    assert metrics["step"] == step.stem and metrics["smoke"]
    figures = (folder / "outputs" / step.stem / "summary.md").read_text().count("![")
    assert pictures == figures > 0  # each figure inline, once
    assert (
        session.value("__import__('matplotlib.pyplot').pyplot.get_fignums()") == "[]"
    )  # none left open


@pytest.mark.parametrize("step", STEPS, ids=lambda path: path.stem)
def test_step_in_a_cell(session, folder, step):
    """And again, as people run a cell: a step that only reads, and one that trains."""
    for _ in range(2 if step.name.startswith(("step04", "step05")) else 1):
        run_step_cell(session, folder, step)
    if step.name.startswith("step11"):
        summary = (folder / "outputs" / step.stem / "summary.md").read_text()
        assert "install `plotly`" in summary and "install `umap-learn`" in summary
        assert not (folder / "outputs" / step.stem / "maps.html").exists()


def test_one_file_form_in_a_cell_twice(session, folder):
    """What kaggle_kernel.py writes, pasted instead of common.py and step; run again at once."""
    step = next((path for path in STEPS if path.name.startswith("step04")), STEPS[0])
    text = with_flags(kaggle_kernel.bundle(step))
    for _ in range(2):
        session.run(text)
        assert results(folder, step)["step"] == step.stem


def test_pasted_as_it_is_with_the_kernels_own_arguments(session, folder):
    """No argument, nothing replaced. sys.argv holds the kernel's connection file."""
    assert (
        session.value(
            "'-f' in __import__('sys').argv or any('json' in a for a in __import__('sys').argv)"
        )
        == "True"
    )
    step = next((path for path in STEPS if path.name.startswith("step04")), STEPS[0])
    session.run(step.read_text())
    metrics = results(folder, step)
    assert metrics["step"] == step.stem and not metrics["smoke"]
    assert '"smoke": false' in (folder / "outputs" / step.stem / "args.json").read_text()


def test_foreign_arguments_are_ignored_only_in_a_notebook(session):
    session.run("from common import Step, make_parser")
    assert session.value("Step('made', 'x').args.seed").endswith("42")
    assert session.value("Step('made', 'x', flags='--seed 7').args.seed").endswith("7")
    assert session.value("make_parser('x').parse_args(['--seed', '7']).seed") == "7"


def test_mistake_in_a_cell_is_one_line_without_traceback(session):
    session.run("from common import InputError, find_data")
    with pytest.raises(CellExecutionError) as stopped:
        session.run("find_data('no-such-folder')")
    assert stopped.value.ename == "InputError"
    (line,) = one_error(session.client.nb.cells[-1])
    assert line.startswith("error: ") and "no-such-folder" in line
    assert session.value("1 + 1") == "2"  # the kernel lives on


def one_error(cell):
    """Lines that the notebook shows for the error of a cell."""
    (error,) = [output for output in cell.outputs if output["output_type"] == "error"]
    assert not [o for o in cell.outputs if o["output_type"] == "stream" and o["name"] == "stderr"]
    return "\n".join(error["traceback"]).splitlines()


def test_notebook_kernel_runs_alone_and_shows_what_it_finds(
    tmp_path, tmp_path_factory, monkeypatch
):
    """What --notebook writes, in an empty folder: headings, tables and figures appear inline."""
    step = next(path for path in STEPS if path.name.startswith("step05"))
    data = write_data_set(
        tmp_path_factory.mktemp("data"), per_class=(3, 1), n_emotion=(24, 2), n_frames=40
    )
    monkeypatch.setenv("PATREC_DATA", str(data))
    monkeypatch.delenv("PATREC_KAGGLE_ROOT", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    nb = nbformat.from_dict(kaggle_kernel.notebook(step))
    nbformat.validate(nb)
    (setup,) = [
        cell
        for cell in nb.cells
        if 'Step("step05' in cell.source
        and cell.cell_type == "code"
        and "class Step" not in cell.source
    ]
    setup.source = with_flags(setup.source, "--smoke --features beat_mel")
    client = NotebookClient(nb, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        for index, cell in enumerate(nb.cells):
            client.execute_cell(cell, index)
        shown = [
            output.data
            for cell in nb.cells
            for output in cell.get("outputs", [])
            if "data" in output
        ]
        summary = (tmp_path / "outputs" / "step05_lstm" / "summary.md").read_text()
        markdown = [data["text/markdown"] for data in shown if "text/markdown" in data]
        for line in summary.splitlines():
            if line.startswith("## ") or line.startswith("| "):
                assert any(line in text for text in markdown), line
        assert any(text.startswith("## 5b.") for text in markdown), "a heading"
        assert any("class LSTMBackbone" in text or "def forward" in text for text in markdown), (
            "source"
        )
        figures = re.findall(r"^!\[(.*)\]\(\w+\.png\)$", summary, re.MULTILINE)
        places = [place for place, data in enumerate(shown) if "image/png" in data]
        assert len(places) == len(figures) == 3
        captions = [shown[place + 1]["text/markdown"] for place in places]  # each under its figure
        assert captions == [f"*{caption}*" for caption in figures]
        words = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
        assert any(text.startswith("## 5c-f.") and "The lab:" in text for text in words)
        assert not [
            o for cell in nb.cells for o in cell.get("outputs", []) if o.output_type == "error"
        ]

        setup.source = setup.source.replace("--smoke", "--smoke --data-dir nowhere")
        with pytest.raises(CellExecutionError):
            client.execute_cell(setup, nb.cells.index(setup))
        (line,) = one_error(setup)
        assert line.startswith("error: ") and "nowhere" in line and "--data-dir" in line


def test_common_from_an_attached_folder(session, folder):
    """common.py in a data set or utility script: a folder on sys.path instead of %%writefile."""
    attached = folder / "kaggle" / "input" / "patrec-common"
    attached.mkdir(parents=True)
    (attached / "common.py").write_text((ROOT / "common.py").read_text())
    (folder / "common.py").unlink()
    session.run(
        f"import sys\nsys.modules.pop('common')\nsys.path.append({str(attached)!r})\nfrom common"
        " import find_data"
    )
    assert str(attached) in session.value("sys.modules['common'].__file__")
    assert session.value("str(find_data())") != "''"
