"""Products of a tall matrix with few vectors on CPU: a generated kernel for fp32, for the low-rank parts of LoRA and RoSA.

`x Aᵀ`, `g B`, `uᵀ g` and `lowᵀ x` cost the reading of `x` or `g`; a general GEMM takes up to three times as long. Two products of
one matrix (`g B` and `uᵀ g`) share one reading. `y += u Bᵀ` costs the reading and writing of `y`.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from sparsify.errors import OperatorError
from sparsify.kernels.cpu.build import BuildError, load_library
from sparsify.kernels.cpu.codegen import FLAGS, LANES, TEMPLATES, Isa, rotations
from sparsify.kernels.cpu.dispatch import best_isa, usable_isa
from sparsify.kernels.cpu.formats import check
from sparsify.kernels.fallback import note
from sparsify.kernels.source import strict_environment

RANKS = 4  # the kernel takes ranks in groups of so many
LARGEST_RANK = (
    64  # the largest that was measured (benchmarks/skinny_products.py): from there on a general GEMM is nearly as good
)
SMALLEST = 1 << 17  # elements of `x` below which no kernel is built
PARTIAL_BYTES = 32 << 20  # of sums over tokens, all threads together


@cache
def generate_skinny(isa: Isa) -> str:
    """C++ source for one instruction set."""
    lanes = LANES[isa]
    wide = lanes == 16  # 32 registers
    template = strict_environment(TEMPLATES).get_template("skinny.cpp.jinja")
    return template.render(lanes=lanes, tokens=8, dots=4 if wide else 2, rotations=rotations(lanes))


@cache
def load_skinny(isa: Isa) -> ctypes.CDLL | None:
    """The built library, or None (remembered) where it cannot be built, which a warning says once."""
    try:
        library = load_library(generate_skinny(isa), FLAGS[isa], ("sparsify_skinny", "sparsify_update"))
    except BuildError as error:
        note(f"low-rank products: PyTorch's GEMM serves instead: {error}")
        return None
    pointer, word, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.sparsify_skinny.argtypes = [pointer, word, word, word, word, pointer, pointer, pointer, pointer, small]
    library.sparsify_skinny.restype = None
    library.sparsify_update.argtypes = [pointer, word, word, word, word, pointer, pointer, small]
    library.sparsify_update.restype = None
    return library


def skinny_serves(x: Tensor, rank: int) -> bool:
    """Whether the generated kernel takes `x (T, m)` and this rank: fp32 on the CPU, enough work to be worth a compiler run."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not 0 < rank <= LARGEST_RANK or x.numel() < SMALLEST:
        return False
    if torch.get_num_threads() * (rank + RANKS) * x.shape[1] * 4 > PARTIAL_BYTES:
        return False
    isa = usable_isa()
    return isa is not None and load_skinny(isa) is not None


def update_serves(y: Tensor, rank: int) -> bool:
    """Whether `update_by_kernel` takes `y (T, n)` and this rank."""
    return y.stride(-1) == 1 and skinny_serves(y, rank)


def skinny_by_kernel(
    x: Tensor, rows: Tensor | None, factor: Tensor | None, isa: Isa | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """`(x rowsᵀ, factorᵀ x)` for `x (T, m)`, `rows (r, m)`, `factor (T, r)`, in one pass over x; either may be absent."""
    library = load_skinny(isa or best_isa())
    if library is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")
    check(x.dim() == 2 and x.dtype == torch.float32, f"skinny_products: x is {x.dtype} of shape {tuple(x.shape)}")
    ranks = set()
    for name, factor_of, axis, size in (("rows", rows, 1, x.shape[1]), ("factor", factor, 0, x.shape[0])):
        if factor_of is not None:
            fits = factor_of.dim() == 2 and factor_of.shape[axis] == size and factor_of.device == x.device
            check(fits, f"skinny_products: {name} has shape {tuple(factor_of.shape)}, x {tuple(x.shape)}")
            ranks.add(factor_of.shape[1 - axis])
    check(len(ranks) == 1, f"skinny_products: rows and factor have ranks {sorted(ranks)}, expected one")
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, width = x.shape
    rank = rows.shape[0] if rows is not None else factor.shape[1] if factor is not None else 0
    if x.dtype != torch.float32:
        raise OperatorError(f"skinny products: x is {x.dtype}, the kernel reads float32")
    for name, tensor, shape in (("rows", rows, (rank, width)), ("factor", factor, (tokens, rank))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise OperatorError(
                f"skinny products: {name} is {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)}"
            )
    spare = -rank % RANKS
    threads = torch.get_num_threads()
    low = product = None
    if rows is not None:
        rows = padded(rows, 0)
        low = x.new_empty((tokens, rank + spare))
    if factor is not None:
        factor = padded(factor, 1)
        product = x.new_zeros((max(1, threads), rank + spare, width))
    pointers = [None if t is None else t.data_ptr() for t in (rows, low, factor, product)]
    library.sparsify_skinny(x.data_ptr(), x.stride(0), tokens, width, rank + spare, *pointers, threads)
    return None if low is None else low[:, :rank].contiguous(), None if product is None else product[0, :rank]


def update_by_kernel(y: Tensor, low: Tensor, rows: Tensor, isa: Isa | None = None) -> None:
    """`y += low rows` in place, for `y (T, n)` whose rows are contiguous, `low (T, r)`, `rows (r, n)`."""
    library = load_skinny(isa or best_isa())
    if library is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")
    if y.stride(-1) != 1:
        raise ValueError(f"the rows of y {tuple(y.shape)} must be contiguous, strides are {y.stride()}")
    fits = y.dim() == low.dim() == rows.dim() == 2 and y.dtype == torch.float32
    if not fits or (*y.shape, low.shape[1]) != (low.shape[0], rows.shape[1], rows.shape[0]):
        raise OperatorError(
            f"skinny update: {tuple(low.shape)} times {tuple(rows.shape)} does not fit y, {y.dtype} {tuple(y.shape)}"
        )
    low, rows = padded(low, 1), padded(rows, 0)
    library.sparsify_update(
        y.data_ptr(), y.stride(0), *y.shape, rows.shape[0], low.data_ptr(), rows.data_ptr(), torch.get_num_threads()
    )


def padded(tensor: Tensor, dim: int) -> Tensor:
    """fp32, contiguous, with zeros up to a multiple of `RANKS` along one dimension."""
    spare = -tensor.shape[dim] % RANKS
    if spare:
        tensor = torch.nn.functional.pad(tensor, (0, spare) if dim == 1 else (0, 0, 0, spare))
    return tensor.float().contiguous()
