"""Trained output channels of many adapters (S2FT's rows of up, gate, q, k, v), one adapter a token: `y[:, places] += x @ valuesᵀ`.

The layout of the arguments is `sparsify.ops.adapter_tables`'s. `oracle` is the same in fp64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sparsify.library import LIBRARY
from sparsify.ops.adapter_tables import SCHEMA, implement, need_places, need_range

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def product(
    x: Float[Tensor, "t m"], values: Float[Tensor, " V"], places: Int[Tensor, " P"], at: tuple[int, int, int], n: int
) -> Float[Tensor, "t n"]:
    start, width, place = at
    m = x.shape[1]
    need_range("adapter_rows", "values", start, width * m, values.numel())
    need_range("adapter_rows", "places", place, width, places.numel())
    index = need_places("adapter_rows", places[place : place + width], n, "outputs")
    return x.new_zeros((x.shape[0], n)).index_add(1, index, x @ values[start : start + width * m].view(width, m).t())


LIBRARY.define("adapter_rows" + SCHEMA)
oracle = implement("rows", product)

__all__ = ["oracle"]
