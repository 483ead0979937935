"""The lowered model as a whole, on the example: what the times of single layers cannot show.

    lowered host (packed, fused, blocked)  ─┐
    the same with plain dense linears      ─┴─ run the example in turn ──▶ the slower of the two is given up

The lowered one is a copy that shares every tensor that lowering left alone; both live while they are timed. Without an example of the
user's it is the dummy one that the model was traced with, and a model that takes `PATIENCE` seconds for it is not timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from sparsify.console import printable
from sparsify.kernels.cpu.tune import seconds_of, time_in_turn
from sparsify.program import Program

SLACK = 1.03  # smallest times of equally fast models differ by this much from run to run
BUDGET = 1.0  # seconds to time both models for; each runs five times at least
PATIENCE = 2.0  # seconds of a run of the dense model from which on a dummy example is not waited for


@printable
@dataclass(frozen=True)
class WholeModel:
    """What was measured on the example. tokens: numbers of tokens that its linears saw.

    seconds: of the "lowered" and the "dense" model; empty when they were not compared, and `why` says the reason.
    dummy: the example is the one that the model was traced with, for want of one of the user's.
    """

    tokens: tuple[int, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    steady: bool = True
    why: str = ""
    dummy: bool = False

    @property
    def example(self) -> str:
        return f"{'a dummy' if self.dummy else 'the'} example"

    @property
    def slower(self) -> bool:
        """Whether the lowered model takes longer than the dense one, by more than smallest times differ."""
        return bool(self.seconds) and self.seconds["lowered"] > SLACK * self.seconds["dense"]

    @property
    def reason(self) -> str:
        """Why the layers became dense again."""
        ratio = self.seconds["lowered"] / self.seconds["dense"]
        return (
            f"faster alone, but on {self.example} ({self.sizes}) the whole dense model is {ratio:.2f} × as fast "
            "(CpuOptions: mode='small' keeps it packed all the same)"
        )

    @property
    def sizes(self) -> str:
        """The numbers of tokens in words."""
        return ", ".join(map(str, self.tokens)) + " tokens"

    def __str__(self) -> str:
        if not self.seconds:
            return f"not timed on {self.example}: {self.why}"
        lowered, dense = self.seconds["lowered"], self.seconds["dense"]
        noise = "" if self.steady else " (unsteady: measured on a busy machine)"
        outcome = "; its layers became dense again" if self.slower else ""
        times = f"lowered {lowered * 1e3:.2f} ms, dense {dense * 1e3:.2f} ms ({dense / lowered:.2f} ×)"
        return f"on {self.example} ({self.sizes}): {times}{noise}{outcome}"


def example_tokens(program: Program) -> dict[str, tuple[int, ...]]:
    """Qualified module name → numbers of tokens that its linear sees when the example runs."""
    found: dict[str, set[int]] = {}
    for linear in program.linears():
        value = linear.x.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[-1]:
            count = value.numel() // value.shape[-1]
            if isinstance(count, int) and count:
                found.setdefault(linear.weight.rpartition(".")[0], set()).add(count)
    return {name: tuple(sorted(counts)) for name, counts in found.items()}


def time_whole_model(
    lowered: Callable[[], nn.Module], dense: nn.Module, program: Program, dummy: bool = False
) -> WholeModel:
    """Run the captured example through the host that `lowered` makes, and through the dense one. dummy: it is not the user's."""
    counts = tuple(sorted(set(itertools.chain(*example_tokens(program).values()))))
    args, kwargs = program.example
    try:
        with torch.inference_mode():
            once = seconds_of(lambda: dense(*args, **kwargs)) if dummy else 0.0
            if once > PATIENCE:
                return WholeModel(counts, why=f"the dense model takes {once:.0f} s for it; give example=", dummy=dummy)
            host = lowered()
            calls = {"lowered": lambda: host(*args, **kwargs), "dense": lambda: dense(*args, **kwargs)}
            timing = time_in_turn(calls, BUDGET)
    except Exception as error:  # the user's own model may refuse copies, or to run apart from its trace
        return WholeModel(counts, why=f"{type(error).__name__}: {error}", dummy=dummy)
    return WholeModel(counts, timing.seconds, timing.steady, dummy=dummy)
