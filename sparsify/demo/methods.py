"""The fine-tuning methods that the demo compares, each as: encoder in, encoder with trainable parameters out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsify
from sparsify import S2FT, Plan

FFN_FRACTION, ATTENTION_FRACTION, LORA_RANK = 0.03, 0.1, 4
"""Chosen so that S2FT and LoRA train about the same number of parameters (0.18 M and 0.17 M of 22.6 M)."""


def s2ft_plan(seed: int) -> Plan:
    """3 % of the feed-forward channels (46 of 1536) and one of twelve heads in every layer, drawn from the seed."""
    rules = [
        S2FT(structure="ffn", fraction=FFN_FRACTION),
        S2FT(structure="attention", fraction=ATTENTION_FRACTION),
    ]
    return Plan(rules, seed=seed)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    prepare: a pretrained encoder (it may be changed) and a seed → the encoder to train, everything else frozen.
    save: writes what training changed into a directory.
    lr: chosen with `python -m sparsify.demo --tune`, from `rates`: the same number of rates for each method, the same
        spacing (half a decade), the same seed, and a quarter of the *training* texts to judge by; held-out texts are never seen.
    """

    name: str
    label: str
    prepare: Callable[[nn.Module, int], nn.Module]
    save: Callable[[nn.Module, Path], None]
    lr: float
    rates: tuple[float, ...]


def prepare_s2ft(encoder: nn.Module, seed: int) -> nn.Module:
    return sparsify.compile(encoder, s2ft_plan(seed))


def save_s2ft(encoder: nn.Module, directory: Path) -> None:
    encoder.sparsify.save_adapter(directory)  # type: ignore[union-attr]


def prepare_full(encoder: nn.Module, seed: int) -> nn.Module:
    return encoder.requires_grad_(True)


def save_full(encoder: nn.Module, directory: Path) -> None:
    encoder.save_pretrained(directory)  # type: ignore[operator]


class LoRALinear(nn.Module):
    """`y = W x + b + (α/r) B A x`: A Kaiming-uniform, B zero, α = 2 r; the usual baseline, written out."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.base = base
        bound = 1 / math.sqrt(base.in_features)
        start = torch.rand(rank, base.in_features, generator=generator) * 2 * bound - bound
        self.lora_A = nn.Parameter(start)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * F.linear(F.linear(x, self.lora_A), self.lora_B)


def prepare_lora(encoder: nn.Module, seed: int) -> nn.Module:
    """LoRA on every linear of the encoder."""
    generator = torch.Generator().manual_seed(seed)
    encoder.requires_grad_(False)
    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            setattr(encoder.get_submodule(owner), leaf, LoRALinear(module, LORA_RANK, generator))
    return encoder


def save_lora(encoder: nn.Module, directory: Path) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().contiguous() for name, p in encoder.named_parameters() if p.requires_grad}
    save_file(tensors, directory / "adapter_model.safetensors")


METHODS = {
    "s2ft": Method("s2ft", "S2FT", prepare_s2ft, save_s2ft, 3e-3, (1e-3, 3e-3, 1e-2)),
    "lora": Method("lora", f"LoRA r={LORA_RANK}", prepare_lora, save_lora, 3e-3, (1e-3, 3e-3, 1e-2)),
    "full": Method("full", "full fine-tuning", prepare_full, save_full, 1e-4, (3e-5, 1e-4, 3e-4)),
}


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def directory_bytes(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
