"""From a plan file to a trained adapter: one call over transformers' Trainer.

plan file ─▶ rows ─▶ host (what the plan says trains) ─▶ Trainer, adapter checkpoints ─▶ output/adapter.safetensors, README.md, plan.yaml

output/plan.yaml              what runs, written first: `resume` compares with it
output/checkpoints/…          small, each complete or passed over; a run that was killed goes on from the last one bit for bit
output/adapter.json, .safetensors, README.md, training.json        written last
output/peft/                  with `output.peft`: the adapter as PEFT's LoRA
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import SparsifyError
from sparsify.files.atomic import write_text
from sparsify.finetune.model_card import model_card
from sparsify.finetune.packing import PackedRows, check_packing, pack_rows
from sparsify.finetune.rows import Collator, Rows, Sample, pad_token, read_rows
from sparsify.finetune.stream import Stream
from sparsify.plan import DATA_DRIVEN, Plan
from sparsify.plan import plan_file as files
from sparsify.plan.plan_file import PlanFile, Training
from sparsify.train import keep_out_of_decay, param_groups
from sparsify.train.checkpoints import adapter_checkpoints, last_checkpoint

if TYPE_CHECKING:
    from torch import nn

PLAN, RECORD, CHECKPOINTS, PEFT = "plan.yaml", "training.json", "checkpoints", "peft"
FREE = {"training": ("save_every", "eval_every", "log_every"), "output": ("dir", "keep", "peft")}
"""What a run that resumes may have otherwise than the one that began: it changes no number."""


@dataclass(frozen=True)
class Prepared:
    """Rows of one run. total_steps: of the optimizer, on `processes` processes."""

    rows: Rows | PackedRows | Stream
    held_out: Rows | None
    total_steps: int

    @property
    def read(self) -> Rows | None:
        """The rows as they were read; None of a stream."""
        return (
            None
            if isinstance(self.rows, Stream)
            else self.rows.rows
            if isinstance(self.rows, PackedRows)
            else self.rows
        )

    def first(self, count: int) -> list[Sample]:
        """The first rows, each by itself."""
        return (
            self.rows.first(count) if isinstance(self.rows, Stream) else (self.read or Rows([], "text")).samples[:count]
        )


@dataclass(frozen=True)
class Outcome:
    """What a run did. losses: (step, mean training loss since the one before); evaluations: (step, loss on held-out rows).
    trainable, total: parameters. rows, learned_tokens: of one pass; of a stream what was read in the run, perhaps a batch more than was
    learned. resumed_from: the step at which it began."""

    folder: Path
    steps: int
    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]
    trainable: int
    total: int
    rows: int
    learned_tokens: int
    resumed_from: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def prepare(file: PlanFile, tokenizer: Any, *, processes: int = 1) -> Prepared:
    """Read the rows and count the steps. Raises PlanError for data that cannot be used."""
    data, training = file.data, file.training
    held_out = None
    if isinstance(data.eval, str):
        held_out = read_rows(data.eval, tokenizer, length=training.length, format=data.format)
    if data.streaming:
        stream = Stream(data.path, tokenizer, training.length, data.format, data.split, training.packing, training.seed)
        stream.first()  # says what cannot be used before a model is loaded
        return Prepared(stream, held_out, training.steps or 1)
    rows: Rows | PackedRows = read_rows(
        data.path, tokenizer, length=training.length, format=data.format, split=data.split
    )
    if isinstance(data.eval, float | int):
        rows, held_out = rows.split(float(data.eval), training.seed)
    if training.packing:
        rows = pack_rows(rows, training.length)
    batches = math.ceil(len(rows) / (training.batch * processes))
    steps = training.steps or max(1, math.ceil(math.ceil(batches / training.accumulate) * training.epochs))
    return Prepared(rows, held_out, steps)


def check_output(file: PlanFile, resume: bool) -> None:
    """Raises SparsifyError when the output holds another run, or when there is none that could go on as this plan says."""
    folder = Path(file.output.dir)
    if folder.exists() and not folder.is_dir():
        raise SparsifyError(f"output.dir: {folder} is there already and is not a folder")
    begun = (folder / PLAN).exists()
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            what = "a finished run" if (folder / RECORD).exists() else "an unfinished run" if begun else "files"
            advice = " go on with it (--resume; in Python resume=True)," if begun else ""
            raise SparsifyError(
                f"output.dir: {folder} holds {what} already:{advice} choose another folder, or delete it"
            )
        return
    if not begun:
        raise SparsifyError(f"resume: {folder} holds no run ({PLAN} is not there); start it without resume")
    differs = difference(files.read(folder / PLAN).to_dict(), file.to_dict())
    if differs:
        raise SparsifyError(f"resume: the run in {folder} began with another plan: {differs}")


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first value that decides about numbers and is not the same; the empty word for none."""
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            for name in dict.fromkeys([*old, *new]):
                if name not in FREE.get(key, ()) and old.get(name) != new.get(name):
                    return f"{key}.{name} was {old.get(name)!r}, now {new.get(name)!r}"
        elif old != new:
            return f"{key} was {old!r}, now {new!r}"
    return ""


