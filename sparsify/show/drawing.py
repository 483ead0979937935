"""A program as a picture: SVG text without a layout program, one row per layer.

    layers.0   [▮▮ ▯▯ ▯▯ ▯▯]  q k v o      [▮▯▯▯▯▯▯▯▯▯▯▯▯▯▯▯]  gate up down
               attention, heads grouped     feed-forward channels,
               by KV group                  in their present order

What is drawn is read off the moves and slices themselves, not off what a pass says it did: the shade of a cell is the
place that its unit had in the original model (a smooth ramp means that nothing moved), colour means that it trains.
Hovering shows original unit ids and sites; what was declined stands greyed in its place, with the reason on hover.

Layers of one stack that look alike are one row and "× 30". Where they train different units, the row has a strip for each layer
below it, with the units at their places in the original model. What trains is never drawn narrower than one can see: of a model with
tens of thousands of channels, a mark stands for many, and is the stronger the more of them train.
"""

from __future__ import annotations

import os
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from sparsify.console import markup as escape
from sparsify.files.atomic import write_text as write_atomically
from sparsify.program import Program
from sparsify.program.names import printable as without_controls
from sparsify.program.printer import ids_text, slice_text
from sparsify.program.repeats import numbers_text
from sparsify.program.structure import Declined, Site, Structure
from sparsify.show.layers import Band, Cell, Looks, View, count_parameters, rows_by_layer, slices_of, split_layer

if TYPE_CHECKING:
    from jaxtyping import Int

LABEL, GAP, MARGIN = 150, 26, 28
BOX, BAR, CHIP = 16, 16, 13
ROW = 58
STRIP = 7
WIDTHS = {"attention": 340, "ffn": 400, "other": 260}
MAX_BINS = 48
MOST_RUNS = 24
"""Of ranges that train, each drawn for itself; more are drawn as marks."""
NARROWEST, LEVELS = 5, 3
"""Width of a mark in pixels at least, and how many strengths of colour marks have."""

INK, SOFT, FAINT, PAPER = "#1d2733", "#5d6b7a", "#d5dbe2", "#ffffff"
RAMP = ((0xDD, 0xE5, 0xF0), (0x6D, 0x88, 0xAE))
CONSUMER, PRODUCER, SAID = "#e8590c", "#2f9e44", "#b83a05"
MOVED, EXTRA = "#4c5fb5", "#c2255c"


def draw_program(program: Program, path: str | os.PathLike[str] | None = None, *, fold: bool = True) -> str:
    """Draw `program` as SVG text; with `path` it is also written there (whole or not at all).

    fold: layers that look alike as one row; False draws a row for every layer.
    """
    text = without_controls("\n".join(_document(program, fold)), keep="\n")
    if path is not None:
        write_atomically(path, text)
    return text


def shared_parts(names: list[str]) -> int:
    """How many leading dotted parts all names share."""
    split = [name.split(".") for name in names]
    count = 0
    while split and all(len(parts) > count and parts[count] == split[0][count] for parts in split):
        count += 1
    return count


def _document(program: Program, fold: bool) -> list[str]:
    looks, rows = Looks(program, slices_of(program)), rows_by_layer(program)
    bands = looks.bands(rows, fold)
    columns = _columns(rows)
    body_width = sum(width for _, width in columns) + GAP * max(0, len(columns) - 1)
    width = max(MARGIN * 2 + LABEL + body_width, 940)
    top = 154
    height = top + max(ROW, sum(map(_height, bands))) + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif" font-size="11">',
        f"<title>{escape(type(program.host).__name__)}, {program.stage.name.lower()}</title>",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    lines += _header(program, width)
    leaves: dict[tuple[str, int], set[str]] = defaultdict(set)
    for items in rows.values():
        for key, item in zip(_keys(items), items, strict=True):
            leaves[key].add(split_layer(item.name)[1])
    prefix = shared_parts(list(rows))
    xs, x = {}, MARGIN + LABEL
    for key, column_width in columns:
        xs[key] = (x, column_width)
        lines.append(_text(x, top - 14, _heading(key[0], leaves[key]), SOFT, 11, bold=True))
        x += column_width + GAP
    if not rows:
        lines.append(
            _text(MARGIN, top + 20, "no structures yet: the program is captured, and detection has not run", SOFT, 13)
        )
    y = top
    for number, band in enumerate(bands):
        if number % 2 == 0:
            place = f'x="{MARGIN - 12}" y="{y - 6}" width="{width - 2 * MARGIN + 24}" height="{_height(band)}"'
            lines.append(f'<rect {place} fill="#f7f9fb"/>')
        lines.append(_label(band, prefix, y))
        lines += _numbers(band, y) if band.strips else []
        items = rows[band.rows[0]]
        for at, (key, item) in enumerate(zip(_keys(items), items, strict=True)):
            x, column_width = xs[key]
            if isinstance(item, Declined):
                lines += _declined(item, x, y, column_width)
                continue
            lines += _structure(looks, item, x, y, column_width)
            for strip, row in enumerate(band.rows if band.strips else ()):
                other = rows[row][at]
                assert isinstance(other, Structure)
                lines.append(_strip(looks.view(other), x, y + ROW - 8 + strip * STRIP, column_width))
        y += _height(band)
    lines.append("</svg>")
    return lines


