"""`model.sparsify`: what a user does with a compiled model besides training it."""

from __future__ import annotations

import copy
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.adapters import adapter as files
from sparsify.adapters import peft_export, peft_format
from sparsify.adapters.adapter import Adapter, Delta
from sparsify.adapters.delta_kinds import known_kind
from sparsify.console import printable
from sparsify.errors import AdapterError, SparsifyError
from sparsify.files.atomic import check_target, reported
from sparsify.files.kinds import refuse_two_adapters
from sparsify.files.ranks import on_first_rank
from sparsify.formats import format_named, pack, unpack
from sparsify.host.anchors import Anchor, anchors_of
from sparsify.host.install import save_again
from sparsify.host.live_state import LoadHook, OnHost, RootHook, SaveHook, Unshare
from sparsify.host.live_state import original as in_original_names
from sparsify.host.moved_buffers import Buffers, mix_buffer
from sparsify.host.switch_lock import EnterForward, LeaveForward, SwitchLock, guard
from sparsify.methods.packed import QuantizedMixin
from sparsify.methods.part import LivePart, Snapshot
from sparsify.methods.sparse_lowrank import LowRankPart, activate_support, current_index, flat_places
from sparsify.model.fast_paths import open_fast_paths
from sparsify.model.linears import is_conv1d, owner_name
from sparsify.model.module_tree import copy_module_tree
from sparsify.model.packed_experts import GroupedLinear, plain_names, renamed, write_back_experts
from sparsify.model.sharded import back_to_pieces, class_name, refuse_sharded, whole, whole_parameters, write_whole
from sparsify.modules.adapted import AdaptedMixin, effective_weight, make_plain, take_leaves, write_folded
from sparsify.modules.exact import changed, sum_dtype
from sparsify.modules.layout import MARKER, Layout, layout_of
from sparsify.modules.masked import MaskedModule, bits_name, masked_parameters
from sparsify.plan import Plan, nearest
from sparsify.program import Program
from sparsify.program.capture import evaluating
from sparsify.show.parameter_count import count_parameters
from sparsify.show.report import Report, make_report
from sparsify.version import __version__

T = TypeVar("T")

DEFAULT = "default"
#: kinds of deltas that replace a tensor, and so depend on no base
WHOLE = ("full", "buffer")
#: where a parked adapter keeps its buffers
BUFFERS = "::buffers"


def reads(method: Callable[..., T]) -> Callable[..., T]:
    """A verb that looks at the host: it is the one that was compiled, and nobody switches meanwhile."""

    @functools.wraps(method)
    def guarded(self: Handle, *args: Any, **kwargs: Any) -> T:
        with self.lock.reading():
            self.check(method.__name__)
            return method(self, *args, **kwargs)

    return guarded


def writes(method: Callable[..., T]) -> Callable[..., T]:
    """A verb that changes what the host computes with: no forward runs meanwhile."""

    @functools.wraps(method)
    def guarded(self: Handle, *args: Any, **kwargs: Any) -> T:
        with self.lock.writing(method.__name__, self.host):
            self.check(method.__name__)
            return method(self, *args, **kwargs)

    return guarded


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


@printable
@dataclass(frozen=True)
class MergeNote:
    """What folding an adapter into packed weights did: it quantises again, so the result is not exact.

    weights: relative Frobenius change per weight. outputs: largest change of the captured example's outputs, relative to
    their largest entry; NaN where the example cannot be run.
    """

    weights: dict[str, float]
    outputs: float


