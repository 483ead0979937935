"""Passes and the machine that runs them: what a pass declares is checked after it has run.

Pass("permute-weights", SELECTED → PERMUTED, run, preserves="rounding")
    run(program, context) ──▶ PassResult(program, changed=True)

stage       the program stands at the stage that the pass reads, and obeys the grammar of the stage that it writes
changed     a pass that says it changed nothing returns an equal program: the same nodes, the same tensors by identity, the same
            choices and parts; one that says it changed something returns a different one
preserves   with Plan(check="numeric"), the example gives the outputs of before: bit for bit ("exactly"), but for rounding
            ("rounding"), or other ones, which are what later passes are compared with ("nothing")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from sparsify.console import stage
from sparsify.errors import PlanError, SparsifyError, VerifyError
from sparsify.passes.check_controls import check_controls
from sparsify.passes.verify import check_identical, check_outputs, verify
from sparsify.plan import Plan, nearest
from sparsify.program import Program, Stage

if TYPE_CHECKING:
    from sparsify.calibration.statistics import Loss
    from sparsify.program.values import Batch

Preserves = Literal["exactly", "rounding", "nothing"]
WEAKEST_LAST: tuple[Preserves, ...] = ("exactly", "rounding", "nothing")


@dataclass(frozen=True)
class Context:
    """What passes may look at besides the program.

    plan: what the user asked for. progress: whether bars and stages are shown.
    calibration: batches (mappings, tuples or tensors) for data-driven selections.
    loss: `loss(outputs, batch)` for gradient scores; None takes `outputs.loss`.
    resume_dir: folder in which interrupted pruning is kept and continued.
    donate: tensors of the user's model may be freed as they are replaced.
    """

    plan: Plan
    calibration: Iterable[Batch] | None = None
    loss: Loss | None = None
    donate: bool = False
    progress: bool = True
    resume_dir: str | Path | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    changed: whether anything but the stage and the history differs from the program that it was given.
    preserves: for this run, less than the pass declares (inserting packed weights rounds them; without them it does not).
    """

    program: Program
    changed: bool
    preserves: Preserves | None = None


@dataclass(frozen=True)
class Pass:
    """One transformation: `run(program, context)` takes a program at stage `reads` and returns one at stage `writes`.

    name: in errors, in the report's history, and for `insert_after`.
    preserves: how far the outputs of the program are those of before: "exactly" (bit for bit), "rounding" (sums in another order) or
    "nothing" (it is meant to change them).
    """

    name: str
    reads: Stage
    writes: Stage
    run: Callable[[Program, Context], PassResult]
    preserves: Preserves = "exactly"


def insert_after(pipeline: Sequence[Pass], name: str, *steps: Pass) -> tuple[Pass, ...]:
    """The pipeline with `steps` behind the pass called `name`. Raises PlanError, with the nearest names, when there is none."""
    names = [step.name for step in pipeline]
    if name not in names:
        raise PlanError(f"the pipeline has no pass {name!r}{nearest(name, names)}")
    place = names.index(name) + 1
    return (*pipeline[:place], *steps, *pipeline[place:])


def run_passes(program: Program, passes: Sequence[Pass], context: Context) -> Program:
    """Run `passes` in order and check what each declares: stage and grammar, whether it changed anything, and, if the plan asks, outputs.

    Raises VerifyError, naming the pass, for one that breaks its word; errors of a pass itself get its name in front.
    """
    numeric = context.plan.check == "numeric"
    start = last = program.run_example() if numeric else None
    before = snapshot(program)
    for number, step in enumerate(passes, 1):
        place = f"in pass '{step.name}' ({number}/{len(passes)})"
        if program.stage is not step.reads:
            raise VerifyError(f"{place}: reads stage {step.reads.name}, but the program is at {program.stage.name}")
        try:
            with stage(f"pass '{step.name}' ({number}/{len(passes)})", context.progress):
                result = step.run(program, context)
        except SparsifyError as error:
            raise type(error)(f"{place}: {error}") from error
        if not isinstance(result, PassResult):
            raise VerifyError(f"{place}: returned {type(result).__name__}, not PassResult(program, changed=…)")
        after = replace(result.program, stage=step.writes)
        try:
            verify(after)
            now = snapshot(after)
            check_changed(before, now, result.changed)
            if numeric and result.changed:
                start, last = check_preserved(start, last, after, weaker(step.preserves, result.preserves))
            if numeric and step.writes is Stage.SELECTED and step.reads is not Stage.SELECTED:
                check_controls(after, context.progress)
        except VerifyError as error:
            raise VerifyError(f"{place}: {error}\n{after.text(fold=False)}") from error
        program, before = after, now
    return program


