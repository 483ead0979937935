"""A guide: a storage format for frozen weights from outside the package, here MXFP4 of the OCP Microscaling specification (v1.0).

    block of 32 weights ──▶ one scale 2^e (E8M0, a byte) and 32 values of {0, ±½, ±1, ±1½, ±2, ±3, ±4, ±6} (E2M1, four bits)

A format is one class with three methods, one object and one line:

1. `pack` takes a stored weight (rows, columns) and returns plain tensors; `unpack` returns the weight as the format holds it.
2. `tensors` says what `pack` gives for a size: every operator, file and checkpoint is checked against it before anything is read.
3. Written in plain PyTorch, `unpack` is also what `torch.compile` and `torch.export` see; a library's kernel goes behind `unpack`, and
   `unpack_in_aten` then says the same in plain PyTorch.
4. `sparsify.formats.register(…)` makes the name known: `Quantize(format="mxfp4")` packs, S2FT, PaCA, RoSA and LoRA train beside
   it, adapters are saved with its hash, merge packs again. An installed distribution declares it as an entry point instead.

Run it: `python examples/write_a_format.py` (or with `--rule paca`).
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, Quantize, RoSA
from sparsify.formats import Format, PackedTensor, packed_bytes

BLOCK = 32
BIAS = 127  # of an E8M0 exponent
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1
LARGEST_EXPONENT = 2  # of an element: 6 = 1.5 · 2²


class MXFP4(Format):
    """[codes (rows, columns / 2 in whole blocks), exponents (rows, blocks)], both bytes; rows end in zeros up to a whole block."""

    name = "mxfp4"

    def pack(self, weight: Tensor) -> list[Tensor]:
        rows, columns = weight.shape
        padded = nn.functional.pad(weight.double(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
        largest = padded.abs().amax(dim=2)
        # frexp: largest = m · 2^k with ½ ≤ m < 1, so its exponent is k − 1; a block of zeros takes the smallest scale
        exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT, -BIAS).clamp(
            -BIAS, BIAS
        )
        scaled = torch.ldexp(padded, -exponent.unsqueeze(2))
        codes = self.nearest(scaled.abs()) | ((scaled < 0).to(torch.uint8) << 3)
        codes = codes.view(rows, -1)
        return [codes[:, ::2] | (codes[:, 1::2] << 4), (exponent + BIAS).to(torch.uint8)]

    @staticmethod
    def nearest(magnitude: Tensor) -> Tensor:
        """Index of the nearest magnitude, halves to the even code, beyond the last one saturated."""
        grid = torch.tensor(MAGNITUDES, dtype=magnitude.dtype, device=magnitude.device)
        middles = (grid[1:] + grid[:-1]) / 2
        up, down = torch.bucketize(magnitude, middles, right=True), torch.bucketize(magnitude, middles)
        return torch.where(up % 2 == 0, up, down).to(torch.uint8)

    def unpack(self, packed: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        codes, exponents = packed
        columns = shape[1]
        place = torch.arange(columns, device=codes.device)
        nibbles = (codes.int()[:, place >> 1] >> ((place & 1) << 2)) & 15
        signs = 1 - ((nibbles >> 3) << 1)
        exponent, mantissa = (
            (nibbles >> 1) & 3,
            nibbles & 1,
        )  # E2M1 by arithmetic: a tensor made here is none that a compiler takes
        magnitude = torch.ldexp(torch.where(exponent > 0, 2 + mantissa, mantissa).float(), exponent.clamp(min=1) - 2)
        scale = torch.exp2((exponents.int() - BIAS).float())[:, place >> 5]
        return (magnitude * signs * scale).to(dtype)

    def tensors(self, rows: int, columns: int) -> list[PackedTensor]:
        blocks = -(-columns // BLOCK)
        return [
            PackedTensor(torch.uint8, (rows, blocks * BLOCK // 2)),
            PackedTensor(torch.uint8, (rows, blocks)),
        ]


sparsify.formats.register(MXFP4())

RULES = {
    "s2ft": S2FT(structure="ffn", units=6),
    "paca": PaCA(rank=4),
    "rosa": RoSA(rank=4, density=0.05, mask="magnitude"),
    "lora": LoRA(rank=4),
}


class Block(nn.Module):
    """A residual feed-forward network."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + self.down(nn.functional.gelu(self.up(x_BD)))


def main() -> None:
    parser = argparse.ArgumentParser(description="A storage format of your own under any method")
    parser.add_argument(
        "--rule", choices=RULES, default="rosa", help="what trains beside the packed weights (default rosa)"
    )
    rule = RULES[parser.parse_args().rule]
    torch.manual_seed(0)
    model, x_BD, target_BD = nn.Sequential(Block(24, 80), Block(24, 80)), torch.randn(64, 24), torch.randn(64, 24)

    weight = model.get_parameter("0.up.weight").detach()
    packed = MXFP4().pack(weight)
    error = (MXFP4().unpack(packed, tuple(weight.shape), torch.float32) - weight).norm() / weight.norm()
    print(f"one weight: {packed_bytes(packed)} bytes instead of {weight.numel() * 4}, relative error {error:.3f}")

    def compiled() -> nn.Module:
        return sparsify.compile(model, Plan([Quantize("mxfp4"), rule]), example=(x_BD,), progress=False)

    host = compiled()
    print(host.sparsify.report)
    packed_base = host(x_BD).detach()
    optimizer = torch.optim.Adam([p for p in host.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(host(x_BD), target_BD)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"trained beside packed weights: loss {losses[0]:.3f} → {losses[-1]:.3f}")

    trained = host(x_BD).detach()
    with tempfile.TemporaryDirectory() as folder:
        host.sparsify.save_adapter(folder)
        again = compiled()
        again.sparsify.load_adapter(folder, "mine")
        again.sparsify.set_adapter("mine")
        print(f"saved and loaded: {torch.equal(again(x_BD), trained)}")
    host.sparsify.merge()
    moved = (host(x_BD) - trained).norm() / trained.norm()
    host.sparsify.unmerge()
    print(f"merged into packed weights, outputs moved by {moved:.3f}; unmerged: {torch.equal(host(x_BD), trained)}")
    host.sparsify.set_adapter(None)
    print(f"without the adapter, the packed base again: {torch.equal(host(x_BD), packed_base)}")


if __name__ == "__main__":
    main()
