"""Adapters of a host by name: what trained as an adapter, written and read, checked against the base that stands here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.adapters import adapter as files
from sparsify.adapters import peft_format
from sparsify.adapters.adapter import MOVED, Adapter, Delta
from sparsify.errors import AdapterError
from sparsify.files.hub import is_hub_name
from sparsify.files.kinds import refuse_two_adapters
from sparsify.files.ranks import on_first_rank
from sparsify.host.same_base import in_pieces
from sparsify.host.serving import check_folder
from sparsify.host.switch import BUFFERS
from sparsify.methods.part import Snapshot
from sparsify.model.linears import is_conv1d, owner_name
from sparsify.model.packed_experts import GroupedLinear, plain_names
from sparsify.model.sharded import back_to_pieces, class_name, whole, whole_parameters
from sparsify.plan import nearest
from sparsify.version import __version__

if TYPE_CHECKING:
    from sparsify.files.strict_json import Json
    from sparsify.host.handle import Handle

#: kinds of deltas that replace a tensor, and so depend on no base
WHOLE = ("full", "buffer")

DEFAULT = "default"


def adapter_from(handle: Handle, parked: Mapping[str, Snapshot] | None) -> Adapter:
    deltas: list[Delta] = []
    in_pieces(handle)
    for param, part in handle.parts.items():
        handle.need_base(part, "save_adapter")
        with whole_parameters(part.module):
            deltas += part.deltas(None if parked is None else parked[param])
    for name in handle.train:
        value = whole(handle.stored(name).detach()) if parked is None else parked[name]["full"]
        value = handle.layout(name).to_original(name.rpartition(".")[2], value)
        deltas.append(Delta(name, "full", torch.empty(0, dtype=torch.int64), value.cpu().clone()))
    moved = handle.buffers.moved(handle.host) if parked is None else parked[BUFFERS]
    for name, value in moved.items():
        value = handle.layout(name).to_original(name.rpartition(".")[2], value)
        deltas.append(Delta(name, "buffer", torch.empty(0, dtype=torch.int64), value.cpu().clone()))
    bases = {p: handle.base_hash(p) for p in dict.fromkeys(d.param for d in deltas if d.kind not in WHOLE)}
    return Adapter(tuple(deltas), bases, info(handle))


def info(handle: Handle) -> dict[str, Json]:
    packed = handle.program.quantize
    moved: list[Json] = [*sorted({move.param for move in handle.program.moves if move.param in packed})]
    return {
        "sparsify": __version__,
        "torch": torch.__version__,
        "model": class_name(handle.host),
        "plan": handle.plan.to_json(),
        **({MOVED: moved} if packed else {}),
    }


def get(handle: Handle, name: str) -> Adapter:
    """See `Handle.get`."""
    if handle.active.trainable and name in handle.active.weights:
        return handle.current()
    if name in handle.parked:
        return adapter_from(handle, handle.parked[name])
    if name in handle.adapters:
        return handle.adapters[name]
    known = sorted({*handle.adapters, *handle.parked, *(handle.active.weights if handle.active.trainable else ())})
    raise AdapterError(f"no adapter is called {name!r}{nearest(name, known)}")


def save_adapter(handle: Handle, directory: str | os.PathLike[str], name: str | None = None) -> Path:
    """See `Handle.save_adapter`."""
    if name is None:
        if not handle.active.trainable:
            raise AdapterError(f"save_adapter: {handle.active} is not one trained adapter; name the one to save")
        name = next(iter(handle.active.weights))
    adapter = handle.get(name)
    if not adapter.deltas:
        raise AdapterError(
            "save_adapter: this plan trains no adapter, so the file would be empty, and what the model itself learned would be "
            "lost: save the whole model (save_pretrained or state_dict(), or save_sparse after Prune)"
        )
    adapter = adapter.called(plain_names(handle.host))
    return write_once(handle, lambda: files.save(adapter, directory), directory)


def write_once(handle: Handle, write: Callable[[], Path], directory: str | os.PathLike[str]) -> Path:
    """Call `write`; of a sharded host only the first rank does, the others wait for it, and all raise when it fails."""
    if not back_to_pieces(handle.host):
        return write()
    on_first_rank(write)
    return Path(directory)


def load_adapter(
    handle: Handle, directory: str | os.PathLike[str], name: str = DEFAULT, *, strict: bool = True
) -> None:
    """See `Handle.load_adapter`."""
    handle.need_unmerged("load_adapter")
    where = str(directory)
    if isinstance(directory, str) and is_hub_name(directory) and not os.path.lexists(directory):
        directory = check_folder(directory)
    refuse_two_adapters(directory)
    foreign = peft_format.is_peft(directory)
    if foreign:
        loaded = peft_format.read(directory, handle.host, handle.shapes(), handle.dense_base)
    else:
        loaded = files.load(directory)
        loaded = loaded.called({plain: own for own, plain in plain_names(handle.host).items()})
    for delta in loaded.deltas:
        try:
            module = handle.module(delta.param)
            weight = getattr(module, delta.param.rpartition(".")[2])
        except AttributeError:
            raise AdapterError(f"{where}: the model has no parameter {delta.param!r}") from None
        if delta.kind == "buffer":
            if delta.param not in handle.buffers.base:
                raise AdapterError(
                    f"{where}: {delta.param} is a buffer there, which this model does not have or derives anew"
                )
            continue
        # packed experts as the user's module has them; what is no tensor at all is refused below
        packed = isinstance(weight, Tensor) and weight.dim() == 3 and not isinstance(module, GroupedLinear)
        if delta.kind != "full" and not packed and delta.transposed != is_conv1d(module):
            raise AdapterError(f"{where}: {delta.param} is stored in another orientation in this model")
        if delta.kind == "full" and delta.param not in handle.train and not handle.serving:
            hint = f"compile with Plan(train=[{owner_name(delta.param)!r}])"
            raise AdapterError(f"{where}: {delta.param} trained in full there; {hint}")
    strict = strict and not foreign
    touched = {d.param for d in loaded.deltas if d.kind not in WHOLE}
    shapes = handle.shapes() | {n: b.shape for n, b in handle.buffers.base.items()}
    in_pieces(handle)
    exact = {d.param for d in loaded.deltas if d.exact is not None}
    asked = touched if strict else exact
    hashes = {p: handle.base_hash(p) for p in sorted(asked) if p in shapes}
    files.check_fits(loaded, shapes, hashes, where, strict)
    other = {
        p for p in exact if hashes.get(p) != loaded.bases.get(p)
    }  # the values that were trained belong to their base
    loaded = replace(loaded, deltas=tuple(replace(d, exact=None) if d.param in other else d for d in loaded.deltas))
    if name in handle.active.weights:
        handle.set_adapter(None)
    if handle.serving:
        take_in_full(handle, [d.param for d in loaded.deltas if d.kind == "full"])
    handle.parked.pop(name, None)
    handle.adapters[name] = loaded


def take_in_full(handle: Handle, params: Iterable[str]) -> None:
    """Let adapters replace these parameters, which are the base's until then."""
    for param in params:
        if param not in handle.base_full:
            handle.base_full[param] = handle.own(param).detach().clone()
            handle.train = (*handle.train, param)
