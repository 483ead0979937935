"""Budgets as people write them: "8GiB", "2h", and `--budget "memory=8GiB time=2h accuracy"`.

size("8GiB") = 8 · 2³⁰     size("8GB") = 8 · 10⁹     duration("1h30m") = 5400.0     duration(90) = 90.0
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sparsify.errors import PlanError
from sparsify.files.strict_json import short

Goal = Literal["accuracy", "memory", "time"]
BYTES = {"b": 1, **{f"{letter}ib": 1 << 10 * (n + 1) for n, letter in enumerate("kmgt")}}
BYTES |= {f"{letter}b": 10 ** (3 * (n + 1)) for n, letter in enumerate("kmgt")}
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
NUMBER = r"(\d+(?:\.\d+)?)"
LARGEST = 1 << 60


@dataclass(frozen=True)
class Limits:
    """memory: bytes of one process at the peak. time: seconds of the whole training. goal: what is best among what fits."""

    memory: int | None = None
    time: float | None = None
    goal: Goal = "accuracy"


def size(value: int | str, what: str = "memory") -> int:
    """Bytes. Raises PlanError for anything but a positive whole number or one with a unit (KiB, MiB, GiB, TiB, or kB, MB, GB, TB)."""
    if isinstance(value, str):
        found = re.fullmatch(rf"\s*{NUMBER}\s*([a-zA-Z]+)\s*", value)
        unit = BYTES.get(found[2].lower()) if found else None
        if found is not None and unit is not None and 1 <= float(found[1]) * unit <= LARGEST:
            return int(float(found[1]) * unit)
        value_or_none = int(value) if value.strip().isdecimal() else None
        if value_or_none is not None and 1 <= value_or_none <= LARGEST:
            return value_or_none
    elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST:
        return value
    raise PlanError(f"{what}={short(value)}: expected bytes, such as 8589934592 or '8GiB'")


def duration(value: float | str, what: str = "time") -> float:
    """Seconds. Raises PlanError for anything but a positive number or parts such as "1h30m"."""
    if isinstance(value, str):
        parts = re.findall(rf"{NUMBER}\s*(min|[smhd])", value.strip().lower())
        rest = re.sub(rf"{NUMBER}\s*(min|[smhd])|\s", "", value.strip().lower())
        seconds = sum(float(number) * SECONDS[unit] for number, unit in parts) if not rest else 0.0
    else:
        seconds = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
    if not (math.isfinite(seconds) and 0 < seconds <= LARGEST):
        raise PlanError(f"{what}={short(value)}: expected seconds, or such as '90min', '2h', '1h30m'")
    return seconds


def limits(words: Sequence[str]) -> Limits:
    """From the words of `--budget`: memory=…, time=…, and one of accuracy, memory, time for what is best. Raises PlanError."""
    memory: int | None = None
    time: float | None = None
    goal: Goal | None = None
    for word in (part for text in words for part in text.split()):
        name, equals, value = word.partition("=")
        if equals and name == "memory" and memory is None:
            memory = size(value)
        elif equals and name == "time" and time is None:
            time = duration(value)
        elif not equals and goal is None and name in get_args(Goal):
            goal = name  # type: ignore[assignment]
        else:
            said = "is said twice" if name in ("memory", "time", *get_args(Goal)) else "is no budget"
            raise PlanError(
                f"--budget: {short(word)} {said}; expected memory=8GiB, time=2h, and accuracy, memory or time"
            )
    return Limits(memory, time, goal or "accuracy")


def checked_goal(goal: str) -> Goal:
    """Raises PlanError for another word."""
    if goal not in get_args(Goal):
        raise PlanError(f"goal={short(goal)}: expected one of {', '.join(get_args(Goal))}")
    return goal  # type: ignore[return-value]


__all__ = ["Goal", "Limits", "checked_goal", "duration", "limits", "size"]
