"""Checkpoints of Trainer and accelerate that hold the adapter alone, and resume as if nothing had happened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
import transformers as hf
from test_trainer import Rows

import sparsify
from sparsify import S2FT, LoRA, PaCA, Prune, Quantize, RoSA
from sparsify.errors import SparsifyError
from sparsify.train import adapter_checkpoints, last_checkpoint
from sparsify.train.rosa import RosaCallback

RULES: dict[str, tuple[Any, ...]] = {
    "s2ft": (S2FT(fraction=0.1, producer_fraction=0.1, budget="structure"),),
    "paca": (PaCA(rank=3),),
    "rosa": (RoSA(rank=2, density=0.02, mask="magnitude"),),
    "lora": (LoRA(rank=2),),
    "nf4 rosa": (Quantize("nf4"), RoSA(rank=2, density=0.02, mask="magnitude")),
}


def trainer_of(folder: Path, *rules: Any, train: tuple[str, ...] = (), callbacks: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 3, "dataloader_num_workers": 0, "max_grad_norm": 0.5,
    }  # fmt: skip
    arguments = hf.TrainingArguments(output_dir=str(folder), **settings | options)
    host = tiny.lower(tiny.llama(), *rules, train=list(train))
    made = hf.Trainer(model=host, args=arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)
    return adapter_checkpoints(made)


def values(host: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in host.named_parameters() if p.requires_grad}


def losses(trainer: Any) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_run_that_resumes_is_the_run_that_went_on(rules, tmp_path):
    whole = trainer_of(tmp_path / "a", *rules, train=("model.norm",))
    whole.train()
    weights = [p for p in (tmp_path / "a" / "checkpoint-4").rglob("*.safetensors")]
    assert [p.name for p in weights] == ["adapter.safetensors"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    again = trainer_of(tmp_path / "b", *rules, train=("model.norm",))
    again.train(resume_from_checkpoint=True)
    assert losses(again)[5] == losses(whole)[5]
    assert losses(again)[6] == losses(whole)[6]
    tiny.assert_same(values(again.model), values(whole.model))
    assert whole.model.sparsify.active.trainable
    served = sparsify.load(tiny.llama(), tmp_path / "a" / "checkpoint-6").eval()
    ids = tiny.tokens()
    base = whole.model.eval()(input_ids=ids).logits
    tolerance = 0.2 if "nf4" in str(rules) else 1e-4  # served on the dense base
    torch.testing.assert_close(served(input_ids=ids).logits, base, atol=tolerance, rtol=tolerance)


def test_the_adapter_is_what_a_checkpoint_weighs(tmp_path):
    trainer = trainer_of(tmp_path / "a", LoRA(rank=2), max_steps=2)
    trainer.train()
    held = sum(p.stat().st_size for p in (tmp_path / "a" / "checkpoint-2").glob("*.safetensors"))
    trainer.model.sparsify.save_adapter(tmp_path / "alone")
    alone = (tmp_path / "alone" / "adapter.safetensors").stat().st_size
    whole = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert held <= 1.1 * alone < whole


def test_masks_that_were_collected_on_the_way_come_back(tmp_path):
    """RoSA's support is not in the plan: the checkpoint brings it, or, from the warm-up, leaves it open."""
    rule = RoSA(rank=2, density=0.02)
    batches = [{"input_ids": tiny.tokens(2, 8), "labels": tiny.tokens(2, 8)}]

    def made(folder: Path) -> Any:
        return trainer_of(folder, rule, callbacks=[RosaCallback(batches, warmup_steps=3, progress=False)])

    whole = made(tmp_path / "a")
    assert whole.model.sparsify.open_masks()
    whole.train()
    assert not whole.model.sparsify.open_masks()
    for last in (2, 4):
        other = tmp_path / f"from {last}"
        shutil.copytree(tmp_path / "a", other)
        for step in range(last + 2, 7, 2):
            shutil.rmtree(other / f"checkpoint-{step}")
        again = made(other)
        again.train(resume_from_checkpoint=True)
        tiny.assert_same(values(again.model), values(whole.model))


