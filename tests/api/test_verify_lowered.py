"""Stage LOWERED has a grammar: a program that was tampered with is refused, and the message names node and tensor."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sparsify
from sparsify import CpuOptions, LoRA, Plan, Prune, VerifyError
from sparsify.kernels.cpu import build, dispatch, tune
from sparsify.lowering.cpu import fuse as fuse_cpu
from sparsify.lowering.cpu import lower as cpu
from sparsify.lowering.cpu.prepacked_linear import PrepackedLinear, can_prepack
from sparsify.lowering.cuda.gpu_linear import GpuSparseLinear
from sparsify.passes.verify import verify
from sparsify.passes.verify_lowered import verify_lowered
from sparsify.program import Program, Stage

WIDTH = 40
SECONDS = {"torch": 2.0, "onednn": 3.0, "apart": 2.0}  # of what lowering compares with


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """head stays dense: it is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.ffn = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), FeedForward()
        self.head = nn.Linear(WIDTH, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ffn(torch.tanh(self.q(x)) + self.k(x)))


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def lowered(request: pytest.FixtureRequest) -> Any:
    """The handle's program of a lowered host; tests tamper with copies."""
    if request.param == "cpu":
        try:
            build.find_compiler(None)
        except build.BuildError as error:
            pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        timing = lambda key, calls, budget=0.25, cold=False: tune.Timing({n: SECONDS.get(n, 1.0) for n in calls}, True)  # noqa: E731
        for module in (dispatch, cpu, fuse_cpu):
            patch.setattr(module, "measured", timing)
        torch.manual_seed(0)
        model = Model().eval()
        options: Any = {"cpu": CpuOptions(tokens=(1,), compare=False)} if request.param == "cpu" else {}
        plan = Plan([Prune(sparsity=0.75, method="magnitude", exclude=("head",))], target=request.param)
        host: Any = sparsify.compile(model, plan, example=torch.randn(2, 3, WIDTH), progress=False, **options)
    return host.sparsify.program


@pytest.fixture
def program(lowered: Program) -> Program:
    """A copy, host included."""
    host: Any = copy.deepcopy(lowered.host)
    graph = fx.Graph()
    graph.output(graph.graph_copy(lowered.graph, mapping := {}))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return replace(lowered, host=host, graph_module=fx.GraphModule(lowered.graph_module, graph))


def is_cpu(program: Program) -> bool:
    return not any(isinstance(m, GpuSparseLinear) for m in program.host.modules())


def node_of(program: Program, module: str) -> fx.Node:
    """The packed product that reads this module's tensors."""
    names = program.tensor_names
    for node in program.graph.nodes:
        owners = {names[n.name].rpartition(".")[0] for n in node.all_input_nodes if n.name in names}
        if node.op == "call_function" and node.target.namespace == "sparsify" and module in owners:
            return node
    raise AssertionError(f"no node reads {module}")


