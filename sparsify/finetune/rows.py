"""Rows of training data as token ids and labels: what is learned of each row.

    {"text": "…"}                              every token
    {"prompt": "…", "completion": "…"}         the completion (and the end of the text)
    {"messages": [{"role": …, "content": …}]}  what the assistant says, and what ends its turn
    {"prompt": [messages], "completion": [messages]}   what the assistant says in the completion

Everything else has label −100, which the loss passes over. Files: .jsonl, .parquet, a folder that `datasets` saved (`save_to_disk`), or a
folder of such files. Whatever cannot be used is a PlanError that names the file and the row.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.console import printable
from sparsify.errors import PlanError
from sparsify.files.regular import check_regular, open_regular
from sparsify.plan import nearest
from sparsify.pruning.collect import IGNORED
from sparsify.pruning.texts import chat_text, check_encoding, decoded, encode, read_record

Format = Literal["messages", "text", "prompt-completion"]
KEYS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",), "prompt-completion": ("prompt", "completion"), "text": ("text",),
}  # fmt: skip
SUFFIXES = (".jsonl", ".parquet", ".arrow")
OTHER_WORDS = {"conversations": "messages", "conversation": "messages", "instruction": "prompt", "input": "prompt", "question": "prompt",
               "output": "completion", "response": "completion", "answer": "completion", "content": "text"}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """ids and labels: of equal length. prompt: tokens that stand before the last thing that is learned, for greedy completion; reference:
    its text; None where nothing but text is learned."""

    ids: list[int]
    labels: list[int]
    prompt: list[int] | None = None
    reference: str | None = None

    @property
    def learned(self) -> int:
        """Labels that count, the first token having none before it."""
        return sum(label != IGNORED for label in self.labels[1:])


@printable
@dataclass(frozen=True)
class Rows:
    """Samples of one source. skipped: rows of which nothing is learned once they are cut; cut: rows that were longer."""

    samples: list[Sample]
    format: Format
    skipped: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sample = self.samples[index]
        return {"input_ids": sample.ids, "labels": sample.labels}

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def learned(self) -> int:
        return sum(sample.learned for sample in self.samples)

    def split(self, share: float, seed: int) -> tuple[Rows, Rows]:
        """(training, held out): `share` of the rows, at least one and not all, chosen by the seed."""
        count = len(self.samples)
        if count < 2:
            raise PlanError("data.eval: one row cannot be divided into training and evaluation")
        held = min(max(1, round(count * share)), count - 1)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        out = set(order[:held])
        parts = [[s for i, s in enumerate(self.samples) if (i in out) == which] for which in (False, True)]
        return Rows(parts[0], self.format), Rows(parts[1], self.format)

    def __str__(self) -> str:
        notes = [f"{n} {what}" for n, what in ((self.cut, "cut"), (self.skipped, "skipped: nothing to learn")) if n]
        return f"{len(self)} rows of {self.format}, {self.tokens:,} tokens, {self.learned:,} learned{''.join('; ' + n for n in notes)}"


def read_rows(path: str | Path, tokenizer: Any, *, length: int, format: str = "auto", split: str | None = None) -> Rows:
    """The rows of a file or folder, each cut to `length` tokens. Raises PlanError."""
    samples: list[Sample] = []
    skipped = cut = 0
    for where, record in records(Path(path), split):
        if format == "auto":
            format = format_of(where, record)
        whole = sample_of(where, record, format, tokenizer)
        sample = cut_to(whole, length)
        cut += sample is not whole
        if sample.learned:
            samples.append(sample)
        else:
            skipped += 1
    if not samples:
        why = f"; of all {skipped} nothing is left to learn after {length} tokens" if skipped else ""
        raise PlanError(f"{path}: no row that can be learned{why}")
    return Rows(samples, format, skipped, cut)  # type: ignore[arg-type]


def cut_to(sample: Sample, length: int) -> Sample:
    """The sample itself where it is short enough."""
    if len(sample.ids) <= length:
        return sample
    return Sample(sample.ids[:length], sample.labels[:length], sample.prompt, sample.reference)


# --- from files to records ---


def records(path: Path, split: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of every row of a file or folder."""
    for file in files_of(path, split):
        check_regular(file, PlanError)
        if file.suffix == ".jsonl":
            for number, line in lines_of(file):
                where = f"{file.name}, line {number}"
                yield where, read_record(where, decoded(where, line))
        else:
            yield from table_rows(file)


