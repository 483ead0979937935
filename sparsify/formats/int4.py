"""int4: symmetric, groups of 64 along the row, two values per byte, rounded by torchao's affine primitives.

bitsandbytes has no grouped int4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparsify.formats.format import FLOATS, Format, PackedTensor, blocks, blocks_of
from sparsify.formats.libraries import torchao_primitives
from sparsify.formats.nf4 import BLOCK

if TYPE_CHECKING:
    from jaxtyping import Float


class Int4(Format):
    """[codes (rows, columns / 2 in whole groups), scales (rows, groups)]"""

    name = "int4"
    kernel: ClassVar[str | None] = "int4"

    def pack(self, weight: Float[Tensor, "rows columns"]) -> list[Tensor]:
        primitives = torchao_primitives()
        padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % BLOCK))
        size = (1, BLOCK)
        arguments = (torch.int8, -8, 7)
        scale, zero = primitives.choose_qparams_affine(padded, primitives.MappingType.SYMMETRIC, size, *arguments)
        codes = primitives.quantize_affine(padded, size, scale, zero, *arguments) + 8
        codes = codes.to(torch.uint8)
        return [codes[:, ::2] | (codes[:, 1::2] << 4), scale.to(torch.float32)]

    def unpack(self, packed: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        data, scale = packed
        codes = torch.stack((data & 15, data >> 4), dim=2).view(shape[0], -1).to(torch.float32) - 8
        dense = (codes.view(shape[0], -1, BLOCK) * scale.view(shape[0], -1, 1)).view(shape[0], -1)
        return dense[:, : shape[1]].to(dtype).contiguous()

    def tensors(self, rows: int, columns: int) -> list[PackedTensor]:
        groups = blocks(columns, BLOCK)
        return [PackedTensor(torch.uint8, (rows, groups * BLOCK // 2)), PackedTensor(FLOATS, rows * groups)]

    def unpack_in_aten(
        self, packed: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Float[Tensor, "rows columns"]:
        data, scales = packed
        place = torch.arange(shape[1], device=data.device)
        codes = (data.int()[:, place >> 1] >> ((place & 1) << 2)) & 15
        spread = scales.view(shape[0], -1)[:, blocks_of(shape[1], BLOCK, data)]
        return ((codes.to(torch.float32) - 8) * spread).to(dtype)
