"""Which of Triton's interpreters can run the kernels, and what they launch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest


def require_interpreter() -> None:
    """Skip where loops over run-time bounds fail: the interpreter before Triton 3.7 with NumPy 2.4 or later."""
    triton = pytest.importorskip("triton")
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(
            f"Triton {triton.__version__}'s interpreter cannot loop to run-time bounds with NumPy {np.__version__}"
        )


def count_launches(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Counter[str]:
    """Run kernels in the interpreter from now on, and count them by operator."""
    require_interpreter()
    from sparsify.kernels.gpu import build, launch

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SPARSIFY_CACHE", str(cache))
    counts: Counter[str] = Counter()
    original = build.launch

    def counting(spec: build.KernelSpec, *rest: object) -> None:
        counts[spec.op] += 1
        original(spec, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "launch", counting)
    return counts
