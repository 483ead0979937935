"""Trained biases of many adapters, one adapter a token: `y += values`.

The layout of the arguments is `sparsify.ops.adapter_tables`'s. `oracle` is the same in fp64.
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
    need_range("adapter_bias", "values", at[0], n, values.numel())
    return values[at[0] : at[0] + n].expand(x.shape[0], n)


LIBRARY.define("adapter_bias" + SCHEMA)
oracle = implement("bias", product)

__all__ = ["oracle"]
