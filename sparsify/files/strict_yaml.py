"""YAML from outside: the plain part of it that people write by hand, read to the values that they see.

    learning_rate: 1e-4        the number (YAML 1.1, and PyYAML with it, reads the word "1e-4")
    on, off, yes, no, 12:30    words (YAML 1.1 reads truth values, and 750)
    &a, *a, <<, !tag           refused: nobody needs them in a plan, and ten lines of aliases unfold into gigabytes

Refused as well: a name that stands twice, text that is not UTF-8, several documents, numbers that no float holds, deep nesting, and more
values than any plan has.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

from sparsify.errors import SparsifyError
from sparsify.files.regular import read_file
from sparsify.files.strict_json import DIGITS, cut

LIMIT = 1 << 20  # bytes
MAX_DEPTH = 24
MAX_VALUES = 20_000

INTEGER = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
WORDS = {"": None, "~": None, "null": None, "true": True, "false": False, "True": True, "False": False, "Null": None}
NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF|nan|NaN|NAN)")


def parse(text: str | bytes, where: str, error: type[SparsifyError] = SparsifyError) -> Any:
    """The value. Raises `error`: "where, line 3: …"."""
    import yaml

    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as cause:
            raise error(f"{where}: not UTF-8 text: {cause}") from cause
    if len(text) > LIMIT:
        raise error(f"{where}: {len(text):,} characters, at most {LIMIT:,} are read")
    try:
        check_events(yaml, text)
        return Reading(yaml).value(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(cause, "problem", None) or str(cause)
        raise error(f"{where}{line}: not YAML that can be read: {cut(' '.join(str(what).split()))}") from cause
    except Refused as cause:
        raise error(f"{where}, line {cause.args[0]}: {cause.args[1]}") from None
    except RecursionError as cause:
        raise error(f"{where}: nested too deeply") from cause


def read(path: str | os.PathLike[str], error: type[SparsifyError] = SparsifyError) -> Any:
    """The value in a regular file of at most `LIMIT` bytes. Raises `error`, naming the file."""
    return parse(read_file(path, LIMIT, error), os.fspath(path), error)


class Refused(Exception):
    """Line and reason."""


def check_events(yaml: Any, text: str) -> None:
    """Refuse, before anything is built, what would unfold or never end: aliases, depth, number of values."""
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1
        documents += isinstance(event, yaml.DocumentStartEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise Refused(line, "anchors and aliases (& and *) are not read: write the values out")
        if getattr(event, "tag", None):
            raise Refused(line, f"the tag {cut(str(event.tag), 60)!r}: tags are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise Refused(line, f"nested too deeply (more than {MAX_DEPTH} levels)")
        if count > MAX_VALUES:
            raise Refused(line, f"more than {MAX_VALUES:,} values")
        if documents > 1:
            raise Refused(line, "a second document begins (---): one is read")


class Reading:
    """From the parser's nodes to values."""

    def __init__(self, yaml: Any) -> None:
        self.yaml = yaml

    def value(self, node: Any) -> Any:
        if node is None:
            return None
        if isinstance(node, self.yaml.ScalarNode):
            return scalar(node.value, node.start_mark.line + 1) if node.style is None else node.value
        if isinstance(node, self.yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        found: dict[str, Any] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, self.yaml.ScalarNode) else None
            if name is None or (name == "<<" and key.style is None):
                raise Refused(line, "a name is needed before the colon (merges, <<, are not read)")
            if name in found:
                raise Refused(line, f"{cut(name, 60)!r} stands there twice")
            found[name] = self.value(item)
        return found


def scalar(text: str, line: int) -> Any:
    """The value of an unquoted word."""
    if text in WORDS:
        return WORDS[text]
    if NOT_FINITE.fullmatch(text):
        raise Refused(line, f"{text} is not a number that can be used")
    if INTEGER.fullmatch(text) or NUMBER.fullmatch(text):
        if len(text) > DIGITS:
            raise Refused(line, f"a number of {len(text)} digits")
        if INTEGER.fullmatch(text):
            return int(text)
        value = float(text)
        if not math.isfinite(value):
            raise Refused(line, f"the number {text[:24]} is too large: no float can hold it")
        return value
    return text


__all__ = ["parse", "read"]
