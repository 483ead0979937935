"""How much each layer loses: uniform, or moved between layers to where it costs least.

Sensitivity: the cost of a layer at sparsity `s` is the share of its output energy that goes, with inputs taken as uncorrelated:
`err_l(s) = Σ_gone w² E[x²] / Σ w² E[x²]`. Minimising `Σ_l err_l(s_l)` at a fixed total count has one solution: a common threshold on
`w² E[x²] / Σ w² E[x²]`; it is found by bisection on sorted samples, with every layer held within `max_shift` of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import PlanError

if TYPE_CHECKING:
    from jaxtyping import Float

SAMPLES = 1 << 16


@dataclass(frozen=True)
class SaliencyCurve:
    """One layer: `numel` weights, and a sorted sample of their normalised saliencies, fp64 ascending."""

    numel: int
    sample: Tensor


def saliency_curve(
    weight: Float[Tensor, "n m"], mean_squares: Float[Tensor, " m"] | None, seed: int = 0
) -> SaliencyCurve:
    """The curve of `weight (n, m)` with `E[x²] (m,)` per input (None: ones)."""
    saliency = weight.detach().float().square()
    if mean_squares is not None:
        saliency = saliency * mean_squares.to(saliency.device)
    total = saliency.sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    flat = saliency.reshape(-1)
    if flat.numel() > SAMPLES:
        generator = torch.Generator().manual_seed(seed)
        flat = flat[torch.randint(flat.numel(), (SAMPLES,), generator=generator).to(flat.device)]
    return SaliencyCurve(weight.numel(), (flat.double() / total).sort().values.cpu())


def uniform(sparsities: Mapping[str, float]) -> dict[str, float]:
    """Every layer its own target."""
    return dict(sparsities)


def by_sensitivity(curves: Mapping[str, SaliencyCurve], sparsity: float, max_shift: float) -> dict[str, float]:
    """Sparsity per layer with the total of `sparsity` everywhere, each within `max_shift` of it and in [0, 0.99]."""
    if not curves:
        return {}
    low, high = max(0.0, sparsity - max_shift), min(0.99, sparsity + max_shift)
    if not low <= sparsity <= high:
        raise PlanError(f"sparsity {sparsity:g} cannot be allocated within [{low:g}, {high:g}]")
    total = sum(curve.numel for curve in curves.values())

    def at(threshold: float) -> dict[str, float]:
        below = {n: float(torch.searchsorted(c.sample, threshold)) / c.sample.numel() for n, c in curves.items()}
        return {name: min(max(share, low), high) for name, share in below.items()}

    def mean(shares: Mapping[str, float]) -> float:
        return sum(curves[name].numel * share for name, share in shares.items()) / total

    smallest, largest = 0.0, max(float(curve.sample[-1]) for curve in curves.values()) * 2 + 1e-300
    for _ in range(200):
        middle = (smallest + largest) / 2
        if mean(at(middle)) < sparsity:
            smallest = middle
        else:
            largest = middle
    shares = at(largest)
    return spread_remainder(shares, {name: c.numel for name, c in curves.items()}, sparsity, low, high)


def spread_remainder(
    shares: dict[str, float], sizes: Mapping[str, int], sparsity: float, low: float, high: float
) -> dict[str, float]:
    """Ties leave the total a little off: move every layer that has room by the same amount."""
    for _ in range(50):
        total = sum(sizes.values())
        gap = sparsity - sum(sizes[n] * s for n, s in shares.items()) / total
        free = [n for n, s in shares.items() if (s < high - 1e-12 if gap > 0 else s > low + 1e-12)]
        if abs(gap) < 1e-12 or not free:
            break
        step = gap * total / sum(sizes[n] for n in free)
        shares |= {n: min(max(shares[n] + step, low), high) for n in free}
    return shares
