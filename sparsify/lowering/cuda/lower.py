"""Lowering for CUDA: linears with pruned or quantised weights become packed linears with generated Triton kernels.

    nn.Linear(weight (out, in), bias)  ──lower_model──▶  GpuSparseLinear(values, meta, base, start, order, …)
    Conv1D(weight (in, out), bias)                       or the module as it is, with the reason in the report

The host keeps its class and may be moved between devices: on a CUDA device with triton the generated kernels run, elsewhere the
same product is computed by unpacking. `state_dict()` still says `weight`. A layer is replaced when the packed weight is
smaller than the dense one by enough to be faster at the memory's speed: that is computed from bytes, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsify.console import printable
from sparsify.errors import Refusal
from sparsify.kernels.cpu.operator import module_bytes
from sparsify.kernels.gpu import semi_structured
from sparsify.kernels.gpu.build import KERNEL_DTYPES, can_launch, triton_installed
from sparsify.kernels.gpu.formats import Blocks, FormatError, Stream
from sparsify.lowering.cuda.fuse import absorb_activation, join_gated
from sparsify.lowering.cuda.gpu_linear import GpuSparseLinear, pack_smallest
from sparsify.lowering.driver import Quantize, lower
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct
from sparsify.lowering.target import Fusion, Joined, Layer, Outcome, reasons, rows
from sparsify.program import Program
from sparsify.program.repeats import Line

WORTH = 0.9  # packed bytes over dense bytes from which on a layer stays dense


@printable
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
        return str(self.line(digits=1))

    def line(self, digits: int = 0) -> Line:
        """What `str` says, in a form that equal layers share: sparsity and ceiling are the layer's own."""
        start = f"{self.name}: {self.shape[0]} × {self.shape[1]}, "
        end = " × at one token (computed from bytes)" + (f"; {self.many}" if self.many else "")
        form = f" sparse, {self.form} {self.value}: at most "
        return Line.about(
            self.name, start, f"{self.sparsity:.{digits}%}", form, f"{self.predicted:.{1 + digits}f}", end
        )


