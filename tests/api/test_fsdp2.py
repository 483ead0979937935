"""FSDP2 (`fully_shard`) on two gloo processes: trains as one process with the joint batch, and saves what one process would."""

from __future__ import annotations

import copy
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
import processes
import tiny
import trace_cache

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, Prune, Quantize, RoSA, SparsifyError
from sparsify.adapters.adapter import load
from sparsify.errors import StateError
from sparsify.host.live_state import original
from sparsify.model.sharded import whole_parameters
from sparsify.modules.masked import check_masks, masked_parameters
from sparsify.train.rosa import collect_masks
from sparsify.train.schedules import CubicSchedule, GradualPruner

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
FAMILIES = ("Llama", "GPT-2", "T5 (gated)")
BLOCKS = ("LlamaDecoderLayer", "GPT2Block", "T5Block", "MixtralDecoderLayer")
PLANS = {
    "s2ft": Plan([S2FT(fraction=0.2, producer_fraction=0.1, budget="structure")]),
    "paca": Plan([PaCA(rank=3)]),
    "rosa": Plan([RoSA(rank=2, density=0.05, mask="random")]),
    "lora": Plan([LoRA(rank=2)]),
    "pruned": Plan([Prune(sparsity=0.5, method="magnitude")]),
    "rosa over nf4": Plan([Quantize(format="nf4"), RoSA(rank=2, density=0.05, mask="random")]),
    "s2ft beside lora over pruned": Plan([Prune(sparsity=0.5), S2FT(structure="ffn", fraction=0.2), LoRA(rank=2)]),
}
STEPS = 3
WHOLE = StateDictOptions(full_state_dict=True)


# --- what every test shares ------------------------------------------------------------------------------------------------


def build(family: str, plan: Plan, dtype: torch.dtype = torch.float64) -> Any:
    """A host; the packed format holds 32-bit values."""
    packed = any(isinstance(rule, Quantize) for rule in plan.rules)
    options: dict[str, Any] = {}
    if any(isinstance(rule, Prune) and rule.method == "sparsegpt" for rule in plan.rules):
        options["calibration"] = [batch(family)]
    model = tiny.build(family, torch.float32 if packed else dtype)
    return sparsify.compile(model, plan, progress=False, **options)


def batch(family: str, rows: slice = slice(None)) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": tiny.tokens(4, 9)[rows]}
    if family.startswith("T5"):
        inputs["decoder_input_ids"] = tiny.tokens(4, 6, seed=8)[rows]
    return inputs


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def loss_of(outputs: Any) -> Tensor:
    """A mean over rows, so that the mean over ranks of equal shares is the loss of all rows."""
    y = tiny.output_of(outputs).double()
    return (y * torch.linspace(-1.0, 1.3, y[0].numel(), dtype=y.dtype).view(y[0].shape)).square().mean()


def shard(host: Any, **options: Any) -> Any:
    for module in list(host.modules()):
        if type(module).__name__ in BLOCKS:
            fully_shard(module, **options)
    return fully_shard(host, **options)


