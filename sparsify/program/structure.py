"""Coupling as data: which slices of which tensors are indexed by the same head or channel.

A `Structure` says that `units` interchangeable units (attention heads, KV groups, FFN channels) run through several
tensors; each `Site` says where in one tensor they lie. Permuting the units of *all* sites alike leaves the model's
output unchanged up to the rounding of a reordered sum.

    q_proj.weight (8·64, m)   Site("…q_proj.weight", axis=0, block=64, role="q")
    o_proj.weight (m, 8·64)   Site("…o_proj.weight", axis=1, block=64, role="o")
    packed qkv    (3·8·64, m) three sites on one parameter, offsets 0, 512, 1024
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

import torch

from sparsify.console import one_line, printable

if TYPE_CHECKING:
    from jaxtyping import Int

Role = Literal["q", "k", "v", "o", "up", "gate", "down", "vector", "other"]
Kind = Literal["attention", "ffn", "other"]
CONSUMERS: frozenset[Role] = frozenset({"o", "down"})
PRODUCERS: frozenset[Role] = frozenset({"q", "k", "v", "up", "gate"})
UNIT_WORDS: dict[Kind, str] = {"attention": "head", "ffn": "channel", "other": "unit"}


def counted(number: int, word: str) -> str:
    """`1 head`, `9 heads`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


@printable
@dataclass(frozen=True)
class Site:
    """Where the units of a structure lie in one tensor.

    Unit `u` occupies, for every index of the `outer` loops, `block` consecutive channels on `axis` of `param`:
    positions `offset + Σ_i o_i · stride_i + u · stride + [0, block)`, where `outer = ((count_i, stride_i), …)`.

    param: qualified name of the parameter or buffer, as `named_parameters` spells it (one name per tied class).
    axis: axis of the *stored* tensor (a GPT-2 Conv1D stores `(in, out)`: its consumer axis is 0).
    block: channels per unit.
    offset: first channel of unit 0.
    outer: loops around the units, for nested or strided layouts; empty when the units are one contiguous range.
    stride: distance between units; 0 stands for `block` (units side by side).
    role: what the tensor does with the units. Producers (q, k, v, up, gate) make them, consumers (o, down) read them,
        vectors (biases, per-head norms and scales) are carried along.
    """

    param: str
    axis: int
    block: int
    offset: int = 0
    outer: tuple[tuple[int, int], ...] = ()
    stride: int = 0
    role: Role = "other"

    @property
    def step(self) -> int:
        """Distance between the first channels of neighbouring units."""
        return self.stride or self.block

    @property
    def repeats(self) -> int:
        """How many times each unit occurs (the product of the outer loops)."""
        return prod(count for count, _ in self.outer)

    def bases(self) -> list[int]:
        """First channel of unit 0 for every index of the outer loops, outermost first."""
        bases = [self.offset]
        for count, stride in self.outer:
            bases = [base + i * stride for base in bases for i in range(count)]
        return bases

    def channels(self, unit: int, repeat: int | None = None) -> list[int]:
        """Channels of one unit on `axis`, over all outer indices, or over one of them."""
        bases = self.bases()
        if repeat is not None:
            bases = [bases[repeat]]
        return [base + unit * self.step + i for base in bases for i in range(self.block)]

    def positions(self, units: int) -> Int[torch.Tensor, "repeats units block"]:
        """All positions, int64 of shape (repeats, units, block)."""
        base = torch.tensor(self.bases(), dtype=torch.int64).view(-1, 1, 1)
        unit = torch.arange(units, dtype=torch.int64).view(1, -1, 1) * self.step
        return base + unit + torch.arange(self.block, dtype=torch.int64).view(1, 1, -1)

    def __str__(self) -> str:
        text = f"{self.param}[axis {self.axis}, block {self.block}"
        if self.offset:
            text += f", offset {self.offset}"
        if self.stride and self.stride != self.block:
            text += f", stride {self.stride}"
        if self.outer:
            text += ", outer " + "×".join(f"{count}@{stride}" for count, stride in self.outer)
        return one_line(f"{text}] {self.role}")


@printable
@dataclass(frozen=True)
class Structure:
    """A coupled structure: `units` units that may be permuted together over `sites`.

    name: stable and readable, made from the longest common module path of its sites (`model.layers.3.mlp`).
    kind: "attention" (unit = head, or KV group under grouped-query attention), "ffn" (unit = channel) or "other".
    inner: under grouped-query attention, the query heads of one KV group: a structure with
        `units` = heads per group, whose sites (q, o) have the groups as their first outer loop. Each
        group may reorder its query heads on its own.
    """

    name: str
    kind: Kind
    units: int
    sites: tuple[Site, ...]
    inner: Structure | None = None

    def with_role(self, *roles: Role) -> tuple[Site, ...]:
        """Sites of these roles, in order."""
        return tuple(site for site in self.sites if site.role in roles)

    @property
    def consumers(self) -> tuple[Site, ...]:
        """Sites that read the units: columns of Down, of O."""
        return tuple(site for site in self.sites if site.role in CONSUMERS)

    @property
    def producers(self) -> tuple[Site, ...]:
        """Sites that make the units: rows of Up and Gate, of V."""
        return tuple(site for site in self.sites if site.role in PRODUCERS)

    def params(self) -> Iterator[str]:
        """Names of the tensors that the structure touches, each once, in site order."""
        yield from dict.fromkeys(site.param for site in self.sites)

    @property
    def unit(self) -> str:
        """What one of `units` is called: the unit of the producers (V, Up)."""
        return "KV group" if self.inner is not None else UNIT_WORDS[self.kind]

    @property
    def inner_unit(self) -> str:
        """What one of the consumers' units (O, Down) is called: a head, where the units are KV groups."""
        return UNIT_WORDS[self.kind]

    @property
    def inner_units(self) -> int:
        """How many units the consumers have: query heads, where the units are KV groups."""
        return self.units * (self.inner.units if self.inner is not None else 1)

    def size_text(self) -> str:
        """`44 channels`, `4 heads`, `3 KV groups of 3 heads`: the words of the report, the program's text and the picture."""
        inside = "" if self.inner is None else f" of {counted(self.inner.units, self.inner_unit)}"
        return counted(self.units, self.unit) + inside

    def chosen_text(self, consumers: int, producers: int) -> tuple[str, str]:
        """`("1 of 9 heads", "1 of 3 KV groups")`: how much of each side trains; empty for none."""
        return (
            f"{consumers} of {counted(self.inner_units, self.inner_unit)}" if consumers else "",
            f"{producers} of {counted(self.units, self.unit)}" if producers else "",
        )

    def __str__(self) -> str:
        lines = [one_line(f"{self.kind} {self.name}: {self.size_text()}")]
        lines += [f"  {site}" for site in self.sites]
        if self.inner is not None:
            lines += ["  " + line for line in str(self.inner).split("\n")]
        return "\n".join(lines)


@printable
@dataclass(frozen=True)
class Declined:
    """A near miss of detection: something that looks like a structure and must not be moved, with the reason.

    sites: the weights that would have been permuted, so that the report can point at them.
    """

    name: str
    kind: Kind
    reason: str
    sites: tuple[Site, ...] = field(default=())

    def __str__(self) -> str:
        return one_line(f"{self.kind} {self.name}: {self.reason}")