def _numbers(band: Band, y: float) -> list[str]:
    """Numbers of layers in front of their strips, as many as there is room for."""
    step = 2 if len(band.rows) <= 16 else 5
    return [
        _text(MARGIN + LABEL - 8, y + ROW - 2 + at * STRIP, row.rpartition(".")[2], SOFT, 8.5, anchor="end")
        for at, row in enumerate(band.rows)
        if at % step == 0
    ]


def _height(band: Band) -> int:
    return ROW + (len(band.rows) * STRIP + 4 if band.strips else 0)


def _strip(view: View, x: float, y: float, width: int) -> str:
    """The units of one layer of a band, at their places in the original model, those that train in colour."""
    consumers, producers = (view.originals[side] for side in (view.consumers, view.producers))
    on = torch.cat([consumers, producers]).unique().tolist()
    title = (
        f"{view.structure.name}: original {view.structure.inner_unit}s {ids_text(on, 40)}" if on else "nothing trains"
    )
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{STRIP - 1}" fill="{FAINT}"/>']
    parts += _marks(consumers, view.count, x, y, width, STRIP - 1, CONSUMER)
    parts += _marks(producers, view.count, x, y, width, 2 if len(consumers) else STRIP - 1, PRODUCER)
    return f'<g class="strip"><title>{escape(title)}</title>{"".join(parts)}</g>'


