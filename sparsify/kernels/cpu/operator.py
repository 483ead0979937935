"""`sparsify::packed_linear`: a packed sparse product as one node for torch.compile and export.

    y = act(x Wᵀ + b) (+ residual), or act(gate) · up for weights whose rows alternate gate and up

Inference only, but differentiable in x when there is no activation: the gradient multiplies with the unpacked weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from sparsify.errors import RefusedError
from sparsify.kernels.checked_once import checked_once
from sparsify.kernels.cpu.build import BuildError, Kernels
from sparsify.kernels.cpu.dispatch import (
    ACTIVATIONS,
    Choice,
    LayerStruct,
    NonFiniteError,
    bucket,
    choose,
    kernels_for,
    layer_struct,
    run_kernel,
    serves,
)
from sparsify.kernels.cpu.formats import Bitmask, check
from sparsify.library import LIBRARY

SCHEMA = (
    "(Tensor x, Tensor masks, Tensor values, Tensor panel_ptr, Tensor? scales, Tensor? row_sums, Tensor? bias, "
    "Tensor? residual, int rows, int cols, int group, str activation, bool gated, bool int8) -> Tensor"
)
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
torch.library.define("sparsify::packed_linear", SCHEMA)


def epilogue(y: torch.Tensor, activation: str, gated: bool, residual: torch.Tensor | None) -> torch.Tensor:
    """What the kernels fuse, in torch: y (tokens, rows) → (tokens, rows or rows / 2)."""
    second = None
    if gated:
        y, second = y[..., 0::2], y[..., 1::2]
    if activation == "relu":
        y = F.relu(y)
    elif activation in ("gelu", "gelu_tanh"):
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation == "silu":
        y = F.silu(y)
    if second is not None:
        y = y * second
    return y if residual is None else y + residual


def dense_product(
    packed: Bitmask,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same result by unpacking: the oracle in x's dtype, and the way out for NaN, Inf and missing compilers."""
    weight = packed.unpack().to(x.dtype)
    return epilogue(F.linear(x, weight, bias.to(x.dtype) if bias is not None else None), activation, gated, residual)


@torch.library.impl("sparsify::packed_linear", "CPU")
def packed_linear_cpu(
    x: torch.Tensor,
    masks: torch.Tensor,
    values: torch.Tensor,
    panel_ptr: torch.Tensor,
    scales: torch.Tensor | None,
    row_sums: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    rows: int,
    cols: int,
    group: int,
    activation: str,
    gated: bool,
    int8: bool,
) -> torch.Tensor:
    """Raises FormatError for arguments that do not fit each other, before anything is read by them."""
    check_activations("packed_linear", x, cols)
    packed = Bitmask(rows, cols, masks, values, panel_ptr, scales, group, x.dtype, followed=True)
    check_layer(packed, row_sums, bias, activation, gated, int8)
    outputs = rows // 2 if gated else rows
    shape = (*x.shape[:-1], outputs)
    extra = check_residual("packed_linear", residual, x, shape)
    flat = x.reshape(-1, cols)
    if flat.shape[0] == 0:
        return x.new_empty(shape)
    bias = None if bias is None else bias.detach().float().contiguous()
    try:
        if x.dtype == torch.float64:  # the kernels sum in fp32
            raise BuildError("no kernel reads float64")
        kernels, layer, choice = prepared(packed, row_sums, bias, activation, gated, int8, flat.shape[0])
        choice = serves(choice, x.dtype, flat.shape[0])
        y = run_kernel(kernels, choice.kernel, layer, flat, outputs, extra, choice.row_tile)
    except (NonFiniteError, BuildError):
        exact = x.dtype if x.dtype == torch.float64 else torch.float32
        extra = None if extra is None else extra.to(exact)
        y = dense_product(replace(packed, dtype=exact), flat.to(exact), bias, activation, gated, extra)
    return y.view(shape).to(x.dtype)


