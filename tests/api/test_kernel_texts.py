"""A lowered program shows its generated kernels: what is printed is what runs, each source once, by name, with the nodes that run it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CpuOptions, Plan, Prune, Quantize
from sparsify.kernels.cpu import build, dispatch, tune
from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.codegen import generate
from sparsify.lowering.cpu import fuse as fuse_cpu
from sparsify.lowering.cpu import lower as cpu
from sparsify.lowering.cpu import sparse_linear

WIDTH = 64


class Model(nn.Module):
    """q and k are equal in all that a kernel depends on; v has no bias, up has an activation behind it, head stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48, bias=False)
        self.up, self.act, self.head = nn.Linear(48, 80), nn.GELU(), nn.Linear(80, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.up(self.q(x) + self.k(x) + self.v(x))))


def lowered(target: Any, tokens: int = 6, *rules: Any) -> Any:
    torch.manual_seed(0)
    options: Any = {"cpu": CpuOptions(tokens=(1,), mode="small")} if target == "cpu" else {}
    rules = rules or (Prune(sparsity=0.75, method="magnitude", exclude=("head",)),)
    x = torch.randn(tokens, WIDTH)
    return sparsify.compile(Model().eval(), Plan(list(rules), target=target), example=x, progress=False, **options)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))
    timing = lambda key, calls, budget=0.25, cold=False: tune.Timing(dict.fromkeys(calls, 1.0), True)  # noqa: E731
    for module in (dispatch, cpu, fuse_cpu):
        monkeypatch.setattr(module, "measured", timing)


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_the_triton_source_that_is_shown_is_the_one_that_runs(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    host = lowered("cuda", tokens)
    found = host.sparsify.program.kernels()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran: list[str] = []
    run = launch.launch

    def spy(spec: Any, *rest: Any) -> None:
        ran.append(generate(spec))
        run(spec, *rest)

    monkeypatch.setattr(launch, "launch", spy)
    with torch.inference_mode():
        host(torch.randn(tokens, WIDTH))
    assert {kernel.source for kernel in found} == set(ran)
    assert (
        len({kernel.name for kernel in found}) == len(found) == (1 if tokens > 16 else 3)
    )  # with bias, without, with GELU
    assert sum(len(kernel.nodes) for kernel in found) == len(ran) == 4
    if tokens <= 16:
        assert [len(kernel.nodes) for kernel in found] == [2, 1, 1]


def test_the_c_source_that_is_shown_is_the_one_that_runs(untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    host = lowered("cpu")
    (found,) = host.sparsify.program.kernels()
    ran: list[str] = []
    run = sparse_linear.run_kernel
    monkeypatch.setattr(sparse_linear, "run_kernel", lambda k, name, *rest: ran.append(name) or run(k, name, *rest))
    with torch.inference_mode():
        host(torch.randn(6, WIDTH))
    assert [node.partition(" (")[2].rstrip(")") for node in found.nodes] == ran
    assert len(ran) == 5 - (not isinstance(host.head, sparse_linear.SparseLinear))
    for entry in ran:
        assert f"sparsify_{entry}(" in found.source
    assert found.name.startswith("bitmask_f32_")
    assert any(variant.value == "f32" and found.source == build.generate(variant) for variant in build.loaded)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_print_names_kernels_and_text_shows_them(target: str, request: pytest.FixtureRequest) -> None:
    if target == "cpu":
        request.getfixturevalue("untimed")
    program = lowered(target).sparsify.program
    found, short, whole = program.kernels(), str(program), program.text(kernels=True)
    assert found
    assert short == program.text()
    assert f"kernels: {len(found)} generated; program.text(kernels=True) prints their source" in short
    for kernel in found:
        assert short.count(kernel.name) == 1
        assert kernel.source not in short
        assert whole.count(kernel.source.rstrip("\n")) == 1
        for node in kernel.nodes:
            assert f"%{node.partition(' ')[0]}: " in short  # a line of the graph
    assert len(whole) > len(short) + sum(len(kernel.source) for kernel in found) - 200
    assert "program.text" not in whole


def test_other_numbers_of_tokens_have_other_kernels() -> None:
    program = lowered("cuda", 6, Prune(sparsity=0.75, method="magnitude"), Quantize(format="int8")).sparsify.program
    one, many = program.kernels(tokens=1), program.kernels(tokens=500)
    assert all("stream" in kernel.name and "int8" in kernel.name for kernel in one)
    assert all("expand" in kernel.name for kernel in many)
    assert not {kernel.source for kernel in one} & {kernel.source for kernel in many}


def test_programs_without_generated_kernels_say_nothing() -> None:
    model, x = Model().eval(), torch.randn(2, WIDTH)
    for program in (
        sparsify.analyse(model, x),
        sparsify.compile(model, Plan([], target="cuda"), example=x, progress=False).sparsify.program,  # type: ignore[union-attr]
        sparsify.compile(model, Plan([sparsify.LoRA(rank=2)]), example=x, progress=False).sparsify.program,  # type: ignore[union-attr]
    ):
        assert program.kernels() == ()
        assert "kernels:" not in program.text(kernels=True)


@pytest.mark.usefixtures("untimed")
def test_a_kernel_says_which_operations_it_computes() -> None:
    """As the inspector shows them side by side: a linear alone, and one with the activation behind it."""
    host = lowered("cpu", 6)
    packed = {n.meta["was"] for n in host.sparsify.program.graph.nodes if "packed_linear" in str(n.target)}
    calls = sorted(tuple(line.partition(" = ")[2].partition("(")[0] for line in was) for was in packed)
    assert calls == [("aten.linear",)] * 3 + [("aten.linear", "aten.gelu")]
    assert {line.partition("@")[2].partition(".")[0] for was in packed for line in was[:1]} == {"q", "k", "v", "up"}
