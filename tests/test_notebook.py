"""Steps pasted into the cells of a notebook, in a real Jupyter kernel.

Cell 1 writes common.py with %%writefile; then every step's text is one cell. One kernel
runs them all, one after the other, as a user's session does.
"""

import os

import pytest
from conftest import ROOT, write_data_set

STEPS = sorted(ROOT.glob("step[0-9][0-9]_*.py"))
LAST_LINE = "metrics = run_main(main)"


class Session:
    """A running kernel, to which cells are sent."""

    def __init__(self, client):
        import nbformat

        self.client, self.new_cell = client, nbformat.v4.new_code_cell

    def run(self, source):
        """Run a cell; returns (text of stdout, number of pictures, text of stderr)."""
        cell = self.new_cell(source)
        self.client.nb.cells.append(cell)
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        streams = {name: "".join(o["text"] for o in cell.outputs if o["output_type"] == "stream" and o["name"] == name) for name in ("stdout", "stderr")}
        pictures = sum("image/png" in o.get("data", {}) for o in cell.outputs)
        return streams["stdout"], pictures, streams["stderr"]

    def value(self, expression):
        return self.run(f"print(repr({expression}), end='')")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def session(folder, tmp_path_factory):
    import nbformat
    from nbclient import NotebookClient

    client = NotebookClient(nbformat.v4.new_notebook(), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel():
        session = Session(client)
        data = write_data_set(tmp_path_factory.mktemp("data"), n_emotion=(24, 6))  # small: the steps only have to run
        settings = {"PATREC_DATA": str(data), "PATREC_CACHE": os.environ["PATREC_CACHE"]}
        session.run(f"import os\nos.environ.update({settings!r})\nos.environ.pop('PATREC_KAGGLE_ROOT', None)")
        assert "common.py" in session.run("%%writefile common.py\n" + (ROOT / "common.py").read_text())[0]
        yield session


def smoke_cell(step):
    """The step's text as it is, but for the tiny size: a cell has no command line."""
    text = step.read_text()
    assert text.rstrip().endswith(LAST_LINE)
    return text.replace(LAST_LINE, 'metrics = run_main(lambda: main(["--smoke"]))')


def run_step_cell(session, folder, step):
    session.run("metrics = None")
    _, pictures, _ = session.run(smoke_cell(step))
    assert session.value('metrics["step"]') == repr(step.stem)
    figures = (folder / "outputs" / step.stem / "summary.md").read_text().count("![")
    assert pictures == figures > 0  # each figure inline, once
    assert session.value("__import__('matplotlib.pyplot').pyplot.get_fignums()") == "[]"  # none left open


@pytest.mark.parametrize("step", STEPS, ids=lambda path: path.stem)
def test_step_in_a_cell(session, folder, step):
    """And again, as people run a cell: a step that only reads, and one that trains."""
    for _ in range(2 if step.name.startswith(("step04", "step05")) else 1):
        run_step_cell(session, folder, step)


def test_one_file_form_in_a_cell_twice(session, folder):
    """What kaggle_kernel.py writes, pasted instead of common.py and step; run again at once."""
    import kaggle_kernel

    step = next((path for path in STEPS if path.name.startswith("step04")), STEPS[0])
    text = kaggle_kernel.bundle(step).replace(LAST_LINE, 'metrics = run_main(lambda: main(["--smoke"]))')
    for _ in range(2):
        session.run("metrics = None")
        session.run(text)
        assert session.value('metrics["step"]') == repr(step.stem)


def test_pasted_as_it_is_with_the_kernels_own_arguments(session, folder):
    """No argument, nothing replaced. sys.argv holds the kernel's connection file."""
    assert session.value("'-f' in __import__('sys').argv or any('json' in a for a in __import__('sys').argv)") == "True"
    step = next((path for path in STEPS if path.name.startswith("step04")), STEPS[0])
    session.run("metrics = None")
    session.run(step.read_text())
    assert session.value('metrics["step"]') == repr(step.stem)
    assert '"smoke": false' in (folder / "outputs" / step.stem / "args.json").read_text()


def test_foreign_arguments_are_ignored_only_in_a_notebook(session):
    cell = "from common import make_parser, parse_args\nprint(parse_args(make_parser('x')).seed)"
    assert session.run(cell)[0] == "42\n"
    assert session.value("parse_args(make_parser('x'), ['--seed', '7']).seed") == "7"


def test_mistake_in_a_cell_is_one_line_without_traceback(session, folder):
    from nbclient.exceptions import CellExecutionError

    session.run("from common import InputError, find_data, run_main")
    with pytest.raises(CellExecutionError) as stopped:
        session.run("run_main(lambda: find_data('no-such-folder'))")
    outputs = session.client.nb.cells[-1].outputs
    errors = [o for o in outputs if o["output_type"] == "stream" and o["name"] == "stderr"]
    assert errors[0]["text"].startswith("error: ") and "no-such-folder" in errors[0]["text"]
    assert stopped.value.ename == "SystemExit" and stopped.value.evalue == "2"
    assert session.value("1 + 1") == "2"  # the kernel lives on


def test_common_from_an_attached_folder(session, folder):
    """common.py in a data set or utility script: a folder on sys.path instead of %%writefile."""
    attached = folder / "kaggle" / "input" / "patrec-common"
    attached.mkdir(parents=True)
    (attached / "common.py").write_text((ROOT / "common.py").read_text())
    (folder / "common.py").unlink()
    session.run(f"import sys\nsys.modules.pop('common')\nsys.path.append({str(attached)!r})\nfrom common import find_data")
    assert str(attached) in session.value("sys.modules['common'].__file__")
    assert session.value("str(find_data())") != "''"
