"""Every training operator with arguments, and a twin in dense ATen that it must agree with, in values and derivatives of any order.

The twins write the formulas down again: nothing here is shared with the operators but the unpacking of a quantised base.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparsify.methods  # noqa: F401  registers the operators
from sparsify.formats import pack, unpack
from sparsify.ops.bits import pack_bits

N, M, RANK, SCALE = 5, 7, 2, 0.7
AXES = {"rows": 0, "columns": 1}
Shape = tuple[int, ...]


@dataclass
class OperatorCase:
    """operator (overload), its arguments, and the twin, called with the same. leaves: places of what can need a gradient."""

    operator: Any
    arguments: list[Any]
    leaves: tuple[int, ...]
    twin: Callable[..., Any]

    def needing(self, places: Sequence[int]) -> tuple[OperatorCase, list[Tensor]]:
        """A copy in which the arguments at these places are leaves that need a gradient, and they."""
        arguments = [a.detach().clone() if isinstance(a, Tensor) else a for a in self.arguments]
        for place in places:
            arguments[place].requires_grad_()
        return OperatorCase(self.operator, arguments, tuple(places), self.twin), [arguments[p] for p in places]

    def of(self, function: Callable[..., Any]) -> Callable[..., Tensor]:
        """`function` (the operator or the twin) of the leaves alone, its results in one tensor."""

        def call(*leaves: Tensor) -> Tensor:
            arguments = [a.clone() if isinstance(a, Tensor) and a.dim() in (2, 3) else a for a in self.arguments]
            for place, leaf in zip(self.leaves, leaves, strict=True):
                arguments[place] = leaf
            found = function(*arguments)
            return torch.cat([t.reshape(-1) for t in found]) if isinstance(found, tuple | list) else found

        return call


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def at(tensor: Tensor, axis: int, channels: Tensor, block: Tensor) -> Tensor:
    """The twin's way of replacing channels: by a product with zeros and ones and a sum."""
    place = torch.zeros(tensor.shape[axis], channels.numel(), dtype=tensor.dtype)
    place[channels.long(), torch.arange(channels.numel())] = 1.0
    kept = 1.0 - place.sum(1)
    if axis == 0:
        return torch.nan_to_num(tensor) * kept[:, None] + place @ block
    return torch.nan_to_num(tensor) * kept + block @ place.t()