def _marks(
    places: Int[torch.Tensor, " k"], count: int, x: float, y: float, width: int, height: int, colour: str
) -> list[str]:
    """Some of `count` units in a row, as marks wide enough to see; where units share a mark, the more of them train the stronger it is."""
    if not len(places):
        return []
    bins = max(1, min(count, int(width / NARROWEST)))
    found = torch.bincount(places * bins // count, minlength=bins)
    levels = (found * LEVELS + found.max() - 1) // found.max()
    lines = []
    for level in range(1, LEVELS + 1):
        path, start = "", None
        for at, on in enumerate([*(levels == level).tolist(), False]):
            if on and start is None:
                start = at
            elif not on and start is not None:
                left, right = x + width * start / bins, x + width * at / bins
                path += f"M{left:.1f} {y}H{right:.1f}v{height}H{left:.1f}z"
                start = None
        if path:
            strength = "" if level == LEVELS else f' fill-opacity="{level / LEVELS:.2f}"'
            lines.append(f'<path d="{path}" fill="{colour}"{strength}/>')
    return lines


def _keys(items: list[Structure | Declined]) -> list[tuple[str, int]]:
    """Column of each item of a row: its kind, and how many of that kind came before it."""
    seen: dict[str, int] = defaultdict(int)
    keys = []
    for item in items:
        keys.append((item.kind, seen[item.kind]))
        seen[item.kind] += 1
    return keys


def _columns(rows: dict[str, list[Structure | Declined]]) -> list[tuple[tuple[str, int], int]]:
    keys = {key for items in rows.values() for key in _keys(items)}
    ordered = sorted(keys, key=lambda key: (("attention", "ffn", "other").index(key[0]), key[1]))
    shrink = min(1.0, 1500 / max(1, sum(WIDTHS[kind] for kind, _ in ordered)))
    return [(key, max(150, int(WIDTHS[key[0]] * shrink))) for key in ordered]


def _header(program: Program, width: int) -> list[str]:
    kinds: dict[str, int] = defaultdict(int)
    for structure in program.structures:
        kinds[structure.kind] += 1
    trained, total = count_parameters(program)
    counts = [f"{kinds['attention']} attention", f"{kinds['ffn']} feed-forward"]
    counts += [f"{kinds['other']} other"] if kinds["other"] else []
    moved = len({(m.param, m.axis) for m in program.moves})
    facts = [
        f"structures: {', '.join(counts)}, {len(program.declined)} declined",
        f"{moved} tensors reordered",
        f"{trained:,} of {total:,} parameters train ({trained / max(1, total):.2%})",
    ]
    lines = [
        _text(MARGIN, 40, type(program.host).__name__, INK, 21, bold=True),
        _text(MARGIN, 62, " · ".join(facts), SOFT, 13),
    ]
    lines.append(_text(width - MARGIN, 40, f"stage: {program.stage.name.lower()}", SOFT, 12, anchor="end"))
    extras = any(part.mark() for part in program.parts) or program.quantize
    x, y = float(MARGIN), 88
    ramp = "".join(f'<rect x="{MARGIN + i * 7}" y="78" width="7" height="12" fill="{_shade(i, 8)}"/>' for i in range(8))
    lines.append(ramp)
    for mark, text in (
        ("", "place in the original model: first … last"),
        (_swatch(0, 88, CONSUMER), "trains: columns of O / Down"),
        (_swatch(0, 88, PRODUCER), "trains: rows of V / Up"),
        (_chip_svg(0, 77, "w", True), "tensor that was reordered"),
        (_chip_svg(0, 77, "w", False), "left as it was"),
        (_swatch(0, 88, "#eceff2", dashed=True), "declined (hover: why)"),
        *([(_chip_svg(0, 77, "w", False, True), "low-rank, sparse or quantised (hover)")] if extras else []),
    ):
        offset = 62 if not mark else 20
        if x + offset + 5.7 * len(text) > width - MARGIN:
            x, y = float(MARGIN), y + 20
        lines.append(f'<g transform="translate({x:.0f} {y - 88})">{mark}{_text(offset, 88, text, SOFT, 11)}</g>')
        x += offset + 5.7 * len(text) + 18
    return lines


def _structure(looks: Looks, structure: Structure, x: float, y: float, width: int) -> list[str]:
    view = looks.view(structure)
    title = f"{structure.kind} {structure.name}: {structure.size_text()}"
    lines = [f'<g class="{structure.kind}"><title>{escape(title)}</title>']
    wide = structure.kind == "ffn" or len(view.cells) > 80
    lines += _bar(view, x, y, width) if wide else _heads(view, x, y, width)
    lines += _bracket(view, x, y + BOX + 2, width, wide)
    lines += _chips(looks, structure, x, y + BOX + 10, width)
    lines.append("</g>")
    return lines


def _heads(view: View, x: float, y: float, width: int) -> list[str]:
    """One cell per (query) head; gaps between KV groups."""
    lines = []
    for left, cell_width, number, cell in _cell_boxes(view, x, width):
        name = "head" if view.structure.kind == "attention" else "unit"
        note = f"{name} {cell.original}" + (f", now at place {number}" if cell.original != number else "")
        note += ", its columns of O train" if cell.consumer else ""
        note += ", its rows of V train" if cell.producer else ""
        fill = CONSUMER if cell.consumer else _shade(cell.original, len(view.cells))
        lines.append(
            f'<rect x="{left:.1f}" y="{y}" width="{cell_width:.1f}" height="{BOX}" rx="2" fill="{fill}">'
            f"<title>{escape(note)}</title></rect>"
        )
        if cell.producer:
            lines.append(f'<rect x="{left:.1f}" y="{y}" width="{cell_width:.1f}" height="5" rx="2" fill="{PRODUCER}"/>')
        if cell_width >= 13:
            ink = PAPER if cell.consumer else INK
            lines.append(_text(left + cell_width / 2, y + 12, str(cell.original), ink, 9, anchor="middle"))
    return lines


def _cell_boxes(view: View, x: float, width: int) -> list[tuple[float, float, int, Cell]]:
    """(left, width, place, cell) of every head."""
    grouped = view.structure.inner is not None
    groups = view.groups if grouped else [[cell] for cell in view.cells]
    between, inside = (5.0, 1.0) if grouped else (2.0, 0.0)
    count = sum(len(g) for g in groups)
    if width / max(1, count) < 6:
        between, inside = between / 2, 0.0
    space = width - between * (len(groups) - 1) - inside * (count - len(groups))
    cell_width = space / max(1, count)
    boxes, left, number = [], x, 0
    for group in groups:
        for cell in group:
            boxes.append((left, cell_width, number, cell))
            left += cell_width + inside
            number += 1
        left += between - inside
    return boxes


def _bar(view: View, x: float, y: float, width: int) -> list[str]:
    """Channels as one bar; many channels share a bin, trained ranges are drawn on top at their true place."""
    cells = view.cells
    count = len(cells)
    runs = _runs(cells)
    lines = []
    bins = min(MAX_BINS, count)
    edges = sorted({round(i * count / bins) for i in range(bins + 1)})
    for low, high in pairwise(edges):
        originals = [cell.original for cell in cells[low:high]]
        shade = _shade(sum(originals) / len(originals), count)
        left, right = x + width * low / count, x + width * high / count
        note = f"places {low}–{high - 1}: channels {ids_text(originals, 6)}"
        lines.append(
            f'<rect x="{left:.1f}" y="{y}" width="{right - left + 0.3:.1f}" height="{BAR}" fill="{shade}">'
            f"<title>{escape(note)}</title></rect>"
        )
    if len(runs) > MOST_RUNS:
        on = (view.consumers | view.producers).nonzero().flatten()
        ids = view.originals[on].tolist()
        lines.append(f"<g><title>{escape(f'{len(ids)} channels train: original {ids_text(ids, 40)}')}</title>")
        lines += _marks(view.consumers.nonzero().flatten(), count, x, y, width, BAR, CONSUMER)
        tall = 5 if bool(view.consumers.any()) else BAR
        lines += _marks(view.producers.nonzero().flatten(), count, x, y, width, tall, PRODUCER)
        lines.append("</g>")
    for low, high, consumer, producer in runs if len(runs) <= MOST_RUNS else ():
        left, right = _span(low, high, count, x, width)
        ids = [cell.original for cell in cells[low:high]]
        what = " and ".join(name for name, on in (("columns of Down", consumer), ("rows of Up", producer)) if on)
        note = f"places {low}–{high - 1} train ({what}): original channels {ids_text(ids, 40)}"
        shape = f'x="{left:.1f}" width="{right - left:.1f}"'
        lines.append(f"<g><title>{escape(note)}</title>")
        if consumer:
            lines.append(f'<rect {shape} y="{y}" height="{BAR}" fill="{CONSUMER}"/>')
        if producer:
            lines.append(f'<rect {shape} y="{y}" height="{5 if consumer else BAR}" fill="{PRODUCER}"/>')
        lines.append("</g>")
    lines.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{BAR}" rx="2" fill="none" stroke="{FAINT}" '
        'pointer-events="none"/>'
    )
    return lines


