"""Rewrite the program's graph to what the lowered host computes: one node per kernel, reading the packed tensors.

%y = aten.linear(%x, @q_proj.weight, @q_proj.bias)
──▶
%y = sparsify.packed_linear(%x, @q_proj.masks, @q_proj.values, @q_proj.panel_ptr, …)      # 16 tok stream 40 us (…)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from sparsify.lowering.fuse_cpu import Fusion
from sparsify.lowering.fuse_linears import FusedActivation, GatedProduct, module_of
from sparsify.lowering.prepacked_linear import PrepackedLinear
from sparsify.lowering.sparse_linear import SparseLinear
from sparsify.names import placeholder
from sparsify.passes.insert_partial import copied_inputs, fake_like
from sparsify.program import Input, Program

PACKED_TENSORS = ("masks", "values", "panel_ptr", "scales", "row_sums", "bias")


def rewrite(program: Program, host: nn.Module, fusions: Sequence[Fusion], kernels: Mapping[str, str]) -> None:
    """Give `program` a graph and inputs that read `host`'s packed tensors; `kernels`: module name → text for its node."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    inputs = copied_inputs(program, mapping)
    take = tensor_inputs(program, host, graph, inputs)
    fused = {f.module: f for f in fusions if not f.why}
    gates: dict[str, Any] = {}
    for linear in list(program.linears()):
        name, node = module_of(linear.weight), mapping[linear.node]
        gates[name] = node
        module = host.get_submodule(name)
        x: Any = node.args[1] if node.target is torch.ops.aten.addmm.default else node.args[0]
        arguments = None
        if isinstance(module, SparseLinear):
            if name in fused and isinstance(found := fused[name].found, FusedActivation):
                mapping[found.result].replace_all_uses_with(mapping[found.source])
            arguments = packed_arguments(name, module, x, take)
            operator = torch.ops.sparsify.packed_linear.default
        elif isinstance(module, PrepackedLinear):
            bias = take(f"{name}.bias") if module.bias is not None else None
            arguments = (x, bias, module.out_features, module.handle)
            operator = torch.ops.sparsify.prepacked_linear.default
        if arguments is not None:
            replace_node(graph, node, operator, arguments, kernels.get(name, ""))
    for fusion in fused.values():
        if isinstance(fusion.found, GatedProduct):
            module = host.get_submodule(fusion.module)
            assert isinstance(module, SparseLinear)
            x = gates[fusion.found.gate].args[0]
            arguments = packed_arguments(fusion.module, module, x, take)
            text = str(fusion).partition(": ")[2]
            replace_node(
                graph, mapping[fusion.found.product], torch.ops.sparsify.packed_linear.default, arguments, text
            )
    erase_dead(graph, inputs)
    module = fx.GraphModule(program.graph_module, graph)
    module.meta = dict(program.graph_module.meta)
    program.graph_module, program.inputs = module, tuple(inputs)


def tensor_inputs(program: Program, host: nn.Module, graph: fx.Graph, inputs: list[Input]) -> Callable[[str], fx.Node]:
    """A function from the qualified name of a tensor of `host` to its placeholder, made when it is first asked for."""
    added: dict[str, fx.Node] = {}
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]

    def take(name: str) -> fx.Node:
        nonlocal last
        if name not in added:
            with graph.inserting_after(last):
                last = placeholder(graph, f"b_{name}")
            last.meta["val"] = fake_like(program, getattr(host.get_submodule(module_of(name)), name.rpartition(".")[2]))
            inputs.append(Input(last.name, "buffer", name))
            added[name] = last
        return added[name]

    return take


def packed_arguments(name: str, module: SparseLinear, x: fx.Node, take: Callable[[str], fx.Node]) -> tuple[Any, ...]:
    """Arguments of `sparsify::packed_linear` for one module over node `x`."""
    tensors = [take(f"{name}.{leaf}") if getattr(module, leaf) is not None else None for leaf in PACKED_TENSORS]
    sizes = (module.packed.rows, module.packed.cols, module.packed.group)
    return (x, *tensors, None, *sizes, module.activation, module.gated, module.int8)


def replace_node(graph: fx.Graph, node: fx.Node, operator: Any, arguments: tuple[Any, ...], kernel: str) -> None:
    """Put a call of `operator` in the place of `node`; `kernel` is printed beside it."""
    with graph.inserting_before(node):
        new = graph.call_function(operator, arguments)
    new.meta = {**node.meta, "kernel": kernel}
    node.replace_all_uses_with(new)


def erase_dead(graph: fx.Graph, inputs: list[Input]) -> None:
    """Remove operations that nobody reads any more, then the tensors that nobody reads any more."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)
    unread = {n.name: n for n in graph.nodes if n.op == "placeholder" and not n.users}
    for entry in [i for i in inputs if i.kind == "parameter" and i.name in unread]:
        graph.erase_node(unread[entry.name])
        inputs.remove(entry)
