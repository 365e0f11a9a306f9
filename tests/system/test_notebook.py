"""Steps in the cells of a notebook, in a real Jupyter kernel.

Cell 1 is what `tools.kaggle --setup` prints; then every step's text is one cell. One kernel
runs them all, one after the other, as a user's session does. And the notebook that
`tools.kaggle --notebook` makes, in an empty folder.
"""

import re

import nbformat
import pytest
from conftest import ROOT, read_metrics
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools import kaggle
from tools.steps import STEPS

pytestmark = pytest.mark.slow


class Session:
    """A running kernel, to which cells are sent."""

    def __init__(self, client):
        self.client, self.new_cell = client, nbformat.v4.new_code_cell

    def run(self, source):
        """Run a cell; returns (text of stdout, number of pictures)."""
        cell = self.new_cell(source)
        self.client.nb.cells.append(cell)
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        streams = [o for o in cell.outputs if o["output_type"] == "stream"]
        stdout = "".join(o["text"] for o in streams if o["name"] == "stdout")
        pictures = sum("image/png" in o.get("data", {}) for o in cell.outputs)
        return stdout, pictures

    def value(self, expression):
        return self.run(f"print(repr({expression}), end='')")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def session(folder, tiny_data):
    """A kernel that works in a folder, knows where the data are, and has run the setup cell."""
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=300, resources=where)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONPATH", "PATREC_KAGGLE_ROOT"):
            patch.delenv(name, raising=False)
        patch.setenv("PATREC_DATA", str(tiny_data))
        with client.setup_kernel():
            session = Session(client)
            # UMAP compiles for half a minute. Steps must do without both.
            session.run("import sys\nsys.modules['umap'] = sys.modules['plotly'] = None")
            session.run(kaggle.setup_cell())
            assert (folder / "common.py").read_text() == (ROOT / "common.py").read_text()
            yield session


def step_text(number):
    return (ROOT / f"{STEPS[number].script}.py").read_text(encoding="utf-8")


def with_flags(text, flags="--smoke"):
    """The step's text as it is, but for its flags: a cell has no command line."""
    text, n = re.subn(r'(Step\("step\d\d_\w+", __doc__)', rf'\1, flags="{flags}"', text)
    assert n == 1
    return text


def results(folder, number):
    """metrics.json of a step; taken away, so that the next run is seen to write its own."""
    metrics = read_metrics(folder / "outputs" / STEPS[number].script)
    (folder / "outputs" / STEPS[number].script / "metrics.json").unlink()
    return metrics


@pytest.mark.parametrize("number", STEPS)
def test_step_in_a_cell(session, folder, number):
    """And again, as people run a cell: a step that only reads, and one that trains."""
    script = STEPS[number].script
    for _ in range(2 if number in (4, 5) else 1):
        _, pictures = session.run(with_flags(step_text(number)))
        metrics = results(folder, number)
        assert metrics["step"] == script and metrics["smoke"]
        drawn = [path.stat().st_size for path in (folder / "outputs" / script).glob("*.png")]
        assert pictures == len(drawn) > 0  # each figure inline, once
        assert min(drawn) > 5000
        left_open = "__import__('matplotlib.pyplot').pyplot.get_fignums()"
        assert session.value(left_open) == "[]"


def test_two_workers_from_a_cell(session, folder):
    """What the cell has written is found by other processes too."""
    flags = "--smoke --workers 2 --features beat_mel beat_chroma"
    session.run(with_flags(step_text(5), flags))
    assert set(results(folder, 5)["runs"]) >= {"beat_mel", "beat_chroma"}


def test_pasted_as_it_is_with_the_kernels_own_arguments(session, folder):
    """No argument, nothing replaced. sys.argv holds the kernel's connection file."""
    assert session.value("any('json' in word for word in __import__('sys').argv)") == "True"
    session.run(step_text(4))
    assert not results(folder, 4)["smoke"]
    session.run("from patrec.flags import make_parser\nfrom patrec.step import Step")
    assert session.value("Step('made', 'x', flags='--seed 7').args.seed").endswith("7")


def test_mistake_in_a_cell_is_one_line_without_traceback(session):
    session.run("from patrec.files import find_data")
    with pytest.raises(CellExecutionError) as stopped:
        session.run("find_data('no-such-folder')")
    assert stopped.value.ename == "InputError"
    (error,) = session.client.nb.cells[-1].outputs
    (line,) = "\n".join(error["traceback"]).splitlines()
    assert line.startswith("error: ") and "no-such-folder" in line
    assert session.value("1 + 1") == "2"  # the kernel lives on


def test_the_modules_may_lie_in_an_attached_folder(session, folder):
    """In a data set of the user's: its folder on sys.path instead of the setup cell."""
    attached = folder / "kaggle" / "input" / "patrec-music"
    attached.mkdir(parents=True)
    (folder / "common.py").rename(attached / "common.py")
    (folder / "patrec").rename(attached / "patrec")
    forget = "for name in [n for n in sys.modules if n.split('.')[0] in ('common', 'patrec')]:"
    session.run(f"import sys\n{forget}\n    del sys.modules[name]")
    session.run(f"sys.path.append({str(attached)!r})")
    session.run(with_flags(step_text(4)))
    assert results(folder, 4)["smoke"]
    assert str(attached) in session.value("sys.modules['common'].__file__")


def test_the_notebook_kernel_runs_alone_and_shows_what_it_finds(tmp_path, tiny_data, monkeypatch):
    """What --notebook writes, in an empty folder: headings, tables and figures appear inline."""
    monkeypatch.setenv("PATREC_DATA", str(tiny_data))
    monkeypatch.delenv("PATREC_KAGGLE_ROOT", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    nb = nbformat.from_dict(kaggle.notebook(STEPS[5].script, step_text(5)))
    nbformat.validate(nb)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    (setup,) = [cell for cell in code if 'Step("step05' in cell.source]
    setup.source = with_flags(setup.source, "--smoke --features beat_mel")
    NotebookClient(nb, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.data for cell in code for output in cell.outputs if "data" in output]
    summary = (tmp_path / "outputs" / "step05_lstm" / "summary.md").read_text()
    markdown = [data["text/markdown"] for data in shown if "text/markdown" in data]
    for line in summary.splitlines():
        if line.startswith("## ") or line.startswith("| "):
            assert any(line in text for text in markdown), line
    assert any(text.startswith("## 5b.") for text in markdown), "a heading"
    assert any("def forward" in text for text in markdown), "source"
    figures = re.findall(r"^!\[(.*)\]\(\w+\.png\)$", summary, re.MULTILINE)
    places = [place for place, data in enumerate(shown) if "image/png" in data]
    assert len(places) == len(figures) > 0
    captions = [shown[place + 1]["text/markdown"] for place in places]  # each under its figure
    assert captions == [f"*{caption}*" for caption in figures]
