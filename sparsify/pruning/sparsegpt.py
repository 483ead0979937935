"""SparseGPT (arXiv 2301.00774): one-shot pruning that lets the survivors of a row make up for what goes.

    X (T, m) ─▶ H = 2/N Σ x xᵀ ─▶ + damping ─▶ U upper, UᵀU = H⁻¹
    for each block of 128 columns:  score w²/U_jj² ─▶ mask ─▶ column by column  err = (w − q)/U_jj,  rest −= err · U_j,k

Exact counts, and only GEMM-shaped work outside of 32 columns: columns are processed in three nested levels (32 columns with
rank-1 updates that stay in cache, 128 columns updated by one small GEMM, all later columns by one large GEMM). Weights are held
transposed, so that a column is contiguous. `U` comes from one Cholesky factorisation of the reversed Hessian and one
triangular inverse by recursive GEMMs (H = R Rᵀ with R upper, U = R⁻¹) instead of three factorisations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.calibration.ranks import sum_over_ranks
from sparsify.errors import SparsifyError
from sparsify.pruning.patterns import (
    NM,
    Block,
    Pattern,
    check_sparsity,
    keep_largest,
    keep_largest_per_row,
    spread_blocks,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

COLUMN_BLOCK = 128
INNER_BLOCK = 32
HESSIAN_BLOCK = 384


class Hessian:
    """Accumulates `H = 2/N Σ x xᵀ` in fp32 over calibration tokens; `N` counts tokens.

    matrix: the running sum `Σ x xᵀ`, `(m, m)` fp32; the sum is symmetric, so of its blocks of HESSIAN_BLOCK rows only the one on the
    diagonal and those right of it are added to. tokens: N.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Float[Tensor, "*t m"]) -> None:
        """Add tokens `x (…, m)`; padding must have been dropped before. Raises SparsifyError for NaN or Inf."""
        x = x.reshape(-1, x.shape[-1]).to(self.matrix)
        if x.shape[0] == 0:
            return
        if not bool(torch.isfinite(x).all()):
            raise SparsifyError("the calibration data gives NaN or Inf at this layer's input")
        for low in range(0, len(self.matrix), HESSIAN_BLOCK):
            self.matrix[low : low + HESSIAN_BLOCK, low:].addmm_(x[:, low : low + HESSIAN_BLOCK].t(), x[:, low:])
        if not bool(torch.isfinite(self.matrix.diagonal()).all()):
            raise SparsifyError(
                f"the calibration data overflows fp32 in this layer's Hessian (inputs up to {float(x.abs().max()):.1e})"
            )
        self.tokens += x.shape[0]

    def over_ranks(self) -> None:
        """Take in what the other ranks have seen of this layer."""
        self.matrix = sum_over_ranks(self.matrix)
        self.tokens = round(float(sum_over_ranks(torch.tensor([float(self.tokens)], dtype=torch.float64))))

    def total(self) -> Float[Tensor, "m m"]:
        """The whole of `Σ x xᵀ`: the accumulator's memory, completed in place."""
        for low in range(HESSIAN_BLOCK, len(self.matrix), HESSIAN_BLOCK):
            self.matrix[low : low + HESSIAN_BLOCK, :low].copy_(self.matrix[:low, low : low + HESSIAN_BLOCK].t())
        return self.matrix

    def value(self) -> Float[Tensor, "m m"]:
        """`H (m, m)`; consumes the accumulator's memory (scaled in place)."""
        scaled = self.total().mul_(2 / max(self.tokens, 1))
        del self.matrix
        return scaled


@dataclass(frozen=True)
class Pruned:
    """What pruning one weight gives.

    weight: `(n, m)` in the dtype of the input, exact zeros where `mask` is False.
    mask: survivors, bool `(n, m)`.
    error: `tr(Δ (H + damping) Δᵀ)` with Δ = W − Ŵ: summed squared error of the layer's output per calibration token, times two.
    """

    weight: Tensor
    mask: Tensor
    error: float


