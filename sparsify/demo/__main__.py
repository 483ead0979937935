"""`python -m sparsify.demo`: fine-tune a real pretrained model on this machine, and what one can do with it afterwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.rule import RuledCommand
from sparsify.errors import InputError

LARGEST_SEED = (1 << 63) - 1
MOST_EPOCHS = 10_000.0
MOST_STEPS = 1_000_000
MODELS = ("auto", "smollm2", "minilm")

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command(cls=RuledCommand)
def main(
    model: Annotated[
        str,
        typer.Option(help="smollm2, minilm, or auto: SmolLM2 where it is installed, else MiniLM."),
    ] = "auto",
    fast: Annotated[
        bool, typer.Option("--fast", help="A fraction of the work (about a minute): the steps, not the numbers.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="SmolLM2: also prune to 75 % zeros and distil (some minutes more).")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Which methods to compare, separated by commas: s2ft, lora; with MiniLM also full. The first is the one shown further."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="SmolLM2: training steps (default 32).", min=1, max=MOST_STEPS)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="MiniLM: passes over the training texts (default 2; 1 with --fast).", min=0.01, max=MOST_EPOCHS
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=LARGEST_SEED, help="Seed of the trained units, the order of the texts and dropout."),
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report and the adapters.")] = Path("report"),
    tune: Annotated[
        bool, typer.Option("--tune", help="Repeat the search for learning rates instead (many minutes).")
    ] = False,
) -> None:
    """Fine-tune a small language model with S2FT and LoRA, serve the adapter, prune it and decode on generated kernels.

    SmolLM2-135M learns to write SQL; MiniLM learns to tell from which standard-library module a docstring comes. Everything runs
    on this machine's CPU and needs no network: models come from PyPI packages, texts from the running Python or from a seed.
    """
    from sparsify.demo.pretrained import MissingModel, why_missing

    if model not in MODELS:
        raise typer.BadParameter(f"{model}: known models are {', '.join(MODELS)}", param_hint="--model")
    missing = why_missing() if model != "minilm" else ""
    if model == "smollm2" and missing:
        raise MissingModel(missing)
    if model == "auto" and missing:
        typer.echo(f"Using MiniLM instead of SmolLM2. {missing}", err=True)
    language = model != "minilm" and not missing
    if epochs is not None and math.isnan(epochs):  # which no comparison with a bound finds
        raise InputError("--epochs nan: expected a number")
    if language and epochs is not None:
        raise InputError("--epochs is for MiniLM; with SmolLM2 give --steps")
    if not language and (steps is not None or full):
        raise InputError("--steps and --full are for SmolLM2; with MiniLM give --epochs")
    if fast and full:
        raise InputError("--fast and --full contradict each other")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is there already and is not a folder")
    if language:
        from sparsify.demo import language_methods
        from sparsify.demo.language_demo import LanguageSettings, run_language_demo, run_language_tuning

        names = chosen(methods, tuple(language_methods.METHODS))
        work = LanguageSettings.make(fast=fast, full=full, methods=names, steps=steps, seed=seed, out=out)
        (run_language_tuning if tune else run_language_demo)(work)
        return
    from sparsify.demo.experiment import Settings, run_demo, run_tuning
    from sparsify.demo.methods import METHODS

    names = chosen(methods, tuple(METHODS))
    settings = Settings.make(fast=fast, methods=names, epochs=epochs, seed=seed, out=out)
    (run_tuning if tune else run_demo)(settings)


def chosen(methods: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The methods that were asked for, each once; all without a wish. Raises BadParameter for others."""
    if methods is None:
        return known
    names = tuple(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise typer.BadParameter(
            f"{', '.join(unknown) or 'nothing'}: known methods are {', '.join(known)}", param_hint="--methods"
        )
    return names


if __name__ == "__main__":
    app()
