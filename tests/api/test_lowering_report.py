"""Reports of lowering: thirty equal layers read as one line, and nothing that differs is hidden."""

from __future__ import annotations

import re

from sparsify.errors import Refusal
from sparsify.lowering.cpu.lower import CpuReport, LoweredLinear
from sparsify.lowering.cuda.lower import GpuLowered, GpuReport


def packed(layer: int, sparsity: float = 0.502, seconds: float = 1e-4) -> LoweredLinear:
    times = {1: ("gemv", 4e-5, seconds, 2e-4)}
    return LoweredLinear(f"model.layers.{layer}.mlp.up_proj", (1536, 576), sparsity, "s8", times, 100, 50)


def test_equal_layers_are_one_line() -> None:
    entries = tuple(packed(i, 0.502 + 1e-4 * i) for i in range(30))
    refusals = tuple(Refusal(f"model.layers.{i}.self_attn.k_proj", "dense is faster") for i in range(30))
    report = CpuReport("a machine", entries, refusals, 300, 150)
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert lines[2] == (
        "packed     model.layers.{0…29}.mlp.up_proj: 1536 × 576, 50% sparse, bitmask s8: "
        "1 tok gemv 100 us (predicted 40, dense 200)  × 30"
    )
    assert lines[3] == "dense      model.layers.{0…29}.self_attn.k_proj: dense is faster  × 30"
    whole = report.text(fold=False).splitlines()
    assert len(whole) == 62
    assert whole[2] == f"packed     {entries[0]}"
    assert "50.2% sparse" in whole[2]


def test_what_differs_is_listed_by_layer() -> None:
    entries = tuple(packed(i, 0.9 if i == 3 else 0.5, 2e-4 if i > 3 else 1e-4) for i in range(6))
    text = str(CpuReport("a machine", entries, (), 300, 150))
    assert "⟨…⟩ sparse" in text
    listed = re.findall(r"packed       (.*?): (\d+%) \| 1 tok gemv (\d+) us", text)
    assert listed == [("0…2", "50%", "100"), ("3", "90%", "100"), ("4, 5", "50%", "200")]


def test_a_gpu_report_folds_too() -> None:
    entries = tuple(GpuLowered(f"h.{i}.fc", (64, 32), 0.75 + 1e-4 * i, "stream", "bf16", 400, 120) for i in range(12))
    report = GpuReport(entries, (Refusal("head", "an embedding shares it"),), 100, 50)
    assert "h.{0…11}.fc: 64 × 32, 75% sparse, stream bf16: at most 3.3 × at one token" in str(report)
    assert str(report).count("packed     ") == 1
    assert "dense      head: an embedding shares it" in str(report)
    assert report.text(fold=False).count("packed     ") == 12
    assert "75.0% sparse" in report.text(fold=False)
    assert "at most 3.33 ×" in report.text(fold=False)
