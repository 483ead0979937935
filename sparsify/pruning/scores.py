"""The pruning methods that only score: magnitude, Wanda (arXiv 2306.11695), random. Survivors keep their values.

magnitude   |w|                     the smallest of the whole layer go
Wanda       |w| · ‖x_j‖₂            compared inside each output row; needs only Σ x² per input
random      a seeded uniform draw   the control that every method must beat
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.calibration.checks import all_finite, column_squares
from sparsify.calibration.ranks import sum_over_ranks
from sparsify.errors import SparsifyError
from sparsify.pruning.patterns import Pattern, mask_from_scores
from sparsify.pruning.sparsegpt import Pruned

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class InputNorms:
    """Accumulates `Σ x²` per input channel, fp64 on the CPU `(m,)`, and the number of tokens."""

    def __init__(self, width: int) -> None:
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def add(self, x: Float[Tensor, "*t m"]) -> None:
        """Add tokens `x (…, m)` without padding. Raises SparsifyError for NaN or Inf."""
        x = x.reshape(-1, x.shape[-1])
        added = column_squares(x)
        if not all_finite(added):
            raise SparsifyError("the calibration data gives NaN or Inf at this layer's input")
        self.squares += added
        self.tokens += x.shape[0]

    def over_ranks(self) -> None:
        """Take in what the other ranks have seen of this layer."""
        total = sum_over_ranks(torch.cat([self.squares, torch.tensor([float(self.tokens)], dtype=torch.float64)]))
        self.squares, self.tokens = total[:-1].clone(), round(float(total[-1]))

    def mean_squares(self) -> Float[Tensor, " m"]:
        """`E[x²]` per input channel, fp32 (fp64 where that is not wide enough)."""
        mean = self.squares / max(self.tokens, 1)
        narrow = mean.float()
        return narrow if all_finite(narrow) else mean


def layer_seed(seed: int, name: str) -> int:
    """A seed per layer that depends on nothing but the run's seed and the layer's name: equal on every rank."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def keep_values(
    weight: Float[Tensor, "n m"], mask: Bool[Tensor, "n m"], mean_squares: Float[Tensor, " m"] | None
) -> Pruned:
    """Apply a mask. The error is `2 Σ_pruned w² E[x_j²]` (the diagonal of the Hessian), or with inputs taken as white."""
    gone = weight.float().masked_fill(mask, 0).square_()
    error = gone.sum(0).mul(1 if mean_squares is None else mean_squares.to(gone.device)).sum().item() * 2
    return Pruned(weight.masked_fill(~mask, 0), mask, error)


def magnitude_prune(weight: Float[Tensor, "n m"], sparsity: float, pattern: Pattern, *, where: str = "layer") -> Pruned:
    """Drop the entries of `weight (n, m)` with the smallest absolute value (blocks: the smallest sum of squares)."""
    return keep_values(weight, mask_from_scores(weight.float().square(), sparsity, pattern, where=where), None)


def wanda_prune(
    weight: Float[Tensor, "n m"],
    mean_squares: Float[Tensor, " m"],
    sparsity: float,
    pattern: Pattern,
    *,
    where: str = "layer",
) -> Pruned:
    """Drop the entries with the smallest `|w| · ‖x_j‖₂`, row by row; `mean_squares (m,)` is `E[x²]` per input."""
    scores = weight.float().square() * mean_squares.to(weight.device)
    return keep_values(weight, mask_from_scores(scores, sparsity, pattern, per_row=True, where=where), mean_squares)


def random_prune(
    weight: Float[Tensor, "n m"], sparsity: float, pattern: Pattern, *, seed: int = 0, where: str = "layer"
) -> Pruned:
    """Drop entries drawn at random, from the seed and the layer's name."""
    generator = torch.Generator().manual_seed(layer_seed(seed, where))
    scores = torch.rand(weight.shape, generator=generator).to(weight.device)
    return keep_values(weight, mask_from_scores(scores, sparsity, pattern, where=where), None)
