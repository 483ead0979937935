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
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from sparsify.errors import Refusal, RefusedError
from sparsify.kernels.cpu import operator as packed_operator
from sparsify.kernels.cpu.build import BuildError
from sparsify.kernels.cpu.dispatch import activations, best_isa, bucket, kernels_for, predict_dense
from sparsify.kernels.cpu.formats import Bitmask, FormatError, pack, pack_int8, quantize_int8
from sparsify.kernels.cpu.tune import TUNE_VERSION, Timing, cpu_name, measured
from sparsify.kernels.fallback import note, switched_on
from sparsify.lowering.cpu_options import DEFAULT_TOKENS
from sparsify.lowering.fuse_cpu import Fusion, fuse, set_module
from sparsify.lowering.prepacked_linear import PrepackedLinear, can_prepack, prepack, prepacked_product
from sparsify.lowering.restore_cpu import restore_modules
from sparsify.lowering.rewrite_cpu import rewrite
from sparsify.lowering.sparse_linear import SparseLinear
from sparsify.lowering.whole_model import WholeModel, example_tokens, time_whole_model
from sparsify.program import Program, Stage

SLACK = 1.05  # smallest times of equally fast products differ by this much from run to run
WORTH = 0.95  # a blocked dense weight must take less than this share of torch's time


@dataclass(frozen=True)
class LoweredLinear:
    """One layer and what was measured. seconds: tokens measured → (kernel, predicted, measured, torch dense).

    value: type of the packed values; "dense" for a weight in oneDNN's layout. steady: every measurement was.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    value: str
    seconds: dict[int, tuple[str, float, float, float]]
    bytes_before: int
    bytes_after: int
    steady: bool = True

    def __str__(self) -> str:
        rows, cols = self.shape
        how = "dense, blocked" if self.value == "dense" else f"{self.sparsity:.1%} sparse, bitmask {self.value}"
        noise = "" if self.steady else " (unsteady: measured on a busy machine)"
        return f"{self.name}: {rows} × {cols}, {how}: {timings_text(self.seconds)}{noise}"


def timings_text(seconds: Mapping[int, tuple[str, float, float, float]]) -> str:
    """What was measured at each number of tokens: "16 tok stream 40 us (predicted 38, dense 120)"."""
    return ", ".join(
        f"{tokens} tok {kernel} {found * 1e6:.0f} us (predicted {predicted * 1e6:.0f}, dense {dense * 1e6:.0f})"
        for tokens, (kernel, predicted, found, dense) in seconds.items()
    )


@dataclass(frozen=True)
class CpuReport:
    """What lowering did: layers packed, layers left dense and why, those of them that lie in oneDNN's layout, what was fused.

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

    def __str__(self) -> str:
        blocked = f" ({len(self.prepacked)} of them in oneDNN's layout)" if self.prepacked else ""
        left = f"{len(self.refusals)} left dense{blocked}"
        lines = [f"cpu lowering on {self.machine}: {len(self.lowered)} linears packed, {left}"]
        saved = self.bytes_before / max(1, self.bytes_after)
        lines.append(f"memory     {self.bytes_before / 2**20:.1f} → {self.bytes_after / 2**20:.1f} MiB ({saved:.2f} ×)")
        lines += [f"whole      {self.whole}"] if self.whole is not None else []
        lines += [f"packed     {entry}" for entry in self.lowered]
        lines += [f"{'apart' if fusion.why else 'fused'}      {fusion}" for fusion in self.fusions]
        lines += [f"dense      {refusal}" for refusal in self.refusals]
        lines += [f"blocked    {entry}" for entry in self.prepacked]
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


class DenseProducts:
    """The dense products that a packed layer must not be slower than: torch's own, and oneDNN's with a blocked weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    @cached_property
    def blocked(self) -> torch.Tensor:
        """The weight in oneDNN's layout, made when it is first measured."""
        return prepack(self.weight)

    def __call__(self, tokens: int) -> dict[str, Callable[[], Any]]:
        """Name → product with random activations."""
        x = activations(tokens, self.weight.shape[1]).to(self.weight.dtype)
        calls: dict[str, Callable[[], Any]] = {"torch": lambda: F.linear(x, self.weight)}
        if can_prepack(self.weight):
            calls["onednn"] = lambda: prepacked_product(x, self.blocked, None)
        return calls

    def timing(self, tokens: int) -> Timing:
        """Both products alone, for a weight that is not packed."""
        rows, cols = self.weight.shape
        layout = "" if self.weight.is_contiguous() else "/transposed"
        shape = f"{rows}x{cols}/{self.weight.dtype}{layout}"
        key = f"dense/{TUNE_VERSION}/{cpu_name()}/{torch.get_num_threads()}/{shape}/{tokens}"
        return measured(key, self(tokens))


@dataclass(frozen=True)
class Outcome:
    """What to put in a layer's place (None: nothing), what was measured, and why it is not packed."""

    module: nn.Module | None
    entry: LoweredLinear | None
    refusal: Refusal | None = None


