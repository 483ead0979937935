"""The choice by measurement: steadiness, records made under load, and what a layer becomes for given times. Clocks are fake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import sparsify
from sparsify import CpuOptions, Plan, Prune
from sparsify.kernels.cpu import build, dispatch, tune
from sparsify.kernels.cpu.formats import pack
from sparsify.kernels.cpu.tune import Timing
from sparsify.lowering import fused_modules
from sparsify.lowering.cpu import fuse as fuse_cpu
from sparsify.lowering.cpu import lower as cpu
from sparsify.lowering.cpu import whole_model
from sparsify.lowering.cpu.lower import lower_model, numbers_of_tokens
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear
from sparsify.lowering.cpu.sparse_linear import SparseLinear


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "tuned", None)
    monkeypatch.setattr(tune, "checked", set())
    monkeypatch.setattr(tune, "PRESENCE", 0.0)  # clocks are fake, but other processes are not


def fake_clock(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, Iterator[float]]) -> dict[str, int]:
    """`seconds_of(call)` takes the next time of the contestant that `call` returns; counts the calls."""
    count = dict.fromkeys(seconds, 0)

    def seconds_of(call: Callable[[], Any]) -> float:
        name = call()
        count[name] += 1
        return next(seconds[name])

    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    return count


def constantly(value: float) -> Iterator[float]:
    while True:
        yield value


def forget() -> None:
    """As a new process would."""
    tune.tuned = None
    tune.checked.clear()


CALLS = {"a": lambda: "a", "b": lambda: "b"}


def test_contestants_take_turns_and_the_smallest_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    times = {"a": iter([9.0, 9, 2, 1, 1, 5] + [3.0] * 99), "b": constantly(4.0)}

    def seconds_of(call: Callable[[], Any]) -> float:
        order.append(call())
        return next(times[order[-1]])

    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    timing = tune.time_in_turn(CALLS, budget=0.0)
    assert timing == Timing({"a": 1.0, "b": 4.0}, True)
    assert order[4:10] == ["a", "b"] * 3


def test_unsteady_times_are_measured_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    lonely = iter([1.0] + [2.0] * 200)  # the smallest time was reached once only
    count = fake_clock(monkeypatch, {"a": lonely, "b": constantly(4.0)})
    assert not tune.time_in_turn(CALLS, budget=9.0).steady  # ends by rounds: no load can end it sooner
    unsteady = count["a"]
    count = fake_clock(monkeypatch, {"a": constantly(1.0), "b": constantly(4.0)})
    assert tune.time_in_turn(CALLS, budget=0.0).steady
    assert count["a"] == 5 < unsteady


def test_a_record_is_kept_and_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch, {"a": constantly(1.0), "b": constantly(4.0)})
    first = tune.measured("key", CALLS, budget=0.0)
    forget()
    count = fake_clock(monkeypatch, {"a": constantly(1.5), "b": constantly(3.9)})
    assert tune.measured("key", CALLS, budget=0.0) == first  # slower than recorded: loaded now, the record stands
    assert count == {"a": 3, "b": 3}
    assert tune.measured("key", CALLS, budget=0.0) == first
    assert count == {"a": 3, "b": 3}


@pytest.mark.parametrize("recorded", [(3.0, 4.0), (1.0, 4.0)])
def test_a_record_made_under_load_is_replaced(monkeypatch: pytest.MonkeyPatch, recorded: tuple[float, float]) -> None:
    fake_clock(monkeypatch, {"a": constantly(recorded[0]), "b": constantly(recorded[1])})
    tune.measured("key", CALLS, budget=0.0)
    forget()
    fake_clock(monkeypatch, {"a": constantly(1.0), "b": constantly(0.5)})
    assert tune.measured("key", CALLS, budget=0.0).seconds == {"a": 1.0, "b": 0.5}
    forget()
    assert tune.recorded("key") == Timing({"a": 1.0, "b": 0.5}, True)


def test_an_unsteady_record_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch, {"a": iter([1.0] + [2.0] * 200), "b": constantly(4.0)})
    assert not tune.measured("key", CALLS, budget=0.001).steady
    forget()
    fake_clock(monkeypatch, {"a": constantly(1.8), "b": constantly(3.0)})
    assert tune.measured("key", CALLS, budget=0.0) == Timing({"a": 1.8, "b": 3.0}, True)


@pytest.mark.parametrize(
    "damage", ["not json", '{"key": 3}', '{"key": {"seconds": {"a": "x"}}}', '{"key": {"seconds": {}}}']
)
def test_a_damaged_record_is_no_record(damage: str, tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text(damage)
    forget()
    assert tune.recorded("key") is None


def sparse_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 200), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(200, 96) < 0.25)  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("kernel", "torch_dense", "onednn", "becomes", "reason"),
    [
        (1.0, 2.0, 1.5, SparseLinear, None),
        (1.0, 0.99, 1.5, SparseLinear, None),  # within what repeats differ by
        (1.0, 0.5, 0.9, nn.Linear, "torch's dense product is 2.00 × as fast at 1 tokens"),
        (1.0, 0.5, 0.3, PrepackedLinear, "torch's dense product is 2.00 × as fast at 1 tokens"),
        (1.0, 2.0, 0.5, PrepackedLinear, "oneDNN's dense product with a blocked weight is 2.00 × as fast"),
    ],
)
def test_what_a_layer_becomes(
    monkeypatch: pytest.MonkeyPatch, kernel: float, torch_dense: float, onednn: float, becomes: type, reason: str | None
) -> None:
    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    times = {"torch": torch_dense, "onednn": onednn}

    def measured(key: str, calls: Mapping[str, Any], budget: float = 0.25, cold: bool = False) -> Timing:
        return Timing({name: times.get(name, kernel) for name in calls}, True)

    for module in (dispatch, cpu, fuse_cpu):
        monkeypatch.setattr(module, "measured", measured)
    model, x = sparse_model(), torch.randn(3, 96)
    expected = model(x)
    report = lower_model(model, tokens=(1,))
    assert type(model[0]) is becomes
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (reason or "1 linears packed") in str(report)
    assert len(report.prepacked) == (becomes is PrepackedLinear)


def test_prepacked_linears_are_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    import copy
    import pickle

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    linear = nn.Linear(65, 37)
    layer = PrepackedLinear(linear.weight, linear.bias)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), fullgraph=True, dynamic=True, backend="aot_eager")
    duplicate, stored = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    with torch.inference_mode():
        for shape in ((65,), (1, 65), (2, 3, 65), (0, 65), (4, 70, 65)):
            x = torch.randn(shape)
            for other in (layer, duplicate, stored):
                torch.testing.assert_close(other(x), linear(x), rtol=1e-5, atol=1e-6)
        x = torch.randn(3, 65)
        torch.testing.assert_close(compiled(x), linear(x).relu(), rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 65, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(2, 65), rtol=1e-4, atol=1e-5)
    for name, tensor in linear.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor)
    other = nn.Linear(65, 37)
    layer.load_state_dict(other.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(layer(x.detach()), other(x.detach()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(duplicate(x.detach()), linear(x.detach()), rtol=1e-5, atol=1e-6)


def test_more_tokens_than_were_measured_are_served_by_what_256_said() -> None:
    layer = SparseLinear(pack(torch.randn(8, 64)))
    if layer.kernels is None:
        pytest.skip("no compiler")
    key = dispatch.tune_key(layer.packed, layer.layer, layer.kernels.variant, 256, torch.get_num_threads(), False)
    tune.remember(key, {"seconds": {"decompress/48": 1.0, "stream/64": 2.0}, "steady": True})
    assert (dispatch.bucket(700), dispatch.bucket(5000)) == (1024, 4096)
    assert (layer.choice(700).kernel, layer.choice(700).measured) == ("decompress", None)
    own = dispatch.tune_key(layer.packed, layer.layer, layer.kernels.variant, 1024, torch.get_num_threads(), False)
    tune.remember(own, {"seconds": {"decompress/48": 2.0, "stream/64": 1.0}, "steady": True})
    layer.choices.clear()
    assert (layer.choice(700).kernel, layer.choice(700).measured) == ("stream", 1.0)
    assert layer.choice(3000).kernel == "stream"  # the nearest smaller number that was measured
    assert layer.choice(400).kernel == "decompress"
    assert dispatch.stand_ins(512) == (512, 256, 1024, 2048, 4096)
    assert dispatch.stand_ins(64) == (64,)


def test_products_of_16_bit_models_are_timed_with_their_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    plain = dispatch.run_module

    def spy(kernels: Any, name: str, layer: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.dtype)
        return plain(kernels, name, layer, x, *rest)

    layer = SparseLinear(pack(torch.randn(8, 64).bfloat16()))
    if layer.kernels is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(dispatch, "run_module", spy)

    def run_all(_: str, calls: Mapping[str, Callable[[], Any]], **__: Any) -> Timing:
        assert {call().dtype for call in calls.values()} == {torch.bfloat16}
        return Timing(dict.fromkeys(calls, 1.0), True)

    monkeypatch.setattr(dispatch, "measured", run_all)
    layer.choice(16, measure=True)
    assert set(seen) == {torch.bfloat16}


def test_pairs_serve_many_tokens_of_bf16_models_only() -> None:
    def names(isa: Any, value: str, tokens: int) -> set[str]:
        return {name for name, _ in dispatch.candidates(isa, value, tokens, True)}

    assert "pairs" in names("avx512bf16", "bf16", 2048)
    assert "pairs" not in names("avx512bf16", "bf16", 8)
    assert not {"pairs", "dot"} & (names("avx512bf16", "f32", 2048) | names("avx512vbmi2", "bf16", 2048))
    chosen = dispatch.Choice("pairs", 64, 1.0)
    assert dispatch.serves(chosen, torch.bfloat16, 2048) is chosen
    assert dispatch.serves(chosen, torch.float32, 2048).kernel == "stream"


def test_pairs_do_less_than_the_stream_at_any_sparsity() -> None:
    """The cost model follows the instructions: 1 - s² over two per weight, against 1 - s and against a dense product's half."""
    for sparsity, beats_dot in ((0.75, True), (0.5, True), (0.0, False)):
        torch.manual_seed(0)
        packed = pack((torch.randn(384, 384) * (torch.rand(384, 384) >= sparsity)).bfloat16())
        cost = {k: dispatch.predict(packed, "avx512bf16", k, 2048, 2) for k in ("pairs", "stream", "dot")}
        assert cost["pairs"] < cost["stream"]
        assert (cost["pairs"] < cost["dot"]) == beats_dot


