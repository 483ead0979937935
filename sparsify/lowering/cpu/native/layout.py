"""Which float of which buffer stands where in a node, and turned by what: views and rotations of a graph, followed on index tensors.

    %q      (2, 7, 64)      base: token · 64 + feature
    view, transpose ──────▶ (2, 4, 7, 16): the same numbers, moved by the very operators of the graph
    q · cos + rotate_half(q) · sin ──▶ two terms: index of an entry, and the frequency by whose cosine or sine it is multiplied

So an attention's heads are read off whatever sequence of views, slices, chunks and expansions made them, and a rotation off whatever
pairing it uses, without a list of patterns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsify.errors import SparsifyError
from sparsify.kernels.cpu.step.operations import Buffer, Heads, Rotation

if TYPE_CHECKING:
    from torch import fx

ONE, COS, SIN = 0, 1, 2
aten = torch.ops.aten
#: operators that only move entries; run on index tensors
VIEWS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default, aten.t.default,
        aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsqueeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default, aten.flatten.using_ints, aten.unflatten.int,
        aten.narrow.default, aten.movedim.int, aten.repeat_interleave.self_int, aten.unbind.int, aten.swapaxes.default,
        aten.repeat.default, operator.getitem,
    }
)  # fmt: skip
JOINS = frozenset({aten.cat.default, aten.stack.default})
#: operators that change nothing of a float32 value
SAME = frozenset(
    {
        aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.contiguous.default, aten.clone.default,
        aten.alias.default, aten.detach.default, aten.dropout.default, aten.lift_fresh_copy.default, aten.type_as.default,
    }
)  # fmt: skip


class Unknown(SparsifyError):
    """A graph that the native step does not know; the message says what."""


@dataclass(frozen=True, eq=False)
class Term:
    """For every entry of a node: index (token · width + feature), kind of factor, its frequency, and a scale."""

    index: torch.Tensor
    kind: torch.Tensor
    frequency: torch.Tensor
    scale: torch.Tensor

    def moved(self, move: Callable[[torch.Tensor], Any]) -> Term:
        return Term(*(move(part) for part in (self.index, self.kind, self.frequency, self.scale)))


@dataclass(frozen=True, eq=False)
class Layout:
    """A node's entries as sums of terms over one buffer. buffer: None for a table of cosines or sines, whose index is the token's place
    in its sequence. frequencies: of the angles, empty without any."""

    buffer: Buffer | None
    terms: tuple[Term, ...]
    frequencies: tuple[float, ...] = ()

    @property
    def held(self) -> Buffer:
        """The buffer. Raises Unknown for a table."""
        if self.buffer is None:
            raise Unknown("a table of angles where a value of tokens is expected")
        return self.buffer

    @property
    def plain(self) -> bool:
        """Whether it is entries of the buffer, as they are."""
        term = self.terms[0]
        return len(self.terms) == 1 and not bool(term.kind.any()) and bool((term.scale == 1).all())


def base(buffer: Buffer, index: torch.Tensor) -> Layout:
    """The entries of a buffer itself. index: token · width + feature, of the node's shape."""
    zeros = torch.zeros_like(index)
    return Layout(buffer, (Term(index, zeros, zeros, torch.ones(index.shape, dtype=torch.float64)),))


def rows_of(buffer: Buffer, shape: tuple[int, ...]) -> Layout:
    """A node (…, width) whose rows are the tokens, as it comes out of a product."""
    count = 1
    for size in shape:
        count *= size
    return base(buffer, torch.arange(count).view(shape))


def move(node: fx.Node, layouts: dict[fx.Node, Any], source: fx.Node) -> Any:
    """A view's layout (a list of them, for one of several outputs) from that of `source`, its argument."""

    target: Callable[..., Any] = node.target  # type: ignore[assignment]

    def call(tensor: torch.Tensor) -> Any:
        args = [tensor if argument is source else argument for argument in node.args]
        return target(*args, **node.kwargs)

    found = layouts[source]
    if isinstance(found, list):
        return found[node.args[1]]  # type: ignore[index]
    parts: list[list[Any]] = [[call(part) for part in (t.index, t.kind, t.frequency, t.scale)] for t in found.terms]
    if isinstance(parts[0][0], list | tuple):
        return [
            replace(found, terms=tuple(Term(*(part[i] for part in term)) for term in parts))
            for i in range(len(parts[0][0]))
        ]
    return replace(found, terms=tuple(Term(*term) for term in parts))


def join(node: fx.Node, parts: list[Layout]) -> Layout:
    """cat or stack of layouts over one buffer."""
    buffers = {part.buffer for part in parts}
    tables = {part.frequencies for part in parts if part.frequencies}
    if len(buffers) > 1 or len(tables) > 1:
        raise Unknown("two different values are concatenated")
    target: Callable[..., torch.Tensor] = node.target  # type: ignore[assignment]
    rest = (*node.args,)[1:]
    terms = []
    for place in range(max(len(part.terms) for part in parts)):
        given = [part.terms[place] if place < len(part.terms) else nothing(part.terms[0]) for part in parts]
        columns = zip(*((t.index, t.kind, t.frequency, t.scale) for t in given), strict=True)
        index, kind, frequency, scale = (target(list(column), *rest, **node.kwargs) for column in columns)
        terms.append(Term(index, kind, frequency, scale))
    return Layout(parts[0].buffer, tuple(terms), next(iter(tables), ()))


