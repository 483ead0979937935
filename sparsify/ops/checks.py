"""What operators check of their arguments before native code sees them: sizes, types, devices and the range of positions.

All comparisons are of numbers that Python holds already. Positions are read once per tensor and version, not once per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsify.errors import OperatorError, PositionError

if TYPE_CHECKING:
    from jaxtyping import Int

_PLAIN = (Tensor, torch.nn.Parameter)  # whose sizes are numbers
#: index → (what it was, its smallest and largest position, whether positions ascend without repetition)
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def require(holds: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise OperatorError unless `holds`; of a symbolic shape, let the compiler assume that it does."""
    if holds is True:
        return
    if holds is False:
        raise OperatorError(message())
    torch._check(holds, message)


def shape_of(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.")


def require_shape(operator: str, name: str, t: Tensor, *shape: int) -> None:
    """`t` must have this shape."""
    if type(t) in _PLAIN and t.shape == shape:
        return
    require(
        t.dim() == len(shape), lambda: f"{operator}: {name} is {shape_of(t)}, expected {len(shape)} dimensions {shape}"
    )
    for found, wanted in zip(t.shape, shape, strict=True):
        require(found == wanted, lambda: f"{operator}: {name} is {shape_of(t)}, expected shape {shape}")


def require_floats(operator: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            raise OperatorError(f"{operator}: {name} is {shape_of(t)}, expected floats")


def require_together(operator: str, first: Tensor, *others: Tensor | None) -> None:
    """All tensors must lie on one device."""
    device = first.device
    for t in others:
        if t is not None and t.device != device:
            both = ", ".join(sorted((str(device), str(t.device))))
            raise OperatorError(f"{operator}: tensors lie on {both}; move them to one")


def require_index(operator: str, name: str, index: Int[Tensor, " k"]) -> None:
    """A list of positions: one dimension, int32 or int64, contiguous or not."""
    require(
        index.dim() == 1 and index.dtype in (torch.int32, torch.int64),
        lambda: f"{operator}: {name} is {shape_of(index)}, expected int32 or int64 positions in one dimension",
    )


def require_within(operator: str, name: str, index: Int[Tensor, " k"], size: int, of: str) -> None:
    """Positions must lie in `[0, size)`; `of` says of what. Waits for the device once per tensor and version."""
    lowest, highest, _ = _positions(index)
    if lowest < 0 or highest >= size:
        wrong = lowest if lowest < 0 else highest
        raise PositionError(f"{operator}: {name} holds {wrong}, a position outside the {of} of {size} entries")


def ascending(index: Int[Tensor, " k"]) -> bool:
    """Whether positions are sorted and distinct."""
    return _positions(index)[2]


def _positions(index: Int[Tensor, " k"]) -> tuple[int, int, bool]:
    if index.numel() == 0 or index.device.type == "meta":
        return 0, -1, True
    state = None if index.is_inference() else (index._version, index.data_ptr(), index.numel(), index.stride(0))
    known = _KNOWN.get(index)
    if state is not None and known is not None and known[0] == state:
        return known[1]
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return 0, -1, True  # nothing may be read back now; the warm-up before the capture has read it
    low, high = torch.aminmax(index)
    found = int(low), int(high), bool((index[1:] > index[:-1]).all())
    if state is not None:
        _KNOWN[index] = (state, found)
    return found
