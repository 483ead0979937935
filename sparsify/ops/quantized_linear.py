"""A linear over a packed base (NF4, int8, int4), with any trained part: a block of channels, sparse values, low-rank factors.

    quantized_linear      y = x W'ᵀ + s (x Aᵀ) Bᵀ + b,   W' = unpacked W with `block` at `channels` and `values` at `index`
    quantized_linear_dx   dX = g W' + s low A

The base is unpacked inside the operator, forward and backward, and dropped: at most one dense layer is alive. On a GPU, up to
64 tokens are multiplied with the packed weight instead, sparse and low-rank part included, in one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.formats import check_packed, format_of_operator, unpack
from sparsify.library import LIBRARY, Context, recorded
from sparsify.ops import dispatch
from sparsify.ops.added_parts import (
    added_gradients,
    check_dx,
    check_linear,
    check_support,
    dense_dx,
    dense_forward,
    dtype_if,
    dx_in_aten,
    linear_in_aten,
    low_rank_gradients,
    project,
    sparse_gradient,
    with_values,
    write_values,
)
from sparsify.ops.checks import require, require_floats, require_index, require_shape, require_together, require_within
from sparsify.ops.saved_input import input_link, restored_input, saved_input
from sparsify.ops.shapes import Sizes, flat, logical_shape
from sparsify.ops.skinny_products import reduced

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LIBRARY.define(
    "quantized_linear(Tensor x, str format, int rows, int columns, bool transposed, Tensor? bias, Tensor? block, "
    "Tensor? channels, int axis, Tensor? values, Tensor? index, Tensor? a, Tensor? b, float scale, Tensor[] packed) -> Tensor"
)
LIBRARY.define(
    "quantized_linear_dx(Tensor g, str format, int rows, int columns, bool transposed, Tensor? block, "
    "Tensor? channels, int axis, Tensor? values, Tensor? index, Tensor? low, Tensor? a, float scale, Tensor[] packed) -> Tensor"
)


def _check_block(
    name: str,
    rows: Sizes,
    columns: Sizes,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
) -> None:
    require((block is None) == (channels is None), lambda: f"{name}: of a block and its channels, one is missing")
    if block is not None and channels is not None:
        require(axis in (0, 1), lambda: f"{name}: axis must be 0 or 1, got {axis}")
        require_index(name, "channels", channels)
        count = channels.shape[0]
        require_shape(name, "block", block, *((count, columns) if axis == 0 else (rows, count)))


def dense_weight(
    packed: list[Tensor],
    format: str,
    shape: list[int],
    transposed: bool,
    dtype: torch.dtype,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
) -> Float[Tensor, "p q"]:
    """Unpack one layer and put the trained parts into it; `(stored)` layout, a fresh tensor."""
    check_packed(packed, format, (shape[0], shape[1]))
    _check_block("quantized base", *logical_shape(shape, transposed), block, channels, axis)
    check_support("quantized base", values, index)
    stored = unpack(packed, format, tuple(shape), dtype)
    if block is not None and channels is not None:
        logical = stored.t() if transposed else stored
        require_within("quantized base", "channels", channels, logical.shape[axis], "weight's channels")
        logical.index_copy_(axis, channels.long(), block.to(dtype))
    write_values(stored, values, index)
    return stored


def one_pass(
    x: Float[Tensor, "*t m"],
    kernel: str,
    rows: int,
    bias: Float[Tensor, " n"] | None,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    packed: list[Tensor],
) -> Float[Tensor, "*t n"]:
    """The forward without an unpacked weight. A trained block of channels is a small product beside the kernel's: its columns
    read x where the kernel reads zeros, its rows are computed over."""
    flat = x.reshape(-1, x.shape[-1])
    u = None if a is None or b is None else reduced(flat, a)
    place = None if block is None or channels is None else channels.long()
    read = flat.index_fill(1, place, 0.0) if place is not None and axis == 1 else flat
    second = None if u is None else b
    y = dispatch.quantized_product(packed, kernel, read, bias, values, index, u, second, scale, rows)
    if place is not None and block is not None:
        block = block.to(x.dtype)
        if axis == 1:
            y.addmm_(flat.index_select(1, place), block.t())
        else:
            part = torch.nn.functional.linear(flat, block, None if bias is None else bias.to(x.dtype)[place])
            y.index_copy_(1, place, part if u is None or b is None else project(part, u, b[place].t(), scale))
    return y.view(*x.shape[:-1], rows)


def _quantized(
    x: Float[Tensor, "*t m"],
    format: str,
    rows: int,
    columns: int,
    transposed: bool,
    bias: Float[Tensor, " n"] | None,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    packed: list[Tensor],
) -> Float[Tensor, "*t n"]:
    name = "quantized_linear"
    check_linear(name, x, *logical_shape((rows, columns), transposed), bias, values, index, a, b)
    _check_block(name, *logical_shape((rows, columns), transposed), block, channels, axis)
    require_together(name, x, bias, block, channels, values, index, a, b, *packed)
    require_floats(name, x=x, bias=bias, block=block, values=values, a=a, b=b)
    one_sided = values is None or block is None
    kernel = format_of_operator(format).kernel
    if kernel is not None and one_sided and dispatch.quantized_serves(x, rows, columns, transposed, index):
        check_packed(packed, format, (rows, columns))
        if channels is not None:
            require_within(name, "channels", channels, columns if axis == 1 else rows, "weight's channels")
        if index is not None:
            require_within(name, "index", index, rows * columns, "weight")
        return one_pass(x, kernel, rows, bias, block, channels, axis, values, index, a, b, scale, packed)
    stored = dense_weight(packed, format, [rows, columns], transposed, x.dtype, block, channels, axis, values, index)
    return dense_forward(x, stored, transposed, bias, a, b, scale)


def _quantized_dx(
    g: Float[Tensor, "*t n"],
    format: str,
    rows: int,
    columns: int,
    transposed: bool,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
    packed: list[Tensor],
) -> Float[Tensor, "*t m"]:
    name = "quantized_linear_dx"
    check_dx(name, g, *logical_shape((rows, columns), transposed), values, index, low, a)
    require_together(name, g, block, channels, values, index, low, a, *packed)
    require_floats(name, g=g, block=block, values=values, low=low, a=a)
    stored = dense_weight(packed, format, [rows, columns], transposed, g.dtype, block, channels, axis, values, index)
    return dense_dx(g, stored, transposed, low, a, scale)


def _quantized_fake(
    x: Float[Tensor, "*t m"],
    format: str,
    rows: int,
    columns: int,
    transposed: bool,
    bias: Float[Tensor, " n"] | None,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    packed: list[Tensor],
) -> Float[Tensor, "*t n"]:
    shape = logical_shape((rows, columns), transposed)
    check_linear("quantized_linear", x, *shape, bias, values, index, a, b)
    _check_block("quantized_linear", *shape, block, channels, axis)
    return x.new_empty((*x.shape[:-1], shape[0]))


def _quantized_dx_fake(
    g: Float[Tensor, "*t n"],
    format: str,
    rows: int,
    columns: int,
    transposed: bool,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
    packed: list[Tensor],
) -> Float[Tensor, "*t m"]:
    shape = logical_shape((rows, columns), transposed)
    check_dx("quantized_linear_dx", g, *shape, values, index, low, a)
    _check_block("quantized_linear_dx", *shape, block, channels, axis)
    return g.new_empty((*g.shape[:-1], shape[1]))


def _base_in_aten(
    packed: list[Tensor],
    format: str,
    shape: tuple[int, int],
    transposed: bool,
    dtype: torch.dtype,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
) -> Float[Tensor, "n m"]:
    """The logical weight `(n, m)` that `dense_weight` stands for, differentiable in block and values."""
    check_packed(packed, format, shape)
    stored = unpack(packed, format, shape, dtype)
    if block is not None and channels is not None:
        trained, side = (block.t(), 1 - axis) if transposed else (block, axis)
        stored = stored.index_copy(side, channels.long(), trained.to(dtype))
    stored = with_values(stored, values, index)
    return stored.t() if transposed else stored


def _quantized_in_aten(
    x: Float[Tensor, "*t m"],
    format: str,
    rows: int,
    columns: int,
    transposed: bool,
    bias: Float[Tensor, " n"] | None,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    packed: list[Tensor],
) -> Float[Tensor, "*t n"]:
    weight = _base_in_aten(packed, format, (rows, columns), transposed, x.dtype, block, channels, axis, values, index)
    return linear_in_aten(x, weight, bias, a, b, scale)


def _quantized_dx_in_aten(
    g: Float[Tensor, "*t n"],
    format: str,
    rows: int,
    columns: int,
    transposed: bool,
    block: Float[Tensor, "i j"] | None,
    channels: Int[Tensor, " s"] | None,
    axis: int,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
    packed: list[Tensor],
) -> Float[Tensor, "*t m"]:
    weight = _base_in_aten(packed, format, (rows, columns), transposed, g.dtype, block, channels, axis, values, index)
    return dx_in_aten(g, weight, low, a, scale)


class _Saved(Context, Protocol):
    """meta: format, rows, columns, transposed. whole: whether all of x was saved, or a block's columns alone (of dX's backward it is
    all of the outer gradient). dtypes: of the gradients that are wanted."""

    meta: tuple[str, int, int, bool]
    whole: bool
    axis: int
    scale: float
    dtypes: tuple[torch.dtype | None, ...]


#: one gradient an argument; those of `packed` are a list
Gradients = tuple[Tensor | list[None] | None, ...]


def _setup_quantized(
    ctx: _Saved,
    inputs: tuple[
        Tensor,
        str,
        int,
        int,
        bool,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        int,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        float,
        list[Tensor],
    ],
    output: Tensor,
) -> None:
    x, format, rows, columns, transposed, bias, block, channels, axis, values, index, a, b, scale, packed = inputs
    need = ctx.needs_input_grad  # flattened: positions hold up to `packed`, which is why it stands last
    whole = any(need[i] for i in (9, 11, 12)) or (need[6] and axis == 0)
    first = second = None
    if whole:
        first, second = saved_input(x)
    elif need[6]:
        assert channels is not None  # a block has its channels
        first = recorded(x.index_select, -1, channels) if need[0] else x.index_select(-1, channels)
    own = (block, values) if need[0] else (None, None)
    ctx.save_for_backward(
        first,
        second,
        input_link(x, second),
        *own,
        channels,
        index,
        a if need[0] or need[12] else None,
        b if need[0] or need[11] else None,
        *packed,
    )
    ctx.meta, ctx.whole = (format, rows, columns, transposed), whole
    ctx.axis, ctx.scale = axis, scale
    ctx.dtypes = tuple(dtype_if(need[i], t) for i, t in ((5, bias), (6, block), (9, values), (11, a), (12, b)))


def _quantized_block_gradient(
    ctx: _Saved,
    g: Float[Tensor, "*t n"],
    x: Float[Tensor, "*t c"],
    channels: Int[Tensor, " s"],
    index: Int[Tensor, " k"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "i j"]:
    """`(gᵀ x)` on trained channels in `dtype`, zero where the sparse part is written over them. x: as `ctx.whole` says."""
    _, rows, columns, transposed = ctx.meta
    if ctx.axis == 1 and ctx.whole:
        x = x.index_select(-1, channels)
    tokens_g, tokens_x = flat(g), flat(x)
    tokens_g = tokens_g if ctx.axis == 1 else tokens_g.index_select(1, channels)
    gradient = tokens_g.t().mm(tokens_x)
    if index is not None:
        free = torch.ones((rows, columns), dtype=torch.bool, device=g.device)
        free.view(-1)[index.long()] = False
        gradient = gradient * (free.t() if transposed else free).index_select(ctx.axis, channels)
    return gradient.to(dtype)


def _backward_quantized(ctx: _Saved, g: Float[Tensor, "*t n"]) -> Gradients:
    saved = ctx.saved_tensors  # asked for once: checkpointing gives each tensor back once
    *kept, block, values, channels, index, a, b = saved[:9]
    packed = list(saved[9:])
    need, (of_bias, of_block, of_values, of_a, of_b) = ctx.needs_input_grad, ctx.dtypes
    *_, transposed = ctx.meta
    dx = d_block = None
    x = restored_input(*kept)
    low, d_a, d_b = low_rank_gradients(g, x if ctx.whole else None, a, b, ctx.scale, need[0], of_a, of_b)
    if need[0]:
        parts = (None if block is None else block, None if block is None else channels, ctx.axis)
        parts += (values, None if values is None else index, low, a, ctx.scale, packed)
        dx = torch.ops.sparsify.quantized_linear_dx(g, *ctx.meta, *parts)
    d_bias = None if of_bias is None else flat(g).sum(0).to(of_bias)
    if of_block is not None and x is not None:
        d_block = _quantized_block_gradient(ctx, g, x, channels, index, of_block)
    d_values = sparse_gradient(g, x if ctx.whole else None, index, transposed, of_values)
    gradients = (dx, None, None, None, None, d_bias, d_block, None, None, d_values, None, d_a, d_b, None)
    return (*gradients, [None] * len(packed))


def _setup_quantized_dx(
    ctx: _Saved,
    inputs: tuple[
        Tensor,
        str,
        int,
        int,
        bool,
        Tensor | None,
        Tensor | None,
        int,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        float,
        list[Tensor],
    ],
    output: Tensor,
) -> None:
    g, format, rows, columns, transposed, block, channels, axis, values, index, low, a, scale, packed = inputs
    need = ctx.needs_input_grad
    own = (block, values) if need[0] else (None, None)
    ctx.save_for_backward(g if need[5] or need[8] else None, *own, channels, index, low, a, *packed)
    ctx.meta, ctx.whole = (format, rows, columns, transposed), True
    ctx.axis, ctx.scale = axis, scale
    ctx.dtypes = tuple(dtype_if(need[i], t) for i, t in ((5, block), (8, values), (10, low), (11, a)))


def _backward_quantized_dx(ctx: _Saved, outer: Float[Tensor, "*t m"]) -> Gradients:
    """As of `sparse_lowrank_linear_dx`, with the block's gradient beside."""
    saved = ctx.saved_tensors
    g, block, values, channels, index, low, a = saved[:7]
    packed = list(saved[7:])
    of_block, of_values, of_low, of_a = ctx.dtypes
    *_, transposed = ctx.meta
    dg = d_block = None
    if ctx.needs_input_grad[0]:
        parts = (None, block, None if block is None else channels, ctx.axis, values, None if values is None else index)
        dg = torch.ops.sparsify.quantized_linear(outer, *ctx.meta, *parts, None, None, 1.0, packed)
    if of_block is not None:
        d_block = _quantized_block_gradient(ctx, g, outer, channels, index, of_block)
    d_values = sparse_gradient(g, outer, index, transposed, of_values)
    d_low, d_a = added_gradients(outer, low, a, ctx.scale, of_low, of_a)
    gradients = (dg, None, None, None, None, d_block, None, None, d_values, None, d_low, d_a, None)
    return (*gradients, [None] * len(packed))


LIBRARY.implement(
    "quantized_linear",
    kernel=_quantized,
    fake=_quantized_fake,
    aten=_quantized_in_aten,
    backward=_backward_quantized,
    setup=_setup_quantized,
)
LIBRARY.implement(
    "quantized_linear_dx",
    kernel=_quantized_dx,
    fake=_quantized_dx_fake,
    aten=_quantized_dx_in_aten,
    backward=_backward_quantized_dx,
    setup=_setup_quantized_dx,
)
LIBRARY.autocast("quantized_linear")
