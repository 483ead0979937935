"""The accuracy benchmark of pruning: resumable cell by cell, distinct held-out data, losses that differ."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.benchmarks, pytest.mark.slow]  # minutes on one core

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import sparse_quality  # noqa: E402

NAMES = [
    "t5/dense",
    *(f"t5/sparsegpt/0.5/{what}/0" for what in ("one-shot", "ce", "kl", "sq")),
    "t5/magnitude/0.5/one-shot/0",
]


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    settings = {
        "out": str(folder / "cells.json"), "fast": True, "sparsity": [0.5], "methods": ["sparsegpt", "magnitude"], "seeds": [0, 1],
        "recover_from": "sparsegpt", "recover_at": [0.5], "recoveries": ["ce", "kl", "sq"], "steps": 2, "rate": 0.0, "calibration": 16,
    } | changes  # fmt: skip
    return argparse.Namespace(**settings)


def test_cells_are_kept_as_they_finish_and_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = sparse_quality.TASKS["t5"](True)
    results = sparse_quality.Results(tmp_path / "cells.json", {"steps": 2})
    original, calls = sparse_quality.recover, 0

    def interrupted(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    monkeypatch.setattr(sparse_quality, "recover", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparse_quality.run(task, 0, options(tmp_path), results)
    assert list(json.loads((tmp_path / "cells.json").read_text())["cells"]) == NAMES[:4]
    again = sparse_quality.Results(tmp_path / "cells.json", {"steps": 2})
    sparse_quality.run(task, 0, options(tmp_path), again)
    assert calls == 4  # the interrupted one only
    assert list(again.cells) == NAMES
    sparse_quality.run(task, 1, options(tmp_path), again)
    assert "t5/magnitude/0.5/one-shot/1" not in again.cells  # no seed enters it
    row = next(r for r in sparse_quality.summary(again.cells) if r["recovery"] == "sq")
    assert row["50%"].count("±") == 1
    with pytest.raises(SystemExit, match="choose another --out"):
        sparse_quality.Results(tmp_path / "cells.json", {"steps": 3})


def test_recoveries_start_equal_and_end_apart(tmp_path: Path) -> None:
    task = sparse_quality.TASKS["whisper"](True)
    dense = sparse_quality.dense_model(task, tmp_path)
    ends = {}
    for recovery in sparse_quality.RECOVERIES:
        host, _ = sparse_quality.pruned_model(task, dense, "magnitude", 0.75, 0, 16)
        sparse_quality.recover(task, host, dense, recovery, 2, 1e-3, 0)
        ends[recovery] = torch.cat([p.detach().flatten() for p in host.parameters()])
    assert not torch.equal(ends["ce"], ends["sq"])
    assert not torch.equal(ends["ce"], ends["kl"])


@pytest.mark.parametrize("name", ["t5", "whisper", "decoder"])
def test_held_out_batches_differ(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, torch.Tensor]]] = []
    monkeypatch.setattr(sparse_quality, "token_accuracy", lambda _model, batches, shift: seen.append(batches) or 0.0)
    monkeypatch.setattr("sparsify.demo.stdlib_text.code", lambda limit: "x = 1\n" * 5000)
    sparse_quality.TASKS[name](False).score(torch.nn.Identity())
    batches = seen[0]
    assert len(batches) > 4
    assert all(not torch.equal(batches[0]["labels"], other["labels"]) for other in batches[1:])
