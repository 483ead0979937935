"""Any 4-bit weight of bitsandbytes that was packed before it came here: `bnb4/TYPE/BLOCK/DTYPE/NESTED`.

TYPE nf4 or fp4, BLOCK entries a scale, DTYPE that it unpacks to, NESTED entries a scale of the scales, 0 for plain scales
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import PlanError
from sparsify.formats.format import Format, PackedTensor, blocks
from sparsify.formats.libraries import bitsandbytes

if TYPE_CHECKING:
    from jaxtyping import Float


def four_bit_format(kind: str, block: int, dtype: torch.dtype, nested: int) -> str:
    """Name of a bitsandbytes 4-bit format. nested: block size of the scales' own quantisation, 0 for none."""
    return f"bnb4/{kind}/{block}/{str(dtype).removeprefix('torch.')}/{nested}"


@dataclass(frozen=True)
class FourBit(Format):
    """[codes, scales, code book] or [codes, scales, scales of the scales, their code book, code book, offset]"""

    name: str
    kind: str
    block: int
    dtype: torch.dtype
    nested: int

    def pack(self, weight: Float[Tensor, "rows columns"]) -> list[Tensor]:
        data, state = bitsandbytes().quantize_4bit(
            weight.to(self.dtype).contiguous(),
            blocksize=self.block,
            compress_statistics=bool(self.nested),
            quant_type=self.kind,
        )
        if not self.nested:
            return [data, state.absmax, state.code]
        return [data, state.absmax, state.state2.absmax, state.state2.code, state.code, state.offset.reshape(1)]

    def unpack(self, packed: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """As bitsandbytes does it: in the dtype that it would give, then in `dtype`."""
        functional = bitsandbytes()
        data, absmax, *rest = packed
        second, offset = None, None
        if self.nested:
            nested_absmax, nested_code, code, offset = rest
            second = functional.QuantState(
                absmax=nested_absmax, code=nested_code, blocksize=self.nested, dtype=torch.float32
            )
            offset = offset[0]
        else:
            (code,) = rest
        state = functional.QuantState(
            absmax=absmax, shape=torch.Size(shape), code=code, blocksize=self.block, quant_type=self.kind, dtype=self.dtype,
            offset=offset, state2=second,
        )  # fmt: skip
        return functional.dequantize_4bit(data, state).view(shape).to(dtype)

    def tensors(self, rows: int, columns: int) -> list[PackedTensor]:
        scales = blocks(rows * columns, self.block)
        codes, book = PackedTensor(torch.uint8, blocks(rows * columns, 2)), PackedTensor(torch.float32, 16)
        if not self.nested:
            return [codes, PackedTensor(torch.float32, scales), book]
        nested = [PackedTensor(torch.float32, blocks(scales, self.nested)), PackedTensor(torch.float32, 256)]
        return [codes, PackedTensor(torch.uint8, scales), *nested, book, PackedTensor(torch.float32, 1)]


@functools.cache
def read_four_bit(name: str) -> Format:
    """The format that a name says. Raises PlanError for a name that says none."""
    parts = name.split("/")
    dtype = getattr(torch, parts[3], None) if len(parts) == 5 else None
    numbers = len(parts) == 5 and parts[2].isdecimal() and parts[4].isdecimal() and int(parts[2]) > 0
    if not numbers or not isinstance(dtype, torch.dtype) or parts[1] not in ("nf4", "fp4"):
        raise PlanError(
            f"unknown format {name!r}: bnb4/TYPE/BLOCK/DTYPE/NESTED is expected, such as bnb4/nf4/64/bfloat16/256"
        )
    return FourBit(name, parts[1], int(parts[2]), dtype, int(parts[4]))
