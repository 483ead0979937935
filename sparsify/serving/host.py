"""`sparsify.serve`: a host of the user's class in which every row of a batch computes with an adapter of its own.

    host = sparsify.serve(model, adapters={"math": "runs/math", "law": "runs/law"}, slots=32, budget="2GiB")
    host.generate(**batch, adapter_names=["math", "law", "__base__"])
    host(**batch, adapter_names="math")

The base is shared with the model that was passed in and never written to. What an adapter changes is added behind each linear, per
row, from slots (`sparsify.serving.store`); switching publishes a table and edits no weight, so threads do not disturb each other.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sparsify.console import printable
from sparsify.errors import AdapterError, Refusal, SparsifyError, StateError
from sparsify.host.fuse_adapters import meetings
from sparsify.host.live_state import OnHost
from sparsify.host.mix import Conflict
from sparsify.host.native_forward import NativeForward
from sparsify.host.serving import check_folder, name_folders
from sparsify.model.fast_paths import close_fast_paths
from sparsify.model.module_tree import first_line
from sparsify.modules.rows_of_gated import Gated
from sparsify.planner.limits import size
from sparsify.program.capture import unwrap
from sparsify.serving.addends import Mix, read_adapter, read_image
from sparsify.serving.base_copy import check_source, copy_base
from sparsify.serving.check_rows import check_rows
from sparsify.serving.modules import become_gated, become_served
from sparsify.serving.names import BASE, check_name, check_names
from sparsify.serving.route import following
from sparsify.serving.slots import Slots
from sparsify.serving.store import Counts, Lease, SlotTimeout, Store
from sparsify.serving.targets import Base, find_targets

if TYPE_CHECKING:
    from sparsify.host.serving import AdapterPath, AdapterPaths
    from sparsify.program.values import Batch

Model = TypeVar("Model", bound=nn.Module)

#: arguments that have a row of the batch on their first axis, the first that is there counts
ROWS = ("input_ids", "inputs_embeds", "inputs", "input_features", "input_values", "pixel_values", "decoder_input_ids")
OUTSIDE = (
    "adapter_names= is looked up outside of a compiled graph, so that one graph serves every layout of names: call host.compile(), "
    "which does that; or, around what torch.compile(host) returned, with host.sparsify.using(names): …"
)
NO_NATIVE = "declined: it computes a token in one call, which has no place for what adapters add per row; PyTorch runs the layers"
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def serve(
    model: Model,
    adapters: AdapterPaths | None = None,
    *,
    folder: AdapterPath | None = None,
    slots: int = 32,
    budget: int | str = "2GiB",
    host_budget: int | str = "8GiB",
    timeout: float | None = 60.0,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    example: Batch | None = None,
    check: bool = True,
) -> Model:
    """A host that serves many adapters at once, one a row of the batch, and trains nothing.

    model: any `nn.Module` (a Hugging Face model for `generate`), dense or packed. It is not written to; the host shares its tensors.
    adapters: name → folder, ours (`save_adapter`) or PEFT's LoRA; or a list of folders, called by their last name. They are read when
        first named; `host.sparsify.add` adds more.
    folder: where adapters are found by name: `folder/<name>`. A name never leads out of it.
    slots: how many adapters are live at once. budget: bytes that they take on the model's device.
    host_budget: bytes of adapters that are kept, packed, in host memory beside that.
    timeout: seconds for which a request waits when all slots are held; None for ever.
    dtype: in which values are kept; that of the model's weights unless given. Sums are in fp32 at least.
    strict: refuse an adapter that was trained on another base (PEFT's files do not say on which).
    example: a batch of two rows, with which it is checked (five forwards) that every linear sees the rows one after another. Hugging
        Face models need none. Where the model cannot be run so, a batch takes one adapter for all its rows, and no mixture.
    check: False takes that on trust.

    Returns the host in eval mode. `host(…, adapter_names=)` and `host.generate(…, adapter_names=)` take one name a row, "__base__" for
    none, or one name for all; without it the base computes. `host.sparsify` is a `ServingHandle`.
    Raises SparsifyError for a model that cannot be served. An adapter that cannot be an addend per row (a parameter trained in full, a
    moved buffer, rows of an embedding, experts) raises AdapterError when it is named; others go on.
    """
    source = unwrap(model)
    if type(slots) is not int or not 1 <= slots <= 4096:
        raise SparsifyError(f"serve: slots={slots!r}: expected a number from 1 to 4096")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0):
        raise SparsifyError(f"serve: timeout={timeout!r}: expected seconds, or None")
    host, base = bare_host(source)
    if check:
        mixed, base.unchecked = check_rows(host, base.targets, example)
        base.declined |= mixed
    device = next((t.device for t in (*host.parameters(), *host.buffers())), torch.device("cpu"))
    dtype = values_dtype(base) if dtype is None else dtype
    if dtype not in VALUES:
        raise SparsifyError(f"serve: dtype={dtype}: expected one of {', '.join(str(d) for d in VALUES)}")
    places = check_dir(folder) if folder is not None else None
    try:
        tables = Slots(len(base.targets), slots, size(budget, "budget"), dtype, device)
    except (RuntimeError, MemoryError) as error:
        raise SparsifyError(f"serve: budget={budget!r} cannot be had on {device}: {first_line(error)}") from None
    read = partial(read_image, base, dtype=dtype, strict=strict)
    store = Store(read, tables, size(host_budget, "host_budget"), timeout, places, base.unchecked)
    for target in base.targets.values():
        for module in target.modules:
            become_served(module, store, target.number)
    for module in list(host.modules()):
        if isinstance(module, Gated):
            become_gated(module, store, host)
    close_fast_paths(host, [name.rpartition(".")[0] for t in base.targets.values() for name in t.names])
    handle = ServingHandle(host, base, store, has_native(source), strict)
    host.__dict__["sparsify"] = handle
    host.__dict__["forward"] = ServedForward(host)
    if callable(getattr(type(host), "generate", None)):
        host.__dict__["generate"] = ServedGenerate(host)
    host.__dict__["compile"] = ServedCompile(host)
    for module in host.modules():
        module.register_load_state_dict_pre_hook(refuse_state)
    for name, path in name_folders(adapters, None).items() if adapters else ():
        handle.add(name, path)
    return host  # type: ignore[return-value]


def bare_host(source: nn.Module) -> tuple[nn.Module, Base]:
    """A copy of the module tree over the same tensors, frozen and in eval mode, and the base as adapters see it."""
    handle = check_source(source)
    host = copy_base(source)
    if handle is None:
        return host, find_targets(host, {}, {})
    return host, find_targets(host, handle.program.quantize, handle.hashes)


def refuse_state(*_: object) -> None:
    """Before a module of a serving host loads anything: its tensors are the base's own."""
    raise StateError(
        "load_state_dict: a serving host shares its tensors with the model that it was made of, and writes to none: load the state into "
        "that model, then serve it"
    )


def has_native(source: nn.Module) -> bool:
    """Whether the model's tokens are computed by one native call, where it was passed in."""
    return isinstance(source.__dict__.get("forward"), NativeForward)


def values_dtype(base: Base) -> torch.dtype:
    """The dtype of most of the model's floating parameters."""
    counts: dict[torch.dtype, int] = {}
    for parameter in base.host.parameters():
        if parameter.dtype in VALUES:
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda d: counts[d], default=torch.float32)


