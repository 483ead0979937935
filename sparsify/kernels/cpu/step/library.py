"""A built step and the structures that it reads: mirrors of those in `step.cpp.jinja`."""

from __future__ import annotations

import ctypes
import threading

from sparsify.kernels.cpu.build import BuildError, load_library, openmp_entry
from sparsify.kernels.cpu.codegen import FLAGS, Isa
from sparsify.kernels.cpu.dispatch import LayerStruct


class LinearStruct(ctypes.Structure):
    """Mirror of `struct Linear`. kernel: address of a packed kernel; None: a dense weight."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("layer", LayerStruct),
        ("row_tile", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("transposed", ctypes.c_int64),
    ]


class StepStruct(ctypes.Structure):
    """Mirror of `struct Step`."""

    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("past", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("keep", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("linears", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        ("own", ctypes.c_void_p),
        ("own_size", ctypes.c_int64),
        ("scores", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("status", ctypes.c_int32),
    ]


loaded: dict[tuple[str, Isa], ctypes.CDLL | BuildError] = {}
lock = threading.Lock()


def load_step(source: str, isa: Isa) -> ctypes.CDLL:
    """The library of a generated step, built if needed. Raises BuildError (remembered, so that a failing compiler runs once)."""
    with lock:
        found = loaded.get((source, isa))
        if found is None:
            try:
                found = build_step(source, isa)
            except BuildError as error:
                found = error
            loaded[source, isa] = found
    if isinstance(found, BuildError):
        raise found
    return found


def build_step(source: str, isa: Isa) -> ctypes.CDLL:
    library = load_library(source, FLAGS[isa], ["sparsify_step", "sparsify_team"])
    library.sparsify_team.argtypes, library.sparsify_team.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    library.sparsify_team(openmp_entry("omp_get_num_threads"), openmp_entry("omp_get_thread_num"))
    library.sparsify_step.argtypes, library.sparsify_step.restype = [ctypes.c_void_p], ctypes.c_int
    return library


__all__ = ["LinearStruct", "StepStruct", "load_step"]
