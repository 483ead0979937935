"""Every kernel against the fp64 oracle: ragged shapes, extreme densities, NaN and Inf, fused epilogues."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsify.kernels.cpu import dispatch
from sparsify.kernels.cpu.build import BuildError, Kernels, load_kernels
from sparsify.kernels.cpu.codegen import BF16_KERNELS, INT8_KERNELS, ISAS, Isa, Variant
from sparsify.kernels.cpu.formats import Bitmask, concatenate, pack, pack_int8, quantize_int8
from sparsify.kernels.cpu.operator import epilogue
from sparsify.lowering.cpu.lower import SparseLinear

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
    if kernel in INT8_KERNELS:
        tolerance = tolerance + x.double().abs().amax(1, keepdim=True) / 254 * 1.001 * weight.sum(1)
    if (
        kernel in BF16_KERNELS
    ):  # activations and output are rounded to 8 bits of mantissa, subnormal products may vanish
        tolerance = tolerance + 2.0**-8 * 1.01 * magnitude
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
                for name in loaded.entries:
                    if name in ("gemv", "lookup") and tokens > 17:
                        continue
                    y = dispatch.run_kernel(loaded, name, layer, x, shape[0], None, 16 if tokens % 2 else 256)
                    error = (y.double() - expected).abs()
                    step = 2.0**-8 if name in BF16_KERNELS else 2 * EPSILON
                    allowed = budget(packed, x, name) + step * expected.abs() + EPSILON * bias.double().abs()
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
        y = dispatch.run_kernel(loaded, kernel, layer, x, 37, None, 16)
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


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_are_right_to_a_few_units_in_the_last_place(activation: str) -> None:
    """Of a product that is exact, so that nothing but the activation rounds; the bound is far below that of a sum."""
    x = torch.linspace(-6, 6, 24 * 40).view(-1, 24)
    layer = SparseLinear(pack(torch.eye(24)), torch.zeros(24), activation=activation)
    for rows in (x[:1], x):
        with torch.inference_mode():
            y = layer(rows)
        expected = epilogue(rows.double(), activation, False, torch.zeros_like(rows).double())
        assert float((y.double() - expected).abs().max()) <= 16 * EPSILON * 6


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


@pytest.mark.parametrize("kernel", BF16_KERNELS)
def test_bf16_activations_are_multiplied_exactly_and_fp32_ones_are_not_rounded(kernel: str) -> None:
    """bf16 products are exact in fp32, so only sums and output round; fp32 activations take a kernel that keeps their bits."""
    if "avx512bf16" not in supported():
        pytest.skip("this CPU has no bf16 products")
    torch.manual_seed(2)
    weight = (torch.randn(70, 200) * (torch.rand(70, 200) < 0.5)).bfloat16()
    packed = pack(weight)
    loaded = kernels("avx512bf16", "bf16")
    layer = dispatch.layer_struct(packed, None, None, "none", False)
    module = SparseLinear(packed)
    for tokens in (1, 5, 8, 9, 13, 40, 140):
        x = torch.randn(tokens, 200).bfloat16()
        expected = x.double() @ weight.double().t()
        y = dispatch.run_kernel(loaded, kernel, layer, x, 70, None, 32)
        assert y.dtype == torch.bfloat16
        allowed = budget(packed, x, "")
        assert bool(((y.double() - expected).abs() <= allowed + 2.0**-8 * (expected.abs() + allowed)).all()), tokens
        module.choices[dispatch.bucket(tokens), 2] = dispatch.Choice(kernel, 32, 1.0)
        x = torch.randn(tokens, 200)
        with torch.inference_mode():
            y = module(x)
        assert y.dtype == torch.float32
        error = (y.double() - x.double() @ weight.double().t()).abs()
        assert bool((error <= budget(packed, x, "")).all()), tokens


@pytest.mark.parametrize("kernel", BF16_KERNELS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_fused_epilogues_of_bf16_kernels(kernel: str, activation: str, gated: bool) -> None:
    if "avx512bf16" not in supported():
        pytest.skip("this CPU has no bf16 products")
    torch.manual_seed(6)
    halves = [(torch.randn(43, 90) * (torch.rand(43, 90) < 0.4)).bfloat16() for _ in range(2)]
    packed = concatenate([pack(half) for half in halves], interleave=True)
    outputs, bias = (43 if gated else 86), torch.randn(86)
    layer, loaded = dispatch.layer_struct(packed, None, bias, activation, gated), kernels("avx512bf16", "bf16")
    for tokens in (1, 3, 40, 131):
        x, residual = torch.randn(tokens, 90).bfloat16(), torch.randn(tokens, outputs).bfloat16()
        linear = F.linear(x.double(), packed.unpack().double(), bias.double())
        for extra in (residual, None):
            expected = epilogue(linear, activation, gated, None if extra is None else extra.double())
            y = dispatch.run_kernel(loaded, kernel, layer, x, outputs, extra, 16 if tokens % 2 else 64)
            scale = 1 + linear.abs().max() ** (2 if gated else 1)
            allowed = 2.0**-8 * expected.abs() + 200 * EPSILON * float(scale)
            assert bool(((y.double() - expected).abs() <= allowed).all()), (tokens, extra is None)


@pytest.mark.parametrize("kernel", BF16_KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_of_bf16_models(kernel: str, bad: float) -> None:
    if "avx512bf16" not in supported():
        pytest.skip("this CPU has no bf16 products")
    packed = make((37, 130), 0.5, "bf16")
    layer = SparseLinear(packed)
    for tokens in (4, 20, 200):
        layer.choices[dispatch.bucket(tokens), 2] = dispatch.Choice(kernel, 64, 1.0)
        x = torch.randn(tokens, 130).bfloat16()
        x[tokens // 2, 129] = bad
        with torch.inference_mode():
            y = layer(x)
        expected = F.linear(x.float(), packed.unpack().float())
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(y), kind(expected)), (tokens, kind)


def test_pairs_of_a_large_weight_are_made_in_portions() -> None:
    if "avx512bf16" not in supported():
        pytest.skip("this CPU has no bf16 products")
    torch.manual_seed(7)
    weight = torch.randn(1501, 1450).bfloat16()
    packed = pack(weight)
    assert packed.nnz > 2 << 20  # what is kept of it at a time
    layer, loaded = dispatch.layer_struct(packed, None, None, "none", False), kernels("avx512bf16", "bf16")
    for tokens in (20, 130):  # one tile of tokens for both threads, and tiles for each
        x = torch.randn(tokens, 1450).bfloat16()
        y = dispatch.run_kernel(loaded, "pairs", layer, x, 1501, None, 64)
        expected = x.double() @ weight.double().t()
        allowed = budget(packed, x, "")
        assert bool(((y.double() - expected).abs() <= allowed + 2.0**-8 * (expected.abs() + allowed)).all()), tokens


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
        with pytest.raises(ValueError, match="the weight 70 columns"):
            layer(torch.randn(3, 71))


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 40])
def test_nearly_dense_int8_panels_are_stored_whole(tokens: int) -> None:
    """Zeros too, and read without masks; the panels beside them, and ragged edges, as any other."""
    torch.manual_seed(3)
    integers = torch.randint(1, 127, (22, 192), dtype=torch.int8)
    integers[torch.rand(22, 192) < 0.06] = 0  # rounded to zero: few
    integers[8:12][torch.rand(4, 192) < 0.5] = 0
    scales = torch.rand(22) + 0.5
    packed = pack_int8(integers, scales).validate()
    stored = packed.panel_ptr.diff().tolist()
    assert [n == 4 * 192 for n in stored] == [True, True, False, True, True, False]  # the last has two rows only
    assert torch.equal(packed.unpack(), integers.float() * scales[:, None])
    assert torch.equal(packed.part(8, 14).unpack(), packed.unpack()[8:])
    ragged = pack_int8(integers[:, :130].contiguous(), scales).validate()
    assert ragged.nnz == int((integers[:, :130] != 0).sum())
    x = torch.randn(tokens, 192)
    expected = F.linear(x.double(), packed.unpack().double())
    loaded = kernels(dispatch.best_isa(), "s8")
    row_sums = packed.row_sums()
    layer = dispatch.layer_struct(packed, row_sums, None, "none", False)
    for name in loaded.entries:
        if name in ("lookup", "gemv") and tokens > 8:
            continue
        error = (dispatch.run_kernel(loaded, name, layer, x, 22, None, 16).double() - expected).abs()
        assert bool((error <= budget(packed, x, name) + 2 * EPSILON * expected.abs()).all()), name
