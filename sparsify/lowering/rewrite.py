"""Rewrite the program's graph to what modules of a target compute: one node per kernel, reading the packed tensors.

%y = aten.linear(%x, @q_proj.weight, @q_proj.bias)
──▶
%y = sparsify.packed_linear(%x, @q_proj.masks, @q_proj.values, @q_proj.panel_ptr, …)      # 16 tok stream 40 us (…)

The operator and its arguments are what the module says of itself (`KernelModule`); nothing here knows a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from sparsify.lowering.fuse_linears import CHECKS, FusedActivation, GatedProduct, module_of
from sparsify.lowering.target import Fusion
from sparsify.modules.kernel_module import KernelModule
from sparsify.program import Input, Program
from sparsify.program.graph_editor import GraphEditor, call_text


def rewrite(
    program: Program, modules: Mapping[str, nn.Module], fusions: Sequence[Fusion], texts: Mapping[str, str]
) -> Program:
    """The program with a node for every `KernelModule` of `modules` (qualified name → module) that its graph reaches, and with that
    module's tensors. texts: module name → what is printed beside its node."""
    editor = GraphEditor(program)
    tensors: dict[str, torch.Tensor] = {}

    names = program.tensor_names
    absorbed = {f.found.linear: f.found for f in fusions if isinstance(f.found, FusedActivation)}

    def put(node: fx.Node, name: str, module: KernelModule, x: fx.Node, text: str, was: Sequence[fx.Node]) -> None:
        """The call that `module` is, in the place of `node`; `text` is printed beside it. was: all operations that it computes."""

        def tensor(leaf: str) -> fx.Node:
            tensors[f"{name}.{leaf}"] = held = getattr(module, leaf)
            return editor.buffer_input(f"{name}.{leaf}", held)

        old = editor.copied(node)
        new = editor.call(module.operator, old, x=x, **module.arguments(tensor))
        new.meta = {**old.meta, "kernel": text, "was": tuple(call_text(n, names) for n in was)}
        editor.redirect(old, new)

    for fusion in fusions:
        if isinstance(fusion.found, FusedActivation):
            editor.redirect(fusion.found.result, fusion.found.source)
    inputs_of: dict[str, fx.Node] = {}
    for linear in list(program.linears()):
        name = module_of(linear.weight)
        inputs_of[name], module = linear.x, modules.get(name)
        if isinstance(module, KernelModule):
            more = absorbed.get(name)
            was = [linear.node, *(between(more.source, more.result) if more is not None else ())]
            put(linear.node, name, module, linear.x, texts.get(name, ""), was)
    for fusion in fusions:
        module = modules[fusion.module]
        if isinstance(fusion.found, GatedProduct) and isinstance(module, KernelModule):
            x, text = inputs_of[fusion.found.gate], str(fusion).partition(": ")[2]
            put(fusion.found.product, fusion.module, module, x, text, between(x, fusion.found.product))
    erase_dead(editor.graph, editor.table)
    graph_module, inputs = editor.finish()
    return replace(program, graph_module=graph_module, inputs=inputs, tensors={**program.tensors, **tensors})


def between(source: fx.Node, result: fx.Node) -> list[fx.Node]:
    """Operations that `result` needs of what comes behind `source`, itself too, in the order of the graph."""
    found: set[fx.Node] = set()
    waiting = [result]
    while waiting:
        node = waiting.pop()
        if node is not source and node.op == "call_function" and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return [node for node in result.graph.nodes if node in found]


def erase_dead(graph: fx.Graph, inputs: list[Input]) -> None:
    """Remove operations that nobody reads any more, and assertions about them, then the tensors that nobody reads any more."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not set(node.users) - set(assertions(node)) and not node.is_impure():
            for user in assertions(node):
                graph.erase_node(user)
            graph.erase_node(node)
    unread = {n.name: n for n in graph.nodes if n.op == "placeholder" and not n.users}
    for entry in [i for i in inputs if i.kind == "parameter" and i.name in unread]:
        graph.erase_node(unread[entry.name])
        inputs.remove(entry)


def assertions(node: fx.Node) -> list[fx.Node]:
    """Users of a node that compute nothing from it."""
    return [user for user in node.users if not user.users and any(word in str(user.target) for word in CHECKS)]


__all__ = ["rewrite"]
