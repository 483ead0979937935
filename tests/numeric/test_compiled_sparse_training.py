"""Masks and SquareHead under `torch.compile` with its default backend (Inductor): the eager losses, gradients and exact zeros."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from methods import compiled, model_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsify import Prune
from sparsify.modules.masked import check_masks, mask_modules
from sparsify.train.squarehead import Distiller, kl_loss, squarehead_loss


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Code compiled for one test is not found by another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def masked_net() -> tuple[nn.Sequential, dict[str, Tensor]]:
    """A linear, a Conv1D (weight stored `(in, out)`) and a linear without bias, each with a mask."""
    net = nn.Sequential(nn.Linear(13, 12), nn.GELU(), Conv1D(10, 12), nn.Linear(10, 6, bias=False))
    masks = {name: torch.rand(net.get_parameter(name).shape) > 0.6 for name in ("0.weight", "2.weight", "3.weight")}
    mask_modules(net, masks)
    return net, masks


def accumulate(net: nn.Module, call: nn.Module, parts: list[Tensor], half: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients over micro-batches; `call` is the net or its compiled form."""
    net.zero_grad()
    total = 0.0
    for part in parts:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = call(part)
        loss = (y.float() * torch.linspace(-1, 1.5, y.numel()).view(y.shape)).square().mean() / len(parts)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
def test_masked_linears_with_inductor(half: bool) -> None:
    net, masks = masked_net()
    fast: Any = torch.compile(net, fullgraph=True)
    parts = [torch.randn(4, 13), torch.randn(4, 13)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        if step == 2:  # the buffer is written in place: code that is compiled already sees the new mask
            masks["0.weight"] &= torch.rand(12, 13) > 0.3
            net[0].set_mask("weight", masks["0.weight"])  # type: ignore[operator]
        expected, exact = accumulate(net, net, parts, half)
        found, gradients = accumulate(net, fast, parts, half)
        assert found == pytest.approx(expected, rel=1e-2 if half else 1e-5)
        assert set(gradients) == set(exact)
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, exact[name], rtol=2e-2 if half else 1e-4, atol=1e-3 if half else 1e-6)
        for name, mask in masks.items():
            assert bool((gradients[name][~mask] == 0).all())
            assert bool((gradients[name][mask] != 0).any())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        check_masks(net)


def test_the_losses_with_inductor() -> None:
    teacher = [torch.randn(2, 5, 8) * 10**-layer for layer in range(3)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    logits = torch.randn(2, 5, 11)

    def loss(*student: Tensor) -> Tensor:
        *hidden, own = student
        return squarehead_loss(hidden, teacher, mask) + kl_loss(own, logits, mask)

    student = [h * 1.2 + 0.01 * torch.randn(h.shape) for h in teacher] + [torch.randn(2, 5, 11)]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [s.clone().requires_grad_() for s in student]
        value = function(*leaves)
        results.append((value, torch.autograd.grad(value, leaves)))
    (plain, exact), (fast, gradients) = results
    torch.testing.assert_close(fast, plain)
    for found, expected in zip(gradients, exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert bool((gradients[0][0, 3:] == 0).all())  # padding


def padded_batch() -> dict[str, Tensor]:
    ids = tiny.tokens(4, 9)
    mask = (torch.arange(9) < torch.tensor([9, 6, 4, 8])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("family", ["Llama", "GPT-2"])
def test_distilling_a_sparse_model_with_inductor(family: str, half: bool) -> None:
    """CE, KL and SquareHead over uneven micro-batches: losses, every gradient, and zeros through steps with clipping."""
    host = compiled(Prune(sparsity=0.6), name=family).eval()  # no dropout: Inductor draws other numbers
    before = copy.deepcopy(host.state_dict())
    distiller = Distiller(host, model_of(family), ce=1, kl=0.5, sq=1)
    whole = padded_batch()
    micro = [{k: v[:2] for k, v in whole.items()}, {k: v[2:] for k, v in whole.items()}]

    def step(model: nn.Module | None) -> tuple[float, dict[str, Tensor]]:
        host.zero_grad()
        window, total = distiller.window(micro), 0.0
        for part in micro:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                result = distiller(part, window=window, model=model)
            assert result.sq.dtype == torch.float32
            result.loss.backward()
            total += float(result.loss.detach())
        return total, {name: p.grad.clone() for name, p in host.named_parameters() if p.grad is not None}

    expected, exact = step(None)
    fast: Any = torch.compile(host)
    found, gradients = step(fast)
    assert found == pytest.approx(expected, rel=2e-3 if half else 1e-5)
    assert set(gradients) == set(exact)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - exact[name]).norm()) <= (0.05 if half else 1e-4) * float(exact[name].norm()) + 1e-6, (
            name
        )
    for name, mask in host.sparsify.program.masks.items():
        assert bool((gradients[name][~mask] == 0).all())
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-3)
    for _ in range(2):
        torch.nn.utils.clip_grad_norm_(host.parameters(), 0.1)
        optimizer.step()
        check_masks(host)
        after, _ = step(fast)
    assert after < found
    assert any(not torch.equal(t, before[n]) for n, t in host.state_dict().items())
