"""Plans: what they accept, what they refuse and in which words, which rule takes which structure, JSON, numeric checks."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import sparsify
from sparsify import S2FT, LoRA, Plan, PlanError, Prune, RefusedError, VerifyError
from sparsify.api import PIPELINE
from sparsify.passes.base import Pass, PassResult


def exactly(text: str) -> str:
    return "^" + re.escape(text) + "$"


# --- construction --------------------------------------------------------------------------------------------------------

WRONG_RULES = [
    ({}, "S2FT: give either fraction=… (share of parameters) or units=… (heads or channels), not both"),
    (
        {"fraction": 0.1, "units": 2},
        "S2FT: give either fraction=… (share of parameters) or units=… (heads or channels), not both",
    ),
    ({"fraction": 0.0}, "S2FT(fraction=0.0): a fraction 0 < fraction ≤ 1 is needed"),
    ({"fraction": 1.5}, "S2FT(fraction=1.5): a fraction 0 < fraction ≤ 1 is needed"),
    ({"fraction": -0.1}, "S2FT(fraction=-0.1): a fraction 0 < fraction ≤ 1 is needed"),
    (
        {"units": 1, "producer_fraction": 2.0},
        "S2FT(producer_fraction=2.0): a fraction 0 ≤ producer_fraction ≤ 1 is needed",
    ),
    ({"units": 0}, "S2FT(units=0): at least one unit must train"),
    ({"units": 1.5}, "S2FT(units=1.5): expected int or NoneType"),
    ({"units": True}, "S2FT(units=True): expected int or NoneType"),
    ({"fraction": "0.1"}, "S2FT(fraction='0.1'): expected float or NoneType"),
    ({"fraction": float("nan")}, "S2FT(fraction=nan): expected float or NoneType"),
    ({"fraction": float("inf")}, "S2FT(fraction=inf): expected float or NoneType"),
    ({"units": 1, "largest": 1}, "S2FT(largest=1): expected bool"),
    ({"units": 1, "match": 3}, "S2FT(match=3): expected str"),
    ({"units": 1, "match": ""}, "S2FT(match=''): an empty pattern matches nothing; use '*' for everything"),
    ({"units": 1, "structure": "mlp"}, "S2FT(structure='mlp'): expected one of 'ffn', 'attention', 'both'"),
    ({"units": 1, "balance": "heads"}, "S2FT(balance='heads'): expected one of 'parameters', 'units'"),
    (
        {"units": 1, "select": "magnitude"},
        "S2FT(select='magnitude'): expected one of 'random', 'weight', 'activation', 'product', 'gradient'",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_RULES, ids=[str(f) for f, _ in WRONG_RULES])
def test_wrong_rule_is_refused_at_construction(fields, message):
    with pytest.raises(PlanError, match=exactly(message)):
        S2FT(**fields)


def test_unknown_field_of_a_rule_is_refused():
    with pytest.raises(PlanError, match="unknown field 'fractoin'; did you mean 'fraction'"):
        S2FT(fractoin=0.1)
    with pytest.raises(PlanError, match="takes 1 value by position"):
        S2FT("*", 0.1)  # fields have names


WRONG_PLANS: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "Plan: no rules, so nothing would train; train=['*.bias'] trains parameters by name"),
    (S2FT(units=1), {}, "Plan takes a list of rules: Plan([S2FT(…)])"),
    ([S2FT(units=1)], {"train": "classifier"}, "Plan(train='classifier'): expected a list of patterns"),
    ([S2FT(units=1)], {"seed": 1.0}, "Plan(seed=1.0): expected int"),
    ([S2FT(units=1)], {"check": "all"}, "Plan(check='all'): expected one of 'none', 'numeric'"),
]


@pytest.mark.parametrize(("rules", "fields", "message"), WRONG_PLANS, ids=[m for *_, m in WRONG_PLANS])
def test_wrong_plan_is_refused_at_construction(rules, fields, message):
    with pytest.raises(PlanError, match=exactly(message)):
        Plan(rules, **fields)


def test_something_else_than_a_rule_is_refused():
    with pytest.raises(PlanError, match=r"^Plan: 'S2FT' is not a rule; rules are .*S2FT"):
        Plan(["S2FT"])
    with pytest.raises(PlanError, match=r"expected one of .*'auto'"):
        Plan([S2FT(units=1)], target="tpu")


def test_plans_are_frozen_values():
    plan = Plan([S2FT(units=1)], train=["head"])
    assert plan == Plan((S2FT(units=1),), train=("head",))
    assert hash(plan) == hash(Plan([S2FT(units=1)], train=["head"]))
    assert plan != Plan([S2FT(units=2)], train=["head"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.seed = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rules[0].units = 3


# --- JSON ----------------------------------------------------------------------------------------------------------------

rules = st.builds(
    lambda size, **fields: S2FT(**size, **fields),
    size=st.one_of(
        st.floats(0, 1, exclude_min=True).map(lambda f: {"fraction": f}),
        st.integers(1, 10**6).map(lambda u: {"units": u}),
    ),
    match=st.text(min_size=1, max_size=12),
    structure=st.sampled_from(["ffn", "attention", "both"]),
    producer_fraction=st.floats(0, 1),
    balance=st.sampled_from(["parameters", "units"]),
    select=st.sampled_from(["random", "weight", "activation", "product", "gradient"]),
    largest=st.booleans(),
)
plans = st.builds(
    Plan,
    st.lists(rules, min_size=1, max_size=3),
    train=st.lists(st.text(max_size=8), max_size=3),
    seed=st.integers(-(2**70), 2**70),
    check=st.sampled_from(["none", "numeric"]),
    target=st.sampled_from(["auto", "cuda"]),
)


@given(plans)
def test_json_round_trip_gives_an_equal_plan(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json(indent=2)) == plan


WRONG_JSON = [
    ("{", "the plan: not JSON that can be read: "),
    ("[]", 'the plan must be a JSON object with a list "rules"'),
    ('{"rules": 1}', 'the plan must be a JSON object with a list "rules"'),
    ('{"rules": [3]}', 'rules[0]: expected an object with a "rule" name, got 3'),
    ('{"rules": [{"match": "*"}]}', 'rules[0]: expected an object with a "rule" name'),
    ('{"rules": [{"rule": "S2F"}]}', "rules[0]: unknown rule 'S2F'; did you mean 'S2FT'"),
    (
        '{"rules": [{"rule": "S2FT", "fractoin": 0.1}]}',
        "rules[0] (S2FT): unknown field 'fractoin'; did you mean 'fraction'",
    ),
    ('{"rules": [{"rule": "S2FT", "units": "2"}]}', "S2FT(units='2'): expected int or NoneType"),
    ('{"rules": [{"rule": "S2FT", "units": 2}], "sed": 1}', "plan: unknown field 'sed'; did you mean 'seed'"),
    ('{"rules": []}', "Plan: no rules, so nothing would train; train=['*.bias'] trains parameters by name"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_JSON, ids=[m for _, m in WRONG_JSON])
def test_wrong_json_is_refused(text, message):
    with pytest.raises(PlanError, match="^" + re.escape(message)):
        Plan.from_json(text)


# --- assignment ----------------------------------------------------------------------------------------------------------


def trained(host: Any) -> set[str]:
    return {s.param for s in host.sparsify.program.slices}


def test_globs_match_modules_and_structures():
    model = tiny.llama()
    by_module = trained(tiny.lower(model, S2FT(match="*.0.mlp*", units=2)))
    assert by_module == {"model.layers.0.mlp.down_proj.weight"}
    by_leaf = trained(tiny.lower(model, S2FT(match="*.o_proj", units=2)))
    assert by_leaf == {f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}
    both = trained(tiny.lower(model, S2FT(match="model.layers.[1-9].*", units=2)))
    assert both == {"model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"}


def test_structure_field_limits_the_kind():
    model = tiny.llama()
    assert all("mlp" in p for p in trained(tiny.lower(model, S2FT(structure="ffn", units=2))))
    assert all("self_attn" in p for p in trained(tiny.lower(model, S2FT(structure="attention", units=2))))


def test_the_first_rule_that_matches_wins():
    host = tiny.lower(tiny.llama(), S2FT(match="*.0.*", structure="ffn", units=5), S2FT(structure="ffn", units=3))
    assert {s.param: s.length for s in host.sparsify.program.slices} == {
        "model.layers.0.mlp.down_proj.weight": 5,
        "model.layers.1.mlp.down_proj.weight": 3,
    }
    assert {c.structure: c.rule for c in host.sparsify.program.choices} == {
        "model.layers.0.mlp": 0,
        "model.layers.1.mlp": 1,
    }


def test_a_rule_whose_matches_are_all_taken_is_an_error():
    with pytest.raises(
        PlanError,
        match=r"rule 1, S2FT\(match='\*\.0\.\*', structure='ffn', units=3\), matches nothing that is still free",
    ):
        tiny.lower(tiny.llama(), S2FT(structure="ffn", units=5), S2FT(match="*.0.*", structure="ffn", units=3))


def test_an_unused_rule_names_the_nearest_modules():
    with pytest.raises(PlanError, match=r"in pass 'select.*rule 0, .*matches nothing.*did you mean .*mlp\.down_proj"):
        tiny.lower(tiny.llama(), S2FT(match="model.layers.0.mlp.donw_proj", units=3))
    with pytest.raises(PlanError, match=r"known are|did you mean"):
        tiny.lower(tiny.llama(), S2FT(match="zzz*", units=3))


def test_a_named_target_that_cannot_serve_raises_with_the_reason():
    model = tiny.build("Mixtral")
    name = next(s.name for s in sparsify.analyse(model).structures if s.kind == "ffn")
    prune = Prune(match="*.q_proj", sparsity=0.5, method="magnitude")  # beside it experts do not train
    with pytest.raises(RefusedError, match=r"the weight has 3 dimensions: packed experts train where"):
        tiny.lower(model, prune, S2FT(match=name, units=1))
    with pytest.raises(PlanError, match="serves nothing; what it matched was declined"):
        tiny.lower(model, prune, S2FT(structure="ffn", units=1))
    host = tiny.lower(model, prune, S2FT(units=1))  # a glob goes on with what can serve, and reports the rest
    assert any("packed experts" in str(r) for r in host.sparsify.report.declined)
    assert "packed experts" in str(host.sparsify.report)


def test_declined_attention_that_is_named_raises_with_the_reason():
    model = tiny.build("Bloom")
    name = sparsify.analyse(model).declined[0].name
    with pytest.raises(RefusedError, match=re.escape(name)):
        tiny.lower(model, S2FT(match=name, structure="attention", units=1))


def test_data_driven_selection_without_batches_is_an_error():
    for select in ("activation", "product", "gradient"):
        with pytest.raises(
            PlanError, match=rf"rule 0, select='{select}', needs calibration batches: sparsify.compile\(…, calibration"
        ):
            tiny.lower(tiny.llama(), S2FT(units=1, select=select))


def test_compiling_twice_or_without_a_plan_is_an_error():
    host = tiny.lower(tiny.llama(), S2FT(units=1))
    with pytest.raises(PlanError, match="this model is compiled already"):
        tiny.lower(host, S2FT(units=1))
    with pytest.raises(PlanError, match=r"expected a Plan, got list; write Plan"):
        sparsify.compile(tiny.llama(), [S2FT(units=1)])


# --- verification --------------------------------------------------------------------------------------------------------


def sabotaged(name: str, spoil: Any) -> tuple[Pass, ...]:
    """The pipeline with one pass replaced by itself followed by `spoil(program)`."""

    def wrap(step: Pass) -> Pass:
        def run(program: Any, context: Any) -> PassResult:
            result = step.run(program, context)
            return dataclasses.replace(result, program=spoil(result.program))

        return dataclasses.replace(step, run=run) if step.name == name else step

    return tuple(map(wrap, PIPELINE))


def drop_a_move(program: Any) -> Any:
    """One tensor of a structure stays where it was: the permuted model computes something else."""
    move = next(m for m in program.moves if "up_proj" in m.param)
    program.tensors.pop(move.param)
    return program.replaced(moves=tuple(m for m in program.moves if m is not move))


def test_numeric_check_names_the_pass_that_drifted():
    pipeline = sabotaged("permute-weights", drop_a_move)
    tiny.lower(tiny.llama(), S2FT(units=3), pipeline=pipeline)  # unchecked, the mistake goes through
    with pytest.raises(
        VerifyError, match=r"(?s)^in pass 'permute-weights' \(\d/\d+\): output 0 drifted by .*rounding explains"
    ):
        tiny.lower(tiny.llama(), S2FT(units=3), check="numeric", pipeline=pipeline)


# two stacks, Conv1D, GQA, pictures; each pass is the same code on the others, and `test_equivalence` compares every family's outputs
NUMERIC = [
    n if n in ("Llama", "GPT-2", "T5 (gated)", "ViT") else pytest.param(n, marks=pytest.mark.slow)
    for n in tiny.FAMILIES
]


@pytest.mark.parametrize("name", NUMERIC)
def test_numeric_check_passes_on_every_family(name):
    tiny.lower(tiny.build(name), check="numeric")


def test_grammar_names_the_pass_and_prints_the_program():
    def spoil(program: Any) -> Any:
        node: fx.Node = next(iter(program.linears())).node
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(next(n for n in program.graph.nodes if n.op == "placeholder" and not n.users))
        return program

    with pytest.raises(
        VerifyError, match=r"(?s)^in pass 'permute-weights' \(\d/\d+\): the graph's inputs .*LlamaForCausalLM"
    ):
        tiny.lower(tiny.llama(), S2FT(units=3), pipeline=sabotaged("permute-weights", spoil))


def test_a_pass_that_reads_another_stage_is_refused():
    with pytest.raises(VerifyError, match="reads stage CAPTURED, but the program is at STRUCTURED"):
        tiny.lower(tiny.llama(), S2FT(units=3), pipeline=(PIPELINE[0], PIPELINE[0]))


def test_seed_changes_the_selection_and_repeats_it():
    choices = [tiny.lower(tiny.llama(), S2FT(units=4), seed=s).sparsify.program.choices for s in (0, 0, 1)]
    assert choices[0] == choices[1]
    assert choices[0] != choices[2]


def test_selection_does_not_touch_or_depend_on_the_global_generator():
    torch.manual_seed(0)
    first = tiny.lower(tiny.llama(), S2FT(units=4)).sparsify.program.choices
    torch.manual_seed(77)
    model = tiny.llama()
    torch.manual_seed(77)
    before = torch.get_rng_state()
    assert tiny.lower(model, S2FT(units=4)).sparsify.program.choices == first
    assert torch.equal(torch.get_rng_state(), before)


def test_cpu_is_for_inference():
    """Without rules it lowers what is sparse already; a rule that trains is refused."""
    assert Plan([], target="cpu").rules == ()
    with pytest.raises(PlanError, match=re.escape("Plan(target='cpu') is for inference, but S2FT trains parts")):
        Plan([S2FT(units=1)], target="cpu")


def test_plain_pytorch_is_no_target_of_a_plan_but_old_files_open() -> None:
    with pytest.raises(PlanError, match=r"target='reference'\) was never honoured.*SPARSIFY_KERNELS=off"):
        Plan([LoRA()], target="reference")  # type: ignore[arg-type]
    text = Plan([LoRA()]).to_json().replace('"auto"', '"reference"')
    assert '"reference"' in text
    assert Plan.from_json(text) == Plan([LoRA()])
