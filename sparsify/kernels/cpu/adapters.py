"""Addends of many adapters on CPU, one adapter a token (`sparsify.ops.adapter_tables`): a generated kernel for fp32 and bf16.

PyTorch needs two or three calls per adapter, each dearer than the few products that it starts; here one call serves all of them, and
threads share the adapters between them.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from sparsify.errors import OperatorError, PositionError
from sparsify.kernels.cpu.build import BuildError, load_library
from sparsify.kernels.cpu.codegen import FLAGS, LANES, TEMPLATES, Isa, rotations
from sparsify.kernels.cpu.dispatch import best_isa, usable_isa
from sparsify.kernels.fallback import note
from sparsify.kernels.source import strict_environment

KINDS = {"columns": 0, "rows": 1, "lowrank": 2, "sparse": 3, "bias": 4}
DTYPES = (torch.float32, torch.bfloat16)


@cache
def generate_adapters(isa: Isa) -> str:
    """C++ source for one instruction set."""
    lanes = LANES[isa]
    template = strict_environment(TEMPLATES).get_template("adapters.cpp.jinja")
    return template.render(lanes=lanes, rotations=rotations(lanes))


@cache
def load_adapters(isa: Isa) -> ctypes.CDLL | None:
    """The built library, or None (remembered) where it cannot be built, which a warning says once."""
    try:
        library = load_library(generate_adapters(isa), FLAGS[isa], ("sparsify_add_adapters",))
    except BuildError as error:
        note(f"adapters in a mixed batch are added one by one: {error}")
        return None
    pointer, word, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.sparsify_add_adapters.argtypes = [
        small, small, small, pointer, word, pointer, word, word, word, word, pointer, word, pointer, word, pointer, pointer,
        pointer, word, word, small,
    ]  # fmt: skip
    library.sparsify_add_adapters.restype = small
    return library


def kernel_adds(y: Tensor, x: Tensor, values: Tensor) -> bool:
    """Whether the generated kernel takes these: on the CPU, in one of its types, and built."""
    if y.device.type != "cpu" or y.dtype not in DTYPES or values.dtype not in DTYPES or x.dtype != y.dtype:
        return False
    isa = usable_isa()
    return isa is not None and load_adapters(isa) is not None


def add_by_kernel(
    kind: str,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    places: Tensor,
    table: Tensor,
    order: Tensor,
    offs: Tensor,
    isa: Isa | None = None,
) -> None:
    """`y (*t, n) += …` in place, contiguous, for `x (*t, m)` of y's type. Raises OperatorError and PositionError for what does not fit."""
    library = load_adapters(isa or best_isa())
    if library is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")
    fits = y.dtype == x.dtype and y.dtype in DTYPES and values.dtype in DTYPES and places.dtype == torch.int32
    if not fits or any(t.dtype != torch.int64 for t in (table, order, offs)) or y.shape[:-1] != x.shape[:-1]:
        raise OperatorError(
            f"adapter_{kind}: y is {y.dtype} {tuple(y.shape)}, x {x.dtype} {tuple(x.shape)}, values {values.dtype}, places "
            f"{places.dtype}, table {table.dtype}: the kernel takes float32 and bfloat16, int32 places and int64 tables"
        )
    if not all(t.is_contiguous() for t in (y, values, places, table, order, offs)):
        raise OperatorError(f"adapter_{kind}: y, values, places, table, order and offs must be contiguous")
    if table.shape != (offs.numel() - 1, 3):
        raise OperatorError(f"adapter_{kind}: table {tuple(table.shape)} does not fit {offs.numel()} offs")
    m, n = x.shape[-1], y.shape[-1]
    tokens = y.numel() // n if n else 0
    if tokens == 0:
        return
    x = x if x.is_contiguous() else x.contiguous()
    code = library.sparsify_add_adapters(
        KINDS[kind], int(y.dtype == torch.float32), int(values.dtype == torch.float32), x.data_ptr(), m, y.data_ptr(), n, tokens,
        m, n, values.data_ptr(), values.numel(), places.data_ptr(), places.numel(), table.data_ptr(), order.data_ptr(),
        offs.data_ptr(), offs.numel() - 1, order.numel(), torch.get_num_threads(),
    )  # fmt: skip
    if code == 1:
        raise OperatorError(
            f"adapter_{kind}: {tokens} tokens are no multiple of the {order.numel()} rows that adapters are named for"
        )
    if code:
        what = "order and offs point outside of the rows" if code == 2 else "the table or the places point outside"
        raise PositionError(f"adapter_{kind}: {what}")


__all__ = ["add_by_kernel", "generate_adapters", "kernel_adds", "load_adapters"]
