"""Fuse adapters: a weighted sum of what several changed, as one adapter that can be saved, loaded and served like any other.

0.5 · a (columns 3, 17) + 0.5 · b (columns 4, 17)  ──▶  columns 3, 4, 17        low-rank factors stand side by side, their ranks add up
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsify.adapters.adapter import Adapter, Delta
from sparsify.errors import AdapterError


def fuse(weighted: Sequence[tuple[float, Adapter]]) -> Adapter:
    """`Σ weight · change` over adapters of one base; sums in the widest dtype of each weight's changes.

    Raises AdapterError: adapters of different bases; parameters that trained in full, buffers and changes of registered methods, which
    are no sums of changes.
    """
    members: dict[tuple[str, str], list[tuple[float, Delta]]] = {}
    bases: dict[str, str] = {}
    for weight, adapter in weighted:
        for param, digest in adapter.bases.items():
            if bases.setdefault(param, digest) != digest:
                raise AdapterError(f"fuse: the adapters were trained on different bases: {param} differs")
        for delta in adapter.deltas:
            if delta.kind not in ("column", "row", "sparse", "lora"):
                raise AdapterError(
                    f"fuse: {delta.param} has a change of kind {delta.kind}, which is no sum of changes: mix with set_adapter, then "
                    "merge() and save the whole model"
                )
            members.setdefault((delta.param, delta.kind), []).append((weight, delta))
    info = dict(weighted[0][1].info) if weighted else {}
    return Adapter(tuple(summed(same) for same in members.values()), bases, info)


def summed(same: Sequence[tuple[float, Delta]]) -> Delta:
    """One delta for several of one weight and kind."""
    first = same[0][1]
    dtype = torch.float32
    for _, delta in same:
        dtype = torch.promote_types(dtype, delta.values.dtype)
    if first.kind == "lora":
        values = torch.cat([weight * d.scale * d.values.to(dtype) for weight, d in same], dim=1)
        factors = torch.cat([d.a.to(dtype) for _, d in same if d.a is not None])
        return Delta(first.param, "lora", first.channels, values, first.transposed, factors, 1.0)
    axis = 1 if first.kind == "column" else 0
    channels = torch.cat([d.channels for _, d in same]).unique()
    shape = list(first.values.shape)
    shape[axis] = channels.numel()
    total = torch.zeros(shape, dtype=dtype)
    for weight, delta in same:
        total.index_add_(
            axis, torch.searchsorted(channels, delta.channels), delta.values.to(dtype), alpha=float(weight)
        )
    return Delta(first.param, first.kind, channels, total, first.transposed)
