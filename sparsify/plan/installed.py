"""Methods of installed distributions, found where a plan or a file first names one; see `sparsify.methods.register`."""

from __future__ import annotations

from importlib.metadata import entry_points


def find(name: str) -> None:
    """Load an installed method that declares an entry point of this name, if there is one."""
    for point in entry_points(group="sparsify.methods", name=name):
        point.load()


__all__ = ["find"]
