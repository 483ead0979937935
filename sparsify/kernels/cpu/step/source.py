"""The C++ of one step: a decoder's operations and their schedule as lines of calls, in the template `step.cpp.jinja`.

    Norm(out=3, x=2, …)        ──▶  each_row: norm(…);
    Product(out=4, x=3, …)     ──▶  team.meet(); product(team, 2, s.linears[0], …);

Numbers alone come from the model: no name of a module, tensor or node reaches the source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from sparsify.kernels.cpu.codegen import LANES, TEMPLATES, Isa
from sparsify.kernels.cpu.step.operations import (
    Attend,
    Buffer,
    Decoder,
    Embed,
    Heads,
    Norm,
    Pointwise,
    Product,
    Rotation,
)
from sparsify.kernels.cpu.step.schedule import ALIGNED, Schedule, schedule
from sparsify.kernels.source import strict_environment

RUNS = 8  # a rotation of more ranges than that is done entry by entry
PIECE = 512  # floats of a pointwise operation that a thread takes at a time


@dataclass
class StepText:
    """A source under way. rotations: those that have tables, with the place of their factors in a thread's own memory (floats a row)."""

    decoder: Decoder
    plan: Schedule
    counters: int = 0
    own: int = 0
    rotations: dict[Rotation, int] = field(default_factory=dict)
    constants: list[str] = field(default_factory=list)

    def counter(self) -> int:
        self.counters += 1
        return self.counters - 1

    def at(self, buffer: Buffer, start: int = 0) -> str:
        """Address of a buffer's first row."""
        base = "shared" if buffer.shared else "own"
        return f"{base} + {self.plan.offsets[buffer.number]} * rows" + (f" + {start}" if start else "")


@dataclass(frozen=True)
class StepSource:
    """A generated step. own: floats a row of a thread's own memory; shared: of the common one; meetings: how often threads meet."""

    source: str
    shared: int
    own: int
    meetings: int


def generate_step(decoder: Decoder, isa: Isa) -> StepSource:
    """C++ of a decoder's step for an instruction set; deterministic."""
    plan = schedule(decoder)
    text = StepText(decoder, plan, own=plan.own)
    body: list[str] = []
    for operation, meets in zip(decoder.operations, plan.meets, strict=True):
        body += ["team.meet();"] if meets else []
        match operation:
            case Embed():
                body.append(embed(text, operation))
            case Norm():
                body.append(norm(text, operation))
            case Product():
                body.append(product(text, operation))
            case Pointwise():
                body.append(pointwise(text, operation))
            case Attend():
                body += attend(text, operation)
    tables = [line for rotation, place in text.rotations.items() for line in factor_tables(text, rotation, place)]
    meetings = sum(line == "team.meet();" for line in body)
    lanes = LANES[isa]
    source = (
        strict_environment(TEMPLATES)
        .get_template("step.cpp.jinja")
        .render(
            isa=isa,
            lanes=lanes,
            rotations=[
                [(i + distance) % lanes for i in range(lanes)] for distance in (1, 2, 4, 8, 16) if distance < lanes
            ],
            operations=len(decoder.operations),
            meetings=meetings,
            counters=max(1, text.counters),
            constants=text.constants,
            lines=[*tables, *body],
        )
    )
    return StepSource(source, plan.shared, text.own, meetings)


