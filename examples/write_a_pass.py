"""A guide: a pass of your own, put into the pipeline by argument.

    find-structures → prove-units → prune → select → *budget* → permute-weights → insert → lower

The pass below keeps S2FT within a budget of trained parameters: behind the selection it drops the choices of the first layers until
the rest fits, and says in the report what it dropped and why. A pass is a function from a program to a program and a declaration:

1. It reads one stage and writes one (`Stage.SELECTED` → `Stage.SELECTED`); after it has run, the program is verified against the
   grammar of the stage that it writes.
2. It never edits what it was given: `program.evolve(note, **changes)` makes a new program, and the note stands in its history.
3. It says whether it changed anything (`PassResult(program, changed=…)`). Both answers are checked.
4. It declares what it preserves: the outputs "exactly", but for "rounding", or "nothing" of them. With `Plan(check="numeric")` the
   machine runs the example and compares.
5. What it declines has a reason: `Refusal(where, reason)`, which the report prints.

Run it: `python examples/write_a_pass.py` (or with `--parameters 500`).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, Plan, VerifyError
from sparsify.api import PIPELINE
from sparsify.errors import Refusal
from sparsify.passes.base import Context, Pass, PassResult, insert_after
from sparsify.program import Program, Stage, UnitChoice
from sparsify.program.selection import unit_channels


def parameters_of(program: Program, choice: UnitChoice) -> int:
    """How many parameters train if a choice does: its channels of every consumer (Down, O), whole columns."""
    structure = next(s for s in program.structures if s.name == choice.structure)
    total = 0
    for site in structure.consumers:
        weight = program.tensor(site.param)  # (out, in), or (in, out) for a Conv1D; `site.axis` is the input axis
        per_unit = unit_channels(site, structure).shape[1]
        total += len(choice.consumers) * per_unit * weight.numel() // weight.shape[site.axis]
    return total


def budget(limit: int) -> Pass:
    """A pass that drops choices, first layers first, until at most `limit` parameters train."""

    def run(program: Program, context: Context) -> PassResult:
        sizes = {choice.structure: parameters_of(program, choice) for choice in program.choices}
        kept, dropped = list(program.choices), []
        while len(kept) > 1 and sum(sizes[c.structure] for c in kept) > limit:
            dropped.append(kept.pop(0))
        if not dropped:
            return PassResult(program.evolve("budget: everything fits"), changed=False)
        reason = f"the budget of {limit:,} trained parameters is spent on later layers"
        refusals = [Refusal(choice.structure, reason) for choice in dropped]
        after = program.evolve(
            f"budget: {len(dropped)} of {len(program.choices)} structures dropped",
            choices=tuple(kept),
            refusals=(*program.refusals, *refusals),
        )
        return PassResult(after, changed=True)

    return Pass("budget", Stage.SELECTED, Stage.SELECTED, run, preserves="exactly")


def careless(program: Program, context: Context) -> PassResult:
    """What the machine is there for: this pass rounds a weight, and says that it preserves the outputs exactly."""
    name = program.structures[-1].consumers[0].param
    tensors = {**program.tensors, name: program.tensor(name).detach().bfloat16().float()}
    return PassResult(program.evolve("careless: one weight rounded", tensors=tensors), changed=True)


class Block(nn.Module):
    """A residual feed-forward network."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + self.down(torch.nn.functional.gelu(self.up(x_BD)))


def main() -> None:
    parser = argparse.ArgumentParser(description="A pass of your own in the pipeline")
    parser.add_argument("--parameters", type=int, default=400, help="at most this many train (default 400)")
    limit = parser.parse_args().parameters
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(24, 64) for _ in range(6)), nn.Linear(24, 5))
    example = (torch.randn(3, 24),)
    plan = Plan([S2FT(structure="ffn", units=5)], check="numeric")

    pipeline = insert_after(PIPELINE, "select", budget(limit))
    print("pipeline   " + " → ".join(step.name for step in pipeline))
    host = sparsify.compile(model, plan, example=example, progress=False, pipeline=pipeline)
    print(host.sparsify.report)
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    print(f"{trained} parameters train, the budget is {limit}")
    print(f"the outputs are the model's: {torch.allclose(host(*example), model(*example), atol=1e-6)}")

    wrong = Pass("careless", Stage.SELECTED, Stage.SELECTED, careless, preserves="exactly")
    try:
        sparsify.compile(model, plan, example=example, progress=False, pipeline=insert_after(PIPELINE, "select", wrong))
    except VerifyError as error:
        print(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
