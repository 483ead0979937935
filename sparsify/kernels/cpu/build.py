"""Build kernels with the system compiler at first use, and keep them under a key of their content.

    source, flags, compiler version ──sha256──▶ <cache>/kernels/<key>.so

The library is written under a temporary name and moved into place, so that processes may build the same kernel at once
and none ever loads half a file. `SPARSIFY_CACHE` names the cache directory, `CXX` the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError
from sparsify.kernels.cpu.codegen import Variant, generate
from sparsify.kernels.source import cache_directory

BASE_FLAGS = (
    "-O3",
    "-std=gnu++17",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-w",
)
TIMEOUT = 300.0
build_lock = threading.Lock()


class BuildError(SparsifyError, RuntimeError):
    """Kernels cannot be built on this machine; the dense path serves instead."""

    exit_code = 1


@lru_cache(maxsize=8)
def find_compiler(named: str | None) -> tuple[tuple[str, ...], str]:
    """The C++ compiler as a command, and the first line of its version. Raises BuildError when there is none."""
    candidates = [tuple(shlex.split(named))] if named else [("g++",), ("c++",), ("clang++",)]
    for command in candidates:
        if not command or shutil.which(command[0]) is None:
            continue
        try:
            result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return command, result.stdout.splitlines()[0] if result.stdout else command[0]
    tried = ", ".join(" ".join(c) for c in candidates)
    raise BuildError(f"no C++ compiler found (tried {tried}): install g++ or clang++, or set CXX; linears stay dense")


def compile_library(source: str, flags: tuple[str, ...]) -> Path:
    """Path of the shared library built from `source`; compiles only if the cache does not hold it."""
    command, version = find_compiler(os.environ.get("CXX"))
    arguments = (*BASE_FLAGS, *flags)
    key = json.dumps([source, arguments, version, platform.machine(), platform.system()])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    directory = cache_directory() / "kernels"
    target = directory / f"{digest}.so"
    if target.exists():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
            code, library = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
            code.write_text(source)
            full = [*command, *arguments, str(code), "-o", str(library)]
            result = subprocess.run(full, capture_output=True, text=True, timeout=TIMEOUT)
            if result.returncode != 0:
                tail = "\n".join(result.stderr.splitlines()[-12:])
                raise BuildError(f"{' '.join(command)} failed with status {result.returncode}:\n{tail}")
            os.replace(library, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"kernels could not be built in {directory}: {error}") from error
    return target


@cache
def openmp_entry() -> int:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch uses, or 0 (kernels then run on one thread)."""
    import torch

    root = Path(torch.__file__).parent / "lib"
    found = sorted(root.glob("libgomp*")) + sorted((root.parent.parent / "torch.libs").glob("libgomp*"))
    for candidate in [None, *found, "libgomp.so.1"]:
        try:
            library = ctypes.CDLL(str(candidate) if candidate is not None else None)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


class Kernels:
    """The loaded entry points of one variant; call them as `kernels.gemv(layer, x, ldx, …)`."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        path = compile_library(generate(variant), variant.flags)
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError:  # a damaged cache entry: build it once more
            path.unlink(missing_ok=True)
            path = compile_library(generate(variant), variant.flags)
            try:
                self.library = ctypes.CDLL(str(path))
            except OSError as error:
                raise BuildError(f"the built kernel {path} does not load: {error}") from error
        self.library.sparsify_init.argtypes = [ctypes.c_void_p]
        self.library.sparsify_init.restype = None
        self.library.sparsify_init(openmp_entry())
        pointer, word = ctypes.c_void_p, ctypes.c_int64
        self.entries: dict[str, Any] = {}
        for name in variant.kernels:
            entry = getattr(self.library, f"sparsify_{name}")
            entry.argtypes = [pointer, pointer, word, word, pointer, word, pointer, word, ctypes.c_int, word]
            entry.restype = ctypes.c_int
            self.entries[name] = entry


loaded: dict[Variant, Kernels | BuildError] = {}


def load_kernels(variant: Variant) -> Kernels:
    """Kernels of a variant, built if needed. Raises BuildError (remembered, so that a failing compiler runs once)."""
    found = loaded.get(variant)
    if found is None:
        with build_lock:
            found = loaded.get(variant)
            if found is None:
                try:
                    found = Kernels(variant)
                except BuildError as error:
                    found = error
                loaded[variant] = found
    if isinstance(found, BuildError):
        raise found
    return found
