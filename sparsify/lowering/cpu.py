"""Lowering for the CPU: linears with pruned or quantised weights become packed linears with generated kernels.

    nn.Linear(weight (out, in), bias)  ──lower_model──▶  SparseLinear(masks, values, panel_ptr, …)
    Conv1D(weight (in, out), bias)                       or the module as it is, with the reason in the report

The host keeps its class, so `generate()`, pipelines and hooks go on working; packed tensors replace the dense weight,
and `state_dict()` still says `weight` (unpacked, in the original shape and dtype). A layer is replaced only if it was
measured to be at least as fast as torch's own dense product for every number of tokens that it was asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from sparsify.errors import Refusal, RefusedError
from sparsify.kernels.cpu import operator as packed_operator
from sparsify.kernels.cpu.build import BuildError, Kernels
from sparsify.kernels.cpu.dispatch import (
    Choice,
    NonFiniteError,
    best_isa,
    bucket,
    choose,
    cpu_name,
    interleaved,
    kernels_for,
    layer_struct,
    predict,
    remember,
    run_kernel,
    tuning,
)
from sparsify.kernels.cpu.formats import Bitmask, FormatError, concatenate, pack, pack_int8, quantize_int8
from sparsify.program import Program, Stage

DEFAULT_TOKENS = (1, 16, 64, 256)
SLACK = 1.05  # measured times differ by this much from run to run


class SparseLinear(nn.Module):
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

    def choice(self, tokens: int, measure: bool = False) -> Choice:
        """Kernel for a number of tokens; measured earlier, measured now (`measure`), or by the cost model."""
        if self.kernels is None:
            raise BuildError("no kernels for this machine")
        key = (bucket(tokens), torch.get_num_threads())
        found = self.choices.get(key)
        if found is None or (measure and found.measured is None):
            found = choose(self.packed, self.kernels, self.layer, tokens, self.int8, measure)
            self.choices[key] = found
        return found

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
        if flat.dtype != torch.float32 or not flat.is_contiguous():
            flat = flat.float().contiguous()
        tokens, shape = flat.shape[0], (*x.shape[:-1], self.out_features)
        if tokens == 0:
            return x.new_empty(shape)
        extra = residual.reshape(-1, self.out_features).float().contiguous() if residual is not None else None
        if self.kernels is None:
            y = packed_operator.dense_product(self.packed, flat, self.bias, self.activation, self.gated, extra)
        else:
            choice = self.choices.get((bucket(tokens), torch.get_num_threads())) or self.choice(tokens)
            try:
                entry = self.kernels.entries[choice.kernel]
                y = run_kernel(entry, self.layer, flat, self.out_features, extra, choice.row_tile)
            except NonFiniteError:
                y = packed_operator.dense_product(self.packed, flat, self.bias, self.activation, self.gated, extra)
        return y.view(shape) if y.dtype == x.dtype else y.view(shape).to(x.dtype)

    def as_operator(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The same product as one node of a graph."""
        tensors = (self.masks, self.values, self.panel_ptr, self.scales, self.row_sums, self.bias)
        sizes = (self.packed.rows, self.packed.cols, self.packed.group)
        return torch.ops.sparsify.packed_linear(x, *tensors, residual, *sizes, self.activation, self.gated, self.int8)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        probe = fn(torch.zeros(1))
        if probe.device.type != "cpu":
            raise RefusedError(f"this layer was lowered for the CPU and cannot move to {probe.device}")
        return self  # casts (half(), to(dtype)) concern the activations; the packed values stay exact

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.packed.unpack()
        destination[prefix + "weight"] = weight.t().contiguous() if self.transposed else weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.to(self.bias_dtype)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        weight = (weight.t() if self.transposed else weight).detach()
        if tuple(weight.shape) != (self.packed.rows, self.packed.cols):
            error_msgs.append(f"size mismatch for {prefix}weight: got {tuple(weight.shape)}")
            return
        value = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.get(self.packed.value)
        if value is None:
            self.packed = pack_int8(*quantize_int8(weight, self.packed.group), self.packed.group, self.dtype)
            self.row_sums = self.packed.row_sums()
        else:
            self.packed = pack(weight.to(value)).validate()
        for name in ("masks", "values", "panel_ptr", "scales"):
            setattr(self, name, getattr(self.packed, name))
        bias = state_dict.get(prefix + "bias")
        if self.bias is not None and bias is not None:
            self.bias = bias.detach().float().contiguous()
        elif self.bias is not None:
            missing_keys.append(prefix + "bias")
        self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("kernels", "layer", "choices"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        buffers = {name: self._buffers[name] for name in ("masks", "values", "panel_ptr", "scales")}
        old = self.packed  # one set of tensors after a copy, not two
        rest = (old.group, old.dtype)
        masks, values, panel_ptr = buffers["masks"], buffers["values"], buffers["panel_ptr"]
        assert masks is not None
        assert values is not None
        assert panel_ptr is not None
        self.packed = Bitmask(old.rows, old.cols, masks, values, panel_ptr, buffers["scales"], *rest)
        self.prepare()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, sparsity={self.packed.sparsity:.3f}, "
            f"values={self.packed.value}, activation={self.activation}"
        )


