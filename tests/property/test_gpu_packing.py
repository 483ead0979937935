"""Packing for GPU kernels is exact and reversible for any shape and pattern, and damaged data is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.kernels.gpu.formats import (
    GAP_BITS,
    FormatError,
    Stream,
    kept_positions,
    pack_blocks,
    pack_stream,
    pack_two_four,
    quantize_int8,
)

SHAPES = st.tuples(st.integers(1, 23), st.integers(8, 201))
DENSITIES = st.sampled_from([0.0, 0.02, 0.25, 0.5, 0.9, 1.0])
FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**31)


def random_weight(shape: tuple[int, int], density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < density
    weight[seed % shape[0]] = 0.0  # an empty row
    return weight


def two_four_weight(shape: tuple[int, int], seed: int) -> Tensor:
    fours = random_weight(shape, 0.9, seed).view(shape[0], -1, 4)
    return (fours * (fours.abs() >= fours.abs().topk(2, -1).values[..., -1:])).view(shape)


@settings(max_examples=60, deadline=None)
@given(SHAPES, DENSITIES, FLOATS, st.sampled_from([4, 8]), st.sampled_from([8, 16]), SEEDS)
def test_streams_round_trip_exactly(
    shape: tuple[int, int], density: float, dtype: torch.dtype, width: int, group: int, seed: int
) -> None:
    weight = random_weight(shape, density, seed).to(dtype)
    packed = pack_stream(weight, width=width, group=group).validate()
    assert (packed.width, packed.group) == (width, group)
    assert torch.equal(packed.unpack(), weight)
    assert packed.unpack().dtype == dtype
    assert packed.nnz == int(torch.count_nonzero(weight))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(8, 90), DENSITIES, SEEDS)
def test_gated_streams_keep_pairs_together(half: int, cols: int, density: float, seed: int) -> None:
    weight = random_weight((2 * half, cols), density, seed)
    packed = pack_stream(weight, gated=True).validate()
    assert torch.equal(packed.unpack(), weight)
    pairs = packed.order.view(-1, 2, packed.group // 2)
    real = pairs[:, 0] < 2 * half
    assert torch.equal(pairs[:, 1][real], pairs[:, 0][real] + half)


@settings(max_examples=30, deadline=None)
@given(SHAPES, DENSITIES, SEEDS)
def test_integers_round_trip_exactly(shape: tuple[int, int], density: float, seed: int) -> None:
    integers, scales = quantize_int8(random_weight(shape, density, seed))
    packed = pack_stream(integers, scales).validate()
    assert torch.equal(packed.unpack(), integers.float() * scales[:, None])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), FLOATS, SEEDS)
def test_two_four_round_trips_exactly(rows: int, chunks: int, dtype: torch.dtype, seed: int) -> None:
    weight = two_four_weight((rows, 16 * chunks), seed).to(dtype)
    packed = pack_two_four(weight).validate()
    assert torch.equal(packed.unpack(), weight)
    chunk_bytes = packed.width * weight.element_size() + 2  # two bits per value, in 16
    assert packed.meta.numel() * chunk_bytes == packed.values.numel() * weight.element_size() + packed.meta.numel() * 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([16, 32]), st.sampled_from([16, 64]), FLOATS, SEEDS)
def test_blocks_round_trip_exactly(
    tall: int, wide: int, height: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    weight = random_weight((tall * height, wide * width), 0.01, seed).to(dtype)
    packed = pack_blocks(weight, height, width).validate()
    assert torch.equal(packed.unpack(), weight)


@settings(max_examples=60, deadline=None)
@given(SHAPES, DENSITIES, st.sampled_from([4, 8]), SEEDS)
def test_kept_positions_are_whole_chunks_without_wide_gaps(
    shape: tuple[int, int], density: float, width: int, seed: int
) -> None:
    nonzero = random_weight(shape, density, seed) != 0
    kept = kept_positions(nonzero, width)
    assert bool((kept | ~nonzero).all())
    for row in kept:
        columns = row.nonzero().flatten()
        assert columns.numel() % width == 0 or columns.numel() == shape[1]
        assert bool((columns.diff() <= 1 << GAP_BITS[width]).all())


def test_rows_that_drift_apart_are_packed_in_windows() -> None:
    """Half of the rows live at the left, half at the right: first columns of one position are 6000 apart."""
    weight = torch.zeros(16, 8192)
    weight[:8, :400], weight[8:, 6500:6900] = 1.5, 2.5
    packed = pack_stream(weight, group=16).validate()
    assert torch.equal(packed.unpack(), weight)


def test_bytes_follow_the_format() -> None:
    """2.5 bytes per nonzero in bf16 at half density, padding under 2 %; wide gaps move to chunks of four."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 4096, generator=generator).bfloat16()
    half = weight * (torch.rand(weight.shape, generator=generator) < 0.5)
    packed = pack_stream(half, group=16)
    assert packed.width == 8
    assert packed.nbytes < 2.5 * 1.02 * packed.nnz + 8192
    tenth = weight * (torch.rand(weight.shape, generator=generator) < 0.1)
    packed = pack_stream(tenth, group=16)
    assert packed.width == 4
    assert packed.nbytes < 3 * 1.04 * packed.nnz + 8192


