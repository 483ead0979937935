"""A linear of which a block of channels trains.

    partial_linear(x, weight, bias, block, start, axis)        y = x W'ᵀ + b,  W' = W with a contiguous block of channels replaced
    partial_linear_at(x, weight, bias, block, index, axis)     the same with channels at `index` (PaCA without co-permutation)

`x (*, m)`, `weight (n, m)` frozen, `bias (n,)`; `axis` 1: the block is input columns, `block (n, s)`; `axis` 0: output rows,
`block (s, m)`. `block` is the trained parameter and holds *values*, usually in fp32 over a 16-bit weight.

One GEMM, no second copy. The region of `weight` under the block is scratch: the operator writes the block there (a copy of
1–3 % of the weight) and multiplies once. Nobody else may read that region, so the operator is a pure function of its inputs,
which is what its schema says; `weight`'s version counter does not move, so two forwards before one backward are fine, while
`block`, being saved, still makes autograd complain when it is changed between forward and backward. The backward writes
the region again before `dX = g W'`, because under FSDP2 or after an adapter switch it may hold something else.
`kernels/README.md` has the measurement that chose this layout.

Saved for backward: a *copy* of `x[..., sel]` (axis 1) or `x` itself (axis 0), never a view that would keep more alive.
No gradient is formed for frozen entries (unless the weight itself asks for one: then it is the dense one, zero under the block),
and `dX` is a separate operator that is pruned when nobody needs it. `dX` is differentiable in turn: `dX = g W'` has the gradients
`v W'ᵀ` for g and `(gᵀ v)` on the channels for the block, which are the first operator and the same product again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context, recorded
from sparsify.ops import dispatch
from sparsify.ops.checks import require, require_floats, require_index, require_together, require_within
from sparsify.ops.shapes import flat

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LIBRARY.define("partial_linear(Tensor x, Tensor weight, Tensor? bias, Tensor block, int start, int axis) -> Tensor")
LIBRARY.define("partial_linear_dx(Tensor g, Tensor weight, Tensor block, int start, int axis) -> Tensor")
LIBRARY.define(
    "partial_linear_at(Tensor x, Tensor weight, Tensor? bias, Tensor block, Tensor index, int axis) -> Tensor"
)
LIBRARY.define("partial_linear_at_dx(Tensor g, Tensor weight, Tensor block, Tensor index, int axis) -> Tensor")


# --- the oracle: what the operators mean, written out, in any precision -------------------------------------------------


def effective_weight(
    weight: Float[Tensor, "n m"], block: Float[Tensor, "i j"], channels: Int[Tensor, " s"], axis: int
) -> Float[Tensor, "n m"]:
    """`W'`: a new tensor `(n, m)`, `weight` with the channels `channels (s,)` on `axis` replaced by `block`."""
    return weight.index_copy(axis, channels, block.to(weight.dtype))


def oracle_partial_linear(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "n m"],
    bias: Float[Tensor, " n"] | None,
    block: Float[Tensor, "i j"],
    channels: Int[Tensor, " s"],
    axis: int,
) -> Float[Tensor, "*t n"]:
    """Eager definition of the forward."""
    y = x @ effective_weight(weight, block, channels, axis).transpose(0, 1)
    return y if bias is None else y + bias


def oracle_partial_linear_backward(
    g: Float[Tensor, "*t n"],
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "n m"],
    block: Float[Tensor, "i j"],
    channels: Int[Tensor, " s"],
    axis: int,
) -> tuple[Float[Tensor, "*t m"], Float[Tensor, "i j"], Float[Tensor, " n"]]:
    """`(dX, dBlock, dBias)`, written out: `dX = g W'`, `dBlock = (gᵀ X)` on the selected channels, `dBias = Σ g`."""
    tokens_g, tokens_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    full = tokens_g.transpose(0, 1) @ tokens_x
    return g @ effective_weight(weight, block, channels, axis), full.index_select(axis, channels), tokens_g.sum(0)


# --- partial_linear: a contiguous block ----------------------------------------------------------------------------------


def write_block(weight: Float[Tensor, "n m"], block: Float[Tensor, "i j"], start: int, axis: int) -> None:
    """Copy `block` into its region of `weight`; bypasses the version counter (see the module docstring)."""
    weight.data.narrow(axis, start, block.shape[axis]).copy_(block)


def write_block_at(
    weight: Float[Tensor, "n m"], block: Float[Tensor, "i j"], index: Int[Tensor, " s"], axis: int
) -> None:
    """Copy `block` to the channels `index` of `weight`; bypasses the version counter."""
    weight.data.index_copy_(axis, index.long(), block.to(weight.dtype))


def _matmul(
    x: Float[Tensor, "*t m"], weight: Float[Tensor, "n m"], bias: Float[Tensor, " n"] | None
) -> Float[Tensor, "*t n"]:
    """`x Wᵀ + b` in the dtype of `x` (under autocast the weight is still in its own)."""
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _check_sizes(
    name: str,
    x: Float[Tensor, "*t c"],
    weight: Float[Tensor, "n m"],
    block: Float[Tensor, "i j"],
    where: int | Int[Tensor, " s"],
    axis: int,
    side: int,
) -> None:
    """That block and weight fit, and that `x` has as many channels as the weight on `side`; without reading any tensor."""
    require(axis in (0, 1), lambda: f"{name}: axis must be 0 or 1, got {axis}")
    require(
        weight.dim() == 2 and block.dim() == 2 and x.dim() >= 1,
        lambda: (
            f"{name}: x {tuple(x.shape)}, weight {tuple(weight.shape)}, block {tuple(block.shape)}: expected (…, m), (n, m) "
            "and a matrix"
        ),
    )
    require(
        x.shape[-1] == weight.shape[side],
        lambda: f"{name}: the input {tuple(x.shape)} has {x.shape[-1]} channels, the weight {weight.shape[side]}",
    )
    require(
        block.shape[1 - axis] == weight.shape[1 - axis],
        lambda: f"{name}: a block {tuple(block.shape)} does not fit axis {axis} of a weight {tuple(weight.shape)}",
    )
    if isinstance(where, Tensor):
        require_index(name, "index", where)
        require(
            where.shape[0] == block.shape[axis],
            lambda: f"{name}: {where.shape[0]} channels in the index, {block.shape[axis]} in the block",
        )
    else:
        require(where >= 0, lambda: f"{name}: the block starts at {where}")
        require(
            where + block.shape[axis] <= weight.shape[axis],
            lambda: f"{name}: channels {where} to {where + block.shape[axis]} of {weight.shape[axis]}",
        )


def _write(
    name: str,
    x: Float[Tensor, "*t c"],
    weight: Float[Tensor, "n m"],
    block: Float[Tensor, "i j"],
    where: int | Int[Tensor, " s"],
    axis: int,
    side: int,
) -> None:
    """Check everything, then write the block into its region."""
    _check_sizes(name, x, weight, block, where, axis, side)
    require_floats(name, x=x, weight=weight, block=block)
    require_together(name, x, weight, block, where if isinstance(where, Tensor) else None)
    if isinstance(where, Tensor):
        require_within(name, "index", where, weight.shape[axis], "weight's channels")
        write_block_at(weight, block, where, axis)
    else:
        write_block(weight, block, where, axis)


def _check_bias(name: str, bias: Float[Tensor, " n"] | None, rows: int) -> None:
    if bias is not None:
        require(
            bias.dim() == 1 and bias.shape[0] == rows,
            lambda: f"{name}: a bias {tuple(bias.shape)} does not fit {rows} output channels",
        )


def _forward_kernel(name: str) -> Callable[..., Tensor]:
    def kernel(
        x: Float[Tensor, "*t m"],
        weight: Float[Tensor, "n m"],
        bias: Float[Tensor, " n"] | None,
        block: Float[Tensor, "i j"],
        where: int | Int[Tensor, " s"],
        axis: int,
    ) -> Float[Tensor, "*t c"]:
        _check_bias(name, bias, weight.shape[0])
        _write(name, x, weight, block, where, axis, 1)
        return _matmul(x, weight, bias)

    return kernel


def _dx_kernel(name: str) -> Callable[..., Tensor]:
    def kernel(
        g: Float[Tensor, "*t n"],
        weight: Float[Tensor, "n m"],
        block: Float[Tensor, "i j"],
        where: int | Int[Tensor, " s"],
        axis: int,
    ) -> Float[Tensor, "*t c"]:
        _write(name, g, weight, block, where, axis, 0)
        return g.matmul(weight.to(g.dtype))

    return kernel


def _forward_fake(name: str) -> Callable[..., Tensor]:
    def fake(
        x: Float[Tensor, "*t m"],
        weight: Float[Tensor, "n m"],
        bias: Float[Tensor, " n"] | None,
        block: Float[Tensor, "i j"],
        where: int | Int[Tensor, " s"],
        axis: int,
    ) -> Float[Tensor, "*t c"]:
        _check_sizes(name, x, weight, block, where, axis, 1)
        _check_bias(name, bias, weight.shape[0])
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    return fake


def _dx_fake(name: str) -> Callable[..., Tensor]:
    def fake(
        g: Float[Tensor, "*t n"],
        weight: Float[Tensor, "n m"],
        block: Float[Tensor, "i j"],
        where: int | Int[Tensor, " s"],
        axis: int,
    ) -> Float[Tensor, "*t c"]:
        _check_sizes(name, g, weight, block, where, axis, 0)
        return g.new_empty((*g.shape[:-1], weight.shape[1]))

    return fake


def _replaced(
    weight: Float[Tensor, "n m"], block: Float[Tensor, "i j"], where: int | Int[Tensor, " s"], axis: int
) -> Float[Tensor, "n m"]:
    """`W'` as a new tensor, differentiable in both."""
    if not isinstance(where, Tensor):
        where = torch.arange(where, where + block.shape[axis], device=weight.device)
    return effective_weight(weight, block, where.long(), axis)


def _forward_in_aten(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "n m"],
    bias: Float[Tensor, " n"] | None,
    block: Float[Tensor, "i j"],
    where: int | Int[Tensor, " s"],
    axis: int,
) -> Float[Tensor, "*t n"]:
    return _matmul(x, _replaced(weight, block, where, axis), bias)


def _dx_in_aten(
    g: Float[Tensor, "*t n"],
    weight: Float[Tensor, "n m"],
    block: Float[Tensor, "i j"],
    where: int | Int[Tensor, " s"],
    axis: int,
) -> Float[Tensor, "*t m"]:
    return g.matmul(_replaced(weight, block, where, axis).to(g.dtype))


def _columns(x: Float[Tensor, "*t m"], where: int | Int[Tensor, " s"], count: int) -> Float[Tensor, "*t s"]:
    """A copy of the channels of `x` that an axis-1 block multiplies."""
    if isinstance(where, Tensor):
        return x.index_select(-1, where)
    return x.narrow(-1, where, count).clone(memory_format=torch.contiguous_format)


def _block_gradient(
    g: Float[Tensor, "*t n"], kept: Float[Tensor, "*t j"], rows: Int[Tensor, " s"] | slice | None
) -> Float[Tensor, "i j"]:
    """`(gᵀ kept)` for all rows, a range of them, or those at an index. On CUDA in fp32: cuBLAS on a view for a range, the
    generated kernel, which gathers as it reads, for an index."""
    tokens_g, tokens_x = flat(g), flat(kept)
    if isinstance(rows, slice):
        tokens_g, rows = tokens_g[:, rows], None
    if dispatch.channel_grad_serves(g.device):
        return torch.ops.sparsify.channel_grad(tokens_g, tokens_x, rows)
    return (tokens_g if rows is None else tokens_g.index_select(1, rows)).t().mm(tokens_x)


def _block_rows(where: int | Int[Tensor, " s"], count: int, axis: int) -> Int[Tensor, " s"] | slice | None:
    """The rows of the weight gradient that belong to the block; None for all (axis 1, whose columns are taken beforehand)."""
    if axis == 1 or isinstance(where, Tensor):
        return None if axis == 1 else where  # type: ignore[return-value]
    return slice(where, where + count)


def _frozen_gradient(
    g: Float[Tensor, "*t n"], x: Float[Tensor, "*t m"], where: int | Int[Tensor, " s"], count: int, axis: int
) -> Float[Tensor, "n m"]:
    """`gᵀ x` with zeros under the block: for a weight that was made to require a gradient in spite of the plan."""
    if not isinstance(where, Tensor):
        where = torch.arange(where, where + count, device=g.device)
    return flat(g).t().mm(flat(x)).index_fill(axis, where.long(), 0)


class _Saved(Context, Protocol):
    """What a backward keeps: where the block starts (unset where an index is saved), its channels, and the gradients' types."""

    where: int
    axis: int
    count: int
    dtypes: tuple[torch.dtype | None, ...]


