"""Rows that are sorted by expert, each group of them times the matrix of its expert: the products that packed experts are made of.

    grouped_linear(x, weight, offsets)           y_e = x_e W_eᵀ            x (S, m), weight (E, n, m), y (S, n)
    grouped_outer(g, x, offsets)                 D_e = g_eᵀ x_e            g (S, n), x (S, m), D (E, n, m)
    grouped_sampled(a, b, index, offsets)        (a_eᵀ b_e)[index]         index flat in (E, p, q), sorted

`offsets (E,)` are the ends of the groups: rows `offsets[e - 1]` to `offsets[e]` are the tokens of expert e, and the last offset is S.
A group may be empty. The weight may be a turned view (`stored.mT`).

The three are closed under differentiation: the formulas of each are made of the others, so derivatives of any order are right. A
frozen weight gets no gradient, and nothing of its size is formed for it.

One matrix product per expert; on CUDA in bfloat16, where rows are aligned to 16 bytes, PyTorch's grouped product, which does not
wait for the device to learn the sizes of the groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops.checks import require, require_floats, require_index, require_shape, require_together, require_within

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LIBRARY.define("grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor")
LIBRARY.define("grouped_outer(Tensor g, Tensor x, Tensor offsets) -> Tensor")
LIBRARY.define("grouped_sampled(Tensor a, Tensor b, Tensor index, Tensor offsets) -> Tensor")

ops = torch.ops.sparsify


# --- the oracle: what the operators mean, written out, in any precision -------------------------------------------------


def oracle_grouped_linear(
    x: Float[Tensor, "S m"], weight: Float[Tensor, "experts n m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "S n"]:
    """Eager definition: every row times the matrix of its expert."""
    return torch.stack([x[row] @ weight[e].t() for row, e in enumerate(expert_of_rows(offsets, x.shape[0]).tolist())])


def oracle_grouped_outer(
    g: Float[Tensor, "S n"], x: Float[Tensor, "S m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "experts n m"]:
    """Eager definition: the sum over an expert's rows of their outer products."""
    expert = expert_of_rows(offsets, x.shape[0])
    return torch.stack([g[expert == e].t() @ x[expert == e] for e in range(offsets.numel())])


def oracle_grouped_backward(
    g: Float[Tensor, "S n"],
    x: Float[Tensor, "S m"],
    weight: Float[Tensor, "experts n m"],
    offsets: Int[Tensor, " experts"],
) -> tuple[Float[Tensor, "S m"], Float[Tensor, "experts n m"]]:
    """`(dX, dW)` of `grouped_linear`, written out: `dX_e = g_e W_e`, `dW_e = g_eᵀ x_e`."""
    return oracle_grouped_linear(g, weight.transpose(1, 2), offsets), oracle_grouped_outer(g, x, offsets)


def expert_of_rows(offsets: Int[Tensor, " experts"], rows: int) -> Int[Tensor, " S"]:
    """The expert of each row, `(S,)`."""
    return torch.searchsorted(offsets.contiguous(), torch.arange(rows, device=offsets.device), right=True)


# --- what is checked ----------------------------------------------------------------------------------------------------


def check_grouped(
    name: str, x: Float[Tensor, "S m"], weight: Float[Tensor, "experts n m"], offsets: Int[Tensor, " experts"]
) -> None:
    """That rows, matrices and groups fit; without reading any tensor."""
    require(
        x.dim() == 2 and weight.dim() == 3,
        lambda: f"{name}: x {tuple(x.shape)}, weight {tuple(weight.shape)}: expected (rows, m) and (experts, n, m)",
    )
    require(
        x.shape[1] == weight.shape[2],
        lambda: f"{name}: the input {tuple(x.shape)} has {x.shape[1]} channels, the weight {weight.shape[2]}",
    )
    check_offsets(name, offsets)
    require_shape(name, "offsets", offsets, weight.shape[0])


def check_offsets(name: str, offsets: Int[Tensor, " experts"]) -> None:
    require_index(name, "offsets", offsets)


def groups(name: str, offsets: Int[Tensor, " experts"], rows: int) -> Iterator[tuple[int, int, int]]:
    """`(expert, start, end)` of every group that has rows. Reads the offsets, and checks them first."""
    ends = offsets.tolist()
    require(
        all(a <= b for a, b in itertools.pairwise([0, *ends])) and (ends or [0])[-1] == rows,
        lambda: f"{name}: offsets {ends[:8]}{'…' if len(ends) > 8 else ''} are not the ends of groups of {rows} rows",
    )
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, start, end
        start = end