def nothing(term: Term) -> Term:
    """A term of the same entries that adds nothing."""
    return replace(term, kind=torch.zeros_like(term.kind), scale=torch.zeros_like(term.scale))


def scaled(layout: Layout, by: float) -> Layout:
    return replace(layout, terms=tuple(replace(term, scale=term.scale * by) for term in layout.terms))


def turned(value: Layout, table: Layout, length: int) -> Layout:
    """value · table, entry by entry: a factor for every term. Raises Unknown where a table meets another token's entries."""
    assert value.buffer is not None
    x, c = value.terms[0], table.terms[0]
    if (len(value.terms), len(table.terms)) != (1, 1) or bool(x.kind.any()):
        raise Unknown("a value is rotated twice")
    if value.frequencies and table.frequencies and value.frequencies != table.frequencies:
        raise Unknown("two tables of angles meet")
    index, place = torch.broadcast_tensors(x.index, c.index)
    if index.shape != x.index.shape or bool((index // value.buffer.width % length != place).any()):
        raise Unknown("a rotation's table belongs to other tokens than what it turns")
    term = Term(x.index, c.kind.expand_as(index), c.frequency.expand_as(index), x.scale * c.scale)
    return Layout(value.buffer, (term,), table.frequencies)


def summed(a: Layout, b: Layout) -> Layout:
    """a + b over one buffer, as two terms."""
    if a.buffer != b.buffer or len(a.terms) + len(b.terms) > 2 or a.frequencies != b.frequencies:
        raise Unknown("a sum of more than two turned values")
    if a.terms[0].index.shape != b.terms[0].index.shape:
        raise Unknown("a sum of turned values of different shapes")
    return Layout(a.buffer, (*a.terms, *b.terms), a.frequencies)


# --- read off ----------------------------------------------------------------------------------------------------------------


def features(layout: Layout, place: int = 0) -> torch.Tensor:
    """Index of each entry inside its row."""
    assert layout.buffer is not None
    return layout.terms[place].index % layout.buffer.width


def run(layout: Layout, what: str) -> int:
    """Where a value (…, n) starts that is n neighbouring floats of every token's row, tokens in order. Raises Unknown otherwise."""
    assert layout.buffer is not None
    index = layout.terms[0].index
    flat = index.reshape(-1, index.shape[-1])
    start = int(flat[0, 0])
    expected = torch.arange(flat.shape[0])[:, None] * layout.buffer.width + torch.arange(flat.shape[1]) + start
    if not layout.plain or not torch.equal(flat, expected):
        raise Unknown(f"{what} is no plain range of one value")
    return start


def heads(layout: Layout, batch: int, length: int) -> tuple[list[int], Heads]:
    """Starts of the heads of a value (batch, heads, length, width), one by one, and the distinct ones, evenly spaced, with their rotation.

    Raises Unknown where tokens or heads are not all alike.
    """
    assert layout.buffer is not None
    if layout.terms[0].index.dim() != 4:
        raise Unknown("attention over something that is not (batch, heads, tokens, width)")
    tokens = torch.arange(batch * length).view(batch, 1, length, 1)
    for term in layout.terms:
        if bool((term.index // layout.buffer.width != tokens).any()):
            raise Unknown("attention mixes the tokens of a value")
    found = [[features(layout, i), t.kind, t.frequency, t.scale] for i, t in enumerate(layout.terms)]
    for parts in found:
        if any(bool((part != part[:1, :, :1]).any()) for part in parts):
            raise Unknown("tokens are treated differently")
    table = [[part[0, :, 0] for part in parts] for parts in found]  # (heads, width)
    starts = torch.stack([features_ for features_, *_ in table]).amin((0, 2))
    for parts in table:
        parts[0] = parts[0] - starts[:, None]
        if any(bool((part != part[:1]).any()) for part in parts):
            raise Unknown("heads are rotated differently")
    distinct = list(dict.fromkeys(starts.tolist()))
    if distinct != [
        distinct[0] + i * (distinct[-1] - distinct[0]) // max(1, len(distinct) - 1) for i in range(len(distinct))
    ]:
        raise Unknown("heads are not evenly spaced")
    rotation = (
        None
        if layout.plain and table[0][0][0].tolist() == list(range(table[0][0].shape[1]))
        else rotation_of(layout, table)
    )
    return starts.tolist(), Heads(layout.buffer, tuple(distinct), rotation)


def rotation_of(layout: Layout, table: list[list[torch.Tensor]]) -> Rotation:
    """The rotation of one head. table: for each term (feature, kind, frequency, scale), each (heads, width)."""
    rows = [[part[0] for part in parts] for parts in table]
    if len(rows) == 1:
        rows.append([rows[0][0], torch.zeros_like(rows[0][1]), rows[0][2], torch.zeros_like(rows[0][3])])

    def factors(parts: list[torch.Tensor]) -> tuple[tuple[int, int, float], ...]:
        columns = (part.tolist() for part in parts[1:])
        return tuple(
            (kind, frequency if kind else 0, float(scale)) for kind, frequency, scale in zip(*columns, strict=True)
        )

    return Rotation(
        tuple(rows[0][0].tolist()),
        tuple(rows[1][0].tolist()),
        factors(rows[0]),
        factors(rows[1]),
        layout.frequencies or (0.0,),
    )


__all__ = [
    "COS", "JOINS", "SAME", "SIN", "VIEWS", "Layout", "Term", "Unknown", "base", "heads", "join", "move", "rows_of", "run", "scaled",
    "summed", "turned",
]  # fmt: skip
