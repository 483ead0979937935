"""Linears of a serving host: their own forward, then what the adapters of the rows add.

nn.Linear, Conv1D, Quantized…  ──▶  the same class with `Served` before it: `isinstance`, names and state dicts go on
SparseLinear with act          ──▶  `ServedPacked`: where some row has an adapter, the product without its epilogue, the addend, then act
GatedLinear                         likewise: addends of gate and up, then act(gate) · up. Rows without one keep the fused kernel.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.kernels.cpu.operator import epilogue
from sparsify.library import under_transform
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.modules.rows_of_gated import Gated, RowsOfGated
from sparsify.ops.adapter_tables import KINDS
from sparsify.ops.dispatch import add_adapters

if TYPE_CHECKING:
    from sparsify.serving.store import Store

OPERATORS = {kind: getattr(torch.ops.sparsify, f"adapter_{kind}").default for kind in KINDS}


class Served(nn.Module if TYPE_CHECKING else object):
    """Mixin of a linear whose rows may each have an adapter. `served_by`: the store; `served_as`: the weight's number there."""

    served_by: Store
    served_as: int = -1

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        store = self.served_by
        route = store.routing.route
        if route is None:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        return store.add(self.served_as, route, y, x)


class ServedPacked(Served, SparseLinear if TYPE_CHECKING else object):
    """Mixin of a packed linear with an epilogue. `served_rows`: `(number, first row, rows)` of the weights that are rows of [gate; up]."""

    served_rows: tuple[tuple[int, int, int], ...] = ()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        store = self.served_by
        route = store.routing.route
        if route is None:
            return SparseLinear.forward(self, x, residual)
        compiling = torch.compiler.is_compiling()
        own = self.served_rows or ((self.served_as, 0, self.packed.rows),)
        own = tuple(part for part in own if compiling or route.kinds(part[0]))
        if not own:
            return SparseLinear.forward(self, x, residual)
        tensors = (self.masks, self.values, self.panel_ptr, self.scales, self.row_sums, self.bias)
        sizes = (self.packed.rows, self.packed.cols, self.packed.group)
        y = torch.ops.sparsify.packed_linear(x, *tensors, None, *sizes, "none", False, self.int8)
        for number, first, rows in own:
            if not self.gated:
                y = store.add(number, route, y, x)
                continue
            total = store.add(number, route, y.new_zeros((*y.shape[:-1], rows)), x)
            for side, start in ((0, 0), (1, self.out_features)):  # the kernel's rows alternate gate and up
                if first <= start < first + rows:
                    y[..., side::2] += total[..., start - first : start - first + self.out_features]
        return epilogue(y, self.activation, self.gated, residual)


@functools.cache
def served_class(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the addends: still an instance of `base`, by isinstance and by name."""

    def reduce(self: nn.Module, protocol: int) -> tuple[object, ...]:
        return rebuild_served, (base,), self.__dict__

    body = {"__reduce_ex__": reduce, "__doc__": base.__doc__, "__module__": base.__module__}
    if issubclass(base, SparseLinear):
        return type(base.__name__, (ServedPacked, base), body)
    return type(base.__name__, (Served, base), body)


def rebuild_served(base: type[nn.Module]) -> nn.Module:
    kind = served_class(base)
    return kind.__new__(kind)


def become_served(module: nn.Module, store: Store, number: int) -> None:
    """Let a module of a host that is ours alone add what adapters add, in place."""
    module.__class__ = served_class(type(module))
    module.__dict__["served_by"], module.__dict__["served_as"] = store, number


def become_gated(module: Gated, store: Store, host: nn.Module) -> None:
    """Let gate and up in one add what adapters add to either, before the activation."""
    parts = {id(m): m for m in host.modules() if isinstance(m, RowsOfGated) and m.whole is module}
    become_served(module, store, -1)
    module.__dict__["served_rows"] = tuple(
        (m.served_as, m.first, m.out_features) for m in parts.values() if isinstance(m, Served)
    )


def added(
    kind: str, y: Tensor, x: Tensor, values: Tensor, places: Tensor, table: Tensor, order: Tensor, offs: Tensor
) -> Tensor:
    """y plus the addends of one kind; written into y where nobody else can see it."""
    recorded = torch.is_grad_enabled() and (y.requires_grad or x.requires_grad)
    if torch.compiler.is_compiling() or recorded or type(y) is not Tensor or under_transform((y, x)):
        return OPERATORS[kind](y, x, values, places, table, order, offs)
    if y.is_contiguous() and add_adapters(kind, y, x, values, places, table, order, offs):
        return y
    return OPERATORS[kind](y, x, values, places, table, order, offs)


__all__ = ["Served", "added", "become_gated", "become_served", "served_class"]
