"""`sparsify::partial_embedding` against its written-out oracle, and against the dense embedding in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.ops.partial_embedding import oracle_partial_embedding, oracle_partial_embedding_backward

V, D = 13, 7
INDEX = torch.tensor([0, 4, 5, 12])
op = torch.ops.sparsify.partial_embedding


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """ids, weight with NaN under the block, block (fp32 over a 16-bit weight)."""
    weight = torch.randn(V, D, dtype=torch.float64).to(dtype).index_fill(0, INDEX, float("nan"))
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return torch.randint(0, V, shape), weight, torch.randn(len(INDEX), D, dtype=wide, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (5, 9), (2, 3, 1), (0, 4), ()], ids=str)
@pytest.mark.parametrize("padding", [-1, 4, 7])
@pytest.mark.parametrize("numbers", [torch.int64, torch.int32], ids=str)
def test_forward_and_backward_equal_the_oracle(shape, dtype, padding, numbers):
    ids, weight, block = make(shape, dtype)
    y = op(ids.to(numbers), weight, block, INDEX, padding)
    assert torch.equal(y, oracle_partial_embedding(ids, weight, block.detach(), INDEX))
    assert y.dtype == dtype
    g = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    y.backward(g)
    want = oracle_partial_embedding_backward(g.double(), ids, INDEX, padding)
    size = oracle_partial_embedding_backward(g.double().abs(), ids, INDEX, padding)
    assert block.grad is not None
    assert block.grad.dtype == block.dtype
    bound = (ids.numel() + 1) * torch.finfo(block.dtype).eps * size  # a sum of as many terms, in the block's type
    assert bool(((block.grad.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("padding", [None, 5])
def test_it_is_the_dense_embedding_and_the_masked_dense_gradient(padding):
    ids, weight, block = make((6, 5))
    dense = weight.index_copy(0, INDEX, block.detach()).requires_grad_(True)
    want = torch.nn.functional.embedding(ids, dense, padding_idx=padding)
    y = op(ids, weight, block, INDEX, -1 if padding is None else padding)
    assert torch.equal(y, want)
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    torch.testing.assert_close(block.grad, dense.grad.index_select(0, INDEX), rtol=1e-13, atol=1e-13)


def test_nothing_of_the_size_of_the_vocabulary_is_made_for_the_backward(monkeypatch):
    rows = 50_000
    weight, block = torch.randn(rows, D), torch.randn(2, D, requires_grad=True)
    ids = torch.randint(0, rows, (3, 4))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = op(ids, weight, block, torch.tensor([7, rows - 1]), -1)
    assert sorted(t.numel() for t in kept) == [2, 12], "the ids and the index alone"
    with torch.profiler.profile(profile_memory=True) as found:
        y.backward(torch.randn_like(y))
    largest = max(abs(event.cpu_memory_usage) for event in found.events() or [])
    assert largest < rows * 4, "less than one number for each row of the vocabulary"


def test_frozen_rows_are_never_written():
    ids, weight, block = make((9,))
    before, version = weight.clone().index_fill(0, INDEX, 0), weight._version
    op(ids, weight, block, INDEX, -1).sum().backward()
    assert torch.equal(weight.index_fill(0, INDEX, 0), before)
    assert weight._version == version


def test_a_weight_that_is_made_to_need_a_gradient_gets_the_others():
    ids, weight, block = make((11,))
    dense = weight.index_copy(0, INDEX, block.detach()).requires_grad_(True)
    weight.requires_grad_(True)
    y = op(ids, weight, block, INDEX, -1)
    g = torch.randn_like(y)
    y.backward(g)
    torch.nn.functional.embedding(ids, dense).backward(g)
    torch.testing.assert_close(weight.grad, dense.grad.index_fill(0, INDEX, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: [a[0].float(), *a[1:]], "expected int32 or int64 numbers"),
        (lambda a: [a[0], a[1], a[2][:, 1:], a[3], a[4]], "block is"),
        (lambda a: [a[0], a[1], a[2][1:], a[3], a[4]], "block is"),
        (lambda a: [*a[:3], torch.tensor([0, 4, 5, 13]), -1], "outside the embedding's rows"),
        (lambda a: [*a[:3], torch.tensor([4, 0, 5, 12]), -1], "sorted, each row once"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    ids, weight, block = make((3,))
    with pytest.raises(RuntimeError, match=words):
        op(*change([ids, weight, block, INDEX, -1]))
