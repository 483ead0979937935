"""What `autoplan` chooses among: methods at sizes, over a base as it is or packed, with blocks computed again in the backward or not.

S2FT   share of O and Down     PaCA, LoRA   rank     RoSA   rank and, with it, density
spread: of a size's blocks some get twice as much and some half, by what is reached for each trained number
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.errors import PlanError
from sparsify.files.strict_json import short
from sparsify.plan import S2FT, LoRA, PaCA, Plan, Quantize, RoSA, Rule
from sparsify.planner.sensitivity import Field, Sensitivity, Units, unit_squares
from sparsify.planner.shallow import Repeat
from sparsify.program.unit_budget import unit_counts

SIZES: dict[str, tuple[float, ...]] = {
    "S2FT": (0.005, 0.01, 0.02, 0.03, 0.06, 0.12),
    "PaCA": (4, 8, 16, 32, 64, 128),
    "RoSA": (4, 8, 16, 32, 64),
    "LoRA": (4, 8, 16, 32, 64, 128),
}
"""What the methods' papers and the habits of the field use, and twice that; more is no adapter any more."""
DENSITY = 0.0004  # of RoSA's sparse part, for each rank: 16 and 0.64 %, as in the paper
LEVELS = ((None, False), (None, True), ("int8", False), ("int8", True), ("nf4", False), ("nf4", True))
"""(format of the base, blocks computed again): what is given up, one after the other, when nothing fits. Recomputing costs time and no
accuracy, eight bits hardly any, four bits some."""


NO_METHOD = {
    "prune": "zeros take as much memory and time in a training step as other numbers, so that no budget is met by them; for inference "
    "Prune(sparsity, allocation='sensitivity') shares a sparsity out over layers by what each loses on calibration batches",
    "quantize": "the base is packed by itself where nothing fits without (int8, then nf4)",
}
"""Rules that users name here, and why they are not chosen among."""


