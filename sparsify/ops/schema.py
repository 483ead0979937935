"""Arguments of operators by the names of their schemas: how nodes of a graph are read and made.

    arguments(node)["weight"]                                  whatever position it stands at, defaults filled
    positional(op, {"x": x, "weight": w, "bias": None, …})     the `(args, kwargs)` of a call

The order of an operator's arguments is the schema's business alone, so that an operator may gain one without breaking a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from sparsify.errors import VerifyError


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


def positional(op: Any, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of a call of `op` with arguments by name; what is left out takes its default.

    Defaults at the end are not written out. Raises VerifyError for an unknown name, and for a missing argument without a default.
    """
    schema = op._schema
    known = {a.name: a for a in schema.arguments}
    for name in given:
        if name not in known:
            raise VerifyError(f"{op} has no argument {name!r} (it has {', '.join(known)})")
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
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


__all__ = ["argument", "arguments", "positional"]
