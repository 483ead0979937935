"""Checkpoints that hold what trains: the adapter beside the optimizer, instead of the whole model.

checkpoint-500/  model.safetensors 270 MB, optimizer.pt …   ──▶   adapter.safetensors 1.8 MB, adapter.json, optimizer.pt …

    trainer = adapter_checkpoints(Trainer(model=host, args=…))          before train()
    accelerator = adapter_checkpoints(accelerator, host)                save_state and load_state

A run that resumes goes on bit for bit: the adapter keeps the trained values themselves beside their changes. The folder is an adapter
folder as `save_adapter` writes it, so `load_adapter(checkpoint)` and `sparsify.load(model, checkpoint)` open it.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from sparsify.adapters import adapter as files
from sparsify.errors import AdapterError, SparsifyError
from sparsify.train.rosa import handle_of

if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput

    from sparsify.host.handle import Handle

Runner = TypeVar("Runner")

STATE = "trainer_state.json"  # the last file of a Trainer's checkpoint


def adapter_checkpoints(runner: Runner, model: nn.Module | None = None) -> Runner:
    """Let a `transformers.Trainer` or an `accelerate.Accelerator` save and resume the adapter alone; returns it.

    model: the host; of a Trainer its own. Call it before training. With a Trainer, `resume_from_checkpoint=True` takes the last *complete*
    checkpoint (a run may have been killed while it wrote one), `load_best_model_at_end` loads the best adapter, `save_model()` and
    `save_total_limit` work as always. Raises SparsifyError: no host, a plan that trains no adapter, FSDP and DeepSpeed (whose own
    checkpoints hold the pieces of each rank), something that is neither of the two.
    """
    if hasattr(runner, "register_save_state_pre_hook"):
        return with_accelerator(runner, model)
    if not all(
        callable(getattr(runner, name, None)) for name in ("_save", "_load_from_checkpoint", "_load_best_model")
    ):
        raise SparsifyError(
            f"adapter_checkpoints: {type(runner).__name__} is neither a transformers.Trainer nor an accelerate.Accelerator"
        )
    trainer: Any = runner  # whose private methods are exchanged
    handle = trains_adapter(trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise SparsifyError(
            "adapter_checkpoints: FSDP and DeepSpeed write checkpoints of their own; leave them as they are"
        )

    def save(output_dir: str | None = None, state_dict: object = None) -> None:
        folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
        if not trainer.args.should_save:
            return
        handle.save_adapter(folder)
        words = trainer.processing_class
        words = getattr(trainer.data_collator, "tokenizer", None) if words is None else words
        if words is not None:
            words.save_pretrained(str(folder))
        torch.save(trainer.args, folder / "training_args.bin")

    whole_model, best_model, train = trainer._load_from_checkpoint, trainer._load_best_model, trainer.train

    def load(resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if (Path(resume_from_checkpoint) / files.TENSORS).exists():
            resume(handle, resume_from_checkpoint)
        else:
            whole_model(resume_from_checkpoint, model)  # a checkpoint of before

    def load_best() -> None:
        if (Path(trainer.state.best_model_checkpoint) / files.TENSORS).exists():
            resume(handle, trainer.state.best_model_checkpoint)
        else:
            best_model()

    def from_complete(resume_from_checkpoint: str | bool | None = None, *given: object, **named: object) -> TrainOutput:
        if resume_from_checkpoint is True:
            last = last_checkpoint(trainer.args.output_dir)
            if last is None:
                raise SparsifyError(f"resume_from_checkpoint: {trainer.args.output_dir} holds no complete checkpoint")
            resume_from_checkpoint = str(last)
        return train(resume_from_checkpoint, *given, **named)

    trainer._save, trainer._load_from_checkpoint, trainer._load_best_model = save, load, load_best
    trainer.train = from_complete
    return runner


def with_accelerator(accelerator: Any, model: nn.Module | None) -> Any:
    """The same for `accelerator.save_state(folder)` and `load_state(folder)`."""
    if model is None:
        raise SparsifyError("adapter_checkpoints(accelerator, host): which model?")
    handle = trains_adapter(model)
    if str(accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise SparsifyError(
            "adapter_checkpoints: FSDP and DeepSpeed write checkpoints of their own; leave them as they are"
        )

    def ours(models: list[nn.Module]) -> list[int]:
        return [
            place
            for place, each in enumerate(models)
            if accelerator.unwrap_model(each).__dict__.get("sparsify") is handle
        ]

    def save(models: list[nn.Module], weights: list[dict[str, object]], folder: str) -> None:
        for place in reversed(ours(models)):
            weights.pop(place)
            if accelerator.is_main_process:
                handle.save_adapter(folder)

    def load(models: list[nn.Module], folder: str) -> None:
        for place in reversed(ours(models)):
            models.pop(place)
            resume(handle, folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return accelerator


def trains_adapter(model: nn.Module) -> Handle:
    """The handle of a host. Raises SparsifyError for what has no adapter to save."""
    handle = handle_of(model)
    if not handle.parts and not handle.train:
        raise SparsifyError("adapter_checkpoints: this plan trains no adapter; the model itself is what must be saved")
    if not handle.active.trainable:
        raise SparsifyError(f"adapter_checkpoints: make a trained adapter active first (now: {handle.active})")
    return handle


def resume(handle: Handle, folder: str | os.PathLike[str]) -> None:
    """Put an adapter of the same plan where the active one trains, bit for bit, supports that were collected during training too.

    Raises AdapterError when the host trains other units or entries than the adapter.
    """
    name = next(iter(handle.active.weights))
    opened = files.load(folder)
    collected = {d.param: d.channels for d in opened.deltas if d.kind == "sparse"}
    supports = {param: collected[param] for param in handle.open_masks() if param in collected}
    if supports:
        handle.set_masks(supports)
    handle.load_adapter(folder, name)
    handle.set_adapter(name)
    if not handle.active.trainable:
        raise AdapterError(
            f"{folder}: the checkpoint trained other units or entries than this host; compile the same model with the same plan, seed and "
            "calibration"
        )


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a Trainer in a folder that is complete: its adapter opens and its state is whole. None without one.

    Warns of newer ones that are not: their run ended while they were written.
    """
    found = []
    if Path(folder).is_dir():
        for place in Path(folder).iterdir():
            name, _, step = place.name.partition("-")
            if name == "checkpoint" and step.isdecimal() and place.is_dir():
                found.append((int(step), place))
    for _, place in sorted(found, reverse=True):
        reason = why_incomplete(place)
        if reason is None:
            return place
        warnings.warn(f"{place} is not complete and is passed over: {reason}", stacklevel=3)
    return None


def why_incomplete(place: Path) -> str | None:
    """What is missing or damaged in a Trainer's checkpoint; None: nothing."""
    try:
        json.loads((place / STATE).read_text(encoding="utf-8"))
        if (place / files.TENSORS).exists():
            files.load(place)
        elif not any(place.glob("*.safetensors")) and not any(place.glob("pytorch_model*")):
            return "it holds no weights"
    except (OSError, ValueError, SparsifyError) as error:
        return str(error).splitlines()[0]
    return None


__all__ = ["adapter_checkpoints", "last_checkpoint"]
