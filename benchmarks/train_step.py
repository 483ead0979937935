"""One training step (forward, backward, optimizer, zero_grad) of every method on the same Llama, and the frozen floor.

    floor       everything frozen, the gradient flows from the loss through every layer to `inputs_embeds`: forward + dX
    floor_cut   the same, but the backward ends where S2FT's ends, at the output of the first layer's o_proj. This is
                the stricter floor for S2FT, whose backward stops below the lowest trained weight; `floor` is the one
                for methods that train every linear. Neither has an optimizer. Eager only: compiled, its backward is
                removed as dead code.
    s2ft        `sparsify.compile(model, Plan([S2FT(fraction=…)]))`: columns of O and Down
    full        full fine-tuning
    lora        PEFT LoRA on all linears
    miss        PEFT MiSS on all linears, the lightest method in PEFT

Trainable sizes are made equal: `--rank` is LoRA's, S2FT's fraction and MiSS' rank follow from it (units are whole, so
up to about a tenth remains; the table has the counts). AdamW is the fused one for all, as in Hugging Face's Trainer.
Memory: see harness.py; `saved` is counted by hooks, which a compiled graph hides, so there and for its bar `held` counts:
what the allocator still holds after the forward. `peak` is weights + optimizer state + the allocator's peak in a step.
A method is one entry of METHODS; one that fails is shown with its reason.

    python benchmarks/train_step.py --compile --save
    python benchmarks/train_step.py --preset 8b --dtype bf16          # a GPU
    python benchmarks/train_step.py --profile s2ft
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
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
    mib,
    parser,
    report,
    saved_for_backward,
    storage_bytes,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Preset:
    """Shape of a Llama; `rank` is LoRA's, which sets everybody's trainable size."""

    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    layers: int
    sequence: int
    batch: int
    rank: int


PRESETS = {
    "tiny": Preset(64, 176, 4, 4, 128, 2, 16, 1, 4),
    "small": Preset(1024, 2816, 16, 16, 4096, 4, 512, 1, 8),
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
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = self.shape
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max(shape.sequence, 32),
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model = LlamaForCausalLM(config)
        return model.to(self.dtype).train()

    @functools.cached_property
    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.shape.batch, self.shape.sequence)
        return torch.randint(0, self.shape.vocab, size, generator=generator).to(self.device)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Kind of linear → `(in, out)`, of one layer."""
        width, ffn = self.shape.width, self.shape.ffn
        kv = width // self.shape.heads * self.shape.kv_heads
        attention = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
        return attention | {"gate": (width, ffn), "up": (width, ffn), "down": (ffn, width)}

    def lora_parameters(self) -> int:
        """Of one layer, all linears: the size that everybody gets."""
        return self.shape.rank * sum(m + n for m, n in self.linears().values())

    def s2ft_fraction(self) -> float:
        """Share of O and Down with as many parameters."""
        shapes = self.linears()
        return self.lora_parameters() / sum(shapes[k][0] * shapes[k][1] for k in ("o", "down"))

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


def build_s2ft(case: Case) -> Trainee:
    """Ours: columns of O and Down."""
    import sparsify
    from sparsify import S2FT, Plan

    plan = Plan([S2FT(fraction=case.s2ft_fraction())], seed=case.seed)
    model = sparsify.compile(case.model(), plan, progress=False, donate=True)
    return Trainee(model, {"input_ids": case.tokens, "labels": case.tokens}, extra=held_by(model.sparsify))


def build_full(case: Case) -> Trainee:
    """Every parameter trains."""
    return Trainee(case.model(), {"input_ids": case.tokens, "labels": case.tokens})


def build_lora(case: Case) -> Trainee:
    """PEFT LoRA on all linears."""
    from peft import LoraConfig, get_peft_model

    rank = case.shape.rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return Trainee(get_peft_model(case.model(), config), {"input_ids": case.tokens, "labels": case.tokens})


def build_miss(case: Case) -> Trainee:
    """PEFT MiSS on all linears."""
    from peft import MissConfig, get_peft_model

    config = MissConfig(r=case.miss_rank(), target_modules="all-linear", task_type="CAUSAL_LM")
    return Trainee(get_peft_model(case.model(), config), {"input_ids": case.tokens, "labels": case.tokens})


