"""Rewrite the program's graph to what the lowered host computes: one node per packed linear, reading the packed tensors.

%y = aten.linear(%x, @o_proj.weight, @o_proj.bias)
──▶
%y = sparsify.gpu_linear(%x, @o_proj.bias, None, 'gaps', 4096, 4096, False, 'none', [@o_proj.values, @o_proj.meta, …])
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
from sparsify.passes.insert_partial import copied_inputs
from sparsify.program import Program

GPU_LINEAR = torch.ops.sparsify.gpu_linear.default


def rewrite(
    program: Program,
    host: nn.Module,
    fusions: Sequence[GpuFusion | GpuActivation],
    kernels: Mapping[str, str],
) -> None:
    """Give `program` a graph and inputs that read `host`'s packed tensors; `kernels`: module name → text for its node."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    inputs = copied_inputs(program, mapping)
    take = tensor_inputs(program, host, graph, inputs)
    inputs_of: dict[str, Any] = {}

    def arguments_of(name: str, x: Any) -> tuple[Any, ...]:
        module: Any = host.get_submodule(name)
        bias = None if module.bias is None else take(f"{name}.bias")
        packed = [take(f"{name}.{leaf}") for leaf in module.names]
        return (x, bias, None, module.format, module.rows, module.cols, module.gated, module.activation, packed)

    for fusion in (f for f in fusions if isinstance(f, GpuActivation) and not f.why):
        mapping[fusion.found.result].replace_all_uses_with(mapping[fusion.found.source])
    for linear in list(program.linears()):
        name, node = module_of(linear.weight), mapping[linear.node]
        inputs_of[name] = node.args[1] if node.target is torch.ops.aten.addmm.default else node.args[0]
        if name in kernels and isinstance(host.get_submodule(name), GpuSparseLinear):
            replace_node(graph, node, GPU_LINEAR, arguments_of(name, inputs_of[name]), kernels[name])
    for fusion in (f for f in fusions if isinstance(f, GpuFusion) and not f.why):
        arguments = arguments_of(fusion.module, inputs_of[fusion.found.gate])
        replace_node(graph, mapping[fusion.found.product], GPU_LINEAR, arguments, str(fusion))
    erase_dead(graph, inputs)
    rewritten = fx.GraphModule(program.graph_module, graph)
    rewritten.meta = dict(program.graph_module.meta)
    program.graph_module, program.inputs = rewritten, tuple(inputs)
