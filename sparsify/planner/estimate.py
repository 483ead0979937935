"""What a plan costs before anything is loaded: parameters, memory of one training step, size of the adapter, traffic between processes.

    config ─▶ model on the meta device ─▶ host ─▶ forward, backward and AdamW over fake tensors, every storage counted while it lives

No weights and no memory are needed, and nothing is fitted: the bytes are those of the tensors that the step would make, of the same shapes
and dtypes, on the CPU's kernels. Of a deep model of equal blocks three are counted, and the others are like the middle one. Not in it:
what an allocator keeps beside them, and workspaces of a GPU's libraries. Rules that choose by data choose at random here; what trains is
of the same size.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.api import PIPELINE, compile, compile_for_training
from sparsify.ops.saved_input import fakes_count_as_plain
from sparsify.passes.base import Context, run_passes
from sparsify.passes.train_experts import write_out_experts
from sparsify.plan import DATA_DRIVEN, S2FT, Plan, Rule
from sparsify.planner.phases import Phases
from sparsify.planner.shallow import Repeat, cut, repeat_of, skeleton
from sparsify.program import Program
from sparsify.program.capture import capture
from sparsify.program.unit_budget import Budget
from sparsify.show.parameter_count import adapter_size, count_parameters

COUNTER = 4  # bytes of AdamW's number of steps, one for each parameter
BACKWARD_FACTOR = 2  # FSDP gathers the parameters for the forward and, freed in between, again for the backward


@dataclass(frozen=True)
class Step:
    """Bytes of one training step. saved: kept for the backward, without parameters. peak: the most that lives at one time."""

    weights: int
    trained: int
    saved: int
    peak: int


@dataclass(frozen=True)
class Ranks:
    """Of each of `world` processes. memory: bytes at the peak, expected. sent: bytes that it sends in one step."""

    world: int
    sharded: bool
    memory: int
    sent: int


@dataclass(frozen=True)
class Estimate:
    """found: structures by kind. chosen, declined: lines of the report. lora_rank: what an export to LoRA would need; None where it is
    not possible. adapter: bytes of the file at least (values and places; where `base + change` is not the trained value in the base's
    dtype, that is kept too). traced: how many of how many equal blocks were looked at; None where all were."""

    model: str
    found: dict[str, int]
    trainable: int
    total: int
    batch: int
    length: int
    step: Step
    full: Step | None
    adapter: int
    lora_rank: int | None
    budgets: tuple[str, ...]
    declined: tuple[str, ...]
    ranks: Ranks | None = None
    traced: tuple[int, int] | None = None

    @property
    def memory(self) -> int:
        """Bytes at the peak of one process."""
        return self.step.peak if self.ranks is None else self.ranks.memory

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    model: nn.Module,
    plan: Plan,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    full: bool = True,
    world: int = 1,
    sharded: bool = False,
    traces: Traces | None = None,
    whole: bool = False,
) -> Estimate:
    """Estimate a plan for a causal language model whose parameters lie on the meta device (`with torch.device("meta"): …`).

    dtype: of the weights, as they are by default. full: also a step of full fine-tuning, to compare with. world, sharded: processes of
    DDP, or with `sharded` of FSDP2 over the model's blocks. traces: of this model, where several plans are estimated. whole: count every
    block by itself. Raises what `sparsify.compile` raises.
    """
    if dtype is not None:
        model = model.to(dtype)
    plan = sizes_only(plan)
    repeat = None if whole else repeat_of(model, plan)
    traces = traces or Traces(model)
    host: Any = traces.host(plan, repeat)
    if repeat is not None and not even(host, repeat):  # the budget pays for units in some of the blocks only
        repeat, host = None, traces.host(plan, None)
    report, program = host.sparsify.report, host.sparsify.program
    more = 0 if repeat is None else repeat.more
    one = host.get_submodule(repeat.typical) if repeat is not None else nn.Module()
    counted = count_parameters(one)
    found = dict(report.found)
    for structure in program.structures if repeat is not None else ():
        found[structure.kind] += more * repeat.inside(structure.name)  # type: ignore[union-attr]
    shape = {"batch": batch, "length": length, "checkpointing": gradient_checkpointing, "repeat": repeat}
    numbers, places = adapter_size(host, program)
    if repeat is not None:
        numbers, places = (
            a + more * b for a, b in zip((numbers, places), adapter_size(host, program, repeat.inside), strict=True)
        )
    largest = largest_block(host, repeat)
    step = measured(host, **shape)
    in_full = measured(skeleton(model, repeat).requires_grad_(True), **shape) if full else None
    ranks = None
    if world > 1:
        ranks = (
            shared_out(step, largest, world) if sharded else Ranks(world, False, step.peak, ring(step.trained, world))
        )
    budgets = tuple(str(scaled(budget, repeat)) for budget in report.budgets)
    return Estimate(
        report.model, found, report.trainable + more * counted.trainable, report.total + more * counted.total, batch, length, step, in_full,
        numbers * 4 + places * 8, lora_rank(program), budgets, tuple(map(str, report.declined)), ranks,
        None if repeat is None else (repeat.kept, repeat.blocks),
    )  # fmt: skip


class Traces:
    """What is known of a model on the meta device before any plan, found once: its graph, structures, and which may be permuted."""

    LOOK = Plan([S2FT(units=1)])

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known: dict[Repeat | None, Program] = {}

    def host(self, plan: Plan, repeat: Repeat | None) -> Any:
        """`sparsify.compile` of the model, cut down to `repeat`."""
        if repeat not in self.known:
            twin = cut(self.model, repeat)
            if write_out_experts(twin, plan) is not twin:  # such a model is another one for every plan
                return compile(twin, plan, progress=False)
            looking = [step for step in PIPELINE if step.name in ("find-structures", "prove-units")]
            self.known[repeat] = run_passes(capture(twin), looking, Context(self.LOOK, progress=False))
        program = self.known[repeat]
        rest = [step for step in PIPELINE if step.name not in ("find-structures", "prove-units")]
        return compile_for_training(program, program.host, Context(plan, progress=False), rest)


def even(host: Any, repeat: Repeat) -> bool:
    """Whether every block that is there trains as much as the others, and units lie in blocks alone."""
    blocks = [host.get_submodule(repeat.block(number)) for number in range(repeat.kept)]
    trained = {sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks}
    outside = [s for s in host.sparsify.program.choices if not s.structure.startswith(f"{repeat.path}.")]
    return len(trained) == 1 and not outside


def scaled(budget: Budget, repeat: Repeat | None) -> Budget:
    """A budget of the model that was cut down, as it is of the whole one."""
    if repeat is None:
        return budget
    times, of = repeat.blocks, repeat.kept
    trained, total = budget.trained * times // of, budget.total * times // of
    return dataclasses.replace(budget, asked=budget.asked * times / of, trained=trained, total=total)


def sizes_only(plan: Plan) -> Plan:
    """The plan with choices that need no data and no weights, of the same sizes."""
    return dataclasses.replace(plan, rules=[blind(rule) for rule in plan.rules], check="none")


def blind(rule: Rule) -> Rule:
    changes: dict[str, Any] = {}
    if getattr(rule, "select", "random") in (*DATA_DRIVEN, "weight"):
        changes["select"] = "random"
    if hasattr(rule, "mask") and hasattr(rule, "density"):
        changes["mask"] = "gradient"  # left open without calibration: the size is known, the places are not
    if getattr(rule, "avoid", ()):
        changes["avoid"] = ()
    return dataclasses.replace(rule, **changes) if changes else rule


def lora_rank(program: Any) -> int | None:
    """The rank of the largest change of one weight; None where scattered entries train, which no low-rank matrix equals."""
    ranks: dict[str, int] = {}
    for piece in program.slices:
        ranks[piece.param] = ranks.get(piece.param, 0) + len(piece.channels)
    for part in program.parts:
        if getattr(part, "count", 0):
            return None
        ranks[part.param] = ranks.get(part.param, 0) + int(getattr(part, "rank", 0) or 0)
    return max(ranks.values(), default=0)


# --- one step ---


def measured(model: nn.Module, *, batch: int, length: int, checkpointing: bool, repeat: Repeat | None = None) -> Step:
    """A training step of a model on the meta device, over fake tensors; the model is not usable afterwards. repeat: how it was cut
    down from the one that is asked about."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        materialise(model)
        ids = torch.zeros(batch, length, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}
    return one_step(model, inputs, checkpointing, mode, repeat)


