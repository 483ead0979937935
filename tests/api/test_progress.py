"""Long stages say what they are doing; quick ones, and those told to be silent, say nothing."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch
from torch import nn

import sparsify
from sparsify import S2FT, CpuOptions, Plan, console
from sparsify.console import stage


def wait_for(text: str, capsys: pytest.CaptureFixture[str], seconds: float = 30.0) -> str:
    """What stands on stderr once `text` does; however slow the machine is."""
    shown, end = "", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < end, shown
        shown += capsys.readouterr().err
        time.sleep(0.01)
    return shown


def test_a_long_stage_speaks_once_and_says_how_long_it_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.01)
    with stage("tracing the model"):
        shown = wait_for("sparsify: tracing the model ...\n", capsys)
    shown += capsys.readouterr().err
    lines = shown.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("sparsify: tracing the model: ")
    assert lines[1].endswith(" s")


def test_a_quick_or_a_silent_stage_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 60.0)
    with stage("quick"):
        pass
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    with stage("silent", progress=False):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_an_error_passes_through_and_a_closed_stderr_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with pytest.raises(KeyError), stage("failing"):
        time.sleep(0.05)
        raise KeyError("x")


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("target", ["train", "cpu"])
def test_compile_names_its_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    plan = Plan([S2FT(0.2)]) if target == "train" else Plan([], target="cpu")
    options = {"cpu": CpuOptions(tokens=(1,))} if target == "cpu" else {}
    sparsify.compile(TwoLayers(), plan, example=torch.randn(2, 32), progress=False, **options)
    assert "sparsify:" not in capsys.readouterr().err
    sparsify.compile(TwoLayers(), plan, example=torch.randn(2, 32), **options)
    shown = capsys.readouterr().err
    assert "sparsify: tracing the model" in shown
    assert ("sparsify: lowering for cpu" in shown) == (target == "cpu")
