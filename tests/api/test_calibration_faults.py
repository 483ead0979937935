"""Calibration that measures nothing, or NaN: refused, naming batch, layer and where it began, by every rule that looks at data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

import sparsify
from sparsify import S2FT, LoRA, PaCA, Plan, PlanError, Prune, RoSA, SparsifyError
from sparsify.calibration.checks import column_squares
from sparsify.calibration.statistics import gradient_statistics, input_squares
from sparsify.pruning.scores import InputNorms
from sparsify.train.rosa import collect_masks

NAN, INF = float("nan"), float("inf")


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).to(dtype).eval()


def rows(seed: int = 0, count: int = 24) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def spoiled(value: float = NAN) -> Tensor:
    x = rows(5)
    x[3, 2] = value
    return x


def compiled(rule: Any, batches: Any, model: nn.Module | None = None, loss: Any = None) -> Any:
    loss = loss or (lambda y, _: y.square().mean())
    options = {"example": (rows(),), "calibration": batches, "loss": loss, "progress": False}
    return sparsify.compile(net() if model is None else model, Plan([rule]), **options)


DATA_RULES = [
    S2FT(structure="ffn", units=3, select="activation"),
    S2FT(structure="ffn", units=3, select="product"),
    S2FT(structure="ffn", units=3, select="gradient"),
    PaCA(rank=3, select="activation"),
    PaCA(rank=3, select="product", permute=False),
    PaCA(rank=3, select="gradient", permute=False),
    RoSA(rank=2, density=0.02),
    RoSA(rank=0, density=0.02, mask="gradient_abs"),
    Prune(sparsity=0.5, method="wanda"),
    Prune(sparsity=0.5, method="sparsegpt"),
    Prune(sparsity=0.5, method="magnitude", allocation="sensitivity"),
]
WEIGHT_RULES = [
    S2FT(structure="ffn", units=3, select="weight"),
    PaCA(rank=3, select="weight"),
    RoSA(rank=0, density=0.02, mask="magnitude"),
    Prune(sparsity=0.5, method="magnitude"),
    Prune(sparsity=0.5, method="magnitude", allocation="sensitivity"),
]


@pytest.mark.parametrize("rule", DATA_RULES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_batch_with_nan_or_inf_is_named(rule: Any, value: float) -> None:
    with pytest.raises(SparsifyError) as error:
        compiled(rule, [(rows(),), (spoiled(value),)])
    text = str(error.value)
    assert "calibration batch 1" in text
    assert "calibration batch 1[0] has NaN or Inf: drop or repair it" in text
    compiled(rule, [(rows(),), (rows(1),)])


@pytest.mark.parametrize("rule", [*WEIGHT_RULES, DATA_RULES[1], DATA_RULES[4], DATA_RULES[8], DATA_RULES[9]], ids=str)
def test_a_weight_with_nan_is_named_with_the_entry(rule: Any) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[4, 7] = NAN
    with pytest.raises(SparsifyError, match=r"2\.weight has NaN or Inf \(the first at \(4, 7\)\)"):
        compiled(rule, [(rows(),)], model)


def test_where_it_begins_is_named_when_the_batch_is_clean() -> None:
    model = net()
    with torch.no_grad():
        model[0].bias[1] = INF
    with pytest.raises(
        SparsifyError, match=r"batch 0 gives NaN or Inf at the input of 2; the parameter 0\.bias has NaN"
    ):
        compiled(S2FT(structure="ffn", units=3, select="activation"), [(rows(),)], model)
    half = net(torch.float16)
    with torch.no_grad():
        half[0].weight.mul_(3e4)
    batches = [(rows().half() * 100,)]
    with pytest.raises(
        SparsifyError, match=r"begins in the output of 0 \(Linear, torch.float16\): float16 ends at 65,504"
    ):
        sparsify.compile(
            half, Plan([PaCA(rank=3, select="activation")]), example=batches[0], calibration=batches, progress=False
        )


def test_squares_that_float32_cannot_hold_are_summed_in_float64() -> None:
    for factor in (1e25, 1e-30):
        x = rows().double() * factor
        torch.testing.assert_close(column_squares(x.float()), x.float().double().square().sum(0))
    norms = InputNorms(16)
    norms.add(rows().half() * 1e4)  # squares beyond float16
    norms.add((rows() * 1e25).to(torch.bfloat16))  # and beyond float32
    assert bool(torch.isfinite(norms.squares).all())
    assert norms.tokens == 48
    chosen = [
        compiled(PaCA(rank=3, select="activation", permute=False), [(rows() * f,)]).sparsify.program.channel_choices[0]
        for f in (1.0, 1e25)
    ]
    assert chosen[0].channels == chosen[1].channels


class Masked(nn.Module):
    """A feed-forward that looks at each token alone, under a batch's attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.net(x)


def masked_batches(value: float) -> list[dict[str, Tensor]]:
    x, mask = rows().view(3, 8, 16).clone(), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    x[1, 5:] = value
    return [{"x": x, "attention_mask": mask}]


def mean_of_tokens(y: Tensor, batch: Any) -> Tensor:
    return y[batch["attention_mask"].bool()].square().mean()


