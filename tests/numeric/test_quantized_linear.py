"""`sparsify::quantized_linear` against the formula on the unpacked weight, and what packing keeps, saves and forgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import sparsify.ops.quantized_linear as ops
from sparsify.errors import PlanError
from sparsify.formats import FORMATS, pack, packed_bytes, unpack
from sparsify.ops.skinny_products import reduced

N, M, RANK, COUNT, SCALE = 12, 18, 3, 20, 0.7
SHAPES = [(7, M), (2, 3, M), (2, 1, 3, M), (M,), (0, M), (2, 0, M)]
PARTS = [
    frozenset(),
    frozenset({"columns"}),
    frozenset({"rows"}),
    frozenset({"sparse"}),
    frozenset({"lora"}),
    frozenset({"sparse", "lora"}),
    frozenset({"columns", "lora"}),
    frozenset({"rows", "sparse", "lora"}),
]
ids = {"ids": lambda parts: "+".join(sorted(parts)) or "none"}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Case:
    """Arguments of the operator; entries of a block and of a support do not overlap."""

    x: Tensor
    format: str
    packed: list[Tensor]
    bias: Tensor | None
    block: Tensor | None
    channels: Tensor | None
    axis: int
    values: Tensor | None
    index: Tensor | None
    a: Tensor | None
    b: Tensor | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return (M, N) if self.transposed else (N, M)

    def call(self) -> Tensor:
        return torch.ops.sparsify.quantized_linear(
            self.x, self.format, *self.shape, self.transposed, self.bias, self.block, self.channels, self.axis, self.values,
            self.index, self.a, self.b, SCALE, self.packed,
        )  # fmt: skip

    def trained(self) -> list[Tensor]:
        return [t for t in (self.x, self.bias, self.block, self.values, self.a, self.b) if t is not None]

    def oracle(self) -> tuple[Tensor, list[Tensor]]:
        dtype = self.x.dtype
        leaves = {
            name: getattr(self, name).detach().to(dtype).double().requires_grad_(True)
            for name in ("x", "bias", "block", "values", "a", "b")
            if getattr(self, name) is not None
        }
        weight = unpack(self.packed, self.format, self.shape, dtype).double()
        if "block" in leaves:
            logical = weight.t() if self.transposed else weight
            logical = logical.index_copy(self.axis, self.channels, leaves["block"])
            weight = logical.t() if self.transposed else logical
        if "values" in leaves:
            weight = weight.flatten().index_put((self.index.long(),), leaves["values"]).view(weight.shape)
        weight = weight.t() if self.transposed else weight
        if "a" in leaves:
            weight = weight + SCALE * leaves["b"] @ leaves["a"]
        y = leaves["x"] @ weight.t()
        return y + leaves["bias"] if "bias" in leaves else y, list(leaves.values())


def make(
    parts: frozenset[str],
    format: str = "nf4",
    transposed: bool = False,
    shape: tuple[int, ...] = (7, M),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> Case:
    master = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    def leaf(*size: int, of: torch.dtype = master) -> Tensor:
        return torch.randn(*size, dtype=torch.float64).mul(0.5).to(of).requires_grad_(True)

    stored = torch.randn((M, N) if transposed else (N, M), dtype=torch.float64).to(dtype)
    axis = 0 if "rows" in parts else 1
    channels = torch.tensor([9, 0, 4, 7]) if parts & {"rows", "columns"} else None
    free = torch.ones(N, M, dtype=torch.bool)
    if channels is not None:
        free.index_fill_(axis, channels, False)
    places = (free.t() if transposed else free).flatten().nonzero().flatten()
    index = places[torch.randperm(len(places))[:COUNT]].sort().values.int()
    sparse, lora = "sparse" in parts, "lora" in parts
    return Case(
        x=leaf(*shape, of=dtype),
        format=format,
        packed=pack(stored, format),
        bias=leaf(N, of=dtype) if bias else None,
        block=None if channels is None else leaf(*((4, M) if axis == 0 else (N, 4))),
        channels=channels,
        axis=axis,
        values=leaf(COUNT) if sparse else None,
        index=index if sparse else None,
        a=leaf(RANK, M) if lora else None,
        b=leaf(N, RANK) if lora else None,
        transposed=transposed,
    )


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = float(expected.detach().abs().max().clamp_min(1.0)) if expected.numel() else 1.0
    assert found.shape == expected.shape
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=0, atol=TOLERANCE[dtype] * scale * 4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("parts", PARTS, **ids)
def test_forward_and_backward_equal_the_formula(parts, transposed, format):
    for dtype in TOLERANCE:
        for shape in SHAPES:
            case = make(parts, format, transposed, shape, dtype, bias=shape != (2, 3, M))
            expected, leaves = case.oracle()
            y = case.call()
            assert y.dtype == dtype
            close(y, expected, dtype)
            g = torch.randn(y.shape, dtype=torch.float64).to(dtype)
            wanted = torch.autograd.grad(expected, leaves, g.double())
            found = torch.autograd.grad(y, case.trained(), g)
            for leaf, ours, theirs in zip(case.trained(), found, wanted, strict=True):
                assert ours.dtype == leaf.dtype
                close(ours, theirs, dtype)


@pytest.mark.parametrize(
    ("parts", "format", "transposed"),
    [(PARTS[1], "int8", False), (PARTS[5], "nf4", True), (PARTS[7], "int4", False)],
    ids=["columns-int8", "sparse+lora-nf4-conv1d", "all-int4"],
)
def test_operators_pass_opcheck(parts, format, transposed):
    case = make(parts, format, transposed, (2, 3, M))
    frozen = [
        None if t is None else t.detach() for t in (case.block, case.channels, case.values, case.index, case.a, case.b)
    ]
    block, channels, values, index, a, b = (case.block, case.channels, case.values, case.index, case.a, case.b)
    head = (format, *case.shape, transposed)
    args = (case.x, *head, case.bias, block, channels, case.axis, values, index, a, b, SCALE, case.packed)
    torch.library.opcheck(torch.ops.sparsify.quantized_linear.default, args)
    block, channels, values, index, a, b = frozen
    g = torch.randn(2, 3, N)
    low = None if b is None else reduced(g, b.t())
    args = (g, *head, block, channels, case.axis, values, index, low, a, SCALE, case.packed)
    torch.library.opcheck(torch.ops.sparsify.quantized_linear_dx.default, args)


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_computes_in_16_bits_and_keeps_the_gradients_in_32(format):
    case = make(PARTS[5], format)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.call()
    assert y.dtype == torch.bfloat16
    close(y, case.oracle()[0], torch.bfloat16)
    for leaf, g in zip(case.trained(), torch.autograd.grad(y.float().sum(), case.trained()), strict=True):
        assert g.dtype == leaf.dtype == torch.float32


def kept_by(case: Case) -> list[Tensor]:
    tensors = [*case.packed, case.bias, case.block, case.channels, case.values, case.index, case.a, case.b]
    known = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    kept: list[Tensor] = []

    def save(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        y = case.call()
    assert y.requires_grad
    return kept


@pytest.mark.parametrize("parts", PARTS, **ids)
def test_saved_for_backward_is_the_input_or_its_slice_and_never_the_weight(parts):
    case = make(parts, "int8", False, (2, 3, M))
    kept = kept_by(case)
    if not parts:
        assert kept == []
    elif parts == {"columns"}:
        assert [t.shape for t in kept] == [(2, 3, 4)]
        assert kept[0].untyped_storage().nbytes() == 6 * 4 * 4
    else:
        assert [t.data_ptr() for t in kept] == [case.x.data_ptr()]


@pytest.mark.parametrize("format", FORMATS)
def test_at_most_one_dense_layer_is_alive(format, monkeypatch):
    """Whatever is unpacked dies before the next layer is unpacked, in the forward and in the backward."""
    alive: list[StorageWeakRef] = []
    calls = []

    def spy(packed: list[Tensor], *rest: Any) -> Tensor:
        assert all(ref.expired() for ref in alive), "an earlier layer's dense weight is still alive"
        dense = unpack(packed, *rest)
        alive.append(StorageWeakRef(dense.untyped_storage()))
        calls.append(tuple(dense.shape))
        return dense

    monkeypatch.setattr(ops, "unpack", spy)
    x = torch.randn(5, 16, requires_grad=True)
    y = x
    for _ in range(4):
        a, b = torch.randn(2, 16, requires_grad=True), torch.randn(16, 2, requires_grad=True)
        packed = pack(torch.randn(16, 16), format)
        y = torch.ops.sparsify.quantized_linear(
            y, format, 16, 16, False, None, None, None, 1, None, None, a, b, 1.0, packed
        ).tanh()
    assert all(ref.expired() for ref in alive), "nothing dense may outlive the forward"
    y.sum().backward()
    assert calls == [(16, 16)] * 8
    assert all(ref.expired() for ref in alive)


# --- packing -------------------------------------------------------------------------------------------------------------

ERROR = {"nf4": 0.12, "int8": 0.012, "int4": 0.14}
BITS = {"nf4": 4.2, "int8": 8.6, "int4": 4.6}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(5, 7), (64, 48), (32, 48), (13, 70), (36, 44), (48, 36), (1, 128), (128, 1)], ids=str
)
def test_unpacking_is_near_the_weight_for_every_shape(shape, format, dtype):
    """bitsandbytes' CPU kernel (0.50.2) mixes up the scales of rows shorter than a block, 48 wide for example."""
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    back = unpack(pack(weight, format), format, shape, dtype)
    assert back.dtype == dtype
    assert back.shape == shape
    assert back.is_contiguous()
    assert float((back - weight).double().norm() / weight.double().norm()) < ERROR[format]


