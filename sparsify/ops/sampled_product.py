"""The weight gradient on a support only (SDDMM).

    sampled_product(a, b, index)     (aᵀ b)[index]     for a (T, p), b (T, q), index flat in (p, q), in any order

Dense tiles that are gathered at once, a dot product per entry, PyTorch's kernel over a CSR support, or a generated kernel:
`sparsify.ops.dispatch` has the densities at which each is cheapest.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops import dispatch
from sparsify.ops.checks import (
    ascending,
    require,
    require_floats,
    require_index,
    require_shape,
    require_together,
    require_within,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LIBRARY.define("sampled_product(Tensor a, Tensor b, Tensor index) -> Tensor")

TILE_BYTES = 32 * 2**20


def oracle_sampled_product(
    a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"]
) -> Float[Tensor, " k"]:
    """`(aᵀ b)` at flat positions `index`; a `(T, p)`, b `(T, q)`."""
    return (a.t() @ b).reshape(-1)[index.long()]


def _check_sampled(a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"]) -> None:
    name = "sampled_product"
    require(a.dim() == 2 and b.dim() == 2, lambda: f"{name}: a and b are matrices, not {a.dim()}-D and {b.dim()}-D")
    require_shape(name, "b", b, a.shape[0], b.shape[1])
    require_index(name, "index", index)
    require(a.dtype == b.dtype, lambda: f"{name}: a is {a.dtype}, b {b.dtype}; cast one")


def sampled_by_tile(a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
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


def sampled_per_entry(
    a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"]
) -> Float[Tensor, " k"]:
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


def csr_support(index: Int[Tensor, " k"], p: int, q: int, dtype: torch.dtype) -> Float[Tensor, "p q"]:
    """Sorted flat positions in a `(p, q)` matrix as a CSR tensor of zeros."""
    index = index.long()
    starts = torch.searchsorted(index, torch.arange(p + 1, device=index.device) * q)
    values = torch.zeros(index.numel(), dtype=dtype, device=index.device)
    return torch.sparse_csr_tensor(starts, index % q, values, (p, q), check_invariants=False)


def sampled_csr(a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
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


def _sampled_product(a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
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
    by_kernel = dispatch.sampled_product(a, b, index, density)
    if by_kernel is not None:
        return by_kernel
    if density <= dispatch.CSR_DENSITY.get(a.device.type, 0.0) and csr_works():
        return sampled_csr(a, b, index)
    per_entry = density < dispatch.PER_ENTRY_DENSITY.get(a.device.type, 0.0)
    return (sampled_per_entry if per_entry else sampled_by_tile)(a, b, index)


def _sampled_fake(a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    _check_sampled(a, b, index)
    return a.new_empty(index.shape)


def _sampled_in_aten(a: Float[Tensor, "T p"], b: Float[Tensor, "T q"], index: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    return a.t().mm(b).reshape(-1).index_select(0, index)


def _setup_sampled(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_sampled(ctx: Context, outer: Float[Tensor, " k"]) -> tuple[Tensor | None, ...]:
    """Of `(aᵀ b)[index]`: `b Dᵀ` and `a D`, where D `(p, q)` holds the outer gradient at the positions. D is dense, for once."""
    a, b, index = ctx.saved_tensors
    p, q = a.shape[1], b.shape[1]
    dense = outer.new_zeros(p * q).index_add(0, index, outer).view(p, q)
    need = ctx.needs_input_grad
    return b.mm(dense.t()) if need[0] else None, a.mm(dense) if need[1] else None, None


LIBRARY.implement(
    "sampled_product",
    kernel=_sampled_product,
    fake=_sampled_fake,
    aten=_sampled_in_aten,
    backward=_backward_sampled,
    setup=_setup_sampled,
)
