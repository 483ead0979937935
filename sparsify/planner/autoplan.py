"""`sparsify.autoplan`: the plan that reaches most of the gradient within a budget of memory and time, with its reasons.

    found = sparsify.autoplan(model, memory="8GiB", time="2h", tokens=10_000_000, batch=8, length=1024, calibration=batches)
    print(found)                                     the plan, why, and what was refused
    host = sparsify.compile(model, found.plan, calibration=batches)

For each method the memory of its smallest and its largest size is counted (`estimate`), and if there is a budget of time, a step of both is
measured (`step_time`); sizes between lie between. What fits best is looked at by itself before it becomes the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm

from sparsify.adapters.vllm_check import served_rank
from sparsify.calibration.statistics import need_batches
from sparsify.console import one_line, printable, stage
from sparsify.errors import PlanError, SparsifyError
from sparsify.plan import Plan
from sparsify.planner.candidates import LEVELS, SIZES, Candidate, Choices, between, check_methods, replaced
from sparsify.planner.estimate import Estimate, Traces, estimate
from sparsify.planner.limits import Limits, checked_goal, duration, size
from sparsify.planner.sensitivity import field_of, measure, uniform
from sparsify.planner.shallow import repeat_of, skeleton
from sparsify.planner.step_time import LIMIT, StepTime, step_time
from sparsify.show.report import human

if TYPE_CHECKING:
    from sparsify.calibration.statistics import Loss
    from sparsify.program.values import Batch

WHOLE = 48
"""Blocks up to which a plan that treats them differently is counted whole; beyond, it is counted as if it treated them alike."""


@printable
@dataclass(frozen=True)
class AutoPlan:
    """What `autoplan` chose. `plan` goes to `sparsify.compile`; the rest says how it was found.

    batch, length: rows of one process and tokens of a row, as given. reasons: sentences that say why, printed below the plan.
    recompute: whether it needs gradient checkpointing (`model.gradient_checkpointing_enable()`). chosen: the plan's own row.
    alternatives: everything that was looked at and refused, with the reason. estimate: memory, counted. time: of a step, measured; None
    without a budget of time. steps: of the optimizer; None without `tokens`.
    """

    plan: Plan
    recompute: bool
    batch: int
    length: int
    chosen: Candidate
    reasons: tuple[str, ...]
    alternatives: tuple[Candidate, ...]
    estimate: Estimate
    time: StepTime | None = None
    steps: int | None = None

    def __str__(self) -> str:
        rules = [f"  {rule}" for rule in self.plan.rules]
        return "\n".join(["plan", *rules, *self.reasons, "", *table([self.chosen, *self.alternatives])])

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        import json

        return {
            "plan": json.loads(self.plan.to_json()), "recompute": self.recompute, "batch": self.batch, "length": self.length,
            "chosen": asdict(self.chosen), "reasons": list(self.reasons), "alternatives": [asdict(c) for c in self.alternatives],
            "estimate": self.estimate.to_dict(), "time": None if self.time is None else asdict(self.time), "steps": self.steps,
        }  # fmt: skip


COLUMNS = ("candidate", "base", "reach", "peak", "step", "training", "")


def row(candidate: Candidate) -> tuple[str, ...]:
    """A candidate as cells of COLUMNS."""
    near = "~" if candidate.estimated else ""
    return (
        candidate.what, candidate.over, f"{candidate.reach:.2%}", "" if candidate.memory is None else near + human(candidate.memory),
        "" if candidate.step is None else f"{near}{candidate.step:.3g} s",
        "" if candidate.total is None else near + spell(candidate.total), candidate.refused or "the plan",
    )  # fmt: skip


def table(candidates: Sequence[Candidate]) -> list[str]:
    """Candidates as lines of text."""
    cells = [COLUMNS, *map(row, candidates)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return ["  ".join(one_line(c).ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def spell(seconds: float) -> str:
    """`95 s`, `12 min`, `3.4 h`, `2.1 d`."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def autoplan(
    model: nn.Module,
    *,
    memory: int | str | None = None,
    time: float | str | None = None,
    tokens: int | None = None,
    batch: int = 8,
    length: int = 1024,
    calibration: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    methods: Sequence[str] = tuple(SIZES),
    max_lora_rank: int | None = None,
    goal: str = "accuracy",
    world: int = 1,
    sharded: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> AutoPlan:
    """Choose method, units or rank, their spread over blocks, and the base's format for a causal language model.

    model: as it will be trained, in its dtype; on the meta device it has no gradients, so `calibration` cannot be given.
    memory: bytes of one process at the peak of a step, or "8GiB". time: seconds of the whole training, or "2h"; needs `tokens`, the
        training tokens of all processes, of which each step takes `batch · length · world`.
    calibration: batches for one gradient pass, which says where units and ranks go (`sparsify.planner.sensitivity`); without, they go
        everywhere alike and are chosen at random. loss: as for `compile`.
    methods: of S2FT, PaCA, RoSA, LoRA; Prune meets no budget of a training step, which computes zeros too.
    max_lora_rank: what an export as LoRA may need (RoSA has none).
    goal: what is best among what fits: "accuracy" (most of the squared gradient reached), "memory" or "time" (the least).
    world, sharded: processes of DDP, or with `sharded` of FSDP2. seed: of the plan. progress: show bars and stages on stderr.

    Packing the base and computing blocks again (gradient checkpointing) are given up to only when nothing fits without: `base` of the
    chosen candidate and `recompute` say so.

    Returns an AutoPlan, the same for the same arguments, but for times, which are measured here once and then kept.
    Raises PlanError: no candidate fits (naming the nearest, and what would have to give), a budget that cannot be read, a model that is
    not for causal language modelling.
    """
    search = Search(
        model, Limits(None if memory is None else size(memory), None if time is None else duration(time), checked_goal(goal)),
        batch, length, tokens, world, sharded, progress,
    )  # fmt: skip
    chain = check_methods(methods)
    if max_lora_rank is not None and max_lora_rank < 1:
        raise PlanError(f"max_lora_rank={max_lora_rank}: at least 1 is needed")
    repeat = repeat_of(search.shapes)
    with stage("looking for what can train", progress):
        field = field_of(search.shapes, repeat)
    found = uniform(field)
    if calibration is not None:
        if any(p.is_meta for p in model.parameters()):
            raise PlanError("autoplan: a model on the meta device has no gradients: load it, or leave calibration out")
        with stage("one gradient pass", progress):
            found = measure(model, field, need_batches(calibration, "autoplan"), loss, progress)
    choices = Choices(field, found, repeat, max_lora_rank, seed)
    return search.run(choices, chain)


