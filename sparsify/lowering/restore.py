"""Undo lowering: packed, blocked and fused modules become what the user had, with weights unpacked."""

from __future__ import annotations

from torch import Tensor, nn

from sparsify.lowering.fused_modules import FusedFeedForward, MovedActivation, unfuse_feed_forward
from sparsify.modules.original_state import OriginalState
from sparsify.modules.rows_of_gated import Gated


def set_module(host: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points."""
    owner, _, last = name.rpartition(".")
    setattr(host.get_submodule(owner), last, module)


def take_over(new: nn.Module, old: nn.Module) -> nn.Module:
    """`new` in the mode and with the hooks of `old`, whose place it takes."""
    for hook_table in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(new, hook_table).update(getattr(old, hook_table))
    return new.train(old.training)


def restore_modules(host: nn.Module) -> None:
    """Put plain linears (Conv1D where the weight was stored transposed) and activations back into `host`, in place."""
    done: dict[int, nn.Module] = {}
    for name, module in list(host.named_modules(remove_duplicate=False)):
        if isinstance(module, MovedActivation):
            set_module(host, name, module.original)
        elif isinstance(module, OriginalState) and not isinstance(module, Gated):
            if id(module) not in done:
                done[id(module)] = plain_linear(module)
            set_module(host, name, done[id(module)])
    for module in list(host.modules()):
        if isinstance(module, FusedFeedForward):
            unfuse_feed_forward(module)


def plain_linear(module: OriginalState) -> nn.Module:
    """A dense linear with the values that a lowered one computes with."""
    state: dict[str, Tensor] = {}
    module._save_to_state_dict(state, "", False)
    weight, bias = state["weight"], state.get("bias")
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        linear = Conv1D(0, 0)
        linear.nf, linear.nx = weight.shape[1], weight.shape[0]
    else:
        linear = nn.Linear(1, 1, bias=bias is not None)
        linear.in_features, linear.out_features = weight.shape[1], weight.shape[0]
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return take_over(linear, module)


__all__ = ["plain_linear", "restore_modules", "set_module", "take_over"]
