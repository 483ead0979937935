"""Operators under torch.func (grad, vmap, jvp, hessian) and forward-mode: the twin's numbers, or a refusal that says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import OperatorCase, case_of
from torch import Tensor
from torch.autograd import forward_ad

from sparsify.errors import RefusedError
from sparsify.kernels.cpu import formats as cpu_formats
from sparsify.kernels.gpu.formats import pack_stream

SOME = [
    "partial_columns", "partial_at_rows_turned", "partial_dx_columns", "sparse_lowrank_sparse+lora_turned",
    "sparse_lowrank_dx_sparse+lora", "quantized_nf4_rows+lora", "quantized_int8_columns+sparse+lora_turned",
    "quantized_int4_dx_columns", "masked", "masked_turned", "apply_mask", "masked_grad", "sampled_product",
    "channel_grad", "skinny_both",
]  # fmt: skip


def leaves_of(case: OperatorCase) -> list[Tensor]:
    return [case.arguments[place].contiguous() for place in case.leaves]


def scalar(case: OperatorCase, function: Callable[..., Any]) -> Callable[..., Tensor]:
    call = case.of(function)
    return lambda *leaves: call(*leaves).sin().sum()


def both(case: OperatorCase, make: Callable[[Callable[..., Tensor]], Any]) -> None:
    """`make` of the operator and of the twin must agree; PyTorch must not warn that it loops."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = make(scalar(case, case.operator))
    expected = make(scalar(case, case.twin))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOME)
def test_reverse_and_forward_transforms(name):
    case = case_of(name, (2,))
    leaves = leaves_of(case)
    every = tuple(range(len(leaves)))
    tangents = tuple(torch.randn_like(x) for x in leaves)
    both(case, lambda f: torch.func.grad(f, argnums=every)(*leaves))
    both(case, lambda f: torch.func.jvp(f, tuple(leaves), tangents))
    both(case, lambda f: torch.func.hessian(f, argnums=0)(*leaves))
    both(case, lambda f: torch.func.jvp(torch.func.grad(f, argnums=every), tuple(leaves), tangents))
    both(case, lambda f: torch.func.vjp(torch.func.grad(f, argnums=every), *leaves)[1](tangents))
    both(
        case, lambda f: torch.func.jacrev(torch.func.jacrev(f, argnums=1), argnums=0)(*leaves) if len(leaves) > 1 else 0
    )


@pytest.mark.parametrize("name", SOME)
def test_batches(name):
    """Each argument batched alone, all together, and gradients for each sample."""
    case = case_of(name, (2,))
    leaves = leaves_of(case)
    batched = [torch.stack([x, x.flip(0) * 0.5, -x]) for x in leaves]
    for place in range(len(leaves)):
        dims = tuple(0 if p == place else None for p in range(len(leaves)))
        arguments = [batched[p] if p == place else x for p, x in enumerate(leaves)]
        both(case, lambda f, d=dims, a=arguments: torch.vmap(f, d)(*a))
    both(case, lambda f: torch.vmap(f)(*batched))
    both(case, lambda f: torch.vmap(torch.func.grad(f, argnums=tuple(range(len(leaves)))))(*batched))


@pytest.mark.parametrize("name", SOME)
def test_tangents_without_torch_func(name):
    """One argument dual at a time, whether it needs a gradient or not: a tangent is never dropped."""
    case = case_of(name, (2,))
    leaves = leaves_of(case)
    for place in range(len(leaves)):
        for needs in (False, True):
            found = []
            for function in (case.operator, case.twin):
                with forward_ad.dual_level():
                    inputs = [x.detach().clone().requires_grad_(needs) for x in leaves]
                    inputs[place] = forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place]))
                    found.append(forward_ad.unpack_dual(scalar(case, function)(*inputs)).tangent)
            assert found[0] is not None
            torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    "name", ["partial_columns", "sparse_lowrank_sparse+lora", "quantized_int8_columns+sparse+lora", "masked"]
)
def test_a_tangent_that_arrives_in_the_backward(name):
    """Forward over reverse, where only what follows the operator is dual."""
    case, leaves = case_of(name, (2,)).needing(case_of(name, (2,)).leaves)
    found = []
    for function in (case.operator, case.twin):
        with forward_ad.dual_level():
            y = case.of(function)(*leaves)
            factor = forward_ad.make_dual(torch.ones_like(y), torch.arange(y.numel()).view_as(y).to(y))
            gradients = torch.autograd.grad((y.square() * factor).sum(), leaves)
            found.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    torch.testing.assert_close(found[0], found[1])


def test_inference_operators_refuse():
    weight, x = torch.randn(32, 32), torch.randn(2, 32)
    stream = pack_stream(weight)
    packed = [stream.values, stream.meta, stream.base, stream.start, stream.order]
    call = lambda x: torch.ops.sparsify.gpu_linear(x, None, None, "gaps", 32, 32, False, "none", packed)  # noqa: E731
    bits = cpu_formats.pack(weight)
    cpu = lambda x: torch.ops.sparsify.packed_linear(  # noqa: E731
        x, bits.masks, bits.values, bits.panel_ptr, None, None, None, None, 32, 32, bits.group, "none", False, False
    )
    for function in (call, cpu):
        with pytest.raises(RefusedError, match="inference operator: it has no derivative under torch.func"):
            torch.func.jvp(function, (x,), (x,))
        with pytest.raises(RefusedError, match="before sparsify.compile"):
            torch.func.grad(lambda x, f=function: f(x).sum())(x)
