"""What docs/platforms.md says of systems that are not Linux, as far as one can pretend to be one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch

import sparsify
from sparsify import LoRA, Plan, Prune
from sparsify.kernels import cache
from sparsify.kernels.cpu import build, compiler
from sparsify.kernels.cpu.build import BuildError

POSIX = (
    "geteuid", "getuid", "killpg", "set_blocking", "memfd_create", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY",
)  # fmt: skip


def take_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in POSIX:
        monkeypatch.delattr(os, name, raising=False)


def test_adapters_are_saved_loaded_and_switched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, batch = tiny.llama(), {"input_ids": tiny.tokens()}
    host = sparsify.compile(base, Plan([LoRA(rank=2)]), progress=False)
    tiny.disturb(host)
    trained = host(**batch).logits
    take_posix(monkeypatch)  # behind the trace: torch has ways of its own per system
    host.sparsify.save_adapter(tmp_path / "mine")
    served = sparsify.load(tiny.llama(), tmp_path / "mine")
    torch.testing.assert_close(served(**batch).logits, trained, rtol=1e-5, atol=1e-5)
    served.sparsify.set_adapter(None)
    assert torch.equal(served(**batch).logits, base(**batch).logits)
    assert cache.unusable(tmp_path / "cache") == ""
    assert not hasattr(os, "geteuid")


def test_on_windows_linears_stay_dense_and_the_report_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "WINDOWS", True)
    monkeypatch.setattr(build, "loaded", {})
    with pytest.raises(BuildError, match="kernels are built on Linux and macOS, not on Windows"):
        build.find_compiler("g++")
    model, batch = tiny.llama(), {"input_ids": tiny.tokens()}
    plan = Plan([Prune(sparsity=0.5, method="magnitude")], target="cpu")
    with pytest.warns(RuntimeWarning, match="linears stay dense"):
        host = sparsify.compile(model, plan, progress=False)
    assert "not on Windows" in str(host.sparsify.report)
    assert host(**batch).logits.isfinite().all()
