"""Turn a step into a folder that `kaggle kernels push` takes, or into cells to paste.

    python -m tools.kaggle 5 --user NAME                # kernels/patrec-lab3-step05-lstm/
    python -m tools.kaggle 6 --user NAME --earlier 5    # finds the checkpoints of step 5's kernel
    python -m tools.kaggle --all --user NAME            # every step, the earlier ones attached
    python -m tools.kaggle 5 --user NAME --notebook     # a notebook instead of a script
    kaggle kernels push -p kernels/patrec-lab3-step05-lstm

    python -m tools.kaggle --setup > setup_cell.py      # by hand: paste this as the first cell

A script kernel is one file that Kaggle runs without arguments. It holds the texts of the
modules that the step needs, which it writes into a temporary folder, and then the step. It
also runs on any other machine, with the step's flags. A notebook kernel has one cell for each
module, then the step's own cells. In a notebook of your own, paste what --setup prints into
the first cell and the text of a step into the second one.

The folder also holds kernel-metadata.json: private, with a T4 GPU where the step trains,
without internet, with the data set attached.
"""

import argparse
import ast
import contextlib
import json
import re
import sys
from pathlib import Path

from patrec.errors import InputError, end_in_one_line
from patrec.files import PROJECT, make_folder, write_text
from patrec.flags import Parser
from tools.steps import STEPS, find_step

DATA_SET = "geoparslp/patreco3-multitask-affective-music"
OWNER, SLUG = r"[A-Za-z0-9][A-Za-z0-9_-]*", r"[a-z0-9][a-z0-9-]{3,48}[a-z0-9]"

ONE_FILE = """\
# One file for a Kaggle script kernel: the modules that the steps share, then {script}.py,
# which is at the end. The modules are written into a temporary folder and imported from there.
import atexit
import shutil
import sys
import tempfile

folder = tempfile.mkdtemp(prefix="patrec-")
atexit.register(shutil.rmtree, folder, ignore_errors=True)
sys.path.insert(0, folder)
"""
ONE_CELL = """\
# The first cell of a notebook: it writes the modules that the steps share into the working folder.
# Run it once. After that, the text of each step runs in a cell of its own.
folder = "."
"""
WRITE_MODULES = """\
from pathlib import Path

for name, text in MODULES.items():
    path = Path(folder, name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.removeprefix("\\n"), encoding="utf-8")
"""


def read(path) -> str:
    return (PROJECT / path).read_text(encoding="utf-8")


def find_modules(*scripts) -> dict[str, str]:
    """Find the modules that texts import, directly or through others: {path: the module's text}."""
    found = {"patrec/__init__.py": read("patrec/__init__.py")}
    texts = list(scripts)
    while texts:
        pattern = r"^\s*(?:from|import) ([\w.]+)(?: import (.*))?"
        for module, names in re.findall(pattern, texts.pop(), re.MULTILINE):
            for name in ("", *re.findall(r"\w+", names)):  # `from patrec import plots` too
                path = f"{module}.{name}".strip(".").replace(".", "/") + ".py"
                if path not in found and (PROJECT / path).is_file():
                    found[path] = read(path)
                    texts.append(found[path])
    return dict(sorted(found.items()))


def literal(text) -> str:
    """Write a text as a Python string: as it stands, between triple quotes, if that is possible."""
    code = f"r'''\n{text}'''"
    with contextlib.suppress(SyntaxError):  # the text holds these quotes itself
        if ast.literal_eval(code) == f"\n{text}":
            return code
    return repr(f"\n{text}")


def dict_of_modules(modules) -> str:
    """Write Python code that makes the dict MODULES, each text under a line with its name."""
    parts = ["MODULES = {}\n"]
    for name, text in modules.items():
        parts.append(f"# {f' {name} ':-^96}\nMODULES[{name!r}] = {literal(text)}\n")
    return "\n".join(parts)


def split_docstring(script, text) -> tuple[str, str]:
    """Split the text of a step after the docstring with which it begins."""
    try:
        end = ast.parse(text).body[0].end_lineno
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{script}.py: no valid Python ({error})") from None
    lines = text.split("\n")
    return "\n".join(lines[:end]), "\n".join(lines[end:])


def one_file(script, text) -> str:
    """Make one file of a step: its docstring, which --help shows, the modules, the step's text."""
    docstring, _ = split_docstring(script, text)
    modules = dict_of_modules(find_modules(text))
    heading = f"# {f' {script}.py ':=^96}"
    begin = ONE_FILE.format(script=script)
    return "\n".join([docstring, "", begin, modules, WRITE_MODULES, heading, text])


def setup_cell() -> str:
    """Make the cell that writes the modules of all steps into a notebook's working folder."""
    modules = find_modules(*(read(f"{step.script}.py") for step in STEPS.values()))
    return "\n".join([ONE_CELL, dict_of_modules(modules), WRITE_MODULES])


