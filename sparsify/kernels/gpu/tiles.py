"""Tile choices as data: (operator, shape class) → per architecture, and where each comes from.

`source` "computed" means: chosen from bytes in flight, registers and instruction counts of offline-compiled code, not
measured on a GPU. `benchmarks/gpu_linear.py --tune` prints what a measurement would choose.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.kernels.gpu.spec import Op, Tile


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One row of the table: for an operator, up to `tokens` tokens, for the given types of x, on the given targets ("*" for all)."""

    op: Op
    tokens: int
    types: tuple[str, ...] = ("bf16", "fp16", "fp32")
    targets: tuple[str, ...]
    tile: Tile
    source: str


EVERY = ("*",)
MANY = 1 << 30
TABLE = (
    Choice(op="stream", tokens=2, targets=EVERY, tile=Tile(unroll=2, warps=8), source="computed"),
    Choice(op="stream", tokens=16, targets=EVERY, tile=Tile(unroll=1, warps=8), source="computed"),
    Choice(op="expand", tokens=MANY, targets=EVERY, tile=Tile(unroll=1, warps=8), source="computed"),
    Choice(op="blocks", tokens=1, targets=EVERY, tile=Tile(warps=4, stages=3), source="computed"),
    Choice(op="blocks", tokens=32, targets=EVERY, tile=Tile(cols=16, warps=2, stages=3), source="computed"),
    Choice(op="blocks", tokens=MANY, targets=EVERY, tile=Tile(cols=64, warps=4, stages=3), source="computed"),
    Choice(op="quantized", tokens=1, targets=EVERY, tile=Tile(rows=4, warps=4), source="computed"),
    Choice(
        op="quantized",
        tokens=16,
        targets=EVERY,
        tile=Tile(rows=64, cols=16, depth=32, warps=4, stages=2),
        source="computed: three stages spill for int4 on sm_100",
    ),
    Choice(
        op="quantized",
        tokens=MANY,
        types=("bf16", "fp16"),
        targets=EVERY,
        tile=Tile(rows=64, cols=64, depth=32, warps=4, stages=3),
        source="computed",
    ),
    Choice(
        op="quantized",
        tokens=MANY,
        targets=EVERY,
        tile=Tile(rows=64, cols=16, depth=32, warps=4, stages=2),
        source="computed: without tensor cores 64 tokens spill",
    ),
    Choice(
        op="partial_grad",
        tokens=MANY,
        types=("bf16", "fp16"),
        targets=EVERY,
        tile=Tile(rows=64, cols=128, depth=32, warps=4, stages=3),
        source="computed",
    ),
    Choice(
        op="partial_grad",
        tokens=MANY,
        targets=EVERY,
        tile=Tile(rows=64, cols=64, depth=32, warps=8, stages=2),
        source="computed: without tensor cores the wider tile spills on sm_80",
    ),
    Choice(
        op="sampled_tile",
        tokens=MANY,
        types=("bf16", "fp16"),
        targets=EVERY,
        tile=Tile(rows=128, cols=64, depth=64, warps=8, stages=3),
        source="computed: 128 × 128 spills in the epilogue",
    ),
    Choice(
        op="sampled_tile",
        tokens=MANY,
        targets=EVERY,
        tile=Tile(rows=64, cols=64, depth=32, warps=8, stages=2),
        source="computed",
    ),
    Choice(
        op="sampled_entries",
        tokens=MANY,
        targets=EVERY,
        tile=Tile(rows=16, depth=256, warps=4, stages=1),
        source="computed",
    ),
    Choice(
        op="sampled_entries",
        tokens=MANY,
        targets=("gfx942",),
        tile=Tile(rows=8, depth=256, warps=4, stages=1),
        source="computed: 16 rows spill scalar registers, which hold the masks of the loads",
    ),
    Choice(
        op="adapter_axpys",
        tokens=MANY,
        targets=EVERY,
        tile=Tile(rows=16, cols=64, depth=32, warps=4, stages=2),
        source="computed",
    ),
    Choice(
        op="adapter_dots",
        tokens=MANY,
        targets=EVERY,
        tile=Tile(rows=16, cols=16, depth=64, warps=4, stages=2),
        source="computed",
    ),
    Choice(op="adapter_sparse", tokens=MANY, targets=EVERY, tile=Tile(rows=16, depth=64, warps=4), source="computed"),
    Choice(op="write_values", tokens=MANY, targets=EVERY, tile=Tile(rows=1024, warps=4), source="computed"),
)


def choose_tile(op: Op, tokens: int, target: str, x: str = "bf16") -> Tile:
    """The first row that fits, in the order of the table; rows for a named target come before those for all."""
    fits = [c for c in TABLE if c.op == op and tokens <= c.tokens and x in c.types]
    named = [c for c in fits if target in c.targets]
    return (named or [c for c in fits if c.targets == EVERY])[0].tile
