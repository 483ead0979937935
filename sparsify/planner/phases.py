"""Where a training step is: in which block's forward or backward, in the head, in the optimizer.

    start │ forward 0 │ forward 1 │ forward 2 │ forward head │ backward head │ backward 2 │ backward 1 │ backward 0 │ optimizer

`backward i` begins when the gradient of block i's output is there, and ends when that of its input is, which the block below has as its
output; `backward 0` lasts until the optimizer. Nothing is added to the graph: modules and tensors are watched by hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.planner.shallow import Repeat


class Phases:
    """Calls `mark(phase)` at every border of one step. repeat: None for a model without blocks, of which only the optimizer is told."""

    def __init__(self, model: nn.Module, repeat: Repeat | None, mark: Callable[[str], None]) -> None:
        self.mark, self.within = mark, ""
        self.blocks: Any = model.get_submodule(repeat.path) if repeat is not None else []
        self.handles: list[Any] = []

    def __enter__(self) -> Phases:
        for number, block in enumerate(self.blocks):
            self.handles.append(block.register_forward_pre_hook(self.entering(number)))
            self.handles.append(block.register_forward_hook(self.leaving(number)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def begin(self) -> None:
        self.within = "forward"
        self.mark("start")

    def backward(self) -> None:
        self.within = "backward"
        self.mark("backward head")

    def optimizer(self) -> None:
        self.within = "optimizer"
        self.mark("optimizer")

    def entering(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if self.within == "forward":  # not where a checkpoint computes it again
                self.mark(f"forward {number}")

        return hook

    def leaving(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self.within != "forward":
                return
            if number + 1 == len(self.blocks):
                self.mark("forward head")
            hidden = next((t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)), None)
            if hidden is not None and hidden.requires_grad and torch.is_grad_enabled():
                hidden.register_hook(lambda gradient: self.mark(f"backward {number}"))

        return hook


__all__ = ["Phases"]
