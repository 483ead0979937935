"""The one way from a dense host to a lowered one, for every target: decide, rewrite the program, install, verify.

    program of a dense host ──decide──▶ Decision (module for each name, what was joined, every reason why not)
           │                              │
           └──────────rewrite─────────────┴──▶ lowered program, which runs by itself
                                                    └──install──▶ host: the same modules under the same names, tensors its own

Nothing is written before the decision is complete: a refusal, or a whole model that is slower lowered, needs no undoing. What a layer
becomes and what it costs is the target's to say (`Target`); everything here is the same for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from sparsify.console import PATIENCE
from sparsify.errors import Refusal, RefusedError, VerifyError
from sparsify.lowering.check_lowered import LoweringCheck
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct, Join, find_joins
from sparsify.lowering.fused_modules import MovedActivation, fuse_feed_forward
from sparsify.lowering.restore import set_module, take_over
from sparsify.lowering.rewrite import rewrite
from sparsify.lowering.target import Comparison, Fusion, Joined, Layer, Outcome, Target
from sparsify.model.fast_paths import close_fast_paths
from sparsify.model.linears import is_plain_linear
from sparsify.model.module_tree import copy_module_tree
from sparsify.modules.kernel_module import KernelModule
from sparsify.modules.rows_of_gated import Gated, RowsOfGated
from sparsify.passes.verify import verify
from sparsify.program import Program, Stage

Quantize = Literal["int8"] | Mapping[str, Literal["int8"]] | None


@dataclass(eq=False)
class Decision:
    """What is to stand where in a host that was not touched yet.

    outcomes: layer → what became of it, in the host's order. modules: qualified name → new module, for every name that a module has.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    fusions: list[Fusion] = field(default_factory=list)
    not_fused: list[Refusal] = field(default_factory=list)
    whole: Comparison | None = None

    @property
    def packed(self) -> tuple[Any, ...]:
        """Report rows of the layers that were packed; of what class they are is the target's affair."""
        return tuple(outcome.entry for outcome in self.outcomes.values() if outcome.packed)

    @property
    def rearranged(self) -> tuple[Any, ...]:
        """Report rows of layers that stay dense, in another layout."""
        found = (o.entry for o in self.outcomes.values() if o.module is not None and not o.packed)
        return tuple(entry for entry in found if entry is not None)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why layers were not packed."""
        return tuple(outcome.refusal for outcome in self.outcomes.values() if outcome.refusal is not None)


def lower(
    host: nn.Module,
    program: Program | None,
    target: Target,
    *,
    names: Sequence[str] | None = None,
    quantize: Quantize = None,
    check: bool = False,
    progress: bool = False,
) -> tuple[Decision, Program | None]:
    """Lower `host`, in place, and `program`, its graph: into a new one at stage LOWERED, verified against the host.

    program: shows what can be joined; None: every linear alone.
    names: qualified module names that may be replaced; one that cannot be packed raises RefusedError. None: every nn.Linear and Conv1D.
    quantize: "int8" for all of them, or per module name.
    check: compare every layer, the host and the program with what they computed before.
    progress: show how many layers were tried and measured, once that takes longer than a moment.

    Raises RefusedError, and VerifyError naming what is wrong with the lowered program.
    """
    decision = decide(host, program, target, names, quantize, progress)
    before = LoweringCheck(host, program, target.name) if check and program is not None else None
    lowered = None if program is None else lowered_program(program, decision, target)
    install(host, decision)
    if lowered is None:
        return decision, None
    lowered = lowered.on(host)
    try:
        verify(lowered)
    except VerifyError as error:
        raise VerifyError(f"in pass 'lower-{target.name}': {error}\n{lowered}") from error
    if before is not None:
        before.compare(host, lowered)
    return decision, lowered


def lowered_program(program: Program, decision: Decision, target: Target) -> Program:
    """`program` at stage LOWERED, over the decision's modules; it runs by itself."""
    rows = {name: outcome.entry for name, outcome in decision.outcomes.items() if outcome.entry is not None}
    texts = {name: target.describe(entry) for name, entry in rows.items()}
    done = rewrite(program, decision.modules, decision.fusions, texts)
    history = [f"lower-{target.name}: {row}" for row in (*decision.packed, *decision.rearranged, *decision.fusions)]
    history += [f"lower-{target.name}: not fused: {refusal}" for refusal in decision.not_fused]
    history += [] if decision.whole is None else [f"lower-{target.name}: whole model {decision.whole}"]
    return replace(
        done,
        stage=Stage.LOWERED,
        history=(*done.history, *history),
        refusals=(*done.refusals, *decision.refusals),
    )


