"""What one kernel can compute is joined; of what nearly can, the report says why not: a near miss for every reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsify
from sparsify.kernels.cpu import build, dispatch
from sparsify.kernels.cpu.formats import PANEL
from sparsify.lowering.cpu import fuse as fuse_cpu
from sparsify.lowering.cpu.fuse import Counted
from sparsify.lowering.cpu.sparse_linear import SparseLinear, pack
from sparsify.lowering.cuda import lower as cuda
from sparsify.lowering.cuda.gpu_linear import GpuSparseLinear, pack_smallest
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct, find_joins, is_elementwise

WIDTH, INNER = 32, 48


class FeedForward(nn.Module):
    """A gated product, or what `forward` makes of it."""

    def __init__(self, forward: Callable[[Any, Tensor], Any] | None = None, bias: bool = True) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(WIDTH, INNER, bias=bias)
        self.down, self.change = nn.Linear(INNER, WIDTH), forward

    def forward(self, x: Tensor) -> Any:
        return self.change(self, x) if self.change else self.down(F.silu(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """gate and up in one weight, or what `forward` makes of it."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], rows: int = 2 * INNER) -> None:
        super().__init__()
        self.both, self.change = nn.Linear(WIDTH, rows), forward

    def forward(self, x: Tensor) -> Any:
        return self.change(self, x)


class Around(nn.Module):
    """The analysis leaves the model itself alone: a module around the one in question."""

    def __init__(self, inner: nn.Module, forward: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.ffn, self.change = inner, forward

    def forward(self, x: Tensor) -> Any:
        return self.change(self, x) if self.change else self.ffn(x)


def joins(model: nn.Module, example: Any = None) -> tuple[list[Any], list[str]]:
    found, refusals = find_joins(
        sparsify.analyse(model.eval(), torch.randn(2, 3, WIDTH) if example is None else example)
    )
    return found, [str(refusal) for refusal in refusals]


def product(text: str, forward: Callable[[Any, Tensor], Any]) -> Any:
    return pytest.param(forward, f"ffn.gate: no gated product: {text}", id=text)


def silu(y: Tensor) -> Tensor:
    return F.silu(y)


def long(y: Tensor) -> Tensor:
    for _ in range(14):
        y = torch.sin(y)
    return y


def test_a_gated_product_is_found_and_nothing_is_refused() -> None:
    (found,), refusals = joins(Around(FeedForward()))
    assert isinstance(found, GatedProduct)
    assert (found.gate, found.up, found.down, found.activation) == ("ffn.gate", "ffn.up", "ffn.down", "silu")
    assert refusals == ["ffn.gate: no activation of its own: the same module computes it that computes the linear"]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        product("the other factor, %", lambda m, x: silu(m.gate(x)) * F.pad(x, (0, INNER - WIDTH))),
        product("the output of ffn.up is read elsewhere too", lambda m, x: silu(m.gate(x)) * (u := m.up(x)) + u),
        product("ffn.up reads another input", lambda m, x: silu(m.gate(x)) * m.up(x + 1)),
        product("what follows is none of", lambda m, x: torch.sigmoid(m.gate(x)) * m.up(x)),
        product("ffn does more than that (%", lambda m, x: m.down(silu(m.gate(x)) * m.up(x)) + 1),
        product(
            "what is multiplied is read elsewhere too",
            lambda m, x: (s := silu(g := m.gate(x))) * m.up(x) + m.down(g).sum() + s.sum(),
        ),
        product("more than 12 element-wise operations follow", lambda m, x: long(m.gate(x)) * m.up(x)),
    ],
)
def test_a_product_that_is_nearly_gated_says_why(forward: Callable[[Any, Tensor], Any], reason: str) -> None:
    found, refusals = joins(Around(FeedForward(forward)))
    assert not any(isinstance(join, GatedProduct) for join in found)
    assert any(text.startswith(reason) for text in refusals), refusals


