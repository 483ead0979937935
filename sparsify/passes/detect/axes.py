"""Axis unification: which dimensions of which tensors must be indexed alike.

    ATen graph ──rules (axis_rules.py)──▶ Value per tensor, one Axis per dimension, Contraction per matrix product

An `Axis` is an element of a union-find. It is a leaf, a *product* (`view(heads, head_dim)`: 64 = 8 × 8) or a
*concatenation* (`cat`, `split`, `chunk`: packed q|k|v). Unifying two decomposed axes unifies their parts on a common
refinement. A leaf may be permuted when nothing `fix`ed it: then permuting it wherever it occurs commutes with every
operation of the graph. An operation that the rules do not know fixes every axis that it touches: unknown means refused.

Invariants: parts are strictly smaller than their whole (so unification ends); sizes of unified axes are equal; an axis
of size 1 is the shared `ONE`, which nothing can fix; a fixed axis has fixed parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import fx
from torch._ops import OpOverload

#: Whether a bug in a rule (any exception but `Refuse`) is raised. The tests set it; else the operation counts as unknown.
strict_rules = False


class Refuse(Exception):
    """Raised by a rule that meets a case that it does not model; the interpreter then fixes every axis involved."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Reason:
    """Why an axis must keep its order: a clause about a node or tensor, and the node where the axis met it."""

    text: str
    met: str = ""

    def __str__(self) -> str:
        return f"{self.text}, and '{self.met}' ties it to them" if self.met else self.text


class Axis:
    """One dimension, up to unification. Always go through `find` before reading `form`, `parts` or `fixed`.

    uniform: the tensor holds one value all along it (`expand`, `zeros`). Such an axis binds nothing, so it is never
        unified itself: element-wise operations ignore it, every other operation gets a fresh leaf in its place.
    """

    __slots__ = ("fixed", "form", "parent", "parts", "size", "uniform")

    def __init__(self, size: int, fixed: Reason | None = None, uniform: bool = False) -> None:
        self.uniform = uniform
        self.size = size
        self.parent: Axis | None = None
        self.form: Literal["product", "concat"] | None = None
        self.parts: tuple[Axis, ...] = ()
        self.fixed = fixed


ONE = Axis(1)
Axes = tuple[Axis, ...]


def find(axis: Axis) -> Axis:
    """The representative of the class of `axis`."""
    root = axis
    while root.parent is not None:
        root = root.parent
    while axis is not root:
        axis.parent, axis = root, axis.parent  # type: ignore[assignment]
    return root


def fresh(size: int, fixed: Reason | None = None) -> Axis:
    return ONE if size == 1 else Axis(size, fixed)


def fix(axis: Axis, reason: Reason) -> None:
    """Forbid every reordering of `axis` and of its parts."""
    root = find(axis)
    if root.size == 1 or root.fixed is not None:
        return
    root.fixed = reason
    for part in root.parts:
        fix(part, reason)


def decompose(root: Axis, form: Literal["product", "concat"], parts: Sequence[Axis]) -> None:
    """Give a leaf its parts. A leaf that was fixed passes that on."""
    root.form, root.parts = form, tuple(parts)
    if root.fixed is not None:
        for part in parts:
            fix(part, root.fixed)


def product(parts: Iterable[Axis]) -> Axis:
    """The axis that enumerates `parts` in row-major order (the first part is the outermost)."""
    kept = [p for p in parts if p.size != 1]
    if not kept:
        return ONE
    if len(kept) == 1:
        return kept[0]
    axis = Axis(prod(p.size for p in kept))
    axis.form, axis.parts = "product", tuple(kept)
    return axis


def concat(parts: Iterable[Axis]) -> Axis:
    """The axis that runs through `parts` one after another."""
    kept = [p for p in parts if p.size != 0]
    if len(kept) == 1:
        return kept[0]
    axis = Axis(sum(p.size for p in kept))
    axis.form, axis.parts = "concat", tuple(kept)
    return axis


