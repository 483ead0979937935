"""What one rank writes, every rank knows of: on two gloo processes all raise the same SparsifyError, and the old file stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import processes
import tiny

import sparsify
from sparsify import LoRA, Plan
from sparsify.adapters.adapter import load
from sparsify.files.ranks import on_first_rank

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def outcome(call: Any) -> tuple[str, str, bool]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), isinstance(error, sparsify.SparsifyError)
    return "", "", False


def worker(rank: int, directory: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    host: Any = sparsify.compile(tiny.Mlp(), Plan([LoRA(rank=2)]), example=torch.randn(2, 12), progress=False)
    fully_shard(host)
    handle, here = host.sparsify, Path(directory)
    (here / "file").write_text("x")

    def divide() -> None:
        raise ZeroDivisionError(f"on rank {rank}")

    found = {
        "fine": outcome(lambda: handle.save_adapter(here / "a")),
        "a file in the way": outcome(lambda: handle.save_adapter(here / "file")),
        "a file in the way of PEFT": outcome(lambda: handle.export_lora(here / "file")),
        "beside": outcome(lambda: handle.export_lora(here / "a")),
        "another error": outcome(lambda: on_first_rank(divide)),
        "fine again": outcome(lambda: handle.export_lora(here / "peft")),
    }
    torch.save(found, here / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_raise_what_the_first_one_met(tmp_path: Path) -> None:
    processes.spawn(worker, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["fine"] == second["fine"] == first["fine again"] == second["fine again"] == ("", "", False)
    assert load(tmp_path / "a").deltas
    for label in ("a file in the way", "a file in the way of PEFT", "beside"):
        assert first[label][1] == second[label][1] != ""
        assert first[label][2]
        assert second[label][2]
    assert "could not be written" in second["a file in the way"][1]
    assert first["beside"][0] == second["beside"][0] == "AdapterError"
    assert first["another error"] == ("ZeroDivisionError", "on rank 0", False)
    assert second["another error"] == (
        "SparsifyError",
        "the first rank could not write: ZeroDivisionError: on rank 0",
        True,
    )


def test_without_processes_it_is_just_the_call() -> None:
    calls: list[int] = []
    on_first_rank(lambda: calls.append(1))
    assert calls == [1]
    with pytest.raises(ZeroDivisionError):
        on_first_rank(lambda: 1 // 0)
