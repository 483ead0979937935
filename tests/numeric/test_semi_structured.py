"""The choice of PyTorch's semi-structured tensor for 2:4 weights and many tokens: when, once, and what happens where it fails.
The product itself needs a GPU (`test_on_gpu.py`); here the conversion is replaced by one that counts."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triton_interpreter import require_interpreter

pytest.importorskip("triton")

from sparsify.kernels.gpu import semi_structured
from sparsify.kernels.gpu.formats import Stream, pack_blocks, pack_stream, pack_two_four, quantize_int8
from sparsify.kernels.gpu.operator import packed_product
from sparsify.lowering.cuda.lower import lower_model

HALF = torch.float16


def two_four(rows: int, cols: int, dtype: torch.dtype = HALF) -> Tensor:
    fours = torch.randn(rows, cols // 4, 4)
    return (fours * (fours.abs() >= fours.abs().topk(2, -1).values[..., -1:])).view(rows, cols).to(dtype)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """Every weight that was converted; the converted one is the dense one, and every device can."""
    require_interpreter()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
    found: list[Tensor] = []

    def convert(weight: Tensor) -> Tensor:
        found.append(weight)
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    monkeypatch.setattr(semi_structured, "can_convert", lambda _device: True)
    return found


def call(packed: Stream, tokens: int, bias: Tensor | None = None, dtype: torch.dtype = HALF) -> tuple[Tensor, Tensor]:
    """(found, expected) with a fused activation and a residual."""
    x, residual = torch.randn(tokens, packed.cols).to(dtype), torch.randn(tokens, packed.rows).to(dtype)
    exact = F.linear(x, packed.unpack().to(dtype), None if bias is None else bias.to(dtype))
    return packed_product(packed, x, bias, residual, "silu"), F.silu(exact) + residual


def test_many_tokens_convert_once(conversions: list[Tensor]) -> None:
    packed, bias = pack_two_four(two_four(64, 128)), torch.randn(64)
    for tokens, expected in ((20, 0), (64, 1), (65, 1), (300, 1)):
        found, exact = call(packed, tokens, bias)
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)
        assert len(conversions) == expected
    assert torch.equal(conversions[0], packed.unpack())
    packed.values.mul_(2)
    found, exact = call(packed, 64, bias)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)
    assert len(conversions) == 2


def test_a_converted_weight_dies_with_the_packed_one(conversions: list[Tensor]) -> None:
    packed = pack_two_four(two_four(64, 128))
    before = len(semi_structured.converted)
    call(packed, 64)
    assert len(semi_structured.converted) == before + 1
    del packed
    gc.collect()
    assert len(semi_structured.converted) == before


def test_what_has_no_semi_structured_form(conversions: list[Tensor]) -> None:
    weight = two_four(64, 128, torch.float32)
    cases = {
        "it is not 2:4": pack_stream(weight.half()),
        "its values are fp32": pack_two_four(weight),
        "its values are int8": pack_two_four(*quantize_int8(weight), dtype=HALF),
        "48 × 128 is not whole tiles of 32 × 64": pack_two_four(weight[:48].half()),
        "64 × 96 is not whole tiles of 32 × 64": pack_two_four(two_four(64, 96)),
    }
    for reason, packed in cases.items():
        assert reason in semi_structured.why_not(packed)
        dtype = torch.float32 if "fp32" in reason else HALF
        found, exact = call(packed, 64, dtype=dtype)
        torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)
    assert semi_structured.why_not(pack_blocks(weight.half(), 16, 16)) == "it is not 2:4"
    assert semi_structured.why_not(pack_two_four(two_four(64, 128, torch.bfloat16))) == ""
    packed = pack_two_four(two_four(64, 128))
    found, exact = call(packed, 64, dtype=torch.float32)  # x of another type than the values
    torch.testing.assert_close(found, exact)
    assert not conversions


def test_a_failed_conversion_is_said_once_and_the_weight_expanded(
    conversions: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_weight: Tensor) -> Tensor:
        raise RuntimeError("cuSPARSELt is not supported on your machine\nmore")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    packed = pack_two_four(two_four(32, 64))
    with pytest.warns(UserWarning, match=r"expanded for many tokens \(RuntimeError: cuSPARSELt is not supported"):
        found, exact = call(packed, 64)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(packed, 64)


def test_no_device_without_sparse_tensor_cores_is_asked() -> None:
    assert not semi_structured.can_convert(torch.device("cpu"))
    packed = pack_two_four(two_four(32, 64))
    assert semi_structured.product(packed, torch.randn(64, 64).half(), None) is None


def test_the_report_says_what_many_tokens_do() -> None:
    linears = nn.Sequential(
        nn.Linear(128, 64, bias=False), nn.Linear(128, 48, bias=False), nn.Linear(128, 64, bias=False)
    ).half()
    with torch.no_grad():
        linears[0].weight.copy_(two_four(64, 128))
        linears[1].weight.copy_(two_four(48, 128))
        linears[2].weight.mul_(torch.rand(64, 128) < 0.2)
    first, second, third = str(lower_model(linears)).splitlines()[2:5]
    assert first.endswith("; from 64 tokens on sparse tensor cores")
    assert second.endswith("; from 64 tokens expanded: 48 × 128 is not whole tiles of 32 × 64")
    assert third.endswith("(computed from bytes)")
