"""JSON from outside, read without trust: one parser for plans, PEFT configurations and whatever else a stranger may have written.

`json.loads` alone takes NaN, keeps the last of two equal keys, dies of deep nesting, and turns ten thousand digits into a
number that no float can hold. Here each of these is an error that says where it stands.
"""

from __future__ import annotations

import json
import math
from typing import Any

from sparsify.errors import SparsifyError

MAX_DEPTH = 32
MAX_DIGITS = 40
MAX_CHARACTERS = 16 << 20


class Damaged(ValueError):
    """What is wrong with the text, without the place; `parse_json` adds the place."""


def parse_json(text: Any, where: str, error: type[SparsifyError]) -> Any:
    """The value of a JSON text. `where` starts every message.

    Raises `error` for: no string, more than 16 Mi characters, no JSON, a key that is given twice, NaN or Infinity, numbers of more
    than 40 digits or beyond what a float holds, nesting deeper than 32, text that is not Unicode.
    """
    if not isinstance(text, str):
        raise error(f"{where} is not JSON: expected a string, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise error(f"{where} is not read: {len(text):,} characters, at most {MAX_CHARACTERS:,} are")
    hooks: dict[str, Any] = {"parse_constant": constant, "parse_int": integer, "parse_float": number}
    try:
        value = json.loads(text, object_pairs_hook=distinct, **hooks)
        check_tree(value)
    except RecursionError:
        raise error(f"{where} is not read: it is nested deeper than {MAX_DEPTH} levels") from None
    except Damaged as damage:
        raise error(f"{where} is not read: {damage}") from None
    except ValueError as damage:
        raise error(f"{where} is not JSON: {damage}") from None
    return value


def constant(name: str) -> Any:
    raise Damaged(f"it holds {name}, which is not a number")


def integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Damaged(f"it holds a number of {len(digits)} digits ({digits[:12]}…), at most {MAX_DIGITS} are read")
    return int(digits)


def number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Damaged(f"it holds the number {digits[:24]}, which no float can hold")
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Damaged(f"the key {short(twice)} is given twice")
    return found


def check_tree(value: Any) -> None:
    """No nesting beyond MAX_DEPTH, no lone surrogates (they cannot be printed or written again)."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise Damaged(f"it is nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not is_unicode(item):
                raise Damaged(f"the text {item[:40]!a} is not Unicode (half of a surrogate pair)")
        level, depth = below, depth + 1


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: Any, limit: int = 80) -> str:
    """`repr` for messages: never longer than `limit`, and never an error of its own (numbers of 5,000 digits have no `repr`)."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= limit else text[: limit - 1] + "…"
