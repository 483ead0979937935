"""A sparse part, a low-rank part, or both, beside a frozen weight: RoSA (arXiv 2401.04679) and LoRA (arXiv 2106.09685).

%y = aten.linear(%x, @q_proj.weight)
──▶
%y = sparsify.sparse_lowrank_linear(%x, …, @….sparse_values, @….sparse_index, @….lora_A, @….lora_B, s)
%y = sparsify.sparse_lowrank_grouped_linear(%x, @experts.up_proj.weight, …, %offsets)    factors of every expert, in 3-D

    SparseLowRank    in the program        SparseLowRankMixin    the module        LowRankPart    beside the module
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, fx, nn

from sparsify.adapters.adapter import Delta
from sparsify.errors import VerifyError
from sparsify.methods.part import LivePart, Snapshot, TrainedPart, beside, master_dtype
from sparsify.modules.adapted import AdaptedMixin, as_parameter, become_part, carries, take_leaves
from sparsify.modules.exact import change_of, changed, correction_of, sum_dtype
from sparsify.modules.layout import Layout
from sparsify.ops.added_parts import write_values
from sparsify.ops.schema import argument
from sparsify.program import LinearNode, Program
from sparsify.program.graph_editor import GraphEditor
from sparsify.program.permutation import invert_index
from sparsify.program.selection import generator, index_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch.fx.node import Argument

ops = torch.ops.sparsify
OPEN = -1  # every entry of the index of a mask that is still to be collected


# --- the module --------------------------------------------------------------------------------------------------------------


class SparseLowRankMixin(AdaptedMixin):
    """A linear with a sparse and a low-rank part; either may be missing, and an open mask keeps the sparse part silent.

    sparse_values (k,), sparse_index (k,) flat in the stored weight; lora_A (r, in), lora_B (out, r); scale, dropout. Of packed experts
    the factors have a leading axis, the experts, and the forward takes the ends of the groups of rows too.
    """

    sparse_values: nn.Parameter
    sparse_index: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    dropout: float
    mask_open: bool
    training: bool
    trained_leaves = ("sparse_values", "lora_A", "lora_B")
    part_buffers = ("sparse_index",)
    part_settings = ("scale", "dropout", "mask_open")
    entries_of_weight = ("sparse_values",)
    support_leaf = "sparse_index"
    rates = {"sparse_values": "sparse", "lora_A": "lora", "lora_B": "lora"}  # noqa: RUF012

    def parts(
        self,
    ) -> tuple[
        Float[Tensor, " k"] | None,
        Int[Tensor, " k"] | None,
        Float[Tensor, "*experts r m"] | None,
        Float[Tensor, "*experts n r"] | None,
    ]:
        """`(values, index, A, B)` that compute now; None for a part that is missing, or sparse and still open."""
        sparse = hasattr(self, "sparse_values") and not self.mask_open
        values, index = (self.sparse_values, self.sparse_index) if sparse else (None, None)
        a, b = (self.lora_A, self.lora_B) if hasattr(self, "lora_A") else (None, None)
        return values, index, a, b

    def forward(
        self, x: Float[Tensor, "*t m"], offsets: Int[Tensor, " experts"] | None = None
    ) -> Float[Tensor, "*t n"]:
        if offsets is not None:
            return self.grouped(x.to(self.weight.dtype), offsets)
        self.check_dtype(x)
        values, index, a, b = self.parts()
        if self.dropout and self.training and a is not None and b is not None:
            y = self.multiply(x, values, index, None, None)
            dropped = torch.nn.functional.dropout(x, self.dropout)
            low = torch.nn.functional.linear(dropped.to(y.dtype), a.to(y.dtype))
            return y + self.scale * torch.nn.functional.linear(low, b.to(y.dtype))
        return self.multiply(x, values, index, a, b)

    def grouped(self, x: Float[Tensor, "S m"], offsets: Int[Tensor, " experts"]) -> Float[Tensor, "S n"]:
        """The product of packed experts."""
        values, index, a, b = self.parts()
        dropped = bool(self.dropout and self.training and a is not None)
        factors = (None, None) if dropped else (a, b)
        given = (self.scale, self.conv1d, offsets)
        y = ops.sparse_lowrank_grouped_linear(x, self.weight, values, index, *factors, *given)
        if not dropped or a is None or b is None:
            return y
        low = ops.grouped_linear(torch.nn.functional.dropout(x, self.dropout), a.to(x.dtype), offsets)
        return y + self.scale * ops.grouped_linear(low, b.to(x.dtype), offsets)

    def multiply(
        self,
        x: Float[Tensor, "*t m"],
        values: Float[Tensor, " k"] | None,
        index: Int[Tensor, " k"] | None,
        a: Float[Tensor, "r m"] | None,
        b: Float[Tensor, "n r"] | None,
    ) -> Float[Tensor, "*t n"]:
        return ops.sparse_lowrank_linear(x, self.weight, self.bias, values, index, a, b, self.scale, self.conv1d)

    def folded(self, weight: Float[Tensor, "*experts p q"]) -> Float[Tensor, "*experts p q"]:
        values, index, a, b = self.parts()
        write_values(weight, None if values is None else values.detach(), index)
        return weight if a is None or b is None else add_low_rank(self, weight)

    def part_digest(self) -> bytes:
        return f"{float(self.scale)!r}".encode() if self._parameters.get("lora_A") is not None else b""

    def supports(self, tensors: Mapping[str, Tensor]) -> list[Int[Tensor, " k"]]:
        index = tensors.get("sparse_index")
        return [] if index is None or index.is_meta or self.support_open(index) else [index.flatten().long()]

    def support_open(self, support: Int[Tensor, " k"] | None = None) -> bool:
        return self.mask_open if support is None else bool((support < 0).any())

    def read_settings(self) -> None:
        if "sparse_index" in self._buffers:
            self.__dict__["mask_open"] = self.support_open(self.sparse_index)

    def base_follows(self, tensors: Mapping[str, Tensor]) -> bool:
        return "lora_B" not in tensors or not bool(tensors["lora_B"].any())

    def extra_repr(self) -> str:
        return f"{self.described()}, {describe_parts(self)}"


def describe_parts(module: SparseLowRankMixin) -> str:
    text = [f"rank={module.lora_A.shape[-2]}, scale={module.scale:g}"] if hasattr(module, "lora_A") else []
    if hasattr(module, "sparse_values"):
        text.append(f"sparse={module.sparse_values.numel()}{' (mask open)' if module.mask_open else ''}")
    return ", ".join(text)


def low_rank_delta(module: SparseLowRankMixin) -> Float[Tensor, "*experts p q"]:
    """`s · B A` in fp32, or fp64 where the factors are, laid out like the stored weight."""
    a, b = (t.detach() if t.dtype == torch.float64 else t.detach().float() for t in (module.lora_A, module.lora_B))
    delta = module.scale * (b @ a)
    return delta.mT if module.conv1d else delta


def add_low_rank(module: SparseLowRankMixin, weight: Float[Tensor, "*experts p q"]) -> Float[Tensor, "*experts p q"]:
    """`W + s · B A`, summed in fp32 or fp64, in the weight's dtype; a fresh tensor."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return (wide + low_rank_delta(module)).to(weight.dtype)


