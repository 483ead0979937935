"""On a CUDA device: every operator against its fp64 oracle in bf16 and fp32, and one training step of each method."""

from __future__ import annotations

import pytest
import tiny
import torch

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, RoSA
from sparsify.ops.partial_linear import oracle_partial_linear, oracle_partial_linear_backward
from sparsify.ops.sparse_lowrank_linear import oracle_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp_min(1e-9)
    assert float((found.double().cpu() - expected).abs().max() / scale) < BOUND[dtype]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_linear(axis, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 65, 129).to(dtype), torch.randn(77, 129).to(dtype)
    block = torch.randn(*((77, 13) if axis else (13, 129)))
    g = torch.randn(3, 65, 77).to(dtype)
    leaf_x, leaf_block = x.cuda().requires_grad_(), block.cuda().requires_grad_()
    y = torch.ops.sparsify.partial_linear(leaf_x, weight.cuda(), None, leaf_block, 5, axis)
    y.backward(g.cuda())
    channels, rounded = torch.arange(5, 18), block.to(dtype).double()
    close(y.detach(), oracle_partial_linear(x.double(), weight.double(), None, rounded, channels, axis), dtype)
    dx, d_block, _ = oracle_partial_linear_backward(g.double(), x.double(), weight.double(), rounded, channels, axis)
    close(leaf_x.grad, dx, dtype)
    close(leaf_block.grad, d_block, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_lowrank_linear(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(130, 96).to(dtype), torch.randn(70, 96).to(dtype)
    index = torch.randperm(70 * 96)[:41].sort().values.int()
    values, a, b = torch.randn(41), torch.randn(4, 96), torch.randn(70, 4)
    leaves = [t.cuda().requires_grad_() for t in (values, a, b)]
    y = torch.ops.sparsify.sparse_lowrank_linear(
        x.cuda(), weight.cuda(), None, leaves[0], index.cuda(), leaves[1], leaves[2], 0.5, False
    )
    y.float().square().mean().backward()
    parts = [t.to(dtype).double() for t in (values, a, b)]
    dense = oracle_weight(weight.double(), parts[0], index, parts[1], parts[2], 0.5)
    close(y.detach(), x.double() @ dense.t(), dtype)
    assert all(torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize(
    "rule",
    [S2FT(units=2), PaCA(rank=3), LoRA(rank=2), RoSA(rank=2, density=0.02, mask="random")],
    ids=lambda r: type(r).__name__,
)
def test_a_step_on_the_device_moves_what_trains(rule):
    host = sparsify.compile(tiny.llama().cuda(), Plan([rule]), progress=False)
    trained = [p for p in host.parameters() if p.requires_grad]
    assert all(p.is_cuda for p in trained)
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    for _ in range(2):
        tiny.probe_loss(host(tiny.tokens().cuda())).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


# --- generated kernels ------------------------------------------------------------------------------------------------

import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_quantized import random_base, unpack_by_formula  # noqa: E402
from sparsify.formats import FORMATS  # noqa: E402
from sparsify.kernels.gpu import launch, semi_structured  # noqa: E402
from sparsify.kernels.gpu.formats import pack_blocks, pack_stream, pack_two_four, quantize_int8  # noqa: E402
from sparsify.kernels.gpu.operator import packed_product  # noqa: E402

SIXTEEN = [torch.bfloat16, torch.float16]


def norm_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN is never small."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def needs_triton() -> None:
    pytest.importorskip("triton")


def sparse(rows: int, cols: int, density: float, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(rows, cols, device="cuda") * (torch.rand(rows, cols, device="cuda") < density)
    return weight.to(dtype)


def two_four(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    fours = torch.randn(rows, cols // 4, 4, device="cuda")
    return (fours * (fours.abs() >= fours.abs().topk(2, -1).values[..., -1:])).view(rows, cols).to(dtype)


STREAMS = [(torch.bfloat16, form) for form in ("gaps8", "gaps4", "two_four", "int8", "two_four int8")]
STREAMS += [(torch.float16, "gaps8"), (torch.float16, "two_four"), (torch.float32, "gaps4")]


@pytest.mark.parametrize(("dtype", "form"), STREAMS)
def test_streams(dtype: torch.dtype, form: str) -> None:
    needs_triton()
    rows, cols = 4099, 2064
    weight = two_four(rows, cols, dtype) if "two_four" in form else sparse(rows, cols, 0.3, dtype)
    exact_weight = weight.double()
    if "int8" in form:
        integers, scales = quantize_int8(weight)
        exact_weight = integers.double() * scales.double()[:, None]
        packed = (pack_two_four if "two_four" in form else pack_stream)(integers, scales, dtype=dtype)
    elif form == "two_four":
        packed = pack_two_four(weight)
    else:
        packed = pack_stream(weight, width=4 if dtype == torch.float32 else int(form[-1]))
    assert "int8" in form or torch.equal(launch.expand_stream(packed), weight)
    bias = torch.randn(rows, device="cuda").to(dtype)
    for tokens in (1, 3, 16):
        x = torch.randn(tokens, cols, device="cuda").to(dtype)
        residual = torch.randn(tokens, rows, device="cuda").to(dtype)
        expected = torch.nn.functional.silu(x.double() @ exact_weight.t() + bias.double()) + residual.double()
        y = launch.stream_product(packed, x, bias, residual, "silu")
        assert norm_error(y, expected) < (1e-5 if dtype == torch.float32 else 4e-3)
    wide = launch.stream_product(packed, x[:1], out=torch.float32)
    assert norm_error(wide, x[:1].double() @ exact_weight.t()) < 1e-5


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_gated_streams(dtype: torch.dtype) -> None:
    needs_triton()
    weight = sparse(2 * 1500, 1024, 0.4, dtype)
    packed = pack_stream(weight, gated=True)
    for tokens in (1, 4):
        x = torch.randn(tokens, 1024, device="cuda").to(dtype)
        gate, up = (x.double() @ weight.double().t()).chunk(2, -1)
        found = launch.stream_product(packed, x, activation="silu")
        assert norm_error(found, torch.nn.functional.silu(gate) * up) < 4e-3


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("tokens", [64, 200])
def test_two_four_with_many_tokens_runs_on_sparse_tensor_cores(dtype: torch.dtype, tokens: int) -> None:
    needs_triton()
    weight = two_four(512, 1024, dtype)
    packed, x = pack_two_four(weight), torch.randn(tokens, 1024, device="cuda").to(dtype)
    bias = torch.randn(512, device="cuda").to(dtype)
    assert semi_structured.why_not(packed) == ""
    y = semi_structured.product(packed, x, bias)
    assert y is not None
    assert norm_error(y, x.double() @ weight.double().t() + bias.double()) < 4e-3
    through = packed_product(packed, x, bias, None, "none")
    assert torch.equal(through, y)
    assert "SparseSemiStructured" in type(semi_structured.semi_structured(packed)).__name__


TILES = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.bfloat16, True)]


@pytest.mark.parametrize(("dtype", "int8"), TILES)
@pytest.mark.parametrize("sides", [(16, 16), (64, 64)])
def test_tiles(dtype: torch.dtype, int8: bool, sides: tuple[int, int]) -> None:
    needs_triton()
    height, width = sides
    kept = torch.rand(640 // height, 1, 512 // width, 1, device="cuda") < 0.4
    weight = (torch.randn(640 // height, height, 512 // width, width, device="cuda") * kept).view(640, 512).to(dtype)
    packed, exact_weight = pack_blocks(weight, height, width), weight.double()
    if int8:
        integers, scales = quantize_int8(weight)
        packed = pack_blocks(integers, height, width, scales)
        exact_weight = integers.double() * scales.double()[:, None]
    for tokens in (1, 5, 100):
        x = torch.randn(tokens, 512, device="cuda").to(dtype)
        assert norm_error(launch.blocks_product(packed, x, out=torch.float32), x.double() @ exact_weight.t()) < 1e-5


BASES = [(format, torch.bfloat16, tokens) for format in FORMATS for tokens in (1, 7, 64)]
BASES += [("nf4", torch.float16, 1), ("nf4", torch.float16, 16), ("int8", torch.float32, 1), ("nf4", torch.float32, 30)]


@pytest.mark.parametrize(("format", "dtype", "tokens"), BASES)
def test_quantized_bases(format: str, dtype: torch.dtype, tokens: int) -> None:
    """NF4, int8 and int4 with a support, a low-rank part and a bias, in one launch; packed weights are drawn at random, so that
    no library is needed."""
    needs_triton()
    rows, cols, rank = 1027, 2048 + 192, 24
    packed = random_base(format, rows, cols, "cuda")
    weight = unpack_by_formula(packed, format, rows, cols, torch.float64)
    x, bias = torch.randn(tokens, cols, device="cuda").to(dtype), torch.randn(rows, device="cuda").to(dtype)
    index = torch.randperm(rows * cols, device="cuda")[:9000].sort().values.int()
    values, b = torch.randn(9000, device="cuda"), torch.randn(rows, rank, device="cuda")
    u = (x @ torch.randn(rank, cols, device="cuda").to(dtype).t()) / cols**0.5
    exact = x.double() @ weight.flatten().index_copy(0, index.long(), values.double()).view(rows, cols).t()
    exact = exact + 0.5 * u.double() @ b.double().t() + bias.double()
    found = launch.quantized_product(packed, format, x, bias, values, index, u, b, 0.5, rows)
    assert norm_error(found, exact) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_a_quantized_base_is_safe_in_a_cuda_graph() -> None:
    needs_triton()
    packed, x = random_base("nf4", 256, 512, "cuda"), torch.randn(1, 512, device="cuda").bfloat16()
    index = torch.arange(0, 256 * 512, 97, device="cuda").int()
    values = torch.randn(index.numel(), device="cuda")
    run = partial(launch.quantized_product, packed, "nf4", x, None, values, index, rows=256)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    weight = unpack_by_formula(packed, "nf4", 256, 512, torch.float64)
    for _ in range(3):
        x.copy_(torch.randn(1, 512, device="cuda"))
        values.normal_()
        graph.replay()
        exact = x.double() @ weight.flatten().index_copy(0, index.long(), values.double()).view(256, 512).t()
        assert norm_error(y, exact) < 4e-3


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
@pytest.mark.parametrize("tokens", [100, 4096])
def test_gradient_kernels(dtype: torch.dtype, tokens: int) -> None:
    needs_triton()
    g, x = (torch.randn(tokens, w, device="cuda").to(dtype) for w in (520, 390))
    exact = g.double().t() @ x.double()
    channels = torch.randperm(520, device="cuda")[:70]
    assert norm_error(launch.partial_grad(g, x, channels), exact[channels]) < 1e-5
    assert norm_error(launch.partial_grad(g, x, channels, transpose=True), exact[channels].t()) < 1e-5
    assert norm_error(launch.contiguous_grad(g[:, 30:99], x), exact[30:99]) < 2e-5
    for count in (300, 20000):
        index = torch.randperm(520 * 390, device="cuda")[:count].sort().values.int()
        expected = exact.flatten()[index.long()]
        support = launch.support_of(index, 520, 390)
        assert norm_error(launch.sampled_tile(g, x, support, torch.float32), expected) < 1e-5
        assert norm_error(launch.sampled_entries(g, x, index, torch.float32), expected) < 1e-5


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
def test_written_values_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    needs_triton()
    weight = torch.randn(700, 300, device="cuda").to(dtype)
    values, index = torch.randn(5000, device="cuda"), torch.randperm(210000, device="cuda")[:5000]
    expected = weight.clone()
    expected.view(-1)[index] = values.to(dtype)
    launch.write_values(weight, values, index)
    assert torch.equal(weight, expected)


def test_launches_are_safe_in_a_cuda_graph_and_follow_the_stream() -> None:
    """Captured once, replayed over new inputs; a launch that read the host would fail the capture."""
    needs_triton()
    weight = sparse(512, 768, 0.3, torch.bfloat16)
    packed, x = pack_stream(weight), torch.randn(2, 768, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch.stream_product(packed, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch.stream_product(packed, x)
    for _ in range(3):
        x.copy_(torch.randn(2, 768, device="cuda"))
        y.fill_(float("nan"))
        graph.replay()
        assert norm_error(y, x.double() @ weight.double().t()) < 4e-3


def test_a_lowered_model_decodes_under_compile() -> None:
    needs_triton()
    model = tiny.llama(torch.bfloat16).cuda()
    plan = Plan([sparsify.Prune(sparsity=0.75, method="magnitude")], target="cuda")
    host = sparsify.compile(model, plan, progress=False)
    ids = tiny.tokens().cuda()
    with torch.no_grad():
        expected = host(ids).logits
        found = torch.compile(host, backend=sparsify.backend("aot_eager"), fullgraph=True)(ids).logits
    assert norm_error(found, expected.double()) < 1e-2


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "rule", [S2FT(units=2), RoSA(rank=2, density=0.02, mask="random")], ids=lambda r: type(r).__name__
)
def test_the_backend_gives_eager_gradients(rule: sparsify.plan.Rule, inner: str) -> None:
    torch._dynamo.reset()
    host = sparsify.compile(tiny.llama().cuda(), Plan([rule]), progress=False)
    gradients = []
    for run in (host, torch.compile(host, backend=sparsify.backend(inner), fullgraph=True)):
        host.zero_grad()
        tiny.probe_loss(run(input_ids=tiny.tokens().cuda(), use_cache=False)).backward()
        gradients.append([p.grad.double() for p in tiny.trainable(host)])
    for eager, compiled in zip(*gradients, strict=True):
        assert norm_error(compiled, eager) < 1e-3