def materialise(model: nn.Module) -> None:
    """Put fake tensors of the CPU in the place of everything that lies on the meta device; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if id(tensor) not in made:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                    )
                    made[id(made[id(tensor)])] = tensor  # keeps it alive, so that its id is its own
                store[name] = made[id(tensor)]


def one_step(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    checkpointing: bool = False,
    mode: Any = None,
    repeat: Repeat | None = None,
) -> Step:
    """Forward, backward and a step of AdamW on a batch of rows that are padded, every storage counted. mode: a FakeTensorMode, or None
    for a real step, whose values are then real too. repeat: count the blocks that are not there too."""
    ready(model, checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    own = {id(storage_of(t)): size_of(t) for t in (*model.parameters(), *model.buffers())}
    live = Live()
    for tensor in (*model.parameters(), *model.buffers(), *inputs.values()):
        live.add(tensor)
    levels = Levels(live)
    with mode or nullcontext(), live, fakes_count_as_plain(), Phases(model, repeat, levels.mark) as phases:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, foreach=False)
        for parameter in (
            trained
        ):  # every step but the first finds moments that are there: a step on zeros makes them and moves nothing
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        phases.begin()
        before = live.now
        loss: Any = model(**inputs, use_cache=False).loss
        saved = (
            live.now - before - size_of(loss)
        )  # not by hooks on what is saved, as operators save otherwise where somebody looks
        phases.backward()
        loss.backward()
        del loss
        phases.optimizer()
        optimizer.step()
    levels.mark("end")
    states = Step(sum(own.values()), sum(size_of(p) for p in trained), saved, live.peak)
    return states if repeat is None else levels.whole(states, model.get_submodule(repeat.typical), repeat)


def ready(model: nn.Module, checkpointing: bool) -> None:
    """Put a model into the mode in which it trains."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):  # type: ignore[operator]
            model.enable_input_require_grads()  # type: ignore[operator]


