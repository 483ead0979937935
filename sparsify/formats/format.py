"""What a storage format of frozen weights is: pack, unpack, what was packed, and whether a generated kernel multiplies with it.

    weight (rows, columns) ──pack──▶ [tensors as `tensors(rows, columns)` says] ──unpack──▶ weight, as the format holds it

A format is one object in one file; `Quantize(format="name")` asks for it by name, operators carry the name as a string.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparsify.console import printable
from sparsify.errors import OperatorError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@printable
@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed weight. dtypes: that it may have. size: its shape, or how many entries in any shape."""

    dtypes: torch.dtype | tuple[torch.dtype, ...]
    size: int | tuple[int, ...]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is what `pack` gives here: size, dtype, contiguous."""
        fits = tensor.numel() == self.size if isinstance(self.size, int) else tensor.shape == self.size
        dtypes = self.dtypes if isinstance(self.dtypes, tuple) else (self.dtypes,)
        return fits and tensor.is_contiguous() and tensor.dtype in dtypes

    def __str__(self) -> str:
        kind = "a float type" if self.dtypes == FLOATS else str(self.dtypes)
        return f"{self.size} contiguous entries of {kind}"


class Format(ABC):
    """How one frozen weight is stored in few bits.

    name: in `Quantize(format=…)`, in files and in operators. kernel: which generated product reads the packed weight as it lies
    ("nf4", "int8", "int4": see kernels/gpu/README.md); None: the operator unpacks one layer at a time, forward and backward.
    packs_again: whether a changed weight can be packed (`merge`).
    """

    name: str
    kernel: ClassVar[str | None] = None
    packs_again: ClassVar[bool] = True

    @abstractmethod
    def pack(self, weight: Float[Tensor, "rows columns"]) -> list[Tensor]:
        """Quantise a stored weight `(rows, columns)` of 16, 32 or 64 bits; the tensors are fresh and contiguous."""

    @abstractmethod
    def unpack(self, packed: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """The dense weight, a fresh tensor of `shape` in `dtype`."""

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> list[PackedTensor] | None:
        """What `pack` gives for a weight `(rows, columns)`; None where only the library that packed it can tell."""

    def unpack_in_aten(
        self, packed: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Float[Tensor, "rows columns"]:
        """`unpack` in operators that every compiler and every process knows, for Inductor and `torch.export`."""
        return self.unpack(list(packed), shape, dtype)

    def why_not(self, weight: Float[Tensor, "rows columns"]) -> str | None:
        """Why a finite weight of any float dtype cannot be held; None: it can."""
        return None

    def check(self, packed: list[Tensor], shape: tuple[int, int]) -> None:
        """That tensors are what `pack` gives for a weight of `shape`: libraries and kernels read them by these sizes.

        Raises OperatorError."""
        wanted = self.tensors(*shape)
        if wanted is None:
            return
        if len(packed) != len(wanted):
            raise OperatorError(f"a weight packed as {self.name} is {len(wanted)} tensors, not {len(packed)}")
        for place, (tensor, expected) in enumerate(zip(packed, wanted, strict=True)):
            if not expected.holds(tensor):
                raise OperatorError(
                    f"tensor {place} of a weight {shape[0]} × {shape[1]} packed as {self.name} is {tensor.dtype} "
                    f"{tuple(tensor.shape)}, expected {expected}"
                )


def blocks(count: int, size: int) -> int:
    """How many blocks hold `count` entries."""
    return math.ceil(count / size)


def blocks_of(count: int, block: int, like: Tensor) -> Int[Tensor, " count"]:
    """The block that each of `count` entries lies in; block is a power of two.

    Positions come from `arange` and shifts, not from views of blocks: where a last block is not whole, Inductor (2.13) takes
    `i // block` for 0, and reads the wrong scale or byte."""
    return torch.arange(count, device=like.device) >> (block.bit_length() - 1)


__all__ = ["FLOATS", "Format", "PackedTensor", "blocks", "blocks_of"]
