"""Operators for sparse + low-rank adaptation and for quantised bases, with their oracle.

    sparse_lowrank_linear   y = x W'ᵀ + s (x Aᵀ) Bᵀ + b,   W' = W with the entries at `index` replaced by `values`
    quantized_linear        the same with a packed base, and with a replaced block of channels (S2FT, PaCA) too
    sampled_product         (aᵀ b)[index]: the weight gradient on a support only (SDDMM)
    skinny_products         (x rowsᵀ, factorᵀ x) for few rows: the products of the low-rank part

`values` are *values* of the weight (base + S), kept in fp32: they are written into the dense weight at their support, so
that forward and dX stay one dense GEMM each and no dense `W + S` is ever allocated. As in `sparsify.ops`, those entries of the
weight are scratch that only the operator reads. `index` is flat in the stored weight (int32 where that is wide enough).

Saved for backward: `x` once (or its factors, see `sparsify.ops.saved_input`), which serves `dS`, `dA` and `dB`; `x Aᵀ (T, r)` is
computed again, and `low = g B (T, r)` once for `dX` and `dA`. Each product of the backward is an operator with a formula of its own,
made of the same operators, so derivatives of any order are right.
A quantised base is unpacked inside the operator, forward and backward, and dropped: at most one dense layer is alive. On a
GPU, up to 64 tokens are multiplied with the packed weight instead, sparse and low-rank part included, in one launch.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.cpu.sampled import kernel_serves, kernel_writes, sampled_by_kernel, write_by_kernel
from sparsify.kernels.cpu.skinny import skinny_by_kernel, skinny_serves, update_by_kernel, update_serves
from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.build import kernels_take
from sparsify.ops.checks import (
    ascending,
    require,
    require_floats,
    require_index,
    require_shape,
    require_together,
    require_within,
)
from sparsify.ops.library import LIBRARY, recorded
from sparsify.ops.partial_linear import effective_weight, flat
from sparsify.ops.saved_input import input_link, restored_input, saved_input
from sparsify.quantized import FORMATS, check_packed, unpack

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


# --- what is checked -------------------------------------------------------------------------------------------------------

Sizes = Any  # a number, symbolic under a compiler


def _check_linear(
    name: str, x: Tensor, rows: Sizes, columns: Sizes, bias: Tensor | None, values: Tensor | None, index: Tensor | None,
    a: Tensor | None, b: Tensor | None,
) -> None:  # fmt: skip
    """That the parts of a linear `(rows, columns)` fit; without reading any tensor."""
    require(x.dim() >= 1, lambda: f"{name}: the input has no dimension")
    require(
        x.shape[-1] == columns, lambda: f"{name}: the input {tuple(x.shape)} has not the weight's {columns} channels"
    )
    if bias is not None:
        require_shape(name, "bias", bias, rows)
    _check_support(name, values, index)
    require((a is None) == (b is None), lambda: f"{name}: of two low-rank factors, one is missing")
    if a is not None and b is not None:
        require(
            a.dim() == 2 and b.dim() == 2,
            lambda: f"{name}: low-rank factors are matrices, not {a.dim()}-D, {b.dim()}-D",
        )
        require_shape(name, "a", a, a.shape[0], columns)
        require_shape(name, "b", b, rows, a.shape[0])


def _check_dx(
    name: str, g: Tensor, rows: Sizes, columns: Sizes, values: Tensor | None, index: Tensor | None, low: Tensor | None,
    a: Tensor | None,
) -> None:  # fmt: skip
    require(g.dim() >= 1, lambda: f"{name}: the gradient has no dimension")
    require(g.shape[-1] == rows, lambda: f"{name}: the gradient {tuple(g.shape)} has not the weight's {rows} rows")
    _check_support(name, values, index)
    if a is not None and low is not None:
        require(
            a.dim() == 2 and low.dim() == 2, lambda: f"{name}: low and a are matrices, not {low.dim()}-D, {a.dim()}-D"
        )
        require_shape(name, "a", a, a.shape[0], columns)
        require_shape(name, "low", low, math.prod(g.shape[:-1]), a.shape[0])


def _check_support(name: str, values: Tensor | None, index: Tensor | None) -> None:
    require((values is None) == (index is None), lambda: f"{name}: of values and their positions, one is missing")
    if values is not None and index is not None:
        require_index(name, "index", index)
        require_shape(name, "values", values, index.shape[0])


def _check_weight(name: str, weight: Tensor, index: Tensor | None) -> None:
    require(weight.dim() == 2, lambda: f"{name}: the weight {tuple(weight.shape)} is no matrix")
    require(
        index is None or weight.is_contiguous(),
        lambda: (
            f"{name}: the weight {tuple(weight.shape)} has strides {weight.stride()}: positions are of a contiguous one"
        ),
    )


def _check_block(
    name: str, rows: Sizes, columns: Sizes, block: Tensor | None, channels: Tensor | None, axis: int
) -> None:
    require((block is None) == (channels is None), lambda: f"{name}: of a block and its channels, one is missing")
    if block is not None and channels is not None:
        require(axis in (0, 1), lambda: f"{name}: axis must be 0 or 1, got {axis}")
        require_index(name, "channels", channels)
        count = channels.shape[0]
        require_shape(name, "block", block, *((count, columns) if axis == 0 else (rows, count)))


def _check_skinny(x: Tensor, rows: Tensor | None, factor: Tensor | None) -> None:
    name = "skinny_products"
    require(x.dim() == 2, lambda: f"{name}: x {tuple(x.shape)} is no matrix")
    if rows is not None:
        require(rows.dim() == 2, lambda: f"{name}: rows {tuple(rows.shape)} is no matrix")
        require_shape(name, "rows", rows, rows.shape[0], x.shape[1])
    if factor is not None:
        require(factor.dim() == 2, lambda: f"{name}: factor {tuple(factor.shape)} is no matrix")
        require_shape(name, "factor", factor, x.shape[0], factor.shape[1] if rows is None else rows.shape[0])


def _check_sampled(a: Tensor, b: Tensor, index: Tensor) -> None:
    name = "sampled_product"
    require(a.dim() == 2 and b.dim() == 2, lambda: f"{name}: a and b are matrices, not {a.dim()}-D and {b.dim()}-D")
    require_shape(name, "b", b, a.shape[0], b.shape[1])
    require_index(name, "index", index)
    require(a.dtype == b.dtype, lambda: f"{name}: a is {a.dtype}, b {b.dtype}; cast one")


# --- implementations -----------------------------------------------------------------------------------------------------


def write_values(weight: Tensor, values: Tensor | None, index: Tensor | None) -> None:
    """Write the sparse values into a contiguous stored weight; bypasses the version counter (see `sparsify.ops`)."""
    if values is None or index is None:
        return
    _check_support("sparse part", values, index)
    _check_weight("sparse part", weight, index)
    require_together("sparse part", weight, values, index)
    require_within("sparse part", "index", index, weight.numel(), "weight")
    if weight.is_contiguous() and kernels_take(weight, values):
        launch.write_values(weight.data, values, index)
    elif kernel_writes(weight, values, index):
        write_by_kernel(weight.data, values, index)
    else:
        weight.data.view(-1).index_copy_(0, index.long(), values.to(weight.dtype))


def skinny_products(x: Tensor, rows: Tensor | None, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`(x rowsᵀ (T, r), factorᵀ x (r, m))` for `x (T, m)`, `rows (r, m)`, `factor (T, r)`; either may be absent. One pass over x
    where the generated CPU kernel serves, else GEMMs whose factor with few rows is kept row by row, which they want."""
    _check_skinny(x, rows, factor)
    rank = rows.shape[0] if rows is not None else factor.shape[1] if factor is not None else 0
    if skinny_serves(x, rank):
        return skinny_by_kernel(x, rows, factor)
    low = None if rows is None else x @ rows.to(x.dtype).contiguous().t()
    return low, None if factor is None else factor.t().mm(x)


