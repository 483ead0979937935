"""The loss of a language model in chunks: a pass over Dynamo's graph, before autograd sees it.

    y = linear(x, W)          y = y / 30 · tanh …  y.float()          y[:, :-1].view(-1, v)          cross_entropy(y, labels)
         head ───────────────── scalings, a soft cap, casts ──────────── rows chosen or joined ──────────── loss
    ──▶  chunked_loss(x[:, :-1].reshape(-1, k), W, labels)            at most `chunk` rows of logits exist at a time

What chooses or joins rows moves from the logits to the head's inputs, one for one. Nothing is touched in evaluation (no gradient is
recorded), where the logits themselves are wanted. Where a loss keeps its logits, a warning says why.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.nn import functional as F

from sparsify.errors import RefusedError

LINEAR = frozenset({F.linear})
TANH = frozenset({torch.tanh, "tanh"})
TIMES = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})
OVER = frozenset({operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"})
CASTS = frozenset({"float", "double", "half", "bfloat16", "to", "type", "type_as"})
JOINS = frozenset({"view", "reshape", "flatten", torch.reshape, torch.flatten})
SAME = frozenset({"contiguous", "clone", torch.clone})
TURNS = frozenset({"transpose", "movedim", "permute", torch.transpose, torch.permute, torch.movedim})
Returned = Literal["keep", "nan"]


@dataclass
class Path:
    """What lies between a head and its loss. steps: the nodes from the head's result to the loss's input, in order.

    logits = factor · y, or cap · tanh(factor · y) where cap is not 0.
    """

    head: fx.Node
    steps: list[fx.Node]
    factor: float = 1.0
    cap: float = 0.0
    rows: list[fx.Node] = field(default_factory=list)


def value(node: object) -> torch.Tensor:
    """The fake tensor that Dynamo left at a node. Raises RefusedError for what is no tensor there."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(found, torch.Tensor):
        raise RefusedError("a step between the head and the loss works on something that is no tensor")
    if type(found) not in (torch.Tensor, torch.nn.Parameter) and not isinstance(found, torch._subclasses.FakeTensor):
        raise RefusedError(f"the head or its input is a {type(found).__name__}, sharded or packed")
    return found


def find_path(loss: fx.Node) -> Path:
    """From a loss up to its head. Raises RefusedError, with the reason, where something else stands between."""
    node, steps = given_to(loss)["input"], []
    while node is not None and node.target not in LINEAR:
        steps.append(node)
        node = next((a for a in node.args if isinstance(a, fx.Node)), None)
    if node is None:
        raise RefusedError("the logits are not the product of a plain linear layer in the same graph")
    path = Path(node, [node, *reversed(steps)])
    classes = value(node).shape[-1]
    for step in path.steps[1:]:
        follow(path, step, classes, step is path.steps[-1])
    if value(path.steps[-1]).dim() != 2 and not turns(path.steps[-1]):
        raise RefusedError("the classes are not the last dimension of the logits")
    return path


def turns(step: fx.Node) -> bool:
    """Whether a step brings the classes of logits (batch, tokens, classes) to where `cross_entropy` looks for them, the second place."""
    if step.target not in TURNS or value(step).dim() != 3:
        return False
    given = list(step.args[1:]) + list(step.kwargs.values())
    given = list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else given
    places = [d % 3 for d in given if isinstance(d, int)]
    if step.target in ("permute", torch.permute):
        return places == [0, 2, 1]
    return sorted(places) == [1, 2] and len(given) == 2


def follow(path: Path, step: fx.Node, classes: int | torch.SymInt, last: bool) -> None:
    """Note what a step does to the logits. Raises RefusedError for a step that does something else."""
    made, target = value(step), step.target
    if target in TIMES or target in OVER:
        number = next((a for a in step.args if isinstance(a, int | float) and not isinstance(a, bool)), None)
        if number is None or (target in OVER and step.args[0] is number) or step.kwargs:
            raise RefusedError(f"the logits go through {step.name}, whose other operand is no number")
        if not number:
            raise RefusedError(f"the logits go through {step.name}, after which nothing is left of them")
        factor = 1 / number if target in OVER else float(number)
        if path.cap:
            path.cap *= factor
        else:
            path.factor *= factor
    elif target in TANH and not path.cap:
        path.cap = 1.0
    elif target in CASTS:
        if not made.is_floating_point() or made.device != value(path.head).device:
            raise RefusedError(f"{step.name} moves the logits, or makes them no floating-point numbers")
    elif target in SAME:
        pass
    elif (target is operator.getitem and keeps_classes(step)) or (
        target in JOINS and made.dim() == 2 and same(made.shape[-1], classes)
    ):
        path.rows.append(step)
    elif last and turns(step):
        pass
    else:
        raise RefusedError(
            f"the logits go through {step.name} ({target}), which is neither a scaling nor a choice of rows"
        )


def same(size: object, other: object) -> bool:
    return isinstance(size, int) and isinstance(other, int) and size == other


def keeps_classes(step: fx.Node) -> bool:
    """Whether an index chooses among rows only."""
    index = step.args[1]
    dims = value(step.args[0]).dim()
    parts = index if isinstance(index, tuple | list) else (index,)
    whole, taken, after = slice(None), 0, None
    for place, part in enumerate(parts):
        if part is Ellipsis:
            after = len(parts) - place - 1
        elif isinstance(part, fx.Node):
            taken += value(part).dim() if value(part).dtype == torch.bool else 1
        elif isinstance(part, int | slice) and not isinstance(part, bool):
            taken += 1
        else:
            return False
    if after is not None:
        return after == 0 or parts[-1] == whole
    return taken < dims or parts[-1] == whole


