"""Derivatives of derivatives through every training operator: against a dense twin, and against finite differences in fp64."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from operator_cases import CASES, ONE_OF_EACH, OperatorCase, case_of
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

SHAPES = [(4,), (2, 3), (2, 1, 3), (), (0,), (2, 0)]


def derivatives(case: OperatorCase, leaves: list[Tensor], twin: bool) -> list[Tensor]:
    """Value, and the first three derivatives of sums over it with fixed, random weights, one after the other."""
    torch.manual_seed(7)
    y = case.of(case.twin if twin else case.operator)(*leaves)
    found, total = [y], (y * torch.randn(y.shape, dtype=y.dtype)).sum() + y.square().sum() * 0.3
    for _ in range(3):
        if not total.requires_grad:
            break
        gradients = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]
        found += gradients
        total = sum(
            ((g * torch.randn(g.shape, dtype=g.dtype)).sum() + g.square().sum() * 0.1 for g in gradients),
            torch.zeros(()),
        )
    return found


def assert_agree(case: OperatorCase, places: tuple[int, ...]) -> None:
    own, leaves = case.needing(places)
    found, expected = derivatives(own, leaves, False), derivatives(own, leaves, True)
    assert len(found) == len(expected)
    for order, (one, other) in enumerate(zip(found, expected, strict=True)):
        scale = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * (1 + scale), msg=lambda m, o=order: f"#{o}: {m}")


@pytest.mark.parametrize("name", list(CASES))
def test_three_orders_equal_the_dense_twin(name):
    """Of each case two of the shapes, in turn, so that neighbours see the others."""
    turn = list(CASES).index(name)
    for step in (0, 3):
        place = (turn + step) % len(SHAPES)
        case = case_of(name, SHAPES[place], bias=(turn + step) % 4 < 2)
        assert_agree(case, case.leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_three_orders_equal_the_dense_twin_in_every_shape(name):
    for shape, bias in itertools.product(SHAPES, (True, False)):
        case = case_of(name, shape, bias)
        assert_agree(case, case.leaves)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_whatever_needs_a_gradient(name):
    """One argument alone, and all but one: nothing that a formula saves depends on the others."""
    case = case_of(name, (2, 3))
    for place in case.leaves:
        assert_agree(case, (place,))
        if len(case.leaves) > 2:
            assert_agree(case, tuple(p for p in case.leaves if p != place))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_every_combination_of_what_needs_a_gradient(name):
    case = case_of(name, (3,))
    for count in range(1, len(case.leaves)):
        for places in itertools.combinations(case.leaves, count):
            assert_agree(case, places)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if place % 2 == 0 else pytest.mark.slow) for place, n in enumerate(ONE_OF_EACH)]
)
def test_finite_differences(name):
    """First and second derivatives, backward, forward over backward, and batched, with perturbations of the arguments."""
    case, leaves = case_of(name, (2,)).needing(case_of(name, (2,)).leaves)
    if name.startswith("masked") and name != "masked_grad":
        pytest.skip("a perturbed pruned entry breaks the operator's precondition; the twin masks it")
    function = case.of(case.operator)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("turned", [False, True])
def test_finite_differences_of_a_masked_weight(turned):
    """Perturbed where it survives."""
    case = case_of("masked_turned" if turned else "masked", (2,))
    own, leaves = case.needing(case.leaves)
    kept = (case.arguments[1] != 0).double()
    call = own.of(own.operator)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return call(x, weight * kept, bias)

    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("turned", [False, True])
def test_second_derivatives_of_a_masked_weight_are_masked(turned):
    case = case_of("masked_turned" if turned else "masked", (4,))
    own, (x, weight, _) = case.needing(case.leaves)
    gone = case.arguments[1] == 0
    (g,) = torch.autograd.grad(own.of(own.operator)(x, weight, own.arguments[3]).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), weight)
    assert bool((second[gone] == 0).all())
    assert bool((second[~gone] != 0).any())


@pytest.mark.parametrize(
    "name", ["sparse_lowrank_sparse+lora", "quantized_int8_sparse+lora", "quantized_nf4_rows+lora"]
)
def test_an_input_saved_as_its_factors_stays_connected(name):
    """`x = gate · up` is saved as gate and up; second derivatives with respect to x itself, and to gate and up, are right."""
    case = case_of(name, (4,))
    own, (x, *parts) = case.needing(case.leaves)
    gate, up = torch.randn_like(x).requires_grad_(), torch.randn_like(x).requires_grad_()

    def second(function) -> list[Tensor]:
        product = gate * up
        y = own.of(function)(product, *parts)
        first = torch.autograd.grad(y.square().sum(), [product, *parts], create_graph=True)
        total = sum((g.sin().sum() for g in first), torch.zeros(()))
        return list(torch.autograd.grad(total, [product, gate, up, *parts]))

    for found, expected in zip(second(own.operator), second(own.twin), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_factor_written_to_between_the_product_and_the_operator_is_no_matter_for_the_forward():
    """As for `F.linear`: the forward runs, and the multiplication's own backward says what is wrong."""
    case = case_of("sparse_lowrank_lora", (4,))
    own, (x, *parts) = case.needing(case.leaves)
    gate, up = torch.randn_like(x).requires_grad_(), torch.randn_like(x).requires_grad_()
    product = gate * up
    with torch.no_grad():
        gate.add_(1.0)
    y = own.of(own.operator)(product, *parts)
    torch.testing.assert_close(y, own.of(own.twin)(product, *parts))
    torch.autograd.grad(y.sum(), parts, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["partial_columns", "partial_at_rows", "sparse_lowrank_sparse+lora", "masked"])
def test_second_derivatives_in_lower_precision_keep_the_types(name, dtype):
    """Trained parts in fp32 over 16-bit weights: their second gradients arrive in fp32, near those of fp64."""
    case = case_of(name, (2, 3))
    trained = {"partial_columns": (3,), "partial_at_rows": (3,), "masked": ()}.get(name, (3, 5, 6))

    def cast(place: int, value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(torch.float32 if place in trained else dtype)

    low = OperatorCase(case.operator, [cast(p, a) for p, a in enumerate(case.arguments)], case.leaves, case.twin)
    exact = OperatorCase(
        case.operator, [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in low.arguments],
        case.leaves, case.twin,
    )  # fmt: skip

    def second(of: OperatorCase) -> list[Tensor]:
        own, leaves = of.needing(of.leaves)
        y = own.of(own.operator)(*leaves)
        (g,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), leaves))

    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for one, other, place in zip(second(low), second(exact), case.leaves, strict=True):
        assert one.dtype == (torch.float32 if place in trained else dtype)
        assert float((one.double() - other).abs().max()) <= tolerance * float(other.abs().max())


def test_a_recorded_backward_warns_of_nothing():
    """PyTorch warns where a backward without a formula is differentiated."""
    case, leaves = case_of("quantized_int8_columns+sparse+lora", (3,)).needing((0, 6, 9, 11, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = case.of(case.operator)(*leaves)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        sum((g.square().sum() for g in first), torch.zeros(())).backward()
    assert all(leaf.grad is not None for leaf in leaves)
