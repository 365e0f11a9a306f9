"""tools.kaggle: the one file, the notebook and the cell to paste hold the project's very texts."""

import ast
import contextlib
import json
import re
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT, error_line

from patrec.errors import InputError
from tools import kaggle
from tools.steps import STEPS

SCRIPTS = [step.script for step in STEPS.values()]
DATA_SET = "geoparslp/patreco3-multitask-affective-music"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def modules_in(code):
    """The texts that a file or a cell writes, by path, as Python reads them."""
    texts = {}
    for node in ast.parse(code).body:
        match node:
            case ast.Assign([ast.Subscript(ast.Name("MODULES"), name)], text):
                texts[ast.literal_eval(name)] = ast.literal_eval(text)[1:]
    return texts


def read_facts(folder):
    return json.loads((folder / "kernel-metadata.json").read_text())


def kernels(out, *words):
    """Run the tool; return the folders that it wrote, by the name of the step's script."""
    kaggle.main([*map(str, words), "--user", "someone", "--out-dir", str(out)])
    return {read_facts(folder)["code_file"].partition(".")[0]: folder for folder in out.iterdir()}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return kernels(tmp_path_factory.mktemp("kernels"), "--all")


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    return kernels(tmp_path_factory.mktemp("notebooks"), "--all", "--notebook")


def test_one_file_holds_the_step_and_its_modules_word_by_word(scripts):
    for script in SCRIPTS:
        step, code = read(f"{script}.py"), (scripts[script] / f"{script}.py").read_text("utf-8")
        assert code.endswith(step)
        docstrings = [ast.get_docstring(ast.parse(text)) for text in (code, step)]
        assert docstrings[0] == docstrings[1]  # for --help
        texts = modules_in(code)
        # Only what it needs.
        assert ("common.py" in texts) == bool(re.search("^(from|import) common", step, re.M))
        for name, text in texts.items():
            assert text == read(name)
            assert text in code  # as text, which a grader can read


def test_modules_are_found_however_they_are_imported():
    found = kaggle.find_modules("from patrec import errors, explain\n    import patrec.audio\n")
    assert {"patrec/explain.py", "patrec/audio.py", "patrec/errors.py"} <= set(found)


@pytest.mark.parametrize("text", [
    "\n\nno newline at the end, blank lines first",
    "a = '''one''' # ends with a quote '",
    'a = """two""" # ends with a quote "',
    "both ''' and \"\"\" and a backslash \\",
    "carriage\r\nreturns\r",
    "r'\\d\\n'\ttabs, μ, Müller ♫ and \x0c form feeds\n",
])  # fmt: skip
def test_any_text_is_given_back(text):
    assert modules_in(kaggle.dict_of_modules({"a.py": text})) == {"a.py": text}


def test_a_step_that_is_no_python_is_named():
    with pytest.raises(InputError, match="step05_x.py: no valid Python"):
        kaggle.one_file("step05_x", '"""About."""\ndef broken(:\n')


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_notebook_holds_the_step_and_its_modules(notebooks, script):
    made = nbformat.read(notebooks[script] / f"{script}.ipynb", as_version=4)
    nbformat.validate(made)
    assert made.metadata.kernelspec.name == "python3"  # Kaggle runs none without
    for cell in made.cells:
        if cell.source.startswith("%%writefile "):
            line, _, text = cell.source.partition("\n")
            assert text == read(line.split()[1])
    # Every line of the step is there, the comment that opens a cell as Markdown.
    shown = {line for cell in made.cells for line in cell.source.splitlines()} | {""}
    step = read(f"{script}.py")
    for line in step.removeprefix('"""').partition('"""')[2].splitlines():
        heading = f"## {line.removeprefix('# %%').strip()}"
        assert {line, heading, line.removeprefix("#").removeprefix(" ")} & shown, line
    assert ast.get_docstring(ast.parse(step), clean=False).strip() in made.cells[0].source


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
        server = SimpleNamespace(kernels_api_client=SimpleNamespace(save_kernel=sent.append))
        network = SimpleNamespace(kernels=server)
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


def test_the_official_client_pushes_the_folders(scripts, notebooks, push):
    for kind, folders in (("script", scripts), ("notebook", notebooks)):
        for step in STEPS.values():
            folder = folders[step.script]
            request = push(folder)
            assert request.slug == f"someone/{folder.name}" and request.kernel_type == kind
            if kind == "script":  # of a notebook the client sends a form of its own
                assert request.text == (folder / f"{step.script}.py").read_text("utf-8")
            assert request.language == "python"
            assert request.is_private and not request.enable_internet and not request.enable_tpu
            assert request.dataset_data_sources == [DATA_SET]
            assert request.competition_data_sources == request.model_data_sources == []
            assert request.enable_gpu == step.trains
            assert request.machine_shape == ("NvidiaTeslaT4" if step.trains else "")
            earlier = [source.split("-step")[1][:2] for source in request.kernel_data_sources]
            assert list(map(int, earlier)) == list(step.builds_on)
            assert len(list(folder.iterdir())) == 2


def test_earlier_kernels_by_number_or_name(tmp_path):
    earlier = ("--earlier", "5", "other/their-kernel")
    (folder,) = kernels(tmp_path / "with", 6, *earlier).values()
    facts = read_facts(folder)
    names = ["someone/patrec-lab3-step05-lstm", "other/their-kernel"]
    assert facts["kernel_sources"] == names
    assert not facts["enable_gpu"]  # it only scores what step 5 trained
    (folder,) = kernels(tmp_path / "without", 6).values()
    assert read_facts(folder)["enable_gpu"]  # it has to train
    folders = kernels(tmp_path / "all", "--all", "--earlier", "other/their-kernel")
    assert read_facts(folders["step06_eval"])["kernel_sources"] == names


@pytest.mark.parametrize("words, told", [
    ([], "--all"), (["5"], "--user"), (["5", "--user", "a/b"], "--user"),
    (["99", "--user", "me"], "no such step"),
    (["5", "--user", "me", "--earlier", "99"], "no such step"),
    (["5", "--user", "me", "--earlier", "a/b"], "--earlier a/b"),
])  # fmt: skip
def test_mistakes_are_named_and_nothing_is_written(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=told) as stopped:
        kaggle.main(words)
    assert len(str(stopped.value).splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_one_line_of_the_command(tmp_path, capsys):
    (tmp_path / "kernels").touch()
    words = ("5", "--user", "me", "--out-dir", tmp_path / "kernels")
    line = error_line(capsys, "tools/kaggle.py", *words)
    assert "kernels" in line and "--out-dir" in line
