"""What of a graph depends on no token's value: masks, positions, angles; computed once on the example and read for what they mean.

causal mask      ──▶ a token sees all before it (window 0), or the last `window`
angles (1, 7, 8) ──▶ frequencies, if row t is t times row 1
positions        ──▶ an offset, if they are 0, 1, 2, … plus a constant
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from sparsify.lowering.cpu.native.layout import Unknown
from sparsify.program import Program

aten = torch.ops.aten
#: comparisons of places, and what may stand around them in a mask
COMPARE = {aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor}
SHIFT = {aten.sub.Tensor, aten.add.Tensor}
AROUND = {
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor,
    aten.diff.default,
    aten.ne.Scalar, aten.cumsum.default, aten.index.Tensor, aten.eq.Tensor, aten.to.dtype_layout, aten.to.dtype, aten.to.device,
    aten.__and__.Tensor, aten.__or__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.new_ones.default, aten.ones.default,
    aten.view.default, aten.reshape.default, aten.alias.default, aten.contiguous.default, aten.clone.default, aten.squeeze.dim,
    aten._assert_tensor_metadata.default, aten.ones_like.default, aten.select.int, aten.tril.default, aten._to_copy.default,
    aten.where.self, aten.scalar_tensor.default, aten.full.default, aten.full_like.default, aten.bitwise_not.default,
    aten.logical_not.default, operator.getitem,
}  # fmt: skip


class Tables:
    """Values of nodes that read no token. live: nodes that do."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names = program.tensor_names
        self.values: dict[fx.Node, Any] = {}
        self.user = user_inputs(program)
        self.live = live_nodes(program)
        self.numbers: dict[str, torch.Tensor] = {}  # tensors of the host that were read

    def value(self, node: fx.Node) -> Any:
        """What a node is on the example, with masks of ones and positions 0, 1, 2, …"""
        if node in self.live:
            raise Unknown(f"{node.target} of values that depend on tokens")
        if node not in self.values:
            self.values[node] = self.compute(node)
        return self.values[node]

    def compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if node.name not in self.names:
                return self.user[node.name]
            name = self.names[node.name]
            found = self.program.value(name).detach()
            owner, _, leaf = name.rpartition(".")
            if hasattr(self.program.host.get_submodule(owner), leaf):
                self.numbers[name] = found.clone()
            return found
        if node.op != "call_function":
            raise Unknown(f"a node of kind {node.op}")
        args, kwargs = map_arg((node.args, dict(node.kwargs)), self.value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def frequencies(self, node: fx.Node, length: int) -> tuple[torch.Tensor, tuple[float, ...]]:
        """(angles (…, length, n) of the example, frequencies (n,)). Raises Unknown unless every row is its place times the frequencies."""
        angles = self.value(node)
        rows = angles.reshape(-1, length, angles.shape[-1])
        expected = torch.arange(length, dtype=torch.float32)[:, None] * rows[0, 1]
        if angles.dtype != torch.float32 or not torch.allclose(rows, expected.expand_as(rows), rtol=2e-7, atol=0):
            raise Unknown("angles that are not proportional to the position")
        return angles, tuple(rows[0, 1].tolist())

    def position_offset(self, node: fx.Node, length: int) -> int:
        """What is added to positions 0, 1, 2, …. Raises Unknown for anything else."""
        found = self.value(node)
        rows = found.reshape(-1, length)
        if found.is_floating_point() or bool((rows - torch.arange(length) != rows[0, 0]).any()):
            raise Unknown("an embedding of something that is neither a token nor its position")
        return int(rows[0, 0])

    def window(self, mask: fx.Node | None, is_causal: bool, length: int) -> int:
        """How many tokens back a token sees by a mask, itself included; 0: all. Raises Unknown for anything but these two."""
        if mask is None:
            if not is_causal:
                raise Unknown("attention without a causal mask")
            return 0
        found = self.value(mask)
        found = found if found.dtype == torch.bool else found == 0
        shifts, inside = set(), ancestors(mask)
        for node in inside:
            if node.op == "call_function" and node.target not in COMPARE | SHIFT | AROUND:
                raise Unknown(f"a mask that is made with {node.target}")
            if node.target in COMPARE:
                shifts.add(self.lowest(node))
        shifts -= {0}
        if len(shifts) > 1:
            raise Unknown("a mask with several windows")
        window = shifts.pop() if shifts else 0
        place = torch.arange(length)
        seen = (place[None] <= place[:, None]) & ((place[:, None] - place[None] < window) | (window == 0))
        if found.shape[-2:] != (length, length) or bool((found != seen).any()):
            raise Unknown("a mask that is neither causal nor a window of the last tokens")
        return window

    def lowest(self, node: fx.Node) -> int:
        """The window w of a comparison `place > other − w`, 0 of one that shifts nothing. Raises Unknown for any other."""
        left, right = (self.shift(x) if isinstance(x, fx.Node) else 0 for x in node.args)
        if not left and not right:
            return 0
        if node.target is aten.gt.Tensor and not left and right < 0:
            return -right
        if node.target is aten.lt.Tensor and not right and left < 0:
            return -left
        raise Unknown("a mask that is neither causal nor a window of the last tokens")

    def shift(self, node: fx.Node) -> int:
        """The constant that a compared place was shifted by."""
        while node.op == "call_function" and node.target in AROUND and node.args and isinstance(node.args[0], fx.Node):
            if node.target in (aten.index.Tensor, aten.cumsum.default):
                break
            node = node.args[0]
        if node.target in SHIFT and not isinstance(node.args[1], fx.Node):
            return int(node.args[1]) * (-1 if node.target is aten.sub.Tensor else 1)  # type: ignore[arg-type]
        return 0


def ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += one.all_input_nodes
    return found


def user_inputs(program: Program) -> dict[str, Any]:
    """Input name → its value on the example; masks full, positions in order."""
    args, kwargs = program.example
    flat, _ = pytree.tree_flatten((args, kwargs))
    names = [i.name for i in program.inputs if i.target is None]
    found = dict(zip(names, flat, strict=True))
    for name, value in found.items():
        if isinstance(value, torch.Tensor) and "attention_mask" in name:
            found[name] = torch.ones_like(value)
        elif isinstance(value, torch.Tensor) and "position" in name:
            found[name] = torch.arange(value.shape[-1]).expand_as(value).clone()
    return found


def live_nodes(program: Program) -> set[fx.Node]:
    """Nodes that depend on the tokens' values."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in program.tensor_names and "input_ids" in node.name:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


__all__ = ["Tables"]
