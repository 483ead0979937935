"""Rewrite the program's graph to what the lowered host computes: one node per packed linear, reading the packed tensors.

%y = aten.linear(%x, @o_proj.weight, @o_proj.bias)
──▶
%y = sparsify.gpu_linear(%x, @o_proj.bias, None, 'gaps', 4096, 4096, False, 'none', [@o_proj.values, @o_proj.meta, …])

%q = aten.linear(%x, …)                  %qkv = sparsify.gpu_linear(%x, …)
%k = aten.linear(%x, …)          ──▶     %q = aten.slice(%qkv, -1, 0, 4096)
%v = aten.linear(%x, …)                  …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from sparsify.lowering.fuse_cuda import GpuActivation, GpuFusion
from sparsify.lowering.fuse_linears import module_of
from sparsify.lowering.gpu_linear import GpuSparseLinear
from sparsify.lowering.rewrite_cpu import erase_dead, replace_node, tensor_inputs
from sparsify.lowering.share_cuda import GpuSharing, SharedGpuLinear
from sparsify.passes.insert_partial import copied_inputs
from sparsify.program import Program

GPU_LINEAR = torch.ops.sparsify.gpu_linear.default


def rewrite(
    program: Program,
    host: nn.Module,
    fusions: Sequence[GpuFusion | GpuActivation | GpuSharing],
    kernels: Mapping[str, str],
) -> None:
    """Give `program` a graph and inputs that read `host`'s packed tensors; `kernels`: module name → text for its node."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    inputs = copied_inputs(program, mapping)
    take = tensor_inputs(program, host, graph, inputs)
    inputs_of: dict[str, Any] = {}
    products: dict[str, fx.Node] = {}

    def arguments_of(name: str, x: Any) -> tuple[Any, ...]:
        module: Any = host.get_submodule(name)
        bias = None if module.bias is None else take(f"{name}.bias")
        packed = [take(f"{name}.{leaf}") for leaf in module.names]
        return (x, bias, None, module.format, module.rows, module.cols, module.gated, module.activation, packed)

    for fusion in (f for f in fusions if isinstance(f, GpuActivation) and not f.why):
        mapping[fusion.found.result].replace_all_uses_with(mapping[fusion.found.source])
    for linear in list(program.linears()):
        name, node = module_of(linear.weight), mapping[linear.node]
        products[name] = node
        inputs_of[name] = node.args[1] if node.target is torch.ops.aten.addmm.default else node.args[0]
        if name in kernels and isinstance(host.get_submodule(name), GpuSparseLinear):
            replace_node(graph, node, GPU_LINEAR, arguments_of(name, inputs_of[name]), kernels[name])
    for fusion in (f for f in fusions if not f.why):
        if isinstance(fusion, GpuActivation):
            continue
        if isinstance(fusion, GpuFusion):
            arguments = arguments_of(fusion.module, inputs_of[fusion.found.gate])
            replace_node(graph, mapping[fusion.found.product], GPU_LINEAR, arguments, str(fusion))
        else:
            members = fusion.found.members
            arguments = arguments_of(fusion.module, inputs_of[members[0]])
            put_shared(graph, host, fusion, [products[name] for name in members], arguments)
    erase_dead(graph, inputs)
    rewritten = fx.GraphModule(program.graph_module, graph)
    rewritten.meta = dict(program.graph_module.meta)
    program.graph_module, program.inputs = rewritten, tuple(inputs)


def put_shared(
    graph: fx.Graph, host: nn.Module, sharing: GpuSharing, nodes: Sequence[fx.Node], arguments: tuple[Any, ...]
) -> None:
    """One product before the first of `nodes`, which become slices of it."""
    whole: Any = host.get_submodule(sharing.module)
    assert isinstance(whole, SharedGpuLinear)
    place = {node: number for number, node in enumerate(graph.nodes)}
    with graph.inserting_before(min(nodes, key=place.__getitem__)):
        product = graph.call_function(GPU_LINEAR, arguments)
    value = nodes[0].meta["val"]
    product.meta = {**nodes[0].meta, "val": value.new_empty((*value.shape[:-1], whole.rows)), "kernel": str(sharing)}
    first = 0
    for node, rows in zip(nodes, whole.sizes, strict=True):
        replace_node(graph, node, torch.ops.aten.slice.Tensor, (product, -1, first, first + rows), "")
        first += rows
