"""Off the traced path nothing changes: a structure is permuted only where the proof stands, else the same units train in place."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, PaCA, Plan

pytestmark = pytest.mark.fresh_trace

WIDTH, HIDDEN = 12, 20


class Base(nn.Module):
    """up → relu → down, with room for what subclasses do beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)


class AuxiliaryHead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.up(x))
        return (self.down(h), self.aux(h)) if self.training else self.down(h)


class ShowsUnits(Base):
    def forward(self, x: Tensor, features: bool = False) -> Any:
        h = torch.relu(self.up(x))
        return (self.down(h), h) if features else self.down(h)


class GainIfGiven(Base):
    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        h = torch.relu(self.up(x))
        if gain is not None:
            h = h * gain
        return self.down(h)


class GainByDefault(Base):
    def forward(self, x: Tensor, gain: Any = 1.0) -> Tensor:
        return self.down(torch.relu(self.up(x)) * gain)


class GainInline(Base):
    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return self.down(torch.relu(self.up(x)).mul(1.0 if gain is None else gain))


class GainPreparedBefore(Base):
    def forward(self, x: Tensor, gain: Any = None) -> Tensor:
        if gain is None:
            gain = 1.0
        return self.down(torch.relu(self.up(x)) * gain)


class InHelper(Base):
    """The branch stands in a function that the units pass through."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.down(self.masked(torch.relu(self.up(x)), mask))

    def masked(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return h if mask is None else h.masked_fill(mask, 0.0)


class SkipsDown(Base):
    def __init__(self) -> None:
        super().__init__()
        self.project = True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        if self.project:
            h = self.down(h)
        return h


class MergesOnEval(nn.Module):
    """A linear that folds a second path into its weight when it goes to eval mode."""

    class Folding(nn.Linear):
        def __init__(self, n: int, m: int) -> None:
            super().__init__(n, m)
            self.scale = nn.Parameter(torch.rand(m) + 0.5)
            self.folded = False

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            if mode == self.folded:
                with torch.no_grad():
                    self.weight.mul_(1 / self.scale[:, None] if mode else self.scale[:, None])
                self.folded = not mode
            return self

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight if self.folded else self.weight * self.scale[:, None]
            return nn.functional.linear(x, weight, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = self.Folding(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Probed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def probe(self, x: Tensor) -> Tensor:
        """What the units say: users call it beside `forward`."""
        return torch.relu(self.up(x))


class Keeps(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.relu(self.up(x))
        return self.down(self.last)


class ReturnsToCaller(nn.Module):
    """The block always returns its units beside the output; who asks for them was not traced."""

    class Block(Base):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.up(x))
            return self.down(h), h

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, x: Tensor, details: bool = False) -> Any:
        y, h = self.block(x)
        return (x + y, h) if details else x + y


class OnlyWithGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        if torch.is_grad_enabled():
            h = h * torch.linspace(0.5, 1.5, HIDDEN)
        return self.down(h)


class ByTable(Base):
    """No branch at all: the mode picks a head from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Identity(), nn.Linear(HIDDEN, HIDDEN)])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.heads[int(self.training)](torch.relu(self.up(x))))


