"""Copies of module trees that `copy.deepcopy` refuses: the trace, the host and `plain()` of models that hold anything."""

from __future__ import annotations

import functools
import logging
import socket
import tempfile
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

import sparsify
from sparsify import S2FT, CaptureError, LoRA, PaCA, Plan, Prune, Quantize, RoSA
from sparsify.model.module_tree import copy_module_tree

pytestmark = pytest.mark.fresh_trace

PLANS = [
    Plan([LoRA(rank=2)]),
    Plan([S2FT(fraction=0.3)]),
    Plan([PaCA(rank=3)]),
    Plan([RoSA(rank=2, density=0.1, mask="random")]),
    Plan([Quantize()]),
    Plan([Prune(sparsity=0.5, method="magnitude")]),
]
RULES = [type(plan.rules[0]).__name__ for plan in PLANS]


class Keeps(nn.Module):
    """Two linears; what `hold` returns is kept on the module."""

    def __init__(self, hold=lambda: None) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(12, 20), nn.Linear(20, 12), None
        self.held = hold()

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.relu(self.up(x))  # for a plot, an auxiliary loss, a probe
        return self.down(self.last)


def running_generator():
    generator = (i for i in range(3))
    next(generator)
    return generator


def attached() -> Tensor:
    return torch.ones(3, requires_grad=True) * 2


class Refuses:
    """An object that cannot be copied at all."""

    def __reduce_ex__(self, protocol):
        raise TypeError("never")


HOLDINGS = {
    "activation": attached,
    "activations in containers": lambda: {"a": [attached(), (attached(), {"b": attached()})]},
    "activation in an object": lambda: types.SimpleNamespace(value=attached()),
    "lock": threading.Lock,
    "rlock": threading.RLock,
    "event": threading.Event,
    "condition": threading.Condition,
    "thread-local": threading.local,
    "lock in a list": lambda: [threading.Lock()],
    "queue": Queue,
    "pool": lambda: ThreadPoolExecutor(1),
    "generator": running_generator,
    "file": tempfile.TemporaryFile,
    "socket": socket.socket,
    "logger": lambda: logging.getLogger("a model's own"),
    "lambda": lambda: lambda x: x,
    "data loader": lambda: DataLoader(TensorDataset(torch.ones(3))),
    "iterator of a data loader": lambda: iter(DataLoader(TensorDataset(torch.ones(3)))),
    "torch generator": torch.Generator,
    "module of Python": lambda: threading,
    "weak reference": lambda: weakref.ref(Keeps),
    "mapping proxy": lambda: types.MappingProxyType({"a": 1}),
    "object that refuses": Refuses,
    "nothing": lambda: None,
}


@pytest.mark.parametrize("name", HOLDINGS)
def test_whatever_a_model_holds_it_compiles_trains_and_turns_plain(name: str):
    model, x = Keeps(HOLDINGS[name]), torch.randn(3, 12)
    want = model(x)  # which stores an activation
    held = model.held
    for plan in (PLANS[0], PLANS[5]):
        host = sparsify.compile(model, plan, example=(x,), progress=False)
        assert model.held is held
        host(x).sum().backward()
        plain = host.sparsify.plain()
        torch.testing.assert_close(plain(x), host(x))
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("plan", PLANS, ids=RULES)
def test_every_rule_after_a_forward_and_plain_after_training(plan: Plan):
    model, x = Keeps(threading.Lock), torch.randn(3, 12)
    model(x)
    stored = model.last
    host = sparsify.compile(model, plan, example=(x,), progress=False)
    y = host(x)
    if y.requires_grad:
        y.sum().backward()
    torch.testing.assert_close(host.sparsify.plain()(x), host(x), rtol=1e-4, atol=1e-4)
    assert model.last is stored
    assert stored.grad_fn is not None


def test_stored_activations_lose_their_history_and_share_nothing():
    model = Keeps()
    model(torch.randn(3, 12))
    twin = copy_module_tree(model)
    assert twin.last.grad_fn is None
    assert torch.equal(twin.last, model.last)
    assert twin.last.data_ptr() != model.last.data_ptr()
    assert copy_module_tree(model, tensors="shared").last is model.last


def test_shared_and_tied_parts_stay_shared_and_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.again, self.listed = self.a, [self.a, self]
            self.parent = weakref.ref(self)
            self.view = self.a.bias.detach()[:2]

    model = Tied()
    twin = copy_module_tree(model)
    assert twin.again is twin.a is twin.listed[0]
    assert twin.listed[1] is twin is twin.parent()
    assert twin.b.weight is twin.a.weight is not model.a.weight
    assert list(twin.state_dict()) == list(model.state_dict())
    memo = {id(p): p for p in model.parameters()}
    assert copy_module_tree(model, memo).b.weight is model.a.weight


