"""The generated kernels behind a lowered program: each distinct source once, with the nodes that run it.

    %q = sparsify.packed_linear(…)  ─┐
    %k = sparsify.packed_linear(…)  ─┴──▶ KernelText(name="bitmask_f32_avx2", source="…", nodes=("q (gemv)", "k (stream)"))

A decoder's native step stands behind them, with calls of these kernels. Which kernel runs depends on the number of tokens: that of the
captured example, or any other that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import fx

from sparsify.console import printable
from sparsify.modules.kernel_module import GeneratedKernel, KernelModule
from sparsify.program import Program


@printable
@dataclass(frozen=True)
class KernelText:
    """A generated kernel. name: the same for the same source. nodes: names of the graph's nodes that run it, each with the entry point
    that it calls."""

    name: str
    source: str
    nodes: tuple[str, ...]

    @property
    def lines(self) -> int:
        return self.source.count("\n") + 1

    def __str__(self) -> str:
        return f"{self.name}: {self.lines} lines, for {', '.join(self.nodes)}"


def kernel_texts(program: Program, tokens: int | None = None) -> tuple[KernelText, ...]:
    """The kernels of a lowered program in the order in which its graph calls them; none where a library multiplies, nor before LOWERED.

    tokens: per call (batch × length); None: as many as each node sees on the captured example.
    """
    sources: dict[str, str] = {}
    nodes: dict[str, list[str]] = {}
    for node, module in packed_nodes(program):
        x = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        if not isinstance(x, torch.Tensor):
            continue
        count = tokens if tokens is not None else x.numel() // max(1, x.shape[-1])
        for kernel in module.generated(int(count), x.dtype):
            sources.setdefault(kernel.name, kernel.source)
            nodes.setdefault(kernel.name, []).append(f"{node.name} ({kernel.entry})" if kernel.entry else node.name)
    found = [KernelText(name, source, tuple(nodes[name])) for name, source in sources.items()]
    step = getattr(program.host.__dict__.get("forward"), "step", None)
    kernel = step.generated() if isinstance(step, GeneratesStep) else None
    return (*found, *([KernelText(kernel.name, kernel.source, ("the whole graph",))] if kernel is not None else []))


@runtime_checkable
class GeneratesStep(Protocol):
    """What runs a whole lowered host as one call, and has a source of its own."""

    def generated(self) -> GeneratedKernel | None: ...


def packed_nodes(program: Program) -> Iterator[tuple[fx.Node, KernelModule]]:
    """Nodes of packed products with the modules of the host that compute them."""
    names = program.tensor_names
    modules = {name: m for name, m in program.host.named_modules(remove_duplicate=False) if isinstance(m, KernelModule)}
    for node in program.graph.nodes:
        owners = {names[n.name].rpartition(".")[0] for n in node.all_input_nodes if n.name in names}
        for module in (modules[owner] for owner in owners if owner in modules):
            if node.op == "call_function" and node.target is module.operator:
                yield node, module


__all__ = ["KernelText", "kernel_texts"]