def test_the_example_says_which_numbers_of_tokens_are_measured() -> None:
    seen = {"encoder": (2048,), "pooler": (16,)}
    assert numbers_of_tokens(None, seen, "encoder") == (1, 16, 64, 256, 2048)
    assert numbers_of_tokens(None, seen, "pooler") == (1, 16, 64, 256)
    assert numbers_of_tokens(None, seen, None) == (1, 16, 64, 256, 2048)
    assert numbers_of_tokens(None, {"encoder": (250, 4000)}, "encoder") == (1, 16, 64, 250, 4000)  # 250 stands for 256
    assert numbers_of_tokens((1, 7), seen, "encoder") == (1, 7)
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(24, 8))
    assert whole_model.example_tokens(sparsify.analyse(model, torch.randn(6, 50, 24))) == {"1": (300,)}


@pytest.fixture
def fast_layers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Every packed layer is measured to be fast; the sizes that were measured are kept."""
    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    keys: list[Any] = []

    def measured(key: str, calls: Mapping[str, Any], budget: float = 0.25, cold: bool = False) -> Timing:
        keys.append(key)
        return Timing({name: {"torch": 4.0, "onednn": 3.0, "apart": 4.0}.get(name, 1.0) for name in calls}, True)

    for module in (dispatch, cpu, fuse_cpu):
        monkeypatch.setattr(module, "measured", measured)
    return keys


@pytest.mark.parametrize("lowered", [0.5, 1.02, 2.0])
def test_a_whole_model_that_is_slower_becomes_dense_again(
    monkeypatch: pytest.MonkeyPatch, fast_layers: list[str], lowered: float
) -> None:
    model, x = sparse_model(), torch.randn(300, 96)
    expected, outputs = model(x), []

    def time_in_turn(calls: Mapping[str, Callable[[], Any]], budget: float) -> Timing:
        assert list(calls) == ["lowered", "dense"]
        outputs.extend(call() for call in calls.values())
        return Timing({"lowered": lowered, "dense": 1.0}, True)

    monkeypatch.setattr(whole_model, "time_in_turn", time_in_turn)
    host: Any = sparsify.compile(model, Plan([], target="cpu"), example=x, progress=False)
    for y in (*outputs, host(x), host.sparsify.program.run_example()):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert len(outputs) == 2
    assert any(key.split("/")[-2] == "512" for key in fast_layers if key.startswith("kernel/"))  # what the example has
    report, slower = str(host.sparsify.report), lowered > 1.03
    assert type(host[0]) is (PrepackedLinear if slower else SparseLinear)
    assert type(host[1]) is (nn.ReLU if slower else fused_modules.MovedActivation)
    speed = f"lowered {lowered * 1e3:.2f} ms, dense 1000.00 ms ({1 / lowered:.2f} ×)"
    assert f"whole      on the example (300 tokens): {speed}" in report
    assert ("its layers became dense again" in report) == slower
    assert ("the whole dense model is 2.00 × as fast" in report) == slower
    assert f"{0 if slower else 1} linears packed" in report
    assert ("sparsify.packed_linear(" in str(host.sparsify.program)) != slower


@pytest.mark.parametrize("lowered", [0.5, 2.0])
def test_without_an_example_the_dummy_one_is_timed(
    monkeypatch: pytest.MonkeyPatch, fast_layers: list[str], lowered: float
) -> None:
    monkeypatch.setattr(whole_model, "time_in_turn", lambda *_: Timing({"lowered": lowered, "dense": 1.0}, True))
    plan = Plan([Prune(sparsity=0.75, method="magnitude")], target="cpu")
    host: Any = sparsify.compile(tiny.llama(), plan, progress=False)
    report = host.sparsify.report
    assert f"tokens): lowered {lowered * 1e3:.2f} ms" in str(report).partition("on a dummy example (")[2]
    assert any(isinstance(module, SparseLinear) for module in host.modules()) == (lowered < 1)
    assert not any(
        key.split("/")[-2] not in ("1", "16", "64", "256") for key in fast_layers if key.startswith("kernel/")
    )
    # the user's word for what counts, no comparison, and a model that takes long
    for options in (CpuOptions(tokens=(1,)), CpuOptions(compare=False)):
        host = sparsify.compile(tiny.llama(), plan, progress=False, cpu=options)
        assert "whole  " not in str(host.sparsify.report)
    monkeypatch.setattr(whole_model, "PATIENCE", 0.0)
    host = sparsify.compile(tiny.llama(), plan, progress=False)
    assert any(isinstance(module, SparseLinear) for module in host.modules())
    assert "not timed on a dummy example: the dense model takes 0 s for it; give example=" in str(host.sparsify.report)


def test_the_whole_model_is_not_timed_where_it_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, fast_layers: list[str]
) -> None:
    def never(*_: Any) -> Timing:
        raise AssertionError("nothing to compare")

    monkeypatch.setattr(whole_model, "time_in_turn", never)
    model, x = sparse_model(), torch.randn(300, 96)
    for options in (CpuOptions(compare=False), CpuOptions(mode="small")):
        host: Any = sparsify.compile(model, Plan([], target="cpu"), example=x, cpu=options, progress=False)
        assert type(host[0]) is SparseLinear
        assert "whole  " not in str(host.sparsify.report)
    report = sparsify.compile(model, Plan([], target="cpu"), example=x, progress=False).sparsify.report  # type: ignore[operator, union-attr]
    assert "whole      not timed on the example: AssertionError: nothing to compare" in str(report)


def test_hooks_survive_the_way_to_packed_and_back(monkeypatch: pytest.MonkeyPatch, fast_layers: list[str]) -> None:
    monkeypatch.setattr(whole_model, "time_in_turn", lambda *_: Timing({"lowered": 2.0, "dense": 1.0}, True))
    model, x, calls = sparse_model(), torch.randn(300, 96), []
    program = sparsify.analyse(model, x)
    model[0].register_forward_hook(lambda *_: calls.append(1))
    report = lower_model(model, program, compare=True)
    assert report.lowered == ()
    assert report.whole is not None
    assert report.whole.slower
    model(x)
    assert calls == [1]


@pytest.mark.parametrize("own", ["stands still", "ticks", "runs"])
def test_no_measured_time_is_zero_and_a_coarse_thread_clock_is_not_believed(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kernels advance a thread's clock once a tick, so that a short call seemed to take no time."""
    now = 0.0

    def wall() -> float:
        nonlocal now
        now += 1e-6
        return now

    def thread() -> float:
        return {"stands still": 0.0, "ticks": now // 4e-3 * 4e-3, "runs": now / 2}[own]

    def call() -> None:
        nonlocal now
        now += 1e-3

    monkeypatch.setattr(tune.time, "perf_counter", wall)
    monkeypatch.setattr(tune.time, "thread_time", thread)
    tune.thread_clock_step.cache_clear()
    try:
        found = [tune.seconds_of(call) for _ in range(9)]
    finally:
        tune.thread_clock_step.cache_clear()
    assert all(1e-3 / 3 < s < 1.1e-3 for s in found), found
    assert all(s < 0.6e-3 for s in found) == (own == "runs")


def test_cold_weights_are_timed_apart_from_warm_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = [False]
    monkeypatch.setattr(tune, "empty_caches", lambda: empty.__setitem__(0, True))
    order: list[str] = []

    def seconds_of(call: Callable[[], Any]) -> float:
        order.append(call())
        spent = 3.0 if empty[0] else 1.0
        empty[0] = False  # the next call finds what this one read
        return spent

    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    warm = tune.measured("key", CALLS, budget=0.0)
    assert warm == Timing({"a": 1.0, "b": 1.0}, True)
    cold = tune.measured("key", CALLS, budget=0.0, cold=True)
    assert cold == Timing({"a": 3.0, "b": 3.0}, True)
    assert tune.recorded("key") == warm
    assert tune.recorded(tune.cold_key("key")) == cold
    forget()
    order.clear()
    assert tune.measured("key", CALLS, budget=0.0, cold=True) == cold  # checked with empty caches too, and kept
    assert order == ["a"] * 3 + ["b"] * 3


def test_caches_are_emptied_by_twice_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < tune.last_level_cache() <= tune.LARGEST_CACHE
    monkeypatch.setattr(tune, "last_level_cache", lambda: 1 << 16)
    tune.other_data.cache_clear()
    try:
        assert tune.other_data().nbytes == 2 << 16
        tune.empty_caches()
    finally:
        tune.other_data.cache_clear()


@pytest.mark.parametrize("cache", [1 << 10, 1 << 30])
def test_layers_of_a_model_larger_than_the_cache_are_timed_cold(monkeypatch: pytest.MonkeyPatch, cache: int) -> None:
    asked: set[bool] = set()

    def measured(key: str, calls: Mapping[str, Any], budget: float = 0.25, cold: bool = False) -> Timing:
        asked.add(cold)
        return Timing(dict.fromkeys(calls, 1.0), True)

    monkeypatch.setattr(cpu, "last_level_cache", lambda: cache)
    for module in (dispatch, cpu):
        monkeypatch.setattr(module, "measured", measured)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 96))
    with torch.no_grad():
        for linear in model:
            linear.weight.masked_fill_(torch.rand_like(linear.weight) < 0.7, 0.0)
    tune.other_data()
    report = lower_model(model, tokens=(1,))
    assert asked == {cache == 1 << 10}
    assert ("timed with cold weights" in str(report)) == (cache == 1 << 10)
    assert tune.other_data.cache_info().currsize == 0  # memory that only measuring needed


