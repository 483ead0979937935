"""Observe: run the forward once more, on fake tensors, and record which Python code had a structure's units in its hands.

    up(x) ──▶ h ──▶ act(h) ──▶ … ──▶ down(h)
         └────── the window of a structure: from the product that makes its units to the one that reads them ──────┘

A trace proves what it saw. Reordering units is right on every path only if no code that runs inside the window could have done
something else with them. So this module records, per structure: the operations on its units, every bytecode instruction of
the model's own Python that ran inside the window (which branches were taken, and which were not), who returned units after they were
read, which modules kept them, and which parameters and buffers were read at all. `prove_units` judges.

Tensors are recognised by their storage, so views and in-place writes need no rules. The model's code is every file that belongs to
neither torch nor the standard library.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import inspect
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.passes.detect.axes import words
from sparsify.program.structure import CONSUMERS, Structure

if TYPE_CHECKING:
    from _typeshed import TraceFunction

Units = frozenset[int]
NONE: Units = frozenset()
# Besides the standard library: torch, what torch itself calls, and packages whose branches are about shapes only.
TRUSTED_PACKAGES = words(
    "torch sparsify numpy einops typing_extensions sympy mpmath networkx jinja2 filelock fsspec packaging triton optree"
)


@dataclass
class FrameLog:
    """One activation of a function of the model: `path` holds `(instruction offset, operations dispatched before it)`.

    choices: arguments for which another call may pass what treats single units (a gain, a function, a mode). held: locals that
    stood ready when units were made, with what they were: a choice, or a tensor's shape.
    """

    code: CodeType
    choices: frozenset[str]
    path: list[tuple[int, int]] = field(default_factory=list)
    held: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    windows_seen: int = 0


@dataclass
class Window:
    """One passage of a structure's units: made by operation `start`, last touched by operation `stop`."""

    start: int
    stop: int
    consumed: bool = False


@dataclass
class Sighting:
    """What became of one structure's units in one run.

    operations: names of the operators that touched them, in order. returned: functions that returned them after they were read.
    """

    windows: list[Window] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)


@dataclass
class Observation:
    """One run. kept: `(module, attribute)` where a structure's units stayed after the run, by number of the structure."""

    sightings: list[Sighting]
    frames: list[FrameLog]
    read: frozenset[str]
    kept: dict[int, tuple[str, str]]

    @functools.cached_property
    def untaken(self) -> dict[CodeType, frozenset[str]]:
        """Code that ran → names that it mentions in instructions that did not."""
        ran: dict[CodeType, set[int]] = {}
        for log in self.frames:
            ran.setdefault(log.code, set()).update(offset for offset, _ in log.path)
        return {
            code: frozenset(mentioned(i for i in instructions(code) if i.offset not in offsets))
            for code, offsets in ran.items()
        }


@functools.cache
def instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(dis.get_instructions(code))


