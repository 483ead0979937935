"""What a trace must leave as it was: the user's modules, their classes and files, caches of functions, random numbers.

    with untouched(model): …trace a copy of model…     ──▶ what leaked past the copy is undone; what cannot be is an error

A trace runs the model's forward on fake tensors. It runs on a copy, but a forward may reach past it: through a global table, a
class attribute, an `lru_cache`, or a reference to the original. A fake tensor that stays there breaks the original for good.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsify.errors import CaptureError

#: what may hold state of a forward, and what it held: its entries in order
Container: TypeAlias = "dict[Any, object] | list[object] | set[object] | deque[object]"
Contents: TypeAlias = "dict[Any, object] | list[object]"

DEPTH = 4  # levels of containers that are looked into
LARGEST = 10_000  # entries; larger containers are data, no state of a forward


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back what changes in `model` and around it while the body runs.

    Raises CaptureError when a tensor of the model was written to.
    """
    state, random_state = State(model), RandomState()
    try:
        yield
    finally:
        random_state.put_back()
        state.put_back()
    written = state.written()
    if written:
        raise CaptureError(
            f"in stage 'capture': tracing {type(model).__name__} wrote to {written[0]} of the original model: its forward reaches "
            "the tensor past the module (a view, a NumPy array, another thread); keep such a tensor as a registered buffer, or "
            "compile while nothing else runs the model"
        )


