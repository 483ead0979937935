"""Every generated GPU kernel in Triton's interpreter, against the fp64 oracle: ragged shapes, all value types, epilogues.

The interpreter's bf16 arithmetic is not to be trusted, so bf16 operands are checked with fp32 results (the kernels widen
bf16 by bit operations, which the interpreter does exactly) and bf16 results only to its truncation. bf16 products on
tensor cores are checked on a GPU (`test_on_gpu.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_interpreter import require_interpreter

pytest.importorskip("triton")

from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.build import TritonError
from sparsify.kernels.gpu.codegen import parameters
from sparsify.kernels.gpu.formats import pack_blocks, pack_stream, pack_two_four, quantize_int8
from sparsify.kernels.gpu.spec import KernelSpec

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EPSILON = 2.0**-24


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    require_interpreter()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def random_sparse(rows: int, cols: int, density: float, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(rows, cols) * (torch.rand(rows, cols) < density)
    weight[rows // 2] = 0.0
    return weight.to(dtype)


def two_four(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    fours = torch.randn(rows, cols // 4, 4)
    return (fours * (fours.abs() >= fours.abs().topk(2, -1).values[..., -1:])).view(rows, cols).to(dtype)


def activated(y: Tensor, name: str) -> Tensor:
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")
    return {"none": y, "relu": F.relu(y), "silu": F.silu(y)}[name]


def check(found: Tensor, expected: Tensor, magnitude: Tensor, terms: int) -> None:
    """`magnitude` is the sum of absolute products: fp32 sums of `terms` products err by at most this share of it."""
    bound = (terms + 32) * EPSILON * (magnitude + expected.abs() + 1)
    excess = (found.double() - expected).abs() - bound
    assert float(excess.max()) <= 0, f"off by {float((found.double() - expected).abs().max())}"


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Exact `x Wᵀ` and the sum of absolute products."""
    return x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("density", "width"), [(0.5, 8), (0.08, 4)])
def test_stream(tokens: int, name: str, density: float, width: int) -> None:
    dtype = FLOATS[name]
    weight = random_sparse(37, 75, density, dtype)
    packed = pack_stream(weight, width=4 if name == "fp32" else width)
    x = torch.randn(tokens, 75).to(dtype)
    exact, magnitude = product(x, weight)
    check(launch.stream_product(packed, x, out=torch.float32), exact, magnitude, 75)


@pytest.mark.parametrize("group", [8, 16])
def test_stream_with_many_positions(group: int) -> None:
    """More chunks per row than a program reads at once, and rows that end at different times."""
    weight = random_sparse(19, 1100, 0.9, torch.float16)
    weight[3, 200:] = 0.0
    x = torch.randn(1, 1100).half()
    exact, magnitude = product(x, weight)
    check(launch.stream_product(pack_stream(weight, group=group), x, out=torch.float32), exact, magnitude, 1100)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_two_four(tokens: int, name: str) -> None:
    weight = two_four(21, 48, FLOATS[name])
    x = torch.randn(tokens, 48).to(FLOATS[name])
    exact, magnitude = product(x, weight)
    check(launch.stream_product(pack_two_four(weight), x, out=torch.float32), exact, magnitude, 48)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("form", ["gaps8", "gaps4", "two_four", "blocks"])
def test_int8(tokens: int, form: str) -> None:
    weight = two_four(32, 64, torch.float32) if form == "two_four" else random_sparse(32, 64, 0.4, torch.float32)
    integers, scales = quantize_int8(weight)
    x = torch.randn(tokens, 64).half()
    exact, magnitude = product(x, integers.double() * scales.double()[:, None])
    if form == "blocks":
        y = launch.blocks_product(pack_blocks(integers, 16, 32, scales), x, out=torch.float32)
    elif form == "two_four":
        y = launch.stream_product(pack_two_four(integers, scales), x, out=torch.float32)
    else:
        y = launch.stream_product(pack_stream(integers, scales, width=int(form[-1])), x, out=torch.float32)
    check(y, exact, magnitude, 64)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("form", ["stream", "blocks"])
