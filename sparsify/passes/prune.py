"""Prune: each matched weight loses its least important entries; the survivors' mask becomes part of the program.

    @down_proj.weight (n, m) dense   ──▶   @down_proj.weight with exact zeros, masks["…down_proj.weight"] (n, m) bool

Works on a copy of the host (the user's tensors are not written), layer by layer in the order of the graph.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsify.errors import PlanError, Refusal, RefusedError
from sparsify.model.module_tree import copy_module_tree
from sparsify.passes.assign_rules import unmatched_patterns
from sparsify.passes.base import Context, PassResult
from sparsify.plan import Plan
from sparsify.program import Program
from sparsify.pruning.rule import Prune


def assign_prune_rules(program: Program, plan: Plan, *, masked: bool = False) -> tuple[dict[str, Prune], list[Refusal]]:
    """Which weights the plan prunes, by which rule (the first that matches), and what it leaves dense with the reason.

    masked: the survivors will train under masks, which tied weights cannot have.

    Raises PlanError for a rule that serves nothing, RefusedError when a rule names one module that cannot be pruned.
    """
    wanted: dict[str, Prune] = {}
    refusals: list[Refusal] = []
    for index, rule in enumerate(plan.rules):
        if not isinstance(rule, Prune):
            continue
        targets, refused = rule.targets(program)
        tied = {name: also for name in targets if masked and len(also := names_of(program, name)) > 1}
        reason = "it is tied ({}), and a tied weight cannot train under a mask"
        refused += [Refusal(name, reason.format(", ".join(also))) for name, also in tied.items()]
        targets = [name for name in targets if name not in tied]
        fresh = [name for name in targets if name not in wanted]
        named = [r for r in refused if rule.is_named(r.where, r.where.rpartition(".")[0])]
        if named:
            raise RefusedError(f"rule {index}, {rule}: {named[0]}")
        if not fresh:
            why = f": {refused[0]}" if refused else "; it matches no linear that is still dense"
            raise PlanError(f"rule {index}, {rule}, serves nothing{why}")
        wanted.update(dict.fromkeys(fresh, rule))
        names = {n for param in targets + [r.where for r in refused] for n in (param, param.rpartition(".")[0])}
        refusals += refused + unmatched_patterns(index, rule, names)
    return wanted, refusals


def names_of(program: Program, param: str) -> list[str]:
    """Every name of a tensor (tied weights and shared modules have several)."""
    return [name for name, canonical in program.aliases.items() if canonical == param]


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
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for _, p in host.named_parameters()
    }
    memo.update({id(b): b for _, b in host.named_buffers()})
    return copy_module_tree(host, memo)
