"""Join packed linears of a host that read the same tensor into one kernel, where the graph shows that they do.

Attention(q_proj, k_proj, v_proj, o_proj)  ──▶  the same class and the same calls
                                                q_proj_k_proj_v_proj: one stream [q; k; v], one launch
                                                q_proj, k_proj, v_proj: whoever is called first computes, the others find
                                                their rows

The weight is read as often as before; what goes is two launches, and small programs that leave a large GPU half empty.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsify.console import printable
from sparsify.kernels.gpu.formats import Stream, pack_stream, pack_two_four
from sparsify.lowering.fuse_linears import SharedPass, find_shared_passes
from sparsify.lowering.gpu_linear import GpuSparseLinear, stored_values
from sparsify.lowering.original_state import RowsOfWhole
from sparsify.program import Program


@printable
@dataclass(frozen=True)
class GpuSharing:
    """Linears that became one kernel, or why not (`why` is empty when they did)."""

    found: SharedPass
    why: str = ""

    @property
    def owner(self) -> str:
        return self.found.members[0].rpartition(".")[0]

    @property
    def leaves(self) -> list[str]:
        return [name.rpartition(".")[2] for name in self.found.members]

    @property
    def module(self) -> str:
        """Qualified name of the linear that computes all of them."""
        return ".".join(part for part in (self.owner, "_".join(self.leaves)) if part)

    def __str__(self) -> str:
        return f"{self.owner}: {', '.join(self.leaves)} {self.why or 'in one kernel'}"


class SharedGpuLinear(GpuSparseLinear):
    """Several linears over one input as one layer; the state dict has them under their own names (`PartOfShared`)."""

    def __init__(self, packed: Stream, bias: torch.Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__(packed, bias)
        self.sizes = tuple(sizes)
        self.kept = Kept()

    def part(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Rows of part `place` of the product with x (…, in): computed now for all parts, or by an earlier call with `x`."""
        kept = self.kept
        if kept.x is x and kept.version == version_of(x) and place in kept.parts:
            y = kept.parts.pop(place)
            if not kept.parts:
                kept.clear()
            return y
        parts = dict(enumerate(self(x).split(self.sizes, -1)))
        y = parts.pop(place)
        kept.x, kept.version, kept.parts = x, version_of(x), parts
        return y

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class Kept(threading.local):
    """Parts that were computed and not yet asked for, of one thread, and the input that they belong to. A copy is empty."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.x: torch.Tensor | None = None
        self.version = 0
        self.parts: dict[int, torch.Tensor] = {}

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Callable[[], Kept], tuple[()]]:
        return Kept, ()


def version_of(x: torch.Tensor) -> int:
    """Rises when `x` is written to; always 0 where torch does not count."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class PartOfShared(RowsOfWhole):
    """Part `place` of a SharedGpuLinear, under the name that the host calls: its rows, and its weight in `state_dict`."""

    whole: SharedGpuLinear

    def __init__(self, whole: SharedGpuLinear, place: int, linear: GpuSparseLinear) -> None:
        super().__init__(whole, sum(whole.sizes[:place]), linear)
        self.place = place

    @property
    def bias(self) -> torch.Tensor | None:
        return self.whole.bias[self.rows] if self.has_bias and self.whole.bias is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole.part(self.place, x)

    def dense(self) -> torch.Tensor:
        """The weight of this part, (out, in)."""
        return self.whole.packed.unpack()[self.rows]

    def original_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.clone()

    def take(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        whole = self.whole.packed.unpack()
        whole[self.rows].copy_(weight)
        self.whole.repack(whole)
        self.whole.kept.clear()
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, shares one kernel"


def share(host: nn.Module, program: Program) -> list[GpuSharing]:
    """Rewrite modules of `host`, in place: groups of linears over one input."""
    found = [share_group(host, group) for group in find_shared_passes(program)]
    return [sharing for sharing in found if sharing is not None]


def share_group(host: nn.Module, group: SharedPass) -> GpuSharing | None:
    """One group; None where fewer than two of it were packed, which the report explains."""
    members = tuple(name for name in group.members if type(host.get_submodule(name)) is GpuSparseLinear)
    if len(members) < 2:
        return None
    linears: list[Any] = [host.get_submodule(name) for name in members]
    sharing = GpuSharing(SharedPass(members))
    why = obstacle(host, linears, sharing)
    if why:
        return GpuSharing(SharedPass(members), why)
    whole = join(linears)
    whole.train(linears[0].training)
    parent = host.get_submodule(sharing.owner)
    for place, (leaf, linear) in enumerate(zip(sharing.leaves, linears, strict=True)):
        setattr(parent, leaf, PartOfShared(whole, place, linear).train(linear.training))
    parent.add_module("_".join(sharing.leaves), whole)
    return sharing


def obstacle(host: nn.Module, linears: Sequence[GpuSparseLinear], sharing: GpuSharing) -> str:
    """Why packed linears over one input cannot become one, or nothing."""
    if len({(n.cols, n.packed.value, n.dtype) for n in linears}) > 1:
        return "apart: they differ in width or value type"
    if any(n.format == "blocks" for n in linears):
        return "apart: tiles are packed one by one"
    if any(n.activation != "none" for n in linears):
        return "apart: an activation is fused into one of them"
    if any(n._forward_hooks or n._forward_pre_hooks for n in linears):
        return "apart: a linear has hooks"
    used = [module for _, module in host.named_modules(remove_duplicate=False)]
    if any(sum(m is n for m in used) > 1 for n in linears):
        return "apart: a module is used under several names"
    if hasattr(host.get_submodule(sharing.owner), "_".join(sharing.leaves)):
        return f"apart: {sharing.module} exists"
    return ""


def join(linears: Sequence[GpuSparseLinear]) -> SharedGpuLinear:
    """[q; k; v] as one layer; 2:4 stays 2:4 where all are, int8 values and scales are taken as they are."""
    values = torch.cat([stored_values(n) for n in linears])
    scales = [n.packed.scales for n in linears if n.packed.scales is not None]
    pack = pack_two_four if all(n.format == "two_four" for n in linears) else pack_stream
    packed = pack(values, torch.cat(scales) if scales else None, dtype=linears[0].dtype)
    bias = None
    if any(n.bias is not None for n in linears):
        bias = torch.cat([values.new_zeros(n.rows, dtype=n.dtype) if n.bias is None else n.bias for n in linears])
    return SharedGpuLinear(packed, bias, [n.rows for n in linears])


__all__ = ["GpuSharing", "PartOfShared", "SharedGpuLinear", "share"]
