"""The messages that the troubleshooting page quotes are those of the code."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import page_blocks

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"^#### `(.+)`$", re.MULTILINE)
GAP = "\0"


@functools.cache
def messages() -> tuple[str, ...]:
    """Every text of the package as it is written, with GAP where a value is put in."""
    found: set[str] = set()
    for path in (ROOT / "sparsify").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return tuple(found)


def reads_like(message: str, pieces: list[str]) -> bool:
    """Whether the pieces stand in a message, in this order."""
    place = 0
    for piece in pieces:
        place = message.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def in_code(quoted: str) -> bool:
    """Whether some text of the package reads like this, with anything where "…" stands."""
    pieces = quoted.split("…")
    return any(reads_like(message, pieces) for message in messages())


def test_every_quoted_message_is_in_the_code() -> None:
    quoted = QUOTED.findall((page_blocks.DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) > 30
    assert [text for text in quoted if not in_code(text)] == []


def test_every_message_has_its_cure_below() -> None:
    lines = [
        line for line in (page_blocks.DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines() if line
    ]
    bare = [
        line
        for line, below in zip(lines, [*lines[1:], "#"], strict=True)
        if line.startswith("####") and below[0] == "#"
    ]
    assert bare == []


def test_a_message_that_nothing_says_is_noticed() -> None:
    assert in_code("compile: this model is compiled already; compile the …")
    assert not in_code("compile: this model was compiled already")
