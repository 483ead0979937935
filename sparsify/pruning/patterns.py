"""Sparsity patterns: which entries of a weight may be zero together, and masks from scores.

    Unstructured        any entry                       1 0 0 1 0 1 …
    NM(n, m)            n of every m neighbours stay    [1 0 0 1][0 1 1 0] …      along the input axis, per output row
    Block(h, w)         whole h × w blocks              h output rows × w input columns stay or go together

Weights and scores are in the orientation `(n out, m in)` everywhere in `sparsify.pruning`; a Conv1D is transposed before. A mask
is `True` where an entry *survives*. Sparsity is the fraction of entries that are zero. Counts are exact: a mask at sparsity `s` has
`round(s · n · m)` zeros (rounded to whole blocks), also when scores tie.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from sparsify.console import printable
from sparsify.errors import PlanError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Num


@printable
@dataclass(frozen=True)
class Unstructured:
    """Any entry may go."""

    def __str__(self) -> str:
        return "unstructured"

    def check(self, where: str, shape: tuple[int, int]) -> None:
        """Every shape is fine."""


@printable
@dataclass(frozen=True)
class NM:
    """`n` of every `m` neighbours on the input axis survive, so the sparsity is `1 − n/m` (2:4 → 50 %, 16:64 → 75 %)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise PlanError(f"pattern '{self.n}:{self.m}': N:M keeps N of every M, so 0 < N < M is needed")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check(self, where: str, shape: tuple[int, int]) -> None:
        """Raises PlanError naming the layer when M does not divide its input width."""
        if shape[1] % self.m:
            raise PlanError(
                f"{where}: pattern {self} needs groups of {self.m} inputs, but the layer has {shape[1]} "
                f"({shape[1]} % {self.m} = {shape[1] % self.m}); exclude it, or choose an M that divides {shape[1]}"
            )


@printable
@dataclass(frozen=True)
class Block:
    """Blocks of `h` output rows × `w` input columns survive or go as a whole (4×1, 16×16, 32×32)."""

    h: int
    w: int

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1 or self.h * self.w == 1:
            raise PlanError(f"pattern '{self.h}x{self.w}': a block needs positive sides and more than one entry")

    def __str__(self) -> str:
        return f"{self.h}x{self.w}"

    def check(self, where: str, shape: tuple[int, int]) -> None:
        """Raises PlanError naming the layer when the blocks do not tile it."""
        for side, size, name in ((self.h, shape[0], "outputs"), (self.w, shape[1], "inputs")):
            if size % side:
                raise PlanError(
                    f"{where}: blocks of {self} do not tile a layer with {size} {name} ({size} % {side} = {size % side}); "
                    f"exclude it, or choose a side that divides {size}"
                )


Pattern: TypeAlias = Unstructured | NM | Block


def parse_pattern(text: str | Pattern) -> Pattern:
    """`"unstructured"`, `"2:4"`, `"4x1"` (or `"4×1"`) → the pattern. Raises PlanError for anything else."""
    if isinstance(text, Unstructured | NM | Block):
        return text
    if text == "unstructured":
        return Unstructured()
    if found := re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"([0-9]{1,6})[x×]([0-9]{1,6})", text):
        return Block(int(found[1]), int(found[2]))
    raise PlanError(
        f"unknown sparsity pattern {text!r}: use 'unstructured', 'N:M' such as '2:4', or 'HxW' such as '4x1'"
    )


def check_sparsity(where: str, sparsity: float) -> None:
    """Raises PlanError unless `0 ≤ sparsity < 1`."""
    if not 0 <= sparsity < 1:
        hint = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise PlanError(
            f"{where}: sparsity is the fraction of zeros and must lie in 0 ≤ sparsity < 1, got {sparsity:g}{hint}"
        )


def keep_largest(scores: Float[Tensor, "*shape"], zeros: int) -> Bool[Tensor, "*shape"]:
    """Mask of the shape of `scores` with exactly `zeros` False entries, at the smallest scores (ties: first in order)."""
    flat = scores.reshape(-1)
    if zeros <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if zeros >= flat.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(zeros).values
    gone = flat < threshold
    missing = zeros - int(gone.sum())
    gone[(flat == threshold).nonzero().flatten()[:missing]] = True
    return ~gone.view(scores.shape)


def keep_largest_per_row(scores: Float[Tensor, "rows columns"], zeros: int) -> Bool[Tensor, "rows columns"]:
    """Mask with exactly `zeros` False entries in every row of `scores (rows, columns)`, at the smallest scores."""
    if zeros <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    index = scores.topk(min(zeros, scores.shape[-1]), dim=-1, largest=False, sorted=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, index, False)


def keep_nm(scores: Float[Tensor, "n m"], pattern: NM) -> Bool[Tensor, "n m"]:
    """Mask of N:M form, `scores (n, m)`; per row and group of M the N largest survive."""
    groups = scores.reshape(-1, pattern.m)
    return keep_largest_per_row(groups, pattern.m - pattern.n).view(scores.shape)


def block_scores(scores: Num[Tensor, "n m"], pattern: Block) -> Num[Tensor, "n/h m/w"]:
    """Sum of `scores (n, m)` over each block, `(n / h, m / w)`."""
    rows, columns = scores.shape
    return scores.reshape(rows // pattern.h, pattern.h, columns // pattern.w, pattern.w).sum((1, 3))


def spread_blocks(mask: Bool[Tensor, "n/h m/w"], pattern: Block) -> Bool[Tensor, "n m"]:
    """A mask over blocks `(n / h, m / w)` → over entries `(n, m)`."""
    return mask.repeat_interleave(pattern.h, 0).repeat_interleave(pattern.w, 1)


def mask_from_scores(
    scores: Float[Tensor, "n m"], sparsity: float, pattern: Pattern, *, per_row: bool = False, where: str = "layer"
) -> Bool[Tensor, "n m"]:
    """Survivor mask `(n, m)` of a pattern: the smallest `scores (n, m)` go.

    sparsity: fraction of zeros; for N:M it must equal `1 − N/M`.
    per_row: unstructured only: the same number of zeros in every output row (Wanda's comparison group).
    Raises PlanError naming `where` for a sparsity out of range and a shape that the pattern does not fit.
    """
    check_sparsity(where, sparsity)
    pattern.check(where, (scores.shape[0], scores.shape[1]))
    if isinstance(pattern, NM):
        if abs(sparsity - pattern.sparsity) > 1e-6:
            raise PlanError(f"{where}: pattern {pattern} has sparsity {pattern.sparsity:g}, not {sparsity:g}")
        return keep_nm(scores, pattern)
    if isinstance(pattern, Block):
        blocks = block_scores(scores, pattern)
        return spread_blocks(keep_largest(blocks, round(sparsity * blocks.numel())), pattern)
    if per_row:
        return keep_largest_per_row(scores, round(sparsity * scores.shape[1]))
    return keep_largest(scores, round(sparsity * scores.numel()))


def fits_pattern(mask: Bool[Tensor, "n m"], pattern: Pattern) -> bool:
    """Whether a survivor mask `(n, m)` has the pattern's form."""
    if isinstance(pattern, NM):
        return bool((mask.reshape(-1, pattern.m).sum(1) == pattern.n).all())
    if isinstance(pattern, Block):
        kept = block_scores(mask.to(torch.int64), pattern)
        return bool(((kept == 0) | (kept == pattern.h * pattern.w)).all())
    return True
