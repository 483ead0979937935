"""While threads run forwards or generate, switching gives each of them the old or the new adapter, never a mixture."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods import compiled
from quick_export import quick_export
from torch import Tensor

from sparsify import S2FT, LoRA, PaCA, Quantize, RoSA, SparsifyError
from sparsify.host.switch_lock import SwitchLock

RULES: dict[str, tuple[Any, ...]] = {
    "s2ft": (S2FT(fraction=0.3),),
    "paca": (PaCA(rank=4),),
    "rosa": (RoSA(rank=2, density=0.05, mask="random"),),
    "lora": (LoRA(rank=4),),
    "lora over nf4": (Quantize(format="nf4"), LoRA(rank=4)),
    "s2ft beside lora": (S2FT(structure="ffn", units=4), LoRA(match="*.q_proj", rank=2)),
}
X = tiny.tokens(2, 8, seed=77)


def forward(host: Any) -> Tensor:
    with torch.no_grad():
        return host(X).logits


def generate(host: Any) -> Tensor:
    options = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    return torch.stack(host.generate(X[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, **options).logits)


def host_of(method: str, folder: Path) -> Any:
    host = compiled(*RULES[method], calibrate=False)
    for seed in (1, 2):
        tiny.disturb(host, 0.3, seed)
        host.sparsify.save_adapter(folder / str(seed))
        host.sparsify.load_adapter(folder / str(seed), str(seed))
    return host


def hammer(
    host: Any, call: Callable[[Any], Tensor], switches: list[Callable[[], Any]], rounds: int, readers: int = 3
) -> None:
    """Every output that readers see while the switches go round must be that of one of the states."""
    allowed = []
    for switch in switches:
        switch()
        allowed.append(call(host))
    assert any(not torch.equal(allowed[0], other) for other in allowed[1:]), "or nothing is switched"
    seen: list[Tensor] = []
    failed: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                seen.append(call(host))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        for switch in switches:
            switch()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert len(seen) >= rounds
    assert all(any(torch.equal(y, one) for one in allowed) for y in seen)


@pytest.mark.parametrize("method", list(RULES))
def test_forwards_see_one_adapter(method: str, tmp_path: Path) -> None:
    host = host_of(method, tmp_path)
    h = host.sparsify
    mix = [] if method == "lora over nf4" else [lambda: h.set_adapter({"1": 0.5, "2": 0.5})]
    hammer(
        host, forward, [lambda: h.set_adapter("1"), lambda: h.set_adapter(None), *mix, lambda: h.set_adapter("2")], 8
    )


@pytest.mark.parametrize("method", ["s2ft beside lora", "rosa"])
def test_generate_sees_one_adapter_from_the_first_token_to_the_last(method: str, tmp_path: Path) -> None:
    host = host_of(method, tmp_path)
    h = host.sparsify
    hammer(host, generate, [lambda: h.set_adapter("1"), lambda: h.set_adapter(None), lambda: h.set_adapter("2")], 3, 2)


def test_merging_and_compiled_hosts_are_guarded(tmp_path: Path) -> None:
    host = host_of("s2ft", tmp_path)
    h = host.sparsify
    h.set_adapter("1")
    folded = [h.merge, h.unmerge, lambda: h.set_adapter(None), lambda: h.set_adapter("1")]
    with pytest.raises(AssertionError, match="or nothing is switched"):
        hammer(host, forward, [lambda: None, lambda: None], 1)
    hammer(host, lambda m: forward(m).argmax(-1), folded, 4)
    outer = torch.compile(host, backend="eager")

    def held(
        m: Any,
    ) -> Tensor:  # torch.compile traces the hooks away, so that whoever calls what it returns holds the switch off
        with h.reading():
            return forward(m)

    hammer(outer, held, [lambda: h.set_adapter("1"), lambda: h.set_adapter("2")], 4, 2)
    host.compile(backend="eager", fullgraph=True)
    hammer(host, forward, [lambda: h.set_adapter("1"), lambda: h.set_adapter("2")], 4, 2)


def test_a_switch_inside_of_the_own_forward_is_an_error_and_not_a_deadlock(tmp_path: Path) -> None:
    host = host_of("lora", tmp_path)
    h = host.sparsify
    errors: list[str] = []

    def switch(*_: Any) -> None:
        for verb in (lambda: h.set_adapter(None), h.merge, h.restore):
            with pytest.raises(SparsifyError) as caught:
                verb()
            errors.append(str(caught.value))

    handle = host.model.layers[0].register_forward_hook(switch)
    forward(host)
    generate(host)
    handle.remove()
    assert {e.partition(":")[0] for e in errors} == {"set_adapter", "merge", "restore"}
    assert all("inside of the model's own forward or generate()" in e for e in errors)
    h.set_adapter(None)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_is_left_by_an_error_lets_go(error: type[BaseException], tmp_path: Path) -> None:
    host = host_of("lora", tmp_path)

    def fail(*_: Any) -> None:
        raise error

    handle = host.model.layers[0].register_forward_hook(fail)
    for call in (forward, generate):
        with pytest.raises(error):
            call(host)
    handle.remove()
    done = threading.Thread(target=lambda: host.sparsify.set_adapter(None), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive()
    host.sparsify.set_adapter("1")
    assert not host.sparsify.lock.readers


def test_copies_have_locks_of_their_own_and_exports_have_none(tmp_path: Path) -> None:
    host = host_of("s2ft beside lora", tmp_path)
    stream = io.BytesIO()
    torch.save(host, stream)
    stream.seek(0)
    for clone in (copy.deepcopy(host), torch.load(stream, weights_only=False)):
        assert clone.sparsify.lock is not host.sparsify.lock
        with host.sparsify.lock.writing("test", host):
            done = threading.Thread(target=lambda c=clone: (forward(c), generate(c)), daemon=True)
            done.start()
            done.join(60)
            assert not done.is_alive()
        assert any(getattr(hook, "lock", None) is clone.sparsify.lock for hook in clone._forward_hooks.values())
    graphs = torch._dynamo.explain(lambda x: host(x).logits)(X)
    assert graphs.graph_count == 1, graphs.break_reasons
    exported = quick_export(host.sparsify.plain(), (X,), {"use_cache": False}, strict=False)
    own = quick_export(host, (X,), {"use_cache": False}, strict=False)
    assert abs(len(own.graph.nodes) - len(exported.graph.nodes)) < len(exported.graph.nodes)
    assert not host.sparsify.lock.readers


def test_neither_readers_nor_writers_starve() -> None:
    lock, host = SwitchLock(), torch.nn.Linear(1, 1)
    counts = {"read": 0, "write": 0}
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with lock.reading():
                counts["read"] += 1

    def write() -> None:
        while not stop.is_set():
            with lock.writing("test", host):
                counts["write"] += 1

    threads = [threading.Thread(target=f) for f in (read, read, write, write)]
    for thread in threads:
        thread.start()
    while min(counts.values()) < 50:
        assert all(t.is_alive() for t in threads)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not lock.readers
    assert lock.writer is None
