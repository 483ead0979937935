"""The two methods that the language model demo compares, at exactly the same number of trained parameters."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import S2FT, LoRA, Plan
from sparsify.plan import Rule

CHANNELS, HEADS, RANK = 42, 1, 6
"""Per layer of SmolLM2: (42 channels + 64 of one head) × 576 = 61,056 = rank 6 on all seven linears; 1,831,680 in 30 layers."""


@dataclass(frozen=True)
class LanguageMethod:
    """lr: from a pilot of 40 steps, in which both reached about the same share of right answers; `python -m sparsify.demo --tune` tries
    `rates`, by answer loss on validation questions."""

    label: str
    rules: tuple[Rule, ...]
    lr: float
    rates: tuple[float, ...] = (3.5e-4, 7e-4, 1e-3, 2e-3)

    def plan(self, seed: int) -> Plan:
        return Plan(list(self.rules), seed=seed)


METHODS = {
    "s2ft": LanguageMethod(
        "S2FT", (S2FT(structure="ffn", units=CHANNELS), S2FT(structure="attention", units=HEADS)), 1e-3
    ),
    "lora": LanguageMethod(f"LoRA r={RANK}", (LoRA(match="*", rank=RANK),), 7e-4),
}
