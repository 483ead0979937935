"""Linears in a lowered graph: packed ones, blocked ones, and dense ones in whichever way they are written.

sparsify.packed_linear(x, masks, …)     ──▶ the host's module that holds the masks
aten.linear, aten.addmm, aten.mm        ──▶ the host's module that holds the weight
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sparsify.model.linears import is_plain_linear
from sparsify.modules.kernel_module import KernelModule
from sparsify.ops.schema import arguments
from sparsify.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearMatch:
    """x (…, inputs) → (…, outputs) by the host's module `name`."""

    x: fx.Node
    name: str
    inputs: int
    outputs: int


def match_linear(node: fx.Node, program: Program) -> LinearMatch | None:
    """The linear that a node is."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    given, name, x = None, None, None
    names = program.tensor_names
    operator = node.target._schema.name
    if operator == "sparsify::packed_linear":
        given = arguments(node)
        if given.get("residual") is not None:
            return None
        name = names.get(given["masks"].name)
        x = given["x"]
    elif operator == "sparsify::prepacked_linear":
        given = arguments(node)
        handle, x = given["handle"], given["x"]
        modules = program.host.named_modules()
        found = next((path for path, module in modules if getattr(module, "handle", None) == handle), None)
        name = None if found is None else f"{found}.weight"
    elif node.target in (aten.linear.default, aten.addmm.default, aten.mm.default):
        given = arguments(node)
        x = given["input"] if node.target is aten.linear.default else given.get("mat1", given.get("self"))
        if node.target is aten.mm.default:
            x = given["self"]
        weight = given["weight"] if node.target is aten.linear.default else given["mat2"]
        name = plain_name(program, names.get(weight.name)) if isinstance(weight, fx.Node) else None
    if given is None or name is None or not isinstance(x, fx.Node):
        return None
    sizes = x.meta["val"].shape[-1], node.meta["val"].shape[-1]
    return LinearMatch(x, name.rpartition(".")[0], int(sizes[0]), int(sizes[1]))


def plain_name(program: Program, name: str | None) -> str | None:
    """Of the names of a weight that has several (a tied head), the one by which a linear holds it."""
    if name is None:
        return None
    for one in (name, *program.names_of(name)):
        module = program.host.get_submodule(one.rpartition(".")[0])
        if is_plain_linear(module) or isinstance(module, KernelModule):
            return one
    return name


__all__ = ["LinearMatch", "match_linear"]
