"""`restore` and `plain`: a host, or a copy of it, as plain modules of the user's own classes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsify.errors import SparsifyError
from sparsify.host.install import save_again
from sparsify.host.live_state import LoadHook, OnHost, RootHook, SaveHook, Unshare
from sparsify.host.merge import check_leaving
from sparsify.host.same_base import in_pieces
from sparsify.host.switch import reset_to_base
from sparsify.host.switch_lock import EnterForward, LeaveForward
from sparsify.model.fast_paths import open_fast_paths
from sparsify.model.module_tree import copy_module_tree
from sparsify.model.packed_experts import plain_names, renamed, write_back_experts
from sparsify.model.sharded import back_to_pieces, is_sharded, release, strip_sharding, whole, write_whole
from sparsify.model.tied_weights import tie_again, tied_groups
from sparsify.modules.adapted import AdaptedMixin, make_plain, take_leaves
from sparsify.modules.layout import MARKER, Layout, layout_of
from sparsify.modules.masked import MaskedModule, bits_name
from sparsify.program import canonical_names

if TYPE_CHECKING:
    from sparsify.host.handle import Handle


def restore(handle: Handle) -> nn.Module:
    """See `Handle.restore`."""
    if handle.program.bases:
        raise SparsifyError(
            "restore: the base came packed and its layers are sparsify's now; the model that was passed to compile is still as it was, "
            "and set_adapter(None) gives the packed base here"
        )
    if handle.program.quantize or handle.dequantised:
        raise SparsifyError(
            "restore: the base was packed by Quantize and its dense bits are not kept; the model that was passed to compile "
            "still has them (unless donated), and set_adapter(None) gives the packed base"
        )
    if handle.program.masks:
        raise SparsifyError(
            "restore: Prune replaced the weights and their dense values are not kept; the model that was passed to compile "
            "still has them (unless donated)"
        )
    in_pieces(handle)
    for part in handle.parts.values():
        handle.need_base(part, "restore")
    if not handle.merged:
        check_leaving(handle, "restore")
    if handle.merged:
        handle.unmerge()
    reset_to_base(handle)
    release(handle.host, [p for part in handle.parts.values() for p in part.parameters()], "restore")
    for part in handle.parts.values():
        part.detach()
        for module in part.modules:
            make_plain(module)
    done: set[int] = set()  # a shared module, or a tensor tied between modules, is put back once
    for owner, layout in handle.layouts.items():
        module = handle.host.get_submodule(owner)
        for leaf in layout.moves:
            tensor = getattr(module, leaf)
            if id(tensor) not in done:
                done.add(id(tensor))
                original = layout.to_original(leaf, whole(tensor.detach()))
                if is_sharded(tensor):
                    write_whole(tensor, original)
                else:
                    tensor.data = original
    let_go(handle)
    for name, parameter in handle.host.named_parameters():
        parameter.requires_grad_(handle.flags.get(name, parameter.requires_grad))
    save_again(handle.host, {name for part in handle.program.parts for name in part.trained_names()})
    write_back_experts(handle.host)
    return handle.host


def plain(handle: Handle) -> nn.Module:
    """See `Handle.plain`."""
    state = gathered(handle)
    bare = bare_copy(handle)
    names = plain_names(handle.host)
    flags = renamed(handle.flags, names)
    groups = [[names.get(name, name) for name in group] for group in tied(handle)]
    bare.load_state_dict(state, assign=True)
    torn = tie_again(bare, groups)
    if torn:
        warnings.warn(
            f"plain: {', '.join(torn[0])} were one tensor in the model and hold different values now, so that in the copy nothing is "
            "tied and config.tie_word_embeddings is False",
            stacklevel=4,
        )
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    save_again(bare, {name for part in handle.program.parts for name in part.trained_names()})
    return bare


def gathered(handle: Handle) -> dict[str, torch.Tensor]:
    """The original state dict in memory of its own; of a host in pieces, whole, one after another, in host memory."""
    if not back_to_pieces(handle.host):
        return {name: value.detach().clone() for name, value in handle.original_state_dict().items()}
    return handle.gathered_state(torch.device("cpu"))


def tied(handle: Handle) -> list[list[str]]:
    """Names that were one tensor in the model that was compiled, or are one in the host, in groups."""
    return tied_groups({**canonical_names(handle.host), **handle.program.aliases})


def bare_copy(handle: Handle) -> nn.Module:
    """A deep copy of the host as plain modules; its adapted weights are empty."""
    hooks = handle.host.__dict__.get("_sparsify_hooks")
    pieces = {p for p in handle.host.parameters() if is_sharded(p)}
    memo: dict[int, object] = {id(handle): None, id(hooks): None}
    for p in pieces:  # its pieces are nobody's there: `plain` loads what was gathered
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
    bare = copy_module_tree(handle.host, memo)
    strip_sharding(bare)
    if handle.cpu is not None:
        from sparsify.lowering.restore import restore_modules

        restore_modules(bare)
    for module in bare.modules():
        drop_own_hooks(module)
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


def let_go(handle: Handle) -> None:
    """Hooks, markers and wrapped methods leave the host, which is the user's own class again."""
    for hook in handle.host.__dict__.pop("_sparsify_hooks", []):
        hook.remove()
    forget(handle.host)


def drop_own_hooks(module: nn.Module) -> None:
    """Take the hooks of `install` from one module; those of users stay."""
    for table in (
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._forward_pre_hooks,
        module._forward_hooks,
    ):
        for key in [k for k, hook in table.items() if is_own_hook(hook)]:
            del table[key]
            module._forward_hooks_always_called.pop(key, None)


def is_own_hook(hook: object) -> bool:
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


def strip(module: AdaptedMixin) -> None:
    """Take every trained or packed tensor from an adapted module and give it an (empty) dense weight again."""
    shape, dtype = module.stored_shape(), module.weight.dtype
    module._buffers.pop(MARKER, None)
    for leaf in module.__dict__.pop("packed_names", ()):
        for table in (module._parameters, module._buffers):
            table.pop(leaf, None)
    take_leaves(module)
    for name in ("format", "shape", "compute_dtype"):
        module.__dict__.pop(name, None)
    module.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    make_plain(module)


def unmask(module: MaskedModule) -> None:
    """Back from a masked module to the user's class; the zeros stay in the weights."""
    module._unwatch()
    for leaf in module.masked_leaves:
        module._buffers.pop(bits_name(leaf), None)
        module._non_persistent_buffers_set.discard(bits_name(leaf))
    module.__dict__.pop("masked_leaves", None)
    module.__class__ = next(c for c in type(module).__mro__ if not issubclass(c, MaskedModule))
