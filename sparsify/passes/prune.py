"""Prune: each matched weight loses its least important entries; the survivors' mask becomes part of the program.

    @down_proj.weight (n, m) dense   ──▶   @down_proj.weight with exact zeros, masks["…down_proj.weight"] (n, m) bool

Works on a copy of the host (the user's tensors are not written), layer by layer in the order of the graph.
"""

from __future__ import annotations

from torch import nn

from sparsify.errors import PlanError
from sparsify.model.module_tree import copy_module_tree
from sparsify.passes.base import Context, PassResult
from sparsify.program import Program
from sparsify.pruning.assign import assign_prune_rules
from sparsify.pruning.rule import Prune


def prune(program: Program, context: Context) -> PassResult:
    """STRUCTURED → STRUCTURED."""
    plan = context.plan
    wanted, refusals = assign_prune_rules(program, plan, masked=not plan.adapts and not plan.for_inference)
    if not wanted:
        return PassResult(program, changed=False)
    check_memory(program, wanted)
    from sparsify.pruning.sequential import prune_model
    from sparsify.pruning.sparse_checkpoint import model_hash

    dense_hash = model_hash(program.host)  # before the dense values are gone
    host = shared_copy(program.host)
    batches = list(context.calibration) if context.calibration is not None else None
    result = prune_model(
        host,
        program,
        list(wanted.items()),
        batches,
        seed=context.plan.seed,
        progress=context.progress,
        resume_dir=context.resume_dir,
    )
    note = f"prune: {len(result.masks)} weights, {result.sparsity:.1%} zeros"
    pruned = program.evolve(
        note,
        host=host,
        masks=dict(result.masks),
        pruned=tuple(result.layers),
        dense_hash=dense_hash,
        refusals=(*program.refusals, *refusals, *result.refusals),
    )
    return PassResult(pruned, changed=True)


def check_memory(program: Program, wanted: dict[str, Prune]) -> None:
    """Raises PlanError for a model on the meta device."""
    for name in wanted:
        if program.tensor(name).device.type == "meta":
            raise PlanError(
                f"{name} has no memory (meta device): prune the model from its files, block by block, with "
                "sparsify.pruning.on_disk.prune_on_disk(source, target, plan)"
            )


def shared_copy(host: nn.Module) -> nn.Module:
    """A copy of the module tree with its own Parameter objects over the same memory."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for _, p in host.named_parameters()
    }
    memo.update({id(b): b for _, b in host.named_buffers()})
    return copy_module_tree(host, memo)
