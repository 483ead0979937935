"""RoSA's second run under Trainer: it is the run of a new Trainer over the same supports; inside one run the schedule starts anew."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from methods import batches

from sparsify import RoSA
from sparsify.errors import SparsifyError
from sparsify.train.rosa import RosaCallback
from sparsify.train.rosa_trainer import train_rosa

RULE = RoSA(rank=2, density=0.03, match="*mlp*")


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x = tiny.tokens(16, 8)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.x[i], "labels": self.x[i]}


def trainer_of(folder: Any, *callbacks: Any, **options: Any) -> hf.Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "warmup_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    host = tiny.lower(tiny.llama(), RULE, train=["lm_head"])
    arguments = hf.TrainingArguments(output_dir=str(folder), **settings | options)
    return hf.Trainer(model=host, args=arguments, train_dataset=Rows(), callbacks=list(callbacks))


def rates(trainer: hf.Trainer) -> list[float]:
    return [round(entry["learning_rate"] / 1e-2, 4) for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize(("restart", "steps"), [("extra", 6), ("inside", 3)])
def test_the_second_run_is_that_of_a_new_trainer(restart, steps, tmp_path):
    trainer = trainer_of(tmp_path)
    train_rosa(trainer, batches(), warmup_steps=3, restart=restart, progress=False)
    host: Any = trainer.model
    assert trainer.state.global_step == steps
    assert trainer.args.max_steps == 6
    fresh = trainer_of(tmp_path, max_steps=steps)
    parts = {p.param: p.original for p in host.sparsify.program.lowranks}
    fresh.model.sparsify.set_masks(parts)  # type: ignore[union-attr, operator]
    hf.set_seed(3)
    fresh.train()
    assert rates(trainer) == rates(fresh)
    for (name, own), (_, other) in zip(host.named_parameters(), fresh.model.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    assert any(p.lora_B.any() for p in host.modules() if hasattr(p, "lora_B"))


def test_the_callback_restarts_the_schedule_over_the_steps_that_are_left(tmp_path):
    """Warm-up 2 of 6: 0, ½, 1, then anew over four steps; without the callback's restart the rates go on falling."""
    trainer = trainer_of(tmp_path / "a", RosaCallback(batches(), warmup_steps=2, progress=False))
    trainer.train()
    assert rates(trainer) == [0, 0.5, 0, 0.5, 1, 0.5]
    plain = trainer_of(tmp_path / "b")
    plain.train()
    assert rates(plain) == [0, 0.5, 1, 0.75, 0.5, 0.25]


def test_a_resumed_run_keeps_the_restarted_schedule(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer = trainer_of(tmp_path, RosaCallback(batches(), warmup_steps=2, progress=False), **options)
    trainer.train()
    again = trainer_of(tmp_path, RosaCallback(batches(), warmup_steps=2, progress=False), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rates(again) == rates(trainer) == [0, 0.5, 0, 0.5, 1, 0.5]


def test_restart_puts_everything_back_and_keeps_the_supports():
    host = tiny.lower(tiny.llama(), RoSA(rank=2, density=0.03, mask="random"), train=["lm_head"])
    x, base = tiny.tokens(), tiny.llama()
    supports = [p.original.clone() for p in host.sparsify.program.lowranks]
    tiny.train(host)
    assert not torch.equal(host(x).logits, base(x).logits)
    host.sparsify.restart()
    assert torch.equal(host(x).logits, base(x).logits)
    assert all(torch.equal(p.original, s) for p, s in zip(host.sparsify.program.lowranks, supports, strict=True))


def test_what_cannot_restart_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(SparsifyError, match="expected 'extra' or 'inside'"):
        train_rosa(trainer, batches(), restart="outside")  # type: ignore[arg-type]
    with pytest.raises(SparsifyError, match="9 steps of warm-up do not fit into a run of 6"):
        train_rosa(trainer, batches(), warmup_steps=9)
    with pytest.raises(SparsifyError, match="this trainer was given one"):
        train_rosa(trainer, batches())
