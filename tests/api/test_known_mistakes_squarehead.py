"""One test for every mistake of the authors' SquareHead and sparse fine-tuning code, through what a user calls.

The losses and masks on their own are in `tests/numeric/test_squarehead.py` and `test_masked.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods import batches, compiled, logits, model_of
from torch import Tensor

import sparsify
from sparsify import CpuOptions, Plan, Prune
from sparsify.modules.masked import check_masks, masked_parameters
from sparsify.pruning.sparse_checkpoint import open_sparse
from sparsify.train.schedules import CubicSchedule, GradualPruner
from sparsify.train.squarehead import Distiller

SPARSE = Prune(sparsity=0.6)


def padded() -> dict[str, Tensor]:
    """Two rows; the first has a prompt without labels and padding on the right."""
    ids = tiny.tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_kl_mask_off_by_one() -> None:
    """The term of every answer token counts, the first included; none of the prompt's, the padding's or the last position's."""
    student, teacher = compiled(SPARSE), model_of()
    batch = padded()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        own, other = (m(**inputs).logits.double().log_softmax(-1) for m in (student, teacher))
        terms = (other.exp() * (other - own)).sum(-1)
        answers = [(row, t) for row in range(2) for t in range(7) if batch["labels"][row, t + 1] != -100]
        expected = sum(float(terms[row, t]) for row, t in answers) / len(answers)
        found = Distiller(student, teacher, ce=0, kl=1, sq=0)(batch).kl
    assert float(found) == pytest.approx(expected, rel=1e-4)
    wrong = terms[:, 1:][batch["labels"][:, 1:] != -100].mean()  # logits at t weighed by token t
    assert abs(float(wrong) - expected) > 1e-3 * expected


def test_epsilon_switches_off_layers_with_small_hidden_states() -> None:
    """Hidden states a hundred times smaller have the same term; with their ε = 0.0078 it would all but vanish."""

    def small(scale: float) -> Any:
        """The whole residual stream scaled, which RMSNorm undoes for everything that reads it."""
        model: Any = copy.deepcopy(model_of())
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(scale)
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(scale)
                layer.mlp.down_proj.weight.mul_(scale)
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon *= scale**2
        return model

    terms = []
    for scale in (1.0, 0.01):
        teacher = small(scale)
        student = tiny.lower(teacher, Prune(sparsity=0.6, method="magnitude"))
        with torch.no_grad():
            terms.append(float(Distiller(student, teacher, ce=0, sq=1)(padded()).sq))
            energy = teacher.model(**{k: v for k, v in padded().items() if k != "labels"}, output_hidden_states=True)
    assert terms[1] == pytest.approx(terms[0], rel=1e-3)
    power = float(energy.hidden_states[1].square().mean())
    assert power / (power + 0.0078) < 0.1  # what an absolute ε would leave of the term


def test_masks_reapplied_only_at_the_end_of_a_batch() -> None:
    """Zeros are exact after every optimizer step of an accumulation loop, weight decay and moments of dense training included."""
    host = compiled(SPARSE)
    distiller = Distiller(host, model_of())
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-2, weight_decay=0.3)
    for _ in range(3):
        for part in (padded(), batches()[1]):
            distiller(part).loss.backward()
            optimizer.step()
            check_masks(host)
            for name, mask in host.sparsify.program.masks.items():  # as if the optimizer came from before the pruning
                optimizer.state[host.get_parameter(name)]["exp_avg"][~mask] = 1.0
        optimizer.zero_grad()


def test_gradients_and_moments_of_pruned_weights_not_masked() -> None:
    """The norm that clipping sees is the survivors', and no moment is kept for what is pruned: clipping may stay on."""
    host = compiled(SPARSE)
    Distiller(host, model_of())(padded()).loss.backward()
    masks = host.sparsify.program.masks
    survivors = [p.grad[masks[n]] if n in masks else p.grad for n, p in host.named_parameters()]
    expected = torch.stack([g.norm() for g in survivors]).norm()
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(host.parameters(), 1e-2), expected)
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-3)
    optimizer.step()
    for name, mask in masks.items():
        state = optimizer.state[host.get_parameter(name)]
        assert not bool(state["exp_avg"][~mask].any() or state["exp_avg_sq"][~mask].any()), name


def test_mask_guessed_from_ten_percent_zeros(tmp_path: Path) -> None:
    """What is pruned is recorded and never guessed: 5 % zeros are a mask, a survivor at zero trains, dense zeros are no mask."""
    host = compiled(Prune(sparsity=0.05, method="magnitude"))
    name, mask = next(iter(host.sparsify.program.masks.items()))
    assert 0.04 < float((~mask).float().mean()) < 0.06
    with torch.no_grad():
        host.get_parameter(name).zero_()
    host.sparsify.save_sparse(tmp_path / "a.sparse", base=None)
    again = open_sparse(tmp_path / "a.sparse").load_into(copy.deepcopy(model_of()))
    tiny.train(again, **padded())
    check_masks(again)
    assert bool((again.get_parameter(name)[mask] != 0).any())
    found = {n: module.mask(leaf) for n, module, leaf in masked_parameters(again)}
    tiny.assert_same(found, host.sparsify.program.masks)
    dense: Any = copy.deepcopy(model_of())
    with torch.no_grad():
        dense.get_parameter(name)[:, ::2] = 0
    tiny.train(dense, **padded())
    assert not list(masked_parameters(dense))
    assert bool((dense.get_parameter(name)[:, ::2] != 0).any())


def test_no_pruner_schedule_sparse_format_or_runtime(tmp_path: Path) -> None:
    """From a dense model to a running sparse one with nothing from elsewhere: prune, distil, prune further, save, open, run."""
    dense = model_of()
    host = compiled(Prune(sparsity=0.5))
    distiller = Distiller(host, dense)
    pruner = GradualPruner(host, CubicSchedule(start=0, end=4, initial=0.5, final=0.75))
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-3)
    for step in range(5):
        distiller(padded()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(step + 1, optimizer)
    check_masks(host)
    host.sparsify.save_sparse(tmp_path / "a.sparse")
    found = open_sparse(tmp_path / "a.sparse", base=dense)
    pruned = [found.entries[n] for n in host.sparsify.program.masks]
    assert sum(e.survivors for e in pruned) / sum(e.numel for e in pruned) == pytest.approx(0.25, abs=0.02)
    opened = found.load_into(copy.deepcopy(dense), sparse=False)
    fast = sparsify.compile(opened, Plan([], target="cpu"), cpu=CpuOptions(tokens=(1, 21)), progress=False)
    torch.testing.assert_close(logits(fast), logits(host), atol=1e-4, rtol=1e-3)
