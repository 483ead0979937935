"""`sparsify eval`: what a model, and each of its adapters, makes of rows that it has not learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.tables import show
from sparsify.cli.text_model import load_text_model, named_folders, note, with_adapters


def evaluate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder.")],
    data: Annotated[Path, typer.Argument(help="Rows: .jsonl, .parquet, or a folder that `datasets` saved.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="An adapter folder (or owner/name of a hub), or name=folder. Repeatable; each is measured.",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Measure the model without an adapter too.")] = True,
    format: Annotated[str, typer.Option(help="auto, messages, text or prompt-completion.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Of a folder with several.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens at which a row is cut.")] = 1024,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Rows at a time.")] = 8,
    exact: Annotated[
        bool, typer.Option("--exact/--no-exact", help="Compare greedy completions with the references.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto (as stored), fp32, bf16 or fp16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Measure loss, perplexity and exact answers of a model and its adapters on rows of data."""
    from sparsify.errors import InputError
    from sparsify.finetune.evaluate import evaluate as measure
    from sparsify.finetune.rows import KEYS, read_rows
    from sparsify.plan import nearest

    if format not in ("auto", *KEYS):
        raise InputError(f"--format {format!r}{nearest(format, ['auto', *KEYS])}")
    named_folders(adapter or [])
    loaded, tokenizer = load_text_model(model, dtype)
    rows = read_rows(data, tokenizer, length=length, format=format, split=split)
    note(f"data: {rows}")
    host, names = with_adapters(loaded, adapter or [])
    found = {}
    for name in [None, *names] if base or not names else names:
        if names:
            host.sparsify.set_adapter(name)
        found[name or "base"] = measure(host, tokenizer, rows, batch=batch, exact=exact)
    if as_json:
        typer.echo(json.dumps({name: scores.to_dict() for name, scores in found.items()}, indent=1))
        return
    show(
        ["adapter", "loss", "perplexity", "exact"],
        [
            [name, f"{s.loss:.4f}", f"{s.perplexity:.2f}", "–" if s.exact is None else f"{s.exact} of {s.asked}"]
            for name, s in found.items()
        ],
    )
    first = next(iter(found.values()))
    typer.echo(f"{first.rows} rows, {first.tokens:,} tokens")


__all__ = ["evaluate"]
