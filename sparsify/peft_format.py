"""Exact export to PEFT's LoRA directory: a slice delta is a low-rank matrix with a one-hot factor.

columns   ΔW = Δ · onehot(channels)      lora_B = Δ (n, s)            lora_A = one-hot rows (s, m)
rows      ΔW = onehot(channels)ᵀ · Δ     lora_B = one-hot columns     lora_A = Δ (s, m)
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.adapter import Adapter, Delta
from sparsify.errors import AdapterError
from sparsify.files import kinds
from sparsify.files.atomic import committing
from sparsify.files.tensors import write_tensors
from sparsify.passes.assign_rules import is_conv1d

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def lora_factors(delta: Delta, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`(A (r, in), B (out, r))` with `B A` equal to the delta; `shape` is the logical `(out, in)`."""
    values = delta.values.float()
    if delta.kind == "lora":
        assert delta.a is not None
        return delta.a.float(), values * delta.scale
    size = shape[1] if delta.kind == "column" else shape[0]
    onehot = torch.zeros(delta.rank, size)
    onehot[torch.arange(delta.rank), delta.channels] = 1.0
    return (onehot, values) if delta.kind == "column" else (values, onehot.t().contiguous())


def export(
    adapter: Adapter, shapes: dict[str, torch.Size], directory: str | os.PathLike[str], base: str | None
) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` so that PEFT loads the same function."""
    path = Path(directory)
    kinds.refuse_beside(path, kinds.PEFT, "adapter_config.json", AdapterError)
    if not adapter.deltas:
        raise AdapterError("export_lora: the adapter is empty")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    saved_modules: list[str] = []
    fan_in_fan_out = False
    for delta in adapter.deltas:
        module, _, leaf = delta.param.rpartition(".")
        if delta.kind == "full":
            saved_modules.append(module)
            tensors[f"base_model.model.{module}.{leaf}"] = delta.values.float().contiguous()
            continue
        fan_in_fan_out |= delta.transposed
        stored = tuple(shapes[delta.param])
        logical = (stored[1], stored[0]) if delta.transposed else (stored[0], stored[1])
        a, b = lora_factors(delta, logical)
        prefix = f"base_model.model.{module}."
        if prefix + "lora_A.weight" in tensors:
            a = torch.cat([tensors[prefix + "lora_A.weight"], a])
            b = torch.cat([tensors[prefix + "lora_B.weight"], b], dim=1)
        tensors[prefix + "lora_A.weight"], tensors[prefix + "lora_B.weight"] = a.contiguous(), b.contiguous()
        ranks[module] = a.shape[0]
    top = max(ranks.values(), default=1)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": top,
        "lora_alpha": top,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(set(saved_modules)) or None,
        "rank_pattern": {m: r for m, r in ranks.items() if r != top},
        "alpha_pattern": {m: r for m, r in ranks.items() if r != top},
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    with committing() as commit:  # what PEFT looks for first appears last
        write_tensors(path / "adapter_model.safetensors", tensors, {"format": "pt"}, commit)
        with commit.writing(path / "adapter_config.json") as file:
            file.write(json.dumps(config, indent=2).encode())
    return path


def is_peft(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (Path(directory) / "adapter_config.json").is_file()


def read(directory: str | os.PathLike[str], host: nn.Module) -> Adapter:
    """Read a PEFT LoRA directory as an adapter of low-rank deltas; AdapterError for other adapter types or damaged files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(directory)
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{path}: not a readable PEFT adapter ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: a PEFT adapter of type {config.get('peft_type')!r}; only LORA can be read")
    for feature in ("use_dora", "lora_bias"):
        if config.get(feature):
            raise AdapterError(f"{path}: {feature} is set, which is not a plain low-rank change")
    prefix, deltas = "base_model.model.", []
    names = sorted({k.rpartition(".lora_")[0] for k in tensors if ".lora_" in k})
    for name in names:
        a, b = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(f"{path}: {name}: lora_A and lora_B are missing or do not fit")
        module = name.removeprefix(prefix)
        rank = a.shape[0]
        alpha = pattern_entry(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        try:
            transposed = is_conv1d(host.get_submodule(module))
        except AttributeError:
            raise AdapterError(f"{path}: the model has no module {module!r}") from None
        empty = torch.empty(0, dtype=torch.int64)
        deltas.append(Delta(f"{module}.weight", "lora", empty, b.float(), transposed, a.float(), float(scale)))
    for key, value in tensors.items():
        if ".lora_" not in key:
            deltas.append(Delta(key.removeprefix(prefix), "full", torch.empty(0, dtype=torch.int64), value))
    if not deltas:
        raise AdapterError(f"{path}: the file holds no LoRA factors")
    return Adapter(tuple(deltas), {}, {"peft": config})


def pattern_entry(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rank and alpha patterns: keys are regular expressions over the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
