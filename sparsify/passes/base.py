"""Passes and the machine that runs them: every pass declares the stage it reads and writes, and is verified after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import SparsifyError, VerifyError
from sparsify.passes.check_controls import check_controls
from sparsify.plan import Plan
from sparsify.program import Program, Stage
from sparsify.verify import check_outputs, verify


@dataclass(frozen=True)
class Context:
    """What passes may look at besides the program.

    calibration: batches (mappings, tuples or tensors) for data-driven selections.
    loss: `loss(outputs, batch)` for gradient scores; None takes `outputs.loss`.
    resume_dir: folder in which interrupted pruning is kept and continued.
    donate: tensors of the user's model may be freed as they are replaced.
    """

    plan: Plan
    calibration: Iterable[Any] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    donate: bool = False
    progress: bool = True
    resume_dir: str | Path | None = None


@dataclass(frozen=True)
class Pass:
    """One transformation: `run(program, context)` takes a program at stage `reads` and returns one at stage `writes`."""

    name: str
    reads: Stage
    writes: Stage
    run: Callable[[Program, Context], Program]


def run_passes(program: Program, passes: Sequence[Pass], context: Context) -> Program:
    """Run `passes` in order; verify each result against its stage's grammar and, if the plan asks, numerically."""
    numeric = context.plan.check == "numeric"
    expected = program.run_example() if numeric else None
    for number, step in enumerate(passes, 1):
        place = f"in pass '{step.name}' ({number}/{len(passes)})"
        if program.stage is not step.reads:
            raise VerifyError(f"{place}: reads stage {step.reads.name}, but the program is at {program.stage.name}")
        try:
            after = step.run(program, context)
        except SparsifyError as error:
            raise type(error)(f"{place}: {error}") from error
        after.stage = step.writes
        try:
            verify(after)
            if numeric and step.name == "prune":
                expected = after.run_example()  # pruning is meant to change the outputs
            elif numeric and step.writes is Stage.SELECTED:
                check_controls(after, context.progress)
            elif numeric and after.quantize.keys() <= after.bases.keys():
                # quantising changes them too, and the report says by how much
                check_outputs(expected, after.run_example())
        except VerifyError as error:
            raise VerifyError(f"{place}: {error}\n{after.text(fold=False)}") from error
        program = after
    return program