def _span(low: int, high: int, count: int, x: float, width: int) -> tuple[float, float]:
    """Left and right end of places [low, high) of a bar, wide enough to see and inside the bar."""
    left, right = x + width * low / count, x + width * high / count
    if right - left < NARROWEST:
        left = min(left, x + width - NARROWEST)
        right = left + NARROWEST
    return left, right


def _runs(cells: list[Cell]) -> list[tuple[int, int, bool, bool]]:
    """Maximal ranges [low, high) of cells that train alike."""
    runs: list[tuple[int, int, bool, bool]] = []
    for place, cell in enumerate(cells):
        if not (cell.consumer or cell.producer):
            continue
        if runs and runs[-1][1] == place and runs[-1][2:] == (cell.consumer, cell.producer):
            runs[-1] = (runs[-1][0], place + 1, *runs[-1][2:])
        else:
            runs.append((place, place + 1, cell.consumer, cell.producer))
    return runs


def _bracket(view: View, x: float, y: float, width: int, wide: bool) -> list[str]:
    """A line under the range that trains, so that one sees that it is contiguous."""
    cells = view.cells
    lines: list[str] = []
    if wide and len(_runs(cells)) > MOST_RUNS:
        return lines
    boxes = {} if wide else {number: (left, left + w) for left, w, number, _ in _cell_boxes(view, x, width)}
    for side, colour, drop in (("consumer", CONSUMER, 0.0), ("producer", PRODUCER, 3.0)):
        low = None
        for place in range(len(cells) + 1):
            on = place < len(cells) and getattr(cells[place], side)
            if on and low is None:
                low = place
            elif not on and low is not None:
                left, right = _span(low, place, len(cells), x, width) if wide else (boxes[low][0], boxes[place - 1][1])
                lines.append(
                    f'<path d="M{left:.1f} {y + drop + 1:.1f}H{right:.1f}" stroke="{colour}" stroke-width="2"/>'
                )
                low = None
    return lines


