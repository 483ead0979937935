"""Tile measurements: the fastest wins, time is bounded, files are per GPU, survive damage, and reach later launches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_interpreter import require_interpreter

pytest.importorskip("triton")

from sparsify.kernels.gpu import launch, tune
from sparsify.kernels.gpu.formats import Stream, pack_stream
from sparsify.kernels.gpu.spec import KernelSpec, Tile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_interpreter()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))


def packed_weight() -> Stream:
    return pack_stream(torch.randn(16, 32) * (torch.rand(16, 32) < 0.4))


def counted_time(
    cheap: Tile, calls: list[Tile], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], Any]], float]:
    """A clock on which the launch of one tile is fastest."""
    original = launch.launch

    def record(spec: KernelSpec, *rest: Any) -> None:
        calls.append(spec.tile)
        original(spec, *rest)

    monkeypatch.setattr(launch, "launch", record)

    def timer(call: Callable[[], Any]) -> float:
        call()
        return 1.0 if calls[-1] == cheap else 2.0

    return timer


def test_the_fastest_tile_is_used_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x, calls = packed_weight(), torch.randn(2, 32), []
    tiles = [Tile(warps=4), Tile(warps=4, unroll=2), Tile(warps=8, unroll=4)]
    timer = counted_time(tiles[1], calls, monkeypatch)
    assert tune.remembered_tile(packed, 2, CPU) is None
    assert tune.tune_stream(packed, x, candidates=tiles, timer=timer) == tiles[1]
    assert tune.remembered_tile(packed, 2, CPU) == tiles[1]
    assert tune.remembered_tile(packed, 4, CPU) is None
    y = launch.stream_product(packed, x)
    assert calls[-1] == tiles[1]
    torch.testing.assert_close(y, x @ packed.unpack().t())
    launch.stream_product(packed, torch.randn(4, 32))
    assert calls[-1] != tiles[1]


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tile] = []
    timer = counted_time(tune.CANDIDATES[0], calls, monkeypatch)
    tune.tune_stream(packed_weight(), torch.randn(1, 32), seconds=0.0, timer=timer)
    assert len(calls) == 2  # one candidate, compiled and timed once


def test_measurements_are_kept_per_gpu_and_added_up() -> None:
    packed = packed_weight()
    tune.remember_tile(packed, 1, CPU, Tile(warps=4), 1e-6)
    tune.remember_tile(packed, 8, CPU, Tile(warps=16), 2e-6)
    table = json.loads(tune.tiles_file().read_text())
    assert list(table) == ["interpreter"]
    assert len(table["interpreter"]) == 2
    table["NVIDIA H200"] = table.pop("interpreter")
    tune.tiles_file().write_text(json.dumps(table))
    tune.read_tiles.cache_clear()
    assert tune.remembered_tile(packed, 1, CPU) is None


@pytest.mark.parametrize("text", ["", "[]", '{"interpreter": {}}', "not json"])
def test_a_damaged_file_is_ignored(text: str) -> None:
    tune.tiles_file().write_text(text)
    assert tune.remembered_tile(packed_weight(), 1, CPU) is None


def test_a_damaged_entry_is_ignored() -> None:
    packed = packed_weight()
    entry = {"tile": {"warps": 3}, "us": 1.0}
    tune.tiles_file().write_text(json.dumps({"interpreter": {tune.stream_key(packed, 1): entry}}))
    assert tune.remembered_tile(packed, 1, CPU) is None