class OnLongInputs(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        if x.shape[0] > 4:
            h = h.flip(-1)
        return self.down(h)


class Chosen(Base):
    """What a caller may choose meets the units: `gain` stands for a number, a word, a function, a container."""

    other: Any = None

    def call(self, x: Tensor) -> Any:
        return self(x, self.other)


def ramp() -> Tensor:
    return torch.linspace(0.5, 1.5, HIDDEN)


class GainUnderAnotherName(Chosen):
    other = ramp()

    def forward(self, x: Tensor, gain: Any = None) -> Tensor:
        factor = 1.0 if gain is None else gain
        return self.down(torch.relu(self.up(x)) * factor)


class GainFromKeywords(Chosen):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.down(torch.relu(self.up(x)) * options.get("gain", 1.0))

    def call(self, x: Tensor) -> Tensor:
        return self(x, gain=ramp())


class GainFromContainer(Chosen):
    other = (1.0, ramp())

    def forward(self, x: Tensor, gains: Any = (1.0,)) -> Tensor:
        h = torch.relu(self.up(x))
        for gain in gains:
            h = h * gain
        return self.down(h)


class GainInClosure(Chosen):
    other = ramp()

    def forward(self, x: Tensor, gain: Any = 1.0) -> Tensor:
        return self.down((lambda h: torch.relu(h) * gain)(self.up(x)))


class FunctionGiven(Chosen):
    other = staticmethod(lambda h: h.flip(-1))

    def forward(self, x: Tensor, function: Any = torch.relu) -> Tensor:
        return self.down(function(self.up(x)))


class NoFunctionsGiven(Chosen):
    other = (lambda h: h.flip(-1),)

    def forward(self, x: Tensor, functions: Any = ()) -> Tensor:
        h = torch.relu(self.up(x))
        for function in functions:
            h = function(h)
        return self.down(h)


class WordChooses(Chosen):
    other = "turned"

    def forward(self, x: Tensor, how: str = "plain") -> Tensor:
        table = {"plain": lambda h: h, "turned": lambda h: h.flip(-1)}
        return self.down(table[how](torch.relu(self.up(x))))


class FlagPrepares(Chosen):
    other = True

    def forward(self, x: Tensor, special: bool = False) -> Tensor:
        gain = ramp() if special else torch.ones(HIDDEN)
        return self.down(torch.relu(self.up(x)) * gain)


class HelperChooses(Chosen):
    other = True

    def pick(self, special: bool) -> Any:
        return (lambda h: h.cumsum(-1)) if special else torch.relu

    def forward(self, x: Tensor, special: bool = False) -> Tensor:
        function = self.pick(special)
        return self.down(function(self.up(x)))


class MaskOfOneEntry(Chosen):
    other = ramp() > 1

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.inner(x, torch.tensor(False) if mask is None else mask)

    def inner(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.down(torch.where(mask, h * 2, h))


class AttributeIfThere(Chosen):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)) * getattr(self, "gain", 1.0))

    def call(self, x: Tensor) -> Tensor:
        self.gain = ramp()
        try:
            return self(x)
        finally:
            del self.gain


class AttributeTried(AttributeIfThere):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        try:
            h = h * self.gain
        except AttributeError:
            h = h * 1.0
        return self.down(h)


class Numbered(nn.Module):
    """The structure's modules have numbers for names."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        if hidden:
            return self.ffn[:2](x)
        return self.ffn(x)

    def call(self, x: Tensor) -> Tensor:
        return self(x, True)


class NumberedFeatures(Numbered):
    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)

    def call(self, x: Tensor) -> Tensor:
        return self.ffn[:-1](x)


class LoopsUpTo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)])

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        for layer in self.layers[:depth]:
            x = layer(x)
        return x

    def call(self, x: Tensor) -> Tensor:
        return self(x, 2)


class Holder(nn.Module):
    """A module above the structure reaches into it, in a method that `forward` does not call."""

    class Block(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)

    def call(self, x: Tensor) -> Tensor:
        return torch.relu(self.block.up(x))


class HolderBranches(Holder):
    def forward(self, x: Tensor, neurons: bool = False) -> Tensor:
        return self.block.up(x) if neurons else x + self.block(x)

    def call(self, x: Tensor) -> Tensor:
        return self(x, True)


CHOSEN = [
    GainUnderAnotherName, GainFromKeywords, GainFromContainer, GainInClosure, FunctionGiven, NoFunctionsGiven, WordChooses,
    FlagPrepares, HelperChooses, MaskOfOneEntry, AttributeIfThere, AttributeTried, Numbered, NumberedFeatures, LoopsUpTo, Holder,
    HolderBranches,
]  # fmt: skip
OFF_THE_TRACE = [
    *CHOSEN, AuxiliaryHead, ShowsUnits, GainIfGiven, GainByDefault, GainInline, GainPreparedBefore, InHelper, SkipsDown, MergesOnEval,
    Probed, Keeps, ReturnsToCaller, OnlyWithGradients, ByTable, OnLongInputs,
]  # fmt: skip


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class CastsIfNeeded(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        if isinstance(self.down.weight, Tensor) and h.dtype != self.down.weight.dtype:
            h = h.to(self.down.weight.dtype)
        return self.down(h)


class RaisesIfWrong(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        if h.shape[-1] != self.up.out_features:
            raise ValueError(f"expected {self.up.out_features} channels, got {h.shape[-1]}")
        return self.down(h)


class DropsOut(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.dropout(torch.relu(self.up(x)), 0.1, self.training))


class DropsOutInABranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        if self.training:
            h = nn.functional.dropout(h, 0.1)
        return self.down(h)


class BranchesElsewhere(nn.Module):
    """The branch that was not taken is in the caller, which never holds a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.extra = Plain(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, extra: bool = False) -> Any:
        y = x + self.block(x)
        return (y, self.extra(y)) if extra else y


PROVEN = [Plain, CastsIfNeeded, RaisesIfWrong, DropsOut, DropsOutInABranch, BranchesElsewhere]


