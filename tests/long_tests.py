"""The table in README.md: which tests are long, and which tests of the default run cover what they do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Row:
    """test: `file::name` below `tests/`. cases: ids of its parameters; none for all. covers: tests with or without a case."""

    test: str
    cases: tuple[str, ...]
    covers: tuple[str, ...]

    def long(self) -> list[str]:
        return [f"{self.test}[{case}]" for case in self.cases] or [self.test]


@dataclass(frozen=True)
class Collected:
    """What pytest found. everything: it was asked for all tests, so that what is missing does not exist."""

    everything: bool
    names: list[str]
    slow: list[str]


COLLECTED = pytest.StashKey[Collected]()


def rows(table: Path = TABLE) -> list[Row]:
    found = []
    for line in table.read_text(encoding="utf-8").splitlines():
        cells = [re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 3:
            found.append(Row(cells[0][0], tuple(cells[1]), tuple(cells[2])))
    return found


def named(name: str) -> str:
    """A test's id below `tests/`."""
    return name.removeprefix("tests/")


def is_long(name: str, long: frozenset[str]) -> bool:
    return name in long or name.partition("[")[0] in long


def complaints(rows: Iterable[Row], collected: Iterable[str], slow: Iterable[str]) -> list[str]:
    """What is wrong with the table, for a run that collected everything; `slow` is what of that is left out."""
    every, left_out = set(collected), set(slow)
    of = {name.partition("[")[0] for name in every}
    default = every - left_out
    shown = default | {name.partition("[")[0] for name in default}
    found = []
    for row in rows:
        found += [f"there is no {name}" for name in row.long() if name not in every and name not in of]
        found += [f"{row.test} has no cover" for _ in [0] if not row.covers]
        found += [
            f"{name}, which covers {row.test}, is not in the default run" for name in row.covers if name not in shown
        ]
    return found
