"""The operators of the `sparsify` namespace: schema, eager oracle, fake, autograd formula, autocast rule.

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
No gradient is ever formed for frozen entries, and `dX` is a separate operator that is pruned when nobody needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sparsify.kernels.gpu.operator  # noqa: F401  registers channel_grad
from sparsify.kernels.gpu.build import can_launch

LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
LIBRARY.define("partial_linear(Tensor x, Tensor weight, Tensor? bias, Tensor block, int start, int axis) -> Tensor")
LIBRARY.define("partial_linear_dx(Tensor g, Tensor weight, Tensor block, int start, int axis) -> Tensor")
LIBRARY.define(
    "partial_linear_at(Tensor x, Tensor weight, Tensor? bias, Tensor block, Tensor index, int axis) -> Tensor"
)
LIBRARY.define("partial_linear_at_dx(Tensor g, Tensor weight, Tensor block, Tensor index, int axis) -> Tensor")


# --- the oracle: what the operators mean, written out, in any precision -------------------------------------------------


def effective_weight(weight: Tensor, block: Tensor, channels: Tensor, axis: int) -> Tensor:
    """`W'`: a new tensor `(n, m)`, `weight` with the channels `channels (s,)` on `axis` replaced by `block`."""
    return weight.index_copy(axis, channels, block.to(weight.dtype))


def oracle_partial_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, channels: Tensor, axis: int
) -> Tensor:
    """Eager definition of the forward."""
    y = x @ effective_weight(weight, block, channels, axis).transpose(0, 1)
    return y if bias is None else y + bias


def oracle_partial_linear_backward(
    g: Tensor, x: Tensor, weight: Tensor, block: Tensor, channels: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dX, dBlock, dBias)`, written out: `dX = g W'`, `dBlock = (gᵀ X)` on the selected channels, `dBias = Σ g`."""
    tokens_g, tokens_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    full = tokens_g.transpose(0, 1) @ tokens_x
    return g @ effective_weight(weight, block, channels, axis), full.index_select(axis, channels), tokens_g.sum(0)


# --- partial_linear: a contiguous block ----------------------------------------------------------------------------------


def write_block(weight: Tensor, block: Tensor, start: int, axis: int) -> None:
    """Copy `block` into its region of `weight`; bypasses the version counter (see the module docstring)."""
    weight.data.narrow(axis, start, block.shape[axis]).copy_(block)


def write_block_at(weight: Tensor, block: Tensor, index: Tensor, axis: int) -> None:
    """Copy `block` to the channels `index` of `weight`; bypasses the version counter."""
    weight.data.index_copy_(axis, index, block.to(weight.dtype))


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b` in the dtype of `x` (under autocast the weight is still in its own)."""
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _partial_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, start: int, axis: int) -> Tensor:
    write_block(weight, block, start, axis)
    return _matmul(x, weight, bias)


def _partial_linear_dx(g: Tensor, weight: Tensor, block: Tensor, start: int, axis: int) -> Tensor:
    write_block(weight, block, start, axis)
    return g.matmul(weight.to(g.dtype))


def _partial_linear_at(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, index: Tensor, axis: int
) -> Tensor:
    write_block_at(weight, block, index, axis)
    return _matmul(x, weight, bias)


def _partial_linear_at_dx(g: Tensor, weight: Tensor, block: Tensor, index: Tensor, axis: int) -> Tensor:
    write_block_at(weight, block, index, axis)
    return g.matmul(weight.to(g.dtype))


for _name, _function in (
    ("partial_linear", _partial_linear),
    ("partial_linear_dx", _partial_linear_dx),
    ("partial_linear_at", _partial_linear_at),
    ("partial_linear_at_dx", _partial_linear_at_dx),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, where: Any, axis: int) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x has {x.shape[-1]} channels, the weight {weight.shape[1]}")
    torch._check(axis in (0, 1), lambda: f"axis must be 0 or 1, got {axis}")
    torch._check(
        block.shape[1 - axis] == weight.shape[1 - axis], lambda: f"block {block.shape} for weight {weight.shape}"
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _dx_fake(g: Tensor, weight: Tensor, block: Tensor, where: Any, axis: int) -> Tensor:
    return g.new_empty((*g.shape[:-1], weight.shape[1]))


for _name in ("partial_linear", "partial_linear_at"):
    torch.library.register_fake(f"sparsify::{_name}", _forward_fake, lib=LIBRARY)
    torch.library.register_fake(f"sparsify::{_name}_dx", _dx_fake, lib=LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, block, where, axis = inputs
    trained = ctx.needs_input_grad[3]
    if not trained:
        kept = None
    elif axis == 0:
        kept = x
    elif isinstance(where, Tensor):
        kept = x.index_select(-1, where)
    else:
        kept = x.narrow(-1, where, block.shape[1]).clone(memory_format=torch.contiguous_format)
    index = where if isinstance(where, Tensor) else None
    ctx.save_for_backward(kept, weight, block, index)
    ctx.where, ctx.axis, ctx.bias_dtype = where if index is None else None, axis, None if bias is None else bias.dtype


def _block_gradient(g: Tensor, kept: Tensor, rows: Tensor | slice | None) -> Tensor:
    """`(gᵀ kept)` for all rows, a range of them, or those at an index. On CUDA in fp32: cuBLAS on a view for a range, the
    generated kernel, which gathers as it reads, for an index."""
    tokens_g, tokens_x = g.reshape(-1, g.shape[-1]), kept.reshape(-1, kept.shape[-1])
    if isinstance(rows, slice):
        tokens_g, rows = tokens_g[:, rows], None
    if g.is_cuda or can_launch(g.device):
        return torch.ops.sparsify.channel_grad(tokens_g, tokens_x, rows)
    return (tokens_g if rows is None else tokens_g.index_select(1, rows)).t().mm(tokens_x)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, block, index = ctx.saved_tensors
    where = ctx.where if index is None else index
    dx = d_bias = d_block = None
    if ctx.needs_input_grad[0]:
        op = torch.ops.sparsify.partial_linear_dx if index is None else torch.ops.sparsify.partial_linear_at_dx
        dx = op(g, weight, block, where, ctx.axis)
    if ctx.needs_input_grad[2]:
        d_bias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
    if kept is not None:
        rows = None if ctx.axis == 1 else index if index is not None else slice(where, where + block.shape[0])
        d_block = _block_gradient(g, kept, rows).to(block.dtype)
    return dx, None, d_bias, d_block, None, None


for _name in ("partial_linear", "partial_linear_at"):
    torch.library.register_autograd(f"sparsify::{_name}", _backward, setup_context=_setup_context, lib=LIBRARY)


def _autocast(op: Any, device: str) -> Any:
    """`x` goes to the autocast dtype, as in `F.linear`; the block keeps its precision, so its gradient arrives in it."""
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}[device]

    def rule(x: Tensor, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)), *rest)

    return rule


for _name in ("partial_linear", "partial_linear_at"):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(_name, _autocast(getattr(torch.ops.sparsify, _name).default, _device), _key)
