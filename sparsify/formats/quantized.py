"""Quantised storage of frozen weights, through kept libraries: pack, unpack, and how much it changes.

    nf4    bitsandbytes: 4-bit NormalFloat, blocks of 64, second-level quantisation of the scales (QLoRA, arXiv 2305.14314)
    int8   bitsandbytes: symmetric, one scale per output row
    int4   torchao's affine primitives: symmetric, groups of 64 along the row, two values per byte

and, of bases that were packed before they came here (`sparsify.host.quantized_bases`), unpacked by their own library:

    bnb4/TYPE/BLOCK/DTYPE/NESTED    any bitsandbytes 4-bit weight: nf4 or fp4, block size, dtype that it unpacks to, nested block size or 0
    torchao/CLASS/HASH              a torchao tensor (`sparsify.formats.foreign_tensors`)

bitsandbytes is the only library whose NF4 runs on CPU and CUDA and whose CUDA kernels are tuned; it has no grouped int4, which
torchao's primitives have. Both are loaded when the first weight is packed, never at import.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import OperatorError, PlanError, SparsifyError
from sparsify.formats.foreign_tensors import is_foreign, unpack_foreign

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
    if format.startswith("bnb4/"):
        kind, block, stored, nested = read_four_bit_format(format)
        data, state = bitsandbytes().quantize_4bit(
            weight.to(stored).contiguous(), blocksize=block, compress_statistics=bool(nested), quant_type=kind
        )
        second = (
            [state.state2.absmax, state.state2.code, state.code, state.offset.reshape(1)] if nested else [state.code]
        )
        return [data, state.absmax, *second]
    if is_foreign(format):
        raise SparsifyError(
            f"a weight that came packed as {format} cannot be packed again: keep what trains beside it as an adapter"
        )
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
    elif format.startswith("bnb4/"):
        _, block, _, nested = read_four_bit_format(format)
        scales = -(-rows * columns // block)
        wanted = [(torch.uint8, (rows * columns + 1) // 2)]
        if nested:
            wanted += [(torch.uint8, scales), (torch.float32, -(-scales // nested)), (torch.float32, 256)]
        else:
            wanted += [(torch.float32, scales)]
        wanted += [(torch.float32, 16)] + ([(torch.float32, 1)] if nested else [])
    elif is_foreign(format):
        return  # the library that made the tensors unpacks them, and checks them itself
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
    if format.startswith("bnb4/"):
        return unpack_four_bit(packed, format, shape).to(dtype)
    if is_foreign(format):
        return unpack_foreign(packed, format, dtype)
    raise PlanError(f"unknown format {format!r}")


def four_bit_format(kind: str, block: int, dtype: torch.dtype, nested: int) -> str:
    """Name of a bitsandbytes 4-bit format. nested: block size of the scales' own quantisation, 0 for none."""
    return f"bnb4/{kind}/{block}/{str(dtype).removeprefix('torch.')}/{nested}"


def read_four_bit_format(format: str) -> tuple[str, int, torch.dtype, int]:
    _, kind, block, dtype, nested = format.split("/")
    return kind, int(block), getattr(torch, dtype), int(nested)


def unpack_four_bit(packed: list[Tensor], format: str, shape: tuple[int, ...]) -> Tensor:
    """As bitsandbytes does it, in the dtype that it would give."""
    kind, block, dtype, nested = read_four_bit_format(format)
    functional = bitsandbytes()
    data, absmax, *rest = packed
    second, offset = None, None
    if nested:
        nested_absmax, nested_code, code, offset = rest
        second = functional.QuantState(absmax=nested_absmax, code=nested_code, blocksize=nested, dtype=torch.float32)
        offset = offset[0]
    else:
        (code,) = rest
    state = functional.QuantState(
        absmax=absmax, shape=torch.Size(shape), code=code, blocksize=block, quant_type=kind, dtype=dtype, offset=offset, state2=second
    )  # fmt: skip
    return functional.dequantize_4bit(data, state).view(shape)


def packs_again(format: str) -> bool:
    """Whether a changed weight can be packed in this format (`merge`)."""
    return not is_foreign(format)


def packed_bytes(packed: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in packed)
