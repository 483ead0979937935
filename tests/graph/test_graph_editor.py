"""Graph editing: arguments by schema names, inputs by qualified names, the program left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsify
from sparsify.errors import VerifyError
from sparsify.ops.schema import argument, arguments, positional
from sparsify.program.capture import capture
from sparsify.program.graph_editor import GraphEditor

ops = torch.ops.sparsify


def program():
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False)), torch.randn(2, 5))


def test_positions_follow_the_schema():
    given = {"axis": 1, "start": 4, "block": "b", "bias": None, "weight": "w", "x": "x"}
    assert positional(ops.partial_linear.default, given) == (("x", "w", None, "b", 4, 1), {})
    with pytest.raises(VerifyError, match="no argument 'stat' .it has x, weight"):
        positional(ops.partial_linear.default, {**given, "stat": 4})
    with pytest.raises(VerifyError, match="'axis' is missing"):
        positional(ops.partial_linear.default, {k: v for k, v in given.items() if k != "axis"})


def test_defaults_at_the_end_are_not_written_and_those_before_an_argument_are():
    assert positional(torch.ops.aten.slice.Tensor, {"self": "x", "end": 3}) == (("x", 0, None, 3), {})
    assert positional(torch.ops.aten.gelu.default, {"self": "x", "approximate": "none"}) == (("x",), {})
    assert positional(torch.ops.aten.gelu.default, {"self": "x", "approximate": "tanh"}) == (
        ("x",),
        {"approximate": "tanh"},
    )


def test_a_node_is_read_by_names_with_defaults():
    (first, second) = (linear.node for linear in program().linears())
    assert argument(first, "bias").name == first.args[2].name
    assert arguments(second)["bias"] is None
    with pytest.raises(VerifyError, match="has no argument 'wait'"):
        argument(first, "wait")


def test_linears_that_follow_each_other_are_replaced_on_a_copy():
    before = program()
    text, x = str(before.graph), torch.randn(2, 5)
    editor = GraphEditor(before)
    for linear in list(before.linears()):
        read = editor.read(linear)
        name = linear.weight.replace("weight", "lora")
        a = editor.tensor_input(f"{name}_A", torch.zeros(2, 7 if linear.weight[0] == "1" else 5))
        assert editor.tensor_input(f"{name}_A", torch.zeros(2)) is a
        b = editor.tensor_input(f"{name}_B", torch.zeros(3 if linear.weight[0] == "1" else 7, 2))
        given = {"x": read.x, "weight": read.weight, "bias": read.bias, "values": None, "index": None, "a": a, "b": b}
        editor.replace(linear.node, ops.sparse_lowrank_linear.default, **given, scale=1.0, transposed=False)
    graph_module, inputs = editor.finish()
    assert str(before.graph) == text
    graph_module.graph.lint()
    assert [i.name for i in inputs] == [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]
    zeros = {
        f"{i}.lora_{s}": torch.zeros(*n)
        for i, p in ((0, (5, 7)), (1, (7, 3)))
        for s, n in (("A", (2, p[0])), ("B", (p[1], 2)))
    }
    after = before.evolve("edit", graph_module=graph_module, inputs=inputs, tensors=zeros)
    assert torch.equal(after(x), before(x))
    assert not list(after.linears())


def test_an_input_that_is_still_read_is_not_dropped():
    editor = GraphEditor(program())
    with pytest.raises(VerifyError, match=r"0\.weight is packed, but node \w+ still reads it whole"):
        editor.drop_input("0.weight")
    with pytest.raises(VerifyError, match="no input for 9.weight"):
        editor.input("9.weight")


def test_a_transpose_that_nobody_reads_goes_with_its_reader():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return torch.addmm(torch.zeros(3), x, self.weight.t().t())

    before = capture(Transposed(), torch.randn(2, 5))
    editor = GraphEditor(before)
    (linear,) = before.linears()
    read = editor.read(linear)
    bits = editor.tensor_input("bits", torch.zeros(2, dtype=torch.uint8))
    given = {"x": read.x, "weight": read.weight, "bits": bits, "bias": read.bias}
    node = editor.replace(linear.node, ops.masked_linear.default, **given, transposed=True)
    assert argument(node, "transposed") is True
    assert not [n for n in editor.graph.nodes if n.target is torch.ops.aten.t.default]
    assert sparsify is not None
