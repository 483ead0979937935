"""gate, up, or the linear that was both: what the host still finds under their names after they became one gated kernel.

    gate_proj, up_proj ──▶ gate_up = act(gate x) · (up x)      gate_proj: RowsOfGated, rows 0 to n of [gate; up]
                                                               up_proj: RowsOfGated, rows n to 2n
    gate_up_proj       ──▶ gate_up                             gate_up_proj: RowsOfGated, all rows

In what order the kernel keeps its rows is the gated linear's own affair: it gives and takes them as [gate; up].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.modules.original_state import RowsOfWhole

if TYPE_CHECKING:
    from jaxtyping import Float


class Gated(nn.Module):
    """Mixin of a linear `act(gate x) · (up x)` over one packed weight; n outputs, m inputs. It is silent in the state dict, where
    `RowsOfGated` speak for it."""

    dtype: torch.dtype

    def gate_and_up(self) -> Float[Tensor, "2*n m"]:
        """A new tensor (2n, m): the rows of gate, then those of up."""
        raise NotImplementedError

    def bias_of_both(self) -> Float[Tensor, " 2*n"] | None:
        """(2n,) in the same order and in the dtype that it had before lowering; zeros where only the other one has a bias."""
        raise NotImplementedError

    def take_both(self, weight: Float[Tensor, "2*n m"], bias: Float[Tensor, " 2*n"] | None) -> None:
        """Compute with another [gate; up] and, unless it is None, another bias from now on."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(
        self,
        state_dict: object,
        prefix: str,
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        pass


class RowsOfGated(RowsOfWhole[Gated]):
    """Rows of a gated linear's [gate; up]: their weight in `state_dict`, their product when somebody asks for it alone."""

    @property
    def bias(self) -> Float[Tensor, " n"] | None:
        bias = self.whole.bias_of_both() if self.has_bias else None
        return None if bias is None else bias[self.rows].clone()

    def dense(self) -> Float[Tensor, "n m"]:
        """The weight of these rows, (out, in)."""
        return self.whole.gate_and_up()[self.rows]

    def forward(self, x: Float[Tensor, "*t m"]) -> Float[Tensor, "*t n"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dense().to(x.dtype), bias)

    def take(self, weight: Float[Tensor, "n m"], bias: Float[Tensor, " n"] | None) -> None:
        whole, both = self.whole.gate_and_up(), self.whole.bias_of_both()
        whole[self.rows].copy_(weight)
        if both is not None and bias is not None:
            both[self.rows].copy_(bias)
        self.whole.take_both(whole, both)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, gated from row {self.first} on"


__all__ = ["Gated", "RowsOfGated"]
