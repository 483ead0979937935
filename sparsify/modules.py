"""Host modules that carry trained parts: subclasses of what they replace, so `isinstance`, hooks and names go on working.

nn.Linear, Conv1D ──▶ Partial…        weight frozen; weight_slice trains                        S2FT, PaCA
                      SparseLowRank…  weight frozen; sparse_values, lora_A, lora_B train        RoSA, LoRA
                      Quantized…      no weight, packed_0 … packed_n; any of the above beside   Quantize
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import sparsify.masked  # registers apply_mask and masked_linear
import sparsify.ops
from sparsify.lowrank_ops import dense_weight, write_values
from sparsify.program import SparseLowRank, TrainedSlice


class AdaptedMixin:
    """What all adapted linears share. `conv1d` says that the stored weight is `(in, out)`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    conv1d = False

    def stored_shape(self) -> torch.Size:
        return self.weight.shape

    def logical_shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        shape = self.stored_shape()
        return (shape[1], shape[0]) if self.conv1d else (shape[0], shape[1])

    def check_dtype(self, x: Tensor) -> None:
        """The same refusal as `F.linear`: without autocast, input and weight must agree in dtype."""
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(
                f"{type(self).__name__}: the input is {x.dtype}, the weight {self.weight.dtype}; cast one, or use autocast"
            )

    def described(self) -> str:
        n, m = self.logical_shape()
        return f"in_features={m}, out_features={n}, bias={self.bias is not None}"


class PartialMixin(AdaptedMixin):
    """A linear with trained channels: a contiguous block at `slice_start`, or those at `slice_channels (s,)`.

    slice_axis: 1 for input columns, `weight_slice (out, s)`; 0 for output rows, `(s, in)`.
    """

    weight_slice: nn.Parameter
    slice_channels: Tensor
    slice_start: int
    slice_axis: int

    def trained_block(self) -> Tensor:
        """The trained channels; over a pruned base the pruned entries stay zero and get no gradient."""
        bits = getattr(self, "slice_mask_bits", None)
        return self.weight_slice if bits is None else torch.ops.sparsify.apply_mask(self.weight_slice, bits)

    def forward(self, x: Tensor) -> Tensor:
        self.check_dtype(x)
        weight, block = self.weight.t() if self.conv1d else self.weight, self.trained_block()
        if self.slice_start < 0:
            return torch.ops.sparsify.partial_linear_at(
                x, weight, self.bias, block, self.slice_channels, self.slice_axis
            )
        return torch.ops.sparsify.partial_linear(x, weight, self.bias, block, self.slice_start, self.slice_axis)

    def extra_repr(self) -> str:
        return f"{self.described()}, {describe_slice(self)}"