def _chips(looks: Looks, structure: Structure, x: float, y: float, width: int) -> list[str]:
    """One small box per site, filled when its tensor was reordered; then what trains, in words."""
    lines, left = [], x
    trained, words = looks.slices_in(structure), looks.words(structure)
    room = x + width - 5.4 * len(words) - 4
    for number, site in enumerate(structure.sites):
        name = _chip_name(site)
        size = 9 + 5.6 * len(name)
        if left + size > room:
            rest = len(structure.sites) - number
            lines.append(f"<g><title>{escape(chr(10).join(str(s) for s in structure.sites[number:]))}</title>")
            lines.append(_text(left, y + 10, f"+{rest}", SOFT, 9) + "</g>")
            break
        reordered = (site.param, site.axis) in looks.moved
        more = looks.extras(site.param)
        note = f"{site}{', reordered' if reordered else ''}{more}"
        lines.append(f"<g><title>{escape(note)}</title>{_chip_svg(left, y, name, reordered, bool(more))}</g>")
        left += size + 4
    if words:
        note = "\n".join(slice_text(s, looks.program.tensor(s.param).dim()) for s in trained)
        text = _text(x + width, y + 10, words, SAID, 10, anchor="end")
        lines.append(f"<g><title>{escape(note or words)}</title>{text}</g>")
    return lines


def _chip_name(site: Site) -> str:
    """`q`, `down`; vectors by what they belong to, so that a bias of Q does not read as Q."""
    if site.role in ("vector", "other"):
        parts = site.param.split(".")
        return ".".join(parts[-2:])[:14] if parts[-1] not in ("bias", "weight") else f"{parts[-2][:8]}·{parts[-1][0]}"
    return site.role


def _declined(item: Declined, x: float, y: float, width: int) -> list[str]:
    title = f"{item.kind} {item.name}\nnot touched: {item.reason}"
    short = item.reason if len(item.reason) < width / 5.4 else item.reason[: int(width / 5.4)] + "…"
    sites = "".join(f"\n{site}" for site in item.sites)
    return [
        f'<g class="declined"><title>{escape(title + sites)}</title>',
        f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="2" fill="#eceff2" stroke="{FAINT}" '
        'stroke-dasharray="3 2"/>',
        _text(x + 6, y + 12, f"declined: {split_layer(item.name)[1] or item.name}", SOFT, 10),
        _text(x, y + BOX + 20, short, SOFT, 9.5),
        "</g>",
    ]


def _label(band: Band, prefix: int, y: float) -> str:
    """Name of a row without what all rows share, but at least its last two parts; of a band with all its numbers."""
    row = band.rows[0]
    parts = row.split(".")
    name = ".".join(parts[min(prefix, max(0, len(parts) - 2)) :])
    title, times = row, ""
    if len(band.rows) > 1:
        indices = f"{{{numbers_text(int(r.rpartition('.')[2]) for r in band.rows)}}}"
        name, title = (
            f"{name.rpartition('.')[0]}.{indices}".lstrip("."),
            f"{row.rpartition('.')[0]}.{indices}".lstrip("."),
        )
        times = _text(MARGIN, y + 27, f"× {len(band.rows)}", INK, 12)
    short = name if len(name) <= 22 else f"…{name[-21:]}"
    return f"<g><title>{escape(title)}</title>{_text(MARGIN, y + 12, short, INK, 12, bold=True)}{times}</g>"


def _heading(kind: str, leaves: set[str]) -> str:
    """Title of a column: what stands in it, and the module's name if that is the same in all rows."""
    name = {"attention": "attention", "ffn": "feed-forward"}.get(kind, "other")
    leaf = next(iter(leaves)) if len(leaves) == 1 else ""
    return f"{name} · {leaf}" if leaf not in ("", name) else name


def _chip_svg(x: float, y: float, name: str, moved: bool, extra: bool = False) -> str:
    size = 9 + 5.6 * len(name)
    edge = f'stroke="{EXTRA}" stroke-width="1.6"' if extra else "" if moved else f'stroke="{FAINT}"'
    style = f'fill="{MOVED if moved else "none"}" {edge}'
    return f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{CHIP}" rx="6" {style}/>' + _text(
        x + size / 2, y + 9.7, name, PAPER if moved else SOFT, 9, anchor="middle"
    )


def _swatch(x: float, y: float, colour: str, dashed: bool = False) -> str:
    edge = f' stroke="{FAINT}" stroke-dasharray="3 2"' if dashed else ""
    return f'<rect x="{x}" y="{y - 10}" width="14" height="12" rx="2" fill="{colour}"{edge}/>'


def _shade(place: float, count: int) -> str:
    """Colour of the unit that stood at `place` of `count` originally."""
    part = place / max(1, count - 1)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(*RAMP, strict=True))


def _text(x: float, y: float, text: str, colour: str, size: float, *, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}"{weight}{place}>{escape(text)}</text>'