class Levels:
    """Bytes that live when a phase of a step begins, and the most in it."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.phase = "optimizer"
        self.peaks: dict[str, int] = {}
        self.begins: dict[str, int] = {}

    def mark(self, phase: str) -> None:
        """A phase ends, and `phase` begins."""
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live.highest)
        self.phase, self.live.highest = phase, self.live.now
        self.begins[phase] = self.live.now

    def whole(self, step: Step, block: nn.Module, repeat: Repeat) -> Step:
        """The step of the model that was cut down: between the first and the last block lie `repeat.more` others.

        What more blocks add to a phase: their weights and moments everywhere, what they keep while it is kept, their gradients from when
        they are there. In their own backward one gives way to the other, so the most is where it begins or where it ends.
        """
        own = [*block.parameters(), *block.buffers()]
        weights = sum({id(storage_of(t)): size_of(t) for t in own}.values())
        parameters = [p for p in block.parameters() if p.requires_grad]
        trained = gradients = sum(map(size_of, parameters))
        kept = self.begins[f"forward {repeat.kept - 1}"] - self.begins["forward 1"]
        states = weights + 2 * trained + COUNTER * len(parameters)
        added = {
            "start": 0,
            "forward 0": 0,
            "backward 1": max(kept, gradients),
            "backward 0": gradients,
            "optimizer": gradients,
        }
        peaks = [peak + repeat.more * (states + added.get(phase, kept)) for phase, peak in self.peaks.items()]
        return Step(
            step.weights + repeat.more * weights, step.trained + repeat.more * trained, step.saved + repeat.more * kept, max(peaks)
        )  # fmt: skip


def storage_of(tensor: Tensor) -> Any:
    """One Python object for as long as the memory lives."""
    return tensor.untyped_storage()


def size_of(tensor: Tensor) -> int:
    return storage_of(tensor).nbytes()


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, from their first appearance until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.highest = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return found

    def add(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        key = id(storage)
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = weakref.finalize(storage, self.drop, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.highest = max(self.highest, self.now)  # since somebody set it back

    def drop(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.now -= size


# --- several processes ---


def largest_block(model: nn.Module, repeat: Repeat | None = None) -> int:
    """Bytes of the largest block of the model and of what lies outside of its blocks: what FSDP has whole at one time."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if repeat is not None:
        lists = [m for m in lists if m is model.get_submodule(repeat.path)]
    blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(sizes, default=0) * 2 + whole - sum(sizes)  # the next one is gathered while one computes


def shared_out(step: Step, gathered: int, world: int) -> Ranks:
    """FSDP2 over blocks: parameters, gradients and moments in pieces, one block whole (and the next); activations are each one's own."""
    states = step.weights + 3 * step.trained
    memory = math.ceil(states / world) + min(gathered, step.weights) + max(0, step.peak - states)
    gather = BACKWARD_FACTOR * step.weights * (world - 1) // world
    return Ranks(world, True, memory, gather + step.trained * (world - 1) // world)


def ring(size: int, world: int) -> int:
    """Bytes that each process sends in a ring all-reduce of `size` bytes."""
    return 2 * size * (world - 1) // world


__all__ = ["Estimate", "Ranks", "Step", "estimate"]