def in_one_call(*matrices: Tensor) -> bool:
    """Whether PyTorch's grouped product serves: on CUDA, bfloat16, rows or columns contiguous and aligned to 16 bytes."""
    return all(
        t.is_cuda
        and t.dtype == torch.bfloat16
        and 1 in t.stride()[-2:]
        and all(s == 1 or s * t.element_size() % 16 == 0 for s in t.stride())
        and t.data_ptr() % 16 == 0
        and 0 not in t.shape
        for t in matrices
    )


# --- eager code ---------------------------------------------------------------------------------------------------------


def multiply(
    name: str, x: Float[Tensor, "S m"], weight: Float[Tensor, "experts n m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "S n"]:
    """`y_e = x_e W_eᵀ` in the dtype of x; of a weight in another dtype one expert at a time is cast."""
    if in_one_call(x, weight):
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets.to(torch.int32))
    y = x.new_empty(x.shape[0], weight.shape[1])
    for expert, start, end in groups(name, offsets, x.shape[0]):
        torch.mm(x[start:end], weight[expert].to(x.dtype).t(), out=y[start:end])
    return y


def _grouped_linear(
    x: Float[Tensor, "S m"], weight: Float[Tensor, "experts n m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "S n"]:
    name = "grouped_linear"
    check_grouped(name, x, weight, offsets)
    require_together(name, x, weight, offsets)
    require_floats(name, x=x, weight=weight)
    return multiply(name, x, weight, offsets)


def _grouped_linear_fake(
    x: Float[Tensor, "S m"], weight: Float[Tensor, "experts n m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "S n"]:
    check_grouped("grouped_linear", x, weight, offsets)
    return x.new_empty(x.shape[0], weight.shape[1])


def _grouped_linear_in_aten(
    x: Float[Tensor, "S m"], weight: Float[Tensor, "experts n m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "S n"]:
    rows = weight.to(x.dtype).index_select(0, expert_of_rows(offsets, x.shape[0]))
    return torch.matmul(rows, x.unsqueeze(-1)).squeeze(-1)


def _check_outer(g: Float[Tensor, "S n"], x: Float[Tensor, "S m"], offsets: Int[Tensor, " experts"]) -> None:
    name = "grouped_outer"
    require(g.dim() == 2 and x.dim() == 2, lambda: f"{name}: g and x are matrices, not {g.dim()}-D and {x.dim()}-D")
    require_shape(name, "g", g, x.shape[0], g.shape[1])
    require(g.dtype == x.dtype, lambda: f"{name}: g is {g.dtype}, x {x.dtype}; cast one")
    check_offsets(name, offsets)


def _grouped_outer(
    g: Float[Tensor, "S n"], x: Float[Tensor, "S m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "experts n m"]:
    _check_outer(g, x, offsets)
    require_together("grouped_outer", g, x, offsets)
    require_floats("grouped_outer", g=g, x=x)
    if in_one_call(g, x):
        found = torch.nn.functional.grouped_mm(g.t(), x, offs=offsets.to(torch.int32))
        empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0  # of which nothing is promised there
        return found.masked_fill_(empty.view(-1, 1, 1), 0)
    found = g.new_zeros(offsets.shape[0], g.shape[1], x.shape[1])
    for expert, start, end in groups("grouped_outer", offsets, x.shape[0]):
        torch.mm(g[start:end].t(), x[start:end], out=found[expert])
    return found


def _grouped_outer_fake(
    g: Float[Tensor, "S n"], x: Float[Tensor, "S m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "experts n m"]:
    _check_outer(g, x, offsets)
    return g.new_empty(offsets.shape[0], g.shape[1], x.shape[1])


def _grouped_outer_in_aten(
    g: Float[Tensor, "S n"], x: Float[Tensor, "S m"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "experts n m"]:
    member = expert_of_rows(offsets, x.shape[0]) == torch.arange(offsets.shape[0], device=x.device).unsqueeze(1)
    return torch.matmul((member.unsqueeze(-1) * g).transpose(1, 2), x)


def _check_sampled(
    a: Float[Tensor, "S p"], b: Float[Tensor, "S q"], index: Int[Tensor, " k"], offsets: Int[Tensor, " experts"]
) -> None:
    name = "grouped_sampled"
    require(a.dim() == 2 and b.dim() == 2, lambda: f"{name}: a and b are matrices, not {a.dim()}-D and {b.dim()}-D")
    require_shape(name, "b", b, a.shape[0], b.shape[1])
    require(a.dtype == b.dtype, lambda: f"{name}: a is {a.dtype}, b {b.dtype}; cast one")
    require_index(name, "index", index)
    check_offsets(name, offsets)


def _grouped_sampled(
    a: Float[Tensor, "S p"], b: Float[Tensor, "S q"], index: Int[Tensor, " k"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, " k"]:
    """`sampled_product` of each expert: no more than one expert's tiles are alive."""
    name = "grouped_sampled"
    _check_sampled(a, b, index, offsets)
    require_together(name, a, b, index, offsets)
    require_floats(name, a=a, b=b)
    size = a.shape[1] * b.shape[1]
    require_within(name, "index", index, offsets.shape[0] * size, "experts' products")
    order = None if bool((index[1:] >= index[:-1]).all()) else index.argsort()
    places = (index if order is None else index[order]).long()
    bounds = torch.searchsorted(places, torch.arange(offsets.shape[0] + 1, device=index.device) * size).tolist()
    found = a.new_zeros(index.shape)
    for expert, start, end in groups(name, offsets, a.shape[0]):
        first, last = bounds[expert], bounds[expert + 1]
        if last > first:
            own = places[first:last] - expert * size
            found[first:last] = ops.sampled_product(a[start:end], b[start:end], own)
    return found if order is None else torch.empty_like(found).index_copy(0, order, found)


def _grouped_sampled_fake(
    a: Float[Tensor, "S p"], b: Float[Tensor, "S q"], index: Int[Tensor, " k"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, " k"]:
    _check_sampled(a, b, index, offsets)
    return a.new_empty(index.shape)


def _grouped_sampled_in_aten(
    a: Float[Tensor, "S p"], b: Float[Tensor, "S q"], index: Int[Tensor, " k"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, " k"]:
    return _grouped_outer_in_aten(a, b, offsets).reshape(-1).index_select(0, index)


# --- autograd -----------------------------------------------------------------------------------------------------------


class _Saved(Context, Protocol):
    """dtype: of the weight, for its gradient."""

    dtype: torch.dtype


def _setup_linear(ctx: _Saved, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, weight, offsets = inputs
    need = ctx.needs_input_grad
    ctx.save_for_backward(x if need[1] else None, weight if need[0] else None, offsets)
    ctx.dtype = weight.dtype


def _backward_linear(ctx: _Saved, g: Float[Tensor, "S n"]) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = ops.grouped_linear(g, weight.transpose(1, 2), offsets) if need[0] else None
    return dx, ops.grouped_outer(g, x, offsets).to(ctx.dtype) if need[1] else None, None


def _setup_outer(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    g, x, offsets = inputs
    need = ctx.needs_input_grad
    ctx.save_for_backward(g if need[1] else None, x if need[0] else None, offsets)


def _backward_outer(ctx: Context, outer: Float[Tensor, "experts n m"]) -> tuple[Tensor | None, ...]:
    """Of `g_eᵀ x_e`: `x_e V_eᵀ` for g and `g_e V_e` for x, where V is the outer gradient."""
    g, x, offsets = ctx.saved_tensors
    need = ctx.needs_input_grad
    dg = ops.grouped_linear(x, outer, offsets) if need[0] else None
    return dg, ops.grouped_linear(g, outer.transpose(1, 2), offsets) if need[1] else None, None


def _setup_sampled(ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_sampled(ctx: Context, outer: Float[Tensor, " k"]) -> tuple[Tensor | None, ...]:
    """As of `grouped_outer`, V being zero beside the positions; it is dense, for once."""
    a, b, index, offsets = ctx.saved_tensors
    shape = (offsets.shape[0], a.shape[1], b.shape[1])
    dense = outer.new_zeros(shape[0] * shape[1] * shape[2]).index_add(0, index, outer).view(shape)
    need = ctx.needs_input_grad
    da = ops.grouped_linear(b, dense, offsets) if need[0] else None
    return da, ops.grouped_linear(a, dense.transpose(1, 2), offsets) if need[1] else None, None, None


LIBRARY.implement(
    "grouped_linear",
    kernel=_grouped_linear,
    fake=_grouped_linear_fake,
    aten=_grouped_linear_in_aten,
    backward=_backward_linear,
    setup=_setup_linear,
)
LIBRARY.implement(
    "grouped_outer",
    kernel=_grouped_outer,
    fake=_grouped_outer_fake,
    aten=_grouped_outer_in_aten,
    backward=_backward_outer,
    setup=_setup_outer,
)
LIBRARY.implement(
    "grouped_sampled",
    kernel=_grouped_sampled,
    fake=_grouped_sampled_fake,
    aten=_grouped_sampled_in_aten,
    backward=_backward_sampled,
    setup=_setup_sampled,
)