# --- deciding ----------------------------------------------------------------------------------------------------------------


def decide(
    host: nn.Module,
    program: Program | None,
    target: Target,
    names: Sequence[str] | None,
    quantize: Quantize,
    progress: bool = False,
) -> Decision:
    """Ask `target` about every layer, about what the program shows to belong together, and about the whole. Writes to nothing."""
    decision = Decision()
    layers = dict(find_layers(host, names, quantize))
    shared = sharing(host)
    shown = tqdm(
        layers.items(), desc="linears measured", unit="linear", delay=PATIENCE, leave=False, disable=not progress
    )
    for name, layer in shown:
        others = [n for n in shared[id(layer.module.weight)] if host.get_submodule(n) is not layer.module]
        if others and not target.copies_tied:
            why = Refusal(name, f"its weight is shared with {', '.join(others)}, which needs it dense")
            outcome = Outcome(None, None, why)
        else:
            outcome = target.try_layer(layer)
        if outcome.refusal is not None and names is not None:
            raise RefusedError(str(outcome.refusal))
        put(host, decision, name, outcome)
    if program is None:
        return decision
    join(host, program, target, decision)
    if names is None and decision.packed:
        decision.whole = target.compare(lambda: lowered_copy(host, decision), host, program)
    if decision.whole is not None and decision.whole.slower:
        dense = Decision(whole=decision.whole)
        for name, outcome in decision.outcomes.items():
            gone = outcome.module is not None
            kept = target.leave(layers[name], outcome, decision.whole.reason) if gone else outcome
            put(host, dense, name, kept)
        return dense
    return decision


def find_layers(host: nn.Module, names: Sequence[str] | None, quantize: Quantize) -> Iterator[tuple[str, Layer]]:
    """Every linear of the host once, under its first name. Raises RefusedError for names of none."""
    found = {
        name: module
        for name, module in host.named_modules(remove_duplicate=False)
        if is_plain_linear(module) and (names is None or name in names)
    }
    missing = sorted(set(names or ()) - set(found))
    if missing:
        raise RefusedError(f"lower_model: no linear is called {', '.join(missing)}")
    done: set[int] = set()
    for name, module in found.items():
        if id(module) not in done:
            done.add(id(module))
            yield name, Layer(name, module, quantize.get(name) if isinstance(quantize, Mapping) else quantize)


def sharing(host: nn.Module) -> dict[int, list[str]]:
    """Parameter id → names of the modules that have it as their weight."""
    found: dict[int, list[str]] = {}
    for name, module in host.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            found.setdefault(id(module.weight), []).append(name)
    return found


def put(host: nn.Module, decision: Decision, name: str, outcome: Outcome) -> None:
    """Note what became of a layer, under each of its names."""
    decision.outcomes[name] = outcome
    if outcome.module is not None:
        old = host.get_submodule(name)
        places = [place for place, other in host.named_modules(remove_duplicate=False) if other is old]
        decision.modules |= dict.fromkeys(places, outcome.module)


def join(host: nn.Module, program: Program, target: Target, decision: Decision) -> None:
    """Join what the graph shows to belong together; every join that does not happen leaves a reason."""
    found, decision.not_fused = find_joins(program)
    count = Counter(id(module) for _, module in host.named_modules(remove_duplicate=False))
    gates = {candidate.gate for candidate in found if isinstance(candidate, GatedProduct)}
    for candidate in found:
        if isinstance(candidate, GatedProduct):
            result = join_gated(host, candidate, target, decision, count)
        else:
            linear = decision.modules.get(candidate.linear)
            if candidate.linear in gates and not (linear is not None and target.packs(linear)):
                continue  # part of a gated kernel, or that it is not packed was said with its gated product
            result = move_activation(host, candidate, target, decision, count)
        if isinstance(result, str):
            where, _, what = str(candidate).partition(": ")
            stay = "stay apart" if isinstance(candidate, GatedProduct) else "stays apart"
            decision.not_fused.append(Refusal(where, f"{what} {stay}: {result}"))
        else:
            decision.fusions.append(result)


