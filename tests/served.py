"""What tests of serving stand on: a small model, adapters with every kind of delta, and what each writes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_folder
import torch
import transformers as hf
from torch import Tensor

from sparsify.adapters.adapter import Adapter, Delta, save, tensor_hash

BASE = "__base__"
NAMES = (BASE, "s2ft", "lora", "paca", "rosa")
LONG = [1, *(6 + i % 17 for i in range(39))]
"""A prompt of more tokens than a page of keys and values holds."""


def write(path: Path, **sizes: Any) -> Path:
    """path/model, and path/adapters/<name> as training would leave them: columns, factors, entries, of both layers."""
    small_folder.write_model(path / "model", **sizes)
    state = model_of(path).state_dict()
    for seed, name in enumerate(NAMES[1:]):
        write_adapter(path / "adapters" / name, state, name, seed)
    return path


def write_adapter(folder: Path, state: dict[str, Tensor], kind: str, seed: int, scale: float = 0.5) -> Path:
    """An adapter of one method. state: of the model."""
    random = torch.Generator().manual_seed(seed)
    leaf = {
        "s2ft": "mlp.down_proj",
        "lora": "self_attn.q_proj",
        "paca": "self_attn.v_proj",
        "rosa": "self_attn.o_proj",
    }[kind]
    deltas: list[Delta] = []
    for param in [name for name in state if name.endswith(f"{leaf}.weight")]:
        rows, cols = state[param].shape

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random) * scale

        def some(count: int, of: int) -> Tensor:
            return torch.randperm(of, generator=random)[:count].sort().values

        none = torch.empty(0, dtype=torch.int64)
        if kind in ("s2ft", "paca"):
            deltas.append(Delta(param, "column", some(5, cols), values(rows, 5)))
        else:
            deltas.append(Delta(param, "lora", none, values(rows, 3), a=values(3, cols)))
        if kind == "rosa":
            deltas.append(Delta(param, "sparse", some(17, rows * cols), values(17)))
    return save(Adapter(tuple(deltas), {d.param: tensor_hash(state[d.param]) for d in deltas}), folder)


def model_of(path: Path) -> Any:
    return hf.LlamaForCausalLM.from_pretrained(path / "model").eval()


def alone(host: Any, name: str, ids: list[int], count: int, endless: bool = True) -> list[int]:
    """Tokens that `generate` writes after a prompt when nothing else runs."""
    inputs = torch.tensor([ids])
    found = host.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, adapter_names=[name], pad_token_id=0,
        eos_token_id=None if endless else 2,
    )  # fmt: skip
    return found[0, len(ids) :].tolist()
