"""The modules that hold packed weights: one linear, linears that share a pass over their input, gate and up in one.

q, k, v (rows, in) over one x  ──▶  SparseLinear each, on views of one packed weight; one kernel call serves all three
act(gate x) · (up x)           ──▶  GatedLinear, whose rows alternate gate and up; gate and up stay as halves of it
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsify.errors import RefusedError
from sparsify.kernels.cpu import huge_pages
from sparsify.kernels.cpu import operator as packed_operator
from sparsify.kernels.cpu.build import BuildError, Kernels
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
from sparsify.kernels.cpu.formats import PANEL, Bitmask, concatenate, pack, pack_int8, quantize_int8
from sparsify.lowering.original_state import OriginalState

SHARED_TOKENS = 32  # up to here one call for all members pays; above, copying the parts out costs more than it saves


class SparseLinear(OriginalState):
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
        self.shared: SharedInput | None = None
        packed.validate()
        self.packed = packed
        self.in_features, self.out_features = packed.cols, packed.rows // 2 if gated else packed.rows
        self.activation, self.gated, self.transposed = activation, gated, transposed
        self.int8 = int8 and packed.value == "s8" and not packed.group
        self.dtype = packed.dtype
        row_sums = packed.row_sums() if packed.value == "s8" else None
        for name in ("masks", "values", "panel_ptr", "scales"):
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.register_buffer("row_sums", row_sums, persistent=False)
        self.register_buffer("bias", bias.detach().float().contiguous() if bias is not None else None, persistent=False)
        self.bias_dtype = bias.dtype if bias is not None else packed.dtype
        self.choices: dict[tuple[int, int], Choice] = {}
        self.kernels: Kernels | None = None
        self.prepare()

    def prepare(self) -> None:
        """Load kernels and make the C view; without a compiler, forward unpacks instead (the report says so)."""
        self.choices = {}
        try:
            self.kernels = kernels_for(self.packed)
        except BuildError:
            self.kernels = None
        self.layer = layer_struct(self.packed, self.row_sums, self.bias, self.activation, self.gated)

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the original weight without its data; `packed.unpack()` has the values."""
        shape = (self.packed.rows, self.packed.cols)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=self.dtype, device="meta")

    def choice(
        self,
        tokens: int,
        measure: bool = False,
        dense: Callable[[int], Mapping[str, Callable[[], Any]]] | None = None,
    ) -> Choice:
        """Kernel for a number of tokens; measured earlier, measured now (`measure`), or by the cost model.

        dense: see `dispatch.choose`.
        """
        if self.kernels is None:
            raise BuildError("no kernels for this machine")
        key = (bucket(tokens), torch.get_num_threads())
        found = self.choices.get(key)
        if found is None or (measure and (found.measured is None or (dense is not None and not found.dense))):
            found = choose(self.packed, self.kernels, self.layer, tokens, self.int8, measure, dense)
            self.choices[key] = found
        return found

    @property
    def epilogue(self) -> str:
        """What is fused behind the product, for the program's text: "silu · up", "gelu", or nothing."""
        name = "" if self.activation == "none" else self.activation
        return f"{name or '1'} · up" if self.gated else name

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and x.requires_grad)
            or type(x) is not torch.Tensor
        ):
            return self.as_operator(x, residual)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear({self.in_features} → {self.out_features}) got x of shape {tuple(x.shape)}")
        if x.device.type != "cpu":
            raise RefusedError(f"this layer was lowered for the CPU, x is on {x.device}")
        flat = x.reshape(-1, self.in_features)
        tokens, shape = flat.shape[0], (*x.shape[:-1], self.out_features)
        if tokens == 0:
            return x.new_empty(shape)
        if self.shared is not None and residual is None and tokens <= SHARED_TOKENS:
            return self.shared.product(self, x)
        extra = residual.reshape(-1, self.out_features) if residual is not None else None
        if self.kernels is None:
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
        """The same by unpacking, in fp32: for NaN and Inf, and without a compiler. x (tokens, in)."""
        extra = None if residual is None else residual.float()
        return packed_operator.dense_product(self.packed, x.float(), self.bias, self.activation, self.gated, extra)

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
        if self.shared is not None:
            self.shared.dissolve()
        self.hold(repack(weight, self.packed))
        if bias is not None:
            self.bias = bias.float().contiguous()
        self.prepare()

    def hold(self, packed: Bitmask) -> None:
        """Take another packed weight of the same shape and value type."""
        self.packed = packed
        self.row_sums = packed.row_sums() if packed.value == "s8" else None
        for name in ("masks", "values", "panel_ptr", "scales"):
            setattr(self, name, getattr(packed, name))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("kernels", "layer", "choices"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        buffers = {name: self._buffers[name] for name in ("masks", "values", "panel_ptr", "scales")}
        self.packed = replace(self.packed, **buffers)  # one set of tensors after a copy, not two
        huge_pages.make_huge(self.packed.masks)
        huge_pages.make_huge(self.packed.values)
        self.prepare()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, sparsity={self.packed.sparsity:.3f}, "
            f"values={self.packed.value}, activation={self.activation}"
            + (", shares its pass over the input" if self.shared is not None else "")
        )


