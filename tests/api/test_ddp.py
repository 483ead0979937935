"""DistributedDataParallel on two gloo processes: equal selections, averaged gradients, the same training as one process."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import processes
import tiny

import sparsify
from sparsify import S2FT, CaptureError, LoRA, PaCA, Plan, Prune, RoSA, SparsifyError
from sparsify.modules.masked import masked_parameters

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
RULE = S2FT(fraction=0.15, producer_fraction=0.1, budget="structure")
STEPS = 3


def batch() -> torch.Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def model() -> torch.nn.Module:
    torch.manual_seed(11)
    return tiny.Mlp().double()


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).square().mean()


def worker(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    base = model()
    torch.manual_seed(1000 + rank)  # the ranks' global generators differ
    host = tiny.lower(base, RULE, example=batch())
    choices = [str(c) for c in host.sparsify.program.choices]
    wrapped = torch.nn.parallel.DistributedDataParallel(host)
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
    grads = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped(batch().chunk(2)[rank])).backward()
        grads.append([p.grad.clone() for p in tiny.trainable(host)])
        optimizer.step()
    try:
        sparsify.compile(wrapped, sparsify.Plan([RULE]), example=batch())
        refusal = ""
    except CaptureError as error:
        refusal = str(error)
    torch.save(
        {"choices": choices, "grads": grads, "state": host.state_dict(), "refusal": refusal}, f"{results}/{rank}.pt"
    )
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_the_joint_batch():
    with tempfile.TemporaryDirectory() as directory:
        processes.spawn(worker, (f"{directory}/store", directory), 2)
        first, second = (torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["choices"] == second["choices"]
    for a, b in zip(first["grads"], second["grads"], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "gradients must be averaged"
    tiny.assert_same(first["state"], second["state"])
    assert "DistributedDataParallel wraps the model: call sparsify.compile on the model first" in first["refusal"]

    host = tiny.lower(model(), RULE, example=batch())
    assert [str(c) for c in host.sparsify.program.choices] == first["choices"]
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(host(batch())).backward()
        for p, g in zip(tiny.trainable(host), first["grads"][step], strict=True):
            torch.testing.assert_close(p.grad, g)
        optimizer.step()
    for name, value in host.state_dict().items():
        torch.testing.assert_close(first["state"][name], value)


PLANS = {
    "s2ft": [S2FT(fraction=0.2, select="gradient", budget="structure")],
    "paca": [PaCA(rank=3, select="activation")],
    "rosa": [RoSA(rank=2, density=0.05, mask="gradient")],
    "mixed": [PaCA(match="*.up", rank=2, select="gradient"), LoRA(match="*", rank=2)],
}


def local_calibration(rank: int) -> list[torch.Tensor]:
    return [torch.randn(6, 12, generator=torch.Generator().manual_seed(40 + rank), dtype=torch.float64)]


def build(name: str, calibration: list[torch.Tensor]) -> torch.nn.Module:
    plan = Plan(PLANS[name])
    return sparsify.compile(
        model(), plan, example=batch(), calibration=calibration, loss=lambda y, _: loss_of(y), progress=False
    )


def chosen(host: torch.nn.Module) -> dict[str, object]:
    program = host.sparsify.program  # type: ignore[union-attr]
    return {
        "units": [(c.structure, c.consumers, c.producers) for c in program.choices],
        "columns": [c.channels for c in program.channel_choices],
        "entries": [None if s.index is None else s.index.tolist() for s in program.lowranks],
    }


#: what looks at weights alone
WITHOUT_DATA = {
    "s2ft by weight": [S2FT(fraction=0.2, select="weight", budget="structure")],
    "paca by weight": [PaCA(rank=3, select="weight")],
    "pruned": [Prune(sparsity=0.5, method="magnitude")],
}
BY_DATA = [Prune(sparsity=0.5, method="wanda")]


def unwritten(rank: int, name: str) -> object:
    """What a rank chooses, or why it does not, when only the first one has weights (accelerate's efficient loading): NaN elsewhere."""
    base = model()
    if rank:
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.fill_(float("nan"))
    plan = Plan({**WITHOUT_DATA, **PLANS, "pruned by data": BY_DATA}[name])
    options = {} if name in WITHOUT_DATA else {"calibration": local_calibration(0), "loss": lambda y, _: loss_of(y)}
    try:
        host = sparsify.compile(base, plan, example=batch(), progress=False, **options)
    except SparsifyError as error:
        return str(error)
    masks = {n: module.mask(leaf) for n, module, leaf in masked_parameters(host)}
    return chosen(host), {n: m.tolist() for n, m in masks.items()}


def data_worker(rank: int, store: str, results: str) -> None:
    """Each rank calibrates on other data; then trains every method for a step."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # first, for gloo's thread lets go of a gathering's tensors a little later, and a Reducer that ends meanwhile waits for it for ever
    found = {"unwritten": {name: unwritten(rank, name) for name in (*WITHOUT_DATA, *PLANS, "pruned by data")}}
    for name in PLANS:
        host = build(name, local_calibration(rank))
        start = {n: p.detach().clone() for n, p in host.named_parameters() if p.requires_grad}
        wrapped = torch.nn.parallel.DistributedDataParallel(host)
        loss_of(wrapped(batch().chunk(2)[rank])).backward()
        grads = {n: p.grad.clone() for n, p in host.named_parameters() if p.requires_grad and p.grad is not None}
        found[name] = {"chosen": chosen(host), "start": start, "grads": grads}
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_with_different_data_choose_and_train_the_same():
    with tempfile.TemporaryDirectory() as directory:
        processes.spawn(data_worker, (f"{directory}/store", directory), 2)
        first, second = (torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in (0, 1))
    for name in PLANS:
        reasons = (first["unwritten"][name], second["unwritten"][name], first["unwritten"]["pruned by data"])
        assert all("rank 1 holds other weights than rank 0" in reason for reason in reasons)
    for name, rules in WITHOUT_DATA.items():
        alone = sparsify.compile(model(), Plan(rules), example=batch(), progress=False)
        masks = {n: module.mask(leaf).tolist() for n, module, leaf in masked_parameters(alone)}
        assert first["unwritten"][name] == second["unwritten"][name] == (chosen(alone), masks), name
    for name in PLANS:
        a, b = first[name], second[name]
        assert a["chosen"] == b["chosen"], name
        tiny.assert_same(a["start"], b["start"])
        tiny.assert_same(a["grads"], b["grads"])
        joint = build(name, local_calibration(0) + local_calibration(1))
        assert chosen(joint) == a["chosen"], "the ranks together choose as one process that has all the data"
        loss_of(joint(batch())).backward()
        grads = {n: p.grad for n, p in joint.named_parameters() if p.grad is not None}
        assert grads
        assert set(grads) == set(a["grads"])
        for n, g in grads.items():
            torch.testing.assert_close(a["grads"][n], g)
    alone = {name: chosen(build(name, local_calibration(0))) for name in PLANS}
    assert any(alone[name] != first[name]["chosen"] for name in PLANS), "the data decide, or the test shows nothing"
