"""Seconds of one training step of a host, from its distinct shapes: every kind of block is measured once, on this machine.

    host of three blocks, random weights ──▶ forward and backward of the middle one, head and loss, optimizer ──▶ × 123 blocks more

The middle block's backward gives the gradient of its input and of what trains in it, whatever the method; the first block's stops where
nothing below it trains. Before every phase the caches are emptied, as they are where a block's weights lie among those of a large model.
What was measured is kept beside the kernels' timings (`sparsify.kernels.cpu.tune`), by shapes, tokens, threads and processor.

A measurement takes about `LIMIT` seconds: where a step would take longer, fewer rows (then shorter ones) are measured and the time is
scaled by the number of tokens; the optimizer's is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.api import compile
from sparsify.errors import PlanError
from sparsify.kernels.cpu.tune import cpu_name, empty_caches, other_data, recorded, remember
from sparsify.plan import Plan
from sparsify.planner.estimate import ready, sizes_only
from sparsify.planner.phases import Phases
from sparsify.planner.shallow import Repeat, repeat_of, skeleton

LIMIT = 12.0
ROUNDS = 4
SLOWEST = 2e10  # floating-point operations in a second that any machine is taken to do
PASSES = 6  # of the weights, each a multiplication and an addition: forward, and both products of the backward
SHARE = 0.5  # of the free memory that a measurement may take


@dataclass(frozen=True)
class StepTime:
    """seconds: of one step. forward, backward, optimizer: what it is made of. rows, length: what was measured; blocks: (measured, all)."""

    forward: float
    backward: float
    optimizer: float
    rows: int
    length: int
    blocks: tuple[int, int] | None

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.optimizer


def step_time(
    model: nn.Module,
    plan: Plan,
    *,
    batch: int,
    length: int,
    checkpointing: bool = False,
    limit: float = LIMIT,
    device: torch.device | None = None,
) -> StepTime:
    """Seconds of a step of AdamW on `batch` rows of `length` tokens, for a causal language model on any device, meta too.

    device: where to measure; the model's, and for meta the CPU, if not given.

    The model's values are not read: what is measured has random ones. Raises PlanError where it would not fit into the memory that is
    free, and what `sparsify.compile` raises.
    """
    repeat = repeat_of(model, plan)
    twin = skeleton(model, repeat)
    device = device or next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    check_memory(twin, device)
    fill(twin, device)
    weights = sum(p.numel() for p in twin.parameters())
    host: Any = compile(twin, placed(plan), progress=False, donate=True)
    rows, cut = measured_size(weights, batch, length, limit)
    seconds, rows = phase_seconds(host, repeat, rows, cut, batch, checkpointing, limit)
    return assembled(host, repeat, seconds, (rows, cut), batch * length)


def placed(plan: Plan) -> Plan:
    """The plan with choices that need no data, RoSA's entries among them: places do not matter, that there are some does."""
    blind = sizes_only(plan)
    rules = [
        replace(rule, mask="random") if hasattr(rule, "mask") and hasattr(rule, "density") else rule
        for rule in blind.rules
    ]  # type: ignore[call-arg]
    return replace(blind, rules=rules)


def assembled(
    host: Any, repeat: Repeat | None, seconds: dict[str, float], size: tuple[int, int], tokens: int
) -> StepTime:
    """The phases of the twin, and those of the blocks that it lacks."""
    scale, more = tokens / (size[0] * size[1]), 0 if repeat is None else repeat.more
    parts = {
        side: scale
        * sum(s * (1 + more * (name == f"{side} 1")) for name, s in seconds.items() if name.startswith(side))
        for side in ("forward", "backward")
    }
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    one = [] if repeat is None else host.get_submodule(repeat.typical).parameters()
    added = more * sum(p.numel() for p in one if p.requires_grad)
    optimizer = seconds["optimizer"] * (trained + added) / max(trained, 1)
    return StepTime(
        parts["forward"], parts["backward"], optimizer, *size, None if repeat is None else (repeat.kept, repeat.blocks)
    )


def check_memory(twin: nn.Module, device: torch.device) -> None:
    """Raises PlanError where the weights alone would fill the memory that is free, as far as that is known."""
    needed = sum(t.numel() * t.element_size() for t in {id(p): p for p in twin.parameters()}.values())
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    if needed > SHARE * free:
        raise PlanError(
            f"time: what must be measured of {type(twin).__name__} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free "
            "here: measure on a larger machine, or ask for memory alone"
        )


