"""Loss, perplexity and exact answers of a model on rows: what `sparsify eval` prints.

loss         mean of −log p over all learned tokens of all rows (natural logarithm); perplexity: e^loss
exact        share of rows whose greedy completion is the reference, both without spaces at their ends; rows of text have none
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparsify.errors import SparsifyError
from sparsify.finetune.rows import Collator, Rows, Sample, pad_token
from sparsify.program.capture import evaluating
from sparsify.pruning.collect import IGNORED

SPARE_TOKENS = 8  # that a completion may be longer than the reference, to be told apart from it


@dataclass(frozen=True)
class Scores:
    """tokens: learned tokens that the loss is the mean of. exact, asked: answers that are the reference, of how many."""

    loss: float
    tokens: int
    rows: int
    exact: int | None = None
    asked: int | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def exact_match(self) -> float | None:
        return self.exact / self.asked if self.asked and self.exact is not None else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity, "exact_match": self.exact_match}


def evaluate(model: nn.Module, tokenizer: Any, rows: Rows, *, batch: int = 8, exact: bool = True) -> Scores:
    """Measure a model, with whatever adapter is active, on rows. exact: compare greedy completions too, which takes most of the time."""
    with evaluating(model), torch.no_grad():
        loss, tokens = total_loss(model, tokenizer, rows, batch)
        asked = [s for s in rows.samples if s.prompt is not None and s.reference is not None] if exact else []
        right = sum(
            answer == str(sample.reference).strip()
            for start in range(0, len(asked), batch)
            for sample, answer in zip(
                asked[start : start + batch], completions(model, tokenizer, asked[start : start + batch]), strict=True
            )
        )
    return Scores(loss / max(tokens, 1), tokens, len(rows), right if asked else None, len(asked) or None)


def total_loss(model: Any, tokenizer: Any, rows: Rows, batch: int) -> tuple[float, int]:
    """(sum of −log p over learned tokens, their number)."""
    collate, total, count = Collator(pad_token(model, tokenizer)), 0.0, 0
    order = sorted(
        range(len(rows)), key=lambda i: len(rows.samples[i].ids)
    )  # rows of a batch are of one length, nearly
    for start in range(0, len(order), batch):
        inputs = {
            k: v.to(device_of(model)) for k, v in collate([rows[i] for i in order[start : start + batch]]).items()
        }
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        learned = labels != IGNORED
        losses = nn.functional.cross_entropy(logits[learned].double(), labels[learned], reduction="sum")
        total, count = total + float(losses), count + int(learned.sum())
    return total, count


def completions(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[str]:
    """Greedy completions of the samples' prompts, without special tokens and without spaces at their ends."""
    prompts = [list(sample.prompt or ()) for sample in samples]
    if not all(prompts):
        raise SparsifyError("exact match: a row has an empty prompt, which nothing can be generated from")
    longest = max(len(tokenizer(str(s.reference), add_special_tokens=False)["input_ids"]) for s in samples)
    return generate(model, tokenizer, prompts, max_new_tokens=longest + SPARE_TOKENS)


def generate(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[str]:
    """Completions of prompts of unequal length in one batch, padded on the left; greedy unless `options` of `generate` say otherwise."""
    pad = pad_token(model, tokenizer)
    rows = [{"input_ids": prompt, "labels": prompt} for prompt in prompts]
    inputs = {k: v.to(device_of(model)) for k, v in Collator(pad, left=True)(rows).items() if k != "labels"}
    settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": pad, **options}
    found = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


__all__ = ["Scores", "evaluate", "generate"]
