"""Fuse what follows packed linears of a host into their kernels, where the graph shows that it belongs to them.

LlamaMLP(gate_proj, up_proj, act_fn, down_proj)  ──▶  the same class, forward: down_proj(gate_up(x))
                                                      gate_up: one stream [gate; up], act(gate) · up in its epilogue
Phi3MLP(gate_up_proj, activation_fn, down_proj)  ──▶  likewise, where one weight is [gate; up] already
up ─▶ act_fn                                     ──▶  the activation in up's epilogue, act_fn: Identity

The weight is read as often as before; what goes is one launch, and the round trip of gate and up through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsify.console import printable
from sparsify.kernels.gpu.formats import pack_stream, pack_two_four
from sparsify.lowering.fuse_cpu import MovedActivation, set_module
from sparsify.lowering.fuse_linears import (
    FusedActivation,
    GatedProduct,
    find_activations,
    find_gated_products,
    find_split_products,
)
from sparsify.lowering.gpu_linear import GpuSparseLinear, stored_values
from sparsify.lowering.rows_of_gated import RowsOfGated
from sparsify.lowering.sparse_linear import FusedFeedForward, fused_class
from sparsify.program import Program


@printable
@dataclass(frozen=True)
class GpuFusion:
    """What became one kernel, or why not (`why` is empty when it was fused)."""

    found: GatedProduct
    why: str = ""

    @property
    def module(self) -> str:
        return f"{self.found.owner}.gate_up"

    def __str__(self) -> str:
        leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in (self.found.gate, self.found.up)))
        return f"{self.found.owner}: {leaves}, {self.found.activation} and product {self.why or 'in one kernel'}"


@printable
@dataclass(frozen=True)
class GpuActivation:
    """An activation that moved into the kernel of the linear before it, or why not (`why` is empty when it did)."""

    found: FusedActivation
    why: str = ""

    def __str__(self) -> str:
        return f"{self.found.linear}: {self.found.activation} {self.why or 'in its kernel'}"


class GatedGpuLinear(GpuSparseLinear):
    """gate and up as one layer, packed as [gate; up]; `RowsOfGated` speak for it in the state dict."""

    def gate_and_up(self) -> torch.Tensor:
        return self.packed.unpack()

    def bias_of_both(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.clone()

    def take_both(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.take(weight, bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


def fuse(host: nn.Module, program: Program) -> list[GpuFusion | GpuActivation]:
    """Rewrite feed-forward modules of `host`, in place."""
    gated = [fuse_gated(host, found) for found in (*find_gated_products(program), *find_split_products(program))]
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
    names = list(dict.fromkeys((found.gate, found.up)))
    linears: list[Any] = [host.get_submodule(name) for name in names]
    if any(type(linear) is not GpuSparseLinear for linear in linears):
        return None
    owner = host.get_submodule(found.owner)
    why = obstacle(host, found, linears, owner)
    if why:
        return GpuFusion(found, why)
    fused = join(linears, found.activation)
    for place, (name, linear) in enumerate(zip(names, linears, strict=True)):
        set_module(host, name, RowsOfGated(fused, place * linear.out_features, linear))
    fused.train(owner.training)
    owner.__class__ = fused_class(type(owner))
    owner.add_module("gate_up", fused)
    owner.__dict__["down_name"] = found.down.rpartition(".")[2]
    return GpuFusion(found)


def obstacle(host: nn.Module, found: GatedProduct, linears: Sequence[GpuSparseLinear], owner: nn.Module) -> str:
    """Why packed linears (gate and up, or one that is both) cannot become one gated linear, or nothing."""
    kinds = {(n.rows, n.cols, n.packed.value, n.dtype, n.bias is None) for n in linears}
    if len(kinds) > 1:
        return "apart: they differ in shape, value type or bias"
    if any(n.format == "blocks" for n in linears):
        return "apart: tiles have no gated kernel"
    used = [module for _, module in host.named_modules(remove_duplicate=False)]
    if isinstance(owner, FusedFeedForward) or any(sum(m is n for m in used) > 1 for n in (*linears, owner)):
        return "apart: a module is used under several names"
    if any(n._forward_hooks or n._forward_pre_hooks for n in linears):
        return "apart: a linear has hooks"
    if hasattr(owner, "gate_up"):
        return f"apart: {found.owner}.gate_up exists"
    x = torch.randn(tuple(found.x.meta["val"].shape), dtype=linears[0].dtype, device=linears[0].packed.values.device)
    with torch.inference_mode():
        try:
            result = owner(x)
        except Exception as error:  # the user's own forward may ask for anything
            return f"apart: {found.owner} takes more than one tensor ({type(error).__name__})"
    return "" if isinstance(result, torch.Tensor) else f"apart: {found.owner} returns a {type(result).__name__}"


def join(linears: Sequence[GpuSparseLinear], activation: str) -> GatedGpuLinear:
    """[gate; up] as one gated layer; 2:4 stays 2:4 where both are, int8 values and scales are taken as they are."""
    values = torch.cat([stored_values(n) for n in linears])
    scales = [n.packed.scales for n in linears if n.packed.scales is not None]
    biases = [n.bias for n in linears if n.bias is not None]
    pack = pack_two_four if all(n.format == "two_four" for n in linears) else pack_stream
    packed = pack(values, torch.cat(scales) if scales else None, gated=True, dtype=linears[0].dtype)
    return GatedGpuLinear(packed, torch.cat(biases) if biases else None, activation=activation)


__all__ = ["GatedGpuLinear", "GpuActivation", "GpuFusion", "fuse"]
