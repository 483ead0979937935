"""Tokens per second of an 8B-shaped decoder on this GPU, dense and sparse, one CUDA graph per step.

    python benchmarks/gpu_decode.py --layers 32 --batch 1 8 --sparsity 0.5 0.75

The decoder is a plain module with Llama-3-8B's shapes (grouped queries, rotary positions, SwiGLU, RMS norms, a static cache
that is half full), q, k and v in one linear and gate and up in another, in the dense contestant too. In the sparse ones
every linear but the vocabulary head is a generated kernel, gate and up with their product fused. Weights are random: what
is measured is time. With fewer than 32 layers the result is of that many layers; nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_linear import captured, turns
from benchmarks.harness import begin, keep, mib, parser, report
from sparsify.kernels.cpu.operator import module_bytes
from sparsify.kernels.gpu.formats import pack_stream, quantize_int8
from sparsify.lowering.cuda.gpu_linear import GpuSparseLinear


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    groups: int = 8
    vocabulary: int = 128256
    layers: int = 32

    @property
    def head(self) -> int:
        return self.width // self.heads


class SwiGlu(nn.Module):
    """gate_up (2 · hidden, width) as one linear, then silu(gate) · up."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.width, 2 * shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear(x).chunk(2, -1)
        return F.silu(gate) * up


class Layer(nn.Module):
    """One decoder layer with a static cache of `room` positions; x (batch, 1, width)."""

    def __init__(self, shape: Shape, batch: int, room: int) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.groups * shape.head
        self.norm1, self.norm2 = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.qkv = nn.Linear(shape.width, shape.width + 2 * kv, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.gate_up: nn.Module = SwiGlu(shape)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        self.register_buffer("keys", torch.randn(batch, shape.groups, room, shape.head), persistent=False)
        self.register_buffer("stored", torch.randn(batch, shape.groups, room, shape.head), persistent=False)

    def forward(self, x: Tensor, turn: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        shape, kv = self.shape, self.shape.groups * self.shape.head
        q, k, v = self.qkv(self.norm1(x)).split([shape.width, kv, kv], -1)
        q = rotate(q.view(x.shape[0], 1, shape.heads, shape.head).transpose(1, 2), turn)
        k = rotate(k.view(x.shape[0], 1, shape.groups, shape.head).transpose(1, 2), turn)
        self.keys.index_copy_(2, place, k)
        self.stored.index_copy_(2, place, v.view(x.shape[0], 1, shape.groups, shape.head).transpose(1, 2))
        y = F.scaled_dot_product_attention(q, self.keys, self.stored, attn_mask=mask, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(self.gate_up(self.norm2(x)))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * turn[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * turn[1]


class Decoder(nn.Module):
    """Embedding, layers, norm, head; one step at position `place` of the cache."""

    def __init__(self, shape: Shape, batch: int, room: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape, batch, room) for _ in range(shape.layers))
        self.norm, self.head = nn.RMSNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False)
        angles = torch.outer(torch.arange(room).float(), 500000.0 ** (-torch.arange(0, shape.head, 2) / shape.head))
        both = torch.cat([angles, angles], -1)
        self.register_buffer("turns", torch.stack([both.cos(), both.sin()]), persistent=False)
        self.register_buffer("mask", torch.ones(room, room, dtype=torch.bool).tril(), persistent=False)

    def forward(self, token: Tensor, place: Tensor) -> Tensor:
        turn, mask = self.turns.index_select(1, place), self.mask.index_select(0, place)
        x = self.embed(token)
        for layer in self.layers:
            x = layer(x, turn, place, mask)
        return self.head(self.norm(x)).argmax(-1)


def build(shape: Shape, batch: int, room: int, device: str, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        model = Decoder(shape, batch, room).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype.is_floating_point:
            tensor.normal_(0, 0.02)
    model.mask.copy_(torch.ones(room, room, dtype=torch.bool, device=device).tril())
    return model


def sparse(linear: nn.Linear, sparsity: float, int8: bool, gated: bool = False) -> GpuSparseLinear:
    weight = linear.weight * (torch.rand_like(linear.weight, dtype=torch.float32) >= sparsity)
    values, scales = quantize_int8(weight) if int8 else (weight, None)
    packed = pack_stream(values, scales, gated=gated, dtype=weight.dtype)
    return GpuSparseLinear(packed, activation="silu" if gated else "none")


def sparsified(model: Decoder, sparsity: float, int8: bool) -> Decoder:
    """A decoder that shares everything but its layers' linears, which become packed."""
    import copy

    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    made = copy.deepcopy(model, memo)
    for layer in made.layers:
        assert isinstance(layer, Layer)
        assert isinstance(layer.gate_up, SwiGlu)
        layer.gate_up = sparse(layer.gate_up.linear, sparsity, int8, gated=True)
        layer.qkv = sparse(layer.qkv, sparsity, int8)  # type: ignore[assignment]
        layer.out = sparse(layer.out, sparsity, int8)  # type: ignore[assignment]
        layer.down = sparse(layer.down, sparsity, int8)  # type: ignore[assignment]
    return made


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    made.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.75])
    made.add_argument("--room", type=int, default=1024, help="positions of the cache; the step is taken in its middle")
    made.add_argument("--rounds", type=int, default=21)
    return made.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    found = options(arguments)
    begin(found)
    shape, dtype = Shape(layers=found.layers), torch.bfloat16
    if found.fast:
        shape, dtype = Shape(width=64, hidden=96, heads=4, groups=2, vocabulary=101, layers=2), torch.float32
        found.batch, found.room, found.rounds = [1, 2], 16, 2
    rows: list[dict[str, Any]] = []
    for batch in found.batch:
        models = {"dense": build(shape, batch, found.room, found.device, dtype)}
        for sparsity in found.sparsity:
            models[f"{sparsity:.0%}"] = sparsified(models["dense"], sparsity, False)
        models[f"{found.sparsity[-1]:.0%} int8"] = sparsified(models["dense"], found.sparsity[-1], True)
        token = torch.zeros(batch, 1, dtype=torch.int64, device=found.device)
        place = torch.tensor([found.room // 2], device=found.device)
        runs = {name: captured([partial(m, token, place)], found.device) for name, m in models.items()}
        times = turns(runs, dict.fromkeys(runs, 1), found.rounds, found.device)
        for name, timing in times.items():
            rows.append(
                {
                    "batch": batch,
                    "layers": shape.layers,
                    "model": name,
                    "ms": timing.median * 1e3,
                    "tokens/s": batch / timing.median,
                    "over dense": times["dense"].over(timing).median,
                    "MiB": mib(module_bytes(models[name])),
                }
            )
        keep("gpu_decode", found, rows)
        del models, runs
        if found.device == "cuda":
            torch.cuda.empty_cache()
    return report("gpu_decode", found, rows)


if __name__ == "__main__":
    main()
