"""Keys and values of a native step, inside of the cache object that the user holds.

    DynamicCache.layers = [DynamicLayer, …]  ──▶ [NativeLayer, …] over one Store: layer, keys | values, batch, heads, capacity, width

A layer's `keys` and `values` are views of the store, made when somebody asks; so whoever reads, reorders, crops, repeats or copies the
cache does as ever. What is written to a layer from outside stays that layer's own, and is taken into the store before the next step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from sparsify.kernels.cpu import huge_pages
from sparsify.kernels.cpu.step.operations import Layer

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

    def views(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, heads, length, width) of a layer."""
        layer = self.layers[number]
        each = layer.heads * layer.width * self.batch * self.capacity
        start = sum(2 * one.heads * one.width for one in self.layers[:number]) * self.batch * self.capacity
        shape = (self.batch, layer.heads, self.capacity, layer.width)
        keys, values = (self.memory[start + part * each : start + (part + 1) * each].view(shape) for part in (0, 1))
        return keys[:, :, : self.length], values[:, :, : self.length]

    def fill(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Take a layer's last tokens; False where they are not (batch, heads, tokens, width) in float32, or not all that it will read."""
        layer = self.layers[number]
        count = min(self.length, layer.window - 1) if layer.window else self.length
        for new, old in zip(self.views(number), (keys, values), strict=True):
            fits = (
                old.dim() == 4
                and old.dtype == torch.float32
                and old.device.type == "cpu"
                and count <= old.shape[2] <= self.length
            )
            if not fits or (old.shape[0], old.shape[1], old.shape[3]) != (self.batch, layer.heads, layer.width):
                return False
            new[:, :, self.length - old.shape[2] :] = old
        return True


class InStore:
    """What makes a layer of transformers' cache one whose tensors lie in a store or, once somebody has set them, are its own."""

    sliding_window = 0
    record_past = False

    def __init__(self, store: Store, number: int) -> None:
        self.store: Store | None = store
        self.number = number
        self.own: list[torch.Tensor | None] = [None, None]
        self.tokens = 0
        self.is_initialized, self.dtype, self.device = True, torch.float32, torch.device("cpu")

    def get(self, which: int) -> torch.Tensor | None:
        if self.store is None:
            return self.own[which]
        first = max(0, self.store.length - self.sliding_window + 1) if self.sliding_window else 0
        return self.store.views(self.number)[which][:, :, first:]

    def leave(self) -> None:
        """Keep views of the store as one's own."""
        if self.store is not None:
            self.own, self.tokens = [self.get(0), self.get(1)], self.store.length
            self.store = None

    def set(self, which: int, value: torch.Tensor | None) -> None:
        self.leave()
        self.own[which] = value

    def count(self, value: int) -> None:
        self.leave()
        self.tokens = value

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.store is None else self.store.length  # type: ignore[misc]

    keys = property(lambda self: self.get(0), lambda self, value: self.set(0, value))
    values = property(lambda self: self.get(1), lambda self, value: self.set(1, value))
    cumulative_length = property(
        lambda self: self.tokens if self.store is None else self.store.length, lambda self, value: self.count(value)
    )

    def __copy__(self) -> Any:
        """A layer of its own: one store has one length."""
        made = rebuild(self.sliding_window > 0)
        made.__dict__.update(self.__dict__)
        made.leave()
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, (self.sliding_window > 0,), self.__dict__


@functools.cache
def layer_class(sliding: bool) -> type:
    """A `DynamicLayer`, or a `DynamicSlidingWindowLayer`, in a store; made when transformers is there."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    bases = (InStore, DynamicSlidingWindowLayer if sliding else DynamicLayer)
    return type("NativeSlidingWindowLayer" if sliding else "NativeLayer", bases, {"__doc__": InStore.__doc__})


def rebuild(sliding: bool) -> Any:
    return object.__new__(layer_class(sliding))


def make_layer(store: Store, number: int, sliding: bool) -> Any:
    """The layer of a cache that lies in a store."""
    made = layer_class(sliding)(store, number)
    if sliding:
        made.sliding_window = store.layers[number].window
        made._sliding_window_tensor = torch.tensor(made.sliding_window, dtype=torch.long, device="cpu")
    return made


def length_of(cache: Any, layers: Sequence[Layer]) -> int | str:
    """Tokens in a cache that a step can go on with; or why it cannot."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"a cache of class {type(cache).__name__}"
    if not cache.layers:
        return 0
    store = shared_store(cache)
    if store is not None and store.layers == tuple(layers):
        return store.length
    if len(cache.layers) != len(layers):
        return f"a cache of {len(cache.layers)} layers, not {len(layers)}"
    lengths: set[int] = set()
    held: list[Any] = cache.layers
    for layer, known in zip(held, layers, strict=True):
        if type(layer) in (DynamicSlidingWindowLayer, layer_class(True)):
            if layer.sliding_window != known.window or layer.record_past:
                return f"a cache layer that keeps {layer.sliding_window} tokens"
        elif type(layer) not in (DynamicLayer, layer_class(False)):
            return f"a cache layer of class {type(layer).__name__}"
        lengths.add(layer.get_seq_length())
    return lengths.pop() if len(lengths) == 1 else "layers of different lengths"


def shared_store(cache: Any) -> Store | None:
    """The one store in which all layers of a cache lie, if they do."""
    store = getattr(cache.layers[0], "store", None) if cache.layers else None
    layers = cache.layers
    if store is None or any(getattr(layer, "store", None) is not store or layer.record_past for layer in layers):
        return None
    if [layer.number for layer in layers] != list(range(len(layers))):
        return None
    return store if len(cache.layers) == len(store.layers) else None


def store_of(cache: Any, layers: Sequence[Layer], batch: int, length: int, room: int) -> Store | str:
    """The store of a cache, with room for so many tokens; made of what the cache holds if it has none. length: tokens in it."""
    store = shared_store(cache)
    if store is not None and store.batch == batch and store.layers == tuple(layers):
        store.grow(room)
        return store
    made = Store(layers, batch, room)
    made.length = length
    for number, layer in enumerate(cache.layers if length else ()):
        if torch.is_grad_enabled() and (layer.keys.requires_grad or layer.values.requires_grad):
            return "keys or values that need their gradient"
        if not made.fill(number, layer.keys, layer.values):
            return f"keys of shape {tuple(layer.keys.shape)}: not this batch, or not float32"
    sliding = [type(layer).__name__.endswith("SlidingWindowLayer") for layer in cache.layers] or [False] * len(layers)
    cache.layers[:] = [make_layer(made, number, slides) for number, slides in enumerate(sliding)]
    return made


__all__ = ["Store", "length_of", "store_of"]
