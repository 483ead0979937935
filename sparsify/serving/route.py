"""Which row of a batch computes with which slot: made once for a call, shared by every layer and step of it.

A thread's forwards follow the route that it has set; threads do not see each other's. Tensors of a route are plain inputs of compiled
graphs, so one graph serves every layout of names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsify.ops.adapter_tables import KINDS

#: bits of one weight → the kinds of addends
COMBINED = tuple(tuple(kind for k, kind in enumerate(KINDS) if bits >> k & 1) for bits in range(1 << len(KINDS)))


class Route:
    """Rows sorted by slot (`sparsify.ops.adapter_tables`). bits: which kinds of addends some row needs at which weight (`Image.bits`).

    packed: the rows may be the tokens of a batch `(1, T)`.
    """

    def __init__(
        self, slots: Sequence[int] | Tensor, count: int, bits: int, device: torch.device, packed: bool
    ) -> None:
        self.packed = packed
        slot = torch.as_tensor(slots, dtype=torch.int64).cpu()
        self.uniform = bool((slot == slot[:1]).all())
        offs = torch.zeros(count + 2, dtype=torch.int64)
        offs[1:] = torch.bincount(slot, minlength=count + 1).cumsum(0)
        self.order, self.offs = slot.argsort(stable=True).to(device), offs.to(device)
        self.bits = bits

    def kinds(self, number: int) -> tuple[str, ...]:
        """Kinds of addends that some row needs at a weight."""
        return COMBINED[self.bits >> len(KINDS) * number & len(COMBINED) - 1]


class Routing(threading.local):
    """What this thread's forwards follow; None: the base, without a look at any table."""

    route: Route | None = None


@contextmanager
def following(routing: Routing, route: Route | None) -> Iterator[None]:
    before = routing.route
    routing.route = route
    try:
        yield
    finally:
        routing.route = before


__all__ = ["Route", "Routing", "following"]
