"""The grouped product of packed experts with a trained part, see `sparsify.ops.grouped_linear` for rows and groups.

    partial_grouped_linear(x, weight, block, index, start, axis, offsets)
        y_e = x_e W'_eᵀ,  W' = W with the same channels of every expert replaced by `block`
    sparse_lowrank_grouped_linear(x, weight, values, index, a, b, scale, transposed, offsets)
        y_e = x_e W'_eᵀ + s (x_e A_eᵀ) B_eᵀ,  W' = W with the entries at `index` replaced by `values`

`x (S, m)`. The first takes the logical weight `(E, n, m)`, perhaps a turned view; axis 1: `block (E, n, s)` is input columns, axis 0:
`block (E, s, m)` is output rows; they start at `start`, or lie at `index (s,)`. The second takes the weight as it is stored (`(E, m, n)`
if `transposed`), `index` flat in it, and factors `a (E, r, m)`, `b (E, n, r)`.

As in `partial_linear`, what trains holds *values*, which are written into the weight, scratch there, before one grouped product.
Saved for backward: a copy of the trained columns of x (axis 1), x itself (the others). No gradient is formed for frozen entries
(unless the weight itself asks for one: then it is the dense one, zero where something trains).

The gradient of x is the same operator over turned views: `dX_e = g_e W'_e`. So the backward of the backward needs nothing more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context, recorded
from sparsify.ops.added_parts import check_support, write_values
from sparsify.ops.checks import require, require_floats, require_index, require_shape, require_together, require_within
from sparsify.ops.grouped_linear import (
    _grouped_linear_in_aten,
    check_grouped,
    multiply,
    oracle_grouped_linear,
    oracle_grouped_outer,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LIBRARY.define(
    "partial_grouped_linear(Tensor x, Tensor weight, Tensor block, Tensor? index, int start, int axis, Tensor offsets) -> Tensor"
)
LIBRARY.define(
    "sparse_lowrank_grouped_linear(Tensor x, Tensor weight, Tensor? values, Tensor? index, Tensor? a, Tensor? b, float scale, "
    "bool transposed, Tensor offsets) -> Tensor"
)

ops = torch.ops.sparsify


# --- the oracle ---------------------------------------------------------------------------------------------------------


def oracle_partial_grouped_linear(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts n m"],
    block: Float[Tensor, "experts i j"],
    channels: Int[Tensor, " s"],
    axis: int,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "S n"]:
    """Eager definition of the forward; channels `(s,)` on `axis` of every expert's matrix are the block's."""
    return oracle_grouped_linear(x, replaced(weight, block, channels, axis), offsets)


def oracle_partial_grouped_backward(
    g: Float[Tensor, "S n"],
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts n m"],
    block: Float[Tensor, "experts i j"],
    channels: Int[Tensor, " s"],
    axis: int,
    offsets: Int[Tensor, " experts"],
) -> tuple[Float[Tensor, "S m"], Float[Tensor, "experts i j"]]:
    """`(dX, dBlock)`: `dX_e = g_e W'_e`, `dBlock_e = (g_eᵀ x_e)` on the selected channels."""
    dx = oracle_grouped_linear(g, replaced(weight, block, channels, axis).transpose(1, 2), offsets)
    return dx, oracle_grouped_outer(g, x, offsets).index_select(axis + 1, channels)


def replaced(
    weight: Float[Tensor, "experts n m"], block: Float[Tensor, "experts i j"], channels: Int[Tensor, " s"], axis: int
) -> Float[Tensor, "experts n m"]:
    """`W'` as a new tensor, differentiable in both."""
    return weight.index_copy(axis + 1, channels.long(), block.to(weight.dtype))


def oracle_sparse_lowrank_grouped(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts p q"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "experts r m"] | None,
    b: Float[Tensor, "experts n r"] | None,
    scale: float,
    transposed: bool,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "S n"]:
    """Eager definition: one dense weight per expert."""
    logical = logical_view(with_values(weight, values, index), transposed)
    if a is not None and b is not None:
        logical = logical + scale * (b.to(logical.dtype) @ a.to(logical.dtype))
    return oracle_grouped_linear(x, logical, offsets)


def with_values(
    stored: Float[Tensor, "experts p q"], values: Float[Tensor, " k"] | None, index: Int[Tensor, " k"] | None
) -> Float[Tensor, "experts p q"]:
    if values is None or index is None:
        return stored
    return stored.reshape(-1).index_copy(0, index.long(), values.to(stored.dtype)).view(stored.shape)


def logical_view(stored: Float[Tensor, "experts p q"], transposed: bool) -> Float[Tensor, "experts n m"]:
    return stored.transpose(1, 2) if transposed else stored


# --- partial_grouped_linear ---------------------------------------------------------------------------------------------


def _check_partial(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts n m"],
    block: Float[Tensor, "experts i j"],
    index: Int[Tensor, " s"] | None,
    start: int,
    axis: int,
    offsets: Int[Tensor, " experts"],
) -> None:
    name = "partial_grouped_linear"
    check_grouped(name, x, weight, offsets)
    require(axis in (0, 1), lambda: f"{name}: axis must be 0 or 1, got {axis}")
    require(block.dim() == 3, lambda: f"{name}: the block {tuple(block.shape)} has not three dimensions")
    shape = list(weight.shape)
    shape[axis + 1] = block.shape[axis + 1]
    require_shape(name, "block", block, *shape)
    if index is not None:
        require_index(name, "index", index)
        require_shape(name, "index", index, block.shape[axis + 1])
        return
    require(start >= 0, lambda: f"{name}: the block starts at {start}")
    end = start + block.shape[axis + 1]
    require(
        end <= weight.shape[axis + 1],
        lambda: f"{name}: channels {start} to {end} of {weight.shape[axis + 1]}",
    )


def write_grouped_block(
    weight: Float[Tensor, "experts n m"],
    block: Float[Tensor, "experts i j"],
    index: Int[Tensor, " s"] | None,
    start: int,
    axis: int,
) -> None:
    """Copy `block` to its channels of every expert's matrix; bypasses the version counter (see `partial_linear`)."""
    if index is None:
        weight.data.narrow(axis + 1, start, block.shape[axis + 1]).copy_(block)
    else:
        weight.data.index_copy_(axis + 1, index.long(), block.to(weight.dtype))


