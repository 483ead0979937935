"""The package of operators: one operator a file, all registered by its import, and kernels known to `dispatch` alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sparsify.ops

FILES = sorted(Path(sparsify.ops.__file__).parent.glob("*.py"))
GROUND = {"__init__", "adapter_tables", "added_parts", "bits", "checks", "dispatch", "saved_input", "schema", "shapes"}


def imported(text: str) -> Iterator[str]:
    """Every module that a source imports, at its top or inside a function, by statement or by name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["sparsify", "ops"][: 3 - node.level] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def knows_kernels(text: str) -> bool:
    return any(f"{name}.".startswith("sparsify.kernels.") for name in imported(text))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_dispatch_alone_imports_kernels(file: Path) -> None:
    assert knows_kernels(file.read_text(encoding="utf-8")) == (file.stem == "dispatch")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import sparsify.kernels", True),
        ("from sparsify import errors, kernels", True),
        ("from sparsify.kernels.gpu import launch", True),
        ("from ..kernels.cpu import skinny", True),
        ("from .. import kernels", True),
        ("def f():\n    if x:\n        from sparsify.kernels.cpu.skinny import skinny_serves", True),
        ("import importlib\nimportlib.import_module('sparsify.kernels.gpu.launch')", True),
        ("import sparsify.kernels_of_mine", False),
        ("from . import kernels", False),
        ("from sparsify.ops import dispatch", False),
        ("x = 'sparsify.kernels'", False),
    ],
)
def test_an_import_of_kernels_is_seen_wherever_it_stands(text: str, found: bool) -> None:
    assert knows_kernels(text) == found


def test_each_file_holds_its_operator_and_the_package_lists_them() -> None:
    defined = {f.stem for f in FILES if "LIBRARY.define(" in f.read_text(encoding="utf-8")}
    assert defined == {f.stem for f in FILES} - GROUND == set(sparsify.ops.__all__)
    for name in defined:
        assert hasattr(torch.ops.sparsify, name), name
        assert f"    {name} " in (sparsify.ops.__doc__ or ""), name
    for name in GROUND - {"__init__"}:
        assert f"{name}.py" in (sparsify.ops.__doc__ or ""), name