def lines_of(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line that is not blank, read one after another. Raises PlanError for what is no UTF-8, or empty."""
    empty = True
    with open_regular(file, PlanError) as opened:
        number = 0
        while True:
            try:
                line = opened.readline()
            except OSError as error:
                raise PlanError(f"{file.name} cannot be read: {error}") from error
            if not line:
                break
            if not number:
                check_encoding(file.name, line)
                line = line.removeprefix(codecs.BOM_UTF8)
            number += 1
            if line.strip():
                empty = False
                yield number, line
    if empty:
        raise PlanError(f"{file.name} is empty")


def files_of(path: Path, split: str | None) -> list[Path]:
    """The files of a source, in order. Raises PlanError for what is not there, and for a folder with several splits and no choice."""
    if not path.is_dir():
        check_regular(path, PlanError, "file or folder")
        if path.suffix.lower() not in SUFFIXES:
            raise PlanError(
                f"{path}: rows are read from .jsonl and .parquet files, and from folders that `datasets` saved"
            )
        return [path]
    if (path / "dataset_dict.json").exists():
        document = read_json(path / "dataset_dict.json")
        splits = [
            s
            for s in document.get("splits", [])
            if isinstance(s, str) and s == Path(s).name and s not in ("", ".", "..")
        ]
        return files_of(path / chosen(path, splits, split), None)
    if (path / "state.json").exists():
        return saved_files(path)
    found = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".parquet"))
    names = {stem(p) for p in found}
    if len(names) > 1 or split is not None:
        name = chosen(path, sorted(names), split)
        found = [p for p in found if stem(p) == name]
    if not found:
        raise PlanError(f"{path}: no .jsonl or .parquet file there, and no data set that `datasets` saved")
    return found


def stem(path: Path) -> str:
    """The split that a file's name says: train-00000-of-00002.parquet → train."""
    return path.stem.split("-0")[0]


def chosen(path: Path, splits: Sequence[str], split: str | None) -> str:
    if split is None:
        if len(splits) == 1:
            return splits[0]
        if "train" in splits:
            return "train"
        raise PlanError(f"{path}: holds {', '.join(splits) or 'nothing'}; choose one with split")
    if split not in splits:
        raise PlanError(f"{path}: no split {split!r}{nearest(split, list(splits))}")
    return split


def saved_files(path: Path) -> list[Path]:
    """Arrow files of a folder that `datasets` saved, which stay inside it."""
    state = read_json(path / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise PlanError(f"{path}: was saved with an index over its rows; save it again after flatten_indices()")
    names = [f.get("filename") for f in state.get("_data_files") or [] if isinstance(f, dict)]
    if not names or not all(isinstance(n, str) and n == Path(n).name and n not in ("", ".", "..") for n in names):
        raise PlanError(f"{path / 'state.json'}: expected the names of Arrow files in this folder")
    return [path / str(name) for name in names]


def read_json(path: Path) -> dict[str, Any]:
    from sparsify.files import strict_json

    return strict_json.read_object(path, PlanError)


def table_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a Parquet or Arrow file. Raises PlanError, also where pyarrow is not installed."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise PlanError(
            f"{file}: reading it takes pyarrow: pip install pyarrow, or write the rows as .jsonl"
        ) from error
    wanted = sorted({key for keys in KEYS.values() for key in keys})
    try:
        if file.suffix == ".parquet":
            opened = parquet.ParquetFile(file)
            names = [n for n in opened.schema_arrow.names if n in wanted]
            batches: Any = opened.iter_batches(columns=names or None)
        else:
            batches = arrow.ipc.open_stream(arrow.memory_map(str(file), "r"))
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name}, row {number}", {k: v for k, v in row.items() if v is not None}
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(
            f"{file}: damaged, or no {file.suffix[1:]} file: {' '.join(str(error).split())[:200]}"
        ) from error


# --- from records to samples ---


def format_of(where: str, record: Mapping[str, Any]) -> Format:
    for format, keys in KEYS.items():
        if all(key in record for key in keys):
            return format
    words = [f"{word!r} is called {OTHER_WORDS[word]!r} here" for word in record if word in OTHER_WORDS]
    found = ", ".join(map(repr, list(record)[:8])) or "nothing"
    raise PlanError(
        f"{where}: expected 'messages', 'text', or 'prompt' and 'completion', found {found}{''.join('; ' + w for w in words)}"
    )


