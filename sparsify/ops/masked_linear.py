"""A linear whose pruned entries are exactly zero and stay so.

    masked_linear(x, weight, bits, bias)        y = x (W∘M)ᵀ + b          dW = (gᵀ x)∘M         (transposed: W is stored (in, out))

Precondition: `weight` has exact zeros where `M` is zero (`sparsify.modules.masked` keeps it), so the forward is one dense GEMM
and costs nothing extra; the gradient is masked *inside* the operator, before accumulation, clipping, GradScaler and DDP see it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.library import LIBRARY, Context
from sparsify.ops.apply_mask import apply_mask_in_aten
from sparsify.ops.bits import check_bits
from sparsify.ops.checks import require, require_shape, require_together

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8

LIBRARY.define("masked_linear(Tensor x, Tensor weight, Tensor bits, Tensor? bias, bool transposed=False) -> Tensor")


def oracle_masked_linear(
    x: Float[Tensor, "*t m"], weight: Float[Tensor, "n m"], mask: Bool[Tensor, "n m"], bias: Float[Tensor, " n"] | None
) -> Float[Tensor, "*t n"]:
    """`x (W∘M)ᵀ + b` in any precision; `mask` bool of the weight's shape `(n, m)`."""
    y = x @ torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)).transpose(0, 1)
    return y if bias is None else y + bias


def oracle_masked_linear_backward(
    g: Float[Tensor, "*t n"], x: Float[Tensor, "*t m"], weight: Float[Tensor, "n m"], mask: Bool[Tensor, "n m"]
) -> tuple[Float[Tensor, "*t m"], Float[Tensor, "n m"], Float[Tensor, " n"]]:
    """`(dX, dW, db)`: `g (W∘M)`, `(gᵀ x)∘M`, `Σ g`, written out."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return g @ torch.where(mask, weight, zero), torch.where(mask, flat_g.transpose(0, 1) @ flat_x, zero), flat_g.sum(0)


def _check_linear(
    name: str, x: Float[Tensor, "*t m"], rows: int, columns: int, bias: Float[Tensor, " n"] | None
) -> None:
    require(x.dim() >= 1, lambda: f"{name}: the input has no dimension")
    require(x.shape[-1] == columns, lambda: f"{name}: x has {x.shape[-1]} channels, the weight {columns}")
    if bias is not None:
        require_shape(name, "bias", bias, rows)


def _check_masked_linear(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "p q"],
    bits: UInt8[Tensor, " bytes"],
    bias: Float[Tensor, " n"] | None,
    transposed: bool,
) -> None:
    name = "masked_linear"
    require(weight.dim() == 2, lambda: f"{name}: the weight {tuple(weight.shape)} is no matrix")
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    _check_linear(name, x, rows, columns, bias)
    check_bits(name, bits, weight.numel())


def _masked_linear(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "p q"],
    bits: UInt8[Tensor, " bytes"],
    bias: Float[Tensor, " n"] | None,
    transposed: bool = False,
) -> Float[Tensor, "*t n"]:
    _check_masked_linear(x, weight, bits, bias, transposed)
    require_together("masked_linear", x, weight, bits, bias)
    return F.linear(x, weight.t() if transposed else weight, bias)


def _masked_linear_fake(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "p q"],
    bits: UInt8[Tensor, " bytes"],
    bias: Float[Tensor, " n"] | None,
    transposed: bool = False,
) -> Float[Tensor, "*t n"]:
    _check_masked_linear(x, weight, bits, bias, transposed)
    return x.new_empty((*x.shape[:-1], weight.shape[1] if transposed else weight.shape[0]))


def _masked_linear_in_aten(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "p q"],
    bits: UInt8[Tensor, " bytes"],
    bias: Float[Tensor, " n"] | None,
    transposed: bool = False,
) -> Float[Tensor, "*t n"]:
    kept = apply_mask_in_aten(weight, bits)
    return F.linear(x, kept.t() if transposed else kept, bias)


class _Saved(Context, Protocol):
    has_bias: bool
    transposed: bool


def _save_linear(ctx: _Saved, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x, weight, bits, bias, transposed = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None, bits)
    ctx.has_bias, ctx.transposed = bias is not None, transposed


def _masked_linear_backward(ctx: _Saved, g: Float[Tensor, "*t n"]) -> tuple[Tensor | None, ...]:
    x, weight, bits = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        if torch.is_grad_enabled():  # recorded: the same product, whose gradient for the weight is masked
            dx = torch.ops.sparsify.masked_linear(g, weight, bits, None, not ctx.transposed)
        else:
            dx = g.matmul(weight.t() if ctx.transposed else weight)
    if ctx.needs_input_grad[1]:
        flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        left, right = (flat_x, flat_g) if ctx.transposed else (flat_g, flat_x)
        dw = torch.ops.sparsify.masked_grad(left, right, bits)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        db = g.reshape(-1, g.shape[-1]).sum(0)
    return dx, dw, None, db, None


def _autocast(op: torch._ops.OpOverload, device: str) -> Callable[..., Tensor]:
    """As in `F.linear`: activations, weight and bias go to the autocast dtype; gradients return in their own."""
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}[device]

    def rule(*args: object) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))

    return rule


LIBRARY.implement(
    "masked_linear",
    kernel=_masked_linear,
    fake=_masked_linear_fake,
    aten=_masked_linear_in_aten,
    backward=_masked_linear_backward,
    setup=_save_linear,
)
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    LIBRARY.impl("masked_linear", _autocast(torch.ops.sparsify.masked_linear.default, _device), _key)
