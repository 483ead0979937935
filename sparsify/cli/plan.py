"""`sparsify plan`: what would train and what it would cost, from a config alone; and the plan file that `sparsify finetune` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.cli.model_folder import CONFIG, check_folder, load_config
from sparsify.cli.prune import model_class, torch_dtype
from sparsify.cli.rule import reading
from sparsify.cli.tables import show
from sparsify.cli.text_model import note
from sparsify.console import one_line
from sparsify.errors import InputError
from sparsify.plan import plan_file
from sparsify.plan.plan_file import PlanFile

if TYPE_CHECKING:
    from sparsify.finetune.estimate import Estimate

DECLINED_SHOWN = 4
RULE_OPTIONS = ("fraction", "rank", "units", "density", "alpha", "structure", "select")


def print_schema(asked: bool) -> None:
    if asked:
        typer.echo(json.dumps(plan_file.schema(), indent=1))
        raise typer.Exit


def plan(
    model: Annotated[
        Path, typer.Argument(help="A Hugging Face folder (config.json is enough), or a plan file (.yaml).")
    ],
    method: Annotated[
        str, typer.Option("--method", "-m", help="s2ft, paca, rosa, lora, or a rule of an installed package.")
    ] = "s2ft",
    fraction: Annotated[
        float | None, typer.Option(help="S2FT: trained share of the parameters of O and Down. Default: 0.03.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA, RoSA, PaCA.")] = None,
    units: Annotated[
        int | None, typer.Option(help="S2FT: heads or channels of each structure instead of a fraction.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="RoSA: share of scattered entries.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA, RoSA: the low-rank part is scaled by alpha / rank.")
    ] = None,
    structure: Annotated[str | None, typer.Option(help="S2FT: ffn, attention or both.")] = None,
    select: Annotated[str | None, typer.Option(help="S2FT, PaCA: how units are scored.")] = None,
    match: Annotated[
        list[str] | None, typer.Option(help="Where: q_proj, '*.mlp', 'model.layers.{0-15}.*', 're:…'. Repeatable.")
    ] = None,
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
    from sparsify.finetune.estimate import estimate

    given = dict(zip(RULE_OPTIONS, (fraction, rank, units, density, alpha, structure, select), strict=True))
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if match:
        options["match"] = match[0] if len(match) == 1 else match
    training: dict[str, Any] = {
        name: value for name, value in (("batch", batch), ("length", length)) if value is not None
    }
    if dtype != "auto":
        training["dtype"] = dtype
    if model.suffix in (".yaml", ".yml") and not model.is_dir():
        if options:
            raise InputError(f"{model} says what trains: change it with --set rules.0.{next(iter(options))}=…")
        overs = [f"training.{name}={value}" for name, value in training.items()] + (
            [f"data.path={data}"] if data else []
        )
        file = plan_file.read(model, [*overs, *(changes or [])])
    else:
        file = written(model, method, options, training, data, changes or [])
    if out is not None:
        from sparsify.cli.commands import check_target

        check_target(out)
        if out.exists():
            raise InputError(f"{out} is there already: choose another --out, or delete it")
    if fsdp and world_size == 1:
        raise InputError("--fsdp shares weights out over processes: give --world-size too")
    empty, of = on_meta(Path(file.model), file.training.dtype)
    found = estimate(
        empty, file.plan, batch=file.training.batch, length=file.training.length, dtype=of,
        gradient_checkpointing=file.training.gradient_checkpointing, world=world_size, sharded=fsdp,
    )  # fmt: skip
    if out is not None and not dry_run:
        from sparsify.files.atomic import write_text

        write_text(out, file.to_yaml())
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


def written(
    model: Path, method: str, options: dict[str, Any], training: dict[str, Any], data: str | None, changes: list[str]
) -> PlanFile:
    """The plan file that the options say."""
    rule = plan_file.rule_named(method, "--method").__name__
    if rule == "S2FT" and not {"fraction", "units"} & set(options):
        options = {"fraction": 0.03, **options}
    document: dict[str, Any] = {"model": str(model), "rules": [{"rule": rule, **options}], "training": training}
    if data:
        document["data"] = {"path": data}
    return plan_file.from_document(plan_file.changed(document, changes, "the options"), "the options")


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
        f"{found.model}: {structures} found",
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
    from sparsify.show.report import human

    rank = "not possible: scattered entries are no LoRA" if found.lora_rank is None else f"rank {found.lora_rank}"
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
