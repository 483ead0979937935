"""Every public name says what it does: its arguments, what it returns and raises, where they are not plain from its signature."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sparsify
import sparsify.formats
import sparsify.methods
import sparsify.train
from sparsify.host.handle import Handle

ROOT = Path(__file__).parents[2]
LISTED = re.compile(r"^::: (sparsify\.[\w.]+)$", re.MULTILINE)
PLAIN = {"self", "cls", "model", "args", "kwargs"}  # that everybody knows


def on_the_pages() -> list[str]:
    """What the API pages show, by name."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return sorted({name for page in pages for name in LISTED.findall(page.read_text(encoding="utf-8"))})


def found(name: str) -> Any:
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            thing: Any = __import__(".".join(parts[:split]), fromlist=["_"])
            for part in parts[split:]:
                thing = getattr(thing, part)
            return thing
        except (ImportError, AttributeError):
            continue
    raise AssertionError(f"the API pages show {name}, which is not there")


def members(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods and properties that a class itself defines."""
    fields = set(getattr(cls, "__dataclass_fields__", ()))
    for name, member in vars(cls).items():
        if name.startswith("_") or name in fields:
            continue
        if isinstance(member, property):
            member = member.fget
        member = getattr(member, "__func__", member)
        if callable(member) and inspect.isfunction(inspect.unwrap(member)):
            yield name, member


def said(thing: Any) -> str:
    text = thing.__dict__.get("__doc__") if isinstance(thing, type) else thing.__doc__
    return inspect.cleandoc(text or "")


def unsaid(arguments: list[str], text: str) -> list[str]:
    """Arguments whose names the text does not hold as words."""
    return [name for name in arguments if name not in PLAIN and not re.search(rf"\b{re.escape(name)}\b", text)]


def test_every_public_name_is_on_a_page() -> None:
    listed = {name.rpartition(".")[2] for name in on_the_pages()}
    assert set(sparsify.__all__) - {"__version__"} <= listed
    assert set(sparsify.train.__all__) <= listed


@pytest.mark.parametrize("name", on_the_pages())
def test_it_says_what_it_does_and_takes(name: str) -> None:
    thing = found(name)
    text = said(thing)
    assert len(text.split()) >= 4, f"{name} says nothing of itself"
    if dataclasses.is_dataclass(thing) and thing is not Handle and name not in NO_FIELDS:
        own = [f.name for f in dataclasses.fields(thing) if f.init and f.name in thing.__annotations__]
        assert unsaid([n for n in own if not n.startswith("_")], text) == [], name
    elif inspect.isfunction(thing):
        taken = list(inspect.signature(thing).parameters)
        if len(taken) > 2:
            assert unsaid(taken, text) == [], name


NO_FIELDS = {
    "sparsify.program.Program",  # made by passes, read by its properties
    "sparsify.pruning.sparse_checkpoint.SparseCheckpoint",  # made by open_sparse
}


@pytest.mark.parametrize("name", on_the_pages())
def test_so_do_its_methods(name: str) -> None:
    thing = found(name)
    if not inspect.isclass(thing):
        return
    silent = [member for member, function in members(thing) if len(said(function).split()) < 3]
    assert silent == [], name


def test_a_text_that_leaves_out_an_argument_is_noticed() -> None:
    assert unsaid(["model", "rank", "alpha"], "rank: how many; alphabet") == ["alpha"]
