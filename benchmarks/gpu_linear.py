"""How fast is one sparse linear on this GPU, beside cuBLAS, PyTorch's semi-structured tensors, and the memory's speed?

    python benchmarks/gpu_linear.py --shapes 4096x4096 14336x4096 --batch 1 4 16 64 256 --sparsity 0.5 0.75 0.9
    python benchmarks/gpu_linear.py --tune          which tile of the stream kernel is fastest, for kernels/gpu/tiles.py

Every contestant multiplies with many copies of its weight in turn, together more than 150 MB, so that no weight comes out of
the cache; one CUDA graph holds one pass over the copies; contestants take turns, medians over rounds. `roof` is the time that
the bytes of the weight take at the speed of a large copy, measured in the same run, over the time of the product. A contestant
that fails is left out, with its message.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import Bar, Timing, begin, keep, parser, report
from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.build import can_launch
from sparsify.kernels.gpu.formats import Stream, pack_stream, pack_two_four, quantize_int8
from sparsify.kernels.gpu.operator import dense_product, packed_product
from sparsify.kernels.gpu.spec import Tile
from sparsify.kernels.gpu.tiles import choose_tile

ROTATED = 160 << 20
MOST_COPIES = 64


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"], help="output × input features")
    made.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 256])
    made.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
    made.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    made.add_argument("--rounds", type=int, default=21)
    made.add_argument("--seconds", type=float, default=150.0, help="stop starting new cases after this much time")
    made.add_argument("--tune", action="store_true", help="time every candidate tile of the stream kernel instead")
    found = made.parse_args(arguments)
    if found.fast:
        found.shapes, found.batch, found.sparsity, found.rounds = ["64x128"], [1, 20], [0.5, 0.75], 2
    return found


# --- timing -----------------------------------------------------------------------------------------------------------


def captured(calls: Sequence[Callable[[], Any]], device: str) -> Callable[[], Any]:
    """All calls as one CUDA graph (on the CPU: one after another)."""

    def run() -> None:
        for call in calls:
            call()

    if device != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_of(run: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def turns(runs: dict[str, Callable[[], Any]], copies: dict[str, int], rounds: int, device: str) -> dict[str, Timing]:
    """Seconds per product of every contestant, one sample per round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    if not runs:
        return {}
    for run in runs.values():
        seconds_of(run, device)
    names = list(runs)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(seconds_of(runs[name], device) / copies[name])
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def copy_speed(device: str) -> float:
    """Bytes per second of a large copy, read and written."""
    size = (1 << 30) if device == "cuda" else (1 << 24)
    source, target = (
        torch.ones(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(11)]
    return 2 * size / sorted(times)[len(times) // 2]


# --- contestants ------------------------------------------------------------------------------------------------------


def sparse_weight(shape: tuple[int, int], sparsity: float, dtype: torch.dtype, device: str) -> Tensor:
    rows, cols = shape
    weight = torch.randn(rows, cols, device=device) / cols**0.5
    return (weight * (torch.rand(rows, cols, device=device) >= sparsity)).to(dtype)


def two_four_weight(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    fours = torch.randn(shape[0], shape[1] // 4, 4, device=device) / shape[1] ** 0.5
    places = fours.abs().topk(2, -1).indices
    return torch.zeros_like(fours).scatter_(-1, places, fours.gather(-1, places)).view(shape).to(dtype)


def clones(packed: Stream, count: int) -> Iterator[Stream]:
    """The same packed weight in separate memory."""
    from sparsify.kernels.gpu.formats import rebuild_stream

    for _ in range(count):
        yield rebuild_stream(packed, [t.clone() for t in packed.tensors])


def copies_for(nbytes: int, device: str) -> int:
    return 1 if device != "cuda" else max(1, min(MOST_COPIES, -(-ROTATED // nbytes)))


class Contest:
    """Contestants of one shape, sparsity and batch: what each runs, how many copies, the bytes of one, its error."""

    def __init__(self, x: Tensor, device: str) -> None:
        self.x, self.device = x, device
        self.runs: dict[str, Callable[[], Any]] = {}
        self.copies: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self.failures: list[str] = []

    def enter(
        self, name: str, nbytes: int, exact: Tensor, products: Callable[[int], list[Callable[[], Tensor]]]
    ) -> None:
        """`products(count)` gives one call per copy. A failing contestant is noted and left out."""
        try:
            count = copies_for(nbytes, self.device)
            calls = products(count)
            error = float((calls[0]().double() - exact).norm() / exact.norm())
            run = captured(calls, self.device)
        except Exception as error:  # a peer that this build or GPU lacks
            self.failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
            return
        self.runs[name], self.copies[name], self.bytes[name], self.errors[name] = run, count, nbytes, error


def stream_calls(
    packed: Stream, x: Tensor, count: int, kernels: bool, tile: Tile | None = None
) -> list[Callable[[], Tensor]]:
    if not kernels:
        return [lambda p=p: dense_product(p, x) for p in clones(packed, count)]
    if tile is not None:
        return [lambda p=p: launch.stream_product(p, x, tile=tile) for p in clones(packed, count)]
    return [lambda p=p: packed_product(p, x, None, None, "none") for p in clones(packed, count)]


def expanded_calls(packed: Stream, x: Tensor, count: int, kernels: bool) -> list[Callable[[], Tensor]]:
    """The weight expanded in every call, then a dense product."""
    expand = launch.expand_stream if kernels else Stream.unpack
    return [lambda p=p: F.linear(x, expand(p)) for p in clones(packed, count)]


def dense_calls(weight: Tensor, x: Tensor, count: int) -> list[Callable[[], Tensor]]:
    return [partial(F.linear, x, weight.clone()) for _ in range(count)]


def semi_structured(weight: Tensor, x: Tensor, count: int) -> list[Callable[[], Tensor]]:
    from torch.sparse import to_sparse_semi_structured

    if weight.device.type != "cuda":
        raise RuntimeError("needs a CUDA device")
    weights = [to_sparse_semi_structured(weight.clone()) for _ in range(count)]
    return [lambda w=w: F.linear(x, w) for w in weights]


def measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Bar], list[str]]:
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    speed = copy_speed(device)
    kernels = can_launch(torch.device(device))
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    notes = [
        f"large copy: {speed / 1e12:.3f} TB/s",
        f"generated kernels run: {'yes' if kernels else 'no, reference only'}",
    ]
    start = time.perf_counter()
    for shape_text in arguments.shapes:
        height, width = (int(n) for n in shape_text.split("x"))
        for sparsity in arguments.sparsity:
            weight = sparse_weight((height, width), sparsity, dtype, device)
            packed = pack_stream(weight)
            integers, scales = quantize_int8(weight)
            packed8 = pack_stream(integers, scales, dtype=dtype)
            fours = two_four_weight((height, width), dtype, device)
            packed24 = pack_two_four(fours)
            for batch in arguments.batch:
                if time.perf_counter() - start > arguments.seconds:
                    notes.append(f"out of time: {shape_text} {sparsity:.0%} batch {batch} not measured")
                    continue
                x = torch.randn(batch, width, device=device).to(dtype)
                exact = x.double() @ weight.double().t()
                contest = Contest(x, device)
                size = weight.numel() * weight.element_size()
                contest.enter("dense", size, exact, partial(dense_calls, weight, x))
                contest.enter("stream", packed.nbytes, exact, partial(stream_calls, packed, x, kernels=kernels))
                contest.enter("stream int8", packed8.nbytes, exact, partial(stream_calls, packed8, x, kernels=kernels))
                if sparsity == 0.5:
                    exact24 = x.double() @ fours.double().t()
                    contest.enter("2:4", packed24.nbytes, exact24, partial(stream_calls, packed24, x, kernels=kernels))
                    if batch > launch.MAX_TOKENS:
                        contest.enter(
                            "2:4 expanded", size, exact24, partial(expanded_calls, packed24, x, kernels=kernels)
                        )
                    contest.enter("semi-structured", size * 9 // 16, exact24, partial(semi_structured, fours, x))
                times = turns(contest.runs, contest.copies, arguments.rounds, device)
                notes += [f"{shape_text} {sparsity:.0%} batch {batch}: {failure}" for failure in contest.failures]
                for name, timing in times.items():
                    ratio = times["dense"].over(timing)
                    rows.append(
                        {
                            "shape": shape_text,
                            "sparsity": sparsity,
                            "batch": batch,
                            "kernel": name,
                            "us": timing.median * 1e6,
                            "over dense": ratio.median,
                            "roof": contest.bytes[name] / speed / timing.median,
                            "MB": contest.bytes[name] / 1e6,
                            "error": contest.errors[name],
                        }
                    )
                    if name == "stream" and kernels and batch <= 16 and sparsity in (0.5, 0.75):
                        bound = 1.0 if sparsity == 0.5 else 2.0
                        label = f"{shape_text} {sparsity:.0%} batch {batch}: dense over stream"
                        bars.append(Bar.of(label, ratio, bound, at_least=True))
                    if name == "stream" and kernels and batch == 1:
                        label = f"{shape_text} {sparsity:.0%} batch 1: share of the roofline"
                        bars.append(Bar(label, rows[-1]["roof"], 0.8, at_least=True))
                keep("gpu_linear", arguments, rows, bars, notes)
                del contest
    return rows, bars, notes


def tune(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Bar], list[str]]:
    """Times of every candidate tile; what wins belongs into kernels/gpu/tiles.py with this record's name as its source."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    rows: list[dict[str, Any]] = []
    kernels = can_launch(torch.device(device))
    notes = [] if kernels else ["generated kernels do not run here: every tile is the reference"]
    candidates = [Tile(warps=w, unroll=u) for w in (4, 8) for u in (1, 2, 4)]
    for shape_text in arguments.shapes:
        height, width = (int(n) for n in shape_text.split("x"))
        for sparsity in arguments.sparsity:
            weight = sparse_weight((height, width), sparsity, dtype, device)
            packed = pack_stream(weight)
            for batch in (b for b in arguments.batch if b <= launch.MAX_TOKENS):
                x = torch.randn(batch, width, device=device).to(dtype)
                exact = x.double() @ weight.double().t()
                contest = Contest(x, device)
                for tile in candidates:
                    name = f"{tile.warps} warps, unroll {tile.unroll}"
                    contest.enter(
                        name, packed.nbytes, exact, partial(stream_calls, packed, x, kernels=kernels, tile=tile)
                    )
                times = turns(contest.runs, contest.copies, arguments.rounds, device)
                if not times:
                    notes += [f"{shape_text} {sparsity:.0%} batch {batch}: {failure}" for failure in contest.failures]
                    continue
                best = min(times, key=lambda n: times[n].median)
                chosen = choose_tile("stream", launch.power_above(batch), launch.target_of(torch.device(device)))
                own = f"{chosen.warps} warps, unroll {chosen.unroll}"
                rows.append(
                    {
                        "shape": shape_text,
                        "sparsity": sparsity,
                        "batch": batch,
                        "best": best,
                        "us": times[best].median * 1e6,
                        "table": own,
                        "table us": times[own].median * 1e6 if own in times else None,
                        "all us": {n: t.median * 1e6 for n, t in times.items()},
                    }
                )
                keep("gpu_tune", arguments, rows, notes=notes)
    return rows, [], notes


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    found = options(arguments)
    begin(found)
    rows, bars, notes = (tune if found.tune else measure)(found)
    columns = [c for c in rows[0] if c != "all us"] if rows else []
    return report("gpu_tune" if found.tune else "gpu_linear", found, rows, columns=columns, bars=bars, notes=notes)


if __name__ == "__main__":
    main()