class SparseLowRankMixin(AdaptedMixin):
    """A linear with a sparse and a low-rank part; either may be missing, and an open mask keeps the sparse part silent.

    sparse_values (k,), sparse_index (k,) flat in the stored weight; lora_A (r, in), lora_B (out, r); scale, dropout.
    """

    sparse_values: nn.Parameter
    sparse_index: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    dropout: float
    mask_open: bool
    training: bool

    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        sparse = hasattr(self, "sparse_values") and not self.mask_open
        values, index = (self.sparse_values, self.sparse_index) if sparse else (None, None)
        a, b = (self.lora_A, self.lora_B) if hasattr(self, "lora_A") else (None, None)
        return values, index, a, b

    def forward(self, x: Tensor) -> Tensor:
        self.check_dtype(x)
        values, index, a, b = self.parts()
        if self.dropout and self.training and a is not None and b is not None:
            y = self.multiply(x, values, index, None, None)
            dropped = torch.nn.functional.dropout(x, self.dropout)
            low = torch.nn.functional.linear(dropped.to(y.dtype), a.to(y.dtype))
            return y + self.scale * torch.nn.functional.linear(low, b.to(y.dtype))
        return self.multiply(x, values, index, a, b)

    def multiply(
        self, x: Tensor, values: Tensor | None, index: Tensor | None, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        return torch.ops.sparsify.sparse_lowrank_linear(
            x, self.weight, self.bias, values, index, a, b, self.scale, self.conv1d
        )

    def extra_repr(self) -> str:
        return f"{self.described()}, {describe_parts(self)}"


class QuantizedMixin(SparseLowRankMixin, PartialMixin):
    """A linear over a packed base, with any trained part beside it. `weight` is empty and only carries dtype and device."""

    _buffers: dict[str, Any]
    packed_names: tuple[str, ...]
    format: str
    shape: torch.Size
    compute_dtype: torch.dtype | None = None  # of a base that computes in it whatever the input has (bitsandbytes)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None or x.dtype == self.compute_dtype:
            return super().forward(x)
        return super().forward(x.to(self.compute_dtype)).to(x.dtype)

    def stored_shape(self) -> torch.Size:
        return self.shape

    def packed(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.packed_names]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to(dtype)`, `.half()`: scales of the packed base keep their precision, or the base would move."""
        kept = {name: self._buffers.pop(name) for name in self.packed_names}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, tensor in kept.items():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def multiply(
        self, x: Tensor, values: Tensor | None, index: Tensor | None, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        block = self.trained_block() if hasattr(self, "weight_slice") else None
        channels = getattr(self, "slice_channels", None) if block is not None else None
        axis = self.slice_axis if block is not None else 1
        return torch.ops.sparsify.quantized_linear(
            x, self.format, self.shape[0], self.shape[1], self.conv1d, self.bias, block, channels, axis, values, index, a, b,
            self.scale, self.packed(),
        )  # fmt: skip

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight that the packed base and its trained channels and entries stand for (no low-rank part)."""
        values, index, _, _ = self.parts()
        block = self.trained_block() if hasattr(self, "weight_slice") else None
        channels = getattr(self, "slice_channels", None) if block is not None else None
        axis = self.slice_axis if block is not None else 1
        parts = (block, channels, axis, values, index)
        return dense_weight(self.packed(), self.format, list(self.shape), self.conv1d, self.weight.dtype, *parts)

    def extra_repr(self) -> str:
        extra = [describe_slice(self)] if hasattr(self, "weight_slice") else []
        extra += [describe_parts(self)] if hasattr(self, "sparse_values") or hasattr(self, "lora_A") else []
        return ", ".join([self.described(), f"format={self.format}", *extra])


def describe_slice(module: Any) -> str:
    side = "columns" if module.slice_axis == 1 else "rows"
    size = module.weight_slice.shape[module.slice_axis]
    start = module.slice_start
    return f"trained {side}=[{start}:{start + size}]" if start >= 0 else f"trained {side}={size} scattered"


def describe_parts(module: Any) -> str:
    text = [f"rank={module.lora_A.shape[0]}, scale={module.scale:g}"] if hasattr(module, "lora_A") else []
    if hasattr(module, "sparse_values"):
        text.append(f"sparse={module.sparse_values.numel()}{' (mask open)' if module.mask_open else ''}")
    return ", ".join(text)


class PartialLinear(PartialMixin, nn.Linear):
    """`nn.Linear` with trained input columns (S2FT Down and O, PaCA) or output rows (S2FT Up and V)."""


class SparseLowRankLinear(SparseLowRankMixin, nn.Linear):
    """`nn.Linear` with a sparse and a low-rank part (RoSA, LoRA)."""


class QuantizedLinear(QuantizedMixin, nn.Linear):
    """`nn.Linear` over a packed base."""


LINEARS: dict[str, type[nn.Module]] = {
    "Partial": PartialLinear,
    "SparseLowRank": SparseLowRankLinear,
    "Quantized": QuantizedLinear,
}
MIXINS: dict[str, type] = {"Partial": PartialMixin, "SparseLowRank": SparseLowRankMixin, "Quantized": QuantizedMixin}


@functools.cache
def conv1d_class(kind: str) -> type[nn.Module]:
    """The same for transformers' Conv1D, whose weight is stored `(in, out)`; made on first use to keep imports lean."""
    from transformers.pytorch_utils import Conv1D

    def reduce(self: Any, protocol: Any) -> Any:
        return rebuild_conv1d, (kind,), self.__dict__

    body = {
        "conv1d": True,
        "__reduce_ex__": reduce,
        "__doc__": f"GPT-2's Conv1D, {kind.lower()}.",
        "__module__": __name__,
    }
    return type(f"{kind}Conv1D", (MIXINS[kind], Conv1D), body)


def rebuild_conv1d(kind: str) -> nn.Module:
    cls = conv1d_class(kind)
    return cls.__new__(cls)


def become(module: nn.Module, kind: str) -> None:
    """Turn a linear of *our own* module tree into an adapted one, in place: hooks, name and references stay."""
    cls: Any = LINEARS[kind] if isinstance(module, nn.Linear) else conv1d_class(kind)
    if not isinstance(module, AdaptedMixin):
        module.__dict__["user_class"] = type(module)
    module.__class__ = cls


def make_linear(module: nn.Module) -> None:
    """A linear of a subclass of `nn.Linear` without state of its own becomes an `nn.Linear`."""
    module.__class__ = nn.Linear


def make_plain(module: nn.Module) -> None:
    """Back to the class that the user had; parameters of trained parts must be gone."""
    module.__class__ = module.__dict__.pop("user_class", type(module))


def as_parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value)


def attach_slice(module: Any, piece: TrainedSlice, block: Tensor, bits: Tensor | None = None) -> None:
    """Give a module its trained channels (its class is set by `become`), and their packed mask over a pruned base."""
    module.weight_slice = as_parameter(block)
    module.slice_start = piece.start
    module.slice_axis = piece.logical_axis
    if piece.places or hasattr(module, "packed_names"):
        places = piece.places or tuple(range(piece.start, piece.start + piece.length))
        module.register_buffer("slice_channels", torch.tensor(places, device=block.device), persistent=False)
    if bits is not None:
        module.register_buffer("slice_mask_bits", bits, persistent=False)


def detach_slice(module: Any) -> nn.Parameter:
    block = module._parameters.pop("weight_slice")
    for leaf in ("slice_channels", "slice_mask_bits"):
        module._buffers.pop(leaf, None)
        module._non_persistent_buffers_set.discard(leaf)
    del module.slice_start, module.slice_axis
    return block


def attach_parts(module: Any, part: SparseLowRank | None, tensors: dict[str, Tensor]) -> None:
    """Give a module its sparse and low-rank parts from `sparse_values`, `sparse_index`, `lora_A`, `lora_B`."""
    module.scale = part.scale if part is not None else 1.0
    module.dropout = part.dropout if part is not None else 0.0
    module.mask_open = part is not None and part.count > 0 and part.index is None
    if "sparse_values" in tensors:
        module.sparse_values = as_parameter(tensors["sparse_values"])
        module.register_buffer("sparse_index", tensors["sparse_index"])
    if "lora_A" in tensors:
        module.lora_A, module.lora_B = as_parameter(tensors["lora_A"]), as_parameter(tensors["lora_B"])


def detach_parts(module: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for leaf in ("sparse_values", "lora_A", "lora_B"):
        if leaf in module._parameters:
            found[leaf] = module._parameters.pop(leaf)
    if "sparse_index" in module._buffers:
        found["sparse_index"] = module._buffers.pop("sparse_index")
    for leaf in ("scale", "dropout", "mask_open"):
        module.__dict__.pop(leaf, None)
    return found


def write_parts(module: Any) -> None:
    """Bring the stored dense weight up to date with what the operator would compute, low-rank part included."""
    weight = module.weight
    if hasattr(module, "weight_slice"):
        logical, block = weight.t() if module.conv1d else weight, module.trained_block().detach()
        if module.slice_start < 0:
            sparsify.ops.write_block_at(logical, block, module.slice_channels, module.slice_axis)
        else:
            sparsify.ops.write_block(logical, block, module.slice_start, module.slice_axis)
    if isinstance(module, SparseLowRankMixin):
        values, index, a, b = module.parts()
        write_values(weight, None if values is None else values.detach(), index)
        if a is not None and b is not None:
            weight.data.copy_(add_low_rank(module, weight.data))


def low_rank_delta(module: Any) -> Tensor:
    """`s · B A` in fp32, or fp64 where the factors are, laid out like the stored weight."""
    a, b = (t.detach() if t.dtype == torch.float64 else t.detach().float() for t in (module.lora_A, module.lora_B))
    delta = module.scale * (b @ a)
    return delta.t() if module.conv1d else delta


def add_low_rank(module: Any, weight: Tensor) -> Tensor:
    """`W + s · B A`, summed in fp32 or fp64, in the weight's dtype; a fresh tensor."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return (wide + low_rank_delta(module)).to(weight.dtype)