def compiled(model: nn.Module, rule: Any = None, **options: Any) -> Any:
    rule = rule or S2FT(structure="ffn", units=5)
    return sparsify.compile(model, Plan([rule], seed=3), example=(torch.randn(3, WIDTH),), progress=False, **options)


def build(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().train()


@pytest.mark.parametrize("cls", OFF_THE_TRACE)
def test_a_structure_with_an_untraced_path_trains_in_place_and_says_why(cls: type[nn.Module]) -> None:
    host = compiled(build(cls))
    (choice,) = host.sparsify.program.choices
    assert choice.in_place
    assert not host.sparsify.program.moves
    assert f"in place: {choice.in_place}" in str(host.sparsify.report)
    assert choice.in_place in str(host.sparsify.program)


@pytest.mark.parametrize("cls", PROVEN)
def test_a_proven_structure_is_permuted(cls: type[nn.Module]) -> None:
    host = compiled(build(cls))
    (choice,) = host.sparsify.program.choices
    assert not choice.in_place
    assert host.sparsify.program.moves


def calls_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Every path that the class has, in both modes, with and without gradients."""
    found: list[Any] = []
    gain = torch.linspace(0.5, 1.5, HIDDEN)
    for mode in (True, False):
        model.train(mode)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found.append(model(x))
                if hasattr(model, "call"):
                    found.append(model.call(x))
                if isinstance(model, ShowsUnits):
                    found.append(model(x, features=True))
                if isinstance(model, GainIfGiven | GainByDefault | GainInline | GainPreparedBefore):
                    found.append(model(x, gain=gain))
                if isinstance(model, InHelper):
                    found.append(model(x, mask=gain > 1))
                if isinstance(model, SkipsDown):
                    model.project = False
                    found.append(model(x))
                    model.project = True
                if isinstance(model, Probed):
                    found.append(model.probe(x))
                if isinstance(model, Keeps):
                    found.append(model.last)
                if isinstance(model, ReturnsToCaller):
                    found.append(model(x, details=True))
    return [t.detach() for t in torch.utils._pytree.tree_leaves(found)]


@pytest.mark.parametrize("cls", [*OFF_THE_TRACE, Plain, CastsIfNeeded, RaisesIfWrong, BranchesElsewhere])
@pytest.mark.parametrize("rule", [S2FT(structure="ffn", units=5, producer_fraction=0.2), PaCA(rank=3, match="*down")])
def test_every_path_computes_what_the_model_computes(cls: type[nn.Module], rule: Any) -> None:
    model = build(cls)
    if cls is MergesOnEval and isinstance(rule, S2FT):
        rule = S2FT(structure="ffn", units=5)  # its Up has a forward of its own and cannot train
    if isinstance(model, Numbered | LoopsUpTo) and isinstance(rule, PaCA):
        rule = PaCA(rank=3, match="*.2")
    host = compiled(copy.deepcopy(model), rule)
    x = torch.randn(7, WIDTH)
    wanted, got = calls_of(model, x), calls_of(host, x)
    assert len(wanted) == len(got)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [S2FT(structure="ffn", units=5, producer_fraction=0.2), PaCA(rank=3, match="*down")])
def test_in_place_trains_the_same_units_with_the_same_gradients(rule: Any) -> None:
    from dataclasses import replace

    model, x = build(Plain), torch.randn(7, WIDTH)
    hosts = [compiled(copy.deepcopy(model), r) for r in (rule, replace(rule, permute=False))]
    assert hosts[0].sparsify.program.moves
    assert not hosts[1].sparsify.program.moves
    for host in hosts:
        host(x).square().sum().backward()
    deltas = []
    for host in hosts:
        with torch.no_grad():
            for parameter in host.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.01)
        deltas.append({(d.param, d.kind): d for d in host.sparsify.current().deltas})
    assert set(deltas[0]) == set(deltas[1])
    for key, delta in deltas[0].items():
        other = deltas[1][key]
        order, back = delta.channels.argsort(), other.channels.argsort()
        assert torch.equal(delta.channels[order], other.channels[back])
        side = 1 if delta.kind == "column" else 0
        torch.testing.assert_close(
            other.values.index_select(side, back), delta.values.index_select(side, order), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_that_sees_gradients_of_the_units_keeps_them_in_place(register: str) -> None:
    seen: list[Tensor] = []
    model = build(Plain)
    getattr(model.up, register)(lambda _module, *grads: seen.append(grads[-1][0].detach()))
    host = compiled(model)
    assert "hook" in host.sparsify.program.choices[0].in_place
    seen.clear()
    x = torch.randn(2, WIDTH, requires_grad=True)
    model(x).sum().backward()
    host(x).sum().backward()
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_sees_the_units_keeps_them_in_place(register: str) -> None:
    seen: list[Tensor] = []
    model = build(Plain)
    getattr(model.down, register)(lambda _module, args, *_: seen.append(args[0].detach()))
    host = compiled(model)
    assert "hook" in host.sparsify.program.choices[0].in_place
    seen.clear()
    x = torch.randn(2, WIDTH)
    model(x)
    host(x)
    torch.testing.assert_close(seen[1], seen[0])


class Unread(Base):
    """Something of the module that no forward reads: another method may, or code that is not there yet."""

    def __init__(self, kind: str, entries: int) -> None:
        super().__init__()
        if kind == "parameter":
            self.gain = nn.Parameter(torch.ones(entries))
        else:
            self.register_buffer("gain", torch.ones(entries))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    ("kind", "entries", "stays"),
    [("parameter", HIDDEN, True), ("parameter", 1, True), ("buffer", HIDDEN, True), ("buffer", 1, False)],
)
def test_what_no_run_read_keeps_units_in_place(kind: str, entries: int, stays: bool) -> None:
    """A lone number that nobody reads, such as a counter, holds no units."""
    torch.manual_seed(0)
    reason = compiled(Unread(kind, entries)).sparsify.program.choices[0].in_place
    assert ("'gain' was not read by the trace" in reason) == stays
    assert bool(reason) == stays


def test_a_forward_that_cannot_be_observed_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.passes import prove_units

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no meta form")

    monkeypatch.setattr(prove_units, "observe", broken)
    host = compiled(build(Plain))
    assert "could not be observed (RuntimeError: no meta form)" in host.sparsify.program.choices[0].in_place


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "BERT (classifier)", "ViT", "T5 (gated)", "Phi-3"])
def test_feed_forward_structures_of_known_families_are_proven(family: str) -> None:
    model = tiny.build(family)
    inputs = tiny.inputs_of(model, family)
    host = sparsify.compile(model, Plan([S2FT(fraction=0.2, budget="structure")]), example=inputs, progress=False)
    blocks = [
        c
        for c in host.sparsify.program.choices
        if "layer" in c.structure or ".h." in c.structure or "block" in c.structure
    ]
    for choice in blocks:
        structure = next(s for s in host.sparsify.program.structures if s.name == choice.structure)
        assert bool(choice.in_place) == (structure.kind == "attention"), choice
    assert any(not c.in_place for c in blocks)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_what_the_model_shows_is_the_bases(family: str) -> None:
    """Attention maps, hidden states and caches, and a cache that the base filled."""
    model = tiny.build(family)
    model.set_attn_implementation("eager")
    host = tiny.lower(copy.deepcopy(model), S2FT(fraction=0.2, producer_fraction=0.2, budget="structure"))
    ids = tiny.tokens()
    with torch.no_grad():
        options = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
        base, ours = model(input_ids=ids, **options), host(input_ids=ids, **options)
        for name in ("attentions", "hidden_states"):
            for a, b in zip(base[name], ours[name], strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        prefix = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        want = model(input_ids=ids[:, 5:], past_key_values=copy.deepcopy(prefix)).logits
        got = host(input_ids=ids[:, 5:], past_key_values=copy.deepcopy(prefix)).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compile_leaves_random_generators_and_the_model_alone() -> None:
    import random

    model = build(AuxiliaryHead)
    example = torch.randn(3, WIDTH)
    before, state, python = tiny.snapshot(model), torch.get_rng_state(), random.getstate()
    attributes = {n: dict(m.__dict__) for n, m in model.named_modules()}
    sparsify.compile(model, Plan([S2FT(structure="ffn", units=5)]), example=(example,), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    tiny.assert_same(tiny.snapshot(model), before)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()
    assert model.training


class Allocating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        units = torch.relu(self.up(x))
        kept = [[] for _ in range(5000)]  # enough for the collector to begin
        out = self.down(units)
        del kept
        return x + out


def test_what_the_garbage_collector_calls_is_no_path_of_the_model() -> None:
    count = 0

    def callback(phase: str, _info: dict[str, int]) -> None:
        nonlocal count
        if phase == "never":
            count = -1
        count += 1

    gc.callbacks.append(callback)
    try:
        host = tiny.lower(Allocating(), S2FT(structure="ffn", units=3), example=torch.randn(2, 12))
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(callback)
    assert count > 0
    (choice,) = host.sparsify.program.choices
    assert not choice.in_place
