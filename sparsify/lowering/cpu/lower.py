"""Lowering for the CPU: linears with pruned or quantised weights become packed linears with generated kernels.

    nn.Linear(weight (out, in), bias)  ──lower_model──▶  SparseLinear(masks, values, panel_ptr, …)    packed, generated kernels
    Conv1D(weight (in, out), bias)                       PrepackedLinear                             dense, oneDNN's own layout
                                                         or the module as it is, with the reason in the report

The host keeps its class, so `generate()`, pipelines and hooks go on working; packed tensors replace the dense weight,
and `state_dict()` still says `weight` (unpacked, in the original shape and dtype). A layer is replaced only if it was
measured to be at least as fast as torch's own dense product for every number of tokens that it was asked about. Linears
that the program shows to belong together are then fused (fuse_linears.py). With the user's example, the whole model is
timed against the dense one, which comes back if it is faster (whole_model.py). The program's graph is rewritten alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypedDict, Unpack

import torch
from torch import nn
from torch.nn import functional as F

from sparsify.console import printable
from sparsify.errors import Refusal
from sparsify.kernels.cpu import operator as packed_operator
from sparsify.kernels.cpu.build import BuildError
from sparsify.kernels.cpu.dispatch import activations, best_isa, bucket, kernels_for, predict_dense
from sparsify.kernels.cpu.formats import Bitmask, FormatError, pack, pack_int8, quantize_int8
from sparsify.kernels.cpu.tune import TUNE_VERSION, Timing, cpu_name, last_level_cache, measured, other_data
from sparsify.kernels.fallback import note, switched_on
from sparsify.lowering.cpu.fuse import Counted, absorb_activation, join_gated
from sparsify.lowering.cpu.native.make import make_native
from sparsify.lowering.cpu.native.step import NativeStep
from sparsify.lowering.cpu.options import DEFAULT_TOKENS
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear, can_prepack, prepack, prepacked_product
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.lowering.cpu.whole_model import WholeModel, example_tokens, time_whole_model
from sparsify.lowering.driver import Decision, Quantize, lower
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct
from sparsify.lowering.restore import plain_linear
from sparsify.lowering.target import Fusion, Joined, Layer, Outcome, Seconds, reasons, rows
from sparsify.model.linears import is_plain_linear, logical_weight
from sparsify.program import Program
from sparsify.program.repeats import Line

SLACK = 1.05  # smallest times of equally fast products differ by this much from run to run
Compare = bool | Literal["dummy"]
WORTH = 0.95  # a blocked dense weight must take less than this share of torch's time


@printable
@dataclass(frozen=True)
class LoweredLinear:
    """One layer and what was measured. seconds: tokens measured → (kernel, predicted, measured, torch dense).

    value: type of the packed values; "dense" for a weight in oneDNN's layout. steady: every measurement was.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    value: str
    seconds: Seconds
    bytes_before: int
    bytes_after: int
    steady: bool = True

    def __str__(self) -> str:
        rows, cols = self.shape
        how = "dense, blocked" if self.value == "dense" else f"{self.sparsity:.1%} sparse, bitmask {self.value}"
        return f"{self.name}: {rows} × {cols}, {how}: {self.timings}"

    @property
    def timings(self) -> str:
        return timings_text(self.seconds) + ("" if self.steady else " (unsteady: measured on a busy machine)")

    def line(self) -> Line:
        """What `str` says, in a form that equal layers share: sparsity to the percent, it and the timings as the layer's own."""
        start = f"{self.name}: {self.shape[0]} × {self.shape[1]}, "
        if self.value == "dense":
            return Line.about(self.name, f"{start}dense, blocked: ", self.timings)
        return Line.about(self.name, start, f"{self.sparsity:.0%}", f" sparse, bitmask {self.value}: ", self.timings)


def timings_text(seconds: Seconds) -> str:
    """What was measured at each number of tokens: "16 tok stream 40 us (predicted 38, dense 120)"."""
    return ", ".join(
        f"{tokens} tok {kernel} {found * 1e6:.0f} us (predicted {predicted * 1e6:.0f}, dense {dense * 1e6:.0f})"
        for tokens, (kernel, predicted, found, dense) in seconds.items()
    )


