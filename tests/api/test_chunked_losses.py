"""`sparsify.backend(loss_chunk=…)`: losses of compiled training steps in chunks, what is left alone, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from tiny import build, tokens
from torch import fx, nn
from torch.nn import functional as F

import sparsify
from sparsify import S2FT, LoRA, Plan
from sparsify.errors import PlanError


class Head(nn.Module):
    """A feature and a head of a large vocabulary, with whatever a family does to its logits."""

    def __init__(self, bend: Callable[[torch.Tensor], torch.Tensor] = lambda y: y) -> None:
        super().__init__()
        self.body, self.head, self.bend = nn.Linear(6, 8), nn.Linear(8, 300), bend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bend(self.head(torch.tanh(self.body(x))))


def compare(step: Callable[..., Any], module: nn.Module, *inputs: Any, inner: str = "aot_eager", **options: Any) -> Any:
    """The compiled step's loss and gradients are the eager step's. Returns the compiled result."""
    torch._dynamo.reset()
    module.zero_grad()
    made = step(*inputs)
    want = made.loss if hasattr(made, "loss") else made
    want.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    how = sparsify.backend(inner, loss_chunk=options.pop("loss_chunk", 5), **options)
    result = torch.compile(step, backend=how, fullgraph=True)(*inputs)
    got = result.loss if hasattr(result, "loss") else result
    got.backward()
    torch.testing.assert_close(got, want)
    for p, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    return result


def largest(step: Callable[..., Any], *inputs: Any) -> int:
    """Numbers of the largest tensor in a compiled step's forward and backward graphs."""
    sizes: list[int] = []

    def inner(gm: fx.GraphModule, given: Any) -> Callable[..., Any]:
        made = [n.meta["val"] for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        sizes.extend(t.numel() for t in made)
        return make_boxed_func(gm.forward)

    torch._dynamo.reset()
    torch.compile(step, backend=sparsify.backend(inner, loss_chunk=5), fullgraph=True)(*inputs).backward()
    return max(sizes)


TARGET = torch.arange(24).view(2, 12) * 7
X = torch.linspace(-1, 1, 2 * 12 * 6).view(2, 12, 6)
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "joined": lambda y: F.cross_entropy(y.view(-1, 300), TARGET.view(-1)),
    "shifted": lambda y: F.cross_entropy(y[:, :-1].flatten(0, 1), TARGET[:, 1:].flatten()),
    "from the end": lambda y: F.cross_entropy(y[..., 1:, :].reshape(-1, 300).float(), TARGET[:, :-1].reshape(-1)),
    "turned": lambda y: F.cross_entropy(y.transpose(1, 2), TARGET),
    "permuted": lambda y: F.cross_entropy(y.permute(0, 2, 1), TARGET, reduction="sum"),
    "by name": lambda y: F.cross_entropy(target=TARGET.view(-1), input=y.view(-1, 300), ignore_index=7),
    "a module": lambda y: nn.CrossEntropyLoss(ignore_index=14)(y.view(-1, 300), TARGET.view(-1)),
    "one sentence": lambda y: F.cross_entropy(y[0], TARGET[0]),
    "summed by hand": lambda y: F.cross_entropy(y.view(-1, 300), TARGET.view(-1), reduction="sum") / 24 + 1.0,
}
BENDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled": lambda y: y * 0.25,
    "number first": lambda y: 2.0 * y,
    "divided": lambda y: y / 8.0,
    "soft cap": lambda y: torch.tanh(y / 3.0) * 3.0,
    "soft cap, float": lambda y: (y / 3.0).tanh().mul(3.0).float() / 2,
}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_ways_to_write_a_loss(loss):
    module = Head()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(lambda x: LOSSES[loss](module(x)), module, X)
    assert largest(lambda x: LOSSES[loss](module(x)), X) < 11 * 300


@pytest.mark.parametrize("bend", list(BENDS))
def test_what_families_do_to_logits(bend):
    module = Head(BENDS[bend])
    compare(lambda x: LOSSES["shifted"](module(x)), module, X)
    assert largest(lambda x: LOSSES["shifted"](module(x)), X) < 11 * 300


LEFT_ALONE: dict[str, tuple[Callable[[nn.Module, torch.Tensor], torch.Tensor], str]] = {
    "every token": (lambda m, x: F.cross_entropy(m(x).view(-1, 300), TARGET.view(-1), reduction="none").sum(), "'none'"),
    "smoothed": (lambda m, x: F.cross_entropy(m(x).view(-1, 300), TARGET.view(-1), label_smoothing=0.1), "label_smoothing"),
    "weighted": (lambda m, x: F.cross_entropy(m(x).view(-1, 300), TARGET.view(-1), torch.ones(300)), "weight"),
    "probabilities": (lambda m, x: F.cross_entropy(m(x).view(-1, 300), torch.full((24, 300), 1 / 300)), "probabilities"),
    "read": (lambda m, x: (y := m(x)).logsumexp(-1).mean() + F.cross_entropy(y.view(-1, 300), TARGET.view(-1)), "also read"),
    "bent": (lambda m, x: F.cross_entropy(m(x).relu().view(-1, 300), TARGET.view(-1)), "neither a scaling"),
    "times a tensor": (lambda m, x: F.cross_entropy((m(x) * X.sum()).view(-1, 300), TARGET.view(-1)), "no number"),
    "times nothing": (lambda m, x: F.cross_entropy((m(x).tanh() * 0.0).view(-1, 300), TARGET.view(-1)), "nothing is left"),
    "floored": (
        lambda m, x: F.cross_entropy(torch.div(m(x), 0.1, rounding_mode="floor").view(-1, 300), TARGET.view(-1)),
        "no number",
    ),
    "fewer classes": (lambda m, x: F.cross_entropy(m(x)[..., :200].reshape(-1, 200), TARGET.view(-1)), "neither a scaling"),
    "classes of tokens": (lambda m, x: F.cross_entropy(m(x).reshape(-1, 150), TARGET.view(-1).repeat(2) % 150), "neither a"),
    "the second place": (lambda m, x: F.cross_entropy(m(x), TARGET[:, 0, None].expand(2, 300) % 12), "last dimension"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LEFT_ALONE))
