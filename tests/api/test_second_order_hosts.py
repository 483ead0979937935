"""Gradient penalties and Hessian–vector products of whole hosts, and their forward-mode derivatives, against differences of first ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import methods
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, Prune, Quantize, RoSA
from sparsify.modules.masked import rezero

STEP = 1e-5
HOSTS: dict[str, tuple[str, list[Any]]] = {
    "s2ft": ("gated", [S2FT(structure="ffn", fraction=0.3, producer_fraction=0.3)]),
    "s2ft attention": ("GPT-2", [S2FT(structure="attention", fraction=0.3)]),
    "paca gathered": ("GPT-2", [PaCA(rank=4, permute=False)]),
    "rosa": ("gated", [RoSA(rank=2, density=0.1, mask="random")]),
    "lora": ("GPT-2", [LoRA(rank=2)]),
    "int8+paca": ("gated", [Quantize(format="int8"), PaCA(rank=4)]),
    "nf4+lora": ("GPT-2", [Quantize(format="nf4"), LoRA(rank=2)]),
    "int4+s2ft": ("gated", [Quantize(format="int4"), S2FT(fraction=0.3)]),
    "nf4+rosa": ("gated", [Quantize(format="nf4"), RoSA(rank=2, density=0.1, mask="random")]),
    "prune+paca": ("GPT-2", [Prune(sparsity=0.5, method="magnitude"), PaCA(rank=4, permute=False)]),
    "prune": ("GPT-2", [Prune(sparsity=0.5, method="magnitude")]),
}
QUICK = ("s2ft", "paca gathered", "rosa", "prune")


class Gated(nn.Module):
    """Two gated feed-forwards, whose Down saves the factors of its input: nothing in it is computed in less than fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(*s) for n, s in (("gate", (8, 12)), ("up", (8, 12)), ("down", (12, 8)))})
            for _ in range(2)
        )

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["down"](nn.functional.silu(block["gate"](x)) * block["up"](x))
        return x


@functools.cache
def compiled(rules: str) -> nn.Module:
    name, plan = HOSTS[rules]
    if name != "gated":
        return methods.compiled(*plan, name=name, dtype=torch.float64)
    torch.manual_seed(0)
    example = {"inputs_embeds": torch.randn(2, 5, 8, dtype=torch.float64)}
    return sparsify.compile(
        Gated().double(),
        Plan(plan),
        example=example,
        calibration=[example],
        loss=lambda y, _: y.square().sum(),
        progress=False,
    )


def scene(rules: str) -> tuple[nn.Module, dict[str, nn.Parameter], Callable[[], Tensor], Tensor]:
    """The host with its trained parts moved off their start, its trained parameters, its loss, and the embeddings it is of."""
    host = copy.deepcopy(compiled(rules))
    tiny.disturb(host)
    rezero(host)
    trained = {n: p for n, p in host.named_parameters() if p.requires_grad}
    config: Any = getattr(host, "config", None)
    width = 8 if config is None else config.hidden_size
    embeddings = torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return tiny.output_of(host(inputs_embeds=embeddings)).tanh().square().sum()

    return host, trained, loss, embeddings


def directions(trained: dict[str, nn.Parameter]) -> list[Tensor]:
    """Random ones; a pruned weight stays pruned."""
    return [torch.randn_like(p) * (p != 0) for p in trained.values()]


def difference(trained: dict[str, nn.Parameter], along: list[Tensor], function: Callable[[], Tensor]) -> Tensor:
    """`(function(p + h v) − function(p − h v)) / 2h`."""
    values = []
    for sign in (1.0, -2.0, 1.0):
        with torch.no_grad():
            for p, v in zip(trained.values(), along, strict=True):
                p.add_(v, alpha=sign * STEP)
        values.append(function().detach())
    return (values[0] - values[1]) / (2 * STEP)


@pytest.mark.parametrize("rules", [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in HOSTS])
def test_penalty_and_hessian_vector_product(rules):
    _, trained, loss, embeddings = scene(rules)
    along, parameters = directions(trained), list(trained.values())

    def penalty() -> Tensor:
        (g,) = torch.autograd.grad(loss(), embeddings, create_graph=True)
        return g.square().sum()

    def gradient() -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), [*parameters, embeddings])])

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward has no derivative
        found = sum((g * v).sum() for g, v in zip(torch.autograd.grad(penalty(), parameters), along, strict=True))
        expected = difference(trained, along, penalty)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 * float(penalty().detach()))

        first = torch.autograd.grad(loss(), parameters, create_graph=True)
        product = torch.stack([(g * v).sum() for g, v in zip(first, along, strict=True)]).sum()
        second = torch.cat([g.flatten() for g in torch.autograd.grad(product, [*parameters, embeddings])])
        expected = difference(trained, along, gradient)
        scale = float(expected.abs().max())
        assert scale > 1e-6, "the product must not vanish"
        torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("rules", ["s2ft", "rosa", "int8+paca", "prune"])
def test_forward_mode_and_per_sample_gradients(rules):
    """`torch.func` over `functional_call`: a directional derivative, and one gradient per sample."""
    host, trained, _, embeddings = scene(rules)
    along = dict(zip(trained, directions(trained), strict=True))

    def loss_at(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
        outputs = torch.func.functional_call(host, parameters, (), {"inputs_embeds": rows})
        return tiny.output_of(outputs).tanh().square().sum()

    parameters = {n: p.detach() for n, p in trained.items()}
    with sdpa_kernel(SDPBackend.MATH):
        tangent = torch.func.jvp(lambda p: loss_at(p, embeddings.detach()), (parameters,), (along,))[1]
        gradients = torch.autograd.grad(loss_at(dict(trained), embeddings.detach()), list(trained.values()))
        expected = sum((g * v).sum() for g, v in zip(gradients, along.values(), strict=True))
        torch.testing.assert_close(tangent, expected)
        each = [torch.func.grad(loss_at)(parameters, row[None]) for row in embeddings.detach()]
        for place, name in enumerate(trained):
            torch.testing.assert_close(sum(g[name] for g in each), gradients[place])
