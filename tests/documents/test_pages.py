"""The pages of the documentation: their code runs, their numbers are the records', what they quote is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import page_blocks
import pytest
from page_blocks import DOCS, GIVEN, Block, blocks, compiled

ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from benchmarks import pages  # noqa: E402

PAGES = [p for p in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))) if any(blocks(p.read_text(encoding="utf-8")))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run(page: Path, slow: bool) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        code = compiled(page, block)
        if block.not_run or (block.slow and not slow):
            continue
        for given in block.given:
            namespace[given] = GIVEN[given]()
        if block.raises:
            with pytest.raises(Exception) as raised:
                exec(code, namespace)
            assert type(raised.value).__name__ == block.raises
        else:
            exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, slow=False)


LONG = [p for p in PAGES if any(b.slow for b in blocks(p.read_text(encoding="utf-8")))]


@pytest.mark.slow  # covered by test_the_code_of_a_page_runs: the same pages without their long blocks
@pytest.mark.parametrize("page", LONG, ids=name)
def test_the_long_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, slow=True)


def test_blocks_are_found_with_what_is_said_of_them() -> None:
    text = "<!-- given: model, batch -->\n```python\na = 1\n```\n\n=== tab\n\n    <!-- raises: PlanError -->\n    ```py\n    b = 2\n    ```\n"
    assert list(blocks(text)) == [
        Block(2, "a = 1\n", ("model", "batch")),
        Block(9, "b = 2\n", raises="PlanError"),
    ]
    assert [b.not_run for b in blocks("<!-- not run: needs a GPU -->\n```python\nx\n```\n")] == ["needs a GPU"]


def test_a_block_that_fails_names_its_page_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\na = 1\nb = a / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as raised:
        run(page, slow=False)
    assert raised.traceback[-1].lineno + 1 == 5
    assert Path(raised.traceback[-1].path) == page


def test_what_is_measured_says_what_the_records_say() -> None:
    assert [name(path) for path in pages.stale()] == [], "run `python benchmarks/pages.py`"


def test_a_number_typed_by_hand_is_noticed() -> None:
    page = DOCS / "choose.md"
    text = page.read_text(encoding="utf-8")
    assert "<!-- measured: " in text
    assert pages.filled(re.sub(r"(<!-- measured: \w+ -->\n)", r"\1| 9.99 × |\n", text)) == text


def test_every_name_that_pages_are_given_is_used() -> None:
    used = {given for page in PAGES for block in blocks(page.read_text(encoding="utf-8")) for given in block.given}
    assert used == set(page_blocks.GIVEN)