def test_where_a_product_lies_matters() -> None:
    _, refusals = joins(FeedForward())
    assert "gate: no gated product: it belongs to the model itself, not to a module inside of it" in refusals
    _, refusals = joins(
        Around(FeedForward(lambda m, x: (m.gate(x), m.up(x))), lambda m, x: F.silu((y := m.ffn(x))[0]) * y[1])
    )
    assert "ffn.gate: no gated product: part of it happens outside of ffn" in refusals
    apart = nn.ModuleDict({"a": nn.Sequential(nn.Linear(WIDTH, INNER)), "b": nn.Sequential(nn.Linear(WIDTH, INNER))})
    _, refusals = joins(Around(apart, lambda m, x: F.silu(m.ffn["a"](x)) * m.ffn["b"](x)))
    assert "ffn.a.0: no gated product: ffn.b.0 belongs to another module" in refusals


@pytest.mark.parametrize(
    ("forward", "rows", "reason"),
    [
        (
            lambda m, x: (p := m.both(x).chunk(2, -1))[0] * silu(p[1]),
            96,
            "the second half is activated; kernels activate",
        ),
        (lambda m, x: silu((p := m.both(x).split([1, 95], -1))[0]) * p[1], 96, "it is not split into two equal halves"),
        (
            lambda m, x: silu((p := m.both(x).chunk(2, 0))[0]) * p[1],
            96,
            "it is split along axis 0, which is not the last",
        ),
        (lambda m, x: silu((p := m.both(x).chunk(2, -1))[0]) * p[1] + p[1], 96, "its halves are read elsewhere too"),
        (lambda m, x: torch.sigmoid((p := m.both(x).chunk(2, -1))[0]) * p[1], 96, "what follows is none of relu, "),
        (lambda m, x: silu((p := m.both(x).chunk(2, -1))[0]) * p[1] + 1, 96, "ffn does more than that (%add"),
    ],
)
def test_a_split_that_is_nearly_gated_says_why(forward: Callable[[Any, Tensor], Any], rows: int, reason: str) -> None:
    (found, *_), refusals = joins(Around(Packed(lambda m, x: silu((p := m.both(x).chunk(2, -1))[0]) * p[1])))
    assert isinstance(found, GatedProduct)
    assert found.linears == ("ffn.both",)
    assert refusals == []
    found, refusals = joins(Around(Packed(forward, rows)))
    assert not found
    assert [text.startswith(f"ffn.both: no gated product: {reason}") for text in refusals] == [True], refusals


