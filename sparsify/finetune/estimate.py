"""What a plan costs before anything is loaded: parameters, memory of one training step, size of the adapter, traffic between processes.

    config ─▶ model on the meta device ─▶ host ─▶ forward, backward and AdamW over fake tensors, every storage counted while it lives

No weights and no memory are needed, and nothing is fitted: the bytes are those of the tensors that the step would make, of the same shapes
and dtypes, on the CPU's kernels. Not in it: what an allocator keeps beside them, and workspaces of a GPU's libraries. Rules that choose by
data choose at random here; what trains is of the same size.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.plan import DATA_DRIVEN, Plan, Rule

BACKWARD_FACTOR = 2  # FSDP gathers the parameters for the forward and, freed in between, again for the backward


@dataclass(frozen=True)
class Step:
    """Bytes of one training step. saved: kept for the backward, without parameters. peak: the most that lives at one time."""

    weights: int
    trained: int
    saved: int
    peak: int


@dataclass(frozen=True)
class Ranks:
    """Of each of `world` processes. memory: bytes at the peak, expected. sent: bytes that it sends in one step."""

    world: int
    sharded: bool
    memory: int
    sent: int


@dataclass(frozen=True)
class Estimate:
    """found: structures by kind. chosen, declined: lines of the report. lora_rank: what an export to LoRA would need; None where it is
    not possible. adapter: bytes of the file at least (values and places; where `base + change` is not the trained value in the base's
    dtype, that is kept too)."""

    model: str
    found: dict[str, int]
    trainable: int
    total: int
    batch: int
    length: int
    step: Step
    full: Step | None
    adapter: int
    lora_rank: int | None
    budgets: tuple[str, ...]
    declined: tuple[str, ...]
    ranks: Ranks | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    model: nn.Module,
    plan: Plan,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    full: bool = True,
    world: int = 1,
    sharded: bool = False,
) -> Estimate:
    """Estimate a plan for a causal language model whose parameters lie on the meta device (`with torch.device("meta"): …`).

    dtype: of the weights, as they are by default. full: also a step of full fine-tuning, to compare with. world, sharded: processes of
    DDP, or with `sharded` of FSDP2 over the model's blocks. Raises what `sparsify.compile` raises.
    """
    import sparsify

    if dtype is not None:
        model = model.to(dtype)
    host: Any = sparsify.compile(model, sizes_only(plan), progress=False)
    report, program = host.sparsify.report, host.sparsify.program
    shape = {"batch": batch, "length": length, "checkpointing": gradient_checkpointing}
    numbers, places = adapter_size(host)
    largest = largest_block(host)
    step = measured(host, **shape)
    whole = measured(model.requires_grad_(True), **shape) if full else None
    ranks = None
    if world > 1:
        ranks = (
            shared_out(step, largest, world) if sharded else Ranks(world, False, step.peak, ring(step.trained, world))
        )
    return Estimate(
        report.model, report.found, report.trainable, report.total, batch, length, step, whole, numbers * 4 + places * 8,
        lora_rank(program), tuple(map(str, report.budgets)), tuple(map(str, report.declined)), ranks,
    )  # fmt: skip


def sizes_only(plan: Plan) -> Plan:
    """The plan with choices that need no data and no weights, of the same sizes."""
    return dataclasses.replace(plan, rules=[blind(rule) for rule in plan.rules], check="none")


def blind(rule: Rule) -> Rule:
    changes: dict[str, Any] = {}
    if getattr(rule, "select", "random") in (*DATA_DRIVEN, "weight"):
        changes["select"] = "random"
    if hasattr(rule, "mask") and hasattr(rule, "density"):
        changes["mask"] = "gradient"  # left open without calibration: the size is known, the places are not
    if getattr(rule, "avoid", ()):
        changes["avoid"] = ()
    return dataclasses.replace(rule, **changes) if changes else rule


def adapter_size(host: Any) -> tuple[int, int]:
    """(numbers, places) that an adapter of the host holds."""
    numbers = sum(p.numel() for p in host.parameters() if p.requires_grad)
    program = host.sparsify.program
    places = sum(len(piece.channels) for piece in program.slices)
    places += sum(getattr(part, "count", 0) or 0 for part in program.parts)
    return numbers, places


def lora_rank(program: Any) -> int | None:
    """The rank of the largest change of one weight; None where scattered entries train, which no low-rank matrix equals."""
    ranks: dict[str, int] = {}
    for piece in program.slices:
        ranks[piece.param] = ranks.get(piece.param, 0) + len(piece.channels)
    for part in program.parts:
        if getattr(part, "count", 0):
            return None
        ranks[part.param] = ranks.get(part.param, 0) + int(getattr(part, "rank", 0) or 0)
    return max(ranks.values(), default=0)


# --- one step ---


def measured(model: nn.Module, *, batch: int, length: int, checkpointing: bool) -> Step:
    """A training step of a model on the meta device, over fake tensors; the model is not usable afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        materialise(model)
        ids = torch.zeros(batch, length, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}
    return one_step(model, inputs, checkpointing, mode)


