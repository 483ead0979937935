"""`sparsify plan`: what would train and what it would cost, from a config alone; and the plan file that `sparsify finetune` takes.

With `--budget` it chooses what trains: `sparsify.autoplan`, and the plan file says what it chose.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.cli.model_folder import CONFIG, check_folder, load_config
from sparsify.cli.prune import model_class, torch_dtype
from sparsify.cli.rule import reading
from sparsify.cli.rule_options import (
    Alpha,
    Density,
    Fraction,
    Match,
    Rank,
    Select,
    Units,
    Where,
    given_options,
    is_plan_file,
    written,
)
from sparsify.cli.tables import show
from sparsify.cli.text_model import note
from sparsify.console import one_line
from sparsify.errors import InputError
from sparsify.plan import plan_file
from sparsify.plan.plan_file import PlanFile

if TYPE_CHECKING:
    from sparsify.planner.autoplan import AutoPlan
    from sparsify.planner.estimate import Estimate
    from sparsify.planner.limits import Limits

DECLINED_SHOWN = 4


def print_schema(asked: bool) -> None:
    if asked:
        typer.echo(json.dumps(plan_file.schema(), indent=1))
        raise typer.Exit


def plan(
    model: Annotated[
        Path, typer.Argument(help="A Hugging Face folder (config.json is enough), or a plan file (.yaml).")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="s2ft (default), paca, rosa, lora, or a rule of an installed package; with --budget those to choose among: s2ft,lora.",
        ),
    ] = None,
    fraction: Fraction = None,
    rank: Rank = None,
    units: Units = None,
    density: Density = None,
    alpha: Alpha = None,
    structure: Where = None,
    select: Select = None,
    match: Match = None,
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", min=1, help="Rows of one process and step. Default: 8.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", "-l", min=2, help="Tokens of a row. Default: 1024.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (what the config says), fp32, bf16 or fp16.")
    ] = "auto",
    world_size: Annotated[int, typer.Option(min=1, max=1 << 20, help="Processes.")] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Weights in pieces over the processes (FSDP2), instead of DDP.")
    ] = False,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Choose what trains within memory=8GiB, time=2h; with accuracy (default), memory or time for what is best. Repeatable."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens, for a budget of time.")] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option("--max-lora-rank", min=1, help="The rank that an export as LoRA may need at most.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows, for the plan file.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Anything else in the plan file: training.epochs=2. Repeatable."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan file here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --out: write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=print_schema, is_eager=True, help="Print the plan file's JSON Schema and exit."
        ),
    ] = False,
) -> None:
    """Say what a plan trains and what it costs, without loading weights, and write it as a plan file."""
    from sparsify.planner.estimate import estimate
    from sparsify.planner.limits import limits

    options = given_options(
        match,
        fraction=fraction,
        rank=rank,
        units=units,
        density=density,
        alpha=alpha,
        structure=structure,
        select=select,
    )
    training: dict[str, Any] = {
        name: value for name, value in (("batch", batch), ("length", length)) if value is not None
    }
    if dtype != "auto":
        training["dtype"] = dtype
    if tokens is not None and not budget:
        raise InputError("--tokens belongs to a budget of time: --budget time=2h")
    if budget and (options or is_plan_file(model)):
        raise InputError("--budget chooses what trains: give the folder of a model, and no options of a rule")
    within = limits(budget) if budget else None
    if is_plan_file(model):
        if options or method is not None:
            raise InputError(f"{model} says what trains: change it with --set rules.0.{next(iter(options), 'rule')}=…")
        overs = [f"training.{name}={value}" for name, value in training.items()] + (
            [f"data.path={data}"] if data else []
        )
        file = plan_file.read(model, [*overs, *(changes or [])])
    else:
        file = written(
            str(model), "s2ft" if method is None or budget else method, options, training, data, changes or []
        )
    if out is not None:
        from sparsify.cli.inspection import check_target

        check_target(out)
        if out.exists():
            raise InputError(f"{out} is there already: choose another --out, or delete it")
    if fsdp and world_size == 1:
        raise InputError("--fsdp shares weights out over processes: give --world-size too")
    empty, of = on_meta(Path(file.model), file.training.dtype)
    if within is not None:
        chosen = choose(empty, file, within, method, tokens, max_lora_rank, world_size, fsdp)
        file = with_choice(file, chosen)
        finish(file, out, dry_run)
        typer.echo(json.dumps({"file": file.to_dict(), **chosen.to_dict()}, indent=1)) if as_json else show_choice(
            chosen
        )
        if out is not None:
            note(f"{'would be written' if dry_run else 'written'} to {out}")
        return
    if max_lora_rank is not None:
        from sparsify.planner.rank_bound import bounded

        file = dataclasses.replace(file, rules=bounded(empty, file.plan, max_lora_rank).rules)
    found = estimate(
        empty, file.plan, batch=file.training.batch, length=file.training.length, dtype=of,
        gradient_checkpointing=file.training.gradient_checkpointing, world=world_size, sharded=fsdp,
    )  # fmt: skip
    finish(file, out, dry_run)
    if as_json:
        typer.echo(
            json.dumps({"plan": file.to_dict(), "dtype": str(of).removeprefix("torch."), **found.to_dict()}, indent=1)
        )
    else:
        for line in lines(found):
            typer.echo(one_line(line))
        show(["one step", "this plan", "full fine-tuning"], table(found))
        for line in more(found):
            typer.echo(one_line(line))
    if out is not None:
        note(f"{'would be written' if dry_run else 'written'} to {out}")


def choose(
    empty: Any,
    file: PlanFile,
    within: Limits,
    method: str | None,
    tokens: int | None,
    rank: int | None,
    world: int,
    fsdp: bool,
) -> AutoPlan:
    """`sparsify.autoplan` for a model on the meta device, with the batch and length of a plan file."""
    import sparsify
    from sparsify.planner.candidates import SIZES

    named = [word.strip() for word in method.split(",")] if method else list(SIZES)
    return sparsify.autoplan(
        empty, memory=within.memory, time=within.time, tokens=tokens, batch=file.training.batch, length=file.training.length,
        methods=named,
        max_lora_rank=rank, goal=within.goal, world=world, sharded=fsdp,
        seed=file.training.seed,
    )  # fmt: skip


def with_choice(file: PlanFile, chosen: AutoPlan) -> PlanFile:
    """The plan file with the rules that were chosen."""
    training = dataclasses.replace(file.training, gradient_checkpointing=chosen.recompute)
    return dataclasses.replace(file, rules=tuple(chosen.plan.rules), training=training)


def show_choice(chosen: AutoPlan) -> None:
    """The plan, its reasons, and what was refused."""
    from sparsify.planner.autoplan import COLUMNS, row

    for line in [*map(str, chosen.plan.rules), *chosen.reasons]:
        typer.echo(one_line(line))
    show(COLUMNS, [row(candidate) for candidate in (chosen.chosen, *chosen.alternatives)], left=2)


def finish(file: PlanFile, out: Path | None, dry_run: bool) -> None:
    """Write the plan file where it is wanted."""
    if out is not None and not dry_run:
        from sparsify.files.atomic import write_text

        write_text(out, file.to_yaml())


def on_meta(folder: Path, dtype: str) -> tuple[Any, Any]:
    """(model of the folder's config on the meta device, dtype of its weights). Raises InputError."""
    import torch

    if not folder.exists():
        raise InputError(f"'{folder}' does not exist")
    check_folder(folder)
    config, kind = load_config(folder), model_class(folder)
    if not getattr(kind, "can_generate", lambda: False)() or kind.main_input_name != "input_ids":
        raise InputError(
            f"{folder / CONFIG}: {kind.__name__} does not write text; a model for causal language modelling is needed"
        )
    stored = getattr(config, "dtype", None)
    of = torch_dtype(dtype) or (stored if isinstance(stored, torch.dtype) else torch.float32)
    with reading(f"{folder / CONFIG}"), torch.device("meta"):
        return kind(config).to(of), of


def lines(found: Estimate) -> list[str]:
    structures = ", ".join(f"{count} {kind}" for kind, count in found.found.items()) or "nothing"
    share = 100 * found.trainable / max(found.total, 1)
    return [
        f"{found.model}: {structures} found"
        + (f" ({found.traced[0]} of {found.traced[1]} equal blocks were looked at)" if found.traced else ""),
        f"trains {found.trainable:,} of {found.total:,} parameters ({share:.4f} %)",
        *found.budgets,
        *(f"declined: {line}" for line in found.declined[:DECLINED_SHOWN]),
        *([f"declined: {len(found.declined) - DECLINED_SHOWN} more"] if len(found.declined) > DECLINED_SHOWN else []),
    ]


def table(found: Estimate) -> list[list[str]]:
    from sparsify.show.report import human

    rows = [
        ("weights", "weights"), ("gradients and AdamW's moments", "states"), ("kept for the backward", "saved"), ("expected peak", "peak"),
    ]  # fmt: skip

    def cell(step: Any, name: str) -> str:
        if step is None:
            return ""
        return human(3 * step.trained if name == "states" else getattr(step, name))

    return [[title, cell(found.step, name), cell(found.full, name)] for title, name in rows]


def more(found: Estimate) -> list[str]:
    from sparsify.adapters.vllm_check import served_rank
    from sparsify.show.report import human

    rank = "not possible: scattered entries are no LoRA"
    if found.lora_rank is not None:
        serves = served_rank(found.lora_rank)
        rank = (
            f"rank {found.lora_rank}, {f'vLLM needs --max-lora-rank {serves}' if serves else 'more than vLLM serves'}"
        )
    said = [
        f"of {found.batch} rows of {found.length} tokens; what an allocator keeps beside it is not counted",
        f"adapter: {human(found.adapter)} at least; as LoRA: {rank}",
    ]
    if found.ranks is not None:
        how, each = "FSDP2" if found.ranks.sharded else "DDP", human(found.ranks.memory)
        said.append(
            f"{found.ranks.world} processes, {how}: {each} each at the peak, {human(found.ranks.sent)} sent by each in a step"
        )
    return said


__all__ = ["plan"]
