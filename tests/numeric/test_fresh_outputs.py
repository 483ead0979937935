"""What operators return is theirs to give: no view, no alias of an argument, and in-place operations may follow, as on a plain linear."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from operator_cases import CASES, case_of
from torch import Tensor, nn

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, Prune, Quantize, RoSA

FORWARD = ["partial_columns", "partial_at_rows_turned", "sparse_lowrank_frozen", "sparse_lowrank_sparse+lora_turned",
           "quantized_nf4_rows+lora", "quantized_int8_columns+sparse+lora", "masked", "masked_turned"]  # fmt: skip
SHAPES = [(4,), (2, 3), (2, 1, 3), (2, 0)]


def results(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def storages(arguments: list[Any]) -> set[int]:
    flat = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    return {t.untyped_storage().data_ptr() for t in flat if isinstance(t, Tensor)}


@pytest.mark.parametrize("name", list(CASES))
def test_results_are_no_views_and_share_no_memory(name):
    for shape, needs, mode in itertools.product([(2, 3)], (True, False), ("grad", "no_grad", "inference")):
        case, _ = case_of(name, shape).needing(case_of(name, shape).leaves if needs else ())
        with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            for y in results(case.operator(*case.arguments)):
                assert not y._is_view()
                assert y.untyped_storage().data_ptr() not in storages(case.arguments)
                y.add_(1.0)


def trims(y: Tensor, x: Tensor) -> Tensor:
    """In-place operations as models do them after a linear."""
    y += x.sum(-1, keepdim=True)
    y.mul_(0.5)
    y.masked_fill_(y < -1.0, -1.0)
    y[..., 0] = 0.25
    return torch.relu_(y)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_after_in_place_operations(name, shape):
    case = case_of(name, shape)
    own, leaves = case.needing(case.leaves)
    found = torch.autograd.grad(trims(own.of(own.operator)(*leaves), leaves[0]).square().sum(), leaves)
    expected = torch.autograd.grad(trims(own.of(own.twin)(*leaves), leaves[0]).square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FORWARD)
def test_an_output_made_without_gradients_takes_one_in_place(name):
    case = case_of(name, (2, 3))
    with torch.no_grad():
        y = case.operator(*case.arguments)
    added = torch.randn_like(y).requires_grad_()
    y += added
    y.sum().backward()
    assert added.grad is not None


@pytest.mark.parametrize("name", [n for n in CASES if "frozen" not in n])
def test_arguments_written_to_before_the_backward(name):
    """As for `F.linear`: an error, or, where the formula does not read it any more, the gradient as it was."""
    base = case_of(name, (2, 3))
    case, leaves = base.needing(base.leaves)

    def gradients(function: Any, written: int | None = None, partly: bool = False) -> Any:
        arguments = [a.clone() if isinstance(a, Tensor) else a for a in case.arguments]
        total = sum((y.square().sum() for y in results(function(*arguments))), torch.zeros(()))
        if written is not None:
            with torch.no_grad():
                (arguments[written][..., :1] if partly else arguments[written]).add_(1.0)
        return torch.autograd.grad(total, leaves)

    expected = gradients(case.twin)
    for written, partly in itertools.product(case.leaves, (False, True)):
        try:
            found = gradients(case.operator, written, partly)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            continue
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["sparse_lowrank_lora", "quantized_int8_sparse+lora"])
def test_a_gated_input_written_to_after_the_operator(name):
    """It was saved as its two factors: these are watched, and the product itself may change."""
    case = case_of(name, (4,))
    own, (x, *parts) = case.needing(case.leaves)
    gate, up = torch.randn_like(x).requires_grad_(), torch.randn_like(x).requires_grad_()

    def gradients(function: Any, write: str = "") -> Any:
        first, second = gate * 1.0, up * 1.0
        product = first * second
        y = own.of(function)(product, *parts)
        with torch.no_grad():
            if write:
                {"product": product, "view": product[:, :2], "factor": first, "of the factor": first[:, :2]}[
                    write
                ].add_(1.0)
        return torch.autograd.grad(y.square().sum(), [gate, up, *parts])

    expected = gradients(own.twin)
    for write in ("", "product", "view"):
        for one, other in zip(gradients(own.operator, write), expected, strict=True):
            torch.testing.assert_close(one, other)
    for write in ("factor", "of the factor"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(own.operator, write)


class Block(nn.Module):
    """In-place operations after both linears of a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, 32), nn.Linear(32, 16), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.tanh(self.up(x)))
        y += x
        y.mul_(2.0)
        y.masked_fill_(y > 3.0, 3.0)
        return self.act(y)


RULES = {
    "s2ft": [S2FT(fraction=0.3, producer_fraction=0.3)],
    "paca": [PaCA(rank=4)],
    "lora": [LoRA(rank=4)],
    "rosa": [RoSA(rank=4, density=0.1, mask="random")],
    "prune": [Prune(sparsity=0.5, method="magnitude")],
    "int8+lora": [Quantize(format="int8"), LoRA(rank=4)],
    "nf4+paca": [Quantize(format="nf4"), PaCA(rank=4)],
}


@pytest.mark.parametrize("rules", list(RULES))
def test_hosts_with_in_place_operations_train(rules):
    torch.manual_seed(0)
    plain = Block()
    host = sparsify.compile(copy.deepcopy(plain), Plan(RULES[rules]), example=(torch.randn(2, 5, 16),), progress=False)
    exact = rules in ("s2ft", "paca", "lora", "rosa")
    for shape in ((6, 16), (2, 5, 16), (2, 2, 3, 16)):
        x = torch.randn(shape)
        for training in (True, False):
            host.train(training)
            y = host(x)
            y.sum().backward()
            if exact:
                torch.testing.assert_close(y, plain(x))
            with torch.no_grad():
                torch.testing.assert_close(host(x), y)
    assert all(p.grad is not None for p in host.parameters() if p.requires_grad)


@pytest.mark.parametrize("rules", ["s2ft", "rosa", "prune"])
def test_hosts_with_in_place_operations_compile(rules):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    host = sparsify.compile(Block(), Plan(RULES[rules]), example=(x,), progress=False)
    trained = [p for p in host.parameters() if p.requires_grad]
    expected = torch.autograd.grad(host(x).square().sum(), trained)
    found = torch.autograd.grad(torch.compile(host, backend="aot_eager", fullgraph=True)(x).square().sum(), trained)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
