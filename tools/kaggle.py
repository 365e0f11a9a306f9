"""Turn a step into a folder that `kaggle kernels push` takes.

    python kaggle_kernel.py 5 --user NAME                # kernels/patrec-lab3-step05-lstm/
    python kaggle_kernel.py 6 --user NAME --earlier 5    # finds the checkpoints of step 5's kernel
    python kaggle_kernel.py --all --user NAME            # every step, the earlier ones attached
    python kaggle_kernel.py 5 --user NAME --notebook     # a notebook instead of a script
    kaggle kernels push -p kernels/patrec-lab3-step05-lstm

A script kernel is one file that Kaggle runs without arguments. The folder holds that
file (the text of common.py, then the step's, with the import between them taken out) and
kernel-metadata.json (private, GPU T4 where the step trains, internet off, data set
attached). The file runs alone anywhere else too, with the step's flags. A notebook kernel
holds the same as cells: common.py in one, then the step's own cells, the comment that
opens each as Markdown.
"""

import argparse
import ast
import json
import re
from pathlib import Path

from tools.handin import Parser, stop, write

HERE = Path(__file__).resolve().parent
DATA_SET = "geoparslp/patreco3-multitask-affective-music"
NO_USER = "your-kaggle-name"
# Steps that look for what others left (checkpoints, scores): --all attaches those kernels.
EARLIER = {
    "06": ("05",),
    "07": ("05",),
    "08": ("05",),
    "09": ("05", "07", "08"),
    "10": ("07", "08", "09"),
    "11": ("05", "07"),
}
OWNER, SLUG = r"[A-Za-z0-9][A-Za-z0-9_-]*", r"[a-z0-9][a-z0-9-]{3,48}[a-z0-9]"


def find_step(name, folder=HERE) -> Path:
    """Find a step's script by '5', '05', 'step05' or its file name."""
    scripts = sorted(folder.glob("step[0-9][0-9]_*.py"))
    number = re.fullmatch(r"(?:step)?0*(\d{1,2})", name)
    stem = Path(name).name.removesuffix(".py")
    found = [
        path
        for path in scripts
        if path.stem == stem or (number and int(path.name[4:6]) == int(number[1]))
    ]
    if not found:
        stop(
            f"{name!r}: no such step in {folder}; there are "
            f"{', '.join(path.stem for path in scripts) or 'none'}"
        )
    return found[0]


def parse(path) -> tuple[str, ast.Module]:
    """Read a script; returns its text and its syntax tree."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, ast.parse(text)
    except FileNotFoundError:
        stop(f"{path}: no such file")
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        stop(f"{path}: no valid Python ({error})")


def top_level_names(tree) -> dict[str, str | None]:
    """Names that a module binds at its top level: to which import, or None for anything else."""
    names = {}
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = None
            continue  # what is inside belongs to it
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {
                a.asname or a.name: f"{node.module}.{a.name}"
                for a in node.names
                if node.module != "common"
            }
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
        if not isinstance(
            node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
        ):
            nodes += ast.iter_child_nodes(node)
    return names


def imports_of_common(path, tree) -> list[ast.ImportFrom]:
    """The step's `from common import ...` statements; other forms cannot be bundled."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(a.name == "common" for a in node.names):
            stop(
                f"{path}, line {node.lineno}: 'import common' cannot be bundled; "
                "write 'from common import ...'"
            )
        others = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if local := [
            name
            for name in others
            if name and name != "common" and path.with_name(f"{name}.py").exists()
        ]:
            stop(
                f"{path}, line {node.lineno}: imports {local[0]}, which the one file would "
                "not hold; what steps share belongs into common.py"
            )
        is_common = isinstance(node, ast.ImportFrom) and node.module == "common"
        renamed = is_common and any(a.asname or a.name == "*" for a in node.names)
        if is_common and (renamed or node not in tree.body):
            stop(
                f"{path}, line {node.lineno}: only a plain 'from common import names' "
                "at the top level can be bundled"
            )
    return [
        node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "common"
    ]


def without(text, nodes) -> str:
    """Text without the lines of some statements and the blank line before each."""
    lines = text.splitlines(keepends=True)
    for node in sorted(nodes, key=lambda node: -node.lineno):
        first = node.lineno - 1
        del lines[first - (first > 0 and not lines[first - 1].strip()) : node.end_lineno]
    return "".join(lines)


