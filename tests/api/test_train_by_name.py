"""Small parameters that train in full, by name: biases and norms, alone and beside rules that reorder them."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

import sparsify
from sparsify import S2FT, Plan, PlanError

SMALL = ["*.bias", "*ln_*"]
S = S2FT(structure="ffn", fraction=0.2)


def host_of(model, *rules, seed: int = 0):
    return sparsify.compile(model, Plan(list(rules), train=SMALL, seed=seed), progress=False)


@pytest.fixture(scope="module")
def model():
    return tiny.build("GPT-2", torch.float64)


def test_biases_that_a_rule_reorders_get_their_dense_gradient(model):
    host = host_of(model, S)
    moved = {move.param for move in host.sparsify.program.moves}
    assert any(name.endswith("c_fc.bias") for name in moved), "the rule permutes the feed-forward's inner channels"
    inputs = tiny.inputs_of(host)
    dense = copy.deepcopy(model)
    tiny.probe_loss(dense(**inputs)).backward()
    tiny.probe_loss(host(**inputs)).backward()
    trained = {n for n, p in host.named_parameters() if p.requires_grad and "weight_slice" not in n}
    assert trained == {n for n, p in model.named_parameters() if n.endswith(".bias") or ".ln_" in n}
    for name in trained:
        found = host.sparsify.layout(name).to_original(name.rpartition(".")[2], host.get_parameter(name).grad)
        torch.testing.assert_close(found, dense.get_parameter(name).grad, rtol=1e-9, atol=1e-11)


def test_files_hold_them_in_the_models_own_order(model, tmp_path):
    host = host_of(model, S)
    tiny.disturb(host, 0.1)
    want = tiny.output_of(host(**tiny.inputs_of(host)))
    host.sparsify.save_adapter(tmp_path)
    for other in (host_of(model, S, seed=5), host_of(model, S), sparsify.load(model, tmp_path)):
        other.sparsify.load_adapter(tmp_path, "a")
        other.sparsify.set_adapter("a")
        torch.testing.assert_close(tiny.output_of(other(**tiny.inputs_of(host))), want, rtol=1e-9, atol=1e-9)
    host.sparsify.load_adapter(tmp_path, "b")
    host.sparsify.set_adapter({"b": 0.5, "default": 0.5})
    torch.testing.assert_close(tiny.output_of(host(**tiny.inputs_of(host))), want, rtol=1e-9, atol=1e-9)
    host.sparsify.set_adapter("default")
    state, plain = host.sparsify.original_state_dict(), copy.deepcopy(model)
    plain.load_state_dict(state)
    torch.testing.assert_close(tiny.output_of(plain(**tiny.inputs_of(host))), want, rtol=1e-9, atol=1e-9)
    again = host_of(model, S, seed=5)
    again.load_state_dict(state)
    torch.testing.assert_close(tiny.output_of(again(**tiny.inputs_of(host))), want, rtol=1e-9, atol=1e-9)
    tiny.assert_same(host.sparsify.restore().state_dict(), model.state_dict())


def test_they_train_alone(model, tmp_path):
    host = host_of(model)
    assert host.sparsify.count_parameters()[0] == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith(".bias") or ".ln_" in n
    )
    losses = tiny.train(host, steps=3)
    assert losses[-1] < losses[0]
    host.sparsify.save_adapter(tmp_path)
    want = tiny.output_of(host(**tiny.inputs_of(host)))
    served = sparsify.load(model, tmp_path)
    torch.testing.assert_close(tiny.output_of(served(**tiny.inputs_of(host))), want, rtol=1e-12, atol=1e-12)
    assert served.sparsify.plan == host.sparsify.plan == Plan.from_json(host.sparsify.plan.to_json())
    with pytest.raises(sparsify.AdapterError, match="nothing low-rank was trained"):
        host.sparsify.export_lora(tmp_path / "peft")


def test_a_plan_without_anything_is_refused():
    with pytest.raises(PlanError, match=r"no rules, so nothing would train; train=\['\*\.bias'\]"):
        Plan([])
    with pytest.raises(PlanError, match="is for inference, but train=… trains"):
        Plan([], train=["*.bias"], target="cpu")


def test_a_plan_file_may_name_parameters_alone(tmp_path):
    from sparsify.plan import plan_file

    path = tmp_path / "plan.yaml"
    path.write_text('model: m\ntrain: ["*.bias"]\n')
    assert plan_file.read(path).plan == Plan([], train=["*.bias"])
    path.write_text("model: m\n")
    with pytest.raises(PlanError, match="rules: expected a list"):
        plan_file.read(path)
