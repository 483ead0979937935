"""Adapters as addends beside a plain product, chosen per token: what the operators `adapter_…` share.

    y (*t, n) + Δ(slot of the token) applied to x (*t, m)        slot 0 is the base: no addend

All adapters that are live lie in two flat tensors, and a small table per module and kind says where, so that shapes never change:

    values (V,)     what was trained, in one floating type           places (P,) int32   channels, rows and columns of entries
    table (S, 3)    int64, of one module and kind:  where its values begin, how many channels (ranks, entries), where its places begin
    order (R,)      int64, rows of the batch sorted by slot          offs (S + 1,) int64: slot g has rows order[offs[g] : offs[g + 1]]

A batch has R rows of `T / R` tokens each, the tokens of a row next to each other (beams and returned sequences of one prompt are
its tokens, too): the same `order` and `offs` serve every layer and every step. A packed batch (1, T) has R = T rows.

What the kinds hold, and what of it is added, for one adapter (w = how many):

    columns   values (w, n), places (w)        x[:, places] @ values
    rows      values (w, m), places (w)        at outputs `places`: x @ valuesᵀ
    lowrank   values (w, m) then (w, n)        (x @ Aᵀ) @ B, the scale in B
    sparse    values (w), places (w) rows, then (w) columns, sorted by row
    bias      values (n), w = 1                values

Sums are in fp32, or in fp64 where x or values are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import OperatorError, PositionError
from sparsify.library import LIBRARY
from sparsify.ops.checks import require, require_floats, require_shape, require_together, shape_of
from sparsify.ops.dispatch import add_adapters
from sparsify.ops.shapes import flat

if TYPE_CHECKING:
    from jaxtyping import Int

KINDS = ("columns", "rows", "lowrank", "sparse", "bias")
SCHEMA = "(Tensor y, Tensor x, Tensor values, Tensor places, Tensor table, Tensor order, Tensor offs) -> Tensor"
#: `product(x, values, places, at, n)`: the addend (t, n) of one adapter; at: its row of the table
Product = Callable[[Tensor, Tensor, Tensor, tuple[int, int, int], int], Tensor]


def need_range(operator: str, name: str, start: int, count: int, size: int) -> None:
    if start < 0 or count < 0 or start + count > size:
        raise PositionError(f"{operator}: the table points to {name}[{start}:{start + count}] of {size}")


def need_places(operator: str, places: Int[Tensor, " w"], size: int, of: str) -> Int[Tensor, " w"]:
    """Places as int64, all of them in `[0, size)`."""
    if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < size):
        raise PositionError(f"{operator}: places reach outside of the {size} {of}")
    return places.long()


def check(
    operator: str, y: Tensor, x: Tensor, values: Tensor, places: Tensor, table: Tensor, order: Tensor, offs: Tensor
) -> None:
    """Raise OperatorError for tensors that do not fit together, by their shapes and types alone."""
    require_floats(operator, y=y, x=x, values=values)
    require_together(operator, y, x, values, places, table, order, offs)
    require(
        y.dim() > 0 and y.shape[:-1] == x.shape[:-1],
        lambda: f"{operator}: y is {shape_of(y)}, x is {shape_of(x)}; all but the last axis must agree",
    )
    for name, t, dim, dtype in (
        ("values", values, 1, values.dtype),
        ("places", places, 1, torch.int32),
        ("order", order, 1, torch.int64),
    ):
        require(
            t.dim() == dim and t.dtype == dtype and t.is_contiguous(),
            lambda name=name, t=t, dtype=dtype: (
                f"{operator}: {name} is {shape_of(t)}, expected {str(dtype).removeprefix('torch.')} in one dimension, contiguous"
            ),
        )
    require(
        table.dim() == 2 and table.dtype == offs.dtype == torch.int64,
        lambda: f"{operator}: table is {shape_of(table)}, offs {shape_of(offs)}, expected int64",
    )
    require_shape(operator, "table", table, table.shape[0], 3)
    require_shape(operator, "offs", offs, table.shape[0] + 1)


def segments(
    order: Int[Tensor, " R"], offs: Int[Tensor, " S1"], tokens: int, operator: str
) -> Iterator[tuple[int, Int[Tensor, " t"]]]:
    """`(slot, its tokens)` for every slot but 0 that has any. Raises OperatorError where tokens are no multiple of the rows."""
    rows = order.numel()
    if tokens == 0:
        return
    if rows == 0 or tokens % rows:
        raise OperatorError(
            f"{operator}: {tokens} tokens are no multiple of the {rows} rows that adapters are named for"
        )
    each = tokens // rows
    bounds = offs.tolist()
    if bounds[0] < 0 or bounds[-1] > rows or any(a > b for a, b in itertools.pairwise(bounds)):
        raise PositionError(f"{operator}: offs {bounds[:8]} … do not cut {rows} rows into slots")
    inside = torch.arange(each, device=order.device)
    for slot in range(1, len(bounds) - 1):
        if bounds[slot] < bounds[slot + 1]:
            own = need_places(operator, order[bounds[slot] : bounds[slot + 1]], rows, "rows")
            yield slot, (own[:, None] * each + inside).flatten()


def addend(
    operator: str,
    product: Product,
    x: Tensor,
    n: int,
    values: Tensor,
    places: Tensor,
    table: Tensor,
    order: Tensor,
    offs: Tensor,
) -> Tensor:
    """The sum of all addends, `(T, n)` for `x (T, m)`, in differentiable ATen, in the dtype of x; one product per slot."""
    total = x.new_zeros((x.shape[0], n))
    for slot, own in segments(order, offs, x.shape[0], operator):
        start, width, place = table[slot].tolist()
        if width:
            total = total.index_add(0, own, product(x[own], values, places, (start, width, place), n))
    return total


def sum_dtype(x: Tensor, values: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)


def implement(kind: str, product: Product) -> Callable[..., Tensor]:
    """Implement `sparsify::adapter_<kind>`, all of which differ in one product only. Returns the oracle.

    The oracle takes the operator's arguments and computes in fp64; what it returns has y's dtype only where that is fp64.
    """
    name = f"adapter_{kind}"

    def form(
        y: Tensor, x: Tensor, values: Tensor, places: Tensor, table: Tensor, order: Tensor, offs: Tensor
    ) -> Tensor:
        check(name, y, x, values, places, table, order, offs)
        inner = sum_dtype(x, values)
        found = addend(name, product, flat(x).to(inner), y.shape[-1], values.to(inner), places, table, order, offs)
        return (y.to(inner) + found.view(y.shape)).to(y.dtype)

    def kernel(
        y: Tensor, x: Tensor, values: Tensor, places: Tensor, table: Tensor, order: Tensor, offs: Tensor
    ) -> Tensor:
        check(name, y, x, values, places, table, order, offs)
        total = y.clone(memory_format=torch.contiguous_format)
        if add_adapters(kind, total, x, values, places, table, order, offs):
            return total
        return form(y, x, values, places, table, order, offs)

    def fake(
        y: Tensor, x: Tensor, values: Tensor, places: Tensor, table: Tensor, order: Tensor, offs: Tensor
    ) -> Tensor:
        check(name, y, x, values, places, table, order, offs)
        return torch.empty_like(y, memory_format=torch.contiguous_format)

    def oracle(
        y: Tensor, x: Tensor, values: Tensor, places: Tensor, table: Tensor, order: Tensor, offs: Tensor
    ) -> Tensor:
        return form(y.double(), x.double(), values.double(), places, table, order, offs)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.in_aten(name, form)
    torch.library.register_fake(f"sparsify::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, recorded(name, form), "Autograd", with_keyset=True)
    FORMS[kind] = form
    return oracle


FORMS: dict[str, Callable[..., Tensor]] = {}


def recorded(name: str, form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Where something wants a gradient, the same in ATen, whose derivatives are right; the operator itself has none."""

    def run(keyset: torch._C.DispatchKeySet, *args: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(t.requires_grad for t in args):
            return form(*args)
        op = getattr(torch.ops.sparsify, name).default
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return run


__all__ = ["FORMS", "KINDS", "SCHEMA", "implement", "need_places", "need_range"]
