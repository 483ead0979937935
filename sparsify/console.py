r"""Text on its way to people: plain words where a console has no character, escapes where a name holds what is no text.

    "W → 2 × 3 …"        UTF-8: as it is      cp1252: "W -> 2 × 3 …"      ASCII: "W -> 2 x 3 ..."
    "a\x1b[31mb"         everywhere "a\x1b[31mb", spelled out: a name must not colour, clear or reorder the text around it

`@printable` gives a class this in `str()` and `repr()`, so that `print(model.sparsify.report)` works in a user's script whatever
`sys.stdout` is. Files are written as UTF-8 and get the text in full: `in_full(report)`. A command of ours also calls `adapt_streams()`,
which does the same for whatever else is printed (tables of rich, progress bars, help texts).

`with stage("tracing the model", progress):` says on stderr what is being done when that takes longer than people wait in silence.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from html import escape
from typing import TypeVar

Class = TypeVar("Class", bound=type)

HANDLER = "sparsify.plain"
"""Name of the codec error handler: `text.encode("cp1252", HANDLER)` never raises."""

PLAIN = {
    "→": "->", "←": "<-", "↔": "<->", "▶": ">", "►": ">", "─": "-", "━": "-", "═": "=", "│": "|", "┃": "|", "┌": "+", "┐": "+",
    "└": "+", "┘": "+", "├": "+", "┤": "+", "┬": "+", "┴": "+", "┼": "+", "╭": "+", "╮": "+", "╯": "+", "╰": "+", "…": "...",
    "×": "x", "·": "*", "•": "*", "‖": "||", "∥": "||", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "±": "+-", "−": "-", "–": "-",
    "—": "-", "‑": "-", "∘": "*", "√": "sqrt ", "Σ": "sum ", "Δ": "d", "α": "alpha", "ε": "eps", "µ": "u", "μ": "u", "«": "<<",
    "»": ">>", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "⌈": "ceil(", "⌉": ")", "ᵀ": "^T", "¹": "^1", "²": "^2", "³": "^3",
    "⁻": "^-", "₀": "_0", "₁": "_1", "₂": "_2", "½": "1/2", "¼": "1/4", "█": "#", "▓": "#", "▒": "=", "░": ".", "▮": "#", "▯": ".",
    "°": " deg", "⟨": "<", "⟩": ">", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
"""What a character of our own texts is called where it cannot be shown. Characters of names have no such word: they are escaped."""

NOT_TEXT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Controls, separators that some programs take for line ends, marks that change the direction of reading or cannot be seen, and
halves of surrogate pairs (as Python shows bytes of a file name that are not UTF-8). Tab and newline are not among them."""

SHOWS = "shows_on_every_console"
"""Attribute of the methods that `printable` made."""

PATIENCE = 2.0
"""Seconds after which a stage says what it is doing, and progress bars appear."""

_in_full: ContextVar[bool] = ContextVar("sparsify_in_full", default=False)


@contextlib.contextmanager
def stage(what: str, progress: bool = True) -> Iterator[None]:
    """Say `what` on stderr once the block has taken `PATIENCE` seconds, and at its end how long it took; nothing about a quick one.

    Lines go between progress bars, not through them. progress: False says nothing.
    """
    if not progress:
        yield
        return
    said = threading.Event()

    def tell() -> None:
        said.set()
        between_bars(f"sparsify: {what} ...")

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    start = time.perf_counter()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if said.is_set():
        between_bars(f"sparsify: {what}: {time.perf_counter() - start:.1f} s")


def between_bars(line: str) -> None:
    """A line on stderr that leaves progress bars whole; a closed or full stderr stops nobody."""
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError):
        tqdm.write(line, file=sys.stderr)


def escaped(character: str) -> str:
    r"""`\x1b`, `\u202e`, `\U0001f600`; `\n` and the like by their letter."""
    return character.encode("unicode_escape").decode("ascii")


def visible(text: str) -> str:
    """`text` with everything that is no text spelled out; newlines and tabs stay."""
    return NOT_TEXT.sub(lambda match: escaped(match[0]), text)


def one_line(text: str) -> str:
    """`visible`, with newlines and tabs spelled out too: for a name in a line of a report."""
    return visible(text).replace("\n", r"\n").replace("\t", r"\t")


def markup(text: str) -> str:
    """`text` for HTML or SVG. XML has no way to write control characters, so they are spelled out."""
    return escape(visible(text))


def plain(character: str) -> str:
    """A character in ASCII."""
    return PLAIN.get(character) or escaped(character)


def _handle(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(plain, error.object[error.start : error.end])), error.end


codecs.register_error(HANDLER, _handle)


def fitting(text: str, encoding: str | None) -> str:
    """`visible(text)` in characters that `encoding` has. None, or an encoding that Python does not know: as it is."""
    text = visible(text)
    if encoding is None:
        return text
    try:
        return text.encode(encoding, HANDLER).decode(encoding)
    except (LookupError, UnicodeError):
        return text


def shown(text: str) -> str:
    """`text` as `sys.stdout` can show it; inside `full_text()` with all its characters."""
    encoding = None if _in_full.get() else getattr(sys.stdout, "encoding", None)
    return fitting(text, encoding if isinstance(encoding, str) else None)


@contextlib.contextmanager
def full_text() -> Iterator[None]:
    """Inside, `str()` of our objects has all its characters, whatever the console: for files, which are UTF-8."""
    token = _in_full.set(True)
    try:
        yield
    finally:
        _in_full.reset(token)


def in_full(thing: object) -> str:
    """`str(thing)` for a file."""
    with full_text():
        return str(thing)


def printable(cls: Class) -> Class:
    """Class decorator: `str()` and `repr()` give what the console can show. Stands above `@dataclass`."""
    for name in ("__str__", "__repr__"):
        written = getattr(cls, name)
        if written is not getattr(object, name) and not hasattr(written, SHOWS):
            setattr(cls, name, _showing(written))
    return cls


def _showing(written: Callable[[object], str]) -> Callable[[object], str]:
    @functools.wraps(written)
    def show(self: object) -> str:
        return shown(written(self))

    setattr(show, SHOWS, True)
    return show


def adapt_streams() -> None:
    """Let everything that this process prints be shown in some form. For programs of our own, not for a library's import."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors=HANDLER)  # type: ignore[union-attr]
