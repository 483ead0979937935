"""An embedding with a low-rank part: LoRA (arXiv 2106.09685) of a table of rows.

    lowrank_embedding(ids, weight, a, b, scale, padding)      y = W[ids] + s · B[ids] A

`ids (*,)` integers, `weight (v, d)` frozen, `a (r, d)`, `b (v, r)`; `padding` the id whose row of B gets no gradient, −1 for none. A
look-up of B gives each token its `r` coefficients, so nothing of the size of the weight is made; B's gradient is dense, `(v, r)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops.checks import require, require_floats, require_together
from sparsify.ops.partial_embedding import scattered
from sparsify.ops.shapes import flat

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NAME = "lowrank_embedding"
LIBRARY.define(f"{NAME}(Tensor ids, Tensor weight, Tensor a, Tensor b, float scale, int padding) -> Tensor")


# --- the oracle --------------------------------------------------------------------------------------------------------------


def oracle_lowrank_embedding(
    ids: Int[Tensor, "*t"], weight: Float[Tensor, "v d"], a: Float[Tensor, "r d"], b: Float[Tensor, "v r"], scale: float
) -> Float[Tensor, "*t d"]:
    """Eager definition of the forward, by the whole table."""
    return (weight + scale * (b @ a))[ids]


def oracle_lowrank_embedding_backward(
    g: Float[Tensor, "*t d"],
    ids: Int[Tensor, "*t"],
    a: Float[Tensor, "r d"],
    b: Float[Tensor, "v r"],
    scale: float,
    padding: int,
) -> tuple[Float[Tensor, "r d"], Float[Tensor, "v r"]]:
    """`(dA, dB)`, written out: with one-hot tokens `H (T, v)`, `dA = s (H B)ᵀ G` and `dB = s Hᵀ G Aᵀ`, zero in the padding's row."""
    tokens = g.reshape(-1, g.shape[-1])
    seen = torch.nn.functional.one_hot(ids.reshape(-1).long(), b.shape[0]).to(g.dtype)
    d_b = scale * seen.t() @ tokens @ a.t()
    if padding >= 0:
        d_b[padding] = 0
    return scale * (seen @ b).t() @ tokens, d_b


# --- the operator ------------------------------------------------------------------------------------------------------------


def _check(ids: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> None:
    require(
        ids.dtype in (torch.int32, torch.int64), lambda: f"{NAME}: ids are {ids.dtype}, expected int32 or int64 numbers"
    )
    require(weight.dim() == a.dim() == b.dim() == 2, lambda: f"{NAME}: expected three matrices, weight, a and b")
    require_floats(NAME, weight=weight, a=a, b=b)
    fits = a.shape[1] == weight.shape[1] and b.shape[0] == weight.shape[0] and a.shape[0] == b.shape[1]
    require(
        fits,
        lambda: f"{NAME}: a {tuple(a.shape)} and b {tuple(b.shape)} do not fit a weight {tuple(weight.shape)}",
    )


def _in_aten(
    ids: Int[Tensor, "*t"],
    weight: Float[Tensor, "v d"],
    a: Float[Tensor, "r d"],
    b: Float[Tensor, "v r"],
    scale: float,
    padding: int,
) -> Float[Tensor, "*t d"]:
    found = torch.ops.aten.embedding(weight, ids, padding)
    low = torch.ops.aten.embedding(b, ids, padding).matmul(a)
    return found + (scale * low).to(found.dtype)


def _kernel(
    ids: Int[Tensor, "*t"],
    weight: Float[Tensor, "v d"],
    a: Float[Tensor, "r d"],
    b: Float[Tensor, "v r"],
    scale: float,
    padding: int,
) -> Float[Tensor, "*t d"]:
    _check(ids, weight, a, b)
    require_together(NAME, weight, ids, a, b)
    return _in_aten(ids, weight.detach(), a.detach(), b.detach(), scale, padding)


def _fake(ids: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, padding: int) -> Tensor:
    _check(ids, weight, a, b)
    return weight.new_empty((*ids.shape, weight.shape[1]))


class _Saved(Context, Protocol):
    """What the backward keeps beside the tensors."""

    rows: int
    scale: float
    padding: int
    dtype: torch.dtype


def _setup(ctx: _Saved, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float, int], output: Tensor) -> None:
    ids, weight, a, b, scale, padding = inputs
    need = ctx.needs_input_grad
    ctx.save_for_backward(ids, a if need[3] else None, b if need[2] else None)
    ctx.rows, ctx.scale, ctx.padding, ctx.dtype = weight.shape[0], scale, padding, weight.dtype


def _backward(ctx: _Saved, g: Float[Tensor, "*t d"]) -> tuple[Tensor | None, ...]:
    ids, a, b = ctx.saved_tensors
    need = ctx.needs_input_grad
    d_weight = d_a = d_b = None
    if need[1]:  # a weight that was made to require a gradient in spite of the plan
        d_weight = scattered(g, ids.long(), ctx.rows, ctx.padding).to(ctx.dtype)
    if need[2]:
        low = b.index_select(0, ids.reshape(-1))
        d_a = ctx.scale * low.t().mm(flat(g).to(b.dtype))
    if need[3]:
        d_b = ctx.scale * scattered(g.to(a.dtype).matmul(a.t()), ids.long(), ctx.rows, ctx.padding)
    return None, d_weight, d_a, d_b, None, None


LIBRARY.implement(NAME, kernel=_kernel, fake=_fake, aten=_in_aten, backward=_backward, setup=_setup)

__all__ = ["oracle_lowrank_embedding", "oracle_lowrank_embedding_backward"]
