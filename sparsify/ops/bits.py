"""Masks as bits: packed flat and little-endian, bit `k % 8` of byte `k // 8` is entry `k` of the *stored* tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.ops.checks import require

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, UInt8


def pack_bits(mask: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Bool mask of any shape → uint8 `(ceil(numel / 8),)`; unused bits are zero."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


_TABLES: dict[torch.device, Tensor] = {}


def byte_table(device: torch.device) -> Int[Tensor, " 256"]:
    """The eight bools of every byte, as one int64 each: unpacking is one gather."""
    if device not in _TABLES:
        byte = torch.arange(256, dtype=torch.int64)[:, None]
        bools = ((byte >> torch.arange(8)) & 1).to(torch.uint8)
        _TABLES[device] = bools.view(torch.int64).flatten().to(device)
    return _TABLES[device]


def unpack_bits(bits: UInt8[Tensor, " bytes"], shape: tuple[int, ...] | torch.Size) -> Bool[Tensor, "*shape"]:
    """Inverse of `pack_bits`: bool of `shape`."""
    count = int(torch.Size(shape).numel())
    if bits.device.type == "meta" or torch.compiler.is_compiling():
        flat = unpack_by_shifts(bits)
    else:
        flat = byte_table(bits.device).index_select(0, bits.int()).view(torch.bool)
    return flat[:count].view(shape)


def unpack_by_shifts(bits: UInt8[Tensor, " bytes"]) -> Bool[Tensor, " 8*bytes"]:
    """All bits as bools, in arithmetic that compilers and torch.func can see through."""
    return ((bits[:, None] >> torch.arange(8, device=bits.device, dtype=torch.uint8)) & 1).flatten().to(torch.bool)


def check_bits(name: str, bits: UInt8[Tensor, " bytes"], count: int) -> None:
    """That `bits` hold one bit for each of `count` entries; shapes only."""
    require(
        bits.dim() == 1 and bits.dtype == torch.uint8,
        lambda: f"{name}: bits are {bits.dtype} {tuple(bits.shape)}, expected uint8 in one dimension",
    )
    require(
        bits.shape[0] == (count + 7) // 8,
        lambda: f"{name}: bits {tuple(bits.shape)} do not describe {count} entries, which are {(count + 7) // 8} bytes",
    )