METHODS: dict[str, Callable[[Case], Trainee]] = {
    "floor": build_floor,
    "floor_cut": build_floor_cut,
    "s2ft": build_s2ft,
    "full": build_full,
    "lora": build_lora,
    "miss": build_miss,
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
    compiled: bool,
    eager: bool,
    rounds: int,
    seconds: float,
    clock: str,
    patience: float,
) -> tuple[list[dict[str, Any]], dict[str, Timing], list[str]]:
    """One row per method and mode; timings by `name` (eager) and `name+compile`; reasons of what failed."""
    torch._dynamo.config.recompile_limit = 64  # the methods share the code of Llama's forward: an entry for each
    trainees: dict[str, Trainee] = {}
    memory: dict[str, Memory] = {}
    failures: list[str] = []
    for name in methods:
        try:
            trainee = METHODS[name](case)
            if eager:
                memory[name] = measure_memory(trainee, case.device)
                trainees[name] = trainee
            if compiled and name not in EAGER_ONLY:
                fast = Trainee(trainee.model, trainee.inputs, trainee.leaves, trainee.extra, trainee.optimizer)
                fast.call = torch.compile(trainee.model, dynamic=False)
                memory[name + "+compile"] = measure_memory(fast, case.device)
                trainees[name + "+compile"] = fast
        except Exception as error:
            failures.append(f"{name} failed: {explain(error)}")
            print(failures[-1], file=sys.stderr)
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


def bars(rows: list[dict[str, Any]], times: dict[str, Timing]) -> list[Bar]:
    """The project's bars for S2FT, as far as the methods ran."""
    by_name = {row["method"]: row for row in rows}
    found: list[Bar] = []
    for mode in ("", "+compile"):
        ours = "s2ft" + mode
        if ours not in times:
            continue
        for floor in ("floor" + mode, "floor_cut" + mode):
            if floor in times:
                found.append(Bar.of(f"time of {ours} / {floor}", times[ours].over(times[floor]), 1.05))
                key = "held MiB" if mode else "saved MiB"
                ratio = by_name[ours][key] / by_name[floor][key]
                found.append(Bar(f"{key[:-4]} for backward, bytes of {ours} / {floor}", ratio, 1.05))
        for peer, bound in (("lora", 1.1 if mode else 1.3), ("miss", 1.1)):
            if peer + mode in times and not (mode and peer == "miss"):
                ratio = times[peer + mode].over(times[ours])
                found.append(Bar.of(f"time of {peer}{mode} / {ours}", ratio, bound, at_least=True))
        if "miss" + mode in times:
            peak = by_name[ours]["peak MiB"] / by_name["miss" + mode]["peak MiB"]
            found.append(Bar(f"peak memory of {ours} / miss{mode}", peak, 1.0))
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
    made.add_argument("--preset", choices=list(PRESETS), default="small", help="shape of the Llama")
    for name in ("layers", "sequence", "batch", "rank", "vocab"):
        made.add_argument(f"--{name}", type=int, help="instead of the preset's")
    made.add_argument("--dtype", choices=list(DTYPES), help="default: fp32 on CPU, bf16 on CUDA")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--compile", action="store_true", help="measure torch.compile(model) too")
    made.add_argument("--no-eager", action="store_true", help="measure torch.compile(model) only")
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--seconds", type=float, default=240.0, help="of timing, at most")
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
        compiled=arguments.compile or arguments.no_eager,
        eager=not arguments.no_eager,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        clock=arguments.clock,
        patience=arguments.patience,
    )
    notes = [
        f"Llama, {shape.layers} layers of {shape.width}/{shape.ffn}, {shape.heads}/{shape.kv_heads} heads, vocabulary "
        f"{shape.vocab}, {shape.batch} × {shape.sequence} tokens, {dtype}, {arguments.device}; "
        f"{min((len(t.samples) for t in times.values()), default=0)} rounds; ratios of medians, of minima in brackets",
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
    judged = [] if arguments.fast else bars(rows, times)
    return report("train_step", arguments, rows, columns=columns, bars=judged, notes=notes)


if __name__ == "__main__":
    main()
