"""Operators over packed weights and for trained channels, one node each for torch.compile and export.

    gpu_linear     y = act(x Wᵀ + b) (· up) + residual, W packed      inference; differentiable in x without an activation
    channel_grad   (g[:, rows])ᵀ x in fp32                            the weight gradient of some channels

On a CUDA device the generated kernels run; elsewhere, and without triton, the same result is computed by unpacking. Up to 16
tokens go through the stream kernel; more are worth one expansion of the weight and a library GEMM, and from 64 on a 2:4 weight
goes to sparse tensor cores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.errors import RefusedError
from sparsify.kernels.checked_once import checked_once
from sparsify.kernels.cpu.formats import check
from sparsify.kernels.cpu.operator import check_one_device, check_residual, epilogue, sum_to
from sparsify.kernels.gpu import launch, semi_structured
from sparsify.kernels.gpu.build import kernels_take
from sparsify.kernels.gpu.formats import Blocks, Stream
from sparsify.kernels.gpu.spec import ACTIVATIONS
from sparsify.ops.checks import require, require_floats, require_index, require_together, require_within
from sparsify.ops.library import LIBRARY

LIBRARY.define(
    "gpu_linear(Tensor x, Tensor? bias, Tensor? residual, str format, int rows, int cols, bool gated, str activation, "
    "Tensor[] packed) -> Tensor"
)
LIBRARY.define("channel_grad(Tensor g, Tensor x, Tensor? rows) -> Tensor")

FORMATS = ("gaps", "two_four", "blocks")


def rebuild(
    format: str, rows: int, cols: int, gated: bool, packed: list[Tensor], dtype: torch.dtype
) -> Stream | Blocks:
    """The packed weight that an operator's arguments describe. Raises FormatError for a format or a number of tensors that is none."""
    check(format in FORMATS, f"unknown format {format!r}, known: {', '.join(FORMATS)}")
    count = 3 if format == "blocks" else 5
    check(len(packed) in (count, count + 1), f"{format}: {len(packed)} tensors, expected {count}, and scales for int8")
    scales = packed[count] if len(packed) > count else None
    if format == "blocks":
        check(not gated, "blocks: tiles have no gated kernel")
        values, column, start = packed[:3]
        return Blocks(rows, cols, values, column, start, scales, dtype)
    values, meta, base, start, order = packed[:5]
    return Stream(rows, cols, format, values, meta, base, start, order, scales, gated, dtype)  # type: ignore[arg-type]


