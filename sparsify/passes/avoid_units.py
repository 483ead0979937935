"""Avoid units: those that saved adapters train are left alone, so that a new adapter shares none with them and can be fused with them.

S2FT(units=12, avoid=["math/"])  over ffn of 44 channels, of which math/ trains {3, 17, …}  ──▶  12 of the other 32

A unit is taken when one of its channels, in a weight that the rule trains, is changed by one of the adapters: a trained channel, a single
entry in it, or everything (a low-rank part, channels across, a parameter that trained in full).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.adapters import adapter as files
from sparsify.adapters.adapter import Adapter, Delta
from sparsify.errors import PlanError
from sparsify.plan import S2FT
from sparsify.program import Program
from sparsify.program.structure import Site


def read_adapters(rule: S2FT, index: int) -> list[Adapter]:
    """The adapters that the rule avoids. Raises PlanError for folders that cannot be read as ours."""
    found = []
    for folder in rule.avoid:
        try:
            found.append(files.load(folder))
        except files.AdapterError as error:
            raise PlanError(f"rule {index}, avoid={folder!r}: {error}") from error
    return found


def taken_units(
    program: Program, adapters: Sequence[Adapter], sites: Sequence[tuple[Site, Tensor]], units: int
) -> Tensor:
    """Which units the adapters change, bool `(units,)`. sites: each with the channels of every unit, `(units, channels per unit)`."""
    taken = torch.zeros(units, dtype=torch.bool)
    for site, channels in sites:
        shape = program.tensor(site.param).shape
        for adapter in adapters:
            for delta in adapter.deltas:
                if delta.param == site.param:
                    taken |= touched(delta, site.axis, shape)[channels].any(1)
    return taken


def touched(delta: Delta, axis: int, shape: torch.Size) -> Tensor:
    """Channels on an axis of the stored weight in which the delta changes something, bool `(shape[axis],)`."""
    found = torch.zeros(shape[axis], dtype=torch.bool)
    if delta.kind in ("column", "row") and delta.axis == axis and len(shape) == 2:
        found[delta.channels] = True
    elif delta.kind == "sparse":
        found[torch.unravel_index(delta.channels, shape)[axis]] = True
    else:
        found[:] = True
    return found


def free_only(scores: Tensor, taken: Tensor, count: int, where: str, *, largest: bool) -> Tensor:
    """Scores in which taken units come last. Raises PlanError where fewer than `count` units are free."""
    free = int((~taken).sum())
    if count > free:
        raise PlanError(
            f"{where}: {count} units are to train, and the adapters to avoid leave {free} of {taken.numel()}: ask for fewer, or avoid fewer"
        )
    return scores.masked_fill(taken, float("-inf") if largest else float("inf"))
