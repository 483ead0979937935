"""Unit budget: how many units of each structure train, so that all of them together train what was asked.

S2FT(fraction=0.03) over 30 × attention (9 heads of 36,864), 30 × ffn (1,536 channels of 576)
──▶  36,495,360 parameters · 0.03 = 1,094,860      heads 0 (one in each layer is 1,105,920)      channels 63 (1,088,640, 2.98 %)

    target      O and Down: equal parameters ("parameters"), or the same share of units ("units"); what one cannot take, the other gets
    coarse      the kind with the larger units (heads) takes the nearest whole number that leaves the other at least one unit each
    fine        the other takes what is left, rounded down

Counts are equal in layers of equal size, so that repeated layers share one compiled graph (and as in the paper, uniform over layers); what
is left over is less than one unit of the finer kind in each layer. A budget below one unit in each layer goes to fewer layers, spread
evenly, at least one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsify.console import printable

ROUNDING = 1e-9  # 0.1 · 20 units are 2, whatever the product of floats says


@dataclass(frozen=True)
class Row:
    """One structure on one side of its units. units: how many there are; cost: parameters that one of them trains."""

    name: str
    kind: str
    units: int
    cost: int

    @property
    def size(self) -> int:
        return self.units * self.cost


@printable
@dataclass(frozen=True)
class Budget:
    """What a rule asked for and what its whole units train. rule: its index. of: the weights that the share is of ("O, Down").

    asked, trained: parameters. total: those that would train if every unit did.
    """

    rule: int
    of: str
    asked: float
    trained: int
    total: int

    def __str__(self) -> str:
        share, got = self.asked / max(self.total, 1), self.trained / max(self.total, 1)
        asked = f"rule {self.rule} asked for {share:.4%} of {self.total:,} parameters of {self.of}"
        return f"{asked}, and {got:.4%} train ({self.trained:,})"


def unit_counts(rows: Sequence[Row], fraction: float, balance: str) -> dict[str, int]:
    """Units by structure whose parameters are at most `fraction` of all, or one unit where even that is more."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    sizes = {kind: sum(row.size for row in members) for kind, members in kinds.items()}
    budget = left = fraction * sum(sizes.values())
    order = sorted(kinds, key=lambda kind: -max(row.cost for row in kinds[kind]))
    counts: dict[str, int] = {}
    for place, kind in enumerate(order):
        finer = order[place + 1 :]
        least = sum(row.cost for other in finer for row in kinds[other])
        room = sum(sizes[other] for other in finer)
        target = fraction * sizes[kind] if balance == "units" else budget / len(order)
        wanted = max(target, left - room) if finer else left
        share = min(1.0, max(wanted, 0.0) / max(sizes[kind], 1))
        found = rounded(kinds[kind], share, up=bool(finer))
        if cost_of(kinds[kind], found) + least > left * (1 + ROUNDING):
            found = rounded(kinds[kind], share, up=False)
        counts |= found
        left -= cost_of(kinds[kind], found)
    if not any(counts.values()) and rows:
        counts |= scattered(kinds[order[-1]], budget)
    return counts


def rounded(rows: Sequence[Row], share: float, *, up: bool) -> dict[str, int]:
    """The same share of the units of each structure: the nearest whole number, or the one below."""
    return {row.name: math.floor(share * row.units * (1 + ROUNDING) + (0.5 if up else 0.0)) for row in rows}


def scattered(rows: Sequence[Row], budget: float) -> dict[str, int]:
    """One unit in as many structures as the budget pays for, spread evenly over their order; in one at least."""
    paid = min(len(rows), max(1, math.floor(budget / max(row.cost for row in rows) * (1 + ROUNDING))))
    chosen = {(2 * place + 1) * len(rows) // (2 * paid) for place in range(paid)}
    return {row.name: int(place in chosen) for place, row in enumerate(rows)}


def at_least_one(rows: Sequence[Row], fraction: float, balance: str) -> dict[str, int]:
    """Units by structure, each rounded by itself to the nearest, at least one: what is trained may be far more than was asked."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.kind] = sizes.get(row.kind, 0) + row.size
    equal = fraction * sum(sizes.values()) / max(len(sizes), 1)
    shares = {kind: fraction if balance == "units" else min(1.0, equal / size) for kind, size in sizes.items()}
    return {row.name: max(1, round(shares[row.kind] * row.units)) for row in rows}


def cost_of(rows: Sequence[Row], counts: Mapping[str, int]) -> int:
    return sum(row.cost * counts[row.name] for row in rows)
