"""Packed weights for GPU kernels: what is stored, exactly and reversibly. Runs on any device, in torch.

A `Stream` holds a weight as chunks of `width` values in one row. Chunks of `group` rows (8 or 16) advance together, so that
neighbouring threads read neighbouring memory and neighbouring columns of x:

    W (rows, cols) ──pack──▶ values (positions, group, width)   stored values; bf16, fp16, fp32 or int8
                             meta   (positions, group)          where they stand, see below
                             base   (positions,) int16          of which every chunk's first column is measured, in units of 16
                             start  (groups + 1,) int64         first position of each group of rows
                             order  (groups · group,) int32     the row of each lane; `rows` where there is none
                             scales (rows,) fp32                int8 values only

    format "gaps"      meta int32: 11 bits first column − 16 · base, then width − 1 gaps − 1 of 21 / (width − 1) bits
    format "two_four"  meta int16: two bits per value, its place in its four columns; 2 values per four, base unused

A gap that is too wide is bridged by a stored zero, a row is filled up to whole chunks by stored zeros on free columns, and
rows are sorted by their number of chunks, so that the rows of a group end together. Width 8 (gaps up to 8) costs 2.5 bytes
per nonzero in bf16, width 4 (gaps up to 128) 3 bytes; `pack` keeps the smaller. `gated` weights are [gate; up] of equally
many rows; lanes of a group then hold a gate row in the first half and its up row in the second.

There is no bitmap format. One bit per dense position and packed 16-bit values would take 1.13 bytes per dense weight at 50 %
where a stream takes 1.26 (0.93 against 1.03 at 60 %), but its decoding grows with the dense positions: 12 to 20 instructions per
dense weight in the kernels tried, where an H200's memory leaves 7.8 (6.4 at 60 %), against 5.3 (4.2) of the stream. See README.md.

A `Blocks` holds whole tiles: `values (tiles, height, width)`, `column (tiles,)` in tiles, `start (rows / height + 1,)`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify.kernels.cpu.formats import FormatError, check, quantize_int8

__all__ = ["Blocks", "FormatError", "Stream", "pack_blocks", "pack_stream", "pack_two_four", "quantize_int8"]

UNIT = 16
FIRST_BITS = 11
GAP_BITS = {8: 3, 4: 7}
VALUES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8"}
SLAB = 1 << 22  # entries that are packed at once
MAX_COLS = UNIT * (1 << 15)


@dataclass(frozen=True, eq=False)
class Stream:
    """A packed weight of shape (rows, cols); see the module docstring. `validate()` proves that kernels may read it.

    dtype: of the weight that was packed, and of what `unpack` returns.
    """

    rows: int
    cols: int
    format: Literal["gaps", "two_four"]
    values: Tensor
    meta: Tensor
    base: Tensor
    start: Tensor
    order: Tensor
    scales: Tensor | None = None
    gated: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def width(self) -> int:
        """Values per chunk."""
        return self.values.shape[2]

    @property
    def group(self) -> int:
        """Rows that advance together."""
        return self.values.shape[1]

    @property
    def groups(self) -> int:
        return self.start.numel() - 1

    @property
    def value(self) -> str:
        """Name of the value type in kernel specs: bf16, fp16, fp32 or int8."""
        return VALUES[self.values.dtype]

    @property
    def outputs(self) -> int:
        """Features of the product: rows, or half as many for gated weights."""
        return self.rows // 2 if self.gated else self.rows

    @property
    def tensors(self) -> list[Tensor]:
        """What an operator takes: values, meta, base, start, order and, for int8, scales."""
        found = [self.values, self.meta, self.base, self.start, self.order]
        return found if self.scales is None else [*found, self.scales]

    @property
    def nbytes(self) -> int:
        """Bytes that a product with few tokens must read."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def nnz(self) -> int:
        """Number of nonzero weights."""
        return int(torch.count_nonzero(self.values))

    def to(self, device: torch.device | str) -> Stream:
        moved = [t.to(device) for t in self.tensors]
        return rebuild_stream(self, moved)

    def columns(self) -> Tensor:
        """Column of every stored value, int64 (positions, group, width)."""
        meta, device = self.meta.long(), self.meta.device
        if self.format == "two_four":
            shifts = torch.arange(self.width, device=device) * 2
            position = torch.arange(self.values.shape[0], device=device) - self.start[self.owner()]
            four = position[:, None, None] * 2 * self.width + torch.arange(self.width, device=device) // 2 * 4
            return four + ((meta[..., None] >> shifts) & 3)
        bits = GAP_BITS[self.width]
        shifts = FIRST_BITS + bits * torch.arange(self.width - 1, device=device)
        first = (meta & ((1 << FIRST_BITS) - 1)) + UNIT * self.base.long()[:, None]
        steps = ((meta[..., None] >> shifts) & ((1 << bits) - 1)) + 1
        return torch.cat([first[..., None], first[..., None] + steps.cumsum(-1)], -1)

    def owner(self) -> Tensor:
        """The group of every position, int64."""
        counts = self.start.diff()
        return torch.repeat_interleave(torch.arange(self.groups, device=counts.device), counts)

    def unpack(self) -> Tensor:
        """The dense weight, (rows, cols) in `dtype`; bit-equal to what was packed (−0.0 comes back as 0.0)."""
        row = self.order.long().view(self.groups, self.group)[self.owner()][..., None].expand(self.values.shape)
        dense = self.values.new_zeros(self.rows, self.cols)
        kept = self.values != 0
        dense[row[kept], self.columns()[kept]] = self.values[kept]
        if self.scales is None:
            return dense.to(self.dtype)
        return (dense.float() * self.scales.view(-1, 1)).to(self.dtype)

    def validate(self) -> Stream:
        """Refuse data that a kernel could not read safely; returns self. Raises FormatError saying what is wrong."""
        check(self.format in ("gaps", "two_four"), f"unknown format {self.format!r}, known: gaps, two_four")
        check(self.rows > 0 and self.cols > 0, f"a weight needs rows and columns, got {self.rows} × {self.cols}")
        check(
            self.values.dim() == 3, f"values have shape {tuple(self.values.shape)}, expected (positions, group, width)"
        )
        check(self.values.dtype in VALUES, f"values are {self.values.dtype}, expected one of {list(VALUES)}")
        check(self.group in (8, 16), f"groups of {self.group} rows, expected 8 or 16")
        check(self.width in GAP_BITS, f"chunks of {self.width} values, expected 8 or 4")
        check(not self.gated or self.rows % 2 == 0, f"a gated weight has gate and up rows, got {self.rows} rows")
        positions, lanes = self.values.shape[0], -(-self.outputs // self.lanes) * self.group
        meta = torch.int32 if self.format == "gaps" else torch.int16
        bases = positions if self.format == "gaps" else 0
        for name, shape, dtype in (
            ("meta", (positions, self.group), meta),
            ("base", (bases,), torch.int16),
            ("start", (lanes // self.group + 1,), torch.int64),
            ("order", (lanes,), torch.int32),
        ):
            tensor = getattr(self, name)
            check(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
            check(tensor.dtype == dtype, f"{name} is {tensor.dtype}, expected {dtype}")
        for name, tensor in zip(("values", "meta", "base", "start", "order", "scales"), self.tensors, strict=False):
            check(tensor.is_contiguous(), f"{name} is not contiguous")
            check(tensor.device == self.values.device, f"{name} is on {tensor.device}, values on {self.values.device}")
        counts = self.start.diff()
        check(int(self.start[0]) == 0 and bool((counts >= 0).all()), "start does not rise from 0")
        check(int(self.start[-1]) == positions, f"start ends at {int(self.start[-1])}, there are {positions} positions")
        self.check_order()
        if self.format == "two_four":
            expected = self.cols // (2 * self.width)
            check(self.cols % (2 * self.width) == 0, f"{self.cols} columns are not whole chunks of {2 * self.width}")
            check(bool((counts == expected).all()), f"2:4 rows need {expected} positions each")
        columns = self.columns()
        inside = bool((columns >= 0).all()) and bool((columns < self.cols).all())
        check(inside, f"a stored value lies outside of columns 0 to {self.cols - 1}")
        if self.value != "int8":
            check(self.scales is None, "scales belong to int8 values")
            check(bool(torch.isfinite(self.values).all()), "a weight is NaN or Inf")
        else:
            check(self.scales is not None and self.scales.dtype == torch.float32, "int8 values need float32 scales")
            assert self.scales is not None
            check(tuple(self.scales.shape) == (self.rows,), f"scales have shape {tuple(self.scales.shape)}")
            check(bool(torch.isfinite(self.scales).all()), "a scale is NaN or Inf")
        self.check_unique(columns)
        return self

    @property
    def lanes(self) -> int:
        """Output features per group."""
        return self.group // 2 if self.gated else self.group

    def check_order(self) -> None:
        order = self.order.long()
        check(bool((order >= 0).all()) and bool((order <= self.rows).all()), f"order names a row beyond {self.rows}")
        seen = torch.bincount(order, minlength=self.rows + 1)[: self.rows]
        check(bool((seen == 1).all()), "order is not a permutation of the rows")
        if self.gated:
            pairs = order.view(-1, 2, self.lanes)
            real = pairs[:, 0] < self.rows
            paired = torch.where(real, pairs[:, 0] + self.outputs, self.rows)
            check(bool((pairs[:, 1] == paired).all()), "gate and up rows are not paired")

    def check_unique(self, columns: Tensor) -> None:
        """No entry is stored twice: a product would add it twice."""
        row = self.order.long().view(self.groups, self.group)[self.owner()][..., None]
        kept = self.values != 0
        check(not bool((kept & (row >= self.rows)).any()), "a value is stored for a row that does not exist")
        where = (row * self.cols + columns)[kept]
        check(where.unique().numel() == where.numel(), "an entry is stored twice")


def check_scales(scales: Tensor | None, rows: int) -> None:
    """Refuse anything but one finite fp32 scale per row."""
    good = scales is not None and tuple(scales.shape) == (rows,) and scales.dtype == torch.float32
    check(good, f"int8 values need {rows} float32 scales")
    check(scales is not None and bool(torch.isfinite(scales).all()), "a scale is NaN or Inf")


def rebuild_stream(like: Stream, tensors: list[Tensor]) -> Stream:
    """The same description over other tensors, in the order of `Stream.tensors`."""
    values, meta, base, start, order, *scales = tensors
    fields = (like.rows, like.cols, like.format, values, meta, base, start, order)
    return Stream(*fields, scales[0] if scales else None, like.gated, like.dtype)


# --- packing ------------------------------------------------------------------------------------------------------------


def kept_positions(nonzero: Tensor, width: int) -> Tensor:
    """Which entries of `nonzero (n, m)` are stored: all of them, plus zeros that bridge gaps and fill chunks.

    In every row of the result gaps are at most `2 ** GAP_BITS[width]`, and the count is a multiple of `width` or the row full.
    """
    n, m = nonzero.shape
    reach = 1 << GAP_BITS[width]
    place = torch.arange(m, device=nonzero.device, dtype=torch.int32).expand(n, m)
    last = torch.where(nonzero, place, -1).cummax(1).values
    end = last[:, -1:]
    distance = place - last
    kept = nonzero | ((last >= 0) & (place < end) & (distance > 0) & (distance % reach == 0))
    missing = (-kept.sum(1, keepdim=True)) % width
    after = ~kept & (last >= 0)
    kept |= after & (after.cumsum(1) <= missing)
    missing = (-kept.sum(1, keepdim=True)) % width
    before = ~kept & (last < 0) & (end >= 0)
    return kept | (before & (before.flip(1).cumsum(1).flip(1) <= missing))


@dataclass(frozen=True)
class Chunks:
    """Chunks of some rows in order of row, column. counts (rows,); columns and values (chunks, width)."""

    counts: Tensor
    columns: Tensor
    values: Tensor


def chunk_rows(weight: Tensor, width: int, offset: int) -> Chunks:
    kept, cols = kept_positions(weight != 0, width), weight.shape[1]
    missing = (-kept.sum(1, keepdim=True)) % width
    if not bool(missing.any()):
        columns = kept.nonzero()[:, 1].view(-1, width)
        return Chunks(kept.sum(1) // width, columns + offset, weight[kept].view(-1, width))
    # full rows: the last chunk first runs over the edge, then moves back onto columns that are stored already, as zeros
    beyond = torch.arange(width - 1, device=weight.device) < missing
    kept = torch.cat([kept, beyond], 1)
    columns = kept.nonzero()[:, 1].view(-1, width)
    values = torch.cat([weight, weight.new_zeros(beyond.shape)], 1)[kept].view(-1, width)
    over = (columns[:, -1:] - cols + 1).clamp_min(0)
    place = torch.arange(width, device=weight.device)
    values = values.gather(1, (place - over) % width)
    return Chunks(kept.sum(1) // width, columns - over + offset, values)


def lane_order(counts: Tensor, group: int, gated: bool) -> Tensor:
    """The row of each lane, int64 (groups · group,): rows of similar length share a group, `rows` fills the last."""
    rows = counts.numel()
    units = counts if not gated else torch.maximum(*counts.view(2, -1))
    sorted_units = units.sort(descending=True, stable=True).indices
    lanes = group // 2 if gated else group
    padding = sorted_units.new_full((-units.numel() % lanes,), -1)
    units_by_group = torch.cat([sorted_units, padding]).view(-1, lanes)
    first = torch.where(units_by_group < 0, rows, units_by_group)
    if not gated:
        return first.flatten()
    second = torch.where(units_by_group < 0, rows, units_by_group + rows // 2)
    return torch.cat([first, second], 1).flatten()


def windows_of(cols: int, count: int) -> list[tuple[int, int]]:
    """`count` ranges of nearly equal width that cover all columns."""
    edges = [cols * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def pack_stream(
    weight: Tensor,
    scales: Tensor | None = None,
    *,
    width: int | None = None,
    group: int | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> Stream:
    """Pack a weight (rows, cols) in format "gaps"; bf16, fp16, fp32, or int8 with `scales (rows,)`.

    width: values per chunk, 8 or 4; None keeps what takes fewer bytes (fp32 always 4, one 16-byte load).
    group: rows that advance together; None: 16, and 8 for weights too small to fill a large GPU with groups of 16.
    dtype: what `unpack` returns; the weight's own, float32 for int8.
    Raises FormatError for fewer than 8 columns, NaN, Inf, and other dtypes.
    """
    check_weight(weight, scales, gated)
    group = group or (16 if weight.shape[0] >= 4096 else 8)
    widths = [width] if width else [4] if weight.dtype == torch.float32 else [8, 4]
    dtype = dtype or (torch.float32 if weight.dtype == torch.int8 else weight.dtype)
    found = [assemble(weight.detach(), scales, w, group, gated, dtype) for w in widths]
    return min(found, key=lambda stream: stream.nbytes)


def check_weight(weight: Tensor, scales: Tensor | None, gated: bool) -> None:
    check(weight.dim() == 2, f"a weight has two axes, got shape {tuple(weight.shape)}")
    rows, cols = weight.shape
    check(weight.dtype in VALUES, f"cannot pack {weight.dtype}")
    check(rows > 0 and 8 <= cols <= MAX_COLS, f"a stream needs rows and 8 to {MAX_COLS} columns, got {rows} × {cols}")
    check(not gated or rows % 2 == 0, f"gated weights need as many gate as up rows, got {rows} rows")
    if weight.dtype == torch.int8:
        check(scales is not None and tuple(scales.shape) == (rows,), f"int8 weights need {rows} scales")
        check(not bool((weight == -128).any()), "int8 weights are symmetric: -127 to 127")
    else:
        check(scales is None, "scales belong to int8 weights")
        check(bool(torch.isfinite(weight).all()), "a weight is NaN or Inf")


def assemble(weight: Tensor, scales: Tensor | None, width: int, group: int, gated: bool, dtype: torch.dtype) -> Stream:
    rows, cols = weight.shape
    count = 1
    while True:
        windows = [chunk_slabs(weight[:, a:b], width, a) for a, b in windows_of(cols, count)]
        order = lane_order(sum((w.counts for w in windows), torch.zeros_like(windows[0].counts)), group, gated)
        placed = place_chunks(windows, order, rows, group, width)
        if placed is not None:
            break
        count *= 2
    values, meta, base, start = placed
    kept_scales = None if scales is None else scales.float().contiguous()
    return Stream(rows, cols, "gaps", values, meta, base, start, order.int(), kept_scales, gated, dtype)


def chunk_slabs(weight: Tensor, width: int, offset: int) -> Chunks:
    """`chunk_rows` in pieces, so that the index tensors of a large layer are never alive at once."""
    step = max(1, SLAB // max(1, weight.shape[1]))
    parts = [chunk_rows(piece, width, offset) for piece in weight.split(step)]
    return Chunks(*(torch.cat([getattr(p, name) for p in parts]) for name in ("counts", "columns", "values")))


def place_chunks(
    windows: list[Chunks], order: Tensor, rows: int, group: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Lay chunks out as (values, meta, base, start); None when some first column is too far from its position's base."""
    device = order.device
    lane_of = torch.empty(rows + 1, dtype=torch.int64, device=device)
    lane_of[order] = torch.arange(order.numel(), device=device)
    heights = []
    for chunks in windows:
        counts = torch.cat([chunks.counts, chunks.counts.new_zeros(1)])[order].view(-1, group)
        heights.append(counts.amax(1))
    tall = torch.stack(heights, 1)
    before = torch.zeros(tall.numel() + 1, dtype=torch.int64, device=device)
    torch.cumsum(tall.flatten(), 0, out=before[1:])
    positions = int(before[-1])
    values = windows[0].values.new_zeros(positions, group, width)
    columns = torch.zeros(positions, group, width, dtype=torch.int64, device=device)
    lowest = torch.full((positions,), MAX_COLS, dtype=torch.int64, device=device)
    filled = torch.zeros(positions, group, dtype=torch.bool, device=device)
    for number, chunks in enumerate(windows):
        row = torch.repeat_interleave(torch.arange(rows, device=device), chunks.counts)
        rank = torch.arange(row.numel(), device=device) - (chunks.counts.cumsum(0) - chunks.counts)[row]
        lane = lane_of[row]
        position = before[lane // group * len(windows) + number] + rank
        values[position, lane % group] = chunks.values
        columns[position, lane % group] = chunks.columns
        filled[position, lane % group] = True
        lowest.scatter_reduce_(0, position, chunks.columns[:, 0], "amin")
    base = lowest // UNIT
    first = torch.where(filled, columns[..., 0] - UNIT * base[:, None], 0)
    if positions and int(first.max()) >= 1 << FIRST_BITS:
        return None
    bits = GAP_BITS[width]
    shifts = FIRST_BITS + bits * torch.arange(width - 1, device=device)
    gaps = torch.where(filled[..., None], columns.diff(dim=-1) - 1, 0)
    meta = (first + (gaps << shifts).sum(-1)).to(torch.int64)
    start = before[:: len(windows)].contiguous()
    return values, meta.to(torch.int32), base.to(torch.int16), start


def pack_two_four(
    weight: Tensor,
    scales: Tensor | None = None,
    *,
    group: int | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> Stream:
    """Pack a weight with at most two nonzeros in every four columns; FormatError when there is a third.

    fp32 values take chunks of 4, the others of 8; columns must be whole chunks (8 or 16 columns).
    """
    check_weight(weight, scales, gated)
    rows, cols = weight.shape
    width = 4 if weight.dtype == torch.float32 else 8
    check(cols % (2 * width) == 0, f"2:4 needs a multiple of {2 * width} columns, got {cols}")
    group = group or (16 if rows >= 4096 else 8)
    fours = weight.detach().reshape(rows, cols // 4, 4)
    nonzero = fours != 0
    crowded = (nonzero.sum(-1) > 2).nonzero()
    if crowded.numel():
        row, four = crowded[0].tolist()
        raise FormatError(f"row {row} has more than two nonzeros in columns {4 * four} to {4 * four + 3}; not 2:4")
    rank = torch.where(nonzero, 4, 0) - torch.arange(4, device=weight.device, dtype=torch.int8)
    places = rank.topk(2, dim=-1).indices.sort(-1).values
    stored = fours.gather(-1, places).view(rows, -1, width)
    shifts = torch.arange(width, device=weight.device) * 2
    meta = (places.reshape(rows, -1, width) << shifts).sum(-1)
    order = lane_order(torch.zeros(rows, dtype=torch.int64, device=weight.device), group, gated)
    padded = torch.cat([stored, stored.new_zeros(1, *stored.shape[1:])])[order]
    metas = torch.cat([meta, meta.new_zeros(1, meta.shape[1])])[order]
    groups, chunks = order.numel() // group, stored.shape[1]
    values = padded.view(groups, group, chunks, width).transpose(1, 2).reshape(-1, group, width).contiguous()
    metas = metas.view(groups, group, chunks).transpose(1, 2).reshape(-1, group).contiguous()
    start = torch.arange(groups + 1, device=weight.device) * chunks
    dtype = dtype or (torch.float32 if weight.dtype == torch.int8 else weight.dtype)
    base = torch.empty(0, dtype=torch.int16, device=weight.device)
    kept_scales = None if scales is None else scales.float().contiguous()
    packed = (metas + (1 << 15)) % (1 << 16) - (1 << 15)  # the same 16 bits, signed
    fields = (values, packed.to(torch.int16), base, start, order.int(), kept_scales, gated, dtype)
    return Stream(rows, cols, "two_four", *fields)


# --- blocks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Blocks:
    """Whole tiles of a weight (rows, cols), row of tiles by row of tiles.

    values (tiles, height, width); column (tiles,) int32, in tiles; start (rows / height + 1,) int64; scales (rows,) fp32.
    """

    rows: int
    cols: int
    values: Tensor
    column: Tensor
    start: Tensor
    scales: Tensor | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def height(self) -> int:
        return self.values.shape[1]

    @property
    def width(self) -> int:
        return self.values.shape[2]

    @property
    def value(self) -> str:
        return VALUES[self.values.dtype]

    @property
    def outputs(self) -> int:
        return self.rows

    @property
    def tensors(self) -> list[Tensor]:
        """What an operator takes: values, column, start and, for int8, scales."""
        found = [self.values, self.column, self.start]
        return found if self.scales is None else [*found, self.scales]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def unpack(self) -> Tensor:
        """The dense weight, (rows, cols) in `dtype`; bit-equal to what was packed."""
        tall, wide = self.rows // self.height, self.cols // self.width
        tiles = self.values.new_zeros(tall, wide, self.height, self.width)
        row = torch.repeat_interleave(torch.arange(tall, device=self.start.device), self.start.diff())
        tiles[row, self.column.long()] = self.values
        dense = tiles.transpose(1, 2).reshape(self.rows, self.cols)
        return (dense if self.scales is None else dense.float() * self.scales.view(-1, 1)).to(self.dtype)

    def validate(self) -> Blocks:
        """Refuse data that a kernel could not read safely; returns self. Raises FormatError saying what is wrong."""
        check(self.values.dim() == 3, f"values have shape {tuple(self.values.shape)}, expected (tiles, height, width)")
        check(self.values.dtype in VALUES, f"values are {self.values.dtype}, expected one of {list(VALUES)}")
        sides = (16, 32, 64)
        check(
            self.height in sides and self.width in sides,
            f"tiles of {self.height} × {self.width}, expected sides of {sides}",
        )
        fits = self.rows > 0 and self.cols > 0 and self.rows % self.height == 0 and self.cols % self.width == 0
        check(fits, f"tiles of {self.height} × {self.width} do not fill {self.rows} × {self.cols}")
        tiles, tall = self.values.shape[0], self.rows // self.height
        check(tuple(self.column.shape) == (tiles,), f"column has shape {tuple(self.column.shape)}, expected {(tiles,)}")
        check(self.column.dtype == torch.int32, f"column is {self.column.dtype}, expected torch.int32")
        check(self.start.dtype == torch.int64, f"start is {self.start.dtype}, expected torch.int64")
        check(
            tuple(self.start.shape) == (tall + 1,), f"start has shape {tuple(self.start.shape)}, expected {(tall + 1,)}"
        )
        check(all(t.is_contiguous() for t in self.tensors), "a tensor is not contiguous")
        check(len({t.device for t in self.tensors}) == 1, "the tensors are on different devices")
        counts = self.start.diff()
        check(int(self.start[0]) == 0 and bool((counts >= 0).all()), "start does not rise from 0")
        check(int(self.start[-1]) == tiles, f"start ends at {int(self.start[-1])}, there are {tiles} tiles")
        wide = self.cols // self.width
        inside = bool((self.column >= 0).all()) and bool((self.column < wide).all())
        check(inside, f"a tile lies outside of the {wide} tile columns")
        row = torch.repeat_interleave(torch.arange(tall, device=self.start.device), counts)
        where = row * wide + self.column
        check(where.unique().numel() == tiles, "a tile is stored twice")
        if self.value == "int8":
            check_scales(self.scales, self.rows)
        else:
            check(self.scales is None, "scales belong to int8 values")
            check(bool(torch.isfinite(self.values).all()), "a weight is NaN or Inf")
        return self


def pack_blocks(
    weight: Tensor, height: int, width: int, scales: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Blocks:
    """Keep the tiles that hold a nonzero. height, width: powers of two from 16 to 64 that tile the weight."""
    check_weight(weight, scales, False)
    rows, cols = weight.shape
    for name, side in (("height", height), ("width", width)):
        check(side in (16, 32, 64), f"tile {name} {side} is not 16, 32 or 64")
    check(rows % height == 0 and cols % width == 0, f"tiles of {height} × {width} do not fill {rows} × {cols}")
    tiles = weight.detach().reshape(rows // height, height, cols // width, width).transpose(1, 2)
    kept = (tiles != 0).flatten(2).any(-1)
    start = torch.zeros(rows // height + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(kept.sum(1), 0, out=start[1:])
    column = kept.nonzero()[:, 1].to(torch.int32)
    dtype = dtype or (torch.float32 if weight.dtype == torch.int8 else weight.dtype)
    kept_scales = None if scales is None else scales.float().contiguous()
    return Blocks(rows, cols, tiles[kept].contiguous(), column, start, kept_scales, dtype)
