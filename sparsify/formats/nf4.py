"""NF4: 4-bit NormalFloat in blocks of 64, scales quantised a second time (QLoRA, arXiv 2305.14314), by bitsandbytes.

bitsandbytes is the only library whose NF4 runs on CPU and CUDA and whose CUDA kernels are tuned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparsify.formats.format import Format, PackedTensor, blocks, blocks_of
from sparsify.formats.libraries import bitsandbytes

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK = 64
NESTED_BLOCK = 256


class NF4(Format):
    """[codes, scales, scales of the scales, code book of the scales, code book, offset]"""

    name = "nf4"
    kernel: ClassVar[str | None] = "nf4"

    def pack(self, weight: Float[Tensor, "rows columns"]) -> list[Tensor]:
        weight = weight.float() if weight.dtype == torch.float64 else weight  # the library takes 16 and 32 bits
        if weight.is_meta:  # the library keeps a table that it makes on the device of its first call, and could pack nothing real any more
            data, *rest = (torch.empty(t.size, dtype=t.dtypes, device="meta") for t in self.tensors(*weight.shape))  # type: ignore[arg-type]
            return [data.unsqueeze(1), *rest]
        data, state = bitsandbytes().quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return [data, state.absmax, state.state2.absmax, state.state2.code, state.code, state.offset.reshape(1)]

    def unpack(self, packed: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        functional = bitsandbytes()
        data, absmax, nested_absmax, nested_code, code, offset = packed
        nested = functional.QuantState(
            absmax=nested_absmax, code=nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        # Flat and even: blocks run over row ends, the library's CPU kernel gets rows shorter than a block wrong (0.50.2), and
        # odd sizes would go to a fallback that it compiles.
        flat, inner = torch.Size((2 * data.numel(),)), torch.float32 if dtype == torch.float64 else dtype
        state = functional.QuantState(
            absmax=absmax, shape=flat, code=code, blocksize=BLOCK, quant_type="nf4", dtype=inner, offset=offset[0], state2=nested
        )  # fmt: skip
        return functional.dequantize_4bit(data, state).view(-1)[: math.prod(shape)].view(shape).to(dtype)

    def tensors(self, rows: int, columns: int) -> list[PackedTensor]:
        scales = blocks(rows * columns, BLOCK)
        return [
            PackedTensor(torch.uint8, blocks(rows * columns, 2)),
            PackedTensor(torch.uint8, scales),
            PackedTensor(torch.float32, blocks(scales, NESTED_BLOCK)),
            PackedTensor(torch.float32, 256),
            PackedTensor(torch.float32, 16),
            PackedTensor(torch.float32, 1),
        ]

    def unpack_in_aten(
        self, packed: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Float[Tensor, "rows columns"]:
        """Without bitsandbytes: two table look-ups and a product per weight."""
        data, absmax, nested_absmax, nested_code, code, offset = packed
        scales = nested_code[absmax.int()] * nested_absmax[blocks_of(absmax.numel(), NESTED_BLOCK, data)] + offset
        place = torch.arange(math.prod(shape), device=data.device)
        nibbles = (data.view(-1).int()[place >> 1] >> (4 - ((place & 1) << 2))) & 15
        return (code[nibbles] * scales[blocks_of(place.numel(), BLOCK, data)]).view(shape).to(dtype)
