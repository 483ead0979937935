"""Shapes that operators speak of: tokens of any leading shape, weights stored `(n, m)` or turned."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Sizes = Any  # a number, symbolic under a compiler


def flat(t: Tensor) -> Tensor:
    """`(T, c)` of `(..., c)`."""
    return t.reshape(-1, t.shape[-1])


def logical_shape(shape: Any, transposed: bool) -> tuple[int, int]:
    """`(outputs, inputs)` of a stored weight's shape."""
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])
