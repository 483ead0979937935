"""The table of long tests: what it marks, and what it complains about."""

from __future__ import annotations

from pathlib import Path

import pytest
from long_tests import COLLECTED, Row, complaints, is_long, rows

NAMES = ["a.py::x[1]", "a.py::x[2]", "b.py::y", "b.py::z"]


def test_a_row_is_read_with_its_cases(tmp_path: Path) -> None:
    table = tmp_path / "README.md"
    table.write_text(
        "| long | cases | covered by |\n|---|---|---|\n| `a.py::x` | `1`, `x y` | `b.py::y` |\n| `b.py::z` | all | `a.py::x[2]`, `b.py::y` |\n"
    )
    assert rows(table) == [Row("a.py::x", ("1", "x y"), ("b.py::y",)), Row("b.py::z", (), ("a.py::x[2]", "b.py::y"))]
    assert rows(table)[0].long() == ["a.py::x[1]", "a.py::x[x y]"]
    long = frozenset({"a.py::x[1]", "b.py::z"})
    assert [n for n in NAMES if is_long(n, long)] == ["a.py::x[1]", "b.py::z"]


def test_the_table_names_what_is_there(request: pytest.FixtureRequest) -> None:
    collected = request.config.stash[COLLECTED]
    if not collected.everything:
        pytest.skip("only a run that collects all tests knows what is missing")
    assert len(rows()) > 20
    assert complaints(rows(), collected.names, collected.slow) == []


def test_what_is_not_there_is_named() -> None:
    good = Row("a.py::x", ("1",), ("a.py::x[2]", "b.py::y"))
    assert complaints([good], NAMES, ["a.py::x[1]"]) == []
    assert complaints([good], NAMES, ["a.py::x[1]", "b.py::y"]) == [
        "b.py::y, which covers a.py::x, is not in the default run"
    ]
    assert complaints([Row("a.py::x", ("3",), ("b.py::y",))], NAMES, []) == ["there is no a.py::x[3]"]
    assert complaints([Row("b.py::z", (), ())], NAMES, ["b.py::z"]) == ["b.py::z has no cover"]
    assert complaints([Row("b.py::z", (), ("a.py::x[1]",))], NAMES, ["a.py::x[1]"]) == [
        "a.py::x[1], which covers b.py::z, is not in the default run"
    ]
