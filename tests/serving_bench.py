"""A small base, adapters of every method in folders, and the plain model that each of them makes of it."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, RoSA
from sparsify.adapters import adapter as files
from sparsify.adapters.adapter import Adapter
from sparsify.model.linears import is_conv1d, is_plain_linear, logical_weight
from sparsify.program import canonical_names

BASE = "__base__"
PLANS: dict[str, list[Any]] = {
    "s2ft": [S2FT(0.2, producer_fraction=0.1, budget="structure")],
    "paca": [PaCA(4)],
    "rosa": [RoSA(4, mask="random", density=0.03)],
    "lora": [LoRA(4, alpha=3)],
    "mixed": [S2FT(0.2, structure="ffn"), RoSA(match="*o_proj", rank=2, mask="magnitude"), PaCA(3, match="*q_proj")],
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Bench:
    """A base, adapters of it in folders, and the plain model that each of them makes of it."""

    def __init__(
        self, folder: Path, family: str = "Llama", plans: dict[str, list[Any]] = PLANS, **settings: Any
    ) -> None:
        self.model = tiny.build(family)
        self.folder = folder
        self.alone: dict[str, nn.Module] = {BASE: self.model}
        for name, rules in plans.items():
            trained = tiny.lower(copy.deepcopy(self.model), *rules)
            tiny.disturb(trained)
            trained.sparsify.save_adapter(folder / name)
            self.alone[name] = trained.sparsify.plain().eval()
        self.settings: dict[str, Any] = {"slots": 8, "budget": "16MiB", "timeout": 20.0, **settings}

    def host(self, **changes: Any) -> Any:
        folders = {name: self.folder / name for name in self.alone if name != BASE}
        return sparsify.serve(self.model, folders, **{**self.settings, **changes})

    def check_rows(self, logits: Tensor, names: list[str], batch: dict[str, Tensor]) -> None:
        """Every row is what its adapter alone computes, and not the base."""
        for row, name in enumerate(names):
            own = {key: value[row : row + 1] for key, value in batch.items()}
            with torch.no_grad():
                wanted, base = self.alone[name](**own).logits[0], self.model(**own).logits[0]
            torch.testing.assert_close(logits[row], wanted, rtol=2e-6, atol=2e-6)
            assert (name == BASE) == bool(float((wanted - base).abs().max()) < 1e-4)


def write_random(model: nn.Module, folder: Path, kind: str, seed: int) -> nn.Module:
    """An adapter of one kind of change over every linear, without a trace, and the model that `sparsify.load` makes of it."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: 0.1 * torch.randn(shape, generator=generator)  # noqa: E731
    names = canonical_names(model)
    looked_up = {names[f"{n}.weight"] for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    deltas, bases = [], {}
    for path, module in model.named_modules():
        param = f"{path}.weight"
        if not is_plain_linear(module) or names[param] != param or param in looked_up:
            continue
        turned = is_conv1d(module)
        n, m = logical_weight(module).shape
        places = torch.randperm({"column": m, "row": n, "sparse": n * m, "lora": 1}[kind], generator=generator)[:3]
        shape = {"column": (n, places.numel()), "row": (places.numel(), m), "sparse": places.shape, "lora": (n, 2)}[
            kind
        ]
        a = random(2, m) if kind == "lora" else None
        channels = torch.empty(0, dtype=torch.int64) if kind == "lora" else places.sort().values
        deltas.append(files.Delta(param, kind, channels, random(*shape), turned, a, 1.5 if kind == "lora" else 1.0))
        bases[param] = files.tensor_hash(module.get_parameter("weight"))
    files.save(Adapter(tuple(deltas), bases), folder)
    return sparsify.load(model, folder)


def shared(factory: pytest.TempPathFactory) -> Bench:
    """One for all tests of a process: Llama, every plan, and RoSA's values in 16 bits, as people keep adapters."""
    return made(factory.getbasetemp() / "serving")


@functools.cache
def made(folder: Path) -> Bench:
    bench = Bench(folder)
    loaded = files.load(folder / "rosa")
    half = [replace(d, values=d.values.bfloat16(), a=None if d.a is None else d.a.bfloat16()) for d in loaded.deltas]
    files.save(Adapter(tuple(replace(d, exact=None) for d in half), loaded.bases, loaded.info), folder / "half")
    bench.alone["half"] = sparsify.load(bench.model, folder / "half")
    return bench