def notebook(script, text) -> dict:
    """Make a notebook of a step (nbformat 4): a cell for each module, then the step's cells.

    A cell of the step begins at a line `# %%`. That line becomes a heading, and the comment
    under it Markdown.
    """
    docstring, body = split_docstring(script, text)
    cells = [
        cell("markdown", f"# {ast.literal_eval(docstring)}"),
        cell("markdown", "The modules that all steps share: run these cells first."),
        cell("code", 'from pathlib import Path\n\nPath("patrec").mkdir(exist_ok=True)'),
    ]
    for path, module in find_modules(text).items():
        cells.append(cell("code", f"%%writefile {path}\n{module}"))
    for part in re.split(r"^# %%", body, flags=re.MULTILINE):
        title, _, rest = part.partition("\n")
        comment = re.match(r"(#.*\n)*", rest)[0]
        words = f"## {title.strip()}\n\n" if title.strip() else ""
        words += re.sub("^# ?", "", comment, flags=re.MULTILINE)
        parts = (("markdown", words), ("code", rest.removeprefix(comment)))
        cells += [cell(kind, text.strip()) for kind, text in parts if text.strip()]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": [{"id": f"cell-{number}"} | made for number, made in enumerate(cells)],
        "metadata": {"kernelspec": kernelspec, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def cell(kind, source) -> dict:
    """Make one cell of a notebook."""
    more = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source} | more


def kernel_slug(number) -> str:
    """Name a step's kernel as its address does, e.g. patrec-lab3-step05-lstm."""
    return f"patrec-lab3-{STEPS[number].script}".replace("_", "-")


def kernel_id(text, user) -> str:
    """Complete what --earlier names, a step or a kernel as owner/slug, to owner/slug."""
    name = text if "/" in text else f"{user}/{kernel_slug(find_step(text))}"
    if not re.fullmatch(f"{OWNER}/{SLUG}", name):
        cure = "give a step's number, or owner/slug as in the kernel's address"
        raise InputError(f"--earlier {text}: no name of a kernel; {cure}")
    return name


def metadata(number, user, earlier, as_notebook=False) -> dict:
    """Say what kernel-metadata.json holds; earlier are kernels as owner/slug."""
    step, slug = STEPS[number], kernel_slug(number)
    # A step that reads checkpoints trains the networks itself if no earlier kernel has them.
    gpu = step.trains or bool(step.builds_on and not earlier)
    return {
        "id": f"{user}/{slug}",
        "title": slug.replace("-", " ").capitalize(),  # Kaggle turns the title back into the slug
        "code_file": f"{step.script}.{'ipynb' if as_notebook else 'py'}",
        "language": "python",
        "kernel_type": "notebook" if as_notebook else "script",
        "is_private": True,  # the course forbids publishing solutions
        "enable_gpu": gpu,
        # The default may be a P100, which is too old for the installed torch.
        "machine_shape": "NvidiaTeslaT4" if gpu else "",
        "enable_internet": False,
        "dataset_sources": [DATA_SET],
        "kernel_sources": earlier,
    }


def parse_flags(argv) -> argparse.Namespace:
    """Read the command line; a mistake in it is an InputError or ends the program."""
    parser = Parser(description=__doc__)
    add = parser.flag
    add("step", "5, 05, step05 or the file's name", nargs="?")
    add("--all", "all steps, each with the kernels it builds on", action="store_true")
    add("--setup", "print the cell that writes the modules, for pasting", action="store_true")
    add("--notebook", "a notebook kernel instead of a script kernel", action="store_true")
    add("--user", "your name on Kaggle, as in kaggle.com/NAME", metavar="NAME")
    outputs = "kernels whose outputs to attach: a step's number or owner/slug"
    add("--earlier", outputs, nargs="+", default=[], metavar="KERNEL")
    add("--out-dir", "where the folders go", type=Path, default=Path("kernels"))
    args = parser.parse_args(argv)
    if bool(args.step) + args.all + args.setup != 1:
        raise InputError("name one step, e.g. 5, or give --all or --setup")
    if not args.setup and not re.fullmatch(OWNER, args.user or ""):
        raise InputError(f"--user {args.user}: give the name in kaggle.com/NAME")
    return args


def main(argv=None):
    args = parse_flags(argv)
    if args.setup:
        print(setup_cell())
        return
    for number in STEPS if args.all else [find_step(args.step)]:
        names = [*map(str, STEPS[number].builds_on if args.all else ()), *args.earlier]
        earlier = [kernel_id(name, args.user) for name in names]
        facts = metadata(number, args.user, earlier, args.notebook)
        script = STEPS[number].script
        text = read(f"{script}.py")
        code = json.dumps(notebook(script, text)) if args.notebook else one_file(script, text)
        folder = args.out_dir / kernel_slug(number)
        make_folder(folder)
        write_text(folder / facts["code_file"], code)
        write_text(folder / "kernel-metadata.json", json.dumps(facts, indent=2) + "\n")
        device = "GPU T4" if facts["enable_gpu"] else "CPU"
        after = f", after {' and '.join(earlier)}" if earlier else ""
        print(f"{folder}: {device}{after}; kaggle kernels push -p {folder}")


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