def inverse_factor(
    hessian: Float[Tensor, "m m"], damping: float = 0.01, *, where: str = "layer"
) -> tuple[Float[Tensor, "m m"], Bool[Tensor, " m"]]:
    """`(U, dead)`: `U` upper triangular with `UᵀU = (H + damping · mean(diag H) · I)⁻¹`, and the inputs that never fired.

    hessian: `(m, m)` fp32; overwritten. damping: fraction of the mean of the diagonal.
    A factorisation that fails is retried with ten times the damping, three times; then SparsifyError.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise SparsifyError(f"{where}: the Hessian has NaN or Inf: a calibration batch overflows at this layer's input")
    dead = diagonal == 0
    diagonal[dead] = 1
    mean = float(diagonal.mean())
    added = 0.0
    for attempt in range(4):
        wanted = damping * 10**attempt * mean
        diagonal.add_(wanted - added)
        added = wanted
        # H reversed in both axes = L Lᵀ, so H = R Rᵀ with R = L reversed (upper), H⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹
        lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if int(info) == 0:
            return invert_lower(lower).flip(0, 1), dead
    raise SparsifyError(
        f"{where}: the Hessian stays singular at {damping * 1000:g} times its mean diagonal: raise Prune(damping=…) or "
        "give more calibration tokens"
    )


def invert_lower(lower: Float[Tensor, "m m"], leaf: int = 256) -> Float[Tensor, "m m"]:
    """Inverse of a lower triangular matrix, in place: halves joined by GEMMs (m³/3 multiplications)."""
    size = lower.shape[0]
    if size <= leaf:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
    half = size // 2
    invert_lower(lower[:half, :half], leaf)
    invert_lower(lower[half:, half:], leaf)
    corner = lower[half:, :half]
    corner.copy_(lower[half:, half:].mm(corner).mm(lower[:half, :half]).neg_())
    return lower


def block_columns(pattern: Pattern) -> tuple[int, int]:
    """Columns per outer and per inner block: multiples of the pattern's groups, near 128 and 32."""
    group = pattern.m if isinstance(pattern, NM) else pattern.w if isinstance(pattern, Block) else 1
    inner = max(group, INNER_BLOCK // group * group)
    return max(inner, COLUMN_BLOCK // inner * inner), inner


def block_mask(scores_t: Float[Tensor, "columns n"], zeros: int, pattern: Pattern) -> Bool[Tensor, "columns n"]:
    """Survivors of one block of columns from `scores_t (columns, n)` (transposed); `zeros` counts blocks for Block."""
    if isinstance(pattern, Block):
        columns, rows = scores_t.shape
        summed = scores_t.reshape(columns // pattern.w, pattern.w, rows // pattern.h, pattern.h).sum((1, 3))
        return spread_blocks(keep_largest(summed.t(), zeros), pattern).t()
    return keep_largest(scores_t, zeros)


def sparsegpt_prune(
    weight: Float[Tensor, "n m"],
    hessian: Float[Tensor, "m m"],
    sparsity: float,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    where: str = "layer",
    factor: tuple[Float[Tensor, "m m"], Bool[Tensor, " m"]] | None = None,
) -> Pruned:
    """Prune one weight `(n, m)` given `H (m, m)` of its inputs (overwritten).

    factor: the result of `inverse_factor`, when several weights read the same input; `hessian` is then not looked at.
    Raises PlanError for a bad sparsity or shape and SparsifyError for a hopeless Hessian, both naming `where`.
    """
    check_sparsity(where, sparsity)
    rows, columns = weight.shape
    pattern.check(where, (rows, columns))
    upper, dead = factor if factor is not None else inverse_factor(hessian, damping, where=where)
    outer, inner = block_columns(pattern)
    work = weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # (m, n)
    work[dead] = 0
    survivors = torch.empty(columns, rows, dtype=torch.bool, device=weight.device)
    unit = pattern.h * pattern.w if isinstance(pattern, Block) else 1
    zeros = 0
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, columns, outer):
        stop = min(start + outer, columns)
        diagonal = upper.diagonal()[start:stop]
        block, mask = work[start:stop], survivors[start:stop]
        if not isinstance(pattern, NM):
            wanted = round(sparsity * rows * stop / unit) - zeros
            mask.copy_(block_mask((block / diagonal[:, None]).square_(), wanted, pattern))
            zeros += wanted
        errors = torch.empty_like(block)
        for low in range(start, stop, inner):
            high = min(low + inner, stop)
            prune_columns(
                work[low:high],
                survivors[low:high],
                errors[low - start : high - start],
                upper[low:high, low:high],
                pattern,
            )
            if high < stop:
                work[high:stop].addmm_(upper[low:high, high:stop].t(), errors[low - start : high - start], alpha=-1)
        if stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
        loss += errors.square_().sum(dtype=torch.float64)
    pruned = work.t().to(weight.dtype, memory_format=torch.contiguous_format)
    mask = survivors.t().contiguous()
    return Pruned(pruned.masked_fill_(~mask, 0), mask, float(loss))


def prune_columns(
    work: Float[Tensor, "c n"],
    survivors: Bool[Tensor, "c n"],
    errors: Float[Tensor, "c n"],
    upper: Float[Tensor, "c c"],
    pattern: Pattern,
) -> None:
    """The inner level, in place: `work (c, n)` columns of the weight, `survivors (c, n)` read, for N:M also written.

    errors: `(c, n)`, filled with `(w − q) / U_jj`. upper: `(c, c)`.
    """
    diagonal = upper.diagonal()
    group = pattern.m if isinstance(pattern, NM) else 0
    gone = torch.empty_like(work)  # 1 / U_jj where a weight goes, 0 where it stays: one product gives a column's error
    if not group:
        gone.copy_(~survivors).div_(diagonal[:, None])
    for j in range(len(work)):
        if group and j % group == 0:
            part, pivots = slice(j, j + group), diagonal[j : j + group, None]
            assert isinstance(pattern, NM)
            survivors[part] = keep_largest_per_row((work[part] / pivots).square_().t(), pattern.m - pattern.n).t()
            gone[part].copy_(~survivors[part]).div_(pivots)
        torch.mul(work[j], gone[j], out=errors[j])
        if j + 1 < len(work):
            work[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    work.masked_fill_(~survivors, 0)


def reconstruction_error(
    weight: Float[Tensor, "n m"], pruned: Float[Tensor, "n m"], hessian: Float[Tensor, "m m"]
) -> float:
    """Relative squared error of the layer's output: `tr(Δ H Δᵀ) / tr(W H Wᵀ)`, in fp64."""
    weight, pruned, hessian = weight.double(), pruned.double(), hessian.double()
    delta = weight - pruned
    energy = float((weight @ hessian * weight).sum())
    return float((delta @ hessian * delta).sum()) / energy if energy > 0 else math.nan
