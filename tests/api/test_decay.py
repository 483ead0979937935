"""Weight decay: values of pretrained weights stay out of it, in groups, in loops and under Trainer; factors do not."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers as hf

from sparsify import S2FT, LoRA, PaCA, RoSA
from sparsify.errors import SparsifyError
from sparsify.modules.adapted import value_names
from sparsify.train import keep_out_of_decay, param_groups

RULES = {
    "S2FT": S2FT(fraction=0.3),
    "PaCA": PaCA(rank=3),
    "RoSA": RoSA(rank=2, density=0.02, mask="random"),
}


class Rows(torch.utils.data.Dataset):
    """Eight rows of tokens."""

    def __init__(self) -> None:
        self.x = tiny.tokens(8, 6)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.x[i], "labels": self.x[i]}


def still_loss(host: Any) -> torch.Tensor:
    """A loss with gradients that are zero everywhere: what moves then, decay moved."""
    return sum((p.sum() * 0 for p in tiny.trainable(host)), torch.zeros(()))


def values_of(host: Any) -> dict[str, torch.Tensor]:
    return {name: host.get_parameter(name).detach().clone() for name in value_names(host)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_groups_keep_pretrained_values_out_of_decay(rule):
    host = tiny.lower(tiny.llama(), rule)
    before = values_of(host)
    assert before
    for groups, moves in ((param_groups(host, lr=0.1, weight_decay=0.5), False), (tiny.trainable(host), True)):
        optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
        for _ in range(2):
            still_loss(host).backward()
            optimizer.step()
            optimizer.zero_grad()
        now = values_of(host)
        assert all(torch.equal(now[name], value) is not moves for name, value in before.items())


def test_factors_and_what_trains_in_full_decay():
    host = tiny.lower(tiny.llama(), LoRA(rank=2, match="*self_attn*"), PaCA(rank=2, match="*mlp*"), train=["lm_head"])
    groups = {g["name"]: g for g in param_groups(host, lr=1e-3, lora_lr=2e-3, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "lora": (2e-3, 0.1), "values": (1e-3, 0.0), "rest": (1e-3, 0.1)
    }  # fmt: skip
    assert [p is host.lm_head.weight for p in groups["rest"]["params"]] == [True]
    assert sum(len(g["params"]) for g in groups.values()) == len(tiny.trainable(host))


def trainer_of(host: Any, folder: Any, **options: Any) -> hf.Trainer:
    class Still(hf.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            return still_loss(model)

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1, "weight_decay": 0.1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    arguments = hf.TrainingArguments(output_dir=str(folder), **settings | options)
    return Still(model=host, args=arguments, train_dataset=Rows())


@pytest.mark.parametrize("kept", [True, False])
def test_trainer_with_weight_decay(kept, tmp_path):
    host = tiny.lower(tiny.llama(), RULES["RoSA"], train=["lm_head"])
    before, head = values_of(host), host.lm_head.weight.detach().clone()
    trainer = trainer_of(host, tmp_path)
    if kept:
        assert keep_out_of_decay(trainer) is trainer
    trainer.train()
    now = values_of(host)
    assert all(torch.equal(now[name], value) is kept for name, value in before.items())
    assert not torch.equal(host.lm_head.weight, head), "what trains in full decays in both"


def test_a_trainer_that_has_its_optimizer_and_what_is_no_trainer_are_refused(tmp_path):
    trainer = trainer_of(tiny.lower(tiny.llama(), RULES["PaCA"]), tmp_path)
    trainer.create_optimizer()
    with pytest.raises(SparsifyError, match="the trainer has its optimizer already; call it before train"):
        keep_out_of_decay(trainer)
    with pytest.raises(SparsifyError, match=r"keep_out_of_decay: object is no transformers.Trainer"):
        keep_out_of_decay(object())


def test_the_report_says_what_decay_would_do():
    host = tiny.lower(tiny.llama(), RULES["PaCA"])
    report = host.sparsify.report
    assert report.values == sum(p.numel() for p in tiny.trainable(host))
    assert f"{report.values:,} trained parameters hold values of weights, not changes: weight decay would pull" in str(
        report
    )
    assert "decay " not in str(tiny.lower(tiny.llama(), LoRA(rank=2)).sparsify.report)
