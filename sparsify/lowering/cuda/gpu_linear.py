"""The module that stands for a linear with a packed weight on a GPU."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from sparsify.kernels.checked_once import checked_once
from sparsify.kernels.gpu import launch, operator
from sparsify.kernels.gpu.build import KERNEL_DTYPES
from sparsify.kernels.gpu.codegen import generate
from sparsify.kernels.gpu.formats import (
    Blocks,
    FormatError,
    Stream,
    pack_blocks,
    pack_stream,
    pack_two_four,
    quantize_int8,
)
from sparsify.kernels.gpu.spec import TARGETS
from sparsify.modules.kernel_module import GeneratedKernel, KernelModule

if TYPE_CHECKING:
    from torch.fx.node import Argument

NAMES = {
    "stream": ("values", "meta", "base", "start", "order", "scales"),
    "blocks": ("values", "column", "start", "scales"),
}


class GpuSparseLinear(KernelModule):
    """`y = act(x Wᵀ + b) (· up) + residual` with a packed weight; x (…, in_features) → (…, out_features), in x's dtype.

    packed: a `Stream` or `Blocks`; `validate()` runs here, so that no kernel sees damaged data.
    activation: fused epilogue: "none", "relu", "gelu", "gelu_tanh", "silu"; `packed.gated` multiplies with the up half.
    transposed: the original weight was stored (in, out), as Conv1D does; for `state_dict`.

    Inference only.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        packed: Stream | Blocks,
        bias: torch.Tensor | None = None,
        *,
        activation: str = "none",
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.activation, self.transposed = activation, transposed
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)
        self.adopt(packed)

    def adopt(self, packed: Stream | Blocks) -> None:
        """Take a packed weight's tensors as buffers; inference tensors, which do not count their changes, are copied."""
        packed.validate()
        self.format = packed.format if isinstance(packed, Stream) else "blocks"
        self.gated = isinstance(packed, Stream) and packed.gated
        self.rows, self.cols, self.dtype = packed.rows, packed.cols, packed.dtype
        self.in_features, self.out_features = packed.cols, packed.outputs
        self.names = NAMES["blocks" if self.format == "blocks" else "stream"][: len(packed.tensors)]
        for name, tensor in zip(self.names, packed.tensors, strict=True):
            with torch.inference_mode(False):
                self.register_buffer(name, tensor.clone() if tensor.is_inference() else tensor, persistent=False)

    def repack(self, weight: torch.Tensor) -> None:
        """Replace the weight (rows, cols), in the value type of the old one."""
        quantize = "int8" if "scales" in self.names else None
        fresh = pack_smallest(weight.to(self.tensors[0].device, self.dtype), quantize, self.gated)
        for name in self.names:
            del self._buffers[name]
        self.adopt(fresh)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self.names]

    @property
    def packed(self) -> Stream | Blocks:
        """The packed weight over this module's buffers."""
        return operator.rebuild(self.format, self.rows, self.cols, self.gated, self.tensors, self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the original weight without its data; `packed.unpack()` has the values."""
        shape = (self.rows, self.cols)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=self.dtype, device="meta")

    @property
    def operator(self) -> torch._ops.OpOverload:
        return torch.ops.sparsify.gpu_linear.default

    def arguments(self, tensor: Callable[[str], Argument]) -> dict[str, Argument]:
        bias = None if self.bias is None else tensor("bias")
        sizes = {"format": self.format, "rows": self.rows, "cols": self.cols, "gated": self.gated}
        epilogue = {"residual": None, "activation": self.activation}
        return {"bias": bias, **sizes, **epilogue, "packed": [tensor(name) for name in self.names]}

    def check_numbers(self) -> None:
        packed = self.packed
        checked_once(("gpu", self.format, self.rows, self.cols, self.gated), packed.tensors, packed.validate)

    def generated(self, tokens: int, dtype: torch.dtype) -> Iterator[GeneratedKernel]:
        packed = self.packed
        fits = packed.value == "int8" or self.format != "blocks" or dtype == packed.values.dtype
        if tokens and dtype in KERNEL_DTYPES and fits and launch.target_of(packed.values.device) in TARGETS:
            x = packed.values.new_empty((tokens, 0), dtype=dtype)
            spec = launch.product_spec(packed, x, self.bias is not None, self.activation)
            source = generate(spec)
            digest = hashlib.sha256(source.encode()).hexdigest()[:8]
            name = "_".join(filter(None, (spec.op, spec.format, spec.value, spec.target, digest)))
            yield GeneratedKernel(name, source, spec.op)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        sizes = (self.format, self.rows, self.cols, self.gated, self.activation)
        return torch.ops.sparsify.gpu_linear(x, self.bias, residual, *sizes, self.tensors)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GpuSparseLinear:
        """`.to(dtype)`, `.half()` concern the bias and the activations; packed values only move."""
        kept = {name: self._buffers.pop(name) for name in self.names}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            assert tensor is not None
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def dense(self) -> torch.Tensor:
        return self.packed.unpack()

    def take(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.repack(weight)
        if bias is not None:
            self.bias = bias.to(self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}, "
            f"values={self.packed.value}, activation={self.activation}"
        )


def pack_smallest(
    weight: torch.Tensor, quantize: Literal["int8"] | None = None, gated: bool = False
) -> Stream | Blocks:
    """The format that takes the fewest bytes for a weight (out, in): a stream, 2:4, or whole tiles."""
    dtype, scales = weight.dtype, None
    if quantize == "int8":
        weight, scales = quantize_int8(weight)
    found: list[Stream | Blocks] = [pack_stream(weight, scales, gated=gated, dtype=dtype)]
    with contextlib.suppress(FormatError):  # not 2:4: the stream serves
        found.append(pack_two_four(weight, scales, gated=gated, dtype=dtype))
    for side in (64, 32, 16):
        if not gated and weight.shape[0] % side == 0 and weight.shape[1] % side == 0:
            found.append(pack_blocks(weight, side, side, scales, dtype=dtype))
    return min(found, key=lambda packed: packed.nbytes)


def stored_values(linear: GpuSparseLinear) -> torch.Tensor:
    """Values as they are stored, in their places: integers for int8, unscaled."""
    packed = linear.packed
    assert isinstance(packed, Stream)
    return replace(packed, scales=None, dtype=packed.values.dtype).unpack()