class SparseLowRankLinear(SparseLowRankMixin, nn.Linear):
    """`nn.Linear` with a sparse and a low-rank part (RoSA, LoRA)."""

    # as `nn.Linear` calls it, whose input a host may name; the mixin says `x`, as Conv1D does, and serves experts too
    def forward(self, input: Float[Tensor, "*t m"]) -> Float[Tensor, "*t n"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input)


carries("SparseLowRank", SparseLowRankMixin, SparseLowRankLinear)


# --- in the program ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SparseLowRank(TrainedPart):
    """One weight with a sparse part, a low-rank part, or both: `W + S + scale · B A`.

    index: support of S, flat in the *stored* weight as it lies now, sorted; None while an open mask waits for collection.
    original: the same entries in original coordinates, in the same order. count: number of entries (also when open).
    mask: how the entries are chosen. rank 0: no low-rank part. count 0: no sparse part.
    """

    param: str
    rule: int
    rank: int
    scale: float
    dropout: float
    count: int
    mask: str
    transposed: bool
    index: Tensor | None = None
    original: Tensor | None = None

    module_kind = "SparseLowRank"
    mixin = SparseLowRankMixin
    operators = {  # noqa: RUF012
        ops.sparse_lowrank_linear.default: "reference: values scattered into the weight, one GEMM, two small ones",
        ops.sparse_lowrank_grouped_linear.default: "reference: values scattered into the weights, per expert one GEMM, two small ones",
    }

    def trained_names(self) -> tuple[str, ...]:
        leaves = ["sparse_values"] if self.count else []
        leaves += ["lora_A", "lora_B"] if self.rank else []
        return tuple(beside(self.param, leaf) for leaf in leaves)

    # --- into the graph

    def placed(self, program: Program) -> SparseLowRank:
        if self.original is None:
            return self
        index, original = current_index(program, self.param, self.original, program.tensor(self.param).shape)
        return replace(self, index=index, original=original)

    def initial(
        self, weight: Callable[[], Float[Tensor, "*experts p q"]], program: Program, seed: int
    ) -> dict[str, Tensor]:
        return initial_parts(weight() if self.count else program.tensor(self.param), self, seed)

    def arguments(self, editor: GraphEditor) -> dict[str, Argument]:
        """What both operators take; an open mask keeps the sparse part silent."""
        leaves = {"values": "sparse_values", "index": "sparse_index", "a": "lora_A", "b": "lora_B"}
        found: dict[str, Argument] = {name: editor.beside(self.param, leaf) for name, leaf in leaves.items()}
        if self.index is None:
            found |= {"values": None, "index": None}
        return found | {"scale": self.scale}

    def insert(self, editor: GraphEditor, linear: LinearNode) -> None:
        read = editor.read(linear)
        given = {"x": read.x, "weight": read.weight, "transposed": linear.transposed, **self.arguments(editor)}
        if linear.offsets is not None:
            editor.replace(linear.node, ops.sparse_lowrank_grouped_linear.default, offsets=linear.offsets, **given)
        else:
            editor.replace(linear.node, ops.sparse_lowrank_linear.default, bias=read.bias, **given)

    def packed_arguments(self, editor: GraphEditor, linear: LinearNode) -> dict[str, Argument]:
        return self.arguments(editor)

    # --- the grammar

    def check(self, program: Program, read: set[str]) -> None:
        leaves = ["lora_A", "lora_B"] if self.rank else []
        leaves += ["sparse_values", "sparse_index"] if self.index is not None else []
        for leaf in leaves:
            if beside(self.param, leaf) not in read:
                raise VerifyError(f"{self.owner}: {leaf} is read by no sparsify operator")

    def check_node(self, node: fx.Node) -> None:
        if argument(node, "scale") != self.scale:
            raise VerifyError(
                f"node {node.name}: scale is {argument(node, 'scale')}, of {self.param} it is {self.scale}"
            )

    # --- for people

    def text(self) -> str:
        """`+ S (1,204 entries by gradient) + 2·BA (rank 8)`."""
        text = []
        if self.count:
            text.append(
                f"+ S ({self.count:,} entries by {self.mask}{', not chosen yet' if self.index is None else ''})"
            )
        if self.rank:
            scale = "" if self.scale == 1 else f"{self.scale:g}·"
            text.append(f"+ {scale}BA (rank {self.rank}{f', dropout {self.dropout:g}' if self.dropout else ''})")
        return " ".join(text)

    def row(self) -> str | None:
        texts = [f"rank {self.rank}, scale {self.scale:g}"] if self.rank else []
        if self.count:
            open_mask = ", still to be collected" if self.index is None else ""
            texts.append(f"{self.count:,} entries ({self.mask}{open_mask})")
        return f"{self.param}: {' + '.join(texts)} (rule {self.rule})"

    @classmethod
    def section(
        cls, parts: Sequence[TrainedPart], program: Program, ids: Callable[[Sequence[int]], str]
    ) -> tuple[str, list[str]]:
        return f"sparse and low-rank: {len(parts)}", super().section(parts, program, ids)[1]

    @classmethod
    def counted(cls, count: int) -> str:
        return f"{count} sparse or low-rank parts"

    def saved_bytes(self, x: Float[Tensor, "*t m"]) -> int | None:
        return None if self.rank or self.index is not None else 0

    # --- into the host

    def attach(self, module: AdaptedMixin, tensors: Mapping[str, Tensor]) -> None:
        """What there is of `sparse_values`, `sparse_index`, `lora_A`, `lora_B`."""
        assert isinstance(module, SparseLowRankMixin)
        module.scale, module.dropout = self.scale, self.dropout
        module.mask_open = self.count > 0 and self.index is None
        if "sparse_values" in tensors:
            module.sparse_values = as_parameter(tensors["sparse_values"])
            module.register_buffer("sparse_index", tensors["sparse_index"])
        if "lora_A" in tensors:
            module.lora_A, module.lora_B = as_parameter(tensors["lora_A"]), as_parameter(tensors["lora_B"])

    def live(self, module: AdaptedMixin, layout: Layout, seed: int) -> LowRankPart:
        assert isinstance(module, SparseLowRankMixin)
        base = None if self.index is None else module.sparse_values.detach().to(module.weight.dtype).clone()
        return LowRankPart(self, module, layout, base, seed)