@pytest.mark.parametrize("rule", DATA_RULES, ids=str)
def test_nan_in_padding_is_no_error_and_changes_nothing(rule: Any) -> None:
    found = []
    for value in (0.25, NAN):
        torch.manual_seed(0)
        batches = masked_batches(value)
        host = sparsify.compile(
            Masked(), Plan([rule]), example=batches[0], calibration=batches, loss=mean_of_tokens, progress=False
        )
        program = host.sparsify.program
        choice = [s.channels for s in program.slices] + [p.index.tolist() for p in program.lowranks]
        found.append(choice or {n: m.tolist() for n, m in program.masks.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("rule", DATA_RULES, ids=str)
def test_batches_without_a_token_are_named(rule: Any) -> None:
    with pytest.raises(SparsifyError, match="calibration batch 1 is empty"):
        compiled(rule, [(rows(),), (rows()[:0],)])
    with pytest.raises(SparsifyError, match="calibration batch 0 is empty"):
        compiled(rule, [{}])
    padding = masked_batches(0.0)
    padding.append({"x": padding[0]["x"], "attention_mask": torch.zeros(3, 8, dtype=torch.long)})
    with pytest.raises(SparsifyError, match="calibration batch 1: every position is padding"):
        sparsify.compile(
            Masked(), Plan([rule]), example=padding[0], calibration=padding, loss=mean_of_tokens, progress=False
        )


GRADIENT_RULES = [rule for rule in DATA_RULES if "gradient" in str(rule) or type(rule) is RoSA]


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=str)
def test_losses_that_say_nothing(rule: Any) -> None:
    batches = [(rows(),), (rows(1),)]
    with pytest.raises(
        SparsifyError, match=r"the loss of calibration batch 0 is nan; it begins|the loss of .* 0 is nan"
    ):
        compiled(rule, batches, loss=lambda y, b: y.sum() * NAN)
    with pytest.raises(SparsifyError, match=r"the gradient at \S+ is zero in every calibration batch"):
        compiled(rule, batches, loss=lambda y, b: (y * 0).sum())
    with pytest.raises(PlanError, match=r"the loss of calibration batch 0 must be one number, not \(24, 16\)"):
        compiled(rule, batches, loss=lambda y, b: y)
    with pytest.raises(PlanError, match=r"depends on none of the layers"):
        compiled(rule, batches, loss=lambda y, b: y.detach().sum())
    with pytest.raises(SparsifyError, match=r"calibration batch 0: the gradient at 2 has NaN or Inf"):
        compiled(rule, batches, loss=lambda y, b: (y - y.detach()).abs().sum().sqrt())


def labelled(labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tiny.tokens(), "labels": labels}


def test_labels_that_are_all_ignored() -> None:
    model, good = tiny.llama(num_hidden_layers=1), labelled(tiny.tokens())
    ignored = labelled(torch.full((3, 9), -100))
    start = labelled(torch.full((3, 9), -100))
    start["labels"][:, 0] = 5
    modules = {"model.layers.0.mlp.down_proj.weight": model.model.layers[0].mlp.down_proj}

    def measure(batches: Any, loss: Any = None) -> None:
        gradient_statistics(model, modules, batches, lambda *_: None, loss, progress=False)

    for batches, number in (([ignored], 0), ([good, ignored], 1)):
        with pytest.raises(SparsifyError, match=rf"every label of calibration batch {number} is ignored \(-100\)"):
            measure(batches)
    with pytest.raises(SparsifyError, match=r"batch 1 is nan; .*except at the start of a row"):
        measure([good, start])
    # a loss of one's own that averages over no label; and one that looks at no labels, which is measured by what it gives
    counted = lambda y, b: (y.logits * (b["labels"] != -100)[..., None]).sum()  # noqa: E731
    with pytest.raises(SparsifyError, match="every label of calibration batch 1 is ignored"):
        measure([good, ignored], counted)
    measure([ignored], lambda y, b: y.logits.square().mean())
    with pytest.raises(SparsifyError, match="in pass 'select'.*every label of calibration batch 0 is ignored"):
        tiny.lower(model, RoSA(rank=0, density=0.01), calibration=[ignored])


def test_masks_that_are_collected_later_are_checked_too() -> None:
    host = sparsify.compile(net(), Plan([RoSA(rank=2, density=0.02)]), example=(rows(),), progress=False)
    loss = lambda y, _: y.square().mean()  # noqa: E731
    for batches, words in (([(spoiled(),)], "loss of calibration batch 0 is nan"), ([(rows()[:0],)], "is empty")):
        with pytest.raises(SparsifyError, match=words):
            collect_masks(host, batches, loss=loss, progress=False)
        assert host.sparsify.open_masks(), "nothing is chosen when the measurement failed"
    with pytest.raises(PlanError, match="collect_masks needs calibration batches"):
        collect_masks(host, [], loss=loss)
    collect_masks(host, [(rows(),)], loss=loss, progress=False)
    assert not host.sparsify.open_masks()


def test_flags_and_hooks_are_put_back_after_a_refusal() -> None:
    model = net()
    modules = {"0.weight": model[0], "2.weight": model[2]}
    for failing in (
        lambda: input_squares(model, modules, [(spoiled(),)], progress=False),
        lambda: gradient_statistics(
            model, modules, [(spoiled(),)], lambda *_: None, lambda y, _: y.sum(), progress=False
        ),
    ):
        with pytest.raises(SparsifyError):
            failing()
        assert all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.used(x), self.unused(x)


def test_a_layer_that_the_loss_does_not_reach() -> None:
    torch.manual_seed(0)
    with pytest.raises(PlanError, match="run unused, but no gradient of the loss reaches it"):
        compiled(PaCA(rank=2, select="gradient"), [(rows(),)], Branches(), loss=lambda y, _: y[0].square().mean())
    compiled(LoRA(rank=2), [(rows(),)], Branches())
