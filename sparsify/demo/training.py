"""Batches, training loop, accuracy: the same for every method of the demo."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sparsify.demo.minilm import Classifier, embed

MAX_TOKENS = 40


Features = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Texts:
    """Tokenised texts with labels; `batches` groups texts of like length, so that little is spent on padding."""

    ids: list[list[int]]
    labels: list[int]
    pad: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        rows = [self.ids[i] for i in positions]
        longest = max(map(len, rows))
        inputs = {
            "input_ids": torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }
        return inputs, torch.tensor([self.labels[i] for i in positions])

    def sorted_batches(self, size: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Every text once, by length: for evaluation."""
        order = sorted(range(len(self)), key=lambda i: (len(self.ids[i]), i))
        return [self.take(order[i : i + size]) for i in range(0, len(order), size)]

    def shuffled(self, size: int, generator: torch.Generator) -> list[list[int]]:
        """Batches of positions for one epoch: shuffled, sorted inside windows of 16 batches, shuffled again."""
        order = torch.randperm(len(self), generator=generator).tolist()
        window = 16 * size
        batches = []
        for start in range(0, len(order), window):
            chunk = sorted(order[start : start + window], key=lambda i: (len(self.ids[i]), i))
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def tokenise(tokenizer: Any, texts: tuple[str, ...], labels: tuple[int, ...]) -> Texts:
    ids = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return Texts(ids, list(labels), tokenizer.pad_token_id or 0)


@torch.no_grad()
def predictions(model: nn.Module, texts: Texts, allowed: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """(predicted, true) labels over all texts; `allowed` restricts the answer to some classes."""
    model.eval()
    predicted, true = [], []
    for inputs, labels in texts.sorted_batches(64):
        logits = model(**inputs)
        if allowed is not None:
            keep = torch.full_like(logits, float("-inf"))
            keep[:, allowed] = logits[:, allowed]
            logits = keep
        predicted.append(logits.argmax(-1))
        true.append(labels)
    return torch.cat(predicted), torch.cat(true)


def accuracy(model: nn.Module, texts: Texts, allowed: list[int] | None = None) -> float:
    predicted, true = predictions(model, texts, allowed)
    return (predicted == true).float().mean().item()


def nearest_centroid(train: Features, test: Features, classes: int) -> float:
    """Accuracy with nothing trained at all: the class whose mean embedding is closest (cosine)."""
    (x, y), (x_test, y_test) = train, test
    centres = torch.stack([F.normalize(x[y == c], dim=-1).mean(0) for c in range(classes)])
    scores = F.normalize(x_test, dim=-1) @ F.normalize(centres, dim=-1).T
    return (scores.argmax(-1) == y_test).float().mean().item()


def features(encoder: nn.Module, texts: Texts) -> Features:
    """Embeddings (N, d) by the frozen encoder, and labels (N,)."""
    batches = texts.sorted_batches(64)
    return embed(encoder, [inputs for inputs, _ in batches]), torch.cat([labels for _, labels in batches])


def train_head(train: Features, classes: int, seed: int) -> nn.Linear:
    """A linear classifier on frozen embeddings: what one gets without touching the encoder; every method's start."""
    x, y = train
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.01)
        head.bias.zero_()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    steps = 120
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(x), y).backward()
        optimizer.step()
        schedule.step()
    return head


@dataclass
class Run:
    """What one training run gave. `curve` holds (epoch, accuracy on a fixed part of the held-out texts)."""

    curve: list[tuple[float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    total_seconds: float = 0.0


def train(
    model: Classifier,
    texts: Texts,
    *,
    lr: float,
    head_lr: float | None,
    epochs: float,
    batch: int,
    seed: int,
    name: str,
    watch: Callable[[], float] | None = None,
    points: int = 4,
    allowed: list[int] | None = None,
) -> Run:
    """AdamW with linear decay and a short warm-up, clipping at 1; encoder and head with their own learning rates.

    head_lr: None leaves the head frozen. watch: measured `points` times on the way, outside the clock.
    allowed: classes that the loss considers (the others' logits are left out).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.head.parameters():
        parameter.requires_grad_(head_lr is not None)
    groups = [{"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": lr}]
    if head_lr is not None:
        groups.append({"params": list(model.head.parameters()), "lr": head_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99))
    plan: list[list[int]] = []
    while len(plan) < epochs * -(-len(texts) // batch):
        plan += texts.shuffled(batch, generator)
    plan = plan[: max(1, round(epochs * -(-len(texts) // batch)))]
    warm = max(1, len(plan) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(plan) - step) / max(1, len(plan) - warm))
    )
    marks = {round(len(plan) * k / points) for k in range(1, points + 1)}
    run = Run(curve=[(0.0, watch())] if watch else [])
    seconds = []
    trained = [p for group in groups for p in group["params"]]
    bar = tqdm(plan, desc=name, unit="step", leave=False, dynamic_ncols=True)
    for step, positions in enumerate(bar, 1):
        inputs, labels = texts.take(positions)
        model.train()
        start = time.perf_counter()
        logits = model(**inputs)
        if allowed is not None:
            keep = torch.full_like(logits, float("-inf"))
            logits = keep.index_copy(1, torch.tensor(allowed), logits[:, allowed])
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        run.losses.append(loss.item())
        if step % 10 == 0:
            bar.set_postfix(loss=f"{statistics.mean(run.losses[-10:]):.2f}")
        if watch and step in marks:
            run.curve.append((epochs * step / len(plan), watch()))
    model.eval()
    run.step_seconds, run.total_seconds = statistics.median(seconds), sum(seconds)
    return run
