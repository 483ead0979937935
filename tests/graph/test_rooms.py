"""The rooms of the package: each imports what stands below it, as CONTRIBUTING.md draws them."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsify

PACKAGE = Path(sparsify.__file__).parent
DRAWING = Path(__file__).parents[2] / "CONTRIBUTING.md"

#: function-level imports that go up, and why
ALLOWED = {
    "program.program → show.drawing": "users type `program.svg()`; a picture needs the methods, which stand above the program",
    "program.program → show.inspector": "users type `program.html()`, as `program.svg()`",
    "program.program → lowering.kernel_texts": "users type `program.kernels()`; sources are known where they are made",
    "modules.adapted → methods": "an unpickled host names a kind of module, which the import of its method makes known",
}


def floors(text: str) -> list[list[str]]:
    """Rooms by floor, the ground last: the words before the description, on every line of the drawing under "## Rooms"."""
    drawing = text.partition("## Rooms")[2].split("```")[1]
    lines = [line for line in drawing.splitlines() if line.strip()]
    return [[word for word in re.split(r" {2,}", line) if re.fullmatch(r"[a-z]+", word)] for line in lines]


FLOORS = floors(DRAWING.read_text(encoding="utf-8"))
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `sparsify.`; the package itself is called "sparsify"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "sparsify"] = path
    return found


MODULES = modules()


def imported(text: str, module: str = "") -> Iterator[str]:
    """Modules of the package that a source imports, wherever the statement stands but under TYPE_CHECKING, or by a call."""
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = ["sparsify", *module.split(".")][: -node.level] if node.level else []
            names = [".".join([*up, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            package, _, below = name.partition(".")
            if package == "sparsify":
                while below and below not in MODULES:
                    below = below.rpartition(".")[0]
                yield below or "sparsify"


def may_import(one: str, other: str) -> bool:
    """Whether a module may import another: inside its room, or of a floor below."""
    room, used = one.partition(".")[0], other.partition(".")[0]
    return room == used or FLOOR[used] > FLOOR[room]


def test_every_module_lies_in_a_room_of_the_drawing_and_every_room_has_one() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(FLOOR)
    assert sum(map(len, FLOORS)) == len(FLOOR)


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_a_room_imports_only_what_stands_below(room: str) -> None:
    wrong = []
    for name, path in MODULES.items():
        if name.partition(".")[0] == room:
            used = set(imported(path.read_text(encoding="utf-8"), name))
            wrong += [
                (name, other)
                for other in sorted(used)
                if not may_import(name, other) and f"{name} → {other}" not in ALLOWED
            ]
    assert not wrong


@pytest.mark.parametrize("exception", sorted(ALLOWED))
def test_an_exception_is_still_needed_and_waits_until_it_is_called(exception: str) -> None:
    one, _, other = exception.partition(" → ")
    text = MODULES[one].read_text(encoding="utf-8")
    assert other in imported(text, one)
    assert not may_import(one, other)
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            assert other not in imported(ast.unparse(node), one)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import sparsify.host.handle", ["host.handle"]),
        ("import sparsify.host.handle as h, torch", ["host.handle"]),
        ("from sparsify import host", ["host"]),
        ("from sparsify.host import handle", ["host.handle"]),
        ("from sparsify.host.handle import Handle", ["host.handle"]),
        ("def f():\n    if x:\n        from sparsify.show.report import Report", ["show.report"]),
        ("from ..host import handle", ["host.handle"]),
        ("from . import prune", ["passes.prune"]),
        ("import importlib\nimportlib.import_module('sparsify.methods')", ["methods"]),
        ("from sparsify import compile", ["sparsify"]),
        ("if TYPE_CHECKING:\n    from sparsify.host.handle import Handle", []),
        ("import sparsify_of_mine\nx = 'sparsify.host'", []),
    ],
)
def test_an_import_is_seen_wherever_it_stands(text: str, found: list[str]) -> None:
    assert list(imported(text, "passes.verify")) == found


def test_an_import_of_a_room_above_or_beside_is_refused() -> None:
    for above, below in itertools.pairwise(FLOORS):
        assert may_import(above[0], below[0])
        assert not may_import(below[0], above[0])
    for rooms in FLOORS:
        assert not any(may_import(a, b) for a in rooms for b in rooms if a != b)
