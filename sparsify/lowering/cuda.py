"""Lowering for CUDA: linears with pruned or quantised weights become packed linears with generated Triton kernels.

    nn.Linear(weight (out, in), bias)  ──lower_model──▶  GpuSparseLinear(values, meta, base, start, order, …)
    Conv1D(weight (in, out), bias)                       or the module as it is, with the reason in the report

The host keeps its class and may be moved between devices: on a CUDA device with triton the generated kernels run, elsewhere the
same product is computed by unpacking. `state_dict()` still says `weight`. A layer is replaced when the packed weight is
smaller than the dense one by enough to be faster at the memory's speed: that is computed from bytes, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sparsify.errors import Refusal, RefusedError
from sparsify.kernels.cpu.operator import module_bytes
from sparsify.kernels.gpu import operator, semi_structured
from sparsify.kernels.gpu.build import can_launch, triton_installed
from sparsify.kernels.gpu.formats import Blocks, FormatError, Stream
from sparsify.lowering.fuse_cuda import GpuActivation, GpuFusion, fuse
from sparsify.lowering.gpu_linear import GpuSparseLinear, pack_smallest
from sparsify.lowering.rewrite_cuda import rewrite
from sparsify.program import Program, Stage

WORTH = 0.9  # packed bytes over dense bytes from which on a layer stays dense


@dataclass(frozen=True)
class GpuLowered:
    """One replaced layer. form: of the packed weight; predicted: dense over packed bytes, the ceiling at one token. many: what
    multiplies many tokens, where that is not the expanded weight and cuBLAS."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    form: str
    value: str
    bytes_before: int
    bytes_after: int
    many: str = ""

    @property
    def predicted(self) -> float:
        return self.bytes_before / max(1, self.bytes_after)

    def __str__(self) -> str:
        rows, cols = self.shape
        return (
            f"{self.name}: {rows} × {cols}, {self.sparsity:.1%} sparse, {self.form} {self.value}: "
            f"at most {self.predicted:.2f} × at one token (computed from bytes)"
            + (f"; {self.many}" if self.many else "")
        )


