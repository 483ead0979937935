"""One run of `claims.py` on recovery after pruning, where recovery data are scarce: cross-entropy, + KL, + SquareHead.

A decoder of 3 layers learns to sort seven digits; SparseGPT prunes it in one shot; 48 rows, over and over, have to bring it back. The
answers are known exactly, and cross-entropy alone can learn the 48 rows by heart: the regime that arXiv 2310.06927 speaks of.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify
from sparsify import Plan, Prune
from sparsify.train.squarehead import Distiller

DIGITS, FEW, STEPS, TEACHER_STEPS, BATCH = 7, 48, 150, 700, 16
LOSSES: dict[str, dict[str, float]] = {
    "ce": {"ce": 1.0, "sq": 0.0},
    "ce+kl": {"ce": 1.0, "kl": 1.0, "sq": 0.0},
    "ce+sq": {"ce": 1.0, "sq": 1.0},
}


def rows(count: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(2, 12, (count, DIGITS), generator=draw)
    ids = torch.cat([x, torch.full((count, 1), 1), x.sort(1).values], 1)
    labels = ids.clone()
    labels[:, : DIGITS + 1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def judge(model: Any, test: dict[str, Tensor]) -> dict[str, float]:
    model.eval()
    out = model(**test)
    right = out.logits[:, DIGITS:-1].argmax(-1) == test["labels"][:, DIGITS + 1 :]
    return {
        "exact": float(right.all(1).float().mean()),
        "token": float(right.float().mean()),
        "loss": float(out.loss),
    }


def descend(model: nn.Module, lr: float, steps: int, loss: Any, warm: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm) * (1 - step / steps)
        model.train()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@lru_cache(maxsize=1)
def teacher() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=32, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    descend(model, 3e-3, TEACHER_STEPS, lambda step: model(**rows(64, step)).loss, 50)
    return model.eval()


@lru_cache(maxsize=8)
def pruned(sparsity: float, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparsify.compile(
            teacher(), Plan([Prune(sparsity=sparsity)]), calibration=[rows(FEW, 5000 + seed)], progress=False
        )


def recover(sparsity: float, loss: str, lr: float, seed: int) -> dict[str, Any]:
    """The record of one run; `loss` "none" is what pruning left."""
    begun = time.process_time()
    test = rows(1024, 10**6)
    student = copy.deepcopy(pruned(sparsity, seed))
    if loss == "none":
        return {"end": judge(student, test), "dense": judge(teacher(), test)}
    few, draw = rows(FEW, 5000 + seed), torch.Generator().manual_seed(seed)
    distiller = Distiller(student, teacher(), **LOSSES[loss])

    def step(_: int) -> Tensor:
        picked = torch.randint(FEW, (BATCH,), generator=draw)
        return distiller({key: value[picked] for key, value in few.items()}).loss

    descend(student, lr, STEPS, step, 10)
    distiller.student_outputs.remove()
    distiller.teacher_outputs.remove()
    fit = judge(student, few)["loss"]
    return {"end": judge(student, test), "fit": fit, "cpu_seconds": round(time.process_time() - begun, 1)}