@pytest.mark.parametrize("format", FORMATS)
def test_unpacking_needs_the_packed_tensors_only_and_is_deterministic(format):
    weight = torch.randn(24, 40)
    packed = pack(weight, format)
    copies = [t.clone() for t in packed]
    weight.zero_()
    first = unpack(copies, format, (24, 40), torch.float32)
    assert torch.equal(first, unpack(packed, format, (24, 40), torch.float32))
    first.zero_()  # a fresh tensor each time
    assert unpack(packed, format, (24, 40), torch.float32).abs().max() > 1


@pytest.mark.parametrize("format", FORMATS)
def test_bits_per_weight(format):
    packed = pack(torch.randn(512, 512), format)
    bits = 8 * packed_bytes(packed) / 512**2
    assert bits < BITS[format]
    assert packed_bytes(packed) == sum(math.prod(t.shape) * t.element_size() for t in packed)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zero_and_a_constant_row_is_exact_enough(format):
    weight = torch.zeros(6, 64)
    weight[2] = 0.5
    back = unpack(pack(weight, format), format, (6, 64), torch.float32)
    assert torch.equal(back[[0, 1, 3, 4, 5]], weight[[0, 1, 3, 4, 5]])
    torch.testing.assert_close(back[2], weight[2], atol=0.04, rtol=0)


