"""Ray as the launcher: two workers that train, one of them lost on the way, and two replicas that serve. Runs where ray is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow  # what a worker does is covered by api/test_ddp.py and lifecycle/test_ranks.py; here Ray does it
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_two_workers_of_which_one_is_lost(tmp_path: Path):
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(EXAMPLES / "ray_train.py"),
        "--fast",
        "--workers",
        "2",
        "--fail-at",
        "3",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 workers, 6 steps (the last worker began at 2): loss " in done.stdout
    before, after = done.stdout.rsplit("loaded outside of Ray: loss ", 1)[1].split(" → ")
    assert float(after) <= float(before)
    assert {path.name for path in tmp_path.rglob("checkpoint_*/adapter/*")} >= {"adapter.json", "adapter.safetensors"}


def serves() -> bool:
    """Whether Ray Serve is there with all that it imports (`pip install "ray[serve]"`)."""
    return all(importlib.util.find_spec(name) is not None for name in ("ray", "grpc", "grpc_reflection", "opencensus"))


@pytest.mark.slow  # what a replica does is covered by api/test_serving.py; here Ray does it
@pytest.mark.skipif(not serves(), reason="ray[serve] is not installed")
def test_two_replicas_serve_every_adapter() -> None:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "ray_serve.py"), "--requests", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 replicas, 3 adapters and the base: 32 of 32 answers are those of each adapter alone" in done.stdout
    assert "an adapter that there is not: no adapter is called 'nobody'" in done.stdout
