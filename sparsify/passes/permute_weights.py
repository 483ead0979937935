"""Permute weights: bring the chosen units of each proven feed-forward structure to the front of every tensor that they run through.

down columns      [c0 c1 c2 c3]   choose {1, 3}   [c1 c3 | c0 c2]    trained slice = columns [0, 2)
gate, up rows     [c0 c1 c2 c3]        ──▶        [c1 c3 | c0 c2]

Units that train in place (attention heads, structures that are not proven, `permute=False`) stay where they are.
"""

from __future__ import annotations

import torch
from torch import nn

from sparsify.passes.base import Context, PassResult
from sparsify.program import Move, Program
from sparsify.program.permutation import Permutation
from sparsify.program.selection import arrange


def permute_weights(program: Program, context: Context) -> PassResult:
    """SELECTED → PERMUTED."""
    by_name = {s.name: s for s in program.structures}
    permutations: dict[str, tuple[Permutation, Permutation | None]] = {}
    indices: dict[tuple[str, int], torch.Tensor] = {}
    for choice in program.choices:
        if choice.in_place:
            continue
        structure = by_name[choice.structure]
        order, heads = arrange(structure, choice.consumers, choice.producers)
        outer = Permutation.of(order)
        inner = Permutation.of(torch.tensor(heads)) if heads is not None else None
        permutations[structure.name] = (outer, inner)
        pairs = [(outer, structure.sites)] + ([(inner, structure.inner.sites)] if inner and structure.inner else [])
        for permutation, sites in pairs:
            if permutation is None or permutation.is_identity():
                continue
            for site in sites:
                length = program.tensor(site.param).shape[site.axis]
                index = permutation.expand(site, length)
                before = indices.get((site.param, site.axis))
                indices[site.param, site.axis] = index if before is None else before[index]
    moves, tensors, masks = [], dict(program.tensors), dict(program.masks)
    for (param, axis), index in indices.items():
        if torch.equal(index, torch.arange(index.numel())):
            continue
        moves.append(Move(param, axis, index))
        old = tensors.get(param, program.tensor(param)).detach()
        tensors[param] = old.index_select(axis, index.to(old.device))
        if param in masks:
            masks[param] = masks[param].index_select(axis, index.to(masks[param].device))
        if context.donate:
            release(program, param)
    note = f"permute-weights: {len(permutations)} structures, {len(moves)} tensors reordered"
    moved = program.evolve(note, permutations=permutations, moves=tuple(moves), tensors=tensors, masks=masks)
    return PassResult(moved, changed=bool(permutations))


def release(program: Program, param: str) -> None:
    """Free a donated tensor of the user's model: its storage goes as soon as its replacement exists."""
    owner, _, leaf = param.rpartition(".")
    parameter = getattr(program.host.get_submodule(owner), leaf)
    if isinstance(parameter, nn.Parameter):
        parameter.data = parameter.data.new_empty(0)
