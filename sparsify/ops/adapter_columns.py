"""Trained input channels of many adapters (S2FT's and PaCA's columns), one adapter a token: `y += x[:, places] @ values`.

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
    need_range("adapter_columns", "values", start, width * n, values.numel())
    need_range("adapter_columns", "places", place, width, places.numel())
    index = need_places("adapter_columns", places[place : place + width], x.shape[1], "inputs")
    return x.index_select(1, index) @ values[start : start + width * n].view(width, n)


LIBRARY.define("adapter_columns" + SCHEMA)
oracle = implement("columns", product)

__all__ = ["oracle"]
