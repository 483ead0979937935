"""Selections against straightforward reference computations, budgets, determinism, and what scoring leaves untouched."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, PlanError
from sparsify.calibration.statistics import gradient_statistics, input_squares
from sparsify.program.selection import choose, unit_channels

METHODS = ["random", "weight", "activation", "product", "gradient"]


def batches(labels: bool = True) -> list[dict[str, Tensor]]:
    """Two batches with padding on the right; labels are −100 there."""
    found = []
    for seed in (1, 2):
        x = tiny.tokens(3, 8, seed)
        mask = torch.ones_like(x)
        mask[0, 5:] = 0
        mask[2, 3:] = 0
        batch = {"input_ids": x, "attention_mask": mask}
        found.append(batch | ({"labels": x.masked_fill(mask == 0, -100)} if labels else {}))
    return found


def inputs_and_gradients(model: nn.Module, weight: str) -> tuple[list[Tensor], list[Tensor]]:
    """Per batch: unpadded inputs `(tokens, in)` of a linear, and its dense weight gradient `(out, in)`, by plain autograd."""
    module = model.get_submodule(weight.removesuffix(".weight"))
    xs, gs = [], []
    for batch in batches():
        seen: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _m, a, seen=seen: seen.append(a[0].detach()))
        model.zero_grad()
        model(**batch).loss.backward()
        hook.remove()
        xs.append(seen[0][batch["attention_mask"].bool()])
        gs.append(module.weight.grad.clone() if isinstance(module, nn.Linear) else module.weight.grad.t().clone())
    model.zero_grad()
    return xs, gs


def reference(model: nn.Module, method: str, weight: str, channels: Tensor) -> Tensor:
    """The docstring of S2FT(select=…), written down: one score per unit `(units,)`; channels `(units, block)`."""
    module = model.get_submodule(weight.removesuffix(".weight"))
    w = module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().t()
    xs, gs = inputs_and_gradients(model, weight)
    norms = {
        "weight": torch.stack([w[:, c].double().norm() for c in channels]),
        "activation": torch.stack([torch.cat(xs)[:, c].double().square().sum(1).mean().sqrt() for c in channels]),
        "gradient": torch.stack(
            [torch.stack([g[:, c].double().norm() for g in gs]).square().mean().sqrt() for c in channels]
        ),
    }
    norms["product"] = norms["weight"] * norms["activation"]
    return norms[method]


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_selection_equals_a_straightforward_computation(family, method, largest):
    model = tiny.build(family)
    rule = S2FT(structure="ffn", units=7, select=method, largest=largest)
    host = tiny.lower(model, rule, calibration=batches())
    by_name = {s.name: s for s in host.sparsify.program.structures}
    assert len(host.sparsify.program.choices) == 2
    for choice in host.sparsify.program.choices:
        structure = by_name[choice.structure]
        site = structure.consumers[0]
        score = reference(model, method, site.param, unit_channels(site, structure))
        expected = score.topk(7, largest=largest).indices
        assert set(choice.consumers) == set(expected.tolist())
        torch.testing.assert_close(
            torch.tensor(choice.scores, dtype=torch.float64),
            score[torch.tensor(choice.consumers)],
            rtol=1e-4,
            atol=1e-9,
        )


@pytest.mark.parametrize("method", METHODS[1:])
def test_heads_are_scored_by_their_columns_of_o(method):
    model = tiny.llama(num_key_value_heads=6)  # one query head per KV head: heads are free
    host = tiny.lower(model, S2FT(structure="attention", units=2, select=method, largest=True), calibration=batches())
    for choice in host.sparsify.program.choices:
        structure = next(s for s in host.sparsify.program.structures if s.name == choice.structure)
        site = structure.consumers[0]
        score = reference(model, method, site.param, torch.arange(48).view(6, 8))
        assert set(choice.consumers) == set(score.topk(2).indices.tolist())


@pytest.mark.parametrize("largest", [False, True])
def test_under_grouped_queries_the_best_whole_groups_and_the_best_of_one_more_are_taken(largest):
    model = tiny.llama()  # six heads in two groups
    host = tiny.lower(model, S2FT(structure="attention", units=4, select="weight", largest=largest))
    for choice in host.sparsify.program.choices:
        site = next(s for s in host.sparsify.program.structures if s.name == choice.structure).consumers[0]
        score = reference(model, "weight", site.param, torch.arange(48).view(6, 8)).view(2, 3) * (1 if largest else -1)
        whole = int(score.mean(1).argmax())
        other = 1 - whole
        expected = {3 * whole, 3 * whole + 1, 3 * whole + 2, 3 * other + int(score[other].argmax())}
        assert set(choice.consumers) == expected


def test_padding_does_not_count():
    model = tiny.llama()
    short = batches()
    noisy = [dict(b) for b in short]
    for batch in noisy:
        batch["input_ids"] = torch.where(
            batch["attention_mask"].bool(), batch["input_ids"], torch.full_like(batch["input_ids"], 50)
        )
    name = "model.layers.0.mlp.down_proj"
    squares = [input_squares(model, {name: model.get_submodule(name)}, b, progress=False)[name] for b in (short, noisy)]
    torch.testing.assert_close(squares[0], squares[1])
    unmasked = [{"input_ids": b["input_ids"]} for b in noisy]
    assert not torch.allclose(
        squares[0], input_squares(model, {name: model.get_submodule(name)}, unmasked, progress=False)[name]
    )


def test_decoder_padding_is_not_taken_from_the_encoder_mask():
    """Encoder and decoder inputs of equal length: the encoder's mask says nothing about the decoder's tokens."""
    model = tiny.build("T5 (gated)")
    x = tiny.tokens(2, 5)
    mask = torch.ones_like(x)
    mask[0, 1:] = 0
    batch = {"input_ids": x, "attention_mask": mask, "decoder_input_ids": tiny.tokens(2, 5, seed=8)}
    name = next(
        s.consumers[0].param for s in sparsify.analyse(model).structures if s.kind == "ffn" and "decoder" in s.name
    )
    module = model.get_submodule(name.removesuffix(".weight"))
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _m, a: seen.append(a[0].detach()))
    model(**batch)
    hook.remove()
    found = input_squares(model, {"it": module}, [batch], progress=False)["it"]
    torch.testing.assert_close(found, seen[0].double().square().flatten(0, 1).mean(0), rtol=1e-5, atol=1e-9)


def test_random_selection_covers_all_units_over_seeds():
    model = tiny.llama()
    seen: set[int] = set()
    for seed in range(12):
        host = tiny.lower(model, S2FT(match="*.0.mlp*", units=22), seed=seed)
        seen |= set(host.sparsify.program.choices[0].consumers)
    assert seen == set(range(44))


def test_layers_draw_independently():
    choices = tiny.lower(tiny.llama(), S2FT(structure="ffn", units=12)).sparsify.program.choices
    assert choices[0].consumers != choices[1].consumers


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_layer_trains_at_least_one_unit(name):
    """With budget="structure"; within a total budget one unit trains at least."""
    model = tiny.build(name)
    host = tiny.lower(model, S2FT(fraction=1e-6, producer_fraction=1e-6, budget="structure"))
    assert len(host.sparsify.program.choices) > 1
    assert all(len(c.consumers) == 1 and len(c.producers) == 1 for c in host.sparsify.program.choices)
    choices = tiny.lower(model, S2FT(fraction=1e-6, producer_fraction=1e-6)).sparsify.program.choices
    assert sum(len(c.consumers) for c in choices) == sum(len(c.producers) for c in choices) == 1


def test_o_and_down_get_equal_parameters_within_one_unit():
    model = tiny.llama(
        hidden_size=48, intermediate_size=100, head_dim=2, num_attention_heads=24, num_key_value_heads=24
    )
    for fraction in (0.05, 0.1, 0.25):
        host = tiny.lower(model, S2FT(fraction=fraction))
        size = {"attention": 0, "ffn": 0}
        for piece in host.sparsify.program.slices:
            size["attention" if "attn" in piece.structure else "ffn"] += 48 * piece.length
        unit = 2 * 48 * 2  # one head (the coarser unit) in each of two layers
        assert abs(size["attention"] - size["ffn"]) <= unit
        total = 2 * (48 * 48 + 48 * 100)
        assert abs(sum(size.values()) - fraction * total) <= unit


def test_balance_by_units_gives_equal_shares():
    model = tiny.llama(
        hidden_size=40, intermediate_size=100, head_dim=2, num_attention_heads=20, num_key_value_heads=20
    )
    host = tiny.lower(model, S2FT(fraction=0.1, balance="units"))
    assert {len(c.consumers) for c in host.sparsify.program.choices} == {2, 10}


def test_fraction_one_trains_everything_and_moves_nothing():
    host = tiny.lower(tiny.llama(), S2FT(fraction=1.0))
    assert host.sparsify.program.moves == ()
    assert {s.length for s in host.sparsify.program.slices} == {48, 44}


def test_producer_fraction_trains_rows_of_v_and_up():
    host = tiny.lower(tiny.llama(), S2FT(units=1, producer_fraction=0.5))
    rows = {s.param.split(".")[-2]: s.length for s in host.sparsify.program.slices if s.side == "row"}
    assert rows == {"v_proj": 8, "up_proj": 22}


# --- side effects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_scoring_leaves_gradients_flags_modes_and_hooks_as_they_were(method):
    model = tiny.llama()
    model.train()
    model.model.layers[0].eval()
    grads = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number % 3 != 0)
        if number % 2:
            parameter.grad = torch.full_like(parameter, float(number))
            grads[name] = parameter.grad.clone()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    base = tiny.snapshot(model)
    tiny.lower(model, S2FT(units=2, select=method), calibration=batches())
    assert {n: p.grad for n, p in model.named_parameters() if p.grad is not None}.keys() == grads.keys()
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if n in grads)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == modes
    assert [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ] == hooks
    tiny.assert_same(tiny.snapshot(model), base)


def test_flags_are_put_back_when_scoring_fails():
    model = tiny.llama()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(PlanError, match=r"gradient scores need a loss: put labels into the calibration batches"):
        tiny.lower(model, S2FT(units=2, select="gradient"), calibration=batches(labels=False))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_a_loss_of_the_user_is_used():
    model = tiny.llama()
    calls = []

    def loss(outputs: Any, batch: Any) -> Tensor:
        calls.append(set(batch))
        return outputs.logits.float().square().mean()

    tiny.lower(model, S2FT(units=2, select="gradient"), calibration=batches(labels=False), loss=loss)
    assert calls == [{"input_ids", "attention_mask"}] * 2


def test_one_dense_gradient_is_alive_at_a_time():
    model = tiny.llama(num_hidden_layers=4)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    size = 36 * 44
    alive, calls = [], []

    def live_gradients() -> int:
        gc.collect()  # of what was made since `gc.freeze`: a whole session's objects take seconds each time
        own = {p.data_ptr() for p in model.parameters()}
        found = [
            t
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.numel() == size and t.shape == (36, 44) and t.data_ptr() not in own
        ]
        return len({t.data_ptr() for t in found})

    def reduce(name: str, gradient: Tensor) -> None:
        calls.append(name)
        assert gradient.shape == (36, 44)
        alive.append(live_gradients())

    gc.freeze()
    before = live_gradients()
    gradient_statistics(model, {n: model.get_submodule(n) for n in names}, batches(), reduce, progress=False)
    assert calls == [*reversed(names)] * 2, "layer by layer, from the top, once per batch"
    assert max(alive) - before == 1
    assert all(p.grad is None for p in model.parameters())


def test_calibration_that_never_runs_a_module_is_an_error():
    model = tiny.llama()
    idle = nn.Linear(3, 3)
    with pytest.raises(PlanError, match="the calibration batches never ran idle"):
        input_squares(model, {"idle": idle}, batches(labels=False), progress=False)


def test_choice_breaks_ties_by_the_lower_id():
    assert choose(torch.zeros(6), 2) == (0, 1)
    assert choose(torch.zeros(6), 4, group=3) == (0, 1, 2, 3)
    assert choose(torch.tensor([1.0, 5.0, 3.0]), 1, largest=False) == (0,)
    assert choose(torch.tensor([1.0, 5.0, 3.0]), 9) == (0, 1, 2)


def test_more_units_than_a_structure_has_are_declined_or_refused():
    """Under a wildcard the structure is left out, with the reason; by name it raises; where nothing is left, too."""
    model = tiny.llama()
    heads = max(s.units * (s.inner.units if s.inner else 1) for s in tiny.lower(model, S2FT(units=1)).sparsify.program.structures if s.kind == "attention")  # fmt: skip
    program = tiny.lower(model, S2FT(units=heads + 1)).sparsify.program
    assert {len(c.consumers) for c in program.choices} == {heads + 1}
    chosen = {c.structure for c in program.choices}
    assert {s.kind for s in program.structures if s.name in chosen} == {"ffn"}
    reasons = [str(r) for r in program.refusals if f"units={heads + 1} is more than its {heads} heads" in r.reason]
    assert len(reasons) == model.config.num_hidden_layers
    assert all(reason in str(tiny.lower(model, S2FT(units=heads + 1)).sparsify.report) for reason in reasons)
    name = next(s.name for s in program.structures if s.kind == "attention")
    with pytest.raises(sparsify.RefusedError, match=f"is more than its {heads} heads; write units≤{heads}"):
        tiny.lower(model, S2FT(match=name, units=heads + 1))
    with pytest.raises(PlanError, match="channels; write units"):
        tiny.lower(model, S2FT(structure="ffn", units=10**6))
    assert tiny.lower(model, S2FT(match=name, units=heads)).sparsify.program.choices  # all of them is right


def test_a_generator_of_batches_serves_every_rule():
    model = tiny.llama()
    rules = (
        S2FT(structure="ffn", match="*.0.*", units=3, select="activation"),
        S2FT(structure="ffn", match="*.1.*", units=3, select="gradient"),
    )
    listed = tiny.lower(model, *rules, calibration=batches()).sparsify.program.choices
    given = tiny.lower(model, *rules, calibration=(batch for batch in batches())).sparsify.program.choices
    assert len(given) == 2
    assert given == listed
