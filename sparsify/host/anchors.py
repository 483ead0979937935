"""What a handle holds on to in its host, so that a module or tensor that somebody replaced afterwards is noticed.

A handle knows modules by their names *and* by identity: after `resize_token_embeddings`, `host.lm_head = nn.Linear(…)` or another tool's
quantisation the name leads elsewhere, and what the handle holds is dead. Parameters may be other objects (`.to()`, `assign=True`,
`fully_shard`, offloading), but not of another shape, and not another tool's tensor. Modules that no part touches may be anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.model.linears import owner_name
from sparsify.model.sharded import is_sharded, zero_pieces
from sparsify.modules.adapted import AdaptedMixin


@dataclass
class Anchor:
    """One module that the handle works on, and the shapes of the tensors in it that matter."""

    module: nn.Module
    kind: str
    adapted: bool
    shapes: dict[str, torch.Size]

    def check(self, host: nn.Module, path: str, verb: str, merged: bool) -> None:
        """Raise SparsifyError where the host has something else under this name now."""
        try:
            found = host.get_submodule(path)
        except AttributeError:
            found = None
        where = path or "the model itself"
        if found is not self.module:
            now = "is gone" if found is None else f"is another {type(found).__name__} now"
            raise SparsifyError(
                f"{verb}: {where} was a {self.kind} when sparsify.compile made this host, and {now}{ADVICE}"
            )
        if self.adapted and not merged and not isinstance(found, AdaptedMixin):
            raise SparsifyError(
                f"{verb}: the class of {where} was changed from {self.kind} to {type(found).__name__}{ADVICE}"
            )
        for leaf, shape in self.shapes.items():
            tensor = getattr(found, leaf, None)
            name = f"{path}.{leaf}" if path else leaf
            if zero_pieces(tensor):
                raise SparsifyError(
                    f"{verb}: {name} lies in pieces of DeepSpeed's ZeRO-3: call it on every rank inside `with "
                    "deepspeed.zero.GatheredParameters(list(model.parameters())): …` (modifier_rank=0 where it changes them)"
                )
            if not isinstance(tensor, Tensor) or tensor.shape != shape:
                now = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise SparsifyError(
                    f"{verb}: {name} was {tuple(shape)} when sparsify.compile made this host, and is {now} now{ADVICE}"
                )
            if not plain_tensor(tensor):
                raise SparsifyError(f"{verb}: {name} is a {type(tensor).__name__} now, another tool's tensor{ADVICE}")


ADVICE = (
    ": it was replaced afterwards, and this host's parts, adapters and base values do not fit it. Put the old one back; or make the "
    "change first (on the original model, or on plain() or merge() and restore() of a host) and compile the result"
)


def plain_tensor(tensor: Tensor) -> bool:
    """A tensor that torch itself made: plain, a Parameter, a DTensor, or traced."""
    kind = type(tensor)
    return kind in (Tensor, nn.Parameter, nn.Buffer) or is_sharded(tensor) or kind.__module__.startswith("torch.")


def anchors_of(host: nn.Module, names: Iterable[str]) -> dict[str, Anchor]:
    """Anchors of the modules that own the tensors `names`."""
    found: dict[str, Anchor] = {}
    for name in names:
        path, leaf = owner_name(name), name.rpartition(".")[2]
        module = host.get_submodule(path)
        adapted = isinstance(module, AdaptedMixin)
        anchor = found.setdefault(path, Anchor(module, type(module).__name__, adapted, {}))
        tensor = getattr(module, leaf)
        anchor.shapes[leaf] = tensor.shape
    return found
