"""Memory for packed weights in pages of 2 MiB, where the system has them.

A product with few tokens reads every byte of a weight once. With pages of 4 KiB it also reads a page-table entry for every 64
cache lines, and the hardware's prefetchers stop at every page's end. Linux gives larger pages to whoever asks
(`madvise`, transparent huge pages); where it does not, the memory is ordinary and only slower.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from functools import cache

import torch

HUGE_PAGE = 2 << 20
ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
COLLAPSE = 25  # Linux 6.1: MADV_COLLAPSE, not yet named by Python


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed CPU tensor, in huge pages if it fills at least one and the system has them."""
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes < HUGE_PAGE or ADVICE is None:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    try:
        region = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(ADVICE)
    except OSError:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    start = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE  # older kernels align to 4 KiB only
    return torch.frombuffer(region, dtype=dtype, count=count, offset=start).view(shape)  # the tensor keeps the region


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a CPU tensor in such memory; the tensor itself if it is smaller than a huge page."""
    if tensor.numel() * tensor.element_size() < HUGE_PAGE:
        return tensor
    return zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)


@cache
def libc() -> ctypes.CDLL:
    """The C library of this process, with `madvise(address, bytes, advice)`."""
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def make_huge(tensor: torch.Tensor) -> None:
    """Turn the pages that lie wholly inside a CPU tensor into huge ones where they are: for tensors that were copied or read
    by others, so that their memory was allocated without asking. Does nothing where the system cannot.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if ADVICE is None or end - first < HUGE_PAGE:
        return
    for advice in (ADVICE, COLLAPSE):
        libc().madvise(first, end - first, advice)
