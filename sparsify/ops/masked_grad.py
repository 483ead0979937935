"""The gradient of a weight under a mask.

    masked_grad(g, x, bits)     (gᵀ x)∘M     for g (T, n), x (T, m)

Masked in place, in pieces that stay in cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops.apply_mask import apply_mask_in_aten
from sparsify.ops.bits import check_bits, unpack_bits
from sparsify.ops.checks import require, require_together

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

LIBRARY.define("masked_grad(Tensor g, Tensor x, Tensor bits) -> Tensor")

PIECE = 1 << 18


def _check_masked_grad(g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], bits: UInt8[Tensor, " bytes"]) -> None:
    require(
        g.dim() == 2 and x.dim() == 2, lambda: f"masked_grad: g and x are matrices, not {g.dim()}-D and {x.dim()}-D"
    )
    require(g.shape[0] == x.shape[0], lambda: f"masked_grad: g has {g.shape[0]} tokens, x {x.shape[0]}")
    check_bits("masked_grad", bits, g.shape[1] * x.shape[1])


def _masked_grad(
    g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], bits: UInt8[Tensor, " bytes"]
) -> Float[Tensor, "n m"]:
    _check_masked_grad(g, x, bits)
    require_together("masked_grad", g, x, bits)
    dense = g.t().mm(x)
    flat = dense.view(-1)
    for start in range(0, flat.numel(), PIECE):  # a multiple of 8 entries, so of whole bytes
        piece = flat[start : start + PIECE]
        part = bits[start // 8 : (start + piece.numel() + 7) // 8]
        piece.masked_fill_(~unpack_bits(part, piece.shape), 0)
    return dense


def _masked_grad_fake(
    g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], bits: UInt8[Tensor, " bytes"]
) -> Float[Tensor, "n m"]:
    _check_masked_grad(g, x, bits)
    return g.new_empty((g.shape[1], x.shape[1]))


def _masked_grad_in_aten(
    g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], bits: UInt8[Tensor, " bytes"]
) -> Float[Tensor, "n m"]:
    return apply_mask_in_aten(g.t().mm(x), bits)


def _save_factors(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _masked_grad_backward(ctx: Context, outer: Float[Tensor, "n m"]) -> tuple[Tensor | None, Tensor | None, None]:
    g, x, bits = ctx.saved_tensors
    kept = torch.ops.sparsify.apply_mask(outer, bits)
    need = ctx.needs_input_grad
    return x.mm(kept.t()) if need[0] else None, g.mm(kept) if need[1] else None, None


LIBRARY.implement(
    "masked_grad",
    kernel=_masked_grad,
    fake=_masked_grad_fake,
    aten=_masked_grad_in_aten,
    backward=_masked_grad_backward,
    setup=_save_factors,
)