@dataclass(frozen=True)
class LoweredLinear:
    """One replaced layer. seconds: tokens → (kernel, predicted, measured, torch dense); bytes of its weight."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    value: str
    seconds: dict[int, tuple[str, float, float, float]]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        timings = ", ".join(
            f"{tokens} tok {kernel} {measured * 1e6:.0f} us (predicted {predicted * 1e6:.0f}, dense {dense * 1e6:.0f})"
            for tokens, (kernel, predicted, measured, dense) in self.seconds.items()
        )
        rows, cols = self.shape
        return f"{self.name}: {rows} × {cols}, {self.sparsity:.1%} sparse, bitmask {self.value}: {timings}"


@dataclass(frozen=True)
class CpuReport:
    """What lowering did: layers replaced, layers left dense and why, bytes of the whole model before and after."""

    machine: str
    lowered: tuple[LoweredLinear, ...]
    refusals: tuple[Refusal, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"cpu lowering on {self.machine}: {len(self.lowered)} linears packed, {len(self.refusals)} left dense"]
        saved = self.bytes_before / max(1, self.bytes_after)
        lines.append(f"memory     {self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB ({saved:.2f} ×)")
        lines += [f"packed     {entry}" for entry in self.lowered]
        lines += [f"dense      {refusal}" for refusal in self.refusals]
        lines += [f"note       {note}" for note in self.notes]
        return "\n".join(lines)


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D: a linear whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(module.weight, torch.Tensor)


def pack_linear(weight: torch.Tensor, quantize: Literal["int8"] | None, group: int = 0) -> Bitmask:
    """Pack an (out, in) weight as it is, or in int8 with one scale per row (per `group` columns)."""
    if quantize is None:
        return pack(weight)
    return pack_int8(*quantize_int8(weight, group), group, weight.dtype)


def dense_seconds(packed: Bitmask, tokens: int, dtype: torch.dtype) -> float:
    """Time of torch's own dense product of this shape; measured once per machine and cached."""
    key = f"dense/{cpu_name()}/{torch.get_num_threads()}/{packed.rows}x{packed.cols}/{dtype}/{tokens}"
    stored = tuning().get(key)
    if isinstance(stored, float):
        return stored
    weight, x = torch.randn(packed.rows, packed.cols).to(dtype), torch.randn(tokens, packed.cols).to(dtype)
    with torch.inference_mode():
        seconds = interleaved([lambda: F.linear(x, weight)])[0]
    remember(key, seconds)
    return seconds


def try_layer(
    name: str,
    module: nn.Module,
    quantize: Literal["int8"] | None,
    group: int,
    int8: bool,
    tokens: Sequence[int],
    small: bool,
) -> tuple[SparseLinear, LoweredLinear] | Refusal:
    """Pack one layer and measure it against dense; a Refusal when dense is better or the weight cannot be packed."""
    transposed = is_conv1d(module)
    stored = module.weight
    assert isinstance(stored, torch.Tensor)
    weight = stored.detach()
    if weight.device.type != "cpu":
        return Refusal(name, f"its weight is on {weight.device}; move the model to the CPU first")
    dense_bytes = weight.numel() * weight.element_size()
    sparsity = 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    if sparsity < 0.2 and quantize is None:
        return Refusal(name, f"only {sparsity:.0%} of its weights are zero; dense is faster below 20 %")
    try:
        packed = pack_linear(weight.t() if transposed else weight, quantize, group)
    except FormatError as error:
        return Refusal(name, f"its weight cannot be packed: {error}")
    bias = module.bias if isinstance(module.bias, torch.Tensor) else None
    sparse = SparseLinear(packed, bias, int8=int8, transposed=transposed)
    seconds: dict[int, tuple[str, float, float, float]] = {}
    for count in tokens:
        choice = sparse.choice(count, measure=True)
        dense = dense_seconds(packed, bucket(count), weight.dtype)
        measured = choice.measured if choice.measured is not None else choice.predicted
        seconds[count] = (choice.kernel, choice.predicted, measured, dense)
    slower = {count: times[2] / times[3] for count, times in seconds.items() if times[2] > SLACK * times[3]}
    if slower and not small:
        worst = max(slower, key=slower.__getitem__)
        return Refusal(
            name,
            f"{sparsity:.0%} sparse: torch's dense product is {slower[worst]:.2f} × as fast at {worst} tokens "
            "(mode='small' packs it all the same; tokens=… says which numbers of tokens matter)",
        )
    entry = LoweredLinear(name, (packed.rows, packed.cols), sparsity, packed.value, seconds, dense_bytes, packed.nbytes)
    return sparse, entry