class Search:
    """One call of `autoplan`. looked: every candidate that was looked at."""

    def __init__(
        self, model: nn.Module, limits: Limits, batch: int, length: int, tokens: int | None, world: int, sharded: bool, progress: bool
    ) -> None:  # fmt: skip
        self.model, self.limits, self.progress = model, limits, progress
        self.batch, self.length, self.world, self.sharded = batch, length, world, sharded
        if min(batch, length - 1, world) < 1:
            raise PlanError(
                f"autoplan(batch={batch}, length={length}, world={world}): a row of two tokens is the least"
            )
        if limits.time is not None and (tokens is None or tokens < 1):
            raise PlanError("autoplan: a budget of time needs tokens=…, the number of training tokens")
        if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config") or not can_generate(model):
            raise PlanError(
                f"autoplan: {type(model).__name__} is not a model for causal language modelling of transformers"
            )
        self.steps = None if tokens is None else math.ceil(tokens / (batch * length * world))
        self.shapes = skeleton(model, None)
        self.traces = Traces(self.shapes)
        self.looked: list[Candidate] = []

    # --- what one costs ---

    def counted(self, plan: Plan, recompute: bool, batch: int | None = None) -> Estimate:
        return estimate(
            self.shapes, plan, batch=batch or self.batch, length=self.length, gradient_checkpointing=recompute, full=False,
            world=self.world, sharded=self.sharded, traces=self.traces,
        )  # fmt: skip

    def timed(self, plan: Plan, recompute: bool) -> StepTime:
        device = next(self.model.parameters()).device
        return step_time(
            self.shapes, plan, batch=self.batch, length=self.length, checkpointing=recompute, limit=LIMIT, device=device
        )

    def training(self, step: float) -> float | None:
        return None if self.steps is None else step * self.steps

    # --- the search ---

    def run(self, choices: Choices, methods: Sequence[str]) -> AutoPlan:
        """Levels of what is given up, one after the other, until something fits."""
        for method in methods:
            if not choices.sizes(method):
                empty = Candidate(
                    method, 0, None, False, 0.0, None, refused=f"not possible: {choices.why_none(method)}"
                )
                self.looked.append(empty)
        usable = [method for method in methods if choices.sizes(method)]
        if not usable:
            raise PlanError(
                f"autoplan: nothing can train: {'; '.join(f'{c.method}: {c.refused}' for c in self.looked)}"
            )
        for base, recompute in LEVELS:
            level: list[Candidate] = []
            what = "counting memory" + (" and measuring steps" if self.limits.time is not None else "")
            for method in tqdm(usable, desc=f"{what}: {base or 'as it is'}", disable=not self.progress, leave=False):
                level += self.chain(choices, method, base, recompute)
            for candidate in sorted((c for c in level if not c.refused), key=self.order):
                found = self.settle(choices, candidate, level)
                if found is not None:
                    return found
            self.looked += level
            if self.limits.memory is None:
                break  # what follows saves memory and takes longer
        raise PlanError(self.nearest(choices))

    def order(self, candidate: Candidate) -> tuple[float, ...]:
        """Best first."""
        memory, step = float(candidate.memory or 0), candidate.step or 0.0
        return {
            "accuracy": (-candidate.reach, memory),
            "memory": (memory, -candidate.reach),
            "time": (step, -candidate.reach),
        }[self.limits.goal]

    def chain(self, choices: Choices, method: str, base: str | None, recompute: bool) -> list[Candidate]:
        """All sizes of a method at one level: the ends looked at, the others between; what breaks a budget is refused."""
        sizes = choices.sizes(method)
        found = [choices.candidate(method, s, base, recompute) for s in sizes]
        ends = [0, len(found) - 1]
        try:
            peaks = {i: self.counted(choices.uniform(found[i]), recompute).memory for i in dict.fromkeys(ends)}
        except (PlanError, SparsifyError) as error:
            return [replaced(found[0], refused=f"not possible: {one_line(str(error))[:160]}")]
        low, high = ((sizes[i], float(peaks[i])) for i in ends)
        memories = [peaks.get(i, int(between(s, low, high))) for i, s in enumerate(sizes)]
        found = [
            replaced(c, memory=m, estimated=i not in peaks)
            for i, (c, m) in enumerate(zip(found, memories, strict=True))
        ]
        found = [self.judged(c) for c in found]
        inside = [i for i, c in enumerate(found) if not c.refused]
        if self.limits.time is None or not inside:
            return found
        ends = [inside[0], inside[-1]]
        times = {i: self.timed(choices.uniform(found[i]), recompute).seconds for i in dict.fromkeys(ends)}
        low, high = ((sizes[i], times[i]) for i in ends)
        for i in inside:
            step = times.get(i, between(sizes[i], low, high))
            near = found[i].estimated or i not in times
            found[i] = self.judged(replaced(found[i], step=step, total=self.training(step), estimated=near))
        return found

    def judged(self, candidate: Candidate) -> Candidate:
        """The candidate, refused where it breaks a budget."""
        memory, time = self.limits.memory, self.limits.time
        if memory is not None and candidate.memory is not None and candidate.memory > memory:
            return replaced(candidate, refused=f"{human(candidate.memory - memory)} above the budget of memory")
        if time is not None and candidate.total is not None and candidate.total > time:
            return replaced(candidate, refused=f"{spell(candidate.total - time)} above the budget of time")
        return candidate

    def settle(self, choices: Choices, candidate: Candidate, level: list[Candidate]) -> AutoPlan | None:
        """The candidate spread over blocks, looked at by itself; None (and refused in `level`) where it does not fit after all."""
        place = level.index(candidate)
        plan, note = choices.uniform(candidate), ""
        spread = choices.spread(candidate)
        if spread is not None:
            alike = f"{candidate.reach:.2%} with the same everywhere"
            note = f"blocks: {spread[1]:.2%} of the squared gradient with more where it is large, {alike}"
            plan, candidate = spread[0], replaced(candidate, reach=spread[1])
        blocks = choices.repeat.blocks if choices.repeat is not None else 0
        counted = self.counted(
            plan if spread is None or blocks <= WHOLE else choices.uniform(candidate), candidate.recompute
        )
        candidate = replaced(candidate, memory=counted.memory, estimated=False)
        taken = None
        if self.limits.time is not None:
            taken = self.timed(choices.uniform(level[place]), candidate.recompute)
            candidate = replaced(candidate, step=taken.seconds, total=self.training(taken.seconds))
        candidate = self.judged(candidate)
        level[place] = candidate
        if candidate.refused:
            return None
        others = [replaced(c, refused=c.refused or self.why_worse(c, candidate)) for c in level if c is not candidate]
        alternatives = tuple(self.looked + others)
        reasons = self.reasons(choices, candidate, counted, taken, note)
        return AutoPlan(
            plan,
            candidate.recompute,
            self.batch,
            self.length,
            candidate,
            reasons,
            alternatives,
            counted,
            taken,
            self.steps,
        )

    def why_worse(self, other: Candidate, chosen: Candidate) -> str:
        if self.limits.goal == "accuracy":
            return f"fits, and reaches {other.reach:.2%} where the plan reaches {chosen.reach:.2%}"
        if self.limits.goal == "memory":
            return f"fits, and takes {human((other.memory or 0) - (chosen.memory or 0))} more"
        return "fits, and its step takes longer or reaches less"

    # --- words ---

    def reasons(
        self, choices: Choices, chosen: Candidate, counted: Estimate, taken: StepTime | None, note: str
    ) -> tuple[str, ...]:
        step, budget = counted.step, self.limits.memory
        of = "" if budget is None else f" of {human(budget)}"
        each = f" in each of {self.world} processes" if self.world > 1 else ""
        lines = [
            f"memory: {human(counted.memory)}{of} at the peak{each} at {self.batch} × {self.length} tokens: weights {human(step.weights)}, "
            f"gradients and AdamW's moments {human(3 * step.trained)}, kept for the backward {human(step.saved)}"
        ]
        if taken is not None and self.steps is not None and self.limits.time is not None:
            part = "" if taken.blocks is None else f", {taken.blocks[0]} of {taken.blocks[1]} blocks"
            whole = spell(taken.seconds * self.steps)
            lines.append(
                f"time: {self.steps:,} steps of {taken.seconds:.3g} s are {whole} of {spell(self.limits.time)}; "
                f"measured here at {taken.rows} × {taken.length} tokens{part}"
            )
        measured = (
            "by one gradient pass"
            if choices.found.measured
            else "every entry counted alike, as no calibration was given"
        )
        lines.append(
            f"method: {chosen.what} reaches {chosen.reach:.2%} of the squared gradient ({measured}), best for {self.limits.goal}"
        )
        given_up = {None: "the base stays as it is", "int8": "the base goes to int8", "nf4": "the base goes to nf4"}[
            chosen.base
        ]
        less = chosen.base is not None or chosen.recompute
        lines.append(
            f"base: {given_up}{', blocks are computed again in the backward' if chosen.recompute else ''}"
            + (", as nothing fits that gives up less" if less else "")
        )
        lines += [note] if note else []
        rank = counted.lora_rank
        serves = served_rank(rank)
        if rank is None:
            lines.append("as LoRA: not possible, scattered entries are no LoRA")
        else:
            needs = f"vLLM needs --max-lora-rank {serves}" if serves else "more than vLLM serves"
            lines.append(f"as LoRA: rank {rank}; {needs}")
        return tuple(lines)

    def nearest(self, choices: Choices) -> str:
        """Why nothing fits, by the candidate that comes nearest."""
        memory, time = self.limits.memory, self.limits.time

        def excess(candidate: Candidate) -> float:
            over = 0.0
            if memory is not None and candidate.memory is not None:
                over = max(over, candidate.memory / memory)
            if time is not None and candidate.total is not None:
                over = max(over, candidate.total / time)
            return over

        known = [c for c in self.looked if c.memory is not None]
        if not known:
            return f"autoplan: nothing can train: {'; '.join(f'{c.method}: {c.refused}' for c in self.looked)}"
        timed = [c for c in known if time is None or c.total is not None] or known
        best = min(timed, key=lambda c: (excess(c), -c.reach))
        assert best.memory is not None
        said = f"autoplan: no plan fits the budget; the nearest is {best.what}, base {best.over}: {best.refused}"
        if memory is not None and best.memory > memory:
            one = self.counted(choices.uniform(best), best.recompute, batch=1)
            if one.memory <= memory:
                each = max(1, best.memory - one.memory) / max(1, self.batch - 1)
                rows = min(1 + int((memory - one.memory) / each), max(1, self.batch - 1))
                asked = f"(batch={self.batch} was asked for), or memory={human(best.memory)}"
                return f"{said}. A batch of {rows} would fit {asked}"
            return (
                f"{said}. Even one row takes {human(one.memory)}, of which the weights are {human(one.step.weights)}: "
                "shorter rows, more processes (world=…, sharded=True), a smaller model, or more memory"
            )
        if best.total is not None and best.step is not None and time is not None and self.steps is not None:
            tokens = int(time / best.step) * self.batch * self.length * self.world
            return f"{said}. {tokens:,} tokens would fit, or time={spell(best.total)}"
        return said


def can_generate(model: Any) -> bool:
    return (
        bool(getattr(type(model), "can_generate", lambda: False)())
        and getattr(model, "main_input_name", "") == "input_ids"
    )


__all__ = ["AutoPlan", "autoplan"]
