"""What a linear saves of its input for backward: the input itself or, of a product, its two factors.

The gradients of A, B and of single entries need the whole input. Down's input in a gated FFN is `act(gate) · up`, and the
multiplication keeps both factors for its own backward anyway: Down keeps these too, instead of the product, and multiplies
them again when its gradients are due. That is one elementwise product per layer for `tokens · ffn` elements less memory, in
every model whose code multiplies two activations (a compiled graph decides for itself what to recompute).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.function import FunctionCtx

if TYPE_CHECKING:
    from jaxtyping import Float


_plain: ContextVar[tuple[type, ...]] = ContextVar("plain", default=(Tensor,))


@contextlib.contextmanager
def fakes_count_as_plain() -> Iterator[None]:
    """Inside, fake tensors are saved as the tensors that they stand for would be: for counting a step. A tracer's are not plain."""
    from torch._subclasses.fake_tensor import FakeTensor

    token = _plain.set((Tensor, FakeTensor))
    try:
        yield
    finally:
        _plain.reset(token)


class _Link(torch.autograd.Function):
    """A tensor of the shape of `x` that holds one zero, and whose gradient is that of `x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Float[Tensor, "*t m"]) -> Float[Tensor, "*t m"]:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: FunctionCtx, *outer: Tensor) -> Float[Tensor, "*t m"]:
        return outer[0]


def saved_input(x: Float[Tensor, "*t m"]) -> tuple[Float[Tensor, "*t m"], Float[Tensor, "*t m"] | None]:
    """`(x, None)`, or the factors of `x` where autograd holds them already; `restored_input` makes `x` of it, bit for bit."""
    product = x.grad_fn
    if product is None or product.name() != "MulBackward0" or x._version or _observed():
        return x, None
    try:
        factors: tuple[Tensor | None, Tensor | None] = (product._saved_self, product._saved_other)  # type: ignore[attr-defined]
    except RuntimeError:  # one was written to since: the product's own backward will say so, if it is ever asked for
        return x, None
    first, second = factors
    for factor in factors:
        if factor is None or type(factor) not in _plain.get() or factor.shape != x.shape or factor.dtype != x.dtype:
            return x, None  # a broadcast factor, or one that needs no gradient and is not kept
    return first, second  # type: ignore[return-value]


def input_link(x: Float[Tensor, "*t m"], second: Float[Tensor, "*t m"] | None) -> Float[Tensor, "*t m"] | None:
    """What connects an input that was taken apart (`second` is a factor) with the graph: one number, whatever its size."""
    if second is None:
        return None
    with torch.enable_grad():
        return _Link.apply(x)


def restored_input(
    first: Float[Tensor, "*t m"] | None, second: Float[Tensor, "*t m"] | None, link: Float[Tensor, "*t m"] | None = None
) -> Float[Tensor, "*t m"] | None:
    """The input that `saved_input` took apart; None if none was saved.

    Where the backward itself is recorded (create_graph), the product hangs on `x` by its link, as `x` itself would: a derivative
    with respect to `x` goes there, and one with respect to the factors through the multiplication that made `x`."""
    if first is None or second is None:
        return first
    if link is None or not torch.is_grad_enabled():
        return first * second
    return first.detach() * second.detach() + (link - link.detach())


def _observed() -> bool:
    """Whether somebody else decides what is saved: a compiler, or hooks on saved tensors, whose tensors (those of activation
    checkpointing) may be unpacked only once."""
    return torch.compiler.is_compiling() or _top_saved_tensors_default_hooks(True) is not None
