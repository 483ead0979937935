"""Calls of operators with their arguments by name, as the operator's schema has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from sparsify.errors import VerifyError


def positional(operator: OpOverload, named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments in the schema's order; those that are not named are None or their default. Raises VerifyError for a name it has not."""
    known = {argument.name for argument in operator._schema.arguments}
    unknown = sorted(set(named) - known)
    if unknown:
        raise VerifyError(f"{operator} has no argument {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return tuple(named.get(argument.name, argument.default_value) for argument in operator._schema.arguments)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, defaults filled in. Raises VerifyError, naming node and argument, where they break the schema."""
    operator = node.target
    assert isinstance(operator, OpOverload)
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


def fits(value: Any, kind: Any) -> bool:
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


__all__ = ["arguments_of", "positional"]
