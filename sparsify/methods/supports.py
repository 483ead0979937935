"""Supports of sparse parts that are chosen after the host was made: RoSA's schedule, and checkpoints that bring a mask.

open mask (index −1, values silent) ──set_masks──▶ the collected entries, values at the base
                                    ──Adopt──────▶ those of a state dict
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.methods.part import LivePart, TrainedPart
from sparsify.methods.sparse_lowrank import LowRankPart, activate_support, current_index, flat_places
from sparsify.model.sharded import whole_parameters
from sparsify.modules.adapted import AdaptedMixin
from sparsify.modules.layout import Layout
from sparsify.program import Program

if TYPE_CHECKING:
    from jaxtyping import Int


class OfHost(Protocol):
    """What is asked of a handle: its program, which a new support changes, its parts, and how their modules lie."""

    program: Program
    parts: dict[str, LivePart[TrainedPart, AdaptedMixin]]

    def layout(self, param: str) -> Layout: ...


def open_masks(program: Program) -> list[str]:
    """Weights whose mask is still to be collected."""
    return [p.param for p in program.lowranks if p.count and p.index is None]


def set_masks(handle: OfHost, supports: Mapping[str, Int[Tensor, " k"]]) -> None:
    """Fix supports, flat entries of each stored weight in original coordinates; the values start at the base.

    Raises SparsifyError for a weight without a sparse part, and for entries that are too few, double, or outside of the weight.
    """
    for param, original in supports.items():
        part = handle.parts.get(param)
        if not isinstance(part, LowRankPart) or not part.part.count:
            raise SparsifyError(f"set_masks: {param} has no sparse part")
        if original.unique().numel() != part.part.count or int(original.min()) < 0:
            raise SparsifyError(f"set_masks: {param} needs {part.part.count} distinct entries, got {original.numel()}")
        if int(original.max()) >= part.module.stored_shape().numel():
            raise SparsifyError(f"set_masks: an entry of {param} lies outside its weight")
        with whole_parameters(part.module, keep=True):
            place(handle, part, *current_index(handle.program, param, original.cpu(), part.module.stored_shape()))


def place(handle: OfHost, part: LowRankPart, index: Int[Tensor, " k"], original: Int[Tensor, " k"]) -> None:
    handle.program = activate_support(handle.program, part.place(index, original))


def reset_lowrank(parts: Mapping[str, LivePart[TrainedPart, AdaptedMixin]]) -> None:
    """Back to the initial factors (`B` = 0), and to the base under the supports."""
    for part in parts.values():
        if isinstance(part, LowRankPart):
            with whole_parameters(part.module, keep=True):
                part.reset()


@dataclass
class Adopt:
    """Called while a checkpoint is loaded whose support differs from the module's (a mask collected before it was saved)."""

    handle: OfHost
    param: str

    def part(self) -> LowRankPart:
        part = self.handle.parts[self.param]
        assert isinstance(part, LowRankPart)
        return part

    def known(self) -> Int[Tensor, " k"] | None:
        return self.part().part.index

    def __call__(self, index: Int[Tensor, " k"]) -> None:
        part = self.part()
        index = index.cpu()
        shape = part.module.stored_shape()
        places = list(torch.unravel_index(index.long(), shape))
        for axis, move in self.handle.layout(self.param).moves.get("weight", []):
            places[axis] = move[places[axis]]
        place(self.handle, part, index, flat_places(places, shape))


__all__ = ["Adopt", "open_masks", "reset_lowrank", "set_masks"]