class RandomState:
    """States of the generators of torch, Python and NumPy."""

    def __init__(self) -> None:
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state() if numpy is not None else None

    def put_back(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class State:
    """Attributes and tensors of every module; class attributes and globals of the modules' classes."""

    def __init__(self, model: nn.Module) -> None:
        self.held: list[tuple[Container, Contents]] = []  # a container of the model, and what it held
        self.versions: list[tuple[str, torch.Tensor, int]] = []
        seen: set[int] = set()
        for name, module in model.named_modules():
            self.remember(module.__dict__, name, seen)
        classes = {cls for module in model.modules() for cls in type(module).__mro__ if is_users(cls.__module__)}
        self.classes = [(cls, dict(vars(cls))) for cls in classes]
        files = {cls.__module__ for cls in classes} & set(sys.modules)
        self.globals = [(vars(sys.modules[name]), dict(vars(sys.modules[name]))) for name in files]
        self.inside: list[tuple[Container, Contents]] = []  # containers in those, and what they held
        for _, attributes in (*self.classes, *self.globals):
            self.inside += [(v, shallow(v)) for v in attributes.values() if is_state(v)]

    def remember(self, container: Container, name: str, seen: set[int], depth: int = DEPTH) -> None:
        if id(container) in seen:
            return
        seen.add(id(container))
        self.held.append((container, shallow(container)))
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(pairs):
            inner = name if key in ("_parameters", "_buffers") else f"{name}.{key}".lstrip(".")
            if isinstance(value, torch.Tensor):
                version = version_of(value)
                if version is not None:
                    self.versions.append((inner, value, version))
            elif is_state(value) and depth:
                self.remember(value, inner, seen, depth - 1)
            elif depth and (attributes := attributes_of(value)) is not None:
                self.remember(attributes, inner, seen, depth - 1)

    def put_back(self) -> None:
        for container, before in self.held:
            if differs(container, before):
                fill(container, before)
        for cls, before in self.classes:
            for name, value in list(vars(cls).items()):
                if value is not before.get(name) and holds_fake(value):
                    if name in before:
                        setattr(cls, name, before[name])
                    else:
                        delattr(cls, name)
        for variables, before in self.globals:
            for name, value in list(variables.items()):
                if value is not before.get(name) and holds_fake(value):
                    if name in before:
                        variables[name] = before[name]
                    else:
                        del variables[name]
        for container, before in self.inside:
            if differs(container, before) and holds_fake(container):
                fill(container, before)
        FUNCTION_CACHES.clear_fakes(v for _, attributes in (*self.classes, *self.globals) for v in attributes.values())

    def written(self) -> list[str]:
        """Names of the model's tensors that were written to."""
        return [name for name, tensor, version in self.versions if version_of(tensor) != version]


class FunctionCaches:
    """Every function cache (`lru_cache`) of the user's in this process, and what each had computed when it was last looked at.

    To find all means to look at every object of the process, so that is done again only after modules were imported; caches in the
    classes and files of a model are found each time.
    """

    def __init__(self) -> None:
        self.modules = -1
        self.known: dict[int, tuple[weakref.ref[functools._lru_cache_wrapper[object]], int]] = {}

    def add(self, objects: Iterable[object]) -> None:
        for x in objects:
            if type(x) is functools._lru_cache_wrapper and is_users(x.__module__ or ""):
                held = self.known.get(id(x))
                if held is None or held[0]() is not x:
                    self.known[id(x)] = weakref.ref(x), -1

    def clear_fakes(self, near: Iterable[object]) -> None:
        """Empty those that hold fake tensors: they fill again with real ones. near: values in the model's classes and files."""
        if len(sys.modules) != self.modules:
            self.modules = len(sys.modules)
            self.add(gc.get_objects())
        self.add(near)
        for key, (reference, before) in list(self.known.items()):
            cached = reference()
            if cached is None:
                del self.known[key]
                continue
            misses = cached.cache_info().misses
            if misses != before and holds_fake_result(cached):
                cached.cache_clear()
            self.known[key] = reference, cached.cache_info().misses


FUNCTION_CACHES = FunctionCaches()


def holds_fake_result(cached: functools._lru_cache_wrapper[object]) -> bool:
    """Whether a cached function keeps a fake tensor, by what the collector sees in its cache."""
    return bool(cached.cache_info().currsize) and any(
        holds_fake(kept)
        for kept in gc.get_referents(cached)
        if kept is not cached.__wrapped__ and not isinstance(kept, type)
    )


def is_users(module: str) -> bool:
    """Whether a file is not torch's own: its tables are not filled by a model's forward."""
    return module.partition(".")[0] not in ("torch", "builtins", "sparsify", "typing", "functools")


def is_state(value: object) -> TypeGuard[Container]:
    return isinstance(value, dict | list | set | deque) and len(value) <= LARGEST


def attributes_of(value: object) -> dict[str, object] | None:
    """Attributes of a plain object that is no part of torch (a configuration, a cache)."""
    if (
        isinstance(value, type | nn.Module | torch.Tensor)
        or callable(value)
        or not is_users(type(value).__module__ or "")
    ):
        return None
    found = getattr(value, "__dict__", None)
    return found if type(found) is dict and len(found) <= LARGEST else None


def shallow(container: Container) -> Contents:
    """What a container holds, without asking it for its entries: tables such as transformers' ACT2FN make a module at every `[]`."""
    return dict(container.items()) if isinstance(container, dict) else list(container)


def differs(container: Container, before: Contents) -> bool:
    """Whether a container holds other objects than before, or in another order."""
    if len(container) != len(before):
        return True
    if isinstance(container, dict) and isinstance(before, dict):
        return any(
            (k1 is not k2 and k1 != k2) or a is not b
            for (k1, a), (k2, b) in zip(container.items(), before.items(), strict=True)
        )
    return any(a is not b for a, b in zip(container, before, strict=True))


def fill(container: Container, before: Contents) -> None:
    """Put back what a container held, in place."""
    container.clear()
    if isinstance(container, dict):
        container.update(before if isinstance(before, dict) else ())
    elif isinstance(container, set):
        container.update(before)
    else:
        container.extend(before)


def holds_fake(value: object, depth: int = DEPTH) -> bool:
    """Whether a fake tensor is in `value`: in containers, and in the attributes of plain objects."""
    if isinstance(value, torch.Tensor):
        return isinstance(value, FakeTensor)
    if depth == 0 or isinstance(value, type | nn.Module | str | bytes):
        return False
    if isinstance(value, dict):
        return len(value) <= LARGEST and any(holds_fake(v, depth - 1) for v in list(value.values()))
    if isinstance(value, list | tuple | set | frozenset | deque):
        return len(value) <= LARGEST and any(holds_fake(v, depth - 1) for v in list(value))
    attributes = attributes_of(value)
    return attributes is not None and any(holds_fake(v, depth - 1) for v in list(attributes.values()))


def fake_in(model: nn.Module) -> str | None:
    """Name of an attribute of `model` that holds a fake tensor which an earlier trace left there."""
    for name, module in model.named_modules():
        for attribute, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if attribute not in ("_modules", "sparsify") and holds_fake(value, 2):
                return f"{name}.{attribute}".lstrip(".")
    return None


def version_of(tensor: torch.Tensor) -> int | None:
    """The count of writes to a tensor; None where torch keeps none (inference tensors, subclasses)."""
    try:
        return tensor._version
    except Exception:
        return None


__all__ = ["fake_in", "untouched"]
