"""The offline checks once more on the oldest Triton that is supported, installed beside this environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

OLDEST = "3.6.0"
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_kernel_compiles_on_the_oldest_triton(tmp_path):
    """All architectures and formats, under the same ceilings of registers, spills and instructions."""
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    subprocess.run([*pip, f"triton=={OLDEST}"], check=True, timeout=900)
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    version = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == OLDEST
    selected = os.environ.get("SPARSIFY_OFFLINE_TESTS", "")  # a -k expression; empty: the whole matrix
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "-k", selected]
    offline = "tests/codegen/test_triton_offline.py"
    result = subprocess.run([*tests, offline], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stdout[-4000:]
