"""Helpers for tests of detection and permutation: the positive and the negative control of a structure.

A structure is right when permuting *all* its sites alike leaves the model's output as it was, and complete when
permuting all sites *but one* changes it. Both run in float64 on perturbed parameters, so that zero biases and norms of
ones cannot hide a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sparsify.model.module_tree import copy_module_tree
from sparsify.program.permutation import Permutation
from sparsify.program.structure import Site, Structure

Example = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class Controls:
    """Outcome of `check_structure`.

    positive: relative change of the output when every site is permuted (rounding, when the structure is right).
    negative: the same for each site left out; sites that the output does not depend on at all are not in it.
    dead: sites whose values do not matter (the key bias of plain attention cancels in the softmax).
    """

    positive: float
    negative: Mapping[str, float]
    dead: tuple[str, ...]


def random_permutation(units: int, repeats: int, seed: int) -> Permutation:
    """Random orders, none of them the identity (unless there is only one unit)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(repeats):
        order = torch.randperm(units, generator=generator).tolist()
        if order == sorted(order):
            order = order[1:] + order[:1]
        rows.append(order)
    return Permutation.of(torch.tensor(rows))


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name that it has."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update({name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if buffer is not None})
    return found


def permute_state(
    model: nn.Module, structure: Structure, seed: int = 0, skip: Site | None = None, repeats: int = 1
) -> dict[str, torch.Tensor]:
    """New values of the tensors of `structure`, its units in a random order; `skip` is left as it was.

    repeats: orders per site: 1, or the number of groups for an inner structure (each group in an order of its own).
    """
    tensors = named_tensors(model)
    permutation = random_permutation(structure.units, repeats, seed)
    state: dict[str, torch.Tensor] = {}
    for site in structure.sites:
        if site == skip:
            continue
        old = state.get(site.param, tensors[site.param].detach())
        state[site.param] = old.index_select(site.axis, permutation.expand(site, old.shape[site.axis]))
    return state


def perturbed(model: nn.Module, example: Example, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """A float64 copy of `model` in eval mode with noise on every parameter; float32 when it does not run in float64."""
    for dtype in (torch.float64, torch.float32):
        twin = copy_module_tree(model).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in twin.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(parameter + scale * noise)
        try:
            outputs(twin, example)
        except RuntimeError:
            if dtype is torch.float32:
                raise
            continue
        return twin
    raise AssertionError("unreachable")


def outputs(model: nn.Module, example: Example, state: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Floating-point tensors that the model returns, with the values of some of its tensors replaced for this call.

    Values are copied in and back, which is right for tied tensors and shared modules (`functional_call` is not: it
    leaves a module that occurs twice with the replaced values).
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
    args, kwargs = pytree.tree_map(lambda value: cast(value, dtype), example)
    tensors = named_tensors(model)
    before = {name: tensors[name].detach().clone() for name in state or {}}
    with torch.no_grad():
        try:
            for name, value in (state or {}).items():
                tensors[name].copy_(value)
            result = model(*args, **kwargs)
        finally:
            for name, value in before.items():
                tensors[name].copy_(value)
    leaves = result.values() if isinstance(result, Mapping) else [result]
    found = [t for t in pytree.tree_leaves(list(leaves)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert found, "the model returned no floating-point tensor"
    return found


def cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """Largest relative change over the outputs (infinity norm)."""
    assert len(before) == len(after)
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        finite = torch.isfinite(a)
        assert torch.equal(finite, torch.isfinite(b))
        if finite.any():
            worst = max(worst, float((a - b)[finite].abs().max() / a[finite].abs().max().clamp_min(1e-30)))
    return worst


def levels(structure: Structure) -> Iterator[tuple[Structure, int]]:
    """The structure and its inner one, each with the number of orders that it takes."""
    if structure.units > 1:
        yield structure, 1
    if structure.inner is not None and structure.inner.units > 1:
        yield structure.inner, structure.units


def check_structure(
    model: nn.Module,
    example: Example,
    structure: Structure,
    seed: int = 0,
    tolerance: float = 1e-6,
    prepared: bool = False,
) -> Controls:
    """Run both controls; raises AssertionError when one fails.

    tolerance: bound on the relative change under the positive control. Models that compute in float32 inside (rotary
        tables, norms) do not get down to float64 rounding; those that run in float32 as a whole get 100 times as much.
    prepared: `model` went through `perturbed` already.
    """
    twin = model if prepared else perturbed(model, example, seed)
    if any(p.dtype is torch.float32 for p in twin.parameters()):
        tolerance *= 100
    before = outputs(twin, example)
    positive, negative, dead = 0.0, {}, []
    for level, repeats in levels(structure):
        change = difference(before, outputs(twin, example, permute_state(twin, level, seed, repeats=repeats)))
        assert change <= tolerance, f"permuting all sites changed the output by {change:.1e}:\n{level}"
        positive = max(positive, change)
        for site in level.sites:
            state = permute_state(twin, level, seed, site, repeats)
            change = difference(before, outputs(twin, example, state))
            if change <= 10 * tolerance and not matters(twin, example, before, site, level.units, seed, tolerance):
                dead.append(str(site))
                continue
            assert change > 10 * tolerance, f"leaving out {site} changed the output by {change:.1e} only:\n{level}"
            negative[str(site)] = change
    return Controls(positive, negative, tuple(dead))


def matters(
    model: nn.Module, example: Example, before: list[torch.Tensor], site: Site, units: int, seed: int, tolerance: float
) -> bool:
    """Whether the output depends on the tensor at the places of `site` at all."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    value = tensors[site.param].detach().clone()
    places = site.positions(units).reshape(-1)
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(value.index_select(site.axis, places).shape, generator=generator, dtype=value.dtype)
    value.index_add_(site.axis, places, noise)
    return difference(before, outputs(model, example, {site.param: value})) > 10 * tolerance
