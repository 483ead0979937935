"""The machine that runs passes: a pass that does not keep what it declares is named, for each thing that it can declare."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import sparsify
from sparsify import LoRA, Plan, PlanError, Prune, Quantize, VerifyError
from sparsify.api import PIPELINE
from sparsify.errors import Refusal
from sparsify.passes.base import (
    Context,
    Pass,
    PassResult,
    check_changed,
    insert_after,
    run_passes,
    same,
    snapshot,
)
from sparsify.program import Move, Program, Stage
from sparsify.program.capture import capture

LORA = Plan([LoRA(rank=2)])
NUMERIC = Plan([LoRA(rank=2)], check="numeric")
WEIGHT = "layers.0.up.weight"


@pytest.fixture
def program() -> Program:
    return capture(tiny.perturb(tiny.Mlp()), (torch.randn(3, 12),))


def step(run: Any, preserves: Any = "exactly") -> Pass:
    return Pass("mine", Stage.CAPTURED, Stage.CAPTURED, run, preserves)


def scaled(program: Program, by: float) -> Program:
    """The program with one weight multiplied by a number."""
    tensors = {**program.tensors, WEIGHT: program.tensor(WEIGHT).detach() * by}
    return program.evolve("mine: scaled", tensors=tensors)


# --- changed ---


def edit_graph(program: Program) -> Program:
    node = next(n for n in program.graph.nodes if n.target is torch.ops.aten.gelu.default)
    node.kwargs = {"approximate": "tanh"}
    return program


def name_kernel(program: Program) -> Program:
    next(iter(program.linears())).node.meta["kernel"] = "mine"
    return program


def write_weight(program: Program) -> Program:
    with torch.no_grad():
        program.tensor(WEIGHT).add_(1)
    return program


def rebind_host(program: Program) -> Program:
    program.host.layers[0]["up"].weight = nn.Parameter(program.tensor(WEIGHT).detach().clone())
    return program


def edit_table(program: Program) -> Program:
    program.tensors[WEIGHT] = program.tensor(WEIGHT)
    return program


SECRETS = {
    edit_graph: "the graph differs at node gelu",
    name_kernel: "the graph differs at node linear",
    write_weight: f"{WEIGHT} was written in place",
    rebind_host: f"{WEIGHT} was written in place",
    edit_table: rf"tensors differs \({WEIGHT}\)",
    lambda p: scaled(p, 1.0): rf"tensors differs \({WEIGHT}\)",
    lambda p: p.evolve("mine", refusals=(Refusal("a", "b"),)): "refusals differs",
    lambda p: p.evolve("mine", moves=(Move(WEIGHT, 0, torch.arange(20)),)): "moves differs",
    lambda p: p.evolve("mine", quantize={WEIGHT: "int8"}): rf"quantize differs \({WEIGHT}\)",
}


@pytest.mark.parametrize("secret", SECRETS, ids=lambda f: getattr(f, "__name__", "?"))
def test_a_pass_that_says_it_changed_nothing_returns_an_equal_program(program: Program, secret: Any) -> None:
    lying = step(lambda p, _: PassResult(secret(p), changed=False))
    with pytest.raises(
        VerifyError, match=rf"^in pass 'mine' \(1/1\): it says that it changed nothing, but {SECRETS[secret]}"
    ):
        run_passes(program, [lying], Context(LORA))


@pytest.mark.parametrize("idle", [lambda p: p, lambda p: p.evolve("only a note"), lambda p: replace(p, tensors={})])
def test_a_pass_that_says_it_changed_something_did(program: Program, idle: Any) -> None:
    lying = step(lambda p, _: PassResult(idle(p), changed=True))
    with pytest.raises(
        VerifyError, match=r"it says that it changed the program, but nodes, tensors and everything else"
    ):
        run_passes(program, [lying], Context(LORA))
    honest = step(lambda p, _: PassResult(idle(p), changed=False))
    assert run_passes(program, [honest], Context(LORA)).stage is Stage.CAPTURED


def test_honest_changes_pass(program: Program) -> None:
    for secret in SECRETS:
        run_passes(program, [step(lambda p, _, s=secret: PassResult(s(p), changed=True), "nothing")], Context(LORA))


def test_a_pass_returns_a_result(program: Program) -> None:
    with pytest.raises(VerifyError, match=r"in pass 'mine' \(1/1\): returned Program, not PassResult"):
        run_passes(program, [step(lambda p, _: p)], Context(LORA))


# --- preserves ---

DRIFTS = {"exactly": 0.0, "rounding": 1e-7, "nothing": 0.5}


@pytest.mark.parametrize("declared", DRIFTS)
@pytest.mark.parametrize("does", DRIFTS)
def test_a_pass_preserves_what_it_declares(program: Program, declared: str, does: str) -> None:
    mine = step(lambda p, _: PassResult(scaled(p, 1 + DRIFTS[does]), changed=True), declared)
    run_passes(program, [mine], Context(LORA))  # unchecked, the mistake goes through
    order = list(DRIFTS)
    if order.index(does) <= order.index(declared):
        run_passes(program, [mine], Context(NUMERIC))
        return
    text = "output 0 drifted by .* rounding explains" if does == "nothing" else "the pass preserves them exactly"
    with pytest.raises(VerifyError, match=rf"^in pass 'mine' \(1/1\): .*{text}"):
        run_passes(program, [mine], Context(NUMERIC))


def test_after_a_pass_that_preserves_nothing_its_outputs_count(program: Program) -> None:
    spoil = step(lambda p, _: PassResult(scaled(p, 1.5), changed=True), "nothing")
    again = step(lambda p, _: PassResult(scaled(p, 1.0), changed=True))
    run_passes(program, [spoil, again], Context(NUMERIC))
    with pytest.raises(VerifyError, match=r"in pass 'mine' \(2/2\): output 0 drifted"):
        run_passes(program, [spoil, replace(spoil, preserves="rounding")], Context(NUMERIC))


def test_a_run_may_preserve_less_than_the_pass_and_never_more(program: Program) -> None:
    spoil = step(lambda p, _: PassResult(scaled(p, 1.5), changed=True, preserves="nothing"))
    run_passes(program, [spoil], Context(NUMERIC))
    boast = step(lambda p, _: PassResult(scaled(p, 1 + 1e-7), changed=True, preserves="exactly"), "rounding")
    run_passes(program, [boast], Context(NUMERIC))


def test_no_pass_is_known_by_its_name() -> None:
    """Pruning and packing may change the outputs because they say so, whatever they are called; nothing else may."""
    for rules in (
        [Prune(method="magnitude")],
        [Quantize(match="*.up_proj", format="int8"), LoRA(match="*.q_proj", rank=2)],
    ):
        renamed = tuple(replace(s, name=f"step-{i}") for i, s in enumerate(PIPELINE))
        sparsify.compile(tiny.llama(), Plan(rules, check="numeric"), progress=False, pipeline=renamed)
    strict = tuple(replace(s, preserves="rounding") if s.name == "prune" else s for s in PIPELINE)
    with pytest.raises(VerifyError, match=r"in pass 'prune' \(3/7\): output 0 drifted"):
        sparsify.compile(
            tiny.llama(), Plan([Prune(method="magnitude")], check="numeric"), progress=False, pipeline=strict
        )


# --- the pipeline is an argument ---


def test_a_pass_of_ones_own_runs_where_it_was_put() -> None:
    seen = []

    def look(program: Program, context: Context) -> PassResult:
        seen.append((program.stage, len(program.parts)))
        return PassResult(program.evolve("look: here"), changed=False)

    mine = Pass("look", Stage.SELECTED, Stage.SELECTED, look)
    host: Any = sparsify.compile(
        tiny.llama(),
        Plan([LoRA(match="*.q_proj", rank=2)]),
        progress=False,
        pipeline=insert_after(PIPELINE, "select", mine),
    )
    assert seen == [(Stage.SELECTED, 2)]
    assert "  look: here\n" in str(host.sparsify.program)


def test_where_a_pass_goes() -> None:
    mine = step(operator.itemgetter(0))
    names = [s.name for s in insert_after(PIPELINE, "insert", mine, mine)]
    assert names == [*(s.name for s in PIPELINE[:6]), "mine", "mine", "lower"]
    with pytest.raises(PlanError, match=r"the pipeline has no pass 'permute'; did you mean .*'permute-weights'"):
        insert_after(PIPELINE, "permute", mine)


def test_a_pipeline_that_ends_early_makes_no_host() -> None:
    with pytest.raises(PlanError, match="the pipeline ends at stage EXPANDED; a host is made from LOWERED"):
        sparsify.compile(tiny.llama(), LORA, progress=False, pipeline=PIPELINE[:-1])


def test_the_model_that_was_passed_in_keeps_its_stage(program: Program) -> None:
    after = run_passes(program, PIPELINE[:1], Context(LORA))
    assert (program.stage, after.stage) == (Stage.CAPTURED, Stage.STRUCTURED)


# --- pieces ---


def test_same() -> None:
    tensor = torch.ones(2)
    assert same({"a": (tensor, 1)}, {"a": (tensor, 1)})
    assert not same({"a": tensor}, {"a": tensor.clone()})
    assert not same([1], (1,))
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1}), "order is part of a table"
    move = Move("w", 0, tensor)
    assert same(move, Move("w", 0, tensor))
    assert not same(move, Move("w", 0, tensor.clone()))


def test_snapshots_do_not_see_notes_and_stages(program: Program) -> None:
    before = snapshot(program)
    check_changed(before, snapshot(replace(program.evolve("a note"), stage=Stage.STRUCTURED)), said=False)
