"""Tables on a console, by rich: the first column to the left, numbers to the right; plain text where nobody looks at colours."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.console import one_line


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table. left: how many columns are text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    Console(highlight=False, soft_wrap=False).print(table)


__all__ = ["show"]
