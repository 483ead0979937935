"""The grammar of stage LOWERED: every operator of ours is called by its schema, over the tensors of the one module that computes it.

    %y = sparsify.packed_linear(%x, @q.masks, @q.values, …, rows, cols, …)
         schema      arguments that the operator has, all that it needs, of the types that it takes
         owner       tensors of one module of the host, which says that it is this operator over these tensors, sizes and names
         shapes      the graph's tensors are as large as the module's; x fits the weight; the result is what the operator makes of it
         numbers     what is packed is what kernels may read

No product may read a weight that the host holds packed, and a module that stands for several linears must be read.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from sparsify.errors import VerifyError
from sparsify.kernels.cpu.formats import FormatError
from sparsify.modules.kernel_module import KernelModule
from sparsify.modules.original_state import OriginalState
from sparsify.modules.rows_of_gated import Gated
from sparsify.ops.schema import checked_arguments
from sparsify.program import Program

PACKED_OPERATORS = ("sparsify::packed_linear", "sparsify::prepacked_linear", "sparsify::gpu_linear")
"""What a target lowers to; the operators of training keep their own tensors apart, and only their schema is checked here."""


def verify_lowered(program: Program) -> None:
    """Raise VerifyError, naming node and tensor, unless the program obeys this grammar. Its host must be lowered already."""
    read: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target.namespace != "sparsify":
            continue
        given = checked_arguments(node)
        if node.target._schema.name in PACKED_OPERATORS:
            owner, module = owner_of(program, node, given)
            verify_statement(program, node, given, owner, module)
            verify_tensors(program, node)
            verify_result(node)
            read.add(owner)
    for linear in program.linears():
        name = linear.weight.rpartition(".")[0]
        if isinstance(submodule(program.host, name), OriginalState):
            raise VerifyError(f"node {linear.node.name} reads {linear.weight} whole, but {name} holds it packed")
    for name, module in program.host.named_modules():
        if isinstance(module, Gated) and name not in read:
            raise VerifyError(f"no node reads {name}, which computes a gated product of the host")


def submodule(host: nn.Module, name: str) -> nn.Module | None:
    try:
        return host.get_submodule(name)
    except AttributeError:
        return None


def owner_of(program: Program, node: fx.Node, given: dict[str, object]) -> tuple[str, KernelModule]:
    """The module that owns every tensor of a packed product but its input, by name."""
    names = program.tensor_names
    owners: dict[str, str] = {}
    for argument, value in given.items():
        for source in (n for n in pytree.tree_leaves(value) if isinstance(n, fx.Node)):
            if argument in ("x", "residual"):
                continue
            if source.name not in names:
                raise VerifyError(f"node {node.name}: the argument {argument} is %{source.name}, a tensor of no module")
            owners.setdefault(names[source.name].rpartition(".")[0], names[source.name])
    if len(owners) > 1:
        first, second, *_ = owners.values()
        raise VerifyError(f"node {node.name} reads tensors of several modules: {first} and {second}")
    for name in owners or (n for n, m in program.host.named_modules() if has_handle(m, given.get("handle"))):
        module = submodule(program.host, name)
        if isinstance(module, KernelModule) and module.operator is node.target:
            return name, module
        kind = "no module" if module is None else f"a {type(module).__name__}"
        raise VerifyError(f"node {node.name} reads {owners[name]}, but {name} is {kind}: it computes no {node.target}")
    raise VerifyError(f"node {node.name}: no module of the host computes it (handle {given.get('handle')})")


def has_handle(module: nn.Module, handle: object) -> bool:
    return handle is not None and getattr(module, "handle", None) == handle


def verify_statement(
    program: Program, node: fx.Node, given: dict[str, object], owner: str, module: KernelModule
) -> None:
    """The node must be what the module says of itself: the same tensors under the same names, the same sizes, format and epilogue."""
    names = program.tensor_names

    def said(value: object) -> object:
        return pytree.tree_map(lambda leaf: f"@{names[leaf.name]}" if isinstance(leaf, fx.Node) else leaf, value)

    for argument, expected in module.arguments(lambda leaf: f"@{owner}.{leaf}").items():
        found = said(given[argument])
        if found != expected:
            raise VerifyError(f"node {node.name}: the argument {argument} is {found}, {owner} says {expected}")
    try:
        module.check_numbers()
    except FormatError as error:
        raise VerifyError(f"node {node.name}: the packed weight of {owner} is damaged: {error}") from error


def verify_tensors(program: Program, node: fx.Node) -> None:
    """What the graph believes of a tensor's shape and type must be so."""
    names = program.tensor_names
    for source in node.all_input_nodes:
        believed = source.meta.get("val")
        if source.name not in names or not isinstance(believed, torch.Tensor):
            continue
        held = program.tensor(names[source.name])
        if (held.shape, held.dtype) != (believed.shape, believed.dtype):
            raise VerifyError(
                f"node {node.name} reads {names[source.name]} as {believed.dtype} {tuple(believed.shape)}, "
                f"which is {held.dtype} {tuple(held.shape)}"
            )


def verify_result(node: fx.Node) -> None:
    """The operator, run on shapes alone, must take its inputs and make what the graph says."""
    result = node.meta.get("val")
    values = pytree.tree_map(lambda leaf: leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf, node.args)
    if not isinstance(result, torch.Tensor):
        raise VerifyError(f"node {node.name} does not say what it returns")
    try:
        with torch.no_grad():
            made = node.target(*values, **node.kwargs)  # type: ignore[operator]
    except RuntimeError as error:
        raise VerifyError(f"node {node.name}: {str(error).splitlines()[0]}") from error
    if (made.shape, made.dtype) != (result.shape, result.dtype):
        raise VerifyError(
            f"node {node.name} is said to return {result.dtype} {tuple(result.shape)}; {node.target} returns "
            f"{made.dtype} {tuple(made.shape)}"
        )


__all__ = ["verify_lowered"]
