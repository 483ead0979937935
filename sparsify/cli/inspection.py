"""`sparsify inspect`: a model's coupled structures, and with a plan what would become of them; as text, picture or page.

    MODEL ──analyse──▶ structures, reasons          MODEL + PLAN ──compile──▶ what was chosen, every operation before and after

Weights are read where the folder has them. Of a config alone, and of a model type, the graph is the same; only what chooses by weights or
data chooses at random there, and a line says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from sparsify.cli.text_model import note
from sparsify.errors import InputError
from sparsify.plan import plan_file

if TYPE_CHECKING:
    from sparsify.plan.plan_file import PlanFile
    from sparsify.program import Program


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face model folder (config.json is enough), a model type such as 'llama' (two layers), or a plan file (.yaml)."
        ),
    ],
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", "-p", help="Compile this plan file's rules, and show what was chosen, before and after."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", help="The same for one rule: s2ft, paca, rosa, lora, or one of an installed package."
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
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Over what the plan says: rules.0.fraction=0.1. Repeatable."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the structures here.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the inspector here: one page to search and click through, which loads nothing."),
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Print the whole graph, not only the structures.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print structures, what is declined, and what is chosen as JSON.")
    ] = False,
) -> None:
    """Find a model's coupled structures: what could train, what is declined and why; with a plan, what it makes of them."""
    import sparsify

    for target in (svg, html):
        if target is not None:
            check_target(target)
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
    file = asked_plan(model, plan, method, options, changes or [])
    folder = file.model if file is not None and is_plan_file(Path(model)) else model
    source = model_to_inspect(folder)
    host: Any = None if file is None else compiled(source, file, None if method is not None else Path(folder))
    program: Program = sparsify.analyse(source) if host is None else host.sparsify.program
    if svg is not None:
        program.svg(svg)
    if html is not None:
        program.html(html)
    if as_json:
        typer.echo(json.dumps(as_data(program, host), indent=1, default=str))
        return
    if graph:
        typer.echo(str(program))
    if host is None:
        for line in (*program.structures, *(f"declined: {declined}" for declined in program.declined)):
            typer.echo(str(line))
        typer.echo(f"{len(program.structures)} structures, {len(program.declined)} declined")
    else:
        typer.echo(str(host.sparsify.report))
    for target, word in ((svg, "drawn"), (html, "written")):
        if target is not None:
            typer.echo(f"{word} to {target}")


def asked_plan(
    model: str, plan: Path | None, method: str | None, options: dict[str, Any], changes: list[str]
) -> PlanFile | None:
    """The plan to compile; None where only the model is asked about. Raises InputError, PlanError."""
    if is_plan_file(Path(model)) and os.path.lexists(model):
        if plan is not None:
            raise InputError(f"{model} is a plan file already: give the folder of a model before --plan {plan}")
        plan = Path(model)
    if plan is not None and (method is not None or options):
        raise InputError(f"{plan} says what trains: change it with --set rules.0.{next(iter(options), 'rule')}=…")
    if plan is not None:
        return plan_file.read(plan, changes)
    if method is None and (options or changes):
        raise InputError(f"--{next(iter(options), 'set')} belongs to a plan: give --method, or --plan FILE")
    return None if method is None else written(model, method, options, {}, None, changes)


def compiled(model: Any, file: PlanFile, folder: Path | None) -> Any:
    """The host that `sparsify finetune` would train with these rules; the model is used up. folder: with the tokenizer for the rows that
    the plan file names, where a rule chooses by data; None for a plan that names none. Raises InputError, PlanError."""
    import sparsify
    from sparsify.finetune.run import needs_data
    from sparsify.planner.estimate import sizes_only

    plan, batches = file.plan, None
    if any(p.is_meta for p in model.parameters()):
        plan = sizes_only(plan)
        if plan.rules != file.plan.rules:
            note("note: there are no weights here: what is chosen by weights or data is chosen at random")
    elif folder is not None and needs_data(plan):
        batches = calibration_rows(model, file, folder)
    return sparsify.compile(model, plan, calibration=batches, donate=True)


def calibration_rows(model: Any, file: PlanFile, folder: Path) -> Any:
    """The batches from which `sparsify finetune` chooses. Raises InputError, PlanError."""
    from sparsify.cli.model_folder import load_tokenizer
    from sparsify.finetune.rows import Collator, pad_token
    from sparsify.finetune.run import calibration, prepare

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{folder}: has no tokenizer, and the plan chooses by its rows ({file.data.path})")
    return calibration(file, prepare(file, tokenizer), Collator(pad_token(model, tokenizer)))


def as_data(program: Program, host: Any) -> dict[str, Any]:
    """What `--json` prints. chosen: units by structure, in the places of the model as it was."""
    found: dict[str, Any] = {
        "structures": [dataclasses.asdict(structure) for structure in program.structures],
        "declined": [{"name": d.name, "reason": d.reason} for d in program.declined],
    }
    if host is not None:
        trainable, total = host.sparsify.count_parameters()
        found |= {
            "chosen": [dataclasses.asdict(choice) for choice in program.choices],
            "refused": [{"where": r.where, "reason": r.reason} for r in program.refusals],
            "trainable": trainable,
            "total": total,
        }
    return found


def model_to_inspect(name: str) -> Any:
    """The model in a folder, of the class that its config names; of a config alone, or of a model type (two layers), without memory.

    Raises InputError.
    """
    import torch
    from transformers import AutoModel

    from sparsify.cli.model_folder import DEPTHS, check_folder, config_of_type, is_folder, load_config, load_model
    from sparsify.cli.rule import reading

    if is_folder(name):
        folder = Path(name)
        kind = class_named(folder, check_folder(folder))
        if not has_weights(folder):
            config = load_config(folder)
            note(f"note: {folder} holds no weights: its config alone is looked at")
            with reading(f"{folder}"), torch.device("meta"):
                return kind(config) if kind else AutoModel.from_config(config, trust_remote_code=False)
        model, missing, _ = load_model(folder, kind)
        if missing:
            note(f"note: the files lack '{missing[0]}' ({len(missing)} tensors in all), which start at random")
        return model
    config = config_of_type(name)
    for key in DEPTHS:
        if hasattr(config, key):
            setattr(config, key, 2)
    with reading(f"model type {name!r}"), torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False)


def class_named(folder: Path, config: dict[str, Any]) -> Any:
    """The class that the config names, so that names are those of training; None for AutoModel's, where transformers has no such class."""
    import transformers

    from sparsify.cli.prune import model_class

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return model_class(folder) if isinstance(name, str) and hasattr(transformers, name) else None


def has_weights(folder: Path) -> bool:
    """Whether a folder has files from which transformers reads weights."""
    return any(path.suffix in (".safetensors", ".bin", ".pt") for path in folder.iterdir())


def check_target(path: Path) -> None:
    """Raises InputError for a file that cannot be written, before any work is done."""
    if path.is_dir():
        raise InputError(f"{path}: a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is there already and is not a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: nothing can be written to {folder}")


__all__ = ["check_target", "inspect"]
