"""Calibration batches from a text file: what `sparsify prune --calibration FILE` reads.

    notes.txt      one continuous text ─▶ tokens without special ones ─▶ windows of `sequence` tokens
    tasks.jsonl    one sample per line, cut to `sequence` tokens:
                   {"text": "…"}   {"messages": [{"role": "user", "content": "…"}, …]}   {"input_ids": [1, 5, …]}
                   and for encoder–decoders beside it {"target": "…"} or {"labels": [7, …]}

When there are more samples than asked for, the seed chooses. Samples of unequal length are padded on the right, and the padding is
left out of every statistic by `attention_mask` (decoder side: label −100).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import PlanError
from sparsify.pruning.collect import IGNORED

ROWS = 8
SEQUENCE = 512
Sample = tuple[list[int], list[int]]


def calibration_batches(
    path: str | Path, config: Any, tokenizer: Any, *, samples: int = 128, sequence: int = 0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """At most `samples` samples as batches of `ROWS` rows: `input_ids`, `attention_mask`, and `labels` for an encoder–decoder.

    config: of the Hugging Face model. tokenizer: None is enough for lines of token ids. sequence: tokens per sample; 0: `SEQUENCE`, or
    fewer where the model or its tokenizer has fewer positions.

    Raises PlanError naming file and line for what cannot be used.
    """
    path = Path(path)
    length = sequence_length(config, tokenizer, sequence)
    if path.suffix == ".txt":
        found = windows(path, config, tokenizer, length)
    elif path.suffix == ".jsonl":
        found = lines(path, config, tokenizer, length)
    else:
        raise PlanError(f"{path.name}: calibration is a .txt file (one text) or a .jsonl file (one sample per line)")
    if not found:
        raise PlanError(f"{path.name} has no sample of at least two tokens")
    check_vocabulary(path, config, found)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [found[place] for place in sorted(order[:samples])]
    pad = getattr(config.get_text_config(), "pad_token_id", None) or 0
    return [as_batch(chosen[start : start + ROWS], pad) for start in range(0, len(chosen), ROWS)]


def sequence_length(config: Any, tokenizer: Any, asked: int) -> int:
    """Raises PlanError for more tokens than the model has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = positions if isinstance(positions, int) and positions > 0 else None
    if asked:
        if limit is not None and asked > limit:
            raise PlanError(f"--sequence {asked}: the model has {limit} positions")
        return asked
    limits = [SEQUENCE, limit or SEQUENCE, getattr(tokenizer, "model_max_length", SEQUENCE)]
    return min(limits)


def windows(path: Path, config: Any, tokenizer: Any, length: int) -> list[Sample]:
    """Windows of one text that do not overlap; a text shorter than one window is one sample."""
    if is_encoder_decoder(config):
        raise PlanError(
            f"{path.name}: an encoder–decoder needs inputs and targets: give a .jsonl file with lines "
            '{"text": "…", "target": "…"}'
        )
    ids = encode(path.name, tokenizer, read_text(path), special=False)
    starts = range(0, max(1, len(ids) - length + 1), length)
    return [(ids[s : s + length], []) for s in starts if len(ids[s : s + length]) > 1]


def lines(path: Path, config: Any, tokenizer: Any, length: int) -> list[Sample]:
    found: list[Sample] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise PlanError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise PlanError(f'{where}: expected an object such as {{"text": "…"}}, got {type(record).__name__}')
        ids = inputs_of(where, record, tokenizer)[:length]
        target = targets_of(where, record, tokenizer)[:length] if is_encoder_decoder(config) else []
        if len(ids) > 1:
            found.append((ids, target))
    return found


def inputs_of(where: str, record: dict[str, Any], tokenizer: Any) -> list[int]:
    if "input_ids" in record:
        return checked_ids(where, "input_ids", record["input_ids"])
    if "messages" in record:
        if getattr(tokenizer, "chat_template", None) is None:
            raise PlanError(
                f"{where}: 'messages' need a tokenizer with a chat template, which this model does not have"
            )
        text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        return encode(where, tokenizer, text, special=False)
    if isinstance(record.get("text"), str):
        return encode(where, tokenizer, record["text"], special=True)
    raise PlanError(f"{where}: expected 'text', 'messages' or 'input_ids', found {', '.join(record) or 'nothing'}")


def targets_of(where: str, record: dict[str, Any], tokenizer: Any) -> list[int]:
    if "labels" in record:
        return checked_ids(where, "labels", record["labels"])
    if isinstance(record.get("target"), str):
        return encode(where, tokenizer, record["target"], special=True)
    raise PlanError(f"{where}: an encoder–decoder needs 'target' (text) or 'labels' (token ids) beside its input")


def checked_ids(where: str, name: str, ids: Any) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise PlanError(f"{where}: '{name}' must be a list of token ids")
    return ids


def encode(where: str, tokenizer: Any, text: str, *, special: bool) -> list[int]:
    if tokenizer is None:
        raise PlanError(f"{where}: the model's folder has no tokenizer; give a .jsonl file of 'input_ids'")
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path.name} cannot be read as text: {error}") from error


def check_vocabulary(path: Path, config: Any, found: Sequence[Sample]) -> None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(max((*ids, *target)) for ids, target in found)
    if isinstance(size, int) and largest >= size:
        raise PlanError(f"{path.name}: token id {largest}, but the model's vocabulary has {size}")


def is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def as_batch(rows: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """Samples padded on the right to the longest."""
    width = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
    }
    if any(target for _, target in rows):
        width = max(len(target) for _, target in rows)
        batch["labels"] = torch.tensor([target + [IGNORED] * (width - len(target)) for _, target in rows])
    return batch