def check_product(
    weight: Stream | Blocks, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor | None:
    """Refuse arguments that do not fit each other: sizes in every call, the packed numbers once per state of the tensors, so that later
    calls do not wait for the device. The residual as (tokens, outputs). Raises FormatError."""
    check(activation in ACTIVATIONS, f"unknown activation {activation!r}, known: {', '.join(ACTIVATIONS)}")
    check(x.is_floating_point() and x.dim() > 0, f"gpu_linear: x is {x.dtype} of shape {tuple(x.shape)}")
    check(x.shape[-1] == weight.cols, f"gpu_linear: x has {x.shape[-1]} columns, the weight {weight.cols}")
    for name, tensor in (
        ("bias", bias),
        ("residual", residual),
        *((f"packed[{i}]", t) for i, t in enumerate(weight.tensors)),
    ):
        check(tensor is None or tensor.device == x.device, f"gpu_linear: {name} and x are on different devices")
    if bias is not None:
        good = tuple(bias.shape) == (weight.rows,) and bias.is_floating_point()
        check(good, f"bias is {bias.dtype} of shape {tuple(bias.shape)}, the weight has {weight.rows} rows")
    gated = isinstance(weight, Stream) and weight.gated
    check(not gated or weight.rows % 2 == 0, f"a gated weight has gate and up rows, got {weight.rows} rows")
    form = weight.format if isinstance(weight, Stream) else "blocks"
    checked_once(("gpu", form, weight.rows, weight.cols, gated), weight.tensors, weight.validate)
    return check_residual("gpu_linear", residual, x, (*x.shape[:-1], weight.outputs))


def finish(y: Tensor, activation: str, gated: bool, residual: Tensor | None) -> Tensor:
    """What the kernels fuse, in torch: y (t, rows) → (t, outputs); a gated weight is [gate; up]."""
    if not gated:
        return epilogue(y, activation, False, residual)
    gate, up = y.chunk(2, -1)
    y = epilogue(gate, activation, False, None) * up
    return y if residual is None else y + residual


def dense_product(
    packed: Stream | Blocks,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The same result by unpacking: the oracle in x's dtype, and the way without kernels."""
    y = F.linear(x, packed.unpack().to(x.dtype), None if bias is None else bias.to(x.dtype))
    return finish(y, activation, isinstance(packed, Stream) and packed.gated, residual)


def packed_product(
    packed: Stream | Blocks, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """x (t, cols) → (t, outputs), by the kernel that suits the number of tokens."""
    if isinstance(packed, Blocks):
        return launch.blocks_product(packed, x, bias, residual, activation)
    if x.shape[0] <= launch.MAX_TOKENS:
        return launch.stream_product(packed, x, bias, residual, activation)
    y = semi_structured.product(packed, x, bias)
    if y is None:
        y = F.linear(x, launch.expand_stream(packed, x.dtype), None if bias is None else bias.to(x.dtype))
    return finish(y, activation, packed.gated, residual)


def _gpu_linear(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, format: str, rows: int, cols: int, gated: bool,
    activation: str, packed: list[Tensor],
) -> Tensor:  # fmt: skip
    weight = rebuild(format, rows, cols, gated, packed, x.dtype)
    extra = check_product(weight, x, bias, residual, activation)
    flat = x.reshape(-1, cols)
    shape = (*x.shape[:-1], weight.outputs)
    if flat.shape[0] == 0:
        return x.new_empty(shape)
    serves = kernels_take(x) and (weight.value == "int8" or format != "blocks" or weight.values.dtype == x.dtype)
    product = packed_product if serves else dense_product
    return product(weight, flat, bias, extra, activation).view(shape)


def _gpu_linear_fake(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, format: str, rows: int, cols: int, gated: bool,
    activation: str, packed: list[Tensor],
) -> Tensor:  # fmt: skip
    check_one_device("gpu_linear", x, (bias, residual, *packed))
    torch._check(x.dim() > 0, lambda: "gpu_linear: x has no axis")
    torch._check(x.shape[-1] == cols, lambda: f"gpu_linear: x has {x.shape[-1]} columns, the weight {cols}")
    return x.new_empty((*x.shape[:-1], rows // 2 if gated else rows))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, bias, residual, format, rows, cols, gated, activation, packed = inputs
    if activation != "none" or gated:
        raise RefusedError("gpu_linear: a fused activation has no gradient; run under torch.inference_mode()")
    ctx.save_for_backward(*packed)
    ctx.meta, ctx.wants = (format, rows, cols, gated), tuple(bool(ctx.needs_input_grad[i]) for i in range(3))
    ctx.added = [None if t is None else (t.shape, t.dtype) for t in (bias, residual)]


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    format, rows, cols, gated = ctx.meta
    packed = list(ctx.saved_tensors)
    want_x, want_bias, want_residual = ctx.wants
    dx = g @ rebuild(format, rows, cols, gated, packed, g.dtype).unpack() if want_x else None
    d_bias = sum_to(g, *ctx.added[0]) if want_bias else None
    d_residual = sum_to(g, *ctx.added[1]) if want_residual else None
    return (dx, d_bias, d_residual, *[None] * 5, [None] * len(packed))


def _check_channels(g: Tensor, x: Tensor, rows: Tensor | None) -> None:
    name = "channel_grad"
    require(g.dim() == 2 and x.dim() == 2, lambda: f"{name}: g and x are matrices, not {g.dim()}-D and {x.dim()}-D")
    require(g.shape[0] == x.shape[0], lambda: f"{name}: g has {g.shape[0]} tokens, x {x.shape[0]}")
    require(g.dtype == x.dtype, lambda: f"{name}: g is {g.dtype}, x {x.dtype}; cast one")
    if rows is not None:
        require_index(name, "rows", rows)


def _channel_grad(g: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    _check_channels(g, x, rows)
    require_together("channel_grad", g, x, rows)
    require_floats("channel_grad", g=g, x=x)
    if rows is not None:
        require_within("channel_grad", "rows", rows, g.shape[1], "gradient's channels")
    if rows is not None and kernels_take(g, x):
        return launch.partial_grad(g, x, rows)
    return launch.contiguous_grad(g if rows is None else g.index_select(1, rows), x)


def _sum_type(g: Tensor) -> torch.dtype:
    return torch.float32 if g.dtype in (torch.float16, torch.bfloat16) else g.dtype


def _channel_grad_fake(g: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    _check_channels(g, x, rows)
    return g.new_empty((g.shape[1] if rows is None else rows.shape[0], x.shape[1]), dtype=_sum_type(g))


def _channel_grad_in_aten(g: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    return (g if rows is None else g.index_select(1, rows)).t().mm(x).to(_sum_type(g))


def _setup_channel_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_channel_grad(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    g, x, rows = ctx.saved_tensors
    outer = outer.to(g.dtype)
    dg = dx = None
    if ctx.needs_input_grad[0]:
        dg = x.mm(outer.t())
        dg = dg if rows is None else torch.zeros_like(g).index_add(1, rows, dg)
    if ctx.needs_input_grad[1]:
        dx = (g if rows is None else g.index_select(1, rows)).mm(outer)
    return dg, dx, None


for _name, _function, _fake in (
    ("gpu_linear", _gpu_linear, _gpu_linear_fake),
    ("channel_grad", _channel_grad, _channel_grad_fake),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsify::{_name}", _fake, lib=LIBRARY)
LIBRARY.in_aten("channel_grad", _channel_grad_in_aten)
torch.library.register_autograd("sparsify::gpu_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "sparsify::channel_grad", _backward_channel_grad, setup_context=_setup_channel_grad, lib=LIBRARY
)
