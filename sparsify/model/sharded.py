"""Hosts under FSDP2: `fully_shard` leaves every rank a piece of each parameter; here they are read whole and written in pieces.

    with whole_parameters(module): …                 its parameters are gathered; what is done to them is forgotten
    with whole_parameters(module, keep=True): …      …and afterwards every rank keeps its piece of what they are now

Gathering is a collective: every rank must get there. Cutting is local: the ranks must hold equal values, which `sparsify.compile`
sees to. On tensors that are not sharded every function here is the identity, and torch.distributed.tensor is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, overload

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


def back_to_pieces(host: nn.Module) -> bool:
    """Make a host's parameters its pieces again, where a forward left some of them whole. Returns whether it is sharded at all."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules: list[FSDPModule] = []
    if fsdp is not None:
        sharded: type[FSDPModule] = fsdp.FSDPModule
        modules += [m for m in host.modules() if isinstance(m, sharded)]
    for module in modules:
        module.reshard()
    return bool(modules)


def refuse_sharded(host: nn.Module, verb: str) -> None:
    """Raise SparsifyError for a verb that exchanges parameters, which fully_shard holds on to."""
    if back_to_pieces(host):
        name = next((n for n, p in host.named_parameters() if is_sharded(p)), "")
        raise SparsifyError(
            f"{verb}: fully_shard keeps the model's parameters in pieces (first {name}), and {verb} would exchange them; "
            "save_adapter gathers them: load the adapter into a host that is not sharded and call it there, or load the whole state "
            "dict there (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )
