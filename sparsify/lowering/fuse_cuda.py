"""Fuse what follows packed linears of a host into their kernels, where the graph shows that it belongs to them.

LlamaMLP(gate_proj, up_proj, act_fn, down_proj)  ──▶  the same class, forward: down_proj(gate_up(x))
                                                      gate_up: one stream [gate; up], act(gate) · up in its epilogue
up ─▶ act_fn                                     ──▶  the activation in up's epilogue, act_fn: Identity

The weight is read as often as before; what goes is one launch, and the round trip of gate and up through memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsify.kernels.gpu.formats import pack_stream
from sparsify.lowering.fuse_cpu import MovedActivation
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct, find_activations, find_gated_products
from sparsify.lowering.gpu_linear import GpuSparseLinear, stored_values
from sparsify.lowering.original_state import OriginalState
from sparsify.lowering.sparse_linear import FusedFeedForward, fused_class
from sparsify.program import Program


@dataclass(frozen=True)
class GpuFusion:
    """What became one kernel, or why not (`why` is empty when it was fused)."""

    found: GatedProduct
    why: str = ""

    @property
    def module(self) -> str:
        return f"{self.found.owner}.gate_up"

    def __str__(self) -> str:
        leaves = ", ".join(name.rpartition(".")[2] for name in (self.found.gate, self.found.up))
        return f"{self.found.owner}: {leaves}, {self.found.activation} and product {self.why or 'in one kernel'}"


@dataclass(frozen=True)
class GpuActivation:
    """An activation that moved into the kernel of the linear before it, or why not (`why` is empty when it did)."""

    found: FusedActivation
    why: str = ""

    def __str__(self) -> str:
        return f"{self.found.linear}: {self.found.activation} {self.why or 'in its kernel'}"


class GatedGpuLinear(GpuSparseLinear):
    """gate and up as one layer; the state dict has them under their own names (`HalfOfGated`)."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class HalfOfGated(OriginalState):
    """gate (place 0) or up (1) of a GatedGpuLinear, for whoever asks for it alone: its weight in `state_dict`, its product."""

    def __init__(self, whole: GatedGpuLinear, place: int, linear: GpuSparseLinear) -> None:
        super().__init__()
        self.owner, self.place = (whole,), place  # in a tuple: not a submodule
        self.in_features, self.out_features, self.transposed = (
            linear.in_features,
            linear.out_features,
            linear.transposed,
        )

    @property
    def whole(self) -> GatedGpuLinear:
        return self.owner[0]

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the original weight without its data."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=self.whole.dtype, device="meta")

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.whole.bias is None else self.whole.bias.chunk(2)[self.place]

    def dense(self) -> torch.Tensor:
        """The weight of this half, (out, in)."""
        return self.whole.packed.unpack().chunk(2)[self.place]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dense().to(x.dtype), bias)

    def original_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.clone()

    def take(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        whole = self.whole.packed.unpack()
        whole.chunk(2)[self.place].copy_(weight)
        self.whole.repack(whole)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)


def fuse(host: nn.Module, program: Program) -> list[GpuFusion | GpuActivation]:
    """Rewrite feed-forward modules of `host`, in place."""
    gated = [fuse_gated(host, found) for found in find_gated_products(program)]
    moved = [fuse_activation(host, found) for found in find_activations(program)]
    return [fusion for fusion in (*gated, *moved) if fusion is not None]


def fuse_activation(host: nn.Module, found: FusedActivation) -> GpuActivation | None:
    """The activation moves into the linear's kernel, its module becomes the identity; None where the linear stayed dense."""
    linear, module = host.get_submodule(found.linear), host.get_submodule(found.module)
    if type(linear) is not GpuSparseLinear:
        return None
    used = [other for _, other in host.named_modules(remove_duplicate=False)]
    if any(sum(other is one for other in used) > 1 for one in (linear, module)):
        return GpuActivation(found, "apart: a module is used under several names")
    if any(one._forward_hooks or one._forward_pre_hooks for one in (linear, module)):
        return GpuActivation(found, "apart: a module has hooks")
    linear.activation = found.activation
    owner, _, leaf = found.module.rpartition(".")
    setattr(host.get_submodule(owner), leaf, MovedActivation(module))
    return GpuActivation(found)


def fuse_gated(host: nn.Module, found: GatedProduct) -> GpuFusion | None:
    """gate, up, activation and product become `owner.gate_up`; None where they stayed dense, which the report explains."""
    gate, up, owner = (host.get_submodule(name) for name in (found.gate, found.up, found.owner))
    if type(gate) is not GpuSparseLinear or type(up) is not GpuSparseLinear:
        return None
    why = obstacle(host, found, gate, up, owner)
    if why:
        return GpuFusion(found, why)
    fused = join(gate, up, found.activation)
    for place, (name, linear) in enumerate(((found.gate, gate), (found.up, up))):
        parent, _, leaf = name.rpartition(".")
        setattr(host.get_submodule(parent), leaf, HalfOfGated(fused, place, linear))
    fused.train(owner.training)
    owner.__class__ = fused_class(type(owner))
    owner.add_module("gate_up", fused)
    owner.__dict__["down_name"] = found.down.rpartition(".")[2]
    return GpuFusion(found)


def obstacle(host: nn.Module, found: GatedProduct, gate: GpuSparseLinear, up: GpuSparseLinear, owner: nn.Module) -> str:
    """Why two packed linears cannot become one, or nothing."""
    kinds = {(n.rows, n.cols, n.packed.value, n.dtype, n.bias is None) for n in (gate, up)}
    if len(kinds) > 1:
        return "apart: they differ in shape, value type or bias"
    if gate.format == "blocks" or up.format == "blocks":
        return "apart: tiles have no gated kernel"
    used = [module for _, module in host.named_modules(remove_duplicate=False)]
    if isinstance(owner, FusedFeedForward) or any(sum(m is n for m in used) > 1 for n in (gate, up, owner)):
        return "apart: a module is used under several names"
    if any(n._forward_hooks or n._forward_pre_hooks for n in (gate, up)):
        return "apart: a linear has hooks"
    x = torch.randn(tuple(found.x.meta["val"].shape), dtype=gate.dtype, device=gate.packed.values.device)
    with torch.inference_mode():
        try:
            result = owner(x)
        except Exception as error:  # the user's own forward may ask for anything
            return f"apart: {found.owner} takes more than one tensor ({type(error).__name__})"
    return "" if isinstance(result, torch.Tensor) else f"apart: {found.owner} returns a {type(result).__name__}"


def join(gate: GpuSparseLinear, up: GpuSparseLinear, activation: str) -> GatedGpuLinear:
    """[gate; up] as one gated layer; int8 values and scales are taken as they are."""
    values = torch.cat([stored_values(n) for n in (gate, up)])
    scales = None
    if gate.packed.scales is not None and up.packed.scales is not None:
        scales = torch.cat([gate.packed.scales, up.packed.scales])
    packed = pack_stream(values, scales, gated=True, dtype=gate.dtype)
    bias = None if gate.bias is None or up.bias is None else torch.cat([gate.bias, up.bias])
    return GatedGpuLinear(packed, bias, activation=activation)


__all__ = ["GatedGpuLinear", "GpuActivation", "GpuFusion", "HalfOfGated", "fuse"]