def change(node: fx.Node, **values: Any) -> None:
    """Other arguments, by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    args = list(node.args)
    for name, value in values.items():
        args[names.index(name)] = value
    node.args = tuple(args)


def place(program: Program, target: str) -> fx.Node:
    found = program.placeholder(target)
    assert found is not None
    return found


def refused(program: Program, *words: str) -> None:
    with pytest.raises(VerifyError) as error:
        verify(program)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_lowered_program_obeys_and_every_packed_product_was_looked_at(program: Program) -> None:
    verify(program)
    assert program.stage is Stage.LOWERED
    names = ("q", "k", "ffn.gate_up", "ffn.down")
    assert len({node_of(program, name) for name in names}) == 4
    verify(replace(program, stage=Stage.CAPTURED))


def test_arguments_are_the_schemas(program: Program) -> None:
    node = node_of(program, "q")
    before = node.args
    node.args = (*before, 3, 4)
    refused(program, node.name, "takes no argument number")
    node.args = before[:4]
    refused(program, node.name, "needs the argument")
    node.args, node.kwargs = before, {"speed": 1}
    refused(program, node.name, "takes no argument speed")
    node.kwargs = {"rows": 40}
    refused(program, node.name, "takes no argument rows there")
    node.kwargs = {}
    for name, value in (("rows", "many"), ("cols", 1.5), ("cols", True), ("gated", 1), ("activation", None), ("x", 3)):
        change(node, **{name: value})
        refused(program, node.name, f"the argument {name} is {value!r}, expected")
        node.args = before
    verify(program)


def test_tensors_are_those_of_one_module(program: Program) -> None:
    node, other = node_of(program, "q"), node_of(program, "k")
    before = node.args
    change(node, bias=place(program, "k.bias"))
    refused(program, node.name, "tensors of several modules", "q.", "k.bias")
    node.args = before
    tanh = next(n for n in program.graph.nodes if "tanh" in str(n.target))
    args = other.args
    change(other, bias=tanh)
    refused(program, other.name, "the argument bias is %tanh, a tensor of no module")
    other.args = args
    change(node, bias=None)
    refused(program, node.name, "the argument bias is None, q says @q.bias")
    node.args = before
    verify(program)


def test_tensors_stand_under_their_own_names(program: Program) -> None:
    node = node_of(program, "q")
    if is_cpu(program):
        change(node, masks=place(program, "q.values"))
        refused(program, node.name, "the argument masks is @q.values, q says @q.masks")
    else:
        packed: Any = node.args[-1]
        change(node, packed=[packed[1], packed[0], *packed[2:]])
        refused(program, node.name, "the argument packed is ['@q.meta', '@q.values'")
        change(node, packed=packed[:2])
        refused(program, node.name, "the argument packed is")


@pytest.mark.parametrize(
    ("module", "argument", "value"),
    [
        ("q", "rows", 48),
        ("q", "cols", 8),
        ("q", "activation", "relu"),
        ("q", "activation", "sinh"),
        ("q", "gated", True),
        ("ffn.gate_up", "gated", False),
        ("ffn.gate_up", "activation", "gelu"),
        ("q", "format", "two_four"),
        ("q", "group", 16),
        ("q", "int8", True),
    ],
)
def test_sizes_format_and_epilogue_are_the_modules(module: str, argument: str, value: Any, program: Program) -> None:
    node = node_of(program, module)
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if argument not in names:
        pytest.skip(f"{node.target} has no {argument}")
    change(node, **{argument: value})
    refused(program, node.name, f"the argument {argument} is {value}, {module} says")


def test_the_owner_is_a_module_that_computes_this(program: Program) -> None:
    node = node_of(program, "q")
    tensor = "q.masks" if is_cpu(program) else "q."
    host: Any = program.host
    packed = host.q
    host.q = nn.Linear(WIDTH, WIDTH)
    refused(program, node.name, tensor, "q is a Linear: it computes no sparsify")
    del host.q
    with pytest.raises(VerifyError, match=rf"node {node.name} reads {tensor}.*, but q is no module"):
        verify_lowered(program)
    host.q = packed
    verify(program)
    target = torch.ops.sparsify.gpu_linear.default if is_cpu(program) else torch.ops.sparsify.packed_linear.default
    node.target = target
    refused(program, node.name)


def test_shapes_are_the_modules(program: Program) -> None:
    node, source = node_of(program, "q"), place(program, "q.values")
    believed = source.meta["val"]
    source.meta["val"] = believed.new_empty((3,))
    refused(program, node.name, "reads q.values as torch.float32 (3,), which is torch.float32 (")
    source.meta["val"] = believed.to(torch.float64)
    refused(program, node.name, "reads q.values as torch.float64")
    source.meta["val"] = believed
    result = node.meta["val"]
    node.meta["val"] = result.new_empty((2, 3, 7))
    refused(program, node.name, "is said to return torch.float32 (2, 3, 7)", "(2, 3, 40)")
    node.meta["val"] = result.half()
    refused(program, node.name, "is said to return torch.float16")
    del node.meta["val"]
    refused(program, node.name, "does not say what it returns")
    node.meta["val"] = result
    verify(program)


def test_the_input_fits_the_weight(program: Program) -> None:
    node = node_of(program, "ffn.down")
    change(node, x=node_of(program, "q"))
    refused(program, node.name, "x has 40 columns, the weight 64")


def test_packed_numbers_are_looked_at(program: Program) -> None:
    host: Any = program.host
    with torch.no_grad():
        (host.q.panel_ptr if is_cpu(program) else host.q.start).add_(1)
    refused(program, node_of(program, "q").name, "the packed weight of q is damaged")


def test_no_product_reads_a_weight_that_is_packed(program: Program) -> None:
    host: Any = program.host
    linear = next(n for n in program.linears() if n.weight == "head.weight")
    host.head = copy.deepcopy(host.q)
    refused(program, linear.node.name, "reads head.weight whole, but head holds it packed")


def test_a_gated_product_of_the_host_is_read(program: Program) -> None:
    host: Any = program.host
    host.add_module("gate_up", copy.deepcopy(host.ffn.gate_up))
    refused(program, "no node reads gate_up, which computes a gated product")


def test_a_blocked_weight_belongs_to_a_module() -> None:
    weight = torch.randn(8, 12)
    if not can_prepack(weight):
        pytest.skip("this torch has no oneDNN")
    host: Any = nn.Sequential(PrepackedLinear(weight, torch.randn(8)), nn.Linear(8, 4))
    program = replace(sparsify.analyse(host, torch.randn(3, 12)), stage=Stage.LOWERED)
    verify_lowered(program)
    node = next(n for n in program.graph.nodes if "prepacked" in str(n.target))
    change(node, handle=-1)
    refused(program, node.name, "the argument handle is -1, 0 says")
    change(node, bias=None)
    refused(program, node.name, "no module of the host computes it (handle -1)")


@pytest.mark.parametrize("said", ["takes no argument speed", "needs the argument"])
def test_operators_of_training_obey_their_schema(said: str) -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    host: Any = sparsify.compile(model, Plan([LoRA(rank=2)]), example=torch.randn(3, 12), progress=False)
    program = host.sparsify.program
    verify_lowered(program)
    node = next(n for n in program.graph.nodes if "sparse_lowrank" in str(n.target))
    if said.startswith("needs"):
        node.args = node.args[:2]
    else:
        node.kwargs = {"speed": 1}
    with pytest.raises(VerifyError, match=f"node {node.name}: .*{said}"):
        verify_lowered(program)