def given_to(loss: fx.Node) -> dict[str, Any]:
    """The arguments of `cross_entropy` by name, its defaults where none is given."""
    bound = inspect.signature(F.cross_entropy).bind(*loss.args, **loss.kwargs)
    bound.apply_defaults()
    return bound.arguments


def check_loss(loss: fx.Node) -> None:
    """Raises RefusedError where a loss is more than the mean or the sum of `−log softmax` over classes by number."""
    given = given_to(loss)
    for name, default in (("weight", None), ("size_average", None), ("reduce", None), ("label_smoothing", 0.0)):
        if given[name] != default:
            raise RefusedError(f"{name} of cross_entropy is not computed in chunks")
    if given["reduction"] not in ("mean", "sum"):
        raise RefusedError(f"reduction={given['reduction']!r} is not computed in chunks")
    if not isinstance(given["ignore_index"], int):
        raise RefusedError("ignore_index is computed in the graph")
    for name in ("input", "target"):
        if not isinstance(given[name], fx.Node):
            raise RefusedError(f"its {name} is no tensor of the graph")
    if value(given["target"]).dtype != torch.int64:
        raise RefusedError("its targets are probabilities, not numbers of classes")


def check_readers(path: Path, loss: fx.Node, returned: Returned) -> list[fx.Node]:
    """Steps that the graph returns. Raises RefusedError where somebody else reads the logits."""
    along, given_back = {*path.steps, loss}, []
    for step in path.steps:
        for user in step.users:
            if user in along:
                continue
            if user.op != "output":
                raise RefusedError(f"the logits are also read by {user.name}")
            if returned == "keep":
                raise RefusedError(
                    "the graph returns the logits beside the loss: compile a function that returns the loss alone, or say "
                    "returned_logits='nan', and what is returned in their place is NaN"
                )
            given_back.append(step)
    return given_back


def move_rows(graph: fx.Graph, path: Path) -> dict[fx.Node, fx.Node]:
    """What each step's rows are of the head's input: the steps that choose or join rows, done there."""
    x: Any = path.head.args[0]
    width = value(x).shape[-1]
    at = {path.head: x}
    for step in path.steps[1:]:
        if step in path.rows and step.target is operator.getitem:
            x = graph.call_function(operator.getitem, (x, step.args[1]))
        elif step in path.rows and step.target in JOINS:
            x = graph.call_method("reshape", (x, -1, width))
        at[step] = x
    return at


def rewrite(graph: fx.Graph, loss: fx.Node, path: Path, chunk: int, returned: list[fx.Node]) -> None:
    head, made = path.head, value(loss)
    x, weight = head.args[:2]
    bias = head.args[2] if len(head.args) > 2 else head.kwargs.get("bias")
    given = given_to(loss)
    ignore = given["ignore_index"]
    needs = value(x).requires_grad, any(value(t).requires_grad for t in (weight, bias) if isinstance(t, fx.Node))
    with graph.inserting_before(loss):
        at = move_rows(graph, path)
        rows = graph.call_method("reshape", (at[path.steps[-1]], -1, value(x).shape[-1]))
        target = graph.call_method("reshape", (given["target"], -1))
        numbers = (path.factor, path.cap, ignore, chunk, *needs)
        call = graph.call_function(torch.ops.sparsify.chunked_loss.default, (rows, weight, bias, target, *numbers))
        total = graph.call_function(operator.getitem, (call, 0))
        if given["reduction"] == "mean":
            counted = graph.call_function(torch.ne, (target, ignore))
            total = graph.call_function(torch.div, (total, graph.call_function(torch.sum, (counted,))))
        total = graph.call_method("to", (total, made.dtype))
        total.meta["example_value"] = made
        loss.replace_all_uses_with(total)
        for step in returned:
            give_nan(graph, step, at[step], classes=value(head).shape[-1])
    for node in (loss, *reversed(path.steps)):
        if not node.users:
            graph.erase_node(node)


def give_nan(graph: fx.Graph, step: fx.Node, rows: fx.Node, classes: int | torch.SymInt) -> None:
    """Return NaN of the logits' shape, which takes no memory, in their place."""
    made = value(step)
    sizes = [graph.call_method("size", (rows, i)) for i in range(value(step).dim() - 1)]
    nan = graph.call_function(torch.full, ((), float("nan")), {"dtype": made.dtype, "device": made.device})
    nan = graph.call_method("expand", (nan, *sizes, classes))
    nan.meta["example_value"] = made
    step.replace_all_uses_with(nan, delete_user_cb=lambda user: user.op == "output")


def chunk_losses(gm: fx.GraphModule, chunk: int, returned: Returned) -> int:
    """Compute each loss of a head in chunks of so many tokens, where that is the same; returns how many were. In place."""
    if not torch.is_grad_enabled():
        return 0
    done = 0
    for loss in [n for n in gm.graph.nodes if n.target is F.cross_entropy]:
        try:
            check_loss(loss)
            if not value(loss).requires_grad:
                continue
            path = find_path(loss)
            given_back = check_readers(path, loss, returned)
        except RefusedError as why:
            warnings.warn(f"loss_chunk={chunk}: the loss {loss.name} keeps its logits: {why}", stacklevel=2)
            continue
        rewrite(gm.graph, loss, path, chunk, given_back)
        done += 1
    if done:
        gm.graph.lint()
        gm.recompile()
    return done


__all__ = ["chunk_losses"]
