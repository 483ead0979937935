"""Sparsify's operators in ATen, for compilers that are to see through them and for programs that run without sparsify.

    partial_linear(x, W, b, block, start, axis)   ──▶ linear(x, slice_scatter(W, block), b)
    sparse_lowrank_linear(x, W, b, v, i, A, B)    ──▶ linear(x, W[i ← v], b) + s (x Aᵀ) Bᵀ, or linear(x, W[i ← v] + s B A, b)
    masked_linear, apply_mask                     ──▶ linear; the mask's bits by shifts
    quantized_linear                              ──▶ unpacking in integer arithmetic, then as above

Forward only. Everything that does not depend on `x` is computed first, from parameters alone, so that it can be folded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._ops import OperatorBase
from torch.nn import functional as F

from sparsify.formats import format_named
from sparsify.library import OUTSIDE

Table = dict[OperatorBase, Callable[..., object]]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b` in the dtype of `x`."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def partial_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, start: int, axis: int) -> Tensor:
    end = start + block.shape[axis]
    return linear(x, torch.slice_scatter(weight, block.to(weight.dtype), axis, start, end), bias)


def partial_linear_at(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, index: Tensor, axis: int
) -> Tensor:
    return linear(x, weight.index_copy(axis, index, block.to(weight.dtype)), bias)


def partial_embedding(ids: Tensor, weight: Tensor, block: Tensor, index: Tensor, padding: int) -> Tensor:
    return torch.ops.aten.embedding.default(weight.index_copy(0, index, block.to(weight.dtype)), ids, padding)


def lowrank_embedding(ids: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, padding: int) -> Tensor:
    found = torch.ops.aten.embedding.default(weight, ids, padding)
    return found + (scale * torch.ops.aten.embedding.default(b, ids).matmul(a)).to(found.dtype)


def lowrank_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    folded = (weight.float() + scale * (b.float() @ a.float()).view(weight.shape)).to(x.dtype)
    nothing = [0] * len(stride)
    bias = None if bias is None else bias.to(x.dtype)
    return torch.ops.aten.convolution.default(x, folded, bias, stride, padding, dilation, False, nothing, 1)


def partial_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, index: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    whole = (
        weight.reshape(weight.shape[0], -1).index_copy(1, index, block.to(weight.dtype)).view(weight.shape).to(x.dtype)
    )
    bias = None if bias is None else bias.to(x.dtype)
    return torch.ops.aten.convolution.default(x, whole, bias, stride, padding, dilation, False, [0] * len(stride), 1)


def with_values(weight: Tensor, values: Tensor | None, index: Tensor | None) -> Tensor:
    """A stored weight with its sparse values in place."""
    if values is None or index is None:
        return weight
    return weight.reshape(-1).index_copy(0, index.long(), values.to(weight.dtype)).view(weight.shape)


def with_low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float, fold: bool
) -> Tensor:
    """`x (W + s B A)ᵀ + bias`; fold: the factors are added to the weight `(n, m)`, else they are products of their own."""
    if a is None or b is None:
        return linear(x, weight, bias)
    if fold:
        return linear(x, (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype), bias)
    return linear(x, weight, bias) + scale * linear(linear(x, a, None), b, None)


def sparse_lowrank_linear(fold: bool) -> Callable[..., Tensor]:
    def decomposed(
        x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, index: Tensor | None,
        a: Tensor | None, b: Tensor | None, scale: float, transposed: bool,
    ) -> Tensor:  # fmt: skip
        stored = with_values(weight, values, index)
        return with_low_rank(x, stored.t() if transposed else stored, bias, a, b, scale, fold)

    return decomposed


def unpacked(packed: Sequence[Tensor], format: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A stored weight `(rows, columns)` in ATen."""
    return format_named(format).unpack_in_aten(packed, shape, dtype)


def quantized_linear(
    x: Tensor, format: str, rows: int, columns: int, transposed: bool, bias: Tensor | None, block: Tensor | None,
    channels: Tensor | None, axis: int, values: Tensor | None, index: Tensor | None, a: Tensor | None, b: Tensor | None,
    scale: float, packed: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    shape = (rows, columns)
    stored = unpacked(packed, format, shape, x.dtype)
    if block is not None and channels is not None:
        place = 1 - axis if transposed else axis
        trained = block.to(stored.dtype)
        stored = stored.index_copy(place, channels.long(), trained.t() if transposed else trained)
    stored = with_values(stored, values, index)
    return with_low_rank(x, stored.t() if transposed else stored, bias, a, b, scale, fold=False)


def apply_mask(t: Tensor, bits: Tensor) -> Tensor:
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    kept = ((bits[:, None] >> shifts) & 1).view(-1)[: t.numel()].view(t.shape)
    return torch.where(kept != 0, t, torch.zeros((), dtype=t.dtype, device=t.device))


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)


def decompositions(*, fold: bool = True) -> Table:
    """ATen forms of the operators that hold trained, masked or quantised weights, for `run_decompositions` and Inductor.

    fold: low-rank factors are added to dense weights (which a later folding makes free), else they stay products of their own.
    """
    ops = torch.ops.sparsify
    return {
        ops.partial_linear.default: partial_linear,
        ops.partial_linear_at.default: partial_linear_at,
        ops.partial_embedding.default: partial_embedding,
        ops.lowrank_embedding.default: lowrank_embedding,
        ops.lowrank_conv.default: lowrank_conv,
        ops.partial_conv.default: partial_conv,
        ops.sparse_lowrank_linear.default: sparse_lowrank_linear(fold),
        ops.quantized_linear.default: quantized_linear,
        ops.masked_linear.default: masked_linear,
        ops.apply_mask.default: apply_mask,
        **OUTSIDE,
    }


__all__ = ["decompositions", "unpacked"]
