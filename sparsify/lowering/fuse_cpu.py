"""Fuse packed linears of a host where the graph shows that they belong together and measurement says that it pays.

LlamaMLP(gate_proj, up_proj, act_fn, down_proj)  ──▶  the same class, forward: down_proj(gate_up(x))
Phi3MLP(gate_up_proj, activation_fn, down_proj)  ──▶  likewise
dense ─▶ intermediate_act_fn                     ──▶  the activation in dense's kernel, intermediate_act_fn: Identity

Linears that read one tensor under names of their own (q, k, v) stay apart: to serve the second from the call of the first, a forward
would have to remember its input, and no check short of reading it again tells whether it was written to in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsify.kernels.cpu.codegen import Variant
from sparsify.kernels.cpu.dispatch import best_isa, bucket, source_digest
from sparsify.kernels.cpu.formats import PANEL
from sparsify.kernels.cpu.tune import TUNE_VERSION, cpu_name, measured
from sparsify.lowering.fuse_linears import (
    FusedActivation,
    GatedProduct,
    find_activations,
    find_gated_products,
    find_split_products,
)
from sparsify.lowering.rows_of_gated import RowsOfGated
from sparsify.lowering.sparse_linear import (
    FusedFeedForward,
    GatedLinear,
    SparseLinear,
    fused_class,
    halves,
)
from sparsify.program import Program

SLACK = 1.05  # smallest times of equally fast products differ by this much from run to run


@dataclass(frozen=True)
class Fusion:
    """What became one kernel, or why not. seconds: tokens → (kernel, predicted, measured, measured apart).

    module: name of the linear that now does all of it. why: empty when it was fused.
    """

    found: GatedProduct | FusedActivation
    module: str
    what: str
    seconds: Mapping[int, tuple[str, float, float, float]] = field(default_factory=dict)
    why: str = ""

    def __str__(self) -> str:
        timings = ", ".join(
            f"{tokens} tok {kernel} {spent * 1e6:.0f} us (predicted {predicted * 1e6:.0f}, apart {apart * 1e6:.0f})"
            for tokens, (kernel, predicted, spent, apart) in self.seconds.items()
        )
        return f"{self.what}: {self.why or timings}"


class MovedActivation(nn.Identity):
    """What stands in the place of an activation that moved into the linear before it; `original` is the activation."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.kept = (original,)  # in a tuple: not a submodule

    @property
    def original(self) -> nn.Module:
        return self.kept[0]


def fuse(host: nn.Module, program: Program, tokens: Sequence[int], small: bool) -> list[Fusion]:
    """Rewrite modules of `host` in place. small: fuse without asking whether it is faster."""
    times = Counted(tokens, small)
    gated = [*find_gated_products(program), *find_split_products(program)]
    fusions = [fuse_gated(host, found, times) for found in gated]
    fusions += [fuse_activation(host, found, times) for found in find_activations(program)]
    return [fusion for fusion in fusions if fusion is not None]


@dataclass(frozen=True)
class Counted:
    """The numbers of tokens to measure, and whether to measure at all."""

    tokens: Sequence[int]
    small: bool

    def compare(
        self, key: str, width: int, linear: SparseLinear, fused: Callable[[Any], Any], apart: Callable[[Any], Any]
    ) -> tuple[dict[int, tuple[str, float, float, float]], str]:
        """Both ways in turn at every number of tokens: (timings, why not to fuse, or nothing)."""
        seconds: dict[int, tuple[str, float, float, float]] = {}
        for count in self.tokens:
            choice = linear.choice(count, measure=True)
            x = torch.randn(bucket(count), width, dtype=linear.dtype)
            with torch.inference_mode():
                digest = source_digest(Variant(isa=best_isa(), value=linear.packed.value))
                machine = f"{cpu_name()}/{digest}/{torch.get_num_threads()}"
                name = f"fused/{TUNE_VERSION}/{machine}/{key}/{bucket(count)}"
                found = measured(name, {"fused": lambda x=x: fused(x), "apart": lambda x=x: apart(x)}).seconds
            seconds[bucket(count)] = (choice.kernel, choice.predicted, found["fused"], found["apart"])
        slower = {count: times[2] / times[3] for count, times in seconds.items() if times[2] > SLACK * times[3]}
        if not slower or self.small:
            return seconds, ""
        worst = max(slower, key=slower.__getitem__)
        return seconds, f"together they take {slower[worst]:.2f} × the time at {worst} tokens"


def describe(*linears: SparseLinear) -> str:
    """Shapes, value types and densities, as a key for measurements."""
    return "+".join(f"{n.packed.rows}x{n.packed.cols}/{n.packed.value}/{1 - n.packed.sparsity:.2f}" for n in linears)


