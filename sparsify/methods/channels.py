"""Whole channels of a weight that train: S2FT (arXiv 2412.06289) and PaCA (arXiv 2503.01905).

%y = aten.linear(%x, @down_proj.weight)
──▶
%y = sparsify.partial_linear(%x, @down_proj.weight, None, @down_proj.weight_slice, start, axis)          contiguous
%y = sparsify.partial_linear_at(%x, …, @q_proj.weight_slice, @q_proj.slice_channels, axis)               gathered
%y = sparsify.partial_grouped_linear(%x, @experts.down_proj.weight, @….weight_slice, None, start, axis, %offsets)
                                                    the same channels of every expert, weights (experts, out, in)

    TrainedSlice    in the program        PartialMixin    the module        SlicePart    beside the module
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from sparsify.adapters.adapter import Delta
from sparsify.errors import VerifyError
from sparsify.methods.part import LivePart, TrainedPart, beside, leaf_of, master_dtype
from sparsify.modules.adapted import AdaptedMixin, as_parameter, become_part, carries, take_leaves
from sparsify.modules.exact import change_of, changed, correction_of
from sparsify.modules.layout import Layout, bytes_of
from sparsify.ops.bits import pack_bits
from sparsify.ops.partial_linear import write_block, write_block_at
from sparsify.ops.schema import argument
from sparsify.program import LinearNode, Program, UnitChoice
from sparsify.program.graph_editor import GraphEditor
from sparsify.program.permutation import invert_index
from sparsify.program.printer import range_text, slice_text, tensor_text
from sparsify.program.repeats import Line
from sparsify.program.selection import unit_channels
from sparsify.program.structure import Site, Structure

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped, UInt8
    from torch.fx.node import Argument

ops = torch.ops.sparsify
Slice = TypeVar("Slice", bound="TrainedSlice")


# --- the module --------------------------------------------------------------------------------------------------------------


class PartialMixin(AdaptedMixin):
    """A linear with trained channels: a contiguous block at `slice_start`, or those at `slice_channels (s,)`.

    slice_axis: 1 for input columns, `weight_slice (out, s)`; 0 for output rows, `(s, in)`. Of packed experts all of it has a leading
    axis, the experts, and the forward takes the ends of the groups of rows too.
    """

    weight_slice: nn.Parameter
    slice_channels: Tensor
    slice_start: int
    slice_axis: int
    trained_leaves = ("weight_slice",)
    part_buffers = ("slice_channels", "slice_mask_bits")
    placing_buffers = ("slice_channels", "slice_mask_bits")
    part_settings = ("slice_start", "slice_axis")
    entries_of_weight = ("weight_slice",)
    follows_from_weight = True

    def trained_block(self) -> Float[Tensor, "*experts i j"]:
        """The trained channels; over a pruned base the pruned entries stay zero and get no gradient."""
        bits = getattr(self, "slice_mask_bits", None)
        return self.weight_slice if bits is None else ops.apply_mask(self.weight_slice, bits)

    def trained_masks(self) -> dict[str, UInt8[Tensor, " bytes"]]:
        bits = getattr(self, "slice_mask_bits", None)
        return {} if bits is None else {"weight_slice": bits}

    def forward(
        self, x: Float[Tensor, "*t m"], offsets: Int[Tensor, " experts"] | None = None
    ) -> Float[Tensor, "*t n"]:
        weight, block = self.logical(self.weight), self.trained_block()
        if offsets is not None:
            start, index = self.slice_start, self.slice_channels if self.slice_start < 0 else None
            x = x.to(weight.dtype)
            return ops.partial_grouped_linear(x, weight, block, index, max(start, 0), self.slice_axis, offsets)
        self.check_dtype(x)
        if self.slice_start < 0:
            return ops.partial_linear_at(x, weight, self.bias, block, self.slice_channels, self.slice_axis)
        return ops.partial_linear(x, weight, self.bias, block, self.slice_start, self.slice_axis)

    def folded(self, weight: Float[Tensor, "*experts p q"]) -> Float[Tensor, "*experts p q"]:
        logical, block = self.logical(weight), self.trained_block().detach()
        if self.slice_start < 0:
            write_block_at(logical, block, self.slice_channels, self.stored_axis)
        else:
            write_block(logical, block, self.slice_start, self.stored_axis)
        return weight

    @property
    def stored_axis(self) -> int:
        """Axis of the channels in a logical weight, behind the experts if there are any."""
        return self.slice_axis + len(self.stored_shape()) - 2

    def part_digest(self) -> bytes:
        placed = [self._buffers.get(name) for name in self.placing_buffers]
        found = b"".join(bytes_of(t) for t in placed if t is not None and not t.is_meta)
        return f"{self.slice_start} {self.slice_axis}".encode() + found

    def region(self, stored: Float[Tensor, "*experts p q"]) -> Float[Tensor, "*experts i j"]:
        """The trained channels in a tensor laid out like the stored weight; logical `(out, in)` layout."""
        logical = self.logical(stored)
        if self.slice_start < 0:
            return logical.index_select(self.stored_axis, self.slice_channels.to(stored.device))
        return logical.narrow(self.stored_axis, self.slice_start, self.weight_slice.shape[self.stored_axis])

    def clear_trained(self, stored: Float[Tensor, "*experts p q"]) -> None:
        logical = self.logical(stored)
        if self.slice_start < 0:
            logical.index_fill_(self.stored_axis, self.slice_channels.to(stored.device), 0)
        else:
            logical.narrow(self.stored_axis, self.slice_start, self.weight_slice.shape[self.stored_axis]).zero_()

    def read_from(self, stored: Float[Tensor, "*experts p q"]) -> dict[str, Float[Tensor, "*experts i j"]]:
        if self.slice_start < 0 and self.slice_channels.is_meta:
            return {}  # which channels they are is not known yet
        return {"weight_slice": self.region(stored)}

    def extra_repr(self) -> str:
        return f"{self.described()}, {describe_slice(self)}"


def describe_slice(module: PartialMixin) -> str:
    side = "columns" if module.slice_axis == 1 else "rows"
    size = module.weight_slice.shape[module.stored_axis]
    start = module.slice_start
    return f"trained {side}=[{start}:{start + size}]" if start >= 0 else f"trained {side}={size} scattered"


class PartialLinear(PartialMixin, nn.Linear):
    """`nn.Linear` with trained input columns (S2FT Down and O, PaCA) or output rows (S2FT Up and V)."""

    # as `nn.Linear` calls it, whose input a host may name; the mixin says `x`, as Conv1D does, and serves experts too
    def forward(self, input: Float[Tensor, "*t m"]) -> Float[Tensor, "*t n"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input)


carries("Partial", PartialMixin, PartialLinear)


# --- in the program ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedSlice(TrainedPart):
    """Whole channels of one weight that train: positions [start, start + length) on `axis`, or scattered ones.

    channels: the same channels in *original* coordinates, in the order in which they stand in the block.
    axis: of the stored tensor. side: "column" when the block lies on the linear's input axis, "row" on its output axis.
    places: positions of scattered channels (PaCA on an input that no structure can reorder); empty when contiguous.
    structure: the structure that owns the channels, or "". lead: 1 for packed experts, whose axis lies before the two others.
    """

    param: str
    axis: int
    start: int
    length: int
    side: Literal["column", "row"]
    channels: tuple[int, ...]
    structure: str = ""
    places: tuple[int, ...] = ()
    rule: int = 0
    lead: int = 0

    module_kind = "Partial"
    mixin = PartialMixin
    operators = {  # noqa: RUF012  (a class attribute of a frozen dataclass)
        ops.partial_linear.default: "reference: block copied into the weight, one GEMM",
        ops.partial_linear_at.default: "reference: channels copied into the weight, one GEMM",
        ops.partial_grouped_linear.default: "reference: block copied into the experts' weights, one GEMM per expert",
    }

    @property
    def logical_axis(self) -> int:
        """Axis in the logical `(out, in)` weight: 1 for columns, 0 for rows."""
        return 1 if self.side == "column" else 0

    @property
    def transposed(self) -> bool:
        """Whether the stored weight is `(in, out)`."""
        return self.axis - self.lead != self.logical_axis

    @property
    def all_places(self) -> tuple[int, ...]:
        return self.places or tuple(range(self.start, self.start + self.length))

    @property
    def block_name(self) -> str:
        """Qualified name of the trained parameter in the host."""
        return beside(self.param, "weight_slice")

    def read(self, stored: Shaped[Tensor, "*experts p q"]) -> Shaped[Tensor, "*experts i j"]:
        """The channels of a tensor laid out like the stored weight, in logical layout; a view when contiguous."""
        if self.places:
            region = stored.index_select(self.axis, torch.tensor(self.places, device=stored.device))
        else:
            region = stored.narrow(self.axis, self.start, self.length)
        return region.mT if self.transposed else region

    def write(self, stored: Float[Tensor, "*experts p q"], block: Float[Tensor, "*experts i j"]) -> None:
        """Put a block in logical layout into its channels of `stored`."""
        block = (block.mT if self.transposed else block).to(stored.dtype)
        if self.places:
            stored.index_copy_(self.axis, torch.tensor(self.places, device=stored.device), block)
        else:
            stored.narrow(self.axis, self.start, self.length).copy_(block)

    @property
    def spans(self) -> str:
        """Positions of the channels as ranges: `0:12`, or `8:16, 40:48` where they lie scattered."""
        if not self.places:
            return f"{self.start}:{self.start + self.length}"
        found: list[list[int]] = []
        for place in self.places:
            if found and found[-1][1] == place:
                found[-1][1] += 1
            else:
                found.append([place, place + 1])
        shown = [f"{a}:{b}" if b > a + 1 else str(a) for a, b in found[:6]]
        return ", ".join(shown) + (f", … {len(found) - 6} more" if len(found) > 6 else "")

    # --- into the graph

    def initial(
        self, weight: Callable[[], Float[Tensor, "*experts p q"]], program: Program, seed: int
    ) -> dict[str, Tensor]:
        """The block, contiguous, in fp32 over a 16-bit weight; logical layout (columns `(n, s)`, rows `(s, m)`)."""
        stored = weight().detach()
        block = (
            self.read(stored).to(master_dtype(stored), copy=True, memory_format=torch.contiguous_format).contiguous()
        )
        found = {self.block_name: block}
        if self.places or self.param in program.quantize:
            found[beside(self.param, "slice_channels")] = torch.tensor(self.all_places)
        if self.param in program.masks:
            kept = self.read(program.masks[self.param]).contiguous()
            found[beside(self.param, "slice_mask_bits")] = pack_bits(kept.to(block.device))
        return found

    def block(self, editor: GraphEditor, linear: LinearNode) -> fx.Node | None:
        """The trained block; over a pruned base its pruned entries are held at zero."""
        block, bits = editor.beside(self.param, "weight_slice"), editor.beside(self.param, "slice_mask_bits")
        if bits is None or block is None:
            return block
        return editor.call(ops.apply_mask.default, linear.node, block, t=block, bits=bits)

    def insert(self, editor: GraphEditor, linear: LinearNode) -> None:
        read = editor.read(linear)
        weight = read.weight
        block = self.block(editor, linear)
        if linear.offsets is not None:
            if linear.transposed:
                turned = {"self": weight, "dim0": 1, "dim1": 2}
                weight = editor.call(torch.ops.aten.transpose.int, linear.node, **turned)
            index = editor.beside(self.param, "slice_channels") if self.places else None
            given = {"x": read.x, "weight": weight, "block": block, "index": index, "start": max(self.start, 0)}
            given |= {"axis": self.logical_axis, "offsets": linear.offsets}
            editor.replace(linear.node, ops.partial_grouped_linear.default, **given)
            return
        if linear.transposed:
            weight = editor.call(torch.ops.aten.t.default, linear.node, self=weight)
        given = {"x": read.x, "weight": weight, "bias": read.bias, "block": block, "axis": self.logical_axis}
        if self.places:
            index = editor.beside(self.param, "slice_channels")
            editor.replace(linear.node, ops.partial_linear_at.default, index=index, **given)
        else:
            editor.replace(linear.node, ops.partial_linear.default, start=self.start, **given)

    def packed_arguments(self, editor: GraphEditor, linear: LinearNode) -> dict[str, Argument]:
        block = self.block(editor, linear)
        channels = editor.beside(self.param, "slice_channels")
        return {"block": block, "channels": channels, "axis": self.logical_axis}

    # --- the grammar

    def check(self, program: Program, read: set[str]) -> None:
        if self.block_name not in read:
            raise VerifyError(f"{self.param}: the trained slice is read by no sparsify operator")
        block = program.tensor(self.block_name)
        if block.shape[self.logical_axis + self.lead] != self.length or not block.is_contiguous():
            raise VerifyError(
                f"{self.param}: the trained block is {tuple(block.shape)}, expected {self.length} channels"
            )

    def check_node(self, node: fx.Node) -> None:
        wanted: dict[str, int] = {"axis": self.logical_axis}
        if node.target is ops.partial_linear.default or (self.lead and not self.places):
            wanted["start"] = self.start
        for name, value in wanted.items():
            if argument(node, name) != value:
                raise VerifyError(f"node {node.name}: {name} is {argument(node, name)}, of {self.param} it is {value}")

    # --- for people

    def text(self) -> str:
        side = "input" if self.side == "column" else "output"
        side += " channels of every expert" if self.lead else " channels"
        return Line.about(self.param, f"trains {self.length} {side} [", range_text(self), "]")

    def row(self) -> str | None:
        return None  # its choice has one

    def note(self) -> tuple[str, str]:
        return self.block_name, self.text()

    def mark(self) -> str:
        return ""  # the channels themselves are drawn

    @classmethod
    def section(
        cls, parts: Sequence[TrainedPart], program: Program, ids: Callable[[Sequence[int]], str]
    ) -> tuple[str, list[str]]:
        lines, total = [], 0
        for part in parts:
            assert isinstance(part, TrainedSlice)
            tensor, block = program.tensor(part.param), program.tensor(part.block_name)
            total += block.numel()
            place = range_text(part)
            before, after = f"@{slice_text(part, tensor.dim())}".rsplit(place, 1)
            kind = f"{after} {tensor_text(block)} {part.side} block, channels "
            lines.append(Line.about(part.param, before, place, kind, ids(part.channels)))
        count = f"{len(lines)} slice{'s' if len(lines) != 1 else ''}"
        return f"trained: {count}, {total:,} parameters", lines

    @classmethod
    def counted(cls, count: int) -> str:
        return f"{count} trained slices"

    def saved_bytes(self, x: Float[Tensor, "*t m"]) -> int | None:
        """A copy of its columns; rows need all of x."""
        if self.side == "row":
            return None
        return x.numel() * x.element_size() // x.shape[-1] * self.length

    # --- into the host

    def attach(self, module: AdaptedMixin, tensors: Mapping[str, Tensor]) -> None:
        """`weight_slice`, and over a pruned base `slice_mask_bits`."""
        assert isinstance(module, PartialMixin)
        block, bits = tensors["weight_slice"], tensors.get("slice_mask_bits")
        module.weight_slice = as_parameter(block)
        module.slice_start = self.start
        module.slice_axis = self.logical_axis
        if self.places or hasattr(module, "packed_names"):
            places = torch.tensor(self.all_places, device=block.device)
            module.register_buffer("slice_channels", places, persistent=False)
        if bits is not None:
            module.register_buffer("slice_mask_bits", bits, persistent=False)

    def live(self, module: AdaptedMixin, layout: Layout, seed: int) -> SlicePart:
        assert isinstance(module, PartialMixin)
        return SlicePart(self, module, layout, self.read(module.dense()).clone())


def slices_of(program: Program, structure: Structure, choice: UnitChoice) -> list[TrainedSlice]:
    """Where the chosen units of a structure ended up in each weight that trains."""
    found = []
    lies = bool(choice.in_place)
    for site in structure.consumers if choice.consumers else ():
        channels = channels_of(structure, site, choice.consumers)
        place = (structure.name, choice.rule, not lies, lies)
        found.append(slice_at(program, site.param, site.axis, channels, "column", *place))
    if choice.producers:
        outer = Structure(structure.name, structure.kind, structure.units, structure.sites)
        for site in structure.with_role("v", "up"):
            channels = channels_of(outer, site, choice.producers)
            place = (structure.name, choice.rule, neighbours(site) and not lies, lies)
            found.append(slice_at(program, site.param, site.axis, channels, "row", *place))
    return found


def neighbours(site: Site) -> bool:
    """Whether neighbouring units lie side by side: not in a projection that interleaves q, k and v (GPT-NeoX)."""
    return site.step == site.block and not site.outer


def channels_of(structure: Structure, site: Site, units: tuple[int, ...]) -> Int[Tensor, " s"]:
    return unit_channels(site, structure)[torch.tensor(units)].reshape(-1)


def slice_at(
    program: Program,
    param: str,
    axis: int,
    original: Int[Tensor, " s"],
    side: Literal["column", "row"],
    structure: str = "",
    rule: int = 0,
    together: bool = True,
    gathered: bool = False,
    kind: type[Slice] = TrainedSlice,
) -> Slice:
    """Where channels given in original coordinates lie now: a contiguous range, or scattered places.

    together: the permutation must have brought a structure's channels together. gathered: units that train in place, by their places
    also where those happen to be neighbours, so that repeated blocks share one compiled graph.
    """
    moved = program.moved_index(param, axis)
    places = (original if moved is None else invert_index(moved)[original]).sort()
    start, length = int(places.values[0]), original.numel()
    contiguous = torch.equal(places.values, torch.arange(start, start + length))
    contiguous &= not gathered or length == program.tensor(param).shape[axis]
    if structure and together and not contiguous:
        raise VerifyError(f"{structure}: the chosen units in {param} are not contiguous after the permutation")
    return kind(
        param=param,
        axis=axis,
        start=start if contiguous else -1,
        length=length,
        side=side,
        channels=tuple(original[places.indices].tolist()),
        structure=structure,
        places=() if contiguous else tuple(places.values.tolist()),
        rule=rule,
        lead=program.tensor(param).dim() - 2,
    )


# --- beside the module -------------------------------------------------------------------------------------------------------


@dataclass
class SlicePart(LivePart[TrainedSlice, PartialMixin]):
    """Trained channels of one weight. `base (…)` holds the values they started from, in the base's dtype, logical layout."""

    part: TrainedSlice
    module: PartialMixin
    layout: Layout
    base: Tensor
    detached: dict[str, Tensor] | None = None
    base_known: bool = True
    overwrites_base = False
    fills_pruned = False

    @property
    def block(self) -> nn.Parameter:
        return self.module.weight_slice if self.detached is None else as_parameter(self.detached["weight_slice"])

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"weight_slice": self.block}

    def reset(self) -> None:
        self.block.detach().copy_(self.base)
        if not hasattr(self.module, "packed_names"):
            self.part.write(self.module.weight.data, self.base)

    def restore_base(self, stored: Float[Tensor, "*experts p q"]) -> None:
        self.part.write(stored, self.base.to(stored.device))

    def take_base(self, weight: Float[Tensor, "*experts p q"]) -> None:
        self.base = self.part.read(weight).to(self.base.dtype).clone()

    def deltas(self, snapshot: dict[str, Tensor] | None = None) -> list[Delta]:
        block = (self.snapshot() if snapshot is None else snapshot)["weight_slice"]
        values = change_of(block, self.base)
        exact = correction_of(block, self.base, values)
        channels = torch.tensor(self.part.channels, dtype=torch.int64)
        values, exact = self.to_file(values), None if exact is None else self.to_file(exact)
        return [Delta(self.param, self.part.side, channels, values, self.part.transposed, exact=exact)]

    def to_file(self, values: Float[Tensor, "*experts i j"]) -> Float[Tensor, "*experts i j"]:
        """A tensor like the block, its other axis in original order."""
        other = 1 - self.part.logical_axis
        moves = self.layout.logical_moves(leaf_of(self.param), self.part.transposed)
        if other in moves:
            values = values.index_select(other + self.part.lead, moves[other][1].to(values.device))
        return values.cpu().contiguous()

    def fits(self, deltas: Sequence[Delta]) -> bool:
        return (
            len(deltas) == 1
            and deltas[0].kind == self.part.side
            and set(deltas[0].channels.tolist()) == set(self.part.channels)
        )

    def from_file(self, delta: Delta, values: Float[Tensor, "*experts i j"]) -> Float[Tensor, "*experts i j"]:
        """A tensor like the values of a fitting delta, in the order and layout of the block."""
        side = self.part.logical_axis
        place = {c: i for i, c in enumerate(delta.channels.tolist())}
        lead = self.part.lead
        values = values.index_select(side + lead, torch.tensor([place[c] for c in self.part.channels]))
        moves = self.layout.logical_moves(leaf_of(self.param), self.part.transposed)
        if 1 - side in moves:
            values = values.index_select(1 - side + lead, moves[1 - side][0])
        return values.to(self.block.device)

    def fill(self, deltas: Sequence[Delta]) -> None:
        values, exact = deltas[0].values, deltas[0].exact
        exact = None if exact is None else self.from_file(deltas[0], exact)
        block = self.block.detach()
        block.copy_(changed(self.base.to(block.device), self.from_file(deltas[0], values), exact, block.dtype))

    def mix(self, weighted: Sequence[tuple[float, Delta]]) -> None:
        self.block.detach().copy_(self.base)
        for weight, delta in weighted:
            self.block.detach().add_(self.from_file(delta, delta.values).to(self.block.dtype), alpha=weight)

    def read_back(self) -> None:
        self.block.detach().copy_(self.part.read(self.module.weight.detach()))

    def detach(self) -> None:
        self.detached = take_leaves(self.module)

    def attach(self) -> None:
        become_part(self.module, self.part.module_kind)
        assert self.detached is not None
        tensors, self.detached = self.detached, None
        self.part.attach(self.module, tensors)
