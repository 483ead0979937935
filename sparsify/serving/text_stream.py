"""Tokens into text as they come: never half a character, never the beginning of a stop that may still complete.

tokens  72, 228, 189, 160, 33   ──▶   "H", "", "", "你", "!"
stop "\n\n", text so far "a\n"   ──▶   "a" is said, the line break waits until it is clear that no second follows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no character yet."""
LONGEST = 8
"""Tokens after which bytes that are still no character are taken as they are."""


class Decodes(Protocol):
    """The one method of a tokenizer that is needed."""

    def decode(self, ids: Any, *, skip_special_tokens: bool) -> Any: ...


class TextStream:
    """The text of one answer. stops: texts that end it, which are no part of it."""

    def __init__(self, tokenizer: Decodes, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.silent = frozenset(getattr(tokenizer, "all_special_ids", ()))  # no text, and no neighbours of any
        self.ids: list[int] = []
        self.begin = self.read = 0  # ids from `begin` are decoded again; those before `read` are in the text already
        self.held = ""
        self.stopped = False

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def push(self, ids: Sequence[int]) -> str:
        """What can be said once these tokens came; the empty word after a stop."""
        if self.stopped:
            return ""
        for token in ids:
            if token in self.silent:
                continue
            self.ids.append(token)
            self.held += self.settled(last=False)
            if self.stopped_in():
                break
        return self.say(self.waiting())

    def finish(self) -> str:
        """What is left when no token follows."""
        if not self.stopped:
            self.held += self.settled(last=True)
            self.stopped_in()
        return self.say(0)

    def settled(self, last: bool) -> str:
        """Text of the tokens that are not in it yet; decoded together with some before, as spaces depend on them."""
        before = self.decode(self.ids[self.begin : self.read])
        text = self.decode(self.ids[self.begin :])
        if text.endswith(UNFINISHED) and not last and len(self.ids) - self.read < LONGEST:
            return ""
        added = text[len(before) :]
        self.begin, self.read = self.read if added else self.begin, len(self.ids)
        return added

    def stopped_in(self) -> bool:
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.held, self.stopped = self.held[: min(places)], True
        return self.stopped

    def waiting(self) -> int:
        """How many characters at the end may be the beginning of a stop."""
        if self.stopped:
            return 0
        return max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)

    def say(self, keep: int) -> str:
        cut = len(self.held) - keep
        said, self.held = self.held[:cut], self.held[cut:]
        return said


__all__ = ["TextStream"]