def literal(value: float) -> str:
    """A float of C++. Raises ValueError for one that is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot stand in generated source")
    return f"{float(value)!r}f" if "e" in repr(float(value)) or "." in repr(float(value)) else f"{value}.0f"


def tensor(number: int | None) -> str:
    return "nullptr" if number is None else f"s.tensors[{number}]"


def embed(text: StepText, op: Embed) -> str:
    entries = "s.positions" if op.by_position else "s.tokens"
    return (
        f"embed(team, s, {text.at(op.out)}, {tensor(op.table)}, {op.entries}, {op.out.width}, {entries}, {op.offset});"
    )


def norm(text: StepText, op: Norm) -> str:
    place = f"{op.x.width}, {op.start}, {op.count}, {op.stride}"
    how = f"{op.width}, {literal(op.eps)}, {str(op.centred).lower()}, {1 if op.plus_one else 0}.0f"
    return f"norm(rows, {text.at(op.x)}, {text.at(op.out)}, {place}, {tensor(op.weight)}, {tensor(op.bias)}, {how});"


def product(text: StepText, op: Product) -> str:
    start = f" + {op.start}" if op.start else ""
    linear = f"product(team, {text.counter()}, s.linears[{op.linear}], "
    if op.logits:
        x = f"kept_rows(s, {text.at(op.x)}, {op.x.width}, scratch){start}"
        return f"{linear}{x}, {op.x.width}, s.batch * s.keep, s.logits, {op.out.width}, nullptr, 0);"
    residual = "nullptr, 0" if op.residual is None else f"{text.at(op.residual)}, {op.residual.width}"
    return f"{linear}{text.at(op.x, op.start)}, {op.x.width}, rows, {text.at(op.out)}, {op.out.width}, {residual});"


def pointwise(text: StepText, op: Pointwise) -> str:
    width, names, pointers = op.out.width, [], []
    if op.logits:
        pieces = -(-width // PIECE)
        return (
            f"share(team, {text.counter()}, s.batch * s.keep * {pieces}, [&](int64_t piece) {{ "
            f"float* y = s.logits + piece / {pieces} * {width}; "
            f"const int64_t start = piece % {pieces} * {PIECE}, end = std::min<int64_t>({width}, start + {PIECE}); "
            f"for (int64_t i = start; i < end; ++i) y[i] = {op.expression.format('y[i]')}; }});"
        )
    for number, source in enumerate(op.inputs):
        names.append(f"x{number}[i]")
        if isinstance(source, int):
            pointers.append(f"const float* x{number} = {tensor(source)};")
        else:
            pointers.append(f"const float* x{number} = {text.at(*source)} + r * {source[0].width};")
    loop = f"{' '.join(pointers)} float* __restrict y = {text.at(op.out)} + r * {width};"
    value = op.expression.format(*names)
    if not op.out.shared:
        return f"for (int64_t r = 0; r < rows; ++r) {{ {loop} for (int64_t i = 0; i < {width}; ++i) y[i] = {value}; }}"
    pieces = -(-width // PIECE)
    return (
        f"share(team, {text.counter()}, rows * {pieces}, [&](int64_t piece) {{ const int64_t r = piece / {pieces}, "
        f"start = piece % {pieces} * {PIECE}, end = std::min<int64_t>({width}, start + {PIECE}); {loop} "
        f"for (int64_t i = start; i < end; ++i) y[i] = {value}; }});"
    )


# --- attention ---------------------------------------------------------------------------------------------------------------


def attend(text: StepText, op: Attend) -> list[str]:
    """Keys and values into the cache, a meeting, then every head of every row."""
    layer, layers = text.decoder.layers[op.layer], text.decoder.layers
    before = sum(2 * known.heads * known.width for known in layers[: op.layer])
    keys = f"s.cache + {before} * s.batch * s.capacity"
    values = f"s.cache + {before + layer.heads * layer.width} * s.batch * s.capacity"
    q, k, v = (heads(text, x, op.width) for x in (op.q, op.k, op.v))
    append = f"append(team, {text.counter()}, s, {k}, {v}, {keys}, {values}, {layer.heads}, {op.width});"
    sizes = f"{len(op.q.starts)}, {layer.heads}, {op.width}, {literal(op.scale)}, {op.window}"
    attend_all = f"attend_all(team, {text.counter()}, s, {q}, {keys}, {values}, {sizes}, scratch, {text.at(op.out)});"
    return [append, "team.meet();", attend_all]


def heads(text: StepText, found: Heads, width: int) -> str:
    first, second = (*found.starts, found.starts[0])[:2]
    step = second - first
    turn = "nullptr" if found.rotation is None else f"&turn{turn_of(text, found.rotation, width)}"
    return f"Heads{{{text.at(found.buffer)}, {found.buffer.width}, {first}, {step}, {turn}}}"


def aligned(width: int) -> int:
    return -(-width // ALIGNED) * ALIGNED


def runs_of(rotation: Rotation) -> list[int]:
    """Starts of ranges in which both indices go up one by one."""
    found = [0]
    for d in range(1, len(rotation.first)):
        if rotation.first[d] != rotation.first[d - 1] + 1 or rotation.second[d] != rotation.second[d - 1] + 1:
            found.append(d)
    return found


def turn_of(text: StepText, rotation: Rotation, width: int) -> int:
    """The number of a rotation; its tables of constants are written when it is first seen."""
    if rotation in text.rotations:
        return list(text.rotations).index(rotation)
    number = len(text.rotations)
    text.rotations[rotation] = text.own
    text.own += 2 * aligned(width)

    def array(kind: str, name: str, values: list[str]) -> str:
        return f"static const {kind} k{name}{number}[] = {{{', '.join(values)}}};"

    text.constants += [
        array("int32_t", "First", [str(int(i)) for i in rotation.first]),
        array("int32_t", "Second", [str(int(i)) for i in rotation.second]),
        array("int32_t", "Run", [str(i) for i in (*runs_of(rotation), width)]),
        array("float", "Frequency", [literal(f) for f in rotation.frequencies]),
    ]
    for name, given in (("Cosine", rotation.factors), ("Sine", rotation.other_factors)):
        text.constants += [
            array("int32_t", f"{name}Kind", [str(int(kind)) for kind, _, _ in given]),
            array("int32_t", f"{name}Row", [str(int(row)) for _, row, _ in given]),
            array("float", f"{name}Scale", [literal(scale) for _, _, scale in given]),
        ]
    return number


def factor_tables(text: StepText, rotation: Rotation, place: int) -> Iterator[str]:
    """The factors of every row at the start of a step."""
    number, width = list(text.rotations).index(rotation), len(rotation.first)
    for name, offset in (("Cosine", place), ("Sine", place + aligned(width))):
        names = f"kFrequency{number}, k{name}Kind{number}, k{name}Row{number}, k{name}Scale{number}"
        yield f"factors(s, {names}, {width}, own + {offset} * rows);"
    runs = len(runs_of(rotation))
    use = f"{runs}, kRun{number}" if runs <= RUNS else "0, nullptr"
    tables = f"own + {place} * rows, own + {place + aligned(width)} * rows"
    yield f"const Rotation turn{number}{{kFirst{number}, kSecond{number}, {tables}, {use}}};"


__all__ = ["StepSource", "generate_step"]