def test_weights_that_cannot_be_packed_say_why() -> None:
    with pytest.raises(FormatError, match="8 to 524288 columns, got 3 × 7"):
        pack_stream(torch.ones(3, 7))
    with pytest.raises(FormatError, match="NaN or Inf"):
        pack_stream(torch.full((3, 8), float("nan")))
    with pytest.raises(FormatError, match=r"cannot pack torch\.float64"):
        pack_stream(torch.ones(3, 8, dtype=torch.float64))
    with pytest.raises(FormatError, match="int8 weights need 3 scales"):
        pack_stream(torch.ones(3, 8, dtype=torch.int8))
    with pytest.raises(FormatError, match="as many gate as up rows, got 3"):
        pack_stream(torch.ones(3, 8), gated=True)
    dense = torch.zeros(2, 32)
    dense[1, 4:7] = 1
    with pytest.raises(FormatError, match="row 1 has more than two nonzeros in columns 4 to 7"):
        pack_two_four(dense)
    with pytest.raises(FormatError, match="multiple of 8 columns, got 12"):
        pack_two_four(torch.zeros(2, 12))
    with pytest.raises(FormatError, match="tiles of 16 × 16 do not fill 20 × 32"):
        pack_blocks(torch.ones(20, 32), 16, 16)
    with pytest.raises(FormatError, match="tile height 8 is not 16, 32 or 64"):
        pack_blocks(torch.ones(16, 16), 8, 16)


def damaged(stream: Stream) -> list[tuple[str, Stream]]:
    def poke(name: str, where: object, value: float) -> Tensor:
        tensor = getattr(stream, name).clone()
        tensor[where] = value
        return tensor

    return [
        ("outside of columns", replace(stream, meta=poke("meta", (0, 0), 2047))),
        ("start ends at", replace(stream, start=poke("start", -1, int(stream.start[-1]) + 3))),
        ("start does not rise", replace(stream, start=poke("start", 0, 1))),
        ("not a permutation", replace(stream, order=poke("order", 0, int(stream.order[1])))),
        ("names a row beyond", replace(stream, order=poke("order", 0, -1))),
        ("NaN or Inf", replace(stream, values=poke("values", (0, 0, 0), float("inf")))),
        ("meta has shape", replace(stream, meta=stream.meta[:-1])),
        ("meta is torch.int64", replace(stream, meta=stream.meta.long())),
        ("scales belong to int8", replace(stream, scales=torch.ones(20))),
        ("values are torch.float64", replace(stream, values=stream.values.double())),
        ("not contiguous", replace(stream, values=stream.values.transpose(0, 1).contiguous().transpose(0, 1))),
    ]


def test_damaged_streams_are_refused() -> None:
    stream = pack_stream(random_weight((20, 100), 0.5, 1)).validate()
    for message, bad in damaged(stream):
        with pytest.raises(FormatError, match=message):
            bad.validate()


def test_an_entry_stored_twice_is_refused() -> None:
    stream = pack_stream(torch.ones(8, 16), width=8)
    meta = stream.meta.clone()
    meta[1] = meta[0]  # the second chunk of every row stands where the first does
    with pytest.raises(FormatError, match="stored twice"):
        replace(stream, meta=meta, base=torch.zeros_like(stream.base)).validate()


def test_damaged_blocks_are_refused() -> None:
    blocks = pack_blocks(random_weight((32, 64), 0.5, 1), 16, 32).validate()
    with pytest.raises(FormatError, match="outside of the 2 tile columns"):
        replace(blocks, column=blocks.column + 2).validate()
    with pytest.raises(FormatError, match="stored twice"):
        replace(blocks, column=torch.zeros_like(blocks.column)).validate()
    with pytest.raises(FormatError, match="start ends at"):
        replace(blocks, values=blocks.values[:1], column=blocks.column[:1]).validate()


def test_a_row_in_two_places_is_refused() -> None:
    """Five rows in a group of eight: a spare place names a row that has one already, and each row is still there."""
    packed = pack_stream(random_weight((5, 40), 0.5, 0), width=4, group=8).validate()
    order = packed.order.clone()
    order[(order == packed.rows).nonzero()[0]] = 0
    with pytest.raises(FormatError, match="order is not a permutation of the rows"):
        replace(packed, order=order).validate()
