"""Rows of one batch, each with an adapter of its own: `vmap` over stacked parameters is what switching adapters must compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from sparsify import S2FT, LoRA, PaCA, RoSA

ADAPTERS: tuple[Any, ...] = ("a", "b", None, {"a": 0.5, "b": 0.25})


@pytest.mark.parametrize(
    "rule",
    [
        S2FT(structure="both", units=1, producer_fraction=0.3),
        PaCA(match="*.q_proj", rank=3),
        RoSA(match="*_proj", rank=2, density=0.05, mask="random"),
        LoRA(match="*.down_proj", rank=2),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_each_row_with_its_adapter_is_vmap_over_stacked_parameters(rule: Any, tmp_path: Path) -> None:
    host: Any = tiny.lower(tiny.llama(torch.float64), rule)
    handle = host.sparsify
    start = copy.deepcopy({n: p.detach() for n, p in host.named_parameters() if p.requires_grad})
    for number, name in enumerate("ab"):
        with torch.no_grad():
            for n, p in host.named_parameters():
                if n in start:
                    p.copy_(start[n])
        tiny.disturb(host, 0.2, seed=number)
        handle.save_adapter(tmp_path / name)
    for name in "ab":
        handle.load_adapter(tmp_path / name, name)
    tokens = tiny.tokens(len(ADAPTERS))
    rows, folded = [], []
    for number, adapter in enumerate(ADAPTERS):
        handle.set_adapter(adapter)
        with torch.no_grad():
            rows.append(host(input_ids=tokens[number : number + 1], use_cache=False).logits)
        folded.append(handle.plain())
    parameters, buffers = stack_module_state(folded)
    skeleton = copy.deepcopy(folded[0]).to("meta")

    def one(parameters: Any, buffers: Any, row: torch.Tensor) -> torch.Tensor:
        return functional_call(
            skeleton, (parameters, buffers), kwargs={"input_ids": row[None], "use_cache": False}
        ).logits

    with torch.no_grad():
        expected = vmap(one)(parameters, buffers, tokens)
    found = torch.stack(rows)
    assert isinstance(skeleton, nn.Module)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-12 * scale
    for i in range(len(ADAPTERS)):  # and every adapter computes something else, so that none was confused with another
        for j in range(i):
            with torch.no_grad():
                other = functional_call(
                    skeleton,
                    ({k: v[j] for k, v in parameters.items()}, {k: v[j] for k, v in buffers.items()}),
                    kwargs={"input_ids": tokens[i : i + 1], "use_cache": False},
                ).logits
            assert float((other - expected[i]).abs().max()) > 1e-6 * scale