def sample_of(where: str, record: Mapping[str, Any], format: str, tokenizer: Any) -> Sample:
    """One row as tokens and labels. Raises PlanError."""
    for key in KEYS[format]:  # type: ignore[index]
        if key not in record:
            raise PlanError(f"{where}: has no {key!r}, which rows of format {format} have")
    if tokenizer is None:
        raise PlanError(f"{where}: the model's folder has no tokenizer")
    if format == "text":
        ids = ended(encode(where, tokenizer, text_of(where, record, "text"), special=True), tokenizer)
        return Sample(ids, list(ids))
    if format == "messages":
        return conversation(where, tokenizer, record["messages"], 0)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation(where, tokenizer, [*prompt, *completion], len(prompt))
    before = encode(where, tokenizer, text_of(where, record, "prompt"), special=True)
    after = ended(encode(where, tokenizer, text_of(where, record, "completion"), special=False), tokenizer)
    return Sample(before + after, [IGNORED] * len(before) + after, before, str(completion))


def text_of(where: str, record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise PlanError(f"{where}: {key!r} must be a string, got {type(record[key]).__name__}")
    return record[key]


def ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With the token that ends a text, where the tokenizer has one: without it nobody learns to stop."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def conversation(where: str, tokenizer: Any, messages: Any, first: int) -> Sample:
    """A conversation; learned are the assistant's turns from message `first` on. Turns are told apart in the template's text: what stands
    between the text up to a turn, with the beginning of an answer, and the text up to its end."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise PlanError(f"{where}: conversations need a tokenizer with a chat template, which this model does not have")
    whole = chat_text(where, tokenizer, messages)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or place < first:
            continue
        before = prompt_text(where, tokenizer, messages[:place])
        after = whole if place + 1 == len(messages) else chat_text(where, tokenizer, messages[: place + 1])
        if not whole.startswith(after) or not after.startswith(before):
            raise PlanError(
                f"{where}: the chat template rewrites earlier turns when later ones follow, so the assistant's cannot be told apart: "
                "give one row for each answer, as prompt and completion"
            )
        spans.append((len(before), len(after)))
    if not spans:
        raise PlanError(f"{where}: no message of the assistant, so there is nothing to learn")
    ids, labels = [], []
    at = 0
    for begin, end in spans:  # pieces are tokenised by themselves, so that no token straddles a border
        for text, learned in ((whole[at:begin], False), (whole[begin:end], True)):
            piece = encode(where, tokenizer, text, special=False) if text else []
            ids += piece
            labels += piece if learned else [IGNORED] * len(piece)
        at = end
    prompt = (
        encode(where, tokenizer, whole[: spans[-1][0]], special=False)
        if len(spans) > 1
        else ids[: labels.count(IGNORED)]
    )
    last = next(m for m in reversed(messages) if m["role"] == "assistant")
    return Sample(ids, labels, prompt, last["content"] if isinstance(last.get("content"), str) else None)


def prompt_text(where: str, tokenizer: Any, messages: Sequence[Any]) -> str:
    if not messages:
        return ""
    chat_text(where, tokenizer, list(messages))  # says what is wrong with them
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


# --- from samples to batches ---


@dataclass(frozen=True)
class Collator:
    """Rows padded to the longest of their batch: `input_ids`, `attention_mask`, `labels`, each (rows, tokens). Packed rows have
    `position_ids` instead of a mask; their padding is a row of its own."""

    pad: int
    left: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, fill: int) -> Tensor:
            out = torch.full((len(rows), width), fill)
            for place, row in enumerate(rows):
                values = torch.tensor(list(row[key]))
                out[place, slice(width - len(values), None) if self.left else slice(len(values))] = values
            return out

        if "position_ids" in rows[0]:
            positions = padded("position_ids", -1)
            counted = torch.arange(width) - torch.tensor([[len(row["input_ids"])] for row in rows])
            positions = torch.where(positions < 0, counted, positions)
            return {
                "input_ids": padded("input_ids", self.pad),
                "position_ids": positions,
                "labels": padded("labels", IGNORED),
            }
        ones = [{"ones": [1] * len(row["input_ids"]), **row} for row in rows]
        rows = ones
        return {
            "input_ids": padded("input_ids", self.pad),
            "attention_mask": padded("ones", 0),
            "labels": padded("labels", IGNORED),
        }


def pad_token(model: Any, tokenizer: Any) -> int:
    """Any token will do: padding is masked."""
    for place in (tokenizer, getattr(model, "config", None)):
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(place, name, None)
            if isinstance(found, int) and found >= 0:
                return found
    return 0


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as a .jsonl file, all of it or nothing."""
    from sparsify.files.atomic import write_text

    write_text(path, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))
    return Path(path)


__all__ = ["Collator", "Rows", "Sample", "pad_token", "read_rows", "write_rows"]
