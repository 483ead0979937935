"""DistributedDataParallel on two gloo processes: equal selections, averaged gradients, the same training as one process."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

import sparsify
from sparsify import S2FT, CaptureError

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
RULE = S2FT(fraction=0.15, producer_fraction=0.1)
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
        mp.spawn(worker, args=(f"{directory}/store", directory), nprocs=2)
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
