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
from sparsify.program.graph_editor import GraphEditor


def rewrite(
    program: Program, modules: Mapping[str, nn.Module], fusions: Sequence[Fusion], texts: Mapping[str, str]
) -> Program:
    """The program with a node for every `KernelModule` of `modules` (qualified name → module) that its graph reaches, and with that
    module's tensors. texts: module name → what is printed beside its node."""
    editor = GraphEditor(program)
    tensors: dict[str, torch.Tensor] = {}

    def put(node: fx.Node, name: str, module: KernelModule, x: fx.Node, text: str) -> None:
        """The call that `module` is, in the place of `node`; `text` is printed beside it."""

        def tensor(leaf: str) -> fx.Node:
            tensors[f"{name}.{leaf}"] = held = getattr(module, leaf)
            return editor.buffer_input(f"{name}.{leaf}", held)

        old = editor.copied(node)
        new = editor.call(module.operator, old, x=x, **module.arguments(tensor))
        new.meta = {**old.meta, "kernel": text}
        editor.redirect(old, new)

    for fusion in fusions:
        if isinstance(fusion.found, FusedActivation):
            editor.redirect(fusion.found.result, fusion.found.source)
    inputs_of: dict[str, fx.Node] = {}
    for linear in list(program.linears()):
        name = module_of(linear.weight)
        inputs_of[name], module = linear.x, modules.get(name)
        if isinstance(module, KernelModule):
            put(linear.node, name, module, linear.x, texts.get(name, ""))
    for fusion in fusions:
        module = modules[fusion.module]
        if isinstance(fusion.found, GatedProduct) and isinstance(module, KernelModule):
            x, text = inputs_of[fusion.found.gate], str(fusion).partition(": ")[2]
            put(fusion.found.product, fusion.module, module, x, text)
    erase_dead(editor.graph, editor.table)
    graph_module, inputs = editor.finish()
    return replace(program, graph_module=graph_module, inputs=inputs, tensors={**program.tensors, **tensors})


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