@printable
@dataclass(frozen=True)
class GpuReport:
    """What lowering did: layers replaced, layers left dense and why, bytes of the whole model before and after."""

    lowered: tuple[GpuLowered, ...]
    refusals: tuple[Refusal, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    not_fused: tuple[Refusal, ...] = ()

    def __str__(self) -> str:
        return self.text()

    def text(self, *, fold: bool = True) -> str:
        """The report as text. fold: equal layers as one line and "× 30", with what differs between them below it."""
        lines = [f"cuda lowering: {len(self.lowered)} linears packed, {len(self.refusals)} left dense"]
        saved = self.bytes_before / max(1, self.bytes_after)
        lines.append(f"memory     {self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB ({saved:.2f} ×)")
        lines += rows("packed", [entry.line() if fold else str(entry) for entry in self.lowered], fold)
        lines += rows("fused", [fusion.line() for fusion in self.fusions], fold)
        lines += rows("not fused", reasons(self.not_fused), fold)
        lines += rows("dense", reasons(self.refusals), fold)
        lines += [f"note       {note}" for note in self.notes]
        return "\n".join(lines)


class CudaTarget:
    """Packed linears with generated Triton kernels where they read fewer bytes, dense elsewhere."""

    name = "cuda"
    copies_tied = False

    def try_layer(self, layer: Layer) -> Outcome:
        """Pack one layer; a refusal when it would not be smaller by enough, or cannot be packed."""
        weight = layer.weight
        dense_bytes = weight.numel() * weight.element_size()
        if weight.dtype not in KERNEL_DTYPES:
            why = f"its weight is {weight.dtype}; the kernels read bfloat16, float16 and float32"
            return Outcome(None, None, Refusal(layer.name, why))
        try:
            packed = pack_smallest(weight, layer.quantize)
        except FormatError as error:
            return Outcome(None, None, Refusal(layer.name, f"its weight cannot be packed: {error}"))
        if packed.nbytes > WORTH * dense_bytes:
            share = packed.nbytes / dense_bytes
            why = (
                f"{layer.sparsity:.0%} sparse: packed it would take {share:.0%} of the dense bytes, so dense is faster"
            )
            return Outcome(None, None, Refusal(layer.name, why))
        form = packed.format if isinstance(packed, Stream) else f"blocks {packed.height}×{packed.width}"
        form = f"gaps of chunk{packed.width}" if form == "gaps" else form
        shape = (packed.rows, packed.cols)
        many = many_tokens(packed)
        row = GpuLowered(layer.name, shape, layer.sparsity, form, packed.value, dense_bytes, packed.nbytes, many)
        return Outcome(GpuSparseLinear(packed, layer.bias, transposed=layer.transposed), row)

    def packs(self, module: nn.Module) -> bool:
        return type(module) is GpuSparseLinear and module.activation == "none"

    def join(self, found: GatedProduct, linears: Sequence[GpuSparseLinear]) -> Joined | str:
        return join_gated(found, linears)

    def absorb(self, found: FusedActivation, linear: GpuSparseLinear) -> Joined | str:
        return absorb_activation(found, linear)

    def compare(self, lowered: Callable[[], nn.Module], dense: nn.Module, program: Program) -> None:
        """Nothing is timed: the machine that lowers need not be the one that runs."""

    def leave(self, layer: Layer, outcome: Outcome, reason: str) -> Outcome:
        return Outcome(None, None, Refusal(layer.name, reason))

    def describe(self, entry: GpuLowered) -> str:
        return str(entry).partition(": ")[2]


def many_tokens(packed: Stream | Blocks) -> str:
    """What a 2:4 weight does with many tokens."""
    if isinstance(packed, Blocks) or packed.format != "two_four":
        return ""
    why = semi_structured.why_not(packed)
    fewest = semi_structured.FEWEST_TOKENS
    return f"from {fewest} tokens {f'expanded: {why}' if why else 'on sparse tensor cores'}"


def lower_program(
    host: nn.Module,
    program: Program | None,
    *,
    names: Sequence[str] | None = None,
    quantize: Quantize = None,
    check: bool = False,
    progress: bool = False,
) -> tuple[GpuReport, Program | None]:
    """Lower `host`, in place, and `program`, into a new one; see `driver.lower`."""
    before = module_bytes(host)
    decision, lowered = lower(
        host, program, CudaTarget(), names=names, quantize=quantize, check=check, progress=progress
    )
    after, apart = module_bytes(host), tuple(decision.not_fused)
    report = GpuReport(
        decision.packed, decision.refusals, before, after, notes(host), tuple(decision.fusions), not_fused=apart
    )
    return report, lowered


def lower_model(
    host: nn.Module,
    program: Program | None = None,
    *,
    names: Sequence[str] | None = None,
    quantize: Quantize = None,
) -> GpuReport:
    """Replace the linears of `host`, in place, by packed ones where that pays; returns what was done and why not.

    program: if given, shows which linears belong together.
    names: qualified module names that may be replaced (a layer named here that cannot be packed raises RefusedError);
        None: every nn.Linear and Conv1D whose weight no other module shares.
    quantize: "int8" for all of them, or per module name; weights then get one scale per row.
    """
    report, _ = lower_program(host, program, names=names, quantize=quantize)
    return report


def notes(host: nn.Module) -> tuple[str, ...]:
    """Where the lowered model will and will not run generated kernels."""
    if not triton_installed():
        return (
            "triton is not installed: packed layers are unpacked in every call; pip install 'sparsify-compiler[triton]'",
        )
    device = next((t.device for t in [*host.parameters(), *host.buffers()]), torch.device("cpu"))
    if can_launch(device):
        return ()
    return (f"the model is on {device}: packed layers are unpacked in every call until it is moved to a CUDA device",)
