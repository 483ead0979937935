"""One self-contained HTML file about a run: facts, tables, curves, the drawn program. No script, nothing loaded.

The file is plain data put through `templates/report.html.jinja`; everything that comes from outside is escaped there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsify.console import markup as escape
from sparsify.console import visible
from sparsify.program import Program
from sparsify.show.drawing import draw_program, write_atomically

PALETTE = ("#e8590c", "#1c7ed6", "#2f9e44", "#9c36b5", "#868e96", "#f08c00")


@dataclass(frozen=True)
class Table:
    """A table; cells are text already. `note` stands under it. `marked` rows are printed bold. prose: cells are sentences, which may
    break; on a narrow screen each row becomes a list of its columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marked: tuple[int, ...] = ()
    prose: bool = False


@dataclass(frozen=True)
class Series:
    """One line of a chart: (x, y) points in order."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A line chart. percent: y values are shares of one. guides: horizontal lines with a name."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    percent: bool = True
    guides: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, paragraphs, then tables, charts, a preformatted text and a drawn program."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    text: str = ""
    program: Program | None = field(default=None, repr=False)


def write_html(path: str | os.PathLike[str], title: str, summary: str, sections: Sequence[Section]) -> None:
    """Render and write the report, whole or not at all."""
    write_atomically(path, render_html(title, summary, sections))


def render_html(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The report as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def text_only(value: object) -> object:
        return visible(value) if type(value) is str else value

    environment = Environment(
        loader=PackageLoader("sparsify.show", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        finalize=text_only,
    )  # fmt: skip
    environment.globals["draw"] = lambda program: Markup(draw(program))
    environment.globals["chart"] = lambda chart: Markup(chart_svg(chart))
    return environment.get_template("report.html.jinja").render(title=title, summary=summary, sections=sections)


def draw(program: Program) -> str:
    """The program as SVG text, and below it what pruning did, if it did."""
    if not program.pruned:
        return draw_program(program)
    from sparsify.show.pruned_layers import pruning_svg

    return f"{draw_program(program)}\n{pruning_svg(program.pruned)}"


def chart_svg(chart: Chart, width: int = 720, height: int = 320) -> str:
    """A small line chart as SVG text: axes with round ticks, one colour per series, values on hover."""
    left, right, top, bottom = 58, 170, 34, 44
    xs = [x for s in chart.series for x, _ in s.points] or [0.0, 1.0]
    ys = [y for s in chart.series for _, y in s.points] + [y for _, y in chart.guides] or [0.0, 1.0]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x0, x1, y0, y1 = min(x_ticks[0], min(xs)), max(x_ticks[-1], max(xs)), y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1)
        up = (y - y0) / ((y1 - y0) or 1)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    def label(value: float) -> str:
        return f"{value:.0%}" if chart.percent else f"{value:g}"

    ends = "; ".join(f"{s.name} ends at {label(s.points[-1][1])}" for s in chart.series if s.points)
    spoken = escape(f"{chart.title}: {chart.y_label} over {chart.x_label}; {ends}")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{spoken}" '
        'font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif" font-size="11" fill="#5d6b7a">',
        f'<text x="{left}" y="18" font-size="13" font-weight="600" fill="#1d2733">{escape(chart.title)}</text>',
    ]
    for value in y_ticks:
        _, y = at(x0, value)
        lines.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#e4e8ed"/>')
        lines.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label(value)}</text>')
    for value in x_ticks:
        x, _ = at(value, y0)
        lines.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{value:g}</text>')
    middle = left + (width - left - right) / 2
    lines.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{escape(chart.x_label)}</text>')
    lines.append(f'<text x="{left}" y="{top - 2}" font-size="10">{escape(chart.y_label)}</text>')
    for name, value in chart.guides:
        _, y = at(x0, value)
        lines.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#868e96" stroke-dasharray="4 3"/>')
        lines.append(f'<text x="{width - right + 8}" y="{y + 4:.1f}">{escape(name)} {label(value)}</text>')
    for number, series in enumerate(chart.series):
        colour = PALETTE[number % len(PALETTE)]
        places = [at(x, y) for x, y in series.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (vx, vy) in zip(places, series.points, strict=True):
            lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
                f"<title>{escape(series.name)}: {vx:.2f}, {vy:.3f}</title></circle>"
            )
        key = top + 14 + 18 * number
        lines.append(f'<rect x="{width - right + 12}" y="{key - 9}" width="12" height="4" fill="{colour}"/>')
        lines.append(f'<text x="{width - right + 30}" y="{key - 4}" fill="#1d2733">{escape(series.name)}</text>')
    lines.append("</svg>")
    return "\n".join(lines)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    magnitude = 1.0
    while magnitude > raw:
        magnitude /= 10
    while magnitude * 10 <= raw:
        magnitude *= 10
    step = next(magnitude * m for m in (1, 2, 2.5, 5, 10) if magnitude * m >= raw)
    first, last = int(low // step), int(-(-high // step))
    return [round(i * step, 10) for i in range(first, last + 1)]
