"""A trace leaves the original as it was, whatever its forward writes to, and works whether or not the model ran before."""

from __future__ import annotations

import functools
import random
import threading
from collections import OrderedDict, deque
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import sparsify
from sparsify import S2FT, CaptureError, LoRA, Plan
from sparsify.lowering.deploy.exported import export_for_inference
from sparsify.program.capture import capture

pytestmark = pytest.mark.fresh_trace

TABLE: dict[int, Tensor] = {}


class Makers(OrderedDict[str, type[nn.Module]]):
    """A module at every `[]`, as transformers' ACT2FN."""

    made = 0

    def __getitem__(self, name: str) -> nn.Module:  # type: ignore[override]
        Makers.made += 1
        return super().__getitem__(name)()


MAKERS = Makers(relu=nn.ReLU, silu=nn.SiLU)
LATEST: Tensor | None = None


@functools.lru_cache(maxsize=8)
def positions(count: int) -> Tensor:
    return torch.arange(count)[:, None] / 10


@functools.cache
def nested_positions(count: int) -> dict[str, list[Tensor]]:
    return {"all": [torch.arange(count)[:, None] / 10]}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.prepare()

    def prepare(self) -> None: ...

    def shift(self, count: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x + self.shift(x.shape[1]))))


class LazyBuffer(Base):
    def prepare(self) -> None:
        self.register_buffer("pos", None, persistent=False)

    def shift(self, count: int) -> Tensor:
        if self.pos is None or self.pos.shape[0] < count:
            self.register_buffer("pos", torch.arange(count)[:, None] / 10, persistent=False)
        return self.pos[:count]


class NewBuffer(Base):
    def shift(self, count: int) -> Tensor:
        if not hasattr(self, "pos"):
            self.register_buffer("pos", torch.arange(count)[:, None] / 10)
        return self.pos


class Attribute(Base):
    def shift(self, count: int) -> Tensor:
        self.last = torch.arange(count)[:, None] / 10
        self.calls = getattr(self, "calls", 0) + 1
        return self.last


class Lists(Base):
    def prepare(self) -> None:
        self.kept, self.recent, self.by_size, self.names = [], deque(maxlen=2), {}, set()

    def shift(self, count: int) -> Tensor:
        value = torch.arange(count)[:, None] / 10
        self.kept.append(value)
        self.recent.append(value)
        self.by_size.setdefault(count, {})["value"] = value
        self.names.add(count)
        return value


class State:
    def __init__(self) -> None:
        self.lock, self.value = threading.Lock(), None


class PlainObject(Base):
    def prepare(self) -> None:
        self.state = State()

    def shift(self, count: int) -> Tensor:
        with self.state.lock:
            self.state.value = torch.arange(count)[:, None] / 10
        return self.state.value


class SwappedModule(Base):
    def shift(self, count: int) -> Tensor:
        self.extra = nn.Identity()
        self.up.forward = self.up.forward  # as tools that wrap a forward do
        return torch.arange(count)[:, None] / 10


class CachedFunction(Base):
    def shift(self, count: int) -> Tensor:
        return positions(count)


class CachedNested(Base):
    def shift(self, count: int) -> Tensor:
        return nested_positions(count)["all"][0]


class CachedMethod(Base):
    def prepare(self) -> None:
        self.table = functools.lru_cache(self.make)

    def make(self, count: int) -> Tensor:
        return torch.arange(count)[:, None] / 10

    def shift(self, count: int) -> Tensor:
        return self.table(count)


class CachedProperty(Base):
    @functools.cached_property
    def table(self) -> Tensor:
        return torch.arange(5)[:, None] / 10

    def shift(self, count: int) -> Tensor:
        return self.table[:count]


class ClassAttribute(Base):
    table: Tensor | None = None
    tables: ClassVar[dict[int, Tensor]] = {}

    def shift(self, count: int) -> Tensor:
        if type(self).table is None:
            type(self).table = self.tables[count] = torch.arange(count)[:, None] / 10
        return type(self).table


class GlobalTable(Base):
    def shift(self, count: int) -> Tensor:
        global LATEST
        if count not in TABLE:
            TABLE[count] = LATEST = torch.arange(count)[:, None] / 10
        return TABLE[count]


class Hooked(Base):
    """A hook that keeps what it sees in a list of its closure, and one that is a method."""

    def prepare(self) -> None:
        seen: list[Tensor] = []
        self.up.register_forward_hook(lambda module, args, out: seen.append(out))
        self.down.register_forward_pre_hook(self.note)
        self.inner = None
        self.seen = lambda: seen

    def note(self, module: nn.Module, args: tuple) -> None:
        self.inner = args[0]

    def shift(self, count: int) -> Tensor:
        return torch.arange(count)[:, None] / 10


WRITERS = [
    LazyBuffer,
    NewBuffer,
    Attribute,
    Lists,
    PlainObject,
    SwappedModule,
    CachedFunction,
    CachedNested,
    CachedMethod,
    CachedProperty,
    ClassAttribute,
    GlobalTable,
    Hooked,
]


@pytest.fixture(autouse=True)
def _empty_tables():
    yield
    positions.cache_clear()
    nested_positions.cache_clear()
    TABLE.clear()
    ClassAttribute.table = None
    ClassAttribute.tables.clear()