def _setup_context(
    ctx: _Saved, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, int | Tensor, int], output: Tensor
) -> None:
    x, weight, bias, block, where, axis = inputs
    need = ctx.needs_input_grad
    if need[1] or (need[3] and axis == 0):
        kept = x
    elif not need[3]:
        kept = None
    elif need[0]:
        kept = recorded(_columns, x, where, block.shape[1])
    else:
        kept = _columns(x, where, block.shape[1])
    index = None
    if isinstance(where, Tensor):
        index = where
    else:
        ctx.where = where
    ctx.save_for_backward(kept, weight if need[0] else None, block if need[0] else None, index)
    ctx.axis, ctx.count = axis, block.shape[axis]
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype, block.dtype


def _backward(ctx: _Saved, g: Float[Tensor, "*t n"]) -> tuple[Tensor | None, ...]:
    kept, weight, block, index = ctx.saved_tensors
    where, axis, need = ctx.where if index is None else index, ctx.axis, ctx.needs_input_grad
    weight_dtype, bias_dtype, block_dtype = ctx.dtypes
    dx = d_weight = d_bias = d_block = None
    if need[0]:
        op = torch.ops.sparsify.partial_linear_dx if index is None else torch.ops.sparsify.partial_linear_at_dx
        dx = op(g, weight, block, where, axis)
    if need[1]:
        d_weight = _frozen_gradient(g, kept, where, ctx.count, axis).to(weight_dtype)
        kept = _columns(kept, where, ctx.count) if axis == 1 else kept
    if need[2]:
        d_bias = flat(g).sum(0).to(bias_dtype)
    if need[3]:
        d_block = _block_gradient(g, kept, _block_rows(where, ctx.count, axis)).to(block_dtype)
    return dx, d_weight, d_bias, d_block, None, None


