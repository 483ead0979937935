"""Passes over the joint graph of forward and backward, before it is split: what need not be saved twice, or at all.

share_copies       slice(x), clone(slice(x)), x[:, index], … of one source     ──▶ one node, saved once
fuse_gradients     g₁ᵀ x, g₂ᵀ x of trained rows of q, k, v or gate, up          ──▶ [g₁ g₂]ᵀ x, split: x is read once
recompute_cheap    silu(gate) · up, the norm's x · rsqrt, casts, slices         ──▶ marked: computed again, never saved
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import Argument

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
        aten.alias.default,
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
        aten.reciprocal.default,
        aten.erf.default,
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

#: Norms as one operation with several results: one pass over an input that the backward needs anyway.
NORMS = frozenset({aten.native_layer_norm.default})

#: A result this many times smaller than what it is reduced from (a mean, a variance) may be saved in place of what follows from it.
SMALL = 8


def share_copies(graph: fx.Graph) -> int:
    """Replace repeated copies by the first; returns how many went. Reductions and products are left to the compiler."""
    seen: dict[Hashable, fx.Node] = {}
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


def fuse_gradients(graph: fx.Graph) -> int:
    """Join products `gᵀ x` of several gradients with one input into one, and split its rows; returns how many products went.

    Only products that nothing but casts and the outputs of the graph read, and whose gradients together are no wider than
    `x`, which they save reading again: gradients of trained rows, or of low-rank factors, in linears that share an input.
    """
    groups: dict[Hashable, list[tuple[fx.Node, fx.Node]]] = {}
    for node in graph.nodes:
        found = product_of_rows(node)
        if found is not None and leads_to_outputs(node):
            key, gradient = found
            groups.setdefault(key, []).append((node, gradient))
    gone = 0
    for members in groups.values():
        rows = [width(gradient) for _, gradient in members]
        if len(members) > 1 and all(rows) and sum(rows) <= width(input_of(members[0][0])):
            join_products(graph, members, rows)
            gone += len(members) - 1
    if gone:
        sort_stably(graph)
    return gone


def product_of_rows(node: fx.Node) -> tuple[Hashable, fx.Node] | None:
    """`(key, g)` of a product `gᵀ x` with g (T, s); products with equal keys share kind, x and the type of g."""
    if node.op != "call_function":
        return None
    if node.target is aten.mm.default:
        left, x = node.args
        if not isinstance(left, fx.Node) or not is_transposition(left):
            return None
        gradient = left.args[0]
    elif node.target is torch.ops.sparsify.channel_grad.default and node.args[2] is None:
        gradient, x, _ = node.args
    elif is_factor_product(node):
        x, _, gradient = node.args[0].args  # type: ignore[union-attr]
    else:
        return None
    if not isinstance(gradient, fx.Node) or not isinstance(gradient.meta.get("val"), torch.Tensor):
        return None
    value = gradient.meta["val"]
    return ((node.target, x, value.dtype), gradient) if value.dim() == 2 else None


def is_factor_product(node: fx.Node) -> bool:
    """Whether a node is the second result of `skinny_products(x, None, factor)`, which is `factorᵀ x`."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return False
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and source.target is torch.ops.sparsify.skinny_products.default
        and source.args[1] is None
    )


def is_transposition(node: fx.Node) -> bool:
    """Whether a node swaps the two axes of a matrix."""
    if node.target is aten.transpose.int:
        return {int(d) % 2 for d in node.args[1:]} == {0, 1}  # type: ignore[arg-type]
    return node.target is aten.t.default or (node.target is aten.permute.default and list(node.args[1]) == [1, 0])  # type: ignore[arg-type]


def leads_to_outputs(node: fx.Node) -> bool:
    """Whether only casts and multiplications by numbers stand between a node and the outputs of the graph."""
    return bool(node.users) and all(
        user.op == "output" or (user.target in CHEAP and len(user.all_input_nodes) == 1 and leads_to_outputs(user))
        for user in node.users
    )


def width(node: fx.Node) -> int:
    """Columns of a matrix (T, s); 0 where they are not known as a number."""
    columns = node.meta["val"].shape[1]
    return columns if isinstance(columns, int) else 0


def input_of(product: fx.Node) -> fx.Node:
    """`x` of a product `gᵀ x`."""
    x = product.args[0].args[0] if product.target is operator.getitem else product.args[1]  # type: ignore[union-attr]
    assert isinstance(x, fx.Node)
    return x


