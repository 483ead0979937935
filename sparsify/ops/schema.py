"""Arguments of operators by the names of their schemas: how nodes of a graph are read and made.

    arguments(node)["weight"]                                  whatever position it stands at, defaults filled
    checked_arguments(node)                                    the same, once every value is of the type that the schema says
    positional(op, {"x": x, "weight": w, "bias": None, …})     the `(args, kwargs)` of a call

The order of an operator's arguments is the schema's business alone, so that an operator may gain one without breaking a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsify.errors import VerifyError

if TYPE_CHECKING:
    from torch.fx.node import Argument


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a node by name, defaults filled. Raises VerifyError for a node whose target has no schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise VerifyError(f"node {node.name} calls {node.target}, which has no operator schema")
    names = [a.name for a in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def argument(node: fx.Node, name: str) -> Any:
    """One argument of a node. Raises VerifyError for a name that the operator's schema does not have."""
    found = arguments(node)
    if name not in found:
        raise VerifyError(f"node {node.name}: {node.target} has no argument {name!r} (it has {', '.join(found)})")
    return found[name]


def positional(
    op: torch._ops.OpOverload, given: Mapping[str, Argument]
) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
    """`(args, kwargs)` of a call of `op` with arguments by name; what is left out takes its default.

    Defaults at the end are not written out. Raises VerifyError for an unknown name, and for a missing argument without a default.
    """
    schema = op._schema
    known = {a.name: a for a in schema.arguments}
    for name in given:
        if name not in known:
            raise VerifyError(f"{op} has no argument {name!r} (it has {', '.join(known)})")
    args: list[Argument] = []
    kwargs: dict[str, Argument] = {}
    written = 0
    for name, spec in known.items():
        if name not in given and not spec.has_default_value():
            raise VerifyError(f"{op}: the argument {name!r} is missing")
        value = given.get(name, spec.default_value if spec.has_default_value() else None)
        own = not spec.has_default_value() or (name in given and value != spec.default_value)
        if spec.kwarg_only:
            if own:
                kwargs[name] = value
            continue
        args.append(value)
        written = len(args) if own else written
    return tuple(args[:written]), kwargs


def checked_arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, defaults filled in. Raises VerifyError, naming node and argument, where they break the schema."""
    operator = node.target
    assert isinstance(operator, torch._ops.OpOverload)
    schema = operator._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    doubled = given.keys() & node.kwargs.keys()
    unknown = node.kwargs.keys() - {argument.name for argument in schema}
    if len(node.args) > len(schema) or unknown or doubled:
        wrong = sorted(unknown | doubled) or [f"number {len(schema) + 1}"]
        raise VerifyError(f"node {node.name}: {operator} takes no argument {wrong[0]} there")
    given |= node.kwargs
    found = {}
    for argument in schema:
        if argument.name not in given and not argument.has_default_value():
            raise VerifyError(f"node {node.name}: {operator} needs the argument {argument.name}")
        value = given.get(argument.name, argument.default_value)
        if not fits(value, argument.type):
            said = f"%{value.name}" if isinstance(value, fx.Node) else repr(value)
            raise VerifyError(f"node {node.name}: the argument {argument.name} is {said}, expected {argument.type}")
        found[argument.name] = value
    return found


def fits(value: object, kind: torch.JitType) -> bool:
    """Whether a value of a node can stand for an argument of a schema's type."""
    if isinstance(kind, torch.OptionalType):
        return value is None or fits(value, kind.getElementType())
    if isinstance(kind, torch.ListType):
        return isinstance(value, list | tuple) and all(fits(v, kind.getElementType()) for v in value)
    if isinstance(kind, torch.TensorType):
        return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor | None)
    if isinstance(value, fx.Node):  # a size that the graph computes
        return not isinstance(value.meta.get("val"), torch.Tensor)
    if isinstance(kind, torch.BoolType):
        return isinstance(value, bool)
    if isinstance(kind, torch.IntType):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(kind, torch.FloatType):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) if isinstance(kind, torch.StringType) else True


__all__ = ["argument", "arguments", "checked_arguments", "positional"]
