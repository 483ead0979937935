"""One run of `claims.py` on adapters: train a method on a task, look at four checkpoints, and say what was learnt and forgotten.

All methods train 1,831,680 parameters (LoRA of rank 6 on the seven linears of each of 30 layers; PaCA 1.9 % more, full fine-tuning all),
see the same batches, warm up over a tenth of the steps and go linearly to zero. RoSA's low-rank part has half of them and LoRA's tuned rate,
its sparse part the rate of sparse entries alone, both times a factor that is tuned. LoRA's and RoSA's scale is 1.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsify
from benchmarks.claim_tasks import OTHER, TASKS, batches, pool
from sparsify import S2FT, LoRA, PaCA, Plan, Quantize, RoSA
from sparsify.demo.language_tasks import Row, general_text
from sparsify.demo.language_training import encode, score, text_blocks, text_loss
from sparsify.demo.language_training import train as descend
from sparsify.plan import Rule
from sparsify.train import param_groups
from sparsify.train.rosa import collect_masks

CHANNELS, HEADS, RANK, COLUMNS, LAYERS = 42, 1, 6, 12, 30
WEIGHTS = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576  # of a layer's seven linears
TRAINED = RANK * (2 * (576 + 576) + 2 * (192 + 576) + 3 * (1536 + 576))  # per layer: 61,056
WARM_UP = 10  # RoSA's low-rank steps before its masks are collected (the paper: 64 of an epoch)
MASK_BATCHES = 8


@dataclass(frozen=True)
class Setting:
    """What every number depends on. judged: held-out questions; blocks: of 128 tokens of general text, at the end and at checkpoints."""

    steps: int = 40
    tuning_steps: int = 20
    batch: int = 8
    judged: int = 192
    glance: int = 48
    blocks: int = 12
    few_blocks: int = 5
    checkpoints: int = 4


Rates = Mapping[str, float]
"""Tuned learning rates by family; "rosa" is the factor on both of RoSA's."""


@dataclass(frozen=True)
class Method:
    """family: whose rate it takes, times `factor`. calibrated: its choice needs training batches. base: a format of the frozen weights."""

    label: str
    rules: Callable[[], Sequence[Rule]]
    family: str
    calibrated: bool = False
    warm_up: Literal["", "extra", "inside"] = ""
    base: Literal["", "nf4"] = ""
    factor: float = 1.0

    def scaled(self, rates: Rates) -> dict[str, float]:
        """The rates that it trains with."""
        return {family: rate * self.factor for family, rate in rates.items()}


def s2ft(select: str, largest: bool = False) -> Callable[[], Sequence[Rule]]:
    def rules() -> Sequence[Rule]:
        options: dict[str, Any] = {"select": select, "largest": largest}
        return S2FT(structure="ffn", units=CHANNELS, **options), S2FT(structure="attention", units=HEADS, **options)

    return rules


def s2ft_above(layer: int, layers: int = LAYERS) -> Callable[[], Sequence[Rule]]:
    """S2FT in the layers from `layer` on, as many channels in all; below them nothing is kept for the backward, and nothing computed."""

    def rules() -> Sequence[Rule]:
        match, times = f"model.layers.{{{layer}-{layers - 1}}}.*", layers // (layers - layer)
        return (
            S2FT(structure="ffn", units=times * CHANNELS, select="random", match=match),
            S2FT(structure="attention", units=times * HEADS, select="random", match=match),
        )

    return rules


