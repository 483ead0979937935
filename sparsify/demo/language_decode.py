"""The tuned model pruned by SparseGPT, quantised, and decoding on generated CPU kernels, beside dense torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import sparsify
from sparsify import CpuOptions, Plan, Prune, Quantize
from sparsify.demo.language_results import Decoder
from sparsify.demo.language_tasks import SQL, calibration_text
from sparsify.demo.language_training import (
    Score,
    answer_loss,
    encode,
    text_blocks,
    training_batches,
)
from sparsify.plan import Rule
from sparsify.train.squarehead import Distiller

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = (1, 32)
"""Tokens per call that kernels are chosen for: one when decoding, some tens for a prompt."""
TASK_ROWS = 32
"""Of the task, among what pruning calibrates on."""
ASKED = "Explain in two sentences what a compiler does."


def chat_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """The question as a chat, up to where the model's turn begins."""
    message = [{"role": "user", "content": ASKED}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def calibration(tokenizer: PreTrainedTokenizerBase, blocks: int, seed: int) -> list[dict[str, Tensor]]:
    """Docstrings in blocks of 128 tokens, and the task's training rows: two batches, each of which walks through the model by itself."""
    text = text_blocks(tokenizer, calibration_text(2000 * blocks), blocks, 128)
    inputs, _ = encode(tokenizer, list(islice(SQL.rows(seed + 5), TASK_ROWS)))
    return [
        {"input_ids": text, "attention_mask": torch.ones_like(text)},
        {key: inputs[key] for key in ("input_ids", "attention_mask")},
    ]


def pruning(sparsity: float, fast: bool) -> Prune:
    """Every linear but the head; fast: only the first two blocks."""
    return Prune(sparsity=sparsity, match=tuple(f"model.layers.{i}.*" for i in range(2)) if fast else "*")


def prune(dense: nn.Module, sparsity: float, batches: Sequence[dict[str, Tensor]]) -> Any:
    """A copy whose linears have that share of zeros, to be trained further; the dense model stays as it is."""
    return sparsify.compile(dense, Plan([pruning(sparsity, False)]), calibration=list(batches), progress=False)


def lower(
    model: nn.Module, fast: bool, rules: Sequence[Rule] = (), batches: Sequence[dict[str, Tensor]] | None = None
) -> Any:
    """An ordinary model → the same in int8 on generated kernels, layer by layer where they are measured to be faster; the head, which
    shares its weight with the embedding, too. rules: what is done before, on `batches`. fast: int8 in the first block alone."""
    plan = Plan([*rules, Quantize(format="int8", match="model.layers.0.*" if fast else "*")], target="cpu")
    options = CpuOptions(tokens=TOKENS[:1] if fast else TOKENS, tied="copy")
    return sparsify.compile(model, plan, calibration=batches, cpu=options, progress=False)


def recover(
    student: Any, teacher: nn.Module, tokenizer: PreTrainedTokenizerBase, steps: int, batch: int, seed: int
) -> None:
    """Train what survived on the task's answers and, in turn, on docstrings, against the dense model's hidden states (SquareHead)."""
    distiller = Distiller(student, teacher, ce=0.0, sq=1.0)
    text = text_blocks(tokenizer, calibration_text(1000 * steps), 2 * steps, 96).split(4)
    student.requires_grad_(True)  # the base that it was made from was frozen
    trained = list(student.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 10, (steps - s) / steps))
    student.train()
    for step, rows in enumerate(
        tqdm(training_batches(SQL, steps, batch, seed + 9), desc="distillation", unit="step", leave=False)
    ):
        if step % 2:
            piece = text[step // 2 % len(text)]
            batch_of_text = {"input_ids": piece, "attention_mask": torch.ones_like(piece)}
            result = distiller(batch_of_text)
            logits = result.outputs.logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten()) + result.loss
        else:
            inputs, labels = encode(tokenizer, rows)
            inputs["logits_to_keep"] = 0
            result = distiller(inputs)
            loss = answer_loss(result.outputs.logits[:, -labels.shape[1] :], labels) + result.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    distiller.student_outputs.remove()
    distiller.teacher_outputs.remove()
    student.eval()


@torch.inference_mode()
def decode(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> tuple[float, str]:
    """(tokens per second after the prompt, what was written): greedy, exactly `tokens` tokens, the faster of two rounds."""
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]

    def run(new: int) -> tuple[float, Tensor]:
        start = time.perf_counter()
        ids = model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        return time.perf_counter() - start, ids[0, length:]

    run(2)  # warms up
    rounds = [(run(tokens + 1), run(1)) for _ in range(2)]
    seconds = min(long[0] - short[0] for long, short in rounds)
    return tokens / max(seconds, 1e-9), str(tokenizer.decode(rounds[0][0][1], skip_special_tokens=True))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def measured(
    label: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    judge: Callable[[Any], tuple[Score, float]] | None,
) -> Decoder:
    speed, sample = decode(model, tokenizer, prompt, tokens)
    score, text = judge(model) if judge else (None, None)
    handle = model.__dict__.get("sparsify")
    size = handle.cpu.bytes_after if handle is not None and handle.cpu is not None else tensor_bytes(model)
    return Decoder(label, speed, size, score, text, sample)
