"""What the lowering driver asks of a target: to try one linear, to join linears that the graph shows to belong together, to time the whole.

    Layer ──try_layer──▶ Outcome (a module, what was found out, why not)
    packed gate, up ──join──▶ Joined, or why they stay apart
    packed linear, activation ──absorb──▶ Joined, or why

A target writes to no host and to no program: it makes modules. What stands where is the driver's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import nn

from sparsify.console import printable
from sparsify.errors import Refusal
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct, Join
from sparsify.model.linears import is_conv1d
from sparsify.modules.kernel_module import KernelModule
from sparsify.program import Program
from sparsify.program.repeats import Line, fold_lines


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear of the host, under the first of its names. quantize: what its plan stores it in."""

    name: str
    module: nn.Module
    quantize: Literal["int8"] | None = None

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return is_conv1d(self.module)

    @cached_property
    def weight(self) -> torch.Tensor:
        """(out, in), a view of what is stored."""
        stored = self.module.weight
        assert isinstance(stored, torch.Tensor)
        return stored.detach().t() if self.transposed else stored.detach()

    @cached_property
    def sparsity(self) -> float:
        return 1.0 - int(torch.count_nonzero(self.weight)) / max(1, self.weight.numel())

    @property
    def bias(self) -> torch.Tensor | None:
        return self.module.bias if isinstance(self.module.bias, torch.Tensor) else None


@dataclass(frozen=True)
class Outcome:
    """What to put in a layer's place (None: nothing), its row in the report, and why it is not packed (None: it is)."""

    module: nn.Module | None
    entry: object = None
    refusal: Refusal | None = None

    @property
    def packed(self) -> bool:
        return self.module is not None and self.refusal is None


Seconds = Mapping[int, tuple[str, float, float, float]]
"""Tokens → (kernel, predicted, measured, the alternative), in seconds."""


@dataclass(frozen=True, eq=False)
class Joined:
    """One module that computes what several did. seconds: what was measured, against the parts."""

    module: KernelModule
    seconds: Seconds = field(default_factory=dict)


@printable
@dataclass(frozen=True, eq=False)
class Fusion:
    """What became one kernel. module: name of the linear that now does all of it."""

    found: Join
    module: str
    seconds: Seconds = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.line())

    def line(self) -> Line:
        """What `str` says, with its timings as the layer's own."""
        where = "in one kernel" if isinstance(self.found, GatedProduct) else "in its kernel"
        timings = ", ".join(
            f"{tokens} tok {kernel} {spent * 1e6:.0f} us (predicted {predicted * 1e6:.0f}, apart {apart * 1e6:.0f})"
            for tokens, (kernel, predicted, spent, apart) in self.seconds.items()
        )
        return Line.about(self.module, f"{self.found} {where}" + (": " if timings else ""), timings)


def rows(label: str, lines: Sequence[str], fold: bool) -> list[str]:
    """Lines of a lowering report under a label; fold: those of equal layers as one, with what differs listed below."""
    return [f"{label:<10} {line}" for line in (fold_lines(lines) if fold else lines)]


def reasons(refusals: Sequence[Refusal]) -> list[Line]:
    """Refusals as lines that fold."""
    return [Line.about(refusal.where, str(refusal)) for refusal in refusals]


class Comparison(Protocol):
    """How a whole lowered model did against the dense one. slower: and so it is not worth it; reason: that, in words."""

    @property
    def slower(self) -> bool: ...

    @property
    def reason(self) -> str: ...


class Target(Protocol):
    """A machine that linears are lowered for. name: as in `Plan(target=…)`."""

    @property
    def name(self) -> str: ...

    @property
    def copies_tied(self) -> bool:
        """Whether a weight that other modules share is lowered beside their copy."""
        ...

    def try_layer(self, layer: Layer) -> Outcome:
        """A packed module for one layer where that pays; otherwise why not."""
        ...

    def packs(self, module: nn.Module) -> bool:
        """Whether this is a packed linear that nothing has been joined to."""
        ...

    def join(self, found: GatedProduct, linears: Sequence[Any]) -> Joined | str:
        """gate and up, or the one linear that is both, as one `Gated` linear; or why they stay apart."""
        ...

    def absorb(self, found: FusedActivation, linear: Any) -> Joined | str:
        """The linear with an activation in its kernel; or why it stays outside."""
        ...

    def compare(self, lowered: Callable[[], nn.Module], dense: nn.Module, program: Program) -> Comparison | None:
        """The whole lowered model against the dense one, None where nothing is to be compared. lowered: makes the lowered host."""
        ...

    def leave(self, layer: Layer, outcome: Outcome, reason: str) -> Outcome:
        """What stands in a layer's place when the whole is not worth it."""
        ...

    def describe(self, entry: Any) -> str:
        """What the program says beside the node of a lowered layer."""
        ...


__all__ = ["Comparison", "Fusion", "Joined", "Layer", "Outcome", "Seconds", "Target"]