def materialise(model: nn.Module) -> None:
    """Put fake tensors of the CPU in the place of everything that lies on the meta device; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if id(tensor) not in made:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                    )
                    made[id(made[id(tensor)])] = tensor  # keeps it alive, so that its id is its own
                store[name] = made[id(tensor)]


def one_step(model: nn.Module, inputs: Mapping[str, Tensor], checkpointing: bool = False, mode: Any = None) -> Step:
    """Forward, backward and a step of AdamW on a batch of rows that are padded, every storage counted. mode: a FakeTensorMode, or None
    for a real step, whose values are then real too."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):  # type: ignore[operator]
            model.enable_input_require_grads()  # type: ignore[operator]
    trained = [p for p in model.parameters() if p.requires_grad]
    own = {id(storage_of(t)): size_of(t) for t in (*model.parameters(), *model.buffers())}
    live = Live()
    for tensor in (*model.parameters(), *model.buffers(), *inputs.values()):
        live.add(tensor)
    with mode or nullcontext(), live:
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, foreach=False)
        for parameter in (
            trained
        ):  # every step but the first finds moments that are there: a step on zeros makes them and moves nothing
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with kept_for_backward() as kept:
            loss: Any = model(**inputs, use_cache=False).loss
        saved = sum(size for key, size in kept.items() if key not in own)
        kept.clear()
        loss.backward()
        del loss
        optimizer.step()
    return Step(sum(own.values()), sum(size_of(p) for p in trained), saved, live.peak)


@contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Storage → bytes of everything that autograd keeps inside."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[id(storage_of(tensor))] = size_of(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def storage_of(tensor: Tensor) -> Any:
    """One Python object for as long as the memory lives."""
    return tensor.untyped_storage()


def size_of(tensor: Tensor) -> int:
    return storage_of(tensor).nbytes()


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, from their first appearance until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return found

    def add(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        key = id(storage)
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = weakref.finalize(storage, self.drop, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def drop(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.now -= size


# --- several processes ---


def largest_block(model: nn.Module) -> int:
    """Bytes of the largest block of the model and of what lies outside of its blocks: what FSDP has whole at one time."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(sizes, default=0) * 2 + whole - sum(sizes)  # the next one is gathered while one computes


def shared_out(step: Step, gathered: int, world: int) -> Ranks:
    """FSDP2 over blocks: parameters, gradients and moments in pieces, one block whole (and the next); activations are each one's own."""
    states = step.weights + 3 * step.trained
    memory = math.ceil(states / world) + min(gathered, step.weights) + max(0, step.peak - states)
    gather = BACKWARD_FACTOR * step.weights * (world - 1) // world
    return Ranks(world, True, memory, gather + step.trained * (world - 1) // world)


def ring(size: int, world: int) -> int:
    """Bytes that each process sends in a ring all-reduce of `size` bytes."""
    return 2 * size * (world - 1) // world


__all__ = ["Estimate", "Ranks", "Step", "estimate"]
