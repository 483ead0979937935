"""Which of Triton's interpreters can run the kernels."""

from __future__ import annotations

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
