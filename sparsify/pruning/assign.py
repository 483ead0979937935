"""Which weights a plan prunes: the first rule of `Prune` that matches wins.

Prune(match="*.mlp*")   ──▶  model.layers.0.mlp.up_proj.weight, …
(nothing left over)     ──▶  PlanError, or RefusedError where a module is named that cannot be pruned
"""

from __future__ import annotations

from sparsify.errors import PlanError, Refusal, RefusedError
from sparsify.plan import Plan
from sparsify.plan.unmatched import unmatched_patterns
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
        tied = {name: also for name in targets if masked and len(also := program.names_of(name)) > 1}
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


__all__ = ["assign_prune_rules"]
