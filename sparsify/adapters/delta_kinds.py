"""Kinds of changes that methods from outside keep in adapter files: their tensors, what they mean, how PEFT stores them.

The reader of adapter files knows the kinds of `sparsify.adapters.adapter` and those registered here, and no others: what a file may hold is
a list of this process, never what the file says. `sparsify.methods.register` fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from sparsify.adapters.adapter import Delta
    from sparsify.files.strict_json import Json


@dataclass(frozen=True)
class PeftLayer:
    """One adapted linear in PEFT's folder: `lora_A (r, in)`, `lora_B (out, r)` with the scale in B, further tensors by leaf, and
    settings of `adapter_config.json` that hold for the whole folder."""

    a: Tensor
    b: Tensor
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DeltaKind:
    """What one kind of change of a weight `(out, in)` is.

    name: in files; an identifier. tensors: name → shape, in sizes "out" and "in" and words of its own ("rank"), which must agree
        between tensors; one is called "delta". All are floating and finite; a reader checks that.
    change: `change(base, delta)`: the weight `(out, in)` that the delta stands for over a base, both in original coordinates and in
        fp32 or fp64. Mixes, and hosts that do not train the method, add its difference to the base.
    peft: how PEFT stores it, or the reason why it cannot.
    why_not: what else is wrong with a delta that was read; None for nothing.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...]]
    change: Callable[[Tensor, Delta], Tensor]
    peft: Callable[[Delta], PeftLayer] | str
    why_not: Callable[[Delta], str | None] = lambda delta: None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.name.isascii():
            raise SparsifyError(f"DeltaKind(name={self.name!r}): an identifier is needed, which can stand in a file")
        if "delta" not in self.tensors:
            raise SparsifyError(f"DeltaKind({self.name!r}): one of its tensors must be called 'delta'")
        for name in self.tensors:
            if not name.isidentifier() or name in ("channels", "exact", "exact_places"):
                raise SparsifyError(f"DeltaKind({self.name!r}): {name!r} cannot be the name of a tensor")

    def sizes(self, delta: Delta) -> dict[str, int]:
        """Sizes by word. Raises SparsifyError where two tensors disagree, or one has another number of dimensions."""
        found: dict[str, int] = {}
        for name, words in self.tensors.items():
            tensor = delta.tensor(name)
            if tensor is None or tensor.dim() != len(words):
                shape = None if tensor is None else tuple(tensor.shape)
                raise SparsifyError(f"{name} is {shape}, expected ({', '.join(words)})")
            for word, size in zip(words, tensor.shape, strict=True):
                if found.setdefault(word, size) != size:
                    raise SparsifyError(f"{name} has {word} = {size}, another tensor {found[word]}")
        return found

    def check(self, delta: Delta) -> str | None:
        """What is wrong with a delta, without looking at a model; None for nothing."""
        try:
            self.sizes(delta)
        except SparsifyError as error:
            return str(error)
        for name in self.tensors:
            tensor = delta.tensor(name)
            assert tensor is not None
            if not bool(torch.isfinite(tensor).all()):
                return f"{name} is not finite"
        return self.why_not(delta)


REGISTERED: dict[str, DeltaKind] = {}


def known_kind(name: object) -> DeltaKind | None:
    """The kind of this name that a method has registered."""
    return REGISTERED.get(name) if isinstance(name, str) else None


__all__ = ["REGISTERED", "DeltaKind", "PeftLayer", "known_kind"]
