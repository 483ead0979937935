"""On a CUDA device: every operator against its fp64 oracle in bf16 and fp32, and one training step of each method."""

from __future__ import annotations

import pytest
import tiny
import torch

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, RoSA
from sparsify.lowrank_ops import oracle_weight
from sparsify.ops import oracle_partial_linear, oracle_partial_linear_backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp_min(1e-9)
    assert float((found.double().cpu() - expected).abs().max() / scale) < BOUND[dtype]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_linear(axis, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 65, 129).to(dtype), torch.randn(77, 129).to(dtype)
    block = torch.randn(*((77, 13) if axis else (13, 129)))
    g = torch.randn(3, 65, 77).to(dtype)
    leaf_x, leaf_block = x.cuda().requires_grad_(), block.cuda().requires_grad_()
    y = torch.ops.sparsify.partial_linear(leaf_x, weight.cuda(), None, leaf_block, 5, axis)
    y.backward(g.cuda())
    channels, rounded = torch.arange(5, 18), block.to(dtype).double()
    close(y.detach(), oracle_partial_linear(x.double(), weight.double(), None, rounded, channels, axis), dtype)
    dx, d_block, _ = oracle_partial_linear_backward(g.double(), x.double(), weight.double(), rounded, channels, axis)
    close(leaf_x.grad, dx, dtype)
    close(leaf_block.grad, d_block, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_lowrank_linear(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(130, 96).to(dtype), torch.randn(70, 96).to(dtype)
    index = torch.randperm(70 * 96)[:41].sort().values.int()
    values, a, b = torch.randn(41), torch.randn(4, 96), torch.randn(70, 4)
    leaves = [t.cuda().requires_grad_() for t in (values, a, b)]
    y = torch.ops.sparsify.sparse_lowrank_linear(
        x.cuda(), weight.cuda(), None, leaves[0], index.cuda(), leaves[1], leaves[2], 0.5, False
    )
    y.float().square().mean().backward()
    parts = [t.to(dtype).double() for t in (values, a, b)]
    dense = oracle_weight(weight.double(), parts[0], index, parts[1], parts[2], 0.5)
    close(y.detach(), x.double() @ dense.t(), dtype)
    assert all(torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize(
    "rule",
    [S2FT(units=2), PaCA(rank=3), LoRA(rank=2), RoSA(rank=2, density=0.02, mask="random")],
    ids=lambda r: type(r).__name__,
)
def test_a_step_on_the_device_moves_what_trains(rule):
    host = sparsify.compile(tiny.llama().cuda(), Plan([rule]), progress=False)
    trained = [p for p in host.parameters() if p.requires_grad]
    assert all(p.is_cuda for p in trained)
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    for _ in range(2):
        tiny.probe_loss(host(tiny.tokens().cuda())).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
