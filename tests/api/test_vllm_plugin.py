"""What the vLLM plugin does with a loaded weight and with options; vLLM itself is asked in e2e/test_vllm.py."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
import torch

from sparsify.errors import PlanError, Refusal
from sparsify.lowering.cpu.options import CpuOptions
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.lowering.vllm_plugin import options_of, packed


def weight(rows: int, cols: int, share: float) -> torch.Tensor:
    made = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    made[torch.rand(rows, cols, generator=torch.Generator().manual_seed(2)) < share] = 0
    return made


def test_a_pruned_weight_is_packed_and_a_dense_one_is_not() -> None:
    sparse, small = weight(96, 64, 0.75), CpuOptions(mode="small", tokens=(1, 3))
    found = packed("model.layers.0.mlp.gate_up_proj", sparse, small)
    assert isinstance(found, SparseLinear)
    assert found.bias is None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    exact = x.double() @ sparse.double().t()
    bound = 66 * torch.finfo(torch.float32).eps * (x.double().abs() @ sparse.double().abs().t())
    assert bool(((found(x).double() - exact).abs() <= bound).all())
    dense = packed("q_proj", weight(96, 64, 0.0), small)
    assert isinstance(dense, Refusal)
    assert str(dense) == "q_proj: only 0% of its weights are zero; dense is faster below 20 %"


def test_options_of_a_checkpoint() -> None:
    assert options_of({"quant_method": "sparsify"}) == CpuOptions()
    assert options_of({"quant_method": "sparsify", "mode": "small", "tokens": [1, 16]}) == CpuOptions(
        mode="small", tokens=(1, 16)
    )
    with pytest.raises(PlanError, match="has a field 'bits'; it takes mode, tokens, int8_activations"):
        options_of({"quant_method": "sparsify", "bits": 4})
    with pytest.raises(PlanError, match="expected 'fast' or 'small'"):
        options_of({"mode": "quick"})


def test_the_entry_point_is_there() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, place),) = project["entry-points"]["vllm.general_plugins"].items()
    module, _, function = place.partition(":")
    assert name == "sparsify"
    assert callable(getattr(importlib.import_module(module), function))