def check_activations(operator: str, x: torch.Tensor, cols: int) -> None:
    """Refuse an input that no product takes: its type, its device, its last axis. Raises FormatError."""
    if x.dtype in ACTIVATION_DTYPES and x.device.type == "cpu" and x.dim() > 0 and x.shape[-1] == cols:
        return
    check(x.dtype in ACTIVATION_DTYPES, f"{operator}: x is {x.dtype}, expected a float of 16, 32 or 64 bits")
    check(x.device.type == "cpu", f"{operator}: x is on {x.device}, this layer is on the CPU")
    check(x.dim() > 0 and x.shape[-1] == cols, f"{operator}: x has shape {tuple(x.shape)}, the weight {cols} columns")


def check_residual(
    operator: str, residual: torch.Tensor | None, x: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor | None:
    """The residual broadcast to the result's shape, as (tokens, outputs), or None. FormatError if that cannot be."""
    if residual is None:
        return None
    check(residual.device == x.device, f"{operator}: residual is on {residual.device}, x on {x.device}")
    check(residual.dtype.is_floating_point, f"{operator}: residual is {residual.dtype}, expected a float")
    fits = residual.dim() <= len(shape) and all(
        size in (1, wanted) for size, wanted in zip(reversed(residual.shape), reversed(shape), strict=False)
    )
    check(fits, f"{operator}: residual has shape {tuple(residual.shape)}, the result {shape}")
    return residual.expand(shape).reshape(-1, shape[-1])


def check_layer(
    packed: Bitmask, row_sums: torch.Tensor | None, bias: torch.Tensor | None, activation: str, gated: bool, int8: bool
) -> None:
    """Refuse a weight and what goes with it unless kernels may read them: sizes in every call, the numbers inside once per state of
    the tensors. Raises FormatError."""
    check(activation in ACTIVATIONS, f"unknown activation {activation!r}, known: {', '.join(ACTIVATIONS)}")
    check(not gated or packed.rows % 2 == 0, f"a gated weight has gate and up rows, got {packed.rows} rows")
    if bias is not None:
        check(tuple(bias.shape) == (packed.rows,), f"bias has shape {tuple(bias.shape)}, the weight {packed.rows} rows")
        check(bias.device.type == "cpu" and bias.dtype.is_floating_point, f"bias is {bias.dtype} on {bias.device}")
    if row_sums is not None:
        good = tuple(row_sums.shape) == (packed.rows,) and row_sums.dtype == torch.int32 and row_sums.is_contiguous()
        check(
            good and row_sums.device.type == "cpu",
            f"row_sums are {row_sums.dtype} of shape {tuple(row_sums.shape)} on {row_sums.device}, expected contiguous "
            f"int32 ({packed.rows},) on the CPU",
        )
    if int8:
        check(
            packed.values.dtype == torch.int8 and not packed.group, "int8 activations need int8 values, a scale per row"
        )
        check(row_sums is not None, "int8 activations need row_sums")
    tensors = (packed.masks, packed.values, packed.panel_ptr, packed.scales, row_sums)
    sizes = ("bitmask", packed.rows, packed.cols, packed.group, packed.followed)
    checked_once(sizes, tensors, partial(check_contents, packed, row_sums))


def check_contents(packed: Bitmask, row_sums: torch.Tensor | None) -> None:
    """Every number that a kernel goes by. Raises FormatError."""
    packed.validate()
    if row_sums is not None:
        check(packed.values.dtype == torch.int8, "row_sums belong to int8 values")
        check(torch.equal(row_sums, packed.row_sums()), "row_sums are not the sums of the rows")


Prepared = tuple[Kernels, LayerStruct, Choice]
known: dict[tuple[object, ...], Prepared] = {}


def prepared(
    packed: Bitmask,
    row_sums: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    int8: bool,
    tokens: int,
) -> Prepared:
    """Kernels, C view and choice for a weight that was checked; remembered by all that they are made of, addresses included."""
    tensors = (packed.masks, packed.values, packed.panel_ptr, packed.scales, row_sums, bias)
    addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
    sizes = (packed.rows, packed.cols, packed.group, packed.dtype, packed.values.dtype, packed.nnz)
    key = (addresses, sizes, activation, gated, int8, bucket(tokens), torch.get_num_threads())
    found = known.get(key)
    if found is None:
        kernels = kernels_for(packed)
        layer = layer_struct(packed, row_sums, bias, activation, gated)
        found = (kernels, layer, choose(packed, kernels, layer, tokens, int8, measure=False))
        if len(known) >= 10_000:
            known.clear()
        known[key] = found
    return found


@torch.library.register_fake("sparsify::packed_linear")
def packed_linear_fake(
    x: torch.Tensor,
    masks: torch.Tensor,
    values: torch.Tensor,
    panel_ptr: torch.Tensor,
    scales: torch.Tensor | None,
    row_sums: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    rows: int,
    cols: int,
    group: int,
    activation: str,
    gated: bool,
    int8: bool,
) -> torch.Tensor:
    check_one_device("packed_linear", x, (masks, values, panel_ptr, scales, row_sums, bias, residual))
    torch._check(x.dim() > 0, lambda: "packed_linear: x has no axis")
    torch._check(x.shape[-1] == cols, lambda: f"packed_linear: x has {x.shape[-1]} columns, the weight {cols}")
    torch._check(rows > 0, lambda: f"packed_linear: a weight needs rows, got {rows}")
    return x.new_empty((*x.shape[:-1], rows // 2 if gated else rows))


def check_one_device(operator: str, x: torch.Tensor, others: Sequence[torch.Tensor | None]) -> None:
    """For fakes: a tensor without data beside tensors with data would make a result of nothing."""
    for tensor in others:
        torch._check(
            tensor is None or tensor.device.type == x.device.type,
            lambda: f"{operator}: tensors are on different devices",
        )


def sum_to(grad: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of a tensor that was broadcast."""
    return grad.sum_to_size(shape).to(dtype)


def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: torch.Tensor) -> None:
    x, masks, values, panel_ptr, scales, _, bias, residual, rows, cols, group, activation, gated, _ = inputs
    if activation != "none" or gated:
        raise RefusedError("packed_linear: a fused activation has no gradient; run under torch.inference_mode()")
    assert isinstance(x, torch.Tensor)
    ctx.save_for_backward(masks, values, panel_ptr, scales)  # type: ignore[arg-type]
    ctx.packed = (rows, cols, group, x.dtype)  # type: ignore[attr-defined]
    ctx.added = [(t.shape, t.dtype) if isinstance(t, torch.Tensor) else None for t in (bias, residual)]  # type: ignore[attr-defined]


def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    masks, values, panel_ptr, scales = ctx.saved_tensors  # type: ignore[attr-defined]
    rows, cols, group, dtype = ctx.packed  # type: ignore[attr-defined]
    weight = Bitmask(rows, cols, masks, values, panel_ptr, scales, group, dtype).unpack()
    need = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_x = grad @ weight.to(grad.dtype) if need[0] else None
    of_bias, of_residual = ctx.added  # type: ignore[attr-defined]
    grad_bias = sum_to(grad, *of_bias) if need[6] else None
    grad_residual = sum_to(grad, *of_residual) if need[7] else None
    return (grad_x, *[None] * 5, grad_bias, grad_residual, *[None] * 6)


torch.library.register_autograd("sparsify::packed_linear", backward, setup_context=setup_context, lib=LIBRARY)


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, tied tensors once, and of weights in a layout of oneDNN's."""
    seen: dict[int, int] = {}
    for part in module.modules():
        hidden = getattr(part, "hidden_bytes", None)
        if isinstance(hidden, int):
            seen[id(part)] = hidden
    for tensor in [*module.parameters(), *module.buffers()]:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
