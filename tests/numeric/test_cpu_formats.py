"""Every kernel against the fp64 oracle: ragged shapes, extreme densities, NaN and Inf, fused epilogues."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsify.kernels.cpu import dispatch
from sparsify.kernels.cpu.build import BuildError, Kernels, load_kernels
from sparsify.kernels.cpu.codegen import ISAS, Isa, Variant
from sparsify.kernels.cpu.formats import Bitmask, concatenate, pack, pack_int8, quantize_int8
from sparsify.kernels.cpu.operator import epilogue
from sparsify.lowering.cpu import SparseLinear

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHAPES = ((1, 1), (3, 64), (8, 128), (37, 53), (66, 131), (101, 257))
TOKENS = (1, 2, 5, 8, 16, 17, 33, 65, 66, 129, 130)
EPSILON = 2.0**-24


def supported() -> tuple[Isa, ...]:
    return ISAS[ISAS.index(dispatch.best_isa()) :]


def kernels(isa: Isa, value: str) -> Kernels:
    try:
        return load_kernels(Variant(isa=isa, value=value))
    except BuildError as error:
        pytest.skip(str(error))


def make(shape: tuple[int, int], density: float, value: str, group: int = 0) -> Bitmask:
    torch.manual_seed(shape[0] * 1009 + shape[1])
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    if shape[0] > 3:
        weight[2] = 0.0
    if value == "s8":
        return pack_int8(*quantize_int8(weight, group), group).validate()
    return pack(weight.to(DTYPES[value])).validate()


def budget(packed: Bitmask, x: torch.Tensor, kernel: str) -> torch.Tensor:
    """Largest error a kernel may make: rounding of a sum of `cols` products, and the activation's quantisation."""
    weight = packed.unpack().double().abs()
    magnitude = x.double().abs() @ weight.t()
    tolerance = (packed.cols + 16) * EPSILON * magnitude + 1e-30
    if kernel == "vnni":
        tolerance = tolerance + x.double().abs().amax(1, keepdim=True) / 254 * 1.001 * weight.sum(1)
    if kernel == "dot":  # activations are rounded to 8 bits of mantissa, and subnormal products may vanish
        tolerance = tolerance + 2.0**-8 * magnitude
    return tolerance


VARIANTS = [(isa, value) for isa in ISAS for value in ("f32", "s8")]
VARIANTS += [
    ("avx512bf16", "bf16"),
    ("avx512vbmi2", "f16"),
    ("avx512vbmi2", "bf16"),
    ("portable", "f16"),
    ("avx2", "bf16"),
]


@pytest.fixture(autouse=True)
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("isa", "value"), VARIANTS)
def test_kernels_agree_with_the_oracle(isa: Isa, value: str) -> None:
    if isa not in supported():
        pytest.skip(f"this CPU does not run {isa}")
    loaded = kernels(isa, value)
    for shape in SHAPES:
        for density in (0.0, 0.25, 1.0):
            packed = make(shape, density, value)
            row_sums = packed.row_sums() if value == "s8" else None
            bias = torch.randn(shape[0])
            layer = dispatch.layer_struct(packed, row_sums, bias, "none", False)
            weight = packed.unpack().double()
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1])
                expected = x.double() @ weight.t() + bias.double()
                for name, entry in loaded.entries.items():
                    if name in ("gemv", "lookup") and tokens > 17:
                        continue
                    y = dispatch.run_kernel(entry, layer, x, shape[0], None, 16 if tokens % 2 else 256)
                    error = (y.double() - expected).abs()
                    allowed = budget(packed, x, name) + 2 * EPSILON * expected.abs() + EPSILON * bias.double().abs()
                    assert bool((error <= allowed).all()), (isa, value, shape, density, tokens, name)


