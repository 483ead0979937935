"""Patterns, scores and SparseGPT against a plain fp64 implementation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsify.errors import PlanError, SparsifyError
from sparsify.pruning.allocate import by_sensitivity, saliency_curve
from sparsify.pruning.patterns import (
    NM,
    Block,
    Pattern,
    Unstructured,
    check_sparsity,
    fits_pattern,
    keep_largest,
    mask_from_scores,
    parse_pattern,
)
from sparsify.pruning.rule import Prune
from sparsify.pruning.scores import InputNorms, magnitude_prune, random_prune, wanda_prune
from sparsify.pruning.sparsegpt import (
    COLUMN_BLOCK,
    HESSIAN_BLOCK,
    Hessian,
    block_columns,
    inverse_factor,
    invert_lower,
    reconstruction_error,
    sparsegpt_prune,
)


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs whose channels differ in scale and move together, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) * (1.5 / width**0.5)
    scale = torch.rand(width, generator=generator) * 2 + 0.1
    return (torch.randn(tokens, width, generator=generator) * scale) @ mix


def oracle_sparsegpt(
    weight: Tensor, x: Tensor, sparsity: float, pattern: Pattern, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The algorithm of the paper in fp64, one column at a time, no lazy updates: `(weight, survivors)`."""
    w = weight.double().clone()
    rows, columns = w.shape
    h = 2 / x.shape[0] * (x.double().T @ x.double())
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    block, _ = block_columns(pattern)
    zeros = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        scores = w[:, start:stop] ** 2 / u.diagonal()[start:stop] ** 2
        if isinstance(pattern, Unstructured):
            wanted = round(sparsity * rows * stop) - zeros
            zeros += wanted
            order = scores.flatten().argsort(stable=True)[:wanted]
            mask[:, start:stop] = (
                torch.ones(scores.numel(), dtype=torch.bool).index_fill(0, order, False).view(scores.shape)
            )
        elif isinstance(pattern, Block):
            summed = scores.view(rows // pattern.h, pattern.h, -1, pattern.w).sum((1, 3))
            wanted = round(sparsity * rows * stop / (pattern.h * pattern.w)) - zeros
            zeros += wanted
            order = summed.flatten().argsort(stable=True)[:wanted]
            small = torch.ones(summed.numel(), dtype=torch.bool).index_fill(0, order, False).view(summed.shape)
            mask[:, start:stop] = small.repeat_interleave(pattern.h, 0).repeat_interleave(pattern.w, 1)
        for j in range(start, stop):
            if isinstance(pattern, NM) and (j - start) % pattern.m == 0:
                group = w[:, j : j + pattern.m] ** 2 / u.diagonal()[j : j + pattern.m] ** 2
                gone = group.argsort(dim=1, stable=True)[:, : pattern.m - pattern.n]
                mask[:, j : j + pattern.m] = torch.ones_like(group, dtype=torch.bool).scatter(1, gone, False)
            q = w[:, j] * mask[:, j]
            error = (w[:, j] - q) / u[j, j]
            w[:, j:] -= error[:, None] * u[j, j:][None]
            w[:, j] = q
    return w * mask, mask


CASES = [
    ("unstructured", 0.6, 37, 300),
    ("unstructured", 0.9, 20, 256),
    ("2:4", 0.5, 33, 260),
    ("16:32", 0.5, 18, 320),
    ("16:64", 0.75, 18, 192),
    ("1:4", 0.75, 29, 148),
    ("3:6", 0.5, 21, 150),
    ("4x1", 0.7, 36, 143),
    ("16x16", 0.5, 48, 160),
]


@pytest.mark.parametrize(("text", "sparsity", "rows", "columns"), CASES)
def test_sparsegpt_follows_the_fp64_oracle(text: str, sparsity: float, rows: int, columns: int) -> None:
    pattern = parse_pattern(text)
    x, weight = correlated(4 * columns, columns), torch.randn(rows, columns)
    hessian = Hessian(columns)
    for part in x.split(97):
        hessian.add(part)
    expected, survivors = oracle_sparsegpt(weight, x, sparsity, pattern)
    found = sparsegpt_prune(weight, hessian.value(), sparsity, pattern)
    # scores closer than fp32 rounding may fall the other way, and shift what follows in their row a little
    assert (found.mask != survivors).float().mean() < 0.01
    exact = 2 / x.shape[0] * (x.double().T @ x.double())
    ours, theirs = (reconstruction_error(weight, w.float(), exact.float()) for w in (found.weight, expected))
    assert ours == pytest.approx(theirs, rel=0.02)
    same = (found.mask == survivors).all(1)
    assert same.any()
    assert torch.allclose(found.weight[same].double(), expected[same], atol=1e-3 * float(weight.abs().max()))
    assert fits_pattern(found.mask, pattern)
    assert bool((found.weight[~found.mask] == 0).all())


@pytest.mark.parametrize(("text", "sparsity", "rows", "columns"), CASES)
def test_sparsegpt_beats_magnitude_and_everything_beats_random(
    text: str, sparsity: float, rows: int, columns: int
) -> None:
    pattern = parse_pattern(text)
    x, weight = correlated(4 * columns, columns, seed=3), torch.randn(rows, columns)
    hessian, norms = Hessian(columns), InputNorms(columns)
    hessian.add(x)
    norms.add(x)
    h = hessian.value()
    error = lambda pruned: reconstruction_error(weight, pruned.weight, h)  # noqa: E731
    sparsegpt = error(sparsegpt_prune(weight, h.clone(), sparsity, pattern))
    magnitude = error(magnitude_prune(weight, sparsity, pattern))
    wanda = error(wanda_prune(weight, norms.mean_squares(), sparsity, pattern))
    random = error(random_prune(weight, sparsity, pattern))
    assert sparsegpt < magnitude < random
    assert wanda < random


def test_the_reported_error_is_the_damped_quadratic_form() -> None:
    x, weight = correlated(900, 140), torch.randn(31, 140)
    hessian = Hessian(140)
    hessian.add(x)
    h = hessian.value()
    found = sparsegpt_prune(weight, h.clone(), 0.6, Unstructured())
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(140)
    delta = (weight - found.weight).double()
    assert found.error == pytest.approx(float((delta @ damped * delta).sum()), rel=1e-3)


@pytest.mark.parametrize("width", [61, HESSIAN_BLOCK, 2 * HESSIAN_BLOCK + 5])
def test_the_hessian_is_whole_though_half_of_it_is_summed(width: int) -> None:
    pieces = [correlated(count, width) for count in (70, 33)]
    hessian = Hessian(width)
    for piece in pieces:
        hessian.add(piece)
    x = torch.cat(pieces).double()
    expected = 2 / 103 * x.T @ x
    bound = 103 * torch.finfo(torch.float32).eps * (2 / 103 * x.abs().T @ x.abs())
    value = hessian.value()
    assert bool(((value.double() - expected).abs() <= bound).all())
    assert torch.equal(value, value.T) or float((value - value.T).abs().max()) <= float(bound.max())


def test_dead_inputs_get_zero_columns() -> None:
    x, weight = correlated(800, 140), torch.randn(17, 140)
    x[:, [3, 130]] = 0
    hessian = Hessian(140)
    hessian.add(x)
    found = sparsegpt_prune(weight, hessian.value(), 0.5, Unstructured())
    assert bool((found.weight[:, [3, 130]] == 0).all())
    assert torch.isfinite(found.weight).all()
    assert int((~found.mask).sum()) == round(0.5 * weight.numel())


def test_fewer_tokens_than_inputs_and_bf16_weights() -> None:
    x, weight = correlated(20, 150), torch.randn(9, 150).bfloat16()
    hessian = Hessian(150)
    hessian.add(x.bfloat16())
    assert hessian.matrix.dtype == torch.float32
    found = sparsegpt_prune(weight, hessian.value(), 0.5, Unstructured())
    assert found.weight.dtype == torch.bfloat16
    assert torch.isfinite(found.weight.float()).all()


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    x = correlated(2000, 301)
    h = (x.T @ x) / 1000
    upper, dead = inverse_factor(h.clone(), 0.01)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(301)
    assert torch.allclose(upper.double().T @ upper.double() @ damped, torch.eye(301, dtype=torch.float64), atol=1e-3)
    assert torch.equal(upper, upper.triu())
    assert not dead.any()
    lower = torch.linalg.cholesky(damped)
    assert torch.allclose(invert_lower(lower.clone(), leaf=16) @ lower, torch.eye(301, dtype=torch.float64), atol=1e-9)


def test_column_blocks_are_whole_groups() -> None:
    assert block_columns(Unstructured()) == (COLUMN_BLOCK, 32)
    for pattern in (NM(2, 4), NM(16, 64), NM(3, 6), NM(5, 48), NM(100, 200), Block(4, 1), Block(32, 32), Block(2, 7)):
        outer, inner = block_columns(pattern)
        group = pattern.m if isinstance(pattern, NM) else pattern.w
        assert outer % inner == 0
        assert inner % group == 0


def test_nan_inputs_and_a_hopeless_hessian_are_refused() -> None:
    hessian = Hessian(5)
    with pytest.raises(SparsifyError, match="NaN or Inf at this layer's input"):
        hessian.add(torch.full((2, 5), math.nan))
    with pytest.raises(SparsifyError, match=r"mlp\.up: the Hessian has NaN or Inf"):
        inverse_factor(torch.full((5, 5), math.inf), where="mlp.up")
    indefinite = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    with pytest.raises(SparsifyError, match="raise Prune"):
        inverse_factor(indefinite, 1e-6)


def test_counts_are_exact_with_ties() -> None:
    scores = torch.zeros(7, 11)
    for zeros in (0, 1, 30, 76, 77):
        assert int((~keep_largest(scores, zeros)).sum()) == zeros
    weight = torch.randn(24, 40)
    weight[weight.abs() < 0.7] = 0  # more zeros than asked for
    assert int((~magnitude_prune(weight, 0.3, Unstructured()).mask).sum()) == round(0.3 * weight.numel())


def test_random_masks_depend_on_seed_and_name_only() -> None:
    weight = torch.randn(8, 12)
    one = random_prune(weight, 0.5, Unstructured(), seed=1, where="a").mask
    assert torch.equal(one, random_prune(-weight, 0.5, Unstructured(), seed=1, where="a").mask)
    assert not torch.equal(one, random_prune(weight, 0.5, Unstructured(), seed=2, where="a").mask)
    assert not torch.equal(one, random_prune(weight, 0.5, Unstructured(), seed=1, where="b").mask)


def test_patterns_read_from_text_and_refuse_with_the_layer_named() -> None:
    assert parse_pattern("16:64") == NM(16, 64)
    assert parse_pattern("4x1") == parse_pattern("4×1") == Block(4, 1)
    assert str(parse_pattern("unstructured")) == "unstructured"
    for bad in ("4:2", "0:4", "2:2", "1x1", "0x4", "2-4", "half"):
        with pytest.raises(PlanError):
            parse_pattern(bad)
    with pytest.raises(PlanError, match=r"h\.0\.mlp: pattern 2:4 needs groups of 4 inputs, but the layer has 10"):
        mask_from_scores(torch.rand(3, 10), 0.5, NM(2, 4), where="h.0.mlp")
    with pytest.raises(PlanError, match=r"q_proj: blocks of 4x1 do not tile a layer with 6 outputs"):
        mask_from_scores(torch.rand(6, 10), 0.5, Block(4, 1), where="q_proj")
    with pytest.raises(PlanError, match=r"pattern 2:4 has sparsity 0.5, not 0.75"):
        mask_from_scores(torch.rand(6, 8), 0.75, NM(2, 4))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(PlanError, match="fraction of zeros"):
        check_sparsity("layer", sparsity)


def test_a_percentage_is_recognised() -> None:
    with pytest.raises(PlanError, match=r"did you mean 0\.75\?"):
        check_sparsity("layer", 75)


def test_the_rule_is_validated_at_construction() -> None:
    assert Prune().sparsity == 0.75
    assert Prune(pattern="16:64").sparsity == 0.75
    assert Prune(pattern="2:4").sparsity == 0.5
    by_layer = Prune(sparsity={"*.o_proj": 0.5, "*": 0.8}, method="magnitude")
    assert by_layer.sparsity_of("model.layers.0.self_attn.o_proj") == 0.5
    assert by_layer.sparsity_of("model.layers.0.mlp.up_proj") == 0.8
    assert not by_layer.needs_calibration
    assert hash(by_layer) is not None
    with pytest.raises(PlanError, match=r"keeping 2 of 4 is sparsity 0.5"):
        Prune(pattern="2:4", sparsity=0.75)
    with pytest.raises(PlanError, match="N:M fixes every layer's sparsity"):
        Prune(pattern="2:4", allocation="sensitivity")
    with pytest.raises(PlanError, match="expected one of 'sparsegpt'"):
        Prune(method="obs")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="damping"):
        Prune(damping=0.0)
    with pytest.raises(PlanError, match="list of patterns"):
        Prune(exclude="lm_head")  # type: ignore[arg-type]


