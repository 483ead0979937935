"""`benchmarks/prune_real.py`: its texts do not overlap, its page says what the records say, and its fast walk runs and goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import prune_page, prune_real  # noqa: E402
from benchmarks.grid import Grid  # noqa: E402
from sparsify.demo.pretrained import why_missing  # noqa: E402


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_what_is_recovered_on_was_not_calibrated_on(tmp_path: Path) -> None:
    setting = prune_real.Setting(calibration=7, library=12, length=16)
    bench = prune_real.Bench(Grid(tmp_path, setting))
    bench.grid.__dict__["model"] = (None, Letters())
    calibrated, others = bench.library
    assert calibrated.shape == (7, 16)
    assert others.shape == (12, 16)
    assert not {tuple(row) for row in calibrated.tolist()} & {tuple(row) for row in others.tolist()}


def test_every_run_has_a_row() -> None:
    """No recovery of the grid is one that the page does not know."""
    for name, kind in prune_real.KINDS.items():
        assert prune_real.file_name(name) in prune_page.KINDS
        for loss, text in kind.recoveries:
            assert loss in prune_real.LOSSES
            assert f"{loss}-{text}" in prune_page.RECOVERIES
            assert prune_page.known(prune_real.file_name(name), f"{loss}-{text}")
    assert not prune_page.known("50-sensitivity", "sq-own")


def record(topics: float, size: int) -> dict[str, Any]:
    setting = {"calibration": 48, "length": 128, "blocks": 30, "steps": 48, "batch": 4, "rate": 1e-4, "held_out": 16}
    end = {"topics": math.log(topics), "own": math.log(8.0)}
    int8 = {"topics": math.log(1.01 * topics), "own": math.log(8.0)}
    return {"end": end, "int8": int8, "bytes": {"dense": 100, "int8": size}, "facts": {"setting": setting}}


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    made = {
        "dense": 40.0,
        "50-oneshot": 80.0,
        "50-sq-own": 50.0,
        "75-oneshot": 4000.0,
        "75-sq-library": 90.0,
        "2of4-oneshot": 120.0,
    }
    for number, (name, topics) in enumerate(made.items()):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(topics, 40 + number)), encoding="utf-8")
    (tmp_path / "text-1.json").write_text('{"ids": []}', encoding="utf-8")
    text = prune_page.page_text(tmp_path)
    assert (
        "At 50 % zeros one-shot pruning multiplies the perplexity of the topics by 2.00; the best recovery (SquareHead, own text) brings "
        in text
    )
    assert "that to 1.25: bearable" in text
    assert (
        "by 100.00; the best recovery (SquareHead, library) brings that to 2.25: not good enough to use as it is"
        in text
    )
    assert "2:4 costs 3.00 times the dense perplexity where unstructured costs 2.00." in text
    assert "int8 on top changes the perplexity by +1.0% to +1.0%." in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(made)
    assert "4,000" in next(line for line in lines if "75 %" in line and "nothing" in line)
    missing = 1 + sum(1 + len(kind.recoveries) for kind in prune_real.KINDS.values()) - len(made)
    assert f"{missing} runs are still to be made." in text
    assert "Nothing has been run yet." in prune_page.page_text(tmp_path / "empty")


def test_a_destroyed_model_has_a_perplexity_that_one_can_read() -> None:
    assert prune_page.perplexity(math.log(12.345)) == "12.3"
    assert prune_page.perplexity(math.log(1234.2)) == "1,234"
    assert prune_page.perplexity(92.1) == "10^40"


def test_the_page_in_the_documentation_is_made_from_the_records() -> None:
    page = ROOT / "docs" / "pruning.md"
    assert page.read_text(encoding="utf-8") == prune_page.page_text(prune_real.FOLDER)


@pytest.mark.benchmarks
@pytest.mark.slow  # some minutes on one core
@pytest.mark.skipif(bool(why_missing()), reason=why_missing() or "installed")
def test_the_fast_walk_runs_and_goes_on(tmp_path: Path) -> None:
    def walk(*options: str) -> dict[str, Any]:
        command = [
            sys.executable,
            "benchmarks/prune_real.py",
            "--fast",
            "--threads",
            "1",
            "--results",
            str(tmp_path),
            *options,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert walk("--budget", "0")["note"] == "stopped before dense"
    first = walk("--only", "50", "--only", "8:32")
    names = {path.stem for path in tmp_path.glob("*.json")}
    assert names == {
        "dense",
        "text-1",
        "text-2",
        "50-oneshot",
        "50-sq-library",
        "50-sq-own",
        "8of32-oneshot",
        "8of32-sq-library",
    }
    assert first["made"] == len(names)
    assert walk("--only", "50")["made"] == 0
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.json")}
    assert runs["50-oneshot"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert runs["8of32-oneshot"]["zeros"] == pytest.approx(0.75, abs=1e-9)
    assert runs["50-oneshot"]["end"] != runs["dense"]["end"]
    assert runs["50-sq-own"]["end"] != runs["50-oneshot"]["end"]
    assert runs["50-oneshot"]["bytes"]["int8"] < runs["dense"]["bytes"]["dense"]
    assert torch.tensor(runs["text-1"]["ids"]).shape == (prune_real.FAST.own, prune_real.FAST.length)