def packed_linears(
    host: nn.Module, names: Sequence[str], target: Target, decision: Decision, count: Counter[int]
) -> list[KernelModule] | str:
    """The packed linears of these names, each used under one name only; or why they cannot be joined to anything."""
    found: list[KernelModule] = []
    for name in names:
        module, old = decision.modules.get(name), host.get_submodule(name)
        if not isinstance(module, KernelModule) or not target.packs(module):
            return f"{name} is not packed"
        why = unfit(name, old, count)
        if why:
            return why
        found.append(module)
    return found


def unfit(name: str, module: nn.Module, count: Counter[int]) -> str:
    """Why a module of the host may not lose its own forward, or nothing."""
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has hooks"
    return f"{name} is used under several names" if count[id(module)] > 1 else ""


def join_gated(
    host: nn.Module, found: GatedProduct, target: Target, decision: Decision, count: Counter[int]
) -> Fusion | str:
    """gate, up, activation and product become `owner.gate_up`."""
    linears = packed_linears(host, found.linears, target, decision, count)
    if isinstance(linears, str):
        return linears
    why = impure(host, found, count)
    joined = why or target.join(found, linears)
    if isinstance(joined, str):
        return joined
    whole = joined.module
    assert isinstance(whole, Gated)
    for place, (name, linear) in enumerate(zip(found.linears, linears, strict=True)):
        decision.modules[name] = RowsOfGated(whole, place * linear.out_features, linear)
    decision.modules[f"{found.owner}.gate_up"] = whole
    return Fusion(found, f"{found.owner}.gate_up", joined.seconds)


def impure(host: nn.Module, found: GatedProduct, count: Counter[int]) -> str:
    """Why a feed-forward module cannot get another forward, or nothing. Its own, still dense, is tried on numbers."""
    owner, weight = host.get_submodule(found.owner), host.get_submodule(found.gate).weight
    if count[id(owner)] > 1:
        return f"{found.owner} is used under several names"
    if hasattr(owner, "gate_up"):
        return f"{found.owner}.gate_up exists"
    assert isinstance(weight, torch.Tensor)
    x = torch.randn(tuple(found.x.meta["val"].shape), dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        try:
            result = owner(x)
        except Exception as error:  # the user's own forward may ask for anything
            return f"{found.owner} takes more than one tensor ({type(error).__name__})"
    return "" if isinstance(result, torch.Tensor) else f"{found.owner} returns a {type(result).__name__}"


def move_activation(
    host: nn.Module, found: FusedActivation, target: Target, decision: Decision, count: Counter[int]
) -> Fusion | str:
    """The activation moves into the linear's kernel, its module becomes the identity."""
    linears = packed_linears(host, (found.linear,), target, decision, count)
    if isinstance(linears, str):
        return linears
    module = host.get_submodule(found.module)
    joined: Joined | str = unfit(found.module, module, count) or target.absorb(found, linears[0])
    if isinstance(joined, str):
        return joined
    decision.modules[found.linear] = joined.module
    decision.modules[found.module] = MovedActivation(module)
    return Fusion(found, found.linear, joined.seconds)


# --- installing --------------------------------------------------------------------------------------------------------------


def install(host: nn.Module, decision: Decision) -> None:
    """Carry a decision into a host of the structure that it was made on, in place."""
    fused = {f.module: f.found for f in decision.fusions if isinstance(f.found, GatedProduct)}
    for name, module in decision.modules.items():
        if name not in fused:
            set_module(host, name, take_over(module, host.get_submodule(name)))
    for name, found in fused.items():
        module = decision.modules[name]
        assert isinstance(module, Gated)  # `join_gated` made sure
        fuse_feed_forward(host.get_submodule(found.owner), module, found.down.rpartition(".")[2])
    close_fast_paths(host, decision.modules)


def lowered_copy(host: nn.Module, decision: Decision) -> nn.Module:
    """A lowered host beside the dense one, which shares what lowering leaves alone."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*host.parameters(), *host.buffers())}
    copied = copy_module_tree(host, shared)
    install(copied, decision)
    return copied


__all__ = ["Decision", "Join", "lower"]
