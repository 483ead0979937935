"""Memory and time of fine-tuning SmolLM2-135M-Instruct, ours and PEFT's, each run in a process of its own.

    full, peft_lora            full fine-tuning; PEFT's LoRA on the seven linears of every layer
    s2ft, paca, rosa, our_lora `sparsify.compile(model, Plan([…]))`, at LoRA's trained size (PaCA 1.9 % more)
    s2ft_upper                S2FT in the upper third of the layers, at the same trained size

A run is a child process: it loads the model, warms up with one step and times the others (forward, backward, fused AdamW, zero_grad) on blocks
of the `help()` topics. `peak` is the largest resident memory of the process, `model` what was resident before the first step, so
`peak - model` is what training adds: gradients, optimizer state, what is kept for backward, scratch. The methods take turns, round after round,
and a ratio is one of medians over all of a method's steps.

    python benchmarks/real_model.py --save                                      8 × 256 tokens, fp32 and bf16, checkpointing off and on
    python benchmarks/real_model.py --dtype fp32 --no-checkpointing --rounds 1
    python benchmarks/real_model.py --longest 4096 --save --label longest       longest sequence in 4 GiB, batch 1
    python benchmarks/real_model.py --fast
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.claim_adapters import METHODS as CLAIMED
from benchmarks.claim_adapters import RANK, s2ft_above
from benchmarks.harness import begin, parser, report

METHODS = ("full", "peft_lora", "our_lora", "s2ft", "s2ft_upper", "paca", "rosa")
OURS = {"our_lora": "lora", "s2ft": "s2ft", "s2ft_upper": "s2ft-upper", "paca": "paca", "rosa": "rosa-random"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEP = 64  # tokens; lengths are multiples of it


@dataclass(frozen=True)
class Run:
    """What a child does; it gets this as JSON."""

    method: str
    dtype: str
    checkpointing: bool
    batch: int
    length: int
    steps: int
    threads: int
    layers: int = 0  # 0: all of the model


# --- the child ---


def made(run: Run) -> nn.Module:
    import sparsify
    from sparsify.demo.pretrained import smollm2

    base, _ = smollm2()
    if run.layers:
        base.model.layers = base.model.layers[: run.layers]
        base.config.num_hidden_layers = run.layers
    base = base.to(DTYPES[run.dtype])
    if run.method == "full":
        return base.requires_grad_(True)
    if run.method == "peft_lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS))
    rules = CLAIMED[OURS[run.method]].rules
    if run.method == "s2ft_upper" and run.layers:  # the upper third of those
        rules = s2ft_above(run.layers - max(1, run.layers // 3), run.layers)
    return sparsify.compile(base, sparsify.Plan(list(rules())), donate=True, progress=False)


def resident() -> float:
    """MiB that are in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def child(run: Run) -> dict[str, Any]:
    from sparsify.demo.language_tasks import general_text
    from sparsify.demo.language_training import text_blocks
    from sparsify.demo.pretrained import smollm2

    torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    model: Any = made(run)
    model.train()
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = text_blocks(smollm2()[1], general_text(), run.batch, run.length)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    before = resident()
    seconds, cpu = [], []
    for _ in range(run.steps + 1):
        start, used = time.perf_counter(), time.process_time()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "trained": sum(p.numel() for p in trained),
        "seconds": seconds[1:] or seconds,
        "cpu": cpu[1:] or cpu,
        "model": before,
        "peak": peak,
    }


# --- the parent ---


def ask(run: Run) -> dict[str, Any]:
    """Run a child and read the last line that it prints. Raises RuntimeError with its last words."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asdict(run))], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr.strip()[-2000:] or f'ended with {done.returncode}'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def step_rows(given: argparse.Namespace, methods: Sequence[str]) -> list[dict[str, Any]]:
    cells = [
        (dtype, on)
        for dtype in given.dtype or list(DTYPES)
        for on in ((False,) if given.no_checkpointing else (False, True))
    ]
    found: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    with tqdm(total=given.rounds * len(cells) * len(methods), unit="run", dynamic_ncols=True) as bar:
        for _ in range(given.rounds):
            for dtype, on in cells:
                for method in methods:
                    bar.set_description(f"{method} {dtype}")
                    run = Run(
                        method, dtype, on, given.batch, given.length, given.steps, torch.get_num_threads(), given.layers
                    )
                    found.setdefault((method, dtype, on), []).append(ask(run))
                    bar.update()
    rows = []
    for (method, dtype, on), runs in found.items():
        key = "cpu" if given.clock == "cpu" else "seconds"
        step = {m: statistics.median(s for r in found[m, dtype, on] for s in r[key]) for m in methods}
        added = {m: statistics.median(r["peak"] - r["model"] for r in found[m, dtype, on]) for m in methods}
        peer = "peft_lora" if "peft_lora" in methods else methods[0]
        rows.append(
            {
                "method": method, "dtype": dtype, "checkpointing": on, "trained": runs[0]["trained"], "step_s": step[method],
                f"time / {peer}": step[method] / step[peer],
                "peak_MiB": statistics.median(r["peak"] for r in runs), "added_MiB": added[method],
                f"added / {peer}": added[method] / added[peer],
            }
        )  # fmt: skip
    return rows


def longest(method: str, dtype: str, budget: float, threads: int, layers: int) -> dict[str, Any]:
    """The longest sequence (batch 1) whose step stays within `budget` MiB of resident memory, found by bisection over measured runs."""

    def peak(length: int) -> float:
        return ask(Run(method, dtype, False, 1, length, 0, threads, layers))["peak"]

    low, low_peak, high = 0, 0.0, 8192
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        found = peak(middle)
        if found <= budget:
            low, low_peak = middle, found
        else:
            high = middle
    return {"method": method, "dtype": dtype, "budget_MiB": budget, "longest": low, "peak_MiB": low_peak}


def main() -> None:
    made_ = parser(__doc__ or "")
    made_.formatter_class = argparse.RawDescriptionHelpFormatter
    made_.add_argument("--child", help=argparse.SUPPRESS)
    made_.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made_.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: both")
    made_.add_argument("--no-checkpointing", action="store_true", help="only without gradient checkpointing")
    made_.add_argument("--batch", type=int, default=8)
    made_.add_argument("--length", type=int, default=256)
    made_.add_argument("--steps", type=int, default=3, help="timed steps of a run (default: 3)")
    made_.add_argument("--rounds", type=int, default=2)
    made_.add_argument("--layers", type=int, default=0, help="only the first so many layers")
    made_.add_argument(
        "--longest", type=float, metavar="MIB", help="find the longest sequence in so much memory instead"
    )
    given = made_.parse_args()
    if given.child is not None:
        print(json.dumps(child(Run(**json.loads(given.child)))))
        return
    begin(given)
    if given.fast:
        given.batch, given.length, given.steps, given.rounds, given.layers = 1, STEP, 1, 1, 2
        given.dtype, given.no_checkpointing = given.dtype or ["fp32"], True
    if given.longest is None:
        report("real_model", given, step_rows(given, given.methods))
        return
    rows = []
    for dtype in given.dtype or ["fp32"]:
        for method in tqdm(given.methods, unit="method", dynamic_ncols=True):
            rows.append(longest(method, dtype, given.longest, torch.get_num_threads(), given.layers))
    report("real_model", given, rows)


if __name__ == "__main__":
    main()
