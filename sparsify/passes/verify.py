"""Grammars: what must hold of a program at each stage, and how far a forward may drift from rounding alone."""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

import sparsify.modules.masked
import sparsify.ops  # noqa: F401  (both register operators named below)
from sparsify.errors import VerifyError
from sparsify.passes.verify_lowered import verify_lowered
from sparsify.program import Program, Stage

#: operators that belong to no part → what computes them when no kernel is chosen
OPERATORS: dict[OpOverload, str] = {
    torch.ops.sparsify.masked_linear.default: "reference: one GEMM over exact zeros, gradient masked",
    torch.ops.sparsify.apply_mask.default: "reference: element-wise",
    torch.ops.sparsify.quantized_linear.default: "reference: unpacked to a temporary, one GEMM",
}


def operators(program: Program) -> dict[OpOverload, str]:
    """Operators of ours that may stand in a program, with what computes them: those of its parts, of masks and packed weights."""
    found = dict(OPERATORS)
    for kind in dict.fromkeys(type(part) for part in program.parts):
        found |= kind.operators
    return found


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
        verify_parts(program)
    if program.stage >= Stage.LOWERED:
        verify_lowered(program)


def verify_structures(program: Program) -> None:
    seen: set[str] = set()
    for structure in program.structures:
        if structure.name in seen:
            raise VerifyError(f"two structures are called {structure.name!r}")
        seen.add(structure.name)
        for site in structure.sites:
            if site.param in program.packed:  # its dense shape may be gone; it was checked at every stage before
                continue
            tensor = program.tensor(site.param)
            if not 0 <= site.axis < tensor.dim():
                raise VerifyError(
                    f"{structure.name}: {site} names axis {site.axis} of a {tensor.dim()}-dimensional tensor"
                )
            last = max(site.bases()) + (structure.units - 1) * site.step + site.block
            if last > tensor.shape[site.axis]:
                raise VerifyError(
                    f"{structure.name}: {site} ends at {last}, the axis has {tensor.shape[site.axis]} channels"
                )


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
        if program.stage is Stage.PERMUTED and move.param not in program.tensors:
            raise VerifyError(f"{move.param} was moved, but has no new tensor")


def verify_parts(program: Program) -> None:
    """Every trained tensor is read by an operator of its part, is as the part says, and no linear reads its weight whole."""
    names, known = program.tensor_names, operators(program)
    read: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in known:
            continue
        read |= {names[source.name] for source in node.all_input_nodes if source.name in names}
        part = program.part_at(node)
        if part is not None:
            part.check_node(node)
    for part in program.parts:
        part.check(program, read)
    changed = {p.param for p in program.parts} | set(program.quantize)
    for reader in (*program.linears(), *program.embeddings(), *program.convolutions()):
        if reader.weight in changed:
            raise VerifyError(f"node {reader.node.name} still reads {reader.weight} whole, beside its trained part")


def check_identical(expected: object, found: object) -> bool:
    """Whether two outputs are the same bits, leaf by leaf; NaN equals NaN."""
    pairs = list(zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True))
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in tensors) and all(
        bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in tensors
    )


def check_outputs(expected: object, found: object) -> None:
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
            raise VerifyError(
                f"output {number} drifted by {error:.2e} of its largest entry; rounding explains {bound:.1e}"
            )
