"""Which weights of a host can take an addend per token, in the names, shapes and coordinates of the original model.

nn.Linear, Conv1D, a linear over a packed base      y = forward(x), then the addend
lowered for the CPU                                 the same; before the activation where one is fused
anything else (embeddings, convolutions, norms, packed experts, classes of the user's own)      refused, with the reason
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsify.adapters.adapter import tensor_hash
from sparsify.errors import AdapterError
from sparsify.host.quantized_bases import activation_dtype, looks_packed, packed_base
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.methods.packed import QuantizedMixin
from sparsify.model.linears import is_conv1d, is_plain_linear
from sparsify.modules.original_state import OriginalState
from sparsify.modules.rows_of_gated import RowsOfGated
from sparsify.program import canonical_names
from sparsify.serving.base_copy import skeleton

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


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
    """The base as adapters see it. reading: the host as a tree of plain linears, in which readers look names up.

    quantize: weight → format in which it is packed. rounded: weights whose values were rounded when they were packed, so that no hash
    tells which base they were. unchecked: why it is not known whether linears see rows one after another; empty where it is.
    """

    host: nn.Module
    reading: nn.Module
    targets: dict[str, Target]
    declined: dict[str, str]
    canonical: dict[str, str]
    shapes: dict[str, torch.Size]
    quantize: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    rounded: set[str] = field(default_factory=set)
    unchecked: str = ""

    def __post_init__(self) -> None:
        self.by_bias = {t.bias: t for t in self.targets.values() if t.bias}

    def value(self, param: str) -> Tensor:
        """The stored base value of a parameter. Raises AdapterError for a packed one, whose value before that is not kept."""
        if param in self.quantize and param in self.targets:
            raise AdapterError(f"{param} is packed ({self.quantize[param]}), and what it was before is not kept")
        owner, _, leaf = param.rpartition(".")
        module = self.host.get_submodule(owner)
        if not isinstance(module, OriginalState):
            return getattr(module, leaf).detach()
        if leaf == "weight":
            return (module.dense().t() if module.transposed else module.dense()).contiguous()
        bias = module.original_bias()
        assert bias is not None
        return bias.detach()

    def hash(self, param: str) -> str:
        """Of the base that adapters were trained on. Raises AdapterError for a weight of which that cannot be told."""
        if param in self.rounded and param not in self.hashes:
            raise AdapterError(
                f"{param} was rounded to {self.quantize.get(param, 'int8')} when the base was lowered, so it cannot be told whether the "
                "adapter was trained on it: pass strict=False to add it all the same"
            )
        found = self.hashes.get(param)
        if found is None:
            found = self.hashes[param] = tensor_hash(self.value(param))
        return found

    def why_not(self, param: str) -> str:
        """Why a parameter takes no addend."""
        return self.declined.get(param) or "it is no weight of a linear layer"


def is_linear(module: nn.Module) -> bool:
    """Whether the module's forward is `x Wᵀ + b`, and nothing else reads its weight."""
    if isinstance(module, OriginalState):
        return takes_addends(module)
    packed = isinstance(module, QuantizedMixin) and hasattr(module, "packed_names")
    return packed or is_plain_linear(module) or looks_packed(module)


def takes_addends(module: OriginalState) -> bool:
    """Whether a lowered linear can add before its epilogue: all for the CPU can; a GPU kernel that has one cannot."""
    if isinstance(module, RowsOfGated):
        return isinstance(module.whole, SparseLinear)
    fused = getattr(module, "activation", "none") != "none" or getattr(module, "gated", False)
    return isinstance(module, SparseLinear) or not fused


def logical_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, SparseLinear):
        return module.packed.rows, module.packed.cols
    if isinstance(module, QuantizedMixin):
        return module.logical_shape()
    if is_conv1d(module):
        rows, columns = module.get_parameter("weight").shape
        return columns, rows
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def find_targets(host: nn.Module, quantize: Mapping[str, str], hashes: Mapping[str, str]) -> Base:
    """Look at every module of the host, which belongs to it alone. quantize, hashes: of weights that `Quantize` packed there."""
    reading = skeleton(host)
    canonical = canonical_names(reading)
    holders: dict[str, list[tuple[str, nn.Module]]] = {}
    modules = dict(host.named_modules(remove_duplicate=False))
    for name, first in canonical.items():
        holders.setdefault(first, []).append((name, modules[name.rpartition(".")[0]]))
    rounded = set()
    targets: dict[str, Target] = {}
    declined: dict[str, str] = {}
    shapes = {name: parameter.shape for name, parameter in reading.named_parameters()}
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
        bias = canonical.get(f"{param.removesuffix('weight')}bias", "")
        transposed = first.transposed if isinstance(first, OriginalState) else is_conv1d(first)
        names = tuple(name for name, _ in held)
        target = Target(len(targets), param, names, own, logical_shape(first), transposed, bias)
        targets[param] = target
        shapes[param] = target.stored_shape
        if is_rounded(first):
            rounded.add(param)
        if looks_packed(first):
            base = packed_base(first, param, default)
            if base is not None:
                packed[param], known[param] = base.format, base.hash()
    return Base(host, reading, targets, declined, canonical, shapes, packed, known, rounded)


def is_rounded(module: nn.Module) -> bool:
    """Whether a lowered weight is not the one that it was lowered from, bit for bit."""
    whole = module.whole if isinstance(module, RowsOfGated) else module
    if isinstance(whole, SparseLinear):
        return whole.packed.value == "s8" or TYPES.get(whole.packed.value) != whole.dtype
    return isinstance(whole, OriginalState) and not isinstance(whole, PrepackedLinear)


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
