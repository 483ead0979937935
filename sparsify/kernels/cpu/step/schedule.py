"""Where buffers lie and where threads meet: from a list of operations to offsets and barriers.

    norm → q, k, v │ rotate, append │ attend │ o │ norm → gate, up │ product │ down │ …        │: all threads meet

A thread goes on alone until it would read what another may still be writing, or write what another may still be reading. Memory is used
again as soon as its last reader is behind a meeting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsify.kernels.cpu.step.operations import Attend, Buffer, Decoder, Operation, Pointwise, Product, reads

ALIGNED = 16  # floats: offsets of buffers are multiples of it


@dataclass
class Heap:
    """Offsets in floats a row. free: (offset, size) that nobody uses; waiting: what is free behind the next meeting."""

    size: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)
    waiting: list[tuple[int, int]] = field(default_factory=list)

    def take(self, width: int) -> tuple[int, int]:
        size = -(-width // ALIGNED) * ALIGNED
        fitting = [hole for hole in self.free if hole[1] >= size]
        if not fitting:
            self.size += size
            return self.size - size, size
        hole = min(fitting, key=lambda h: h[1])
        self.free.remove(hole)
        if hole[1] > size:
            self.free.append((hole[0] + size, hole[1] - size))
        return hole[0], size


@dataclass(frozen=True)
class Schedule:
    """offsets: buffer → floats a row from the start of the shared, or a thread's own, memory. meets: whether all threads meet before
    an operation. shared, own: floats a row in all."""

    offsets: dict[int, int]
    meets: tuple[bool, ...]
    shared: int
    own: int


def schedule(decoder: Decoder) -> Schedule:
    """Place every buffer and every meeting. Between the two halves of an `Attend` the threads meet too, by itself."""
    last: dict[int, int] = {}
    for place, operation in enumerate(decoder.operations):
        for buffer in reads(operation):
            last[buffer.number] = place
    heaps = {True: Heap(), False: Heap()}
    places: dict[int, tuple[int, int]] = {}
    meets: list[bool] = []
    dirty: set[int] = set()
    for place, operation in enumerate(decoder.operations):
        meet = any(buffer.number in dirty for buffer in reads(operation) if buffer.shared)
        if meet or isinstance(operation, Attend):
            dirty.clear()
            heaps[True].free += heaps[True].waiting
            heaps[True].waiting.clear()
        meets.append(meet)
        out = operation.out
        if isinstance(operation, Product | Pointwise) and operation.logits:
            dirty.add(out.number)  # the caller's memory
        else:
            places[out.number] = heaps[out.shared].take(out.width)
            if out.shared:
                dirty.add(out.number)
        for buffer in gone(operation, last, place):
            hole = places[buffer.number]
            (heaps[True].waiting if buffer.shared else heaps[False].free).append(hole)
    offsets = {number: offset for number, (offset, _) in places.items()}
    return Schedule(offsets, tuple(meets), heaps[True].size, heaps[False].size)


def gone(operation: Operation, last: dict[int, int], place: int) -> list[Buffer]:
    """Buffers that nobody reads any more behind this operation."""
    if isinstance(operation, Pointwise) and operation.logits:
        return []
    return [buffer for buffer in dict.fromkeys(reads(operation)) if last[buffer.number] == place]


__all__ = ["Schedule", "schedule"]
