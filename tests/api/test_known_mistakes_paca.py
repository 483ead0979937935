"""One test for every mistake of the authors' PaCA code."""

from __future__ import annotations

import copy

import methods
import pytest
import tiny
import torch
from methods import compiled, logits, model_of, plain_with
from torch import Tensor

from sparsify import PaCA


def reference_training(steps: int, lr: float, x: Tensor) -> tuple[list[float], dict[str, Tensor]]:
    """The same training with dense weights and gradients masked to the same columns, fp64, plain SGD."""
    host = compiled(PaCA(rank=4), dtype=torch.float64)
    columns = {s.param: torch.tensor(s.channels) for s in host.sparsify.program.slices}
    model = copy.deepcopy(model_of(dtype=torch.float64)).requires_grad_(False)
    parameters = dict(model.named_parameters())
    losses = []
    for param in columns:
        parameters[param].requires_grad_(True)
    for _ in range(steps):
        loss = tiny.probe_loss(model(x))
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for param, chosen in columns.items():
                parameters[param][:, chosen] -= lr * parameters[param].grad[:, chosen]
                parameters[param].grad = None
    return losses, {p: parameters[p].detach() for p in columns}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_step_runs_on_stale_weights(checkpointing):
    """Without checkpointing, every second step of theirs ran on the weights of the step before."""
    x = tiny.tokens()
    losses, weights = reference_training(5, 1e-3, x)
    host = compiled(PaCA(rank=4), dtype=torch.float64).train()
    if checkpointing:
        host.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(tiny.trainable(host), lr=1e-3)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = tiny.probe_loss(host(x))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    torch.testing.assert_close(found, losses, rtol=1e-9, atol=0)
    assert len({round(v, 9) for v in losses}) == 5
    now = methods.state(host, model_of())
    for param, weight in weights.items():
        torch.testing.assert_close(now[param], weight, rtol=1e-9, atol=1e-12)


def test_evaluation_is_not_one_step_behind():
    host = compiled(PaCA(rank=4))
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
    seen = []
    for _ in range(3):
        host.train()
        tiny.probe_loss(host(tiny.tokens())).backward()
        optimizer.step()
        optimizer.zero_grad()
        host.eval()
        seen.append(logits(host))
        torch.testing.assert_close(seen[-1], logits(plain_with(host)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2])


def test_a_reloaded_adapter_is_not_a_no_op(tmp_path):
    host = compiled(PaCA(rank=4))
    tiny.train(host)
    expected = logits(host)
    host.sparsify.save_adapter(tmp_path)
    fresh = compiled(PaCA(rank=4))
    base = logits(fresh)
    fresh.sparsify.load_adapter(tmp_path, "again")
    fresh.sparsify.set_adapter("again")
    torch.testing.assert_close(logits(fresh), expected, atol=1e-6, rtol=1e-5)  # base + (value − base) rounds once
    assert not torch.allclose(expected, base, atol=1e-3)


def test_disabling_the_adapter_restores_the_base_and_enabling_it_the_training():
    host = compiled(PaCA(rank=4))
    base = logits(host)
    tiny.train(host)
    trained = logits(host)
    host.sparsify.set_adapter(None)
    assert torch.equal(logits(host), base)
    tiny.assert_same(methods.state(host, model_of()), dict(model_of().state_dict()))
    host.sparsify.set_adapter("default")
    assert torch.equal(logits(host), trained)


def test_merge_can_be_undone_bit_for_bit_and_training_goes_on():
    host = compiled(PaCA(rank=4), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
    twin = copy.deepcopy(host)
    other = torch.optim.AdamW(tiny.trainable(twin), lr=1e-2)
    for step in range(3):
        for model, opt in ((host, optimizer), (twin, other)):
            tiny.probe_loss(model(tiny.tokens())).backward()
            opt.step()
            opt.zero_grad()
        if step == 1:
            before = logits(host)
            host.sparsify.merge()
            host.sparsify.unmerge()
            assert torch.equal(logits(host), before)
    assert torch.equal(logits(host), logits(twin))


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 2, 3, 12), (0, 12), (2, 0, 12)], ids=str)
def test_inputs_of_any_rank(shape):
    host = compiled(PaCA(rank=4), name="Mlp")
    x = torch.randn(shape)
    torch.testing.assert_close(host(x), model_of("Mlp")(x))
    host(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in tiny.trainable(host))


def test_conv1d_trains():
    host = compiled(PaCA(rank=4), name="GPT-2")
    kinds = {type(host.get_submodule(s.param.rpartition(".")[0])).__name__ for s in host.sparsify.program.slices}
    assert kinds == {"PartialConv1D"}
    losses = tiny.train(host, steps=4)
    assert losses[-1] < losses[0]


def test_no_weight_of_a_bf16_base_moves_before_the_first_step():
    """Dividing by the scale and multiplying again changed 14 % of theirs."""
    base = model_of(dtype=torch.bfloat16)
    host = compiled(PaCA(rank=4), dtype=torch.bfloat16)
    now = methods.state(host, base)
    for param, value in base.state_dict().items():
        assert torch.equal(now[param], value), param
    host(tiny.tokens())
    tiny.assert_same(methods.state(host, base), now)


def test_writing_a_trained_block_between_forward_and_backward_is_noticed():
    """Their writes through `.data` went past autograd's version counters, so the gradient was silently wrong."""
    host = compiled(PaCA(rank=4))
    loss = tiny.probe_loss(host(tiny.tokens()))
    with torch.no_grad():
        tiny.trainable(host)[-1].add_(1.0)  # the first layer's blocks go into no gradient of an input
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_linears_of_one_input_do_not_draw_on_their_own():
    channels = {s.param: s.channels for s in compiled(PaCA(rank=4)).sparsify.program.slices}
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({channels[f"{layer}.self_attn.{n}_proj.weight"] for n in "qkv"}) == 1
        assert len({channels[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up")}) == 1
