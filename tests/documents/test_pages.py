"""The pages of the documentation: their code runs, their numbers are the records', what they quote is there."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page_blocks
import pytest
from page_blocks import DOCS, GIVEN, Block, blocks, compiled

ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from benchmarks import losses, page_tables, pages  # noqa: E402

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


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The records in a folder of our own, which the tables read."""
    folder = tmp_path / "results"
    shutil.copytree(page_tables.RESULTS, folder)
    monkeypatch.setattr(page_tables, "RESULTS", folder)
    monkeypatch.setattr(losses, "RESULTS", folder)
    return folder


def change(records: Path, name: str, edit: Callable[[Any], None]) -> None:
    """A newer record of a benchmark, with something else in it."""
    path = max(records.glob(f"{name}-????-??-??.json"))
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    (records / f"{name}-2999-01-01.json").write_text(json.dumps(document), encoding="utf-8")


def row_of(document: Any, variant: str) -> Any:
    return next(row for row in document["results"] if row["variant"] == variant)


def test_where_we_lose_follows_the_records(records: Path) -> None:
    def lost() -> str:
        return next(line for line in losses.where_we_lose().splitlines() if line.startswith("| [1B"))

    assert "llama.cpp Q4_0" in lost()
    assert "| 74 % |".replace(" %", "\N{NO-BREAK SPACE}%") in lost()
    change(records, "cpu_decode-llama-1b-int8-2threads", lambda d: row_of(d, "llamacpp-Q4_0").update(per_second=1.0))
    with pytest.raises(StopIteration):  # none is lost any more: OpenVINO's int4 is level
        lost()
    change(records, "cpu_decode-llama-1b-int8-2threads", lambda d: row_of(d, "openvino-int4").update(per_second=99.0))
    assert "OpenVINO int4 99.0" in lost()


def test_a_page_that_asks_for_no_table_is_named() -> None:
    with pytest.raises(
        pages.PageError, match=r"docs/cpu\.md: asks for the table 'decode_1c'.*did you mean 'decode_1b'"
    ):
        pages.filled("<!-- measured: decode_1c -->\n<!-- /measured -->", "docs/cpu.md")


ASKS = "<!-- measured: decode_smollm2 -->\n<!-- /measured -->"


def test_a_row_that_no_table_knows_is_named_with_page_and_record(records: Path) -> None:
    change(records, "cpu_decode-smollm2-2threads", lambda d: row_of(d, "bf16").update(variant="bf17"))
    with pytest.raises(pages.PageError) as raised:
        pages.filled(ASKS, "docs/cpu.md")
    assert str(raised.value) == (
        "docs/cpu.md: table 'decode_smollm2': cpu_decode-smollm2-2threads-2999-01-01.json has a row that the table has no name for: 'bf17'"
    )


def test_a_row_that_a_record_lacks_is_named_with_page_and_record(records: Path) -> None:
    change(
        records,
        "train_step-compiled-2threads",
        lambda d: d.update(rows=[r for r in d["rows"] if r["method"] != "miss+compile"]),
    )
    with pytest.raises(pages.PageError, match=r"docs/a\.md.*compiled-2threads-2999-01-01\.json .*: 'miss\+compile'"):
        pages.filled("<!-- measured: compiled_step -->\n<!-- /measured -->", "docs/a.md")
    for path in records.glob("in_place-*.json"):
        path.unlink()
    with pytest.raises(pages.PageError, match=r"docs/a\.md: table 'in_place': no record in_place-DATE\.json"):
        pages.filled("<!-- measured: in_place -->\n<!-- /measured -->", "docs/a.md")


def test_every_name_that_pages_are_given_is_used() -> None:
    used = {given for page in PAGES for block in blocks(page.read_text(encoding="utf-8")) for given in block.given}
    assert used == set(page_blocks.GIVEN)
