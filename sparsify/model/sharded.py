"""Hosts under FSDP2: `fully_shard` leaves every rank a piece of each parameter; here they are read whole and written in pieces.

    with whole_parameters(module): …                 its parameters are gathered; what is done to them is forgotten
    with whole_parameters(module, keep=True): …      …and afterwards every rank keeps its piece of what they are now

    released = release(host, parameters) … take_back(released)      what leaves the modules, fully_shard must not put back

Gathering is a collective: every rank must get there. Cutting is local: the ranks must hold equal values, which `sparsify.compile`
sees to. On tensors that are not sharded every function here is the identity, and torch.distributed.tensor is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

T = TypeVar("T")


def is_sharded(tensor: object) -> TypeIs[DTensor]:
    """Whether a tensor is a DTensor, of which this rank holds a piece."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


@overload
def whole(tensor: Tensor) -> Tensor: ...


@overload
def whole(tensor: T) -> T: ...


def whole(tensor: object) -> object:
    """All of a tensor, on the device of its pieces: a collective and new memory if it is sharded, else the tensor itself."""
    if not is_sharded(tensor):
        return tensor
    if tensor.device.type == "meta":
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    pieces = tensor.detach().to(tensor.device_mesh.device_type)
    assert is_sharded(pieces)
    full = pieces.full_tensor().to(tensor.device)
    return full.clone() if full.data_ptr() == local(tensor).data_ptr() else full


def cut_like(value: Tensor, reference: object) -> Tensor:
    """A whole tensor in pieces like those of `reference`; the value itself where that is not sharded. No communication."""
    if not is_sharded(reference) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = reference.device_mesh
    if value.device.type != "meta":
        value = value.to(mesh.device_type)
    return distribute_tensor(value, mesh, reference.placements, src_data_rank=None).to(reference.device)


def replicated(value: Tensor, reference: DTensor) -> DTensor:
    """A tensor that every rank holds whole, as a DTensor on the mesh of `reference`. No communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = reference.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def piece_of(value: Tensor, reference: object) -> Tensor:
    """This rank's piece of a whole tensor that is cut like `reference`."""
    cut = cut_like(value, reference)
    return cut.to_local() if is_sharded(cut) else cut


def local(tensor: Tensor) -> Tensor:
    """The piece of a parameter that this rank holds; the same memory."""
    return tensor.to_local().detach() if is_sharded(tensor) else tensor


@torch.no_grad()
def write_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter; into a sharded one every rank copies its piece."""
    local(target).copy_(piece_of(value, target))


@contextmanager
def whole_parameters(module: nn.Module, keep: bool = False) -> Iterator[None]:
    """Inside, the module's own sharded parameters are gathered; plain ones are the module's own, as always.

    keep: what the gathered parameters are at the end is written into the pieces.
    """
    own = {n: p for n, p in module._parameters.items() if p is not None and is_sharded(p)}
    if not own:
        yield
        return
    gathered = {n: nn.Parameter(whole(p), requires_grad=p.requires_grad) for n, p in own.items()}
    module._parameters.update(gathered)
    try:
        yield
        if keep:
            for name, parameter in own.items():
                write_whole(parameter, gathered[name].detach())
    finally:
        module._parameters.update(own)


def class_name(host: nn.Module) -> str:
    """The name of the user's class, which fully_shard mixes into one of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    own = type(host).__mro__
    return next((c for c in own if fsdp is None or not issubclass(c, fsdp.FSDPModule)), own[0]).__name__


def zero_pieces(tensor: object) -> bool:
    """Whether a parameter lies in pieces of DeepSpeed's ZeRO-3, which leaves an empty one in the model."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "ds_id") and not tensor.numel()


def back_to_pieces(host: nn.Module) -> bool:
    """Make a host's parameters its pieces again, where a forward left some of them whole. Returns whether it is sharded at all."""
    modules = sharded_modules(host)
    for module in modules:
        module.reshard()
    return bool(modules)


