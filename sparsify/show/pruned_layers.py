"""What pruning did, layer by layer, as a picture: SVG text, self-contained, one row per weight in the order of the graph.

    model.layers.0
      self_attn.q_proj   ████████████░░░░  75.0 %     ███░░░░░░░  0.031
      mlp.down_proj      ████████████░░░░  75.0 %     ███████░░░  0.112
                         zeros                        relative squared error of the layer's output

Bars of zeros are full at 100 %, bars of error at the largest error of the model. Hovering shows method, pattern, tokens, seconds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from sparsify.console import markup as escape
from sparsify.pruning.sequential import LayerStats
from sparsify.show.drawing import split_layer, write_atomically

INK, SOFT, FAINT, ZEROS, ERROR = "#1d2733", "#5d6b7a", "#e4e8ed", "#1c7ed6", "#e8590c"
NAME, BAR, GAP, ROW, TOP, MARGIN = 250, 170, 90, 19, 66, 24


def pruning_svg(layers: Sequence[LayerStats]) -> str:
    """The picture of pruned layers (`program.pruned`, `PruneResult.layers`)."""
    errors = [layer.error for layer in layers if math.isfinite(layer.error)]
    largest = max(errors, default=0.0) or 1.0
    groups: dict[str, list[LayerStats]] = {}
    for layer in layers:
        groups.setdefault(split_name(layer.name)[0], []).append(layer)
    width = 2 * MARGIN + NAME + 2 * (BAR + GAP)
    height = TOP + ROW * (len(layers) + len(groups)) + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title(layers))}" '
        'font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{MARGIN}" y="26" font-size="14" font-weight="600" fill="{INK}">{escape(title(layers))}</text>',
        f'<text x="{MARGIN + NAME}" y="50" fill="{SOFT}">zeros</text>',
        f'<text x="{MARGIN + NAME + BAR + GAP}" y="50" fill="{SOFT}">relative squared error of the output</text>',
    ]
    y = TOP
    for name, members in groups.items():
        lines.append(f'<text x="{MARGIN}" y="{y + 13}" font-weight="600" fill="{INK}">{escape(name or "model")}</text>')
        y += ROW
        for layer in members:
            lines += row(layer, y, largest)
            y += ROW
    return "\n".join([*lines, "</svg>"])


def title(layers: Sequence[LayerStats]) -> str:
    methods = " and ".join(dict.fromkeys(layer.method for layer in layers)) or "nothing"
    return f"{len(layers)} weights pruned by {methods}"


def split_name(name: str) -> tuple[str, str]:
    """`(model.layers.3, mlp.down_proj.weight)`; a weight outside of numbered layers is its own and has no layer."""
    layer, rest = split_layer(name)
    return (layer, rest) if rest else ("", name)


def row(layer: LayerStats, y: float, largest: float) -> list[str]:
    """One weight: its name inside the layer and two bars."""
    name = split_name(layer.name)[1].removesuffix(".weight")
    hover = f"{layer.name}: {layer.method}, {layer.pattern}, {layer.tokens:,} tokens, {layer.seconds:.2f} s"
    hover += f"; {layer.note}" if layer.note else ""
    share = layer.error / largest if math.isfinite(layer.error) else 0.0
    shown = f"{layer.error:.2g}" if math.isfinite(layer.error) else "unknown"
    left, right = MARGIN + NAME, MARGIN + NAME + BAR + GAP
    return [
        f"<g><title>{escape(hover)}</title>",
        f'<text x="{MARGIN + 12}" y="{y + 13}" fill="{SOFT}">{escape(name)}</text>',
        *bar(left, y, layer.sparsity, f"{layer.sparsity:.1%}", ZEROS),
        *bar(right, y, share, shown, ERROR),
        "</g>",
    ]


def bar(x: float, y: float, share: float, text: str, colour: str) -> list[str]:
    return [
        f'<rect x="{x}" y="{y + 4}" width="{BAR}" height="11" fill="{FAINT}"/>',
        f'<rect x="{x}" y="{y + 4}" width="{BAR * min(max(share, 0.0), 1.0):.1f}" height="11" fill="{colour}"/>',
        f'<text x="{x + BAR + 8}" y="{y + 13}" fill="{INK}">{escape(text)}</text>',
    ]


def write_svg(layers: Sequence[LayerStats], path: str | os.PathLike[str]) -> None:
    """Draw into a file, whole or not at all."""
    write_atomically(path, pruning_svg(layers))