@pytest.mark.parametrize("kernel", ["gemv", "lookup", "stream", "decompress"])
def test_group_scales(kernel: str) -> None:
    packed = make((37, 300), 0.3, "s8", group=128)
    loaded = kernels(dispatch.best_isa(), "s8")
    if kernel not in loaded.entries:
        pytest.skip(f"{dispatch.best_isa()} has no {kernel}")
    layer = dispatch.layer_struct(packed, packed.row_sums(), None, "none", False)
    for tokens in (1, 7, 33):
        x = torch.randn(tokens, 300)
        y = dispatch.run_kernel(loaded.entries[kernel], layer, x, 37, None, 16)
        error = (y.double() - x.double() @ packed.unpack().double().t()).abs()
        assert bool((error <= 2 * budget(packed, x, kernel)).all())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_fused_epilogues(activation: str, gated: bool) -> None:
    torch.manual_seed(5)
    first, second = torch.randn(27, 90), torch.randn(27, 90)
    packed = concatenate([pack(first), pack(second)], interleave=True)
    outputs = 27 if gated else 54
    bias = torch.randn(54)
    layer = SparseLinear(packed, bias, activation=activation, gated=gated)
    for tokens in (1, 3, 40):
        x, residual = torch.randn(tokens, 90) * 3, torch.randn(tokens, outputs)
        linear = F.linear(x.double(), packed.unpack().double(), bias.double())
        expected = epilogue(linear, activation, gated, residual.double())
        with torch.inference_mode():
            y = layer(x, residual)
        assert y.shape == expected.shape
        scale = 1 + linear.abs().max() ** (2 if gated else 1)
        assert float((y.double() - expected).abs().max()) <= 200 * EPSILON * float(scale)


@pytest.mark.parametrize("value", ["f32", "s8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_behave_as_in_the_dense_product(value: str, bad: float) -> None:
    packed = make((37, 130), 0.5, value)
    layer = SparseLinear(packed, int8=True)
    for tokens in (1, 4, 20, 70):
        x = torch.randn(tokens, 130)
        x[tokens // 2, 65] = bad
        with torch.inference_mode():
            y = layer(x)
        expected = F.linear(x, packed.unpack())
        assert torch.equal(torch.isnan(y), torch.isnan(expected)), tokens
        assert torch.equal(torch.isposinf(y), torch.isposinf(expected)), tokens
        assert torch.equal(torch.isneginf(y), torch.isneginf(expected)), tokens


def test_bf16_activations_are_multiplied_exactly_and_fp32_ones_are_not_rounded() -> None:
    """bf16 products are exact in fp32, so only the sums round; fp32 activations take a kernel that keeps their bits."""
    if "avx512bf16" not in supported():
        pytest.skip("this CPU has no bf16 products")
    torch.manual_seed(2)
    weight = (torch.randn(70, 200) * (torch.rand(70, 200) < 0.5)).bfloat16()
    packed = pack(weight)
    loaded = kernels("avx512bf16", "bf16")
    layer = dispatch.layer_struct(packed, None, None, "none", False)
    module = SparseLinear(packed)
    for tokens in (1, 5, 8, 9, 13, 40):
        x = torch.randn(tokens, 200).bfloat16().float()
        y = dispatch.run_kernel(loaded.entries["dot"], layer, x, 70, None, 32)
        error = (y.double() - x.double() @ weight.double().t()).abs()
        assert bool((error <= budget(packed, x, "")).all()), tokens
        module.choices[dispatch.bucket(tokens), 2] = dispatch.Choice("dot", 32, 1.0)
        x = torch.randn(tokens, 200)
        with torch.inference_mode():
            y = module(x)
        error = (y.double() - x.double() @ weight.double().t()).abs()
        assert bool((error <= budget(packed, x, "")).all()), tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(70, 96) * (torch.rand(70, 96) < 0.3)).to(dtype)
    layer = SparseLinear(pack(weight))
    for tokens in (1, 18):
        x = torch.randn(2, tokens, 96).to(dtype)
        with torch.inference_mode():
            y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (2, tokens, 70)
        expected = x.double() @ weight.double().t()
        step = torch.finfo(dtype).eps
        assert bool(((y.double() - expected).abs() <= step * expected.abs() + 1e-4).all())


def test_inputs_of_any_layout_and_no_tokens() -> None:
    packed = make((20, 70), 0.4, "f32")
    layer = SparseLinear(packed)
    x = torch.randn(70, 6).t()
    strided = torch.randn(6, 140)[:, ::2]
    with torch.inference_mode():
        for value in (x, strided):
            torch.testing.assert_close(layer(value), F.linear(value, packed.unpack()), rtol=1e-5, atol=1e-5)
        assert layer(torch.randn(0, 70)).shape == (0, 20)
        assert layer(torch.randn(70)).shape == (20,)
        with pytest.raises(ValueError, match=r"70 → 20"):
            layer(torch.randn(3, 71))
