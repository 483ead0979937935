"""Copies of a module tree, of models that `copy.deepcopy` refuses too.

    user's tree ──copy_module_tree──▶ new modules of the same classes: what a forward sets in one is not seen in the other

Modules, containers and plain objects are copied member by member. Tensors are copied (`tensors="copied"`; what `memo` maps is
taken from there) or shared (`tensors="shared"`, for a trace, which reads their shapes only). Functions and methods that are
bound to the tree are bound to the copy. What exists once is shared: locks, threads, files, sockets, loggers, data loaders,
running generators, and every object that refuses to be copied. An activation that is stored on a module loses its history.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import enum
import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection
from typing import Any, Literal, TypeVar

import torch
from torch import fx, nn

from sparsify.errors import CaptureError

#: Attributes of a compiled root that belong to it alone.
OWN = ("sparsify", "_sparsify_hooks")
ATOMIC = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, type, range, slice, property, type(Ellipsis), type(NotImplemented),
        types.BuiltinFunctionType, types.ModuleType, types.CodeType, torch.dtype, torch.device, torch.layout, torch.Size,
        torch.memory_format, torch._ops.OpOverload, torch._ops.OpOverloadPacket,
    }
)  # fmt: skip
SEARCH_DEPTH = 4  # levels of containers and closures that are searched for modules of the tree
#: Packages whose objects hold what exists once (a file, a process, a data set); tokenizers are read only.
SHARED_PACKAGES = (
    "torch.utils.data",
    "torch.distributed",
    "logging",
    "socket",
    "io",
    "_io",
    "tokenizers",
    "sentencepiece",
)
#: Modules of the standard library whose objects are made of what the user gave them, so that they are copied member by member.
TRANSPARENT = (
    "argparse",
    "builtins",
    "collections",
    "functools",
    "types",
    "typing",
    "copyreg",
    "dataclasses",
    "contextlib",
)
MISSING = object()
Model = TypeVar("Model", bound=nn.Module)


def copy_module_tree(
    model: Model,
    memo: dict[int, object] | None = None,
    *,
    tensors: Literal["copied", "shared"] = "copied",
    leave_out: Collection[str] = OWN,
) -> Model:
    """A copy of `model` and of all modules below it.

    memo: `id(object)` → what stands for it in the copy, as for `copy.deepcopy` (new Parameters over shared memory, say).
    tensors: "copied" copies the tensors that `memo` does not map, "shared" leaves them the same objects.
    leave_out: attributes of the root that the copy does not get.

    Raises CaptureError with the attribute's full name for a module that cannot be copied (TorchScript).
    """
    return Copier(model, {} if memo is None else memo, tensors == "shared", frozenset(leave_out)).module(model)


class Copier:
    """One copy under way. path: the attribute that is being copied, for messages."""

    def __init__(self, root: nn.Module, memo: dict[int, object], share: bool, leave_out: frozenset[str]) -> None:
        self.root, self.memo, self.share, self.leave_out = root, memo, share, leave_out
        self.tree = {id(module) for module in root.modules()}
        self.path: list[str] = []
        self.alive: list[object] = []  # temporaries whose ids are in the memo

    def value(self, x: Any) -> Any:
        """What stands for `x` in the copy."""
        kind = type(x)
        if kind in ATOMIC or isinstance(x, type | enum.Enum):
            return x
        found = self.memo.get(id(x), MISSING)
        if found is not MISSING:
            return found
        if isinstance(x, nn.Module):
            return self.module(x)
        if isinstance(x, torch.Tensor):
            return self.tensor(x)
        if kind in (dict, OrderedDict, defaultdict):
            return self.mapping(x)
        if kind in (list, set, deque):
            return self.collection(x)
        if kind in (tuple, frozenset):
            items = [self.value(item) for item in x]
            same = all(a is b for a, b in zip(items, x, strict=True))
            return self.memo.setdefault(id(x), x if same else kind(items))
        if kind is types.FunctionType:
            return self.function(x)
        if kind is types.MethodType:
            return types.MethodType(self.value(x.__func__), self.value(x.__self__))
        if kind is functools._lru_cache_wrapper:
            return self.cached_function(x)
        if kind is weakref.ReferenceType:
            target = x()
            return x if target is None or id(target) not in self.tree else weakref.ref(self.value(target))
        return self.other(x)

    def member(self, name: str, x: Any) -> Any:
        self.path.append(name)
        found = self.value(x)
        self.path.pop()
        return found

    # ---------------------------------------------------------------------------------------------- modules and tensors

    def module(self, x: Model) -> Model:
        if isinstance(x, torch.jit.ScriptModule | fx.GraphModule):
            return self.compiled_module(x)
        kind = type(x)
        if isinstance(x, torch._dynamo.OptimizedModule):
            made = self.memo[id(x)] = kind(self.value(x._orig_mod), x.dynamo_ctx)
            return made
        y = object.__new__(kind)
        self.memo[id(x)] = y
        state: object = x.__dict__
        restore = None
        if not self.share and kind.__setstate__ is not nn.Module.__setstate__:
            with contextlib.suppress(Exception):  # parametrized modules have one that only refuses
                state = x.__getstate__()  # type: ignore[attr-defined]
                restore = getattr(y, "__setstate__", None)
        if not isinstance(state, dict):
            restore, state = None, x.__dict__
        left = self.leave_out if x is self.root else ()
        members = {name: self.member(name, value) for name, value in list(state.items()) if name not in left}
        if restore is not None:
            restore(members)
        else:
            y.__dict__.update(members)
        for name in copyreg._slotnames(kind):  # type: ignore[attr-defined]
            if hasattr(x, name):
                object.__setattr__(y, name, self.value(getattr(x, name)))
        return y

    def compiled_module(self, x: Model) -> Model:
        """A module that is a graph: it is copied by its own class."""
        if self.share and isinstance(x, torch.jit.ScriptModule):
            return x
        before = len(self.memo)
        try:
            made = self.memo[id(x)] = copy.deepcopy(x, self.memo)
            return made
        except Exception as error:
            self.forget(before)
            raise CaptureError(
                f"{'.'.join(n for n in self.path if n != '_modules') or 'the model'} is a {type(x).__name__}, which cannot be "
                f"copied ({type(error).__name__}: {first_line(error)}): put the original nn.Module in its place"
            ) from None

    def tensor(self, x: torch.Tensor) -> torch.Tensor:
        if self.share:
            return x
        if x.is_leaf or not x.requires_grad:
            before = len(self.memo)
            try:
                return copy.deepcopy(x, self.memo)
            except Exception:  # a subclass that does not copy, or a tensor inside functorch
                self.forget(before)
        made = self.memo[id(x)] = x.detach().clone()
        return made

    # ------------------------------------------------------------------------------------------------------- containers

    def mapping(self, x: Any) -> Any:
        y = self.memo[id(x)] = defaultdict(x.default_factory) if isinstance(x, defaultdict) else type(x)()
        for key, item in list(x.items()):
            y[self.value(key)] = self.member(str(key), item)
        return y

    def collection(self, x: Any) -> Any:
        y = self.memo[id(x)] = deque(maxlen=x.maxlen) if isinstance(x, deque) else type(x)()
        add = y.add if isinstance(y, set) else y.append
        for number, item in enumerate(list(x)):
            add(self.member(str(number), item))
        return y

    # -------------------------------------------------------------------------------------------------------- functions

    def reaches(self, x: object, depth: int = SEARCH_DEPTH) -> bool:
        """Whether a function, a method or a container holds a module or a mapped tensor of the tree."""
        if id(x) in self.tree or (isinstance(x, torch.Tensor) and id(x) in self.memo):
            return True
        if depth == 0 or type(x) in ATOMIC:
            return False
        inside: list[object] = []
        if isinstance(x, types.MethodType):
            inside = [x.__self__, x.__func__]
        elif isinstance(x, types.FunctionType):
            inside = [*cell_values(x), *(x.__defaults__ or ())]
        elif isinstance(x, functools.partial):
            inside = [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, dict):
            inside = list(x.values())
        elif isinstance(x, list | tuple | set | frozenset | deque):
            inside = list(x)
        elif isinstance(x, functools._lru_cache_wrapper):
            inside = [x.__wrapped__]
        elif isinstance(x, weakref.ReferenceType):
            inside = [x()]
        return any(self.reaches(item, depth - 1) for item in inside)

    def function(self, x: types.FunctionType) -> types.FunctionType:
        """A function whose closure holds modules of the tree, over the copy; any other function is the same object.

        Before a trace, containers in a closure are copied too: a hook may collect activations in one.
        """
        holds = self.share and any(isinstance(v, dict | list | set | deque) for v in cell_values(x))
        if not holds and not self.reaches(x):
            return x
        cells = []
        for cell in x.__closure__ or ():
            if id(cell) not in self.memo:
                self.memo[id(cell)] = types.CellType()
            cells.append(self.memo[id(cell)])
        y = types.FunctionType(x.__code__, x.__globals__, x.__name__, None, tuple(cells))
        self.memo[id(x)] = y
        y.__defaults__ = None if x.__defaults__ is None else tuple(self.value(v) for v in x.__defaults__)
        y.__kwdefaults__ = x.__kwdefaults__
        y.__qualname__, y.__module__, y.__doc__ = x.__qualname__, x.__module__, x.__doc__
        y.__dict__.update({k: self.value(v) if k == "__wrapped__" else v for k, v in x.__dict__.items()})
        for old, new in zip(x.__closure__ or (), cells, strict=True):
            try:
                held = old.cell_contents
            except ValueError:  # not filled yet
                continue
            mapped = self.value(held) if self.reaches(held) or (self.share and is_container(held)) else held
            new.cell_contents = mapped
        return y

    def cached_function(self, x: functools._lru_cache_wrapper[object]) -> object:
        """`lru_cache` over something of the tree gets an empty cache over the copy's."""
        if not self.share and not self.reaches(x.__wrapped__):
            return x
        y = functools.lru_cache(**x.cache_parameters())(self.value(x.__wrapped__))
        return self.memo.setdefault(id(x), y)

    # ---------------------------------------------------------------------------------------------------- other objects

    def other(self, x: object) -> object:
        """Any other object: by its own protocol, or shared where it has none or where that fails."""
        kind = type(x)
        home = kind.__module__ or ""
        if any(home == package or home.startswith(package + ".") for package in SHARED_PACKAGES):
            return self.memo.setdefault(id(x), x)
        if self.share and home.partition(".")[0] == "numpy":
            return self.memo.setdefault(id(x), x)
        before = len(self.memo)
        root = home.partition(".")[0]
        try:
            if hasattr(kind, "__deepcopy__") or (root in sys.stdlib_module_names and root not in TRANSPARENT):
                return self.memo.setdefault(id(x), copy.deepcopy(x, self.memo))
            return self.rebuilt(x)
        except CaptureError:
            raise
        except Exception:  # a lock, a thread, a handle: it exists once
            self.forget(before)
            return self.memo.setdefault(id(x), x)

    def rebuilt(self, x: object) -> object:
        """Through `__reduce_ex__`, as `copy.deepcopy` does, with the members copied here."""
        reductor = copyreg.dispatch_table.get(type(x))
        recipe: Any = reductor(x) if reductor is not None else x.__reduce_ex__(4)
        if isinstance(recipe, str):
            return x
        parts: list[Any] = [*recipe, None, None, None]
        make, arguments, state, items, pairs = parts[:5]
        self.alive.append(recipe)
        y: Any = make(*(self.value(a) for a in arguments))
        self.memo[id(x)] = y
        if state is not None:
            plain = type(x).__reduce_ex__ is object.__reduce_ex__ and not hasattr(y, "__setstate__")
            if plain:
                attributes, slots = state if isinstance(state, tuple) else (state, None)
                for name, value in (attributes or {}).items():
                    y.__dict__[name] = self.member(name, value)
                for name, value in (slots or {}).items():
                    object.__setattr__(y, name, self.member(name, value))
            elif hasattr(y, "__setstate__"):
                y.__setstate__(self.value(state))
            else:
                y.__dict__.update(self.value(state))
        for item in items or ():
            y.append(self.value(item))
        for key, item in pairs or ():
            y[self.value(key)] = self.value(item)
        return y

    def forget(self, before: int) -> None:
        """Drop from the memo what an attempt that failed left there half made."""
        while len(self.memo) > before:
            self.memo.popitem()


def cell_values(function: types.FunctionType) -> list[object]:
    """What the closure of a function holds."""
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return values


def is_container(x: object) -> bool:
    return isinstance(x, dict | list | set | deque)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's text, cut to `limit` characters."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= limit else text[: limit - 1] + "…"


__all__ = ["copy_module_tree", "first_line"]
