"""Select units: score the heads and channels of every assigned structure and choose which train.

S2FT(fraction=0.03) over model.layers.*.mlp  ──▶  UnitChoice(model.layers.0.mlp, consumers=(17, 230, …))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sparsify.calibration.checks import check_weights, column_squares, rows_of
from sparsify.calibration.ranks import of_first_rank, sum_over_ranks
from sparsify.calibration.statistics import batch_count, gradient_statistics, input_squares, need_batches
from sparsify.errors import Refusal, RefusedError
from sparsify.formats import pack, unpack
from sparsify.methods.rows import HeadRows
from sparsify.model.linears import owner_name
from sparsify.passes.assign_rules import WHOLE, Assignment, assign_rule
from sparsify.passes.avoid_units import free_only, read_adapters, taken_units
from sparsify.passes.base import Context, PassResult
from sparsify.passes.select_linears import select_linears, select_packed
from sparsify.passes.select_rows import select_rows
from sparsify.passes.train_in_full import trained_in_full
from sparsify.plan import DATA_DRIVEN, S2FT, LinearRule, PaCA, Quantize, RoSA, Rule, Tokens
from sparsify.program import Program, UnitChoice
from sparsify.program.selection import choose, random_scores, selectable_units, unit_channels, unit_norms
from sparsify.program.structure import Site, Structure
from sparsify.program.unit_budget import Budget, Row, at_least_one, cost_of, unit_counts

if TYPE_CHECKING:
    from jaxtyping import Float


def select_units(program: Program, context: Context) -> PassResult:
    """STRUCTURED → SELECTED: every rule in the plan's order; the first that takes a weight keeps it.

    `Quantize` comes first wherever it stands, and what trains is scored on the weights that the packed ones stand for.
    """
    given = program
    taken = dict.fromkeys(trained_in_full(program, tuple(context.plan.train)), WHOLE)
    quantized: dict[str, int] = {}
    rules = list(enumerate(context.plan.rules))
    for index, rule in rules:
        if isinstance(rule, Quantize):
            served, refusals = select_packed(program, index, rule, quantized)
            quantized.update(dict.fromkeys(served, index))
            program = program.replaced(quantize=program.quantize | dict.fromkeys(served, rule.format))
            program = extend(program, {"refusals": refusals})
    with dequantised(program, any(scored(rule) for _, rule in rules)):
        for index, rule in rules:
            if isinstance(rule, S2FT):
                assignment, refusals = assign_rule(program, index, rule, taken)
                program = extend(program, choose_units(program, assignment, context))
                program = extend(program, {"refusals": refusals})
            elif isinstance(rule, Tokens):
                program = extend(program, select_rows(program, index, rule, taken))
            elif isinstance(rule, LinearRule) and not isinstance(rule, Quantize):
                program = extend(program, select_linears(program, context, index, rule, taken))
    units = sum(len(c.consumers) for c in program.choices)
    parts = [f"{len(program.choices)} structures, {units} consumer units"]
    for things, what in (
        (program.channel_choices, "shared column sets"),
        (program.lowranks, "sparse or low-rank linears"),
        ([p for p in program.parts if isinstance(p, HeadRows)], "weights of which rows train"),
        (program.quantize, "weights to quantise"),
    ):
        parts += [f"{len(things)} {what}"] if things else []
    fields = ("choices", "channel_choices", "parts", "quantize", "refusals")
    changed = any(len(getattr(program, name)) > len(getattr(given, name)) for name in fields)
    return PassResult(program.evolve("select: " + ", ".join(parts)), changed)


def extend(program: Program, added: Mapping[str, Sequence[object]]) -> Program:
    return program.replaced(**{name: (*getattr(program, name), *new) for name, new in added.items()})


def scored(rule: Rule) -> bool:
    """Whether a rule looks at weights, activations or gradients to choose."""
    if isinstance(rule, S2FT | PaCA):
        return rule.select != "random"
    return isinstance(rule, RoSA) and rule.mask != "random"


@contextlib.contextmanager
def dequantised(program: Program, wanted: bool) -> Iterator[None]:
    """Let the modules that will be packed hold, for a while, what their packed weights stand for."""
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for param, format in program.quantize.items() if wanted else ():
            weight = program.tensor(param).detach()
            base = program.bases.get(param)
            back = base.dense() if base else unpack(pack(weight, format), format, tuple(weight.shape), weight.dtype)
            stand_in = nn.Parameter(back, requires_grad=False)
            for name in [n for n, canonical in program.aliases.items() if canonical == param]:
                owner, _, leaf = name.rpartition(".")
                module = program.host.get_submodule(owner)
                swapped.append((module, leaf, module._parameters[leaf]))  # type: ignore[arg-type]
                module._parameters[leaf] = stand_in
        yield
    finally:
        for module, leaf, parameter in reversed(swapped):  # a shared module stands there once for each of its names
            module._parameters[leaf] = parameter


ROLE_WORDS = {"o": "O", "down": "Down", "v": "V", "up": "Up"}


def consumer_row(program: Program, structure: Structure) -> Row:
    """Heads or channels, and the columns of O or Down that one of them trains."""
    cost = sum(unit_cost(program, site, unit_channels(site, structure)) for site in structure.consumers)
    return Row(structure.name, structure.kind, selectable_units(structure), cost)


def producer_row(program: Program, structure: Structure) -> Row:
    """KV groups or channels, and the rows of V or Up that one of them trains."""
    sites = structure.with_role("v", "up")
    cost = sum(unit_cost(program, site, site.positions(structure.units).transpose(0, 1).flatten(1)) for site in sites)
    return Row(structure.name, structure.kind, structure.units, cost)


def unit_cost(program: Program, site: Site, channels: Tensor) -> int:
    """Parameters of one unit of a site. channels: of every unit, `(units, channels per unit)`."""
    weight = program.tensor(site.param)
    return channels.shape[1] * weight.numel() // weight.shape[site.axis]


def counts_of(
    rule: S2FT, index: int, rows: list[Row], fraction: float | None, balance: str, roles: list[str]
) -> tuple[dict[str, int], list[Budget]]:
    """Units by structure, and the budget for the report. fraction: None where the rule counts units."""
    if fraction is None:
        return {row.name: rule.units or 0 for row in rows}, []
    count = unit_counts if rule.budget == "total" else at_least_one
    counts = count(rows, fraction, balance)
    total = sum(row.size for row in rows)
    of = ", ".join(ROLE_WORDS[role] for role in ROLE_WORDS if role in roles)
    return counts, [Budget(index, of, fraction * total, cost_of(rows, counts), total)]


def choose_units(program: Program, assignment: Assignment, context: Context) -> dict[str, Sequence[object]]:
    """Choices, budgets and refusals to add to the program. Raises RefusedError for a named structure that the budget does not reach."""
    rule, index = assignment.rule, assignment.index
    scores = score_units(program, assignment, context)
    rows = [consumer_row(program, s) for s in assignment.structures]
    roles = [site.role for s in assignment.structures for site in s.consumers]
    counts, budgets = counts_of(rule, index, rows, rule.fraction, rule.balance, roles)
    makers: dict[str, int] = {}
    makes = [s for s in assignment.structures if s.with_role("v", "up")] if rule.producer_fraction else []
    if makes:
        roles = [site.role for s in makes for site in s.with_role("v", "up")]
        rows_made = [producer_row(program, s) for s in makes]
        makers, more = counts_of(rule, index, rows_made, rule.producer_fraction, "units", roles)
        budgets += more
    choices, refusals = [], []
    adapters = read_adapters(rule, index)
    for structure, row in zip(assignment.structures, rows, strict=True):
        heads = structure.inner.units if structure.inner is not None else 1
        score = scores[structure.name]
        per_group, group = score.view(-1, heads).mean(1), heads
        if adapters:  # single heads, which train where they lie, instead of whole groups
            where, group = f"rule {index}, {structure.name}", 1
            read = [(site, unit_channels(site, structure)) for site in structure.consumers]
            taken = taken_units(program, adapters, read, score.numel())
            score = free_only(score, taken, counts[structure.name], where, largest=rule.largest)
            made = structure.with_role("v", "up") if makers else ()
            rows_of = [(s, s.positions(structure.units).transpose(0, 1).flatten(1)) for s in made]
            taken = taken_units(program, adapters, rows_of, structure.units)
            per_group = free_only(per_group, taken, makers.get(structure.name, 0), where, largest=rule.largest)
        consumers = choose(score, counts[structure.name], group=group, largest=rule.largest)
        producers = choose(per_group, makers.get(structure.name, 0), largest=rule.largest)
        if not consumers and not producers:
            refusals.append(out_of_reach(index, rule, structure, row, budgets[0]))
            continue
        kept = tuple(float(score[i]) for i in consumers)
        reason = why_in_place(program, structure, rule)
        choices.append(UnitChoice(structure.name, index, consumers, producers, rule.select, kept, reason))
    return {"choices": choices, "budgets": budgets, "refusals": refusals}


def out_of_reach(index: int, rule: S2FT, structure: Structure, row: Row, budget: Budget) -> Refusal:
    """Why no unit of a structure trains. Raises RefusedError where the rule names it."""
    refusal = Refusal(
        structure.name,
        f"the budget of rule {index} ({budget.asked:,.0f} parameters) has no {structure.inner_unit} of {row.cost:,} parameters for it: "
        'ask for more, or let each structure train one at least (budget="structure")',
    )
    if rule.is_named(structure.name, *map(owner_name, structure.params())):
        raise RefusedError(f"rule {index}, {rule}: {refusal}")
    return refusal


def why_in_place(program: Program, structure: Structure, rule: S2FT) -> str:
    """Why the units of a structure train where they lie; empty for a feed-forward structure that is proven and may be permuted."""
    if structure.kind == "attention":
        return "heads are blocks as they lie, so attention maps and caches stay the base's"
    if not rule.permute:
        return "permute=False"
    packed = next((site.param for site in structure.sites if site.param in program.bases), None)
    if packed is not None:
        return f"{packed} came packed by {program.bases[packed].library}, in blocks that no reordering respects"
    return program.unproven.get(structure.name, "")


def score_units(program: Program, assignment: Assignment, context: Context) -> dict[str, Float[Tensor, " units"]]:
    """Scores `(selectable units,)` in fp64 for each structure; several consumers add their squares."""
    rule, plan = assignment.rule, context.plan
    if rule.select == "random":
        return {s.name: random_scores(plan.seed, s.name, selectable_units(s)) for s in assignment.structures}
    squares = consumer_squares(program, assignment, context)
    result = {}
    for structure in assignment.structures:
        per_site = [squares[site.param, site.axis] for site in structure.consumers]
        norms = [unit_norms(s, site, structure) for s, site in zip(per_site, structure.consumers, strict=True)]
        result[structure.name] = sum((n.square() for n in norms[1:]), norms[0].square()).sqrt()
        if rule.select == "product":
            weights = [unit_norms(weight_squares(program, site), site, structure) for site in structure.consumers]
            result[structure.name] *= sum((n.square() for n in weights[1:]), weights[0].square()).sqrt()
    return result


def weight_squares(program: Program, site: Site) -> Float[Tensor, " channels"]:
    """Sum of squares of each channel of the site's weight, fp64 `(channels,)`."""
    weight = program.tensor(site.param).detach()
    check_weights([(site.param, weight)])
    return column_squares(rows_of(weight, site.axis))


