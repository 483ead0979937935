"""Host modules that carry trained slices: subclasses of what they replace, so `isinstance`, hooks and names go on working."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import sparsify.ops

if TYPE_CHECKING:
    from sparsify.program import TrainedSlice


class PartialMixin:
    """A linear with one trained block of whole channels: `weight` is frozen, `weight_slice` is the parameter.

    slice_start, slice_axis: where the block lies in the logical `(out, in)` weight.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_slice: nn.Parameter
    slice_start: int
    slice_axis: int

    def logical_weight(self) -> Tensor:
        """The frozen weight as `(out, in)`."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        check_dtype(self, x)
        weight = self.logical_weight()
        return torch.ops.sparsify.partial_linear(
            x, weight, self.bias, self.weight_slice, self.slice_start, self.slice_axis
        )

    def extra_repr(self) -> str:
        end = self.slice_start + self.weight_slice.shape[self.slice_axis]
        side = "columns" if self.slice_axis == 1 else "rows"
        n, m = self.logical_weight().shape
        return f"in_features={m}, out_features={n}, bias={self.bias is not None}, trained {side}=[{self.slice_start}:{end}]"


def check_dtype(module: Any, x: Tensor) -> None:
    """The same refusal as `F.linear`: without autocast, input and weight must agree in dtype."""
    if x.dtype != module.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(f"{type(module).__name__}: the input is {x.dtype}, the weight {module.weight.dtype}; cast one, or use autocast")


class PartialLinear(PartialMixin, nn.Linear):
    """`nn.Linear` with a trained block of columns (S2FT Down, O) or rows (Up, V)."""


@functools.cache
def partial_conv1d() -> type[nn.Module]:
    """The same for transformers' Conv1D, whose weight is stored `(in, out)`; made on first use to keep imports lean."""
    from transformers.pytorch_utils import Conv1D

    class PartialConv1D(PartialMixin, Conv1D):
        """GPT-2's Conv1D with a trained block of logical columns or rows."""

        def logical_weight(self) -> Tensor:
            return self.weight.t()

        def __reduce_ex__(self, protocol: Any) -> Any:
            return rebuild_conv1d, (), self.__dict__

    return PartialConv1D


def rebuild_conv1d() -> nn.Module:
    cls = partial_conv1d()
    return cls.__new__(cls)


def make_partial(module: nn.Module, piece: TrainedSlice, block: Tensor) -> None:
    """Turn a linear of *our own* module tree into its partial form, in place: hooks, name and references stay."""
    conv1d = not isinstance(module, nn.Linear)
    if conv1d:
        module.__class__ = partial_conv1d()
    else:
        module.__class__ = PartialLinear
    assert isinstance(module, PartialMixin)
    module.weight_slice = block if isinstance(block, nn.Parameter) else nn.Parameter(block)
    module.slice_start = piece.start
    module.slice_axis = 1 if piece.side == "column" else 0


def make_plain(module: nn.Module) -> nn.Parameter:
    """Undo `make_partial`: the module computes with `weight` alone again. Returns the block that it carried."""
    assert isinstance(module, PartialMixin)
    block = module.weight_slice
    del module._parameters["weight_slice"]
    del module.slice_start, module.slice_axis
    module.__class__ = nn.Linear if isinstance(module, nn.Linear) else type(module).__mro__[2]  # type: ignore[assignment]
    return block


def write_slice(module: nn.Module) -> None:
    """Bring `weight` up to date with `weight_slice` (the operator does it in every forward)."""
    assert isinstance(module, PartialMixin)
    weight = module.logical_weight()
    sparsify.ops.write_block(weight, module.weight_slice.detach(), module.slice_start, module.slice_axis)
