"""How fast is one sparse linear on this CPU, beside torch's dense product, a peer engine, and the floor?

    python benchmarks/cpu_linear.py --shapes 4096x4096 --batch 1 16 64 256 --sparsity 0.5 0.75 0.9 --dtype fp32 int8
    python benchmarks/cpu_linear.py --peer deepsparse --peer-python ENV/bin/python

All contestants take turns in one process tree, so that a noisy moment hits everybody; the table holds medians (and the
JSON minima too), the ratios are ratios of medians. The floor is the larger of bytes over read bandwidth and nonzero
flops over the peak of one large torch matmul, both measured in the same run. The peer runs in a process of its own, with
the Python given, on the same weights, and answers one batch of timings each time it is asked. The last line is JSON; `--save`
keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
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

from sparsify.kernels.cpu.dispatch import best_isa
from sparsify.kernels.cpu.formats import pack
from sparsify.kernels.cpu.tune import cpu_name
from sparsify.lowering.cpu import SparseLinear, pack_linear

PEER = r"""
import json, sys, time
import numpy as np
kind, directory, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
clock = time.process_time if sys.argv[4] == "cpu" else time.perf_counter
runners = {}
def onnx_file(weight, batch):
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    rows, cols = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, rows])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 7
    path = f"{directory}/model.onnx"
    onnx.save(model, path)
    return path
def prepare(weight, batch):
    if kind == "deepsparse":
        from deepsparse import Engine
        engine = Engine(model=onnx_file(weight, batch), batch_size=batch, num_cores=threads)
        return lambda x: engine.run([x])[0]
    if kind == "onnxruntime":
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(onnx_file(weight, batch), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x})[0]
    import openvino as ov
    from openvino import opset13 as ops
    node = ops.parameter([batch, weight.shape[1]], np.float32)
    model = ov.Model([ops.matmul(node, ops.constant(weight), False, True)], [node])
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", hints)
    request = compiled.create_infer_request()
    def run(x):
        request.infer([x])
        return request.get_output_tensor(0).data
    return run
def version():
    from importlib.metadata import version
    return version(kind)
