"""RoSA's schedule (arXiv 2401.04679): low-rank warm-up → collect the masks → restart from the base with both parts.

    model = sparsify.compile(model, Plan([RoSA(rank=16, density=0.006)]))     no calibration: the masks stay open
    …train 64 steps: only the low-rank part moves…
    collect_masks(model, batches, optimizer=optimizer)                       choose the supports, restart
    …train…                                                                  both parts

The paper's second run is a full run. In a loop of your own, what `collect_masks` cannot know of starts anew by hand:

    optimizer = AdamW(param_groups(model, lr=2e-4, lora_lr=7e-4)); schedule = …           for the warm-up, over its 64 steps
    collect_masks(model, batches)
    model.sparsify.restart()                                                              everything that trained is the base again
    optimizer = AdamW(param_groups(model, lr=2e-4, lora_lr=7e-4)); schedule = …           new, over all steps of the run
    for batch in loader: …                                                                from the first batch

Under Hugging Face's Trainer: `train_rosa(trainer, batches, warmup_steps=64)`, or in one run `callbacks=[RosaCallback(batches)]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.calibration.statistics import need_batches
from sparsify.errors import SparsifyError
from sparsify.model.linears import owner_name
from sparsify.passes.base import Context
from sparsify.passes.select_linears import gradient_supports
from sparsify.train.rosa_trainer import restart_schedule

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from sparsify.calibration.statistics import Loss
    from sparsify.host.handle import Handle
    from sparsify.program.values import Batch


def collect_masks(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    restart: bool = True,
    progress: bool = True,
) -> dict[str, Int[Tensor, " k"]]:
    """Choose every open support from gradients at the model's *current* state, then restart from the base.

    batches: calibration batches with labels, or with `loss(outputs, batch)`. One dense gradient is alive at a time.
    optimizer: its state for the restarted parameters is dropped (moments of the warm-up belong to other weights).
    progress: show a bar on stderr.
    restart: put the low-rank factors back to their start (the paper's recipe); False goes on from the warm-up.

    Under `torch.distributed` the batches of all ranks count: scores are averaged, so that the supports are equal on every rank.
    Returns the supports by parameter name, flat in the stored weight, original coordinates.
    """
    handle = handle_of(model)
    pending = handle.open_masks()
    if not pending:
        raise SparsifyError(
            "collect_masks: no mask is open; the supports are fixed already, or the plan has no RoSA rule"
        )
    found = need_batches(list(batches), "collect_masks")
    parts = {p.param: p for p in handle.program.lowranks}
    by_mask: dict[str, list[str]] = {}
    for param in pending:
        by_mask.setdefault(parts[param].mask, []).append(param)
    context = Context(handle.plan, found, loss, progress=progress)
    supports: dict[str, Tensor] = {}
    for mask, params in by_mask.items():
        modules = {p: handle.host.get_submodule(owner_name(p)) for p in params}
        counts = {p: parts[p].count for p in params}
        supports |= gradient_supports(handle.host, modules, counts, mask, found, context, handle.program.masks)
    supports = {p: to_original(handle, p, index) for p, index in supports.items()}
    handle.set_masks(supports)
    if restart:
        handle.reset_lowrank()
    if optimizer is not None:
        forget(optimizer, [q for p in pending for q in handle.parts[p].parameters()])
    return supports


def to_original(handle: Handle, param: str, index: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
    """Flat entries of a stored weight from current to original coordinates, sorted."""
    shape = handle.shapes()[param]
    places = list(torch.unravel_index(index.long(), shape))
    for axis, move in handle.layout(param).moves.get(param.rpartition(".")[2], []):
        places[axis] = move[places[axis]]
    return (places[0] * shape[1] + places[1]).sort().values


def forget(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Drop an optimizer's state (moments, steps) and gradients for some parameters."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
        parameter.grad = None


def handle_of(model: nn.Module | None) -> Handle:
    inner = getattr(model, "module", model)
    handle = inner.__dict__.get("sparsify")
    if handle is None:
        raise SparsifyError(f"{type(inner).__name__} was not compiled by sparsify")
    return handle


def RosaCallback(
    batches: Iterable[Batch],
    *,
    warmup_steps: int = 64,
    loss: Loss | None = None,
    progress: bool = True,
) -> TrainerCallback:
    """A `transformers.TrainerCallback` that collects the masks after `warmup_steps` optimizer steps and restarts, inside one run.

    Factors, their optimizer state and the learning-rate schedule (with its warm-up, over the steps that are left) start anew; what else
    trains, and the data, go on. The paper's second run is a full one beside the warm-up: `sparsify.train.rosa_trainer.train_rosa`.
    batches, loss, progress: as in `collect_masks`.

    A run that resumes from a checkpoint taken after the collection finds the supports in the checkpoint and leaves them alone.
    """
    from transformers import TrainerCallback

    kept = list(batches)

    class Callback(TrainerCallback):
        """Low-rank warm-up, mask collection, restart."""

        def on_train_begin(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            model: nn.Module | None = None,
            lr_scheduler: LRScheduler | None = None,
            **_: object,
        ) -> None:
            resumed = model is not None and state.global_step > warmup_steps and not handle_of(model).open_masks()
            if resumed and lr_scheduler is not None:
                restart_schedule(lr_scheduler, args, max(1, state.max_steps - warmup_steps), rewind=False)

        def on_step_end(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            model: nn.Module | None = None,
            optimizer: torch.optim.Optimizer | None = None,
            lr_scheduler: LRScheduler | None = None,
            **_: object,
        ) -> None:
            if model is None or state.global_step < warmup_steps or not handle_of(model).open_masks():
                return
            inner = getattr(optimizer, "optimizer", optimizer)
            collect_masks(model, kept, loss=loss, optimizer=inner, progress=progress)
            if lr_scheduler is not None:
                restart_schedule(lr_scheduler, args, max(1, state.max_steps - state.global_step))

    return Callback()
