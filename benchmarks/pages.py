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
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import losses  # noqa: E402, F401  (its tables stand beside the others)
from benchmarks.page_tables import CHARTS, READ, TABLES  # noqa: E402

ASKED = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- /measured -->)", re.DOTALL)


def pages() -> list[Path]:
    """The README and everything under docs/ that is written in Markdown."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class PageError(Exception):
    """A page asks for what the records or the tables do not have. The text names the page, the table, the row and the record."""


def filled(text: str, page: str = "the page") -> str:
    """A page's text with its measured parts as the newest records have them. page: its name, for errors.

    Raises PageError for a table that is not there, and for a row that a record lacks or that the table has no name for.
    """

    def part(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            close = difflib.get_close_matches(found[2], TABLES, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise PageError(
                f"{page}: asks for the table '{found[2]}', which benchmarks/page_tables.py does not make{hint}"
            )
        table = made(TABLES[found[2]], f"{page}: table '{found[2]}'")
        return f"{found[1]}{table.strip()}\n{found[3]}"

    return ASKED.sub(part, text)


def made(make: Callable[[], str], who: str) -> str:
    """What a table or a chart makes. Raises PageError, which names the row and the record, where one of the two lacks it."""
    before = len(READ)
    try:
        return make()
    except FileNotFoundError as error:
        raise PageError(f"{who}: {error}") from error
    except KeyError as error:
        row, records = error.args[0], list(dict.fromkeys(READ[before:]))
        holding = [path for path in records if str(row) in path.read_text(encoding="utf-8")]
        named = ", ".join(path.name for path in holding or records) or "benchmarks/results/"
        what = "has a row that the table has no name for" if holding else "lacks a row that the table needs"
        raise PageError(f"{who}: {named} {what}: {row!r}") from error


def wanted() -> dict[Path, str]:
    """Every file that is made from records, in full or in part, and what it should say. Raises PageError."""
    found = {page: filled(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()) for page in pages()}
    charts = ROOT / "docs" / "charts"
    return found | {charts / f"{name}.svg": made(draw, f"chart '{name}'") for name, draw in CHARTS.items()}


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
    try:
        found = stale() if check else write()
    except PageError as error:
        sys.exit(f"error: {error}")
    print("\n".join(str(path.relative_to(ROOT)) for path in found) or "every page says what the records say")
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    main()
