"""Several processes that must come to the same result: sum what each has seen, and fail together.

    rank 0: batches a, b ─┐                      ┌─ the same scores, bit for bit
    rank 1: batch  c     ─┼─ together, summed ───┼─ the same scores
    rank 2: a NaN        ─┘                      └─ … or the same error on every rank, naming rank 2

A rank that raises between two collective calls leaves the others waiting for it until a timeout. So what can fail on one
rank alone (its batches, its forward) runs inside of `together`, which tells the others. In one process all of this is nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from jaxtyping import Num, Shaped

Value = TypeVar("Value")
SAMPLE = 64  # entries of a parameter that are compared between ranks


def rank_count() -> int:
    """Number of processes of the default group; 1 outside of `torch.distributed`."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if rank_count() > 1 else 0


def collective_device() -> torch.device:
    """Where the group's backend wants its tensors."""
    nccl = "nccl" in str(torch.distributed.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def sum_over_ranks(value: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """A tensor's sum over all ranks, the same bits on each; every rank must call it with the same shape and dtype."""
    if rank_count() == 1:
        return value
    moved = value.to(collective_device(), copy=True).contiguous()
    torch.distributed.all_reduce(moved)
    torch.distributed.broadcast(moved, 0)  # a backend may add in another order on every rank
    return moved.to(value.device)


def from_rank(source: int, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The tensor of rank `source`, everywhere; `tensor` has its shape and dtype on every rank (any dtype, bool too)."""
    if rank_count() == 1:
        return tensor
    bits = tensor.detach().contiguous().flatten().view(torch.uint8).to(collective_device(), copy=True)
    torch.distributed.broadcast(bits, source)
    return bits.to(tensor.device).view(tensor.dtype).view(tensor.shape)


def object_from_rank(source: int, value: Value) -> Value:
    """The Python value of rank `source`, everywhere."""
    if rank_count() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, source, device=collective_device())
    return box[0]


def of_every_rank(value: Value) -> list[Value]:
    """The values of all ranks, by rank."""
    if rank_count() == 1:
        return [value]
    found = [value] * rank_count()
    torch.distributed.all_gather_object(found, value)
    return found


def of_first_rank(compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the first rank computes from its weights, everywhere, on the CPU; the others' weights may be anything (see `same_weights`)."""
    if rank_count() == 1:
        return compute()
    found: dict[str, Tensor] = {}
    with together():
        if rank() == 0:
            found = {name: tensor.cpu() for name, tensor in compute().items()}
    return object_from_rank(0, found)


def same_weights(model: nn.Module, why: str) -> None:
    """Raise SparsifyError on every rank where ranks hold other weights than the first, by a sample of each parameter.

    accelerate's `fsdp_cpu_ram_efficient_loading` gives weights to the first rank only: what runs through the model elsewhere is noise.
    """
    if rank_count() == 1:
        return
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        if type(data) is not Tensor or data.is_meta:  # in pieces, or packed by another library
            continue
        flat = data.reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].contiguous().view(torch.uint8)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(bytes(sample.cpu().tolist()))
    every = of_every_rank(digest.hexdigest())
    other = next((number for number, one in enumerate(every) if one != every[0]), None)
    if other is not None:
        raise SparsifyError(
            f"{why}: rank {other} holds other weights than rank 0, so what it measures is worth nothing; load the model on every rank "
            "(accelerate: fsdp_cpu_ram_efficient_loading: false), or choose without batches (by weight, or at random)"
        )


@contextmanager
def together() -> Iterator[None]:
    """Leave on every rank, or raise on every rank: its own error where the body failed, and elsewhere which rank failed and why.

    Every rank must come here. Where other ranks failed, the error has their class if it is one of sparsify's, else it is a
    SparsifyError.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if rank_count() > 1:
        failed = torch.tensor([float(error is not None)], device=collective_device())
        torch.distributed.all_reduce(failed)
        if float(failed) > 0:
            told = None if error is None else (error_class(error), str(error) or type(error).__name__)
            every: list[tuple[type[SparsifyError], str] | None] = of_every_rank(told)
            first = next(number for number, other in enumerate(every) if other is not None)
            if error is None:
                kind, text = every[first]  # type: ignore[misc]
                raise kind(f"rank {first}: {text}")
    if error is not None:
        raise error


def error_class(error: Exception) -> type[SparsifyError]:
    return type(error) if isinstance(error, SparsifyError) else SparsifyError
