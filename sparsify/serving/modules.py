"""Linears of a serving host: their own forward, then what the adapters of the rows add.

nn.Linear, Conv1D, Quantized…  ──▶  the same class with `Served` before it: `isinstance`, names and state dicts go on
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.library import under_transform
from sparsify.ops.adapter_tables import KINDS
from sparsify.ops.dispatch import add_adapters

if TYPE_CHECKING:
    from sparsify.serving.store import Store

OPERATORS = {kind: getattr(torch.ops.sparsify, f"adapter_{kind}").default for kind in KINDS}


class Served(nn.Module if TYPE_CHECKING else object):
    """Mixin of a linear whose rows may each have an adapter. `served_by`: the store; `served_as`: the weight's number there."""

    served_by: Store
    served_as: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        store = self.served_by
        route = store.routing.route
        if route is None:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        return store.add(self.served_as, route, y, x)


@functools.cache
def served_class(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the addends: still an instance of `base`, by isinstance and by name."""

    def reduce(self: nn.Module, protocol: int) -> tuple[object, ...]:
        return rebuild_served, (base,), self.__dict__

    body = {"__reduce_ex__": reduce, "__doc__": base.__doc__, "__module__": base.__module__}
    return type(base.__name__, (Served, base), body)


def rebuild_served(base: type[nn.Module]) -> nn.Module:
    kind = served_class(base)
    return kind.__new__(kind)


def become_served(module: nn.Module, store: Store, number: int) -> None:
    """Let a module of a host that is ours alone add what adapters add, in place."""
    module.__class__ = served_class(type(module))
    module.__dict__["served_by"], module.__dict__["served_as"] = store, number


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


__all__ = ["Served", "added", "become_served", "served_class"]
