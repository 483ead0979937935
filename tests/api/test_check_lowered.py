"""`Plan(check="numeric")` for targets "cpu" and "cuda": a mistake in a layer, a fusion or the graph is found and named; no mistake is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CpuOptions, LoRA, Plan, Prune, Quantize, VerifyError
from sparsify.kernels import fallback
from sparsify.kernels.cpu import build, dispatch, skinny, tune
from sparsify.kernels.gpu.build import kernels_take
from sparsify.lowering import driver, fuse_linears
from sparsify.lowering.cpu import fuse as fuse_cpu
from sparsify.lowering.cpu import lower as cpu
from sparsify.lowering.cpu import sparse_linear
from sparsify.lowering.cuda import fuse as fuse_cuda
from sparsify.lowering.cuda import gpu_linear
from sparsify.lowering.cuda import lower as cuda

WIDTH = 40
OPTIONS = CpuOptions(tokens=(1,), mode="small")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed: every contestant takes as long."""
    timing = lambda key, calls, budget=0.25, cold=False: tune.Timing(dict.fromkeys(calls, 1.0), True)  # noqa: E731
    for module in (dispatch, cpu, fuse_cpu):
        monkeypatch.setattr(module, "measured", timing)


@pytest.fixture(autouse=True)
def compiler() -> None:
    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn, self.wide, self.act = FeedForward(), nn.Linear(WIDTH, 24), nn.GELU()

    def forward(self, x: Tensor, unused: bool = False) -> Tensor:
        return self.act(self.wide(x + self.ffn(self.q(x) * torch.sigmoid(self.k(x)))))


def model_of(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype).eval()


def lowered(target: Any, *rules: Any, dtype: torch.dtype = torch.float32, model: nn.Module | None = None) -> Any:
    rules = rules or (Prune(sparsity=0.75, method="magnitude"),)
    options: Any = {"cpu": OPTIONS} if target == "cpu" else {}
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = Plan(list(rules), target=target, check="numeric")
    return sparsify.compile(model or model_of(dtype), plan, example=x, progress=False, **options)


