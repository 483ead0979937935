"""Hugging Face Trainer: plain, bf16, activation checkpointing, resume, and a checkpoint that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf

from sparsify import S2FT

BOTH = S2FT(fraction=0.1, producer_fraction=0.1, budget="structure")


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of tokens; labels are the tokens."""

    def __init__(self) -> None:
        self.x = tiny.tokens(16, 8)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.x[i], "labels": self.x[i]}


def run(directory: Path, dtype: torch.dtype = torch.float32, resume: Path | None = None, **options: Any):
    """Train six steps; returns the host and the loss of every step."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_num_workers": 0,
    }
    arguments = hf.TrainingArguments(output_dir=str(directory), **settings | options)
    host = tiny.lower(tiny.llama(dtype), BOTH)
    trainer = hf.Trainer(model=host, args=arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return host, {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("plain")
    host, losses = run(directory, request.param)
    return request.param, directory, host, losses


def test_trainer_trains_only_the_slices(uninterrupted):
    dtype, _, host, losses = uninterrupted
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1]
    base, found = tiny.snapshot(tiny.llama(dtype)), tiny.state_of(host)
    for piece in host.sparsify.program.slices:
        changed = (found[piece.param] != base[piece.param]).any(dim=1 - piece.axis).nonzero().flatten().tolist()
        assert changed
        assert set(changed) <= set(piece.channels)
    touched = {s.param for s in host.sparsify.program.slices}
    assert all(torch.equal(found[n], v) for n, v in base.items() if n not in touched and n in found)


def test_resume_continues_exactly(uninterrupted, tmp_path):
    """Also over a bf16 base: the full-precision blocks are part of the checkpoint."""
    dtype, directory, host, losses = uninterrupted
    resumed, rest = run(tmp_path, dtype, resume=directory / "checkpoint-3")
    assert sorted(rest) == [4, 5, 6] or [rest[s] for s in (4, 5, 6)]
    assert [rest[s] for s in (4, 5, 6)] == [losses[s] for s in (4, 5, 6)]
    tiny.assert_same(resumed.state_dict(), host.state_dict())


def test_checkpoint_loads_as_a_plain_model(uninterrupted):
    dtype, directory, host, _ = uninterrupted
    plain = hf.LlamaForCausalLM.from_pretrained(directory / "checkpoint-6", dtype=dtype)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in tiny.llama().named_parameters()}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(plain(tiny.tokens()).logits, host(tiny.tokens()).logits, atol=tolerance, rtol=tolerance)


def test_adapter_of_a_trained_host_reproduces_it(uninterrupted, tmp_path):
    dtype, _, host, _ = uninterrupted
    host.sparsify.save_adapter(tmp_path)
    fresh = tiny.lower(tiny.llama(dtype), BOTH)
    fresh.sparsify.load_adapter(tmp_path, "a")
    fresh.sparsify.set_adapter("a")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fresh(tiny.tokens()).logits, host(tiny.tokens()).logits, atol=tolerance, rtol=tolerance)


def test_bf16_autocast_over_a_32_bit_base(tmp_path):
    host, losses = run(tmp_path, bf16=True, save_strategy="no")
    assert losses[6] < losses[1]
    assert all(p.dtype == torch.float32 for p in host.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_losses(reentrant, uninterrupted, tmp_path):
    dtype, _, _, losses = uninterrupted
    if dtype != torch.float32:
        pytest.skip("once is enough")
    options: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    _, found = run(tmp_path, save_strategy="no", **options)
    torch.testing.assert_close(list(found.values()), list(losses.values()), rtol=1e-5, atol=1e-5)


def test_gradient_accumulation_of_the_trainer(uninterrupted, tmp_path):
    dtype, _, _, losses = uninterrupted
    if dtype != torch.float32:
        pytest.skip("once is enough")
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _, found = run(tmp_path, save_strategy="no", **options)
    torch.testing.assert_close(list(found.values()), list(losses.values()), rtol=1e-3, atol=1e-3)