def try_layer(
    name: str,
    module: nn.Module,
    quantize: Literal["int8"] | None,
    group: int,
    int8: bool,
    tokens: Sequence[int],
    small: bool,
) -> Outcome:
    """Pack one layer and measure it against dense; the better of the two that is nowhere slower than torch's own."""
    transposed = is_conv1d(module)
    stored = module.weight
    assert isinstance(stored, torch.Tensor)
    weight = stored.detach()
    if weight.device.type != "cpu":
        return Outcome(None, None, Refusal(name, f"its weight is on {weight.device}; move the model to the CPU first"))
    logical = weight.t() if transposed else weight
    bias = module.bias if isinstance(module.bias, torch.Tensor) else None
    dense = DenseProducts(logical)
    try:
        found = try_packed(name, logical, bias, transposed, quantize, group, int8, tokens, small, dense)
    except BuildError as error:
        note(f"cpu lowering: linears stay dense: {error}")
        found = Refusal(name, str(error))
    if not isinstance(found, Refusal):
        return Outcome(*found)
    return try_prepacked(found, logical, bias, transposed, tokens, dense, small)


def try_packed(
    name: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    quantize: Literal["int8"] | None,
    group: int,
    int8: bool,
    tokens: Sequence[int],
    small: bool,
    dense: DenseProducts,
) -> tuple[SparseLinear, LoweredLinear] | Refusal:
    """A packed layer that is nowhere slower than torch's dense product and mostly faster than oneDNN's; or why not."""
    sparsity = 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    if sparsity < 0.2 and quantize is None:
        return Refusal(name, f"only {sparsity:.0%} of its weights are zero; dense is faster below 20 %")
    try:
        packed = pack_linear(weight, quantize, group)
    except FormatError as error:
        return Refusal(name, f"its weight cannot be packed: {error}")
    kernels_for(packed)  # without a compiler: BuildError, before anything is measured
    sparse = SparseLinear(packed, bias, int8=int8, transposed=transposed)
    seconds: dict[int, tuple[str, float, float, float]] = {}
    blocked: dict[int, float] = {}
    steady = True
    for count in tokens:
        choice = sparse.choice(count, measure=True, dense=dense)
        spent = choice.measured if choice.measured is not None else choice.predicted
        seconds[bucket(count)] = (choice.kernel, choice.predicted, spent, choice.dense["torch"])
        blocked[bucket(count)] = choice.dense.get("onednn", choice.dense["torch"])
        steady &= choice.steady
    slower = {count: times[2] / times[3] for count, times in seconds.items() if times[2] > SLACK * times[3]}
    if slower and not small:
        worst = max(slower, key=slower.__getitem__)
        return Refusal(
            name,
            f"{sparsity:.0%} sparse: torch's dense product is {slower[worst]:.2f} × as fast at {worst} tokens "
            "(CpuOptions: mode='small' packs it all the same; tokens=… says which numbers of tokens matter)",
        )
    ratio = mean_ratio([times[2] / blocked[count] for count, times in seconds.items()])
    if ratio > 1 and not small:
        return Refusal(
            name,
            f"{sparsity:.0%} sparse: oneDNN's dense product with a blocked weight is {ratio:.2f} × as fast on average",
        )
    size = weight.numel() * weight.element_size()
    shape = (packed.rows, packed.cols)
    return sparse, LoweredLinear(name, shape, sparsity, packed.value, seconds, size, packed.nbytes, steady)


def try_prepacked(
    refusal: Refusal,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    tokens: Sequence[int],
    dense: DenseProducts,
    small: bool,
) -> Outcome:
    """For a layer that is not packed: oneDNN's layout where it is nowhere slower than torch's and faster on average."""
    if small or not can_prepack(weight):
        return Outcome(None, None, refusal)
    timings = {bucket(count): dense.timing(bucket(count)) for count in tokens}
    ratios = [t.seconds["onednn"] / t.seconds["torch"] for t in timings.values()]
    if max(ratios) > SLACK or mean_ratio(ratios) > WORTH:
        return Outcome(None, None, refusal)
    rows, cols = weight.shape
    seconds = {
        count: ("onednn", predict_dense(rows, cols, count), t.seconds["onednn"], t.seconds["torch"])
        for count, t in timings.items()
    }
    size = weight.numel() * weight.element_size()
    sparsity = 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    steady = all(t.steady for t in timings.values())
    entry = LoweredLinear(refusal.where, (rows, cols), sparsity, "dense", seconds, size, size, steady)
    return Outcome(PrepackedLinear(weight, bias, transposed=transposed), entry, refusal)


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


