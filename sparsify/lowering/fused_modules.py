"""What stands in a host for what a kernel does besides: a feed-forward around its fused half, and an activation that has moved.

LlamaMLP(gate_proj, up_proj, act_fn, down_proj)  ──▶  the same class, forward: down_proj(gate_up(x))
up ─▶ act_fn                                     ──▶  up with the activation in its kernel, act_fn: MovedActivation
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsify.modules.rows_of_gated import Gated


class MovedActivation(nn.Identity):
    """What stands in the place of an activation that moved into the linear before it; `original` is the activation."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.kept = (original,)  # in a tuple: not a submodule

    @property
    def original(self) -> nn.Module:
        return self.kept[0]


class FusedFeedForward(nn.Module if TYPE_CHECKING else object):
    """Mixin of a feed-forward module whose gate, up, activation and product became `gate_up`; then the rest of it."""

    gate_up: Gated
    down_name: str

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        y = self.gate_up(x)
        return getattr(self, self.down_name)(y) if self.down_name else y


@functools.cache
def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the fused forward: still an instance of `base`, by isinstance and by name."""

    def reduce(self: nn.Module, protocol: int) -> tuple[object, ...]:
        return rebuild_fused, (base,), self.__dict__

    body = {"__reduce_ex__": reduce, "__doc__": base.__doc__, "__module__": base.__module__}
    return type(base.__name__, (FusedFeedForward, base), body)


def rebuild_fused(base: type[nn.Module]) -> nn.Module:
    cls = fused_class(base)
    return cls.__new__(cls)


def fuse_feed_forward(owner: nn.Module, gate_up: Gated, down: str) -> None:
    """Give a feed-forward module its fused half, in place. down: name of its linear behind that, or nothing."""
    gate_up.train(owner.training)
    owner.__class__ = fused_class(type(owner))
    owner.add_module("gate_up", gate_up)
    owner.__dict__["down_name"] = down


def unfuse_feed_forward(owner: FusedFeedForward) -> None:
    """Undo `fuse_feed_forward`."""
    owner.__class__ = type(owner).__mro__[2]
    del owner.gate_up
    owner.__dict__.pop("down_name", None)


__all__ = ["FusedFeedForward", "MovedActivation", "fuse_feed_forward", "fused_class", "unfuse_feed_forward"]
