"""`sparsify::partial_linear` and `partial_linear_at` against the written-out oracle in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sparsify.ops.partial_linear import oracle_partial_linear, oracle_partial_linear_backward

N, M, START = 11, 17, 3
SIZE = {0: 4, 1: 5}
SHAPES = [(7, M), (2, 3, M), (2, 1, 3, M), (M,), (0, M), (2, 0, M)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def channels_of(axis: int, at: bool) -> Tensor:
    contiguous = torch.arange(START, START + SIZE[axis])
    return torch.tensor([9, 0, 4, 10, 7])[: SIZE[axis]] if at else contiguous


def make(
    axis: int, at: bool = False, shape: tuple[int, ...] = (7, M), dtype: torch.dtype = torch.float64, bias: bool = True
):
    """x, weight, bias, block (fp32 over a 16-bit weight), where, channels; NaN lies under the block."""
    channels = channels_of(axis, at)
    weight = torch.randn(N, M, dtype=torch.float64).to(dtype)
    weight.index_fill_(axis, channels, float("nan"))
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    block = torch.randn((N, SIZE[1]) if axis == 1 else (SIZE[0], M), dtype=wide, requires_grad=True)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(True)
    b = torch.randn(N, dtype=torch.float64).to(dtype).requires_grad_(True) if bias else None
    return x, weight, b, block, (channels if at else START), channels


def op_of(at: bool) -> Any:
    return torch.ops.sparsify.partial_linear_at if at else torch.ops.sparsify.partial_linear


def assert_close(found: Tensor, expected: Tensor, magnitude: Tensor, terms: int, dtype: torch.dtype) -> None:
    """|found − expected| ≤ (terms + 4) u₃₂ · Σ|products| + 2 u · |expected|: accumulation in fp32 or better, one rounding."""
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = (terms + 4) * accumulate * magnitude + 2 * torch.finfo(dtype).eps * expected.abs() + 1e-300
    error = (found.detach().double() - expected).abs()
    assert bool((error <= bound).all()), f"largest excess {(error - bound).max():.2e}"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_forward_and_backward_equal_the_oracle(axis, at, shape, dtype, bias):
    x, weight, b, block, where, channels = make(axis, at, shape, dtype, bias)
    y = op_of(at)(x, weight, b, block, where, axis)
    assert y.shape == (*shape[:-1], N)
    assert y.dtype == dtype
    clean = torch.nan_to_num(weight.detach()).double()
    seen_block = block.detach().to(dtype).double()  # the forward multiplies with the block in the weight's dtype
    arguments = (x.detach().double(), clean, None if b is None else b.detach().double(), seen_block, channels, axis)
    full = clean.index_copy(axis, channels, seen_block)
    magnitude = arguments[0].abs() @ full.abs().t() + (0 if b is None else arguments[2].abs())
    assert_close(y, oracle_partial_linear(*arguments), magnitude, M, dtype)

    g = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    y.backward(g)
    dx, d_block, d_bias = oracle_partial_linear_backward(g.double(), arguments[0], clean, seen_block, channels, axis)
    tokens = max(1, g[..., 0].numel())
    flat_g, flat_x = g.double().reshape(-1, N).abs(), arguments[0].reshape(-1, M).abs()
    assert block.grad is not None
    assert x.grad is not None
    assert block.grad.dtype == block.dtype
    assert block.grad.shape == block.shape
    assert x.grad.dtype == dtype
    assert_close(x.grad, dx, g.double().abs() @ full.abs(), N, dtype)
    assert_close(block.grad, d_block, (flat_g.t() @ flat_x).index_select(axis, channels), tokens, dtype)
    if b is not None:
        assert b.grad is not None
        assert b.grad.dtype == dtype
        assert_close(b.grad, d_bias, flat_g.sum(0), tokens, dtype)


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_pass_gradcheck(axis, at):
    x, weight, b, block, where, _ = make(axis, at, (2, 3, M))
    assert torch.autograd.gradcheck(lambda x, b, k: op_of(at)(x, weight, b, k, where, axis), (x, b, block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_operator_passes_opcheck(axis, at, bias, dtype):
    x, weight, b, block, where, channels = make(axis, at, (2, 3, M), dtype, bias)
    weight.index_copy_(axis, channels, block.detach().to(dtype))  # what lies under the block is scratch
    op = op_of(at).default
    torch.library.opcheck(op, (x, weight, b, block, where, axis))
    g = torch.randn(2, 3, N, dtype=dtype)
    dx = torch.ops.sparsify.partial_linear_at_dx if at else torch.ops.sparsify.partial_linear_dx
    torch.library.opcheck(dx.default, (g, weight, block.detach(), where, axis))


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_strided_inputs_and_a_transposed_weight_give_the_same(axis, at):
    x, weight, b, block, where, channels = make(axis, at, (4, 6, M), torch.float32)
    expected = op_of(at)(x, weight.clone(), b, block, where, axis)
    strided = x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_(True)
    stored = weight.t().contiguous()  # Conv1D keeps (in, out)
    found = op_of(at)(strided, stored.t(), b, block, where, axis)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    g = torch.randn(6, 4, N).transpose(0, 1)
    first = torch.autograd.grad(expected, (x, block, b), g)
    second = torch.autograd.grad(found, (strided, block, b), g)
    for a, c in zip(first, second, strict=True):
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)
    assert torch.equal(stored.t().index_select(axis, channels), block.detach()), (
        "the block must reach the stored tensor"
    )


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_wrong_shapes_are_refused_under_fake_tensors(axis, at):
    x, weight, b, block, where, _ = make(axis, at, (7, M), torch.float32)
    meta = [t.detach().to("meta") for t in (x, weight, b, block)]
    where = where.to("meta") if at else where
    assert op_of(at)(*meta, where, axis).shape == (7, N)
    with pytest.raises(RuntimeError, match="channels"):
        op_of(at)(meta[0][:, 1:], *meta[1:], where, axis)


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_autocast_computes_in_16_bits_and_keeps_the_gradient_of_the_block_in_32(axis, at):
    x, weight, b, block, where, channels = make(axis, at, (2, 3, M), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = op_of(at)(x, weight, b, block, where, axis)
        like = nn.functional.linear(x, weight.index_copy(axis, channels, block.detach()), b)
    assert y.dtype == like.dtype == torch.bfloat16
    torch.testing.assert_close(y, like)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert b.grad.dtype == torch.float32
    assert block.grad.dtype == torch.float32
    assert weight.dtype == torch.float32


def test_autocast_leaves_double_precision_alone_as_linear_does():
    x, weight, b, block, where, _ = make(1, False, (2, M), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.linear(x, weight, b).dtype == torch.float64
        assert op_of(False)(x, weight, b, block, where, 1).dtype == torch.float64


def saved_for_backward(call: Any, parameters: list[Tensor]) -> list[Tensor]:
    """Tensors that autograd keeps, without those that are parameters anyway."""
    known = {t.untyped_storage().data_ptr() for t in parameters}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return kept


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
def test_column_block_saves_only_a_copy_of_its_slice_of_the_input(at):
    x, weight, b, block, where, channels = make(1, at, (2, 3, M), torch.float32)
    kept = saved_for_backward(lambda: op_of(at)(x, weight, b, block, where, 1), [weight, block, b, channels])
    assert sum(t.untyped_storage().nbytes() for t in kept) == 6 * SIZE[1] * 4
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept)
    assert torch.equal(kept[0], x.detach().index_select(-1, channels))


def test_row_block_saves_the_input_and_nothing_else():
    x, weight, b, block, where, _ = make(0, False, (2, 3, M), torch.float32)
    kept = saved_for_backward(lambda: op_of(False)(x, weight, b, block, where, 0), [weight, block, b])
    assert sum(t.untyped_storage().nbytes() for t in kept) == 6 * M * 4


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_that_asks_for_a_gradient_gets_the_dense_one_with_zeros_under_the_block(axis, at):
    x, weight, _, block, where, channels = make(axis, at)
    weight.requires_grad_(True)
    g = torch.randn(7, N, dtype=torch.float64)
    op_of(at)(x, weight, None, block, where, axis).backward(g)
    dense = g.t() @ x.detach()
    assert weight.grad is not None
    assert block.grad is not None
    torch.testing.assert_close(weight.grad, dense.index_fill(axis, channels, 0))
    torch.testing.assert_close(block.grad, dense.index_select(axis, channels))


def test_frozen_block_saves_nothing_of_the_input():
    x, weight, b, block, where, _ = make(1, False, (2, 3, M), torch.float32)
    kept = saved_for_backward(lambda: op_of(False)(x, weight, b, block.detach(), where, 1), [weight, block, b])
    assert kept == []


GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv")


def gemms(call: Any) -> list[tuple[tuple[int, ...], ...]]:
    """Operand shapes of every matrix product that runs, however deep inside an operator."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        call()
    return [
        tuple(tuple(s) for s in event.input_shapes if len(s) == 2)
        for event in recorded.events() or []
        if event.name in GEMMS
    ]


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_gemm_forward_and_no_dense_weight_gradient_backward(axis, at):
    x, weight, b, block, where, _ = make(axis, at, (2, 3, M), torch.float32)
    held: list[Tensor] = []
    assert len(gemms(lambda: held.append(op_of(at)(x, weight, b, block, where, axis)))) == 1
    g = torch.randn(2, 3, N)
    backward = gemms(lambda: held[0].backward(g))
    produced = sorted((shapes[-2][0], shapes[-1][1]) for shapes in backward)
    assert produced == sorted([(6, M), tuple(block.shape)]), "dX and the block's own gradient, nothing else"


