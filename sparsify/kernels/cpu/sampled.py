"""RoSA's sparse part on CPU: generated kernels, for fp32 and bf16, for the sampled product `(aᵀ b)[index]` (SDDMM, the weight
gradient on a support) and for the write of the trained values into the weight.

PyTorch's own kernel (`torch.sparse.sampled_addmm`) copies both factors into transposed form on one thread, which is most of
its time; here one factor is transposed in chunks by all threads and the other in strips that stay in L2.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from sparsify.errors import OperatorError, PositionError
from sparsify.kernels.cpu.build import BuildError, load_library
from sparsify.kernels.cpu.codegen import FLAGS, LANES, TEMPLATES, Isa, exchanges, rotations
from sparsify.kernels.cpu.dispatch import best_isa, usable_isa
from sparsify.kernels.fallback import note
from sparsify.kernels.source import strict_environment

CHUNK = 256  # tokens whose factors are transposed at a time
STRIP = 64  # columns of `a` whose transposed form is alive at a time, per thread
VALUES = {torch.float32: "f32", torch.bfloat16: "bf16"}
SMALLEST = 1 << 18  # products of `tokens · entries` below which no kernel is built
SMALLEST_WRITE = 1 << 11  # entries below which none is built to write them


@cache
def generate_sampled(isa: Isa, value: str) -> str:
    """C++ source for one instruction set and input type."""
    template = strict_environment(TEMPLATES).get_template("sampled.cpp.jinja")
    lanes = LANES[isa]
    return template.render(
        value=value, lanes=lanes, chunk=CHUNK, strip=STRIP, exchanges=exchanges(lanes), rotations=rotations(lanes)
    )


@cache
def load_sampled(isa: Isa, value: str) -> ctypes.CDLL | None:
    """The built library, or None (remembered) where it cannot be built, which a warning says once."""
    entries = ("sparsify_scratch", "sparsify_sampled", "sparsify_write")
    try:
        library = load_library(generate_sampled(isa, value), FLAGS[isa], entries)
    except BuildError as error:
        note(f"sampled_product: PyTorch's own kernels serve instead: {error}")
        return None
    pointer, word, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.sparsify_scratch.argtypes, library.sparsify_scratch.restype = [word], word
    library.sparsify_sampled.argtypes = [
        pointer, word, pointer, word, word, word, word, pointer, small, word, pointer, pointer, small,
    ]  # fmt: skip
    library.sparsify_sampled.restype = None
    library.sparsify_write.argtypes = [pointer, word, pointer, pointer, small, word, small]
    library.sparsify_write.restype = small
    return library


def kernel_serves(a: Tensor, b: Tensor, index: Tensor) -> bool:
    """Whether the generated kernel takes these: CPU, one of its types, enough work to be worth a compiler run."""
    if a.device.type != "cpu" or a.dtype not in VALUES or b.dtype != a.dtype:
        return False
    if a.shape[0] * index.numel() < SMALLEST:
        return False
    isa = usable_isa()
    return isa is not None and load_sampled(isa, VALUES[a.dtype]) is not None


def sampled_by_kernel(a: Tensor, b: Tensor, index: Tensor, isa: Isa | None = None) -> Tensor:
    """`(aᵀ b)[index]` for `a (T, p)`, `b (T, q)`, sorted flat `index`; summed in fp32, returned in the inputs' type."""
    check_index(index)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0] or a.dtype != b.dtype or a.dtype not in VALUES:
        raise OperatorError(
            f"sampled product: a {a.dtype} {tuple(a.shape)} and b {b.dtype} {tuple(b.shape)} must be (T, p) and (T, q), both "
            "float32 or both bfloat16"
        )
    library = load_sampled(isa or best_isa(), VALUES[a.dtype])
    if library is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")
    a, b, index = (t if t.stride(-1) == 1 else t.contiguous() for t in (a, b, index))
    tokens, p, q = a.shape[0], a.shape[1], b.shape[1]
    out = torch.zeros(index.shape, dtype=torch.float32)
    scratch = torch.empty(library.sparsify_scratch(q), dtype=torch.float32)
    library.sparsify_sampled(
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), tokens, p, q, index.data_ptr(),
        int(index.dtype == torch.int64), index.numel(), out.data_ptr(), scratch.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(a.dtype)


def check_index(index: Tensor) -> None:
    """The kernels read positions as int32 or int64, and nothing else."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise OperatorError(
            f"positions are {index.dtype} {tuple(index.shape)}, expected int32 or int64 in one dimension"
        )


def kernel_writes(weight: Tensor, values: Tensor, index: Tensor) -> bool:
    """Whether `write_by_kernel` takes these: contiguous on the CPU, fp32 values, one of the weight's types, enough entries."""
    if weight.device.type != "cpu" or weight.dtype not in VALUES or values.dtype != torch.float32:
        return False
    if index.numel() < SMALLEST_WRITE or not all(t.is_contiguous() for t in (weight, values, index)):
        return False
    isa = usable_isa()
    return isa is not None and load_sampled(isa, VALUES[weight.dtype]) is not None


def write_by_kernel(weight: Tensor, values: Tensor, index: Tensor) -> None:
    """`weight.view(-1)[index] = values`, rounded to the weight's type, without a 64-bit copy of the index.

    Raises PositionError if an index lies outside the weight."""
    check_index(index)
    if values.shape != index.shape or not all(t.is_contiguous() for t in (weight, values, index)):
        raise OperatorError(
            f"sparse part: {tuple(values.shape)} values for {tuple(index.shape)} positions, all contiguous"
        )
    if values.dtype != torch.float32 or weight.dtype not in VALUES:
        raise OperatorError(
            f"sparse part: {values.dtype} values into a {weight.dtype} weight; the kernel writes float32 values"
        )
    library = load_sampled(best_isa(), VALUES[weight.dtype])
    assert library is not None  # `kernel_writes` has loaded it
    outside = library.sparsify_write(
        weight.data_ptr(), weight.numel(), values.data_ptr(), index.data_ptr(), int(index.dtype == torch.int64),
        index.numel(), torch.get_num_threads(),
    )  # fmt: skip
    if outside:
        raise PositionError(f"sparse part: a position lies outside the weight of {weight.numel()} entries")
