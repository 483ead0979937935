"""Shapes that operators speak of: tokens of any leading shape, weights stored `(n, m)` or turned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Shaped

Sizes = int  # symbolic under a compiler, as a tensor's own sizes are


def flat(t: Shaped[Tensor, "*t c"]) -> Shaped[Tensor, "T c"]:
    """`(T, c)` of `(..., c)`."""
    return t.reshape(-1, t.shape[-1])


def logical_shape(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """`(outputs, inputs)` of a stored weight's shape."""
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])
