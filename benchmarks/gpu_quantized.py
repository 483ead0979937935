"""How fast is one linear over an NF4, int8 or int4 base with a sparse and a low-rank part, in one launch, on this GPU?

    python benchmarks/gpu_quantized.py --shapes 4096x4096 14336x4096 --batch 1 4 16 64

    one pass          the generated kernel over the packed weight, entries replaced at the support, low-rank part added
    base only         the same kernel without the parts: what they cost
    unpack            the weight unpacked by torch, its support written, one GEMM, the low-rank part added
    unpack (library)  the same with the library's unpacking (bitsandbytes, torchao), if it is installed
    dense             cuBLAS over a 16-bit weight without parts

Timed as in gpu_linear.py: more than 150 MB of weights in turn, CUDA graphs, medians over rounds. `roof` is the time that the bytes
of the packed weight take at the speed of a large copy, over the time of the product. The packed weights are drawn at random:
no library is needed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_linear import Contest, copy_speed, dense_calls, turns
from benchmarks.harness import Bar, begin, keep, parser, report
from sparsify.formats import FORMATS, packed_bytes, unpack
from sparsify.formats.nf4 import BLOCK, NESTED_BLOCK
from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.build import can_launch

#: the sixteen values of NF4 (arXiv 2305.14314, appendix E)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def random_base(format: str, rows: int, cols: int, device: str) -> list[Tensor]:
    """A packed weight as `sparsify.formats.pack` lays it out, with random contents; `cols` in whole blocks of 64."""
    blocks = rows * cols // BLOCK
    if format == "int8":
        data = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, device=device)
        return [data, torch.rand(rows, device=device) + 0.5]
    data = torch.randint(0, 256, (rows * cols // 2,), dtype=torch.uint8, device=device)
    if format == "int4":
        return [data.view(rows, cols // 2), torch.rand(rows, cols // BLOCK, device=device) + 0.1]
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    nested = torch.rand(-(-blocks // NESTED_BLOCK), device=device) + 0.1
    code = torch.linspace(-1.0, 1.0, 256, device=device)
    return [
        data.view(-1, 1),
        absmax,
        nested,
        code,
        torch.tensor(NF4, device=device),
        torch.tensor([0.7], device=device),
    ]


def unpack_by_formula(packed: list[Tensor], format: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The weight (rows, cols) that a packed one stands for, in torch; dtype: of the arithmetic and the result."""
    if format == "int8":
        data, scales = packed
        return data.to(dtype) * (scales.to(dtype) / 127).unsqueeze(1)
    if format == "int4":
        data, scale = packed
        codes = torch.stack((data & 15, data >> 4), -1).view(-1, BLOCK).to(dtype) - 8
        return (codes * scale.to(dtype).view(-1, 1)).view(rows, cols)
    data, absmax, nested, nested_code, code, offset = packed
    scales = nested_code.to(dtype)[absmax.long()].view(-1)
    scales = scales * nested.to(dtype).repeat_interleave(NESTED_BLOCK)[: scales.numel()] + offset.to(dtype)
    values = code.to(dtype)[torch.stack((data >> 4, data & 15), -1).view(-1).long()]
    return (values.view(-1, BLOCK) * scales.unsqueeze(1)).view(rows, cols)


def replaced(weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """`weight` with the entries at flat positions `index` replaced, in place."""
    weight.view(-1).index_copy_(0, index.long(), values.to(weight.dtype))
    return weight


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"], help="output × input features")
    made.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64])
    made.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--density", type=float, default=0.006)
    made.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    made.add_argument("--rounds", type=int, default=21)
    made.add_argument("--seconds", type=float, default=60.0, help="stop starting new cases after this much time")
    found = made.parse_args(arguments)
    if found.fast:
        found.shapes, found.batch, found.rounds, found.rank, found.dtype = ["12x64"], [1, 5], 1, 3, "float32"
    return found


