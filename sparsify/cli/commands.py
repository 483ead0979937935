"""The command line: look at a model, an adapter or a checkpoint, prune a model, time sparse inference.

How a command ends, and with which exit code, is one rule for all of them: `sparsify.cli.rule`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparsify.cli.adapters import adapters
from sparsify.cli.bench import bench
from sparsify.cli.evaluate import evaluate
from sparsify.cli.files import checkpoint
from sparsify.cli.finetune import finetune
from sparsify.cli.generate import chat, generate
from sparsify.cli.inspection import inspect
from sparsify.cli.plan import plan
from sparsify.cli.prune import prune
from sparsify.cli.rule import RuledGroup
from sparsify.cli.serve import serve
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


app.command()(inspect)
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
