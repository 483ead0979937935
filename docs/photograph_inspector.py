"""`docs/assets/inspector.png`: the inspector of a small Llama in a real browser; make it again when the page has changed.

python docs/photograph_inspector.py        Chromium is needed (Debian's package `chromium`)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from browser import Browser  # noqa: E402

import sparsify  # noqa: E402
from sparsify import S2FT, Plan  # noqa: E402

OUT = ROOT / "docs" / "assets" / "inspector.png"
WIDTH, HEIGHT = 1100, 600


def main() -> None:
    model = tiny.llama(
        num_hidden_layers=12, intermediate_size=96, num_attention_heads=6, num_key_value_heads=2, hidden_size=36
    )
    rules = [S2FT(structure="ffn", fraction=0.1), S2FT(structure="attention", fraction=0.3, producer_fraction=0.5)]
    host = sparsify.compile(model, Plan(rules), progress=False)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        path = Path(folder) / "llama.html"
        host.sparsify.program.html(path)  # type: ignore[union-attr]
        page = browser.open(path, "#theme=light", width=WIDTH, height=HEIGHT)
        page.click('[data-item="structure:model.layers.0.mlp"]')
        page.until("document.querySelector('#panel h2')")
        page.ask("window.scrollTo(0, 0)")
        page.picture(OUT)


if __name__ == "__main__":
    main()