@printable
@dataclass
class Handle:
    """State of one compiled host. Made by `sparsify.compile`; reach it as `model.sparsify`."""

    host: nn.Module
    program: Program
    plan: Plan
    layouts: dict[str, Layout]
    train: tuple[str, ...]
    flags: dict[str, bool]
    hashes: dict[str, str] = field(default_factory=dict)
    cpu: Any = None
    parts: dict[str, LivePart] = field(default_factory=dict)
    base_full: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: Mix = field(default_factory=lambda: Mix({DEFAULT: 1.0}, trainable=True))
    merged: bool = False
    merge_note: MergeNote | None = None
    parked: dict[str, dict[str, Snapshot]] = field(default_factory=dict)
    backups: list[tuple[str, int | None, Tensor, Tensor]] = field(default_factory=list)
    merge_backups: dict[str, list[Tensor]] = field(default_factory=dict)
    owned: set[str] = field(default_factory=set)
    serving: bool = False  # made by `sparsify.load`: nothing trains, and adapters bring what trained in full with them
    buffers: Buffers = field(init=False)
    anchors: dict[str, Anchor] = field(init=False)
    lock: SwitchLock = field(init=False)

    def __post_init__(self) -> None:
        for part in self.program.parts:
            layout = self.layout(part.param)
            live = self.parts[part.param] = part.live(self.module(part.param), layout, self.plan.seed)
            if isinstance(live, LowRankPart) and live.part.count:
                layout.adopt = Adopt(self, part.param)
            if live.keeps_base or self.is_packed(part.param):
                layout.base_loaded = OtherBase(live)
        for name in self.train:
            self.base_full[name] = self.stored(name).detach().clone()
        self.buffers = Buffers.of(self.host)
        touched = [*self.parts, *self.train, *(m.param for m in self.program.moves), *self.program.quantize]
        self.anchors = anchors_of(self.host, touched)
        self.lock, hooks = guard(self.host)
        self.host.__dict__.setdefault("_sparsify_hooks", []).extend(hooks)

    def reading(self) -> AbstractContextManager[None]:
        """Hold off switches by other threads while the block runs: `with model.sparsify.reading(): …`.

        Forwards, `generate` and `model.compile()`d calls do so by themselves; several calls that must see one adapter, calls of a
        submodule, of `forward` itself or of what `torch.compile(model)` returned need it. A switch inside the block raises.
        """
        return self.lock.reading()

    def check(self, verb: str) -> None:
        """Raise SparsifyError where the host is not the one that was compiled any more: a module or a tensor was replaced."""
        for path, anchor in self.anchors.items():
            anchor.check(self.host, path, verb, self.merged)

    # --- looking ---------------------------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What was found, chosen and declined and why; trainable parameters; bytes saved for backward."""
        self.check("report")
        return make_report(self.program, self.plan, self.host, self.cpu)

    def draw_pruning(self, path: str | os.PathLike[str]) -> None:
        """Draw zeros and error of every pruned weight into an SVG file. Raises SparsifyError when nothing was pruned."""
        if not self.program.pruned:
            raise SparsifyError("draw_pruning: this plan pruned nothing; add a Prune rule")
        from sparsify.show.pruned_layers import write_svg

        write_svg(self.program.pruned, path)

    def count_parameters(self) -> tuple[int, int]:
        """`(trainable, all)`; parts that stand for entries of their weight do not add to `all`, packed weights count as dense, and
        entries that a mask keeps at zero do not train."""
        self.check("count_parameters")
        found = count_parameters(self.host)
        return found.trainable, found.total

    def print_trainable_parameters(self) -> None:
        """The line that PEFT's users know."""
        trainable, total = self.count_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    def param_groups(self, sparse_lr: float, lora_lr: float, lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups with separate learning rates: RoSA's sparse values, its low-rank factors, and everything else.

        The paper uses 2e-4 and 7e-4. `lr` for the rest (slices, parameters that train in full) defaults to `sparse_lr`.
        """
        self.check("param_groups")
        named: dict[str, list[nn.Parameter]] = {"sparse": [], "lora": [], "rest": []}
        for name, parameter in self.host.named_parameters():
            if parameter.requires_grad:
                rates = getattr(self.module(name), "rates", {})
                named[rates.get(name.rpartition(".")[2], "rest")].append(parameter)
        rates = {"sparse": sparse_lr, "lora": lora_lr, "rest": sparse_lr if lr is None else lr}
        return [{"params": ps, "lr": rates[g], "name": g} for g, ps in named.items() if ps]

    def __repr__(self) -> str:
        return f"<sparsify: {len(self.parts)} trained parts, active {self.active}{', merged' if self.merged else ''}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        clone = copy.copy(self)
        memo[id(self)] = clone
        for name in (
            "host",
            "layouts",
            "parts",
            "base_full",
            "adapters",
            "parked",
            "backups",
            "merge_backups",
            "owned",
            "buffers",
            "anchors",
            "lock",
        ):
            setattr(clone, name, copy.deepcopy(getattr(self, name), memo))
        clone.program = copy.copy(self.program)
        clone.program.host = clone.host
        return clone

    # --- tensors ---------------------------------------------------------------------------------------------------------

    def module(self, param: str) -> Any:
        return self.host.get_submodule(owner_name(param))

    def stored(self, param: str) -> nn.Parameter:
        return getattr(self.module(param), param.rpartition(".")[2])

    def own(self, param: str) -> nn.Parameter:
        """The stored weight, in memory of its own: what the plan did not change is shared with the user's model until now."""
        weight = self.stored(param)
        if param not in self.program.tensors and param not in self.owned:
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
            self.owned.add(param)
        return weight

    def layout(self, param: str) -> Layout:
        return self.layouts.get(owner_name(param)) or Layout()

    @property
    def dequantised(self) -> bool:
        """Whether `sparsify.load` replaced the base by what a packed one stands for (their hashes are kept)."""
        return self.serving and bool(self.hashes)

    def is_packed(self, param: str) -> bool:
        return isinstance(self.module(param), QuantizedMixin)

    def shapes(self) -> dict[str, torch.Size]:
        """Stored shape of every parameter, packed weights included."""
        added = {id(p) for part in self.parts.values() for p in part.parameters()}
        found = {n: p.shape for n, p in self.host.named_parameters() if id(p) not in added}
        return found | {p: self.module(p).shape for p in self.program.quantize}

    def base_original(self, param: str) -> Tensor:
        """A copy of the base value of a dense weight in original coordinates, whatever is active."""
        tensor = whole(self.stored(param).detach()).clone()
        for name, axis, places, values in reversed(self.backups):
            if name == param:
                put_back(tensor, axis, places, values)
        if param in self.parts:
            self.parts[param].restore_base(tensor)
        if param in self.base_full:
            tensor.copy_(self.base_full[param])
        return self.layout(param).to_original(param.rpartition(".")[2], tensor)

    def dense_base(self, param: str) -> Tensor:
        """`base_original`, which a packed weight does not have."""
        if self.is_packed(param):
            raise AdapterError(
                f"{param} is packed ({self.program.quantize[param]}), and what it was before is not kept"
            )
        return self.base_original(param)

    def base_hash(self, param: str) -> str:
        """Hash of the base value; of a packed weight the one recorded before packing."""
        return self.hashes[param] if param in self.hashes else files.tensor_hash(self.base_original(param))

    # --- adapters --------------------------------------------------------------------------------------------------------

    @reads
    def current(self) -> Adapter:
        """The trained parts as an adapter, in original coordinates."""
        return self.adapter_from(None)

    def adapter_from(self, parked: Mapping[str, Snapshot] | None) -> Adapter:
        deltas: list[Delta] = []
        back_to_pieces(self.host)
        for param, part in self.parts.items():
            self.need_base(part, "save_adapter")
            with whole_parameters(part.module):
                deltas += part.deltas(None if parked is None else parked[param])
        for name in self.train:
            value = whole(self.stored(name).detach()) if parked is None else parked[name]["full"]
            deltas.append(Delta(name, "full", torch.empty(0, dtype=torch.int64), value.cpu().clone()))
        moved = self.buffers.moved(self.host) if parked is None else parked[BUFFERS]
        for name, value in moved.items():
            value = self.layout(name).to_original(name.rpartition(".")[2], value)
            deltas.append(Delta(name, "buffer", torch.empty(0, dtype=torch.int64), value.cpu().clone()))
        bases = {p: self.base_hash(p) for p in dict.fromkeys(d.param for d in deltas if d.kind not in WHOLE)}
        return Adapter(tuple(deltas), bases, self.info())

    def info(self) -> dict[str, Any]:
        return {
            "sparsify": __version__,
            "torch": torch.__version__,
            "model": class_name(self.host),
            "plan": self.plan.to_json(),
        }

    @reads
    def get(self, name: str) -> Adapter:
        """An adapter by name, trained here or loaded."""
        if self.active.trainable and name in self.active.weights:
            return self.current()
        if name in self.parked:
            return self.adapter_from(self.parked[name])
        if name in self.adapters:
            return self.adapters[name]
        known = sorted({*self.adapters, *self.parked, *(self.active.weights if self.active.trainable else ())})
        raise AdapterError(f"no adapter is called {name!r}{nearest(name, known)}")

    @reads
    def save_adapter(self, directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write an adapter (the active one unless named) as safetensors + JSON, in original coordinates, atomically.

        Under `fully_shard` every rank must call it: the parts are gathered, and the first rank writes.
        """
        if name is None:
            if not self.active.trainable:
                raise AdapterError(f"save_adapter: {self.active} is not one trained adapter; name the one to save")
            name = next(iter(self.active.weights))
        adapter = self.get(name)
        if not adapter.deltas:
            raise AdapterError(
                "save_adapter: this plan trains no adapter, so the file would be empty, and what the model itself learned would be "
                "lost: save the whole model (save_pretrained or state_dict(), or save_sparse after Prune)"
            )
        adapter = adapter.called(plain_names(self.host))
        return self.write_once(lambda: files.save(adapter, directory), directory)

    def write_once(self, write: Callable[[], Path], directory: str | os.PathLike[str]) -> Path:
        """Call `write`; of a sharded host only the first rank does, the others wait for it, and all raise when it fails."""
        if not back_to_pieces(self.host):
            return write()
        on_first_rank(write)
        return Path(directory)

    @writes
    def load_adapter(self, directory: str | os.PathLike[str], name: str = DEFAULT, *, strict: bool = True) -> None:
        """Read an adapter (ours, or a PEFT LoRA directory) and keep it under `name`; `set_adapter(name)` makes it active.

        strict: refuse an adapter that was trained on another base (PEFT's files do not say). Nothing of the model is touched.
        """
        self.need_unmerged("load_adapter")
        where = str(directory)
        refuse_two_adapters(directory)
        foreign = peft_format.is_peft(directory)
        if foreign:
            loaded = peft_format.read(directory, self.host, self.shapes(), self.dense_base)
        else:
            loaded = files.load(directory)
            loaded = loaded.called({plain: own for own, plain in plain_names(self.host).items()})
        for delta in loaded.deltas:
            try:
                module = self.module(delta.param)
                getattr(module, delta.param.rpartition(".")[2])
            except AttributeError:
                raise AdapterError(f"{where}: the model has no parameter {delta.param!r}") from None
            if delta.kind == "buffer":
                if delta.param not in self.buffers.base:
                    raise AdapterError(
                        f"{where}: {delta.param} is a buffer there, which this model does not have or derives anew"
                    )
                continue
            packed = self.stored(delta.param).dim() == 3 and not isinstance(
                module, GroupedLinear
            )  # as the user's module has them
            if delta.kind != "full" and not packed and delta.transposed != is_conv1d(module):
                raise AdapterError(f"{where}: {delta.param} is stored in another orientation in this model")
            if delta.kind == "full" and delta.param not in self.train and not self.serving:
                hint = f"compile with Plan(train=[{owner_name(delta.param)!r}])"
                raise AdapterError(f"{where}: {delta.param} trained in full there; {hint}")
        strict = strict and not foreign
        touched = {d.param for d in loaded.deltas if d.kind not in WHOLE}
        shapes = self.shapes() | {n: b.shape for n, b in self.buffers.base.items()}
        back_to_pieces(self.host)
        exact = {d.param for d in loaded.deltas if d.exact is not None}
        asked = touched if strict else exact
        hashes = {p: self.base_hash(p) for p in sorted(asked) if p in shapes}
        files.check_fits(loaded, shapes, hashes, where, strict)
        other = {
            p for p in exact if hashes.get(p) != loaded.bases.get(p)
        }  # the values that were trained belong to their base
        loaded = replace(loaded, deltas=tuple(replace(d, exact=None) if d.param in other else d for d in loaded.deltas))
        if name in self.active.weights:
            self.set_adapter(None)
        if self.serving:
            self.take_in_full([d.param for d in loaded.deltas if d.kind == "full"])
        self.parked.pop(name, None)
        self.adapters[name] = loaded

    def take_in_full(self, params: Iterable[str]) -> None:
        """Let adapters replace these parameters, which are the base's until then."""
        for param in params:
            if param not in self.base_full:
                self.base_full[param] = self.own(param).detach().clone()
                self.train = (*self.train, param)

    @writes
    def set_adapter(self, spec: str | Mapping[str, float] | None) -> Mix:
        """Make an adapter active (a name), none (None: the base, bit for bit), or a weighted mix (`{"a": .5, "b": .5}`).

        One adapter over the compiled selection goes on training; a mix, or an adapter of another selection, is for inference.
        Returns what is active and where mixed adapters overlap. A switch writes the trained channels or entries of each
        weight, not the weight (a low-rank adapter on a linear compiled without one is the exception: it adds a dense product).
        """
        self.need_unmerged("set_adapter")
        back_to_pieces(self.host)
        if isinstance(spec, Mapping) and [w for w in spec.values() if w == 1 and not isinstance(w, bool)] == list(
            spec.values()
        ):
            spec = next(iter(spec)) if len(spec) == 1 else spec  # a mix of one, whole, is that adapter
        weights = {} if spec is None else {spec: 1.0} if isinstance(spec, str) else dict(spec)
        for name, weight in weights.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
                raise AdapterError(f"set_adapter: the weight of {name!r} must be a finite number, got {weight!r}")
        for part in self.parts.values():
            self.need_base(part, "set_adapter")
        chosen = {name: self.get(name) for name in weights}
        single = (isinstance(spec, str) and not self.serving) and (
            spec in self.parked or self.is_active(spec) or self.fits_parts(chosen[spec])
        )
        if weights and not single:
            refuse_sharded(self.host, "set_adapter with a mix, or with an adapter of another selection,")
            self.check_mix(chosen)
        self.park()
        self.reset_to_base()
        self.active = Mix({})
        if not weights:
            return self.allow_training(False)
        if single:
            self.fill_parts(str(spec), chosen[str(spec)])
            self.active = Mix(weights, trainable=True)
            return self.allow_training(True)
        conflicts = self.add(chosen, weights)
        self.active = Mix(weights, tuple(conflicts))
        return self.allow_training(False)

    def is_active(self, name: str) -> bool:
        return self.active.trainable and name in self.active.weights

    def park(self) -> None:
        """Keep the trained values of the active adapter bit for bit."""
        if self.active.trainable:
            name = next(iter(self.active.weights))
            self.parked[name] = {n: {"full": whole(self.stored(n).detach()).clone()} for n in self.train}
            self.parked[name][BUFFERS] = self.buffers.moved(self.host)
            for param, part in self.parts.items():
                with whole_parameters(part.module):
                    self.parked[name][param] = part.snapshot()

    def reset_to_base(self) -> None:
        """Every bit of the base is back in the stored weights and in the parts."""
        for param, axis, places, values in reversed(self.backups):
            put_back(self.stored(param).detach(), axis, places, values)
        self.backups = []
        for part in self.parts.values():
            with whole_parameters(part.module, keep=True):
                part.reset()
        for name, base in self.base_full.items():
            write_whole(self.stored(name), base)
        self.buffers.reset(self.host)

    def need_base(self, part: LivePart, verb: str) -> None:
        if not part.base_known:
            raise AdapterError(
                f"{verb}: a state dict that was loaded brought another base for {part.param}, and what that base holds where this "
                "model trains is not known; compile that base with the same plan, then load the state dict there"
            )

    def allow_training(self, on: bool) -> Mix:
        on = on and not self.serving
        for part in self.parts.values():
            for parameter in part.parameters():
                parameter.requires_grad_(on)
        for name in self.train:
            self.stored(name).requires_grad_(on)
        return self.active

    def fits_parts(self, loaded: Adapter) -> bool:
        """Whether the adapter changes exactly what this model trains."""
        by_param = group_by_param(loaded, buffers=False)
        full = {p for p, deltas in by_param.items() if any(d.kind == "full" for d in deltas)}
        if set(by_param) - full != set(self.parts) or full != set(self.train):
            return False
        return all(part.fits(by_param[param]) for param, part in self.parts.items())

    def fill_parts(self, name: str, loaded: Adapter) -> None:
        parked = self.parked.pop(name, None)
        by_param = group_by_param(loaded)
        for param, part in self.parts.items():
            with whole_parameters(part.module, keep=True):
                if parked is not None:
                    part.restore(parked[param])
                else:
                    part.fill(by_param[param])
        for n in self.train:
            write_whole(self.stored(n), parked[n]["full"] if parked is not None else by_param[n][0].values)
        if parked is not None:
            self.buffers.write(self.host, parked[BUFFERS])
        else:
            self.write_buffers([(1.0, loaded)])

    def write_buffers(self, members: Sequence[tuple[float, Adapter]]) -> None:
        """Set the buffers that the adapters moved; those of a mix are mixed (`sparsify.host.moved_buffers`)."""
        found = [(w, {d.param: d.values for d in a.deltas if d.kind == "buffer"}) for w, a in members]
        moved = {n: self.layout(n).to_original(n.rpartition(".")[2], self.buffers.base[n]) for _, t in found for n in t}
        mixed = {n: mix_buffer(base, [(w, t.get(n, base)) for w, t in found]) for n, base in moved.items()}
        self.buffers.write(self.host, {n: self.layout(n).to_current(n.rpartition(".")[2], v) for n, v in mixed.items()})

    def check_mix(self, chosen: Mapping[str, Adapter]) -> None:
        """A packed base has no dense weight to add to: there only changes over its own trained parts can be mixed."""
        for name, loaded in chosen.items():
            for param, deltas in group_by_param(loaded, buffers=False).items():
                if deltas[0].kind == "full" or not self.is_packed(param):
                    continue
                part = self.parts.get(param)
                if part is None or not part.fits(deltas):
                    raise AdapterError(
                        f"set_adapter: {name!r} changes other entries of {param} than this model trains, and the base is packed "
                        f"({self.program.quantize[param]}); compile with the adapter's own plan, or without Quantize"
                    )

    def add(self, chosen: Mapping[str, Adapter], weights: Mapping[str, float]) -> list[Conflict]:
        """Add weighted deltas to what the model computes with, remembering what stood there."""
        conflicts: list[Conflict] = []
        by_param: dict[str, list[tuple[str, Delta]]] = {}
        for name, loaded in chosen.items():
            for delta in loaded.deltas:
                if delta.kind != "buffer":
                    by_param.setdefault(delta.param, []).append((name, delta))
        self.write_buffers([(weights[name], loaded) for name, loaded in chosen.items()])
        for param, members in by_param.items():
            part = self.parts.get(param)
            if param in self.base_full:
                self.stored(param).detach().copy_(
                    mix_full(self.base_full[param], [(weights[n], d.values) for n, d in members])
                )
                continue
            for kind in dict.fromkeys(d.kind for _, d in members):
                same = [(n, d) for n, d in members if d.kind == kind]
                if len(same) > 1 and kind != "lora":
                    counts = torch.cat([d.channels for _, d in same]).unique(return_counts=True)[1]
                    if int((counts > 1).sum()):
                        names = tuple(n for n, _ in same)
                        conflicts.append(Conflict(param, names, int((counts > 1).sum()), counts.numel(), kind))
            weighted = [(weights[n], d) for n, d in members]
            if self.is_packed(param):
                assert part is not None
                part.mix(weighted)
                continue
            low = [(w, d) for w, d in weighted if d.kind == "lora"]
            others = [(w, d) for w, d in weighted if known_kind(d.kind) is not None]
            beside = part is not None and "lora" in part.takes
            for kind in ("column", "row", "sparse"):
                same_kind = [(w, d) for w, d in weighted if d.kind == kind]
                if same_kind:
                    self.add_to(param, same_kind)
            if low and not beside:
                self.add_dense(param, low)
            if others:
                self.add_dense(param, others)
            if part is not None:
                part.read_back()
            if low and beside:
                assert part is not None
                part.mix_beside(low)
        return conflicts

    def add_to(self, param: str, parts: list[tuple[float, Delta]]) -> None:
        """Add whole channels, or single entries, of one kind to a stored dense weight."""
        weight = self.own(param)
        layout, leaf = self.layout(param), param.rpartition(".")[2]
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
            places, current = current_index(self.program, param, channels, weight.shape)
            order = torch.searchsorted(channels, current)
            total = total[order]
            exact = None if alone is None else alone[first.channels.argsort()][order]
            places, axis = places.long().to(weight.device), None
            old = weight.data.view(-1)[places]
            weight.detach().view(-1).index_copy_(0, places, changed(old, total, exact, weight.dtype))
        else:
            axis = first.axis
            others = [size for place, size in enumerate(weight.shape) if place != axis]
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
            old = weight.data.index_select(axis, places)
            total, exact = total.movedim(0, axis), None if exact is None else exact.movedim(0, axis)
            weight.detach().index_copy_(axis, places, changed(old, total, exact, weight.dtype))
        self.backups.append((param, axis, places, old))

    def add_dense(self, param: str, parts: list[tuple[float, Delta]]) -> None:
        """Add low-rank products, or changes of registered kinds, to a stored dense weight that has none of their parts beside it."""
        weight, layout = self.own(param), self.layout(param)
        inner = sum_dtype(weight, *(d.values for _, d in parts))
        total = torch.zeros(tuple(weight.shape), dtype=inner)
        for scale, delta in parts:
            kind = known_kind(delta.kind)
            if kind is None:
                assert delta.a is not None
                change = float(scale) * delta.scale * (delta.values.to(inner) @ delta.a.to(inner))
            else:
                base = self.base_original(param).detach().cpu().to(inner)
                base = base.t() if delta.transposed else base
                change = float(scale) * (kind.change(base, delta).to(inner) - base)
            total += change.mT if delta.transposed else change
        total = layout.to_current(param.rpartition(".")[2], total).to(weight.device)
        self.backups.append((param, -1, torch.empty(0), weight.data.clone()))
        weight.detach().copy_(changed(weight.data, total, None, weight.dtype))

    @writes
    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; if it is active, the base becomes active."""
        self.get(name)
        if name in self.active.weights:
            self.set_adapter(None)
        self.parked.pop(name, None)
        self.adapters.pop(name, None)

    # --- open masks ------------------------------------------------------------------------------------------------------

    def open_masks(self) -> list[str]:
        """Weights whose RoSA mask is still to be collected."""
        return [p.param for p in self.program.lowranks if p.count and p.index is None]

    @writes
    def set_masks(self, supports: Mapping[str, Tensor]) -> None:
        """Fix the support of sparse parts: flat entries of each stored weight in *original* coordinates, `count` of them.

        The values start at the base, so the forward does not move. `sparsify.train.rosa` collects supports from gradients.
        """
        self.need_unmerged("set_masks")
        self.require_default("set_masks")
        back_to_pieces(self.host)
        for param, original in supports.items():
            part = self.parts.get(param)
            if not isinstance(part, LowRankPart) or not part.part.count:
                raise SparsifyError(f"set_masks: {param} has no sparse part")
            if original.unique().numel() != part.part.count or int(original.min()) < 0:
                raise SparsifyError(
                    f"set_masks: {param} needs {part.part.count} distinct entries, got {original.numel()}"
                )
            if int(original.max()) >= part.module.stored_shape().numel():
                raise SparsifyError(f"set_masks: an entry of {param} lies outside its weight")
            with whole_parameters(part.module, keep=True):
                self.place_support(
                    part, *current_index(self.program, param, original.cpu(), part.module.stored_shape())
                )

    def place_support(self, part: LowRankPart, index: Tensor, original: Tensor) -> None:
        self.program = activate_support(self.program, part.place(index, original))

    @writes
    def reset_lowrank(self) -> None:
        """Back to the initial factors (`B` = 0): RoSA's restart after its masks are collected."""
        self.require_default("reset_lowrank")
        back_to_pieces(self.host)
        for part in self.parts.values():
            if isinstance(part, LowRankPart):
                with whole_parameters(part.module, keep=True):
                    part.reset()

    def require_default(self, verb: str) -> None:
        if not self.active.trainable:
            raise SparsifyError(f"{verb}: make a trained adapter active first (now: {self.active})")

    # --- folding ---------------------------------------------------------------------------------------------------------

    def need_unmerged(self, verb: str) -> None:
        if self.merged:
            raise SparsifyError(f"{verb}: the adapter is merged into the weights; call unmerge() first")

    @writes
    def merge(self) -> nn.Module:
        """Fold what is active into plain weights, served at the base's speed. `unmerge` takes it back bit for bit.

        Low-rank parts are added to the dense weight, whose original is kept. A packed weight is quantised again: the result
        moves by what `merge_note` says and a warning repeats; `save_adapter` keeps base + delta exactly instead.
        """
        self.need_unmerged("merge")
        refuse_sharded(self.host, "merge")
        packed = [p for p in self.parts if self.is_packed(p)]
        fixed = next((p for p in packed if not format_named(self.module(p).format).packs_again), None)
        if fixed is not None:
            raise SparsifyError(
                f"merge: {fixed} came packed as {self.module(fixed).format}, and sparsify cannot pack a changed weight so: save_adapter "
                "keeps what trained beside the base exactly, and save_pretrained writes the dense model"
            )
        masked = [p for p, part in self.parts.items() if part.fills_pruned and p in self.program.masks]
        before = self.example_outputs() if packed or masked else None
        moved: dict[str, float] = {}
        for param, part in self.parts.items():
            module = part.module
            if isinstance(module, QuantizedMixin):
                dense = effective_weight(module)
                exact = dense.float()
                if param in self.program.masks:
                    self.keep_mask(param, dense := dense.clone())
                fresh = pack(dense, module.format)
                back = unpack(fresh, module.format, tuple(module.shape), dense.dtype)
                moved[param] = float((back.float() - exact).norm() / exact.norm().clamp_min(1e-30))
                self.merge_backups[param] = [b.clone() for b in module.packed()]
                for name, tensor in zip(module.packed_names, fresh, strict=True):
                    setattr(module, name, tensor)
                part.detach()
                module.without_part()
                continue
            if part.overwrites_base:
                self.merge_backups[param] = [module.weight.data.clone()]
            write_folded(module)
            if param in masked:
                moved[param] = self.keep_mask(param, module.weight)
            part.detach()
            make_plain(module)
            part.layout.mark(module)
        self.merged = True
        if packed or masked:
            self.merge_note = MergeNote(moved, largest_move(before, self.example_outputs()))
            worst = max(moved.values())
            what = f"{len(packed)} packed weights were quantised again" if packed else ""
            what += " and " if packed and masked else ""
            what += f"{len(masked)} low-rank parts lost what fell on pruned entries" if masked else ""
            warnings.warn(
                f"merge: {what}; a weight moves by up to {worst:.2%} (Frobenius), the "
                f"example's outputs by {self.merge_note.outputs:.2%}. save_adapter keeps base + delta exactly instead.",
                stacklevel=2,
            )
        return self.host

    def keep_mask(self, param: str, weight: Tensor) -> float:
        """Zero what a dense low-rank product put on pruned entries; returns the relative Frobenius change."""
        gone = ~self.program.masks[param].to(weight.device)
        lost = float(weight.data[gone].float().norm() / weight.data.float().norm().clamp_min(1e-30))
        weight.data.masked_fill_(gone, 0)
        return lost

    @reads
    def save_sparse(self, path: str | os.PathLike[str], **options: Any) -> Any:
        """Write the model as a compressed sparse checkpoint (bitmask + values); returns its `SizeReport`.

        Opens again with `sparsify.pruning.sparse_checkpoint.open_sparse`. Names, shapes and order are the original model's. When Prune
        made the model sparse, the file records the hash of the dense model, which `open_sparse(path, base=dense_model)` checks.
        """
        from sparsify.pruning.sparse_checkpoint import save_sparse

        refuse_sharded(self.host, "save_sparse")
        state = self.original_state_dict()
        masks = {}
        current = {
            name: module.mask(leaf) for name, module, leaf in masked_parameters(self.host)
        }  # gradual pruning moves them
        for name, mask in (self.program.masks | current).items():
            kept = self.mask_original(name, mask).to(state[name].device)
            if not bool(
                (state[name][~kept] != 0).any()
            ):  # a low-rank part fills pruned entries: stored by its own zeros
                masks[name] = kept
        return save_sparse(state, Path(path), masks=masks, **{"base": self.program.dense_hash, **options})

    def mask_original(self, name: str, mask: Tensor) -> Tensor:
        return self.layout(name).to_original(name.rpartition(".")[2], mask)

    def example_outputs(self) -> Any:
        args, kwargs = self.program.example
        with evaluating(self.host), torch.no_grad():
            return self.host(*args, **kwargs)

    @writes
    def unmerge(self) -> nn.Module:
        """Undo `merge`: the same Parameter objects come back, so an optimizer goes on."""
        if not self.merged:
            raise SparsifyError("unmerge: nothing is merged")
        refuse_sharded(self.host, "unmerge")
        for param, part in self.parts.items():
            kept = self.merge_backups.pop(param, None)
            if isinstance(part.module, QuantizedMixin):
                assert kept is not None
                for name, tensor in zip(part.module.packed_names, kept, strict=True):
                    setattr(part.module, name, tensor)
            elif kept is not None:
                part.module.weight.data.copy_(kept[0])
            part.attach()
            module: Any = part.module
            part.layout.mark(module)
        self.merged = False
        return self.host

    @writes
    def restore(self) -> nn.Module:
        """Back to the base, bit for bit, in original order and as plain modules; the host leaves sparsify's hands."""
        if self.program.bases:
            raise SparsifyError(
                "restore: the base came packed and its layers are sparsify's now; the model that was passed to compile is still as it was, "
                "and set_adapter(None) gives the packed base here"
            )
        if self.program.quantize or self.dequantised:
            raise SparsifyError(
                "restore: the base was packed by Quantize and its dense bits are not kept; the model that was passed to compile "
                "still has them (unless donated), and set_adapter(None) gives the packed base"
            )
        if self.program.masks:
            raise SparsifyError(
                "restore: Prune replaced the weights and their dense values are not kept; the model that was passed to compile "
                "still has them (unless donated)"
            )
        refuse_sharded(self.host, "restore")
        for part in self.parts.values():
            self.need_base(part, "restore")
        if self.merged:
            self.unmerge()
        self.reset_to_base()
        for part in self.parts.values():
            part.detach()
            make_plain(part.module)
        done: set[int] = set()  # a shared module, or a tensor tied between modules, is put back once
        for owner, layout in self.layouts.items():
            module = self.host.get_submodule(owner)
            for leaf in layout.moves:
                tensor = getattr(module, leaf)
                if id(tensor) not in done:
                    done.add(id(tensor))
                    tensor.data = layout.to_original(leaf, tensor.detach())
        self.let_go()
        for name, parameter in self.host.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))
        save_again(self.host, {name for part in self.program.parts for name in part.trained_names()})
        write_back_experts(self.host)
        return self.host

    def let_go(self) -> None:
        """Hooks, markers and wrapped methods leave the host, which is the user's own class again."""
        for handle in self.host.__dict__.pop("_sparsify_hooks", []):
            handle.remove()
        forget(self.host)

    @reads
    def original_state_dict(self, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The state dict of the model that was compiled: its names, shapes and order, what is active folded in, nothing else.

        `host.state_dict()` gives the live tensors as they lie, under the names of `named_parameters()`; this is what files hold.
        A plain model loads it with `load_state_dict`, and so does a host of any selection over the same base: whole trained channels
        are read from it (sparse and low-rank parts are not: they do not follow from a folded weight).

        state: a live state dict of this host (gathered, averaged, from a checkpoint) to translate instead of its current one.
        Under `fully_shard` every rank must call it, and gets whole tensors. Raises StateError for a live dict of another layout.
        """
        if state is None:
            back_to_pieces(self.host)
            state = self.host.state_dict()
        return {name: whole(value) for name, value in in_original_names(self.host, state).items()}

    @reads
    def plain(self) -> nn.Module:
        """A copy of the model as plain modules, with everything that is active folded in, in original order: no sparsify left.

        Pruned entries are exact zeros in it. The copy shares nothing with the host.
        """
        refuse_sharded(self.host, "plain")
        state = {name: value.detach().clone() for name, value in self.original_state_dict().items()}
        bare = self.bare_copy()
        flags = renamed(self.flags, plain_names(self.host))
        tied: dict[int, list[str]] = {}
        for name, parameter in bare.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        bare.load_state_dict(state, assign=True)
        for first, *others in tied.values():
            for name in others:
                owner, _, leaf = name.rpartition(".")
                setattr(bare.get_submodule(owner), leaf, bare.get_parameter(first))
        for name, parameter in bare.named_parameters():
            parameter.requires_grad_(flags.get(name, True))
        save_again(bare, {name for part in self.program.parts for name in part.trained_names()})
        return bare

    def bare_copy(self) -> Any:
        """A deep copy of the host as plain modules; its adapted weights are empty."""
        hooks = self.host.__dict__.get("_sparsify_hooks")
        bare: Any = copy_module_tree(self.host, {id(self): None, id(hooks): None})
        if self.cpu is not None:
            from sparsify.lowering.restore import restore_modules

            restore_modules(bare)
        for module in bare.modules():
            for table in (
                module._state_dict_hooks,
                module._load_state_dict_pre_hooks,
                module._forward_pre_hooks,
                module._forward_hooks,
            ):
                for key in [k for k, hook in table.items() if is_own_hook(hook)]:
                    del table[key]
                    module._forward_hooks_always_called.pop(key, None)
            layout = layout_of(module) or Layout()
            for leaf in set(layout.moves) & module._non_persistent_buffers_set:  # in no state dict
                module._buffers[leaf] = layout.to_original(leaf, module.get_buffer(leaf))
            if isinstance(module, AdaptedMixin):
                strip(module)
            elif isinstance(module, MaskedModule):
                unmask(module)
        forget(bare)
        write_back_experts(bare)
        return bare

    @reads
    def export_lora(
        self,
        directory: str | os.PathLike[str],
        name: str | None = None,
        *,
        sparse: str = "refuse",
        changed_base: str = "refuse",
    ) -> Path:
        """Write an adapter as a PEFT LoRA directory that computes the same logits.

        Trained channels and low-rank parts export exactly. A sparse part is not low-rank: it is refused with that reason, or with
        `sparse="merge"` folded into a copy of the base that is written to `directory/base` (Hugging Face models) beside it.
        After Quantize or Prune the adapter belongs to the changed base, which PEFT must be given: a warning says so after
        Quantize, and after Prune it is refused, unless `changed_base="keep"` says that PEFT will load it over the same changed base.
        What trained in full is written where PEFT loads it to the same function, see `sparsify.adapters.peft_export`.
        """
        if sparse not in ("refuse", "merge"):
            raise AdapterError(f"export_lora: sparse must be 'refuse' or 'merge', got {sparse!r}")
        if changed_base not in ("refuse", "keep"):
            raise AdapterError(f"export_lora: changed_base must be 'refuse' or 'keep', got {changed_base!r}")
        if name is None and not self.active.trainable and len(self.active.weights) == 1:
            name = next(iter(self.active.weights))
        source = self.current() if name is None and self.active.trainable else self.get(name or DEFAULT)
        path = getattr(getattr(self.host, "config", None), "_name_or_path", None) or None
        rest = tuple(d for d in source.deltas if d.kind not in ("sparse", "buffer"))
        moved = [d.param for d in source.deltas if d.kind == "buffer"]
        if moved and sparse == "refuse":
            raise AdapterError(
                f"export_lora: the buffer {moved[0]} moved in training, and a PEFT adapter has no place for it; keep it still while you "
                "train (its module in eval mode), merge() and save the whole model, or pass sparse='merge' to put it into the base"
            )
        if len(rest) < len(source.deltas):
            if sparse == "refuse":
                one = next(d for d in source.deltas if d.kind == "sparse")
                raise AdapterError(
                    f"export_lora: {one.param} has a sparse part of {one.channels.numel()} scattered entries, which no low-rank "
                    "matrix of useful rank equals; merge() and save the whole model, or pass sparse='merge' to fold it into the base"
                )
            path = str(self.write_sparse_base(source, Path(directory) / "base"))
        elif changed_base == "refuse":
            self.say_base_changed()
        kept = Adapter(rest, source.bases, source.info)
        exported = peft_export.export(kept, self.host, self.shapes(), self.dense_base, path)
        return self.write_once(lambda: exported.write(directory), directory)

    def say_base_changed(self) -> None:
        """Before an export: the adapter computes the same only over the base that Prune or Quantize made of the user's."""
        if self.program.masks:
            raise AdapterError(
                "export_lora: Prune changed the base, and over the dense one PEFT computes something else; merge() and save the whole "
                "model, or pass changed_base='keep' if PEFT will load the adapter over the same pruned base"
            )
        if self.program.quantize or self.dequantised:
            warnings.warn(
                "export_lora: Quantize changed the base, and the adapter belongs to it: PEFT computes the same over a base that is "
                "quantised in the same way, and not quite over the dense one (changed_base='keep' says that you know)",
                stacklevel=3,
            )

    def write_sparse_base(self, source: Adapter, directory: Path) -> Path:
        """Save the base with only the sparse parts of an adapter folded in."""
        refuse_sharded(self.host, "export_lora(sparse='merge')")
        if not hasattr(self.host, "save_pretrained"):
            raise AdapterError(
                "export_lora(sparse='merge') writes the base with save_pretrained, which this model does not have"
            )
        if self.program.quantize:
            raise AdapterError(
                "export_lora(sparse='merge') would write the packed base as if it were dense; merge() first"
            )
        state = self.original_state_dict()
        state |= {
            n: self.layout(n).to_original(n.rpartition(".")[2], b) for n, b in self.buffers.base.items() if n in state
        }
        for param in dict.fromkeys(d.param for d in source.deltas if d.kind not in WHOLE):
            state[param] = self.base_original(param)
        for delta in source.deltas:
            if delta.kind == "buffer" and delta.param in state:
                state[delta.param] = delta.values.to(state[delta.param].device)
            if delta.kind == "sparse":
                weight = state[delta.param].view(-1)
                places = delta.channels.to(weight.device)
                weight[places] = changed(weight[places], delta.values, delta.exact, weight.dtype)
        check_target(directory / "config.json")
        with reported(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self.host.save_pretrained(directory, state_dict=state)  # type: ignore[operator]
        return directory


def is_own_hook(hook: Any) -> bool:
    kinds = SaveHook | LoadHook | RootHook | Unshare | EnterForward | LeaveForward
    return isinstance(getattr(hook, "hook", hook), kinds)


def forget(host: nn.Module) -> None:
    """Take from a module tree what `install` put into it besides trained parts and hooks."""
    for name in ("sparsify", "_sparsify_hooks"):
        host.__dict__.pop(name, None)
    for name in [n for n, value in host.__dict__.items() if isinstance(value, OnHost)]:
        del host.__dict__[name]
    open_fast_paths(host)
    for module in host.modules():
        module.__dict__.pop("_sparsify_layout", None)
        module._buffers.pop(MARKER, None)


def strip(module: Any) -> None:
    """Take every trained or packed tensor from an adapted module and give it an (empty) dense weight again."""
    shape, dtype = module.stored_shape(), module.weight.dtype
    module._buffers.pop(MARKER, None)
    for leaf in module.__dict__.pop("packed_names", ()):
        module._buffers.pop(leaf, None)
    take_leaves(module)
    for name in ("format", "shape", "compute_dtype"):
        module.__dict__.pop(name, None)
    module.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    make_plain(module)


def unmask(module: Any) -> None:
    """Back from a masked module to the user's class; the zeros stay in the weights."""
    module._unwatch()
    for leaf in module.masked_leaves:
        module._buffers.pop(bits_name(leaf), None)
        module._non_persistent_buffers_set.discard(bits_name(leaf))
    module.__dict__.pop("masked_leaves", None)
    module.__class__ = next(c for c in type(module).__mro__ if not issubclass(c, MaskedModule))


@dataclass
class Adopt:
    """Called while a checkpoint is loaded whose support differs from the module's (a mask collected before it was saved)."""

    handle: Handle
    param: str

    def known(self) -> Tensor | None:
        part = self.handle.parts[self.param]
        return part.part.index if isinstance(part, LowRankPart) else None

    def __call__(self, index: Tensor) -> None:
        part = self.handle.parts[self.param]
        assert isinstance(part, LowRankPart)
        index = index.cpu()
        shape = part.module.stored_shape()
        places = list(torch.unravel_index(index.long(), shape))
        for axis, move in self.handle.layout(self.param).moves.get("weight", []):
            places[axis] = move[places[axis]]
        self.handle.place_support(part, index, flat_places(places, shape))


@dataclass
class OtherBase:
    """Called while a state dict with another base is loaded, with that base's weight as it lies here (None: not known)."""

    part: LivePart

    def __call__(self, weight: Tensor | None) -> None:
        self.part.base_known = weight is not None
        if weight is not None:
            self.part.take_base(weight)


def put_back(tensor: Tensor, axis: int | None, places: Tensor, values: Tensor) -> None:
    """Undo one entry of `Handle.backups`: channels on an axis, flat entries (None), or everything (-1)."""
    if axis is None:
        tensor.view(-1).index_copy_(0, places, values)
    elif axis == -1:
        tensor.copy_(values)
    else:
        tensor.index_copy_(axis, places, values)


def group_by_param(loaded: Adapter, buffers: bool = True) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {}
    for delta in loaded.deltas:
        if buffers or delta.kind != "buffer":
            found.setdefault(delta.param, []).append(delta)
    return found


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


def largest_move(before: Any, after: Any) -> float:
    """Largest change between two outputs, relative to the largest entry."""
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    moves = [
        float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1e-30))
        for a, b in pairs
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel()
    ]
    return max(moves, default=float("nan"))