def full(tensor: Any) -> Tensor:
    """All of a tensor that may lie in pieces."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trained(host: nn.Module) -> dict[str, Tensor]:
    return {n: full(p) for n, p in host.named_parameters() if p.requires_grad}


def gradients(host: nn.Module) -> dict[str, Tensor]:
    return {n: full(p.grad) for n, p in host.named_parameters() if p.grad is not None}


def steps(host: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], list[dict[str, Tensor]], torch.optim.Optimizer]:
    """Losses and gradients of some steps."""
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
    losses, found = [], []
    for _ in range(STEPS):
        loss = loss_of(host(**inputs))
        loss.backward()
        losses.append(loss.detach())
        found.append(gradients(host))
        optimizer.step()
        optimizer.zero_grad()
    return losses, found, optimizer


def start(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    trace_cache.install()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def on_two_ranks(worker: Callable[..., None], directory: str, *arguments: Any) -> list[dict[str, Any]]:
    """What each rank saved in `directory`."""
    processes.spawn(worker, (directory, *arguments), 2)
    return [torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in (0, 1)]


def finish(rank: int, directory: str, found: Any) -> None:
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


# --- training and checkpoints ------------------------------------------------------------------------------------------------


def train_worker(rank: int, directory: str, family: str, names: tuple[str, ...]) -> None:
    start(rank, f"{directory}/store")
    found: dict[str, Any] = {}
    for name in names:
        host = shard(build(family, PLANS[name]))
        losses, grads, optimizer = steps(host, batch(family, half(rank)))
        for loss in losses:
            dist.all_reduce(loss)
        pieces = get_model_state_dict(host)
        whole = get_model_state_dict(host, options=WHOLE)
        dcp.save(
            {"model": pieces, "optimizer": get_optimizer_state_dict(host, optimizer)},
            checkpoint_id=f"{directory}/{name}",
        )
        if host.sparsify.parts:
            host.sparsify.save_adapter(f"{directory}/{name} adapter")
        if name == "lora":
            host.sparsify.export_lora(f"{directory}/peft")
        found[name] = {
            "losses": [loss / 2 for loss in losses],
            "gradients": grads,
            "trained": trained(host),
            "state": whole,
            "original": host.sparsify.original_state_dict(),
            "sharded": sorted(n for n, p in host.named_parameters() if hasattr(p, "placements")),
            "counts": host.sparsify.count_parameters(),
            "report": str(host.sparsify.report),
        }
    finish(rank, directory, found)


def without_counts(report: str) -> str:
    """A report without the note on calibration (two ranks see twice the tokens of one) and those of this process on kernels."""
    lines = [line for line in report.splitlines() if not line.strip().startswith("note: ")]
    return re.sub(r" \(only \d+ calibration tokens for \d+ inputs\)", "", "\n".join(lines))


#: every kind of trained part, and every base that is not dense; PaCA's parts are S2FT's
EACH = ("rosa over nf4", "s2ft beside lora over pruned")


@pytest.mark.parametrize(
    "names", [EACH, tuple(PLANS)[:4], tuple(PLANS)[4:]], ids=["each kind of part and base", "parts", "bases"]
)
@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])]
)
def test_two_ranks_train_as_one_process_and_their_checkpoints_open_in_one(family: str, names: tuple[str, ...]):
    with tempfile.TemporaryDirectory() as directory:
        first, second = on_two_ranks(train_worker, directory, family, names)
        for name in names:
            host = build(family, PLANS[name])
            fresh = copy.deepcopy(host)
            double = next(host.parameters()).dtype == torch.float64
            close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12} if double else {"rtol": 1e-3, "atol": 2e-5}
            assert first[name]["sharded"] == sorted(n for n, _ in host.named_parameters())
            assert first[name]["counts"] == host.sparsify.count_parameters()
            assert without_counts(first[name]["report"]) == without_counts(str(host.sparsify.report))
            before = trained(host)
            losses, grads, _ = steps(host, batch(family))
            torch.testing.assert_close(first[name]["losses"], losses, **close)
            for step in range(STEPS):
                torch.testing.assert_close(first[name]["gradients"][step], grads[step], **close)
            tiny.assert_same(first[name]["trained"], second[name]["trained"])
            torch.testing.assert_close(first[name]["trained"], trained(host), **close)
            assert all(not torch.equal(before[n], t) for n, t in first[name]["trained"].items() if t.numel())
            torch.testing.assert_close(first[name]["original"], host.sparsify.original_state_dict(), **close)
            tiny.assert_same(fresh.sparsify.original_state_dict(first[name]["state"]), first[name]["original"])

            state = {"model": fresh.state_dict()}
            dcp.load(state, checkpoint_id=f"{directory}/{name}", no_dist=True)
            tiny.assert_same(state["model"], first[name]["state"])
            fresh.load_state_dict(state["model"])
            tiny.assert_same(trained(fresh), first[name]["trained"])
            tiny.assert_same(fresh.state_dict(), first[name]["state"])
            check_masks(fresh)
            if fresh.sparsify.parts:
                saved, own = load(f"{directory}/{name} adapter"), fresh.sparsify.current()
                assert saved.bases == own.bases
                assert saved.info == own.info
                for a, b in zip(saved.deltas, own.deltas, strict=True):
                    assert (a.param, a.kind) == (b.param, b.kind)
                    assert torch.equal(a.values, b.values)
                    assert torch.equal(a.channels, b.channels)
            if name == "lora":
                fresh.sparsify.export_lora(f"{directory}/own peft")
                files = [load_file(f"{directory}/{d}/adapter_model.safetensors") for d in ("peft", "own peft")]
                tiny.assert_same(*files)


# --- accumulation, clipping, precision, checkpointing --------------------------------------------------------------------------

PRUNED = Plan([Prune(sparsity=0.4, method="magnitude")])
MIXED = Plan([S2FT(structure="ffn", fraction=0.2), RoSA(rank=2, density=0.05, mask="random")])


def accumulate(host: Any, rows: list[slice], sync: Callable[[bool], None] = lambda on: None) -> dict[str, Any]:
    """One step on the gradients of several micro-batches, clipped."""
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
    for place, part in enumerate(rows):
        sync(place == len(rows) - 1)
        (loss_of(host(**batch("Llama", part))) / len(rows)).backward()
    norm = torch.nn.utils.clip_grad_norm_(tiny.trainable(host), 1e-3)
    found = {"norm": full(norm), "gradients": gradients(host)}
    optimizer.step()
    return {**found, "trained": trained(host)}


def option_worker(rank: int, directory: str) -> None:
    start(rank, f"{directory}/store")
    found: dict[str, Any] = {}
    rows = [slice(2 * rank, 2 * rank + 1), slice(2 * rank + 1, 2 * rank + 2)]
    for sync_each in (True, False):
        host = shard(build("Llama", MIXED))
        found[f"accumulation, sync {sync_each}"] = accumulate(
            host, rows, lambda on, h=host, each=sync_each: h.set_requires_gradient_sync(on or each)
        )
    host = shard(build("Llama", MIXED), reshard_after_forward=False)
    host.gradient_checkpointing_enable()
    host.train()
    found["checkpointed, not resharded"] = accumulate(host, rows)
    host = build("Llama", MIXED)
    for layer in host.model.layers:
        layer.compile(backend="aot_eager")
    found["compiled blocks"] = accumulate(shard(host), rows)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    host = shard(build("Llama", MIXED, torch.float32), mp_policy=policy)
    loss_of(host(**batch("Llama", half(rank)))).backward()
    found["bf16"] = gradients(host)

    base = tiny.build("Llama", torch.bfloat16)  # a 16-bit base with the trained parts in fp32 beside it
    host = shard(sparsify.compile(base, MIXED, progress=False))
    kinds = {p.dtype for p in tiny.trainable(host)}
    loss_of(host(**batch("Llama", half(rank)))).backward()
    found["16-bit base"] = (kinds, gradients(host))
    finish(rank, directory, found)


def bf16_gradients(host: Any) -> dict[str, Tensor]:
    """Mean over the two halves of the batch, each computed on parameters in bf16 (buffers stay), as FSDP2 defines it."""
    for parameter in host.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    parts = []
    for rank in (0, 1):
        host.zero_grad()
        loss_of(host(**batch("Llama", half(rank)))).backward()
        parts.append(gradients(host))
    return {n: (parts[0][n].float() + parts[1][n].float()) / 2 for n in parts[0]}


@pytest.mark.slow
def test_accumulation_clipping_and_precision_are_those_of_one_process():
    with tempfile.TemporaryDirectory() as directory:
        first, second = on_two_ranks(option_worker, directory)
    expected = accumulate(build("Llama", MIXED), [slice(0, 4)])
    assert float(expected["norm"]) > 1e-3, "or nothing is clipped"
    for name in (
        "accumulation, sync True",
        "accumulation, sync False",
        "checkpointed, not resharded",
        "compiled blocks",
    ):
        torch.testing.assert_close(first[name], expected, rtol=1e-10, atol=1e-12)
        tiny.assert_same(first[name]["trained"], second[name]["trained"])
    wanted = bf16_gradients(build("Llama", MIXED, torch.float32))
    assert {g.dtype for g in first["bf16"].values()} == {torch.float32}
    tiny.assert_same(first["bf16"], wanted)

    kinds, grads = first["16-bit base"]
    assert kinds == {torch.float32}
    host = sparsify.compile(tiny.build("Llama", torch.bfloat16), MIXED, progress=False)
    parts = []
    for rank in (0, 1):
        host.zero_grad()
        loss_of(host(**batch("Llama", half(rank)))).backward()
        parts.append(gradients(host))
    tiny.assert_same(grads, {n: (parts[0][n] + parts[1][n]) / 2 for n in parts[0]})


# --- the handle ------------------------------------------------------------------------------------------------------------


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except SparsifyError as error:
        return str(error)
    return ""


def handle_worker(rank: int, directory: str) -> None:
    start(rank, f"{directory}/store")
    found: dict[str, Any] = {}
    open_plan = Plan([S2FT(structure="ffn", fraction=0.2), RoSA(rank=2, density=0.05)], train=["lm_head"])
    host: Any = shard(build("Llama", open_plan))
    h = host.sparsify
    local = {**batch("Llama", half(rank)), "labels": batch("Llama", half(rank))["input_ids"]}
    steps(host, batch("Llama", half(rank)))
    found["masks"] = collect_masks(host, [local], progress=False)
    steps(host, batch("Llama", half(rank)))
    with torch.no_grad():
        host(**batch("Llama"))  # leaves the root's parameters whole
    h.save_adapter(f"{directory}/a")
    found["a"] = trained(host)
    h.set_adapter(None)
    found["base"] = full_state(host)
    found["frozen"] = [n for n, p in host.named_parameters() if p.requires_grad]
    h.set_adapter("default")
    found["back"] = trained(host)
    steps(host, batch("Llama", half(rank)))
    h.load_adapter(f"{directory}/a", "first")
    h.set_adapter("first")
    found["loaded"], found["loaded state"] = trained(host), full_state(host)
    found["compile"] = message_of(lambda: sparsify.compile(shard(tiny.llama()), MIXED))
    found["state"] = full_state(host)
    whole: dict[str, Any] = get_model_state_dict(host, options=WHOLE)
    file = {n: t.clone() for n, t in original(host, whole, with_parts=True).items()}  # what Trainer's checkpoints hold
    broken = {**file, "model.layers.0.self_attn.q_proj.weight": file["model.layers.0.self_attn.q_proj.weight"] + 1}
    h.set_adapter(None)
    set_model_state_dict(host, whole, options=WHOLE)
    found["state again"] = full_state(host)
    h.set_adapter(None)
    set_model_state_dict(host, file, options=WHOLE)
    found["state from a file"] = full_state(host)
    try:
        set_model_state_dict(host, broken, options=WHOLE)
    except StateError as error:
        found["other base"] = str(error)
    finish(rank, directory, found)


FOLDED = {name: PLANS[name] for name in ("s2ft", "rosa", "rosa over nf4", "s2ft beside lora over pruned")}
FOLDED["s2ft and rosa"] = MIXED
OTHER = Plan([PaCA(rank=2)])  # another selection: its adapters are added to the weights


def outputs_of(host: nn.Module) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = tiny.output_of(host(**batch("Llama")))
    return outputs.clone()


def verbs(host: Any, directory: str, alone: str = "") -> dict[str, Any]:
    """What a trained host computes after each verb, and what it wrote; `alone` keeps the files of one process apart."""
    h, found = host.sparsify, {}
    packed = bool(h.program.quantize)
    steps(host, batch("Llama"))
    h.save_adapter(f"{directory}/first{alone}")
    steps(host, batch("Llama"))
    host.eval()
    found["trained"] = outputs_of(host)
    plain = h.plain()
    found["plain"], found["plain state"] = outputs_of(plain), {n: t.clone() for n, t in plain.state_dict().items()}
    found["plain types"] = sorted({type(m).__name__ for m in plain.modules()})
    before = trained(host)
    h.merge()
    found["merged"], found["left"] = outputs_of(host), trained(host)
    h.unmerge()
    found["unmerged"] = outputs_of(host)
    tiny.assert_same(before, trained(host))
    h.load_adapter(f"{directory}/first{alone}", "first")
    h.set_adapter({"first": 0.3, "default": 0.6})
    found["mix"] = outputs_of(host)
    h.merge()
    found["mix merged"] = outputs_of(host)
    h.unmerge()
    found["mix unmerged"] = outputs_of(host)
    if not packed:
        h.load_adapter(f"{directory}/other", "other", strict=False)
        h.set_adapter({"other": 0.5, "first": 1.0})
        found["mix with another selection"] = outputs_of(host)
    h.set_adapter("default")
    tiny.assert_same(before, trained(host))
    size = h.save_sparse(f"{directory}/sparse{alone}.safetensors")
    found["size"] = (size.dense, size.sparse)
    found["sparse"] = load_file(f"{directory}/sparse{alone}.safetensors")
    if any(isinstance(rule, RoSA) for rule in h.plan.rules) and not packed:
        h.export_lora(f"{directory}/peft{alone}", sparse="merge")
        found["base"] = load_file(f"{directory}/peft{alone}/base/model.safetensors")
    losses, _, _ = steps(host, batch("Llama"))
    found["trained on"] = losses
    host.eval()
    if not packed and not h.program.masks:
        found["classes"] = sorted(type(m).__name__.removeprefix("FSDP") for m in h.restore().modules())
        found["restored"] = outputs_of(host)
        found["restored state"] = full_state(host)
        found["after"] = hasattr(host, "sparsify")
    return found


def fold_worker(rank: int, directory: str, names: tuple[str, ...]) -> None:
    start(rank, f"{directory}/store")
    finish(rank, directory, {name: verbs(shard(build("Llama", FOLDED[name])), f"{directory}/{name}") for name in names})


@pytest.mark.parametrize(
    "names",
    [
        ("s2ft and rosa",),
        # another kind of part, and other bases: covered by the case above, and by one process in test_adapters.py, test_prune.py
        pytest.param(tuple(FOLDED)[:4], marks=pytest.mark.slow),
    ],
    ids=["s2ft and rosa", "the others"],
)
@pytest.mark.filterwarnings("ignore:merge:UserWarning", "ignore:export_lora:UserWarning")
def test_folding_mixing_and_files_are_those_of_one_process(names: tuple[str, ...]):
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            other = build("Llama", OTHER)
            steps(other, batch("Llama"))
            other.sparsify.save_adapter(f"{directory}/{name}/other")
        first, second = on_two_ranks(fold_worker, directory, names)
        for name in names:
            host = build("Llama", FOLDED[name])
            double = next(host.parameters()).dtype == torch.float64
            close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12} if double else {"rtol": 1e-3, "atol": 2e-4}
            expected = verbs(host, f"{directory}/{name}", alone=" of one process")
            assert first[name].keys() == second[name].keys() == expected.keys()
            for what, value in expected.items():
                for rank, found in enumerate((first[name], second[name])):
                    if isinstance(value, Tensor | dict) or what == "trained on":
                        torch.testing.assert_close(
                            found[what], value, msg=lambda m, w=what, r=rank: f"{w}, rank {r}: {m}", **close
                        )
                    else:
                        assert found[what] == value, (name, what, rank)
            assert not torch.equal(expected["trained"], expected["mix"])


def alone_trained_part_worker(rank: int, directory: str) -> None:
    start(rank, f"{directory}/store")
    host: Any = build("Llama", PLANS["s2ft"])
    fully_shard(host.model.layers[0].mlp.down_proj)
    host = shard(host)
    steps(host, batch("Llama"))
    before = outputs_of(host)
    texts = [message_of(host.sparsify.merge), message_of(host.sparsify.restore)]
    finish(rank, directory, {"texts": texts, "before": before, "after": outputs_of(host)})


@pytest.mark.slow  # the refusal is one line; that nothing is half done is `merge` of the test above
def test_a_part_that_is_sharded_by_itself_does_not_leave():
    with tempfile.TemporaryDirectory() as directory:
        for found in on_two_ranks(alone_trained_part_worker, directory):
            assert all("model.layers.0.mlp.down_proj itself" in text for text in found["texts"])
            assert torch.equal(found["before"], found["after"])


def full_state(host: nn.Module) -> dict[str, Tensor]:
    return {n: full(t) for n, t in host.state_dict().items()}


def test_the_handle_gathers_what_it_reads():
    with tempfile.TemporaryDirectory() as directory:
        first, second = on_two_ranks(handle_worker, directory)
        tiny.assert_same(first["masks"], second["masks"])
        open_plan = Plan([S2FT(structure="ffn", fraction=0.2), RoSA(rank=2, density=0.05)], train=["lm_head"])
        host = build("Llama", open_plan)
        assert set(host.sparsify.open_masks()) == set(first["masks"])
        host.sparsify.set_masks(first["masks"])
        base = full_state(host)
        tiny.assert_same(
            {n: first["base"][n] for n in base if n.endswith("proj.weight")},
            {n: base[n] for n in base if n.endswith("proj.weight")},
        )
        assert first["frozen"] == []
        tiny.assert_same(first["back"], first["a"])
        assert any(not torch.equal(first["a"][n], base[n]) for n in first["a"])
        tiny.assert_same(first["loaded"], first["a"])
        host.sparsify.load_adapter(f"{directory}/a", "first")
        host.sparsify.set_adapter("first")
        tiny.assert_same(trained(host), first["loaded"])
        tiny.assert_same(full_state(host), first["loaded state"])
    assert "call sparsify.compile on the model first, then fully_shard" in first["compile"]
    tiny.assert_same(first["state again"], first["state"])
    restored = [build("Llama", open_plan) for _ in range(2)]
    for one, name in zip(restored, ("state from a file", "state"), strict=True):
        one.load_state_dict(first[name])
    tiny.assert_same(*(one.sparsify.original_state_dict() for one in restored))
    tiny.assert_same(*(trained(one) for one in restored))
    assert "the checkpoint was made over another base" in first["other base"]


def alone_worker(_rank: int, directory: str) -> None:
    """One rank holds everything in one piece, which gathering must not hand out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    host = shard(build("Llama", PLANS["s2ft"]))
    module: Any = host.model.layers[0].mlp.down_proj
    before = full(module.weight)
    with whole_parameters(module):
        module.weight.data.zero_()
        inside = full(module.weight)
    forgotten = full(module.weight)
    with whole_parameters(module, keep=True):
        module.weight.data.zero_()
    finish(0, directory, {"before": before, "inside": inside, "forgotten": forgotten, "kept": full(module.weight)})


