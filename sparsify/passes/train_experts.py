"""Before the trace: packed experts that a plan may train are written out as grouped linears (`sparsify.model.packed_experts`).

LoRA()                           every module of packed experts      ──▶   grouped linears, in a twin of the model
LoRA(match="*.q_proj")           none of them                        ──▶   the model itself
Prune(…) beside a rule           none: `Prune` sees experts one by one in the user's own forward
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from sparsify.model.packed_experts import write_out
from sparsify.plan import S2FT, Plan, Rule
from sparsify.pruning.rule import Prune

Model = TypeVar("Model", bound=nn.Module)


def write_out_experts(model: Model, plan: Plan) -> Model:
    """A twin of the model for a plan that may train packed experts; the model itself for every other one."""
    if not plan.adapts or any(isinstance(rule, Prune) for rule in plan.rules):
        return model
    return write_out(model, lambda path, names: may_train(plan, path, names))


def may_train(plan: Plan, path: str, names: tuple[str, ...]) -> bool:
    """Whether a rule of the plan that trains parts matches the weights of a module of experts, or for S2FT the module."""
    weights = tuple(f"{path}.{name}" for name in names)
    return any(rule.phase == "adapt" and reaches(rule, path, weights) for rule in plan.rules)


def reaches(rule: Rule, path: str, weights: tuple[str, ...]) -> bool:
    if isinstance(rule, S2FT):
        return rule.structure != "attention" and rule.matches(path, *weights)
    return rule.matches(*weights)


__all__ = ["write_out_experts"]