def consumer_squares(
    program: Program, assignment: Assignment, context: Context
) -> dict[tuple[str, int], Float[Tensor, " channels"]]:
    """Per consumer input channel: squares of the weight, of the activation, or of the gradient."""
    rule: S2FT = assignment.rule
    sites = [site for structure in assignment.structures for site in structure.consumers]
    if rule.select not in DATA_DRIVEN:
        by_name = {f"{s.param}:{s.axis}": s for s in sites}
        scores = of_first_rank(lambda: {name: weight_squares(program, s) for name, s in by_name.items()})
        return {(s.param, s.axis): scores[name] for name, s in by_name.items()}
    batches = need_batches(context.calibration, f"rule {assignment.index}, select={rule.select!r},")
    modules: dict[str, nn.Module] = {s.param: program.host.get_submodule(owner_name(s.param)) for s in sites}
    if rule.select == "gradient":
        sums: dict[str, Tensor] = {}

        def reduce(name: str, gradient: Float[Tensor, "*experts n m"]) -> None:
            total = column_squares(rows_of(gradient, -1))
            sums[name] = sums[name] + total if name in sums else total

        gradient_statistics(program.host, modules, batches, reduce, context.loss, context.progress)
        total = batch_count(batches)
        found = {name: sum_over_ranks(sums[name]) / total for name in modules}
    else:
        found = input_squares(program.host, modules, batches, context.progress)
    return {(s.param, s.axis): found[s.param] for s in sites}
