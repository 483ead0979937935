"""Which weights of a host can take an addend per token, in the names, shapes and coordinates of the original model.

nn.Linear, Conv1D, a linear over a packed base      y = forward(x), then the addend
anything else (embeddings, convolutions, norms, packed experts, classes of the user's own)      refused, with the reason
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsify.adapters.adapter import tensor_hash
from sparsify.host.quantized_bases import activation_dtype, looks_packed, packed_base
from sparsify.methods.packed import QuantizedMixin
from sparsify.model.linears import is_conv1d, is_plain_linear
from sparsify.program import canonical_names


@dataclass
class Target:
    """One weight. number: its place in the table. names: under which the host has it. shape: `(out, in)`. bias: its bias's name, or ""."""

    number: int
    param: str
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    shape: tuple[int, int]
    transposed: bool
    bias: str

    @property
    def stored_shape(self) -> torch.Size:
        return torch.Size(self.shape[::-1] if self.transposed else self.shape)


@dataclass
class Base:
    """The base as adapters see it. host: the tree in which names are looked up. quantize: weight → format in which it is packed."""

    host: nn.Module
    targets: dict[str, Target]
    declined: dict[str, str]
    canonical: dict[str, str]
    shapes: dict[str, torch.Size]
    quantize: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_bias = {t.bias: t for t in self.targets.values() if t.bias}

    def value(self, param: str) -> Tensor:
        """The stored base value of a parameter."""
        owner, _, leaf = param.rpartition(".")
        return getattr(self.host.get_submodule(owner), leaf).detach()

    def hash(self, param: str) -> str:
        found = self.hashes.get(param)
        if found is None:
            found = self.hashes[param] = tensor_hash(self.value(param))
        return found

    def why_not(self, param: str) -> str:
        """Why a parameter takes no addend."""
        return self.declined.get(param) or "it is no weight of a linear layer"


def is_linear(module: nn.Module) -> bool:
    """Whether the module's forward is `x Wᵀ + b`, and nothing else reads its weight."""
    return (
        is_plain_linear(module)
        or (isinstance(module, QuantizedMixin) and hasattr(module, "packed_names"))
        or looks_packed(module)
    )


def logical_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, QuantizedMixin):
        return module.logical_shape()
    if is_conv1d(module):
        rows, columns = module.get_parameter("weight").shape
        return columns, rows
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def find_targets(host: nn.Module, quantize: Mapping[str, str], hashes: Mapping[str, str]) -> Base:
    """Look at every module of the host, which belongs to it alone. quantize, hashes: of weights that `Quantize` packed there."""
    canonical = canonical_names(host)
    holders: dict[str, list[tuple[str, nn.Module]]] = {}
    modules = dict(host.named_modules(remove_duplicate=False))
    for name, first in canonical.items():
        holders.setdefault(first, []).append((name, modules[name.rpartition(".")[0]]))
    targets: dict[str, Target] = {}
    declined: dict[str, str] = {}
    shapes = {name: parameter.shape for name, parameter in host.named_parameters()}
    packed: dict[str, str] = dict(quantize)
    known = dict(hashes)
    default = activation_dtype(host, {id(m) for m in host.modules() if looks_packed(m)})
    for param, held in holders.items():
        if param.rpartition(".")[2] != "weight":
            continue
        reason = next((r for r in (why_not(module, name) for name, module in held) if r), "")
        if reason:
            declined[param] = reason
            continue
        own = tuple({id(module): module for _, module in held}.values())
        first = own[0]
        bias = (
            canonical.get(f"{param.removesuffix('weight')}bias", "")
            if first._parameters.get("bias") is not None
            else ""
        )
        target = Target(
            len(targets), param, tuple(name for name, _ in held), own, logical_shape(first), is_conv1d(first), bias
        )
        targets[param] = target
        shapes[param] = target.stored_shape
        if looks_packed(first):
            base = packed_base(first, param, default)
            if base is not None:
                packed[param], known[param] = base.format, base.hash()
    return Base(host, targets, declined, canonical, shapes, packed, known)


def why_not(module: nn.Module, name: str) -> str:
    if is_linear(module):
        return ""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return f"{name} is looked up in an embedding, which takes no addend per token"
    if isinstance(module, nn.Linear):
        return f"{name} belongs to a {kind}, which derives from nn.Linear and may do more than multiply"
    return f"{name} belongs to a {kind}, which is no linear layer"


__all__ = ["Base", "Target", "find_targets"]
