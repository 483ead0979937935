"""Low-rank factors of many adapters (LoRA, RoSA), one adapter a token: `y += (x Aᵀ) B`, the scale in B.

The layout of the arguments is `sparsify.ops.adapter_tables`'s; ranks may all differ. `oracle` is the same in fp64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sparsify.library import LIBRARY
from sparsify.ops.adapter_tables import SCHEMA, implement, need_range

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def product(
    x: Float[Tensor, "t m"], values: Float[Tensor, " V"], places: Int[Tensor, " P"], at: tuple[int, int, int], n: int
) -> Float[Tensor, "t n"]:
    start, rank, _ = at
    m = x.shape[1]
    need_range("adapter_lowrank", "values", start, rank * (m + n), values.numel())
    middle = start + rank * m
    return (x @ values[start:middle].view(rank, m).t()) @ values[middle : middle + rank * n].view(rank, n)


LIBRARY.define("adapter_lowrank" + SCHEMA)
oracle = implement("lowrank", product)

__all__ = ["oracle"]
