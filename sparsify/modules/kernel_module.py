"""What every module that holds a packed weight says of itself: the node that it is in a graph, and the generated kernels behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._ops import OpOverload

from sparsify.modules.original_state import OriginalState

if TYPE_CHECKING:
    from torch.fx.node import Argument


@dataclass(frozen=True)
class GeneratedKernel:
    """The source of one generated kernel. name: stable, the same for the same source on every machine. entry: the function of it that
    runs, where it has several."""

    name: str
    source: str
    entry: str = ""


class KernelModule(OriginalState):
    """A linear that is one node of a graph: `operator`, over x and tensors that this module owns.

    The graph is rewritten by what a module says here, and a lowered program is verified against it.
    """

    dtype: torch.dtype

    @property
    def operator(self) -> OpOverload:
        raise NotImplementedError

    def arguments(self, tensor: Callable[[str], Argument]) -> dict[str, Argument]:
        """The operator's arguments by the names of its schema, without `x`. tensor: what stands in the node for the
        tensor of this module that is called so (`masks` → its placeholder)."""
        raise NotImplementedError

    def check_numbers(self) -> None:
        """Raises FormatError unless the packed tensors are what kernels may read; looked at once per state of the tensors."""

    def generated(self, tokens: int, dtype: torch.dtype) -> Iterator[GeneratedKernel]:
        """The kernels that run for x (tokens, in_features) of a type; none where a library multiplies."""
        yield from ()


__all__ = ["GeneratedKernel", "KernelModule"]