def current_index(
    program: Program, param: str, original: Int[Tensor, " k"], shape: torch.Size
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
    """Flat entries of a stored weight of `shape`, original to current: `(index sorted, original in the same order)`.

    The two are one tensor where the weight stays in its order.
    """
    original = original.to(index_dtype(shape))
    if all(program.moved_index(param, axis) is None for axis in range(len(shape))):
        original = original if bool((original.diff() > 0).all()) else original.sort().values
        return original, original
    places = list(torch.unravel_index(original.long(), shape))
    for axis in range(len(shape)):
        moved = program.moved_index(param, axis)
        if moved is not None:
            places[axis] = invert_index(moved)[places[axis]]
    flat = flat_places(places, shape).sort()
    return flat.values.to(index_dtype(shape)), original[flat.indices]


def flat_places(places: Sequence[Int[Tensor, " k"]], shape: torch.Size) -> Int[Tensor, " k"]:
    """Positions by axis as positions in the flat tensor; the inverse of `torch.unravel_index`."""
    flat = places[0]
    for place, size in zip(places[1:], shape[1:], strict=True):
        flat = flat * size + place
    return flat


def initial_parts(weight: Float[Tensor, "*experts p q"], part: SparseLowRank, seed: int) -> dict[str, Tensor]:
    """Values that start at the base, `A` Kaiming-uniform (a = √5), `B` zero: the forward is the base's."""
    dtype = master_dtype(weight)
    *experts, n, m = weight.mT.shape if part.transposed else weight.shape
    found: dict[str, Tensor] = {}
    if part.count:
        wide = index_dtype(weight.shape)
        index = part.index if part.index is not None else torch.full((part.count,), OPEN, dtype=wide)
        found["sparse_index"] = index.to(weight.device)
        places = index.long().clamp_min(0).to(weight.device)
        found["sparse_values"] = weight.detach().reshape(-1)[places].to(dtype)
    if part.rank:
        found["lora_A"] = kaiming_a(part.param, part.rank, m, seed, *experts).to(weight.device, dtype)
        found["lora_B"] = torch.zeros(*experts, n, part.rank, dtype=dtype, device=weight.device)
    return {beside(part.param, leaf): tensor for leaf, tensor in found.items()}


def kaiming_a(param: str, rank: int, width: int, seed: int, *experts: int) -> Float[Tensor, "*experts r m"]:
    """`A (rank, width)`, uniform in ±1/√width (Kaiming-uniform with a = √5), equal on every rank of a group; one for each of
    `experts`, if given."""
    bound = width**-0.5
    return (torch.rand(*experts, rank, width, generator=generator(seed, param + ".lora_A")) * 2 - 1) * bound


def activate_support(program: Program, part: SparseLowRank) -> Program:
    """The program once an open mask is chosen: the operator over the weight of `part` reads its sparse values and index."""
    parts = tuple(part if p.param == part.param else p for p in program.parts)
    program = replace(program, parts=parts)
    editor = GraphEditor(program)
    values, index = (editor.input(beside(part.param, leaf)) for leaf in ("sparse_values", "sparse_index"))
    packed = beside(part.param, "packed_0")
    weight = editor.input(packed if packed in editor.sources else part.param)
    kinds = (ops.sparse_lowrank_linear, ops.sparse_lowrank_grouped_linear, ops.quantized_linear)
    for node in editor.nodes(*(kind.default for kind in kinds)):
        if weight in node.all_input_nodes:
            editor.change(node, values=values, index=index)
    graph_module, inputs = editor.finish()
    return replace(program, graph_module=graph_module, inputs=inputs)


# --- beside the module -------------------------------------------------------------------------------------------------------


class Settings(TypedDict):
    """Plain attributes of a module whose part is detached."""

    scale: float
    mask_open: bool


@dataclass
class LowRankPart(LivePart[SparseLowRank, SparseLowRankMixin]):
    """Sparse and low-rank parts of one weight. `base (k,)` holds the weight's values at the support."""

    part: SparseLowRank
    module: SparseLowRankMixin
    layout: Layout
    base: Tensor | None
    seed: int
    detached: dict[str, Tensor] | None = None
    settings: Settings | None = None
    own_factors: tuple[nn.Parameter, nn.Parameter, float] | None = field(default=None)
    base_known: bool = True

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("lora",) if self.part.rank else ()

    @property
    def fills_pruned(self) -> bool:  # type: ignore[override]
        return self.part.rank > 0

    @property
    def keeps_base(self) -> bool:  # type: ignore[override]
        return self.part.count > 0

    @property
    def takes_support(self) -> bool:  # type: ignore[override]
        return self.part.count > 0

    def tensors(self) -> dict[str, nn.Parameter]:
        held = self.module._parameters if self.detached is None else self.detached
        found = {name: held.get(name) for name in SparseLowRankMixin.trained_leaves}
        return {name: as_parameter(p) for name, p in found.items() if p is not None}

    def reset(self) -> None:
        self.unmix()
        tensors = self.tensors()
        if "lora_B" in tensors:
            tensors["lora_B"].detach().zero_()
            a = tensors["lora_A"]
            a.detach().copy_(kaiming_a(self.param, self.part.rank, a.shape[-1], self.seed, *a.shape[:-2]))
        self.reset_sparse()

    def reset_sparse(self) -> None:
        """Base values back at the support, in the sparse values and (dense) in the weight."""
        values = self.tensors().get("sparse_values")
        if values is not None and self.base is not None:
            values.detach().copy_(self.base)
            if not hasattr(self.module, "packed_names"):
                self.restore_base(self.module.weight.data)

    def restore_base(self, stored: Float[Tensor, "*experts p q"]) -> None:
        if self.base is not None and self.part.index is not None:
            stored.view(-1).index_copy_(0, self.part.index.long().to(stored.device), self.base.to(stored))

    def place(self, index: Int[Tensor, " k"], original: Int[Tensor, " k"]) -> SparseLowRank:
        """Fix the support of an open mask, or another one (current and original coordinates); values start at the base."""
        module = self.module
        if self.base is not None:
            self.reset_sparse()
        stored = module.dense()
        self.base = stored.reshape(-1)[index.long().to(stored.device)].clone()
        self.part = replace(self.part, index=index, original=original)
        module.sparse_values.detach().copy_(self.base)
        module.sparse_index.data = index.to(module.sparse_index.device, module.sparse_index.dtype)
        module.mask_open = False
        return self.part

    def deltas(self, snapshot: Snapshot | None = None) -> list[Delta]:
        values = self.snapshot() if snapshot is None else snapshot
        found = []
        if "sparse_values" in values and self.part.original is not None and self.base is not None:
            trained, base = values["sparse_values"].cpu(), self.base.cpu()
            change = change_of(trained, base)
            exact = correction_of(trained, base, change)
            places = self.part.original.long()
            found.append(Delta(self.param, "sparse", places, change, self.part.transposed, exact=exact))
        if "lora_A" in values:
            a, b = values["lora_A"], values["lora_B"]
            a, b = self.layout.factors_to_original(
                self.param, self.part.transposed, a.to(sum_dtype(a)), b.to(sum_dtype(b))
            )
            empty = torch.empty(0, dtype=torch.int64)
            found.append(Delta(self.param, "lora", empty, b.cpu(), self.part.transposed, a.cpu(), self.part.scale))
        return found

    def fits(self, deltas: Sequence[Delta]) -> bool:
        kinds = {d.kind: d for d in deltas}
        expected = {*(["sparse"] if self.base is not None else []), *(["lora"] if self.part.rank else [])}
        if len(kinds) != len(deltas) or set(kinds) != expected:
            return False
        if "lora" in kinds and (kinds["lora"].rank != self.part.rank or kinds["lora"].scale != self.part.scale):
            return False
        return "sparse" not in kinds or (
            self.part.original is not None
            and kinds["sparse"].channels.numel() == self.part.original.numel()
            and torch.equal(kinds["sparse"].channels.sort().values, self.part.original.long().sort().values)
        )

    def on_support(self, delta: Delta, values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """A tensor like the values of a sparse delta on this support, in its order."""
        assert self.part.original is not None
        order = delta.channels.argsort()
        places = torch.searchsorted(delta.channels[order], self.part.original.long())
        return values[order][places]

    def factors_of(self, delta: Delta) -> tuple[Float[Tensor, "*experts r m"], Float[Tensor, "*experts n r"]]:
        """`(A, B)` of a low-rank delta in current coordinates."""
        assert delta.a is not None
        return self.layout.factors_to_current(self.param, self.part.transposed, delta.a, delta.values)

    def fill(self, deltas: Sequence[Delta]) -> None:
        tensors = self.tensors()
        for delta in deltas:
            if delta.kind == "lora":
                a, b = self.factors_of(delta)
                tensors["lora_A"].detach().copy_(a)
                tensors["lora_B"].detach().copy_(b)
            else:
                values = tensors["sparse_values"].detach()
                assert self.base is not None
                exact = None if delta.exact is None else self.on_support(delta, delta.exact)
                change = self.on_support(delta, delta.values)
                values.copy_(changed(self.base.to(values.device), change, exact, values.dtype))

    def mix(self, weighted: Sequence[tuple[float, Delta]]) -> None:
        """A weighted sum of sparse values; low-rank factors stand side by side, see `mix_beside`."""
        tensors = self.tensors()
        if "sparse_values" in tensors and self.base is not None:
            values = tensors["sparse_values"]
            values.detach().copy_(self.base)
            for weight, delta in weighted:
                if delta.kind == "sparse":
                    change = self.on_support(delta, delta.values).to(values.device, values.dtype)
                    values.detach().add_(change, alpha=weight)

    def mix_beside(self, weighted: Sequence[tuple[float, Delta]]) -> None:
        if "lora_A" not in self.tensors():
            return
        own_a, own_b = self.module.lora_A, self.module.lora_B
        pairs = [(w * d.scale, *self.factors_of(d)) for w, d in weighted]
        a = torch.cat([a for _, a, _ in pairs], dim=-2).to(own_a.device, own_a.dtype)
        b = torch.cat([w * b for w, _, b in pairs], dim=-1).to(own_b.device, own_b.dtype)
        self.own_factors = (own_a, own_b, self.module.scale)
        self.module.lora_A, self.module.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.module.scale = 1.0

    def unmix(self) -> None:
        if self.own_factors is not None:
            self.module.lora_A, self.module.lora_B, self.module.scale = self.own_factors
            self.own_factors = None

    def read_back(self) -> None:
        tensors = self.tensors()
        if "sparse_values" in tensors and self.part.index is not None:
            flat = self.module.weight.detach().reshape(-1)
            tensors["sparse_values"].detach().copy_(flat[self.part.index.long().to(flat.device)])

    def detach(self) -> None:
        self.settings = {"scale": self.module.scale, "mask_open": self.module.mask_open}
        self.detached = take_leaves(self.module)

    def attach(self) -> None:
        become_part(self.module, self.part.module_kind)
        assert self.detached is not None
        assert self.settings is not None
        tensors, self.detached = self.detached, None
        self.part.attach(self.module, tensors)
        self.module.scale, self.module.mask_open = self.settings["scale"], self.settings["mask_open"]
