"""A griffe extension: fields of our docstrings become lists on the API pages.

    rank: columns per linear …                        - **rank**: columns per linear …
        continued here                          ──▶     continued here

Docstrings here name arguments and fields as `name: what it is`, one after the other, which Markdown would run into one paragraph. A pattern
in quotes, such as "*.bias", is code and no emphasis.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

GLOB = re.compile(r"(?<!`)(\"[^\"`\s]*\*[^\"`\s]*\")(?!`)")
FIELD = re.compile(r"^([a-z_][\w, ]*): (?=\S)")


def as_list(text: str) -> str:
    """A docstring with its field lines as a Markdown list; what follows a field up to an empty line belongs to it."""
    lines: list[str] = []
    inside = False  # a list is open
    for line in text.splitlines():
        field = FIELD.match(line)
        if field:
            if not inside and lines and lines[-1]:
                lines.append("")
            names = ", ".join(f"**{name.strip()}**" for name in field[1].split(","))
            lines.append(f"- {names}: {line[field.end() :]}")
            inside = True
        elif inside and line.strip() and lines[-1].strip():  # goes on, indented or not
            lines.append(line if line.startswith("    ") else f"    {line}")
        else:
            inside = inside and not line.strip()
            lines.append(line)
    return "\n".join(lines)


class FieldLines(Extension):
    """Applies `as_list` to every docstring."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(GLOB.sub(r"`\1`", obj.docstring.value))
