"""SparseGPT on one linear: time and reconstruction error, against llm-compressor on the same weight and Hessian.

Timed is what happens between a finished Hessian and the pruned weight: damping, factorisation, masks, updates. The peer runs
in its own environment and process (`--peer-python`), one call in turn with ours; both start from copies of the same tensors.

    python benchmarks/prune_layer.py --peer-python PATH/bin/python --save          # 4096 × 4096
    python benchmarks/prune_layer.py --columns 11008 --rounds 3 --save             # a 7B model's largest layer

`Hessian s / 1k` is the time of adding 1024 tokens to the Hessian, which the peer's figure leaves out as well; `peak MiB` what pruning
allocates above weight and Hessian. The relative error is of the first 512 output rows, in fp64.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PATTERNS = {"unstructured": 0.75, "2:4": 0.5, "16:64": 0.75}

WORKER = """
import json, sys, time
import torch
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from importlib.metadata import version
folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
held = torch.load(folder + "/layer.pt")
module = torch.nn.Linear(held["weight"].shape[1], held["weight"].shape[0], bias=False)
print(json.dumps({"version": version("llmcompressor")}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    module.weight.data.copy_(held["weight"])
    hessians = {module: held["hessian"].clone()}
    start = time.perf_counter()
    with torch.no_grad():
        _, pruned = sparsify_weight(module, hessians, asked["sparsity"], asked["drop"], asked["group"], 128, 0.01, False)
    seconds = time.perf_counter() - start
    torch.save(pruned, folder + "/peer.pt")
    print(json.dumps({"seconds": seconds}), flush=True)
"""


class Peer:
    """llm-compressor's `sparsify_weight` in a process of its own environment."""

    def __init__(self, python: str, folder: str, threads: int) -> None:
        command = [python, "-c", WORKER, folder, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self.answer()["version"]

    def answer(self) -> dict[str, Any]:
        """The next JSON line; raises RuntimeError when the process has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the peer's process ended: run its environment's python by hand and import llmcompressor")

    def prune(self, sparsity: float, drop: int, group: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"sparsity": sparsity, "drop": drop, "group": group}) + "\n")
        self.process.stdin.flush()
        self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    import torch

    from benchmarks.harness import Bar, allocations, begin, interleave, mib, parser, report
    from sparsify.pruning.patterns import NM, parse_pattern
    from sparsify.pruning.scores import magnitude_prune
    from sparsify.pruning.sparsegpt import Hessian, reconstruction_error, sparsegpt_prune

    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, default=4096, help="outputs of the linear")
    options.add_argument("--columns", type=int, default=4096, help="inputs of the linear")
    options.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    options.add_argument("--peer-python", default=None, help="python of an environment that has llmcompressor")
    arguments = options.parse_args()
    if arguments.fast:
        arguments.rows, arguments.columns, arguments.tokens, arguments.rounds = 384, 512, 1024, 3
    begin(arguments)
    size = arguments.columns
    weight = torch.randn(arguments.rows, size) / size**0.5
    # inputs as a model's: channels of unequal size, and a part that all channels share
    scale, down, up = torch.rand(size) * 2 + 0.1, torch.randn(size, 256) / size**0.5, torch.randn(256, size) / 16
    statistics = Hessian(size)
    adding = []
    for _ in range(0, arguments.tokens, 1024):
        noise = torch.randn(1024, size)
        inputs = noise * scale + 1.5 * (noise @ down) @ up
        start = time.perf_counter()
        statistics.add(inputs)
        adding.append(time.perf_counter() - start)
    hessian = statistics.value()

    def error_of(pruned: torch.Tensor) -> float:
        return reconstruction_error(weight[:512], pruned[:512], hessian)

    rows, bars, notes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if arguments.peer_python:
            torch.save({"weight": weight, "hessian": hessian}, f"{folder}/layer.pt")
            peer = Peer(arguments.peer_python, folder, torch.get_num_threads())
            notes.append(f"peer: llm-compressor {peer.version}")
        for text in arguments.patterns:
            pattern = parse_pattern(text)
            sparsity = pattern.sparsity if isinstance(pattern, NM) else PATTERNS.get(text, 0.75)
            drop, group = (pattern.m - pattern.n, pattern.m) if isinstance(pattern, NM) else (0, 0)

            def ours(sparsity: float = sparsity, pattern: Any = pattern) -> Any:
                return sparsegpt_prune(weight, hessian.clone(), sparsity, pattern)

            variants: dict[str, Any] = {"sparsify": ours}
            if peer is not None:
                variants["llm-compressor"] = lambda s=sparsity, d=drop, g=group: peer.prune(s, d, g)
            times = interleave(
                variants, rounds=arguments.rounds, warmup=1, clock=arguments.clock, patience=arguments.patience
            )
            copied = hessian.clone()
            with allocations("cpu") as peak:
                pruned = sparsegpt_prune(weight, copied, sparsity, pattern)
            error = {"sparsify": error_of(pruned.weight)}
            if peer is not None:
                error["llm-compressor"] = error_of(torch.load(f"{folder}/peer.pt"))
                bars.append(
                    Bar.of(f"{text}: time / llm-compressor", times["sparsify"].over(times["llm-compressor"]), 1.0)
                )
            for name, timing in times.items():
                row = {
                    "pattern": text,
                    "sparsity": sparsity,
                    "who": name,
                    "seconds": timing.median,
                    "best": timing.minimum,
                }
                if name == "sparsify":
                    row |= {"peak MiB": mib(peak.peak), "Hessian s / 1k": median(adding)}
                rows.append({**row, "relative error": error[name]})
            dropped = magnitude_prune(weight, sparsity, pattern)
            rows.append(
                {
                    "pattern": text,
                    "who": "magnitude",
                    "relative error": error_of(dropped.weight),
                }
            )
        if peer is not None:
            peer.close()
    arguments.peer_python = None if peer is None else "python"  # the record names no folder of the machine
    report("prune_layer", arguments, rows, bars=bars, notes=notes)


if __name__ == "__main__":
    main()