@dataclass(frozen=True)
class GpuReport:
    """What lowering did: layers replaced, layers left dense and why, bytes of the whole model before and after."""

    lowered: tuple[GpuLowered, ...]
    refusals: tuple[Refusal, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()
    fusions: tuple[GpuFusion | GpuActivation, ...] = ()

    def __str__(self) -> str:
        lines = [f"cuda lowering: {len(self.lowered)} linears packed, {len(self.refusals)} left dense"]
        saved = self.bytes_before / max(1, self.bytes_after)
        lines.append(f"memory     {self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB ({saved:.2f} ×)")
        lines += [f"packed     {entry}" for entry in self.lowered]
        lines += [f"fused      {fusion}" for fusion in self.fusions]
        lines += [f"dense      {refusal}" for refusal in self.refusals]
        lines += [f"note       {note}" for note in self.notes]
        return "\n".join(lines)


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D: a linear whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(module.weight, torch.Tensor)


def replace_module(host: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points."""
    owner, _, leaf = name.rpartition(".")
    setattr(host.get_submodule(owner), leaf, module)


def try_layer(name: str, module: nn.Module, quantize: Literal["int8"] | None) -> tuple[nn.Module, GpuLowered] | Refusal:
    """Pack one layer; a Refusal when it would not be smaller by enough, or cannot be packed."""
    transposed = is_conv1d(module)
    stored = module.weight
    assert isinstance(stored, torch.Tensor)
    weight = stored.detach().t() if transposed else stored.detach()
    dense_bytes = weight.numel() * weight.element_size()
    sparsity = 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    if weight.dtype not in operator.KERNEL_DTYPES:
        return Refusal(name, f"its weight is {weight.dtype}; the kernels read bfloat16, float16 and float32")
    try:
        packed = pack_smallest(weight, quantize)
    except FormatError as error:
        return Refusal(name, f"its weight cannot be packed: {error}")
    if packed.nbytes > WORTH * dense_bytes:
        share = packed.nbytes / dense_bytes
        return Refusal(
            name, f"{sparsity:.0%} sparse: packed it would take {share:.0%} of the dense bytes, so dense is faster"
        )
    bias = module.bias if isinstance(module.bias, torch.Tensor) else None
    lowered = GpuSparseLinear(packed, bias, transposed=transposed)
    form = packed.format if isinstance(packed, Stream) else f"blocks {packed.height}×{packed.width}"
    form = f"gaps of chunk{packed.width}" if form == "gaps" else form
    shape = (packed.rows, packed.cols)
    return lowered, GpuLowered(
        name, shape, sparsity, form, packed.value, dense_bytes, packed.nbytes, many_tokens(packed)
    )


def many_tokens(packed: Stream | Blocks) -> str:
    """What a 2:4 weight does with many tokens."""
    if isinstance(packed, Blocks) or packed.format != "two_four":
        return ""
    why = semi_structured.why_not(packed)
    fewest = semi_structured.FEWEST_TOKENS
    return f"from {fewest} tokens {f'expanded: {why}' if why else 'on sparse tensor cores'}"


def lower_model(
    host: nn.Module,
    program: Program | None = None,
    *,
    names: Sequence[str] | None = None,
    quantize: Literal["int8"] | Mapping[str, Literal["int8"]] | None = None,
) -> GpuReport:
    """Replace the linears of `host`, in place, by packed ones where that pays; returns what was done and why not.

    program: if given, its history and refusals receive the outcome, and its stage becomes LOWERED.
    names: qualified module names that may be replaced (a layer named here that cannot be packed raises RefusedError);
        None: every nn.Linear and Conv1D whose weight no other module shares.
    quantize: "int8" for all of them, or per module name; weights then get one scale per row.
    """
    before = module_bytes(host)
    shared: dict[int, list[str]] = {}
    for module_name, module in host.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            shared.setdefault(id(module.weight), []).append(module_name)
    targets = {
        name: module
        for name, module in host.named_modules(remove_duplicate=False)
        if (type(module) is nn.Linear or is_conv1d(module)) and (names is None or name in names)
    }
    missing = sorted(set(names or ()) - set(targets))
    if missing:
        raise RefusedError(f"lower_model: no linear is called {', '.join(missing)}")
    lowered: list[GpuLowered] = []
    refusals: list[Refusal] = []
    done: dict[int, nn.Module] = {}
    for name, module in targets.items():
        if id(module) in done:
            replace_module(host, name, done[id(module)])
            continue
        others = [n for n in shared.get(id(module.weight), []) if host.get_submodule(n) is not module]
        how = quantize.get(name) if isinstance(quantize, Mapping) else quantize
        outcome: tuple[nn.Module, GpuLowered] | Refusal
        if others:
            outcome = Refusal(name, f"its weight is shared with {', '.join(others)}, which needs it dense")
        else:
            outcome = try_layer(name, module, how)
        if isinstance(outcome, Refusal):
            if names is not None:
                raise RefusedError(str(outcome))
            refusals.append(outcome)
            continue
        packed, entry = outcome
        packed.train(module.training)
        for hook_table in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(packed, hook_table).update(getattr(module, hook_table))
        replace_module(host, name, packed)
        done[id(module)] = packed
        lowered.append(entry)
    fusions = tuple(fuse(host, program)) if program is not None else ()
    report = GpuReport(tuple(lowered), tuple(refusals), before, module_bytes(host), notes(host), fusions)
    if program is not None:
        rewrite(program, host, fusions, {entry.name: str(entry).partition(": ")[2] for entry in lowered})
        program.history = (*program.history, *(f"lower-cuda: {e}" for e in (*lowered, *fusions)))
        program.refusals = (*program.refusals, *refusals)
        program.stage = Stage.LOWERED
    return report


def notes(host: nn.Module) -> tuple[str, ...]:
    """Where the lowered model will and will not run generated kernels."""
    if not triton_installed():
        return ("triton is not installed: packed layers are unpacked in every call; pip install 'sparsify[triton]'",)
    device = next((t.device for t in [*host.parameters(), *host.buffers()]), torch.device("cpu"))
    if can_launch(device):
        return ()
    return (f"the model is on {device}: packed layers are unpacked in every call until it is moved to a CUDA device",)
