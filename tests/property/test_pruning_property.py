"""Properties of masks, SparseGPT and sparse files over random shapes, patterns and sparsities."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.modules.masked import mask_modules
from sparsify.ops.bits import pack_bits, unpack_bits
from sparsify.pruning.allocate import by_sensitivity, saliency_curve
from sparsify.pruning.patterns import NM, Block, Pattern, Unstructured, fits_pattern, mask_from_scores, parse_pattern
from sparsify.pruning.scores import magnitude_prune
from sparsify.pruning.sparse_checkpoint import open_sparse, save_sparse
from sparsify.pruning.sparsegpt import Hessian, reconstruction_error, sparsegpt_prune
from sparsify.train.schedules import CubicSchedule


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, int, float, Pattern, int]:
    """`(rows, columns, sparsity, pattern, seed)` that fit each other."""
    kind = draw(st.sampled_from(["unstructured", "nm", "block"]))
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    sparsity = draw(st.floats(0, 0.97))
    pattern: Pattern = Unstructured()
    if kind == "nm":
        m = draw(st.integers(2, 12))
        pattern = NM(draw(st.integers(1, m - 1)), m)
        columns, sparsity = m * draw(st.integers(1, 20)), pattern.sparsity
    elif kind == "block":
        h, w = draw(st.integers(1, 5)), draw(st.integers(1, 6))
        pattern = Block(h, w if h * w > 1 else 2)
        rows, columns = pattern.h * draw(st.integers(1, 6)), pattern.w * draw(st.integers(1, 30))
    return rows, columns, sparsity, pattern, draw(st.integers(0, 1 << 20))


def expected_zeros(rows: int, columns: int, sparsity: float, pattern: Pattern) -> int:
    if isinstance(pattern, NM):
        return rows * columns // pattern.m * (pattern.m - pattern.n)
    size = pattern.h * pattern.w if isinstance(pattern, Block) else 1
    return round(sparsity * (rows * columns // size)) * size


@given(layers())
def test_masks_have_the_form_and_the_count(layer: tuple[int, int, float, Pattern, int]) -> None:
    rows, columns, sparsity, pattern, seed = layer
    scores = torch.randint(0, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    mask = mask_from_scores(scores, sparsity, pattern)
    assert fits_pattern(mask, pattern)
    assert int((~mask).sum()) == expected_zeros(rows, columns, sparsity, pattern)
    assert parse_pattern(str(pattern)) == pattern
    if isinstance(pattern, Unstructured) and mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


@given(layers(), st.integers(1, 60))
def test_sparsegpt_has_the_form_the_count_and_no_more_error_than_dropping(
    layer: tuple[int, int, float, Pattern, int], tokens: int
) -> None:
    rows, columns, sparsity, pattern, seed = layer
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator)
    hessian = Hessian(columns)
    hessian.add(x)
    h = hessian.value()
    found = sparsegpt_prune(weight, h.clone(), sparsity, pattern)
    assert fits_pattern(found.mask, pattern)
    assert int((~found.mask).sum()) == expected_zeros(rows, columns, sparsity, pattern)
    assert bool((found.weight[~found.mask] == 0).all())
    assert torch.isfinite(found.weight).all()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(columns)
    dropped = weight * found.mask
    if found.mask.any() and not found.mask.all():
        assert reconstruction_error(weight, found.weight, damped) <= reconstruction_error(weight, dropped, damped) * (
            1 + 1e-3
        )


@given(layers())
def test_files_give_back_every_bit(layer: tuple[int, int, float, Pattern, int]) -> None:
    rows, columns, sparsity, pattern, seed = layer
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    pruned = magnitude_prune(weight, sparsity, pattern)
    assert torch.equal(unpack_bits(pack_bits(pruned.mask), pruned.mask.shape), pruned.mask)
    with tempfile.TemporaryDirectory() as folder:
        report = save_sparse({"w": pruned.weight}, Path(folder) / "w.safetensors", masks={"w": pruned.mask})
        found = open_sparse(Path(folder) / "w.safetensors")
        assert torch.equal(found.tensor("w"), pruned.weight)
        assert report.sparse <= report.dense


@given(layers(), st.integers(1, 4))
def test_any_optimizer_step_keeps_zeros(layer: tuple[int, int, float, Pattern, int], steps: int) -> None:
    rows, columns, sparsity, pattern, seed = layer
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(columns, rows))
    mask = magnitude_prune(net[0].weight.detach(), sparsity, pattern).mask
    mask_modules(net, {"0.weight": mask})
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.5)
    for _ in range(steps):
        net(torch.randn(3, columns)).square().sum().backward()
        optimizer.step()
    assert bool((net[0].weight[~mask] == 0).all())


SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=5)


@given(SHAPES, st.floats(0.05, 0.9), st.floats(0, 0.4))
def test_allocation_keeps_the_total(shapes: list[tuple[int, int, int]], sparsity: float, shift: float) -> None:
    torch.manual_seed(len(shapes))
    curves = {str(i): saliency_curve(torch.randn(a, b) ** power, None) for i, (a, b, power) in enumerate(shapes)}
    found = by_sensitivity(curves, sparsity, shift)
    total = sum(c.numel for c in curves.values())
    assert abs(sum(curves[n].numel * s for n, s in found.items()) / total - sparsity) < 1e-6
    assert all(max(0, sparsity - shift) - 1e-9 <= s <= min(0.99, sparsity + shift) + 1e-9 for s in found.values())


@given(st.floats(0, 50), st.floats(0.5, 50), st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.1, 9))
def test_schedules_are_monotone_and_bounded(start: float, length: float, a: float, b: float, every: float) -> None:
    low, high = min(a, b), max(a, b)
    schedule = CubicSchedule(start=start, end=start + length, initial=low, final=high, every=every)
    values = [schedule.at(start - 1 + i * (length + 2) / 40) for i in range(41)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    assert low - 1e-12 <= values[0]
    assert abs(values[-1] - high) < 1e-12
