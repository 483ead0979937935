"""The whole-model pruning benchmark in its small shape: what it says about the written files is true, and it goes on after a kill."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.benchmarks, pytest.mark.slow]  # minutes on one core

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import prune_model  # noqa: E402


def run(folder: Path, *options: str) -> dict:
    command = [
        sys.executable,
        "benchmarks/prune_model.py",
        "--fast",
        "--threads",
        "1",
        "--folder",
        str(folder),
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_blocks_times_memory_and_zeros(tmp_path: Path) -> None:
    killed = run(tmp_path, "--methods", "wanda", "--minutes", "0")["rows"][0]
    assert (killed["complete"], killed["blocks"]) == (False, 0)
    record = run(tmp_path, "--methods", "wanda", "sparsegpt", "--sparsity", "0.5")
    assert str(tmp_path) not in json.dumps(record)
    wanda, sparsegpt = record["rows"]
    assert (wanda["starts"], sparsegpt["starts"]) == (2, 1)
    for row in (wanda, sparsegpt):
        assert row["complete"]
        assert row["blocks"] == 3
        assert row["zeros"] == pytest.approx(0.5, abs=1e-3)
        assert 0 < row["own MiB"] < row["resident MiB"] < 4096
        assert all(row[f"{leaf} s"] > 0 for leaf in prune_model.LEAVES)
        assert row["block s"] > 0
    assert sparsegpt["relative error"] < wanda["relative error"]
    name = "model.layers.1.mlp.up_proj.weight"
    with safe_open(tmp_path / "wanda" / "model-model-layers-1.safetensors", framework="pt") as file:
        assert float((file.get_tensor(name) == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_files_that_are_not_what_was_reported_are_found(tmp_path: Path) -> None:
    run(tmp_path, "--methods", "magnitude")
    dense, target = tmp_path / "dense", tmp_path / "magnitude"
    assert prune_model.check_files(dense, target, True)["blocks"] == 3
    shard = target / "model-model-layers-2.safetensors"
    tensors, name = load_file(shard), "model.layers.2.mlp.down_proj.weight"
    weight = tensors[name].clone()
    tensors[name] = weight * 2
    save_file(tensors, shard)
    with pytest.raises(SystemExit, match="survivors of .*down_proj"):
        prune_model.check_files(dense, target, True)
    weight[weight == 0] = 1
    tensors[name] = weight
    save_file(tensors, shard)
    with pytest.raises(SystemExit, match=r"down_proj\.weight has 0 zeros, but 0\.5"):
        prune_model.check_files(dense, target, True)


def test_the_default_shape_is_llama_2_7b(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import LlamaForCausalLM

    seen: list[argparse.Namespace] = []

    def stop(_folder: Path, arguments: argparse.Namespace) -> None:
        seen.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_model, "write_model", stop)
    monkeypatch.setattr(sys, "argv", ["prune_model.py", "--folder", "unused"])
    with pytest.raises(KeyboardInterrupt):
        prune_model.main()
    with torch.device("meta"):
        model = LlamaForCausalLM(prune_model.llama_config(seen[0]))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
