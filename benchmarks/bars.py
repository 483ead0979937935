"""Horizontal bars as SVG text, for the pages: the same text on every machine, no library, on a white card that a dark page may invert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, ROW, TOP = 720, 270, 30, 44
LABEL = 40
"""Characters that fit to the left of the bars."""
OURS, THEIRS, NEUTRAL = "#3f51b5", "#b0703c", "#8a8f98"


@dataclass(frozen=True)
class Bar:
    """One row: what it is called, how long it is, what stands at its end."""

    label: str
    value: float
    text: str
    color: str = OURS


def chart(title: str, bars: Sequence[Bar], note: str = "") -> str:
    """An SVG of `bars`, the longest as wide as the card allows; `title` is its headline and its alternative text.

    Raises ValueError for a label that would be cut at the card's edge.
    """
    if cut := [bar.label for bar in bars if len(bar.label) > LABEL]:
        raise ValueError(f"at most {LABEL} characters fit beside a bar: {cut[0]!r}")
    longest = max(bar.value for bar in bars)
    height = TOP + ROW * len(bars) + (34 if note else 12)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="14">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="16" font-weight="600" fill="#1d1f23">{escape(title)}</text>',
    ]
    for number, bar in enumerate(bars):
        y = TOP + ROW * number
        width = max(2.0, (WIDTH - LEFT - 110) * bar.value / longest)
        lines += [
            f'<text x="{LEFT - 10}" y="{y + 18}" text-anchor="end" fill="#1d1f23">{escape(bar.label)}</text>',
            f'<rect x="{LEFT}" y="{y + 4}" width="{width:.1f}" height="20" rx="3" fill="{bar.color}"/>',
            f'<text x="{LEFT + width + 8:.1f}" y="{y + 18}" fill="#1d1f23">{escape(bar.text)}</text>',
        ]
    if note:
        lines.append(f'<text x="16" y="{height - 12}" font-size="12" fill="#5b616b">{escape(note)}</text>')
    return "\n".join([*lines, "</svg>", ""])