def fill(twin: nn.Module, device: torch.device) -> None:
    """Random weights in the place of everything on the meta device; vectors of ones, so that norms keep what they get."""
    made: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for module in twin.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    value = torch.ones(tensor.shape, dtype=tensor.dtype)
                    if tensor.is_floating_point() and tensor.dim() > 1:
                        value.normal_(std=1 / math.sqrt(tensor.shape[-1]), generator=generator)
                    value = value.to(device)
                    made[id(tensor)] = (
                        nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                    )
                store[name] = made[id(tensor)]  # type: ignore[assignment]


def measured_size(weights: int, batch: int, length: int, limit: float) -> tuple[int, int]:
    """(rows at most, length) of what is measured: shorter rows where one would take too long on the slowest machine."""
    while length > 64 and PASSES * weights * length / SLOWEST > 4 * limit:
        length //= 2
    return batch, length


def phase_seconds(
    host: Any, repeat: Repeat | None, rows: int, length: int, batch: int, checkpointing: bool, limit: float
) -> tuple[dict[str, float], int]:
    """(seconds of every phase, rows that were measured); from the record where this was measured before."""
    ready(host, checkpointing)
    key = record_key(host, rows, length, checkpointing)
    known = recorded(key)
    if known is not None:
        seconds = dict(known.seconds)
        return seconds, round(seconds.pop("rows"))
    clock = Clock(next(host.parameters()).device)
    with clock.kept_ready():
        one = sum(clock.step(host, repeat, 1, length).values())  # compiles kernels, makes the optimizer's moments
        one = min(one, sum(clock.step(host, repeat, 1, length).values()))
        rows = max(1, min(rows, int(limit / (one * ROUNDS))))
        best: dict[str, float] = {}
        begin = time.perf_counter()
        for number in range(ROUNDS + 1):
            for phase, seconds_of in clock.step(host, repeat, rows, length).items():
                best[phase] = min(seconds_of, best.get(phase, math.inf))
            if number >= 1 and time.perf_counter() - begin > 2 * limit:
                break
    remember(key, {"seconds": {**best, "rows": float(rows)}, "steady": True})
    return best, rows


def record_key(host: nn.Module, rows: int, length: int, checkpointing: bool) -> str:
    """A name for everything that a time depends on."""
    tensors = [*host.named_parameters(), *host.named_buffers()]
    shapes = [(name, list(t.shape), str(t.dtype), t.requires_grad) for name, t in tensors]
    device = next(host.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    kernels = os.environ.get("SPARSIFY_KERNELS", "")
    settings = [
        type(host).__name__,
        shapes,
        rows,
        length,
        checkpointing,
        where,
        torch.get_num_threads(),
        torch.__version__,
        kernels,
    ]
    return "step/" + hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


class Clock:
    """Times the phases of steps of one host, each with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.optimizer: Any = None
        self.phase, self.seconds = "", dict[str, float]()
        self.began = (0.0, 0.0)

    @contextlib.contextmanager
    def kept_ready(self) -> Iterator[None]:
        """Gives back what empties the caches when nothing is left to measure."""
        try:
            yield
        finally:
            other_data.cache_clear()

    def now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.thread_time()

    def mark(self, phase: str) -> None:
        wall, own = (a - b for a, b in zip(self.now(), self.began, strict=True))
        alone = (
            self.device.type == "cpu" and torch.get_num_threads() == 1
        )  # then waiting for a processor does not count
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + (min(wall, own) if alone and own > 0 else wall)
        self.phase = phase
        if self.device.type == "cpu":
            empty_caches()
        self.began = self.now()

    def step(self, host: Any, repeat: Repeat | None, rows: int, length: int) -> dict[str, float]:
        """One step of training; seconds by phase ("forward …", "backward …", "optimizer")."""
        if self.optimizer is None:
            trained = [p for p in host.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
        vocabulary = host.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).to(self.device)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # as rows of different lengths have it, and as memory is counted
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        self.phase, self.seconds, self.began = "nothing", {}, self.now()
        with Phases(host, repeat, self.mark) as phases:
            phases.begin()
            self.phase = "forward tail"  # before the first block
            loss = host(**inputs, use_cache=False).loss
            phases.backward()
            loss.backward()
            phases.optimizer()
            self.optimizer.step()
        self.mark("end")
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.pop("nothing", None)
        return dict(self.seconds)


__all__ = ["LIMIT", "StepTime", "step_time"]
