"""Lower to the reference: every sparsify operator runs as written in `sparsify.ops`, one library GEMM each."""

from __future__ import annotations

from sparsify.passes.base import Context
from sparsify.program import Program
from sparsify.verify import PARTIAL_OPS


def lower_reference(program: Program, context: Context) -> Program:
    """EXPANDED → LOWERED: name the implementation of each operator on its node (`meta["kernel"]`)."""
    count = 0
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in PARTIAL_OPS:
            node.meta["kernel"] = "reference: copy the block into the weight, one GEMM"
            count += 1
    return program.evolve(f"lower: {count} partial linears to the reference")
