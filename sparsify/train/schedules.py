"""Gradual pruning: sparsity grows along a cubic while the model trains (arXiv 1710.01878).

    s(t) = s_end + (s_start − s_end) · (1 − (t − t0) / (t1 − t0))³         fast at first, slow near the end

    pruner = GradualPruner(host, CubicSchedule(start=100, end=900, final=0.9, every=50))
    for step, batch in enumerate(loader):                          # any loop
        …backward…; optimizer.step(); pruner.step(step + 1, optimizer)

    Trainer(…, callbacks=[gradual_pruning_callback(pruner)])       # transformers

A pruned weight stays pruned unless `regrow=True`: masks only shrink.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor, nn

from sparsify.errors import PlanError
from sparsify.files import strict_json
from sparsify.files.atomic import committing, shown
from sparsify.files.ranks import on_first_rank
from sparsify.files.tensors import TensorFile, write_tensors
from sparsify.model.linears import stored_transposed
from sparsify.model.sharded import whole
from sparsify.modules.masked import (
    MaskedModule,
    load_mask_state,
    local_fill,
    mask_modules,
    mask_state,
    masked_parameters,
)
from sparsify.pruning.patterns import NM, Pattern, keep_largest, mask_from_scores, parse_pattern

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MASK_FILE = "sparsify_masks.safetensors"
STATE_FILE = "sparsify_pruning.json"


def cubic_sparsity(step: float, *, start: float, end: float, final: float, initial: float = 0.0) -> float:
    """Sparsity at `step` (steps or epochs, in the unit of `start` and `end`): `initial` before `start`, `final` from `end` on."""
    if end <= start:
        raise PlanError(f"cubic_sparsity(start={start:g}, end={end:g}): end must come after start")
    for name, value in (("initial", initial), ("final", final)):
        if not 0 <= value < 1:
            raise PlanError(f"cubic_sparsity({name}={value:g}): sparsity must lie in 0 ≤ sparsity < 1")
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


@dataclass(frozen=True, kw_only=True)
class CubicSchedule:
    """When and how far to prune.

    start, end: first and last update, in `unit`. final, initial: sparsities there. every: distance between updates.
    unit: "step" (optimizer steps) or "epoch" (fractions allowed).
    """

    start: float
    end: float
    final: float
    initial: float = 0.0
    every: float = 1
    unit: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        if self.every <= 0:
            raise PlanError(f"CubicSchedule(every={self.every:g}): must be positive")
        if self.unit not in ("step", "epoch"):
            raise PlanError(f"CubicSchedule(unit={self.unit!r}): expected 'step' or 'epoch'")
        self.at(self.start)

    def at(self, time: float) -> float:
        """Sparsity at `time`: the cubic, taken at the last update at or before it."""
        if time < self.start:
            return self.initial
        if time >= self.end:
            return self.final
        updates = int((time - self.start) / self.every + 1e-9)
        return cubic_sparsity(
            self.start + updates * self.every, start=self.start, end=self.end, final=self.final, initial=self.initial
        )


class PrunerState(TypedDict):
    """What a gradual pruner resumes from: packed masks by parameter name, and the sparsity reached."""

    masks: dict[str, Tensor]
    sparsity: float


class GradualPruner:
    """Applies a schedule to the masks of a host by weight magnitude.

    host: its masked parameters are pruned; with `names`, those parameters get (dense) masks first.
    pattern: of every mask. N:M grows by tightening N: its schedule is rounded to whole entries per group of M.
    regrow: scores all weights again at each update instead of only survivors. Pruned weights are zero, so they return only where an
        update leaves room.
    """

    def __init__(
        self,
        host: nn.Module,
        schedule: CubicSchedule,
        *,
        names: Iterable[str] | None = None,
        pattern: str | Pattern = "unstructured",
        regrow: bool = False,
    ) -> None:
        self.host, self.schedule, self.pattern, self.regrow = host, schedule, parse_pattern(pattern), regrow
        if names is not None:
            names = list(names)
            named = dict(host.named_parameters())
            unknown = [name for name in names if name not in named]
            if unknown:
                raise PlanError(f"GradualPruner: the model has no parameter '{unknown[0]}'")
            flat = [name for name in names if named[name].dim() < 2]
            if flat:
                shape = tuple(named[flat[0]].shape)
                raise PlanError(
                    f"GradualPruner: '{flat[0]}' has shape {shape}; weights of linears are pruned, not biases and norms"
                )
            mask_modules(host, {name: torch.ones_like(named[name], dtype=torch.bool) for name in names})
        self.targets = list(masked_parameters(host))
        if not self.targets:
            raise PlanError("GradualPruner: the host has no masks: pass names=[…] or compile it with a Prune rule")
        for name, module, leaf in self.targets:
            rows, columns = oriented(module, leaf, getattr(module, leaf)).shape[-2:]
            self.pattern.check(name, (rows, columns))
        self.sparsity = self.schedule.initial

    @torch.no_grad()
    def step(self, time: float, optimizer: torch.optim.Optimizer | None = None) -> float:
        """Prune to the schedule's sparsity at `time`; call after `optimizer.step()`. Returns that sparsity.

        optimizer: its state of newly pruned weights is zeroed as well, so that moments do not linger.
        """
        target = self.schedule.at(time)
        if target > self.sparsity or (self.regrow and target != self.sparsity):
            self.prune(target, optimizer)
        return self.sparsity

    @torch.no_grad()
    def prune(self, sparsity: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Bring every mask to `sparsity` now."""
        for name, module, leaf in self.targets:
            weight = whole(getattr(module, leaf).detach())
            old = module.mask(leaf)
            scores = weight.float().square()
            if not self.regrow:
                scores = scores.masked_fill(~old, -1)  # below every survivor, so they go first
            fresh = self.mask_of(oriented(module, leaf, scores), sparsity, name)
            fresh = oriented(module, leaf, fresh).contiguous()
            if not self.regrow:
                fresh &= old
            module.set_mask(leaf, fresh)
            if optimizer is not None:
                clear_state(optimizer, getattr(module, leaf), fresh)
        self.sparsity = sparsity

    def mask_of(
        self, scores: Float[Tensor, "*experts n m"], sparsity: float, name: str
    ) -> Bool[Tensor, "*experts n m"]:
        """Which entries stay at this sparsity, by their scores `(…, n, m)`; `name` is for errors."""
        if scores.dim() == 3:
            return torch.stack([self.mask_of(expert, sparsity, name) for expert in scores])
        if isinstance(self.pattern, NM):
            kept = max(self.pattern.n, round((1 - sparsity) * self.pattern.m))
            if kept >= self.pattern.m:
                return torch.ones_like(scores, dtype=torch.bool)
            step = NM(kept, self.pattern.m)
            return mask_from_scores(scores, step.sparsity, step, where=name)
        if type(self.pattern).__name__ == "Unstructured":
            return keep_largest(scores, round(sparsity * scores.numel()))
        return mask_from_scores(scores.clamp_min(0), sparsity, self.pattern, where=name)

    def state_dict(self) -> PrunerState:
        """Masks and the sparsity reached, to resume from."""
        return {"sparsity": self.sparsity, "masks": mask_state(self.host)}

    def load_state_dict(self, state: PrunerState) -> None:
        """Go on from what `state_dict` gave: masks and sparsity."""
        load_mask_state(self.host, state["masks"])
        self.sparsity = float(state["sparsity"])