def test_epilogue(tokens: int, activation: str, form: str) -> None:
    weight = random_sparse(32, 48, 0.4, torch.float32)
    x, bias, residual = torch.randn(tokens, 48), torch.randn(32), torch.randn(tokens, 32)
    if form == "stream":
        y = launch.stream_product(pack_stream(weight), x, bias, residual, activation)
    else:
        y = launch.blocks_product(pack_blocks(weight, 16, 16), x, bias, residual, activation)
    exact, magnitude = product(x, weight)
    check(y, activated(exact + bias.double(), activation) + residual.double(), 8 * (magnitude + 8), 48)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_what_is_no_number_stays_so(activation: str) -> None:
    """As in torch: relu(nan) is nan."""
    weight, x = random_sparse(32, 48, 0.4, torch.float32), torch.randn(1, 48)
    bias = torch.zeros(32)
    bias[5] = float("nan")
    y = launch.stream_product(pack_stream(weight), x, bias, None, activation)
    assert y[0].isnan().nonzero().flatten().tolist() == [5]


POINTEES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64, "i32": torch.int32,
            "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "i1": torch.bool}  # fmt: skip


def test_tensors_are_of_the_types_that_kernels_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter reads whatever it gets; a compiled kernel reads its pointers as its signature says."""
    seen: dict[str, int] = {}

    def checked(spec: KernelSpec, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        types = parameters(spec)
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                assert types[name].startswith("*"), name
                if name != "values_ptr":  # several of them are read as one integer
                    assert value.dtype is POINTEES[types[name][1:]], (spec.op, name, types[name], value.dtype)
            else:
                assert not types[name].startswith("*"), name
        seen[spec.op] = seen.get(spec.op, 0) + 1

    monkeypatch.setattr(launch, "launch", checked)
    weight, x = random_sparse(32, 64, 0.4, torch.float16), torch.randn(3, 64).half()
    launch.stream_product(pack_stream(weight), x)
    launch.blocks_product(pack_blocks(weight, 16, 16), x)
    a, b = torch.randn(40, 30).half(), torch.randn(40, 21).half()
    support = torch.arange(0, 30 * 21, 7)
    for index in (torch.tensor([3, 7, 0]), torch.tensor([3, 7, 0], dtype=torch.int32)):
        launch.partial_grad(a, b, index)
    for flat in (support, support.int()):
        launch.sampled_entries(a, b, flat)
        launch.sampled_tile(a, b, launch.support_of(flat, 30, 21))
        launch.write_values(torch.zeros(30, 21), torch.ones(support.numel()), flat)
    assert set(seen) >= {"stream", "blocks", "partial_grad"}, seen
    assert len(seen) >= 5, seen


@pytest.mark.parametrize("tokens", [1, 2])
def test_gated(tokens: int) -> None:
    weight = random_sparse(26, 40, 0.5, torch.float32)
    x, bias = torch.randn(tokens, 40), torch.randn(26)
    y = launch.stream_product(pack_stream(weight, gated=True), x, bias, None, "silu")
    gate, up = (x.double() @ weight.double().t() + bias.double()).chunk(2, -1)
    check(y, F.silu(gate) * up, torch.full_like(gate, 300.0), 40)


def test_sixteen_bit_results() -> None:
    weight, x = random_sparse(20, 64, 0.5, torch.float16), torch.randn(2, 64).half()
    exact, _ = product(x, weight)
    y = launch.stream_product(pack_stream(weight), x)
    assert y.dtype == torch.float16
    assert float(((y.double() - exact).abs() - exact.abs() * 2**-10).max()) < 1e-5
    y = launch.stream_product(pack_stream(weight.bfloat16()), x.bfloat16())
    assert y.dtype == torch.bfloat16
    exact, _ = product(x.bfloat16(), weight.bfloat16())
    assert float(((y.double() - exact).abs() - exact.abs() * 2**-7).max()) < 1e-5


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_expansion_is_bit_exact(name: str) -> None:
    dtype = FLOATS[name]
    for density in (0.0, 0.1, 0.6, 1.0):
        weight = random_sparse(21, 83, density, dtype)
        assert torch.equal(launch.expand_stream(pack_stream(weight)), weight)
    weight = two_four(21, 48, dtype)
    assert torch.equal(launch.expand_stream(pack_two_four(weight)), weight)


def test_expansion_of_int8_is_scaled() -> None:
    integers, scales = quantize_int8(random_sparse(21, 83, 0.5, torch.float32))
    dense = launch.expand_stream(pack_stream(integers, scales), torch.float32)
    assert torch.equal(dense, integers.float() * scales[:, None])


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("sides", [(16, 16), (32, 64)])
def test_blocks(tokens: int, name: str, sides: tuple[int, int]) -> None:
    height, width = sides
    kept = torch.rand(2, 1, 3, 1) < 0.6
    kept[1] = False  # an empty row of tiles
    weight = (torch.randn(2, height, 3, width) * kept).view(2 * height, 3 * width).to(FLOATS[name])
    x = torch.randn(tokens, 3 * width).to(FLOATS[name])
    exact, magnitude = product(x, weight)
    packed = pack_blocks(weight, height, width)
    check(launch.blocks_product(packed, x, out=torch.float32), exact, magnitude, 3 * width)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("tokens", [7, 600])
@pytest.mark.parametrize("transpose", [False, True])
def test_partial_grad(name: str, tokens: int, transpose: bool) -> None:
    """The gather is inside, also out of a wider matrix; 600 tokens are summed in two parts."""
    a, b = torch.randn(tokens, 90).to(FLOATS[name])[:, 20:], torch.randn(tokens, 33).to(FLOATS[name])
    index = torch.tensor([3, 69, 7, 0, 21])
    exact, magnitude = product(a.t(), b.t())
    found = launch.partial_grad(a, b, index, transpose)
    assert found.dtype == torch.float32
    check(found.t() if transpose else found, exact[index], magnitude[index], tokens)


def test_contiguous_grad_takes_views() -> None:
    a, b = torch.randn(40, 30), torch.randn(40, 21)
    assert torch.allclose(launch.contiguous_grad(a[:, 5:11], b), a[:, 5:11].t() @ b)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize(("rows", "cols"), [(50, 33), (70, 150)])
@pytest.mark.parametrize("method", ["tile", "entries"])
def test_sampled_product(name: str, rows: int, cols: int, method: str) -> None:
    a, b = torch.randn(45, rows).to(FLOATS[name]), torch.randn(45, cols).to(FLOATS[name])
    index = torch.randperm(rows * cols)[: rows * cols // 9].sort().values
    exact, magnitude = product(a.t(), b.t())
    for flat in (index, index.int()):
        if method == "tile":
            found = launch.sampled_tile(a, b, launch.support_of(flat, rows, cols), torch.float32)
        else:
            found = launch.sampled_entries(a, b, flat, torch.float32)
        check(found, exact.flatten()[index], magnitude.flatten()[index], 45)


def test_bf16_entries() -> None:
    a, b = torch.randn(45, 20).bfloat16(), torch.randn(45, 24).bfloat16()
    index = torch.randperm(480)[:31].sort().values
    exact, magnitude = product(a.t(), b.t())
    check(launch.sampled_entries(a, b, index, torch.float32), exact.flatten()[index], magnitude.flatten()[index], 45)


def test_a_support_follows_its_index() -> None:
    index = torch.tensor([1, 5, 9])
    first = launch.support_of(index, 4, 3)
    assert launch.support_of(index, 4, 3) is first
    index[2] = 11
    assert launch.support_of(index, 4, 3) is not first


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_write_values(name: str) -> None:
    weight = torch.randn(50, 33).to(FLOATS[name])
    values, index = torch.randn(1400), torch.randperm(1650)[:1400].int()
    expected = weight.clone()
    expected.view(-1)[index.long()] = values.to(FLOATS[name])
    launch.write_values(weight, values, index)
    assert torch.equal(weight, expected)


def test_arguments_that_a_kernel_would_misread_are_refused() -> None:
    packed = pack_stream(random_sparse(20, 40, 0.5, torch.float32))
    with pytest.raises(TritonError, match="1 to 16 tokens, got 17"):
        launch.stream_product(packed, torch.randn(17, 40))
    with pytest.raises(TritonError, match="not torch.float64"):
        launch.stream_product(packed, torch.randn(1, 40).double())
    blocks = pack_blocks(torch.ones(16, 16), 16, 16)
    with pytest.raises(TritonError, match="values are torch.float32, x is torch.float16"):
        launch.blocks_product(blocks, torch.randn(2, 16).half())
    with pytest.raises(TritonError, match="index_ptr is torch.int16, the kernel reads torch.int64"):
        launch.launch(*wrong_index())


def wrong_index() -> tuple[object, ...]:
    spec = launch.KernelSpec(
        op="write_values",
        target="sm_90",
        tile=launch.choose_tile("write_values", 1, "sm_90"),
        x="fp32",
        out="fp32",
        index_bits=64,
    )
    index = torch.zeros(3, dtype=torch.int16)
    arguments = {"weight_ptr": torch.zeros(9), "values_ptr": torch.zeros(3), "index_ptr": index, "count": 3}
    return spec, (1,), arguments
