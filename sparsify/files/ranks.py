"""Of several processes one writes, and all of them learn how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sparsify.errors import AdapterError, SparsifyError

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this process is the one that writes: the first of torch.distributed's default group, or the only one."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def from_first_rank(value: T | None) -> T:
    """What the first rank passes, on every rank; it is pickled, so no tensors of a device. Every rank must call this."""
    import torch.distributed as dist

    box = [value]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    found = box[0]
    assert found is not None
    return found


def on_first_rank(write: Callable[[], object]) -> None:
    """Call `write` on the first rank of torch.distributed's default group; every rank must call this, and waits.

    When it fails, every rank raises: the first one its own error, the others a SparsifyError (AdapterError where it was one) with
    the same text. Without torch.distributed it is just the call.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        write()
        return
    failure: list[tuple[bool, str] | None] = [None]
    caught: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            write()
        except BaseException as error:
            caught = error
            expected = isinstance(error, SparsifyError)
            text = str(error) if expected else f"the first rank could not write: {type(error).__name__}: {error}"
            failure = [(isinstance(error, AdapterError), text)]
    dist.broadcast_object_list(failure, src=0)
    if caught is not None:
        raise caught
    if failure[0] is not None:
        adapter, text = failure[0]
        raise (AdapterError if adapter else SparsifyError)(text)
