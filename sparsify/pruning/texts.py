"""Calibration batches from a text file: what `sparsify prune --calibration FILE` reads.

    notes.txt      one continuous text ─▶ tokens without special ones ─▶ windows of `sequence` tokens
    tasks.jsonl    one sample per line, cut to `sequence` tokens:
                   {"text": "…"}   {"messages": [{"role": "user", "content": "…"}, …]}   {"input_ids": [1, 5, …]}
                   {"prompt": "…", "completion": "…"}, as `sparsify finetune` reads them: one text, or an encoder–decoder's input and target
                   and for encoder–decoders beside the others {"target": "…"} or {"labels": [7, …]}

Both are UTF-8, with or without a byte-order mark. When there are more samples than asked for, the seed chooses. Samples of unequal
length are padded on the right, and the padding is left out of every statistic by `attention_mask` (decoder side: label −100).
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import torch
from torch import Tensor

from sparsify.errors import PlanError
from sparsify.pruning.collect import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from sparsify.files.strict_json import Json

ROWS = 8
SEQUENCE = 512
WIDE_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
Sample = tuple[list[int], list[int]]


def calibration_batches(
    path: str | Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int = 128,
    sequence: int = 0,
    seed: int = 0,
) -> list[dict[str, Int[Tensor, "batch tokens"]]]:
    """At most `samples` samples as batches of `ROWS` rows: `input_ids`, `attention_mask`, and `labels` for an encoder–decoder.

    config: of the Hugging Face model. tokenizer: None is enough for lines of token ids. sequence: tokens per sample; 0: `SEQUENCE`, or
    fewer where the model or its tokenizer has fewer positions.

    Raises PlanError naming file and line for what cannot be used.
    """
    return split_batches(path, config, tokenizer, samples=samples, held_out=0, sequence=sequence, seed=seed)[0]


def split_batches(
    path: str | Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    held_out: int,
    sequence: int = 0,
    seed: int = 0,
) -> tuple[list[dict[str, Int[Tensor, "batch tokens"]]], list[dict[str, Int[Tensor, "batch tokens"]]]]:
    """`calibration_batches`, and as batches at most `held_out` samples that are not among them (none when all of them are)."""
    path = Path(path)
    if not -(1 << 63) <= seed < 1 << 64:
        raise PlanError(f"seed {seed}: expected a number of 64 bits")
    length = sequence_length(config, tokenizer, sequence)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        found = windows(path, config, tokenizer, length)
    elif suffix == ".jsonl":
        found = lines(path, config, tokenizer, length)
    else:
        raise PlanError(f"{path.name}: calibration is a .txt file (one text) or a .jsonl file (one sample per line)")
    if not found:
        raise PlanError(f"{path.name} has no sample of at least two tokens")
    check_vocabulary(path, config, found)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    pad = getattr(config.get_text_config(), "pad_token_id", None) or 0

    def batches(places: list[int]) -> list[dict[str, Int[Tensor, "batch tokens"]]]:
        chosen = [found[place] for place in sorted(places)]
        return [as_batch(chosen[start : start + ROWS], pad) for start in range(0, len(chosen), ROWS)]

    return batches(order[:samples]), batches(order[samples : samples + held_out])


def sequence_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, asked: int) -> int:
    """Raises PlanError for more tokens than the model has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = positions if isinstance(positions, int) and positions > 0 else None
    if asked:
        if limit is not None and asked > limit:
            raise PlanError(f"--sequence {asked}: the model has {limit} positions")
        return asked
    limits = [SEQUENCE, limit or SEQUENCE, getattr(tokenizer, "model_max_length", SEQUENCE)]
    return min(limits)


def windows(
    path: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, length: int
) -> list[Sample]:
    """Windows of one text that do not overlap; a text shorter than one window is one sample."""
    if is_encoder_decoder(config):
        raise PlanError(
            f"{path.name}: an encoder–decoder needs inputs and targets: give a .jsonl file with lines "
            '{"text": "…", "target": "…"}'
        )
    text = decoded(path.name, read_bytes(path).removeprefix(codecs.BOM_UTF8)).replace("\r\n", "\n")
    if "\0" in text:
        raise PlanError(f"{path.name}: holds NUL characters, so it is no text")
    ids = encode(path.name, tokenizer, text, special=False)
    starts = range(0, max(1, len(ids) - length + 1), length)
    return [(ids[s : s + length], []) for s in starts if len(ids[s : s + length]) > 1]


