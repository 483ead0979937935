"""`torch.compile` over a compiled host, without a backend of our own: one graph, the same losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from sparsify import S2FT

BOTH = S2FT(fraction=0.1, producer_fraction=0.1, budget="structure")


class Counter:
    """A backend that runs graphs eagerly and counts them, and the sparsify nodes in them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph

    def partials(self) -> int:
        packets = (torch.ops.sparsify.partial_linear, torch.ops.sparsify.partial_linear_at)
        ours = (*packets, *(packet.default for packet in packets))
        return sum(n.target in ours for g in self.graphs for n in g.graph.nodes)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(host: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in tiny.trainable(host)]


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Qwen2", "BERT (classifier)"])
def test_one_graph_with_every_partial_linear_in_it(name):
    host = tiny.lower(tiny.build(name), BOTH)
    inputs = tiny.inputs_of(host, name)
    expected = tiny.probe_loss(host(**inputs))
    expected.backward()
    eager = gradients(host)
    host.zero_grad()
    counter = Counter()
    compiled = torch.compile(host, backend=counter, fullgraph=True)
    loss = tiny.probe_loss(compiled(**inputs))
    loss.backward()
    assert len(counter.graphs) == 1
    assert counter.partials() == len(host.sparsify.program.slices)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(gradients(host), eager, strict=True):
        torch.testing.assert_close(a, b)


def test_training_loop_compiles_once_and_follows_eager():
    """AOTAutograd: forward and backward graphs; the optimizer changes the block in place without a recompilation."""
    losses = []
    for backend in (None, "aot_eager"):
        host = tiny.lower(tiny.llama(num_hidden_layers=1), BOTH)
        host.train()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = host if backend is None else torch.compile(host, backend=backend, fullgraph=True)
        optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
        found = []
        for _ in range(4):
            loss = tiny.probe_loss(step(tiny.tokens()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_trains_and_evaluates_as_eager_does():
    host = tiny.lower(tiny.llama(num_hidden_layers=1), BOTH)
    x = tiny.tokens()
    expected = tiny.probe_loss(host(x))
    expected.backward()
    eager = gradients(host)
    host.zero_grad()
    compiled = torch.compile(host, fullgraph=True)
    loss = tiny.probe_loss(compiled(x))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(gradients(host), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    tiny.disturb(host)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, host(x).logits, rtol=1e-4, atol=1e-4)


def test_inductor_on_one_feed_forward():
    host = tiny.lower(tiny.Mlp(), BOTH, example=torch.randn(3, 12))
    x = torch.randn(5, 12)
    expected = tiny.probe_loss(host(x))
    expected.backward()
    eager = gradients(host)
    host.zero_grad()
    compiled = torch.compile(host, fullgraph=True)
    loss = tiny.probe_loss(compiled(x))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(gradients(host), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    tiny.disturb(host)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), host(x))


def test_evaluation_sees_an_adapter_switch_and_in_place_changes():
    host = tiny.lower(tiny.llama(num_hidden_layers=1), BOTH)
    compiled = torch.compile(host, backend="aot_eager", fullgraph=True)
    x = tiny.tokens()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, host(x).logits)
        tiny.disturb(host)
        trained = host(x).logits
        torch.testing.assert_close(compiled(x).logits, trained)
        host.sparsify.set_adapter(None)
        assert not torch.allclose(host(x).logits, trained, atol=1e-3)
        torch.testing.assert_close(compiled(x).logits, host(x).logits)
        host.sparsify.set_adapter("default")
        torch.testing.assert_close(compiled(x).logits, trained)


def test_dynamic_shapes_need_no_new_graph():
    host = tiny.lower(tiny.Mlp(), BOTH, example=torch.randn(3, 12))
    counter = Counter()
    compiled = torch.compile(host, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 11):
        x = torch.randn(rows, 12)
        torch.testing.assert_close(compiled(x), host(x))
    assert len(counter.graphs) == 1


def test_compiling_in_place_keeps_the_class_and_the_handle():
    host = tiny.lower(tiny.llama(num_hidden_layers=1), BOTH)
    expected = host(tiny.tokens()).logits
    counter = Counter()
    host.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(host(tiny.tokens()).logits, expected)
    assert counter.partials() == len(host.sparsify.program.slices)
    assert type(host).__name__ == "LlamaForCausalLM"


def test_a_model_that_torch_compile_wraps_can_be_lowered():
    wrapped = torch.compile(tiny.llama(num_hidden_layers=1), backend="eager")
    host = tiny.lower(wrapped, BOTH)
    assert type(host).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(host(tiny.tokens()).logits, wrapped(tiny.tokens()).logits)


def test_autocast_inside_one_graph():
    host = tiny.lower(tiny.llama(num_hidden_layers=1), BOTH)
    x = tiny.tokens()
    compiled = torch.compile(host, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = host(x).logits, compiled(x).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_the_host_shows_the_operators(strict):
    host = tiny.lower(tiny.Mlp(), BOTH, example=torch.randn(3, 12))
    exported = torch.export.export(host, (torch.randn(3, 12),), strict=strict)
    count = sum(n.target is torch.ops.sparsify.partial_linear.default for n in exported.graph.nodes)
    assert count == len(host.sparsify.program.slices)