def weaker(declared: Preserves, found: Preserves | None) -> Preserves:
    return declared if found is None else WEAKEST_LAST[max(map(WEAKEST_LAST.index, (declared, found)))]


def check_preserved(start: object, last: object, program: Program, preserves: Preserves) -> tuple[object, object]:
    """Compare the example's outputs with those at the start (rounding does not add up over passes) and after the last pass (exactly).

    Returns both for the next pass.
    """
    found = program.run_example()
    if preserves == "nothing":
        return found, found
    if preserves == "exactly" and not check_identical(last, found):
        check_outputs(last, found)  # a drift beyond rounding says by how much
        if check_identical(found, program.run_example()):  # and not a model that gives other bits at every run
            raise VerifyError(
                "the outputs differ in rounding from those of before, and the pass preserves them exactly"
            )
    check_outputs(start, found)
    return start, found


# --- what changed --------------------------------------------------------------------------------------------------------

SAID_ELSEWHERE = frozenset({"history", "stage", "graph_module"})
"""Fields of a program that are no change: its log, its stage (declared), and the graph, which is compared by its nodes."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A program as it was: its nodes, its fields (containers copied, tensors by identity), and how often each tensor was written."""

    nodes: tuple[tuple[object, ...], ...]
    fields: dict[str, object]
    writes: dict[str, tuple[int, int]]


def snapshot(program: Program) -> Snapshot:
    nodes = tuple(
        (n.op, n.name, n.target, repr(n.args), repr(n.kwargs), n.meta.get("kernel"), describe(n.meta.get("val")))
        for n in program.graph.nodes
    )
    fields = {name: shallow(value) for name, value in program.facts().items() if name not in SAID_ELSEWHERE}
    tensors = {**dict(program.host.named_parameters()), **dict(program.host.named_buffers()), **program.tensors}
    return Snapshot(nodes, fields, {name: (id(t), version(t)) for name, t in tensors.items()})


def describe(value: object) -> tuple[tuple[int, ...], torch.dtype] | str:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def shallow(value: object) -> object:
    return dict(value) if isinstance(value, dict) else value


def version(tensor: torch.Tensor) -> int:
    """How often the memory was written in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def check_changed(before: Snapshot, after: Snapshot, said: bool) -> None:
    """Raises VerifyError when a pass says that it changed nothing and did, or that it changed something and did not."""
    found = difference(before, after)
    if found and not said:
        raise VerifyError(f"it says that it changed nothing, but {found}")
    if said and not found:
        raise VerifyError("it says that it changed the program, but nodes, tensors and everything else are as before")


def difference(before: Snapshot, after: Snapshot) -> str:
    """The first thing that differs between two programs, in words; empty when they are equal."""
    if before.nodes != after.nodes:
        pairs = zip(before.nodes, after.nodes, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before.nodes), len(after.nodes)))
        name = (after.nodes if place < len(after.nodes) else before.nodes)[place][1]
        return f"the graph differs at node {name}"
    for name, value in before.fields.items():
        if not same(value, after.fields.get(name)):
            return f"{name} differs{where(value, after.fields.get(name))}"
    for name, known in before.writes.items():
        if after.writes.get(name, known) != known:
            return f"{name} was written in place"
    return ""


def where(before: object, after: object) -> str:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return ""
    keys = [
        key for key in {**before, **after} if key not in before or key not in after or not same(before[key], after[key])
    ]
    return f" ({keys[0]})" if keys else ""


def same(a: object, b: object) -> bool:
    """Equal as values; tensors and modules by identity."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, torch.Tensor | torch.nn.Module):
        return False
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)