def docstring_node(tree) -> list[ast.stmt]:
    return tree.body[:1] if ast.get_docstring(tree) is not None else []


def bundle(step, common=HERE / "common.py") -> str:
    """Return one script: the step's docstring, common's text, the step's text.

    The docstring comes first because the step's --help shows `__doc__`; common's own
    becomes a comment. `from __future__` must precede all other code.
    """
    common_text, common_tree = parse(common)
    step_text, step_tree = parse(step)
    imports = imports_of_common(step, step_tree)
    known, own = top_level_names(common_tree), top_level_names(step_tree)
    missing = sorted({a.name for node in imports for a in node.names} - set(known))
    if missing:
        stop(f"{step}: imports {', '.join(missing)}, which {common.name} does not define")
    # The same import in both is no clash; a step's own `copy` would break common's.
    clashes = sorted(
        name for name in own if name in known and (own[name] is None or own[name] != known[name])
    )
    if clashes:
        stop(
            f"{step}: {', '.join(clashes)} would replace a name of {common.name} in one "
            "file; rename in the step"
        )

    trees = (common_tree, step_tree)
    future = [
        [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
        for tree in trees
    ]
    features = sorted({a.name for nodes in future for node in nodes for a in node.names})
    rule = "# " + "=" * 86
    about = "".join(
        f"# {line}".rstrip() + "\n" for line in (ast.get_docstring(common_tree) or "").splitlines()
    )
    text = "\n".join(
        [
            (
                "".join(step_text.splitlines(keepends=True)[: step_tree.body[0].end_lineno]).strip()
                if docstring_node(step_tree)
                else ""
            ),
            (
                f"# One file for a Kaggle script kernel: {common.name}, which all steps share, "
                f"then {step.name} (at the end)."
            ),
            *(f"from __future__ import {feature}" for feature in features),
            f"\n{rule}\n# {common.name}\n{rule}\n#\n{about}",
            without(common_text, docstring_node(common_tree) + future[0]).strip() + "\n",
            f"\n{rule}\n# {step.name}\n{rule}\n",
            without(step_text, docstring_node(step_tree) + future[1] + imports).strip() + "\n",
        ]
    )
    try:
        compile(text, step.name, "exec")
    except SyntaxError as error:
        stop(f"{step}: cannot be put into one file with {common.name} ({error})")
    return text


def kernel_slug(step) -> str:
    """Name of a step's kernel, e.g. patrec-lab3-step05-lstm."""
    return re.sub(r"[^a-z0-9]+", "-", f"patrec-lab3-{step.stem}".lower()).strip("-")[:50].strip("-")


def needs_gpu(step, earlier) -> bool:
    """Does the step train? Steps 6 and 11 only where earlier kernels give no checkpoints."""
    text, _ = parse(step)
    return "training=True" in text or ("genre_model" in text and not earlier)


def metadata(step, user, data_set, earlier, as_notebook=False) -> dict:
    """What kernel-metadata.json holds; earlier are kernels as owner/slug."""
    gpu = needs_gpu(step, earlier)
    slug = kernel_slug(step)
    return {
        "id": f"{user}/{slug}",
        "title": slug.replace("-", " ").capitalize(),  # Kaggle turns the title back into the slug
        "code_file": f"{step.stem}.ipynb" if as_notebook else step.name,
        "language": "python",
        "kernel_type": "notebook" if as_notebook else "script",
        "is_private": True,  # the course forbids publishing solutions
        "enable_gpu": gpu,
        # The default may be a P100, too old for the installed torch.
        "machine_shape": "NvidiaTeslaT4" if gpu else "",
        "enable_tpu": False,
        "enable_internet": False,
        "dataset_sources": [data_set],
        "competition_sources": [],
        "kernel_sources": list(earlier),
        "model_sources": [],
    }


def earlier_kernel(name, user) -> str:
    """'5', 'slug' or 'owner/slug' -> owner/slug."""
    if re.fullmatch(r"(?:step)?\d{1,2}(_\w+)?(\.py)?", name):
        name = kernel_slug(find_step(name))
    name = name if "/" in name else f"{user}/{name}"
    if not re.fullmatch(f"{OWNER}/{SLUG}", name):
        stop(
            f"--earlier {name}: expected a step's number, or owner/kernel-slug "
            "as in the kernel's address"
        )
    return name


def notebook(step, common=HERE / "common.py") -> dict:
    """Return the step as a notebook (nbformat 4): common's text in one cell, then the step's.

    A cell of the script begins at a line `# %%`; that line becomes a heading and the
    comment under it Markdown.
    """
    bundle(step, common)  # what cannot be one file cannot be one notebook either
    common_text, common_tree = parse(common)
    step_text, step_tree = parse(step)
    imports = imports_of_common(step, step_tree)
    body = without(step_text, docstring_node(step_tree) + imports)
    about = f"# {ast.get_docstring(step_tree) or step.stem}"
    shared = f"*{common.name}*, which all steps share. Run this cell first."
    cells = [cell("markdown", about), cell("markdown", shared), cell("code", common_text)]
    for part in re.split(r"^# %%", body, flags=re.MULTILINE):
        title, _, rest = part.partition("\n")
        lines = rest.splitlines()
        n_comment = next(
            (i for i, line in enumerate(lines) if not line.startswith("#")), len(lines)
        )
        comment = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:n_comment])
        if text := "\n\n".join(t for t in (title.strip() and f"## {title.strip()}", comment) if t):
            cells.append(cell("markdown", text))
        if code := "\n".join(lines[n_comment:]).strip():
            cells.append(cell("code", code))
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": [{"id": f"cell-{number}"} | made for number, made in enumerate(cells)],
        "metadata": {"kernelspec": kernelspec, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def cell(kind, source) -> dict:
    """One cell of a notebook."""
    more = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source} | more


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("step", nargs="?", help="5, 05, step05 or the file's name")
    add("--all", action="store_true", help="all steps, each with the kernels it builds on")
    add("--notebook", action="store_true", help="a notebook kernel instead of a script kernel")
    add("--user", default=NO_USER, help="your name on Kaggle, as in kaggle.com/NAME")
    attached = "data set to attach (default: %(default)s)"
    add("--dataset", default=DATA_SET, metavar="OWNER/SLUG", help=attached)
    outputs = "kernels whose outputs to attach: a step's number or owner/slug"
    add("--earlier", nargs="+", default=[], metavar="KERNEL", help=outputs)
    where = "where the folders go (default: %(default)s)"
    add("--out", type=Path, default=Path("kernels"), help=where)
    args = parser.parse_args(argv)
    if args.all == bool(args.step):
        stop("name one step, e.g. 5, or give --all")
    if args.all and args.earlier:
        stop("--all attaches the earlier kernels by itself; give --earlier with one step")
    if not re.fullmatch(OWNER, args.user):
        stop(f"--user {args.user!r}: expected the name in kaggle.com/NAME, no spaces or slashes")
    if not re.fullmatch(f"{OWNER}/{OWNER}(/[0-9]+)?", args.dataset):
        stop(f"--dataset {args.dataset!r}: expected owner/slug, e.g. {DATA_SET}")

    steps = sorted(HERE.glob("step[0-9][0-9]_*.py")) if args.all else [find_step(args.step)]
    kernels = []
    for step in steps:  # everything is made before anything is written
        names = args.earlier
        if args.all:
            numbers = EARLIER.get(step.name[4:6], ())
            names = [number for number in numbers if list(HERE.glob(f"step{number}_*.py"))]
        earlier = [earlier_kernel(name, args.user) for name in names]
        text = json.dumps(notebook(step), indent=1) + "\n" if args.notebook else bundle(step)
        facts = metadata(step, args.user, args.dataset, earlier, args.notebook)
        kernels.append((step, text, facts))
    for step, text, facts in kernels:
        folder = args.out / kernel_slug(step)
        cure = "choose another --out"
        write(folder / facts["code_file"], text.encode(), cure)
        settings = json.dumps(facts, indent=2) + "\n"
        write(folder / "kernel-metadata.json", settings.encode(), cure)
        sources = " and ".join(facts["kernel_sources"])
        device = "GPU T4" if facts["enable_gpu"] else "CPU"
        after = f", after {sources}" if sources else ""
        print(f"{folder}: {device}{after}; kaggle kernels push -p {folder}")
    if args.user == NO_USER:
        print(
            f"The id says {NO_USER!r}: give --user, or put your Kaggle name into "
            "kernel-metadata.json, before you push."
        )
    return [facts for _, _, facts in kernels]


if __name__ == "__main__":
    main()
