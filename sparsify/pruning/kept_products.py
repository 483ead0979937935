"""Products of weights that are pruned already, kept while their unit is run again and again.

    run for q k v ▏
    run for o     ▏ q k v (computed, kept)
    run for gate  ▏ q k v (kept)  o (computed, kept)          a unit is run once per group and once to go on; each of its products
    to go on      ▏ q k v o (kept)  gate up down (computed)   is computed once, as long as what is kept fits in `KEPT_BYTES`

A product is kept when its weight is final and every product of the unit before it was: then its input is final too, and the
same in every later run of the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from sparsify.pruning.collect import Watcher

KEPT_BYTES = 128 << 20
WEIGHT_OPERAND = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2, torch.ops.aten.linear.default: 1}


class KeptProducts(Watcher):
    """A mode that hands out a product again instead of computing it. params: of the unit, by name; final: which of them are pruned."""

    def __init__(self, params: Callable[[], Mapping[str, Tensor]], budget: int = KEPT_BYTES) -> None:
        super().__init__(params, lambda product: None)
        self.final: set[str] = set()
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.left = budget
        self.batch = self.place = 0
        self.clean = True

    @contextmanager
    def running(self, batch: int) -> Iterator[None]:
        """One run of the unit on calibration batch number `batch`."""
        self.refresh()  # a pruned weight is a new Parameter
        self.batch, self.place, self.clean = batch, 0, True
        with self:
            yield

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if any(found[0] not in self.final for found in map(self.owner, args) if found is not None):
            self.clean = False  # what comes after may depend on what is still to be pruned
        operand = WEIGHT_OPERAND.get(func)
        if operand is None or not self.clean or self.owner(args[operand]) is None:
            return func(*args, **(kwargs or {}))
        key = self.batch, self.place
        self.place += 1
        kept = self.outputs.get(key)
        if kept is not None:
            return kept.clone()  # a block may write to it
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.nbytes <= self.left:
            self.outputs[key] = result.clone()
            self.left -= result.nbytes
        return result
