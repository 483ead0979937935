"""An embedding of which some rows train.

    partial_embedding(ids, weight, block, index, padding)      y = W'[ids],  W' = W with the rows `index` replaced by `block`

`ids (*,)` integers, `weight (v, d)` frozen, `block (s, d)` the trained rows (values, usually in fp32 over a 16-bit weight), `index
(s,)` their ids, sorted and distinct; `padding` the id that gets no gradient, −1 for none, as in `torch.nn.Embedding`.

As in `partial_linear` the rows of `weight` under the block are scratch: the forward writes the block there and looks up once, past the
version counter. The backward keeps the ids alone. Each token's gradient goes into the slot of its row, found by a binary search in
`index`; tokens of frozen rows go nowhere, so that nothing of the size of the vocabulary is made: the largest tensor is `(s + 1, d)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sparsify.library import LIBRARY, Context
from sparsify.ops.checks import (
    ascending,
    require,
    require_floats,
    require_index,
    require_shape,
    require_together,
    require_within,
)
from sparsify.ops.partial_linear import write_block_at

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LIBRARY.define("partial_embedding(Tensor ids, Tensor weight, Tensor block, Tensor index, int padding) -> Tensor")

NAME = "partial_embedding"


# --- the oracle --------------------------------------------------------------------------------------------------------------


def oracle_partial_embedding(
    ids: Int[Tensor, "*t"], weight: Float[Tensor, "v d"], block: Float[Tensor, "s d"], index: Int[Tensor, " s"]
) -> Float[Tensor, "*t d"]:
    """Eager definition of the forward."""
    return weight.index_copy(0, index.long(), block.to(weight.dtype))[ids]


def oracle_partial_embedding_backward(
    g: Float[Tensor, "*t d"], ids: Int[Tensor, "*t"], index: Int[Tensor, " s"], padding: int
) -> Float[Tensor, "s d"]:
    """`dBlock`, written out: of each trained row the sum of the gradients of its tokens, none for the padding."""
    tokens, flat = g.reshape(-1, g.shape[-1]), ids.reshape(-1)
    rows = [tokens[(flat == row) & (flat != padding)].sum(0) for row in index.tolist()]
    return torch.stack(rows) if rows else g.new_zeros(0, g.shape[-1])


# --- the operator ------------------------------------------------------------------------------------------------------------


def _check(
    ids: Int[Tensor, "*t"], weight: Float[Tensor, "v d"], block: Float[Tensor, "s d"], index: Int[Tensor, " s"]
) -> None:
    """That everything fits, without reading any tensor."""
    require(
        ids.dtype in (torch.int32, torch.int64), lambda: f"{NAME}: ids are {ids.dtype}, expected int32 or int64 numbers"
    )
    require(
        weight.dim() == 2 and block.dim() == 2,
        lambda: f"{NAME}: weight {tuple(weight.shape)} and block {tuple(block.shape)}: expected two matrices",
    )
    require_floats(NAME, weight=weight, block=block)
    require_index(NAME, "index", index)
    require_shape(NAME, "block", block, index.shape[0], weight.shape[1])


def _kernel(
    ids: Int[Tensor, "*t"],
    weight: Float[Tensor, "v d"],
    block: Float[Tensor, "s d"],
    index: Int[Tensor, " s"],
    padding: int,
) -> Float[Tensor, "*t d"]:
    _check(ids, weight, block, index)
    require_together(NAME, weight, ids, block, index)
    require_within(NAME, "index", index, weight.shape[0], "embedding's rows")
    require(ascending(index), lambda: f"{NAME}: the index must be sorted, each row once")
    write_block_at(weight, block, index, 0)
    return torch.nn.functional.embedding(ids, weight.detach())


def _fake(
    ids: Int[Tensor, "*t"],
    weight: Float[Tensor, "v d"],
    block: Float[Tensor, "s d"],
    index: Int[Tensor, " s"],
    padding: int,
) -> Float[Tensor, "*t d"]:
    _check(ids, weight, block, index)
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _in_aten(
    ids: Int[Tensor, "*t"],
    weight: Float[Tensor, "v d"],
    block: Float[Tensor, "s d"],
    index: Int[Tensor, " s"],
    padding: int,
) -> Float[Tensor, "*t d"]:
    whole = weight.index_copy(0, index.long(), block.to(weight.dtype))
    return torch.ops.aten.embedding(whole, ids, padding)


def slots_of(ids: Int[Tensor, "*t"], index: Int[Tensor, " s"], padding: int) -> Int[Tensor, "*t"]:
    """Where each token's row stands in `index`; `s` for rows that do not train."""
    count = index.shape[0]
    place = torch.searchsorted(index.long(), ids.long())
    found = (index.long()[place.clamp_max(count - 1)] == ids) & (ids != padding)
    return torch.where(found, place, count)


def scattered(g: Float[Tensor, "*t d"], slots: Int[Tensor, "*t"], rows: int, silent: int) -> Float[Tensor, "rows d"]:
    """Sums of the tokens of every slot, none for the slot `silent`."""
    if g.numel() == 0:  # which the second derivative of the operator below does not take
        return g.reshape(0, g.shape[-1]).sum(0).expand(rows, g.shape[-1])
    return torch.ops.aten.embedding_dense_backward(g, slots, rows, silent, False)


class _Saved(Context, Protocol):
    """What the backward keeps beside the tensors: numbers of rows, the padding, types of the gradients."""

    rows: int
    count: int
    padding: int
    dtypes: tuple[torch.dtype, torch.dtype]


def _setup(ctx: _Saved, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ids, weight, block, index, padding = inputs
    ctx.save_for_backward(ids, index)
    ctx.rows, ctx.count, ctx.padding = weight.shape[0], block.shape[0], padding
    ctx.dtypes = weight.dtype, block.dtype


def _backward(ctx: _Saved, g: Float[Tensor, "*t d"]) -> tuple[Tensor | None, ...]:
    ids, index = ctx.saved_tensors
    need = ctx.needs_input_grad
    d_weight = d_block = None
    if need[1]:  # a weight that was made to require a gradient in spite of the plan: dense, zero under the block
        d_weight = scattered(g, ids.long(), ctx.rows, ctx.padding).index_fill(0, index.long(), 0).to(ctx.dtypes[0])
    if need[2]:
        slots = slots_of(ids, index, ctx.padding)
        d_block = scattered(g.to(ctx.dtypes[1]), slots, ctx.count + 1, ctx.count)[: ctx.count]
    return None, d_weight, d_block, None, None


LIBRARY.implement(NAME, kernel=_kernel, fake=_fake, aten=_in_aten, backward=_backward, setup=_setup)

__all__ = ["oracle_partial_embedding", "oracle_partial_embedding_backward", "slots_of"]
