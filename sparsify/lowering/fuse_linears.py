"""Find, in the graph, linears whose work one kernel can share; nothing here looks at a name.

    x ─▶ gate ─▶ act ─┐
    x ─▶ up ──────────┴▶ · ─▶ (down)                    act(gate x) · (up x) in one kernel    GatedProduct
    x ─▶ gate_up ─▶ halves ─▶ act(first) · second       the same, packed in one weight        GatedProduct, gate = up
    x ─▶ up ─▶ act ─▶                                   act(up x + b) in one kernel           FusedActivation

An activation is recognised by what it computes: the element-wise operations between two nodes are run on a grid of numbers
and compared with the activations that the kernels know. A module may only be rewritten if the graph shows everything that
happens inside it. What nearly fits is refused with the reason.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify.console import printable
from sparsify.errors import Refusal
from sparsify.kernels.cpu.dispatch import ACTIVATIONS
from sparsify.kernels.cpu.operator import epilogue
from sparsify.program import LinearNode, Program

LONGEST_CHAIN = 12  # operations of an activation written out
GRID = 64  # fewer numbers would not tell activations apart
SPLITS = (
    torch.ops.aten.chunk.default,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
)
CHECKS = ("_assert_tensor_metadata", "sym_constrain_range", "_assert_scalar")  # nodes that compute nothing


@printable
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

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the one linear or the two that it takes."""
        return tuple(dict.fromkeys((self.gate, self.up)))

    def __str__(self) -> str:
        leaves = ", ".join(name.rpartition(".")[2] for name in self.linears)
        return f"{self.owner}: {leaves}, {self.activation} and product"


@printable
@dataclass(frozen=True, eq=False)
class FusedActivation:
    """An activation behind a linear, computed by the module `module`, which does nothing else."""

    linear: str
    activation: str
    module: str
    source: fx.Node  # the linear's output, or the last view of it
    result: fx.Node  # what the activation makes of it

    def __str__(self) -> str:
        return f"{self.linear}: {self.activation}"


Join = GatedProduct | FusedActivation


def module_of(parameter: str) -> str:
    """Qualified name of the module that owns a parameter."""
    return parameter.rpartition(".")[0]


def linears_read_once(program: Program) -> dict[str, LinearNode]:
    """Module name → its product, for weights that the graph reads in one place only."""
    found = list(program.linears())
    count = Counter(linear.weight for linear in found)
    return {module_of(n.weight): n for n in found if count[n.weight] == 1 and n.weight.endswith("weight")}


@dataclass(frozen=True, eq=False)
class Trace:
    """What the detection reads of a program again and again. linears: by module name, those whose weight is read in one place."""

    linears: dict[str, LinearNode]
    by_node: dict[fx.Node, str]
    inside: dict[str, set[fx.Node]]
    place: dict[fx.Node, int]


def find_joins(program: Program) -> tuple[list[Join], list[Refusal]]:
    """What one kernel can compute, in graph order, and for every linear with element-wise work behind it that cannot share, why.

    A linear whose output goes anywhere else (a view into heads, a product of matrices, a sum) offers nothing to join: it is not
    mentioned. The gate of a gated product may be listed with an activation too, for when the product cannot be joined.
    """
    linears = linears_read_once(program)
    place = {node: number for number, node in enumerate(program.graph.nodes)}
    by_node = {linear.node: name for name, linear in linears.items()}
    trace = Trace(linears, by_node, nodes_by_module(program.graph), place)
    found: list[Join] = []
    refusals: list[Refusal] = []
    for linear in program.linears():
        name = module_of(linear.weight)
        results = [attempt(trace, name, linear) for attempt in (gated_product, split_product, moved_activation)]
        if linear.node not in by_node and any(result is not None for result in results):
            owned = linear.weight.endswith(".weight")
            results = ["its weight is read in several places" if owned else "no module of its own computes it"]
        found += [result for result in results if isinstance(result, GatedProduct | FusedActivation)]
        refusals += [Refusal(name or linear.weight, result) for result in results if isinstance(result, str)]
    return found, refusals


def gated_product(trace: Trace, name: str, linear: LinearNode) -> GatedProduct | str | None:
    """act(linear) · up, where one module holds exactly that; why not; None where no product follows an activation."""
    chain, product = chain_to_product(linear.node)
    if product is None or isinstance(product, str):
        return product
    (other,) = [n for n in product.all_input_nodes if n is not chain[-1]]
    if other not in trace.by_node:
        return f"no gated product: the other factor, %{other.name}, is no linear whose weight is read once"
    up = trace.by_node[other]
    if len(other.users) != 1:
        return f"no gated product: the output of {up} is read elsewhere too"
    if trace.linears[up].x is not linear.x:
        return f"no gated product: {up} reads another input"
    activation = activation_of(linear.node, chain)
    if activation is None:
        return f"no gated product: {unknown(linear.node)}"
    return held(trace, {linear.node, other, *chain, product}, linear, up, activation, product)


