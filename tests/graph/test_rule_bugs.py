"""A rule of the axis analysis refuses, or is right: what else it raises is a bug here, and an unknown operation for users."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.passes.detect import axes, axis_rules
from sparsify.passes.detect.axes import ONE, Axis, Interpreter, Refuse, concat, find, product, unify
from sparsify.passes.detect.axis_terms import terms_of
from sparsify.passes.detect.find_structures import find_structures
from sparsify.program.capture import capture


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).flip(0).mT.mT)


BUGS = [ValueError("a"), IndexError("b"), KeyError("c"), TypeError("d"), AttributeError("e"), ZeroDivisionError("f")]
BUGS += [AssertionError("g"), RecursionError("h"), StopIteration("i"), RuntimeError("j")]


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: type(b).__name__)
def test_a_bug_in_a_rule_is_raised_in_tests_and_an_unknown_operation_else(bug: Exception, monkeypatch):
    def broken(call):
        raise bug

    program = capture(Net(), (torch.randn(4, 8),))
    assert [s.kind for s in find_structures(program.graph, program.tensor_names).structures] == ["ffn"]
    monkeypatch.setitem(axis_rules.RULES, "aten::flip", broken)
    with pytest.raises(type(bug)):
        find_structures(program.graph, program.tensor_names)
    monkeypatch.setattr(axes, "strict_rules", False)
    found = find_structures(program.graph, program.tensor_names)
    assert found.structures == ()
    assert "(aten::flip) may depend on the order along every axis that it touches" in found.declined[0].reason
    host = sparsify.compile(Net(), sparsify.Plan([sparsify.LoRA(rank=2)]), example=(torch.randn(4, 8),), progress=False)
    assert len(host.sparsify.report.chosen) > 0


def test_a_rule_with_wrong_shapes_is_a_bug_too(monkeypatch):
    program = capture(Net(), (torch.randn(4, 8),))
    monkeypatch.setitem(axis_rules.RULES, "aten::flip", lambda call: call["self"].axes[:1])
    with pytest.raises(AssertionError, match="the rule of aten::flip gives flip other shapes than export recorded"):
        find_structures(program.graph, program.tensor_names)
    monkeypatch.setattr(axes, "strict_rules", False)
    assert find_structures(program.graph, program.tensor_names).structures == ()


def test_what_failed_is_on_record(monkeypatch):
    program = capture(Net(), (torch.randn(4, 8),))
    monkeypatch.setattr(axes, "strict_rules", False)
    monkeypatch.setitem(axis_rules.RULES, "aten::flip", lambda call: call["nothing"])
    machine = Interpreter(program.tensor_names, [i.name for i in program.inputs if i.kind == "parameter"], {})
    machine.run(program.graph)
    assert machine.bugs == ["flip (aten::flip): KeyError: 'nothing'"]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lambda: Axis(4), lambda: Axis(5)),
        (lambda: ONE, lambda: Axis(5)),
        (lambda: product((Axis(2), Axis(3))), lambda: Axis(5)),
        (lambda: concat((Axis(2), Axis(3))), lambda: product((Axis(2), Axis(3)))),
    ],
)
def test_axes_of_different_sizes_refuse(left, right):
    with pytest.raises(Refuse, match="cannot be one axis"):
        unify(left(), right())


def test_in_place_operations_of_other_makers_of_graphs():
    """Raw exports keep them: the analysis neither fails nor takes a broadcast or a resize for the same axes."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.dropout_(torch.relu_(self.up(x)), 0.5, False)
            h += torch.ones(1, 1)
            h.unsqueeze_(0).squeeze_(0)
            h.transpose_(0, 1).transpose_(0, 1)
            self.count.add_(1)
            out = torch.empty(4, 16)
            out[:2].copy_(h[:2])
            out[2:] = h[2:]
            return self.down(out.mul_(1.0))

    model, x = Writes().eval(), torch.randn(4, 8)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=False)
    names = {**exported.graph_signature.inputs_to_parameters, **exported.graph_signature.inputs_to_buffers}
    find_structures(exported.graph, names)
    machine = Interpreter(names, [n for n in names if n.startswith("p_")], {})
    machine.run(exported.graph)
    assert all(find(axis).size == axis.size for value in machine.values for axis in value.axes)
    relu = next(v for v in machine.values if v.node == "relu_")
    assert relu.op == "aten::relu"


class Latents(nn.Module):
    """Attention among learned rows, of which only the mean is seen."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(7, 12))
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12, bias=False) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(self.rows).view(1, 7, 3, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.o(y.transpose(1, 2).reshape(1, 7, 12)).mean(1)


@pytest.mark.parametrize("causal", [False, True])
def test_learned_rows_are_free_unless_attention_is_causal_along_them(causal: bool) -> None:
    program = capture(Latents(causal).eval(), (torch.randn(2, 12),))
    machine = Interpreter(program.tensor_names, [i.name for i in program.inputs if i.kind == "parameter"], {})
    machine.run(program.graph)
    reason = find(machine.placeholders["rows"].axes[0]).fixed
    assert (reason is not None) == causal
    assert not causal or "is causal along it" in str(reason)


def interpreted(model: nn.Module, *args: Tensor) -> Interpreter:
    program = capture(model.eval(), args)
    machine = Interpreter(program.tensor_names, [i.name for i in program.inputs if i.kind == "parameter"], {})
    machine.run(program.graph)
    return machine


def test_statistics_of_a_group_norm_are_those_of_the_channels_in_a_group() -> None:
    """Three groups of four channels, five places: each mean is over 4 · 5 values, and the groups stay apart."""
    machine = interpreted(nn.Sequential(nn.GroupNorm(3, 12)), torch.randn(2, 12, 5))
    assert [[axis.size for axis in axes] for axes, _ in machine.mixes] == [[4, 5]]
    (weight,) = (value for name, value in machine.placeholders.items() if "weight" in name)
    assert [[x.size for x, _ in term.factors] for term in terms_of(weight.axes[0])] == [[3, 4]]


class Table(nn.Module):
    """Rows that the inputs count, and columns of which only a sum is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 12))

    def forward(self, places: Tensor) -> Tensor:
        return nn.functional.embedding(places, self.table).sum(-1)


def test_rows_of_a_table_that_is_read_by_index_keep_their_places() -> None:
    machine = interpreted(Table(), torch.randint(0, 7, (2, 3)))
    rows, columns = (find(axis) for axis in machine.placeholders["table"].axes)
    assert "reads it by index" in str(rows.fixed)
    assert columns.fixed is None
