"""The one way in which a pass changes a program's graph: on a copy, with arguments by the names of operators' schemas.

    editor = GraphEditor(program)                          a copy of the graph; the program stays as it is
    a = editor.tensor_input("up.lora_A", value)            a new input, tied to a qualified name (the same one when asked again)
    editor.replace(node, torch.ops.sparsify.…, x=…, a=a)   another operator in a node's place
    graph_module, inputs = editor.finish()                 for `program.evolve(…)`

Nodes of the program stand for their copies in every argument, so a pass may mix what it read there with what it adds here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from sparsify.errors import VerifyError
from sparsify.ops.schema import argument, arguments, positional
from sparsify.program import Input, LinearNode, Program, through_transpose
from sparsify.program.names import placeholder
from sparsify.program.printer import operation_text

A = TypeVar("A", bound=Argument)


@dataclass(frozen=True)
class LinearArguments:
    """What a matrix product reads, in the copied graph. weight: the stored weight's input, under any transpose."""

    x: Argument
    weight: fx.Node
    bias: fx.Node | None


class GraphEditor:
    """A copy of a program's graph under change, and the table of its inputs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(program.graph, self.copies))
        self.table = copied_inputs(program, self.copies)
        nodes = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        self.sources = {i.target: nodes[i.name] for i in self.table if i.target is not None}
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._last = next(reversed(nodes.values()), None)

    # --- inputs ------------------------------------------------------------------------------------------------------------

    def input(self, target: str) -> fx.Node:
        """The input that stands for the tensor `target`. Raises VerifyError when the graph has none."""
        found = self.sources.get(self.program.aliases.get(target, target)) or self.sources.get(target)
        if found is None:
            raise VerifyError(f"the graph has no input for {target}")
        return found

    def tensor_input(self, target: str, value: torch.Tensor) -> fx.Node:
        """An input for the tensor `target`, added behind the others unless it is there."""
        if target in self.sources:
            return self.sources[target]
        with self.graph.inserting_after(self._last) if self._last else self.graph.inserting_before():
            node = placeholder(self.graph, f"p_{target}")
        node.meta["val"] = fake_like(self.program, value)
        self.table.append(Input(node.name, "parameter" if value.is_floating_point() else "buffer", target))
        self.sources[target] = self._last = node
        return node

    def buffer_input(self, target: str, value: torch.Tensor) -> fx.Node:
        """The input for `target`, which is a buffer that holds `value` from now on, whatever it was."""
        node = self.tensor_input(target, value)
        node.meta["val"] = fake_like(self.program, value)
        self.table = [replace(i, kind="buffer") if i.name == node.name else i for i in self.table]
        return node

    def beside(self, param: str, leaf: str) -> fx.Node | None:
        """The input for a tensor of the program that lies beside a weight, by leaf; None where it has no such tensor."""
        owner = param.rpartition(".")[0]
        name = f"{owner}.{leaf}" if owner else leaf
        tensors = self.program.tensors
        return self.tensor_input(name, tensors[name]) if name in tensors else None

    def drop_input(self, target: str) -> None:
        """Take out an input that no operator reads any more. Raises VerifyError while one does."""
        node = self.sources.pop(target)
        for user in list(node.users):
            self.erase_unread(user)
        if node.users:
            raise VerifyError(f"{target} is packed, but node {next(iter(node.users)).name} still reads it whole")
        self.table = [i for i in self.table if i.name != node.name]
        if self._last is node:
            self._last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder" and n is not node), None)
        self.graph.erase_node(node)

    def named(self) -> dict[str, str]:
        """Placeholder name → qualified name, as they are now."""
        return {node.name: target for target, node in self.sources.items()}

    # --- nodes -------------------------------------------------------------------------------------------------------------

    def nodes(self, *targets: object) -> Iterator[fx.Node]:
        """Calls of any of these operators, in order."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in targets:
                yield node

    def read(self, linear: LinearNode) -> LinearArguments:
        """What a matrix product of the program reads."""
        weight = self.input(linear.weight)
        return LinearArguments(self.copied(linear.x), weight, self.copied(linear.bias_node))

    def call(self, op: OpOverload, before: fx.Node, like: fx.Node | None = None, /, **given: Argument) -> fx.Node:
        """A call of `op` with arguments by name, before a node; with the fake value of the node `like`."""
        args, kwargs = positional(op, {name: self.copied(value) for name, value in given.items()})
        with self.graph.inserting_before(self.copied(before)):
            node = self.graph.call_function(op, args, kwargs)
        if like is not None:
            node.meta["val"] = like.meta["val"]
        return node

    def replace(self, node: fx.Node, op: OpOverload, /, **given: Argument) -> fx.Node:
        """Let `op`, with arguments by name, compute what `node` does; views that only `node` read go with it.

        What stood there is kept as text, `meta["was"]`, for people who compare.
        """
        old = self.copied(node)
        new = self.call(op, old, **given)
        new.meta = {"was": (call_text(old, self.named()),), **old.meta}
        self.redirect(old, new)
        sources = old.all_input_nodes
        self.graph.erase_node(old)
        for source in sources:
            self.erase_unread(source)
        return new

    def redirect(self, node: fx.Node, to: fx.Node) -> None:
        """Let what reads `node`, and what is added later and would, read `to`; the node itself stays, perhaps unread."""
        old, new = self.copied(node), self.copied(to)
        old.replace_all_uses_with(new)
        self._replaced[old] = new

    def change(self, node: fx.Node, /, **given: Argument) -> None:
        """Other values for some arguments of a node."""
        node = self.copied(node)
        changed = arguments(node) | given  # raises for a node whose target has no schema
        assert isinstance(node.target, OpOverload)
        node.args, node.kwargs = positional(node.target, changed)

    def erase_unread(self, node: fx.Node) -> None:
        """Take out a transpose, or a chain of them, that nobody reads."""
        while not node.users and through_transpose(node)[0] is not node:
            above = node.all_input_nodes[0]
            self.graph.erase_node(node)
            node = above

    def copied(self, value: A) -> A:
        """`value` with nodes of the program replaced by their copies, and these by what stands in their place now."""

        def current(node: fx.Node) -> fx.Node:
            node = self.copies.get(node, node)
            while node in self._replaced:
                node = self._replaced[node]
            return node

        return fx.map_arg(value, current)

    def finish(self) -> tuple[fx.GraphModule, tuple[Input, ...]]:
        """The changed graph and its inputs."""
        graph_module = fx.GraphModule(self.program.graph_module, self.graph)
        graph_module.meta = dict(self.program.graph_module.meta)
        return graph_module, tuple(self.table)


def call_text(node: fx.Node, tensors: dict[str, str]) -> str:
    """`%linear = aten.linear(%x, @q_proj.weight)`."""
    return f"%{node.name} = {operation_text(node, tensors)[1]}"


def copied_inputs(program: Program, copies: dict[fx.Node, fx.Node]) -> list[Input]:
    """The table of inputs of a copied graph: a copy may rename a placeholder that is called like a Python builtin."""
    names = {node.name: copies[node].name for node in program.graph.nodes if node.op == "placeholder"}
    return [replace(i, name=names[i.name]) for i in program.inputs]


def fake_like(program: Program, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that stands for `tensor` in the program's graph."""
    value = next((n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)), None)
    mode = getattr(value, "fake_mode", None)
    return mode.from_tensor(tensor, static_shapes=True) if mode is not None else torch.empty_like(tensor, device="meta")


__all__ = ["GraphEditor", "LinearArguments", "argument", "arguments"]
