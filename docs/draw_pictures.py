"""The pictures of the pages: `python docs/draw_pictures.py` writes docs/pictures/*.svg. Frozen is grey, what trains is blue."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
INK, SOFT, FROZEN, TRAINS, ZERO, EDGE, OTHER = (
    "#1d1f23",
    "#5b616b",
    "#dfe3e8",
    "#3f51b5",
    "#ffffff",
    "#c3c9d1",
    "#e6a23c",
)
CELL = 14


class Picture:
    """A white card with boxes, grids, arrows and words."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 14,
        color: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{weight}>{escape(words)}</text>'
        )

    def grid(
        self, x: float, y: float, rows: int, columns: int, color: Callable[[int, int], str], cell: int = CELL
    ) -> None:
        """Cells whose colour is that of `color(row, column)`."""
        for i in range(rows):
            for j in range(columns):
                self.parts.append(
                    f'<rect x="{x + j * cell:g}" y="{y + i * cell:g}" width="{cell - 2}" height="{cell - 2}" rx="2" '
                    f'fill="{color(i, j)}" stroke="{EDGE}" stroke-width="0.6"/>'
                )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str,
        below: str = "",
        *,
        fill: str = "#f4f5f7",
        color: str = INK,
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{EDGE}"/>'
        )
        self.text(x + width / 2, y + height / 2 + (-2 if below else 5), words, bold=True, color=color)
        if below:
            self.text(x + width / 2, y + height / 2 + 16, below, size=12, color=color if color != INK else SOFT)

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(
            f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{SOFT}" stroke-width="1.6" fill="none" marker-end="url(#end)"/>'
        )

    def svg(self) -> str:
        size = f"0 0 {self.width} {self.height}"
        tip = f'<path d="M0 0L8 4L0 8z" fill="{SOFT}"/>'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img" font-family="system-ui, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f"{tip}</marker></defs>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#ffffff"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def columns_of(chosen: Iterable[int]) -> Callable[[int, int], str]:
    found = set(chosen)
    return lambda _, j: TRAINS if j in found else FROZEN


def rows_of(chosen: Iterable[int]) -> Callable[[int, int], str]:
    found = set(chosen)
    return lambda i, _: TRAINS if i in found else FROZEN


def plain(color: str) -> Callable[[int, int], str]:
    return lambda _i, _j: color


def scattered(every: int, color: str, rest: str) -> Callable[[int, int], str]:
    return lambda i, j: color if (7 * i + 5 * j + i * j) % every == 0 else rest


def overview() -> Picture:
    p = Picture(860, 250, "From a model to the same class with small trained parts")
    p.box(20, 85, 130, 70, "your model", "any nn.Module")
    p.arrow(152, 120, 182, 120)
    p.box(186, 85, 120, 70, "graph", "torch.export")
    p.arrow(308, 120, 338, 120)
    p.box(342, 85, 130, 70, "structures", "heads, channels")
    p.arrow(474, 120, 504, 120)
    p.box(508, 85, 130, 70, "what trains", "chosen by a plan", fill=TRAINS, color="#ffffff")
    p.arrow(640, 120, 670, 120)
    p.box(674, 85, 166, 70, "host", "same class, same generate()")
    p.text(251, 60, "capture", size=13, color=SOFT)
    p.text(407, 60, "detect, prove", size=13, color=SOFT)
    p.text(573, 60, "select, insert", size=13, color=SOFT)
    p.text(757, 60, "install", size=13, color=SOFT)
    p.text(430, 30, "sparsify.compile(model, plan)", size=17, bold=True)
    p.arrow(757, 157, 757, 186)
    p.text(757, 206, "train, save, switch, merge,", size=13, color=SOFT)
    p.text(757, 224, "export to LoRA, restore", size=13, color=SOFT)
    p.arrow(672, 140, 604, 196)
    p.text(500, 206, 'target="cpu": prune, int8,', size=13, color=SOFT)
    p.text(500, 224, "generated kernels", size=13, color=SOFT)
    p.text(120, 206, "your model is not written to", size=13, color=SOFT)
    return p


def stages() -> Picture:
    p = Picture(860, 170, "Stages of a program")
    names = ("CAPTURED", "STRUCTURED", "SELECTED", "PERMUTED", "EXPANDED", "LOWERED")
    words = (
        "the graph",
        "what belongs together",
        "what trains",
        "weights moved",
        "operators inserted",
        "ready to install",
    )
    for number, (name, word) in enumerate(zip(names, words, strict=True)):
        x = 14 + number * 141
        p.box(x, 40, 126, 56, name, fill=TRAINS if number == 2 else "#f4f5f7", color="#ffffff" if number == 2 else INK)
        p.text(x + 63, 116, word, size=12, color=SOFT)
        if number:
            p.arrow(x - 14, 68, x - 2, 68)
    p.text(430, 150, "every arrow is a pass; after each the program is verified", size=13, color=SOFT)
    return p


def s2ft() -> Picture:
    p = Picture(720, 250, "S2FT trains whole channels of coupled linears")
    chosen = (4, 5)
    p.text(120, 34, "Up (and Gate)", bold=True)
    p.grid(50, 50, 10, 10, lambda i, _j: OTHER if i in chosen else FROZEN)
    p.text(120, 216, "row j makes channel j", size=12, color=SOFT)
    p.arrow(200, 120, 250, 120)
    p.text(310, 34, "hidden channels", bold=True)
    p.grid(303, 50, 10, 1, lambda i, _j: OTHER if i in chosen else FROZEN)
    p.text(310, 216, "a few are chosen", size=12, color=SOFT)
    p.arrow(335, 120, 385, 120)
    p.text(480, 34, "Down", bold=True)
    p.grid(410, 50, 10, 10, columns_of(chosen))
    p.text(480, 216, "column j reads it: these train", size=12, color=SOFT)
    p.grid(610, 100, 1, 1, plain(TRAINS))
    p.text(632, 112, "trains", size=13, anchor="start")
    p.grid(610, 124, 1, 1, plain(OTHER))
    p.text(632, 136, "coupled", size=13, anchor="start")
    p.grid(610, 148, 1, 1, plain(FROZEN))
    p.text(632, 160, "frozen", size=13, anchor="start")
    return p


def paca() -> Picture:
    p = Picture(720, 230, "PaCA trains a few input columns of every linear")
    chosen = (2, 6, 9)
    p.text(150, 34, "input X", bold=True)
    p.grid(66, 50, 8, 12, columns_of(chosen))
    p.text(150, 196, "only these columns are kept", size=12, color=SOFT)
    p.text(270, 115, "×", size=22)
    p.text(390, 34, "weight W", bold=True)
    p.grid(306, 50, 8, 12, columns_of(chosen))
    p.text(390, 196, "only these columns train", size=12, color=SOFT)
    p.text(520, 115, "=", size=22)
    p.text(610, 34, "output", bold=True)
    p.grid(554, 50, 8, 8, plain(FROZEN))
    p.text(610, 196, "one dense product, as before", size=12, color=SOFT)
    return p


def lowrank(p: Picture, x: float, top: float) -> None:
    """B (8 × 2) and A (2 × 8) as thin factors."""
    p.grid(x, top, 8, 2, plain(TRAINS))
    p.grid(x + 40, top + 42, 2, 8, plain(TRAINS))


def rosa() -> Picture:
    p = Picture(720, 230, "RoSA adds scattered entries and a low-rank update")
    p.text(116, 34, "W", bold=True)
    p.grid(60, 50, 8, 8, plain(FROZEN))
    p.text(116, 196, "frozen", size=12, color=SOFT)
    p.text(205, 112, "+", size=22)
    p.text(296, 34, "S", bold=True)
    p.grid(240, 50, 8, 8, scattered(9, TRAINS, ZERO))
    p.text(296, 196, "entries with large gradients", size=12, color=SOFT)
    p.text(390, 112, "+", size=22)
    p.text(500, 34, "B A", bold=True)
    lowrank(p, 430, 50)
    p.text(500, 196, "a low rank", size=12, color=SOFT)
    return p


def lora() -> Picture:
    p = Picture(720, 230, "LoRA adds a low-rank update")
    p.text(196, 34, "W", bold=True)
    p.grid(140, 50, 8, 8, plain(FROZEN))
    p.text(196, 196, "frozen", size=12, color=SOFT)
    p.text(300, 112, "+", size=22)
    p.text(420, 34, "B A", bold=True)
    lowrank(p, 350, 50)
    p.text(420, 196, "B starts at zero, so step 0 is the base", size=12, color=SOFT)
    return p


def sparse() -> Picture:
    p = Picture(720, 230, "Sparse fine-tuning prunes once and trains the survivors")
    p.text(116, 34, "dense teacher", bold=True)
    p.grid(60, 50, 8, 8, plain(FROZEN))
    p.text(116, 196, "fine-tuned before", size=12, color=SOFT)
    p.arrow(190, 105, 270, 105)
    p.text(230, 92, "prune", size=13, color=SOFT)
    p.text(346, 34, "student", bold=True)
    p.grid(290, 50, 8, 8, scattered(4, TRAINS, ZERO))
    p.text(346, 196, "zeros stay zero, the rest trains", size=12, color=SOFT)
    p.arrow(420, 105, 500, 105)
    p.text(460, 92, "pack", size=13, color=SOFT)
    p.text(590, 34, "kernels", bold=True)
    p.grid(534, 66, 2, 8, plain(TRAINS))
    p.grid(534, 106, 2, 8, plain("#aab4e0"))
    p.text(590, 196, "masks and values, read once", size=12, color=SOFT)
    return p


def quantize() -> Picture:
    p = Picture(720, 230, "A packed base beside a trained part")
    p.text(126, 34, "W, 32 bits", bold=True)
    p.grid(70, 50, 8, 8, plain(FROZEN))
    p.text(126, 196, "4 bytes a weight", size=12, color=SOFT)
    p.arrow(200, 105, 270, 105)
    p.text(235, 92, "pack", size=13, color=SOFT)
    p.text(330, 34, "W, 4 bits", bold=True)
    p.grid(300, 78, 8, 8, plain(FROZEN), cell=7)
    p.text(330, 196, "half a byte, and scales", size=12, color=SOFT)
    p.text(430, 112, "+", size=22)
    p.text(540, 34, "what trains", bold=True)
    p.grid(484, 50, 8, 8, lambda _i, j: TRAINS if j in (3, 4) else ZERO)
    p.text(540, 196, "in full precision", size=12, color=SOFT)
    return p


def names() -> Picture:
    p = Picture(720, 230, "Rows of an embedding, vectors by name")
    p.text(160, 34, "embedding, head", bold=True)
    p.grid(90, 50, 9, 10, rows_of((7, 8)))
    p.text(160, 200, "two new tokens train", size=12, color=SOFT)
    p.text(380, 34, "biases, norms", bold=True)
    p.grid(310, 76, 1, 10, plain(TRAINS))
    p.grid(310, 106, 1, 10, plain(TRAINS))
    p.text(380, 200, "vectors by name", size=12, color=SOFT)
    p.text(580, 34, "a new head", bold=True)
    p.grid(510, 62, 4, 10, plain(TRAINS))
    p.text(580, 200, "trains in full", size=12, color=SOFT)
    return p


PICTURES = (overview, stages, s2ft, paca, rosa, lora, sparse, quantize, names)


def drawn() -> dict[Path, str]:
    """Every picture's file and text."""
    return {FOLDER / f"{draw.__name__}.svg": draw().svg() for draw in PICTURES}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in drawn().items():
        path.write_text(text, encoding="utf-8")
