"""`model.sparsify`: what a user does with a compiled model besides training it."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from sparsify.adapters import adapter as files
from sparsify.adapters.adapter import Adapter
from sparsify.console import printable
from sparsify.errors import AdapterError, SparsifyError
from sparsify.files.ranks import from_first_rank, is_first_rank, on_first_rank
from sparsify.host.adapters import DEFAULT, adapter_from, get, load_adapter, save_adapter
from sparsify.host.anchors import Anchor, anchors_of
from sparsify.host.export_lora import export_lora
from sparsify.host.fuse_adapters import fuse_adapters, overlap
from sparsify.host.habits import answer, peft_words, take_words
from sparsify.host.install import twins_of
from sparsify.host.layer_status import LayerStatus, layer_status
from sparsify.host.live_state import original as in_original_names
from sparsify.host.merge import MergeNote, merge, unmerge
from sparsify.host.mix import Conflict, Mix, put_back
from sparsify.host.moved_buffers import Buffers
from sparsify.host.plain import plain, restore
from sparsify.host.same_base import in_pieces
from sparsify.host.switch import add_adapter, reset_to_base, set_adapter
from sparsify.host.switch_lock import SwitchLock, guard
from sparsify.methods.packed import QuantizedMixin
from sparsify.methods.part import LivePart, Snapshot, TrainedPart
from sparsify.methods.supports import Adopt, open_masks, reset_lowrank, set_masks
from sparsify.model.linears import owner_name
from sparsify.model.sharded import Released, back_to_pieces, whole
from sparsify.modules.adapted import AdaptedMixin
from sparsify.modules.layout import Layout, packed_leaves
from sparsify.modules.masked import masked_parameters
from sparsify.plan import Plan
from sparsify.program import Program
from sparsify.show.parameter_count import count_parameters
from sparsify.show.report import Report, make_report

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sparsify.pruning.sparse_checkpoint import SizeReport

P = ParamSpec("P")
T = TypeVar("T")


def reads(method: Callable[Concatenate[Handle, P], T]) -> Callable[Concatenate[Handle, P], T]:
    """A verb that looks at the host: it is the one that was compiled, and nobody switches meanwhile."""

    @functools.wraps(method)
    def guarded(self: Handle, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock.reading():
            self.check(method.__name__)
            return method(self, *args, **kwargs)

    return guarded


def writes(method: Callable[Concatenate[Handle, P], T]) -> Callable[Concatenate[Handle, P], T]:
    """A verb that changes what the host computes with: no forward runs meanwhile."""

    @functools.wraps(method)
    def guarded(self: Handle, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock.writing(method.__name__, self.host):
            self.check(method.__name__)
            return method(self, *args, **kwargs)

    return guarded


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
    cpu: object = None  # what lowering to the CPU reports
    parts: dict[str, LivePart[TrainedPart, AdaptedMixin]] = field(default_factory=dict)
    base_full: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: Mix = field(default_factory=lambda: Mix({DEFAULT: 1.0}, trainable=True))
    merged: bool = False
    merge_note: MergeNote | None = None
    parked: dict[str, dict[str, Snapshot]] = field(default_factory=dict)
    backups: list[tuple[str, int | None, Tensor, Tensor]] = field(default_factory=list)
    merge_backups: dict[str, list[Tensor]] = field(default_factory=dict)
    released: dict[str, Released] = field(default_factory=dict)  # verb → what fully_shard let go of, while it lasts
    same_base: bool = False  # under fully_shard: the ranks have agreed on what the base holds
    owned: set[str] = field(default_factory=set)
    serving: bool = False  # made by `sparsify.load`: nothing trains, and adapters bring what trained in full with them
    buffers: Buffers = field(init=False)
    anchors: dict[str, Anchor] = field(init=False)
    lock: SwitchLock = field(init=False)

    def __post_init__(self) -> None:
        for part in self.program.parts:
            layout = self.layout(part.param)
            module = self.module(part.param)
            assert isinstance(module, AdaptedMixin)
            live = self.parts[part.param] = part.live(module, layout, self.plan.seed)
            twins = twins_of(self.program, self.host, part.param).values()
            live.twins = tuple(twin for twin in twins if isinstance(twin, AdaptedMixin))
            if live.takes_support:
                layout.adopt = Adopt(self, part.param)
            if live.keeps_base or self.is_packed(part.param):
                layout.base_loaded = OtherBase(live)
        for name in self.train:
            self.base_full[name] = self.stored(name).detach().clone()
        self.buffers = Buffers.of(self.host)
        touched = [*self.parts, *self.train, *(m.param for m in self.program.moves), *self.program.quantize]
        self.anchors = anchors_of(self.host, touched)
        self.lock, hooks = guard(self.host)
        take_words(self.host)
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

    def param_groups(
        self, sparse_lr: float, lora_lr: float, lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups with separate learning rates: RoSA's sparse values, its low-rank factors, and everything else.

        The paper uses 2e-4 and 7e-4. `lr` for the rest (channels, parameters that train in full) defaults to `sparse_lr`. Values of
        weights are in groups without weight decay, see `sparsify.train.param_groups`.
        """
        self.check("param_groups")
        from sparsify.modules.decay import param_groups

        rest = sparse_lr if lr is None else lr
        return param_groups(self.host, lr=rest, sparse_lr=sparse_lr, lora_lr=lora_lr, weight_decay=weight_decay)

    def __repr__(self) -> str:
        return f"<sparsify: {len(self.parts)} trained parts, active {self.active}{', merged' if self.merged else ''}>"

    def __deepcopy__(self, memo: dict[int, object]) -> Handle:
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
        clone.program = replace(self.program, host=clone.host)
        clone.released = {}  # a model in pieces cannot be copied
        return clone

    # --- tensors ---------------------------------------------------------------------------------------------------------

    def module(self, param: str) -> nn.Module:
        """The module of the host that owns a parameter."""
        return self.host.get_submodule(owner_name(param))

    def stored(self, param: str) -> nn.Parameter:
        """A parameter of the host as it lies there."""
        return getattr(self.module(param), param.rpartition(".")[2])

    def own(self, param: str) -> nn.Parameter:
        """The stored weight, in memory of its own: what the plan did not change is shared with the user's model until now."""
        weight = self.stored(param)
        if param not in self.program.tensors and param not in self.owned:
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
            self.owned.add(param)
        return weight

    def layout(self, param: str) -> Layout:
        """How the weights of a module lie, against the original order."""
        return self.layouts.get(owner_name(param)) or Layout()

    @property
    def dequantised(self) -> bool:
        """Whether `sparsify.load` replaced the base by what a packed one stands for (their hashes are kept)."""
        return self.serving and bool(self.hashes)

    def is_packed(self, param: str) -> bool:
        """Whether a weight is stored quantised."""
        return isinstance(self.module(param), QuantizedMixin)

    def shapes(self) -> dict[str, torch.Size]:
        """Stored shape of every parameter, packed weights included."""
        added = {id(p) for part in self.parts.values() for p in part.parameters()}
        for module in self.host.modules():
            added |= {id(getattr(module, leaf)) for leaf in packed_leaves(module)}
        found = {n: p.shape for n, p in self.host.named_parameters() if id(p) not in added}
        packed = {p: self.module(p) for p in self.program.quantize}
        return found | {p: m.shape for p, m in packed.items() if isinstance(m, QuantizedMixin)}

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
        return adapter_from(self, None)

    @reads
    def get(self, name: str) -> Adapter:
        """An adapter by name, trained here or loaded."""
        return get(self, name)

    @peft_words
    @reads
    def save_adapter(self, directory: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write an adapter (the active one unless named) as safetensors + JSON, in original coordinates, atomically.

        Under `fully_shard` every rank must call it: the parts are gathered, and the first rank writes.
        """
        return save_adapter(self, directory, name)

    @peft_words
    @writes
    def load_adapter(self, directory: str | os.PathLike[str], name: str = DEFAULT, *, strict: bool = True) -> None:
        """Read an adapter and keep it under `name`; `set_adapter(name)` makes it active.

        directory: ours, or a PEFT LoRA directory, or `owner/name[@revision]` of a model hub.
        strict: refuse an adapter that was trained on another base (PEFT's files do not say). Nothing of the model is touched.
        """
        load_adapter(self, directory, name, strict=strict)

    @peft_words
    @writes
    def set_adapter(self, spec: str | Mapping[str, float] | Sequence[str] | None) -> Mix:
        """Make an adapter active (a name), none (None: the base, bit for bit), or a weighted mix (`{"a": .5, "b": .5}`; a list of names
        is their sum).

        One adapter over the compiled selection goes on training; a mix, or an adapter of another selection, is for inference.
        Returns what is active and where mixed adapters overlap. A switch writes the trained channels or entries of each
        weight, not the weight (a low-rank adapter on a linear compiled without one is the exception: it adds a dense product).
        """
        return set_adapter(self, spec)

    @peft_words
    @writes
    def fuse_adapters(self, weights: Mapping[str, float], name: str) -> Adapter:
        """Keep the weighted sum of some adapters under a new name: `save_adapter(folder, name)` writes it as one, `set_adapter(name)` is
        the mix, to rounding. Best without overlap (`overlap`, `S2FT(avoid=…)`). Raises AdapterError for what has no sum (trained in full).
        """
        return fuse_adapters(self, weights, name)

    @reads
    def overlap(self, first: str, second: str) -> tuple[Conflict, ...]:
        """Where two adapters change the same channels or entries of one weight, before they are mixed; empty where they are disjoint.

        `shared` of `total` counts what both change and what either does. Low-rank parts and changes across each other (columns of the one,
        rows of the other) meet everywhere and are listed with kind "whole", one of one.
        """
        return overlap(self, first, second)

    def need_base(self, part: LivePart[TrainedPart, AdaptedMixin], verb: str) -> None:
        """Raise AdapterError where the base below a trained part is not known."""
        if not part.base_known:
            raise AdapterError(
                f"{verb}: a state dict that was loaded brought another base for {part.param}, and what that base holds where this "
                "model trains is not known; compile that base with the same plan, then load the state dict there"
            )

    @peft_words
    @writes
    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; if it is active, the base becomes active."""
        self.get(name)
        if name in self.active.weights:
            self.set_adapter(None)
        self.parked.pop(name, None)
        self.adapters.pop(name, None)

    @peft_words
    @writes
    def add_adapter(self, name: str) -> None:
        """Begin another adapter over the plan's selection: the active one is kept as it is, and the new one starts at the base and trains.

        Raises AdapterError when the name is taken, and where nothing trains.
        """
        add_adapter(self, name)

    @peft_words
    def delete_adapter(self, name: str) -> None:
        """`remove_adapter`, by PEFT's name."""
        self.remove_adapter(name)

    @property
    def active_adapters(self) -> list[str]:
        """Names of what is active: one, several of a mix, or none (the base)."""
        return list(self.active.weights)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base inside the block, bit for bit, and what was active before after it: `with model.sparsify.disable_adapter(): …`.

        Parameters that train have no gradients from inside. Raises SparsifyError while the adapter is merged.
        """
        before = next(iter(self.active.weights)) if self.active.trainable else dict(self.active.weights) or None
        self.set_adapter(None)
        try:
            yield
        finally:
            self.set_adapter(before)

    @peft_words
    def merge_and_unload(self) -> nn.Module:
        """`plain`, by PEFT's name: a plain model with what is active folded in. The host stays as it is."""
        return self.plain()

    @reads
    def get_layer_status(self) -> tuple[LayerStatus, ...]:
        """A row for every weight that the plan trains: what trains there, which adapters there are, what is active."""
        return layer_status(self)

    def __getattr__(self, word: str) -> Any:
        raise AttributeError(answer(word) if not word.startswith("_") else word)

    # --- open masks ------------------------------------------------------------------------------------------------------

    def open_masks(self) -> list[str]:
        """Weights whose RoSA mask is still to be collected."""
        return open_masks(self.program)

    @writes
    def set_masks(self, supports: Mapping[str, Int[Tensor, " k"]]) -> None:
        """Fix the support of sparse parts: flat entries of each stored weight in *original* coordinates, `count` of them.

        The values start at the base, so the forward does not move. `sparsify.train.rosa` collects supports from gradients.
        """
        self.need_unmerged("set_masks")
        self.require_default("set_masks")
        in_pieces(self)
        set_masks(self, supports)

    @writes
    def reset_lowrank(self) -> None:
        """Back to the initial factors (`B` = 0): RoSA's restart after its masks are collected."""
        self.require_default("reset_lowrank")
        in_pieces(self)
        reset_lowrank(self.parts)

    @writes
    def restart(self) -> None:
        """Back to the state after compile: factors, values, what trains in full and buffers are the base's; supports stay."""
        self.need_unmerged("restart")
        self.require_default("restart")
        in_pieces(self)
        reset_to_base(self)

    def require_default(self, verb: str) -> None:
        """Raise SparsifyError unless an adapter is active that trains."""
        if not self.active.trainable:
            raise SparsifyError(f"{verb}: make a trained adapter active first (now: {self.active})")

    # --- folding ---------------------------------------------------------------------------------------------------------

    def need_unmerged(self, verb: str) -> None:
        """Raise SparsifyError while an adapter is merged."""
        if self.merged:
            raise SparsifyError(f"{verb}: the adapter is merged into the weights; call unmerge() first")

    @peft_words
    @writes
    def merge(self) -> nn.Module:
        """Fold what is active into plain weights, served at the base's speed. `unmerge` takes it back bit for bit.

        Low-rank parts are added to the dense weight, whose original is kept. Under `fully_shard` every rank must call it; one weight at a
        time is whole, and trained parts leave their group until `unmerge`. A packed weight is quantised again: the result
        moves by what `merge_note` says and a warning repeats; `save_adapter` keeps base + delta exactly instead.
        """
        return merge(self)

    @reads
    def save_sparse(self, path: str | os.PathLike[str], **options: Unpack[SparseOptions]) -> SizeReport:
        """Write the model as a compressed sparse checkpoint (bitmask + values); returns its `SizeReport`.

        Under `fully_shard` every rank must call it: tensors are gathered, and the first rank writes.
        Opens again with `sparsify.pruning.sparse_checkpoint.open_sparse`. Names, shapes and order are the original model's. When Prune
        made the model sparse, the file records the hash of the dense model, which `open_sparse(path, base=dense_model)` checks.
        """
        if not back_to_pieces(self.host):
            return self.write_sparse(self.original_state_dict(), path, options)
        first = is_first_rank()
        state = self.gathered_state(torch.device("cpu" if first else "meta"))
        found: list[SizeReport] = []
        on_first_rank(lambda: found.append(self.write_sparse(state, path, options)))
        return from_first_rank(found[0] if first else None)

    def gathered_state(self, place: torch.device) -> dict[str, Tensor]:
        """`original_state_dict` of a host in pieces: every tensor is gathered on all ranks and then put to `place`."""
        found = in_original_names(self.host, self.host.state_dict(), gather_to=place)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def write_sparse(
        self, state: Mapping[str, Tensor], path: str | os.PathLike[str], options: SparseOptions
    ) -> SizeReport:
        """`save_sparse`, of tensors in original names."""
        from sparsify.pruning.sparse_checkpoint import save_sparse

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
        options.setdefault("base", self.program.dense_hash)
        return save_sparse(state, Path(path), masks=masks, **options)

    def mask_original(self, name: str, mask: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """A mask of a stored weight in original coordinates."""
        return self.layout(name).to_original(name.rpartition(".")[2], mask)

    @peft_words
    @writes
    def unmerge(self) -> nn.Module:
        """Undo `merge`: the same Parameter objects come back, so an optimizer goes on."""
        return unmerge(self)

    @writes
    def restore(self) -> nn.Module:
        """Back to the base, bit for bit, in original order and as plain modules; the host leaves sparsify's hands."""
        return restore(self)

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

        Pruned entries are exact zeros in it. The copy shares nothing with the host. Under `fully_shard` every rank must call it: each gets
        a whole copy, not sharded, in host memory. Tied weights are tied in it where both sides still
        hold the same; else a warning names them, every name has a tensor of its own, and `config.tie_word_embeddings` is False.
        """
        return plain(self)

    @reads
    def export_lora(
        self,
        directory: str | os.PathLike[str],
        name: str | None = None,
        *,
        sparse: str = "refuse",
        changed_base: str = "refuse",
        engine: str = "peft",
        max_lora_rank: int | None = None,
    ) -> Path:
        """Write an adapter as a PEFT LoRA directory that computes the same logits.

        Trained channels and low-rank parts export exactly. A sparse part is not low-rank: it is refused with that reason, or with
        `sparse="merge"` folded into a copy of the base that is written to `directory/base` (Hugging Face models) beside it.
        After Quantize or Prune the adapter belongs to the changed base, which PEFT must be given: a warning says so after
        Quantize, and after Prune it is refused, unless `changed_base="keep"` says that PEFT will load it over the same changed base.
        What trained in full is written where PEFT loads it to the same function, see `sparsify.adapters.peft_export`.

        engine: who reads the directory. "vllm" writes the same files, and refuses with every reason, before anything is written, what
        vLLM would refuse: what trained in full, biases, embeddings, packed experts, ranks above `max_lora_rank` (None: above 512).
        `sparsify.adapters.vllm_check.check_for_vllm` is that report: rank and padding of every linear, and the line that serves it.
        """
        return export_lora(
            self, directory, name, sparse=sparse, changed_base=changed_base, engine=engine, max_lora_rank=max_lora_rank
        )


class SparseOptions(TypedDict, total=False):
    """What `Handle.save_sparse` hands on to `sparsify.pruning.sparse_checkpoint.save_sparse`."""

    base: nn.Module | str | Path | None
    metadata: Mapping[str, str] | None


@dataclass
class OtherBase:
    """Called while a state dict with another base is loaded, with that base's weight as it lies here (None: not known)."""

    part: LivePart[TrainedPart, AdaptedMixin]

    def __call__(self, weight: Float[Tensor, "*experts p q"] | None) -> None:
        self.part.base_known = weight is not None
        if weight is not None:
            self.part.take_base(weight)


__all__ = ["Conflict", "Handle", "MergeNote", "Mix"]
