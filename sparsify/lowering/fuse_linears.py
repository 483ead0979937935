"""Find, in the graph, linears whose work one kernel can share; nothing here looks at a name.

    x ─▶ gate ─▶ act ─┐
    x ─▶ up ──────────┴▶ · ─▶ (down)                    act(gate x) · (up x) in one kernel    GatedProduct
    x ─▶ gate_up ─▶ halves ─▶ act(first) · second       the same, packed in one weight        GatedProduct, gate = up
    x ─▶ up ─▶ act ─▶                                   act(up x + b) in one kernel           FusedActivation

An activation is recognised by what it computes: the element-wise operations between two nodes are run on a grid of numbers
and compared with the activations that the kernels know. A module may only be rewritten if the graph shows everything that
happens inside it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.kernels.cpu.dispatch import ACTIVATIONS
from sparsify.kernels.cpu.operator import epilogue
from sparsify.program import LinearNode, Program

GRID = 64  # fewer numbers would not tell activations apart
CHECKS = ("_assert_tensor_metadata", "sym_constrain_range", "_assert_scalar")  # nodes that compute nothing


@dataclass(frozen=True, eq=False)
class GatedProduct:
    """act(gate x) · (up x) inside module `owner`, which does this and nothing else, but for `down` behind it (or "").

    gate and up are one name where one linear computes both, its first rows the gate.
    """

    owner: str
    gate: str
    up: str
    activation: str
    down: str
    product: fx.Node
    x: fx.Node  # as captured


@dataclass(frozen=True, eq=False)
class FusedActivation:
    """An activation behind a linear, computed by the module `module`, which does nothing else."""

    linear: str
    activation: str
    module: str
    source: fx.Node  # the linear's output, or the last view of it
    result: fx.Node  # what the activation makes of it


def module_of(parameter: str) -> str:
    """Qualified name of the module that owns a parameter."""
    return parameter.rpartition(".")[0]


def linears_read_once(program: Program) -> dict[str, LinearNode]:
    """Module name → its product, for weights that the graph reads in one place only."""
    found = list(program.linears())
    count = Counter(linear.weight for linear in found)
    return {module_of(n.weight): n for n in found if count[n.weight] == 1 and n.weight.endswith("weight")}


def find_gated_products(program: Program) -> list[GatedProduct]:
    """Products of an activated linear and a linear over the same input, where one module holds exactly that."""
    linears = linears_read_once(program)
    by_node = {linear.node: name for name, linear in linears.items()}
    inside = nodes_by_module(program.graph)
    found = []
    for name, linear in linears.items():
        chain, product = chain_to_product(linear.node)
        if product is None:
            continue
        others = [n for n in product.args if isinstance(n, fx.Node) and n is not chain[-1]]
        if len(others) != 1 or others[0] not in by_node or len(others[0].users) != 1:
            continue
        up = by_node[others[0]]
        if linears[up].x is not linear.x:
            continue
        activation = activation_of(linear.node, chain)
        if activation is None:
            continue
        body = {linear.node, others[0], *chain, product}
        last = past(product, is_identity)
        readers = [by_node[user] for user in last.users if user in by_node]
        down = readers[0] if len(last.users) == 1 and readers else ""
        found += [
            GatedProduct(owner, name, up, activation, reader, product, linear.x)
            for owner, reader in holders(inside, body, linears, name, up, down)
        ][:1]
    return found


def find_split_products(program: Program) -> list[GatedProduct]:
    """Products of the activated first half and the second half of one linear, where one module holds exactly that."""
    linears = linears_read_once(program)
    by_node = {linear.node: name for name, linear in linears.items()}
    inside = nodes_by_module(program.graph)
    found = []
    for name, linear in linears.items():
        halves = halves_of(linear.node)
        if halves is None:
            continue
        split, gate, up = halves
        chain, product = chain_to_product(gate)
        if product is None or users_of(up) != [product] or set(product.args) != {chain[-1], up}:
            continue
        activation = activation_of(gate, chain)
        if activation is None:
            continue
        last = past(product, is_identity)
        readers = [by_node[user] for user in last.users if user in by_node]
        down = readers[0] if len(last.users) == 1 and readers else ""
        body = {linear.node, split, gate, up, *chain, product}
        found += [
            GatedProduct(owner, name, name, activation, reader, product, linear.x)
            for owner, reader in holders(inside, body, linears, name, name, down)
        ][:1]
    return found


def halves_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(split, first half, second half) where `node` is only read by a split of its last axis into two equal parts."""
    aten = torch.ops.aten
    users = users_of(node)
    if len(users) != 1 or users[0].target not in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        return None
    split, values = users[0], users[0].meta.get("val")
    axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if not isinstance(values, list | tuple) or len(values) != 2 or values[0].shape != values[1].shape:
        return None
    parts = {user.args[1]: user for user in users_of(split) if user.target is operator.getitem}
    if axis not in (-1, values[0].dim() - 1) or set(parts) != {0, 1} or len(users_of(split)) != 2:
        return None
    return split, parts[0], parts[1]