def test_a_cold_record_serves_a_call_that_measures_nothing() -> None:
    layer = SparseLinear(pack(torch.randn(8, 64)))
    if layer.kernels is None:
        pytest.skip("no compiler")
    key = dispatch.tune_key(layer.packed, layer.layer, layer.kernels.variant, 16, torch.get_num_threads(), False)
    tune.remember(key, {"seconds": {"gemv/64": 1.0, "stream/64": 2.0}, "steady": True})
    tune.remember(tune.cold_key(key), {"seconds": {"gemv/64": 2.0, "stream/64": 1.0}, "steady": True})
    assert (layer.choice(16).kernel, layer.choice(16).measured) == ("stream", 1.0)


def test_numbers_of_tokens_that_were_not_measured_are_predicted_from_one_that_was() -> None:
    """A kernel that took five times what the model says at 32 tokens is expected to do so at 200."""
    layer = SparseLinear(pack(torch.randn(64, 128) * (torch.rand(64, 128) > 0.5)))
    if layer.kernels is None:
        pytest.skip("no compiler")
    variant, threads = layer.kernels.variant, torch.get_num_threads()

    def predicted(kernel: str, tokens: int) -> float:
        return dispatch.predict(layer.packed, variant.isa, kernel, tokens, threads)

    for slow, fast in (("decompress", "stream"), ("stream", "decompress")):
        layer.choices.clear()
        key = dispatch.tune_key(layer.packed, layer.layer, variant, 32, threads, layer.int8)
        seconds = {f"{slow}/{48 if slow == 'decompress' else 128}": 50 * predicted(slow, 32)}
        seconds[f"{fast}/{48 if fast == 'decompress' else 128}"] = predicted(fast, 32)
        tune.remember(key, {"seconds": seconds, "steady": True})
        choice = layer.choice(200)
        assert (choice.kernel, choice.measured) == (fast, None)
        assert choice.predicted == pytest.approx(predicted(fast, 256))


