"""Names of graph inputs: identifiers, whatever the model's modules are called.

    "up.x=exec(…) and y.weight" ──▶ placeholder `p_up_x_exec_and_y_weight`; the qualified name stays in `Program.inputs` alone

FX writes the names of placeholders into Python source, unquoted. Modules are called what a `ModuleDict` key says: "en-de", "a b",
"class", or code. So a name of the model reaches a graph only through `identifier`, and only a graph's own namespace, which
numbers what it has seen, decides that it is unique.
"""

from __future__ import annotations

import keyword
import re
import unicodedata

from torch import fx

LONGEST = 120  # characters; a longer name is cut


def identifier(text: str) -> str:
    """ASCII letters, digits and underscores that Python takes for a name. Not injective: see `placeholder`."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", text)[:LONGEST]
    if not name or name[0].isdigit():
        name = f"_{name}"
    return f"{name}_" if keyword.iskeyword(name) or keyword.issoftkeyword(name) else name


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters, line separators and lone surrogates as escapes: one line of any console and any XML."""
    hidden = {c for c in text if c not in keep and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp", "Cf")}
    for character in hidden:
        text = text.replace(character, character.encode("unicode_escape").decode("ascii"))
    return text


def is_safe(text: str) -> bool:
    """Whether a name can stand in generated source as it is."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def placeholder(graph: fx.Graph, text: str) -> fx.Node:
    """A new input at the graph's insertion point, under an identifier made of `text` that no other node of the graph has."""
    node = graph.placeholder(identifier(text))
    node.target = node.name  # the parameter's name in the generated source; the graph has made `name` unique
    return node


__all__ = ["identifier", "is_safe", "placeholder", "printable"]
