"""Grouped products: the oracle in fp64, 16 bits, ragged and empty groups, what is allocated, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify.methods  # noqa: F401  registers the operators
from sparsify.errors import OperatorError
from sparsify.ops.grouped_linear import oracle_grouped_backward, oracle_grouped_linear
from sparsify.ops.partial_grouped_linear import (
    oracle_partial_grouped_backward,
    oracle_partial_grouped_linear,
    oracle_sparse_lowrank_grouped,
)

ops = torch.ops.sparsify
ROWS = [(0, 0, 0, 17), (3, 0, 1, 9), (5, 2, 2, 2), (0, 0, 0, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def made(rows: tuple[int, ...], dtype: torch.dtype, n: int = 13, m: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(rows) + n)
    total = sum(rows)
    x, g, weight = torch.randn(total, m), torch.randn(total, n), torch.randn(len(rows), n, m)
    return x.to(dtype), g.to(dtype), weight.to(dtype), torch.tensor(rows).cumsum(0)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype, terms: int) -> None:
    """Within the rounding of a sum of so many products, by norm."""
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert float(error) <= 4 * max(terms, 4) ** 0.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_the_frozen_product_is_the_oracle(rows: tuple[int, ...], dtype: torch.dtype, turned: bool) -> None:
    x, g, weight, offsets = made(rows, dtype)
    weight = weight.mT.contiguous().mT if turned else weight
    x.requires_grad_(True)
    weight.requires_grad_(True)
    y = ops.grouped_linear(x, weight, offsets)
    y.backward(g)
    if not sum(rows):
        assert y.shape == g.shape
        assert not bool(weight.grad.any())  # type: ignore[union-attr]
        return
    near(y.detach(), oracle_grouped_linear(x.detach().double(), weight.detach().double(), offsets), dtype, 7)
    dx, dw = oracle_grouped_backward(g.double(), x.detach().double(), weight.detach().double(), offsets)
    assert x.grad is not None
    assert weight.grad is not None
    near(x.grad, dx, dtype, 13)
    near(weight.grad, dw, dtype, max(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS[:-1], ids=str)
@pytest.mark.parametrize(("axis", "index"), [(0, None), (1, None), (0, (4, 0, 6)), (1, (4, 0, 6))])
def test_trained_channels_are_the_oracle(rows: tuple[int, ...], dtype: torch.dtype, axis: int, index: Any) -> None:
    x, g, weight, offsets = made(rows, dtype)
    channels = torch.tensor(index or (2, 3, 4))
    block = torch.randn_like(weight.index_select(axis + 1, channels), dtype=torch.promote_types(dtype, torch.float32))
    expected = oracle_partial_grouped_linear(
        x.double(), weight.double(), block.to(dtype).double(), channels, axis, offsets
    )
    wanted = oracle_partial_grouped_backward(
        g.double(), x.double(), weight.double(), block.to(dtype).double(), channels, axis, offsets
    )
    x.requires_grad_(True)
    block.requires_grad_(True)
    y = ops.partial_grouped_linear(x, weight, block, channels if index else None, 2, axis, offsets)
    y.backward(g)
    near(y.detach(), expected, dtype, 7)
    assert x.grad is not None
    assert block.grad is not None
    near(x.grad, wanted[0], dtype, 13)
    near(block.grad, wanted[1], dtype, max(rows))
    assert block.grad.dtype == block.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS[:-1], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_entries_and_factors_are_the_oracle(rows: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> None:
    x, g, weight, offsets = made(rows, dtype)
    stored = weight.mT.contiguous() if transposed else weight
    wide = torch.promote_types(dtype, torch.float32)
    index = torch.randperm(stored.numel())[:29].sort().values.to(torch.int32)
    leaves = [
        torch.randn(29, dtype=wide),
        torch.randn(len(rows), 2, 7, dtype=wide),
        torch.randn(len(rows), 13, 2, dtype=wide),
    ]
    twins = [t.to(dtype).double().requires_grad_(True) for t in leaves]
    wide_x = x.double().requires_grad_(True)
    expected = oracle_sparse_lowrank_grouped(
        wide_x, stored.double(), twins[0], index, twins[1], twins[2], 0.5, transposed, offsets
    )
    expected.backward(g.double())
    for leaf in (x, *leaves):
        leaf.requires_grad_(True)
    y = ops.sparse_lowrank_grouped_linear(x, stored, leaves[0], index, leaves[1], leaves[2], 0.5, transposed, offsets)
    y.backward(g)
    near(y.detach(), expected.detach(), dtype, 32)
    for found, twin in zip((x, *leaves), (wide_x, *twins), strict=True):
        assert found.grad is not None
        assert twin.grad is not None
        near(found.grad, twin.grad, dtype, 64)


def largest_allocation(step: Any) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return max(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("kind", ["channels", "factors", "entries"])
def test_no_gradient_of_a_frozen_weight_is_formed(kind: str) -> None:
    """Nothing as large as one expert's matrix is allocated for channels and factors, nothing larger than that for entries."""
    experts, n, m = 4, 96, 160
    x, g, weight, offsets = made((3, 0, 5, 2), torch.float32, n, m)[0:4]
    weight = torch.randn(experts, n, m)
    x.requires_grad_(True)
    if kind == "channels":
        block = torch.randn(experts, n, 5, requires_grad=True)
        run = lambda: ops.partial_grouped_linear(x, weight, block, None, 7, 1, offsets).backward(g)  # noqa: E731
    elif kind == "factors":
        a, b = torch.randn(experts, 2, m, requires_grad=True), torch.randn(experts, n, 2, requires_grad=True)
        given = (None, None, a, b, 1.0, False, offsets)
        run = lambda: ops.sparse_lowrank_grouped_linear(x, weight, *given).backward(g)  # noqa: E731
    else:
        index = torch.randperm(weight.numel())[:600].sort().values.to(torch.int32)
        values = torch.randn(600, requires_grad=True)
        given = (values, index, None, None, 1.0, False, offsets)
        run = lambda: ops.sparse_lowrank_grouped_linear(x, weight, *given).backward(g)  # noqa: E731
    one = n * m * 4
    run()
    largest = largest_allocation(run)
    assert largest <= one if kind == "entries" else largest < one
    weight.requires_grad_(True)  # the measurement sees a dense gradient where there is one
    dense = largest_allocation(lambda: ops.grouped_linear(x, weight, offsets).backward(g))
    assert dense >= experts * one


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offsets": torch.tensor([1, 3])}, "offsets is .*expected shape"),
        ({"offsets": torch.tensor([2, 1, 6])}, "are not the ends of groups of 6 rows"),
        ({"offsets": torch.tensor([1, 2, 5])}, "are not the ends of groups of 6 rows"),
        ({"offsets": torch.tensor([1.0, 2.0, 6.0])}, "expected int32 or int64"),
        ({"x": torch.randn(6, 5)}, "has 5 channels, the weight 7"),
        ({"weight": torch.randn(13, 7)}, "expected \\(rows, m\\) and \\(experts, n, m\\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], words: str) -> None:
    x, _, weight, offsets = made((1, 2, 3), torch.float32)
    given = {"x": x, "weight": weight, "offsets": offsets} | change
    with pytest.raises(OperatorError, match=words):
        ops.grouped_linear(**given)
