"""A plan within the rank that its export as LoRA may need: fewer units and lower ranks, each rule as near as it can be.

S2FT(0.12), heads of 64, N = 64     ──▶  S2FT(structure="attention", units=1), S2FT(structure="ffn", units=64)
LoRA(rank=128), PaCA(rank=128)      ──▶  rank=64
RoSA                                ──▶  PlanError: scattered entries are no LoRA, unless its density is 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsify.errors import PlanError
from sparsify.plan import S2FT, Plan, Rule
from sparsify.planner.estimate import Traces, sizes_only
from sparsify.planner.sensitivity import unit_width
from sparsify.planner.shallow import repeat_of, skeleton


def bounded(model: nn.Module, plan: Plan, rank: int) -> Plan:
    """The plan with every trained part within `rank` input channels or rank. model: on any device.

    Raises PlanError for a rule that cannot be: RoSA with entries, S2FT whose smallest unit has more channels or that trains producers
    too (rows beside columns), a rule of another package.
    """
    blind = sizes_only(plan)
    empty = skeleton(model, None)
    program: Any = Traces(empty).host(blind, repeat_of(empty, blind)).sparsify.program
    structures = {s.name: s for s in program.structures}
    rules: list[Rule] = []
    for index, rule in enumerate(plan.rules):
        if rule.phase != "adapt":
            rules.append(rule)
        elif isinstance(rule, S2FT):
            chosen = [(structures[c.structure], len(c.consumers)) for c in program.choices if c.rule == index]
            rules += narrowed(rule, chosen, rank)
        else:
            rules.append(lowered(rule, rank))
    return dataclasses.replace(plan, rules=rules)


def narrowed(rule: S2FT, chosen: list[tuple[Any, int]], rank: int) -> list[S2FT]:
    """S2FT with at most as many units of each kind as `rank` has room for; the same rule where it fits."""
    if rule.producer_fraction:
        raise PlanError(
            f"max_lora_rank: {rule} trains rows of V and Up too, whose rank adds to that of columns; leave producer_fraction out"
        )
    if all(count * unit_width(structure) <= rank for structure, count in chosen):
        return [rule]
    found = []
    for kind in dict.fromkeys(structure.kind for structure, _ in chosen):
        units = min(min(count, rank // unit_width(s)) for s, count in chosen if s.kind == kind)
        if units:
            found.append(dataclasses.replace(rule, structure=kind, fraction=None, units=units))
    if not found:
        least = min(unit_width(structure) for structure, _ in chosen)
        raise PlanError(
            f"max_lora_rank={rank}: one unit of {rule} has {least} channels; give at least that, or structure='ffn'"
        )
    return found


def lowered(rule: Any, rank: int) -> Any:
    """A linear rule with at most `rank`."""
    dense = getattr(rule, "density", 0)
    if any(dense.values()) if isinstance(dense, Mapping) else dense:
        raise PlanError(
            f"max_lora_rank: {rule} trains scattered entries, which are no LoRA of any rank; density=0 has none"
        )
    given = getattr(rule, "rank", None)
    if given is None:
        raise PlanError(f"max_lora_rank: of {rule} it is not known what rank it needs")
    most = {k: min(v, rank) for k, v in given.items()} if isinstance(given, Mapping) else min(given, rank)
    return dataclasses.replace(rule, rank=most)


__all__ = ["bounded"]
