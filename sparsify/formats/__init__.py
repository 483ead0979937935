"""Storage formats of frozen weights, one a file: pack, unpack, decomposition, and which kernel multiplies with what was packed.

    nf4    bitsandbytes: 4-bit NormalFloat, blocks of 64, second-level quantisation of the scales (QLoRA, arXiv 2305.14314)
    int8   bitsandbytes: symmetric, one scale per output row
    int4   torchao's affine primitives: symmetric, groups of 64 along the row, two values per byte

of bases that were packed before they came here (`sparsify.host.quantized_bases`), unpacked by their own library:

    bnb4/TYPE/BLOCK/DTYPE/NESTED    any bitsandbytes 4-bit weight: nf4 or fp4, block size, dtype that it unpacks to, nested block size or 0
    torchao/CLASS/HASH              a torchao tensor (`sparsify.formats.foreign_tensors`)

and whatever is registered from outside (`register`; examples/write_a_format.py adds MXFP4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import OperatorError, PlanError
from sparsify.formats.foreign_tensors import LIBRARY, Foreign
from sparsify.formats.format import FLOATS, Format, PackedTensor
from sparsify.formats.four_bit import read_four_bit
from sparsify.formats.int4 import Int4
from sparsify.formats.int8 import Int8
from sparsify.formats.nf4 import NF4
from sparsify.formats.registry import REGISTERED, format_named, packing_format, register, register_family

if TYPE_CHECKING:
    from jaxtyping import Float

for _own in (NF4(), Int8(), Int4()):
    register(_own)
register_family("bnb4", read_four_bit)
register_family(LIBRARY, Foreign)

FORMATS = tuple(REGISTERED)  # the package's own


def pack(weight: Float[Tensor, "rows columns"], format: str) -> list[Tensor]:
    """Quantise a stored weight `(rows, columns)` to the tensors that `unpack` reads. Raises PlanError for an unknown format."""
    return format_named(format).pack(weight.detach())


def unpack(
    packed: list[Tensor], format: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """The dense weight, a fresh tensor of `shape` in `dtype`."""
    return format_named(format).unpack(packed, shape, dtype)


def check_packed(packed: list[Tensor], format: str, shape: tuple[int, int]) -> None:
    """That packed tensors are what `pack` gives for a stored weight of `shape`. Raises OperatorError."""
    format_of_operator(format).check(packed, shape)


def format_of_operator(name: str) -> Format:
    """`format_named` for operators, whose arguments may hold anything. Raises OperatorError."""
    try:
        return format_named(name)
    except PlanError as error:
        raise OperatorError(str(error)) from None


def packed_bytes(packed: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in packed)


__all__ = [
    "FLOATS",
    "FORMATS",
    "Format",
    "PackedTensor",
    "check_packed",
    "format_named",
    "format_of_operator",
    "pack",
    "packed_bytes",
    "packing_format",
    "register",
    "unpack",
]
