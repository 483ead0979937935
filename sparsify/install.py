"""Install: carry the lowered program back into a host of the user's own class.

    the user's module tree ──copy (tensors shared)──▶ host: reordered tensors rebound, sliced linears swapped, state-dict
    hooks that speak the original layout, everything frozen but the trained slices

The module that the user passed in is not written to: the copy has its own Parameter objects over the same memory, except
where a tensor was reordered or carries a slice.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import PlanError
from sparsify.modules import PartialMixin, make_partial
from sparsify.passes.assign_rules import owner_name
from sparsify.permutation import invert_index
from sparsify.plan import nearest
from sparsify.program import Program


@dataclass
class Layout:
    """State-dict hooks of one module: what leaves is in original names, shapes and order; what enters is reordered.

    moves: per tensor of the module, `(axis, index)` pairs with `current = original.index_select(axis, index)`.
    A trained block leaves twice: inside its weight (what everybody else reads), and as `weight_slice` in full precision,
    which `save_pretrained` drops. On the way in the block is used if it agrees with its weight, else derived from it.
    """

    moves: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
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
        if isinstance(module, PartialMixin) and prefix + "weight" in state:
            weight = state[prefix + "weight"].detach().clone()
            region_of(module, weight).copy_(module.weight_slice.detach())
            state[prefix + "weight"] = weight
        for leaf in self.moves:
            if isinstance(state.get(prefix + leaf), Tensor):
                state[prefix + leaf] = self.to_original(leaf, state[prefix + leaf].detach())

    def on_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        for leaf in self.moves:
            tensor, own = state.get(prefix + leaf), getattr(module, leaf)
            if isinstance(tensor, Tensor) and tensor.shape == own.shape:
                state[prefix + leaf] = self.to_current(leaf, tensor)
        weight = state.get(prefix + "weight")
        if not isinstance(module, PartialMixin) or not isinstance(weight, Tensor) or weight.shape != module.weight.shape:
            return
        region = region_of(module, weight)
        block = state.get(prefix + "weight_slice")
        if not isinstance(block, Tensor) or block.shape != region.shape or not torch.equal(block.to(region.dtype), region):
            state[prefix + "weight_slice"] = region.to(module.weight_slice.dtype, copy=True).contiguous()


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


def region_of(module: nn.Module, stored: Tensor) -> Tensor:
    """View of the trained channels in a tensor shaped like the module's stored weight; logical `(out, in)` layout."""
    assert isinstance(module, PartialMixin)
    logical = stored if module.logical_weight().shape == stored.shape and module.logical_weight() is module.weight else stored.t()
    return logical.narrow(module.slice_axis, module.slice_start, module.weight_slice.shape[module.slice_axis])


def trained_in_full(program: Program, patterns: tuple[str, ...]) -> set[str]:
    """Parameters that `Plan(train=…)` names, by parameter or module pattern."""
    names = {n for n, k in program.aliases.items() if n == k and program.tensor(n).is_floating_point()}
    names &= {n for n, _ in program.host.named_parameters()}
    found: set[str] = set()
    for pattern in patterns:
        hits = {
            n
            for n in names
            if fnmatchcase(n, pattern) or any(fnmatchcase(p, pattern) for p in module_prefixes(n))
        }
        if not hits:
            modules = {p for n in names for p in module_prefixes(n)}
            raise PlanError(f"Plan(train=[{pattern!r}]) matches no parameter or module{nearest(pattern, sorted(modules | names))}")
        found |= hits
    clash = found & ({s.param for s in program.slices} | {m.param for m in program.moves})
    if clash:
        raise PlanError(f"Plan(train=…) names {sorted(clash)[0]}, which a rule reorders or trains in part; name one or the other")
    return found


def copy_host(program: Program, train: set[str]) -> nn.Module:
    """Copy the module tree; parameters are new objects over shared memory, frozen unless in `train` (which get their own memory)."""
    host = program.host
    memo: dict[int, Any] = {}
    for name, parameter in host.named_parameters():
        name = program.aliases.get(name, name)
        value = program.tensors.get(name, parameter.detach())
        trains = name in train
        memo[id(parameter)] = nn.Parameter(value.clone() if trains else value, requires_grad=trains)
    for name, buffer in host.named_buffers():
        name = program.aliases.get(name, name)
        memo[id(buffer)] = program.tensors[name] if name in program.tensors else buffer.detach().clone()
    hidden = host.__dict__.pop("sparsify", None)
    try:
        return copy.deepcopy(host, memo)
    finally:
        if hidden is not None:
            host.__dict__["sparsify"] = hidden


def layouts(program: Program) -> dict[str, Layout]:
    """One `Layout` per module that owns a reordered tensor or a trained slice."""
    found: dict[str, Layout] = {}
    for move in program.moves:
        for name in [n for n, canonical in program.aliases.items() if canonical == move.param]:
            owner, _, leaf = name.rpartition(".")
            found.setdefault(owner, Layout()).moves.setdefault(leaf, []).append((move.axis, move.index))
    for piece in program.slices:
        for name in [n for n, canonical in program.aliases.items() if canonical == piece.param]:
            found.setdefault(owner_name(name), Layout())
    for layout in found.values():
        layout.refresh()
    return found


def install(program: Program, train: tuple[str, ...] = ()) -> tuple[nn.Module, dict[str, Layout]]:
    """The host copy with the program's nodes in it, and the layouts whose hooks it carries."""
    host = copy_host(program, trained_in_full(program, train))
    for piece in program.slices:
        make_partial(host.get_submodule(owner_name(piece.param)), piece, program.tensors[piece.block_name])
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
    ignored = [piece.block_name for piece in program.slices]
    if ignored and hasattr(host, "_keys_to_ignore_on_save"):
        host._keys_to_ignore_on_save = [*(host._keys_to_ignore_on_save or []), *ignored]
    host.__dict__["_sparsify_hooks"] = handles
    return host, found


@dataclass
class Unshare:
    """Before a checkpoint is loaded: parameters that still share memory with the user's model get their own, where values differ."""

    names: set[str]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        for name in sorted(self.names):
            incoming = state.get(prefix + name)
            owner, _, leaf = name.rpartition(".")
            own = getattr(module.get_submodule(owner), leaf, None)
            if not isinstance(own, nn.Parameter) or not isinstance(incoming, Tensor) or own.device.type == "meta":
                continue
            if incoming.shape == own.shape and not torch.equal(incoming.to(own.device, own.dtype), own.detach()):
                own.data = own.data.clone()
                self.names.discard(name)
