"""The products of a low-rank part on CPU: PyTorch's GEMM against the generated kernel of `sparsify/kernels/cpu/skinny.py`.

    low       `x rowsᵀ` (T, r): `x Aᵀ`, `g B`
    product   `factorᵀ x` (r, m): dA, dB
    both      the two of one x: two GEMMs against one pass
    update    `y += low rows` in place
    read      `x.sum()`: what reading x once takes, the floor of the first three

x changes from call to call among so many that no cache holds them. All numbers are checked once against fp64.

    python benchmarks/skinny_products.py --threads 2 --save
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Timing, begin, interleave, parser, report
from sparsify.kernels.cpu.skinny import skinny_by_kernel, update_by_kernel

COLD = 96 << 20  # bytes of different x
TOKENS = (128, 512, 2048)
WIDTHS = (1024, 2816)
RANKS = (4, 8, 16, 32, 64)


def contestants(tokens: int, width: int, rank: int, seed: int) -> dict[str, Callable[[], Any]]:
    """Both ways of every product, over the same data."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = [random(tokens, width) for _ in range(max(2, COLD // (tokens * width * 4)))]
    rows, factor = random(rank, width), random(tokens, rank)
    small = factor * 1e-6  # updates are repeated on the same y
    check(inputs[0], rows, factor)
    turn = itertools.cycle(inputs).__next__

    def two_gemms() -> tuple[Tensor, Tensor]:
        x = turn()
        return x @ rows.t(), factor.t() @ x

    return {
        "read": lambda: turn().sum(),
        "low gemm": lambda: turn() @ rows.t(),
        "low": lambda: skinny_by_kernel(turn(), rows, None),
        "product gemm": lambda: factor.t() @ turn(),
        "product": lambda: skinny_by_kernel(turn(), None, factor),
        "both gemm": two_gemms,
        "both": lambda: skinny_by_kernel(turn(), rows, factor),
        "update gemm": lambda: turn().addmm_(small, rows),
        "update": lambda: update_by_kernel(turn(), small, rows),
    }


def check(x: Tensor, rows: Tensor, factor: Tensor) -> None:
    """The kernel's numbers are right."""
    low, product = skinny_by_kernel(x, rows, factor)
    y = x.clone()
    update_by_kernel(y, factor, rows)
    wide = x.double(), rows.double(), factor.double()
    expected = (wide[0] @ wide[1].t(), wide[2].t() @ wide[0], wide[0] + wide[2] @ wide[1])
    for found, right in zip((low, product, y), expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-3)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    made: argparse.ArgumentParser = parser(__doc__.splitlines()[0])
    made.add_argument("--rounds", type=int, default=25)
    made.add_argument("--seconds", type=float, default=1.5, help="of timing per row, at most (three rounds at least)")
    arguments = made.parse_args(argv)
    begin(arguments)
    grid = list(itertools.product(TOKENS, WIDTHS, RANKS))
    if arguments.fast:
        grid = [(16, 48, 3)]
    rows = []
    for tokens, width, rank in tqdm(grid, desc="skinny_products", unit="row"):
        calls = contestants(tokens, width, rank, arguments.seed)
        times: dict[str, Timing] = interleave(
            calls, rounds=arguments.rounds, warmup=1, seconds=arguments.seconds, clock=arguments.clock
        )
        row: dict[str, Any] = {"tokens": tokens, "width": width, "rank": rank, "read us": times["read"].median * 1e6}
        for name in ("low", "product", "both", "update"):
            row[f"{name} / gemm"] = times[name].over(times[f"{name} gemm"]).median
            row[f"{name} / read"] = times[name].over(times["read"]).median
        rows.append(row)
    return report("skinny_products", arguments, rows, notes=["cpu, fp32; ratios of medians of interleaved rounds"])


if __name__ == "__main__":
    main()