def check_dir(folder: AdapterPath) -> Path:
    path = Path(folder)
    try:
        there = path.is_dir()
    except (OSError, ValueError):
        there = False
    if not there:
        raise AdapterError(f"serve: folder={os.fspath(folder)!r} is no folder on this machine")
    return path.absolute()


@printable
class ServingHandle:
    """`host.sparsify` of a serving host: adapters come and go, requests hold them while they run."""

    def __init__(self, host: nn.Module, base: Base, store: Store, native: bool = False, strict: bool = True) -> None:
        self.host, self.base, self.store, self.native, self.strict = host, base, store, native, strict

    @property
    def declined(self) -> tuple[Refusal, ...]:
        """What takes no addend, and why; an adapter that changes one of these is refused."""
        own = [Refusal(param, reason) for param, reason in self.base.declined.items()]
        if self.base.unchecked:
            own.append(Refusal("mixed batches", self.base.unchecked))
        return (*own, *([Refusal("native step", NO_NATIVE)] if self.native else []))

    # --- adapters ----------------------------------------------------------------------------------------------------------------

    def add(self, name: str, folder: AdapterPath | Mapping[str, float]) -> None:
        """Make an adapter known under a name. It is read when a request first names it.

        folder: where it lies; or weights of adapters that are known already (`{"math": 0.5, "law": 0.5}`), whose sum it is then, as
        `Handle.fuse_adapters` makes it: best where they share nothing (`overlap`, `S2FT(avoid=…)`).
        Raises AdapterError for a name that is taken or cannot be one, a folder that holds no adapter, and weights that are no numbers.
        """
        check_name(name)
        self.store.register(name, self.source(name, folder))

    def source(self, name: str, folder: AdapterPath | Mapping[str, float]) -> Path | Mix:
        """What is read for a name, wherever the process is by then. Raises AdapterError."""
        return self.mix(name, folder) if isinstance(folder, Mapping) else check_folder(folder).absolute()

    def replace(self, name: str, folder: AdapterPath | Mapping[str, float]) -> None:
        """Let a name mean another adapter, or what its folder holds by now. Read at once; where that fails, nothing changes.

        Requests that hold the old one end with it; those that wait get the new one. Raises AdapterError as `add` does, and for an adapter
        that cannot be served.
        """
        check_name(name)
        self.store.exchange(name, self.source(name, folder), taken=True)

    def mix(self, name: str, weights: Mapping[str, float]) -> Mix:
        """A weighted sum of adapters that are known here, to be served under `name`. Raises AdapterError for weights that are no finite
        numbers, and for members that are unknown or sums themselves."""
        members = []
        for member, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise AdapterError(f"add {name!r}: the weight of {member!r} must be a finite number, got {weight!r}")
            members.append((float(weight), self.folder_of(member)))
        if not members:
            raise AdapterError(f"add {name!r}: no adapter is named")
        return Mix(tuple(members))

    def folder_of(self, name: str) -> Path:
        """Where the files of an adapter lie. Raises AdapterError for unknown names, and for a sum of adapters, which has no files."""
        with self.store.changed:
            folder = self.store.find(name).folder
        if not isinstance(folder, Path):
            raise AdapterError(f"{name!r} is a sum of adapters itself; name those")
        return folder

    def overlap(self, first: str, second: str) -> tuple[Conflict, ...]:
        """Where two adapters change the same channels or entries of one weight; see `Handle.overlap`. Reads their files."""
        strict = self.strict
        read = [read_adapter(self.base, self.folder_of(name), strict) for name in (first, second)]
        return meetings((first, second), *read)

    def remove(self, name: str) -> None:
        """Forget a name. Requests that hold it end with it; who waits for it is refused. Files stay."""
        self.store.remove(name)

    @property
    def names(self) -> list[str]:
        """Names that may be asked for: those that were added, and those in the folder."""
        return self.store.names()

    def prefetch(self, *names: str) -> None:
        """Let the loader read adapters into host memory, without waiting. Raises AdapterError for unknown names."""
        with self.store.changed:
            for name in names:
                if name != BASE:
                    self.store.want(self.store.find(name))

    # --- requests ----------------------------------------------------------------------------------------------------------------

    def lease(self, names: str | Sequence[str], timeout: float | None = None, *, polite: bool = False) -> Lease:
        """Hold the slots of these adapters until `close()` (or the end of a `with` block), after waiting for them if need be.

        timeout: seconds, `serve`'s unless given. polite: of many requests that come all the time, so that an adapter which is always asked
        for does not keep its slot from others for ever.

        Raises AdapterError for names that are unknown or cannot be served, SlotTimeout when all slots are held for too long.
        """
        names = check_names(names)
        pending = self.store.ask(names, True, timeout, polite)
        assert pending is not None
        return Lease(self.store, names, pending)

    def try_lease(self, names: str | Sequence[str], *, polite: bool = False) -> Lease | None:
        """The same without waiting: None while an adapter is not read yet (the loader begins), or no slot is free for it."""
        names = check_names(names)
        pending = self.store.ask(names, False, None, polite)
        return None if pending is None else Lease(self.store, names, pending)

    @contextmanager
    def using(self, names: str | Sequence[str], timeout: float | None = None) -> Iterator[Lease]:
        """Inside the block, this thread's forwards of the host (of its submodules, of what `torch.compile` made of it) compute so.

        One name for all rows, or one a row. A batch may have a multiple of the rows that are named (beams next to each other).
        """
        with self.lease(names, timeout) as lease:
            route = self.store.route(lease.slots, [lease], packed=False)
            with following(self.store.routing, route):
                yield lease

    @contextmanager
    def using_slots(self, slots: Sequence[int] | Tensor, *leases: Lease) -> Iterator[None]:
        """The same for a batch that several requests share: slots of their leases, one a row; of a packed batch `(1, T)`, one a token.

        Raises AdapterError for a slot that no lease holds, and for leases that are closed.
        """
        with following(self.store.routing, self.store.route(slots, leases)):
            yield

    # --- looking -----------------------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> Counts:
        """Loads, evictions, waits and refusals since the host was made."""
        return self.store.counts

    def status(self) -> dict[str, int]:
        """Numbers for a monitor: slots and bytes that are taken, adapters known, in host memory, live and held, and `counts`."""
        store = self.store
        with store.changed:
            store.take_back()
            entries = store.everyone()
            return {
                "slots": store.slots.count,
                "live": sum(1 for e in entries if e.slot),
                "held": sum(1 for e in entries if e.held),
                "known": len(store.entries),
                "in_memory": sum(1 for e in entries if e.image is not None),
                "waiting": len(store.queue),
                "slot_bytes": store.slots.used,
                "slot_budget": store.slots.nbytes,
                "host_bytes": store.host_bytes,
                "host_budget": store.host_budget,
                **vars(store.counts),
            }

    @property
    def report(self) -> str:
        """What is served over what, as text."""
        now = self.status()
        packed = f", {len(self.base.quantize)} packed" if self.base.quantize else ""
        notes = [str(refusal) for refusal in self.declined if " " in refusal.where]
        lines = [
            f"serving {type(self.host).__name__}: {len(self.base.targets)} weights take addends{packed}",
            f"slots {now['live']} of {now['slots']} live, {now['held']} held; {now['slot_bytes']:,} of {now['slot_budget']:,} bytes",
            f"adapters {now['known']} known, {now['in_memory']} in host memory ({now['host_bytes']:,} bytes)",
            f"loads {now['loads']}, evictions {now['evictions']}, waits {now['waits']}, refusals {now['refusals']}",
            *notes,
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.report

    def __repr__(self) -> str:
        now = self.status()
        return f"<sparsify serving: {now['live']} of {now['slots']} slots live, {now['known']} adapters known>"

    def close(self) -> None:
        """Refuse further requests and end the loader. The host computes as the base from now on."""
        self.store.close()


def rows_of(arguments: Mapping[str, object]) -> int | None:
    """Rows of a batch, by the first argument that has them; None where none is a tensor."""
    for name in (*ROWS, *arguments):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    return None


def bound(
    function: Any, host: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Mapping[str, object]:
    """Arguments by name, as far as the signature says."""
    try:
        found = inspect.signature(function).bind_partial(host, *args, **kwargs).arguments
    except TypeError:
        return {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    return {n: v for n, v in found.items() if v is not host} | dict(kwargs)


class Named(OnHost):
    """A method that takes `adapter_names=` besides its own arguments."""

    def __call__(self, *args: object, adapter_names: str | Sequence[str] | None = None, **kwargs: object) -> object:
        if adapter_names is None:
            return self.of_class(self.host, *args, **kwargs)
        if torch.compiler.is_compiling():
            raise SparsifyError(OUTSIDE)
        handle: ServingHandle = self.host.__dict__["sparsify"]
        if isinstance(adapter_names, str):  # whatever becomes of the rows on the way
            with handle.using(adapter_names):
                return self.of_class(self.host, *args, **kwargs)
        with routed(handle, self.of_class, adapter_names, args, kwargs):
            return self.of_class(self.host, *args, **kwargs)


@contextmanager
def routed(
    handle: ServingHandle,
    function: Any,
    names: str | Sequence[str],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Iterator[None]:
    """The adapters of one call, held and followed while it runs. Raises AdapterError for another number of names than rows."""
    given = check_names(names, rows_of(bound(function, handle.host, args, kwargs)))
    if not given:
        yield  # an empty batch
        return
    with handle.using(given):
        yield


class ServedForward(Named):
    """`host.forward`, one adapter a row."""

    method = "forward"


class ServedGenerate(Named):
    """`host.generate`, one adapter a prompt; its beams and returned sequences have the same."""

    method = "generate"


class ServedCompile(OnHost):
    """`host.compile`: names are looked up before the compiled call, which sees tensors alone."""

    method = "compile"

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.of_class(self.host, *args, **kwargs)
        self.host._compiled_call_impl = CompiledNames(self.host, self.host._compiled_call_impl)  # type: ignore[assignment]


class CompiledNames:
    """What a host that was compiled in place calls."""

    def __init__(self, host: nn.Module, call: Any) -> None:
        self.host, self.call = host, call

    def __call__(self, *args: object, adapter_names: str | Sequence[str] | None = None, **kwargs: object) -> object:
        if adapter_names is None or torch.compiler.is_compiling():
            return self.call(*args, **kwargs)
        handle: ServingHandle = self.host.__dict__["sparsify"]
        with routed(handle, type(self.host).forward, adapter_names, args, kwargs):
            return self.call(*args, **kwargs)


__all__ = ["Lease", "ServingHandle", "SlotTimeout", "serve"]
