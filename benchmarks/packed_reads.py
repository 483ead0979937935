"""Reading packed weights with one token on a CPU: huge pages, and expands that do not wait for each other.

    small       weights in pages of 4 KiB
    chained     the same, and the kernel's expands and compresses in their zeroing form, as compilers write them
    huge        weights in huge pages, as `sparsify` packs them

`cold`: the product over so many different weights, one after the other, that no cache holds them. `warm`: one weight again and again.
Where the system gives no huge pages, `huge` and `small` are the same. Needs AVX-512 with VBMI2.

    python benchmarks/packed_reads.py --threads 2 --save
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import begin, interleave, parser, report
from sparsify.kernels.cpu import build, dispatch, huge_pages
from sparsify.kernels.cpu.build import Kernels, load_kernels
from sparsify.kernels.cpu.codegen import Variant, generate
from sparsify.kernels.cpu.formats import Bitmask, pack, pack_int8, quantize_int8

CASES = (
    ("f32", "gemv", 0.5),
    ("f32", "gemv", 0.75),
    ("f32", "lookup", 0.9),
    ("s8", "lookup", 0.9),
    ("s8", "vnni", 0.75),
)
NO_HUGE_PAGES = 15  # MADV_NOHUGEPAGE


@dataclass(eq=False)
class Weight:
    packed: Bitmask
    row_sums: Tensor | None
    layer: Any

    @classmethod
    def of(cls, packed: Bitmask) -> Weight:
        row_sums = packed.row_sums() if packed.value == "s8" else None
        return cls(packed, row_sums, dispatch.layer_struct(packed, row_sums, None, "none", False))


def in_small_pages(tensor: Tensor) -> Tensor:
    """A copy whose memory is kept out of huge pages."""
    copied = torch.empty_like(tensor)
    first = copied.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = copied.data_ptr() + copied.numel() * copied.element_size()
    huge_pages.libc().madvise(ctypes.c_void_p(first), end - first, NO_HUGE_PAGES)
    return copied.copy_(tensor)


def chained(variant: Variant) -> Kernels:
    """The kernels with the intrinsics that zero, whose destination register the compiler picks."""
    source = generate(variant)
    for kind in ("expand", "compress"):
        source = source.replace(f"_mm512_mask_{kind}_epi8(fresh_zero(), ", f"_mm512_maskz_{kind}_epi8(")
        source = source.replace(f"_mm512_mask_{kind}_epi32(fresh_zero(), ", f"_mm512_maskz_{kind}_epi32(")
        source = source.replace(
            f"_mm512_mask_{kind}_ps(_mm512_castsi512_ps(fresh_zero()), ", f"_mm512_maskz_{kind}_ps("
        )
    with mock.patch.object(build, "generate", return_value=source):
        return Kernels(variant)


def contestants(
    value: str, kernel: str, sparsity: float, size: int, count: int, seed: int
) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(seed)

    def weight() -> Bitmask:
        dense = torch.randn(size, size, generator=generator)
        dense[torch.rand(size, size, generator=generator) < sparsity] = 0
        return pack_int8(*quantize_int8(dense)) if value == "s8" else pack(dense)

    huge = [Weight.of(weight()) for _ in range(count)]
    small = [
        Weight.of(replace(w.packed, masks=in_small_pages(w.packed.masks), values=in_small_pages(w.packed.values)))
        for w in huge
    ]
    variant = Variant(isa=dispatch.best_isa(), value=value)
    present, before = load_kernels(variant), chained(variant)
    x = torch.randn(1, size, generator=generator)
    expected = x.double() @ huge[0].packed.unpack().double().t()
    calls: dict[str, Callable[[], Any]] = {}
    for name, weights, kernels in (("small", small, present), ("chained", small, before), ("huge", huge, present)):

        def product(w: Weight, kernels: Kernels = kernels) -> Tensor:
            return dispatch.run_kernel(kernels, kernel, w.layer, x, size, None, 64)

        error = float((product(weights[0]) - expected).norm() / expected.norm())
        if error > (0.02 if kernel == "vnni" else 1e-5):
            raise AssertionError(f"{name}, {value} {kernel}: relative error {error:.2g}")
        calls[f"{name} cold"] = lambda weights=weights, product=product: [product(w) for w in weights]
        calls[f"{name} warm"] = lambda weights=weights, product=product: [product(weights[0]) for _ in weights]
    return calls


def main(argv: list[str] | None = None) -> dict[str, Any]:
    made: argparse.ArgumentParser = parser((__doc__ or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--size", type=int, default=4096, help="rows and columns of a weight")
    made.add_argument("--weights", type=int, default=24, help="different ones")
    arguments = made.parse_args(argv)
    begin(arguments)
    if dispatch.best_isa() not in ("avx512bf16", "avx512vbmi2"):
        raise SystemExit(
            f"packed_reads: this CPU runs {dispatch.best_isa()}, the kernels compared need AVX-512 with VBMI2"
        )
    if arguments.fast:
        arguments.size, arguments.weights, arguments.rounds = 256, 2, 3
    rows = []
    for case in tqdm(CASES[-2:] if arguments.fast else CASES, desc="packed_reads", unit="case"):
        value, kernel, sparsity = case
        calls = contestants(*case, arguments.size, arguments.weights, arguments.seed)
        times = interleave(calls, rounds=arguments.rounds, warmup=1, clock=arguments.clock)
        row: dict[str, Any] = {"values": value, "kernel": kernel, "sparsity": sparsity}
        for where, name in itertools.product(("cold", "warm"), ("chained", "small", "huge")):
            row[f"{name} {where} ms"] = times[f"{name} {where}"].median / arguments.weights * 1e3
        for where in ("cold", "warm"):
            row[f"unchained / chained {where}"] = times[f"small {where}"].over(times[f"chained {where}"]).median
            row[f"huge / small {where}"] = times[f"huge {where}"].over(times[f"small {where}"]).median
        rows.append(row)
    return report(
        "packed_reads", arguments, rows, notes=["one token; per product; ratios of medians of interleaved rounds"]
    )


if __name__ == "__main__":
    main()
