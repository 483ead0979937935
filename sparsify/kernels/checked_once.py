"""Checks that read whole tensors, made once for as long as these tensors are what they were.

    packed tensors ──first call──▶ every index, count and end is checked ──▶ remembered by storage, view and version

A tensor counts as the same when its storage, place, shape, strides, type and version counter are. Inference tensors have no
version counter: they are checked in every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MOST = 20_000  # states that are remembered
remembered: dict[Hashable, list[StorageWeakRef]] = {}
Seen = tuple[weakref.ref[Tensor], int, int]  # a tensor object, its address and its version
objects: dict[Hashable, list[Seen | None]] = {}  # the same by Python objects, which is quicker where they live on


def state_of(tensor: Tensor | None) -> Hashable:
    """What a tensor is now, without its numbers; None for an inference tensor, whose numbers change unseen."""
    if tensor is None:
        return ()
    if tensor.is_inference():
        return None
    storage = tensor.untyped_storage()
    memory = (storage._cdata, storage.nbytes(), tensor.data_ptr())
    return (*memory, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor._version)


def checked_once(what: Hashable, tensors: Sequence[Tensor | None], check: Callable[[], object]) -> None:
    """Call `check`, which raises where something is wrong, unless it passed before for `what` and these tensors."""
    by_object = (what, *map(id, tensors))
    if unchanged(objects.get(by_object), tensors):
        return
    states = tuple(map(state_of, tensors))
    key = (what, states)
    if key not in remembered:
        check()
        if None in states:
            return
        if len(remembered) >= MOST:
            remembered.clear()
        # as long as a weak reference is held, no other storage gets this one's identity
        remembered[key] = [StorageWeakRef(t.untyped_storage()) for t in tensors if t is not None]
    if len(objects) >= MOST:
        objects.clear()
    objects[by_object] = [None if t is None else (weakref.ref(t), t.data_ptr(), t._version) for t in tensors]


def unchanged(seen: list[Seen | None] | None, tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are the very objects that were seen, where they were and not written to since."""
    if seen is None:
        return False
    for found, tensor in zip(seen, tensors, strict=True):
        if found is None or tensor is None:
            if found is not tensor:
                return False
        elif found[0]() is not tensor or found[1] != tensor.data_ptr() or found[2] != tensor._version:
            return False
    return True