def factors(root: Axis) -> list[Axis]:
    """Roots whose row-major product is `root`, none of them a product."""
    if root.form != "product":
        return [root]
    return [factor for part in root.parts for factor in factors(find(part))]


def pieces(root: Axis) -> list[Axis]:
    """Roots whose concatenation is `root`, none of them a concatenation."""
    if root.form != "concat":
        return [root]
    return [piece for part in root.parts for piece in pieces(find(part))]


def unify(a: Axis, b: Axis, met: str = "") -> None:
    """Demand that `a` and `b` are indexed alike. `met`: the node that demands it (for the reason, if one is fixed)."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise Refuse(f"axes of sizes {a.size} and {b.size} cannot be one axis")
    if (a.fixed is None) != (b.fixed is None):
        held, other = (a, b) if a.fixed is not None else (b, a)
        assert held.fixed is not None
        if not held.fixed.met:
            held.fixed = Reason(held.fixed.text, met)
        fix(other, held.fixed)
    if b.form is None:
        a, b = b, a
    if a.form == "product" and b.form == "product":
        align_products(factors(a), factors(b), met)
    elif a.form == "concat" and b.form == "concat":
        align_concats(pieces(a), pieces(b), met)
    elif a.form is not None:
        align_mixed(*((a, b) if a.form == "product" else (b, a)), met)
    a.parent = b


def align_products(left: list[Axis], right: list[Axis], met: str) -> None:
    """Unify two factorisations of one size on their common refinement; fix the stretch that has none."""
    left, right = left[::-1], right[::-1]  # consumed from the outermost factor: the end of the lists
    while left and right:
        x, y = find(left.pop()), find(right.pop())
        if x.size == y.size:
            unify(x, y, met)
            continue
        big, small, rest_of = (x, y, left) if x.size > y.size else (y, x, right)
        if big.size % small.size == 0:
            rest = fresh(big.size // small.size)
            if big.form is None:
                decompose(big, "product", (small, rest))
            else:
                unify(big, product((small, rest)), met)
            rest_of.append(rest)
            continue
        reason = Reason(f"'{met}' regroups {x.size} × … channels as {y.size} × …, which share no common units")
        conflict, x_size, y_size = [x, y], x.size, y.size
        while x_size != y_size:
            side = left if x_size < y_size else right
            more = find(side.pop())
            conflict.append(more)
            x_size, y_size = (x_size * more.size, y_size) if side is left else (x_size, y_size * more.size)
        for axis in conflict:
            fix(axis, reason)


def align_concats(left: list[Axis], right: list[Axis], met: str) -> None:
    """Unify two cuttings of one axis: every piece is cut where the other side has a boundary."""
    left, right = left[::-1], right[::-1]
    while left and right:
        x, y = find(left.pop()), find(right.pop())
        if x.size == y.size:
            unify(x, y, met)
            continue
        big, small, rest_of = (x, y, left) if x.size > y.size else (y, x, right)
        rest = fresh(big.size - small.size)
        if big.form is None:
            decompose(big, "concat", (small, rest))
        else:
            unify(big, concat((small, rest)), met)
        rest_of.append(rest)


def align_mixed(whole: Axis, cut: Axis, met: str) -> None:
    """Unify a product with a concatenation: the outermost factor is cut, if every boundary falls between its units."""
    first, *inner = factors(whole)
    span = prod(f.size for f in inner)
    parts = pieces(cut)
    if any(p.size % span for p in parts):
        reason = Reason(f"'{met}' cuts an axis of {whole.size} channels inside its units of {span}")
        fix(whole, reason)
        fix(cut, reason)
        return
    outer = [fresh(p.size // span) for p in parts]
    unify(first, concat(outer), met)
    for part, top in zip(parts, outer, strict=True):
        unify(part, product((top, *inner)), met)


def cut(axis: Axis, start: int, stop: int, met: str = "") -> Axis:
    """The axis of positions [start, stop) of `axis`."""
    if start == 0 and stop == axis.size:
        return axis
    if stop <= start:
        return Axis(0)
    root = find(axis)
    if root.fixed is not None and root.form is None:
        return fresh(stop - start, root.fixed)
    middle = fresh(stop - start)
    unify(
        root, concat([fresh(s) for s in (start,) if s] + [middle] + [fresh(s) for s in (axis.size - stop,) if s]), met
    )
    return middle


def leaves(axis: Axis) -> Axes:
    """Roots of the leaves of `axis`, each as often as it occurs; size 1 left out."""
    root = find(axis)
    if root.form is None:
        return () if root.size == 1 else (root,)
    return tuple(leaf for part in root.parts for leaf in leaves(part))


class Value:
    """One tensor of the graph: its axes, and where it came from (for the question what flows into what).

    origin: names of the parameters that it is computed from when it depends on no user input, else None.
    span: for a slice, the source axis and the range taken; join: for a concatenation, its axis.
    along: for a softmax, the axis that it normalises.
    """

    __slots__ = ("along", "axes", "base", "inputs", "join", "node", "op", "order", "origin", "param", "span", "users")

    def __init__(self, axes: Axes, op: str, node: str, inputs: tuple[Value, ...], order: int) -> None:
        self.axes, self.op, self.node, self.inputs, self.order = axes, op, node, inputs, order
        self.origin: frozenset[str] | None = frozenset()
        self.param: str | None = None
        self.span: tuple[Axis, int, int] | None = None
        self.join: Axis | None = None
        self.along: Axis | None = None
        self.base: Value | None = None
        self.users: list[Value] = []

    @property
    def active(self) -> bool:
        """Whether it depends on a user input."""
        return self.origin is None


@dataclass
class Contraction:
    """One matrix product (or convolution, or attention core): what was summed over, and what each side kept."""

    node: str
    left: Value
    right: Value
    contracted: Axes
    left_kept: Axes
    right_kept: Axes
    batch: Axes = ()
    spatial: bool = False
    out: Value | None = None


@dataclass
class AttentionCore:
    """softmax(q kᵀ) v, as one fused operator or put together from its parts. `heads`: the batch axes of all three."""

    node: str
    query: Value
    key: Value
    value: Value
    heads: Axes
    features: Axes
    out: Value | None = None


class Call:
    """One operation while its rule runs: arguments by schema name (tensors as Values), and what the rule may record."""

    __slots__ = (
        "along",
        "args",
        "contractions",
        "core",
        "inputs",
        "join",
        "machine",
        "mixes",
        "name",
        "node",
        "op",
        "spans",
    )

    def __init__(self, machine: Interpreter, node: fx.Node, op: str, args: dict[str, object]) -> None:
        self.machine, self.node, self.op, self.args = machine, node, op, args
        self.name = node.name
        self.spans: list[tuple[Axis, int, int]] = []
        self.join: Axis | None = None
        self.along: Axis | None = None
        self.contractions: list[Contraction] = []
        self.core: AttentionCore | None = None
        self.inputs: tuple[Value, ...] | None = (
            None  # what the result is computed from, when that is not every argument
        )

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, name: str, default: object = None) -> Any:
        return self.args.get(name, default)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the outputs."""
        return [tensor_shape(v) for v in tensors_of(self.node.meta.get("val"))]

    def tensors(self) -> list[Value]:
        return list(values_of(self.args))

    def unify(self, a: Axis, b: Axis) -> None:
        if a.size == 1 and b.size == 1:
            return
        unify(a, b, self.name)

    def broadcast(self, *shapes: Axes) -> Axes:
        """Axes of an element-wise result: size 1 and uniform axes stretch, all others at one place become one."""
        rank = max((len(s) for s in shapes), default=0)
        out: list[Axis] = [ONE] * rank
        for axes in shapes:
            for i, axis in enumerate(axes, rank - len(axes)):
                if axis.size == 1:
                    continue
                if out[i].size == 1 or out[i].uniform:
                    out[i] = axis
                elif axis.uniform:
                    continue
                elif out[i] is not axis:
                    self.unify(out[i], axis)
        return tuple(out)

    def fix(self, axes: Iterable[Axis], text: str) -> None:
        reason = Reason(text.replace("@", f"node '{self.name}' ({self.op})"))
        for axis in axes:
            fix(axis, reason)

    def constant(self, text: str) -> Reason:
        return Reason(text.replace("@", f"node '{self.name}' ({self.op})"))

    def mix(self, axes: Iterable[Axis]) -> None:
        """Record that the operation combines values along `axes` jointly (a reduction, a norm, a softmax)."""
        self.machine.mixes.append((tuple(axes), tuple(self.tensors())))

    def contract(self, left: Value, right: Value, contracted: Iterable[tuple[Axis, Axis]], **kept: Any) -> Contraction:
        """Unify the contracted axes and record the product."""
        pairs = list(contracted)
        for a, b in pairs:
            self.unify(a, b)
        record = Contraction(self.name, left, right, tuple(b for _, b in pairs), **kept)
        self.contractions.append(record)
        return record

    def known(self, node: object) -> torch.Tensor | None:
        """The values of a small constant (`torch.tensor([-2])` in the model's code), when export kept them."""
        while isinstance(node, fx.Node) and node.op == "call_function" and node not in self.machine.written:
            if str(node.target).split(".")[1:2] not in (
                ["lift_fresh_copy"],
                ["detach"],
                ["alias"],
                ["clone"],
                ["detach_"],
            ):
                return None
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "placeholder" or node in self.machine.written:
            return None
        if node.name not in self.machine.tensors or node.name in self.machine.parameters:
            return None
        return getattr(node.meta.get("val"), "constant", None)

    def intermediate(self, axes: Axes, inputs: tuple[Value, Value]) -> Value:
        """A value inside the operation, that the graph does not show."""
        value = self.machine.new(axes, self.op, self.name, inputs)
        value.origin = None
        return value

    def cut(self, axis: Axis, start: int, stop: int) -> Axis:
        self.spans.append((axis, start, stop))
        return cut(axis, start, stop, self.name)


