"""`model.sparsify`: what a user does with a compiled model besides training it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsify import adapter as files
from sparsify import peft_format
from sparsify.adapter import Adapter, Delta
from sparsify.errors import AdapterError, SparsifyError
from sparsify.install import Layout
from sparsify.modules import PartialMixin, make_partial, make_plain, write_slice
from sparsify.passes.assign_rules import is_conv1d, owner_name
from sparsify.plan import Plan, nearest
from sparsify.program import Program, TrainedSlice
from sparsify.report import Report, make_report

DEFAULT = "default"


@dataclass(frozen=True)
class Conflict:
    """Two mixed adapters change the same channels of one weight; their changes add up there."""

    param: str
    adapters: tuple[str, ...]
    shared: int
    total: int

    def __str__(self) -> str:
        return f"{self.param}: {' and '.join(self.adapters)} share {self.shared} of {self.total} channels"


@dataclass(frozen=True)
class Mix:
    """What `set_adapter` made active, and where mixed adapters overlap."""

    weights: dict[str, float]
    conflicts: tuple[Conflict, ...] = ()
    trainable: bool = False

    def __str__(self) -> str:
        text = " + ".join(f"{w:g}·{n}" for n, w in self.weights.items()) or "base (no adapter)"
        return text + "".join(f"\n  conflict {c}" for c in self.conflicts)


@dataclass
class Handle:
    """State of one compiled host. Made by `sparsify.compile`; reach it as `model.sparsify`."""

    host: nn.Module
    program: Program
    plan: Plan
    layouts: dict[str, Layout]
    train: tuple[str, ...]
    flags: dict[str, bool]
    base_blocks: dict[str, Tensor] = field(default_factory=dict)
    base_full: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: Mix = field(default_factory=lambda: Mix({DEFAULT: 1.0}, trainable=True))
    merged: bool = False
    parked: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    backups: list[tuple[str, int, Tensor, Tensor]] = field(default_factory=list)
    merged_blocks: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for piece in self.program.slices:
            stored = self.stored(piece.param).detach()
            self.base_blocks[piece.param] = stored.narrow(piece.axis, piece.start, piece.length).clone()
        for name in self.train:
            self.base_full[name] = self.stored(name).detach().clone()

    # --- looking ---------------------------------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        """What was found, chosen and declined and why; trainable parameters; bytes saved for backward."""
        return make_report(self.program, self.plan, self.host)

    def count_parameters(self) -> tuple[int, int]:
        """`(trainable, all)`; a trained slice stands for entries of its weight, so it does not add to `all`."""
        trainable = sum(p.numel() for p in self.host.parameters() if p.requires_grad)
        blocks = {id(b) for b in self.blocks().values()}
        return trainable, sum(p.numel() for p in self.host.parameters() if id(p) not in blocks)

    def print_trainable_parameters(self) -> None:
        """The line that PEFT's users know."""
        trainable, total = self.count_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    def __repr__(self) -> str:
        return f"<sparsify: {len(self.program.slices)} trained slices, active {self.active}{', merged' if self.merged else ''}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        clone = copy.copy(self)
        memo[id(self)] = clone
        for name in ("host", "layouts", "base_blocks", "base_full", "adapters", "parked", "backups", "merged_blocks"):
            setattr(clone, name, copy.deepcopy(getattr(self, name), memo))
        return clone

    # --- tensors ---------------------------------------------------------------------------------------------------------

    def module(self, param: str) -> nn.Module:
        return self.host.get_submodule(owner_name(param))

    def stored(self, param: str) -> nn.Parameter:
        return getattr(self.module(param), param.rpartition(".")[2])

    def blocks(self) -> dict[str, nn.Parameter]:
        """The trained blocks by the name of their weight."""
        if self.merged:
            return dict(self.merged_blocks)
        found = {}
        for piece in self.program.slices:
            module = self.module(piece.param)
            assert isinstance(module, PartialMixin)
            found[piece.param] = module.weight_slice
        return found

    def layout(self, param: str) -> tuple[Layout, str]:
        owner, _, leaf = param.rpartition(".")
        return self.layouts.get(owner) or Layout(), leaf

    def base_original(self, param: str) -> Tensor:
        """A copy of the base value of a weight in original coordinates, whatever is active."""
        tensor = self.stored(param).detach().clone()
        for name, axis, places, values in reversed(self.backups):
            if name == param:
                tensor.index_copy_(axis, places, values)
        for piece in self.program.slices:
            if piece.param == param:
                tensor.narrow(piece.axis, piece.start, piece.length).copy_(self.base_blocks[param])
        if param in self.base_full:
            tensor.copy_(self.base_full[param])
        layout, leaf = self.layout(param)
        return layout.to_original(leaf, tensor)

    # --- adapters --------------------------------------------------------------------------------------------------------

    def current(self) -> Adapter:
        """The trained blocks as an adapter, in original coordinates."""
        return self.adapter_from({p: b.detach() for p, b in self.blocks().items()}, {n: self.stored(n).detach() for n in self.train})

    def adapter_from(self, blocks: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> Adapter:
        deltas = []
        for piece in self.program.slices:
            delta = self.to_logical(piece, blocks[piece.param].float(), self.base_blocks[piece.param].float())
            deltas.append(delta)
        for name, value in full.items():
            deltas.append(Delta(name, "full", torch.empty(0, dtype=torch.int64), value.detach().cpu().clone()))
        bases = {d.param: files.tensor_hash(self.base_original(d.param)) for d in deltas if d.kind != "full"}
        return Adapter(tuple(deltas), bases, self.info())

    def to_logical(self, piece: TrainedSlice, block: Tensor, base: Tensor) -> Delta:
        """Delta of one slice: channels in original ids, the other axis put back into original order."""
        transposed = is_transposed(piece)
        base = base.t() if transposed else base
        values = block - base
        layout, leaf = self.layout(piece.param)
        other_stored = 1 - piece.axis
        for axis, inverse in layout.inverses.get(leaf, []):
            if axis == other_stored:
                values = values.index_select(0 if piece.side == "column" else 1, inverse.to(values.device))
        channels = torch.tensor(piece.channels, dtype=torch.int64)
        return Delta(piece.param, piece.side, channels, values.cpu().contiguous(), transposed)

    def info(self) -> dict[str, Any]:
        from sparsify import __version__

        return {
            "sparsify": __version__,
            "torch": torch.__version__,
            "model": type(self.host).__name__,
            "plan": self.plan.to_json(),
        }

    def get(self, name: str) -> Adapter:
        """An adapter by name, trained here or loaded."""
        if self.active.trainable and name in self.active.weights:
            return self.current()
        if name in self.parked:
            blocks = {p: self.parked[name][p] for p in (s.param for s in self.program.slices)}
            return self.adapter_from(blocks, {n: self.parked[name][n] for n in self.train})
        if name in self.adapters:
            return self.adapters[name]
        known = sorted({*self.adapters, *self.parked, *(self.active.weights if self.active.trainable else ())})
        raise AdapterError(f"no adapter is called {name!r}{nearest(name, known)}")

    def save_adapter(self, directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write an adapter (the active one unless named) as safetensors + JSON, in original coordinates, atomically."""
        if name is None:
            if not self.active.trainable:
                raise AdapterError(f"save_adapter: {self.active} is not one trained adapter; name the one to save")
            name = next(iter(self.active.weights))
        return files.save(self.get(name), directory)

    def load_adapter(self, directory: str | os.PathLike[str], name: str = DEFAULT, *, strict: bool = True) -> None:
        """Read an adapter and keep it under `name`; `set_adapter(name)` makes it active. The model is not touched.

        strict: refuse an adapter that was trained on another base.
        """
        self.need_unmerged("load_adapter")
        loaded = files.load(directory)
        where = str(directory)
        for delta in loaded.deltas:
            try:
                module = self.module(delta.param)
            except AttributeError:
                raise AdapterError(f"{where}: the model has no parameter {delta.param!r}") from None
            if delta.kind != "full" and delta.transposed != is_conv1d(module):
                raise AdapterError(f"{where}: {delta.param} is stored in another orientation in this model")
            if delta.kind == "full" and delta.param not in self.train:
                raise AdapterError(f"{where}: {delta.param} trained in full there; compile with Plan(train=[{owner_name(delta.param)!r}])")
        named = {n: p.shape for n, p in self.host.named_parameters()}
        touched = {d.param for d in loaded.deltas if d.param in named and d.kind != "full"}
        hashes = {p: files.tensor_hash(self.base_original(p)) for p in touched} if strict else {}
        files.check_fits(loaded, named, hashes, where, strict)
        if name in self.active.weights:
            self.set_adapter(None)
        self.parked.pop(name, None)
        self.adapters[name] = loaded

    def set_adapter(self, spec: str | None | Mapping[str, float]) -> Mix:
        """Make an adapter active (a name), none (None: the base, bit for bit), or a weighted mix (`{"a": .5, "b": .5}`).

        One adapter over the compiled selection goes on training; a mix, or an adapter of another selection, is for inference.
        Returns what is active and where mixed adapters overlap. A switch writes `s` channels of each weight, not the weight.
        """
        self.need_unmerged("set_adapter")
        weights = {} if spec is None else {spec: 1.0} if isinstance(spec, str) else dict(spec)
        for name, weight in weights.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or weight != weight:
                raise AdapterError(f"set_adapter: the weight of {name!r} must be a number, got {weight!r}")
        chosen = {name: self.get(name) for name in weights}
        self.park()
        self.reset_to_base()
        self.active = Mix({})
        if not weights:
            return self.allow_training(False)
        name = next(iter(weights))
        if isinstance(spec, str) and (name in self.parked or self.fits_slices(chosen[name])):
            self.fill_blocks(name, chosen[name])
            self.active = Mix(weights, trainable=True)
            return self.allow_training(True)
        conflicts = self.add(chosen, weights)
        self.active = Mix(weights, tuple(conflicts))
        return self.allow_training(False)

    def park(self) -> None:
        if self.active.trainable:
            name = next(iter(self.active.weights))
            values = {p: b.detach().clone() for p, b in self.blocks().items()}
            self.parked[name] = values | {n: self.stored(n).detach().clone() for n in self.train}

    def reset_to_base(self) -> None:
        """Every bit of the base is back in the stored weights and in the blocks."""
        for param, axis, places, values in reversed(self.backups):
            self.stored(param).data.index_copy_(axis, places, values)
        self.backups = []
        blocks = self.blocks()
        with torch.no_grad():
            for piece in self.program.slices:
                base = self.base_blocks[piece.param]
                self.stored(piece.param).data.narrow(piece.axis, piece.start, piece.length).copy_(base)
                blocks[piece.param].copy_(base.t() if is_transposed(piece) else base)
            for name, base in self.base_full.items():
                self.stored(name).copy_(base)

    def allow_training(self, on: bool) -> Mix:
        for block in self.blocks().values():
            block.requires_grad_(on)
        for name in self.train:
            self.stored(name).requires_grad_(on)
        return self.active

    def fits_slices(self, loaded: Adapter) -> bool:
        """Whether the adapter changes exactly the channels that this model trains."""
        own = {(s.param, s.side): set(s.channels) for s in self.program.slices}
        theirs = {(d.param, d.kind): set(d.channels.tolist()) for d in loaded.deltas if d.kind != "full"}
        full = {d.param for d in loaded.deltas if d.kind == "full"}
        return own == theirs and full == set(self.train)

    def fill_blocks(self, name: str, loaded: Adapter) -> None:
        blocks = self.blocks()
        parked = self.parked.pop(name, None)
        by_param = {(d.param, d.kind): d for d in loaded.deltas}
        with torch.no_grad():
            for piece in self.program.slices:
                if parked is not None:
                    blocks[piece.param].copy_(parked[piece.param])
                else:
                    blocks[piece.param].add_(self.to_block(piece, by_param[piece.param, piece.side]))
            for n in self.train:
                self.stored(n).copy_(parked[n] if parked is not None else by_param[n, "full"].values)

    def to_block(self, piece: TrainedSlice, delta: Delta) -> Tensor:
        """Values of a matching delta in the order and layout of the block."""
        side = 1 if piece.side == "column" else 0
        place = {c: i for i, c in enumerate(delta.channels.tolist())}
        values = delta.values.index_select(side, torch.tensor([place[c] for c in piece.channels]))
        layout, leaf = self.layout(piece.param)
        for axis, index in layout.moves.get(leaf, []):
            if axis != piece.axis:
                values = values.index_select(1 - side, index)
        block = self.blocks()[piece.param]
        return values.to(block.device, block.dtype)

    def add(self, chosen: Mapping[str, Adapter], weights: Mapping[str, float]) -> list[Conflict]:
        """Add weighted deltas to the stored weights, remembering what stood there."""
        grouped: dict[tuple[str, int], list[tuple[str, Delta]]] = {}
        conflicts = []
        for name, loaded in chosen.items():
            for delta in loaded.deltas:
                if delta.kind == "full":
                    continue
                grouped.setdefault((delta.param, delta.axis), []).append((name, delta))
        for (param, axis), members in grouped.items():
            counts = torch.cat([d.channels for _, d in members]).unique(return_counts=True)
            shared = int((counts[1] > 1).sum())
            if shared:
                conflicts.append(Conflict(param, tuple(n for n, _ in members), shared, counts[0].numel()))
            self.add_to(param, axis, [(weights[n], d) for n, d in members])
        with torch.no_grad():
            for name in self.train:
                parts = [
                    (weights[n], d.values) for n, a in chosen.items() for d in a.deltas if d.param == name and d.kind == "full"
                ]
                base = self.base_full[name]
                change = sum((w * (v.to(base.device).float() - base.float()) for w, v in parts), torch.zeros_like(base, dtype=torch.float32))
                self.stored(name).copy_(base.float() + change)
            blocks = self.blocks()
            for piece in self.program.slices:
                region = self.stored(piece.param).detach().narrow(piece.axis, piece.start, piece.length)
                blocks[piece.param].copy_(region.t() if is_transposed(piece) else region)
        return conflicts

    def add_to(self, param: str, axis: int, parts: list[tuple[float, Delta]]) -> None:
        weight = self.stored(param)
        layout, leaf = self.layout(param)
        channels = torch.cat([d.channels for _, d in parts]).unique()
        total = torch.zeros((channels.numel(), weight.shape[1 - axis]), dtype=torch.float32)
        for scale, delta in parts:
            rows = torch.searchsorted(channels, delta.channels)
            stored = delta.stored().float()
            total.index_add_(0, rows, stored if axis == 0 else stored.t(), alpha=float(scale))
        places = channels
        for move_axis, inverse in layout.inverses.get(leaf, []):
            if move_axis == axis:
                places = inverse[places]
        for move_axis, index in layout.moves.get(leaf, []):
            if move_axis != axis:
                total = total.index_select(1, index)
        places, total = places.to(weight.device), total.to(weight.device)
        old = weight.data.index_select(axis, places)
        self.backups.append((param, axis, places, old))
        change = total if axis == 0 else total.t()
        weight.data.index_copy_(axis, places, (old.float() + change).to(weight.dtype))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; if it is active, the base becomes active."""
        self.get(name)
        if name in self.active.weights:
            self.set_adapter(None)
        self.parked.pop(name, None)
        self.adapters.pop(name, None)

    # --- folding ---------------------------------------------------------------------------------------------------------

    def need_unmerged(self, verb: str) -> None:
        if self.merged:
            raise SparsifyError(f"{verb}: the adapter is merged into the weights; call unmerge() first")

    def merge(self) -> nn.Module:
        """Fold what is active into plain weights (served at the base's speed). `unmerge` takes it back bit for bit."""
        self.need_unmerged("merge")
        for piece in self.program.slices:
            module = self.module(piece.param)
            write_slice(module)
            self.merged_blocks[piece.param] = make_plain(module)
        self.merged = True
        return self.host

    def unmerge(self) -> nn.Module:
        """Undo `merge`: the same Parameter objects come back, so an optimizer goes on."""
        if not self.merged:
            raise SparsifyError("unmerge: nothing is merged")
        for piece in self.program.slices:
            make_partial(self.module(piece.param), piece, self.merged_blocks.pop(piece.param))
        self.merged = False
        return self.host

    def restore(self) -> nn.Module:
        """Back to the base, bit for bit, in original order and as plain modules; the host leaves sparsify's hands."""
        if self.merged:
            self.unmerge()
        self.reset_to_base()
        for piece in self.program.slices:
            make_plain(self.module(piece.param))
        done: set[int] = set()
        for owner, layout in self.layouts.items():
            module = self.host.get_submodule(owner)
            if id(module) in done:
                continue
            done.add(id(module))
            for leaf in layout.moves:
                tensor = getattr(module, leaf)
                tensor.data = layout.to_original(leaf, tensor.detach())
        for handle in self.host.__dict__.pop("_sparsify_hooks", []):
            handle.remove()
        for name, parameter in self.host.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))
        ignored = {s.block_name for s in self.program.slices}
        keys = getattr(self.host, "_keys_to_ignore_on_save", None)
        if keys:
            self.host._keys_to_ignore_on_save = [k for k in keys if k not in ignored] or None  # type: ignore[assignment]
        self.host.__dict__.pop("sparsify", None)
        return self.host

    def export_lora(self, directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write an adapter as a PEFT LoRA directory that computes the same logits (a slice is low-rank with a one-hot factor)."""
        source = self.current() if name is None and self.active.trainable else self.get(name or DEFAULT)
        shapes = {n: p.shape for n, p in self.host.named_parameters()}
        path = getattr(getattr(self.host, "config", None), "_name_or_path", None) or None
        return peft_format.export(source, shapes, directory, path)


def is_transposed(piece: TrainedSlice) -> bool:
    """Whether the stored weight is `(in, out)`."""
    logical: Literal[0, 1] = 1 if piece.side == "column" else 0
    return piece.axis != logical
