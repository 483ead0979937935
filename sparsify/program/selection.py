"""Selection: which heads and channels train. Scores per unit, then a choice that co-permutation can make contiguous."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.program.structure import Site, Structure

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the plan's seed and on the name only: equal on every rank and machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def random_scores(seed: int, name: str, units: int) -> Float[Tensor, " units"]:
    return torch.rand(units, generator=generator(seed, name), dtype=torch.float64)


def unit_norms(squares: Float[Tensor, " channels"], site: Site, structure: Structure) -> Float[Tensor, " units"]:
    """Sum per-channel squares `(length,)` over the channels of each selectable unit, then take the root.

    Selectable units are query heads where the structure has an `inner` one (in the order group · heads + head), else the structure's own.
    """
    channels = unit_channels(site, structure)
    return squares.double().to("cpu")[channels].sum(1).sqrt()


def unit_channels(site: Site, structure: Structure) -> Int[Tensor, "units per_unit"]:
    """Channels of every selectable unit of a consumer or producer site, int64 `(selectable units, channels per unit)`."""
    inner = structure.inner
    if inner is not None:
        for fine in inner.sites:
            if (fine.param, fine.axis, fine.role) == (site.param, site.axis, site.role):
                places = fine.positions(inner.units)
                repeats, heads, block = places.shape
                rest = repeats // structure.units
                by_group = places.view(structure.units, rest, heads, block).permute(0, 2, 1, 3)
                return by_group.reshape(structure.units * heads, rest * block)
    places = site.positions(structure.units)
    return places.permute(1, 0, 2).reshape(structure.units, -1)


def selectable_units(structure: Structure) -> int:
    """Number of units that can be chosen on the consumer side: query heads, or channels."""
    return structure.units * (structure.inner.units if structure.inner is not None else 1)


def choose(scores: Float[Tensor, " units"], count: int, *, group: int = 1, largest: bool = True) -> tuple[int, ...]:
    """Ids of `count` units: the best whole groups, and the best of one more group for the remainder.

    scores: `(units,)`; group: units that can only be contiguous together (query heads of a KV group), 1 for none. Ties go to the lower id.
    """
    values = scores.double() if largest else -scores.double()
    count = min(count, values.numel())
    groups = values.view(-1, group)
    whole, rest = divmod(count, group)
    order = groups.mean(1).sort(descending=True, stable=True).indices.tolist()
    chosen = [g * group + i for g in order[:whole] for i in range(group)]
    if rest:
        best = groups[order[whole:]].sort(dim=1, descending=True, stable=True)
        winner = int(best.values[:, :rest].mean(1).argmax())
        g = order[whole:][winner]
        chosen += [g * group + int(i) for i in best.indices[winner, :rest]]
    return tuple(sorted(chosen))


def arrange(
    structure: Structure, consumers: Sequence[int], producers: Sequence[int]
) -> tuple[list[int], list[list[int]] | None]:
    """Orders that make both trained sets contiguous: [producers only][both][consumers only][rest].

    Returns the order of the structure's units, and under grouped-query attention one order of query heads per *new* place of a
    group. There `consumers` are query heads; whole groups and one partial group per boundary stay contiguous.
    """
    chosen, makers = set(consumers), set(producers)
    if structure.inner is None:
        units = range(structure.units)
        order = [u for u in units if u in makers and u not in chosen]
        order += [u for u in units if u in makers and u in chosen]
        order += [u for u in units if u not in makers and u in chosen]
        return order + [u for u in units if u not in makers and u not in chosen], None
    size = structure.inner.units
    picked = {g: [j for j in range(size) if g * size + j in chosen] for g in range(structure.units)}
    full = {g for g, heads in picked.items() if len(heads) == size}
    partial = {g for g, heads in picked.items() if 0 < len(heads) < size}
    classes = [
        [g for g in range(structure.units) if g in makers and g not in full | partial],
        [g for g in partial if g in makers],
        [g for g in range(structure.units) if g in makers and g in full],
        [g for g in range(structure.units) if g not in makers and g in full],
        [g for g in partial if g not in makers],
    ]
    order = [g for group in classes for g in sorted(group)]
    order += [g for g in range(structure.units) if g not in set(order)]
    leading = set(classes[1])
    inner = []
    for g in order:
        heads, others = picked[g], [j for j in range(size) if j not in picked[g]]
        inner.append(others + heads if g in leading else heads + others)
    return order, inner


def index_dtype(shape: torch.Size) -> torch.dtype:
    """Wide enough for every flat position of a weight."""
    return torch.int64 if shape.numel() > torch.iinfo(torch.int32).max else torch.int32
