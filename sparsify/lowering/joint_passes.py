"""Passes over the joint graph of forward and backward, before it is split: what need not be saved twice, or at all.

share_copies       slice(x), clone(slice(x)), x[:, index], … of one source     ──▶ one node, saved once
recompute_cheap    silu(gate) · up, the norm's x · rsqrt, casts, slices         ──▶ marked: computed again, never saved
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Pure operations that move or pick data: two of them on the same operands are one.
COPIES = frozenset(
    {
        aten.slice.Tensor,
        aten.select.int,
        aten.index_select.default,
        aten.clone.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.squeeze.dim,
        aten.detach.default,
        aten._to_copy.default,
    }
)

#: Element-wise operations that cost less to repeat than to load, fused or not.
CHEAP = COPIES | frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.neg.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.tanh.default,
        aten.exp.default,
        aten.pow.Tensor_Scalar,
        aten.rsqrt.default,
    }
)


def share_copies(graph: fx.Graph) -> int:
    """Replace repeated copies by the first; returns how many went. Reductions and products are left to the compiler."""
    seen: dict[Any, fx.Node] = {}
    gone = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in COPIES:
            continue
        key = (node.target, freeze(node.args), freeze(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            gone += 1
    return gone


def freeze(value: Any) -> Any:
    """Arguments as something hashable; numbers of different types stay apart."""
    if isinstance(value, list | tuple):
        return tuple(freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, freeze(v)) for k, v in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), value)


def forward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that do not depend on a tangent: what the forward could compute."""
    tangents = {n for n in graph.nodes if n.op == "placeholder" and "tangents" in str(n.target)}
    later = set(tangents)
    for node in graph.nodes:
        if any(source in later for source in node.all_input_nodes):
            later.add(node)
    return {n for n in graph.nodes if n not in later}


def recompute_cheap(graph: fx.Graph) -> int:
    """Mark cheap forward nodes that the backward reads, and what leads to them, to be computed again instead of saved.

    A node qualifies when it follows by cheap operations from what is alive in the backward anyway: parameters, inputs, and results
    that the backward reads and that are not cheap (the outputs of matrix products, the residual stream, a norm's mean).
    Copies that only make something larger (the repeated heads of grouped queries) qualify whatever they come from: the
    smaller source is saved in their place. Returns how many nodes were marked.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    early = forward_nodes(graph)
    if len(early) == len(graph.nodes):
        return 0  # no backward
    marked: set[fx.Node] = set()
    alive: set[fx.Node] = set()  # saved, or never gone
    again: set[fx.Node] = set()  # follows from what is alive
    for node in graph.nodes:
        if node not in early or node.op == "output":
            continue
        late = any(user not in early for user in node.users if user.op != "output")
        grown = enlarged_chain(node) if late else []
        if is_source(node):
            alive.add(node)
        elif is_cheap(node) and all(n in alive or n in again for n in node.all_input_nodes):
            again.add(node)
            if late:
                marked |= cheap_cone(node, again)
        elif grown:
            marked.update(grown)
        elif late:
            alive.add(node)
    for node in marked:
        node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
        node.meta.setdefault("ac_graph_id", 0)
    return len(marked)


def is_cheap(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in CHEAP


def is_source(node: fx.Node) -> bool:
    """A parameter, buffer or input: alive in the backward without being saved."""
    return node.op in ("placeholder", "get_attr")


def cheap_cone(node: fx.Node, again: set[fx.Node]) -> set[fx.Node]:
    """`node` and all it is computed from, as far as that can be computed again."""
    cone: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in again and current not in cone:
            cone.add(current)
            pending += current.all_input_nodes
    return cone


def enlarged_chain(node: fx.Node) -> list[fx.Node]:
    """The copies between a node and the smaller tensor that it repeats; empty where nothing is repeated."""
    chain: list[fx.Node] = []
    while node.op == "call_function" and node.target in COPIES and len(node.all_input_nodes) == 1:
        chain.append(node)
        node = node.all_input_nodes[0]
        if is_source(node):
            return []
        if elements(node) and 2 * elements(node) <= elements(chain[0]):
            return chain
    return []


def elements(node: fx.Node) -> int:
    """Elements of a node's value; 0 where they are not known as a number."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    count = value.numel()
    return count if isinstance(count, int) else 0
