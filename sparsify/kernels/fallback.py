"""What does not run on generated kernels here, and why: said once as a warning, and kept for reports.

note("low-rank products: PyTorch's GEMM serves instead: no C++ compiler found …") ──▶ RuntimeWarning, once
                                                                                  └─▶ notes(): lines of the report
"""

from __future__ import annotations

import os
import warnings

WORDS = {"": True, "on": True, "1": True, "off": False, "0": False}
said: dict[str, None] = {}


def note(text: str, stacklevel: int = 3) -> None:
    """Say `text` as a RuntimeWarning, once per process, and keep it for `notes()`."""
    if text in said:
        return
    said[text] = None
    warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)


def notes() -> tuple[str, ...]:
    """Everything that was said so far, in order."""
    return tuple(said)


def switched_on() -> bool:
    """Whether generated kernels may be used: not with SPARSIFY_KERNELS=off, where every operator computes in plain PyTorch."""
    word = os.environ.get("SPARSIFY_KERNELS", "")
    found = WORDS.get(word.strip().lower())
    if found is None:
        note(f"SPARSIFY_KERNELS={word!r}: expected 'on' or 'off'; generated kernels stay in use")
        return True
    return found
