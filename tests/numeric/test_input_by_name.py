"""Trained linears are `nn.Linear`s: a host that calls `self.proj(input=x)` still can."""

from __future__ import annotations

import pytest
import torch
from methods import compiled

from sparsify import S2FT, LoRA, Quantize
from sparsify.methods.channels import PartialLinear
from sparsify.methods.packed import QuantizedLinear
from sparsify.methods.sparse_lowrank import SparseLowRankLinear

CASES = {
    "channels": ((S2FT(structure="ffn", fraction=0.2),), PartialLinear),
    "low rank": ((LoRA(match="*.down_proj", rank=2),), SparseLowRankLinear),
    "packed": ((LoRA(match="*.down_proj", rank=2), Quantize("nf4", match="*.down_proj")), QuantizedLinear),
}


@pytest.mark.parametrize("case", CASES)
def test_the_input_may_be_named_as_in_a_plain_linear(case):
    rules, kind = CASES[case]
    found = [module for module in compiled(*rules, calibrate=False).modules() if isinstance(module, kind)]
    assert found
    for module in found:
        x = torch.randn(3, module.in_features)
        assert torch.equal(module(input=x), module(x))
