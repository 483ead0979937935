"""Batches, training and measuring of the language model demo: the same for every method."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sparsify.demo.language_tasks import LanguageTask, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
WINDOW = 16  # batches of like length are cut from that many batches' rows, so that little is spent on padding


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> tuple[dict[str, Any], Tensor]:
    """(model inputs, labels): prompt, answer and end, padded on the left, so that all answers end together.

    `logits_to_keep` asks the model for logits (B, L) of the longest answer only; labels (B, L) belong to the *next* token of
    each, IGNORED before the answer.
    """
    pairs = [(tokenizer(p)["input_ids"], [*tokenizer(a)["input_ids"], tokenizer.eos_token_id]) for p, a in rows]
    longest, answer = max(len(p) + len(a) for p, a in pairs), max(len(a) for _, a in pairs)
    ids, mask, labels = [], [], []
    for prompt, reply in pairs:
        pad = longest - len(prompt) - len(reply)
        ids.append([tokenizer.pad_token_id] * pad + prompt + reply)
        mask.append([0] * pad + [1] * (longest - pad))
        labels.append([IGNORED] * (answer - len(reply)) + reply + [IGNORED])
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "logits_to_keep": answer + 1,
        "use_cache": False,
    }
    return inputs, torch.tensor(labels)


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the answers' tokens: logits (B, L, vocabulary), labels (B, L)."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def loss_of_answers(model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """`answer_loss` of what the model says, with its head run on the answers' tokens alone: for SmolLM2 a fifth of a step's work less."""
    asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    known = labels != IGNORED
    hidden = model.get_decoder()(**asked).last_hidden_state[:, -labels.shape[1] :]
    logits = model.get_output_embeddings()(hidden[known])
    return F.cross_entropy(logits.float(), labels[known])


@dataclass(frozen=True)
class Score:
    """exact: share of questions whose whole answer is right, every token being the likeliest after the right ones before it (what greedy
    decoding writes). loss: per answer token."""

    exact: float
    loss: float


@torch.inference_mode()
def score(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch: int = 16) -> Score:
    model.eval()
    right, loss, tokens = 0, 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    for start in range(0, len(ordered), batch):
        inputs, labels = encode(tokenizer, ordered[start : start + batch])
        logits = model(**inputs).logits
        known = labels != IGNORED
        right += int(((logits.argmax(-1) == labels) | ~known).all(-1).sum())
        loss += F.cross_entropy(logits[known].float(), labels[known], reduction="sum").item()
        tokens += int(known.sum())
    return Score(right / len(rows), loss / tokens)


@torch.inference_mode()
def text_loss(model: nn.Module, blocks: Tensor, batch: int = 4) -> float:
    """Mean loss of the next token over blocks (N, T) of running text, in nats."""
    model.eval()
    total = 0.0
    for piece in blocks.split(batch):
        logits = model(input_ids=piece, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum").item()
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


def text_blocks(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int) -> Tensor:
    """`count` blocks (count, length) of tokens, spread evenly over the text."""
    pieces = []
    stride = len(text) // count
    for start in range(count):
        ids = tokenizer(text[start * stride : start * stride + 12 * length])["input_ids"]
        pieces.append(ids[:length])
    return torch.tensor([piece for piece in pieces if len(piece) == length])


@torch.inference_mode()
def write(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int) -> list[str]:
    """What the model writes after each prompt, greedily, up to its own end."""
    model.eval()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass
class Run:
    """One training run: loss of every step, seconds on the wall and on the processor, median seconds of a step."""

    losses: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def training_batches(task: LanguageTask, steps: int, batch: int, seed: int) -> list[list[Row]]:
    """The rows of every step: the same for all methods. Like lengths stand together, in a random order of steps."""
    stream, order = task.rows(seed), random.Random(seed)
    batches: list[list[Row]] = []
    while len(batches) < steps:
        rows = sorted((next(stream) for _ in range(WINDOW * batch)), key=lambda row: len(row[0]) + len(row[1]))
        cut = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        order.shuffle(cut)
        batches += cut
    return batches[:steps]


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Row]],
    *,
    lr: float,
    name: str,
    seed: int = 0,
    groups: Sequence[dict[str, Any]] = (),
    seen: Callable[[int], None] | None = None,
) -> Run:
    """AdamW on what requires a gradient: warm-up over a tenth, then linearly to zero, clipping at 1, no weight decay.

    groups: parameter groups with rates of their own, in place of `lr`. seen: told the number of each step that is done.
    """
    torch.manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(list(groups) or trained, lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    steps = len(batches)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    run, seconds = Run(), []
    bar = tqdm(batches, desc=name, unit="step", leave=False, dynamic_ncols=True)
    begun, cpu = time.perf_counter(), time.process_time()
    for number, rows in enumerate(bar, 1):
        model.train()  # whoever looks on may have left it in eval mode
        start = time.perf_counter()
        inputs, labels = encode(tokenizer, rows)
        loss = loss_of_answers(model, inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        run.losses.append(loss.item())
        bar.set_postfix(loss=f"{statistics.mean(run.losses[-5:]):.2f}")
        if seen is not None:
            seen(number)
    model.eval()
    run.seconds, run.cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
    run.step_seconds = statistics.median(seconds)
    return run
