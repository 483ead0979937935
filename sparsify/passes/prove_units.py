"""Prove units: which feed-forward structures may be reordered on *every* path of the model, not only on the traced one.

model.layers.0.mlp   every branch around its units was taken both ways, every parameter was read   ──▶ may be permuted
model.aux_block      'if self.training: … self.aux(h)' was never taken                             ──▶ trains in place, and why

A structure that is not proven is trained by the same units with the same gradients, gathered where they lie. What counts as a proof:

* the forward could be observed (`observe`), in eval mode and in train mode, with the same operations on the units but dropout; where
  those differ, a trace in train mode finds the same structure at the same sites;
* every branch in code that ran between making and reading the units went both ways, or what was not run can only cast, warn or raise;
* nothing that was not run in that code, and no other method of those classes and of what holds them, names the structure's modules;
* nothing that a caller may choose (a gain, a mask, a mode, a function) meets the units, nor what was prepared from it;
* the units are not returned or kept after they were read, and no hook of the user sees them;
* every parameter, and every buffer with more than one entry, of the module that holds the structure was read.
"""

from __future__ import annotations

import dis
import functools
import itertools
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from sparsify.model.untouched import untouched
from sparsify.passes.base import Context, PassResult
from sparsify.passes.detect.axes import words
from sparsify.passes.detect.find_structures import find_structures
from sparsify.passes.observe import (
    FrameLog,
    Observation,
    Sighting,
    instructions,
    is_model_code,
    mentioned,
    observe,
)
from sparsify.plan import S2FT, PaCA
from sparsify.program import Program
from sparsify.program.capture import capture_training, evaluating, shadow_of
from sparsify.program.structure import CONSUMERS, Structure

DROPOUT = frozenset(
    "aten." + name
    for name in ("native_dropout", "bernoulli_", "bernoulli", "empty_like", "div_", "dropout", "rand_like")
)
LARGEST_COPY = 2**30  # bytes of a model that may be copied to be run for real
# What code that was not run may name without being able to treat one channel differently from another.
HARMLESS_NAMES = words(
    "to dtype device weight type_as is_floating_point torch isinstance Tensor int8 float16 bfloat16 float32 float64 "
    "logger warning warning_once warn warnings"
)
HARMLESS_OPERATIONS = words(
    "LOAD_FAST LOAD_GLOBAL LOAD_CONST LOAD_ATTR LOAD_METHOD LOAD_DEREF STORE_FAST PRECALL CALL KW_NAMES PUSH_NULL SWAP COPY "
    "POP_TOP NOP RESUME CACHE COMPARE_OP IS_OP JUMP_FORWARD EXTENDED_ARG CALL_KW TO_BOOL LOAD_FAST_CHECK LOAD_FAST_LOAD_FAST "
    "LOAD_FAST_BORROW LOAD_FAST_BORROW_LOAD_FAST_BORROW LOAD_SMALL_INT NOT_TAKEN"
)
# Methods that look at a module without running it.
SILENT_METHODS = (
    "__",
    "_init",
    "init",
    "reset",
    "_reset",
    "extra_repr",
    "_load",
    "load",
    "_save",
    "save",
    "from_",
    "post_init",
    "get_input_embeddings",
    "set_input_embeddings",
    "get_output_embeddings",
    "set_output_embeddings",
)
# Base classes that serve every architecture and know none: they reach for no module by name.
FRAMEWORK = (
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.integrations",
    "transformers.utils",
)


def prove_units(program: Program, context: Context) -> PassResult:
    """STRUCTURED → STRUCTURED, with the reason for every feed-forward structure that must not be permuted."""
    rules = [r for r in context.plan.rules if isinstance(r, S2FT | PaCA) and r.permute]
    if not any(isinstance(r, PaCA) or r.structure != "attention" for r in rules):
        return PassResult(program, changed=False)
    structures = tuple(s for s in program.structures if s.kind == "ffn")
    if not structures:
        return PassResult(program, changed=False)
    unproven = why_not_everywhere(program, structures)
    note = (
        f"prove-units: {len(structures) - len(unproven)} of {len(structures)} feed-forward structures may be permuted"
    )
    return PassResult(program.evolve(note, unproven=unproven), changed=unproven != program.unproven)


