"""A linear with trained values at a sparse support and two low-rank factors (RoSA, LoRA).

    sparse_lowrank_linear      y = x W'ᵀ + s (x Aᵀ) Bᵀ + b,   W' = W with the entries at `index` replaced by `values`
    sparse_lowrank_linear_dx   dX = g W' + s low A,           low = g B (T, r)

`values` are *values* of the weight (base + S), kept in fp32: they are written into the dense weight at their support, so
that forward and dX stay one dense GEMM each and no dense `W + S` is ever allocated. As in `partial_linear`, those entries of the
weight are scratch that only the operator reads. `index` is flat in the stored weight (int32 where that is wide enough).

Saved for backward: `x` once (or its factors, see `sparsify.ops.saved_input`), which serves `dS`, `dA` and `dB`; `x Aᵀ (T, r)` is
computed again, and `low = g B (T, r)` once for `dX` and `dA`. Each product of the backward is an operator with a formula of its own,
made of the same operators, so derivatives of any order are right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops.added_parts import (
    added_gradients,
    check_dx,
    check_linear,
    check_weight,
    dense_dx,
    dense_forward,
    dtype_if,
    dx_in_aten,
    linear_in_aten,
    low_rank_gradients,
    sparse_gradient,
    stored_factors,
    with_values,
    write_values,
)
from sparsify.ops.checks import require_floats, require_together
from sparsify.ops.saved_input import input_link, restored_input, saved_input
from sparsify.ops.shapes import flat, logical_shape

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LIBRARY.define(
    "sparse_lowrank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? values, Tensor? index, Tensor? a, Tensor? b, "
    "float scale, bool transposed) -> Tensor"
)
LIBRARY.define(
    "sparse_lowrank_linear_dx(Tensor g, Tensor weight, Tensor? values, Tensor? index, Tensor? low, Tensor? a, float scale, "
    "bool transposed) -> Tensor"
)


def oracle_weight(
    weight: Float[Tensor, "n m"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
) -> Float[Tensor, "n m"]:
    """The dense weight that the operator stands for, `(n, m)`; differentiable in values, a and b."""
    if values is not None and index is not None:
        weight = weight.reshape(-1).index_copy(0, index.long(), values.to(weight.dtype)).view(weight.shape)
    if a is not None and b is not None:
        weight = weight + scale * (b @ a).to(weight.dtype)
    return weight


def _sparse_lowrank(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "p q"],
    bias: Float[Tensor, " n"] | None,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    transposed: bool,
) -> Float[Tensor, "*t n"]:
    name = "sparse_lowrank_linear"
    check_weight(name, weight, index)
    check_linear(name, x, *logical_shape(weight.shape, transposed), bias, values, index, a, b)
    require_together(name, x, weight, bias, values, index, a, b)
    require_floats(name, x=x, weight=weight, bias=bias, values=values, a=a, b=b)
    write_values(weight, values, index)
    return dense_forward(x, weight, transposed, bias, a, b, scale)


def _sparse_lowrank_dx(
    g: Float[Tensor, "*t n"],
    weight: Float[Tensor, "p q"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
    transposed: bool,
) -> Float[Tensor, "*t m"]:
    name = "sparse_lowrank_linear_dx"
    check_weight(name, weight, index)
    check_dx(name, g, *logical_shape(weight.shape, transposed), values, index, low, a)
    require_together(name, g, weight, values, index, low, a)
    require_floats(name, g=g, weight=weight, values=values, low=low, a=a)
    write_values(weight, values, index)
    return dense_dx(g, weight, transposed, low, a, scale)


def _sparse_lowrank_fake(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "p q"],
    bias: Float[Tensor, " n"] | None,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    transposed: bool,
) -> Float[Tensor, "*t n"]:
    rows, columns = logical_shape(weight.shape, transposed)
    check_linear("sparse_lowrank_linear", x, rows, columns, bias, values, index, a, b)
    return x.new_empty((*x.shape[:-1], rows))


def _sparse_lowrank_dx_fake(
    g: Float[Tensor, "*t n"],
    weight: Float[Tensor, "p q"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
    transposed: bool,
) -> Float[Tensor, "*t m"]:
    rows, columns = logical_shape(weight.shape, transposed)
    check_dx("sparse_lowrank_linear_dx", g, rows, columns, values, index, low, a)
    return g.new_empty((*g.shape[:-1], columns))


def _sparse_lowrank_in_aten(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "p q"],
    bias: Float[Tensor, " n"] | None,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    transposed: bool,
) -> Float[Tensor, "*t n"]:
    stored = with_values(weight, values, index)
    return linear_in_aten(x, stored.t() if transposed else stored, bias, a, b, scale)


def _sparse_lowrank_dx_in_aten(
    g: Float[Tensor, "*t n"],
    weight: Float[Tensor, "p q"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
    transposed: bool,
) -> Float[Tensor, "*t m"]:
    stored = with_values(weight, values, index)
    return dx_in_aten(g, stored.t() if transposed else stored, low, a, scale)


def _frozen_gradient(
    g: Float[Tensor, "*t n"],
    x: Float[Tensor, "*t m"],
    index: Int[Tensor, " k"] | None,
    transposed: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "p q"]:
    """`gᵀ x` with zeros at the support: for a weight that was made to require a gradient in spite of the plan."""
    first, second = stored_factors(g, x, transposed)
    dense = first.t().mm(second).to(dtype)
    return dense if index is None else dense.view(-1).index_fill(0, index.long(), 0).view(dense.shape)


class _Saved(Context, Protocol):
    """dtypes: of the gradients that are wanted, in the order of the arguments; None where none is."""

    scale: float
    transposed: bool
    dtypes: tuple[torch.dtype | None, ...]


def _setup_sparse_lowrank(
    ctx: _Saved,
    inputs: tuple[
        Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, bool
    ],
    output: Tensor,
) -> None:
    x, weight, bias, values, index, a, b, scale, transposed = inputs
    need = ctx.needs_input_grad
    trained = any(need[i] for i in (1, 3, 5, 6))
    first, second = saved_input(x) if trained else (None, None)
    link = input_link(x, second)
    ctx.save_for_backward(
        first,
        second,
        link,
        weight if need[0] else None,
        values if need[0] else None,
        index,
        a if need[0] or need[6] else None,
        b if need[0] or need[5] else None,
    )
    ctx.scale, ctx.transposed = scale, transposed
    ctx.dtypes = tuple(dtype_if(need[i], t) for i, t in ((1, weight), (2, bias), (3, values), (5, a), (6, b)))


def _backward_sparse_lowrank(ctx: _Saved, g: Float[Tensor, "*t n"]) -> tuple[Tensor | None, ...]:
    *kept, weight, values, index, a, b = ctx.saved_tensors
    need, (of_weight, of_bias, of_values, of_a, of_b) = ctx.needs_input_grad, ctx.dtypes
    x = restored_input(*kept)
    low, d_a, d_b = low_rank_gradients(g, x, a, b, ctx.scale, need[0], of_a, of_b)
    dx = d_weight = None
    if need[0]:
        support = (None, None) if values is None else (values, index)
        dx = torch.ops.sparsify.sparse_lowrank_linear_dx(g, weight, *support, low, a, ctx.scale, ctx.transposed)
    if x is not None and of_weight is not None:
        d_weight = _frozen_gradient(g, x, index, ctx.transposed, of_weight)
    d_bias = None if of_bias is None else flat(g).sum(0).to(of_bias)
    d_values = sparse_gradient(g, x, index, ctx.transposed, of_values)
    return dx, d_weight, d_bias, d_values, None, d_a, d_b, None, None


def _setup_sparse_lowrank_dx(
    ctx: _Saved,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, bool],
    output: Tensor,
) -> None:
    g, weight, values, index, low, a, scale, transposed = inputs
    need = ctx.needs_input_grad
    own = (weight, values) if need[0] else (None, None)
    ctx.save_for_backward(g if need[1] or need[2] else None, *own, index, low, a)
    ctx.scale, ctx.transposed = scale, transposed
    ctx.dtypes = tuple(dtype_if(need[i], t) for i, t in ((1, weight), (2, values), (4, low), (5, a)))


def _backward_sparse_lowrank_dx(ctx: _Saved, outer: Float[Tensor, "*t m"]) -> tuple[Tensor | None, ...]:
    """Of `dX = g W' + s low A`: the operator itself, without its low-rank part, for g, and sampled and skinny products."""
    g, weight, values, index, low, a = ctx.saved_tensors
    of_weight, of_values, of_low, of_a = ctx.dtypes
    dg = d_weight = None
    if ctx.needs_input_grad[0]:
        support = (None, None) if values is None else (values, index)
        dg = torch.ops.sparsify.sparse_lowrank_linear(outer, weight, None, *support, None, None, 1.0, ctx.transposed)
    if of_weight is not None:
        d_weight = _frozen_gradient(g, outer, index, ctx.transposed, of_weight)
    d_values = sparse_gradient(g, outer, index, ctx.transposed, of_values)
    d_low, d_a = added_gradients(outer, low, a, ctx.scale, of_low, of_a)
    return dg, d_weight, d_values, None, d_low, d_a, None, None


LIBRARY.implement(
    "sparse_lowrank_linear",
    kernel=_sparse_lowrank,
    fake=_sparse_lowrank_fake,
    aten=_sparse_lowrank_in_aten,
    backward=_backward_sparse_lowrank,
    setup=_setup_sparse_lowrank,
)
LIBRARY.implement(
    "sparse_lowrank_linear_dx",
    kernel=_sparse_lowrank_dx,
    fake=_sparse_lowrank_dx_fake,
    aten=_sparse_lowrank_dx_in_aten,
    backward=_backward_sparse_lowrank_dx,
    setup=_setup_sparse_lowrank_dx,
)
LIBRARY.autocast("sparse_lowrank_linear")
