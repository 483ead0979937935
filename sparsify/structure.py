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
from typing import Literal

import torch

from sparsify.console import printable

Role = Literal["q", "k", "v", "o", "up", "gate", "down", "vector", "other"]
Kind = Literal["attention", "ffn", "other"]
CONSUMERS: frozenset[Role] = frozenset({"o", "down"})
PRODUCERS: frozenset[Role] = frozenset({"q", "k", "v", "up", "gate"})


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

    def positions(self, units: int) -> torch.Tensor:
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
        return f"{text}] {self.role}"


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
        return tuple(site for site in self.sites if site.role in roles)

    @property
    def consumers(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.role in CONSUMERS)

    @property
    def producers(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.role in PRODUCERS)

    def params(self) -> Iterator[str]:
        """Names of the tensors that the structure touches, each once, in site order."""
        yield from dict.fromkeys(site.param for site in self.sites)

    def __str__(self) -> str:
        lines = [f"{self.kind} {self.name}: {self.units} units"]
        lines += [f"  {site}" for site in self.sites]
        if self.inner is not None:
            lines += ["  " + line for line in str(self.inner).splitlines()]
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
        return f"{self.kind} {self.name}: {self.reason}"
