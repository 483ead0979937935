"""`host.forward` of a lowered decoder: one native call where the step knows the call, the user's own forward else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from sparsify.host.live_state import OnHost


class Step(Protocol):
    """What lowering made of a decoder: the forward's result, or None where PyTorch is to compute it."""

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class NativeForward(OnHost):
    """Traced, compiled and differentiated calls go to the user's forward, and so does what the step declines."""

    method = "forward"

    def __init__(self, host: nn.Module, step: Step) -> None:
        super().__init__(host)
        self.step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = self.of_class
        if torch.compiler.is_compiling():
            return forward(self.host, *args, **kwargs)
        found = self.step(self.host, args, kwargs)
        return forward(self.host, *args, **kwargs) if found is None else found


__all__ = ["NativeForward"]
