"""gate, up, or the linear that was both: what the host still finds under their names after they became one gated kernel.

    gate_proj, up_proj ──▶ gate_up = act(gate x) · (up x)      gate_proj: RowsOfGated, rows 0 to n of [gate; up]
                                                               up_proj: RowsOfGated, rows n to 2n
    gate_up_proj       ──▶ gate_up                             gate_up_proj: RowsOfGated, all rows

In what order the kernel keeps its rows is the gated linear's own affair: it gives and takes them as [gate; up].
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from sparsify.lowering.original_state import OriginalState


class Gated(Protocol):
    """A linear `act(gate x) · (up x)` over one packed weight; n outputs, m inputs."""

    dtype: torch.dtype

    def gate_and_up(self) -> torch.Tensor:
        """A new tensor (2n, m): the rows of gate, then those of up."""
        ...

    def bias_of_both(self) -> torch.Tensor | None:
        """(2n,) in the same order and in the dtype that it had before lowering; zeros where only the other one has a bias."""
        ...

    def take_both(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Compute with another [gate; up] and, unless it is None, another bias from now on."""
        ...


class RowsOfGated(OriginalState):
    """Rows of a gated linear's [gate; up] from `first` on, as the linear that the host calls by this name: its weight in
    `state_dict`, its product when somebody asks for it alone."""

    def __init__(self, whole: Gated, first: int, linear: Any) -> None:
        super().__init__()
        self.owner, self.first = (whole,), first  # in a tuple: not a submodule
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.transposed, self.has_bias = linear.transposed, linear.bias is not None

    @property
    def whole(self) -> Gated:
        return self.owner[0]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the original weight without its data."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=self.whole.dtype, device="meta")

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.whole.bias_of_both() if self.has_bias else None
        return None if bias is None else bias[self.rows].clone()

    def dense(self) -> torch.Tensor:
        """The weight of these rows, (out, in)."""
        return self.whole.gate_and_up()[self.rows]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dense().to(x.dtype), bias)

    def take(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        whole, both = self.whole.gate_and_up(), self.whole.bias_of_both()
        whole[self.rows].copy_(weight)
        if both is not None and bias is not None:
            both[self.rows].copy_(bias)
        self.whole.take_both(whole, both)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, gated from row {self.first} on"


__all__ = ["Gated", "RowsOfGated"]
