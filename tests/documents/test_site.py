"""The site is built as its readers get it: strictly, whole, and with nothing fetched from elsewhere."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import sparsify

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import draw_pictures  # noqa: E402

needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason="the site is built with mkdocs-material and mkdocstrings: pip install -e '.[docs]'",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once for all processes of a test run."""
    together = "PYTEST_XDIST_WORKER" in os.environ
    folder = (tmp_path_factory.getbasetemp().parent if together else tmp_path_factory.mktemp("docs")) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            build(folder)
    return folder


def build(folder: Path) -> None:
    draft = folder.with_name("draft")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(draft)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    draft.rename(folder)


class Addresses(html.parser.HTMLParser):
    """What a browser would fetch for a page by itself: scripts, styles, pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.alternatives: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.found.append(values["src"] or "")
        if tag == "link" and values.get("rel") != "canonical" and values.get("href"):
            self.found.append(values["href"] or "")
        if tag == "img":
            self.alternatives.append(values.get("alt") or "")


@needs_mkdocs
def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert len(texts) > 40
    pages = [Addresses(text) for text in texts]
    assert any(page.found for page in pages)
    assert not [address for page in pages for address in page.found if re.match(r"(https?:)?//", address)]
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not [found for style in styles for found in re.findall(r"url\(['\"]?((?:https?:)?//[^)]*)", style)]


@needs_mkdocs
def test_every_picture_says_what_it_shows(site: Path) -> None:
    texts = [Addresses(path.read_text(encoding="utf-8")).alternatives for path in site.rglob("*.html")]
    shown = [text for page in texts for text in page]
    assert len(shown) > 12
    assert all(len(text) > 15 for text in shown), shown


@needs_mkdocs
def test_every_public_name_has_its_place_in_the_api(site: Path) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").rglob("*.html"))
    for name in set(sparsify.__all__) - {"__version__"}:
        assert f'id="sparsify.{name}"' in text, name
    for verb in ("merge", "save_adapter", "set_adapter", "export_lora", "original_state_dict"):
        assert f'id="sparsify.host.handle.Handle.{verb}"' in text, verb


@needs_mkdocs
def test_the_api_shows_fields_as_lists(site: Path) -> None:
    text = (site / "api" / "rules" / "index.html").read_text(encoding="utf-8")
    assert "<li><strong>density</strong>: trained share of the weight" in text


def test_pictures_are_those_that_are_drawn() -> None:
    for path, text in draw_pictures.drawn().items():
        assert path.read_text(encoding="utf-8") == text, "run `python docs/draw_pictures.py`"
    assert {p.name for p in draw_pictures.FOLDER.iterdir()} == {p.name for p in draw_pictures.drawn()}


def test_every_page_is_in_the_navigation() -> None:
    written = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]))
    assert written == listed


@needs_mkdocs
def test_an_option_is_not_cut_at_its_hyphens(site: Path) -> None:
    text = (site / "shell" / "index.html").read_text(encoding="utf-8")
    assert '<code class="word">--help</code>' in text
    assert "code.word { white-space: nowrap; }" in (site / "assets" / "extra.css").read_text(encoding="utf-8")
    assert 'class="word">sparsify plan' not in text, "a command may break between its words"


@needs_mkdocs
def test_words_of_pages_and_names_of_the_api_are_found(site: Path) -> None:
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    places = {entry["location"] for entry in found}
    assert {"choose/", "troubleshooting/", "api/rules/#sparsify.S2FT"} <= places
    assert any("co-permuting" in entry["text"] for entry in found)
