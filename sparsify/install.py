"""Install: carry the lowered program back into a host of the user's own class.

    the user's module tree ──copy (tensors shared)──▶ host: reordered tensors rebound, sliced linears swapped, state-dict
    hooks that speak the original layout, everything frozen but the trained slices

The module that the user passed in is not written to: the copy has its own Parameter objects over the same memory, except
where a tensor was reordered or carries a slice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import PlanError
from sparsify.lowrank_ops import write_values
from sparsify.masked import mask_modules
from sparsify.module_tree import copy_module_tree
from sparsify.modules import (
    AdaptedMixin,
    PartialMixin,
    QuantizedMixin,
    SparseLowRankMixin,
    attach_parts,
    attach_slice,
    become,
    low_rank_delta,
)
from sparsify.ops import write_block, write_block_at
from sparsify.passes.assign_rules import owner_name
from sparsify.permutation import invert_index
from sparsify.plan import nearest
from sparsify.program import Program, TrainedSlice
from sparsify.quantized_bases import StandIn
from sparsify.sharded import cut_like, is_sharded, whole, whole_parameters


@dataclass
class Layout:
    """State-dict hooks of one module: what leaves is in original names, shapes and order; what enters is reordered.

    moves: per tensor of the module, `(axis, index)` pairs with `current = original.index_select(axis, index)`.
    A weight leaves as what the model computes with (trained parts folded in), and the trained parts leave beside it in full
    precision, so that a checkpoint resumes exactly. On the way in the parts are used; a checkpoint without them can still be
    loaded where the parts follow from the weight (whole trained channels), and is refused where they do not.
    adopt: called with a support that differs from the module's own (a mask collected before the checkpoint).
    """

    moves: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    adopt: Callable[[Tensor], None] | None = None
    inverses: dict[str, list[tuple[int, Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        self.inverses = {leaf: [(a, invert_index(i)) for a, i in moves] for leaf, moves in self.moves.items()}

    def to_original(self, leaf: str, tensor: Tensor) -> Tensor:
        for axis, inverse in reversed(self.inverses.get(leaf, [])):
            tensor = tensor.index_select(axis, inverse.to(tensor.device))
        return tensor

    def to_current(self, leaf: str, tensor: Tensor) -> Tensor:
        for axis, index in self.moves.get(leaf, []):
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor

    def on_save(self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        folded = isinstance(module, AdaptedMixin) and prefix + "weight" in state
        if folded:
            with whole_parameters(module):
                weight = self.to_original("weight", effective_weight(module))
            state[prefix + "weight"] = cut_like(weight, module.weight)
        for leaf in self.moves:
            tensor = state.get(prefix + leaf)
            if isinstance(tensor, Tensor) and not (folded and leaf == "weight"):
                state[prefix + leaf] = cut_like(self.to_original(leaf, whole(tensor.detach())), tensor)

    def on_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Reorder what enters. Of a sharded module everything is gathered first and cut again afterwards."""
        names = [prefix + leaf for leaf in module._parameters]
        pieces: dict[str, Any] = {n: state[n] for n in names if is_sharded(state.get(n))}
        state.update({name: whole(piece) for name, piece in pieces.items()})
        with whole_parameters(module):
            self.reorder_loaded(module, state, prefix, *rest)
        for leaf, parameter in module._parameters.items():
            name = prefix + leaf
            if is_sharded(parameter) and isinstance(state.get(name), Tensor):
                state[name] = cut_like(state[name], pieces.get(name, parameter))

    def reorder_loaded(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1] if rest and isinstance(rest[-1], list) else []
        for leaf in self.moves:
            tensor, own = state.get(prefix + leaf), getattr(module, leaf)
            shape = module.stored_shape() if leaf == "weight" and isinstance(module, AdaptedMixin) else own.shape
            if isinstance(tensor, Tensor) and tensor.shape == shape:
                state[prefix + leaf] = self.to_current(leaf, tensor)
        weight = state.get(prefix + "weight")
        if (
            not isinstance(module, AdaptedMixin)
            or not isinstance(weight, Tensor)
            or weight.shape != module.stored_shape()
        ):
            return
        if isinstance(module, SparseLowRankMixin):
            self.load_parts(module, state, prefix, errors)
        else:
            if rest and rest[0].get("assign_to_params_buffers") and "weight" not in self.moves:
                weight = state[prefix + "weight"] = (
                    weight.clone()
                )  # the region under the block is scratch: not the caller's
            self.load_slice(module, state, prefix, weight)

    def load_slice(self, module: Any, state: dict[str, Any], prefix: str, weight: Tensor) -> None:
        if module.slice_start < 0 and module.slice_channels.device.type == "meta":
            return  # which channels they are is not known yet; the block is taken as it comes
        region = read_slice(module, weight)
        block = state.get(prefix + "weight_slice")
        if (
            not isinstance(block, Tensor)
            or block.shape != region.shape
            or not torch.equal(block.to(region.dtype), region)
        ):
            state[prefix + "weight_slice"] = region.to(module.weight_slice.dtype, copy=True).contiguous()

    def load_parts(self, module: Any, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
        weight = state[prefix + "weight"]
        own = [n for n in ("weight_slice", "sparse_values", "lora_A", "lora_B") if n in module._parameters]
        missing = [n for n in own if prefix + n not in state]
        if missing:
            errors.append(
                f"{prefix}weight: the checkpoint holds the folded weight but not {missing[0]}, and the parts cannot be told apart "
                "again; load it into an uncompiled model, or load the adapter with model.sparsify.load_adapter"
            )
        index = state.get(prefix + "sparse_index")
        if isinstance(index, Tensor) and self.adopt is not None and index.shape == module.sparse_index.shape:
            if module.sparse_index.is_meta:
                errors.append(
                    f"{prefix}sparse_index: the model is on the meta device, and its support there cannot be compared with the "
                    "checkpoint's; load it into a model that has its buffers (accelerate: fsdp_cpu_ram_efficient_loading: false)"
                )
            elif bool((index < 0).any()):
                if not module.mask_open:
                    errors.append(f"{prefix}sparse_index: the checkpoint's mask was still open, this model's is chosen")
            elif module.mask_open or not torch.equal(index.to(module.sparse_index), module.sparse_index):
                self.adopt(index)
        if not missing and not same_base(module, state, prefix):
            errors.append(
                f"{prefix}weight: the checkpoint was made over another base, and only its trained parts would be taken; "
                "compile the base that it was trained on (for Quantize, with the same format), then load it"
            )
        if module.weight.device.type != "meta":
            state[prefix + "weight"] = module.weight.detach()  # the frozen base stays; the parts carry the training
        elif isinstance(module, QuantizedMixin):
            state[prefix + "weight"] = weight.new_empty(0)
        elif "lora_B" in own and not missing and not weight.is_meta and bool(state[prefix + "lora_B"].any()):
            errors.append(
                f"{prefix}weight: the model is on the meta device and has no base, and the checkpoint's weight has a trained "
                "low-rank part folded in, from which the base does not follow exactly; load it into a model that has its base "
                "(accelerate: fsdp_cpu_ram_efficient_loading: false)"
            )


@dataclass
class SaveHook:
    """`Layout.on_save` as an object that torch may set attributes on and that deep-copies with its layout."""

    layout: Layout

    def __call__(self, *arguments: Any) -> None:
        self.layout.on_save(*arguments)


@dataclass
class LoadHook:
    """`Layout.on_load`, likewise."""

    layout: Layout

    def __call__(self, *arguments: Any) -> None:
        self.layout.on_load(*arguments)


def same_base(module: Any, state: dict[str, Any], prefix: str) -> bool:
    """Whether a checkpoint's folded weight is this module's base plus the checkpoint's parts, up to rounding."""
    weight = state[prefix + "weight"]
    parts = {
        n: state[prefix + n] for n in ("weight_slice", "sparse_values", "lora_A", "lora_B") if n in module._parameters
    }
    own = {n: module._parameters[n] for n in parts}
    if any(t.device.type == "meta" for t in (weight, *parts.values(), *own.values())):
        return True
    if any(parts[n].shape != own[n].shape for n in parts):
        return True  # torch says so itself
    try:
        for name, value in parts.items():
            module._parameters[name] = nn.Parameter(value.to(own[name].device, own[name].dtype), requires_grad=False)
        expected = effective_weight(module).float()
    finally:
        module._parameters.update(own)
    error = (expected - weight.to(expected.device).float()).norm() / expected.norm().clamp_min(1e-30)
    rounding = max(torch.finfo(weight.dtype).eps, torch.finfo(module.weight.dtype).eps)
    return bool(error <= max(1e-5, 4 * rounding))


def read_slice(module: Any, stored: Tensor) -> Tensor:
    """The trained channels in a tensor laid out like the module's stored weight; logical `(out, in)` layout."""
    logical = stored.t() if module.conv1d else stored
    if module.slice_start < 0:
        return logical.index_select(module.slice_axis, module.slice_channels.to(stored.device))
    return logical.narrow(module.slice_axis, module.slice_start, module.weight_slice.shape[module.slice_axis])


def effective_weight(module: Any) -> Tensor:
    """A fresh tensor: the weight that an adapted module computes with, stored layout, all trained parts folded in."""
    if isinstance(module, QuantizedMixin):
        weight = module.dense()
    else:
        weight = module.weight.detach().clone()
        if isinstance(module, PartialMixin):
            logical = weight.t() if module.conv1d else weight
            block = module.trained_block().detach()
            if module.slice_start < 0:
                write_block_at(logical, block, module.slice_channels, module.slice_axis)
            else:
                write_block(logical, block, module.slice_start, module.slice_axis)
    if isinstance(module, SparseLowRankMixin):
        values, index, a, b = module.parts()
        write_values(weight, None if values is None else values.detach(), index)
        if a is not None and b is not None:
            weight = (weight.float() + low_rank_delta(module)).to(weight.dtype)
    return weight.detach()


def module_prefixes(name: str) -> list[str]:
    """Names of the modules that hold a parameter, outermost first: `a.b.weight` → `a`, `a.b`."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def trained_in_full(program: Program, patterns: tuple[str, ...]) -> set[str]:
    """Parameters that `Plan(train=…)` names, by parameter or module pattern."""
    names = {n for n, k in program.aliases.items() if n == k and program.tensor(n).is_floating_point()}
    names &= {n for n, _ in program.host.named_parameters()}
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if fnmatchcase(n, pattern) or any(fnmatchcase(p, pattern) for p in module_prefixes(n))}
        if not hits:
            modules = {p for n in names for p in module_prefixes(n)}
            raise PlanError(
                f"Plan(train=[{pattern!r}]) matches no parameter or module{nearest(pattern, sorted(modules | names))}"
            )
        found |= hits
    changed = {x.param for things in (program.slices, program.moves, program.lowranks) for x in things}
    clash = found & (changed | set(program.quantize))
    if clash:
        raise PlanError(
            f"Plan(train=…) names {sorted(clash)[0]}, which a rule reorders or trains in part; name one or the other"
        )
    return found


def copy_host(program: Program, train: set[str], whole: bool = False) -> nn.Module:
    """Copy the module tree; parameters are new objects over shared memory, frozen unless they train (and own their memory).

    train: names that train. whole: everything trains that did in the user's model (a plan that only prunes).
    """
    host = program.host
    memo: dict[int, Any] = {}
    for name, parameter in host.named_parameters():
        name = program.aliases.get(name, name)
        value = program.tensors.get(name, parameter.detach())
        if name in program.quantize:
            value = parameter.detach().new_empty(0)
        trains = name in train or (whole and parameter.requires_grad)
        memo[id(parameter)] = nn.Parameter(value.clone() if trains else value, requires_grad=trains)
    for name, buffer in host.named_buffers():
        name = program.aliases.get(name, name)
        memo[id(buffer)] = program.tensors[name] if name in program.tensors else buffer.detach().clone()
    return copy_module_tree(host, memo, leave_out=("sparsify",))


def layouts(program: Program) -> dict[str, Layout]:
    """One `Layout` per module that owns a reordered tensor or a changed weight."""
    found: dict[str, Layout] = {}
    for move in program.moves:
        for name in names_of(program, move.param):
            owner, _, leaf = name.rpartition(".")
            found.setdefault(owner, Layout()).moves.setdefault(leaf, []).append((move.axis, move.index))
    for param in changed_weights(program):
        for name in names_of(program, param):
            found.setdefault(owner_name(name), Layout())
    for layout in found.values():
        layout.refresh()
    return found


def names_of(program: Program, param: str) -> list[str]:
    """Every name of a tensor (shared modules have several)."""
    return [n for n, canonical in program.aliases.items() if canonical == param]


def changed_weights(program: Program) -> list[str]:
    """Weights whose module is swapped: sliced, with a sparse or low-rank part, or packed."""
    pieces = [s.param for s in program.slices] + [p.param for p in program.lowranks]
    return list(dict.fromkeys([*pieces, *program.quantize]))


def swap_modules(program: Program, host: nn.Module) -> list[str]:
    """Turn the owners of changed weights into adapted modules. Returns the names of tensors that DDP need not send."""
    pieces = {s.param: s for s in program.slices}
    parts = {p.param: p for p in program.lowranks}
    shapes = {p.param: p.shape for p in program.packings}
    fixed: list[str] = []
    for param in changed_weights(program):
        owner = owner_name(param)
        module: Any = host.get_submodule(owner)
        piece, part = pieces.get(param), parts.get(param)
        packed = program.packed.get(param)
        if packed is not None:
            casts = isinstance(module, StandIn)
            if casts:
                module.__class__ = nn.Linear
            become(module, "Quantized")
            module.format, module.shape = program.quantize[param], shapes[param]
            if casts:
                module.compute_dtype = program.bases[param].dtype
            module.packed_names = tuple(f"packed_{i}" for i in range(len(packed)))
            for name, tensor in zip(module.packed_names, packed, strict=True):
                module.register_buffer(name, tensor, persistent=False)
                fixed.append(f"{owner}.{name}")
        else:
            become(module, "SparseLowRank" if part is not None else "Partial")
        if piece is not None:
            bits = program.tensors.get(f"{owner}.slice_mask_bits")
            attach_slice(module, piece, program.tensors[piece.block_name], bits)
        if part is not None or packed is not None:
            leaves = ("sparse_values", "sparse_index", "lora_A", "lora_B")
            found = {n: program.tensors[f"{owner}.{n}"] for n in leaves if part and f"{owner}.{n}" in program.tensors}
            attach_parts(module, part, found)
        fixed += [f"{owner}.{n}" for n in ("sparse_index", "slice_channels", "slice_mask_bits") if n in module._buffers]
    return fixed


def install(
    program: Program, train: tuple[str, ...] = (), *, whole: bool = False
) -> tuple[nn.Module, dict[str, Layout]]:
    """The host copy with the program's nodes in it, and the layouts whose hooks it carries.

    whole: the plan has no rule that trains parts beside a frozen base, so a pruned model trains all survivors.
    """
    whole = whole and bool(program.masks) and not program.quantize
    host: Any = copy_host(program, trained_in_full(program, train), whole)
    fixed = swap_modules(program, host)
    if whole:
        mask_modules(host, program.masks)
    if fixed:  # equal on all ranks by construction, and large
        host._ddp_params_and_buffers_to_ignore = [*getattr(host, "_ddp_params_and_buffers_to_ignore", []), *fixed]
    found = layouts(program)
    handles = []
    done: set[int] = set()
    for owner, layout in found.items():
        module = host.get_submodule(owner)
        if id(module) in done:
            continue
        done.add(id(module))
        handles.append(module.register_state_dict_post_hook(SaveHook(layout)))
        handles.append(module.register_load_state_dict_pre_hook(LoadHook(layout)))
    shared = {n for n in program.aliases if program.aliases[n] == n} - set(program.tensors)
    handles.append(host.register_load_state_dict_pre_hook(Unshare(shared)))
    implied = [s.block_name for s in program.slices if follows_from_weight(program, s)]
    if implied:
        ignore_on_save(host, implied)
    host.__dict__["_sparsify_hooks"] = handles
    return host, found


def ignore_on_save(host: nn.Module, names: list[str]) -> None:
    """Tell every Hugging Face module of the host which of its tensors `save_pretrained` need not write.

    A wrapper may show the attribute of the module inside it as a property that cannot be set: that module is told itself.
    """
    for prefix, module in host.named_modules():
        if not isinstance(getattr(module, "_keys_to_ignore_on_save", ()), list | set | None):
            continue
        start = f"{prefix}." if prefix else ""
        own = [name.removeprefix(start) for name in names if name.startswith(start)]
        if own and not isinstance(inspect.getattr_static(module, "_keys_to_ignore_on_save"), property):
            module._keys_to_ignore_on_save = [*(module._keys_to_ignore_on_save or []), *own]


def save_again(host: nn.Module, names: set[str]) -> None:
    """Undo `ignore_on_save` for these tensors."""
    for prefix, module in host.named_modules():
        start = f"{prefix}." if prefix else ""
        ignored = module.__dict__.get("_keys_to_ignore_on_save")
        if ignored:
            module._keys_to_ignore_on_save = [k for k in ignored if start + k not in names] or None


def follows_from_weight(program: Program, piece: TrainedSlice) -> bool:
    """Whether the folded weight holds every bit of the block, so that `save_pretrained` need not write it again."""
    if piece.param in program.quantize:
        return False
    return program.tensors[piece.block_name].dtype == program.tensors[piece.param].dtype


@dataclass
class Unshare:
    """Before a checkpoint is loaded: parameters that still share memory with the user's model get their own, where values differ."""

    names: set[str]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        if any(is_sharded(p) for p in module.parameters()):
            return  # fully_shard gave every parameter memory of its own
        for name in sorted(self.names):
            incoming = state.get(prefix + name)
            owner, _, leaf = name.rpartition(".")
            own = getattr(module.get_submodule(owner), leaf, None)
            if not isinstance(own, nn.Parameter) or not isinstance(incoming, Tensor) or own.device.type == "meta":
                continue
            if incoming.shape == own.shape and not torch.equal(incoming.to(own.device, own.dtype), own.detach()):
                own.data = own.data.clone()
                self.names.discard(name)