def test_what_is_something_else_stays_and_says_why(name):
    step, words = LEFT_ALONE[name]
    module = Head()
    with pytest.warns(UserWarning, match=words):
        compare(lambda x: step(module, x), module, X)


def test_logits_that_are_returned_are_kept_or_nan():
    module = Head()

    def step(x: torch.Tensor) -> Any:
        y = module(x)
        return F.cross_entropy(y.view(-1, 300), TARGET.view(-1)), y

    with pytest.warns(UserWarning, match="returned_logits='nan'"):
        kept = torch.compile(step, backend=sparsify.backend("aot_eager", loss_chunk=5))(X)
    torch.testing.assert_close(kept[1], module(X))
    torch._dynamo.reset()
    run = torch.compile(step, backend=sparsify.backend("aot_eager", loss_chunk=5, returned_logits="nan"))
    loss, logits = run(X)
    torch.testing.assert_close(loss, step(X)[0])
    assert logits.shape == (2, 12, 300)
    assert bool(logits.isnan().all())
    assert logits.untyped_storage().nbytes() <= 8
    with torch.no_grad():  # evaluation wants its logits
        torch.testing.assert_close(run(X)[1], module(X))


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("Llama", S2FT(0.3)),
        pytest.param("Gemma2", LoRA(rank=2), marks=pytest.mark.slow),  # covered by "soft cap, float" above
        pytest.param("GPT-2", S2FT(0.3), marks=pytest.mark.slow),  # covered by Llama: the same loss
        pytest.param("Cohere", S2FT(0.3), marks=pytest.mark.slow),  # covered by "scaled" above
        pytest.param("Granite", S2FT(0.3), marks=pytest.mark.slow),  # covered by "divided" above
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_families_with_labels(family, rule):
    model = build(family)
    model.config.loss_type = "ForCausalLMLoss"  # else GPT-2 logs a warning, which breaks Dynamo's graph
    host = sparsify.compile(model, Plan([rule])).train()
    inputs = {"input_ids": tokens(), "labels": tokens()}
    found = compare(lambda: host(**inputs), host, returned_logits="nan", loss_chunk=3)
    assert bool(found.logits.isnan().all())


def test_a_head_that_trains_through_a_part_keeps_its_logits():
    host = sparsify.compile(build("Llama"), Plan([LoRA(rank=2, match="lm_head")])).train()
    inputs = {"input_ids": tokens(), "labels": tokens()}
    with pytest.warns(UserWarning, match="plain linear"):
        compare(lambda: host(**inputs).loss, host)


@pytest.mark.parametrize(
    "inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # covered by the first
def test_many_lengths_take_one_graph(inner):
    module = Head()
    torch._dynamo.reset()
    run = torch.compile(
        lambda x, t: F.cross_entropy(module(x)[:, :-1].flatten(0, 1), t[:, 1:].flatten()),
        backend=sparsify.backend(inner, loss_chunk=5),
        dynamic=True,
        fullgraph=True,
    )
    for length in (12, 7, 9):
        module.zero_grad()
        run(X[:, :length], TARGET[:, :length]).backward()
        got = [p.grad.clone() for p in module.parameters()]  # type: ignore[union-attr]
        module.zero_grad()
        F.cross_entropy(module(X[:, :length])[:, :-1].flatten(0, 1), TARGET[:, 1:length].flatten()).backward()
        for p, g in zip(module.parameters(), got, strict=True):
            torch.testing.assert_close(g, p.grad)


def test_under_autocast_the_gradients_are_as_near_as_torch_s():
    module = Head()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(module(x).float().view(-1, 300), TARGET.view(-1))

    exact = torch.autograd.grad(F.cross_entropy(module(X).view(-1, 300), TARGET.view(-1)), list(module.parameters()))
    ours = torch.compile(step, backend=sparsify.backend("aot_eager", loss_chunk=5), fullgraph=True)
    near = [torch.autograd.grad(run(X), list(module.parameters())) for run in (step, ours)]
    for want, torchs, found in zip(exact, *near, strict=True):
        scale = float(want.norm())
        assert float((found - want).norm()) <= 1.5 * float((torchs - want).norm()) + 1e-3 * scale


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_chunk": 0}, "positive"),
        ({"loss_chunk": True}, "positive"),
        ({"loss_chunk": 2.5}, "positive"),
        ({"returned_logits": "drop"}, "'keep' or 'nan'"),
    ],
)
def test_words_that_cannot_be_used(options, words):
    with pytest.raises(PlanError, match=words):
        sparsify.backend(**options)
