"""Which kernel serves how many tokens: what this CPU has, what the cost model predicts, what was measured once.

A packed layer has eight ways to run, all on the same bytes:
    gemv        expand 16 weights against their mask, multiply with every token: bandwidth bound, 1 to 8 tokens
    lookup      fetch the activations of up to 16 stored weights: 1 or 2 tokens, very sparse (AVX512-VBMI2)
    stream      one broadcast and a few FMAs per nonzero: work proportional to the nonzeros, from 4 tokens on
    decompress  expand rows to L1 and multiply densely: moderate sparsity with many tokens
    vnni        int8 weights × int8 activations (dynamic, per token): any number of tokens
    bytes       the same with AVX2 alone: 1 to 16 tokens
    dot         bf16 weights × bf16 activations, in pairs: any number of tokens of a model held in bf16
    pairs       the same products for the pairs of columns that are not both zero: many tokens of a model held in bf16
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch

from sparsify.errors import SparsifyError
from sparsify.kernels.cpu.build import BuildError, Kernels, load_kernels
from sparsify.kernels.cpu.codegen import BF16_KERNELS, ISAS, LANES, VECTORS, Isa, Variant, generate
from sparsify.kernels.cpu.formats import BLOCK, Bitmask
from sparsify.kernels.cpu.tune import (
    TUNE_VERSION,
    cold_key,
    cpu_name,
    credible,
    measured,
    recorded,
    remember,
    seconds_of,
    tuning,
)
from sparsify.kernels.fallback import note, switched_on

ACTIVATIONS: dict[str, int] = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
COMMON = 256  # the largest bucket that is measured by default


class LayerStruct(ctypes.Structure):
    """Mirror of `struct Layer` in the template."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("masks", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("panel_ptr", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("group_blocks", ctypes.c_int64),
        ("row_sums", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("activation", ctypes.c_int32),
        ("gated", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Choice:
    """A kernel and its tile for one bucket of tokens, with predicted and measured seconds (None: not measured).

    dense: seconds of the dense products that were measured in turn with it. steady: whether the measurement was.
    """

    kernel: str
    row_tile: int
    predicted: float
    measured: float | None = None
    dense: Mapping[str, float] = field(default_factory=dict)
    steady: bool = True


class NonFiniteError(SparsifyError, ArithmeticError):
    """An activation is NaN or Inf: this kernel skips zeros and cannot reproduce the dense product."""


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of this CPU, in the spelling of /proc/cpuinfo."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    capability = torch.backends.cpu.get_cpu_capability()
    avx2 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt", "abm"}
    if capability == "AVX512":
        return frozenset(avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"})
    return frozenset(avx2) if capability == "AVX2" else frozenset()


@lru_cache(maxsize=1)
def best_isa() -> Isa:
    """The widest instruction set with kernels that this CPU runs; `SPARSIFY_ISA` may name a narrower one."""
    flags = cpu_flags()
    has_avx2 = {"avx2", "fma", "f16c", "bmi1", "bmi2"} <= flags
    has_avx512 = has_avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    best: Isa = "portable"
    if has_avx512:
        best = "avx512vnni" if "avx512_vnni" in flags else "avx512"
        if {"avx512_vnni", "avx512vbmi", "avx512_vbmi2"} <= flags:
            best = "avx512bf16" if "avx512_bf16" in flags else "avx512vbmi2"
    elif has_avx2:
        best = "avx2"
    named = os.environ.get("SPARSIFY_ISA", "").strip()
    if not named:
        return best
    if named not in ISAS or ISAS.index(named) < ISAS.index(best):  # type: ignore[arg-type]
        raise BuildError(f"SPARSIFY_ISA={named!r}: this CPU runs {', '.join(ISAS[ISAS.index(best) :])}")
    return named  # type: ignore[return-value]


def usable_isa() -> Isa | None:
    """`best_isa()`, or None where kernels are switched off, and, after a warning, where `SPARSIFY_ISA` names none: a training step
    does not die of it."""
    if not switched_on():
        return None
    try:
        return best_isa()
    except BuildError as error:
        note(f"training kernels: PyTorch's own serve instead: {error}")
        return None


def layer_struct(
    packed: Bitmask, row_sums: torch.Tensor | None, bias: torch.Tensor | None, activation: str, gated: bool
) -> LayerStruct:
    """The C view of a packed weight; the tensors must outlive it."""
    return LayerStruct(
        packed.rows,
        packed.cols,
        packed.blocks,
        packed.masks.data_ptr(),
        packed.values.data_ptr(),
        packed.panel_ptr.data_ptr(),
        packed.scales.data_ptr() if packed.scales is not None else None,
        packed.group // BLOCK,
        row_sums.data_ptr() if row_sums is not None else None,
        bias.data_ptr() if bias is not None else None,
        ACTIVATIONS[activation],
        int(gated),
    )


def run_kernel(
    kernels: Kernels,
    name: str,
    layer: LayerStruct,
    x: torch.Tensor,
    outputs: int,
    residual: torch.Tensor | None,
    row_tile: int,
) -> torch.Tensor:
    """One product of kernel `name`: x (tokens, cols) and residual (tokens, outputs) of any float type → (tokens, outputs).

    They are converted to what the kernel reads, which is also the type of the result: bf16 for `BF16_KERNELS`, else fp32.
    Raises NonFiniteError when the kernel met NaN or Inf and cannot behave as the dense product does.
    """
    dtype = torch.bfloat16 if name in BF16_KERNELS else torch.float32
    x = x.to(dtype).contiguous()
    residual = None if residual is None else residual.to(dtype).contiguous()
    tokens, cols = x.shape
    out = torch.empty(tokens, outputs, dtype=dtype)
    status = kernels.entries[name](
        ctypes.addressof(layer),
        x.data_ptr(),
        cols,
        tokens,
        out.data_ptr(),
        outputs,
        residual.data_ptr() if residual is not None else None,
        outputs,
        torch.get_num_threads(),
        row_tile,
    )
    if status == 0:
        return out
    if status == 1:
        raise NonFiniteError("an activation is NaN or Inf")
    raise MemoryError("no memory for the kernel's scratch space")


def run_module(
    kernels: Kernels, name: str, layer: LayerStruct, x: torch.Tensor, outputs: int, row_tile: int
) -> torch.Tensor:
    """A product as a module runs it, from and to x's dtype: what has to be compared with torch's product in that dtype."""
    return run_kernel(kernels, name, layer, x, outputs, None, row_tile).to(x.dtype)


def bucket(tokens: int) -> int:
    """The measured number of tokens that stands for `tokens`: the next larger bucket, at most the largest."""
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


def stand_ins(size: int) -> tuple[int, ...]:
    """Buckets whose measurement serves a bucket, best first: its own; for many tokens then smaller ones, then larger ones."""
    if size <= COMMON:
        return (size,)
    many = [b for b in BUCKETS if b >= COMMON]
    return (*(b for b in reversed(many) if b <= size), *(b for b in many if b > size))


def candidates(isa: Isa, value: str, tokens: int, vnni: bool) -> list[tuple[str, int]]:
    """(kernel, row tile) worth trying for a number of tokens."""
    found: list[tuple[str, int]] = []
    if tokens <= 16:
        found.append(("gemv", 64))
    if tokens >= 4:
        found.append(("stream", 64))
    if tokens >= 8:
        found += [("stream", 256 if tokens >= 64 else 128), ("decompress", 48)]
    variant = Variant(isa=isa, value=value)
    if tokens <= 2 and variant.vbmi2:
        found.append(("lookup", 64))
    if vnni and variant.vnni and value == "s8":
        found += [("vnni", 32), ("vnni", 64)] if tokens > 8 else [("vnni", 32)]
    if vnni and variant.bytes and tokens <= 16:
        found.append(("bytes", 64))
    if variant.dot:
        found += [("dot", 32), ("dot", 64)] if tokens > 8 else [("dot", 64)]
        found += [("pairs", 64), ("pairs", 512)] if tokens > 32 else [("pairs", 64)] if tokens > 8 else []
    return found


# Cycles per unit of work on one core, from counting instructions and port pressure (README.md); the ratio between
# kernels matters. Keys: instruction set family.
GEMV_CYCLES = {16: 3.2, 8: 2.2, 4: 40.0}  # expand one vector of weights
VALUE_EXTRA = {"f32": 0.0, "f16": 1.0, "bf16": 1.0, "s8": 1.0}


def predict(packed: Bitmask, isa: Isa, kernel: str, tokens: int, threads: int) -> float:
    """Seconds that a kernel should take: the larger of bytes over bandwidth and cycles over clock, plus a call."""
    machine = calibrate()
    lanes = LANES[isa]
    weights, nnz = packed.rows * packed.blocks * BLOCK, packed.nnz
    passes = 1
    if kernel == "gemv":
        passes = -(-tokens // 8)
        cycles = (
            weights / lanes * (GEMV_CYCLES[lanes] + VALUE_EXTRA[packed.value]) * passes + weights / lanes * tokens * 0.8
        )
    elif kernel == "lookup":
        passes = -(-tokens // 2)
        cycles = passes * (weights / BLOCK * (5.0 + 2.5 * tokens) + packed.nnz / 16 * (2.0 + 2.5 * tokens))
    elif kernel == "vnni":
        groups, expand = weights / BLOCK, 3.0 if Variant(isa=isa, value="s8").vbmi2 else 7.5
        cycles = groups * (expand + tokens * (0.8 if tokens <= 8 else 1.3))
        cycles += tokens * packed.cols * 0.3
    elif kernel == "bytes":
        passes = -(-tokens // 8)
        cycles = weights / 32 * passes * (4.5 + 1.5 * min(tokens, 8)) + tokens * packed.cols * 0.5
    elif kernel == "dot":
        cycles = weights / BLOCK * (6.0 + tokens * (2.0 if tokens <= 8 else 2.4))
    elif kernel == "pairs":
        vectors = max(2, -(-tokens // 16))
        passes = -(-vectors // 8)
        kept = weights / 2 * (1 - packed.sparsity**2)
        cycles = kept * (1.25 * vectors + 0.3 * passes) + weights / 128 * (4.0 * vectors + 40)
        cycles += tokens * (packed.cols * 0.15 + packed.rows * 0.3)
    else:
        vectors = -(-tokens // lanes)
        wide = min(vectors, VECTORS[isa] if kernel == "stream" else min(4, VECTORS[isa]))
        passes = -(-vectors // wide)
        packing = vectors * lanes * packed.cols * 1.2
        if kernel == "stream":
            cycles = nnz * passes * (1.7 + 1.5 * wide) + packed.rows * packed.blocks * passes * 12 + packing
        else:
            cycles = weights * passes * (0.3 + 0.65 * wide) + packing
    compute = cycles / (machine.clock * 1e9) / max(1, threads)
    memory = packed.nbytes * passes / (machine.bandwidth * 1e9)
    return max(compute, memory) + 6e-6


def predict_dense(rows: int, cols: int, tokens: int) -> float:
    """Seconds that a blocked fp32 dense product should take: bytes over bandwidth or flops over the peak of the FMAs."""
    machine, threads = calibrate(), torch.get_num_threads()
    compute = rows * cols * tokens / LANES[usable_isa() or "portable"] / (machine.clock * 1e9) / max(1, threads)
    return max(compute, 4 * rows * cols / (machine.bandwidth * 1e9)) + 6e-6


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of this CPU. bandwidth: read, GB/s, all threads; clock: GHz under vector load."""

    bandwidth: float
    clock: float


@lru_cache(maxsize=8)
def calibrate() -> Machine:
    """Bandwidth and clock of this machine; measured once (about 0.1 s) and cached under the CPU's name."""
    key = f"machine/{TUNE_VERSION}/{cpu_name()}/{torch.get_num_threads()}"
    stored = tuning().get(key)
    if isinstance(stored, dict) and credible(stored.get("bandwidth"), 1e6) and credible(stored.get("clock"), 1e3):
        return Machine(float(stored["bandwidth"]), float(stored["clock"]))
    data = torch.ones(16 << 20)
    bandwidth = data.numel() * 4 / min(seconds_of(data.sum) for _ in range(13)) / 1e9
    machine = Machine(bandwidth, clock_ghz())
    remember(key, {"bandwidth": machine.bandwidth, "clock": machine.clock})
    return machine


def clock_ghz() -> float:
    try:
        clocks = [
            float(line.partition(":")[2])
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("cpu MHz")
        ]
        return statistics.median(clocks) / 1e3 if clocks else 2.5
    except (OSError, ValueError):
        return 2.5


@lru_cache(maxsize=32)
def source_digest(variant: Variant) -> str:
    """Short hash of the generated source: times of other kernels are no times of these."""
    return hashlib.sha256(generate(variant).encode()).hexdigest()[:12]


def tune_key(packed: Bitmask, layer: LayerStruct, variant: Variant, tokens: int, threads: int, vnni: bool) -> str:
    """Layers of one shape, epilogue and about one sparsity share measurements."""
    density = round(packed.nnz / (packed.rows * packed.cols), 2)
    shape = f"{packed.rows}x{packed.cols}/{density}/{packed.value}/{packed.group}/{packed.dtype}"
    shape += f"/{layer.activation}/{layer.gated}"
    machine = f"{cpu_name()}/{variant.isa}/{source_digest(variant)}/{threads}"
    return f"kernel/{TUNE_VERSION}/{machine}/{shape}/{tokens}/{int(vnni)}"


@lru_cache(maxsize=16)
def activations(tokens: int, cols: int) -> torch.Tensor:
    """Random float32 activations (tokens, cols) to measure with."""
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(0))


def option_name(option: tuple[str, int]) -> str:
    """A kernel with its row tile as a contestant of a measurement: "stream/64"."""
    return f"{option[0]}/{option[1]}"


def choose(
    packed: Bitmask,
    kernels: Kernels,
    layer: LayerStruct,
    tokens: int,
    vnni: bool,
    measure: bool,
    dense: Callable[[int], Mapping[str, Callable[[], object]]] | None = None,
    cold: bool = False,
) -> Choice:
    """The kernel for `tokens` tokens: by an earlier or a new measurement, or by the cost model without `measure`.

    dense: number of tokens → dense products of the same weight by name; they are measured in turn with the kernels.
    cold: measure with weights that come from memory, as those of a large model do. Earlier measurements serve either way, cold ones first.
    """
    isa, threads, size = kernels.variant.isa, torch.get_num_threads(), bucket(tokens)
    options = candidates(isa, packed.value, size, vnni)
    costs = {option: predict(packed, isa, option[0], size, threads) for option in options}
    best = min(options, key=lambda option: costs[option])
    keys = [tune_key(packed, layer, kernels.variant, known, threads, vnni) for known in stand_ins(size)]
    if measure:
        x = activations(size, packed.cols).to(packed.dtype)
        outputs = packed.rows // 2 if layer.gated else packed.rows
        margin = 4 if size <= COMMON else 2  # products of many tokens take long, and the model knows them better
        plausible = [option for option in options if costs[option] <= margin * costs[best]]
        calls: dict[str, Callable[[], object]] = {
            option_name(o): partial(run_module, kernels, o[0], layer, x, outputs, o[1]) for o in plausible
        }
        if dense is not None:
            calls.update(dense(size))
        timing = measured(keys[0], calls, cold=cold)
    else:
        names = [name for key in keys for name in (cold_key(key), key)]
        timing = next((found for found in map(recorded, names) if found is not None), None)
    known = [o for o in options if timing is not None and option_name(o) in timing.seconds]
    if timing is None or not known:
        costs = corrected(costs, packed, layer, kernels.variant, size, threads, vnni)
        best = min(options, key=lambda option: costs[option])
        return Choice(best[0], best[1], costs[best])
    best = min(known, key=lambda option: timing.seconds[option_name(option)])
    if (
        not measure and recorded(cold_key(keys[0])) is None and recorded(keys[0]) is None
    ):  # these seconds are of another number of tokens
        return Choice(best[0], best[1], costs[best])
    others = {name: s for name, s in timing.seconds.items() if name not in map(option_name, options)}
    return Choice(best[0], best[1], costs[best], timing.seconds[option_name(best)], others, timing.steady)


def corrected(
    costs: Mapping[tuple[str, int], float],
    packed: Bitmask,
    layer: LayerStruct,
    variant: Variant,
    size: int,
    threads: int,
    vnni: bool,
) -> dict[tuple[str, int], float]:
    """Predicted costs at `size` tokens, each times what its kernel took over what was predicted at the nearest number of tokens that was
    measured for such a layer: the model knows how work grows better than it knows a machine."""
    for other in sorted(BUCKETS, key=lambda b: abs(math.log(b / size))):
        key = tune_key(packed, layer, variant, other, threads, vnni)
        timing = recorded(cold_key(key)) or recorded(key)
        if timing is None:
            continue
        off: dict[str, float] = {}
        for kernel, tile in candidates(variant.isa, packed.value, other, vnni):
            found = timing.seconds.get(option_name((kernel, tile)))
            if found is not None:
                ratio = found / predict(packed, variant.isa, kernel, other, threads)
                off[kernel] = min(ratio, off.get(kernel, math.inf))
        if off:
            rest = max(off.values())  # a kernel that was not worth measuring there
            return {option: cost * off.get(option[0], rest) for option, cost in costs.items()}
    return dict(costs)


def serves(choice: Choice, dtype: torch.dtype, tokens: int) -> Choice:
    """`choice`, or what takes its place for activations of a type that its kernel would round."""
    if choice.kernel not in BF16_KERNELS or dtype == torch.bfloat16:
        return choice
    return Choice("gemv" if tokens <= 8 else "stream", 64, choice.predicted)


def kernels_for(packed: Bitmask) -> Kernels:
    """Kernels that serve this packed weight on this CPU. Raises BuildError without a compiler, and where they are switched off."""
    if not switched_on():
        raise BuildError("kernels are switched off (SPARSIFY_KERNELS)")
    return load_kernels(Variant(isa=best_isa(), value=packed.value))
