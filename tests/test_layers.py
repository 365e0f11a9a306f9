"""Arrows point down only (steps, tools -> common -> patrec), and no room grows too large."""

import ast

import pytest
from conftest import ROOT

# Lowest first: a module of patrec imports only those before it.
PATREC = [
    "errors", "machine", "demo", "files", "features", "audio", "batches", "recipes", "labels",
    "clips", "splits", "measures", "scores", "baselines", "flags", "tables", "parallel", "plots",
    "explain", "step",
]  # fmt: skip
# Files of a room, the most lines of one, and what they may import of the project.
ROOMS = {
    "patrec/[a-z]*.py": (350, ("patrec.",)),
    "common.py": (1500, ("patrec.",)),
    "step*.py": (450, ("patrec.", "common.")),
    "tools/[a-z]*.py": (600, ("patrec.", "common.", "tools.")),
}
FILES = {path: room for pattern, room in ROOMS.items() for path in ROOT.glob(pattern)}


def imports(tree):
    """Names of all modules, and of what is imported from them, each with a dot at its end."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}." for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (f"{name.name}." for name in node.names)


def test_every_module_of_patrec_has_its_place():
    assert {f"{name}.py" for name in PATREC} == {p.name for p in ROOT.glob("patrec/[a-z]*.py")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_down_and_nothing_is_too_long(path):
    text, (most_lines, below) = path.read_text(), FILES[path]
    if path.parent.name == "patrec":
        below = tuple(f"patrec.{name}." for name in PATREC[: PATREC.index(path.stem)])
    tree, project = ast.parse(text), ("patrec.", "common.", "tools.", "step0", "step1")
    ours = [name for name in imports(tree) if name.startswith(project)]
    assert [name for name in ours if not name.startswith(below)] == []
    assert len(text.splitlines()) <= most_lines
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 80] == []