def test_what_is_bound_to_the_tree_is_bound_to_the_copy():
    """Forwards that a tool replaced, hooks, partial functions, cached methods: none calls back into the original."""

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.method = self.scaled
            self.partial = functools.partial(self.scaled, factor=3)
            self.cached = functools.lru_cache(self.scale)
            inner = self.linear
            self.closure = lambda x: inner(x)
            self.default = lambda x, layer=inner: layer(x)
            self.linear.register_forward_hook(lambda module, args, out: out + 0 * self.linear.bias)
            self.register_load_state_dict_pre_hook(lambda *args: None)

        def scaled(self, x: Tensor, factor: float = 2.0) -> Tensor:
            return factor * self.linear(x)

        def scale(self, key: int) -> Tensor:
            return self.linear.bias * key

        def forward(self, x: Tensor) -> Tensor:
            return self.method(x) + self.partial(x) + self.closure(x) + self.default(x) + self.cached(2)

    model, x = Bound(), torch.randn(2, 4)
    for tensors in ("copied", "shared"):
        twin = copy_module_tree(model, tensors=tensors)
        for module in (twin, twin.linear):
            assert all(getattr(h, "__self__", None) is not model for h in module._forward_hooks.values())
        twin.linear.weight = nn.Parameter(torch.zeros(4, 4))
        twin.linear.bias = nn.Parameter(torch.zeros(4))
        assert torch.count_nonzero(twin(x)) == 0, "something computed with the original's weights"
        assert torch.count_nonzero(model(x)) > 0
    host = sparsify.compile(Bound(), Plan([LoRA(rank=2)]), example=(x,), progress=False)
    host(x).sum().backward()
    assert host.linear.lora_B.grad.abs().sum() > 0
    assert host.method.__self__ is host


def test_objects_with_slots_defaults_and_protocols():
    class Slots:
        __slots__ = ("layer", "numbers")

        def __init__(self, layer: nn.Module) -> None:
            self.layer, self.numbers = layer, [1, 2]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.slots = Slots(self.layer)
            self.extra = nn.Parameter(torch.ones(2))
            self.hidden = [nn.Parameter(torch.ones(2)), torch.arange(3)]

        def __getstate__(self):
            return {k: v for k, v in self.__dict__.items() if k != "rebuilt"}

        def __setstate__(self, state):
            super().__setstate__(state)
            self.rebuilt = True

    model = Own()
    model.rebuilt = object()
    twin = copy_module_tree(model)
    assert twin.rebuilt is True
    assert twin.slots.layer is twin.layer is not model.layer
    assert twin.slots.numbers == [1, 2]
    assert twin.slots.numbers is not model.slots.numbers
    assert isinstance(twin.hidden[0], nn.Parameter)
    assert twin.hidden[0] is not model.hidden[0]


def test_a_torchscript_part_that_cannot_be_copied_is_named(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"part": torch.jit.script(nn.Linear(2, 2))}))
    monkeypatch.setattr(
        torch.jit.RecursiveScriptModule, "__deepcopy__", lambda self, memo: {}["its own reason"], raising=False
    )
    with pytest.raises(
        CaptureError, match=r"^1\.part is a RecursiveScriptModule, which cannot be copied \(KeyError: 'its"
    ):
        copy_module_tree(model)


# ------------------------------------------------------------------------------------------------ weights that are computed


def hooked_norm() -> nn.Module:
    return torch.nn.utils.weight_norm(nn.Linear(12, 20))


def hooked_spectral() -> nn.Module:
    return torch.nn.utils.spectral_norm(nn.Linear(12, 20))


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(12, 20), "weight", 0.5)


COMPUTED = {
    "weight_norm (hook)": hooked_norm,
    "spectral_norm (hook)": hooked_spectral,
    "pruned (hook)": pruned,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(12, 20)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(12, 20)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(12, 20)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("plan", PLANS, ids=RULES)
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_computed_in_forward_stay_as_they_are(kind: str, plan: Plan):
    """Such a linear is no plain one: it keeps its forward and its parameters, and the plain one beside it serves the plan."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(COMPUTED[kind](), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 16)).eval(),
        torch.randn(3, 12),
    )
    plan = Plan(plan.rules) if not isinstance(plan.rules[0], S2FT) else Plan([S2FT(fraction=0.3), LoRA(rank=1)])
    want = model(x)
    try:
        host = sparsify.compile(model, plan, example=(x,), progress=False)
    except sparsify.RefusedError as error:
        pytest.fail(str(error))
    assert set(dict(host[0].named_parameters())) == set(dict(model[0].named_parameters()))
    if not isinstance(plan.rules[0], Prune | Quantize):
        torch.testing.assert_close(host(x), want)
        loss = host(x).sum()
        loss.backward()
    torch.testing.assert_close(host.sparsify.plain()(x), host(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), want)