Rule = Callable[[Call], "Axes | list[Axes] | None"]


def tensors_of(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_of(item)]
    return []


def values_of(value: object) -> Iterable[Value]:
    if isinstance(value, Value):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from values_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from values_of(item)


def tensor_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Static shape; a symbolic size counts with the value that it had in the example (or 0 when there is none)."""
    shape = tuple(tensor.shape)
    if all(type(s) is int for s in shape):
        return shape
    return tuple(s if type(s) is int else int(getattr(s.node, "hint", None) or 0) for s in shape)  # type: ignore[union-attr]


def written_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an in-place operation may write to, directly or through a view: they may stop being uniform."""
    written: set[fx.Node] = set()

    def mark(node: object) -> None:
        while isinstance(node, fx.Node) and node not in written:
            written.add(node)
            node = node.args[0] if node.args else None

    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and schema_of(node.target)[2]:
            for argument in node.args:
                mark(argument)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            modules = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
            for module in modules:
                inner = getattr(graph.owning_module, str(module.target), None)
                if not isinstance(inner, fx.GraphModule):
                    continue
                inside = written_nodes(inner.graph)
                written |= inside
                places = [n for n in inner.graph.nodes if n.op == "placeholder"]
                start = list(node.args).index(module) + 1
                for place, argument in zip(places, node.args[start:], strict=False):
                    if place in inside:
                        mark(argument)
    return written


