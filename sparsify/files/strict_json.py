"""JSON from outside: what is ambiguous, endless or no number at all is an error that names its place.

Refused: text that is not UTF-8, an object with a name twice, NaN and infinities, numbers that no float can hold, nesting deeper than the
interpreter's stack, and text that no file could hold again (half of a surrogate pair).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeGuard

from sparsify.errors import SparsifyError
from sparsify.files.regular import check_regular, read_file

#: a value that JSON can hold
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

LIMIT = 64 << 20  # bytes
DIGITS = 300  # any such number is a finite float


def parse(
    text: str | bytes,
    where: str,
    error: type[SparsifyError] = SparsifyError,
    *,
    depth: int | None = None,
    infinite: bool = False,
) -> Json:
    """The value. Raises `error` with `where` in front: "…: not JSON that can be read: …".

    depth: most levels of nesting. infinite: NaN and infinities may stand there, as Python's own writer leaves them.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        else:
            text.encode()
        value = json.loads(
            text,
            parse_int=whole_number,
            parse_float=number,
            parse_constant=float if infinite else no_number,
            object_pairs_hook=once,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        if depth is not None:
            check_depth(value, depth)
    except RecursionError as cause:
        raise error(f"{where}: not JSON that can be read: nested too deeply") from cause
    except ValueError as cause:  # JSONDecodeError, UnicodeDecodeError and UnicodeEncodeError among them
        raise error(f"{where}: not JSON that can be read: {cut(str(cause))}") from cause
    return value


def read(
    path: str | os.PathLike[str],
    error: type[SparsifyError] = SparsifyError,
    limit: int = LIMIT,
    *,
    depth: int | None = None,
) -> Json:
    """The value in a regular file of at most `limit` bytes. Raises `error`, naming the file."""
    from sparsify.files.atomic import shown

    return parse(read_file(path, limit, error), shown(Path(path)), error, depth=depth)


def read_object(
    path: str | os.PathLike[str],
    error: type[SparsifyError] = SparsifyError,
    limit: int = LIMIT,
    *,
    infinite: bool = False,
) -> dict[str, Json]:
    """The JSON object in a regular file. Raises `error`, naming the file, for anything else."""
    from sparsify.files.atomic import shown

    check_regular(path, error)
    document = parse(read_file(path, limit, error), shown(Path(path)), error, infinite=infinite)
    if not isinstance(document, dict):
        raise error(f"{shown(Path(path))}: expected a JSON object, found {kind(document)}")
    return document


def is_objects(value: object) -> TypeGuard[list[dict[str, Json]]]:
    """Whether a JSON value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def is_texts(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a JSON value is an object of strings."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {
        list: "a list",
        dict: "an object",
        str: "a string",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "nothing")


def check_depth(value: object, depth: int) -> None:
    level = [value]
    for _ in range(depth + 1):
        lists = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [inner for item in lists if isinstance(item, list) for inner in item]
        if not level:
            return
    raise ValueError(f"nested too deeply (more than {depth} levels)")


def short(value: object, limit: int = 80) -> str:
    """`repr` for messages: never longer than `limit`, and never an error of its own (numbers of 5,000 digits have no `repr`)."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__} that cannot be shown>"
    return cut(text, limit)


def cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a whole number of {len(text.lstrip('-'))} digits ({text[:12]}…)")
    return int(text)


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is too large: no float can hold it")
    return value


def no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice[:60]!r} stands twice in one object")
    return found
