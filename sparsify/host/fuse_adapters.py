"""What several adapters share, and their weighted sum as one that can be saved and served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from sparsify.adapters.adapter import Adapter
from sparsify.adapters.fuse import fuse
from sparsify.errors import AdapterError
from sparsify.host.mix import Conflict, group_by_param

if TYPE_CHECKING:
    from sparsify.host.handle import Handle


def fuse_adapters(handle: Handle, weights: Mapping[str, float], name: str) -> Adapter:
    """See `Handle.fuse_adapters`."""
    active = handle.active.weights if handle.active.trainable else ()
    if name in {*handle.adapters, *handle.parked, *active} or not weights:
        raise AdapterError(f"fuse_adapters: {name!r} is taken" if weights else "fuse_adapters: no adapter is named")
    handle.adapters[name] = fuse([(float(weight), handle.get(member)) for member, weight in weights.items()])
    return handle.adapters[name]


def overlap(handle: Handle, first: str, second: str) -> tuple[Conflict, ...]:
    """See `Handle.overlap`."""
    return meetings((first, second), handle.get(first), handle.get(second))


def meetings(names: tuple[str, str], first: Adapter, second: Adapter) -> tuple[Conflict, ...]:
    """Where two adapters change the same channels or entries of one weight. names: what they are called."""
    mine, other = (group_by_param(adapter, buffers=False) for adapter in (first, second))
    found = []
    for param in mine:
        kinds = ({d.kind for d in mine[param]}, {d.kind for d in other.get(param, [])})
        if kinds[1] and (kinds[0] != kinds[1] or kinds[0] - {"column", "row", "sparse"} or len(kinds[0]) > 1):
            found.append(Conflict(param, names, 1, 1, "whole"))
            continue
        for a, b in zip(mine[param], other.get(param, []), strict=False):
            counts = torch.cat([a.channels, b.channels]).unique(return_counts=True)[1]
            if bool((counts > 1).any()):
                found.append(Conflict(param, names, int((counts > 1).sum()), counts.numel(), a.kind))
    return tuple(found)
