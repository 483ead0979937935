"""The inspector in a real browser: open, unfold, search, click, keys, dark mode, at 500 and at 1,280 pixels; hostile names do nothing.

`graph/test_inspector.py` covers in the default run what the page is made of: its data, its policy, that no way into markup is in its script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from browser import CONTRAST, Browser, Page, find_chromium
from torch import nn

import sparsify
from sparsify import S2FT, Plan, RoSA
from sparsify.program.structure import Declined
from sparsify.show.inspector import render_inspector

pytestmark = [
    pytest.mark.slow,  # covered by graph/test_inspector.py
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine (Debian's package `chromium`)"),
]
WIDTHS = (500, 1280)
HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "'\"><svg onload=alert(3)>")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rules = [
        S2FT(structure="ffn", fraction=0.1),
        S2FT(structure="attention", fraction=0.3, producer_fraction=0.5),
        RoSA(match="*.gate_proj", rank=2, density=0.01),
    ]
    host = sparsify.compile(tiny.llama(num_hidden_layers=12), Plan(rules), progress=False)
    slopes = Declined("model.layers.3.extra", "attention", "slopes of the heads")
    file = tmp_path_factory.mktemp("page") / "llama.html"
    host.sparsify.program.evolve("by hand", declined=(slopes,)).html(file)
    return file


def fits(page: Page) -> bool:
    """Whether nobody must scroll sideways."""
    return page.ask("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("width", WIDTHS)
def test_open_unfold_and_click(browser: Browser, path: Path, width: int) -> None:
    page = browser.open(path, width=width)
    assert page.text("h1") == "LlamaForCausalLM"
    assert "24 structures in 12 layers" in page.text("#headline")
    row = '[data-key="row:model.layers.{0…2, 4…11}"]'
    assert "× 11" in page.text(row)
    assert page.count('[data-item^="structure:model.layers.0."]') == 2
    page.click(row)
    assert page.count('[data-item^="structure:model.layers.0."]') == 0
    page.click(row)
    page.click('[data-key^="layers:"]')
    assert page.count('.layers [data-item="structure:model.layers.7.mlp"]') == 1
    assert fits(page)
    page.click('.layers [data-item="structure:model.layers.7.mlp"]')
    said = page.text("#panel")
    for part in ("model.layers.7.mlp", "44 channels", "down_proj.weight", "reordered", "Permutation", "weight[:, 0:4]"):
        assert part in said, part
    assert page.ask("document.querySelector('#panel').getBoundingClientRect().bottom <= window.innerHeight + 1")
    assert fits(page)
    if width < 860:
        page.click("#panel .close")
        assert page.count("#panel") == 0
    assert page.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_search(browser: Browser, path: Path, width: int) -> None:
    page = browser.open(path, width=width)
    page.key("/", "/")
    assert page.ask("document.activeElement.id") == "search"
    page.type("7.mlp")
    page.until("document.querySelector('#hits')")
    assert page.text("#hits") == "1 hit"
    page.click('#content [data-item="structure:model.layers.7.mlp"]')
    assert "model.layers.7.mlp" in page.text("#panel h2")
    page.ask("document.querySelector('#search').focus()")
    page.key("Escape")
    page.until("!document.querySelector('#hits')")
    page.type("partial_linear down")
    page.until("document.querySelector('#hits')")
    assert "sparsify.partial_linear(" in page.text("#content")
    assert "× 12" in page.text("#content")
    page.type(" nowhere")
    page.until("document.querySelector('#hits').textContent === '0 hits'")
    assert page.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_operations_stand_before_and_after(browser: Browser, path: Path, width: int) -> None:
    page = browser.open(path, "#tab=operations", width=width)
    line = '.op[data-item="operation:partial_linear_default"]'
    assert "%linear_6 = aten.linear(" in page.text(f"{line} .was")
    assert "sparsify.partial_linear(" in page.text(f"{line} .now")
    boxes = page.ask(
        f"['.was', '.now'].map((s) => document.querySelector({line!r} + ' ' + s).getBoundingClientRect().left)"
    )
    assert (boxes[1] > boxes[0] + 100) == (width > 860), "side by side where there is room, else one above the other"
    assert page.count(".op.same") > 20
    page.click("#changed")
    page.until("document.querySelectorAll('.op.same').length === 0")
    assert page.count(".op.changed") == 4
    page.click(f"{line} .now")
    assert "one GEMM" in page.text("#panel")
    assert fits(page)
    assert page.complaints() == []


def test_reasons_passes_and_keys(browser: Browser, path: Path) -> None:
    page = browser.open(path)
    page.ask("document.querySelector('#tabs [data-tab=layers]').focus()")
    for _ in range(2):
        page.key("ArrowRight")
    assert page.ask("document.activeElement.dataset.tab") == "declined"
    assert "slopes of the heads" in page.text("#content")
    page.click('[data-item="declined:model.layers.3.extra"]')
    assert "slopes of the heads" in page.text("#panel")
    page.key("Escape")
    page.until("document.querySelector('#panel').className === 'empty'")
    page.ask("document.querySelector('#tabs [data-tab=declined]').focus()")
    for _ in range(2):
        page.key("ArrowRight")
    assert "permute-weights: 12 structures" in page.text("#content")
    page.ask("document.querySelector('#tabs [data-tab=passes]').focus()")
    page.key("ArrowRight")
    page.ask("document.querySelector('#content .open').focus()")
    before = page.ask("document.activeElement.getAttribute('aria-expanded')")
    page.key("Enter", "\r")
    assert page.ask("document.activeElement.getAttribute('aria-expanded')") != before
    assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("tab", ["layers", "operations", "declined", "passes", "search"])
def test_everything_can_be_read_in_light_and_dark(browser: Browser, path: Path, dark: bool, tab: str) -> None:
    where = "search=mlp" if tab == "search" else f"tab={tab}"
    page = browser.open(path, f"#{where}&item=structure:model.layers.0.mlp", dark=dark)
    dim = page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 29)"
    assert dim == dark
    assert page.ask(CONTRAST) == []


def test_the_theme_can_be_chosen_and_goes_into_the_address(browser: Browser, path: Path) -> None:
    page = browser.open(path)
    for _ in range(2):
        page.click("#theme")
    assert page.text("#theme") == "Theme: dark"
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 29)"
    assert page.ask("location.hash") == "#theme=dark"
    page.click('[data-item="structure:model.layers.0.mlp"]')
    again = browser.open(path, page.ask("location.hash"))
    assert again.text("#theme") == "Theme: dark"
    assert again.text("#panel h2") == "model.layers.0.mlp"


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {name: nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for name in HOSTILE}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = x + block["down"](torch.relu(block["up"](x)))  # type: ignore[operator,index]
        return x


def test_hostile_names_are_shown_and_do_nothing(browser: Browser, tmp_path: Path) -> None:
    host: Any = sparsify.compile(Named().eval(), Plan([S2FT(0.3)]), example=torch.randn(3, 6), progress=False)
    declined = tuple(Declined(name, "other", f"because {name}") for name in HOSTILE)
    host.sparsify.program.evolve(HOSTILE[0], declined=declined).html(tmp_path / "a.html")
    for tab in ("layers", "operations", "declined", "kernels", "passes"):
        page = browser.open(tmp_path / "a.html", f"#tab={tab}")
        assert page.ask("document.querySelectorAll('img, [onerror], [onload], [src]').length") == 0
        assert page.ask("document.scripts.length") == 2
        assert tab == "kernels" or HOSTILE[0] in page.text("#content")
        assert page.complaints() == []
    page = browser.open(tmp_path / "a.html")
    page.ask("document.querySelector('#search').focus()")
    page.type("onerror")
    page.until("document.querySelector('#hits')")
    page.click("#content .card")
    assert HOSTILE[0] in page.text("#panel")
    assert page.ask("document.querySelectorAll('img, [onerror], [onload], [src]').length") == 0
    assert page.complaints() == []


def test_eighty_layers_that_do_not_fold_open_at_once(browser: Browser, path: Path, tmp_path: Path) -> None:
    """Only what is unfolded is made."""
    block = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    data = json.loads(block[1])
    at, run = next((at, item) for at, item in enumerate(data["operations"]) if item.get("count") == 12)
    text = json.dumps(run["items"], ensure_ascii=False)
    layers = [json.loads(text.replace("{0…11}", str(i)).replace('"name": "', f'"name": "layer{i}_')) for i in range(80)]
    data["operations"][at : at + 1] = [
        {"run": f"model.layers.{i}", "count": 1, "items": items} for i, items in enumerate(layers)
    ]
    file = tmp_path / "deep.html"
    file.write_text(render_inspector(data), encoding="utf-8")
    assert 500_000 < file.stat().st_size < 5e6
    page = browser.open(file, "#tab=operations")
    assert page.count('[data-key^="run:"]') == 80
    assert page.ask("document.querySelectorAll('*').length") < 2500
    page.click('[data-key="run:model.layers.41"]')
    assert page.count('[data-item^="operation:layer41_"]') > 50
    page.key("/", "/")
    page.type("layers.41.mlp")
    page.until("document.querySelector('#hits')")
    assert page.count("#content .card") == 5
    assert page.complaints() == []
