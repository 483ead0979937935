"""`host.forward` of a lowered decoder: one native call where the step knows the call, the user's own forward else.

host.generate(…)   one `Generation`: the step looks at the model's weights, modules and hooks at its first token
host(…)            at every call
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from sparsify.host.live_state import OnHost
from sparsify.host.switch_lock import Generate, SwitchLock


class Generation:
    """One call of `generate`. seen: what a step found to hold at its first token."""

    seen: object = None


class Step(Protocol):
    """What lowering made of a decoder: the forward's result, or None where PyTorch is to compute it."""

    def __call__(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], generation: Generation | None
    ) -> Any: ...


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
        found = self.step(self.host, args, kwargs, getattr(running, "generation", None))
        return forward(self.host, *args, **kwargs) if found is None else found


running = threading.local()


class NativeGenerate(Generate):
    """`host.generate`, which tells the step that its calls belong together."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        before = getattr(running, "generation", None)
        running.generation = Generation()
        try:
            return super().__call__(*args, **kwargs)
        finally:
            running.generation = before


def install_native(host: nn.Module, lock: SwitchLock, step: Step) -> None:
    """Give a compiled host its native step."""
    host.__dict__["forward"] = NativeForward(host, step)
    if "generate" in host.__dict__:
        host.__dict__["generate"] = NativeGenerate(host, lock)


__all__ = ["Generation", "NativeForward", "NativeGenerate", "install_native"]