def lower_model(
    host: nn.Module,
    program: Program | None = None,
    *,
    names: Sequence[str] | None = None,
    quantize: Literal["int8"] | Mapping[str, Literal["int8"]] | None = None,
    group: int = 0,
    int8_activations: bool = True,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    mode: Literal["fast", "small"] = "fast",
    tied: Literal["skip", "copy"] = "skip",
) -> CpuReport:
    """Replace the linears of `host`, in place, by packed ones where that pays; returns what was done and why not.

    program: if given, its history and refusals receive the outcome, and its stage becomes LOWERED.
    names: qualified module names that may be replaced (a layer named here that cannot be packed raises RefusedError);
        None: every nn.Linear and Conv1D.
    quantize: "int8" for all of them, or per module name; weights then get one scale per row, or per `group` columns.
    int8_activations: let int8 weights meet int8 activations (dynamic, per token); False keeps activations in fp32.
    tokens: numbers of tokens (batch × sequence) to measure; a layer slower than dense at one of them stays dense.
    mode: "small" packs also where dense is faster, for the memory.
    tied: a weight that an embedding shares stays dense ("skip"), or is packed beside the embedding's copy ("copy").
    """
    before = packed_operator.module_bytes(host)
    shared: dict[int, list[str]] = {}
    for module_name, module in host.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            shared.setdefault(id(module.weight), []).append(module_name)
    lowered: list[LoweredLinear] = []
    refusals: list[Refusal] = []
    done: dict[int, SparseLinear] = {}
    targets = [
        (name, module)
        for name, module in host.named_modules(remove_duplicate=False)
        if (type(module) is nn.Linear or is_conv1d(module)) and (names is None or name in names)
    ]
    if names is not None:
        missing = sorted(set(names) - {name for name, _ in targets})
        if missing:
            raise RefusedError(f"lower_model: no linear is called {', '.join(missing)}")
    for name, module in targets:
        if id(module) in done:
            replace_module(host, name, done[id(module)])
            continue
        how = quantize.get(name) if isinstance(quantize, Mapping) else quantize
        others = [
            other
            for other in shared.get(id(module.weight), [])
            if other != name and host.get_submodule(other) is not module
        ]
        outcome: tuple[SparseLinear, LoweredLinear] | Refusal
        if others and tied == "skip":
            outcome = Refusal(name, f"its weight is shared with {', '.join(others)}, which needs it dense")
        else:
            try:
                kernels_for(pack(torch.ones(1, 1)) if how is None else pack_int8(*quantize_int8(torch.ones(1, 1))))
                outcome = try_layer(name, module, how, group, int8_activations, tokens, mode == "small")
            except BuildError as error:
                outcome = Refusal(name, str(error))
        if isinstance(outcome, Refusal):
            if names is not None:
                raise RefusedError(str(outcome))
            refusals.append(outcome)
            continue
        sparse, entry = outcome
        sparse.train(module.training)
        for hook_table in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(sparse, hook_table).update(getattr(module, hook_table))
        replace_module(host, name, sparse)
        done[id(module)] = sparse
        lowered.append(entry)
    notes = [f"kernels for {best_isa()}, {torch.get_num_threads()} threads"]
    report = CpuReport(
        cpu_name(), tuple(lowered), tuple(refusals), before, packed_operator.module_bytes(host), tuple(notes)
    )
    if program is not None:
        program.history = (*program.history, *(f"lower-cpu: {entry}" for entry in lowered))
        program.refusals = (*program.refusals, *refusals)
        program.stage = Stage.LOWERED
    return report


def replace_module(host: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points."""
    owner, _, leaf = name.rpartition(".")
    setattr(host.get_submodule(owner), leaf, module)


def fuse_gated(gate: Bitmask, up: Bitmask) -> Bitmask:
    """gate and up as one weight with alternating rows, for `SparseLinear(…, activation=…, gated=True)`."""
    return concatenate([gate, up], interleave=True)


def predicted_seconds(packed: Bitmask, kernel: str, tokens: int) -> float:
    """The cost model's time for one kernel on this machine."""
    return predict(packed, best_isa(), kernel, tokens, torch.get_num_threads())
