"""Norms in a graph: whole operators, and what models write out.

x · rsqrt(mean(x², −1) + eps) · w          ──▶ a root mean square norm with its weight (w + 1 too)
aten.rms_norm, aten.layer_norm             ──▶ the same, and centred
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sparsify.lowering.cpu.native.layout import SAME
from sparsify.lowering.cpu.native.walk import same
from sparsify.ops.schema import arguments
from sparsify.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class NormMatch:
    """What is normed over its last axis. weight, bias: nodes of parameters, or None; plus_one: the factor is 1 + weight."""

    x: fx.Node
    eps: float
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    centred: bool = False
    plus_one: bool = False


def match_norm(node: fx.Node, program: Program) -> NormMatch | None:
    """The norm that ends at a node."""
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        given = arguments(node)
        if len(given["normalized_shape"]) != 1:
            return None
        eps = given.get("eps")
        centred = node.target is aten.layer_norm.default
        eps = float(torch.finfo(torch.float32).eps) if eps is None else float(eps)
        return NormMatch(given["input"], eps, given.get("weight"), given.get("bias"), centred)
    if node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    names = program.tensor_names
    for weight, rest in (node.args, node.args[::-1]):
        assert isinstance(weight, fx.Node)
        assert isinstance(rest, fx.Node)
        found, plus = parameter(weight, names), False
        if found is None:
            one = same(weight)
            if one.target is aten.add.Tensor and one.args[1] in (1, 1.0):
                found, plus = parameter(one.args[0], names), True  # type: ignore[arg-type]
        bare = root_mean_square(same(rest))
        if found is not None and bare is not None:
            return NormMatch(*bare, weight=found, plus_one=plus)
    bare = root_mean_square(node)
    return None if bare is None or weighted(node, names) else NormMatch(*bare)


def root_mean_square(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) of x · rsqrt(mean(x²) + eps)."""
    if node.target is not aten.mul.Tensor or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for x, scale in (node.args, node.args[::-1]):
        root = same(scale)  # type: ignore[arg-type]
        if root.target is not aten.rsqrt.default:
            continue
        plus = same(root.args[0])  # type: ignore[arg-type]
        if plus.target is not aten.add.Tensor or not isinstance(plus.args[1], int | float):
            continue
        mean = same(plus.args[0])  # type: ignore[arg-type]
        if mean.target is not aten.mean.dim or list(mean.args[1]) != [-1] or not (len(mean.args) > 2 and mean.args[2]):  # type: ignore[arg-type]
            continue
        square = same(mean.args[0])  # type: ignore[arg-type]
        squared = square.args[0] if square.target is aten.pow.Tensor_Scalar and square.args[1] in (2, 2.0) else None
        if isinstance(squared, fx.Node) and isinstance(x, fx.Node) and same(squared) is same(x):
            return x, float(plus.args[1])
    return None


def weighted(node: fx.Node, names: dict[str, str]) -> bool:
    """Whether the one reader of a bare norm multiplies it by a weight, and so is the norm."""
    for user in node.users:
        if user.target in SAME and weighted(user, names):
            return True
        if user.target is aten.mul.Tensor and any(
            isinstance(a, fx.Node) and parameter(a, names) is not None for a in user.args
        ):
            return True
    return False


def parameter(node: fx.Node, names: dict[str, str]) -> fx.Node | None:
    """The placeholder of a vector that a node is, unchanged."""
    node = same(node)
    return node if node.op == "placeholder" and node.name in names and node.meta["val"].dim() == 1 else None


__all__ = ["NormMatch", "match_norm"]
