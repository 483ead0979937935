"""A model that writes text, and its tokenizer, from a folder: what `finetune`, `eval`, `generate` and `chat` begin with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from sparsify.cli.model_folder import CONFIG, check_folder, load_model, load_tokenizer
from sparsify.cli.prune import model_class, torch_dtype
from sparsify.console import one_line
from sparsify.errors import InputError


def load_text_model(folder: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). Raises InputError for other kinds of model, and for a folder that lacks weights or a tokenizer."""
    check_text_model(folder)
    kind = model_class(folder)
    model, missing, _ = load_model(folder, kind, torch_dtype(dtype) or "auto")
    if missing:
        raise InputError(
            f"{folder}: its files lack '{missing[0]}' ({len(missing)} tensors in all), which {kind.__name__} would start at random"
        )
    return model, load_tokenizer(folder)


def check_text_model(folder: Path) -> None:
    """Raises InputError unless the folder holds a model that writes text, and a tokenizer; reads no weights."""
    if not folder.exists():
        raise InputError(f"'{folder}' does not exist")
    check_folder(folder)
    kind = model_class(folder)
    if not getattr(kind, "can_generate", lambda: False)() or kind.main_input_name != "input_ids":
        raise InputError(
            f"{folder / CONFIG}: {kind.__name__} does not write text; a model for causal language modelling is needed"
        )
    if load_tokenizer(folder) is None:
        raise InputError(f"{folder}: has no tokenizer")


def with_adapters(model: Any, given: Sequence[str]) -> tuple[Any, list[str]]:
    """The model serving adapters "folder" or "name=folder", none active, and their names; itself where none is given."""
    import sparsify

    if not given:
        return model, []
    folders = named_folders(given)
    return sparsify.load(model, folders, active=None), list(folders)


def named_folders(given: Sequence[str]) -> dict[str, str]:
    """Name → folder (or name of a hub) of "folder" or "name=folder"; a folder is called by its last name. Raises InputError."""
    found: dict[str, str] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            folder, name = word, Path(word).resolve().name
        if not name or not folder:
            raise InputError(f"{word!r}: expected a folder, or name=folder")
        if name in found:
            raise InputError(f"two adapters would be called {name!r}: write name=folder")
        found[name] = folder
    return found


def note(text: str) -> None:
    """A line on stderr; of several processes only the first speaks."""
    import os

    if os.environ.get("RANK", "0") == "0":
        typer.echo(one_line(text), err=True)
        sys.stderr.flush()
