"""`sparsify::sparse_lowrank_linear` (RoSA, LoRA) against the formula written out with autograd in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import sparsify.ops.sparse_lowrank_linear as ops
from sparsify.ops.skinny_products import reduced

N, M, RANK, COUNT, SCALE = 11, 17, 3, 20, 0.7
SHAPES = [(7, M), (2, 3, M), (2, 1, 3, M), (M,), (0, M), (2, 0, M)]
PARTS = [frozenset(), frozenset({"sparse"}), frozenset({"lora"}), frozenset({"sparse", "lora"})]
ids = {"ids": lambda parts: "+".join(sorted(parts)) or "none"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Case:
    """Arguments of the operator, and clean ones for the formula: under the support the stored weight holds NaN."""

    x: Tensor
    stored: Tensor
    bias: Tensor | None
    values: Tensor | None
    index: Tensor | None
    a: Tensor | None
    b: Tensor | None
    transposed: bool

    def call(self) -> Tensor:
        args = (self.x, self.stored, self.bias, self.values, self.index, self.a, self.b, SCALE, self.transposed)
        return torch.ops.sparsify.sparse_lowrank_linear(*args)

    def trained(self) -> list[Tensor]:
        return [t for t in (self.x, self.bias, self.values, self.a, self.b) if t is not None]

    def oracle(self) -> tuple[Tensor, list[Tensor]]:
        """`x (W + S + s B A)ᵀ + b` and the leaves that it was computed from, all in fp64."""
        dtype = self.x.dtype
        leaves = {
            name: getattr(self, name).detach().to(dtype).double().requires_grad_(True)  # parts act in the dtype of x
            for name in ("x", "bias", "values", "a", "b")
            if getattr(self, name) is not None
        }
        weight = torch.nan_to_num(self.stored.detach()).double()
        if self.values is not None and self.index is not None:
            weight = weight.flatten().index_put((self.index.long(),), leaves["values"]).view(weight.shape)
        weight = weight.t() if self.transposed else weight
        if "a" in leaves:
            weight = weight + SCALE * leaves["b"] @ leaves["a"]
        y = leaves["x"] @ weight.t()
        return y + leaves["bias"] if "bias" in leaves else y, list(leaves.values())


def make(
    parts: frozenset[str],
    transposed: bool = False,
    shape: tuple[int, ...] = (7, M),
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    wide: bool = False,
) -> Case:
    master = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    def leaf(*size: int, of: torch.dtype = master) -> Tensor:
        return torch.randn(*size, dtype=torch.float64).mul(0.5).to(of).requires_grad_(True)

    stored = torch.randn((M, N) if transposed else (N, M), dtype=torch.float64).to(dtype)
    index = torch.randperm(N * M)[:COUNT].sort().values.to(torch.int64 if wide else torch.int32)
    sparse, lora = "sparse" in parts, "lora" in parts
    if sparse:
        stored.view(-1)[index.long()] = float("nan")
    return Case(
        x=leaf(*shape, of=dtype),
        stored=stored,
        bias=leaf(N, of=dtype) if bias else None,
        values=leaf(COUNT) if sparse else None,
        index=index if sparse else None,
        a=leaf(RANK, M) if lora else None,
        b=leaf(N, RANK) if lora else None,
        transposed=transposed,
    )


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = float(expected.detach().abs().max().clamp_min(1.0)) if expected.numel() else 1.0
    assert found.shape == expected.shape
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=0, atol=TOLERANCE[dtype] * scale * 4)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("parts", PARTS, **ids)
def test_forward_and_backward_equal_the_formula(parts, transposed, shape, dtype):
    for bias, wide in itertools.product([True, False], [False, True]):
        case = make(parts, transposed, shape, dtype, bias, wide)
        expected, leaves = case.oracle()
        y = case.call()
        assert y.dtype == dtype
        close(y, expected, dtype)
        g = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        wanted = torch.autograd.grad(expected, leaves, g.double())
        found = torch.autograd.grad(y, case.trained(), g)
        for leaf, ours, theirs in zip(case.trained(), found, wanted, strict=True):
            assert ours.dtype == leaf.dtype
            close(ours, theirs, dtype)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("parts", PARTS, **ids)
def test_gradients_pass_gradcheck(parts, transposed):
    case = make(parts, transposed, (2, 3, M))
    leaves = case.trained()

    def call(*_: Tensor) -> Tensor:
        return case.call()

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize(
    ("parts", "transposed", "dtype"),
    [(PARTS[1], True, torch.float32), (PARTS[2], False, torch.float32), (PARTS[3], False, torch.bfloat16)],
    ids=["sparse-conv1d", "lora", "both-bf16"],
)
def test_operators_pass_opcheck(parts, transposed, dtype):
    case = make(parts, transposed, (2, 3, M), dtype)
    ops.write_values(
        case.stored, None if case.values is None else case.values.detach(), case.index
    )  # scratch is settled
    rest = (case.values, case.index, case.a, case.b, SCALE, transposed)
    torch.library.opcheck(torch.ops.sparsify.sparse_lowrank_linear.default, (case.x, case.stored, case.bias, *rest))
    frozen = tuple(v.detach() if isinstance(v, Tensor) else v for v in rest)
    g = torch.randn(2, 3, N, dtype=dtype)
    values, index, a, b, *plain = frozen
    low = None if b is None else reduced(g, b.t())
    torch.library.opcheck(
        torch.ops.sparsify.sparse_lowrank_linear_dx.default, (g, case.stored, values, index, low, a, *plain)
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_strided_inputs_and_gradients_give_the_same(transposed):
    case = make(PARTS[3], transposed, (4, 6, M), torch.float32)
    expected, leaves = case.oracle()
    case.x = case.x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_(True)
    assert not case.x.is_contiguous()
    y = case.call()
    close(y, expected, torch.float32)
    for g in (
        torch.randn(6, 4, N).transpose(0, 1),
        torch.ones(()).expand(4, 6, N),
        torch.randn(N, 4, 6).permute(1, 2, 0),
    ):
        wanted = torch.autograd.grad(expected, leaves, g.double(), retain_graph=True)
        for ours, theirs in zip(torch.autograd.grad(y, case.trained(), g, retain_graph=True), wanted, strict=True):
            close(ours, theirs, torch.float32)


@pytest.mark.parametrize("parts", PARTS, **ids)
def test_autocast_computes_in_16_bits_and_keeps_the_gradients_in_32(parts):
    case = make(parts, False, (2, 3, M), torch.float32)
    expected, _ = case.oracle()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.call()
        assert nn.functional.linear(case.x, torch.randn(N, M)).dtype == y.dtype == torch.bfloat16
    close(y, expected, torch.bfloat16)
    for leaf, g in zip(case.trained(), torch.autograd.grad(y.float().sum(), case.trained()), strict=True):
        assert g.dtype == leaf.dtype == torch.float32


def test_oracle_weight_says_what_the_operator_does():
    case = make(PARTS[3])
    clean = torch.nan_to_num(case.stored)
    weight = ops.oracle_weight(clean, case.values, case.index, case.a, case.b, SCALE)
    torch.testing.assert_close(case.x @ weight.t() + case.bias, case.call())
    assert ops.oracle_weight(clean, None, None, None, None, SCALE) is clean


# --- what it must not do -------------------------------------------------------------------------------------------------


def saved(call: Callable[[], Any], constants: list[Tensor]) -> list[Tensor]:
    known = {t.untyped_storage().data_ptr() for t in constants}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return kept


@pytest.mark.parametrize("parts", PARTS[1:], **ids)
def test_the_input_is_saved_once_and_nothing_else(parts):
    """One `x` serves dS, dA and dB; `x Aᵀ` is computed again; there is no mask."""
    case = make(parts, False, (2, 3, M), torch.float32)
    constants = [t for t in (case.stored, case.bias, case.values, case.index, case.a, case.b) if t is not None]
    kept = saved(case.call, constants)
    assert [t.data_ptr() for t in kept] == [case.x.data_ptr()]


def test_nothing_is_saved_when_nothing_trains():
    case = make(PARTS[3], False, (2, 3, M), torch.float32)
    assert case.values is not None
    case.values, case.a, case.b = case.values.detach(), case.a.detach(), case.b.detach()
    assert saved(case.call, [case.stored, case.bias, case.values, case.index, case.a, case.b]) == []


def allocated(call: Callable[[], Any]) -> list[int]:
    """Bytes of every allocation of PyTorch's CPU allocator, however deep inside an operator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    events = recorded.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_no_dense_sum_of_weight_and_sparse_part_is_made(transposed):
    """128 × 96 weights and 3 tokens: any temporary of the weight's size would stand out."""
    n, m, k = 128, 96, 40
    stored = torch.randn((m, n) if transposed else (n, m))
    index = torch.randperm(n * m)[:k].sort().values.int()
    values, a, b = torch.randn(k), torch.randn(4, m), torch.randn(n, 4)
    x, g = torch.randn(3, m), torch.randn(3, n)
    dense = n * m * 4
    forward = torch.ops.sparsify.sparse_lowrank_linear
    sizes = allocated(lambda: forward(x, stored, None, values, index, a, b, 1.0, transposed))
    assert sizes
    assert max(sizes) < dense / 4
    backward = torch.ops.sparsify.sparse_lowrank_linear_dx
    sizes = allocated(lambda: backward(g, stored, values, index, g @ b, a, 1.0, transposed))
    assert sizes
    assert max(sizes) < dense / 4
    control = allocated(lambda: nn.functional.linear(x, stored.view(n, m) + 1))
    assert max(control) >= dense, "the control: W + S would be seen"