def rosa(mask: Any) -> Callable[[], Sequence[Rule]]:
    return lambda: (RoSA(rank=RANK // 2, density=TRAINED / 2 / WEIGHTS, mask=mask),)


def lora() -> Sequence[Rule]:
    return (LoRA(rank=RANK, alpha=float(RANK)),)


def paca() -> Sequence[Rule]:
    return (PaCA(rank=COLUMNS),)


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", lambda: (), "full"),
    "lora": Method("LoRA r6", lora, "lora"),
    "s2ft": Method("S2FT, random units", s2ft("random"), "s2ft"),
    "s2ft-small": Method("S2FT, smallest activation", s2ft("activation"), "s2ft", calibrated=True),
    "s2ft-large": Method("S2FT, largest activation", s2ft("activation", True), "s2ft", calibrated=True),
    "s2ft-upper": Method("S2FT, upper third of the layers", s2ft_above(20), "s2ft"),
    "paca": Method("PaCA r12", paca, "paca"),
    "sparse": Method(
        "sparse alone (mean gradient)",
        lambda: (RoSA(rank=0, density=TRAINED / WEIGHTS, mask="gradient_abs"),),
        "sparse",
        calibrated=True,
    ),
    "rosa": Method("RoSA r3 + 0.86 % (mean gradient)", rosa("gradient_abs"), "rosa", warm_up="extra"),
    "rosa-inside": Method("RoSA, warm-up inside the budget", rosa("gradient_abs"), "rosa", warm_up="inside"),
    "rosa-batch": Method("RoSA, squares of batches", rosa("gradient"), "rosa", warm_up="extra"),
    "rosa-fisher": Method("RoSA, squares of samples", rosa("fisher"), "rosa", warm_up="extra"),
    "rosa-random": Method("RoSA, random mask", rosa("random"), "rosa"),
    "s2ft-third": Method("S2FT at a third of the rate", s2ft("random"), "s2ft", factor=1 / 3),
    "lora-third": Method("LoRA r6 at a third of the rate", lora, "lora", factor=1 / 3),
    "lora-nf4": Method("QLoRA r6 (NF4)", lora, "lora", base="nf4"),
    "paca-nf4": Method("QPaCA r12 (NF4)", paca, "paca", base="nf4"),
    "rosa-nf4": Method("QRoSA r3 + 0.86 % (NF4)", rosa("gradient_abs"), "rosa", warm_up="extra", base="nf4"),
}


def labelled(tokenizer: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch as transformers has it, loss on the answers, for scores that need a gradient."""
    inputs, labels = encode(tokenizer, rows)
    ids = inputs["input_ids"]
    own = torch.full_like(ids, -100)
    answer = labels[:, :-1]  # labels belong to the next token of each of the last L
    own[:, ids.shape[1] - answer.shape[1] :] = answer
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"], "labels": own}


def compiled(base: nn.Module, method: Method, seed: int, calibration: Sequence[Any]) -> Any:
    """The host of a method; for full fine-tuning a copy of the base."""
    rules = list(method.rules())
    if not rules:
        import copy

        return copy.deepcopy(base).requires_grad_(True)
    if method.base:
        rules.insert(0, Quantize(format=method.base))
    batches = list(calibration) if method.calibrated else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparsify.compile(base, Plan(rules, seed=seed), calibration=batches, progress=False)


def groups(model: nn.Module, method: Method, rates: Rates) -> list[dict[str, Any]]:
    if method.family == "full":
        return [{"params": list(model.parameters()), "lr": rates["full"]}]
    if method.family == "rosa":
        factor = rates["rosa"]
        return param_groups(model, lr=1.0, sparse_lr=factor * rates["sparse"], lora_lr=factor * rates["lora"])
    return param_groups(model, lr=rates[method.family], sparse_lr=rates[method.family], lora_lr=rates[method.family])


class Judge:
    """What is measured of a model: on held-out questions, on general text, and on the task that was not trained."""

    def __init__(self, tokenizer: Any, task: str, setting: Setting, validation: bool) -> None:
        self.tokenizer, self.setting = tokenizer, setting
        seed = 901 if validation else 77
        self.rows = TASKS[task].distinct(seed, setting.judged, held_out=True)
        self.other = OTHER[task].distinct(78, setting.glance, held_out=True)
        self.blocks = text_blocks(tokenizer, general_text(), setting.blocks, 128)

    def glance(self, model: nn.Module) -> dict[str, float]:
        loss = score(model, self.tokenizer, self.rows[: self.setting.glance]).loss
        return {"loss": loss, "text": text_loss(model, self.blocks[: self.setting.few_blocks])}

    def whole(self, model: nn.Module) -> dict[str, float]:
        found = score(model, self.tokenizer, self.rows)
        other = score(model, self.tokenizer, self.other).loss
        return {"loss": found.loss, "exact": found.exact, "text": text_loss(model, self.blocks), "other": other}


def train(
    base: nn.Module,
    tokenizer: Any,
    task: str,
    method: Method,
    rates: Rates,
    seed: int,
    setting: Setting,
    tuning: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """(trained model, record) of one run. tuning: fewer steps, judged on validation questions, no checkpoints."""
    torch.manual_seed(seed)
    steps = setting.tuning_steps if tuning else setting.steps
    rows = pool(TASKS[task], 1000 + seed)
    order = batches(rows, steps, setting.batch, seed)
    marks = [labelled(tokenizer, part) for part in batches(rows, MASK_BATCHES, setting.batch, seed + 500)]
    begun = time.process_time()
    model = compiled(base, method, seed, marks)
    if method.warm_up:
        # on batches of its own; then the supports are chosen and everything starts anew
        first = batches(rows, WARM_UP, setting.batch, seed + 900)
        own = groups(model, method, rates)
        descend(model, tokenizer, first, lr=0.0, name="warm-up", seed=seed, groups=own)
        collect_masks(model, marks, progress=False)
        model.sparsify.restart()
        if method.warm_up == "inside":
            order = order[: len(order) - WARM_UP]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    judge = Judge(tokenizer, task, setting, tuning)
    path: list[dict[str, float]] = []
    every = max(1, len(order) // setting.checkpoints)

    def seen(step: int) -> None:
        if not tuning and step % every == 0 and step < len(order):
            path.append({"step": step, **judge.glance(model)})

    own = groups(model, method, rates)
    losses = descend(model, tokenizer, order, lr=0.0, name=method.label, seed=seed, groups=own, seen=seen).losses
    end = judge.whole(model) if not tuning else judge.glance(model)
    if not tuning:
        path.append({"step": len(order), **judge.glance(model)})
    record = {
        "trained": trained,
        "losses": [round(value, 5) for value in losses],
        "last": statistics.mean(losses[-5:]),
        "path": path,
        "end": end,
        "cpu_seconds": round(time.process_time() - begun, 1),
    }
    return model, record
