"""The fine-tuning methods that the demo compares, each as: encoder in, encoder with trainable parameters out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import sparsify
from sparsify import S2FT, LoRA, Plan
from sparsify.plan import Rule

FFN_FRACTION, ATTENTION_FRACTION, LORA_RANK = 0.03, 0.1, 4
"""Chosen so that S2FT and LoRA train about the same number of parameters (0.18 M and 0.17 M of 22.6 M)."""


def s2ft_plan(seed: int) -> Plan:
    """3 % of the feed-forward channels (46 of 1536) and one of twelve heads in every layer, drawn from the seed."""
    rules: list[Rule] = [
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
        spacing (half a decade), the same seed, and a quarter of the *training* texts to judge by; held-out texts are
        never seen.
    """

    name: str
    label: str
    prepare: Callable[[nn.Module, int], nn.Module]
    save: Callable[[nn.Module, Path], None]
    lr: float
    rates: tuple[float, ...]


def prepare_s2ft(encoder: nn.Module, seed: int) -> nn.Module:
    return sparsify.compile(encoder, s2ft_plan(seed))


def save_adapter(encoder: nn.Module, directory: Path) -> None:
    encoder.sparsify.save_adapter(directory)  # type: ignore[union-attr]


def prepare_full(encoder: nn.Module, seed: int) -> nn.Module:
    return encoder.requires_grad_(True)


def save_full(encoder: nn.Module, directory: Path) -> None:
    encoder.save_pretrained(directory)  # type: ignore[operator]


def prepare_lora(encoder: nn.Module, seed: int) -> nn.Module:
    """LoRA on every linear of the encoder, α = 2 r."""
    return sparsify.compile(encoder, Plan([LoRA(match="*", rank=LORA_RANK)], seed=seed))


METHODS = {
    "s2ft": Method("s2ft", "S2FT", prepare_s2ft, save_adapter, 3e-3, (3e-4, 1e-3, 3e-3, 1e-2)),
    "lora": Method("lora", f"LoRA r={LORA_RANK}", prepare_lora, save_adapter, 1e-3, (3e-4, 1e-3, 3e-3, 1e-2)),
    "full": Method("full", "full fine-tuning", prepare_full, save_full, 1e-4, (3e-5, 1e-4, 3e-4, 1e-3)),
}


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def directory_bytes(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