def why_not_everywhere(program: Program, structures: tuple[Structure, ...]) -> dict[str, str]:
    """Name of a structure → why its units must stay where they are; proven structures are not in it."""
    try:
        evaluated = watch(program, structures, training=False)
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = f"its forward could not be observed ({type(error).__name__}: {text[:160]})"
        return dict.fromkeys((s.name for s in structures), reason)
    found: dict[str, str] = {}
    second = TrainMode(program, structures)
    for number, structure in enumerate(structures):
        reason = why_not_proven(program, structure, [View(evaluated, number)])
        if mentions_mode(program, structure, View(evaluated, number)):
            reason = second.judge(number, evaluated)
        if reason is not None:
            found[structure.name] = reason
    return found


class TrainMode:
    """The second half of a proof, for structures whose code asks for the mode: the run and, where that differs, the trace in train mode."""

    def __init__(self, program: Program, structures: tuple[Structure, ...]) -> None:
        self.program, self.structures = program, structures

    @functools.cached_property
    def run(self) -> Observation | str:
        try:
            return watch(self.program, self.structures, training=True)
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"

    @functools.cached_property
    def twins(self) -> dict[str, Structure]:
        return structures_in_training(self.program)

    def judge(self, number: int, evaluated: Observation) -> str | None:
        """Why the structure must not be permuted, by what both modes did; None if it may."""
        structure, trained = self.structures[number], self.run
        if isinstance(trained, str):
            return f"its code asks for the mode, and train mode could not be observed ({trained})"
        if not trained.sightings[number].operations:  # a layer that this run dropped
            return why_not_proven(self.program, structure, [View(evaluated, number)])
        if differs(evaluated.sightings[number], trained.sightings[number]):
            twin = self.twins.get(structure.name)
            if twin is None or set(twin.sites) != set(structure.sites):
                return "in train mode other operations read its units than in eval mode"
        return why_not_proven(self.program, structure, [View(evaluated, number), View(trained, number)])


