"""The tree of a serving host: the user's modules again, over the same tensors, without anything of sparsify's that writes or switches.

a plain model                          modules copied, tensors shared, frozen
compiled with Quantize, or lowered     the same; packed weights are shared as they are (and the native step, which has no place for
                                       addends, is left behind)
compiled to train                      refused: what trains is written into its weights
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparsify.errors import SparsifyError
from sparsify.host.handle import Handle
from sparsify.host.plain import drop_own_hooks, forget
from sparsify.host.quantized_bases import check_host
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear, alive, handles
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.lowering.fused_modules import FusedFeedForward, unfuse_feed_forward
from sparsify.methods.packed import QuantizedMixin
from sparsify.model.module_tree import copy_module_tree
from sparsify.modules.original_state import OriginalState, RowsOfWhole
from sparsify.modules.rows_of_gated import Gated


def check_source(source: nn.Module) -> Handle | None:
    """The handle of a compiled model. Raises SparsifyError for one that cannot be a plain base, saying what to pass instead."""
    handle = source.__dict__.get("sparsify")
    if handle is None:
        check_host(source)
        return None
    if not isinstance(handle, Handle):
        raise SparsifyError("serve: this model is a serving host already; add adapters with model.sparsify.add")
    if handle.parts or handle.train or handle.program.moves or handle.serving or handle.merged:
        raise SparsifyError(
            "serve: this model was compiled to train, or loaded with adapters, which are written into its weights: pass the model that "
            "went into sparsify.compile or sparsify.load, or model.sparsify.plain()"
        )
    return handle


def copy_base(source: nn.Module) -> nn.Module:
    """A copy of the tree over the same tensors, frozen, in eval mode, without hooks and methods of sparsify's."""
    memo: dict[int, object] = {}
    for parameter in source.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for module in source.modules():
        packed = isinstance(module, OriginalState | QuantizedMixin)
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = buffer if packed else buffer.detach().clone()
    twins = {id(m): twin(m) for m in source.modules() if isinstance(m, OriginalState)}
    for found in twins.values():
        if isinstance(found, RowsOfWhole):
            found.owner = (twins[id(found.owner[0])],)  # type: ignore[assignment]
    memo |= twins
    memo |= {id(source.__dict__.get(name)): None for name in ("sparsify", "_sparsify_hooks") if name in source.__dict__}
    host = copy_module_tree(source, memo)
    for module in host.modules():
        drop_own_hooks(module)
    forget(host)
    return host.eval()


def twin(module: OriginalState) -> OriginalState:
    """A module over the same packed tensors, which are prepared already."""
    made = object.__new__(type(module))
    shallow = {k: copy.copy(v) if isinstance(v, dict | set | list) else v for k, v in module.__dict__.items()}
    made.__dict__.update(shallow)
    if isinstance(made, PrepackedLinear):
        made.handle = next(handles)
        alive[made.handle] = made
    return made


def skeleton(host: nn.Module) -> nn.Module:
    """The host with plain linears without data where lowered ones stand: what readers of adapters look names and shapes up in."""
    lowered = [m for m in host.modules() if isinstance(m, OriginalState)]
    if not lowered:
        return host
    memo: dict[int, object] = {id(m): nn.Identity() if silent(m) else empty_linear(m) for m in lowered}
    memo |= {id(t): t for m in host.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    found = copy_module_tree(host, memo)
    for module in found.modules():
        if isinstance(module, FusedFeedForward):
            unfuse_feed_forward(module)
    return found


def silent(module: OriginalState) -> bool:
    """Whether a module stands for others, which the host still has under their names."""
    return isinstance(module, Gated)


def empty_linear(module: OriginalState) -> nn.Module:
    bias = module.original_bias() is not None
    if not module.transposed:
        return nn.Linear(module.in_features, rows_of(module), bias, device="meta")
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(rows_of(module), module.in_features)


def rows_of(module: OriginalState) -> int:
    """Outputs before a product of gate and up."""
    return module.packed.rows if isinstance(module, SparseLinear) else module.out_features


__all__ = ["check_source", "copy_base", "skeleton"]