def packed_linears(host: nn.Module, names: Sequence[str]) -> list[SparseLinear] | str:
    """The packed linears of these names, each used under one name only; or why they cannot be fused."""
    found = []
    for name in names:
        module = host.get_submodule(name)
        if type(module) is not SparseLinear or module.activation != "none":
            return f"{name} is not a packed linear of its own"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
        if count_names(host, module) > 1:
            return f"{name} is used under several names"
        found.append(module)
    return found


def count_names(host: nn.Module, module: nn.Module) -> int:
    return sum(other is module for _, other in host.named_modules(remove_duplicate=False))


def fuse_gated(host: nn.Module, found: GatedProduct, times: Counted) -> Fusion | None:
    """gate, up, activation and product become `owner.gate_up`."""
    names = tuple(dict.fromkeys((found.gate, found.up)))
    what = f"{found.owner}: {', '.join(map(leaf, names))}, {found.activation} and product in one kernel"
    linears = packed_linears(host, names)
    if isinstance(linears, str):
        return None  # they are dense, and the report says why
    if len(linears) == 1 and linears[0].packed.rows % (2 * PANEL):
        return Fusion(found, "", what, why=f"half of {linears[0].packed.rows} rows is no multiple of {PANEL}")
    gate, up = halves(linears[0]) if len(linears) == 1 else linears
    owner = host.get_submodule(found.owner)
    kinds = {(n.packed.rows, n.packed.cols, n.packed.value, n.packed.group, n.dtype, n.int8) for n in linears}
    if len(kinds) > 1:
        return Fusion(found, "", what, why="gate and up differ in shape or value type")
    if isinstance(owner, FusedFeedForward) or count_names(host, owner) > 1:
        return Fusion(found, "", what, why=f"{found.owner} is used under several names")
    if hasattr(owner, "gate_up"):
        return Fusion(found, "", what, why=f"{found.owner}.gate_up exists")
    x = torch.randn(tuple(found.x.meta["val"].shape), dtype=gate.dtype)
    with torch.inference_mode():
        try:
            before = owner(x)
        except Exception as error:  # the user's own forward may ask for anything
            return Fusion(found, "", what, why=f"{found.owner} takes more than one tensor ({type(error).__name__})")
    if not isinstance(before, torch.Tensor):
        return Fusion(found, "", what, why=f"{found.owner} returns a {type(before).__name__}")
    fused = GatedLinear(gate, up, found.activation)
    act = activation_function(found.activation)
    key = f"gated/{len(linears)}/{found.activation}/{describe(gate, up)}"

    def apart(x: torch.Tensor) -> torch.Tensor:
        first, second = linears[0](x).chunk(2, -1) if len(linears) == 1 else (gate(x), up(x))
        return act(first) * second

    seconds, why = times.compare(key, gate.in_features, fused, fused, apart)
    if why:
        return Fusion(found, "", what, seconds, why)
    for place, (name, linear) in enumerate(zip(names, linears, strict=True)):
        set_module(host, name, RowsOfGated(fused, place * linear.out_features, linear))
    fused.train(owner.training)
    owner.__class__ = fused_class(type(owner))
    owner.add_module("gate_up", fused)
    owner.__dict__["down_name"] = leaf(found.down) if found.down else ""
    return Fusion(found, f"{found.owner}.gate_up", what, seconds)


def fuse_activation(host: nn.Module, found: FusedActivation, times: Counted) -> Fusion | None:
    """The activation moves into the linear's kernel, its module becomes the identity."""
    what = f"{found.linear}: {found.activation} in its kernel"
    linears = packed_linears(host, (found.linear,))
    module = host.get_submodule(found.module)
    if isinstance(linears, str):
        return None
    if count_names(host, module) > 1:
        return Fusion(found, "", what, why=f"{found.module} is used under several names")
    linear, act = linears[0], activation_function(found.activation)
    fused = SparseLinear(linear.packed, linear.bias, activation=found.activation, int8=linear.int8)
    key = f"activation/{found.activation}/{describe(linear)}"
    seconds, why = times.compare(key, linear.in_features, fused, fused, lambda x: act(linear(x)))
    if why:
        return Fusion(found, "", what, seconds, why)
    linear.activation = found.activation
    linear.prepare()
    set_module(host, found.module, MovedActivation(module))
    return Fusion(found, found.linear, what, seconds)


def activation_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Torch's own, as a model would call it."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": nn.functional.relu,
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    }
    return functions[name]


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def set_module(host: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points."""
    owner, _, last = name.rpartition(".")
    setattr(host.get_submodule(owner), last, module)