def _partial_grouped(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts n m"],
    block: Float[Tensor, "experts i j"],
    index: Int[Tensor, " s"] | None,
    start: int,
    axis: int,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "S n"]:
    name = "partial_grouped_linear"
    _check_partial(x, weight, block, index, start, axis, offsets)
    require_together(name, x, weight, block, index, offsets)
    require_floats(name, x=x, weight=weight, block=block)
    if index is not None:
        require_within(name, "index", index, weight.shape[axis + 1], "weight's channels")
    write_grouped_block(weight, block, index, start, axis)
    return multiply(name, x, weight, offsets)


def _partial_grouped_fake(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts n m"],
    block: Float[Tensor, "experts i j"],
    index: Int[Tensor, " s"] | None,
    start: int,
    axis: int,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "S n"]:
    _check_partial(x, weight, block, index, start, axis, offsets)
    return x.new_empty(x.shape[0], weight.shape[1])


def _places(
    block: Float[Tensor, "experts i j"], index: Int[Tensor, " s"] | None, start: int, axis: int
) -> Int[Tensor, " s"]:
    return torch.arange(start, start + block.shape[axis + 1], device=block.device) if index is None else index


def _partial_grouped_in_aten(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts n m"],
    block: Float[Tensor, "experts i j"],
    index: Int[Tensor, " s"] | None,
    start: int,
    axis: int,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "S n"]:
    dense = replaced(weight, block, _places(block, index, start, axis), axis)
    return _grouped_linear_in_aten(x, dense, offsets)


def _channels(x: Float[Tensor, "S c"], index: Int[Tensor, " s"] | None, start: int, count: int) -> Float[Tensor, "S s"]:
    """A copy of the channels of rows that a block multiplies."""
    if index is not None:
        return x.index_select(-1, index)
    return x.narrow(-1, start, count).clone(memory_format=torch.contiguous_format)


