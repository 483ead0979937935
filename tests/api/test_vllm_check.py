"""`export_lora(engine="vllm")`: what vLLM takes is written, what it would refuse is refused before a file is there, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_folder
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, RoSA
from sparsify.adapters.vllm_check import RANKS, check_for_vllm, served_rank
from sparsify.errors import AdapterError

LLAMA = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}


def factors(module: str, rank: int = 4, inputs: int = 16, outputs: int = 24) -> dict[str, tuple[int, ...]]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}


def model() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(small_folder.config()).eval()


def host_of(*rules: Any, train: list[str] | None = None, of: Any = None) -> Any:
    host: Any = sparsify.compile(of or model(), Plan(list(rules), train=train or []))
    tiny.disturb(host, 0.3)
    return host


def test_the_smallest_rank_that_serves() -> None:
    assert [served_rank(r) for r in (1, 8, 9, 256, 257, 321, 512)] == [8, 8, 16, 256, 320, 512, 512]
    assert served_rank(513) is None
    assert served_rank(None) is None
    assert list(RANKS) == sorted(RANKS)


def test_ranks_and_padding_of_every_linear() -> None:
    shapes = factors("a.q_proj", 12, 16, 24) | factors("a.down_proj", 3, 40, 16)
    found = check_for_vllm(LLAMA | {"base_model_name_or_path": "/some where/base"}, shapes)
    assert found.fine
    assert [(layer.module, layer.rank) for layer in found.layers] == [("a.q_proj", 12), ("a.down_proj", 3)]
    assert (found.rank, found.max_lora_rank) == (12, 16)
    assert found.padding() == pytest.approx(16 * (40 + 56) / (12 * 40 + 3 * 56) - 1)
    assert "a.down_proj: rank 3, 13 rows of padding" in str(found)
    line = found.command("mine", "/ad apters/mine")
    assert (
        line == "vllm serve '/some where/base' --enable-lora --max-lora-rank 16 --lora-modules 'mine=/ad apters/mine'"
    )


@pytest.mark.parametrize(
    ("config", "shapes", "reason"),
    [
        ({}, factors("a.q_proj", 513), "more than vLLM's largest, 512"),
        ({"modules_to_save": ["lm_head"]}, {"base_model.model.lm_head.weight": (9, 16)}, "lm_head: it trained in full"),
        ({}, {"base_model.model.norm.weight": (16,)}, "norm.weight: it trained in full"),
        ({"bias": "lora_only"}, {"base_model.model.a.q_proj.base_layer.bias": (24,)}, "biases trained"),
        ({"fan_in_fan_out": True}, {}, "Conv1D"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, {}, "packed experts have another layout"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, {}, "single rows of an embedding"),
        ({"use_dora": True}, {"base_model.model.a.q_proj.lora_magnitude_vector.weight": (24,)}, "is DoRA"),
        ({}, {"base_model.model.embed.lora_embedding_A": (4, 9), "base_model.model.embed.lora_embedding_B": (16, 4)}, "some architectures"),
        ({}, {"base_model.model.c.lora_A.weight": (4, 3, 3, 3), "base_model.model.c.lora_B.weight": (8, 4, 1, 1)}, "is a convolution"),
        ({}, {"base_model.model.a.q_proj.lora_A.weight": (4, 16)}, "no lora_B that fits"),
        ({}, {"base_model.model.x.score.weight": (2, 9), "base_model.model.y.score.weight": (2, 9)}, "one head in full"),
        ({"peft_type": "IA3"}, {}, "it is IA3"),
    ],
)  # fmt: skip
def test_what_vllm_would_refuse(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    served = factors("a.k_proj")
    assert check_for_vllm(LLAMA, served).fine
    found = check_for_vllm(LLAMA | config, served | shapes)
    assert not found.fine
    assert reason in str(found)


def test_what_looks_alike_and_is_served() -> None:
    head = {"base_model.model.score.weight": (2, 16)}
    assert check_for_vllm(LLAMA | {"modules_to_save": ["score"]}, factors("a.q_proj") | head).fine
    assert check_for_vllm(LLAMA | {"rank_pattern": {"^a": 2}}, factors("a.q_proj") | factors("a.qkv_proj", 512)).fine
    assert not check_for_vllm(LLAMA, {}).fine
    assert not check_for_vllm(LLAMA, factors("a.q_proj"), model_type="bloom").fine
    assert check_for_vllm(LLAMA, factors("a.q_proj"), model_type="llama").fine
    too_small = check_for_vllm(LLAMA, factors("a.q_proj", 12) | factors("a.k_proj", 8), 8)
    assert [refusal.where for refusal in too_small.refusals] == ["a.q_proj"]
    assert "the server needs 16" in str(too_small)


@pytest.mark.parametrize(
    "rule",
    [
        S2FT(0.2, structure="ffn"),
        pytest.param(PaCA(5, match="o_proj"), marks=pytest.mark.slow),  # one-hot factors like S2FT's
        LoRA(3, match="q_proj"),
    ],
    ids=str,
)
def test_an_export_is_served(rule: Any, tmp_path: Path) -> None:
    host = host_of(rule)
    host.sparsify.export_lora(tmp_path / "peft")
    host.sparsify.export_lora(tmp_path / "vllm", engine="vllm")
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all((tmp_path / "peft" / n).read_bytes() == (tmp_path / "vllm" / n).read_bytes() for n in names)
    tensors = load_file(tmp_path / "vllm" / names[0])
    config = json.loads((tmp_path / "vllm" / names[1]).read_text())
    found = check_for_vllm(config, {n: tuple(t.shape) for n, t in tensors.items()}, model_type="llama")
    assert found.fine
    assert 2 * len(found.layers) == len(tensors)
    with pytest.raises(AdapterError, match="7 is none of vLLM's ranks"):
        host.sparsify.export_lora(tmp_path / "no", engine="vllm", max_lora_rank=7)
    assert not (tmp_path / "no").exists()


def test_nothing_is_written_of_what_vllm_would_refuse(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="vLLM would not take this adapter.*model.norm.*trained in full"):
        host_of(LoRA(3, match="q_proj"), train=["model.norm.weight"]).sparsify.export_lora(out, engine="vllm")
    rosa = host_of(RoSA(2, density=0.02, mask="magnitude", match="o_proj"), train=["model.norm.weight"])
    with pytest.raises(AdapterError, match="trained in full"):
        rosa.sparsify.export_lora(out, engine="vllm", sparse="merge")
    host = host_of(LoRA(9, match="q_proj"))
    with pytest.raises(AdapterError, match="rank 9 is more than --max-lora-rank 8; the server needs 16"):
        host.sparsify.export_lora(out, engine="vllm", max_lora_rank=8)
    with pytest.raises(AdapterError, match="engine must be 'peft' or 'vllm', got 'tgi'"):
        host.sparsify.export_lora(out, engine="tgi")
    with pytest.raises(AdapterError, match="max_lora_rank is a setting of vLLM's"):
        host.sparsify.export_lora(out, max_lora_rank=8)
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    with pytest.raises(AdapterError, match="model type 'gpt2': vLLM serves no adapters"):
        host_of(LoRA(3, match="c_attn"), of=gpt2).sparsify.export_lora(out, engine="vllm")
    assert not out.exists()
