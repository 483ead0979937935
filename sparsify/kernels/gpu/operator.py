"""`sparsify::gpu_linear`: a product with a packed weight as one node for torch.compile and export.

    y = act(x Wᵀ + b) (· up) + residual, W packed

Inference only, but differentiable in x when there is no activation.

On a CUDA device the generated kernels run; elsewhere, and without triton, the same result is computed by unpacking. Up to 16
tokens go through the stream kernel; more are worth one expansion of the weight and a library GEMM, and from 64 on a 2:4 weight
goes to sparse tensor cores.
"""

from __future__ import annotations

from typing import Protocol

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
from sparsify.library import LIBRARY, Context

LIBRARY.define(
    "gpu_linear(Tensor x, Tensor? bias, Tensor? residual, str format, int rows, int cols, bool gated, str activation, "
    "Tensor[] packed) -> Tensor"
)

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


class _Saved(Context, Protocol):
    """meta: format, rows, columns, gated. wants: gradients of x, bias, residual. added: shapes and types of bias and residual."""

    meta: tuple[str, int, int, bool]
    wants: tuple[bool, ...]
    added: list[tuple[torch.Size, torch.dtype] | None]


def _setup_context(
    ctx: _Saved,
    inputs: tuple[Tensor, Tensor | None, Tensor | None, str, int, int, bool, str, list[Tensor]],
    output: Tensor,
) -> None:
    _x, bias, residual, format, rows, cols, gated, activation, packed = inputs
    if activation != "none" or gated:
        raise RefusedError("gpu_linear: a fused activation has no gradient; run under torch.inference_mode()")
    ctx.save_for_backward(*packed)
    ctx.meta, ctx.wants = (format, rows, cols, gated), tuple(bool(ctx.needs_input_grad[i]) for i in range(3))
    ctx.added = [None if t is None else (t.shape, t.dtype) for t in (bias, residual)]


def _backward(ctx: _Saved, g: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    format, rows, cols, gated = ctx.meta
    packed = list(ctx.saved_tensors)
    want_x, want_bias, want_residual = ctx.wants
    dx = g @ rebuild(format, rows, cols, gated, packed, g.dtype).unpack() if want_x else None
    of_bias, of_residual = ctx.added
    d_bias = sum_to(g, *of_bias) if want_bias and of_bias is not None else None
    d_residual = sum_to(g, *of_residual) if want_residual and of_residual is not None else None
    return (dx, d_bias, d_residual, *[None] * 5, [None] * len(packed))


LIBRARY.impl("gpu_linear", _gpu_linear, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::gpu_linear", _gpu_linear_fake, lib=LIBRARY)
torch.library.register_autograd("sparsify::gpu_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