def _setup_dx(ctx: _Saved, inputs: tuple[Tensor, Tensor, Tensor, int | Tensor, int], output: Tensor) -> None:
    g, weight, block, where, axis = inputs
    need = ctx.needs_input_grad
    index = None
    if isinstance(where, Tensor):
        index = where
    else:
        ctx.where = where
    parts = (weight, block) if need[0] else (None, None)
    ctx.save_for_backward(g if need[1] or need[2] else None, *parts, index)
    ctx.axis, ctx.count = axis, block.shape[axis]
    ctx.dtypes = weight.dtype, block.dtype


def _backward_dx(ctx: _Saved, outer: Float[Tensor, "*t m"]) -> tuple[Tensor | None, ...]:
    """Of `dX = g W'`: `outer W'ᵀ` for g, `gᵀ outer` on the channels for the block and beside them for the weight."""
    g, weight, block, index = ctx.saved_tensors
    where, axis, need = ctx.where if index is None else index, ctx.axis, ctx.needs_input_grad
    dg = d_weight = d_block = None
    if need[0]:
        op = torch.ops.sparsify.partial_linear if index is None else torch.ops.sparsify.partial_linear_at
        dg = op(outer, weight, None, block, where, axis)
    if need[1]:
        d_weight = _frozen_gradient(g, outer, where, ctx.count, axis).to(ctx.dtypes[0])
    if need[2]:
        read = _columns(outer, where, ctx.count) if axis == 1 else outer
        d_block = _block_gradient(g, read, _block_rows(where, ctx.count, axis)).to(ctx.dtypes[1])
    return dg, d_weight, d_block, None, None


for _name in ("partial_linear", "partial_linear_at"):
    LIBRARY.implement(
        _name,
        kernel=_forward_kernel(_name),
        fake=_forward_fake(_name),
        aten=_forward_in_aten,
        backward=_backward,
        setup=_setup_context,
    )
    LIBRARY.implement(
        f"{_name}_dx",
        kernel=_dx_kernel(f"{_name}_dx"),
        fake=_dx_fake(f"{_name}_dx"),
        aten=_dx_in_aten,
        backward=_backward_dx,
        setup=_setup_dx,
    )
    LIBRARY.autocast(_name)
