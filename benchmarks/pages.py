"""The measured parts of the README and of docs/, made from the records in benchmarks/results/; nothing is typed in by hand.

    python benchmarks/pages.py            fill every page and draw every chart
    python benchmarks/pages.py --check    say which pages no longer agree with the records, and change nothing

A page asks for a table or a sentence by its name in `page_tables.py`, and for a chart as an ordinary picture `charts/NAME.svg`:

    <!-- measured: training_step -->
    | method | … what stands between the two lines is replaced
    <!-- /measured -->
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.page_tables import CHARTS, TABLES  # noqa: E402

ASKED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- /measured -->)", re.DOTALL)


def pages() -> list[Path]:
    """The README and everything under docs/ that is written in Markdown."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page's text with its measured parts as the newest records have them. Raises KeyError for a name that no table has."""
    return ASKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]().strip()}\n{found[3]}", text)


def wanted() -> dict[Path, str]:
    """Every file that is made from records, in full or in part, and what it should say."""
    found = {page: filled(page.read_text(encoding="utf-8")) for page in pages()}
    return found | {ROOT / "docs" / "charts" / f"{name}.svg": draw() for name, draw in CHARTS.items()}


def stale() -> list[Path]:
    """Files that say something else than the records."""
    return [path for path, text in wanted().items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def write() -> list[Path]:
    """Bring every file up to date; returns those that changed."""
    changed = stale()
    for path, text in wanted().items():
        if path in changed:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a page is stale")
    check = parser.parse_args().check
    found = stale() if check else write()
    print("\n".join(str(path.relative_to(ROOT)) for path in found) or "every page says what the records say")
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    main()
