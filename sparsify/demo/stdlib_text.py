"""Text that every machine with Python already has: the standard library's own sources, read with `ast`.

Two data sets are made from it, both deterministic for a given Python version, without any download:

    docstring_task()  classification: which module does this docstring come from?
    prose(), code()   plain text for a small language model: docstrings, or whole source files

Nothing here imports torch, so benchmarks and tests can reuse it cheaply.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "lib2to3",
        "pydoc_data",
        "turtledemo",
        "__pycache__",
    }
)
"""Directories whose files are tests, installed packages or data, or no longer in every supported Python."""


@dataclass(frozen=True)
class Docstring:
    """One documented function, class or method.

    module: top-level module or package (`asyncio`, `json`); `_pydecimal`, the Python half of `decimal`, counts as
        `decimal`. path: dotted name of the thing (`json.decoder.JSONDecoder`). text: white space collapsed.
    """

    module: str
    path: str
    text: str


@dataclass(frozen=True)
class Task:
    """A text classification data set. Labels index `classes`; no text is in both parts."""

    classes: tuple[str, ...]
    train_texts: tuple[str, ...]
    train_labels: tuple[int, ...]
    test_texts: tuple[str, ...]
    test_labels: tuple[int, ...]

    def subset(self, classes: set[str] | frozenset[str] | tuple[str, ...]) -> Task:
        """The same task, with the same label numbers, on the texts of some of the classes."""
        keep = {self.classes.index(name) for name in classes}
        train = [(t, y) for t, y in zip(self.train_texts, self.train_labels, strict=True) if y in keep]
        test = [(t, y) for t, y in zip(self.test_texts, self.test_labels, strict=True) if y in keep]
        return Task(self.classes, *_columns(train), *_columns(test))


def stdlib_root() -> Path:
    """Where the running Python keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files() -> list[Path]:
    """Every Python source file of the standard library, without tests and installed packages, sorted by name."""
    root = stdlib_root()
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]  # which hold most files by far
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


@cache
def docstrings() -> tuple[Docstring, ...]:
    """Docstrings of all functions, classes, methods and modules, in a fixed order (by file, then by line)."""
    return tuple(read_docstrings())


def read_docstrings() -> Iterator[Docstring]:
    """The same, file by file as they are asked for: who needs a few does not parse them all."""
    root = stdlib_root()
    for file in source_files():
        tree = _parse(file)
        if tree is None:
            continue
        parts = file.relative_to(root).with_suffix("").parts
        dotted = ".".join(part for part in parts if part != "__init__")
        for path, text in _walk(tree, dotted):
            yield Docstring(_label(parts[0]), path, text)


def docstring_task(
    classes: int = 24,
    *,
    least: int = 60,
    most: int = 260,
    held_out: float = 0.25,
    min_words: int = 5,
    max_words: int = 80,
) -> Task:
    """Which module does this docstring come from?

    The label is the top-level module. Its name, and the names of its parts, are replaced by "it" in the text
    (`unittest` loses "unittest", "mock", "loader"…), so that the answer is not printed in the question.

    classes: at most this many modules, those with the most texts. least: a module needs this many texts.
    most: texts kept per module, so that none dominates (those with the smallest hash, so not only the first files).
    held_out: share of the texts that is held out, decided by a hash of the text alone: the same text can never be
        on both sides, and adding a module moves no text of another one.
    min_words, max_words: shorter docstrings are dropped, longer ones cut.

    Texts that occur in more than one module are dropped from all of them (they have no right answer), repeated
    texts inside a module are kept once.
    """
    by_text: dict[str, set[str]] = defaultdict(set)
    forbidden = _own_words()
    for doc in docstrings():
        text = _without(doc.text, forbidden[doc.module])
        words = text.split()
        if len(words) >= min_words:
            by_text[" ".join(words[:max_words])].add(doc.module)
    per_module: dict[str, list[str]] = defaultdict(list)
    for text, modules in by_text.items():
        if len(modules) == 1:
            per_module[next(iter(modules))].append(text)
    ranked = sorted(per_module, key=lambda m: (-len(per_module[m]), m))
    names = sorted(m for m in ranked[:classes] if len(per_module[m]) >= least)
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, name in enumerate(names):
        for text in sorted(per_module[name], key=_hash)[:most]:
            (test if _hash(text, "split") < held_out else train).append((text, label))
    for part in (train, test):
        part.sort(key=lambda pair: _hash(pair[0], "order"))
    return Task(tuple(names), *_columns(train), *_columns(test))


def prose() -> Iterator[str]:
    """Docstrings as running text, each once, in the order of the files."""
    seen = set()
    for doc in docstrings():
        if doc.text not in seen:
            seen.add(doc.text)
            yield doc.text


def code(limit: int | None = None) -> str:
    """Source files joined into one text, at most `limit` characters."""
    pieces, size = [], 0
    for file in source_files():
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        pieces.append(text)
        size += len(text)
        if limit is not None and size >= limit:
            break
    return "\n".join(pieces)[:limit]


def _parse(file: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None


def _walk(node: ast.AST, path: str) -> Iterator[tuple[str, str]]:
    """(dotted path, docstring) of `node` and everything in it that has one."""
    text = ast.get_docstring(node, clean=False) if isinstance(node, _DOCUMENTED) else None
    if text:
        yield path, " ".join(inspect.cleandoc(text).split())
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        inside = f"{path}.{name}" if isinstance(child, _DOCUMENTED) and name else path
        yield from _walk(child, inside)


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _label(part: str) -> str:
    return part.removeprefix("_py") if part.startswith("_py") else part


def _own_words() -> dict[str, re.Pattern[str]]:
    """For each top-level module a pattern of the names that would give it away.

    The module's own name also inside longer words (`DocTestRunner`, "turtles") unless it is very short, the names of
    its files as whole words only. In any case of letters.
    """
    root = stdlib_root()
    words: dict[str, set[str]] = defaultdict(set)
    for file in source_files():
        parts = file.relative_to(root).with_suffix("").parts
        label = _label(parts[0])
        words[label].update(part.strip("_") for part in (label, *parts) if part != "__init__")
    patterns = {}
    for label, names in words.items():
        whole = "|".join(sorted(map(re.escape, names - {""}), key=lambda w: (-len(w), w)))
        own = label.strip("_")
        inside = f"{re.escape(own)}|" if len(own) > 4 else ""
        patterns[label] = re.compile(rf"{inside}(?<![A-Za-z0-9])(?:{whole})(?![A-Za-z0-9])", re.IGNORECASE)
    return patterns


def _without(text: str, names: re.Pattern[str]) -> str:
    return " ".join(names.sub("it", text).split())


def _hash(text: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the text alone (`hash()` differs between runs)."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _columns(pairs: list[tuple[str, int]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return tuple(text for text, _ in pairs), tuple(label for _, label in pairs)


def describe(task: Task) -> str:
    """One line for people: sizes, classes, and how well one would do by always naming the largest class."""
    largest = Counter(task.test_labels).most_common(1)[0][1] / max(1, len(task.test_labels))
    return (
        f"{len(task.classes)} modules, {len(task.train_texts)} docstrings to train on, "
        f"{len(task.test_texts)} held out; always guessing the largest module scores {largest:.1%}"
    )
