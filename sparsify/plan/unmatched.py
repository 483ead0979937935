"""Patterns of a rule that match nothing while others do: said and warned of, never passed over."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from sparsify.errors import Refusal
from sparsify.plan.rules import Rule, nearest


def nearest_module(pattern: str, names: Iterable[str]) -> str:
    """`; did you mean …` with the names that are closest to a pattern: last words of names for a word without dots."""
    word = pattern.strip("*.")
    return nearest(word, sorted(names) if "." in word else sorted({name.rpartition(".")[2] for name in names}))


def unmatched_patterns(index: int, rule: Rule, names: Iterable[str]) -> list[Refusal]:
    """Refusals, warned of too, for the patterns of a list that match nothing while others do (a list may serve several families)."""
    names = sorted(names)
    found = []
    for pattern in rule.unmatched(names):
        reason = f"this pattern of rule {index}, {type(rule).__name__}, matches nothing{nearest_module(pattern, names)}"
        found.append(Refusal(pattern, reason))
        warnings.warn(f"{pattern}: {reason}", stacklevel=2)
    return found


__all__ = ["nearest_module", "unmatched_patterns"]
