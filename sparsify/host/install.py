"""Install: carry the lowered program back into a host of the user's own class.

    the user's module tree ──copy (tensors shared)──▶ host: reordered tensors rebound, sliced linears swapped, hooks that take
    any state dict of the model, everything frozen but the trained slices

The module that the user passed in is not written to: the copy has its own Parameter objects over the same memory, except
where a tensor was reordered or carries a slice.
"""

from __future__ import annotations

import inspect

from torch import nn

from sparsify.host.live_state import LoadHook, RootHook, SaveHook, SavePretrained, Unshare
from sparsify.host.quantized_bases import StandIn
from sparsify.methods.packed import QuantizedMixin
from sparsify.methods.part import TrainedPart, beside, leaf_of
from sparsify.model.fast_paths import close_fast_paths
from sparsify.model.linears import owner_name
from sparsify.model.module_tree import copy_module_tree
from sparsify.model.packed_experts import GroupedLinear
from sparsify.modules.adapted import AdaptedMixin, become, make_linear
from sparsify.modules.layout import Layout
from sparsify.modules.masked import mask_modules
from sparsify.passes.train_in_full import module_prefixes, trained_in_full
from sparsify.program import Program

#: transformers' list of the tensors that `save_pretrained` leaves out
IGNORED = "_keys_to_ignore_on_save"


def copy_host(program: Program, train: set[str], whole: bool = False) -> nn.Module:
    """Copy the module tree; parameters are new objects over shared memory, frozen unless they train (and own their memory).

    train: names that train. whole: everything trains that did in the user's model (a plan that only prunes).
    """
    host = program.host
    memo: dict[int, object] = {}
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
        for name in program.names_of(move.param):
            owner, _, leaf = name.rpartition(".")
            found.setdefault(owner, Layout()).moves.setdefault(leaf, []).append((move.axis, move.index))
    for param in changed_weights(program):
        for name in program.names_of(param):
            found.setdefault(owner_name(name), Layout())
    for owner, layout in found.items():
        layout.lead = int(isinstance(program.host.get_submodule(owner), GroupedLinear))
        layout.refresh()
    return found


def changed_weights(program: Program) -> list[str]:
    """Weights whose module is swapped: with a trained part, or packed."""
    return list(dict.fromkeys([*(p.param for p in program.parts), *program.quantize]))


def swap_modules(program: Program, host: nn.Module) -> list[str]:
    """Turn the owners of changed weights into adapted modules. Returns the names of tensors that DDP need not send."""
    parts = {p.param: p for p in program.parts}
    shapes = {p.param: p.shape for p in program.packings}
    fixed: list[str] = []
    for param in changed_weights(program):
        owner = owner_name(param)
        module = host.get_submodule(owner)
        part = parts.get(param)
        packed = program.packed.get(param)
        if packed is not None:
            casts = isinstance(module, StandIn)
            if casts:
                make_linear(module)
            become(module, "Quantized")
            assert isinstance(module, QuantizedMixin)
            module.format, module.shape = program.quantize[param], shapes[param]
            if casts:
                module.compute_dtype = program.bases[param].dtype
            module.hold(packed)
            fixed += [beside(param, name) for name in module.packed_names]
            module.without_part()
        if part is not None:
            if packed is None:
                become(module, part.kind_of(module))
            assert isinstance(module, AdaptedMixin)
            names = {leaf: beside(param, leaf) for leaf in part.mixin.trained_leaves + part.mixin.part_buffers}
            part.attach(module, {leaf: program.tensors[n] for leaf, n in names.items() if n in program.tensors})
            fixed += [beside(param, leaf) for leaf in part.mixin.part_buffers if leaf in module._buffers]
            for name, twin in twins_of(program, host, param).items():
                become(twin, part.kind_of(twin))
                assert isinstance(twin, AdaptedMixin)
                part.attach(
                    twin, {leaf: getattr(module, leaf) for leaf in module.added_leaves() if hasattr(module, leaf)}
                )
                fixed += [beside(name, leaf) for leaf in part.mixin.part_buffers if leaf in twin._buffers]
    return fixed