def join_products(graph: fx.Graph, members: list[tuple[fx.Node, fx.Node]], rows: list[int]) -> None:
    last, _ = members[-1]
    x = input_of(last)

    def call(target: Callable[..., object], *args: Argument) -> fx.Node:
        node = graph.call_function(target, args)
        with enable_python_dispatcher():
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    with graph.inserting_before(last):
        joined = call(aten.cat.default, [gradient for _, gradient in members], 1)
        if last.target is aten.mm.default:
            whole = call(aten.mm.default, call(aten.t.default, joined), x)
        elif last.target is operator.getitem:
            whole = call(operator.getitem, call(torch.ops.sparsify.skinny_products.default, x, None, joined), 1)
        else:
            whole = call(torch.ops.sparsify.channel_grad.default, joined, x, None)
        start = 0
        for (node, _), count in zip(members, rows, strict=True):
            part = call(aten.slice.Tensor, whole, 0, start, start + count)
            part.meta = {**node.meta, "val": part.meta["val"]}
            node.replace_all_uses_with(part)
            start += count
    for node, _ in members:
        graph.erase_node(node)


def sort_stably(graph: fx.Graph) -> None:
    """Put every node behind its inputs, and change the order no more than that."""
    placed: set[fx.Node] = set()
    waiting: dict[fx.Node, list[fx.Node]] = {}
    pending = list(reversed(list(graph.nodes)))
    last: fx.Node | None = None
    while pending:
        node = pending.pop()
        missing = next((n for n in node.all_input_nodes if n not in placed), None)
        if missing is not None:
            waiting.setdefault(missing, []).append(node)
            continue
        if last is not None:
            last.append(node)
        placed.add(node)
        last = node
        pending += reversed(waiting.pop(node, []))


def freeze(value: object) -> Hashable:
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
    that the backward reads and that are not cheap (the outputs of matrix products, the residual stream), or that are small (a
    norm's mean). What follows from one product alone (the parts of a GELU that is written out) has that product saved in
    its place, once.
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
    place = {node: i for i, node in enumerate(graph.nodes)}
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
        elif late and (root := only_source(node, place)) is not None:
            alive.add(root)
            cone = chain_from(node, root)
            again |= cone
            marked |= cone
        elif late or is_reduction(node):
            alive.add(node)
    for node in marked:
        node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
        node.meta.setdefault("ac_graph_id", 0)
    return len(marked)


def is_cheap(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is operator.getitem:
        return node.all_input_nodes[0].target in NORMS
    return node.op == "call_function" and (node.target in CHEAP or node.target in NORMS)


def is_reduction(node: fx.Node) -> bool:
    """Whether a result is so much smaller than what it is computed from that saving it costs next to nothing."""
    sources = node.all_input_nodes
    if node.op == "call_function" and node.target is operator.getitem:
        sources = sources[0].all_input_nodes
    count = elements(node)
    return count > 0 and SMALL * count <= max((elements(n) for n in sources), default=0)


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


def only_source(node: fx.Node, place: dict[fx.Node, int]) -> fx.Node | None:
    """The furthest result, not larger than the node, that a cheap node follows from alone; small ones are not counted.

    Everything on the way is cheap; the result itself is a product, or a sum of others (the residual stream). place: positions in
    the graph.
    """
    size = elements(node)
    if not is_cheap(node) or not size:
        return None
    frontier, found = {node}, None
    while True:
        latest = max(frontier, key=place.__getitem__)
        if not is_cheap(latest):
            break
        frontier.remove(latest)
        sources = latest.all_input_nodes
        if any(not elements(n) and n.target not in NORMS for n in sources):
            break
        frontier.update(n for n in sources if SMALL * elements(n) > size or n.target in NORMS)
        if not frontier:
            break
        only = next(iter(frontier))
        if len(frontier) == 1 and not is_source(only) and 0 < elements(only) <= size:
            found = only
    return found


def chain_from(node: fx.Node, root: fx.Node) -> set[fx.Node]:
    """`node` and the cheap nodes between it and `root`."""
    chain, pending = {node}, [node]
    while pending:
        fresh = [n for n in pending.pop().all_input_nodes if n is not root and is_cheap(n) and n not in chain]
        chain.update(fresh)
        pending += fresh
    return chain


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
    """Elements of a node's value, of the example's where shapes are dynamic; 0 where they are not known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    count = value.numel()
    if isinstance(count, torch.SymInt):
        count = getattr(count.node, "hint", None)
    return count if isinstance(count, int) else 0
