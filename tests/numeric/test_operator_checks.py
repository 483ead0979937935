"""Operators called with arguments that do not fit: an error that says which, before anything is read or written."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from operator_cases import CASES, ONE_OF_EACH, M, N, OperatorCase, case_of
from torch import Tensor

import sparsify.ops.sampled_product as sampled_product
from sparsify.errors import OperatorError, PositionError, SparsifyError
from sparsify.formats import check_packed, pack, unpack
from sparsify.kernels.cpu import sampled, skinny
from sparsify.ops.checks import ascending, require_together

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and "CXX" not in os.environ, reason="needs a C++ compiler"
)
SHAPES = [(4,), (2, 1, 3), (0,)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ONE_OF_EACH else pytest.mark.slow) for n in CASES])
def test_opcheck_of_schema_and_shapes(name):
    """On ragged shapes, with and without bias, with everything that can need a gradient needing one, or nothing."""
    turn = list(CASES).index(name)
    case, _ = case_of(name, SHAPES[turn % 3], bias=turn % 2 == 0).needing(case_of(name).leaves if turn % 2 == 0 else ())
    torch.library.opcheck(
        case.operator,
        tuple(case.arguments),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


QUICK = ("partial_dx_rows", "sparse_lowrank_dx_sparse+lora_turned", "masked")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ONE_OF_EACH])
def test_opcheck_of_compiled_gradients(name):
    case, _ = case_of(name, (2, 3)).needing(case_of(name).leaves)
    torch.library.opcheck(case.operator, tuple(case.arguments), test_utils="test_aot_dispatch_dynamic")


def changed(case: OperatorCase, place: int, value: Any) -> list[Any]:
    return [value if p == place else a for p, a in enumerate(case.arguments)]


def long(t: Tensor) -> Tensor:
    return torch.cat([t, t[:1]])


def wide(t: Tensor) -> Tensor:
    return torch.cat([t, t[..., :1]], -1)


#: case, place of the argument, what becomes of it, words of the error
WRONG: list[tuple[str, int, Any, str]] = [
    ("partial_columns", 0, wide, "channels"),
    ("partial_columns", 0, lambda t: t.long(), "expected floats"),
    ("partial_columns", 2, long, "bias"),
    ("partial_columns", 3, lambda t: t[:1], "does not fit axis 1"),
    ("partial_columns", 3, lambda t: t[0], "a matrix"),
    ("partial_columns", 4, lambda _: -1, "starts at -1"),
    ("partial_rows", 4, lambda _: 3, "channels 3 to 6 of 5"),
    ("partial_rows", 5, lambda _: 2, "axis must be 0 or 1"),
    ("partial_rows", 5, lambda _: -1, "axis must be 0 or 1"),
    ("partial_dx_rows", 0, wide, "channels"),
    ("partial_at_columns", 4, lambda t: t[:2], "2 channels in the index, 3 in the block"),
    ("partial_at_columns", 4, lambda t: t.to(torch.int16), "int32 or int64"),
    ("partial_at_columns", 4, lambda t: t + M - 4, "outside the weight's channels of 7"),
    ("partial_at_dx_rows", 3, lambda t: t - 1, "holds -1, a position outside"),
    ("sparse_lowrank_sparse+lora", 0, wide, "has not the weight's 7 channels"),
    ("sparse_lowrank_sparse+lora", 1, lambda t: t[0], "no matrix"),
    ("sparse_lowrank_sparse+lora", 1, lambda t: t.t().contiguous().t(), "positions are of a contiguous one"),
    ("sparse_lowrank_sparse+lora", 3, lambda t: t[:4], "values"),
    ("sparse_lowrank_sparse+lora", 3, lambda _: None, "one is missing"),
    ("sparse_lowrank_sparse+lora", 4, lambda t: t.short(), "int32 or int64"),
    ("sparse_lowrank_sparse+lora", 4, lambda t: t + N * M, "outside the weight of 35 entries"),
    ("sparse_lowrank_sparse+lora", 4, lambda t: t - N * M, "outside the weight of 35 entries"),
    ("sparse_lowrank_sparse+lora", 5, lambda t: wide(t), "a is float64"),
    ("sparse_lowrank_sparse+lora", 5, lambda t: t[:1], "b is float64"),
    ("sparse_lowrank_sparse+lora", 6, lambda t: t[:3], "b is float64"),
    ("sparse_lowrank_sparse+lora", 6, lambda _: None, "one is missing"),
    ("sparse_lowrank_dx_sparse+lora", 4, lambda t: t[:1], "low is float64"),
    ("sparse_lowrank_dx_sparse+lora", 5, lambda t: t[:1], "low is float64"),
    ("sparse_lowrank_dx_sparse+lora", 5, lambda t: t[:, :3], "a is float64"),
    ("quantized_int8_columns+sparse+lora", 2, lambda _: 50, "expected shape \\(50,\\)"),
    ("quantized_int8_columns+sparse+lora", 1, lambda _: "int3", "unknown format"),
    ("quantized_int8_columns+sparse+lora", 1, lambda _: "nf4", "6 tensors, not 2"),
    ("quantized_int8_columns+sparse+lora", 6, lambda t: t[:2], "block is float64"),
    ("quantized_int8_columns+sparse+lora", 7, lambda t: t + M, "outside the weight's channels"),
    ("quantized_int8_columns+sparse+lora", 7, lambda _: None, "one is missing"),
    ("quantized_int8_columns+sparse+lora", 8, lambda _: 3, "axis must be 0 or 1"),
    ("quantized_int8_columns+sparse+lora", 10, lambda t: t + N * M, "outside the weight"),
    ("quantized_int8_columns+sparse+lora", 14, lambda p: p[:1], "2 tensors, not 1"),
    ("quantized_int8_columns+sparse+lora", 14, lambda p: [p[0][:3], p[1]], "tensor 0 of a weight 5 × 7"),
    ("quantized_int8_columns+sparse+lora", 14, lambda p: [p[0], p[1][:3]], "tensor 1 of a weight"),
    ("quantized_int8_columns+sparse+lora", 14, lambda p: [p[0].int(), p[1]], "int32"),
    ("quantized_int8_dx_rows+sparse", 13, lambda p: [p[0], p[1][:3]], "tensor 1 of a weight"),
    ("quantized_nf4_sparse", 14, lambda p: [p[0][:3], *p[1:]], "tensor 0 of a weight"),
    ("quantized_nf4_sparse", 14, lambda p: [p[0], p[1][:0], *p[2:]], "tensor 1 of a weight"),
    ("quantized_nf4_sparse", 14, lambda p: [*p[:3], p[3][:9], *p[4:]], "tensor 3 of a weight"),
    ("quantized_nf4_sparse", 14, lambda p: [*p[:4], p[4][:9], p[5]], "tensor 4 of a weight"),
    ("quantized_int4_columns", 14, lambda p: [p[0][:, :9].contiguous(), p[1]], "tensor 0 of a weight"),
    ("quantized_int4_columns", 14, lambda p: [p[0].t().contiguous().t(), p[1]], "contiguous"),
    ("masked", 0, wide, "channels"),
    ("masked", 2, lambda t: t[:-1], "do not describe 35 entries"),
    ("masked", 2, lambda t: t.int(), "expected uint8"),
    ("masked", 3, long, "bias"),
    ("masked_grad", 2, lambda t: t[:2], "do not describe"),
    ("masked_grad", 0, long, "tokens"),
    ("apply_mask", 1, lambda t: t[:2], "do not describe 35 entries"),
    ("apply_mask", 1, lambda t: t[None], "one dimension"),
    ("sampled_product", 0, long, "b is float64"),
    ("sampled_product", 1, lambda t: t.float(), "cast one"),
    ("sampled_product", 2, lambda t: t + 35, "outside the product of 35"),
    ("sampled_product", 2, lambda t: t - 35, "outside the product of 35"),
    ("sampled_product", 2, lambda t: t.byte(), "int32 or int64"),
    ("sampled_product", 2, lambda t: t[None], "one dimension"),
    ("skinny_both", 1, wide, "rows is float64"),
    ("skinny_both", 2, long, "factor is float64"),
    ("skinny_both", 2, wide, "factor is float64"),
    ("skinny_both", 0, lambda t: t[0], "no matrix"),
    ("skinny_both", 1, lambda t: t.long(), "expected floats"),
    ("channel_grad", 1, long, "tokens"),
    ("channel_grad", 2, lambda t: t + N, "outside the gradient's channels"),
    ("channel_grad", 2, lambda t: t.double(), "int32 or int64"),
]


@pytest.mark.parametrize(("name", "place", "change", "words"), WRONG, ids=lambda v: v if isinstance(v, str) else None)
def test_what_does_not_fit_is_refused(name, place, change, words):
    """With and without gradients; nothing is written to the weight."""
    case = case_of(name, (4,))
    weights = [a for a in case.arguments if isinstance(a, Tensor)]
    before = [w.clone() for w in weights]
    arguments = changed(case, place, change(case.arguments[place]))
    with pytest.raises(OperatorError, match=words):
        case.operator(*arguments)
    for p in case.leaves:
        if isinstance(arguments[p], Tensor) and arguments[p].is_floating_point():
            arguments[p] = arguments[p].detach().requires_grad_()
    with pytest.raises((SparsifyError, RuntimeError), match=words):
        case.operator(*arguments)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_tensors_on_two_devices_are_refused():
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    require_together("op", here, None, here)
    with pytest.raises(OperatorError, match="op: tensors lie on cpu, meta; move them to one"):
        require_together("op", here, None, there)


def test_positions_are_read_once_and_again_when_written_to(monkeypatch):
    case = case_of("sparse_lowrank_sparse", (4,))
    counted = []
    aminmax = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda t: counted.append(1) or aminmax(t))
    for _ in range(3):
        case.operator(*case.arguments)
    assert counted == [1]
    case.arguments[4][-1] = N * M
    with pytest.raises(PositionError, match="holds 35"):
        case.operator(*case.arguments)
    with pytest.raises(IndexError):  # what it was before it had a name
        case.operator(*case.arguments)
    case.arguments[4][-1] = N * M - 1
    case.operator(*case.arguments)
    with torch.inference_mode():  # no version to go by: read every time
        fresh = case.arguments[4].clone()
        case.operator(*changed(case, 4, fresh))
        fresh[0] = -1
        with pytest.raises(PositionError, match="holds -1"):
            case.operator(*changed(case, 4, fresh))


def test_ascending():
    for positions, expected in (([], True), ([4], True), ([0, 3, 9], True), ([0, 3, 3], False), ([3, 0], False)):
        assert ascending(torch.tensor(positions, dtype=torch.int32)) is expected


@pytest.mark.parametrize("density", [0.03, 0.5])
def test_positions_in_any_order_and_repeated(density, monkeypatch):
    """The variants walk through sorted positions; a caller need not know."""
    a, b = torch.randn(5, 30), torch.randn(5, 40)
    index = torch.randint(0, 1200, (int(1200 * density),))
    expected = (a.t() @ b).flatten()[index]
    assert not ascending(index)
    for tile_bytes in (1, sampled_product.TILE_BYTES):
        monkeypatch.setattr(sampled_product, "TILE_BYTES", tile_bytes)
        torch.testing.assert_close(torch.ops.sparsify.sampled_product(a, b, index), expected)


@needs_compiler
def test_the_generated_kernels_refuse_what_they_would_read_past():
    x, rows, factor = torch.randn(9, 40), torch.randn(3, 40), torch.randn(9, 3)
    for arguments in (
        (x, rows[:, :30], None),
        (x, None, factor[:5]),
        (x, rows, factor[:, :2]),
        (x.double(), rows, None),
    ):
        with pytest.raises(OperatorError, match="skinny.products"):
            skinny.skinny_by_kernel(*arguments)
    for low, second in ((factor[:5], rows), (factor, rows[:2]), (factor, rows[:, :30])):
        with pytest.raises(OperatorError, match="does not fit y"):
            skinny.update_by_kernel(x.clone(), low, second)
    a, b, index = torch.randn(6, 30), torch.randn(6, 31), torch.tensor([2, 30, 900])
    for arguments in ((a[:5], b, index), (a, b.bfloat16(), index), (a.half(), b.half(), index)):
        with pytest.raises(OperatorError, match="sampled product"):
            sampled.sampled_by_kernel(*arguments)
    for positions in (index.short(), index[None]):
        with pytest.raises(OperatorError, match="int32 or int64"):
            sampled.sampled_by_kernel(a, b, positions)
    weight, values = torch.zeros(64, 64), torch.ones(3)
    for arguments in ((weight, values[:2], index), (weight, values.double(), index), (weight.double(), values, index)):
        with pytest.raises(OperatorError, match="sparse part"):
            sampled.write_by_kernel(*arguments)


@pytest.mark.parametrize("format", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 33), (64, 64), (30, 200)])
def test_what_pack_gives_is_accepted(format, shape):
    packed = pack(torch.randn(shape), format)
    check_packed(packed, format, shape)
    assert unpack(packed, format, shape, torch.float32).shape == shape