@printable
@dataclass(frozen=True)
class CpuReport:
    """What lowering did: layers packed, layers left dense and why, those of them that lie in oneDNN's layout, what was fused, what
    was not and why.

    bytes_before, bytes_after: of the whole model. whole: its times on the user's example, if there is one.
    """

    machine: str
    lowered: tuple[LoweredLinear, ...]
    refusals: tuple[Refusal, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = field(default=())
    prepacked: tuple[LoweredLinear, ...] = field(default=())
    fusions: tuple[Fusion, ...] = field(default=())
    whole: WholeModel | None = None
    not_fused: tuple[Refusal, ...] = ()
    native: NativeStep | Refusal | None = None

    def __str__(self) -> str:
        return self.text()

    def text(self, *, fold: bool = True) -> str:
        """The report as text. fold: equal layers as one line and "× 30", with what differs between them below it."""
        blocked = f" ({len(self.prepacked)} of them in oneDNN's layout)" if self.prepacked else ""
        left = f"{len(self.refusals)} left dense{blocked}"
        lines = [f"cpu lowering on {self.machine}: {len(self.lowered)} linears packed, {left}"]
        saved = self.bytes_before / max(1, self.bytes_after)
        lines.append(f"memory     {self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB ({saved:.2f} ×)")
        lines += [f"whole      {self.whole}"] if self.whole is not None else []
        lines += [f"native     {self.native_text}"] if self.native is not None else []
        lines += rows("packed", [entry.line() if fold else str(entry) for entry in self.lowered], fold)
        lines += rows("fused", [fusion.line() for fusion in self.fusions], fold)
        lines += rows("not fused", reasons(self.not_fused), fold)
        lines += rows("dense", reasons(self.refusals), fold)
        lines += rows("blocked", [entry.line() if fold else str(entry) for entry in self.prepacked], fold)
        lines += [f"note       {note}" for note in self.notes]
        return "\n".join(lines)

    @property
    def native_text(self) -> str:
        """Whether `generate()` makes one native call a token, or why not."""
        return f"no: {self.native.reason}" if isinstance(self.native, Refusal) else str(self.native)


def pack_linear(weight: torch.Tensor, quantize: Literal["int8"] | None, group: int = 0) -> Bitmask:
    """Pack an (out, in) weight as it is, or in int8 with one scale per row (per `group` columns)."""
    if quantize is None:
        return pack(weight)
    return pack_int8(*quantize_int8(weight, group), group, weight.dtype)


class DenseProducts:
    """The dense products that a packed layer must not be slower than: torch's own, and oneDNN's with a blocked weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    @cached_property
    def blocked(self) -> torch.Tensor:
        """The weight in oneDNN's layout, made when it is first measured."""
        return prepack(self.weight)

    def __call__(self, tokens: int) -> dict[str, Callable[[], object]]:
        """Name → product with random activations."""
        x = activations(tokens, self.weight.shape[1]).to(self.weight.dtype)
        calls: dict[str, Callable[[], object]] = {"torch": lambda: F.linear(x, self.weight)}
        if can_prepack(self.weight):
            calls["onednn"] = lambda: prepacked_product(x, self.blocked, None)
        return calls

    def timing(self, tokens: int, cold: bool = False) -> Timing:
        """Both products alone, for a weight that is not packed. cold: the weight comes from memory."""
        rows, cols = self.weight.shape
        layout = "" if self.weight.is_contiguous() else "/transposed"
        shape = f"{rows}x{cols}/{self.weight.dtype}{layout}"
        key = f"dense/{TUNE_VERSION}/{cpu_name()}/{torch.get_num_threads()}/{shape}/{tokens}"
        return measured(key, self(tokens), cold=cold)


@dataclass(frozen=True, kw_only=True)
class CpuTarget:
    """Packed linears with generated kernels where they are measured to be faster, oneDNN's layout where that is, dense elsewhere.

    group: columns that share a scale in int8 (0: a row). int8_activations, mode, tied: see `CpuOptions`. tokens: numbers of tokens to
    measure; None: the usual ones, and those of the example. example: linear → numbers of tokens that it sees on the user's example.
    timed: time the whole model on the user's example (True), or on the one of the trace ("dummy"). cold: the model's weights do not
    fit into the caches, so every layer is timed with weights that come from memory.
    """

    group: int = 0
    int8_activations: bool = True
    tokens: Sequence[int] | None = None
    mode: Literal["fast", "small"] = "fast"
    tied: Literal["skip", "copy"] = "skip"
    example: Mapping[str, Sequence[int]] = field(default_factory=dict)
    timed: Compare = False
    cold: bool = False

    name = "cpu"

    @property
    def copies_tied(self) -> bool:
        return self.tied == "copy"

    @property
    def small(self) -> bool:
        return self.mode == "small"

    def asked(self, name: str | None) -> tuple[int, ...]:
        """The numbers of tokens to measure for a linear, or (None) for whatever spans several."""
        return numbers_of_tokens(self.tokens, self.example, name)

    def try_layer(self, layer: Layer) -> Outcome:
        """Pack one layer and measure it against dense; the better of the two that is nowhere slower than torch's own."""
        if layer.weight.device.type != "cpu":
            why = f"its weight is on {layer.weight.device}; move the model to the CPU first"
            return Outcome(None, None, Refusal(layer.name, why))
        dense = DenseProducts(layer.weight)
        try:
            found = self.try_packed(layer, dense)
        except BuildError as error:
            note(f"cpu lowering: linears stay dense: {error}")
            found = Refusal(layer.name, str(error))
        return self.try_prepacked(layer, found, dense) if isinstance(found, Refusal) else found

    def try_packed(self, layer: Layer, dense: DenseProducts) -> Outcome | Refusal:
        """A packed layer that is nowhere slower than torch's dense product and mostly faster than oneDNN's; or why not."""
        weight, sparsity = layer.weight, layer.sparsity
        if sparsity < 0.2 and layer.quantize is None:
            return Refusal(layer.name, f"only {sparsity:.0%} of its weights are zero; dense is faster below 20 %")
        try:
            packed = pack_linear(weight, layer.quantize, self.group)
        except FormatError as error:
            return Refusal(layer.name, f"its weight cannot be packed: {error}")
        kernels_for(packed)  # without a compiler: BuildError, before anything is measured
        sparse = SparseLinear(packed, layer.bias, int8=self.int8_activations, transposed=layer.transposed)
        seconds: dict[int, tuple[str, float, float, float]] = {}
        blocked: dict[int, float] = {}
        steady = True
        for count in self.asked(layer.name):
            choice = sparse.choice(count, measure=True, dense=dense, cold=self.cold)
            spent = choice.measured if choice.measured is not None else choice.predicted
            seconds[bucket(count)] = (choice.kernel, choice.predicted, spent, choice.dense["torch"])
            blocked[bucket(count)] = choice.dense.get("onednn", choice.dense["torch"])
            steady &= choice.steady
        slower = {count: times[2] / times[3] for count, times in seconds.items() if times[2] > SLACK * times[3]}
        if slower and not self.small:
            worst = max(slower, key=slower.__getitem__)
            return Refusal(
                layer.name,
                f"{sparsity:.0%} sparse: torch's dense product is {slower[worst]:.2f} × as fast at {worst} tokens "
                "(CpuOptions: mode='small' packs it all the same; tokens=… says which numbers of tokens matter)",
            )
        ratio = mean_ratio([times[2] / blocked[count] for count, times in seconds.items()])
        if ratio > 1 and not self.small:
            return Refusal(
                layer.name,
                f"{sparsity:.0%} sparse: oneDNN's dense product with a blocked weight is {ratio:.2f} × as fast on average",
            )
        size = weight.numel() * weight.element_size()
        shape = (packed.rows, packed.cols)
        entry = LoweredLinear(layer.name, shape, sparsity, packed.value, seconds, size, packed.nbytes, steady)
        return Outcome(sparse, entry)

    def try_prepacked(self, layer: Layer, refusal: Refusal, dense: DenseProducts) -> Outcome:
        """For a layer that is not packed: oneDNN's layout where it is nowhere slower than torch's and faster on average."""
        weight = layer.weight
        if self.small or not can_prepack(weight):
            return Outcome(None, None, refusal)
        timings = {bucket(count): dense.timing(bucket(count), self.cold) for count in self.asked(layer.name)}
        ratios = [t.seconds["onednn"] / t.seconds["torch"] for t in timings.values()]
        if max(ratios) > SLACK or mean_ratio(ratios) > WORTH:
            return Outcome(None, None, refusal)
        rows, cols = weight.shape
        seconds = {
            count: ("onednn", predict_dense(rows, cols, count), t.seconds["onednn"], t.seconds["torch"])
            for count, t in timings.items()
        }
        size = weight.numel() * weight.element_size()
        steady = all(t.steady for t in timings.values())
        entry = LoweredLinear(layer.name, (rows, cols), layer.sparsity, "dense", seconds, size, size, steady)
        return Outcome(PrepackedLinear(weight, layer.bias, transposed=layer.transposed), entry, refusal)

    def packs(self, module: nn.Module) -> bool:
        return type(module) is SparseLinear and module.activation == "none"

    def join(self, found: GatedProduct, linears: Sequence[SparseLinear]) -> Joined | str:
        return join_gated(found, linears, Counted(self.asked(None), self.small, self.cold))

    def absorb(self, found: FusedActivation, linear: SparseLinear) -> Joined | str:
        return absorb_activation(found, linear, Counted(self.asked(None), self.small, self.cold))

    def compare(self, lowered: Callable[[], nn.Module], dense: nn.Module, program: Program) -> WholeModel | None:
        if self.small or not self.timed:
            return None
        return time_whole_model(lowered, dense, program, dummy=self.timed == "dummy")

    def leave(self, layer: Layer, outcome: Outcome, reason: str) -> Outcome:
        """Dense again, with rounded weights if they were to be rounded, in oneDNN's layout where that is faster."""
        packed = outcome.module if isinstance(outcome.module, SparseLinear) else None
        rounded = packed is not None and packed.packed.value == "s8"
        plain = plain_linear(packed) if packed is not None and rounded else None
        again = layer if plain is None else replace(layer, module=plain)
        refusal = outcome.refusal or Refusal(layer.name, reason)
        kept = self.try_prepacked(again, refusal, DenseProducts(again.weight))
        return kept if kept.module is not None else Outcome(plain, None, refusal)

    def describe(self, entry: LoweredLinear) -> str:
        return timings_text(entry.seconds)


def isa_text() -> str:
    """The instruction set that kernels are generated for, or why there is none."""
    if not switched_on():
        return "no instruction set (SPARSIFY_KERNELS=off)"
    try:
        return best_isa()
    except BuildError as error:
        return f"no instruction set ({error})"


def mean_ratio(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def numbers_of_tokens(
    tokens: Sequence[int] | None, example: Mapping[str, Sequence[int]], name: str | None
) -> tuple[int, ...]:
    """The numbers of tokens to measure for a linear (None: for whatever spans several): `tokens`, or the usual and the example's."""
    if tokens is not None:
        return tuple(tokens)
    seen = example.get(name, ()) if name is not None else {count for counts in example.values() for count in counts}
    by_bucket = {bucket(count): count for count in (*DEFAULT_TOKENS, *seen)}
    return tuple(by_bucket[size] for size in sorted(by_bucket))


def exceeds_caches(host: nn.Module) -> bool:
    """Whether the weights of a model's linears are more than the last-level cache holds: each call then reads them from memory."""
    weights = [logical_weight(module) for module in host.modules() if is_plain_linear(module)]
    distinct = {weight.data_ptr(): weight.nbytes for weight in weights if weight.device.type == "cpu"}
    return sum(distinct.values()) > last_level_cache()


class Settings(TypedDict, total=False):
    """Fields of `CpuTarget` that a caller chooses; see `lower_model`."""

    group: int
    int8_activations: bool
    tokens: Sequence[int] | None
    mode: Literal["fast", "small"]
    tied: Literal["skip", "copy"]


def cpu_target(
    program: Program | None, *, compare: Compare = False, cold: bool = False, **options: Unpack[Settings]
) -> CpuTarget:
    """The target of a program. options: fields of `CpuTarget`."""
    given = options.get("tokens") is not None or compare == "dummy"
    example = example_tokens(program) if program is not None and compare and not given else {}
    return CpuTarget(example=example, timed=compare, cold=cold, **options)


def make_report(
    host: nn.Module, decision: Decision, bytes_before: int, cold: bool, native: NativeStep | Refusal | None = None
) -> CpuReport:
    """What was done to a host that is lowered now. cold: its layers were timed with weights that come from memory."""
    whole = decision.whole
    assert whole is None or isinstance(whole, WholeModel)  # `CpuTarget.compare` makes no other
    return CpuReport(
        machine=cpu_name(),
        lowered=decision.packed,
        refusals=decision.refusals,
        bytes_before=bytes_before,
        bytes_after=packed_operator.module_bytes(host),
        notes=(
            f"kernels for {isa_text()}, {torch.get_num_threads()} threads",
            *(("layers timed with cold weights: the model is larger than the last-level cache",) if cold else ()),
        ),
        prepacked=decision.rearranged,
        fusions=tuple(decision.fusions),
        whole=whole,
        not_fused=tuple(decision.not_fused),
        native=native,
    )


def lower_program(
    host: nn.Module, program: Program | None, *, names: Sequence[str] | None = None, quantize: Quantize = None,
    check: bool = False, compare: Compare = False, progress: bool = False, native: bool = False, **options: Unpack[Settings],
) -> tuple[CpuReport, Program | None]:  # fmt: skip
    """Lower `host`, in place, and `program`, into a new one; see `driver.lower`. native: make a native step of a decoder, too.
    options: see `lower_model`."""
    before = packed_operator.module_bytes(host)
    target = cpu_target(program, compare=compare, cold=exceeds_caches(host), **options)
    try:
        decision, lowered = lower(host, program, target, names=names, quantize=quantize, check=check, progress=progress)
    finally:
        other_data.cache_clear()
    generates = callable(getattr(type(host), "generate", None))
    step = make_native(host, lowered) if native and generates and lowered is not None else None
    return make_report(host, decision, before, target.cold, step), lowered


def lower_model(
    host: nn.Module,
    program: Program | None = None,
    *,
    names: Sequence[str] | None = None,
    quantize: Quantize = None,
    group: int = 0,
    int8_activations: bool = True,
    tokens: Sequence[int] | None = None,
    mode: Literal["fast", "small"] = "fast",
    tied: Literal["skip", "copy"] = "skip",
    compare: Compare = False,
) -> CpuReport:
    """Replace the linears of `host`, in place, by packed ones where that pays; returns what was done and why not.

    program: if given, shows which linears belong together.
    names: qualified module names that may be replaced (a layer named here that cannot be packed raises RefusedError);
        None: every nn.Linear and Conv1D.
    quantize: "int8" for all of them, or per module name; weights then get one scale per row, or per `group` columns.
    int8_activations: let int8 weights meet int8 activations (dynamic, per token); False keeps activations in fp32.
    tokens: numbers of tokens (batch × sequence) to measure; a layer slower than dense at one of them stays dense. None: the
        usual ones, and with `compare` those that a layer sees in the program's example.
    mode: "small" packs also where dense is faster, for the memory.
    tied: a weight that an embedding shares stays dense ("skip"), or is packed beside the embedding's copy ("copy").
    compare: time the whole model on the program's example, and take the dense layers back if they are faster: True where it is the
        user's, "dummy" where it is the one that the model was traced with.
    """
    options: Settings = {
        "group": group,
        "int8_activations": int8_activations,
        "tokens": tokens,
        "mode": mode,
        "tied": tied,
    }
    report, _ = lower_program(host, program, names=names, quantize=quantize, compare=compare, **options)
    return report
