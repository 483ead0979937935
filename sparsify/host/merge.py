"""`merge` and `unmerge`: what is active as plain weights, and back bit for bit.

dense     W ──▶ W with the part folded in             the original is kept where it is written over
packed    W ──▶ pack(unpack(W) with the part)          moves by what `MergeNote` says
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.console import printable
from sparsify.errors import SparsifyError
from sparsify.formats import format_named, pack, unpack
from sparsify.methods.packed import QuantizedMixin
from sparsify.model.sharded import (
    back_to_pieces,
    entries_of,
    local,
    release,
    sharded_modules,
    take_back,
    whole_parameters,
)
from sparsify.modules.adapted import effective_weight, make_plain, write_folded
from sparsify.modules.layout import layout_of
from sparsify.program.capture import evaluating

if TYPE_CHECKING:
    from sparsify.host.handle import Handle


@printable
@dataclass(frozen=True)
class MergeNote:
    """What folding an adapter into packed weights did: it quantises again, so the result is not exact.

    weights: relative Frobenius change per weight. outputs: largest change of the captured example's outputs, relative to
    their largest entry; NaN where the example cannot be run.
    """

    weights: dict[str, float]
    outputs: float


def merge(handle: Handle) -> nn.Module:
    """See `Handle.merge`."""
    handle.need_unmerged("merge")
    check_leaving(handle, "merge")
    packed = [p for p in handle.parts if handle.is_packed(p)]
    formats = {p: m.format for p in packed if isinstance(m := handle.module(p), QuantizedMixin)}
    fixed = next((p for p, name in formats.items() if not format_named(name).packs_again), None)
    if fixed is not None:
        raise SparsifyError(
            f"merge: {fixed} came packed as {formats[fixed]}, and sparsify cannot pack a changed weight so: save_adapter "
            "keeps what trained beside the base exactly, and save_pretrained writes the dense model"
        )
    masked = [p for p, part in handle.parts.items() if part.fills_pruned and p in handle.program.masks]
    before = example_outputs(handle) if packed or masked else None
    moved: dict[str, float] = {}
    back_to_pieces(handle.host)  # the example left some of them whole
    leaving = [p for part in handle.parts.values() for p in part.parameters()]
    handle.released["merge"] = release(handle.host, leaving, "merge")
    for param, part in handle.parts.items():
        module = part.module
        if isinstance(module, QuantizedMixin):
            with whole_parameters(module):
                dense = effective_weight(module)
            exact = dense.float()
            if param in handle.program.masks:
                keep_mask(handle, param, dense := dense.clone())
            fresh = pack(dense, module.format)
            back = unpack(fresh, module.format, tuple(module.shape), dense.dtype)
            moved[param] = float((back.float() - exact).norm() / exact.norm().clamp_min(1e-30))
            handle.merge_backups[param] = [local(tensor).clone() for tensor in module.packed()]
            module.hold(fresh)
            part.detach()
            module.without_part()
            continue
        if part.overwrites_base:
            handle.merge_backups[param] = [local(module.weight.data).clone()]
        with whole_parameters(module, keep=True):
            write_folded(module)
            if param in masked:
                moved[param] = keep_mask(handle, param, module.weight)
        part.detach()
        for carrier in part.modules:
            make_plain(carrier)
            mark(carrier)
    handle.merged = True
    if packed or masked:
        handle.merge_note = MergeNote(moved, largest_move(before, example_outputs(handle)))
        back_to_pieces(handle.host)
        worst = max(moved.values())
        what = f"{len(packed)} packed weights were quantised again" if packed else ""
        what += " and " if packed and masked else ""
        what += f"{len(masked)} low-rank parts lost what fell on pruned entries" if masked else ""
        warnings.warn(
            f"merge: {what}; a weight moves by up to {worst:.2%} (Frobenius), the "
            f"example's outputs by {handle.merge_note.outputs:.2%}. save_adapter keeps base + delta exactly instead.",
            stacklevel=3,
        )
    return handle.host


def mark(module: nn.Module) -> None:
    """Bring the marker of a module's layout up to date."""
    layout = layout_of(module)
    if layout is not None:
        layout.mark(module)


def check_leaving(handle: Handle, verb: str) -> None:
    """Before trained parts leave a host in pieces: raise SparsifyError where fully_shard could not do without them."""
    back_to_pieces(handle.host)
    whole = set(sharded_modules(handle.host))
    alone = next((p for p, part in handle.parts.items() if not whole.isdisjoint(part.modules)), None)
    if alone is not None:
        raise SparsifyError(
            f"{verb}: fully_shard was called on {alone.rpartition('.')[0]} itself, whose class changes; call it on the block around"
        )
    entries_of(handle.host, [p for part in handle.parts.values() for p in part.parameters()], verb)


def keep_mask(handle: Handle, param: str, weight: Tensor) -> float:
    """Zero what a dense low-rank product put on pruned entries; returns the relative Frobenius change."""
    gone = ~handle.program.masks[param].to(weight.device)
    lost = float(weight.data[gone].float().norm() / weight.data.float().norm().clamp_min(1e-30))
    weight.data.masked_fill_(gone, 0)
    return lost


def example_outputs(handle: Handle) -> object:
    args, kwargs = handle.program.example
    with evaluating(handle.host), torch.no_grad():
        return handle.host(*args, **kwargs)


def unmerge(handle: Handle) -> nn.Module:
    """See `Handle.unmerge`."""
    if not handle.merged:
        raise SparsifyError("unmerge: nothing is merged")
    back_to_pieces(handle.host)
    for param, part in handle.parts.items():
        kept = handle.merge_backups.pop(param, None)
        if isinstance(part.module, QuantizedMixin):
            assert kept is not None
            part.module.hold(kept, pieces=True)
        elif kept is not None:
            local(part.module.weight.data).copy_(kept[0])
        part.attach()
        for carrier in part.modules:
            mark(carrier)
    take_back(handle.released.pop("merge", []))
    handle.merged = False
    return handle.host


def largest_move(before: object, after: object) -> float:
    """Largest change between two outputs, relative to the largest entry."""
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    moves = [
        float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1e-30))
        for a, b in pairs
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel()
    ]
    return max(moves, default=float("nan"))
