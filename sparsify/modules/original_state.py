"""The state dict of a lowered linear is that of the linear it stands for, whatever it keeps inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparsify.kernels.cpu.formats import FormatError

if TYPE_CHECKING:
    from jaxtyping import Float


class OriginalState(nn.Module):
    """`weight` (out, in), or (in, out) where `transposed` as Conv1D stores it, and `bias`; subclasses say how to give and take them."""

    in_features: int
    out_features: int
    transposed: bool

    def dense(self) -> Float[Tensor, "n m"]:
        """The weight that this module computes with, (out, in)."""
        raise NotImplementedError

    def original_bias(self) -> Float[Tensor, " n"] | None:
        """The bias in the type that it had before lowering."""
        return getattr(self, "bias", None)

    def take(self, weight: Float[Tensor, "n m"], bias: Float[Tensor, " n"] | None) -> None:
        """Compute with another weight, (out, in), and, unless it is None, another bias from now on."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        weight, bias = self.dense(), self.original_bias()
        destination[prefix + "weight"] = (weight.t() if self.transposed else weight).contiguous()
        if bias is not None:
            destination[prefix + "bias"] = bias

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, bias = state_dict.get(prefix + "weight"), state_dict.get(prefix + "bias")
        has_bias = self.original_bias() is not None
        missing_keys += [prefix + "bias"] if has_bias and bias is None else []
        if weight is None:
            missing_keys.append(prefix + "weight")
            return
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        wrong = [misfit(f"{prefix}weight", weight, shape)]
        wrong += [misfit(f"{prefix}bias", bias, (self.out_features,))] if has_bias and bias is not None else []
        if any(wrong):
            error_msgs += [text for text in wrong if text]
            return
        weight = (weight.t() if self.transposed else weight).detach()
        try:
            self.take(weight, bias.detach() if has_bias and bias is not None else None)
        except FormatError as error:  # what these kernels cannot hold: NaN, Inf
            error_msgs.append(f"{prefix}weight cannot be packed: {error}")


def misfit(name: str, tensor: object, shape: tuple[int, ...]) -> str:
    """Why a tensor of a state dict is not taken, or nothing: nothing native may read what does not have the size that it expects."""
    if not isinstance(tensor, Tensor):
        return f"{name} is a {type(tensor).__name__}, not a tensor"
    if tuple(tensor.shape) != shape:
        return f"size mismatch for {name}: got {tuple(tensor.shape)}, expected {shape}"
    if not tensor.is_floating_point() or tensor.is_meta:
        return f"{name} is {tensor.dtype} on {tensor.device}, expected floats with data"
    return ""


class Whole(Protocol):
    """A larger linear, of which `RowsOfWhole` are rows."""

    dtype: torch.dtype


Linear = TypeVar("Linear", bound=Whole)


class RowsOfWhole(OriginalState, Generic[Linear]):
    """Rows of a larger linear from `first` on, as the linear that the host calls by this name. whole: the larger one, no submodule of
    this; linear: what stood here before."""

    def __init__(self, whole: Linear, first: int, linear: OriginalState) -> None:
        super().__init__()
        self.owner, self.first = (whole,), first  # in a tuple: not a submodule
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.transposed, self.has_bias = linear.transposed, linear.bias is not None

    @property
    def whole(self) -> Linear:
        return self.owner[0]

    @property
    def rows(self) -> slice:
        """Of the whole, those of this linear."""
        return slice(self.first, self.first + self.out_features)

    @property
    def weight(self) -> Float[Tensor, "p q"]:
        """Shape and dtype of the original weight without its data."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape[::-1] if self.transposed else shape, dtype=self.whole.dtype, device="meta")
