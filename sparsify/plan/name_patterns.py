"""Patterns over qualified names: globs, bare names and regular expressions, each matched without backtracking.

    *.o_proj   model.layers.[0-3].mlp     globs (`fnmatch`)
    model.layers.{0-15,31}.*              and with numbers in braces: these layers
    q_proj     self_attn.q_proj           no wildcard: the name itself, or the end of a longer one after a dot
    re:.*\\.(q|v)_proj                     a regular expression that must match the whole name

Python's `re` takes exponential time on patterns such as `((a|b)+)+X`, and patterns come out of files (plans, PEFT's
`alpha_pattern`). `Regex` follows all alternatives at once: each pair of an instruction and a position is visited at most once,
so the time is at most (length of the pattern) × (length of the name). What cannot be matched so is refused by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

MAX_PATTERN = 2000
MAX_INSTRUCTIONS = 5000
MAX_GROUPS = 40
MAX_NUMBERS = 512  # in braces
WILDCARDS = "*?["
RANGE = re.compile(r"\{([0-9]{1,6}(?:-[0-9]{1,6})?(?:,[0-9]{1,6}(?:-[0-9]{1,6})?)*)\}")
REGEX = "re:"

Test = Callable[[str], bool]


class PatternError(ValueError):
    """A pattern that cannot be read, or not be matched in linear time; says which part and why."""


class Budget:
    """Steps that all matches of one file together may take; a file that needs more is refused with PatternError."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise PatternError("its patterns take too long to match; write the modules by name")


def matches(pattern: str, name: str) -> bool:
    """Whether a glob, a bare name or an `re:` pattern matches a qualified name (see the module docstring)."""
    if pattern.startswith(REGEX):
        return compiled(pattern[len(REGEX) :]).fullmatch(name)
    if RANGE.search(pattern):
        return compiled(ranged(pattern)).fullmatch(name)
    if is_glob(pattern):
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def is_glob(pattern: str) -> bool:
    return any(c in pattern for c in WILDCARDS) or RANGE.search(pattern) is not None


@functools.lru_cache(maxsize=1024)
def ranged(pattern: str) -> str:
    """A glob with numbers in braces as a regular expression; one without wildcards matches the ends of names too. Raises PatternError."""
    text, at = "", 0
    for found in RANGE.finditer(pattern):
        numbers: list[int] = []
        for piece in found[1].split(","):
            first, _, last = piece.partition("-")
            low, high = int(first), int(last or first)
            if high < low:
                raise PatternError(f"the range {{{found[1]}}} ends before it begins")
            if len(numbers) + high - low >= MAX_NUMBERS:
                raise PatternError(f"the range {{{found[1]}}} has more than {MAX_NUMBERS} numbers")
            numbers += range(low, high + 1)
        text += glob_text(pattern[at : found.start()]) + f"(?:{'|'.join(map(str, numbers))})"
        at = found.end()
    text += glob_text(pattern[at:])
    return text if any(c in pattern for c in WILDCARDS) else rf"(?:.*\.)?{text}"


def glob_text(glob: str) -> str:
    """A glob without braces as a regular expression that `Regex` reads."""
    text, at = "", 0
    while at < len(glob):
        c, end = glob[at], glob.find("]", at + 2)
        if c == "[" and end > 0:
            inside = glob[at + 1 : end].replace("\\", "\\\\")
            text += f"[{'^' + inside[1:] if inside[0] == '!' else inside}]"
            at = end
        else:
            text += ".*" if c == "*" else "." if c == "?" else c if c.isalnum() or c in "_ " else "\\" + c
        at += 1
    return text


def check_pattern(pattern: str) -> None:
    """Raises PatternError for an empty or overlong pattern, and for an `re:` pattern that `Regex` does not read."""
    if not pattern:
        raise PatternError("an empty pattern matches nothing; use '*' for everything")
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"the pattern has {len(pattern):,} characters, at most {MAX_PATTERN:,} are read")
    if pattern.startswith(REGEX):
        compiled(pattern[len(REGEX) :])
    elif RANGE.search(pattern):
        compiled(ranged(pattern))


@functools.lru_cache(maxsize=1024)
def compiled(text: str) -> Regex:
    return Regex(text)


# --- reading ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Char:
    test: Test


@dataclass(frozen=True)
class Sequence:
    items: tuple[Syntax, ...]


@dataclass(frozen=True)
class Choice:
    items: tuple[Syntax, ...]


@dataclass(frozen=True)
class Repeat:
    item: Syntax
    least: int
    most: int | None


@dataclass(frozen=True)
class Assert:
    kind: str  # one of ^ $ b B Z


@dataclass(frozen=True)
class Ahead:
    item: Syntax
    negative: bool


#: what a regular expression is made of
Syntax = Char | Sequence | Choice | Repeat | Assert | Ahead

ESCAPED_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}
ESCAPED_CHARACTERS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}


def equal(character: str) -> Test:
    return lambda c: c == character


