"""Joining packed linears for CUDA: what one kernel can do.

gate, up          ──▶  GatedGpuLinear: one stream [gate; up], act(gate) · up in its epilogue
gate_up           ──▶  likewise, where one weight is [gate; up] already
dense, activation ──▶  the activation in dense's epilogue

The weight is read as often as before; what goes is one launch, and the round trip of gate and up through memory. So nothing is timed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsify.kernels.gpu.formats import pack_stream, pack_two_four
from sparsify.lowering.cuda.gpu_linear import GpuSparseLinear, stored_values
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct
from sparsify.lowering.target import Joined
from sparsify.modules.rows_of_gated import Gated


class GatedGpuLinear(Gated, GpuSparseLinear):
    """gate and up as one layer, packed as [gate; up]; `RowsOfGated` speak for it in the state dict."""

    def gate_and_up(self) -> torch.Tensor:
        return self.packed.unpack()

    def bias_of_both(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.clone()

    def take_both(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.take(weight, bias)


def join_gated(found: GatedProduct, linears: Sequence[GpuSparseLinear]) -> Joined | str:
    """[gate; up] as one gated layer; 2:4 stays 2:4 where both are, int8 values and scales are taken as they are. Or why not."""
    kinds = {(n.rows, n.cols, n.packed.value, n.dtype, n.bias is None) for n in linears}
    if len(kinds) > 1:
        return "they differ in shape, value type or bias"
    if any(n.format == "blocks" for n in linears):
        return "tiles have no gated kernel"
    values = torch.cat([stored_values(n) for n in linears])
    scales = [n.packed.scales for n in linears if n.packed.scales is not None]
    biases = [n.bias for n in linears if n.bias is not None]
    pack = pack_two_four if all(n.format == "two_four" for n in linears) else pack_stream
    packed = pack(values, torch.cat(scales) if scales else None, gated=True, dtype=linears[0].dtype)
    return Joined(GatedGpuLinear(packed, torch.cat(biases) if biases else None, activation=found.activation))


def absorb_activation(found: FusedActivation, linear: GpuSparseLinear) -> Joined | str:
    """The linear with the activation in its kernel."""
    linear.activation = found.activation
    return Joined(linear)


__all__ = ["GatedGpuLinear", "absorb_activation", "join_gated"]
