"""Quantised storage of frozen weights, through kept libraries: pack, unpack, and how much it changes.

    nf4    bitsandbytes: 4-bit NormalFloat, blocks of 64, second-level quantisation of the scales (QLoRA, arXiv 2305.14314)
    int8   bitsandbytes: symmetric, one scale per output row
    int4   torchao's affine primitives: symmetric, groups of 64 along the row, two values per byte

bitsandbytes is the only library whose NF4 runs on CPU and CUDA and whose CUDA kernels are tuned; it has no grouped int4, which
torchao's primitives have. Both are loaded when the first weight is packed, never at import.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import OperatorError, PlanError

FORMATS = ("nf4", "int8", "int4")
BLOCK = 64
NESTED_BLOCK = 256


@functools.cache
def bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise PlanError("Quantize('nf4' or 'int8') needs bitsandbytes: pip install 'sparsify[quant]'") from error
    return functional


@functools.cache
def torchao_primitives() -> Any:
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise PlanError("Quantize('int4') needs torchao: pip install 'sparsify[quant]'") from error
    return quant_primitives


def pack(weight: Tensor, format: str) -> list[Tensor]:
    """Quantise a stored weight `(rows, columns)` to the tensors that `unpack` reads."""
    weight = weight.detach()
    if format == "nf4":
        weight = weight.float() if weight.dtype == torch.float64 else weight  # the library takes 16 and 32 bits
        data, state = bitsandbytes().quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return [data, state.absmax, state.state2.absmax, state.state2.code, state.code, state.offset.reshape(1)]
    if format == "int8":
        data, scales, _ = bitsandbytes().int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return [data, scales]
    if format == "int4":
        primitives = torchao_primitives()
        padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % BLOCK))
        size = (1, BLOCK)
        arguments = (torch.int8, -8, 7)
        scale, zero = primitives.choose_qparams_affine(padded, primitives.MappingType.SYMMETRIC, size, *arguments)
        codes = primitives.quantize_affine(padded, size, scale, zero, *arguments) + 8
        codes = codes.to(torch.uint8)
        return [codes[:, ::2] | (codes[:, 1::2] << 4), scale.to(torch.float32)]
    raise PlanError(f"unknown format {format!r}; formats are {', '.join(FORMATS)}")


def check_packed(packed: list[Tensor], format: str, shape: tuple[int, int]) -> None:
    """That packed tensors are what `pack` gives for a stored weight of `shape`: the libraries read them by these sizes."""
    rows, columns = shape
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if format == "nf4":
        data = (rows * columns + 1) // 2
        scales = -(-rows * columns // BLOCK)
        blocks = -(-scales // NESTED_BLOCK)
        wanted = [(torch.uint8, data), (torch.uint8, scales), (torch.float32, blocks), (torch.float32, 256)]
        wanted += [(torch.float32, 16), (torch.float32, 1)]
    elif format == "int8":
        wanted = [(torch.int8, (rows, columns)), (floats, (rows,))]
    elif format == "int4":
        groups = -(-columns // BLOCK)
        wanted = [(torch.uint8, (rows, groups * BLOCK // 2)), (floats, rows * groups)]
    else:
        raise OperatorError(f"unknown format {format!r}; formats are {', '.join(FORMATS)}")
    if len(packed) != len(wanted):
        raise OperatorError(f"a weight packed as {format} is {len(wanted)} tensors, not {len(packed)}")
    for place, (t, (dtype, size)) in enumerate(zip(packed, wanted, strict=True)):
        fits = t.numel() == size if isinstance(size, int) else t.shape == size
        if (
            not fits
            or not t.is_contiguous()
            or not (t.dtype in dtype if isinstance(dtype, tuple) else t.dtype == dtype)
        ):
            raise OperatorError(
                f"tensor {place} of a weight {rows} × {columns} packed as {format} is {t.dtype} {tuple(t.shape)}, "
                f"expected {size} contiguous entries of {'a float type' if isinstance(dtype, tuple) else dtype}"
            )


def unpack(packed: list[Tensor], format: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The dense weight, a fresh tensor of `shape` in `dtype`."""
    if format == "nf4":
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
    if format == "int8":
        data, scales = packed
        return (data.to(torch.float32) * (scales.float() / 127.0).unsqueeze(1)).to(dtype)
    if format == "int4":
        data, scale = packed
        codes = torch.stack((data & 15, data >> 4), dim=2).view(shape[0], -1).to(torch.float32) - 8
        dense = (codes.view(shape[0], -1, BLOCK) * scale.view(shape[0], -1, 1)).view(shape[0], -1)
        return dense[:, : shape[1]].to(dtype).contiguous()
    raise PlanError(f"unknown format {format!r}")


def packed_bytes(packed: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in packed)