def watch(program: Program, structures: tuple[Structure, ...], training: bool) -> Observation:
    """Observe a shadow of the model in one mode, on the captured example: on fake tensors, else (if it is small) on copies."""
    args, kwargs = program.example

    def run(fake: bool) -> Observation:
        with untouched(program.host):
            model = shadow_of(program.host, "shared" if fake else "copied")
            tensors: dict[str, Tensor] = dict(model.named_parameters())
            tensors |= dict(model.named_buffers())
            with evaluating(model, training):
                return observe(model, args, kwargs, structures, tensors, fake)

    try:
        return run(fake=True)
    except Exception:
        tensors = [*program.host.parameters(), *program.host.buffers()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if size > LARGEST_COPY or any(t.is_meta for t in tensors):
            raise
        return run(fake=False)


def structures_in_training(program: Program) -> dict[str, Structure]:
    """What detection finds in a trace in train mode; nothing when that fails."""
    try:
        trained = capture_training(program)
    except Exception:
        return {}
    detection = find_structures(trained.graph, trained.tensor_names, parameters=[i.name for i in trained.inputs])
    return {s.name: s for s in detection.structures}


def differs(one: Sighting, other: Sighting) -> bool:
    """Whether train mode did anything else with the units than eval mode, dropout (and the product with its mask) apart."""
    evaluated, trained = Counter(one.operations), Counter(other.operations)
    masks = trained["aten.bernoulli_"] - evaluated["aten.bernoulli_"]
    more, less = trained - evaluated, evaluated - trained
    for name in DROPOUT:
        more.pop(name, None)
    if more["aten.mul"] <= masks:
        more.pop("aten.mul", None)
    return bool(+more or less)


# --- one structure in one run ---------------------------------------------------------------------------------------------


@dataclass
class View:
    """One structure in one observation: frames that ran while its units were alive, and which of their instructions did."""

    run: Observation
    number: int

    @property
    def sighting(self) -> Sighting:
        return self.run.sightings[self.number]

    @functools.cached_property
    def frames(self) -> list[tuple[FrameLog, set[int]]]:
        windows = self.sighting.windows
        found = []
        for log in self.run.frames:
            if not log.path or not any(log.path[-1][1] >= w.start and log.path[0][1] < w.stop for w in windows):
                continue
            inside = {offset for offset, clock in log.path if any(w.start <= clock < w.stop for w in windows)}
            if inside:
                found.append((log, inside | begun_before(log.code, inside)))
        return found


def mentions_mode(program: Program, structure: Structure, view: View) -> bool:
    """Whether code that handles the units, or a class of the structure's module, asks whether it is in train mode."""
    common = common_path([p.rpartition(".")[0] for p in structure.params()])
    methods = methods_of(type(program.host.get_submodule(common)))
    codes = [log.code for log, _ in view.frames] + [f.__code__ for f in methods if is_model_code(f.__module__)]
    return any("training" in names_in(code) for code in codes)


def why_not_proven(program: Program, structure: Structure, views: list[View]) -> str | None:
    owners = list(dict.fromkeys(p.rpartition(".")[0] for p in structure.params()))
    common = common_path(owners)
    names = names_below(structure, common)
    readers = names_below(structure, common, consumers=True)
    for view in views:
        if not view.sighting.operations:
            return "no operation on its units was observed outside the trace"
        if view.sighting.returned:
            return f"'{view.sighting.returned[0]}' returns the units after they were read"
        if view.number in view.run.kept:
            path, attribute = view.run.kept[view.number]
            return f"'{path or type(program.host).__name__}' keeps the units in '{attribute}'"
    reason = untaken_branch(views, names, readers) or untaken_elsewhere(views, names) or passed_choice(structure, views)
    reason = reason or untraced_method(program.host, common, owners, names, views)
    return reason or watched_by_hooks(program.host, common) or unread_tensor(program, common, views)


def common_path(owners: list[str]) -> str:
    """The innermost module that holds all of them."""
    shared: list[str] = []
    for parts in zip(*(o.split(".") for o in owners), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def names_below(structure: Structure, common: str, consumers: bool = False) -> frozenset[str]:
    """Attribute names by which code in the module `common` reaches the structure's tensors; list indices say nothing."""
    found: set[str] = set()
    for site in structure.sites:
        if consumers and site.role not in CONSUMERS:
            continue
        parts = site.param.removeprefix(common + "." if common else "").split(".")
        path = parts[:-1] or parts  # the leaf name counts only for a tensor of the module itself
        found |= {p for p in path if not p.isdigit()}
    if not found and common:  # reached by number: `self.ffn[:2](x)` says the name of the container
        found |= {next(p for p in reversed(common.split(".")) if not p.isdigit())}
    return frozenset(found)


def begun_before(code: types.CodeType, inside: set[int]) -> set[int]:
    """Instructions of statements that were under way when the units were made: in `act(self.up(x))`, `act` waits on the stack."""
    found: set[int] = set()
    waiting: list[int] = []
    before = False
    for instruction in instructions(code):
        if instruction.offset in inside:
            if not before:
                found.update(waiting)
            before = True
            continue
        before = False
        if instruction.opname.startswith(("STORE_", "POP_TOP", "RETURN_", "RESUME", "FOR_ITER", "JUMP_BACKWARD")):
            waiting.clear()
        else:
            waiting.append(instruction.offset)
    return found


def is_conditional(instruction: dis.Instruction) -> bool:
    return ("JUMP" in instruction.opname and "IF" in instruction.opname) or instruction.opname == "FOR_ITER"


def untaken_branch(views: list[View], names: frozenset[str], readers: frozenset[str]) -> str | None:
    """The first branch near the units that went one way only, where the other way could treat them differently."""
    merged: dict[types.CodeType, tuple[set[int], set[tuple[int, int]], set[int]]] = {}
    for view in views:
        for log, inside in view.frames:
            ran, edges, near = merged.setdefault(log.code, (set(), set(), set()))
            offsets = [o for o, _ in log.path]
            ran.update(offsets)
            edges.update(itertools.pairwise(offsets))
            near |= inside
    for code, (ran, edges, near) in merged.items():
        listed = [i for i in instructions(code) if i.opname != "CACHE"]
        for place, instruction in enumerate(listed):
            if instruction.offset not in ran or not is_conditional(instruction):
                continue
            target = instruction.argval
            following = listed[place + 1].offset if place + 1 < len(listed) else None
            after = {b for a, b in edges if a == instruction.offset}
            if target in after and following in after:
                continue
            jumped = target in after
            missed = following if jumped else target
            if missed is None:
                continue
            other = not_run(listed, missed, ran)
            skipped = [] if jumped else [i for i in listed if instruction.offset < i.offset < target]
            if instruction.offset in near and other:
                harmless = is_harmless(other, readers)
            elif instruction.offset in near:  # what ran would be skipped
                harmless = not jumped and (is_harmless(skipped, readers) or not mentioned(skipped) & names)
            else:
                harmless = not (mentioned(other) & names)
            if not harmless:
                line = instruction.positions.lineno if instruction.positions else code.co_firstlineno
                return f"a branch of '{code.co_qualname}' was not taken (line {line}), and what it does with the units is unknown"
    return None


def untaken_elsewhere(views: list[View], names: frozenset[str]) -> str | None:
    """Code that ran, far from the units, and that names the structure's modules where it did not run."""
    near = {log.code for view in views for log, _ in view.frames}
    untaken: dict[types.CodeType, frozenset[str]] = {}
    for view in views:
        for code, named in view.run.untaken.items():
            untaken[code] = untaken.get(code, named) & named  # what one of the modes ran is no question
    for code, named in untaken.items():
        if named & names and code not in near:
            return f"a branch of '{code.co_qualname}' that was not taken reaches for '{min(named & names)}'"
    return None


def not_run(listed: list[dis.Instruction], start: int, ran: set[int]) -> list[dis.Instruction]:
    """Instructions from `start` up to the next one that ran."""
    found = []
    for instruction in listed:
        if instruction.offset < start:
            continue
        if instruction.offset in ran:
            break
        found.append(instruction)
    return found


def is_harmless(code: list[dis.Instruction], readers: frozenset[str]) -> bool:
    """Whether instructions can only raise, warn or cast: whatever they do, they do it to all channels alike.

    They leave nothing on the stack (an expression whose value meets the units would), and name a module that reads the units only to look
    at its weight's dtype.
    """
    if any(i.opname == "RAISE_VARARGS" for i in code) and not any(
        i.opname.startswith(("STORE_", "RETURN", "YIELD")) for i in code
    ):
        return True
    if not all(i.opname in HARMLESS_OPERATIONS or is_conditional(i) for i in code):
        return False
    if sum(dis.stack_effect(i.opcode, i.arg, jump=False) for i in code) > 0:
        return False
    for place, instruction in enumerate(code):
        if not mentioned([instruction]):
            continue
        name = str(instruction.argval)
        if name in readers:
            following = mentioned(code[place + 1 : place + 2])
            if following != {"weight"}:
                return False
        elif name not in HARMLESS_NAMES:
            return False
    return True


def passed_choice(structure: Structure, views: list[View]) -> str | None:
    """What a caller may choose, among what code that handles the units works with: another choice may treat single units differently."""
    widths = {1, *(structure.units * site.block * site.repeats for site in structure.sites)}
    for view in views:
        for log, inside in view.frames:
            listed = instructions(log.code)
            code = f"'{log.code.co_qualname}'"
            loaded = {name: i for i in listed if i.offset in inside for name in loads(i)}
            for name in loaded:
                if name in log.choices:
                    return f"{code} uses its argument '{name}' beside the units, which may be one value per unit"
            for name in loaded.keys() & log.held.keys():
                shape = log.held[name]
                if shape is None and name not in arguments(log.code):
                    return f"{code} uses '{name}' beside the units, which it chose before"
                prepared = shape is not None and not widths.isdisjoint(shape[-1:])
                if prepared and (chosen := chosen_before(log, inside)):
                    return f"{code} uses '{name}' beside the units, and what it is may depend on {chosen}"
            for instruction in listed:
                if instruction.offset not in inside:
                    continue
                if instruction.opname == "FOR_ITER" and log.choices:
                    return f"{code} passes the units through a loop, whose length may depend on '{min(log.choices)}'"
                if instruction.opname == "LOAD_GLOBAL" and instruction.argval in ("getattr", "hasattr"):
                    return f"{code} asks for an attribute by name beside the units"
            if swallows(log, listed):
                return f"{code} handles an exception beside the units, which was not raised"
    return None


def loads(instruction: dis.Instruction) -> tuple[str, ...]:
    """Local variables that an instruction reads, or gives to a function inside."""
    if not instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "STORE_FAST_LOAD_FAST")):
        return ()
    value = instruction.argval
    return value if isinstance(value, tuple) else (value,)


