"""How long `sparsify.compile` takes against depth and width, pass by pass, on the meta device (shapes, no weights).

The bar: a 32-layer model shaped like Llama-3-8B in under 20 s, growth at most linear in layers. Linear is judged by
the time per added layer, late against early: (t(32) − t(16)) / 16 over (t(16) − t(4)) / 12, which a constant part
cannot hide.

    python benchmarks/compile_time.py --save
    python benchmarks/compile_time.py --profile 8        # where the time goes, 8 layers
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify
import sparsify.api
from benchmarks.harness import Bar, begin, parser, report, wait_for_quiet
from sparsify import S2FT, Plan

#: (hidden, FFN, heads, KV heads, vocabulary)
WIDTHS = {
    "1024": (1024, 2816, 16, 16, 32000),
    "4096": (4096, 14336, 32, 8, 128256),
    "tiny": (64, 176, 4, 2, 128),
}


def meta_model(width: str, layers: int) -> nn.Module:
    """A Llama without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, heads, kv_heads, vocab = WIDTHS[width]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=vocab,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


@contextmanager
def clocks(now: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds of each stage of the pipeline, by wrapping the functions that `sparsify.api` calls."""
    spent: dict[str, float] = {}
    api: Any = sparsify.api

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + now() - start

        return call

    originals = {name: getattr(api, name) for name in ("capture", "install", "Handle", "PIPELINE")}
    for name in ("capture", "install", "Handle"):
        setattr(api, name, timed(name.lower(), originals[name]))
    api.PIPELINE = tuple(replace(p, run=timed(p.name, p.run)) for p in originals["PIPELINE"])
    try:
        yield spent
    finally:
        for name, value in originals.items():
            setattr(api, name, value)


def compile_once(width: str, layers: int, fraction: float, now: Callable[[], float]) -> dict[str, float]:
    """Seconds in total and per stage; `other` is what no stage accounts for (verification between passes)."""
    model = meta_model(width, layers)
    plan = Plan([S2FT(fraction=fraction)])
    with clocks(now) as spent:
        start = now()
        host = sparsify.compile(model, plan, progress=False)
        total = now() - start
    slices = host.sparsify.program.slices
    if len(slices) != 2 * layers:
        raise RuntimeError(f"expected {2 * layers} trained slices, found {len(slices)}")
    return {"total": total, **spent, "other": total - sum(spent.values())}


def measure(
    width: str, depths: list[int], fraction: float, rounds: int, clock: str, patience: float
) -> list[dict[str, Any]]:
    """A row per depth: medians over rounds that go through all depths in turn."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    found: dict[int, list[dict[str, float]]] = {d: [] for d in depths}
    for _ in range(rounds):
        for depth in depths:
            wait_for_quiet(patience)
            found[depth].append(compile_once(width, depth, fraction, now))
    rows = []
    for depth, runs in found.items():
        row: dict[str, Any] = {"width": width, "layers": depth}
        row |= {f"{stage} s": statistics.median(run[stage] for run in runs) for stage in runs[0]}
        row["total min s"] = min(run["total"] for run in runs)
        rows.append(row)
    return rows


def growth(rows: list[dict[str, Any]]) -> float | None:
    """Seconds per added layer at the deep end over the shallow end, from minima; 1 is linear. Needs three depths."""
    ordered = sorted((row["layers"], row["total min s"]) for row in rows)
    if len(ordered) < 3:
        return None
    (d0, t0), (d1, t1), (d2, t2) = ordered[0], ordered[-2], ordered[-1]
    return ((t2 - t1) / (d2 - d1)) / max((t1 - t0) / (d1 - d0), 1e-9)


def profile(width: str, layers: int, fraction: float) -> None:
    """Print the hot spots of one compile."""
    compile_once(width, 1, fraction, time.perf_counter)
    model = meta_model(width, layers)
    profiler = cProfile.Profile()
    profiler.enable()
    sparsify.compile(model, Plan([S2FT(fraction=fraction)]), progress=False)
    profiler.disable()
    stats = pstats.Stats(profiler)
    stats.sort_stats("cumulative").print_stats("sparsify", 45)
    stats.sort_stats("tottime").print_stats(30)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--widths", nargs="+", choices=list(WIDTHS), default=["1024", "4096"])
    made.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    made.add_argument("--fraction", type=float, default=0.03)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--profile", type=int, metavar="LAYERS", help="print a profile instead")
    arguments = made.parse_args(argv)
    begin(arguments)
    if arguments.profile:
        profile(arguments.widths[-1], arguments.profile, arguments.fraction)
        return None
    if arguments.fast:
        arguments.widths, arguments.layers, arguments.rounds = ["tiny"], [1, 2], 1
    compile_once(arguments.widths[0], 1, arguments.fraction, time.perf_counter)  # imports, caches
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    for width in arguments.widths:
        found = measure(
            width, arguments.layers, arguments.fraction, arguments.rounds, arguments.clock, arguments.patience
        )
        rows += found
        factor = growth(found)
        if factor is not None:
            bars.append(Bar(f"growth of time per layer, width {width}", factor, 1.25))
        bars += [
            Bar(f"seconds for {row['layers']} layers of width {width}", row["total s"], 20.0)
            for row in found
            if width == "4096" and row["layers"] == 32
        ]
    note = "meta device; medians of seconds; `other` is verification between passes and copies of the program"
    return report("compile_time", arguments, rows, bars=bars, notes=[note])


if __name__ == "__main__":
    main()
