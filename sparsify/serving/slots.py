"""Slots: the flat tensors in which live adapters lie, and the table that says where. Shapes never change; slot 0 is the base.

memory (bytes) ──┬── values, in one floating type          an adapter takes one stretch of it: its values, then its places
                 └── places, int32                         table (weights, kinds, slots, 3) points there
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import AdapterError
from sparsify.ops.dispatch import LIMIT
from sparsify.serving.addends import KINDS, Image

ALIGN = 64  # bytes


class Slots:
    """`count` slots besides the base's, over `nbytes` of memory. Whoever calls holds the store's lock."""

    def __init__(self, weights: int, count: int, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.settings = (weights, count, nbytes, dtype, device)
        self.count, self.dtype = count, dtype
        nbytes = nbytes // ALIGN * ALIGN
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.values, self.places = self.memory.view(dtype), self.memory.view(torch.int32)
        self.table = torch.zeros(max(weights, 1), len(KINDS), count + 1, 3, dtype=torch.int64, device=device)
        self.free_slots = list(range(count, 0, -1))
        self.free = [(0, nbytes)]  # stretches, sorted, never touching each other
        self.taken: dict[int, tuple[int, int, Image]] = {}

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    @property
    def used(self) -> int:
        return sum(size for _, size, _ in self.taken.values())

    def tables(self, number: int) -> dict[str, Tensor]:
        """Kind → the table (slots, 3) of one weight: views, which stay where they are."""
        return {kind: self.table[number, k] for k, kind in enumerate(KINDS)}

    @staticmethod
    def sizes(image: Image) -> tuple[int, int]:
        """Bytes of an image's values and of all of it, as it lies here."""
        values = -(-image.values.nbytes // ALIGN) * ALIGN
        return values, values + -(-image.places.nbytes // ALIGN) * ALIGN

    def check(self, name: str, image: Image) -> None:
        """Raise AdapterError for an adapter that can never fit."""
        needed = self.sizes(image)[1]
        if needed > self.nbytes:
            raise AdapterError(
                f"{name} takes {needed:,} bytes, and the budget of the slots is {self.nbytes:,}: raise budget=…"
            )

        ranks = [count for (_, kind), (_, count, _) in image.entries.items() if kind == "lowrank"]
        if self.memory.is_cuda and max(ranks, default=0) > LIMIT:
            raise AdapterError(f"{name} has factors of rank {max(ranks)}; on a GPU they may have {LIMIT} at most")

    def fits(self, images: list[Image], without: list[int]) -> bool:
        """Whether these fit once the slots in `without` are given back."""
        if len(images) > len(self.free_slots) + len(without):
            return False
        free = merged(self.free + [self.taken[slot][:2] for slot in without])
        for image in images:
            found = take(free, self.sizes(image)[1])
            if found is None:
                return False
        return True

    def publish(self, image: Image) -> int:
        """Copy an image in and point the table at it; no token names the slot before this returns. Returns the slot."""
        values, size = self.sizes(image)
        start = take(self.free, size)
        assert start is not None
        slot = self.free_slots.pop()
        if self.memory.is_cuda:
            torch.cuda.synchronize(self.memory.device)  # what read the last adapter here may still be queued
        first = start // self.values.element_size()
        self.values[first : first + image.values.numel()].copy_(image.values)
        place = (start + values) // 4
        self.places[place : place + image.places.numel()].copy_(image.places)
        if image.entries:
            at = torch.tensor([(n, KINDS.index(kind)) for n, kind in image.entries])
            rows = torch.tensor([(first + v, count, place + p) for v, count, p in image.entries.values()])
            self.table[at[:, 0].to(self.table.device), at[:, 1].to(self.table.device), slot] = rows.to(
                self.table.device
            )
        if self.table.is_cuda:
            torch.cuda.current_stream(self.table.device).synchronize()  # other threads have streams of their own
        self.taken[slot] = (start, size, image)
        return slot

    def release(self, slot: int) -> None:
        """Empty a slot that no running batch names."""
        self.table[:, :, slot] = 0
        start, size, _ = self.taken.pop(slot)
        self.free[:] = merged([*self.free, (start, size)])
        self.free_slots.append(slot)


def merged(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of memory in order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for start, size in sorted(s for s in stretches if s[1]):
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((start, size))
    return found


def take(free: list[tuple[int, int]], size: int) -> int | None:
    """Take `size` bytes from the smallest stretch that has them; where they begin, or None."""
    if size == 0:
        return 0
    best = min((s for s in free if s[1] >= size), key=lambda s: s[1], default=None)
    if best is None:
        return None
    at = free.index(best)
    free[at : at + 1] = [(best[0] + size, best[1] - size)] if best[1] > size else []
    return best[0]


__all__ = ["Slots"]
