"""What docs/platforms.md says of systems that are not Linux, as far as one can pretend to be one."""

from __future__ import annotations

import os
import shutil
import subprocess
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


ROOT = Path(__file__).parents[2]
NEWER = ("3.12", "3.13", "3.14")
TORCH_FREE = r"""
import importlib, pathlib, sys, types
package = types.ModuleType("sparsify")  # without its __init__, which asks for torch
package.__path__ = ["sparsify"]
sys.modules["sparsify"] = package
done, lacking = [], set()
for file in sorted(pathlib.Path("sparsify").rglob("*.py")):
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    if name != "sparsify" and not name.endswith("__main__"):
        try:
            importlib.import_module(name)
            done.append(name)
        except ModuleNotFoundError as error:
            lacking.add(error.name.partition(".")[0])
from sparsify.console import one_line, printable
from sparsify.errors import InputError
from sparsify.files import atomic, strict_json
target = pathlib.Path(sys.argv[1]) / "said.json"
atomic.write_text(target, '{"a": [1, 2.5, "\u00d7"]}')
assert strict_json.read_object(target, InputError) == {"a": [1, 2.5, "\u00d7"]}
assert one_line("a\nb\x1b").isprintable()
try:
    strict_json.parse(b'{"a": 1, "a": 2}', "twice", InputError)
    raise SystemExit("a key that stands twice was read")
except InputError:
    pass
print(len(done), ",".join(sorted(lacking)))
"""


def interpreter(version: str) -> str | None:
    """A Python of this version on this machine: on the path, or of pyenv, whose shims may name what is not switched on."""
    for path in (
        shutil.which(f"python{version}"),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ):
        if path and subprocess.run([path, "-c", ""], capture_output=True, timeout=60).returncode == 0:
            return path
    return None


@pytest.mark.slow  # covered by ruff, which reads every file as Python 3.11, in whose grammar newer ones took nothing away
@pytest.mark.parametrize("version", NEWER)
def test_newer_pythons_read_the_source_and_run_what_needs_no_torch(version: str, tmp_path: Path) -> None:
    """Without torch, of which there is a CPU wheel for one version here: all files compile without a warning, some sixty modules run."""
    path = interpreter(version)
    if path is None:
        pytest.skip(f"no Python {version} on this machine")
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [path, "-W", "error", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "compileall", "-q", "sparsify", "benchmarks", "examples", "tests")
    count, lacking = run("-c", TORCH_FREE, str(tmp_path)).split()
    assert int(count) > 40
    assert "torch" in lacking
    assert {"sparsify", "distutils", "imp", "asyncore"}.isdisjoint(lacking.split(",")), (
        "only what pip would bring is missing"
    )