def finetune(
    model: nn.Module,
    tokenizer: Any,
    file: PlanFile,
    *,
    resume: bool = False,
    prepared: Prepared | None = None,
    callbacks: Sequence[Any] = (),
) -> Outcome:
    """Train what the plan file says and write the adapter to its output; returns what was done.

    model: as loaded, with the weights of `file.model` in the dtype that they shall train over; it is not written to. tokenizer: its own,
    with a chat template for rows of messages. resume: go on from the last complete checkpoint (from the beginning, when none was written).
    prepared: `prepare(file, tokenizer)`, if it was called. callbacks: of transformers.

    Under `torchrun` or `accelerate launch` every process calls it (DDP), the batch is each one's own, and the first one writes.
    Raises PlanError (the plan, the data), SparsifyError (the output, a run that cannot resume). An interrupted run leaves its
    checkpoints.
    """
    import transformers

    import sparsify

    arguments = trainer_arguments(file)
    first = arguments.process_index == 0
    if first:
        check_output(file, resume)
    wait(arguments)
    prepared = prepared or prepare(file, tokenizer, processes=arguments.world_size)
    # a run that is shorter than what lies between two losses still says its last one
    arguments.logging_steps = max(1, min(arguments.logging_steps, prepared.total_steps))
    folder, pad = Path(file.output.dir), pad_token(model, tokenizer)
    collate = Collator(pad)
    transformers.set_seed(file.training.seed)
    if file.training.packing:
        check_packing(model, prepared.first(2), collate)
    host: Any = sparsify.compile(model, file.plan, calibration=calibration(file, prepared, collate), progress=first)
    if first:
        write_text(folder / PLAN, file.to_yaml())
    trainer: Any = transformers.Trainer(
        model=host,
        args=arguments,
        data_collator=collate,
        train_dataset=prepared.rows,  # type: ignore[arg-type]
        eval_dataset=prepared.held_out,  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)  # of the default ones; `callbacks` say what is said
    sparsify_train(trainer, file.training)
    begun = last_checkpoint(folder / CHECKPOINTS) if resume else None
    trainer.train(resume_from_checkpoint=str(begun) if begun else None)
    if prepared.held_out is not None and not measured_last(trainer.state):
        trainer.evaluate()
    trainable, total = host.sparsify.count_parameters()
    outcome = Outcome(
        folder, trainer.state.global_step, history(trainer.state, "loss"), history(trainer.state, "eval_loss"), trainable, total,
        *rows_and_tokens(prepared), int(begun.name.rpartition("-")[2]) if begun else 0,
    )  # fmt: skip
    if first:
        finish(host, file, outcome)
    wait(arguments)
    return outcome


def rows_and_tokens(prepared: Prepared) -> tuple[int, int]:
    """Rows and learned tokens, as `Outcome` has them."""
    if isinstance(prepared.rows, Stream):
        return prepared.rows.taken, prepared.rows.learned
    read = prepared.read
    assert read is not None
    return len(read), read.learned


def sparsify_train(trainer: Any, training: Training) -> None:
    """Small checkpoints, no decay of values of weights, and rates of their own for sparse values and low-rank factors."""
    adapter_checkpoints(trainer)
    sparse, lora = training.sparse_learning_rate, training.lora_learning_rate
    if sparse is None and lora is None:
        keep_out_of_decay(trainer)
        return
    kind, options = type(trainer).get_optimizer_cls_and_kwargs(trainer.args)
    rates = {"lr": training.learning_rate, "sparse_lr": sparse, "lora_lr": lora}
    trainer.optimizer = kind(param_groups(trainer.model, weight_decay=training.weight_decay, **rates), **options)


def trainer_arguments(file: PlanFile) -> Any:
    """transformers' TrainingArguments of a plan file."""
    import torch
    import transformers

    training, output = file.training, file.output
    evaluates = file.data.eval is not None and training.eval_every > 0
    return transformers.TrainingArguments(
        output_dir=str(Path(output.dir) / CHECKPOINTS),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch,
        per_device_eval_batch_size=training.batch,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        seed=training.seed,
        save_steps=training.save_every,
        save_total_limit=output.keep,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.eval_every if evaluates else None,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={
            "dispatch_batches": False
        },  # every process reads a stream: batches of the first one differ in width
    )


def calibration(file: PlanFile, prepared: Prepared, collate: Collator) -> list[dict[str, Any]] | None:
    """The first batches of the rows, each row by itself, where a rule chooses by data; None where none does."""
    if not needs_data(file.plan):
        return None
    size = file.training.batch
    rows = [{"input_ids": s.ids, "labels": s.labels} for s in prepared.first(file.training.calibration * size)]
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def needs_data(plan: Plan) -> bool:
    """Whether a rule chooses what trains by looking at data."""
    return any(
        getattr(rule, "select", None) in DATA_DRIVEN
        or (getattr(rule, "mask", None) in ("gradient", "fisher", "gradient_abs") and getattr(rule, "density", 0))
        or getattr(rule, "needs_calibration", False)
        for rule in plan.rules
    )


def history(state: Any, key: str) -> tuple[tuple[int, float], ...]:
    return tuple((int(entry["step"]), float(entry[key])) for entry in state.log_history if key in entry)


def measured_last(state: Any) -> bool:
    found = history(state, "eval_loss")
    return bool(found) and found[-1][0] == state.global_step


def wait(arguments: Any) -> None:
    """For the other processes, where there are any."""
    import torch.distributed as dist

    if arguments.world_size > 1 and dist.is_initialized():
        dist.barrier()


def finish(host: Any, file: PlanFile, outcome: Outcome) -> None:
    """The adapter, what it is, and how it came about; the record last."""
    folder = outcome.folder
    host.sparsify.save_adapter(folder)
    if file.output.peft:
        host.sparsify.export_lora(folder / PEFT)
    write_text(folder / "README.md", model_card(file, outcome, host.sparsify.report.text()))
    write_text(folder / RECORD, json.dumps(outcome.to_dict(), indent=1) + "\n")


__all__ = ["Outcome", "Prepared", "check_output", "finetune", "prepare"]