def arguments(code: types.CodeType) -> frozenset[str]:
    return frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def chosen_before(log: FrameLog, inside: set[int]) -> str | None:
    """An argument that is a choice and was read, or a branch that went one way, before this code had the units."""
    ran = {o for o, _ in log.path} - inside
    after = set(itertools.pairwise(o for o, _ in log.path))
    listed = [i for i in instructions(log.code) if i.opname != "CACHE"]
    for instruction in listed:
        if instruction.offset not in ran:
            continue
        name = next((n for n in loads(instruction) if n in log.choices), None)
        if name is not None:
            return f"its argument '{name}'"
        if is_conditional(instruction) and sum(a == instruction.offset for a, _ in after) < 2:
            return (
                f"a branch that was not taken (line {instruction.positions.lineno if instruction.positions else '?'})"
            )
    return None


def swallows(log: FrameLog, listed: tuple[dis.Instruction, ...]) -> bool:
    """Whether code has an `except` that did not run and does not only raise again; a `with` has a handler too, and is none."""
    ran = {o for o, _ in log.path}
    for place, instruction in enumerate(listed):
        if instruction.opname != "PUSH_EXC_INFO" or instruction.offset in ran:
            continue
        body = list(itertools.takewhile(lambda i: i.offset not in ran, listed[place:]))
        names = [i.opname for i in body]
        if "WITH_EXCEPT_START" not in names and "POP_EXCEPT" in names and "RAISE_VARARGS" not in names:
            return True
    return False


