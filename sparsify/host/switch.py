"""`set_adapter`: which adapter, mix or base a host computes with.

parked ◀──park── trained parts ──reset──▶ base ──fill──▶ an adapter over the same parts     goes on training
                                             └──add───▶ a mix, or another selection          for inference
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsify.adapters.adapter import Adapter
from sparsify.errors import AdapterError
from sparsify.host.mix import Mix, add, as_it_lies, check_mix, group_by_param, put_back, write_buffers
from sparsify.host.same_base import in_pieces
from sparsify.model.sharded import entries_of, take_back, whole, whole_parameters, write_whole

if TYPE_CHECKING:
    from sparsify.host.handle import Handle

#: where a parked adapter keeps its buffers
BUFFERS = "::buffers"


def set_adapter(handle: Handle, spec: str | Mapping[str, float] | Sequence[str] | None) -> Mix:
    """See `Handle.set_adapter`."""
    if isinstance(spec, list | tuple):
        if not all(isinstance(name, str) for name in spec) or not spec:
            raise AdapterError(f"set_adapter: expected names of adapters, got {spec!r}; None is the base")
        spec = dict.fromkeys(spec, 1.0)
    if spec is not None and not isinstance(spec, str | Mapping):
        raise AdapterError(f"set_adapter: expected a name, weights by name, or None, got {type(spec).__name__}")
    handle.need_unmerged("set_adapter")
    in_pieces(handle)
    if isinstance(spec, Mapping) and [w for w in spec.values() if w == 1 and not isinstance(w, bool)] == list(
        spec.values()
    ):
        spec = next(iter(spec)) if len(spec) == 1 else spec  # a mix of one, whole, is that adapter
    weights = {} if spec is None else {spec: 1.0} if isinstance(spec, str) else dict(spec)
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
            raise AdapterError(f"set_adapter: the weight of {name!r} must be a finite number, got {weight!r}")
    for part in handle.parts.values():
        handle.need_base(part, "set_adapter")
    chosen = {name: handle.get(name) for name in weights}
    single = (isinstance(spec, str) and not handle.serving) and (
        spec in handle.parked or is_active(handle, spec) or fits_parts(handle, chosen[spec])
    )
    if weights and not single:
        check_mix(handle, chosen)
        beside = [part for part in handle.parts.values() if part.takes]
        entries_of(handle.host, [p for part in beside for p in part.parameters()], "set_adapter")
    park(handle)
    reset_to_base(handle)
    handle.active = Mix({})
    if not weights:
        return allow_training(handle, False)
    if single:
        fill_parts(handle, str(spec), chosen[str(spec)])
        handle.active = Mix(weights, trainable=True)
        return allow_training(handle, True)
    conflicts = add(handle, chosen, weights)
    handle.active = Mix(weights, tuple(conflicts))
    return allow_training(handle, False)


def add_adapter(handle: Handle, name: str) -> None:
    """See `Handle.add_adapter`."""
    handle.need_unmerged("add_adapter")
    in_pieces(handle)
    active = handle.active.weights if handle.active.trainable else ()
    if not isinstance(name, str) or not name:
        raise AdapterError(
            f"add_adapter: expected a name, got {name!r}; what trains is the plan's, for other units compile another plan"
        )
    if name in {*handle.adapters, *handle.parked, *active}:
        raise AdapterError(
            f"add_adapter: {name!r} is taken; set_adapter({name!r}) makes it active, delete_adapter forgets it"
        )
    if not handle.parts and not handle.train:
        raise AdapterError("add_adapter: nothing trains in this model; compile it with a plan")
    for part in handle.parts.values():
        handle.need_base(part, "add_adapter")
    park(handle)
    reset_to_base(handle)
    handle.active = Mix({name: 1.0}, trainable=True)
    allow_training(handle, True)


def is_active(handle: Handle, name: str) -> bool:
    return handle.active.trainable and name in handle.active.weights


def park(handle: Handle) -> None:
    """Keep the trained values of the active adapter bit for bit."""
    if handle.active.trainable:
        name = next(iter(handle.active.weights))
        handle.parked[name] = {n: {"full": whole(handle.stored(n).detach()).clone()} for n in handle.train}
        handle.parked[name][BUFFERS] = handle.buffers.moved(handle.host)
        for param, part in handle.parts.items():
            with whole_parameters(part.module):
                handle.parked[name][param] = part.snapshot()


def reset_to_base(handle: Handle) -> None:
    """Every bit of the base is back in the stored weights and in the parts."""
    for part in handle.parts.values():
        part.unmix()
    take_back(handle.released.pop("mix", []))
    for param, axis, places, values in reversed(handle.backups):
        with whole_parameters(handle.module(param), keep=True):
            put_back(handle.stored(param).detach(), axis, places, values)
    handle.backups = []
    for part in handle.parts.values():
        with whole_parameters(part.module, keep=True):
            part.reset()
    for name, base in handle.base_full.items():
        write_whole(handle.stored(name), base)
    handle.buffers.reset(handle.host)


def allow_training(handle: Handle, on: bool) -> Mix:
    on = on and not handle.serving
    for part in handle.parts.values():
        for parameter in part.parameters():
            parameter.requires_grad_(on)
    for name in handle.train:
        handle.stored(name).requires_grad_(on)
    return handle.active


def fits_parts(handle: Handle, loaded: Adapter) -> bool:
    """Whether the adapter changes exactly what this model trains."""
    by_param = group_by_param(loaded, buffers=False)
    full = {p for p, deltas in by_param.items() if any(d.kind == "full" for d in deltas)}
    if set(by_param) - full != set(handle.parts) or full != set(handle.train):
        return False
    return all(part.fits(by_param[param]) for param, part in handle.parts.items())


def fill_parts(handle: Handle, name: str, loaded: Adapter) -> None:
    parked = handle.parked.pop(name, None)
    by_param = group_by_param(loaded)
    for param, part in handle.parts.items():
        with whole_parameters(part.module, keep=True):
            if parked is not None:
                part.restore(parked[param])
            else:
                part.fill(by_param[param])
    for n in handle.train:
        write_whole(handle.stored(n), parked[n]["full"] if parked is not None else as_it_lies(handle, by_param[n][0]))
    if parked is not None:
        handle.buffers.write(handle.host, parked[BUFFERS])
    else:
        write_buffers(handle, [(1.0, loaded)])