@dataclass(frozen=True)
class Candidate:
    """size: a rank, for S2FT the share of O and Down. reach: share of the squared gradient. lora_rank: of an export, None for no LoRA.

    memory: bytes at the peak of one process; step: seconds of a step; total: seconds of the training; None where not looked at.
    estimated: memory or step lie between those of a smaller and a larger size. refused: why it is not the plan; empty for the plan.
    """

    method: str
    size: float
    base: str | None
    recompute: bool
    reach: float
    lora_rank: int | None
    memory: int | None = None
    step: float | None = None
    total: float | None = None
    estimated: bool = False
    refused: str = ""

    @property
    def what(self) -> str:
        size = f"{self.size:.2%} of O and Down" if self.method == "S2FT" else f"rank {self.size:.0f}"
        return f"{self.method}, {size}" + (
            f", {self.size * DENSITY:.2%} of the entries" if self.method == "RoSA" else ""
        )

    @property
    def over(self) -> str:
        """What it trains over, and how."""
        return (self.base or "as it is") + (", recomputing" if self.recompute else "")


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Raises PlanError for words that are no method of SIZES."""
    known = {name.lower(): name for name in SIZES}
    for name in methods:
        if not isinstance(name, str) or name.lower() not in known:
            reason = NO_METHOD.get(name.lower(), "") if isinstance(name, str) else ""
            raise PlanError(f"methods: {short(name)} is none of {', '.join(SIZES)}{reason and f': {reason}'}")
    if isinstance(methods, str) or not methods:
        raise PlanError(f"methods={short(methods)}: expected a list of {', '.join(SIZES)}")
    return tuple(dict.fromkeys(known[name.lower()] for name in methods))


class Choices:
    """Plans of every method and size for one model.

    found: what its gradient pass said. max_rank: of an export as LoRA. seed: of the plans.
    """

    def __init__(
        self, field: Field, found: Sensitivity, repeat: Repeat | None, max_rank: int | None, seed: int
    ) -> None:
        self.field, self.found, self.repeat, self.max_rank, self.seed = field, found, repeat, max_rank, seed
        self.whole = sum(found.total(name) for name in field.shapes) or 1.0
        self.squares = {
            unit.row.name: unit_squares(unit, found).sort(descending=True).values.cumsum(0) for unit in field.units
        }
        self.groups: dict[tuple[int, str], list[str]] = {}
        for name, shared in field.inputs.items():
            self.groups.setdefault((field.blocks[name], shared), []).append(name)
        self.columns = {
            key: sum(found.columns[name] for name in names).sort(descending=True).values.cumsum(0)  # type: ignore[union-attr]
            for key, names in self.groups.items()
        }

    # --- what can be had at all ---

    def sizes(self, method: str) -> list[float]:
        """Sizes of a method within the rank of an export, ascending; empty where there is none."""
        bound = self.max_rank
        narrow = min((m for _, m in self.field.shapes.values()), default=0)
        if method == "RoSA":
            return [] if bound is not None or not self.found.measured else list(SIZES[method])
        if method == "S2FT":
            return self.s2ft_sizes()
        return [s for s in SIZES[method] if s < narrow and (bound is None or s <= bound)]

    def why_none(self, method: str) -> str:
        """Why `sizes` is empty."""
        if method == "RoSA" and self.max_rank is None:
            return "its entries are chosen by gradients: give calibration batches"
        if method == "RoSA":
            return f"scattered entries are no LoRA of rank {self.max_rank}, or of any"
        if method == "S2FT" and self.field.units:
            least = min(unit.width for unit in self.field.units)
            return f"one of its units has {least} channels, more than rank {self.max_rank}"
        return "no structure was found" if method == "S2FT" else f"no linear takes rank {min(SIZES[method]):.0f}"

    def s2ft_sizes(self) -> list[float]:
        """One size for every different set of units."""
        sizes: dict[tuple[int, ...], float] = {}
        for share in SIZES["S2FT"]:
            counts = tuple(self.counts(share).values())
            if any(counts):
                sizes.setdefault(counts, share)
        return list(sizes.values())

    def counts(self, share: float) -> dict[str, int]:
        """Units of every structure for a share of O and Down, as S2FT counts them, within the rank of an export."""
        found = unit_counts([unit.row for unit in self.field.units], share, "parameters")
        if self.max_rank is None:
            return found
        return {unit.row.name: min(found[unit.row.name], self.max_rank // unit.width) for unit in self.field.units}

    # --- what it reaches ---

    def candidate(self, method: str, size: float, base: str | None, recompute: bool) -> Candidate:
        reach = sum(
            self.gain(method, block, self.level(method, size, 1.0)) for block in set(self.field.blocks.values())
        )
        if method == "S2FT":
            counts = self.counts(size)
            reach = sum(self.of_units(unit, counts[unit.row.name]) for unit in self.field.units)
        return Candidate(method, size, base, recompute, reach / self.whole, self.lora_rank(method, size))

    def lora_rank(self, method: str, size: float) -> int | None:
        """The rank that the weight which changes most needs as LoRA."""
        if method != "S2FT":
            return None if method == "RoSA" else round(size)
        counts = self.counts(size)
        return max((counts[unit.row.name] * unit.width for unit in self.field.units), default=0)

    def level(self, method: str, size: float, times: float) -> float:
        """A size times a level: a whole number of one at least, and within the rank of an export."""
        largest = self.max_rank if self.max_rank is not None else max(SIZES[method]) * 2
        return size if times == 1.0 else max(1.0, min(round(size * times), largest))

    def gain(self, method: str, block: int, size: float) -> float:
        """Squared gradient that a linear rule of a size reaches in one block."""
        rank, found = round(size), 0.0
        if method == "S2FT":
            return 0.0
        for key, names in self.groups.items():
            if key[0] != block:
                continue
            if method == "PaCA":
                sums = self.columns[key]
                found += (
                    float(sums[min(rank, len(sums)) - 1])
                    if self.found.measured
                    else float(sums[-1]) * min(1.0, rank / len(sums))
                )
                continue
            for name in names:
                share = min(1.0, rank / self.field.shapes[name][1])
                sparse = self.found.in_entries(name, size * DENSITY) if method == "RoSA" else 0.0
                found += self.found.total(name) * (sparse + share * (1 - sparse))
        return found

    def of_units(self, unit: Units, count: int) -> float:
        sums = self.squares[unit.row.name]
        if not count or not len(sums):
            return 0.0
        return float(sums[min(count, len(sums)) - 1])

    # --- as plans ---

    def uniform(self, candidate: Candidate) -> Plan:
        """The candidate with the same in every block."""
        if candidate.method != "S2FT":
            return self.plan(candidate, [self.rule(candidate.method, candidate.size, None)])
        select: dict[str, Any] = {"select": "gradient", "largest": True} if self.found.measured else {}
        if self.max_rank is None:
            return self.plan(candidate, [S2FT(candidate.size, **select)])
        counts = self.counts(candidate.size)
        kinds: dict[str, int] = {}
        for unit in self.field.units:  # a small share leaves some blocks without a unit
            kinds[unit.row.kind] = max(kinds.get(unit.row.kind, 0), counts[unit.row.name])
        rules = [S2FT(structure=kind, units=count, **select) for kind, count in kinds.items() if count]  # type: ignore[arg-type]
        return self.plan(candidate, rules)

    def plan(self, candidate: Candidate, rules: Sequence[Rule]) -> Plan:
        packed = [Quantize(candidate.base)] if candidate.base else []
        return Plan([*rules, *packed], seed=self.seed)

    def rule(self, method: str, size: float, table: dict[str, float] | None) -> Rule:
        """A linear rule of a size, or of the size that a table has for each block."""
        ranks: Any = round(size) if table is None else {pattern: round(s) for pattern, s in table.items()}
        if method == "RoSA":
            density: Any = size * DENSITY if table is None else {p: round(s * DENSITY, 6) for p, s in table.items()}
            return RoSA(rank=ranks, density=density)
        if method == "PaCA":
            return PaCA(rank=ranks, select="gradient") if self.found.measured else PaCA(rank=ranks)
        return LoRA(rank=ranks)

    def spread(self, candidate: Candidate) -> tuple[Plan, float] | None:
        """The candidate's units or ranks spread over blocks by the gradient pass, and what that reaches; None where nothing is gained."""
        if self.repeat is None or not self.found.measured:
            return None
        method, size = candidate.method, candidate.size
        if method == "S2FT":
            return self.spread_units(candidate)
        blocks = sorted(set(self.field.blocks.values()))
        levels = (self.level(method, size, 0.5), size, self.level(method, size, 2.0))
        gains = {b: [self.gain(method, b, level) for level in levels] for b in blocks}
        chosen = shared_out(gains, levels, size * len(blocks))
        table = {
            pattern_of(self.repeat, [b for b in blocks if chosen[b] == n]): levels[n]
            for n in range(3)
            if n in chosen.values()
        }
        reach = sum(gains[b][n] for b, n in chosen.items()) / self.whole
        if len(table) < 2 or reach <= candidate.reach:
            return None
        return self.plan(candidate, [self.rule(method, size, table)]), reach

    def spread_units(self, candidate: Candidate) -> tuple[Plan, float] | None:
        assert self.repeat is not None
        counts = self.counts(candidate.size)
        rules: list[Rule] = []
        reach = 0.0
        for kind in dict.fromkeys(unit.row.kind for unit in self.field.units):
            units = [unit for unit in self.field.units if unit.row.kind == kind and counts[unit.row.name]]
            if not units:
                continue
            count = counts[units[0].row.name]
            most = min(2 * count, units[0].row.units if self.max_rank is None else self.max_rank // units[0].width)
            levels = (max(1, count // 2), count, max(count, most))
            gains = {unit.block: [self.of_units(unit, level) for level in levels] for unit in units}
            chosen = shared_out(gains, levels, count * len(units))
            reach += sum(gains[b][n] for b, n in chosen.items())
            for n in sorted(set(chosen.values())):
                match = pattern_of(self.repeat, [b for b in chosen if chosen[b] == n])
                rules.append(S2FT(structure=kind, units=levels[n], match=match, select="gradient", largest=True))  # type: ignore[arg-type]
        if reach / self.whole <= candidate.reach:
            return None
        return self.plan(candidate, rules), reach / self.whole


def shared_out(gains: dict[int, list[float]], costs: Sequence[float], budget: float) -> dict[int, int]:
    """Level of every block: the upgrades that gain most for what they cost, from the lowest level on, while the budget lasts."""
    chosen = dict.fromkeys(gains, 0)
    left = budget - costs[0] * len(gains)
    waiting = [upgrade(gains, costs, block, 0) for block in gains]
    heapq.heapify(waiting)
    while waiting:
        _, block, level = heapq.heappop(waiting)
        price = costs[level] - costs[level - 1]
        if price > left + 1e-9:
            continue
        chosen[block], left = level, left - price
        if level + 1 < len(costs):
            heapq.heappush(waiting, upgrade(gains, costs, block, level))
    return chosen


def upgrade(gains: dict[int, list[float]], costs: Sequence[float], block: int, level: int) -> tuple[float, int, int]:
    """(minus what the next level gains for each unit of cost, block, next level): ties go to the lower block."""
    price = max(costs[level + 1] - costs[level], 1e-12)
    return -(gains[block][level + 1] - gains[block][level]) / price, block, level + 1


def pattern_of(repeat: Repeat, blocks: Sequence[int]) -> str:
    """`model.layers.{0-3,7}.*`: everything in some blocks."""
    spans: list[list[int]] = []
    for number in sorted(blocks):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"{repeat.path}.{{{text}}}.*"


def between(x: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """The value at x on the line through (x, value) of a smaller and a larger size."""
    if high[0] == low[0]:
        return low[1]
    return low[1] + (high[1] - low[1]) * (x - low[0]) / (high[0] - low[0])


def replaced(candidate: Candidate, **changes: Any) -> Candidate:
    return dataclasses.replace(candidate, **changes)


__all__ = ["DENSITY", "LEVELS", "SIZES", "Candidate", "Choices", "between", "check_methods", "replaced"]
