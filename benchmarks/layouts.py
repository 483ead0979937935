"""Where should the trained block of a weight live? One linear, forward + backward + AdamW, in three storage layouts.

    alias      the block *is* part of the weight: a contiguous view (a column slice needs the weight stored transposed)
    refresh    `torch.ops.sparsify.partial_linear`: a Parameter of its own, copied into the weight before one GEMM
    refresh_fn the same arithmetic in an `autograd.Function`: what the operator's registration costs
    split      W with the slice zeroed, plus a second GEMM with the block (values)
    delta      W as it is, plus a second GEMM with the block (a delta)
    floor      the frozen linear: forward and dX, nothing trained (no method can be faster)

The block is fp32 over a bf16 weight, except in `alias`, where it has the weight's dtype by construction (no master).
`kernels/README.md` draws the conclusion.

    python benchmarks/layouts.py --save
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify.ops  # noqa: F401  (registers the operators)
from benchmarks.harness import Timing, begin, interleave, parser, report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One linear `(n, m)`: `axis` 1 trains columns `[start, start + width)`, 0 rows; `tokens` per step."""

    n: int
    m: int
    axis: int
    width: int
    tokens: int
    dtype: torch.dtype
    device: str

    @property
    def start(self) -> int:
        """The block lies in the middle, at a multiple of the usual head size where there is room."""
        return min((self.m if self.axis else self.n) // 2, (self.m if self.axis else self.n) - self.width)

    def __str__(self) -> str:
        side = "columns" if self.axis else "rows"
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.n}×{self.m} {self.width} {side} T={self.tokens} {kind}"


def narrow(tensor: Tensor, case: Case) -> Tensor:
    return tensor.narrow(case.axis, case.start, case.width)


# --- the layouts ------------------------------------------------------------------------------------------------------


class AliasColumns(torch.autograd.Function):
    """`stored (m, n)`; `block = stored[start:end]`, contiguous: one GEMM, nothing to copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, block: Tensor, start: int) -> Tensor:
        ctx.save_for_backward(x.narrow(1, start, block.shape[0]).clone(memory_format=torch.contiguous_format), stored)
        return x.mm(stored)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, stored = ctx.saved_tensors
        (g,) = grads
        return g.mm(stored.t()), None, kept.t().mm(g), None


class AliasRows(torch.autograd.Function):
    """`weight (n, m)`; `block = weight[start:end]`, contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, block: Tensor, start: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.start, ctx.width = start, block.shape[0]
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (g,) = grads
        return g.mm(weight), None, g.narrow(1, ctx.start, ctx.width).t().mm(x), None


class Refresh(torch.autograd.Function):
    """The arithmetic of `sparsify::partial_linear`, without the dispatcher's registration around it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, block: Tensor, start: int, axis: int) -> Tensor:
        width = block.shape[axis]
        weight.data.narrow(axis, start, width).copy_(block)
        kept = x.narrow(1, start, width).clone(memory_format=torch.contiguous_format) if axis else x
        ctx.save_for_backward(kept, weight, block)
        ctx.start, ctx.axis = start, axis
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, block = ctx.saved_tensors
        (g,) = grads
        width = block.shape[ctx.axis]
        weight.data.narrow(ctx.axis, ctx.start, width).copy_(block)
        mine = g if ctx.axis else g.narrow(1, ctx.start, width)
        return g.mm(weight), None, mine.t().mm(kept).to(block.dtype), None, None


class Split(torch.autograd.Function):
    """Two GEMMs. `values`: the slice of `weight` is zero and the block holds values; else the block is a delta."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, block: Tensor, start: int, axis: int, values: bool) -> Tensor:
        width = block.shape[axis]
        low = block.to(x.dtype)
        y = nn.functional.linear(x, weight)
        if axis:
            kept = x.narrow(1, start, width).clone(memory_format=torch.contiguous_format)
            y.addmm_(kept, low.t())
        else:
            kept = x
            part = y.narrow(1, start, width)
            if values:
                part.copy_(x.mm(low.t()))
            else:
                part.addmm_(x, low.t())
        ctx.save_for_backward(kept, weight, block)
        ctx.start, ctx.axis, ctx.values = start, axis, values
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, block = ctx.saved_tensors
        (g,) = grads
        width = block.shape[ctx.axis]
        low = block.to(g.dtype)
        dx = g.mm(weight)
        if ctx.axis:
            mine = g
            part = dx.narrow(1, ctx.start, width)
            if ctx.values:
                part.copy_(g.mm(low))
            else:
                part.addmm_(g, low)
        else:
            mine = g.narrow(1, ctx.start, width)
            dx.addmm_(mine, low)
        return dx, None, mine.t().mm(kept).to(block.dtype), None, None, None


