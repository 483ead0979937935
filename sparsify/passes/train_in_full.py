"""What `Plan(train=…)` names: parameters that train as they are, beside what rules train in part.

"lm_head"            ──▶  lm_head.weight, and what is tied to it
"*.norm"             ──▶  every parameter of every module that matches
"*.bias"             ──▶  every bias (BitFit), also of linears whose outputs S2FT reorders: files hold it in the model's own order
(a rule's weight)    ──▶  PlanError
"""

from __future__ import annotations

from sparsify.errors import PlanError
from sparsify.plan import nearest
from sparsify.plan.name_patterns import matches
from sparsify.program import Program


def module_prefixes(name: str) -> list[str]:
    """Names of the modules that hold a parameter, outermost first: `a.b.weight` → `a`, `a.b`."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def trained_in_full(program: Program, patterns: tuple[str, ...]) -> set[str]:
    """Parameters that `Plan(train=…)` names, by parameter or module pattern, under their first names.

    A tied parameter is found under each of its names (`lm_head` of a model that shares it with its embedding) and trains as one.
    A name without wildcards is that parameter or module; where there is none, everything whose name ends in it after a dot.
    """
    trainable = {n for n, _ in program.host.named_parameters() if program.tensor(n).is_floating_point()}
    names = {n: k for n, k in program.aliases.items() if k in trainable}
    found: set[str] = set()
    for pattern in patterns:
        if not pattern:
            raise PlanError("Plan(train=['']): an empty pattern matches nothing; use '*' for everything")
        hits = {k for n, k in names.items() if pattern in (n, *module_prefixes(n))}
        hits |= {k for n, k in names.items() if not hits and any(matches(pattern, p) for p in (n, *module_prefixes(n)))}
        if not hits:
            modules = {p for n in names for p in module_prefixes(n)}
            raise PlanError(
                f"Plan(train=[{pattern!r}]) matches no parameter or module{nearest(pattern, sorted(modules | set(names)))}"
            )
        found |= hits
    clash = found & ({part.param for part in program.parts} | set(program.quantize))
    if clash:
        raise PlanError(
            f"Plan(train=…) names {sorted(clash)[0]}, which a rule packs or trains in part; name one or the other"
        )
    return found


__all__ = ["module_prefixes", "trained_in_full"]