def mentioned(code: Iterable[dis.Instruction]) -> set[str]:
    named = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "STORE_ATTR"}
    return {str(i.argval) for i in code if i.opname in named}


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class UnitTaint(TorchDispatchMode):
    """Follows the units of structures through every operation, by storage.

    units: storages that hold units. made_by, read_by: storages of parameters (and their views) that make and that read units.
    """

    def __init__(self, structures: tuple[Structure, ...], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.clock = 0
        self.windows = 0  # how many have been opened so far
        self.sightings = [Sighting() for _ in structures]
        self.units: dict[int, Units] = {}
        self.made_by: dict[int, Units] = {}
        self.read_by: dict[int, Units] = {}
        self.parameters: set[int] = set()
        self.names: dict[int, str] = {id(t): name for name, t in tensors.items()}
        self.seen: set[str] = set()
        self.alive: list[object] = []  # a storage that is gone would lend its key to another
        for tensor in tensors.values():
            self.parameters.add(storage_key(tensor))
        for number, structure in enumerate(structures):
            for site in structure.sites:
                tensor = tensors.get(site.param)
                if tensor is None:
                    continue
                table = self.read_by if site.role in CONSUMERS else self.made_by
                key = storage_key(tensor)
                table[key] = table.get(key, NONE) | {number}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.clock += 1
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in inputs:
            name = self.names.get(id(tensor))
            if name is not None:
                self.seen.add(name)
        keys = [storage_key(t) for t in inputs]
        held: Units = NONE.union(*(self.units.get(k, NONE) for k in keys))
        making: Units = NONE.union(*(self.made_by.get(k, NONE) for k in keys))
        reading: Units = NONE.union(*(self.read_by.get(k, NONE) for k in keys))
        if not held and not making and not reading:
            return out
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if all(k in self.parameters for k in keys):  # a view or a cast of parameters alone
            for tensor in results:
                key = self.remember(tensor)
                self.parameters.add(key)
                self.made_by[key] = self.made_by.get(key, NONE) | making
                self.read_by[key] = self.read_by.get(key, NONE) | reading
            return out
        if str(func.overloadpacket).startswith("prim."):  # a question about the device
            return out
        read = held & reading
        for number in held | making:
            self.note(number, str(func.overloadpacket), number in held, number in read)
        left = (held | making) - read
        if left:
            for tensor in results:
                key = self.remember(tensor)
                self.units[key] = self.units.get(key, NONE) | left
        return out

    def remember(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.alive.append(storage)
        return storage._cdata

    def note(self, number: int, operation: str, held: bool, read: bool) -> None:
        sighting = self.sightings[number]
        sighting.operations.append(operation)
        if not held and (not sighting.windows or sighting.windows[-1].consumed):
            sighting.windows.append(Window(self.clock, self.clock))
            self.windows += 1
        if not sighting.windows:
            return
        sighting.windows[-1].stop = self.clock
        sighting.windows[-1].consumed |= read

    def units_in(self, value: object, depth: int = 3) -> Units:
        """Structures whose units a Python value holds: a tensor, or containers of tensors."""
        if isinstance(value, Tensor):
            return self.units.get(storage_key(value), NONE) if self.units else NONE
        if depth == 0 or not self.units:
            return NONE
        return NONE.union(*(self.units_in(v, depth - 1) for v in members(value)))


def members(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, f.name, None) for f in fields(value))


class FrameTracer:
    """Records the path through the model's own Python, instruction by instruction, for the time of a `with` block.

    The garbage collector waits meanwhile: what it calls (`gc.callbacks`, finalisers) would look like code of the model.
    """

    def __init__(self, taint: UnitTaint) -> None:
        self.taint = taint
        self.frames: list[FrameLog] = []
        self.own: dict[CodeType, bool] = {}
        self.before: TraceFunction | None = None
        self.collecting = False

    def __enter__(self) -> FrameTracer:
        self.before, self.collecting = sys.gettrace(), gc.isenabled()
        gc.disable()
        sys.settrace(self.called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)
        if self.collecting:
            gc.enable()

    def called(self, frame: FrameType, event: str, _arg: object) -> TraceFunction | None:
        code = frame.f_code
        own = self.own.get(code)
        if own is None:
            own = self.own[code] = is_model_code(frame.f_globals.get("__name__"))
        if not own:
            return None
        count = code.co_argcount + code.co_kwonlyargcount
        count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        values = frame.f_locals
        choices = frozenset(n for n in code.co_varnames[:count] if n in values and is_a_choice(values[n]))
        log = FrameLog(code, choices, windows_seen=self.taint.windows)
        self.frames.append(log)
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        append, taint = log.path.append, self.taint

        def local(frame: FrameType, event: str, arg: object) -> TraceFunction | None:
            if event == "opcode":
                append((frame.f_lasti, taint.clock))
                if log.windows_seen != taint.windows:
                    log.windows_seen = taint.windows
                    log.held.update(held_by(frame.f_locals))
            elif event == "return":
                for number in taint.units_in(arg):
                    windows = taint.sightings[number].windows
                    if windows and windows[-1].consumed:
                        taint.sightings[number].returned.append(code.co_qualname)
            return local

        return local


def is_a_choice(value: object) -> bool:
    """Whether another call may pass, in place of this value, what treats single units differently.

    Nothing or a number: one value per unit. A flag, a word, a function, a container: whatever the code makes of it. Sizes are none.
    """
    if isinstance(value, Tensor):
        return value.dim() == 0 or value.shape[-1] == 1
    if isinstance(value, int) and not isinstance(value, bool):
        return value in (0, 1)
    if isinstance(value, nn.Module | type | torch.dtype | torch.device):
        return False
    return value is None or isinstance(value, float | bool | str | slice | list | tuple | Mapping) or callable(value)


def held_by(values: Mapping[str, object]) -> dict[str, tuple[int, ...] | None]:
    """Of a frame's locals those that could single out units later: numbers and functions, and tensors with their shape."""
    found: dict[str, tuple[int, ...] | None] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            found[name] = tuple(value.shape)
        elif value is None or isinstance(value, float | FunctionType | BuiltinFunctionType | functools.partial):
            found[name] = None
    return found


def is_model_code(module_name: object) -> bool:
    """Whether code of a module belongs to the model: to neither torch, nor the standard library, nor sparsify."""
    root = str(module_name or "").partition(".")[0]
    if root.startswith("namedtuple_"):  # generated by collections, here for torch's dispatcher
        return False
    return root not in TRUSTED_PACKAGES and (root == "__main__" or root not in sys.stdlib_module_names)


def observe(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    structures: tuple[Structure, ...],
    tensors: Mapping[str, Tensor],
    fake: bool = True,
) -> Observation:
    """Run `model` on the example and record it. Raises whatever its forward raises.

    model: may be written to by its own forward (a shadow copy). tensors: its parameters and buffers by canonical name.
    fake: compute nothing, every tensor is fake; else the forward really runs (code that looks at values, operators without a meta form).
    """
    taint = UnitTaint(structures, tensors)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    with torch.no_grad(), same_randomness(), quiet_fakes(), mode or contextlib.nullcontext():
        if mode is not None:
            args, kwargs = pytree.tree_map(
                lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, (args, kwargs)
            )
        with taint, FrameTracer(taint) as tracer:
            model(*args, **kwargs)
    kept: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if attribute in ("_parameters", "_modules"):
                continue
            for number in taint.units_in(value):
                kept.setdefault(number, (path, attribute))
    return Observation(taint.sightings, tracer.frames, frozenset(taint.seen), kept)


@contextlib.contextmanager
def same_randomness(seed: int = 0) -> Iterator[None]:
    """What the forward draws (layers that it drops) is the same in every run, and the caller's generators do not move."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Without the log that torch writes for an operator that has no meta form: such a run is made again for real."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
