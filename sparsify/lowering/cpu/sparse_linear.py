"""The modules that hold packed weights: one linear, and gate and up in one.

act(W x + b)          ──▶  SparseLinear
act(gate x) · (up x)  ──▶  GatedLinear, whose rows alternate gate and up; gate and up stay as halves of it

A forward keeps nothing of its input or its result: what a module returns depends on its arguments and its weight alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sparsify.errors import RefusedError
from sparsify.kernels.cpu import huge_pages
from sparsify.kernels.cpu import operator as packed_operator
from sparsify.kernels.cpu.build import BuildError, Kernels
from sparsify.kernels.cpu.codegen import generate
from sparsify.kernels.cpu.dispatch import (
    Choice,
    NonFiniteError,
    bucket,
    choose,
    kernels_for,
    layer_struct,
    run_kernel,
    serves,
)
from sparsify.kernels.cpu.formats import Bitmask, FormatError, concatenate, pack, pack_int8, quantize_int8
from sparsify.kernels.fallback import note
from sparsify.modules.kernel_module import GeneratedKernel, KernelModule
from sparsify.modules.rows_of_gated import Gated

if TYPE_CHECKING:
    from torch.fx.node import Argument

PACKED = ("masks", "values", "panel_ptr", "scales")


class SparseLinear(KernelModule):
    """`y = act(x Wᵀ + b)` with a packed weight; x (…, in_features) → (…, out_features), in x's dtype.

    packed: the weight; `validate()` runs here, so that no kernel sees damaged data.
    activation: fused epilogue: "none", "relu", "gelu", "gelu_tanh", "silu".
    gated: rows alternate gate and up, and the result is act(gate) · up with half as many features.
    int8: allow int8 activations (dynamic, one scale per token) where a VNNI kernel exists; int8 values only.
    transposed: the original weight was stored (in, out), as Conv1D does; for `state_dict`.

    Inference only; several threads may call one module. NaN and Inf in x give what the dense product gives.
    """

    masks: torch.Tensor
    values: torch.Tensor
    panel_ptr: torch.Tensor
    scales: torch.Tensor | None
    row_sums: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        packed: Bitmask,
        bias: torch.Tensor | None = None,
        *,
        activation: str = "none",
        gated: bool = False,
        int8: bool = True,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        packed.validate()
        self.packed = packed
        self.in_features, self.out_features = packed.cols, packed.rows // 2 if gated else packed.rows
        self.activation, self.gated, self.transposed = activation, gated, transposed
        self.int8 = int8 and packed.value == "s8" and not packed.group
        self.dtype = packed.dtype
        row_sums = packed.row_sums() if packed.value == "s8" else None
        for name in PACKED:
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.register_buffer("row_sums", row_sums, persistent=False)
        self.register_buffer("bias", bias.detach().float().contiguous() if bias is not None else None, persistent=False)
        self.bias_dtype = bias.dtype if bias is not None else packed.dtype
        self.choices: dict[tuple[int, int], Choice] = {}
        self.kernels: Kernels | None = None
        self.prepare()

    def prepare(self) -> None:
        """Check the packed tensors, load kernels and make the C view; without a compiler, forward unpacks instead (a warning and the
        report say so). Raises FormatError for tensors that no kernel may read."""
        with torch.inference_mode(False):  # inference tensors do not count their changes
            for name, tensor in self._buffers.items():
                if tensor is not None and tensor.is_inference():
                    self._buffers[name] = tensor.clone()
        buffers: dict[str, object] = {name: self._buffers[name] for name in PACKED}
        self.packed = replace(self.packed, **buffers)
        packed_operator.check_layer(self.packed, self.row_sums, self.bias, self.activation, self.gated, self.int8)
        if self.bias is not None and (self.bias.dtype != torch.float32 or not self.bias.is_contiguous()):
            raise FormatError(f"the bias of a packed layer is kept in contiguous float32, got {self.bias.dtype}")
        self.choices = {}
        try:
            self.kernels = kernels_for(self.packed)
        except BuildError as error:
            note(f"packed linears are unpacked in every call: {error}")
            self.kernels = None
        self.layer = layer_struct(self.packed, self.row_sums, self.bias, self.activation, self.gated)
        names = (*PACKED, "row_sums", "bias")
        held = {name: tensor for name in names if (tensor := self._buffers[name]) is not None}
        self.absent = tuple(name for name in names if name not in held)
        self.seen = tuple((name, tensor, tensor.data_ptr(), tensor._version) for name, tensor in held.items())

    def as_prepared(self) -> bool:
        """Whether the tensors that the C view points to are the buffers still, where they were and not written to since."""
        buffers = self._buffers
        for name, tensor, address, version in self.seen:
            if buffers[name] is not tensor or tensor.data_ptr() != address or tensor._version != version:
                return False
        return all(buffers[name] is None for name in self.absent)

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the original weight without its data; `packed.unpack()` has the values."""
        shape = (self.packed.rows, self.packed.cols)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=self.dtype, device="meta")

    def choice(
        self,
        tokens: int,
        measure: bool = False,
        dense: Callable[[int], Mapping[str, Callable[[], object]]] | None = None,
        cold: bool = False,
    ) -> Choice:
        """Kernel for a number of tokens; measured earlier, measured now (`measure`), or by the cost model.

        dense, cold: see `dispatch.choose`.
        """
        if self.kernels is None:
            raise BuildError("no kernels for this machine")
        key = (bucket(tokens), torch.get_num_threads())
        found = self.choices.get(key)
        if found is None or (measure and (found.measured is None or (dense is not None and not found.dense))):
            found = choose(self.packed, self.kernels, self.layer, tokens, self.int8, measure, dense, cold)
            self.choices[key] = found
        return found

    @property
    def operator(self) -> torch._ops.OpOverload:
        return torch.ops.sparsify.packed_linear.default

    def arguments(self, tensor: Callable[[str], Argument]) -> dict[str, Argument]:
        held = {name: None if getattr(self, name) is None else tensor(name) for name in (*PACKED, "row_sums", "bias")}
        sizes = {"rows": self.packed.rows, "cols": self.packed.cols, "group": self.packed.group}
        epilogue = {"residual": None, "activation": self.activation, "gated": self.gated}
        return {**held, **sizes, **epilogue, "int8": self.int8}

    def check_numbers(self) -> None:
        if not self.as_prepared():
            self.prepare()

    def generated(self, tokens: int, dtype: torch.dtype) -> Iterator[GeneratedKernel]:
        if self.kernels is not None and dtype != torch.float64:
            variant, choice = self.kernels.variant, serves(self.choice(tokens), dtype, tokens)
            yield GeneratedKernel(f"bitmask_{variant.value}_{variant.isa}", generate(variant), choice.kernel)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and x.requires_grad)
            or type(x) is not torch.Tensor
        ):
            return self.as_operator(x, residual)
        if x.device.type != "cpu":
            raise RefusedError(f"this layer was lowered for the CPU, x is on {x.device}")
        if x.dtype not in packed_operator.ACTIVATION_DTYPES or x.dim() == 0 or x.shape[-1] != self.in_features:
            packed_operator.check_activations("SparseLinear", x, self.in_features)
        if not self.as_prepared():  # a buffer was replaced or written to: nothing may be read by the old view
            self.prepare()
        flat = x.reshape(-1, self.in_features)
        tokens, shape = flat.shape[0], (*x.shape[:-1], self.out_features)
        if tokens == 0:
            return x.new_empty(shape)
        extra = None if residual is None else packed_operator.check_residual("SparseLinear", residual, x, shape)
        if self.kernels is None or x.dtype == torch.float64:  # the kernels sum in fp32
            y = self.dense_product(flat, extra)
        else:
            choice = self.choices.get((bucket(tokens), torch.get_num_threads())) or self.choice(tokens)
            choice = serves(choice, x.dtype, tokens)
            try:
                name, tile = choice.kernel, choice.row_tile
                y = run_kernel(self.kernels, name, self.layer, flat, self.out_features, extra, tile)
            except NonFiniteError:
                y = self.dense_product(flat, extra)
        return y.view(shape) if y.dtype == x.dtype else y.view(shape).to(x.dtype)

    def dense_product(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The same by unpacking, in fp32, or fp64 for such an x: for NaN and Inf, and without a compiler. x (tokens, in)."""
        exact = x.dtype if x.dtype == torch.float64 else torch.float32
        extra = None if residual is None else residual.to(exact)
        packed = replace(self.packed, dtype=exact)
        return packed_operator.dense_product(packed, x.to(exact), self.bias, self.activation, self.gated, extra)

    def as_operator(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The same product as one node of a graph; an activation that needs a gradient is a node of its own."""
        tensors = (self.masks, self.values, self.panel_ptr, self.scales, self.row_sums, self.bias)
        sizes = (self.packed.rows, self.packed.cols, self.packed.group)
        fused = self.activation != "none" or self.gated
        if fused and torch.is_grad_enabled() and x.requires_grad:
            y = torch.ops.sparsify.packed_linear(x, *tensors, None, *sizes, "none", False, self.int8)
            return packed_operator.epilogue(y, self.activation, self.gated, residual)
        return torch.ops.sparsify.packed_linear(x, *tensors, residual, *sizes, self.activation, self.gated, self.int8)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        probe = fn(torch.zeros(1))
        if probe.device.type != "cpu":
            raise RefusedError(f"this layer was lowered for the CPU and cannot move to {probe.device}")
        return self  # casts (half(), to(dtype)) concern the activations; the packed values stay exact

    def dense(self) -> torch.Tensor:
        return self.packed.unpack()

    def original_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(self.bias_dtype)

    def take(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.hold(repack(weight, self.packed))  # raises before anything changes
        if bias is not None:
            self.bias = bias.to("cpu", torch.float32, copy=True)
        self.prepare()

    def hold(self, packed: Bitmask) -> None:
        """Take another packed weight of the same shape and value type."""
        self.packed = packed
        self.row_sums = packed.row_sums() if packed.value == "s8" else None
        for name in PACKED:
            setattr(self, name, getattr(packed, name))

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        for name in ("kernels", "layer", "choices", "seen", "absent"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        buffers: dict[str, object] = {name: self._buffers[name] for name in PACKED}
        self.packed = replace(self.packed, **buffers)  # one set of tensors after a copy, not two
        huge_pages.make_huge(self.packed.masks)
        huge_pages.make_huge(self.packed.values)
        self.prepare()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, sparsity={self.packed.sparsity:.3f}, "
            f"values={self.packed.value}, activation={self.activation}"
        )


def repack(weight: torch.Tensor, like: Bitmask) -> Bitmask:
    """An (out, in) weight in the value type and grouping of another packed weight. Raises FormatError for one that cannot be packed."""
    weight = weight.to("cpu")
    value = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.get(like.value)
    if value is None:
        return pack_int8(*quantize_int8(weight, like.group), like.group, like.dtype)
    return replace(pack(weight.to(value)), dtype=like.dtype).validate()


def joined_bias(linears: Sequence[SparseLinear], interleave: bool = False) -> torch.Tensor | None:
    """Biases of several linears as one vector, zeros for those without; None when none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    vectors = [torch.zeros(n.packed.rows) if n.bias is None else n.bias for n in linears]
    return torch.stack(vectors, 1).flatten() if interleave else torch.cat(vectors)


class GatedLinear(Gated, SparseLinear):
    """`act(gate x) · (up x)` as one product; its rows alternate gate and up. `RowsOfGated` speak for it in `state_dict`."""

    def __init__(self, gate: SparseLinear, up: SparseLinear, activation: str) -> None:
        packed = concatenate([gate.packed, up.packed], interleave=True)
        bias = joined_bias([gate, up], interleave=True)
        super().__init__(packed, bias, activation=activation, gated=True, int8=gate.int8)
        self.bias_dtype = gate.bias_dtype if up.bias is None else up.bias_dtype

    def gate_and_up(self) -> torch.Tensor:
        return separated(self.packed.unpack())

    def bias_of_both(self) -> torch.Tensor | None:
        return None if self.bias is None else separated(self.bias).to(self.bias_dtype)

    def take_both(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.hold(repack(interleaved(weight), self.packed))
        if bias is not None:
            self.bias = interleaved(bias.to("cpu", torch.float32))
        self.prepare()


def interleaved(rows: torch.Tensor) -> torch.Tensor:
    """Gate rows followed by up rows → gate, up, gate, up, …"""
    return torch.stack(rows.chunk(2), 1).flatten(0, 1).contiguous()


def separated(rows: torch.Tensor) -> torch.Tensor:
    """gate, up, gate, up, … → gate rows followed by up rows."""
    return torch.cat([rows[0::2], rows[1::2]])


def halves(linear: SparseLinear) -> tuple[SparseLinear, SparseLinear]:
    """The first and the second half of a linear's rows, as linears over views of its packed weight."""
    rows = linear.packed.rows // 2
    biases = (None, None) if linear.bias is None else linear.bias.split(rows)
    first, second = (
        SparseLinear(linear.packed.part(place * rows, rows), bias, int8=linear.int8)
        for place, bias in enumerate(biases)
    )
    return first, second