def all_values(model: nn.Module) -> list:
    """Everything that a model's forward may have left a tensor in."""
    values: list = [TABLE, LATEST, ClassAttribute.table, ClassAttribute.tables]
    for module in model.modules():
        values += [*module.__dict__.values(), *module._buffers.values(), *module._parameters.values()]
    values += [getattr(model, "seen", list)(), getattr(getattr(model, "state", None), "value", None)]
    return values


def tensors(values) -> list[Tensor]:
    found, pending = [], list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | deque):
            pending += value
    return found


@pytest.mark.parametrize("ran", [False, True], ids=["new", "ran before"])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_forward_sets_stays_out_of_the_original(kind: type[Base], ran: bool):
    x = torch.randn(2, 5, 16)
    model, twin = kind(), kind()
    twin.load_state_dict(model.state_dict())
    if ran:
        model(x)
    keys, buffers = set(model.__dict__), dict(model.named_buffers())
    held = {k: len(v) for k, v in model.__dict__.items() if isinstance(v, list | dict | set | deque)}
    host = sparsify.compile(model, Plan([S2FT(fraction=0.3)]), example=(x,), progress=False)
    assert set(model.__dict__) == keys
    assert {k: len(v) for k, v in model.__dict__.items() if k in held} == held
    assert all(a is b for a, b in zip(dict(model.named_buffers()).values(), buffers.values(), strict=True))
    assert not any(isinstance(t, FakeTensor) for t in tensors(all_values(model)))
    want = twin(x)
    assert not isinstance(want, FakeTensor)
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(host(x), want)
    torch.testing.assert_close(host.sparsify.program(x), want)
    assert [s.kind for s in host.sparsify.program.structures] == ["ffn"]


def test_a_failed_trace_leaves_nothing_either():
    class Fails(Lists):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum() > 0 else -y

    model = Fails()
    with pytest.raises(CaptureError):
        capture(model, torch.randn(2, 5, 16))
    assert model.kept == []
    assert model.by_size == {}
    assert not model.recent


def test_a_table_that_makes_what_it_is_asked_for_is_not_asked():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    host = sparsify.compile(Wrapped(model), Plan([S2FT(units=2)]), example=torch.randn(2, 4), progress=False)
    assert Makers.made == 0
    assert dict.__getitem__(MAKERS, "relu") is nn.ReLU
    assert host.sparsify.program.structures


class Wrapped(nn.Module):
    """Its file is looked through for what a forward might leave there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_export_for_inference_traces_a_copy_too():
    model = Lists().eval()
    export_for_inference(model, (torch.randn(2, 5, 16),))
    assert model.kept == []


def test_buffers_that_count_are_not_counted_by_compile_or_the_program():
    class Counts(Base):
        def prepare(self) -> None:
            self.register_buffer("count", torch.zeros(()))
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.down(torch.relu(self.up(self.norm(x))))

    model = Counts().train()
    x = torch.randn(2, 5, 16)
    host = sparsify.compile(model, Plan([LoRA(rank=2)]), example=(x,), progress=False)
    host.sparsify.program(x)
    assert model.count == 0
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(5))


def test_random_numbers_flags_and_gradients_stay():
    model = tiny.build("BERT (classifier)").train()
    model.bert.encoder.layer[0].eval()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    kept = model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    sparsify.compile(model, Plan([S2FT(fraction=0.3)]), progress=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    assert model.classifier.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))


def test_numbers_drawn_in_forward_are_given_back():
    class Draws(Base):
        def shift(self, count: int) -> Tensor:
            return torch.zeros(count, 1) + random.random() * 0 + float(np.random.rand()) * 0 + torch.rand(count, 1) * 0

    model, x = Draws(), torch.zeros(2, 5, 16)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), np.random.get_state()[2]
    capture(model, x)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1], np.random.get_state()[2]
    assert torch.equal(after[0], states[0])
    assert after[1] == states[1]
    assert (after[2] == states[2]).all()
    assert after[3] == states[3]


def test_a_model_that_an_earlier_trace_broke_is_refused_by_name():
    model, x = LazyBuffer(), torch.randn(2, 5, 16)
    torch.export.export(model.eval(), (x,), strict=False)
    assert isinstance(model.pos, FakeTensor)
    with pytest.raises(CaptureError, match=r"^pos holds a fake tensor, which an earlier torch\.export"):
        capture(model, x)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4)), "0.weight"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LazyLinear(4)), "2.weight"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.LazyBatchNorm1d()), "1.weight"),
    ],
)
def test_lazy_modules_are_told_to_run_once(make, name):
    model, x = make(), torch.randn(3, 4)
    with pytest.raises(
        CaptureError, match=rf"^{name} has no shape yet \(a lazy module\): call the model once with a real"
    ):
        sparsify.compile(model, Plan([LoRA(rank=2)]), example=(x,), progress=False)
    model(x)
    sparsify.compile(model, Plan([LoRA(rank=2)]), example=(x,), progress=False)


def test_models_without_parameters_are_refused():
    with pytest.raises(CaptureError, match=r"^ReLU has no parameters: there is nothing to train"):
        sparsify.compile(nn.ReLU(), Plan([LoRA(rank=2)]), example=(torch.randn(3),), progress=False)