def oriented(module: MaskedModule, leaf: str, tensor: Tensor) -> Tensor:
    """A tensor of the stored layout as `(…, out, in)` and back (a transposition is its own inverse)."""
    return tensor.transpose(-2, -1) if stored_transposed(module) and tensor.dim() > 1 else tensor


def clear_state(
    optimizer: torch.optim.Optimizer, parameter: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]
) -> None:
    """Zero an optimizer's per-element state of one parameter where `mask` is False."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == mask.shape:
            local_fill(value, ~mask.to(value.device))


def gradual_pruning_callback(pruner: GradualPruner) -> TrainerCallback:
    """A `transformers.TrainerCallback` that steps the pruner, saves its masks in every checkpoint and restores them on resume."""
    from transformers import TrainerCallback

    class GradualPruning(TrainerCallback):
        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            if state.global_step == 0:
                return
            folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            if isinstance(args.resume_from_checkpoint, str):
                folder = Path(args.resume_from_checkpoint)
            if not (folder / MASK_FILE).exists():
                raise PlanError(
                    f"{folder} has no {MASK_FILE}: it was not saved with this callback, so its masks are unknown"
                )
            pruner.load_state_dict(read_state(folder))

        def on_step_end(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            optimizer: torch.optim.Optimizer | None = None,
            **_: object,
        ) -> None:
            time = state.global_step if pruner.schedule.unit == "step" else state.epoch
            pruner.step(time, getattr(optimizer, "optimizer", optimizer))

        def on_log(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            logs: dict[str, float] | None = None,
            **kwargs: object,
        ) -> None:
            for entry in (logs, state.log_history[-1] if state.log_history else None):
                if entry is not None:
                    entry["sparsity"] = pruner.sparsity

        def on_save(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            on_first_rank(lambda: write_state(folder, pruner.state_dict()))

    return GradualPruning()


def write_state(folder: Path, state: PrunerState) -> None:
    """Masks and the sparsity reached, both or neither. Raises SparsifyError when they cannot be written."""
    with committing() as commit:
        with commit.writing(folder / STATE_FILE) as file:
            file.write(json.dumps({"sparsity": state["sparsity"]}).encode())
        write_tensors(folder / MASK_FILE, state["masks"], {"sparsity": repr(float(state["sparsity"]))}, commit)


def read_state(folder: Path) -> PrunerState:
    """What `write_state` wrote. Raises SparsifyError, naming the file, for anything else."""
    file, where = TensorFile(folder / MASK_FILE), folder / STATE_FILE
    document = strict_json.read(where)
    reached = document.get("sparsity") if isinstance(document, dict) else None
    if not isinstance(reached, int | float) or isinstance(reached, bool) or not 0 <= reached <= 1:
        raise PlanError(f"{shown(where)}: 'sparsity' must be a number from 0 to 1, got {str(reached)[:40]}")
    if file.hashes is not None and file.metadata.get("sparsity") != repr(float(reached)):
        raise PlanError(
            f"{shown(where)} says another sparsity than {MASK_FILE} beside it: one of them is damaged, or of another checkpoint"
        )
    return {"masks": {name: file.read(name) for name in file.parts}, "sparsity": reached}