def test_gathered_parameters_are_copies_unless_they_are_kept():
    with tempfile.TemporaryDirectory() as directory:
        processes.spawn(alone_worker, (directory,))
        found = torch.load(f"{directory}/0.pt")
    assert bool(found["before"].any())
    assert torch.equal(found["forgotten"], found["before"])
    for zero in ("inside", "kept"):
        assert not bool(found[zero].any())


# --- pruned hosts ------------------------------------------------------------------------------------------------------------


def prune_further(host: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A step, masks tightened with the moments of what goes, another step."""
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
    pruner = GradualPruner(host, CubicSchedule(start=0, end=2, final=0.7, initial=0.4))
    grads = []
    for time in (1, 2):
        loss_of(host(**inputs)).backward()
        grads.append(gradients(host))
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(time, optimizer)
        check_masks(host)
    moments = {n: full(optimizer.state[p]["exp_avg"]) for n, p in host.named_parameters() if p in optimizer.state}
    masks = {n: module.mask(leaf) for n, module, leaf in masked_parameters(host)}
    return {"gradients": grads, "trained": trained(host), "moments": moments, "masks": masks}


def mask_worker(rank: int, directory: str) -> None:
    start(rank, f"{directory}/store")
    host = shard(build("Mixtral", PRUNED, torch.float32))
    refusal = message_of(
        lambda: GradualPruner(host, CubicSchedule(start=0, end=2, final=0.7), names=["lm_head.weight"])
    )
    finish(rank, directory, prune_further(host, batch("Mixtral", half(rank))) | {"refusal": refusal})


@pytest.mark.slow
def test_masks_move_on_sharded_weights_and_experts_get_masked_gradients():
    """No operator masks the gradient of packed experts: a hook on the gathered parameter does."""
    with tempfile.TemporaryDirectory() as directory:
        first, second = on_two_ranks(mask_worker, directory)
    refusal = first.pop("refusal")
    assert refusal.startswith("mask_modules: fully_shard keeps the model's parameters in pieces"), refusal
    expected = prune_further(build("Mixtral", PRUNED, torch.float32), batch("Mixtral"))
    experts = [n for n in expected["masks"] if "experts" in n]
    assert experts
    assert all(bool((first["gradients"][0][n] == 0).double().mean() > 0.39) for n in experts)
    tiny.assert_same(first["masks"], expected["masks"])
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-5)
    tiny.assert_same(first["trained"], second["trained"])


# --- accelerate --------------------------------------------------------------------------------------------------------------


def accelerate_worker(rank: int, directory: str, port: int, efficient: bool) -> None:
    """accelerate offers FSDP on accelerators only: its CPU state is told that this run is one."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=efficient,
    )
    accelerator = Accelerator(cpu=True)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    found: dict[str, Any] = {}
    for name in ("s2ft", "rosa", "lora", "pruned") if efficient else ("s2ft", "rosa", "pruned"):
        model = tiny.build("Llama", torch.float64)
        if efficient and rank == 1:  # what from_pretrained gives every rank but the first: memory that nobody wrote
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(0.25)
        host: Any = sparsify.compile(model, PLANS[name], progress=False)
        optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
        host, optimizer = accelerator.prepare(host, optimizer)
        for _ in range(STEPS):
            accelerator.backward(loss_of(host(**batch("Llama", half(rank)))))
            accelerator.clip_grad_norm_(host.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(f"{directory}/{name}")
        found[name] = {
            "trained": trained(host),
            "state": accelerator.get_state_dict(host),
            "sharded": [n for n, p in host.named_parameters() if not hasattr(p, "placements")],
        }
        with torch.no_grad():
            for parameter in tiny.trainable(host):
                parameter.zero_()
        accelerator.load_state(f"{directory}/{name}")
        found[name]["resumed"] = trained(host)
        if host.sparsify.parts:
            host.sparsify.save_adapter(f"{directory}/{name} adapter")
            host.sparsify.set_adapter(None)
            found[name]["base"] = outputs_of(host)
        accelerator.free_memory()
    finish(rank, directory, found)


@pytest.mark.slow
@pytest.mark.parametrize("efficient", [False, True])
def test_accelerate_with_fsdp_version_2_trains_saves_and_resumes(efficient: bool):
    with tempfile.TemporaryDirectory() as directory:
        first, second = on_two_ranks(accelerate_worker, directory, free_port(), efficient)
        for name, result in first.items():
            host = build("Llama", PLANS[name])
            optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
            for _ in range(STEPS):
                loss_of(host(**batch("Llama"))).backward()
                torch.nn.utils.clip_grad_norm_(host.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            assert result["sharded"] == []
            if "base" in result:
                expected = tiny.build("Llama", torch.float64)
                for rank in (first, second):
                    torch.testing.assert_close(rank[name]["base"], outputs_of(expected), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(result["trained"], trained(host), rtol=1e-9, atol=1e-11)
            found, expected = (host.sparsify.original_state_dict(s) for s in (result["state"], None))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
            tiny.assert_same(result["resumed"], result["trained"])
            fresh = build("Llama", PLANS[name])
            fresh.load_state_dict(result["state"])
            tiny.assert_same(trained(fresh), result["trained"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_host_on_the_meta_device_takes_its_base_from_a_checkpoint_that_has_it():
    """What accelerate's efficient loading does, here also after training: the live state has the base beside the parts."""
    for plan in (PLANS["s2ft"], PLANS["lora"], PLANS["rosa"], Plan([Quantize(format="nf4"), LoRA(rank=2)])):
        host: Any = build("Llama", plan)
        tiny.disturb(host)
        fresh, buffers = full_state(host), {n: b.clone() for n, b in host.named_buffers()}
        host.to("meta").load_state_dict(fresh, assign=True)
        for path, buffer in buffers.items():
            owner, _, leaf = path.rpartition(".")
            setattr(host.get_submodule(owner), leaf, buffer)
        tiny.assert_same(full_state(host), fresh)
        expected = build("Llama", plan)
        tiny.disturb(expected)
        with torch.no_grad():
            assert torch.equal(host(**batch("Llama")).logits, expected(**batch("Llama")).logits)
        steps(host, batch("Llama"))
        steps(expected, batch("Llama"))
        tiny.assert_same(trained(host), trained(expected))
    for name, message in (
        ("lora", "has no base, and the checkpoint's weight has a trained part folded in"),
        ("rosa", "its support there cannot be compared with the checkpoint's"),
    ):
        host = build("Llama", PLANS[name])
        tiny.disturb(host)
        state = original(host, host.state_dict(), with_parts=True)
        with pytest.raises(StateError, match=message):
            host.to("meta").load_state_dict(state, assign=True)


# --- packed bases ------------------------------------------------------------------------------------------------------------


def packed_worker(rank: int, directory: str, formats: tuple[str, ...]) -> None:
    start(rank, f"{directory}/store")
    found: dict[str, Any] = {}
    for format in formats:
        plan = Plan([Quantize(format=format), S2FT(structure="ffn", fraction=0.2), LoRA(rank=2, match="*.q_proj")])
        host = shard(build("Llama", plan))
        codes = {n: p for n, p in host.named_parameters() if "packed_" in n}
        state = {n: full(t) for n, t in host.state_dict().items() if "packed_" in n}
        steps(host, batch("Llama", half(rank)))
        host.sparsify.merge()
        merged = {n: full(t) for n, t in host.state_dict().items() if "packed_" in n}
        host.sparsify.unmerge()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        half_host = shard(build("Llama", plan), mp_policy=policy)
        with torch.no_grad():
            half_output = tiny.output_of(half_host(**batch("Llama"))).clone()
        found[format] = {
            "here": {n: (p.to_local().numel(), p.numel()) for n, p in codes.items()},
            "kinds": {p.dtype for p in codes.values()},
            "state": state,
            "merged": merged,
            "back": {n: full(t) for n, t in host.state_dict().items() if "packed_" in n},
            "bf16": half_output,
            "bf16 scales": {b.dtype for n, b in half_host.named_buffers() if "packed_" in n},
        }
    finish(rank, directory, found)


@pytest.mark.parametrize(
    "formats",
    [
        ("nf4",),
        # one way of packing or another, by the same code: covered by the case above, and by one process in test_quantize.py
        pytest.param(("int8", "int4"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
@pytest.mark.filterwarnings("ignore:merge:UserWarning")
def test_packed_codes_lie_in_pieces_and_no_bit_of_the_base_moves(formats: tuple[str, ...]):
    """Codes are parameters, of which a rank holds half; scales are buffers, which mixed precision must not round."""
    with tempfile.TemporaryDirectory() as directory:
        first, second = on_two_ranks(packed_worker, directory, formats)
    for format, found in first.items():
        plan = Plan([Quantize(format=format), S2FT(structure="ffn", fraction=0.2), LoRA(rank=2, match="*.q_proj")])
        host = build("Llama", plan)
        assert found["here"], format
        for name, (here, everything) in found["here"].items():
            there, _ = second[format]["here"][name]
            assert here + there == everything
            assert here <= everything // 2 + everything // host.get_parameter(name).shape[0]
        assert all(not kind.is_floating_point for kind in found["kinds"])
        own = {n: t for n, t in host.state_dict().items() if "packed_" in n}
        tiny.assert_same(found["state"], own)
        assert any(not torch.equal(found["merged"][n], own[n]) for n in own), "merging packs again"
        tiny.assert_same(found["back"], own)
        assert all(kind.is_floating_point for kind in found["bf16 scales"])
        for parameter in host.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(found["bf16"], tiny.output_of(host(**batch("Llama"))))