@pytest.mark.parametrize("axis", [0, 1])
def test_input_gradient_is_not_computed_when_nobody_needs_it(axis):
    x, weight, b, block, where, _ = make(axis, False, (2, 3, M), torch.float32)
    y = op_of(False)(x.detach(), weight, b, block, where, axis)
    backward = gemms(lambda: y.backward(torch.randn(2, 3, N)))
    assert [(s[-2][0], s[-1][1]) for s in backward] == [tuple(block.shape)]


@pytest.mark.parametrize("axis", [0, 1])
def test_frozen_block_computes_the_input_gradient_only(axis):
    x, weight, b, block, where, _ = make(axis, False, (2, 3, M), torch.float32)
    y = op_of(False)(x, weight, b.detach(), block.detach(), where, axis)
    backward = gemms(lambda: y.backward(torch.randn(2, 3, N)))
    assert [(s[-2][0], s[-1][1]) for s in backward] == [(6, M)]


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_two_forwards_before_one_backward_add_their_gradients(axis, at):
    x, weight, b, block, where, _ = make(axis, at, (5, M))
    other = torch.randn(3, M, dtype=torch.float64)
    (
        op_of(at)(x, weight, b, block, where, axis).sum() + op_of(at)(other, weight, b, block, where, axis).sum()
    ).backward()
    together = block.grad.clone()
    block.grad = None
    op_of(at)(torch.cat([x.detach(), other]), weight, b, block, where, axis).sum().backward()
    torch.testing.assert_close(together, block.grad)