def lines(path: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, length: int) -> list[Sample]:
    """One sample per line of the file: lines end with a newline byte and with nothing else, so text may hold any character."""
    found: list[Sample] = []
    for number, line in enumerate(read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        record = read_record(where, decoded(where, line))
        two = is_encoder_decoder(config)
        ids = inputs_of(where, record, tokenizer, two)[:length]
        target = targets_of(where, record, tokenizer)[:length] if two else []
        if len(ids) > 1:
            found.append((ids, target))
    return found


def read_record(where: str, line: str) -> dict[str, Json]:
    """The JSON object in one line. Raises PlanError for anything else, and for what readers of JSON disagree about."""

    def constant(name: str) -> NoReturn:
        raise PlanError(f"{where}: {name} is no JSON value")

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for key, value in pairs:
            if key in found:
                raise PlanError(f"{where}: {key!r} stands there twice")
            found[key] = value
        return found

    try:
        record = json.loads(line, parse_constant=constant, object_pairs_hook=unique)
    except RecursionError as error:
        raise PlanError(f"{where}: nested too deeply") from error
    except PlanError:
        raise
    except ValueError as error:  # also for a number of thousands of digits
        raise PlanError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise PlanError(f'{where}: expected an object such as {{"text": "…"}}, got {type(record).__name__}')
    return record


def inputs_of(
    where: str, record: dict[str, Json], tokenizer: PreTrainedTokenizerBase | None, two: bool = False
) -> list[int]:
    """Tokens of a line. two: of an encoder–decoder, whose completions are targets."""
    if "input_ids" in record:
        return checked_ids(where, "input_ids", record["input_ids"])
    if "prompt" in record and "completion" in record:
        return inputs_of(where, joined(where, record["prompt"], [] if two else record["completion"]), tokenizer)
    if "messages" in record:
        if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
            raise PlanError(
                f"{where}: 'messages' need a tokenizer with a chat template, which this model does not have"
            )
        return encode(where, tokenizer, chat_text(where, tokenizer, record["messages"]), special=False)
    text = record.get("text")
    if isinstance(text, str):
        return encode(where, tokenizer, text, special=True)
    if "text" in record:
        raise PlanError(f"{where}: 'text' must be a string, got {type(record['text']).__name__}")
    found = ", ".join(list(record)[:8]) + (", …" if len(record) > 8 else "")
    raise PlanError(
        f"{where}: expected 'text', 'messages', 'input_ids', or 'prompt' and 'completion', found {found or 'nothing'}"
    )


def joined(where: str, prompt: Json, completion: Json) -> dict[str, Json]:
    """A prompt and what follows it as one text or one conversation; nothing follows where `completion` is an empty list."""
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"messages": [*prompt, *completion]}
    if isinstance(prompt, str) and (isinstance(completion, str) or completion == []):
        return {"text": prompt + (completion if isinstance(completion, str) else "")}
    raise PlanError(f"{where}: 'prompt' and 'completion' must both be strings, or both lists of messages")


def chat_text(where: str, tokenizer: PreTrainedTokenizerBase, messages: Json) -> str:
    """Messages through the tokenizer's template. Raises PlanError for what is no conversation, or none that the template takes."""
    if not is_conversation(messages):
        raise PlanError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # the template is a program from the model's folder
        raise PlanError(
            f"{where}: the tokenizer's chat template does not take these messages: {type(error).__name__}: {error}"
        ) from error


def is_conversation(messages: Json) -> TypeGuard[list[dict[str, str]]]:
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


def targets_of(where: str, record: dict[str, Json], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if "labels" in record:
        return checked_ids(where, "labels", record["labels"])
    target = record.get("target", record.get("completion"))
    if isinstance(target, str):
        return encode(where, tokenizer, target, special=True)
    raise PlanError(f"{where}: an encoder–decoder needs 'target' (text) or 'labels' (token ids) beside its input")


def checked_ids(where: str, name: str, ids: object) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
        raise PlanError(f"{where}: '{name}' must be a list of token ids")
    return ids


def encode(where: str, tokenizer: PreTrainedTokenizerBase | None, text: str, *, special: bool) -> list[int]:
    if tokenizer is None:
        raise PlanError(f"{where}: the model's folder has no tokenizer; give a .jsonl file of 'input_ids'")
    if half := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
        raise PlanError(
            f"{where}: the text holds {half.encode('unicode_escape').decode()}, half of a surrogate pair, which is no character"
        )
    try:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except Exception as error:
        raise PlanError(f"{where}: the tokenizer does not take this text: {type(error).__name__}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises PlanError for what cannot be read, and for FIFOs and devices, which may never end."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise PlanError(f"{path.name} is {what}: calibration is a .txt or .jsonl file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PlanError(f"'{path}' does not exist") from error
    except OSError as error:
        raise PlanError(f"{path.name} cannot be read: {error}") from error
    check_encoding(path.name, data)
    if not data.strip():
        raise PlanError(f"{path.name} is empty")
    return data


def check_encoding(name: str, data: bytes) -> None:
    """Raises PlanError for a text that begins as wider encodings than UTF-8 do."""
    for mark, encoding in WIDE_MARKS.items():
        if data.startswith(mark):
            raise PlanError(f"{name}: is {encoding} text; write it as UTF-8")


def decoded(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{where} cannot be read as text: {error}; expected UTF-8") from error


def check_vocabulary(path: Path, config: PreTrainedConfig, found: Sequence[Sample]) -> None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(max((*ids, *target)) for ids, target in found)
    if isinstance(size, int) and largest >= size:
        raise PlanError(f"{path.name}: token id {largest}, but the model's vocabulary has {size}")


def is_encoder_decoder(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def as_batch(rows: Sequence[Sample], pad: int) -> dict[str, Int[Tensor, "batch tokens"]]:
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
