"""Assign rules: match the plan's rules to structures and linears; the first that matches wins.

rule 0  S2FT(match="*.mlp*")  ──▶  model.layers.0.mlp, model.layers.1.mlp, …
(nothing left over)           ──▶  PlanError with the nearest names, or RefusedError with the reasons
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsify.errors import PlanError, Refusal, RefusedError
from sparsify.model.linears import is_conv1d, owner_name
from sparsify.model.packed_experts import GroupedLinear
from sparsify.passes.direct_reads import read_past
from sparsify.plan import S2FT, Rule
from sparsify.plan.unmatched import nearest_module, unmatched_patterns
from sparsify.program import LinearNode, Program, through_transpose
from sparsify.program.selection import selectable_units
from sparsify.program.structure import Site, Structure


@dataclass(frozen=True)
class Assignment:
    """One rule over the structures it serves (in graph order)."""

    index: int
    rule: S2FT
    structures: tuple[Structure, ...]


WHOLE = -1  # stands for Plan(train=…) where the index of the rule that trains a weight is kept


def only_multiplies(program: Program, names: list[str], nodes: list[LinearNode]) -> bool:
    """Whether all that the weight's module computes in the graph is `x Wᵀ + b` (Falcon writes that out in a subclass)."""
    paths = {owner_name(n) for n in names}
    products = {n.node for n in nodes}
    biases = {program.placeholder(f"{path}.bias") for path in paths}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        innermost = list(stack.values())[-1][0].split("@")[0] if stack else ""
        if node.op != "call_function" or innermost not in paths or node in products:
            continue
        transposes = through_transpose(node)[0] is program.placeholder(names[0])
        adds_bias = node.target is torch.ops.aten.add.Tensor and not node.kwargs and node.args[0] in products
        if not transposes and not (adds_bias and node.args[1] in biases):
            return False
    return bool(products)


def why_not_trainable(program: Program, param: str, linears: dict[str, list[LinearNode]]) -> str | None:
    """Why no slice of this weight can train in place, or None if one can."""
    weight = program.tensor(param)
    grouped = isinstance(program.host.get_submodule(owner_name(param)), GroupedLinear)
    if weight.dim() != 2 and not grouped:
        return (
            f"the weight has {weight.dim()} dimensions: packed experts train where their module follows transformers' experts "
            "interface, by a plan without Prune"
        )
    if not weight.is_floating_point():
        return f"the weight is stored as {weight.dtype}"
    nodes = linears.get(param, [])
    if not nodes:
        return "no matrix product of the captured graph reads this weight"
    placeholder = program.placeholder(param)
    readers = set(placeholder.users) if placeholder is not None else set()
    products = {n.node for n in nodes}
    for reader in list(readers):
        if reader not in products and not all(u in products for u in reader.users):
            return f"the weight is also read by node {reader.name} ({reader.target})"
    names = [alias for alias, canonical in program.aliases.items() if canonical == param]
    owners = {id(program.host.get_submodule(owner_name(n))) for n in names}
    if len(owners) > 1:
        return f"the weight is tied: {', '.join(sorted(names))}"
    owner = program.host.get_submodule(owner_name(param))
    plain = grouped or type(owner).forward is nn.Linear.forward or is_conv1d(owner)
    if not plain and not (isinstance(owner, nn.Linear) and only_multiplies(program, names, nodes)):
        return (
            f"its module is a {type(owner).__name__}, whose own forward would be lost; nn.Linear and Conv1D can train"
        )
    paths = {owner_name(n) for n in names}
    for node in products:
        stack = node.meta.get("nn_module_stack") or {}
        innermost = list(stack.values())[-1][0].split("@")[0] if stack else ""
        if stack and innermost not in paths:
            return (
                f"the weight is read by the forward of '{innermost}' directly, not by its own module (node {node.name})"
            )
    return read_past(program, param)


def assign_rule(program: Program, index: int, rule: S2FT, taken: dict[str, int]) -> tuple[Assignment, list[Refusal]]:
    """Match one structure rule; `taken` learns the weights it trains. Raises PlanError for a rule that serves nothing."""
    linears: dict[str, list[LinearNode]] = {}
    for linear in program.linears():
        linears.setdefault(linear.weight, []).append(linear)
    kinds = ("ffn", "attention") if rule.structure == "both" else (rule.structure,)
    served, reasons = [], []
    named, everything = False, set()
    for structure in program.structures:
        names = {structure.name, *map(owner_name, structure.params())}
        everything |= names
        if structure.kind not in kinds or not rule.matches(*names):
            continue
        named |= rule.is_named(*names)
        reason = why_not_served(program, structure, rule, linears, taken)
        if reason is None:
            served.append(structure)
            taken.update({site.param: index for site in trained_sites(structure, rule)})
        elif not reason.startswith("rule "):
            reasons.append(Refusal(structure.name, reason))
    for declined in program.declined:
        names = {declined.name, *(owner_name(site.param) for site in declined.sites)}
        everything |= names
        if declined.kind in kinds and rule.matches(*names):
            named |= rule.is_named(*names)
            reasons.append(Refusal(declined.name, declined.reason))
    if reasons and named:
        raise RefusedError(f"rule {index}, {rule}: {reasons[0]}")
    if not served:
        raise unused(index, rule, program, reasons)
    return Assignment(index, rule, tuple(served)), reasons + unmatched_patterns(index, rule, everything)


def trained_sites(structure: Structure, rule: S2FT) -> list[Site]:
    """Sites whose weights get a trained slice under the rule: consumers, and V or Up if producers train too."""
    sites = list(structure.consumers)
    if rule.producer_fraction:
        sites += structure.with_role("v", "up")
    return sites


def why_not_served(
    program: Program, structure: Structure, rule: S2FT, linears: dict[str, list[LinearNode]], taken: dict[str, int]
) -> str | None:
    if not structure.consumers:
        return "nothing reads the units through a matrix product"
    for site in trained_sites(structure, rule):
        if taken.get(site.param) == WHOLE:
            return f"{site.param} trains in full (Plan(train=…))"
        if site.param in taken:
            return f"rule {taken[site.param]} already trains {site.param}"
        reason = why_not_trainable(program, site.param, linears)
        if reason is not None:
            return f"{site.param}: {reason}"
    weights = [s.param for s in trained_sites(structure, rule)]
    if len(set(weights)) < len(weights):
        return "two trained slices would lie in one weight"
    total = selectable_units(structure)
    if rule.units is not None and rule.units > total:
        unit = "heads" if structure.kind == "attention" else "channels"
        return f"units={rule.units} is more than its {total} {unit}; write units≤{total} or a fraction for it"
    return None


def unused(index: int, rule: Rule, program: Program, reasons: list[Refusal]) -> PlanError:
    names = [s.name for s in program.structures] + sorted(
        {owner_name(p) for s in program.structures for p in s.params()}
    )
    if reasons:
        listed = "\n  ".join(str(r) for r in reasons[:5]) + (
            f"\n  … and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        )
        return PlanError(f"rule {index}, {rule}, serves nothing; what it matched was declined:\n  {listed}")
    return PlanError(
        f"rule {index}, {rule}, matches nothing that is still free{nearest_module(rule.patterns[0], names)}"
    )
