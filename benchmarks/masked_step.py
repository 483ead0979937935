"""One training step of a pruned linear: what do masks cost?

    dense       nn.Linear, no mask: fp32 weight, gradient, two Adam moments: 16 bytes per weight
    masked      MaskedLinear: the same and one bit per weight; the gradient is masked in the operator, zeros rewritten after the step

`held` is what stays between steps (parameter, gradient, optimizer state, mask), `peak` the allocator's maximum inside one step.

    python benchmarks/masked_step.py --save
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import allocations, begin, interleave, mib, parser, report, storage_bytes
from sparsify.modules.masked import mask_modules


def variant(kind: str, size: int, mask: torch.Tensor, device: str) -> nn.Module:
    linear = nn.Linear(size, size, bias=False, device=device)
    net = nn.Sequential(linear)
    if kind == "masked":
        mask_modules(net, {"0.weight": mask})
    return net


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--size", type=int, default=4096)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    arguments = options.parse_args()
    if arguments.fast:
        arguments.size, arguments.tokens, arguments.rounds = 512, 64, 3
    begin(arguments)
    size, device = arguments.size, arguments.device
    x = torch.randn(arguments.tokens, size, device=device, requires_grad=True)
    rows: list[dict[str, Any]] = []
    for sparsity in arguments.sparsity:
        mask = torch.rand(size, size, device=device) >= sparsity
        nets = {kind: variant(kind, size, mask, device) for kind in ("dense", "masked")}
        optimizers = {kind: torch.optim.AdamW(net.parameters(), 1e-4, fused=True) for kind, net in nets.items()}

        def step_of(kind: str, nets: Any = nets, optimizers: Any = optimizers) -> Callable[[], None]:
            def step() -> None:
                nets[kind](x).square().mean().backward()
                optimizers[kind].step()
                optimizers[kind].zero_grad(set_to_none=False)
                x.grad = None

            return step

        steps = {kind: step_of(kind) for kind in nets}
        times = interleave(steps, rounds=arguments.rounds, clock=arguments.clock, patience=arguments.patience)
        for kind, net in nets.items():
            tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]
            tensors += [v for s in optimizers[kind].state.values() for v in s.values() if isinstance(v, torch.Tensor)]
            with allocations(device) as peak:
                steps[kind]()
            held = storage_bytes(tensors)
            rows.append(
                {
                    "sparsity": sparsity,
                    "layout": kind,
                    "seconds": times[kind].median,
                    "time / dense": times[kind].over(times["dense"]).median,
                    "held MiB": mib(held),
                    "bytes per weight": held / size**2,
                    "peak in step MiB": mib(peak.peak),
                }
            )
    report("masked_step", arguments, rows)


if __name__ == "__main__":
    main()
