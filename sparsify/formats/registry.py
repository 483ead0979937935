"""Formats by name: the package's own, families with parameters in their name, and those that come from outside.

    sparsify.formats.register(Mine())          from then on Quantize(format="mine") packs, trains beside, merges and saves

An installed distribution registers itself where its name is first met, through an entry point:

    [project.entry-points."sparsify.formats"]
    mine = "my_package.my_format"
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import entry_points

from sparsify.errors import PlanError
from sparsify.formats.format import Format

REGISTERED: dict[str, Format] = {}
FAMILIES: dict[str, Callable[[str], Format]] = {}  # by what stands before the first "/" of a name


def register(format: Format) -> Format:
    """Make a format known to `Quantize`, to operators and to files.

    The same class may register again (its module was imported twice). Raises PlanError for what is no format, and for a name
    that is taken.
    """
    if not isinstance(format, Format):
        raise PlanError(f"register: {format!r} is no sparsify.formats.Format")
    name = getattr(format, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise PlanError(f"register: {type(format).__name__}.name must be a word, got {name!r}")
    taken = REGISTERED.get(name)
    if taken is not None and place(taken) != place(format):
        raise PlanError(f"register: a format is called {name!r} already ({'.'.join(place(taken))})")
    REGISTERED[name] = format
    return format


def place(format: Format) -> tuple[str, str]:
    return type(format).__module__, type(format).__qualname__


def register_family(prefix: str, made: Callable[[str], Format]) -> None:
    """Formats whose name holds their parameters: `PREFIX/…`, read by `made`."""
    FAMILIES[prefix] = made


def format_named(name: str) -> Format:
    """The format that packed a weight. Raises PlanError for a name that nobody registered."""
    family = FAMILIES.get(name.partition("/")[0]) if "/" in name else None
    return family(name) if family is not None else packing_format(name)


def packing_format(name: str) -> Format:
    """The format that `Quantize` may ask for. Raises PlanError, with the nearest name, for one that nobody registered."""
    found = REGISTERED.get(name)
    if found is not None:
        return found
    for point in entry_points(group="sparsify.formats", name=name):
        point.load()
    if name in REGISTERED:
        return REGISTERED[name]
    near = difflib.get_close_matches(name, REGISTERED, 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise PlanError(f"unknown format {name!r}; formats are {', '.join(REGISTERED)}{meant}")


__all__ = ["FAMILIES", "REGISTERED", "format_named", "packing_format", "register", "register_family"]
