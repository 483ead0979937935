"""The inspector: a program as one HTML page that people search, unfold and click through; nothing is loaded from anywhere.

    inspect_program ──▶ data ──▶ <script type="application/json">   read by templates/inspector.js, which writes text nodes only

Names come from models and adapters, and are hostile: no character of theirs stands in the page but inside the block of data, where `<`,
`>` and `&` are written as escapes, and in the title, escaped; and the page's Content-Security-Policy runs the one script that it names
by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from sparsify.errors import InputError
from sparsify.files.atomic import shown
from sparsify.files.atomic import write_text as write_atomically
from sparsify.files.regular import read_file
from sparsify.files.strict_json import Json, parse
from sparsify.program import Program
from sparsify.show.inspection import FORMAT, VERSION, inspect_program

LARGEST, DEEPEST = 64 << 20, 60
"""Bytes and levels of nesting of a page that is read."""


def inspector_page(program: Program, path: str | os.PathLike[str] | None = None) -> str:
    """The page as text; with `path` it is also written there, whole or not at all."""
    text = render_inspector(inspect_program(program))
    if path is not None:
        write_atomically(path, text)
    return text


def render_inspector(data: Mapping[str, Json]) -> str:
    """The page around data of `inspect_program`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    style, script = template("inspector.css"), template("inspector.js")
    environment = Environment(
        loader=PackageLoader("sparsify.show", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("inspector.html.jinja").render(
        title=f"{data['model']} · sparsify inspector",
        policy=f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        data=Markup(data_block(data)),
    )


def read_inspector(path: str | os.PathLike[str]) -> dict[str, Json]:
    """The data of a page that `inspector_page` wrote. Raises InputError for any other file."""
    text = read_file(path, LARGEST, InputError)
    found = re.search(rb'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    data = parse(found[1], shown(Path(path)), InputError, depth=DEEPEST) if found is not None else None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(
            f"{shown(Path(path))}: not a page of sparsify's inspector (`sparsify inspect MODEL --html FILE`)"
        )
    if data.get("version") != VERSION:
        raise InputError(
            f"{shown(Path(path))}: a page of version {data.get('version')!r}; this sparsify reads {VERSION}"
        )
    return data


def data_block(data: Mapping[str, Json]) -> str:
    """JSON that can stand in a `<script>`, whatever its texts hold: ASCII, and no character that HTML knows."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def template(name: str) -> str:
    return (resources.files("sparsify.show") / "templates" / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


__all__ = ["inspector_page", "read_inspector", "render_inspector"]