class Elsewhere(nn.Module):
    """An activation with more around it."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, y: Tensor) -> Any:
        return self.change(y)


def activated(change: Callable[[Tensor], Any], forward: Callable[[Any, Tensor], Any] | None = None) -> nn.Module:
    model: Any = Around(nn.Linear(WIDTH, INNER), forward or (lambda m, x: m.act(m.ffn(x))))
    model.act = Elsewhere(change)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (activated(torch.sigmoid), "what follows is none of relu, "),
        (activated(lambda y: F.gelu(y) * 1.001), "what follows is none of relu, "),  # a thousandth off
        (activated(lambda y: F.gelu(y).sum(-1)), "act does more than element-wise work on it"),
        (activated(F.gelu, lambda m, x: m.act(y := m.ffn(x)) + y.sum()), "its output is read outside of act too"),
        (
            Around(FeedForward(lambda m, x: m.down(F.gelu(m.gate(x))))),
            "the same module computes it that computes the linear",
        ),
    ],
)
def test_an_activation_that_cannot_move_says_why(model: nn.Module, reason: str) -> None:
    (found,), refusals = joins(activated(F.gelu))
    assert isinstance(found, FusedActivation)
    assert (found.linear, found.module, found.activation, refusals) == ("ffn", "act", "gelu", [])
    found, refusals = joins(model)
    assert not found
    assert [f": no activation of its own: {reason}" in text for text in refusals] == [True], refusals


def test_an_example_too_small_to_tell_activations_apart() -> None:
    model: Any = Around(nn.Linear(WIDTH, 6), lambda m, x: m.act(m.ffn(x)))
    model.act = nn.GELU()
    found, refusals = joins(model, torch.randn(2, WIDTH))
    assert not found
    assert "ffn: no activation of its own: the example shows 12 numbers of it, and 64 are needed" in refusals[0]


def test_a_weight_that_is_read_twice_or_belongs_to_no_linear() -> None:
    model: Any = Around(nn.Linear(WIDTH, WIDTH), lambda m, x: m.act(m.ffn(m.act(m.ffn(x)))))
    model.act = nn.GELU()
    found, refusals = joins(model)
    assert not found
    assert refusals == ["ffn: its weight is read in several places"] * 2
    model = Around(nn.Linear(WIDTH, WIDTH), lambda m, x: m.act(F.linear(m.ffn(x), m.other)))
    model.other, model.act = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.GELU()
    assert joins(model) == ([], ["other: no module of its own computes it"])


def test_linears_with_nothing_to_join_are_not_mentioned() -> None:
    model = Around(FeedForward(lambda m, x: m.gate(x) @ m.up(x).transpose(-1, -2)))
    assert joins(model) == ([], [])
    model = Around(FeedForward(lambda m, x: m.gate(x) + m.up(x)))
    assert joins(model) == ([], [])


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Phi-3", "BERT (classifier)", "T5 (gated)", "ViT", "MPT"])
def test_every_linear_with_element_wise_work_behind_it_is_joined_or_refused(name: str) -> None:
    model = tiny.build(name)
    program = sparsify.analyse(model, tiny.inputs_of(model, name))
    found, refusals = find_joins(program)
    named = {join.gate if isinstance(join, GatedProduct) else join.linear for join in found}
    named |= {refusal.where for refusal in refusals}
    candidates = [
        linear.weight.rpartition(".")[0]
        for linear in program.linears()
        if any(is_elementwise(user) and user.all_input_nodes == [linear.node] for user in linear.node.users)
    ]
    assert set(candidates) <= named
    assert found


# --- what the driver and the targets refuse -----------------------------------------------------------------------------------


def pruned(model: nn.Module, keep: tuple[str, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and name not in keep:
                linear.weight.mul_(torch.rand_like(linear.weight) < 0.2)
    return model.eval()


def report_of(model: nn.Module, example: Any = None, target: str = "cuda") -> str:
    x = torch.randn(2, 3, WIDTH) if example is None else example
    host: Any = sparsify.compile(model, sparsify.Plan([], target=target), example=x, progress=False)  # type: ignore[arg-type]
    with torch.no_grad():
        for a, b in zip(tiny_outputs(host(x)), tiny_outputs(model(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return str(host.sparsify.report)


def tiny_outputs(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def hooked(model: Any, name: str) -> Any:
    model.get_submodule(name).register_forward_hook(lambda _m, _x, y: y)
    return model


def with_gate_up(model: Any) -> Any:
    model.ffn.gate_up = nn.Identity()
    return model


class Two(nn.Module):
    """One feed-forward under two names, of which one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = self.again = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


class TwoArguments(FeedForward):
    def forward(self, x: Tensor, scale: int) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def uneven() -> nn.Module:
    model: Any = Around(FeedForward())
    model.ffn.up = nn.Linear(WIDTH, INNER, bias=False)
    return model


