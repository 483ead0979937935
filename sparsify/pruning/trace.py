"""One dense forward that tells the driver what to do: which matrices meet which inputs, in which order, inside which modules.

events ─▶ units (what to stop at: repeated blocks, else the smallest module that holds all uses of a weight)
       ─▶ groups inside a unit (matrices that read the same tensor share one Hessian), in order of execution
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify.errors import Refusal
from sparsify.model.blocks import repeated_blocks
from sparsify.pruning.collect import InputId, InputIdentities, Product, View, Watcher

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class Group:
    """Matrices that read the same input: one Hessian, or for packed experts one per expert.

    params: in order. views: every rectangle, of all parameters. experts: the views have inputs of their own.
    calls: how many products with these views one forward of the unit makes (None: it depends on the routing).
    """

    params: list[str]
    views: list[View]
    experts: bool = False
    calls: int | None = None


@dataclass
class Unit:
    """A module to stop at, and the groups to prune in it. name: "" for the whole model."""

    name: str
    groups: list[Group] = field(default_factory=list)


@dataclass
class Event:
    """One product in the trace. path: `(module name, call number)` from the root inwards. input_id: identity of the input tensor."""

    view: View
    path: tuple[tuple[str, int], ...]
    input_id: InputId


def record_events(
    host: nn.Module,
    run: Callable[[], object],
    params: Callable[[], Mapping[str, Tensor]],
    scope: Callable[[Watcher], AbstractContextManager[object]],
) -> tuple[list[Event], dict[str, str]]:
    """Run one batch inside `scope` and list every product with a named parameter; also how else each parameter was used."""
    events: list[Event] = []
    stack: list[tuple[str, int]] = []
    identities = InputIdentities()
    calls = 0

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal calls
            calls += 1
            stack.append((name, calls))

        return hook

    def leave(*_: object) -> None:
        stack.pop()

    def seen(product: Product) -> None:
        events.append(Event(product.view, tuple(stack), identities.of(product.x)))

    watcher = Watcher(params, seen)
    with ExitStack() as cleanup:
        for name, module in host.named_modules():
            cleanup.callback(module.register_forward_pre_hook(enter(name), prepend=True).remove)
            cleanup.callback(module.register_forward_hook(leave, always_call=False).remove)
        with torch.no_grad(), scope(watcher), watcher:
            run()
    return events, watcher.other_uses


def common_path(paths: list[tuple[tuple[str, int], ...]]) -> tuple[str, ...]:
    """Names of the innermost module *call* that contains all events, with everything around it."""
    shared = paths[0]
    for path in paths[1:]:
        length = 0
        while length < min(len(shared), len(path)) and shared[length] == path[length]:
            length += 1
        shared = shared[:length]
    return tuple(name for name, _ in shared)


def plan_units(
    host: nn.Module, events: list[Event], params: Mapping[str, Tensor], other_uses: Mapping[str, str]
) -> tuple[list[Unit], list[Refusal]]:
    """Units in order of execution, with their groups; parameters that no product reads are refused with the reason."""
    blocks = {name for stack in repeated_blocks(host) for name in stack.names}
    by_param: dict[str, list[Event]] = {}
    for event in events:
        by_param.setdefault(event.view.param, []).append(event)
    refusals = [Refusal(name, unread(name, params[name], other_uses)) for name in params if name not in by_param]
    chosen: dict[str, str] = {}
    for name, uses in by_param.items():
        path = common_path([use.path for use in uses])
        chosen[name] = next((part for part in path if part in blocks), path[-1] if path else "")
    outer = set(chosen.values())
    absorbed = {
        name: next((o for o in sorted(outer, key=len) if inside(unit, o)), unit) for name, unit in chosen.items()
    }
    units: dict[str, Unit] = {}
    for name in by_param:  # order of first use
        unit = units.setdefault(absorbed[name], Unit(absorbed[name]))
        add_to_groups(unit, name, by_param, params[name])
    return list(units.values()), refusals


def inside(name: str, outer: str) -> bool:
    return outer == "" or name == outer or name.startswith(outer + ".")


def unread(name: str, parameter: Tensor, other_uses: Mapping[str, str]) -> str:
    if name in other_uses:
        return f"it is read by {other_uses[name]} and not by a matrix product, so its inputs cannot be collected"
    return "no matrix product reads it in a forward of the first calibration batch"


def add_to_groups(
    unit: Unit, name: str, by_param: Mapping[str, list[Event]], parameter: Float[Tensor, "*experts p q"]
) -> None:
    """Join the group whose matrices read exactly the same inputs, or start one."""
    uses = by_param[name]
    views = list(dict.fromkeys(use.view for use in uses))
    if parameter.dim() == 3:
        unit.groups.append(Group([name], expert_views(name, views[0], parameter), experts=True))
        return
    inputs = {view: tuple(use.input_id for use in uses if use.view == view) for view in views}
    for part in dict.fromkeys(inputs.values()):
        same = [view for view in views if inputs[view] == part]
        for group in unit.groups:
            other = next((use for use in by_param[group.params[0]] if use.view == group.views[0]), None)
            if group.experts or other is None:
                continue
            theirs = tuple(use.input_id for use in by_param[group.params[0]] if use.view == group.views[0])
            if theirs == part:
                group.params += [name] if name not in group.params else []
                group.views += same
                group.calls = (group.calls or 0) + len(part) * len(same)
                break
        else:
            unit.groups.append(Group([name], same, calls=len(part) * len(same)))


def expert_views(name: str, example: View, parameter: Float[Tensor, "experts p q"]) -> list[View]:
    """One view per expert of a packed `(experts, …, …)` parameter, shaped like the one that was seen."""
    experts, step = parameter.shape[0], parameter.stride(0)
    base = example.offset % step if step else 0
    return [View(name, base + e * step, example.shape, example.stride) for e in range(experts)]
