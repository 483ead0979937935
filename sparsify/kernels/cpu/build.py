"""Build kernels with the system compiler at first use, and keep them under a key of their content.

    source, flags, compiler version ──sha256──▶ <cache>/kernels/<key>.so ──checked──▶ loaded

A library is kept with a hash of itself (`cache.seal`), written under a temporary name and moved into place, so that processes
may build the same kernel at once and none ever loads half a file. What is loaded is a copy in memory of the bytes that were
checked: nobody can change it afterwards. `SPARSIFY_CACHE` names the cache directory, `CXX` the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from sparsify.kernels.cache import keep, kept, seal, unseal
from sparsify.kernels.cpu.codegen import Variant, generate
from sparsify.kernels.cpu.compiler import TIMEOUT, BuildError, find_compiler, run

__all__ = ["BuildError", "Kernels", "compile_library", "find_compiler", "load_kernels", "load_library", "openmp_entry"]

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
build_lock = threading.Lock()
loads = itertools.count()


def compile_library(source: str, flags: tuple[str, ...]) -> Path:
    """Path of the shared library built from `source`; compiles only if the cache does not hold it whole. Raises BuildError."""
    return built(source, flags)[0]


def built(source: str, flags: tuple[str, ...]) -> tuple[Path, bytes]:
    """The library's place in the cache, and its bytes. Raises BuildError."""
    command, version = find_compiler(os.environ.get("CXX"))
    arguments = (*BASE_FLAGS, *flags)
    key = json.dumps([source, arguments, version, platform.machine(), platform.system()])
    name = f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.so"
    try:
        found = kept(name)
        content = None if found is None else unseal(name, found[1])
        if found is not None and content is not None:
            return found[0], content
        content = compile_source(source, (*command, *arguments))
        return keep(name, seal(name, content)), content
    except OSError as error:  # CacheError among them
        raise BuildError(f"kernels could not be built: {error}") from error


def compile_source(source: str, command: Sequence[str]) -> bytes:
    """Run the compiler on `source`; the shared library that it wrote. Raises BuildError, and OSError without a folder to work in."""
    with tempfile.TemporaryDirectory(prefix="sparsify-build-") as scratch:
        code, library = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
        code.write_text(source, encoding="utf-8")
        status, output = run([*command, str(code), "-o", str(library)], TIMEOUT)
        if status != 0:
            tail = "\n".join(output.splitlines()[-12:])
            raise BuildError(f"{command[0]} failed with status {status}:\n{tail}")
        if not library.is_file() or not library.stat().st_size:
            raise BuildError(f"{command[0]} ended well, but wrote no library")
        return library.read_bytes()


def load_library(source: str, flags: tuple[str, ...], entries: Sequence[str]) -> ctypes.CDLL:
    """The library built from `source`, with its `entries` and `sparsify_init` called. Raises BuildError for whatever goes wrong."""
    place, content = built(source, flags)
    try:
        library = open_library(content, place)
    except OSError as error:  # what the compiler wrote is no library for this machine
        place.unlink(missing_ok=True)
        raise BuildError(f"the built kernel {place} does not load: {error}") from error
    missing = [entry for entry in ("sparsify_init", *entries) if not hasattr(library, entry)]
    if missing:
        place.unlink(missing_ok=True)
        raise BuildError(f"the built kernel {place} has no {', '.join(missing)}")
    library.sparsify_init.argtypes, library.sparsify_init.restype = [ctypes.c_void_p], None
    library.sparsify_init(openmp_entry())
    return library


def open_library(content: bytes, place: Path) -> ctypes.CDLL:
    """Load a library from memory, or from its place where the system has no files in memory."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        handle = -1
        try:
            handle = os.memfd_create(place.name, os.MFD_CLOEXEC)
            with os.fdopen(handle, "wb", closefd=False) as file:
                file.write(content)
            # the loader takes equal names for equal libraries, and numbers of files come again: every load has its own name
            return ctypes.CDLL(f"/proc/self/{'./' * next(loads)}fd/{handle}")
        except OSError:  # a system that runs nothing from memory: the file it is
            pass
        finally:
            if handle >= 0:
                os.close(handle)
    return ctypes.CDLL(str(place))


@cache
def openmp_library() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch uses, or None (kernels then run on one thread)."""
    import torch

    root = Path(torch.__file__).parent / "lib"
    found = sorted(root.glob("libgomp*")) + sorted((root.parent.parent / "torch.libs").glob("libgomp*"))
    for candidate in [None, *found, "libgomp.so.1"]:
        try:
            library = ctypes.CDLL(str(candidate) if candidate is not None else None)
            assert library.GOMP_parallel
            return library
        except (OSError, AttributeError):
            continue
    return None


def openmp_entry(name: str = "GOMP_parallel") -> int:
    """Address of a function of the OpenMP runtime that torch uses, or 0 without one."""
    try:
        return ctypes.cast(getattr(openmp_library(), name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


class Kernels:
    """The loaded entry points of one variant; call them as `kernels.gemv(layer, x, ldx, …)`."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.library = load_library(generate(variant), variant.flags, [f"sparsify_{name}" for name in variant.kernels])
        pointer, word = ctypes.c_void_p, ctypes.c_int64
        self.entries: dict[str, Callable[..., int]] = {}
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
