"""What people are shown of a program's layers: units at their present places, which layers look alike, what trains in words.

    structures, declined ──rows_by_layer──▶ {"model.layers.0": [attention, feed-forward], …} ──Looks.bands──▶ layers 0…29 as one

Drawing (`drawing.py`) and inspector (`inspection.py`) show the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from sparsify.methods.channels import TrainedSlice
from sparsify.program import Program
from sparsify.program.repeats import FEWEST, layer_of, replace_layer
from sparsify.program.structure import Declined, Site, Structure

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from sparsify.program import UnitChoice

Slices = Mapping[tuple[str, int], Sequence[TrainedSlice]]
"""Tensor and axis → what trains there."""
Rows = Mapping[str, Sequence[Structure | Declined]]
"""Layer → what stands in it."""
Units = tuple[tuple[int, bool, bool], ...]
"""(original place, of O or Down, of V or Up) of units that train."""


def slices_of(program: Program) -> dict[tuple[str, int], list[TrainedSlice]]:
    """The trained slices of every tensor and axis."""
    found: dict[tuple[str, int], list[TrainedSlice]] = defaultdict(list)
    for piece in program.slices:
        found[piece.param, piece.axis].append(piece)
    return found


def rows_by_layer(program: Program) -> dict[str, list[Structure | Declined]]:
    """What was found and what was declined, by layer."""
    rows: dict[str, list[Structure | Declined]] = defaultdict(list)
    for item in (*program.structures, *program.declined):
        rows[split_layer(item.name)[0]].append(item)
    return rows


@dataclass(frozen=True)
class Cell:
    """One unit at its present place: where it stood in the original model, and what of it trains."""

    original: int
    consumer: bool
    producer: bool


class View:
    """The units of one structure as they stand now: groups of cells, KV groups of query heads or one group of all."""

    def __init__(self, program: Program, structure: Structure, slices: Slices):
        self.program, self.structure, self.slices = program, structure, slices

    @cached_property
    def originals(self) -> Int[torch.Tensor, " units"]:
        """For each present place the unit that stood there originally; query heads run group by group."""
        consumer = self._consumer
        if consumer is None:
            return torch.arange(self.count)
        places = self._places(consumer, self.structure.inner is not None)
        channels = places
        for move in reversed(self.program.moves):
            if (move.param, move.axis) == (consumer.param, consumer.axis):
                channels = move.index[channels]
        unit_at = torch.full((int(torch.cat([places, channels]).max()) + 1,), -1)
        unit_at[places] = torch.arange(len(places))
        found = unit_at[channels]
        return torch.where(found < 0, torch.arange(len(places)), found)

    @cached_property
    def consumers(self) -> Bool[torch.Tensor, " units"]:
        """Which places train as columns of O or Down."""
        chosen = self._chosen
        if chosen is not None:
            return torch.isin(self.originals, torch.tensor(chosen.consumers, dtype=torch.int64))
        consumer = self._consumer
        if consumer is None:
            return torch.zeros(self.count, dtype=torch.bool)
        return self._trained(consumer, self.structure.inner is not None)

    @cached_property
    def producers(self) -> Bool[torch.Tensor, " units"]:
        """Which places train as rows of V or Up: all heads of a KV group that does."""
        structure, chosen = self.structure, self._chosen
        if chosen is not None:
            made = torch.zeros(structure.units, dtype=torch.bool)
            made[torch.tensor(chosen.producers, dtype=torch.int64)] = True
        else:
            producer = next((s for s in structure.producers if self.slices.get((s.param, s.axis))), None)
            made = self._trained(producer, False) if producer else torch.zeros(structure.units, dtype=torch.bool)
        return made.repeat_interleave(self.per_group)

    @property
    def per_group(self) -> int:
        """Cells of one unit: query heads of a KV group."""
        return self.structure.inner.units if self.structure.inner is not None else 1

    @property
    def count(self) -> int:
        return self.structure.inner_units

    @cached_property
    def cells(self) -> list[Cell]:
        columns = (self.originals.tolist(), self.consumers.tolist(), self.producers.tolist())
        return [Cell(*cell) for cell in zip(*columns, strict=True)]

    @property
    def groups(self) -> list[list[Cell]]:
        """The cells of each KV group, or all of them."""
        size = self.per_group if self.structure.inner is not None else self.count
        return [self.cells[i : i + size] for i in range(0, self.count, max(1, size))]

    @property
    def _consumer(self) -> Site | None:
        structure = self.structure
        return next(iter((structure.inner or structure).consumers or structure.sites), None)

    @property
    def _chosen(self) -> UnitChoice | None:
        """The choice, as long as no slices are there to be read."""
        if self.program.slices:
            return None
        return next((c for c in self.program.choices if c.structure == self.structure.name), None)

    def _places(self, site: Site, nested: bool) -> Int[torch.Tensor, " units"]:
        """First channel of every unit, in present order."""
        structure = self.structure.inner if nested else self.structure
        assert structure is not None
        first = site.positions(structure.units)[:, :, 0]
        return first.reshape(-1) if nested else first[0]

    def _trained(self, site: Site, nested: bool) -> Bool[torch.Tensor, " units"]:
        pieces = self.slices.get((site.param, site.axis), ())
        on = [torch.tensor(s.all_places, dtype=torch.int64) for s in pieces]
        return torch.isin(self._places(site, nested), torch.cat(on or [torch.empty(0, dtype=torch.int64)]))


@dataclass(frozen=True)
class Band:
    """One drawn row, which stands for all of `rows`. strips: they train different units, so that each has a strip."""

    rows: tuple[str, ...]
    strips: bool = False


class Looks:
    """How the structures of a program look: what was done to their weights, what trains, and which layers are alike in that."""

    def __init__(self, program: Program, slices: Slices) -> None:
        self.program, self.slices = program, slices
        self.moved = {(m.param, m.axis) for m in program.moves}
        self.choices: dict[str, list[UnitChoice]] = defaultdict(list)
        for choice in program.choices:
            self.choices[choice.structure].append(choice)
        self.marks: dict[str, list[str]] = defaultdict(list)
        for part in program.parts:
            if mark := part.mark():
                self.marks[part.param].append(mark)
        for param, kind in program.quantize.items():
            self.marks[param].append(f"stored as {kind}")

    def view(self, structure: Structure) -> View:
        return View(self.program, structure, self.slices)

    def bands(self, rows: Rows, fold: bool) -> list[Band]:
        """Rows in order, those of one stack that look alike joined at the place of the first."""
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for row, items in rows.items():
            layer = layer_of(row)
            groups[(row,) if layer is None or not fold else self.look(row, items)].append(row)
        order = {row: number for number, row in enumerate(rows)}
        bands = []
        for members in groups.values():
            if len(members) < FEWEST:
                bands += [Band((row,)) for row in members]
                continue
            units = {tuple(self.trained_units(item) for item in rows[row]) for row in members}
            bands.append(Band(tuple(members), strips=len(units) > 1))
        return sorted(bands, key=lambda band: order[band.rows[0]])

    def look(self, row: str, items: Sequence[Structure | Declined]) -> tuple[str, ...]:
        """Everything that a row shows but for its number and which units train: equal for layers that look alike."""
        stack, index = layer_of(row) or ("", 0)
        texts = [stack]
        for item in items:
            if isinstance(item, Declined):
                texts.append("\n".join((str(item), *map(str, item.sites))))
                continue
            sites = (f"{s} {(s.param, s.axis) in self.moved} {self.extras(s.param)}" for s in item.sites)
            texts.append("\n".join((str(item), self.words(item), *sites)))
        return tuple(replace_layer(text, stack, index, "{}") for text in texts)

    def trained_units(self, item: Structure | Declined) -> Units:
        """The units of a structure that train."""
        if isinstance(item, Declined):
            return ()
        view = self.view(item)
        on = view.consumers | view.producers
        columns = (view.originals[on], view.consumers[on], view.producers[on])
        return tuple(zip(*(column.tolist() for column in columns), strict=True))

    def slices_in(self, structure: Structure) -> list[TrainedSlice]:
        """What trains of its tensors, in the order of its sites."""
        places = dict.fromkeys((site.param, site.axis) for site in structure.sites)
        return [piece for place in places for piece in self.slices.get(place, ())]

    def extras(self, param: str) -> str:
        """What else was done to a weight, besides reordering and slicing."""
        return "".join(f", {mark}" for mark in self.marks.get(param, ()))

    def words(self, structure: Structure) -> str:
        """`4 of 44 channels of Down`: what trains; empty for nothing."""
        trained, choices = self.slices_in(structure), self.choices.get(structure.name, [])
        if not choices:
            return f"{sum(s.length for s in trained)} channels train" if trained else ""
        counts = sum(len(c.consumers) for c in choices), sum(len(c.producers) for c in choices)
        owners = ("of Down", "of Up") if structure.kind == "ffn" else ("of O", "of V")
        return ", ".join(
            f"{side} {owner}" for side, owner in zip(structure.chosen_text(*counts), owners, strict=True) if side
        )


def split_layer(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp` → (`model.layers.3`, `mlp`): a row is everything up to the first number."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1]), ".".join(parts[position + 1 :])
    return name, ""


def count_parameters(program: Program) -> tuple[int, int]:
    """(trained, all) parameters; tied ones once. Sizes come from the graph: a quantised host has no dense weights."""
    sizes = {
        i.target: node.meta["val"].numel()
        for i, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True)
        if i.kind == "parameter" and i.target is not None and isinstance(node.meta.get("val"), torch.Tensor)
    }
    names = {name for part in program.parts for name in part.trained_names()}
    trained = sum(size for name, size in sizes.items() if name in names)
    handle = program.host.__dict__.get("sparsify")
    if handle is None:
        return trained, sum(size for name, size in sizes.items() if name not in names)
    return handle.count_parameters()
