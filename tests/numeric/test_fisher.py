"""Per-sample Fisher masks against a loop of backward passes of single samples, in float64, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import sparsify
from sparsify import Plan, RoSA
from sparsify.calibration.fisher import chunks, groups_of, sample_squares
from sparsify.errors import PlanError, SparsifyError
from sparsify.train.rosa import collect_masks


def square_loss(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.double().square().mean()


def measured(
    model: nn.Module, names: list[str], batches: list[Any], loss: Any = None, **options: Any
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def reduce(name: str, squares: Tensor) -> None:
        found[name] = found.get(name, 0) + squares

    modules = {name: model.get_submodule(name) for name in names}
    sample_squares(model, modules, batches, reduce, loss, progress=False, **options)
    return found


def looped(model: nn.Module, names: list[str], batches: list[Any], loss: Any = None) -> dict[str, Tensor]:
    """The same by one backward pass for each row."""
    weights = {name: model.get_submodule(name).weight for name in names}
    found: dict[str, Tensor] = {}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        rows = len(batch[0] if isinstance(batch, tuple) else next(iter(batch.values())))
        for i in range(rows):
            if isinstance(batch, tuple):
                value = loss(model(*(t[i : i + 1] for t in batch)), batch)
            else:
                value = model(**{k: v[i : i + 1] for k, v in batch.items()}).loss
            gradients = torch.autograd.grad(value, list(weights.values()))
            for name, g in zip(weights, gradients, strict=True):
                g = g.t() if type(model.get_submodule(name)).__name__ == "Conv1D" else g
                found[name] = found.get(name, 0) + g.double().square()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        assert found[name].dtype == torch.float64
        assert float((found[name] - wanted).abs().max()) <= 1e-12 * float(wanted.max()), name


def test_plain_modules_agree_with_the_loop_whatever_the_chunks() -> None:
    model = tiny.perturb(tiny.Mlp()).double()
    names = ["layers.0.up", "layers.0.down", "layers.1.down", "head"]
    batches = [(torch.randn(5, 12, dtype=torch.float64),), (torch.randn(2, 12, dtype=torch.float64),)]
    expected = looped(model, names, batches, square_loss)
    together: dict[str, Tensor] = {}
    for batch in batches:  # the square of the whole batch's gradient is another thing
        model.zero_grad()
        square_loss(model(*batch), batch).backward()
        together["head"] = together.get("head", 0) + model.head.weight.grad.square()
    assert float((together["head"] - expected["head"]).abs().max()) > 0.1 * float(expected["head"].max())
    for budget in (1, 300, 1 << 28):
        assert_close(measured(model, names, batches, square_loss, budget=budget), expected)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("Llama", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]),
        ("GPT-2", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),
        ("BERT (classifier)", ["bert.encoder.layer.0.attention.self.query"]),
    ],
)
def test_families_agree_with_the_loop(family: str, names: list[str]) -> None:
    model = tiny.build(family, torch.float64)
    tokens = tiny.tokens(4)
    batch = {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens)}
    batch["attention_mask"][1, 6:] = 0
    if family.startswith("BERT"):
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    else:
        batch["labels"][1, 6:] = -100
    assert_close(measured(model, names, [batch]), looped(model, names, [batch]))


def rosa(mask: str) -> Plan:
    return Plan([RoSA(match=["*.down_proj", "*.v_proj"], rank=0, density=0.05, mask=mask)])


def supports(host: Any) -> dict[str, Tensor]:
    return {part.param: part.original for part in host.sparsify.program.lowranks}


def test_a_fisher_mask_does_not_depend_on_the_batch_size() -> None:
    tokens = tiny.tokens(6)
    whole = [{"input_ids": tokens, "labels": tokens}]
    single = [{"input_ids": tokens[i : i + 1], "labels": tokens[i : i + 1]} for i in range(6)]
    hosts = {
        (mask, size): sparsify.compile(tiny.llama(), rosa(mask), calibration=batches, progress=False)
        for mask, size, batches in (
            ("fisher", 6, whole),
            ("fisher", 1, single),
            ("gradient", 1, single),
            ("gradient", 6, whole),
        )
    }
    expected = supports(hosts["fisher", 6])
    assert "entries by fisher)" in str(hosts["fisher", 6].sparsify.program)
    for key in (("fisher", 1), ("gradient", 1)):
        for name, found in supports(hosts[key]).items():
            same = set(found.tolist()) & set(expected[name].tolist())
            assert len(same) >= 0.95 * len(found), "but for ties in rounding"
    assert any(not torch.equal(found, expected[name]) for name, found in supports(hosts["gradient", 6]).items())


def test_an_open_fisher_mask_is_collected_on_the_host() -> None:
    tokens = tiny.tokens(4)
    batches = [{"input_ids": tokens, "labels": tokens}]
    plan = Plan([RoSA(match="*.down_proj", rank=2, density=0.05, mask="fisher")])
    host: Any = sparsify.compile(tiny.llama(torch.float64), plan, progress=False)
    assert host.sparsify.open_masks()
    found = collect_masks(host, batches, progress=False)
    model = tiny.llama(torch.float64)
    names = [name.removesuffix(".weight") for name in found]
    for name, squares in looped(model, names, batches).items():
        count = len(found[f"{name}.weight"])
        expected = set(squares.flatten().topk(count).indices.tolist())
        assert len(expected & set(found[f"{name}.weight"].tolist())) >= 0.95 * count
    assert not host.sparsify.open_masks()


class Asking(nn.Module):
    """Takes a branch that depends on its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else self.linear(-x)


