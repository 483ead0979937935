"""What one step of a decoder does, as values: a straight list of operations over buffers, made from a graph and printed as C++.

    Embed → Norm → Product × 3 → Attend → Product → Norm → Product → Pointwise → Product → … → Norm → Product (logits)

A buffer holds `width` floats for each row, and a row is one token of one sequence. A *shared* buffer is computed by the threads together,
piece by piece; every thread has a copy of an *own* buffer, for what is cheaper to compute again than to wait for. Tensors and linears are
known by their places in the lists of a `Decoder`; no name of the model stands here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Buffer:
    """`width` floats a row. shared: the threads fill it together; else each has its own."""

    number: int
    width: int
    shared: bool


@dataclass(frozen=True)
class Embed:
    """out = table[token], or table[position + offset]. table: a tensor (entries, width); an entry that it has not ends the step."""

    out: Buffer
    table: int
    entries: int
    by_position: bool = False
    offset: int = 0


@dataclass(frozen=True)
class Norm:
    """Each of `count` groups of `width` floats, `stride` apart from `start` on, over the root of its mean square (of its distance to its
    mean, for `centred`), times a weight (plus one, for `plus_one`), plus a bias."""

    out: Buffer
    x: Buffer
    width: int
    count: int
    start: int
    stride: int
    eps: float
    weight: int | None
    bias: int | None
    centred: bool
    plus_one: bool = False


@dataclass(frozen=True)
class Product:
    """out = linear(x[start : start + inputs]) + residual. logits: only of the rows that are asked for, to where the caller wants them."""

    out: Buffer
    x: Buffer
    start: int
    linear: int
    inputs: int
    residual: Buffer | None = None
    logits: bool = False


@dataclass(frozen=True)
class Pointwise:
    """out[i] = an expression of `{0}`, `{1}`, …, floats that lie at (buffer, start + i), or at i of a tensor. logits: of and to the
    logits, where they lie."""

    out: Buffer
    expression: str
    inputs: tuple[tuple[Buffer, int] | int, ...]
    logits: bool = False


@dataclass(frozen=True)
class Rotation:
    """y[d] = x[first[d]] · c(d) + x[second[d]] · s(d) for the entries of a head; x counts from the head's start.

    Each factor is `(kind, frequency, scale)`: scale · 1, cos or sin (kind 0, 1, 2) of position · frequencies[frequency].
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    factors: tuple[tuple[int, int, float], ...]
    other_factors: tuple[tuple[int, int, float], ...]
    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class Heads:
    """Where heads lie in a buffer: the first float of each; and how each is rotated (None: not)."""

    buffer: Buffer
    starts: tuple[int, ...]
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Attend:
    """out (heads, width) = softmax(q kᵀ · scale) v over the cache of its layer, to which this step's keys and values are appended first.

    window: how many tokens back a token sees, itself included; 0: all.
    """

    out: Buffer
    q: Heads
    k: Heads
    v: Heads
    width: int
    scale: float
    layer: int
    window: int = 0


Operation: TypeAlias = Embed | Norm | Product | Pointwise | Attend


@dataclass(frozen=True)
class Layer:
    """The cache of one attention: kv heads, floats a head, and how many tokens back it is read (0: all)."""

    heads: int
    width: int
    window: int = 0


@dataclass(frozen=True)
class Decoder:
    """A whole step. tensors, linears: qualified names, known to who calls it; outputs: width of the logits. numbers: qualified name →
    value of tensors that are read here only, and stand in the operations as numbers (frequencies, scales)."""

    operations: tuple[Operation, ...]
    tensors: tuple[str, ...]
    linears: tuple[str, ...]
    layers: tuple[Layer, ...]
    outputs: int = 0
    facts: dict[str, object] = field(default_factory=dict, compare=False)
    numbers: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)


def reads(operation: Operation) -> tuple[Buffer, ...]:
    """Buffers that an operation reads."""
    match operation:
        case Embed():
            return ()
        case Norm():
            return (operation.x,)
        case Product():
            return (operation.x, *((operation.residual,) if operation.residual is not None else ()))
        case Pointwise():
            return tuple(source[0] for source in operation.inputs if not isinstance(source, int))
        case Attend():
            return tuple(dict.fromkeys(heads.buffer for heads in (operation.q, operation.k, operation.v)))


__all__ = [
    "Attend", "Buffer", "Decoder", "Embed", "Heads", "Layer", "Norm", "Operation", "Pointwise", "Product", "Rotation", "reads",
]  # fmt: skip
