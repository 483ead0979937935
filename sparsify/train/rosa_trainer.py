"""RoSA's two runs under Hugging Face's Trainer (arXiv 2401.04679): the second is a full run, from the pretrained weights.

warm-up: the low-rank part alone ─▶ collect the masks ─▶ everything anew: weights, factors, optimizer, learning-rate schedule, data ─▶ run

train_rosa(trainer, batches, warmup_steps=64)                      two calls of train(); restart="extra": args' steps are the second run's
train_rosa(trainer, batches, restart="inside")                     args' steps are those of both together
Trainer(…, callbacks=[RosaCallback(batches, warmup_steps=64)])     one call, always "inside"; the data goes on where they are
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch

from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import TrainOutput

    from sparsify.calibration.statistics import Loss
    from sparsify.program.values import Batch


def train_rosa(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    warmup_steps: int = 64,
    restart: Literal["extra", "inside"] = "extra",
    loss: Loss | None = None,
    progress: bool = True,
) -> TrainOutput:
    """Run RoSA's warm-up, collect the masks from `batches`, and train again from the base; returns what the second `train()` returns.

    warmup_steps: of the optimizer, in which the low-rank part trains alone; the paper has 64.
    restart: whether the warm-up's steps come on top of those that the arguments ask for ("extra", the paper's), or are taken from them.
    loss, progress: as in `collect_masks`.

    The second run is the one that a new Trainer with the same seed would do over the collected supports.
    Checkpoints are written in the second run only; `trainer.train(resume_from_checkpoint=…)` resumes one and finds the supports in it.

    Raises SparsifyError: no mask is open; an optimizer of the user's own, which cannot be made anew; fewer steps than the warm-up.
    """
    from transformers import TrainerCallback, set_seed

    from sparsify.train.rosa import collect_masks, handle_of

    class Stop(TrainerCallback):
        """Ends the warm-up, which writes nothing."""

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            control.should_save = control.should_evaluate = False
            control.should_training_stop |= state.global_step >= warmup_steps

    if restart not in ("extra", "inside"):
        raise SparsifyError(f"train_rosa(restart={restart!r}): expected 'extra' or 'inside'")
    if trainer.optimizer is not None:
        raise SparsifyError(
            "train_rosa makes the optimizer anew for its second run, and this trainer was given one: leave `optimizers` out "
            "(optimizer_cls_and_kwargs is kept), or write the loop yourself around collect_masks"
        )
    model = trainer.model
    handle = handle_of(model)
    assert model is not None
    if not handle.open_masks():
        raise SparsifyError("train_rosa: no mask is open; the supports are fixed already, or the plan has no RoSA rule")
    stop, asked = Stop(), trainer.args.max_steps
    trainer.add_callback(stop)
    try:
        trainer.train()
        total = trainer.state.max_steps
        if trainer.state.global_step < warmup_steps or (restart == "inside" and total <= warmup_steps):
            raise SparsifyError(f"train_rosa: {warmup_steps} steps of warm-up do not fit into a run of {total}")
    finally:
        trainer.remove_callback(stop)
    collect_masks(model, batches, loss=loss, progress=progress)
    handle.restart()
    trainer.optimizer = trainer.lr_scheduler = None
    model.zero_grad(set_to_none=True)
    set_seed(trainer.args.seed)
    try:
        if restart == "inside":
            trainer.args.max_steps = total - warmup_steps
        return trainer.train()
    finally:
        trainer.args.max_steps = asked


def restart_schedule(scheduler: LRScheduler, args: TrainingArguments, steps: int, *, rewind: bool = True) -> None:
    """Let a running learning-rate schedule of transformers be one over `steps` steps, with its warm-up, from its beginning.

    rewind: False only exchanges the curve, for a run that resumes (where it was stands in the checkpoint). A schedule that is no curve
    over steps (on a plateau) goes on, with a warning.
    """
    from transformers import get_scheduler

    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        warnings.warn(
            f"RosaCallback: {type(inner).__name__} is no curve over steps, so it is not restarted", stacklevel=3
        )
        return
    stand_in = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)]} for _ in inner.base_lrs], lr=1.0)
    own = args.lr_scheduler_kwargs
    fresh = get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=own if isinstance(own, dict) else None,
    )
    assert isinstance(fresh, torch.optim.lr_scheduler.LambdaLR)  # of one kind with `inner`
    inner.lr_lambdas = fresh.lr_lambdas
    if rewind:
        inner.last_epoch, inner._step_count = 0, 1
        inner._last_lr = [base * curve(0) for base, curve in zip(inner.base_lrs, inner.lr_lambdas, strict=True)]
        for group, lr in zip(inner.optimizer.param_groups, inner._last_lr, strict=True):
            group["lr"] = lr