def untraced_method(
    host: nn.Module, common: str, owners: list[str], names: frozenset[str], views: list[View]
) -> str | None:
    """A method of the structure's own classes, or of what holds it, that the run did not enter and that reaches for its modules."""
    ran = {log.code for view in views for log in view.run.frames}
    paths = {common}
    for owner in owners:
        parts = owner.split(".")
        paths |= {".".join(parts[:i]) for i in range(len(parts) + 1)}
    for path in sorted(paths):
        module = host.get_submodule(path)
        wanted = names if path not in owners else names | {"weight"}
        for function in methods_of(type(module)):
            code = function.__code__
            if code in ran or not is_model_code(function.__module__) or function.__name__.startswith(SILENT_METHODS):
                continue
            if function.__module__.startswith(FRAMEWORK):
                continue
            if wanted & names_in(code):
                return f"'{code.co_qualname}' reaches for its modules, and the trace did not run it"
    return None


def methods_of(cls: type) -> Iterator[types.FunctionType]:
    seen: set[str] = set()
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if name in seen:
                continue
            seen.add(name)
            if isinstance(value, property):
                value = value.fget
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            if isinstance(value, types.FunctionType):
                yield value


def names_in(code: types.CodeType) -> set[str]:
    """Every name that a function mentions, functions inside it included."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)  # getattr(self, "up")
    return found


def watched_by_hooks(host: nn.Module, common: str) -> str | None:
    """A hook that the user put on a module inside the structure; backward hooks see the units' gradients."""
    top = host.get_submodule(common)
    for path, module in top.named_modules():
        if module is top:
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a forward hook on '{common}.{path}' sees the units"
        if module._backward_hooks or module._backward_pre_hooks:
            return f"a backward hook on '{common}.{path}' sees the gradients of the units"
    return None


def unread_tensor(program: Program, common: str, views: list[View]) -> str | None:
    """A parameter, or a buffer with entries of its own, in the structure's module that no run read."""
    read = {program.aliases.get(n, n) for view in views for n in view.run.read}
    read |= {
        target for i in program.inputs if (target := i.target) is not None and (node := program.placeholder(target)) is not None
        and node.users and i.kind != "user"
    }  # fmt: skip
    prefix = common + "." if common else ""
    for name in dict.fromkeys(program.aliases):
        canonical = program.aliases[name]
        if not name.startswith(prefix) or canonical in read:
            continue
        tensor = program.tensor(canonical)
        if isinstance(tensor, nn.Parameter) or tensor.numel() > 1:
            return f"'{name}' was not read by the trace, so there is a path that was not taken"
    return None


__all__ = ["prove_units", "why_not_everywhere"]
