"""The gradient of a trained block is the full gradient of the original model on the chosen channels, for any selection."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify import S2FT


@functools.cache
def full_gradients(name: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The original model in fp64 and its dense gradients, by plain autograd."""
    model = tiny.build(name, torch.float64)
    tiny.probe_loss(model(**inputs(model, name))).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return model, gradients


def inputs(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    cast = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return {k: cast(v) for k, v in tiny.inputs_of(model, name).items()}


@pytest.mark.parametrize("name", tiny.FAMILIES)
@settings(max_examples=3)
@given(fraction=st.floats(0.01, 0.9), producers=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 1000))
def test_block_gradient_is_the_masked_full_gradient(name, fraction, producers, seed):
    model, expected = full_gradients(name)
    host = tiny.lower(model, S2FT(fraction=fraction, producer_fraction=producers), seed=seed)
    tiny.probe_loss(host(**inputs(model, name))).backward()
    handle = host.sparsify
    assert handle.program.slices
    for piece in handle.program.slices:
        module = handle.module(piece.param)
        block = module.weight_slice.grad
        # put the block's gradient into a tensor of the stored shape, then back into original order with the layout
        stored = torch.zeros(expected[piece.param].shape, dtype=torch.float64)
        piece.write(stored, block)
        found = handle.layout(piece.param).to_original("weight", stored)
        mask = torch.zeros_like(stored)
        mask.index_fill_(piece.axis, torch.tensor(piece.channels), 1.0)
        full = expected[piece.param]
        scale = float(full.abs().max())
        assert scale > 0
        torch.testing.assert_close(found, full * mask, atol=1e-11 * scale, rtol=1e-9)
    frozen = {n for n, p in host.named_parameters() if not n.endswith("_slice")}
    assert all(host.get_parameter(n).grad is None for n in frozen)
    assert all(p.grad is None for p in model.parameters())
