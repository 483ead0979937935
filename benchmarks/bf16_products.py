"""Packed bf16 against dense bf16 on a CPU with `vdpbf16ps`: single products with many tokens, every kernel that could serve.

    torch       `F.linear` in bf16            onednn      oneDNN's product with a blocked bf16 weight
    dot, pairs, stream                        the generated kernels, the best of their tiles
    floor       dense products of 32 per cycle and core, at the clock that the system reports (it may run faster: below 1 then)

An expanding linear has a GELU behind it, in the kernels' epilogue. Every result is checked once against fp64.

    python benchmarks/bf16_products.py --threads 2 --save
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import begin, interleave, parser, report
from sparsify.kernels.cpu import dispatch
from sparsify.kernels.cpu.formats import pack
from sparsify.lowering.cpu.prepacked_linear import prepack, prepacked_product

SHAPES = ("384x384", "1536x384", "384x1536", "4096x4096")  # MiniLM's; rows x columns
KERNELS = {"dot": (32, 64), "pairs": (64, 512), "stream": (256,)}


def contestants(
    rows: int, cols: int, sparsity: float, tokens: int, seed: int
) -> tuple[dict[str, Callable[[], Any]], list[Any]]:
    """Calls by name, and what they point to."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight = weight.masked_fill_(torch.rand(rows, cols, generator=generator) < sparsity, 0).bfloat16()
    bias, x = torch.randn(rows, generator=generator), torch.randn(tokens, cols, generator=generator).bfloat16()
    half, blocked, packed = bias.bfloat16(), prepack(weight), pack(weight)
    activation = "gelu" if rows > cols else "none"
    layer, kernels = dispatch.layer_struct(packed, None, bias, activation, False), dispatch.kernels_for(packed)

    def finish(y: Tensor) -> Tensor:
        return F.gelu(y) if activation == "gelu" else y

    calls: dict[str, Callable[[], Any]] = {
        "torch": lambda: finish(F.linear(x, weight, half)),
        "onednn": lambda: finish(prepacked_product(x, blocked, half)),
    }
    for kernel, tiles in KERNELS.items():
        for tile in tiles:
            calls[f"{kernel}/{tile}"] = partial(dispatch.run_module, kernels, kernel, layer, x, rows, tile)
    expected = finish(F.linear(x.double(), weight.double(), bias.double()))
    for name, call in calls.items():
        error = float((call().double() - expected).norm() / expected.norm())
        if error > 0.01:
            raise AssertionError(f"{rows}x{cols}, {tokens} tokens, {name}: relative error {error:.2g}")
    return calls, [packed, bias]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    made: argparse.ArgumentParser = parser((__doc__ or "").splitlines()[0])
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="ROWSxCOLS")
    made.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5, 0.75, 0.9])
    made.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 2048])
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--seconds", type=float, default=1.0, help="of timing per row, at most (three rounds at least)")
    arguments = made.parse_args(argv)
    begin(arguments)
    if dispatch.best_isa() != "avx512bf16":
        raise SystemExit(f"bf16_products: this CPU runs {dispatch.best_isa()}, the kernels compared need avx512bf16")
    if arguments.fast:
        arguments.shapes, arguments.sparsity, arguments.tokens, arguments.rounds = ["96x64"], [0.75], [20], 3
    rows = []
    grid = list(itertools.product(arguments.shapes, arguments.sparsity, arguments.tokens))
    for shape, sparsity, tokens in tqdm(grid, desc="bf16_products", unit="row"):
        height, width = map(int, shape.split("x"))
        with torch.inference_mode():
            calls, _kept = contestants(height, width, sparsity, tokens, arguments.seed)
            options = {"rounds": arguments.rounds, "seconds": arguments.seconds, "clock": arguments.clock}
            times = interleave(calls, warmup=1, **options)
        floor = height * width * tokens / 32 / torch.get_num_threads() / (dispatch.calibrate().clock * 1e9)
        row: dict[str, Any] = {"shape": shape, "sparsity": sparsity, "tokens": tokens}
        row["torch / floor"] = times["torch"].median / floor
        row["torch / onednn"] = times["torch"].over(times["onednn"]).median
        for kernel, tiles in KERNELS.items():
            best = min((times[f"{kernel}/{tile}"] for tile in tiles), key=lambda timing: timing.median)
            row[f"torch / {kernel}"] = times["torch"].over(best).median
        rows.append(row)
    return report(
        "bf16_products",
        arguments,
        rows,
        notes=["bf16; ratios of medians of interleaved rounds, above 1: faster than torch"],
    )


if __name__ == "__main__":
    main()
