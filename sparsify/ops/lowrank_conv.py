"""A convolution with a low-rank part: LoRA (arXiv 2106.09685) in the form that PEFT gives it, `r × k × k` and then `1 × 1`.

    lowrank_conv(x, weight, bias, a, b, scale, stride, padding, dilation)      y = x ∗ W + s · (x ∗ A) B + bias

`x (N, c, *size)`, `weight (n, c, *k)` frozen, `bias (n,)`, `a (r, c·∏k)` the kernels of A flattened, `b (n, r)`. With the weight flattened
behind its outputs this is `W + s B A`, as of a linear with `c·∏k` inputs. Zeros are padded; one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops.checks import require, require_floats, require_together

if TYPE_CHECKING:
    from jaxtyping import Float

NAME = "lowrank_conv"
LIBRARY.define(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, int[] stride, int[] padding, int[] dilation)"
    " -> Tensor"
)


# --- the oracle --------------------------------------------------------------------------------------------------------------


def oracle_lowrank_conv(
    x: Float[Tensor, "N c *size"],
    weight: Float[Tensor, "n c *k"],
    bias: Float[Tensor, " n"] | None,
    a: Float[Tensor, "r m"],
    b: Float[Tensor, "n r"],
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Float[Tensor, "N n *out"]:
    """Eager definition of the forward, by the whole weight; its derivatives are autograd's."""
    whole = weight + scale * (b @ a).view(weight.shape)
    return convolved(x, whole, bias, stride, padding, dilation)


# --- the operator ------------------------------------------------------------------------------------------------------------


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """`x ∗ W + bias` in the dtype of `x`."""
    nothing = [0] * len(stride)
    bias = None if bias is None else bias.to(x.dtype)
    return torch.ops.aten.convolution(x, weight.to(x.dtype), bias, stride, padding, dilation, False, nothing, 1)


def kernels(a: Float[Tensor, "r m"], weight: Float[Tensor, "n c *k"]) -> Float[Tensor, "r c *k"]:
    return a.view(a.shape[0], *weight.shape[1:])


def pointwise(y: Float[Tensor, "N r *out"], matrix: Float[Tensor, "n r"]) -> Float[Tensor, "N n *out"]:
    """The same matrix at every position."""
    return torch.matmul(matrix, positions(y)).reshape(y.shape[0], matrix.shape[0], *y.shape[2:])


def positions(y: Float[Tensor, "N c *out"]) -> Float[Tensor, "N c T"]:
    """All positions on one axis (`flatten` has no rule under the older vmap)."""
    return y.reshape(y.shape[0], y.shape[1], math.prod(y.shape[2:]))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    require(
        weight.dim() in (3, 4, 5) and x.dim() == weight.dim(),
        lambda: f"{NAME}: x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected (N, c, …) and (n, c, …)",
    )
    require_floats(NAME, x=x, weight=weight, a=a, b=b)
    require(x.shape[1] == weight.shape[1], lambda: f"{NAME}: x has {x.shape[1]} channels, the weight {weight.shape[1]}")
    size = weight[0].numel()
    fits = a.dim() == b.dim() == 2 and a.shape[1] == size and b.shape[0] == weight.shape[0] and a.shape[0] == b.shape[1]
    require(
        fits, lambda: f"{NAME}: a {tuple(a.shape)} and b {tuple(b.shape)} do not fit a weight {tuple(weight.shape)}"
    )


def _in_aten(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    where = (stride, padding, dilation)
    low = convolved(x, kernels(a, weight), None, *where)
    return convolved(x, weight, bias, *where) + scale * pointwise(low, b.to(x.dtype))


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    _check(x, weight, bias, a, b)
    require_together(NAME, x, weight, bias, a, b)
    held = (x.detach(), weight.detach(), None if bias is None else bias.detach(), a.detach(), b.detach())
    return _in_aten(*held, scale, stride, padding, dilation)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    _check(x, weight, bias, a, b)
    return convolved(x, weight, None, stride, padding, dilation).contiguous()


class _Saved(Context, Protocol):
    """What the backward keeps beside the tensors."""

    scale: float
    where: tuple[list[int], list[int], list[int]]
    dtypes: tuple[torch.dtype | None, ...]


def _setup(ctx: _Saved, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, a, b, scale, stride, padding, dilation = inputs
    ctx.save_for_backward(x, weight, a, b)
    ctx.scale, ctx.where = scale, (list(stride), list(padding), list(dilation))
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype, a.dtype, b.dtype


def _backward(ctx: _Saved, g: Tensor) -> tuple[Tensor | None, ...]:
    """`dB = s Σ g lowᵀ`, `dA` the gradient of a convolution with r outputs, `dX` that of both; the weight's own is not formed."""
    x, weight, a, b = ctx.saved_tensors
    need, (stride, padding, dilation) = ctx.needs_input_grad, ctx.where
    nothing, small = [0] * len(stride), kernels(a, weight).to(x.dtype)

    def gradients(g: Tensor, kernel: Tensor, of_x: bool, of_kernel: bool) -> list[Tensor | None]:
        return torch.ops.aten.convolution_backward(
            g, x, kernel, None, stride, padding, dilation, False, nothing, 1, [of_x, of_kernel, False]
        )

    dx = d_weight = d_bias = d_a = d_b = None
    if need[0] or need[3]:
        low_g = ctx.scale * pointwise(g, b.t().to(g.dtype))
        dx, d_small, _ = gradients(low_g, small, need[0], need[3])
        d_a = None if d_small is None else d_small.reshape(a.shape).to(ctx.dtypes[2])
    if need[0] or need[1]:
        through, d_weight, _ = gradients(g, weight.to(x.dtype), need[0], need[1])
        dx = None if dx is None or through is None else dx + through
        d_weight = None if d_weight is None else d_weight.to(ctx.dtypes[0])
    if need[2]:
        d_bias = positions(g).sum((0, 2)).to(ctx.dtypes[1])
    if need[4]:
        low = convolved(x, small, None, stride, padding, dilation)
        d_b = ctx.scale * torch.matmul(positions(g), positions(low).transpose(1, 2)).sum(0).to(ctx.dtypes[3])
    return dx, d_weight, d_bias, d_a, d_b, None, None, None, None


LIBRARY.implement(NAME, kernel=_kernel, fake=_fake, aten=_in_aten, backward=_backward, setup=_setup)
LIBRARY.autocast(NAME)

__all__ = ["convolved", "oracle_lowrank_conv"]
