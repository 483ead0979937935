"""Single trained entries of many adapters (RoSA's sparse part), one adapter a token: `y[:, row] += value · x[:, column]`.

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
    start, count, place = at
    need_range("adapter_sparse", "values", start, count, values.numel())
    need_range("adapter_sparse", "places", place, 2 * count, places.numel())
    rows = need_places("adapter_sparse", places[place : place + count], n, "outputs")
    columns = need_places("adapter_sparse", places[place + count : place + 2 * count], x.shape[1], "inputs")
    return x.new_zeros((x.shape[0], n)).index_add(1, rows, x.index_select(1, columns) * values[start : start + count])


LIBRARY.define("adapter_sparse" + SCHEMA)
oracle = implement("sparse", product)

__all__ = ["oracle"]
