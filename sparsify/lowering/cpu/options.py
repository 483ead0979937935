"""What a user can say about lowering for the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsify.errors import PlanError

DEFAULT_TOKENS = (1, 16, 64, 256)


@dataclass(frozen=True, kw_only=True)
class CpuOptions:
    """Options of `sparsify.compile(model, Plan(…, target="cpu"), cpu=CpuOptions(…))`.

    tokens: numbers of tokens per call (batch × length) that are measured; a layer slower than dense torch at one stays dense.
        None: 1, 16, 64 and 256, and with `example=` those that each layer sees there.
    compare: time the whole lowered model against the dense one on `example=`, or without one on the dummy inputs that it was traced
        with (unless a run takes seconds, or `tokens` says what counts), and give the layers back if dense is faster (those of int8
        with their rounded values); while both are timed, the weights exist packed and dense.
    mode: "fast" keeps that promise; "small" packs every linear that can be packed, for the memory.
    int8_activations: let int8 weights meet int8 activations (dynamic, one scale per token) where that is faster.
    tied: a weight that an embedding shares stays dense ("skip"), or is packed beside the embedding's copy ("copy").
    native: run a decoder whose graph is known as one native call for up to 16 tokens with a cache, as `generate()` makes them. The
        report says why where it is not.
    """

    tokens: tuple[int, ...] | None = None
    compare: bool = True
    mode: Literal["fast", "small"] = "fast"
    int8_activations: bool = True
    tied: Literal["skip", "copy"] = "skip"
    native: bool = True

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(self.tokens))
        if self.tokens is not None and (not self.tokens or any(not isinstance(t, int) or t < 1 for t in self.tokens)):
            raise PlanError(f"CpuOptions(tokens={self.tokens}): expected numbers of tokens, each at least 1")
        if self.mode not in ("fast", "small"):
            raise PlanError(f"CpuOptions(mode={self.mode!r}): expected 'fast' or 'small'")
        if self.tied not in ("skip", "copy"):
            raise PlanError(f"CpuOptions(tied={self.tied!r}): expected 'skip' or 'copy'")
