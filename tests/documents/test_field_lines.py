"""Fields of docstrings become lists on the API pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

field_lines = pytest.importorskip("field_lines", reason="griffe comes with mkdocstrings: pip install -e '.[docs]'")


def test_fields_are_a_list_and_go_on_to_an_empty_line() -> None:
    text = "Does it.\n\nrank: how many;\n    also this\nlr, decay: rates\nfor all.\n\nReturns x: a thing."
    assert field_lines.as_list(text) == (
        "Does it.\n\n- **rank**: how many;\n    also this\n- **lr**, **decay**: rates\n    for all.\n\nReturns x: a thing."
    )


def test_sentences_with_a_colon_are_none() -> None:
    for text in ("Raises PlanError: nothing fits.", "a :class: here", "Two words here: no.", "key:value"):
        assert field_lines.as_list(text) == text


def test_patterns_in_quotes_are_code() -> None:
    assert (
        field_lines.GLOB.sub(r"`\1`", 'such as "*.bias", "norm" or `"*.w"`') == 'such as `"*.bias"`, "norm" or `"*.w"`'
    )