def split_product(trace: Trace, name: str, linear: LinearNode) -> GatedProduct | str | None:
    """act(first half) · second half of one linear, where one module holds exactly that; why not; None where it is not split so."""
    split = next(iter(users_of(linear.node)), None)
    if split is None or split.target not in SPLITS or len(users_of(linear.node)) != 1:
        return None
    parts = {user.args[1]: user for user in users_of(split) if user.target is operator.getitem}
    if set(parts) != {0, 1}:
        return None
    chain, product = chain_to_product(parts[0])
    if product is None:
        _, turned = chain_to_product(parts[1])
        return None if turned is None else "no gated product: the second half is activated; kernels activate the first"
    if isinstance(product, str):
        return product
    values, axis = split.meta["val"], split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if len(values) != 2 or values[0].shape != values[1].shape:
        return "no gated product: it is not split into two equal halves"
    if axis not in (-1, values[0].dim() - 1):
        return f"no gated product: it is split along axis {axis}, which is not the last"
    if len(users_of(split)) != 2 or users_of(parts[1]) != [product] or set(product.args) != {chain[-1], parts[1]}:
        return "no gated product: its halves are read elsewhere too"
    activation = activation_of(parts[0], chain)
    if activation is None:
        return f"no gated product: {unknown(parts[0])}"
    return held(trace, {linear.node, split, *parts.values(), *chain, product}, linear, name, activation, product)


def held(
    trace: Trace, body: set[fx.Node], linear: LinearNode, up: str, activation: str, product: fx.Node
) -> GatedProduct | str:
    """The gated product whose operations are `body`, if the module that owns gate and up does this alone, or this and `down`."""
    gate = module_of(linear.weight)
    owner = module_of(gate)
    if not owner:
        return "no gated product: it belongs to the model itself, not to a module inside of it"
    if module_of(up) != owner:
        return f"no gated product: {up} belongs to another module"
    last = past(product, is_identity)
    readers = [trace.by_node[user] for user in last.users if user in trace.by_node]
    down = readers[0] if len(last.users) == 1 and readers and module_of(readers[0]) == owner else ""
    operations = {node for node in trace.inside.get(owner, set()) if not is_identity(node)}
    more = operations - body - ({trace.linears[down].node} if down else set())
    if more:
        node = min(more, key=trace.place.__getitem__)
        return f"no gated product: {owner} does more than that (%{node.name}, {node.target})"
    if not body <= operations:
        return f"no gated product: part of it happens outside of {owner}"
    down = down if down and trace.linears[down].node in operations else ""
    return GatedProduct(owner, gate, up, activation, down, product, linear.x)


def moved_activation(trace: Trace, name: str, linear: LinearNode) -> FusedActivation | str | None:
    """An activation behind the linear that is the whole work of a module of its own; why it is not; None where nothing
    element-wise follows."""
    source = past(linear.node, is_view)
    users = users_of(source)
    if not any(is_elementwise(user) and user.all_input_nodes == [source] for user in users):
        return None
    within = set(modules_of(linear.node))
    nearest = "no activation of its own: the same module computes it that computes the linear"
    for module in modules_of(users[0])[::-1]:
        nodes = sorted(trace.inside.get(module, set()), key=trace.place.__getitem__)
        if source in nodes or module in within:
            continue
        if not set(users) <= set(nodes):
            nearest = f"no activation of its own: its output is read outside of {module} too"
        elif not is_elementwise_chain(source, nodes):
            nearest = f"no activation of its own: {module} does more than element-wise work on it"
        elif (activation := activation_of(source, nodes)) is None:
            return f"no activation of its own: {unknown(source)}"
        else:
            return FusedActivation(name, activation, module, source, nodes[-1])
    return nearest


def unknown(source: fx.Node) -> str:
    """Why no activation was recognised behind `source`."""
    count = source.meta["val"].shape.numel()
    if count < GRID:
        return f"the example shows {count} numbers of it, and {GRID} are needed to tell activations apart"
    return f"what follows is none of {', '.join(name for name in ACTIVATIONS if name != 'none')}"


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


def chain_to_product(node: fx.Node) -> tuple[list[fx.Node], fx.Node | str | None]:
    """Element-wise operations behind `node` that only it feeds, and the first product of their result with something else; why they do
    not reach it, though one is there; None where there is none, or nothing is between."""
    chain: list[fx.Node] = []
    known = {node}
    frontier = users_of(node)
    while frontier:
        current = min(frontier, key=list(node.graph.nodes).index) if len(frontier) > 1 else frontier[0]
        inputs = set(current.all_input_nodes)
        if not inputs <= known:
            if current.target is not torch.ops.aten.mul.Tensor or not chain:
                return chain, None
            if set(frontier) != {current} or chain[-1] not in inputs:
                return chain, "no gated product: what is multiplied is read elsewhere too"
            return chain, current
        if not is_elementwise(current):
            return chain, None
        if len(chain) > LONGEST_CHAIN:
            return chain, f"no gated product: more than {LONGEST_CHAIN} element-wise operations follow"
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
