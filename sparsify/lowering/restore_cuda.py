"""Undo lowering for CUDA: packed and fused modules become what the user had, with weights unpacked."""

from __future__ import annotations

from torch import nn

from sparsify.lowering.fuse_cpu import MovedActivation, set_module
from sparsify.lowering.fuse_cuda import GatedGpuLinear
from sparsify.lowering.gpu_linear import GpuSparseLinear
from sparsify.lowering.restore_cpu import plain_linear
from sparsify.lowering.rows_of_gated import RowsOfGated
from sparsify.lowering.sparse_linear import FusedFeedForward


def restore_modules(host: nn.Module) -> None:
    """Put plain linears (Conv1D where the weight was stored transposed) back into `host`, in place."""
    done: dict[int, nn.Module] = {}
    for name, module in list(host.named_modules(remove_duplicate=False)):
        if isinstance(module, MovedActivation):
            set_module(host, name, module.original)
        elif isinstance(module, GpuSparseLinear | RowsOfGated) and not isinstance(module, GatedGpuLinear):
            set_module(host, name, done.setdefault(id(module), plain_linear(module)))
    for module in list(host.modules()):
        if isinstance(module._modules.get("gate_up"), GatedGpuLinear):
            del module.gate_up
            module.__dict__.pop("down_name", None)
            if isinstance(module, FusedFeedForward):
                assert isinstance(module, nn.Module)
                module.__class__ = type(module).__mro__[2]