def holders(
    inside: dict[str, set[fx.Node]], body: set[fx.Node], linears: dict[str, LinearNode], gate: str, up: str, down: str
) -> list[tuple[str, str]]:
    """(module, down or "") of modules whose operations are `body`, or `body` and the linear `down`."""
    owner = gate.rpartition(".")[0]
    if not owner or up.rpartition(".")[0] != owner:
        return []
    operations = {node for node in inside.get(owner, set()) if not is_identity(node)}
    if operations == body:
        return [(owner, "")]
    if down and down.rpartition(".")[0] == owner and operations == body | {linears[down].node}:
        return [(owner, down)]
    return []


def find_activations(program: Program) -> list[FusedActivation]:
    """Activations that follow a linear and are the whole work of a module of their own."""
    inside = nodes_by_module(program.graph)
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    found = []
    for name, linear in linears_read_once(program).items():
        source = past(linear.node, is_view)
        users = users_of(source)
        for module in modules_of(users[0])[::-1] if users else []:
            nodes = sorted(inside.get(module, set()), key=place.__getitem__)
            if source in nodes or not set(users) <= set(nodes) or not is_elementwise_chain(source, nodes):
                continue
            activation = activation_of(source, nodes)
            if activation is not None:
                found.append(FusedActivation(name, activation, module, source, nodes[-1]))
                break
    return found


def past(node: fx.Node, passes: Callable[[fx.Node], bool]) -> fx.Node:
    """The last of the nodes behind `node` that only it feeds, one after the other, and for which `passes` holds."""
    while len(users := users_of(node)) == 1 and passes(users[0]):
        node = users[0]
    return node


def is_view(node: fx.Node) -> bool:
    """Whether a node changes the shape of its input and nothing else."""
    return node.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def is_identity(node: fx.Node) -> bool:
    """Whether a node returns its input: dropout as captured in eval mode."""
    return node.target is torch.ops.aten.dropout.default and node.args[2] is False


def nodes_by_module(graph: fx.Graph) -> dict[str, set[fx.Node]]:
    """Qualified module name → the operations that ran inside its forward, submodules included."""
    found: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not any(word in str(node.target) for word in CHECKS):
            for module in modules_of(node):
                found.setdefault(module, set()).add(node)
    return found


def modules_of(node: fx.Node) -> list[str]:
    """The modules in whose forward a node was made, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path.partition("@")[0] for path, _ in stack.values() if path]


def users_of(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if not any(word in str(user.target) for word in CHECKS)]


def chain_to_product(node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """Element-wise operations behind `node` that only it feeds, up to the first product with something else."""
    chain: list[fx.Node] = []
    known = {node}
    frontier = users_of(node)
    while frontier:
        current = min(frontier, key=list(node.graph.nodes).index) if len(frontier) > 1 else frontier[0]
        inputs = set(current.all_input_nodes)
        if not inputs <= known:
            is_product = current.target is torch.ops.aten.mul.Tensor and chain and set(frontier) == {current}
            return chain, current if is_product and chain[-1] in inputs else None
        if not is_elementwise(current) or len(chain) > 12:
            return chain, None
        chain.append(current)
        known.add(current)
        frontier = list(dict.fromkeys(u for n in known for u in users_of(n) if u not in known))
    return chain, None


def is_elementwise(node: fx.Node) -> bool:
    """Whether a node keeps its input's shape and is tagged by torch as pointwise."""
    value = node.meta.get("val")
    inputs = [n.meta.get("val") for n in node.all_input_nodes]
    if not isinstance(value, torch.Tensor) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    shaped = all(isinstance(v, torch.Tensor) and v.shape == value.shape and v.dtype == value.dtype for v in inputs)
    return shaped and torch.Tag.pointwise in node.target.tags


def is_elementwise_chain(source: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether `nodes`, in graph order, compute an element-wise function of `source` alone, whose result is the last."""
    known = {source}
    for node in nodes:
        if not is_elementwise(node) or not set(node.all_input_nodes) <= known:
            return False
        if node is not nodes[-1] and not set(users_of(node)) <= set(nodes):
            return False
        known.add(node)
    return True


def activation_of(source: fx.Node, chain: list[fx.Node]) -> str | None:
    """Name of the activation that `chain` computes from `source`, found by running it on a grid; None if unknown."""
    if not chain:
        return None
    shape = source.meta["val"].shape
    if shape.numel() < GRID:
        return None
    results = {source: torch.linspace(-9.0, 9.0, shape.numel()).view(shape)}
    for node in chain:
        args = [results[a] if isinstance(a, fx.Node) else a for a in node.args]
        kwargs = {k: results[a] if isinstance(a, fx.Node) else a for k, a in node.kwargs.items()}
        results[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    y = results[chain[-1]]
    for name in ACTIVATIONS:
        if name != "none" and torch.allclose(epilogue(results[source], name, False, None), y, rtol=1e-5, atol=2e-6):
            return name
    return None
