"""Memory in huge pages is memory like any other, and asked for where it is worth it."""

from __future__ import annotations

import copy
import gc
import mmap
import pickle
import re
import weakref
from pathlib import Path

import pytest
import torch

from sparsify.kernels.cpu import huge_pages
from sparsify.kernels.cpu.formats import pack
from sparsify.lowering.cpu.sparse_linear import SparseLinear

HUGE = huge_pages.HUGE_PAGE


def advised(tensor: torch.Tensor) -> bool:
    """Whether the mapping that holds the tensor has the flag `hg` (MADV_HUGEPAGE) in /proc/self/smaps."""
    address = tensor.data_ptr()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("nbytes", [0, 8, HUGE - 8, HUGE, HUGE + 24, 3 * HUGE + 8])
def test_zeros_are_zeros_of_the_asked_shape(nbytes: int, dtype: torch.dtype) -> None:
    shape = (nbytes // 8, 8 // dtype.itemsize)
    tensor = huge_pages.zeros(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(3)
    assert bool((tensor == 3).all())
    assert tensor.untyped_storage().nbytes() == nbytes  # nothing hidden is counted, saved or copied
    if nbytes >= HUGE and huge_pages.ADVICE is not None:
        assert tensor.data_ptr() % HUGE == 0
        values = torch.arange(tensor.numel()).view(shape).to(dtype)
        tensor.copy_(values)
        for again in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), huge_pages.in_huge_pages(tensor)):
            assert torch.equal(again, values)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages here")
def test_large_weights_ask_for_huge_pages_and_small_ones_do_not() -> None:
    weight = torch.randn(2048, 2048).masked_fill_(torch.rand(2048, 2048) < 0.5, 0.0)
    packed = pack(weight)
    assert advised(packed.values)
    assert torch.equal(packed.unpack(), weight)
    assert torch.equal(packed.part(8, 16).unpack(), weight[8:24])
    assert packed.masks.numel() * 8 < HUGE
    assert not advised(huge_pages.zeros((16,), torch.float32))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages here")
def test_a_copied_layer_lies_in_huge_pages_again() -> None:
    weight = torch.randn(2048, 2048).masked_fill_(torch.rand(2048, 2048) < 0.5, 0.0)
    layer = SparseLinear(pack(weight), None)
    assert advised(layer.values)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.packed.values is again.values
        middle = again.values[again.values.numel() // 2 :]
        assert advised(middle)  # the pages at its ends may be shared with others
        assert torch.equal(again.packed.unpack(), weight)


def test_the_memory_goes_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    regions: list[weakref.ref[mmap.mmap]] = []

    class Region(mmap.mmap):
        def __new__(cls, *args: int, **kwargs: int) -> Region:
            region = super().__new__(cls, *args, **kwargs)
            regions.append(weakref.ref(region))
            return region

    monkeypatch.setattr(huge_pages.mmap, "mmap", Region)
    view = huge_pages.zeros((HUGE,), torch.int8)[5:9]
    gc.collect()
    assert len(regions) == 1
    assert regions[0]() is not None
    view.fill_(1)
    del view
    gc.collect()
    assert regions[0]() is None


@pytest.mark.parametrize("missing", ["advice", "kernel"])
def test_without_huge_pages_the_memory_is_ordinary(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huge_pages, "ADVICE", None if missing == "advice" else -1
    )  # the kernel refuses an unknown advice
    tensor = huge_pages.zeros((HUGE,), torch.int8)
    assert tensor.shape == (HUGE,)
    assert not tensor.any()
