"""Hooks of the site: lists as GitHub reads them, room for the widest table, and options that no line break cuts."""

from __future__ import annotations

import re
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

ITEM = re.compile(r"^(?:[-*]|\d+\.) ")
WIDE = {"coverage.md"}
WORD = re.compile(r"<code>([^<\s]*-[^<\s]*)</code>")
SHORT = 20
"""Characters up to which a word of code stays in one piece: a browser would break `--help` behind its hyphens."""


class ListsBreakParagraphs(Preprocessor):
    """A list right below a line of text begins a new block, as in GitHub's Markdown; Python-Markdown wants an empty line between."""

    def run(self, lines: list[str]) -> list[str]:
        found: list[str] = []
        fenced = inside = False  # in a block of code; in a list
        for line in lines:
            if line.lstrip().startswith("```"):
                fenced = not fenced
            item = not fenced and bool(ITEM.match(line))
            if item and not inside and found and found[-1].strip():
                found.append("")
            inside = item or (inside and (not line.strip() or line.startswith(" ")))
            found.append(line)
        return found


class GitHubLists(Extension):
    """After snippets are in (priority 32), before fences are taken out (25)."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(ListsBreakParagraphs(md), "github_lists", 28)


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(GitHubLists())
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    if page.file.src_uri in WIDE:
        page.meta.setdefault("hide", ["navigation", "toc"])
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    return WORD.sub(lambda m: f'<code class="word">{m[1]}</code>' if len(m[1]) <= SHORT else m[0], html)
