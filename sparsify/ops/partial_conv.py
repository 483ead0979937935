"""A convolution of which some input channels train: PaCA (arXiv 2503.01905) of kernels.

    partial_conv(x, weight, bias, block, index, stride, padding, dilation)      y = x ∗ W' + bias,  W' = W with columns replaced

`x (N, c, *size)`, `weight (n, c, *k)` frozen, `bias (n,)`. Flattened behind its outputs the weight is `(n, c·∏k)`: `index` holds all the
columns of the trained channels, sorted, and `block (n, s·∏k)` their values. Zeros are padded; one group.

Saved for backward: a copy of the trained channels of x. The gradient is that of a convolution with those channels alone; none is formed
for frozen kernels, unless the weight itself asks for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context, recorded
from sparsify.ops.checks import require, require_floats, require_index, require_shape, require_together, require_within
from sparsify.ops.lowrank_conv import convolved, positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NAME = "partial_conv"
LIBRARY.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor block, Tensor index, int[] stride, int[] padding, int[] dilation)"
    " -> Tensor"
)


# --- the oracle --------------------------------------------------------------------------------------------------------------


def replaced(
    weight: Float[Tensor, "n c *k"], block: Float[Tensor, "n j"], index: Int[Tensor, " j"]
) -> Float[Tensor, "n c *k"]:
    """`W'` as a new tensor, differentiable in both."""
    flat = weight.reshape(weight.shape[0], -1)
    return flat.index_copy(1, index.long(), block.to(weight.dtype)).view(weight.shape)


def oracle_partial_conv(
    x: Float[Tensor, "N c *size"],
    weight: Float[Tensor, "n c *k"],
    bias: Float[Tensor, " n"] | None,
    block: Float[Tensor, "n j"],
    index: Int[Tensor, " j"],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Float[Tensor, "N n *out"]:
    """Eager definition of the forward; its derivatives are autograd's, the block's a part of the dense kernel's."""
    return convolved(x, replaced(weight, block, index), bias, stride, padding, dilation)


# --- the operator ------------------------------------------------------------------------------------------------------------


def channels_of(index: Int[Tensor, " j"], weight: Float[Tensor, "n c *k"]) -> Int[Tensor, " s"]:
    """The channels whose columns `index` holds."""
    size = weight[0, 0].numel()
    return index.long()[::size] // size


def _check(x: Tensor, weight: Tensor, block: Tensor, index: Tensor) -> None:
    require(
        weight.dim() in (3, 4, 5) and x.dim() == weight.dim(),
        lambda: f"{NAME}: x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected (N, c, …) and (n, c, …)",
    )
    require_floats(NAME, x=x, weight=weight, block=block)
    require(x.shape[1] == weight.shape[1], lambda: f"{NAME}: x has {x.shape[1]} channels, the weight {weight.shape[1]}")
    require_index(NAME, "index", index)
    require_shape(NAME, "block", block, weight.shape[0], index.shape[0])


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    _check(x, weight, block, index)
    require_together(NAME, x, weight, bias, block, index)
    require_within(NAME, "index", index, weight[0].numel(), "kernel's columns")
    held = (x.detach(), replaced(weight.detach(), block.detach(), index), None if bias is None else bias.detach())
    return convolved(*held, stride, padding, dilation)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    _check(x, weight, block, index)
    return convolved(x, weight, None, stride, padding, dilation).contiguous()


class _Saved(Context, Protocol):
    """What the backward keeps beside the tensors."""

    where: tuple[list[int], list[int], list[int]]
    size: tuple[int, ...]
    dtypes: tuple[torch.dtype | None, ...]


def _setup(ctx: _Saved, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, block, index, stride, padding, dilation = inputs
    need = ctx.needs_input_grad
    kept = x if need[1] else None
    if need[3] and not need[1]:
        channels = channels_of(index, weight)
        kept = recorded(torch.index_select, x, 1, channels) if need[0] else x.index_select(1, channels)
    ctx.save_for_backward(kept, weight, block, index)
    ctx.where, ctx.size = (list(stride), list(padding), list(dilation)), tuple(x.shape)
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype, block.dtype


def _backward(ctx: _Saved, g: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, block, index = ctx.saved_tensors
    need, (stride, padding, dilation) = ctx.needs_input_grad, ctx.where
    nothing = [0] * len(stride)

    def gradients(x: Tensor, kernel: Tensor, of_x: bool) -> Tensor:
        mask = [of_x, not of_x, False]
        found = torch.ops.aten.convolution_backward(
            g, x, kernel, None, stride, padding, dilation, False, nothing, 1, mask
        )
        return found[0 if of_x else 1]

    dx = d_weight = d_bias = d_block = None
    if need[0]:
        dx = gradients(g.new_empty(1).expand(ctx.size), replaced(weight, block, index).to(g.dtype), True)
    if need[1]:
        dense = gradients(kept, weight.to(g.dtype), False)
        d_weight = (
            dense.reshape(weight.shape[0], -1).index_fill(1, index.long(), 0).view(weight.shape).to(ctx.dtypes[0])
        )
        kept = kept.index_select(1, channels_of(index, weight))
    if need[2]:
        d_bias = positions(g).sum((0, 2)).to(ctx.dtypes[1])
    if need[3]:
        shape = (weight.shape[0], kept.shape[1], *weight.shape[2:])
        d_block = gradients(kept, g.new_empty(1).expand(shape), False).reshape(block.shape).to(ctx.dtypes[2])
    return dx, d_weight, d_bias, d_block, None, None, None, None


LIBRARY.implement(NAME, kernel=_kernel, fake=_fake, aten=oracle_partial_conv, backward=_backward, setup=_setup)
LIBRARY.autocast(NAME)

__all__ = ["oracle_partial_conv", "replaced"]
