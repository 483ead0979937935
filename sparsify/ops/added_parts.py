"""What a linear gains beside its base, whether that is dense or packed: values at a sparse support, and two low-rank factors.

    forward    W[index ← values],  y += s (x Aᵀ) Bᵀ          checks, the write, the product
    backward   dX += s low A,  low = g B                      dS = (gᵀ x)[index],  dA = s lowᵀ x,  dB = s gᵀ (x Aᵀ)

`sparse_lowrank_linear` and `quantized_linear` are made of this. Each product of a backward is an operator with a formula of its
own, so derivatives of any order are right.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.ops import dispatch
from sparsify.ops.checks import require, require_index, require_shape, require_together, require_within
from sparsify.ops.shapes import Sizes, flat
from sparsify.ops.skinny_products import reduced

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# --- what is checked ------------------------------------------------------------------------------------------------------


def check_linear(
    name: str,
    x: Float[Tensor, "*t m"],
    rows: Sizes,
    columns: Sizes,
    bias: Float[Tensor, " n"] | None,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
) -> None:
    """That the parts of a linear `(rows, columns)` fit; without reading any tensor."""
    require(x.dim() >= 1, lambda: f"{name}: the input has no dimension")
    require(
        x.shape[-1] == columns, lambda: f"{name}: the input {tuple(x.shape)} has not the weight's {columns} channels"
    )
    if bias is not None:
        require_shape(name, "bias", bias, rows)
    check_support(name, values, index)
    require((a is None) == (b is None), lambda: f"{name}: of two low-rank factors, one is missing")
    if a is not None and b is not None:
        require(
            a.dim() == 2 and b.dim() == 2,
            lambda: f"{name}: low-rank factors are matrices, not {a.dim()}-D, {b.dim()}-D",
        )
        require_shape(name, "a", a, a.shape[0], columns)
        require_shape(name, "b", b, rows, a.shape[0])


def check_dx(
    name: str,
    g: Float[Tensor, "*t n"],
    rows: Sizes,
    columns: Sizes,
    values: Float[Tensor, " k"] | None,
    index: Int[Tensor, " k"] | None,
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
) -> None:
    require(g.dim() >= 1, lambda: f"{name}: the gradient has no dimension")
    require(g.shape[-1] == rows, lambda: f"{name}: the gradient {tuple(g.shape)} has not the weight's {rows} rows")
    check_support(name, values, index)
    if a is not None and low is not None:
        require(
            a.dim() == 2 and low.dim() == 2, lambda: f"{name}: low and a are matrices, not {low.dim()}-D, {a.dim()}-D"
        )
        require_shape(name, "a", a, a.shape[0], columns)
        require_shape(name, "low", low, math.prod(g.shape[:-1]), a.shape[0])


def check_support(name: str, values: Float[Tensor, " k"] | None, index: Int[Tensor, " k"] | None) -> None:
    require((values is None) == (index is None), lambda: f"{name}: of values and their positions, one is missing")
    if values is not None and index is not None:
        require_index(name, "index", index)
        require_shape(name, "values", values, index.shape[0])


def check_weight(name: str, weight: Float[Tensor, "p q"], index: Int[Tensor, " k"] | None) -> None:
    require(weight.dim() == 2, lambda: f"{name}: the weight {tuple(weight.shape)} is no matrix")
    require(
        index is None or weight.is_contiguous(),
        lambda: (
            f"{name}: the weight {tuple(weight.shape)} has strides {weight.stride()}: positions are of a contiguous one"
        ),
    )


# --- forward and dX with a dense weight -----------------------------------------------------------------------------------


def write_values(
    weight: Float[Tensor, "p q"], values: Float[Tensor, " k"] | None, index: Int[Tensor, " k"] | None
) -> None:
    """Write the sparse values into a contiguous stored weight; bypasses the version counter (see `partial_linear`)."""
    if values is None or index is None:
        return
    check_support("sparse part", values, index)
    if weight.dim() == 3 and weight.is_contiguous():  # packed experts
        weight = weight.flatten(0, 1)
    check_weight("sparse part", weight, index)
    require_together("sparse part", weight, values, index)
    require_within("sparse part", "index", index, weight.numel(), "weight")
    if not dispatch.write_values(weight, values, index):
        weight.data.view(-1).index_copy_(0, index.long(), values.to(weight.dtype))


def project(
    y: Float[Tensor, "*t n"], low: Float[Tensor, "T r"], second: Float[Tensor, "r n"], scale: float
) -> Float[Tensor, "*t n"]:
    """`y + s low second`, in place on y, for `low (T, r)`, `second (r, n)`."""
    flat = y.view(-1, y.shape[-1])
    if not dispatch.update_low_rank(flat, low, second, scale):
        flat.addmm_(low, second.to(y.dtype), alpha=scale)
    return y


def dense_forward(
    x: Float[Tensor, "*t m"],
    stored: Float[Tensor, "p q"],
    transposed: bool,
    bias: Float[Tensor, " n"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
) -> Float[Tensor, "*t n"]:
    weight = (stored.t() if transposed else stored).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y if a is None or b is None else project(y, reduced(x, a), b.t(), scale)


def dense_dx(
    g: Float[Tensor, "*t n"],
    stored: Float[Tensor, "p q"],
    transposed: bool,
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
) -> Float[Tensor, "*t m"]:
    weight = (stored.t() if transposed else stored).to(g.dtype)
    dx = g.matmul(weight)
    return dx if a is None or low is None else project(dx, low, a, scale)


# --- the same in ATen -----------------------------------------------------------------------------------------------------


def with_values(
    stored: Float[Tensor, "p q"], values: Float[Tensor, " k"] | None, index: Int[Tensor, " k"] | None
) -> Float[Tensor, "p q"]:
    if values is None or index is None:
        return stored
    return stored.reshape(-1).index_copy(0, index.long(), values.to(stored.dtype)).view(stored.shape)


def linear_in_aten(
    x: Float[Tensor, "*t m"],
    weight: Float[Tensor, "n m"],
    bias: Float[Tensor, " n"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
) -> Float[Tensor, "*t n"]:
    """`x Wᵀ + s (x Aᵀ) Bᵀ + b` of a logical weight `(n, m)`, in the dtype of `x`."""
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if a is None or b is None:
        return y
    return y + scale * (x.matmul(a.to(x.dtype).t())).matmul(b.to(x.dtype).t())


def dx_in_aten(
    g: Float[Tensor, "*t n"],
    weight: Float[Tensor, "n m"],
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
) -> Float[Tensor, "*t m"]:
    dx = g.matmul(weight.to(g.dtype))
    return dx if low is None or a is None else dx + scale * low.matmul(a.to(low.dtype)).view(dx.shape)


# --- gradients ------------------------------------------------------------------------------------------------------------


def low_rank_gradients(
    g: Float[Tensor, "*t n"],
    x: Float[Tensor, "*t m"] | None,
    a: Float[Tensor, "r m"] | None,
    b: Float[Tensor, "n r"] | None,
    scale: float,
    want_x: bool,
    of_a: torch.dtype | None,
    of_b: torch.dtype | None,
) -> tuple[Float[Tensor, "T r"] | None, Float[Tensor, "r m"] | None, Float[Tensor, "n r"] | None]:
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


def stored_factors(
    g: Float[Tensor, "*t n"], x: Float[Tensor, "*t m"], transposed: bool
) -> tuple[Float[Tensor, "T p"], Float[Tensor, "T q"]]:
    """`(p, q)` such that `pᵀ q` is the gradient of the stored weight."""
    return (flat(x), flat(g)) if transposed else (flat(g), flat(x))


def sparse_gradient(
    g: Float[Tensor, "*t n"],
    x: Float[Tensor, "*t m"] | None,
    index: Int[Tensor, " k"] | None,
    transposed: bool,
    dtype: torch.dtype | None,
) -> Float[Tensor, " k"] | None:
    """`dS = (gᵀ x)[support]` in `dtype`; None where no gradient is wanted."""
    if dtype is None or x is None or index is None:
        return None
    return torch.ops.sparsify.sampled_product(*stored_factors(g, x, transposed), index).to(dtype)


def added_gradients(
    outer: Float[Tensor, "*t m"],
    low: Float[Tensor, "T r"] | None,
    a: Float[Tensor, "r m"] | None,
    scale: float,
    of_low: torch.dtype | None,
    of_a: torch.dtype | None,
) -> tuple[Float[Tensor, "T r"] | None, Float[Tensor, "r m"] | None]:
    """Of `s low A` in dX: `(s outer Aᵀ, s lowᵀ outer)`, in the dtypes given; None where there is none."""
    if low is None or a is None or (of_low is None and of_a is None):
        return None, None
    d_low, d_a = torch.ops.sparsify.skinny_products(
        flat(outer), None if of_low is None else a, None if of_a is None else low
    )
    return None if of_low is None else (scale * d_low).to(of_low), None if of_a is None else (scale * d_a).to(of_a)


def dtype_if(wanted: bool, t: Tensor | None) -> torch.dtype | None:
    return t.dtype if wanted and t is not None else None
