"""Ray Train as the launcher: two workers, one of them lost on the way. Runs where ray is installed (`pip install "ray[train]"`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_train.py"


@pytest.mark.slow  # what a worker does is covered by api/test_ddp.py and lifecycle/test_ranks.py; here Ray does it
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_two_workers_of_which_one_is_lost(tmp_path: Path):
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), "--fast", "--workers", "2", "--fail-at", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 workers, 6 steps (the last worker began at 2): loss " in done.stdout
    before, after = done.stdout.rsplit("loaded outside of Ray: loss ", 1)[1].split(" → ")
    assert float(after) <= float(before)
    assert {path.name for path in tmp_path.rglob("checkpoint_*/adapter/*")} >= {"adapter.json", "adapter.safetensors"}
