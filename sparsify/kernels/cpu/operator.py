"""`sparsify::packed_linear`: a packed sparse product as one node for torch.compile and export.

    y = act(x Wᵀ + b) (+ residual), or act(gate) · up for weights whose rows alternate gate and up

Inference only, but differentiable in x when there is no activation: the gradient multiplies with the unpacked weight.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from sparsify.errors import RefusedError
from sparsify.kernels.cpu.build import BuildError, Kernels
from sparsify.kernels.cpu.dispatch import (
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
from sparsify.kernels.cpu.formats import Bitmask
from sparsify.operator_library import LIBRARY

SCHEMA = (
    "(Tensor x, Tensor masks, Tensor values, Tensor panel_ptr, Tensor? scales, Tensor? row_sums, Tensor? bias, "
    "Tensor? residual, int rows, int cols, int group, str activation, bool gated, bool int8) -> Tensor"
)
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
    packed = Bitmask(rows, cols, masks, values, panel_ptr, scales, group, x.dtype)
    outputs = rows // 2 if gated else rows
    flat = x.reshape(-1, cols)
    shape = (*x.shape[:-1], outputs)
    if flat.shape[0] == 0:
        return x.new_empty(shape)
    extra = residual.reshape(-1, outputs) if residual is not None else None
    try:
        kernels, layer, choice = prepared(packed, row_sums, bias, activation, gated, int8, flat.shape[0])
        choice = serves(choice, x.dtype, flat.shape[0])
        y = run_kernel(kernels, choice.kernel, layer, flat, outputs, extra, choice.row_tile)
    except (NonFiniteError, BuildError):
        y = dense_product(packed, flat.float(), bias, activation, gated, None if extra is None else extra.float())
    return y.view(shape).to(x.dtype)


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
    """Kernels, C view and choice for a weight; remembered by all that they are made of, addresses included."""
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
    torch._check(x.shape[-1] == cols, lambda: f"packed_linear: x has {x.shape[-1]} columns, the weight {cols}")
    return x.new_empty((*x.shape[:-1], rows // 2 if gated else rows))


def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: torch.Tensor) -> None:
    x, masks, values, panel_ptr, scales, _, _, _, rows, cols, group, activation, gated, _ = inputs
    if activation != "none" or gated:
        raise RefusedError("packed_linear: a fused activation has no gradient; run under torch.inference_mode()")
    assert isinstance(x, torch.Tensor)
    ctx.save_for_backward(masks, values, panel_ptr, scales)  # type: ignore[arg-type]
    ctx.packed = (rows, cols, group, x.dtype)  # type: ignore[attr-defined]


def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    masks, values, panel_ptr, scales = ctx.saved_tensors  # type: ignore[attr-defined]
    rows, cols, group, dtype = ctx.packed  # type: ignore[attr-defined]
    weight = Bitmask(rows, cols, masks, values, panel_ptr, scales, group, dtype).unpack()
    grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
    grad_residual = grad if ctx.needs_input_grad[7] else None  # type: ignore[attr-defined]
    return (grad_x, *[None] * 6, grad_residual, *[None] * 6)


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
