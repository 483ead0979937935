"""From a spec to something to call: the source is run as it was generated, written once under its hash for reading, and launched.

    KernelSpec ──generate──▶ source ──import──▶ kernel ──launch──▶ current stream
                               └──sha256──▶ <cache>/kernels/<key>.py

A launch reads nothing back and allocates nothing, so it may be captured in a CUDA graph (after one warm-up call, which
compiles). With `TRITON_INTERPRET=1` kernels run in Triton's interpreter, on CPU tensors, slowly and exactly.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import linecache
import os
import threading
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.kernels.cache import CacheError
from sparsify.kernels.fallback import note, switched_on
from sparsify.kernels.gpu.codegen import generate, parameters
from sparsify.kernels.gpu.spec import KernelSpec
from sparsify.kernels.source import write_once

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
POINTER_DTYPES = {
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*i8": torch.int8,
    "*u8": torch.uint8,
    "*i16": torch.int16,
    "*i32": torch.int32,
    "*i64": torch.int64,
}
REINTERPRETED = {
    "x_ptr",
    "entry_ptr",
    "data_ptr",
    "u_ptr",
    "values_ptr",
    "bias_ptr",
    "residual_ptr",
    "dense_ptr",
    "a_ptr",
    "b_ptr",
}  # read as integers, see templates/macros.jinja


class Kernel(Protocol):
    """A `@triton.jit` function, or what Triton's interpreter makes of one."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


load_lock = threading.Lock()
loaded: dict[tuple[KernelSpec, bool], Kernel] = {}


class TritonError(SparsifyError, RuntimeError):
    """Triton kernels cannot run here; the reference serves instead."""


@cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether `TRITON_INTERPRET=1` is set, so that kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") and triton_installed()


def can_launch(device: torch.device) -> bool:
    """Whether generated kernels can run on tensors of this device, and are not switched off."""
    if not switched_on():
        return False
    if device.type == "cpu":
        return interpreting()
    if device.type != "cuda" or not triton_installed():
        return False
    return torch.version.hip is not None or device_capability(device) >= (8, 0)


def kernels_take(*tensors: Tensor) -> bool:
    """Whether generated kernels can run on these tensors: device and types. The interpreter's bf16 is not to be trusted."""
    device = tensors[0].device
    types = KERNEL_DTYPES if device.type == "cuda" else KERNEL_DTYPES[1:]
    return all(t.dtype in types for t in tensors) and can_launch(device)


@cache
def device_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def target_of(device: torch.device) -> str:
    """The architecture whose tiles serve a device; the interpreter uses sm_90's."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = device_capability(device)
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120" if major > 10 else f"sm_{major}{minor}")


def import_source(text: str) -> types.ModuleType:
    """Run generated source as a module. Triton asks for the text of its kernels: it finds what ran, not what a file says, nor
    bytecode that lies beside one."""
    try:
        path = write_once(text, ".py")
    except CacheError as error:
        note(f"sparsify: the generated Triton source is kept in memory only: {error}")
        path = Path(f"<sparsify {hashlib.sha256(text.encode()).hexdigest()[:32]}>")
    module = types.ModuleType(f"sparsify_generated_{path.stem}")
    module.__file__ = str(path)
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))  # None: not to be checked
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def load_kernel(spec: KernelSpec) -> Kernel:
    """The kernel of a spec, generated and imported once per process. Raises TritonError without triton."""
    key = (spec, interpreting())
    found = loaded.get(key)
    if found is None:
        if not triton_installed():
            raise TritonError("the GPU kernels need triton: pip install 'sparsify-compiler[triton]'")
        with load_lock:
            found = loaded.get(key)
            if found is None:
                found = import_source(generate(spec)).kernel
                loaded[key] = found
    return found


def launch(spec: KernelSpec, grid: tuple[int, ...], arguments: Mapping[str, object]) -> None:
    """Run a kernel on the current stream. `arguments` must be the kernel's, in order; tensors are reinterpreted as the
    kernel reads them and must be contiguous, of one device, and of the right width."""
    types = parameters(spec)
    if list(types) != list(arguments):
        raise TritonError(f"{spec.op}: arguments {list(arguments)}, the kernel takes {list(types)}")
    passed, device = [], None
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = as_pointer(name, value, types[name])
            device = device or value.device
            if value.device != device:
                raise TritonError(f"{spec.op}: {name} is on {value.device}, the first argument on {device}")
        passed.append(value)
    if 0 in grid:
        return
    with on_device(device):
        load_kernel(spec)[grid](*passed, num_warps=spec.tile.warps, num_stages=spec.tile.stages)


def as_pointer(name: str, tensor: Tensor, type: str) -> Tensor:
    expected = POINTER_DTYPES[type]
    if tensor.dtype == expected:
        return tensor
    if name not in REINTERPRETED or expected not in (torch.int16, torch.int32):
        raise TritonError(f"{name} is {tensor.dtype}, the kernel reads {expected}")
    return tensor.view(expected)


def on_device(device: torch.device | None) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' one."""
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