def _skinny_products(x: Tensor, rows: Tensor | None, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    require_together("skinny_products", x, rows, factor)
    require_floats("skinny_products", x=x, rows=rows, factor=factor)
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
    name = "sparse_lowrank_linear"
    _check_weight(name, weight, index)
    _check_linear(name, x, *_logical(weight.shape, transposed), bias, values, index, a, b)
    require_together(name, x, weight, bias, values, index, a, b)
    require_floats(name, x=x, weight=weight, bias=bias, values=values, a=a, b=b)
    write_values(weight, values, index)
    return _forward(x, weight, transposed, bias, a, b, scale)


def _sparse_lowrank_dx(
    g: Tensor, weight: Tensor, values: Tensor | None, index: Tensor | None, low: Tensor | None, a: Tensor | None,
    scale: float, transposed: bool,
) -> Tensor:  # fmt: skip
    name = "sparse_lowrank_linear_dx"
    _check_weight(name, weight, index)
    _check_dx(name, g, *_logical(weight.shape, transposed), values, index, low, a)
    require_together(name, g, weight, values, index, low, a)
    require_floats(name, g=g, weight=weight, values=values, low=low, a=a)
    write_values(weight, values, index)
    return _dx(g, weight, transposed, low, a, scale)


def dense_weight(
    packed: list[Tensor], format: str, shape: list[int], transposed: bool, dtype: torch.dtype, block: Tensor | None,
    channels: Tensor | None, axis: int, values: Tensor | None, index: Tensor | None,
) -> Tensor:  # fmt: skip
    """Unpack one layer and put the trained parts into it; `(stored)` layout, a fresh tensor."""
    check_packed(packed, format, (shape[0], shape[1]))
    _check_block("quantized base", *_logical(shape, transposed), block, channels, axis)
    _check_support("quantized base", values, index)
    stored = unpack(packed, format, tuple(shape), dtype)
    if block is not None and channels is not None:
        logical = stored.t() if transposed else stored
        require_within("quantized base", "channels", channels, logical.shape[axis], "weight's channels")
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
    if index is not None and not ascending(index):
        return False  # the kernel looks positions up row by row
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
    name = "quantized_linear"
    _check_linear(name, x, *_logical((rows, columns), transposed), bias, values, index, a, b)
    _check_block(name, *_logical((rows, columns), transposed), block, channels, axis)
    require_together(name, x, bias, block, channels, values, index, a, b, *packed)
    require_floats(name, x=x, bias=bias, block=block, values=values, a=a, b=b)
    one_sided = values is None or block is None
    if format in FORMATS and one_sided and fits_one_pass(x, rows, columns, transposed, index):
        check_packed(packed, format, (rows, columns))
        if channels is not None:
            require_within(name, "channels", channels, columns if axis == 1 else rows, "weight's channels")
        if index is not None:
            require_within(name, "index", index, rows * columns, "weight")
        return one_pass(x, format, rows, bias, block, channels, axis, values, index, a, b, scale, packed)
    stored = dense_weight(packed, format, [rows, columns], transposed, x.dtype, block, channels, axis, values, index)
    return _forward(x, stored, transposed, bias, a, b, scale)


def _quantized_dx(
    g: Tensor, format: str, rows: int, columns: int, transposed: bool, block: Tensor | None, channels: Tensor | None,
    axis: int, values: Tensor | None, index: Tensor | None, low: Tensor | None, a: Tensor | None, scale: float,
    packed: list[Tensor],
) -> Tensor:  # fmt: skip
    name = "quantized_linear_dx"
    _check_dx(name, g, *_logical((rows, columns), transposed), values, index, low, a)
    require_together(name, g, block, channels, values, index, low, a, *packed)
    require_floats(name, g=g, block=block, values=values, low=low, a=a)
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
    _check_sampled(a, b, index)
    require_together("sampled_product", a, b, index)
    require_floats("sampled_product", a=a, b=b)
    require_within("sampled_product", "index", index, a.shape[1] * b.shape[1], "product")
    if a.shape[0] == 0 or index.numel() == 0:
        return a.new_zeros(index.shape)
    if not ascending(index):  # every variant walks through sorted, distinct positions
        distinct, places = torch.unique(index, return_inverse=True)
        return _sampled_product(a, b, distinct)[places]
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
    rows, columns = _logical(weight.shape, transposed)
    _check_linear("sparse_lowrank_linear", x, rows, columns, bias, values, index, a, b)
    return x.new_empty((*x.shape[:-1], rows))


def _sparse_lowrank_dx_fake(
    g: Tensor, weight: Tensor, values: Any, index: Any, low: Any, a: Any, scale: float, transposed: bool
) -> Tensor:
    rows, columns = _logical(weight.shape, transposed)
    _check_dx("sparse_lowrank_linear_dx", g, rows, columns, values, index, low, a)
    return g.new_empty((*g.shape[:-1], columns))


def _quantized_fake(
    x: Tensor, format: str, rows: int, columns: int, transposed: bool, bias: Any, block: Any, channels: Any, axis: int,
    values: Any, index: Any, a: Any, b: Any, scale: float, packed: list[Tensor],
) -> Tensor:  # fmt: skip
    shape = _logical((rows, columns), transposed)
    _check_linear("quantized_linear", x, *shape, bias, values, index, a, b)
    _check_block("quantized_linear", *shape, block, channels, axis)
    return x.new_empty((*x.shape[:-1], shape[0]))


def _quantized_dx_fake(
    g: Tensor, format: str, rows: int, columns: int, transposed: bool, block: Any, channels: Any, axis: int, values: Any,
    index: Any, low: Any, a: Any, scale: float, packed: list[Tensor],
) -> Tensor:  # fmt: skip
    shape = _logical((rows, columns), transposed)
    _check_dx("quantized_linear_dx", g, *shape, values, index, low, a)
    _check_block("quantized_linear_dx", *shape, block, channels, axis)
    return g.new_empty((*g.shape[:-1], shape[1]))


def _sampled_fake(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    _check_sampled(a, b, index)
    return a.new_empty(index.shape)


def _skinny_products_fake(x: Tensor, rows: Tensor | None, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_skinny(x, rows, factor)
    low = x.new_empty(0 if rows is None else (x.shape[0], rows.shape[0]))
    return low, x.new_empty(0 if factor is None else (factor.shape[1], x.shape[1]))


for _name, _function in (
    ("sparse_lowrank_linear", _sparse_lowrank_fake),
    ("sparse_lowrank_linear_dx", _sparse_lowrank_dx_fake),
    ("quantized_linear", _quantized_fake),
    ("quantized_linear_dx", _quantized_dx_fake),
    ("sampled_product", _sampled_fake),
    ("skinny_products", _skinny_products_fake),
):
    torch.library.register_fake(f"sparsify::{_name}", _function, lib=LIBRARY)


# --- in ATen, for transforms ---------------------------------------------------------------------------------------------


def _with_values(stored: Tensor, values: Tensor | None, index: Tensor | None) -> Tensor:
    if values is None or index is None:
        return stored
    return stored.reshape(-1).index_copy(0, index.long(), values.to(stored.dtype)).view(stored.shape)


def _linear_in_aten(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    """`x Wᵀ + s (x Aᵀ) Bᵀ + b` of a logical weight `(n, m)`, in the dtype of `x`."""
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if a is None or b is None:
        return y
    return y + scale * (x.matmul(a.to(x.dtype).t())).matmul(b.to(x.dtype).t())


def _dx_in_aten(g: Tensor, weight: Tensor, low: Tensor | None, a: Tensor | None, scale: float) -> Tensor:
    dx = g.matmul(weight.to(g.dtype))
    return dx if low is None or a is None else dx + scale * low.matmul(a.to(low.dtype)).view(dx.shape)


def _sparse_lowrank_in_aten(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, index: Tensor | None,
    a: Tensor | None, b: Tensor | None, scale: float, transposed: bool,
) -> Tensor:  # fmt: skip
    stored = _with_values(weight, values, index)
    return _linear_in_aten(x, stored.t() if transposed else stored, bias, a, b, scale)


def _sparse_lowrank_dx_in_aten(
    g: Tensor, weight: Tensor, values: Tensor | None, index: Tensor | None, low: Tensor | None, a: Tensor | None,
    scale: float, transposed: bool,
) -> Tensor:  # fmt: skip
    stored = _with_values(weight, values, index)
    return _dx_in_aten(g, stored.t() if transposed else stored, low, a, scale)


def _base_in_aten(
    packed: list[Tensor], format: str, shape: tuple[int, int], transposed: bool, dtype: torch.dtype, block: Tensor | None,
    channels: Tensor | None, axis: int, values: Tensor | None, index: Tensor | None,
) -> Tensor:  # fmt: skip
    """The logical weight `(n, m)` that `dense_weight` stands for, differentiable in block and values."""
    check_packed(packed, format, shape)
    stored = unpack(packed, format, shape, dtype)
    if block is not None and channels is not None:
        trained, side = (block.t(), 1 - axis) if transposed else (block, axis)
        stored = stored.index_copy(side, channels.long(), trained.to(dtype))
    stored = _with_values(stored, values, index)
    return stored.t() if transposed else stored


def _quantized_in_aten(
    x: Tensor, format: str, rows: int, columns: int, transposed: bool, bias: Tensor | None, block: Tensor | None,
    channels: Tensor | None, axis: int, values: Tensor | None, index: Tensor | None, a: Tensor | None, b: Tensor | None,
    scale: float, packed: list[Tensor],
) -> Tensor:  # fmt: skip
    weight = _base_in_aten(packed, format, (rows, columns), transposed, x.dtype, block, channels, axis, values, index)
    return _linear_in_aten(x, weight, bias, a, b, scale)


def _quantized_dx_in_aten(
    g: Tensor, format: str, rows: int, columns: int, transposed: bool, block: Tensor | None, channels: Tensor | None,
    axis: int, values: Tensor | None, index: Tensor | None, low: Tensor | None, a: Tensor | None, scale: float,
    packed: list[Tensor],
) -> Tensor:  # fmt: skip
    weight = _base_in_aten(packed, format, (rows, columns), transposed, g.dtype, block, channels, axis, values, index)
    return _dx_in_aten(g, weight, low, a, scale)


def _skinny_in_aten(x: Tensor, rows: Tensor | None, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    low = x.new_empty(0) if rows is None else x.mm(rows.to(x.dtype).t())
    return low, x.new_empty(0) if factor is None else factor.t().mm(x)


for _name, _function in (
    ("sparse_lowrank_linear", _sparse_lowrank_in_aten),
    ("sparse_lowrank_linear_dx", _sparse_lowrank_dx_in_aten),
    ("quantized_linear", _quantized_in_aten),
    ("quantized_linear_dx", _quantized_dx_in_aten),
    ("sampled_product", lambda a, b, index: a.t().mm(b).reshape(-1).index_select(0, index)),
    ("skinny_products", _skinny_in_aten),
):
    LIBRARY.in_aten(_name, _function)


# --- autograd ------------------------------------------------------------------------------------------------------------


def _low_rank_gradients(
    g: Tensor, x: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float, want_x: bool, of_a: torch.dtype | None,
    of_b: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`(low, dA, dB)`: `low = g B (T, r)`, which dX and dA share, `dA = s lowᵀ x`, `dB = s gᵀ (x Aᵀ)`; one pass over g for
    `low` and dB. of_a, of_b: dtypes of the gradients, None where none is wanted; a and b may then be missing."""
    skinny = torch.ops.sparsify.skinny_products
    tokens_x = None if x is None else flat(x)
    u = skinny(tokens_x, a, None)[0] if of_b is not None else None
    rows = b.t() if b is not None and (want_x or of_a is not None) else None
    if rows is None and u is None:
        return None, None, None
    low, product = skinny(flat(g), rows, u)
    d_a = (scale * skinny(tokens_x, None, low)[1]).to(of_a) if of_a is not None else None
    return None if rows is None else low, d_a, (scale * product.t()).to(of_b) if of_b is not None else None


def _stored_factors(g: Tensor, x: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """`(p, q)` such that `pᵀ q` is the gradient of the stored weight."""
    return (flat(x), flat(g)) if transposed else (flat(g), flat(x))


def _sparse_gradient(
    g: Tensor, x: Tensor | None, index: Tensor | None, transposed: bool, dtype: torch.dtype | None
) -> Tensor | None:
    """`dS = (gᵀ x)[support]` in `dtype`; None where no gradient is wanted."""
    if dtype is None or x is None or index is None:
        return None
    return torch.ops.sparsify.sampled_product(*_stored_factors(g, x, transposed), index).to(dtype)


def _frozen_gradient(g: Tensor, x: Tensor, index: Tensor | None, transposed: bool, dtype: torch.dtype) -> Tensor:
    """`gᵀ x` with zeros at the support: for a weight that was made to require a gradient in spite of the plan."""
    first, second = _stored_factors(g, x, transposed)
    dense = first.t().mm(second).to(dtype)
    return dense if index is None else dense.view(-1).index_fill(0, index.long(), 0).view(dense.shape)


def _dtype_if(wanted: bool, t: Tensor | None) -> torch.dtype | None:
    return t.dtype if wanted and t is not None else None


def _setup_sparse_lowrank(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, values, index, a, b, scale, transposed = inputs
    need = ctx.needs_input_grad
    trained = any(need[i] for i in (1, 3, 5, 6))
    first, second = saved_input(x) if trained else (None, None)
    link = input_link(x, second)
    ctx.save_for_backward(
        first, second, link, weight if need[0] else None, values if need[0] else None, index,
        a if need[0] or need[6] else None, b if need[0] or need[5] else None,
    )  # fmt: skip
    ctx.scale, ctx.transposed = scale, transposed
    ctx.dtypes = tuple(_dtype_if(need[i], t) for i, t in ((1, weight), (2, bias), (3, values), (5, a), (6, b)))


def _backward_sparse_lowrank(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    *kept, weight, values, index, a, b = ctx.saved_tensors
    need, (of_weight, of_bias, of_values, of_a, of_b) = ctx.needs_input_grad, ctx.dtypes
    x = restored_input(*kept)
    low, d_a, d_b = _low_rank_gradients(g, x, a, b, ctx.scale, need[0], of_a, of_b)
    dx = d_weight = None
    if need[0]:
        support = (None, None) if values is None else (values, index)
        dx = torch.ops.sparsify.sparse_lowrank_linear_dx(g, weight, *support, low, a, ctx.scale, ctx.transposed)
    if x is not None and of_weight is not None:
        d_weight = _frozen_gradient(g, x, index, ctx.transposed, of_weight)
    d_bias = None if of_bias is None else flat(g).sum(0).to(of_bias)
    d_values = _sparse_gradient(g, x, index, ctx.transposed, of_values)
    return dx, d_weight, d_bias, d_values, None, d_a, d_b, None, None


def _setup_sparse_lowrank_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, weight, values, index, low, a, scale, transposed = inputs
    need = ctx.needs_input_grad
    own = (weight, values) if need[0] else (None, None)
    ctx.save_for_backward(g if need[1] or need[2] else None, *own, index, low, a)
    ctx.scale, ctx.transposed = scale, transposed
    ctx.dtypes = tuple(_dtype_if(need[i], t) for i, t in ((1, weight), (2, values), (4, low), (5, a)))


def _backward_sparse_lowrank_dx(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    """Of `dX = g W' + s low A`: the operator itself, without its low-rank part, for g, and sampled and skinny products."""
    g, weight, values, index, low, a = ctx.saved_tensors
    of_weight, of_values, of_low, of_a = ctx.dtypes
    dg = d_weight = None
    if ctx.needs_input_grad[0]:
        support = (None, None) if values is None else (values, index)
        dg = torch.ops.sparsify.sparse_lowrank_linear(outer, weight, None, *support, None, None, 1.0, ctx.transposed)
    if of_weight is not None:
        d_weight = _frozen_gradient(g, outer, index, ctx.transposed, of_weight)
    d_values = _sparse_gradient(g, outer, index, ctx.transposed, of_values)
    d_low, d_a = _added_gradients(outer, low, a, ctx.scale, of_low, of_a)
    return dg, d_weight, d_values, None, d_low, d_a, None, None


def _added_gradients(
    outer: Tensor,
    low: Tensor | None,
    a: Tensor | None,
    scale: float,
    of_low: torch.dtype | None,
    of_a: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Of `s low A` in dX: `(s outer Aᵀ, s lowᵀ outer)`, in the dtypes given; None where there is none."""
    if low is None or a is None or (of_low is None and of_a is None):
        return None, None
    d_low, d_a = torch.ops.sparsify.skinny_products(
        flat(outer), None if of_low is None else a, None if of_a is None else low
    )
    return None if of_low is None else (scale * d_low).to(of_low), None if of_a is None else (scale * d_a).to(of_a)


for _name, _function, _setup in (
    ("sparse_lowrank_linear", _backward_sparse_lowrank, _setup_sparse_lowrank),
    ("sparse_lowrank_linear_dx", _backward_sparse_lowrank_dx, _setup_sparse_lowrank_dx),
):
    torch.library.register_autograd(f"sparsify::{_name}", _function, setup_context=_setup, lib=LIBRARY)


def _setup_quantized(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, format, rows, columns, transposed, bias, block, channels, axis, values, index, a, b, scale, packed = inputs
    need = ctx.needs_input_grad  # flattened: positions hold up to `packed`, which is why it stands last
    whole = any(need[i] for i in (9, 11, 12)) or (need[6] and axis == 0)
    first = second = None
    if whole:
        first, second = saved_input(x)
    elif need[6]:
        first = recorded(x.index_select, -1, channels) if need[0] else x.index_select(-1, channels)
    own = (block, values) if need[0] else (None, None)
    ctx.save_for_backward(
        first, second, input_link(x, second), *own, channels, index, a if need[0] or need[12] else None,
        b if need[0] or need[11] else None, *packed,
    )  # fmt: skip
    ctx.meta, ctx.whole = (format, rows, columns, transposed), whole
    ctx.axis, ctx.scale = axis, scale
    ctx.dtypes = tuple(_dtype_if(need[i], t) for i, t in ((5, bias), (6, block), (9, values), (11, a), (12, b)))


def _quantized_block_gradient(
    g: Tensor, x: Tensor, channels: Tensor, axis: int, index: Tensor | None, shape: tuple[int, int], transposed: bool
) -> Tensor:
    """`(gᵀ x)` on trained channels, zero where the sparse part is written over them; of axis 1, `x` holds these columns only."""
    tokens_g, tokens_x = flat(g), flat(x)
    tokens_g = tokens_g if axis == 1 else tokens_g.index_select(1, channels)
    gradient = tokens_g.t().mm(tokens_x)
    if index is None:
        return gradient
    free = torch.ones(shape, dtype=torch.bool, device=g.device)
    free.view(-1)[index.long()] = False
    return gradient * (free.t() if transposed else free).index_select(axis, channels)


def _backward_quantized(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    saved: Any = ctx.saved_tensors  # asked for once: checkpointing gives each tensor back once
    *kept, block, values, channels, index, a, b = saved[:9]
    packed = list(saved[9:])
    need, (of_bias, of_block, of_values, of_a, of_b) = ctx.needs_input_grad, ctx.dtypes
    _, rows, columns, transposed = ctx.meta
    dx = d_block = None
    x = restored_input(*kept)
    low, d_a, d_b = _low_rank_gradients(g, x if ctx.whole else None, a, b, ctx.scale, need[0], of_a, of_b)
    if need[0]:
        parts = (None if block is None else block, None if block is None else channels, ctx.axis)
        parts += (values, None if values is None else index, low, a, ctx.scale, packed)
        dx = torch.ops.sparsify.quantized_linear_dx(g, *ctx.meta, *parts)
    d_bias = None if of_bias is None else flat(g).sum(0).to(of_bias)
    if of_block is not None and x is not None:
        read = x.index_select(-1, channels) if ctx.whole and ctx.axis == 1 else x
        d_block = _quantized_block_gradient(g, read, channels, ctx.axis, index, (rows, columns), transposed).to(
            of_block
        )
    d_values = _sparse_gradient(g, x if ctx.whole else None, index, transposed, of_values)
    gradients = (dx, None, None, None, None, d_bias, d_block, None, None, d_values, None, d_a, d_b, None)
    return (*gradients, [None] * len(packed))


def _setup_quantized_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, format, rows, columns, transposed, block, channels, axis, values, index, low, a, scale, packed = inputs
    need = ctx.needs_input_grad
    own = (block, values) if need[0] else (None, None)
    ctx.save_for_backward(g if need[5] or need[8] else None, *own, channels, index, low, a, *packed)
    ctx.meta, ctx.axis, ctx.scale = (format, rows, columns, transposed), axis, scale
    ctx.dtypes = tuple(_dtype_if(need[i], t) for i, t in ((5, block), (8, values), (10, low), (11, a)))


def _backward_quantized_dx(ctx: Any, outer: Tensor) -> tuple[Any, ...]:
    """As of `sparse_lowrank_linear_dx`, with the block's gradient beside."""
    saved: Any = ctx.saved_tensors
    g, block, values, channels, index, low, a = saved[:7]
    packed = list(saved[7:])
    of_block, of_values, of_low, of_a = ctx.dtypes
    _, rows, columns, transposed = ctx.meta
    dg = d_block = None
    if ctx.needs_input_grad[0]:
        parts = (None, block, None if block is None else channels, ctx.axis, values, None if values is None else index)
        dg = torch.ops.sparsify.quantized_linear(outer, *ctx.meta, *parts, None, None, 1.0, packed)
    if of_block is not None:
        read = outer.index_select(-1, channels) if ctx.axis == 1 else outer
        d_block = _quantized_block_gradient(g, read, channels, ctx.axis, index, (rows, columns), transposed).to(
            of_block
        )
    d_values = _sparse_gradient(g, outer, index, transposed, of_values)
    d_low, d_a = _added_gradients(outer, low, a, ctx.scale, of_low, of_a)
    gradients = (dg, None, None, None, None, d_block, None, None, d_values, None, d_low, d_a, None)
    return (*gradients, [None] * len(packed))


for _name, _function, _setup in (
    ("quantized_linear", _backward_quantized, _setup_quantized),
    ("quantized_linear_dx", _backward_quantized_dx, _setup_quantized_dx),
):
    torch.library.register_autograd(f"sparsify::{_name}", _function, setup_context=_setup, lib=LIBRARY)


def _setup_sampled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_sampled(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    """Of `(aᵀ b)[index]`: `b Dᵀ` and `a D`, where D `(p, q)` holds the outer gradient at the positions. D is dense, for once."""
    a, b, index = ctx.saved_tensors
    p, q = a.shape[1], b.shape[1]
    dense = outer.new_zeros(p * q).index_add(0, index, outer).view(p, q)
    need = ctx.needs_input_grad
    return b.mm(dense.t()) if need[0] else None, a.mm(dense) if need[1] else None, None


def _setup_skinny(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward_skinny(ctx: Any, of_low: Tensor | None, of_product: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of `(x rowsᵀ, factorᵀ x)`: x gets `of_low rows + factor of_product`; rows and factor get the same products of x again."""
    saved: Any = ctx.saved_tensors
    x, rows, factor = saved
    need = ctx.needs_input_grad
    d_rows = d_factor = None
    parts: list[Tensor] = []
    if need[0] and rows is not None and of_low is not None:
        parts.append(of_low.mm(rows.to(x.dtype)))
    if need[0] and factor is not None and of_product is not None:
        parts.append(factor.mm(of_product))
    dx = None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
    for_rows = of_low if need[1] and rows is not None else None
    for_factor = of_product if need[2] and factor is not None else None
    if for_rows is not None or for_factor is not None:
        low, product = torch.ops.sparsify.skinny_products(x, for_factor, for_rows)
        d_factor = None if for_factor is None or factor is None else low.to(factor.dtype)
        d_rows = None if for_rows is None or rows is None else product.to(rows.dtype)
    return dx, d_rows, d_factor


torch.library.register_autograd(
    "sparsify::sampled_product", _backward_sampled, setup_context=_setup_sampled, lib=LIBRARY
)
torch.library.register_autograd("sparsify::skinny_products", _backward_skinny, setup_context=_setup_skinny, lib=LIBRARY)

for _name in ("sparse_lowrank_linear", "quantized_linear"):
    LIBRARY.autocast(_name)

__all__ = [
    "dense_weight",
    "effective_weight",
    "oracle_sampled_product",
    "oracle_weight",
    "sampled_by_tile",
    "sampled_csr",
    "sampled_per_entry",
]
