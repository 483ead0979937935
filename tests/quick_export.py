"""`torch.export.export` without what no test of a captured program reads: two fifths of its time.

It writes down a Python stack for every node, and generates and compiles Python code for the graph after every pass of its own.
Here nodes have no stacks, and code is generated for the graph that comes out, and on its first call for those in between.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import proxy

from sparsify.program.graph_editor import GraphEditor
from sparsify.program.program import Program


class NoStack:
    """In place of `CapturedTraceback`: there is none to summarise."""

    @classmethod
    def extract(cls, *_: Any, **__: Any) -> NoStack:
        return cls()

    def summary(self) -> None:
        return None


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


generate = torch.fx.GraphModule.recompile
export = torch.export.export


def generate_when_called(module: torch.fx.GraphModule) -> None:
    """`GraphModule.recompile` for a module that will hardly be called, pickled or asked for its code."""
    own: Any = type(module)  # every GraphModule has a class of its own

    def generated(self: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for name in ("__reduce__", "code"):
            if name in vars(own):
                delattr(own, name)
        generate(self)
        return self

    def forward(self: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        return generated(self).forward(*args, **kwargs)

    tree = getattr(module.graph._codegen, "pytree_info", None)
    if tree is not None:
        module._in_spec, module._out_spec = tree.in_spec, tree.out_spec
    own.forward = forward
    own.__reduce__ = lambda self: generated(self).__reduce__()
    own.code = property(lambda self: generated(self).code)


def without_code(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that builds a program's graph module: its code is generated when somebody calls it, which few tests do."""

    @functools.wraps(method)
    def quick(*args: Any, **kwargs: Any) -> Any:
        with replaced(torch.fx.GraphModule, "recompile", generate_when_called):
            return method(*args, **kwargs)

    return quick


def install() -> None:
    """In this process, programs have code when they are called: a fifth of what compiling a small model takes."""
    Program.from_export = classmethod(without_code(Program.from_export.__func__))  # type: ignore[method-assign,assignment]
    GraphEditor.finish = without_code(GraphEditor.finish)  # type: ignore[method-assign]


def quick_export(*args: Any, **kwargs: Any) -> ExportedProgram:
    """`torch.export.export`."""
    with (
        replaced(torch.fx.GraphModule, "recompile", generate_when_called),
        replaced(proxy, "CapturedTraceback", NoStack),
    ):
        exported = export(*args, **kwargs)
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.recompile()
    return exported


def quickly(trace: Callable[..., ExportedProgram]) -> Callable[..., ExportedProgram]:
    """`trace` with every export in it a quick one; what it runs of a program in between finds its code."""

    @functools.wraps(trace)
    def quick(*args: Any, **kwargs: Any) -> ExportedProgram:
        with replaced(torch.export, "export", quick_export), replaced(proxy, "CapturedTraceback", NoStack):
            return trace(*args, **kwargs)

    return quick
