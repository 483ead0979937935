"""Linears over a packed base (Quantize), with any part of our own kinds beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.methods.channels import PartialMixin, describe_slice
from sparsify.methods.sparse_lowrank import SparseLowRankMixin, describe_parts
from sparsify.model.sharded import is_sharded, local, piece_of
from sparsify.modules.adapted import carries
from sparsify.ops.quantized_linear import dense_weight

if TYPE_CHECKING:
    from typing import Self

    from jaxtyping import Float, Int


def is_whole_numbers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


class QuantizedMixin(SparseLowRankMixin, PartialMixin):
    """A linear over a packed base, with any trained part beside it. `weight` is empty and only carries dtype and device.

    Packed integers are frozen Parameters, which `fully_shard` keeps in pieces as any other (mixed precision leaves integers as they
    are). Scales of floating types are buffers, whole on every rank: mixed precision would round them, and with them the base.
    """

    packed_names: tuple[str, ...]
    format: str
    shape: torch.Size
    compute_dtype: torch.dtype | None = None  # of a base that computes in it whatever the input has (bitsandbytes)
    trained_leaves = (*PartialMixin.trained_leaves, *SparseLowRankMixin.trained_leaves)
    part_buffers = (*SparseLowRankMixin.part_buffers, *PartialMixin.part_buffers)
    placing_buffers = PartialMixin.placing_buffers
    part_settings = (*PartialMixin.part_settings, *SparseLowRankMixin.part_settings)
    support_leaf = SparseLowRankMixin.support_leaf
    entries_of_weight = (*PartialMixin.entries_of_weight, *SparseLowRankMixin.entries_of_weight)
    follows_from_weight = False

    # no experts over a packed base, so no offsets
    def forward(self, x: Float[Tensor, "*t m"]) -> Float[Tensor, "*t n"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.compute_dtype is None or x.dtype == self.compute_dtype:
            return super().forward(x)
        return super().forward(x.to(self.compute_dtype)).to(x.dtype)

    def stored_shape(self) -> torch.Size:
        return self.shape

    def packed(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.packed_names]

    @torch.no_grad()
    def hold(self, packed: Sequence[Tensor], pieces: bool = False) -> None:
        """Take packed tensors, in the place of those that are held. Of a host in pieces every rank keeps its own. pieces: they come so."""
        self.packed_names = tuple(f"packed_{i}" for i in range(len(packed)))
        for name, tensor in zip(self.packed_names, packed, strict=True):
            own = self._parameters.get(name)
            if own is not None and is_sharded(own):
                local(own).copy_(tensor if pieces else piece_of(tensor, own))
            elif is_whole_numbers(tensor) and tensor.dim():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to(dtype)`, `.half()`: scales of the packed base keep their precision, or the base would move."""

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if is_whole_numbers(tensor) and moved.dtype != tensor.dtype else moved

        kept = {name: self._buffers.pop(name) for name in self.packed_names if name in self._buffers}
        super()._apply(apply, recurse)
        for name, tensor in kept.items():
            assert tensor is not None
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def block_parts(self) -> tuple[Float[Tensor, "i j"] | None, Int[Tensor, " s"] | None, int]:
        """`(block, channels, axis)` of the trained channels; `(None, None, 1)` without any."""
        if not hasattr(self, "weight_slice"):
            return None, None, 1
        return self.trained_block(), getattr(self, "slice_channels", None), self.slice_axis

    def multiply(
        self,
        x: Float[Tensor, "*t m"],
        values: Float[Tensor, " k"] | None,
        index: Int[Tensor, " k"] | None,
        a: Float[Tensor, "r m"] | None,
        b: Float[Tensor, "n r"] | None,
    ) -> Float[Tensor, "*t n"]:
        block, channels, axis = self.block_parts()
        return torch.ops.sparsify.quantized_linear(
            x, self.format, self.shape[0], self.shape[1], self.conv1d, self.bias, block, channels, axis, values, index, a, b,
            self.scale, self.packed(),
        )  # fmt: skip

    @torch.no_grad()
    def dense(self) -> Float[Tensor, "p q"]:
        """The weight that the packed base and its trained channels and entries stand for (no low-rank part)."""
        values, index, _, _ = self.parts()
        parts = (*self.block_parts(), values, index)
        return dense_weight(self.packed(), self.format, list(self.shape), self.conv1d, self.weight.dtype, *parts)

    def base_weight(self) -> Float[Tensor, "p q"]:
        return self.dense()

    def clear_trained(self, stored: Float[Tensor, "p q"]) -> None:
        if "weight_slice" in self._parameters:
            super().clear_trained(stored)

    def part_digest(self) -> bytes:
        block = PartialMixin.part_digest(self) if "weight_slice" in self._parameters else b""
        low = SparseLowRankMixin.part_digest(self)
        return block + low + f"{self.format} {tuple(self.shape)}".encode()

    def without_part(self) -> None:
        """Settings of a packed base that nothing trains beside."""
        self.scale, self.dropout, self.mask_open = 1.0, 0.0, False

    def extra_repr(self) -> str:
        extra = [describe_slice(self)] if hasattr(self, "weight_slice") else []
        extra += [describe_parts(self)] if hasattr(self, "sparse_values") or hasattr(self, "lora_A") else []
        return ", ".join([self.described(), f"format={self.format}", *extra])


class QuantizedLinear(QuantizedMixin, nn.Linear):
    """`nn.Linear` over a packed base."""

    # as `nn.Linear` calls it, whose input a host may name; the mixin says `x`, as Conv1D does, and serves experts too
    def forward(self, input: Float[Tensor, "*t m"]) -> Float[Tensor, "*t n"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input)


carries("Quantized", QuantizedMixin, QuantizedLinear)