class Layer:
    """One packed weight with its parts; `clone` puts the packed weight into memory of its own."""

    def __init__(self, format: str, rows: int, cols: int, found: argparse.Namespace) -> None:
        self.format, self.rows, self.cols, self.dtype = format, rows, cols, getattr(torch, found.dtype)
        device = found.device
        self.packed = random_base(format, rows, cols, device)
        count = max(1, round(found.density * rows * cols))
        self.index = torch.randint(0, rows * cols, (count,), device=device).unique().int()
        self.values = torch.randn(self.index.numel(), device=device)
        self.a, self.b = torch.randn(found.rank, cols, device=device), torch.randn(rows, found.rank, device=device)
        self.scale = 0.5
        self.cast_a, self.cast_b = self.a.to(self.dtype), self.b.to(self.dtype)

    def clones(self, count: int) -> list[list[Tensor]]:
        return [[t.clone() for t in self.packed] for _ in range(count)]

    @property
    def nbytes(self) -> int:
        """Of the packed weight and the parts that one product reads."""
        return packed_bytes(self.packed) + 8 * self.index.numel() + 4 * self.b.numel() + 2 * self.a.numel()

    def exact(self, x: Tensor, parts: bool = True) -> Tensor:
        """In fp64; `x Aᵀ` is rounded to x's type, as every contestant does."""
        weight = unpack_by_formula(self.packed, self.format, self.rows, self.cols, torch.float64)
        if not parts:
            return x.double() @ weight.t()
        weight = replaced(weight, self.values, self.index)
        return x.double() @ weight.t() + self.scale * (x @ self.cast_a.t()).double() @ self.b.double().t()

    def one_pass(self, x: Tensor, count: int) -> list[Callable[[], Tensor]]:
        def call(packed: list[Tensor]) -> Tensor:
            u = x @ self.cast_a.t()
            parts = (self.values, self.index, u, self.b, self.scale)
            return launch.quantized_product(packed, self.format, x, None, *parts, rows=self.rows)

        return [partial(call, packed) for packed in self.clones(count)]

    def base_only(self, x: Tensor, count: int) -> list[Callable[[], Tensor]]:
        product = partial(launch.quantized_product, format=self.format, x=x, rows=self.rows)
        return [partial(product, packed) for packed in self.clones(count)]

    def unpacked(self, x: Tensor, count: int, library: bool = False) -> list[Callable[[], Tensor]]:
        def call(packed: list[Tensor]) -> Tensor:
            if library:
                weight = unpack(packed, self.format, (self.rows, self.cols), self.dtype)
            else:
                weight = unpack_by_formula(packed, self.format, self.rows, self.cols, torch.float32).to(self.dtype)
            y = F.linear(x, replaced(weight, self.values, self.index))
            return y.addmm_(x @ self.cast_a.t(), self.cast_b.t(), alpha=self.scale)

        return [partial(call, packed) for packed in self.clones(count)]


def enter_all(contest: Contest, layer: Layer, x: Tensor, kernels: bool) -> None:
    dense = torch.randn(layer.rows, layer.cols, device=x.device).to(layer.dtype)
    size = dense.numel() * dense.element_size()
    exact, exact_base = layer.exact(x), layer.exact(x, parts=False)
    contest.enter("dense", size, x.double() @ dense.double().t(), partial(dense_calls, dense, x))
    if kernels:
        contest.enter("one pass", layer.nbytes, exact, partial(layer.one_pass, x))
        contest.enter("base only", packed_bytes(layer.packed), exact_base, partial(layer.base_only, x))
    contest.enter("unpack", layer.nbytes, exact, partial(layer.unpacked, x))
    contest.enter("unpack (library)", layer.nbytes, exact, partial(layer.unpacked, x, library=True))


@torch.no_grad()
def measure(found: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Bar], list[str]]:
    speed, kernels = copy_speed(found.device), can_launch(torch.device(found.device))
    notes = [f"large copy: {speed / 1e12:.3f} TB/s", f"generated kernels run: {'yes' if kernels else 'no'}"]
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    start = time.perf_counter()
    for format in found.formats:
        for shape in found.shapes:
            height, width = (int(n) for n in shape.split("x"))
            layer = Layer(format, height, width, found)
            for batch in found.batch:
                case = f"{format} {shape} batch {batch}"
                if time.perf_counter() - start > found.seconds:
                    notes.append(f"out of time: {case} not measured")
                    continue
                x = torch.randn(batch, layer.cols, device=found.device).to(layer.dtype)
                contest = Contest(x, found.device)
                enter_all(contest, layer, x, kernels)
                times = turns(contest.runs, contest.copies, found.rounds, found.device)
                notes += [f"{case}: {failure}" for failure in contest.failures]
                for name, timing in times.items():
                    row = {"format": format, "shape": shape, "batch": batch, "kernel": name, "us": timing.median * 1e6}
                    row["over dense"] = times["dense"].over(timing).median
                    row["over unpack"] = times["unpack"].over(timing).median
                    row["roof"] = contest.bytes[name] / speed / timing.median
                    rows.append({**row, "error": contest.errors[name]})
                peer = "unpack (library)" if "unpack (library)" in times else "unpack"
                if "one pass" in times:
                    bars.append(Bar.of(f"{case}: one pass over {peer}", times["one pass"].over(times[peer]), 1.0))
                keep("gpu_quantized", found, rows, bars, notes)
    return rows, bars, notes


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    found = options(arguments)
    begin(found)
    rows, bars, notes = measure(found)
    return report("gpu_quantized", found, rows, bars=bars, notes=notes)


if __name__ == "__main__":
    main()