def sharded_modules(host: nn.Module) -> list[FSDPModule]:
    """The modules of a tree on which fully_shard was called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    sharded: type[FSDPModule] = fsdp.FSDPModule
    return [m for m in host.modules() if isinstance(m, sharded)]


#: group of fully_shard, place in it, what it knew of a parameter
Released = list[tuple[Any, int, Any]]


def groups_of(module: FSDPModule) -> list[Any]:
    """The groups of parameters that one call of fully_shard gathers together: torch's own, which has no public name for them."""
    state = module._get_fsdp_state()
    many = getattr(state, "_fsdp_param_groups", None)
    one = getattr(state, "_fsdp_param_group", None) if many is None else None  # torch before 2.12
    return list(many) if many is not None else [] if one is None else [one]


def entries_of(host: nn.Module, parameters: Collection[nn.Parameter], verb: str) -> Released:
    """What fully_shard knows of parameters, in pieces. Raises SparsifyError where `release` could not let go of them."""
    wanted = {id(p) for p in parameters}
    found: Released = []
    for module in sharded_modules(host):
        for group in groups_of(module):
            known = getattr(group, "fsdp_params", None)
            if not isinstance(known, list) or any(not hasattr(p, "sharded_param") for p in known):
                raise SparsifyError(
                    f"{verb}: how fully_shard of torch {torch.__version__} keeps its parameters is not known here"
                )
            found += [(group, place, p) for place, p in enumerate(known) if id(p.sharded_param) in wanted]
            if known and all(id(p.sharded_param) in wanted for p in known):
                raise SparsifyError(
                    f"{verb}: fully_shard was called on {type(module).__name__} for trained parts alone, of which nothing would be left to "
                    "gather; call it on the block around"
                )
    if len(found) != len({id(p) for p in parameters if is_sharded(p)}):
        raise SparsifyError(
            f"{verb}: fully_shard of torch {torch.__version__} does not know all parameters of this host"
        )
    return found


def release(host: nn.Module, parameters: Collection[nn.Parameter], verb: str) -> Released:
    """Make fully_shard forget parameters that are about to leave their modules; it would put them back when it gathers.

    Every rank must call this with the same parameters. Raises what `entries_of` raises, which a verb asks before it changes anything.
    """
    found = entries_of(host, parameters, verb)
    for group, _, entry in found:
        group.fsdp_params.remove(entry)
    return found


def take_back(released: Released) -> None:
    """Undo `release`, after the parameters are in their modules again."""
    for group, place, entry in released:
        group.fsdp_params.insert(place, entry)


def strip_sharding(copy: nn.Module) -> None:
    """Take what fully_shard put into a module tree from a copy of it: classes and hooks. Its parameters are the caller's business."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in sharded_modules(copy):
        assert fsdp is not None
        own = type(module).__mro__
        module.__class__ = next(c for c in own if not issubclass(c, fsdp.FSDPModule))
    for module in copy.modules() if fsdp is not None else ():
        tables = (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._state_dict_pre_hooks,
            module._load_state_dict_pre_hooks,
        )
        for table in tables:
            for key in [k for k, hook in table.items() if hook_of_sharding(hook)]:
                del table[key]
                for extra in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    extra.pop(key, None)


def hook_of_sharding(hook: object) -> bool:
    """Whether a hook, or what torch wrapped in one, is fully_shard's."""
    inner = getattr(hook, "hook", hook)
    inner = getattr(inner, "__wrapped__", inner)
    owner = type(getattr(inner, "__self__", None)).__module__
    return any(str(name).startswith("torch.distributed.fsdp") for name in (getattr(inner, "__module__", ""), owner))


def refuse_sharded(host: nn.Module, verb: str) -> None:
    """Raise SparsifyError for a verb that exchanges parameters, which fully_shard holds on to."""
    if back_to_pieces(host):
        name = next((n for n, p in host.named_parameters() if is_sharded(p)), "")
        raise SparsifyError(
            f"{verb}: fully_shard keeps the model's parameters in pieces (first {name}), and {verb} would exchange them; "
            "save_adapter gathers them: load the adapter into a host that is not sharded and call it there, or load the whole state "
            "dict there (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )
