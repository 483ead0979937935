"""Adapters come and go under a budget, while requests hold theirs: who waits, who is evicted, who is refused, and what threads see."""

from __future__ import annotations

import copy
import gc
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_bench import BASE, GREEDY, Bench, shared
from torch.func import functional_call, stack_module_state, vmap

import sparsify
from sparsify import AdapterError, LoRA, Plan, SparsifyError
from sparsify.serving.store import PASSES, SlotTimeout

PATIENCE = 30.0  # seconds until a test that hangs fails


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return shared(tmp_path_factory)


def logits(host: Any, ids: torch.Tensor, names: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return host(input_ids=ids, **({} if names is None else {"adapter_names": names})).logits


def until(holds: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found


# --- exactness -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_layout_of_names_and_lengths(bench, data):
    names = data.draw(st.lists(st.sampled_from(sorted(bench.alone)), min_size=1, max_size=6))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=len(names), max_size=len(names)))
    host = shared_host(bench)
    longest = max(lengths)
    ids, mask = (torch.zeros(len(names), longest, dtype=torch.long) for _ in range(2))
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = tiny.tokens(1, length, seed=row)[0]
        mask[row, longest - length :] = 1
    found = host.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **GREEDY)
    for row, name in enumerate(names):
        own = ids[row : row + 1, longest - lengths[row] :]
        wanted = bench.alone[name].generate(input_ids=own, attention_mask=torch.ones_like(own), **GREEDY)
        assert torch.equal(found[row, longest - lengths[row] :], wanted[0]), name


def shared_host(bench: Bench) -> Any:
    if not hasattr(bench, "shared"):
        bench.shared = bench.host(slots=4)  # type: ignore[attr-defined]
    return bench.shared  # type: ignore[attr-defined]


def test_each_row_is_vmap_over_stacked_parameters(bench):
    names = ["s2ft", BASE, "rosa", "lora", "paca"]
    models = [copy.deepcopy(bench.alone[name]) for name in names]
    tokens = tiny.tokens(len(names), 6)
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def one(parameters: Any, buffers: Any, row: torch.Tensor) -> torch.Tensor:
        return functional_call(
            skeleton, (parameters, buffers), kwargs={"input_ids": row[None], "use_cache": False}
        ).logits

    with torch.no_grad():
        expected = vmap(one)(parameters, buffers, tokens)[:, 0]
    torch.testing.assert_close(logits(bench.host(), tokens, names), expected, rtol=2e-6, atol=2e-6)


def test_ninety_of_ninety_from_threads(bench):
    host = bench.host(slots=6)
    names = sorted(bench.alone)
    prompts = {name: tiny.tokens(2, 5, seed=number) for number, name in enumerate(names)}
    wanted = {name: bench.alone[name].generate(input_ids=prompts[name], **GREEDY) for name in names}
    right: list[bool] = []

    def ask(start: int) -> None:
        for turn in range(10):
            first, second = names[(start + turn) % len(names)], names[(start + 3 * turn + 1) % len(names)]
            ids = torch.stack([prompts[first][0], prompts[second][1]])
            found = host.generate(input_ids=ids, adapter_names=[first, second], **GREEDY)
            right.append(torch.equal(found, torch.stack([wanted[first][0], wanted[second][1]])))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 4)
    assert right.count(True) == len(right) == 90
    assert host.sparsify.status()["held"] == 0


# --- slots and budgets ---------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_leaves_its_slot_and_host_memory(bench):
    ids = tiny.tokens(1, 4)
    one = shared_host(bench).sparsify.store
    host = bench.host(slots=2, host_budget=1)
    for name in ("lora", "s2ft", "lora", "rosa"):
        bench.check_rows(logits(host, ids, [name]), [name], {"input_ids": ids})
    entries = host.sparsify.store.entries
    assert {n for n, e in entries.items() if e.slot} == {"lora", "rosa"}
    assert host.sparsify.counts.evictions == 1
    assert entries["s2ft"].image is None
    assert host.sparsify.counts.loads == 3
    logits(host, ids, ["s2ft"])
    assert host.sparsify.counts.loads == 4
    assert {n for n, e in entries.items() if e.slot} == {"rosa", "s2ft"}
    assert one is not host.sparsify.store


def test_bytes_are_a_budget_too(bench):
    roomy = bench.host()
    ids = tiny.tokens(1, 4)
    logits(roomy, ids, ["lora"])
    size = roomy.sparsify.status()["slot_bytes"]
    host = bench.host(slots=8, budget=size)
    for name in ("lora", "s2ft", "lora"):
        bench.check_rows(logits(host, ids, [name]), [name], {"input_ids": ids})
        assert host.sparsify.status()["slot_bytes"] <= size
    assert host.sparsify.status()["evictions"] >= 1
    small = bench.host(budget=size - 64)
    with pytest.raises(
        AdapterError, match=rf"lora takes {size:,} bytes, and the budget of the slots is .*: raise budget="
    ):
        logits(small, ids, ["lora"])
    with pytest.raises(AdapterError, match="3 adapters in one batch, and the host has 2 slots"):
        logits(bench.host(slots=2), tiny.tokens(3, 4), ["s2ft", "lora", "rosa"])


def test_slots_that_requests_hold_are_never_evicted_and_others_wait(bench):
    host = bench.host(slots=1)
    ids = tiny.tokens(1, 4)
    handle = host.sparsify
    lease = handle.lease(["lora"])
    with pytest.raises(
        SlotTimeout, match=r"rosa: no slot was free within 0 s; 1 of 1 slots .* are held by requests that run"
    ):
        until(lambda: handle.store.entries["rosa"].image or handle.try_lease(["rosa"]))
        handle.lease(["rosa"], timeout=0)
    with handle.using("lora"):  # the one that is live serves others meanwhile
        bench.check_rows(logits(host, ids), ["lora"], {"input_ids": ids})
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(logits(host, ids, ["rosa"])))
    waiting.start()
    until(lambda: handle.status()["waiting"])
    assert not found
    lease.close()
    waiting.join(PATIENCE)
    bench.check_rows(found[0], ["rosa"], {"input_ids": ids})
    with pytest.raises(AdapterError, match="the lease is closed"), handle.using_slots([lease.slots[0]], lease):
        pass


def test_requests_for_several_adapters_do_not_wait_for_each_other(bench):
    host = bench.host(slots=2)
    names = ["lora", "s2ft", "rosa", "paca"]
    done: list[int] = []

    def ask(start: int) -> None:
        for turn in range(8):
            pair = [names[(start + turn) % 4], names[(start + turn + 1 + turn % 3) % 4]]
            with host.sparsify.using(pair):
                done.append(turn)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 2)
    assert len(done) == 32
    assert host.sparsify.status()["held"] == host.sparsify.status()["waiting"] == 0


def test_a_scheduler_asks_without_waiting_and_packs_tokens_of_several_requests(bench):
    host = bench.host(slots=2)
    handle = host.sparsify
    leases = [until(lambda name=name: handle.try_lease([name])) for name in ("lora", "s2ft")]
    assert handle.try_lease(["rosa"]) is None
    ids = tiny.tokens(2, 4)
    slots = torch.tensor([leases[0].slots[0]] * 4 + [0] * 4)
    with handle.using_slots(slots, *leases):
        bench.check_rows(logits(host, ids), ["lora", BASE], {"input_ids": ids})
    packed = torch.cat([ids[0], ids[1]])[None]
    mask = torch.full((1, 1, 8, 8), float("-inf"))
    mask[0, 0, :4, :4] = mask[0, 0, 4:, 4:] = torch.full((4, 4), float("-inf")).triu(1)
    slots = [lease.slots[0] for lease in leases for _ in range(4)]
    positions = torch.arange(4).repeat(2)[None]
    with torch.no_grad(), handle.using_slots(slots, *leases):
        found = host(input_ids=packed, attention_mask=mask, position_ids=positions, use_cache=False).logits
    bench.check_rows(found.view(2, 4, -1), ["lora", "s2ft"], {"input_ids": ids})
    with pytest.raises(AdapterError, match="slot 7 is in none of these leases"), handle.using_slots([7], *leases):
        pass


def test_a_lease_that_is_forgotten_is_given_back(bench):
    host = bench.host(slots=1)
    host.sparsify.lease("lora")
    with host.sparsify.lease("rosa", timeout=PATIENCE) as lease:
        assert lease.slots == [1]


def test_the_garbage_collector_finds_a_forgotten_lease_at_the_worst_moment(bench):
    """While a slot is filled, with the lock held by the very thread that collects: nothing may be served within that."""
    host = bench.host(slots=2)
    store = host.sparsify.store
    kept, forgotten = host.sparsify.lease("lora"), host.sparsify.lease("rosa")
    circle: list[Any] = [forgotten]
    circle.append(circle)
    del forgotten
    gc.disable()
    try:
        got: list[Any] = []
        threads = [
            threading.Thread(target=lambda name=name: got.append(host.sparsify.lease(name, timeout=PATIENCE)))
            for name in ("s2ft", "paca")
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(store.queue) == 2 and all(e.image for p in store.queue for e in p.entries))
        publish = store.slots.publish

        def collecting(image: Any) -> int:
            gc.collect()
            return publish(image)

        store.slots.publish = collecting
        del circle
        kept.close()
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        gc.enable()
    assert sorted(lease.slots[0] for lease in got) == [1, 2]
    for lease in got:
        lease.close()
    assert host.sparsify.status()["held"] == 0
    assert not store.queue


def test_an_adapter_that_is_always_asked_for_does_not_keep_its_slot_for_ever(bench):
    host = bench.host(slots=1)
    handle, store = host.sparsify, host.sparsify.store
    held = [handle.lease("lora", polite=True)]
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(handle.lease("s2ft", timeout=PATIENCE)))
    waiting.start()
    until(lambda: any(e.image for p in store.queue for e in p.entries))
    while (another := handle.try_lease("lora", polite=True)) is not None:
        held.append(another)
        assert len(held) <= PASSES + 1
    assert len(held) == PASSES + 1
    with handle.using("lora"):  # within a call that holds it already, nobody has to be polite
        assert not got
    for lease in held:
        lease.close()
    waiting.join(PATIENCE)
    assert got[0].slots == [1]
    got[0].close()


# --- names, files, removal -----------------------------------------------------------------------------------------------------------


def test_adapters_are_found_in_a_folder_and_names_do_not_lead_out_of_it(bench, tmp_path):
    home = tmp_path / "adapters"
    home.mkdir()
    (home / "mine").symlink_to(bench.folder / "lora", target_is_directory=True)  # leads out
    for name in ("lora", "s2ft"):
        (home / name).mkdir()
        for file in (bench.folder / name).iterdir():
            os.link(file, home / name / file.name)
    (home / ".hidden").symlink_to(home / "lora", target_is_directory=True)
    (home / "empty").mkdir()
    host: Any = sparsify.serve(bench.model, folder=home, slots=2, budget="1MiB", timeout=PATIENCE)
    ids = tiny.tokens(2, 4)
    bench.check_rows(logits(host, ids, ["lora", "s2ft"]), ["lora", "s2ft"], {"input_ids": ids})
    assert host.sparsify.names == ["lora", "s2ft"]
    hostile = [
        "../adapters/lora",
        str(bench.folder / "lora"),
        "lora/",
        "lora/..",
        ".",
        "..",
        "",
        ".hidden",
        "mine",
        "empty",
        "lora\0",
    ]
    hostile += ["l" * 5000, "lora\n", "C:lora", "~", "lora/../s2ft", "\ud800"]
    for name in hostile:
        with pytest.raises(AdapterError, match="no adapter is called"):
            host.sparsify.lease([name])
    for name in (BASE, "", 7, "a\nb", "x" * 300):
        with pytest.raises(AdapterError, match=r"name|adapter"):
            host.sparsify.add(name, home / "lora")
    host.sparsify.add("a/b", home / "lora")  # what is only a name leads nowhere
    bench.check_rows(logits(host, ids[:1], ["a/b"]), ["lora"], {"input_ids": ids})


def test_folders_are_found_wherever_the_process_is_by_then(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(bench.folder)
    host: Any = sparsify.serve(bench.model, {"one": "lora"}, folder=".", slots=2, budget="1MiB", timeout=PATIENCE)
    host.sparsify.add("two", Path("s2ft"))
    monkeypatch.chdir(tmp_path)
    ids = tiny.tokens(2, 4)
    bench.check_rows(logits(host, ids, ["one", "two"]), ["lora", "s2ft"], {"input_ids": ids})
    bench.check_rows(logits(host, ids, ["rosa", BASE]), ["rosa", BASE], {"input_ids": ids})


def test_one_adapter_under_two_names_and_a_name_again(bench):
    host = bench.host()
    host.sparsify.add("twin", bench.folder / "lora")
    ids = tiny.tokens(3, 4)
    found = logits(host, ids, ["lora", "twin", BASE])
    bench.check_rows(found, ["lora", "lora", BASE], {"input_ids": ids})
    with host.sparsify.using(["twin"]):
        host.sparsify.remove("twin")
        bench.check_rows(logits(host, ids[:1]), ["lora"], {"input_ids": ids})  # who holds it goes on
    with pytest.raises(AdapterError, match="no adapter is called 'twin'"):
        host.sparsify.lease("twin")
    assert host.sparsify.status()["live"] == 1
    host.sparsify.add("twin", bench.folder / "s2ft")
    bench.check_rows(logits(host, ids[:1], "twin"), ["s2ft"], {"input_ids": ids})


def test_a_name_means_another_adapter_at_once_or_stays_what_it_was(bench, tmp_path):
    host = bench.host(slots=1)
    handle, ids = host.sparsify, tiny.tokens(1, 4)
    (tmp_path / "adapter.safetensors").write_bytes(b"\0" * 100)
    found: list[torch.Tensor] = []
    with handle.using("lora"):
        waiting = threading.Thread(target=lambda: found.append(logits(host, ids, "s2ft")))
        waiting.start()
        until(lambda: any(e.image for p in handle.store.queue for e in p.entries))
        handle.replace("s2ft", bench.folder / "rosa")  # while a request waits for it
        handle.replace("lora", bench.folder / "paca")  # while one holds it
        bench.check_rows(logits(host, ids), ["lora"], {"input_ids": ids})
        with pytest.raises(AdapterError, match="adapter.safetensors"):
            handle.replace("lora", tmp_path)
    waiting.join(PATIENCE)
    bench.check_rows(found[0], ["rosa"], {"input_ids": ids})
    bench.check_rows(logits(host, ids, "lora"), ["paca"], {"input_ids": ids})
    handle.replace("new", bench.folder / "lora")
    bench.check_rows(logits(host, ids, "new"), ["lora"], {"input_ids": ids})
    assert handle.status()["held"] == 0
    assert handle.status()["live"] == 1


def test_removed_or_deleted_while_it_is_read(bench, tmp_path):
    host = bench.host()
    store = host.sparsify.store
    entered, go = threading.Event(), threading.Event()
    read = store.read

    def slow(folder: Path) -> Any:
        entered.set()
        assert go.wait(PATIENCE)
        return read(folder)

    store.read = slow
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            host.sparsify.lease("lora", timeout=PATIENCE)
        except BaseException as error:
            errors.append(error)

    waiting = threading.Thread(target=ask)
    waiting.start()
    assert entered.wait(PATIENCE)
    host.sparsify.remove("lora")
    waiting.join(PATIENCE)
    go.set()
    assert "'lora' was removed while a request waited for it" in str(errors[0])
    until(lambda: store.counts.loads == 1)
    assert host.sparsify.status()["live"] == 0
    copied = tmp_path / "gone"
    copied.mkdir()
    for file in (bench.folder / "lora").iterdir():
        os.link(file, copied / file.name)
    host.sparsify.add("gone", copied)
    for file in copied.iterdir():
        file.unlink()
    ids = tiny.tokens(2, 4)
    with pytest.raises(AdapterError, match=r"no adapter\.safetensors there"):
        logits(host, ids, ["gone", "s2ft"])
    bench.check_rows(logits(host, ids, ["s2ft", BASE]), ["s2ft", BASE], {"input_ids": ids})


def test_whatever_a_file_brings_about_refuses_its_request_alone(bench, monkeypatch):
    host = bench.host()
    store = host.sparsify.store
    read = store.read

    def failing(folder: Path) -> Any:
        if folder.name == "rosa":
            raise MemoryError("no room")
        return read(folder)

    monkeypatch.setattr(store, "read", failing)
    with pytest.raises(AdapterError, match="cannot be read: MemoryError: no room"):
        host.sparsify.lease(["lora", "rosa"])
    monkeypatch.setattr(store, "read", read)
    ids = tiny.tokens(1, 4)
    bench.check_rows(logits(host, ids, ["rosa"]), ["rosa"], {"input_ids": ids})  # and the next one tries again


def test_a_closed_host_refuses_and_says_so(bench):
    host = bench.host()
    host.sparsify.close()
    with pytest.raises(SparsifyError, match="the serving host was closed"):
        host.sparsify.lease("lora")
    ids = tiny.tokens(1, 4)
    torch.testing.assert_close(logits(host, ids), logits(bench.model, ids))


def test_a_sum_of_adapters_is_an_adapter(bench):
    host = bench.host()
    host.sparsify.add("both", {"s2ft": 0.5, "rosa": 0.25, "lora": -1})
    loaded: Any = sparsify.load(bench.model, {name: bench.folder / name for name in ("s2ft", "rosa", "lora")})
    loaded.sparsify.set_adapter({"s2ft": 0.5, "rosa": 0.25, "lora": -1})
    ids = tiny.tokens(3, 5)
    found, base = logits(host, ids, ["both", BASE, "s2ft"]), logits(bench.model, ids)
    torch.testing.assert_close(found[0], logits(loaded, ids)[0], rtol=1e-5, atol=1e-5)
    assert float((found[0] - base[0]).abs().max()) > 1e-2
    bench.check_rows(found[1:], [BASE, "s2ft"], {"input_ids": ids[1:]})
    assert host.sparsify.overlap("s2ft", "s2ft")[0].shared == host.sparsify.overlap("s2ft", "s2ft")[0].total
    assert {c.kind for c in host.sparsify.overlap("lora", "paca")} == {"whole"}
    for weights, words in (({}, "no adapter is named"), ({"s2ft": float("nan")}, "finite number"), ({"sft": 1}, "did you mean 's2ft'"),
                           ({"both": 1.0}, "is a sum of adapters itself")):  # fmt: skip
        with pytest.raises(AdapterError, match=words):
            host.sparsify.add("other", weights)


# --- copies, modes -----------------------------------------------------------------------------------------------------------------


def test_two_hosts_share_a_base_and_copies_stand_alone(bench):
    ids = tiny.tokens(2, 4)
    first, second = bench.host(), bench.host(slots=1)
    with first.sparsify.using(["lora", BASE]):
        bench.check_rows(logits(second, ids, ["s2ft", BASE]), ["s2ft", BASE], {"input_ids": ids})
        bench.check_rows(logits(first, ids), ["lora", BASE], {"input_ids": ids})
    buffer = io.BytesIO()
    torch.save(first, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(first), torch.load(buffer, weights_only=False)):
        assert other.sparsify.status()["live"] == 0
        assert other.sparsify.host is other
        bench.check_rows(logits(other, ids, ["rosa", BASE]), ["rosa", BASE], {"input_ids": ids})
        other.sparsify.remove("rosa")
    assert "rosa" in first.sparsify.names


def test_gradients_inference_mode_autocast_and_empty_batches(bench):
    host = bench.host()
    ids = tiny.tokens(2, 4)
    wanted = logits(host, ids, ["s2ft", "rosa"])
    with torch.inference_mode():
        assert torch.equal(host(input_ids=ids, adapter_names=["s2ft", "rosa"]).logits, wanted)
    assert not host(input_ids=ids, adapter_names=["s2ft", "rosa"]).logits.requires_grad
    embedded = host.get_input_embeddings()(ids).detach().requires_grad_()
    out = host(inputs_embeds=embedded, adapter_names=["s2ft", "rosa"]).logits
    (found,) = torch.autograd.grad(out.square().sum(), embedded)
    for row, name in enumerate(("s2ft", "rosa")):
        own = embedded[row : row + 1].detach().requires_grad_()
        (alone,) = torch.autograd.grad(bench.alone[name](inputs_embeds=own).logits.square().sum(), own)
        torch.testing.assert_close(found[row], alone[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = host(input_ids=ids, adapter_names=["s2ft", "rosa"]).logits.float()
        base = host(input_ids=ids).logits.float()
    assert float((rough - wanted).abs().max()) < 0.3 * float((base - wanted).abs().max())


def test_a_batch_of_nothing_and_of_one(tmp_path):
    model = tiny.Mlp().eval()
    trained: Any = sparsify.compile(model, Plan([LoRA(2)]), example=torch.randn(2, 3, 12))
    tiny.disturb(trained)
    trained.sparsify.save_adapter(tmp_path)
    host: Any = sparsify.serve(model, {"lora": tmp_path}, example=torch.randn(2, 3, 12), budget="1MiB")
    x = torch.randn(1, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(host(x, adapter_names=["lora"]), trained(x), rtol=1e-5, atol=1e-6)
        assert host(x[:0], adapter_names=[]).shape == (0, 3, 5)
        assert host(x[:0], adapter_names="lora").shape == (0, 3, 5)
    with pytest.raises(AdapterError, match="1 names for 0 rows"):
        host(x[:0], adapter_names=["lora"])


def test_a_base_in_16_bits(bench):
    model = copy.deepcopy(bench.model).bfloat16()
    host: Any = sparsify.serve(model, {"rosa": bench.folder / "rosa"}, budget="1MiB", strict=False)
    ids = tiny.tokens(2, 6)
    assert host.sparsify.store.slots.dtype == torch.bfloat16
    found, base = logits(host, ids, ["rosa", BASE]).float(), logits(model, ids).float()
    wanted = logits(bench.alone["rosa"], ids)
    assert float((found[0] - wanted[0]).abs().max()) < 0.3 * float((base[0] - wanted[0]).abs().max())
    torch.testing.assert_close(found[1], base[1], rtol=0, atol=0)
