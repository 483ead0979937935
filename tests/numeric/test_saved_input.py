"""Down's input `act(gate) · up` is not saved where the product keeps both factors anyway; the gradients are the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from sparsify.formats import pack
from sparsify.ops.saved_input import fakes_count_as_plain, restored_input, saved_input

TOKENS, WIDTH, OUT, RANK = 5, 8, 6, 2


class Gated:
    """`silu(gate) · up` into a linear with a low-rank part and, quantised or not, a frozen base."""

    def __init__(self, quantized: bool = False) -> None:
        torch.manual_seed(0)
        self.gate, self.up = (torch.randn(TOKENS, WIDTH, requires_grad=True) for _ in range(2))
        self.weight = torch.randn(OUT, WIDTH)
        self.a, self.b = torch.randn(RANK, WIDTH, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
        self.packed = pack(self.weight, "int8") if quantized else None
        self.storage: StorageWeakRef | None = None

    def product(self) -> Tensor:
        return nn.functional.silu(self.gate) * self.up

    def down(self, x: Tensor) -> Tensor:
        ops = torch.ops.sparsify
        if self.packed is None:
            return ops.sparse_lowrank_linear(x, self.weight, None, None, None, self.a, self.b, 2.0, False)
        shape = ("int8", OUT, WIDTH, False)
        parts = (None, None, None, 0, None, None, self.a, self.b)
        return ops.quantized_linear(x, *shape, *parts, 2.0, self.packed)

    def call(self) -> Tensor:
        x = self.product()
        self.storage = StorageWeakRef(x.untyped_storage())
        return self.down(x)

    def gradients(self, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y.square().sum(), [self.gate, self.up, self.a, self.b]))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "int8"])
def test_the_product_is_freed_and_the_gradients_are_the_same_bits(quantized):
    case = Gated(quantized)
    y = case.call()
    assert case.storage is not None
    assert case.storage.expired(), "nobody holds act(gate) · up after the forward"
    held = case.product().view(TOKENS, WIDTH)  # a view: not recognised, saved whole
    assert_equal(case.gradients(y), case.gradients(case.down(held)))


def test_fake_tensors_are_saved_as_what_they_stand_for_where_a_step_is_counted():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        case = Gated()
        x = case.product()
        assert saved_input(x) == (x, None)  # as any tracer's
        with fakes_count_as_plain():
            _, second = saved_input(x)
        assert second is not None
        assert second.untyped_storage()._cdata == case.up.untyped_storage()._cdata
        assert saved_input(x) == (x, None)


def test_hooks_on_saved_tensors_see_the_input_itself():
    """Their tensors may be unpacked once only (activation checkpointing), so nothing is unpacked on their behalf."""
    case = Gated()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = case.call()
        assert case.storage is not None
        assert not case.storage.expired()
    case.gradients(y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    case = Gated()
    expected = case.gradients(case.call())

    def block(gate: Tensor, up: Tensor) -> Tensor:
        return case.down(nn.functional.silu(gate) * up)

    y = checkpoint(block, case.gate, case.up, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.square().sum().backward()
    assert_equal([t.grad for t in (case.gate, case.up, case.a, case.b) if t.grad is not None], expected)


def test_compiled_graphs_decide_for_themselves():
    case = Gated()
    expected = case.gradients(case.call())
    compiled = torch.compile(lambda: case.down(case.product()), backend="aot_eager", fullgraph=True)
    assert_equal(case.gradients(compiled()), expected)


def test_a_factor_changed_before_backward_is_an_error():
    case = Gated()
    y = case.down(case.product())
    with torch.no_grad():
        case.up.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def other_inputs() -> dict[str, Tensor]:
    """Inputs that must be saved as they are."""
    leaf = torch.randn(3, 4, requires_grad=True)
    changed = leaf * leaf.exp()
    with torch.no_grad():
        changed.add_(1.0)
    return {
        "leaf": leaf,
        "no gradient": leaf.detach() * 2,
        "sum": leaf + leaf,
        "scaled": leaf * 2.0,
        "frozen factor": leaf * torch.randn(3, 4),
        "broadcast": leaf * torch.randn(4, requires_grad=True),
        "other dtype": leaf * torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        "changed afterwards": changed,
        "view": (leaf * leaf.exp()).view(4, 3),
    }


@pytest.mark.parametrize("name", list(other_inputs()))
def test_what_is_saved_whole(name):
    x = other_inputs()[name]
    assert saved_input(x)[0] is x
    assert saved_input(x)[1] is None


def test_restored_bit_for_bit():
    x = torch.randn(7, 9, requires_grad=True).sin() * torch.randn(7, 9, requires_grad=True).exp()
    first, second = saved_input(x)
    assert second is not None
    restored = restored_input(first, second)
    assert restored is not None
    assert torch.equal(restored, x)
    assert restored_input(None, None) is None
