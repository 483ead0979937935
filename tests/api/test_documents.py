"""Documents that are made from records say what the newest record says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import coverage, families_by_rules  # noqa: E402


def test_the_table_of_families_and_rules_is_that_of_the_newest_record() -> None:
    record = json.loads(coverage.newest_rules().read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    assert text == families_by_rules.document(record), "run `python benchmarks/coverage.py --document`"


def test_the_newest_record_covers_enough_and_holds_nothing_wrong() -> None:
    rows = json.loads(coverage.newest_rules().read_text(encoding="utf-8"))["rows"]
    found = families_by_rules.totals(rows)
    assert found["architectures"] >= 120
    assert found["wrong"] == found["errors"] == 0, found
    assert {"transformers", "torch", "timm", "torchvision", "x-transformers", "diffusers"} <= {r["from"] for r in rows}


def test_the_readme_names_the_number_of_architectures_of_that_record() -> None:
    rows = json.loads(coverage.newest_rules().read_text(encoding="utf-8"))["rows"]
    assert f"Every rule on {len(rows)} architectures" in (ROOT / "README.md").read_text(encoding="utf-8")
