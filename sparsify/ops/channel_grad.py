"""The weight gradient of some channels, summed in fp32.

    channel_grad(g, x, rows)     (g[:, rows])ᵀ x     for g (T, n), x (T, m)

All rows where `rows` is absent. On other devices than CUDA `partial_linear` forms the same product in ATen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops import dispatch
from sparsify.ops.checks import require, require_floats, require_index, require_together, require_within

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LIBRARY.define("channel_grad(Tensor g, Tensor x, Tensor? rows) -> Tensor")


def _check_channels(g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], rows: Int[Tensor, " s"] | None) -> None:
    name = "channel_grad"
    require(g.dim() == 2 and x.dim() == 2, lambda: f"{name}: g and x are matrices, not {g.dim()}-D and {x.dim()}-D")
    require(g.shape[0] == x.shape[0], lambda: f"{name}: g has {g.shape[0]} tokens, x {x.shape[0]}")
    require(g.dtype == x.dtype, lambda: f"{name}: g is {g.dtype}, x {x.dtype}; cast one")
    if rows is not None:
        require_index(name, "rows", rows)


def _channel_grad(
    g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], rows: Int[Tensor, " s"] | None
) -> Float[Tensor, "s m"]:
    _check_channels(g, x, rows)
    require_together("channel_grad", g, x, rows)
    require_floats("channel_grad", g=g, x=x)
    if rows is not None:
        require_within("channel_grad", "rows", rows, g.shape[1], "gradient's channels")
    return dispatch.channel_gradient(g, x, rows)


def _sum_type(g: Float[Tensor, "T n"]) -> torch.dtype:
    return torch.float32 if g.dtype in (torch.float16, torch.bfloat16) else g.dtype


def _channel_grad_fake(
    g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], rows: Int[Tensor, " s"] | None
) -> Float[Tensor, "s m"]:
    _check_channels(g, x, rows)
    return g.new_empty((g.shape[1] if rows is None else rows.shape[0], x.shape[1]), dtype=_sum_type(g))


def _channel_grad_in_aten(
    g: Float[Tensor, "T n"], x: Float[Tensor, "T m"], rows: Int[Tensor, " s"] | None
) -> Float[Tensor, "s m"]:
    return (g if rows is None else g.index_select(1, rows)).t().mm(x).to(_sum_type(g))


def _setup_channel_grad(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_channel_grad(ctx: Context, outer: Float[Tensor, "s m"]) -> tuple[Tensor | None, ...]:
    g, x, rows = ctx.saved_tensors
    outer = outer.to(g.dtype)
    dg = dx = None
    if ctx.needs_input_grad[0]:
        dg = x.mm(outer.t())
        dg = dg if rows is None else torch.zeros_like(g).index_add(1, rows, dg)
    if ctx.needs_input_grad[1]:
        dx = (g if rows is None else g.index_select(1, rows)).mm(outer)
    return dg, dx, None


LIBRARY.implement(
    "channel_grad",
    kernel=_channel_grad,
    fake=_channel_grad_fake,
    aten=_channel_grad_in_aten,
    backward=_backward_channel_grad,
    setup=_setup_channel_grad,
)
