"""The state dict of a lowered linear is that of the linear it stands for, whatever it keeps inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class OriginalState(nn.Module):
    """`weight` (out, in), or (in, out) where `transposed` as Conv1D stores it, and `bias`; subclasses say how to give and take them."""

    in_features: int
    out_features: int
    transposed: bool

    def dense(self) -> torch.Tensor:
        """The weight that this module computes with, (out, in)."""
        raise NotImplementedError

    def original_bias(self) -> torch.Tensor | None:
        """The bias in the type that it had before lowering."""
        bias: Any = self.bias
        return bias

    def take(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Compute with another weight, (out, in), and, unless it is None, another bias from now on."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight, bias = self.dense(), self.original_bias()
        destination[prefix + "weight"] = (weight.t() if self.transposed else weight).contiguous()
        if bias is not None:
            destination[prefix + "bias"] = bias

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, bias = state_dict.get(prefix + "weight"), state_dict.get(prefix + "bias")
        has_bias = self.original_bias() is not None
        missing_keys += [prefix + "bias"] if has_bias and bias is None else []
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        weight = (weight.t() if self.transposed else weight).detach()
        if tuple(weight.shape) != (self.out_features, self.in_features):
            error_msgs.append(f"size mismatch for {prefix}weight: got {tuple(weight.shape)}")
            return
        self.take(weight, bias.detach() if has_bias and bias is not None else None)
