"""RoSA's sparse weight gradient `(gᵀ x)[support]`: a dense tile and a gather, a dot product per entry, or an SDDMM kernel?

    tile     `sampled_by_tile`: dense products a block of rows at a time, each gathered at once
    entry    `sampled_per_entry`: gather both columns of every entry, one dot product over the tokens each
    kernel   `sampled_by_kernel`: generated C++ (CPU, where there is a compiler)
    csr      `sampled_csr`: `torch.sparse.sampled_addmm`, the support's CSR tensor built from the flat index in every call;
             16-bit inputs go through fp32
    csr0     the same, fp32 only, with the CSR tensor kept from call to call (what caching the structure could gain at most)

All compute the same numbers (checked on the first call). The last lines give, per token count, the density below which
each of the others beats the dense tile; `KERNEL_DENSITY`, `CSR_DENSITY` and `PER_ENTRY_DENSITY` in `sparsify/ops/dispatch.py` are set from that, and
`sparsify/kernels/README.md` holds what was measured.

    python benchmarks/sampled_product.py --threads 1 --clock cpu --save
    python benchmarks/sampled_product.py --device cuda --dtype bf16 --save
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Timing, begin, interleave, parser, report
from sparsify.kernels.cpu.dispatch import best_isa
from sparsify.kernels.cpu.sampled import VALUES, load_sampled, sampled_by_kernel
from sparsify.ops.sampled_product import csr_support, sampled_by_tile, sampled_csr, sampled_per_entry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((1024, 1024), (4096, 1024))
DENSITIES = (0.001, 0.002, 0.003, 0.006, 0.01, 0.018, 0.03, 0.06)
TOKENS = (64, 256, 1024, 2048)


@dataclass(frozen=True)
class Case:
    """A weight `(n, m)` with `density · n · m` trained entries, and `tokens` tokens."""

    n: int
    m: int
    tokens: int
    density: float
    dtype: torch.dtype
    device: str

    @property
    def count(self) -> int:
        return max(1, round(self.density * self.n * self.m))


def variants(case: Case, seed: int = 0) -> dict[str, Callable[[], Tensor]]:
    """The ways that this machine has, over the same data."""
    generator = torch.Generator().manual_seed(seed)
    g, x = (torch.randn(case.tokens, w, generator=generator).to(case.device, case.dtype) for w in (case.n, case.m))
    places = torch.randperm(case.n * case.m, generator=generator)[: case.count].sort().values
    index = places.int().to(case.device)
    found: dict[str, Callable[[], Tensor]] = {
        "tile": lambda: sampled_by_tile(g, x, index),
        "entry": lambda: sampled_per_entry(g, x, index),
    }
    if case.device == "cpu" and load_sampled(best_isa(), VALUES[case.dtype]) is not None:
        found["kernel"] = lambda: sampled_by_kernel(g, x, index)
    found["csr"] = lambda: sampled_csr(g, x, index)
    if case.dtype is torch.float32:
        ready = csr_support(index, case.n, case.m, case.dtype)
        found["csr0"] = lambda: torch.sparse.sampled_addmm(ready, g.t(), x, beta=0.0).values()
    return found


def check(calls: dict[str, Callable[[], Tensor]], case: Case) -> None:
    """Every way gives the tile's numbers."""
    expected = calls["tile"]().float()
    bound = 1e-3 if case.dtype is torch.float32 else 0.25
    for name, call in calls.items():
        error = float((call().float() - expected).abs().max())
        if not error <= bound * case.tokens**0.5:
            raise AssertionError(f"{name} differs from the dense tile by {error:.1e}: {case}")


def crossover(rows: list[dict[str, Any]], name: str, tokens: int, shape: str) -> float:
    """The largest measured density up to which `name` never takes longer than the tile; 0 when it never wins."""
    best = 0.0
    for row in sorted((r for r in rows if r["tokens"] == tokens and r["shape"] == shape), key=lambda r: r["density"]):
        if row.get(f"{name} / tile") is None or row[f"{name} / tile"] >= 1:
            break
        best = row["density"]
    return best


def options() -> argparse.ArgumentParser:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--seconds", type=float, default=1.5, help="of timing per row, at most (three rounds at least)")
    return made


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = options().parse_args(argv)
    begin(arguments)
    warnings.filterwarnings("ignore", message="Sparse CSR")
    dtype = DTYPES[arguments.dtype]
    grid = [(n, m, t, d) for n, m in SHAPES for t in TOKENS for d in DENSITIES]
    if arguments.fast:
        grid = [(128, 96, 16, 0.01), (128, 96, 16, 0.03)]
    rows = []
    for n, m, tokens, density in tqdm(grid, desc="sampled_product", unit="row"):
        case = Case(n, m, tokens, density, dtype, arguments.device)
        calls = variants(case, arguments.seed)
        check(calls, case)
        times: dict[str, Timing] = interleave(
            calls, rounds=arguments.rounds, warmup=1, seconds=arguments.seconds, clock=arguments.clock
        )
        row: dict[str, Any] = {"shape": f"{n}×{m}", "tokens": tokens, "density": density}
        row |= {f"{name} ms": t.median * 1e3 for name, t in times.items()}
        row |= {f"{name} / tile": t.over(times["tile"]).median for name, t in times.items() if name != "tile"}
        rows.append(row)
    others = [name.removesuffix(" / tile") for name in rows[0] if name.endswith(" / tile")]
    notes = [f"{arguments.device}, {arguments.dtype}; ratios of medians of interleaved rounds"]
    for shape in dict.fromkeys(r["shape"] for r in rows):
        for tokens in dict.fromkeys(r["tokens"] for r in rows):
            wins = ", ".join(f"{name} up to {100 * crossover(rows, name, tokens, shape):g} %" for name in others)
            notes.append(f"{shape}, {tokens} tokens: faster than the dense tile: {wins}")
    return report("sampled_product", arguments, rows, notes=notes)


if __name__ == "__main__":
    main()
