"""Methods from outside the package: a rule for plans, a part for programs, kinds of changes for files.

    sparsify.methods.register(MyRule, part=MyPart, deltas=[DeltaKind(name="mine", …)])

From then on `Plan([MyRule(…)])` compiles, prints, reports, saves, loads, mixes, merges and exports like the four methods of the
package. An installed distribution registers itself where its rule or kind is first met, through an entry point:

    [project.entry-points."sparsify.methods"]
    MyRule = "my_package.my_method"          one for the rule's name, and one for each kind's name
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass

from sparsify.adapters import delta_kinds
from sparsify.adapters.adapter import KINDS
from sparsify.adapters.delta_kinds import DeltaKind
from sparsify.errors import PlanError
from sparsify.methods.part import OutsidePart
from sparsify.modules.adapted import KINDS as MODULES
from sparsify.modules.adapted import AdaptedMixin, carries
from sparsify.plan import RULES, LinearRule, Rule, register_rule


@dataclass(frozen=True)
class Method:
    """What `register` was given."""

    rule: type[LinearRule]
    part: type[OutsidePart]
    deltas: tuple[DeltaKind, ...]


METHODS: dict[type[Rule], Method] = {}


def register(rule: type[LinearRule], *, part: type[OutsidePart], deltas: Iterable[DeltaKind]) -> Method:
    """Make a method known to plans, programs and files.

    rule: a frozen dataclass of `LinearRule`; `match` and `exclude` select the linears that it serves. part: how one of them trains.
    deltas: what adapter files hold of it, which no other method's kinds may be called.

    The same method may be registered again (its module was imported twice). Raises PlanError for what is not complete, and for a
    name that is taken.
    """
    known = tuple(deltas)
    method = Method(rule, part, known)
    if not (isinstance(rule, type) and issubclass(rule, LinearRule) and is_dataclass(rule)):
        raise PlanError(f"register: {rule!r} is no dataclass of LinearRule")
    if not (isinstance(part, type) and issubclass(part, OutsidePart)) or inspect.isabstract(part):
        missing = ", ".join(sorted(getattr(part, "__abstractmethods__", ())))
        raise PlanError(f"register: {part!r} is no complete OutsidePart{f'; it lacks {missing}' if missing else ''}")
    for name, kind in (("mixin", type), ("module_kind", str), ("operators", dict)):
        if not isinstance(getattr(part, name, None), kind):
            raise PlanError(f"register: {part.__name__}.{name} is missing")
    if not issubclass(part.mixin, AdaptedMixin) or not part.mixin.trained_leaves:
        raise PlanError(f"register: {part.__name__}.mixin must be an AdaptedMixin that names its trained_leaves")
    wrong = next((op for op in part.operators if not hasattr(op, "_schema")), None)
    if wrong is not None or not part.operators:
        raise PlanError(f"register: {part.__name__}.operators must map overloads of operators to words, got {wrong}")
    check_free(rule.__name__, RULES.get(rule.__name__), rule, "a rule")
    check_free(part.module_kind, MODULES.get(part.module_kind, (None,))[0], part.mixin, "a kind of module")
    for kind in known:
        own = {k.name for m in METHODS.values() if same(m.rule, rule) for k in m.deltas}
        if kind.name in KINDS or (kind.name in delta_kinds.REGISTERED and kind.name not in own):
            raise PlanError(f"register: a kind of changes is called {kind.name!r} already")
    for old in [r for r in METHODS if same(r, rule)]:
        del METHODS[old]
    METHODS[rule] = method
    register_rule(rule)
    carries(part.module_kind, part.mixin)
    delta_kinds.REGISTERED.update({kind.name: kind for kind in known})
    return method


def same(a: type, b: type) -> bool:
    """Whether two classes come from the same line of a module, which may have been imported twice."""
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def check_free(name: str, taken: type | None, new: type, what: str) -> None:
    if taken is not None and not same(taken, new):
        raise PlanError(f"register: {what} is called {name!r} already ({taken.__module__}.{taken.__qualname__})")


def method_of(rule: Rule) -> Method | None:
    """The method of a rule; None for the package's own."""
    return METHODS.get(type(rule))


__all__ = ["METHODS", "Method", "method_of", "register"]