@pytest.mark.parametrize("at", [False, True], ids=["range", "index"])
@pytest.mark.parametrize("axis", [0, 1])
def test_changing_the_block_between_forward_and_backward_is_an_error(axis, at):
    x, weight, b, block, where, _ = make(axis, at)
    y = op_of(at)(x, weight, b, block, where, axis).sum()
    with torch.no_grad():
        block.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("axis", [0, 1])
def test_backward_uses_the_block_and_not_what_lies_under_it(axis):
    """After an adapter switch, or under FSDP2, the scratch region holds something else by the time of the backward."""
    x, weight, b, block, where, channels = make(axis)
    y = op_of(False)(x, weight, b, block, where, axis).sum()
    expected = weight.clone().index_copy(axis, channels, block.detach()).sum(0).expand_as(x)
    weight.data.index_fill_(axis, channels, float("nan"))
    y.backward()
    torch.testing.assert_close(x.grad, expected)


def test_frozen_entries_of_the_weight_are_never_written():
    for axis in (0, 1):
        x, weight, b, block, where, channels = make(axis)
        before = torch.nan_to_num(weight.clone(), nan=7.0).index_fill(axis, channels, 0.0)
        version = weight._version
        op_of(False)(x, weight, b, block, where, axis).sum().backward()
        assert torch.equal(weight.index_fill(axis, channels, 0.0), before)
        assert weight._version == version
        assert weight.grad is None
