"""The command line: look at a model, an adapter or a checkpoint, prune a model, time sparse inference.

How a command ends, and with which exit code, is one rule for all of them: `sparsify.cli.rule`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsify.cli.adapters import adapters
from sparsify.cli.bench import bench
from sparsify.cli.evaluate import evaluate
from sparsify.cli.files import checkpoint
from sparsify.cli.finetune import finetune
from sparsify.cli.generate import chat, generate
from sparsify.cli.plan import plan
from sparsify.cli.prune import prune
from sparsify.cli.rule import RuledGroup, reading
from sparsify.cli.serve import serve
from sparsify.console import one_line
from sparsify.errors import InputError
from sparsify.version import __version__

app = typer.Typer(
    cls=RuledGroup,
    add_completion=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sparse fine-tuning and sparse inference of PyTorch models.",
)


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsify {__version__}")
        raise typer.Exit


@app.callback()
def about(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face model folder, or a model type such as 'llama' (small random weights).")
    ],
    svg: Annotated[Path | None, typer.Option(help="Draw the structures here.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the inspector here: one page to search and click through, which loads nothing."),
    ] = None,
    graph: Annotated[bool, typer.Option(help="Print the whole graph, not only the structures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print structures and what is declined as JSON.")] = False,
) -> None:
    """Find a model's coupled structures: what could train, and what is declined and why."""
    import sparsify

    targets = [target for target in (svg, html) if target is not None]
    for target in targets:
        check_target(target)
    program = sparsify.analyse(model_to_inspect(model))
    if svg is not None:
        program.svg(svg)
    if html is not None:
        program.html(html)
    if as_json:
        found = [dataclasses.asdict(structure) for structure in program.structures]
        declined = [{"name": d.name, "reason": d.reason} for d in program.declined]
        typer.echo(json.dumps({"structures": found, "declined": declined}, indent=1, default=str))
        return
    if graph:
        typer.echo(str(program))
    for structure in program.structures:
        typer.echo(str(structure))
    for declined in program.declined:
        typer.echo(f"declined: {declined}")
    typer.echo(f"{len(program.structures)} structures, {len(program.declined)} declined")
    for target in targets:
        typer.echo(f"{'drawn' if target is svg else 'written'} to {target}")


def model_to_inspect(name: str) -> Any:
    """The model in a folder, or two layers of a model type without memory. Raises InputError."""
    import torch
    from transformers import AutoModel

    from sparsify.cli.model_folder import DEPTHS, config_of_type, is_folder, load_model

    if is_folder(name):
        model, missing, _ = load_model(Path(name))
        if missing:
            note = f"note: the files lack '{missing[0]}' ({len(missing)} tensors in all), which start at random"
            typer.echo(one_line(note), err=True)
        return model
    config = config_of_type(name)
    for key in DEPTHS:
        if hasattr(config, key):
            setattr(config, key, 2)
    with reading(f"model type {name!r}"), torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False)


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


app.add_typer(adapters, name="adapter")
app.command()(checkpoint)
app.command()(prune)
app.command()(bench)
app.command()(plan)
app.command()(finetune)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(chat)
app.command()(serve)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