def test_transposed_weights_and_views_pack_by_value():
    weight = torch.randn(48, 36).t()
    for format in FORMATS:
        a, b = pack(weight, format), pack(weight.contiguous(), format)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_unknown_formats_are_refused():
    with pytest.raises(PlanError, match="unknown format 'fp3'"):
        pack(torch.randn(4, 4), "fp3")
    with pytest.raises(PlanError, match="unknown format 'fp3'"):
        unpack([], "fp3", (4, 4), torch.float32)


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch):
    import sys

    from sparsify.formats import libraries

    for loader, module, name in (
        (libraries.bitsandbytes, "bitsandbytes.functional", "bitsandbytes"),
        (libraries.torchao_primitives, "torchao.quantization", "torchao"),
    ):
        loader.cache_clear()
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(PlanError, match=f"needs {name}: pip install"):
            loader()
        monkeypatch.undo()
        loader.cache_clear()


def test_linear_of_the_dequantised_weight_is_the_same():
    weight, x = torch.randn(N, M), torch.randn(5, M)
    for format in FORMATS:
        packed = pack(weight, format)
        y = torch.ops.sparsify.quantized_linear(
            x, format, N, M, False, None, None, None, 1, None, None, None, None, 1.0, packed
        )
        torch.testing.assert_close(y, nn.functional.linear(x, unpack(packed, format, (N, M), torch.float32)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_a_sparse_part_over_a_block_takes_its_entries_gradients(side: str, transposed: bool) -> None:
    """The values are written last: where they lie on trained channels, the block is not seen and gets no gradient."""
    case = make(frozenset({side, "sparse"}), "int8", transposed, dtype=torch.float64)
    assert case.channels is not None
    assert case.block is not None
    logical = torch.zeros(N, M, dtype=torch.bool).index_fill(case.axis, case.channels, True)
    covered = (logical.t() if transposed else logical).flatten().nonzero().flatten()[::3]
    free = case.index[COUNT // 2 :]  # type: ignore[index]
    case.index = torch.cat([covered.int(), free]).unique()
    case.values = torch.randn(case.index.numel(), dtype=torch.float64).requires_grad_(True)
    y = case.call()
    g = torch.randn_like(y)
    y.backward(g)
    expected, leaves = case.oracle()
    expected.backward(g)
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    for found, leaf in zip(case.trained(), leaves, strict=True):
        torch.testing.assert_close(found.grad, leaf.grad, rtol=1e-10, atol=1e-12)
    assert int((case.block.grad == 0).sum()) == covered.numel()
