"""How many parameters a host has and how many of their entries train, whatever they are stored as.

dense Parameter                     its entries
weight_slice, sparse_values         trained entries of a weight that is counted already: add nothing to the total
packed (Quantize, CPU and CUDA)     the entries of the weight that it stands for, and its bias
under a mask                        all entries count, the survivors train: what is pruned stays zero
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsify.methods.packed import QuantizedMixin
from sparsify.modules.adapted import AdaptedMixin
from sparsify.modules.layout import packed_leaves
from sparsify.modules.masked import masked_parameters
from sparsify.modules.original_state import OriginalState, RowsOfWhole
from sparsify.ops.bits import unpack_bits

if TYPE_CHECKING:
    from sparsify.program import Program


@dataclass(frozen=True)
class ParameterCount:
    """Entries. trainable: without pruned ones. pruned: entries of trainable parameters that a mask keeps at zero."""

    trainable: int
    total: int
    pruned: int = 0


def count_parameters(host: nn.Module) -> ParameterCount:
    """Count every weight once, tied ones too, as the dense model has it."""
    named = dict(host.named_parameters())
    trainable = sum(p.numel() for p in named.values() if p.requires_grad)
    modules = list(host.modules())
    adapted = [module for module in modules if isinstance(module, AdaptedMixin)]
    counted = {id(module._parameters.get(leaf)) for module in adapted for leaf in module.entries_of_weight}
    counted |= {id(module._parameters.get(leaf)) for module in adapted for leaf in packed_leaves(module)}
    total = sum(p.numel() for p in named.values() if id(p) not in counted)
    wholes = {id(module.whole) for module in modules if isinstance(module, RowsOfWhole)}  # counted by their parts
    for module in modules:
        if isinstance(module, QuantizedMixin):
            total += module.shape.numel()
        elif isinstance(module, OriginalState) and id(module) not in wholes:
            bias = module.original_bias()
            total += module.out_features * module.in_features + (0 if bias is None else bias.numel())
    pruned = pruned_entries(host)
    return ParameterCount(trainable - pruned, total, pruned)


def adapter_size(
    host: nn.Module, program: Program, inside: Callable[[str], bool] = lambda name: True
) -> tuple[int, int]:
    """(numbers, places) that an adapter of the host holds. inside: of which parameters."""
    numbers = sum(p.numel() for name, p in host.named_parameters() if p.requires_grad and inside(name))
    places = sum(len(piece.channels) for piece in program.slices if inside(piece.param))
    places += sum(getattr(part, "count", 0) or 0 for part in program.parts if inside(part.param))
    return numbers, places


def pruned_entries(host: nn.Module) -> int:
    """Entries of trainable parameters that are under a mask and zero; a tied parameter once."""
    masks: dict[int, tuple[torch.Tensor, torch.Size]] = {}
    for _, module, leaf in masked_parameters(host):
        parameter = getattr(module, leaf)
        if parameter.requires_grad:
            masks[id(parameter)] = (getattr(module, f"{leaf}_mask_bits"), parameter.shape)
    for module in host.modules():
        for leaf, bits in module.trained_masks().items() if isinstance(module, AdaptedMixin) else ():
            block = module._parameters.get(leaf)
            if block is not None and block.requires_grad:
                masks[id(block)] = (bits, block.shape)
    return sum(
        shape.numel() - int(torch.count_nonzero(unpack_bits(bits, shape)))
        for bits, shape in masks.values()
        if bits.device.type != "meta"
    )