class Reader:
    """Recursive descent over Python's syntax of regular expressions, without what needs backtracking."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_PATTERN:
            raise PatternError(f"the regular expression has {len(text):,} characters, at most {MAX_PATTERN:,} are read")
        self.text, self.at, self.depth = text, 0, 0
        self.names: set[str] = set()

    def fail(self, what: str) -> PatternError:
        shown = self.text if len(self.text) <= 60 else self.text[:59] + "…"
        return PatternError(f"the regular expression {shown!r} {what}")

    def peek(self, ahead: str) -> bool:
        return self.text.startswith(ahead, self.at)

    def take(self, ahead: str) -> bool:
        if not self.peek(ahead):
            return False
        self.at += len(ahead)
        return True

    def read(self) -> Syntax:
        found = self.choice()
        if self.at < len(self.text):
            raise self.fail(f"has an unbalanced parenthesis at position {self.at}")
        return found

    def choice(self) -> Syntax:
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        return branches[0] if len(branches) == 1 else Choice(tuple(branches))

    def sequence(self) -> Syntax:
        items = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            items.append(self.repeated())
        return Sequence(tuple(items))

    def repeated(self) -> Syntax:
        start = self.at
        item = self.atom()
        bounds = self.bounds()
        if bounds is None:
            return item
        if isinstance(item, Assert | Ahead):
            raise self.fail(f"repeats an assertion at position {start}")
        least, most = bounds
        if self.peek("+"):
            raise self.fail("has a possessive quantifier, which is not supported")
        self.take("?")  # lazy or not makes no difference to whether it matches
        if self.bounds() is not None:
            raise self.fail(f"has two quantifiers in a row at position {start}")
        return Repeat(item, least, most)

    def bounds(self) -> tuple[int, int | None] | None:
        for mark, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(mark):
                return bounds
        counted = re.compile(r"\{(\d{0,6})(,?)(\d{0,6})\}").match(self.text, self.at)
        if counted is None or not (counted[1] or counted[3]):
            return None
        self.at = counted.end()
        least = int(counted[1] or 0)
        most = least if not counted[2] else int(counted[3]) if counted[3] else None
        if most is not None and most < least:
            raise self.fail("repeats at least more often than at most")
        if max(least, most or 0) > MAX_INSTRUCTIONS:
            raise self.fail(f"repeats more than {MAX_INSTRUCTIONS} times")
        return least, most

    def atom(self) -> Syntax:
        c = self.text[self.at]
        self.at += 1
        if c == "(":
            return self.group()
        if c == "[":
            return Char(self.character_set())
        if c == ".":
            return Char(lambda x: x != "\n")
        if c in "^$":
            return Assert(c)
        if c == "\\":
            return self.escape()
        if c in "*+?":
            raise self.fail(f"has nothing to repeat at position {self.at - 1}")
        return Char(equal(c))

    def group(self) -> Syntax:
        ahead = None
        if self.take("?"):
            if self.take(":"):
                pass
            elif self.peek("=") or self.peek("!"):
                ahead = self.text[self.at]
                self.at += 1
            elif self.take("P<"):
                name = re.compile(r"[A-Za-z_]\w{0,99}>").match(self.text, self.at)
                if name is None or name[0] in self.names:
                    raise self.fail(f"has a group that is named badly, or twice, at position {self.at}")
                self.names.add(name[0])
                self.at = name.end()
            else:
                raise self.fail(
                    f"has the group '(?{self.text[self.at : self.at + 2]}', which is not supported (look-behind, flags, back-"
                    "references and atomic groups are not)"
                )
        self.depth += 1
        if self.depth > MAX_GROUPS:
            raise self.fail(f"has groups nested deeper than {MAX_GROUPS}")
        inside = self.choice()
        self.depth -= 1
        if not self.take(")"):
            raise self.fail("has an unbalanced parenthesis")
        return inside if ahead is None else Ahead(inside, ahead == "!")

    def escape(self) -> Syntax:
        if self.at >= len(self.text):
            raise self.fail("ends in a backslash")
        c = self.text[self.at]
        self.at += 1
        if c in ESCAPED_CLASSES:
            return Char(ESCAPED_CLASSES[c])
        if c in "bBZ":
            return Assert(c)
        if c == "A":
            return Assert("^")
        return Char(equal(self.escaped_character(c)))

    def escaped_character(self, c: str) -> str:
        if c in ESCAPED_CHARACTERS:
            return ESCAPED_CHARACTERS[c]
        if c.isascii() and c.isalnum():
            what = "a back-reference" if c.isdigit() else f"the escape '\\{c}'"
            raise self.fail(f"has {what}, which is not supported")
        return c

    def character_set(self) -> Test:
        negative = self.take("^")
        tests: list[Test] = []
        first = True
        while True:
            if self.at >= len(self.text):
                raise self.fail("has an unclosed '['")
            if self.peek("]") and not first:
                self.at += 1
                break
            first = False
            low = self.set_member()
            is_range = self.peek("-") and not self.text.startswith("-]", self.at) and self.at + 1 < len(self.text)
            if not is_range:
                tests.append(equal(low) if isinstance(low, str) else low)
                continue
            self.at += 1
            high = self.set_member()
            if not isinstance(low, str) or not isinstance(high, str) or high < low:
                raise self.fail("has a bad range in a character set")
            tests.append(lambda c, low=low, high=high: low <= c <= high)
        return lambda c: any(test(c) for test in tests) != negative

    def set_member(self) -> str | Test:
        c = self.text[self.at]
        self.at += 1
        if c != "\\":
            return c
        if self.at >= len(self.text):
            raise self.fail("has an unclosed '['")
        c = self.text[self.at]
        self.at += 1
        return ESCAPED_CLASSES[c] if c in ESCAPED_CLASSES else self.escaped_character(c)


# --- matching --------------------------------------------------------------------------------------------------------------

#: One instruction: ("char", test) | ("split", a, b) | ("jump", a) | ("assert", kind) | ("ahead", start, negative) | ("match",)
Instruction = tuple[Any, ...]


class Regex:
    """A regular expression that answers yes or no, as `re.match` and `re.fullmatch` would, in time linear in both lengths.

    Raises PatternError for what is not a regular expression, and for back-references, look-behind, flags and the like.
    """

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        self.text, self.budget = text, budget
        tree = Reader(text).read()
        self.code: list[Instruction] = []
        self.emit(tree)
        self.code.append(("match",))
        #: one test per character when the pattern is of fixed length, which nearly all are
        self.fixed = [i[1] for i in self.code[:-1]] if all(i[0] == "char" for i in self.code[:-1]) else None

    def emit(self, node: Syntax) -> None:
        code = self.code
        if len(code) > MAX_INSTRUCTIONS:
            raise PatternError(
                f"the regular expression {self.text[:60]!r} is too large once its repeats are written out"
            )
        if isinstance(node, Char):
            code.append(("char", node.test))
        elif isinstance(node, Assert):
            code.append(("assert", node.kind))
        elif isinstance(node, Sequence):
            for item in node.items:
                self.emit(item)
        elif isinstance(node, Choice):
            self.emit_choice(node)
        elif isinstance(node, Repeat):
            self.emit_repeat(node)
        else:
            assert isinstance(node, Ahead)
            place = len(code)
            code.append(())
            self.emit(node.item)
            code.append(("match",))
            code[place] = ("ahead", place + 1, node.negative, len(code))

    def emit_choice(self, node: Choice) -> None:
        code, ends = self.code, []
        for item in node.items[:-1]:
            place = len(code)
            code.append(())
            self.emit(item)
            ends.append(len(code))
            code.append(())
            code[place] = ("split", place + 1, len(code))
        self.emit(node.items[-1])
        for end in ends:
            code[end] = ("jump", len(code))

    def emit_repeat(self, node: Repeat) -> None:
        code = self.code
        for _ in range(node.least):
            self.emit(node.item)
        if node.most is None:
            place = len(code)
            code.append(())
            self.emit(node.item)
            code.append(("jump", place))
            code[place] = ("split", place + 1, len(code))
            return
        places = []
        for _ in range(node.most - node.least):
            places.append(len(code))
            code.append(())
            self.emit(node.item)
        for place in places:
            code[place] = ("split", place + 1, len(code))

    def fullmatch(self, name: str) -> bool:
        """As `bool(re.fullmatch(text, name))`."""
        if self.fixed is not None:
            return len(name) == len(self.fixed) and all(t(c) for t, c in zip(self.fixed, name, strict=True))
        return self.run(0, name, 0, whole=True, known={})

    def match(self, name: str) -> bool:
        """As `bool(re.match(text, name))`."""
        return self.run(0, name, 0, whole=False, known={})

    def run(self, start: int, name: str, position: int, whole: bool, known: dict[tuple[int, int], bool]) -> bool:
        """Depth first over (instruction, position), each pair once. known: what look-aheads answered so far."""
        code, length = self.code, len(name)
        stack = [(start, position)]
        seen: set[tuple[int, int]] = set()
        found = False
        while stack:
            state = stack.pop()
            if state in seen:
                continue
            seen.add(state)
            at, position = state
            kind = code[at][0]
            if kind == "char":
                if position < length and code[at][1](name[position]):
                    stack.append((at + 1, position + 1))
            elif kind == "split":
                stack += [(code[at][2], position), (code[at][1], position)]
            elif kind == "jump":
                stack.append((code[at][1], position))
            elif kind == "assert":
                if holds(code[at][1], name, position):
                    stack.append((at + 1, position))
            elif kind == "ahead":
                _, inner, negative, after = code[at]
                if state not in known:
                    known[state] = self.run(inner, name, position, False, known)
                if known[state] != negative:
                    stack.append((after, position))
            elif not whole or position == length:
                found = True
                break
        if self.budget is not None:
            self.budget.spend(len(seen) + 1)
        return found


def holds(kind: str, name: str, position: int) -> bool:
    length = len(name)
    if kind == "^":
        return position == 0
    if kind == "$":
        return position == length or (position == length - 1 and name[position] == "\n")
    if kind == "Z":
        return position == length
    word = ESCAPED_CLASSES["w"]
    before = position > 0 and word(name[position - 1])
    after = position < length and word(name[position])
    return (before != after) == (kind == "b")