def twins_of(program: Program, host: nn.Module, param: str) -> dict[str, nn.Module]:
    """Other modules of a host that hold a weight (tied), by their name for it; each once."""
    seen, found = {id(host.get_submodule(owner_name(param)))}, {}
    for name in program.names_of(param):
        module = host.get_submodule(owner_name(name))
        if id(module) not in seen:
            seen.add(id(module))
            found[name] = module
    return found


def install(
    program: Program, train: tuple[str, ...] = (), *, whole: bool = False
) -> tuple[nn.Module, dict[str, Layout]]:
    """The host copy with the program's nodes in it, and the layouts whose hooks it carries.

    whole: the plan has no rule that trains parts beside a frozen base, so a pruned model trains all survivors.
    """
    whole = whole and bool(program.masks) and not program.quantize
    host = copy_host(program, trained_in_full(program, train), whole)
    fixed = swap_modules(program, host)
    close_fast_paths(host, map(owner_name, changed_weights(program)))
    if whole:
        mask_modules(host, program.masks)
    if fixed:  # equal on all ranks by construction, and large
        ignored = [*getattr(host, "_ddp_params_and_buffers_to_ignore", []), *fixed]
        setattr(host, "_ddp_params_and_buffers_to_ignore", ignored)  # noqa: B010  no tensor, as nn.Module's types would have it
    found = layouts(program)
    holders = dict.fromkeys(p for owner in found for p in ["", *module_prefixes(f"{owner}.x")[:-1]])
    handles = [host.get_submodule(path).register_load_state_dict_pre_hook(RootHook()) for path in holders]
    for owner, layout in found.items():
        module = host.get_submodule(owner)
        if "_sparsify_layout" in module.__dict__:
            continue
        module.__dict__["_sparsify_layout"] = layout
        layout.mark(module)
        handles.append(module.register_state_dict_post_hook(SaveHook(layout)))
        handles.append(module.register_load_state_dict_pre_hook(LoadHook(layout)))
    shared: dict[str, set[str]] = {}
    for name, first in program.aliases.items():
        if name == first and name not in program.tensors:
            shared.setdefault(owner_name(name), set()).add(name.rpartition(".")[2])
    for owner, leaves in shared.items():
        handles.append(host.get_submodule(owner).register_load_state_dict_pre_hook(Unshare(leaves)))
    implied = [
        beside(name, leaf_of(trained))
        for part in program.parts
        if follows_from_weight(program, part)
        for name in program.names_of(part.param)
        for trained in part.trained_names()
    ]
    if implied:
        ignore_on_save(host, implied)
    if found and callable(getattr(type(host), "save_pretrained", None)):
        host.__dict__["save_pretrained"] = SavePretrained(host)
    host.__dict__["_sparsify_hooks"] = handles
    return host, found


def ignore_on_save(host: nn.Module, names: list[str]) -> None:
    """Tell every Hugging Face module of the host which of its tensors `save_pretrained` need not write.

    A wrapper may show the attribute of the module inside it as a property that cannot be set: that module is told itself.
    """
    for prefix, module in host.named_modules():
        ignored = getattr(module, IGNORED, ())
        if not isinstance(ignored, list | set | None):
            continue
        start = f"{prefix}." if prefix else ""
        own = [name.removeprefix(start) for name in names if name.startswith(start)]
        if own and not isinstance(inspect.getattr_static(module, IGNORED), property):
            setattr(module, IGNORED, [*(ignored or []), *own])


def save_again(host: nn.Module, names: set[str]) -> None:
    """Undo `ignore_on_save` for these tensors."""
    for prefix, module in host.named_modules():
        start = f"{prefix}." if prefix else ""
        ignored = module.__dict__.get(IGNORED)
        if ignored:
            setattr(module, IGNORED, [k for k in ignored if start + k not in names] or None)


def follows_from_weight(program: Program, part: TrainedPart) -> bool:
    """Whether the folded weight holds every bit of what trains, so that `save_pretrained` need not write it again."""
    if part.param in program.quantize or not part.mixin.follows_from_weight:
        return False
    return all(program.tensors[name].dtype == program.tensors[part.param].dtype for name in part.trained_names())
