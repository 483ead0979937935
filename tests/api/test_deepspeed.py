"""DeepSpeed's ZeRO-2 and ZeRO-3 on two gloo processes: trains as one process with the joint batch; adapters are saved when gathered."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import socket
import tempfile
from contextlib import AbstractContextManager
from typing import Any

import processes
import pytest
import tiny
import torch
import torch.distributed as dist
import trace_cache
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, Plan, Quantize, RoSA, SparsifyError
from sparsify.adapters.adapter import load

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed") or not dist.is_available() or not dist.is_gloo_available(),
    reason="needs deepspeed (pip install '.[deepspeed]') and gloo",
)
PLANS = {
    "s2ft": Plan([S2FT(structure="ffn", fraction=0.2)], train=["model.norm"]),
    "rosa": Plan([RoSA(rank=2, density=0.05, mask="random")]),
    "lora over nf4": Plan([Quantize(format="nf4"), LoRA(rank=2)]),
}
STEPS = 3
#: of a packed base the weight itself is empty, and ZeRO-3 fails where it gathers an empty parameter (deepspeed 0.19)
OF_STAGE = {2: tuple(PLANS), 3: ("s2ft", "rosa")}


def build(name: str) -> Any:
    return sparsify.compile(tiny.build("Llama", torch.float32), PLANS[name], progress=False)


def loss_of(host: Any, rows: slice) -> Tensor:
    """A mean over rows, so that the mean over ranks of equal shares is the loss of all rows."""
    y = tiny.output_of(host(input_ids=tiny.tokens(4, 9)[rows]))
    return (y * torch.linspace(-1.0, 1.3, y[0].numel()).view(y[0].shape)).square().mean()


def optimizer_of(host: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tiny.trainable(host), lr=1e-2)


def outputs_of(host: Any) -> Tensor:
    with torch.no_grad():
        return tiny.output_of(host(input_ids=tiny.tokens(4, 9))).clone()


def worker(rank: int, directory: str, stage: int, port: int) -> None:
    torch.set_num_threads(1)
    trace_cache.install()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "DS_ACCELERATOR": "cpu",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    deepspeed: Any = importlib.import_module("deepspeed")
    # it would compile an operator for shared memory first; gloo does
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="gloo")
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
    }
    found: dict[str, Any] = {}
    for name in OF_STAGE[stage]:
        host = build(name)
        engine = deepspeed.initialize(model=host, optimizer=optimizer_of(host), config=copy.deepcopy(settings))[0]
        losses = []
        for _ in range(STEPS):
            loss = loss_of(engine, slice(2 * rank, 2 * rank + 2))
            engine.backward(loss)
            engine.step()
            dist.all_reduce(loss := loss.detach())
            losses.append(loss / 2)
        empty = [n for n, p in host.named_parameters() if p.numel() == 0]
        refusal = ""
        try:
            host.sparsify.save_adapter(f"{directory}/{name}")
        except SparsifyError as error:
            refusal = str(error)

        def whole(host: nn.Module = host) -> AbstractContextManager[Any]:
            if stage < 3:
                return contextlib.nullcontext()
            return deepspeed.zero.GatheredParameters(list(host.parameters()), modifier_rank=0)

        with whole():
            trained = {n: p.detach().clone() for n, p in host.named_parameters() if p.requires_grad}
            host.sparsify.save_adapter(f"{directory}/{name}")
            state = {n: t.clone() for n, t in host.sparsify.original_state_dict().items()}
        outputs = outputs_of(engine)
        with whole():
            host.sparsify.set_adapter(None)
        base = outputs_of(engine)
        with whole():
            host.sparsify.set_adapter("default")
        found[name] = {
            "losses": losses, "trained": trained, "state": state, "outputs": outputs, "base": base, "back": outputs_of(engine),
            "empty": empty, "refusal": refusal,
        }  # fmt: skip
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # an optional package; what it does to a host is what fully_shard does, in test_fsdp2.py
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_as_one_process(stage: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        processes.spawn(worker, (directory, stage, port), 2)
        first, second = (torch.load(f"{directory}/{rank}.pt", weights_only=False) for rank in (0, 1))
        for name, found in first.items():
            host = build(name)
            base = outputs_of(host)
            optimizer, losses = optimizer_of(host), []
            for _ in range(STEPS):
                loss = loss_of(host, slice(None))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            trained = {n: p.detach() for n, p in host.named_parameters() if p.requires_grad}
            close: dict[str, Any] = {"rtol": 1e-3, "atol": 5e-5}
            torch.testing.assert_close(found["losses"], losses, **close)
            torch.testing.assert_close(found["trained"], trained, **close)
            torch.testing.assert_close(found["state"], host.sparsify.original_state_dict(), **close)
            torch.testing.assert_close(found["outputs"], outputs_of(host), rtol=1e-2, atol=1e-3)
            torch.testing.assert_close(found["base"], base, rtol=1e-5, atol=1e-5)
            assert torch.equal(found["back"], found["outputs"])
            tiny.assert_same(found["trained"], second[name]["trained"])
            assert ("lies in pieces of DeepSpeed's ZeRO-3" in found["refusal"]) == (stage == 3)
            assert stage == 2 or set(found["empty"]) == {n for n, _ in host.named_parameters()}, "each lies in pieces"
            assert load(f"{directory}/{name}").deltas
