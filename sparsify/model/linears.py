"""Modules that multiply by a weight, told by what they are: nn.Linear, and transformers' Conv1D without importing transformers.

nn.Linear                     weight (out, in)
transformers' Conv1D          weight (in, out)
a model's own copy of Conv1D  weight (in, out), a forward that nobody has read: pruned, never swapped
"""

from __future__ import annotations

from torch import Tensor, nn

from sparsify.model.packed_experts import GroupedLinear


def owner_name(param: str) -> str:
    """Qualified name of the module that holds a tensor; empty for the model itself."""
    return param.rpartition(".")[0]


def is_conv1d_class(kind: type) -> bool:
    """transformers' Conv1D itself, whose forward is `x W + b`."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a class derived from it (ours with trained parts are), or packed experts stored so."""
    if isinstance(module, GroupedLinear):
        return module.conv1d
    return any(map(is_conv1d_class, type(module).__mro__))


def is_plain_linear(module: nn.Module) -> bool:
    """nn.Linear or Conv1D itself, and no class derived from them, whose forward may do more."""
    return type(module) is nn.Linear or is_conv1d_class(type(module))


def stored_transposed(module: nn.Module) -> bool:
    """Whether the weight lies as `(in, out)`: Conv1D, a model's own copy of it, packed experts that say so."""
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__) or bool(getattr(module, "is_transposed", False))


def logical_weight(module: nn.Module) -> Tensor:
    """The weight `(out, in)` of nn.Linear or Conv1D, detached; of Conv1D a view."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if is_conv1d(module) else weight


__all__ = ["is_conv1d", "is_conv1d_class", "is_plain_linear", "logical_weight", "owner_name", "stored_transposed"]
