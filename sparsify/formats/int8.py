"""int8: symmetric, one scale per output row, rounded by bitsandbytes (LLM.int8(), arXiv 2208.07339, without its outliers)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparsify.formats.format import FLOATS, Format, PackedTensor
from sparsify.formats.libraries import bitsandbytes

if TYPE_CHECKING:
    from jaxtyping import Float

HALF = torch.finfo(torch.float16)


class Int8(Format):
    """[codes (rows, columns), largest magnitude of each row (rows,)]"""

    name = "int8"
    kernel: ClassVar[str | None] = "int8"

    def pack(self, weight: Float[Tensor, "rows columns"]) -> list[Tensor]:
        data, scales, _ = bitsandbytes().int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return [data, scales]

    def unpack(self, packed: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        data, scales = packed
        return (data.to(torch.float32) * (scales.float() / 127.0).unsqueeze(1)).to(dtype)

    def tensors(self, rows: int, columns: int) -> list[PackedTensor]:
        return [PackedTensor(torch.int8, (rows, columns)), PackedTensor(FLOATS, (rows,))]

    def why_not(self, weight: Float[Tensor, "rows columns"]) -> str | None:
        largest = weight.detach().abs().amax(dim=1).float()
        if float(largest.max()) > HALF.max:
            return f"its largest entry, {float(largest.max()):.3g}, lies beyond the scales of int8, which are float16 ({HALF.max:,.0f})"
        if bool(((largest > 0) & (largest < HALF.tiny)).any()):
            return (
                f"a row has no entry above {HALF.tiny:.1g}, where the scales of int8, which are float16, end; "
                "nf4 holds it"
            )
        return None
