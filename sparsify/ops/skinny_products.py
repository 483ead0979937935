"""The products of a low-rank part: a tall matrix with few vectors, one pass over the matrix for both.

    skinny_products(x, rows, factor)     (x rowsᵀ (T, r), factorᵀ x (r, m))     for x (T, m), rows (r, m), factor (T, r)

Either may be absent (its product is then empty). Its own gradients are products of the same kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops import dispatch
from sparsify.ops.checks import require, require_floats, require_shape, require_together

if TYPE_CHECKING:
    from jaxtyping import Float

LIBRARY.define("skinny_products(Tensor x, Tensor? rows, Tensor? factor) -> (Tensor, Tensor)")


def _check_skinny(
    x: Float[Tensor, "T m"], rows: Float[Tensor, "r m"] | None, factor: Float[Tensor, "T r"] | None
) -> None:
    name = "skinny_products"
    require(x.dim() == 2, lambda: f"{name}: x {tuple(x.shape)} is no matrix")
    if rows is not None:
        require(rows.dim() == 2, lambda: f"{name}: rows {tuple(rows.shape)} is no matrix")
        require_shape(name, "rows", rows, rows.shape[0], x.shape[1])
    if factor is not None:
        require(factor.dim() == 2, lambda: f"{name}: factor {tuple(factor.shape)} is no matrix")
        require_shape(name, "factor", factor, x.shape[0], factor.shape[1] if rows is None else rows.shape[0])


def skinny_products(
    x: Float[Tensor, "T m"], rows: Float[Tensor, "r m"] | None, factor: Float[Tensor, "T r"] | None
) -> tuple[Float[Tensor, "T r"] | None, Float[Tensor, "r m"] | None]:
    """`(x rowsᵀ (T, r), factorᵀ x (r, m))` for `x (T, m)`, `rows (r, m)`, `factor (T, r)`; either may be absent. One pass over x
    where the generated CPU kernel serves, else GEMMs whose factor with few rows is kept row by row, which they want."""
    _check_skinny(x, rows, factor)
    rank = rows.shape[0] if rows is not None else factor.shape[1] if factor is not None else 0
    if dispatch.skinny_serves(x, rank):
        return dispatch.skinny_by_kernel(x, rows, factor)
    low = None if rows is None else x @ rows.to(x.dtype).contiguous().t()
    return low, None if factor is None else factor.t().mm(x)


def _skinny_products(
    x: Float[Tensor, "T m"], rows: Float[Tensor, "r m"] | None, factor: Float[Tensor, "T r"] | None
) -> tuple[Float[Tensor, "T r"], Float[Tensor, "r m"]]:
    require_together("skinny_products", x, rows, factor)
    require_floats("skinny_products", x=x, rows=rows, factor=factor)
    low, product = skinny_products(x, rows, factor)
    return x.new_empty(0) if low is None else low, x.new_empty(0) if product is None else product


def reduced(x: Float[Tensor, "*t m"], rows: Float[Tensor, "r m"]) -> Float[Tensor, "T r"]:
    """`x rowsᵀ (T, r)` for `x (..., m)`, `rows (r, m)`."""
    low, _ = skinny_products(x.reshape(-1, x.shape[-1]), rows, None)
    assert low is not None
    return low


def _skinny_products_fake(
    x: Float[Tensor, "T m"], rows: Float[Tensor, "r m"] | None, factor: Float[Tensor, "T r"] | None
) -> tuple[Float[Tensor, "T r"], Float[Tensor, "r m"]]:
    _check_skinny(x, rows, factor)
    low = x.new_empty(0 if rows is None else (x.shape[0], rows.shape[0]))
    return low, x.new_empty(0 if factor is None else (factor.shape[1], x.shape[1]))


def _skinny_in_aten(
    x: Float[Tensor, "T m"], rows: Float[Tensor, "r m"] | None, factor: Float[Tensor, "T r"] | None
) -> tuple[Float[Tensor, "T r"], Float[Tensor, "r m"]]:
    low = x.new_empty(0) if rows is None else x.mm(rows.to(x.dtype).t())
    return low, x.new_empty(0) if factor is None else factor.t().mm(x)


def _setup_skinny(
    ctx: Context, inputs: tuple[Tensor, Tensor | None, Tensor | None], output: tuple[Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward_skinny(
    ctx: Context, of_low: Float[Tensor, "T r"] | None, of_product: Float[Tensor, "r m"] | None
) -> tuple[Tensor | None, ...]:
    """Of `(x rowsᵀ, factorᵀ x)`: x gets `of_low rows + factor of_product`; rows and factor get the same products of x again."""
    x, rows, factor = ctx.saved_tensors
    need = ctx.needs_input_grad
    d_rows = d_factor = None
    parts: list[Tensor] = []
    if need[0] and rows is not None and of_low is not None:
        parts.append(of_low.mm(rows.to(x.dtype)))
    if need[0] and factor is not None and of_product is not None:
        parts.append(factor.mm(of_product))
    dx = None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
    for_rows = of_low if need[1] and rows is not None else None
    for_factor = of_product if need[2] and factor is not None else None
    if for_rows is not None or for_factor is not None:
        low, product = torch.ops.sparsify.skinny_products(x, for_factor, for_rows)
        d_factor = None if for_factor is None or factor is None else low.to(factor.dtype)
        d_rows = None if for_rows is None or rows is None else product.to(rows.dtype)
    return dx, d_rows, d_factor


LIBRARY.implement(
    "skinny_products",
    kernel=_skinny_products,
    fake=_skinny_products_fake,
    aten=_skinny_in_aten,
    backward=_backward_skinny,
    setup=_setup_skinny,
)
