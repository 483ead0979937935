"""How fast is one sparse linear on this CPU, beside torch's dense product, a peer engine, and the floor?

    python benchmarks/cpu_linear.py --shapes 4096x4096 --batch 1 16 64 256 --sparsity 0.5 0.75 0.9 --dtype fp32 int8
    python benchmarks/cpu_linear.py --peer deepsparse=ENV openvino=ENV onnxruntime=ENV --peer-dtype fp32 int8 int4-weight-only

All contestants take turns in one process tree, so that a noisy moment hits everybody; the table holds medians (and the
JSON minima too), the ratios are ratios of medians. The floor is the larger of bytes over read bandwidth and nonzero
flops over the peak of one large torch matmul, both measured in the same run. Each peer runs in a process of its own, with the
Python of the environment given (`benchmarks/peers/README.md`), on the same weights, in every type of `--peer-dtype` that it has
(`benchmarks/peers/linear.py`); ratios stand behind its times: how many times as long as ours in the type of the row. JSON also
has the peer's kernel and its relative error. The last line is JSON; `--save` keeps it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peer import Peer, named_environments
from sparsify.console import adapt_streams
from sparsify.kernels.cpu.dispatch import Choice, best_isa
from sparsify.kernels.cpu.formats import pack
from sparsify.kernels.cpu.tune import cpu_name
from sparsify.lowering.cpu.lower import SparseLinear, pack_linear

PEERS = {
    "deepsparse": ("fp32", "int8"),
    "onnxruntime": ("fp32", "int8", "int8-weight-only", "int4-weight-only"),
    "openvino": ("fp32", "int8", "int8-weight-only", "int4-weight-only"),
}


class PeerLinear:
    """One linear in one type in a peer's process."""

    def __init__(self, peer: Peer, dtype: str, folder: Path) -> None:
        self.peer, self.dtype, self.folder = peer, dtype, folder
        self.name = f"{peer.kind} {dtype}"
        self.kernel = ""

    def load(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compile one product; returns the peer's result, to be compared with ours."""
        paths = {name: str(self.folder / f"{name}.npy") for name in ("weight", "x", "y")}
        np.save(paths["weight"], weight.numpy())
        np.save(paths["x"], x.numpy())
        self.kernel = self.peer.ask(dtype=self.dtype, **paths)["kernel"]
        return torch.from_numpy(np.load(paths["y"]))

    def run(self, runs: int) -> list[float]:
        return self.peer.ask(dtype=self.dtype, runs=runs)["seconds"]


clock: Callable[[], float] = time.perf_counter


def seconds_of(call: Callable[[], Any], runs: int) -> list[float]:
    seconds = []
    for _ in range(runs):
        start = clock()
        call()
        seconds.append(clock() - start)
    return seconds


def machine_limits() -> tuple[float, float]:
    """Read bandwidth in bytes/s and peak fp32 flops/s, as torch reaches them on all threads."""
    data, square = torch.ones(64 << 20), torch.randn(1536, 1536)
    seconds_of(data.sum, 1)
    bandwidth = data.numel() * 4 / min(seconds_of(data.sum, 7))
    return bandwidth, 2 * 1536**3 / min(seconds_of(lambda: square @ square, 7))


def measure(args: argparse.Namespace, peers: list[PeerLinear]) -> list[dict[str, Any]]:
    bandwidth, peak = machine_limits()
    results = []
    for shape in args.shapes:
        rows, cols = map(int, shape.split("x"))
        for sparsity in args.sparsity:
            weight = torch.randn(rows, cols) / cols**0.5
            weight *= torch.rand(rows, cols) >= sparsity
            layers = {d: SparseLinear(pack_linear(weight, "int8" if d == "int8" else None)) for d in args.dtype}
            for batch in args.batch:
                x = torch.randn(batch, cols)
                for layer in layers.values():
                    layer.choice(batch, measure=True)
                calls: dict[str, Callable[[int], list[float]]] = {}
                calls["dense"] = lambda n, x=x, w=weight: seconds_of(lambda: F.linear(x, w), n)
                if args.compile:
                    compiled = torch.compile(F.linear, dynamic=False)
                    compiled(x, weight)
                    calls["dense compiled"] = lambda n, x=x, w=weight, c=compiled: seconds_of(lambda: c(x, w), n)
                for name, layer in layers.items():
                    calls[name] = lambda n, x=x, layer=layer: seconds_of(lambda: layer(x), n)
                exact = F.linear(x.double(), weight.double())
                outputs = {name: layer(x) for name, layer in layers.items()}
                for peer in peers:
                    outputs[peer.name] = peer.load(weight, x)
                    calls[peer.name] = peer.run
                error = {name: relative_error(y, exact) for name, y in outputs.items()}
                samples = in_turn(calls, args.rounds, args.seconds)
                for dtype, layer in layers.items():
                    floor = max(layer.packed.nbytes / bandwidth, 2 * layer.packed.nnz * batch / peak)
                    row = {"shape": shape, "batch": batch, "sparsity": sparsity, "dtype": dtype}
                    row |= row_of(dtype, layer.choice(batch), floor, samples, error)
                    row["peers"] = {peer.name: peer_entry(peer, dtype, samples, error) for peer in peers}
                    results.append(row)
                    print(line_of(row), flush=True)
    return results


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def in_turn(calls: dict[str, Callable[[int], list[float]]], least: int, seconds: float) -> dict[str, list[float]]:
    """Samples of every contestant, in at least `least` turns and `seconds` in all."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds, start = 0, time.perf_counter()
    while rounds < least or time.perf_counter() - start < seconds:
        rounds += 1
        for name, call in calls.items():
            time.sleep(0.01)  # until the threads of the one before have stopped spinning
            samples[name] += call(3)[1:]  # the first run warms what the others evicted
    return samples


def row_of(
    dtype: str, choice: Choice, floor: float, samples: dict[str, list[float]], error: dict[str, float]
) -> dict[str, Any]:
    """Ours beside dense torch, in microseconds."""
    median = {name: statistics.median(values) for name, values in samples.items()}
    row = {
        "kernel": choice.kernel, "us": median[dtype] * 1e6, "us_min": min(samples[dtype]) * 1e6,
        "predicted_us": choice.predicted * 1e6, "floor_us": floor * 1e6,
        "dense_us": median["dense"] * 1e6, "dense_us_min": min(samples["dense"]) * 1e6,
        "vs_dense": median["dense"] / median[dtype], "error": error[dtype],
    }  # fmt: skip
    if "dense compiled" in median:
        row["compiled_us"] = median["dense compiled"] * 1e6
    return row


def peer_entry(
    peer: PeerLinear, dtype: str, samples: dict[str, list[float]], error: dict[str, float]
) -> dict[str, Any]:
    """A peer's times in microseconds, and as multiples of ours in `dtype`."""
    ours, theirs = samples[dtype], samples[peer.name]
    return {
        "kernel": peer.kernel, "us": statistics.median(theirs) * 1e6, "us_min": min(theirs) * 1e6,
        "ratio": statistics.median(theirs) / statistics.median(ours), "ratio_min": min(theirs) / min(ours),
        "error": error[peer.name],
    }  # fmt: skip


def line_of(row: dict[str, Any]) -> str:
    text = f"{row['shape']:>12} {row['batch']:>5} {row['sparsity']:>5.2f} {row['dtype']:>5} {row['kernel']:>10} "
    text += f"{row['us']:>9.0f} {row['floor_us']:>9.0f} {row['dense_us']:>9.0f} {row['vs_dense']:>6.2f}"
    for name, peer in row["peers"].items():
        text += f" {peer['us']:>{max(10, len(name))}.0f} {peer['ratio']:>6.2f}"
    return text


def main() -> None:
    adapt_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="rows x columns")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "int8"], default=["fp32", "int8"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="at least this many turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="at least this long per row")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor seconds of each process; with --threads 1, fair on a machine that others use too",
    )
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the dense product")
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME=ENV", help=f"NAME: {', '.join(PEERS)}")
    parser.add_argument("--peer-dtype", nargs="+", choices=PEERS["openvino"], default=["fp32", "int8"])
    parser.add_argument("--save", type=Path, help="write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    global clock
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    SparseLinear(pack(torch.ones(1, 1)))  # build before anything is timed
    try:
        places = named_environments(args.peer)
    except ValueError as error:
        parser.error(str(error))
    if set(places) - set(PEERS):
        parser.error(f"--peer: {', '.join(sorted(set(places) - set(PEERS)))} is none of {', '.join(PEERS)}")
    peers = {
        name: Peer(name, place, "linear.py", name, str(args.threads), args.clock) for name, place in places.items()
    }
    header = f"{'shape':>12} {'batch':>5} {'spars':>5} {'dtype':>5} {'kernel':>10} "
    header += f"{'us':>9} {'floor':>9} {'dense':>9} {'ratio':>6}"
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        linears = [
            PeerLinear(peer, dtype, Path(folder))
            for name, peer in peers.items()
            for dtype in args.peer_dtype
            if dtype in PEERS[name]
        ]
        print(header + "".join(f" {linear.name:>10} {'ratio':>6}" for linear in linears))
        results = measure(args, linears)
    for peer in peers.values():
        peer.close()
    summary = {
        "benchmark": "cpu_linear", "cpu": cpu_name(), "isa": best_isa(), "threads": args.threads, "clock": args.clock,
        "date": str(date.today()), "torch": torch.__version__, "python": platform.python_version(),
        "peers": {name: peer.version for name, peer in peers.items()}, "results": results,
    }  # fmt: skip
    text = json.dumps(summary)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