def _frozen_gradient(
    g: Float[Tensor, "S n"],
    x: Float[Tensor, "S m"],
    block: int,
    index: Int[Tensor, " s"] | None,
    start: int,
    axis: int,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "experts n m"]:
    """`g_eᵀ x_e` with zeros under the block: for a weight that was made to require a gradient in spite of the plan."""
    places = torch.arange(start, start + block, device=g.device) if index is None else index.long()
    return ops.grouped_outer(g, x, offsets).index_fill(axis + 1, places, 0)


class _SavedPartial(Context, Protocol):
    """Where the block lies, and the types of the gradients for the weight and for it."""

    start: int
    axis: int
    count: int
    dtypes: tuple[torch.dtype, torch.dtype]


def _setup_partial(
    ctx: _SavedPartial, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, int, int, Tensor], output: Tensor
) -> None:
    x, weight, block, index, start, axis, offsets = inputs
    need = ctx.needs_input_grad
    ctx.start, ctx.axis, ctx.count, ctx.dtypes = start, axis, block.shape[axis + 1], (weight.dtype, block.dtype)
    kept = None
    if need[1] or (need[2] and axis == 0):
        kept = x
    elif need[2]:
        place = (x, index, start, ctx.count)
        kept = recorded(_channels, *place) if need[0] else _channels(*place)
    own = (weight, block) if need[0] else (None, None)
    ctx.save_for_backward(kept, *own, index, offsets)


def _backward_partial(ctx: _SavedPartial, g: Float[Tensor, "S n"]) -> tuple[Tensor | None, ...]:
    kept, weight, block, index, offsets = ctx.saved_tensors
    dx = d_weight = d_block = None
    if ctx.needs_input_grad[0]:
        turned = (weight.transpose(1, 2), block.transpose(1, 2))
        dx = ops.partial_grouped_linear(g, *turned, index, ctx.start, 1 - ctx.axis, offsets)
    place = (index, ctx.start)
    if ctx.needs_input_grad[1]:
        d_weight = _frozen_gradient(g, kept, ctx.count, *place, ctx.axis, offsets).to(ctx.dtypes[0])
        kept = _channels(kept, *place, ctx.count) if ctx.axis == 1 else kept
    if ctx.needs_input_grad[2]:
        rows = g if ctx.axis == 1 else _channels(g, *place, ctx.count)
        d_block = ops.grouped_outer(rows, kept, offsets).to(ctx.dtypes[1])
    return dx, d_weight, d_block, None, None, None, None


# --- sparse_lowrank_grouped_linear --------------------------------------------------------------------------------------


def _check_sparse(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts p q"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "experts r m"] | None,
    b: Float[Tensor, "experts n r"] | None,
    transposed: bool,
    offsets: Int[Tensor, " experts"],
) -> None:
    name = "sparse_lowrank_grouped_linear"
    require(weight.dim() == 3, lambda: f"{name}: the weight {tuple(weight.shape)} has not three dimensions")
    check_grouped(name, x, logical_view(weight, transposed), offsets)
    check_support(name, values, index)
    require((a is None) == (b is None), lambda: f"{name}: of two low-rank factors, one is missing")
    if a is not None and b is not None:
        experts, rows, columns = logical_view(weight, transposed).shape
        require(a.dim() == 3, lambda: f"{name}: a {tuple(a.shape)} has not three dimensions")
        require_shape(name, "a", a, experts, a.shape[1], columns)
        require_shape(name, "b", b, experts, rows, a.shape[1])


