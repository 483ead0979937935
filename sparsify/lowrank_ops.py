"""Operators for sparse + low-rank adaptation and for quantised bases, with their oracle.

    sparse_lowrank_linear   y = x W'ᵀ + s (x Aᵀ) Bᵀ + b,   W' = W with the entries at `index` replaced by `values`
    quantized_linear        the same with a packed base, and with a replaced block of channels (S2FT, PaCA) too
    sampled_product         (aᵀ b)[index]: the weight gradient on a support only (SDDMM)
    skinny_products         (x rowsᵀ, factorᵀ x) for few rows: the products of the low-rank part

`values` are *values* of the weight (base + S), kept in fp32: they are written into the dense weight at their support, so
that forward and dX stay one dense GEMM each and no dense `W + S` is ever allocated. As in `sparsify.ops`, those entries of the
weight are scratch that only the operator reads. `index` is flat in the stored weight (int32 where that is wide enough).

Saved for backward: `x` once (or its factors, see `sparsify.saved_input`), which serves `dS`, `dA` and `dB`; `x Aᵀ (T, r)` is
computed again, and `low = g B (T, r)` once for `dX` and `dA`.
A quantised base is unpacked inside the operator, forward and backward, and dropped: at most one dense layer is alive. On a
GPU, up to 64 tokens are multiplied with the packed weight instead, sparse and low-rank part included, in one launch.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.cpu.sampled import kernel_serves, kernel_writes, sampled_by_kernel, write_by_kernel
from sparsify.kernels.cpu.skinny import skinny_by_kernel, skinny_serves, update_by_kernel, update_serves
from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.operator import kernels_take
from sparsify.ops import LIBRARY, _autocast, effective_weight
from sparsify.quantized import FORMATS, unpack
from sparsify.saved_input import restored_input, saved_input

LIBRARY.define(
    "sparse_lowrank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? values, Tensor? index, Tensor? a, Tensor? b, "
    "float scale, bool transposed) -> Tensor"
)
LIBRARY.define(
    "sparse_lowrank_linear_dx(Tensor g, Tensor weight, Tensor? values, Tensor? index, Tensor? low, Tensor? a, float scale, "
    "bool transposed) -> Tensor"
)
LIBRARY.define(
    "quantized_linear(Tensor x, str format, int rows, int columns, bool transposed, Tensor? bias, Tensor? block, "
    "Tensor? channels, int axis, Tensor? values, Tensor? index, Tensor? a, Tensor? b, float scale, Tensor[] packed) -> Tensor"
)
LIBRARY.define(
    "quantized_linear_dx(Tensor g, str format, int rows, int columns, bool transposed, Tensor? block, "
    "Tensor? channels, int axis, Tensor? values, Tensor? index, Tensor? low, Tensor? a, float scale, Tensor[] packed) -> Tensor"
)
LIBRARY.define("sampled_product(Tensor a, Tensor b, Tensor index) -> Tensor")
LIBRARY.define("skinny_products(Tensor x, Tensor? rows, Tensor? factor) -> (Tensor, Tensor)")

# Up to these densities the generated CPU kernel, else PyTorch's SDDMM over a CSR support, is cheaper than the dense tile, and
# below the last one a dot product per entry is (kernels/README.md has the measurements).
KERNEL_DENSITY = 0.06
CSR_DENSITY = {"cpu": 0.03}
PER_ENTRY_DENSITY = {"cpu": 0.0, "cuda": 0.0035}
TILE_BYTES = 32 * 2**20
# Tokens up to which, and densities of the support, a quantised base is multiplied without being unpacked: computed, not measured
ONE_PASS_DENSITY = {1: 1.0, 16: 0.01, launch.QUANTIZED_TOKENS: 0.005}


# --- the oracle --------------------------------------------------------------------------------------------------------


def oracle_weight(
    weight: Tensor, values: Tensor | None, index: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    """The dense weight that the operator stands for, `(n, m)`; differentiable in values, a and b."""
    if values is not None and index is not None:
        weight = weight.reshape(-1).index_copy(0, index.long(), values.to(weight.dtype)).view(weight.shape)
    if a is not None and b is not None:
        weight = weight + scale * (b @ a).to(weight.dtype)
    return weight


def oracle_sampled_product(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """`(aᵀ b)` at flat positions `index`; a `(T, p)`, b `(T, q)`."""
    return (a.t() @ b).reshape(-1)[index.long()]


# --- implementations -----------------------------------------------------------------------------------------------------


def write_values(weight: Tensor, values: Tensor | None, index: Tensor | None) -> None:
    """Write the sparse values into a contiguous stored weight; bypasses the version counter (see `sparsify.ops`)."""
    if values is None or index is None:
        return
    if weight.is_contiguous() and kernels_take(weight, values):
        launch.write_values(weight.data, values, index)
    elif kernel_writes(weight, values, index):
        write_by_kernel(weight.data, values, index)
    else:
        weight.data.view(-1).index_copy_(0, index.long(), values.to(weight.dtype))


def skinny_products(x: Tensor, rows: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`(x rowsᵀ (T, r), factorᵀ x (r, m))` for `x (T, m)`, `rows (r, m)`, `factor (T, r)`; either may be absent. One pass over x
    where the generated CPU kernel serves, else GEMMs whose factor with few rows is kept row by row, which they want."""
    rank = rows.shape[0] if rows is not None else factor.shape[1] if factor is not None else 0
    if skinny_serves(x, rank):
        return skinny_by_kernel(x, rows, factor)
    low = None if rows is None else x @ rows.to(x.dtype).contiguous().t()
    return low, None if factor is None else factor.t().mm(x)


