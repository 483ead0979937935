"""One training step (forward, backward, optimizer, zero_grad) of every method on the same Llama, and the frozen floor.

    floor       everything frozen, the gradient flows from the loss through every layer to `inputs_embeds`: forward + dX
    floor_cut   the same, but the backward ends where S2FT's ends, at the output of the first layer's o_proj. This is
                the stricter floor for S2FT, whose backward stops below the lowest trained weight; `floor` is the one
                for methods that train every linear. Neither has an optimizer. Eager only: compiled, its backward is
                removed as dead code.
    s2ft, paca, rosa, our_lora
                `sparsify.compile(model, Plan([…]))`: columns of O and Down; columns of all linears; a low-rank part of half
                LoRA's rank and single entries for the rest; our LoRA
    qs2ft, qpaca, qrosa
                the same over a base quantised to NF4 (double quantisation), next to `qlora`
    full        full fine-tuning
    lora, miss, shira, supra
                PEFT's LoRA, MiSS (the lightest method in PEFT), SHiRA and Super-Tuning with its low-rank part, on all linears
    qlora       PEFT LoRA over bitsandbytes' Linear4bit
With `--preset moe`, a small Mixtral, `lora` adapts packed experts by PEFT's target_parameters; the other peers leave them out.

Trainable sizes are made equal: `--rank` is LoRA's, everybody else's size follows from it (units are whole, so up to about a
tenth remains; the table has the counts). AdamW is the fused one for all, as in Hugging Face's Trainer.
Memory: see harness.py; `saved` is counted by hooks, which a compiled graph hides, so there and for its bar `held` counts:
what the allocator still holds after the forward. Under hooks our low-rank parts save a product's input whole instead of its
factors (`sparsify/ops/saved_input.py`), so for them too `held` is what a step keeps. `peak` is weights + optimizer state + the allocator's peak in a step.
A method is one entry of METHODS; one that fails is shown with its reason.

    python benchmarks/train_step.py --compile --save
    python benchmarks/train_step.py --preset 8b --dtype bf16          # a GPU
    python benchmarks/train_step.py --preset moe --methods floor s2ft paca rosa our_lora lora
    python benchmarks/train_step.py --profile s2ft
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import (
    Bar,
    Timing,
    allocations,
    begin,
    interleave,
    keep,
    mib,
    parser,
    report,
    saved_for_backward,
    storage_bytes,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Preset:
    """Shape of a Llama, or with `experts` of a Mixtral; `rank` is LoRA's, which sets everybody's trainable size."""

    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    layers: int
    sequence: int
    batch: int
    rank: int
    experts: int = 0


PRESETS = {
    "tiny": Preset(64, 176, 4, 4, 128, 2, 16, 1, 4),
    "small": Preset(1024, 2816, 16, 16, 4096, 4, 512, 1, 8),
    "moe": Preset(512, 1024, 8, 8, 4096, 2, 256, 1, 8, experts=8),
    "7b": Preset(4096, 11008, 32, 32, 32000, 4, 512, 4, 16),
    "8b": Preset(4096, 14336, 32, 8, 128256, 4, 512, 4, 16),
}


@dataclass(frozen=True)
class Case:
    """What all methods share: shape, precision, place, seed."""

    shape: Preset
    dtype: torch.dtype
    device: str
    seed: int = 0

    def model(self) -> nn.Module:
        """A new model; the same weights for every call."""
        from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

        shape = self.shape
        experts: dict[str, Any] = {"num_local_experts": shape.experts} if shape.experts else {}
        config = (MixtralConfig if experts else LlamaConfig)(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max(shape.sequence, 32),
            use_cache=False,
            **experts,
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model = (MixtralForCausalLM if experts else LlamaForCausalLM)(config)
        return model.to(self.dtype).train()

    @functools.cached_property
    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.shape.batch, self.shape.sequence)
        return torch.randint(0, self.shape.vocab, size, generator=generator).to(self.device)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Kind of linear → `(in, out)`, of one layer; of every expert too."""
        width, ffn = self.shape.width, self.shape.ffn
        kv = width // self.shape.heads * self.shape.kv_heads
        attention = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
        if self.shape.experts:
            for expert in range(self.shape.experts):
                attention |= {f"{expert}.gate_up": (width, 2 * ffn), f"{expert}.down": (ffn, width)}
            return attention
        return attention | {"gate": (width, ffn), "up": (width, ffn), "down": (ffn, width)}

    def lora_parameters(self) -> int:
        """Of one layer, all linears: the size that everybody gets."""
        return self.shape.rank * sum(m + n for m, n in self.linears().values())

    def s2ft_fraction(self) -> float:
        """Share of O and Down with as many parameters."""
        return self.lora_parameters() / sum(
            m * n for k, (m, n) in self.linears().items() if k == "o" or k.endswith("down")
        )

    def weights(self) -> int:
        """Entries of all linears of one layer."""
        return sum(m * n for m, n in self.linears().values())

    def paca_rank(self) -> int:
        """Columns of every linear with as many parameters."""
        return max(1, round(self.lora_parameters() / sum(n for _, n in self.linears().values())))

    def halves(self) -> tuple[int, float]:
        """Half of LoRA's rank, and the density of single entries that makes up for the other half."""
        low = self.shape.rank // 2
        return low, self.lora_parameters() * (1 - low / self.shape.rank) / self.weights()

    def miss_rank(self) -> int:
        """The rank nearest in size that divides every input (MiSS pads otherwise, which would slow it down)."""
        shapes = self.linears().values()
        common = math.gcd(*(m for m, _ in shapes))
        wanted = self.lora_parameters() / sum(n for _, n in shapes)
        return min((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(d - wanted))


@dataclass
class Trainee:
    """One method's model, and how to take a step with it.

    inputs: keyword arguments of the forward. leaves: non-parameters that receive a gradient. extra: further tensors
    that the method keeps alive.
    """

    model: nn.Module
    inputs: dict[str, Any]
    leaves: list[Tensor] = field(default_factory=list)
    extra: list[Tensor] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    call: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.trainable() and self.optimizer is None:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def loss(self) -> Tensor:
        forward = self.model if self.call is None else self.call
        return forward(**self.inputs).loss

    def finish(self) -> None:
        """Optimizer step and no gradients left."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for leaf in self.leaves:
            leaf.grad = None

    def step(self) -> None:
        self.loss().backward()
        self.finish()

    def constants(self) -> list[Tensor]:
        """Parameters and buffers: what is no activation."""
        return [*self.model.parameters(), *self.model.buffers()]

    def resident(self) -> int:
        """Bytes that live between steps: weights, optimizer state, what the method keeps."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = [t for entry in state for t in entry.values() if isinstance(t, Tensor)]
        return storage_bytes([*self.constants(), *moments, *self.extra])


# --- the methods ------------------------------------------------------------------------------------------------------


def build_floor(case: Case) -> Trainee:
    """Frozen; the gradient goes down to the embeddings."""
    model = case.model().requires_grad_(False)
    embeds = model.get_input_embeddings()(case.tokens).detach().requires_grad_()
    return Trainee(model, {"inputs_embeds": embeds, "labels": case.tokens}, leaves=[embeds])


class StartHere(torch.autograd.Function):
    """Identity on `x`, which needs no gradient, that makes all above it need one; the backward ends here, for free."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        ctx.shape = leaf.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0].new_zeros(ctx.shape)


def build_floor_cut(case: Case) -> Trainee:
    """Frozen; the gradient goes down to the output of the first o_proj, where S2FT's backward ends."""
    model = case.model().requires_grad_(False)
    leaf = torch.zeros(0, device=case.device, dtype=case.dtype, requires_grad=True)
    first = model.model.layers[0].self_attn.o_proj
    first.register_forward_hook(lambda _module, _args, output: StartHere.apply(output, leaf))
    return Trainee(model, {"input_ids": case.tokens, "labels": case.tokens}, leaves=[leaf])


def held_by(handle: Any) -> list[Tensor]:
    """Every real tensor that our handle keeps alive besides the model's own: base values, the program's tensors, …"""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo: list[Any] = [handle]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if type(value) in (Tensor, nn.Parameter):
            found.append(value)
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        elif type(value).__module__.startswith("sparsify"):
            todo += vars(value).values() if hasattr(value, "__dict__") else []
    return found


def rule_of(method: str, case: Case) -> Any:
    """Our rule with as many trained parameters as LoRA."""
    from sparsify import S2FT, LoRA, PaCA, RoSA

    if method == "s2ft":
        return S2FT(fraction=case.s2ft_fraction())
    if method == "paca":
        return PaCA(rank=case.paca_rank())
    if method == "our_lora":
        return LoRA(rank=case.shape.rank)
    low, density = case.halves()
    return RoSA(rank=low, density=density, mask="random")  # which entries does not matter to the time of a step


def build_ours(case: Case, method: str, quantized: bool = False) -> Trainee:
    import sparsify
    from sparsify import Plan, Quantize

    rules = [rule_of(method, case), *([Quantize(format="nf4")] if quantized else [])]
    model = sparsify.compile(case.model(), Plan(rules, seed=case.seed), progress=False, donate=True)
    return Trainee(model, {"input_ids": case.tokens, "labels": case.tokens}, extra=held_by(model.sparsify))


def build_full(case: Case) -> Trainee:
    """Every parameter trains."""
    return Trainee(case.model(), {"input_ids": case.tokens, "labels": case.tokens})


def build_peft(case: Case, config: Any, model: nn.Module | None = None) -> Trainee:
    """A method of PEFT on all linears."""
    from peft import get_peft_model

    config.target_modules, config.task_type = config.target_modules or "all-linear", "CAUSAL_LM"
    made = get_peft_model(model if model is not None else case.model(), config)
    return Trainee(made, {"input_ids": case.tokens, "labels": case.tokens})


def build_lora(case: Case) -> Trainee:
    from peft import LoraConfig

    settings: dict[str, Any] = {"r": case.shape.rank, "lora_alpha": 2 * case.shape.rank}
    if case.shape.experts:  # "all-linear" would take the router too, and double the rank of gate and up
        settings["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
        settings["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return build_peft(case, LoraConfig(**settings))


def build_miss(case: Case) -> Trainee:
    from peft import MissConfig

    return build_peft(case, MissConfig(r=case.miss_rank()))


def build_shira(case: Case) -> Trainee:
    from peft import ShiraConfig

    return build_peft(case, ShiraConfig(r=case.shape.rank, random_seed=case.seed))


def build_supra(case: Case) -> Trainee:
    """Super-Tuning's hybrid: entries of large magnitude and a low-rank part, split as our RoSA's."""
    from peft import SupertuningConfig

    low, density = case.halves()
    return build_peft(case, SupertuningConfig(sparsity=1 - density, r=low))


def build_qlora(case: Case) -> Trainee:
    """PEFT LoRA over bitsandbytes' 4-bit linears (NF4, double quantisation), the output head left dense."""
    import bitsandbytes as bnb
    from peft import LoraConfig

    model: Any = case.model()
    scales: list[Tensor] = []
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            owner, _, leaf = name.rpartition(".")
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=case.dtype, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(
                linear.weight.detach().cpu().contiguous(),
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
            )
            setattr(model.get_submodule(owner), leaf, packed.to(case.device))
            state = packed.weight.quant_state
            scales += [state.absmax, state.code, state.state2.absmax, state.state2.code]
    model.is_loaded_in_4bit = True
    trainee = build_peft(case, LoraConfig(r=case.shape.rank, lora_alpha=2 * case.shape.rank), model)
    trainee.extra += scales
    return trainee


METHODS: dict[str, Callable[[Case], Trainee]] = {
    "floor": build_floor,
    "floor_cut": build_floor_cut,
    "s2ft": functools.partial(build_ours, method="s2ft"),
    "paca": functools.partial(build_ours, method="paca"),
    "rosa": functools.partial(build_ours, method="rosa"),
    "our_lora": functools.partial(build_ours, method="our_lora"),
    "full": build_full,
    "lora": build_lora,
    "miss": build_miss,
    "shira": build_shira,
    "supra": build_supra,
    "qs2ft": functools.partial(build_ours, method="s2ft", quantized=True),
    "qpaca": functools.partial(build_ours, method="paca", quantized=True),
    "qrosa": functools.partial(build_ours, method="rosa", quantized=True),
    "qlora": build_qlora,
}

#: `floor_cut` ends in a gradient that does not depend on anything, so a compiler removes its whole backward: no floor.
EAGER_ONLY = frozenset({"floor_cut"})


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one warm step. saved: by hooks; None in a compiled graph, which hooks do not see into.
    held: what the allocator has more after the forward than before, with only the loss kept alive."""

    saved: int | None
    held: int
    peak: int
    step_peak: int


def measure_memory(trainee: Trainee, device: str) -> Memory:
    """Bytes saved for backward, and the peak of a warm step on top of what lives between steps."""
    if trainee.optimizer is None or not trainee.optimizer.state:
        trainee.step()
    kept: int | None = None
    if trainee.call is None:
        with saved_for_backward(trainee.constants()) as saved:
            loss = trainee.loss()
        kept = saved.bytes
        loss.backward()
        del loss
        trainee.finish()
    with allocations(device) as forward:
        loss = trainee.loss()
    loss.backward()
    del loss
    trainee.finish()
    with allocations(device) as step:
        trainee.step()
    return Memory(kept, forward.end, trainee.resident() + step.peak, step.peak)


def explain(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def run(
    case: Case,
    methods: Iterable[str],
    *,
    compiled: str | None,
    eager: bool,
    rounds: int,
    seconds: float,
    clock: str,
    patience: float,
    build_seconds: float = math.inf,
    kept: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> tuple[list[dict[str, Any]], dict[str, Timing], list[str]]:
    """One row per method and mode (compiled: the backend of `torch.compile`, or None for eager only); timings by `name` (eager) and `name+compile`; reasons of what failed.

    build_seconds: after this much time no further method is built. kept: called with what is known after each is.
    """
    torch._dynamo.config.recompile_limit = 64  # the methods share the code of Llama's forward: an entry for each
    trainees: dict[str, Trainee] = {}
    memory: dict[str, Memory] = {}
    failures: list[str] = []
    start = time.perf_counter()
    for name in methods:
        if time.perf_counter() - start > build_seconds:
            failures.append(f"{name} left out: building took more than {build_seconds:g} s")
            continue
        try:
            trainee = METHODS[name](case)
            if eager:
                memory[name] = measure_memory(trainee, case.device)
                trainees[name] = trainee
            if compiled and name not in EAGER_ONLY:
                fast = Trainee(trainee.model, trainee.inputs, trainee.leaves, trainee.extra, trainee.optimizer)
                fast.call = torch.compile(trainee.model, dynamic=False, backend=compiled)
                memory[name + "+compile"] = measure_memory(fast, case.device)
                trainees[name + "+compile"] = fast
        except Exception as error:
            failures.append(f"{name} failed: {explain(error)}")
            print(failures[-1], file=sys.stderr)
        kept([{"method": n, "peak MiB": mib(m.peak), "held MiB": mib(m.held)} for n, m in memory.items()])
    steps = {n: t.step for n, t in trainees.items()}
    times = interleave(steps, rounds=rounds, warmup=1, seconds=seconds, clock=clock, patience=patience)
    rows = []
    for name, trainee in trainees.items():
        suffix = "+compile" if name.endswith("+compile") else ""
        row: dict[str, Any] = {"method": name, "trainable": trainee.trainable(), "ms": times[name].median * 1e3}
        row["samples ms"] = [round(s * 1e3, 3) for s in times[name].samples]
        for floor in ("floor", "floor_cut"):
            if floor + suffix in times:
                ratio = times[name].over(times[floor + suffix])
                row[f"× {floor}"] = str(ratio)
                row[f"{floor}_ratio"] = [ratio.median, ratio.minimum, ratio.paired]
        saved = memory[name].saved
        row["saved MiB"] = None if saved is None else mib(saved)
        row["held MiB"] = mib(memory[name].held)
        row["step peak MiB"] = mib(memory[name].step_peak)
        row["peak MiB"] = mib(memory[name].peak)
        rows.append(row)
    return rows, times, failures


@dataclass(frozen=True)
class Target:
    """`ours` against `other`: at most `time` × its time (or, with `faster`, its time at least that many times ours), and at
    most `memory` × its bytes, by `column`."""

    ours: str
    other: str
    time: float | None = None
    faster: float | None = None
    memory: float | None = None
    column: str = "saved MiB"


#: on a GPU the bars against LoRA and full fine-tuning are others than on a CPU
GPU_TARGETS = (
    Target("s2ft", "lora", faster=1.25),
    Target("paca", "lora", faster=1.25),
    Target("s2ft", "full", faster=1.8, memory=1 / 3, column="peak MiB"),
)
CPU_TARGETS = (Target("s2ft", "lora", faster=1.3), Target("paca", "lora", faster=1.3))
EAGER_TARGETS = (
    Target("s2ft", "floor", time=1.05, memory=1.05),
    Target("s2ft", "floor_cut", time=1.05, memory=1.05),
    Target("s2ft", "miss", faster=1.1, memory=1.0, column="peak MiB"),
    Target("paca", "floor", time=1.05, memory=1.05),
    Target("paca", "miss", faster=1.1, memory=1.0, column="peak MiB"),
    Target("rosa", "lora", time=1.0, memory=1.0, column="peak MiB"),
    Target("our_lora", "lora", time=1.0, memory=1.0, column="peak MiB"),
    Target("qrosa", "qlora", time=1.0, memory=1.0, column="peak MiB"),
)
COMPILED_TARGETS = (
    Target("s2ft", "floor", time=1.05, memory=1.05, column="held MiB"),
    Target("s2ft", "lora", faster=1.1),
    Target("s2ft", "miss", memory=1.0, column="peak MiB"),
    Target("paca", "floor", time=1.05, memory=1.05, column="held MiB"),
    Target("paca", "lora", faster=1.1),
    Target("rosa", "lora", time=1.0, memory=1.0, column="peak MiB"),
)


def bars(rows: list[dict[str, Any]], times: dict[str, Timing], device: str = "cpu") -> list[Bar]:
    """The project's bars, as far as the methods ran."""
    by_name = {row["method"]: row for row in rows}
    found: list[Bar] = []
    eager = (*EAGER_TARGETS, *(GPU_TARGETS if device == "cuda" else CPU_TARGETS))
    for mode, targets in (("", eager), ("+compile", COMPILED_TARGETS)):
        for target in targets:
            ours, other = target.ours + mode, target.other + mode
            if ours not in times or other not in times:
                continue
            if target.time is not None:
                found.append(Bar.of(f"time of {ours} / {other}", times[ours].over(times[other]), target.time))
            if target.faster is not None:
                ratio = times[other].over(times[ours])
                found.append(Bar.of(f"time of {other} / {ours}", ratio, target.faster, at_least=True))
            if target.memory is not None:
                ratio = by_name[ours][target.column] / by_name[other][target.column]
                found.append(Bar(f"{target.column[:-4]} bytes of {ours} / {other}", ratio, target.memory))
    return found


def profile(case: Case, name: str) -> None:
    """Where one eager step of a method goes, by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    trainee = METHODS[name](case)
    for _ in range(3):
        trainee.step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.device == "cuda" else [])
    with profiling(activities=activities) as profiler:
        for _ in range(5):
            trainee.step()
    key = "self_cuda_time_total" if case.device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def options() -> argparse.ArgumentParser:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--preset", choices=list(PRESETS), default="small", help="shape of the model")
    for name in ("layers", "sequence", "batch", "rank", "vocab"):
        made.add_argument(f"--{name}", type=int, help="instead of the preset's")
    made.add_argument("--dtype", choices=list(DTYPES), help="default: fp32 on CPU, bf16 on CUDA")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--compile", action="store_true", help="measure torch.compile(model) too")
    made.add_argument("--backend", default="inductor", help="of torch.compile; 'sparsify' is the project's own")
    made.add_argument("--no-eager", action="store_true", help="measure torch.compile(model) only")
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--seconds", type=float, default=240.0, help="of timing, at most")
    made.add_argument("--build-seconds", type=float, default=math.inf, help="build no further method after this time")
    made.add_argument("--profile", choices=list(METHODS), help="print a profile of one method instead")
    return made


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    arguments = options().parse_args(argv)
    begin(arguments)
    if arguments.fast:
        arguments.preset, arguments.rounds = "tiny", 3
    given = {n: getattr(arguments, n) for n in ("layers", "sequence", "batch", "rank", "vocab")}
    shape = Preset(**{**vars(PRESETS[arguments.preset]), **{n: v for n, v in given.items() if v is not None}})
    dtype = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    case = Case(shape, DTYPES[dtype], arguments.device, arguments.seed)
    warnings.filterwarnings("ignore", category=UserWarning)
    if arguments.profile:
        profile(case, arguments.profile)
        return None
    rows, times, failures = run(
        case,
        arguments.methods,
        compiled=arguments.backend if arguments.compile or arguments.no_eager else None,
        eager=not arguments.no_eager,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        clock=arguments.clock,
        patience=arguments.patience,
        build_seconds=arguments.build_seconds,
        kept=lambda rows: keep("train_step", arguments, rows, notes=["stopped before it was timed"]),
    )
    notes = [
        f"{f'Mixtral, {shape.experts} experts of which 2 serve a token' if shape.experts else 'Llama'}, {shape.layers} layers of {shape.width}/{shape.ffn}, {shape.heads}/{shape.kv_heads} heads, vocabulary "
        f"{shape.vocab}, {shape.batch} × {shape.sequence} tokens, {dtype}, {arguments.device}; "
        f"{min((len(t.samples) for t in times.values()), default=0)} rounds; ratios of medians, of minima in brackets",
        *([f"compiled by {arguments.backend}"] if arguments.compile or arguments.no_eager else []),
        *failures,
    ]
    columns = [
        "method",
        "trainable",
        "ms",
        "× floor",
        "× floor_cut",
        "saved MiB",
        "held MiB",
        "step peak MiB",
        "peak MiB",
    ]
    judged = [] if arguments.fast else bars(rows, times, arguments.device)
    return report("train_step", arguments, rows, columns=columns, bars=judged, notes=notes)


if __name__ == "__main__":
    main()
