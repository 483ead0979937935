"""Commands and files that the pages name are there: words, options, paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from page_blocks import DOCS

from sparsify.cli import app

ROOT = DOCS.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "RELEASING.md",
    ROOT / "SECURITY.md",
    *sorted(DOCS.rglob("*.md")),
]
SHELL = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(sparsify [a-z][^`\n]*)`")
PATH = re.compile(r"`((?:benchmarks|docs|examples|sparsify|tests)/[\w./-]+)`")
PYTHON = re.compile(r"\bpython ((?:benchmarks|docs|examples|tests)/[\w./]+\.py)")


def commands(text: str) -> Iterator[str]:
    """Lines of shell blocks with continuations joined, and commands inside sentences; comments left out."""
    for block in SHELL.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from INLINE.findall(text)


def unknown(line: str) -> str | None:
    """What a `sparsify …` line says that the command line does not know; None for nothing, and for other programs."""
    words = shlex.split(line.replace("…", " "), comments=True)
    if words[:1] != ["sparsify"]:
        return None
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return rest[0]
        command = command.commands[rest.pop(0)]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h", "--version"}
    return next((w for w in rest if re.match(r"--?[a-z]", w) and w.partition("=")[0] not in known), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_and_files_of_a_page_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [line for line in commands(text) if unknown(line)] == []
    named = [*PATH.findall(text), *PYTHON.findall(text)]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_pages_have_commands() -> None:
    found = [line for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]
    assert len([line for line in found if line.startswith("sparsify ")]) > 20


def test_what_is_not_there_is_noticed() -> None:
    assert unknown("sparsify plan model/ --budget memory=8GiB") is None
    assert unknown("sparsify plan model/ --bugdet memory=8GiB") == "--bugdet"
    assert unknown("sparsify plam model/") == "plam"
    assert unknown("sparsify adapter export a --to vllm") is None
    assert unknown("pip install --quiet x") is None
