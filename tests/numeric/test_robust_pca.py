"""A control with a known answer: one 128 × 128 linear whose true change is 1,024 entries + rank 4, of equal energy (robust PCA).

2,048 trained parameters each: RoSA finds both parts, LoRA only the low rank, sparse entries only what is sparse; and RoSA is no better than
LoRA where its entries are drawn at random. What is compared is ‖W + change − truth‖² as a share of ‖truth − W‖².
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import sparsify
from sparsify import LoRA, Plan, RoSA
from sparsify.train.rosa import collect_masks

WIDTH, RANK, ENTRIES = 128, 4, 1024
WARM_UP, STEPS = 80, 160


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@cache
def problem() -> tuple[Tensor, Tensor, frozenset[int]]:
    """`(W, change, places)`: the base, what it should learn, and the entries of its sparse part."""
    g = torch.Generator().manual_seed(0)
    low = torch.randn(WIDTH, RANK, generator=g) @ torch.randn(RANK, WIDTH, generator=g)
    places = torch.randperm(WIDTH * WIDTH, generator=g)[:ENTRIES]
    sparse = torch.zeros(WIDTH * WIDTH)
    sparse[places] = torch.randn(ENTRIES, generator=g).sign() * (1 + torch.rand(ENTRIES, generator=g))
    base = (torch.rand(WIDTH, WIDTH, generator=g) * 2 - 1) * WIDTH**-0.5
    change = 16 * (low / low.norm() + sparse.view(WIDTH, WIDTH) / sparse.norm())
    return base, change, frozenset(places.tolist())


@cache
def outcome(rule: Any, warm_up: int = WARM_UP) -> tuple[float, float]:
    """`(share of the error that is left, share of the true entries that the mask found)` after RoSA's schedule or plain training."""
    base, change, places = problem()
    model = One()
    model.linear.weight.data.copy_(base)
    host: Any = sparsify.compile(model, Plan([rule]), example=(torch.randn(2, WIDTH),), progress=False)
    parameters = [p for p in host.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == 2 * ENTRIES
    target = base + change

    def train(steps: int) -> None:
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        everything = torch.eye(WIDTH)  # the mean over white inputs, without their noise
        for _ in range(steps):
            optimizer.zero_grad()
            (host(everything) - target.t()).square().sum().backward()
            optimizer.step()
            schedule.step()

    found = float("nan")
    if host.sparsify.open_masks():
        if warm_up:
            train(warm_up)
        g = torch.Generator().manual_seed(1)
        batches = [(torch.randn(16, WIDTH, generator=g),) for _ in range(64)]
        supports = collect_masks(
            host, batches, loss=lambda y, batch: (y - batch[0] @ target.t()).square().sum(-1).mean(), progress=False
        )
        found = len(places & set(supports["linear.weight"].tolist())) / len(places)
    train(STEPS)
    left = host.sparsify.plain().linear.weight.detach() - target
    return float(left.square().sum() / change.square().sum()), found


def rosa(mask: Any) -> RoSA:
    return RoSA(rank=RANK, density=ENTRIES / WIDTH**2, mask=mask)


def test_rosa_recovers_what_neither_part_can_alone():
    error, found = outcome(rosa("gradient_abs"))
    assert found > 0.9
    assert error < 0.06
    assert outcome(LoRA(rank=2 * RANK))[0] > 0.3
    assert outcome(rosa("random"))[0] > 0.3
    assert outcome(RoSA(rank=0, density=2 * ENTRIES / WIDTH**2, mask="gradient_abs"), warm_up=0)[0] > 0.15


def test_the_warm_up_is_what_finds_the_entries():
    """Before any training, gradients show the low rank beside the entries."""
    error, found = outcome(rosa("gradient_abs"), warm_up=0)
    warm, warm_found = outcome(rosa("gradient_abs"))
    assert found < warm_found - 0.1
    assert error > 2 * warm


def test_scores_find_entries_in_the_order_that_the_docstring_says():
    """Noise of single samples: their squares hide small means, squares of batches of 16 less, and the mean over everything least."""
    absolute, batches, samples = (outcome(rosa(mask))[1] for mask in ("gradient_abs", "gradient", "fisher"))
    assert absolute > batches + 0.1
    assert batches > samples + 0.2