@pytest.mark.parametrize(
    ("model", "keep", "reason"),
    [
        (lambda: Around(FeedForward()), ("ffn.up",), "ffn.up is not packed"),
        (lambda: hooked(Around(FeedForward()), "ffn.gate"), (), "ffn.gate has hooks"),
        (Two, (), "ffn.gate is used under several names"),
        (lambda: with_gate_up(Around(FeedForward())), (), "ffn.gate_up exists"),
        (lambda: Around(TwoArguments(), lambda m, x: m.ffn(x, 1)), (), "ffn takes more than one tensor (TypeError)"),
        (
            lambda: Around(
                FeedForward(lambda m, x: (m.down(F.silu(m.gate(x)) * m.up(x)), None)), lambda m, x: m.ffn(x)[0]
            ),
            (),
            "ffn returns a tuple",
        ),
        (uneven, (), "they differ in shape, value type or bias"),
    ],
)
def test_the_report_says_why_a_gated_product_was_not_fused(
    model: Callable[[], nn.Module], keep: tuple[str, ...], reason: str
) -> None:
    assert "fused      ffn: gate, up, silu and product in one kernel" in report_of(pruned(Around(FeedForward())))
    text = report_of(pruned(model(), keep))
    assert f"not fused  ffn: gate, up, silu and product stay apart: {reason}" in text, text
    assert "\nfused " not in text


def test_tiles_have_no_gated_kernel() -> None:
    model: Any = Around(FeedForward())
    with torch.no_grad():
        for linear in (model.ffn.gate, model.ffn.up):
            linear.weight.mul_(torch.eye(3).repeat_interleave(16, 0).repeat_interleave(16, 1)[:INNER, :WIDTH])
    assert "stay apart: tiles have no gated kernel" in report_of(model.eval())


class Moving(nn.Module):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)
        if shared:
            self.again = self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize(
    ("model", "keep", "reason"),
    [
        (Moving, ("up",), "up is not packed"),
        (lambda: hooked(Moving(), "up"), (), "up has hooks"),
        (lambda: hooked(Moving(), "act"), (), "act has hooks"),
        (lambda: Moving(shared=True), (), "act is used under several names"),
    ],
)
@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_the_report_says_why_an_activation_was_not_fused(
    model: Callable[[], nn.Module], keep: tuple[str, ...], reason: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target == "cpu":
        fast(monkeypatch)
    assert "fused      up: gelu in its kernel" in report_of(pruned(Moving()), target=target)
    text = report_of(pruned(model(), keep), target=target)
    assert f"not fused  up: gelu stays apart: {reason}" in text, text


def fast(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Packed layers are measured to be fast, and so is what was fused, unless `seconds` say otherwise."""
    from sparsify.kernels.cpu.tune import Timing
    from sparsify.lowering.cpu import lower as cpu
    from sparsify.lowering.cpu import whole_model

    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))
    times = {"torch": 2.0, "onednn": 3.0, "apart": 2.0, **seconds}

    def measured(key: str, calls: Any, budget: float = 0.25, cold: bool = False) -> Timing:
        return Timing({name: times.get(name, 1.0) for name in calls}, True)

    for module in (dispatch, cpu, fuse_cpu):
        monkeypatch.setattr(module, "measured", measured)
    monkeypatch.setattr(whole_model, "time_in_turn", lambda *_: Timing({"lowered": 1.0, "dense": 2.0}, True))


def test_what_is_slower_together_stays_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fast(monkeypatch, fused=3.0)
    text = report_of(pruned(Around(FeedForward())), target="cpu")
    assert "ffn: gate, up, silu and product stay apart: together they take 1.50 × the time at 1 tokens" in text
    text = report_of(pruned(Moving()), target="cpu")
    assert "up: gelu stays apart: together they take 1.50 × the time at 1 tokens" in text


def test_what_the_cpus_kernel_cannot_join() -> None:
    times, found = Counted((1,), True), GatedProduct("ffn", "ffn.g", "ffn.u", "silu", "", *[None] * 2)  # type: ignore[arg-type]
    one, other = (SparseLinear(pack(torch.randn(rows, 40))) for rows in (PANEL, 2 * PANEL))
    assert fuse_cpu.join_gated(found, (one, other), times) == "gate and up differ in shape or value type"
    assert fuse_cpu.join_gated(found, (one,), times) == f"half of {PANEL} rows is no multiple of {PANEL}"
    narrow = [GpuSparseLinear(pack_smallest(torch.randn(rows, 40))) for rows in (16, 32)]
    assert cuda.CudaTarget().join(found, narrow) == "they differ in shape, value type or bias"
