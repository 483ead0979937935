"""The budget of S2FT: what trains is at most what was asked, near it, shared by both sides, and said in the report."""

from __future__ import annotations

import pytest
import tiny
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsify
from sparsify import S2FT, Plan
from sparsify.errors import RefusedError
from sparsify.program.unit_budget import Row, at_least_one, cost_of, unit_counts


def model_rows(layers: int, heads: int, head: int, channels: int, width: int) -> list[Row]:
    """O and Down of a decoder."""
    rows = []
    for layer in range(layers):
        rows += [
            Row(f"{layer}.attn", "attention", heads, head * width),
            Row(f"{layer}.mlp", "ffn", channels, width),
        ]
    return rows


SMOL = model_rows(30, 9, 64, 1536, 576)  # SmolLM2-135M
LLAMA = model_rows(32, 32, 128, 14336, 4096)  # Llama-3-8B


@pytest.mark.parametrize(
    ("rows", "fraction", "heads", "channels"),
    [
        (SMOL, 0.01, 0, 21),  # half of the budget is a sixth of a head: channels take all of it
        (SMOL, 0.03, 0, 63),
        (SMOL, 0.04, 1, 20),  # two thirds of a head are nearer to one; channels take what is left
        (SMOL, 0.1, 2, 83),
        (SMOL, 1.0, 9, 1536),
        (LLAMA, 0.03, 2, 296),
    ],
)
def test_known_models(rows, fraction, heads, channels):
    counts = unit_counts(rows, fraction, "parameters")
    assert {counts[row.name] for row in rows if row.kind == "attention"} == {heads}
    assert {counts[row.name] for row in rows if row.kind == "ffn"} == {channels}
    total, asked = sum(row.size for row in rows), fraction * sum(row.size for row in rows)
    layers = len(rows) // 2
    assert asked - layers * rows[1].cost < cost_of(rows, counts) <= asked * (1 + 1e-9) <= total * (1 + 1e-9)


def test_each_structure_by_itself_trains_more_than_was_asked():
    """What budget="structure" means, and what the default is for."""
    asked = 0.01 * sum(row.size for row in SMOL)
    assert 3.5 < cost_of(SMOL, at_least_one(SMOL, 0.01, "parameters")) / asked < 3.7
    assert 0.95 < cost_of(SMOL, unit_counts(SMOL, 0.01, "parameters")) / asked <= 1


@settings(max_examples=300, deadline=None)
@given(
    layers=st.integers(1, 5),
    heads=st.integers(1, 7),
    head=st.integers(1, 5),
    channels=st.integers(1, 40),
    width=st.integers(1, 9),
    fraction=st.floats(1e-6, 1.0),
    balance=st.sampled_from(["parameters", "units"]),
)
def test_never_above_and_near(layers, heads, head, channels, width, fraction, balance):
    rows = model_rows(layers, heads, head, channels, width)
    counts = unit_counts(rows, fraction, balance)
    asked, trained = fraction * sum(row.size for row in rows), cost_of(rows, counts)
    cheapest, dearest = min(row.cost for row in rows), max(row.cost for row in rows)
    assert all(0 <= counts[row.name] <= row.units for row in rows)
    assert 0 < trained <= max(asked * (1 + 1e-9), cheapest)
    full = all(counts[row.name] == row.units for row in rows if row.cost == cheapest)
    step = layers * (dearest if full else cheapest)
    assert trained > asked * (1 - 1e-9) - step, "less than one more unit in each layer is left over"


def test_a_budget_below_one_unit_a_layer_is_spread_over_layers():
    rows = model_rows(8, 6, 8, 44, 36)
    counts = unit_counts([row for row in rows if row.kind == "attention"], 0.07, "parameters")  # 3.36 heads in all
    assert [counts[f"{layer}.attn"] for layer in range(8)] == [0, 1, 0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("fraction", "balance", "expected"),
    [(0.1, "parameters", {"self_attn": 1, "mlp": 1}), (0.08, "parameters", {"mlp": 7}), (0.08, "units", {"mlp": 7})],
)
def test_compiled_hosts_train_what_was_asked(fraction, balance, expected):
    """Six heads of 288 parameters and 44 channels of 36, in two layers."""
    host = tiny.lower(tiny.llama(), S2FT(fraction=fraction, balance=balance))
    choices = host.sparsify.program.choices
    assert [{c.structure.rpartition(".")[2]: len(c.consumers)} for c in choices] == [
        {side: count} for _ in range(2) for side, count in expected.items()
    ]
    asked, total = fraction * 2 * (48 * 36 + 44 * 36), 2 * (48 * 36 + 44 * 36)
    trained = sum(p.numel() for p in tiny.trainable(host))
    assert asked - 2 * 36 < trained <= asked
    (budget,) = host.sparsify.report.budgets
    assert (budget.trained, budget.total, budget.of) == (trained, total, "O, Down")
    assert f"asked for {fraction:.4%} of {total:,} parameters of O, Down, and {trained / total:.4%} train" in str(
        host.sparsify.report
    )


def test_attention_that_gave_way_is_declined_with_the_reason():
    report = tiny.lower(tiny.llama(), S2FT(fraction=0.05)).sparsify.report
    reasons = {r.where: r.reason for r in report.declined}
    assert reasons["model.layers.0.self_attn"] == (
        "the budget of rule 0 (331 parameters) has no head of 288 parameters for it: ask for more, or let each structure train one "
        'at least (budget="structure")'
    )
    both = tiny.lower(tiny.llama(), S2FT(fraction=0.05, budget="structure")).sparsify
    assert len(both.program.choices) == 4
    assert both.report.budgets[0].trained > both.report.budgets[0].asked


def test_a_named_structure_out_of_reach_is_an_error():
    names = ["model.layers.0.self_attn", "model.layers.0.mlp"]
    with pytest.raises(RefusedError, match=r"self_attn: the budget of rule 0 .* has no head of 288 parameters for it"):
        tiny.lower(tiny.llama(), S2FT(match=names, fraction=0.05))


def test_rows_of_producers_have_a_budget_of_their_own():
    host = tiny.lower(tiny.llama(), S2FT(fraction=0.3, producer_fraction=0.1))
    consumers, producers = host.sparsify.report.budgets
    assert (consumers.of, producers.of) == ("O, Down", "V, Up")
    assert producers.trained == sum(36 * s.length for s in host.sparsify.program.slices if s.side == "row")
    assert 0 < producers.trained <= producers.asked
    assert {s.param.split(".")[-2] for s in host.sparsify.program.slices if s.side == "row"} == {"up_proj"}


def test_a_host_of_which_only_channels_train_keeps_its_outputs_and_adapters(tmp_path):
    model = tiny.llama()
    host = tiny.lower(model, S2FT(fraction=0.05), check="numeric")
    x = tiny.tokens()
    assert (host(x).logits - model(x).logits).abs().max() < 1e-5
    tiny.train(host)
    host.sparsify.save_adapter(tmp_path)
    fresh = tiny.lower(tiny.llama(), S2FT(fraction=0.05))
    fresh.sparsify.load_adapter(tmp_path, "a")
    fresh.sparsify.set_adapter("a")
    assert (fresh(x).logits == host(x).logits).all()


def test_on_shapes_of_a_small_real_model():
    """SmolLM2-135M's shapes with six of its layers, without memory."""
    config = hf.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=256, max_position_embeddings=64,
    )  # fmt: skip
    host = sparsify.compile(hf.LlamaForCausalLM(config), Plan([S2FT(fraction=0.01)]), progress=False)
    (budget,) = host.sparsify.report.budgets
    assert budget.trained == 6 * 21 * 576 <= budget.asked