def replace_module(host: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`, with its mode and hooks."""
    new.train(old.training)
    for hook_table in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(new, hook_table).update(getattr(old, hook_table))
    set_module(host, name, new)


def restore_dense(
    host: nn.Module, entries: Sequence[LoweredLinear], reason: str, asked: Callable[[str], Sequence[int]]
) -> list[LoweredLinear]:
    """Make every layer of `host` dense again, in oneDNN's layout where that is faster; returns the entries of those."""
    restore_modules(host)
    blocked: list[LoweredLinear] = []
    for entry in entries:
        module: Any = host.get_submodule(entry.name)
        transposed = is_conv1d(module)
        weight = module.weight.detach().t() if transposed else module.weight.detach()
        refusal = Refusal(entry.name, reason)
        outcome = try_prepacked(
            refusal, weight, module.bias, transposed, asked(entry.name), DenseProducts(weight), small=False
        )
        if outcome.module is None or outcome.entry is None:
            continue
        names = [name for name, other in host.named_modules(remove_duplicate=False) if other is module]
        for name in names:
            replace_module(host, name, module, outcome.module)
        blocked.append(outcome.entry)
    return blocked


def lower_model(
    host: nn.Module,
    program: Program | None = None,
    *,
    names: Sequence[str] | None = None,
    quantize: Literal["int8"] | Mapping[str, Literal["int8"]] | None = None,
    group: int = 0,
    int8_activations: bool = True,
    tokens: Sequence[int] | None = None,
    mode: Literal["fast", "small"] = "fast",
    tied: Literal["skip", "copy"] = "skip",
    compare: bool = False,
) -> CpuReport:
    """Replace the linears of `host`, in place, by packed ones where that pays; returns what was done and why not.

    program: if given, its history and refusals receive the outcome, and its stage becomes LOWERED.
    names: qualified module names that may be replaced (a layer named here that cannot be packed raises RefusedError);
        None: every nn.Linear and Conv1D.
    quantize: "int8" for all of them, or per module name; weights then get one scale per row, or per `group` columns.
    int8_activations: let int8 weights meet int8 activations (dynamic, per token); False keeps activations in fp32.
    tokens: numbers of tokens (batch × sequence) to measure; a layer slower than dense at one of them stays dense. None: the
        usual ones, and with `compare` those that a layer sees in the program's example.
    mode: "small" packs also where dense is faster, for the memory.
    tied: a weight that an embedding shares stays dense ("skip"), or is packed beside the embedding's copy ("copy").
    compare: the program's example is the user's: time the whole model on it, and take the dense layers back if they are faster.
    """
    example = example_tokens(program) if program is not None and compare and tokens is None else {}
    asked = partial(numbers_of_tokens, tokens, example)
    before = packed_operator.module_bytes(host)
    shared: dict[int, list[str]] = {}
    for module_name, module in host.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            shared.setdefault(id(module.weight), []).append(module_name)
    lowered: list[LoweredLinear] = []
    blocked: list[LoweredLinear] = []
    refusals: list[Refusal] = []
    done: dict[int, nn.Module] = {}
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
            set_module(host, name, done[id(module)])
            continue
        how = quantize.get(name) if isinstance(quantize, Mapping) else quantize
        others = [
            other
            for other in shared.get(id(module.weight), [])
            if other != name and host.get_submodule(other) is not module
        ]
        if others and tied == "skip":
            refusal = Refusal(name, f"its weight is shared with {', '.join(others)}, which needs it dense")
            outcome = Outcome(None, None, refusal)
        else:
            outcome = try_layer(name, module, how, group, int8_activations, asked(name), mode == "small")
        if outcome.refusal is not None:
            if names is not None:
                raise RefusedError(str(outcome.refusal))
            refusals.append(outcome.refusal)
        if outcome.module is None:
            continue
        replace_module(host, name, module, outcome.module)
        done[id(module)] = outcome.module
        if outcome.entry is not None:
            (lowered if outcome.refusal is None else blocked).append(outcome.entry)
    fusions = fuse(host, program, asked(None), mode == "small") if program is not None else []
    whole = None
    if program is not None and compare and mode == "fast" and names is None and lowered:
        whole = time_whole_model(host, program)
        if whole.slower:
            refusals += [Refusal(entry.name, whole.reason) for entry in lowered]
            blocked, lowered, fusions = restore_dense(host, [*lowered, *blocked], whole.reason, asked), [], []
    notes = (f"kernels for {isa_text()}, {torch.get_num_threads()} threads",)
    after = packed_operator.module_bytes(host)
    report = CpuReport(
        cpu_name(), tuple(lowered), tuple(refusals), before, after, notes, tuple(blocked), tuple(fusions), whole
    )
    if program is not None:
        entries = {entry.name: entry for entry in (*lowered, *blocked)}
        kernels = {name: timings_text(entry.seconds) for name, entry in entries.items()}
        rewrite(program, host, fusions, kernels)
        program.history = (*program.history, *(f"lower-cpu: {e}" for e in (*lowered, *blocked, *fusions)))
        if whole is not None:
            program.history = (*program.history, f"lower-cpu: whole model {whole}")
        program.refusals = (*program.refusals, *refusals)
        program.stage = Stage.LOWERED
    return report
