"""Keys and values of a native step, inside of the cache object that the user holds.

    DynamicCache.layers = [DynamicLayer, …]  ──adopt──▶ [NativeLayer, …] over one Store: (layer, keys | values, batch, heads, capacity, width)

A layer's `keys` and `values` are views of the store, made when somebody asks; so whoever reads, reorders, crops, repeats or copies the cache
does as ever. What is written to a layer from outside stays that layer's own, and is taken into the store before the next step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparsify.kernels.cpu import huge_pages
from sparsify.kernels.cpu.step.operations import Layer

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicCache

GROWTH = 256  # tokens; a store has room for a multiple of it


class Store:
    """Memory of a whole cache. length: tokens in it; layers: heads and width of each."""

    def __init__(self, layers: Sequence[Layer], batch: int, room: int) -> None:
        self.layers, self.batch, self.length = tuple(layers), batch, 0
        self.allocate(room)

    def allocate(self, room: int) -> None:
        self.capacity = -(-room // GROWTH) * GROWTH
        size = sum(2 * layer.heads * layer.width for layer in self.layers) * self.batch * self.capacity
        self.memory = huge_pages.zeros((size,), torch.float32)

    def grow(self, room: int) -> None:
        """Room for so many tokens; what is there is kept."""
        if room <= self.capacity:
            return
        before = [self.views(number) for number in range(len(self.layers))]
        self.allocate(max(room, 2 * self.capacity))
        for number, kept in enumerate(before):
            for new, old in zip(self.views(number), kept, strict=True):
                new.copy_(old)

    def views(self, number: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, heads, length, width) of a layer."""
        layer, length = self.layers[number], self.length if length is None else length
        each = layer.heads * layer.width * self.batch * self.capacity
        start = sum(2 * one.heads * one.width for one in self.layers[:number]) * self.batch * self.capacity
        shape = (self.batch, layer.heads, self.capacity, layer.width)
        keys, values = (self.memory[start + part * each : start + (part + 1) * each].view(shape) for part in (0, 1))
        return keys[:, :, :length], values[:, :, :length]


@functools.cache
def layer_class() -> type:
    """`NativeLayer`, made when transformers is there."""
    from transformers.cache_utils import DynamicLayer

    class NativeLayer(DynamicLayer):
        """A layer of a cache whose tensors lie in a store, or, once somebody has set them, are its own."""

        def __init__(self, store: Store, number: int) -> None:
            self.store: Store | None = store
            self.number = number
            self.own: list[torch.Tensor | None] = [None, None]
            self.is_initialized, self.dtype, self.device = True, torch.float32, torch.device("cpu")

        def get(self, which: int) -> torch.Tensor | None:
            return self.own[which] if self.store is None else self.store.views(self.number)[which]

        def leave(self) -> None:
            """Keep views of the store as one's own."""
            if self.store is not None:
                self.own = list(self.store.views(self.number))
                self.store = None

        def set(self, which: int, value: torch.Tensor | None) -> None:
            self.leave()
            self.own[which] = value

        keys = property(lambda self: self.get(0), lambda self, value: self.set(0, value))
        values = property(lambda self: self.get(1), lambda self, value: self.set(1, value))

        def get_seq_length(self) -> int:
            return super().get_seq_length() if self.store is None else self.store.length

        def __reduce_ex__(self, protocol: Any) -> Any:
            return rebuild, (), self.__dict__

    return NativeLayer


def rebuild() -> Any:
    cls = layer_class()
    return cls.__new__(cls)


def length_of(cache: DynamicCache, layers: Sequence[Layer]) -> int | str:
    """Tokens in a cache that a step can go on with; or why it cannot."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"a cache of class {type(cache).__name__}"
    if not cache.layers:
        return 0
    if len(cache.layers) != len(layers):
        return f"a cache of {len(cache.layers)} layers"
    kinds = {type(layer) for layer in cache.layers}
    known = {DynamicLayer, layer_class()}
    if kinds - known:
        return f"a cache layer of class {', '.join(sorted(kind.__name__ for kind in kinds - known))}"
    lengths = {layer.get_seq_length() for layer in cache.layers}
    return lengths.pop() if len(lengths) == 1 else "layers of different lengths"


def store_of(cache: DynamicCache, layers: Sequence[Layer], batch: int, length: int, room: int) -> Store | str:
    """The store of a cache, with room for so many tokens; made of what the cache holds if it has none. length: tokens in it."""
    first = cache.layers[0] if cache.layers else None
    store = getattr(first, "store", None)
    shared = store is not None and all(getattr(layer, "store", None) is store for layer in cache.layers)
    if shared and store is not None and store.batch == batch and store.layers == tuple(layers):
        store.grow(room)
        return store
    made = Store(layers, batch, room)
    made.length = length
    for number, layer in enumerate(cache.layers if length else ()):
        for new, old in zip(made.views(number), (layer.keys, layer.values), strict=True):
            if old is None or old.shape != new.shape or old.dtype != torch.float32 or old.device.type != "cpu":
                return f"keys of shape {None if old is None else tuple(old.shape)}, not {tuple(new.shape)} in float32"
            new.copy_(old)
    cache.layers = [layer_class()(made, number) for number in range(len(layers))]
    return made


__all__ = ["Store", "length_of", "store_of"]
