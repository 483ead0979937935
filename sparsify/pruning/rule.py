"""The `Prune` rule: which linears lose how many weights, by which method, in which pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import fx

from sparsify.errors import PlanError, Refusal
from sparsify.model.task_heads import head_parameters
from sparsify.plan import Rule, check_patterns, takes_habits
from sparsify.plan.name_patterns import matches
from sparsify.program import LinearNode, Program, through_transpose
from sparsify.pruning.patterns import NM, Pattern, check_sparsity, parse_pattern

PruneMethod = Literal["sparsegpt", "wanda", "magnitude", "random"]
NEEDS_DATA: frozenset[str] = frozenset({"sparsegpt", "wanda"})
DEFAULT_SPARSITY = 0.75


@takes_habits
@dataclass(frozen=True, kw_only=True)
class Prune(Rule):
    """One-shot pruning of linears, layer by layer in the order of the graph.

    match: as in `Rule`; left out, unless `match` is the exact name, are embeddings, the output head and, in Hugging Face's task
        models, everything beside the base model (classifiers, CTC and question-answering heads, BERT's `cls`); routers; and
        weights that something else reads too. The report says so of each.
    sparsity: fraction of zeros, 0 ≤ s < 1; or a mapping {glob: sparsity} (first match wins, a linear that none matches is left
        dense). Default: 0.75, and `1 − N/M` for an N:M pattern, which allows nothing else.
    method: "sparsegpt" (arXiv 2301.00774) and "wanda" (2306.11695) need calibration batches; "magnitude" and "random" do not.
    pattern: "unstructured", "N:M" with any N < M (N of M inputs stay), or "HxW" (blocks of H output rows × W input columns).
    allocation: "uniform", or "sensitivity": the same total, with sparsities moved between layers to where they cost least.
    max_shift: with "sensitivity", how far a layer's sparsity may move from `sparsity`.
    exclude: globs of further modules to leave dense.
    damping: SparseGPT: added to the Hessian's diagonal, as a fraction of its mean.
    seed: of "random".
    """

    sparsity: float | Mapping[str, float] | tuple[tuple[str, float], ...] | None = field(default=None, kw_only=False)
    method: PruneMethod = "sparsegpt"
    pattern: str = "unstructured"
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    max_shift: float = 0.15
    exclude: tuple[str, ...] = ()
    damping: float = 0.01
    seed: int = 0

    phase: ClassVar[Literal["adapt", "weight"]] = "weight"

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, Mapping):
            object.__setattr__(self, "sparsity", tuple(self.sparsity.items()))
        if isinstance(self.exclude, str):
            raise PlanError(f"Prune(exclude={self.exclude!r}): expected a list of patterns")
        super().__post_init__()
        check_patterns("Prune", "exclude", self.exclude)
        if isinstance(self.sparsity, tuple):
            check_patterns("Prune", "sparsity", [pattern for pattern, _ in self.sparsity])
        shape = parse_pattern(self.pattern)
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", shape.sparsity if isinstance(shape, NM) else DEFAULT_SPARSITY)
        for sparsity in self.sparsities:
            check_sparsity("Prune", sparsity)
            if isinstance(shape, NM) and abs(sparsity - shape.sparsity) > 1e-6:
                raise PlanError(
                    f"Prune(pattern='{shape}', sparsity={sparsity:g}): keeping {shape.n} of {shape.m} is sparsity "
                    f"{shape.sparsity:g}; leave sparsity out, or choose another N:M"
                )
        if self.allocation == "sensitivity" and isinstance(shape, NM):
            raise PlanError(
                f"Prune(pattern='{shape}', allocation='sensitivity'): N:M fixes every layer's sparsity; use 'uniform'"
            )
        if not self.damping > 0:
            raise PlanError(f"Prune(damping={self.damping:g}): must be positive, 0.01 is usual")
        if not 0 <= self.max_shift < 1:
            raise PlanError(f"Prune(max_shift={self.max_shift:g}): 0 ≤ max_shift < 1 is needed")

    @property
    def shape(self) -> Pattern:
        """The parsed pattern."""
        return parse_pattern(self.pattern)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Every share of zeros that the rule names."""
        if isinstance(self.sparsity, tuple):
            return tuple(s for _, s in self.sparsity)
        return (float(self.sparsity),) if isinstance(self.sparsity, int | float) else ()

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at data."""
        return self.method in NEEDS_DATA

    def sparsity_of(self, module: str) -> float | None:
        """Sparsity of the linear in module `module` before allocation, or None when no glob of a mapping matches it."""
        if isinstance(self.sparsity, tuple):
            return next((s for pattern, s in self.sparsity if matches(pattern, module)), None)
        return float(self.sparsity) if isinstance(self.sparsity, int | float) else None

    def targets(self, program: Program) -> tuple[list[str], list[Refusal]]:
        """Parameter names that the rule prunes, in graph order, and what it leaves dense with the reason.

        A module named in `match` without wildcards that cannot be pruned is in the refusals as well; raise if that matters.
        """
        wanted: list[str] = []
        refused: list[Refusal] = []
        heads = head_parameters(program.host)
        routers = router_parameters(program)
        products: dict[str, list[LinearNode]] = {}
        for linear in program.linears():
            products.setdefault(linear.weight, []).append(linear)
        inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        places = {i.target: inputs[i.name] for i in program.inputs if i.target is not None}
        for name in prunable_parameters(program):
            module = name.rpartition(".")[0]
            if not self.matches(module, name):
                continue
            if any(matches(pattern, n) for n in (module, name) for pattern in self.exclude):
                refused.append(Refusal(name, "excluded by the rule"))
            elif name in heads and not self.is_named(module, name):
                refused.append(Refusal(name, "the output head or an embedding; name it in match=… to prune it"))
            elif (shared := read_elsewhere(places.get(name), products.get(name, []))) is not None:
                refused.append(Refusal(name, shared))
            elif name in routers and not self.is_named(module, name):
                refused.append(Refusal(name, "a router: its output chooses experts; name it in match=… to prune it"))
            elif self.sparsity_of(module) is None:
                refused.append(Refusal(name, "no pattern of the sparsity mapping matches it"))
            elif (
                reason := self.why_not_fitting(program, name, any(p.transposed for p in products.get(name, ())))
            ) is not None:
                refused.append(Refusal(name, reason))
            else:
                wanted.append(name)
        return wanted, refused

    def why_not_fitting(self, program: Program, name: str, transposed: bool) -> str | None:
        """Why a parameter's shape or storage does not take the pattern. transposed: it is stored `(in, out)`."""
        if name in program.bases:
            return f"it is packed already, by {program.bases[name].library}: prune the model before it is quantised"
        parameter = program.tensor(name)
        if not parameter.is_floating_point():
            return f"it is stored as {parameter.dtype}"
        if parameter.dim() == 3:  # packed experts
            owner = program.host.get_submodule(name.rpartition(".")[0])
            transposed = bool(getattr(owner, "is_transposed", False))
        shape = (int(parameter.shape[-2]), int(parameter.shape[-1]))
        try:
            self.shape.check(name, (shape[1], shape[0]) if transposed else shape)
        except PlanError as error:
            return str(error).removeprefix(f"{name}: ")
        return None


def read_elsewhere(placeholder: fx.Node | None, linears: list[LinearNode]) -> str | None:
    """What besides products in one orientation reads a matrix (a table that is looked up in, a decoder that is the encoder
    transposed); None when nothing does. linears: its products; of packed experts there are none, and they are not looked at."""
    if not linears:
        return None
    products = {linear.node for linear in linears}
    frontier = list(placeholder.users) if placeholder is not None else []
    while frontier:
        reader = frontier.pop()
        if reader in products:
            continue
        if through_transpose(reader)[0] is not placeholder or not reader.users:
            return f"the weight is also read by node {reader.name} ({reader.target}), so it is no linear's alone"
        frontier += reader.users
    if len({linear.transposed for linear in linears}) > 1:
        return "the weight is tied to its own transpose: its rows are inputs of one product and outputs of another"
    return None


def router_parameters(program: Program) -> set[str]:
    """Weights of linears whose output reaches `topk` through element-wise operations, softmax or views only."""
    passing = (
        "softmax",
        "sigmoid",
        "_to_copy",
        "to.",
        "view",
        "reshape",
        "add",
        "mul",
        "float",
        "type_as",
        "slice",
        "unsqueeze",
        "div",
    )
    found = set()
    for linear in program.linears():
        frontier, seen = list(linear.node.users), set()
        while frontier:
            node = frontier.pop()
            kind = str(node.target)
            if "topk" in kind:
                found.add(linear.weight)
                break
            if node not in seen and any(word in kind for word in passing):
                seen.add(node)
                frontier += [user for user in node.users if len(seen) < 16]
    return found


def prunable_parameters(program: Program) -> list[str]:
    """Weights of linears and of packed experts `(experts, …, …)`, in graph order, each once."""
    names = program.tensor_names
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    found = [(order[linear.node], linear.weight) for linear in program.linears()]
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names or len(node.meta["val"].shape) != 3:
            continue
        readers = [order[user] for user in node.users]
        is_parameter = any(i.name == node.name and i.kind == "parameter" for i in program.inputs)
        if readers and is_parameter and min(node.meta["val"].shape) > 1 and not is_convolution(node):
            found.append((min(readers), names[node.name]))
    return list(dict.fromkeys(name for _, name in sorted(found, key=lambda pair: pair[0])))


def is_convolution(node: object) -> bool:
    """Whether a weight feeds a convolution (also through views)."""
    users = getattr(node, "users", {})
    return any("conv" in str(getattr(user, "target", "")) for user in users)
