"""How much of the squared gradient of the calibration loss lies where: one pass, one number for each column of each linear.

    column_j = Σ_batches Σ_i (dW_ij)²      the diagonal of the empirical Fisher information, summed over the outputs of a column

What a method reaches of it, at the start of training and to first order, is the share of the loss's squared gradient that its trained
coordinates have: whole columns for S2FT and PaCA, the largest entries for RoSA, and r/m of all for rank-r factors with a random A on m
inputs (E‖G AᵀA‖² ∝ r/m, as B starts at zero). It says nothing of where A turns to later, so it is a criterion for choosing, no prediction
of accuracy. Without calibration batches every entry counts alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sparsify.api import analyse
from sparsify.calibration.checks import column_squares
from sparsify.calibration.statistics import gradient_statistics
from sparsify.model.linears import owner_name
from sparsify.passes.select_linears import input_root
from sparsify.passes.select_units import consumer_row
from sparsify.planner.shallow import Repeat, skeleton
from sparsify.program.selection import unit_channels
from sparsify.program.structure import Site, Structure
from sparsify.program.unit_budget import Row

if TYPE_CHECKING:
    from jaxtyping import Float

    from sparsify.calibration.statistics import Loss
    from sparsify.program.values import Batch

SAMPLE = 1 << 16
"""Entries of a gradient by which it is judged how much of it the largest have."""


@dataclass(frozen=True)
class Units:
    """The units of one structure that S2FT could train. width: input channels of one; sites: (weight, its consumer site)."""

    row: Row
    block: int
    width: int
    structure: Structure
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Field:
    """Where a plan can train: linears inside of blocks.

    shapes: weight → (outputs, inputs). inputs: weight → what it shares its input with (a name). blocks: weight → number of its block.
    units: S2FT's structures. heads: whether heads of attention are among them.
    """

    shapes: dict[str, tuple[int, int]]
    inputs: dict[str, str]
    blocks: dict[str, int]
    units: tuple[Units, ...]


@dataclass
class Sensitivity:
    """columns: weight → squares by input column, fp64 (inputs,). entries: weight → squares of a sample of entries, largest first, as
    shares of their sum. measured: False where every entry counts alike."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    entries: dict[str, Tensor] = field(default_factory=dict)
    measured: bool = False

    def total(self, weight: str) -> float:
        return float(self.columns[weight].sum())

    def in_entries(self, weight: str, density: float) -> float:
        """Share of a weight's squared gradient that its largest entries have."""
        shares = self.entries[weight]
        return float(shares[: round(density * shares.numel())].sum()) if self.measured else density


def field_of(model: nn.Module, repeat: Repeat | None) -> Field:
    """The linears and structures of a model, from the trace of its twin; blocks that are not in it are like the middle one."""
    program = analyse(skeleton(model, repeat))
    shapes: dict[str, tuple[int, int]] = {}
    inputs: dict[str, str] = {}
    blocks: dict[str, int] = {}
    roots: dict[fx.Node, str] = {}
    head = head_weight(program.host)
    for linear in program.linears():
        weight, tensor = linear.weight, program.tensor(linear.weight)
        if tensor.dim() != 2 or weight in shapes or tensor is head:
            continue
        m = tensor.shape[linear.in_axis]
        shapes[weight] = (tensor.numel() // m, m)
        inputs[weight] = roots.setdefault(input_root(linear.x), weight)
    units = tuple(
        Units(consumer_row(program, s), 0, unit_width(s), s, s.consumers)
        for s in program.structures
        if s.kind in ("ffn", "attention") and s.consumers and all(site.param in shapes for site in s.consumers)
    )
    if repeat is None:
        return Field(shapes, inputs, dict.fromkeys(shapes, 0), units)
    return spread_out(Field(shapes, inputs, blocks, units), repeat)


def head_weight(model: Any) -> Tensor | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "weight", None)


def unit_width(structure: Structure) -> int:
    """Input channels of one unit: the rank that it needs as LoRA."""
    return max(unit_channels(site, structure).shape[1] for site in structure.consumers)


def spread_out(twin: Field, repeat: Repeat) -> Field:
    """The middle block's entries once for every block of the model."""
    typical = f"{repeat.typical}."

    def named(name: str, number: int) -> str:
        return f"{repeat.block(number)}.{name.removeprefix(typical)}" if name.startswith(typical) else name

    inside = [name for name in twin.shapes if name.startswith(typical)]
    shapes, inputs, blocks, units = {}, {}, {}, []
    for number in range(repeat.blocks):
        for name in inside:
            full = named(name, number)
            shapes[full], inputs[full], blocks[full] = twin.shapes[name], named(twin.inputs[name], number), number
        for unit in twin.units:
            if unit.row.name == repeat.typical or unit.row.name.startswith(typical):
                row = Row(
                    named(unit.row.name, number) if unit.row.name != repeat.typical else repeat.block(number),
                    unit.row.kind,
                    unit.row.units,
                    unit.row.cost,
                )
                sites = tuple(
                    Site(named(s.param, number), s.axis, s.block, s.offset, s.outer, s.stride, s.role)
                    for s in unit.sites
                )
                units.append(Units(row, number, unit.width, unit.structure, sites))
    return Field(shapes, inputs, blocks, tuple(units))


def uniform(field: Field) -> Sensitivity:
    """Every entry of every weight counts alike."""
    return Sensitivity({name: torch.full((m,), float(n), dtype=torch.float64) for name, (n, m) in field.shapes.items()})


def measure(
    model: nn.Module, field: Field, batches: Sequence[Batch], loss: Loss | None = None, progress: bool = True
) -> Sensitivity:
    """One gradient pass over calibration batches. Raises what `gradient_statistics` raises."""
    modules: Mapping[str, nn.Module] = {name: model.get_submodule(owner_name(name)) for name in field.shapes}
    found = Sensitivity(measured=True)

    def reduce(name: str, gradient: Float[Tensor, "n m"]) -> None:
        columns, entries = column_squares(gradient).cpu(), largest_first(gradient)
        found.columns[name] = found.columns[name] + columns if name in found.columns else columns
        found.entries[name] = found.entries[name] + entries if name in found.entries else entries

    gradient_statistics(model, modules, batches, reduce, loss, progress)
    found.entries = {name: shares / shares.sum() for name, shares in found.entries.items()}
    return found


def largest_first(gradient: Float[Tensor, "n m"]) -> Float[Tensor, " sample"]:
    """Squares of evenly spread entries, sorted: how concentrated a gradient is."""
    flat = gradient.reshape(-1)
    step = max(1, flat.numel() // SAMPLE) | 1  # odd, so that no column is met alone
    return flat[::step].double().square().sort(descending=True).values.cpu()


def unit_squares(unit: Units, found: Sensitivity) -> Float[Tensor, " units"]:
    """Squared gradient of each unit's columns, over all its consumers."""
    channels = [unit_channels(site, unit.structure) for site in unit.structure.consumers]
    return sum(
        (found.columns[site.param].double()[c].sum(1) for site, c in zip(unit.sites, channels, strict=True)),
        torch.zeros(()),
    )


__all__ = ["Field", "Sensitivity", "Units", "field_of", "measure", "uniform", "unit_squares"]
