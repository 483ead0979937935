"""A program as a value: frozen, made anew by every change, with groups that show their fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import sparsify
from sparsify import LoRA, Plan, Quantize
from sparsify.api import PIPELINE
from sparsify.passes.base import Context, Pass, PassResult, insert_after
from sparsify.program import Program, Stage
from sparsify.program.program import GROUP_OF, GROUPS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def program() -> Program:
    return sparsify.analyse(Net(), torch.randn(3, 6))


@pytest.mark.parametrize("name", ["host", "tensors", "structures", "masks", "example"])
def test_nothing_of_a_program_can_be_set(program: Program, name: str) -> None:
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(program, name, getattr(program, name))


def test_changes_go_to_the_groups_and_leave_the_rest(program: Program) -> None:
    mask = {"up.weight": torch.ones(20, 6, dtype=torch.bool)}
    after = program.evolve(
        "by hand", masks=mask, quantize={"down.weight": "int8"}, declined=(), tensors={"up.bias": torch.ones(20)}
    )
    assert after.masks is mask is after.pruning.masks
    assert (after.quantize, after.declined) == ({"down.weight": "int8"}, ())
    assert after.history == (*program.history, "by hand")
    assert after.structures is program.structures
    assert after.captured is program.captured
    assert (program.masks, program.quantize, program.tensors) == ({}, {}, {})
    kept = {name: value for name, value in program.facts().items() if after.facts()[name] is value}
    assert set(program.facts()) - set(kept) == {"masks", "quantize", "declined", "tensors", "history"} - (
        {"declined"} if program.declined == () else set()
    )


def test_an_unknown_name_is_an_error(program: Program) -> None:
    with pytest.raises(TypeError, match="nothing_of_mine"):
        program.evolve("by hand", nothing_of_mine=1)


def test_every_field_of_every_group_is_shown_once() -> None:
    fields = [f.name for f in dataclasses.fields(Program)]
    inside = [f.name for kind in GROUPS.values() for f in dataclasses.fields(kind)]
    assert set(GROUPS) <= set(fields)
    assert len(set(fields + inside)) == len(fields) + len(inside)
    assert set(inside) == set(GROUP_OF)
    assert all(isinstance(getattr(Program, name), property) for name in inside)


@pytest.mark.parametrize("rules", [[LoRA(rank=2)], [LoRA(rank=2), Quantize("int8")]], ids=["dense", "packed"])
def test_the_host_gets_the_tensors_and_no_earlier_program_is_written_to(rules: list[Any]) -> None:
    seen: list[Program] = []

    def look(program: Program, _: Context) -> PassResult:
        seen.append(program)
        return PassResult(program, changed=False)

    model = Net()
    x = torch.randn(3, 6)
    pipeline = insert_after(PIPELINE, "lower", Pass("look", Stage.LOWERED, Stage.LOWERED, look))
    host = sparsify.compile(model, Plan(rules), example=x, pipeline=pipeline, progress=False)
    own, before = host.sparsify.program, seen[0]
    assert own.host is host
    assert (own.tensors, own.packed) == ({}, {})
    assert before.host is model
    assert before.tensors
    assert bool(before.packed) == (len(rules) == 2)
    torch.testing.assert_close(own(x), before(x))
    torch.testing.assert_close(own(x), host(x))


def test_a_copy_of_a_host_has_a_program_over_the_copy() -> None:
    import copy

    host = sparsify.compile(Net(), Plan([LoRA(rank=2)]), example=torch.randn(3, 6), progress=False)
    clone = copy.deepcopy(host)
    tiny.disturb(clone, 0.3, 1)
    assert clone.sparsify.program.host is clone
    assert host.sparsify.program.host is host
    x = torch.randn(3, 6)
    assert not torch.equal(clone.sparsify.program(x), host.sparsify.program(x))
