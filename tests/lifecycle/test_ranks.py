"""Every method on two gloo processes: DistributedDataParallel and fully_shard train as one process does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import lifecycle_cases as cases
import processes
import tiny
from lifecycle_cases import METHODS
from torch.distributed.fsdp import fully_shard

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
NAMES = [name if name == "DoRA" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


def loss_of(outputs: Any) -> torch.Tensor:
    """A mean over rows, so that the mean over ranks of equal shares is the loss of all rows."""
    y = tiny.output_of(outputs).double()
    return (y * torch.linspace(-1.0, 1.3, y[0].numel(), dtype=y.dtype).view(y[0].shape)).square().mean()


def steps(model: torch.nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    for _ in range(2):
        loss_of(model(input_ids=tiny.tokens(4, 9)[rows])).backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    host = cases.compiled(name, seed=3)
    steps(torch.nn.parallel.DistributedDataParallel(host), rows)
    sharded = cases.compiled(name, seed=3)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    steps(sharded, rows)
    sharded.sparsify.save_adapter(f"{folder}/adapter")
    state = sharded.sparsify.original_state_dict()
    torch.save({"ddp": cases.trained(host), "original": state}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_as_one_process(name, tmp_path):
    processes.spawn(worker, (name, str(tmp_path)), 2)
    host = cases.compiled(name, seed=3)
    steps(host, slice(None))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
    tiny.assert_same(first["ddp"], second["ddp"])
    torch.testing.assert_close(first["ddp"], cases.trained(host), **close)
    torch.testing.assert_close(first["original"], host.sparsify.original_state_dict(), **close)
    other = cases.compiled(name)
    other.sparsify.load_adapter(tmp_path / "adapter", "a")
    other.sparsify.set_adapter("a")
    torch.testing.assert_close(cases.trained(other), cases.trained(host), **close)
