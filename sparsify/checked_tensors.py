"""Safetensors files from strangers: everything is checked against the file's size before a byte of data is read.

    with CheckedTensors("adapter_model.safetensors") as file:
        file.entries["x"].shape          known from the header; nothing is allocated yet
        file.read("x")                   a copy in memory of its own, never a view of the mapped file

A mapped file kills the process (SIGBUS) when somebody truncates it later; a pipe in its place would wait for ever; a header may
promise terabytes. None of them gets further than an error here.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.json_text import parse_json, short
from sparsify.tensor_file import DTYPES

MAX_HEADER = 100 << 20
MAX_TEXT = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: bytes `[start, stop)` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def open_regular(path: Path, error: type[SparsifyError]) -> tuple[IO[bytes], int]:
    """An open file and its size. Raises `error` unless it is a regular file (or a link to one), without ever waiting for a pipe."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be opened ({problem})") from problem
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        os.close(number)
        raise error(f"{path}: not a regular file")
    return os.fdopen(number, "rb"), status.st_size


def read_text(path: Path, error: type[SparsifyError]) -> str:
    """The UTF-8 text of a regular file of at most 16 MiB."""
    file, size = open_regular(path, error)
    with file:
        if size > MAX_TEXT:
            raise error(f"{path}: {size:,} bytes, at most {MAX_TEXT:,} are read")
        try:
            return file.read(MAX_TEXT + 1).decode()
        except UnicodeDecodeError as problem:
            raise error(f"{path}: not UTF-8 text ({problem})") from problem
        except OSError as problem:
            raise error(f"{path}: cannot be read ({problem})") from problem


class CheckedTensors:
    """A safetensors file whose header holds together. Raises `error`, naming file and tensor, when it does not."""

    def __init__(self, path: str | os.PathLike[str], error: type[SparsifyError]) -> None:
        self.path, self.error = Path(path), error
        self.file, size = open_regular(self.path, error)
        try:
            self.entries, self.metadata = self.read_header(size)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> CheckedTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def damaged(self, what: str) -> SparsifyError:
        return self.error(f"{self.path}: damaged or not a safetensors file ({what})")

    def bytes(self, start: int, count: int) -> bytearray:
        data = bytearray(count)
        try:
            self.file.seek(start)
            got = self.file.readinto(data)  # type: ignore[attr-defined]
        except OSError as problem:
            raise self.error(f"{self.path}: cannot be read ({problem})") from problem
        if got != count:
            raise self.damaged(f"{count - got} bytes are missing from {start} on")
        return data

    def read_header(self, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
        length = int.from_bytes(self.bytes(0, 8), "little") if size >= 8 else MAX_HEADER
        if length > min(size - 8, MAX_HEADER):
            raise self.damaged(f"a file of {size} bytes cannot hold its header")
        try:
            text = self.bytes(8, length).decode()
        except UnicodeDecodeError as problem:
            raise self.damaged("its header is not UTF-8") from problem
        document = parse_json(text, f"the header of {self.path}", self.error)
        if not isinstance(document, dict):
            raise self.damaged("its header is no JSON object")
        metadata = document.pop("__metadata__", None)
        if metadata is None:
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self.damaged("its metadata is not a table of strings")
        first = 8 + length
        entries = {name: self.entry(name, value, first, size) for name, value in document.items()}
        end = first
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != end:
                raise self.damaged(f"tensor {short(name)} leaves a gap or overlaps another")
            end = entry.stop
        if end != size:
            raise self.damaged(f"its tensors end at byte {end}, the file at {size}")
        return entries, metadata

    def entry(self, name: str, value: Any, first: int, size: int) -> Entry:
        value = value if isinstance(value, dict) else {}
        shape, offsets, kind = value.get("shape"), value.get("data_offsets"), value.get("dtype")
        whole = [isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in listed(shape) + listed(offsets)]
        if not isinstance(kind, str) or not isinstance(shape, list) or len(listed(offsets)) != 2 or not all(whole):
            raise self.damaged(f"the entry of {short(name)} is malformed")
        if kind not in DTYPES:
            raise self.error(f"{self.path}: tensor {short(name)} is stored as {short(kind)}, which is not read")
        dtype = DTYPES[kind]
        start, stop = first + offsets[0], first + offsets[1]
        if not start <= stop <= size or prod(shape) * dtype.itemsize != stop - start:
            raise self.damaged(f"tensor {short(name)} of shape {short(shape)} does not fit its bytes")
        return Entry(dtype, tuple(shape), start, stop)

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        entry = self.entries[name]
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = self.bytes(entry.start, entry.stop - entry.start)
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
