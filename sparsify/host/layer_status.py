"""A row for every trained weight: what PEFT's users know as `get_layer_status`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsify.console import one_line, printable

if TYPE_CHECKING:
    from sparsify.host.handle import Handle


@printable
@dataclass(frozen=True)
class LayerStatus:
    """One weight that the plan trains.

    name: its module. kind: what trains there, in words. enabled: whether an adapter is active. active, available: adapters' names. merged:
    whether what is active is folded into the weight. requires_grad: whether it trains now. numbers: trained numbers. devices: where.
    """

    name: str
    kind: str
    enabled: bool
    active: tuple[str, ...]
    available: tuple[str, ...]
    merged: bool
    requires_grad: bool
    numbers: int
    devices: tuple[str, ...]

    def __str__(self) -> str:
        state = "merged" if self.merged else "trains" if self.requires_grad else "frozen"
        return one_line(
            f"{self.name}: {self.kind}, {self.numbers:,} numbers, {state}, active {', '.join(self.active) or 'none'}"
        )


def layer_status(handle: Handle) -> tuple[LayerStatus, ...]:
    """See `Handle.get_layer_status`."""
    active = tuple(handle.active.weights)
    available = tuple(sorted({*handle.adapters, *handle.parked, *(active if handle.active.trainable else ())}))
    found = []
    for param, live in handle.parts.items():
        tensors = list(live.parameters())
        part = next(p for p in handle.program.parts if p.param == param)
        found.append(
            LayerStatus(
                param.rpartition(".")[0],
                part.text(),
                bool(active),
                active,
                available,
                handle.merged,
                any(t.requires_grad for t in tensors),
                sum(t.numel() for t in tensors),
                tuple(sorted({str(t.device) for t in tensors})),
            )
        )
    for param in handle.train:
        own = handle.stored(param)
        facts = (handle.merged, own.requires_grad, own.numel(), (str(own.device),))
        found.append(LayerStatus(param, "in full", bool(active), active, available, *facts))
    return tuple(found)


__all__ = ["LayerStatus", "layer_status"]
