"""The HTML report in a real browser, at 500 and 1,280 pixels, light and dark: nobody scrolls the page sideways, everything can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from browser import CONTRAST, Browser, find_chromium

import sparsify
from sparsify import S2FT, Plan
from sparsify.console import in_full
from sparsify.show.html_report import Chart, Section, Series, Table, write_html

pytestmark = [
    pytest.mark.slow,  # covered by e2e/test_demo.py::test_a_report_can_be_read_without_seeing_it
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine (Debian's package `chromium`)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host = sparsify.compile(tiny.llama(num_hidden_layers=3), Plan([S2FT(0.2)]), progress=False)
    numbers = Table(
        "Methods", tuple("abcdefghij"), tuple(("a method", *(["1,234,567"] * 9)) for _ in range(3)), "A note.", (1,)
    )
    words = Table("Answers", ("question", "before", "after"), (("Who " * 9, "It was " * 9, "SELECT " * 9),), prose=True)
    charts = tuple(Chart(f"chart {i}", "step", "loss", (Series("S2FT", ((0.0, 1.0), (9.0, 2.0))),)) for i in range(2))
    file = tmp_path_factory.mktemp("report") / "report.html"
    sections = [
        Section("Numbers", ("A paragraph.",), (numbers, words), charts),
        Section("Program", program=host.sparsify.program, text=in_full(host.sparsify.report)),
    ]
    write_html(file, "A title that says what came out", "A summary.", sections)
    return file


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [500, 1280])
def test_the_report_fits_and_can_be_read(browser: Browser, path: Path, width: int, dark: bool) -> None:
    page = browser.open(path, width=width, dark=dark)
    assert page.text("h1") == "A title that says what came out"
    assert page.ask("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.ask(CONTRAST) == []
    left, right = page.ask("[...document.querySelectorAll('.chart')].map((e) => e.getBoundingClientRect().top)")
    assert (left == right) == (width == 1280), "charts stand side by side where there is room"
    assert page.ask(
        "document.querySelector('.program').scrollWidth > document.querySelector('.program').clientWidth"
    ) == (width == 500), "a picture that would be too small to read is scrolled"
    assert (page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 29)") == dark
    assert page.complaints() == []
