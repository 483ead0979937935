"""Undo lowering for the CPU: packed, blocked and fused modules become what the user had, with weights unpacked."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsify.lowering.fuse_cpu import MovedActivation, set_module
from sparsify.lowering.prepacked_linear import PrepackedLinear
from sparsify.lowering.rows_of_gated import RowsOfGated
from sparsify.lowering.sparse_linear import FusedFeedForward, GatedLinear, SparseLinear


def restore_modules(host: nn.Module) -> None:
    """Put plain linears (Conv1D where the weight was stored transposed) and activations back into `host`, in place."""
    for module in list(host.modules()):
        if isinstance(module, FusedFeedForward):
            assert isinstance(module, nn.Module)
            module.__class__ = type(module).__mro__[2]
    done: dict[int, nn.Module] = {}
    for name, module in list(host.named_modules(remove_duplicate=False)):
        if isinstance(module, MovedActivation):
            set_module(host, name, module.original)
        elif isinstance(module, SparseLinear | RowsOfGated | PrepackedLinear) and not isinstance(module, GatedLinear):
            if id(module) not in done:
                done[id(module)] = plain_linear(module)
            set_module(host, name, done[id(module)])
    for module in list(host.modules()):
        if isinstance(module._modules.get("gate_up"), GatedLinear):
            del module.gate_up
            module.__dict__.pop("down_name", None)


def plain_linear(module: Any) -> nn.Module:
    """A dense linear with the values that a lowered one computes with."""
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, "", False)
    weight, bias = state["weight"], state.get("bias")
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        linear: Any = Conv1D(0, 0)
        linear.nf, linear.nx = weight.shape[1], weight.shape[0]
    else:
        linear = nn.Linear(1, 1, bias=bias is not None)
        linear.in_features, linear.out_features = weight.shape[1], weight.shape[0]
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
    for hook_table in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(linear, hook_table).update(getattr(module, hook_table))
    return linear.train(module.training)