# --- one step of each -------------------------------------------------------------------------------------------------


def steps(case: Case, seed: int = 0) -> dict[str, Callable[[], Tensor]]:
    """Layout → one training step, which returns `y`; each has its own weight, all with the same values."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(case.n, case.m, generator=generator) / case.m**0.5).to(case.device, case.dtype)
    x = torch.randn(case.tokens, case.m, generator=generator).to(case.device, case.dtype).requires_grad_()
    g = torch.randn(case.tokens, case.n, generator=generator).to(case.device, case.dtype)
    master = torch.float32 if case.dtype is torch.bfloat16 else case.dtype

    def trained(forward: Callable[[Tensor], Tensor], block: nn.Parameter) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW([block], lr=1e-4, fused=True)

        def step() -> Tensor:
            y = forward(block)
            y.backward(g)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            x.grad = None
            return y.detach()

        return step

    def floor() -> Tensor:
        y = nn.functional.linear(x, frozen)
        y.backward(g)
        x.grad = None
        return y.detach()

    frozen = base.clone()
    refreshed, refreshed_fn, zeroed, unchanged = base.clone(), base.clone(), base.clone(), base.clone()
    narrow(zeroed, case).zero_()
    values = lambda: nn.Parameter(narrow(base, case).to(master, copy=True).contiguous())  # noqa: E731
    delta = nn.Parameter(torch.zeros_like(narrow(base, case), dtype=master).contiguous())
    s, a = case.start, case.axis
    if case.axis:
        stored = base.t().contiguous()
        alias_forward = lambda block: AliasColumns.apply(x, stored, block, s)  # noqa: E731
    else:
        stored = base.clone()
        alias_forward = lambda block: AliasRows.apply(x, stored, block, s)  # noqa: E731
    alias = nn.Parameter(stored.narrow(0, s, case.width))
    operator = torch.ops.sparsify.partial_linear
    return {
        "floor": floor,
        "alias": trained(alias_forward, alias),
        "refresh": trained(lambda block: operator(x, refreshed, None, block, s, a), values()),
        "refresh_fn": trained(lambda block: Refresh.apply(x, refreshed_fn, block, s, a), values()),
        "split": trained(lambda block: Split.apply(x, zeroed, block, s, a, True), values()),
        "delta": trained(lambda block: Split.apply(x, unchanged, block, s, a, False), delta),
    }


def cases(shapes: list[tuple[int, int, int]], tokens: list[int], dtypes: list[str], device: str) -> list[Case]:
    """Every shape with a column and a row slice, at every number of tokens, in every dtype."""
    return [
        Case(n, m, axis, width, count, DTYPES[dtype], device)
        for dtype in dtypes
        for n, m, width in shapes
        for axis in (1, 0)
        for count in tokens
        if n * m < 2**24 or count <= 256 or device == "cuda"
    ]


def measure(case: Case, rounds: int, seconds: float, clock: str, patience: float) -> dict[str, Any]:
    """One row: milliseconds of each layout and ratios to the floor (medians; minima in brackets)."""
    times: dict[str, Timing] = interleave(
        steps(case), rounds=rounds, warmup=2, seconds=seconds, clock=clock, patience=patience
    )
    row: dict[str, Any] = {"case": str(case), "rounds": len(times["floor"].samples)}
    row["floor ms"] = times["floor"].median * 1e3
    for name, timing in times.items():
        if name != "floor":
            ratio = timing.over(times["floor"])
            row[name] = str(ratio)
            row[f"{name}_ratio"] = [ratio.median, ratio.minimum, ratio.paired]
            row[f"{name}_ms"] = timing.median * 1e3
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024])
    made.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    made.add_argument("--rounds", type=int, default=31)
    made.add_argument("--seconds", type=float, default=6.0, help="per case")
    arguments = made.parse_args(argv)
    begin(arguments)
    # (out, in, width of the slice): about 3 % of the axis, at least a head
    shapes = [(1024, 1024, 64), (2816, 1024, 84), (1024, 2816, 84), (4096, 4096, 128)]
    tokens, dtypes, rounds = arguments.tokens, arguments.dtypes, arguments.rounds
    if arguments.fast:
        shapes, tokens, rounds = [(96, 64, 8)], [16], 3
    rows = []
    for case in cases(shapes, tokens, dtypes, arguments.device):
        rows.append(measure(case, rounds, arguments.seconds, arguments.clock, arguments.patience))
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    columns = ["case", "rounds", "floor ms", "alias", "refresh", "refresh_fn", "split", "delta"]
    note = "ratios to the frozen floor (forward + dX): of medians, of minima in brackets"
    return report("layouts", arguments, rows, columns=columns, notes=[note])


if __name__ == "__main__":
    main()