def gemms(call: Callable[[], Any]) -> list[tuple[int, int]]:
    """Shapes of the products of all matrix multiplications."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        call()
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::mv")
    shapes = [[s for s in e.input_shapes if len(s) == 2] for e in recorded.events() or [] if e.name in names]
    return sorted((s[-2][0], s[-1][1]) for s in shapes)


def test_backward_multiplies_each_side_by_its_factor_once():
    """`g B` serves dX and dA, `x Aᵀ` serves dB."""
    case = make(PARTS[3], False, (2, 3, M), torch.float32)
    y = case.call()
    products = gemms(lambda: y.backward(torch.ones_like(y)))
    assert products.count((6, RANK)) == 2


def test_without_a_sparse_part_no_dense_gradient_is_formed():
    case = make(PARTS[2], False, (2, 3, M), torch.float32)
    y = case.call()
    products = gemms(lambda: y.backward(torch.ones_like(y)))
    assert (N, M) not in products
    assert (RANK, M) in products
    assert (RANK, N) in products


def test_input_gradient_is_not_computed_when_nobody_needs_it():
    case = make(PARTS[2], False, (2, 3, M), torch.float32)
    case.x = case.x.detach()
    y = case.call()
    assert (6, M) not in gemms(lambda: y.backward(torch.ones_like(y)))


def test_frozen_entries_of_the_weight_are_never_written_and_its_version_stands():
    case = make(PARTS[3])
    before = torch.nan_to_num(case.stored, nan=5.0).view(-1).index_fill(0, case.index.long(), 0.0)
    version = case.stored._version
    case.call().sum().backward()
    assert torch.equal(case.stored.view(-1).index_fill(0, case.index.long(), 0.0), before)
    assert case.stored._version == version
    assert case.stored.grad is None


def test_backward_uses_the_values_and_not_what_lies_under_them():
    case = make(PARTS[1])
    y = case.call().sum()
    expected, leaves = case.oracle()
    case.stored.data.view(-1)[case.index.long()] = float("nan")
    (dx,) = torch.autograd.grad(y, [case.x])
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), leaves[:1])[0])


@pytest.mark.parametrize("name", ["values", "a", "b"])
def test_changing_a_part_between_forward_and_backward_is_an_error(name):
    case = make(PARTS[3])
    y = case.call().sum()
    with torch.no_grad():
        getattr(case, name).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_explicit_zeros_stay_in_the_support():
    """A value that is zero goes on training: the support is fixed, whatever the values are."""
    case = make(PARTS[1], True)
    with torch.no_grad():
        case.values.zero_()
    case.call().sum().backward()
    assert bool((case.values.grad != 0).all())
    assert case.values.grad.shape == (COUNT,)


def test_two_forwards_before_one_backward_add_their_gradients():
    case = make(PARTS[3])
    first = case.call()
    other = Case(**{**vars(case), "x": torch.randn(3, M, dtype=torch.float64)})
    together = torch.autograd.grad(first.sum() + other.call().sum(), [case.values, case.a, case.b])
    joint = Case(**{**vars(case), "x": torch.cat([case.x.detach(), other.x])})
    for ours, theirs in zip(
        together, torch.autograd.grad(joint.call().sum(), [case.values, case.a, case.b]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
