"""The forward over a packed NF4, int8 or int4 base in one launch, in Triton's interpreter, against the fp64 formula on the
unpacked weight; and where it must not serve. bf16 is checked on a GPU (`test_on_gpu.py`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor
from triton_interpreter import count_launches

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

import sparsify
from sparsify import Plan, Quantize, RoSA
from sparsify.formats import FORMATS, pack, unpack
from sparsify.kernels.gpu import launch
from sparsify.kernels.gpu.build import TritonError
from sparsify.ops import dispatch

SCALE = 0.7
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights have dense supports; the choice by density has a test of its own."""
    monkeypatch.setattr(dispatch, "ONE_PASS_DENSITY", {64: 1.0})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """Kernels launched in the interpreter, by operator."""
    return count_launches(monkeypatch, tmp_path_factory.getbasetemp() / "kernels")


@dataclass
class Case:
    """Arguments of `sparsify::quantized_linear` over a weight (n, m); `base` is the weight that packing made."""

    x: Tensor
    format: str
    base: Tensor
    packed: list[Tensor]
    bias: Tensor | None
    block: Tensor | None
    channels: Tensor | None
    axis: int
    values: Tensor | None
    index: Tensor | None
    a: Tensor | None
    b: Tensor | None

    @classmethod
    def make(
        cls,
        format: str,
        n: int,
        m: int,
        tokens: int,
        parts: set[str],
        dtype: torch.dtype = torch.float32,
        rank: int = 5,
    ) -> Case:
        weight = torch.randn(n, m)
        packed = pack(weight, format)
        base = unpack(packed, format, (n, m), torch.float32)
        axis = 0 if "rows" in parts else 1
        channels = torch.randperm((n, m)[axis])[:3].sort().values if parts & {"rows", "columns"} else None
        free = torch.ones(n, m, dtype=torch.bool)
        if channels is not None:
            free.index_fill_(axis, channels, False)
        open_places = free.flatten().nonzero().flatten()
        count = min(60, open_places.numel() // 3)
        index = (
            open_places[torch.randperm(open_places.numel())[:count]].sort().values.int() if "sparse" in parts else None
        )
        return cls(
            torch.randn(tokens, m).to(dtype), format, base, packed,
            torch.randn(n).to(dtype) if "bias" in parts else None,
            None if channels is None else torch.randn(*((3, m) if axis == 0 else (n, 3))),
            channels, axis,
            None if index is None else torch.randn(count),
            index,
            torch.randn(rank, m) if "lora" in parts else None,
            torch.randn(n, rank) if "lora" in parts else None,
        )  # fmt: skip

    def call(self, x: Tensor | None = None) -> Tensor:
        return torch.ops.sparsify.quantized_linear(
            self.x if x is None else x, self.format, *self.base.shape, False, self.bias, self.block, self.channels, self.axis,
            self.values, self.index, self.a, self.b, SCALE, self.packed,
        )  # fmt: skip

    def oracle(self) -> Tensor:
        """In fp64, on what 16-bit inputs hold; of low-rank parts `x Aᵀ` is rounded to x's type, as the library's GEMM does."""
        weight = self.base.double()
        if self.block is not None and self.channels is not None:
            weight = weight.index_copy(self.axis, self.channels, self.block.double())
        if self.values is not None and self.index is not None:
            weight = weight.flatten().index_copy(0, self.index.long(), self.values.double()).view(weight.shape)
        y = self.x.double() @ weight.t()
        if self.a is not None and self.b is not None:
            y = y + SCALE * (self.x @ self.a.to(self.x.dtype).t()).double() @ self.b.double().t()
        return y if self.bias is None else y + self.bias.double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


ALL = {"bias", "sparse", "lora"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp16"])
@pytest.mark.parametrize(("n", "m", "tokens"), [(37, 192, 1), (5, 64, 1), (70, 192, 3), (66, 128, 33)])
def test_one_pass(format: str, dtype: torch.dtype, n: int, m: int, tokens: int, launched: Counter[str]) -> None:
    case = Case.make(format, n, m, tokens, ALL, dtype)
    y = case.call()
    assert launched == {"quantized": 1}
    assert y.dtype == dtype
    assert error(y, case.oracle()) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(
    "parts", [set(), {"bias"}, {"sparse"}, {"lora"}, {"columns", "lora"}, {"rows", "lora", "bias"}]
)
def test_every_part(parts: set[str], tokens: int, launched: Counter[str]) -> None:
    case = Case.make("nf4", 20, 128, tokens, parts)
    assert error(case.call(), case.oracle()) < TOLERANCE[torch.float32]
    assert launched == {"quantized": 1}
    assert error(case.call(case.x.view(1, tokens, 128))[0], case.oracle()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rank", [1, 40, 200])
@pytest.mark.parametrize("tokens", [1, 2])
def test_ranks(rank: int, tokens: int, launched: Counter[str]) -> None:
    """Ranks that are no multiple of anything, and more than one program has threads."""
    case = Case.make("int4", 9, 64, tokens, {"lora"}, rank=rank)
    assert error(case.call(), case.oracle()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_longer_than_a_program_reads_at_once(tokens: int, launched: Counter[str]) -> None:
    """4096 columns in one step of four warps; and a nested scale of nf4 covers 256 · 64 weights, which end within a row."""
    case = Case.make("nf4", 6, 4096 + 192, tokens, ALL)
    assert len(case.packed[2]) == 2
    assert error(case.call(), case.oracle()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_support_with_empty_and_full_rows(tokens: int, launched: Counter[str]) -> None:
    """More entries in a row than a program takes at once, none in others, and a 64-bit index."""
    case = Case.make("int8", 11, 192, tokens, {"sparse"})
    case.index = torch.cat([torch.arange(2 * 192, 3 * 192), torch.tensor([10 * 192 + 191])])
    case.values = torch.randn(193)
    assert error(case.call(), case.oracle()) < TOLERANCE[torch.float32]
    case.index[-1] = 5 * 192  # written to in place: what was remembered of it is out of date
    case.values[-1] = 9.0
    case.index, order = case.index.sort()
    case.values = case.values[order]
    assert error(case.call(), case.oracle()) < TOLERANCE[torch.float32]


def test_what_is_remembered_of_an_index_follows_its_changes(launched: Counter[str]) -> None:
    index = torch.tensor([3, 70, 200])
    assert launch.row_starts(index, 4, 64).tolist() == [0, 1, 2, 2, 3]
    assert launch.row_starts(index, 4, 64) is launch.row_starts(index, 4, 64)
    index[1] = 10
    assert launch.row_starts(index, 4, 64).tolist() == [0, 2, 2, 2, 3]


def test_the_table_may_begin_anywhere(launched: Counter[str]) -> None:
    """The kernel or-s a place into the table's address, so the launcher must not hand on one that is not aligned."""
    case = Case.make("nf4", 7, 64, 1, {"bias"})
    moved = torch.zeros(17)
    moved[1:] = case.packed[4]
    case.packed[4] = moved[1:]
    assert case.packed[4].data_ptr() % 64 != 0
    assert error(case.call(), case.oracle()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_the_unpacked_weight(format: str, launched: Counter[str]) -> None:
    """Forward through the kernel; the backward is today's: unpacked for dX, a sampled product for the values."""
    case = Case.make(format, 20, 64, 6, ALL)
    leaves = {n: getattr(case, n).clone().requires_grad_() for n in ("x", "bias", "values", "a", "b")}
    exact = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    for name, leaf in leaves.items():
        setattr(case, name, leaf)
    y = case.call()
    assert launched["quantized"] == 1
    tiny.probe_loss(y).backward()
    weight = case.base.double().flatten().index_put((case.index.long(),), exact["values"]).view(20, 64)
    weight = weight + SCALE * exact["b"] @ exact["a"]
    tiny.probe_loss(exact["x"] @ weight.t() + exact["bias"]).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert error(leaf.grad, exact[name].grad) < 2e-5, name


def test_where_unpacking_serves(launched: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens, rows of broken blocks, weights stored transposed, no tokens, no kernels: as before, and right."""
    many, ragged = Case.make("nf4", 12, 64, 65, ALL), Case.make("nf4", 12, 80, 3, ALL)
    for case in (many, ragged):
        assert error(case.call(), case.oracle()) < TOLERANCE[torch.float32]
    nothing = Case.make("nf4", 12, 64, 0, set())
    assert nothing.call().shape == (0, 12)
    few = Case.make("nf4", 64, 64, 3, set())
    turned = torch.ops.sparsify.quantized_linear(
        few.x, "nf4", 64, 64, True, None, None, None, 0, None, None, None, None, 1.0, few.packed
    )
    assert error(turned, few.x.double() @ few.base.double()) < TOLERANCE[torch.float32]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert error(few.call(), few.oracle()) < TOLERANCE[torch.float32]
    assert "quantized" not in launched
    with pytest.raises(TritonError, match="65 tokens and 64 columns; takes 1 to 64 tokens"):
        launch.quantized_product(many.packed, "nf4", many.x, rows=12)


def test_dense_supports_are_unpacked_for_several_tokens(
    launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table itself: any density with one token, thinner supports with more."""
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for tokens, density, serves in (
        (1, 0.5, True), (2, 0.01, True), (2, 0.011, False), (16, 0.009, True), (17, 0.009, False), (64, 0.005, True),
        (64, 0.006, False), (64, 0.0, True),
    ):  # fmt: skip
        x, index = torch.randn(tokens, 256), torch.arange(round(density * 1000 * 256))
        assert dispatch.quantized_serves(x, 1000, 256, False, index) == serves, (tokens, density)
    assert dispatch.quantized_serves(torch.randn(64, 256), 1000, 256, False, None)


def test_a_model_over_nf4_decodes_in_one_launch_per_linear(
    launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RoSA over NF4: every adapted linear whose rows are whole blocks is one launch, and logits are those of the other path."""
    model = tiny.llama(
        hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=1
    )  # fmt: skip
    plan = Plan([Quantize(format="nf4"), RoSA(rank=2, density=0.02, mask="random")])
    host = sparsify.compile(model, plan, progress=False)
    tiny.disturb(host)
    ids = tiny.tokens(1, 5)
    with torch.no_grad():
        found = host(ids).logits
        assert launched == {"quantized": 7}
        monkeypatch.delenv("TRITON_INTERPRET")
        torch.testing.assert_close(found, host(ids).logits, rtol=1e-4, atol=1e-4)
