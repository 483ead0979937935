"""What a program is made of: the values that passes write, in the groups in which a `Program` holds them.

    Captured    how the model is called, and which of its tensors are one        `capture`
    Found       structures, what was declined, what is not proven                `find-structures`, `prove-units`
    Chosen      units and channels that train, and how tensors were reordered    `select`, `permute-weights`
    Packing     weights that are stored quantised                                `select`, `insert`
    Pruning     weights that lost entries                                        `prune`

A `Program` shows every field of these as an attribute of its own, and `evolve` takes them by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparsify.program.permutation import Permutation
from sparsify.program.structure import Declined, Structure
from sparsify.program.unit_budget import Budget

if TYPE_CHECKING:
    from sparsify.host.quantized_bases import PackedBase
    from sparsify.pruning.sequential import LayerStats

#: what data loaders give for one call: keyword inputs by name, positional ones in a row, or the one tensor
Batch: TypeAlias = "Mapping[str, object] | Sequence[object] | torch.Tensor"
#: positional and keyword arguments of one call
Inputs: TypeAlias = "tuple[tuple[object, ...], dict[str, object]]"


@dataclass(frozen=True)
class Input:
    """What one placeholder of the graph stands for. `target` is the qualified name, or None for a user input."""

    name: str
    kind: Literal["parameter", "buffer", "constant", "user"]
    target: str | None = None


@dataclass(frozen=True)
class LinearNode:
    """One matrix product with a weight: `y = x Wᵀ + b`, tied to its parameter's qualified name.

    transposed: the stored weight is `(in, out)` (Conv1D) instead of `(out, in)`. bias_node: what is added, named or computed.
    offsets: of packed experts, `(experts, out, in)`: the ends of the groups of rows, sorted by expert; None for a matrix.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    transposed: bool
    bias_node: fx.Node | None = None
    offsets: fx.Node | None = None

    @property
    def lead(self) -> int:
        """Axes of the weight before its two: 1 of packed experts."""
        return 0 if self.offsets is None else 1

    @property
    def in_axis(self) -> int:
        return (0 if self.transposed else 1) + self.lead

    @property
    def out_axis(self) -> int:
        return (1 if self.transposed else 0) + self.lead


@dataclass(frozen=True)
class ConvolutionNode:
    """One convolution with a weight `(n, c, *k)`, tied to its parameter's qualified name; zeros on each side by axis, one group."""

    node: fx.Node
    x: fx.Node
    weight: str
    bias: fx.Node | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class EmbeddingNode:
    """One look-up of rows of a weight, tied to its parameter's qualified name. padding: the id without a gradient, −1 for none."""

    node: fx.Node
    ids: fx.Node
    weight: str
    padding: int


@dataclass(frozen=True)
class ChannelChoice:
    """Input channels that train in every weight of a group that shares its input, in original coordinates."""

    params: tuple[str, ...]
    rule: int
    channels: tuple[int, ...]
    method: str


@dataclass(frozen=True)
class Packed:
    """One weight is stored quantised: `format`, dense shape, bytes before and after, relative error of the weight (Frobenius)."""

    param: str
    format: str
    shape: torch.Size
    dense_bytes: int
    packed_bytes: int
    error: float


@dataclass(frozen=True)
class UnitChoice:
    """What a rule trains in one structure: ids of consumer units and producer units, in original coordinates.

    Under grouped-query attention consumer ids are query heads and producer ids KV heads.
    in_place: why the units train where they lie, by blocks or gathered channels; empty when co-permutation brings them together.
    """

    structure: str
    rule: int
    consumers: tuple[int, ...]
    producers: tuple[int, ...]
    method: str
    scores: tuple[float, ...] = ()
    in_place: str = ""


@dataclass(frozen=True)
class Move:
    """One tensor was reordered: `new = old.index_select(axis, index)`. Exact data, exactly invertible."""

    param: str
    axis: int
    index: torch.Tensor


@dataclass(frozen=True, eq=False)
class Captured:
    """What the trace fixed.

    in_spec, out_spec: structures of the inputs and of the output. mutations: outputs of the graph that are written buffers, before the
    model's own. example: the inputs of the trace. aliases: every name of a parameter or buffer → the first name of the same tensor.
    constants: tensors of the trace that belong to no module.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    mutations: int
    example: Inputs
    aliases: dict[str, str]
    constants: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Found:
    """Structures that may be chosen from. unproven: structure → why its units are not moved."""

    structures: tuple[Structure, ...] = ()
    declined: tuple[Declined, ...] = ()
    unproven: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Chosen:
    """What trains, in original coordinates, and how it was brought together.

    budgets: what rules with `fraction=` asked for, and what their whole units train. permutations: structure → permutation of its units,
    and of the heads inside them. moves: the tensors that were reordered by them.
    """

    choices: tuple[UnitChoice, ...] = ()
    channel_choices: tuple[ChannelChoice, ...] = ()
    budgets: tuple[Budget, ...] = ()
    permutations: dict[str, tuple[Permutation, Permutation | None]] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()


@dataclass(frozen=True, eq=False)
class Packing:
    """Weights that are stored quantised, by name.

    quantize: format. packed: tensors, until a host has them. packings: what packing saved and changed, for the report.
    bases: weights that came packed (`sparsify.host.quantized_bases.PackedBase`). hashes: of the weights before they were packed.
    """

    quantize: dict[str, str] = field(default_factory=dict)
    packed: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    packings: tuple[Packed, ...] = ()
    bases: dict[str, PackedBase] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pruning:
    """Weights that lost entries. masks: what survives, in the current order. pruned: `LayerStats` of each layer. dense_hash: of the
    model before."""

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    pruned: tuple[LayerStats, ...] = ()
    dense_hash: str | None = None


__all__ = [
    "Captured",
    "ChannelChoice",
    "Chosen",
    "Found",
    "Input",
    "LinearNode",
    "Move",
    "Packed",
    "Packing",
    "Pruning",
    "UnitChoice",
]