def repack(weight: torch.Tensor, like: Bitmask) -> Bitmask:
    """An (out, in) weight in the value type and grouping of another packed weight."""
    value = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.get(like.value)
    if value is None:
        return pack_int8(*quantize_int8(weight, like.group), like.group, like.dtype)
    return replace(pack(weight.to(value)), dtype=like.dtype).validate()


class SharedInput:
    """Linears over one input, whose packed rows are views of one weight: with few tokens, one call computes them all.

    Whoever is called first with an input computes everything, and the others find their part. The parts are kept per thread,
    for that very input tensor only, and each is handed out once. Outside of one forward nothing is kept that was asked for.
    """

    def __init__(self, whole: SparseLinear, members: Sequence[SparseLinear]) -> None:
        self.whole, self.members = whole, tuple(members)
        self.kept = threading.local()

    @property
    def sizes(self) -> list[int]:
        return [member.out_features for member in self.members]

    def product(self, member: SparseLinear, x: torch.Tensor) -> torch.Tensor:
        """`member`'s rows of the product with x (…, in): computed now for every member, or by an earlier one."""
        place = next(i for i, other in enumerate(self.members) if other is member)
        version = 0 if x.is_inference() else x._version
        source, seen, parts = getattr(self.kept, "parts", (None, 0, {}))
        if source is x and seen == version and place in parts:
            y = parts.pop(place)
            if not parts:
                del self.kept.parts
            return y
        split = self.whole(x).split(self.sizes, dim=-1)
        self.kept.parts = (x, version, {i: p.contiguous() for i, p in enumerate(split) if i != place})
        return split[place].contiguous()

    def dissolve(self) -> None:
        """Let every member compute on its own rows, because one of them is about to change."""
        for member in self.members:
            member.shared = None

    def __getstate__(self) -> dict[str, Any]:
        return {"whole": self.whole, "members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.kept = threading.local()


def share_input(linears: Sequence[SparseLinear]) -> SharedInput | str:
    """Give linears over one input one packed weight; or the reason why they keep their own."""
    if any(linear.packed.rows % PANEL for linear in linears[:-1]):
        return f"a number of rows is no multiple of {PANEL}"
    first = linears[0].packed
    kinds = {(linear.packed.cols, linear.packed.value, linear.packed.group, linear.dtype) for linear in linears}
    if len(kinds) > 1 or len({linear.int8 for linear in linears}) > 1:
        return "they differ in width, value type or group size"
    if any(linear.activation != "none" or linear.gated for linear in linears):
        return "an activation is fused into one of them"
    whole = SparseLinear(concatenate([linear.packed for linear in linears]), joined_bias(linears), int8=linears[0].int8)
    shared, row = SharedInput(whole, linears), 0
    for linear in linears:
        rows = linear.packed.rows
        packed = whole.packed.part(row, rows)
        if linear.packed.value == "s8" and whole.row_sums is not None:
            linear.row_sums = whole.row_sums[row : row + rows]
        linear.packed = replace(packed, dtype=first.dtype)
        for name in ("masks", "values", "panel_ptr", "scales"):
            setattr(linear, name, getattr(packed, name))
        linear.prepare()
        linear.shared = shared
        row += rows
    return shared


def joined_bias(linears: Sequence[SparseLinear], interleave: bool = False) -> torch.Tensor | None:
    """Biases of several linears as one vector, zeros for those without; None when none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    vectors = [torch.zeros(n.packed.rows) if n.bias is None else n.bias for n in linears]
    return torch.stack(vectors, 1).flatten() if interleave else torch.cat(vectors)


class GatedLinear(SparseLinear):
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
            self.bias = interleaved(bias.float())
        self.prepare()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *arguments: Any) -> None:
        pass


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


class FusedFeedForward:
    """Mixin of a feed-forward module whose gate, up, activation and product became `gate_up`; then the rest of it."""

    gate_up: GatedLinear
    down_name: str

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        y = self.gate_up(x)
        return getattr(self, self.down_name)(y) if self.down_name else y


@functools.cache
def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the fused forward: still an instance of `base`, by isinstance and by name."""

    def reduce(self: Any, protocol: Any) -> Any:
        return rebuild_fused, (base,), self.__dict__

    body = {"__reduce_ex__": reduce, "__doc__": base.__doc__, "__module__": base.__module__}
    return type(base.__name__, (FusedFeedForward, base), body)


def rebuild_fused(base: type[nn.Module]) -> nn.Module:
    cls = fused_class(base)
    return cls.__new__(cls)