def put(stored: Tensor, values: Tensor | None, index: Tensor | None) -> Tensor:
    if values is None or index is None:
        return stored
    return at(stored.reshape(1, -1), 1, index, values[None]).view(stored.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.t()
    return y if bias is None else y + bias


def support(size: int, count: int) -> Tensor:
    return torch.randperm(size)[:count].sort().values.to(torch.int32)


def partial(shape: Shape, bias: bool, axis: int, index: bool, dx: bool, transposed: bool) -> OperatorCase:
    weight = randn(M, N).t() if transposed else randn(N, M)
    channels = torch.tensor([4, 0, 2]) if index else torch.tensor([1, 2, 3])
    block = randn(3, M) if axis == 0 else randn(N, 3)
    if transposed:  # not even contiguous
        block = block.t().contiguous().t()
    weight.index_copy_(axis, channels, block)
    name = f"partial_linear{'_at' if index else ''}{'_dx' if dx else ''}"
    operator = getattr(torch.ops.sparsify, name).default
    where = channels if index else 1
    if dx:
        return OperatorCase(
            operator,
            [randn(*shape, N), weight, block, where, axis],
            (0, 1, 2),
            lambda g, w, k, _, axis: g @ at(w, axis, channels, k),
        )
    return OperatorCase(
        operator,
        [randn(*shape, M), weight, randn(N) if bias else None, block, where, axis],
        (0, 1, 2, 3) if bias else (0, 1, 3),
        lambda x, w, b, k, _, axis: linear(x, at(w, axis, channels, k), b),
    )


def low_rank(sparse: bool, lora: bool, dx: bool, shape: Shape) -> tuple[Any, ...]:
    values, index = (randn(6), support(N * M, 6)) if sparse else (None, None)
    a = randn(RANK, M) if lora else None
    if not lora:
        return values, index, None, None
    tokens = 1
    for size in shape:
        tokens *= size
    return values, index, a, randn(tokens, RANK) if dx else randn(N, RANK)


def added(x: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor | float:
    return 0.0 if a is None or b is None else SCALE * (x @ a.t()) @ b.t()


def sparse_lowrank(shape: Shape, bias: bool, sparse: bool, lora: bool, dx: bool, transposed: bool) -> OperatorCase:
    stored = randn(M, N) if transposed else randn(N, M)
    values, index, a, b = low_rank(sparse, lora, dx, shape)
    if values is not None:
        stored.view(-1).index_copy_(0, index.long(), values)

    def logical(stored: Tensor, values: Any, index: Any, transposed: bool) -> Tensor:
        weight = put(stored, values, index)
        return weight.t() if transposed else weight

    if dx:

        def twin_dx(g, stored, values, index, low, a, scale, transposed):
            found = g @ logical(stored, values, index, transposed)
            return found if a is None else found + (scale * low @ a).view(found.shape)

        arguments = [randn(*shape, N), stored, values, index, b, a, SCALE, transposed]
        leaves = [p for p in (0, 1, 2, 4, 5) if arguments[p] is not None]
        return OperatorCase(torch.ops.sparsify.sparse_lowrank_linear_dx.default, arguments, tuple(leaves), twin_dx)

    def twin(x, stored, bias, values, index, a, b, scale, transposed):
        return linear(x, logical(stored, values, index, transposed), bias) + added(x, a, b)

    arguments = [randn(*shape, M), stored, randn(N) if bias else None, values, index, a, b, SCALE, transposed]
    leaves = [p for p in (0, 1, 2, 3, 5, 6) if arguments[p] is not None]
    return OperatorCase(torch.ops.sparsify.sparse_lowrank_linear.default, arguments, tuple(leaves), twin)


def quantized(
    shape: Shape, bias: bool, format: str, side: str | None, sparse: bool, lora: bool, dx: bool, transposed: bool
) -> OperatorCase:
    stored = (M, N) if transposed else (N, M)
    packed = pack(torch.randn(stored), format)
    axis = AXES.get(side or "columns", 1)
    block = None if side is None else randn(3, M) if axis == 0 else randn(N, 3)
    channels = None if side is None else torch.tensor([4, 0, 2])
    values, index, a, b = low_rank(sparse, lora, dx, shape)

    def logical(block: Any, values: Any, index: Any) -> Tensor:
        weight = unpack(packed, format, stored, torch.float64)
        if block is not None and channels is not None:
            weight = at(weight.t(), axis, channels, block).t() if transposed else at(weight, axis, channels, block)
        weight = put(weight, values, index)
        return weight.t() if transposed else weight

    base = [format, *stored, transposed]
    if dx:

        def twin_dx(g, _f, _r, _c, _t, block, _ch, _ax, values, index, low, a, scale, _p):
            found = g @ logical(block, values, index)
            return found if a is None else found + (scale * low @ a).view(found.shape)

        arguments = [randn(*shape, N), *base, block, channels, axis, values, index, b, a, SCALE, packed]
        leaves = [p for p in (0, 5, 8, 10, 11) if arguments[p] is not None]
        return OperatorCase(torch.ops.sparsify.quantized_linear_dx.default, arguments, tuple(leaves), twin_dx)

    def twin(x, _f, _r, _c, _t, bias, block, _ch, _ax, values, index, a, b, _s, _p):
        return linear(x, logical(block, values, index), bias) + added(x, a, b)

    bias_ = randn(N) if bias else None
    arguments = [randn(*shape, M), *base, bias_, block, channels, axis, values, index, a, b, SCALE, packed]
    leaves = [p for p in (0, 5, 6, 9, 11, 12) if arguments[p] is not None]
    return OperatorCase(torch.ops.sparsify.quantized_linear.default, arguments, tuple(leaves), twin)


EXPERTS = 3


def offsets_of(rows: int) -> Tensor:
    """Ends of three groups, the middle one empty."""
    return torch.tensor([rows // 3, rows // 3, rows])


def by_expert(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    starts = [0, *offsets.tolist()]
    found = [x[a:b] @ weight[e].t() for e, (a, b) in enumerate(itertools.pairwise(starts))]
    return torch.cat(found)


def grouped_partial(shape: Shape, axis: int, index: bool, transposed: bool) -> OperatorCase:
    weight = randn(EXPERTS, M, N).transpose(1, 2) if transposed else randn(EXPERTS, N, M)
    channels = torch.tensor([4, 0, 2]) if index else torch.tensor([1, 2, 3])
    block = randn(EXPERTS, 3, M) if axis == 0 else randn(EXPERTS, N, 3)
    weight.index_copy_(axis + 1, channels, block)

    def twin(x, w, k, _i, _s, axis, offsets):
        dense = torch.stack([at(one, axis, channels, own) for one, own in zip(w, k, strict=True)])
        return by_expert(x, dense, offsets)

    rows = tokens_of(shape)
    arguments = [randn(rows, M), weight, block, channels if index else None, 1, axis, offsets_of(rows)]
    return OperatorCase(torch.ops.sparsify.partial_grouped_linear.default, arguments, (0, 1, 2), twin)


def grouped_sparse_lowrank(shape: Shape, sparse: bool, lora: bool, transposed: bool) -> OperatorCase:
    stored = randn(EXPERTS, M, N) if transposed else randn(EXPERTS, N, M)
    values, index = (randn(9), support(EXPERTS * N * M, 9)) if sparse else (None, None)
    a, b = (randn(EXPERTS, RANK, M), randn(EXPERTS, N, RANK)) if lora else (None, None)
    if values is not None and index is not None:
        stored.view(-1).index_copy_(0, index.long(), values)

    def twin(x, stored, values, index, a, b, scale, transposed, offsets):
        weight = put(stored, values, index)
        weight = weight.transpose(1, 2) if transposed else weight
        return by_expert(x, weight if a is None else weight + scale * torch.einsum("enr,erm->enm", b, a), offsets)

    rows = tokens_of(shape)
    arguments = [randn(rows, M), stored, values, index, a, b, SCALE, transposed, offsets_of(rows)]
    leaves = [p for p in (0, 1, 2, 4, 5) if arguments[p] is not None]
    return OperatorCase(torch.ops.sparsify.sparse_lowrank_grouped_linear.default, arguments, tuple(leaves), twin)


def grouped_products(shape: Shape, name: str) -> OperatorCase:
    ops, rows = torch.ops.sparsify, tokens_of(shape)
    g, x, offsets = randn(rows, N), randn(rows, M), offsets_of(rows)

    def outer(g: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        starts = [0, *offsets.tolist()]
        return torch.stack([g[a:b].t() @ x[a:b] for a, b in itertools.pairwise(starts)])

    if name == "grouped_linear":
        return OperatorCase(ops.grouped_linear.default, [x, randn(EXPERTS, N, M), offsets], (0, 1), by_expert)
    if name == "grouped_linear_turned":
        weight = randn(EXPERTS, M, N).transpose(1, 2)
        return OperatorCase(ops.grouped_linear.default, [x, weight, offsets], (0, 1), by_expert)
    if name == "grouped_outer":
        return OperatorCase(ops.grouped_outer.default, [g, x, offsets], (0, 1), outer)
    assert name == "grouped_sampled"
    index = support(EXPERTS * N * M, 11)
    twin = lambda a, b, i, offsets: outer(a, b, offsets).reshape(-1)[i.long()]  # noqa: E731
    return OperatorCase(ops.grouped_sampled.default, [g, x, index, offsets], (0, 1), twin)


GROUPED_PRODUCTS = ("grouped_linear", "grouped_linear_turned", "grouped_outer", "grouped_sampled")


def mask_of(rows: int, columns: int) -> Tensor:
    mask = torch.rand(rows, columns) > 0.4
    mask[0, 0], mask[-1, -1] = True, False
    return mask


def masked_linear(shape: Shape, bias: bool, transposed: bool) -> OperatorCase:
    mask = mask_of(M, N) if transposed else mask_of(N, M)

    def twin(x, weight, _bits, bias, transposed):
        kept = weight * mask
        return linear(x, kept.t() if transposed else kept, bias)

    arguments = [randn(*shape, M), randn(*mask.shape) * mask, pack_bits(mask), randn(N) if bias else None, transposed]
    leaves = (0, 1, 3) if bias else (0, 1)
    return OperatorCase(torch.ops.sparsify.masked_linear.default, arguments, leaves, twin)


def tokens_of(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def products(shape: Shape, name: str) -> OperatorCase:
    """The products that backwards are made of; they take matrices."""
    tokens, mask = tokens_of(shape), mask_of(N, M)
    g, x = randn(tokens, N), randn(tokens, M)
    ops = torch.ops.sparsify
    if name == "apply_mask":
        return OperatorCase(ops.apply_mask.default, [randn(N, M), pack_bits(mask)], (0,), lambda t, _: t * mask)
    if name == "masked_grad":
        twin = lambda g, x, _: (g.t() @ x) * mask  # noqa: E731
        return OperatorCase(ops.masked_grad.default, [g, x, pack_bits(mask)], (0, 1), twin)
    if name == "sampled_product":
        index = support(N * M, 9)
        twin = lambda a, b, i: torch.stack([a[:, k // M] @ b[:, k % M] for k in i.tolist()])  # noqa: E731
        return OperatorCase(ops.sampled_product.default, [g, x, index], (0, 1), twin)
    if name == "channel_grad":
        rows = torch.tensor([3, 0, 4])
        return OperatorCase(
            ops.channel_grad.default,
            [g, x, rows],
            (0, 1),
            lambda g, x, _: torch.stack([g[:, k] for k in (3, 0, 4)]) @ x,
        )
    if name == "channel_grad_all":
        return OperatorCase(ops.channel_grad.default, [g, x, None], (0, 1), lambda g, x, _: g.t() @ x)
    if name == "skinny_rows":
        return OperatorCase(ops.skinny_products.default, [x, randn(2, M), None], (0, 1), lambda x, r, _: (x @ r.t(),))
    if name == "skinny_factor":
        twin = lambda x, _, f: (f.t() @ x,)  # noqa: E731
        return OperatorCase(ops.skinny_products.default, [x, None, randn(tokens, 2)], (0, 2), twin)
    assert name == "skinny_both"
    twin = lambda x, r, f: (x @ r.t(), f.t() @ x)  # noqa: E731
    return OperatorCase(ops.skinny_products.default, [x, randn(2, M), randn(tokens, 2)], (0, 1, 2), twin)


PRODUCTS = (
    "apply_mask", "masked_grad", "sampled_product", "channel_grad", "channel_grad_all", "skinny_rows", "skinny_factor",
    "skinny_both",
)  # fmt: skip


def embedding(shape: Shape) -> OperatorCase:
    """Three of seven rows train; the padding is one of them, and its tokens give it no gradient."""
    index, padding = torch.tensor([0, 2, 5]), 2
    ids = torch.randint(0, M, shape or (1,))
    ids.view(-1)[:1] = 5

    def twin(ids, weight, block, index, padding):
        whole = at(weight, 0, index, block)
        seen = torch.nn.functional.one_hot(ids, M).to(weight.dtype)
        still = torch.zeros(M, dtype=weight.dtype).index_fill(0, torch.tensor([padding]), 1)
        return seen @ (whole * (1 - still)[:, None] + whole.detach() * still[:, None])

    block = randn(3, N)
    arguments = [ids, randn(M, N).index_copy(0, index, block), block, index, padding]
    return OperatorCase(torch.ops.sparsify.partial_embedding.default, arguments, (1, 2), twin)


def chunked_loss(shape: Shape, bias: bool, cap: float) -> OperatorCase:
    """Of which no gradient is made on the way: those are no functions of anything, and tried in test_chunked_loss.py."""
    tokens = 1
    for size in shape:
        tokens *= size
    target = torch.arange(tokens) % (N + 1) - 1  # -1 counts nothing

    def twin(x, w, b, target, gain, cap, ignore, chunk, d_x, d_weight):  # type: ignore[no-untyped-def]
        z = gain * linear(x, w, b)
        z = cap * torch.tanh(z) if cap else z
        of_class = torch.nn.functional.one_hot(target.clamp(min=0), N) * (target >= 0)[:, None]
        return (-(of_class * torch.log_softmax(z, 1)).sum(),)

    return OperatorCase(
        torch.ops.sparsify.chunked_loss.default,
        [randn(tokens, M), randn(N, M), randn(N) if bias else None, target, 0.7, cap, -1, 2, False, False],
        (0, 1, 2) if bias else (0, 1),
        twin,
    )


def low_rank_embedding(shape: Shape) -> OperatorCase:
    ids = torch.randint(0, M, shape or (1,))

    def twin(ids, weight, a, b, scale, padding):
        return torch.nn.functional.one_hot(ids, M).to(weight.dtype) @ (weight + scale * (b @ a))

    arguments = [ids, randn(M, N), randn(RANK, N), randn(M, RANK), SCALE, -1]
    return OperatorCase(torch.ops.sparsify.lowrank_embedding.default, arguments, (1, 2, 3), twin)


def low_rank_conv(shape: Shape, bias: bool) -> OperatorCase:
    """As many sounds as there are tokens."""

    def twin(x, weight, bias, a, b, scale, stride, padding, dilation):
        whole = weight + scale * (b @ a).view(weight.shape)
        return torch.nn.functional.conv1d(x, whole, bias, stride, padding, dilation)

    x, weight = randn(tokens_of(shape), 3, M), randn(N, 3, 2)
    arguments = [x, weight, randn(N) if bias else None, randn(RANK, 6), randn(N, RANK), SCALE, [2], [1], [2]]
    leaves = (0, 1, 2, 3, 4) if bias else (0, 1, 3, 4)
    return OperatorCase(torch.ops.sparsify.lowrank_conv.default, arguments, leaves, twin)


def kernel_columns(shape: Shape, bias: bool) -> OperatorCase:
    """Two of three input channels train, of kernels with two taps; one sound at least (torch's own second derivative of none is none)."""
    index = torch.tensor([0, 1, 4, 5])

    def twin(x, weight, bias, block, index, stride, padding, dilation):
        whole = at(weight.reshape(N, 6), 1, index, block).reshape(weight.shape)
        return torch.nn.functional.conv1d(x, whole, bias, stride, padding, dilation)

    x, weight = randn(tokens_of(shape) or 1, 3, M), randn(N, 3, 2)
    arguments = [x, weight, randn(N) if bias else None, randn(N, 4), index, [2], [1], [2]]
    return OperatorCase(torch.ops.sparsify.partial_conv.default, arguments, (0, 1, 2, 3) if bias else (0, 1, 3), twin)


Build = Callable[[Shape, bool], OperatorCase]


def _cases() -> dict[str, Build]:
    found: dict[str, Build] = {}
    for side, axis in AXES.items():
        for index in (False, True):
            for dx in (False, True):
                for turned in (False, True):
                    name = f"partial{'_at' if index else ''}{'_dx' if dx else ''}_{side}{'_turned' if turned else ''}"
                    found[name] = lambda s, b, o=(axis, index, dx, turned): partial(s, b, *o)
    for sparse, lora in ((False, False), (True, False), (False, True), (True, True)):
        for dx in (False, True):
            for turned in (False, True):
                parts = "+".join(n for n, on in (("sparse", sparse), ("lora", lora)) if on) or "frozen"
                name = f"sparse_lowrank{'_dx' if dx else ''}_{parts}{'_turned' if turned else ''}"
                found[name] = lambda s, b, o=(sparse, lora, dx, turned): sparse_lowrank(s, b, *o)
    mixed = [("nf4", "rows", False, True), ("nf4", "columns", False, False), ("int8", None, True, True)]
    mixed += [("int8", "columns", True, True), ("int8", "rows", True, False), ("int4", None, False, True)]
    mixed += [("int4", "columns", False, False), ("nf4", None, True, False)]
    for format, side, sparse, lora in mixed:
        for dx in (False, True):
            for turned in (False, True):
                parts = "+".join(n for n, on in ((side, side), ("sparse", sparse), ("lora", lora)) if on and n)
                name = f"quantized_{format}{'_dx' if dx else ''}_{parts}{'_turned' if turned else ''}"
                found[name] = lambda s, b, o=(format, side, sparse, lora, dx, turned): quantized(s, b, *o)
    for turned in (False, True):
        found[f"masked{'_turned' if turned else ''}"] = lambda s, b, t=turned: masked_linear(s, b, t)
    for side, axis in AXES.items():
        for index in (False, True):
            for turned in (False, True):
                name = f"grouped_partial{'_at' if index else ''}_{side}{'_turned' if turned else ''}"
                found[name] = lambda s, b, o=(axis, index, turned): grouped_partial(s, *o)
    for sparse, lora in ((False, False), (True, False), (False, True), (True, True)):
        for turned in (False, True):
            parts = "+".join(n for n, on in (("sparse", sparse), ("lora", lora)) if on) or "frozen"
            name = f"grouped_sparse_lowrank_{parts}{'_turned' if turned else ''}"
            found[name] = lambda s, b, o=(sparse, lora, turned): grouped_sparse_lowrank(s, *o)
    for product in GROUPED_PRODUCTS:
        found[product] = lambda s, b, n=product: grouped_products(s, n)
    found["partial_embedding"] = lambda s, b: embedding(s)
    found["lowrank_embedding"] = lambda s, b: low_rank_embedding(s)
    found["lowrank_conv"], found["partial_conv"] = low_rank_conv, kernel_columns
    found["chunked_loss"], found["chunked_loss_capped"] = (lambda s, b, c=c: chunked_loss(s, b, c) for c in (0.0, 1.5))
    for product in PRODUCTS:
        found[product] = lambda s, b, n=product: products(s, n)
    return found


CASES = _cases()

#: Each operator in one form or two.
ONE_OF_EACH = [
    "partial_columns", "partial_at_rows_turned", "partial_dx_rows", "partial_at_dx_columns", "sparse_lowrank_sparse+lora",
    "sparse_lowrank_dx_sparse+lora_turned", "quantized_nf4_rows+lora", "quantized_int8_columns+sparse+lora",
    "quantized_int8_dx_rows+sparse_turned", "quantized_int4_columns", "masked", "masked_turned", "apply_mask",
    "masked_grad", "sampled_product", "channel_grad", "channel_grad_all", "skinny_rows", "skinny_factor", "skinny_both",
    "grouped_partial_columns", "grouped_partial_at_rows_turned", "grouped_sparse_lowrank_sparse+lora_turned", "grouped_linear",
    "grouped_outer", "grouped_sampled", "partial_embedding", "lowrank_embedding", "lowrank_conv", "partial_conv",
    "chunked_loss_capped",
]  # fmt: skip


def case_of(name: str, shape: Shape = (3,), bias: bool = True) -> OperatorCase:
    """The case `name` for inputs `(*shape, channels)`, the same numbers in every process."""
    torch.manual_seed(zlib.crc32(f"{name} {shape} {bias}".encode()))
    return CASES[name](shape, bias)