def test_the_last_complete_checkpoint_is_found(tmp_path):
    trainer = trainer_of(tmp_path / "a", LoRA(rank=2))
    trainer.train()
    assert last_checkpoint(tmp_path / "a") == tmp_path / "a" / "checkpoint-6"
    (tmp_path / "a" / "checkpoint-6" / "trainer_state.json").unlink()  # killed before it was written
    with pytest.warns(UserWarning, match=r"checkpoint-6 is not complete.*trainer_state\.json"):
        assert last_checkpoint(tmp_path / "a") == tmp_path / "a" / "checkpoint-4"
    weights = tmp_path / "a" / "checkpoint-4" / "adapter.safetensors"
    os.truncate(weights, weights.stat().st_size - 8)
    again = trainer_of(tmp_path / "a", LoRA(rank=2))
    with pytest.warns(UserWarning, match="checkpoint-4 is not complete"):
        again.train(resume_from_checkpoint=True)
    assert min(losses(again)) in (1, 3)  # the history of before the checkpoint is in its state
    tiny.assert_same(values(again.model), values(trainer.model))
    for step in (2, 4, 6):
        shutil.rmtree(tmp_path / "a" / f"checkpoint-{step}")
    with pytest.raises(SparsifyError, match="holds no complete checkpoint"):
        trainer_of(tmp_path / "a", LoRA(rank=2)).train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_the_best_one_is_loaded_at_the_end_and_others_go(tmp_path):
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1,
        "metric_for_best_model": "loss", "greater_is_better": True,  # the worst, so that the best is not the last
    }  # fmt: skip
    trainer = trainer_of(tmp_path / "a", LoRA(rank=2), **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6", "the loss must have fallen"
    fresh = tiny.lower(tiny.llama(), LoRA(rank=2))
    fresh.sparsify.load_adapter(best, "best")
    fresh.sparsify.set_adapter("best")
    tiny.assert_same(values(trainer.model), values(fresh))
    assert best.is_dir()
    assert not (tmp_path / "a" / "checkpoint-4").exists() or best.name == "checkpoint-4"
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter.safetensors").exists()


class Stop(hf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "compiled",
    [
        {},
        # what is traced is the host's forward, as in test_training.py; small checkpoints are the case above
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=["eager", "torch_compile"],
)
def test_early_stopping_after_an_interrupt_gives_the_best_back(compiled: dict[str, Any], tmp_path: Path) -> None:
    """With accumulation, activation checkpointing and bf16, as people train."""
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 12,
        "greater_is_better": True,  # the worst, so that it stops while the loss falls
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "bf16": True, **compiled,
    }  # fmt: skip
    found = []
    for name, step in (("whole", 99), ("stopped", 3)):
        stopping = lambda: hf.EarlyStoppingCallback(early_stopping_patience=1)  # noqa: E731
        trainer = trainer_of(tmp_path / name, LoRA(rank=2), callbacks=[stopping(), Stop(step)], **options)
        if step < 12:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer = trainer_of(tmp_path / name, LoRA(rank=2), callbacks=[stopping()], **options)
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        assert (trainer.state.global_step, Path(trainer.state.best_model_checkpoint).name) == (4, "checkpoint-2")
        found.append(values(trainer.model))
    tiny.assert_same(*found)
    fresh = tiny.lower(tiny.llama(), LoRA(rank=2))
    fresh.sparsify.load_adapter(tmp_path / "whole" / "checkpoint-2", "best")
    fresh.sparsify.set_adapter("best")
    tiny.assert_same(found[0], values(fresh))


def test_what_has_no_adapter_or_trains_others_is_refused(tmp_path):
    plain = hf.Trainer(
        model=tiny.llama(),
        args=hf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=Rows(),
    )
    with pytest.raises(SparsifyError, match="was not compiled"):
        adapter_checkpoints(plain)
    with pytest.raises(SparsifyError, match="trains no adapter"):
        trainer_of(tmp_path, Prune(sparsity=0.5, method="magnitude"))
    with pytest.raises(SparsifyError, match="neither a transformers.Trainer nor an accelerate.Accelerator"):
        adapter_checkpoints(object())
    trainer_of(tmp_path / "a", PaCA(rank=3), max_steps=2).train()
    other = trainer_of(tmp_path / "a", PaCA(rank=2))
    with pytest.raises(SparsifyError, match="trained other units or entries"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("rules", [RULES["s2ft"], RULES["rosa"]], ids=["s2ft", "rosa"])
def test_accelerate_saves_and_loads_its_state(rules, tmp_path):
    def made() -> tuple[Any, Any, Any]:
        host = tiny.lower(tiny.llama(), *rules)
        optimizer = torch.optim.AdamW(tiny.trainable(host), lr=1e-2)
        accelerator = accelerate.Accelerator(cpu=True)
        host, optimizer = accelerator.prepare(host, optimizer)
        return adapter_checkpoints(accelerator, host), host, optimizer

    def step(accelerator: Any, host: Any, optimizer: Any) -> float:
        loss = host(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    accelerator, host, optimizer = made()
    step(accelerator, host, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    assert [p.name for p in (tmp_path / "state").glob("*.safetensors")] == ["adapter.safetensors"]
    later = [step(accelerator, host, optimizer) for _ in range(2)]
    other, again, fresh = made()
    other.load_state(str(tmp_path / "state"))
    assert [step(other, again, fresh) for _ in range(2)] == later
    tiny.assert_same(values(again), values(host))
    with pytest.raises(SparsifyError, match="which model"):
        adapter_checkpoints(accelerate.Accelerator(cpu=True))


def test_a_checkpoint_of_before_resumes(tmp_path):
    """Whole-model checkpoints of an earlier run are opened as Trainer does it."""
    trainer = trainer_of(tmp_path / "a", LoRA(rank=2), max_steps=4)
    plain = hf.Trainer(model=trainer.model, args=trainer.args, train_dataset=Rows())
    plain.train()
    assert (tmp_path / "a" / "checkpoint-4" / "model.safetensors").exists()
    again = trainer_of(tmp_path / "a", LoRA(rank=2), max_steps=4)
    again.train(resume_from_checkpoint=True)
    tiny.assert_same(values(again.model), values(plain.model))
