"""How a parameter's axis is made of leaf classes: stretches, strides, and the cuts of concatenations.

packed q, k, v rows ──▶ Term(offset=0, (head · 64, channel · 1), cuts=…), Term(offset=4096, …), …
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sparsify.passes.detect.axes import Axis, Reason, find


@dataclass(frozen=True)
class Term:
    """One stretch of a parameter's axis: `offset + Σ index(leaf) · stride`, and the cuts that lead to it."""

    offset: int
    factors: tuple[tuple[Axis, int], ...]
    cuts: tuple[tuple[Axis, int, int], ...]


@dataclass(frozen=True)
class Member:
    """One stretch of one axis of one parameter in which a leaf class occurs."""

    param: str
    axis: int
    term: Term


Span = tuple[Axis, int, int]
Source = tuple[str, frozenset[Span]]  # a parameter, and the slices through which it was reached


def terms_of(axis: Axis) -> list[Term]:
    """All stretches of an axis, in order."""
    return [Term(offset, factors, cuts) for offset, factors, cuts, _, _ in expand(find(axis), 1)]


Expanded = tuple[int, tuple[tuple[Axis, int], ...], tuple[Span, ...], int, int]


def expand(root: Axis, stride: int) -> list[Expanded]:
    """(offset, factors, cuts, first and last position in `root`) of every stretch of `root` laid out at `stride`."""
    if root.form is None:
        return [(0, ((root, stride),) if root.size > 1 else (), (), 0, root.size)]
    out: list[Expanded] = []
    if root.form == "concat":
        at = 0
        for part in root.parts:
            for offset, factors, cuts, low, high in expand(find(part), stride):
                out.append((offset + at * stride, factors, (*cuts, (root, at + low, at + high)), at + low, at + high))
            at += part.size
        return out
    first, *rest = (find(p) for p in root.parts)
    span = prod(r.size for r in rest)
    inner: list[Expanded] = [(0, (), (), 0, 1)]
    for i, part in enumerate(rest):
        below = prod(r.size for r in rest[i + 1 :])
        inner = [
            (o + o2, f + f2, c + c2, 0, 0)
            for o, f, c, _, _ in inner
            for o2, f2, c2, _, _ in expand(part, stride * below)
        ]
    for offset, factors, cuts, low, high in expand(first, stride * span):
        for o2, f2, c2, _, _ in inner:
            bounds = (low * span, high * span)
            out.append((offset + o2, factors + f2, (*cuts, *c2, (root, *bounds)), *bounds))
    return out


def has_cut(axis: Axis) -> bool:
    """Whether a concatenation takes part in an axis."""
    root = find(axis)
    return root.form == "concat" or any(has_cut(part) for part in root.parts)


def fixed_inside(axis: Axis, inside: bool = False) -> Reason | None:
    """Why the parts of a concatenation inside `axis` are fixed, if one of them is."""
    root = find(axis)
    inside = inside or root.form == "concat"
    if inside and root.fixed is not None:
        return root.fixed
    return next((r for r in (fixed_inside(part, inside) for part in root.parts) if r is not None), None)


def compatible(term: Term, spans: frozenset[Span]) -> bool:
    """Whether data read through these slices can come from this stretch."""
    for axis, start, stop in spans:
        root = find(axis)
        for cut_root, low, high in term.cuts:
            if cut_root is root and (high <= start or stop <= low):
                return False
    return True
