"""`sparsify::lowrank_embedding` against its written-out oracle in fp64."""

from __future__ import annotations

import pytest
import torch

from sparsify.ops.lowrank_embedding import oracle_lowrank_embedding, oracle_lowrank_embedding_backward

V, D, R, SCALE = 13, 7, 3, 0.7
op = torch.ops.sparsify.lowrank_embedding


@pytest.mark.parametrize("shape", [(40,), (2, 3, 5), (0, 4), ()], ids=str)
@pytest.mark.parametrize("padding", [-1, 4])
def test_forward_and_backward_equal_the_oracle(shape, padding):
    ids, weight = torch.randint(0, V, shape), torch.randn(V, D, dtype=torch.float64)
    a = torch.randn(R, D, dtype=torch.float64, requires_grad=True)
    b = torch.randn(V, R, dtype=torch.float64, requires_grad=True)
    y = op(ids, weight, a, b, SCALE, padding)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, oracle_lowrank_embedding(ids, weight, a.detach(), b.detach(), SCALE), **close)
    g = torch.randn_like(y)
    y.backward(g)
    d_a, d_b = oracle_lowrank_embedding_backward(g, ids, a.detach(), b.detach(), SCALE, padding)
    torch.testing.assert_close(a.grad, d_a, **close)
    torch.testing.assert_close(b.grad, d_b, **close)


def test_over_16_bits_the_factors_keep_32():
    ids, weight = torch.randint(0, V, (9,)), torch.randn(V, D).bfloat16()
    a, b = torch.randn(R, D, requires_grad=True), torch.randn(V, R, requires_grad=True)
    y = op(ids, weight, a, b, SCALE, -1)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    want = oracle_lowrank_embedding(ids, weight.double(), a.detach().double(), b.detach().double(), SCALE)
    rounding = 3 * torch.finfo(torch.bfloat16).eps  # of the low-rank part, of the sum, and of the weight's own last bit
    size = weight.double().abs()[ids] + SCALE * (b.detach().abs() @ a.detach().abs()).double()[ids]
    assert bool(((y.double() - want).abs() <= rounding * size).all())


def test_what_does_not_fit_is_refused():
    weight, a, b = torch.randn(V, D), torch.randn(R, D), torch.randn(V, R)
    for given, words in (
        ((weight, a[:, 1:], b), "do not fit"),
        ((weight, a, b[1:]), "do not fit"),
        ((weight, a[1:], b), "do not fit"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(torch.tensor([1]), *given, 1.0, -1)
