"""Calibration files: lines are the file's lines, text may hold any character, and whatever cannot be used names its line."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import PlanError
from sparsify.pruning.texts import calibration_batches, lines, split_batches, windows

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"


class Config:
    """Of a decoder with as many tokens as there are bytes."""

    is_encoder_decoder = False
    vocab_size = 256

    def get_text_config(self) -> Config:
        return self


class PairConfig(Config):
    is_encoder_decoder = True


def tokenizer(text: str, **_: Any) -> dict[str, Any]:
    """One token per byte."""
    return {"input_ids": list(text.encode())}


def read(path: Path, config: Any = Config) -> list[str]:
    return [bytes(ids).decode() for ids, _ in lines(path, config(), tokenizer, 999)]


@pytest.mark.parametrize("separator", SEPARATORS[:-1])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_characters_that_python_splits_at_stay_in_their_text(tmp_path: Path, separator: str, end: str) -> None:
    path = tmp_path / "a.jsonl"
    records = [json.dumps({"text": f"a{separator}b"}, ensure_ascii=False, indent=None) for _ in range(2)]
    # control characters may not stand in JSON strings as they are: there, as escapes; the others stand for themselves
    path.write_bytes((end.join(records) + end).encode())
    assert read(path) == [f"a{separator}b"] * 2
    text = tmp_path / "a.txt"
    text.write_bytes(f"a{separator}b{end}c".encode())
    ((ids, _),) = windows(text, Config(), tokenizer, 99)
    assert bytes(ids).decode() == f"a{separator}b\nc"


def test_line_numbers_are_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = json.dumps({"text": f"ab{SEPARATORS[:3]}"}, ensure_ascii=False)
    path.write_bytes(f"{first}\n\r\n \t\n{first}\n{{\n".encode())
    with pytest.raises(PlanError, match=r"^a\.jsonl, line 5: not JSON"):
        read(path)


@pytest.mark.parametrize("form", ["bom", "no last newline", "blank lines", "windows"])
def test_files_as_editors_write_them(tmp_path: Path, form: str) -> None:
    path, records = tmp_path / "a.JSONL", ['{"text": "one"}', '{"text": "two"}']
    path.write_bytes(
        {
            "bom": codecs.BOM_UTF8 + "\n".join(records).encode(),
            "no last newline": "\n".join(records).encode(),
            "blank lines": "\n\n".join(["", *records, " ", ""]).encode(),
            "windows": "\r\n".join([*records, ""]).encode(),
        }[form]
    )
    assert read(path) == ["one", "two"]
    (batch,) = calibration_batches(path, Config(), tokenizer)
    assert batch["input_ids"].shape == (2, 3)
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo")
    ((ids, _),) = windows(path, Config(), tokenizer, 99)
    assert bytes(ids) == b"one\ntwo"


def test_rows_that_finetune_reads_are_one_text_or_input_and_target(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "how many? ", "completion": "two"}\n', encoding="utf-8")
    assert read(path) == ["how many? two"]
    ((ids, target),) = lines(path, PairConfig(), tokenizer, 99)
    assert (bytes(ids), bytes(target)) == (b"how many? ", b"two")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not JSON"),
        (b"[1]", "line 2: expected an object"),
        (b"null", "line 2: expected an object"),
        (b'"text"', "line 2: expected an object"),
        (b"{}", "line 2: expected 'text', 'messages', 'input_ids', or 'prompt' and 'completion', found nothing"),
        (b'{"prompt": "a"}', "line 2: expected 'text', 'messages', 'input_ids', or 'prompt' and 'completion', found prompt"),
        (b'{"prompt": "a", "completion": 3}', "line 2: 'prompt' and 'completion' must both be strings, or both lists"),
        (b'{"prompt": "a", "completion": [{"role": "user"}]}', "line 2: 'prompt' and 'completion' must both be"),
        (b'{"text": 3}', "line 2: 'text' must be a string, got int"),
        (b'{"text": null}', "line 2: 'text' must be a string"),
        (b'{"text": NaN}', "line 2: NaN is no JSON value"),
        (b'{"a": Infinity, "text": "ab"}', "line 2: Infinity is no JSON value"),
        (b'{"text": "ab", "text": "cd"}', "line 2: 'text' stands there twice"),
        (b'{"text": "ab", "a": {"b": 1, "b": 2}}', "line 2: 'b' stands there twice"),
        (rb'{"text": "a\ud800b"}', r"line 2: the text holds \ud800, half of a surrogate pair"),
        (rb'{"text": "\udfff"}', r"line 2: the text holds \udfff"),
        (b'{"text": "a\x01b"}', "line 2: not JSON"),
        (b'{"text": "\xff"}', "line 2 cannot be read as text"),
        (b'{"text": "\xed\xa0\x80"}', "line 2 cannot be read as text"),
        (b'{"text": ' + b"[" * 100_000, "line 2: n"),
        (b'{"input_ids": [' + b"9" * 5000 + b"]}", "line 2: not JSON"),
        (b'{"input_ids": [1e999]}', "line 2: 'input_ids' must be a list of token ids"),
        (b'{"input_ids": [true, 1]}', "line 2: 'input_ids' must be a list of token ids"),
        (b'{"input_ids": [1, 9223372036854775808]}', "line 2: 'input_ids' must be a list of token ids"),
        (b'{"input_ids": "12"}', "line 2: 'input_ids' must be a list of token ids"),
        (b'{"input_ids": [1, 256]}', "token id 256, but the model's vocabulary has 256"),
        (b'{"messages": []}', "line 2: 'messages' must be a list"),
        (b'{"messages": ["a"]}', "line 2: 'messages' must be a list"),
        (b'{"messages": [{"role": "odd", "content": "a"}]}', "line 2: the tokenizer's chat template does not take"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_used(tmp_path: Path, line: bytes, message: str) -> None:
    class Chat:
        chat_template = "{{ messages }}"

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return tokenizer(text)

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            raise ValueError("roles must alternate")

    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "the first"}\n' + line + b"\n")
    with pytest.raises(PlanError) as caught:
        calibration_batches(path, Config(), Chat())
    assert str(caught.value).startswith("a.jsonl")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_targets_are_checked_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for target, message in (
        ('"target": 3', "needs 'target' (text) or 'labels'"), ('"labels": [-1]', "'labels' must be a list"),
        (r'"target": "\ud800"', "half of a surrogate pair"),
    ):  # fmt: skip
        path.write_text(f'{{"text": "ab", {target}}}', encoding="utf-8")
        with pytest.raises(PlanError, match="line 1") as caught:
            lines(path, PairConfig(), tokenizer, 9)
        assert message in str(caught.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_files_that_cannot_be_read(tmp_path: Path, suffix: str) -> None:
    def refuse(path: Path, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            calibration_batches(path, Config(), tokenizer)

    path = tmp_path / f"a{suffix}"
    refuse(path, "does not exist")
    path.mkdir()
    refuse(path, "is a folder")
    path.rmdir()
    os.mkfifo(path)
    refuse(path, "is a pipe or device")
    path.unlink()
    path.symlink_to("/dev/zero")
    refuse(path, "is a pipe or device")
    path.unlink()
    for data, message in (
        (b"", "is empty"), (b" \n\r\n", "is empty"), (codecs.BOM_UTF16_LE + "ab".encode("utf-16-le"), "is UTF-16 text"),
        (codecs.BOM_UTF16_BE + b"\x00a", "is UTF-16 text"), (codecs.BOM_UTF32_LE + b"a\x00\x00\x00", "is UTF-32 text"),
        (b"\x80\x81\n", "cannot be read as text"), (b"\x00\x01\x02" if suffix == ".txt" else b"\x00\n", "NUL|not JSON"),
        (b"a" if suffix == ".txt" else b'{"text": "a"}', "no sample of at least two tokens"),
    ):  # fmt: skip
        path.write_bytes(data)
        refuse(path, message)


def test_a_long_line_is_one_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "ab" * 2_000_000}) + "\n" + json.dumps({"text": "cd"}), encoding="utf-8")
    assert [len(ids) for ids, _ in lines(path, Config(), tokenizer, 7)] == [7, 2]


def test_samples_that_were_not_chosen_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [n, n]}) for n in range(30)), encoding="utf-8")

    def rows(batches: list[Any]) -> list[int]:
        return [int(row[0]) for batch in batches for row in batch["input_ids"]]

    chosen, rest = split_batches(path, Config(), None, samples=20, held_out=6, seed=3)
    assert (len(rows(chosen)), len(rows(rest))) == (20, 6)
    assert not set(rows(chosen)) & set(rows(rest))
    assert rows(calibration_batches(path, Config(), None, samples=20, seed=3)) == rows(chosen)
    chosen, rest = split_batches(path, Config(), None, samples=40, held_out=6, seed=3)
    assert (len(rows(chosen)), rest) == (30, [])
    for seed in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(PlanError, match="64 bits"):
            calibration_batches(path, Config(), None, seed=seed)