SUBGRAPHS = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap", "invoke_subgraph", "tag_activation_checkpoint"}
_SCHEMAS: dict[OpOverload, tuple[str, Sequence[tuple[str, bool, object]], bool]] = {}


def schema_of(target: OpOverload) -> tuple[str, Sequence[tuple[str, bool, object]], bool]:
    """(qualified name, [(argument, has a default, default)], whether it writes to an argument), cached per operator."""
    if target not in _SCHEMAS:
        schema = target._schema
        arguments = [(a.name, a.has_default_value(), a.default_value) for a in schema.arguments]
        _SCHEMAS[target] = (schema.name, arguments, schema.is_mutable)
    return _SCHEMAS[target]


class Interpreter:
    """Runs a lifted ATen graph over axes.

    tensors: placeholder name → qualified name, for every parameter, buffer and constant.
    parameters: the placeholders among them that are parameters; the others are data that nobody may move.
    """

    def __init__(self, tensors: Mapping[str, str], parameters: Iterable[str], aliases: Mapping[str, str]) -> None:
        from sparsify.passes.detect.axis_rules import VIEWS, rule_for

        self.rule_for, self.views = rule_for, VIEWS
        self.tensors, self.parameters, self.aliases = tensors, set(parameters), aliases
        self.values: list[Value] = []
        self.written: set[fx.Node] = set()
        self.contractions: list[Contraction] = []
        self.cores: list[AttentionCore] = []
        self.mixes: list[tuple[Axes, tuple[Value, ...]]] = []
        self.placeholders: dict[str, Value] = {}
        self.bugs: list[str] = []  # rules that failed, in words

    def run(self, graph: fx.Graph) -> None:
        self.written = written_nodes(graph)
        env: dict[fx.Node, object] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = self.placeholder(node)
            elif node.op == "output":
                for value in values_of(self.lookup(node.args, env)):
                    for axis in value.axes:
                        if axis.size != 1:
                            fix(axis, Reason(f"node '{value.node}' ({value.op}) is an output of the model"))
            else:
                env[node] = self.step(node, env, graph)

    def subgraph(self, graph: fx.Graph, arguments: Sequence[object]) -> object:
        """Run an inner graph on values of the outer one; its output structure."""
        env: dict[fx.Node, object] = {}
        remaining = iter(arguments)
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(remaining)
            elif node.op == "output":
                return self.lookup(node.args[0], env)
            else:
                env[node] = self.step(node, env, graph)
        return None

    def lookup(self, arg: object, env: Mapping[fx.Node, object]) -> object:
        if isinstance(arg, fx.Node):
            return env.get(arg)
        if isinstance(arg, list | tuple):
            return [self.lookup(a, env) for a in arg]
        if isinstance(arg, dict):
            return {k: self.lookup(a, env) for k, a in arg.items()}
        return arg

    def new(self, axes: Axes, op: str, node: str, inputs: tuple[Value, ...] = ()) -> Value:
        value = Value(axes, op, node, inputs, len(self.values))
        self.values.append(value)
        return value

    def placeholder(self, node: fx.Node) -> Value | None:
        tensor = node.meta.get("val")
        if not isinstance(tensor, torch.Tensor):
            return None
        name = self.tensors.get(node.name)
        if name is not None and node.name in self.parameters:
            name = self.aliases.get(name, name)
            if name in self.placeholders:
                return self.placeholders[name]
            value = self.new(tuple(fresh(s) for s in tensor_shape(tensor)), "parameter", node.name)
            value.param, value.origin = name, frozenset((name,))
            self.placeholders[name] = value
            return value
        kind = f"'{name}' is a buffer or a constant" if name is not None else f"'{node.name}' is an input of the model"
        reason = Reason(f"{kind}, with its own value at every position")
        value = self.new(tuple(fresh(s, reason) for s in tensor_shape(tensor)), "placeholder", node.name)
        value.origin = frozenset() if name is not None else None
        return value

    def step(self, node: fx.Node, env: dict[fx.Node, object], graph: fx.Graph) -> object:
        """The value (or values) of one node."""
        if node.op == "get_attr":
            return self.attribute(node, graph)
        target = node.target
        if target is operator.getitem:
            source = self.lookup(node.args[0], env)
            if isinstance(source, list) and isinstance(node.args[1], int):
                return source[node.args[1]]
        if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in SUBGRAPHS:
            arguments = [self.lookup(a, env) for a in node.args]
            for i, argument in enumerate(arguments):
                if isinstance(argument, fx.GraphModule):
                    return self.subgraph(argument.graph, arguments[i + 1 :])
        outputs = tensors_of(node.meta.get("val"))
        if not isinstance(target, OpOverload):
            inputs = tuple(values_of(self.lookup([node.args, node.kwargs], env)))
            return self.unknown(node, getattr(target, "__name__", str(target)), inputs, outputs) if inputs else None
        op, arguments, mutable = schema_of(target)
        bound = {}
        for i, (name, has_default, default) in enumerate(arguments):
            if i < len(node.args):
                bound[name] = self.lookup(node.args[i], env)
            elif name in node.kwargs:
                bound[name] = self.lookup(node.kwargs[name], env)
            elif has_default:
                bound[name] = default
        rule = self.rule_for(target, op, mutable)
        if mutable and op.endswith("_") and not op.endswith("__"):
            op = op[:-1]  # what `relu_` writes is what `relu` returns
        if rule is not None and rule.__name__ not in ("elementwise", "cast"):
            bound = {name: self.instantiate(argument) for name, argument in bound.items()}
        inputs = tuple(values_of(bound))
        if not outputs and not (mutable and inputs):
            return None
        call = Call(self, node, op, bound)
        axes = None
        if rule is not None:
            axes = self.answer(rule, call, outputs)
        if axes is None:
            result = self.unknown(node, op, inputs, outputs)
        else:
            result = self.record(call, axes, inputs)
        if mutable:
            self.mutate(node, op, env, inputs, result)
        return result

    def answer(self, rule: Rule, call: Call, outputs: list[torch.Tensor]) -> Axes | list[Axes] | None:
        """The axes that a rule gives the outputs, or None where it refuses, fails, or gives others than export recorded.

        What a rule unified and fixed before it refused stays so: that forbids more than it must, never less.
        """
        try:
            axes = rule(call)
        except Refuse:
            return None
        except Exception as error:
            if strict_rules:
                raise
            self.bugs.append(f"{call.name} ({call.op}): {type(error).__name__}: {error}")
            return None
        if axes is not None and not fits(axes, outputs):
            if strict_rules and all(type(s) is int for t in outputs for s in t.shape):
                raise AssertionError(f"the rule of {call.op} gives {call.name} other shapes than export recorded")
            return None
        return axes

    def instantiate(self, argument: object) -> object:
        """Values with a fresh leaf in the place of every uniform axis."""
        if isinstance(argument, list):
            return [self.instantiate(a) for a in argument]
        if not isinstance(argument, Value) or not any(a.uniform for a in argument.axes):
            return argument
        axes = tuple(fresh(a.size) if a.uniform else a for a in argument.axes)
        value = self.new(axes, argument.op, argument.node, (argument,))
        value.origin = argument.origin
        return value

    def record(self, call: Call, axes: Axes | list[Axes], inputs: tuple[Value, ...]) -> object:
        view = call.op.removeprefix("aten::") in self.views
        inputs = inputs if call.inputs is None else call.inputs
        origin: frozenset[str] | None = frozenset()
        for value in inputs:
            origin = None if origin is None or value.origin is None else origin | value.origin

        if call.op in ("aten::index", "aten::index_select") and len(inputs[0].axes) > 2:
            origin = inputs[0].origin  # experts picked by a router are still weights

        written = call.node in self.written

        def value_of(item: Axes, index: int) -> Value:
            if written and any(a.uniform for a in item):
                item = tuple(fresh(a.size) if a.uniform else a for a in item)
            value = self.new(item, call.op, call.name, inputs)
            value.origin = origin
            value.join, value.along = call.join, call.along
            if call.spans:
                value.span = call.spans[index] if index < len(call.spans) else None
            value.base = inputs[0] if inputs and view else None
            return value

        if isinstance(axes, list):
            return [value_of(item, i) for i, item in enumerate(axes)]
        result = value_of(axes, 0)
        if origin and call.contractions:
            result.origin = None  # a learned query, or a projected table: what a product of weights makes is data
        for contraction in call.contractions:
            contraction.out = contraction.out or result
            self.contractions.append(contraction)
        if call.core is not None:
            call.core.out = result
            self.cores.append(call.core)
        return result

    def unknown(self, node: fx.Node, op: str, inputs: tuple[Value, ...], outputs: list[torch.Tensor]) -> object:
        """Fix every axis that the operation touches; outputs keep the axes of an input of the same shape, all fixed."""
        reason = Reason(f"node '{node.name}' ({op}) may depend on the order along every axis that it touches")
        for value in inputs:
            for axis in value.axes:
                fix(axis, reason)
        results = []
        for tensor in outputs:
            shape = tensor_shape(tensor)
            like = next((v for v in inputs if v.active and len(v.axes) == len(shape)), None)
            axes = tuple(fresh(size, reason) for size in shape)
            if like is not None:
                axes = tuple(a if a.size == s else fresh(s, reason) for a, s in zip(like.axes, shape, strict=True))
            value = self.new(axes, op, node.name, inputs)
            value.origin = (
                None if any(v.active for v in inputs) else frozenset(n for v in inputs for n in v.origin or ())
            )
            results.append(value)
        return results[0] if isinstance(node.meta.get("val"), torch.Tensor) else results

    def mutate(
        self, node: fx.Node, op: str, env: dict[fx.Node, object], inputs: tuple[Value, ...], result: object
    ) -> None:
        """After an in-place operation its first argument, and what that is a view of, holds the result.

        Capture makes in-place operations functional; they are met here in graphs of other makers.
        """
        if not inputs:
            return
        target = inputs[0]
        if isinstance(result, Value):
            try:
                if len(target.axes) != len(result.axes):
                    raise Refuse
                for a, b in zip(target.axes, result.axes, strict=True):
                    unify(a, b, node.name)
            except Refuse:  # a resize: the tensor is another one from here on
                reason = Reason(f"node '{node.name}' ({op}) changes the shape of a tensor in place")
                for axis in (*target.axes, *result.axes):
                    fix(axis, reason)
            if node.args and isinstance(node.args[0], fx.Node):
                env[node.args[0]] = result
        active = any(v.active for v in inputs)
        base, seen = target.base, {id(target)}
        while base is not None and id(base) not in seen:
            seen.add(id(base))
            if active:
                base.origin = None
            base.inputs = (*base.inputs, *inputs[1:])
            base = base.base

    def attribute(self, node: fx.Node, graph: fx.Graph) -> object:
        owner: object = graph.owning_module
        for name in str(node.target).split("."):
            owner = getattr(owner, name, None)
        if isinstance(owner, fx.GraphModule):
            return owner
        tensor = node.meta.get("val", owner)
        if not isinstance(tensor, torch.Tensor):
            return None
        reason = Reason(f"'{node.target}' is a constant of the graph")
        return self.new(tuple(fresh(s, reason) for s in tensor_shape(tensor)), "get_attr", node.name)


def fits(axes: Axes | list[Axes], outputs: list[torch.Tensor]) -> bool:
    """Whether a rule's answer has the shapes that export recorded: a wrong rule must not pass unseen."""
    answers = axes if isinstance(axes, list) else [axes]
    if len(answers) != len(outputs):
        return False
    return all(tuple(a.size for a in ax) == tensor_shape(t) for ax, t in zip(answers, outputs, strict=True))
