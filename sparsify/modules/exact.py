"""Changes of a base that give the trained values back bit for bit.

`trained − base`, rounded, added to the base again, is not always `trained`. So beside a change stands a correction where it needs
one: the trained value itself. A correction is NaN wherever `base + change` is right already; trained values are finite.

Sums are formed in fp32, or in fp64 when either side is; they are the same on every device. On another base the corrections are
left out, and the sum is rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def change_of(trained: Float[Tensor, "*shape"], base: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`trained − base`."""
    dtype = sum_dtype(trained, base)
    return trained.to(dtype) - base.to(trained.device, dtype)


def changed(
    base: Float[Tensor, "*shape"],
    change: Float[Tensor, "*shape"],
    correction: Float[Tensor, "*shape"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*shape"]:
    """`base + change` in `dtype`, with the corrections put in."""
    inner = sum_dtype(base, change)
    found = (base.to(inner) + change.to(base.device, inner)).to(dtype)
    if correction is None:
        return found
    correction = correction.to(base.device)
    return torch.where(correction.isnan(), found, correction.to(dtype))


def correction_of(
    trained: Float[Tensor, "*shape"], base: Float[Tensor, "*shape"], change: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"] | None:
    """What `changed` needs to give `trained`, bit for bit; None where the change is enough."""
    found = changed(base.to(trained.device), change, None, trained.dtype)
    kind = BITS[trained.dtype]
    wrong = found.contiguous().view(kind) != trained.contiguous().view(kind)
    if not bool(wrong.any()):
        return None
    return torch.where(wrong, trained, torch.full_like(trained, float("nan")))