print(json.dumps({"version": version()}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "weight" in job:
        weight, x = np.load(job["weight"]), np.load(job["x"])
        run = prepare(weight, x.shape[0])
        for _ in range(3):
            y = run(x)
        np.save(job["y"], y)
        print(json.dumps({"ready": True}), flush=True)
        continue
    seconds = []
    for _ in range(job["runs"]):
        start = clock()
        run(x)
        seconds.append(clock() - start)
    print(json.dumps({"seconds": seconds}), flush=True)
"""


class Peer:
    """Another engine in a process of its own."""

    def __init__(self, kind: str, python: str, threads: int, clock: str) -> None:
        self.kind, self.scratch = kind, tempfile.TemporaryDirectory()
        script = Path(self.scratch.name) / "peer.py"
        script.write_text(PEER)
        command = [python, str(script), kind, self.scratch.name, str(threads), clock]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = str(self.answer()["version"])

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.kind} ended without an answer")

    def ask(self, **job: Any) -> dict[str, Any]:
        """Ask the peer, which is stopped between its answers: its threads may spin on long after their work is done."""
        assert self.process.stdin is not None
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        os.kill(self.process.pid, signal.SIGSTOP)
        return found

    def close(self) -> None:
        self.process.kill()

    def load(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compile one product; returns the peer's result, to be compared with ours."""
        paths = {name: f"{self.scratch.name}/{name}.npy" for name in ("weight", "x", "y")}
        np.save(paths["weight"], weight.numpy())
        np.save(paths["x"], x.numpy())
        self.ask(**paths)
        return torch.from_numpy(np.load(paths["y"]))

    def run(self, runs: int) -> list[float]:
        return self.ask(runs=runs)["seconds"]


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


def measure(args: argparse.Namespace, peer: Peer | None) -> list[dict[str, Any]]:
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
                compiled = torch.compile(F.linear, dynamic=False) if args.compile else None
                calls: dict[str, Callable[[int], list[float]]] = {}
                calls["dense"] = lambda n, x=x, w=weight: seconds_of(lambda: F.linear(x, w), n)
                if compiled is not None:
                    compiled(x, weight)
                    calls["dense compiled"] = lambda n, x=x, w=weight, c=compiled: seconds_of(lambda: c(x, w), n)
                for name, layer in layers.items():
                    calls[name] = lambda n, x=x, layer=layer: seconds_of(lambda: layer(x), n)
                exact = F.linear(x.double(), weight.double())
                error = {
                    n: float((la(x).double() - exact).norm() / exact.norm().clamp_min(1e-30))
                    for n, la in layers.items()
                }
                if peer is not None:
                    difference = peer.load(weight, x).double() - exact
                    error[peer.kind] = float(difference.norm() / exact.norm().clamp_min(1e-30))
                    calls[peer.kind] = peer.run
                samples: dict[str, list[float]] = {name: [] for name in calls}
                rounds = 0
                start = time.perf_counter()
                while rounds < args.rounds or time.perf_counter() - start < args.seconds:
                    rounds += 1
                    for name, call in calls.items():
                        time.sleep(0.01)  # until the threads of the one before have stopped spinning
                        samples[name] += call(3)[1:]  # the first run warms what the others evicted
                median = {name: statistics.median(values) for name, values in samples.items()}
                fastest = {name: min(values) for name, values in samples.items()}
                for dtype, layer in layers.items():
                    floor = max(layer.packed.nbytes / bandwidth, 2 * layer.packed.nnz * batch / peak)
                    choice = layer.choice(batch)
                    row = {
                        "shape": shape, "batch": batch, "sparsity": sparsity, "dtype": dtype, "kernel": choice.kernel,
                        "us": median[dtype] * 1e6, "us_min": fastest[dtype] * 1e6,
                        "predicted_us": choice.predicted * 1e6, "floor_us": floor * 1e6,
                        "dense_us": median["dense"] * 1e6, "dense_us_min": fastest["dense"] * 1e6,
                        "vs_dense": median["dense"] / median[dtype], "error": error[dtype],
                    }  # fmt: skip
                    if "dense compiled" in median:
                        row["compiled_us"] = median["dense compiled"] * 1e6
                    if peer is not None:
                        row[f"{peer.kind}_us"] = median[peer.kind] * 1e6
                        row[f"{peer.kind}_us_min"] = fastest[peer.kind] * 1e6
                        row[f"vs_{peer.kind}"] = median[peer.kind] / median[dtype]
                        row[f"vs_{peer.kind}_min"] = fastest[peer.kind] / fastest[dtype]
                    results.append(row)
                    print(line_of(row, peer), flush=True)
    return results


def line_of(row: dict[str, Any], peer: Peer | None) -> str:
    text = f"{row['shape']:>12} {row['batch']:>5} {row['sparsity']:>5.2f} {row['dtype']:>5} {row['kernel']:>10} "
    text += f"{row['us']:>9.0f} {row['floor_us']:>9.0f} {row['dense_us']:>9.0f} {row['vs_dense']:>6.2f}"
    if peer is not None:
        text += f" {row[f'{peer.kind}_us']:>10.0f} {row[f'vs_{peer.kind}']:>6.2f}"
    return text


def main() -> None:
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
    parser.add_argument("--peer", choices=["deepsparse", "openvino", "onnxruntime"])
    parser.add_argument("--peer-python", default=sys.executable, help="Python of an environment that has the peer")
    parser.add_argument("--save", type=Path, help="write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    global clock
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    SparseLinear(pack(torch.ones(1, 1)))  # build before anything is timed
    peer = Peer(args.peer, args.peer_python, args.threads, args.clock) if args.peer else None
    header = f"{'shape':>12} {'batch':>5} {'spars':>5} {'dtype':>5} {'kernel':>10} "
    header += f"{'us':>9} {'floor':>9} {'dense':>9} {'ratio':>6}"
    print(header + (f" {peer.kind:>10} {'ratio':>6}" if peer else ""))
    with torch.inference_mode():
        results = measure(args, peer)
    if peer is not None:
        peer.close()
    summary = {
        "benchmark": "cpu_linear", "cpu": cpu_name(), "isa": best_isa(), "threads": args.threads, "clock": args.clock,
        "date": str(date.today()),
        "torch": torch.__version__, "python": platform.python_version(), "peer": args.peer,
        "peer_version": peer.version if peer else None, "results": results,
    }  # fmt: skip
    text = json.dumps(summary)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