def _skinny_products(x: Tensor, rows: Tensor | None, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    low, product = skinny_products(x, rows, factor)
    return x.new_empty(0) if low is None else low, x.new_empty(0) if product is None else product


def reduced(x: Tensor, rows: Tensor) -> Tensor:
    """`x rowsᵀ (T, r)` for `x (..., m)`, `rows (r, m)`."""
    low, _ = skinny_products(x.reshape(-1, x.shape[-1]), rows, None)
    assert low is not None
    return low


def _project(y: Tensor, low: Tensor, second: Tensor, scale: float) -> Tensor:
    """`y + s low second`, in place on y, for `low (T, r)`, `second (r, n)`."""
    flat = y.view(-1, y.shape[-1])
    if update_serves(flat, low.shape[1]):
        update_by_kernel(flat, low * scale, second)
    else:
        flat.addmm_(low, second.to(y.dtype), alpha=scale)
    return y


def _forward(
    x: Tensor, stored: Tensor, transposed: bool, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    weight = (stored.t() if transposed else stored).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y if a is None or b is None else _project(y, reduced(x, a), b.t(), scale)


def _dx(g: Tensor, stored: Tensor, transposed: bool, low: Tensor | None, a: Tensor | None, scale: float) -> Tensor:
    weight = (stored.t() if transposed else stored).to(g.dtype)
    dx = g.matmul(weight)
    return dx if a is None or low is None else _project(dx, low, a, scale)


def _sparse_lowrank(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, index: Tensor | None,
    a: Tensor | None, b: Tensor | None, scale: float, transposed: bool,
) -> Tensor:  # fmt: skip
    write_values(weight, values, index)
    return _forward(x, weight, transposed, bias, a, b, scale)


def _sparse_lowrank_dx(
    g: Tensor, weight: Tensor, values: Tensor | None, index: Tensor | None, low: Tensor | None, a: Tensor | None,
    scale: float, transposed: bool,
) -> Tensor:  # fmt: skip
    write_values(weight, values, index)
    return _dx(g, weight, transposed, low, a, scale)


def dense_weight(
    packed: list[Tensor], format: str, shape: list[int], transposed: bool, dtype: torch.dtype, block: Tensor | None,
    channels: Tensor | None, axis: int, values: Tensor | None, index: Tensor | None,
) -> Tensor:  # fmt: skip
    """Unpack one layer and put the trained parts into it; `(stored)` layout, a fresh tensor."""
    stored = unpack(packed, format, tuple(shape), dtype)
    if block is not None and channels is not None:
        logical = stored.t() if transposed else stored
        logical.index_copy_(axis, channels.long(), block.to(dtype))
    write_values(stored, values, index)
    return stored


def fits_one_pass(x: Tensor, rows: int, columns: int, transposed: bool, index: Tensor | None) -> bool:
    """Whether the kernel over the packed weight serves the forward: few tokens, so that the weight's bytes are what counts (0.5
    to 1 per weight, where unpacking reads those, writes 2 and reads 2 again), rows of whole blocks, and a support so thin
    that its entries, which several tokens make dear, cost less than the unpacking (kernels/gpu/README.md has the sums)."""
    tokens = x.numel() // max(1, columns)
    if (
        transposed
        or columns % launch.QUANTIZED_BLOCK
        or not 1 <= tokens <= launch.QUANTIZED_TOKENS
        or not kernels_take(x)
    ):
        return False
    density = 0.0 if index is None else index.numel() / (rows * columns)
    return density <= next(most for count, most in ONE_PASS_DENSITY.items() if tokens <= count)


def one_pass(
    x: Tensor, format: str, rows: int, bias: Tensor | None, block: Tensor | None, channels: Tensor | None, axis: int,
    values: Tensor | None, index: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float, packed: list[Tensor],
) -> Tensor:  # fmt: skip
    """The forward without an unpacked weight. A trained block of channels is a small product beside the kernel's: its columns
    read x where the kernel reads zeros, its rows are computed over."""
    flat = x.reshape(-1, x.shape[-1])
    u = None if a is None or b is None else reduced(flat, a)
    place = None if block is None or channels is None else channels.long()
    read = flat.index_fill(1, place, 0.0) if place is not None and axis == 1 else flat
    second = None if u is None else b
    y = launch.quantized_product(packed, format, read, bias, values, index, u, second, scale, rows)
    if place is not None and block is not None:
        block = block.to(x.dtype)
        if axis == 1:
            y.addmm_(flat.index_select(1, place), block.t())
        else:
            part = torch.nn.functional.linear(flat, block, None if bias is None else bias.to(x.dtype)[place])
            y.index_copy_(1, place, part if u is None or b is None else _project(part, u, b[place].t(), scale))
    return y.view(*x.shape[:-1], rows)


def _quantized(
    x: Tensor, format: str, rows: int, columns: int, transposed: bool, bias: Tensor | None, block: Tensor | None,
    channels: Tensor | None, axis: int, values: Tensor | None, index: Tensor | None, a: Tensor | None, b: Tensor | None,
    scale: float, packed: list[Tensor],
) -> Tensor:  # fmt: skip
    if format in FORMATS and fits_one_pass(x, rows, columns, transposed, index):
        return one_pass(x, format, rows, bias, block, channels, axis, values, index, a, b, scale, packed)
    stored = dense_weight(packed, format, [rows, columns], transposed, x.dtype, block, channels, axis, values, index)
    return _forward(x, stored, transposed, bias, a, b, scale)


def _quantized_dx(
    g: Tensor, format: str, rows: int, columns: int, transposed: bool, block: Tensor | None, channels: Tensor | None,
    axis: int, values: Tensor | None, index: Tensor | None, low: Tensor | None, a: Tensor | None, scale: float,
    packed: list[Tensor],
) -> Tensor:  # fmt: skip
    stored = dense_weight(packed, format, [rows, columns], transposed, g.dtype, block, channels, axis, values, index)
    return _dx(g, stored, transposed, low, a, scale)


def sampled_by_tile(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Dense tiles of `aᵀ b`, a block of rows at a time, each gathered at once: at most `TILE_BYTES` of gradient alive."""
    p, q = a.shape[1], b.shape[1]
    rows = max(1, min(p, TILE_BYTES // max(1, q * a.element_size())))
    index = index.long()
    if rows >= p:
        return a.t().mm(b).view(-1)[index]
    out = a.new_empty(index.shape)
    edges = torch.arange(0, p + rows, rows, device=index.device) * q
    bounds = torch.searchsorted(index, edges).tolist()  # index is sorted
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            tile = a[:, i * rows : (i + 1) * rows].t().mm(b)
            out[start:end] = tile.view(-1)[index[start:end] - i * rows * q]
    return out


def sampled_per_entry(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """One dot product over the tokens per entry, in chunks; work proportional to the support."""
    columns = b.shape[1]
    at, bt = a.t().contiguous(), b.t().contiguous()
    index = index.long()
    chunk = max(1, TILE_BYTES // max(1, 2 * a.shape[0] * a.element_size()))
    parts = []
    for piece in index.split(chunk):
        row = torch.div(piece, columns, rounding_mode="floor")
        parts.append(torch.linalg.vecdot(at[row], bt[piece - row * columns]))
    return torch.cat(parts) if parts else a.new_zeros(0)


def csr_support(index: Tensor, p: int, q: int, dtype: torch.dtype) -> Tensor:
    """Sorted flat positions in a `(p, q)` matrix as a CSR tensor of zeros."""
    index = index.long()
    starts = torch.searchsorted(index, torch.arange(p + 1, device=index.device) * q)
    values = torch.zeros(index.numel(), dtype=dtype, device=index.device)
    return torch.sparse_csr_tensor(starts, index % q, values, (p, q), check_invariants=False)


def sampled_csr(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """PyTorch's SDDMM; 16-bit inputs go through fp32, which the kernel wants (a copy of the inputs, not of the product)."""
    dtype = a.dtype if a.dtype in (torch.float32, torch.float64) else torch.float32
    support = csr_support(index, a.shape[1], b.shape[1], dtype)
    return torch.sparse.sampled_addmm(support, a.t().to(dtype), b.to(dtype), beta=0.0).values().to(a.dtype)


@functools.cache
def csr_works() -> bool:
    """Whether this build of PyTorch has the kernel; says its one warning (that CSR is in beta) to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = sampled_csr(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1]))
        except RuntimeError:
            return False
    return found.tolist() == [1.0]


def _sampled_product(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    if a.shape[0] == 0 or index.numel() == 0:
        return a.new_zeros(index.shape)
    density = index.numel() / max(1, a.shape[1] * b.shape[1])
    if kernels_take(a, b) and a.dtype == b.dtype:
        if density < PER_ENTRY_DENSITY["cuda"]:
            return launch.sampled_entries(a, b, index)
        return launch.sampled_tile(a, b, launch.support_of(index, a.shape[1], b.shape[1]))
    if density <= KERNEL_DENSITY and kernel_serves(a, b, index):
        return sampled_by_kernel(a, b, index)
    if density <= CSR_DENSITY.get(a.device.type, 0.0) and csr_works():
        return sampled_csr(a, b, index)
    per_entry = density < PER_ENTRY_DENSITY.get(a.device.type, 0.0)
    return (sampled_per_entry if per_entry else sampled_by_tile)(a, b, index)


for _name, _function in (
    ("sparse_lowrank_linear", _sparse_lowrank),
    ("sparse_lowrank_linear_dx", _sparse_lowrank_dx),
    ("quantized_linear", _quantized),
    ("quantized_linear_dx", _quantized_dx),
    ("sampled_product", _sampled_product),
    ("skinny_products", _skinny_products),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


# --- fakes ---------------------------------------------------------------------------------------------------------------


def _logical(shape: Any, transposed: bool) -> tuple[int, int]:
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def _sparse_lowrank_fake(
    x: Tensor, weight: Tensor, bias: Any, values: Any, index: Any, a: Any, b: Any, scale: float, transposed: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _logical(weight.shape, transposed)[0]))


def _sparse_lowrank_dx_fake(
    g: Tensor, weight: Tensor, values: Any, index: Any, low: Any, a: Any, scale: float, transposed: bool
) -> Tensor:
    return g.new_empty((*g.shape[:-1], _logical(weight.shape, transposed)[1]))


def _quantized_fake(x: Tensor, format: str, rows: int, columns: int, transposed: bool, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], _logical((rows, columns), transposed)[0]))


def _quantized_dx_fake(g: Tensor, format: str, rows: int, columns: int, transposed: bool, *rest: Any) -> Tensor:
    return g.new_empty((*g.shape[:-1], _logical((rows, columns), transposed)[1]))


def _skinny_products_fake(x: Tensor, rows: Tensor | None, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    low = x.new_empty(0 if rows is None else (x.shape[0], rows.shape[0]))
    return low, x.new_empty(0 if factor is None else (factor.shape[1], x.shape[1]))


for _name, _function in (
    ("sparse_lowrank_linear", _sparse_lowrank_fake),
    ("sparse_lowrank_linear_dx", _sparse_lowrank_dx_fake),
    ("quantized_linear", _quantized_fake),
    ("quantized_linear_dx", _quantized_dx_fake),
    ("sampled_product", lambda a, b, index: a.new_empty(index.shape)),
    ("skinny_products", _skinny_products_fake),
):
    torch.library.register_fake(f"sparsify::{_name}", _function, lib=LIBRARY)


# --- autograd ------------------------------------------------------------------------------------------------------------


def _low_rank_gradients(
    g: Tensor,
    x: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    want_x: bool,
    want_a: bool,
    want_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(low, dA, dB)`: `low = g B (T, r)`, which dX and dA share, `dA = s lowᵀ x`, `dB = s gᵀ (x Aᵀ)`; one pass over g for
    `low` and dB."""
    if a is None or b is None or not (want_x or want_a or want_b):
        return None, None, None
    skinny = torch.ops.sparsify.skinny_products
    tokens_x = None if x is None else x.reshape(-1, x.shape[-1])
    u = skinny(tokens_x, a, None)[0] if want_b else None
    low, product = skinny(g.reshape(-1, g.shape[-1]), b.t() if want_x or want_a else None, u)
    d_a = (scale * skinny(tokens_x, None, low)[1]).to(a.dtype) if want_a else None
    return low, d_a, (scale * product.t()).to(b.dtype) if want_b else None


def _sparse_gradient(
    g: Tensor, x: Tensor | None, values: Tensor | None, index: Tensor | None, transposed: bool, wanted: bool
) -> Tensor | None:
    """`dS = (gᵀ x)[support]`."""
    if not wanted or x is None or values is None or index is None:
        return None
    tokens_g, tokens_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    first, second = (tokens_x, tokens_g) if transposed else (tokens_g, tokens_x)
    return torch.ops.sparsify.sampled_product(first, second, index).to(values.dtype)


def _setup_sparse_lowrank(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, values, index, a, b, scale, transposed = inputs
    trained = any(ctx.needs_input_grad[i] for i in (3, 5, 6))
    kept = saved_input(x) if trained else (None, None)
    ctx.save_for_backward(*kept, weight, values, index, a, b)
    ctx.scale, ctx.transposed, ctx.bias_dtype = scale, transposed, None if bias is None else bias.dtype


def _backward_sparse_lowrank(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    *kept, weight, values, index, a, b = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = d_bias = None
    x = restored_input(*kept) if need[3] or need[5] or need[6] else None
    low, d_a, d_b = _low_rank_gradients(g, x, a, b, ctx.scale, need[0], need[5], need[6])
    if need[0]:
        dx = torch.ops.sparsify.sparse_lowrank_linear_dx(g, weight, values, index, low, a, ctx.scale, ctx.transposed)
    if need[2]:
        d_bias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
    d_values = _sparse_gradient(g, x, values, index, ctx.transposed, need[3])
    return dx, None, d_bias, d_values, None, d_a, d_b, None, None


torch.library.register_autograd(
    "sparsify::sparse_lowrank_linear", _backward_sparse_lowrank, setup_context=_setup_sparse_lowrank, lib=LIBRARY
)


def _setup_quantized(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, format, rows, columns, transposed, bias, block, channels, axis, values, index, a, b, scale, packed = inputs
    need = ctx.needs_input_grad  # flattened: positions hold up to `packed`, which is why it stands last
    whole = any(need[i] for i in (9, 11, 12)) or (need[6] and axis == 0)
    some = need[6] and not whole
    kept = saved_input(x) if whole else (x.index_select(-1, channels) if some else None, None)
    ctx.save_for_backward(*kept, bias, block, channels, values, index, a, b, *packed)
    ctx.meta = (format, rows, columns, transposed, axis, scale, whole)
    ctx.wants = tuple(bool(need[i]) for i in (0, 5, 6, 9, 11, 12))


def _backward_quantized(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    first, second, bias, block, channels, values, index, a, b, *packed = ctx.saved_tensors
    format, rows, columns, transposed, axis, scale, whole = ctx.meta
    want_x, want_bias, want_block, want_values, want_a, want_b = ctx.wants
    dx = d_bias = d_block = None
    kept = restored_input(first, second)
    low, d_a, d_b = _low_rank_gradients(g, kept if whole else None, a, b, scale, want_x, want_a, want_b)
    if want_x:
        dx = torch.ops.sparsify.quantized_linear_dx(
            g, format, rows, columns, transposed, block, channels, axis, values, index, low, a, scale, packed
        )
    tokens_g = g.reshape(-1, g.shape[-1])
    if want_bias and bias is not None:
        d_bias = tokens_g.sum(0).to(bias.dtype)
    if want_block and block is not None and channels is not None and kept is not None:
        tokens_x = kept.reshape(-1, kept.shape[-1])
        if axis == 0:
            tokens_s = tokens_g.index_select(1, channels.long())
            d_block = tokens_s.t().mm(tokens_x).to(block.dtype)
        else:
            tokens_x = tokens_x.index_select(1, channels.long()) if whole else tokens_x
            d_block = tokens_g.t().mm(tokens_x).to(block.dtype)
    d_values = _sparse_gradient(g, kept if whole else None, values, index, transposed, want_values)
    gradients = (dx, None, None, None, None, d_bias, d_block, None, None, d_values, None, d_a, d_b, None)
    return (*gradients, [None] * len(packed))


torch.library.register_autograd(
    "sparsify::quantized_linear", _backward_quantized, setup_context=_setup_quantized, lib=LIBRARY
)

for _name in ("sparse_lowrank_linear", "quantized_linear"):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        LIBRARY.impl(_name, _autocast(getattr(torch.ops.sparsify, _name).default, _device), _key)

__all__ = [
    "dense_weight",
    "effective_weight",
    "oracle_sampled_product",
    "oracle_weight",
    "sampled_by_tile",
    "sampled_csr",
    "sampled_per_entry",
]
