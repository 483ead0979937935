"""`sparsify finetune`: from a plan file to an adapter folder, and on from where a run was stopped."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli.text_model import check_text_model, load_text_model, note
from sparsify.console import one_line


def finetune(
    plan: Annotated[
        Path,
        typer.Argument(
            help="A plan file (YAML); `sparsify plan` writes one, `sparsify plan --schema` says what may stand there."
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Over what the file says: training.steps=20, rules.0.fraction=0.1. Repeatable.",
        ),
    ] = None,
    packing: Annotated[
        bool,
        typer.Option(
            "--packing", help="Put several rows into one of training.length tokens; as training.packing in the file."
        ),
    ] = False,
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="Read the rows while training; as data.streaming in the file."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last complete checkpoint in the output.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model, data and output, say what would be done, and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Train what a plan file says and write an adapter folder; also under torchrun and accelerate launch."""
    from sparsify.finetune.run import check_output, prepare
    from sparsify.finetune.run import finetune as train
    from sparsify.plan import plan_file

    flags = [("training.packing=true", packing), ("data.streaming=true", streaming)]
    file = plan_file.read(plan, [*(changes or []), *(change for change, given in flags if given)])
    folder, processes = Path(file.model), int(os.environ.get("WORLD_SIZE", "1") or 1)
    check_text_model(folder)
    if os.environ.get("RANK", "0") == "0":
        check_output(file, resume)
    from sparsify.cli.model_folder import load_tokenizer

    tokenizer = load_tokenizer(folder)
    prepared = prepare(file, tokenizer, processes=processes)
    held = f"; held out: {prepared.held_out}" if prepared.held_out is not None else ""
    note(f"data: {prepared.rows}{held}")
    if dry_run:
        read = prepared.read
        rows, tokens, learned = (None,) * 3 if read is None else (len(read), read.tokens, read.learned)
        would = {
            "plan": file.to_dict(), "rows": rows, "tokens": tokens, "learned_tokens": learned,
            "held_out": len(prepared.held_out or ()), "steps": prepared.total_steps, "processes": processes,
        }  # fmt: skip
        typer.echo(
            json.dumps(would, indent=1)
            if as_json
            else one_line(f"would train {prepared.total_steps} steps and write {file.output.dir}")
        )
        return
    model, tokenizer = load_text_model(folder, file.training.dtype)
    try:
        outcome = train(
            model, tokenizer, file, resume=resume, prepared=prepared, callbacks=[progress(prepared.total_steps)]
        )
    except KeyboardInterrupt as error:
        error.add_note(f"the same command with --resume goes on from the last checkpoint in {file.output.dir}")
        raise
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        typer.echo(json.dumps(outcome.to_dict(), indent=1))
        return
    loss = f", loss {outcome.losses[-1][1]:.4f}" if outcome.losses else ""
    held = f", on held-out rows {outcome.evaluations[-1][1]:.4f}" if outcome.evaluations else ""
    share = 100 * outcome.trainable / max(outcome.total, 1)
    typer.echo(
        one_line(
            f"{outcome.folder}: {outcome.steps} steps{loss}{held}; {outcome.trainable:,} parameters trained ({share:.3f} %)"
        )
    )


def progress(total: int) -> Any:
    """A callback that says on stderr how far the run is: one line for every logged step."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        begun = time.perf_counter()
        at = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun, self.at = time.perf_counter(), state.global_step
            if state.global_step:
                note(f"goes on after step {state.global_step} of {state.max_steps}")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logs = logs or {}
            if "loss" in logs:
                pace = (time.perf_counter() - self.begun) / max(state.global_step - self.at, 1)
                left = pace * (state.max_steps - state.global_step)
                note(
                    f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  rate {logs.get('learning_rate', 0):.2e}  "
                    f"{pace:.2f} s/step  {left / 60:.1f} min left"
                )
            if "eval_loss" in logs:
                note(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            note(f"step {state.global_step}/{state.max_steps}  checkpoint kept")

    return Progress()


__all__ = ["finetune"]