def test_what_vmap_cannot_trace_is_refused_with_the_reason() -> None:
    with pytest.raises(
        PlanError,
        match=r"Asking cannot be traced .* by torch\.func\.vmap: .*\.item\(\).*one sample each measures the same",
    ):
        measured(Asking(), ["linear"], [(torch.randn(3, 4),)], square_loss)


def test_batches_that_are_not_rows_are_refused() -> None:
    model = tiny.Mlp()
    with pytest.raises(PlanError, match=r"batch 0 apart into samples, but its tensors have \[2, 3\] rows"):
        measured(model, ["head"], [(torch.randn(3, 12), torch.randn(2))], square_loss)
    with pytest.raises(PlanError, match="it holds no tensor with rows"):
        measured(model, ["head"], [(torch.tensor(1.0),)], square_loss)
    with pytest.raises(PlanError, match=r"must be one number, not \(1, 5\)"):
        measured(model, ["head"], [(torch.randn(3, 12),)], lambda y, _: y)
    with pytest.raises(PlanError, match="never ran"):
        measured(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), ["b"], [])


def test_nan_and_zero_are_named() -> None:
    model = tiny.Mlp()
    bad = torch.randn(3, 12)
    bad[1, 2] = float("nan")
    with pytest.raises(SparsifyError, match=r"batch 1: the gradient of a sample at head has NaN or Inf"):
        measured(model, ["head"], [(torch.randn(3, 12),), (bad,)], square_loss)
    with pytest.raises(SparsifyError, match="zero in every calibration batch"):
        measured(model, ["head"], [(torch.randn(3, 12),)], lambda y, _: (y * 0).sum())


def test_rows_without_labels_are_left_out_and_padding_is_grouped() -> None:
    labels = torch.tensor([[1, 2], [-100, -100], [3, -100], [4, 5], [6, 7]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1]])
    batch = {"input_ids": torch.arange(10).view(5, 2), "labels": labels, "attention_mask": mask, "scale": 2.0}
    found = [chunk.leaves[0][:, 0].tolist() for chunk in chunks(0, batch, 2)]
    assert sorted(found) == [[0, 6], [4], [8]]
    one = next(chunks(0, batch, 2))
    assert one.sample([row[0] for row in one.rows])["scale"] == 2.0
    assert groups_of({"a": 4, "b": 4, "c": 9, "d": 1}, 8) == [["a", "b"], ["c"], ["d"]]
