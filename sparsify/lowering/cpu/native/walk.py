"""Steps through a graph: behind copies and views, to readers and tables."""

from __future__ import annotations

import torch
from torch import fx

from sparsify.lowering.cpu.native.layout import JOINS, SAME, VIEWS
from sparsify.lowering.cpu.native.tables import Tables

aten = torch.ops.aten


def same(node: fx.Node) -> fx.Node:
    """The node whose value this is, unchanged."""
    while node.op == "call_function" and node.target in SAME:
        node = node.all_input_nodes[0]
    return node


def through(node: fx.Node) -> fx.Node:
    """The same behind views."""
    while node.op == "call_function" and (node.target in SAME or node.target in VIEWS):
        node = node.all_input_nodes[0]
    return node


def readers(node: fx.Node) -> int:
    """How many nodes read a value, assertions and copies aside."""
    return sum(readers(user) if user.target in SAME else 1 for user in node.users if user.users or user.op == "output")


def behind(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node behind copies and views that keep every row, and whether nobody else reads any of them."""
    alone = readers(node) == 1
    while node.op == "call_function" and (
        node.target in SAME or node.target in (aten.view.default, aten.reshape.default)
    ):
        node = node.all_input_nodes[0]
        alone &= readers(node) == 1
    return node, alone


def reads_angles(node: fx.Node) -> bool:
    """Whether a table is made of cosines or sines."""
    waiting, seen = [node], set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.target in (aten.cos.default, aten.sin.default):
            return True
        waiting += one.all_input_nodes
    return False


def leads_to_rotation(node: fx.Node, tables: Tables) -> bool:
    """Whether −x goes, by moves alone, to a product with a table of angles."""
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user.target in VIEWS or user.target in JOINS or user.target in SAME:
            waiting += user.users
        elif user.target is aten.mul.Tensor and any(
            x not in tables.live and reads_angles(x) for x in user.all_input_nodes
        ):
            return True
    return False


__all__ = ["behind", "leads_to_rotation", "readers", "reads_angles", "same", "through"]
