"""The memory of traces that other tests run on: what is alike gets one trace, whatever a forward can read tells models apart."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny
import torch
import zoo
from quick_export import quickly
from torch import nn
from torch.fx import proxy
from trace_cache import USERS, TraceCache, Unalike, key_of

EXAMPLE = (torch.randn(3, 12),)


def key(model: nn.Module, example: tuple[torch.Tensor, ...] = EXAMPLE, training: bool = False) -> object:
    return key_of(model, example, {}, training)


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = tiny.Mlp().eval()
    change(model)
    return model


def test_models_that_are_built_alike_share_a_trace_and_not_a_graph() -> None:
    cache = TraceCache()
    first, second = cache(tiny.Mlp().eval(), EXAMPLE, {}), cache(tiny.Mlp().eval(), (torch.ones(3, 12),), {})
    assert (cache.hits, cache.misses) == (1, 1)
    before = str(second.graph)
    for node in list(first.graph.nodes)[::-1]:
        if node.op == "call_function" and not node.users:
            first.graph.erase_node(node)
    first.graph_module.graph.output(())
    assert str(second.graph) == before
    assert str(cache(tiny.Mlp().eval(), EXAMPLE, {}).graph) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.double(),
        lambda m: setattr(m, "gain", 2.0),
        lambda m: setattr(m.layers[1]["up"], "weight", m.layers[0]["up"].weight),
        lambda m: m.layers[0]["up"].requires_grad_(False),
        lambda m: m.register_buffer("more", torch.zeros(1)),
        lambda m: m.layers.append(copy.deepcopy(m.layers[0])),
        lambda m: setattr(m.layers[0]["up"], "bias", None),
    ],
)
def test_what_a_forward_can_read_tells_models_apart(change: Callable[[nn.Module], object]) -> None:
    assert key(tiny.Mlp().eval()) == key(tiny.Mlp().eval())
    assert key(changed(change)) != key(tiny.Mlp().eval())


def test_the_mode_is_the_trace_s_and_not_the_model_s() -> None:
    assert key(changed(lambda m: m.train())) == key(tiny.Mlp().eval())
    assert key(tiny.Mlp().eval(), training=True) != key(tiny.Mlp().eval())


def test_a_class_with_another_method_and_another_example_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = key(tiny.Mlp().eval())
    assert key(tiny.Mlp().eval(), (torch.randn(4, 12),)) != plain
    assert key(tiny.Mlp().eval(), (torch.randn(3, 12, dtype=torch.float64),)) != plain
    assert key(tiny.Mlp().eval(), training=True) != plain
    monkeypatch.setattr(tiny.Mlp, "forward", lambda self, x: x)
    assert key(tiny.Mlp().eval()) != plain


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "forward", lambda x: x),
        lambda m: setattr(m, "table", torch.ones(2)),
        lambda m: setattr(m, "helper", object()),
    ],
)
def test_what_a_key_cannot_hold_is_traced_anew(change: Callable[[nn.Module], object]) -> None:
    with pytest.raises(Unalike):
        key(changed(change))


# T5 and the one with relu_ are exported a second time, for what they write in place
@pytest.mark.parametrize("name", ["Llama", "T5", "in place"])
def test_a_quick_trace_is_the_trace_of_users(name: str) -> None:
    """The same program but for the stacks, and it can be called; nothing of torch stays replaced."""
    model: nn.Module = nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 5)).eval()
    args, kwargs = EXAMPLE, {}
    if name != "in place":
        model, (args, kwargs) = zoo.build(tiny.BY_NAME[name], tiny.BY_NAME[name].implementations[-1])
    untouched = torch.fx.GraphModule.recompile, torch.export.export, proxy.CapturedTraceback
    quick, plain = quickly(USERS[0])(model, args, kwargs), USERS[0](model, args, kwargs)
    assert untouched == (torch.fx.GraphModule.recompile, torch.export.export, proxy.CapturedTraceback)
    assert str(quick.graph) == str(plain.graph)
    assert quick.graph_module.code == plain.graph_module.code
    assert quick.graph_signature == plain.graph_signature
    stacked = [n for n in plain.graph.nodes if n.op == "call_function"]
    for mine, its in zip([n for n in quick.graph.nodes if n.op == "call_function"], stacked, strict=True):
        assert set(its.meta) - set(mine.meta) <= {"stack_trace"}
    assert any(n.stack_trace for n in stacked)
    assert not any(n.stack_trace for n in quick.graph.nodes)
    with torch.no_grad():
        results = [tiny.output_of(p.module(check_guards=False)(*args, **kwargs)) for p in (quick, plain)]
    assert torch.equal(*results)
