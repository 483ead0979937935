"""A tensor with its pruned entries at zero.

    apply_mask(t, bits)     t∘M

Its gradient is the operator itself, so a masked weight stays masked in every derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops.bits import check_bits, unpack_bits, unpack_by_shifts
from sparsify.ops.checks import require_together

if TYPE_CHECKING:
    from jaxtyping import Num, UInt8

LIBRARY.define("apply_mask(Tensor t, Tensor bits) -> Tensor")


def _apply_mask(t: Num[Tensor, "*shape"], bits: UInt8[Tensor, " bytes"]) -> Num[Tensor, "*shape"]:
    check_bits("apply_mask", bits, t.numel())
    require_together("apply_mask", t, bits)
    return t.masked_fill(~unpack_bits(bits, t.shape), 0).contiguous()


def _apply_mask_fake(t: Num[Tensor, "*shape"], bits: UInt8[Tensor, " bytes"]) -> Num[Tensor, "*shape"]:
    check_bits("apply_mask", bits, t.numel())
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _keep_bits(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _apply_mask_backward(ctx: Context, g: Num[Tensor, "*shape"]) -> tuple[Tensor, None]:
    (bits,) = ctx.saved_tensors
    return torch.ops.sparsify.apply_mask(g, bits), None


def apply_mask_in_aten(t: Num[Tensor, "*shape"], bits: UInt8[Tensor, " bytes"]) -> Num[Tensor, "*shape"]:
    check_bits("apply_mask", bits, t.numel())
    return t.masked_fill(~unpack_by_shifts(bits)[: t.numel()].view(t.shape), 0)


LIBRARY.implement(
    "apply_mask",
    kernel=_apply_mask,
    fake=_apply_mask_fake,
    aten=apply_mask_in_aten,
    backward=_apply_mask_backward,
    setup=_keep_bits,
)
