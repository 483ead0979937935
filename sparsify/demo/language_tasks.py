"""Two tasks for a small language model, made from a seed, and the text on which forgetting is measured.

    sql     Question: how many books with price over 20 are there?\\nSQL:   →   SELECT COUNT(*) FROM books WHERE price > 20;
    dates   Date: the 5th of March 1987\\nISO:                              →   1987-03-05

A question belongs to training or to the held-out part by a hash of its own text, so that no held-out question is ever trained on.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sparsify.demo.stdlib_text import read_docstrings

TABLES = ("users", "orders", "cities", "books", "songs", "teams", "trains", "rooms", "films", "farms", "ships", "games")
COLUMNS = ("age", "price", "size", "year", "score", "weight", "speed", "height", "rank", "length", "stock", "cost")
COUNTS = (
    ("how many {t}{f} are there", "SELECT COUNT(*) FROM {t}"),
    ("count the {t}{f}", "SELECT COUNT(*) FROM {t}"),
    ("what is the average {d} of {t}{f}", "SELECT AVG({d}) FROM {t}"),
    ("the mean {d} of all {t}{f}", "SELECT AVG({d}) FROM {t}"),
    ("what is the highest {d} of {t}{f}", "SELECT MAX({d}) FROM {t}"),
    ("what is the lowest {d} of {t}{f}", "SELECT MIN({d}) FROM {t}"),
    ("add up the {d} of {t}{f}", "SELECT SUM({d}) FROM {t}"),
    ("which {d} do {t}{f} have", "SELECT DISTINCT {d} FROM {t}"),
)
LISTS = (
    ("list the {t}{f}", "SELECT * FROM {t}"),
    ("show me all {t}{f}", "SELECT * FROM {t}"),
    ("{d} and {c} of {t}{f}", "SELECT {d}, {c} FROM {t}"),
)
FILTERS = (
    ("", ""),
    (" with {e} over {n}", " WHERE {e} > {n}"),
    (" with {e} under {n}", " WHERE {e} < {n}"),
    (" with {e} of at least {n}", " WHERE {e} >= {n}"),
    (" with {e} from {n} to {m}", " WHERE {e} BETWEEN {n} AND {m}"),
    (" with {e} other than {n}", " WHERE {e} <> {n}"),
)
ORDERS = (
    ("", ""),
    (", by {g}", " ORDER BY {g}"),
    (", largest {g} first", " ORDER BY {g} DESC"),
    (", the {k} with the smallest {g}", " ORDER BY {g} LIMIT {k}"),
)
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

Row = tuple[str, str]
"""A prompt, and the answer that should follow it."""


def sql_row(draw: random.Random) -> Row:
    c, d = draw.sample(COLUMNS, 2)
    n = draw.randrange(10, 60)
    words = {
        "t": draw.choice(TABLES), "c": c, "d": d, "e": draw.choice(COLUMNS), "g": draw.choice(COLUMNS), "n": n,
        "m": n + draw.randrange(1, 40), "k": draw.randrange(2, 10),
    }  # fmt: skip
    is_list = draw.random() < 0.5
    asked, sql = draw.choice(LISTS if is_list else COUNTS)
    condition, where = draw.choice(FILTERS)
    order, by = draw.choice(ORDERS) if is_list else ("", "")
    asked = asked.replace("{f}", condition) + order
    return f"Question: {asked.format(**words)}?\nSQL:", f" {(sql + where + by).format(**words)};"


def date_row(draw: random.Random) -> Row:
    month, day, year = draw.randrange(12), draw.randrange(1, 29), draw.randrange(1800, 2100)
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10 if day not in (11, 12, 13) else 0, "th")
    name = MONTHS[month]
    written = draw.choice(
        (f"{day} {name} {year}", f"{name} {day}, {year}", f"the {day}{ending} of {name} {year}", f"{name[:3]} {day} {year}")
    )  # fmt: skip
    return f"Date: {written}\nISO:", f" {year}-{month + 1:02}-{day:02}"


@dataclass(frozen=True)
class LanguageTask:
    """name and title for people; row: a seeded generator → one question with its answer."""

    name: str
    title: str
    row: Callable[[random.Random], Row]

    def rows(self, seed: int, held_out: bool = False) -> Iterator[Row]:
        """An endless stream of one part's questions: an eighth is held out, by a hash of the question."""
        draw = random.Random(f"{self.name} {seed}")  # a string seeds by its SHA-512: the same everywhere
        while True:
            row = self.row(draw)
            if (hashlib.blake2b(row[0].encode(), digest_size=1).digest()[0] < 32) == held_out:
                yield row

    def distinct(self, seed: int, count: int, held_out: bool = False) -> list[Row]:
        """The first `count` different questions."""
        found: dict[str, str] = {}
        stream = self.rows(seed, held_out)
        while len(found) < count:
            found.setdefault(*next(stream))
        return list(found.items())


SQL = LanguageTask("sql", "questions to SQL", sql_row)
DATES = LanguageTask("dates", "dates to ISO 8601", date_row)


def general_text() -> str:
    """Prose about Python, on which forgetting is measured: the `help()` topics of this Python; never trained on."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_text(characters: int) -> str:
    """Docstrings of the standard library, which pruning calibrates on: another text than `general_text`."""
    pieces, size = [], 0
    for doc in read_docstrings():
        if len(doc.text) > 200:
            pieces.append(doc.text)
            size += len(doc.text)
        if size >= characters:
            break
    return "\n".join(pieces)
