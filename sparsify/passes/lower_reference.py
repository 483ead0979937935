"""Lower to the reference: every sparsify operator runs as written in `sparsify.ops`, one library GEMM each."""

from __future__ import annotations

from sparsify.passes.base import Context, PassResult
from sparsify.passes.verify import operators
from sparsify.program import Program


def lower_reference(program: Program, context: Context) -> PassResult:
    """EXPANDED → LOWERED: name the implementation of each operator on its node (`meta["kernel"]`)."""
    count, known = 0, operators(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in known:
            node.meta["kernel"] = known[node.target]
            count += 1
    return PassResult(program.evolve(f"lower: {count} sparsify operators to the reference"), changed=count > 0)
