"""What a host is made of besides its weights: classes, settings, config; as recorded when its step was checked, and as it is now.

    checked host ──describe──▶ Structure, kept with the step (and in its pickles)
    host now     ──describe──▶ compared whenever a step is bound anew: where anything differs, the graph is not this model's any more

    Snapshot: the same as identities, quick to compare, while a binding lives

Linears are left out, whose binding reads what they are: they may be exchanged for others of the same sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import nn

SETTINGS = (bool, int, float, str, tuple, type(None))
FUNCTIONS = (FunctionType, BuiltinFunctionType)
CONFIG = (*SETTINGS, list, dict)
#: what no forward of an evaluated model reads
BESIDE = frozenset({"training", "gradient_checkpointing"})
OF_NO_FORWARD = frozenset({
    "use_cache", "architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path", "problem_type", "id2label", "label2id",
})  # fmt: skip

Settings: TypeAlias = dict[str, object]
Structure: TypeAlias = dict[str, Settings]


def describe(host: nn.Module, linears: Iterable[str]) -> Structure:
    """Module or "config" → its settings, plain values that pickle. linears: names of modules that are left out."""
    left_out = set(linears)
    found = {name: settings(module) for name, module in host.named_modules() if name not in left_out}
    found[""].pop("forward of its own")  # the step itself
    return {**found, "config": config_settings(host)}


def settings(module: nn.Module) -> Settings:
    kind = type(module)
    tensors = {f"{name} is there": t is not None for name, t in (*module._parameters.items(), *module._buffers.items())}
    values = {name: value for name, value in vars(module).items() if read_by_a_forward(name, value)}
    functions = {name: function_name(f) for name, f in vars(module).items() if isinstance(f, FUNCTIONS)}
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "forward": function_name(kind.forward),
        "forward of its own": type(vars(module)["forward"]).__name__ if "forward" in vars(module) else None,
        **tensors,
        **values,
        **functions,
    }


def read_by_a_forward(name: str, value: object) -> bool:
    return isinstance(value, SETTINGS) and name not in BESIDE and not name.startswith("_")


def function_name(function: Callable[..., Any]) -> str:
    """What tells a function from another one of the same name, in every process."""
    code = getattr(function, "__code__", None)
    where = "" if code is None else f" of {len(code.co_code)} bytes, line {code.co_firstlineno}"
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', '')}{where}"


def config_settings(host: nn.Module) -> Settings:
    config = getattr(host, "config", None)
    return {
        name: copy.deepcopy(value)
        for name, value in (vars(config).items() if hasattr(config, "__dict__") else ())
        if isinstance(value, CONFIG) and name.strip("_") not in OF_NO_FORWARD and not name.endswith("token_id")
    }


def difference(then: Structure, now: Structure) -> str | None:
    """The first thing that is another than it was, in words; None: nothing."""
    if then.keys() != now.keys():
        return ", ".join(sorted(then.keys() ^ now.keys()))
    for name, before in then.items():
        for key, value in before.items():
            if key not in now[name] or now[name][key] != value:
                return f"{name or 'the model'}: {key}"
    return None


@dataclass
class Snapshot:
    """Modules below and with the host, the objects that they hold, and their settings; `same()` is asked before a step."""

    host: nn.Module
    tree: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.tree = list(self.host.modules())
        self.children = [list(module._modules.values()) for module in self.tree]
        self.classes = [(type(module), type(module).forward) for module in self.tree]
        self.tables = [table for m in self.tree for table in (m._parameters, m._buffers)]
        self.tensors = self.held()
        there = [t for t in self.tensors if t is not None]
        self.there, self.places, self.versions = there, [t.data_ptr() for t in there], list(map(version, there))
        self.attributes = [
            (vars(m), name, value)
            for m in self.tree
            for name, value in vars(m).items()
            if read_by_a_forward(name, value) or isinstance(value, (*FUNCTIONS, torch.Tensor))
        ]
        self.config = config_settings(self.host)
        self.forwards = self.own_forwards()

    def held(self) -> list[torch.Tensor | None]:
        return [tensor for table in self.tables for tensor in table.values()]

    def own_forwards(self) -> list[object]:
        return [vars(m).get("forward") for m in self.tree[1:]]

    def same(self) -> bool:
        """Whether the host holds the same modules and tensors, unwritten, with the same settings."""
        held = self.held()
        return (
            len(held) == len(self.tensors)
            and all(map(is_, held, self.tensors))
            and [t.data_ptr() for t in self.there] == self.places
            and list(map(version, self.there)) == self.versions
            and all(list(m._modules.values()) == c for m, c in zip(self.tree, self.children, strict=True))
            and all(type(m) is k and k.forward is f for m, (k, f) in zip(self.tree, self.classes, strict=True))
            and all(held_still(there.get(name, there), value) for there, name, value in self.attributes)
            and all(map(is_, self.own_forwards(), self.forwards))
            and config_settings(self.host) == self.config
        )


def held_still(now: object, before: object) -> bool:
    return now is before or (isinstance(before, SETTINGS) and type(now) is type(before) and now == before)


def version(tensor: torch.Tensor) -> int:
    """Its version; inference tensors have none and cannot be noticed to change."""
    return 0 if tensor.is_inference() else tensor._version


__all__ = ["Snapshot", "Structure", "describe", "difference"]
