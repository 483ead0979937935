"""One model, several adapters: train two, save, load, switch, fuse, merge, hand over to PEFT.

    python examples/serve_adapters.py

Task "up": answer with larger numbers; task "down": with smaller ones, on a small random network: it is the bookkeeping
that counts here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import sparsify
from sparsify import S2FT, Plan


class Block(nn.Module):
    """A feed-forward block with a residual."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Three blocks: no Hugging Face model is needed, any `nn.Module` can be compiled."""

    def __init__(self, width: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def train(base: nn.Module, data: torch.Tensor, target: torch.Tensor, seed: int, steps: int) -> nn.Module:
    """Compile with other units for each seed, then fit."""
    model = sparsify.compile(base, Plan([S2FT(structure="ffn", fraction=0.1)], seed=seed), example=(data,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        nn.functional.mse_loss(model(data), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="fewer steps")
    parser.add_argument("--out", type=Path, help="where the adapters go (default: a temporary folder)")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="sparsify-"))
    steps = 20 if options.fast else 200

    torch.manual_seed(0)
    base = Tower(32).eval()
    data = torch.randn(64, 32)
    with torch.no_grad():
        answer = base(data)
    targets = {"up": answer + 1.0, "down": answer - 1.0}
    for seed, (name, target) in enumerate(targets.items()):
        folder = train(base, data, target, seed, steps).sparsify.save_adapter(out / name)
        print(f"trained {name!r}: {sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e3:.0f} kB")

    # One served model; adapters of other selections fit too, for they are stored in original coordinates.
    served = sparsify.compile(base, Plan([S2FT(structure="ffn", fraction=0.1)], seed=0), example=(data,)).eval()
    handle = served.sparsify
    for name in targets:
        handle.load_adapter(out / name, name)

    def shift() -> float:
        with torch.no_grad():
            return (served(data) - answer).mean().item()

    for spec in (None, "up", "down", {"up": 0.5, "down": 0.5}, {"up": 1.0, "down": 1.0}, None):
        start = time.perf_counter()
        mix = handle.set_adapter(spec)
        print(f"{spec!s:>28}: mean shift {shift():+.2f}, switched in {1e3 * (time.perf_counter() - start):.1f} ms")
        for conflict in mix.conflicts:
            print(f"{'':>30}{conflict}")

    handle.set_adapter("up")
    on = shift()
    handle.merge()
    print(f"merged into plain weights: {shift():+.2f} (adapter: {on:+.2f})")
    handle.unmerge()
    print(f"as a PEFT LoRA folder: {handle.export_lora(out / 'up-as-lora')}")
    plain = handle.restore()
    with torch.no_grad():
        print(f"restored, bit for bit: {torch.equal(plain(data), answer)}")


if __name__ == "__main__":
    main()
