"""Permutations as frozen values: a group with inverse and composition, expanded over a site to channel indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.program.structure import Site

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True)
class Permutation:
    """`order[new] = old`: after applying, unit `old` stands at place `new`.

    `orders` has one tuple per index of the site's outermost loops, or a single tuple that serves all of them (grouped
    query heads are reordered inside each group on their own, everything else alike in all repeats).
    """

    orders: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.orders:
            raise SparsifyError("a permutation needs at least one order")
        size = len(self.orders[0])
        for order in self.orders:
            if sorted(order) != list(range(size)):
                raise SparsifyError(f"not a permutation of 0…{size - 1}: {order}")

    @classmethod
    def of(cls, order: list[int] | tuple[int, ...] | Int[Tensor, "*repeats units"]) -> Permutation:
        """From one order `(units,)`, or one order per repeat `(repeats, units)`."""
        if isinstance(order, Tensor):
            rows = order.tolist() if order.dim() == 2 else [order.tolist()]
            return cls(tuple(tuple(row) for row in rows))
        return cls((tuple(order),))

    @classmethod
    def identity(cls, size: int) -> Permutation:
        return cls((tuple(range(size)),))

    @property
    def size(self) -> int:
        return len(self.orders[0])

    def is_identity(self) -> bool:
        return all(order == tuple(range(self.size)) for order in self.orders)

    def inverse(self) -> Permutation:
        inverted = []
        for order in self.orders:
            row = [0] * self.size
            for new, old in enumerate(order):
                row[old] = new
            inverted.append(tuple(row))
        return Permutation(tuple(inverted))

    def then(self, other: Permutation) -> Permutation:
        """Apply `self`, then `other`."""
        if self.size != other.size:
            raise SparsifyError(f"cannot compose permutations of {self.size} and {other.size} units")
        count = max(len(self.orders), len(other.orders))
        if any(len(p.orders) not in (1, count) for p in (self, other)):
            raise SparsifyError("cannot compose permutations over different numbers of repeats")
        first, second = self.orders * (count // len(self.orders)), other.orders * (count // len(other.orders))
        return Permutation(tuple(tuple(a[i] for i in b) for a, b in zip(first, second, strict=True)))

    def expand(self, site: Site, length: int) -> Int[Tensor, " c"]:
        """Channel index of the whole axis: `new_tensor = old_tensor.index_select(site.axis, index)`; int64 `(length,)`."""
        index = torch.arange(length, dtype=torch.int64)
        places = site.positions(self.size)
        order = torch.tensor(self.orders, dtype=torch.int64)
        if places.shape[0] % order.shape[0]:
            raise SparsifyError(f"{len(self.orders)} orders for {places.shape[0]} repeats at {site}")
        if int(places.max()) >= length:
            raise SparsifyError(f"{site} reaches past the end of an axis of {length} channels")
        order = order.repeat_interleave(places.shape[0] // order.shape[0], dim=0)
        index[places.reshape(-1)] = places.gather(1, order.unsqueeze(-1).expand_as(places)).reshape(-1)
        return index


def invert_index(index: Int[Tensor, " c"]) -> Int[Tensor, " c"]:
    """Inverse of a channel index `(length,)` as made by `Permutation.expand`."""
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(index.numel(), dtype=index.dtype)
    return inverse
