"""The loss of a language model's head: all logits at once, PyTorch's `linear_cross_entropy` (2.13) and ours in chunks of tokens.

    plain         `cross_entropy(linear(x, W).float(), target)`
    torch N       `torch.nn.functional.linear_cross_entropy` in chunks of N tokens, where torch has it
    ours N        `chunked_cross_entropy` in chunks of N tokens: what `sparsify.backend(loss_chunk=N)` puts into a compiled step

Loss and gradient of `x (tokens, width)` for a frozen head, as in fine-tuning. `bytes` is what a pass allocates at its peak beyond x and W.
All losses and gradients are checked once against `plain` in fp64.

    python benchmarks/loss_chunks.py --threads 2 --save
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Bar, allocations, begin, interleave, mib, parser, report
from sparsify.ops.chunked_loss import chunked_cross_entropy

HEADS = {"SmolLM2-135M": (576, 49152), "Llama 3.2 1B": (2048, 128256)}
CHUNKS = (128, 512)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def contestants(x: Tensor, weight: Tensor, target: Tensor, chunks: tuple[int, ...]) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {"plain": lambda: F.cross_entropy(F.linear(x, weight).float(), target)}
    for chunk in chunks:
        if hasattr(F, "linear_cross_entropy"):
            options: Any = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)  # type: ignore[attr-defined]
            found[f"torch {chunk}"] = lambda options=options: F.linear_cross_entropy(x, weight, target, options=options)  # type: ignore[attr-defined]
        found[f"ours {chunk}"] = lambda chunk=chunk: chunked_cross_entropy(x, weight, target, chunk=chunk)
    return found


def step(x: Tensor, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        loss().backward()

    return run


def check(x: Tensor, weight: Tensor, target: Tensor, losses: dict[str, Callable[[], Tensor]]) -> None:
    wide = x.detach().double().requires_grad_()
    want = F.cross_entropy(wide @ weight.double().t(), target)
    want.backward()
    assert wide.grad is not None
    near = 1e-5 if x.dtype == torch.float32 else 2e-2
    for name, loss in losses.items():
        x.grad = None
        made = loss()
        made.backward()
        assert x.grad is not None
        assert abs(made.item() - want.item()) <= near * abs(want.item()), name
        assert (x.grad.double() - wide.grad).norm() <= 2 * near * wide.grad.norm(), name
    x.grad = None


def main(argv: list[str] | None = None) -> dict[str, Any]:
    made: argparse.ArgumentParser = parser(__doc__.splitlines()[0])
    made.add_argument("--tokens", type=int, default=2048, help="of a step: 8 × 256")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--head", action="append", choices=list(HEADS), help="only these heads")
    made.add_argument("--dtype", action="append", choices=list(DTYPES), help="only these types")
    arguments = made.parse_args(argv)
    begin(arguments)
    heads = {name: HEADS[name] for name in arguments.head or HEADS}
    tokens, chunks, rounds = arguments.tokens, CHUNKS, arguments.rounds
    if arguments.fast:
        heads, tokens, chunks, rounds = {"tiny": (16, 500)}, 24, (8,), 1
    rows, bars = [], []
    for head, (width, classes) in tqdm(heads.items(), desc="loss_chunks", unit="head"):
        for dtype in arguments.dtype or DTYPES:
            x = torch.randn(tokens, width).to(DTYPES[dtype]).requires_grad_()
            weight = (torch.randn(classes, width) / width**0.5).to(DTYPES[dtype])
            target = torch.randint(0, classes, (tokens,))
            losses = contestants(x, weight, target, chunks)
            few = slice(0, min(tokens, 64))
            part = x.detach()[few].clone().requires_grad_()
            check(part, weight, target[few], contestants(part, weight, target[few], tuple(min(c, 24) for c in chunks)))
            steps = {name: step(x, loss) for name, loss in losses.items()}
            peaks = {}
            for name, run in steps.items():
                x.grad = None
                with allocations("cpu") as peak:
                    run()
                peaks[name] = peak.peak
            timings = interleave(steps, rounds=rounds, warmup=1, clock=arguments.clock, patience=arguments.patience)
            for name, timing in timings.items():
                ratio = timing.over(timings["plain"])
                row = {"head": head, "dtype": dtype, "tokens": tokens, "loss": name, "seconds": timing.median}
                rows.append({**row, "over plain": ratio.median, "MiB": mib(peaks[name])})
                if name == f"ours {chunks[-1]}":
                    bars.append(Bar.of(f"{head} {dtype}: time over all logits at once", ratio, 1.05))
                    bars.append(
                        Bar(f"{head} {dtype}: bytes over all logits at once", peaks[name] / peaks["plain"], 0.4)
                    )
    return report("loss_chunks", arguments, rows, bars=bars)


if __name__ == "__main__":
    main()
