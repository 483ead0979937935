"""Modules that multiply by a weight, told by what they are: nn.Linear, and transformers' Conv1D without importing transformers."""

from __future__ import annotations

from torch import nn

from sparsify.model.packed_experts import GroupedLinear


def owner_name(param: str) -> str:
    """Qualified name of the module that holds a tensor; empty for the model itself."""
    return param.rpartition(".")[0]


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (weight stored `(in, out)`), recognised without importing transformers, or packed experts stored so."""
    if isinstance(module, GroupedLinear):
        return module.conv1d
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


__all__ = ["is_conv1d", "owner_name"]
