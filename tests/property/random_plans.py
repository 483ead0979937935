"""Random plans over the zoo, and what a fresh process makes of the adapters that they trained.

`trained(number)` draws plan, family and dtype from the number alone, so that the process that loads builds the same host.
Run as a script it reads a folder of adapters and prints, per number, the digest of the outputs after loading.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
import trace_cache
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, Quantize, RoSA

FAMILIES = ("Llama", "Qwen2", "GPT-2", "GPT-NeoX", "Phi-3", "T5 (gated)", "BERT (classifier)", "ViT", "plain modules")
#: one rule for everything, or one for each of the two layers that every family here has
PARTS = (("*",), ("*",), ("*.0.*", "*.1.*"))


@dataclass(frozen=True)
class Drawn:
    """One draw. exact: the base is not packed, so that `restore` gives its bits back."""

    family: str
    dtype: torch.dtype
    plan: Plan
    exact: bool


def draw(number: int) -> Drawn:
    dice = random.Random(number)
    family = dice.choice(FAMILIES)
    rules: list[Any] = []
    structures = ("ffn",) if family == "plain modules" else ("ffn", "attention", "both")
    for match in dice.choice(PARTS):
        kind = dice.choice(("s2ft", "s2ft", "paca", "rosa", "lora"))
        if kind == "s2ft":
            rules.append(
                S2FT(
                    structure=dice.choice(structures), fraction=dice.choice((0.05, 0.2, 0.5)), match=match,
                    producer_fraction=dice.choice((0.0, 0.0, 0.2)), select=dice.choice(("random", "weight")), permute=dice.random() < 0.8,
                )
            )  # fmt: skip
        elif kind == "paca":
            rules.append(PaCA(rank=dice.choice((1, 3)), match=match, select=dice.choice(("random", "weight"))))
        elif kind == "rosa":
            mask = dice.choice(("random", "magnitude"))
            rules.append(RoSA(rank=dice.choice((0, 2)), density=dice.choice((0.01, 0.1)), mask=mask, match=match))
        else:
            rules.append(LoRA(rank=dice.choice((1, 3)), match=match, rslora=dice.random() < 0.3))
    packed = dice.random() < 0.2
    if packed:
        rules.insert(0, Quantize(format=dice.choice(("nf4", "int8", "int4")), match=dice.choice(("*", "*.0.*"))))
    train = ("*norm*",) if dice.random() < 0.15 and family != "plain modules" else ()
    dtype = torch.bfloat16 if dice.random() < 0.3 and family != "plain modules" else torch.float32
    return Drawn(family, dtype, Plan(rules, seed=number, train=train), not packed)


def base_of(drawn: Drawn) -> tuple[nn.Module, dict[str, Any] | tuple[Tensor, ...]]:
    if drawn.family == "plain modules":
        torch.manual_seed(0)
        return tiny.Mlp().eval(), (torch.randn(4, 12, generator=torch.Generator().manual_seed(1)),)
    model = tiny.build(drawn.family, drawn.dtype)
    inputs = tiny.inputs_of(model, drawn.family)
    cast = lambda v: v.to(drawn.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return model, {n: cast(v) for n, v in inputs.items()}


def compiled(drawn: Drawn) -> tuple[Any, nn.Module, Any]:
    """`(host, base, inputs)`; raises SparsifyError for a plan that serves nothing."""
    model, inputs = base_of(drawn)
    return sparsify.compile(model, drawn.plan, example=inputs, progress=False), model, inputs


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return tiny.output_of(found)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def loaded_digest(number: int, folder: Path) -> str:
    """What a fresh process computes with the adapter of a number."""
    host, _, inputs = compiled(draw(number))
    host.eval()
    host.sparsify.load_adapter(folder / str(number), "again")
    host.sparsify.set_adapter("again")
    return digest(outputs(host, inputs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    trace_cache.install()
    where = Path(sys.argv[1])
    print(json.dumps({n: loaded_digest(int(n), where) for n in sys.argv[2:]}))