def test_each_distinct_shape_is_measured_once_however_many_layers_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))
    measurements: list[tuple[str, ...]] = []

    def time_in_turn(calls: Mapping[str, Any], budget: float = 0.25, before: Any = None) -> Timing:
        measurements.append(tuple(calls))
        return Timing({name: 1.0 if "/" in name else 2.0 for name in calls}, True)

    monkeypatch.setattr(tune, "time_in_turn", time_in_turn)
    counts: list[int] = []
    for blocks, other in ((2, False), (6, False), (6, True)):
        monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / f"{blocks}{other}"))
        forget()
        measurements.clear()
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(*sizes) for _ in range(blocks) for sizes in ((96, 200), (200, 96)))).eval()
        with torch.no_grad():
            for number, linear in enumerate(model):
                weight: Any = linear.weight
                share = 0.5 if other and number == 0 else 0.25
                keep = torch.rand(weight.numel()).argsort()[: int(share * weight.numel())]
                weight.copy_(torch.zeros(weight.numel()).index_copy(0, keep, weight.view(-1)[keep]).view_as(weight))
        report = lower_model(model, tokens=(1, 16))
        assert f"{2 * blocks} linears packed" in str(report)
        counts.append(len(measurements))
    assert counts == [4, 4, 6], "two shapes at two numbers of tokens, and one more of another sparsity"
