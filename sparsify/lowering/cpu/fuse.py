"""Joining packed linears for the CPU: what one kernel can do, where measurement says that it pays.

gate, up          ──▶  GatedLinear: their rows in turn, act(gate) · up in its epilogue
gate_up           ──▶  likewise, its halves in turn
dense, activation ──▶  the activation in dense's epilogue

Linears that read one tensor under names of their own (q, k, v) stay apart: to serve the second from the call of the first, a forward
would have to remember its input, and no check short of reading it again tells whether it was written to in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from sparsify.kernels.cpu.codegen import Variant
from sparsify.kernels.cpu.dispatch import best_isa, bucket, source_digest
from sparsify.kernels.cpu.formats import PANEL
from sparsify.kernels.cpu.tune import TUNE_VERSION, cpu_name, measured
from sparsify.lowering.cpu.sparse_linear import GatedLinear, SparseLinear, halves
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct
from sparsify.lowering.target import Joined, Seconds

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

SLACK = 1.05  # smallest times of equally fast products differ by this much from run to run


@dataclass(frozen=True)
class Counted:
    """The numbers of tokens to measure, whether to join without asking whether it is faster (`small`), and with `cold` weights."""

    tokens: Sequence[int]
    small: bool
    cold: bool = False

    def compare(
        self, key: str, width: int, linear: SparseLinear, fused: Product, apart: Product
    ) -> tuple[Seconds, str]:
        """Both ways in turn at every number of tokens: (timings, why not to fuse, or nothing)."""
        seconds: dict[int, tuple[str, float, float, float]] = {}
        for count in self.tokens:
            choice = linear.choice(count, measure=True, cold=self.cold)
            x = torch.randn(bucket(count), width, dtype=linear.dtype)
            with torch.inference_mode():
                digest = source_digest(Variant(isa=best_isa(), value=linear.packed.value))
                machine = f"{cpu_name()}/{digest}/{torch.get_num_threads()}"
                name = f"fused/{TUNE_VERSION}/{machine}/{key}/{bucket(count)}"
                calls = {"fused": lambda x=x: fused(x), "apart": lambda x=x: apart(x)}
                found = measured(name, calls, cold=self.cold).seconds
            seconds[bucket(count)] = (choice.kernel, choice.predicted, found["fused"], found["apart"])
        slower = {count: times[2] / times[3] for count, times in seconds.items() if times[2] > SLACK * times[3]}
        if not slower or self.small:
            return seconds, ""
        worst = max(slower, key=slower.__getitem__)
        return seconds, f"together they take {slower[worst]:.2f} × the time at {worst} tokens"


def join_gated(found: GatedProduct, linears: Sequence[SparseLinear], times: Counted) -> Joined | str:
    """gate and up, or the one linear that is both, as one `GatedLinear`; or why not."""
    if len(linears) == 1 and linears[0].packed.rows % (2 * PANEL):
        return f"half of {linears[0].packed.rows} rows is no multiple of {PANEL}"
    kinds = {(n.packed.rows, n.packed.cols, n.packed.value, n.packed.group, n.dtype, n.int8) for n in linears}
    if len(kinds) > 1:
        return "gate and up differ in shape or value type"
    gate, up = halves(linears[0]) if len(linears) == 1 else linears
    fused = GatedLinear(gate, up, found.activation)
    act = activation_function(found.activation)
    key = f"gated/{len(linears)}/{found.activation}/{describe(gate, up)}"

    def apart(x: torch.Tensor) -> torch.Tensor:
        first, second = linears[0](x).chunk(2, -1) if len(linears) == 1 else (gate(x), up(x))
        return act(first) * second

    seconds, why = times.compare(key, gate.in_features, fused, fused, apart)
    return why or Joined(fused, seconds)


def absorb_activation(found: FusedActivation, linear: SparseLinear, times: Counted) -> Joined | str:
    """The linear with the activation in its kernel; or why not."""
    act = activation_function(found.activation)
    fused = SparseLinear(linear.packed, linear.bias, activation=found.activation, int8=linear.int8)
    key = f"activation/{found.activation}/{describe(linear)}"
    seconds, why = times.compare(key, linear.in_features, fused, fused, lambda x: act(linear(x)))
    if why:
        return why
    linear.activation = found.activation
    linear.prepare()
    return Joined(linear, seconds)


def describe(*linears: SparseLinear) -> str:
    """Shapes, value types and densities, as a key for measurements."""
    return "+".join(f"{n.packed.rows}x{n.packed.cols}/{n.packed.value}/{1 - n.packed.sparsity:.2f}" for n in linears)


def activation_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Torch's own, as a model would call it."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": nn.functional.relu,
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    }
    return functions[name]


__all__ = ["Counted", "absorb_activation", "join_gated"]