def _low_rank(
    x: Float[Tensor, "S inputs"], a: Float[Tensor, "experts outputs inputs"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "S outputs"]:
    return ops.grouped_linear(x, a.to(x.dtype), offsets)


def _sparse_grouped(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts p q"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "experts r m"] | None,
    b: Float[Tensor, "experts n r"] | None,
    scale: float,
    transposed: bool,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "S n"]:
    name = "sparse_lowrank_grouped_linear"
    _check_sparse(x, weight, values, index, a, b, transposed, offsets)
    require_together(name, x, weight, values, index, a, b, offsets)
    require_floats(name, x=x, weight=weight, values=values, a=a, b=b)
    if values is not None and index is not None:
        require(
            weight.is_contiguous(),
            lambda: f"{name}: the weight has strides {weight.stride()}: positions are of a contiguous one",
        )
        write_values(weight, values, index)
    y = multiply(name, x, logical_view(weight, transposed), offsets)
    return y if a is None or b is None else y.add_(_low_rank(_low_rank(x, a, offsets), b, offsets), alpha=scale)


def _sparse_grouped_fake(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts p q"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "experts r m"] | None,
    b: Float[Tensor, "experts n r"] | None,
    scale: float,
    transposed: bool,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "S n"]:
    _check_sparse(x, weight, values, index, a, b, transposed, offsets)
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


def _sparse_grouped_in_aten(
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts p q"],
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "experts r m"] | None,
    b: Float[Tensor, "experts n r"] | None,
    scale: float,
    transposed: bool,
    offsets: Int[Tensor, " experts"],
) -> Float[Tensor, "S n"]:
    y = _grouped_linear_in_aten(x, logical_view(with_values(weight, values, index), transposed), offsets)
    if a is None or b is None:
        return y
    return y + scale * _grouped_linear_in_aten(_grouped_linear_in_aten(x, a, offsets), b, offsets)


class _SavedSparse(Context, Protocol):
    """dtypes: of weight, values and the two factors; None where there is none."""

    scale: float
    transposed: bool
    dtypes: tuple[torch.dtype | None, ...]


def _setup_sparse(
    ctx: _SavedSparse,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, bool, Tensor],
    output: Tensor,
) -> None:
    x, weight, values, index, a, b, scale, transposed, offsets = inputs
    need = ctx.needs_input_grad
    ctx.scale, ctx.transposed = scale, transposed
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, values, a, b))
    trained = any(need[place] for place in (1, 2, 4, 5))
    own = (weight, values) if need[0] else (None, None)
    ctx.save_for_backward(x if trained else None, *own, index, a, b, offsets)


def _backward_sparse(ctx: _SavedSparse, g: Float[Tensor, "S n"]) -> tuple[Tensor | None, ...]:
    """`low = g B` is shared by `dX = g W' + s low A` and `dA = s lowᵀ x`; `dB = s gᵀ (x Aᵀ)`."""
    x, weight, values, index, a, b, offsets = ctx.saved_tensors
    need, (of_weight, of_values, of_a, of_b) = ctx.needs_input_grad, ctx.dtypes
    dx = d_weight = d_values = d_a = d_b = low = None
    if b is not None and (need[0] or need[4]):
        low = ctx.scale * _low_rank(g, b.transpose(1, 2), offsets)
    if need[0]:
        support = (None, None) if values is None else (values, index)
        dx = ops.sparse_lowrank_grouped_linear(g, weight, *support, None, None, 1.0, not ctx.transposed, offsets)
        dx = dx if low is None else dx + _low_rank(low, a.transpose(1, 2), offsets)
    pair = (x, g) if ctx.transposed else (g, x)
    if need[1]:
        d_weight = ops.grouped_outer(*pair, offsets).to(of_weight)
        if index is not None:
            d_weight = d_weight.view(-1).index_fill(0, index.long(), 0).view(d_weight.shape)
    if need[2]:
        d_values = ops.grouped_sampled(*pair, index, offsets).to(of_values)
    if need[4]:
        d_a = ops.grouped_outer(low, x, offsets).to(of_a)
    if need[5]:
        d_b = ops.grouped_outer(ctx.scale * g, _low_rank(x, a, offsets), offsets).to(of_b)
    return dx, d_weight, d_values, None, d_a, d_b, None, None, None


LIBRARY.implement(
    "partial_grouped_linear",
    kernel=_partial_grouped,
    fake=_partial_grouped_fake,
    aten=_partial_grouped_in_aten,
    backward=_backward_partial,
    setup=_setup_partial,
)
LIBRARY.implement(
    "sparse_lowrank_grouped_linear",
    kernel=_sparse_grouped,
    fake=_sparse_grouped_fake,
    aten=_sparse_grouped_in_aten,
    backward=_backward_sparse,
    setup=_setup_sparse,
)
