"""Element-wise parts of a graph as one expression: `0.5 · x · (1 + tanh(…))`, `silu(gate) · up`, `x + y`.

A node is taken in as long as nobody else reads it; what others read too is a value of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sparsify.kernels.cpu.step.source import literal
from sparsify.lowering.cpu.native.layout import Unknown

if TYPE_CHECKING:
    from torch import fx

aten = torch.ops.aten
UNARY: dict[object, str] = {
    aten.silu.default: "silu({})", aten.sigmoid.default: "sigmoid({})", aten.tanh.default: "tanh_approx({})",
    aten.relu.default: "relu({})", aten.neg.default: "(-{})", aten.exp.default: "exp_approx({})", aten.square.default: "({0} * {0})",
}  # fmt: skip
BINARY: dict[object, str] = {
    aten.add.Tensor: "({} + {})",
    aten.sub.Tensor: "({} - {})",
    aten.mul.Tensor: "({} * {})",
    aten.div.Tensor: "({} / {})",
}
POINTWISE = {*UNARY, *BINARY, aten.gelu.default, aten.pow.Tensor_Scalar}


def expression(node: fx.Node, operand: Callable[[fx.Node], str]) -> str:
    """C++ of one element-wise node. operand: text of what stands for one of its inputs. Raises Unknown."""
    target = node.target
    if target in UNARY:
        return UNARY[target].format(operand(node.args[0]))  # type: ignore[arg-type]
    if target is aten.gelu.default:
        name = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
        return f"{name}({operand(node.args[0])})"  # type: ignore[arg-type]
    if target is aten.pow.Tensor_Scalar:
        power = node.args[1]
        if power not in (2, 3, 2.0, 3.0):
            raise Unknown(f"a power of {power}")
        x = operand(node.args[0])  # type: ignore[arg-type]
        return "(" + " * ".join([x] * int(power)) + ")"  # type: ignore[arg-type]
    if target in BINARY and node.kwargs.get("alpha", 1) == 1:
        return BINARY[target].format(*(operand(a) if not isinstance(a, int | float) else number(a) for a in node.args))  # type: ignore[arg-type]
    raise Unknown(f"{target}")


def number(value: float) -> str:
    if not math.isfinite(value):
        raise Unknown(f"a factor of {value}")
    return f"({literal(float(value))})"


__all__ = ["POINTWISE", "expression", "number"]
