"""The weight gradient on a support: dense tiles, and one dot product per entry, against `(aᵀ b)[index]` in fp64."""

from __future__ import annotations

import os
import shutil
import warnings

import processes
import pytest
import torch
from torch import Tensor

import sparsify.ops.sampled_product as ops
from sparsify.kernels import fallback
from sparsify.kernels.cpu import sampled
from sparsify.ops import dispatch
from sparsify.ops.added_parts import write_values
from sparsify.ops.sampled_product import oracle_sampled_product, sampled_by_tile, sampled_csr, sampled_per_entry

VARIANTS = [sampled_by_tile, sampled_per_entry, sampled_csr, torch.ops.sparsify.sampled_product]
SHAPES = [(5, 7, 9), (1, 1, 1), (0, 4, 3), (13, 1, 33), (6, 40, 2)]


def make(tokens: int, p: int, q: int, count: int, dtype: torch.dtype, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (torch.randn(tokens, w, dtype=torch.float64).to(dtype) for w in (p, q))
    index = torch.randperm(p * q)[:count].sort().values
    return a, b, index.to(torch.int64 if wide else torch.int32)


@pytest.mark.parametrize("tile_bytes", [1, 300, 2**25], ids=["row", "rows", "whole"])
@pytest.mark.parametrize("variant", VARIANTS, ids=["tile", "entry", "csr", "operator"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_variants_equal_the_oracle(variant, shape, tile_bytes, monkeypatch):
    """Tiles of one row, of a few, and the whole matrix; no entry, some, all."""
    monkeypatch.setattr(ops, "TILE_BYTES", tile_bytes)
    tokens, p, q = shape
    for count in sorted({0, 1, p * q // 3, p * q}):
        for wide in (False, True):
            for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
                a, b, index = make(tokens, p, q, min(count, p * q), dtype, wide)
                found = variant(a, b, index)
                expected = oracle_sampled_product(a.double(), b.double(), index)
                assert found.dtype == dtype
                assert found.shape == index.shape
                scale = float((a.double().abs().t() @ b.double().abs()).max().clamp_min(1))
                torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound * scale)


def test_tiles_without_an_entry_are_not_computed(monkeypatch):
    """All entries in the last rows: the tiles above them cost nothing."""
    a, b = torch.randn(4, 64), torch.randn(4, 8)
    a[:, :60] = float("nan")  # would spread if they were multiplied and gathered from
    monkeypatch.setattr(ops, "TILE_BYTES", 4 * 8 * 4)
    index = torch.arange(60 * 8, 64 * 8, 3)
    assert torch.isfinite(sampled_by_tile(a, b, index)).all()
    torch.testing.assert_close(sampled_by_tile(a, b, index), sampled_per_entry(a[:, :], b, index))


def test_strided_factors():
    a, b = torch.randn(7, 5).t(), torch.randn(9, 5).t()
    index = torch.randperm(63)[:20].sort().values
    for variant in VARIANTS:
        torch.testing.assert_close(variant(a, b, index), oracle_sampled_product(a, b, index))


@pytest.mark.parametrize(
    ("per_entry", "csr", "works", "expected"),
    [(0.0, 0.0, True, "tile"), (1.1, 0.0, True, "entry"), (1.1, 0.1, True, "csr"), (0.0, 0.1, False, "tile")],
)
def test_density_and_build_decide_which_one_runs(per_entry, csr, works, expected, monkeypatch):
    seen = []
    monkeypatch.setitem(dispatch.PER_ENTRY_DENSITY, "cpu", per_entry)
    monkeypatch.setitem(dispatch.CSR_DENSITY, "cpu", csr)
    monkeypatch.setattr(ops, "csr_works", lambda: works)
    for name, function in (("tile", sampled_by_tile), ("per_entry", sampled_per_entry), ("csr", sampled_csr)):
        spy = f"sampled_{'by_tile' if name == 'tile' else name}"
        monkeypatch.setattr(
            ops, spy, lambda a, b, i, n=name, f=function: seen.append(n.removeprefix("per_")) or f(a, b, i)
        )
    a, b, index = torch.randn(3, 4), torch.randn(3, 5), torch.tensor([2, 7])
    torch.testing.assert_close(torch.ops.sparsify.sampled_product(a, b, index), oracle_sampled_product(a, b, index))
    assert seen == [expected]


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize("isa", ["best", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (513, 40, 70), (1025, 3, 17), (64, 65, 129)], ids=str)
def test_the_generated_kernel_equals_the_oracle(shape, dtype, isa):
    """Tokens below, at and above a chunk; strips and blocks that do not come out even; no entry, some, all; empty rows."""
    tokens, p, q = shape
    for count in sorted({0, 1, p * q // 3, p * q}):
        for wide in (False, True):
            a, b, index = make(tokens, p, q, min(count, p * q), dtype, wide)
            found = sampled.sampled_by_kernel(a, b, index, None if isa == "best" else "portable")
            expected = oracle_sampled_product(a.double(), b.double(), index)
            scale = float((a.double().abs().t() @ b.double().abs()).max().clamp_min(1))
            bound = (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0) + tokens**0.5 * 1.2e-7
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound * scale)


@needs_compiler
def test_the_generated_kernel_reads_strides_spreads_nan_and_counts_threads():
    a, b = torch.randn(9, 40)[:, 3:20], torch.randn(7, 9).t()
    index = torch.randperm(17 * 7)[:50].sort().values
    expected = oracle_sampled_product(a, b, index)
    one = sampled.sampled_by_kernel(a, b, index)
    torch.testing.assert_close(one, expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sampled.sampled_by_kernel(a, b, index), one), "the same sums whatever the threads"
    finally:
        torch.set_num_threads(threads)
    a = a.clone()
    a[4, 2] = float("nan")
    found = sampled.sampled_by_kernel(a, b, index)
    assert torch.equal(found.isnan(), torch.div(index, 7, rounding_mode="floor") == 2)


@needs_compiler
def test_an_unsorted_index_reads_nothing_outside():
    a, b, index = (
        torch.randn(8, 30),
        torch.randn(8, 31),
        torch.tensor([2, 30, 900, 5]),
    )  # out of order, as no support is
    found = sampled.sampled_by_kernel(a, b, index)
    torch.testing.assert_close(found[:3], oracle_sampled_product(a, b, index[:3]))
    assert found[3] == 0, "a column before its row is passed over"


def test_a_machine_without_a_compiler_hears_of_it_once(monkeypatch):
    def fail(*_):
        raise sampled.BuildError("no C++ compiler found")

    monkeypatch.setattr(sampled, "load_library", fail)
    monkeypatch.setattr(fallback, "said", {})
    sampled.load_sampled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="PyTorch's own kernels serve instead: no C\\+\\+ compiler found"):
            assert sampled.load_sampled("portable", "f32") is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert sampled.load_sampled("portable", "f32") is None
    finally:
        sampled.load_sampled.cache_clear()


def test_the_kernel_takes_over_from_some_work_on_and_where_there_is_a_compiler(monkeypatch):
    a, b, index = torch.randn(600, 40), torch.randn(600, 50), torch.arange(0, 2000, 20)
    calls = []
    monkeypatch.setattr(dispatch, "sampled_by_kernel", lambda *t: calls.append(1) or sampled.sampled_by_kernel(*t))
    expected = oracle_sampled_product(a, b, index)
    monkeypatch.setattr(sampled, "load_sampled", lambda isa, value: None)
    torch.testing.assert_close(torch.ops.sparsify.sampled_product(a, b, index), expected)
    assert not calls
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "sampled_by_kernel", lambda *t: calls.append(1) or expected)
    monkeypatch.setattr(sampled, "load_sampled", lambda isa, value: True)
    torch.ops.sparsify.sampled_product(a, b, index)
    assert len(calls) == (sampled.SMALLEST <= 600 * 100)
    monkeypatch.setattr(sampled, "SMALLEST", 600 * 100)
    torch.ops.sparsify.sampled_product(a, b, index)
    torch.ops.sparsify.sampled_product(a[:599], b[:599], index)
    torch.ops.sparsify.sampled_product(a.double(), b.double(), index)
    assert len(calls) == 1


def test_first_use_of_the_sparse_kernel_warns_nobody():
    code = (
        "import warnings, torch; warnings.simplefilter('error'); import sparsify.ops\n"
        "torch.ops.sparsify.sampled_product(torch.ones(2, 50), torch.ones(2, 40), torch.tensor([3, 9]))"
    )
    done = processes.run_python("-c", code)  # a process that has used nothing yet
    assert done.returncode == 0, done.stderr


def test_flat_positions_above_the_range_of_int32():
    """46,400 × 46,400 has more entries than an int32 can number; the tiles stay small, so this needs little memory."""
    p = q = 46_400
    a, b = torch.randn(2, p), torch.randn(2, q)
    index = torch.tensor([5, 40_000 * q + 33_000, p * q - 1])
    assert int(index[-1]) > torch.iinfo(torch.int32).max
    rows, columns = index // q, index % q
    expected = (a[:, rows] * b[:, columns]).sum(0)
    torch.testing.assert_close(sampled_per_entry(a, b, index), expected)
    torch.testing.assert_close(sampled_by_tile(a, b, index), expected)
    torch.testing.assert_close(sampled_csr(a, b, index), expected)


def test_operator_passes_opcheck():
    for dtype in (torch.int32, torch.int64):
        index = torch.tensor([0, 3, 19], dtype=dtype)
        torch.library.opcheck(torch.ops.sparsify.sampled_product.default, (torch.randn(3, 4), torch.randn(3, 5), index))


@needs_compiler
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_generated_write_equals_index_copy(dtype, wide, monkeypatch):
    """More entries than one thread's turn, special values, and not one byte beside the support."""
    monkeypatch.setattr(sampled, "SMALLEST_WRITE", 1)
    weight = torch.randn(130, 120).to(dtype)
    index = torch.randperm(weight.numel())[:9001].sort().values.to(torch.int64 if wide else torch.int32)
    values = torch.randn(9001)
    values[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.00390625, 3.3e38])
    expected = weight.view(-1).index_copy(0, index.long(), values.to(dtype)).view_as(weight)
    assert sampled.kernel_writes(weight, values, index)
    version = weight._version
    write_values(weight, values, index)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)
    assert weight._version == version


@needs_compiler
@pytest.mark.parametrize("wrong", [-1, 16384, 2**31 - 1])
def test_the_generated_write_refuses_a_position_outside(wrong):
    weight, index = torch.zeros(128, 128), torch.arange(4096, dtype=torch.int32)
    index[77] = wrong
    with pytest.raises(IndexError, match="outside the weight of 16384"):
        write_values(weight, torch.ones(4096), index)


@needs_compiler
@pytest.mark.parametrize("wrong", [-1, 16384, 2**31 - 1])
def test_the_generated_write_itself_touches_nothing_outside(wrong):
    """Whoever calls it without the look at all positions that `write_values` has before it."""
    held, index = torch.zeros(64 + 128 * 128 + 64), torch.arange(4096, dtype=torch.int32)
    weight = held[64:-64].view(128, 128)
    index[77] = wrong
    with pytest.raises(IndexError, match="outside the weight of 16384"):
        sampled.write_by_kernel(weight, torch.ones(4096), index)
    assert not held[:64].any()
    assert not held[-64:].any()
    assert float(weight.sum()) == 4095


def test_what_the_generated_write_does_not_take():
    weight, index = torch.zeros(64, 64), torch.arange(4096, dtype=torch.int32)
    assert not sampled.kernel_writes(weight.double(), torch.zeros(4096), index)
    assert not sampled.kernel_writes(weight.t()[:, ::2], torch.zeros(2048), index[:2048])
    assert not sampled.kernel_writes(weight, torch.zeros(4096).to(torch.bfloat16), index)
    assert not sampled.kernel_writes(weight, torch.zeros(5), index[:5])