def test_sensitivity_keeps_the_total_and_moves_sparsity_to_where_it_costs_least() -> None:
    torch.manual_seed(0)
    spiky, flat = torch.randn(40, 50) ** 5, torch.randn(60, 70).sign() * (1 + torch.rand(60, 70))
    curves = {"spiky": saliency_curve(spiky, None), "flat": saliency_curve(flat, torch.rand(70) + 0.5)}
    shares = by_sensitivity(curves, 0.6, 0.2)
    total = (shares["spiky"] * spiky.numel() + shares["flat"] * flat.numel()) / (spiky.numel() + flat.numel())
    assert total == pytest.approx(0.6, abs=1e-6)
    assert shares["spiky"] > 0.6 > shares["flat"]
    assert max(abs(s - 0.6) for s in shares.values()) <= 0.2 + 1e-9
    assert by_sensitivity(curves, 0.6, 0.0) == pytest.approx({"spiky": 0.6, "flat": 0.6})


@pytest.mark.parametrize("sparsity", [0.45, 0.333])
def test_what_a_block_of_columns_rounds_off_the_next_one_makes_up_for(sparsity: float) -> None:
    """One row of 300 columns in blocks of 128: each block alone would round to another total."""
    h = Hessian(300)
    h.add(torch.randn(600, 300))
    found = sparsegpt_prune(torch.randn(1, 300), h.value(), sparsity, Unstructured())
    assert int((~found.mask).sum()) == round(sparsity * 300)
    alone = sum(round(sparsity * width) for width in (128, 128, 44))
    assert sparsity != 0.45 or alone != round(sparsity * 300), "or the test shows nothing"


def test_wanda_compares_inside_each_output_row() -> None:
    """Rows of very different size lose equally many entries, those of least |w| · ‖x‖; magnitude empties the small rows."""
    weight = torch.randn(6, 20) * torch.logspace(-3, 3, 6)[:, None]
    squares = torch.rand(20) + 0.1
    found = wanda_prune(weight, squares, 0.4, Unstructured()).mask
    assert (~found).sum(1).tolist() == [8] * 6
    scores = weight.abs() * squares.sqrt()
    for row, kept in zip(scores, found, strict=True):
        assert row[kept].min() > row[~kept].max()
    assert (~magnitude_prune(weight, 0.4, Unstructured()).mask).sum(1).tolist() != [8] * 6
