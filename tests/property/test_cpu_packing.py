"""Packing is exact and reversible for any shape and pattern, and damaged data is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.kernels.cpu.formats import (
    PADDING,
    Bitmask,
    FormatError,
    concatenate,
    mask_bits,
    mask_counts,
    pack,
    pack_bits,
    pack_int8,
    quantize_int8,
    unpack_values,
)

SHAPES = st.tuples(st.integers(1, 23), st.integers(1, 201))
DENSITIES = st.sampled_from([0.0, 0.05, 0.25, 0.5, 0.9, 1.0])
FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def random_weight(shape: tuple[int, int], density: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < density
    weight[seed % shape[0]] = 0.0  # an empty row
    return weight


@settings(max_examples=80, deadline=None)
@given(SHAPES, DENSITIES, FLOATS, st.integers(0, 2**31))
def test_floats_round_trip_exactly(shape: tuple[int, int], density: float, dtype: torch.dtype, seed: int) -> None:
    weight = random_weight(shape, density, seed).to(dtype)
    packed = pack(weight).validate()
    assert torch.equal(packed.unpack(), weight)
    assert packed.nnz == int(torch.count_nonzero(weight))
    assert packed.unpack().dtype == dtype


@settings(max_examples=60, deadline=None)
@given(SHAPES, DENSITIES, st.sampled_from([0, 64, 128]), st.integers(0, 2**31))
def test_integers_round_trip_exactly(shape: tuple[int, int], density: float, group: int, seed: int) -> None:
    integers, scales = quantize_int8(random_weight(shape, density, seed), group)
    packed = pack_int8(integers, scales, group)
    assert torch.equal(unpack_values(packed), integers)
    dense = integers.float() * packed.dense_scales()
    assert torch.equal(packed.unpack(), dense)
    assert torch.equal(packed.row_sums(), integers.sum(1, dtype=torch.int32))


@settings(max_examples=40, deadline=None)
@given(SHAPES, DENSITIES, st.integers(0, 2**31))
def test_quantisation_error_is_at_most_half_a_step(shape: tuple[int, int], density: float, seed: int) -> None:
    weight = random_weight(shape, density, seed)
    integers, scales = quantize_int8(weight)
    error = (integers.double() * scales.double().view(-1, 1) - weight.double()).abs()
    assert bool((error <= scales.double().view(-1, 1) * 0.5 * (1 + 1e-5)).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_bits_round_trip(panels: int, blocks: int, seed: int) -> None:
    bits = torch.rand(panels, blocks, 4, 64, generator=torch.Generator().manual_seed(seed)) < 0.4
    words = pack_bits(bits)
    assert words.shape == (panels, blocks, 4)
    assert torch.equal(mask_bits(words), bits)
    assert torch.equal(mask_counts(words), bits.sum(-1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 150), st.integers(0, 2**31))
def test_concatenated_weights_are_the_stacked_ones(rows: int, cols: int, seed: int) -> None:
    first, second = random_weight((rows, cols), 0.3, seed), random_weight((rows, cols), 0.6, seed + 1)
    stacked = concatenate([pack(first), pack(second)]).validate()
    assert torch.equal(stacked.unpack(), torch.cat([first, second]))
    alternating = concatenate([pack(first), pack(second)], interleave=True).validate()
    assert torch.equal(alternating.unpack()[0::2], first)
    assert torch.equal(alternating.unpack()[1::2], second)


def test_minus_zero_is_a_zero() -> None:
    packed = pack(torch.tensor([[-0.0, 1.0]]))
    assert packed.nnz == 1
    assert not torch.signbit(packed.unpack()[0, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(FormatError, match="a weight is NaN or Inf"):
        pack(torch.tensor([[1.0, bad]]))
    with pytest.raises(FormatError, match="a weight is NaN or Inf"):
        quantize_int8(torch.tensor([[1.0, bad]]))


def good() -> Bitmask:
    return pack(random_weight((7, 130), 0.4, 3))


def damage(name: str) -> Bitmask:
    packed = good()
    masks, values, panel_ptr = packed.masks.clone(), packed.values.clone(), packed.panel_ptr.clone()
    if name == "bit beyond the last column":
        masks[0, -1, 0] |= 1 << 5  # column 133
    elif name == "bit beyond the last row":
        masks[-1, 0, -1] |= 1
    elif name == "one bit more":
        free = int((~mask_bits(masks)[0, 0, 0]).nonzero()[0])
        masks[0, 0, 0] |= 1 << free
    elif name == "shifted pointer":
        panel_ptr[1] += 1
    elif name == "pointer past the end":
        panel_ptr[-1] = 1 << 40
    elif name == "negative pointer":
        panel_ptr[0] = -1
    elif name == "short values":
        values = values[:-1].clone()
    elif name == "no padding":
        values = values[: packed.nnz // 2].clone()
    elif name == "padding not zero":
        values[-1] = 1.0
    elif name == "NaN value":
        values[0] = float("nan")
    elif name == "int32 masks":
        masks = masks.int()
    elif name == "double values":
        values = values.double()
    elif name == "fewer masks":
        masks = masks[:-1].clone()
    elif name == "strided values":
        values = values.repeat_interleave(2)[::2]
    elif name == "scales on floats":
        return replace(packed, scales=torch.ones(7))
    elif name == "more rows":
        return replace(packed, rows=9)
    elif name == "no rows":
        return replace(packed, rows=0)
    return replace(packed, masks=masks, values=values, panel_ptr=panel_ptr)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bit beyond the last column", "beyond column 130"),
        ("bit beyond the last row", "beyond row 7"),
        ("one bit more", "panel_ptr does not match"),
        ("shifted pointer", "panel_ptr does not match"),
        ("pointer past the end", "panel_ptr does not match"),
        ("negative pointer", "panel_ptr does not match"),
        ("short values", "values are stored, the masks hold"),
        ("no padding", "values"),
        ("padding not zero", "padding behind the values"),
        ("NaN value", "NaN or Inf"),
        ("int32 masks", "expected torch.int64"),
        ("double values", "values are torch.float64"),
        ("fewer masks", "masks have shape"),
        ("strided values", "not contiguous"),
        ("scales on floats", "scales belong to int8"),
        ("more rows", "masks have shape"),
        ("no rows", "needs rows and columns"),
    ],
)
def test_damaged_data_is_refused(name: str, text: str) -> None:
    good().validate()
    with pytest.raises(FormatError, match=text):
        damage(name).validate()


def test_int8_needs_fitting_scales() -> None:
    integers, scales = quantize_int8(random_weight((6, 100), 0.5, 1))
    packed = pack_int8(integers, scales)
    assert packed.values.numel() == packed.nnz + PADDING
    for scale, text in (
        (scales[:-1], "scales have shape"),
        (None, "need scales"),
        (scales * float("nan"), "NaN or Inf"),
    ):
        with pytest.raises(FormatError, match=text):
            replace(packed, scales=scale).validate()
    with pytest.raises(FormatError, match="multiple of 64"):
        quantize_int8(torch.ones(2, 100), group=32)
    with pytest.raises(FormatError, match="symmetric"):
        pack_int8(torch.full((1, 1), -128, dtype=torch.int8), torch.ones(1))
