"""Lower to the reference: every sparsify operator runs as written in `sparsify.ops`, one library GEMM each."""

from __future__ import annotations

import torch

from sparsify.passes.base import Context, PassResult
from sparsify.program import Program
from sparsify.verify import SPARSIFY_OPS

KERNELS = {
    torch.ops.sparsify.partial_linear.default: "reference: block copied into the weight, one GEMM",
    torch.ops.sparsify.partial_linear_at.default: "reference: channels copied into the weight, one GEMM",
    torch.ops.sparsify.sparse_lowrank_linear.default: "reference: values scattered into the weight, one GEMM, two small ones",
    torch.ops.sparsify.masked_linear.default: "reference: one GEMM over exact zeros, gradient masked",
    torch.ops.sparsify.apply_mask.default: "reference: element-wise",
    torch.ops.sparsify.quantized_linear.default: "reference: unpacked to a temporary, one GEMM",
}


def lower_reference(program: Program, context: Context) -> PassResult:
    """EXPANDED → LOWERED: name the implementation of each operator on its node (`meta["kernel"]`)."""
    count = 0
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in SPARSIFY_OPS:
            node.meta["kernel"] = KERNELS[node.target]
            count += 1
    return PassResult(program.evolve(f"lower: {count} sparsify operators to the reference"), changed=count > 0)
