"""Weights that a module's ancestors read past it: `F.linear(x, self.up.weight)` where `self.up(x)` was traced.

    if self.fused and not self.training:
        return fused_layer(x, self.up.weight)      ──▶ what trains in `up` would be left out there: the weight is declined

A trained part lives beside its weight, and only the module's own forward puts the two together. A read in the traced forward shows
as a node outside the module (`why_not_trainable`); this finds those in branches and methods that the trace did not run, by the
bytecode of the classes above the module. A look at the weight's dtype, device or shape is no read, nor is what initialises, saves or
shows a model. `nn.TransformerEncoderLayer` has such a branch too, which `sparsify.model.fast_paths` closes instead.
"""

from __future__ import annotations

import functools
import itertools
import types

from torch import nn

from sparsify.passes.detect.axes import words
from sparsify.passes.observe import instructions
from sparsify.passes.prove_units import FRAMEWORK, SILENT_METHODS, methods_of
from sparsify.program import Program

#: what is asked of a weight without reading a value
LOOKS = words(
    "dtype device shape size dim ndim numel element_size is_floating_point is_cuda is_meta requires_grad requires_grad_ grad data_ptr "
    "is_contiguous stride __class__ itemsize nbytes names layout is_sparse is_quantized quant_state"
)
#: settings whose usual value closes the branch that reads weights (Bloom's slices of its products, `slow_but_exact`)
CLOSED = {"pretraining_tp": 1}
#: between `self.up` and `.weight`: an index
BETWEEN = words("BINARY_SUBSCR BINARY_OP LOAD_CONST LOAD_SMALL_INT")


def read_past(program: Program, param: str) -> str | None:
    """The code above its module that reads a weight directly, as a reason to decline it; None where there is none."""
    names = [n for n, canonical in program.aliases.items() if canonical == param] or [param]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parts = owner.split(".") if owner else []
        for depth in range(len(parts)):
            above = program.host.get_submodule(".".join(parts[:depth]))
            child = next((p for p in reversed(parts[depth:]) if not p.isdigit()), None)
            if child is None:
                continue
            closed = frozenset(n for n, value in CLOSED.items() if getattr(above, n, None) == value)
            found = direct_read(type(above), child, leaf, closed)
            if found is not None:
                return f"'{found}' reads its weight past its own forward, where what trains beside it would be left out"
    return None


@functools.lru_cache(maxsize=4096)
def direct_read(cls: type[nn.Module], child: str, leaf: str, closed: frozenset[str] = frozenset()) -> str | None:
    """The method of a class (of the model, not of a framework) that reads `self.….child.leaf` as a value; None if none does.

    closed: settings that keep a method that asks for them from reading it.
    """
    for method in methods_of(cls):
        module = str(method.__module__)
        if module.partition(".")[0] == "torch" or module.startswith(FRAMEWORK):
            continue
        if method.__name__.startswith((*SILENT_METHODS, "fix_init")) or closed & set(method.__code__.co_names):
            continue
        if any(reads(code, child, leaf) for code in with_inner(method.__code__)):
            return method.__code__.co_qualname
    return None


def with_inner(code: types.CodeType) -> list[types.CodeType]:
    """A function's code and that of the functions inside it."""
    found = [code]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += with_inner(constant)
    return found


def reads(code: types.CodeType, child: str, leaf: str) -> bool:
    """Whether code reads `….child.leaf`, or `leaf` of a variable where it also mentions `child`, and not only to look at it."""
    if leaf not in code.co_names or child not in (*code.co_names, *code.co_consts):
        return False
    steps = [i for i in instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    for number, step in enumerate(steps):
        if step.opname not in ("LOAD_ATTR", "LOAD_METHOD") or step.argval != leaf:
            continue
        after = steps[number + 1] if number + 1 < len(steps) else None
        if after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD") and after.argval in LOOKS:
            continue
        if is_type(steps[number + 1 : number + 3]):  # isinstance(self.up.weight, torch.Tensor)
            continue
        if belongs(steps[:number], child):
            return True
    return False


def only_looks_at(code: types.CodeType, leaf: str) -> bool:
    """Whether code asks an attribute of this name for its dtype, device or shape at most (`self.weight.dtype`)."""
    steps = [i for i in instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    loads = [n for n, step in enumerate(steps) if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval == leaf]
    after = [steps[n + 1] if n + 1 < len(steps) else None for n in loads]
    return all(i is not None and i.opname in ("LOAD_ATTR", "LOAD_METHOD") and i.argval in LOOKS for i in after)


def is_type(after: list) -> bool:
    """Whether what is loaded next is the type of tensors: `Tensor`, `torch.Tensor`, `nn.Parameter`."""
    loads = itertools.takewhile(lambda i: i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_ATTR"), after)
    return any(i.argval in ("Tensor", "Parameter") for i in loads)


def belongs(before: list, child: str) -> bool:
    """Whether the object whose weight is loaded may be the child: by its name, or a variable, which may hold it."""
    for step in reversed(before):
        if step.opname in BETWEEN:
            continue
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            return step.argval == child
        return step.opname.startswith("LOAD_FAST") and step.argval != "self"
    return False
