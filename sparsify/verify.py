"""Grammars: what must hold of a program at each stage, and how far a forward may drift from rounding alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from sparsify.errors import VerifyError
from sparsify.program import Program, Stage

PARTIAL_OPS = (torch.ops.sparsify.partial_linear.default, torch.ops.sparsify.partial_linear_at.default)


def verify(program: Program) -> None:
    """Raise VerifyError, naming node and tensor, unless the program obeys the grammar of its stage."""
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    if placeholders != [i.name for i in program.inputs]:
        raise VerifyError("the graph's inputs and the program's table of inputs differ")
    program.graph.lint()
    if program.stage >= Stage.STRUCTURED:
        verify_structures(program)
    if program.stage >= Stage.SELECTED:
        verify_choices(program)
    if program.stage >= Stage.PERMUTED:
        verify_moves(program)
    if program.stage >= Stage.EXPANDED:
        verify_slices(program)


def verify_structures(program: Program) -> None:
    seen: set[str] = set()
    for structure in program.structures:
        if structure.name in seen:
            raise VerifyError(f"two structures are called {structure.name!r}")
        seen.add(structure.name)
        for site in structure.sites:
            tensor = program.tensor(site.param)
            if not 0 <= site.axis < tensor.dim():
                raise VerifyError(f"{structure.name}: {site} names axis {site.axis} of a {tensor.dim()}-dimensional tensor")
            last = max(site.bases()) + (structure.units - 1) * site.step + site.block
            if last > tensor.shape[site.axis]:
                raise VerifyError(f"{structure.name}: {site} ends at {last}, the axis has {tensor.shape[site.axis]} channels")


def verify_choices(program: Program) -> None:
    by_name = {s.name: s for s in program.structures}
    for choice in program.choices:
        structure = by_name.get(choice.structure)
        if structure is None:
            raise VerifyError(f"a choice names the unknown structure {choice.structure!r}")
        heads = structure.units * (structure.inner.units if structure.inner else 1)
        for ids, limit in ((choice.consumers, heads), (choice.producers, structure.units)):
            if len(set(ids)) != len(ids) or any(not 0 <= i < limit for i in ids):
                raise VerifyError(f"{choice.structure}: chosen units {ids} are not distinct ids below {limit}")


def verify_moves(program: Program) -> None:
    for move in program.moves:
        if not torch.equal(move.index.sort().values, torch.arange(move.index.numel())):
            raise VerifyError(f"the move of {move.param} on axis {move.axis} is not a permutation")
        if move.param not in program.tensors:
            raise VerifyError(f"{move.param} was moved, but has no new tensor")


def verify_slices(program: Program) -> None:
    names = program.tensor_names
    uses: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in PARTIAL_OPS:
            block = names.get(node.args[3].name)
            if block is None:
                raise VerifyError(f"node {node.name}: its block is not a named parameter")
            uses[block] = uses.get(block, 0) + 1
    trained = {s.block_name: s for s in program.slices}
    for name, piece in trained.items():
        if name not in uses:
            raise VerifyError(f"{piece.param}: the trained slice is read by no operation")
        block = program.tensor(name)
        side = 1 if piece.side == "column" else 0
        if block.shape[side] != piece.length or not block.is_contiguous():
            raise VerifyError(f"{piece.param}: the trained block has shape {tuple(block.shape)}, expected {piece.length} channels")
    for linear in program.linears():
        if any(linear.weight == piece.param for piece in program.slices):
            raise VerifyError(f"node {linear.node.name} still reads {linear.weight} whole, beside its trained slice")


def check_outputs(expected: Any, found: Any) -> None:
    """Compare two outputs leaf by leaf; only the rounding of reordered sums may separate them."""
    for number, (a, b) in enumerate(zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)):
        if not isinstance(a, torch.Tensor) or not a.is_floating_point():
            continue
        if a.shape != b.shape:
            raise VerifyError(f"output {number} changed its shape from {tuple(a.shape)} to {tuple(b.shape)}")
        scale = float(a.detach().double().abs().max().clamp_min(1e-30)) if a.numel() else 1.0
        error = float((a.detach().double() - b.detach().double()).abs().max()) / scale if a.numel() else 0.0
        bound = 256 * torch.finfo(a.dtype).eps
        if not error <= bound:
            raise VerifyError(f"output {number} drifted by {error:.2e} of its largest entry; rounding explains {bound:.1e}")
