"""Operators of inference called directly: whatever does not fit is refused before native code reads it, and what fits is right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import require_interpreter

from sparsify.errors import OperatorError, RefusedError, SparsifyError
from sparsify.kernels import checked_once
from sparsify.kernels.cpu import build, sampled, skinny
from sparsify.kernels.cpu.formats import Bitmask, FormatError, pack, pack_int8, quantize_int8
from sparsify.kernels.cpu.operator import dense_product
from sparsify.kernels.gpu import operator as gpu_operator
from sparsify.kernels.gpu.formats import pack_blocks, pack_stream, pack_two_four
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear
from sparsify.lowering.cpu.sparse_linear import SparseLinear
from sparsify.lowering.cuda.gpu_linear import GpuSparseLinear

PACKED, GPU = torch.ops.sparsify.packed_linear, torch.ops.sparsify.gpu_linear
ROWS, COLS = 32, 130


def weight_of(rows: int = ROWS, cols: int = COLS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, cols, generator=generator) < 0.25
    return torch.randn(rows, cols, generator=generator) * kept


def arguments(**changes: Any) -> dict[str, Any]:
    """Those of `packed_linear` for a float weight, by name."""
    packed = pack(weight_of())
    found = {"x": torch.randn(8, COLS, generator=torch.Generator().manual_seed(1))}
    found |= {name: getattr(packed, name) for name in ("masks", "values", "panel_ptr", "scales")}
    found |= {"row_sums": None, "bias": torch.linspace(-1, 1, ROWS), "residual": None, "rows": ROWS, "cols": COLS}
    return {**found, "group": 0, "activation": "none", "gated": False, "int8": False, **changes}


def int8_arguments(group: int = 0, **changes: Any) -> dict[str, Any]:
    packed = pack_int8(*quantize_int8(weight_of(), group), group)
    tensors = {name: getattr(packed, name) for name in ("masks", "values", "panel_ptr", "scales")}
    return arguments(**{**tensors, "row_sums": packed.row_sums(), "int8": not group, "group": group, **changes})


def swapped_bits(masks: Tensor) -> Tensor:
    """Masks of as many bits in all, and other numbers of bits in two panels."""
    return masks.roll(1, 0).contiguous()


GOOD = arguments()
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "panel_ptr beyond the values": ({"panel_ptr": torch.full_like(GOOD["panel_ptr"], 1 << 40)}, "panel_ptr does not"),
    "panel_ptr negative": ({"panel_ptr": GOOD["panel_ptr"] - 1000}, "panel_ptr does not match"),
    "panel_ptr falling": ({"panel_ptr": GOOD["panel_ptr"].flip(0).contiguous()}, "panel_ptr does not match"),
    "panel_ptr of 32 bits": ({"panel_ptr": GOOD["panel_ptr"].int()}, "panel_ptr is torch.int32"),
    "panel_ptr too short": ({"panel_ptr": GOOD["panel_ptr"][:-1]}, "panel_ptr has shape"),
    "panel_ptr strided": ({"panel_ptr": GOOD["panel_ptr"].repeat_interleave(2)[::2]}, "panel_ptr is not contiguous"),
    "no values": ({"values": torch.zeros(0)}, "values need 96 elements"),
    "no padding": ({"values": GOOD["values"][:-96]}, "values are stored"),
    "values of another size": ({"values": torch.zeros(4096)}, "values are stored"),
    "values of two axes": ({"values": GOOD["values"].view(1, -1)}, "values need"),
    "values of 64 bits": ({"values": GOOD["values"].double()}, "values are torch.float64"),
    "values that are NaN": ({"values": torch.full_like(GOOD["values"], float("nan"))}, "a weight is NaN or Inf"),
    "values on meta": ({"values": GOOD["values"].to("meta")}, "different devices"),
    "no masks": ({"masks": GOOD["masks"][:0]}, "masks have shape"),
    "all bits set": ({"masks": torch.full_like(GOOD["masks"], -1)}, "a mask bit is set beyond column|panel_ptr"),
    "bits in other panels": ({"masks": swapped_bits(GOOD["masks"])}, "panel_ptr does not match"),
    "bits beyond the columns": ({"cols": 129, "x": torch.randn(8, 129)}, "a mask bit is set beyond column 129"),
    "masks of 32 bits": ({"masks": GOOD["masks"].int()}, "masks are torch.int32"),
    "masks strided": ({"masks": GOOD["masks"].transpose(1, 2).contiguous().transpose(1, 2)}, "masks is not contiguous"),
    "more rows": ({"rows": 1 << 20, "bias": None}, "masks have shape"),
    "fewer rows": ({"rows": 31, "bias": None}, "a mask bit is set beyond row 31"),
    "no rows": ({"rows": 0, "bias": None}, "needs rows and columns|needs rows"),
    "negative rows": ({"rows": -32, "bias": None}, "needs rows and columns|needs rows"),
    "no columns": ({"cols": 0, "x": torch.zeros(8, 0)}, "needs rows and columns"),
    "more columns": ({"cols": 1000, "x": torch.randn(8, 1000)}, "masks have shape"),
    "x narrower": ({"x": torch.randn(8, COLS // 2)}, "x has"),
    "x of other columns": ({"x": torch.randn(8, 5, COLS - 1)}, "x has"),
    "x without axes": ({"x": torch.tensor(1.0)}, "x has"),
    "x of integers": ({"x": torch.ones(8, COLS, dtype=torch.int64)}, "x is torch.int64"),
    "x complex": ({"x": torch.ones(8, COLS, dtype=torch.complex64)}, "x is torch.complex64"),
    "bias of one": ({"bias": torch.zeros(1)}, "bias has shape"),
    "bias of two axes": ({"bias": torch.zeros(ROWS, 1)}, "bias has shape"),
    "bias of integers": ({"bias": torch.zeros(ROWS, dtype=torch.int32)}, "bias is torch.int32"),
    "residual of other rows": ({"residual": torch.zeros(7, ROWS)}, "residual has shape"),
    "residual of other columns": ({"residual": torch.zeros(8, ROWS - 1)}, "residual has shape"),
    "residual of more axes": ({"residual": torch.zeros(2, 8, ROWS)}, "residual has shape"),
    "residual of integers": ({"residual": torch.zeros(8, ROWS, dtype=torch.int64)}, "residual is torch.int64"),
    "an unknown activation": ({"activation": "tanh"}, "unknown activation 'tanh'"),
    "group of 3": ({"group": 3}, "group 3 is not a multiple"),
    "negative group": ({"group": -64}, "group -64 is not a multiple"),
    "int8 activations, float values": ({"int8": True}, "int8 activations need int8 values"),
    "scales for floats": ({"scales": torch.ones(ROWS)}, "scales belong to int8 values"),
    "row sums for floats": ({"row_sums": torch.zeros(ROWS, dtype=torch.int32)}, "row_sums belong to int8"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused(what: str) -> None:
    changes, expected = BAD[what]
    for _ in range(2):  # a refusal is not remembered as a pass
        with pytest.raises((FormatError, RuntimeError), match=expected):
            PACKED(**arguments(**changes))


def test_gated_weights_have_two_halves() -> None:
    packed = pack(weight_of(31))
    tensors = {name: getattr(packed, name) for name in ("masks", "values", "panel_ptr")}
    with pytest.raises(FormatError, match="gate and up rows, got 31"):
        PACKED(**arguments(**tensors, rows=31, bias=None, gated=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scales": None}, "int8 values need scales"),
        ({"scales": torch.ones(1)}, "scales have shape"),
        ({"scales": torch.ones(ROWS, dtype=torch.float64)}, "scales are torch.float64"),
        ({"scales": torch.full((ROWS,), float("inf"))}, "a scale is NaN or Inf"),
        ({"scales": torch.ones(2 * ROWS)[::2]}, "scales is not contiguous"),
        ({"row_sums": None}, "int8 activations need row_sums"),
        ({"row_sums": torch.zeros(ROWS, dtype=torch.int32)}, "row_sums are not the sums"),
        ({"row_sums": torch.zeros(3, dtype=torch.int32)}, "row_sums are torch.int32 of shape"),
        ({"row_sums": torch.zeros(ROWS)}, "row_sums are torch.float32"),
        ({"group": 64, "int8": True}, "a scale per row"),
    ],
)
def test_int8_weights_that_do_not_fit_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(FormatError, match=expected):
        PACKED(**int8_arguments(**changes))


def reference(found: dict[str, Any]) -> Tensor:
    """In float64, by unpacking."""
    exact = {name: t.double() if t is not None else None for name, t in found.items() if name in ("bias", "residual")}
    names = ("masks", "values", "panel_ptr", "scales")
    packed = Bitmask(ROWS, COLS, *(found[n] for n in names), found["group"], torch.float64)
    return dense_product(
        packed, found["x"].double(), exact["bias"], found["activation"], found["gated"], exact["residual"]
    )


FITS: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "x of three axes": {"x": torch.randn(2, 4, COLS)},
    "x of one axis": {"x": torch.randn(COLS)},
    "x strided": {"x": torch.randn(COLS, 8).t()},
    "x of every second": {"x": torch.randn(16, 2 * COLS)[::2, ::2]},
    "no tokens": {"x": torch.randn(0, COLS)},
    "x of 64 bits": {"x": torch.randn(8, COLS, dtype=torch.float64)},
    "x of 16 bits": {"x": torch.randn(8, COLS).half()},
    "x in bfloat16": {"x": torch.randn(8, COLS).bfloat16()},
    "x is NaN": {"x": torch.full((8, COLS), float("nan"))},
    "bias in bfloat16": {"bias": torch.linspace(-1, 1, ROWS).bfloat16()},
    "bias in float64": {"bias": torch.linspace(-1, 1, ROWS).double()},
    "bias strided": {"bias": torch.linspace(-1, 1, 2 * ROWS)[::2]},
    "one residual for all tokens": {"residual": torch.randn(1, ROWS)},
    "residual of one axis": {"residual": torch.randn(ROWS)},
    "residual of one number per token": {"residual": torch.randn(8, 1)},
    "residual strided": {"residual": torch.randn(ROWS, 8).t()},
    "residual in bfloat16": {"residual": torch.randn(8, ROWS).bfloat16()},
    "gated": {"gated": True, "activation": "silu", "residual": torch.randn(8, ROWS // 2)},
}


@pytest.mark.parametrize("form", ["float", "int8", "groups"])
@pytest.mark.parametrize("what", FITS)
def test_what_fits_is_right(what: str, form: str) -> None:
    make: Callable[..., dict[str, Any]] = arguments if form == "float" else int8_arguments
    found = make(**({"group": 64} if form == "groups" else {}), **FITS[what])
    found["int8"] = False  # activations as they are
    y, expected = PACKED(**found), reference(found)
    assert y.dtype == found["x"].dtype
    assert y.shape == expected.shape
    eps = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[y.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=eps * 10, equal_nan=True)


@pytest.mark.parametrize("shape", [(8, ROWS), (1, ROWS), (ROWS,), (8, 1), ()])
def test_gradients_of_what_is_added(shape: tuple[int, ...]) -> None:
    weight = weight_of()
    found = arguments(residual=torch.randn(shape))
    stream = pack_stream(weight)
    products: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda x, b, r: torch.nn.functional.linear(x, weight, b) + r,
        lambda x, b, r: PACKED(**{**found, "x": x, "bias": b, "residual": r}),
        lambda x, b, r: GPU(x, b, r, stream.format, ROWS, COLS, False, "none", stream.tensors),
    ]
    outer, gradients = torch.randn(8, ROWS), []
    for product in products:
        leaves = [found[name].detach().clone().requires_grad_() for name in ("x", "bias", "residual")]
        gradients.append(torch.autograd.grad(product(*leaves), leaves, outer))
    for others in gradients[1:]:
        for a, b in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_contents_are_checked_once_per_state(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    validate = Bitmask.validate
    monkeypatch.setattr(Bitmask, "validate", lambda self: calls.append(1) or validate(self))
    found = arguments()
    expected = PACKED(**found)
    for name in ("masks", "values"):
        found[name] = found[name].detach()  # another object of the same storage and version
    for tokens in (1, 3, 20):
        PACKED(**{**found, "x": torch.randn(tokens, COLS)})
    assert len(calls) == 1
    found["values"].mul_(2.0)
    torch.testing.assert_close(PACKED(**{**found, "bias": None}), 2 * (expected - found["bias"]), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    found["panel_ptr"][1] += 1
    with pytest.raises(FormatError, match="panel_ptr does not match"):
        PACKED(**found)
    with torch.inference_mode():
        unseen = {name: found[name].clone() for name in ("masks", "values")}
        unseen["panel_ptr"] = pack(weight_of()).panel_ptr
        PACKED(**{**found, **unseen})
        unseen["masks"].fill_(-1)  # no version counter tells
        with pytest.raises(FormatError, match="a mask bit"):
            PACKED(**{**found, **unseen})


def test_a_storage_that_was_emptied_is_another_state() -> None:
    found = arguments()
    PACKED(**found)
    before = checked_once.state_of(found["values"])
    found["values"].untyped_storage().resize_(0)
    assert checked_once.state_of(found["values"]) != before


def test_operators_pass_the_checks_of_torch() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x = torch.randn(3, COLS, requires_grad=True)
    for found in (arguments(x=x, residual=torch.randn(3, ROWS)), int8_arguments(x=x.detach(), activation="relu")):
        torch.library.opcheck(PACKED.default, (), found, test_utils=tests)
    packed = pack_stream(weight_of(ROWS, 128))
    sizes = (packed.format, packed.rows, packed.cols, False, "none", packed.tensors)
    x = torch.randn(3, 128)
    torch.library.opcheck(GPU.default, (x, torch.randn(ROWS), torch.randn(1, ROWS), *sizes), test_utils=tests)
    layer = PrepackedLinear(torch.randn(ROWS, COLS), torch.randn(ROWS))
    x = torch.randn(3, COLS)
    operator = torch.ops.sparsify.prepacked_linear.default
    torch.library.opcheck(operator, (x, layer.bias, ROWS, layer.handle), test_utils=tests)


# --- the module ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "residual", "expected"),
    [
        (torch.randn(4, COLS - 1), None, "x has shape"),
        (torch.randn(()), None, "x has shape"),
        (torch.ones(4, COLS, dtype=torch.int32), None, "x is torch.int32"),
        (torch.randn(4, COLS, device="meta"), None, "on meta"),
        (torch.randn(4, COLS), torch.randn(3, ROWS), "residual has shape"),
    ],
)
def test_modules_refuse_what_operators_refuse(x: Tensor, residual: Tensor | None, expected: str) -> None:
    layer = SparseLinear(pack(weight_of()))
    with pytest.raises((FormatError, RefusedError), match=expected):
        layer(x, residual)


def test_modules_take_what_broadcasts_and_every_float() -> None:
    weight, x = weight_of(), torch.randn(4, COLS, dtype=torch.float64)
    layer = SparseLinear(pack(weight), torch.ones(ROWS))
    torch.testing.assert_close(layer(x), x @ weight.double().t() + 1, rtol=1e-12, atol=1e-12)
    residual = torch.randn(1, ROWS)
    torch.testing.assert_close(layer(x.float(), residual).double(), layer(x) + residual, rtol=1e-4, atol=1e-5)


def test_a_model_lowered_under_inference_mode_holds_tensors_that_count_their_changes() -> None:
    with torch.inference_mode():
        layers = (SparseLinear(pack(weight_of()), torch.ones(ROWS)), GpuSparseLinear(pack_stream(weight_of())))
        for layer in layers:
            packed = [tensor for name, tensor in layer.named_buffers() if name != "bias"]
            assert len(packed) >= 3
            assert not any(tensor.is_inference() for tensor in packed)
            y = layer(torch.ones(1, COLS))
            torch.testing.assert_close(y, layer.dense().sum(1)[None] + (layer.bias is not None), rtol=1e-4, atol=1e-5)


# --- oneDNN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"handle": 1 << 60}, "no longer exists"),
        ({"handle": -1}, "no longer exists"),
        ({"out_features": ROWS + 1}, "outputs"),
        ({"x": torch.randn(3, COLS + 1)}, "x has shape"),
        ({"x": torch.randn(())}, "x has shape"),
        ({"x": torch.randn(3, COLS).double()}, "x is torch.float64"),
        ({"bias": torch.randn(ROWS - 1)}, "bias is torch.float32 of shape"),
        ({"bias": torch.randn(ROWS).double()}, "bias is torch.float64"),
    ],
)
def test_prepacked_linears_refuse_what_does_not_fit(change: dict[str, Any], expected: str) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    layer = PrepackedLinear(torch.randn(ROWS, COLS), torch.randn(ROWS))
    given = {"x": torch.randn(3, COLS), "bias": layer.bias, "out_features": ROWS, "handle": layer.handle}
    torch.ops.sparsify.prepacked_linear(**given)
    with pytest.raises(SparsifyError, match=expected):
        torch.ops.sparsify.prepacked_linear(**{**given, **change})


# --- GPU formats, in Triton's interpreter -------------------------------------------------------------------------------


def two_four_weight() -> Tensor:
    fours = torch.randn(ROWS, 32, 4, generator=torch.Generator().manual_seed(0))
    return (fours * (fours.abs() >= fours.abs().topk(2, -1).values[..., -1:])).flatten(1)


def packed_tensors(form: str) -> tuple[str, list[Tensor]]:
    if form == "blocks":
        return form, pack_blocks(weight_of(ROWS, 128), 16, 16).tensors
    packed = pack_two_four(two_four_weight()) if form == "two_four" else pack_stream(weight_of(ROWS, 128))
    return form, packed.tensors


def changed(place: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda tensors: [change(t) if i == place else t for i, t in enumerate(tensors)]


DAMAGED = [
    ("gaps", changed(1, lambda t: torch.full_like(t, -1)), "lies outside of columns|stored twice"),
    ("gaps", changed(2, lambda t: t + 1000), "lies outside of columns"),
    ("gaps", changed(2, lambda t: t - 1000), "lies outside of columns"),
    ("gaps", changed(3, lambda t: t + 1), "start does not rise from 0"),
    ("gaps", changed(3, lambda t: t * 1000), "start ends at"),
    ("gaps", changed(4, lambda t: t + ROWS), "order names a row"),
    ("gaps", changed(4, lambda t: torch.zeros_like(t)), "not a permutation"),
    ("gaps", changed(0, lambda t: t[:-1]), "meta has shape"),
    ("gaps", changed(0, lambda t: t.double()), "values are torch.float64"),
    ("gaps", changed(1, lambda t: t.long()), "meta is torch.int64"),
    ("gaps", lambda tensors: tensors[:3], "3 tensors, expected 5"),
    ("gaps", lambda tensors: [*tensors, torch.ones(ROWS)], "scales belong to int8"),
    ("nonsense", lambda tensors: tensors, "unknown format 'nonsense'"),
    ("two_four", changed(3, lambda t: t.flip(0)), "start does not rise"),
    ("two_four", changed(1, lambda t: t[:1]), "meta has shape"),
    ("blocks", changed(1, lambda t: t + 100), "a tile lies outside"),
    ("blocks", changed(1, lambda t: t.long()), "column is torch.int64"),
    ("blocks", changed(2, lambda t: t * 50), "start ends at"),
    ("blocks", changed(0, lambda t: t[:, :3].contiguous()), "tiles of 3 × 16"),
    ("blocks", changed(0, lambda t: t[:, :0].contiguous()), "tiles of 0 × 16"),
]


@pytest.mark.parametrize(("form", "damage", "expected"), DAMAGED)
def test_gpu_weights_that_do_not_fit_are_refused(
    form: str, damage: Callable[[list[Tensor]], list[Tensor]], expected: str
) -> None:
    tensors = damage(packed_tensors("gaps" if form == "nonsense" else form)[1])
    with pytest.raises(FormatError, match=expected):
        GPU(torch.randn(2, 128), None, None, form, ROWS, 128, False, "none", tensors)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"x": torch.randn(2, 127)}, "x has 127 columns|x has"),
        ({"x": torch.ones(2, 128, dtype=torch.int64)}, "x is torch.int64"),
        ({"bias": torch.zeros(1)}, "bias is torch.float32 of shape"),
        ({"residual": torch.zeros(3, ROWS)}, "residual has shape"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"rows": 2 * ROWS}, "start has shape"),
        ({"rows": -ROWS}, "needs rows and columns|has shape"),
        ({"gated": True}, "order|gate and up rows|shape"),
    ],
)
def test_gpu_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], expected: str) -> None:
    form, tensors = packed_tensors("gaps")
    given = {"x": torch.randn(2, 128), "bias": None, "residual": None, "format": form, "rows": ROWS, "cols": 128}
    given |= {"gated": False, "activation": "none", "packed": tensors}
    GPU(**given)
    with pytest.raises(FormatError, match=expected):
        GPU(**{**given, **changes})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_gpu_products_in_every_float(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    require_interpreter()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    weight, x = weight_of(ROWS, 128), torch.randn(2, 3, 128).to(dtype)
    packed = pack_stream(weight)
    y = GPU(x, torch.ones(ROWS), torch.randn(1, 1).to(dtype) * 0, "gaps", ROWS, 128, False, "none", packed.tensors)
    tolerance = {torch.float16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t() + 1, rtol=tolerance, atol=tolerance)


def test_channel_gradients_refuse_channels_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    require_interpreter()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    grad, g, x = torch.ops.sparsify.channel_grad, torch.randn(6, 8), torch.randn(6, 5)
    assert gpu_operator.kernels_take(g, x)
    rows = torch.tensor([1, 7])
    torch.testing.assert_close(grad(g, x, rows), g[:, rows].t() @ x)
    rows[0] = 8
    with pytest.raises(SparsifyError, match="rows holds 8, a position outside"):
        grad(g, x, rows)
    for wrong in (torch.tensor([-1]), torch.tensor([1 << 40])):
        with pytest.raises(SparsifyError, match="a position outside"):
            grad(g, x, wrong)
    with pytest.raises(SparsifyError, match="g has 6 tokens, x 5"):
        grad(g, x[:5], None)
    with pytest.raises(OperatorError, match="rows is float32"):
        grad(g, x, torch.tensor([1.0]))


# --- training kernels ---------------------------------------------------------------------------------------------------


def test_training_kernels_refuse_what_does_not_fit() -> None:
    try:
        build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))
    x, rows, factor = torch.randn(64, 32), torch.randn(4, 32), torch.randn(64, 4)
    skinny.skinny_by_kernel(x, rows, factor)
    for arguments_of in (
        (x, rows[:, :31], None),
        (x, None, factor[:8]),
        (x, rows[:3], factor),
        (x, None, None),
        (x.double(), rows, factor),
        (x[0], rows, None),
    ):
        with pytest.raises(SparsifyError, match="skinny_products"):
            skinny.skinny_by_kernel(*arguments_of)
    y = torch.randn(64, 32)
    for low, second in ((factor[:8], rows), (factor[:, :3], rows), (factor, rows[:, :31])):
        with pytest.raises(SparsifyError, match="update"):
            skinny.update_by_kernel(y, low, second)
    index = torch.tensor([0, 5, 32 * 32 - 1])
    for a, b, places, words in (
        (x, x[:63], index, "sampled product: a"),
        (x, x.bfloat16(), index, "sampled product: a"),
        (x, x, index.float(), "positions are torch.float32"),
        (x, x[0], index, "sampled product: a"),
    ):
        with pytest.raises(OperatorError, match=words):
            sampled.sampled_by_kernel(a, b, places)
    weight = torch.zeros(32, 32)
    for values, places, words in (
        (torch.ones(2), index, "sparse part: "),
        (torch.ones(3).double(), index, "sparse part: "),
        (torch.ones(3), index.short(), "positions are torch.int16"),
    ):
        with pytest.raises(OperatorError, match=words):
            sampled.write_by_kernel(weight, values, places)


# --- under a sanitizer ----------------------------------------------------------------------------------------------------

SANITIZED = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
import test_inference_operators as t
from dataclasses import replace
from sparsify.kernels.cpu import dispatch

for make in (t.arguments, t.int8_arguments, lambda **changes: t.int8_arguments(64, **changes)):
    for what, changes in t.FITS.items():
        found = {**make(**changes), "int8": False}
        y, expected = t.PACKED(**found), t.reference(found)
        assert torch.allclose(y.double(), expected, rtol=0.04, atol=0.4, equal_nan=True), what
for what, (changes, _) in t.BAD.items():
    try:
        t.PACKED(**t.arguments(**changes))
    except (t.FormatError, RuntimeError):
        continue
    raise AssertionError(what)
t.test_training_kernels_refuse_what_does_not_fit()
print("calls done", flush=True)
packed = t.pack(t.weight_of())
cut = replace(packed, values=packed.values[:10].clone())  # not checked: the control
layer = dispatch.layer_struct(cut, None, None, "none", False)
dispatch.run_kernel(dispatch.kernels_for(packed), "gemv", layer, torch.randn(1, t.COLS), t.ROWS, None, 64)
"""


@pytest.mark.slow
def test_sanitizers_find_nothing_in_direct_calls(tmp_path: Path) -> None:
    """The calls of this file in a process whose kernels and memory are watched by AddressSanitizer; then one that it must find."""
    try:
        command, _ = build.find_compiler(None)
    except build.BuildError as error:
        pytest.skip(str(error))
    runtimes = []
    for name in ("libasan.so", "libstdc++.so"):  # the second, so that exceptions of torch can be thrown
        found = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip("the compiler has no sanitizer runtime")
        runtimes.append(found)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "CXX": f"{command[0]} -fsanitize=address -g",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:abort_on_error=1",
        "SPARSIFY_CACHE": str(tmp_path / "cache"),
    }
    here = Path(__file__).parent
    run = [sys.executable, "-c", SANITIZED, str(here), str(here.parent)]
    result = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=1800)
    assert "calls done" in result.stdout, (result.stdout + result.stderr)[-4000:]
    assert "AddressSanitizer" in result.stderr, "the control was not found"
    assert result.returncode != 0
