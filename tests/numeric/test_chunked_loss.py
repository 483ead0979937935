"""`sparsify::chunked_loss` against its written-out oracle in fp64, and what is computed of it in one walk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.ops.chunked_loss import chunked_cross_entropy, oracle_chunked_loss, oracle_chunked_loss_backward

V, K, IGNORE = 13, 7, -100
op = torch.ops.sparsify.chunked_loss


def case(tokens: int, dtype: torch.dtype, bias: bool, ignored: int = 2):
    x, weight = torch.randn(tokens, K, dtype=dtype), torch.randn(V, K, dtype=dtype)
    target = torch.randint(0, V, (tokens,))
    target[:ignored] = IGNORE
    return x, weight, torch.randn(V, dtype=dtype) if bias else None, target


@given(
    tokens=st.integers(0, 9),
    chunk=st.integers(1, 12),
    bias=st.booleans(),
    made=st.tuples(st.booleans(), st.booleans()),
    cap=st.sampled_from([0.0, 2.5]),
    gain=st.sampled_from([1.0, 0.3]),
    ignored=st.integers(0, 9),
)
def test_loss_and_gradients_equal_the_oracle(tokens, chunk, bias, made, cap, gain, ignored):
    x, weight, shift, target = case(tokens, torch.float64, bias, ignored)
    leaves = [t.requires_grad_() for t in (x, weight, shift) if t is not None]
    loss = op(x, weight, shift, target, gain, cap, IGNORE, chunk, *made)[0]
    plain = [None if t is None else t.detach() for t in (x, weight, shift)]
    torch.testing.assert_close(loss, oracle_chunked_loss(*plain, target, gain, cap, IGNORE), rtol=1e-12, atol=1e-12)
    (3.0 * loss).backward()
    wanted = oracle_chunked_loss_backward(*plain, target, gain, cap, IGNORE)
    for leaf, want in zip(leaves, wanted, strict=False):
        torch.testing.assert_close(leaf.grad, 3.0 * want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_as_near_as_the_ordinary_loss(dtype):
    x, weight, _, target = case(40, dtype, False)
    x.requires_grad_()
    loss = chunked_cross_entropy(x, weight, target, chunk=16)
    assert loss.dtype == torch.float32
    loss.backward()
    exact = x.detach().double().requires_grad_()
    want = F.cross_entropy(exact @ weight.double().t(), target)
    want.backward()
    want = want.detach()
    eps = torch.finfo(dtype).eps
    # a logit is rounded once, to dtype; it may be as large as Σ |x w|, and moves the loss by no more than itself
    size = (x.detach().double().abs() @ weight.double().abs().t()).max()
    assert abs(float(loss.detach().double() - want)) <= 2 * eps * float(size)
    # softmax moves by the error of a logit, then the product with the head rounds every term, and the sum
    bound = 4 * eps * (float(size) + 2) * weight.double().abs().sum(0) / 38
    assert bool(((x.grad.double() - exact.grad).abs() <= bound).all())


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return made


def test_all_logits_never_exist():
    x, weight = torch.randn(64, K, requires_grad=True), torch.randn(500, K)
    target = torch.randint(0, 500, (64,))
    with Largest() as mode:
        torch.ops.sparsify.chunked_loss(x, weight, None, target, 1.0, 0.0, IGNORE, 8, True, False)[0].backward()
    assert mode.numel < 64 * 500
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(x, weight, target, chunk=8)
    assert max(kept) == weight.numel()


def test_reductions_and_shapes_are_those_of_torch():
    x, weight, bias, target = case(12, torch.float64, True)
    for reduction in ("mean", "sum"):
        got = chunked_cross_entropy(x.view(3, 4, K), weight, target.view(3, 4), bias=bias, chunk=5, reduction=reduction)
        torch.testing.assert_close(got, F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction))
    capped = F.cross_entropy(30 * torch.tanh(0.5 * F.linear(x, weight) / 30), target)
    torch.testing.assert_close(chunked_cross_entropy(x, weight, target, gain=0.5, softcap=30.0), capped)
    nothing = torch.full_like(target, IGNORE)
    assert torch.isnan(chunked_cross_entropy(x, weight, nothing))
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        chunked_cross_entropy(x, weight, target, reduction="none")


def test_a_trained_head_and_inputs_under_autocast():
    x, weight, _, target = case(10, torch.float32, False)
    weight.requires_grad_()
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(x, weight, target, chunk=3)
        want = F.cross_entropy(F.linear(x, weight).float(), target)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert x.grad is not None


def test_it_passes_opcheck():
    for bias, made in ((True, (True, True)), (False, (True, False))):
        x, weight, shift, target = case(9, torch.float32, bias)
        given = (x.requires_grad_(), weight, shift, target, 0.7, 2.0, IGNORE, 4, *made)
        torch.library.opcheck(op, given)


def test_what_does_not_fit_is_refused():
    x, weight, _, target = case(6, torch.float32, False)
    numbers = (1.0, 0.0, IGNORE, 4, False, False)
    for args, words in (
        ((x[:, 1:], weight, None, target), "do not fit"),
        ((x, weight, None, target[1:]), "do not fit"),
        ((x, weight, torch.randn(3), target), "do not fit"),
        ((x, weight, None, target.float()), "int64"),
        ((x[None], weight, None, target), "two matrices"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*args, *numbers)
    with pytest.raises(RuntimeError, match="positive"):
        op(x, weight, None, target, 1.0, 0.0, IGNORE, 0, False, False)


def test_tokens_that_count_nothing_may_hold_anything():
    x, weight, _, target = case(8, torch.float64, False, ignored=3)
    x[:3] = float("nan")
    x.requires_grad_()
    loss = chunked_cross_entropy(x, weight, target, chunk=2)
    loss.backward()
    kept = x.detach()[3:].clone().requires_grad_()
    want = F.cross_entropy(kept @ weight.t(), target[3:])
    want.backward()
    torch.testing.assert_close(loss, want)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[3:], kept.grad)
    assert not bool(x.grad[:3].any())
