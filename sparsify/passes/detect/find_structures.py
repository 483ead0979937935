"""From free axis classes to coupled structures.

    axes of every tensor (axes.py) ──▶ Structure("model.layers.3.mlp", "ffn", 40, (up, gate, down)), …, and Declined

A leaf class that nothing fixed may be permuted over all its members `(parameter, axis, layout)`: those are the sites.
What a class *is* shows in what flows between its members:

* attention: a batch axis of softmax(q kᵀ) v that the query projection makes; queries with an axis more than the keys
  make groups (the keys' axis) of heads (the additional one);
* ffn: made by matrices, changed element by element (with a non-linearity or a gate), read by matrices, and nothing
  that reads it flows back into it;
* other: residual streams, dimensions inside a head, ranks of low-rank pairs: sound to permute, but not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from sparsify.passes.detect.axes import AttentionCore, Axes, Axis, Contraction, Interpreter, Value, find, leaves, words
from sparsify.passes.detect.axis_terms import Member, Source, Span, Term, compatible, fixed_inside, has_cut, terms_of
from sparsify.passes.detect.unit_layout import Layout, layout, merge
from sparsify.program.structure import Declined, Role, Site, Structure

NONLINEAR = frozenset(
    "aten::" + name
    for name in words(
        "silu gelu relu relu6 tanh sigmoid mish hardswish hardsigmoid hardtanh leaky_relu prelu elu selu celu softplus "
        "softsign logsigmoid log_sigmoid threshold square pow exp erf sin cos abs maximum glu"
    )
)
PRODUCTS = frozenset({"aten::mul", "aten::multiply"})
TRACE_LIMIT = 4000  # states of one backward walk; roles are labels, so giving up early is safe


@dataclass(frozen=True)
class Detection:
    """What a graph offers, what it refuses, and what else may move.

    structures: feed-forward and attention structures, in the order of the graph.
    declined: what looks like one of them and must not be moved, with the reason.
    others: further free groups (residual streams, dimensions inside heads): sound, but no method asks for them.
    """

    structures: tuple[Structure, ...]
    declined: tuple[Declined, ...]
    others: tuple[Structure, ...] = field(default=())


def find_structures(
    graph: fx.Graph,
    tensors: Mapping[str, str],
    aliases: Mapping[str, str] | None = None,
    parameters: Iterable[str] | None = None,
) -> Detection:
    """Analyse the lifted graph of `torch.export.export(model, …, strict=False)`.

    tensors: placeholder name → qualified name, for parameters, buffers and constants; other placeholders are inputs.
    aliases: qualified name → the one name of its tied class (names that are not in it stand for themselves).
    parameters: names of the placeholders that are parameters; None goes by export's spelling, `p_…`.
    """
    if parameters is None:
        parameters = [name for name in tensors if name.startswith("p_")]
    machine = Interpreter(tensors, parameters, aliases or {})
    machine.run(graph)
    return Finder(machine).detect()


@dataclass
class Flow:
    """One attention core with what feeds it and reads it."""

    core: AttentionCore
    roles: dict[Role, list[Source]]
    outer: Axis | None
    inner: Axis | None
    problem: str = ""


class Finder:
    """Reads the interpreter's result. Every index is built once; every question is a look-up or a local walk."""

    def __init__(self, machine: Interpreter) -> None:
        self.machine = machine
        self.cache: dict[Axis, Axes] = {}
        self.carried: dict[int, frozenset[Axis]] = {}
        self.carriers: dict[Axis, list[Value]] = {}
        self.products: dict[int, list[Contraction]] = {}
        self.members: dict[Axis, list[Member]] = {}
        self.producers: dict[Axis, list[Contraction]] = {}
        self.consumers: dict[Axis, list[Contraction]] = {}
        self.lookups: dict[Axis, list[Value]] = {}
        self.met: set[Axis] = set()  # leaves that meet another activation in a product
        self.names: set[str] = set()
        self.index()

    # ---------------------------------------------------------------------------------------------------- indices

    def leaves(self, axis: Axis) -> Axes:
        root = find(axis)
        known = self.cache.get(root)
        if known is None:
            known = self.cache[root] = leaves(root)
        return known

    def leaf_set(self, axes: Iterable[Axis]) -> set[Axis]:
        return {leaf for axis in axes for leaf in self.leaves(axis)}

    def index(self) -> None:
        machine = self.machine
        for value in machine.values:
            carried = frozenset(self.leaf_set(value.axes))
            self.carried[id(value)] = carried
            for leaf in carried:
                self.carriers.setdefault(leaf, []).append(value)
            for source in value.inputs:
                source.users.append(value)
            if value.op == "aten::embedding" and value.active and value.inputs[0].origin:
                for leaf in self.leaf_set(value.inputs[0].axes[1:]):
                    self.lookups.setdefault(leaf, []).append(value)
        for name, value in machine.placeholders.items():
            for i, axis in enumerate(value.axes):
                for term in terms_of(axis):
                    for leaf in dict.fromkeys(leaf for leaf, _ in term.factors):
                        self.members.setdefault(leaf, []).append(Member(name, i, term))
        for contraction in machine.contractions:
            self.products.setdefault(id(contraction.out), []).append(contraction)
            weight = weight_of(contraction)
            if weight is None:
                self.met |= self.carried[id(contraction.left)] | self.carried[id(contraction.right)]
                continue
            for leaf in self.leaf_set(contraction.contracted):
                self.consumers.setdefault(leaf, []).append(contraction)
            for leaf in self.leaf_set(kept_by_weight(contraction)):
                self.producers.setdefault(leaf, []).append(contraction)
        for core in machine.cores:
            for value in (core.query, core.key, core.value):
                self.met |= self.carried[id(value)]

    # ---------------------------------------------------------------------------------------------------- walking

    def trace(self, start: Value, targets: set[Axis]) -> list[Source]:
        """Parameters whose products flow into `start` along `targets`, with the slices in between."""
        found: dict[Source, None] = {}
        stack: list[tuple[Value, frozenset[Span]]] = [(start, frozenset())]
        seen: set[tuple[int, frozenset[Span]]] = set()
        while stack and len(seen) < TRACE_LIMIT:
            value, spans = stack.pop()
            if (id(value), spans) in seen:
                continue
            seen.add((id(value), spans))
            contractions = self.products.get(id(value), [])
            for contraction in contractions:
                weight = weight_of(contraction)
                if weight is not None:
                    found.update(dict.fromkeys(self.weight_sources(weight, spans)))
            if contractions or self.is_core(value):
                continue
            if value.span is not None:
                spans = spans | {value.span}
            for source in self.joined(value, spans):
                if source.active and (not targets or targets & self.carried[id(source)]):
                    stack.append((source, spans))
        return list(found)

    def joined(self, value: Value, spans: frozenset[Span]) -> list[Value]:
        """Inputs of a value; of a concatenation, those that the slices taken from it reach."""
        if value.join is None or not spans:
            return list(value.inputs)
        root, at, out = find(value.join), 0, []
        dim = next((i for i, a in enumerate(value.axes) if find(a) is root), None)
        if dim is None or any(len(v.axes) != len(value.axes) for v in value.inputs):
            return list(value.inputs)
        for source in value.inputs:
            stop = at + source.axes[dim].size
            if not any(find(axis) is root and (stop <= low or high <= at) for axis, low, high in spans):
                out.append(source)
            at = stop
        return out

    def weight_sources(self, weight: Value, spans: frozenset[Span]) -> list[Source]:
        """Parameters that a weight operand is computed from."""
        found: list[Source] = []
        stack, seen = [(weight, spans)], set()
        while stack and len(seen) < TRACE_LIMIT:
            value, spans = stack.pop()
            if (id(value), spans) in seen:
                continue
            seen.add((id(value), spans))
            if value.param is not None:
                found.append((value.param, spans))
                continue
            if value.span is not None:
                spans = spans | {value.span}
            stack += [(source, spans) for source in self.joined(value, spans) if not source.active]
        return found

    def is_core(self, value: Value) -> bool:
        return value.op == "aten::scaled_dot_product_attention"

    # -------------------------------------------------------------------------------------------------- attention

    def cores(self) -> list[AttentionCore]:
        """Fused cores, and softmax between two products of activations."""
        cores = list(self.machine.cores)
        near: set[int] = set()  # values that come from a product of activations with no other product in between
        for value in self.machine.values:
            contractions = self.products.get(id(value))
            if contractions:
                if any(weight_of(c) is None and c.left.active and c.right.active for c in contractions):
                    near.add(id(value))
            elif any(id(source) in near for source in value.inputs):
                near.add(id(value))
        for value in self.machine.values:
            if value.along is not None and value.active and id(value) in near:
                first, second = self.product_before(value, near), self.product_after(value)
                if first is None or second is None:
                    continue
                last, operand = second
                query, key, kept = first.left, first.right, first.left_kept
                scores = self.leaf_set([value.along])
                if not scores & self.leaf_set(first.right_kept) and scores & self.leaf_set(first.left_kept):
                    query, key, kept = key, query, first.right_kept
                rows = {find(axis) for axis in first.out.axes[-2:]} if first.out else set()
                heads = (
                    *first.batch,
                    *(axis for axis in kept if find(axis) not in rows),
                )  # keys may have one head for all
                core = AttentionCore(value.node, query, key, operand, heads, first.contracted, last.out)
                cores.append(core)
        return cores

    def product_before(self, value: Value, near: set[int]) -> Contraction | None:
        """The product of activations whose scores a softmax normalises."""
        queue, seen = list(value.inputs), {id(value)}
        while queue:
            value = queue.pop(0)
            if id(value) in seen or id(value) not in near:
                continue
            seen.add(id(value))
            contractions = self.products.get(id(value))
            if contractions:
                return contractions[0]
            queue += value.inputs
        return None

    def product_after(self, softmax: Value) -> tuple[Contraction, Value] | None:
        """The product that applies the weights of a softmax, with its other operand."""
        assert softmax.along is not None
        along = self.leaf_set([softmax.along])
        queue, seen = [softmax], set()
        while queue:
            value = queue.pop(0)
            if id(value) in seen or not along & self.carried[id(value)]:
                continue
            seen.add(id(value))
            for user in value.users:
                contractions = self.products.get(id(user))
                if not contractions:
                    queue.append(user)
                    continue
                for contraction in contractions:
                    if not along & self.leaf_set(contraction.contracted):
                        continue
                    if contraction.left is value and contraction.right.active:
                        return contraction, contraction.right
                    if contraction.right is value and contraction.left.active:
                        return contraction, contraction.left
        return None

    def flow(self, core: AttentionCore) -> Flow:
        """Roles of the projections around one core, and its head axes."""
        heads = list(dict.fromkeys(leaf for axis in core.heads for leaf in self.leaves(axis)))
        features = self.leaf_set(core.features)
        roles: dict[Role, list[Source]] = {}
        operands: tuple[tuple[Role, Value], ...] = (("q", core.query), ("k", core.key), ("v", core.value))
        for role, operand in operands:
            inside = self.leaf_set(operand.axes[-1:]) if role == "v" else features
            targets = {leaf for leaf in (*heads, *inside) if leaf in self.members}
            roles[role] = self.trace(operand, targets)
        made: dict[Role, set[Axis]] = {role: self.made_by(sources) for role, sources in roles.items()}
        query = [leaf for leaf in heads if leaf in made["q"]]
        shared = [leaf for leaf in query if leaf in made["k"] or leaf in made["v"]]
        rest = [leaf for leaf in query if leaf not in shared]
        flow = Flow(core, roles, None, None)
        if shared:
            flow.outer, flow.inner = shared[0], (rest or shared[1:] or [None])[0]
        elif rest:
            flow.inner = rest[0]
        own = [axis for axis in core.heads if set(query) & set(self.leaves(axis))]
        mixed = next((axis for axis in own or core.heads if has_cut(axis)), None)
        fixed = next((leaf for leaf in query if leaf.fixed is not None), None)
        lead = flow.outer or flow.inner
        if lead is not None and lead.fixed is None and mixed is None:
            return flow
        if lead is not None and fixed is not None:
            flow.problem = str(fixed.fixed)
        elif mixed is not None:
            reason = fixed_inside(mixed)
            flow.problem = str(
                reason or f"'{core.node}' meets heads that are put together from parts treated differently"
            )
        else:
            flow.problem = self.missing(core, roles)
        return flow

    def made_by(self, sources: list[Source]) -> set[Axis]:
        """Leaves on the output axes of these parameters."""
        found: set[Axis] = set()
        for name, spans in sources:
            for axis in self.machine.placeholders[name].axes:
                for term in terms_of(axis) if find(axis).form is not None else [Term(0, ((find(axis), 1),), ())]:
                    if compatible(term, spans):
                        found |= {leaf for leaf, _ in term.factors}
        return found

    def missing(self, core: AttentionCore, roles: Mapping[Role, list[Source]]) -> str:
        """Why a core has no head axis of its own."""
        for name, _ in roles.get("q", []):
            for leaf in self.leaf_set(self.machine.placeholders[name].axes[:1]):
                if leaf.fixed is not None and find(leaf) not in self.leaf_set(core.features):
                    return str(leaf.fixed)
        if not roles.get("q"):
            return f"no projection makes the queries of '{core.node}'"
        return f"'{core.node}' has a single head"

    def attention(self) -> tuple[list[Structure], list[Declined], set[Axis]]:
        structures: list[Structure] = []
        declined: list[Declined] = []
        used: set[Axis] = set()
        groups: dict[Axis, list[Flow]] = {}
        for core in self.cores():
            flow = self.flow(core)
            lead = flow.outer or flow.inner
            if flow.problem or lead is None:
                declined.append(self.declined_core(flow))
                used |= {leaf for leaf in (flow.outer, flow.inner) if leaf is not None}
            else:
                groups.setdefault(lead, []).append(flow)
        for lead, flows in groups.items():
            used.add(lead)
            role_of = self.attention_roles(flows, lead)
            inner_leaf = flows[0].inner
            if flows[0].outer is None:
                result = self.single_group(lead, flows, role_of)
            else:
                result = self.structure(lead, "attention", role_of)
                if inner_leaf is not None and inner_leaf.fixed is None:
                    used.add(inner_leaf)
                    if isinstance(result, Structure) and all(f.inner is inner_leaf for f in flows):
                        inner = self.inner(lead, inner_leaf, result.name, self.attention_roles(flows, inner_leaf))
                        result = Structure(result.name, result.kind, result.units, result.sites, inner)
            if isinstance(result, Structure) and not result.with_role("o"):
                result = Declined(result.name, "attention", "No projection reads its heads.", result.sites)
            (structures if isinstance(result, Structure) else declined).append(result)  # type: ignore[arg-type]
        return structures, declined, used

    def attention_roles(self, flows: list[Flow], leaf: Axis) -> Callable[[Member], Role]:
        read = {name for c in self.consumers.get(leaf, []) for name in params_of(c)}
        sources: dict[str, list[tuple[Role, frozenset[Span]]]] = {}
        for flow in flows:
            for role, found in flow.roles.items():
                for name, spans in found:
                    sources.setdefault(name, []).append((role, spans))

        def role_of(member: Member) -> Role:
            if self.is_vector(member):
                return "vector"
            for wanted in ("q", "k", "v"):
                for role, spans in sources.get(member.param, []):
                    if role == wanted and compatible(member.term, spans):
                        return role
            return "o" if member.param in read else "other"

        return role_of

    def is_vector(self, member: Member) -> bool:
        """Whether the parameter is carried along (bias, scale, table) instead of being multiplied as a matrix."""
        leaf_names = [
            name
            for c in (*self.consumers.get(self.lead(member), ()), *self.producers.get(self.lead(member), ()))
            for name in params_of(c)
        ]
        return member.param not in leaf_names

    def lead(self, member: Member) -> Axis:
        return member.term.factors[0][0]

    def inner(self, outer: Axis, leaf: Axis, name: str, role_of: Callable[[Member], Role]) -> Structure | None:
        """The query heads inside a group, when every group may order them on its own."""
        if not self.nested(leaf, outer):
            return None
        sites = self.sites(leaf, role_of, first=outer)
        if sites is None or any(len(site.outer) != 1 or site.outer[0][0] != outer.size for site in sites):
            return None
        return Structure(f"{name}.heads", "attention", leaf.size, sites)

    def single_group(self, leaf: Axis, flows: list[Flow], role_of: Callable[[Member], Role]) -> Structure | Declined:
        """Multi-query attention: one group holds everything, its heads move inside it."""
        sites = self.sites(leaf, role_of)
        if sites is None:
            return self.inexpressible(leaf, "attention")
        inner, outer = [], []
        for site in sites:
            whole = Site(site.param, site.axis, leaf.size * site.block, site.offset, site.outer, 0, site.role)
            if site.step != site.block:
                loops = (*site.outer, (leaf.size, site.step))
                whole = Site(site.param, site.axis, site.block, site.offset, loops, 0, site.role)
            outer.append(whole)
            span = ((1, leaf.size * site.step),)
            inner.append(
                Site(site.param, site.axis, site.block, site.offset, span + site.outer, site.stride, site.role)
            )
        for role in ("k", "v"):
            outer += self.whole_outputs(role, [source for flow in flows for source in flow.roles[role]])
        name = self.name(outer)
        heads = Structure(f"{name}.heads", "attention", leaf.size, tuple(inner))
        return Structure(name, "attention", 1, tuple(sorted(outer, key=self.position)), heads)

    def whole_outputs(self, role: Role, sources: list[Source]) -> list[Site]:
        """The part of each projection's output that reaches one operand of the core, as a single unit."""
        sites: list[Site] = []
        for name in dict.fromkeys(name for name, _ in sources):
            reached = [spans for other, spans in sources if other == name]
            kept = self.leaf_set(
                axis
                for contraction in self.machine.contractions
                if name in params_of(contraction)
                for axis in kept_by_weight(contraction)
            )
            for i, axis in enumerate(self.machine.placeholders[name].axes):
                if kept & set(self.leaves(axis)):
                    terms = [t for t in terms_of(axis) if any(compatible(t, spans) for spans in reached)]
                    sites += [item.site(name, i, role) for item in merge([layout(term, None) for term in terms])]
        return sites

    def declined_core(self, flow: Flow) -> Declined:
        lead = flow.outer or flow.inner
        params = list(dict.fromkeys(name for found in flow.roles.values() for name, _ in found))
        sites: list[Site] = []
        if lead is not None:
            role_of = self.attention_roles([flow], lead)
            near = [m for m in self.members.get(lead, []) if m.param in {*params, *self.readers(flow.core, lead)}]
            sites = list(self.sites(lead, role_of, members=near) or ())
        count = "Its heads"
        if lead is not None and not any(has_cut(axis) for axis in flow.core.heads):
            count = f"Its {lead.size * (flow.inner.size if flow.outer and flow.inner else 1)} heads"
        name = self.unique(common_path(params) if params else flow.core.node)
        return Declined(name, "attention", f"{count} must keep their order, because {flow.problem}.", tuple(sites))

    def readers(self, core: AttentionCore, lead: Axis) -> set[str]:
        """Parameters of the products that read this core's result along its heads."""
        found: set[str] = set()
        stack, seen = [core.out], set()
        while stack:
            value = stack.pop()
            if value is None or id(value) in seen or lead not in self.carried[id(value)]:
                continue
            seen.add(id(value))
            for user in value.users:
                products = [c for c in self.products.get(id(user), []) if lead in self.leaf_set(c.contracted)]
                found.update(name for c in products for name in params_of(c))
                if not self.products.get(id(user)):
                    stack.append(user)
        return found

    def nested(self, leaf: Axis, outer: Axis) -> bool:
        """Whether `leaf` never occurs but inside `outer`, so that every index of `outer` may order it on its own."""
        pair = {leaf, outer}
        for value in self.carriers.get(leaf, []):
            combined = [(0, 0)]
            for axis in value.axes:
                if not pair & set(self.leaves(axis)):
                    continue
                counts = {
                    (sum(x is leaf for x, _ in term.factors), sum(x is outer for x, _ in term.factors))
                    for term in terms_of(axis)
                }
                combined = [(a + c, b + d) for a, b in combined for c, d in counts]
            if any(a and (a, b) != (1, 1) for a, b in combined):
                return False
        for contraction in self.machine.contractions:
            summed = self.leaf_set(contraction.contracted)
            if leaf in summed and outer not in summed and outer not in self.leaf_set(contraction.batch):
                return False
        for axes, values in self.machine.mixes:
            mixed = self.leaf_set(axes)
            if outer in mixed and leaf not in mixed and any(leaf in self.carried[id(v)] for v in values):
                return False
        return True

    # --------------------------------------------------------------------------------------------- feed-forward

    def feed_forward(self, used: set[Axis]) -> tuple[list[Structure], list[Declined], set[Axis]]:
        structures: list[Structure] = []
        declined: list[Declined] = []
        taken: set[Axis] = set()
        for leaf in self.members:
            if leaf in used or leaf in self.met or leaf in self.lookups or leaf.size < 2:
                continue
            producers, consumers = self.producers.get(leaf, []), self.consumers.get(leaf, [])
            if not producers or not consumers or any(c.spatial for c in (*producers, *consumers)):
                continue
            parts = self.components(leaf)
            judged = [self.judge(leaf, *part) for part in parts]
            if leaf.fixed is None:
                if judged and all(judged):
                    gates = {source for part in judged if part for source in part}
                    taken.add(leaf)
                    result = self.structure(leaf, "ffn", self.ffn_roles(leaf, gates))
                    (structures if isinstance(result, Structure) else declined).append(result)  # type: ignore[arg-type]
                continue
            for part, verdict in zip(parts, judged, strict=True):
                if verdict:
                    declined.append(self.declined_ffn(leaf, part, verdict))
        return structures, declined, taken

    def components(self, leaf: Axis) -> list[tuple[list[Value], list[Contraction], list[Contraction]]]:
        """Connected activations that carry `leaf`, with the products that make them and those that read them."""
        import networkx as nx

        values = {id(v): v for v in self.carriers[leaf] if v.active}
        flow = nx.Graph()
        flow.add_nodes_from(values)
        for key, value in values.items():
            swallowed = {
                id(activation_of(c)) for c in self.products.get(key, []) if leaf in self.leaf_set(c.contracted)
            }
            sources = {id(source) for source in value.inputs} - swallowed
            flow.add_edges_from((key, source) for source in sources if source in values)
        groups: list[tuple[list[Value], list[Contraction], list[Contraction]]] = []
        home: dict[int, int] = {}
        for number, part in enumerate(nx.connected_components(flow)):  # in the order of their first values
            home.update(dict.fromkeys(part, number))
            groups.append(([value for key, value in values.items() if key in part], [], []))
        for contraction in self.producers.get(leaf, []):
            if id(contraction.out) in home:
                groups[home[id(contraction.out)]][1].append(contraction)
        for contraction in self.consumers.get(leaf, []):
            activation = activation_of(contraction)
            if id(activation) in home:
                groups[home[id(activation)]][2].append(contraction)
        return [g for g in groups if g[1] or g[2]]

    def judge(
        self, leaf: Axis, values: list[Value], producers: list[Contraction], consumers: list[Contraction]
    ) -> set[tuple[str, int, Term]] | dict[str, bool] | None:
        """None when this is no feed-forward network; else the gate's members (a non-empty stand-in if it has none)."""
        if not producers or not consumers or self.flows_back(values, producers, consumers):
            return None
        inside = {id(v) for v in values}
        behind: dict[int, Value] = {}
        stack = [activation_of(c) for c in consumers]
        while stack:
            value = stack.pop()
            if id(value) in behind or id(value) not in inside:
                continue
            behind[id(value)] = value
            stack += value.inputs
        gates: set[tuple[str, int, Term]] = set()
        bends = any(v.op in NONLINEAR for v in behind.values())
        for value in behind.values():
            if value.op == "aten::glu":
                gates |= self.glu_gate(leaf, value)
            factors = [v for v in value.inputs if id(v) in behind]
            if value.op not in PRODUCTS or len(factors) != 2:
                continue
            left, right = (self.touched(leaf, factor) for factor in factors)
            if left and right and not left & right:
                bends = True
                gated = [self.bent(factor, behind) for factor in factors]
                if gated[0] != gated[1]:
                    gates |= left if gated[0] else right
        if not bends:
            return None
        return gates or {"plain": True}

    def glu_gate(self, leaf: Axis, value: Value) -> set[tuple[str, int, Term]]:
        """GLU's gate is the second half of its input."""
        members = self.touched(leaf, value)
        ordered = sorted(members, key=lambda m: (m[0], m[1], m[2].offset))
        return set(ordered[len(ordered) // 2 :]) if len(ordered) > 1 else set()

    def touched(self, leaf: Axis, value: Value) -> set[tuple[str, int, Term]]:
        """Members of `leaf` whose products flow into `value`."""
        sources = self.trace(value, {leaf})
        return {
            (m.param, m.axis, m.term)
            for name, spans in sources
            for m in self.members[leaf]
            if m.param == name and compatible(m.term, spans)
        }

    def bent(self, value: Value, behind: Mapping[int, Value]) -> bool:
        """Whether a non-linearity lies between the producers and `value`."""
        stack, seen = [value], set()
        while stack:
            value = stack.pop()
            if id(value) in seen or id(value) not in behind or self.products.get(id(value)):
                continue
            seen.add(id(value))
            if value.op in NONLINEAR:
                return True
            stack += value.inputs
        return False

    def flows_back(self, values: list[Value], producers: list[Contraction], consumers: list[Contraction]) -> bool:
        """Whether something that reads these activations flows into one of their producers (a residual stream)."""
        targets = {id(c.out) for c in producers}
        last = max(c.out.order for c in producers if c.out is not None)
        stack = [c.out for c in consumers if c.out is not None and c.out.order <= last]
        seen: set[int] = set()
        while stack:
            value = stack.pop()
            if id(value) in targets:
                return True
            for user in value.users:
                if user.order <= last and id(user) not in seen:
                    seen.add(id(user))
                    stack.append(user)
        return False

    def ffn_roles(self, leaf: Axis, gates: set) -> Callable[[Member], Role]:
        made = {name for c in self.producers[leaf] for name in params_of(c)}
        read = {name for c in self.consumers[leaf] for name in params_of(c)}

        def role_of(member: Member) -> Role:
            if member.param in made and member.param in read:
                return "other"
            if member.param in read:
                return "down"
            if member.param in made:
                return "gate" if (member.param, member.axis, member.term) in gates else "up"
            return "vector"

        return role_of

    def declined_ffn(self, leaf: Axis, part: tuple, gates: object) -> Declined:
        _, producers, consumers = part
        params = {n for c in (*producers, *consumers) for n in params_of(c)}
        near = [m for m in self.members[leaf] if m.param in params]
        sites = self.sites(leaf, self.ffn_roles(leaf, gates if isinstance(gates, set) else set()), members=near) or ()
        name = self.unique(common_path([s.param for s in sites] or sorted(params)))
        reason = f"Its {leaf.size} channels must keep their order, because {leaf.fixed}."
        return Declined(name, "ffn", reason, tuple(sites))

    # ----------------------------------------------------------------------------------------------------- sites

    def structure(self, leaf: Axis, kind, role_of: Callable[[Member], Role]) -> Structure | Declined:
        sites = self.sites(leaf, role_of)
        if sites is None:
            return self.inexpressible(leaf, kind)
        return Structure(self.name(sites), kind, leaf.size, sites)

    def inexpressible(self, leaf: Axis, kind) -> Declined:
        params = [m.param for m in self.members[leaf]]
        reason = f"Its {leaf.size} units occur twice on one axis of a tensor, which no site can describe."
        return Declined(self.unique(common_path(params)), kind, reason)

    def sites(
        self,
        leaf: Axis,
        role_of: Callable[[Member], Role],
        *,
        first: Axis | None = None,
        members: list[Member] | None = None,
    ) -> tuple[Site, ...] | None:
        """Sites of a class, stretches of equal layout and role joined. None when a layout cannot be written so."""
        groups: dict[tuple[str, int, Role], list[Layout]] = {}
        for member in self.members[leaf] if members is None else members:
            if sum(x is leaf for x, _ in member.term.factors) != 1:
                return None
            groups.setdefault((member.param, member.axis, role_of(member)), []).append(layout(member.term, leaf, first))
        sites = []
        for (param, axis, role), layouts in groups.items():
            sites += [item.site(param, axis, role) for item in merge(layouts)]
        return tuple(sorted(sites, key=self.position))

    def position(self, site: Site) -> tuple[int, int, int]:
        order = self.order_of_params
        return order[site.param], site.axis, site.offset

    @property
    def order_of_params(self) -> dict[str, int]:
        if not hasattr(self, "_order"):
            self._order = {name: i for i, name in enumerate(self.machine.placeholders)}
        return self._order

    def name(self, sites: Iterable[Site]) -> str:
        return self.unique(common_path([s.param for s in sites]))

    def unique(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.names:
            count += 1
            candidate = f"{name}#{count}"
        self.names.add(candidate)
        return candidate

    # ------------------------------------------------------------------------------------------------------- all

    def detect(self) -> Detection:
        attention, refused_attention, used = self.attention()
        networks, refused_networks, taken = self.feed_forward(used)
        others = []
        for leaf, members in self.members.items():
            if leaf in used or leaf in taken or leaf.fixed is not None or leaf.size < 2 or len(members) < 2:
                continue
            sites = self.sites(leaf, lambda member: "other")
            if sites is not None and len(sites) > 1:
                others.append(Structure(self.name(sites), "other", leaf.size, sites))
        structures = sorted([*attention, *networks], key=lambda s: self.position(s.sites[0]))
        return Detection(tuple(structures), (*refused_attention, *refused_networks), tuple(others))


def weight_of(contraction: Contraction) -> Value | None:
    """The operand of a product that is made of parameters alone (of two such operands, the right one)."""
    left, right = contraction.left, contraction.right
    if not right.active and right.origin:
        return right
    if not left.active and left.origin:
        return left
    return None


def params_of(contraction: Contraction) -> frozenset[str]:
    """Parameters that the weight operand is made of."""
    weight = weight_of(contraction)
    return (weight.origin if weight is not None else None) or frozenset()


def activation_of(contraction: Contraction) -> Value:
    """The operand that meets the weight."""
    return contraction.left if weight_of(contraction) is not contraction.left else contraction.right


def kept_by_weight(contraction: Contraction) -> Axes:
    if weight_of(contraction) is contraction.left:
        return contraction.left_kept
    return contraction.right_kept


def common_path(params: Iterable[str]) -> str:
    """Longest common module path of parameter names."""
    paths = [name.split(".")[:-1] for name in dict.fromkeys(params)]
    shared = []
    for names in zip(*paths, strict=False):
        if len(set(names)) != 1:
            break
        shared.append(names[0])
    return ".".join(shared) or "model"
