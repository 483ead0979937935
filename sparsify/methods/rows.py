"""Rows of an embedding, or of an output head, that train: new tokens, and tokens named by their ids.

%y = aten.embedding(@embed_tokens.weight, %ids)
──▶
%y = sparsify.partial_embedding(%ids, @embed_tokens.weight, @embed_tokens.weight_slice, @embed_tokens.slice_channels, padding)
%l = sparsify.partial_linear_at(%h, @embed_tokens.weight, None, @embed_tokens.weight_slice, …, 0)        a head that is tied to it

    HeadRows         in the program, of a head of its own: output channels, as S2FT's producers are
    EmbeddingRows    in the program, of an embedding and of everything that is tied to it: one block, in all their modules
    RowsMixin        the embedding's module        RowsPart    beside the modules
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from sparsify.errors import VerifyError
from sparsify.methods.channels import PartialMixin, SlicePart, TrainedSlice, slice_at
from sparsify.methods.part import TrainedPart
from sparsify.modules.adapted import AdaptedMixin, become, carries, take_leaves
from sparsify.modules.layout import Layout
from sparsify.ops.schema import argument
from sparsify.program import EmbeddingNode, Program
from sparsify.program.graph_editor import GraphEditor
from sparsify.program.repeats import Line

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ops = torch.ops.sparsify


class RowsMixin(PartialMixin):
    """An embedding with trained rows: `weight_slice (s, d)`, `slice_channels (s,)` their ids."""

    padding_idx: int | None

    # as `nn.Embedding` calls it, whose input a host may name
    def forward(self, input: Int[Tensor, "*t"]) -> Float[Tensor, "*t d"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        padding = -1 if self.padding_idx is None else self.padding_idx
        return ops.partial_embedding(input, self.weight, self.trained_block(), self.slice_channels, padding)

    def extra_repr(self) -> str:
        rows, width = self.stored_shape()
        return f"{rows}, {width}, trained rows={self.weight_slice.shape[0]}"


class RowsEmbedding(RowsMixin, nn.Embedding):
    """`nn.Embedding` with trained rows."""


carries("Rows", RowsMixin, RowsEmbedding)


# --- in the program ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadRows(TrainedSlice):
    """Rows of an output head that is tied to nothing; `channels` are the ids of its tokens."""

    def placed(self, program: Program) -> HeadRows:
        ids = torch.tensor(self.channels)
        return slice_at(program, self.param, self.axis, ids, "row", rule=self.rule, kind=type(self))

    def text(self) -> str:
        return f"trains {self.length:,} rows (tokens)"

    def row(self) -> str | None:
        return f"{self.param}: {self.length:,} of its rows: tokens {self.spans_of_ids()} (rule {self.rule})"

    def spans_of_ids(self) -> str:
        shown = ", ".join(map(str, self.channels[:6]))
        return shown + (f", … {self.length - 6} more" if self.length > 6 else "")

    def note(self) -> tuple[str, str]:
        return self.block_name, self.text()

    @classmethod
    def section(
        cls, parts: Sequence[TrainedPart], program: Program, ids: Callable[[Sequence[int]], str]
    ) -> tuple[str, list[str]]:
        return f"rows: {len(parts)}", [Line.about(p.param, f"@{p.param} {p.text()}") for p in parts]

    @classmethod
    def counted(cls, count: int) -> str:
        return f"rows of {count} head{'s' if count != 1 else ''}"


@dataclass(frozen=True)
class EmbeddingRows(HeadRows):
    """Rows of an embedding, and of a head that is tied to it: always by their ids, which are sorted in `channels` and `places`."""

    module_kind = "Rows"
    mixin = RowsMixin
    operators = {  # noqa: RUF012  (a class attribute of a frozen dataclass)
        ops.partial_embedding.default: "reference: rows copied into the weight, one look-up",
        ops.partial_linear_at.default: "reference: channels copied into the weight, one GEMM",
    }

    def placed(self, program: Program) -> EmbeddingRows:
        return self  # nothing reorders a vocabulary

    def kind_of(self, module: nn.Module) -> str:
        return "Rows" if isinstance(module, nn.Embedding) else "Partial"

    def insert_lookup(self, editor: GraphEditor, lookup: EmbeddingNode) -> None:
        index = editor.beside(self.param, "slice_channels")
        given = {
            "ids": lookup.ids,
            "weight": editor.input(self.param),
            "block": editor.beside(self.param, "weight_slice"),
        }
        editor.replace(lookup.node, ops.partial_embedding.default, index=index, padding=lookup.padding, **given)

    def check_node(self, node: fx.Node) -> None:
        if node.target is ops.partial_linear_at.default and argument(node, "axis") != 0:
            raise VerifyError(f"node {node.name}: axis is {argument(node, 'axis')}, of rows of {self.param} it is 0")

    @classmethod
    def counted(cls, count: int) -> str:
        return f"rows of {count} embedding{'s' if count != 1 else ''}"

    def attach(self, module: AdaptedMixin, tensors: Mapping[str, Tensor]) -> None:
        super().attach(module, tensors)
        assert isinstance(module, PartialMixin)
        module.slice_start = -1  # by ids, wherever they lie

    def live(self, module: AdaptedMixin, layout: Layout, seed: int) -> RowsPart:
        assert isinstance(module, PartialMixin)
        return RowsPart(self, module, layout, self.read(module.dense()).clone())


# --- beside the modules ------------------------------------------------------------------------------------------------------


@dataclass
class RowsPart(SlicePart):
    """Trained rows of one weight, in every module that it is tied to."""

    def detach(self) -> None:
        super().detach()
        for twin in self.twins:
            take_leaves(twin)

    def attach(self) -> None:
        assert self.detached is not None
        tensors, self.detached = self.detached, None
        for module in (self.module, *self.twins):
            become(module, self.part.kind_of(module))
            self.part.attach(module, tensors)


__all__ = ["EmbeddingRows", "HeadRows", "RowsEmbedding", "RowsMixin", "RowsPart"]
