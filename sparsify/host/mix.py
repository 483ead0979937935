"""Mixes of adapters over a host: their changes are added to what its weights hold, and what stood there is remembered.

{"a": .5, "b": .5}    W[places] ──▶ W[places] + .5 ΔA + .5 ΔB        the places of a and b alone are written, and kept in `backups`
what trained in full  W ──▶ base + Σ w (value − base)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.adapters.adapter import Adapter, Delta
from sparsify.adapters.delta_kinds import known_kind
from sparsify.console import printable
from sparsify.errors import AdapterError
from sparsify.host.moved_buffers import mix_buffer
from sparsify.methods.sparse_lowrank import current_index
from sparsify.model.sharded import back_to_pieces, release, whole_parameters, write_whole
from sparsify.modules.exact import changed, sum_dtype

if TYPE_CHECKING:
    from sparsify.host.handle import Handle


@printable
@dataclass(frozen=True)
class Conflict:
    """Two mixed adapters change the same channels of one weight; their changes add up there."""

    param: str
    adapters: tuple[str, ...]
    shared: int
    total: int
    kind: str = "column"

    def __str__(self) -> str:
        if self.kind == "whole":
            return f"{self.param}: {' and '.join(self.adapters)} meet everywhere"
        what = "entries" if self.kind == "sparse" else "channels"
        return f"{self.param}: {' and '.join(self.adapters)} share {self.shared} of {self.total} {what}"


@printable
@dataclass(frozen=True)
class Mix:
    """What `set_adapter` made active, and where mixed adapters overlap."""

    weights: dict[str, float]
    conflicts: tuple[Conflict, ...] = ()
    trainable: bool = False

    def __str__(self) -> str:
        text = " + ".join(f"{w:g}·{n}" for n, w in self.weights.items()) or "base (no adapter)"
        return text + "".join(f"\n  conflict {c}" for c in self.conflicts)


def check_mix(handle: Handle, chosen: Mapping[str, Adapter]) -> None:
    """A packed base has no dense weight to add to: there only changes over its own trained parts can be mixed."""
    for name, loaded in chosen.items():
        for param, deltas in group_by_param(loaded, buffers=False).items():
            if deltas[0].kind == "full" or not handle.is_packed(param):
                continue
            part = handle.parts.get(param)
            if part is None or not part.fits(deltas):
                raise AdapterError(
                    f"set_adapter: {name!r} changes other entries of {param} than this model trains, and the base is packed "
                    f"({handle.program.quantize[param]}); compile with the adapter's own plan, or without Quantize"
                )


def add(handle: Handle, chosen: Mapping[str, Adapter], weights: Mapping[str, float]) -> list[Conflict]:
    """Add weighted deltas to what the model computes with, remembering what stood there."""
    conflicts: list[Conflict] = []
    by_param: dict[str, list[tuple[str, Delta]]] = {}
    for name, loaded in chosen.items():
        for delta in loaded.deltas:
            if delta.kind != "buffer":
                by_param.setdefault(delta.param, []).append((name, delta))
    write_buffers(handle, [(weights[name], loaded) for name, loaded in chosen.items()])
    for param, members in by_param.items():
        if param in handle.base_full:
            found = mix_full(handle.base_full[param], [(weights[n], as_it_lies(handle, d)) for n, d in members])
            write_whole(handle.stored(param), found)
            continue
        with whole_parameters(handle.module(param), keep=True):
            add_to_weight(handle, param, [(n, weights[n], d) for n, d in members], conflicts)
    mix_beside(handle, {p: [(weights[n], d) for n, d in members] for p, members in by_param.items()})
    return conflicts


def mix_beside(handle: Handle, members: Mapping[str, Sequence[tuple[float, Delta]]]) -> None:
    """Deltas that parts take beside their weight, by other parameters than their own (of another rank): fully_shard lets go of those."""
    taken = {
        p: [(w, d) for w, d in weighted if d.kind in handle.parts[p].takes]
        for p, weighted in members.items()
        if p in handle.parts
    }
    taken = {p: weighted for p, weighted in taken.items() if weighted}
    before = {p: handle.parts[p].parameters() for p in taken}
    back_to_pieces(handle.host)
    for param, weighted in taken.items():
        handle.parts[param].mix_beside(weighted)
    left = [
        p for param, own in before.items() for p in own if all(p is not q for q in handle.parts[param].parameters())
    ]
    handle.released["mix"] = release(handle.host, left, "set_adapter")


def add_to_weight(
    handle: Handle, param: str, members: Sequence[tuple[str, float, Delta]], conflicts: list[Conflict]
) -> None:
    """What several adapters change in one weight, which is whole here: noted where they overlap, and added."""
    part = handle.parts.get(param)
    for kind in dict.fromkeys(d.kind for _, _, d in members):
        same = [(n, d) for n, _, d in members if d.kind == kind]
        if len(same) > 1 and kind != "lora":
            counts = torch.cat([d.channels for _, d in same]).unique(return_counts=True)[1]
            if int((counts > 1).sum()):
                names = tuple(n for n, _ in same)
                conflicts.append(Conflict(param, names, int((counts > 1).sum()), counts.numel(), kind))
    weighted = [(w, d) for _, w, d in members]
    if handle.is_packed(param):
        assert part is not None
        part.mix(weighted)
        return
    low = [(w, d) for w, d in weighted if d.kind == "lora"]
    others = [(w, d) for w, d in weighted if known_kind(d.kind) is not None]
    beside = part is not None and "lora" in part.takes
    for kind in ("column", "row", "sparse"):
        same_kind = [(w, d) for w, d in weighted if d.kind == kind]
        if same_kind:
            add_to(handle, param, same_kind)
    if low and not beside:
        add_dense(handle, param, low)
    if others:
        add_dense(handle, param, others)
    if part is not None:
        part.read_back()


def write_buffers(handle: Handle, members: Sequence[tuple[float, Adapter]]) -> None:
    """Set the buffers that the adapters moved; those of a mix are mixed (`sparsify.host.moved_buffers`)."""
    found = [(w, {d.param: d.values for d in a.deltas if d.kind == "buffer"}) for w, a in members]
    moved = {n: handle.layout(n).to_original(n.rpartition(".")[2], handle.buffers.base[n]) for _, t in found for n in t}
    mixed = {n: mix_buffer(base, [(w, t.get(n, base)) for w, t in found]) for n, base in moved.items()}
    handle.buffers.write(
        handle.host, {n: handle.layout(n).to_current(n.rpartition(".")[2], v) for n, v in mixed.items()}
    )


def add_to(handle: Handle, param: str, parts: list[tuple[float, Delta]]) -> None:
    """Add whole channels, or single entries, of one kind to a stored dense weight."""
    weight = handle.own(param)
    layout, leaf = handle.layout(param), param.rpartition(".")[2]
    first = parts[0][1]
    inner = sum_dtype(weight, *(d.values for _, d in parts))
    alone = first.exact if len(parts) == 1 and parts[0][0] == 1 else None
    channels = torch.cat([d.channels for _, d in parts]).unique()
    if first.kind == "sparse":
        total = torch.zeros(channels.numel(), dtype=inner)
        for scale, delta in parts:
            total.index_add_(
                0, torch.searchsorted(channels, delta.channels), delta.values.to(inner), alpha=float(scale)
            )
        places, current = current_index(handle.program, param, channels, weight.shape)
        order = torch.searchsorted(channels, current)
        total = total[order]
        exact = None if alone is None else alone[first.channels.argsort()][order]
        places, axis = places.long().to(weight.device), None
        old = weight.data.view(-1)[places]
        weight.detach().view(-1).index_copy_(0, places, changed(old, total, exact, weight.dtype))
    else:
        axis = first.axis
        held = (
            weight.data if first.values.dim() == weight.dim() else weight.data.view(weight.shape[0], -1)
        )  # of kernels
        others = [size for place, size in enumerate(held.shape) if place != axis]
        total = torch.zeros(channels.numel(), *others, dtype=inner)  # the channels first
        for scale, delta in parts:
            stored = delta.stored().to(inner)
            rows = torch.searchsorted(channels, delta.channels)
            total.index_add_(0, rows, stored.movedim(axis, 0), alpha=float(scale))
        exact = None
        if alone is not None:
            exact = alone.mT if first.transposed else alone
            exact = exact.movedim(axis, 0)[first.channels.argsort()]
        places = channels
        for move_axis, inverse in layout.inverses.get(leaf, []):
            places = inverse[places] if move_axis == axis else places
        for move_axis, index in layout.moves.get(leaf, []):
            if move_axis != axis:
                place = move_axis if move_axis > axis else move_axis + 1
                total = total.index_select(place, index)
                exact = None if exact is None else exact.index_select(place, index)
        places = places.to(weight.device)
        old = held.index_select(axis, places)
        total, exact = total.movedim(0, axis), None if exact is None else exact.movedim(0, axis)
        held.index_copy_(axis, places, changed(old, total, exact, weight.dtype))
    handle.backups.append((param, axis, places, old))


def add_dense(handle: Handle, param: str, parts: list[tuple[float, Delta]]) -> None:
    """Add low-rank products, or changes of registered kinds, to a stored dense weight that has none of their parts beside it."""
    weight, layout = handle.own(param), handle.layout(param)
    inner = sum_dtype(weight, *(d.values for _, d in parts))
    total = torch.zeros(tuple(weight.shape), dtype=inner)
    for scale, delta in parts:
        kind = known_kind(delta.kind)
        if kind is None:
            assert delta.a is not None
            change = float(scale) * delta.scale * (delta.values.to(inner) @ delta.a.to(inner))
        else:
            base = handle.base_original(param).detach().cpu().to(inner)
            base = base.t() if delta.transposed else base
            change = float(scale) * (kind.change(base, delta).to(inner) - base)
        total += (change.mT if delta.transposed else change).reshape(
            total.shape
        )  # of kernels, which it is flattened of
    total = layout.to_current(param.rpartition(".")[2], total).to(weight.device)
    handle.backups.append((param, -1, torch.empty(0), weight.data.clone()))
    weight.detach().copy_(changed(weight.data, total, None, weight.dtype))


def as_it_lies(handle: Handle, delta: Delta) -> Tensor:
    """The values of a parameter that trained in full, in the order in which the host has it."""
    return handle.layout(delta.param).to_current(delta.param.rpartition(".")[2], delta.values)


def mix_full(base: Tensor, members: Sequence[tuple[float, Tensor]]) -> Tensor:
    """A parameter that trained as a whole, in a mix: base + Σ w (value − base); one member of weight 1 is its value."""
    if len(members) == 1 and members[0][0] == 1:
        return members[0][1].to(base.device, base.dtype)
    inner = sum_dtype(base, *(v for _, v in members))
    wide = base.to(inner)
    change = torch.zeros_like(wide)
    for weight, value in members:
        change += weight * (value.to(base.device, inner) - wide)
    return (wide + change).to(base.dtype)


def put_back(tensor: Tensor, axis: int | None, places: Tensor, values: Tensor) -> None:
    """Undo one entry of `Handle.backups`: channels on an axis, flat entries (None), or everything (-1)."""
    if axis is None:
        tensor.view(-1).index_copy_(0, places, values)
    elif axis == -1:
        tensor.copy_(values)
    else:
        held = tensor if values.dim() == tensor.dim() else tensor.view(tensor.shape[0], -1)  # of kernels
        held.index_copy_(axis, places, values)


def group_by_param(loaded: Adapter, buffers: bool = True) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {}
    for delta in loaded.deltas:
        if buffers or delta.kind != "buffer":
            found.setdefault(delta.param, []).append(delta)
    return found
