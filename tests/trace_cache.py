"""Tests build the same small models over and over: a trace of one, and what was proven of it, serve the next built alike.

Two models are alike when their module trees agree in classes and their forwards, in plain attributes, configurations, and in name,
shape, dtype and sharing of every tensor, and the example in everything but the values of its tensors. A model with hooks, methods of
its own instance, tensors or objects in attributes is never served from here, nor is a trace that raised. `fresh_trace` marks tests
of the tracer itself.
"""

from __future__ import annotations

import copy
import enum
import types
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import quick_export
import torch
from quick_export import generate_when_called, quickly, replaced
from torch import nn
from torch.utils import _pytree as pytree

from sparsify.passes import prove_units
from sparsify.program import Program, capture
from sparsify.program.structure import Structure

LARGEST = 256
USERS = capture.trace, prove_units.why_not_everywhere  # before `install` replaces them
PLAIN = int | float | str | bool | bytes | complex | None | torch.dtype | torch.device | enum.Enum
OWN = set(nn.Module().__dict__) | {"_is_hf_initialized"}


class Unalike(Exception):
    """Something in a model that a key cannot hold."""


def frozen(value: Any) -> Hashable:
    """A hashable copy of a plain value, types included; raises Unalike for anything else."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(frozen(v) for v in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(frozen(v) for v in value)
    if isinstance(value, dict):
        return type(value), tuple((frozen(k), frozen(v)) for k, v in value.items())
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return value
    if hasattr(value, "to_dict") and type(value).__module__.startswith("transformers."):  # configurations
        return type(value), frozen(vars(value))
    raise Unalike(type(value).__name__)


def tensor_key(tensor: torch.Tensor) -> Hashable:
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise Unalike(type(tensor).__name__)
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def module_key(module: nn.Module) -> Hashable:
    """What a forward of this module alone can read, tensors' values aside; not its mode, which the trace sets."""
    for name, table in module.__dict__.items():
        if "hook" in name and table and not isinstance(table, bool):
            raise Unalike("hooks")
    plain = {k: v for k, v in module.__dict__.items() if k not in OWN}
    if any(callable(v) and hasattr(type(module), k) for k, v in plain.items()):
        raise Unalike("a method of one instance")
    kind = type(module)
    own = tuple(v for c in kind.__mro__[:-1] if c is not nn.Module for v in vars(c).values() if callable(v))
    return kind, own, frozen(plain), frozenset(module._non_persistent_buffers_set)


def key_of(model: nn.Module, args: Any, kwargs: Any, training: bool) -> Hashable:
    """Equal for models and examples that give equal traces; raises Unalike."""
    modules: dict[int, int] = {}
    tensors: dict[int, int] = {}
    found: list[Hashable] = [training, torch.get_default_dtype(), torch.is_autocast_enabled("cpu")]
    for name, module in model.named_modules(remove_duplicate=False):
        first = modules.setdefault(id(module), len(modules))
        found.append((name, first, module_key(module)))
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is not None:
                    found.append((leaf, tensors.setdefault(id(tensor), len(tensors)), tensor_key(tensor)))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    example = tuple(tensor_key(v) if isinstance(v, torch.Tensor) else frozen(v) for v in leaves)
    return (*found, str(spec), example)


class TraceCache:
    """`capture.trace` with a memory."""

    def __init__(self) -> None:
        self.trace = quickly(USERS[0])
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.hits = self.misses = 0

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, training: bool = False) -> Any:
        try:
            key = key_of(model, args, kwargs, training)
            hash(key)
        except (Unalike, TypeError, RecursionError):
            self.misses += 1
            return self.trace(model, args, kwargs, training)
        if key in self.kept:
            self.hits += 1
            self.kept.move_to_end(key)
        else:
            self.misses += 1
            self.kept[key] = self.trace(model, args, kwargs, training)
            if len(self.kept) > LARGEST:
                self.kept.popitem(last=False)
        return copied(self.kept[key])


class ProofCache:
    """`prove_units.why_not_everywhere` with a memory."""

    def __init__(self) -> None:
        self.judge = USERS[1]
        self.kept: dict[Hashable, dict[str, str]] = {}

    def __call__(self, program: Program, structures: tuple[Structure, ...]) -> dict[str, str]:
        try:
            modes = tuple(module.training for module in program.host.modules())
            key = (key_of(program.host, *program.example, False), modes, str(program.graph), structures)
            hash(key)
        except (Unalike, TypeError, RecursionError):
            return self.judge(program, structures)
        if key not in self.kept:
            self.kept[key] = self.judge(program, structures)
        return dict(self.kept[key])


def install() -> None:
    """One memory for what this process traces and proves from here on: pytest's own, or one that a test starts."""
    capture.trace, prove_units.why_not_everywhere = TraceCache(), ProofCache()
    quick_export.install()


def copied(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An exported program whose graph may be edited; tensors are shared."""
    twin = copy.copy(exported)
    with replaced(torch.fx.GraphModule, "recompile", generate_when_called):
        twin._graph_module = copy.deepcopy(exported.graph_module, {id(t): t for t in exported.constants.values()})
    twin._graph_signature = copy.deepcopy(exported.graph_signature)
    twin._constants = dict(exported.constants)
    return twin
