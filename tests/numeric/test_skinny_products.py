"""The low-rank part's products: the generated CPU kernel and the GEMMs against fp64, both products from one pass."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor

import sparsify.ops.skinny_products as ops
from sparsify.kernels.cpu import skinny
from sparsify.ops import dispatch

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)
SHAPES = [(1, 1, 1), (7, 33, 3), (8, 16, 4), (9, 64, 5), (40, 70, 8), (65, 129, 17), (0, 12, 2)]


def make(tokens: int, width: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(tokens, width), torch.randn(rank, width), torch.randn(tokens, rank)


def assert_close(found: Tensor | None, first: Tensor, second: Tensor) -> None:
    """Within the error bound of a sum of products in fp32."""
    assert found is not None
    length = first.shape[1]
    bound = 1.2e-7 * (length + 4) * (first.double().abs() @ second.double().abs())
    assert bool(((found.double() - first.double() @ second.double()).abs() <= bound + 1e-30).all())


@needs_compiler
@pytest.mark.parametrize("isa", ["best", "portable"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_fp64(shape, isa):
    """Tokens, columns and ranks that do not come out even; each product alone and both together, the same numbers."""
    x, rows, factor = make(*shape)
    chosen = None if isa == "best" else "portable"
    low, product = skinny.skinny_by_kernel(x, rows, factor, chosen)
    assert_close(low, x, rows.t())
    assert_close(product, factor.t(), x)
    for alone, both in ((skinny.skinny_by_kernel(x, rows, None, chosen)[0], low), (None, None)):
        assert alone is both is None or torch.equal(alone, both)
    alone = skinny.skinny_by_kernel(x, None, factor, chosen)
    assert alone[0] is None
    assert product is not None
    assert torch.equal(alone[1], product)


@needs_compiler
@pytest.mark.parametrize("isa", ["best", "portable"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_equals_fp64(shape, isa):
    """Rows of y inside a wider matrix: what lies beside them is not touched."""
    tokens, width, rank = shape
    whole = torch.randn(tokens, width + 9)
    before, y = whole.clone(), whole[:, 4 : 4 + width]
    low, rows = torch.randn(tokens, rank), torch.randn(width, rank).t()
    expected = before[:, 4 : 4 + width].double() + low.double() @ rows.double()
    skinny.update_by_kernel(y, low, rows, None if isa == "best" else "portable")
    bound = 1.2e-7 * (rank + 2) * (before[:, 4 : 4 + width].abs().double() + low.abs().double() @ rows.abs().double())
    assert bool(((y.double() - expected).abs() <= bound).all())
    assert torch.equal(whole[:, :4], before[:, :4])
    assert torch.equal(whole[:, 4 + width :], before[:, 4 + width :])


@needs_compiler
def test_the_update_refuses_scattered_rows():
    with pytest.raises(ValueError, match="must be contiguous"):
        skinny.update_by_kernel(torch.zeros(4, 6).t(), torch.zeros(6, 2), torch.zeros(2, 4))


@needs_compiler
def test_the_kernel_reads_strides_counts_threads_and_spreads_nan():
    x, rows, factor = make(50, 40, 6)
    wide = torch.randn(50, 90)
    wide[:, 20:60] = x
    low, product = skinny.skinny_by_kernel(wide[:, 20:60], rows.t().contiguous().t(), factor.t().contiguous().t())
    assert_close(low, x, rows.t())
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            again = skinny.skinny_by_kernel(x.t().contiguous().t(), rows, factor)
            assert_close(again[0], x, rows.t())
            assert_close(again[1], factor.t(), x)
    finally:
        torch.set_num_threads(threads)
    x[3, 5] = float("nan")
    low, product = skinny.skinny_by_kernel(x, rows, factor)
    assert low is not None
    assert product is not None
    assert low[3].isnan().all()
    assert not low[torch.arange(50) != 3].isnan().any()
    assert product[:, 5].isnan().all()
    assert not product[:, torch.arange(40) != 5].isnan().any()


@needs_compiler
def test_what_the_kernel_serves():
    x = torch.zeros(512, 1024)
    assert skinny.skinny_serves(x, 8)
    assert not skinny.skinny_serves(x, 65), "a GEMM is as good"
    assert skinny.update_serves(x, 8)
    assert not skinny.update_serves(x, 65), "a GEMM is as good"
    assert not skinny.update_serves(x.t(), 8)
    assert not skinny.skinny_serves(x[:4], 8), "not worth a compiler run"
    assert not skinny.skinny_serves(x.bfloat16(), 8)
    assert not skinny.skinny_serves(x.double(), 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("serves", [True, False])
def test_the_operator(serves, dtype, monkeypatch):
    if serves:
        monkeypatch.setattr(skinny, "SMALLEST", 1)
    else:
        monkeypatch.setattr(dispatch, "skinny_serves", lambda x, rank: False)
    x, rows, factor = (t.to(dtype) for t in make(9, 20, 3))
    low, product = torch.ops.sparsify.skinny_products(x, rows, factor)
    assert low.dtype == product.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(low, x @ rows.t(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(product, factor.t() @ x, rtol=tolerance, atol=tolerance)
    for arguments in ((x, rows, factor), (x, rows, None), (x, None, factor)):
        torch.library.opcheck(torch.ops.sparsify.skinny_products.default, arguments)


def test_without_a_compiler_the_gemm_serves(monkeypatch):
    monkeypatch.setattr(skinny, "load_skinny", lambda isa: None)
    x, rows, factor = make(512, 1024, 4)
    assert not skinny.skinny_serves(x, 4)
    low, product = ops.skinny_products(x, rows, factor)
    torch.testing.assert_close(low, x @ rows.t())
    torch.testing.assert_close(product, factor.t() @ x)
