"""Every method has a page that says the same things in the same order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_blocks import DOCS, blocks

from sparsify.plan.rules import RULES

PAGES = sorted(p for p in (DOCS / "methods").glob("*.md") if p.name != "index.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_has_all_that_a_reader_asks(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^!\[.{20,}\]\(\.\./pictures/\w+\.svg\)$", text, re.MULTILINE), "a picture of the idea"
    assert "**Idea.**" in text
    assert "**When.**" in text or page.stem == "quantize"  # its idea says when
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Recipe", "Cost", "Export", "Limits"]
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", text), "its paper"
    assert "](../api/rules.md#sparsify." in text, "its options"
    assert any(not block.not_run for block in blocks(text)), "code that runs"
    assert re.search(r"measured: rates_|learning rate", text), "rates, or that none was measured"


def test_every_rule_has_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {
        name
        for name, rule in RULES.items()
        if rule.__module__.startswith("sparsify.") and f"rules.md#sparsify.{name})" not in text
    } == set()
