"""Rewrite the program's graph to what modules of a target compute: one node per kernel, reading the packed tensors.

%y = aten.linear(%x, @q_proj.weight, @q_proj.bias)
──▶
%y = sparsify.packed_linear(%x, @q_proj.masks, @q_proj.values, @q_proj.panel_ptr, …)      # 16 tok stream 40 us (…)

The operator and its arguments are what the module says of itself (`KernelModule`); nothing here knows a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from sparsify.lowering.fuse_linears import CHECKS, FusedActivation, GatedProduct, module_of
from sparsify.lowering.kernel_module import KernelModule
from sparsify.lowering.operator_nodes import positional
from sparsify.lowering.target import Fusion
from sparsify.names import placeholder
from sparsify.passes.insert_partial import copied_inputs, fake_like
from sparsify.program import Input, Program


def rewrite(
    program: Program, modules: Mapping[str, nn.Module], fusions: Sequence[Fusion], texts: Mapping[str, str]
) -> Program:
    """The program with a node for every `KernelModule` of `modules` (qualified name → module) that its graph reaches, and with that
    module's tensors. texts: module name → what is printed beside its node."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    call = Calls(program, graph, copied_inputs(program, mapping))
    for fusion in fusions:
        if isinstance(fusion.found, FusedActivation):
            mapping[fusion.found.result].replace_all_uses_with(mapping[fusion.found.source])
    inputs_of: dict[str, Any] = {}
    for linear in list(program.linears()):
        name, node = module_of(linear.weight), mapping[linear.node]
        inputs_of[name] = node.args[1] if node.target is torch.ops.aten.addmm.default else node.args[0]
        module = modules.get(name)
        if isinstance(module, KernelModule):
            call.replace(node, name, module, inputs_of[name], texts.get(name, ""))
    for fusion in fusions:
        module = modules[fusion.module]
        if isinstance(fusion.found, GatedProduct) and isinstance(module, KernelModule):
            product, x = mapping[fusion.found.product], inputs_of[fusion.found.gate]
            call.replace(product, fusion.module, module, x, str(fusion).partition(": ")[2])
    erase_dead(graph, call.inputs)
    rewritten = fx.GraphModule(program.graph_module, graph)
    rewritten.meta = dict(program.graph_module.meta)
    tensors = {**program.tensors, **call.tensors}
    return replace(program, graph_module=rewritten, inputs=tuple(call.inputs), tensors=tensors)


class Calls:
    """Nodes of modules in a graph. inputs: the graph's table of inputs, which grows; tensors: what its new entries hold."""

    def __init__(self, program: Program, graph: fx.Graph, inputs: list[Input]) -> None:
        self.program, self.graph, self.inputs = program, graph, inputs
        self.tensors: dict[str, torch.Tensor] = {}
        self.places: dict[str, fx.Node] = {}
        self.last = [n for n in graph.nodes if n.op == "placeholder"][-1]

    def placeholder(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """The input that stands for the tensor of this qualified name, made when it is first asked for."""
        if name not in self.places:
            with self.graph.inserting_after(self.last):
                self.last = placeholder(self.graph, f"b_{name}")
            self.last.meta["val"] = fake_like(self.program, tensor)
            self.inputs.append(Input(self.last.name, "buffer", name))
            self.tensors[name], self.places[name] = tensor, self.last
        return self.places[name]

    def replace(self, node: fx.Node, name: str, module: KernelModule, x: Any, text: str) -> None:
        """Put the call that `module` is in the place of `node`; `text` is printed beside it."""
        named = module.arguments(lambda leaf: self.placeholder(f"{name}.{leaf}", getattr(module, leaf)))
        with self.graph.inserting_before(node):
            new = self.graph.call_function(module.operator, positional(module.operator, {"x": x, **named}))
        new.meta = {**node.meta, "kernel": text}
        node.replace_all_uses_with(new)


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