RULES: dict[str, tuple[Any, ...]] = {
    "pruned": (),
    "int8": (Quantize(format="int8"),),
    "pruned int8": (Prune(sparsity=0.5, method="magnitude"), Quantize(format="int8")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_without_a_mistake_nothing_is_said(target: str, rules: str, dtype: torch.dtype) -> None:
    host = lowered(target, *RULES[rules], dtype=dtype)
    packed = sum(isinstance(m, sparse_linear.SparseLinear | gpu_linear.GpuSparseLinear) for m in host.modules())
    assert packed >= 4, str(host.sparsify.report)


def one_weight(weight: Tensor) -> Tensor:
    """The weight with its largest entry halved: one of some thousand."""
    changed = weight.detach().clone()
    changed.view(-1)[changed.abs().argmax()] *= 0.5
    return changed


def where(rows: int) -> Callable[[Tensor], Tensor]:
    """The mistake in the weight of so many rows, which one layer alone has."""
    return lambda weight: one_weight(weight) if weight.shape[0] == rows else weight


def test_a_mistake_in_a_packed_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pack, wrong = cpu.pack, where(24)
    monkeypatch.setattr(cpu, "pack", lambda weight: pack(wrong(weight)))
    with pytest.raises(
        VerifyError, match=r"in pass 'lower-cpu': wide: output \d+ of token \d+ drifted by .*packed f32"
    ):
        lowered("cpu")


@pytest.mark.parametrize("factor", [1.05, 0.0])
def test_a_wrong_scale_of_one_row_is_named(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_int8 = cpu.pack_int8

    def wrong(integers: Tensor, scales: Tensor, *rest: Any) -> Any:
        scales = scales.clone()
        if len(scales) == 24:
            scales[5] *= factor
        return pack_int8(integers, scales, *rest)

    monkeypatch.setattr(cpu, "pack_int8", wrong)
    with pytest.raises(VerifyError, match=r"in pass 'lower-cpu': wide: output 5 of token \d+ drifted by .*packed s8"):
        lowered("cpu", Quantize(format="int8"))


def test_gate_and_up_in_the_wrong_order_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = sparse_linear.concatenate
    monkeypatch.setattr(sparse_linear, "concatenate", lambda parts, interleave=False: joined(parts[::-1], interleave))
    with pytest.raises(VerifyError, match=r"in pass 'lower-cpu': ffn.gate with ffn.up: output"):
        lowered("cpu")


def test_a_wrong_bias_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = sparse_linear.SparseLinear.prepare

    def wrong(self: Any) -> None:
        if self.packed.rows == 24 and self.bias is not None:
            self._buffers["bias"] = self.bias + 1e-3
        prepare(self)

    monkeypatch.setattr(sparse_linear.SparseLinear, "prepare", wrong)
    with pytest.raises(VerifyError, match=r"in pass 'lower-cpu': wide: output"):
        lowered("cpu")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_wrong_activation_is_the_passs_mistake(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fuse_linears.activation_of
    wrong = lambda *args: "relu" if found(*args) == "gelu" else found(*args)  # noqa: E731
    monkeypatch.setattr(fuse_linears, "activation_of", wrong)
    with pytest.raises(
        VerifyError, match=rf"in pass 'lower-{target}': the lowered host, though none of its linears alone"
    ):
        lowered(target)


def test_a_wrong_graph_is_the_passs_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph obeys the grammar, and computes something else."""
    rewrite = driver.rewrite

    def wrong(*args: Any) -> Any:
        program = rewrite(*args)
        node = next(n for n in program.graph.nodes if "sigmoid" in str(n.target))
        node.target = torch.ops.aten.tanh.default
        program.graph_module.recompile()
        return program

    monkeypatch.setattr(driver, "rewrite", wrong)
    with pytest.raises(VerifyError, match="in pass 'lower-cpu': the lowered program: output 0 drifted"):
        lowered("cpu")


def test_a_mistake_in_a_packed_layer_for_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pack, wrong = cuda.pack_smallest, where(24)
    monkeypatch.setattr(cuda, "pack_smallest", lambda weight, *rest: pack(wrong(weight), *rest))
    with pytest.raises(VerifyError, match=r"in pass 'lower-cuda': wide: output \d+ of token \d+ drifted"):
        lowered("cuda")


def test_a_mistake_in_gate_and_up_for_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = fuse_cuda.pack_stream
    monkeypatch.setattr(fuse_cuda, "pack_stream", lambda values, *rest, **more: pack(one_weight(values), *rest, **more))
    with pytest.raises(VerifyError, match=r"in pass 'lower-cuda': ffn.gate with ffn.up: output"):
        lowered("cuda")


class Branching(Model):
    """Has a linear that the example does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, unused: bool = False) -> Tensor:
        return super().forward(self.spare(x).sum() * x if unused else x)


def test_a_layer_that_the_example_does_not_reach_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    with torch.no_grad():
        for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
            linear.weight.mul_(torch.rand_like(linear.weight) < 0.25)
    pack = cpu.pack
    monkeypatch.setattr(cpu, "pack", lambda w: pack(one_weight(w) if w.shape[0] == 16 else w))
    x = torch.randn(2, 3, WIDTH)
    plan = Plan([], target="cpu", check="numeric")
    with pytest.raises(VerifyError, match="in pass 'lower-cpu': spare: output"):
        sparsify.compile(model, plan, example=x, cpu=OPTIONS, progress=False)
    unchecked = sparsify.compile(model, replace(plan, check="none"), example=x, cpu=OPTIONS, progress=False)
    assert isinstance(unchecked.spare, sparse_linear.SparseLinear)


# --- plain PyTorch --------------------------------------------------------------------------------------------------------


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a target "reference" once promised: nothing generated runs, in training or inference, and the results are the same."""
    torch.manual_seed(0)
    x = torch.randn(2048, 256)
    trained: Any = sparsify.compile(nn.Sequential(nn.Linear(256, 64)), Plan([LoRA(rank=4)]), example=x, progress=False)
    with torch.no_grad():
        trained[0].lora_B.normal_()
    calls: list[int] = []
    by_kernel = skinny.skinny_by_kernel

    def counted(*args: Any) -> Any:
        calls.append(1)
        return by_kernel(*args)

    monkeypatch.setattr("sparsify.ops.dispatch.skinny_by_kernel", counted)
    outputs = []
    for word in ("on", "off"):
        monkeypatch.setenv("SPARSIFY_KERNELS", word)
        trained.zero_grad()
        trained(x).square().sum().backward()
        outputs.append((trained(x).detach(), trained[0].lora_A.grad))
        assert bool(calls) == (word == "on")
        calls.clear()
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not kernels_take(x)
    host = lowered("cpu")
    assert not any(isinstance(m, sparse_linear.SparseLinear) for m in host.modules())
    assert "kernels are switched off (SPARSIFY_KERNELS)" in str(host.sparsify.report)


def test_a_word_that_is_none_is_said_and_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "said", {})
    monkeypatch.setenv("SPARSIFY_KERNELS", "maybe")
    with pytest.warns(RuntimeWarning, match="SPARSIFY_KERNELS='maybe': expected 'on' or 'off'"):
        assert fallback.switched_on()
    for word, expected in (("", True), (" ON ", True), ("0", False), ("Off", False)):
        monkeypatch.setenv("SPARSIFY_KERNELS", word)
        assert fallback.switched_on() is expected
