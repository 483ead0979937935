"""LoRA (arXiv 2106.09685) of an embedding: PEFT's `lora_embedding_A`, `lora_embedding_B`, in our orientation of factors.

%y = aten.embedding(@wte.weight, %ids)   ──▶   %y = sparsify.lowrank_embedding(%ids, @wte.weight, @wte.lora_A, @wte.lora_B, s, padding)

The stored weight `(v, d)` changes by `s · B A` with `lora_B (v, r)`, `lora_A (r, d)`, as that of a linear of v outputs would: files, mixes,
merges and switches know no difference. B starts at zero. Ids have no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.errors import VerifyError
from sparsify.methods.part import TrainedPart
from sparsify.methods.sparse_lowrank import SparseLowRank, SparseLowRankMixin, describe_parts
from sparsify.modules.adapted import carries
from sparsify.program import EmbeddingNode, LinearNode, Program
from sparsify.program.graph_editor import GraphEditor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

ops = torch.ops.sparsify


class LowRankEmbeddingMixin(SparseLowRankMixin):
    """An embedding with a low-rank part: `lora_A (r, d)`, `lora_B (v, r)`; scale."""

    padding_idx: int | None
    trained_leaves = ("lora_A", "lora_B")
    part_buffers = ()
    entries_of_weight = ()
    support_leaf = ""

    # as `nn.Embedding` calls it, whose input a host may name
    def forward(self, input: Int[Tensor, "*t"]) -> Float[Tensor, "*t d"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        padding = -1 if self.padding_idx is None else self.padding_idx
        return ops.lowrank_embedding(input, self.weight, self.lora_A, self.lora_B, self.scale, padding)

    def extra_repr(self) -> str:
        rows, width = self.stored_shape()
        return f"{rows}, {width}, {describe_parts(self)}"


class LowRankEmbedding(LowRankEmbeddingMixin, nn.Embedding):
    """`nn.Embedding` with a low-rank part."""


carries("LowRank", LowRankEmbeddingMixin, LowRankEmbedding)


@dataclass(frozen=True, eq=False)
class LowRankRows(SparseLowRank):
    """The low-rank part of one embedding."""

    module_kind = "LowRank"
    mixin = LowRankEmbeddingMixin
    operators = {  # noqa: RUF012
        ops.lowrank_embedding.default: "reference: two look-ups, one small GEMM",
    }

    def insert(self, editor: GraphEditor, linear: LinearNode) -> None:
        raise VerifyError(
            f"{self.param}: node {linear.node.name} multiplies with an embedding that a low-rank part trains in"
        )

    def insert_lookup(self, editor: GraphEditor, lookup: EmbeddingNode) -> None:
        given = {
            "a": editor.beside(self.param, "lora_A"),
            "b": editor.beside(self.param, "lora_B"),
            "scale": self.scale,
        }
        given |= {"ids": lookup.ids, "weight": editor.input(self.param), "padding": lookup.padding}
        editor.replace(lookup.node, ops.lowrank_embedding.default, **given)

    @classmethod
    def section(
        cls, parts: Sequence[TrainedPart], program: Program, ids: Callable[[Sequence[int]], str]
    ) -> tuple[str, list[str]]:
        return f"low-rank embeddings: {len(parts)}", super().section(parts, program, ids)[1]

    @classmethod
    def counted(cls, count: int) -> str:
        return f"{count} low-rank embedding{'s' if count != 1 else ''}"


__all__ = ["LowRankEmbedding", "LowRankEmbeddingMixin", "LowRankRows"]
